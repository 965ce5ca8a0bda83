//! What an idle connection costs: the resident memory of the bridge before and after 2,000 of them, each run in a new
//! process.

// What a benchmark cannot do without may panic.
#![allow(clippy::expect_used)]

mod common;

use std::time::Duration;

use common::{Server, spread};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

const CONNECTIONS: usize = 2000;
const RUNS: usize = 3;

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    println!(
        "resident memory per connection, {CONNECTIONS} connections, {RUNS} runs (KiB: min, median, max)"
    );
    for (what, topic) in [
        ("without a subscription", None),
        ("each with a subscription to one ephemeral topic", Some("telemetry.idle")),
        ("each with a subscription to an ephemeral pattern of its own", Some("telemetry.idle.{}.>")),
        ("each with a subscription to one durable topic", Some("orders.idle")),
    ] {
        let figures = spread((0..RUNS).map(|_| runtime.block_on(run(topic))).collect());
        println!("  {:5.1} {:5.1} {:5.1}  {what}", figures[0], figures[1], figures[2]);
    }
}

async fn run(topic: Option<&str>) -> f64 {
    let server = Server::twinspan(false);
    // The first one pays for what all share.
    let mut open = vec![connect(&server, 0, topic).await];
    tokio::time::sleep(Duration::from_millis(500)).await;
    let before = resident(&server);
    for n in 1..=CONNECTIONS {
        open.push(connect(&server, n, topic).await);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let after = resident(&server);
    assert_eq!(open.len(), CONNECTIONS + 1);
    (after - before) as f64 / CONNECTIONS as f64
}

/// In KiB.
fn resident(server: &Server) -> u64 {
    let status = server.proc("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

async fn connect(server: &Server, n: usize, topic: Option<&str>) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(server.address).await.expect("a connection");
    let config = WebSocketConfig::default().read_buffer_size(1024);
    let url = format!("ws://{}/ws", server.address);
    let (mut socket, _) =
        tokio_tungstenite::client_async_with_config(url, stream, Some(config)).await.expect("a WebSocket");
    let frame = match topic {
        Some(topic) => format!(r#"{{"type":"subscribe","topic":"{}"}}"#, topic.replace("{}", &n.to_string())),
        None => r#"{"type":"ping"}"#.into(),
    };
    socket.send(Message::text(frame)).await.expect("sent");
    let answer = socket.next().await.expect("open").expect("an answer").into_text().expect("text");
    assert!(answer.contains(r#""ack""#) || answer.contains(r#""pong""#), "{answer}");
    socket
}
