//! The outbox: what waits to be written to one client.
//!
//! ```text
//! answers ───────always taken──────▶ ┌────────┐
//! durable ────waits for half of it─▶ │ outbox │ ──all that waits, at once──▶ writer ──▶ socket
//! ephemeral ──drops the oldest─────▶ └────────┘
//! ```
//! A slow client may miss what was only worth hearing live, and is told how much, where it would have been.
//! It never misses what was stored: the durable lane waits for it instead. Answers are bounded by the reader, which
//! takes no new frame while too many wait.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::Notify;

use crate::message::Envelope;
use crate::policy::table::{Overflow, Route};
use crate::topic::Pattern;
use crate::wire::code::{Close, Code, Fault};
use crate::wire::verbs::{Event, GapReason};

/// Numbers the subscriptions of one connection in the order in which they were made.
pub type SubscriptionNo = u64;

pub struct Outbox {
    queue: Mutex<Queue>,
    /// Something waits for the writer.
    ready: Notify,
    /// The writer took what waited.
    taken: Notify,
    messages_max: usize,
    pub bytes_max: usize,
}

/// One frame to be, and what is told about it once it is written.
#[derive(Debug)]
pub struct Item {
    pub event: Event,
    /// The route of an event's topic: for the metrics, and for what an ephemeral one may occupy.
    pub route: Option<Arc<Route>>,
    /// To be acknowledged to the group once written.
    pub settle: Option<u64>,
    /// Since when it waits here, where that is timed.
    pub since: Option<Instant>,
}

impl From<Event> for Item {
    fn from(event: Event) -> Self {
        Item { event, route: None, settle: None, since: None }
    }
}

#[derive(Default)]
struct Queue {
    slots: VecDeque<Slot>,
    /// The number of the first slot; slots are numbered for the life of the outbox.
    first: u64,
    /// Slots that hold nothing any more.
    empty: usize,
    bytes: usize,
    /// What waiting acks tell of lists of messages: each result is an answer that was not read.
    results: usize,
    /// The slots of the ephemeral events of each route, oldest first.
    droppable: Vec<(Arc<Route>, VecDeque<u64>)>,
    /// The slot of the gap that waits for a subscription.
    gaps: HashMap<SubscriptionNo, u64>,
    closing: Option<Close>,
}

enum Slot {
    Item { item: Item, subscription: Option<(SubscriptionNo, Pattern)> },
    Gap { pattern: Pattern, dropped: u64, route: Arc<Route> },
    Empty,
}

/// What the writer takes.
pub struct Taken {
    pub items: Vec<Item>,
    /// The connection closes with this behind the items.
    pub closing: Option<Close>,
}

impl Outbox {
    pub fn new(messages_max: usize, bytes_max: usize) -> Self {
        Self { queue: Mutex::default(), ready: Notify::new(), taken: Notify::new(), messages_max, bytes_max }
    }

    /// Takes an answer or a notice.
    pub fn push(&self, item: impl Into<Item>) {
        let mut queue = self.lock();
        if queue.closing.is_none() {
            let was_idle = queue.is_idle();
            queue.append(Slot::Item { item: item.into(), subscription: None });
            self.wake(queue, was_idle);
        }
    }

    /// Takes a durable event; waits while half of the outbox is occupied, so that the other half is left to what
    /// cannot wait.
    pub async fn push_durable(&self, item: Item) {
        let Err(mut item) = self.try_push_durable(item) else { return };
        loop {
            let taken = self.taken.notified();
            tokio::pin!(taken);
            taken.as_mut().enable();
            match self.try_push_durable(item) {
                Ok(()) => return,
                Err(back) => item = back,
            }
            taken.await;
        }
    }

    /// Hands the item back where it has to wait.
    fn try_push_durable(&self, item: Item) -> Result<(), Item> {
        let bytes = weight(&item.event);
        let mut queue = self.lock();
        if queue.closing.is_some() {
            return Ok(());
        }
        let fits = queue.len() < (self.messages_max / 2).max(1) && queue.bytes + bytes <= self.bytes_max / 2;
        if !fits && queue.len() > 0 {
            return Err(item);
        }
        let was_idle = queue.is_idle();
        queue.append(Slot::Item { item, subscription: None });
        self.wake(queue, was_idle);
        Ok(())
    }

