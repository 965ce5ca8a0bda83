//! A place in a group: a subscription of Pulsar's, one consumer for each partition.
//!
//! ```text
//! partition 0 ──share──▶ ┐                 ┌──▶ next
//!                        ├──▶ desk ────────┤
//! partition 1 ──share──▶ ┘  (ready, held)  └◀── ack, nack ──▶ the partition's share ──▶ broker
//! ```
//! The desk is what the member sees: what is ready, and how much of it is in the client's hands. Each share owns its
//! partition's consumer and does the settling (see `share`).

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use foldhash::fast::RandomState;
use futures_util::future::try_join_all;
use pulsar::proto::command_subscribe::InitialPosition;
use tokio::sync::{Barrier, Notify, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::admin::Admin;
use super::fault::Fault;
use super::feed::{Backoff, From};
use super::held::Lost;
use super::names::Physical;
use super::read::{Plan, Source};
use super::share::{Membership, Settle, Share};
use crate::lane::contract::{Handed, Joining, LaneError, Member, Tag};
use crate::message::Start;

/// Acks and nacks that wait for a share. The member waits while it is full.
const SETTLING: usize = 64;
/// How long a seek waits for each of a member's shares to stand still.
const PAUSE: Duration = Duration::from_secs(1);
/// Partitions are only ever added, and rarely.
const GROWTH_EVERY: Duration = Duration::from_secs(60);

/// What lies between the shares and the member.
pub struct Desk {
    prefetch: usize,
    papers: Mutex<Papers>,
    /// Something became ready, or room came free.
    changed: Notify,
}

#[derive(Default)]
struct Papers {
    /// Bounded by the permits that the shares give.
    ready: VecDeque<Result<Handed, LaneError>>,
    /// What the client has and has not settled, by places that the broker numbers.
    held: HashSet<Tag, RandomState>,
    failed: Option<LaneError>,
    /// How many messages of each partition are acknowledged in entries of which others are left.
    within: BTreeMap<u32, u64>,
    /// Closes each partition's consumer.
    closing: BTreeMap<u32, Box<dyn FnOnce() + Send>>,
}

impl Desk {
    fn new(prefetch: u32) -> Self {
        Self { prefetch: prefetch.max(1) as usize, papers: Mutex::default(), changed: Notify::new() }
    }

    pub fn put(&self, delivered: impl IntoIterator<Item = Result<Handed, LaneError>>) {
        self.papers().ready.extend(delivered);
        self.changed.notify_one();
    }

    /// Takes back what a share put here and the client has not got.
    pub fn withdraw(&self, partition: u32) -> Vec<Tag> {
        let mut papers = self.papers();
        let mut withdrawn = Vec::new();
        papers.ready.retain(|ready| match ready {
            Ok(handed) if handed.tag.partition == partition => {
                withdrawn.push(handed.tag);
                false
            }
            _ => true,
        });
        withdrawn
    }

    /// What a share handed out is the client's no more.
    pub fn forget(&self, partition: u32) {
        let mut papers = self.papers();
        papers.ready.retain(|ready| match ready {
            Ok(handed) => handed.tag.partition != partition,
            Err(_) => true,
        });
        papers.held.retain(|tag| tag.partition != partition);
        drop(papers);
        self.changed.notify_one();
    }

    /// Nothing of what was handed out is the client's any more.
    pub fn forget_all(&self) {
        let mut papers = self.papers();
        papers.ready.retain(Result::is_err);
        papers.held.clear();
        drop(papers);
        self.changed.notify_one();
    }

    pub fn count_within(&self, partition: u32, acked: u64) {
        self.papers().within.insert(partition, acked);
    }

    /// How many messages are acknowledged that the broker still counts, because of others of their entries.
    pub fn acked_within(&self) -> u64 {
        self.papers().within.values().sum()
    }

    /// How a partition's consumer is closed once the member leaves.
    pub fn opened(&self, partition: u32, close: impl FnOnce() + Send + 'static) {
        self.papers().closing.insert(partition, Box::new(close));
    }

    /// What the member holds or may take at once.
    pub fn unsettled(&self) -> u64 {
        let papers = self.papers();
        (papers.held.len() + papers.ready.len()).min(self.prefetch) as u64
    }

    pub fn fail(&self, error: LaneError) {
        self.papers().failed.get_or_insert(error);
        self.changed.notify_one();
    }

    fn settle(&self, tags: &[Tag]) {
        let mut papers = self.papers();
        for tag in tags {
            papers.held.remove(tag);
        }
        drop(papers);
        self.changed.notify_one();
    }

    /// What the client may have now. Nothing: it waits.
    fn take(&self) -> Result<Vec<Result<Handed, LaneError>>, LaneError> {
        let mut papers = self.papers();
        if let Some(error) = &papers.failed {
            return Err(error.clone());
        }
        let room = self.prefetch.saturating_sub(papers.held.len());
        let mut taken = Vec::with_capacity(room.min(papers.ready.len()));
        while papers.held.len() < self.prefetch {
            let Some(ready) = papers.ready.pop_front() else { break };
            if let Ok(handed) = &ready {
                papers.held.insert(handed.tag);
            }
            taken.push(ready);
        }
        Ok(taken)
    }

    fn papers(&self) -> MutexGuard<'_, Papers> {
        // The papers are whole between any two statements, so a panic elsewhere spoils nothing.
        self.papers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Each partition's share.
type Shares = Arc<Mutex<BTreeMap<u32, mpsc::Sender<Settle>>>>;

pub struct GroupMember {
    desk: Arc<Desk>,
    shares: Shares,
    timeout: Duration,
    /// Ends with the member, and the consumers with it: the broker gives what they held to others.
    _run: AbortOnDropHandle<()>,
}

/// What others on this bridge may do with a member.
#[derive(Clone)]
pub struct Colleague {
    pub desk: Weak<Desk>,
    shares: Weak<Mutex<BTreeMap<u32, mpsc::Sender<Settle>>>>,
}

impl GroupMember {
    pub async fn join(
        source: Source,
        admin: &Arc<Admin>,
        joining: Joining,
        standing: i32,
        lost: Arc<Lost>,
        (timeout, busy_for): (Duration, Duration),
    ) -> Result<GroupMember, LaneError> {
        let Joining { group, mode, start, prefetch } = joining;
        if group.is_empty() {
            return Err(LaneError::BadRequest("a group needs a name".into()));
        }
        let initial = match start {
            Start::Latest => InitialPosition::Latest,
            Start::Earliest => InitialPosition::Earliest,
            start => {
                begin_at(&source, admin, &group, start).await?;
                InitialPosition::Earliest
            }
        };
        let desk = Arc::new(Desk::new(prefetch));
        let membership =
            Membership { group: group.into(), mode, standing, lost, admin: admin.clone(), busy_for };
        let member = Join { source, membership, prefetch, desk: desk.clone() };
        let mut parts = member.source.parts().into_iter();
        let mut opened = Vec::new();
        if let Some((number, name)) = parts.next() {
            // Whoever has the first partition has them all: two that want the group alone do not both fail.
            opened.push(member.share(number, name, initial).await.map_err(Fault::on_lane)?);
        }
        let others = parts.map(|(number, name)| member.share(number, name, initial));
        opened.extend(try_join_all(others).await.map_err(Fault::on_lane)?);
        let shares = Shares::default();
        let run = AbortOnDropHandle::new(tokio::spawn(member.run(opened, shares.clone())));
        // `run` fills in the shares before it first waits; what is settled was handed out by one of them.
        Ok(GroupMember { desk, shares, timeout, _run: run })
    }

    pub fn colleague(&self) -> Colleague {
        Colleague { desk: Arc::downgrade(&self.desk), shares: Arc::downgrade(&self.shares) }
    }
}

impl Drop for GroupMember {
    fn drop(&mut self) {
        // At once, so that whoever joins next finds the place free; the shares end when their tasks do.
        let closing = std::mem::take(&mut self.desk.papers().closing);
        closing.into_values().for_each(|close| close());
    }
}

impl Colleague {
    /// Has the member's shares wait until what is returned is used or dropped; a share that has no connection just now waits
    /// for none.
    pub async fn pause(&self) -> Vec<oneshot::Sender<Arc<Barrier>>> {
        let shares: Vec<_> = match self.shares.upgrade() {
            Some(shares) => shares.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect(),
            None => return Vec::new(),
        };
        let mut paused = Vec::new();
        for share in shares {
            let ((waits, waiting), (done, sought)) = (oneshot::channel(), oneshot::channel());
            let asked = async {
                if share.send(Settle::Seek { waits, sought }).await.is_ok() {
                    let _ = waiting.await;
                }
            };
            let _ = tokio::time::timeout(PAUSE, asked).await;
            paused.push(done);
        }
        paused
    }
}

/// Creates the group at a place that subscribing has no word for; one that exists goes on where it stood.
async fn begin_at(source: &Source, admin: &Admin, group: &str, start: Start) -> Result<(), LaneError> {
    // The group begins before it exists: what is stored between the two must not be missed.
    let plan = Plan::make(source, admin, start).await?;
    for (number, physical) in source.parts() {
        if admin.create_subscription(&physical, group).await? {
            go_to(admin, &physical, group, plan.from.get(&number)).await?;
        }
    }
    Ok(())
}

/// Has the group go on from `start` in every partition. `false`: there is no such group.
pub async fn seek(source: &Source, admin: &Admin, group: &str, start: Start) -> Result<bool, LaneError> {
    let plan = Plan::make(source, admin, start).await?;
    let mut found = false;
    for (number, physical) in source.parts() {
        found |= go_to(admin, &physical, group, plan.from.get(&number)).await?;
    }
    Ok(found)
}

/// `false`: there is no such subscription.
async fn go_to(
    admin: &Admin,
    physical: &Physical,
    group: &str,
    from: Option<&From>,
) -> Result<bool, LaneError> {
    let to = match from {
        Some(From::At(place)) => Some((*place, false)),
        Some(From::After(place)) => Some((*place, true)),
        Some(From::Time(time)) => admin.at_time(physical, *time).await?.map(|place| (place, false)),
        Some(From::Earliest) | None => None,
    };
    admin.move_subscription(physical, group, to).await
}

struct Join {
    source: Source,
    membership: Membership,
    prefetch: u32,
    desk: Arc<Desk>,
}

type Opened = (u32, Share, mpsc::Sender<Settle>);

impl Join {
    async fn share(
        &self,
        number: u32,
        physical: Physical,
        initial: InitialPosition,
    ) -> Result<Opened, Fault> {
        // Together the prefetch, and at least one each, or a partition would starve.
        let parts = self.source.partitions.max(1);
        let quota = self.prefetch / parts + u32::from(number < self.prefetch % parts);
        let (settle, inbox) = mpsc::channel(SETTLING);
        let share = Share::subscribe(
            self.source.cluster.clone(),
            (self.source.topic.clone(), number, physical),
            &self.membership,
            initial,
            quota.max(1),
            self.desk.clone(),
            inbox,
        )
        .await?;
        Ok((number, share, settle))
    }

    /// Runs the shares, and one for each partition that is added.
    async fn run(self, opened: Vec<Opened>, shares: Shares) {
        let mut tasks = JoinSet::new();
        let begin = |tasks: &mut JoinSet<()>, (number, share, settle): Opened| {
            shares.lock().unwrap_or_else(PoisonError::into_inner).insert(number, settle);
            tasks.spawn(share.run());
        };
        for opened in opened {
            begin(&mut tasks, opened);
        }
        let mut count = self.source.partitions;
        let mut backoff = Backoff::default();
        while count > 0 {
            tokio::time::sleep(GROWTH_EVERY).await;
            let now = self.source.cluster.partitions(&self.source.physical).await.unwrap_or(count);
            while count < now {
                let physical = self.source.physical.partition(count);
                match self.share(count, physical, InitialPosition::Earliest).await {
                    Ok(opened) => {
                        begin(&mut tasks, opened);
                        count += 1;
                        backoff.reset();
                    }
                    Err(_) => backoff.wait().await,
                }
            }
        }
        while tasks.join_next().await.is_some() {}
    }
}

impl GroupMember {
    /// Each partition's tags, with its share. A tag of no share of ours is of no delivery of ours.
    fn by_share(&self, mut tags: Vec<Tag>) -> Vec<(mpsc::Sender<Settle>, Vec<Tag>)> {
        let mut parts = Vec::new();
        let shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(partition) = tags.first().map(|tag| tag.partition) {
            let same = tags.extract_if(.., |tag| tag.partition == partition).collect();
            parts.extend(shares.get(&partition).map(|share| (share.clone(), same)));
        }
        parts
    }
}

#[async_trait]
impl Member for GroupMember {
    async fn next(&self) -> Result<Vec<Result<Handed, LaneError>>, LaneError> {
        loop {
            // A permit of the notify is kept for whoever waits next, so nothing is missed in between.
            let changed = self.desk.changed.notified();
            let taken = self.desk.take()?;
            if !taken.is_empty() {
                return Ok(taken);
            }
            changed.await;
        }
    }

    async fn ack(&self, tags: Vec<Tag>) -> Result<(), LaneError> {
        self.desk.settle(&tags);
        let count = tags.len();
        let acked = async {
            let mut answers = Vec::new();
            for (share, tags) in self.by_share(tags) {
                let (done, recorded) = oneshot::channel();
                share.send(Settle::Ack { tags, done }).await.ok()?;
                answers.push(recorded);
            }
            for recorded in answers {
                recorded.await.ok()?;
            }
            Some(())
        };
        let recorded = tokio::time::timeout(self.timeout, acked).await;
        recorded.ok().flatten().ok_or_else(|| unconfirmed(count))
    }

    async fn nack(&self, tags: Vec<Tag>, delay: Duration) -> Result<(), LaneError> {
        self.desk.settle(&tags);
        for (share, tags) in self.by_share(tags) {
            // Where the share has ended, its consumer has too: the broker delivers again by itself.
            let _ = share.send(Settle::Nack { tags, delay }).await;
        }
        Ok(())
    }
}

fn unconfirmed(count: usize) -> LaneError {
    LaneError::OutcomeUnknown(format!(
        "the broker did not confirm in time that {count} deliveries are done, so they may come again"
    ))
}
