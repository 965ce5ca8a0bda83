//! Removing what is older, or more, than a topic's route keeps: the oldest first, a bounded number at a time, so that
//! appends never wait long, and in commits of its own, so that a damaged page stops retention and not appending. A
//! topic may hold for a second or so what is appended to it in that time.

use std::sync::Arc;
use std::time::{Duration, Instant};

use redb::ReadableTable;
use tracing::error;

use super::rows::{Extent, read_time, time_row};
use super::store::{Failure, FailureKind};
use super::topics::lock;
use super::writer::{Staged, Tables, Writer};
use crate::message::{Lane, Timestamp};
use crate::policy::table::Retention;

/// What one commit removes at most. It is more than one commit appends, so that removing keeps up.
pub const REMOVED_MAX: usize = 2000;

/// How long retention rests once it has met damage.
const REST: Duration = Duration::from_secs(600);

/// Tells how old messages are. It follows the wall clock, but runs at most twice as fast as time: a clock that steps
/// forward by an hour costs nothing at once, and nothing at all where somebody sets it right before an hour's worth
/// of messages has gone early. A clock that steps back only keeps messages longer.
pub struct RetentionClock {
    now: i64,
    read_at: Instant,
}

impl RetentionClock {
    pub fn new(wall: Timestamp, at: Instant) -> Self {
        Self { now: wall.as_millis(), read_at: at }
    }

    pub fn advance(&mut self, wall: Timestamp, at: Instant) {
        let elapsed = at.saturating_duration_since(self.read_at).as_millis() as i64;
        self.now = wall.as_millis().min(self.now.saturating_add(elapsed.saturating_mul(2)));
        self.read_at = at;
    }

    /// Messages older than this may go.
    fn cutoff(&self, retention: &Retention) -> Option<i64> {
        let age = i64::try_from(retention.age?.as_millis()).unwrap_or(i64::MAX);
        Some(self.now.saturating_sub(age))
    }
}

impl Writer {
    /// What topics keep is their current route's to say, also where nobody publishes to them any more.
    pub(super) fn learn_retention(&mut self) {
        if !self.policy_changes.has_changed().unwrap_or(false) {
            return;
        }
        self.policy_changes.mark_unchanged();
        let table = self.log.policy.table();
        for log in self.log.topics.stored() {
            if let Some(route) = table.route_for(&log.topic).filter(|route| route.lane.takes(Lane::Durable)) {
                *lock(&log.retention) = route.retention;
            }
        }
    }

    pub(super) fn retain(&mut self) {
        match self.remove_old() {
            // There is more: after what waits in line.
            Ok(true) => self.next_tick = Instant::now(),
            Ok(false) => {}
            Err(failure) => {
                if failure.kind == FailureKind::Damage {
                    error!(what = failure.what, rest = ?REST, "Retention met a damaged page; it rests.");
                    self.retain_again = Instant::now() + REST;
                }
                self.fail(Vec::new(), 0, failure, self.commits);
            }
        }
    }

    /// Removes what is too old or too much, up to a bound, and says whether it was reached.
    pub(super) fn remove_old(&mut self) -> Result<bool, Failure> {
        let mut over = self.log.topics.stored();
        over.retain(|log| exceeds(&log.extent(), &lock(&log.retention), &self.clock));
        if over.is_empty() || Instant::now() < self.retain_again {
            return Ok(false);
        }
        let mut staged = Staged::default();
        let mut budget = REMOVED_MAX;
        self.log.store.write(|transaction| {
            let mut tables = Tables::open(transaction)?;
            for log in over {
                let (mut extent, retention) = (log.extent(), *lock(&log.retention));
                budget -= trim(&mut tables, &mut extent, &retention, &self.clock, budget)?;
                staged.extents.insert(Arc::as_ptr(&log), (log, extent));
                if budget == 0 {
                    break;
                }
            }
            staged.write(&mut tables)
        })?;
        self.settle(Vec::new(), staged);
        Ok(budget == 0)
    }
}

/// Whether the topic holds more than its route keeps. The newest message is not removed for its size alone.
fn exceeds(extent: &Extent, retention: &Retention, clock: &RetentionClock) -> bool {
    let too_much = retention.size.is_some_and(|size| extent.bytes > size) && extent.next - extent.first > 1;
    let too_old = clock.cutoff(retention).is_some_and(|cutoff| extent.first_time < cutoff);
    !extent.is_empty() && (too_much || too_old)
}

