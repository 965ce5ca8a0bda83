//! The two lane contracts, side by side. Each comment is a promise, and the contract suites in `tests/it/` hold
//! every carrier to it.
//!
//! ```text
//!            EphemeralLane                 DurableLane
//! publish    handed to a live connection   stored
//! subscribe  an Ear hears what comes       a Tail is followed, a Reader catches up, a Member takes its share
//! behind     the ear's owner drops         nobody drops: who is slow leaves the tail and reads from storage
//! ```
//! A lane finds a topic's physical name, history and retention in the route that the caller decided on, or, for
//! what comes from a broker, in the policy. It knows nothing of clients.

use std::collections::BTreeSet;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Either, Ready};
use tokio::sync::watch;

use super::slot::Waiting;
use super::tail::Tail;
use crate::message::{Envelope, GroupMode, Message, Position, ReplyTo, Start, Timestamp};
use crate::origin::Problem;
use crate::policy::table::Route;
use crate::topic::{Pattern, Topic};

/// Why a lane did not do what it was asked. Each says what became of the message.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LaneError {
    /// Nothing was sent or stored.
    #[error("{0}; nothing was sent or stored")]
    Unavailable(String),
    /// It was sent, and no answer came.
    #[error("{0}; the message may or may not be stored")]
    OutcomeUnknown(String),
    /// Nothing was stored.
    #[error("{0}; nothing was stored")]
    StorageFull(String),
    /// The broker takes at most `max` bytes. Nothing was sent.
    #[error("the message has {size} bytes, the broker takes {max}; nothing was sent")]
    TooLarge { size: usize, max: usize },
    /// The broker does not allow it.
    #[error("{0}")]
    Forbidden(String),
    #[error("nobody serves `{0}`")]
    NoResponders(Topic),
    #[error("no answer from `{0}` in time")]
    Timeout(Topic),
    /// The position, group or topic asked for cannot be served as asked.
    #[error("{0}")]
    BadRequest(String),
    #[error("{0}")]
    GroupBusy(String),
    /// What is stored at this place does not match its checksum: it is named, never handed out.
    #[error(
        "the record at {place} of `{topic}` is corrupt (its checksum does not match); it was not delivered"
    )]
    Corrupt { topic: Topic, place: String },
    /// A defect here or at the broker.
    #[error("{0}")]
    Internal(String),
}

/// What is known of a lane's broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LaneState {
    Up,
    /// What failed, in a sentence.
    Down(String),
}

impl LaneState {
    pub fn is_up(&self) -> bool {
        matches!(self, LaneState::Up)
    }
}

/// What a lane's broker tells of itself, in the same fields for either; `None` where it does not say.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct BrokerReport {
    pub version: Option<String>,
    pub connections: Option<u64>,
    pub subscriptions: Option<u64>,
    /// Clients that it cut off since it started because they read too slowly.
    pub slow_consumers: Option<u64>,
    /// Messages a second, in from publishers and out to subscribers, over all its clients.
    pub in_rate: Option<f64>,
    pub out_rate: Option<f64>,
    /// Why it says less than it could, or is not well by its own account.
    pub problem: Option<String>,
}

/// Returns once the durable lane is down, and says why.
pub async fn durable_down(state: &mut watch::Receiver<LaneState>) -> String {
    match state.wait_for(|state| !state.is_up()).await.as_deref() {
        Ok(LaneState::Down(why)) => format!("the durable lane is down: {why}"),
        Ok(LaneState::Up) | Err(_) => "the durable lane was closed".into(),
    }
}

/// Hears what an ephemeral lane brings. Called from the lane's own task, so it never waits.
pub trait Ear: Send + Sync {
    fn hear(&self, route: &Arc<Route>, envelope: &Arc<Envelope>);

    /// The broker was away: what was published meanwhile is lost, and nobody knows how much.
    fn missed(&self);
}

/// An ear's place in a lane. Dropping it ends the hearing.
pub struct Listening {
    /// What the history held when the ear was placed, per topic oldest first. Whatever is not in here and comes
    /// later is heard; nothing is in both.
    pub history: Vec<(Arc<Route>, Arc<Envelope>)>,
    /// Runs when the place is given up.
    pub on_drop: Box<dyn Send + Sync + std::any::Any>,
}

/// Low latency, at most once.
#[async_trait]
pub trait EphemeralLane: Send + Sync {
    /// Returns once the message was handed to a live connection (in process: to every ear). Fails at once, with
    /// nothing buffered, while there is no connection, and never waits longer than the lane's deadline.
    /// One caller's messages on one topic are heard in the order of the calls.
    async fn publish(&self, route: &Arc<Route>, topic: &Topic, message: Message) -> Result<(), LaneError>;

