//! What people type, and what they get: the program itself, with its exit codes.

use std::path::Path;
use std::process::{Output, Stdio};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use twinspan::message::Draft;

use crate::harness::{Plan, Span, draft, soon};
use crate::proxy::Proxy;

fn twinspan(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twinspan"));
    command.current_dir(dir).kill_on_drop(true).stdin(std::process::Stdio::null());
    command
}

async fn run(dir: &Path, arguments: &[&str]) -> Output {
    soon(twinspan(dir).args(arguments).output()).await.unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Starts a command whose output is read line by line.
fn start(dir: &Path, arguments: &[&str]) -> (Child, Lines<BufReader<ChildStdout>>) {
    let mut command = twinspan(dir);
    // A process group of its own, as a shell would make it.
    command.args(arguments).process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    (child, lines)
}

async fn line(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    soon(lines.next_line()).await.unwrap().expect("one more line")
}

/// What Ctrl-C does: everybody in the process group is told.
async fn interrupt(child: &Child) {
    let group = format!("-{}", child.id().unwrap());
    assert!(Command::new("kill").args(["-INT", "--", &group]).status().await.unwrap().success());
}

async fn ended(child: Child) -> (Option<i32>, String) {
    let output = soon(child.wait_with_output()).await.unwrap();
    (output.status.code(), text(&output.stderr))
}

#[tokio::test]
async fn pub_and_sub_talk_through_the_bridge() {
    let span = Span::start().await;
    let here = Path::new(".");
    let url = span.url();
    let mut lines = twinspan(here);
    lines.args(["pub", "--url", &url, "orders.t", "-"]).stdin(std::process::Stdio::piped());
    let mut child = lines.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for n in 0..1000 {
        stdin.write_all(format!("{n}\n").as_bytes()).await.unwrap();
    }
    drop(stdin);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert!(output.status.success());
    let acks = text(&output.stdout);
    assert_eq!(acks.lines().filter(|line| line.starts_with("stored ")).count(), 1000);

    let output =
        run(here, &["sub", "--url", &url, "orders.>", "--from", "earliest", "--count", "1000"]).await;
    let expected: Vec<_> = (0..1000).map(|n| format!("orders.t {n}")).collect();
    assert_eq!(text(&output.stdout).lines().collect::<Vec<_>>(), expected, "in the order of the lines");

    let output =
        run(here, &["sub", "--url", &url, "orders.t", "--last", "2", "--count", "2", "--json"]).await;
    for line in text(&output.stdout).lines() {
        let frame: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(frame["type"], "event");
    }
    let output =
        run(here, &["sub", "--url", &url, "orders.t", "--group", "g", "--from", "earliest", "--count", "3"])
            .await;
    assert_eq!(text(&output.stdout), "orders.t 0\norders.t 1\norders.t 2\n");

    let output = run(here, &["pub", "--url", &url, "nowhere", "1"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("NO_ROUTE"), "{}", text(&output.stderr));
    let output = run(here, &["pub", "--url", "ws://127.0.0.1:1/ws", "orders.t", "1"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cannot connect to ws://127.0.0.1:1/ws"));
    let mut deaf = twinspan(here);
    let output =
        soon(deaf.args(["pub", "--url", &url, "orders.t", "1"]).env("RUST_LOG", "wran").output()).await;
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("RUST_LOG: \"wran\" is no level"), "{}", text(&output.stderr));
}

#[tokio::test]
async fn request_is_answered_by_reply() {
    let span = Span::start().await;
    let url = span.url();
    let mut server = twinspan(Path::new("."));
    server.args(["reply", "--url", &url, "svc.upper", "--exec", "tr a-z A-Z"]);
    let mut server = server.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(server.stderr.take().unwrap()).lines();
    assert!(soon(said.next_line()).await.unwrap().unwrap().starts_with("Answering svc.upper"));
    let output =
        run(Path::new("."), &["request", "--url", &url, "svc.upper", "quiet", "--timeout-ms", "5000"]).await;
    assert_eq!(text(&output.stdout), "QUIET\n");
    let output = run(Path::new("."), &["request", "--url", &url, "svc.nobody", "1"]).await;
    assert!(text(&output.stderr).contains("NO_RESPONDERS"));
}

#[tokio::test]
async fn health_says_how_the_bridge_is_by_its_exit_code() {
    let span = Span::start().await;
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let admin = format!("server.admin={}", span.running.admin);
    let output = run(here, &["health", "--set", &admin]).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let lines = text(&output.stdout);
    assert!(lines.lines().next().unwrap().starts_with("ephemeral up"), "{lines}");
    assert!(lines.lines().nth(1).unwrap().starts_with("durable   up"), "{lines}");
    let output = run(here, &["health", "--lane", "durable", "--set", &admin]).await;
    assert_eq!((output.status.code(), text(&output.stdout).lines().count()), (Some(0), 1));
    let output = run(here, &["health", "--set", "server.admin=127.0.0.1:1"]).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("no bridge answers"));
}

#[tokio::test]
async fn check_and_explain_read_what_serve_would() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = run(here, &["check"]).await;
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let output = run(here, &["explain", "orders.eu"]).await;
    let said = text(&output.stdout);
    assert!(
        said.contains("orders.eu takes the durable lane") && said.contains("config/routes.toml:"),
        "{said}"
    );
    let output = run(here, &["explain", "orders.eu", "--json"]).await;
    assert!(serde_json::from_slice::<serde_json::Value>(&output.stdout).is_ok());
    let output = run(here, &["check", "--set", "session.pingg_interval=1s"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("ping_interval"), "{}", text(&output.stderr));
    let empty = tempfile::tempdir().unwrap();
    let output = run(empty.path(), &["serve"]).await;
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("routes"), "{}", text(&output.stderr));
}

#[tokio::test]
async fn sigterm_ends_serve_in_order_with_exit_code_0() {
    let dir = tempfile::tempdir().unwrap();
    let routes = "[[route]]\ntopic = \">\"\nlane = \"ephemeral\"\n";
    std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
    let mut command = twinspan(dir.path());
    command.args(["serve", "--set", "server.listen=127.0.0.1:0", "--set", "server.admin=127.0.0.1:0"]);
    command.args(["--set", "server.routes=routes.toml"]).env("RUST_LOG", "error");
    let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let first = soon(lines.next_line()).await.unwrap().unwrap();
    assert!(first.contains("ws://127.0.0.1:"), "{first}");
    let kill = Command::new("kill").args(["-TERM", &child.id().unwrap().to_string()]).status().await.unwrap();
    assert!(kill.success());
    assert_eq!(soon(child.wait()).await.unwrap().code(), Some(0));
}

#[tokio::test]
async fn pub_says_how_many_lines_were_acknowledged_and_fails_if_one_was_not() {
    let span = Span::start().await;
    let mut command = twinspan(Path::new("."));
    command.args(["pub", "--url", &span.url(), "orders.t", "-"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let large = "x".repeat(600 * 1024);
    stdin.write_all(format!("1\n{large}\n3\n").as_bytes()).await.unwrap();
    drop(stdin);
    let output = soon(child.wait_with_output()).await.unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout).lines().count(), 2);
    let said = text(&output.stderr);
    assert!(said.contains("-- line 2: TOO_LARGE") && said.contains("2 acknowledged, 1 failed."), "{said}");
}

#[tokio::test]
async fn sub_goes_on_where_it_was_when_the_bridge_comes_back() {
    let span = Span::start().await;
    let way = Proxy::start();
    way.lead_to(span.running.listen.port());
    let url = format!("ws://127.0.0.1:{}/ws", way.port());
    let (child, mut lines) =
        start(Path::new("."), &["sub", "--url", &url, "orders.*", "--from", "earliest", "--count", "20"]);
    let client = span.client().await;
    for n in 0..10 {
        client.publish("orders.t", &draft(n.to_string())).await.unwrap();
        assert_eq!(line(&mut lines).await, format!("orders.t {n}"));
    }
    let span = Span::inside(Plan::default(), span.stop().await).await;
    // Nobody listens yet.
    let client = span.client().await;
    for n in 10..15 {
        client.publish("orders.t", &draft(n.to_string())).await.unwrap();
    }
    way.lead_to(span.running.listen.port());
    for n in 10..20 {
        if n >= 15 {
            client.publish("orders.t", &draft(n.to_string())).await.unwrap();
        }
        assert_eq!(line(&mut lines).await, format!("orders.t {n}"));
    }
    assert_eq!(ended(child).await.0, Some(0));
}

#[tokio::test]
async fn consume_runs_a_command_for_each_message_until_it_succeeds() {
    let span = Span::start().await;
    let client = span.client().await;
    let mut expected = Vec::new();
    for (key, payload) in [(None, "plain"), (Some("flaky"), "{\"n\": 1}")] {
        let draft = Draft { key: key.map(str::to_owned), ..draft(payload) };
        let ack = client.publish("orders.t", &draft).await.unwrap();
        let (id, position) = (ack.message_id.unwrap(), ack.position.unwrap());
        for attempt in 1..=if key.is_some() { 2 } else { 1 } {
            let key = key.unwrap_or("none");
            expected.push(format!("{payload}|orders.t|{id}|{key}|{attempt}|{position}"));
        }
    }
    let command = r#"echo "$(cat)|$MESSAGE_TOPIC|$MESSAGE_ID|${MESSAGE_KEY-none}|$MESSAGE_ATTEMPT|$MESSAGE_POSITION"
        [ "$MESSAGE_KEY" != flaky ] || [ "$MESSAGE_ATTEMPT" -gt 1 ]"#;
    let url = span.url();
    let (child, mut lines) = start(
        Path::new("."),
        &["consume", "--url", &url, "orders.t", "--group", "g", "--from", "earliest", "--exec", command],
    );
    for expected in expected {
        assert_eq!(line(&mut lines).await, expected);
    }
    interrupt(&child).await;
    let (code, said) = ended(child).await;
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("2 handled, 1 failed, 0 of those handled without confirmation."), "{said}");
}

