//! The one writer of the log, on a thread of its own: an fsync blocks for as long as the disk pleases.
//!
//! ```text
//! callers ──line──▶ take what waits ──▶ one transaction, one fsync ──▶ extents and tails move ──▶ answers
//!                        ▲                        │ failed
//!                        └── reopen, look what is in it, try whether there is room again ◀──┘
//! ```
//! What is known in memory moves after a commit only, in its order.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use redb::{Table, WriteTransaction};
use tokio::runtime::Runtime;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tracing::error;

use super::group::{Era, Group};
use super::log::{Command, Done, Log, closed};
use super::record::{encode, record_key, seal};
use super::retention::{REMOVED_MAX, RetentionClock, remove_oldest};
use super::rows::{Cursor, Extent, GROUPS, LOG, RECORDS, TIMES, TOPICS, log_row, time_row};
use super::store::Failure;
use super::topics::{TopicLog, lock};
use super::trouble::{Trouble, refusal, refuse};
use crate::lane::contract::{LaneError, LaneState};
use crate::message::{Message, Position, Timestamp};

/// What one commit takes from the line at most.
const BATCH_COMMANDS: usize = 1000;
const BATCH_BYTES: usize = 4 << 20;
/// How often retention looks, and how often a log in trouble is tried again.
const TICK: Duration = Duration::from_secs(1);

pub struct Writer {
    pub(super) log: Arc<Log>,
    line: mpsc::Receiver<Command>,
    /// For its timers; nothing else runs on it.
    runtime: Runtime,
    pub(super) policy_changes: watch::Receiver<u64>,
    pub(super) clock: RetentionClock,
    pub(super) next_tick: Instant,
    /// Retention met damage, and leaves the log alone until then.
    pub(super) retain_again: Instant,
    pub(super) next_topic_id: u32,
    pub(super) commits: u64,
    pub(super) trouble: Option<Trouble>,
    closing: Option<oneshot::Sender<()>>,
}

pub struct Tables<'t> {
    pub records: Table<'t, (u32, u64), &'static [u8]>,
    pub topics: Table<'t, &'static str, &'static [u8]>,
    pub times: Table<'t, (u32, i64), &'static [u8]>,
    pub groups: Table<'t, (u32, &'static str), &'static [u8]>,
    pub log: Table<'t, &'static str, &'static [u8]>,
}

impl<'t> Tables<'t> {
    pub fn open(transaction: &'t WriteTransaction) -> Result<Self, Failure> {
        Ok(Self {
            records: transaction.open_table(RECORDS)?,
            topics: transaction.open_table(TOPICS)?,
            times: transaction.open_table(TIMES)?,
            groups: transaction.open_table(GROUPS)?,
            log: transaction.open_table(LOG)?,
        })
    }
}

/// What a transaction has done, to be made known once it is committed.
#[derive(Default)]
pub struct Staged {
    pub extents: HashMap<*const TopicLog, (Arc<TopicLog>, Extent)>,
    cursors: HashMap<*const Group, Moved>,
    begun: Vec<Arc<Group>>,
    deleted: Vec<Arc<Group>>,
    /// One for each command.
    outcomes: Vec<Outcome>,
}

/// How a group has moved.
struct Moved {
    group: Arc<Group>,
    era: Era,
    cursor: Cursor,
    acked: Vec<u64>,
    sought: bool,
}

impl Staged {
    /// A group that exists, or will with this transaction.
    fn group(&self, log: &Arc<TopicLog>, name: &str) -> Option<Arc<Group>> {
        let known = lock(&log.groups).get(name).cloned().filter(|group| !group.is_deleted());
        known.or_else(|| self.begun.iter().find(|begun| begun.is(log, name)).cloned())
    }

    fn moved(&mut self, group: &Arc<Group>) -> &mut Moved {
        self.cursors.entry(Arc::as_ptr(group)).or_insert_with(|| {
            let (era, cursor) = group.cursor();
            Moved { group: group.clone(), era, cursor, acked: Vec::new(), sought: false }
        })
    }

