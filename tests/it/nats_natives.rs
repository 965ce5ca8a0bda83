//! Native NATS clients and the bridge on one server: what one publishes, the other hears unchanged.

use std::sync::Arc;
use std::time::Duration;

use async_nats::HeaderMap;
use futures_util::StreamExt;
use twinspan::lane::contract::{EphemeralLane, LaneError};
use twinspan::message::{Draft, Lanes, Timestamp};
use twinspan::policy::Policy;
use twinspan::policy::table::Route;

use crate::brokers::{Broker, Options, left_out, shared_nats};
use crate::lanes::{
    Recorder, ephemeral, message, nats, pattern, policy, publish, route, settings, topic, unique,
};

/// A native client and a lane, whose subjects are in a space of their own.
struct Bed {
    client: async_nats::Client,
    space: String,
    policy: Policy,
    lane: Arc<dyn EphemeralLane>,
}

impl Bed {
    /// `None` where the tests are to do without brokers.
    async fn open(routes: impl FnOnce(&str) -> Vec<Route>) -> Option<Self> {
        if left_out() {
            return None;
        }
        let (broker, space) = (shared_nats().await, unique());
        let policy = policy(routes(&space));
        let lane = nats(&settings(broker.url()), &policy).await;
        Some(Self { client: client_of(broker).await, space, policy, lane })
    }
}

/// Every topic under its own name in the space.
fn plain(space: &str) -> Vec<Route> {
    vec![ephemeral(">", &format!("{space}.{{topic}}"))]
}

async fn client_of(broker: &Broker) -> async_nats::Client {
    async_nats::connect(broker.url()).await.unwrap()
}

