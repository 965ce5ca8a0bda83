//! Subscriptions with a filter: who gets what, and what becomes of the rest.

use std::time::{Duration, Instant};

use serde_json::json;
use twinspan::client::{Client, ClientError};

use crate::harness::{Plan, Span, draft, eventually, next, next_payload, nothing, on_both_kinds, silent};

on_both_kinds! {
    a_filter_lets_through_what_it_matches_and_nothing_else,
    an_event_that_several_filters_of_a_connection_match_comes_once,
    a_replay_is_filtered_and_last_n_counts_what_is_stored,
    a_pattern_filters_topics_that_appear_later,
    what_a_group_member_filters_out_is_done_for_the_whole_group,
    a_filtered_group_goes_on_past_its_prefetch,
}

const TOPICS: [&str; 2] = ["telemetry.f", "orders.f"];

/// Returns once all of them are sent or stored.
async fn publish(client: &mut Client, topic: &str, numbers: impl IntoIterator<Item = u32>) {
    let messages: Vec<_> = numbers.into_iter().map(|n| json!({"payload": {"n": n}})).collect();
    client.send(json!({"type": "publish", "topic": topic, "messages": messages}).to_string()).await.unwrap();
    let ack = next(client).await;
    assert!(ack.results.iter().all(|result| result.error.is_none()) && ack.kind == "ack", "{ack:?}");
}

async fn next_n(client: &mut Client) -> u64 {
    let payload: serde_json::Value = serde_json::from_str(&next_payload(client).await).unwrap();
    payload["n"].as_u64().unwrap()
}

