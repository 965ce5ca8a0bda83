//! A message, where it stands in its topic, and where a subscriber wants to begin.
//!
//! Nothing here knows how it looks on a socket or at a broker: `wire` and the lanes do.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use sha1::{Digest, Sha1};
use uuid::{ContextV7, Uuid};

use crate::topic::Topic;

/// The kinds of transport a topic can take; the route says which.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    Ephemeral,
    Durable,
}

impl Lane {
    pub const ALL: [Lane; 2] = [Lane::Ephemeral, Lane::Durable];

    pub fn as_str(self) -> &'static str {
        match self {
            Lane::Ephemeral => "ephemeral",
            Lane::Durable => "durable",
        }
    }
}

/// What a route says its topics take: one lane, or both, live on the one and stored on the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Lanes {
    One(Lane),
    Both,
}

impl Lanes {
    pub const EPHEMERAL: Lanes = Lanes::One(Lane::Ephemeral);
    pub const DURABLE: Lanes = Lanes::One(Lane::Durable);

    pub fn takes(self, lane: Lane) -> bool {
        self == Lanes::Both || self == Lanes::One(lane)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Lanes::One(lane) => lane.as_str(),
            Lanes::Both => "both",
        }
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How the members of a consumer group share a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum GroupMode {
    /// One member; a second one is refused.
    Exclusive,
    /// Each message to any member.
    #[default]
    Shared,
    /// One member at a time, the others wait to take its place.
    Failover,
    /// The messages of one key to one member.
    KeyShared,
}

impl GroupMode {
    pub const ALL: [GroupMode; 4] =
        [GroupMode::Exclusive, GroupMode::Shared, GroupMode::Failover, GroupMode::KeyShared];

    pub fn as_str(self) -> &'static str {
        match self {
            GroupMode::Exclusive => "exclusive",
            GroupMode::Shared => "shared",
            GroupMode::Failover => "failover",
            GroupMode::KeyShared => "key_shared",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.as_str() == name)
    }
}

/// Identifies a message wherever it is copied to: publishing an id again is the same message again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MessageId(Uuid);

/// Keeps the ids of one millisecond apart, and in order.
static IDS: Mutex<ContextV7> = Mutex::new(ContextV7::new());

impl MessageId {
    /// A new id (UUIDv7: they sort by the time they were made, within a process strictly).
    pub fn new() -> Self {
        Self::at(Timestamp::now())
    }

    fn at(now: Timestamp) -> Self {
        let millis = now.as_millis().max(0) as u64;
        let nanos = (millis % 1000) as u32 * 1_000_000;
        let ids = IDS.lock().unwrap_or_else(PoisonError::into_inner);
        Self(Uuid::new_v7(uuid::Timestamp::from_unix(&*ids, millis / 1000, nanos)))
    }

    /// The id of a message that came from a native client without one: the same on every bridge.
    pub fn derived(topic: &str, partition: u32, place: Place) -> Self {
        // A UUIDv5 of a URL. Hashed here, because `uuid` hashes a name that is whole, and in software.
        let mut hash = Sha1::new_with_prefix(Uuid::NAMESPACE_URL);
        hash.update("twinspan:");
        hash.update(topic);
        let mut digits = itoa::Buffer::new();
        let numbers = [partition.into(), place.ledger, place.entry, place.index.into()];
        for (before, number) in [":", ":", "-", "-"].into_iter().zip(numbers) {
            hash.update(before);
            hash.update(digits.format(number));
        }
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&hash.finalize()[..16]);
        Self(uuid::Builder::from_sha1_bytes(bytes).into_uuid())
    }

    /// The id of another message of the same entry, where this is the first one's.
    pub fn nth(self, index: u32) -> Self {
        Self(Uuid::from_u128(self.0.as_u128() ^ u128::from(index)))
    }

    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }
}

impl Default for MessageId {
    fn default() -> Self {
        Self::new()
    }
}

impl FromStr for MessageId {
    type Err = uuid::Error;