/// The server has done what this client asked of it: it answers a request, which a flush does not wait for.
async fn settled(client: &async_nats::Client) {
    let _ = client.request(format!("{}.nobody", unique()), "".into()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_native_subscriber_gets_the_bytes_and_the_fields_in_headers() {
    let Some(Bed { client, space, policy, lane }) = Bed::open(plain).await else { return };
    let mut subscriber = client.subscribe(format!("{space}.>")).await.unwrap();
    settled(&client).await;

    let sent = Draft {
        payload: (0..=255).collect::<Vec<u8>>().into(),
        key: Some("k".into()),
        headers: [("traceparent".into(), "00-ab-cd-01".into())].into(),
        event_time: Some(Timestamp::from_millis(1_763_715_600_123)),
        ..Draft::default()
    }
    .accept();
    let name = topic("a.b");
    lane.publish(&route(&policy, &name), &name, sent.clone()).await.unwrap();
    let got = subscriber.next().await.unwrap();
    assert_eq!((got.subject.as_str(), &got.payload), (format!("{space}.a.b").as_str(), &sent.payload));
    let headers = got.headers.unwrap();
    let expected = [
        ("twinspan-id", sent.id.unwrap().to_string()),
        ("twinspan-ts", sent.ts.to_string()),
        ("twinspan-key", "k".into()),
        ("twinspan-event-time", "2025-11-21T09:00:00.123Z".into()),
        ("traceparent", "00-ab-cd-01".into()),
    ];
    for (name, value) in &expected {
        assert_eq!(headers.get(*name).map(|value| value.as_str()), Some(value.as_str()), "{name}");
    }
    assert_eq!(headers.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_native_client_publishes_is_heard_without_an_id_and_with_its_headers() {
    let Some(Bed { client, space, lane, .. }) = Bed::open(plain).await else { return };
    let (ear, _listening) = Recorder::listening(&*lane, "a.*").await;

    let bytes: Vec<u8> = (0..=255).rev().collect();
    let mut headers = HeaderMap::new();
    headers.append("Nats-Msg-Id", "theirs");
    headers.append("many", "first");
    headers.append("many", "second");
    client.publish(format!("{space}.a.x"), bytes.clone().into()).await.unwrap();
    client.publish_with_headers(format!("{space}.a.y"), headers, "y".into()).await.unwrap();
    let heard = ear.wait(2).await;
    assert_eq!(
        (heard[0].topic.as_str(), heard[0].message.id, &heard[0].message.payload[..]),
        ("a.x", None, &*bytes)
    );
    assert!(heard[0].message.headers.is_empty() && heard[0].message.ts.age() < Duration::from_secs(20));
    let theirs = [("Nats-Msg-Id".into(), "theirs".into()), ("many".into(), "first".into())].into();
    assert_eq!(heard[1].message.headers, theirs);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_cross_both_ways() {
    let Some(Bed { client, space, policy, lane }) = Bed::open(plain).await else { return };

    let (ear, _listening) = Recorder::listening(&*lane, "svc").await;
    let (answer, ()) = tokio::join!(client.request(format!("{space}.svc"), "?".into()), async {
        let heard = ear.wait(1).await;
        let to = heard[0].reply_to.clone().unwrap();
        assert_eq!(to.timeout, None, "a native client does not say how long it waits");
        lane.reply(&to, message("!")).await.unwrap();
    });
    assert_eq!(&*answer.unwrap().payload, b"!");

    let mut service = client.subscribe(format!("{space}.native")).await.unwrap();
    settled(&client).await;
    let name = topic("native");
    let route = route(&policy, &name);
    let (answer, ()) =
        tokio::join!(lane.request(&route, &name, message("?"), Duration::from_secs(10)), async {
            let asked = service.next().await.unwrap();
            let timeout = asked.headers.unwrap();
            assert_eq!(timeout.get("twinspan-timeout-ms").unwrap().as_str(), "10000");
            client.publish(asked.reply.unwrap(), "!".into()).await.unwrap();
        });
    let answer = answer.unwrap();
    assert_eq!((&*answer.payload, answer.id), (&b"!"[..], None));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_is_heard_by_the_template_of_its_own_route_alone() {
    let routes = |space: &str| {
        vec![
            ephemeral(">", &format!("{space}.{{topic}}")),
            ephemeral("moved.>", &format!("v2-{space}.{{topic}}")),
            ephemeral("suffixed.>", &format!("{space}.{{topic}}.v3")),
            Route { lane: Lanes::DURABLE, ..ephemeral("stored.>", &format!("{space}.{{topic}}")) },
        ]
    };
    let Some(Bed { client, space, policy, lane }) = Bed::open(routes).await else { return };
    let (all, _all) = Recorder::listening(&*lane, ">").await;
    let (moved, _moved) = Recorder::listening(&*lane, "moved.*").await;
    for subject in [
        format!("{space}.a"),
        format!("{space}.moved.a"),
        format!("v2-{space}.moved.a"),
        format!("v2-{space}.b"),
        format!("{space}.suffixed.a"),
        format!("{space}.suffixed.a.v3"),
        format!("{space}.stored.a"),
        format!("{space}.not/ours"),
        format!("{space}.moved.end"),
        format!("v2-{space}.moved.end"),
        format!("{space}.end"),
    ] {
        client.publish(subject, "x".into()).await.unwrap();
    }
    let heard = |ear: &Arc<Recorder>| {
        let mut heard: Vec<_> = ear.heard().iter().map(|envelope| envelope.topic.to_string()).collect();
        heard.sort();
        heard
    };
    all.wait(5).await;
    moved.wait(2).await;
    settled(&client).await;
    publish(&*lane, &policy, "fence", "fence").await;
    all.wait_for("fence").await;
    assert_eq!(heard(&all), ["a", "end", "fence", "moved.a", "moved.end", "suffixed.a"]);
    assert_eq!(heard(&moved), ["moved.a", "moved.end"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_native_subscriber_to_everything_disturbs_neither_probe_nor_listen() {
    if left_out() {
        return;
    }
    // Of its own: here no request is without somebody who could serve it.
    let broker = Broker::nats(&Options::default()).await;
    let client = client_of(&broker).await;
    let mut everything = client.subscribe(">").await.unwrap();
    client.publish("here", "".into()).await.unwrap();
    everything.next().await.unwrap();
    let policy = policy([ephemeral(">", "{topic}")]);
    let lane = nats(&settings(broker.url()), &policy).await;
    lane.probe().await.unwrap();
    let (ear, _listening) = Recorder::listening(&*lane, "a").await;
    publish(&*lane, &policy, "a", "x").await;
    ear.wait(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_native_message_is_in_the_history_once_however_many_patterns_bring_it() {
    let Some(Bed { client, space, lane, .. }) = Bed::open(plain).await else { return };
    let mut ears = Vec::new();
    for topics in ["a.*", "a.b", "*.b", "a.>"] {
        ears.push(Recorder::listening(&*lane, topics).await);
    }
    let group = Recorder::new();
    let grouped = lane.listen(&pattern("a.b"), Some("g"), 0, group.clone()).await.unwrap();
    for at in 0..50 {
        client.publish(format!("{space}.a.b"), at.to_string().into()).await.unwrap();
    }
    for (ear, _) in &ears {
        ear.wait(50).await;
    }
    group.wait(50).await;
    let past = async || {
        let listening = lane.listen(&pattern("a.b"), None, 1000, Recorder::new()).await.unwrap();
        listening.history.iter().map(|(_, envelope)| crate::lanes::text(envelope)).collect::<Vec<_>>()
    };
    assert_eq!(past().await, (0..50).map(|at| at.to_string()).collect::<Vec<_>>());

    // The oldest goes, another takes its place; in the end only the group is left.
    ears.remove(0);
    client.publish(format!("{space}.a.b"), "second".into()).await.unwrap();
    for (ear, _) in &ears {
        ear.wait_for("second").await;
    }
    group.wait_for("second").await;
    let others = ears.split_off(0);
    drop(others);
    client.publish(format!("{space}.a.b"), "third".into()).await.unwrap();
    group.wait_for("third").await;
    assert_eq!(past().await[49..], ["49", "second", "third"]);
    drop(grouped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_names_no_place_to_answer_is_a_message() {
    let Some(Bed { client, space, policy, lane }) = Bed::open(plain).await else { return };
    let (ear, _listening) = Recorder::listening(&*lane, "a").await;
    client.publish_with_reply(format!("{space}.a"), "x.*", "?".into()).await.unwrap();
    assert_eq!(ear.wait(1).await[0].reply_to, None);
    let name = topic("nobody");
    let asked = lane.request(&route(&policy, &name), &name, message("?"), Duration::from_secs(1)).await;
    assert!(matches!(asked, Err(LaneError::NoResponders(_))));
}
