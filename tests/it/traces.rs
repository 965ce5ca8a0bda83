//! Which trace a message belongs to crosses with it, and what this bridge does with a message that is traced is told to
//! a collector: nothing else is, and nothing waits for that.

use std::time::Duration;

use serde_json::json;
use twinspan::client::Client;
use twinspan::message::{Draft, MessageId};
use twinspan::wire::json::heard::Heard;

use crate::harness::{Span, answer, draft, http_client, next, nothing, on_both_kinds, soon};

on_both_kinds!(what_a_publisher_says_of_its_trace_crosses_as_it_came);

/// The header's value for a new trace: with it, the trace.
fn traceparent(flags: &str) -> (String, String) {
    let trace = MessageId::new().to_string().replace('-', "");
    (format!("00-{trace}-00f067aa0ba902b7-{flags}"), trace)
}

fn with(traceparent: &str, draft: Draft) -> Draft {
    let headers = [("traceparent", traceparent), ("tracestate", "vendor=opaque"), ("other", "1")];
    Draft { headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).into(), ..draft }
}

/// The next event; of a topic that is sent live first there are checkpoints between them.
async fn event(client: &mut Client) -> Heard {
    loop {
        let heard = next(client).await;
        if heard.kind != "checkpoint" {
            assert_eq!(heard.kind, "event", "{heard:?}");
            return heard;
        }
    }
}

async fn what_a_publisher_says_of_its_trace_crosses_as_it_came(span: Span) {
    let mut subscriber = span.client().await;
    let topics = ["telemetry.t", "orders.t", "both.t", "first.t"];
    for topic in topics {
        subscriber.subscribe(topic, nothing()).await.unwrap();
    }
    let (mut member, mut server, publisher) = (span.client().await, span.client().await, span.client().await);
    member.subscribe("jobs.t", json!({"group": "g"})).await.unwrap();
    server.subscribe("svc.t", nothing()).await.unwrap();
    let said = [
        traceparent("01").0,
        traceparent("00").0,
        format!("cc-{}-what-may-come", &traceparent("01").0[3..]),
        "00-NOT-a-trace-01".to_owned(),
        "anything at all".to_owned(),
    ];
    for said in said {
        let traced = |payload: &str| with(&said, draft(payload));
        let check = |heard: Heard| {
            let message = heard.message().unwrap();
            assert_eq!(message.headers, traced("").headers, "{said}: {heard:?}");
            heard
        };
        for topic in topics {
            publisher.publish(topic, &traced("1")).await.unwrap();
            check(event(&mut subscriber).await);
            let message = json!({"payload": 2, "headers": traced("").headers});
            let list =
                json!({"type": "publish", "topic": topic, "confirm": false, "messages": [message, message]});
            publisher.send(list.to_string()).await.unwrap();
            check(event(&mut subscriber).await);
            check(event(&mut subscriber).await);
            let request = http_client().post(span.http(&format!("/publish/{topic}"))).body("4");
            let request = request.header("traceparent", &said).header("tracestate", "vendor=opaque");
            assert_eq!(answer(request.send().await.unwrap()).await.0, 200);
            let headers = event(&mut subscriber).await.message().unwrap().headers;
            assert_eq!((&headers["traceparent"], &*headers["tracestate"]), (&said, "vendor=opaque"));
        }
        publisher.publish("jobs.t", &traced("5")).await.unwrap();
        let delivery = check(event(&mut member).await).delivery.unwrap();
        member.ack(&[delivery]).await.unwrap();
        let asking = {
            let (sender, asked) = (publisher.sender(), traced("6"));
            tokio::spawn(async move { sender.request("svc.t", &asked, Duration::from_secs(10)).await })
        };
        let reply_to = check(event(&mut server).await).reply_to.unwrap();
        server.reply(&reply_to, &traced("7")).await.unwrap();
        check(soon(asking).await.unwrap().unwrap());
    }
}

#[cfg(feature = "otel")]
mod export {
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::sync::{Arc, Mutex};
    use std::time::Instant;

