//! The canary: a heartbeat through each lane every second, there and back, and what the lane's state is by it.
//!
//! ```text
//!          three heartbeats in a row are missing, or topics' breakers are open
//!        ┌────────────────────────────────────────────────────────────────────▶┐
//!       up                                                                  degraded
//!        └◀────────────────────────────────────────────────────────────────────┘
//!          two in a row are back, and no breaker is open
//!
//! either ──the lane itself says so, within 3 s──▶ down ──it says so──▶ up
//! ```
//! Both are measured alike, by the clock of this process, so the lanes compare.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::outage::Outage;
use crate::lane::contract::{DurableLane, EphemeralLane, LaneError, LaneState};
use crate::message::{Lane, Timestamp};
use crate::telemetry::metrics::Metrics;

const EVERY: Duration = Duration::from_secs(1);
/// A lane answers within its own deadline, which is shorter.
const WITHIN: Duration = Duration::from_secs(2);
const MISSES: u32 = 3;
const RETURNS: u32 = 2;
/// What percentiles are taken of.
const WINDOW: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    Down = 0,
    Degraded = 1,
    Up = 2,
}

impl Standing {
    pub fn as_str(self) -> &'static str {
        match self {
            Standing::Down => "down",
            Standing::Degraded => "degraded",
            Standing::Up => "up",
        }
    }
}

/// How a lane stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    pub standing: Standing,
    pub since: Timestamp,
    /// In a sentence, where it is not up.
    pub why: Option<String>,
    pub heartbeats: Heartbeats,
}

/// The heartbeats of the last minute.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Heartbeats {
    pub count: usize,
    pub missing: usize,
    /// `None` where none came back.
    pub p50: Option<Duration>,
    pub p99: Option<Duration>,
    /// The newest that came back.
    pub last: Option<Duration>,
}

pub struct Canary {
    ephemeral: Arc<dyn EphemeralLane>,
    durable: Arc<dyn DurableLane>,
    outage: Outage,
    metrics: Arc<Metrics>,
    records: [Mutex<Record>; 2],
}

impl Canary {
    pub fn new(
        ephemeral: Arc<dyn EphemeralLane>,
        durable: Arc<dyn DurableLane>,
        outage: Outage,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self { ephemeral, durable, outage, metrics, records: Lane::ALL.map(|_| Mutex::default()) }
    }

    pub fn report(&self, lane: Lane) -> Report {
        self.look(lane).report(Instant::now())
    }

    pub fn standing(&self, lane: Lane) -> Standing {
        self.look(lane).standing
    }

    /// What is wrong with a lane's broker, if it is down.
    pub fn why_down(&self, lane: Lane) -> Option<String> {
        match &*self.state(lane).borrow() {
            LaneState::Up => None,
            LaneState::Down(why) => Some(why.clone()),
        }
    }

    /// Sends heartbeats, until the process ends.
    pub async fn run(&self) {
        tokio::join!(self.watch(Lane::Ephemeral), self.watch(Lane::Durable));
    }

    async fn watch(&self, lane: Lane) {
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let beat = self.probe(lane).await;
            match &beat {
                Ok(took) => self.metrics.probed(lane, *took),
                Err(_) => self.metrics.probe_failed(lane),
            }
            self.record(lane).add(Instant::now(), beat.map_err(|error| error.to_string()));
            drop(self.look(lane));
        }
    }

    async fn probe(&self, lane: Lane) -> Result<Duration, LaneError> {
        let probing = async {
            match lane {
                Lane::Ephemeral => self.ephemeral.probe().await,
                Lane::Durable => self.durable.probe().await,
            }
        };
        let late = |_| LaneError::Unavailable(format!("no heartbeat came back within {WITHIN:?}"));
        timeout(WITHIN, probing).await.map_err(late)?
    }

    /// Brings the record up to now.
    fn look(&self, lane: Lane) -> MutexGuard<'_, Record> {
        let down = self.why_down(lane);
        let open = if lane == Lane::Durable { self.outage.standing().open_topics } else { 0 };
        let mut record = self.record(lane);
        record.judge(down, open);
        self.metrics.lane_stands(lane, record.standing as i64);
        record
    }

    fn state(&self, lane: Lane) -> watch::Receiver<LaneState> {
        match lane {
            Lane::Ephemeral => self.ephemeral.state(),
            Lane::Durable => self.durable.state(),
        }
    }

    fn record(&self, lane: Lane) -> MutexGuard<'_, Record> {
        // It is whole between any two statements, so a panic elsewhere spoils nothing.
        self.records[lane as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The heartbeats of one lane, and what was made of them.
struct Record {
    beats: VecDeque<(Instant, Option<Duration>)>,
    /// In a row.
    misses: u32,
    returns: u32,
    /// Why heartbeats are missing, where they are.
    missing: Option<String>,
    standing: Standing,
    since: Timestamp,
    why: Option<String>,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            beats: VecDeque::new(),
            misses: 0,
            returns: 0,
            missing: None,
            standing: Standing::Down,
            since: Timestamp::now(),
            why: None,
        }
    }
}

