//! Topics that take both lanes: live on the one, stored on the other.

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::json;
use twinspan::client::Client;
use twinspan::wire::json::heard::Heard;

use crate::brokers::{Broker, Options, shared_nats};
use crate::harness::{
    Plan, Span, draft, eventually, next, next_payload, nothing, on_both_kinds, silent, soon,
};

on_both_kinds! {
    a_topic_of_both_lanes_is_stored_and_its_events_come_once_with_their_positions,
    requests_on_a_topic_of_both_lanes_take_the_live_one_and_are_not_stored,
    a_group_of_a_topic_of_both_lanes_is_a_durable_one,
    what_is_sent_live_first_comes_once_and_checkpoints_say_up_to_where_nothing_is_missing,
    a_replay_of_what_is_sent_live_first_has_no_gap_before_the_live_events,
}

async fn a_topic_of_both_lanes_is_stored_and_its_events_come_once_with_their_positions(span: Span) {
    let mut client = span.client().await;
    let subscribed = client.subscribe("both.kept.a", nothing()).await.unwrap();
    assert_eq!(subscribed.lane.as_deref(), Some("both"));
    client.subscribe("both.>", nothing()).await.unwrap();
    let mut last = None;
    for n in ["1", "2", "3"] {
        let ack = client.publish("both.kept.a", &draft(n)).await.unwrap();
        assert_eq!((ack.lane.as_deref(), ack.status.as_deref()), (Some("both"), Some("ok")));
        let event = next(&mut client).await;
        assert_eq!((event.lane.as_deref(), &event.position), (Some("both"), &ack.position));
        assert_eq!(event.payload().unwrap(), n.as_bytes());
        last = ack.position;
    }
    silent(&mut client).await;
    let mut late = span.client().await;
    late.subscribe("both.*.a", json!({"last_n": 2})).await.unwrap();
    assert_eq!([next_payload(&mut late).await, next_payload(&mut late).await], ["2", "3"]);
    assert_eq!(next(&mut late).await.code.as_deref(), Some("REPLAY_DONE"));
    late.subscribe("both.kept.a", json!({"from": {"position": last}})).await.unwrap();
    assert_eq!(next(&mut late).await.code.as_deref(), Some("REPLAY_DONE"));
    let (status, page) = span.get("/topics/both.kept.a/messages").await;
    assert_eq!((status, page["messages"].as_array().unwrap().len()), (200, 3));
    assert_eq!(page["messages"][0]["lane"], "both");
}

async fn requests_on_a_topic_of_both_lanes_take_the_live_one_and_are_not_stored(span: Span) {
    let (mut service, mut client) = (span.client().await, span.client().await);
    service.subscribe("both.svc.*", nothing()).await.unwrap();
    let caller = client.sender();
    let asking = tokio::spawn(async move {
        caller.request("both.svc.time", &draft("\"?\""), Duration::from_secs(5)).await.unwrap()
    });
    let request = next(&mut service).await;
    assert_eq!(request.lane.as_deref(), Some("both"));
    service.reply(&request.reply_to.unwrap(), &draft("12")).await.unwrap();
    assert_eq!(soon(asking).await.unwrap().payload().unwrap(), b"12");
    client.subscribe("both.svc.time", json!({"from": "earliest"})).await.unwrap();
    assert_eq!(next(&mut client).await.code.as_deref(), Some("REPLAY_DONE"));
    silent(&mut service).await;
}

async fn a_group_of_a_topic_of_both_lanes_is_a_durable_one(span: Span) {
    let mut client = span.client().await;
    let joined =
        client.subscribe("both.kept.g", json!({"group": "billing", "mode": "failover"})).await.unwrap();
    assert_eq!((joined.lane.as_deref(), joined.mode.as_deref()), (Some("both"), Some("failover")));
    client.publish("both.kept.g", &draft("1")).await.unwrap();
    let event = next(&mut client).await;
    assert_eq!((event.lane.as_deref(), event.attempt), (Some("both"), Some(1)));
    client.ack(&[event.delivery.unwrap()]).await.unwrap();
    silent(&mut client).await;
}

