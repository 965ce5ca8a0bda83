//! A defect behind one connection ends that connection and nothing else; what a lane fails at is said as it is.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::extract::ws::WebSocketUpgrade;
use axum::routing::get;
use bytes::Bytes;
use futures_util::future::{Either, ready};
use serde_json::json;
use tokio::sync::watch;
use twinspan::client::{Client, ClientError};
use twinspan::lane::bus::Bus;
use twinspan::lane::contract::{
    Appending, DurableLane, Ear, EphemeralLane, GroupReport, Joining, LaneError, LaneState, Listening,
    Member, Publisher, Reader, Receipt,
};
use twinspan::lane::tail::Tail;
use twinspan::message::{Envelope, Message, ReplyTo, Start, Timestamp};
use twinspan::policy::table::Route;
use twinspan::server::Carriers;
use twinspan::session::{self, Manner};
use twinspan::telemetry::trace::Came;
use twinspan::topic::{Pattern, Topic};
use twinspan::wire::json::Json;
use twinspan::wire::verbs::{Asked, Codec, Event};

use crate::harness::{Plan, Span, answer, draft, eventually, http_client, next, next_payload, nothing, soon};
use crate::lanes::{ephemeral, policy};

/// The bus, with defects at certain topics.
struct Flawed(Arc<Bus>);

#[async_trait]
impl EphemeralLane for Flawed {
    async fn publish(&self, route: &Arc<Route>, topic: &Topic, message: Message) -> Result<(), LaneError> {
        match topic.as_str() {
            "telemetry.defect" => panic!("a defect, on purpose"),
            "telemetry.down" => Err(LaneError::Unavailable("the broker is away".into())),
            "telemetry.refused" => Err(LaneError::Forbidden("the broker says no".into())),
            _ => self.0.publish(route, topic, message).await,
        }
    }

    async fn listen(
        &self,
        pattern: &Pattern,
        group: Option<&str>,
        last: usize,
        ear: Arc<dyn Ear>,
    ) -> Result<Listening, LaneError> {
        assert_ne!(pattern.as_str(), "telemetry.deaf", "a defect, on purpose");
        self.0.listen(pattern, group, last, ear).await
    }

    async fn request(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        timeout: Duration,
    ) -> Result<Message, LaneError> {
        tokio::task::yield_now().await;
        assert_ne!(topic.as_str(), "svc.defect", "a defect, on purpose");
        self.0.request(route, topic, message, timeout).await
    }

    async fn reply(&self, to: &ReplyTo, message: Message) -> Result<(), LaneError> {
        self.0.reply(to, message).await
    }

    async fn probe(&self) -> Result<Duration, LaneError> {
        self.0.probe().await
    }

    fn state(&self) -> watch::Receiver<LaneState> {
        self.0.state()
    }

    async fn close(&self) {}
}

/// A durable lane that does nothing but fail, at each topic in its way.
struct Failing(watch::Sender<LaneState>);

impl Failing {
    fn unavailable() -> LaneError {
        LaneError::Unavailable("storage is away".into())
    }
}

#[async_trait]
impl DurableLane for Failing {
    fn append<'a>(&'a self, _: &'a Arc<Route>, topic: &'a Topic, _: Message, _: Publisher) -> Appending<'a> {
        let later = match topic.as_str() {
            "orders.unknown" => LaneError::OutcomeUnknown("the connection broke".into()),
            "orders.full" => LaneError::StorageFull("the disk is full".into()),
            "orders.large" => LaneError::TooLarge { size: 9, max: 8 },
            "orders.odd" => LaneError::Internal("a defect at the broker".into()),
            "orders.defect" => {
                return Either::Left(ready(Ok(Receipt::of(async {
                    tokio::task::yield_now().await;
                    panic!("a defect, on purpose")
                }))));
            }
            _ => return Either::Left(ready(Err(Self::unavailable()))),
        };
        Either::Left(ready(Ok(Receipt::of(async move { Err(later) }))))
    }

    async fn tail(&self, _: &Arc<Route>, _: &Topic) -> Result<Arc<Tail>, LaneError> {
        Ok(Tail::new(None).0)
    }

    async fn read(&self, _: &Arc<Route>, topic: &Topic, _: Start) -> Result<Box<dyn Reader>, LaneError> {
        match topic.as_str() {
            "orders.defect" => Ok(Box::new(Panicking)),
            _ => Err(Self::unavailable()),
        }
    }

    async fn join(&self, _: &Arc<Route>, _: &Topic, _: Joining) -> Result<Box<dyn Member>, LaneError> {
        Err(LaneError::GroupBusy("the group has another mode".into()))
    }

    async fn seek(&self, _: &Arc<Route>, _: &Topic, _: &str, _: Start) -> Result<(), LaneError> {
        Err(Self::unavailable())
    }

    async fn delete_group(&self, _: &Arc<Route>, _: &Topic, _: &str) -> Result<bool, LaneError> {
        Err(Self::unavailable())
    }

    async fn topics(&self, _: &Pattern) -> Result<Vec<Topic>, LaneError> {
        Err(Self::unavailable())
    }

    fn watch_topics(&self) -> watch::Receiver<BTreeSet<Topic>> {
        watch::channel(BTreeSet::new()).1
    }

    async fn create(&self, _: &Arc<Route>, _: &Topic) -> Result<bool, LaneError> {
        Err(Self::unavailable())
    }

    async fn groups(&self, _: &Arc<Route>, _: &Topic) -> Result<Vec<GroupReport>, LaneError> {
        Err(Self::unavailable())
    }

    async fn probe(&self) -> Result<Duration, LaneError> {
        Err(Self::unavailable())
    }

    fn state(&self) -> watch::Receiver<LaneState> {
        self.0.subscribe()
    }

    async fn close(&self) {}
}

