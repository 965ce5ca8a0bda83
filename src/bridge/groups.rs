//! The groups that have members here, and how they stand: looked at every now and then, for the metrics.
//!
//! Group names come from clients, so the number of series is bounded: what is beyond is told as one group, `other`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::sync::{Notify, broadcast};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::debug;

use crate::lane::contract::{DurableLane, GroupReport};
use crate::policy::Policy;
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

const LOOK_EVERY: Duration = Duration::from_secs(10);
/// A group that comes or goes is looked at sooner: so long after it did, and so long after the look before.
const LOOK_SOON: Duration = Duration::from_secs(1);
const LOOK_APART: Duration = Duration::from_secs(5);
/// How many topics are asked about at the same time, how long each may take, and all of them.
const TOPICS_AT_ONCE: usize = 16;
const TOPIC_TIMEOUT: Duration = Duration::from_secs(5);
const LOOK_TIMEOUT: Duration = Duration::from_secs(30);
/// Members that came or went and that whoever watches has not heard of. Who is further behind misses some.
const MEMBERSHIPS_MAX: usize = 256;
/// The most groups that have series of their own.
pub const SERIES_MAX: usize = 1000;
const OTHER: &str = "other";

pub struct Groups {
    /// How many members each group has here.
    served: Mutex<BTreeMap<Topic, BTreeMap<Arc<str>, usize>>>,
    changed: Notify,
    /// How the groups of a topic stood at the last look.
    reports: Mutex<HashMap<Topic, Vec<GroupReport>>>,
    memberships: broadcast::Sender<Membership>,
}

/// A member of a group came or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    pub topic: Topic,
    pub group: Arc<str>,
    pub joined: bool,
}

impl Default for Groups {
    fn default() -> Self {
        Self {
            served: Mutex::default(),
            changed: Notify::new(),
            reports: Mutex::default(),
            memberships: broadcast::channel(MEMBERSHIPS_MAX).0,
        }
    }
}

/// One member of a group, counted until it is dropped.
pub struct Served {
    pub topic: Topic,
    pub group: Arc<str>,
    groups: Arc<Groups>,
}

/// How a group stands over all topics of a route.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Standing {
    pub backlog: u64,
    pub unacked: u64,
    /// Of its oldest message.
    pub age: Duration,
}

/// A route and a group.
pub type Series = (Arc<str>, Arc<str>);

impl Groups {
    pub fn join(self: &Arc<Self>, topic: Topic, group: Arc<str>) -> Served {
        let mut served = self.served();
        let members = served.entry(topic.clone()).or_default().entry(group.clone()).or_default();
        *members += 1;
        if *members == 1 {
            self.changed.notify_one();
        }
        drop(served);
        self.tell(&topic, &group, true);
        Served { topic, group, groups: self.clone() }
    }

    /// Each member that comes or goes from now on.
    pub fn memberships(&self) -> broadcast::Receiver<Membership> {
        self.memberships.subscribe()
    }

    /// How the groups that have members here stood at the last look.
    pub fn reports(&self) -> Vec<(Topic, GroupReport)> {
        let (served, reports) = (self.served(), lock(&self.reports));
        let mut standing = Vec::new();
        for (topic, groups) in served.iter() {
            let found = reports.get(topic).into_iter().flatten();
            let here = found.filter(|report| groups.contains_key(report.name.as_str()));
            standing.extend(here.map(|report| (topic.clone(), report.clone())));
        }
        standing
    }

    fn tell(&self, topic: &Topic, group: &Arc<str>, joined: bool) {
        // Nobody may be watching.
        let _ = self.memberships.send(Membership { topic: topic.clone(), group: group.clone(), joined });
    }

    /// Looks again and again, until the process ends.
    pub async fn run(&self, lane: Arc<dyn DurableLane>, policy: Policy, metrics: Arc<Metrics>) {
        let mut reports = HashMap::new();
        let mut shown = BTreeSet::new();
        let mut soonest = Instant::now();
        loop {
            let wait = LOOK_EVERY.mul_f64(0.8 + 0.4 * fastrand::f64());
            tokio::select! {
                () = sleep(wait) => {}
                () = self.changed.notified() => {
                    sleep(LOOK_SOON).await;
                    sleep_until(soonest).await;
                }
            }
            soonest = Instant::now() + LOOK_APART;
            let served = self.served().clone();
            look(&served, &*lane, &policy, &mut reports).await;
            lock(&self.reports).clone_from(&reports);
            let standings = standings(&served, &policy, &reports, &shown);
            for (route, group) in shown.iter().filter(|series| !standings.contains_key(*series)) {
                metrics.group_left(route, group);
            }
            for ((route, group), Standing { backlog, unacked, age }) in &standings {
                metrics.group_stands(route, group, *backlog, *unacked, *age);
            }
            shown = standings.into_keys().collect();
        }
    }

