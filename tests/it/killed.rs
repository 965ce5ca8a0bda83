//! A bridge that is killed with SIGKILL under load has lost nothing that it acknowledged.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use serde_json::json;
use tokio::task::JoinSet;
use twinspan::client::Client;

use crate::brokers::{left_out, shared_pulsar};
use crate::harness::{PATIENCE, draft, eventually, next};
use crate::process::Process;

/// Publishes from four connections at once until the process is killed, after a random while.
/// Returns what was acknowledged.
async fn kill_under_load(mut process: Process, topic: &str, round: usize) -> BTreeSet<String> {
    let mut publishers = JoinSet::new();
    for publisher in 0..4 {
        let (client, topic) = (Client::connect(&process.url()).await.unwrap(), topic.to_owned());
        publishers.spawn(async move {
            let (mut acknowledged, mut under_way) = (Vec::new(), JoinSet::new());
            for n in 0.. {
                let payload = format!("{round}/{publisher}/{n}");
                let Ok(ack) = client.publish_in_line(&topic, &draft(payload.clone())).await else {
                    break;
                };
                under_way.spawn(async move { ack.await.ok().map(|_| payload) });
                if under_way.len() >= 64 {
                    match under_way.join_next().await {
                        Some(Ok(Some(payload))) => acknowledged.push(payload),
                        _ => break,
                    }
                }
            }
            while let Some(done) = under_way.join_next().await {
                acknowledged.extend(done.unwrap());
            }
            acknowledged
        });
    }
    // The moment is what the test is about: it has to fall anywhere.
    tokio::time::sleep(Duration::from_millis(fastrand::u64(100..600))).await;
    process.kill().await;
    let mut acknowledged = BTreeSet::new();
    while let Some(publisher) = publishers.join_next().await {
        acknowledged.extend(publisher.unwrap());
    }
    acknowledged
}

fn rounds() -> usize {
    if std::env::var("SOAK").is_ok() { 50 } else { 10 }
}

async fn nothing_acknowledged_is_lost(settings: &[String], pulsar: &str) {
    let dir = tempfile::tempdir().unwrap();
    let routes = format!("[[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\npulsar = \"{pulsar}\"\n");
    std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
    let mut acknowledged = BTreeSet::new();
    for round in 0..rounds() {
        let process = Process::start(dir.path(), settings).await;
        let client = Client::connect(&process.url()).await.unwrap();
        eventually("the durable lane is up", async || client.publish("orders.up", &draft("1")).await.is_ok())
            .await;
        let before_the_kill = kill_under_load(process, "orders.k", round).await;
        assert!(!before_the_kill.is_empty(), "something was acknowledged before the kill");
        acknowledged.extend(before_the_kill);
    }
    let process = Process::start(dir.path(), settings).await;
    let mut client = Client::connect(&process.url()).await.unwrap();
    eventually("the durable lane is up", async || client.publish("orders.up", &draft("1")).await.is_ok())
        .await;
    let stored = each_once_and_in_order(&mut client, "orders.k").await;
    let lost: Vec<_> = acknowledged.difference(&stored).collect();
    assert!(lost.is_empty(), "{} of {} acknowledged are lost: {lost:?}", lost.len(), acknowledged.len());
}

/// Everything that is stored in a topic: each once, each publisher's in its order.
async fn each_once_and_in_order(client: &mut Client, topic: &str) -> BTreeSet<String> {
    client.subscribe(topic, json!({"from": "earliest"})).await.unwrap();
    let (mut last, mut stored) = (std::collections::HashMap::new(), BTreeSet::new());
    loop {
        let heard = next(client).await;
        if heard.code.as_deref() == Some("REPLAY_DONE") {
            return stored;
        }
        let payload = String::from_utf8(heard.payload().unwrap()).unwrap();
        let (publisher, n) = payload.rsplit_once('/').unwrap();
        let n: i64 = n.parse().unwrap();
        let before = last.insert(publisher.to_owned(), n).unwrap_or(-1);
        assert!(n > before, "each publisher's messages stand in its order: {before} before {payload}");
        stored.insert(payload);
    }
}

#[tokio::test]
async fn with_the_embedded_log() {
    nothing_acknowledged_is_lost(&[], "persistent://public/default/{topic}").await;
}

/// A process's settings, and what its topics' names are to begin with there.
async fn on_pulsar() -> ([String; 3], String) {
    let pulsar = shared_pulsar().await;
    let settings = [
        "lanes.durable.backend=pulsar".to_owned(),
        format!("lanes.durable.url={}", pulsar.url()),
        format!("lanes.durable.admin_url={}", pulsar.admin_url()),
    ];
    (settings, twinspan::message::MessageId::new().to_string().replace('-', ""))
}

#[tokio::test]
async fn with_pulsar() {
    if left_out() {
        return;
    }
    let (settings, own) = on_pulsar().await;
    nothing_acknowledged_is_lost(&settings, &format!("persistent://public/default/k{own}.{{topic}}")).await;
}

