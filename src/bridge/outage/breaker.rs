//! Which topics of the durable lane are tried, and which are refused at once.
//!
//! ```text
//! closed ──three failures in a row──▶ open ──after a while──▶ half open: one publish is let through
//!   ▲                                  ▲                         │            │
//!   │                                  └── it fails, or is silent ┘            │
//!   └─────────────────────────────── it succeeds ────────────────────────────┘
//! ```
//! Only topics that failed lately are remembered; while there are none, a publish costs one atomic load here. A lane
//! that is down refuses by itself, and what fails meanwhile says nothing of a topic.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use crate::lane::contract::{LaneError, LaneState};
use crate::topic::Topic;

const FAILURES: u32 = 3;
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
const BACKOFF_LAST: Duration = Duration::from_secs(5);
/// Topics that failed lately. What fails beyond that is not remembered: such a topic is tried each time.
const CIRCUITS_MAX: usize = 1000;
/// A topic that nobody publishes to is forgotten after this, whatever it was.
const FORGET: Duration = Duration::from_secs(60);

pub struct Breaker {
    lane: watch::Receiver<LaneState>,
    /// How long a probe may be silent.
    patience: Duration,
    /// Counts how often the lane went down: a failure of before says nothing of after.
    era: AtomicU64,
    remembered: AtomicUsize,
    circuits: Mutex<HashMap<Topic, Circuit>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BreakerState {
    Closed = 0,
    HalfOpen = 1,
    Open = 2,
}

impl BreakerState {
    pub fn as_str(self) -> &'static str {
        match self {
            BreakerState::Closed => "closed",
            BreakerState::HalfOpen => "half-open",
            BreakerState::Open => "open",
        }
    }
}

struct Circuit {
    failures: u32,
    why: String,
    touched: Instant,
    /// Where it is open: when a probe may go, and when the one that went did.
    probe_at: Instant,
    probing_since: Option<Instant>,
}

/// A topic is open, and will be tried again then.
#[derive(Debug)]
pub struct Open {
    why: String,
    pub again_at: Instant,
}

impl Open {
    pub fn on_lane(self) -> LaneError {
        LaneError::Unavailable(format!("the topic's breaker is open after failures in a row: {}", self.why))
    }
}

/// Leave to try a topic. What came of it is to be told.
#[derive(Debug, Clone, Copy)]
pub struct Pass {
    era: u64,
    is_probe: bool,
}

impl Breaker {
    pub fn new(lane: watch::Receiver<LaneState>, patience: Duration) -> Self {
        Self {
            lane,
            patience,
            era: AtomicU64::new(0),
            remembered: AtomicUsize::new(0),
            circuits: Mutex::default(),
        }
    }

    pub fn admit(&self, topic: &Topic) -> Result<Pass, Open> {
        self.admit_at(topic, Instant::now)
    }

    /// The clock is not read where nothing failed.
    fn admit_at(&self, topic: &Topic, clock: impl Fn() -> Instant) -> Result<Pass, Open> {
        let pass = Pass { era: self.era.load(Ordering::Acquire), is_probe: false };
        if self.remembered.load(Ordering::Acquire) == 0 {
            return Ok(pass);
        }
        let now = clock();
        let mut circuits = self.lock();
        let Some(circuit) = circuits.get_mut(topic) else { return Ok(pass) };
        circuit.touched = now;
        if circuit.failures < FAILURES {
            return Ok(pass);
        }
        if circuit.probing_since.is_some_and(|since| now - since >= self.patience) {
            circuit.fail(now, "the publish that tried it brought no answer");
        }
        if circuit.probing_since.is_some() || now < circuit.probe_at {
            return Err(Open {
                why: circuit.why.clone(),
                again_at: circuit.probe_at.max(now + BACKOFF_FIRST),
            });
        }
        circuit.probing_since = Some(now);
        Ok(Pass { is_probe: true, ..pass })
    }

    /// What came of a publish.
    pub fn heard(&self, topic: &Topic, pass: Pass, outcome: Result<(), &LaneError>) {
        self.heard_at(topic, pass, outcome, Instant::now);
    }

    fn heard_at(
        &self,
        topic: &Topic,
        pass: Pass,
        outcome: Result<(), &LaneError>,
        clock: impl Fn() -> Instant,
    ) {
        match outcome {
            Ok(()) if self.remembered.load(Ordering::Acquire) == 0 => {}
            Ok(()) => {
                let mut circuits = self.lock();
                if circuits.remove(topic).is_some_and(|circuit| circuit.failures >= FAILURES) {
                    info!(%topic, "The topic takes messages again.");
                }
                self.count(&circuits);
            }
            Err(error) if is_outage(error) => self.failed(topic, pass, error, clock()),
            // It was refused, which tells nothing of the way there: the next one is the probe.
            Err(_) if pass.is_probe => {
                if let Some(circuit) = self.lock().get_mut(topic) {
                    circuit.probing_since = None;
                }
            }
            Err(_) => {}
        }
    }

