//! The crossing: the policy decides which lane a topic takes, the lanes carry.
//!
//! ```text
//!              ┌─ ephemeral ─▶ handed over
//! publish ──▶ route
//!              ├─ durable ───▶ in line ··receipt··▶ stored
//!              └─ both ──────▶ in line ··receipt··▶ stored, and handed over then or at once
//! ```
//! A publish has two moments: it has its place in the order, and its outcome is known. A caller who waits only for
//! the first keeps its order and can have many under way.

pub mod both;
pub mod canary;
pub mod catalog;
pub mod delivery;
pub mod groups;
pub mod filters;
pub mod ids;
pub mod outage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::broadcast;

use crate::lane::contract::{DurableLane, Ear, EphemeralLane, Joining, LaneError, Listening, Publisher};
use crate::lane::follow::Follow;
use crate::message::{
    Draft, LIVE, Lane, Lanes, Message, MessageId, Position, RESERVED, ReplyTo, Start, Timestamp,
};
use crate::policy::Policy;
use crate::policy::table::{Declare, Route};
use crate::telemetry::metrics::{Metrics, Stage};
use crate::telemetry::trace::{Came, Publish, Tracer};
use crate::topic::{Pattern, Topic};
use crate::wire::code::{Code, Fault};
use crate::wire::verbs::{Group, Status};
use canary::Canary;
use catalog::Catalog;
use delivery::{GroupMember, StoredLetters, Surroundings};
use filters::Filters;
use groups::Groups;
use ids::{Begun, Ids};
use outage::Outage;

/// How many notices a session may be behind; one that is further behind learns the present state instead.
const NOTICES_MAX: usize = 256;

pub struct Bridge {
    pub policy: Policy,
    pub ephemeral: Arc<dyn EphemeralLane>,
    pub durable: Arc<dyn DurableLane>,
    /// What publishes to the durable lane goes by.
    pub outage: Outage,
    pub canary: Canary,
    pub catalog: Arc<Catalog>,
    pub groups: Arc<Groups>,
    letters: Arc<StoredLetters>,
    pub filters: Filters,
    pub ids: Ids,
    pub metrics: Arc<Metrics>,
    pub tracer: Tracer,
    notices: broadcast::Sender<Notice>,
}

/// What every session should know.
#[derive(Debug, Clone)]
pub enum Notice {
    LaneDown {
        lane: Lane,
        message: String,
    },
    LaneUp {
        lane: Lane,
    },
    RoutesChanged {
        at: Timestamp,
    },
    TopicDeleted {
        topic: Topic,
    },
    /// Each client is asked to come back at a moment of its own within so long.
    Draining {
        reconnect_within: Duration,
    },
}

/// What became of a publish, once it is known.
#[derive(Debug, Clone, PartialEq)]
pub struct Published {
    pub status: Status,
    pub lane: Lanes,
    pub id: Option<MessageId>,
    pub position: Option<Position>,
    pub ts: Timestamp,
}

/// The outcome of a publish that has its place in the order.
pub enum Outcome {
    Known(Published),
    Later(BoxFuture<'static, Result<Published, Fault>>),
}

impl Outcome {
    pub async fn known(self) -> Result<Published, Fault> {
        match self {
            Outcome::Known(published) => Ok(published),
            Outcome::Later(outcome) => outcome.await,
        }
    }
}

impl Bridge {
    pub fn new(
        policy: Policy,
        ephemeral: Arc<dyn EphemeralLane>,
        durable: Arc<dyn DurableLane>,
        outage: Outage,
        catalog: Arc<Catalog>,
        metrics: Arc<Metrics>,
        publish_timeout: Duration,
    ) -> Self {
        let filters = Filters::new(metrics.clone());
        let ids = Ids::new(durable.clone(), metrics.clone(), publish_timeout);
        let canary = Canary::new(ephemeral.clone(), durable.clone(), outage.clone(), metrics.clone());
        Self {
            policy,
            ephemeral,
            durable,
            outage,
            canary,
            catalog,
            groups: Arc::default(),
            letters: Arc::default(),
            filters,
            ids,
            metrics,
            tracer: Tracer::default(),
            notices: broadcast::channel(NOTICES_MAX).0,
        }
    }

    /// Which lane carries what is published to this topic, where something may be.
    pub fn may_publish(&self, topic: &Topic) -> Result<Lanes, Fault> {
        let route = self.route(topic)?;
        self.exists(&route, topic)?;
        Ok(route.lane)
    }

