//! How long to wait before something is tried again.

use std::time::Duration;

/// Doubles from `first` to `max`. Half of each wait is chance, so that those who failed together do not come back
/// together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    pub first: Duration,
    pub max: Duration,
}

impl Backoff {
    /// The wait after so many failures before this one.
    pub fn delay(self, failures: u32) -> Duration {
        let whole = self.first.saturating_mul(2_u32.saturating_pow(failures)).min(self.max);
        whole.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_doubles_up_to_its_bound_and_is_never_the_same_for_all() {
        let backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_secs(1) };
        for (failures, whole) in [(0, 100), (1, 200), (3, 800), (4, 1000), (u32::MAX, 1000)] {
            let waits: Vec<_> = (0..100).map(|_| backoff.delay(failures)).collect();
            let whole = Duration::from_millis(whole);
            assert!(waits.iter().all(|wait| (whole / 2..=whole).contains(wait)), "{failures}: {waits:?}");
            assert!(waits.iter().any(|wait| *wait != waits[0]), "{failures}");
        }
    }
}
