//! What Prometheus and Grafana are given holds: rules that fire when they should, a dashboard that Grafana can read, and
//! every panel of it shows what happens, on a real Prometheus that watches a bridge on real brokers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::SinkExt;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio_tungstenite::tungstenite::Message;
use twinspan::message::{Draft, MessageId, Timestamp};

use crate::brokers::{Broker, Options, free_ports, install, left_out, logged, script};
use crate::harness::{Plan, Span, answer, draft, http_client, nothing};
use crate::proxy::Proxy;
use crate::slow_clients::{hear, unread};

/// What is seen has to be scraped first, and a rate has to have seen two scrapes.
const PATIENCE: Duration = Duration::from_secs(60);
/// Ten scrapes, in place of what Grafana makes of its own interval.
const RATE_INTERVAL: &str = "10s";
/// What is drawn beside a value as its bound stays where it is.
const BOUNDS: [&str; 2] = ["process_max_fds", "twinspan_spool_max_bytes"];

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn dashboard() -> Value {
    let text = std::fs::read_to_string(file("config/observe/grafana/dashboards/twinspan.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

/// The panels that show something.
fn panels(dashboard: &Value) -> impl Iterator<Item = &Value> {
    dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row")
}

/// What is asked of Prometheus, and by what: annotations and panels.
fn queries(dashboard: &Value) -> Vec<(&str, &str)> {
    fn text(value: &Value) -> &str {
        value.as_str().unwrap()
    }
    let annotations = dashboard["annotations"]["list"].as_array().unwrap().iter();
    let annotations = annotations.map(|note| (text(&note["name"]), text(&note["expr"])));
    let panels = panels(dashboard).flat_map(|panel| {
        let targets = panel["targets"].as_array().unwrap().iter();
        targets.map(|target| (text(&panel["title"]), text(&target["expr"])))
    });
    let queries: Vec<_> = annotations.chain(panels).collect();
    assert!(queries.len() > 45, "{}", queries.len());
    queries
}

/// Runs one of the tools of `dev/brokers` over `config/observe`.
async fn succeeds(mut command: Command) {
    command.current_dir(file("config/observe")).stdin(Stdio::null());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", said(&output.stdout), said(&output.stderr));
}

#[tokio::test]
async fn the_alert_rules_are_sound_and_fire_when_they_should() {
    if left_out() {
        return;
    }
    install("prometheus").await;
    for arguments in [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]] {
        let mut promtool = script();
        promtool.args(["exec", "promtool"]).args(arguments);
        succeeds(promtool).await;
    }
}

/// Without a parser of YAML: an alert is what `- alert:` names, and its runbook stands below it.
#[test]
fn every_alert_has_its_runbook_a_test_and_a_line_in_the_readme() {
    let read = |name| std::fs::read_to_string(file(name)).unwrap();
    let (rules, tests) = (read("config/observe/alerts.yml"), read("config/observe/alerts_test.yml"));
    let readme = read("README.md");
    let alerts: Vec<_> = rules.split("- alert: ").skip(1).collect();
    assert!(alerts.len() >= 8, "{alerts:?}");
    for alert in alerts {
        let name = alert.lines().next().unwrap();
        assert!(alert.contains("runbook: \"") && alert.contains("summary: \""), "{name}");
        assert!(tests.contains(&format!("alertname: {name}\n")), "{name} is not tested");
        assert!(readme.contains(&format!("`{name}`")), "the README says nothing of {name}");
    }
}

#[tokio::test]
async fn the_dashboard_is_as_grafana_publishes_it() {
    if left_out() {
        return;
    }
    install("grafana-schema").await;
    let dashboard = dashboard();
    let mut text = include_str!("observe/dashboard.ts").to_owned();
    text += &format!("export const dashboard = {dashboard:#} satisfies Dashboard;\n");
    for panel in panels(&dashboard) {
        let custom = &panel["fieldConfig"]["defaults"]["custom"];
        let own = json!({"options": panel["options"], "custom": custom, "targets": panel["targets"]});
        text += &format!("export const panel{} = {own:#} satisfies Kinds[{}];\n", panel["id"], panel["type"]);
    }
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("dashboard.ts"), text).unwrap();
    let options = json!({"strict": true, "noEmit": true, "module": "esnext", "moduleResolution": "node"});
    let config = json!({"compilerOptions": options, "files": ["dashboard.ts"]});
    std::fs::write(dir.path().join("tsconfig.json"), config.to_string()).unwrap();
    let mut tsc = script();
    tsc.args(["exec", "tsc", "--dir"]).arg(dir.path());
    succeeds(tsc).await;
}

#[test]
fn panels_have_numbers_of_their_own_and_stand_beside_each_other() {
    let dashboard = dashboard();
    let all = dashboard["panels"].as_array().unwrap();
    let numbers: BTreeSet<_> = all.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(numbers.len(), all.len());
    let mut taken = BTreeSet::new();
    for panel in all {
        let at = |name: &str| panel["gridPos"][name].as_u64().unwrap();
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(x < 24 && taken.insert((x, y)), "{} stands on another, or outside", panel["title"]);
            }
        }
    }
}

