//! A wall clock that is set, by an hour in either direction, while the bridge runs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tokio::time::Instant;
use twinspan::client::Client;
use twinspan::message::Timestamp;
use twinspan::wire::json::heard::Heard;

use crate::harness::{draft, next};
use crate::process::Process;

const HOUR: i64 = 3600;

/// The wall clock of a process that is started with it.
struct Clock {
    ahead: PathBuf,
    library: PathBuf,
}

impl Clock {
    fn in_dir(dir: &Path) -> Self {
        let (library, source) = (dir.join("clock.so"), dir.join("clock.c"));
        std::fs::write(&source, include_str!("clock.c")).unwrap();
        let compiler = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .arg(&library)
            .arg(&source)
            .status()
            .expect("there is a C compiler, as Rust needs one to link");
        assert!(compiler.success());
        let clock = Self { ahead: dir.join("ahead"), library };
        clock.is_ahead(0);
        clock
    }

    fn is_ahead(&self, seconds: i64) {
        // In place: the process has this very file in its memory.
        let file =
            std::fs::File::options().write(true).create(true).truncate(false).open(&self.ahead).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &seconds.to_ne_bytes(), 0).unwrap();
    }

    fn environment(&self) -> [(&str, &Path); 2] {
        [("LD_PRELOAD", &self.library), ("CLOCK_AHEAD", &self.ahead)]
    }
}

/// Publishes the next so many numbers; returns their ids, in this order, and checks what time the bridge says it is.
async fn publish(client: &Client, numbers: std::ops::Range<usize>, ahead: i64) -> Vec<String> {
    let mut ids = Vec::new();
    for n in numbers {
        let before = Timestamp::now().as_millis();
        let ack = client.publish("audit.a", &draft(n.to_string())).await.unwrap();
        let off = ack.ts.parse::<Timestamp>().unwrap().as_millis() - before - ahead * 1000;
        assert!((0..60_000).contains(&off), "the bridge's clock is set: {off} ms off");
        ids.push(ack.message_id.unwrap());
    }
    ids
}

async fn event(client: &mut Client) -> Heard {
    let heard = next(client).await;
    assert_eq!(heard.kind, "event", "{heard:?}");
    heard
}

#[tokio::test]
async fn a_wall_clock_that_is_set_turns_no_order_ends_no_wait_and_makes_nothing_old() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Clock::in_dir(dir.path());
    let routes = r#"
        [[route]]
        topic = "audit.>"
        lane = "durable"
        retention = { age = "30m" }

        [[route]]
        topic = "timed.>"
        lane = "durable"
        ack_timeout = "2s"
    "#;
    std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
    let process = Process::start_with(dir.path(), &[], &clock.environment()).await;
    let (client, mut subscriber) =
        (Client::connect(&process.url()).await.unwrap(), Client::connect(&process.url()).await.unwrap());
    subscriber.subscribe("audit.a", json!({})).await.unwrap();
    let mut holder = Client::connect(&process.url()).await.unwrap();
    holder.subscribe("timed.a", json!({"group": "g", "prefetch": 1})).await.unwrap();

    let mut ids = Vec::new();
    for (round, ahead) in [0, HOUR, -HOUR, 0].into_iter().enumerate() {
        client.publish("timed.a", &draft("0")).await.unwrap();
        let held = event(&mut holder).await;
        let since = Instant::now();
        clock.is_ahead(ahead);
        // What may be held for two seconds is held for two seconds.
        let again = event(&mut holder).await;
        assert!(since.elapsed() > Duration::from_millis(1500), "{ahead}: {:?}", since.elapsed());
        assert_eq!((held.attempt, again.attempt), (Some(1), Some(2)));
        holder.ack(&[again.delivery.unwrap()]).await.unwrap();
        ids.extend(publish(&client, round * 50..(round + 1) * 50, ahead).await);
    }
    let mut sorted = ids.clone();
    sorted.sort();
    sorted.dedup();
    assert_eq!(ids, sorted, "each id is greater than the one before");
    // Retention has looked at least once a second, with the clock an hour ahead too.
    subscriber.subscribe("audit.*", json!({"from": "earliest"})).await.unwrap();
    let mut stored = Vec::new();
    loop {
        let heard = next(&mut subscriber).await;
        match (heard.kind.as_str(), heard.subscription.as_deref()) {
            ("event", Some("audit.*")) => stored.push(heard.payload().unwrap()),
            ("info", _) => break,
            _ => {}
        }
    }
    let all: Vec<_> = (0..200).map(|n| n.to_string().into_bytes()).collect();
    assert_eq!(stored, all, "nothing was removed, and all is in its order");
}