    /// The rows of everything that moved.
    pub fn write(&self, tables: &mut Tables<'_>) -> Result<(), Failure> {
        for (log, extent) in self.extents.values() {
            tables.topics.insert(log.topic.as_str(), &*extent.row(log.topic.as_str()))?;
        }
        for Moved { group, cursor, .. } in self.cursors.values() {
            let id = group.topic.extent().id;
            tables.groups.insert((id, group.name.as_str()), &*cursor.row(id, &group.name))?;
        }
        Ok(())
    }
}

enum Outcome {
    Stored(u64),
    Told(bool),
    Begun(Arc<Group>),
    Done,
    Refused(LaneError),
}

impl Writer {
    pub fn new(
        log: Arc<Log>,
        line: mpsc::Receiver<Command>,
        next_topic_id: u32,
        commits: u64,
    ) -> std::io::Result<Self> {
        let mut policy_changes = log.policy.changes();
        policy_changes.mark_changed();
        Ok(Self {
            runtime: tokio::runtime::Builder::new_current_thread().enable_time().build()?,
            policy_changes,
            clock: RetentionClock::new(Timestamp::now(), Instant::now()),
            next_tick: Instant::now(),
            retain_again: Instant::now(),
            next_topic_id,
            commits,
            trouble: None,
            closing: None,
            line,
            log,
        })
    }

    /// As `run`; a defect ends the log, and is seen.
    pub fn run_guarded(self) {
        let log = self.log.clone();
        if catch_unwind(AssertUnwindSafe(|| self.run())).is_err() {
            let why = "the log's writer ended by a defect, which is logged; restart twinspan";
            error!("The log's writer ended by a defect.");
            log.state.send_replace(LaneState::Down(why.into()));
            log.closed.cancel();
            log.store.close();
        }
    }

    /// Until the line is closed, by `Command::Close` or by everyone who holds it being gone.
    fn run(mut self) {
        let mut open = true;
        while open && self.closing.is_none() {
            let log = self.log.clone();
            let tick = tokio::time::Instant::from_std(self.next_tick);
            let line = &mut self.line;
            let event = self.runtime.block_on(async {
                tokio::select! {
                    command = line.recv() => Event::Commands(command),
                    () = log.suspect.notified() => Event::Suspect,
                    () = tokio::time::sleep_until(tick) => Event::Tick,
                }
            });
            match event {
                Event::Commands(Some(first)) => self.take(first),
                Event::Commands(None) => open = false,
                Event::Suspect => self.reopen_suspect(),
                Event::Tick => self.tick(),
            }
        }
        self.line.close();
        while let Ok(rest) = self.line.try_recv() {
            self.take(rest);
        }
        self.log.closed.cancel();
        for tail in self.log.topics.followed() {
            tail.fail(closed());
        }
        self.log.store.close();
        if let Some(done) = self.closing {
            // Whoever closed the log may have given up waiting.
            let _ = done.send(());
        }
    }

    /// Takes what waits in line, and commits it at once.
    fn take(&mut self, first: Command) {
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(command) = next {
            match command {
                Command::Close { done } => {
                    self.closing = Some(done);
                    break;
                }
                command => {
                    if let Command::Append { message, .. } = &command {
                        bytes += message.payload.len();
                    }
                    batch.push(command);
                }
            }
            if batch.len() >= BATCH_COMMANDS || bytes >= BATCH_BYTES {
                break;
            }
            next = self.line.try_recv().ok();
        }
        match &self.trouble {
            Some(trouble) => {
                let error = refusal(&trouble.failure);
                batch.into_iter().for_each(|command| refuse(command, &error));
            }
            None => self.commit(batch, bytes),
        }
    }

    /// Looks after retention, or after what is wrong.
    fn tick(&mut self) {
        self.next_tick = Instant::now() + TICK;
        self.clock.advance(Timestamp::now(), Instant::now());
        self.learn_retention();
        match self.trouble {
            Some(_) => self.try_again(),
            None => self.retain(),
        }
    }

