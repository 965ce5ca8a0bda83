//! What the tests of the lanes share: routes, messages, and an ear that remembers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use twinspan::lane::contract::{Ear, EphemeralLane, LaneState, Listening};
use twinspan::lane::nats::Nats;
use twinspan::lane::settings::{EphemeralBackend, EphemeralSettings};
use twinspan::message::{Draft, Envelope, Lanes, Message, MessageId};
use twinspan::policy::Policy;
use twinspan::policy::table::{
    Compression, Declare, Live, OnOutage, Overflow, PulsarSchema, Redelivery, Retention, Route, RouteTable,
    Template,
};
use twinspan::telemetry::metrics::Metrics;
use twinspan::topic::{Pattern, Topic};

/// Long enough for the busiest machine; nothing waits for it unless the test is about to fail.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub fn topic(name: &str) -> Topic {
    Topic::parse(name).unwrap()
}

pub fn pattern(name: &str) -> Pattern {
    Pattern::parse(name).unwrap()
}

pub fn template(text: &str) -> Template {
    Template::parse(text).unwrap()
}

pub fn message(payload: impl Into<String>) -> Message {
    Draft { payload: payload.into().into(), ..Draft::default() }.accept()
}

/// A name that no other test uses.
pub fn unique() -> String {
    MessageId::new().to_string()
}

/// An ephemeral route with room for everything.
pub fn ephemeral(topics: &str, nats: &str) -> Route {
    Route {
        name: topics.into(),
        pattern: pattern(topics),
        lane: Lanes::EPHEMERAL,
        nats: template(nats),
        pulsar: template("{topic}"),
        history: 100_000,
        retain: false,
        queue: 100,
        overflow: Overflow::DropOldest,
        live: Live::AfterStore,
        outage: OnOutage::Reject,
        retention: Retention::default(),
        declare: Declare::Auto,
        dedup_window: Duration::ZERO,
        redelivery: Redelivery::default(),
        compression: Compression::None,
        pulsar_schema: PulsarSchema::Bytes,
        max_payload: None,
        schema: None,
    }
}

pub fn policy(routes: impl IntoIterator<Item = Route>) -> Policy {
    Policy::new(RouteTable::new(routes))
}

/// The route of a topic, as the bridge would look it up.
pub fn route(policy: &Policy, name: &Topic) -> Arc<Route> {
    policy.table().route_for(name).expect("the topic has a route").clone()
}

pub fn settings(url: impl Into<String>) -> EphemeralSettings {
    EphemeralSettings {
        backend: EphemeralBackend::Nats,
        url: vec![url.into()],
        monitor_url: String::new(),
        history_bytes: 64 << 20,
        token: None,
        user: None,
        password: None,
        credentials: None,
        tls: None,
    }
}

/// A lane that is up.
pub async fn nats(settings: &EphemeralSettings, policy: &Policy) -> Arc<Nats> {
    let lane = Nats::open(settings, policy.clone(), Arc::new(Metrics::new())).await.unwrap();
    is_up(&*lane).await;
    lane
}

pub async fn is_up(lane: &dyn EphemeralLane) {
    becomes(lane, "Up", LaneState::is_up).await;
}

/// The sentence.
pub async fn is_down(lane: &dyn EphemeralLane) -> String {
    match becomes(lane, "Down", |state| !state.is_up()).await {
        LaneState::Down(why) => why,
        LaneState::Up => unreachable!(),
    }
}

pub async fn becomes(lane: &dyn EphemeralLane, what: &str, is_it: impl Fn(&LaneState) -> bool) -> LaneState {
    let mut states = lane.state();
    let waited = tokio::time::timeout(PATIENCE, states.wait_for(|state| is_it(state)))
        .await
        .map(|s| s.map(|s| s.clone()));
    match waited {
        Ok(state) => state.unwrap(),
        Err(_) => panic!("the lane does not become {what}: {:?}", *lane.state().borrow()),
    }
}

/// Publishes by the policy's route.
pub async fn publish(lane: &dyn EphemeralLane, policy: &Policy, name: &str, payload: impl Into<String>) {
    let name = topic(name);
    lane.publish(&route(policy, &name), &name, message(payload)).await.unwrap();
}

/// Waits until it is so.
pub async fn eventually<F: Future<Output = bool>>(what: &str, is_so: impl Fn() -> F) {
    let trying = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, trying).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// An ear that remembers what it heard.
#[derive(Default)]
pub struct Recorder {
    heard: Mutex<Vec<(Arc<Route>, Arc<Envelope>)>>,
    missed: AtomicUsize,
    changed: Notify,
}

impl Ear for Recorder {
    fn hear(&self, route: &Arc<Route>, envelope: &Arc<Envelope>) {
        self.heard.lock().unwrap().push((route.clone(), envelope.clone()));
        self.changed.notify_waiters();
    }

    fn missed(&self) {
        self.missed.fetch_add(1, Ordering::SeqCst);
        self.changed.notify_waiters();
    }
}

impl Recorder {
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Listens with a new one.
    pub async fn listening(lane: &dyn EphemeralLane, topics: &str) -> (Arc<Self>, Listening) {
        let ear = Self::new();
        let listening = lane.listen(&pattern(topics), None, 0, ear.clone()).await.unwrap();
        (ear, listening)
    }

    pub fn heard(&self) -> Vec<Arc<Envelope>> {
        self.heard.lock().unwrap().iter().map(|(_, envelope)| envelope.clone()).collect()
    }

    pub fn routes(&self) -> Vec<Arc<Route>> {
        self.heard.lock().unwrap().iter().map(|(route, _)| route.clone()).collect()
    }

    pub fn payloads(&self) -> Vec<String> {
        self.heard().iter().map(|envelope| text(envelope)).collect()
    }

    pub fn missed_count(&self) -> usize {
        self.missed.load(Ordering::SeqCst)
    }

    /// Waits until so many were heard, and returns them.
    pub async fn wait(&self, count: usize) -> Vec<Arc<Envelope>> {
        self.until(&format!("{count} messages"), |ear| ear.heard.lock().unwrap().len() >= count).await;
        self.heard()
    }

    pub async fn wait_missed(&self, count: usize) {
        self.until("word of a gap", |ear| ear.missed_count() >= count).await;
    }

    /// Waits until this one was heard: what was published before it by the same publisher would have been, too.
    pub async fn wait_for(&self, payload: &str) {
        self.until(payload, |ear| ear.payloads().iter().any(|heard| heard == payload)).await;
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if is_so(self) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(PATIENCE, waiting).await.is_err() {
            let heard = self.payloads();
            panic!("never heard {what}; heard {} messages, the last: {:?}", heard.len(), heard.last());
        }
    }
}

pub fn text(envelope: &Envelope) -> String {
    String::from_utf8_lossy(&envelope.message.payload).into_owned()
}

/// How often each was heard.
pub fn counted(payloads: impl IntoIterator<Item = String>) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for payload in payloads {
        *counts.entry(payload).or_default() += 1;
    }
    counts
}
