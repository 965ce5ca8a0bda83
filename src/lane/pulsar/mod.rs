//! The durable lane over Apache Pulsar.
//!
//! ```text
//!              append            tail, read, join            create, backlog, last n
//!                │                      │                           │
//!           producers              feed, group                    admin
//!            session                 session                       (HTTP)
//!                └───────── broker ─────┴──────────── broker ───────┘
//! ```
//! Publishing and reading have connections of their own, so that neither waits behind the other and trouble of one is
//! not the other's. What the rest of twinspan sees is `DurableLane` alone. Of the `pulsar` crate only the protocol's
//! types are used, and only in this folder.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::contract::{
    Appending, BrokerReport, DurableLane, GroupReport, Joining, LaneError, LaneState, Member, Publisher,
    Reader,
};
use super::settings::DurableSettings;
use super::tail::Tail;
use crate::message::{Lane, Message, Start};
use crate::origin::Problem;
use crate::policy::Policy;
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::{Pattern, Topic};

mod address;
mod admin;
mod append;
mod batch;
mod cluster;
mod consumer;
mod credentials;
mod examine;
mod fault;
mod feed;
mod find;
mod follow;
mod frame;
mod group;
mod groups;
mod health;
mod heartbeat;
mod held;
mod monitor;
mod names;
mod newer;
mod passed_over;
pub mod peer;
mod producer;
mod read;
mod record;
mod room;
mod session;
mod share;
mod topics;
mod watcher;

use address::Address;
use admin::Admin;
use append::Producers;
use cluster::Cluster;
use credentials::Credentials;
use fault::Fault;
use follow::Tails;
use groups::Groups;
use health::Health;
use heartbeat::Heartbeat;
use names::Physical;
use read::{Plan, Source, TopicReader};
use topics::Topics;

const PROBE_TIMEOUT: Duration = Duration::from_millis(900);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(4);
/// A broker that has not noticed yet that our last connection broke takes our old consumer for another. It asks every
/// connection for a sign of life each 30 s, and ends it after the second time.
const BUSY_FOR: Duration = Duration::from_secs(75);

pub struct PulsarLane {
    policy: Policy,
    /// The connections for reading, and those for publishing.
    cluster: Arc<Cluster>,
    publishing: Arc<Cluster>,
    admin: Arc<Admin>,
    producers: Arc<Producers>,
    heartbeat: Arc<Heartbeat>,
    topics: Arc<Topics>,
    tails: Tails,
    groups: Groups,
    publish_timeout: Duration,
    state: watch::Receiver<LaneState>,
    stop: CancellationToken,
    _end: DropGuard,
}

/// The settings cannot be used; a broker that is not there is no such error.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(String);

