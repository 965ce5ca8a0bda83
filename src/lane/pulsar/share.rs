//! One partition of a group as this member has it: what came, what became of it, and what the broker knows of that.
//!
//! ```text
//!            ┌──────────── after the delay ────────────┐
//!            ▼                                         │
//! broker ─▶ out ──nack──▶ waiting ──(alone in its entry)──▶ gone ─▶ broker delivers it to any member
//!            └───ack───▶ acked ──▶ kept until the broker has confirmed, and a while longer
//! ```
//! Pulsar acknowledges entries, and an entry may be a batch. So each acknowledgement says which of the batch are left
//! (`ack_set`), and what the broker delivers again is held against what was acknowledged here: it may have been sent
//! before the acknowledgement arrived.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use pulsar::proto::command_subscribe::{InitialPosition, SubType};
use pulsar::proto::{CommandSubscribe, MessageIdData};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use tracing::{info, warn};

use super::cluster::Cluster;
use super::consumer::Consumer;
use super::fault::Fault;
use super::feed::Backoff;
use super::group::Desk;
use super::held::{Held, Key, Slot, State, is_unacked, unacked_set};
use super::names::Physical;
use super::record::{self, Record};
use super::session::Delivery;
use crate::lane::contract::{Handed, Tag};
use crate::message::{Envelope, Message, Place, Position, Stored, Timestamp};
use crate::topic::Topic;

/// Settled entries that are remembered, so that a late copy of one is known.
const PAST: usize = 4096;
/// Waiting messages that take no room of the prefetch; what is nacked beyond does.
const WAITING_FREE: usize = 10_000;
/// Commands and events taken in one go.
const TURN: usize = 256;

pub enum Settle {
    Ack { tags: Vec<Tag>, done: oneshot::Sender<()> },
    Nack { tags: Vec<Tag>, delay: Duration },
}

/// An acknowledgement on its way.
struct Acking {
    keys: Vec<Key>,
    ids: Vec<MessageIdData>,
    done: Vec<oneshot::Sender<()>>,
}

impl Acking {
    fn confirm(self) {
        for done in self.done {
            // Whoever waited for it may have given up.
            let _ = done.send(());
        }
    }
}

pub struct Share {
    cluster: Arc<Cluster>,
    topic: Topic,
    partition: u32,
    physical: Physical,
    subscribe: CommandSubscribe,
    quota: u32,
    desk: Arc<Desk>,
    inbox: mpsc::Receiver<Settle>,
    consumer: Option<Consumer>,
    /// Counts subscriptions, from 1.
    epoch: u64,
    /// Permits to give back.
    freed: u32,
    entries: BTreeMap<Key, Held>,
    past: VecDeque<Key>,
    /// When which message has waited long enough; the number tells equal times apart.
    due: BTreeMap<(Instant, u64), (Key, usize)>,
    nacked: u64,
    /// Acknowledgements that the broker has not confirmed, by number.
    unconfirmed: BTreeMap<u64, Acking>,
    acked: u64,
    /// The answers to them on this subscription.
    answers: FuturesUnordered<BoxFuture<'static, (u64, Result<(), Fault>)>>,
}

impl Share {
    pub async fn subscribe(
        cluster: Arc<Cluster>,
        (topic, partition, physical): (Topic, u32, Physical),
        group: Arc<str>,
        initial: InitialPosition,
        quota: u32,
        desk: Arc<Desk>,
        inbox: mpsc::Receiver<Settle>,
    ) -> Result<Self, Fault> {
        let subscribe = CommandSubscribe {
            topic: physical.as_str().into(),
            subscription: group.to_string(),
            sub_type: SubType::Shared as i32,
            initial_position: Some(initial as i32),
            ..Default::default()
        };
        let mut share = Self {
            cluster,
            topic,
            partition,
            physical,
            subscribe,
            quota,
            desk,
            inbox,
            consumer: None,
            epoch: 0,
            freed: 0,
            entries: BTreeMap::new(),
            past: VecDeque::new(),
            due: BTreeMap::new(),
            nacked: 0,
            unconfirmed: BTreeMap::new(),
            acked: 0,
            answers: FuturesUnordered::new(),
        };
        share.connect().await?;
        Ok(share)
    }

