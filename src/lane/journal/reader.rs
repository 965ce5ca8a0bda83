//! Reading one topic from storage: a batch from one snapshot, every record checked, every hole named.

use std::ops::RangeInclusive;
use std::sync::Arc;

use async_trait::async_trait;
use redb::ReadTransaction;
use tracing::warn;

use super::log::Log;
use super::record::{Damaged, decode, record_key, unseal};
use super::rows::{Extent, RECORDS, TIMES, TOPICS, read_time};
use super::store::{Failure, FailureKind, Store};
use super::topics::TopicLog;
use crate::lane::contract::{LaneError, Reader};
use crate::message::{Envelope, Lane, Start};

/// What one batch holds at most; a larger message comes alone.
const BATCH_MESSAGES: u64 = 256;
const BATCH_BYTES: usize = 1 << 20;

/// A record, or a stretch of them that cannot be read.
pub struct Item {
    pub seqs: RangeInclusive<u64>,
    pub found: Result<Arc<Envelope>, LaneError>,
}

pub struct Batch {
    pub items: Vec<Item>,
    /// Where the next batch begins.
    pub next: u64,
    /// Retention has removed what the batch should have begun with.
    pub skipped: bool,
}

/// The next records from `from` on, none where there are none yet. On the last try, records that redb itself cannot
/// reach are named as corrupt up to the end of the topic; before that, opening the store again may help.
pub fn read_batch(
    store: &Store,
    log: &TopicLog,
    from: u64,
    messages: u64,
    last_try: bool,
) -> Result<Batch, Failure> {
    let read = |from, messages| store.read(|snapshot| read_snapshot(snapshot, log, from, messages));
    match read(from, messages.min(BATCH_MESSAGES)) {
        // Some page among these records is damaged: one by one, they come up to it.
        Err(failure) if failure.kind == FailureKind::Damage => match read(from, 1) {
            Err(failure) if failure.kind == FailureKind::Damage => {
                read_behind(|seq| read(seq, 1).map(|_| ()), log, from, last_try, failure)
            }
            one => one,
        },
        batch => batch,
    }
}

/// Finds where records can be read again behind one that cannot: a page holds neighbours, so by doubling and halving.
fn read_behind(
    read: impl Fn(u64) -> Result<(), Failure>,
    log: &TopicLog,
    from: u64,
    last_try: bool,
    failure: Failure,
) -> Result<Batch, Failure> {
    let end = log.extent().next;
    let readable = |seq| match read(seq) {
        Ok(()) => Ok(true),
        Err(failure) if failure.kind == FailureKind::Damage => Ok(false),
        Err(failure) => Err(failure),
    };
    let (mut bad, mut good, mut step) = (from, from + 1, 1);
    while good < end && !readable(good)? {
        bad = good;
        step *= 2;
        good = from.saturating_add(step).min(end);
    }
    if good >= end && !last_try {
        return Err(failure);
    }
    while good - bad > 1 {
        let middle = bad + (good - bad) / 2;
        if readable(middle)? { good = middle } else { bad = middle }
    }
    let seqs = from..=good - 1;
    let found = Err(Log::corrupt(log, &seqs));
    Ok(Batch { items: vec![Item { seqs, found }], next: good, skipped: false })
}

fn read_snapshot(
    snapshot: &ReadTransaction,
    log: &TopicLog,
    from: u64,
    messages: u64,
) -> Result<Batch, Failure> {
    // The extent of this very snapshot: what is missing inside it is damage, what is missing before it was removed.
    let extent = stored_extent(snapshot, log)?;
    let start = from.max(extent.first);
    let mut batch = Batch { items: Vec::new(), next: start, skipped: from < extent.first };
    let end = extent.next.min(start.saturating_add(messages));
    if start >= end {
        return Ok(batch);
    }
    let records = snapshot.open_table(RECORDS)?;
    let mut bytes = 0;
    for entry in records.range((extent.id, start)..(extent.id, end))? {
        let (key, row) = entry?;
        let seq = key.value().1;
        if seq < batch.next {
            return Err(Failure::damage("the records are out of order"));
        }
        batch.missing(log, seq);
        bytes += row.value().len();
        if bytes > BATCH_BYTES && !batch.items.is_empty() {
            return Ok(batch);
        }
        let found = open_record(log, extent.id, seq, row.value());
        batch.items.push(Item { seqs: seq..=seq, found });
        batch.next = seq + 1;
    }
    batch.missing(log, end);
    Ok(batch)
}

