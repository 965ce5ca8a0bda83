//! A topic read from storage: a feed for each partition, merged as they bring.
//!
//! ```text
//! partition 0 ──feed──▶ ┐
//! partition 1 ──feed──▶ ├──▶ reader: each message with the place reached in every partition
//! partition 2 ──feed──▶ ┘
//! ```

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::try_join_all;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::admin::Admin;
use super::cluster::Cluster;
use super::fault::Fault;
use super::feed::{Backoff, Feed, From, newest};
use super::names::Physical;
use super::record::Record;
use crate::lane::contract::{LaneError, Reader};
use crate::message::{Envelope, Place, Position, Start, Stored, Timestamp};
use crate::topic::Topic;

/// What feeds have brought and nobody has taken: batches of records. A feed waits while it is full.
const WAITING: usize = 2;
/// Partitions are only ever added, and rarely.
const GROWTH_EVERY: Duration = Duration::from_secs(60);
/// How long the newest entries of a partition may take to be looked through.
const LOOK_BACK_TIMEOUT: Duration = Duration::from_secs(10);

/// A topic as one reads it.
#[derive(Clone)]
pub struct Source {
    pub cluster: Arc<Cluster>,
    pub topic: Topic,
    pub physical: Physical,
    /// Zero: it has none.
    pub partitions: u32,
}

impl Source {
    pub async fn find(cluster: Arc<Cluster>, topic: Topic, physical: Physical) -> Result<Self, Fault> {
        let partitions = cluster.partitions(&physical).await?;
        Ok(Self { cluster, topic, physical, partitions })
    }

    /// Each partition's number and name; a topic that is not partitioned is its own partition 0.
    pub fn parts(&self) -> Vec<(u32, Physical)> {
        (0..self.partitions.max(1)).map(|number| (number, self.part(number))).collect()
    }

    pub fn part(&self, number: u32) -> Physical {
        match self.partitions {
            0 => self.physical.clone(),
            _ => self.physical.partition(number),
        }
    }

    /// The newest place of each partition that has any.
    pub async fn newest(&self) -> Result<BTreeMap<u32, Place>, Fault> {
        let asked = self.parts().into_iter().map(|(number, physical)| async move {
            newest(&self.cluster, &physical).await.map(|place| place.map(|place| (number, place)))
        });
        Ok(try_join_all(asked).await?.into_iter().flatten().collect())
    }
}

/// Where each partition begins, where it ended when the plan was made, and the position that the beginning is.
pub struct Plan {
    pub from: BTreeMap<u32, From>,
    pub newest: BTreeMap<u32, Place>,
    pub vector: Vector,
}

impl Plan {
    /// Begins with what is stored from now on.
    pub async fn now(source: &Source) -> Result<Self, Fault> {
        let newest = source.newest().await?;
        Ok(Self::after(source, newest.clone(), newest))
    }

    /// Begins after these places, and with the oldest where a partition has none.
    fn after(source: &Source, reached: BTreeMap<u32, Place>, newest: BTreeMap<u32, Place>) -> Self {
        let begin = |number| reached.get(&number).map_or(From::Earliest, |place| From::After(*place));
        let from = source.parts().into_iter().map(|(number, _)| (number, begin(number))).collect();
        // What a position of this topic does not name was empty, so whatever comes there is new.
        let vector = Vector::new(source, reached, Timestamp::default());
        Self { from, newest, vector }
    }

    pub async fn make(source: &Source, admin: &Admin, start: Start) -> Result<Self, LaneError> {
        let start = start.for_topic(&source.topic);
        if let Start::Last(n) = start {
            return Self::last(source, admin, n).await;
        }
        let newest = source.newest().await.map_err(Fault::on_lane)?;
        match start {
            Start::Earliest => Ok(Self::after(source, BTreeMap::new(), newest)),
            Start::Time(time) => {
                let vector = Vector::new(source, BTreeMap::new(), time);
                Self { from: BTreeMap::new(), newest, vector }.others_from(source, time).await
            }
            Start::After(position) => Self::resume(source, position, newest).await,
            Start::Latest | Start::Last(_) | Start::Resume { .. } => {
                Ok(Self::after(source, newest.clone(), newest))
            }
        }
    }

    async fn resume(
        source: &Source,
        position: Position,
        newest: BTreeMap<u32, Place>,
    ) -> Result<Self, LaneError> {
        match (position, source.partitions) {
            (Position::Whole(place), 0) => Ok(Self::after(source, [(0, place)].into(), newest)),
            (Position::Partitioned { reached, others_from }, 1..) => {
                let from = reached.iter().map(|(number, place)| (*number, From::After(*place))).collect();
                let vector = Vector::new(source, (*reached).clone(), others_from);
                Self { from, newest, vector }.others_from(source, others_from).await
            }
            (position, _) => Err(LaneError::BadRequest(format!(
                "position `{position}` is none of `{}`: {}",
                source.topic,
                if source.partitions == 0 { "it has no partitions" } else { "it has partitions" },
            ))),
        }
    }