    /// Only the usual text form, so that an id is the same string wherever it is read.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.len() {
            36 => Uuid::try_parse(text).map(Self),
            _ => Uuid::try_parse("").map(Self),
        }
    }
}

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A point in time in whole milliseconds, the resolution of the wire and of both brokers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    pub fn now() -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self::from_millis(since.as_millis() as i64)
    }

    /// Cut to the years that RFC 3339 can write, so that what a broker says can always be shown.
    pub fn from_millis(millis: i64) -> Self {
        Self(millis.clamp(-62_135_596_800_000, 253_402_207_200_000))
    }

    pub fn as_millis(self) -> i64 {
        self.0
    }

    pub fn after(self, delay: Duration) -> Self {
        Self::from_millis(self.0.saturating_add(i64::try_from(delay.as_millis()).unwrap_or(i64::MAX)))
    }

    pub fn before(self, lead: Duration) -> Self {
        Self::from_millis(self.0.saturating_sub(i64::try_from(lead.as_millis()).unwrap_or(i64::MAX)))
    }

    /// How long ago this was; zero for the future (clocks of two machines differ).
    pub fn age(self) -> Duration {
        Duration::from_millis(Self::now().0.saturating_sub(self.0).max(0) as u64)
    }
}

impl FromStr for Timestamp {
    type Err = jiff::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<jiff::Timestamp>().map(|t| Self::from_millis(t.as_millisecond()))
    }
}

/// RFC 3339 in UTC with milliseconds.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = jiff::Timestamp::from_millisecond(self.0).unwrap_or_default();
        write!(f, "{time:.3}")
    }
}

/// Headers whose names begin so are the fabric's own.
pub const RESERVED: &str = "twinspan-";
/// What names the headers begin with by which a dead letter says where it comes from. No publisher has them, and they
/// cross like the publisher's.
pub const ORIGIN: &str = "twinspan-origin-";

/// The header by which a bridge numbers what it sends live and stores as well. No client gives it or sees it.
pub const LIVE: &str = "twinspan-live";

/// Which of a bridge's live messages a message is, as `BRIDGE-NUMBER` in its header. A topic's are stored in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LiveNo {
    pub bridge: u64,
    pub number: u64,
}

impl LiveNo {
    pub fn of(message: &Message) -> Option<Self> {
        let (bridge, number) = message.headers.get(LIVE)?.split_once('-')?;
        Some(Self { bridge: u64::from_str_radix(bridge, 16).ok()?, number: number.parse().ok()? })
    }
}

impl fmt::Display for LiveNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}-{}", self.bridge, self.number)
    }
}

/// The header by which a publisher says which trace its message belongs to (W3C Trace Context). It crosses as it came.
pub const TRACEPARENT: &str = "traceparent";

/// A span of a trace that is recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    pub trace: [u8; 16],
    pub span: [u8; 8],
}

impl TraceParent {
    /// What the publisher's own span was: `None` where its header is not valid, or says that nobody records the trace.
    pub fn sampled(headers: &Headers) -> Option<Self> {
        let mut fields = headers.get(TRACEPARENT)?.split('-');
        let is_hex = |field: &&str| field.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let mut field = |digits: usize| fields.next().filter(|f| f.len() == digits).filter(is_hex);
        let (version, trace, span, flags) = (field(2)?, field(32)?, field(16)?, field(2)?);
        // A version to come may have more fields behind these; the one there is has none.
        if version == "ff" || version == "00" && fields.next().is_some() {
            return None;
        }
        let trace = u128::from_str_radix(trace, 16).ok().filter(|trace| *trace != 0)?;
        let span = u64::from_str_radix(span, 16).ok().filter(|span| *span != 0)?;
        let is_sampled = u8::from_str_radix(flags, 16).is_ok_and(|flags| flags & 1 == 1);
        is_sampled.then_some(Self { trace: trace.to_be_bytes(), span: span.to_be_bytes() })
    }

    /// Another span of the trace.
    pub fn another(self) -> Self {
        Self { span: fastrand::u64(1..).to_be_bytes(), ..self }
    }
}

/// The publisher's own fields: a flat map, carried in NATS headers and Pulsar properties.
pub type Headers = BTreeMap<String, String>;