    /// Returns once every message published from now on, by anyone anywhere, will be heard. What the broker refuses
    /// is `Forbidden`, never silence. With a group, each message is heard by one ear of the group, over all bridges.
    /// `last` asks for the newest of each matching topic's history. Only topics whose route takes this lane are
    /// heard, each message once per ear, whatever upstream subscriptions there are.
    async fn listen(
        &self,
        pattern: &Pattern,
        group: Option<&str>,
        last: usize,
        ear: Arc<dyn Ear>,
    ) -> Result<Listening, LaneError>;

    /// Returns the first reply. `NoResponders` at once where nobody listens, `Timeout` where nobody answered in time;
    /// a request that was dropped leaves nothing behind.
    async fn request(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        timeout: Duration,
    ) -> Result<Message, LaneError>;

    /// Answers a request that an ear heard. A reply that nobody waits for any more is dropped.
    async fn reply(&self, to: &ReplyTo, message: Message) -> Result<(), LaneError>;

    /// A round trip through the lane, timed. Fails within a second where the lane cannot be reached.
    async fn probe(&self) -> Result<Duration, LaneError>;

    /// Asks the broker about itself; `None` where the lane has none. Ends within five seconds. What comes of it says
    /// nothing of the lane's state.
    async fn broker(&self) -> Option<BrokerReport> {
        None
    }

    /// The state now and as it changes. A broker that was killed, froze or cannot be reached is `Down` within 3 s.
    fn state(&self) -> watch::Receiver<LaneState>;

    /// Hands over what is under way and closes the connections. Ends within a second.
    async fn close(&self);
}

/// A message on its way into its line. Most find room at once, and take no box.
pub type Appending<'a> = Either<Ready<Result<Receipt, LaneError>>, BoxFuture<'a, Result<Receipt, LaneError>>>;

/// What becomes of an appended message: its position once it is stored.
pub struct Receipt(Kind);

enum Kind {
    Boxed(BoxFuture<'static, Result<Position, LaneError>>),
    /// Without an allocation of its own.
    InSlot(Waiting),
}

impl Receipt {
    pub fn of(outcome: impl Future<Output = Result<Position, LaneError>> + Send + 'static) -> Self {
        Self(Kind::Boxed(outcome.boxed()))
    }
}

/// Of a topic without partitions.
impl From<Waiting> for Receipt {
    fn from(waiting: Waiting) -> Self {
        Self(Kind::InSlot(waiting))
    }
}

impl Future for Receipt {
    type Output = Result<Position, LaneError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Kind::Boxed(outcome) => outcome.poll_unpin(context),
            Kind::InSlot(waiting) => waiting.poll_unpin(context).map_ok(Position::Whole),
        }
    }
}

/// Who publishes: a connection, or whatever else keeps an order of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Publisher(pub u64);

/// What a member asks for.
#[derive(Debug, Clone)]
pub struct Joining {
    pub group: String,
    pub mode: GroupMode,
    /// Where a new group begins; an existing one goes on where it stood.
    pub start: Start,
    /// The most that the member holds unacknowledged.
    pub prefetch: u32,
}

/// How a group stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupReport {
    pub name: String,
    /// That of its members; `None` where there are none.
    pub mode: Option<GroupMode>,
    /// Over all bridges, native ones included.
    pub members: usize,
    /// Messages (not entries) that are not acknowledged.
    pub backlog: u64,
    /// Of those, the ones that members hold.
    pub unacked: u64,
    /// When the oldest of the backlog was stored.
    pub oldest: Option<Timestamp>,
}