    /// Begins at a time wherever nothing else is said.
    async fn others_from(mut self, source: &Source, time: Timestamp) -> Result<Self, LaneError> {
        for (number, physical) in source.parts() {
            if self.from.contains_key(&number) {
                continue;
            }
            let from = match self.newest.get(&number) {
                // The broker finds a time's place only where something was stored since; else that place is the end.
                Some(end) if is_older(source, number, physical, *end, time).await? => From::After(*end),
                Some(_) => From::Time(time),
                None => From::Earliest,
            };
            self.from.insert(number, from);
        }
        Ok(self)
    }

    /// The newest n messages. The broker counts entries and an entry may be a batch, so they are looked through first:
    /// only their places are kept, and what is then read is read as ever.
    async fn last(source: &Source, admin: &Admin, n: u32) -> Result<Self, LaneError> {
        let begins = source.parts().into_iter().map(|(number, physical)| async move {
            let first = if n == 0 { None } else { admin.examine(&physical, n).await? };
            Ok::<_, LaneError>((number, physical, first.map_or(From::Earliest, From::At)))
        });
        let begins = try_join_all(begins).await?;
        // After that, because what others publish in between would else leave fewer than n up to the end.
        let newest = source.newest().await.map_err(Fault::on_lane)?;
        let mut plan = Self::after(source, newest.clone(), newest.clone());
        let looked = begins.into_iter().filter_map(|(number, physical, from)| {
            let end = *newest.get(&number)?;
            Some(look_back(source, number, physical, (from, end), n))
        });
        let mut found: Vec<_> = try_join_all(looked).await?.into_iter().flatten().collect();
        // By time over all partitions; within one the order of storage stays.
        found.sort_by_key(|seen| seen.published);
        let surplus = found.len().saturating_sub(n as usize);
        let kept = &found[surplus..];
        for seen in kept.iter().rev() {
            let first = match plan.from.get(&seen.partition) {
                Some(From::At(place)) => seen.place.min(*place),
                _ => seen.place,
            };
            plan.from.insert(seen.partition, From::At(first));
        }
        let none =
            newest.into_iter().filter(|(number, _)| !matches!(plan.from.get(number), Some(From::At(_))));
        let oldest = kept.iter().map(|seen| seen.ts).min().unwrap_or_default();
        plan.vector = Vector::new(source, none.collect(), oldest);
        Ok(plan)
    }
}

#[derive(Debug, Clone, Copy)]
struct Seen {
    partition: u32,
    place: Place,
    published: Timestamp,
    ts: Timestamp,
}

/// The newest n messages of one partition between these places, oldest first.
async fn look_back(
    source: &Source,
    partition: u32,
    physical: Physical,
    (from, end): (From, Place),
    n: u32,
) -> Result<Vec<Seen>, LaneError> {
    if n == 0 {
        return Ok(Vec::new());
    }
    let looking = async {
        let (cluster, topic) = (source.cluster.clone(), source.topic.clone());
        let mut feed = Feed::open(cluster, topic, partition, physical, (from, Some(end))).await?;
        // Places only, so that ten thousand large messages are no burden.
        let mut ring = VecDeque::with_capacity(n as usize);
        while let Some(records) = feed.next().await? {
            for Record { place, published, message } in records {
                if ring.len() == n as usize {
                    ring.pop_front();
                }
                let ts = message.map_or(published, |message| message.ts);
                // The clocks of two publishers may differ; the order of storage counts.
                let before = ring.back().map_or(published, |seen: &Seen| seen.published);
                let published = published.max(before);
                ring.push_back(Seen { partition, place, published, ts });
            }
        }
        Ok(ring.into())
    };
    in_time(source, looking).await
}

/// Whether the newest message of a partition was published before a time.
async fn is_older(
    source: &Source,
    partition: u32,
    physical: Physical,
    end: Place,
    time: Timestamp,
) -> Result<bool, LaneError> {
    let looking = async {
        let (cluster, topic) = (source.cluster.clone(), source.topic.clone());
        let only = (From::At(end), Some(end));
        let mut feed = Feed::open(cluster, topic, partition, physical, only).await?;
        let newest = feed.next().await?.and_then(|records| records.last().map(|record| record.published));
        Ok(newest.is_none_or(|published| published < time))
    };
    in_time(source, looking).await
}

async fn in_time<T>(
    source: &Source,
    looking: impl Future<Output = Result<T, Fault>>,
) -> Result<T, LaneError> {
    match tokio::time::timeout(LOOK_BACK_TIMEOUT, looking).await {
        Ok(found) => found.map_err(Fault::on_lane),
        Err(_) => Err(LaneError::Unavailable(format!("`{}` could not be read back in time", source.topic))),
    }
}

/// What has been reached in each partition.
pub struct Vector {
    partitioned: bool,
    reached: Arc<BTreeMap<u32, Place>>,
    others_from: Timestamp,
}

impl Vector {
    fn new(source: &Source, reached: BTreeMap<u32, Place>, others_from: Timestamp) -> Self {
        Self { partitioned: source.partitions > 0, reached: Arc::new(reached), others_from }
    }