#[tokio::test]
async fn native_nats_subscribers_of_a_topic_of_both_lanes_get_copies_in_the_order_of_storage() {
    let Some(span) = Span::on_brokers().await else { return };
    let native = async_nats::connect(shared_nats().await.url()).await.unwrap();
    let mut copies = native.subscribe(format!("{}.both.kept.n", span.own)).await.unwrap();
    native.flush().await.unwrap();
    let mut client = span.client().await;
    client.subscribe("both.kept.n", nothing()).await.unwrap();
    for n in 0..200 {
        let frame =
            json!({"type": "publish", "topic": "both.kept.n", "message": {"payload": n}, "confirm": false});
        client.send(frame.to_string()).await.unwrap();
    }
    for n in 0..200 {
        assert_eq!(soon(copies.next()).await.unwrap().payload, n.to_string());
        assert_eq!(next_payload(&mut client).await, n.to_string());
    }
    // What a native client says on the live half is for the live half.
    native.publish(format!("{}.both.kept.n", span.own), "native".into()).await.unwrap();
    native.flush().await.unwrap();
    silent(&mut client).await;
}

/// A bridge whose NATS may be killed.
async fn with_its_own_nats() -> Option<(Span, Broker)> {
    let mut plan = Plan::on_brokers().await?;
    let nats = Broker::nats(&Options::default()).await;
    plan.ephemeral_on(nats.url());
    Some((Span::with(plan).await, nats))
}

#[tokio::test]
async fn without_its_live_half_a_topic_of_both_lanes_is_stored_and_its_subscribers_miss_nothing() {
    let Some((span, mut nats)) = with_its_own_nats().await else { return };
    let mut client = span.client().await;
    client.subscribe("both.kept.o", nothing()).await.unwrap();
    nats.kill();
    assert_eq!(next(&mut client).await.code.as_deref(), Some("LANE_DOWN"));
    let mut late = span.client().await;
    late.subscribe("both.kept.o", nothing()).await.unwrap();
    client.publish("both.kept.o", &draft("1")).await.unwrap();
    assert_eq!([next_payload(&mut client).await, next_payload(&mut late).await], ["1", "1"]);
    silent(&mut client).await;
    eventually("the copy is counted as dropped", async || {
        span.metric("twinspan_dropped_total{lane=\"ephemeral\",reason=\"copy\",route=\"both\"}") == 1.0
    })
    .await;
}

