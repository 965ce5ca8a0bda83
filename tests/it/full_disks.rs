//! A disk that is full under a bridge: refused by name, told, and over without a restart once there is room.

use serde_json::json;
use twinspan::client::Client;

use crate::brokers::left_out;
use crate::harness::{answer, draft, eventually, http_client, next, next_payload, nothing, refused};
use crate::process::Process;
use crate::proxy::Proxy;

const ROUTES: &str = r#"
    [[route]]
    topic = "live.>"
    lane = "ephemeral"

    [[route]]
    topic = "orders.>"
    lane = "durable"

    [[route]]
    topic = "spools.>"
    lane = "durable"
    outage = "spool"
    pulsar = "persistent://public/default/full-disk.OWN.{topic}"
"#;

/// A bridge whose files may not grow: what a full disk says, too.
struct Bed {
    process: Process,
    client: Client,
    dir: tempfile::TempDir,
}

impl Bed {
    async fn start(settings: &[String]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let own = twinspan::message::MessageId::new().to_string();
        std::fs::write(dir.path().join("routes.toml"), ROUTES.replace("OWN", &own)).unwrap();
        let process = Process::start(dir.path(), settings).await;
        let client = Client::connect(&process.url()).await.unwrap();
        Self { process, client, dir }
    }

    async fn get(&self, path: &str) -> (u16, serde_json::Value) {
        answer(http_client().get(self.process.http(path)).send().await.unwrap()).await
    }

    /// Has the disk end where this file does.
    fn is_full(&self, file: &str) {
        let size = std::fs::metadata(self.dir.path().join("data").join(file)).unwrap().len();
        self.process.limit_files(Some(size));
    }

    /// Publishes until there is no room, and says how many were taken.
    async fn fill(&self, topic: &str, status: &str) -> usize {
        for n in 0..10_000 {
            match self.client.publish(topic, &draft(payload(n))).await {
                Ok(ack) => assert_eq!(ack.status.as_deref(), Some(status)),
                Err(error) => {
                    assert_eq!(refused::<()>(Err(error)), "STORAGE_FULL");
                    return n;
                }
            }
        }
        panic!("the disk has an end");
    }

    /// The other lane takes no notice.
    async fn ephemeral_goes_on(&self) {
        let mut client = Client::connect(&self.process.url()).await.unwrap();
        client.subscribe("live.a", nothing()).await.unwrap();
        client.publish("live.a", &draft("1")).await.unwrap();
        assert_eq!(next_payload(&mut client).await, "1");
    }

    async fn is_taken_again(&self, topic: &str, n: usize, status: &str) {
        let is_taken = async || {
            let taken = self.client.publish(topic, &draft(payload(n))).await;
            taken.is_ok_and(|ack| ack.status.as_deref() == Some(status))
        };
        eventually("there is room again", is_taken).await;
    }

    /// What a topic holds is what was taken, each once and in order.
    async fn holds(&self, topic: &str, count: usize) {
        let mut client = Client::connect(&self.process.url()).await.unwrap();
        client.subscribe(topic, json!({"from": "earliest"})).await.unwrap();
        for n in 0..count {
            assert_eq!(next_payload(&mut client).await, payload(n));
        }
        assert_eq!(next(&mut client).await.code.as_deref(), Some("REPLAY_DONE"));
    }
}

fn payload(n: usize) -> String {
    format!("\"{n:050000}\"")
}

#[tokio::test]
async fn the_embedded_log_refuses_is_read_and_takes_messages_again_once_there_is_room() {
    let bed = Bed::start(&["server.ready_requires=[\"durable\"]".to_owned()]).await;
    assert_eq!(bed.get("/readyz").await.0, 200);
    bed.client.publish("orders.first", &draft("0")).await.unwrap();
    bed.is_full("journal.redb");
    let taken = bed.fill("orders.a", "ok").await;
    assert!(taken > 0, "there was some room in the file");
    assert_eq!(bed.get("/readyz").await.0, 503);
    let health = bed.get("/health").await.1;
    assert_eq!(health["status"], "degraded", "{health}");
    assert_eq!(health["lanes"]["durable"]["status"], "down", "{health}");
    bed.holds("orders.a", taken).await;
    bed.ephemeral_goes_on().await;

    bed.process.limit_files(None);
    bed.is_taken_again("orders.a", taken, "ok").await;
    eventually("it is ready", async || bed.get("/readyz").await.0 == 200).await;
    bed.holds("orders.a", taken + 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_spool_refuses_and_takes_messages_again_once_there_is_room_and_delivers_what_it_took() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (pulsar, way) = &*proxied;
    let settings = [
        "lanes.durable.backend=pulsar".to_owned(),
        format!("lanes.durable.url={}", way.pulsar_url()),
        format!("lanes.durable.admin_url={}", pulsar.admin_url()),
    ];
    let bed = Bed::start(&settings).await;
    let lane_is = async |status: &str| {
        eventually(&format!("the lane is {status}"), async || {
            bed.get("/health").await.1["lanes"]["durable"]["status"] == status
        })
        .await;
    };
    lane_is("up").await;
    way.refuse();
    way.cut();
    lane_is("down").await;
    bed.is_full("spool/journal.redb");
    let taken = bed.fill("spools.a", "spooled").await;
    assert!(taken > 0, "there was some room in the file");
    bed.ephemeral_goes_on().await;
    assert_eq!(bed.get("/health").await.1["lanes"]["durable"]["outage"]["spool"]["messages"], taken);

    bed.process.limit_files(None);
    bed.is_taken_again("spools.a", taken, "spooled").await;
    way.resume();
    lane_is("up").await;
    eventually("the spool is empty", async || {
        bed.get("/health").await.1["lanes"]["durable"]["outage"]["spool"]["messages"] == 0
    })
    .await;
    bed.holds("spools.a", taken + 1).await;
}