/// What a publisher hands in, before the fabric accepted it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Draft {
    pub id: Option<MessageId>,
    pub payload: Bytes,
    pub key: Option<String>,
    pub headers: Headers,
    pub event_time: Option<Timestamp>,
    /// Deliver to groups only after this.
    pub delay: Option<Duration>,
}

impl Draft {
    /// The fabric accepts the message now.
    pub fn accept(self) -> Message {
        let ts = Timestamp::now();
        Message {
            id: Some(self.id.unwrap_or_else(|| MessageId::at(ts))),
            ts,
            payload: self.payload,
            key: self.key,
            headers: self.headers,
            event_time: self.event_time,
            deliver_at: self.delay.map(|delay| ts.after(delay)),
        }
    }
}

/// One message. The payload is the bytes that the publisher sent, on every lane.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Absent only where a native NATS client published.
    pub id: Option<MessageId>,
    /// When the fabric accepted it.
    pub ts: Timestamp,
    pub payload: Bytes,
    /// Orders messages, and picks the member of a key-shared group.
    pub key: Option<String>,
    pub headers: Headers,
    /// When it happened, in the publisher's words.
    pub event_time: Option<Timestamp>,
    /// Groups of mode `shared` and `key_shared` get it no earlier.
    pub deliver_at: Option<Timestamp>,
}

/// Where the answer to a request goes. The lane that made it knows what it means; nobody else reads it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ReplyTo {
    pub address: Arc<str>,
    /// How long the requester waits, where the request said so.
    pub timeout: Option<Duration>,
}

/// What an envelope weighs without its bytes, and each header without its own: a great many small headers would else
/// be a great deal of memory that nobody counts.
const ENVELOPE_BYTES: usize = 128;
const HEADER_BYTES: usize = 96;

/// A message on its way to subscribers, shared by all of them.
#[derive(Debug)]
pub struct Envelope {
    pub topic: Topic,
    /// Which brought it.
    pub lane: Lane,
    /// What its route says, once whoever hands it to a client has told.
    lanes: OnceLock<Lanes>,
    pub message: Message,
    /// On a durable topic.
    pub stored: Option<Stored>,
    /// On a request.
    pub reply_to: Option<ReplyTo>,
    /// Where its trace is recorded, whether this bridge exports any or not.
    pub trace: Option<TraceParent>,
    /// When the lane brought it, of one in so many and of what is traced.
    pub brought: Option<Instant>,
    /// The event as `wire` encoded it: whoever needs it first makes it, the others share it.
    encoded: OnceLock<Bytes>,
    /// What filters found, by their number: whoever needs it first looks, the others share it.
    verdicts: Mutex<Vec<(u64, bool)>>,
}

/// Of one event in sixteen it is timed what becomes of it: for each it would cost more than it tells. Who traces a
/// message wants to know.
fn timed(trace: Option<TraceParent>) -> Option<Instant> {
    (trace.is_some() || fastrand::u8(..16) == 0).then(Instant::now)
}

/// Where a stored message stands.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub partition: u32,
    pub place: Place,
    /// The place in the whole topic: delivery that goes on after it misses nothing of any partition.
    pub position: Position,
}

impl Envelope {
    pub fn ephemeral(topic: Topic, message: Message, reply_to: Option<ReplyTo>) -> Self {
        Self::new(Lane::Ephemeral, topic, message, None, reply_to)
    }

    pub fn durable(topic: Topic, message: Message, stored: Stored) -> Self {
        Self::new(Lane::Durable, topic, message, Some(stored), None)
    }

    fn new(
        lane: Lane,
        topic: Topic,
        message: Message,
        stored: Option<Stored>,
        reply_to: Option<ReplyTo>,
    ) -> Self {
        let trace = TraceParent::sampled(&message.headers);
        Self {
            topic,
            lane,
            lanes: OnceLock::new(),
            message,
            stored,
            reply_to,
            trace,
            brought: timed(trace),
            encoded: OnceLock::new(),
            verdicts: Mutex::default(),
        }
    }

    /// Its route says so. The first who tells is believed.
    pub fn is_of(&self, lanes: Lanes) {
        self.lanes.get_or_init(|| lanes);
    }