#[tokio::test]
async fn consume_waits_for_a_command_that_runs_when_it_is_to_end() {
    let (span, dir) = (Span::start().await, tempfile::tempdir().unwrap());
    let (client, url) = (span.client().await, span.url());
    for n in 0..3 {
        client.publish("orders.t", &draft(n.to_string())).await.unwrap();
    }
    let command = "echo begun; until [ -e go ]; do sleep 0.02; done; echo ended";
    let group = ["--group", "g", "--from", "earliest"];
    let (child, mut lines) =
        start(dir.path(), &[&["consume", "--url", &url, "orders.t", "--exec", command][..], &group].concat());
    assert_eq!(line(&mut lines).await, "begun");
    interrupt(&child).await;
    std::fs::write(dir.path().join("go"), "").unwrap();
    assert_eq!(line(&mut lines).await, "ended");
    let (code, said) = ended(child).await;
    assert!(code == Some(0) && said.contains("1 handled, 0 failed, 0 of"), "{said}");
    // The first is done; what was taken beside it is there for the next member, which prints it as JSON.
    let (child, mut lines) =
        start(dir.path(), &[&["consume", "--url", &url, "orders.t"][..], &group].concat());
    let mut payloads = Vec::new();
    for _ in 0..2 {
        let frame: serde_json::Value = serde_json::from_str(&line(&mut lines).await).unwrap();
        payloads.push(frame["message"]["payload"].clone());
    }
    assert_eq!(payloads, [1, 2]);
    interrupt(&child).await;
    let (code, said) = ended(child).await;
    assert!(code == Some(0) && said.contains("2 handled, 0 failed, 0 of"), "{said}");
}
