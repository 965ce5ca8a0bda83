//! The durable lane in this process: an append-only log of messages per topic in one file, without a broker.
//!
//! ```text
//! append ─┐                                              ┌─▶ Tail ─▶ whoever is in step
//! ack    ─┼─line─▶ writer: one commit, one fsync for all ┤
//! join   ─┘                     │                        └─▶ receipts
//!                               ▼
//!                         journal.redb ◀── readers and groups, a batch from one snapshot at a time
//! ```
//! redb keeps the file: a B-tree that is whole after any crash. What it does not do is told in the files here: it
//! hands out flipped bits (`record`), it stops for good at the first I/O error (`trouble`), and it can only commit as
//! fast as the disk syncs (`writer`). The file does not shrink while it is open; what retention frees is used again.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::Either;
use tokio::sync::{Notify, Semaphore, mpsc, oneshot, watch};
use tokio::time::{timeout, timeout_at};
use tokio_util::sync::CancellationToken;

pub use self::store::{JournalError, OpenFile};

use self::group::NoSeat;
use self::load::load;
use self::log::{Command, Done, Line, Log, closed};
use self::member::LogMember;
use self::reader::{LogReader, begin, read_batch};
use self::store::{Store, open_file};
use self::topics::{TopicLog, Topics, lock};
use self::writer::Writer;
use super::contract::{
    Appending, DurableLane, GroupReport, Joining, LaneError, LaneState, Member, Publisher, Reader, Receipt,
};
use super::tail::Tail;
use crate::message::{Lane, Message, Place, Start, Timestamp};
use crate::policy::Policy;
use crate::policy::table::{Retention, Route};
use crate::telemetry::metrics::Metrics;
use crate::topic::{Pattern, Topic};

mod group;
mod load;
mod log;
mod member;
mod reader;
mod record;
mod retention;
mod rows;
mod share;
mod store;
mod topics;
mod trouble;
mod writer;

/// What may wait for the writer. Full: the publisher waits.
const LINE_COMMANDS: usize = 8192;
/// The same in KiB of messages; a larger message waits until it is alone.
const LINE_KIB: u32 = 64 << 10;
/// How often a group may be deleted under the hands of somebody who joins it.
const JOIN_TRIES: usize = 3;
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Journal {
    log: Arc<Log>,
    line: Line,
    room: Arc<Semaphore>,
}

impl Journal {
    /// Opens the log in a directory, which is created where it does not exist. Reads and writes the disk at once.
    pub fn open(
        dir: &Path,
        policy: Policy,
        publish_timeout: Duration,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, JournalError> {
        Self::open_with(dir, policy, publish_timeout, metrics, Box::new(open_file))
    }

    /// The same on a database that the caller opens, and opens again when the log asks for it: the tests put a disk
    /// that fails under it.
    pub fn open_with(
        dir: &Path,
        policy: Policy,
        publish_timeout: Duration,
        metrics: Arc<Metrics>,
        open_file: OpenFile,
    ) -> Result<Arc<Self>, JournalError> {
        let store = Store::open(dir, open_file)?;
        let damaged = |failure| JournalError::from(&dir.join(store::FILE), failure);
        let commits = store.commits().map_err(damaged)?;
        let log = Arc::new(Log {
            topics: Topics::new(store.epoch()),
            store,
            policy,
            metrics,
            timeout: publish_timeout,
            state: watch::Sender::new(LaneState::Up),
            live_bytes: AtomicU64::new(0),
            reopened: watch::Sender::new(0),
            suspect: Notify::new(),
            closed: CancellationToken::new(),
        });
        let newest_id = load(&log).map_err(damaged)?;
        let (line, inbox) = mpsc::channel(LINE_COMMANDS);
        let writer = Writer::new(log.clone(), inbox, newest_id + 1, commits).map_err(JournalError::Thread)?;
        // The thread ends when the line is closed; `close` waits for it to say so.
        std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run_guarded())
            .map_err(JournalError::Thread)?;
        let room = Arc::new(Semaphore::new(LINE_KIB as usize));
        Ok(Arc::new(Self { log, line, room }))
    }

    /// As `append`, and keeps it until it is removed: no route's retention applies.
    pub async fn keep(&self, topic: &Topic, message: Message) -> Result<Receipt, LaneError> {
        self.put(topic, Retention::default(), message).await
    }

