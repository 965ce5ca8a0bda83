//! Every metric: name, help, labels, and the verb that moves it.
//!
//! The label of a topic's traffic is its route: routes are few, topics and clients are not.

use std::time::Duration;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use super::traffic::{self, Traffic};
use crate::filter::Verdict;
use crate::message::{Lane, Timestamp};
use crate::wire::code::{Close, Code};

/// One set for every latency, so that the lanes compare: 50 µs to 10 s.
const LATENCY_BUCKETS: [f64; 17] = [
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 100e-3, 250e-3, 500e-3, 1.0, 2.5,
    5.0, 10.0,
];
const DEPTH_BUCKETS: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];
const BATCH_BUCKETS: [f64; 11] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0];

/// Where the time of a message goes, in the order of its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// From its frame received to its frame decoded.
    Read,
    /// Until it is handed to its lane: the policy, the schema, the ids of before.
    Route,
    /// Until the lane's receipt.
    Broker,
    /// From the lane bringing it to its place among what waits for one client.
    FanOut,
    /// Until it is written to that client's socket.
    Write,
}

impl Stage {
    const ALL: [Stage; 5] = [Stage::Read, Stage::Route, Stage::Broker, Stage::FanOut, Stage::Write];

    pub fn as_str(self) -> &'static str {
        match self {
            Stage::Read => "read",
            Stage::Route => "route",
            Stage::Broker => "broker",
            Stage::FanOut => "fan-out",
            Stage::Write => "write",
        }
    }
}

pub struct Metrics {
    registry: Registry,
    connections: IntGaugeVec,
    connections_total: IntCounterVec,
    close_total: IntCounterVec,
    subscriptions: IntGaugeVec,
    messages_total: IntCounterVec,
    message_bytes_total: IntCounterVec,
    publish_duration: HistogramVec,
    delivery_duration: HistogramVec,
    request_duration: HistogramVec,
    /// By lane, then by stage: looked up here once, not with every message.
    stages: [[Histogram; Stage::ALL.len()]; Lane::ALL.len()],
    probe_duration: HistogramVec,
    probe_failures_total: IntCounterVec,
    lane_up: IntGaugeVec,
    lane_state: IntGaugeVec,
    breaker_state: IntGaugeVec,
    spool_messages: IntGauge,
    spool_bytes: IntGauge,
    spool_max_bytes: IntGauge,
    spool_oldest_age: Gauge,
    spool_set_aside: IntGauge,
    spool_drained_total: IntCounter,
    dropped_total: IntCounterVec,
    gaps_total: IntCounterVec,
    redelivered_total: IntCounterVec,
    dead_lettered_total: IntCounterVec,
    retries_total: IntCounterVec,
    backlog_messages: IntGaugeVec,
    backlog_age: GaugeVec,
    unacked_messages: IntGaugeVec,
    filter_evaluations_total: IntCounterVec,
    topic_listings_total: IntCounter,
    remembered_ids: IntGauge,
    forgotten_ids_total: IntCounter,
    batch_messages: HistogramVec,
    queue_depth: Histogram,
    errors_total: IntCounterVec,
    reload_success: IntGauge,
    reload_timestamp: Gauge,
}

