//! One slow, dead or hostile client changes nothing for another, and learns what it missed.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use twinspan::bridge::Notice;

use crate::harness::{Plan, ROUTES, Span, draft, eventually, next_payload, nothing, on_both_kinds, soon};

on_both_kinds! {
    a_slow_ephemeral_subscriber_loses_the_oldest_and_is_told_exactly_how_many,
    a_slow_durable_subscriber_gets_everything_in_order_and_slows_nobody,
}

/// A client that reads only when it is told to, with next to no room in its socket.
pub async fn unread(span: &Span) -> WebSocketStream<TcpStream> {
    unread_from(span.running.listen).await
}

pub async fn unread_from(bridge: SocketAddr) -> WebSocketStream<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let stream = socket.connect(bridge).await.unwrap();
    tokio_tungstenite::client_async(format!("ws://{bridge}/ws"), stream).await.unwrap().0
}

pub async fn hear(socket: &mut WebSocketStream<TcpStream>) -> Value {
    loop {
        match soon(socket.next()).await.expect("open").expect("whole") {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Close(frame) => return json!({"close": frame.map(|frame| u16::from(frame.code))}),
            _ => {}
        }
    }
}

async fn subscribe(socket: &mut WebSocketStream<TcpStream>, topic: &str) {
    socket.send(Message::text(json!({"type": "subscribe", "topic": topic}).to_string())).await.unwrap();
    assert_eq!(hear(socket).await["type"], "ack");
}

async fn a_slow_ephemeral_subscriber_loses_the_oldest_and_is_told_exactly_how_many(span: Span) {
    let mut slow = unread(&span).await;
    subscribe(&mut slow, "telemetry.s").await;
    let (mut fast, publisher) = (span.client().await, span.client().await);
    fast.subscribe("telemetry.s", nothing()).await.unwrap();
    let filler = "x".repeat(4000);
    let sent = 3000;
    for n in 0..sent {
        publisher.publish("telemetry.s", &draft(json!([n, filler]).to_string())).await.unwrap();
        let payload: Value = serde_json::from_str(&next_payload(&mut fast).await).unwrap();
        assert_eq!(payload[0], n, "the other subscriber hears everything, at once");
    }
    publisher.publish("telemetry.s", &draft("\"end\"")).await.unwrap();
    let (mut heard, mut missed, mut expected) = (0, 0, 0);
    loop {
        let frame = hear(&mut slow).await;
        match frame["type"].as_str() {
            Some("gap") => {
                assert_eq!((&frame["reason"], &frame["topic"]), (&json!("slow"), &json!("telemetry.s")));
                missed += frame["dropped"].as_u64().unwrap();
                expected += frame["dropped"].as_u64().unwrap();
            }
            _ if frame["message"]["payload"] == "end" => break,
            _ => {
                assert_eq!(
                    frame["message"]["payload"][0], expected,
                    "a gap stands where the events would have been"
                );
                heard += 1;
                expected += 1;
            }
        }
    }
    assert_eq!(heard + missed, sent);
    assert!(missed > 0, "the client was slow enough to miss something");
    let dropped = r#"twinspan_dropped_total{lane="ephemeral",reason="slow",route="telemetry"}"#;
    assert_eq!(span.metric(dropped), missed as f64);
}

async fn a_slow_durable_subscriber_gets_everything_in_order_and_slows_nobody(span: Span) {
    let mut slow = unread(&span).await;
    subscribe(&mut slow, "orders.s").await;
    let (mut fast, publisher) = (span.client().await, span.client().await);
    fast.subscribe("orders.s", nothing()).await.unwrap();
    let filler = "x".repeat(4000);
    // More than the shared tail keeps, so that the slow one has to come back from storage.
    let sent = 3000;
    for n in 0..sent {
        let frame = json!({"type": "publish", "topic": "orders.s", "confirm": false, "message": {"payload": [n, filler]}});
        publisher.send(frame.to_string()).await.unwrap();
        if n % 100 == 99 {
            for expected in n - 99..=n {
                let payload: Value = serde_json::from_str(&next_payload(&mut fast).await).unwrap();
                assert_eq!(payload[0], expected);
            }
        }
    }
    for n in 0..sent {
        let frame = hear(&mut slow).await;
        assert_eq!(frame["message"]["payload"][0], n, "{}", frame["type"]);
    }
}