    /// Returns once the message has its place in the order of its topic. The stages of its way are timed where it is of
    /// the sample, or traced.
    pub async fn publish(
        &self,
        topic: &Topic,
        draft: Draft,
        publisher: Publisher,
        heard: Came,
    ) -> Result<Outcome, Fault> {
        let (begun, id) = (Instant::now(), draft.id);
        let parent = self.tracer.parent(&draft.headers);
        let timed = heard.at.filter(|_| heard.is_sample || parent.is_some());
        let mut handed = None;
        let outcome = self.carry(topic, draft, publisher, begun, timed, &mut handed).await;
        let Some(parent) = parent else { return outcome };
        let way = self.route(topic).ok().map(|route| (route.pattern.clone(), route.lane));
        let (topic, heard) = (topic.clone(), heard.at);
        let publish = Publish { parent, topic, way, id, heard, decoded: begun, handed };
        let tracer = self.tracer.clone();
        let tell = move |known: Result<&Published, &Fault>| match known {
            Ok(Published { id, status, .. }) => tracer.published(Publish { id: *id, ..publish }, Ok(*status)),
            Err(fault) => tracer.published(publish, Err(fault.code)),
        };
        match outcome {
            Ok(Outcome::Later(later)) => {
                let told = later.inspect(|known| tell(known.as_ref()));
                return Ok(Outcome::Later(Box::pin(told)));
            }
            Ok(Outcome::Known(ref published)) => tell(Ok(published)),
            Err(ref fault) => tell(Err(fault)),
        }
        outcome
    }

    /// The same, untold. `handed` becomes when the lane was given the message.
    async fn carry(
        &self,
        topic: &Topic,
        draft: Draft,
        publisher: Publisher,
        begun: Instant,
        heard: Option<Instant>,
        handed: &mut Option<Instant>,
    ) -> Result<Outcome, Fault> {
        let route = self.route(topic)?;
        let bytes = draft.payload.len();
        // Where both carry, storage is what the publisher waits for.
        let lane = if route.lane.takes(Lane::Durable) { Lane::Durable } else { Lane::Ephemeral };
        let refused = |fault: Fault| {
            self.metrics.publish_failed(lane, &route.name, fault.code);
            fault
        };
        self.admit(&route, topic, &draft).map_err(refused)?;
        let given = draft.id;
        let message = draft.accept();
        let (id, ts) = (message.id, message.ts);
        let lanes = route.lane;
        let published = move |status, position| Published { status, lane: lanes, id, position, ts };
        match lane {
            Lane::Ephemeral => {
                *handed = heard.map(|heard| self.handed(lane, heard, begun));
                let handed = *handed;
                self.ephemeral.publish(&route, topic, message).await.map_err(fault).map_err(refused)?;
                self.catalog.published(topic);
                let done = Instant::now();
                self.metrics.published(lane, &route.name, bytes, done - begun);
                if let Some(handed) = handed {
                    self.metrics.took(lane, Stage::Broker, done - handed);
                }
                Ok(Outcome::Known(published(Status::Ok, None)))
            }
            Lane::Durable => {
                let known = self.ids.begin(&route, topic, given, ts).await;
                let ticket = match known.map_err(fault).map_err(refused)? {
                    Begun::New(ticket) => ticket,
                    Begun::Duplicate(position) => {
                        self.metrics.duplicate(lane, &route.name);
                        return Ok(Outcome::Known(published(Status::Duplicate, position)));
                    }
                };
                *handed = heard.map(|heard| self.handed(lane, heard, begun));
                let handed = *handed;
                let appended = self.outage.append(&route, topic, message, publisher).await;
                let receipt = ticket.of(appended).map_err(fault).map_err(refused)?;
                self.catalog.published(topic);
                let metrics = self.metrics.clone();
                Ok(Outcome::Later(Box::pin(async move {
                    match receipt.outcome().await {
                        Ok(Some(position)) => {
                            let done = Instant::now();
                            metrics.published(lane, &route.name, bytes, done - begun);
                            if let Some(handed) = handed {
                                metrics.took(lane, Stage::Broker, done - handed);
                            }
                            Ok(published(Status::Ok, Some(position)))
                        }
                        Ok(None) => {
                            metrics.spooled(&route.name, bytes);
                            Ok(published(Status::Spooled, None))
                        }
                        Err(error) => {
                            let fault = fault(error);
                            metrics.publish_failed(lane, &route.name, fault.code);
                            Err(fault)
                        }
                    }
                })))
            }
        }
    }

    /// The first reply to a message, and nothing but that.
    pub async fn request(&self, topic: &Topic, draft: Draft, timeout: Duration) -> Result<Message, Fault> {
        let begun = Instant::now();
        let route = self.route(topic)?;
        if !route.lane.takes(Lane::Ephemeral) {
            let message =
                format!("`{topic}` is durable; requests are for ephemeral topics. Nothing was sent");
            return Err(Fault::new(Code::LaneMismatch, message));
        }
        self.admit(&route, topic, &draft)?;
        let reply = self.ephemeral.request(&route, topic, draft.accept(), timeout).await.map_err(fault)?;
        self.metrics.requested(&route.name, begun.elapsed());
        Ok(reply)
    }

