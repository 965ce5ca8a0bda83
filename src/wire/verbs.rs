//! What a client may say and what it hears, whatever its dialect.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::code::Fault;
use crate::message::{
    Draft, Envelope, GroupMode, Lane, Lanes, Message, MessageId, Position, Start, Timestamp,
};
use crate::topic::{Pattern, Topic};

/// One frame from a client: what it wants, and the name under which it waits for the answer.
#[derive(Debug, PartialEq)]
pub struct Asked {
    pub request_id: Option<Arc<str>>,
    pub command: Result<Command, Fault>,
}

/// What a client may say.
#[derive(Debug, PartialEq)]
pub enum Command {
    Subscribe(Subscribe),
    Unsubscribe {
        pattern: Pattern,
        group: Option<String>,
    },
    Publish {
        topic: Topic,
        draft: Draft,
        confirm: bool,
    },
    /// Several messages in their order. One that cannot be read is an error in its place.
    PublishMany {
        topic: Topic,
        drafts: Vec<Result<Draft, Fault>>,
        confirm: bool,
    },
    Request {
        topic: Topic,
        draft: Draft,
        timeout: Duration,
    },
    Reply {
        reply_to: Arc<str>,
        draft: Draft,
    },
    Ack {
        deliveries: Vec<u64>,
    },
    Nack {
        deliveries: Vec<u64>,
        delay: Option<Duration>,
    },
    Seek {
        pattern: Pattern,
        group: String,
        start: Start,
    },
    Ping,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Subscribe {
    pub pattern: Pattern,
    pub start: Start,
    pub client_id: Option<String>,
    pub group: Option<Group>,
    /// The text of an expression: only what it matches is to come.
    pub filter: Option<String>,
}

/// A consumer group, as a subscriber asks for it. On an ephemeral topic it is a queue group, and only its name
/// applies.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    pub name: String,
    pub mode: GroupMode,
    pub prefetch: u32,
    /// Acknowledged once written to the socket.
    pub auto_ack: bool,
}

pub const PREFETCH_DEFAULT: u32 = 100;
/// The most deliveries a group member may ask to hold.
pub const PREFETCH_MAX: u32 = 10_000;
/// The most that `last_n` gives on a durable topic.
pub const LAST_N_MAX: u32 = 10_000;
/// The most messages that one publish holds. They are answered by one frame and the connection does nothing else while
/// they get their places in line; lanes batch what comes in several frames just as well.
pub const MESSAGES_MAX: usize = 1000;
pub const REQUEST_TIMEOUT_DEFAULT: Duration = Duration::from_millis(1000);
pub const REQUEST_TIMEOUT_MAX: Duration = Duration::from_secs(300);
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// What a client hears. Thousands of these wait in queues, most of them live events, so the large ones are boxed.
#[derive(Debug)]
pub enum Event {
    Ack(Box<Ack>),
    /// A live event outside a group: the same bytes for every subscriber.
    Live(Arc<Envelope>),
    /// The same, where only storage brought what should have come live.
    Late(Arc<Envelope>),
    /// Everything up to here was delivered.
    Checkpoint {
        topic: Topic,
        position: Position,
    },
    /// An event of a replay.
    Replayed {
        envelope: Arc<Envelope>,
        subscription: Pattern,
    },
    /// A delivery to a group member; it is acknowledged by its number where the topic is durable.
    Delivered {
        envelope: Arc<Envelope>,
        group: Arc<str>,
        delivery: Option<Delivery>,
    },
    Response {
        request_id: Arc<str>,
        topic: Topic,
        message: Box<Message>,
    },
    Gap {
        topic: Pattern,
        dropped: Option<u64>,
        reason: GapReason,
    },
    Info(Info),
    Error {
        request_id: Option<Arc<str>>,
        fault: Fault,
    },
    Pong {
        request_id: Option<Arc<str>>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery {
    pub number: u64,
    pub attempt: u32,
}

/// The answer to what was done. What does not apply is absent.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Ack {
    pub request_id: Option<Arc<str>>,
    pub status: Status,
    pub topic: Option<Pattern>,
    pub lane: Option<Lanes>,
    pub message_id: Option<MessageId>,
    pub position: Option<Position>,
    pub ts: Timestamp,
    pub group: Option<String>,
    pub mode: Option<&'static str>,
    pub prefetch: Option<u32>,
    pub last_n: Option<u32>,
    /// What became of each message of a publish that held several, in their order; empty for everything else.
    pub results: Vec<Result<Accepted, Fault>>,
}

/// What was done about something that is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Status {
    #[default]
    Ok,
    /// Safe on the bridge's disk while the durable lane is down.
    Spooled,
    /// The id was there already: an earlier attempt had arrived.
    Duplicate,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Spooled => "spooled",
            Status::Duplicate => "duplicate",
        }
    }
}

/// One message of several that the lane has.
#[derive(Debug, Clone, PartialEq)]
pub struct Accepted {
    pub status: Status,
    pub message_id: Option<MessageId>,
    pub position: Option<Position>,
    pub ts: Timestamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GapReason {
    /// This connection was too slow.
    Slow,
    /// The broker was away, and nobody knows what was published meanwhile.
    Outage,
    /// Storage no longer holds what was asked for.
    Retention,
}

impl GapReason {
    pub fn as_str(self) -> &'static str {
        match self {
            GapReason::Slow => "slow",
            GapReason::Outage => "outage",
            GapReason::Retention => "retention",
        }
    }
}

/// What a client should know and need not answer.
#[derive(Debug, Clone, PartialEq)]
pub enum Info {
    /// The first frame of a connection with the subprotocol `twinspan.v1`.
    Connected {
        connection: u64,
        version: &'static str,
        max_message: usize,
        max_subscriptions: usize,
        ping_interval: Duration,
    },
    LaneDown {
        lane: Lane,
        message: String,
    },
    LaneUp {
        lane: Lane,
    },
    Draining {
        reconnect_after: Duration,
    },
    /// A reload moved a topic of this subscription; the subscription follows.
    RouteChanged {
        topic: Pattern,
    },
    TopicDeleted {
        topic: Topic,
    },
    /// Everything stored that was asked for has been sent; events from here on are live.
    ReplayDone {
        topic: Pattern,
    },
}

/// Turns one dialect's messages into commands, and events into its messages. No I/O and no clock.
pub trait Codec: Send + Sync {
    fn decode(&self, message: &Bytes) -> Asked;
    /// `now` stands in frames that have no time of their own.
    fn encode(&self, event: &Event, now: Timestamp) -> Bytes;
}