    /// The position now; `None` where a topic without partitions was empty.
    pub fn position(&self) -> Option<Position> {
        if !self.partitioned {
            return self.reached.get(&0).map(|place| Position::Whole(*place));
        }
        Some(Position::Partitioned { reached: self.reached.clone(), others_from: self.others_from })
    }

    fn reach(&mut self, partition: u32, place: Place) -> Position {
        if !self.partitioned {
            return Position::Whole(place);
        }
        // Copied for each message, as each carries the whole vector; partitions are few.
        Arc::make_mut(&mut self.reached).insert(partition, place);
        Position::Partitioned { reached: self.reached.clone(), others_from: self.others_from }
    }
}

/// What a feed brings to its reader.
type Line = (u32, Result<(Vec<Record>, bool), Fault>);

pub struct TopicReader {
    topic: Topic,
    lines: mpsc::Receiver<Line>,
    vector: Vector,
    skipped: bool,
    _feeds: AbortOnDropHandle<()>,
}

impl TopicReader {
    /// Reads up to where the topic ended when the plan was made.
    pub async fn open(source: Source, plan: Plan) -> Result<Self, Fault> {
        let Plan { from, newest, vector } = plan;
        let mut parts = Vec::new();
        for (number, end) in newest {
            let from = from.get(&number).copied().unwrap_or(From::Earliest);
            if !matches!(from, From::After(place) if place >= end) {
                parts.push((number, from, Some(end)));
            }
        }
        Self::begin(source, parts, vector, false).await
    }

    /// Reads for as long as it is there.
    pub async fn follow(source: Source, plan: Plan) -> Result<Self, Fault> {
        let parts = plan.from.into_iter().map(|(number, from)| (number, from, None)).collect();
        Self::begin(source, parts, plan.vector, true).await
    }

    async fn begin(
        source: Source,
        parts: Vec<(u32, From, Option<Place>)>,
        vector: Vector,
        grows: bool,
    ) -> Result<Self, Fault> {
        let opened = parts.into_iter().map(|(number, from, until)| {
            let physical = source.part(number);
            let (cluster, topic) = (source.cluster.clone(), source.topic.clone());
            async move { Ok((number, Feed::open(cluster, topic, number, physical, (from, until)).await?)) }
        });
        let feeds = try_join_all(opened).await?;
        let (lines, taken) = mpsc::channel(WAITING);
        let topic = source.topic.clone();
        let run = AbortOnDropHandle::new(tokio::spawn(run(source, feeds, lines, grows)));
        Ok(Self { topic, lines: taken, vector, skipped: false, _feeds: run })
    }
}

/// Runs the feeds, and one for each partition that is added.
async fn run(source: Source, feeds: Vec<(u32, Feed)>, lines: mpsc::Sender<Line>, grows: bool) {
    let mut tasks = JoinSet::new();
    for (number, feed) in feeds {
        tasks.spawn(pump(number, feed, lines.clone()));
    }
    let mut count = source.partitions;
    let mut backoff = Backoff::default();
    while grows && count > 0 {
        tokio::time::sleep(GROWTH_EVERY).await;
        // While the broker cannot be asked, the question waits for the next round.
        let now = source.cluster.partitions(&source.physical).await.unwrap_or(count);
        while count < now {
            let (cluster, topic) = (source.cluster.clone(), source.topic.clone());
            match Feed::open(cluster, topic, count, source.part(count), (From::Earliest, None)).await {
                Ok(feed) => {
                    tasks.spawn(pump(count, feed, lines.clone()));
                    count += 1;
                    backoff.reset();
                }
                Err(_) => backoff.wait().await,
            }
        }
    }
    while tasks.join_next().await.is_some() {}
}

async fn pump(number: u32, mut feed: Feed, lines: mpsc::Sender<Line>) {
    while let Some(brought) = feed.next().await.transpose() {
        let failed = brought.is_err();
        let skipped = std::mem::take(&mut feed.skipped);
        if lines.send((number, brought.map(|records| (records, skipped)))).await.is_err() || failed {
            return;
        }
    }
    if feed.skipped {
        // The last word of a feed whose end retention has removed; nobody to hear it is no loss.
        let _ = lines.send((number, Ok((Vec::new(), true)))).await;
    }
}

#[async_trait]
impl Reader for TopicReader {
    async fn next(&mut self) -> Result<Option<Vec<Result<Arc<Envelope>, LaneError>>>, LaneError> {
        while let Some((partition, brought)) = self.lines.recv().await {
            let (records, skipped) = brought.map_err(Fault::on_lane)?;
            self.skipped |= skipped;
            if records.is_empty() {
                continue;
            }
            let envelope = |Record { place, message, .. }| match message {
                Ok(message) => {
                    let position = self.vector.reach(partition, place);
                    let stored = Stored { partition, place, position };
                    Ok(Arc::new(Envelope::durable(self.topic.clone(), message, stored)))
                }
                Err(unreadable) => Err(unreadable.on_lane(&self.topic, partition, place)),
            };
            return Ok(Some(records.into_iter().map(envelope).collect()));
        }
        Ok(None)
    }

    fn skipped(&mut self) -> bool {
        std::mem::take(&mut self.skipped)
    }
}
