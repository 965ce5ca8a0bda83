//! What is remembered of each id, and for how long.
//!
//! ```text
//! begin ──▶ under way ──┬─▶ stored ────┐
//!               ▲       ├─▶ unknown ───┤── its window is over, or there are too many and it is the oldest ──▶ gone
//!               │       └─▶ gone       │
//!               └──────────────────────┘ (unknown, and storage does not have it)
//! ```
//! No id has a timer: those of one window stand in one queue, and whoever comes next clears away what is over.

use std::collections::hash_map::{Entry as Slot, HashMap};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use futures_util::future::{BoxFuture, Shared};
use tokio::time::Instant;

use crate::lane::contract::LaneError;
use crate::message::{MessageId, Place, Position, Stored, Timestamp};

/// How many ids whose outcome is known (or known to be unknown) are remembered over all topics. Each takes some 200 bytes.
pub const IDS_MAX: usize = 1_000_000;

/// A topic's number and an id.
pub type Key = (u32, MessageId);

/// What became of a publish; no position where the message is not in storage yet, but safe.
pub type Kept = Result<Option<Position>, LaneError>;

/// Several wait for one outcome.
pub type UnderWay = Shared<BoxFuture<'static, Kept>>;

pub struct Memory {
    entries: HashMap<Key, Entry>,
    /// By the length of their window, oldest first: so they end in the order in which they stand.
    ages: BTreeMap<Duration, VecDeque<Aging>>,
    aging: usize,
    max: usize,
    /// Counts what became unknown.
    unknown: u64,
}

enum Entry {
    UnderWay(UnderWay),
    Stored {
        until: Instant,
        at: At,
    },
    /// It may or may not be stored: the how manieth of which that is so.
    Unknown {
        until: Instant,
        number: u64,
    },
}

/// An id that is forgotten at `until`, unless something else has become of it by then.
struct Aging {
    until: Instant,
    key: Key,
}

/// A position as a receipt has it, small: a message stands in one partition.
#[derive(Clone, Copy)]
enum At {
    Unsaid,
    Whole(Place),
    Partition(u32, Place, Timestamp),
}

/// What is known of an id.
pub enum Known {
    Nothing,
    UnderWay(UnderWay),
    Stored(Option<Position>),
    Unknown(u64),
}

impl Memory {
    pub fn new(max: usize) -> Self {
        Self { entries: HashMap::new(), ages: BTreeMap::new(), aging: 0, max, unknown: 0 }
    }

    pub fn find(&self, key: &Key, now: Instant) -> Known {
        match self.entries.get(key) {
            Some(Entry::UnderWay(outcome)) => Known::UnderWay(outcome.clone()),
            Some(Entry::Stored { until, at }) if *until > now => Known::Stored(at.position()),
            Some(Entry::Unknown { until, number }) if *until > now => Known::Unknown(*number),
            Some(_) | None => Known::Nothing,
        }
    }

    /// Whoever says that a publish is under way also says how it ended, whatever happens.
    pub fn under_way(&mut self, key: Key, outcome: UnderWay) {
        self.entries.insert(key, Entry::UnderWay(outcome));
    }

    /// Stored now. Returns how many others had to be forgotten before their time.
    pub fn stored(&mut self, key: Key, position: Option<&Position>, window: Duration, now: Instant) -> usize {
        let until = now + window;
        self.entries.insert(key, Entry::Stored { until, at: position.into() });
        self.age(Aging { until, key }, window, now)
    }

    /// Its outcome is unknown from now on. Returns the how manieth of which that is so as well.
    pub fn unknown(&mut self, key: Key, window: Duration, now: Instant) -> (u64, usize) {
        self.unknown += 1;
        let (until, number) = (now + window, self.unknown);
        self.entries.insert(key, Entry::Unknown { until, number });
        (number, self.age(Aging { until, key }, window, now))
    }

    /// Nothing was stored.
    pub fn failed(&mut self, key: &Key) {
        self.entries.remove(key);
    }

    /// It stands in storage, accepted at that time. One that is under way says itself what became of it.
    pub fn seen(
        &mut self,
        key: Key,
        (stored, ts): (&Stored, Timestamp),
        window: Duration,
        now: Instant,
    ) -> usize {
        let Some(left) = window.checked_sub(ts.age()).filter(|left| !left.is_zero()) else { return 0 };
        let at = match &stored.position {
            Position::Whole(place) => At::Whole(*place),
            Position::Partitioned { .. } => At::Partition(stored.partition, stored.place, ts),
        };
        let until = now + left;
        match self.entries.entry(key) {
            Slot::Occupied(mut known) => match known.get() {
                Entry::UnderWay(_) => return 0,
                Entry::Stored { until: ours, .. } | Entry::Unknown { until: ours, .. } if *ours > now => {
                    // What this process has done is remembered from the moment it was done.
                    let until = *ours;
                    known.insert(Entry::Stored { until, at });
                    return 0;
                }
                Entry::Stored { .. } | Entry::Unknown { .. } => _ = known.insert(Entry::Stored { until, at }),
            },
            Slot::Vacant(free) => _ = free.insert(Entry::Stored { until, at }),
        }
        self.age(Aging { until, key }, window, now)
    }

