//! `health`: asks a running bridge how it is, for people and for scripts.

use std::fmt::Write as _;
use std::io::{IsTerminal, stdout};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use super::terminal::Signals;
use crate::config::{self, Sources};
use crate::message::Lane;

const TIMEOUT: Duration = Duration::from_secs(5);
const WATCH_EVERY: Duration = Duration::from_secs(2);
const DEGRADED: u8 = 1;
const DOWN: u8 = 2;
/// Groups that are named.
const GROUPS_MAX: usize = 20;
/// To the top left corner, and nothing below it.
const CLEAR: &str = "\x1b[H\x1b[2J";

/// Once, or again and again until a signal ends it; the exit code is that of the last time.
pub async fn health(sources: &Sources, lane: Option<Lane>, watch: bool) -> ExitCode {
    let admin = match config::load(sources) {
        Ok(settings) => settings.server.admin,
        Err(problems) => {
            eprintln!("twinspan: {:#}", super::problems::as_error(&problems));
            return ExitCode::from(DOWN);
        }
    };
    let url = format!("http://{admin}/health");
    let mut code = look(&url, lane).await;
    if watch {
        let mut signals = match Signals::new() {
            Ok(signals) => signals,
            Err(error) => {
                eprintln!("twinspan: {error:#}");
                return ExitCode::from(DOWN);
            }
        };
        while tokio::time::timeout(WATCH_EVERY, signals.next()).await.is_err() {
            if stdout().is_terminal() {
                print!("{CLEAR}");
            }
            code = look(&url, lane).await;
        }
    }
    ExitCode::from(code)
}

async fn look(url: &str, lane: Option<Lane>) -> u8 {
    match ask(url).await {
        Ok(health) => {
            print!("{}", told(&health, lane));
            judge(&health, lane)
        }
        Err(error) => {
            eprintln!("twinspan: no bridge answers at {url} ({error}); is it running?");
            DOWN
        }
    }
}

async fn ask(url: &str) -> anyhow::Result<Value> {
    crate::lane::install_crypto();
    let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
    Ok(client.get(url).send().await?.json().await?)
}

fn lanes(only: Option<Lane>) -> impl Iterator<Item = Lane> {
    Lane::ALL.into_iter().filter(move |lane| only.is_none_or(|only| only == *lane))
}

fn check(health: &Value, lane: Lane) -> &Value {
    &health["checks"][format!("{lane}:lane")][0]
}

fn judge(health: &Value, only: Option<Lane>) -> u8 {
    let states: Vec<_> =
        lanes(only).map(|lane| check(health, lane)["state"].as_str().unwrap_or("down")).collect();
    match health["status"].as_str() {
        _ if states.iter().all(|state| *state == "down") => DOWN,
        Some("pass") => 0,
        // Of a lane alone, what is wrong elsewhere is no matter.
        _ if only.is_some() && states == ["up"] => 0,
        _ => DEGRADED,
    }
}

/// A line for each lane, and one for whatever deserves a look.
fn told(health: &Value, only: Option<Lane>) -> String {
    let mut text = String::new();
    for lane in lanes(only) {
        let _ = writeln!(text, "{}", lane_told(check(health, lane), lane));
    }
    let spool = &check(health, Lane::Durable)["outage"]["spool"];
    if let Some(messages @ 1..) = spool["messages"].as_u64() {
        let age = spool["oldest_age_seconds"].as_u64().unwrap_or_default();
        let _ =
            writeln!(text, "spool     {messages} messages wait for the durable lane, the oldest for {age} s");
    }
    if let Some(set_aside @ 1..) = spool["set_aside"].as_u64() {
        let _ = writeln!(text, "spool     {set_aside} messages that the durable lane refused are kept aside");
    }
    let groups = health["checks"]["groups:backlog"].as_array().into_iter().flatten();
    let behind = groups.filter(|group| group["observedValue"].as_u64() > Some(0));
    for group in behind.take(GROUPS_MAX) {
        let (name, backlog) = (group["componentId"].as_str().unwrap_or("?"), &group["observedValue"]);
        let (members, unacked) = (&group["members"], &group["unacked"]);
        let _ = writeln!(
            text,
            "group     {name}: {backlog} messages behind, {unacked} held by {members} members"
        );
    }
    let reload = &health["checks"]["config:reload"][0];
    if reload["status"] != "pass" {
        let why = reload["output"].as_str().unwrap_or("?");
        let _ = writeln!(text, "routes    the last reload was refused: {why}");
    }
    text
}