    use axum::Router;
    use axum::body::Bytes;
    use axum::http::StatusCode;
    use axum::routing::post;
    use prost::Message;
    use tokio::net::TcpListener;
    use twinspan::message::Lane;
    use twinspan::telemetry::trace::TraceSettings;

    use super::*;
    use crate::brokers::{Broker, Options};
    use crate::harness::{Plan, eventually, refused};
    use crate::process::Process;

    /// What OTLP says of these, as far as it is looked at.
    #[derive(Clone, PartialEq, Message)]
    struct Request {
        #[prost(message, repeated, tag = "1")]
        resources: Vec<Resources>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Resources {
        #[prost(message, optional, tag = "1")]
        resource: Option<Resource>,
        #[prost(message, repeated, tag = "2")]
        scopes: Vec<Scope>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Resource {
        #[prost(message, repeated, tag = "1")]
        attributes: Vec<Attribute>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Scope {
        #[prost(message, repeated, tag = "2")]
        spans: Vec<Exported>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Exported {
        #[prost(bytes = "vec", tag = "1")]
        trace: Vec<u8>,
        #[prost(bytes = "vec", tag = "2")]
        id: Vec<u8>,
        #[prost(bytes = "vec", tag = "4")]
        parent: Vec<u8>,
        #[prost(string, tag = "5")]
        name: String,
        #[prost(int32, tag = "6")]
        kind: i32,
        #[prost(fixed64, tag = "7")]
        from: u64,
        #[prost(fixed64, tag = "8")]
        to: u64,
        #[prost(message, repeated, tag = "9")]
        attributes: Vec<Attribute>,
        #[prost(message, optional, tag = "15")]
        status: Option<Status>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Status {
        #[prost(int32, tag = "3")]
        code: i32,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Attribute {
        #[prost(string, tag = "1")]
        key: String,
        #[prost(message, optional, tag = "2")]
        value: Option<Value>,
    }

    #[derive(Clone, PartialEq, Message)]
    struct Value {
        #[prost(string, tag = "1")]
        text: String,
    }

    const INTERNAL: i32 = 1;
    const SERVER: i32 = 2;
    const CLIENT: i32 = 3;
    const CONSUMER: i32 = 5;

    fn map(attributes: &[Attribute]) -> BTreeMap<String, String> {
        let text = |a: &Attribute| (a.key.clone(), a.value.clone().unwrap_or_default().text);
        attributes.iter().map(text).collect()
    }

    impl Exported {
        fn about(&self) -> BTreeMap<String, String> {
            map(&self.attributes)
        }

        fn has_failed(&self) -> bool {
            self.status.as_ref().is_some_and(|status| status.code == 2)
        }
    }
    struct Collector {
        url: String,
        got: Arc<Mutex<Vec<Request>>>,
    }

    impl Collector {
        /// Answers each request with this status; without one, never.
        async fn start(status: Option<StatusCode>) -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let got = Arc::<Mutex<Vec<Request>>>::default();
            let heard = got.clone();
            let hear = post(async move |body: Bytes| {
                heard.lock().unwrap().push(Request::decode(body).unwrap());
                match status {
                    Some(status) => status,
                    None => std::future::pending().await,
                }
            });
            let router = Router::new().route("/v1/traces", hear);
            tokio::spawn(async move { axum::serve(listener, router).await });
            Self { url, got }
        }

        fn requests(&self) -> usize {
            self.got.lock().unwrap().len()
        }

        fn resources(&self) -> Vec<BTreeMap<String, String>> {
            let got = self.got.lock().unwrap();
            let resources = got.iter().flat_map(|request| &request.resources);
            resources.map(|of| map(&of.resource.as_ref().unwrap().attributes)).collect()
        }

        /// What it was told of this trace, by name.
        fn told(&self, trace: &str) -> BTreeMap<String, Vec<Exported>> {
            let got = self.got.lock().unwrap();
            let scopes = got.iter().flat_map(|request| &request.resources).flat_map(|of| &of.scopes);
            let mut told = BTreeMap::<_, Vec<_>>::new();
            for span in scopes.flat_map(|scope| &scope.spans).filter(|span| hex(&span.trace) == trace) {
                told.entry(span.name.clone()).or_default().push(span.clone());
            }
            told
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// How many of each name there are.
    fn counts(told: &BTreeMap<String, Vec<Exported>>) -> BTreeMap<&str, usize> {
        told.iter().map(|(name, spans)| (name.as_str(), spans.len())).collect()
    }

    async fn tracing(mut plan: Plan, collector: &Collector) -> Span {
        plan.settings.trace = TraceSettings { otlp: Some(collector.url.clone()) };
        Span::with(plan).await
    }

    /// A message that was published with this trace and written to so many clients, and what is to be told of it.
    struct Sent {
        topic: String,
        trace: String,
        clients: usize,
        group: Option<&'static str>,
        id: String,
    }

    /// The spans of a publish fit into each other and together.
    fn fits(told: &BTreeMap<String, Vec<Exported>>, sent: &Sent, way: [&str; 3]) {
        let [lane, pattern, system] = way;
        let [publish, read, route, broker] =
            ["publish", "read", "route", "broker"].map(|name| &told[name][0]);
        assert_eq!(hex(&publish.parent), "00f067aa0ba902b7");
        assert_eq!([publish.kind, read.kind, route.kind, broker.kind], [SERVER, INTERNAL, INTERNAL, CLIENT]);
        assert!([read, route, broker].iter().all(|stage| stage.parent == publish.id));
        let instants =
            [publish.from, read.from, read.to, route.from, route.to, broker.from, broker.to, publish.to];
        let [a, b, c, d, e] = [publish.from, read.to, route.to, broker.to, publish.to];
        assert_eq!(instants, [a, a, b, b, c, c, d, e]);
        assert!(a <= b && b <= c && c <= d && d == e && a > 0, "{instants:?}");
        for span in [publish, broker] {
            let about = span.about();
            let expected = [
                ("messaging.system", system),
                ("messaging.operation.name", "publish"),
                ("messaging.operation.type", "send"),
                ("messaging.destination.name", &*sent.topic),
                ("messaging.destination.template", pattern),
                ("messaging.message.id", &*sent.id),
                ("twinspan.lane", lane),
                ("twinspan.status", "ok"),
            ];
            assert_eq!(about, expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        }
        for (fan_out, write) in told["fan-out"].iter().zip(&told["write"]) {
            assert_eq!((hex(&fan_out.parent).as_str(), fan_out.kind), ("00f067aa0ba902b7", CONSUMER));
            let about = fan_out.about();
            assert_eq!(about["messaging.operation.name"], "deliver");
            assert_eq!(about["messaging.operation.type"], "process");
            assert_eq!(about["messaging.destination.name"], sent.topic);
            assert_eq!(about["messaging.destination.template"], pattern);
            assert_eq!(about["messaging.message.id"], sent.id);
            assert_eq!(about["twinspan.lane"], lane);
            assert_eq!(about.get("messaging.consumer.group.name").map(String::as_str), sent.group);
            if sent.topic != "first.t" {
                assert_eq!(about["messaging.system"], system);
            }
            assert_eq!((&write.parent, write.kind), (&fan_out.id, INTERNAL));
            assert!(fan_out.from <= write.from && write.from <= write.to && write.to == fan_out.to);
        }
        let connections: std::collections::BTreeSet<_> =
            told["fan-out"].iter().map(|fan_out| fan_out.about()["twinspan.connection"].clone()).collect();
        assert_eq!(connections.len(), sent.clients);
        assert!(told.values().flatten().all(|span| !span.has_failed()));
    }

    async fn every_stage_is_told(plan: Plan, [live, stored]: [&str; 2]) {
        let collector = Collector::start(Some(StatusCode::OK)).await;
        let span = tracing(plan, &collector).await;
        let (mut alice, mut bob) = (span.client().await, span.client().await);
        let (mut member, publisher) = (span.client().await, span.client().await);
        let topics = ["telemetry.t", "orders.t", "both.t", "first.t"];
        for client in [&alice, &bob] {
            for topic in topics {
                client.subscribe(topic, nothing()).await.unwrap();
            }
        }
        member.subscribe("jobs.t", json!({"group": "g"})).await.unwrap();
        let mut all = Vec::new();
        let mut sent = |topic: &str, trace: String, id: Option<String>| {
            let (clients, group) = if topic == "jobs.t" { (1, Some("g")) } else { (2, None) };
            all.push(Sent { topic: topic.into(), trace, clients, group, id: id.unwrap() });
        };
        for topic in topics.into_iter().chain(["jobs.t"]) {
            let (header, trace) = traceparent("01");
            let ack = publisher.publish(topic, &with(&header, draft("1"))).await.unwrap();
            sent(topic, trace, ack.message_id);
            // Whatever comes in one turn, or in one frame, is traced one by one.
            let three = [(); 3].map(|()| traceparent("01"));
            let mut answers = Vec::new();
            for (header, _) in &three {
                let draft = with(header, draft("2"));
                answers.push(publisher.publish_in_line(topic, &draft).await.unwrap());
            }
            for (answer, (_, trace)) in answers.into_iter().zip(three) {
                sent(topic, trace, soon(answer).await.unwrap().message_id);
            }
            let two = [(); 2].map(|()| (traceparent("01"), MessageId::new().to_string()));
            let message =
                |((header, _), id): &_| json!({"payload": 3, "id": id, "headers": {"traceparent": header}});
            let messages: Vec<_> = two.iter().map(message).collect();
            let list = json!({"type": "publish", "topic": topic, "confirm": false, "messages": messages});
            publisher.send(list.to_string()).await.unwrap();
            two.into_iter().for_each(|((_, trace), id)| sent(topic, trace, Some(id)));
            let (header, trace) = traceparent("01");
            let request = http_client().post(span.http(&format!("/publish/{topic}"))).body("4");
            let request = request.header("traceparent", &header).send();
            let (_, ack) = answer(request.await.unwrap()).await;
            sent(topic, trace, ack["message_id"].as_str().map(str::to_owned));
            for _ in 0..7 {
                match topic {
                    "jobs.t" => _ = event(&mut member).await,
                    _ => _ = (event(&mut alice).await, event(&mut bob).await),
                }
            }
        }
        span.stop().await;
        for sent in &all {
            let told = collector.told(&sent.trace);
            let clients = sent.clients;
            let expected = [
                ("broker", 1),
                ("fan-out", clients),
                ("publish", 1),
                ("read", 1),
                ("route", 1),
                ("write", clients),
            ];
            assert_eq!(counts(&told), expected.into(), "{}", sent.topic);
            let way = match sent.topic.split_once('.').unwrap().0 {
                "telemetry" => ["ephemeral", "telemetry.>", live],
                "orders" => ["durable", "orders.>", stored],
                "jobs" => ["durable", "jobs.>", stored],
                "both" => ["both", "both.>", stored],
                _ => ["both", "first.>", stored],
            };
            fits(&told, sent, way);
        }
        for resource in collector.resources() {
            assert_eq!(resource["service.name"], "twinspan");
            assert_eq!(resource["service.version"], env!("CARGO_PKG_VERSION"));
        }
    }

    #[tokio::test]
    async fn every_stage_of_a_traced_message_is_told() {
        every_stage_is_told(Plan::default(), ["twinspan", "twinspan"]).await;
    }

    #[tokio::test]
    async fn every_stage_of_a_traced_message_is_told_on_brokers() {
        if let Some(plan) = Plan::on_brokers().await {
            every_stage_is_told(plan, ["nats", "pulsar"]).await;
        }
    }

    #[tokio::test]
    async fn of_what_nobody_records_nothing_is_told() {
        let collector = Collector::start(Some(StatusCode::OK)).await;
        let span = tracing(Plan::default(), &collector).await;
        let (mut subscriber, publisher) = (span.client().await, span.client().await);
        let (unrecorded, invalid) = (traceparent("00").0, traceparent("01").0.to_uppercase());
        for topic in ["telemetry.t", "orders.t", "both.t", "first.t"] {
            subscriber.subscribe(topic, nothing()).await.unwrap();
            let drafts = [&unrecorded, &invalid].map(|header| with(header, draft("1")));
            for draft in drafts.iter().chain([&draft("1")]) {
                publisher.publish(topic, draft).await.unwrap();
                event(&mut subscriber).await;
            }
        }
        span.stop().await;
        assert_eq!(collector.requests(), 0);
    }

    #[tokio::test]
    async fn what_was_refused_is_told_with_its_code_and_a_duplicate_came_to_no_lane() {
        let collector = Collector::start(Some(StatusCode::OK)).await;
        let span = tracing(Plan::default(), &collector).await;
        let mut publisher = span.client().await;
        let mut traces = Vec::new();
        for (topic, code) in
            [("nowhere", "NO_ROUTE"), ("declared.t", "TOPIC_NOT_FOUND"), ("telemetry.t", "LANE_MISMATCH")]
        {
            let (header, trace) = traceparent("01");
            let message = json!({"payload": 1, "delay_ms": 1000, "headers": {"traceparent": header}});
            let frame = json!({"type": "publish", "topic": topic, "message": message});
            publisher.send(frame.to_string()).await.unwrap();
            assert_eq!(next(&mut publisher).await.error.unwrap().code, code);
            traces.push((trace, code));
        }
        let once = Draft { id: Some(MessageId::new()), ..draft("1") };
        let [first, again] = [(); 2].map(|()| traceparent("01"));
        for (header, _) in [&first, &again] {
            publisher.publish("orders.t", &with(header, once.clone())).await.unwrap();
        }
        span.stop().await;
        for (trace, code) in traces {
            let told = collector.told(&trace);
            assert_eq!(counts(&told), [("publish", 1), ("read", 1), ("route", 1)].into(), "{code}");
            for name in ["publish", "route"] {
                assert!(told[name][0].has_failed(), "{code} {name}");
                assert_eq!(told[name][0].about()["error.type"], code);
            }
            assert!(!told["read"][0].has_failed());
        }
        assert_eq!(counts(&collector.told(&first.1)).len(), 4);
        let told = collector.told(&again.1);
        assert_eq!(counts(&told), [("publish", 1), ("read", 1), ("route", 1)].into());
        assert!(told.values().flatten().all(|span| !span.has_failed()));
        assert_eq!(told["publish"][0].about()["twinspan.status"], "duplicate");
    }

    #[tokio::test]
    async fn a_broker_that_is_away_is_told_where_it_failed() {
        let Some(mut plan) = Plan::on_brokers().await else { return };
        let mut nats = Broker::nats(&Options::default()).await;
        plan.ephemeral_on(nats.url());
        let collector = Collector::start(Some(StatusCode::OK)).await;
        let span = tracing(plan, &collector).await;
        let publisher = span.client().await;
        nats.kill();
        eventually("the lane is down", async || span.app().bridge.canary.why_down(Lane::Ephemeral).is_some())
            .await;
        let (header, trace) = traceparent("01");
        let failed = publisher.publish("telemetry.t", &with(&header, draft("1"))).await;
        assert_eq!(refused(failed), "LANE_UNAVAILABLE");
        span.stop().await;
        let told = collector.told(&trace);
        for name in ["publish", "broker"] {
            let about = told[name][0].about();
            assert!(told[name][0].has_failed(), "{name}");
            assert_eq!((&*about["error.type"], &*about["messaging.system"]), ("LANE_UNAVAILABLE", "nats"));
        }
        assert!(!told["route"][0].has_failed());
    }

    #[tokio::test]
    async fn a_message_that_another_bridge_delivers_is_told_by_it_in_the_same_trace() {
        let Some(here) = Plan::on_brokers().await else { return };
        let there = Plan {
            routes: here.routes.clone(),
            settings: here.settings.clone(),
            own: here.own.clone(),
            lanes: None,
        };
        let collectors = [
            Collector::start(Some(StatusCode::OK)).await,
            Collector::start(Some(StatusCode::ACCEPTED)).await,
        ];
        let (here, there) = (tracing(here, &collectors[0]).await, tracing(there, &collectors[1]).await);
        let (mut subscriber, publisher) = (there.client().await, here.client().await);
        let mut traces = Vec::new();
        for topic in ["telemetry.t", "orders.t"] {
            subscriber.subscribe(topic, nothing()).await.unwrap();
            let (header, trace) = traceparent("01");
            publisher.publish(topic, &with(&header, draft("1"))).await.unwrap();
            event(&mut subscriber).await;
            traces.push(trace);
        }
        here.stop().await;
        there.stop().await;
        for trace in traces {
            let [here, there] = [0, 1].map(|at| collectors[at].told(&trace));
            assert_eq!(counts(&here), [("broker", 1), ("publish", 1), ("read", 1), ("route", 1)].into());
            assert_eq!(counts(&there), [("fan-out", 1), ("write", 1)].into());
            assert_eq!(there["fan-out"][0].parent, here["publish"][0].parent);
        }
    }

    /// A bridge in a process of its own, so that its log is seen, and its end.
    async fn process(dir: &Path, otlp: &str) -> Process {
        std::fs::write(dir.join("routes.toml"), "[[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\n")
            .unwrap();
        let environment = [
            ("OTEL_BSP_SCHEDULE_DELAY", "20"),
            ("OTEL_SERVICE_NAME", "another"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test"),
        ];
        let environment = environment.map(|(name, value)| (name, Path::new(value)));
        Process::start_with(dir, &[format!("trace.otlp={otlp}")], &environment).await
    }

    /// Publishes more than the queue of spans has room for, each traced.
    async fn publish_traced(bridge: &Process) -> String {
        let client = Client::connect(&bridge.url()).await.unwrap();
        let (header, trace) = traceparent("01");
        let (mut answers, draft) = (Vec::new(), with(&header, draft("1")));
        for _ in 0..1000 {
            answers.push(client.publish_in_line("orders.t", &draft).await.unwrap());
        }
        for answer in answers {
            assert_eq!(soon(answer).await.unwrap().status.as_deref(), Some("ok"));
        }
        trace
    }

    #[tokio::test]
    async fn a_collector_that_is_away_slow_or_refuses_changes_nothing_but_a_warning() {
        let refuses = Collector::start(Some(StatusCode::INTERNAL_SERVER_ERROR)).await;
        let never = Collector::start(None).await;
        for (otlp, warning) in [
            ("http://127.0.0.1:1", "The collector does not take spans"),
            (&*refuses.url, "The collector does not take spans"),
            (&*never.url, "The collector has not taken the last spans"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let mut bridge = process(dir.path(), otlp).await;
            // In several batches, of which each fails.
            for _ in 0..3 {
                publish_traced(&bridge).await;
            }
            if otlp == refuses.url {
                eventually("it refuses batch after batch", async || refuses.requests() > 3).await;
            }
            let begun = Instant::now();
            bridge.terminate();
            assert!(soon(bridge.ended()).await.success());
            assert!(begun.elapsed() < Duration::from_secs(8), "{otlp}: {:?}", begun.elapsed());
            let warnings = async || bridge.log().iter().filter(|line| line.contains(warning)).count();
            eventually(otlp, async || warnings().await > 0).await;
            let log = bridge.log();
            assert!(log.len() == 1, "{otlp}: {log:#?}");
        }
    }

    #[tokio::test]
    async fn the_variables_of_opentelemetry_are_heard() {
        let collector = Collector::start(Some(StatusCode::OK)).await;
        let dir = tempfile::tempdir().unwrap();
        let bridge = process(dir.path(), &format!("{}/", collector.url)).await;
        let trace = publish_traced(&bridge).await;
        // It runs: nothing has to end for that.
        eventually("spans come", async || !collector.told(&trace).is_empty()).await;
        for resource in collector.resources() {
            assert_eq!(resource["service.name"], "another");
            assert_eq!(resource["deployment.environment.name"], "test");
        }
    }
}
