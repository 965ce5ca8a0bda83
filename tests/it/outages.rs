//! What clients see while a broker is away.

use std::time::{Duration, Instant};

use serde_json::json;
use twinspan::client::Client;
use twinspan::config::server::ReadyRequires;
use twinspan::message::{Lane, MessageId};

use crate::brokers::{Broker, Options, left_out};
use crate::harness::{Plan, Span, draft, eventually, next, next_payload, nothing, refused};
use crate::process::Process;
use crate::proxy::Proxy;

const NOTICED_WITHIN: Duration = Duration::from_secs(3);
const HEALED_WITHIN: Duration = Duration::from_secs(5);

/// What becomes of a broker.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// Its process stops; the sockets stay open.
    Frozen,
    /// Packets vanish.
    OutOfReach,
    Killed,
}

/// A lane whose broker is behind a network that does as it is told.
struct Bed {
    lane: Lane,
    broker: Broker,
    proxy: Proxy,
    span: Span,
    /// A topic of this lane, and one of the other.
    topic: &'static str,
    other: &'static str,
}

impl Bed {
    async fn nats() -> Self {
        let (broker, proxy) = (Broker::nats(&Options::default()).await, Proxy::start());
        proxy.lead_to(broker.port());
        let mut plan = Plan::default();
        plan.ephemeral_on(format!("nats://127.0.0.1:{}", proxy.port()));
        Self::on(Lane::Ephemeral, broker, proxy, plan, ["telemetry.a", "orders.a"]).await
    }

    async fn pulsar() -> Self {
        let (broker, proxy) = Proxy::pulsar(Options::default()).await;
        let mut plan = Plan::default();
        plan.durable_on(proxy.pulsar_url(), &broker);
        Self::on(Lane::Durable, broker, proxy, plan, ["orders.a", "telemetry.a"]).await
    }

