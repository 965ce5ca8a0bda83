//! A bridge that is killed with SIGKILL under load has lost nothing that it acknowledged.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use twinspan::client::Client;

use crate::brokers::{left_out, shared_pulsar};
use crate::harness::{PATIENCE, draft, eventually, next, soon};

/// A bridge in a process of its own.
struct Process {
    child: Child,
    url: String,
}

impl Process {
    async fn start(dir: &Path, settings: &[String]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_twinspan"));
        command
            .arg("serve")
            .current_dir(dir)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .env("RUST_LOG", "error");
        command.args(["--set", "server.listen=127.0.0.1:0", "--set", "server.admin=127.0.0.1:0"]);
        command.args(["--set", "server.routes=routes.toml"]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = soon(lines.next_line()).await.unwrap().expect("the first line says where it listens");
        let url = first.split_whitespace().find(|word| word.starts_with("ws://")).unwrap().to_owned();
        // What it says further is nobody's concern; the pipe must not fill.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { child, url }
    }

    /// Publishes from four connections at once until the process is killed, after a random while.
    /// Returns what was acknowledged.
    async fn kill_under_load(mut self, topic: &str, round: usize) -> BTreeSet<String> {
        let mut publishers = JoinSet::new();
        for publisher in 0..4 {
            let (client, topic) = (Client::connect(&self.url).await.unwrap(), topic.to_owned());
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
        self.child.kill().await.unwrap();
        let mut acknowledged = BTreeSet::new();
        while let Some(publisher) = publishers.join_next().await {
            acknowledged.extend(publisher.unwrap());
        }
        acknowledged
    }
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
        let client = Client::connect(&process.url).await.unwrap();
        eventually("the durable lane is up", async || client.publish("orders.up", &draft("1")).await.is_ok())
            .await;
        let before_the_kill = process.kill_under_load("orders.k", round).await;
        assert!(!before_the_kill.is_empty(), "something was acknowledged before the kill");
        acknowledged.extend(before_the_kill);
    }
    let process = Process::start(dir.path(), settings).await;
    let mut client = Client::connect(&process.url).await.unwrap();
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
        acknowledged.extend(process.kill_under_load("orders.k", round).await);
    }
    assert!(acknowledged.len() > rounds, "{} were acknowledged", acknowledged.len());
    let process = Process::start(dir.path(), &settings).await;
    let mut client = Client::connect(&process.url).await.unwrap();
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