    /// Takes an ephemeral event at once. Where there is no room the oldest goes: of this route, where the route has
    /// its share, else of any. Returns the route of each event that was dropped for it.
    pub fn push_ephemeral(&self, no: SubscriptionNo, pattern: &Pattern, item: Item) -> Vec<Arc<Route>> {
        let Some(route) = item.route.clone() else {
            self.push(item);
            return Vec::new();
        };
        let bytes = weight(&item.event);
        let mut queue = self.lock();
        if queue.closing.is_some() {
            return Vec::new();
        }
        let was_idle = queue.is_idle();
        let mut dropped = Vec::new();
        loop {
            let has_share = queue.waiting_of(&route) >= route.queue.max(1);
            // A gap weighs nothing, so a large event is admitted where nothing but gaps wait.
            let is_crowded =
                queue.len() >= self.messages_max || queue.bytes > 0 && queue.bytes + bytes > self.bytes_max;
            if !has_share && !is_crowded {
                let number = queue.append(Slot::Item { item, subscription: Some((no, pattern.clone())) });
                queue.may_drop(route, number);
                break;
            }
            if route.overflow == Overflow::Disconnect {
                queue.close_slow(&route);
                dropped.push(route);
                break;
            }
            let freed = match has_share {
                true => queue.drop_oldest_of(&route),
                false => queue.drop_oldest(),
            };
            match freed {
                Some(of) => dropped.push(of),
                None => {
                    queue.announce(no, pattern, &route, 1);
                    dropped.push(route);
                    break;
                }
            }
        }
        self.wake(queue, was_idle);
        dropped
    }

    /// Announces events that never came this far.
    pub fn gap(&self, subscription: SubscriptionNo, pattern: &Pattern, route: &Arc<Route>, dropped: u64) {
        let mut queue = self.lock();
        let was_idle = queue.is_idle();
        queue.announce(subscription, pattern, route, dropped);
        self.wake(queue, was_idle);
    }

    /// Nothing more is taken; the writer sends what waits, then closes. `false`: it was closing already.
    pub fn close(&self, close: Close) -> bool {
        let mut queue = self.lock();
        let first = queue.closing.is_none();
        queue.closing.get_or_insert(close);
        drop(queue);
        self.ready.notify_one();
        self.taken.notify_waiters();
        first
    }

