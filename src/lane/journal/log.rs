//! What the writer and everyone who reads share.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::group::{Era, Group};
use super::store::{Failure, FailureKind, Store};
use super::topics::{TopicLog, Topics};
use crate::lane::contract::{LaneError, LaneState};
use crate::message::{Message, Position};
use crate::policy::Policy;
use crate::policy::table::Retention;
use crate::telemetry::metrics::Metrics;

/// How long a read waits for the store to be opened again before it gives up.
const REOPEN_WAIT: Duration = Duration::from_secs(5);

pub struct Log {
    pub store: Store,
    pub topics: Topics,
    pub policy: Policy,
    pub metrics: Arc<Metrics>,
    /// Confirmations that have not come by then are unknown.
    pub timeout: Duration,
    pub state: watch::Sender<LaneState>,
    /// What all records take together.
    pub live_bytes: AtomicU64,
    /// Counts how often the store was opened again.
    pub reopened: watch::Sender<u64>,
    /// A reader met a failure that only opening the store again heals.
    pub suspect: Notify,
    /// Whoever waits for more ends.
    pub closed: CancellationToken,
}

impl Log {
    /// Runs a read where it may block. The store is opened again, and the read repeated, where it failed for I/O.
    /// `read` is told whether this is its last try.
    pub async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl Fn(&Store, bool) -> Result<T, Failure> + Send + Sync + 'static,
    ) -> Result<T, LaneError> {
        let read = Arc::new(read);
        let mut reopened = self.reopened.subscribe();
        let mut last = false;
        loop {
            reopened.borrow_and_update();
            let (log, reading) = (self.clone(), read.clone());
            let failure = match tokio::task::spawn_blocking(move || reading(&log.store, last)).await {
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(failure)) => failure,
                Err(error) => return Err(LaneError::Internal(format!("reading the log failed: {error}"))),
            };
            if self.closed.is_cancelled() {
                return Err(closed());
            }
            if last {
                return Err(LaneError::Unavailable(format!("the log cannot be read: {}", failure.what)));
            }
            last = true;
            if failure.kind != FailureKind::Closed {
                self.suspect.notify_one();
            }
            tokio::select! {
                _ = tokio::time::timeout(REOPEN_WAIT, reopened.changed()) => {}
                () = self.closed.cancelled() => return Err(closed()),
            }
        }
    }

    /// What stands where records cannot be read.
    pub fn corrupt(log: &TopicLog, seqs: &RangeInclusive<u64>) -> LaneError {
        let (first, last) = (log.place(*seqs.start()), log.place(*seqs.end()));
        let place = if first == last { first.to_string() } else { format!("{first} to {last}") };
        LaneError::Corrupt { topic: log.topic.clone(), place }
    }
}

pub fn closed() -> LaneError {
    LaneError::Unavailable("the log is closed".into())
}

pub type Done<T> = oneshot::Sender<Result<T, LaneError>>;

/// What the writer does, in the order of the line.
pub enum Command {
    Append {
        log: Arc<TopicLog>,
        retention: Retention,
        message: Message,
        /// Its share of what may wait in line.
        room: tokio::sync::OwnedSemaphorePermit,
        receipt: Done<Position>,
    },
    /// Removes the oldest messages of a topic, those before `before`, and says whether one commit's worth was enough.
    Remove {
        log: Arc<TopicLog>,
        before: u64,
        done: Done<bool>,
    },
    Create {
        log: Arc<TopicLog>,
        done: Done<bool>,
    },
    /// Begins a group after everything before `floor`, where it does not exist.
    Begin {
        log: Arc<TopicLog>,
        group: String,
        floor: u64,
        done: Done<Arc<Group>>,
    },
    Seek {
        log: Arc<TopicLog>,
        group: String,
        floor: u64,
        done: Done<()>,
    },
    /// Deletes a group that has no members, where it exists.
    Delete {
        log: Arc<TopicLog>,
        group: String,
        done: Done<bool>,
    },
    /// Nothing where the group has been sought since.
    Ack {
        group: Arc<Group>,
        era: Era,
        seqs: Vec<u64>,
        done: Done<()>,
    },
    Probe {
        done: Done<()>,
    },
    Close {
        done: oneshot::Sender<()>,
    },
}

/// The way to the writer.
pub type Line = mpsc::Sender<Command>;