#[test]
fn every_query_is_of_the_instances_that_were_chosen() {
    for (title, query) in queries(&dashboard()) {
        assert!(query.contains("instance=~\"$instance\""), "{title}: {query}");
    }
}

/// A real Prometheus with the stack's own settings, which looks each second.
struct Prometheus {
    port: u16,
    child: Child,
    dir: TempDir,
    began: Timestamp,
}

impl Prometheus {
    async fn start(bridge: &str, pulsar: &str) -> Self {
        install("prometheus").await;
        let mut config = std::fs::read_to_string(file("config/observe/prometheus.yml")).unwrap();
        let rules = file("config/observe/alerts.yml").display().to_string();
        for (theirs, ours) in [
            ("interval: 5s", "interval: 1s"),
            ("twinspan:8091", bridge),
            ("pulsar:8080", pulsar),
            ("alerts.yml", &rules),
        ] {
            assert!(config.contains(theirs), "{theirs}");
            config = config.replace(theirs, ours);
        }
        // Another process may take a port between our finding it and the binding of it.
        for _ in 0..3 {
            let (dir, [port, _]) = (TempDir::new().unwrap(), free_ports());
            let path = dir.path().join("prometheus.yml");
            std::fs::write(&path, &config).unwrap();
            let mut command = script();
            command.args(["exec", "prometheus", "--port", &port.to_string(), "--config"]).arg(&path);
            command.arg("--dir").arg(dir.path());
            let child = logged(command, dir.path());
            let mut started = Self { port, child, dir, began: Timestamp::now() };
            if started.is_ready().await {
                return started;
            }
            eprintln!("{}", std::fs::read_to_string(started.dir.path().join("log")).unwrap());
        }
        panic!("no Prometheus could be started; see above");
    }

