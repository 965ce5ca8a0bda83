//! What one client's connection is held to: `[session]`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units;

/// What surrounds the payload in a frame.
const FRAME_OVERHEAD_BYTES: usize = 16 * 1024;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionSettings {
    /// The largest payload, in both directions.
    #[serde(with = "units::size")]
    pub max_message: usize,
    /// What may wait for the socket, in events and in bytes. A larger single event is admitted alone, when nothing
    /// else waits.
    pub queue_messages: usize,
    #[serde(with = "units::size")]
    pub queue_bytes: usize,
    #[serde(with = "units::duration")]
    pub ping_interval: Duration,
    /// After so much silence the client is gone.
    #[serde(with = "units::duration")]
    pub pong_timeout: Duration,
    #[serde(with = "units::duration")]
    pub handshake_timeout: Duration,
    pub max_subscriptions: usize,
    /// Publishes without an answer yet; at so many the client is not read from.
    pub max_inflight: usize,
}

impl SessionSettings {
    /// How many frames may wait before the client is not read from.
    pub fn unread_max(&self) -> usize {
        self.queue_messages + self.max_inflight
    }

    /// The largest frame: a payload of `max_message` fits, in base64 as well.
    pub fn frame_bytes_max(&self) -> usize {
        self.max_message.div_ceil(3) * 4 + FRAME_OVERHEAD_BYTES
    }
}

impl Default for SessionSettings {
    fn default() -> Self {
        Self {
            max_message: 512 << 10,
            queue_messages: 256,
            queue_bytes: 1 << 20,
            ping_interval: Duration::from_secs(54),
            pong_timeout: Duration::from_secs(60),
            handshake_timeout: Duration::from_secs(5),
            max_subscriptions: 128,
            max_inflight: 1024,
        }
    }
}
