//! The ephemeral lane in this process: no broker, no copy, no queue.
//!
//! ```text
//! publish ──▶ ring, and who is interested ──▶ ear, ear, one ear of each group
//!             └────── one lock ──────┘        heard in the publisher's own call
//! ```
//! The lock covers the ring and the interest together, so an ear that is placed finds each message either in its
//! history or in its hearing. The ears are called after it, so an ear may do what it likes with the lane.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::{oneshot, watch};
use uuid::Uuid;

use super::contract::{Ear, EphemeralLane, LaneError, LaneState, Listening};
use super::headers;
use super::history::History;
use super::interest::{Found, Interest};
use crate::message::{Envelope, Lane, Message, ReplyTo};
use crate::policy::Policy;
use crate::policy::table::Route;
use crate::topic::{Pattern, Topic};

pub struct Bus {
    policy: Policy,
    shared: Arc<Mutex<Shared>>,
    requests: Arc<Requests>,
    state: watch::Sender<LaneState>,
}

struct Shared {
    history: History,
    interest: Interest<Arc<dyn Ear>>,
}

/// Who waits for a reply, by the address that was given out. As long as there are requests under way: each takes its
/// entry away when it ends, however it ends.
type Requests = Mutex<HashMap<Arc<str>, oneshot::Sender<Message>>>;

impl Bus {
    pub fn new(policy: Policy, history_bytes: usize) -> Arc<Self> {
        let shared = Shared { history: History::new(history_bytes), interest: Interest::default() };
        Arc::new(Self {
            policy,
            shared: Arc::new(Mutex::new(shared)),
            requests: Arc::default(),
            state: watch::Sender::new(LaneState::Up),
        })
    }

    /// How many requests wait for their reply.
    pub fn requests(&self) -> usize {
        lock(&self.requests).len()
    }

    /// Keeps the message and finds its ears, as one step.
    fn take(&self, route: &Route, envelope: &Arc<Envelope>) -> Arc<Found<Arc<dyn Ear>>> {
        let mut shared = lock(&self.shared);
        shared.history.keep(envelope, route.ring());
        shared.interest.find(envelope.topic.as_str())
    }
}

fn deliver(found: &Found<Arc<dyn Ear>>, route: &Arc<Route>, envelope: &Arc<Envelope>) {
    for ear in &found.everyone {
        ear.hear(route, envelope);
    }
    for group in &found.groups {
        group.next().hear(route, envelope);
    }
}

#[async_trait]
impl EphemeralLane for Bus {
    async fn publish(&self, route: &Arc<Route>, topic: &Topic, message: Message) -> Result<(), LaneError> {
        headers::check(&message)?;
        let envelope = Arc::new(Envelope::ephemeral(topic.clone(), message, None));
        let found = self.take(route, &envelope);
        deliver(&found, route, &envelope);
        Ok(())
    }

    async fn listen(
        &self,
        pattern: &Pattern,
        group: Option<&str>,
        last: usize,
        ear: Arc<dyn Ear>,
    ) -> Result<Listening, LaneError> {
        let table = self.policy.table();
        let mut shared = lock(&self.shared);
        let number = shared.interest.insert(pattern.as_str(), group, ear);
        let history = match last {
            0 => Vec::new(),
            _ => shared.history.newest(pattern, last, |topic| {
                table.route_for(topic).filter(|route| route.lane.takes(Lane::Ephemeral)).cloned()
            }),
        };
        let place = Place { shared: self.shared.clone(), pattern: pattern.clone(), number };
        Ok(Listening { history, on_drop: Box::new(place) })
    }

    async fn request(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        timeout: Duration,
    ) -> Result<Message, LaneError> {
        headers::check(&message)?;
        let address: Arc<str> = format!("_INBOX.{}", Uuid::now_v7().simple()).into();
        let reply_to = ReplyTo { address: address.clone(), timeout: Some(timeout) };
        let envelope = Arc::new(Envelope::ephemeral(topic.clone(), message, Some(reply_to)));
        let found = self.take(route, &envelope);
        if found.is_empty() {
            return Err(LaneError::NoResponders(topic.clone()));
        }
        let (sender, reply) = oneshot::channel();
        lock(&self.requests).insert(address.clone(), sender);
        let _waiting = Waiting { requests: self.requests.clone(), address };
        deliver(&found, route, &envelope);
        match tokio::time::timeout(timeout, reply).await {
            Ok(Ok(message)) => Ok(message),
            _ => Err(LaneError::Timeout(topic.clone())),
        }
    }

    async fn reply(&self, to: &ReplyTo, message: Message) -> Result<(), LaneError> {
        headers::check(&message)?;
        let waiting = lock(&self.requests).remove(&to.address);
        if let Some(waiting) = waiting {
            // Refused only where the requester gave up in this very moment.
            let _ = waiting.send(message);
        }
        Ok(())
    }

    /// The way of a message up to its ears, which is all the way there is: the lock and the lookup.
    async fn probe(&self) -> Result<Duration, LaneError> {
        let begun = Instant::now();
        lock(&self.shared).interest.find("$probe");
        Ok(begun.elapsed())
    }

    fn state(&self) -> watch::Receiver<LaneState> {
        self.state.subscribe()
    }

    /// Nothing is ever under way: whoever published has been heard.
    async fn close(&self) {}
}

/// An ear's place; dropping it ends the hearing.
struct Place {
    shared: Arc<Mutex<Shared>>,
    pattern: Pattern,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let ear = lock(&self.shared).interest.remove(self.pattern.as_str(), self.number);
        // The lock is free again: an ear may own whatever it likes.
        drop(ear);
    }
}

/// A request under way; dropping it takes its entry away.
struct Waiting {
    requests: Arc<Requests>,
    address: Arc<str>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        lock(&self.requests).remove(&self.address);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No ear is called under a lock, and nothing between two statements of this file leaves half a change behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
