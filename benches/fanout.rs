//! One publisher, 500 subscribers, bursts of 100 messages of 200 bytes, as many as wait for a client by default: the
//! bridge against the smallest server that sends each message with a flush of its own. Both are in processes of their
//! own on core 0, take turns, and are read by the same client on core 1.

// What a benchmark cannot do without may panic.
#![allow(clippy::expect_used)]

mod common;

use std::net::SocketAddr;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::ws::{Message as Frame, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::routing::get;
use common::{Server, free, on_core, spread};
use futures_util::future::join_all;
use futures_util::{SinkExt, StreamExt};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

const SUBSCRIBERS: usize = 500;
const BURST: usize = 100;
const BURSTS: usize = 40;
const RUNS: usize = 3;
const PAYLOAD_BYTES: usize = 200;
/// Tells this program to be the other server, on this address.
const PLAIN_SERVER: &str = "FANOUT_PLAIN_SERVER";

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    if let Ok(address) = std::env::var(PLAIN_SERVER) {
        return runtime.block_on(serve_plain(address.parse().expect("an address")));
    }
    // Where it cannot be pinned, both servers have the same disturbance.
    let _ = Command::new("taskset").args(["-cp", "1", &std::process::id().to_string()]).output();
    runtime.block_on(compare());
}

async fn compare() {
    let payload = "x".repeat(PAYLOAD_BYTES - 2);
    let publish = format!(
        r#"{{"type":"publish","topic":"telemetry.fan","confirm":false,"message":{{"payload":"{payload}"}}}}"#
    );
    let twinspan = Server::twinspan(true);
    let mut ours = Crowd::gather(&twinspan, r#"{"type":"subscribe","topic":"telemetry.fan"}"#, publish).await;
    let address = free();
    let program = std::env::current_exe().expect("this program");
    let mut command = on_core(Some(0), &program.to_string_lossy());
    command.env(PLAIN_SERVER, address.to_string());
    let plain = Server::spawn(command, address, None);
    // The same bytes a message on both sides.
    let event = "x".repeat(ours.burst(1).await);
    let mut theirs = Crowd::gather(&plain, "subscribe", event).await;

    let mut figures = [(); 4].map(|()| Vec::new());
    for _ in 0..RUNS {
        for (at, server, crowd) in [(0, &plain, &mut theirs), (2, &twinspan, &mut ours)] {
            let (begun, before) = (Instant::now(), processor(server));
            for _ in 0..BURSTS {
                crowd.burst(BURST).await;
            }
            let deliveries = (SUBSCRIBERS * BURST * BURSTS) as f64;
            figures[at].push(deliveries / begun.elapsed().as_secs_f64() / 1e6);
            figures[at + 1].push((processor(server) - before).as_secs_f64() * 1e6 / deliveries);
        }
    }
    let [plain_rate, plain_cost, rate, cost] = figures.map(spread);
    println!(
        "{SUBSCRIBERS} subscribers, {RUNS} runs of {BURSTS} bursts of {BURST} messages (min, median, max)"
    );
    let line = |what, rate: [f64; 3], cost: [f64; 3]| {
        println!(
            "  {what:22} {:5.2} {:5.2} {:5.2} M deliveries/s   {:5.2} {:5.2} {:5.2} µs of processor a delivery",
            rate[0], rate[1], rate[2], cost[0], cost[1], cost[2]
        );
    };
    line("a flush per message", plain_rate, plain_cost);
    line("twinspan", rate, cost);
    println!(
        "  ratio of the medians: {:.1} times the deliveries, {:.1} times less processor",
        rate[1] / plain_rate[1],
        plain_cost[1] / cost[1]
    );
}

/// Processor time used so far; the kernel counts it in hundredths of a second.
fn processor(server: &Server) -> Duration {
    let stat = server.proc("stat");
    let fields: Vec<_> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<u64>().expect("a number");
    Duration::from_millis((ticks(11) + ticks(12)) * 10)
}

/// A publisher and its subscribers.
struct Crowd {
    publisher: WebSocketStream<TcpStream>,
    subscribers: Vec<Counter>,
    frame: Message,
}

impl Crowd {
    async fn gather(server: &Server, subscribe: &str, publish: String) -> Self {
        let mut subscribers = Vec::new();
        for _ in 0..SUBSCRIBERS {
            let mut socket = connect(server.address).await;
            socket.send(Message::text(subscribe)).await.expect("sent");
            socket.next().await.expect("open").expect("an answer");
            // Nothing was published yet, so nothing is lost with the library's buffer.
            subscribers.push(Counter { stream: socket.into_inner(), skip: 0, header: Vec::new() });
        }
        Self { publisher: connect(server.address).await, subscribers, frame: Message::text(publish) }
    }

    /// Publishes so many messages at once and returns once everybody has them: the bytes of the last one.
    async fn burst(&mut self, count: usize) -> usize {
        let publish = async {
            for _ in 0..count {
                self.publisher.feed(self.frame.clone()).await.expect("sent");
            }
            self.publisher.flush().await.expect("sent");
        };
        let (_, counted) = tokio::join!(
            publish,
            join_all(self.subscribers.iter_mut().map(|subscriber| subscriber.take(count)))
        );
        counted[0]
    }
}

async fn connect(address: SocketAddr) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(address).await.expect("a connection");
    stream.set_nodelay(true).expect("no delay");
    tokio_tungstenite::client_async(format!("ws://{address}/ws"), stream).await.expect("a WebSocket").0
}

