//! How a group shares its messages out: which wait, who holds which, and who gets which next.
//!
//! ```text
//!          floor                       next
//! ───done────┤ held done ready held done …  ├── never read ──▶
//!
//! exclusive, failover   ready ──in order──▶ the first seat
//! shared                ready ──in turn───▶ any seat with room
//! key_shared            keyless as shared; the others wait at the seat that their key belongs to:
//!                       key ──rendezvous hash──▶ seat, and while another seat still holds some of the key, nobody
//! ```
//! Of a message that waits, only its number and the hash of its key are kept, so looking ahead past a member that is
//! full, or a message that is delayed, is cheap: it goes as far as `OPEN_MAX`. What was looked at is read again when
//! it is handed out.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::rows::Cursor;
use crate::lane::contract::{Handed, LaneError};
use crate::message::{GroupMode, Message, Timestamp};

/// How many messages may be read and not acknowledged: held, delayed, rejected, or waiting for a member that is full.
/// It bounds what a group remembers (100 bytes each, or so) and writes; dispatch stops there. What is acknowledged
/// costs nothing, so one that is stuck or delayed for long stops nobody.
const OPEN_MAX: usize = 100_000;
/// What may wait in one member's queue, in bytes; a larger message is admitted alone.
const QUEUE_BYTES: usize = 1 << 20;
/// What a record that cannot be read counts there.
const ERROR_BYTES: usize = 256;
/// What one step of the dispatch reads.
const STEP: usize = 256;
/// What it reads at least of a key_shared topic, where what it reads may be for a member without room.
const LOOK_AHEAD: usize = 64;
/// The longest a rejected message is kept back.
const DELAY_MAX: Duration = Duration::from_secs(365 * 86_400);
/// How often a message that has to wait longer is looked at: the wall clock may have been set meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

pub struct Share {
    pub cursor: Cursor,
    /// That of the members; without any, that of the last.
    mode: GroupMode,
    /// The first that was never read.
    next: u64,
    /// What was read and is not acknowledged.
    open: BTreeMap<u64, Open>,
    /// Of those, the ones that any member may have now, and those that wait for their time. An entry may outlive its
    /// message there.
    ready: BTreeSet<u64>,
    delayed: BTreeSet<(Instant, u64)>,
    /// The keys of a key_shared group of which some wait or are held.
    keys: HashMap<u64, Key>,
    /// In the order of joining.
    seats: Vec<Seat>,
    seats_ever: u64,
    /// Whose turn it is.
    turn: usize,
}

/// A message between its first reading and its acknowledgement.
struct Open {
    /// How often it was handed out.
    attempt: u32,
    holder: Option<u64>,
    /// The hash of its key. Two keys of one hash are taken for one, which only keeps them in order.
    key: Option<u64>,
    deliver_at: Option<Timestamp>,
    /// A member rejected it until then.
    rejected_until: Option<Instant>,
}

impl Open {
    fn new(message: &Message) -> Self {
        let key = message.key.as_ref().map(hash);
        Self { attempt: 0, holder: None, key, deliver_at: message.deliver_at, rejected_until: None }
    }

    /// When it may be handed out, where that is not now.
    fn due(&self, mode: GroupMode, now: Instant) -> Option<Instant> {
        let published = self.deliver_at.filter(|_| honours_delay(mode)).map(|at| {
            let wait = at.as_millis().saturating_sub(Timestamp::now().as_millis()).max(0);
            now + Duration::from_millis(wait as u64).min(DELAY_MAX)
        });
        published.max(self.rejected_until).filter(|due| *due > now)
    }
}

fn honours_delay(mode: GroupMode) -> bool {
    matches!(mode, GroupMode::Shared | GroupMode::KeyShared)
}