impl Batch {
    /// Sequence numbers have no holes: what is not there before `seq` was lost.
    fn missing(&mut self, log: &TopicLog, seq: u64) {
        if self.next < seq {
            let seqs = self.next..=seq - 1;
            let found = Err(Log::corrupt(log, &seqs));
            self.items.push(Item { seqs, found });
            self.next = seq;
        }
    }
}

fn stored_extent(snapshot: &ReadTransaction, log: &TopicLog) -> Result<Extent, Failure> {
    let topics = snapshot.open_table(TOPICS)?;
    match topics.get(log.topic.as_str())? {
        Some(row) => Ok(Extent::read(log.topic.as_str(), row.value())?),
        None if log.extent().id == 0 => Ok(Extent::NONE),
        None => Err(Failure::damage(format!("the entry of topic {} is gone", log.topic))),
    }
}

fn open_record(log: &TopicLog, id: u32, seq: u64, row: &[u8]) -> Result<Arc<Envelope>, LaneError> {
    match unseal(&record_key(id, seq), row).and_then(decode) {
        Ok(message) => Ok(log.envelope(seq, message)),
        Err(Damaged) => Err(Log::corrupt(log, &(seq..=seq))),
    }
}

/// Single records, such as those to be handed out again.
#[derive(Default)]
pub struct Picked {
    pub items: Vec<Item>,
    /// Those that retention has removed.
    pub removed: Vec<u64>,
}

/// These records, or the first of them where they are large: from one snapshot, unless some page among them is damaged.
pub fn read_some(store: &Store, log: &TopicLog, seqs: &[u64], last_try: bool) -> Result<Picked, Failure> {
    match store.read(|snapshot| pick(seqs, |seq| read_snapshot(snapshot, log, seq, 1))) {
        Err(failure) if failure.kind == FailureKind::Damage => {
            pick(seqs, |seq| read_batch(store, log, seq, 1, last_try))
        }
        picked => picked,
    }
}

fn pick(seqs: &[u64], read: impl Fn(u64) -> Result<Batch, Failure>) -> Result<Picked, Failure> {
    let mut picked = Picked::default();
    let mut bytes = 0;
    for seq in seqs {
        let batch = read(*seq)?;
        if batch.skipped {
            picked.removed.push(*seq);
            continue;
        }
        for item in batch.items.into_iter().take(1) {
            bytes += item.found.as_ref().map_or(0, |envelope| envelope.weight());
            picked.items.push(item);
        }
        if bytes > BATCH_BYTES {
            break;
        }
    }
    Ok(picked)
}

/// The first sequence number that `start` asks for, and whether retention has removed some of what it asks for.
pub fn resolve(store: &Store, log: &TopicLog, start: &Start) -> Result<(u64, bool), Failure> {
    let extent = log.extent();
    Ok(match start {
        Start::Latest => (extent.next, false),
        Start::Earliest => (extent.first, false),
        Start::Last(count) => (extent.next.saturating_sub((*count).into()).max(extent.first), false),
        Start::After(position) => {
            let after = position.place(0).map_or(0, |place| place.entry) + 1;
            (after.max(extent.first), after < extent.first)
        }
        Start::Time(time) => {
            let removed = time.as_millis() <= extent.removed_time;
            let seq = match first_since(store, extent.id, time.as_millis()) {
                Err(failure) if failure.kind == FailureKind::Damage => {
                    warn!(topic = %log.topic, what = failure.what, "The time index is damaged; replaying everything.");
                    extent.first
                }
                found => found?.unwrap_or(extent.next),
            };
            (seq.max(extent.first), removed)
        }
        Start::Resume { .. } => return resolve(store, log, &start.for_topic(&log.topic)),
    })
}

