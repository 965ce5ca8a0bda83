//! The groups of topics, and the members that they have on this bridge.
//!
//! ```text
//! seek ──▶ our members stand still ──▶ the broker moves the cursor and closes every consumer ──▶ they subscribe again
//! ```
//! The admin API does the moving, because the binary protocol's SEEK needs a consumer of the subscription: one with an
//! exclusive member has no room for a second, and one without members has none. Members on other bridges are closed
//! too; they see that what was acknowledged comes again and forget what they held (`share`).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::Barrier;

use super::admin::{Admin, Analyzed, SubscriptionStats};
use super::group::{Colleague, Desk, GroupMember, seek};
use super::held::Lost;
use super::names::Physical;
use super::read::Source;
use crate::lane::contract::{GroupReport, Joining, LaneError, Member};
use crate::message::{GroupMode, Start, Timestamp};

/// So many entries of a backlog, and so many bytes, are looked through: a fifth of a second's work for the broker. It
/// looks through no more entries by default (`subscriptionBacklogScanMaxEntries`).
const COUNTED: (u64, u64) = (10_000, 32 << 20);
/// Subscriptions that are no groups: our readers', those of compaction.
const OURS: &str = "twinspan-reader-";
const COMPACTION: &str = "__compaction";

/// Groups without a member here of which it is remembered what members lost.
const ABSENT: usize = 100;

/// The members on this bridge, by topic and group.
pub struct Groups {
    busy_for: Duration,
    members: Mutex<HashMap<(Physical, String), Members>>,
    /// Two seeks at once would wait for each other's members.
    seeking: tokio::sync::Mutex<()>,
}

/// Of one group.
#[derive(Default)]
struct Members {
    here: Vec<Colleague>,
    /// Of the newest.
    standing: i32,
    lost: Arc<Lost>,
}

impl Members {
    /// The lower, the longer a member has stood: seconds since 2026, each its own on this bridge. A broker makes the
    /// lowest one active; among equals it takes any.
    fn next_standing(&mut self) -> i32 {
        const BEGINNING: i64 = 1_767_225_600;
        let now = i32::try_from(Timestamp::now().as_millis() / 1000 - BEGINNING).unwrap_or_default();
        self.standing = now.max(self.standing.saturating_add(1));
        self.standing
    }
}

impl Groups {
    /// A place that was lost with its connection is given up once others have had it for so long.
    pub fn new(busy_for: Duration) -> Self {
        Self { busy_for, members: Mutex::default(), seeking: tokio::sync::Mutex::default() }
    }

    pub async fn join(
        &self,
        source: Source,
        admin: &Arc<Admin>,
        joining: Joining,
        timeout: Duration,
    ) -> Result<Box<dyn Member>, LaneError> {
        let name = (source.physical.clone(), joining.group.clone());
        let (standing, lost) = {
            let mut members = self.lock();
            let mut absent = 0;
            members.retain(|_, members| {
                members.here.retain(|member| member.desk.strong_count() > 0);
                // A client that fails at a message and comes back is to meet it counted.
                absent += usize::from(members.here.is_empty());
                !members.here.is_empty() || absent <= ABSENT && !members.lost.is_empty()
            });
            let members = members.entry(name.clone()).or_default();
            (members.next_standing(), members.lost.clone())
        };
        let times = (timeout, self.busy_for);
        let member = GroupMember::join(source, admin, joining, standing, lost, times).await?;
        self.lock().entry(name).or_default().here.push(member.colleague());
        Ok(Box::new(member))
    }

    pub async fn seek(
        &self,
        source: &Source,
        admin: &Admin,
        group: &str,
        start: Start,
    ) -> Result<(), LaneError> {
        let _seeking = self.seeking.lock().await;
        let members = self.members_of(&source.physical, group);
        let paused = join_all(members.iter().map(Colleague::pause)).await;
        let found = seek(source, admin, group, start).await;
        if matches!(found, Ok(true)) {
            // At once, and not when the shares come to it: what was ready before the seek is not handed out after it.
            let desks = members.iter().filter_map(|member| member.desk.upgrade());
            desks.for_each(|desk: Arc<Desk>| desk.forget_all());
            self.forget_lost(source, group);
        }
        let paused: Vec<_> = paused.into_iter().flatten().collect();
        let meeting = Arc::new(Barrier::new(paused.len()));
        for share in paused {
            // A member that has left meanwhile is missed for a moment.
            let _ = share.send(meeting.clone());
        }
        match found? {
            true => Ok(()),
            false => Err(LaneError::BadRequest(format!("`{}` has no group `{group}`", source.topic))),
        }
    }

