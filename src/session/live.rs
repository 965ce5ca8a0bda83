//! What one feed hears of the live half of its topic.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;

use crate::bridge::Bridge;
use crate::lane::contract::{Ear, Listening};
use crate::message::Envelope;
use crate::policy::table::Route;
use crate::topic::Pattern;
use crate::wire::code::{Code, Fault};

/// What may wait for the feed, and its bytes; what does not fit comes from storage.
const MESSAGES_MAX: usize = 1024;
const BYTES_MAX: usize = 1 << 20;
/// How often listening is tried again while the ephemeral lane is away.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);

#[derive(Default)]
pub struct LiveHalf {
    heard: Mutex<Heard>,
    came: Notify,
}

#[derive(Default)]
struct Heard {
    waiting: VecDeque<Arc<Envelope>>,
    bytes: usize,
}

impl LiveHalf {
    /// The next message. Cancel safe.
    pub async fn next(&self) -> Arc<Envelope> {
        loop {
            if let Some(envelope) = self.take() {
                return envelope;
            }
            self.came.notified().await;
        }
    }

    fn take(&self) -> Option<Arc<Envelope>> {
        let mut heard = self.lock();
        let envelope = heard.waiting.pop_front()?;
        heard.bytes -= envelope.weight();
        Some(envelope)
    }

    fn lock(&self) -> MutexGuard<'_, Heard> {
        // Whole between any two statements.
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ear for LiveHalf {
    fn hear(&self, route: &Arc<Route>, envelope: &Arc<Envelope>) {
        // Requests are their subscriptions' to hear.
        if envelope.reply_to.is_some() {
            return;
        }
        let weight = envelope.weight();
        let mut heard = self.lock();
        if heard.waiting.len() >= MESSAGES_MAX || heard.bytes + weight > BYTES_MAX {
            return;
        }
        envelope.is_of(route.lane);
        heard.bytes += weight;
        heard.waiting.push_back(envelope.clone());
        drop(heard);
        self.came.notify_one();
    }

    /// Storage brings what was missed.
    fn missed(&self) {}
}

/// A place to listen to the ephemeral lane, as soon as there is one.
pub async fn listen(bridge: &Bridge, pattern: &Pattern, ear: Arc<dyn Ear>) -> Result<Listening, Fault> {
    let mut state = bridge.ephemeral.state();
    loop {
        match bridge.listen(pattern, None, 0, ear.clone()).await {
            Err(fault) if fault.code == Code::LaneUnavailable => {}
            placed => return placed,
        }
        // A state that does not change is looked at again, in case it was too early.
        let _ = timeout(LISTEN_AGAIN, state.changed()).await;
    }
}
