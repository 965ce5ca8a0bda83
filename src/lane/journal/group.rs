//! A consumer group on one topic: who holds what, and what comes next.
//!
//! ```text
//!          floor                     next
//! ───done────┤ done held ready held …  ├── never handed out ──▶
//!            └──── at most WINDOW ─────┘
//! ```
//! What is acknowledged is in the cursor, which moves after its commit. The rest is in memory: after a restart
//! everything that was not acknowledged is handed out again.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::reader::Item;
use super::rows::Cursor;
use super::topics::{TopicLog, lock};
use crate::lane::contract::{Handed, LaneError, Tag};

/// How far the newest message handed out may be ahead of the oldest that is not acknowledged. It bounds what a group
/// remembers; behind one stuck message, dispatch stops there.
const WINDOW: u64 = 100_000;
/// What may wait in one member's queue, in bytes; a larger message is admitted alone.
const QUEUE_BYTES: usize = 1 << 20;
/// What a record that cannot be read counts there.
const ERROR_BYTES: usize = 256;
/// The longest a rejected message is kept back.
const DELAY_MAX: Duration = Duration::from_secs(365 * 86_400);
/// What one step of the dispatch reads.
const STEP: usize = 256;

pub struct Group {
    pub name: String,
    pub topic: Arc<TopicLog>,
    state: Mutex<State>,
    /// The dispatch looks again.
    changed: Notify,
}

struct State {
    cursor: Cursor,
    /// The first that was never handed out.
    next: u64,
    /// What was read and is not acknowledged.
    open: BTreeMap<u64, Open>,
    /// Of those, the ones to hand out now, and those that wait for their time.
    ready: BTreeSet<u64>,
    delayed: BTreeSet<(Instant, u64)>,
    seats: Vec<Seat>,
    seats_ever: u64,
    /// Whose turn it is.
    turn: usize,
    /// A dispatch runs. It ends when the last member has left.
    dispatched: bool,
}

/// A message between its first reading and its acknowledgement.
#[derive(Default)]
struct Open {
    /// How often it was handed out.
    attempt: u32,
    holder: Option<u64>,
}

struct Seat {
    number: u64,
    prefetch: usize,
    held: usize,
    queue: VecDeque<Result<Handed, LaneError>>,
    bytes: usize,
    ended: Option<LaneError>,
    arrived: Arc<Notify>,
}

impl Seat {
    fn credit(&self) -> usize {
        if self.bytes < QUEUE_BYTES && self.ended.is_none() {
            self.prefetch.saturating_sub(self.held)
        } else {
            0
        }
    }
}

/// What the dispatch does next.
pub enum Step {
    /// Hand these out again.
    Again(Vec<u64>),
    /// Read on from here, at most so many.
    Onward(u64, u64),
    /// Nothing until something changes or the time comes.
    Wait(Option<Instant>),
    End,
}

impl Group {
    pub fn new(topic: Arc<TopicLog>, name: String, cursor: Cursor) -> Arc<Self> {
        let state = State {
            next: cursor.floor(),
            cursor,
            open: BTreeMap::new(),
            ready: BTreeSet::new(),
            delayed: BTreeSet::new(),
            seats: Vec::new(),
            seats_ever: 0,
            turn: 0,
            dispatched: false,
        };
        Arc::new(Self { name, topic, state: Mutex::new(state), changed: Notify::new() })
    }

    pub fn is(&self, topic: &Arc<TopicLog>, name: &str) -> bool {
        Arc::ptr_eq(&self.topic, topic) && self.name == name
    }

    pub fn cursor(&self) -> Cursor {
        lock(&self.state).cursor.clone()
    }

    /// How many stored messages are not acknowledged.
    pub fn backlog(&self) -> u64 {
        let next = self.topic.extent().next;
        let state = lock(&self.state);
        next.saturating_sub(state.cursor.floor()).saturating_sub(state.cursor.above())
    }

    /// The cursor was committed.
    pub fn acknowledged(&self, cursor: Cursor) {
        let mut state = lock(&self.state);
        state.cursor = cursor;
        state.settle();
        drop(state);
        self.changed.notify_one();
    }

    /// Retention has removed everything before `first`.
    pub fn retained_from(&self, first: u64) {
        let mut state = lock(&self.state);
        state.cursor.rise_to(first);
        state.settle();
        drop(state);
        self.changed.notify_one();
    }