    /// How many frames wait.
    pub fn len(&self) -> usize {
        self.lock().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns once the outbox closes.
    pub async fn closed(&self) {
        self.fewer_than(0).await;
    }

    /// Returns once fewer than `max` frames wait, each result of a list of messages counted as one, or the outbox closes.
    pub async fn fewer_than(&self, max: usize) {
        loop {
            let taken = self.taken.notified();
            tokio::pin!(taken);
            taken.as_mut().enable();
            {
                let queue = self.lock();
                if queue.len() + queue.results < max || queue.closing.is_some() {
                    return;
                }
            }
            taken.await;
        }
    }

    /// Everything that waits, as soon as something does. Cancel safe.
    pub async fn take(&self) -> Taken {
        loop {
            if let Some(taken) = self.take_now() {
                return taken;
            }
            self.ready.notified().await;
        }
    }

    fn take_now(&self) -> Option<Taken> {
        let mut queue = self.lock();
        if queue.is_idle() {
            return None;
        }
        let slots = std::mem::take(&mut queue.slots);
        queue.first += slots.len() as u64;
        queue.empty = 0;
        queue.bytes = 0;
        queue.results = 0;
        queue.droppable.clear();
        queue.gaps.clear();
        let closing = queue.closing;
        drop(queue);
        self.taken.notify_waiters();
        let items = slots.into_iter().filter_map(|slot| match slot {
            Slot::Item { item, .. } => Some(item),
            Slot::Gap { pattern, dropped, route } => {
                let event = Event::Gap { topic: pattern, dropped: Some(dropped), reason: GapReason::Slow };
                Some(Item { event, route: Some(route), settle: None, since: None })
            }
            Slot::Empty => None,
        });
        Some(Taken { items: items.collect(), closing })
    }

    /// Tells the writer that something waits; it knows where something waited before.
    fn wake(&self, queue: MutexGuard<'_, Queue>, was_idle: bool) {
        drop(queue);
        if was_idle {
            self.ready.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic while the lock is held would be a defect in this file; the connection ends then in any case.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn len(&self) -> usize {
        self.slots.len() - self.empty
    }

    /// Nothing is there for the writer to do.
    fn is_idle(&self) -> bool {
        self.slots.is_empty() && self.closing.is_none()
    }

    fn append(&mut self, mut slot: Slot) -> u64 {
        if let Slot::Item { item, .. } = &mut slot {
            item.since = is_timed(&item.event).then(Instant::now);
            self.bytes += weight(&item.event);
            if let Event::Ack(ack) = &item.event {
                self.results += ack.results.len();
            }
        }
        self.slots.push_back(slot);
        self.first + self.slots.len() as u64 - 1
    }

    fn waiting_of(&self, route: &Arc<Route>) -> usize {
        self.droppable.iter().find(|(r, _)| Arc::ptr_eq(r, route)).map_or(0, |(_, numbers)| numbers.len())
    }

    /// The ephemeral event in this slot, of this route, may be dropped.
    fn may_drop(&mut self, route: Arc<Route>, number: u64) {
        match self.droppable.iter_mut().find(|(r, _)| Arc::ptr_eq(r, &route)) {
            Some((_, numbers)) => numbers.push_back(number),
            None => self.droppable.push((route, VecDeque::from([number]))),
        }
    }

    /// Drops the oldest event of a route. Returns the route; `None` where there is no such event.
    fn drop_oldest_of(&mut self, route: &Arc<Route>) -> Option<Arc<Route>> {
        let (_, numbers) = self.droppable.iter_mut().find(|(r, _)| Arc::ptr_eq(r, route))?;
        let oldest = numbers.pop_front()?;
        self.drop_slot(oldest)
    }

    /// The same for the oldest of any route.
    fn drop_oldest(&mut self) -> Option<Arc<Route>> {
        let fronts = self.droppable.iter_mut().filter(|(_, numbers)| !numbers.is_empty());
        let (_, numbers) = fronts.min_by_key(|(_, numbers)| numbers.front().copied())?;
        let oldest = numbers.pop_front()?;
        self.drop_slot(oldest)
    }

    /// Empties a slot and counts it in its subscription's gap; the first that is dropped leaves the gap in its place.
    fn drop_slot(&mut self, number: u64) -> Option<Arc<Route>> {
        let at = (number - self.first) as usize;
        let Slot::Item { item, subscription: Some((subscription, pattern)) } =
            std::mem::replace(self.slots.get_mut(at)?, Slot::Empty)
        else {
            return None;
        };
        self.bytes -= weight(&item.event);
        let route = item.route?;
        match self.gaps.get(&subscription).copied() {
            Some(gap) => {
                self.count(gap, 1);
                self.empty += 1;
                self.compact();
            }
            None => {
                self.gaps.insert(subscription, number);
                self.slots[at] = Slot::Gap { pattern, dropped: 1, route: route.clone() };
            }
        }
        Some(route)
    }

    fn announce(&mut self, subscription: SubscriptionNo, pattern: &Pattern, route: &Arc<Route>, count: u64) {
        match self.gaps.get(&subscription).copied() {
            Some(gap) => self.count(gap, count),
            None => {
                let gap = Slot::Gap { pattern: pattern.clone(), dropped: count, route: route.clone() };
                let number = self.append(gap);
                self.gaps.insert(subscription, number);
            }
        }
    }

    fn count(&mut self, gap: u64, count: u64) {
        if let Some(Slot::Gap { dropped, .. }) = self.slots.get_mut((gap - self.first) as usize) {
            *dropped += count;
        }
    }

    /// Removes empty slots once they are the greater part, so that a client that does not read costs no more than
    /// its bound.
    fn compact(&mut self) {
        if self.empty < 64 || self.empty * 2 < self.slots.len() {
            return;
        }
        let mut moved = HashMap::with_capacity(self.len());
        let mut kept = VecDeque::with_capacity(self.len());
        for (at, slot) in std::mem::take(&mut self.slots).into_iter().enumerate() {
            if !matches!(slot, Slot::Empty) {
                moved.insert(self.first + at as u64, self.first + kept.len() as u64);
                kept.push_back(slot);
            }
        }
        self.slots = kept;
        self.empty = 0;
        let renumber = |number: &mut u64| {
            if let Some(new) = moved.get(number) {
                *number = *new;
            }
        };
        self.droppable.iter_mut().flat_map(|(_, numbers)| numbers.iter_mut()).for_each(renumber);
        self.gaps.values_mut().for_each(renumber);
    }

    /// The route closes slow subscribers: what waits is of no use to this one any more.
    fn close_slow(&mut self, route: &Route) {
        self.slots.clear();
        self.empty = 0;
        self.bytes = 0;
        self.results = 0;
        self.droppable.clear();
        self.gaps.clear();
        let message = format!(
            "this connection read too slowly for route `{}` (more than {} events waited): reconnect",
            route.name, route.queue
        );
        let fault = Fault::new(Code::SlowConsumer, message);
        let item = Item::from(Event::Error { request_id: None, fault });
        self.append(Slot::Item { item, subscription: None });
        self.closing = Some(Close::SlowConsumer);
    }
}

/// What a frame counts against the bound.
fn weight(event: &Event) -> usize {
    match event {
        Event::Live(envelope)
        | Event::Late(envelope)
        | Event::Replayed { envelope, .. }
        | Event::Delivered { envelope, .. } => envelope.weight(),
        Event::Response { message, .. } => message.payload.len() + 128,
        _ => 128,
    }
}

/// Whether it is told how long the event took. A replay, or another attempt, was brought long before.
fn is_timed(event: &Event) -> bool {
    match event {
        Event::Live(envelope) | Event::Late(envelope) => envelope.brought.is_some(),
        Event::Delivered { envelope, delivery, .. } => {
            envelope.brought.is_some() && delivery.as_ref().is_none_or(|delivery| delivery.attempt == 1)
        }
        _ => false,
    }
}

/// The envelope of an event, where it is one.
pub fn envelope(event: &Event) -> Option<&Arc<Envelope>> {
    match event {
        Event::Live(envelope)
        | Event::Late(envelope)
        | Event::Replayed { envelope, .. }
        | Event::Delivered { envelope, .. } => Some(envelope),
        _ => None,
    }
}

/// The group that an event is a delivery of.
pub fn group(event: &Event) -> Option<&str> {
    match event {
        Event::Delivered { group, .. } => Some(group),
        _ => None,
    }
}
