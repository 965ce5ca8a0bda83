//! Subscribers that join while others publish: each publisher's messages come complete, once and in order, whatever the
//! lanes of the topic and wherever the subscriber begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};
use serde_json::{Value, json};
use tokio::sync::Barrier;
use twinspan::wire::json::heard::Heard;

use crate::harness::{PATIENCE, Plan, Span, draft, soon};

const PUBLISHERS: usize = 4;
const MESSAGES: usize = 60;
const JOINERS: usize = 4;
const LANES: [&str; 3] = ["orders", "both", "first"];
/// Schedules that run side by side.
const AT_ONCE: usize = 4;
/// Schedules whose topics one pattern covers: who subscribes to it opens them all.
const COVERED: u64 = 16;

/// Schedules for each of the lanes.
fn runs(usual: u64, soak: u64) -> u64 {
    if std::env::var_os("SOAK").is_some() { soak } else { usual }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_joins_while_others_publish_gets_every_sequence_complete_once_and_in_order() {
    let span = Span::start().await;
    schedules(&[&span], runs(100, 1000)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn who_joins_on_either_of_two_bridges_gets_every_sequence_too() {
    let (Some(plan), Some(mut other)) = (Plan::on_brokers().await, Plan::on_brokers().await) else { return };
    (other.routes, other.own) = (plan.routes.clone(), plan.own.clone());
    let (one, other) = (Span::with(plan).await, Span::with(other).await);
    schedules(&[&one, &other], runs(10, 50)).await;
}

async fn schedules(bridges: &[&Span], runs: u64) {
    let given = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let first = given.unwrap_or_else(|| fastrand::u64(0..1 << 32));
    let seeds = if given.is_some() { first..first + 1 } else { first..first + runs };
    let all = LANES.iter().flat_map(|lane| seeds.clone().map(move |seed| (lane, seed)));
    stream::iter(all).for_each_concurrent(AT_ONCE, |(lane, seed)| schedule(bridges, lane, seed)).await;
}

async fn schedule(bridges: &[&Span], lane: &str, seed: u64) {
    let mut random = Rng::with_seed(seed);
    let family = format!("{lane}.f{}", seed / COVERED);
    let topic = format!("{family}.s{seed}");
    // The last messages go out once everyone is there.
    let joined = Arc::new(Barrier::new(PUBLISHERS + JOINERS));
    let publishers: Vec<_> = (0..PUBLISHERS).map(|publisher| {
        let (mut random, topic, joined) = (random.fork(), topic.clone(), joined.clone());
        async move {
            let client = bridges[publisher % bridges.len()].client().await;
            for n in 0..MESSAGES {
                if n == MESSAGES - 1 {
                    soon(joined.wait()).await;
                }
                let payload = json!([publisher, n]).to_string();
                match random.bool() {
                    true => drop(soon(client.publish(&topic, &draft(payload))).await.unwrap()),
                    false => {
                        let frame = json!({"type": "publish", "topic": topic, "message": {"payload": [publisher, n]},
                            "confirm": false});
                        client.send(frame.to_string()).await.unwrap();
                    }
                }
                if random.u8(..) < 64 {
                    tokio::time::sleep(Duration::from_millis(random.u64(0..4))).await;
                }
            }
            soon(client.ping()).await.unwrap();
        }
    }).collect();
    let joiners: Vec<_> = (0..JOINERS)
        .map(|_| {
            let (random, family, topic, joined) = (random.fork(), &family, &topic, joined.clone());
            async move { join(bridges, (lane, seed), (family, topic), random, &joined).await }
        })
        .collect();
    tokio::join!(join_all(publishers), join_all(joiners));
}

async fn join(
    bridges: &[&Span],
    (lane, seed): (&str, u64),
    (family, topic): (&str, &str),
    mut random: Rng,
    joined: &Barrier,
) {
    let mut client = bridges[random.usize(..bridges.len())].client().await;
    tokio::time::sleep(Duration::from_millis(random.u64(0..40))).await;
    let pattern = if random.bool() { topic.to_owned() } else { format!("{family}.*") };
    // Of a pattern each schedule beside this one would come along.
    let mut asked = json!({"filter": format!("topic == '{topic}'")});
    let start = random.u8(0..3);
    match start {
        0 => asked["from"] = json!("earliest"),
        1 => asked["last_n"] = json!(10_000),
        _ => {}
    }
    client.subscribe(&pattern, asked).await.unwrap();
    soon(joined.wait()).await;
    let mut came: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let mut told: Vec<Heard> = Vec::new();
    let is_whole = |came: &BTreeMap<u64, Vec<u64>>| {
        came.len() == PUBLISHERS && came.values().all(|of| of.last() == Some(&(MESSAGES as u64 - 1)))
    };
    while !is_whole(&came) {
        let Ok(heard) = tokio::time::timeout(PATIENCE, client.next()).await else {
            panic!("SEED={seed} {topic} start {start}: {came:?}\n{told:#?}");
        };
        let heard = heard.unwrap();
        match heard.kind.as_str() {
            "event" => {
                let payload: Value = serde_json::from_slice(&heard.payload().unwrap()).unwrap();
                let (publisher, n) = (payload[0].as_u64().unwrap(), payload[1].as_u64().unwrap());
                let of = came.entry(publisher).or_default();
                let is_next = match of.last() {
                    Some(last) => n == last + 1,
                    None => n == 0 || start == 2,
                };
                assert!(
                    is_next,
                    "SEED={seed} {topic} start {start}: {n} of {publisher} after {of:?}: {heard:?}"
                );
                of.push(n);
            }
            "checkpoint" => assert_eq!(lane, "first"),
            _ => assert_eq!(heard.code.as_deref(), Some("REPLAY_DONE"), "{heard:?}"),
        }
        told.push(heard);
    }
}