fn first_since(store: &Store, id: u32, millis: i64) -> Result<Option<u64>, Failure> {
    store.read(|snapshot| {
        let times = snapshot.open_table(TIMES)?;
        let Some(entry) = times.range((id, millis)..=(id, i64::MAX))?.next() else { return Ok(None) };
        let (key, row) = entry?;
        Ok(Some(read_time(id, key.value().1, row.value())?))
    })
}

/// Whether a position can be served by this log.
pub fn check_position(epoch: u64, log: &TopicLog, start: &Start) -> Result<(), LaneError> {
    let Start::After(position) = start else { return Ok(()) };
    match position.place(0) {
        Some(place) if place.ledger == epoch && place.index == 0 => {
            let end = log.extent().next;
            if place.entry < end {
                return Ok(());
            }
            Err(LaneError::BadRequest(format!(
                "position {position} is beyond the end of `{}` ({}): was the log restored from an older copy? Ask for \
                 a time, or for earliest",
                log.topic,
                log.place(end - 1)
            )))
        }
        _ => Err(LaneError::BadRequest(format!(
            "position {position} is of another log: those of this one begin with {epoch}-. Ask for a time, or for \
             earliest"
        ))),
    }
}

pub struct LogReader {
    log: Arc<Log>,
    topic: Arc<TopicLog>,
    route: Arc<str>,
    next: u64,
    /// What was stored later is the tail's.
    end: u64,
    skipped: bool,
}

impl LogReader {
    pub async fn open(
        log: Arc<Log>,
        topic: Arc<TopicLog>,
        route: Arc<str>,
        start: Start,
    ) -> Result<Self, LaneError> {
        let (next, skipped) = begin(&log, &topic, start).await?;
        let end = topic.extent().next;
        Ok(Self { log, topic, route, next, end, skipped })
    }
}

/// Where `start` begins, in a log that can serve it.
pub async fn begin(log: &Arc<Log>, topic: &Arc<TopicLog>, start: Start) -> Result<(u64, bool), LaneError> {
    let start = start.for_topic(&topic.topic);
    check_position(log.store.epoch(), topic, &start)?;
    let topic = topic.clone();
    log.read(move |store, _| resolve(store, &topic, &start)).await
}

#[async_trait]
impl Reader for LogReader {
    async fn next(&mut self) -> Result<Option<Vec<Result<Arc<Envelope>, LaneError>>>, LaneError> {
        while self.next < self.end {
            let (topic, from, messages) = (self.topic.clone(), self.next, self.end - self.next);
            let read = move |store: &Store, last_try| read_batch(store, &topic, from, messages, last_try);
            let batch = self.log.read(read).await?;
            // Nothing is awaited from here on: a dropped call has moved nothing.
            self.skipped |= batch.skipped;
            // Retention may have gone past the end meanwhile.
            let items: Vec<_> =
                batch.items.into_iter().filter(|item| *item.seqs.start() < self.end).collect();
            self.next = if items.is_empty() { self.end } else { batch.next };
            for item in items.iter().filter(|item| item.found.is_err()) {
                let lost = item.seqs.end() - item.seqs.start() + 1;
                self.log.metrics.dropped(Lane::Durable, &self.route, "corrupt", lost);
            }
            if !items.is_empty() {
                return Ok(Some(items.into_iter().map(|item| item.found).collect()));
            }
        }
        Ok(None)
    }

    fn skipped(&mut self) -> bool {
        std::mem::take(&mut self.skipped)
    }
}
