//! The monitoring socket: a snapshot, how the bridge is every two seconds, and what happens when it happens.

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, client_async, connect_async};
use twinspan::config::server::ReadyRequires;
use twinspan::message::{Lane, Timestamp};
use twinspan::topic::Topic;

use crate::brokers::{Broker, Options, left_out};
use crate::harness::{
    Plan, Span, answer, draft, eventually, http_client, next, on_both_kinds, replace, soon,
};

/// How long a lane's change may take to show.
const SHOWN: Duration = Duration::from_secs(5);

fn url(span: &Span) -> String {
    format!("ws://{}/api/monitoring/ws", span.running.admin)
}

struct Watcher(WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Watcher {
    async fn connect(span: &Span) -> Self {
        Self(soon(connect_async(url(span))).await.unwrap().0)
    }

    async fn next(&mut self) -> Value {
        loop {
            if let Message::Text(text) = soon(self.0.next()).await.unwrap().unwrap() {
                return serde_json::from_str(&text).unwrap();
            }
        }
    }

    async fn until(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        soon(async {
            loop {
                let frame = self.next().await;
                if is_it(&frame) {
                    return frame;
                }
            }
        })
        .await
    }

    async fn event(&mut self, kind: &str) -> Value {
        self.until(|frame| frame["type"] == kind).await
    }
}

async fn a_watcher_is_told_how_the_bridge_is_and_what_happens(span: Span) {
    let mut watcher = Watcher::connect(&span).await;
    let snapshot = watcher.next().await;
    assert_eq!(snapshot["type"], "snapshot");
    let orders = json!({"name": "orders", "topic": "orders.>", "lane": "durable"});
    assert!(snapshot["routes"].as_array().unwrap().contains(&orders), "{snapshot}");
    assert_eq!(snapshot["listen"], span.running.listen.to_string());
    assert_eq!(snapshot["reload"]["ok"], true);

    let (mut member, client) = (span.client().await, span.client().await);
    member.subscribe("orders.a", json!({"group": "billing"})).await.unwrap();
    for _ in 0..2 {
        let event = watcher.until(|frame| frame["type"] != "metrics").await;
        assert_eq!(event["topic"], "orders.a");
        match event["type"].as_str() {
            Some("TopicCreated") => assert_eq!(event["lane"], "durable"),
            _ => assert_eq!((&event["type"], &event["group"]), (&json!("GroupJoined"), &json!("billing"))),
        }
    }
    for n in 0..20 {
        client.publish("orders.a", &draft(n.to_string())).await.unwrap();
    }
    next(&mut member).await;
    let frame = watcher.until(|frame| frame["lanes"]["durable"]["in_per_second"].as_f64() > Some(0.0)).await;
    assert_eq!(frame["type"], "metrics");
    let durable = &frame["lanes"]["durable"];
    assert_eq!((&durable["state"], &durable["errors_per_second"]), (&json!("up"), &json!(0.0)), "{durable}");
    assert!(durable["publish"]["p99_ms"].as_f64() > Some(0.0), "{durable}");
    assert!(durable["probe"]["count"].as_u64() > Some(0), "{durable}");
    assert_eq!(durable["outage"]["breaker"], "closed");
    let topic = frame["topics"].as_array().unwrap().iter().find(|topic| topic["name"] == "orders.a").unwrap();
    assert_eq!((&topic["messages"], &topic["subscribers"]), (&json!(20), &json!(1)), "{topic}");
    let on_brokers = !span.own.is_empty();
    for (lane, tells) in [("ephemeral", "slow_consumers"), ("durable", "version")] {
        let broker = &frame["lanes"][lane]["broker"];
        assert_eq!(broker.is_object(), on_brokers, "{broker}");
        if lane == "durable" && on_brokers {
            assert!(broker[tells].is_string() && broker["connections"].as_u64() > Some(0), "{broker}");
        }
    }
    let group =
        watcher.until(|frame| frame["groups"].as_array().is_some_and(|groups| !groups.is_empty())).await;
    let group = &group["groups"][0];
    assert_eq!(
        (&group["group"], &group["mode"], &group["members"]),
        (&json!("billing"), &json!("shared"), &json!(1))
    );
    assert_eq!(group["backlog"], 20);

    drop(member);
    let left = watcher.event("GroupLeft").await;
    assert_eq!(left["group"], "billing");
    let deleted = http_client().delete(format!("http://{}/topics/orders.a", span.running.listen));
    assert_eq!(deleted.send().await.unwrap().status(), 204);
    assert_eq!(watcher.event("TopicDeleted").await["topic"], "orders.a");
    let good = std::fs::read_to_string(&span.routes).unwrap();
    replace(&span.routes, "[[route]]\ntopic = \"orders.>\"\nlane = \"durabel\"\n");
    let refused = watcher.event("RouteReloaded").await;
    assert_eq!(refused["ok"], false);
    assert!(refused["problems"][0].as_str().unwrap().contains("durabel"), "{refused}");
    replace(
        &span.routes,
        &format!("{good}\n[[route]]\nname = \"new\"\ntopic = \"new.>\"\nlane = \"ephemeral\"\n"),
    );
    let reloaded = watcher.event("RouteReloaded").await;
    assert_eq!(reloaded["ok"], true);
    assert!(reloaded["changes"].as_str().unwrap().contains("added new"), "{reloaded}");

    // Who comes later finds what happened before.
    let snapshot = Watcher::connect(&span).await.next().await;
    let kinds: Vec<_> =
        snapshot["events"].as_array().unwrap().iter().map(|event| event["type"].clone()).collect();
    for kind in ["TopicCreated", "GroupJoined", "GroupLeft", "TopicDeleted", "RouteReloaded"] {
        assert!(kinds.contains(&json!(kind)), "{kind}: {kinds:?}");
    }
}

on_both_kinds!(a_watcher_is_told_how_the_bridge_is_and_what_happens);

#[tokio::test]
async fn a_watcher_that_is_slow_finds_the_newest_and_no_queue_of_the_old() {
    let span = Span::start().await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = soon(socket.connect(span.running.admin)).await.unwrap();
    let mut slow = soon(client_async(url(&span), stream)).await.unwrap().0;
    // More than any socket holds, and more each time than a watcher is kept.
    let topics = 20_000;
    for n in 0..topics {
        let name = format!("orders.{}.{n}", "x".repeat(230));
        span.app().bridge.catalog.published(&Topic::parse(&name).unwrap());
        if n % 100 == 0 {
            tokio::task::yield_now().await;
        }
    }
    let done = Timestamp::now();
    let (mut events, mut snapshots) = (0, 0);
    let newest = loop {
        let Message::Text(text) = soon(slow.next()).await.unwrap().unwrap() else { continue };
        let frame: Value = serde_json::from_str(&text).unwrap();
        match frame["type"].as_str().unwrap() {
            "TopicCreated" => events += 1,
            "snapshot" => snapshots += 1,
            _ => {}
        }
        let is_new = frame["ts"].as_str().unwrap().parse::<Timestamp>().unwrap() > done;
        if frame["type"] != "TopicCreated" && is_new {
            break frame;
        }
    };
    assert!(events < topics, "what was too much for it was left out: {events}");
    assert!(snapshots >= 2, "and it was told anew what there is");
    assert_eq!(newest["topics"].as_array().unwrap().len(), 200, "lists are bounded");
    slow.close(None).await.unwrap();
}

#[tokio::test]
async fn pages_of_other_origins_see_nothing() {
    let span = Span::start().await;
    let open = async |origin: &str| {
        let mut request = url(&span).into_client_request().unwrap();
        request.headers_mut().insert("origin", origin.parse().unwrap());
        soon(connect_async(request)).await.map(drop)
    };
    open(&format!("http://{}", span.running.admin)).await.unwrap();
    for other in ["http://evil.example", "null", "http://127.0.0.1"] {
        match open(other).await {
            Err(Error::Http(response)) => assert_eq!(response.status(), 403, "{other}"),
            other => panic!("{other:?}"),
        }
    }
}

/// Waits until a lane's state is shown everywhere, which must not take longer than it may.
async fn shows(span: &Span, watcher: &mut Watcher, lane: Lane, state: &str) {
    let since = Instant::now();
    let (kind, up, ready) = if state == "up" { ("LaneUp", 1.0, 200) } else { ("LaneDown", 0.0, 503) };
    let event = watcher.event(kind).await;
    assert_eq!(event["lane"], lane.as_str());
    watcher.until(|frame| frame["lanes"][lane.as_str()]["state"] == state).await;
    let check = format!("{lane}:lane");
    eventually("health shows it", async || {
        let (_, health) = answer(http_client().get(span.admin("/health")).send().await.unwrap()).await;
        health["checks"][&check][0]["state"] == state
    })
    .await;
    assert_eq!(span.get("/health").await.1["lanes"][lane.as_str()]["status"], state);
    assert_eq!(span.metric(&format!("twinspan_lane_up{{lane=\"{lane}\"}}")), up);
    assert_eq!(span.get("/readyz").await.0, ready);
    assert!(since.elapsed() < SHOWN, "{lane} {state} showed after {:?}", since.elapsed());
}

#[tokio::test]
async fn a_nats_that_is_killed_frozen_and_healed_shows_everywhere_within_five_seconds() {
    if left_out() {
        return;
    }
    let mut nats = Broker::nats(&Options::default()).await;
    let mut plan = Plan::default();
    plan.ephemeral_on(nats.url());
    plan.settings.lanes.ephemeral.monitor_url = nats.monitor_url();
    plan.settings.server.ready_requires = ReadyRequires::Lanes(vec![Lane::Ephemeral]);
    let span = Span::with(plan).await;
    let mut watcher = Watcher::connect(&span).await;
    let told = watcher.until(|frame| frame["lanes"]["ephemeral"]["broker"]["in_per_second"].is_f64()).await;
    let broker = &told["lanes"]["ephemeral"]["broker"];
    assert!(broker["version"].is_string() && broker["connections"].as_u64() >= Some(1), "{broker}");
    assert_eq!((&broker["slow_consumers"], &broker["problem"]), (&json!(0), &Value::Null), "{broker}");

    nats.kill();
    shows(&span, &mut watcher, Lane::Ephemeral, "down").await;
    nats.restart().await;
    shows(&span, &mut watcher, Lane::Ephemeral, "up").await;
    nats.stop();
    shows(&span, &mut watcher, Lane::Ephemeral, "down").await;
    nats.cont();
    shows(&span, &mut watcher, Lane::Ephemeral, "up").await;
}

#[tokio::test]
async fn a_pulsar_that_is_frozen_killed_and_healed_shows_everywhere_within_five_seconds() {
    if left_out() {
        return;
    }
    let mut pulsar = Broker::pulsar(&Options::default()).await;
    let mut plan = Plan::default();
    plan.durable_on(pulsar.url(), &pulsar);
    plan.settings.server.ready_requires = ReadyRequires::Lanes(vec![Lane::Durable]);
    let span = Span::with(plan).await;
    let mut watcher = Watcher::connect(&span).await;
    watcher.until(|frame| frame["lanes"]["durable"]["state"] == "up").await;
    pulsar.stop();
    shows(&span, &mut watcher, Lane::Durable, "down").await;
    pulsar.cont();
    shows(&span, &mut watcher, Lane::Durable, "up").await;
    pulsar.kill();
    shows(&span, &mut watcher, Lane::Durable, "down").await;
    // It serves again when this returns.
    pulsar.restart().await;
    shows(&span, &mut watcher, Lane::Durable, "up").await;
}

#[tokio::test]
async fn a_broker_without_its_monitoring_port_is_told_so_and_is_not_down() {
    if left_out() {
        return;
    }
    let mut plan = Plan::on_brokers().await.unwrap();
    plan.settings.lanes.ephemeral.monitor_url = "http://127.0.0.1:1".into();
    let span = Span::with(plan).await;
    let client = span.client().await;
    eventually("it is up", async || client.publish("telemetry.a", &draft("1")).await.is_ok()).await;
    let (_, health) = answer(http_client().get(span.admin("/health")).send().await.unwrap()).await;
    let check = &health["checks"]["ephemeral:lane"][0];
    assert_eq!((&check["state"], &check["status"]), (&json!("up"), &json!("pass")));
    let problem = check["broker"]["problem"].as_str().unwrap();
    assert!(problem.contains("monitoring port") && problem.contains("127.0.0.1:1"), "{problem}");
    assert_eq!(check["broker"]["version"], Value::Null);
}
