//! One partition of a group as this member has it: what came, what became of it, and what the broker knows of that.
//!
//! ```text
//!            ┌──────────── after the delay ────────────┐
//!            ▼                                         │
//! broker ─▶ out ──nack──▶ waiting ──(alone in its entry)──▶ gone ─▶ broker delivers it to any member
//!            └───ack───▶ acked ──▶ kept until the broker has confirmed, and a while longer
//! ```
//! Shared and key-shared subscriptions give back one entry alone. The others keep what is nacked here until its time has
//! come: where the order counts Pulsar would rewind everything.
//!
//! Pulsar acknowledges entries, and an entry may be a batch. So each acknowledgement says which of the batch are left
//! (`ack_set`), and what the broker delivers again is held against what was acknowledged here: it may have been sent
//! before the acknowledgement arrived.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, OptionFuture};
use pulsar::proto::command_subscribe::{InitialPosition, SubType};
use pulsar::proto::{CommandSubscribe, KeySharedMeta, KeySharedMode, MessageIdData};
use tokio::sync::{Barrier, mpsc, oneshot};
use tokio::time::Instant;
use tracing::{info, warn};

use super::admin::Admin;
use super::cluster::Cluster;
use super::consumer::Consumer;
use super::fault::Fault;
use super::feed::{Backoff, Patience};
use super::group::Desk;
use super::held::{Held, Key, Lost, Slot, State, is_unacked};
use super::names::Physical;
use super::passed_over::Lookout;
use super::record::{self, Record};
use super::session::Delivery;
use crate::lane::contract::{Handed, LaneError, Tag};
use crate::message::{Envelope, GroupMode, Place, Position, Stored};
use crate::topic::Topic;

/// Settled entries that are remembered, so that a late copy of one is known.
const PAST: usize = 4096;
/// Waiting messages that take no room of the prefetch; what is nacked beyond does.
const WAITING_FREE: usize = 10_000;
/// The same where a copy is kept here.
const KEPT_FREE: usize = 1000;
/// How long the members that were sought wait for each other.
const MEET: Duration = Duration::from_millis(500);
/// Commands taken in one go.
const TURN: usize = 256;

pub enum Settle {
    Ack {
        tags: Vec<Tag>,
        done: oneshot::Sender<()>,
    },
    Nack {
        tags: Vec<Tag>,
        delay: Duration,
    },
    /// The group is about to be sought: the share says that it waits, and waits until it was. What it gets then is
    /// where all of them meet before anything comes: else the first one back would have everything.
    Seek {
        waits: oneshot::Sender<()>,
        sought: oneshot::Receiver<Arc<Barrier>>,
    },
}

/// Acknowledgements that the broker gets together, and who waits for them.
#[derive(Default)]
struct Acks {
    keys: Vec<Key>,
    done: Vec<oneshot::Sender<()>>,
}

impl Acks {
    fn add(&mut self, key: Key, held: &mut Held) {
        if !std::mem::replace(&mut held.untold, true) {
            held.acking += 1;
            self.keys.push(key);
        }
    }
}

/// What the broker knows of a member, the same for every partition.
pub struct Membership {
    pub group: Arc<str>,
    pub mode: GroupMode,
    /// Sorts the members of a failover group by their standing.
    pub standing: i32,
    /// What the group's members on this bridge lost.
    pub lost: Arc<Lost>,
    pub admin: Arc<Admin>,
    /// How long others may have the place before it is given up.
    pub busy_for: Duration,
}

impl Membership {
    fn subscribe(&self, physical: &Physical, initial: InitialPosition) -> CommandSubscribe {
        let sub_type = match self.mode {
            GroupMode::Exclusive => SubType::Exclusive,
            GroupMode::Shared => SubType::Shared,
            GroupMode::Failover => SubType::Failover,
            GroupMode::KeyShared => SubType::KeyShared,
        };
        let auto_split =
            KeySharedMeta { key_shared_mode: KeySharedMode::AutoSplit as i32, ..Default::default() };
        CommandSubscribe {
            topic: physical.as_str().into(),
            subscription: self.group.to_string(),
            sub_type: sub_type as i32,
            // Else the members of a partitioned topic are sorted by name, and each has some of the partitions.
            priority_level: (self.mode == GroupMode::Failover).then_some(self.standing),
            key_shared_meta: (self.mode == GroupMode::KeyShared).then_some(auto_split),
            initial_position: Some(initial as i32),
            ..Default::default()
        }
    }
}

