//! What the bridge asks of a nats-server: one subscription per pattern, however many hear it.

use std::sync::Arc;

use twinspan::lane::contract::EphemeralLane;
use twinspan::policy::Policy;
use twinspan::policy::table::{Route, RouteTable};

use crate::brokers::{Broker, left_out, shared_nats};
use crate::lanes::{Recorder, ephemeral, eventually, nats, pattern, policy, publish, settings, text, unique};

/// How often the server has a subscription to something under `prefix`, subject by subject.
async fn subscriptions(broker: &Broker, prefix: &str) -> Vec<String> {
    let (status, body) = broker.get("/connz?subs=1&limit=10000").await.unwrap();
    assert_eq!(status, 200);
    let connz: serde_json::Value = serde_json::from_str(&body).unwrap();
    let connections = connz["connections"].as_array().unwrap();
    let lists = connections.iter().filter_map(|connection| connection["subscriptions_list"].as_array());
    let mut subjects: Vec<_> = lists
        .flatten()
        .filter_map(|subject| subject.as_str()?.strip_prefix(prefix).map(str::to_owned))
        .collect();
    subjects.sort();
    subjects
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pattern_is_one_subscription_however_many_ears_and_goes_with_the_last() {
    if left_out() {
        return;
    }
    let broker = shared_nats().await;
    let space = unique();
    let policy = policy([ephemeral(">", &format!("{space}.{{topic}}"))]);
    let lane = nats(&settings(broker.url()), &policy).await;
    // At once, so that they all wait for one server's answer.
    let listening = (0..100).map(|at| {
        let (lane, group) = (lane.clone(), (at % 4 == 3).then_some("g"));
        let topics = ["a.*", "a.b", "a.>", "a.*"][at % 4];
        async move { lane.listen(&pattern(topics), group, 0, Recorder::new()).await.unwrap() }
    });
    let mut listening = futures_util::future::join_all(listening).await;
    let prefix = format!("{space}.");
    assert_eq!(subscriptions(broker, &prefix).await, ["a.*", "a.*", "a.>", "a.b"]);

    let last = listening.split_off(96);
    drop(listening);
    assert_eq!(subscriptions(broker, &prefix).await, ["a.*", "a.*", "a.>", "a.b"]);
    drop(last);
    eventually("the subscriptions are gone", async || subscriptions(broker, &prefix).await.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listen_that_is_given_up_leaves_no_subscription() {
    if left_out() {
        return;
    }
    let broker = shared_nats().await;
    let space = unique();
    let policy = policy([ephemeral(">", &format!("{space}.{{topic}}"))]);
    let lane = nats(&settings(broker.url()), &policy).await;
    for polls in 0..20 {
        let name = pattern(&format!("a.{polls}"));
        let mut listening = Box::pin(lane.listen(&name, None, 1, Recorder::new()));
        for _ in 0..polls {
            if futures_util::poll!(&mut listening).is_ready() {
                break;
            }
            tokio::task::yield_now().await;
        }
    }
    let prefix = format!("{space}.");
    let (ear, _listening) = Recorder::listening(&*lane, "fence").await;
    publish(&*lane, &policy, "fence", "x").await;
    ear.wait(1).await;
    eventually("only the fence is left", async || subscriptions(broker, &prefix).await == ["fence"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retained_route_is_listened_to_always_and_follows_the_policy() {
    if left_out() {
        return;
    }
    let broker = shared_nats().await;
    let space = unique();
    let prefix = format!("{space}.");
    let retained =
        |topics: &str, retain| Route { retain, ..ephemeral(topics, &format!("{space}.{{topic}}")) };
    let policy = policy([retained("kept.>", true), retained("other.>", false)]);
    let publisher_policy: Policy = policy.clone();
    let lane = nats(&settings(broker.url()), &policy).await;
    let elsewhere = nats(&settings(broker.url()), &publisher_policy).await;
    // Two bridges, one subscription each.
    eventually("the route is listened to", async || {
        subscriptions(broker, &prefix).await == ["kept.>", "kept.>"]
    })
    .await;
    for at in 0..5 {
        publish(&*elsewhere, &policy, "kept.a", at.to_string()).await;
        publish(&*elsewhere, &policy, "other.a", at.to_string()).await;
    }
    let past = async |lane: Arc<twinspan::lane::nats::Nats>, topics: &'static str| {
        let listening = lane.listen(&pattern(topics), None, 9, Recorder::new()).await.unwrap();
        listening.history.iter().map(|(_, envelope)| text(envelope)).collect::<Vec<_>>()
    };
    eventually("the ring is whole", async || past(lane.clone(), "kept.a").await == ["0", "1", "2", "3", "4"])
        .await;
    assert_eq!(past(lane.clone(), "other.a").await, [""; 0]);
    assert_eq!(past(elsewhere.clone(), "other.a").await.len(), 5, "what a bridge publishes itself it has");

    policy.replace(RouteTable::new([retained("kept.>", false), retained("other.>", true)]));
    eventually("the other is", async || subscriptions(broker, &prefix).await == ["other.>", "other.>"]).await;
}
