//! What is broken when, drawn from a seed before anything begins.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use fastrand::Rng;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL, and started again.
    Killed,
    /// SIGSTOP: the sockets stay open, and nobody is there.
    Frozen,
    /// A black hole: no packet arrives.
    Gone,
    /// Every connection is reset, again and again.
    Reset,
    Slow,
    /// Pulsar is gone, and a bridge's disk is full.
    DiskFull,
    /// A bridge, by SIGKILL.
    BridgeKilled,
    /// A bridge's routes file has a mistake.
    BadRoutes,
}

pub const NATS: [Fault; 5] = [Fault::Killed, Fault::Frozen, Fault::Gone, Fault::Reset, Fault::Slow];
pub const PULSAR: [Fault; 6] =
    [Fault::Frozen, Fault::Gone, Fault::Reset, Fault::Slow, Fault::DiskFull, Fault::Killed];
pub const BRIDGE: [Fault; 2] = [Fault::BridgeKilled, Fault::BadRoutes];

/// A standalone Pulsar that was killed serves again after so long.
const PULSAR_RETURNS: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// How long all is well before it.
    pub pause: Duration,
    pub fault: Fault,
    pub lasts: Duration,
    /// Which one, where it is a bridge's.
    pub bridge: usize,
}

pub struct Plan {
    pub seed: u64,
    pub nats: Vec<Step>,
    pub pulsar: Vec<Step>,
    pub bridges: Vec<Step>,
}

impl Plan {
    pub fn draw(seed: u64, minutes: u64, bridges: usize) -> Self {
        let mut random = Rng::with_seed(seed);
        let time = Duration::from_secs(60 * minutes);
        // Whoever is asked how it is needs 5 s to know, both ways.
        let (pause, lasts) = (7..=10, 5..=9);
        Self {
            seed,
            nats: steps(&mut random, time, &NATS, (pause.clone(), lasts.clone()), bridges),
            pulsar: steps(&mut random, time, &PULSAR, (pause, lasts), bridges),
            bridges: steps(&mut random, time, &BRIDGE, (4..=8, 1..=7), bridges),
        }
    }

    /// Each with what it hits.
    pub fn faults(&self) -> Vec<(&'static str, Fault)> {
        self.lanes().flat_map(|(name, steps)| steps.iter().map(move |step| (name, step.fault))).collect()
    }

    fn lanes(&self) -> impl Iterator<Item = (&'static str, &Vec<Step>)> {
        [("nats", &self.nats), ("pulsar", &self.pulsar), ("bridge", &self.bridges)].into_iter()
    }
}

/// One after the other until the time is over. Each deck of faults is drawn to its end before the next.
fn steps(
    random: &mut Rng,
    time: Duration,
    deck: &[Fault],
    (pauses, lasts): (RangeInclusive<u64>, RangeInclusive<u64>),
    bridges: usize,
) -> Vec<Step> {
    let (mut steps, mut left, mut now) = (Vec::new(), Vec::new(), Duration::ZERO);
    loop {
        if left.is_empty() {
            left = deck.to_vec();
            random.shuffle(&mut left);
        }
        let [pause, lasts] = [pauses.clone(), lasts.clone()]
            .map(|of| Duration::from_millis(random.u64(of.start() * 1000..=of.end() * 1000)));
        now += pause + lasts;
        if now > time {
            return steps;
        }
        let fault = left.pop().expect("it was filled");
        steps.push(Step { pause, fault, lasts, bridge: random.usize(..bridges) });
        if fault == Fault::Killed && deck == PULSAR {
            now += PULSAR_RETURNS;
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "SEED={}", self.seed)?;
        for (name, steps) in self.lanes() {
            for Step { pause, fault, lasts, bridge } in steps {
                writeln!(f, "  {name}: {fault:?} for {lasts:?} after {pause:?} (bridge {bridge})")?;
            }
        }
        Ok(())
    }
}

#[test]
fn a_seed_draws_the_same_plan_each_time_and_another_seed_another() {
    assert_eq!(Plan::draw(7, 3, 3).to_string(), Plan::draw(7, 3, 3).to_string());
    let plans: std::collections::BTreeSet<_> =
        (0..50).map(|seed| format!("{:?}", Plan::draw(seed, 1, 3).faults())).collect();
    assert!(plans.len() > 40, "{}", plans.len());
}