struct Panicking;

#[async_trait]
impl Reader for Panicking {
    async fn next(&mut self) -> Result<Option<Vec<Result<Arc<Envelope>, LaneError>>>, LaneError> {
        panic!("a defect, on purpose")
    }

    fn skipped(&mut self) -> bool {
        false
    }
}

/// A bridge whose lanes fail as they are asked to.
async fn flawed() -> Span {
    let policy = policy([ephemeral("telemetry.>", "{topic}"), ephemeral("svc.>", "{topic}")]);
    let bus = Bus::new(policy, 1 << 20);
    let failing = Failing(watch::Sender::new(LaneState::Up));
    let lanes = Carriers { ephemeral: Arc::new(Flawed(bus)), durable: Arc::new(failing) };
    Span::with(Plan { lanes: Some(lanes), ..Plan::default() }).await
}

async fn closed_with(client: &mut Client) -> u16 {
    loop {
        match soon(client.next()).await {
            Ok(_) => {}
            Err(ClientError::Closed { code, .. }) => return code,
            Err(other) => panic!("{other}"),
        }
    }
}

#[tokio::test]
async fn a_panic_in_one_connections_task_closes_it_with_1011_is_counted_and_nothing_else_notices() {
    let span = flawed().await;
    let mut bystander = span.client().await;
    bystander.subscribe("telemetry.>", nothing()).await.unwrap();
    let table = [
        ("in the reader", r#"{"type":"publish","topic":"telemetry.defect","message":{"payload":1}}"#),
        ("while subscribing", r#"{"type":"subscribe","topic":"telemetry.deaf"}"#),
        (
            "in a request",
            r#"{"type":"request","request_id":"q","topic":"svc.defect","message":{"payload":1}}"#,
        ),
        ("in a receipt", r#"{"type":"publish","topic":"orders.defect","message":{"payload":1}}"#),
        ("in a replay", r#"{"type":"subscribe","topic":"orders.defect","from":"earliest"}"#),
    ];
    for (count, (what, frame)) in (1..).zip(table) {
        let mut client = span.client().await;
        client.subscribe("telemetry.own", nothing()).await.unwrap();
        client.send(frame).await.unwrap();
        assert_eq!(closed_with(&mut client).await, 1011, "{what}");
        assert_eq!(span.metric(r#"twinspan_close_total{code="1011"}"#), f64::from(count), "{what}");
        // It left nothing behind, and whoever shares its lanes goes on.
        eventually("it is gone", async || span.app().roster.len() == 1).await;
        assert_eq!(span.app().bridge.catalog.subscribers(), 1, "{what}");
        let publisher = span.client().await;
        publisher.publish("telemetry.own", &draft("1")).await.unwrap();
        assert_eq!(next_payload(&mut bystander).await, "1");
        drop(publisher);
        eventually("the publisher is gone", async || span.app().roster.len() == 1).await;
    }
}

/// The JSON dialect with a defect in encoding.
struct Defective;

impl Codec for Defective {
    fn decode(&self, message: &Bytes) -> Asked {
        Json.decode(message)
    }

    fn encode(&self, event: &Event, now: Timestamp) -> Bytes {
        assert!(!matches!(event, Event::Pong { .. }), "a defect, on purpose");
        Json.encode(event, now)
    }
}

#[tokio::test]
async fn a_panic_in_the_writer_closes_the_connection_as_well() {
    let span = flawed().await;
    let app = span.app().clone();
    let way_in = get(async move |upgrade: WebSocketUpgrade| {
        let manner = Manner { codec: Arc::new(Defective), greets: false, dialect: "json" };
        upgrade.on_upgrade(move |socket| {
            session::run(socket, app.bridge.clone(), app.roster.clone(), app.session.clone(), manner)
        })
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = tokio::spawn(axum::serve(listener, Router::new().route("/ws", way_in)).into_future());
    let mut client = Client::connect(&format!("ws://{address}/ws")).await.unwrap();
    client.send(r#"{"type":"ping"}"#).await.unwrap();
    assert_eq!(closed_with(&mut client).await, 1011);
    assert_eq!(span.metric(r#"twinspan_close_total{code="1011"}"#), 1.0);
    eventually("its session ends", async || span.app().roster.is_empty()).await;
    serving.abort();
}

#[tokio::test]
async fn what_a_lane_fails_at_is_said_on_the_wire_and_whether_to_try_again() {
    let span = flawed().await;
    let mut client = span.client().await;
    let message = json!({"payload": 1});
    let table = [
        ("publish", "telemetry.down", "LANE_UNAVAILABLE", true, "nothing was sent or stored"),
        ("publish", "telemetry.refused", "FORBIDDEN", false, "the broker says no"),
        ("publish", "orders.down", "LANE_UNAVAILABLE", true, "nothing was sent or stored"),
        ("publish", "orders.unknown", "OUTCOME_UNKNOWN", true, "may or may not be stored"),
        ("publish", "orders.full", "STORAGE_FULL", true, "nothing was stored"),
        ("publish", "orders.large", "TOO_LARGE", false, "nothing was sent"),
        ("publish", "orders.odd", "INTERNAL", true, "a defect at the broker"),
        ("subscribe", "orders.*", "LANE_UNAVAILABLE", true, "nothing was sent or stored"),
    ];
    for (n, (kind, topic, code, retryable, outcome)) in table.into_iter().enumerate() {
        let frame = json!({"type": kind, "topic": topic, "message": message, "request_id": n.to_string(), "confirm": false});
        client.send(frame.to_string()).await.unwrap();
        let heard = next(&mut client).await;
        assert_eq!(heard.request_id, Some(n.to_string()));
        let error = heard.error.unwrap_or_else(|| panic!("{}", heard.frame));
        assert_eq!((error.code.as_str(), error.retryable), (code, retryable), "{kind} {topic}");
        assert!(error.message.contains(outcome), "{kind} {topic}: {}", error.message);
        assert!(span.metric(&format!("twinspan_errors_total{{code=\"{code}\"}}")) > 0.0, "{code} is counted");
    }
    let group = client.subscribe("orders.g", json!({"group": "g"})).await;
    assert_eq!(crate::harness::refused(group), "GROUP_BUSY");
    // The connection lives on, and so does the other lane.
    client.subscribe("telemetry.a", nothing()).await.unwrap();
    client.publish("telemetry.a", &draft("1")).await.unwrap();
    assert_eq!(next_payload(&mut client).await, "1");
}

#[tokio::test]
async fn a_lane_that_is_up_and_brings_no_heartbeat_back_is_degraded() {
    let span = flawed().await;
    eventually("it is degraded", async || {
        span.get("/health").await.1["lanes"]["durable"]["status"] == "degraded"
    })
    .await;
    let (status, health) = answer(http_client().get(span.admin("/health")).send().await.unwrap()).await;
    let check = &health["checks"]["durable:lane"][0];
    assert_eq!((status, &health["status"], &check["status"]), (200, &json!("warn"), &json!("warn")));
    assert!(check["output"].as_str().unwrap().contains("storage is away"), "{check}");
    assert_eq!(check["probe"]["missing"], check["probe"]["count"]);
    assert_eq!(span.metric(r#"twinspan_lane_state{lane="durable"}"#), 1.0);
    assert_eq!(span.metric(r#"twinspan_lane_up{lane="durable"}"#), 1.0, "it takes what it is given");
    assert!(span.metric(r#"twinspan_probe_failures_total{lane="durable"}"#) >= 3.0);
    assert_eq!(span.get("/readyz").await.0, 200);
}

#[tokio::test]
async fn an_event_that_is_larger_than_a_frame_may_be_is_named_and_the_next_one_comes() {
    let mut plan = Plan::default();
    plan.settings.session.max_message = 1024;
    let span = Span::with(plan).await;
    let mut client = span.client().await;
    for topic in ["telemetry.a", "orders.a"] {
        client.subscribe(topic, nothing()).await.unwrap();
        // As a broker's own client would: not held to what a connection of ours may publish.
        let publish = async |payload: String| {
            let outcome = span
                .app()
                .bridge
                .publish(&Topic::parse(topic).unwrap(), draft(payload), Publisher(1), Came::default())
                .await;
            outcome.unwrap().known().await.unwrap()
        };
        publish(json!("x".repeat(64 * 1024)).to_string()).await;
        publish("2".into()).await;
        let error = next(&mut client).await.error.unwrap();
        assert_eq!(error.code, "TOO_LARGE");
        assert!(error.message.contains(topic) && error.message.contains("session.max_message"), "{error:?}");
        assert_eq!(next_payload(&mut client).await, "2");
    }
}