/// Removes the oldest messages of a topic, at most `budget` of them, and says how many went.
fn trim(
    tables: &mut Tables<'_>,
    extent: &mut Extent,
    retention: &Retention,
    clock: &RetentionClock,
    budget: usize,
) -> Result<usize, Failure> {
    let old_until = match clock.cutoff(retention) {
        None => extent.first,
        Some(cutoff) => {
            let mut old_until = extent.next;
            for entry in tables.times.range((extent.id, cutoff)..=(extent.id, i64::MAX))? {
                let (key, row) = entry?;
                // Behind a damaged entry the next one tells; a little more goes.
                if let Ok(seq) = read_time(extent.id, key.value().1, row.value()) {
                    old_until = seq;
                    break;
                }
            }
            old_until
        }
    };
    let size = retention.size.unwrap_or(u64::MAX);
    remove_oldest(tables, extent, budget, |left| {
        left.first < old_until || (left.bytes > size && left.next - left.first > 1)
    })
}

/// Removes the oldest messages of a topic for as long as what is left of it says so, at most `budget` of them, and
/// says how many went.
pub fn remove_oldest(
    tables: &mut Tables<'_>,
    extent: &mut Extent,
    budget: usize,
    goes_on: impl Fn(&Extent) -> bool,
) -> Result<usize, Failure> {
    let mut removed = 0;
    let mut oldest =
        tables.records.extract_from_if((extent.id, extent.first)..(extent.id, extent.next), |_, _| true)?;
    while removed < budget && goes_on(extent) {
        let Some(record) = oldest.next() else {
            // The records are damaged and lack their last; there is nothing left to remove.
            extent.first = extent.next;
            break;
        };
        let (key, row) = record?;
        extent.first = (key.value().1 + 1).min(extent.next);
        extent.bytes = extent.bytes.saturating_sub(row.value().len() as u64);
        removed += 1;
    }
    oldest.close()?;
    if extent.is_empty() {
        extent.bytes = 0;
    }
    trim_times(tables, extent)?;
    Ok(removed)
}

/// Removes the index entries of what is gone. The one that the first remaining record fell under moves to it.
fn trim_times(tables: &mut Tables<'_>, extent: &mut Extent) -> Result<(), Failure> {
    let mut gone = Vec::new();
    let mut first_time = None;
    for entry in tables.times.range((extent.id, i64::MIN)..=(extent.id, i64::MAX))? {
        let (key, row) = entry?;
        let time = key.value().1;
        match read_time(extent.id, time, row.value()) {
            Ok(seq) if seq >= extent.first => {
                first_time = (seq == extent.first).then_some(time);
                break;
            }
            // What is damaged among them goes with them.
            _ => gone.push(time),
        }
    }
    for time in &gone {
        tables.times.remove((extent.id, *time))?;
    }
    if let Some(newest) = gone.last() {
        extent.removed_time = *newest;
        if first_time.is_none() && !extent.is_empty() {
            tables.times.insert((extent.id, *newest), &*time_row(extent.id, *newest, extent.first))?;
            first_time = Some(*newest);
        }
    }
    extent.first_time = first_time.unwrap_or(extent.first_time);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_clock_that_steps_forward_makes_nothing_old_at_once() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let wall = |seconds: i64| Timestamp::from_millis(1_000_000 + seconds * 1000);
        let retention = Retention { age: Some(Duration::from_secs(60)), size: None };
        let mut clock = RetentionClock::new(wall(0), start);
        let young =
            |stored: i64| Extent { id: 1, next: 2, first_time: wall(stored).as_millis(), ..Extent::NONE };

        clock.advance(wall(3600), after(1));
        assert!(!exceeds(&young(0), &retention, &clock), "an hour's step in a second");
        clock.advance(wall(3700), after(101));
        assert!(exceeds(&young(0), &retention, &clock), "old by then at twice the speed");
        clock.advance(wall(0), after(102));
        assert!(!exceeds(&young(0), &retention, &clock), "set right again");
        clock.advance(wall(61), after(163));
        assert!(exceeds(&young(0), &retention, &clock), "truly old");
        assert!(!exceeds(&young(2), &retention, &clock));
    }
}