    /// Returns once everything of the topic up to this place is removed for good. After an error some of it may be.
    pub async fn remove(&self, topic: &Topic, through: Place) -> Result<(), LaneError> {
        let (log, before) = (self.log.topics.get(topic), through.entry + 1);
        // One commit removes a bounded number.
        while !self.ask(|done| Command::Remove { log: log.clone(), before, done }, topic).await? {}
        Ok(())
    }

    /// What the topics hold that hold anything.
    pub fn holdings(&self) -> Vec<Holding> {
        let stored = self.log.topics.stored();
        stored.iter().map(|log| Holding::of(log)).filter(|holding| holding.messages > 0).collect()
    }

    pub fn holding(&self, topic: &Topic) -> Holding {
        Holding::of(&self.log.topics.get(topic))
    }

    /// What all records take together.
    pub fn live_bytes(&self) -> u64 {
        self.log.live_bytes.load(Ordering::Relaxed)
    }

    async fn put(&self, topic: &Topic, retention: Retention, message: Message) -> Result<Receipt, LaneError> {
        let limit = self.log.timeout;
        let deadline = tokio::time::Instant::now() + limit;
        let kib = u32::try_from(message.payload.len() / 1024 + 1).unwrap_or(u32::MAX).min(LINE_KIB);
        let waited = |_| LaneError::Unavailable(format!("the log took nothing for {limit:?}"));
        let room = timeout_at(deadline, self.room.clone().acquire_many_owned(kib)).await.map_err(waited)?;
        let room = room.map_err(|_| closed())?;
        let place = timeout_at(deadline, self.line.reserve()).await.map_err(waited)?.map_err(|_| closed())?;
        let (receipt, stored) = oneshot::channel();
        let log = self.log.topics.get(topic);
        place.send(Command::Append { log, retention, message, room, receipt });
        Ok(Receipt::of(async move {
            match timeout_at(deadline, stored).await {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(_)) => Err(LaneError::OutcomeUnknown("the log ended before it answered".into())),
                Err(_) => Err(LaneError::OutcomeUnknown(format!("the log did not confirm within {limit:?}"))),
            }
        }))
    }

    /// Asks the writer, and waits no longer than for a publish.
    async fn ask<T>(&self, command: impl FnOnce(Done<T>) -> Command, topic: &Topic) -> Result<T, LaneError> {
        let (done, answer) = oneshot::channel();
        let asked = async {
            self.line.send(command(done)).await.map_err(|_| closed())?;
            answer.await.map_err(|_| closed())?
        };
        timeout(self.log.timeout, asked).await.map_err(|_| LaneError::Timeout(topic.clone()))?
    }
}

/// How much of a topic is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holding {
    pub topic: Topic,
    pub messages: u64,
    pub bytes: u64,
    /// When the first of them was accepted.
    pub oldest: Option<Timestamp>,
    /// Where the last of them is.
    pub newest: Option<Place>,
}

impl Holding {
    fn of(log: &TopicLog) -> Self {
        let extent = log.extent();
        let oldest = (!extent.is_empty()).then(|| Timestamp::from_millis(extent.first_time));
        let newest = (!extent.is_empty()).then(|| log.place(extent.next - 1));
        let messages = extent.next - extent.first;
        Self { topic: log.topic.clone(), messages, bytes: extent.bytes, oldest, newest }
    }
}

