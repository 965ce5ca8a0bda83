//! What stands before the brokers of a cluster that its clients cannot reach, as Pulsar's own proxy does.
//!
//! ```text
//! lane ──CONNECT──────────────────────▶ gateway ──▶ a broker      asked who serves a topic, it answers with a name
//! lane ──CONNECT to the name that ────▶ gateway ──▶ that broker   that leads nowhere and says: through the gateway
//!        was answered
//! ```
//! Pulsar's proxy is in none of the registries that the brokers of the tests come from.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;
use pulsar::proto::BaseCommand;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Ends when it is dropped, and all connections with it.
pub struct Gateway {
    port: u16,
    brokers: Arc<[Behind]>,
    _accepting: JoinSet<()>,
}

struct Behind {
    port: u16,
    /// Connections that asked for it by name.
    passed_on: AtomicUsize,
}

impl Gateway {
    pub async fn start(ports: impl IntoIterator<Item = u16>) -> Self {
        let brokers: Arc<[_]> =
            ports.into_iter().map(|port| Behind { port, passed_on: AtomicUsize::new(0) }).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut accepting = JoinSet::new();
        let behind = brokers.clone();
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((client, _)) = listener.accept().await {
                connections.spawn(carry(client, behind.clone()));
            }
        });
        Self { port, brokers, _accepting: accepting }
    }

    pub fn url(&self) -> String {
        format!("pulsar://127.0.0.1:{}", self.port)
    }

    /// How many connections asked for the n-th broker by its name.
    pub fn passed_on(&self, broker: usize) -> usize {
        self.brokers[broker].passed_on.load(Ordering::Relaxed)
    }
}

/// The name that clients get to know; nobody can resolve it.
fn name(port: u16) -> String {
    format!("broker-{port}.invalid:6650")
}

async fn carry(mut client: TcpStream, brokers: Arc<[Behind]>) -> Option<()> {
    client.set_nodelay(true).ok()?;
    let mut bytes = BytesMut::new();
    let first = frame(&mut client, &mut bytes).await?;
    let asked = command(&first)?.connect?.proxy_to_broker_url;
    let to = match &asked {
        Some(asked) => {
            let to = brokers.iter().find(|broker| name(broker.port) == *asked)?;
            to.passed_on.fetch_add(1, Ordering::Relaxed);
            to.port
        }
        None => brokers[0].port,
    };
    let mut broker = TcpStream::connect(("127.0.0.1", to)).await.ok()?;
    broker.set_nodelay(true).ok()?;
    broker.write_all(&first).await.ok()?;
    broker.write_all(&bytes).await.ok()?;
    let (mut from_client, mut to_client) = client.split();
    let (mut from_broker, mut to_broker) = broker.split();
    let answers = async {
        let mut bytes = BytesMut::new();
        loop {
            let frame = frame(&mut from_broker, &mut bytes).await?;
            let named =
                |url: &str| format!("pulsar://{}", name(url.rsplit(':').next().unwrap().parse().unwrap()));
            to_client.write_all(&served_by(frame, named, true)).await.ok()?;
        }
    };
    tokio::select! {
        carried = copy(&mut from_client, &mut to_broker) => carried.ok().map(drop),
        ended = answers => ended,
    }
}

/// Where the frame says who serves a topic, it says this instead.
pub fn served_by(frame: Bytes, instead: impl Fn(&str) -> String, proxied: bool) -> Bytes {
    let Some(mut answer) = command(&frame) else { return frame };
    let Some(found) = &mut answer.lookup_topic_response else { return frame };
    let Some(url) = &mut found.broker_service_url else { return frame };
    *url = instead(url);
    found.proxy_through_service_url = Some(proxied);
    encode(&answer)
}

pub fn encode(command: &BaseCommand) -> Bytes {
    let body = command.encode_to_vec();
    let mut whole = BytesMut::new();
    whole.put_u32(body.len() as u32 + 4);
    whole.put_u32(body.len() as u32);
    whole.put_slice(&body);
    whole.freeze()
}

/// The next whole frame; `None` once the connection has ended.
pub async fn frame(from: &mut (impl AsyncRead + Unpin), bytes: &mut BytesMut) -> Option<Bytes> {
    loop {
        if let Some(size) = bytes.first_chunk::<4>().map(|size| u32::from_be_bytes(*size) as usize + 4)
            && bytes.len() >= size
        {
            return Some(bytes.split_to(size).freeze());
        }
        if from.read_buf(bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// What a frame says, a message's payload aside.
pub fn command(frame: &Bytes) -> Option<BaseCommand> {
    let mut frame = frame.slice(4..);
    let size = frame.get_u32() as usize;
    BaseCommand::decode(frame.slice(..size)).ok()
}
