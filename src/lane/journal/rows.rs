//! The tables of the log, and the small rows that are not messages.
//!
//! ```text
//! records   (topic id, seq)        → a message, see `record`
//! topics    topic                  → Extent: the topic's id, what is stored of it, and since when
//! times     (topic id, millis)     → the first seq stored in a new millisecond
//! groups    (topic id, group name) → Cursor: what the group has acknowledged
//! log       "head", "commits"      → format and epoch; the number of the newest commit
//! ```

use std::collections::BTreeMap;

use redb::TableDefinition;

use super::record::{Damaged, Fields, put_length, seal, unseal};

type Table<K> = TableDefinition<'static, K, &'static [u8]>;

pub const RECORDS: Table<(u32, u64)> = Table::new("records");
pub const TOPICS: Table<&str> = Table::new("topics");
pub const TIMES: Table<(u32, i64)> = Table::new("times");
pub const GROUPS: Table<(u32, &str)> = Table::new("groups");
pub const LOG: Table<&str> = Table::new("log");

/// What is stored of one topic. Sequence numbers begin at 1, so that 0 stands before the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Names the topic in the other tables. 0: the topic is not in storage.
    pub id: u32,
    /// Retention has removed everything before this.
    pub first: u64,
    /// The next message gets this.
    pub next: u64,
    /// What the records take, without what the tree around them takes.
    pub bytes: u64,
    /// The time of the first record that is there, on the index's clock.
    pub first_time: i64,
    /// The time of the newest record. It never goes back, whatever the clock does.
    pub last_time: i64,
    /// The time of the newest record that retention has removed.
    pub removed_time: i64,
}

impl Extent {
    /// A topic that is not in storage.
    pub const NONE: Extent = Extent {
        id: 0,
        first: 1,
        next: 1,
        bytes: 0,
        first_time: i64::MIN,
        last_time: i64::MIN,
        removed_time: i64::MIN,
    };

    pub fn is_empty(&self) -> bool {
        self.first == self.next
    }

    pub fn row(&self, topic: &str) -> Vec<u8> {
        let mut row = Vec::with_capacity(56);
        seal(&mut row, topic.as_bytes(), |body| {
            body.extend_from_slice(&self.id.to_le_bytes());
            for number in [self.first, self.next, self.bytes] {
                body.extend_from_slice(&number.to_le_bytes());
            }
            for time in [self.first_time, self.last_time, self.removed_time] {
                body.extend_from_slice(&time.to_le_bytes());
            }
        });
        row
    }

    pub fn read(topic: &str, row: &[u8]) -> Result<Self, Damaged> {
        let mut body = Fields(unseal(topic.as_bytes(), row)?);
        Ok(Self {
            id: body.u32()?,
            first: body.u64()?,
            next: body.u64()?,
            bytes: body.u64()?,
            first_time: body.i64()?,
            last_time: body.i64()?,
            removed_time: body.i64()?,
        })
    }
}

/// What a group has acknowledged: everything before `floor`, and what is in `done` above it. It is kept in stretches,
/// so that one message that stays behind costs a few bytes, however far the others get.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    floor: u64,
    /// From the first of a stretch to behind its last. Between any two something is missing, and below the first.
    done: BTreeMap<u64, u64>,
    /// How many those are.
    above: u64,
}

impl Cursor {
    pub fn new(floor: u64) -> Self {
        Self { floor, done: BTreeMap::new(), above: 0 }
    }

    pub fn floor(&self) -> u64 {
        self.floor
    }

    pub fn has(&self, seq: u64) -> bool {
        self.has_all(seq, seq + 1)
    }

    fn has_all(&self, from: u64, end: u64) -> bool {
        let from = from.max(self.floor);
        from >= end || self.done.range(..=from).next_back().is_some_and(|(_, done)| end <= *done)
    }

    /// How many are acknowledged above the floor.
    pub fn above(&self) -> u64 {
        self.above
    }

    /// Whether it has everything that the other has.
    pub fn covers(&self, other: &Cursor) -> bool {
        self.floor >= other.floor && other.done.iter().all(|(from, end)| self.has_all(*from, *end))
    }

    pub fn add(&mut self, seq: u64) {
        if self.has(seq) {
            return;
        }
        let end = self.done.remove(&(seq + 1)).unwrap_or(seq + 1);
        match self.done.range_mut(..seq).next_back().filter(|(_, done)| **done == seq) {
            Some((_, done)) => *done = end,
            None => drop(self.done.insert(seq, end)),
        }
        self.above += 1;
        self.close_up();
    }

    /// Everything before `first` is gone, acknowledged or not.
    pub fn rise_to(&mut self, first: u64) {
        if first <= self.floor {
            return;
        }
        self.floor = first;
        while let Some(stretch) = self.done.first_entry().filter(|stretch| *stretch.key() < first) {
            let (from, end) = stretch.remove_entry();
            self.above -= end.min(first) - from;
            if end > first {
                self.done.insert(first, end);
            }
        }
        self.close_up();
    }

    fn close_up(&mut self) {
        if let Some(end) = self.done.remove(&self.floor) {
            self.above -= end - self.floor;
            self.floor = end;
        }
    }

    /// The floor, then for each stretch how many are missing before it and how long it is.
    pub fn row(&self, topic_id: u32, group: &str) -> Vec<u8> {
        let mut row = Vec::new();
        seal(&mut row, &group_key(topic_id, group), |body| {
            body.extend_from_slice(&self.floor.to_le_bytes());
            let mut reached = self.floor;
            for (from, end) in &self.done {
                put_length(body, (from - reached) as usize);
                put_length(body, (end - from) as usize);
                reached = *end;
            }
        });
        row
    }