impl PulsarLane {
    /// Begins to connect and returns at once: the state is `Down` until a probe has succeeded.
    pub fn open(
        settings: &DurableSettings,
        policy: Policy,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, Unusable> {
        Self::open_with(settings, policy, metrics, BUSY_FOR)
    }

    /// The same where a member's place that others have taken is given up after so long.
    pub fn open_with(
        settings: &DurableSettings,
        policy: Policy,
        metrics: Arc<Metrics>,
        busy_for: Duration,
    ) -> Result<Arc<Self>, Unusable> {
        let services: Option<Vec<_>> = settings.url.iter().map(|url| Address::parse(url)).collect();
        let services = services.filter(|services| !services.is_empty()).ok_or_else(|| {
            Unusable("lanes.durable.url must be one or more pulsar:// or pulsar+ssl:// URLs".into())
        })?;
        let credentials = Credentials::read(settings).map_err(Unusable)?;
        let admin = Arc::new(Admin::new(&settings.admin_url, credentials.clone()).map_err(Unusable)?);

        let stop = CancellationToken::new();
        let (states, state) =
            watch::channel(LaneState::Down(format!("connecting to {}", settings.url.join(", "))));
        let publishing = Arc::new(Cluster::new(services.clone(), credentials.clone()));
        let producers = Producers::new(
            publishing.clone(),
            state.clone(),
            settings.publish_timeout,
            metrics.clone(),
            stop.child_token(),
        );
        let cluster = Arc::new(Cluster::new(services, credentials));
        let heartbeat = Arc::new(Heartbeat::new(policy.clone(), producers.clone(), cluster.clone()));
        let topics = Arc::new(Topics::new(policy.clone(), cluster.clone(), metrics));
        let health = Health { cluster: publishing.clone(), heartbeat: heartbeat.clone(), state: states };
        tokio::spawn(health.run(stop.child_token()));
        tokio::spawn(topics.clone().run(stop.child_token()));
        Ok(Arc::new(Self {
            policy,
            cluster,
            publishing,
            admin,
            producers,
            heartbeat,
            topics,
            tails: Tails::default(),
            groups: Groups::new(busy_for),
            publish_timeout: settings.publish_timeout,
            state,
            _end: stop.clone().drop_guard(),
            stop,
        }))
    }

    async fn source(&self, route: &Route, topic: &Topic) -> Result<Source, LaneError> {
        self.up()?;
        let physical = Physical::of(route, topic)?;
        Source::find(self.cluster.clone(), topic.clone(), physical).await.map_err(Fault::on_lane)
    }

    fn up(&self) -> Result<(), LaneError> {
        append::up(&self.state)
    }
}

#[async_trait]
impl DurableLane for PulsarLane {
    fn append<'a>(
        &'a self,
        route: &'a Arc<Route>,
        topic: &'a Topic,
        message: Message,
        publisher: Publisher,
    ) -> Appending<'a> {
        self.producers.append(route, topic, message, publisher)
    }

    async fn tail(&self, route: &Arc<Route>, topic: &Topic) -> Result<Arc<Tail>, LaneError> {
        self.tails.get(self.source(route, topic).await?, &self.stop).await
    }

    async fn read(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        start: Start,
    ) -> Result<Box<dyn Reader>, LaneError> {
        let source = self.source(route, topic).await?;
        let plan = Plan::make(&source, &self.admin, start).await?;
        Ok(Box::new(TopicReader::open(source, plan).await.map_err(Fault::on_lane)?))
    }

    async fn join(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        joining: Joining,
    ) -> Result<Box<dyn Member>, LaneError> {
        let source = self.source(route, topic).await?;
        self.groups.join(source, &self.admin, joining, self.publish_timeout).await
    }

    async fn seek(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        group: &str,
        start: Start,
    ) -> Result<(), LaneError> {
        let source = self.source(route, topic).await?;
        self.groups.seek(&source, &self.admin, group, start).await
    }

    async fn delete_group(&self, route: &Arc<Route>, topic: &Topic, group: &str) -> Result<bool, LaneError> {
        let source = self.source(route, topic).await?;
        self.groups.delete(&source, &self.admin, group).await
    }

    async fn topics(&self, pattern: &Pattern) -> Result<Vec<Topic>, LaneError> {
        self.up()?;
        self.topics.matching(pattern).await
    }

    fn watch_topics(&self) -> watch::Receiver<BTreeSet<Topic>> {
        self.topics.watch()
    }

    async fn create(&self, route: &Arc<Route>, topic: &Topic) -> Result<bool, LaneError> {
        self.up()?;
        let physical = Physical::of(route, topic)?;
        if self.cluster.partitions(&physical).await.map_err(Fault::on_lane)? > 0 {
            return Ok(false);
        }
        self.admin.create(&physical).await
    }

    async fn groups(&self, route: &Arc<Route>, topic: &Topic) -> Result<Vec<GroupReport>, LaneError> {
        let source = self.source(route, topic).await?;
        self.groups.report(&source, &self.admin).await
    }

    async fn examine(&self) -> Result<Vec<Problem>, LaneError> {
        let table = self.policy.table();
        let mut problems = examine::examine(&self.admin, &table).await?;
        if problems.is_empty() {
            // Topics can be asked for once their namespaces are there.
            for (route, written) in table.entries().filter(|(route, _)| route.lane.takes(Lane::Durable)) {
                let topics = self.topics.matching(&route.pattern).await?;
                problems.extend(examine::schemas(&self.admin, route, written, topics).await?);
            }
        }
        Ok(problems)
    }

    async fn probe(&self) -> Result<Duration, LaneError> {
        self.heartbeat.round_trip(PROBE_TIMEOUT).await
    }

    async fn broker(&self) -> Option<BrokerReport> {
        Some(monitor::report(&self.admin).await)
    }

    fn state(&self) -> watch::Receiver<LaneState> {
        self.state.clone()
    }

    async fn close(&self) {
        // What has no receipt by then is told that its outcome is not known.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, self.producers.settle()).await;
        self.stop.cancel();
        self.cluster.close();
        self.publishing.close();
    }
}