    pub(super) fn commit(&mut self, batch: Vec<Command>, bytes: usize) {
        if batch.is_empty() {
            return;
        }
        let log = self.log.clone();
        let number = self.commits + 1;
        let next_topic_id = self.next_topic_id;
        let mut staged = Staged::default();
        let committed = log.store.write(|transaction| {
            let mut tables = Tables::open(transaction)?;
            for command in &batch {
                let outcome = self.stage(&mut tables, &mut staged, command)?;
                staged.outcomes.push(outcome);
            }
            staged.write(&mut tables)?;
            tables.log.insert("commits", &*log_row("commits", &[number]))?;
            Ok(())
        });
        match committed {
            Ok(()) => {
                self.commits = number;
                self.settle(batch, staged);
            }
            Err(failure) => {
                self.next_topic_id = next_topic_id;
                self.fail(batch, bytes, failure, number);
            }
        }
    }

    fn stage(
        &mut self,
        tables: &mut Tables<'_>,
        staged: &mut Staged,
        command: &Command,
    ) -> Result<Outcome, Failure> {
        Ok(match command {
            Command::Append { log, retention, message, .. } => {
                *lock(&log.retention) = *retention;
                Outcome::Stored(append(tables, self.extent(staged, log), message)?)
            }
            Command::Remove { log, before, .. } => {
                let known = log.extent().id != 0 || staged.extents.contains_key(&Arc::as_ptr(log));
                if !known {
                    return Ok(Outcome::Told(true));
                }
                let extent = self.extent(staged, log);
                let end = extent.next.min(*before);
                remove_oldest(tables, extent, REMOVED_MAX, |left| left.first < end)?;
                Outcome::Told(extent.first >= end)
            }
            Command::Create { log, .. } => {
                let known = log.extent().id != 0 || staged.extents.contains_key(&Arc::as_ptr(log));
                self.extent(staged, log);
                Outcome::Told(!known)
            }
            Command::Begin { log, group, floor, .. } => {
                Outcome::Begun(match staged.group(log, group) {
                    Some(group) => group,
                    None => {
                        let extent = self.extent(staged, log);
                        // Retention may have gone on since the floor was found.
                        let (id, cursor) = (extent.id, Cursor::new((*floor).max(extent.first)));
                        tables.groups.insert((id, group.as_str()), &*cursor.row(id, group))?;
                        let begun = Group::new(log.clone(), group.clone(), cursor);
                        staged.begun.push(begun.clone());
                        begun
                    }
                })
            }
            Command::Seek { log, group, floor, .. } => match staged.group(log, group) {
                Some(group) => {
                    let first = self.extent(staged, log).first;
                    let moved = staged.moved(&group);
                    moved.cursor = Cursor::new((*floor).max(first));
                    moved.sought = true;
                    Outcome::Done
                }
                None => {
                    Outcome::Refused(LaneError::BadRequest(format!("`{}` has no group `{group}`", log.topic)))
                }
            },
            Command::Delete { log, group, .. } => match staged.group(log, group) {
                Some(group) => match group.delete() {
                    Ok(()) => {
                        let id = self.extent(staged, log).id;
                        tables.groups.remove((id, group.name.as_str()))?;
                        staged.cursors.remove(&Arc::as_ptr(&group));
                        staged.begun.retain(|begun| !Arc::ptr_eq(begun, &group));
                        staged.deleted.push(group);
                        Outcome::Told(true)
                    }
                    Err(busy) => Outcome::Refused(busy),
                },
                None => Outcome::Told(false),
            },
            Command::Ack { group, era, seqs, .. } => {
                if !group.is_deleted() {
                    let moved = staged.moved(group);
                    if moved.era == *era && !moved.sought {
                        seqs.iter().for_each(|seq| moved.cursor.add(*seq));
                        moved.acked.extend(seqs);
                    }
                }
                Outcome::Done
            }
            Command::Probe { .. } | Command::Close { .. } => Outcome::Done,
        })
    }