    pub fn read(topic_id: u32, group: &str, row: &[u8]) -> Result<Self, Damaged> {
        let mut body = Fields(unseal(&group_key(topic_id, group), row)?);
        let mut cursor = Self::new(body.u64()?);
        let mut reached = cursor.floor;
        while !body.0.is_empty() {
            let (missing, long) = (body.length()? as u64, body.length()? as u64);
            if missing == 0 || long == 0 {
                return Err(Damaged);
            }
            let from = reached.checked_add(missing).ok_or(Damaged)?;
            reached = from.checked_add(long).ok_or(Damaged)?;
            cursor.done.insert(from, reached);
            cursor.above += long;
        }
        Ok(cursor)
    }

    /// As format 1 of the log wrote it: the floor, then a bit for each message above it.
    pub fn read_bits(topic_id: u32, group: &str, row: &[u8]) -> Result<Self, Damaged> {
        let mut body = Fields(unseal(&group_key(topic_id, group), row)?);
        let floor = body.u64()?;
        let mut cursor = Self::new(floor);
        for (at, byte) in body.0.iter().enumerate() {
            for bit in (0..8).filter(|bit| byte & (1 << bit) != 0) {
                cursor.add(floor.checked_add(at as u64 * 8 + bit).ok_or(Damaged)?);
            }
        }
        Ok(cursor)
    }
}

/// What identifies a group's row to its checksum.
pub fn group_key(topic_id: u32, group: &str) -> Vec<u8> {
    [&topic_id.to_le_bytes()[..], group.as_bytes()].concat()
}

/// An entry of the time index.
pub fn time_row(topic_id: u32, millis: i64, seq: u64) -> Vec<u8> {
    let mut row = Vec::with_capacity(12);
    seal(&mut row, &time_key(topic_id, millis), |body| body.extend_from_slice(&seq.to_le_bytes()));
    row
}

pub fn read_time(topic_id: u32, millis: i64, row: &[u8]) -> Result<u64, Damaged> {
    Fields(unseal(&time_key(topic_id, millis), row)?).u64()
}

fn time_key(topic_id: u32, millis: i64) -> Vec<u8> {
    [&topic_id.to_le_bytes()[..], &millis.to_le_bytes()[..]].concat()
}

/// A row of the `log` table with numbers in it.
pub fn log_row(name: &str, numbers: &[u64]) -> Vec<u8> {
    let mut row = Vec::new();
    seal(&mut row, name.as_bytes(), |body| {
        numbers.iter().for_each(|number| body.extend_from_slice(&number.to_le_bytes()));
    });
    row
}

pub fn read_log<const N: usize>(name: &str, row: &[u8]) -> Result<[u64; N], Damaged> {
    let mut body = Fields(unseal(name.as_bytes(), row)?);
    let mut numbers = [0; N];
    for number in &mut numbers {
        *number = body.u64()?;
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_cursor_is_the_set_of_what_was_acknowledged(acked in prop::collection::vec(5u64..300, 0..200)) {
            let mut cursor = Cursor::new(5);
            acked.iter().for_each(|seq| cursor.add(*seq));
            for seq in 5..300 {
                prop_assert_eq!(cursor.has(seq), acked.contains(&seq));
            }
            let first_missing = (5..).find(|seq| !acked.contains(seq)).unwrap();
            prop_assert_eq!(cursor.floor(), first_missing);
            prop_assert_eq!(Cursor::read(7, "g", &cursor.row(7, "g")), Ok(cursor.clone()));
            prop_assert_eq!(Cursor::read(8, "g", &cursor.row(7, "g")), Err(Damaged));

            let mut raised = cursor.clone();
            raised.rise_to(100);
            for seq in 5..300 {
                prop_assert_eq!(raised.has(seq), seq < 100 || acked.contains(&seq));
            }
            for cursor in [&cursor, &raised] {
                let above = (cursor.floor()..300).filter(|seq| cursor.has(*seq)).count();
                prop_assert_eq!(cursor.above(), above as u64);
                prop_assert_eq!(Cursor::read(7, "g", &cursor.row(7, "g")), Ok(cursor.clone()));
            }
            prop_assert!(raised.covers(&cursor) && cursor.covers(&Cursor::new(5)));
            prop_assert_eq!(cursor.covers(&raised), cursor == raised);
        }

        #[test]
        fn reading_rows_of_garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = Extent::read("t", &garbage);
            let mut sealed = Vec::new();
            seal(&mut sealed, &group_key(1, "g"), |body| body.extend_from_slice(&garbage));
            let _ = Cursor::read(1, "g", &sealed);
            let _ = Cursor::read_bits(1, "g", &sealed);
            let _ = read_time(1, 1, &garbage);
            let _ = read_log::<2>("head", &garbage);
        }
    }

    #[test]
    fn one_message_that_stays_behind_costs_a_cursor_little() {
        let mut cursor = Cursor::new(1);
        (2..1_000_000).for_each(|seq| cursor.add(seq));
        assert!(cursor.row(1, "g").len() < 32);
        cursor.add(1);
        assert_eq!(cursor, Cursor::new(1_000_000));
    }

    #[test]
    fn an_extent_reads_back_as_it_was_written_and_only_under_its_name() {
        let extent = Extent { id: 3, first: 4, next: 9, bytes: 77, ..Extent::NONE };
        assert_eq!(Extent::read("a.b", &extent.row("a.b")), Ok(extent));
        assert_eq!(Extent::read("a.c", &extent.row("a.b")), Err(Damaged));
    }
}