/// Stored until retention removes it.
#[async_trait]
pub trait DurableLane: Send + Sync {
    /// Returns once the message has its place in line; waits while the line is full. The receipt is ready once the
    /// message survives a restart of the bridge and of the broker, or with an error that says what became of it;
    /// never later than the publish timeout after the call; a message that found no place in line by then is
    /// `Unavailable`. One caller's messages of one key on one topic, and those
    /// without a key, are stored in the order of the calls. What was confirmed
    /// can be read from then on. Dropping a receipt takes nothing back. In a topic of several partitions a message
    /// goes where its key says, and without a key where its `publisher`'s others went.
    fn append<'a>(
        &'a self,
        route: &'a Arc<Route>,
        topic: &'a Topic,
        message: Message,
        publisher: Publisher,
    ) -> Appending<'a>;

    /// The topic's shared tail: what is stored from now on, however many follow it. It ends only with an error that
    /// it hands to its followers.
    async fn tail(&self, route: &Arc<Route>, topic: &Topic) -> Result<Arc<Tail>, LaneError>;

    /// Reads what is stored now, in the order of storage, each message once, from `start` on.
    /// Whoever follows the `Tail` first and reads then misses nothing: the two overlap.
    /// A position that this lane did not make, or that its storage does not know, is `BadRequest`.
    async fn read(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        start: Start,
    ) -> Result<Box<dyn Reader>, LaneError>;

    /// Joins a group. Each message goes to one member, and what a member held when it was dropped goes at once to
    /// another, or waits for the next. A group has the mode of its members: while there are any of another mode, and
    /// while an `exclusive` one has its member, joining is `GroupBusy` at once.
    ///
    /// ```text
    /// exclusive    the one member, in the order of storage
    /// failover     the member of longest standing, in the order of storage; when it leaves, the next within 2 s
    /// shared       any member
    /// key_shared   the messages of a key to one member. When members come or go a key may move; its new member gets
    ///              none of it before what the old one held of it is acknowledged or was given back
    /// ```
    /// Of members that joined within the same second on two bridges either may count as the older; a topic of several
    /// partitions may then have both, each with some of them.
    /// A message is not handed to `shared` and `key_shared` before its `deliver_at`; the other two get it at once.
    async fn join(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        joining: Joining,
    ) -> Result<Box<dyn Member>, LaneError>;

    /// Returns once a group goes on from `start`, with its members or without any. What they held is no longer
    /// theirs: acknowledging it changes nothing. A group that does not exist is `BadRequest`.
    async fn seek(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        group: &str,
        start: Start,
    ) -> Result<(), LaneError>;

    /// Deletes a group and what it had acknowledged. `false`: there was none. One with members is `GroupBusy`.
    async fn delete_group(&self, route: &Arc<Route>, topic: &Topic, group: &str) -> Result<bool, LaneError>;

    /// The topics that match and exist in storage, and whose route in force takes this lane.
    async fn topics(&self, pattern: &Pattern) -> Result<Vec<Topic>, LaneError>;

    /// The topics known to exist, soon after this was called and as more appear: each within a second of the moment
    /// when its first message is confirmed, whoever published it. There may be more, which were deleted or whose route
    /// takes another lane by now.
    fn watch_topics(&self) -> watch::Receiver<BTreeSet<Topic>>;

    /// Creates the topic in storage. `false`: it was there.
    async fn create(&self, route: &Arc<Route>, topic: &Topic) -> Result<bool, LaneError>;

    /// How the groups of a topic stand; none for a topic that does not exist.
    async fn groups(&self, route: &Arc<Route>, topic: &Topic) -> Result<Vec<GroupReport>, LaneError>;

    /// What the broker is set to that does not fit what the routes in force expect of it. Nothing where the lane has no
    /// broker.
    async fn examine(&self) -> Result<Vec<Problem>, LaneError> {
        Ok(Vec::new())
    }

    /// As on the ephemeral lane: a round trip through storage, timed: a message written, confirmed and, where the lane
    /// may read, back with whoever follows its topic.
    async fn probe(&self) -> Result<Duration, LaneError>;

    async fn broker(&self) -> Option<BrokerReport> {
        None
    }

    fn state(&self) -> watch::Receiver<LaneState>;

    /// Confirms what is under way and closes. Ends within five seconds.
    async fn close(&self);
}

/// Reads what one topic holds when the reader is opened, and ends there: what is stored later comes by the `Tail`.
#[async_trait]
pub trait Reader: Send {
    /// The next messages, at least one, in the order of storage; `None` once everything that was stored when the
    /// reader was opened has been returned, also where that was nothing. A record that cannot be read is an error of
    /// its own, and reading goes on behind it. Cancel safe: what a dropped call would have returned, the next one
    /// returns.
    async fn next(&mut self) -> Result<Option<Vec<Result<Arc<Envelope>, LaneError>>>, LaneError>;

    /// Whether retention had removed messages that this reader was asked for. Told once.
    fn skipped(&mut self) -> bool;
}

/// One delivery of one message to a member.
#[derive(Debug, Clone)]
pub struct Handed {
    pub envelope: Arc<Envelope>,
    /// 1 for the first.
    pub attempt: u32,
    pub tag: Tag,
}

/// What a carrier needs to settle a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag {
    pub partition: u32,
    /// Counts the seeks: a late acknowledgement of what was handed out before one is none of what comes after it.
    pub era: u32,
    pub place: crate::message::Place,
}

/// A place in a group. Dropping it gives back what it holds.
#[async_trait]
pub trait Member: Send + Sync {
    /// The next deliveries, at least one. Cancel safe. An error ends the membership; a record that cannot be read is
    /// no error here but stands among the deliveries, and the group goes on behind it.
    async fn next(&self) -> Result<Vec<Result<Handed, LaneError>>, LaneError>;

    /// Returns once the lane has recorded that these are done: they never come again, a restart included. Repeating
    /// it changes nothing. After an error they may come again.
    async fn ack(&self, tags: Vec<Tag>) -> Result<(), LaneError>;

    /// These come again after the delay, to any member, with `attempt` raised.
    async fn nack(&self, tags: Vec<Tag>, delay: Duration) -> Result<(), LaneError>;
}
