//! Publishers that go on whatever happens, and what is asked of storage in the end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tokio::sync::watch;
use tokio::task::JoinSet;
use twinspan::lane::contract::{LaneError, Receipt};
use twinspan::message::{Message, Start};

use super::*;
use crate::durable_contract::read;

/// Numbers of one publisher.
pub const EACH: usize = 1_000_000;
/// What a publisher has under way at most.
const UNDER_WAY: usize = 1000;

/// They number their messages and have many under way.
pub struct Publishers {
    stop: watch::Sender<bool>,
    tasks: JoinSet<Outcome>,
}

/// What became of each publish.
#[derive(Default)]
pub struct Outcome {
    pub acked: BTreeMap<usize, Position>,
    /// Neither confirmed nor certainly not sent.
    pub unknown: BTreeSet<usize>,
    /// Nothing was stored, it was said.
    pub refused: BTreeSet<usize>,
}

impl Publishers {
    /// So many, each with a burst of messages every so often, whose keys are those of their numbers.
    pub fn on(
        bed: &Bed,
        count: usize,
        (burst, pace): (usize, Duration),
        key: fn(usize) -> Option<String>,
    ) -> Self {
        let stop = watch::Sender::new(false);
        let mut tasks = JoinSet::new();
        for publisher in 0..count {
            let (lane, route, topic) = (bed.lane.clone(), bed.route.clone(), bed.topic.clone());
            let stopped = stop.subscribe();
            tasks.spawn(async move {
                let mut outcome = Outcome::default();
                let mut under_way: VecDeque<(usize, Receipt)> = VecDeque::new();
                for n in publisher * EACH.. {
                    if *stopped.borrow() {
                        break;
                    }
                    let message = Message { key: key(n), ..numbered(n) };
                    match lane.append(&route, &topic, message, Publisher(publisher as u64)).await {
                        Ok(receipt) => under_way.push_back((n, receipt)),
                        Err(error) => outcome.note(n, Err(error)),
                    }
                    if under_way.len() > UNDER_WAY {
                        let (n, receipt) = under_way.pop_front().unwrap();
                        outcome.note(n, receipt.await);
                    }
                    if (n + 1) % burst == 0 {
                        tokio::time::sleep(pace).await;
                    }
                }
                for (n, receipt) in under_way {
                    outcome.note(n, receipt.await);
                }
                outcome
            });
        }
        Self { stop, tasks }
    }

    pub async fn end(mut self) -> Outcome {
        self.stop.send_replace(true);
        let mut all = Outcome::default();
        while let Some(outcome) = self.tasks.join_next().await {
            let outcome = outcome.unwrap();
            all.acked.extend(outcome.acked);
            all.unknown.extend(outcome.unknown);
            all.refused.extend(outcome.refused);
        }
        all
    }
}

impl Outcome {
    fn note(&mut self, n: usize, outcome: Result<Position, LaneError>) {
        match outcome {
            Ok(position) => drop(self.acked.insert(n, position)),
            Err(LaneError::OutcomeUnknown(_)) => drop(self.unknown.insert(n)),
            Err(LaneError::Unavailable(_)) => drop(self.refused.insert(n)),
            Err(error) => panic!("{error:?}"),
        }
    }

    /// Everything confirmed is stored where it was said to be, nothing that was refused is, and what each publisher sent
    /// first of a key came first. Returns what is stored.
    pub async fn check(&self, what: &str, bed: &Bed) -> Vec<Arc<Envelope>> {
        let stored = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
        let (mut newest, mut seen) = (BTreeMap::new(), BTreeSet::new());
        for envelope in &stored {
            let n = number(envelope);
            if seen.insert(n) {
                let before = newest.insert((n / EACH, envelope.message.key.clone()), n);
                assert!(before.is_none_or(|before| before < n), "{what}: {n} stands behind {before:?}");
            }
        }
        let at: BTreeMap<_, _> =
            stored.iter().map(|envelope| (position(envelope).to_string(), number(envelope))).collect();
        for (n, position) in &self.acked {
            assert_eq!(at.get(&position.to_string()), Some(n), "{what}: {n} was confirmed at {position}");
        }
        let refused: Vec<_> = self.refused.intersection(&seen).collect();
        assert_eq!(refused, Vec::<&usize>::new(), "{what}: said not to be stored, and stored");
        stored
    }
}