    fn failed(&self, topic: &Topic, pass: Pass, error: &LaneError, now: Instant) {
        let mut circuits = self.lock();
        let since_then = self.era.load(Ordering::Acquire) != pass.era || !self.lane.borrow().is_up();
        if since_then {
            if let Some(circuit) = circuits.get_mut(topic).filter(|_| pass.is_probe) {
                circuit.probing_since = None;
            }
            return;
        }
        if circuits.len() >= CIRCUITS_MAX && !circuits.contains_key(topic) {
            circuits.retain(|_, circuit| now - circuit.touched < FORGET);
            if circuits.len() >= CIRCUITS_MAX {
                return;
            }
        }
        let circuit = circuits.entry(topic.clone()).or_insert_with(|| Circuit {
            failures: 0,
            why: String::new(),
            touched: now,
            probe_at: now,
            probing_since: None,
        });
        // What was let through before it opened adds nothing to it.
        if circuit.failures < FAILURES || pass.is_probe {
            circuit.fail(now, &error.to_string());
            if circuit.failures == FAILURES {
                warn!(%topic, %error, "The topic takes nothing: its breaker is open.");
            }
        }
        self.count(&circuits);
    }

    /// What failed up to now says nothing of what comes.
    pub fn lane_went_down(&self) {
        self.era.fetch_add(1, Ordering::AcqRel);
    }

    /// A heartbeat went through: every topic that is open may be tried at once.
    pub fn lane_came_up(&self) {
        self.lane_came_up_at(Instant::now());
    }

    fn lane_came_up_at(&self, now: Instant) {
        for circuit in self.lock().values_mut() {
            circuit.probe_at = now;
        }
    }

    /// The worst of the lane and its topics, and how many topics are open or half open.
    pub fn state(&self) -> (BreakerState, usize) {
        self.state_at(Instant::now())
    }

    fn state_at(&self, now: Instant) -> (BreakerState, usize) {
        let mut circuits = self.lock();
        circuits.retain(|_, circuit| now - circuit.touched < FORGET);
        self.count(&circuits);
        let states = circuits.values().map(|circuit| circuit.state(now));
        let lane = if self.lane.borrow().is_up() { BreakerState::Closed } else { BreakerState::Open };
        let worst = states.clone().max().unwrap_or(BreakerState::Closed).max(lane);
        (worst, states.filter(|state| *state != BreakerState::Closed).count())
    }