    pub async fn delete(&self, source: &Source, admin: &Admin, group: &str) -> Result<bool, LaneError> {
        // One member keeps the whole group, also where it has only some of the partitions.
        for (_, physical) in source.parts() {
            let subscriptions = admin.subscriptions(&physical).await?;
            if subscriptions.get(group).is_some_and(|subscription| subscription.consumers > 0) {
                return Err(LaneError::GroupBusy(format!(
                    "group `{group}` of `{}` has members",
                    source.topic
                )));
            }
        }
        let mut deleted = false;
        for (_, physical) in source.parts() {
            deleted |= admin.delete_subscription(&physical, group).await?;
        }
        self.forget_lost(source, group);
        Ok(deleted)
    }

    /// What comes next was handed to nobody before.
    fn forget_lost(&self, source: &Source, group: &str) {
        if let Some(members) = self.lock().get(&(source.physical.clone(), group.to_owned())) {
            members.lost.clear();
        }
    }

    /// The backlog is exact up to ten thousand entries that hold no more than 32 MiB. Of a larger one the oldest ten
    /// thousand are counted, and the others taken to hold as many messages each; where those are large, as many as the
    /// entries of this topic have held on average since its broker loaded it. What is acknowledged of a batch of which something is left counts as long as members on
    /// other bridges hold it.
    pub async fn report(&self, source: &Source, admin: &Admin) -> Result<Vec<GroupReport>, LaneError> {
        let mut reports: BTreeMap<String, GroupReport> = BTreeMap::new();
        for (_, physical) in source.parts() {
            for (name, stats) in admin.subscriptions(&physical).await? {
                if !stats.durable || name.starts_with(OURS) || name == COMPACTION {
                    continue;
                }
                let backlog = messages(admin, &physical, &name, &stats).await?;
                let report = reports.entry(name.clone()).or_insert_with(|| GroupReport {
                    name,
                    mode: None,
                    members: 0,
                    backlog: 0,
                    unacked: 0,
                    oldest: None,
                });
                let oldest = (stats.oldest > 0 && backlog > 0).then(|| Timestamp::from_millis(stats.oldest));
                report.mode = report.mode.or_else(|| mode(&stats));
                // A member has a consumer for each partition.
                report.members = report.members.max(stats.consumers);
                report.backlog += backlog;
                report.unacked += stats.unacked;
                report.oldest = report.oldest.into_iter().chain(oldest).min();
            }
        }
        for report in reports.values_mut() {
            let here = self.members_of(&source.physical, &report.name);
            let here: Vec<Arc<Desk>> = here.iter().filter_map(|member| member.desk.upgrade()).collect();
            let within: u64 = here.iter().map(|desk| desk.acked_within()).sum();
            report.backlog = report.backlog.saturating_sub(within);
            // The broker counts nothing for an exclusive member, and of a batch what the prefetch keeps back.
            if here.len() >= report.members {
                report.unacked = here.iter().map(|desk| desk.unsettled()).sum();
            }
        }
        Ok(reports.into_values().collect())
    }

    fn members_of(&self, physical: &Physical, group: &str) -> Vec<Colleague> {
        let members = self.lock();
        members.get(&(physical.clone(), group.to_owned())).map(|of| of.here.clone()).unwrap_or_default()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(Physical, String), Members>> {
        // The table is whole between any two statements, so a panic elsewhere spoils nothing.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn mode(stats: &SubscriptionStats) -> Option<GroupMode> {
    match stats.kind.as_str() {
        _ if stats.consumers == 0 => None,
        "Exclusive" => Some(GroupMode::Exclusive),
        "Shared" => Some(GroupMode::Shared),
        "Failover" => Some(GroupMode::Failover),
        "Key_Shared" => Some(GroupMode::KeyShared),
        _ => None,
    }
}

async fn messages(
    admin: &Admin,
    physical: &Physical,
    name: &str,
    stats: &SubscriptionStats,
) -> Result<u64, LaneError> {
    let entries = stats.entries;
    if entries == 0 {
        return Ok(0);
    }
    // Of those that would be looked through.
    let (entries_max, bytes_max) = COUNTED;
    let bytes =
        u128::from(stats.bytes.unsigned_abs()) * u128::from(entries.min(entries_max)) / u128::from(entries);
    let known = match bytes > u128::from(bytes_max) {
        false => admin.analyze(physical, name).await?,
        true => match admin.stored(physical).await? {
            // Nothing was stored since the broker was started.
            Analyzed { entries: 0, .. } => admin.analyze(physical, name).await?,
            stored => stored,
        },
    };
    if !known.is_part {
        return Ok(known.messages);
    }
    let scaled = u128::from(entries) * u128::from(known.messages) / u128::from(known.entries.max(1));
    Ok(u64::try_from(scaled).unwrap_or(u64::MAX).max(entries))
}