    /// What clients are told.
    pub fn lanes(&self) -> Lanes {
        *self.lanes.get().unwrap_or(&Lanes::One(self.lane))
    }

    /// The encoded event, made by the first who asks.
    pub fn encoded(&self, encode: impl FnOnce(&Self) -> Bytes) -> Bytes {
        self.encoded.get_or_init(|| encode(self)).clone()
    }

    /// What this filter found of the message; `find` runs for the first who asks.
    pub fn verdict(&self, filter: u64, find: impl FnOnce() -> bool) -> bool {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, verdict)) = verdicts.iter().find(|(no, _)| *no == filter) {
            return *verdict;
        }
        let verdict = find();
        verdicts.push((filter, verdict));
        verdict
    }

    /// What this envelope counts against a bound: its bytes, and what holds them.
    pub fn weight(&self) -> usize {
        let Message { payload, key, headers, .. } = &self.message;
        let headers: usize =
            headers.iter().map(|(name, value)| HEADER_BYTES + name.len() + value.len()).sum();
        let key = key.as_ref().map_or(0, String::len);
        ENVELOPE_BYTES + self.topic.as_str().len() + payload.len() + key + headers
    }
}

/// One message's place in one partition: in Pulsar's words its ledger, entry, and index within the entry's batch.
/// The embedded log uses the log's own epoch as ledger and the sequence number as entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Place {
    pub ledger: u64,
    pub entry: u64,
    pub index: u32,
}

/// A place in a whole topic, its partitions included. Clients keep it as an opaque string.
///
/// ```text
/// 12-7-0                          the topic has one partition
/// 0:12-7-0,3:14-1-2@1763715600123 partitions 0 and 3 are there; any other is where it was at that time
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Position {
    Whole(Place),
    Partitioned { reached: Arc<BTreeMap<u32, Place>>, others_from: Timestamp },
}

impl Position {
    /// Behind one message of one partition; of the others only a time is known.
    pub fn in_partition(partition: u32, place: Place, others_from: Timestamp) -> Self {
        Position::Partitioned { reached: Arc::new([(partition, place)].into()), others_from }
    }

    /// Whether delivery up to this position includes the message at `place`, as far as the position tells: of a
    /// partition that it does not name it knows nothing.
    pub fn covers(&self, partition: u32, place: Place) -> bool {
        match self {
            Position::Whole(reached) => partition == 0 && place <= *reached,
            Position::Partitioned { reached, .. } => {
                reached.get(&partition).is_some_and(|reached| place <= *reached)
            }
        }
    }

    /// Whether delivery up to `other` includes everything up to this position, as far as both tell.
    pub fn is_within(&self, other: &Position) -> bool {
        match self {
            Position::Whole(place) => other.covers(0, *place),
            Position::Partitioned { reached, .. } => {
                reached.iter().all(|(partition, place)| other.covers(*partition, *place))
            }
        }
    }

    /// The position that is behind both, as far as there are any.
    pub fn behind(one: Option<Self>, other: Option<Self>) -> Option<Self> {
        Some(match (one, other) {
            (
                Some(Position::Partitioned { mut reached, others_from }),
                Some(Position::Partitioned { reached: more, .. }),
            ) => {
                let places = Arc::make_mut(&mut reached);
                for (partition, place) in more.iter() {
                    let here = places.entry(*partition).or_insert(*place);
                    *here = (*here).max(*place);
                }
                Position::Partitioned { reached, others_from }
            }
            (Some(one), Some(other)) if one.is_within(&other) => other,
            (one, other) => return one.or(other),
        })
    }

    /// Where this position stands in one partition.
    pub fn place(&self, partition: u32) -> Option<Place> {
        match self {
            Position::Whole(place) => (partition == 0).then_some(*place),
            Position::Partitioned { reached, .. } => reached.get(&partition).copied(),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.ledger, self.entry, self.index)
    }
}