pub struct Share {
    cluster: Arc<Cluster>,
    topic: Topic,
    partition: u32,
    /// Counts the times that the group was sought.
    era: u32,
    physical: Physical,
    subscribe: CommandSubscribe,
    quota: u32,
    busy_for: Duration,
    /// The broker can be asked for one entry again.
    gives_back: bool,
    desk: Arc<Desk>,
    lost: Arc<Lost>,
    lookout: Lookout,
    inbox: mpsc::Receiver<Settle>,
    consumer: Option<Consumer>,
    /// Counts subscriptions, from 1.
    epoch: u64,
    /// This subscription has brought something.
    lives: bool,
    /// The last one was closed by the broker, on a connection that stood.
    closed: bool,
    /// Where the next one waits for the other members.
    meeting: Option<Arc<Barrier>>,
    /// The broker has not made this failover subscription the active one. It gets no permits before: a broker (4.0)
    /// that reads for it while the one before leaves may go on behind what that one has not acknowledged.
    waits: bool,
    /// Permits to give back.
    freed: u32,
    /// Permits that the broker has not used. A batch may take more than there are.
    open: i64,
    /// In the order in which most of them come and go, so that what is used next lies beside what was used last.
    entries: BTreeMap<Key, Held>,
    /// How many messages are acknowledged of each entry of which others are left.
    within: BTreeMap<Key, u64>,
    past: VecDeque<Key>,
    /// When which message has waited long enough; the number tells equal times apart.
    due: BTreeMap<(Instant, u64), (Key, usize)>,
    nacked: u64,
    /// What the next acknowledgement tells the broker.
    untold: Acks,
    /// What the one under way tells it. It has not confirmed that.
    told: Acks,
    /// Its answer, on this subscription.
    answer: Option<BoxFuture<'static, Result<(), Fault>>>,
    /// Room for the messages of an entry, kept from one to the next.
    records: Vec<Record>,
}

impl Share {
    /// Subscribes for the first time, so that what is refused is refused at once.
    pub async fn subscribe(
        cluster: Arc<Cluster>,
        (topic, partition, physical): (Topic, u32, Physical),
        membership: &Membership,
        initial: InitialPosition,
        quota: u32,
        desk: Arc<Desk>,
        inbox: mpsc::Receiver<Settle>,
    ) -> Result<Self, Fault> {
        let mut share = Self {
            cluster,
            topic,
            partition,
            era: 0,
            subscribe: membership.subscribe(&physical, initial),
            lookout: Lookout::new(membership.admin.clone(), physical.clone(), membership.group.clone()),
            physical,
            quota,
            busy_for: membership.busy_for,
            gives_back: matches!(membership.mode, GroupMode::Shared | GroupMode::KeyShared),
            desk,
            lost: membership.lost.clone(),
            inbox,
            consumer: None,
            epoch: 0,
            lives: false,
            closed: false,
            meeting: None,
            waits: false,
            freed: 0,
            open: 0,
            entries: BTreeMap::new(),
            within: BTreeMap::new(),
            past: VecDeque::new(),
            due: BTreeMap::new(),
            nacked: 0,
            untold: Acks::default(),
            told: Acks::default(),
            answer: None,
            records: Vec::new(),
        };
        let mut patience = Patience::default();
        while let Err(fault) = share.connect().await {
            patience.bear(fault).await?;
        }
        // A topic that is deleted shall not come back because of us. What is stored once it does is all new to us.
        share.subscribe.force_topic_creation = Some(false);
        share.subscribe.initial_position = Some(InitialPosition::Earliest as i32);
        Ok(share)
    }

