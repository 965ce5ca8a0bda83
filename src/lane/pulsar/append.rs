//! Publishing: a producer for each topic (each partition, where it has some), and who may put how much in its line.
//!
//! ```text
//! append ──finds──▶ producer ──waits for room──▶ its line ──▶ broker
//! receipt ◀─────────────── receipts, or the sweep when time is over
//! ```
//! One sweep over all lines holds every deadline, so that a message needs no clock of its own. It also closes producers
//! that nobody uses.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use futures_util::future::{Either, FutureExt, TryFutureExt, ready};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;

use super::batch::Ticket;
use super::cluster::Cluster;
use super::fault::Fault;
use super::names::{self, Physical};
use super::producer::{Common, Producer};
use super::record;
use super::room::Room;
use crate::lane::contract::{Appending, LaneError, LaneState, Publisher, Receipt, durable_down};
use crate::lane::slot::Waiting;
use crate::message::{Message, Place, Position};
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

/// Messages of one topic that have no receipt yet, and their bytes. Publishers wait while it is full.
const LINE: (usize, usize) = (16 << 10, 32 << 20);
/// The same over all topics.
const ALL: (usize, usize) = (128 << 10, 64 << 20);
/// Producers without work are closed after this, the least recently used first where there are too many.
const IDLE: Duration = Duration::from_secs(300);
const PRODUCERS_MAX: usize = 1000;
/// Topics whose way to their producer is remembered; when it is full all are found again.
const WAYS_MAX: usize = 10_000;
/// A partition is looked for as often as partitions are.
const WAY_FRESH: Duration = Duration::from_secs(30);
/// How often the lines are swept at most.
const SWEEP: Duration = Duration::from_millis(100);

pub struct Producers {
    lines: Mutex<HashMap<Physical, Arc<Producer>>>,
    ways: RwLock<HashMap<Topic, Way>>,
    common: Arc<Common>,
    state: watch::Receiver<LaneState>,
    next: AtomicU64,
    /// Publishers are numbered from 1 on every bridge; this makes their messages without a key go elsewhere on each.
    keyless: u64,
}

/// From a topic to its producer, where it has no partitions.
struct Way {
    route: Arc<Route>,
    producer: Arc<Producer>,
    found: Instant,
}

impl Producers {
    pub fn new(
        cluster: Arc<Cluster>,
        state: watch::Receiver<LaneState>,
        timeout: Duration,
        metrics: Arc<Metrics>,
        stop: CancellationToken,
    ) -> Arc<Self> {
        let room = Room::new(ALL.0, ALL.1);
        let common = Common { cluster, room, timeout, metrics, runtime: Handle::current(), stop };
        let producers = Arc::new(Self {
            lines: Mutex::default(),
            ways: RwLock::default(),
            common: Arc::new(common),
            state,
            next: AtomicU64::new(1),
            keyless: fastrand::u64(..),
        });
        tokio::spawn(sweep(producers.clone()));
        producers
    }

