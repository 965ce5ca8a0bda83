//! What becomes of publishes while the durable lane's broker is away: refused at once, or kept on this bridge's disk and
//! delivered once and in order.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pulsar::{ProducerOptions, Pulsar, TokioExecutor};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::{Mutex, MutexGuard, OnceCell};
use tokio::task::JoinHandle;
use twinspan::client::Client;
use twinspan::message::{Draft, MessageId};

use crate::brokers::{Broker, Options, left_out};
use crate::harness::{PATIENCE, Plan, Span, draft, eventually, next, nothing, refused, soon};
use crate::proxy::Proxy;

/// A broker behind a network that does as it is told, for one test at a time.
struct Away {
    broker: Broker,
    proxy: Proxy,
}

async fn away() -> Option<MutexGuard<'static, Away>> {
    static SHARED: OnceCell<Mutex<Away>> = OnceCell::const_new();
    if left_out() {
        return None;
    }
    let shared = SHARED.get_or_init(async || {
        let (broker, proxy) = Proxy::pulsar(Options::default()).await;
        Mutex::new(Away { broker, proxy })
    });
    let away = shared.await.lock().await;
    away.back();
    Some(away)
}

impl Away {
    /// A bridge with a reject route, a spool route and one with dead letters.
    fn plan(&self) -> Plan {
        let own = format!("t{}", MessageId::new()).replace('-', "");
        let route = |topic: &str, more: &str| {
            format!(
                "[[route]]\ntopic = \"{topic}\"\nlane = \"durable\"\npulsar = \"persistent://public/default/{own}.{{topic}}\"\n{more}\n"
            )
        };
        let mut plan = Plan {
            routes: [
                route("refuses.>", ""),
                route("spools.>", "outage = \"spool\""),
                route("lettered.>", "outage = \"spool\"\nmax_deliveries = 5\ndead_letter = \"dead.{topic}\""),
                route("dead.>", ""),
            ]
            .concat(),
            own: own.clone(),
            ..Plan::default()
        };
        plan.durable_on(self.proxy.pulsar_url(), &self.broker);
        plan.settings.lanes.durable.publish_timeout = Duration::from_secs(4);
        plan
    }

    /// As a machine that is gone: no packet arrives any more.
    fn vanish(&self) {
        self.proxy.hold();
    }

    /// Everything is as it was; the connections of before are gone.
    fn back(&self) {
        self.proxy.cut();
        self.proxy.resume();
    }

    async fn admin(&self, span: &Span, method: Method, topic: &str, what: &str) {
        let url = format!(
            "{}/admin/v2/persistent/public/default/{}.{topic}/{what}",
            self.broker.admin_url(),
            span.own
        );
        let answer = crate::harness::http_client().request(method, url).send().await.unwrap();
        assert!(answer.status().is_success(), "{answer:?}");
    }
}

async fn lane_is(span: &Span, status: &str) {
    eventually(&format!("the lane is {status}"), async || {
        span.get("/health").await.1["lanes"]["durable"]["status"] == status
    })
    .await;
}

async fn spool(span: &Span) -> Value {
    span.get("/health").await.1["lanes"]["durable"]["outage"]["spool"].clone()
}

