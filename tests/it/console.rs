//! The console, driven in a real browser, on a real nats-server that is killed meanwhile.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::brokers::{Broker, Options, install, left_out, script};
use crate::harness::{Plan, Span, answer, draft, http_client, next};

const DRIVER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/console/drive.mjs");
/// Where the pictures are, for who wants to look at them.
const SCREENSHOTS: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/console");
/// A browser beside two brokers on a small machine takes its time.
const DRIVEN_WITHIN: Duration = Duration::from_secs(600);

#[tokio::test]
async fn the_console_shows_both_lanes_and_takes_part_in_them() {
    if left_out() {
        return;
    }
    install("browser").await;
    let mut nats = Broker::nats(&Options::default()).await;
    let Some(mut plan) = Plan::on_brokers().await else { return };
    plan.ephemeral_on(nats.url());
    plan.settings.lanes.ephemeral.monitor_url = nats.monitor_url();
    let routes = plan.routes.clone();
    let span = Span::with(plan).await;

    let mut member = span.client().await;
    member.subscribe("orders.backlog", json!({"group": "billing", "prefetch": 1})).await.unwrap();
    for n in 0..3 {
        member.publish("orders.backlog", &draft(n.to_string())).await.unwrap();
    }
    next(&mut member).await;

    let driving = async {
        let mut driver = Command::from(script())
            .args(["exec", "browser", DRIVER, &span.admin("/"), SCREENSHOTS])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut answers = driver.stdin.take().unwrap();
        let mut words = BufReader::new(driver.stdout.take().unwrap()).lines();
        while let Some(word) = words.next_line().await.unwrap() {
            match word.as_str() {
                "kill nats" => nats.kill(),
                "restart nats" => nats.restart().await,
                "add a route" => span.write_routes(&format!(
                    "{routes}\n[[route]]\nname = \"added.by.reload\"\ntopic = \"added.>\"\nlane = \"ephemeral\"\n"
                )),
                told => {
                    println!("{told}");
                    continue;
                }
            }
            answers.write_all(b"done\n").await.unwrap();
        }
        driver.wait().await.unwrap()
    };
    let driven = tokio::time::timeout(DRIVEN_WITHIN, driving).await.expect("the browser is driven in time");
    assert!(driven.success(), "what the browser did not find stands above; pictures are in {SCREENSHOTS}");
}

#[tokio::test]
async fn a_browser_gets_the_console_and_a_terminal_a_line() {
    let span = Span::start().await;
    let get = async |path: &str, accept: &str| {
        http_client().get(span.admin(path)).header("accept", accept).send().await.unwrap()
    };
    for accept in ["*/*", "text/plain"] {
        let line = get("/", accept).await.text().await.unwrap();
        assert!(line.starts_with("twinspan, for operators: /metrics"), "{line}");
    }
    let page = get("/", "text/html,application/xhtml+xml,*/*;q=0.8").await;
    assert_eq!(page.headers()["content-type"], "text/html; charset=utf-8");
    assert_eq!(page.headers()["x-content-type-options"], "nosniff");
    let policy = page.headers()["content-security-policy"].to_str().unwrap().to_owned();
    for directive in [
        "default-src 'none'",
        "script-src 'self'",
        "frame-ancestors 'none'",
        &format!("connect-src 'self' ws://{0} wss://{0};", span.running.listen),
    ] {
        assert!(policy.contains(directive), "{directive}: {policy}");
    }
    let script = get("/console/console.js", "*/*").await;
    assert_eq!(script.headers()["content-type"], "text/javascript; charset=utf-8");
    let tag = script.headers()["etag"].clone();
    let again = http_client().get(span.admin("/console/console.js")).header("if-none-match", tag);
    assert_eq!(again.send().await.unwrap().status(), 304);
    assert_eq!(answer(get("/console/../server/mod.rs", "*/*").await).await.0, 404);
}
