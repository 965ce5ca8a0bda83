//! A message as NATS carries it: the payload as it is, the fabric's own fields in headers.
//!
//! | header | |
//! | --- | --- |
//! | `twinspan-id` | the message's id |
//! | `twinspan-ts` | when the fabric accepted it, RFC 3339 |
//! | `twinspan-key` | its key |
//! | `twinspan-event-time` | when it happened, RFC 3339 |
//! | `twinspan-timeout-ms` | on a request: how long the requester waits |
//! | `twinspan-live` | on a topic that is stored as well: its number (`LiveNo`) |

use std::fmt::Display;
use std::time::Duration;

use async_nats::{HeaderMap, HeaderName, StatusCode};
use bytes::Bytes;

use crate::lane::contract::LaneError;
use crate::message::{Headers, LIVE, Message, Timestamp};

const ID: &str = "twinspan-id";
const TS: &str = "twinspan-ts";
const KEY: &str = "twinspan-key";
const EVENT_TIME: &str = "twinspan-event-time";
const TIMEOUT: &str = "twinspan-timeout-ms";
/// What begins so is the fabric's, and nobody's header.
const OURS: &str = "twinspan-";

/// A message ready to be sent.
pub struct Outgoing {
    pub headers: HeaderMap,
    pub payload: Bytes,
    /// What the server holds against its limit: headers and payload as they are sent.
    pub size: usize,
}

/// What arrived.
pub struct Incoming {
    pub message: Message,
    /// On a request of a bridge.
    pub timeout: Option<Duration>,
}

/// The caller has checked the headers; what the client library refuses all the same is named here.
pub fn encode(message: &Message, timeout: Option<Duration>) -> Result<Outgoing, LaneError> {
    let mut outgoing = Outgoing::new(message.payload.clone());
    for (name, value) in &message.headers {
        outgoing.add(name, value)?;
    }
    outgoing.add_field(ID, message.id.as_ref())?;
    outgoing.add_field(TS, Some(&message.ts))?;
    outgoing.add_field(KEY, message.key.as_ref())?;
    outgoing.add_field(EVENT_TIME, message.event_time.as_ref())?;
    outgoing.add_field(TIMEOUT, timeout.map(|timeout| timeout.as_millis()).as_ref())?;
    Ok(outgoing)
}

impl Outgoing {
    /// A message of the lane to itself.
    pub fn empty() -> Self {
        Self::new(Bytes::new())
    }

    fn new(payload: Bytes) -> Self {
        // The first and the last line of a header block.
        let size = payload.len() + "NATS/1.0\r\n\r\n".len();
        Self { headers: HeaderMap::new(), payload, size }
    }

    fn add_field(&mut self, name: &str, value: Option<&impl Display>) -> Result<(), LaneError> {
        value.map_or(Ok(()), |value| self.add(name, &value.to_string()))
    }

    /// Through the fallible constructors: the others panic on a line break.
    fn add(&mut self, name: &str, value: &str) -> Result<(), LaneError> {
        let refused =
            || LaneError::BadRequest(format!("NATS cannot carry the header {name:?}; nothing was sent"));
        self.size += name.len() + value.len() + ": \r\n".len();
        let name: HeaderName = name.parse().map_err(|_| refused())?;
        let value: async_nats::HeaderValue = value.parse().map_err(|_| refused())?;
        self.headers.insert(name, value);
        Ok(())
    }
}

/// A native message has no id, and its `ts` is now.
pub fn decode(incoming: async_nats::Message) -> Incoming {
    let headers = incoming.headers.unwrap_or_default();
    let field = |name: &'static str| headers.get(HeaderName::from_static(name)).map(|value| value.as_str());
    let message = Message {
        id: field(ID).and_then(|id| id.parse().ok()),
        ts: field(TS).and_then(|ts| ts.parse().ok()).unwrap_or_else(Timestamp::now),
        payload: incoming.payload,
        key: field(KEY).map(str::to_owned),
        headers: publishers(&headers),
        event_time: field(EVENT_TIME).and_then(|time| time.parse().ok()),
        deliver_at: None,
    };
    let timeout = field(TIMEOUT).and_then(|millis| millis.parse().ok()).map(Duration::from_millis);
    Incoming { message, timeout }
}

/// The publisher's own headers. Of several values of one name the first: the fabric's headers are a flat map.
fn publishers(headers: &HeaderMap) -> Headers {
    headers
        .iter()
        .filter_map(|(name, values)| {
            let name: &str = name.as_ref();
            match name.to_ascii_lowercase().starts_with(OURS) && name != LIVE {
                true => None,
                false => Some((name.to_owned(), values.first()?.as_str().to_owned())),
            }
        })
        .collect()
}

/// What the server answers where nobody listens to a request.
pub fn is_no_responders(reply: &async_nats::Message) -> bool {
    reply.status == Some(StatusCode::NO_RESPONDERS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Draft, MessageId};

    fn arrived(outgoing: Outgoing) -> async_nats::Message {
        async_nats::Message {
            subject: "s".into(),
            reply: None,
            payload: outgoing.payload,
            headers: Some(outgoing.headers),
            status: None,
            description: None,
            length: 0,
        }
    }

    #[test]
    fn a_message_is_the_same_on_the_other_side() {
        let sent = Draft {
            id: Some(MessageId::new()),
            payload: Bytes::from_static(b"\x00\xff"),
            key: Some(String::new()),
            headers: [("traceparent".into(), "00-1".into()), ("X-Y".into(), String::new())].into(),
            event_time: Some(Timestamp::from_millis(5)),
            delay: None,
        }
        .accept();
        let incoming = decode(arrived(encode(&sent, Some(Duration::from_millis(1500))).unwrap()));
        assert_eq!(incoming.message, sent);
        assert_eq!(incoming.timeout, Some(Duration::from_millis(1500)));
    }

    #[test]
    fn a_native_message_has_no_id_and_its_first_value_of_each_header() {
        let mut native = arrived(Outgoing::empty());
        let headers = native.headers.get_or_insert_default();
        headers.append("a", "1");
        headers.append("a", "2");
        headers.append("twinspan-id", "not one");
        let before = Timestamp::now();
        let message = decode(native).message;
        assert_eq!((message.id, message.headers), (None, [("a".into(), "1".into())].into()));
        assert!(message.ts >= before);
    }
}
