//! Who waits for a message at an address of its own under the lane's inbox: requesters for a reply, and the lane
//! itself for an echo.
//!
//! The client library's own multiplexer keeps every request that timed out for the life of the connection, and
//! cannot be told that one was refused. Here an entry lives exactly as long as whoever waits for it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_nats::{Message, Subscriber};
use futures_util::StreamExt;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::lane::contract::LaneError;

pub struct Waiters {
    /// What all addresses begin with, its dot included.
    prefix: String,
    waiting: Mutex<HashMap<String, Entry>>,
}

struct Entry {
    /// The subject of the request, for when it is refused. None: an echo.
    asked: Option<String>,
    sender: oneshot::Sender<Result<Message, LaneError>>,
}

/// One who waits. Dropping it takes its entry away.
pub struct Waiting {
    pub address: String,
    receiver: oneshot::Receiver<Result<Message, LaneError>>,
    waiters: Arc<Waiters>,
}

impl Waiters {
    /// Addresses cannot be guessed: whoever serves one request could answer others' otherwise.
    pub fn new() -> Self {
        Self { prefix: format!("_INBOX.{}.", Uuid::now_v7().simple()), waiting: Mutex::default() }
    }

    /// What the lane subscribes to.
    pub fn subject(&self) -> String {
        format!("{}*", self.prefix)
    }

    pub fn owns(&self, subject: &str) -> bool {
        subject.starts_with(&self.prefix)
    }

    /// A place to wait for one message: for the reply to a request at `asked`, or for an echo.
    pub fn expect(self: &Arc<Self>, asked: Option<&str>) -> Waiting {
        let address = format!("{}{}", self.prefix, Uuid::now_v7().simple());
        let (sender, receiver) = oneshot::channel();
        self.lock().insert(address.clone(), Entry { asked: asked.map(str::to_owned), sender });
        Waiting { address, receiver, waiters: self.clone() }
    }

    /// The server refused what was sent to `subject`, or what was to be answered there: whoever waits for it hears so.
    pub fn refuse(&self, subject: &str, error: &LaneError) {
        let refused: Vec<_> = self
            .lock()
            .extract_if(|address, entry| entry.asked.as_deref() == Some(subject) || address == subject)
            .collect();
        for (_, entry) in refused {
            let _ = entry.sender.send(Err(error.clone()));
        }
    }

    pub fn requests(&self) -> usize {
        self.lock().values().filter(|entry| entry.asked.is_some()).count()
    }

    /// The first message for an address is handed over; a later one, or one that nobody waits for, is dropped.
    fn arrived(&self, message: Message) {
        let entry = self.lock().remove(message.subject.as_str());
        if let Some(entry) = entry {
            let _ = entry.sender.send(Ok(message));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        // Each use is one statement, so a panic elsewhere spoils nothing.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    pub async fn reply(mut self) -> Result<Message, LaneError> {
        // The sender is in the map until one of these is sent or this is dropped.
        let gone = || LaneError::Internal("a request lost its place; it may have been answered".into());
        (&mut self.receiver).await.unwrap_or_else(|_| Err(gone()))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.waiters.lock().remove(&self.address);
    }
}

/// Hands what comes to the inbox to whoever waits for it, for as long as the lane lives.
pub async fn run(waiters: Arc<Waiters>, mut inbox: Subscriber) {
    while let Some(message) = inbox.next().await {
        waiters.arrived(message);
    }
}