impl FromStr for Place {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('-');
        let mut next = || parts.next().and_then(number).ok_or(PositionError);
        let place = Place {
            ledger: next()?,
            entry: next()?,
            index: u32::try_from(next()?).map_err(|_| PositionError)?,
        };
        if parts.next().is_some() { Err(PositionError) } else { Ok(place) }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Position::Whole(place) => place.fmt(f),
            Position::Partitioned { reached, others_from } => {
                for (at, (partition, place)) in reached.iter().enumerate() {
                    write!(f, "{}{partition}:{place}", if at > 0 { "," } else { "" })?;
                }
                write!(f, "@{}", others_from.as_millis())
            }
        }
    }
}

impl FromStr for Position {
    type Err = PositionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((places, time)) = text.split_once('@') else {
            return text.parse().map(Position::Whole);
        };
        let mut reached = BTreeMap::new();
        for part in places.split(',').filter(|part| !part.is_empty()) {
            let (partition, place) = part.split_once(':').ok_or(PositionError)?;
            let partition = number(partition).and_then(|n| u32::try_from(n).ok()).ok_or(PositionError)?;
            reached.insert(partition, place.parse()?);
        }
        let millis = number(time).and_then(|n| i64::try_from(n).ok()).ok_or(PositionError)?;
        Ok(Position::Partitioned { reached: Arc::new(reached), others_from: Timestamp::from_millis(millis) })
    }
}

/// Digits alone: `u64::from_str` would take a sign as well.
fn number(text: &str) -> Option<u64> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The string is no position that this fabric made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a position: use one as an ack or an event carried it")]
pub struct PositionError;

/// Where delivery begins.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum Start {
    /// With what is published from now on.
    #[default]
    Latest,
    /// With the oldest that is stored.
    Earliest,
    /// With the first message accepted at this time or later.
    Time(Timestamp),
    /// With the message after this one.
    After(Position),
    /// With the newest n.
    Last(u32),
    /// Resumes a pattern: each topic after its position, those not named at a time.
    Resume { positions: Arc<BTreeMap<Topic, Position>>, others_from: Timestamp },
}

