//! A group member that handles what it is given, a bounded number at a time.
//!
//! ```text
//! delivery ──same key, same slot──▶ slot ──▶ handler ──Ok───▶ ack  ┐ many in a frame
//!                                                    └─Err──▶ nack ┘ with a wait that grows by the attempt
//! ```
//! A delivery belongs to its connection. Where that is lost while a handler runs, the message comes again; what was
//! handled well and could not be acknowledged is then acknowledged without handling it a second time.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fmt::Display;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::backoff::Backoff;
use super::connection::{ClientError, Sender};
use super::dial::{Dial, Live};
use super::event::Event;
use super::subscription::start_fields;
use crate::message::{GroupMode, Start};
use crate::wire::json::heard::Heard;

/// What may wait for a slot; when it is full nothing more is read. One topic brings `prefetch` at most, a pattern that
/// for each of its topics.
const QUEUED_MAX: usize = 1024;
/// Frames that settle deliveries and are not answered; what is settled meanwhile goes together into the next.
const SETTLING_MAX: usize = 8;
/// Messages that were handled and could not be acknowledged. More than these are handled again.
const REMEMBERED_MAX: usize = 10_000;
/// The wait before an acknowledgement that the lane could not record is repeated.
const SETTLE_BACKOFF: Backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_secs(5) };
/// How long a member that leaves waits for what it settled to be confirmed, and for its goodbye.
const LEAVING: Duration = Duration::from_secs(5);

/// How a group's messages are taken.
#[derive(Debug, Clone)]
pub struct Consume {
    pub group: String,
    pub mode: GroupMode,
    /// Only what this expression holds for; the rest is acknowledged unseen.
    pub filter: Option<String>,
    /// How many handlers may run at once. Messages of one key are handled one after the other, in their order.
    pub concurrency: usize,
    /// How many deliveries may be unacknowledged; by default two for each handler, so that none waits for the wire and
    /// none waits here for long while another member is idle.
    pub prefetch: Option<u32>,
    /// Where a new group begins.
    pub from: Start,
    /// The wait before a message comes again whose handler failed, by its attempt.
    pub backoff: Backoff,
}

impl Default for Consume {
    fn default() -> Self {
        Self {
            group: String::new(),
            mode: GroupMode::default(),
            filter: None,
            concurrency: 1,
            prefetch: None,
            from: Start::Latest,
            backoff: Backoff { first: Duration::from_secs(1), max: Duration::from_secs(60) },
        }
    }
}

/// What became of what was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Consumed {
    /// Handlers that ended with `Ok`.
    pub handled: u64,
    /// Handlers that failed; their messages come again.
    pub failed: u64,
    /// Of those handled, how many the bridge did not confirm: they may come again, here or elsewhere.
    pub unconfirmed: u64,
}

impl Consume {
    fn options(&self) -> Value {
        let prefetch = self.prefetch.unwrap_or(2 * self.concurrency.max(1) as u32);
        let mut options = start_fields(&self.from);
        options.insert("group".into(), json!(self.group));
        options.insert("mode".into(), json!(self.mode.as_str()));
        options.insert("filter".into(), json!(self.filter));
        options.insert("prefetch".into(), json!(prefetch));
        Value::Object(options)
    }
}

/// Takes part until `stop`: then it takes no more, waits for the handlers that run, and leaves once what they did is
/// confirmed, or cannot be for now. An error is one that trying again does not mend; the handlers that run are waited for all the same.
pub async fn consume<H, F, E>(
    mut dial: Dial,
    first_within: Duration,
    topic: &str,
    asked: Consume,
    stop: CancellationToken,
    handler: H,
) -> Result<Consumed, ClientError>
where
    H: Fn(Event) -> F + Send + Sync + 'static,
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: Display,
{
    let mut crew = Crew::new(&asked, handler);
    let mut is_first = true;
    let ended = loop {
        let joining = async {
            match is_first {
                false => dial.subscribe(topic, asked.options(), false).await,
                true => dial.subscribe_within(first_within, topic, asked.options()).await,
            }
        };
        let mut live = match stop.run_until_cancelled(joining).await {
            None => break Ok(()),
            Some(Err(error)) => break Err(error),
            Some(Ok((live, _))) => live,
        };
        is_first = false;
        let Some(error) = crew.work(&mut live, &stop).await else {
            let sender = live.sender();
            let leaving = live.only(sender.unsubscribe(topic, Some(&asked.group)));
            // Closing the connection says the same.
            let _ = timeout(LEAVING, leaving).await;
            break Ok(());
        };
        crew.connection_lost();
        if stop.is_cancelled() {
            break Ok(());
        }
        if let Err(error) = dial.lost(live, error).await {
            break Err(error);
        }
    };
    let consumed = crew.finish().await;
    ended.map(|()| consumed)
}

