//! What the metrics say is bounded, whatever clients do, and adds up.

use std::collections::BTreeSet;

use serde_json::json;

use crate::harness::{Span, draft, eventually, next_payload, nothing, on_both_kinds, soon};

on_both_kinds!(the_stages_of_a_message_add_up_to_what_its_publisher_waited_for);

const TOPICS: usize = 2000;
const CLIENTS: usize = 500;

/// Every series, without its value.
fn series(span: &Span) -> BTreeSet<String> {
    let text = span.app().bridge.metrics.render();
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    samples.filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned())).collect()
}

/// What a client may name is named anew each time: topics with and without a route, itself, keys, filters.
async fn flood(span: &Span, from: usize, topics: usize, clients: usize) {
    let publisher = span.client().await;
    for n in from..=from + topics {
        let topic = ["telemetry", "orders", "both", "declared", "nowhere"][n % 5];
        let message = json!({"key": n.to_string(), "payload": n});
        let topic = format!("{topic}.t{n}");
        let frame = json!({"type": "publish", "topic": topic, "confirm": false, "message": message});
        publisher.send(frame.to_string()).await.unwrap();
        if (n - from).is_multiple_of(50) {
            // Frames are taken one after the other: what was sent before this one is taken once it is acknowledged.
            soon(publisher.publish("orders.end", &draft("0"))).await.unwrap();
        }
    }
    for n in from..from + clients {
        let mut client = span.client().await;
        let options = json!({"client_id": format!("client-{n}"), "filter": format!("payload >= {n}")});
        client.subscribe("telemetry.heard", options.clone()).await.unwrap();
        client.subscribe(&format!("orders.o{n}"), options).await.unwrap();
        client.publish("telemetry.heard", &draft(n.to_string())).await.unwrap();
        assert_eq!(next_payload(&mut client).await, n.to_string());
    }
    eventually("all have gone", async || span.metric("twinspan_connections{dialect=\"json\"}") <= 1.0).await;
}

#[tokio::test]
async fn topics_and_clients_add_no_series() {
    let span = Span::start().await;
    // One of each is told; from then on there is nothing new to tell.
    flood(&span, 0, 50, 5).await;
    let before = series(&span);
    flood(&span, 50, TOPICS, CLIENTS).await;
    let after = series(&span);
    let new: Vec<_> = after.difference(&before).collect();
    assert!(
        new.is_empty(),
        "{} series were {}; new: {:?}",
        after.len(),
        before.len(),
        &new[..new.len().min(9)]
    );
    assert!(
        span.metric(r#"twinspan_messages_total{direction="in",lane="durable",outcome="ok",route="orders"}"#)
            > 400.0
    );
}

async fn the_stages_of_a_message_add_up_to_what_its_publisher_waited_for(span: Span) {
    // Of one event in sixteen it is told how it left, so of so many of some.
    let count = 300;
    for (lane, topic, route) in [("ephemeral", "telemetry.a", "telemetry"), ("durable", "orders.a", "orders")]
    {
        let stage = |name, what| {
            span.metric(&format!("twinspan_stage_seconds_{what}{{lane=\"{lane}\",stage=\"{name}\"}}"))
        };
        let (mut subscriber, publisher) = (span.client().await, span.client().await);
        subscriber.subscribe(topic, nothing()).await.unwrap();
        // One after the other: each is the first of its turn, so all are timed.
        for n in 0..count {
            publisher.publish(topic, &draft(n.to_string())).await.unwrap();
            assert_eq!(next_payload(&mut subscriber).await, n.to_string());
        }
        for name in ["read", "route", "broker"] {
            assert_eq!(stage(name, "count"), f64::from(count), "{lane} {name}");
            assert!(stage(name, "sum") > 0.0, "{lane} {name}");
        }
        let labels = format!("{{lane=\"{lane}\",route=\"{route}\"}}");
        let waited = span.metric(&format!("twinspan_publish_duration_seconds_sum{labels}"));
        let parts = stage("route", "sum") + stage("broker", "sum");
        assert!((waited - parts).abs() < 1e-6, "{lane}: {waited} is not {parts}");
        eventually("it is told how some of them left", async || stage("write", "count") > 0.0).await;
        assert_eq!(stage("fan-out", "count"), stage("write", "count"));
        assert!(stage("write", "count") < f64::from(count), "not of each, which would cost too much");
    }
}