    pub async fn reply(&self, to: &ReplyTo, draft: Draft) -> Result<(), Fault> {
        if draft.delay.is_some() {
            return Err(delay_on_ephemeral());
        }
        self.ephemeral.reply(to, draft.accept()).await.map_err(fault)
    }

    /// Whether a subscription to this pattern can ever bring something, and may be made.
    pub fn may_subscribe(&self, pattern: &Pattern) -> Result<(), Fault> {
        match pattern.topic() {
            Some(topic) => {
                let route = self.route(&topic)?;
                self.exists(&route, &topic)
            }
            None if self.policy.table().overlapping(pattern).next().is_some() => Ok(()),
            None => Err(no_route(pattern.as_str())),
        }
    }

    /// Hears the ephemeral topics of a pattern.
    pub async fn listen(
        &self,
        pattern: &Pattern,
        group: Option<&str>,
        last: usize,
        ear: Arc<dyn Ear>,
    ) -> Result<Listening, Fault> {
        self.ephemeral.listen(pattern, group, last, ear).await.map_err(fault)
    }

    /// Follows one durable topic.
    pub async fn follow(&self, topic: &Topic, start: Start) -> Result<Follow, Fault> {
        let route = self.route(topic)?;
        Follow::open(self.durable.clone(), route, topic.clone(), start).await.map_err(fault)
    }

    /// Joins a group of one durable topic.
    pub async fn join(
        &self,
        topic: &Topic,
        group: &Group,
        start: Start,
    ) -> Result<(Arc<Route>, GroupMember), Fault> {
        let route = self.route(topic)?;
        let joining =
            Joining { group: group.name.clone(), mode: group.mode, start, prefetch: group.prefetch };
        let member = self.durable.join(&route, topic, joining).await.map_err(fault)?;
        let around = Surroundings {
            policy: self.policy.clone(),
            lane: self.durable.clone(),
            catalog: self.catalog.clone(),
            letters: self.letters.clone(),
            metrics: self.metrics.clone(),
        };
        let served = self.groups.join(topic.clone(), group.name.as_str().into());
        Ok((route.clone(), GroupMember::new(member, around, served, route)))
    }

    /// Has a group of one durable topic go on from somewhere else.
    pub async fn seek(&self, topic: &Topic, group: &str, start: Start) -> Result<(), Fault> {
        let route = self.route(topic)?;
        self.durable.seek(&route, topic, group, start).await.map_err(fault)
    }

    /// Whether a durable topic has a group of this name.
    pub async fn has_group(&self, topic: &Topic, group: &str) -> Result<bool, Fault> {
        let route = self.route(topic)?;
        let groups = self.durable.groups(&route, topic).await.map_err(fault)?;
        Ok(groups.iter().any(|known| known.name == group))
    }

    /// Deletes a group without members, and what it had acknowledged.
    pub async fn delete_group(&self, topic: &Topic, group: &str) -> Result<(), Fault> {
        let route = self.route(topic)?;
        let no_group = || Fault::new(Code::TopicNotFound, format!("topic `{topic}` has no group `{group}`"));
        if !route.lane.takes(Lane::Durable) {
            return Err(no_group());
        }
        let deleted = self.durable.delete_group(&route, topic, group).await.map_err(fault)?;
        if deleted { Ok(()) } else { Err(no_group()) }
    }

    /// Declares a topic.
    pub async fn create(&self, topic: &Topic) -> Result<Lanes, Fault> {
        let route = self.route(topic)?;
        let known = match route.declare {
            Declare::Required => self.catalog.is_declared(topic),
            Declare::Auto => self.catalog.get(topic).is_some(),
        };
        if known {
            return Err(Fault::new(Code::TopicExists, format!("topic `{topic}` exists")));
        }
        if route.lane.takes(Lane::Durable) {
            self.durable.create(&route, topic).await.map_err(fault)?;
        }
        self.catalog.declare(topic).map_err(not_kept)?;
        Ok(route.lane)
    }

    /// Forgets a topic. Nothing that is stored is erased.
    pub fn delete(&self, topic: &Topic) -> Result<(), Fault> {
        if !self.catalog.forget(topic).map_err(not_kept)? {
            return Err(Fault::new(Code::TopicNotFound, format!("topic `{topic}` is not known here")));
        }
        self.notify(Notice::TopicDeleted { topic: topic.clone() });
        Ok(())
    }

    pub fn notices(&self) -> broadcast::Receiver<Notice> {
        self.notices.subscribe()
    }