fn hash(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

#[derive(Default)]
struct Key {
    waiting: BTreeSet<u64>,
    held: usize,
    /// Who holds those.
    holder: u64,
    /// Whom the key belongs to among today's members.
    owner: u64,
}

impl Key {
    /// Who may get the next of this key: nobody while another than its owner still holds some of it.
    fn home(&self) -> Option<u64> {
        (self.held == 0 || self.holder == self.owner).then_some(self.owner)
    }
}

struct Seat {
    number: u64,
    prefetch: usize,
    held: usize,
    /// What waits for this seat alone.
    ready: BTreeSet<u64>,
    queue: VecDeque<Result<Handed, LaneError>>,
    bytes: usize,
    arrived: Arc<Notify>,
}

impl Seat {
    fn credit(&self) -> usize {
        if self.bytes < QUEUE_BYTES { self.prefetch.saturating_sub(self.held) } else { 0 }
    }
}

/// What can be done now.
pub enum Todo {
    /// Hand these out.
    Again(Vec<u64>),
    /// Read on from here, at most so many.
    Onward(u64, u64),
    /// Nothing before something changes or the time comes.
    Wait(Option<Instant>),
}

impl Share {
    pub fn new(cursor: Cursor) -> Self {
        Self {
            next: cursor.floor(),
            cursor,
            mode: GroupMode::default(),
            open: BTreeMap::new(),
            ready: BTreeSet::new(),
            delayed: BTreeSet::new(),
            keys: HashMap::new(),
            seats: Vec::new(),
            seats_ever: 0,
            turn: 0,
        }
    }

    pub fn mode(&self) -> Option<GroupMode> {
        (!self.seats.is_empty()).then_some(self.mode)
    }

    pub fn members(&self) -> usize {
        self.seats.len()
    }

    pub fn held(&self) -> u64 {
        self.seats.iter().map(|seat| seat.held as u64).sum()
    }

    /// A new seat. Its mode is that of the others.
    pub fn sit(&mut self, mode: GroupMode, prefetch: u32) -> (u64, Arc<Notify>) {
        self.seats_ever += 1;
        let arrived = Arc::new(Notify::new());
        self.seats.push(Seat {
            number: self.seats_ever,
            prefetch: prefetch.max(1) as usize,
            held: 0,
            ready: BTreeSet::new(),
            queue: VecDeque::new(),
            bytes: 0,
            arrived: arrived.clone(),
        });
        let first = self.seats.len() == 1;
        self.mode = mode;
        if first || mode == GroupMode::KeyShared {
            self.arrange();
        }
        (self.seats_ever, arrived)
    }

    /// What it held waits for another.
    pub fn leave(&mut self, number: u64) {
        let Some(at) = self.seat_at(number) else { return };
        let seat = self.seats.remove(at);
        // What it never took from its queue was not an attempt.
        for handed in seat.queue.iter().flatten() {
            if let Some(open) = self.open.get_mut(&handed.tag.place.entry) {
                open.attempt -= 1;
            }
        }
        for open in self.open.values_mut().filter(|open| open.holder == Some(number)) {
            open.holder = None;
        }
        self.arrange();
    }

    /// Everybody leaves.
    pub fn clear_seats(&mut self) -> Vec<(u64, Arc<Notify>)> {
        let left: Vec<_> = self.seats.iter().map(|seat| (seat.number, seat.arrived.clone())).collect();
        left.iter().for_each(|(number, _)| self.leave(*number));
        left
    }

    /// What has arrived at a seat, and whether that gives it room that it lacked.
    pub fn collect(&mut self, number: u64) -> (Vec<Result<Handed, LaneError>>, bool) {
        let Some(at) = self.seat_at(number) else { return (Vec::new(), false) };
        let seat = &mut self.seats[at];
        (seat.queue.drain(..).collect(), std::mem::take(&mut seat.bytes) >= QUEUE_BYTES)
    }

    /// Of these, the ones that the seat holds.
    pub fn held_by(&self, number: u64, mut seqs: Vec<u64>) -> Vec<u64> {
        seqs.retain(|seq| self.open.get(seq).is_some_and(|open| open.holder == Some(number)));
        seqs
    }

    /// Those that this seat holds wait until the delay is over.
    pub fn reject(&mut self, number: u64, seqs: &[u64], delay: Duration) {
        let now = Instant::now();
        for seq in seqs {
            let Some(open) = self.open.get_mut(seq).filter(|open| open.holder == Some(number)) else {
                continue;
            };
            open.rejected_until = Some(now + delay.min(DELAY_MAX));
            self.release(*seq);
            self.place(*seq, now);
        }
    }

    /// The cursor now has these.
    pub fn acknowledged(&mut self, cursor: Cursor, seqs: &[u64]) {
        self.cursor = cursor;
        seqs.iter().for_each(|seq| self.forget(*seq));
        self.next = self.next.max(self.cursor.floor());
    }

    /// Retention has removed everything before `first`.
    pub fn retained_from(&mut self, first: u64) {
        self.cursor.rise_to(first);
        let gone: Vec<u64> = self.open.range(..first).map(|(seq, _)| *seq).collect();
        gone.into_iter().for_each(|seq| self.forget(seq));
        self.next = self.next.max(self.cursor.floor());
    }

    /// Gives up whatever the cursor has.
    pub fn settle(&mut self, cursor: Cursor) {
        let done: Vec<u64> = self.open.keys().copied().filter(|seq| cursor.has(*seq)).collect();
        self.acknowledged(cursor, &done);
    }

    /// The group goes on from this cursor, and nobody holds anything.
    pub fn go_on_from(&mut self, cursor: Cursor) {
        self.next = cursor.floor();
        self.cursor = cursor;
        self.open.clear();
        for seat in &mut self.seats {
            seat.held = 0;
            seat.queue.clear();
            seat.bytes = 0;
        }
        self.arrange();
    }

    /// What can be done in a topic whose next message gets the number `end`.
    pub fn todo(&mut self, end: u64) -> Todo {
        let now = Instant::now();
        while let Some((_, seq)) = self.delayed.first().copied().filter(|(due, _)| *due <= now) {
            self.delayed.pop_first();
            if self.open.get(&seq).is_some_and(|open| open.holder.is_none()) {
                self.place(seq, now);
            }
        }
        let wait = Todo::Wait(self.delayed.first().map(|(due, _)| *due));
        let credit: usize = self.takers().iter().map(Seat::credit).sum();
        if credit == 0 {
            return wait;
        }
        let mut again: Vec<u64> = self.ready.iter().copied().take(credit.min(STEP)).collect();
        let share = STEP.div_ceil(self.seats.len());
        for seat in &self.seats {
            again.extend(seat.ready.iter().take(seat.credit().min(share)));
        }
        if !again.is_empty() {
            again.sort_unstable();
            return Todo::Again(again);
        }
        let room = OPEN_MAX.saturating_sub(self.open.len());
        let step = if self.mode == GroupMode::KeyShared { credit.max(LOOK_AHEAD) } else { credit };
        let onward = room.min(step).min(STEP) as u64;
        if onward > 0 && self.next < end { Todo::Onward(self.next, onward) } else { wait }
    }

    /// Reading goes on there.
    pub fn read_until(&mut self, next: u64) {
        self.next = self.next.max(next);
    }

    /// A message was read: whoever is to have it gets it, where there is room and it is its turn.
    pub fn offer(&mut self, seq: u64, mut handed: Handed) {
        if self.cursor.has(seq) {
            return;
        }
        if let Entry::Vacant(open) = self.open.entry(seq) {
            open.insert(Open::new(&handed.envelope.message));
            self.place(seq, Instant::now());
        }
        let Some(at) = self.taker(seq) else { return };
        self.unplace(seq);
        let Some(open) = self.open.get_mut(&seq) else { return };
        let seat = &mut self.seats[at];
        open.attempt += 1;
        open.holder = Some(seat.number);
        handed.attempt = open.attempt;
        if let Some(key) = open.key.and_then(|key| self.keys.get_mut(&key)) {
            key.held += 1;
            key.holder = seat.number;
        }
        seat.held += 1;
        seat.bytes += handed.envelope.weight();
        seat.queue.push_back(Ok(handed));
        seat.arrived.notify_waiters();
    }

    /// What cannot be read is told to one member. `false`: there is none with room.
    pub fn tell(&mut self, seq: u64, error: LaneError) -> bool {
        let Some(at) = self.next_seat() else { return false };
        self.forget(seq);
        let seat = &mut self.seats[at];
        seat.bytes += ERROR_BYTES;
        seat.queue.push_back(Err(error));
        seat.arrived.notify_waiters();
        true
    }

    /// It is acknowledged, or no longer there.
    pub fn forget(&mut self, seq: u64) {
        self.release(seq);
        self.unplace(seq);
        if let Some(hash) = self.open.remove(&seq).and_then(|open| open.key)
            && self.keys.get(&hash).is_some_and(|key| key.held == 0 && key.waiting.is_empty())
        {
            self.keys.remove(&hash);
        }
    }

    /// The seats that messages are handed to.
    fn takers(&self) -> &[Seat] {
        match self.mode {
            GroupMode::Exclusive | GroupMode::Failover => &self.seats[..self.seats.len().min(1)],
            GroupMode::Shared | GroupMode::KeyShared => &self.seats,
        }
    }

    /// Who gets this message now. What has an order never overtakes what waits before it.
    fn taker(&mut self, seq: u64) -> Option<usize> {
        let key = self.open.get(&seq)?.key.and_then(|key| self.keys.get(&key));
        if let Some(key) = key {
            let at = key.home().filter(|_| key.waiting.first() == Some(&seq));
            return at.and_then(|home| self.seat_at(home)).filter(|at| self.seats[*at].credit() > 0);
        }
        let in_turn = match self.mode {
            GroupMode::Exclusive | GroupMode::Failover => self.ready.first() == Some(&seq),
            GroupMode::Shared | GroupMode::KeyShared => self.ready.contains(&seq),
        };
        if in_turn { self.next_seat() } else { None }
    }

    /// The next seat in turn that has credit.
    fn next_seat(&mut self) -> Option<usize> {
        let takers = self.takers();
        let count = takers.len();
        let at = (0..count).map(|n| (self.turn + n) % count).find(|at| takers[*at].credit() > 0)?;
        self.turn = at + 1;
        Some(at)
    }

    fn seat_at(&self, number: u64) -> Option<usize> {
        self.seats.iter().position(|seat| seat.number == number)
    }

    /// A message that nobody holds waits: for its time, for the owner of its key, or for anybody.
    fn place(&mut self, seq: u64, now: Instant) {
        let Some(open) = self.open.get(&seq) else { return };
        if let Some(due) = open.due(self.mode, now) {
            self.delayed.insert((due.min(now + LOOK_AGAIN), seq));
            return;
        }
        let Some(hash) = open.key.filter(|_| self.mode == GroupMode::KeyShared) else {
            self.ready.insert(seq);
            return;
        };
        let seats = &self.seats;
        let key =
            self.keys.entry(hash).or_insert_with(|| Key { owner: owner(seats, hash), ..Key::default() });
        key.waiting.insert(seq);
        let home = key.home();
        if let Some(seat) = self.seats.iter_mut().find(|seat| Some(seat.number) == home) {
            seat.ready.insert(seq);
        }
    }

    /// It waits no longer. What waits for its time is passed over when that comes.
    fn unplace(&mut self, seq: u64) {
        self.ready.remove(&seq);
        let Some(hash) = self.open.get(&seq).and_then(|open| open.key) else { return };
        let Some(key) = self.keys.get_mut(&hash) else { return };
        key.waiting.remove(&seq);
        let owner = key.owner;
        if let Some(seat) = self.seats.iter_mut().find(|seat| seat.number == owner) {
            seat.ready.remove(&seq);
        }
    }

    /// Nobody holds it any more. With the last that is held of a key, the key may move.
    fn release(&mut self, seq: u64) {
        let Some(open) = self.open.get_mut(&seq) else { return };
        let Some(holder) = open.holder.take() else { return };
        let hash = open.key;
        if let Some(seat) = self.seats.iter_mut().find(|seat| seat.number == holder) {
            seat.held -= 1;
        }
        let Some(hash) = hash else { return };
        let Some(key) = self.keys.get_mut(&hash) else { return };
        key.held -= 1;
        if key.held > 0 {
            return;
        }
        let owner = key.owner;
        if owner != holder
            && let Some(seat) = self.seats.iter_mut().find(|seat| seat.number == owner)
        {
            seat.ready.extend(&key.waiting);
        }
        if key.waiting.is_empty() {
            self.keys.remove(&hash);
        }
    }

    /// Begins anew with who holds what, for other members or another mode.
    fn arrange(&mut self) {
        self.ready.clear();
        self.delayed.clear();
        self.keys.clear();
        self.seats.iter_mut().for_each(|seat| seat.ready.clear());
        let now = Instant::now();
        let mut waiting = Vec::new();
        for (seq, open) in &self.open {
            match (open.holder, open.key) {
                (None, _) => waiting.push(*seq),
                (Some(holder), Some(hash)) if self.mode == GroupMode::KeyShared => {
                    let seats = &self.seats;
                    let owned = || Key { owner: owner(seats, hash), ..Key::default() };
                    let key = self.keys.entry(hash).or_insert_with(owned);
                    key.held += 1;
                    key.holder = holder;
                }
                _ => {}
            }
        }
        waiting.into_iter().for_each(|seq| self.place(seq, now));
    }
}

/// Whom a key belongs to: only the keys of a member that leaves move, and only to a new one (rendezvous hashing).
fn owner(seats: &[Seat], key: u64) -> u64 {
    seats.iter().map(|seat| seat.number).max_by_key(|number| hash((key, number))).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::contract::Tag;
    use crate::message::{Draft, Envelope, Place, Position, Stored};
    use crate::topic::Topic;

    fn handed(seq: u64, draft: Draft) -> Handed {
        let place = Place { ledger: 1, entry: seq, index: 0 };
        let stored = Stored { partition: 0, place, position: Position::Whole(place) };
        let envelope = Arc::new(Envelope::durable(Topic::parse("t").unwrap(), draft.accept(), stored));
        Handed { envelope, attempt: 0, tag: Tag { partition: 0, era: 0, place } }
    }

    fn keyed(key: u64) -> Draft {
        Draft { key: Some(key.to_string()), ..Draft::default() }
    }

    /// Reads on as far as it is wanted, and hands out what can be.
    fn read_all(share: &mut Share, draft: impl Fn(u64) -> Draft) {
        while let Todo::Onward(from, messages) = share.todo(u64::MAX) {
            (from..from + messages).for_each(|seq| share.offer(seq, handed(seq, draft(seq))));
            share.read_until(from + messages);
        }
    }

    fn took(share: &mut Share, seat: u64) -> Vec<u64> {
        let (collected, _) = share.collect(seat);
        collected.into_iter().map(|handed| handed.unwrap().tag.place.entry).collect()
    }

    fn ack(share: &mut Share, seqs: &[u64]) {
        let mut cursor = share.cursor.clone();
        seqs.iter().for_each(|seq| cursor.add(*seq));
        share.acknowledged(cursor, seqs);
    }

    #[test]
    fn a_group_reads_so_far_ahead_and_no_further() {
        let mut share = Share::new(Cursor::new(1));
        let (seat, _) = share.sit(GroupMode::Shared, 1000);
        let hour = Some(Duration::from_secs(3600));
        // All are delayed but the first.
        let draft = |seq| Draft { delay: hour.filter(|_| seq > 1), ..Draft::default() };
        read_all(&mut share, draft);
        assert_eq!((share.open.len(), share.next), (OPEN_MAX, 1 + OPEN_MAX as u64));
        assert_eq!(took(&mut share, seat), [1]);
        ack(&mut share, &[1]);
        assert!(matches!(share.todo(u64::MAX), Todo::Onward(from, 1) if from == 1 + OPEN_MAX as u64));
    }

    #[test]
    fn one_stuck_message_stops_nobody() {
        let mut share = Share::new(Cursor::new(1));
        let (seat, _) = share.sit(GroupMode::Shared, 1000);
        for _ in 0..3 * OPEN_MAX / 900 {
            let Todo::Onward(from, messages) = share.todo(u64::MAX) else { panic!("it goes on") };
            (from..from + messages).for_each(|seq| share.offer(seq, handed(seq, Draft::default())));
            share.read_until(from + messages);
            let mut done = took(&mut share, seat);
            done.retain(|seq| *seq != 1);
            ack(&mut share, &done);
        }
        assert_eq!((share.cursor.floor(), share.open.len()), (1, 1));
    }

    /// Everything that is done for one message takes about as long behind a hundred thousand as behind none.
    #[test]
    fn a_full_window_is_not_walked_for_each_message() {
        let mut share = Share::new(Cursor::new(1));
        let (full, _) = share.sit(GroupMode::KeyShared, 1);
        let (free, _) = share.sit(GroupMode::KeyShared, 1);
        let belongs = |share: &Share, key: u64| owner(&share.seats, hash(key.to_string()));
        let of_full: Vec<u64> = (0..100).filter(|key| belongs(&share, *key) == full).collect();
        let of_free = (0..100).find(|key| belongs(&share, *key) == free).unwrap();
        read_all(&mut share, |seq| keyed(of_full[seq as usize % of_full.len()]));
        assert_eq!(share.open.len(), OPEN_MAX);
        assert_eq!(took(&mut share, full).len(), 1);
        let began = Instant::now();
        let next = share.next;
        for seq in next..next + 2000 {
            share.offer(seq, handed(seq, keyed(of_free)));
            assert_eq!(took(&mut share, free), [seq]);
            share.reject(free, &[seq], Duration::ZERO);
            share.offer(seq, handed(seq, keyed(of_free)));
            assert_eq!(took(&mut share, free), [seq]);
            share.todo(0);
            ack(&mut share, &[seq]);
        }
        // A walk takes a millisecond or more, five of them for each; debug builds are slower still.
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    }

    #[test]
    fn a_key_moves_when_its_old_member_holds_none_of_it() {
        let mut share = Share::new(Cursor::new(1));
        let (old, _) = share.sit(GroupMode::KeyShared, 1000);
        (1..=100).for_each(|seq| share.offer(seq, handed(seq, keyed(seq % 20))));
        share.read_until(101);
        let held = took(&mut share, old);
        assert_eq!(held.len(), 100);
        let (new, _) = share.sit(GroupMode::KeyShared, 1000);
        let moves = |share: &Share, seq: u64| owner(&share.seats, hash((seq % 20).to_string())) == new;
        assert!(held.iter().any(|seq| moves(&share, *seq)) && !held.iter().all(|seq| moves(&share, *seq)));
        (101..=200).for_each(|seq| share.offer(seq, handed(seq, keyed(seq % 20))));
        share.read_until(201);
        assert!(took(&mut share, new).is_empty(), "the old one holds some of every key");
        assert!(
            took(&mut share, old).iter().all(|seq| !moves(&share, *seq)),
            "it gets no more of what moves"
        );

        // Half by acknowledging, half by giving back, which comes first then.
        let (acked, back): (Vec<u64>, Vec<u64>) = (1..=100).partition(|seq| seq % 40 < 20);
        ack(&mut share, &acked);
        share.reject(old, &back, Duration::ZERO);
        let Todo::Again(again) = share.todo(201) else { panic!("there is more to hand out") };
        again.iter().for_each(|seq| share.offer(*seq, handed(*seq, keyed(seq % 20))));
        let news = took(&mut share, new);
        let expected = (1..=200).filter(|seq| moves(&share, *seq) && !acked.contains(seq));
        assert_eq!(news, expected.collect::<Vec<_>>());
        share.leave(new);
        share.leave(old);
        assert!(share.keys.values().all(|key| key.held == 0));
    }
}