/// Counts frames without looking into them, so that the client is not what is measured.
struct Counter {
    stream: TcpStream,
    /// Bytes of a frame that are still to come.
    skip: usize,
    /// The beginning of a header.
    header: Vec<u8>,
}

impl Counter {
    async fn take(&mut self, count: usize) -> usize {
        let mut buffer = [0; 16 * 1024];
        let (mut begun, mut last) = (0, 0);
        while begun < count || self.skip > 0 {
            let read = self.stream.read(&mut buffer).await.expect("open");
            assert!(read > 0, "the server hung up");
            let mut bytes = &buffer[..read];
            while !bytes.is_empty() {
                let skipped = self.skip.min(bytes.len());
                self.skip -= skipped;
                bytes = &bytes[skipped..];
                while self.skip == 0 && !bytes.is_empty() {
                    self.header.push(bytes[0]);
                    bytes = &bytes[1..];
                    self.skip = match self.header[..] {
                        [_, 127, ..] => panic!("no message is so large"),
                        [_, 126, high, low] => usize::from(u16::from_be_bytes([high, low])),
                        [_, length] if length < 126 => usize::from(length),
                        _ => continue,
                    };
                    assert_eq!(self.header[0], 0x81, "a text message: no gap, no close");
                    self.header.clear();
                    begun += 1;
                    last = self.skip;
                    break;
                }
            }
        }
        assert_eq!(begun, count, "nothing more than was published");
        last
    }
}

/// The other server: what comes from one is sent to all who subscribed, each message with its flush.
async fn serve_plain(address: SocketAddr) {
    type Subscribers = Arc<Mutex<Vec<mpsc::Sender<Utf8Bytes>>>>;
    let subscribers = Subscribers::default();
    let way_in = get(async move |upgrade: WebSocketUpgrade| {
        let upgrade = upgrade.read_buffer_size(4096).write_buffer_size(4096);
        upgrade.on_upgrade(async move |mut socket: WebSocket| {
            while let Some(Ok(Frame::Text(text))) = socket.recv().await {
                if text == "subscribe" {
                    // Room for a whole burst, as the bridge has.
                    let (sender, mut messages) = mpsc::channel(BURST);
                    subscribers.lock().expect("no panic").push(sender);
                    socket.send(Frame::text("ok")).await.expect("sent");
                    while let Some(message) = messages.recv().await {
                        socket.send(Frame::Text(message)).await.expect("sent");
                    }
                }
                for subscriber in &*subscribers.lock().expect("no panic") {
                    subscriber.try_send(text.clone()).expect("room");
                }
            }
        })
    });
    let listener = tokio::net::TcpListener::bind(address).await.expect("a free port");
    axum::serve(listener, Router::new().route("/ws", way_in)).await.expect("served");
}
