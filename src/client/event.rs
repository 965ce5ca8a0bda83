//! What a subscription brings.

use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::wire::json::heard::{Heard, HeardError, HeardMessage};

/// One message as it was delivered.
#[derive(Debug, Clone)]
pub struct Event {
    /// The frame that brought it.
    pub heard: Heard,
    pub message: HeardMessage,
    /// The bytes as they were published.
    pub payload: Bytes,
}

/// Whatever a subscription has to say.
#[derive(Debug, Clone)]
pub enum Incoming {
    Event(Event),
    /// Messages are missing here: `dropped` of them where that is known.
    Gap {
        topic: String,
        dropped: Option<u64>,
        reason: String,
    },
    /// `REPLAY_DONE`, `LANE_DOWN` and their like, by their `code`.
    Info(Heard),
    /// Something could not be delivered; the subscription goes on behind it.
    Error(HeardError),
}

impl Event {
    /// `None` where the frame holds no message that this build can read.
    pub fn read(heard: Heard) -> Option<Self> {
        let message = heard.message()?;
        let payload = message.payload()?.into();
        Some(Self { heard, message, payload })
    }

    pub fn topic(&self) -> &str {
        self.heard.topic.as_deref().unwrap_or_default()
    }

    pub fn id(&self) -> Option<&str> {
        self.message.id.as_deref()
    }

    pub fn key(&self) -> Option<&str> {
        self.message.key.as_deref()
    }

    /// Where it stands in its topic, on the durable lane.
    pub fn position(&self) -> Option<&str> {
        self.heard.position.as_deref()
    }

    /// 1 for the first delivery to a group.
    pub fn attempt(&self) -> u32 {
        self.heard.attempt.unwrap_or(1)
    }

    pub fn json<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        serde_json::from_slice(&self.payload)
    }
}
