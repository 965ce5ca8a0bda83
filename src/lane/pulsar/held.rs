//! What a group member knows of one entry, message by message.
//!
//! An entry may be a batch, and Pulsar's `ack_set` says which of it are left: a bit for each message, the low ones
//! first, in words of 64; no word at all: all are.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pulsar::proto::MessageIdData;
use smallvec::SmallVec;

use crate::message::Envelope;

/// An entry's ledger and number.
pub type Key = (u64, u64);

/// One entry and its messages.
#[derive(Default)]
pub struct Held {
    pub slots: SmallVec<[Slot; 1]>,
    /// Acknowledgements that the broker has not confirmed.
    pub acking: u32,
    /// One of them is not under way yet.
    pub untold: bool,
    /// In the list of the past.
    pub past: bool,
    /// Nobody can have it, and it is not acknowledged.
    pub unreadable: bool,
}

#[derive(Clone, Default)]
pub struct Slot {
    pub state: State,
    /// How often it was handed out.
    pub attempt: u32,
    /// The subscription whose permit it holds; 0: none.
    pub permit: u64,
    /// Our copy, as long as it may be needed again.
    pub envelope: Option<Arc<Envelope>>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub enum State {
    /// Not here (any more): the broker has it.
    #[default]
    Gone,
    /// On the desk or with the client.
    Out,
    /// Nacked, until its time has come.
    Waiting,
    Acked,
    /// Acknowledged, and confirmed to an earlier subscription: where it comes again, the broker has gone back.
    Done,
}

/// Deliveries that are remembered for whoever gets their messages next.
const LOST: usize = 10_000;

/// How often the members of a group on this bridge were handed what they then lost, with their connection or by leaving:
/// whoever gets it next counts on.
#[derive(Default)]
pub struct Lost(Mutex<BTreeMap<(u32, Key, usize), u32>>);

impl Lost {
    /// Where the broker has closed the subscription, what was done may come again, too: as another attempt, and with as
    /// many left as if it had been the first.
    pub fn add(&self, partition: u32, key: Key, held: &Held, was_closed: bool) {
        let mut lost = self.lock();
        for (index, slot) in held.slots.iter().enumerate() {
            // What is acknowledged and not confirmed may come again in any case.
            let attempt = match slot.is_left() || held.acking > 0 {
                true => slot.attempt,
                false if was_closed => slot.attempt.min(1),
                false => 0,
            };
            if attempt > 0 {
                lost.insert((partition, key, index), attempt);
                if lost.len() > LOST {
                    lost.pop_first();
                }
            }
        }
    }

    /// 0 where nobody had it.
    pub fn take(&self, partition: u32, key: Key, index: usize) -> u32 {
        let mut lost = self.lock();
        if lost.is_empty() { 0 } else { lost.remove(&(partition, key, index)).unwrap_or_default() }
    }

    pub fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    pub fn clear(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<(u32, Key, usize), u32>> {
        // The table is whole between any two statements, so a panic elsewhere spoils nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// How many messages are acknowledged of an entry of which others are left.
    pub fn acked_within(&self) -> u64 {
        let left = self.slots.iter().filter(|slot| slot.is_left()).count();
        if left == 0 { 0 } else { (self.slots.len() - left) as u64 }
    }

    /// What is acknowledged of it.
    pub fn acked(&self, (ledger_id, entry_id): Key) -> MessageIdData {
        let whole = MessageIdData { ledger_id, entry_id, ..Default::default() };
        if !self.slots.iter().any(Slot::is_left) {
            return whole;
        }
        let ack_set = unacked_set(self.slots.iter().map(Slot::is_left));
        MessageIdData { batch_size: Some(self.slots.len() as i32), ack_set, ..whole }
    }

    /// Puts it in the past once nothing happens to it any more. `false`: it is there already, or not yet.
    pub fn passes(&mut self) -> bool {
        self.is_idle() && !std::mem::replace(&mut self.past, true)
    }

    /// Whether the broker delivers what it once confirmed as acknowledged; the set says which of it it delivers.
    pub fn came_back(&self, unacked: &[i64]) -> bool {
        let came = self.slots.iter().enumerate().filter(|(index, _)| is_unacked(unacked, *index));
        came.into_iter().any(|(_, slot)| slot.state == State::Done)
    }

    /// Whether the broker counts it as ours.
    pub fn is_here(&self) -> bool {
        self.unreadable || !self.is_idle()
    }

    pub fn is_idle(&self) -> bool {
        self.acking == 0 && self.slots.iter().all(Slot::is_settled)
    }
}

impl Slot {
    pub fn is_left(&self) -> bool {
        !matches!(self.state, State::Acked | State::Done)
    }

    /// Neither with the client nor about to be.
    pub fn is_settled(&self) -> bool {
        !matches!(self.state, State::Out | State::Waiting)
    }
}

/// Whether a message of a batch is left, by the broker's word; no word: all are.
pub fn is_unacked(set: &[i64], index: usize) -> bool {
    set.is_empty() || set.get(index / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
}

/// The same set, of ours: a bit for each message, the low ones first.
fn unacked_set(left: impl Iterator<Item = bool>) -> Vec<i64> {
    let mut set = Vec::new();
    for (index, left) in left.enumerate() {
        if index % 64 == 0 {
            set.push(0);
        }
        set[index / 64] |= i64::from(left) << (index % 64);
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ack_set_says_bit_by_bit_what_is_left() {
        let set = unacked_set((0..70).map(|index| index % 3 == 0));
        assert_eq!(set.len(), 2);
        for index in 0..70 {
            assert_eq!(is_unacked(&set, index), index % 3 == 0, "{index}");
        }
        assert_eq!(unacked_set((0..10).map(|index| index > 0)), [1022]);
        assert!(!is_unacked(&set, 200) && is_unacked(&[], 200));
    }
}
