//! A heartbeat through the broker: a small message, written, confirmed and read back.
//!
//! ```text
//! write ──▶ producer ──▶ broker ──▶ receipt         it stores
//!                          └──────▶ our reader      it delivers
//! ```
//! The bridges of a namespace spread over a number of topics, so that each reads few heartbeats of others.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::append::Producers;
use super::cluster::Cluster;
use super::fault::Fault;
use super::feed::{Feed, From, newest};
use super::names::Physical;
use crate::lane::contract::LaneError;
use crate::message::{Draft, Lane, MessageId};
use crate::policy::Policy;
use crate::topic::Topic;

/// No topic of ours begins with `_`, so these show in no listing.
const TOPIC: &str = "__twinspan-probe";
const TOPICS: u8 = 64;
const DEFAULT_NAMESPACE: &str = "public/default";
/// When to try again to read where it could not be begun, and where it is not allowed.
const AGAIN: Duration = Duration::from_secs(1);
const REFUSED_AGAIN: Duration = Duration::from_secs(60);

pub struct Heartbeat {
    policy: Policy,
    producers: Arc<Producers>,
    /// Of the reading connections.
    cluster: Arc<Cluster>,
    /// Which of the namespaces took the last one.
    at: AtomicUsize,
    /// Which of the topics is this bridge's.
    number: u8,
    hearing: Mutex<Option<Hearing>>,
}

/// A reader of one topic, for as long as it is held.
struct Hearing {
    physical: Physical,
    shared: Arc<Heard>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct Heard {
    /// Whether the reader has begun. Before, and where reading is not allowed, a receipt is all there is.
    begun: AtomicBool,
    /// Who waits for which heartbeat: as many as are under way.
    waiting: Mutex<HashMap<MessageId, oneshot::Sender<()>>>,
}

impl Heartbeat {
    pub fn new(policy: Policy, producers: Arc<Producers>, cluster: Arc<Cluster>) -> Self {
        let (at, number) = (AtomicUsize::new(0), fastrand::u8(..TOPICS));
        Self { policy, producers, cluster, at, number, hearing: Mutex::default() }
    }

    /// A write and its receipt: whether the broker stores.
    pub async fn write(&self, within: Duration) -> Result<(), LaneError> {
        self.write_to(&self.topic(), Draft::default(), within).await
    }

    /// A write, its receipt, and the message back; timed from the write to whichever comes last.
    pub async fn round_trip(&self, within: Duration) -> Result<Duration, LaneError> {
        let physical = self.topic();
        let shared = self.hear(&physical);
        let draft = Draft { id: Some(MessageId::new()), ..Draft::default() };
        let (began, listens) = (Instant::now(), shared.begun.load(Ordering::Acquire));
        let waiting = listens.then(|| Waiting::new(&shared, draft.id));
        self.write_to(&physical, draft, within).await?;
        if let Some(mut waiting) = waiting {
            let late = |_| {
                LaneError::Unavailable(format!(
                    "the broker stored a heartbeat and did not deliver it within {} ms",
                    within.as_millis()
                ))
            };
            // The reader outlives whoever waits, unless another topic is read by now.
            let _ = timeout_at(began + within, &mut waiting.back).await.map_err(late)?;
        }
        Ok(began.elapsed())
    }

    async fn write_to(&self, physical: &Physical, draft: Draft, within: Duration) -> Result<(), LaneError> {
        let written = self.producers.probe(physical, draft.accept(), within).await;
        if let Err(LaneError::Forbidden(_) | LaneError::BadRequest(_)) = written {
            // What is refused here may be allowed in the next.
            self.at.fetch_add(1, Ordering::Relaxed);
        }
        written.map(drop)
    }

    /// Where this bridge may write: in the namespace of the first durable route that lets it.
    fn topic(&self) -> Physical {
        let table = self.policy.table();
        let durable = table.routes().iter().filter(|route| route.lane.takes(Lane::Durable));
        let named = durable.filter_map(|route| Physical::parse(route.pulsar.apply("x")));
        let namespaces: BTreeSet<_> = named.map(|physical| physical.namespace().to_owned()).collect();
        let at = self.at.load(Ordering::Relaxed).checked_rem(namespaces.len());
        let namespace = at.and_then(|at| namespaces.iter().nth(at));
        let namespace = namespace.map_or(DEFAULT_NAMESPACE, String::as_str);
        Physical::within(namespace, &format!("{TOPIC}-{}", self.number))
    }

    /// Sees to it that the topic is read.
    fn hear(&self, physical: &Physical) -> Arc<Heard> {
        let mut hearing = lock(&self.hearing);
        match &*hearing {
            Some(hearing) if hearing.physical == *physical => hearing.shared.clone(),
            _ => {
                let shared = Arc::new(Heard::default());
                let reading = read(self.cluster.clone(), physical.clone(), shared.clone());
                let _task = AbortOnDropHandle::new(tokio::spawn(reading));
                *hearing = Some(Hearing { physical: physical.clone(), shared: shared.clone(), _task });
                shared
            }
        }
    }
}

/// One who waits for a heartbeat. Dropping it takes its entry away.
struct Waiting<'a> {
    shared: &'a Heard,
    id: Option<MessageId>,
    back: oneshot::Receiver<()>,
}

impl<'a> Waiting<'a> {
    fn new(shared: &'a Heard, id: Option<MessageId>) -> Self {
        let (sender, back) = oneshot::channel();
        if let Some(id) = id {
            lock(&shared.waiting).insert(id, sender);
        }
        Self { shared, id, back }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            lock(&self.shared.waiting).remove(&id);
        }
    }
}

/// Reads heartbeats for as long as anybody wants them.
async fn read(cluster: Arc<Cluster>, physical: Physical, shared: Arc<Heard>) {
    loop {
        let ended = read_on(&cluster, &physical, &shared).await;
        shared.begun.store(false, Ordering::Release);
        let is_lasting = ended.as_ref().is_err_and(Fault::is_lasting);
        if let (Err(fault), true) = (ended, is_lasting) {
            warn!(topic = %physical, %fault, "Heartbeats cannot be read back: they tell of storage alone.");
        }
        sleep(if is_lasting { REFUSED_AGAIN } else { AGAIN }).await;
    }
}

/// A constant that is a topic; the test of heartbeats reads by it.
#[allow(clippy::expect_used)]
async fn read_on(cluster: &Arc<Cluster>, physical: &Physical, shared: &Heard) -> Result<(), Fault> {
    let from = newest(cluster, physical).await?.map_or(From::Earliest, From::After);
    // It names records that cannot be read, of which these are none.
    let topic = Topic::parse("heartbeats").expect("letters are a topic");
    let mut feed = Feed::open(cluster.clone(), topic, 0, physical.clone(), (from, None)).await?;
    shared.begun.store(true, Ordering::Release);
    while let Some(records) = feed.next().await? {
        for id in records.into_iter().filter_map(|record| record.message.ok()?.id) {
            if let Some(waiting) = lock(&shared.waiting).remove(&id) {
                // Whoever waited may have given up in this very moment.
                let _ = waiting.send(());
            }
        }
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use leaves it whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
