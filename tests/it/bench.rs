//! The benchmark counts right, whatever it is pointed at. How fast anything is, is not what a test can tell.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::process::Command;

use crate::brokers::shared_pulsar;
use crate::harness::{Plan, Span};

const PATIENCE: Duration = Duration::from_secs(60);
const SUBSCRIBERS: u64 = 5;
const BACKLOG: u64 = 400;
/// Messages of a round at a rate.
const PACED: u64 = 30;
/// Short rounds, begun cold.
const SHORT: [&str; 9] = [
    "bench",
    "--json",
    "--warmup=0s",
    "--time=300ms",
    "--rate=100",
    "--window=50",
    "--size=64",
    "--subscribers=5",
    "--backlog=400",
];

async fn bench(dir: &Path, arguments: &[&str]) -> std::process::Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_twinspan"));
    command.args(SHORT).args(arguments).current_dir(dir).env("RUST_LOG", "error").kill_on_drop(true);
    command.stdin(std::process::Stdio::null());
    tokio::time::timeout(PATIENCE, command.output()).await.expect("the benchmark ends").unwrap()
}

/// What a benchmark that went well said, a line for each workload.
async fn lines(dir: &Path, arguments: &[&str]) -> Vec<Value> {
    let output = bench(dir, arguments).await;
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{error}");
    assert_eq!(error, "", "nothing is drawn where nobody looks");
    let said = String::from_utf8(output.stdout).unwrap();
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Which workloads ran on which targets and lanes.
type Ran = BTreeSet<(String, String, String)>;

/// Everything that was sent was answered and received, once.
fn ran(lines: &[Value], rounds: u64) -> Ran {
    let mut ran = Ran::new();
    for line in lines {
        let workload = line["workload"].as_str().unwrap();
        let results = line["results"].as_array().unwrap();
        let ratios = line["ratios"].as_array().unwrap();
        assert_eq!(ratios.len(), results.len() * (results.len() - 1) / 2, "each with each: {line}");
        assert!(ratios.iter().all(|ratio| ratio["rate"].as_f64().unwrap() > 0.0), "{line}");
        for result in results {
            let name = |field: &str| result[field].as_str().unwrap().to_owned();
            let count = |field: &str| result[field].as_u64().unwrap_or_else(|| panic!("{field} in {result}"));
            let sent = count("sent");
            let (acked, received) = match workload {
                "publish" | "paced" | "request" => (sent, 0),
                "end-to-end" => (sent, sent),
                "fan-out" => (sent, sent * SUBSCRIBERS),
                "consume" => (0, rounds * BACKLOG),
                other => panic!("{other} is no workload"),
            };
            assert!(sent > 0, "{line}");
            assert_eq!(
                (count("acked"), count("received"), count("repeated")),
                (acked, received, 0),
                "{line}"
            );
            assert_eq!(count("expected"), received);
            if !matches!(workload, "publish" | "consume") {
                assert_eq!(sent, rounds * PACED, "the rate is kept: {line}");
            }
            assert!(result["rate"]["median"].as_f64().unwrap() > 0.0, "{line}");
            if workload != "consume" {
                let at = |percentile: &str| result["latency_ms"][percentile]["median"].as_f64().unwrap();
                assert!(0.0 < at("p50") && at("p50") <= at("p99") && at("p99") <= at("max"), "{line}");
            }
            let ack = result["ack_p50_ms"]["median"].as_f64();
            assert_eq!(ack.is_some(), matches!(workload, "end-to-end" | "fan-out"), "{line}");
            assert!(ran.insert((workload.into(), name("target"), name("lane"))), "each once");
        }
    }
    ran
}

fn all(target: &str, workloads: &[&str], lanes: &[&str]) -> Ran {
    let pairs = workloads.iter().flat_map(|workload| lanes.iter().map(move |lane| (workload, lane)));
    pairs.map(|(workload, lane)| (workload.to_string(), target.to_owned(), lane.to_string())).collect()
}

fn on_both_lanes(target: &str) -> Ran {
    let mut expected = all(target, &["publish", "paced", "end-to-end", "fan-out"], &["ephemeral", "durable"]);
    expected.append(&mut all(target, &["consume"], &["durable"]));
    expected.append(&mut all(target, &["request"], &["ephemeral"]));
    expected
}

#[tokio::test]
async fn bench_loads_both_lanes_of_a_bridge_and_topics_of_both_and_its_counts_add_up() {
    let span = Span::start().await;
    let (url, lanes) = (span.url(), "--lane=ephemeral,durable,both");
    let lines = lines(Path::new("."), &["--url", &url, "--rounds=2", lanes, "--both-topic=first"]).await;
    let mut expected = on_both_lanes("bridge");
    let workloads = ["publish", "paced", "end-to-end", "fan-out", "consume", "request"];
    expected.append(&mut all("bridge", &workloads, &["both"]));
    assert_eq!(ran(&lines, 2), expected);
    let processor = &lines[0]["results"][0]["processor_us_per_message"]["median"];
    assert!(processor.is_number(), "the bridge's process is found by its port: {}", lines[0]);
}

#[tokio::test]
async fn bench_loads_the_lanes_without_a_bridge() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("routes.toml"), crate::harness::ROUTES).unwrap();
    let routes = ["--set", "server.routes=routes.toml"];
    let lines = lines(dir.path(), &[&["--direct"], &routes[..]].concat()).await;
    assert_eq!(ran(&lines, 1), on_both_lanes("direct"));
}

