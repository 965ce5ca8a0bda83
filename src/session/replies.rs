//! The requests that this connection may answer.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::message::ReplyTo;

/// How long a reply may take where the request did not say how long it waits.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
/// How many requests may wait for this connection's reply; of more, those that wait longest are given up.
const REPLIES_MAX: usize = 4096;

#[derive(Default)]
pub struct Replies(Mutex<Expected>);

#[derive(Default)]
pub struct Expected(HashMap<Arc<str>, (ReplyTo, Instant)>);

impl Replies {
    pub fn lock(&self) -> MutexGuard<'_, Expected> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Expected {
    pub fn expect_reply(&mut self, to: &ReplyTo) {
        let now = Instant::now();
        if self.0.len() >= REPLIES_MAX {
            self.0.retain(|_, (_, until)| *until > now);
        }
        if self.0.len() >= REPLIES_MAX
            && let Some(oldest) =
                self.0.iter().min_by_key(|(_, (_, until))| *until).map(|(address, _)| address.clone())
        {
            self.0.remove(&oldest);
        }
        let until = now + to.timeout.unwrap_or(TIMEOUT_DEFAULT);
        self.0.insert(to.address.clone(), (to.clone(), until));
    }

    /// The request's address, once, while its requester waits.
    pub fn claim(&mut self, address: &str) -> Option<ReplyTo> {
        let (to, until) = self.0.remove(address)?;
        (until > Instant::now()).then_some(to)
    }
}
