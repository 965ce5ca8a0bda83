//! The client in Rust, in two layers.
//!
//! ```text
//! Twinspan ── publish, request ──▶ one connection for all of them ─┐
//!          ── subscribe ─────────▶ a connection each               ├─ come again by themselves
//!          ── consume ───────────▶ a connection each               ┘
//! Client   ── one connection, frame by frame, until it ends
//! ```
//! A connection for each subscription, so that a slow handler never stands before the answers of a publisher.

mod backoff;
mod batch;
mod connection;
mod consumer;
mod dial;
mod event;
mod line;
mod subscription;

use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde_json::json;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_util::sync::CancellationToken;

use self::connection::{fields, with_message};
use self::dial::{Dial, Spare};
use self::line::{Ask, Line};
use crate::message::{Draft, Start};

pub use self::backoff::Backoff;
pub use self::connection::{Client, ClientError, Sender};
pub use self::consumer::{Consume, Consumed};
pub use self::dial::Options;
pub use self::event::{Event, Incoming};
pub use self::line::{Published, SendError};
pub use self::subscription::{Subscribe, Subscription};
pub use crate::wire::verbs::Status;

/// A client for services: what it does survives the connection that it was begun on. Cheap to clone.
#[derive(Clone)]
pub struct Twinspan {
    shared: Arc<Shared>,
}

struct Shared {
    url: Arc<str>,
    options: Options,
    spare: Spare,
    line: OnceLock<Line>,
}

impl Twinspan {
    /// A client of `ws://…/ws` or `wss://…/ws`. It connects when there is something to say, and waits for a bridge that
    /// is not there yet.
    pub fn new(url: &str, options: Options) -> Result<Self, ClientError> {
        let refused = |reason: String| ClientError::Connect { url: url.into(), reason };
        let request = url.into_client_request().map_err(|error| refused(error.to_string()))?;
        if !matches!(request.uri().scheme_str(), Some("ws" | "wss")) {
            return Err(refused("the URL begins with ws:// or wss://".into()));
        }
        let shared = Shared { url: url.into(), options, spare: Spare::default(), line: OnceLock::new() };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The same, connected: fails at once where there is no bridge.
    pub async fn connect(url: &str, options: Options) -> Result<Self, ClientError> {
        let mut twinspan = Self::new(url, options)?;
        let client = dial::connect(url).await?;
        if let Some(shared) = Arc::get_mut(&mut twinspan.shared) {
            shared.spare = Arc::new(Mutex::new(Some(client)));
        }
        Ok(twinspan)
    }

    /// Publishes a value as JSON.
    pub async fn publish<T: Serialize + ?Sized>(
        &self,
        topic: &str,
        payload: &T,
    ) -> Result<Published, SendError> {
        let payload = serde_json::to_vec(payload).map_err(|error| SendError::NotJson(error.to_string()))?;
        self.send(topic, Draft { payload: payload.into(), ..Draft::default() }).await
    }

    /// Publishes a message, and again with the same id where it was refused for now or its outcome is not known, until
    /// it is acknowledged or the deadline has passed.
    pub async fn send(&self, topic: &str, draft: Draft) -> Result<Published, SendError> {
        self.send_in_line(topic, draft).await?.await
    }

    /// Returns once the message has its place behind what was sent before; the future is what becomes of it.
    pub async fn send_in_line(
        &self,
        topic: &str,
        mut draft: Draft,
    ) -> Result<impl Future<Output = Result<Published, SendError>> + Send + use<>, SendError> {
        let id = *draft.id.get_or_insert_default();
        let answer = self.line().ask(Ask {
            kind: "publish",
            frame: with_message(json!({ "topic": topic }), &draft),
            bytes: draft.payload.len(),
            id: Some(id),
            deadline: self.shared.options.deadline,
        });
        let answer = answer.await?;
        Ok(async move {
            let ack = answer.await?;
            Ok(Published::new(id, ack.status.as_deref(), ack.lane, ack.position, ack.ts))
        })
    }

    /// Publishes values as JSON, many in a frame; what became of each, in their order.
    pub async fn publish_all<T: Serialize>(
        &self,
        topic: &str,
        payloads: impl IntoIterator<Item = T>,
    ) -> Vec<Result<Published, SendError>> {
        let drafts = payloads.into_iter().map(|payload| {
            let payload =
                serde_json::to_vec(&payload).map_err(|error| SendError::NotJson(error.to_string()))?;
            Ok(Draft { payload: payload.into(), ..Draft::default() })
        });
        let drafts: Vec<_> = drafts.collect();
        batch::send_all(self.line(), self.shared.options, topic, drafts).await
    }

    /// The same for messages.
    pub async fn send_all(&self, topic: &str, drafts: Vec<Draft>) -> Vec<Result<Published, SendError>> {
        batch::send_all(self.line(), self.shared.options, topic, drafts.into_iter().map(Ok)).await
    }

    /// The first reply. A request is sent once: whether it was served is not known where the connection breaks.
    pub async fn request(
        &self,
        topic: &str,
        payload: impl Into<Bytes>,
        timeout: Duration,
    ) -> Result<Event, SendError> {
        let draft = Draft { payload: payload.into(), ..Draft::default() };
        let asked = json!({ "topic": topic, "timeout_ms": timeout.as_millis() as u64 });
        let answer = self.line().ask(Ask {
            kind: "request",
            frame: with_message(asked, &draft),
            bytes: draft.payload.len(),
            id: None,
            deadline: timeout.max(self.shared.options.deadline),
        });
        let response = answer.await?.await?;
        let unreadable = || ClientError::Broken("the reply is of a kind that this build cannot read".into());
        Event::read(response).ok_or_else(|| SendError::OutcomeUnknown { id: None, source: unreadable() })
    }

    /// A subscription that goes on where it was; returns once it is in force.
    pub async fn subscribe(&self, pattern: &str, asked: Subscribe) -> Result<Subscription, ClientError> {
        Subscription::open(self.dial(), self.shared.options.deadline, pattern, asked).await
    }

    /// Takes part in a group until `stop`: a message whose handler ends with `Ok` is acknowledged, any other comes
    /// again after a wait. Then it takes no more, finishes what runs, and leaves.
    pub async fn consume<H, F, E>(
        &self,
        pattern: &str,
        asked: Consume,
        stop: CancellationToken,
        handler: H,
    ) -> Result<Consumed, ClientError>
    where
        H: Fn(Event) -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::fmt::Display,
    {
        consumer::consume(self.dial(), self.shared.options.deadline, pattern, asked, stop, handler).await
    }

    /// Sets a group of a durable topic to another place; it goes on from there.
    pub async fn seek(&self, pattern: &str, group: &str, from: &Start) -> Result<(), SendError> {
        let mut asked = subscription::start_fields(from);
        asked.entry("from").or_insert_with(|| json!("latest"));
        let frame = fields(json!({ "topic": pattern, "group": group }), asked.into());
        let deadline = self.shared.options.deadline;
        self.line().ask(Ask { kind: "seek", frame, bytes: 0, id: None, deadline }).await?.await?;
        Ok(())
    }

    fn line(&self) -> &Line {
        self.shared.line.get_or_init(|| Line::new(self.dial(), self.shared.options.backoff))
    }

    fn dial(&self) -> Dial {
        Dial::new(self.shared.url.clone(), self.shared.spare.clone(), self.shared.options)
    }
}
