//! Every error and close code that a client can see, and what to do about each.

use std::fmt;

/// The code of an `error` frame or of an HTTP error. Clients branch on it, so a code changes only by addition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    BadRequest,
    Forbidden,
    NoRoute,
    TopicNotFound,
    TopicExists,
    LaneMismatch,
    LaneUnavailable,
    OutcomeUnknown,
    StorageFull,
    NoResponders,
    Timeout,
    TooLarge,
    LimitExceeded,
    SlowConsumer,
    GroupBusy,
    UnknownDelivery,
    ShuttingDown,
    Internal,
}

impl Code {
    pub const ALL: [Code; 18] = [
        Code::BadRequest,
        Code::Forbidden,
        Code::NoRoute,
        Code::TopicNotFound,
        Code::TopicExists,
        Code::LaneMismatch,
        Code::LaneUnavailable,
        Code::OutcomeUnknown,
        Code::StorageFull,
        Code::NoResponders,
        Code::Timeout,
        Code::TooLarge,
        Code::LimitExceeded,
        Code::SlowConsumer,
        Code::GroupBusy,
        Code::UnknownDelivery,
        Code::ShuttingDown,
        Code::Internal,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Code::BadRequest => "BAD_REQUEST",
            Code::Forbidden => "FORBIDDEN",
            Code::NoRoute => "NO_ROUTE",
            Code::TopicNotFound => "TOPIC_NOT_FOUND",
            Code::TopicExists => "TOPIC_EXISTS",
            Code::LaneMismatch => "LANE_MISMATCH",
            Code::LaneUnavailable => "LANE_UNAVAILABLE",
            Code::OutcomeUnknown => "OUTCOME_UNKNOWN",
            Code::StorageFull => "STORAGE_FULL",
            Code::NoResponders => "NO_RESPONDERS",
            Code::Timeout => "TIMEOUT",
            Code::TooLarge => "TOO_LARGE",
            Code::LimitExceeded => "LIMIT_EXCEEDED",
            Code::SlowConsumer => "SLOW_CONSUMER",
            Code::GroupBusy => "GROUP_BUSY",
            Code::UnknownDelivery => "UNKNOWN_DELIVERY",
            Code::ShuttingDown => "SHUTTING_DOWN",
            Code::Internal => "INTERNAL",
        }
    }

    /// Whether the same frame, sent again later (after `OUTCOME_UNKNOWN` with the same id), may succeed.
    pub fn retryable(self) -> bool {
        match self {
            Code::LaneUnavailable
            | Code::OutcomeUnknown
            | Code::StorageFull
            | Code::NoResponders
            | Code::Timeout
            | Code::LimitExceeded
            | Code::SlowConsumer
            | Code::GroupBusy
            | Code::ShuttingDown
            | Code::Internal => true,
            Code::BadRequest
            | Code::Forbidden
            | Code::NoRoute
            | Code::TopicNotFound
            | Code::TopicExists
            | Code::LaneMismatch
            | Code::TooLarge
            | Code::UnknownDelivery => false,
        }
    }

    pub fn http_status(self) -> u16 {
        match self {
            Code::BadRequest | Code::LaneMismatch => 400,
            Code::Forbidden => 403,
            Code::NoRoute | Code::TopicNotFound | Code::NoResponders | Code::UnknownDelivery => 404,
            Code::TopicExists | Code::GroupBusy => 409,
            Code::TooLarge => 413,
            Code::LimitExceeded => 429,
            Code::Internal => 500,
            Code::LaneUnavailable | Code::StorageFull | Code::SlowConsumer | Code::ShuttingDown => 503,
            Code::OutcomeUnknown | Code::Timeout => 504,
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The longest sentence of a fault. What a client sent may be quoted in it, and half a megabyte sent wrongly must not
/// come back as several.
const MESSAGE_BYTES_MAX: usize = 1024;
/// The same where a frame holds a great many faults.
const SHORT_BYTES_MAX: usize = 256;

/// What went wrong, in a client's words: the code to branch on, the sentence to read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct Fault {
    pub code: Code,
    pub message: String,
}

impl Fault {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: cut(message.into(), MESSAGE_BYTES_MAX) }
    }

    /// For a frame that holds a great many faults.
    pub fn shortened(self) -> Self {
        Self { code: self.code, message: cut(self.message, SHORT_BYTES_MAX) }
    }

    /// A payload over the limit of the connection.
    pub fn too_large(size: usize, max: usize) -> Self {
        let message = format!("the payload has {size} bytes, {max} are allowed here; nothing was sent");
        Self::new(Code::TooLarge, message)
    }

    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(Code::BadRequest, message)
    }
}

fn cut(message: String, max: usize) -> String {
    if message.len() <= max {
        return message;
    }
    // What was quoted stands at the beginning; what became of it and what to do, at the end.
    let begin = message.floor_char_boundary(max / 2);
    let end = message.ceil_char_boundary(message.len() - max / 2);
    format!("{} … {}", &message[..begin], &message[end..])
}

/// Why a WebSocket was closed by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Close {
    /// The bridge drains: come back, to another one or later.
    GoingAway,
    /// A violation of RFC 6455.
    Protocol,
    /// A binary message on the JSON dialect.
    Binary,
    /// Text that is not UTF-8.
    InvalidUtf8,
    TooBig,
    /// A defect here: it is logged, and only this connection ends.
    Internal,
    /// The client read too slowly and its route closes such clients, or it stopped reading altogether.
    SlowConsumer,
    /// Nothing came for longer than the pong timeout.
    Silent,
}

impl Close {
    pub fn code(self) -> u16 {
        match self {
            Close::GoingAway | Close::Silent => 1001,
            Close::Protocol => 1002,
            Close::Binary => 1003,
            Close::InvalidUtf8 => 1007,
            Close::TooBig => 1009,
            Close::Internal => 1011,
            Close::SlowConsumer => 4008,
        }
    }

    pub fn reason(self) -> &'static str {
        match self {
            Close::GoingAway => "draining: reconnect",
            Close::Protocol => "not a WebSocket frame as RFC 6455 has it",
            Close::Binary => "this dialect is JSON in text messages; send binary payloads as base64",
            Close::InvalidUtf8 => "a text message must be UTF-8",
            Close::TooBig => "message too big",
            Close::Internal => "a defect here, logged",
            Close::SlowConsumer => "slow consumer",
            Close::Silent => "no pong and no message in time",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_short_whatever_it_quotes() {
        let quoted = "ä\u{7f}".repeat(100_000);
        let fault = Fault::bad_request(format!("header {quoted:?} is odd; nothing was sent"));
        assert!(fault.message.len() < MESSAGE_BYTES_MAX + 16, "{}", fault.message.len());
        assert!(fault.message.starts_with("header ") && fault.message.ends_with("nothing was sent"));
        assert_eq!(Fault::bad_request("short").message, "short");
    }
}