    /// A seat, and whether its taker has to start the dispatch.
    pub fn sit(&self, prefetch: u32) -> (u64, Arc<Notify>, bool) {
        let mut state = lock(&self.state);
        state.seats_ever += 1;
        let seat = Seat {
            number: state.seats_ever,
            prefetch: prefetch.max(1) as usize,
            held: 0,
            queue: VecDeque::new(),
            bytes: 0,
            ended: None,
            arrived: Arc::new(Notify::new()),
        };
        let taken = (seat.number, seat.arrived.clone(), !state.dispatched);
        state.dispatched = true;
        state.seats.push(seat);
        drop(state);
        self.changed.notify_one();
        taken
    }

    /// What it held goes to the others at once.
    pub fn leave(&self, number: u64) {
        let mut state = lock(&self.state);
        let Some(at) = state.seats.iter().position(|seat| seat.number == number) else { return };
        let seat = state.seats.remove(at);
        // What it never took from its queue was not an attempt.
        for handed in seat.queue.iter().flatten() {
            if let Some(open) = state.open.get_mut(&handed.tag.place.entry) {
                open.attempt -= 1;
            }
        }
        let held = state.open.iter_mut().filter(|(_, open)| open.holder == Some(number));
        let held: Vec<u64> = held.map(|(seq, open)| (open.holder = None, *seq).1).collect();
        state.ready.extend(held);
        drop(state);
        self.changed.notify_one();
    }

    /// What has arrived at a seat.
    pub fn collect(&self, number: u64) -> Result<Vec<Result<Handed, LaneError>>, LaneError> {
        let mut state = lock(&self.state);
        let Some(seat) = state.seats.iter_mut().find(|seat| seat.number == number) else {
            return Ok(Vec::new());
        };
        let collected: Vec<_> = seat.queue.drain(..).collect();
        let full = std::mem::take(&mut seat.bytes) >= QUEUE_BYTES;
        let ended = seat.ended.clone();
        drop(state);
        if full {
            self.changed.notify_one();
        }
        match ended {
            Some(error) if collected.is_empty() => Err(error),
            _ => Ok(collected),
        }
    }

    /// Those that this seat holds come again after the delay.
    pub fn give_back(&self, number: u64, seqs: &[u64], delay: Duration) {
        let mut state = lock(&self.state);
        for seq in seqs {
            let Some(open) = state.open.get_mut(seq).filter(|open| open.holder == Some(number)) else {
                continue;
            };
            open.holder = None;
            if delay.is_zero() {
                state.ready.insert(*seq);
            } else {
                state.delayed.insert((Instant::now() + delay.min(DELAY_MAX), *seq));
            }
            if let Some(seat) = state.seats.iter_mut().find(|seat| seat.number == number) {
                seat.held -= 1;
            }
        }
        drop(state);
        self.changed.notify_one();
    }

    pub async fn changed(&self) {
        self.changed.notified().await;
    }

    pub fn step(&self) -> Step {
        let mut state = lock(&self.state);
        if state.seats.iter().all(|seat| seat.ended.is_some()) {
            state.dispatched = false;
            return Step::End;
        }
        let now = Instant::now();
        while let Some((_, seq)) = state.delayed.first().copied().filter(|(due, _)| *due <= now) {
            state.delayed.pop_first();
            state.ready.insert(seq);
        }
        let wait = Step::Wait(state.delayed.first().map(|(due, _)| *due));
        let credit: usize = state.seats.iter().map(Seat::credit).sum();
        if credit == 0 {
            return wait;
        }
        if !state.ready.is_empty() {
            return Step::Again(state.ready.iter().copied().take(credit.min(STEP)).collect());
        }
        let next = state.next.max(state.cursor.floor());
        let room = (state.cursor.floor() + WINDOW).saturating_sub(next);
        let onward = room.min(credit.min(STEP) as u64);
        if onward > 0 && next < self.topic.extent().next { Step::Onward(next, onward) } else { wait }
    }