#[tokio::test]
async fn bench_compares_the_bridge_and_the_lane_with_pulsars_own_clients() {
    let Some(plan) = Plan::on_brokers().await else { return };
    let span = Span::with(plan).await;
    let pulsar = shared_pulsar().await;
    let settings = [
        "lanes.durable.backend=pulsar".to_owned(),
        format!("lanes.durable.url={}", pulsar.url()),
        format!("lanes.durable.admin_url={}", pulsar.admin_url()),
        format!("server.routes={}", span.routes.display()),
    ];
    let (url, peer) = (span.url(), pulsar.admin_url().replace("http:", "ws:"));
    let mut arguments =
        vec!["--url", &url, "--peer-url", &peer, "--per-entry=10", "--prefetch=20", "--rounds=1"];
    arguments.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    let with = |more: &[&'static str]| [&arguments[..], more].concat();

    let targets =
        ["bridge", "direct", "pulsar-ws", "pulsar-crate", "pulsar-crate-batched", "pulsar-crate-folded"];
    let compare = "--compare=bridge,direct,pulsar-ws,pulsar-crate,pulsar-crate-batched,pulsar-crate-folded";
    let workloads = ["publish", "paced", "end-to-end", "consume"];
    let found = ran(&lines(Path::new("."), &with(&[&[compare], &workloads[..]].concat())).await, 1);
    assert_eq!(found, targets.iter().flat_map(|target| all(target, &workloads, &["durable"])).collect());

    let compare = "--compare=direct,pulsar-ws";
    let found = ran(&lines(Path::new("."), &with(&[compare, "end-to-end", "--group"])).await, 1);
    let expected =
        ["direct", "pulsar-ws"].iter().flat_map(|target| all(target, &["end-to-end"], &["durable"]));
    assert_eq!(found, expected.collect(), "by a shared subscription");
}

#[tokio::test]
async fn bench_says_what_it_cannot_do() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (arguments, why) in [
        (&["--url", "ws://127.0.0.1:1/ws"][..], "no bridge answers at ws://127.0.0.1:1/ws"),
        (&["--peer=pulsar-ws", "--lane=ephemeral"], "no ephemeral lane"),
        (&["--direct", "--lane=durable", "request"], "request of the ephemeral one"),
        (&["--direct", "--lane=both"], "the bridge that carries topics of both lanes"),
        (
            &["--direct", "--lane=ephemeral", "paced", "--ephemeral-topic=nowhere"],
            "no route matches `nowhere.",
        ),
        (&["--direct", "--lane=ephemeral", "paced", "--ephemeral-topic=orders.x"], "takes the durable lane"),
        (&["--direct", "--size=1"], "--size"),
        (&["--peer=bridge"], "pulsar-ws"),
    ] {
        let output = bench(here, arguments).await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(why), "{arguments:?}: {said}");
    }
}
