//! A place in a consumer group, with what its route says of redelivery: the same for every carrier.
//!
//! ```text
//!            ┌────────── given back, or held too long: waits as `backoff` says ◀─────────┐
//!            ▼                                                                           │
//! carrier ─▶ next ─┬─ at most max_deliveries times ─▶ the client ──ack──▶ carrier        │
//!                  │                                       └────────────nack, timeout────┘
//!                  └─ after that ─▶ stored as a dead letter ─▶ then acknowledged
//! ```
//! Dead letters are stored beside the other deliveries, which never wait for them. One that cannot be stored goes back
//! to the group and is tried again: until it is stored it is not acknowledged. Where a member leaves between the two, the
//! group's next member on this bridge finds it stored and acknowledges it. A bridge that is killed then, or a message that
//! goes to another bridge or member while it is being stored, has it stored twice, with one id.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream;
use tokio::sync::mpsc;
use tracing::{debug, warn};

use super::catalog::Catalog;
use super::groups::Served;
use crate::lane::contract::{DurableLane, Handed, LaneError, Member, Publisher, Tag};
use crate::message::{Lane, Message, ORIGIN, Place, RESERVED, Timestamp};
use crate::policy::Policy;
use crate::policy::table::{DeadLetter, Redelivery, Route};
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

/// Where a route has no `backoff`, what is given back comes again at once, as Pulsar's own WebSocket clients know it;
/// from the second time on it waits, twice as long each time, so that what nobody can process makes no hot loop.
const UNSAID_FIRST: Duration = Duration::from_millis(100);
const UNSAID_LAST: Duration = Duration::from_secs(10);
/// Dead letters of one member under way to storage; the others wait, and the member's prefetch bounds how many.
const STORING_AT_ONCE: usize = 64;
/// How long a dead letter that could not be stored stays in the group before it is tried again; doubled each time.
const STORE_RETRY_FIRST: Duration = Duration::from_secs(1);
const STORE_RETRY_LAST: Duration = Duration::from_secs(60);
/// How often the acknowledgement of a stored dead letter is tried before the group may have it again.
const ACKS_MAX: u32 = 5;

/// The most dead letters of this bridge that are remembered as stored and not acknowledged. One more, and one of them may
/// be stored twice.
const STORED_MAX: usize = 10_000;

/// What the lane is asked with, and what is told about it.
#[derive(Clone)]
pub struct Surroundings {
    pub policy: Policy,
    pub lane: Arc<dyn DurableLane>,
    pub catalog: Arc<Catalog>,
    pub letters: Arc<StoredLetters>,
    pub metrics: Arc<Metrics>,
}

/// A message of a group, by its topic, its group, its partition and its place there.
type Letter = (Topic, Arc<str>, u32, Place);

/// The dead letters that are stored and that the group may have once more: nobody has acknowledged them.
#[derive(Default)]
pub struct StoredLetters(Mutex<BTreeSet<Letter>>);

