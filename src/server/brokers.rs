//! What the brokers tell of themselves, asked when somebody wants to know and not more often than they like.

use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::bridge::Bridge;
use crate::lane::contract::BrokerReport;
use crate::message::Lane;

/// How long a report is good for. A Pulsar broker writes up all its topics for it.
const EPHEMERAL_FRESH: Duration = Duration::from_secs(2);
const DURABLE_FRESH: Duration = Duration::from_secs(10);
/// How long whoever asks waits for a new one.
const PATIENCE: Duration = Duration::from_secs(2);

#[derive(Default)]
pub struct Brokers {
    /// Held while one is asked, so that all who want to know meanwhile get that answer.
    reports: [Mutex<Option<Asked>>; 2],
}

struct Asked {
    at: Instant,
    told: Option<BrokerReport>,
}

impl Brokers {
    /// `None` where the lane has no broker.
    pub async fn report(&self, bridge: &Bridge, lane: Lane) -> Option<BrokerReport> {
        let mut known = self.reports[lane as usize].lock().await;
        let (fresh, asking) = match lane {
            Lane::Ephemeral => (EPHEMERAL_FRESH, bridge.ephemeral.broker()),
            Lane::Durable => (DURABLE_FRESH, bridge.durable.broker()),
        };
        match &*known {
            Some(asked) if asked.at.elapsed() < fresh => asked.told.clone(),
            _ => {
                let told = timeout(PATIENCE, asking).await.unwrap_or_else(|_| {
                    let problem = format!("the broker told nothing of itself within {PATIENCE:?}");
                    Some(BrokerReport { problem: Some(problem), ..BrokerReport::default() })
                });
                *known = Some(Asked { at: Instant::now(), told: told.clone() });
                told
            }
        }
    }
}