    /// The extent of a topic in this transaction; the topic is stored from here on.
    fn extent<'s>(&mut self, staged: &'s mut Staged, log: &Arc<TopicLog>) -> &'s mut Extent {
        let (_, extent) =
            staged.extents.entry(Arc::as_ptr(log)).or_insert_with(|| (log.clone(), log.extent()));
        if extent.id == 0 {
            extent.id = self.next_topic_id;
            self.next_topic_id += 1;
        }
        extent
    }

    /// What was committed is known now, and then answered.
    pub(super) fn settle(&self, batch: Vec<Command>, staged: Staged) {
        let mut stored: HashMap<*const TopicLog, Vec<(u64, Message)>> = HashMap::new();
        let mut answers = Vec::with_capacity(batch.len());
        for (command, outcome) in batch.into_iter().zip(staged.outcomes) {
            answers.push(match (command, outcome) {
                (Command::Append { log, message, room, receipt, .. }, Outcome::Stored(seq)) => {
                    stored.entry(Arc::as_ptr(&log)).or_default().push((seq, message));
                    Answer::Stored(receipt, Position::Whole(log.place(seq)), room)
                }
                (
                    Command::Create { done, .. }
                    | Command::Delete { done, .. }
                    | Command::Remove { done, .. },
                    Outcome::Told(told),
                ) => Answer::Told(done, told),
                (Command::Begin { done, .. }, Outcome::Begun(group)) => Answer::Begun(done, group),
                (
                    Command::Ack { done, .. } | Command::Seek { done, .. } | Command::Probe { done },
                    Outcome::Done,
                ) => Answer::Done(done),
                (command, Outcome::Refused(error)) => Answer::Refused(command, error),
                // The outcomes were made from these very commands, in this order.
                _ => continue,
            });
        }
        for (at, (log, extent)) in staged.extents {
            let messages = stored.remove(&at).unwrap_or_default();
            let before = log.extent();
            let is_new = before.id == 0;
            // It wraps where a topic shrinks.
            self.log.live_bytes.fetch_add(extent.bytes.wrapping_sub(before.bytes), Ordering::Relaxed);
            log.moved(extent, || {
                messages.into_iter().map(|(seq, message)| log.envelope(seq, message)).collect()
            });
            if is_new {
                self.log.topics.is_stored(&log.topic);
            }
        }
        for group in staged.deleted {
            lock(&group.topic.groups).retain(|_, known| !Arc::ptr_eq(known, &group));
        }
        for group in staged.begun {
            lock(&group.topic.groups).insert(group.name.clone(), group.clone());
        }
        for Moved { group, cursor, acked, sought, .. } in staged.cursors.into_values() {
            if sought { group.sought(cursor) } else { group.acknowledged(cursor, &acked) }
        }
        answers.into_iter().for_each(Answer::send);
    }
}

/// An answer that waits until everyone can see what it confirms.
enum Answer {
    Stored(Done<Position>, Position, OwnedSemaphorePermit),
    Told(Done<bool>, bool),
    Begun(Done<Arc<Group>>, Arc<Group>),
    Done(Done<()>),
    Refused(Command, LaneError),
}

impl Answer {
    /// Whoever asked may be gone, and what was done stays done.
    fn send(self) {
        match self {
            Answer::Stored(receipt, position, _room) => drop(receipt.send(Ok(position))),
            Answer::Told(done, told) => drop(done.send(Ok(told))),
            Answer::Begun(done, group) => drop(done.send(Ok(group))),
            Answer::Done(done) => drop(done.send(Ok(()))),
            Answer::Refused(command, error) => refuse(command, &error),
        }
    }
}

/// There is one of these at a time, on the stack.
#[allow(clippy::large_enum_variant)]
enum Event {
    Commands(Option<Command>),
    Suspect,
    Tick,
}

fn append(tables: &mut Tables<'_>, extent: &mut Extent, message: &Message) -> Result<u64, Failure> {
    let seq = extent.next;
    let time = message.ts.as_millis().max(extent.last_time);
    if extent.is_empty() {
        extent.first_time = time;
    }
    if extent.is_empty() || time > extent.last_time {
        tables.times.insert((extent.id, time), &*time_row(extent.id, time, seq))?;
    }
    let mut row = Vec::with_capacity(message.payload.len() + 128);
    seal(&mut row, &record_key(extent.id, seq), |body| encode(message, body));
    tables.records.insert((extent.id, seq), &*row)?;
    extent.next += 1;
    extent.bytes += row.len() as u64;
    extent.last_time = time;
    Ok(seq)
}
