//! Observation: what every layer reports to.

pub mod log;
pub mod metrics;
pub mod traffic;
