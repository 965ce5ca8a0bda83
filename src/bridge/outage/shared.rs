//! What the lines of all topics share.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::poll;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::breaker::Breaker;
use super::spool::Spool;
use crate::bridge::both::Both;
use crate::bridge::catalog::Catalog;
use crate::lane::contract::{DurableLane, LaneError, LaneState, Publisher, durable_down};
use crate::message::{Message, Position};
use crate::policy::Policy;
use crate::policy::table::{OnOutage, Route};
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

/// What became of a message.
#[derive(Debug, Clone, PartialEq)]
pub enum Kept {
    Stored(Position),
    /// On this bridge's disk; it goes to the lane when that takes it.
    Spooled,
}

/// What is in storage has a position; what waits on disk will.
impl From<Kept> for Option<Position> {
    fn from(kept: Kept) -> Self {
        match kept {
            Kept::Stored(position) => Some(position),
            Kept::Spooled => None,
        }
    }
}

/// What the lines share.
pub struct Shared {
    pub lane: Arc<dyn DurableLane>,
    /// By which messages are appended to the lane: it knows the topics that take both.
    pub both: Both,
    pub state: watch::Receiver<LaneState>,
    pub policy: Policy,
    pub catalog: Arc<Catalog>,
    pub metrics: Arc<Metrics>,
    pub breaker: Breaker,
    pub spool: Spool,
    pub lines: Mutex<HashMap<Topic, Arc<mpsc::Sender<Asked>>>>,
    pub lines_open: AtomicUsize,
    pub room: Arc<Semaphore>,
    pub drains: Semaphore,
    pub timeout: Duration,
    pub stop: CancellationToken,
    pub keepers: TaskTracker,
}

/// A message that wants its place.
pub struct Asked {
    pub route: Arc<Route>,
    pub message: Message,
    pub publisher: Publisher,
    pub answer: oneshot::Sender<Result<Kept, LaneError>>,
    /// Its share of what may have no answer yet.
    pub room: OwnedSemaphorePermit,
}

impl Asked {
    pub fn answer(self, outcome: Result<Kept, LaneError>) {
        // Whoever asked may be gone, and what was done stays done.
        let _ = self.answer.send(outcome);
    }

    pub fn spools(&self) -> bool {
        self.route.outage == OnOutage::Spool
    }
}

impl Shared {
    /// Ends a line that nobody is about to use.
    pub fn leave(&self, topic: &Topic, inbox: &mpsc::Receiver<Asked>) -> bool {
        let mut lines = self.lock();
        let unused = lines.get(topic).is_none_or(|line| Arc::strong_count(line) == 1) && inbox.is_empty();
        if unused {
            lines.remove(topic);
            self.lines_open.store(lines.len(), Ordering::Release);
        }
        unused
    }

    /// What the lane does, but no longer than it is up.
    pub async fn while_up<T>(
        &self,
        doing: impl Future<Output = Result<T, LaneError>>,
    ) -> Result<T, LaneError> {
        let mut doing = pin!(doing);
        // What need not wait needs to watch nothing, nor the room for it.
        if let std::task::Poll::Ready(done) = poll!(doing.as_mut()) {
            return done;
        }
        let mut state = self.state.clone();
        Box::pin(async {
            tokio::select! {
                biased;
                done = doing => done,
                why = durable_down(&mut state) => Err(LaneError::Unavailable(why)),
            }
        })
        .await
    }

    pub fn lock(&self) -> MutexGuard<'_, HashMap<Topic, Arc<mpsc::Sender<Asked>>>> {
        // The table is whole between any two statements, so a panic elsewhere spoils nothing.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub fn closed() -> LaneError {
    LaneError::Unavailable("the bridge is closing".into())
}
