//! Observation: what every layer reports to.

pub mod log;
pub mod metrics;
#[cfg(feature = "otel")]
mod otlp;
pub mod trace;
pub mod traffic;
