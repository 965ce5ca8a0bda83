//! One partition, read from a place on, for as long as anybody wants it.
//!
//! The broker forgets a reader's place when the connection goes, so the feed remembers it: whatever ends the
//! subscription (a cut, a frozen broker, a topic that moves), it subscribes again at the last entry that came, which
//! comes once more and is dropped. A feed ends where it was told to, or with an error that trying again would not cure.

use std::sync::Arc;
use std::time::Duration;

use pulsar::proto::command_subscribe::{InitialPosition, SubType};
use pulsar::proto::{CommandSubscribe, MessageIdData};
use tokio::time::Instant;
use tracing::warn;
use uuid::Uuid;

use super::cluster::Cluster;
use super::consumer::Consumer;
use super::fault::Fault;
use super::names::Physical;
use super::record::{self, Record};
use super::session::Delivery;
use crate::message::{Place, Timestamp};
use crate::topic::Topic;

/// What the broker may send ahead of us, in bytes as far as the sizes so far tell, and in messages.
const AHEAD_BYTES: usize = 4 << 20;
const AHEAD_MESSAGES: i64 = 1000;
/// Before any size is known.
const AHEAD_AT_FIRST: i64 = 100;
/// How many records one `next` brings at most, but for a larger batch.
const RECORDS: usize = 256;

/// A feed that has an end and hears nothing for so long asks whether the end is still stored.
const SILENCE: Duration = Duration::from_secs(5);

/// A topic that moves to another broker is served again after some ten milliseconds, mostly less than 200: as long as
/// that is so, the waits double `STEPS` times only, since each is as long as what it may come too late by.
const BACKOFF_FIRST: Duration = Duration::from_millis(10);
const STEPS: u32 = 2;
const MOVING: u32 = 12;
const BACKOFF_MAX: Duration = Duration::from_secs(2);
/// A topic that moves just now is served again within this time.
const SETTLE_DOWN: Duration = Duration::from_secs(3);

/// Waits between attempts: longer each time, and not in step with others.
pub struct Backoff {
    first: Duration,
    max: Duration,
    failed: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::between((BACKOFF_FIRST, BACKOFF_MAX))
    }
}

impl Backoff {
    pub fn between((first, max): (Duration, Duration)) -> Self {
        Self { first, max, failed: 0 }
    }

    pub fn reset(&mut self) {
        self.failed = 0;
    }

    /// Nothing has failed since the last success: worth a line in the log, which the next failures are not.
    pub fn is_first(&self) -> bool {
        self.failed == 0
    }

    /// How long to wait after another failure.
    pub fn next(&mut self) -> Duration {
        let doubled = self.failed.min(STEPS) + self.failed.saturating_sub(MOVING).min(10);
        let delay = self.first.saturating_mul(1 << doubled).min(self.max);
        self.failed = self.failed.saturating_add(1);
        delay.mul_f64(0.5 + fastrand::f64() / 2.0)
    }

    pub async fn wait(&mut self) {
        tokio::time::sleep(self.next()).await;
    }
}

/// With a topic that is asked for the first time and moves just now. What is refused for another reason is refused at
/// once.
pub struct Patience {
    began: Instant,
    backoff: Backoff,
}

impl Default for Patience {
    fn default() -> Self {
        Self { began: Instant::now(), backoff: Backoff::default() }
    }
}

impl Patience {
    /// Waits, so that it can be tried again; or hands the fault back.
    pub async fn bear(&mut self, fault: Fault) -> Result<(), Fault> {
        if !fault.is_passing() || self.began.elapsed() > SETTLE_DOWN {
            return Err(fault);
        }
        self.backoff.wait().await;
        Ok(())
    }
}

/// Where a feed begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    Earliest,
    /// With the message at this place.
    At(Place),
    /// With the one after it.
    After(Place),
    /// With the first that was accepted at this time or later.
    Time(Timestamp),
}

pub struct Feed {
    cluster: Arc<Cluster>,
    topic: Topic,
    partition: u32,
    physical: Physical,
    from: From,
    /// The last that is wanted; none: whatever comes.
    until: Option<Place>,
    ended: bool,
    /// The last that came.
    last: Option<Place>,
    consumer: Option<Consumer>,
    ahead: Ahead,
    backoff: Backoff,
    /// Storage no longer held where we wanted to begin or go on.
    pub skipped: bool,
    /// The next entry is the first since we subscribed.
    fresh: bool,
}

