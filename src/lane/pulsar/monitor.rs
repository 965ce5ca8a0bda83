//! What a Pulsar broker tells of itself, by its admin API and its metrics.

use super::admin::Admin;
use crate::lane::contract::BrokerReport;

/// Asks for the version and the broker's own sums. These are in its metrics, which also have lines for every topic, so
/// this is for every ten seconds rather than every one.
pub async fn report(admin: &Admin) -> BrokerReport {
    let (version, sums) = tokio::join!(admin.version(), admin.metrics());
    let problem = version.as_ref().err().or(sums.as_ref().err()).map(ToString::to_string);
    let sums = sums.unwrap_or_default();
    let sum = |name| value(&sums, name);
    let count = |name| sum(name).map(|count| count as u64);
    BrokerReport {
        version: version.ok(),
        connections: count("pulsar_active_connections"),
        subscriptions: count("pulsar_broker_subscriptions_count"),
        // It cuts off nobody for reading slowly.
        slow_consumers: None,
        in_rate: sum("pulsar_broker_rate_in"),
        out_rate: sum("pulsar_broker_rate_out"),
        problem,
    }
}

/// The first sample of a family in the text exposition.
fn value(exposition: &str, name: &str) -> Option<f64> {
    let sample = exposition
        .lines()
        .find_map(|line| line.strip_prefix(name).filter(|rest| rest.starts_with(['{', ' '])))?;
    sample.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_found_by_its_whole_name() {
        let said =
            "# TYPE pulsar_rate gauge\npulsar_rate_in{a=\"x y\"} 2.5\npulsar_rate{a=\"b\"} 1.0\nplain 7\n";
        assert_eq!(value(said, "pulsar_rate"), Some(1.0));
        assert_eq!(value(said, "pulsar_rate_in"), Some(2.5));
        assert_eq!(value(said, "plain"), Some(7.0));
        assert_eq!(value(said, "pulsar"), None);
    }
}