    /// How many are remembered that are not under way, give or take those that have just become something else.
    pub fn len(&self) -> usize {
        self.aging
    }

    fn age(&mut self, aging: Aging, window: Duration, now: Instant) -> usize {
        self.ages.entry(window).or_default().push_back(aging);
        self.aging += 1;
        // Two at a time is faster than they come, so what is over goes without ever taking long.
        self.clear(2, now);
        let mut forgotten = 0;
        while self.aging > self.max {
            forgotten += usize::from(self.forget_oldest(now));
        }
        forgotten
    }

    /// Clears away what is over, in every queue at most so many.
    fn clear(&mut self, most: usize, now: Instant) {
        for queue in self.ages.values_mut() {
            for _ in 0..most {
                let Some(aged) = queue.pop_front_if(|aging| aging.until <= now) else { break };
                self.aging -= 1;
                forget(&mut self.entries, &aged);
            }
        }
        self.ages.retain(|_, queue| !queue.is_empty());
    }

    /// Whether it was still worth remembering.
    fn forget_oldest(&mut self, now: Instant) -> bool {
        let began = |(window, queue): &(&Duration, &mut VecDeque<Aging>)| {
            queue.front().and_then(|aging| aging.until.checked_sub(**window))
        };
        let Some((_, queue)) = self.ages.iter_mut().min_by_key(began) else { return false };
        let Some(oldest) = queue.pop_front() else { return false };
        self.aging -= 1;
        forget(&mut self.entries, &oldest) && oldest.until > now
    }
}

/// Forgets an id, unless something has become of it since. Whether it did.
fn forget(entries: &mut HashMap<Key, Entry>, aged: &Aging) -> bool {
    let Slot::Occupied(known) = entries.entry(aged.key) else { return false };
    let is_it = match known.get() {
        Entry::Stored { until, .. } | Entry::Unknown { until, .. } => *until == aged.until,
        Entry::UnderWay(_) => false,
    };
    if is_it {
        known.remove();
    }
    is_it
}

impl From<Option<&Position>> for At {
    fn from(position: Option<&Position>) -> Self {
        match position {
            None => At::Unsaid,
            Some(Position::Whole(place)) => At::Whole(*place),
            Some(Position::Partitioned { reached, others_from }) => {
                let stands = reached.iter().next();
                stands.map_or(At::Unsaid, |(number, place)| At::Partition(*number, *place, *others_from))
            }
        }
    }
}

