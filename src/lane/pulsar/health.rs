//! Whether the broker takes writes: a small message, written and confirmed every second, as publishers' messages are.
//!
//! ```text
//! connecting ──a probe is confirmed──▶ up ──two in a row are not──▶ down ──a probe is confirmed──▶ up
//!                                                                    └──every 8 s──▶ connect anew, to the next URL
//! ```
//! Nothing less tells a broker that answers from one that stores: a frozen process keeps its sockets, and a broker
//! without its bookies keeps answering pings. The price is a message of some 150 bytes a second on one topic, which
//! its namespace's retention removes with everything else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::append::Producers;
use super::cluster::Cluster;
use super::names::Physical;
use crate::lane::contract::{LaneError, LaneState};
use crate::message::{Draft, Lane};
use crate::policy::Policy;
use crate::telemetry::metrics::Metrics;

/// No topic of ours begins with `_`, so it shows in no listing.
const CANARY: &str = "__twinspan-probe";
const DEFAULT_NAMESPACE: &str = "public/default";
const EVERY: Duration = Duration::from_secs(1);
/// Two of them and the second between probes: a broker that froze is down within 3 s.
const WITHIN: Duration = Duration::from_millis(800);
const MISSES: u32 = 2;
const RECONNECT_AFTER: Duration = Duration::from_secs(8);

pub struct Health {
    /// Of the publishing connections.
    pub cluster: Arc<Cluster>,
    pub canary: Arc<Canary>,
    pub metrics: Arc<Metrics>,
    pub state: watch::Sender<LaneState>,
}

impl Health {
    /// Runs as long as the lane does.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = self.watch() => {}
            () = stop.cancelled() => self.is_down("the durable lane was closed".into()),
        }
    }

    async fn watch(&self) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut misses, mut well) = (0, Instant::now());
        loop {
            if misses == 0 || misses >= MISSES {
                ticks.tick().await;
            }
            match self.canary.probe(WITHIN).await {
                Ok(elapsed) => {
                    (misses, well) = (0, Instant::now());
                    self.metrics.probed(Lane::Durable, elapsed);
                    self.is_up();
                }
                Err(error) => {
                    misses += 1;
                    if misses >= MISSES {
                        self.is_down(error.to_string());
                    }
                    if well.elapsed() > RECONNECT_AFTER {
                        // A service that answers and whose broker stores nothing: another may know a better one.
                        self.cluster.turn();
                        well = Instant::now();
                    }
                }
            }
        }
    }

    fn is_up(&self) {
        if self.state.send_if_modified(|state| std::mem::replace(state, LaneState::Up) != LaneState::Up) {
            info!("The durable lane is up.");
        }
    }

    fn is_down(&self, why: String) {
        self.state.send_if_modified(|state| {
            if state.is_up() {
                warn!(%why, "The durable lane is down.");
            }
            let down = LaneState::Down(why);
            let changed = *state != down;
            *state = down;
            changed
        });
    }
}

/// Writes where this bridge may: in the namespace of the first durable route that lets it.
pub struct Canary {
    policy: Policy,
    producers: Arc<Producers>,
    /// Which of the namespaces took the last probe.
    at: AtomicUsize,
}

impl Canary {
    pub fn new(policy: Policy, producers: Arc<Producers>) -> Self {
        Self { policy, producers, at: AtomicUsize::new(0) }
    }

    /// A write and its receipt, timed.
    pub async fn probe(&self, within: Duration) -> Result<Duration, LaneError> {
        let topics = self.topics();
        let at = self.at.load(Ordering::Relaxed) % topics.len();
        let began = Instant::now();
        let probed = self.producers.probe(&topics[at], Draft::default().accept(), within).await;
        if let Err(LaneError::Forbidden(_) | LaneError::BadRequest(_)) = probed {
            // What is refused here may be allowed in the next.
            self.at.store(at + 1, Ordering::Relaxed);
        }
        probed.map(|_| began.elapsed())
    }

    /// One for each namespace of the durable routes; at least one.
    fn topics(&self) -> Vec<Physical> {
        let table = self.policy.table();
        let durable = table.routes().iter().filter(|route| route.lane.takes(Lane::Durable));
        let canary =
            |topic: Physical| Physical::parse(format!("persistent://{}/{CANARY}", topic.namespace()));
        let found = durable.filter_map(|route| Physical::parse(route.pulsar.apply("x"))).filter_map(canary);
        let found: BTreeSet<_> = found.collect();
        match found.is_empty() {
            false => found.into_iter().collect(),
            true => {
                Physical::parse(format!("persistent://{DEFAULT_NAMESPACE}/{CANARY}")).into_iter().collect()
            }
        }
    }
}