    pub fn notify(&self, notice: Notice) {
        // Nobody listens where nobody is connected.
        let _ = self.notices.send(notice);
    }

    /// Tells the sessions what happens to the lanes and the routes, until the process ends.
    pub async fn watch(self: Arc<Self>) {
        let (mut ephemeral, mut durable) = (self.ephemeral.state(), self.durable.state());
        let mut routes = self.policy.changes();
        let (mut was_up, mut first) = ([false; 2], true);
        loop {
            for (lane, state) in [(Lane::Ephemeral, &mut ephemeral), (Lane::Durable, &mut durable)] {
                let state = state.borrow_and_update().clone();
                let before = std::mem::replace(&mut was_up[lane as usize], state.is_up());
                self.metrics.lane_is(lane, state.is_up());
                match state {
                    _ if first || before == was_up[lane as usize] => {}
                    crate::lane::contract::LaneState::Up => self.notify(Notice::LaneUp { lane }),
                    crate::lane::contract::LaneState::Down(message) => {
                        self.notify(Notice::LaneDown { lane, message });
                    }
                }
            }
            first = false;
            tokio::select! {
                Ok(()) = ephemeral.changed() => {}
                Ok(()) = durable.changed() => {}
                Ok(()) = routes.changed() => self.notify(Notice::RoutesChanged { at: Timestamp::now() }),
                else => return,
            }
        }
    }

    /// A publish whose frame came then and was decoded is handed to its lane now.
    fn handed(&self, lane: Lane, heard: Instant, decoded: Instant) -> Instant {
        let now = Instant::now();
        self.metrics.took(lane, Stage::Read, decoded - heard);
        self.metrics.took(lane, Stage::Route, now - decoded);
        now
    }

    fn route(&self, topic: &Topic) -> Result<Arc<Route>, Fault> {
        self.policy.table().route_for(topic).cloned().ok_or_else(|| no_route(topic.as_str()))
    }

    fn exists(&self, route: &Route, topic: &Topic) -> Result<(), Fault> {
        match route.declare {
            Declare::Required if !self.catalog.is_declared(topic) => Err(Fault::new(
                Code::TopicNotFound,
                format!(
                    "route `{}` wants its topics declared first: POST /topics {{\"name\":\"{topic}\"}}",
                    route.name
                ),
            )),
            _ => Ok(()),
        }
    }

    fn admit(&self, route: &Route, topic: &Topic, draft: &Draft) -> Result<(), Fault> {
        self.exists(route, topic)?;
        if draft.headers.contains_key(LIVE) {
            let message = format!(
                "header `{LIVE}` was refused: names that begin with `{RESERVED}` belong to the fabric"
            );
            return Err(Fault::bad_request(message));
        }
        match route.max_payload {
            Some(max) if draft.payload.len() > max => {
                let size = draft.payload.len();
                let message = format!(
                    "the payload has {size} bytes, route `{}` takes {max}; nothing was sent",
                    route.name
                );
                return Err(Fault::new(Code::TooLarge, message));
            }
            _ => {}
        }
        if let Some(schema) = &route.schema
            && let Err(misfit) = schema.check(&draft.payload)
        {
            let message = format!(
                "the payload does not fit the schema of route `{}`: {misfit}; nothing was sent",
                route.name
            );
            return Err(Fault::bad_request(message));
        }
        match draft.delay {
            Some(_) if !route.lane.takes(Lane::Durable) => Err(delay_on_ephemeral()),
            _ => Ok(()),
        }
    }
}

fn delay_on_ephemeral() -> Fault {
    Fault::new(Code::LaneMismatch, "message.delay_ms is for durable topics; nothing was sent")
}

fn no_route(name: &str) -> Fault {
    Fault::new(Code::NoRoute, format!("no route matches `{name}`: add one to the routes file"))
}

fn not_kept(error: std::io::Error) -> Fault {
    Fault::new(Code::Internal, format!("the list of declared topics could not be written: {error}"))
}

/// What a lane's error means to a client.
pub fn fault(error: LaneError) -> Fault {
    let code = match &error {
        LaneError::Unavailable(_) => Code::LaneUnavailable,
        LaneError::OutcomeUnknown(_) => Code::OutcomeUnknown,
        LaneError::StorageFull(_) => Code::StorageFull,
        LaneError::TooLarge { .. } => Code::TooLarge,
        LaneError::Forbidden(_) => Code::Forbidden,
        LaneError::NoResponders(_) => Code::NoResponders,
        LaneError::Timeout(_) => Code::Timeout,
        LaneError::BadRequest(_) => Code::BadRequest,
        LaneError::GroupBusy(_) => Code::GroupBusy,
        LaneError::Corrupt { .. } | LaneError::Internal(_) => Code::Internal,
    };
    Fault::new(code, error.to_string())
}