/// Each round begins while the lane connects, so it spools first and then drains, and ends anywhere in between.
#[tokio::test]
async fn while_it_spools_and_drains() {
    if left_out() {
        return;
    }
    let (settings, own) = on_pulsar().await;
    let dir = tempfile::tempdir().unwrap();
    let routes = format!(
        "[[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\noutage = \"spool\"\n\
         pulsar = \"persistent://public/default/s{own}.{{topic}}\"\n"
    );
    std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
    let mut acknowledged = BTreeSet::new();
    let rounds = if std::env::var("SOAK").is_ok() { 200 } else { 20 };
    for round in 0..rounds {
        let process = Process::start(dir.path(), &settings).await;
        acknowledged.extend(kill_under_load(process, "orders.k", round).await);
    }
    assert!(acknowledged.len() > rounds, "{} were acknowledged", acknowledged.len());
    let process = Process::start(dir.path(), &settings).await;
    let mut client = Client::connect(&process.url()).await.unwrap();
    // Hundreds of rounds leave more than one bridge had the time to drain.
    let until = tokio::time::Instant::now() + PATIENCE * 6;
    for n in 0.. {
        let ack = client.publish("orders.k", &draft(format!("end/0/{n}"))).await.unwrap();
        if ack.status.as_deref() == Some("ok") {
            break;
        }
        assert!(tokio::time::Instant::now() < until, "the spool does not become empty");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let stored = each_once_and_in_order(&mut client, "orders.k").await;
    let lost: Vec<_> = acknowledged.difference(&stored).collect();
    assert!(lost.is_empty(), "{} of {} acknowledged are lost: {lost:?}", lost.len(), acknowledged.len());
}

/// A member of a group that acknowledges four of five, each by itself, until its bridge is gone.
#[derive(Default)]
struct Taken {
    came: BTreeSet<u32>,
    /// Of these the acknowledgement was confirmed.
    done: BTreeSet<u32>,
}

fn is_acknowledged(n: u32) -> bool {
    !n.is_multiple_of(5)
}

async fn take_until_killed(mut client: Client, done_before: BTreeSet<u32>) -> Taken {
    let (mut taken, mut acks) = (Taken::default(), JoinSet::new());
    while let Ok(heard) = client.next().await {
        let Some(delivery) = heard.delivery else { continue };
        let n = String::from_utf8(heard.payload().unwrap()).unwrap().parse().unwrap();
        assert!(!done_before.contains(&n), "{n} is done, and came again");
        taken.came.insert(n);
        if is_acknowledged(n) {
            let sender = client.sender();
            acks.spawn(async move { sender.ack(&[delivery]).await.is_ok().then_some(n) });
        }
    }
    while let Some(acked) = acks.join_next().await {
        taken.done.extend(acked.unwrap());
    }
    taken
}

/// The group joins again and again until the lane is there to join it.
async fn member(process: &Process) -> Client {
    let client = Client::connect(&process.url()).await.unwrap();
    // What nobody acknowledges is held in every round anew.
    let group = json!({"group": "g", "from": "earliest", "prefetch": 10_000});
    eventually("the group is joined", async || client.subscribe("orders.acks", group.clone()).await.is_ok())
        .await;
    client
}

async fn nothing_done_comes_again_and_all_else_does(settings: &[String], pulsar: &str) {
    let dir = tempfile::tempdir().unwrap();
    let routes = format!("[[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\npulsar = \"{pulsar}\"\n");
    std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
    let (mut published, mut next_number) = (BTreeSet::new(), 0);
    let mut taken = Taken::default();
    for _ in 0..rounds() {
        let mut process = Process::start(dir.path(), settings).await;
        let taking = tokio::spawn(take_until_killed(member(&process).await, taken.done.clone()));
        let publisher = Client::connect(&process.url()).await.unwrap();
        let publishing = tokio::spawn(async move {
            let (mut acknowledged, mut under_way, mut n) = (Vec::new(), VecDeque::new(), next_number);
            while let Ok(ack) = publisher.publish_in_line("orders.acks", &draft(n.to_string())).await {
                under_way.push_back((n, ack));
                n += 1;
                // So fast only that what is never acknowledged fits into a prefetch.
                tokio::time::sleep(Duration::from_millis(1)).await;
                if under_way.len() < 64 {
                    continue;
                }
                let Some((oldest, ack)) = under_way.pop_front() else { break };
                match ack.await {
                    Ok(_) => acknowledged.push(oldest),
                    Err(_) => break,
                }
            }
            for (n, ack) in under_way {
                acknowledged.extend(ack.await.is_ok().then_some(n));
            }
            (n + 1, acknowledged)
        });
        // The moment is what the test is about: it has to fall anywhere.
        tokio::time::sleep(Duration::from_millis(fastrand::u64(200..700))).await;
        process.kill().await;
        let (next, acknowledged) = publishing.await.unwrap();
        next_number = next;
        published.extend(acknowledged);
        let Taken { came, done } = taking.await.unwrap();
        taken.came.extend(came);
        taken.done.extend(done);
    }
    assert!(taken.done.len() > 10 * rounds(), "{} were done", taken.done.len());
    // Everything that is not done comes to the next bridge. What was sent to be done just before a kill may be done.
    let process = Process::start(dir.path(), settings).await;
    let mut client = member(&process).await;
    let mut left: BTreeSet<u32> = published.difference(&taken.done).copied().collect();
    left.retain(|n| !is_acknowledged(*n) || !taken.came.contains(n));
    assert!(left.len() > rounds(), "{} are left", left.len());
    while !left.is_empty() {
        let heard = next(&mut client).await;
        if heard.delivery.is_none() {
            continue;
        }
        let n = String::from_utf8(heard.payload().unwrap()).unwrap().parse().unwrap();
        assert!(!taken.done.contains(&n), "{n} is done, and came again");
        left.remove(&n);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_group_acknowledges_with_the_embedded_log() {
    nothing_done_comes_again_and_all_else_does(&[], "persistent://public/default/{topic}").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_group_acknowledges_with_pulsar() {
    if left_out() {
        return;
    }
    let (settings, own) = on_pulsar().await;
    let pulsar = format!("persistent://public/default/a{own}.{{topic}}");
    nothing_done_comes_again_and_all_else_does(&settings, &pulsar).await;
}
