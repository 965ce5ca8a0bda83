//! The bridge goes in order: it says so, answers what is under way, and leaves nothing behind.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;
use twinspan::client::{Client, ClientError};

use crate::brokers::{Broker, left_out};
use crate::harness::{Plan, Span, draft, eventually, http_client, next, next_payload, nothing, soon};
use crate::process::Process;
use crate::proxy::Proxy;

#[tokio::test]
async fn clients_are_told_answered_and_closed_with_1001() {
    let span = Span::start().await;
    let mut client = span.client().await;
    client.subscribe("orders.>", nothing()).await.unwrap();
    let mut under_way = Vec::new();
    for n in 0..200 {
        under_way.push(client.publish_in_line("orders.d", &draft(n.to_string())).await.unwrap());
    }
    let dir = {
        let stopping = tokio::spawn(span.stop());
        let mut answered = 0;
        for answer in under_way {
            match soon(answer).await {
                Ok(ack) => {
                    assert_eq!(ack.status.as_deref(), Some("ok"));
                    answered += 1;
                }
                // Sent, and not read any more: nothing came of it.
                Err(ClientError::Broken(_)) => {}
                Err(other) => panic!("{other}"),
            }
        }
        let mut drained = false;
        let end = loop {
            match soon(client.next()).await {
                Ok(heard) if heard.code.as_deref() == Some("DRAINING") => {
                    drained = true;
                    assert!(heard.reconnect_after_ms.is_some());
                }
                Ok(_) => {}
                Err(end) => break end,
            }
        };
        assert!(drained, "DRAINING came before the end");
        assert!(matches!(end, ClientError::Closed { code: 1001, .. }), "{end}");
        let dir = soon(stopping).await.unwrap();
        // What was answered is there.
        let again = Span::inside(Plan::default(), dir).await;
        let mut client = again.client().await;
        client.subscribe("orders.d", json!({"from": "earliest"})).await.unwrap();
        for n in 0..answered {
            assert_eq!(next_payload(&mut client).await, n.to_string());
        }
        again.stop().await
    };
    drop(dir);
}

#[tokio::test]
async fn clients_are_asked_to_come_back_at_different_moments() {
    let span = Span::start().await;
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(span.client().await);
    }
    let stopping = tokio::spawn(span.stop());
    let mut moments = BTreeSet::new();
    for mut client in clients {
        let told = next(&mut client).await;
        assert_eq!(told.code.as_deref(), Some("DRAINING"));
        moments.insert(told.reconnect_after_ms.unwrap());
    }
    assert!(moments.len() > 1 && moments.iter().all(|after| *after <= 5000), "{moments:?}");
    soon(stopping).await.unwrap();
}

#[tokio::test]
async fn who_does_not_listen_is_cut_off_at_the_end_of_the_grace() {
    let mut plan = Plan::default();
    plan.settings.server.grace = Duration::from_millis(1);
    let span = Span::with(plan).await;
    let mut client = span.client().await;
    client.subscribe("orders.>", nothing()).await.unwrap();
    let begun = std::time::Instant::now();
    span.running.drain().await;
    assert!(begun.elapsed() < Duration::from_secs(2));
    // The client learns of it whatever became of the goodbye.
    loop {
        if soon(client.next()).await.is_err() {
            break;
        }
    }
}

#[tokio::test]
async fn a_reload_moves_a_subscription_with_its_topic() {
    let span = Span::start().await;
    let mut client = span.client().await;
    client.subscribe("telemetry.m", nothing()).await.unwrap();
    client.publish("telemetry.m", &draft("1")).await.unwrap();
    assert_eq!(next_payload(&mut client).await, "1");
    let routes = crate::harness::ROUTES.replacen("lane = \"ephemeral\"", "lane = \"durable\"", 1);
    span.write_routes(&routes);
    let info = next(&mut client).await;
    assert_eq!((info.code.as_deref(), info.topic.as_deref()), (Some("ROUTE_CHANGED"), Some("telemetry.m")));
    let ack = client.publish("telemetry.m", &draft("2")).await.unwrap();
    assert_eq!(ack.lane.as_deref(), Some("durable"));
    let event = next(&mut client).await;
    assert_eq!((event.payload().unwrap().as_slice(), event.lane.as_deref()), (&b"2"[..], Some("durable")));
}

/// A bridge in a process of its own, whose Pulsar answers when it is told to.
struct Bed {
    process: Process,
    settings: [String; 3],
    dir: tempfile::TempDir,
}

impl Bed {
    async fn behind((pulsar, way): &(Broker, Proxy)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let own = twinspan::message::MessageId::new();
        let routes = format!(
            "[[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\n\
             pulsar = \"persistent://public/default/end.{own}.{{topic}}\"\n"
        );
        std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
        let settings = [
            "lanes.durable.backend=pulsar".to_owned(),
            format!("lanes.durable.url={}", way.pulsar_url()),
            format!("lanes.durable.admin_url={}", pulsar.admin_url()),
        ];
        Self { process: Process::start(dir.path(), &settings).await, settings, dir }
    }