    async fn is_ready(&mut self) -> bool {
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until && self.child.try_wait().unwrap().is_none() {
            let asked = http_client().get(format!("http://127.0.0.1:{}/-/ready", self.port)).send().await;
            if asked.is_ok_and(|answer| answer.status().is_success()) {
                return true;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        false
    }

    async fn ask(&self, path: &str, arguments: &[(&str, &str)]) -> Value {
        let encoded = |text: &str| text.bytes().map(|byte| format!("%{byte:02X}")).collect::<String>();
        let arguments: Vec<_> =
            arguments.iter().map(|(name, value)| format!("{name}={}", encoded(value))).collect();
        let url = format!("http://127.0.0.1:{}/api/v1/{path}?{}", self.port, arguments.join("&"));
        let (status, body) = answer(http_client().get(url).send().await.unwrap()).await;
        assert_eq!(status, 200, "{arguments:?}: {body}");
        body["data"].clone()
    }

    /// Waits until an expression finds something.
    async fn sees(&self, query: &str) {
        let until = Instant::now() + PATIENCE;
        while self.ask("query", &[("query", query)]).await["result"].as_array().unwrap().is_empty() {
            assert!(Instant::now() < until, "Prometheus does not see {query}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Whether what a panel asks for was there since the beginning, and whether it moved: with two values of one
    /// series, or as a series that was not always there.
    async fn shows(&self, query: &str) -> Shows {
        let query = query.replace("$__rate_interval", RATE_INTERVAL);
        let query =
            ["$instance", "$lane", "$route"].iter().fold(query, |query, name| query.replace(name, ".*"));
        let seconds = |at: Timestamp| (at.as_millis() as f64 / 1000.0).to_string();
        let range = [
            ("query", query.as_str()),
            ("start", &seconds(self.began)),
            ("end", &seconds(Timestamp::now())),
            ("step", "1"),
        ];
        let found = self.ask("query_range", &range).await;
        let series = found["result"].as_array().unwrap();
        let moves = series.iter().any(|series| {
            let values = series["values"].as_array().unwrap().iter();
            values.map(|value| value[1].as_str().unwrap()).collect::<BTreeSet<_>>().len() > 1
        });
        match (series.is_empty(), moves) {
            (true, _) => Shows::Nothing,
            (false, false) => Shows::Still,
            (false, true) => Shows::Moving,
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Debug, PartialEq)]
enum Shows {
    Nothing,
    Still,
    Moving,
}

/// Routes of its own names at the brokers; a NATS to be killed, and a Pulsar behind a network that can be held up.
fn plan(nats: &Broker, pulsar: &Broker, proxy: &Proxy) -> Plan {
    let own = format!("t{}", MessageId::new()).replace('-', "");
    let durable = |name: &str, more: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\ntopic = \"{name}.>\"\nlane = \"durable\"\n\
             pulsar = \"persistent://public/default/{own}.{{topic}}\"\n{more}\n"
        )
    };
    let ephemeral = |name: &str| {
        format!(
            "[[route]]\nname = \"{name}\"\ntopic = \"{name}.>\"\nlane = \"ephemeral\"\nnats = \"{own}.{{topic}}\"\n"
        )
    };
    let routes = [
        ephemeral("telemetry"),
        ephemeral("svc"),
        durable("orders", "outage = \"spool\""),
        durable("audit", ""),
        durable("jobs", "backoff = [\"100ms\"]\nmax_deliveries = 3\ndead_letter = \"audit.{topic}\""),
    ];
    let mut plan = Plan { routes: routes.concat(), own: own.clone(), ..Plan::default() };
    plan.ephemeral_on(nats.url());
    plan.durable_on(proxy.pulsar_url(), pulsar);
    plan.settings.lanes.durable.publish_timeout = Duration::from_secs(4);
    plan.settings.session.max_subscriptions = 2;
    plan
}

/// A little of everything that clients do, again and again until it is dropped. What is refused meanwhile is refused.
fn load(span: &Arc<Span>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    for topic in ["telemetry.a", "orders.a", "audit.a", "jobs.a"] {
        tasks.spawn(publish(span.clone(), topic));
    }
    tasks.spawn(listen(span.clone()));
    tasks.spawn(serve(span.clone()));
    tasks.spawn(request(span.clone()));
    tasks.spawn(give_back(span.clone()));
    tasks.spawn(misbehave(span.clone()));
    tasks.spawn(read_slowly(span.clone()));
    tasks
}

/// Bursts of one message up to sixteen, the last of them twice.
async fn publish(span: Arc<Span>, topic: &str) {
    let client = span.client().await;
    for n in 1.. {
        let mut answers = Vec::new();
        for _ in 0..1 + n % 16 {
            let twice = Draft { id: Some(MessageId::new()), ..draft(json!(n).to_string()) };
            answers.push(client.publish_in_line(topic, &twice).await.unwrap());
            if answers.len() == 16 {
                answers.push(client.publish_in_line(topic, &twice).await.unwrap());
            }
        }
        for answer in answers {
            let _ = answer.await;
        }
        pace().await;
    }
}

/// So that a small machine has time for the rest.
async fn pace() {
    tokio::time::sleep(Duration::from_millis(100)).await;
}

async fn listen(span: Arc<Span>) {
    let mut client = span.client().await;
    client.subscribe("telemetry.>", json!({"filter": "payload > 3"})).await.unwrap();
    client.subscribe("orders.>", nothing()).await.unwrap();
    loop {
        client.next().await.unwrap();
    }
}

async fn serve(span: Arc<Span>) {
    let mut client = span.client().await;
    client.subscribe("svc.time", nothing()).await.unwrap();
    loop {
        if let Some(reply_to) = client.next().await.unwrap().reply_to {
            client.reply(&reply_to, &draft("12")).await.unwrap();
        }
    }
}

async fn request(span: Arc<Span>) {
    let client = span.client().await;
    loop {
        for topic in ["svc.time", "svc.nobody"] {
            let _ = client.request(topic, &draft("1"), Duration::from_secs(1)).await;
        }
        pace().await;
    }
}

/// One group gives everything back, another never answers.
async fn give_back(span: Arc<Span>) {
    let (mut nacks, holds) = (span.client().await, span.client().await);
    nacks.subscribe("jobs.a", json!({"group": "nacks"})).await.unwrap();
    holds.subscribe("orders.a", json!({"group": "holds", "prefetch": 10})).await.unwrap();
    loop {
        if let Some(delivery) = nacks.next().await.unwrap().delivery {
            let _ = nacks.nack(&[delivery], Duration::from_millis(100)).await;
        }
    }
}

/// Comes by no WebSocket, says what nobody may, asks for too much, sends too much.
async fn misbehave(span: Arc<Span>) {
    loop {
        assert!(span.get("/ws").await.0 >= 400);
        let mut binary = unread(&span).await;
        binary.send(Message::binary("?")).await.unwrap();
        assert_eq!(hear(&mut binary).await["close"], 1003);
        let greedy = span.client().await;
        for n in 0..3 {
            let _ = greedy.subscribe(&format!("telemetry.g{n}"), nothing()).await;
        }
        let large = draft(json!("x".repeat(600_000)).to_string());
        assert!(greedy.publish("telemetry.large", &large).await.is_err());
        pace().await;
    }
}

/// Lets a megabyte and more pile up, then reads it and what stands for the rest.
async fn read_slowly(span: Arc<Span>) {
    let publisher = span.client().await;
    let filler = draft(json!("x".repeat(8000)).to_string());
    loop {
        let mut slow = unread(&span).await;
        let frame = json!({"type": "subscribe", "topic": "telemetry.s"});
        slow.send(Message::text(frame.to_string())).await.unwrap();
        for _ in 0..1500 {
            let _ = publisher.publish("telemetry.s", &filler).await;
        }
        // None where NATS was away just then.
        let gap = async { while hear(&mut slow).await["type"] != "gap" {} };
        let _ = tokio::time::timeout(Duration::from_secs(2), gap).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_panel_shows_what_happens_to_a_real_bridge() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (pulsar, proxy) = &*proxied;
    let mut nats = Broker::nats(&Options::default()).await;
    let span = Arc::new(Span::with(plan(&nats, pulsar, proxy)).await);
    let admin = span.running.admin.to_string();
    let pulsar_admin = pulsar.admin_url();
    let prometheus = Prometheus::start(&admin, pulsar_admin.trim_start_matches("http://")).await;

    // How it is when nothing happens.
    prometheus.sees("count_over_time(up{job=\"twinspan\"}[1m]) > 5 and up{job=\"twinspan\"} == 1").await;
    prometheus.sees("up{job=\"pulsar\"} == 1").await;
    let mut load = load(&span);
    prometheus.sees("sum(rate(twinspan_messages_total{direction=\"out\",lane=\"durable\"}[10s])) > 1").await;

    // A mistake in the routes.
    let routes = std::fs::read_to_string(&span.routes).unwrap();
    span.write_routes(&routes.replace("backoff", "backof"));
    prometheus.sees("ALERTS{alertname=\"TwinspanReloadFailed\",alertstate=\"pending\"}").await;
    span.write_routes(&routes);
    prometheus.sees("twinspan_config_last_reload_success == 1").await;

    // NATS is killed, and comes back.
    nats.kill();
    prometheus.sees("ALERTS{alertname=\"TwinspanLaneDown\",alertstate=\"pending\",lane=\"ephemeral\"}").await;
    prometheus.sees("twinspan_lane_state{lane=\"durable\"} == 2").await;
    nats.restart().await;
    prometheus.sees("twinspan_lane_state{lane=\"ephemeral\"} == 2").await;

    // Pulsar cannot be reached any more, and then again.
    proxy.hold();
    prometheus.sees("twinspan_spool_messages > 0 and on() twinspan_breaker_state == 2").await;
    proxy.cut();
    proxy.resume();
    prometheus
        .sees("twinspan_spool_drained_total > 0 and on() twinspan_lane_state{lane=\"durable\"} == 2")
        .await;

    let dashboard = dashboard();
    for variable in dashboard["templating"]["list"].as_array().unwrap() {
        let Some(query) = variable["query"]["query"].as_str() else { continue };
        let (metric, label) =
            query.trim_start_matches("label_values(").trim_end_matches(')').split_once(", ").unwrap();
        let values = prometheus.ask(&format!("label/{label}/values"), &[("match[]", metric)]).await;
        assert!(!values.as_array().unwrap().is_empty(), "{query}");
    }

    let mut awaited = queries(&dashboard);
    let until = Instant::now() + PATIENCE;
    loop {
        let mut lacking = Vec::new();
        for (title, query) in awaited {
            let is_bound = BOUNDS.iter().any(|bound| query.contains(bound));
            match prometheus.shows(query).await {
                Shows::Moving => {}
                Shows::Still if is_bound => {}
                _ => lacking.push((title, query)),
            }
        }
        if lacking.is_empty() {
            break;
        }
        assert!(Instant::now() < until, "these show nothing, or nothing that moves: {lacking:#?}");
        awaited = lacking;
    }
    assert!(load.try_join_next().is_none(), "no part of the load has ended");
}
