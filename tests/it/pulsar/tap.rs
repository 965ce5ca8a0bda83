//! A place on the wire between a lane and a broker, where a test sees every frame and says what goes on in its place.
//!
//! ```text
//! lane ──frame──▶ tap ──what the test makes of it──▶ broker, and back
//! ```
//! What it brings about is what a broker does anyway, only never when a test wants it.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pulsar::proto::BaseCommand;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::gateway::{command, frame, served_by};
use super::*;

/// Where a frame comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum From {
    Lane,
    Broker,
}

type Pass = Arc<dyn Fn(From, &BaseCommand, Bytes) -> Vec<Bytes> + Send + Sync>;

/// Ends when it is dropped, and all connections with it.
pub struct Tap {
    url: String,
    /// No connection is made or lasts.
    closed: watch::Sender<bool>,
    _accepting: JoinSet<()>,
}

impl Tap {
    pub async fn on(
        broker: &Broker,
        pass: impl Fn(From, &BaseCommand, Bytes) -> Vec<Bytes> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("pulsar://{}", listener.local_addr().unwrap());
        let (us, to, pass): (_, _, Pass) = (url.clone(), broker.port(), Arc::new(pass));
        let closed = watch::Sender::new(false);
        let mut accepting = JoinSet::new();
        let cut = closed.subscribe();
        accepting.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((lane, _)) = listener.accept().await {
                let (mut cut, us, pass) = (cut.clone(), us.clone(), pass.clone());
                connections.spawn(async move {
                    tokio::select! {
                        biased;
                        _ = cut.wait_for(|closed| *closed) => {}
                        _ = carry(lane, to, us, pass) => {}
                    }
                });
            }
        });
        Self { url, closed, _accepting: accepting }
    }

    /// Ends every connection, those that are made from now on at once.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    pub fn open(&self) {
        self.closed.send_replace(false);
    }

    /// How a lane has to be set to come by here.
    pub fn settings(&self, broker: &Broker) -> DurableSettings {
        DurableSettings { url: vec![self.url.clone()], ..settings(broker) }
    }

    /// A lane whose every connection comes by here, with a topic of its own.
    pub async fn bed(&self, broker: &Broker) -> Bed {
        let route = route("t.>", "persistent://public/default/{topic}");
        Bed::with(route, self.settings(broker)).await
    }
}

async fn carry(mut lane: TcpStream, to: u16, us: String, pass: Pass) -> Option<()> {
    let mut broker = TcpStream::connect(("127.0.0.1", to)).await.ok()?;
    for side in [&lane, &broker] {
        side.set_nodelay(true).ok()?;
    }
    let (from_lane, to_lane) = lane.split();
    let (from_broker, to_broker) = broker.split();
    tokio::select! {
        ended = pump(From::Lane, from_lane, to_broker, &us, &pass) => ended,
        ended = pump(From::Broker, from_broker, to_lane, &us, &pass) => ended,
    }
}

async fn pump(
    whose: From,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    us: &str,
    pass: &Pass,
) -> Option<()> {
    let mut bytes = BytesMut::new();
    loop {
        // Whoever asks who serves a topic is to come by here again.
        let next = served_by(frame(&mut from, &mut bytes).await?, |_| us.to_owned(), false);
        let passed = match command(&next) {
            Some(command) => pass(whose, &command, next),
            None => vec![next],
        };
        to.write_all(&passed.concat()).await.ok()?;
    }
}