impl Feed {
    /// Subscribes for the first time, so that what is refused is refused at once.
    pub async fn open(
        cluster: Arc<Cluster>,
        topic: Topic,
        partition: u32,
        physical: Physical,
        (from, until): (From, Option<Place>),
    ) -> Result<Self, Fault> {
        let mut feed = Self {
            cluster,
            topic,
            partition,
            physical,
            from,
            until,
            ended: false,
            last: None,
            consumer: None,
            ahead: Ahead::default(),
            backoff: Backoff::default(),
            skipped: false,
            fresh: true,
        };
        let mut patience = Patience::default();
        loop {
            match feed.subscribe().await {
                Ok(consumer) => {
                    feed.consumer = Some(consumer);
                    return Ok(feed);
                }
                Err(fault) => patience.bear(fault).await?,
            }
        }
    }

    /// The next records, at least one; `None` once the end was reached.
    pub async fn next(&mut self) -> Result<Option<Vec<Record>>, Fault> {
        while !self.ended {
            let consumer = match &mut self.consumer {
                Some(consumer) => consumer,
                None => match self.subscribe().await {
                    Ok(consumer) => self.consumer.insert(consumer),
                    Err(fault) if fault.is_lasting() => return Err(fault),
                    Err(fault) => {
                        if self.backoff.is_first() {
                            warn!(topic = %self.physical, %fault, "Cannot read a durable topic; trying until it can be.");
                        }
                        self.backoff.wait().await;
                        continue;
                    }
                },
            };
            let event = match self.until {
                Some(_) => tokio::time::timeout(SILENCE, consumer.next()).await,
                None => Ok(consumer.next().await),
            };
            let first = match event {
                Ok(Some(first)) => first,
                Ok(None) => {
                    self.consumer = None;
                    continue;
                }
                Err(_) => {
                    self.ended = matches!(newest(&self.cluster, &self.physical).await, Ok(None));
                    self.skipped |= self.ended;
                    continue;
                }
            };
            self.backoff.reset();
            let (mut records, mut count, mut next) = (Vec::new(), 0, Some(first));
            while let Some(delivery) = next {
                count += self.take(delivery, &mut records);
                next = match &mut self.consumer {
                    Some(consumer) if count < RECORDS => consumer.try_next(),
                    _ => None,
                };
            }
            if let (Some(consumer), Some(permits)) = (&self.consumer, self.ahead.permits())
                && consumer.permit(permits).await.is_err()
            {
                self.consumer = None;
            }
            if !records.is_empty() {
                return Ok(Some(records));
            }
        }
        Ok(None)
    }

    /// Takes the wanted messages of an entry. Returns how many it holds.
    fn take(&mut self, delivery: Delivery, into: &mut Vec<Record>) -> usize {
        let Delivery { place: first, entry, .. } = delivery;
        let entry = entry.open();
        let count = record::count(&entry);
        self.ahead.came(count, entry.as_ref().map_or(0, |entry| entry.data.len()));
        let came = (first.ledger, first.entry);
        let floor = self.floor();
        if std::mem::take(&mut self.fresh) {
            // We subscribe at the floor's own entry: where another comes first, that one is gone.
            self.skipped |= floor.is_some_and(|floor| (floor.ledger, floor.entry) < came);
        }
        self.ended |= self.until.is_some_and(|until| came >= (until.ledger, until.entry));
        let inclusive = self.last.is_none() && matches!(self.from, From::At(_));
        let wanted = |index| {
            let place = Place { index, ..first };
            floor.is_none_or(|floor| place > floor || (inclusive && place == floor))
                && self.until.is_none_or(|until| place <= until)
        };
        let before = into.len();
        record::unpack(&self.topic, self.partition, first, entry, wanted, into);
        // Of an entry that cannot be read nothing says what it held.
        into.extract_if(before.., |record| !wanted(record.place.index)).for_each(drop);
        if let (From::Time(from), None) = (self.from, self.last) {
            // The broker looked at publish times, and a message is accepted a little before it is published.
            let is_later = |record: &Record| record.message.as_ref().is_ok_and(|message| message.ts >= from);
            into.extract_if(before.., |record| !is_later(record)).for_each(drop);
        }
        if let Some(record) = into[before..].last() {
            self.last = Some(record.place);
        }
        count as usize
    }

    /// What lies before it has come or is not wanted.
    fn floor(&self) -> Option<Place> {
        self.last.or(match self.from {
            From::At(place) | From::After(place) => Some(place),
            From::Earliest | From::Time(_) => None,
        })
    }