async fn a_filter_lets_through_what_it_matches_and_nothing_else(span: Span) {
    let (mut subscriber, publisher) = (span.client().await, span.client().await);
    for topic in TOPICS {
        let filter = "key == 'k' && headers.kind == 'alarm' && payload.n > 1 && topic.startsWith('t') == "
            .to_owned()
            + if topic == TOPICS[0] { "true" } else { "false" };
        subscriber.subscribe(topic, json!({ "filter": filter })).await.unwrap();
        let of = |payload: &str, key: &str, kind: &str| {
            let mut draft = draft(payload);
            draft.key = Some(key.into());
            draft.headers.insert("kind".into(), kind.into());
            draft
        };
        for other in [
            draft(r#"{"n":2}"#),
            of(r#"{"n":1}"#, "k", "alarm"),
            of(r#"{"n":2}"#, "j", "alarm"),
            of(r#"{"n":2}"#, "k", "calm"),
            of("not JSON", "k", "alarm"),
            of(r#"{"n":"2"}"#, "k", "alarm"),
            of(r#"{}"#, "k", "alarm"),
        ] {
            publisher.publish(topic, &other).await.unwrap();
        }
        publisher.publish(topic, &of(r#"{"n":7}"#, "k", "alarm")).await.unwrap();
        assert_eq!(next_n(&mut subscriber).await, 7);
        silent(&mut subscriber).await;
    }
}

async fn an_event_that_several_filters_of_a_connection_match_comes_once(span: Span) {
    let (mut subscriber, mut publisher) = (span.client().await, span.client().await);
    for topic in ["mixed.live.f", "mixed.kept.f"] {
        // The topic is there, so that the pattern knows it.
        publish(&mut publisher, topic, [0]).await;
    }
    for topic in ["mixed.live.f", "mixed.kept.f"] {
        subscriber.subscribe(topic, json!({"filter": "payload.n < 3"})).await.unwrap();
    }
    subscriber.subscribe("mixed.>", json!({"filter": "payload.n > 1"})).await.unwrap();
    for topic in ["mixed.live.f", "mixed.kept.f"] {
        // One after the other: NATS brings each subscription its own copy, and what only the one lets through may overtake
        // what the other does.
        for n in 1..=4 {
            publish(&mut publisher, topic, [n]).await;
            assert_eq!(next_n(&mut subscriber).await, u64::from(n), "{topic}");
        }
        silent(&mut subscriber).await;
    }
    // What is left brings what it wants, and nothing of what the other wanted.
    subscriber.unsubscribe("mixed.>", None).await.unwrap();
    for topic in ["mixed.live.f", "mixed.kept.f"] {
        publish(&mut publisher, topic, [4, 2]).await;
        assert_eq!(next_n(&mut subscriber).await, 2, "{topic}");
    }
}

async fn a_replay_is_filtered_and_last_n_counts_what_is_stored(span: Span) {
    let (mut subscriber, mut publisher) = (span.client().await, span.client().await);
    for topic in TOPICS {
        publish(&mut publisher, topic, 0..10).await;
        let asked = json!({"last_n": 5, "filter": "payload.n % 2 == 0"});
        subscriber.subscribe(topic, asked).await.unwrap();
        for n in [6, 8] {
            let event = next(&mut subscriber).await;
            assert_eq!(event.payload().unwrap(), format!(r#"{{"n":{n}}}"#).as_bytes(), "{topic}");
            assert_eq!(event.subscription.as_deref(), Some(topic));
        }
        assert_eq!(next(&mut subscriber).await.code.as_deref(), Some("REPLAY_DONE"));
        publish(&mut publisher, topic, [11, 12]).await;
        assert_eq!(next_n(&mut subscriber).await, 12);
    }
}

async fn a_pattern_filters_topics_that_appear_later(span: Span) {
    let (mut subscriber, mut publisher) = (span.client().await, span.client().await);
    // Whichever pattern finds the topic, it is found for both: neither loses what the other leaves out.
    subscriber.subscribe("mixed.kept.>", json!({"filter": "payload.n < 50"})).await.unwrap();
    subscriber.subscribe("mixed.kept.*", json!({"filter": "payload.n >= 50"})).await.unwrap();
    for topic in ["mixed.kept.a", "mixed.kept.b", "mixed.kept.c"] {
        publish(&mut publisher, topic, 0..100).await;
        for n in 0..100 {
            assert_eq!(next_n(&mut subscriber).await, n, "{topic}");
        }
        silent(&mut subscriber).await;
    }
}

async fn what_a_group_member_filters_out_is_done_for_the_whole_group(span: Span) {
    let mut publisher = span.client().await;
    let group = json!({"group": "g", "from": "earliest", "filter": "payload.n > 2"});
    publish(&mut publisher, "orders.f", 0..5).await;
    let mut member = span.client().await;
    member.subscribe("orders.f", group).await.unwrap();
    assert_eq!(next(&mut member).await.code.as_deref(), Some("REPLAY_DONE"));
    for n in [3, 4] {
        assert_eq!(next_n(&mut member).await, n);
    }
    let report = async || {
        let bridge = &span.app().bridge;
        let topic = twinspan::topic::Topic::parse("orders.f").unwrap();
        let route = bridge.policy.table().route_for(&topic).unwrap().clone();
        bridge.durable.groups(&route, &topic).await.unwrap().pop().map(|group| group.backlog)
    };
    // All but the two that the member holds is acknowledged.
    eventually("what was left out is acknowledged", async || report().await == Some(2)).await;
    drop(member);
    // Another member, which would take everything, gets those two, and none of the others.
    let mut other = span.client().await;
    let everything = json!({"group": "g"});
    eventually("the first has left", async || other.subscribe("orders.f", everything.clone()).await.is_ok())
        .await;
    let mut got = [next_n(&mut other).await, next_n(&mut other).await];
    got.sort_unstable();
    assert_eq!(got, [3, 4]);
    silent(&mut other).await;
}

async fn a_filtered_group_goes_on_past_its_prefetch(span: Span) {
    let (mut member, mut publisher) = (span.client().await, span.client().await);
    let asked = json!({"group": "g", "prefetch": 2, "filter": "payload.n == 99"});
    member.subscribe("orders.f", asked).await.unwrap();
    publish(&mut publisher, "orders.f", 0..100).await;
    assert_eq!(next_n(&mut member).await, 99);
}

#[tokio::test]
async fn what_a_group_filtered_out_does_not_come_after_a_restart() {
    let span = Span::start().await;
    let mut member = span.client().await;
    member.subscribe("orders.f", json!({"group": "g", "filter": "payload.n == 9"})).await.unwrap();
    publish(&mut span.client().await, "orders.f", 0..10).await;
    assert_eq!(next_n(&mut member).await, 9);
    let dir = span.stop().await;
    let span = Span::inside(Plan::default(), dir).await;
    let mut member = span.client().await;
    member.subscribe("orders.f", json!({"group": "g"})).await.unwrap();
    assert_eq!(next_n(&mut member).await, 9);
    silent(&mut member).await;
}

#[tokio::test]
async fn a_queue_group_drops_what_the_member_that_got_it_does_not_want() {
    let span = Span::start().await;
    let (mut member, mut publisher) = (span.client().await, span.client().await);
    member.subscribe("telemetry.f", json!({"group": "g", "filter": "payload.n > 2"})).await.unwrap();
    publish(&mut publisher, "telemetry.f", 0..4).await;
    assert_eq!(next_n(&mut member).await, 3);
    silent(&mut member).await;
}

#[tokio::test]
async fn a_bad_expression_names_its_place_and_subscribes_to_nothing() {
    let span = Span::start().await;
    let mut client = span.client().await;
    let long = "x".repeat(5000);
    for (filter, expected) in [
        ("payload.n ==", "filter, line 1, column 13: "),
        ("true &&\n payload.foo()", "filter, line 2, column 13: `foo` is not known"),
        (&long, "filter, line 1, column 1: it has 5000 bytes"),
    ] {
        match client.subscribe("orders.f", json!({ "filter": filter })).await {
            Err(ClientError::Refused(error)) => {
                assert_eq!(error.code, "BAD_REQUEST");
                assert!(error.message.starts_with(expected), "{}", error.message);
            }
            other => panic!("{other:?}"),
        }
    }
    client.publish("orders.f", &draft("1")).await.unwrap();
    silent(&mut client).await;
    client.subscribe("orders.f", nothing()).await.unwrap();
}

#[tokio::test]
async fn an_expression_of_many_subscribers_is_evaluated_once_for_each_message() {
    let span = Span::start().await;
    let mut publisher = span.client().await;
    let mut subscribers = Vec::new();
    for _ in 0..20 {
        let subscriber = span.client().await;
        for topic in TOPICS {
            subscriber.subscribe(topic, json!({"filter": "payload.n > 5"})).await.unwrap();
        }
        subscribers.push(subscriber);
    }
    for (at, topic) in TOPICS.into_iter().enumerate() {
        publish(&mut publisher, topic, 0..10).await;
        for subscriber in &mut subscribers {
            for n in 6..10 {
                assert_eq!(next_n(subscriber).await, n);
            }
        }
        let counted = |outcome: &str| {
            span.metric(&format!("twinspan_filter_evaluations_total{{outcome=\"{outcome}\"}}"))
        };
        let times = (at + 1) as f64;
        assert_eq!((counted("matches"), counted("does_not")), (4.0 * times, 6.0 * times), "{topic}");
    }
}

#[tokio::test]
async fn hostile_filters_and_payloads_stop_nobody() {
    let span = Span::start().await;
    let (hostile, mut bystander) = (span.client().await, span.client().await);
    bystander.subscribe("telemetry.f", json!({"filter": "payload[0] == 1"})).await.unwrap();
    for n in 0..20 {
        let filter = format!("payload.all(a, payload.all(b, a == b)) || {n} == 0");
        hostile.subscribe("telemetry.f", json!({"group": format!("g{n}"), "filter": filter})).await.unwrap();
    }
    let begun = Instant::now();
    let payload = serde_json::to_vec(&vec![1; 50_000]).unwrap();
    bystander.publish("telemetry.f", &draft(payload)).await.unwrap();
    assert_eq!(next(&mut bystander).await.kind, "event");
    println!("21 filters over 50,000 elements: {:?}", begun.elapsed());
    let costly = "twinspan_filter_evaluations_total{outcome=\"too_costly\"}";
    eventually("all were cut short", async || span.metric(costly) == 20.0).await;
    assert!(begun.elapsed() < Duration::from_secs(20));
}
