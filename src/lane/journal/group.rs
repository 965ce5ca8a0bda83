//! A consumer group on one topic, as its members, the dispatch and the writer see it. What is acknowledged is in the
//! cursor, which moves after its commit. The rest is in memory (`share`): after a restart everything that was not
//! acknowledged is handed out again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;

use super::reader::Item;
use super::rows::Cursor;
use super::share::{Share, Todo};
use super::topics::{TopicLog, lock};
use crate::lane::contract::{GroupReport, Handed, LaneError, Tag};
use crate::message::GroupMode;

pub struct Group {
    pub name: String,
    pub topic: Arc<TopicLog>,
    state: Mutex<State>,
    /// The dispatch looks again.
    changed: Notify,
}

struct State {
    share: Share,
    era: Era,
    /// Memberships that an error has ended, until their holders are gone.
    ended: HashMap<u64, LaneError>,
    /// A dispatch runs. It ends when the last member has left.
    dispatched: bool,
    /// Its deletion waits for its commit, or is done: nobody may join.
    deleted: bool,
}

/// Counts the seeks of a group: what was read, handed out or acknowledged in one era is of no account in the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Era(u32);

/// Why there is no seat.
pub enum NoSeat {
    Busy(LaneError),
    /// The group is being deleted; there may be another of its name in a moment.
    Deleted,
}

/// What the dispatch does next.
pub enum Step {
    Do(Era, Todo),
    End,
}

impl Group {
    pub fn new(topic: Arc<TopicLog>, name: String, cursor: Cursor) -> Arc<Self> {
        let state = State {
            share: Share::new(cursor),
            era: Era(0),
            ended: HashMap::new(),
            dispatched: false,
            deleted: false,
        };
        Arc::new(Self { name, topic, state: Mutex::new(state), changed: Notify::new() })
    }

