//! Whether the broker takes writes: a small message, written and confirmed every second, as publishers' messages are.
//!
//! ```text
//! connecting ──a probe is confirmed──▶ up ──two in a row are not──▶ down ──a probe is confirmed──▶ up
//!                                                                    └──every 8 s──▶ connect anew, to the next URL
//! ```
//! Nothing less tells a broker that answers from one that stores: a frozen process keeps its sockets, and a broker
//! without its bookies keeps answering pings. The price, with the bridge's heartbeats (`heartbeat.rs`), is two messages of
//! some 150 bytes a second, which their namespace's retention removes with everything else.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::cluster::Cluster;
use super::fault::Fault;
use super::heartbeat::Heartbeat;
use crate::lane::contract::LaneState;

const EVERY: Duration = Duration::from_secs(1);
/// Two of them and the second between probes: a broker that froze is down within 3 s.
const WITHIN: Duration = Duration::from_millis(800);
const MISSES: u32 = 2;
const RECONNECT_AFTER: Duration = Duration::from_secs(8);

pub struct Health {
    /// Of the publishing connections.
    pub cluster: Arc<Cluster>,
    pub heartbeat: Arc<Heartbeat>,
    pub state: watch::Sender<LaneState>,
}

impl Health {
    /// Runs as long as the lane does.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = self.watch() => {}
            () = stop.cancelled() => self.is_down(Fault::Closed.to_string()),
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
            match self.heartbeat.write(WITHIN).await {
                Ok(()) => {
                    (misses, well) = (0, Instant::now());
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
