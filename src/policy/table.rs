//! The routes: which topic takes which lane, and how. Functions of their arguments: no file, no clock.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::schema::Schema;
use crate::message::{Lane, Lanes};
use crate::origin::Origin;
use crate::topic::{Pattern, Topic};

/// What one `[[route]]` says, checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// The label on every metric.
    pub name: Arc<str>,
    pub pattern: Pattern,
    pub lane: Lanes,
    /// The NATS subject of a topic.
    pub nats: Template,
    /// The Pulsar topic of a topic.
    pub pulsar: Template,
    /// How many messages per topic a new subscriber can ask back on the ephemeral lane.
    pub history: usize,
    /// Listen upstream always, so that the history is whole.
    pub retain: bool,
    /// How many of this route's events may wait for one client.
    pub queue: usize,
    pub overflow: Overflow,
    /// Where a topic takes both lanes.
    pub live: Live,
    pub outage: OnOutage,
    pub retention: Retention,
    pub declare: Declare,
    /// How long what was published is known by its id, so that it is not stored again. Zero: not at all.
    pub dedup_window: Duration,
    pub redelivery: Redelivery,
    pub compression: Compression,
    pub pulsar_schema: PulsarSchema,
    /// The largest payload in bytes; the connection's limit holds besides.
    pub max_payload: Option<usize>,
    /// What a payload has to look like.
    pub schema: Option<Arc<Schema>>,
}

impl Route {
    /// Whether its topics are sent live at once and stored at the same time.
    pub fn is_live_first(&self) -> bool {
        self.lane == Lanes::Both && self.live == Live::First
    }

    /// How long the ring of a topic is; where storage has its history, there is none.
    pub fn ring(&self) -> usize {
        if self.lane.takes(Lane::Durable) { 0 } else { self.history }
    }
}

/// What happens when a client reads an ephemeral route too slowly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    DropOldest,
    Disconnect,
}

/// What subscribers of a topic of both lanes get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Live {
    /// What is stored; who listens at the live half's broker gets a copy of it.
    #[default]
    AfterStore,
    /// Whichever of the two comes first.
    First,
}

/// What becomes of a publish that the durable lane cannot take now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnOutage {
    /// It is refused at once.
    #[default]
    Reject,
    /// It is kept on this bridge's disk until the lane takes it.
    Spool,
}

impl OnOutage {
    pub fn as_str(self) -> &'static str {
        match self {
            OnOutage::Reject => "reject",
            OnOutage::Spool => "spool",
        }
    }
}

/// Whether a topic exists by being used, or has to be created first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declare {
    Auto,
    Required,
}

/// How what is published to Pulsar is folded. Every message carries its id and its time as properties, which look much
/// alike within a batch: folding them costs less than storing them twice, as a bookie does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    None,
    #[default]
    Lz4,
    Zstd,
}

/// What Pulsar's registry is told of a topic's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PulsarSchema {
    /// Nothing: bytes are what a topic without a schema holds.
    #[default]
    Bytes,
    String,
    /// The JSON schema that the topic has; a topic that has none is given none.
    Json,
}

impl PulsarSchema {
    pub fn as_str(self) -> &'static str {
        match self {
            PulsarSchema::Bytes => "bytes",
            PulsarSchema::String => "string",
            PulsarSchema::Json => "json",
        }
    }
}

/// How long the embedded log keeps what is stored. Nothing given: for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Retention {
    pub age: Option<Duration>,
    /// In live bytes of one topic.
    pub size: Option<u64>,
}

/// What becomes of a message that a group's members do not acknowledge.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Redelivery {
    /// How long a member may hold a delivery. `None`: until it settles it or leaves.
    pub ack_timeout: Option<Duration>,
    /// How long what was given back waits: after the first attempt, after the second, and so on; the last repeats.
    pub backoff: Vec<Duration>,
    /// `None`: it is handed out until a member acknowledges it.
    pub dead_letter: Option<DeadLetter>,
}

/// Where a message goes that nobody acknowledges.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    pub topic: Template,
    /// How often it is handed out before that.
    pub max_deliveries: u32,
}

/// A name made of a topic, at a broker or as another topic: `{topic}` and what stands around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    before: Arc<str>,
    after: Arc<str>,
}

impl Template {
    /// `None` where `{topic}` does not stand in it exactly once.
    pub fn parse(text: &str) -> Option<Self> {
        let (before, after) = text.split_once("{topic}")?;
        (!after.contains("{topic}")).then(|| Self { before: before.into(), after: after.into() })
    }

    /// The broker's name for a topic or a pattern.
    pub fn apply(&self, topic: &str) -> String {
        format!("{}{topic}{}", self.before, self.after)
    }

    /// The topic that the broker's name stands for.
    pub fn unapply<'a>(&self, name: &'a str) -> Option<&'a str> {
        name.strip_prefix(&*self.before)?.strip_suffix(&*self.after)
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{{topic}}{}", self.before, self.after)
    }
}

/// Where a route was written, and those of its options that were. Messages never ask; people do.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Written {
    pub route: Origin,
    pub options: BTreeMap<&'static str, Origin>,
}

/// All routes, the most specific first.
#[derive(Debug, Default)]
pub struct RouteTable {
    routes: Vec<Arc<Route>>,
    /// In the order of `routes`.
    written: Vec<Written>,
}

impl RouteTable {
    /// The caller has checked that no two routes have the same pattern.
    pub fn new(routes: impl IntoIterator<Item = Route>) -> Self {
        Self::written(routes.into_iter().map(|route| (route, Written::default())))
    }

    /// The same for routes that somebody wrote.
    pub fn written(routes: impl IntoIterator<Item = (Route, Written)>) -> Self {
        let mut routes: Vec<_> = routes.into_iter().map(|(route, at)| (Arc::new(route), at)).collect();
        routes.sort_by(|(a, _), (b, _)| a.pattern.precedence(&b.pattern));
        let (routes, written) = routes.into_iter().unzip();
        Self { routes, written }
    }

    /// The route of a topic: of the patterns that match, the most specific.
    pub fn route_for(&self, topic: &Topic) -> Option<&Arc<Route>> {
        self.routes.iter().find(|route| route.pattern.matches(topic))
    }

    /// The routes that may hold topics of a pattern, the most specific first.
    pub fn overlapping<'a>(&'a self, pattern: &'a Pattern) -> impl Iterator<Item = &'a Arc<Route>> {
        self.routes.iter().filter(move |route| route.pattern.overlaps(pattern))
    }

    /// Whether topics of this pattern can take this lane.
    pub fn reaches(&self, pattern: &Pattern, lane: Lane) -> bool {
        match pattern.topic() {
            Some(topic) => self.route_for(&topic).is_some_and(|route| route.lane.takes(lane)),
            None => self.overlapping(pattern).any(|route| route.lane.takes(lane)),
        }
    }

    pub fn routes(&self) -> &[Arc<Route>] {
        &self.routes
    }

    /// The routes and where they were written, the most specific first.
    pub fn entries(&self) -> impl Iterator<Item = (&Arc<Route>, &Written)> {
        self.routes.iter().zip(&self.written)
    }
}