#[tokio::test]
async fn a_route_may_close_who_is_too_slow_for_it() {
    let routes = ROUTES.replace("name = \"telemetry\"", "name = \"telemetry\"\noverflow = \"disconnect\"");
    let span = Span::with(Plan { routes, ..Plan::default() }).await;
    let mut slow = unread(&span).await;
    subscribe(&mut slow, "telemetry.s").await;
    let publisher = span.client().await;
    let filler = draft(json!("x".repeat(4000)).to_string());
    for _ in 0..1000 {
        publisher.publish("telemetry.s", &filler).await.unwrap();
    }
    let mut last = Value::Null;
    loop {
        let frame = hear(&mut slow).await;
        if frame["close"].is_number() {
            assert_eq!(frame["close"], 4008);
            assert_eq!(last["error"]["code"], "SLOW_CONSUMER");
            break;
        }
        last = frame;
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_is_not_read_from() {
    let mut plan = Plan::default();
    plan.settings.session.max_inflight = 16;
    plan.settings.session.queue_messages = 16;
    let span = Span::with(plan).await;
    let mut greedy = unread(&span).await;
    let frame = Message::text(json!({"type": "ping", "request_id": "x".repeat(100)}).to_string());
    let mut sent = 0;
    // Once the sockets are full on both sides, sending stops.
    while let Ok(done) = tokio::time::timeout(Duration::from_millis(500), greedy.send(frame.clone())).await {
        done.unwrap();
        sent += 1;
        assert!(sent < 1_000_000, "what is sent goes somewhere");
    }
    // And it goes on as soon as the client reads: every one is answered.
    let other = span.client().await;
    assert_eq!(soon(other.ping()).await.unwrap().kind, "pong");
    for _ in 0..sent {
        assert_eq!(hear(&mut greedy).await["type"], "pong");
    }
}

#[tokio::test]
async fn what_is_held_back_during_a_replay_is_bounded_in_bytes() {
    let routes = ROUTES.replace("name = \"telemetry\"", "name = \"telemetry\"\nhistory = 1500");
    let span = Span::with(Plan { routes, ..Plan::default() }).await;
    let publisher = span.client().await;
    let old = draft(json!("x".repeat(8000)).to_string());
    for _ in 0..1500 {
        publisher.publish("telemetry.s", &old).await.unwrap();
    }
    let mut slow = unread(&span).await;
    let frame = json!({"type": "subscribe", "topic": "telemetry.s", "last_n": 1500});
    slow.send(Message::text(frame.to_string())).await.unwrap();
    assert_eq!(hear(&mut slow).await["type"], "ack");
    // Fewer than the route lets wait, and three times as heavy as may.
    let new = draft(json!("y".repeat(100_000)).to_string());
    for _ in 0..30 {
        publisher.publish("telemetry.s", &new).await.unwrap();
    }
    let dropped = r#"twinspan_dropped_total{lane="ephemeral",reason="slow",route="telemetry"}"#;
    assert!(span.metric(dropped) > 15.0, "dropped before the client reads any of it");
    let (mut replayed, mut missed, mut live) = (0, 0, 0);
    while missed + live < 30 {
        let frame = hear(&mut slow).await;
        match frame["type"].as_str() {
            Some("gap") => missed += frame["dropped"].as_u64().unwrap(),
            Some("event") if frame["subscription"].is_string() => replayed += 1,
            Some("event") => live += 1,
            other => assert_eq!((other, &frame["code"]), (Some("info"), &json!("REPLAY_DONE"))),
        }
    }
    assert_eq!(replayed, 1500);
    assert!(live > 5, "{missed} missed, {live} live");
    assert_eq!(span.metric(dropped), missed as f64);
}

#[tokio::test]
async fn notices_do_not_pile_up_for_a_client_that_does_not_read() {
    let mut plan = Plan::default();
    plan.settings.session.max_inflight = 16;
    let span = Span::with(plan).await;
    let mut slow = unread(&span).await;
    subscribe(&mut slow, "telemetry.s").await;
    // Until nothing more goes into its socket.
    let publisher = span.client().await;
    let filler = draft(json!("x".repeat(100_000)).to_string());
    for _ in 0..200 {
        publisher.publish("telemetry.s", &filler).await.unwrap();
    }
    let topic = twinspan::topic::Topic::parse("telemetry.s").unwrap();
    for _ in 0..5000 {
        span.app().bridge.notify(Notice::TopicDeleted { topic: topic.clone() });
        tokio::task::yield_now().await;
    }
    let waiting = span.app().roster.sessions().into_iter().map(|session| session.outbox.len()).max();
    assert!(waiting < Some(500), "{waiting:?} wait");
    while hear(&mut slow).await["close"].as_u64() != Some(4008) {}
}

#[tokio::test]
async fn a_client_that_answers_no_ping_is_closed() {
    let mut plan = Plan::default();
    plan.settings.session.ping_interval = Duration::from_millis(100);
    plan.settings.session.pong_timeout = Duration::from_millis(400);
    let span = Span::with(plan).await;
    let _dead = unread(&span).await;
    let mut alive = span.client().await;
    eventually("the dead one is let go", async || {
        span.metric(r#"twinspan_connections{dialect="json"}"#) == 1.0
            && span.metric(r#"twinspan_close_total{code="1001"}"#) == 1.0
    })
    .await;
    // The other one answers pings by reading, and is still there.
    alive.subscribe("telemetry.a", nothing()).await.unwrap();
    alive.publish("telemetry.a", &draft("1")).await.unwrap();
    assert_eq!(next_payload(&mut alive).await, "1");
}