    /// Ends with the member, or with an error that trying again would not cure.
    pub async fn run(mut self) {
        let mut backoff = Backoff::default();
        loop {
            if self.consumer.is_none() {
                match self.connect().await {
                    Ok(()) => info!(topic = %self.physical, "The group goes on."),
                    Err(fault) if fault.is_lasting() => return self.desk.fail(fault.on_lane()),
                    Err(fault) => {
                        if backoff.is_first() {
                            warn!(topic = %self.physical, %fault, "A group cannot go on; trying until it can.");
                        }
                        backoff.wait().await;
                        continue;
                    }
                }
            }
            match self.turn().await {
                Ok(true) => backoff.reset(),
                Ok(false) => return,
                Err(_) => self.disconnect(),
            }
        }
    }

    /// One thing that happens. `false`: the member has gone.
    async fn turn(&mut self) -> Result<bool, Fault> {
        let lost = || Fault::Lost("the subscription ended".into());
        let consumer = self.consumer.as_mut().ok_or_else(lost)?;
        let next_due = self.due.first_key_value().map(|((at, _), _)| *at);
        let mut settling = Vec::new();
        tokio::select! {
            first = consumer.next() => {
                let mut deliveries = vec![first.ok_or_else(lost)?];
                while deliveries.len() < TURN {
                    let Some(next) = consumer.try_next() else { break };
                    deliveries.push(next);
                }
                deliveries.into_iter().for_each(|delivery| self.deliver(delivery));
            }
            count = self.inbox.recv_many(&mut settling, TURN) => {
                if count == 0 {
                    return Ok(false);
                }
                self.settle(settling);
            }
            Some((number, answer)) = self.answers.next() => {
                // Acknowledging twice is no harm, so where this one fails a new subscription does it again.
                answer?;
                self.confirmed(number);
            }
            () = tokio::time::sleep_until(next_due.unwrap_or_else(Instant::now)), if next_due.is_some() => {
                self.hand_out_what_is_due().await?;
            }
        }
        self.give_back_permits().await?;
        Ok(true)
    }

    async fn connect(&mut self) -> Result<(), Fault> {
        let session = self.cluster.owner(&self.physical).await?;
        let consumer = Consumer::subscribe(session, self.subscribe.clone()).await?;
        self.epoch += 1;
        self.freed = self.quota;
        for (number, acking) in &self.unconfirmed {
            self.answers.push(answer(&consumer, *number, acking));
        }
        self.consumer = Some(consumer);
        self.give_back_permits().await
    }

    /// The broker gives away again what this subscription had: what the client has not got is no longer here.
    fn disconnect(&mut self) {
        self.consumer = None;
        self.answers = FuturesUnordered::new();
        for tag in self.desk.withdraw(self.partition) {
            if let Some(slot) = self.slot(tag) {
                slot.attempt = slot.attempt.saturating_sub(1);
                slot.state = State::Gone;
            }
        }
    }

    async fn give_back_permits(&mut self) -> Result<(), Fault> {
        match (&self.consumer, std::mem::take(&mut self.freed)) {
            (Some(consumer), freed @ 1..) => consumer.permit(freed).await,
            _ => Ok(()),
        }
    }

