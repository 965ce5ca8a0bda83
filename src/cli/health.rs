//! `health`: asks a running bridge how it is, for people and for scripts.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use crate::config::{self, Sources};
use crate::message::Lane;

const TIMEOUT: Duration = Duration::from_secs(5);
const DOWN: u8 = 2;

pub async fn health(sources: &Sources, lane: Option<Lane>) -> ExitCode {
    let admin = match config::load(sources) {
        Ok(settings) => settings.server.admin,
        Err(problems) => {
            eprintln!("twinspan: {:#}", super::problems::as_error(&problems));
            return ExitCode::from(DOWN);
        }
    };
    match ask(&format!("http://{admin}/health")).await {
        Ok(health) => judge(&health, lane),
        Err(error) => {
            eprintln!("twinspan: no bridge answers at http://{admin}/health ({error}); is it running?");
            ExitCode::from(DOWN)
        }
    }
}

async fn ask(url: &str) -> anyhow::Result<Value> {
    crate::lane::install_crypto();
    let client = reqwest::Client::builder().timeout(TIMEOUT).no_proxy().build()?;
    Ok(client.get(url).send().await?.json().await?)
}

fn judge(health: &Value, only: Option<Lane>) -> ExitCode {
    let (mut down, mut degraded) = (0, 0);
    let lanes: Vec<_> = Lane::ALL.into_iter().filter(|lane| only.is_none_or(|only| only == *lane)).collect();
    for lane in &lanes {
        let check = &health["checks"][format!("{lane}:lane")][0];
        let said = match check["status"].as_str() {
            Some("pass") => "up",
            Some("warn") => "degraded",
            _ => "down",
        };
        down += usize::from(said == "down");
        degraded += usize::from(said == "degraded");
        let backend = check["componentId"].as_str().unwrap_or("?");
        let trip = check["observedValue"].as_f64().map(|s| format!(", round trip {:.2} ms", s * 1000.0));
        let output = check["output"].as_str().map(|text| format!(": {text}"));
        println!(
            "{:<9} {:<4} {backend}{}{}",
            lane.as_str(),
            said,
            trip.unwrap_or_default(),
            output.unwrap_or_default()
        );
    }
    let spool = &health["checks"]["durable:lane"][0]["outage"]["spool"];
    if let Some(messages @ 1..) = spool["messages"].as_u64() {
        let age = spool["oldest_age_seconds"].as_u64().unwrap_or_default();
        println!("spool     {messages} messages wait for the durable lane, the oldest for {age} s");
    }
    if let Some(set_aside @ 1..) = spool["set_aside"].as_u64() {
        println!("spool     {set_aside} messages that the durable lane refused are kept aside");
    }
    let reload = &health["checks"]["config:reload"][0];
    if reload["status"] != "pass" {
        println!("routes    the last reload was refused: {}", reload["output"].as_str().unwrap_or("?"));
    }
    match (down, lanes.len(), health["status"].as_str()) {
        (0, _, Some("pass")) => ExitCode::SUCCESS,
        (0, _, _) if only.is_some() && degraded == 0 => ExitCode::SUCCESS,
        (down, all, _) if down == all => ExitCode::from(DOWN),
        _ => ExitCode::FAILURE,
    }
}