    /// Ends with the member, or with an error that trying again would not cure.
    pub async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut busy = None;
        loop {
            if self.consumer.is_none() {
                match self.connect().await {
                    Ok(()) => {
                        busy = None;
                        info!(topic = %self.physical, "The group goes on.");
                    }
                    Err(fault) if ends(&fault) => return self.desk.fail(fault.on_lane()),
                    Err(fault) => {
                        let since = *busy.get_or_insert_with(Instant::now);
                        if !fault.is_busy() {
                            busy = None;
                        } else if since.elapsed() > self.busy_for {
                            return self.desk.fail(self.taken(&fault));
                        }
                        if backoff.is_first() {
                            warn!(topic = %self.physical, %fault, "A group cannot go on; trying until it can.");
                        }
                        backoff.wait().await;
                        continue;
                    }
                }
            }
            match self.turn().await {
                Ok(true) if self.lives => backoff.reset(),
                Ok(true) => {}
                Ok(false) => return,
                Err(_) => {
                    let idle = !self.lives;
                    self.disconnect();
                    if idle {
                        // Whatever closes a subscription as soon as it is made shall not do so all the time.
                        backoff.wait().await;
                    }
                }
            }
        }
    }

    /// One thing that happens. `false`: the member has gone.
    async fn turn(&mut self) -> Result<bool, Fault> {
        let lost = || Fault::Lost("the subscription ended".into());
        let consumer = self.consumer.as_mut().ok_or_else(lost)?;
        let next_due = self.due.first_key_value().map(|((at, _), _)| *at);
        let entries = &self.entries;
        let held = || entries.values().filter(|held| held.is_here()).count() as u64;
        let mut settling = Vec::new();
        tokio::select! {
            came = consumer.next_or_active() => {
                let came = came.ok_or_else(lost)?;
                match came.is_empty() {
                    true => self.waits = false,
                    false => {
                        self.lives = true;
                        self.deliver(came);
                    }
                }
            }
            count = self.inbox.recv_many(&mut settling, TURN) => {
                if count == 0 {
                    return Ok(false);
                }
                self.settle(settling).await?;
            }
            Some(answer) = OptionFuture::from(self.answer.as_mut()) => {
                self.answer = None;
                // Acknowledging twice is no harm, so where this one fails a new subscription does it again.
                answer?;
                self.lives = true;
                self.confirmed();
            }
            () = tokio::time::sleep_until(next_due.unwrap_or_else(Instant::now)), if next_due.is_some() => {
                self.hand_out_what_is_due().await?;
            }
            away = self.lookout.passed_over(held) => {
                warn!(topic = %self.physical, group = %self.subscribe.subscription,
                    "The broker passed over messages of a group; subscribing again.");
                self.disconnect();
                tokio::time::sleep(away).await;
                return Ok(true);
            }
        }
        self.give_back_permits().await?;
        Ok(true)
    }

    async fn connect(&mut self) -> Result<(), Fault> {
        let session = self.cluster.owner(&self.physical).await?;
        let consumer = Consumer::subscribe(session, self.subscribe.clone()).await?;
        self.epoch += 1;
        self.lives = false;
        self.waits = self.subscribe.sub_type == SubType::Failover as i32;
        (self.freed, self.open) = (self.quota - self.keep(), 0);
        self.desk.opened(self.partition, consumer.closing());
        self.consumer = Some(consumer);
        let Acks { keys, done } = std::mem::take(&mut self.told);
        self.untold.keys.extend(keys);
        self.untold.done.extend(done);
        self.acknowledge();
        if self.gives_back {
            self.lookout.begin();
        }
        if let Some(meeting) = self.meeting.take() {
            // Who does not come in time is not waited for.
            let _ = tokio::time::timeout(MEET, meeting.wait()).await;
        }
        self.give_back_permits().await
    }

    /// The broker gives away again what this subscription had. What the client has not got is no longer here; what it
    /// has in its hands it may still settle, and where it comes to this member again it is not handed out twice.
    fn disconnect(&mut self) {
        self.closed = self.consumer.take().is_some_and(|consumer| consumer.was_closed());
        self.answer = None;
        self.lookout.end();
        for tag in self.desk.withdraw(self.partition) {
            if let Some(slot) = self.slot(tag) {
                slot.attempt = slot.attempt.saturating_sub(1);
                slot.state = State::Gone;
            }
        }
        self.lose();
        for held in self.entries.values_mut() {
            let is_confirmed = held.acking == 0;
            for slot in &mut held.slots {
                match slot.state {
                    State::Acked if is_confirmed => slot.state = State::Done,
                    // Another member may get it: our copy would be one too many.
                    State::Waiting => slot.envelope = None,
                    _ => {}
                }
            }
        }
    }

    /// Others may get what this member had.
    fn lose(&mut self) {
        for (key, held) in &self.entries {
            self.lost.add(self.partition, *key, held, self.closed);
        }
        self.within.clear();
        self.desk.count_within(self.partition, 0);
    }

    /// What was handed out is nobody's any more, and what comes is new: the group was sought.
    fn forget(&mut self) {
        self.era = self.era.wrapping_add(1);
        self.desk.forget(self.partition);
        self.entries.clear();
        self.within.clear();
        self.desk.count_within(self.partition, 0);
        self.past.clear();
        self.due.clear();
        (self.untold, self.told, self.answer) = (Acks::default(), Acks::default(), None);
    }

    /// What the client still has in its hands takes room of the new subscription too. Returns how much.
    fn keep(&mut self) -> u32 {
        let out = self.entries.values_mut().flat_map(|held| &mut held.slots);
        let kept = out.filter(|slot| slot.state == State::Out).take(self.quota as usize);
        kept.map(|slot| slot.permit = self.epoch).count() as u32
    }

    /// Not while the broker has more than half of them: many at a time have it send many at a time.
    async fn give_back_permits(&mut self) -> Result<(), Fault> {
        if self.waits || self.freed == 0 || self.open > i64::from(self.quota / 2) {
            return Ok(());
        }
        let Some(consumer) = &self.consumer else { return Ok(()) };
        let freed = std::mem::take(&mut self.freed);
        self.open += i64::from(freed);
        consumer.permit(freed).await
    }

    /// Puts on the desk what came.
    fn deliver(&mut self, deliveries: Vec<Delivery>) {
        let mut ready = Vec::with_capacity(deliveries.len());
        // Whoever lost one of them did so before it came here.
        let none_lost = self.lost.is_empty();
        for delivery in deliveries {
            self.unpack(delivery, none_lost, &mut ready);
        }
        self.desk.put(ready);
        self.acknowledge();
    }

    fn unpack(&mut self, delivery: Delivery, none_lost: bool, ready: &mut Vec<Result<Handed, LaneError>>) {
        let Delivery { place: first, redelivered, unacked, entry } = delivery;
        let key = (first.ledger, first.entry);
        let entry = entry.open();
        let count = record::count(&entry) as usize;
        if self.closed && self.entries.get(&key).is_some_and(|held| held.came_back(&unacked)) {
            // Somebody else has sought the group, or the topic moved and its broker lost what it had confirmed last.
            self.forget();
            ready.retain(Result::is_err);
        }
        let held = self.entries.entry(key).or_default();
        held.slots.resize(count, Slot::default());
        let mut sent = 0_u32;
        for (index, slot) in held.slots.iter_mut().enumerate() {
            if !is_unacked(&unacked, index) {
                *slot = Slot { state: State::Acked, attempt: slot.attempt, ..Slot::default() };
                continue;
            }
            sent += 1;
            if slot.state == State::Done {
                // The broker was restarted and does not know any more.
                slot.state = State::Gone;
            }
        }
        let slots = &held.slots;
        let wanted = |index: u32| slots.get(index as usize).is_some_and(|slot| slot.state != State::Acked);
        let mut records = std::mem::take(&mut self.records);
        record::unpack(&self.topic, self.partition, first, entry, wanted, &mut records);

        let (partition, era, epoch) = (self.partition, self.era, self.epoch);
        // Of an entry that holds one message the broker delivers that one again.
        let keeps_copies = !self.gives_back || count > 1;
        let (mut kept, mut copies, mut next) = (0, 0, 0);
        held.unreadable = false;
        for Record { place, published, message } in records.drain(..) {
            let message = match message {
                Ok(message) => message,
                Err(why) => {
                    ready.push(Err(why.on_lane(&self.topic, partition, place)));
                    held.unreadable = true;
                    break;
                }
            };
            let index = place.index as usize;
            let Some((left_out, [slot, ..])) = held.slots.split_at_mut_checked(index) else { continue };
            // What is left out was acknowledged here already, or compaction has removed it.
            left_out[next..].iter_mut().for_each(|slot| slot.state = State::Acked);
            next = index + 1;
            kept += 1;
            let position = match self.physical.is_partition() {
                false => Position::Whole(place),
                true => Position::in_partition(partition, place, published),
            };
            let stored = Stored { partition, place, position };
            let envelope = Arc::new(Envelope::durable(self.topic.clone(), message, stored));
            // A copy of what the client has, and what has its room already, takes none.
            copies += u32::from(std::mem::replace(&mut slot.permit, epoch) == epoch);
            slot.envelope = keeps_copies.then(|| envelope.clone());
            if matches!(slot.state, State::Waiting | State::Out) {
                // The broker did not know of the delay, or that the client still has it. It keeps to it here.
                continue;
            }
            slot.state = State::Out;
            let before = if none_lost { 0 } else { self.lost.take(partition, key, index) };
            slot.attempt = slot.attempt.max(redelivered).max(before) + 1;
            let tag = Tag { partition, era, place };
            ready.push(Ok(Handed { envelope, attempt: slot.attempt, tag }));
        }
        self.records = records;
        let unreadable = held.unreadable;
        if !unreadable {
            held.slots[next..].iter_mut().for_each(|slot| slot.state = State::Acked);
        }
        self.open -= i64::from(sent);
        // What is not handed out needs no permit.
        self.freed += sent.saturating_sub(kept) + copies;
        if unreadable {
            // Nobody has had it, so it is not acknowledged; it comes again with the next subscription.
            self.retire(key);
        } else if kept == 0 {
            self.untold.add(key, held);
        }
        if count > 1
            && let Some(held) = self.entries.get(&key)
        {
            count_within(&mut self.within, key, held);
            self.desk.count_within(self.partition, self.within.values().sum());
        }
    }

    async fn settle(&mut self, settling: Vec<Settle>) -> Result<(), Fault> {
        let mut sought = false;
        for settle in settling {
            match settle {
                Settle::Ack { tags, done } => {
                    let mut waits = false;
                    tags.into_iter().for_each(|tag| waits |= self.ack(tag));
                    match waits {
                        true => self.untold.done.push(done),
                        // Whoever waited for it may have given up.
                        false => drop(done.send(())),
                    }
                }
                Settle::Nack { tags, delay } => {
                    let at = Instant::now() + delay;
                    tags.into_iter().for_each(|tag| self.nack(tag, at));
                }
                Settle::Seek { waits, sought: done } => {
                    // Whoever seeks may have given up, and ends the waiting by that too.
                    let _ = waits.send(());
                    self.meeting = done.await.ok();
                    self.forget();
                    sought = true;
                }
            }
        }
        self.acknowledge();
        if sought { Err(Fault::Lost("the group was sought".into())) } else { Ok(()) }
    }

    /// Marks a message as done. `false`: the broker has confirmed that already, or it is none of ours.
    fn ack(&mut self, tag: Tag) -> bool {
        if tag.era != self.era {
            return false;
        }
        let key = (tag.place.ledger, tag.place.entry);
        let Some(held) = self.entries.get_mut(&key) else { return false };
        let Some(slot) = held.slots.get_mut(tag.place.index as usize) else { return false };
        if !matches!(slot.state, State::Acked | State::Done) {
            self.freed += u32::from(slot.permit == self.epoch);
            *slot = Slot { state: State::Acked, attempt: slot.attempt, ..Slot::default() };
        } else if held.acking == 0 {
            return false;
        }
        self.untold.add(key, held);
        true
    }

    /// Tells the broker what was settled since it was told last. One acknowledgement at a time is under way, so that what
    /// is settled meanwhile goes together; nothing waits where none is.
    fn acknowledge(&mut self) {
        let Some(consumer) = &self.consumer else { return };
        if self.answer.is_some() || self.untold.keys.is_empty() {
            return;
        }
        let mut of_batches = false;
        let mut ids = Vec::with_capacity(self.untold.keys.len());
        for key in &self.untold.keys {
            let Some(held) = self.entries.get_mut(key) else { continue };
            held.untold = false;
            ids.push(held.acked(*key));
            if held.slots.len() > 1 {
                of_batches = true;
                count_within(&mut self.within, *key, held);
            }
        }
        if of_batches {
            self.desk.count_within(self.partition, self.within.values().sum());
        }
        self.answer = Some(Box::pin(consumer.ack(ids)));
        self.told = std::mem::take(&mut self.untold);
    }

    /// The broker has recorded what it was told.
    fn confirmed(&mut self) {
        let Acks { keys, done } = std::mem::take(&mut self.told);
        for key in keys {
            let Some(held) = self.entries.get_mut(&key) else { continue };
            held.acking -= 1;
            if held.passes() {
                self.past.push_back(key);
            }
        }
        self.forget_oldest();
        for done in done {
            // Whoever waited for it may have given up.
            let _ = done.send(());
        }
        self.acknowledge();
    }

    /// Moves an entry that nothing happens to any more to the past.
    fn retire(&mut self, key: Key) {
        if self.entries.get_mut(&key).is_some_and(Held::passes) {
            self.past.push_back(key);
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        while self.past.len() > PAST {
            let Some(oldest) = self.past.pop_front() else { break };
            if let Entry::Occupied(mut entry) = self.entries.entry(oldest) {
                match entry.get().is_idle() {
                    true => drop(entry.remove()),
                    false => entry.get_mut().past = false,
                }
            }
        }
    }

    fn nack(&mut self, tag: Tag, at: Instant) {
        if tag.era != self.era {
            return;
        }
        let (epoch, waiting, gives_back) = (self.epoch, self.due.len(), self.gives_back);
        let key = (tag.place.ledger, tag.place.entry);
        let index = tag.place.index as usize;
        let Some(held) = self.entries.get_mut(&key) else { return };
        let alone = held.slots.iter().enumerate().all(|(at, slot)| at == index || slot.is_settled());
        let Some(slot) = held.slots.get_mut(index).filter(|slot| slot.state == State::Out) else { return };
        slot.state = State::Waiting;
        let free = if gives_back && alone {
            // The broker will deliver it again; until then neither a copy nor room is kept.
            slot.envelope = None;
            waiting < WAITING_FREE
        } else {
            !gives_back && waiting < KEPT_FREE
        };
        if free && slot.permit == epoch {
            slot.permit = 0;
            self.freed += 1;
        }
        self.nacked += 1;
        self.due.insert((at, self.nacked), (key, index));
    }

    async fn hand_out_what_is_due(&mut self) -> Result<(), Fault> {
        let mut again = Vec::new();
        let mut ready = Vec::new();
        while let Some(first) = self.due.first_entry().filter(|first| first.key().0 <= Instant::now()) {
            let (key, index) = first.remove();
            let epoch = self.epoch;
            let Some(held) = self.entries.get_mut(&key) else { continue };
            let Some(slot) = held.slots.get_mut(index).filter(|slot| slot.state == State::Waiting) else {
                continue;
            };
            match slot.envelope.clone() {
                // The broker would deliver others too: those of its entry that the client has, or all there are.
                Some(envelope) => {
                    slot.state = State::Out;
                    slot.attempt += 1;
                    let place = Place { ledger: key.0, entry: key.1, index: index as u32 };
                    ready.push(Ok(Handed { envelope, attempt: slot.attempt, tag: self.tag(place) }));
                }
                None => {
                    slot.state = State::Gone;
                    self.freed += u32::from(slot.permit == epoch);
                    slot.permit = 0;
                    if self.gives_back {
                        let id = MessageIdData { ledger_id: key.0, entry_id: key.1, ..Default::default() };
                        again.push(id);
                    }
                    self.retire(key);
                }
            }
        }
        self.desk.put(ready);
        match &self.consumer {
            Some(consumer) if !again.is_empty() => consumer.redeliver(again).await,
            _ => Ok(()),
        }
    }

    fn taken(&self, fault: &Fault) -> LaneError {
        let (group, busy_for) = (&self.subscribe.subscription, self.busy_for);
        LaneError::GroupBusy(format!(
            "group `{group}` was lost with the connection, and for {busy_for:?} others have had it ({fault})"
        ))
    }

    fn tag(&self, place: Place) -> Tag {
        Tag { partition: self.partition, era: self.era, place }
    }

    fn slot(&mut self, tag: Tag) -> Option<&mut Slot> {
        let held = self.entries.get_mut(&(tag.place.ledger, tag.place.entry))?;
        held.slots.get_mut(tag.place.index as usize)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.lose();
    }
}

/// The broker counts whole entries; how much of them is done already is known here.
fn count_within(within: &mut BTreeMap<Key, u64>, key: Key, held: &Held) {
    match held.acked_within() {
        0 => drop(within.remove(&key)),
        acked => drop(within.insert(key, acked)),
    }
}

/// Whether a membership that once held cannot hold any more. A topic that is gone may come again.
fn ends(fault: &Fault) -> bool {
    fault.is_lasting() && !fault.is_not_found()
}