    fn deliver(&mut self, delivery: Delivery) {
        let Delivery { id, redelivered, unacked, entry } = delivery;
        let key = (id.ledger_id, id.entry_id);
        let count = record::count(&entry) as usize;
        let held =
            self.entries.entry(key).or_insert_with(|| Held { slots: Vec::new(), acking: 0, past: false });
        held.slots.resize(count, Slot::default());
        let sent = (0..count).filter(|index| is_unacked(&unacked, *index)).count() as u32;
        for (index, slot) in held.slots.iter_mut().enumerate() {
            if !is_unacked(&unacked, index) {
                *slot = Slot { state: State::Acked, ..Slot::default() };
            }
        }
        let states: Vec<_> = held.slots.iter().map(|slot| slot.state).collect();
        let wanted = |index: u32| states.get(index as usize).is_some_and(|state| *state != State::Acked);
        let records = record::unpack(&self.topic, self.partition, &id, entry, wanted);

        let mut ready = Vec::new();
        let mut taken = vec![false; count];
        let mut unreadable = false;
        for Record { place, published, message } in records {
            let message = match message {
                Ok(message) => message,
                Err(why) => {
                    ready.push(Err(why.on_lane(&self.topic, self.partition, place)));
                    unreadable = true;
                    break;
                }
            };
            let envelope = self.envelope(place, published, message);
            let index = place.index as usize;
            let Some(slot) = self.entries.get_mut(&key).and_then(|held| held.slots.get_mut(index)) else {
                continue;
            };
            taken[index] = true;
            slot.permit = self.epoch;
            slot.envelope = Some(envelope.clone());
            if slot.state == State::Waiting {
                // The broker did not know of the delay. It keeps to it here.
                continue;
            }
            slot.state = State::Out;
            slot.attempt = (slot.attempt + 1).max(redelivered + 1);
            let tag = Tag { partition: self.partition, place };
            ready.push(Ok(Handed { envelope, attempt: slot.attempt, tag }));
        }
        // What is not handed out needs no permit.
        let kept = taken.iter().filter(|taken| **taken).count() as u32;
        self.freed += sent.saturating_sub(kept);
        if unreadable {
            // Nobody has had it, so it is not acknowledged; it comes again with the next subscription.
            self.retire(key);
        } else {
            // What is left out was acknowledged here already, or compaction has removed it.
            if let Some(held) = self.entries.get_mut(&key) {
                let left_out = held.slots.iter_mut().zip(&taken).filter(|(_, taken)| !**taken);
                left_out.for_each(|(slot, _)| slot.state = State::Acked);
            }
            if kept == 0 {
                self.acknowledge(vec![key], Vec::new());
            }
        }
        self.desk.put(ready);
    }

    fn envelope(&self, place: Place, published: Timestamp, message: Message) -> Arc<Envelope> {
        let position = match self.physical.is_partition() {
            false => Position::Whole(place),
            true => Position::in_partition(self.partition, place, published),
        };
        let stored = Stored { partition: self.partition, place, position };
        Arc::new(Envelope::durable(self.topic.clone(), message, stored))
    }

    fn settle(&mut self, settling: Vec<Settle>) {
        let mut keys = Vec::new();
        let mut waiting = Vec::new();
        for settle in settling {
            match settle {
                Settle::Ack { tags, done } => {
                    keys.extend(tags.into_iter().filter_map(|tag| self.ack(tag)));
                    waiting.push(done);
                }
                Settle::Nack { tags, delay } => {
                    let at = Instant::now() + delay;
                    tags.into_iter().for_each(|tag| self.nack(tag, at));
                }
            }
        }
        keys.sort_unstable();
        keys.dedup();
        self.acknowledge(keys, waiting);
    }

    /// Marks a message as done. The entry is to be acknowledged, unless the broker has confirmed all of this already.
    fn ack(&mut self, tag: Tag) -> Option<Key> {
        let key = (tag.place.ledger, tag.place.entry);
        let epoch = self.epoch;
        let held = self.entries.get_mut(&key)?;
        let slot = held.slots.get_mut(tag.place.index as usize)?;
        if slot.state == State::Acked {
            return (held.acking > 0).then_some(key);
        }
        self.freed += u32::from(slot.permit == epoch);
        *slot = Slot { state: State::Acked, ..Slot::default() };
        Some(key)
    }

