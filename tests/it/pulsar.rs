//! The durable lane on a real Pulsar: the promises of every durable carrier, and what is Pulsar's own. The native
//! clients here are the `pulsar` crate's, which shares nothing with how the lane reads.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use pulsar::{ProducerOptions, Pulsar, TokioExecutor, producer};
use reqwest::{Client, Method, StatusCode};
use serde_json::Value;
use tokio::time::{Instant, timeout};
use twinspan::lane::contract::{DurableLane, Handed, Joining, LaneState, Member, Publisher, Tag};
use twinspan::lane::pulsar::PulsarLane;
use twinspan::lane::settings::{DurableBackend, DurableSettings};
use twinspan::message::{Envelope, GroupMode, MessageId, Position, Start};
use twinspan::policy::Policy;
use twinspan::policy::table::{Retention, Route, RouteTable, Template};
use twinspan::telemetry::metrics::Metrics;
use twinspan::topic::Topic;

use crate::brokers::{Broker, left_out, shared_pulsar};
use crate::durable_contract::groups::group_promises;
use crate::durable_contract::{Ground, SOON, number, numbered, promises, shared, soon};

mod cluster;
mod faults;
mod gateway;
mod groups;
mod heartbeats;
mod load;
mod natives;
mod outages;
mod places;
mod producing;
mod quotas;
mod security;
mod tap;
mod topics;

fn settings(broker: &Broker) -> DurableSettings {
    DurableSettings {
        backend: DurableBackend::Pulsar,
        url: vec![broker.url()],
        admin_url: broker.admin_url(),
        publish_timeout: Duration::from_secs(10),
        spool_max: 1 << 30,
        token: None,
        tls: None,
    }
}

/// A route whose topics are wherever the template says.
fn route(pattern: &str, template: &str) -> Route {
    Route {
        pulsar: Template::parse(template).unwrap(),
        ..crate::durable_contract::route(pattern, pattern, Retention::default())
    }
}

/// A lane that is up.
async fn open(settings: &DurableSettings, policy: &Policy) -> Arc<PulsarLane> {
    let lane = PulsarLane::open(settings, policy.clone(), Arc::new(Metrics::new())).unwrap();
    is_up(&*lane).await;
    lane
}

async fn is_up(lane: &dyn DurableLane) {
    let mut state = lane.state();
    if timeout(SOON * 3, state.wait_for(LaneState::is_up)).await.is_err() {
        panic!("the lane does not come up: {:?}", *lane.state().borrow());
    }
}

/// How long it took.
async fn is_down(lane: &dyn DurableLane) -> Duration {
    let (began, mut state) = (Instant::now(), lane.state());
    soon(state.wait_for(|state| !state.is_up())).await.unwrap();
    began.elapsed()
}

fn topic(name: &str) -> Topic {
    Topic::parse(name).unwrap()
}

/// A lane on a broker, with one route, and a topic of its own.
#[derive(Clone)]
struct Bed {
    lane: Arc<PulsarLane>,
    route: Arc<Route>,
    topic: Topic,
    native: Pulsar<TokioExecutor>,
}

impl Bed {
    async fn shared() -> Self {
        Self::on(shared_pulsar().await).await
    }

    async fn on(broker: &Broker) -> Self {
        Self::routed(broker, route("t.>", "persistent://public/default/{topic}")).await
    }

    async fn routed(broker: &Broker, route: Route) -> Self {
        Self::with(route, settings(broker)).await
    }

    async fn with(route: Route, settings: DurableSettings) -> Self {
        let policy = Policy::new(RouteTable::new([route.clone()]));
        let lane = open(&settings, &policy).await;
        let topic = topic(&route.pattern.as_str().replace('>', &MessageId::new().to_string()));
        let native = Pulsar::builder(&settings.url[0], TokioExecutor).build().await.unwrap();
        Self { lane, route: Arc::new(route), topic, native }
    }