impl StoredLetters {
    fn add(&self, letter: Letter) {
        let mut letters = self.lock();
        letters.insert(letter);
        if letters.len() > STORED_MAX {
            letters.pop_first();
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<Letter>> {
        // The set is whole between any two statements, so a panic elsewhere spoils nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One member's place in a group of one topic. Dropping it gives back what it holds.
pub struct GroupMember {
    member: Arc<dyn Member>,
    around: Surroundings,
    served: Served,
    /// The route at joining, which holds where the topic has moved away since.
    joined: Arc<Route>,
    /// The way to the dead letters; nothing runs for them before the first.
    dead: OnceLock<mpsc::UnboundedSender<Dead>>,
}

/// A message that was handed out as often as it may be.
struct Dead {
    handed: Handed,
    route: Arc<str>,
    dead_letter: DeadLetter,
}

impl GroupMember {
    pub fn new(member: Box<dyn Member>, around: Surroundings, served: Served, joined: Arc<Route>) -> Self {
        Self { member: Arc::from(member), around, served, joined, dead: OnceLock::new() }
    }

    pub fn topic(&self) -> &Topic {
        &self.served.topic
    }

    pub fn group(&self) -> &Arc<str> {
        &self.served.group
    }

    /// How long a delivery may be held from now on.
    pub fn ack_timeout(&self) -> Option<Duration> {
        self.route().redelivery.ack_timeout
    }

    /// The next deliveries for the client. Cancel safe; an error ends the membership.
    pub async fn next(&self) -> Result<Vec<Result<Handed, LaneError>>, LaneError> {
        loop {
            let handed = self.member.next().await?;
            let route = self.route();
            let Some(dead_letter) = &route.redelivery.dead_letter else { return Ok(handed) };
            let mut alive = Vec::with_capacity(handed.len());
            for handed in handed {
                match handed {
                    Ok(handed) if handed.attempt > dead_letter.max_deliveries => {
                        let (route, dead_letter) = (route.name.clone(), dead_letter.clone());
                        self.set_aside(Dead { handed, route, dead_letter });
                    }
                    other => alive.push(other),
                }
            }
            if !alive.is_empty() {
                return Ok(alive);
            }
        }
    }

    /// Returns once the lane has recorded that these are done.
    pub async fn ack(&self, tags: Vec<Tag>) -> Result<(), LaneError> {
        self.member.ack(tags).await
    }

    /// Gives back deliveries, each with its attempt. Without a delay of its own each waits as its route says; the last
    /// attempt waits for nothing, because nobody is handed it again.
    pub async fn nack(&self, given_back: Vec<(Tag, u32)>, delay: Option<Duration>) -> Result<(), LaneError> {
        let route = self.route();
        let mut by_wait: BTreeMap<Duration, Vec<Tag>> = BTreeMap::new();
        for (tag, attempt) in given_back {
            let wait = match &route.redelivery.dead_letter {
                Some(dead_letter) if attempt >= dead_letter.max_deliveries => Duration::ZERO,
                _ => delay.unwrap_or_else(|| wait(&route.redelivery, attempt)),
            };
            by_wait.entry(wait).or_default().push(tag);
        }
        for (wait, tags) in by_wait {
            self.member.nack(tags, wait).await?;
        }
        Ok(())
    }

    /// The route in force: a reload applies to what is handed out next.
    fn route(&self) -> Arc<Route> {
        let table = self.around.policy.table();
        let route = table.route_for(self.topic()).filter(|route| route.lane.takes(Lane::Durable));
        route.unwrap_or(&self.joined).clone()
    }

    fn set_aside(&self, dead: Dead) {
        let line = self.dead.get_or_init(|| {
            // Bounded by the member's prefetch: what is in it is not acknowledged.
            let (line, mut dead) = mpsc::unbounded_channel::<Dead>();
            let letters = Arc::new(DeadLetters {
                member: Arc::downgrade(&self.member),
                around: self.around.clone(),
                topic: self.topic().clone(),
                group: self.group().clone(),
            });
            // It ends with this membership, which holds the other end.
            tokio::spawn(async move {
                let dead = stream::poll_fn(move |context| dead.poll_recv(context));
                dead.for_each_concurrent(STORING_AT_ONCE, |dead| letters.clone().take(dead)).await;
            });
            line
        });
        // The other end ends after this one.
        let _ = line.send(dead);
    }
}

/// How long what was given back waits, by the attempt that it was.
fn wait(redelivery: &Redelivery, attempt: u32) -> Duration {
    let nth = attempt.saturating_sub(1);
    match redelivery.backoff.last() {
        Some(last) => *redelivery.backoff.get(nth as usize).unwrap_or(last),
        None if nth == 0 => Duration::ZERO,
        None => doubled(UNSAID_FIRST, nth - 1, UNSAID_LAST),
    }
}

fn doubled(first: Duration, times: u32, last: Duration) -> Duration {
    first.saturating_mul(2_u32.saturating_pow(times)).min(last)
}

/// Where the dead letters of a topic are stored now.
pub fn place_of_letters(
    policy: &Policy,
    dead_letter: &DeadLetter,
    of: &Topic,
) -> Result<(Arc<Route>, Topic), LaneError> {
    let name = dead_letter.topic.apply(of.as_str());
    let topic = Topic::parse(&name).map_err(|error| LaneError::BadRequest(error.to_string()))?;
    let table = policy.table();
    let route = table.route_for(&topic).filter(|route| route.lane.takes(Lane::Durable)).ok_or_else(|| {
        LaneError::BadRequest(format!("no durable route holds `{topic}` now; nothing was stored"))
    })?;
    Ok((route.clone(), topic))
}

/// Stores one member's dead letters. It holds no place in the group: who leaves gives back at once.
struct DeadLetters {
    member: Weak<dyn Member>,
    around: Surroundings,
    topic: Topic,
    group: Arc<str>,
}

impl DeadLetters {
    async fn take(self: Arc<Self>, dead: Dead) {
        let Dead { handed, route, dead_letter } = dead;
        if self.member.strong_count() == 0 {
            return;
        }
        let (tag, attempt) = (handed.tag, handed.attempt);
        let Surroundings { letters, metrics, .. } = &self.around;
        let letter = (self.topic.clone(), self.group.clone(), tag.partition, tag.place);
        if letters.lock().contains(&letter) {
            return self.settle(tag, &letter).await;
        }
        match self.store(&handed, &dead_letter).await {
            Ok(()) => {
                letters.add(letter.clone());
                metrics.dead_lettered(&route);
                self.settle(tag, &letter).await;
            }
            Err(error) => {
                let tries = attempt.saturating_sub(dead_letter.max_deliveries + 1);
                let again_in = doubled(STORE_RETRY_FIRST, tries, STORE_RETRY_LAST);
                warn!(
                    topic = %self.topic, group = &*self.group, %error, ?again_in,
                    "A dead letter could not be stored. It stays in its group and is tried again."
                );
                metrics.retried(Lane::Durable, &route);
                self.give_back(tag, again_in).await;
            }
        }
    }

    async fn store(&self, handed: &Handed, dead_letter: &DeadLetter) -> Result<(), LaneError> {
        let (route, topic) = place_of_letters(&self.around.policy, dead_letter, &self.topic)?;
        let message = self.letter(handed);
        let receipt = self.around.lane.append(&route, &topic, message, Publisher::default()).await?;
        receipt.await?;
        self.around.catalog.published(&topic);
        Ok(())
    }

    /// The same message with where it comes from. It is accepted anew: by its old time retention would remove it early.
    fn letter(&self, handed: &Handed) -> Message {
        let envelope = &handed.envelope;
        let mut message = envelope.message.clone();
        let position = envelope.stored.as_ref().map(|stored| stored.position.to_string());
        let origin = [
            ("topic", self.topic.to_string()),
            ("group", self.group.to_string()),
            ("position", position.unwrap_or_default()),
            ("attempts", (handed.attempt - 1).to_string()),
            ("ts", message.ts.to_string()),
        ];
        // What a native client called ours is not, and the lane would refuse it.
        message.headers.retain(|name, _| !name.starts_with(RESERVED));
        message.headers.extend(origin.map(|(name, value)| (format!("{ORIGIN}{name}"), value)));
        message.ts = Timestamp::now();
        message.deliver_at = None;
        message
    }

    /// It is stored; the group must not have it again.
    async fn settle(&self, tag: Tag, letter: &Letter) {
        for tries in 0..ACKS_MAX {
            // Who left gave it back: it comes to another member.
            let Some(member) = self.member.upgrade() else { return };
            match member.ack(vec![tag]).await {
                Ok(()) => {
                    self.around.letters.lock().remove(letter);
                    return;
                }
                Err(error) => {
                    debug!(topic = %self.topic, %error, "A stored dead letter is not acknowledged yet.")
                }
            }
            drop(member);
            tokio::time::sleep(doubled(STORE_RETRY_FIRST, tries, STORE_RETRY_LAST)).await;
        }
        self.give_back(tag, STORE_RETRY_LAST).await;
    }

    async fn give_back(&self, tag: Tag, delay: Duration) {
        let Some(member) = self.member.upgrade() else { return };
        if let Err(error) = member.nack(vec![tag], delay).await {
            debug!(topic = %self.topic, %error, "A message was not given back; it comes with the next membership.");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_waits_longer_each_time_and_the_last_wait_repeats() {
        let seconds = Duration::from_secs;
        let said = Redelivery { backoff: vec![seconds(1), seconds(5)], ..Redelivery::default() };
        let waits: Vec<_> = (1..=4).map(|attempt| wait(&said, attempt).as_secs()).collect();
        assert_eq!(waits, [1, 5, 5, 5]);
        let unsaid: Vec<_> = [1, 2, 3, 4, 8, 9, 1000, u32::MAX]
            .map(|attempt| wait(&Redelivery::default(), attempt).as_millis())
            .into();
        assert_eq!(unsaid, [0, 100, 200, 400, 6400, 10_000, 10_000, 10_000]);
    }
}
