//! The topics at the broker: which there are, and which appear while somebody follows a pattern.
//!
//! ```text
//! a watcher for each namespace ──appeared, deleted──▶ ┌───────┐
//!                                                     │ known │ ──▶ whoever follows a pattern
//! a listing of all of them ─────────replaces────────▶ └───────┘
//! ```
//! A broker tells its watchers of a topic before it tells the producer that made it. What no watcher was told of a
//! listing finds: two follow each placing of a watcher, and one comes now and then for what a broker forgot to tell.
//! While a namespace has no watcher, because its broker takes none or is away, all are listed every second.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{Fuse, FusedFuture};
use futures_util::{FutureExt, Stream, StreamExt, stream};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use super::cluster::Cluster;
use super::feed::Backoff;
use super::names::{Physical, topic_of};
use super::newer::Changed;
use super::watcher::Watcher;
use crate::lane::contract::LaneError;
use crate::message::Lane;
use crate::policy::Policy;
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::{Pattern, Topic};

/// How often topics are listed while a namespace has no watcher, and while all have one.
const UNWATCHED: Duration = Duration::from_secs(1);
const WATCHED: Duration = Duration::from_secs(30);
/// Listings that follow the placing of a watcher. A broker answers with one that is under way, if there is one, so only
/// the second has surely begun behind it.
const LISTINGS: usize = 2;
/// For the same reason what was told so lately may be missing in a listing, and is known all the same.
const UNLISTED: Duration = Duration::from_secs(10);
/// A broker that refuses a watcher is asked again after this: it may have been set otherwise, or be another.
const REFUSED: Duration = Duration::from_secs(30);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));
/// A broker takes no longer expression, by default.
const EXPRESSION_MAX: usize = 50;

pub struct Topics {
    policy: Policy,
    cluster: Arc<Cluster>,
    metrics: Arc<Metrics>,
    known: watch::Sender<BTreeSet<Topic>>,
    /// Somebody wants to know.
    wanted: Notify,
}

/// What a namespace's watcher brings.
enum Told {
    Watching,
    Changed(Changed),
    Lost,
}

impl Topics {
    pub fn new(policy: Policy, cluster: Arc<Cluster>, metrics: Arc<Metrics>) -> Self {
        Self { policy, cluster, metrics, known: watch::Sender::default(), wanted: Notify::new() }
    }

    /// The topics that match.
    pub async fn matching(&self, pattern: &Pattern) -> Result<Vec<Topic>, LaneError> {
        let table = self.policy.table();
        let mut found = self.list(namespaces(table.overlapping(pattern))?.keys()).await?;
        found.retain(|topic| pattern.matches(topic));
        Ok(found.into_iter().collect())
    }

    /// The topics known by now; it changes as they come and go.
    pub fn watch(&self) -> watch::Receiver<BTreeSet<Topic>> {
        let known = self.known.subscribe();
        self.wanted.notify_one();
        known
    }

    /// Finds topics for as long as anybody wants to know.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let running = async {
            loop {
                while self.known.receiver_count() == 0 {
                    self.wanted.notified().await;
                }
                let mut routes = self.policy.changes();
                tokio::select! {
                    () = self.find() => {}
                    () = self.known.closed() => drop(self.known.send_replace(BTreeSet::new())),
                    _ = routes.changed() => {}
                }
            }
        };
        stop.run_until_cancelled(running).await;
    }

    /// By the routes in force now, for ever.
    async fn find(&self) {
        let namespaces = namespaces(self.policy.table().routes()).unwrap_or_else(|error| {
            debug!(%error, "A route's topics are found nowhere.");
            BTreeMap::new()
        });
        let watches =
            namespaces.iter().map(|(namespace, prefix)| self.keep_watching(namespace, prefix).boxed());
        let mut told = stream::select_all(watches);
        let mut unwatched = namespaces.len();
        // What was told lately: it may be newer than the next listing.
        let mut recent = BTreeMap::<Topic, Instant>::new();
        let mut listing = pin!(Fuse::terminated());
        let mut behind_placing = 0_usize;
        let mut list_at = Instant::now() + UNWATCHED;
        loop {
            tokio::select! {
                Some(told) = told.next() => match told {
                    Told::Watching => {
                        unwatched -= 1;
                        list_at = Instant::now();
                        behind_placing = LISTINGS;
                    }
                    Told::Lost => {
                        unwatched += 1;
                        list_at = list_at.min(Instant::now() + UNWATCHED);
                    }
                    Told::Changed(changed) => self.change(changed, &mut recent),
                },
                listed = &mut listing => match listed {
                    Ok(listed) => {
                        let mut found: BTreeSet<_> = listed;
                        found.extend(recent.keys().cloned());
                        recent.retain(|_, told| told.elapsed() < UNLISTED);
                        self.known.send_if_modified(|known| std::mem::replace(known, found) != *known);
                    }
                    Err(error) => {
                        debug!(%error, "Durable topics could not be listed; asking again.");
                        list_at = list_at.min(Instant::now() + UNWATCHED);
                    }
                },
                () = tokio::time::sleep_until(list_at), if listing.is_terminated() => {
                    behind_placing = behind_placing.saturating_sub(1);
                    let pause = match (behind_placing, unwatched) {
                        (1.., _) => Duration::ZERO,
                        (0, 0) => WATCHED,
                        (0, _) => UNWATCHED,
                    };
                    list_at = Instant::now() + pause;
                    self.metrics.listed_topics();
                    listing.set(self.list(namespaces.keys()).fuse());
                }
            }
        }
    }

    fn change(&self, changed: Changed, recent: &mut BTreeMap<Topic, Instant>) {
        let table = self.policy.table();
        let topics = |names: Vec<String>| names.into_iter().filter_map(|name| topic_of(&table, name));
        self.known.send_if_modified(|known| {
            let before = known.len();
            // A topic of which only a partition was deleted comes back with the next listing.
            for topic in topics(changed.deleted) {
                recent.remove(&topic);
                known.remove(&topic);
            }
            let left = known.len();
            for topic in topics(changed.appeared) {
                recent.insert(topic.clone(), Instant::now());
                known.insert(topic);
            }
            left < before || known.len() > left
        });
    }

    /// Keeps a watcher on a namespace.
    fn keep_watching(&self, namespace: &str, prefix: &str) -> impl Stream<Item = Told> + Send {
        let expression = expression(prefix);
        stream::unfold(None::<Watcher>, move |watcher| {
            let expression = expression.clone();
            async move {
                let Some(mut watcher) = watcher else {
                    return Some((Told::Watching, Some(self.place(namespace, &expression).await)));
                };
                Some(match watcher.next().await {
                    Some(changed) => (Told::Changed(changed), Some(watcher)),
                    None => (Told::Lost, None),
                })
            }
        })
    }

    /// Returns once a watcher is placed.
    async fn place(&self, namespace: &str, expression: &str) -> Watcher {
        let mut backoff = Backoff::between(BACKOFF);
        loop {
            match self.cluster.watch(namespace, expression).await {
                Ok(watcher) => return watcher,
                Err(fault) if fault.is_lasting() => {
                    debug!(namespace, %fault, "No watcher for new topics; listing all of them every second.");
                    tokio::time::sleep(REFUSED).await;
                }
                Err(_) => backoff.wait().await,
            }
        }
    }

    /// All topics of these namespaces.
    async fn list(&self, namespaces: impl Iterator<Item = &String>) -> Result<BTreeSet<Topic>, LaneError> {
        let mut found = BTreeSet::new();
        for namespace in namespaces {
            match self.cluster.topics(namespace).await {
                Ok(names) => {
                    let table = self.policy.table();
                    found.extend(names.into_iter().filter_map(|name| topic_of(&table, name)));
                }
                // A namespace that is not there has no topics.
                Err(fault) if fault.is_not_found() => {}
                Err(fault) => return Err(fault.on_lane()),
            }
        }
        Ok(found)
    }
}