/// The handlers and what waits for them.
struct Crew<H> {
    handler: Arc<H>,
    backoff: Backoff,
    slots: Vec<Slot>,
    /// What has no key, for whichever slot is free first.
    keyless: VecDeque<Queued>,
    queued: usize,
    arrivals: u64,
    running: JoinSet<Done>,
    /// Counts connections: a delivery is settled on its own.
    connection: u64,
    acks: Vec<u64>,
    nacks: Vec<(Duration, u64)>,
    /// Deliveries that were handled and whose acknowledgement is not confirmed, with their messages.
    unconfirmed: HashMap<u64, String>,
    /// Messages that were handled and not acknowledged before their connection was lost.
    remembered: HashSet<String>,
    consumed: Consumed,
}

#[derive(Default)]
struct Slot {
    /// The message whose handler runs.
    busy: Option<String>,
    queue: VecDeque<Queued>,
}

struct Queued {
    arrival: u64,
    event: Event,
}

/// A handler has ended.
struct Done {
    slot: usize,
    connection: u64,
    delivery: Option<u64>,
    id: String,
    attempt: u32,
    is_ok: bool,
}

type Settling = FuturesUnordered<BoxFuture<'static, (Vec<u64>, Result<Heard, ClientError>)>>;

impl<H, F, E> Crew<H>
where
    H: Fn(Event) -> F + Send + Sync + 'static,
    F: Future<Output = Result<(), E>> + Send + 'static,
    E: Display,
{
    fn new(asked: &Consume, handler: H) -> Self {
        Self {
            handler: Arc::new(handler),
            backoff: asked.backoff,
            slots: (0..asked.concurrency.max(1)).map(|_| Slot::default()).collect(),
            keyless: VecDeque::new(),
            queued: 0,
            arrivals: 0,
            running: JoinSet::new(),
            connection: 0,
            acks: Vec::new(),
            nacks: Vec::new(),
            unconfirmed: HashMap::new(),
            remembered: HashSet::new(),
            consumed: Consumed::default(),
        }
    }

    /// Works on one connection until it ends, with why; `None` once everything is finished after a stop.
    async fn work(&mut self, live: &mut Live, stop: &CancellationToken) -> Option<ClientError> {
        let sender = live.sender();
        let mut settling = Settling::new();
        let mut leave_at = None;
        loop {
            if stop.is_cancelled() {
                // What waits for a slot goes back when this member leaves.
                self.forget_queued();
            } else {
                self.start();
            }
            self.settle(&sender, &mut settling);
            let stopping = stop.is_cancelled();
            if stopping && self.running.is_empty() {
                let leave_at = *leave_at.get_or_insert_with(|| Instant::now() + LEAVING);
                if settling.is_empty() || Instant::now() >= leave_at {
                    return None;
                }
            }
            tokio::select! {
                biased;
                () = stop.cancelled(), if !stopping => {}
                () = sleep_until(leave_at.unwrap_or_else(Instant::now)), if leave_at.is_some() => {}
                Some(Ok(done)) = self.running.join_next(), if !self.running.is_empty() => {
                    self.done(done);
                    while let Some(Ok(done)) = self.running.try_join_next() {
                        self.done(done);
                    }
                }
                Some((deliveries, result)) = settling.next(), if !settling.is_empty() => {
                    self.settled(&deliveries, result);
                }
                heard = live.next(), if self.queued < QUEUED_MAX => match heard {
                    Ok(heard) => if let Some(error) = self.hear(heard, stopping) { return Some(error) },
                    Err(error) => return Some(error),
                },
            }
        }
    }

    fn hear(&mut self, heard: Heard, stopping: bool) -> Option<ClientError> {
        match (heard.kind.as_str(), heard.error.clone()) {
            ("event", _) if stopping => {}
            ("event", _) => {
                let (delivery, attempt) = (heard.delivery, heard.attempt.unwrap_or(1));
                match (Event::read(heard), delivery) {
                    (Some(event), _) => self.queue(event),
                    // Another member's build may read it.
                    (None, Some(delivery)) => self.nacks.push((self.backoff.delay(attempt - 1), delivery)),
                    (None, None) => {}
                }
            }
            // A defect belongs to one message, which would meet it again.
            ("error", Some(error)) if error.retryable && error.code != "INTERNAL" => {
                return Some(ClientError::Refused(error));
            }
            ("error", Some(error)) => {
                warn!(code = %error.code, "Something could not be delivered: {}", error.message);
            }
            _ => {}
        }
        None
    }

    fn queue(&mut self, event: Event) {
        self.arrivals += 1;
        let id = event.id().map(str::to_owned);
        let slot = match event.key() {
            // Its handler may still run, from before the connection was lost.
            None => self.slots.iter().position(|slot| slot.busy.is_some() && slot.busy == id),
            Some(key) => {
                let mut hasher = DefaultHasher::new();
                (event.topic(), key).hash(&mut hasher);
                Some((hasher.finish() % self.slots.len() as u64) as usize)
            }
        };
        let queued = Queued { arrival: self.arrivals, event };
        match slot {
            Some(slot) => self.slots[slot].queue.push_back(queued),
            None => self.keyless.push_back(queued),
        }
        self.queued += 1;
    }

    /// Gives every free slot the oldest of what it may take.
    fn start(&mut self) {
        for slot in 0..self.slots.len() {
            while self.slots[slot].busy.is_none() {
                let own = self.slots[slot].queue.front().map(|queued| queued.arrival);
                let any = self.keyless.front().map(|queued| queued.arrival);
                let next = match (own, any) {
                    (Some(own), Some(any)) if any < own => self.keyless.pop_front(),
                    (Some(_), _) => self.slots[slot].queue.pop_front(),
                    (None, _) => self.keyless.pop_front(),
                };
                let Some(Queued { event, .. }) = next else { break };
                self.queued -= 1;
                self.handle(slot, event);
            }
        }
    }

    fn handle(&mut self, slot: usize, event: Event) {
        let id = event.id().unwrap_or_default().to_owned();
        let delivery = event.heard.delivery;
        if let Some(delivery) = delivery
            && self.remembered.remove(&id)
        {
            self.unconfirmed.insert(delivery, id);
            self.acks.push(delivery);
            return;
        }
        self.slots[slot].busy = Some(id.clone());
        let (connection, attempt, handler) = (self.connection, event.attempt(), self.handler.clone());
        self.running.spawn(async move {
            let topic = event.topic().to_owned();
            // A handler that panics has failed, and takes nothing with it.
            let handled = AssertUnwindSafe(async { handler(event).await }).catch_unwind().await;
            let is_ok = match handled {
                Ok(Ok(())) => true,
                Ok(Err(error)) => {
                    warn!(topic, id, attempt, %error, "A handler failed; its message comes again.");
                    false
                }
                Err(_) => {
                    warn!(topic, id, attempt, "A handler panicked; its message comes again.");
                    false
                }
            };
            Done { slot, connection, delivery, id, attempt, is_ok }
        });
    }

    fn done(&mut self, done: Done) {
        self.slots[done.slot].busy = None;
        match done.is_ok {
            true => self.consumed.handled += 1,
            false => self.consumed.failed += 1,
        }
        let Some(delivery) = done.delivery else { return };
        match (done.connection == self.connection, done.is_ok) {
            (true, true) => {
                self.unconfirmed.insert(delivery, done.id);
                self.acks.push(delivery);
            }
            (true, false) => self.nacks.push((self.backoff.delay(done.attempt.saturating_sub(1)), delivery)),
            (false, true) => self.remember(done.id),
            // It comes again by itself.
            (false, false) => {}
        }
    }

    fn settle(&mut self, sender: &Sender, settling: &mut Settling) {
        while settling.len() < SETTLING_MAX {
            let sender = sender.clone();
            if !self.acks.is_empty() {
                settling.push(Box::pin(settle(sender, std::mem::take(&mut self.acks), None)));
            } else if let Some((delay, delivery)) = self.nacks.pop() {
                settling.push(Box::pin(settle(sender, vec![delivery], Some(delay))));
            } else {
                return;
            }
        }
    }

    fn settled(&mut self, deliveries: &[u64], result: Result<Heard, ClientError>) {
        match result {
            // What was settled stays in doubt until the end of the connection is told.
            Err(ClientError::Broken(_)) => return,
            Err(error) => debug!(%error, "Some deliveries could not be settled; they may come again."),
            Ok(_) => {}
        }
        for delivery in deliveries {
            self.unconfirmed.remove(delivery);
        }
    }

    fn forget_queued(&mut self) {
        self.keyless.clear();
        self.slots.iter_mut().for_each(|slot| slot.queue.clear());
        self.queued = 0;
    }

    fn connection_lost(&mut self) {
        self.connection += 1;
        self.forget_queued();
        self.acks.clear();
        self.nacks.clear();
        for id in std::mem::take(&mut self.unconfirmed).into_values() {
            self.remember(id);
        }
    }

    fn remember(&mut self, id: String) {
        if self.remembered.len() < REMEMBERED_MAX {
            self.remembered.insert(id);
        }
    }

    async fn finish(mut self) -> Consumed {
        self.connection_lost();
        while let Some(Ok(done)) = self.running.join_next().await {
            self.done(done);
        }
        Consumed { unconfirmed: self.remembered.len() as u64, ..self.consumed }
    }
}

/// Says what became of deliveries, again and again while the lane cannot record it: the bridge holds them until then.
async fn settle(
    sender: Sender,
    deliveries: Vec<u64>,
    delay: Option<Duration>,
) -> (Vec<u64>, Result<Heard, ClientError>) {
    let mut failures = 0;
    loop {
        let said = match delay {
            None => sender.ack(&deliveries).await,
            Some(delay) => sender.nack(&deliveries, delay).await,
        };
        match said {
            Err(ClientError::Refused(error)) if error.retryable => {
                tokio::time::sleep(SETTLE_BACKOFF.delay(failures)).await;
                failures += 1;
            }
            said => return (deliveries, said),
        }
    }
}
