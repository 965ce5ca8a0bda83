//! Several messages in one publish: their order, and what becomes of each.

use serde_json::{Value, json};
use twinspan::client::Client;
use twinspan::wire::json::heard::Heard;

use crate::harness::{Plan, Span, next, next_payload, nothing, on_both_kinds, silent};

on_both_kinds! {
    a_list_of_messages_keeps_its_order_and_each_has_its_result,
    a_message_that_is_refused_is_an_error_in_its_place_and_stops_no_other,
    without_confirm_only_a_failure_is_answered,
}

/// Lanes, and a topic of each.
const TOPICS: [(&str, &str); 2] = [("ephemeral", "telemetry.batch"), ("durable", "orders.batch")];

async fn say(client: &Client, topic: &str, messages: &[Value], more: Value) {
    let mut frame = json!({"type": "publish", "request_id": "b", "topic": topic, "messages": messages});
    frame.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    client.send(frame.to_string()).await.unwrap();
}

/// The codes of the results; an empty one is a success.
fn codes(ack: &Heard) -> Vec<&str> {
    assert_eq!((ack.kind.as_str(), ack.request_id.as_deref()), ("ack", Some("b")), "{ack:?}");
    assert_eq!(ack.status, None, "a list has no status of its own");
    let code = |result: &'_ twinspan::wire::json::heard::HeardResult| {
        assert_ne!(result.status.as_deref() == Some("ok"), result.error.is_some(), "{result:?}");
        result.error.is_some()
    };
    let codes = ack.results.iter();
    codes.map(|result| if code(result) { result.error.as_ref().unwrap().code.as_str() } else { "" }).collect()
}

async fn a_list_of_messages_keeps_its_order_and_each_has_its_result(span: Span) {
    let (mut subscriber, mut publisher) = (span.client().await, span.client().await);
    for (lane, topic) in TOPICS {
        subscriber.subscribe(topic, nothing()).await.unwrap();
        let messages: Vec<_> = (0..60).map(|n| json!({"payload": n})).collect();
        say(&publisher, topic, &messages, nothing()).await;
        let ack = next(&mut publisher).await;
        assert_eq!((ack.topic.as_deref(), ack.lane.as_deref()), (Some(topic), Some(lane)));
        assert_eq!(codes(&ack), vec![""; 60]);
        for (n, result) in ack.results.iter().enumerate() {
            let event = next(&mut subscriber).await;
            assert_eq!(event.payload().unwrap(), n.to_string().as_bytes());
            assert_eq!(
                (&event.message().unwrap().id, &event.position),
                (&result.message_id, &result.position)
            );
            assert_eq!(result.ts.as_deref(), Some(event.ts.as_str()));
        }
    }
}

async fn a_message_that_is_refused_is_an_error_in_its_place_and_stops_no_other(span: Span) {
    let (mut subscriber, mut publisher) = (span.client().await, span.client().await);
    for (_, topic) in TOPICS {
        subscriber.subscribe(topic, nothing()).await.unwrap();
        let large = "x".repeat(span.app().settings.session.max_message);
        let messages = [
            json!({"payload": 1}),
            json!({"key": "no payload"}),
            json!({"payload": 2, "id": "no id"}),
            json!({"payload": large}),
            json!("no message"),
            json!({"payload": 3}),
        ];
        say(&publisher, topic, &messages, nothing()).await;
        let ack = next(&mut publisher).await;
        assert_eq!(codes(&ack), ["", "BAD_REQUEST", "BAD_REQUEST", "TOO_LARGE", "BAD_REQUEST", ""]);
        assert_eq!(next_payload(&mut subscriber).await, "1");
        assert_eq!(next_payload(&mut subscriber).await, "3");
        silent(&mut subscriber).await;
    }
}

async fn without_confirm_only_a_failure_is_answered(span: Span) {
    let (mut subscriber, mut publisher) = (span.client().await, span.client().await);
    for (_, topic) in TOPICS {
        subscriber.subscribe(topic, nothing()).await.unwrap();
        let quietly = json!({"confirm": false});
        say(&publisher, topic, &[json!({"payload": 1}), json!({"payload": 2})], quietly.clone()).await;
        assert_eq!(next_payload(&mut subscriber).await, "1");
        assert_eq!(next_payload(&mut subscriber).await, "2");
        silent(&mut publisher).await;
        say(&publisher, topic, &[json!({"payload": 3}), json!({})], quietly).await;
        assert_eq!(codes(&next(&mut publisher).await), ["", "BAD_REQUEST"]);
        assert_eq!(next_payload(&mut subscriber).await, "3");
    }
}

#[tokio::test]
async fn acks_that_are_larger_than_any_frame_of_the_client_still_come_one_for_each_list() {
    let mut plan = Plan::default();
    plan.settings.session.max_message = 16 << 10;
    plan.settings.session.max_inflight = 10;
    let span = Span::with(plan).await;
    let mut client = span.client().await;
    for _ in 0..5 {
        say(&client, "telemetry.batch", &vec![json!({}); 1000], nothing()).await;
    }
    for _ in 0..5 {
        assert_eq!(codes(&next(&mut client).await), vec!["BAD_REQUEST"; 1000]);
    }
}