    async fn on(lane: Lane, broker: Broker, proxy: Proxy, mut plan: Plan, topics: [&'static str; 2]) -> Self {
        plan.settings.server.ready_requires = ReadyRequires::Lanes(vec![lane]);
        let [topic, other] = topics;
        Self { lane, broker, proxy, span: Span::with(plan).await, topic, other }
    }

    fn hurt(&mut self, fault: Fault) {
        match fault {
            Fault::Frozen => self.broker.stop(),
            Fault::OutOfReach => self.proxy.hold(),
            Fault::Killed => self.broker.kill(),
        }
    }

    /// Returns once it may be reached, and answers.
    async fn heal(&mut self, fault: Fault) {
        match fault {
            Fault::Frozen => self.broker.cont(),
            Fault::OutOfReach => {
                // What the way holds back is lost, and does not arrive late.
                self.proxy.cut();
                self.proxy.resume();
            }
            Fault::Killed => self.broker.restart().await,
        }
    }

    async fn status(&self) -> serde_json::Value {
        self.span.get("/health").await.1["lanes"][self.lane.as_str()]["status"].clone()
    }

    fn is_up(&self) -> f64 {
        self.span.metric(&format!("twinspan_lane_up{{lane=\"{}\"}}", self.lane))
    }

    /// A message crosses, and nothing else comes before it.
    async fn crosses(&self, client: &mut Client, topic: &str) {
        let payload = format!("\"{}\"", MessageId::new());
        client.publish(topic, &draft(payload.clone())).await.unwrap();
        assert_eq!(next_payload(client).await, payload);
    }

    async fn survives(&mut self, fault: Fault) {
        let (mut client, mut bystander) = (self.span.client().await, self.span.client().await);
        client.subscribe(self.topic, nothing()).await.unwrap();
        bystander.subscribe(self.other, nothing()).await.unwrap();
        self.crosses(&mut client, self.topic).await;
        assert_eq!((self.span.get("/readyz").await.0, self.is_up()), (200, 1.0));

        let since = Instant::now();
        self.hurt(fault);
        let told = next(&mut client).await;
        let noticed = since.elapsed();
        assert_eq!(
            (told.code.as_deref(), told.lane.as_deref()),
            (Some("LANE_DOWN"), Some(self.lane.as_str())),
            "{fault:?}: {told:?}"
        );
        assert!(noticed < NOTICED_WITHIN, "{fault:?} is noticed after {noticed:?}");
        assert_eq!(self.span.get("/readyz").await.0, 503, "{fault:?}");
        assert_eq!((self.status().await, self.is_up()), (json!("down"), 0.0), "{fault:?}");
        for _ in 0..20 {
            let asked = Instant::now();
            assert_eq!(refused(client.publish(self.topic, &draft("0")).await), "LANE_UNAVAILABLE");
            assert!(asked.elapsed() < Duration::from_millis(100), "{fault:?}: {:?}", asked.elapsed());
        }
        self.crosses(&mut bystander, self.other).await;

        if fault == Fault::Frozen {
            // So long that the connection is given up.
            tokio::time::sleep(NOTICED_WITHIN).await;
        }
        self.heal(fault).await;
        let since = Instant::now();
        eventually("it is ready again", async || self.span.get("/readyz").await.0 == 200).await;
        let healed = since.elapsed();
        assert!(healed < HEALED_WITHIN, "{fault:?} is over after {healed:?}");
        assert_eq!((self.status().await, self.is_up()), (json!("up"), 1.0), "{fault:?}");
        // What is live has a hole, what is stored goes on where it stood.
        let mut expected = match self.lane {
            Lane::Ephemeral => vec!["LANE_UP", "outage"],
            Lane::Durable => vec!["LANE_UP"],
        };
        while !expected.is_empty() {
            let told = next(&mut client).await;
            assert_eq!(told.dropped, None, "{fault:?}: {told:?}");
            let what = told.code.as_deref().or(told.reason.as_deref());
            let at = expected.iter().position(|expected| Some(*expected) == what);
            expected.remove(at.unwrap_or_else(|| panic!("{fault:?}: {told:?}")));
        }
        self.crosses(&mut client, self.topic).await;
        self.crosses(&mut bystander, self.other).await;
        println!("{} {fault:?}: noticed after {noticed:?}, healed after {healed:?}", self.lane);
    }
}

/// Whatever becomes of a broker, clients, health and metrics say so within three seconds, and within five that it is
/// over; meanwhile the lane refuses at once, and the other takes no notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nats_that_freezes_or_cannot_be_reached_or_is_killed_is_told_and_so_is_its_return() {
    if left_out() {
        return;
    }
    let mut bed = Bed::nats().await;
    for fault in [Fault::Frozen, Fault::OutOfReach, Fault::Killed] {
        bed.survives(fault).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pulsar_that_freezes_or_cannot_be_reached_or_is_killed_is_told_and_so_is_its_return() {
    if left_out() {
        return;
    }
    let mut bed = Bed::pulsar().await;
    for fault in [Fault::Frozen, Fault::OutOfReach, Fault::Killed] {
        bed.survives(fault).await;
    }
}

/// Where packets vanish and nobody ever says so, a connection is given up because nothing comes by it: TCP would take a
/// quarter of an hour.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_are_dead_and_do_not_say_so_are_replaced() {
    if left_out() {
        return;
    }
    let (nats, pulsar) = tokio::join!(Bed::nats(), Bed::pulsar());
    for (bed, within) in [(nats, Duration::from_secs(6)), (pulsar, Duration::from_secs(15))] {
        let mut client = bed.span.client().await;
        client.subscribe(bed.topic, nothing()).await.unwrap();
        bed.crosses(&mut client, bed.topic).await;

        let since = Instant::now();
        bed.proxy.lose();
        assert_eq!(next(&mut client).await.code.as_deref(), Some("LANE_DOWN"));
        assert!(since.elapsed() < NOTICED_WITHIN, "{:?}", since.elapsed());
        // The publisher's connection and the subscriber's are two on Pulsar, and each is replaced for itself.
        loop {
            let _ = client.publish(bed.topic, &draft("1")).await;
            let came = tokio::time::timeout(Duration::from_millis(50), client.next()).await;
            if came.is_ok_and(|heard| heard.unwrap().kind == "event") {
                break;
            }
            assert!(since.elapsed() < within, "{}: nothing {:?} after", bed.lane, since.elapsed());
        }
        println!("{}: replaced after {:?}", bed.lane, since.elapsed());
    }
}

#[tokio::test]
async fn a_killed_nats_is_announced_refused_at_once_and_the_hole_is_a_gap() {
    if left_out() {
        return;
    }
    let mut nats = Broker::nats(&Options::default()).await;
    let mut plan = Plan::default();
    plan.ephemeral_on(nats.url());
    plan.settings.server.ready_requires = ReadyRequires::Lanes(vec![Lane::Ephemeral]);
    let span = Span::with(plan).await;
    let mut client = span.client().await;
    let mut durable = span.client().await;
    client.subscribe("telemetry.>", nothing()).await.unwrap();
    durable.subscribe("orders.o", nothing()).await.unwrap();
    client.publish("telemetry.o", &draft("1")).await.unwrap();
    assert_eq!(next_payload(&mut client).await, "1");
    assert_eq!(span.get("/readyz").await.0, 200);

    nats.kill();
    let down = next(&mut client).await;
    assert_eq!((down.code.as_deref(), down.lane.as_deref()), (Some("LANE_DOWN"), Some("ephemeral")));
    let asked = Instant::now();
    assert_eq!(refused(client.publish("telemetry.o", &draft("2")).await), "LANE_UNAVAILABLE");
    assert_eq!(refused(client.subscribe("telemetry.new", nothing()).await), "LANE_UNAVAILABLE");
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert_eq!(span.get("/readyz").await.0, 503);
    let (status, health) = span.get("/health").await;
    assert_eq!((status, &health["status"]), (200, &json!("degraded")));
    assert_eq!(span.metric(r#"twinspan_lane_up{lane="ephemeral"}"#), 0.0);
    // The other lane takes no notice.
    durable.publish("orders.o", &draft("3")).await.unwrap();
    assert_eq!(next_payload(&mut durable).await, "3");

    nats.restart().await;
    let mut told = Vec::new();
    while told.len() < 2 {
        let frame = next(&mut client).await;
        match frame.kind.as_str() {
            "gap" => {
                assert_eq!((frame.reason.as_deref(), frame.dropped), (Some("outage"), None));
                told.push("gap");
            }
            _ => {
                assert_eq!(
                    (frame.code.as_deref(), frame.lane.as_deref()),
                    (Some("LANE_UP"), Some("ephemeral"))
                );
                told.push("up");
            }
        }
    }
    eventually("messages flow again", async || client.publish("telemetry.o", &draft("4")).await.is_ok())
        .await;
    assert_eq!(next_payload(&mut client).await, "4");
    assert_eq!(span.get("/readyz").await.0, 200);
}

/// What a storm may take of one processor, in a build that is not optimized, and how often a second both lanes may try to
/// connect. A loop without a pause takes all it gets, and tries thousands of times.
const STORM_PROCESSOR: f64 = 0.2;
const STORM_ATTEMPTS: f64 = 100.0;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_break_all_the_time_cost_a_bridge_little_and_leave_nothing_open() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (pulsar, to_pulsar) = &*proxied;
    let (nats, to_nats) = (Broker::nats(&Options::default()).await, Proxy::start());
    to_nats.lead_to(nats.port());
    let (dir, own) = (tempfile::tempdir().unwrap(), MessageId::new());
    let routes = format!(
        "[[route]]\ntopic = \"telemetry.>\"\nlane = \"ephemeral\"\n\n\
         [[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\n\
         pulsar = \"persistent://public/default/storm.{own}.{{topic}}\"\n"
    );
    std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
    let settings = [
        "lanes.ephemeral.backend=nats".to_owned(),
        format!("lanes.ephemeral.url=nats://127.0.0.1:{}", to_nats.port()),
        "lanes.durable.backend=pulsar".to_owned(),
        format!("lanes.durable.url={}", to_pulsar.pulsar_url()),
        format!("lanes.durable.admin_url={}", pulsar.admin_url()),
    ];
    let process = Process::start(dir.path(), &settings).await;
    let mut client = Client::connect(&process.url()).await.unwrap();
    let topics = ["telemetry.a", "orders.a"];
    let crosses = async |client: &Client, topic: &str| {
        let taken = async || client.publish(topic, &draft("1")).await.is_ok();
        eventually(&format!("`{topic}` can be published to"), taken).await;
    };
    for topic in topics {
        let taken = async || client.subscribe(topic, nothing()).await.is_ok();
        eventually(&format!("`{topic}` can be subscribed to"), taken).await;
        crosses(&client, topic).await;
        // A lane that has just come up may still be told.
        while next(&mut client).await.kind != "event" {}
    }

    let before = process.takes().unwrap();
    let mut most = before.descriptors;
    for storm in ["reset", "closed at once", "refused"] {
        let (begun, began) = (Instant::now(), process.takes().unwrap());
        let connected = to_nats.accepted() + to_pulsar.accepted();
        match storm {
            "reset" => {}
            "closed at once" => [&to_nats, to_pulsar].into_iter().for_each(Proxy::accept_then_close),
            _ => [&to_nats, to_pulsar].into_iter().for_each(Proxy::refuse),
        }
        while begun.elapsed() < Duration::from_secs(4) {
            to_nats.cut();
            to_pulsar.cut();
            tokio::time::sleep(Duration::from_millis(200)).await;
            most = most.max(process.takes().unwrap().descriptors);
        }
        let seconds = begun.elapsed().as_secs_f64();
        let share = (process.takes().unwrap().processor - began.processor) / seconds;
        let attempts = (to_nats.accepted() + to_pulsar.accepted() - connected) as f64 / seconds;
        println!("{storm}: {:.1} % of a processor, {attempts:.0} attempts a second", 100.0 * share);
        assert!(share < STORM_PROCESSOR, "{storm}: {:.1} % of a processor", 100.0 * share);
        assert!(attempts < STORM_ATTEMPTS, "{storm}: {attempts:.0} attempts a second");
    }
    to_nats.resume();
    to_pulsar.resume();
    let healed = Instant::now();
    for topic in topics {
        crosses(&client, topic).await;
    }
    assert!(healed.elapsed() < HEALED_WITHIN, "{:?}", healed.elapsed());
    println!("{} descriptors before, at most {most}", before.descriptors);
    assert!(most < before.descriptors + 16, "{} descriptors before, {most} in the storm", before.descriptors);
    eventually("no descriptor is left open", async || {
        process.takes().unwrap().descriptors <= before.descriptors + 2
    })
    .await;
}
