//! The reader: takes one frame after the other, and sees to it that each is answered.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::ws::{Message, WebSocket};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, SplitStream};
use futures_util::{FutureExt, StreamExt};
use tokio::sync::broadcast::error::RecvError;
use tokio::time::{Instant, sleep, timeout};
use tokio_tungstenite::tungstenite;
use tracing::error;

use super::commands::Acknowledged;
use super::outbox::Item;
use super::settings::SessionSettings;
use super::shared::Shared;
use super::subscription::Subscription;
use crate::bridge::Notice;
use crate::message::Timestamp;
use crate::telemetry::trace::Came;
use crate::topic::Pattern;
use crate::wire::code::{Close, Code};
use crate::wire::verbs::{Asked, Codec, Command, Event, Info};

/// How long the goodbye of a peer may take.
const CLOSING: Duration = Duration::from_secs(1);

/// Frames that are taken in one turn, if so many are there: what they acknowledge is acknowledged together.
const TURN: usize = 128;

/// What becomes of a command later: the frame that answers it, where there is one.
pub type Pending = FuturesUnordered<BoxFuture<'static, Option<Item>>>;

/// The messages of lists that are under way: each counts as much as a publish of its own.
#[derive(Clone, Default)]
pub struct Listed(Arc<AtomicUsize>);

/// So many are under way until this is dropped.
pub struct UnderWay(Listed, usize);