    /// Puts a message in its topic's line, and waits for room in it. The sweep sees to it that the receipt comes within
    /// the publish timeout.
    pub fn append<'a>(
        &'a self,
        route: &'a Arc<Route>,
        topic: &'a Topic,
        message: Message,
        publisher: Publisher,
    ) -> Appending<'a> {
        let size = match self.check(&message) {
            Ok(size) => size,
            Err(refused) => return Either::Left(ready(Err(refused))),
        };
        let now = Instant::now();
        let ticket = Ticket { deadline: now + self.common.timeout, bytes: size as u32 };
        let known = self.known(route, topic, now);
        let put = match &known {
            Some(producer) => self.try_put(producer, message, ticket),
            None => Err(message),
        };
        match put {
            Ok(waiting) => Either::Left(ready(Ok(waiting.into()))),
            Err(message) => {
                Either::Right(self.find_and_wait(known, route, topic, message, ticket, publisher).boxed())
            }
        }
    }

    /// Refuses what cannot be stored now. Returns the message's size.
    fn check(&self, message: &Message) -> Result<usize, LaneError> {
        up(&self.state)?;
        record::check(message)?;
        let (size, max) = (record::size(message), self.common.cluster.message_bytes_max());
        if size > max { Err(LaneError::TooLarge { size, max }) } else { Ok(size) }
    }

    /// Puts it in the line of the partition that is found for it, or waits for room in the one that is known.
    async fn find_and_wait(
        &self,
        known: Option<Arc<Producer>>,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        ticket: Ticket,
        publisher: Publisher,
    ) -> Result<Receipt, LaneError> {
        let (producer, partition) = match known {
            Some(producer) => (producer, None),
            None => self.find(route, topic, &message, publisher, Instant::now()).await?,
        };
        let ts = message.ts;
        let waiting = match self.try_put(&producer, message, ticket) {
            Ok(waiting) => waiting,
            Err(message) => self.wait_to_put(producer, message, ticket).await?,
        };
        Ok(match partition {
            None => waiting.into(),
            Some(number) => {
                Receipt::of(waiting.map_ok(move |place| Position::in_partition(number, place, ts)))
            }
        })
    }

    fn known(&self, route: &Arc<Route>, topic: &Topic, now: Instant) -> Option<Arc<Producer>> {
        let ways = self.ways.read().unwrap_or_else(PoisonError::into_inner);
        let way = ways.get(topic)?;
        (Arc::ptr_eq(&way.route, route) && now - way.found < WAY_FRESH).then(|| way.producer.clone())
    }

    async fn find(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: &Message,
        publisher: Publisher,
        now: Instant,
    ) -> Result<(Arc<Producer>, Option<u32>), LaneError> {
        let physical = Physical::of(route, topic)?;
        let partitions = self.common.cluster.partitions(&physical).await.map_err(Fault::on_lane)?;
        if partitions > 0 {
            let partition = match &message.key {
                Some(key) => names::partition_of(key, partitions),
                None => (publisher.0.wrapping_add(self.keyless) % u64::from(partitions)) as u32,
            };
            let producer = self.line(&physical.partition(partition), false).await?;
            producer.set(route);
            return Ok((producer, Some(partition)));
        }
        let producer = self.line(&physical, false).await?;
        producer.set(route);
        let way = Way { route: route.clone(), producer: producer.clone(), found: now };
        let mut ways = self.ways.write().unwrap_or_else(PoisonError::into_inner);
        if ways.len() >= WAYS_MAX {
            ways.clear();
        }
        ways.insert(topic.clone(), way);
        Ok((producer, None))
    }

    /// As `append`, whatever the state, and gives up soon.
    pub async fn probe(
        &self,
        physical: &Physical,
        message: Message,
        within: Duration,
    ) -> Result<Place, LaneError> {
        let deadline = Instant::now() + within;
        let probing = async {
            let producer = self.line(physical, true).await?;
            self.put(producer, message, Ticket { deadline, bytes: 0 }).await?.await
        };
        timeout_at(deadline, probing).await.unwrap_or_else(|_| {
            Err(LaneError::Unavailable(format!(
                "the broker confirmed no write within {} ms",
                within.as_millis()
            )))
        })
    }

    async fn wait_to_put(
        &self,
        producer: Arc<Producer>,
        message: Message,
        ticket: Ticket,
    ) -> Result<Waiting, LaneError> {
        let mut state = self.state.clone();
        let deadline = ticket.deadline;
        tokio::select! {
            biased;
            put = timeout_at(deadline, self.put(producer, message, ticket)) => put.unwrap_or_else(|_| {
                Err(LaneError::Unavailable("the line of messages without a receipt stayed full".into()))
            }),
            why = durable_down(&mut state) => Err(LaneError::Unavailable(why)),
        }
    }

    /// Waits for room.
    async fn put(
        &self,
        mut producer: Arc<Producer>,
        mut message: Message,
        ticket: Ticket,
    ) -> Result<Waiting, LaneError> {
        loop {
            message = match self.try_put(&producer, message, ticket) {
                Ok(waiting) => return Ok(waiting),
                Err(back) => back,
            };
            match producer.is_closed() {
                // It was closed for want of use just now; another is made for the message.
                true => producer = self.line(&producer.physical, producer.is_canary).await?,
                false => {
                    let line = producer.room.take(ticket.bytes).await;
                    let all = self.common.room.take(ticket.bytes).await;
                    match producer.push(message, ticket) {
                        Ok(waiting) => {
                            line.keep();
                            all.keep();
                            return Ok(waiting);
                        }
                        Err(back) => message = back,
                    }
                }
            }
        }
    }

    /// Hands the message back where there is no room for it, or the producer is closed.
    // Handed back as it came: a box for it would be an allocation.
    #[allow(clippy::result_large_err)]
    fn try_put(
        &self,
        producer: &Arc<Producer>,
        message: Message,
        ticket: Ticket,
    ) -> Result<Waiting, Message> {
        let (line, all) = (producer.room.try_take(ticket.bytes), self.common.room.try_take(ticket.bytes));
        let (Some(line), Some(all)) = (line, all) else { return Err(message) };
        let waiting = producer.push(message, ticket)?;
        line.keep();
        all.keep();
        Ok(waiting)
    }

    /// A topic's producer, made where there is none. Where there are too many one without work makes place.
    async fn line(&self, physical: &Physical, is_canary: bool) -> Result<Arc<Producer>, LaneError> {
        loop {
            {
                let mut lines = self.lock();
                // Looked at under the lock: what is made behind the last sweep would never be answered.
                if self.common.stop.is_cancelled() {
                    return Err(Fault::Closed.on_lane());
                }
                if let Some(line) = lines.get(physical).filter(|line| !line.is_closed()) {
                    return Ok(line.clone());
                }
                if lines.len() < PRODUCERS_MAX || make_place(&mut lines) {
                    let id = self.next.fetch_add(1, Ordering::Relaxed);
                    let room = Room::new(LINE.0, LINE.1);
                    let line = Producer::new(id, physical.clone(), is_canary, room, self.common.clone());
                    lines.insert(physical.clone(), line.clone());
                    return Ok(line);
                }
            }
            // All of them have work; the first that has none any more makes place.
            tokio::time::sleep(SWEEP).await;
        }
    }

    /// Waits until everything under way has its receipt.
    pub async fn settle(&self) {
        self.common.room.is_free().await;
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Physical, Arc<Producer>>> {
        // The table is whole between any two statements, so a panic elsewhere spoils nothing.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Closes the producer that was used last the longest ago, of those without work.
fn make_place(lines: &mut HashMap<Physical, Arc<Producer>>) -> bool {
    let idle = lines.values().filter_map(|line| Some((line.idle_since()?, line.clone())));
    let Some((_, oldest)) = idle.min_by_key(|(since, _)| *since) else { return false };
    oldest.close_if_idle() && lines.remove(&oldest.physical).is_some()
}

/// Holds the deadlines of all lines, and closes those that nobody uses. Ends with the lane.
async fn sweep(producers: Arc<Producers>) {
    let stop = producers.common.stop.clone();
    // So often that what is given up a sweep early has had most of its time.
    let every = (producers.common.timeout / 20).clamp(Duration::from_millis(5), SWEEP);
    let mut state = producers.state.clone();
    while !stop.is_cancelled() {
        let lines: Vec<_> = producers.lock().values().cloned().collect();
        let down = up(&state).err();
        state.mark_unchanged();
        for line in lines {
            let idle = line.sweep(Instant::now() + every, down.as_ref());
            if idle.is_some_and(|since| since.elapsed() > IDLE) && line.close_if_idle() {
                producers.lock().remove(&line.physical);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(every) => {}
            _ = state.changed() => {}
            () = stop.cancelled() => {}
        }
    }
    let closed = Fault::Closed.on_lane();
    let lines: Vec<_> = producers.lock().drain().map(|(_, line)| line).collect();
    lines.into_iter().for_each(|line| line.close(&closed));
}

/// Refuses while the lane is down.
pub fn up(state: &watch::Receiver<LaneState>) -> Result<(), LaneError> {
    match &*state.borrow() {
        LaneState::Up => Ok(()),
        LaneState::Down(why) => Err(LaneError::Unavailable(format!("the durable lane is down: {why}"))),
    }
}