    /// Hands out what was read, a message to each member in turn. `next` is where reading onward goes on. Returns
    /// what can never be read and counts as done.
    pub fn deal(&self, items: Vec<Item>, next: Option<u64>) -> Vec<u64> {
        let mut state = lock(&self.state);
        let mut unreadable = Vec::new();
        for Item { seqs, found } in items {
            let seq = *seqs.start();
            match found {
                Ok(_) if state.cursor.has(seq) => {}
                Ok(envelope) => {
                    state.open.entry(seq).or_default();
                    state.ready.insert(seq);
                    let tag = Tag { partition: 0, place: self.topic.place(seq) };
                    state.hand(Handed { envelope, attempt: 0, tag });
                }
                Err(error) => {
                    let Some(at) = state.next_seat() else { return unreadable };
                    state.ready.remove(&seq);
                    state.open.remove(&seq);
                    let seat = &mut state.seats[at];
                    seat.bytes += ERROR_BYTES;
                    seat.queue.push_back(Err(error));
                    seat.arrived.notify_waiters();
                    state.next = state.next.max(*seqs.end() + 1);
                    unreadable.extend(seqs);
                }
            }
            state.next = state.next.max(seq + 1);
        }
        if let Some(next) = next {
            state.next = state.next.max(next);
        }
        unreadable
    }

    /// Messages that were to be handed out again and are no longer there.
    pub fn removed(&self, seqs: &[u64]) {
        let mut state = lock(&self.state);
        for seq in seqs {
            state.ready.remove(seq);
            state.open.remove(seq);
        }
    }

    /// Every membership ends with this error.
    pub fn end(&self, error: &LaneError) {
        let mut state = lock(&self.state);
        for seat in &mut state.seats {
            seat.ended = Some(error.clone());
            seat.arrived.notify_waiters();
        }
        state.dispatched = false;
    }
}

impl State {
    /// Gives up what is acknowledged by now.
    fn settle(&mut self) {
        let State { cursor, open, ready, delayed, seats, .. } = self;
        open.retain(|seq, open| {
            let done = cursor.has(*seq);
            if let Some(holder) = open.holder.filter(|_| done)
                && let Some(seat) = seats.iter_mut().find(|seat| seat.number == holder)
            {
                seat.held -= 1;
            }
            !done
        });
        ready.retain(|seq| open.contains_key(seq));
        delayed.retain(|(_, seq)| open.contains_key(seq));
        self.next = self.next.max(self.cursor.floor());
    }

    /// The next seat in turn that has credit.
    fn next_seat(&mut self) -> Option<usize> {
        let count = self.seats.len();
        let at = (0..count).map(|n| (self.turn + n) % count).find(|at| self.seats[*at].credit() > 0)?;
        self.turn = at + 1;
        Some(at)
    }

    /// To the next member in turn; it stays ready where nobody has credit any more.
    fn hand(&mut self, mut handed: Handed) {
        let seq = handed.tag.place.entry;
        let Some(at) = self.next_seat() else { return };
        let (Some(open), seat) = (self.open.get_mut(&seq), &mut self.seats[at]) else { return };
        if open.holder.is_some() {
            return;
        }
        self.ready.remove(&seq);
        open.attempt += 1;
        open.holder = Some(seat.number);
        handed.attempt = open.attempt;
        seat.held += 1;
        seat.bytes += handed.envelope.weight();
        seat.queue.push_back(Ok(handed));
        seat.arrived.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::journal::rows::Extent;
    use crate::lane::journal::topics::Topics;
    use crate::topic::Topic;

    #[test]
    fn a_group_that_lags_too_far_behind_gets_nothing_new_until_it_catches_up() {
        let many = Extent { id: 1, next: 10 * WINDOW, ..Extent::NONE };
        let topic = Topics::new(1).get_at(&Topic::parse("t").unwrap(), many);
        let group = Group::new(topic, "g".into(), Cursor::new(1));
        let (seat, ..) = group.sit(1000);
        assert!(matches!(group.step(), Step::Onward(1, messages) if messages == STEP as u64));
        // All were handed out up to here, and all but the first are done.
        group.deal(Vec::new(), Some(1 + WINDOW));
        let mut cursor = Cursor::new(1);
        (2..=WINDOW).for_each(|seq| cursor.add(seq));
        assert!(cursor.row(1, "g").len() < 16 << 10, "the row stays small");
        group.acknowledged(cursor.clone());
        assert!(matches!(group.step(), Step::Wait(None)));
        cursor.add(1);
        group.acknowledged(cursor);
        assert!(matches!(group.step(), Step::Onward(from, _) if from == 1 + WINDOW));
        group.leave(seat);
        assert!(matches!(group.step(), Step::End));
    }
}
