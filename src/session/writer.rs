//! The writer: takes everything that waits, feeds it to the socket, and flushes once.
//!
//! A flush per message would cap one client at a twelfth of what a flush per batch carries.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket};
use futures_util::stream::SplitSink;
use futures_util::{FutureExt, SinkExt};
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};

use super::outbox::{self, Item};
use super::settings::SessionSettings;
use super::shared::Shared;
use crate::message::{Lane, Timestamp};
use crate::telemetry::metrics::Stage;
use crate::telemetry::trace::Delivery;
use crate::wire::code::{Close, Code, Fault};
use crate::wire::verbs::{Codec, Event};

/// How long a connection that is to be closed may still take to read.
const CLOSING: Duration = Duration::from_secs(5);
/// How long the close frame may take.
const GOODBYE: Duration = Duration::from_secs(1);

type Sink = SplitSink<WebSocket, Message>;

/// Writes until the outbox closes, or the socket does. Returns what the connection was closed with; nothing more is
/// read from it then.
pub async fn write(
    mut sink: Sink,
    session: Arc<Shared>,
    codec: Arc<dyn Codec>,
    settings: Arc<SessionSettings>,
) -> Option<Close> {
    let writing = carry(&mut sink, &session, &*codec, &settings);
    let close = AssertUnwindSafe(writing).catch_unwind().await.unwrap_or_else(|_| {
        session.panicked();
        Some(Close::Internal)
    });
    // Where the socket broke, whoever reads from it learns it here.
    session.outbox.close(close.unwrap_or(Close::GoingAway));
    if let Some(close) = close {
        let frame = CloseFrame { code: close.code(), reason: Utf8Bytes::from_static(close.reason()) };
        // The peer may be gone; the close code is then of no use to anyone.
        let _ = timeout(GOODBYE, sink.send(Message::Close(Some(frame)))).await;
    }
    close
}

/// Writes until the connection is to be closed: with what, or `None` where there is nobody left to tell.
async fn carry(
    sink: &mut Sink,
    session: &Arc<Shared>,
    codec: &dyn Codec,
    settings: &SessionSettings,
) -> Option<Close> {
    let deadline = settings.pong_timeout;
    let mut pings = interval_at(Instant::now() + settings.ping_interval, settings.ping_interval);
    pings.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut taken = tokio::select! {
            taken = session.outbox.take() => taken,
            _ = pings.tick() => {
                match timeout(deadline, sink.send(Message::Ping(axum::body::Bytes::new()))).await {
                    Ok(Ok(())) => continue,
                    _ => return None,
                }
            }
        };
        session.bridge.metrics.queued(taken.items.len());
        let write = timeout(deadline, batch(sink, &mut taken.items, codec, settings.frame_bytes_max()));
        let written = tokio::select! {
            written = write => written.ok(),
            () = closing(session) => None,
        };
        match written {
            Some(Ok(())) => told(session, taken.items),
            Some(Err(_)) => return None,
            // Not even the transport takes anything any more: this client reads nothing.
            None => return Some(Close::SlowConsumer),
        }
        if taken.closing.is_some() {
            return taken.closing;
        }
    }
}

/// Returns once a connection that is to be closed has had time to take what is under way.
async fn closing(session: &Shared) {
    session.outbox.closed().await;
    tokio::time::sleep(CLOSING).await;
}

async fn batch(
    sink: &mut Sink,
    items: &mut [Item],
    codec: &dyn Codec,
    frame_bytes_max: usize,
) -> Result<(), axum::Error> {
    let now = Timestamp::now();
    for item in items {
        let mut frame = codec.encode(&item.event, now);
        // An ack is our own, and bounded by the list that it answers.
        if frame.len() > frame_bytes_max && !matches!(item.event, Event::Ack(_)) {
            *item = too_large(&item.event, frame.len(), frame_bytes_max).into();
            frame = codec.encode(&item.event, now);
        }
        // Codecs write JSON, which is UTF-8; what is not would be a defect that must not pass for a message.
        let Ok(text) = Utf8Bytes::try_from(frame) else { continue };
        sink.feed(Message::Text(text)).await?;
    }
    sink.flush().await
}

/// What stands in the place of a frame that a client of the broker's made larger than ours may be.
fn too_large(event: &Event, size: usize, max: usize) -> Event {
    let what = match (event, outbox::envelope(event)) {
        (Event::Response { topic, .. }, _) => format!("the reply of `{topic}`"),
        (_, Some(envelope)) => match &envelope.stored {
            Some(stored) => format!("the event of `{}` at {}", envelope.topic, stored.position),
            None => format!("an event of `{}`", envelope.topic),
        },
        _ => "an answer".into(),
    };
    let request_id = match event {
        Event::Response { request_id, .. } => Some(request_id.clone()),
        _ => None,
    };
    let message = format!(
        "{what} makes a frame of {size} bytes and was not delivered: this connection takes {max} (session.max_message)"
    );
    Event::Error { request_id, fault: Fault::new(Code::TooLarge, message) }
}

/// Counts what was written, and settles what is acknowledged by that.
fn told(session: &Arc<Shared>, items: Vec<Item>) {
    let metrics = &session.bridge.metrics;
    let now = Timestamp::now();
    let mut settle = Vec::new();
    let mut run = Run { ages: Vec::with_capacity(items.len()), ..Run::default() };
    for item in &items {
        settle.extend(item.settle);
        match (&item.event, &item.route, outbox::envelope(&item.event)) {
            (Event::Gap { .. }, Some(route), _) => metrics.gap(&route.name),
            (_, Some(route), Some(envelope)) => {
                if run.route.is_some_and(|(lane, name)| lane != envelope.lane || *name != *route.name) {
                    run.count(session);
                }
                run.route = Some((envelope.lane, &route.name));
                run.bytes += envelope.message.payload.len();
                let age = now.as_millis() - envelope.message.ts.as_millis();
                run.ages.push(Duration::from_millis(age.max(0) as u64));
                if let (Some(brought), Some(since)) = (envelope.brought, item.since) {
                    metrics.took(envelope.lane, Stage::FanOut, since - brought);
                    metrics.took(envelope.lane, Stage::Write, since.elapsed());
                    session.bridge.tracer.delivered(Delivery {
                        envelope,
                        pattern: &route.pattern,
                        connection: session.id,
                        group: outbox::group(&item.event),
                        brought,
                        waiting: since,
                    });
                }
            }
            _ => {}
        }
        match &item.event {
            Event::Error { fault, .. } => metrics.answered_error(fault.code),
            Event::Ack(ack) => {
                ack.results
                    .iter()
                    .filter_map(|r| r.as_ref().err())
                    .for_each(|f| metrics.answered_error(f.code));
            }
            _ => {}
        }
    }
    run.count(session);
    if !settle.is_empty() {
        session.settle_written(&settle);
    }
}

/// Neighbouring events of one route, counted together.
#[derive(Default)]
struct Run<'a> {
    route: Option<(Lane, &'a str)>,
    bytes: usize,
    ages: Vec<Duration>,
}

impl Run<'_> {
    fn count(&mut self, session: &Shared) {
        if let Some((lane, route)) = self.route.take() {
            session.bridge.metrics.delivered(lane, route, self.bytes, &self.ages);
        }
        self.bytes = 0;
        self.ages.clear();
    }
}
