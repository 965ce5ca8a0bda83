//! What is known of the broker, as one sentence, told to whoever watches.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Server;
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::lane::contract::{LaneError, LaneState};

/// What one call of the lane may take before it fails.
pub const DEADLINE: Duration = Duration::from_secs(2);
/// How long a move to another server may take before the lane is down. What is published meanwhile waits for it.
const MOVE_DEADLINE: Duration = Duration::from_secs(1);

pub struct State {
    sender: watch::Sender<LaneState>,
    servers: String,
    /// What the server said before it hung up, or forbids that the lane cannot do without.
    complaint: Mutex<Option<String>>,
    wake: Notify,
    lame_duck: AtomicBool,
    /// Until then there may be no connection: it is left for another.
    moving_until: Mutex<Option<Instant>>,
    overflowed: AtomicBool,
    closed: AtomicBool,
}

impl State {
    pub fn new(servers: &[String]) -> Self {
        let servers = servers.join(", ");
        Self {
            sender: watch::Sender::new(LaneState::Down(format!("connecting to {servers}"))),
            servers,
            complaint: Mutex::default(),
            wake: Notify::new(),
            lame_duck: AtomicBool::default(),
            moving_until: Mutex::default(),
            overflowed: AtomicBool::default(),
            closed: AtomicBool::default(),
        }
    }

    pub fn subscribe(&self) -> watch::Receiver<LaneState> {
        self.sender.subscribe()
    }

    /// Fails at once while the lane is down: nothing is buffered for a server that is not there.
    pub fn check(&self) -> Result<(), LaneError> {
        match &*self.sender.borrow() {
            LaneState::Up => Ok(()),
            LaneState::Down(why) => Err(LaneError::Unavailable(format!("the ephemeral lane is down: {why}"))),
        }
    }

    /// The error of a call that had no answer within its deadline.
    pub fn silent(&self, what: &str) -> LaneError {
        LaneError::Unavailable(format!("{} {what} within {DEADLINE:?}", self.servers))
    }

    /// The server answers, and `still` says that it is the connection that answered.
    pub fn up(&self, still: impl FnOnce() -> bool) {
        let changed = self.sender.send_if_modified(|state| {
            let up = !state.is_up() && !self.closed.load(Ordering::Relaxed) && still();
            if up {
                *state = LaneState::Up;
            }
            up
        });
        if changed {
            info!(servers = %self.servers, "The ephemeral lane is up.");
        }
    }

    /// The connection is gone. A sentence that says why there is none stays.
    pub fn lost(&self) {
        if self.sender.borrow().is_up() && !self.is_moving() {
            let said = self.take_complaint().map(|said| format!(" ({said})")).unwrap_or_default();
            self.down(format!("the connection to {} broke{said}; reconnecting", self.servers));
        }
    }

    /// Echoes do not come back.
    pub fn mute(&self) {
        let why = self.complaint().unwrap_or_else(|| "it does not answer".into());
        self.down(format!("connected to {}, but {why}", self.servers));
    }

    /// Attempts to connect fail: the pool knows why.
    pub fn unreachable(&self, pool: &[Server]) {
        let reasons: Vec<_> = pool
            .iter()
            .filter_map(|server| {
                let error = server.last_error.as_ref()?;
                Some(match error.contains("authorization violation") {
                    true => format!("{server} refused the credentials of lanes.ephemeral ({error})"),
                    false => format!("cannot reach {server}: {error}"),
                })
            })
            .collect();
        if !reasons.is_empty() && !self.is_moving() {
            self.down(format!("{}; trying again", reasons.join("; ")));
        }
    }

    pub fn down(&self, why: String) {
        let changed = self.sender.send_if_modified(|state| {
            let down = LaneState::Down(why.clone());
            let changed = *state != down && !self.closed.load(Ordering::Relaxed);
            if changed {
                *state = down;
            }
            changed
        });
        if changed {
            warn!(%why, "The ephemeral lane is down.");
        }
    }

    /// The lane was closed: from here on nothing changes any more.
    pub fn close(&self) {
        self.down("the bridge has closed it".into());
        self.closed.store(true, Ordering::Relaxed);
    }

    pub fn complain(&self, text: String) {
        *self.complaint.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
    }

    pub fn take_complaint(&self) -> Option<String> {
        self.complaint.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn complaint(&self) -> Option<String> {
        self.complaint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Something happened that the keeper has to look at.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    pub fn note_lame_duck(&self) {
        self.lame_duck.store(true, Ordering::Relaxed);
        self.wake();
    }

    pub fn take_lame_duck(&self) -> bool {
        self.lame_duck.swap(false, Ordering::Relaxed)
    }

    /// The connection is about to be left for another.
    pub fn moves(&self) {
        *self.moving_until.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Instant::now() + MOVE_DEADLINE);
    }

    fn is_moving(&self) -> bool {
        let until = *self.moving_until.lock().unwrap_or_else(PoisonError::into_inner);
        until.is_some_and(|until| Instant::now() < until)
    }

    pub fn note_overflow(&self) {
        self.overflowed.store(true, Ordering::Relaxed);
        self.wake();
    }

    pub fn take_overflow(&self) -> bool {
        self.overflowed.swap(false, Ordering::Relaxed)
    }
}