impl Record {
    fn add(&mut self, now: Instant, beat: Result<Duration, String>) {
        self.beats.retain(|(at, _)| now - *at < WINDOW);
        self.beats.push_back((now, beat.as_ref().ok().copied()));
        match beat {
            Ok(_) => {
                (self.misses, self.returns) = (0, self.returns.saturating_add(1));
                if self.returns >= RETURNS {
                    self.missing = None;
                }
            }
            Err(why) => {
                (self.misses, self.returns) = (self.misses.saturating_add(1), 0);
                if self.misses >= MISSES {
                    self.missing = Some(why);
                }
            }
        }
    }

    fn judge(&mut self, down: Option<String>, open_topics: usize) {
        let (standing, why) = match (down, &self.missing) {
            (Some(why), _) => {
                // What is missing meanwhile is missing for this reason.
                (self.misses, self.missing) = (0, None);
                (Standing::Down, Some(why))
            }
            (None, Some(why)) => (Standing::Degraded, Some(why.clone())),
            (None, None) if open_topics > 0 => (
                Standing::Degraded,
                Some(format!("{open_topics} topics take nothing: their breakers are open")),
            ),
            (None, None) => (Standing::Up, None),
        };
        if standing != self.standing {
            (self.standing, self.since) = (standing, Timestamp::now());
        }
        self.why = why;
    }

    fn report(&self, now: Instant) -> Report {
        let recent = || self.beats.iter().filter(|(at, _)| now - *at < WINDOW).map(|(_, beat)| *beat);
        let mut back: Vec<_> = recent().flatten().collect();
        let last = back.last().copied();
        back.sort_unstable();
        let count = recent().count();
        let heartbeats = Heartbeats {
            count,
            missing: count - back.len(),
            p50: percentile(&back, 50),
            p99: percentile(&back, 99),
            last,
        };
        Report { standing: self.standing, since: self.since, why: self.why.clone(), heartbeats }
    }
}

/// Of sorted values, the smallest that so many of a hundred do not exceed.
fn percentile(sorted: &[Duration], of_100: usize) -> Option<Duration> {
    sorted.get((sorted.len() * of_100).div_ceil(100).checked_sub(1)?).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BACK: Result<Duration, String> = Ok(Duration::from_millis(2));

    fn missing() -> Result<Duration, String> {
        Err("nobody heard it".into())
    }

    fn standing(record: &mut Record, beat: Result<Duration, String>) -> Standing {
        record.add(Instant::now(), beat);
        record.judge(None, 0);
        record.standing
    }

    #[test]
    fn three_missing_heartbeats_degrade_a_lane_and_two_that_are_back_mend_it() {
        let mut record = Record::default();
        assert_eq!(standing(&mut record, BACK), Standing::Up);
        for _ in 0..MISSES - 1 {
            assert_eq!(standing(&mut record, missing()), Standing::Up);
        }
        assert_eq!(standing(&mut record, BACK), Standing::Up, "one that is back begins anew");
        for _ in 0..MISSES {
            standing(&mut record, missing());
        }
        let report = record.report(Instant::now());
        assert_eq!((report.standing, report.why.as_deref()), (Standing::Degraded, Some("nobody heard it")));
        assert_eq!(standing(&mut record, BACK), Standing::Degraded);
        assert_eq!(standing(&mut record, missing()), Standing::Degraded);
        assert_eq!(standing(&mut record, BACK), Standing::Degraded);
        assert_eq!(standing(&mut record, BACK), Standing::Up);
    }

    #[test]
    fn a_lane_that_is_down_says_why_and_is_up_as_soon_as_it_says_so() {
        let mut record = Record::default();
        standing(&mut record, BACK);
        let up_since = record.since;
        record.judge(Some("it froze".into()), 3);
        assert_eq!((record.standing, record.why.as_deref()), (Standing::Down, Some("it froze")));
        assert!(record.since >= up_since);
        for _ in 0..MISSES {
            record.add(Instant::now(), missing());
            record.judge(Some("it froze".into()), 3);
        }
        record.judge(None, 0);
        assert_eq!((record.standing, record.why.as_deref()), (Standing::Up, None));
        record.judge(None, 1);
        assert_eq!(record.standing, Standing::Degraded, "a topic's breaker is open");
    }

    #[test]
    fn percentiles_are_those_of_the_last_minute() {
        let mut record = Record::default();
        let begun = Instant::now();
        record.add(begun, Ok(Duration::from_secs(9)));
        for n in 1..=50_u64 {
            record.add(begun + EVERY * n as u32, Ok(Duration::from_millis(n)));
        }
        record.add(begun + WINDOW, missing());
        let heartbeats = record.report(begun + WINDOW).heartbeats;
        assert_eq!((heartbeats.count, heartbeats.missing), (51, 1));
        let millis = |n| Some(Duration::from_millis(n));
        assert_eq!((heartbeats.p50, heartbeats.p99, heartbeats.last), (millis(25), millis(50), millis(50)));
        let later = record.report(begun + WINDOW * 2).heartbeats;
        assert_eq!((later.count, later.p50), (0, None));
    }
}