    async fn client(&self) -> Client {
        let client = Client::connect(&self.process.url()).await.unwrap();
        // Whose way to the broker is known from then on.
        let up = async || client.publish("orders.a", &draft("0")).await.is_ok();
        eventually("the lane is up", up).await;
        client
    }
}

/// The payload of the next event, whatever is told of the lane on a busy machine.
async fn next_event(client: &mut Client) -> (String, Option<u64>) {
    loop {
        let heard = next(client).await;
        if heard.kind == "event" {
            return (String::from_utf8(heard.payload().unwrap()).unwrap(), heard.delivery);
        }
    }
}

async fn drained(client: &mut Client) {
    loop {
        let heard = next(client).await;
        if heard.code.as_deref() == Some("DRAINING") {
            assert!(heard.reconnect_after_ms.unwrap() <= 5000);
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bridge_that_is_told_to_end_answers_and_confirms_what_is_under_way_and_ends_well() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let mut bed = Bed::behind(&proxied).await;
    let mut client = bed.client().await;
    client.subscribe("orders.acks", json!({"group": "g"})).await.unwrap();
    let mut deliveries = Vec::new();
    for n in 0..20 {
        client.publish("orders.acks", &draft(n.to_string())).await.unwrap();
        let (payload, delivery) = next_event(&mut client).await;
        assert_eq!(payload, n.to_string());
        deliveries.push(delivery.unwrap());
    }
    // From here on nothing is answered until the way is open again.
    proxied.1.hold();
    let mut publishing = Vec::new();
    for n in 1..=50 {
        publishing.push(client.publish_in_line("orders.a", &draft(n.to_string())).await.unwrap());
    }
    let (acked, unasked) = deliveries.split_at(10);
    let (sender, acked) = (client.sender(), acked.to_vec());
    let acking = tokio::spawn(async move { sender.ack(&acked).await });
    let held = async || client.send(json!({"type": "ack", "deliveries": unasked}).to_string()).await;
    // The acknowledgement that wants an answer goes first.
    soon(client.ping()).await.unwrap();
    held().await.unwrap();
    soon(client.ping()).await.unwrap();

    let told = std::time::Instant::now();
    bed.process.terminate();
    drained(&mut client).await;
    let ready = http_client().get(format!("http://{}/readyz", bed.process.admin)).send().await.unwrap();
    assert_eq!(ready.status(), 503);
    assert!(Client::connect(&bed.process.url()).await.is_err(), "nobody new is let in");
    proxied.1.resume();
    for published in publishing {
        assert_eq!(soon(published).await.unwrap().status.as_deref(), Some("ok"));
    }
    soon(acking).await.unwrap().unwrap();
    let end = loop {
        if let Err(end) = soon(client.next()).await {
            break end;
        }
    };
    assert!(matches!(end, ClientError::Closed { code: 1001, .. }), "{end}");
    assert_eq!(soon(bed.process.ended()).await.code(), Some(0));
    assert!(told.elapsed() < Duration::from_secs(25), "{:?}", told.elapsed());

    // What was answered is stored, and what was acknowledged is done, asked or unasked.
    bed.process = Process::start(bed.dir.path(), &bed.settings).await;
    let mut client = bed.client().await;
    client.subscribe("orders.a", json!({"from": "earliest"})).await.unwrap();
    for n in 0..=50 {
        assert_eq!(next_event(&mut client).await.0, n.to_string());
    }
    let mut member = Client::connect(&bed.process.url()).await.unwrap();
    member.subscribe("orders.acks", json!({"group": "g"})).await.unwrap();
    client.publish("orders.acks", &draft("20")).await.unwrap();
    assert_eq!(next_event(&mut member).await.0, "20");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_a_bridge_at_once() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let mut bed = Bed::behind(&proxied).await;
    let mut client = bed.client().await;
    proxied.1.hold();
    let under_way = client.publish_in_line("orders.a", &draft("0")).await.unwrap();
    soon(client.ping()).await.unwrap();
    bed.process.terminate();
    drained(&mut client).await;
    let told = std::time::Instant::now();
    bed.process.terminate();
    let status = soon(bed.process.ended()).await;
    assert!(told.elapsed() < Duration::from_secs(1), "{:?}", told.elapsed());
    assert!(!status.success(), "what was under way is not said to be done: {status}");
    match soon(under_way).await.unwrap_err() {
        ClientError::Refused(error) => assert_eq!(error.code, "OUTCOME_UNKNOWN"),
        ClientError::Broken(_) | ClientError::Closed { .. } => {}
        other => panic!("{other}"),
    }
}