    /// Changes what is shared, and lets the dispatch see it.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut lock(&self.state));
        self.changed.notify_one();
        changed
    }

    pub fn is(&self, topic: &Arc<TopicLog>, name: &str) -> bool {
        Arc::ptr_eq(&self.topic, topic) && self.name == name
    }

    /// What is acknowledged, and in which era.
    pub fn cursor(&self) -> (Era, Cursor) {
        let state = lock(&self.state);
        (state.era, state.share.cursor.clone())
    }

    pub fn is_deleted(&self) -> bool {
        lock(&self.state).deleted
    }

    /// Keeps everybody out, where nobody is in.
    pub fn delete(&self) -> Result<(), LaneError> {
        let mut state = lock(&self.state);
        match state.share.members() {
            0 => state.deleted = true,
            members => {
                let error = format!("group `{}` has {members} members; it is deleted without any", self.name);
                return Err(LaneError::GroupBusy(error));
            }
        }
        Ok(())
    }

    /// All but the time of the oldest, and the number of that one.
    pub fn report(&self) -> (GroupReport, Option<u64>) {
        let end = self.topic.extent().next;
        let state = lock(&self.state);
        let floor = state.share.cursor.floor();
        let report = GroupReport {
            name: self.name.clone(),
            mode: state.share.mode(),
            members: state.share.members(),
            backlog: end.saturating_sub(floor).saturating_sub(state.share.cursor.above()),
            unacked: state.share.held(),
            oldest: None,
        };
        (report, (floor < end).then_some(floor))
    }

    /// The cursor that has these was committed.
    pub fn acknowledged(&self, cursor: Cursor, seqs: &[u64]) {
        self.change(|state| state.share.acknowledged(cursor, seqs));
    }

    /// A seek to this cursor was committed.
    pub fn sought(&self, cursor: Cursor) {
        self.change(|state| state.go_on_from(cursor));
    }

    /// The group is stored like this: a commit of unknown outcome may have moved it, or not have deleted it.
    pub fn stored(&self, cursor: Cursor) {
        self.change(|state| {
            state.deleted = false;
            if cursor.covers(&state.share.cursor) {
                state.share.settle(cursor);
            } else {
                state.go_on_from(cursor);
            }
        });
    }

    /// Retention has removed everything before `first`.
    pub fn retained_from(&self, first: u64) {
        self.change(|state| state.share.retained_from(first));
    }

    /// A seat, and whether its taker has to start the dispatch.
    pub fn sit(&self, mode: GroupMode, prefetch: u32) -> Result<(u64, Arc<Notify>, bool), NoSeat> {
        self.change(|state| {
            if state.deleted {
                return Err(NoSeat::Deleted);
            }
            if let Some(present) = state.share.mode()
                && (present != mode || mode == GroupMode::Exclusive)
            {
                let present = present.as_str();
                let error = format!("group `{}` is {present} and has its members", self.name);
                return Err(NoSeat::Busy(LaneError::GroupBusy(error)));
            }
            let (number, arrived) = state.share.sit(mode, prefetch);
            let first = !std::mem::replace(&mut state.dispatched, true);
            Ok((number, arrived, first))
        })
    }

    /// What it held goes to the others at once.
    pub fn leave(&self, number: u64) {
        self.change(|state| {
            state.ended.remove(&number);
            state.share.leave(number);
        });
    }

    /// What has arrived at a seat.
    pub fn collect(&self, number: u64) -> Result<Vec<Result<Handed, LaneError>>, LaneError> {
        let mut state = lock(&self.state);
        if let Some(error) = state.ended.get(&number) {
            return Err(error.clone());
        }
        let (collected, room) = state.share.collect(number);
        drop(state);
        if room {
            self.changed.notify_one();
        }
        Ok(collected)
    }

    /// Of these, the ones that a seat holds, and in which era.
    pub fn held_by(&self, number: u64, tags: &[Tag]) -> (Era, Vec<u64>) {
        let state = lock(&self.state);
        (state.era, state.share.held_by(number, state.era.seqs(tags)))
    }

    /// Those that this seat holds come again after the delay.
    pub fn reject(&self, number: u64, tags: &[Tag], delay: Duration) {
        self.change(|state| state.share.reject(number, &state.era.seqs(tags), delay));
    }

    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    pub fn step(&self) -> Step {
        let mut state = lock(&self.state);
        if state.share.members() == 0 {
            state.dispatched = false;
            return Step::End;
        }
        let end = self.topic.extent().next;
        Step::Do(state.era, state.share.todo(end))
    }

    /// Hands out what was read. `next` is where reading onward goes on. Returns what can never be read and counts as
    /// done.
    pub fn deal(&self, era: Era, items: Vec<Item>, next: Option<u64>) -> Vec<u64> {
        let mut state = lock(&self.state);
        let mut unreadable = Vec::new();
        if state.era != era {
            return unreadable;
        }
        for Item { seqs, found } in items {
            let seq = *seqs.start();
            match found {
                Ok(envelope) => {
                    let tag = Tag { partition: 0, era: era.0, place: self.topic.place(seq) };
                    state.share.offer(seq, Handed { envelope, attempt: 0, tag });
                }
                Err(error) => {
                    if !state.share.tell(seq, error) {
                        return unreadable;
                    }
                    state.share.read_until(*seqs.end() + 1);
                    unreadable.extend(seqs);
                }
            }
            state.share.read_until(seq + 1);
        }
        state.share.read_until(next.unwrap_or_default());
        unreadable
    }

    /// Messages that were to be handed out again and are no longer there.
    pub fn removed(&self, era: Era, seqs: &[u64]) {
        let mut state = lock(&self.state);
        if state.era == era {
            seqs.iter().for_each(|seq| state.share.forget(*seq));
        }
    }

    /// Every membership ends with this error.
    pub fn end(&self, error: &LaneError) {
        let mut state = lock(&self.state);
        state.dispatched = false;
        for (number, arrived) in state.share.clear_seats() {
            state.ended.insert(number, error.clone());
            arrived.notify_waiters();
        }
    }
}

impl Era {
    /// Of these, what was handed out in this era.
    fn seqs(self, tags: &[Tag]) -> Vec<u64> {
        tags.iter().filter(|tag| tag.era == self.0).map(|tag| tag.place.entry).collect()
    }
}

impl State {
    fn go_on_from(&mut self, cursor: Cursor) {
        self.era = Era(self.era.0.wrapping_add(1));
        self.share.go_on_from(cursor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::journal::rows::Extent;
    use crate::lane::journal::topics::Topics;
    use crate::message::Draft;
    use crate::topic::Topic;

    #[test]
    fn what_was_read_before_a_seek_is_not_handed_out_after_it() {
        let some = Extent { id: 1, next: 10, ..Extent::NONE };
        let topic = Topics::new(1).get_at(&Topic::parse("t").unwrap(), some);
        let group = Group::new(topic.clone(), "g".into(), Cursor::new(1));
        let Ok((seat, ..)) = group.sit(GroupMode::Failover, 100) else { panic!("a seat") };
        let Step::Do(before, Todo::Onward(1, _)) = group.step() else { panic!("there is something to read") };
        group.sought(Cursor::new(5));
        let item = |seq| Item { seqs: seq..=seq, found: Ok(topic.envelope(seq, Draft::default().accept())) };
        group.deal(before, vec![item(1), item(7)], Some(10));
        group.removed(before, &[5]);
        assert!(group.collect(seat).unwrap().is_empty());
        let Step::Do(now, Todo::Onward(5, _)) = group.step() else { panic!("it goes on from there") };
        group.deal(now, vec![item(5)], Some(6));
        assert_eq!(group.collect(seat).unwrap().len(), 1);
    }
}