#[tokio::test]
async fn who_subscribes_while_the_live_half_is_away_is_asked_once_it_is_back() {
    let Some((span, mut nats)) = with_its_own_nats().await else { return };
    let mut service = span.client().await;
    nats.kill();
    eventually("the ephemeral lane is down", async || span.app().status() == "degraded").await;
    service.subscribe("both.svc.late", nothing()).await.unwrap();
    nats.restart().await;
    let caller = span.client().await.sender();
    let asking = tokio::spawn(async move {
        // Nobody serves it until the subscription is there.
        loop {
            if let Ok(answer) = caller.request("both.svc.late", &draft("1"), Duration::from_secs(1)).await {
                return answer.payload().unwrap();
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let request = loop {
        let heard = next(&mut service).await;
        if heard.kind == "event" {
            break heard;
        }
    };
    service.reply(&request.reply_to.unwrap(), &draft("2")).await.unwrap();
    assert_eq!(soon(asking).await.unwrap(), b"2");
}

async fn what_is_sent_live_first_comes_once_and_checkpoints_say_up_to_where_nothing_is_missing(span: Span) {
    let mut client = span.client().await;
    let subscribed = client.subscribe("first.a", nothing()).await.unwrap();
    assert_eq!(subscribed.lane.as_deref(), Some("both"));
    client.subscribe("first.*", nothing()).await.unwrap();
    // A bridge's first message comes with storage.
    client.publish("first.a", &draft("0")).await.unwrap();
    let event = next(&mut client).await;
    assert!(event.late && event.position.is_some(), "{event:?}");
    let mut last = None;
    for n in 1..50 {
        let ack = client.publish("first.a", &draft(n.to_string())).await.unwrap();
        assert_eq!(ack.status.as_deref(), Some("ok"));
        last = ack.position;
    }
    let mut live = 0;
    for n in 1..50 {
        let event = next_event(&mut client).await;
        assert_eq!(event.payload().unwrap(), n.to_string().as_bytes());
        // On a busy machine storage may be first now and then, which an event says.
        assert_eq!((event.lane.as_deref(), event.position.is_some()), (Some("both"), event.late));
        assert!(event.frame.find("twinspan-live").is_none(), "{}", event.frame);
        live += usize::from(!event.late);
    }
    assert!(live > 25, "{live} of 49 came live");
    loop {
        let checkpoint = next(&mut client).await;
        if checkpoint.kind == "info" {
            continue;
        }
        assert_eq!((checkpoint.kind.as_str(), checkpoint.topic.as_deref()), ("checkpoint", Some("first.a")));
        if checkpoint.position == last {
            break;
        }
    }
    silent(&mut client).await;
    let mut again = span.client().await;
    again.subscribe("first.a", json!({"from": {"position": last}})).await.unwrap();
    assert_eq!(next(&mut again).await.code.as_deref(), Some("REPLAY_DONE"));
    client.publish("first.a", &draft("50")).await.unwrap();
    for client in [&mut client, &mut again] {
        assert_eq!(next_event(client).await.payload().unwrap(), b"50");
    }
}

async fn a_replay_of_what_is_sent_live_first_has_no_gap_before_the_live_events(span: Span) {
    let mut client = span.client().await;
    client.subscribe("first.r", nothing()).await.unwrap();
    for n in 0..20 {
        client.publish("first.r", &draft(n.to_string())).await.unwrap();
    }
    // Beside a feed that is ahead of storage.
    client.subscribe("first.*", json!({"last_n": 5})).await.unwrap();
    let replayed = async |client: &mut Client| loop {
        let heard = next_event(client).await;
        if heard.subscription.is_some() {
            break heard;
        }
    };
    for n in 15..20 {
        let event = replayed(&mut client).await;
        assert_eq!((event.payload().unwrap(), event.late), (n.to_string().into_bytes(), false));
    }
    client.publish("first.r", &draft("20")).await.unwrap();
    assert_eq!(next_event(&mut client).await.payload().unwrap(), b"20");
}

#[tokio::test]
async fn what_the_live_half_loses_comes_late_from_storage() {
    let Some((span, mut nats)) = with_its_own_nats().await else { return };
    let mut client = span.client().await;
    client.subscribe("first.l", nothing()).await.unwrap();
    for n in ["0", "1"] {
        client.publish("first.l", &draft(n)).await.unwrap();
        assert_eq!(next_event(&mut client).await.late, n == "0");
    }
    nats.kill();
    while next(&mut client).await.code.as_deref() != Some("LANE_DOWN") {}
    for n in ["2", "3"] {
        client.publish("first.l", &draft(n)).await.unwrap();
        let event = next_event(&mut client).await;
        assert_eq!((event.payload().unwrap(), event.late), (n.into(), true));
    }
    nats.restart().await;
    while next(&mut client).await.code.as_deref() != Some("LANE_UP") {}
    eventually("events come live again", async || {
        client.publish("first.l", &draft("4")).await.unwrap();
        !next_event(&mut client).await.late
    })
    .await;
}

/// The next event, whatever checkpoints come before it.
async fn next_event(client: &mut Client) -> Heard {
    loop {
        let heard = next(client).await;
        match heard.kind.as_str() {
            "event" => return heard,
            _ => assert!(heard.kind == "checkpoint" || heard.code.is_some(), "{heard:?}"),
        }
    }
}