fn lane_told(check: &Value, lane: Lane) -> String {
    let (state, backend) =
        (check["state"].as_str().unwrap_or("down"), check["backend"].as_str().unwrap_or("?"));
    let mut line = format!("{:<9} {state:<8} {backend}", lane.as_str());
    let broker = &check["broker"];
    if let Some(version) = broker["version"].as_str() {
        let _ = write!(line, " {version}");
    }
    if let (Some(p50), Some(p99)) = (check["probe"]["p50_ms"].as_f64(), check["probe"]["p99_ms"].as_f64()) {
        let _ = write!(line, ", heartbeat p50 {p50:.2} ms p99 {p99:.2} ms");
    }
    if let Some(missing @ 1..) = check["probe"]["missing"].as_u64() {
        let _ = write!(line, ", {missing} of {} missing in the last minute", check["probe"]["count"]);
    }
    if let (Some(taken), Some(written)) = (check["in_per_second"].as_f64(), check["out_per_second"].as_f64())
    {
        let _ = write!(line, ", {taken:.1}/s in, {written:.1}/s out");
    }
    if let Some(connections) = broker["connections"].as_u64() {
        let _ = write!(line, ", broker has {connections} connections");
    }
    if let Some(slow @ 1..) = broker["slow_consumers"].as_u64() {
        let _ = write!(line, ", {slow} slow consumers");
    }
    for why in [&check["why"], &broker["problem"]].into_iter().filter_map(Value::as_str) {
        let _ = write!(line, ": {why}");
    }
    line
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn health(ephemeral: &str, durable: &str, status: &str) -> Value {
        json!({"status": status, "checks": {
            "ephemeral:lane": [{"state": ephemeral, "backend": "nats"}],
            "durable:lane": [{"state": durable, "backend": "pulsar"}],
        }})
    }

    #[test]
    fn the_exit_code_is_0_well_1_degraded_and_2_down() {
        for (ephemeral, durable, status, only, code) in [
            ("up", "up", "pass", None, 0),
            // A reload was refused.
            ("up", "up", "warn", None, 1),
            ("up", "degraded", "warn", None, 1),
            ("up", "down", "warn", None, 1),
            ("down", "down", "fail", None, 2),
            ("up", "down", "warn", Some(Lane::Ephemeral), 0),
            ("up", "down", "warn", Some(Lane::Durable), 2),
            ("up", "degraded", "warn", Some(Lane::Durable), 1),
        ] {
            assert_eq!(
                judge(&health(ephemeral, durable, status), only),
                code,
                "{ephemeral} {durable} {only:?}"
            );
        }
    }

    #[test]
    fn a_lane_is_told_in_a_line_and_what_deserves_a_look_in_others() {
        let mut said = health("up", "degraded", "warn");
        said["checks"]["ephemeral:lane"][0]["probe"] =
            json!({"count": 60, "missing": 0, "p50_ms": 0.4, "p99_ms": 1.25});
        said["checks"]["ephemeral:lane"][0]["broker"] =
            json!({"version": "2.12.1", "connections": 3, "slow_consumers": 2, "problem": null});
        said["checks"]["ephemeral:lane"][0]["in_per_second"] = json!(1.5);
        said["checks"]["ephemeral:lane"][0]["out_per_second"] = json!(30.0);
        said["checks"]["durable:lane"][0]["why"] = json!("2 topics take nothing: their breakers are open");
        said["checks"]["durable:lane"][0]["outage"] =
            json!({"spool": {"messages": 7, "oldest_age_seconds": 4}});
        said["checks"]["groups:backlog"] =
            json!([{"componentId": "orders.a billing", "observedValue": 3, "unacked": 1, "members": 2}]);
        said["checks"]["config:reload"] = json!([{"status": "warn", "output": "routes.toml:3: lane"}]);
        let expected = [
            "ephemeral up       nats 2.12.1, heartbeat p50 0.40 ms p99 1.25 ms, 1.5/s in, 30.0/s out, broker has 3 connections, 2 slow consumers",
            "durable   degraded pulsar: 2 topics take nothing: their breakers are open",
            "spool     7 messages wait for the durable lane, the oldest for 4 s",
            "group     orders.a billing: 3 messages behind, 1 held by 2 members",
            "routes    the last reload was refused: routes.toml:3: lane",
        ];
        assert_eq!(told(&said, None).lines().collect::<Vec<_>>(), expected);
    }
}
