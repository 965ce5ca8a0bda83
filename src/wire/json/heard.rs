//! The JSON dialect from the other side: what a client reads.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;

/// One frame from the server. Which fields are there depends on its `kind`.
#[derive(Debug, Clone, Deserialize)]
pub struct Heard {
    #[serde(rename = "type")]
    pub kind: String,
    pub request_id: Option<String>,
    pub status: Option<String>,
    pub topic: Option<String>,
    pub lane: Option<String>,
    /// Of an event or a response; of `info` it is a sentence.
    pub message: Option<Box<RawValue>>,
    pub message_id: Option<String>,
    pub position: Option<String>,
    pub subscription: Option<String>,
    pub group: Option<String>,
    pub mode: Option<String>,
    pub prefetch: Option<u32>,
    pub last_n: Option<u32>,
    pub delivery: Option<u64>,
    pub attempt: Option<u32>,
    pub reply_to: Option<String>,
    #[serde(default)]
    pub late: bool,
    pub dropped: Option<u64>,
    pub reason: Option<String>,
    pub code: Option<String>,
    pub error: Option<HeardError>,
    /// Of a publish of several messages: what became of each, in their order.
    #[serde(default)]
    pub results: Vec<HeardResult>,
    pub reconnect_after_ms: Option<u64>,
    pub ts: String,
    /// The frame as it came.
    #[serde(skip)]
    pub frame: String,
}

/// What became of one message of several: a status, or an error.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct HeardResult {
    pub status: Option<String>,
    pub message_id: Option<String>,
    pub position: Option<String>,
    pub ts: Option<String>,
    pub error: Option<HeardError>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct HeardError {
    pub code: String,
    pub message: String,
    pub retryable: bool,
}

#[derive(Debug, Clone, Deserialize)]
pub struct HeardMessage {
    pub id: Option<String>,
    payload: Box<RawValue>,
    encoding: Option<String>,
    pub key: Option<String>,
    #[serde(default)]
    pub headers: BTreeMap<String, String>,
    pub event_time: Option<String>,
}

impl Heard {
    pub fn parse(frame: &str) -> serde_json::Result<Self> {
        let mut heard: Self = serde_json::from_str(frame)?;
        heard.frame = frame.to_owned();
        Ok(heard)
    }

    /// The message of an event or a response.
    pub fn message(&self) -> Option<HeardMessage> {
        serde_json::from_str(self.message.as_ref()?.get()).ok()
    }

    /// The payload of an event or a response, as it was published.
    pub fn payload(&self) -> Option<Vec<u8>> {
        self.message()?.payload()
    }
}

impl HeardMessage {
    /// The bytes as they were published. `None` for an encoding that this build does not know.
    pub fn payload(&self) -> Option<Vec<u8>> {
        let raw = self.payload.get();
        match self.encoding.as_deref() {
            None => Some(raw.as_bytes().to_vec()),
            Some("text") => serde_json::from_str::<String>(raw).ok().map(String::into_bytes),
            Some("base64") => STANDARD.decode(serde_json::from_str::<String>(raw).ok()?).ok(),
            Some(_) => None,
        }
    }
}