impl Start {
    /// Where one topic of the subscription begins.
    pub fn for_topic(&self, topic: &Topic) -> Start {
        match self {
            Start::Resume { positions, others_from } => match positions.get(topic) {
                Some(position) => Start::After(position.clone()),
                None => Start::Time(*others_from),
            },
            other => other.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_envelope_weighs_at_least_what_it_holds() {
        let weight =
            |draft: Draft| Envelope::ephemeral(Topic::parse("a").unwrap(), draft.accept(), None).weight();
        let empty = weight(Draft::default());
        assert!(weight(Draft { payload: vec![0; 1000].into(), ..Draft::default() }) >= empty + 1000);
        assert!(weight(Draft { key: Some("k".repeat(1000)), ..Draft::default() }) >= empty + 1000);
        // Two strings and their place in a tree, however short they are.
        let headers = (0..1000).map(|n| (n.to_string(), String::new())).collect();
        let each = 2 * size_of::<String>() + 3;
        assert!(weight(Draft { headers, ..Draft::default() }) >= empty + 1000 * each);
    }

    #[test]
    fn a_position_reads_back_as_it_was_written() {
        for text in ["12-7-0", "0:12-7-0,3:14-1-2@1763715600123", "@5"] {
            assert_eq!(text.parse::<Position>().unwrap().to_string(), text);
        }
        for bad in ["", "1-2", "1-2-3-4", "+1-2-3", "1-2-x", "0:1-2-3", "1-2-3@", "1-2-99999999999", "x@1"] {
            assert!(bad.parse::<Position>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_position_covers_what_stands_at_or_before_it_in_its_partitions() {
        let place = |entry| Place { ledger: 1, entry, index: 0 };
        let whole = Position::Whole(place(7));
        assert!(whole.covers(0, place(7)) && !whole.covers(0, place(8)));
        let parts: Position = "2:1-7-0@5".parse().unwrap();
        assert!(parts.covers(2, place(7)) && !parts.covers(2, place(8)) && !parts.covers(0, place(1)));
    }

    #[test]
    fn what_is_behind_two_positions_covers_what_either_does() {
        let position = |text: &str| text.parse::<Position>().unwrap();
        for (one, other, both) in [
            ("1-2-0", "1-3-0", "1-3-0"),
            ("1-3-0", "1-2-0", "1-3-0"),
            ("0:1-2-0,1:1-9-0@5", "0:1-7-0,2:1-1-0@5", "0:1-7-0,1:1-9-0,2:1-1-0@5"),
        ] {
            assert_eq!(Position::behind(Some(position(one)), Some(position(other))), Some(position(both)));
        }
    }

    #[test]
    fn time_is_written_as_rfc_3339_with_milliseconds() {
        assert_eq!(Timestamp::from_millis(1_763_715_600_123).to_string(), "2025-11-21T09:00:00.123Z");
        assert_eq!("2025-11-21T10:00:00+01:00".parse::<Timestamp>().unwrap().as_millis(), 1_763_715_600_000);
        for extreme in [i64::MIN, i64::MAX] {
            assert!(Timestamp::from_millis(extreme).to_string().parse::<Timestamp>().is_ok());
        }
    }

    #[test]
    fn a_trace_is_recorded_where_its_header_is_valid_and_says_so() {
        let sampled = |text: &str| TraceParent::sampled(&[(TRACEPARENT.to_owned(), text.to_owned())].into());
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "00f067aa0ba902b7");
        let parent = sampled(&format!("00-{trace}-{span}-01")).unwrap();
        assert_eq!(parent.trace[..3], [0x0a, 0xf7, 0x65]);
        assert_eq!(parent.span, [0, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 0x02, 0xb7]);
        assert_eq!((parent.another().trace, parent.another() == parent), (parent.trace, false));
        for recorded in [format!("00-{trace}-{span}-ff"), format!("cc-{trace}-{span}-01-what-may-come")] {
            assert_eq!(sampled(&recorded), Some(parent), "{recorded}");
        }
        let none = ["0".repeat(32), "0".repeat(16)];
        for not in [
            format!("00-{trace}-{span}-00"),
            format!("00-{trace}-{span}-01-more"),
            format!("ff-{trace}-{span}-01"),
            format!("00-{}-{span}-01", none[0]),
            format!("00-{trace}-{}-01", none[1]),
            format!("00-{}-{span}-01", trace.to_uppercase()),
            format!("00-+{}-{span}-01", &trace[1..]),
            format!("00-{trace}-{span}"),
            format!(" 00-{trace}-{span}-01"),
            format!("00-{trace}é-{span}-01"),
            String::new(),
        ] {
            assert_eq!(sampled(&not), None, "{not}");
        }
    }

    #[test]
    fn an_id_is_a_uuid_in_its_usual_form() {
        let id = MessageId::new();
        assert_eq!(id.to_string().parse::<MessageId>().unwrap(), id);
        assert!(id.to_string().replace('-', "").parse::<MessageId>().is_err());
    }

    #[test]
    fn the_id_of_a_native_message_is_the_uuid_v5_of_its_place() {
        // By Python's `uuid.uuid5(uuid.NAMESPACE_URL, "twinspan:orders.eu:2:3-7-0")`.
        let derived = MessageId::derived("orders.eu", 2, Place { ledger: 3, entry: 7, index: 0 });
        assert_eq!(derived.to_string(), "4038f444-807f-5fa8-a49f-3f4836d015cf");
    }

    #[test]
    fn ids_have_the_time_of_their_message_and_sort_as_they_were_made_also_where_the_clock_is_set_back() {
        let messages: Vec<_> = (0..1000).map(|_| Draft::default().accept()).collect();
        let mut ids: Vec<_> = messages.iter().map(|message| message.id.unwrap()).collect();
        for (id, message) in ids.iter().zip(&messages) {
            assert_eq!(id.0.get_version(), Some(uuid::Version::SortRand));
            let (seconds, nanos) = id.0.get_timestamp().unwrap().to_unix();
            let millis = seconds as i64 * 1000 + i64::from(nanos) / 1_000_000;
            // What other tests make meanwhile is in the same order.
            assert!((0..60_000).contains(&(millis - message.ts.as_millis())));
        }
        ids.push(MessageId::at(messages[0].ts.before(Duration::from_secs(3600))));
        ids.push(MessageId::new());
        assert!(ids.is_sorted_by(|before, behind| before < behind));
    }
}
