//! What clients say to the bridge over a real socket, and what they hear.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;

use crate::harness::{Span, draft, next, next_payload, nothing, on_both_kinds, refused, silent, soon};

on_both_kinds! {
    what_is_published_on_either_lane_is_heard_by_who_subscribed_before,
    wildcards_span_lanes_and_an_overlap_brings_a_message_once,
    payloads_of_every_kind_cross_as_they_are,
    a_request_gets_the_first_reply_and_a_reply_to_is_good_once,
    every_refusal_names_its_code_and_the_connection_lives_on,
    a_connection_has_a_bounded_number_of_subscriptions,
    history_comes_first_and_then_what_is_live,
    a_durable_topic_is_replayed_from_the_beginning_a_time_or_a_position,
    a_subscriber_that_never_got_an_event_can_resume_where_it_was,
    a_group_shares_its_messages_and_gives_back_what_was_not_acknowledged,
    a_group_on_a_pattern_is_that_group_on_each_topic,
    a_queue_group_on_an_ephemeral_topic_hears_each_message_once,
    publishes_are_pipelined_and_keep_their_order,
}

async fn what_is_published_on_either_lane_is_heard_by_who_subscribed_before(span: Span) {
    let (mut alice, bob) = (span.client().await, span.client().await);
    for (topic, lane) in [("telemetry.cpu", "ephemeral"), ("orders.eu", "durable")] {
        let ack = alice.subscribe(topic, nothing()).await.unwrap();
        assert_eq!((ack.kind.as_str(), ack.lane.as_deref()), ("ack", Some(lane)));
        let ack = bob.publish(topic, &draft(r#"{"n":1}"#)).await.unwrap();
        assert_eq!((ack.status.as_deref(), ack.lane.as_deref()), (Some("ok"), Some(lane)));
        let event = next(&mut alice).await;
        assert_eq!(event.topic.as_deref(), Some(topic));
        assert_eq!(event.payload().unwrap(), br#"{"n":1}"#);
        assert_eq!(event.message().unwrap().id, ack.message_id);
        assert_eq!(event.position, ack.position);
        assert_eq!(event.position.is_some(), lane == "durable");
    }
}

async fn wildcards_span_lanes_and_an_overlap_brings_a_message_once(span: Span) {
    let mut client = span.client().await;
    for pattern in ["mixed.>", "mixed.*.a", "mixed.live.a", "mixed.kept.a"] {
        client.subscribe(pattern, nothing()).await.unwrap();
    }
    for topic in ["mixed.live.a", "mixed.kept.a"] {
        client.publish(topic, &draft(format!("\"{topic}\""))).await.unwrap();
        assert_eq!(next_payload(&mut client).await, format!("\"{topic}\""));
    }
    // A durable topic that nobody had published to: the pattern finds it, from its first message on.
    client.publish("mixed.kept.b", &draft("1")).await.unwrap();
    client.publish("mixed.kept.b", &draft("2")).await.unwrap();
    assert_eq!(next_payload(&mut client).await, "1");
    assert_eq!(next_payload(&mut client).await, "2");
    silent(&mut client).await;
    // Without the oldest of them the others go on.
    client.unsubscribe("mixed.>", None).await.unwrap();
    for topic in ["mixed.live.a", "mixed.kept.a"] {
        client.publish(topic, &draft("3")).await.unwrap();
        assert_eq!(next_payload(&mut client).await, "3");
    }
    silent(&mut client).await;
}

async fn payloads_of_every_kind_cross_as_they_are(span: Span) {
    let mut client = span.client().await;
    for topic in ["telemetry.x", "orders.x"] {
        client.subscribe(topic, nothing()).await.unwrap();
        for payload in [
            &b"{ \"a\" : 1.0 }"[..],
            b"null",
            b"\"text\"",
            b"plain text",
            b"",
            b"\xff\x00\xfe",
            "\u{1F600}".as_bytes(),
        ] {
            client.publish(topic, &draft(payload)).await.unwrap();
            assert_eq!(next(&mut client).await.payload().unwrap(), payload);
        }
    }
}

async fn a_request_gets_the_first_reply_and_a_reply_to_is_good_once(span: Span) {
    let (mut server, caller) = (span.client().await, span.client().await);
    assert_eq!(
        refused(caller.request("svc.time", &draft("1"), Duration::from_secs(1)).await),
        "NO_RESPONDERS"
    );
    server.subscribe("svc.*", nothing()).await.unwrap();
    let asking = {
        let caller = caller.sender();
        tokio::spawn(
            async move { caller.request("svc.time", &draft("\"when\""), Duration::from_secs(5)).await },
        )
    };
    let request = next(&mut server).await;
    assert_eq!(request.payload().unwrap(), b"\"when\"");
    let reply_to = request.reply_to.unwrap();
    server.reply(&reply_to, &draft("12")).await.unwrap();
    let response = soon(asking).await.unwrap().unwrap();
    assert_eq!((response.kind.as_str(), response.topic.as_deref()), ("response", Some("svc.time")));
    assert_eq!(response.payload().unwrap(), b"12");
    for (client, name) in [(&mut server, "again"), (&mut span.client().await, "elsewhere")] {
        client.reply(&reply_to, &draft("13")).await.unwrap();
        let error = next(client).await;
        assert_eq!(error.error.unwrap().code, "FORBIDDEN", "{name}");
    }
    assert_eq!(refused(caller.request("svc.time", &draft("1"), Duration::from_millis(50)).await), "TIMEOUT");
    assert_eq!(
        refused(caller.request("orders.eu", &draft("1"), Duration::from_secs(1)).await),
        "LANE_MISMATCH"
    );
}

async fn every_refusal_names_its_code_and_the_connection_lives_on(span: Span) {
    let mut client = span.client().await;
    client.subscribe("telemetry.twice", nothing()).await.unwrap();
    let table = [
        ("{", "BAD_REQUEST"),
        ("null", "BAD_REQUEST"),
        (r#"{"type":"shout"}"#, "BAD_REQUEST"),
        (r#"{"type":"publish","topic":"orders.a"}"#, "BAD_REQUEST"),
        (r#"{"type":"publish","topic":"orders.a","messages":[]}"#, "BAD_REQUEST"),
        (r#"{"type":"publish","topic":"nowhere","messages":[{"payload":1}]}"#, "NO_ROUTE"),
        (r#"{"type":"publish","topic":"declared.a","messages":[{"payload":1}]}"#, "TOPIC_NOT_FOUND"),
        (r#"{"type":"subscribe","topic":"orders.a","filter":"payload.n =="}"#, "BAD_REQUEST"),
        (r#"{"type":"subscribe","topic":"telemetry.twice"}"#, "BAD_REQUEST"),
        (r#"{"type":"unsubscribe","topic":"orders.never"}"#, "BAD_REQUEST"),
        (r#"{"type":"publish","topic":"_INBOX.a","message":{"payload":1}}"#, "FORBIDDEN"),
        (r#"{"type":"subscribe","topic":"$SYS.>"}"#, "FORBIDDEN"),
        (r#"{"type":"publish","topic":"nowhere","message":{"payload":1}}"#, "NO_ROUTE"),
        (r#"{"type":"subscribe","topic":"nowhere.>"}"#, "NO_ROUTE"),
        (r#"{"type":"subscribe","topic":"declared.a"}"#, "TOPIC_NOT_FOUND"),
        (r#"{"type":"publish","topic":"declared.a","message":{"payload":1}}"#, "TOPIC_NOT_FOUND"),
        (r#"{"type":"publish","topic":"telemetry.a","message":{"payload":1,"delay_ms":5}}"#, "LANE_MISMATCH"),
        (r#"{"type":"seek","topic":"telemetry.a","group":"g","from":"earliest"}"#, "LANE_MISMATCH"),
        (r#"{"type":"seek","topic":"orders.a","group":"g","from":"earliest"}"#, "BAD_REQUEST"),
        (r#"{"type":"subscribe","topic":"telemetry.a","from":{"position":"1-1-0"}}"#, "LANE_MISMATCH"),
        (r#"{"type":"subscribe","topic":"orders.a","from":{"position":"yesterday"}}"#, "BAD_REQUEST"),
        (r#"{"type":"ack","delivery":99}"#, "UNKNOWN_DELIVERY"),
        (r#"{"type":"nack","delivery":99}"#, "UNKNOWN_DELIVERY"),
        (r#"{"type":"auth","token":"x"}"#, "BAD_REQUEST"),
    ];
    for (frame, code) in table {
        client.send(frame).await.unwrap();
        let error = next(&mut client).await;
        assert_eq!(error.kind, "error", "{frame}: {error:?}");
        assert_eq!(error.error.unwrap().code, code, "{frame}");
    }
    let big = format!(
        r#"{{"type":"publish","request_id":"big","topic":"orders.a","message":{{"payload":"{}"}}}}"#,
        "x".repeat(530_000)
    );
    client.send(big).await.unwrap();
    let error = next(&mut client).await;
    assert_eq!((error.request_id.as_deref(), error.error.unwrap().code.as_str()), (Some("big"), "TOO_LARGE"));
    assert_eq!(soon(client.ping()).await.unwrap().kind, "pong");
}

async fn a_connection_has_a_bounded_number_of_subscriptions(span: Span) {
    let client = span.client().await;
    for n in 0..128 {
        client.subscribe(&format!("telemetry.{n}"), nothing()).await.unwrap();
    }
    assert_eq!(refused(client.subscribe("telemetry.more", nothing()).await), "LIMIT_EXCEEDED");
    client.unsubscribe("telemetry.0", None).await.unwrap();
    client.subscribe("telemetry.more", nothing()).await.unwrap();
}

async fn history_comes_first_and_then_what_is_live(span: Span) {
    let mut client = span.client().await;
    for topic in ["telemetry.h", "orders.h"] {
        for n in 0..5 {
            client.publish(topic, &draft(n.to_string())).await.unwrap();
        }
        let ack = client.subscribe(topic, json!({"last_n": 3})).await.unwrap();
        assert_eq!(ack.last_n, Some(3));
        client.publish(topic, &draft("5")).await.unwrap();
        for n in 2..5 {
            let event = next(&mut client).await;
            assert_eq!(event.subscription.as_deref(), Some(topic), "{event:?}");
            assert_eq!(event.payload().unwrap(), n.to_string().as_bytes());
        }
        let mut live = next(&mut client).await;
        if live.kind == "event" && live.subscription.is_some() {
            // Stored before the replay came to its end: part of it.
            assert_eq!(live.payload().unwrap(), b"5");
            assert_eq!(next(&mut client).await.code.as_deref(), Some("REPLAY_DONE"));
        } else {
            assert_eq!(live.code.as_deref(), Some("REPLAY_DONE"), "{live:?}");
            live = next(&mut client).await;
            assert_eq!((live.subscription, live.message.is_some()), (None, true));
        }
    }
    silent(&mut client).await;
}

async fn a_durable_topic_is_replayed_from_the_beginning_a_time_or_a_position(span: Span) {
    let publisher = span.client().await;
    let mut acks = Vec::new();
    for n in 0..5 {
        acks.push(publisher.publish("orders.r", &draft(n.to_string())).await.unwrap());
    }
    let froms = [
        (json!("earliest"), 0),
        (json!({"position": acks[1].position}), 2),
        (json!({"time": "2000-01-01T00:00:00Z"}), 0),
        (json!({"time": "2100-01-01T00:00:00Z"}), 5),
    ];
    for (from, first) in froms {
        let mut client = span.client().await;
        client.subscribe("orders.r", json!({"from": from})).await.unwrap();
        for n in first..5 {
            assert_eq!(next_payload(&mut client).await, n.to_string(), "{from}");
        }
        assert_eq!(next(&mut client).await.code.as_deref(), Some("REPLAY_DONE"), "{from}");
        silent(&mut client).await;
    }
    // A pattern resumes topic by topic.
    let mut client = span.client().await;
    let from = json!({"positions": {"orders.r": acks[3].position}, "time": "2000-01-01T00:00:00Z"});
    client.subscribe("orders.>", json!({"from": from})).await.unwrap();
    assert_eq!(next_payload(&mut client).await, "4");
}

async fn a_subscriber_that_never_got_an_event_can_resume_where_it_was(span: Span) {
    let (reader, publisher) = (span.client().await, span.client().await);
    for before in [0, 1] {
        let ack = reader.subscribe("orders.n", nothing()).await.unwrap();
        let position = ack.position.expect("a durable subscription says where it starts");
        reader.unsubscribe("orders.n", None).await.unwrap();
        publisher.publish("orders.n", &draft(before.to_string())).await.unwrap();
        let mut late = span.client().await;
        late.subscribe("orders.n", json!({"from": {"position": position}})).await.unwrap();
        assert_eq!(next_payload(&mut late).await, before.to_string());
    }
}

async fn a_group_shares_its_messages_and_gives_back_what_was_not_acknowledged(span: Span) {
    let publisher = span.client().await;
    let (mut one, mut two) = (span.client().await, span.client().await);
    // Each may hold five, so that ten are shared evenly.
    let group = json!({"group": "billing", "prefetch": 5});
    let ack = one.subscribe("orders.g", group.clone()).await.unwrap();
    assert_eq!((ack.mode.as_deref(), ack.prefetch), (Some("shared"), Some(5)));
    two.subscribe("orders.g", group.clone()).await.unwrap();
    for n in 0..10 {
        publisher.publish("orders.g", &draft(n.to_string())).await.unwrap();
    }
    let (mut deliveries, mut held) = (Vec::new(), Vec::new());
    for _ in 0..5 {
        let event = next(&mut one).await;
        assert_eq!((event.group.as_deref(), event.attempt), (Some("billing"), Some(1)));
        deliveries.push(event.delivery.unwrap());
        held.push(next(&mut two).await.payload().unwrap());
    }
    silent(&mut one).await;
    one.ack(&deliveries).await.unwrap();
    // The one that leaves without a word gives back; the other gets it. What it refuses comes to it again.
    drop(two);
    let (mut refused, mut again) = (HashMap::new(), Vec::new());
    while again.len() < held.len() {
        let event = next(&mut one).await;
        let (payload, delivery) = (event.payload().unwrap(), [event.delivery.unwrap()]);
        match refused.remove(&payload) {
            None => {
                one.nack(&delivery, Duration::ZERO).await.unwrap();
                refused.insert(payload, event.attempt.unwrap());
            }
            Some(attempt) => {
                assert!(event.attempt.unwrap() > attempt, "{event:?}");
                one.ack(&delivery).await.unwrap();
                again.push(payload);
            }
        }
    }
    again.sort();
    held.sort();
    assert_eq!(again, held);
    silent(&mut one).await;
}

async fn a_group_on_a_pattern_is_that_group_on_each_topic(span: Span) {
    let mut client = span.client().await;
    for topic in ["mixed.kept.a", "mixed.kept.b"] {
        client.publish(topic, &draft("0")).await.unwrap();
    }
    let group = json!({"group": "audit", "from": "earliest"});
    client.subscribe("mixed.kept.*", group.clone()).await.unwrap();
    for topic in ["mixed.kept.a", "mixed.kept.b", "mixed.kept.new"] {
        client.publish(topic, &draft("1")).await.unwrap();
    }
    let (mut deliveries, mut heard) = (Vec::new(), Vec::new());
    while heard.len() < 5 {
        let event = next(&mut client).await;
        if event.code.as_deref() == Some("REPLAY_DONE") {
            continue;
        }
        heard.push((event.topic.clone().unwrap(), event.payload().unwrap()));
        deliveries.push(event.delivery.unwrap());
    }
    heard.sort();
    let expected = [("a", "0"), ("a", "1"), ("b", "0"), ("b", "1"), ("new", "1")]
        .map(|(topic, payload)| (format!("mixed.kept.{topic}"), payload.as_bytes().to_vec()));
    assert_eq!(heard, expected);
    // One ack settles deliveries of all the topics, for good.
    client.ack(&deliveries).await.unwrap();
    client.unsubscribe("mixed.kept.*", Some("audit")).await.unwrap();
    client.subscribe("mixed.kept.*", group).await.unwrap();
    client.publish("mixed.kept.a", &draft("2")).await.unwrap();
    loop {
        let event = next(&mut client).await;
        if event.kind == "event" {
            assert_eq!(event.payload().unwrap(), b"2", "what was acknowledged does not come again");
            break;
        }
    }
}

async fn a_queue_group_on_an_ephemeral_topic_hears_each_message_once(span: Span) {
    let publisher = span.client().await;
    let (mut one, mut two) = (span.client().await, span.client().await);
    for client in [&one, &two] {
        client.subscribe("telemetry.q", json!({"group": "workers"})).await.unwrap();
    }
    for n in 0..10 {
        publisher.publish("telemetry.q", &draft(n.to_string())).await.unwrap();
    }
    for n in 0..10 {
        let event = next(if n % 2 == 0 { &mut one } else { &mut two }).await;
        assert_eq!((event.group.as_deref(), event.delivery), (Some("workers"), None));
    }
    silent(&mut one).await;
    silent(&mut two).await;
}

async fn publishes_are_pipelined_and_keep_their_order(span: Span) {
    let (mut reader, publisher) = (span.client().await, span.client().await);
    for topic in ["telemetry.p", "orders.p"] {
        reader.subscribe(topic, nothing()).await.unwrap();
        for n in 0..1000 {
            let frame =
                json!({"type": "publish", "topic": topic, "message": {"payload": n}, "confirm": false});
            publisher.send(frame.to_string()).await.unwrap();
            // What waits for one client is bounded, so an ephemeral reader has to keep up.
            if topic.starts_with("telemetry") && n % 50 == 49 {
                for expected in n - 49..=n {
                    assert_eq!(next_payload(&mut reader).await, expected.to_string());
                }
            }
        }
        if topic.starts_with("orders") {
            for n in 0..1000 {
                assert_eq!(next_payload(&mut reader).await, n.to_string());
            }
        }
    }
}