impl At {
    fn position(self) -> Option<Position> {
        match self {
            At::Unsaid => None,
            At::Whole(place) => Some(Position::Whole(place)),
            At::Partition(number, place, from) => Some(Position::in_partition(number, place, from)),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use proptest::prelude::*;

    use super::*;

    const WINDOWS: [Duration; 3] =
        [Duration::from_secs(5), Duration::from_secs(20), Duration::from_secs(100)];
    const MAX: usize = 12;

    #[derive(Debug, Clone, Copy)]
    enum Did {
        UnderWay,
        Stored,
        Unknown,
        Failed,
        Seen { seconds_ago: u64 },
    }

    fn did() -> impl Strategy<Value = Did> {
        prop_oneof![
            1 => Just(Did::UnderWay),
            4 => Just(Did::Stored),
            2 => Just(Did::Unknown),
            1 => Just(Did::Failed),
            2 => (0..30_u64).prop_map(|seconds_ago| Did::Seen { seconds_ago }),
        ]
    }

    /// A topic (each has a window of its own), an id, what it did, and the seconds after that.
    fn history() -> impl Strategy<Value = Vec<(u32, u8, Did, u64)>> {
        prop::collection::vec((0..3_u32, 0..12_u8, did(), 0..4_u64), 1..150)
    }

    /// What is known for sure of an id, and until when.
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Model {
        UnderWay,
        Stored(u64, Instant),
        Unknown(Instant),
    }

    fn key(topic: u32, id: u8) -> Key {
        (topic, MessageId::from_bytes([id; 16]))
    }

    fn place(entry: u64) -> Place {
        Place { ledger: 1, entry, index: 0 }
    }

    fn nothing() -> UnderWay {
        futures_util::future::pending().boxed().shared()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// What is not crowded out is known for its window and not a moment longer; what is crowded out is the oldest, and
        /// there are never more than the bound.
        #[test]
        fn an_id_is_known_for_its_window_and_there_are_never_too_many(history in history(), max in prop_oneof![Just(MAX), Just(usize::MAX)]) {
            let start = Instant::now();
            let mut now = start;
            let (mut memory, mut model) = (Memory::new(max), HashMap::<Key, Model>::new());
            let mut forgotten = 0;
            for (step, (topic, id, did, then)) in history.into_iter().enumerate() {
                let (key, window, entry) = (key(topic, id), WINDOWS[topic as usize], step as u64);
                let is_under_way = matches!(model.get(&key), Some(Model::UnderWay));
                match did {
                    Did::UnderWay => {
                        memory.under_way(key, nothing());
                        model.insert(key, Model::UnderWay);
                    }
                    Did::Stored => {
                        forgotten += memory.stored(key, Some(&Position::Whole(place(entry))), window, now);
                        model.insert(key, Model::Stored(entry, now + window));
                    }
                    Did::Unknown => {
                        forgotten += memory.unknown(key, window, now).1;
                        model.insert(key, Model::Unknown(now + window));
                    }
                    Did::Failed => {
                        memory.failed(&key);
                        model.remove(&key);
                    }
                    Did::Seen { .. } if is_under_way => {}
                    Did::Seen { seconds_ago } => {
                        // The clock of the wall stands still here; only ages count.
                        let ts = Timestamp::from_millis(Timestamp::now().as_millis() - 1000 * seconds_ago as i64);
                        let stored = Stored { partition: 0, place: place(entry), position: Position::Whole(place(entry)) };
                        let ours = match (memory.find(&key, now), model.get(&key)) {
                            // It was crowded out: all that is known now is what was seen.
                            (Known::Nothing, _) | (_, None) => None,
                            (_, Some(Model::Stored(_, until) | Model::Unknown(until))) => Some(*until),
                            (_, Some(Model::UnderWay)) => None,
                        };
                        forgotten += memory.seen(key, (&stored, ts), window, now);
                        let left = window.checked_sub(Duration::from_secs(seconds_ago)).filter(|left| !left.is_zero());
                        if let (Some(until), Some(_)) | (None, Some(until)) = (ours, left.map(|left| now + left)) {
                            model.insert(key, Model::Stored(entry, until));
                        }
                    }
                }
                prop_assert!(memory.len() <= max);
                prop_assert!(forgotten == 0 || max == MAX);
                now += Duration::from_secs(then);
                let mut missing = 0;
                for (key, model) in &model {
                    match (memory.find(key, now), *model) {
                        (Known::UnderWay(_), Model::UnderWay) => {}
                        (Known::Stored(Some(Position::Whole(at))), Model::Stored(entry, until)) => {
                            prop_assert_eq!(at, place(entry));
                            prop_assert!(until + Duration::from_secs(1) > now);
                        }
                        (Known::Unknown(_), Model::Unknown(until)) => prop_assert!(until > now),
                        (Known::Nothing, Model::Stored(_, until) | Model::Unknown(until)) => {
                            missing += usize::from(until > now + Duration::from_secs(1));
                        }
                        (_, model) => prop_assert!(false, "{model:?}"),
                    }
                }
                prop_assert!(missing <= forgotten, "{missing} are missing, {forgotten} were forgotten");
            }
        }
    }

    #[test]
    fn the_oldest_goes_first_whatever_its_window() {
        let (mut memory, now) = (Memory::new(2), Instant::now());
        let second = |n| now + Duration::from_secs(n);
        assert_eq!(memory.stored(key(0, 1), None, Duration::from_secs(1000), now), 0);
        assert_eq!(memory.stored(key(0, 2), None, Duration::from_secs(10), second(1)), 0);
        assert_eq!(memory.stored(key(0, 3), None, Duration::from_secs(1000), second(2)), 1);
        assert!(matches!(memory.find(&key(0, 1), second(2)), Known::Nothing));
        // What is over is no loss.
        assert_eq!(memory.stored(key(0, 4), None, Duration::from_secs(1000), second(60)), 0);
        assert!(matches!(memory.find(&key(0, 3), second(60)), Known::Stored(None)));
    }

    #[test]
    fn a_million_ids_take_the_memory_that_the_comment_says() {
        let entry = size_of::<(Key, Entry)>() + 1;
        // A table that is seven eighths full at most has room for twice as many at worst, and so has the queue.
        let worst = (1 << 21) * entry + (1 << 20) * size_of::<Aging>();
        assert!(worst / IDS_MAX <= 250, "{worst} bytes");
    }
}