impl Listed {
    pub fn under_way(&self, count: usize) -> UnderWay {
        self.0.fetch_add(count, Ordering::Relaxed);
        UnderWay(self.clone(), count)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.0.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// What the stream brings.
type Heard = Option<Result<Message, axum::Error>>;

pub struct Reader {
    pub session: Arc<Shared>,
    codec: Arc<dyn Codec>,
    pub settings: Arc<SessionSettings>,
    stream: SplitStream<WebSocket>,
    pub subscriptions: HashMap<(Pattern, Option<String>), Arc<Subscription>>,
    pub pending: Pending,
    /// What this turn has acknowledged so far.
    pub acknowledged: Acknowledged,
    pub listed: Listed,
    /// When the frame came: what a turn's first one publishes is the sample that is timed.
    pub heard: Came,
    draining: bool,
}

impl Reader {
    pub fn new(
        session: Arc<Shared>,
        codec: Arc<dyn Codec>,
        settings: Arc<SessionSettings>,
        stream: SplitStream<WebSocket>,
    ) -> Self {
        Self {
            session,
            codec,
            settings,
            stream,
            subscriptions: HashMap::new(),
            pending: Pending::new(),
            acknowledged: Acknowledged::default(),
            listed: Listed::default(),
            heard: Came::default(),
            draining: false,
        }
    }

    /// Reads until the connection is to be closed: with what, or `None` where the peer closed it.
    pub async fn run(&mut self) -> Option<Close> {
        let session = self.session.clone();
        let mut notices = session.bridge.notices();
        let mut heard = Instant::now();
        let silence = sleep(self.settings.pong_timeout);
        tokio::pin!(silence);
        loop {
            if self.draining && self.pending.is_empty() {
                return Some(Close::GoingAway);
            }
            let has_room = self.has_room();
            let next = async {
                // A client that does not read is not read from.
                session.outbox.fewer_than(self.settings.unread_max()).await;
                self.stream.next().await
            };
            tokio::select! {
                biased;
                Some(answer) = self.pending.next(), if !self.pending.is_empty() => {
                    // What one receipt of the broker confirms is answered in one go.
                    let mut answers = Some(answer);
                    while let Some(answer) = answers {
                        answer.into_iter().for_each(|item| session.outbox.push(item));
                        answers = self.pending.next().now_or_never().flatten();
                    }
                }
                notice = notices.recv() => {
                    match notice {
                        Ok(notice) => self.notice(notice).await,
                        // What was missed says how things were; the routes are looked at as they are now.
                        Err(RecvError::Lagged(_)) => self.notice(Notice::RoutesChanged { at: Timestamp::now() }).await,
                        Err(RecvError::Closed) => return Some(Close::GoingAway),
                    }
                    // Notices come whether the client reads or not. The answers to all that is in flight have room.
                    if session.outbox.len() > self.settings.unread_max() + self.settings.max_inflight {
                        return Some(Close::SlowConsumer);
                    }
                }
                () = session.outbox.closed() => return None,
                () = &mut silence => {
                    if heard.elapsed() >= self.settings.pong_timeout {
                        return Some(Close::Silent);
                    }
                    silence.as_mut().reset(heard + self.settings.pong_timeout);
                }
                frame = next, if has_room => {
                    heard = Instant::now();
                    self.heard = Came { at: Some(heard.into_std()), is_sample: true };
                    let turn = self.turn(frame).await;
                    self.acknowledge();
                    if let ControlFlow::Break(close) = turn {
                        return close;
                    }
                }
            }
        }
    }

    /// Whether one more command may be under way.
    fn has_room(&self) -> bool {
        let under_way = self.pending.len() + self.listed.0.load(Ordering::Relaxed);
        under_way < self.settings.max_inflight && !self.draining
    }

    /// Takes the frame that came, and those that have come behind it.
    async fn turn(&mut self, first: Heard) -> ControlFlow<Option<Close>> {
        let mut frame = first;
        for more in (0..TURN).rev() {
            match frame {
                Some(Ok(Message::Text(text))) => {
                    self.frame(text.into()).await;
                    // Of what comes behind it only who traces it wants to know.
                    let is_traced = self.session.bridge.tracer.is_on();
                    self.heard = if is_traced { Came::now() } else { Came::default() };
                }
                Some(Ok(Message::Binary(_))) => return ControlFlow::Break(Some(Close::Binary)),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_))) => {
                    // Reading on sends the answer to the close.
                    let _ = timeout(CLOSING, self.stream.next()).await;
                    return ControlFlow::Break(None);
                }
                None => return ControlFlow::Break(None),
                Some(Err(error)) => return ControlFlow::Break(broken(error)),
            }
            // What is not taken here stays in the stream for the next turn.
            if more == 0 || !self.has_room() || self.session.outbox.len() >= self.settings.unread_max() {
                break;
            }
            match self.stream.next().now_or_never() {
                Some(next) => frame = next,
                None => break,
            }
        }
        ControlFlow::Continue(())
    }

    async fn frame(&mut self, frame: Bytes) {
        let Asked { request_id, command } = self.codec.decode(&frame);
        if !matches!(command, Ok(Command::Ack { .. })) {
            // Anything else may have to wait, or be about the same deliveries.
            self.acknowledge();
        }
        let done = match command {
            Ok(command) => self.command(request_id.clone(), command).await,
            Err(fault) => Err(fault),
        };
        if let Err(fault) = done {
            if fault.code == Code::Internal {
                error!(connection = self.session.id, request_id = request_id.as_deref(), %fault, "A frame met a defect.");
            }
            self.session.outbox.push(Event::Error { request_id, fault });
        }
    }

    async fn notice(&mut self, notice: Notice) {
        let outbox = &self.session.outbox;
        let mut subscriptions = self.subscriptions.values();
        match notice {
            Notice::LaneDown { lane, message } if subscriptions.any(|s| s.takes(lane)) => {
                outbox.push(Event::Info(Info::LaneDown { lane, message }));
            }
            Notice::LaneUp { lane } if subscriptions.any(|s| s.takes(lane)) => {
                outbox.push(Event::Info(Info::LaneUp { lane }));
            }
            Notice::TopicDeleted { topic } if subscriptions.any(|s| s.pattern.matches(&topic)) => {
                outbox.push(Event::Info(Info::TopicDeleted { topic }));
            }
            Notice::LaneDown { .. } | Notice::LaneUp { .. } | Notice::TopicDeleted { .. } => {}
            Notice::RoutesChanged { at } => self.follow_routes(at).await,
            Notice::Draining { reconnect_within } => {
                let reconnect_after = reconnect_within.mul_f64(fastrand::f64());
                outbox.push(Event::Info(Info::Draining { reconnect_after }));
                self.draining = true;
            }
        }
    }

    /// Waits for a step of a command while the answers to others go out.
    pub async fn while_answering<T>(&mut self, step: impl Future<Output = T>) -> T {
        tokio::pin!(step);
        loop {
            tokio::select! {
                // Mostly it need not wait at all.
                biased;
                done = &mut step => return done,
                Some(answer) = self.pending.next(), if !self.pending.is_empty() => {
                    if let Some(item) = answer {
                        self.session.outbox.push(item);
                    }
                }
            }
        }
    }

    /// Gives back everything this connection had.
    pub fn end(&mut self) {
        for (_, subscription) in std::mem::take(&mut self.subscriptions) {
            self.drop_subscription(&subscription);
        }
        self.session.deliveries.clear();
    }
}

/// What a broken stream is closed with; `None` where there is nobody left to tell.
fn broken(error: axum::Error) -> Option<Close> {
    let error = error.into_inner();
    match error.downcast_ref::<tungstenite::Error>() {
        Some(tungstenite::Error::Capacity(_)) => Some(Close::TooBig),
        Some(tungstenite::Error::Utf8(_)) => Some(Close::InvalidUtf8),
        Some(tungstenite::Error::Protocol(
            tungstenite::error::ProtocolError::ResetWithoutClosingHandshake,
        )) => None,
        Some(tungstenite::Error::Protocol(_)) => Some(Close::Protocol),
        _ => None,
    }
}