    fn physical(&self) -> String {
        self.route.pulsar.apply(self.topic.as_str())
    }

    async fn publish(&self, n: usize) -> Position {
        let receipt =
            self.lane.append(&self.route, &self.topic, numbered(n), Publisher::default()).await.unwrap();
        receipt.await.unwrap()
    }

    async fn join(&self, start: Start) -> Box<dyn Member> {
        self.lane.join(&self.route, &self.topic, shared("billing", start, 100)).await.unwrap()
    }

    async fn join_as(&self, mode: GroupMode) -> Box<dyn Member> {
        let joining = Joining { mode, ..shared("billing", Start::Earliest, 100) };
        self.lane.join(&self.route, &self.topic, joining).await.unwrap()
    }

    /// Stores these numbers as one batch, as a native client does.
    async fn batch(&self, numbers: std::ops::Range<usize>) {
        let options = ProducerOptions { batch_size: Some(numbers.len() as u32), ..Default::default() };
        let mut producer =
            self.native.producer().with_topic(self.physical()).with_options(options).build().await.unwrap();
        let mut sent = Vec::new();
        for n in numbers.clone() {
            let message = producer::Message { payload: n.to_string().into(), ..Default::default() };
            sent.push(producer.send_non_blocking(message).await.unwrap());
        }
        for (sent, index) in sent.into_iter().zip(0..) {
            let id = soon(sent).await.unwrap().message_id.unwrap();
            assert_eq!(
                (id.batch_index, id.batch_size),
                (Some(index), Some(numbers.len() as i32)),
                "one batch"
            );
        }
    }
}

/// The next `count` deliveries.
async fn take(member: &dyn Member, count: usize) -> Vec<Handed> {
    let mut taken = Vec::new();
    while taken.len() < count {
        taken.extend(soon(member.next()).await.unwrap().into_iter().map(Result::unwrap));
    }
    taken
}

async fn assert_quiet(member: &dyn Member) {
    let came = timeout(Duration::from_millis(300), member.next()).await;
    assert!(came.is_err(), "nothing should come, and this did: {came:?}");
}

fn tag(handed: &[Handed], n: usize) -> Tag {
    handed.iter().find(|handed| number(&handed.envelope) == n).unwrap().tag
}

fn sorted(handed: &[Handed]) -> Vec<usize> {
    let mut numbers: Vec<_> = handed.iter().map(|handed| number(&handed.envelope)).collect();
    numbers.sort_unstable();
    numbers
}

fn position(envelope: &Envelope) -> Position {
    envelope.stored.as_ref().unwrap().position.clone()
}

/// Asks Pulsar's admin API, which has to agree.
pub async fn admin(broker: &Broker, method: Method, path: &str, body: Value) {
    twinspan::lane::install_crypto();
    let url = format!("{}/admin/v2/{path}", broker.admin_url());
    let mut request = Client::new().request(method, url).json(&body);
    if let Some(token) = broker.token() {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await.unwrap();
    let status = answer.status();
    let agreed = status.is_success() || status == StatusCode::CONFLICT;
    assert!(agreed, "{path}: {status} {}", answer.text().await.unwrap());
}

mod contract {
    use super::*;

    async fn ground() -> Option<Ground> {
        if left_out() {
            return None;
        }
        let broker = shared_pulsar().await;
        let route = route("contract.>", "persistent://public/default/{topic}");
        let policy = Policy::new(RouteTable::new([route.clone()]));
        let settings = settings(broker);
        let open = move || -> BoxFuture<'static, Arc<dyn DurableLane>> {
            let (settings, policy) = (settings.clone(), policy.clone());
            Box::pin(async move { super::open(&settings, &policy).await as Arc<dyn DurableLane> })
        };
        Some(Ground { lane: open().await, route: Arc::new(route), open: Box::new(open) })
    }

    promises!(ground);
    group_promises!(ground);
}
