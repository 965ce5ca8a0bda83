//! One client from hello to goodbye.
//!
//! ```text
//! socket ──▶ reader ──command──▶ bridge ──outcome──▶ ┐
//!                                lanes  ───events──▶ outbox ──▶ writer ──▶ socket
//! ```
//! The reader takes one frame after the other, so that what a client does in a row happens in that row: a publish
//! behind a subscribe is heard by it, and publishes keep their order. It waits for a publish only until the message
//! has its place in line; what becomes of it is answered whenever that is known.

pub mod deliveries;
pub mod feeds;
pub mod outbox;
pub mod reader;
pub mod replies;
pub mod roster;
pub mod settings;
pub mod shared;
pub mod subscription;
pub mod writer;

mod commands;
mod live;
mod merge;

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::extract::ws::WebSocket;
use futures_util::{FutureExt, StreamExt};

use crate::bridge::Bridge;
use crate::wire::code::Close;
use crate::wire::verbs::{Codec, Event, Info};
use reader::Reader;
use roster::Roster;
use settings::SessionSettings;
use shared::Shared;

/// How a connection speaks.
#[derive(Clone)]
pub struct Manner {
    pub codec: Arc<dyn Codec>,
    /// The first frame says who we are.
    pub greets: bool,
    /// The label on metrics.
    pub dialect: &'static str,
}

/// Serves one connection to its end.
pub async fn run(
    socket: WebSocket,
    bridge: Arc<Bridge>,
    roster: Arc<Roster>,
    settings: Arc<SessionSettings>,
    manner: Manner,
) {
    let metrics = bridge.metrics.clone();
    let session = Shared::new(roster.next(), bridge, &settings);
    roster.enter(&session);
    metrics.connected(manner.dialect);
    let (sink, stream) = socket.split();
    let writer = tokio::spawn(writer::write(sink, session.clone(), manner.codec.clone(), settings.clone()));
    if manner.greets {
        session.outbox.push(Event::Info(Info::Connected {
            connection: session.id,
            version: env!("CARGO_PKG_VERSION"),
            max_message: settings.max_message,
            max_subscriptions: settings.max_subscriptions,
            ping_interval: settings.ping_interval,
        }));
    }
    let mut reader = Reader::new(session.clone(), manner.codec, settings, stream);
    let mut left = false;
    match AssertUnwindSafe(reader.run()).catch_unwind().await {
        Ok(Some(close)) => _ = session.outbox.close(close),
        Ok(None) => left = session.outbox.close(Close::GoingAway),
        Err(_) => session.panicked(),
    }
    reader.end();
    // The writer has a deadline for every step, so it ends.
    match writer.await {
        Ok(Some(close)) if !left => metrics.closed(close),
        _ => {}
    }
    roster.leave(session.id);
    metrics.disconnected(manner.dialect);
}
