//! The lanes: two contracts, two carriers each.

pub mod bus;
pub mod contract;
pub mod follow;
pub mod headers;
pub mod history;
pub mod interest;
pub mod journal;
pub mod nats;
pub mod pulsar;
pub mod recent;
pub mod settings;
pub mod slot;
pub mod tail;

use std::path::Path;
use std::sync::Arc;

use crate::policy::Policy;
use crate::telemetry::metrics::Metrics;
use bus::Bus;
use contract::{DurableLane, EphemeralLane};
use journal::Journal;
use nats::Nats;
use pulsar::PulsarLane;
use settings::{DurableBackend, DurableSettings, EphemeralBackend, EphemeralSettings};

/// Why a lane cannot be opened. A broker that is away is no reason: the lane is then down until it comes.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the ephemeral lane over NATS cannot be opened")]
    Nats(#[from] nats::OpenError),
    #[error("the embedded log cannot be opened")]
    Journal(#[from] journal::JournalError),
    #[error("the durable lane over Pulsar cannot be opened")]
    Pulsar(#[from] pulsar::Unusable),
}

/// Opens the carrier that the settings name.
pub async fn open_ephemeral(
    settings: &EphemeralSettings,
    policy: Policy,
    metrics: Arc<Metrics>,
) -> Result<Arc<dyn EphemeralLane>, OpenError> {
    Ok(match settings.backend {
        EphemeralBackend::Memory => Bus::new(policy, settings.history_bytes),
        EphemeralBackend::Nats => Nats::open(settings, policy, metrics).await?,
    })
}

/// The same for the durable lane; the embedded log is in `data_dir`.
pub async fn open_durable(
    settings: &DurableSettings,
    data_dir: &Path,
    policy: Policy,
    metrics: Arc<Metrics>,
) -> Result<Arc<dyn DurableLane>, OpenError> {
    Ok(match settings.backend {
        DurableBackend::Embedded => Journal::open(data_dir, policy, settings.publish_timeout, metrics)?,
        DurableBackend::Pulsar => PulsarLane::open(settings, policy, metrics)?,
    })
}

/// Both brokers' clients and the calls over HTTP speak TLS by one library, which wants to be told by what means.
pub fn install_crypto() {
    // The second call of a process changes nothing.
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod testing {
    use crate::message::Lanes;
    use crate::policy::table::{
        Compression, Declare, Live, OnOutage, Overflow, PulsarSchema, Redelivery, Retention, Route, Template,
    };
    use crate::topic::Pattern;

    /// An ephemeral route as a test needs one.
    pub fn ephemeral(pattern: &str) -> Route {
        let template = Template::parse("{topic}").unwrap();
        Route {
            name: pattern.into(),
            pattern: Pattern::parse(pattern).unwrap(),
            lane: Lanes::EPHEMERAL,
            nats: template.clone(),
            pulsar: template,
            history: 100,
            retain: false,
            queue: 100,
            overflow: Overflow::DropOldest,
            live: Live::AfterStore,
            outage: OnOutage::Reject,
            retention: Retention::default(),
            declare: Declare::Auto,
            dedup_window: std::time::Duration::ZERO,
            redelivery: Redelivery::default(),
            compression: Compression::None,
            pulsar_schema: PulsarSchema::Bytes,
            max_payload: None,
            schema: None,
        }
    }
}
