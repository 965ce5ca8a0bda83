//! Whether the broker takes writes: a small message, written and confirmed every second, as publishers' messages are.
//!
//! ```text
//! connecting ──a probe is confirmed──▶ up ──two in a row are not──▶ down ──a probe is confirmed──▶ up
//!                                                                    └──for 8 s──▶ connect anew, to the next URL
//! ```
//! Nothing less tells a broker that answers from one that stores: a frozen process keeps its sockets, and a broker
//! without its bookies keeps answering pings. The price is a message of some 150 bytes a second on one topic, which
//! its namespace's retention removes with everything else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pulsar::{ConnectionRetryOptions, OperationRetryOptions, Pulsar, TokioExecutor};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::append::{Client, Producers};
use super::credentials::Credentials;
use super::feed::Backoff;
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
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Health {
    pub urls: Vec<String>,
    pub credentials: Credentials,
    pub publish_timeout: Duration,
    pub canary: Arc<Canary>,
    pub metrics: Arc<Metrics>,
    pub client: watch::Sender<Option<Client>>,
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
        let mut backoff = Backoff::default();
        for url in self.urls.iter().cycle() {
            match self.connect(url).await {
                Ok(client) => {
                    self.client.send_replace(Some(client));
                    self.probe_while_it_heals().await;
                    // A new connection cures what waiting does not: the crate notices a dead peer late.
                }
                Err(why) => self.is_down(format!("cannot connect to {url}: {why}")),
            }
            backoff.wait().await;
        }
    }

    /// Probes until the lane has been down for too long.
    async fn probe_while_it_heals(&self) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut misses, mut well) = (0, Instant::now());
        while well.elapsed() < RECONNECT_AFTER {
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
                }
            }
        }
    }

    async fn connect(&self, url: &str) -> Result<Client, String> {
        let retries = ConnectionRetryOptions {
            min_backoff: Duration::from_millis(100),
            max_backoff: Duration::from_secs(1),
            // Few, since this lane tries again by itself, at the next URL.
            max_retries: 2,
            connection_timeout: Duration::from_secs(2),
            keep_alive: Duration::from_secs(10),
            ..Default::default()
        };
        let operations = OperationRetryOptions {
            operation_timeout: self.publish_timeout,
            retry_delay: Duration::from_millis(500),
            max_retries: Some(6),
        };
        let mut builder = Pulsar::builder(url, TokioExecutor)
            .with_connection_retry_options(retries)
            .with_operation_retry_options(operations)
            .with_outbound_channel_size(2000);
        if self.credentials.has_token() {
            builder = builder.with_auth_provider(Box::new(self.credentials.clone()));
        }
        if let Some(roots) = &self.credentials.roots {
            builder = builder.with_certificate_chain(roots.clone());
        }
        match timeout(CONNECT_TIMEOUT, builder.build()).await {
            Ok(built) => built.map_err(|error| error.to_string()),
            Err(_) => Err("no answer in time".into()),
        }
    }

    fn is_up(&self) {
        self.metrics.lane_is(Lane::Durable, true);
        if self.state.send_if_modified(|state| std::mem::replace(state, LaneState::Up) != LaneState::Up) {
            info!("The durable lane is up.");
        }
    }

    fn is_down(&self, why: String) {
        self.metrics.lane_is(Lane::Durable, false);
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
        let durable = table.routes().iter().filter(|route| route.lane == Lane::Durable);
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