    async fn subscribe(&mut self) -> Result<Consumer, Fault> {
        let session = self.cluster.owner(&self.physical).await?;
        let start = self.floor();
        // A reader's subscription is its own, and a name that is not yet free would only make it wait.
        let subscribe = CommandSubscribe {
            topic: self.physical.as_str().into(),
            subscription: format!("twinspan-reader-{}", Uuid::now_v7().simple()),
            sub_type: SubType::Exclusive as i32,
            durable: Some(false),
            start_message_id: Some(match start {
                Some(place) => {
                    MessageIdData { ledger_id: place.ledger, entry_id: place.entry, ..Default::default() }
                }
                None => MessageIdData { ledger_id: u64::MAX, entry_id: u64::MAX, ..Default::default() },
            }),
            initial_position: Some(InitialPosition::Earliest as i32),
            ..Default::default()
        };
        let mut consumer = Consumer::subscribe(session.clone(), subscribe.clone()).await?;
        if let (From::Time(time), None) = (self.from, self.last) {
            consumer.seek(time.as_millis().max(0) as u64).await?;
            consumer = Consumer::subscribe(session, CommandSubscribe { start_message_id: None, ..subscribe })
                .await?;
        }
        self.fresh = start.is_some();
        self.ahead.begin();
        if let Some(permits) = self.ahead.permits() {
            consumer.permit(permits).await?;
        }
        Ok(consumer)
    }
}

/// The newest place of a partition; `None` where it is empty.
pub async fn newest(cluster: &Cluster, physical: &Physical) -> Result<Option<Place>, Fault> {
    let mut patience = Patience::default();
    loop {
        match ask_for_newest(cluster, physical).await {
            Ok(newest) => return Ok(newest),
            Err(fault) => patience.bear(fault).await?,
        }
    }
}

async fn ask_for_newest(cluster: &Cluster, physical: &Physical) -> Result<Option<Place>, Fault> {
    let session = cluster.owner(physical).await?;
    let subscribe = CommandSubscribe {
        topic: physical.as_str().into(),
        subscription: format!("twinspan-reader-{}", Uuid::now_v7().simple()),
        sub_type: SubType::Exclusive as i32,
        durable: Some(false),
        initial_position: Some(InitialPosition::Latest as i32),
        ..Default::default()
    };
    let last = Consumer::subscribe(session, subscribe).await?.last().await?;
    Ok(last.map(|id| place(&id)))
}

pub fn place(id: &MessageIdData) -> Place {
    let index = id.batch_index.unwrap_or_default().max(0) as u32;
    Place { ledger: id.ledger_id, entry: id.entry_id, index }
}

/// How far the broker may run ahead of us: permits count messages, and what matters is their bytes.
#[derive(Default)]
struct Ahead {
    /// Permits that the broker has left; below zero after a batch that was larger.
    given: i64,
    messages: u64,
    bytes: u64,
}

impl Ahead {
    /// A new subscription begins with none.
    fn begin(&mut self) {
        self.given = 0;
    }

    fn came(&mut self, messages: u32, bytes: usize) {
        self.given -= i64::from(messages);
        // The newest tell most: what is remembered halves now and then.
        if self.messages > 10_000 {
            (self.messages, self.bytes) = (self.messages / 2, self.bytes / 2);
        }
        self.messages += u64::from(messages);
        self.bytes += bytes as u64;
    }

    /// What to give now, once half of it is used.
    fn permits(&mut self) -> Option<u32> {
        let wanted = match self.bytes.checked_div(self.messages) {
            Some(average) => (AHEAD_BYTES as i64 / average.max(1) as i64).clamp(1, AHEAD_MESSAGES),
            None => AHEAD_AT_FIRST,
        };
        let missing = wanted - self.given;
        if missing <= 0 || self.given * 2 > wanted {
            return None;
        }
        self.given = wanted;
        u32::try_from(missing).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_are_close_together_for_as_long_as_a_topic_moves_and_rare_when_it_is_away() {
        let mut backoff = Backoff::default();
        let mut waited = Duration::ZERO;
        while waited < Duration::from_millis(200) {
            let wait = backoff.next();
            assert!(wait <= Duration::from_millis(40), "{wait:?} after {waited:?}");
            waited += wait;
        }
        for _ in 0..20 {
            backoff.next();
        }
        assert!(backoff.next() >= BACKOFF_MAX / 2);
        backoff.reset();
        assert!(backoff.next() <= BACKOFF_FIRST);
    }

    #[test]
    fn the_broker_runs_ahead_by_messages_that_are_small_and_by_bytes_that_are_many() {
        let mut ahead = Ahead::default();
        assert_eq!(ahead.permits(), Some(100));
        assert_eq!(ahead.permits(), None);
        ahead.came(60, 60 * 100);
        assert_eq!(ahead.permits(), Some(960));
        let mut large = Ahead::default();
        large.permits();
        large.came(100, 100 << 20);
        assert_eq!(large.permits(), Some(4));
        large.came(1, 1 << 20);
        assert_eq!(large.permits(), None);
    }
}