#[async_trait]
impl DurableLane for Journal {
    fn append<'a>(
        &'a self,
        route: &'a Arc<Route>,
        topic: &'a Topic,
        message: Message,
        _publisher: Publisher,
    ) -> Appending<'a> {
        Either::Right(self.put(topic, route.retention, message).boxed())
    }

    async fn tail(&self, _route: &Arc<Route>, topic: &Topic) -> Result<Arc<Tail>, LaneError> {
        if self.log.closed.is_cancelled() {
            return Err(closed());
        }
        Ok(self.log.topics.get(topic).tail())
    }

    async fn read(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        start: Start,
    ) -> Result<Box<dyn Reader>, LaneError> {
        let topic = self.log.topics.get(topic);
        Ok(Box::new(LogReader::open(self.log.clone(), topic, route.name.clone(), start).await?))
    }

    async fn join(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        joining: Joining,
    ) -> Result<Box<dyn Member>, LaneError> {
        let Joining { group: name, mode, start, prefetch } = joining;
        let topic = self.log.topics.get(topic);
        for _ in 0..JOIN_TRIES {
            let known = lock(&topic.groups).get(&name).cloned().filter(|group| !group.is_deleted());
            let group = match known {
                Some(group) => group,
                None => {
                    let (floor, _) = begin(&self.log, &topic, start.clone()).await?;
                    let (log, group) = (topic.clone(), name.clone());
                    self.ask(|done| Command::Begin { log, group, floor, done }, &topic.topic).await?
                }
            };
            let (log, line, route) = (self.log.clone(), self.line.clone(), route.name.clone());
            match LogMember::join(log, line, group, route, mode, prefetch) {
                Ok(member) => return Ok(Box::new(member)),
                Err(NoSeat::Busy(error)) => return Err(error),
                Err(NoSeat::Deleted) => {}
            }
        }
        Err(LaneError::GroupBusy(format!("group `{name}` is deleted again and again")))
    }

    async fn seek(
        &self,
        _route: &Arc<Route>,
        topic: &Topic,
        group: &str,
        start: Start,
    ) -> Result<(), LaneError> {
        let (log, group) = (self.log.topics.get(topic), group.to_owned());
        let (floor, _) = begin(&self.log, &log, start).await?;
        self.ask(|done| Command::Seek { log, group, floor, done }, topic).await
    }

    async fn delete_group(&self, _route: &Arc<Route>, topic: &Topic, group: &str) -> Result<bool, LaneError> {
        let (log, group) = (self.log.topics.get(topic), group.to_owned());
        self.ask(|done| Command::Delete { log, group, done }, topic).await
    }

    async fn topics(&self, pattern: &Pattern) -> Result<Vec<Topic>, LaneError> {
        let table = self.log.policy.table();
        let mut topics = self.log.topics.matching(pattern);
        topics.retain(|topic| table.route_for(topic).is_some_and(|route| route.lane.takes(Lane::Durable)));
        Ok(topics)
    }

    fn watch_topics(&self) -> watch::Receiver<BTreeSet<Topic>> {
        self.log.topics.watch()
    }

    async fn create(&self, _route: &Arc<Route>, topic: &Topic) -> Result<bool, LaneError> {
        let log = self.log.topics.get(topic);
        if log.extent().id != 0 {
            return Ok(false);
        }
        self.ask(|done| Command::Create { log, done }, topic).await
    }

    async fn groups(&self, _route: &Arc<Route>, topic: &Topic) -> Result<Vec<GroupReport>, LaneError> {
        let topic = self.log.topics.get(topic);
        let reports: Vec<_> = lock(&topic.groups).values().map(|group| group.report()).collect();
        let read = move |store: &store::Store, last_try| {
            let mut reports = reports.clone();
            for (report, oldest) in &mut reports {
                let Some(oldest) = *oldest else { continue };
                let batch = read_batch(store, &topic, oldest, 1, last_try)?;
                let found = batch.items.into_iter().find_map(|item| item.found.ok());
                report.oldest = found.map(|envelope| envelope.message.ts);
            }
            Ok(reports.into_iter().map(|(report, _)| report).collect())
        };
        self.log.read(read).await
    }

    async fn probe(&self) -> Result<Duration, LaneError> {
        let asked = Instant::now();
        let (done, answer) = oneshot::channel();
        let probe = async {
            self.line.send(Command::Probe { done }).await.map_err(|_| closed())?;
            answer.await.map_err(|_| closed())?
        };
        let late = || LaneError::Unavailable(format!("the log did not answer within {PROBE_TIMEOUT:?}"));
        timeout(PROBE_TIMEOUT, probe).await.map_err(|_| late())??;
        Ok(asked.elapsed())
    }

    fn state(&self) -> watch::Receiver<LaneState> {
        self.log.state.subscribe()
    }

    async fn close(&self) {
        let (done, ended) = oneshot::channel();
        let close = async {
            if self.line.send(Command::Close { done }).await.is_ok() {
                let _ = ended.await;
            }
        };
        if timeout(CLOSE_TIMEOUT, close).await.is_err() {
            tracing::error!("The log's disk does not answer; leaving without closing the log.");
        }
    }
}
