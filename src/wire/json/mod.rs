//! The JSON dialect: one object a frame, in text messages.
//!
//! A payload is bytes. A publisher's JSON value travels as the very bytes it stood in the frame with; what is not JSON
//! is a string with `"encoding":"text"` or `"base64"`. Whoever subscribes reads JSON where the bytes are JSON, whoever
//! published them.

mod decode;
mod encode;
pub mod heard;
mod nesting;

use bytes::Bytes;

use super::verbs::{Asked, Codec, Event};
use crate::message::Timestamp;

pub use decode::refused_name;
pub use encode::{draft_value, error_value};

pub struct Json;

impl Codec for Json {
    fn decode(&self, message: &Bytes) -> Asked {
        decode::asked(message)
    }

    fn encode(&self, event: &Event, now: Timestamp) -> Bytes {
        encode::event(event, now)
    }
}
