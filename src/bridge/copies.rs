//! What native subscribers of the ephemeral lane get of topics that take both: a copy of each message once it is stored.
//!
//! ```text
//! append ──▶ durable lane ──receipt──┬──▶ the publisher's answer
//!                                    └──▶ copy, in the order of the appends ──▶ ephemeral lane
//! ```
//! A copy that the ephemeral lane cannot take now is dropped and counted: there it is delivered at most once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::{Mutex as Turn, mpsc};

use crate::lane::contract::{DurableLane, EphemeralLane, LaneError, Publisher, Receipt};
use crate::message::{Lane, Lanes, Message, Position};
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

/// Copies of one topic that wait for their receipt; the publisher waits while there are as many.
const WAITING: usize = 16 << 10;
/// Topics without copies are forgotten when there are so many, and twice as many the next time.
const SWEEP_MIN: usize = 1024;

pub struct Copies {
    durable: Arc<dyn DurableLane>,
    ephemeral: Arc<dyn EphemeralLane>,
    metrics: Arc<Metrics>,
    lines: Mutex<Lines>,
}

#[derive(Default)]
struct Lines {
    /// As long as somebody appends, or a copy waits.
    by_topic: HashMap<Topic, Weak<Line>>,
    sweep_at: usize,
}

struct Line {
    /// Held while a message gets its place in both lines.
    turn: Turn<()>,
    copies: mpsc::Sender<Copy>,
}

struct Copy {
    route: Arc<Route>,
    message: Message,
    stored: Shared<BoxFuture<'static, Result<Position, LaneError>>>,
    _line: Arc<Line>,
}

impl Copies {
    pub fn new(
        durable: Arc<dyn DurableLane>,
        ephemeral: Arc<dyn EphemeralLane>,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { durable, ephemeral, metrics, lines: Mutex::default() }
    }

    /// As the durable lane's `append`.
    pub async fn append(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        publisher: Publisher,
    ) -> Result<Receipt, LaneError> {
        if route.lane != Lanes::Both {
            return self.durable.append(route, topic, message, publisher).await;
        }
        let line = self.line(topic);
        let _turn = line.turn.lock().await;
        let copied = message.clone();
        let stored = self.durable.append(route, topic, message, publisher).await?.shared();
        let copy =
            Copy { route: route.clone(), message: copied, stored: stored.clone(), _line: line.clone() };
        // The other end is there as long as the line is.
        let _ = line.copies.send(copy).await;
        Ok(Box::pin(stored))
    }

    fn line(&self, topic: &Topic) -> Arc<Line> {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = lines.by_topic.get(topic).and_then(Weak::upgrade) {
            return line;
        }
        if lines.by_topic.len() >= lines.sweep_at {
            lines.by_topic.retain(|_, line| line.strong_count() > 0);
            lines.sweep_at = SWEEP_MIN.max(lines.by_topic.len() * 2);
        }
        let (copies, waiting) = mpsc::channel(WAITING);
        let line = Arc::new(Line { turn: Turn::default(), copies });
        lines.by_topic.insert(topic.clone(), Arc::downgrade(&line));
        tokio::spawn(copy(self.ephemeral.clone(), self.metrics.clone(), topic.clone(), waiting));
        line
    }
}

/// Ends with its line.
async fn copy(
    ephemeral: Arc<dyn EphemeralLane>,
    metrics: Arc<Metrics>,
    topic: Topic,
    mut waiting: mpsc::Receiver<Copy>,
) {
    while let Some(Copy { route, message, stored, _line }) = waiting.recv().await {
        if stored.await.is_ok() && ephemeral.publish(&route, &topic, message).await.is_err() {
            metrics.dropped(Lane::Ephemeral, &route.name, "copy", 1);
        }
    }
}