/// A topic may have to wait until what was under way when the broker left has had its time.
async fn is_drained(span: &Span) {
    let until = Instant::now() + PATIENCE * 2;
    while spool(span).await["messages"] != 0 {
        assert!(Instant::now() < until, "the spool does not become empty: {}", spool(span).await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Everything that is stored in a topic, in its order.
async fn stored(span: &Span, topic: &str) -> Vec<String> {
    let mut client = span.client().await;
    client.subscribe(topic, json!({"from": "earliest"})).await.unwrap();
    let mut payloads = Vec::new();
    loop {
        let heard = next(&mut client).await;
        match heard.code.as_deref() {
            Some("REPLAY_DONE") => return payloads,
            _ => payloads.push(String::from_utf8(heard.payload().unwrap()).unwrap()),
        }
    }
}

/// Publishes numbers until it is told to end, 32 under way.
struct Publishing {
    ends: Arc<AtomicBool>,
    task: JoinHandle<(usize, BTreeMap<String, usize>)>,
}

impl Publishing {
    fn begin(client: Client, topic: &str) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let (ended, topic) = (ends.clone(), topic.to_owned());
        let task = tokio::spawn(async move {
            let (mut n, mut statuses, mut under_way) = (0, BTreeMap::new(), VecDeque::new());
            loop {
                if !ended.load(Ordering::Relaxed) && under_way.len() < 32 {
                    under_way.push_back(client.publish_in_line(&topic, &draft(n.to_string())).await.unwrap());
                    n += 1;
                    continue;
                }
                let Some(answer) = under_way.pop_front() else { return (n, statuses) };
                let answer = tokio::time::timeout(PATIENCE * 2, answer).await.expect("each is answered");
                *statuses.entry(answer.unwrap().status.unwrap()).or_insert(0) += 1;
                // So that storage is not full of it when the outage comes.
                tokio::time::sleep(Duration::from_micros(500)).await;
            }
        });
        Self { ends, task }
    }

    /// How many there were, and with each status; each was accepted.
    async fn end(self) -> (usize, BTreeMap<String, usize>) {
        self.ends.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_under_load_is_spooled_through_in_order_and_each_message_is_stored_once() {
    let Some(away) = away().await else { return };
    let span = Span::with(away.plan()).await;
    let client = span.client().await;
    let publishing = Publishing::begin(span.client().await, "spools.a");
    eventually("messages flow", async || {
        span.metric(r#"twinspan_messages_total{direction="in",lane="durable",outcome="ok",route="spools.>"}"#)
            > 100.0
    })
    .await;
    away.vanish();
    lane_is(&span, "down").await;

    // At once, each of them.
    for n in 0..20 {
        let asked = Instant::now();
        assert_eq!(refused(client.publish("refuses.a", &draft(n.to_string())).await), "LANE_UNAVAILABLE");
        assert!(asked.elapsed() < Duration::from_millis(100), "{:?}", asked.elapsed());
    }
    let ack = client.publish("spools.b", &draft("0")).await.unwrap();
    assert_eq!((ack.status.as_deref(), ack.position), (Some("spooled"), None));
    assert_eq!(ack.lane.as_deref(), Some("durable"));
    let (code, body) = span.post("/publish/spools.b", "1").await;
    assert_eq!((code, &body["status"]), (202, &json!("spooled")));
    client
        .send(r#"{"type":"publish","request_id":"m","topic":"spools.b","messages":[{"payload":2},{"payload":3}]}"#)
        .await
        .unwrap();
    eventually("they are on disk", async || spool(&span).await["topics"] == 2).await;
    eventually("the spool is reported", async || span.metric("twinspan_spool_messages") > 4.0).await;
    assert_eq!(span.metric(r#"twinspan_breaker_state{lane="durable"}"#), 2.0);
    let health = span.get("/health").await.1;
    assert_eq!(health["status"], "degraded");
    assert_eq!(health["lanes"]["durable"]["outage"]["breaker"], "open");

    away.back();
    is_drained(&span).await;
    // What comes while it drains, and when the topic goes over to the lane again, is behind.
    eventually("the topic is direct again", async || {
        client.publish("spools.c", &draft("0")).await.unwrap().status.as_deref() == Some("ok")
    })
    .await;
    let (count, statuses) = publishing.end().await;
    assert_eq!(statuses.keys().collect::<Vec<_>>(), ["ok", "spooled"], "{statuses:?}");
    is_drained(&span).await;
    let found = stored(&span, "spools.a").await;
    assert_eq!(found.len(), count, "{statuses:?}: each once");
    assert_eq!(found, numbers(count), "{statuses:?}: in their order");
    assert_eq!(stored(&span, "spools.b").await, numbers(4));
    assert!(span.metric("twinspan_spool_drained_total") >= 4.0);
    eventually("all is well", async || span.metric(r#"twinspan_breaker_state{lane="durable"}"#) == 0.0).await;
    assert_eq!(span.get("/health").await.1["status"], "ok");
    span.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_that_was_spooled_is_a_duplicate_during_the_outage_and_after_it() {
    let Some(away) = away().await else { return };
    let span = Span::with(away.plan()).await;
    let client = span.client().await;
    away.vanish();
    lane_is(&span, "down").await;
    let message = Draft { id: Some(MessageId::new()), ..draft("0") };
    let publish = async || soon(client.publish("spools.a", &message)).await.unwrap().status.unwrap();
    assert_eq!([publish().await, publish().await], ["spooled", "duplicate"]);
    away.back();
    is_drained(&span).await;
    assert_eq!(publish().await, "duplicate");
    assert_eq!(stored(&span, "spools.a").await, ["0"]);
    span.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_frozen_broker_swallowed_is_found_in_storage_when_it_thaws_and_not_stored_again() {
    let Some(away) = away().await else { return };
    let span = Span::with(away.plan()).await;
    let client = span.client().await;
    client.publish("spools.a", &draft("0")).await.unwrap();
    away.broker.stop();
    // The broker has these in its sockets, and will store them.
    let mut under_way = Vec::new();
    for n in 1..100 {
        under_way.push(client.publish_in_line("spools.a", &draft(n.to_string())).await.unwrap());
    }
    for ack in under_way {
        assert_eq!(soon(ack).await.unwrap().status.as_deref(), Some("spooled"), "it waits on disk");
    }
    client.publish("spools.a", &draft("100")).await.unwrap();
    away.broker.cont();
    is_drained(&span).await;
    assert_eq!(stored(&span, "spools.a").await, numbers(101));
    span.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bridge_that_ends_while_it_spools_leaves_everything_to_the_next() {
    let Some(away) = away().await else { return };
    let mut plan = away.plan();
    plan.settings.lanes.durable.spool_max = 64 << 10;
    let again = Plan {
        routes: plan.routes.clone(),
        settings: plan.settings.clone(),
        own: plan.own.clone(),
        lanes: None,
    };
    let span = Span::with(plan).await;
    let client = span.client().await;
    for n in 0..3 {
        client.publish("spools.a", &draft(n.to_string())).await.unwrap();
    }
    away.vanish();
    lane_is(&span, "down").await;
    // Up to the bound; nothing beyond it is taken, and nothing is pushed out.
    let mut accepted = numbers(3);
    let full = loop {
        assert!(accepted.len() < 100, "the spool has a bound");
        let payload = format!("{:01000}", accepted.len());
        match client.publish("spools.a", &draft(format!("\"{payload}\""))).await {
            Ok(ack) => {
                assert_eq!(ack.status.as_deref(), Some("spooled"));
                accepted.push(format!("\"{payload}\""));
            }
            Err(error) => break refused::<()>(Err(error)),
        }
    };
    assert_eq!(full, "STORAGE_FULL");
    assert!((40..=67).contains(&accepted.len()), "{}", accepted.len());
    assert_eq!(spool(&span).await["messages"], accepted.len() - 3);
    assert!(spool(&span).await["bytes"].as_u64().unwrap() <= 64 << 10);
    // What is under way when it ends is spooled, too: the drain of the next bridge looks for it in storage.
    let dir = span.stop().await;
    away.back();
    let span = Span::inside(again, dir).await;
    is_drained(&span).await;
    assert_eq!(stored(&span, "spools.a").await, accepted);
    eventually("there is room again", async || {
        span.client().await.publish("spools.a", &draft("1")).await.unwrap().status.as_deref() == Some("ok")
    })
    .await;
    span.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_lane_refuses_for_good_goes_to_the_dead_letters_or_aside_and_stands_in_nobodys_way() {
    let Some(away) = away().await else { return };
    let mut plan = away.plan();
    // More than the broker takes.
    plan.settings.session.max_message = 6 << 20;
    plan.settings.lanes.durable.publish_timeout = Duration::from_secs(3);
    let span = Span::with(plan).await;
    let mut client = span.client().await;
    for topic in ["lettered.a", "spools.a", "lettered.b"] {
        client.publish(topic, &draft("0")).await.unwrap();
    }
    client.subscribe("dead.>", nothing()).await.unwrap();
    away.vanish();
    lane_is(&span, "down").await;
    away.admin(&span, Method::POST, "lettered.a", "terminate").await;
    client.publish("lettered.a", &draft("1")).await.unwrap();
    let large = format!("\"{}\"", "x".repeat(5_500_000));
    for topic in ["spools.a", "lettered.b"] {
        for payload in ["1", &large, "2"] {
            let ack = client.publish(topic, &draft(payload)).await.unwrap();
            assert_eq!(ack.status.as_deref(), Some("spooled"));
        }
    }
    away.back();
    is_drained(&span).await;
    let letter = loop {
        let heard = next(&mut client).await;
        if heard.kind == "event" {
            break heard;
        }
    };
    assert_eq!(
        (letter.topic.as_deref(), letter.payload().as_deref()),
        (Some("dead.lettered.a"), Some(&b"1"[..]))
    );
    let headers = letter.message().unwrap().headers;
    assert_eq!(headers["twinspan-origin-topic"], "lettered.a");
    assert!(headers["twinspan-origin-reason"].contains("erminated"), "{headers:?}");
    assert_eq!(stored(&span, "lettered.a").await, ["0"]);
    for topic in ["spools.a", "lettered.b"] {
        assert_eq!(stored(&span, topic).await, ["0", "1", "2"], "{topic}");
    }
    // Too large for the dead letters, too, and for a route that has none: kept.
    assert_eq!(spool(&span).await["set_aside"], 2);
    assert!(spool(&span).await["bytes"].as_u64().unwrap() > 2 * 5_500_000);
    eventually("it is counted", async || span.metric("twinspan_spool_set_aside") == 2.0).await;
    assert_eq!(span.metric(r#"twinspan_dead_lettered_total{route="lettered.>"}"#), 1.0);
    span.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_takes_nothing_is_refused_at_once_or_spooled_while_the_others_flow() {
    let Some(away) = away().await else { return };
    let mut plan = away.plan();
    plan.settings.lanes.durable.publish_timeout = Duration::from_secs(2);
    let span = Span::with(plan).await;
    let client = span.client().await;
    // Somebody else has these two for himself.
    let native = Pulsar::builder(away.proxy.pulsar_url(), TokioExecutor).build().await.unwrap();
    let mut owners = Vec::new();
    for topic in ["refuses.a", "spools.a"] {
        let options = ProducerOptions {
            access_mode: Some(pulsar::proto::ProducerAccessMode::Exclusive as i32),
            ..Default::default()
        };
        let physical = format!("persistent://public/default/{}.{topic}", span.own);
        owners.push(native.producer().with_topic(physical).with_options(options).build().await.unwrap());
    }
    for n in 0..3 {
        let ack = client.publish("spools.a", &draft(n.to_string())).await.unwrap();
        assert_eq!(ack.status.as_deref(), Some("spooled"));
        assert_eq!(refused(client.publish("refuses.a", &draft("0")).await), "LANE_UNAVAILABLE");
    }
    let (mut waits, mut flowed) = (BTreeSet::new(), 0);
    for _ in 0..20 {
        let asked = Instant::now();
        assert_eq!(refused(client.publish("refuses.a", &draft("0")).await), "LANE_UNAVAILABLE");
        waits.insert(asked.elapsed());
        flowed += usize::from(client.publish("refuses.b", &draft("0")).await.is_ok());
    }
    assert!(flowed >= 15, "others take no notice: {flowed} of 20");
    let slow = waits.iter().filter(|wait| **wait > Duration::from_millis(100)).count();
    assert!(slow <= 4, "all but the probes are refused at once: {waits:?}");
    let health = span.get("/health").await.1;
    assert_eq!(health["lanes"]["durable"]["status"], "degraded", "{health}");
    assert!(health["lanes"]["durable"]["outage"]["open_topics"].as_u64().unwrap() >= 1, "{health}");
    eventually("it is reported", async || span.metric(r#"twinspan_breaker_state{lane="durable"}"#) >= 1.0)
        .await;
    for mut owner in owners {
        soon(owner.close()).await.unwrap();
    }
    eventually("a probe finds that it is free", async || {
        client.publish("refuses.a", &draft("0")).await.is_ok()
    })
    .await;
    is_drained(&span).await;
    assert_eq!(stored(&span, "spools.a").await, numbers(3));
    lane_is(&span, "up").await;
    span.stop().await;
}

#[tokio::test]
async fn a_route_may_spool_on_the_embedded_lane_and_come_to_it_by_a_reload() {
    let routes = "[[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\n";
    let span = Span::with(Plan { routes: routes.into(), ..Plan::default() }).await;
    let client = span.client().await;
    assert_eq!(spool(&span).await, Value::Null);
    client.publish("orders.a", &draft("0")).await.unwrap();
    span.write_routes(&format!("{routes}outage = \"spool\"\n"));
    eventually("the route spools", async || {
        let ack = client.publish("orders.b", &draft("0")).await.unwrap();
        assert_eq!(ack.status.as_deref(), Some("ok"));
        assert!(ack.position.is_some());
        spool(&span).await["messages"] == 0
    })
    .await;
    span.stop().await;
}
