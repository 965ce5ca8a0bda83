//! Publishing to topics that take both lanes.
//!
//! ```text
//! after_store:  append ──▶ durable lane ──receipt──▶ copy ──▶ ephemeral lane
//! first:        append ──▶ durable lane
//!                  └─────▶ ephemeral lane, at once
//! ```
//! A message has its place in line for storage before anything of it is sent live, so one that storage cannot take now
//! was sent nowhere. The live half has a topic's messages in the order of the appends; what it cannot take is dropped
//! there and counted, and subscribers of the bridge get it from storage.
//!
//! What is sent before it is stored has a number (`LiveNo`), so that whoever begins to listen knows when storage has
//! brought everything before it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use futures_util::FutureExt;
use futures_util::future::{Either, Shared};
use tokio::sync::{Mutex as Turn, mpsc};

use crate::lane::contract::{Appending, DurableLane, EphemeralLane, LaneError, Publisher, Receipt};
use crate::lane::headers;
use crate::message::{LIVE, Lane, Lanes, LiveNo, Message};
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

/// Copies of one topic on their way; the publisher waits while there are as many.
const WAITING: usize = 16 << 10;
/// Topics without any are forgotten when there are so many, and twice as many the next time.
const SWEEP_MIN: usize = 1024;

pub struct Both {
    durable: Arc<dyn DurableLane>,
    ephemeral: Arc<dyn EphemeralLane>,
    metrics: Arc<Metrics>,
    /// Names this process to other bridges.
    bridge: u64,
    numbers: AtomicU64,
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

type Stored = Shared<Receipt>;

struct Copy {
    route: Arc<Route>,
    message: Message,
    stored: Stored,
    _line: Arc<Line>,
}

impl Both {
    pub fn new(
        durable: Arc<dyn DurableLane>,
        ephemeral: Arc<dyn EphemeralLane>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let numbers = AtomicU64::new(1);
        Self { durable, ephemeral, metrics, bridge: fastrand::u64(1..), numbers, lines: Mutex::default() }
    }

    /// As the durable lane's `append`, for topics of either kind.
    pub fn append<'a>(
        &'a self,
        route: &'a Arc<Route>,
        topic: &'a Topic,
        message: Message,
        publisher: Publisher,
    ) -> Appending<'a> {
        match route.lane {
            Lanes::Both => Either::Right(self.append_to_both(route, topic, message, publisher).boxed()),
            Lanes::One(_) => self.durable.append(route, topic, message, publisher),
        }
    }

    async fn append_to_both(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        mut message: Message,
        publisher: Publisher,
    ) -> Result<Receipt, LaneError> {
        headers::check(&message)?;
        let line = self.line(topic);
        let _turn = line.turn.lock().await;
        if route.is_live_first() {
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            message.headers.insert(LIVE.into(), LiveNo { bridge: self.bridge, number }.to_string());
        }
        let copied = message.clone();
        // Before the message has its place: nothing is waited for behind that, so whoever gives up here has sent nothing.
        let waiting = line.copies.reserve().await;
        let appended = self.durable.append(route, topic, message, publisher).await?;
        let stored = match route.is_live_first() {
            true => Receipt::of(appended.map(|stored| stored.map_err(sent_live))).shared(),
            false => appended.shared(),
        };
        let copy =
            Copy { route: route.clone(), message: copied, stored: stored.clone(), _line: line.clone() };
        // The other end is there as long as the line is.
        if let Ok(waiting) = waiting {
            waiting.send(copy);
        }
        Ok(Receipt::of(stored))
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
        let is_due = route.is_live_first() || stored.await.is_ok();
        if is_due && ephemeral.publish(&route, &topic, message).await.is_err() {
            metrics.dropped(Lane::Ephemeral, &route.name, "copy", 1);
        }
    }
}

fn sent_live(error: LaneError) -> LaneError {
    match error {
        LaneError::OutcomeUnknown(why) => LaneError::OutcomeUnknown(why),
        other => LaneError::OutcomeUnknown(format!("the message was sent live, and then: {other}")),
    }
}
