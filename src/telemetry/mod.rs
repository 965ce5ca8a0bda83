//! Observation: what every layer reports to.

pub mod metrics;
pub mod traffic;

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// The brokers' clients tell every reconnect and every dropped message; the lanes say the same once, in sentences.
const FILTER_DEFAULT: &str = "info,async_nats=warn,pulsar=error";

/// Logs to standard error, at the level of `RUST_LOG` where it is set.
pub fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER_DEFAULT));
    // A second call in one process (tests) keeps the first.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(std::io::stderr().is_terminal());
    let _ = log.with_writer(std::io::stderr).try_init();
}