    fn served(&self) -> MutexGuard<'_, BTreeMap<Topic, BTreeMap<Arc<str>, usize>>> {
        lock(&self.served)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Each use leaves it whole, so a panic elsewhere spoils nothing.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Served {
    fn drop(&mut self) {
        self.groups.tell(&self.topic, &self.group, false);
        let mut served = self.groups.served();
        let Some(groups) = served.get_mut(&self.topic) else { return };
        if let Some(members) = groups.get_mut(&self.group) {
            *members -= 1;
            if *members == 0 {
                groups.remove(&self.group);
                self.groups.changed.notify_one();
            }
        }
        if groups.is_empty() {
            served.remove(&self.topic);
        }
    }
}

/// Asks the lane about each topic. One that cannot say now stands as it did.
async fn look(
    served: &BTreeMap<Topic, BTreeMap<Arc<str>, usize>>,
    lane: &dyn DurableLane,
    policy: &Policy,
    reports: &mut HashMap<Topic, Vec<GroupReport>>,
) {
    reports.retain(|topic, _| served.contains_key(topic));
    let table = policy.table();
    let asked: Vec<(Topic, Arc<Route>)> =
        served.keys().filter_map(|topic| Some((topic.clone(), table.route_for(topic)?.clone()))).collect();
    let asked = asked.into_iter().map(|(topic, route)| async move {
        match timeout(TOPIC_TIMEOUT, lane.groups(&route, &topic)).await {
            Ok(Ok(found)) => Some((topic, found)),
            Ok(Err(error)) => {
                debug!(%topic, %error, "How the groups of a topic stand could not be asked.");
                None
            }
            Err(_) => None,
        }
    });
    let mut answers =
        stream::iter(asked).buffer_unordered(TOPICS_AT_ONCE).take_until(Box::pin(sleep(LOOK_TIMEOUT)));
    while let Some(answer) = answers.next().await {
        reports.extend(answer);
    }
}

/// The groups that are served here, by route. Those that were shown before go first.
fn standings(
    served: &BTreeMap<Topic, BTreeMap<Arc<str>, usize>>,
    policy: &Policy,
    reports: &HashMap<Topic, Vec<GroupReport>>,
    shown: &BTreeSet<Series>,
) -> BTreeMap<Series, Standing> {
    let table = policy.table();
    let mut standings: BTreeMap<Series, Standing> = BTreeMap::new();
    for (topic, groups) in served {
        let (Some(route), Some(found)) = (table.route_for(topic), reports.get(topic)) else { continue };
        for report in found {
            let Some((group, _)) = groups.get_key_value(report.name.as_str()) else { continue };
            let standing = standings.entry((route.name.clone(), group.clone())).or_default();
            standing.add(&Standing {
                backlog: report.backlog,
                unacked: report.unacked,
                age: report.oldest.map_or(Duration::ZERO, |oldest| oldest.age()),
            });
        }
    }
    if standings.len() <= SERIES_MAX {
        return standings;
    }
    let (mut kept, rest): (BTreeMap<_, _>, BTreeMap<_, _>) =
        standings.into_iter().partition(|(series, _)| shown.contains(series) && &*series.1 != OTHER);
    for ((route, group), standing) in rest {
        let series = if kept.len() < SERIES_MAX { (route, group) } else { (route, OTHER.into()) };
        kept.entry(series).or_default().add(&standing);
    }
    kept
}

impl Standing {
    fn add(&mut self, other: &Standing) {
        self.backlog += other.backlog;
        self.unacked += other.unacked;
        self.age = self.age.max(other.age);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::message::Timestamp;
    use crate::policy::source;

    fn policy() -> Policy {
        Policy::new(
            source::read(Path::new("r.toml"), "[[route]]\ntopic = \"a.>\"\nlane = \"durable\"", &|_| {
                Err(std::io::ErrorKind::NotFound.into())
            })
            .unwrap(),
        )
    }

    fn topic(name: &str) -> Topic {
        Topic::parse(name).unwrap()
    }

    fn report(name: &str, backlog: u64, age: i64) -> GroupReport {
        let oldest = Some(Timestamp::from_millis(Timestamp::now().as_millis() - 1000 * age));
        GroupReport { name: name.into(), mode: None, members: 0, backlog, unacked: 1, oldest }
    }

    #[test]
    fn the_topics_of_a_route_are_added_up_and_groups_without_members_here_are_left_out() {
        let groups = Arc::new(Groups::default());
        let _members: Vec<_> = [("a.x", "g"), ("a.x", "g"), ("a.y", "g"), ("a.z", "gone")]
            .map(|(name, group)| groups.join(topic(name), group.into()))
            .into();
        let reports = [("a.x", 3, 10), ("a.y", 4, 20)].map(|(name, backlog, age)| {
            (topic(name), vec![report("g", backlog, age), report("other", 9, 99)])
        });
        let standings = standings(&groups.served(), &policy(), &reports.into(), &BTreeSet::new());
        let (series, standing) = standings.first_key_value().unwrap();
        assert_eq!((standings.len(), &*series.0, &*series.1), (1, "a.>", "g"));
        assert_eq!((standing.backlog, standing.unacked, standing.age.as_secs()), (7, 2, 20));
    }

    #[test]
    fn however_many_groups_clients_name_the_series_are_bounded_and_those_shown_before_stay() {
        let groups = Arc::new(Groups::default());
        let names: Vec<String> = (0..SERIES_MAX + 500).map(|n| format!("g{n:05}")).collect();
        let members: Vec<_> =
            names.iter().map(|name| groups.join(topic("a.x"), name.as_str().into())).collect();
        let reports = [(topic("a.x"), names.iter().map(|name| report(name, 2, 1)).collect())].into();
        // The last by name was there first.
        let before: BTreeSet<Series> = [("a.>".into(), names[SERIES_MAX + 499].as_str().into())].into();
        let told = standings(&groups.served(), &policy(), &reports, &before);
        assert_eq!(told.len(), SERIES_MAX + 1);
        assert!(before.iter().all(|series| told.contains_key(series)));
        assert_eq!(told[&("a.>".into(), OTHER.into())].backlog, 2 * 500);
        let shown = told.into_keys().collect();
        let again = standings(&groups.served(), &policy(), &reports, &shown);
        assert_eq!(again.into_keys().collect::<BTreeSet<_>>(), shown);
        drop(members);
        assert!(groups.served().is_empty());
    }
}
