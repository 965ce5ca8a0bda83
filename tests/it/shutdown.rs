//! The bridge goes in order: it says so, answers what is under way, and leaves nothing behind.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::json;
use twinspan::client::ClientError;

use crate::harness::{Plan, Span, draft, next, next_payload, nothing, soon};

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
