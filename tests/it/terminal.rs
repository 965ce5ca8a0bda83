//! What people type, and what they get: the program itself, with its exit codes.

use std::path::Path;
use std::process::Output;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

use crate::harness::{Span, soon};

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