impl Metrics {
    /// One process may hold several of these (the tests do): each has a registry of its own.
    pub fn new() -> Self {
        let registry = Registry::new();
        let stages = latency(
            &registry,
            "stage_seconds",
            "Where the time of a message goes, of a sample: a publish of each turn that a connection is read in, one event in sixteen, and what is traced.",
            &["lane", "stage"],
        );
        let made = Metrics {
            connections: gauges(&registry, "connections", "Open client connections.", &["dialect"]),
            connections_total: counters(
                &registry,
                "connections_total",
                "Client connections.",
                &["dialect", "outcome"],
            ),
            close_total: counters(&registry, "close_total", "WebSocket closes by close code.", &["code"]),
            subscriptions: gauges(&registry, "subscriptions", "Live subscriptions.", &["lane"]),
            messages_total: counters(
                &registry,
                "messages_total",
                "Messages in from publishers and out to subscribers.",
                &["lane", "route", "direction", "outcome"],
            ),
            message_bytes_total: counters(
                &registry,
                "message_bytes_total",
                "Payload bytes in from publishers and out to subscribers.",
                &["lane", "route", "direction"],
            ),
            publish_duration: latency(
                &registry,
                "publish_duration_seconds",
                "From the publish frame read to the lane's answer.",
                &["lane", "route"],
            ),
            delivery_duration: latency(
                &registry,
                "delivery_duration_seconds",
                "From the message accepted to its event written to the socket.",
                &["lane", "route"],
            ),
            request_duration: latency(
                &registry,
                "request_duration_seconds",
                "From request to response.",
                &["route"],
            ),
            stages: Lane::ALL.map(|lane| {
                Stage::ALL.map(|stage| stages.with_label_values(&[lane.as_str(), stage.as_str()]))
            }),
            probe_duration: latency(
                &registry,
                "probe_duration_seconds",
                "A round trip through the lane.",
                &["lane"],
            ),
            probe_failures_total: counters(
                &registry,
                "probe_failures_total",
                "Heartbeats through a lane that did not come back in time.",
                &["lane"],
            ),
            lane_up: gauges(&registry, "lane_up", "1 while the lane answers its probes.", &["lane"]),
            lane_state: gauges(&registry, "lane_state", "0: down, 1: degraded, 2: up.", &["lane"]),
            breaker_state: gauges(
                &registry,
                "breaker_state",
                "0 closed, 1 half open, 2 open: the worst of the lane and its topics.",
                &["lane"],
            ),
            spool_messages: registered(
                &registry,
                IntGauge::with_opts(opts(
                    "spool_messages",
                    "Messages on disk that wait for the durable lane.",
                )),
            ),
            spool_bytes: registered(
                &registry,
                IntGauge::with_opts(opts(
                    "spool_bytes",
                    "What they take, and what was set aside: what lanes.durable.spool_max bounds.",
                )),
            ),
            spool_max_bytes: registered(
                &registry,
                IntGauge::with_opts(opts("spool_max_bytes", "lanes.durable.spool_max.")),
            ),
            spool_oldest_age: registered(
                &registry,
                Gauge::with_opts(opts("spool_oldest_age_seconds", "The age of the oldest of them.")),
            ),
            spool_set_aside: registered(
                &registry,
                IntGauge::with_opts(opts(
                    "spool_set_aside",
                    "Messages kept in the spool that the durable lane refused and that have no dead letter to go to.",
                )),
            ),
            spool_drained_total: registered(
                &registry,
                IntCounter::with_opts(opts(
                    "spool_drained_total",
                    "Spooled messages that the durable lane stored.",
                )),
            ),
            dropped_total: counters(
                &registry,
                "dropped_total",
                "Messages that were dropped, by reason.",
                &["lane", "route", "reason"],
            ),
            gaps_total: counters(&registry, "gaps_total", "Gaps announced to subscribers.", &["route"]),
            redelivered_total: counters(
                &registry,
                "redelivered_total",
                "Deliveries to group members after the first.",
                &["route"],
            ),
            dead_lettered_total: counters(
                &registry,
                "dead_lettered_total",
                "Messages of this route that nobody acknowledged and that were stored as dead letters.",
                &["route"],
            ),
            retries_total: counters(
                &registry,
                "retries_total",
                "What could not be stored and is tried again by this bridge: dead letters, by the route they come from.",
                &["lane", "route"],
            ),
            backlog_messages: gauges(
                &registry,
                "backlog_messages",
                "Messages that a group served here has not acknowledged.",
                &["route", "group"],
            ),
            backlog_age: registered(
                &registry,
                GaugeVec::new(
                    opts("backlog_age_seconds", "The age of the oldest message of a group's backlog."),
                    &["route", "group"],
                ),
            ),
            unacked_messages: gauges(
                &registry,
                "unacked_messages",
                "Messages of a group's backlog that its members hold.",
                &["route", "group"],
            ),
            filter_evaluations_total: counters(
                &registry,
                "filter_evaluations_total",
                "Evaluations of subscribers' filters, one for each distinct expression and message, by what they found.",
                &["outcome"],
            ),
            topic_listings_total: registered(
                &registry,
                IntCounter::with_opts(opts(
                    "topic_listings_total",
                    "How often the durable lane's broker was asked for all topics to find new ones: by the second where it does not tell of them itself.",
                )),
            ),
            remembered_ids: registered(
                &registry,
                IntGauge::with_opts(opts(
                    "remembered_ids",
                    "Ids that a publish is compared with, of the routes' dedup_window.",
                )),
            ),
            forgotten_ids_total: registered(
                &registry,
                IntCounter::with_opts(opts(
                    "forgotten_ids_total",
                    "Ids that were forgotten before their dedup_window was over, because there were too many.",
                )),
            ),
            batch_messages: histogram(
                &registry,
                "batch_messages",
                "Messages in one entry to Pulsar.",
                &["route"],
                BATCH_BUCKETS.to_vec(),
            ),
            queue_depth: registered(
                &registry,
                Histogram::with_opts(HistogramOpts {
                    common_opts: opts("queue_depth", "Frames waiting for one client, seen at each write."),
                    buckets: DEPTH_BUCKETS.to_vec(),
                }),
            ),
            errors_total: counters(
                &registry,
                "errors_total",
                "Errors answered to clients, by code.",
                &["code"],
            ),
            reload_success: registered(
                &registry,
                IntGauge::with_opts(opts(
                    "config_last_reload_success",
                    "1 where the last reload took effect.",
                )),
            ),
            reload_timestamp: registered(
                &registry,
                Gauge::with_opts(opts(
                    "config_last_reload_timestamp_seconds",
                    "When routes last took effect.",
                )),
            ),
            registry,
        };
        let build = opts("build_info", "Always 1; the version is its label.")
            .const_label("version", env!("CARGO_PKG_VERSION"));
        registered(&made.registry, IntGauge::with_opts(build)).set(1);
        #[cfg(target_os = "linux")]
        {
            // Refused only where the name is taken, and the registry is new.
            let _ =
                made.registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()));
        }
        for lane in Lane::ALL {
            made.lane_up.with_label_values(&[lane.as_str()]).set(0);
            made.lane_state.with_label_values(&[lane.as_str()]).set(0);
            made.probe_failures_total.with_label_values(&[lane.as_str()]);
        }
        for code in Code::ALL {
            made.errors_total.with_label_values(&[code.as_str()]);
        }
        made
    }

    /// The text exposition.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory fails only on a metric family without metrics, which the registry never gathers.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// What went over a lane up to now.
    pub fn traffic(&self, lane: Lane) -> Traffic {
        let lane = lane.as_str();
        let messages = |direction: &str, is_taken: bool| {
            traffic::sum(&self.messages_total, lane, |name, value| match name {
                "direction" => value == direction,
                "outcome" => is_taken == ["ok", "spooled", "duplicate"].contains(&value),
                _ => true,
            })
        };
        Traffic {
            taken: messages("in", true),
            refused: messages("in", false),
            written: messages("out", true),
            dropped: traffic::sum(&self.dropped_total, lane, |_, _| true),
            publish: traffic::latency(&self.publish_duration, lane),
            delivery: traffic::latency(&self.delivery_duration, lane),
        }
    }

    pub fn connected(&self, dialect: &str) {
        self.connections.with_label_values(&[dialect]).inc();
        self.connections_total.with_label_values(&[dialect, "accepted"]).inc();
    }

    pub fn refused_connection(&self, dialect: &str) {
        self.connections_total.with_label_values(&[dialect, "refused"]).inc();
    }

    pub fn disconnected(&self, dialect: &str) {
        self.connections.with_label_values(&[dialect]).dec();
    }

    pub fn closed(&self, close: Close) {
        self.close_total.with_label_values(&[&close.code().to_string()]).inc();
    }

    pub fn subscribed(&self, lane: Lane) {
        self.subscriptions.with_label_values(&[lane.as_str()]).inc();
    }

    pub fn unsubscribed(&self, lane: Lane) {
        self.subscriptions.with_label_values(&[lane.as_str()]).dec();
    }

    pub fn published(&self, lane: Lane, route: &str, bytes: usize, elapsed: Duration) {
        let lane = lane.as_str();
        self.messages_total.with_label_values(&[lane, route, "in", "ok"]).inc();
        self.message_bytes_total.with_label_values(&[lane, route, "in"]).inc_by(bytes as u64);
        self.publish_duration.with_label_values(&[lane, route]).observe(elapsed.as_secs_f64());
    }

    pub fn publish_failed(&self, lane: Lane, route: &str, code: Code) {
        self.messages_total
            .with_label_values(&[lane.as_str(), route, "in", &code.as_str().to_lowercase()])
            .inc();
    }

    /// A publish whose id was there already.
    pub fn duplicate(&self, lane: Lane, route: &str) {
        self.messages_total.with_label_values(&[lane.as_str(), route, "in", "duplicate"]).inc();
    }

    /// How many ids are remembered now, and how many others had to be forgotten for them.
    pub fn ids_remembered(&self, remembered: usize, forgotten: usize) {
        self.remembered_ids.set(i64::try_from(remembered).unwrap_or(i64::MAX));
        self.forgotten_ids_total.inc_by(forgotten as u64);
    }

    /// Events of one route were written to one client's socket, each so old.
    pub fn delivered(&self, lane: Lane, route: &str, bytes: usize, ages: &[Duration]) {
        let lane = lane.as_str();
        self.messages_total.with_label_values(&[lane, route, "out", "ok"]).inc_by(ages.len() as u64);
        self.message_bytes_total.with_label_values(&[lane, route, "out"]).inc_by(bytes as u64);
        let duration = self.delivery_duration.with_label_values(&[lane, route]);
        for age in ages {
            duration.observe(age.as_secs_f64());
        }
    }

    pub fn requested(&self, route: &str, elapsed: Duration) {
        self.request_duration.with_label_values(&[route]).observe(elapsed.as_secs_f64());
    }

    pub fn took(&self, lane: Lane, stage: Stage, elapsed: Duration) {
        self.stages[lane as usize][stage as usize].observe(elapsed.as_secs_f64());
    }

    pub fn batched(&self, route: &str, messages: u64) {
        self.batch_messages.with_label_values(&[route]).observe(messages as f64);
    }

    pub fn probed(&self, lane: Lane, elapsed: Duration) {
        self.probe_duration.with_label_values(&[lane.as_str()]).observe(elapsed.as_secs_f64());
    }

    pub fn probe_failed(&self, lane: Lane) {
        self.probe_failures_total.with_label_values(&[lane.as_str()]).inc();
    }

    /// 0: down, 1: degraded, 2: up.
    pub fn lane_stands(&self, lane: Lane, standing: i64) {
        self.lane_state.with_label_values(&[lane.as_str()]).set(standing);
    }

    pub fn lane_is(&self, lane: Lane, up: bool) {
        self.lane_up.with_label_values(&[lane.as_str()]).set(up.into());
    }

    /// On disk, until the lane takes it.
    pub fn spooled(&self, route: &str, bytes: usize) {
        let lane = Lane::Durable.as_str();
        self.messages_total.with_label_values(&[lane, route, "in", "spooled"]).inc();
        self.message_bytes_total.with_label_values(&[lane, route, "in"]).inc_by(bytes as u64);
    }

    pub fn drained(&self) {
        self.spool_drained_total.inc();
    }

    pub fn spool_holds(&self, messages: u64, bytes: u64, oldest_age: Duration, set_aside: u64) {
        self.spool_messages.set(i64::try_from(messages).unwrap_or(i64::MAX));
        self.spool_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
        self.spool_oldest_age.set(oldest_age.as_secs_f64());
        self.spool_set_aside.set(i64::try_from(set_aside).unwrap_or(i64::MAX));
    }

    pub fn spool_is_bounded(&self, bytes: u64) {
        self.spool_max_bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }

    pub fn breaker_is(&self, lane: Lane, state: i64) {
        self.breaker_state.with_label_values(&[lane.as_str()]).set(state);
    }

    pub fn dropped(&self, lane: Lane, route: &str, reason: &str, count: u64) {
        self.dropped_total.with_label_values(&[lane.as_str(), route, reason]).inc_by(count);
    }

    pub fn gap(&self, route: &str) {
        self.gaps_total.with_label_values(&[route]).inc();
    }

    pub fn redelivered(&self, route: &str) {
        self.redelivered_total.with_label_values(&[route]).inc();
    }

    pub fn dead_lettered(&self, route: &str) {
        self.dead_lettered_total.with_label_values(&[route]).inc();
    }

    pub fn retried(&self, lane: Lane, route: &str) {
        self.retries_total.with_label_values(&[lane.as_str(), route]).inc();
    }

    /// The caller bounds how many groups there are.
    pub fn group_stands(&self, route: &str, group: &str, backlog: u64, unacked: u64, age: Duration) {
        let series = [route, group];
        self.backlog_messages.with_label_values(&series).set(i64::try_from(backlog).unwrap_or(i64::MAX));
        self.unacked_messages.with_label_values(&series).set(i64::try_from(unacked).unwrap_or(i64::MAX));
        self.backlog_age.with_label_values(&series).set(age.as_secs_f64());
    }

    pub fn group_left(&self, route: &str, group: &str) {
        // Absent where it never stood.
        let series = [route, group];
        let _ = self.backlog_messages.remove_label_values(&series);
        let _ = self.unacked_messages.remove_label_values(&series);
        let _ = self.backlog_age.remove_label_values(&series);
    }

    pub fn evaluated(&self, verdict: Verdict) {
        self.filter_evaluations_total.with_label_values(&[verdict.as_str()]).inc();
    }

    pub fn listed_topics(&self) {
        self.topic_listings_total.inc();
    }

    pub fn queued(&self, depth: usize) {
        self.queue_depth.observe(depth as f64);
    }

    pub fn answered_error(&self, code: Code) {
        self.errors_total.with_label_values(&[code.as_str()]).inc();
    }

    pub fn reloaded(&self, success: bool) {
        self.reload_success.set(success.into());
        if success {
            self.reload_timestamp.set(Timestamp::now().as_millis() as f64 / 1000.0);
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn opts(name: &str, help: &str) -> Opts {
    Opts::new(format!("twinspan_{name}"), help)
}

fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(registry, IntCounterVec::new(opts(name, help), labels))
}

fn gauges(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
    registered(registry, IntGaugeVec::new(opts(name, help), labels))
}

fn latency(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> HistogramVec {
    histogram(registry, name, help, labels, LATENCY_BUCKETS.to_vec())
}

fn histogram(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: Vec<f64>,
) -> HistogramVec {
    let opts = HistogramOpts { common_opts: opts(name, help), buckets };
    registered(registry, HistogramVec::new(opts, labels))
}

/// The names and labels are constants of this file and the registry is new, so neither step can fail; the test below
/// makes every one of them.
#[allow(clippy::expect_used)]
fn registered<C: prometheus::core::Collector + Clone + 'static>(
    registry: &Registry,
    collector: prometheus::Result<C>,
) -> C {
    let collector = collector.expect("a constant metric is well formed");
    registry.register(Box::new(collector.clone())).expect("a constant metric is registered once");
    collector
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_can_be_made_and_rendered() {
        let metrics = Metrics::new();
        metrics.published(Lane::Durable, "orders", 3, Duration::from_millis(2));
        let text = metrics.render();
        assert!(text.contains("twinspan_build_info{version="), "{text}");
        assert!(text.contains(
            "twinspan_messages_total{direction=\"in\",lane=\"durable\",outcome=\"ok\",route=\"orders\"} 1"
        ));
        assert!(text.contains("process_resident_memory_bytes"));
    }
}
