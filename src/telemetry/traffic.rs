//! What went over a lane up to a moment, read from the metrics, and what went between two moments.

use prometheus::core::Collector;
use prometheus::proto::Metric;
use prometheus::{HistogramVec, IntCounterVec};

/// Sums over all routes since the process began.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Traffic {
    /// Messages that were taken from publishers, that were refused, and events that were written to subscribers.
    pub taken: u64,
    pub refused: u64,
    pub written: u64,
    pub dropped: u64,
    pub publish: Latency,
    pub delivery: Latency,
}

impl Traffic {
    pub fn since(&self, before: &Self) -> Self {
        let Self { taken, refused, written, dropped, publish, delivery } = before;
        Self {
            taken: self.taken.saturating_sub(*taken),
            refused: self.refused.saturating_sub(*refused),
            written: self.written.saturating_sub(*written),
            dropped: self.dropped.saturating_sub(*dropped),
            publish: self.publish.since(publish),
            delivery: self.delivery.since(delivery),
        }
    }
}

/// How many took no longer than each of the buckets' bounds, in seconds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Latency(Vec<(f64, u64)>);

impl Latency {
    fn since(&self, before: &Self) -> Self {
        let then = |at: usize| before.0.get(at).map_or(0, |(_, count)| *count);
        let counts = self.0.iter().enumerate();
        Self(counts.map(|(at, (bound, count))| (*bound, count.saturating_sub(then(at)))).collect())
    }

    /// In seconds, as Prometheus' `histogram_quantile` has it: straight within a bucket, and the last bound for what lies
    /// beyond it. `None` where nothing was measured.
    pub fn quantile(&self, quantile: f64) -> Option<f64> {
        let all = self.0.last().filter(|(_, count)| *count > 0)?.1 as f64;
        let rank = quantile * all;
        let at = self.0.iter().position(|(_, count)| *count as f64 >= rank)?;
        let (bound, count) = self.0[at];
        let (floor, below) = at.checked_sub(1).map_or((0.0, 0), |before| self.0[before]);
        if bound.is_infinite() {
            return Some(floor);
        }
        let within = (count - below) as f64;
        let part = if within > 0.0 { (rank - below as f64) / within } else { 1.0 };
        Some(floor + (bound - floor) * part)
    }
}

/// The sum of a lane's counters whose other labels are as wanted.
pub fn sum(counters: &IntCounterVec, lane: &str, wanted: impl Fn(&str, &str) -> bool) -> u64 {
    let families = counters.collect();
    let metrics = families.iter().flat_map(|family| family.get_metric());
    let metrics = metrics.filter(|metric| is_of(metric, lane));
    let metrics =
        metrics.filter(|metric| metric.get_label().iter().all(|label| wanted(label.name(), label.value())));
    metrics.map(|metric| metric.get_counter().get_value() as u64).sum()
}

/// The same of histograms, all of which have the same buckets.
pub fn latency(histograms: &HistogramVec, lane: &str) -> Latency {
    let families = histograms.collect();
    let metrics = families.iter().flat_map(|family| family.get_metric());
    let mut sums = Latency::default();
    for metric in metrics.filter(|metric| is_of(metric, lane)) {
        let histogram = metric.get_histogram();
        let bounded = histogram.get_bucket().iter().map(|b| (b.upper_bound(), b.cumulative_count()));
        // What lies beyond the last bound is in the whole count alone.
        let buckets = bounded.chain([(f64::INFINITY, histogram.get_sample_count())]);
        for (at, (bound, count)) in buckets.enumerate() {
            match sums.0.get_mut(at) {
                Some((_, sum)) => *sum += count,
                None => sums.0.push((bound, count)),
            }
        }
    }
    sums
}

fn is_of(metric: &Metric, lane: &str) -> bool {
    metric.get_label().iter().any(|label| label.name() == "lane" && label.value() == lane)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use crate::message::Lane;
    use crate::telemetry::metrics::Metrics;
    use crate::wire::code::Code;

    #[test]
    fn what_went_between_two_moments_is_told_by_lane_over_all_routes() {
        let metrics = Metrics::new();
        let millis = Duration::from_millis;
        metrics.published(Lane::Durable, "before", 1, millis(9000));
        let before = metrics.traffic(Lane::Durable);
        for _ in 0..99 {
            metrics.published(Lane::Durable, "a", 1, millis(4));
        }
        metrics.published(Lane::Durable, "b", 1, Duration::from_secs(60));
        metrics.published(Lane::Ephemeral, "c", 1, millis(400));
        metrics.publish_failed(Lane::Durable, "b", Code::LaneUnavailable);
        metrics.delivered(Lane::Durable, "a", 10, &[millis(1); 3]);
        let between = metrics.traffic(Lane::Durable).since(&before);
        assert_eq!((between.taken, between.refused, between.written), (100, 1, 3));
        let p50 = between.publish.quantile(0.5).unwrap();
        assert!((0.0025..=0.005).contains(&p50), "{p50}");
        assert_eq!(between.publish.quantile(1.0), Some(10.0), "beyond the last bound nothing is known");
        let nothing = metrics.traffic(Lane::Durable).since(&metrics.traffic(Lane::Durable));
        assert_eq!((nothing.taken, nothing.publish.quantile(0.5)), (0, None));
    }
}
