//! One subscriber's way along a durable topic: from storage up to the tail, then in step with it.
//!
//! ```text
//!  start ──read storage──▶ end of what was stored ──▶ tail ──▶ …
//!                ▲                                     │
//!                └──────── overtaken, or broken ───────┘
//! ```
//! The tail is followed before storage is read, so the two overlap, and what stands at or before the place already
//! reached is skipped: nothing is missed and nothing comes twice. The same holds for a follower that was too slow
//! for the tail, and for one whose broker went away.

use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use super::contract::{DurableLane, LaneError, Reader};
use super::recent::Recent;
use super::tail::{Cursor, Ended, Tail};
use crate::message::{Envelope, Position, Start};
use crate::policy::table::Route;
use crate::topic::Topic;

/// How many messages one step brings at most from the tail.
const STEP_MESSAGES_MAX: usize = 128;
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

pub struct Follow {
    lane: Arc<dyn DurableLane>,
    route: Arc<Route>,
    topic: Topic,
    /// Held, so that the topic's feed lives on while this follower reads from storage.
    tail: Arc<Tail>,
    cursor: Cursor,
    /// What stands before the cursor; reached once storage was read.
    head: Option<Position>,
    source: Source,
    /// Where to begin again until something was reached.
    start: Start,
    reached: Option<Position>,
    /// The first reading of storage was asked for; those that follow repair.
    replaying: bool,
    /// What was stepped over last, of a topic that is sent live before that.
    recent: Option<Recent>,
    /// Read, and not yet handed out.
    unread: Option<Vec<Result<Arc<Envelope>, LaneError>>>,
    retry: Duration,
}

enum Source {
    Storage(Box<dyn Reader>),
    Tail,
    /// Neither: storage has to be read from the place reached.
    Broken,
}

/// What a follower meets next.
pub enum Step {
    /// Messages in order. A record that could not be read is an error in its place.
    Events(Vec<Result<Arc<Envelope>, LaneError>>),
    /// Retention had removed what was asked for; what follows is the oldest that is left.
    Missed,
    /// The replay that was asked for is complete.
    CaughtUp,
}

impl Follow {
    /// Every message of the topic from `start` on will be a step.
    pub async fn open(
        lane: Arc<dyn DurableLane>,
        route: Arc<Route>,
        topic: Topic,
        start: Start,
    ) -> Result<Self, LaneError> {
        let start = match start {
            Start::Last(0) => Start::Latest,
            // A position that names no place is the time it was made at.
            Start::After(Position::Partitioned { reached, others_from }) if reached.is_empty() => {
                Start::Time(others_from)
            }
            other => other,
        };
        let tail = lane.tail(&route, &topic).await?;
        let (cursor, head) = tail.follow();
        let replaying = start != Start::Latest;
        let source = match replaying {
            true => Source::Storage(lane.read(&route, &topic, start.clone()).await?),
            false => Source::Tail,
        };
        let (start, reached) = match start {
            Start::After(position) => (Start::Earliest, Some(position)),
            // Of a topic that was empty everything is new.
            Start::Latest => (Start::Earliest, head.clone()),
            other => (other, None),
        };
        let retry = RETRY_FIRST;
        let recent = route.is_live_first().then(Recent::default);
        Ok(Self {
            lane,
            route,
            topic,
            tail,
            cursor,
            head,
            source,
            start,
            reached,
            replaying,
            recent,
            unread: None,
            retry,
        })
    }

    pub fn topic(&self) -> &Topic {
        &self.topic
    }

    pub fn route(&self) -> &Arc<Route> {
        &self.route
    }

    /// Everything up to here was stepped over, as far as it is known.
    pub fn reached(&self) -> Option<&Position> {
        self.reached.as_ref()
    }

    /// The messages that were stepped over last, of a topic that is sent live before it is stored.
    pub fn recent(&self) -> Option<&Recent> {
        self.recent.as_ref()
    }

    pub fn take_recent(&mut self) -> Recent {
        self.recent.replace(Recent::default()).unwrap_or_default()
    }

    /// Whether what was asked for from storage is still under way.
    pub fn is_replaying(&self) -> bool {
        self.replaying
    }

    /// What is read from storage counts as live: nobody asked for a replay.
    pub fn replay_as_live(&mut self) {
        self.replaying = false;
    }

    /// The next step. An error ends the way: it is one that trying again does not mend. Cancel safe.
    pub async fn next(&mut self) -> Result<Step, LaneError> {
        loop {
            match self.advance().await {
                Ok(Some(step)) => {
                    self.retry = RETRY_FIRST;
                    return Ok(step);
                }
                Ok(None) => {}
                Err(error) if is_final(&error) => return Err(error),
                Err(error) => {
                    warn!(topic = %self.topic, %error, "Following a durable topic broke off; it goes on where it stood.");
                    self.source = Source::Broken;
                    let jitter = self.retry.mul_f64(0.5 + fastrand::f64() / 2.0);
                    self.retry = (self.retry * 2).min(RETRY_LAST);
                    tokio::time::sleep(jitter).await;
                }
            }
        }
    }

    async fn advance(&mut self) -> Result<Option<Step>, LaneError> {
        if let Some(batch) = self.unread.take() {
            return Ok(self.unseen(batch));
        }
        match &mut self.source {
            Source::Storage(reader) => {
                let batch = reader.next().await?;
                if reader.skipped() {
                    self.unread = Some(batch.unwrap_or_default());
                    return Ok(Some(Step::Missed));
                }
                match batch {
                    Some(batch) => Ok(self.unseen(batch)),
                    None => {
                        self.source = Source::Tail;
                        self.reached = Position::behind(self.reached.take(), self.head.take());
                        Ok(std::mem::take(&mut self.replaying).then_some(Step::CaughtUp))
                    }
                }
            }
            Source::Tail => match self.cursor.next(STEP_MESSAGES_MAX).await {
                Ok(batch) => Ok(self.unseen(batch.into_iter().map(Ok).collect())),
                Err(Ended::Behind) => {
                    self.source = Source::Broken;
                    Ok(None)
                }
                Err(Ended::Failed(error)) => Err(error),
            },
            Source::Broken => {
                if self.tail.has_failed() {
                    self.tail = self.lane.tail(&self.route, &self.topic).await?;
                }
                (self.cursor, self.head) = self.tail.follow();
                let from = self.reached.clone().map_or_else(|| self.start.clone(), Start::After);
                self.source = Source::Storage(self.lane.read(&self.route, &self.topic, from).await?);
                Ok(None)
            }
        }
    }

    fn unseen(&mut self, batch: Vec<Result<Arc<Envelope>, LaneError>>) -> Option<Step> {
        let mut events = Vec::with_capacity(batch.len());
        for event in batch {
            if let Ok(envelope) = &event
                && let Some(stored) = &envelope.stored
            {
                if self.reached.as_ref().is_some_and(|reached| reached.covers(stored.partition, stored.place))
                {
                    continue;
                }
                self.reached = Some(stored.position.clone());
                envelope.is_of(self.route.lane);
                if let Some((recent, id)) = self.recent.as_mut().zip(envelope.message.id) {
                    recent.insert(id);
                }
            }
            events.push(event);
        }
        (!events.is_empty()).then_some(Step::Events(events))
    }
}

/// Whether trying again cannot help.
fn is_final(error: &LaneError) -> bool {
    matches!(error, LaneError::Forbidden(_) | LaneError::BadRequest(_))
}
