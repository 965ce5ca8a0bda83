//! What is published twice with one id within the route's `dedup_window` is stored once.
//!
//! ```text
//! publish ──id──▶ known? ──stored──────▶ `duplicate`, with the first copy's position
//!                   │  └───under way───▶ its outcome decides
//!                   │  └───unknown─────▶ storage is looked through first
//!                   └─no, and what was stored within the window has been read ──▶ append ──receipt──▶ remembered
//! ```
//! Ids that the publisher gave are looked for; one that was made here nobody can repeat. What another process stored
//! (another bridge, or this one before a restart) is known from storage: the first id that is given to a topic waits
//! until the window has been read, and what comes after is followed for as long as ids are being given.

mod memory;
mod topics;

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, ready};
use futures_util::{FutureExt, TryFutureExt};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::lane::contract::{DurableLane, LaneError};
use crate::message::{MessageId, Position, Timestamp};
use crate::policy::table::{OnOutage, Route};
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;
use memory::{Kept, Known, UnderWay};
use topics::Topics;

pub struct Ids {
    topics: Arc<Topics>,
}

/// What a publish is.
pub enum Begun {
    New(Ticket),
    /// Of one that was published before. No position: it is safe, and not in storage yet.
    Duplicate(Option<Position>),
}

/// The right to publish an id; what becomes of it is remembered. For a message that nobody can repeat it is empty.
pub struct Ticket(Option<Place>);

struct Place {
    receipt: oneshot::Sender<BoxFuture<'static, Kept>>,
    outcome: UnderWay,
}

/// What becomes of a publish.
pub enum Receipt<F> {
    Plain(F),
    Remembered(Remembered),
}

/// An outcome that is remembered whether or not somebody waits for it.
pub struct Remembered(UnderWay);

impl Ids {
    pub fn new(lane: Arc<dyn DurableLane>, metrics: Arc<Metrics>, timeout: Duration) -> Self {
        Self { topics: Topics::new(lane, metrics, timeout) }
    }

    /// Whether a message that was accepted at `ts`, with this id from its publisher, is a new one. Waits until that is
    /// known, and no longer than for a publish: so whoever publishes one after the other keeps that order. Where it
    /// cannot be known now and the route spools, it counts as new.
    pub async fn begin(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        given: Option<MessageId>,
        ts: Timestamp,
    ) -> Result<Begun, LaneError> {
        match given.filter(|_| !route.dedup_window.is_zero()) {
            None => Ok(Begun::New(Ticket(None))),
            Some(id) => Box::pin(self.look_up(route, topic, id, ts)).await,
        }
    }

    async fn look_up(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        id: MessageId,
        ts: Timestamp,
    ) -> Result<Begun, LaneError> {
        let deadline = Instant::now() + self.topics.timeout;
        let mut is_unread = false;
        loop {
            let (place, placed) = oneshot::channel();
            let known = match self.topics.begin(route, topic, (id, ts), placed, is_unread) {
                Ok(outcome) => return Ok(Begun::New(Ticket(Some(Place { receipt: place, outcome })))),
                Err(known) => known,
            };
            match known {
                Known::Stored(position) => return Ok(Begun::Duplicate(position)),
                Known::UnderWay(first) => match timeout_at(deadline, first).await {
                    Ok(Ok(position)) => return Ok(Begun::Duplicate(position)),
                    Ok(Err(LaneError::OutcomeUnknown(why))) => return Err(LaneError::OutcomeUnknown(why)),
                    // Nothing is stored: now it is this one's turn.
                    Ok(Err(_)) => {}
                    Err(_) => {
                        let why = format!("message {id} is under way already and has no outcome yet");
                        return Err(LaneError::OutcomeUnknown(why));
                    }
                },
                // Of too many topics.
                Known::Nothing if is_unread => return Ok(Begun::New(Ticket(None))),
                Known::Nothing => match self.topics.read(topic, deadline).await {
                    // What spools is taken all the same, and what this bridge takes it remembers.
                    Err(LaneError::Unavailable(_)) if route.outage == OnOutage::Spool => is_unread = true,
                    read => read?,
                },
                Known::Unknown(_) => {
                    self.topics.look_through(route, topic, deadline).await.map_err(|error| {
                        let why = format!("an earlier try of message {id} had no answer, and now {error}");
                        LaneError::OutcomeUnknown(why)
                    })?;
                }
            }
        }
    }

    /// Follows no topic any more.
    pub fn close(&self) {
        self.topics.clear();
    }
}

impl Drop for Ids {
    /// What follows the topics holds them.
    fn drop(&mut self) {
        self.close();
    }
}

impl Ticket {
    /// Keeps what becomes of what was appended with this ticket.
    pub fn of<F, K>(mut self, appended: Result<F, LaneError>) -> Result<Receipt<F>, LaneError>
    where
        F: Future<Output = Result<K, LaneError>> + Send + 'static,
        K: Into<Option<Position>> + 'static,
    {
        let Some(Place { receipt: place, outcome }) = self.0.take() else {
            return appended.map(Receipt::Plain);
        };
        // Whatever is under way holds the other end.
        match appended {
            Ok(receipt) => {
                let _ = place.send(receipt.map_ok(Into::into).boxed());
                Ok(Receipt::Remembered(Remembered(outcome)))
            }
            Err(error) => {
                let _ = place.send(ready(Err(error.clone())).boxed());
                drive(&outcome);
                Err(error)
            }
        }
    }
}

impl Drop for Ticket {
    /// A publish that was given up before it had its place in line, or had one that nobody told us of.
    fn drop(&mut self) {
        if let Some(Place { receipt, outcome }) = self.0.take() {
            drop(receipt);
            drive(&outcome);
        }
    }
}

impl<F, K> Receipt<F>
where
    F: Future<Output = Result<K, LaneError>>,
    K: Into<Option<Position>>,
{
    pub async fn outcome(self) -> Kept {
        match self {
            Receipt::Plain(receipt) => receipt.await.map(Into::into),
            Receipt::Remembered(mut remembered) => (&mut remembered.0).await,
        }
    }
}

impl Drop for Remembered {
    fn drop(&mut self) {
        drive(&self.0);
    }
}

/// Sees to it that an outcome is remembered. It comes within the publish timeout, whoever waits for it.
fn drive(outcome: &UnderWay) {
    use futures_util::future::FusedFuture;
    if !outcome.is_terminated()
        && outcome.clone().now_or_never().is_none()
        // Without a runtime the process ends.
        && let Ok(runtime) = Handle::try_current()
    {
        runtime.spawn(outcome.clone());
    }
}