    fn count(&self, circuits: &HashMap<Topic, Circuit>) {
        self.remembered.store(circuits.len(), Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Topic, Circuit>> {
        // The table is whole between any two statements, so a panic elsewhere spoils nothing.
        self.circuits.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Circuit {
    fn fail(&mut self, now: Instant, why: &str) {
        self.failures = self.failures.saturating_add(1);
        self.why = why.to_owned();
        self.touched = now;
        self.probing_since = None;
        self.probe_at = now + backoff(self.failures.saturating_sub(FAILURES));
    }

    fn state(&self, now: Instant) -> BreakerState {
        match self.failures {
            0..FAILURES => BreakerState::Closed,
            _ if self.probing_since.is_some() || now >= self.probe_at => BreakerState::HalfOpen,
            _ => BreakerState::Open,
        }
    }
}

/// Doubled each time, and anywhere in its second half, so that topics do not come back all at once.
pub fn backoff(times: u32) -> Duration {
    let whole = BACKOFF_FIRST.saturating_mul(2_u32.saturating_pow(times)).min(BACKOFF_LAST);
    whole.mul_f64(0.5 + fastrand::f64() / 2.0)
}

/// Whether this is the lane's own trouble. Everything else is an answer.
pub fn is_outage(error: &LaneError) -> bool {
    matches!(error, LaneError::Unavailable(_) | LaneError::OutcomeUnknown(_) | LaneError::Timeout(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    struct Bed {
        lane: watch::Sender<LaneState>,
        breaker: Breaker,
        topic: Topic,
        now: Instant,
    }

    impl Bed {
        fn new() -> Self {
            let lane = watch::Sender::new(LaneState::Up);
            let breaker = Breaker::new(lane.subscribe(), PATIENCE);
            Self { breaker, lane, topic: Topic::parse("a").unwrap(), now: Instant::now() }
        }

        fn fail(&self, pass: Pass) {
            let lost = LaneError::Unavailable("lost".into());
            self.hear(pass, Err(&lost));
        }

        fn hear(&self, pass: Pass, outcome: Result<(), &LaneError>) {
            self.breaker.heard_at(&self.topic, pass, outcome, || self.now);
        }

        fn admit(&self) -> Result<Pass, Open> {
            self.breaker.admit_at(&self.topic, || self.now)
        }

        fn state(&self) -> (BreakerState, usize) {
            self.breaker.state_at(self.now)
        }

        fn open(&self) {
            for _ in 0..FAILURES {
                self.fail(self.admit().unwrap());
            }
        }
    }

    #[test]
    fn three_failures_in_a_row_open_a_topic_and_one_probe_that_succeeds_closes_it() {
        let mut bed = Bed::new();
        for _ in 0..2 {
            bed.fail(bed.admit().unwrap());
        }
        bed.hear(bed.admit().unwrap(), Ok(()));
        assert_eq!(bed.state(), (BreakerState::Closed, 0), "a success in between begins anew");
        bed.open();
        assert_eq!(bed.state(), (BreakerState::Open, 1));
        let said = bed.admit().unwrap_err().on_lane().to_string();
        assert!(said.contains("lost") && said.ends_with("nothing was sent or stored"), "{said}");
        assert!(bed.breaker.admit(&Topic::parse("b").unwrap()).is_ok(), "others take no notice");

        bed.now += BACKOFF_FIRST;
        assert_eq!(bed.state(), (BreakerState::HalfOpen, 1));
        let probe = bed.admit().unwrap();
        assert!(bed.admit().is_err(), "exactly one");
        bed.hear(probe, Ok(()));
        assert_eq!(bed.state(), (BreakerState::Closed, 0));
        assert!(bed.admit().is_ok());
    }

    #[test]
    fn a_probe_that_fails_or_is_silent_opens_it_again_for_longer_up_to_five_seconds() {
        let mut bed = Bed::new();
        bed.open();
        for times in 1..=8 {
            bed.now += BACKOFF_LAST;
            let probe = bed.admit().unwrap();
            match times % 2 {
                0 => bed.fail(probe),
                _ => bed.now += PATIENCE,
            }
            let again_at = bed.admit().unwrap_err().again_at;
            let least = BACKOFF_FIRST * 2_u32.pow(times) / 2;
            let wait = again_at - bed.now;
            assert!(wait >= least.min(BACKOFF_LAST / 2) && wait <= BACKOFF_LAST, "{times}: {wait:?}");
        }
        bed.now += FORGET;
        assert_eq!(bed.state(), (BreakerState::Closed, 0), "nobody asks for it any more");
    }

    #[test]
    fn refusals_open_nothing_and_a_probe_that_is_refused_leaves_the_next_to_try() {
        let mut bed = Bed::new();
        let too_large = LaneError::TooLarge { size: 2, max: 1 };
        for _ in 0..FAILURES * 2 {
            bed.hear(bed.admit().unwrap(), Err(&too_large));
        }
        assert!(bed.admit().is_ok());
        bed.open();
        bed.now += BACKOFF_FIRST;
        bed.hear(bed.admit().unwrap(), Err(&too_large));
        assert!(bed.admit().is_ok());
    }

    #[test]
    fn what_fails_with_the_whole_lane_opens_no_topic() {
        let bed = Bed::new();
        let before = [(); 3].map(|()| bed.admit().unwrap());
        bed.lane.send_replace(LaneState::Down("gone".into()));
        bed.breaker.lane_went_down();
        assert_eq!(bed.state(), (BreakerState::Open, 0));
        bed.open();
        bed.lane.send_replace(LaneState::Up);
        before.into_iter().for_each(|pass| bed.fail(pass));
        assert_eq!(bed.state(), (BreakerState::Closed, 0));
    }

    #[test]
    fn a_lane_that_comes_back_has_its_open_topics_tried_at_once() {
        let bed = Bed::new();
        bed.open();
        bed.lane.send_replace(LaneState::Down("gone".into()));
        bed.breaker.lane_went_down();
        assert!(bed.admit().is_err());
        bed.lane.send_replace(LaneState::Up);
        bed.breaker.lane_came_up_at(bed.now);
        let probe = bed.admit().unwrap();
        assert!(bed.admit().is_err(), "by one publish");
        bed.hear(probe, Ok(()));
        assert_eq!(bed.state(), (BreakerState::Closed, 0));
    }

    #[test]
    fn a_bounded_number_of_topics_is_remembered() {
        let bed = Bed::new();
        let lost = LaneError::OutcomeUnknown("lost".into());
        for n in 0..CIRCUITS_MAX * 2 {
            let topic = Topic::parse(&format!("t{n}")).unwrap();
            bed.breaker.heard(&topic, bed.breaker.admit(&topic).unwrap(), Err(&lost));
        }
        assert_eq!(bed.breaker.lock().len(), CIRCUITS_MAX);
    }
}