    fn acknowledge(&mut self, keys: Vec<Key>, done: Vec<oneshot::Sender<()>>) {
        let mut ids = Vec::new();
        for (ledger_id, entry_id) in &keys {
            if let Some(held) = self.entries.get_mut(&(*ledger_id, *entry_id)) {
                held.acking += 1;
                let left = unacked_set(held.slots.iter().map(|slot| slot.state != State::Acked));
                let whole = left.iter().all(|word| *word == 0);
                ids.push(MessageIdData {
                    ledger_id: *ledger_id,
                    entry_id: *entry_id,
                    batch_size: (!whole).then_some(held.slots.len() as i32),
                    ack_set: if whole { Vec::new() } else { left },
                    ..Default::default()
                });
            }
        }
        let acking = Acking { keys, ids, done };
        if acking.ids.is_empty() {
            return acking.confirm();
        }
        self.acked += 1;
        if let Some(consumer) = &self.consumer {
            self.answers.push(answer(consumer, self.acked, &acking));
        }
        self.unconfirmed.insert(self.acked, acking);
    }

    fn confirmed(&mut self, number: u64) {
        let Some(acking) = self.unconfirmed.remove(&number) else { return };
        for key in &acking.keys {
            if let Some(held) = self.entries.get_mut(key) {
                held.acking -= 1;
            }
            self.retire(*key);
        }
        acking.confirm();
    }

    /// Moves an entry that nothing happens to any more to the past, whose oldest is forgotten.
    fn retire(&mut self, key: Key) {
        let Some(held) = self.entries.get_mut(&key).filter(|held| held.is_idle() && !held.past) else {
            return;
        };
        held.past = true;
        self.past.push_back(key);
        while self.past.len() > PAST {
            let Some(oldest) = self.past.pop_front() else { break };
            match self.entries.get_mut(&oldest) {
                Some(held) if held.is_idle() => drop(self.entries.remove(&oldest)),
                Some(held) => held.past = false,
                None => {}
            }
        }
    }

    fn nack(&mut self, tag: Tag, at: Instant) {
        let (epoch, free) = (self.epoch, self.due.len() < WAITING_FREE);
        let key = (tag.place.ledger, tag.place.entry);
        let index = tag.place.index as usize;
        let Some(held) = self.entries.get_mut(&key) else { return };
        let alone = held.slots.iter().enumerate().all(|(at, slot)| at == index || slot.is_settled());
        let Some(slot) = held.slots.get_mut(index).filter(|slot| slot.state == State::Out) else { return };
        slot.state = State::Waiting;
        if alone {
            // The broker will deliver it again; until then neither a copy nor room is kept.
            slot.envelope = None;
            if free && slot.permit == epoch {
                slot.permit = 0;
                self.freed += 1;
            }
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
                // Others of its entry were in the client's hands when it was nacked: the broker would deliver them too.
                Some(envelope) => {
                    slot.state = State::Out;
                    slot.attempt += 1;
                    let place = Place { ledger: key.0, entry: key.1, index: index as u32 };
                    let tag = Tag { partition: self.partition, place };
                    ready.push(Ok(Handed { envelope, attempt: slot.attempt, tag }));
                }
                None => {
                    slot.state = State::Gone;
                    self.freed += u32::from(slot.permit == epoch);
                    slot.permit = 0;
                    again.push(MessageIdData { ledger_id: key.0, entry_id: key.1, ..Default::default() });
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

    fn slot(&mut self, tag: Tag) -> Option<&mut Slot> {
        let held = self.entries.get_mut(&(tag.place.ledger, tag.place.entry))?;
        held.slots.get_mut(tag.place.index as usize)
    }
}

fn answer(consumer: &Consumer, number: u64, acking: &Acking) -> BoxFuture<'static, (u64, Result<(), Fault>)> {
    let recorded = consumer.ack(acking.ids.clone());
    Box::pin(async move { (number, recorded.await) })
}