/// The namespaces that topics of these routes are in, and how all their local names there begin.
fn namespaces<'a>(
    routes: impl IntoIterator<Item = &'a Arc<Route>>,
) -> Result<BTreeMap<String, String>, LaneError> {
    let mut namespaces: BTreeMap<String, String> = BTreeMap::new();
    for route in routes.into_iter().filter(|route| route.lane.takes(Lane::Durable)) {
        let names = Physical::parse(route.pulsar.apply(route.pattern.as_str()))
            .ok_or_else(|| LaneError::BadRequest(format!("route `{}` names no Pulsar topic", route.name)))?;
        let literal = names.local().split(['*', '>']).next().unwrap_or_default();
        namespaces
            .entry(names.namespace().to_owned())
            .and_modify(|prefix| {
                let common = prefix.bytes().zip(literal.bytes()).take_while(|(a, b)| a == b).count();
                prefix.truncate(common);
            })
            .or_insert_with(|| literal.to_owned());
    }
    Ok(namespaces)
}

/// What the names with a prefix fit, whether or not the tenant and namespace stand before them, and perhaps some more:
/// only so much of a long prefix, and any character in place of one that means something in an expression.
fn expression(prefix: &str) -> String {
    let (before, after) = (".*/", ".*");
    let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' { c } else { '.' };
    let prefix: String =
        prefix.chars().map(plain).take(EXPRESSION_MAX - before.len() - after.len()).collect();
    format!("{before}{prefix}{after}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::source;

    #[test]
    fn a_namespace_is_watched_for_what_the_names_of_all_its_routes_begin_with() {
        let routes = r#"
            [[route]]
            name = "orders"
            topic = "orders.eu.>"
            lane = "durable"
            [[route]]
            name = "some"
            topic = "orders.*.x"
            lane = "durable"
            [[route]]
            name = "one"
            topic = "audit"
            lane = "durable"
            pulsar = "persistent://acme/own/all.{topic}.v1"
            [[route]]
            name = "live"
            topic = "live.>"
            lane = "ephemeral"
        "#;
        let table =
            source::read("routes.toml".as_ref(), routes, &|_| Err(std::io::ErrorKind::NotFound.into()))
                .unwrap();
        let found = namespaces(table.routes()).unwrap();
        let expected = [("acme/own", "all.audit.v1"), ("public/default", "orders.")];
        assert_eq!(found, expected.map(|(namespace, prefix)| (namespace.into(), prefix.into())).into());
    }

    #[test]
    fn an_expression_fits_at_least_the_names_with_its_prefix_and_is_never_too_long() {
        assert_eq!(expression(""), ".*/.*");
        assert_eq!(expression("orders.a_1"), ".*/orders.a_1.*");
        assert_eq!(expression("a+b-c:d=e~f@g%"), ".*/a.b.c.d.e.f.g..*");
        assert_eq!(expression(&"x".repeat(200)).len(), EXPRESSION_MAX);
    }
}
