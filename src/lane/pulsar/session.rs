//! One connection to one broker, shared by everything here that reads from it or publishes to it.
//!
//! ```text
//! requests, acks, permits ──▶ outgoing ──▶ ┌────────┐
//! outlets with something to send ◀──take── │ writer │ ──▶ broker
//!                                          └────────┘       │
//! request's caller ◀── answer ◀───┐                         │
//! consumer's owner ◀── events ◀── reader ◀──────────────────┘
//! outlet ◀── receipts ◀───────────┘
//! ```
//! Why not the crate's client, which has all this inside. Its `Consumer` and `Reader` give the broker new permits
//! whether or not anybody took what came, so that a member's prefetch bounds nothing; a consumer that waits for its
//! owner to take a message sends no acknowledgement meanwhile; no acknowledgement is ever confirmed; and after a
//! reconnect a reader begins again where it once began. Its `Producer` has one batch under way at a time. Here permits
//! are given by whoever has room, an acknowledgement has an answer, an outlet is asked for what it has whenever the
//! wire is free, and a connection that is lost is told to its users, who know where they stood.

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use pulsar::proto::base_command::Type;
use pulsar::proto::{
    AuthData, BaseCommand, CommandAuthResponse, CommandCloseConsumer, CommandCloseProducer, CommandConnect,
    CommandGetSchema, CommandGetTopicsOfNamespace, CommandLookupTopic, CommandLookupTopicResponse,
    CommandPartitionedTopicMetadata, CommandPing, CommandPong, CommandProducer, CommandProducerSuccess,
    CommandSendError, CommandSendReceipt, FeatureFlags, Schema,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::address::Address;
use super::credentials::Credentials;
use super::fault::Fault;
use super::frame::{self, Frame, Packed};
use super::newer::{Changed, NewerCommand};
use crate::message::Place;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// After so long without a byte from the broker it is asked for one, and given up on after the second time.
const PING_AFTER: Duration = Duration::from_secs(3);
const LOST_AFTER: Duration = Duration::from_secs(8);
/// A broker that is asked for a producer whose name it still knows from a lost connection first looks for 5 s whether
/// anybody is there.
const PRODUCER_TIMEOUT: Duration = Duration::from_secs(8);
/// Commands that wait to be written. Callers wait while it is full.
const OUTGOING: usize = 1024;
/// Changes that wait for a watcher's owner. Full: the watch ends, and its owner lists the topics.
const CHANGES: usize = 1024;
/// What is read with one call at least, if it is there.
const READ_BYTES: usize = 64 << 10;
/// Pieces up to this are copied together, larger ones are written from where they are.
const COPIED_BYTES_MAX: usize = 4 << 10;
/// Where the broker does not say: its default.
pub const MESSAGE_BYTES_MAX: usize = 5 << 20;

/// An entry on its way to the owner of a consumer.
#[derive(Debug)]
pub struct Delivery {
    /// Of the entry's first message.
    pub place: Place,
    /// How often the broker delivered it before, as far as it knows.
    pub redelivered: u32,
    /// Of a batch, the messages that are not acknowledged yet, a bit each; empty: all.
    pub unacked: Vec<i64>,
    pub entry: Packed,
}

/// What publishes on a session. Each time it was attached it gets another `epoch`, and what is said of an earlier one
/// is no longer its business. A receipt is, whenever it comes: no other entry of this outlet ever has the same number.
pub trait Outlet: Send + Sync {
    /// The wire is free: adds what is to be sent now.
    fn take(&self, epoch: u64, pieces: &mut Pieces);
    fn confirmed(self: Arc<Self>, receipt: CommandSendReceipt);
    fn refused(self: Arc<Self>, epoch: u64, refusal: CommandSendError);
    /// It is attached no more, since the connection was lost or the broker closed the producer.
    fn detached(self: Arc<Self>, epoch: u64);
}

pub struct Session {
    shared: Arc<Shared>,
    /// Commands as they are sent.
    outgoing: mpsc::Sender<Bytes>,
    /// The largest entry that the broker takes.
    pub message_bytes_max: usize,
    /// Whether the broker tells of topics that appear.
    pub takes_watchers: bool,
    next: AtomicU64,
    _end: DropGuard,
}

struct Shared {
    users: Mutex<Users>,
    /// The outlets that have something to send; each stands here once.
    ready: Mutex<Vec<u64>>,
    /// Something became ready.
    wake: Notify,
    end: CancellationToken,
}

#[derive(Default)]
struct Users {
    waiting: HashMap<u64, oneshot::Sender<Result<Box<BaseCommand>, Fault>>>,
    consumers: HashMap<u64, Attached>,
    outlets: HashMap<u64, Placed>,
    watchers: HashMap<u64, mpsc::Sender<Changed>>,
    lost: Option<String>,
}

/// An outlet that is or was attached. A broker that closes a producer, or refuses an entry of it because its topic moves,
/// goes on to confirm what it stored before; so a closed one stays until it is attached again.
struct Placed {
    epoch: u64,
    outlet: Weak<dyn Outlet>,
    open: bool,
}

struct Attached {
    deliver: mpsc::UnboundedSender<Vec<Delivery>>,
    /// How often the broker made it the active one.
    active: watch::Sender<u32>,
}

impl Session {
    pub async fn connect(address: &Address, credentials: &Credentials) -> Result<Arc<Self>, Fault> {
        let connecting = Self::handshake(address, credentials);
        match timeout(CONNECT_TIMEOUT, connecting).await {
            Ok(connected) => connected,
            Err(_) => Err(Fault::Lost(format!("no answer from {}:{} in time", address.host, address.port))),
        }
    }

    async fn handshake(address: &Address, credentials: &Credentials) -> Result<Arc<Self>, Fault> {
        let at = format!("{}:{}", address.host, address.port);
        let lost = |error: std::io::Error| Fault::Lost(format!("cannot connect to {at}: {error}"));
        let stream = TcpStream::connect((address.host.as_str(), address.port)).await.map_err(lost)?;
        // Otherwise a permit or an acknowledgement waits for the broker's delayed ACK: 40 ms.
        stream.set_nodelay(true).map_err(lost)?;
        if !address.tls {
            return Self::start(stream.into_split(), address, credentials).await;
        }
        let name = tokio_rustls::rustls::pki_types::ServerName::try_from(address.host.clone())
            .map_err(|_| Fault::Lost(format!("`{}` is no name that a certificate can have", address.host)))?;
        let stream = credentials.tls.connect(name, stream).await.map_err(lost)?;
        Self::start(tokio::io::split(stream), address, credentials).await
    }

    async fn start<R, W>(
        (mut reading, mut writing): (R, W),
        address: &Address,
        credentials: &Credentials,
    ) -> Result<Arc<Self>, Fault>
    where
        R: AsyncRead + Send + Unpin + 'static,
        W: AsyncWrite + Send + Unpin + 'static,
    {
        let broken = |error: std::io::Error| Fault::Lost(format!("lost {}: {error}", address.host));
        let token = credentials.token().map_err(|error| Fault::Lost(error.to_string()))?;
        let connect = CommandConnect {
            client_version: concat!("twinspan-", env!("CARGO_PKG_VERSION")).into(),
            protocol_version: Some(19),
            auth_method_name: token.is_some().then(|| "token".into()),
            auth_data: token.map(String::into_bytes),
            proxy_to_broker_url: address.behind.clone(),
            feature_flags: Some(FeatureFlags {
                supports_auth_refresh: Some(credentials.has_token()),
                ..Default::default()
            }),
            ..Default::default()
        };
        let connect = BaseCommand { connect: Some(connect), ..command(Type::Connect) };
        writing.write_all(&frame::encode(&connect)).await.map_err(broken)?;
        writing.flush().await.map_err(broken)?;
        let mut bytes = BytesMut::new();
        let connected = match read_frame(&mut reading, &mut bytes).await? {
            Frame::Newer(NewerCommand { connected: Some(connected), .. }) => connected,
            Frame::Other(answer) if answer.error.is_some() => {
                let error = answer.error.unwrap_or_default();
                // Not the answer to a question: there is no connection, and a token that is refused may be replaced.
                let refused = Fault::refused(error.error, error.message);
                return Err(Fault::Lost(format!("cannot connect to {}: {refused}", address.host)));
            }
            _ => return Err(Fault::Lost(format!("what answers at {} is not a Pulsar broker", address.host))),
        };
        let max = connected.message_bytes_max.and_then(|max| usize::try_from(max).ok());

        let end = CancellationToken::new();
        let shared = Arc::new(Shared {
            users: Mutex::default(),
            ready: Mutex::default(),
            wake: Notify::new(),
            end: end.clone(),
        });
        let (outgoing, commands) = mpsc::channel(OUTGOING);
        let reader = Incoming {
            shared: shared.clone(),
            outgoing: outgoing.clone(),
            credentials: credentials.clone(),
            broker: format!("{}:{}", address.host, address.port),
        };
        tokio::spawn(write(writing, commands, shared.clone()));
        tokio::spawn(reader.run(reading, bytes));
        Ok(Arc::new(Self {
            shared,
            outgoing,
            message_bytes_max: max.filter(|max| *max > 0).unwrap_or(MESSAGE_BYTES_MAX),
            takes_watchers: connected.takes_watchers(),
            next: AtomicU64::new(1),
            _end: end.drop_guard(),
        }))
    }

    pub fn is_lost(&self) -> bool {
        self.shared.users().lost.is_some()
    }

    /// Ends the connection; its users are told.
    pub fn close(&self) {
        self.shared.lose("the lane was closed");
    }

    /// Sends a command that has an answer, and waits for it.
    pub async fn request<C: prost::Message>(
        &self,
        make: impl FnOnce(u64) -> C,
    ) -> Result<Box<BaseCommand>, Fault> {
        self.request_within(ANSWER_TIMEOUT, make).await
    }

    async fn request_within<C: prost::Message>(
        &self,
        within: Duration,
        make: impl FnOnce(u64) -> C,
    ) -> Result<Box<BaseCommand>, Fault> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        {
            let mut users = self.shared.users();
            if let Some(why) = &users.lost {
                return Err(Fault::Lost(why.clone()));
            }
            users.waiting.insert(id, answer);
        }
        let _waiting = Waiting { shared: &self.shared, id };
        let command = frame::encode(&make(id));
        let asked = async {
            self.outgoing.send(command).await.map_err(|_| self.shared.why())?;
            answered.await.unwrap_or_else(|_| Err(self.shared.why()))
        };
        match timeout(within, asked).await {
            Ok(answer) => answer,
            Err(_) => Err(Fault::Lost("the broker did not answer in time".into())),
        }
    }

    /// Encodes at once: a command in the crate's type is 4,400 bytes, which are not to be carried along.
    pub fn send(&self, command: &BaseCommand) -> impl Future<Output = Result<(), Fault>> + Send + use<'_> {
        let frame = frame::encode(command);
        async { self.outgoing.send(frame).await.map_err(|_| self.shared.why()) }
    }

    /// A command that has to go out without waiting, since it frees something at the broker.
    fn send_now(&self, command: &impl prost::Message) {
        if self.outgoing.try_send(frame::encode(command)).is_err() {
            // The line is full, so the broker has stopped reading: a new connection frees what this one holds.
            self.shared.lose("the broker takes nothing any more");
        }
    }

    pub async fn lookup(
        &self,
        topic: &str,
        authoritative: bool,
    ) -> Result<CommandLookupTopicResponse, Fault> {
        let answer = self
            .request(|request_id| BaseCommand {
                lookup_topic: Some(CommandLookupTopic {
                    topic: topic.into(),
                    request_id,
                    authoritative: Some(authoritative),
                    ..Default::default()
                }),
                ..command(Type::Lookup)
            })
            .await?;
        let found = answer.lookup_topic_response.ok_or_else(unexpected)?;
        match found.error {
            Some(error) => Err(Fault::refused(error, found.message.unwrap_or_default())),
            None => Ok(found),
        }
    }

    /// How many partitions a topic has; zero: it is not partitioned.
    pub async fn partitions(&self, topic: &str) -> Result<u32, Fault> {
        let answer = self
            .request(|request_id| BaseCommand {
                partition_metadata: Some(CommandPartitionedTopicMetadata {
                    topic: topic.into(),
                    request_id,
                    ..Default::default()
                }),
                ..command(Type::PartitionedMetadata)
            })
            .await?;
        let found = answer.partition_metadata_response.ok_or_else(unexpected)?;
        match found.error {
            Some(error) => Err(Fault::refused(error, found.message.unwrap_or_default())),
            None => Ok(found.partitions.unwrap_or_default()),
        }
    }

    /// The names of the persistent topics of a namespace, each partition by itself.
    pub async fn topics(&self, namespace: &str) -> Result<Vec<String>, Fault> {
        let answer = self
            .request(|request_id| BaseCommand {
                get_topics_of_namespace: Some(CommandGetTopicsOfNamespace {
                    request_id,
                    namespace: namespace.into(),
                    ..Default::default()
                }),
                ..command(Type::GetTopicsOfNamespace)
            })
            .await?;
        Ok(answer.get_topics_of_namespace_response.ok_or_else(unexpected)?.topics)
    }

    /// Makes an outlet the producer that is asked for. What it is told from then on is of this epoch.
    pub async fn produce(
        &self,
        outlet: Weak<dyn Outlet>,
        command: CommandProducer,
    ) -> Result<CommandProducerSuccess, Fault> {
        let (id, epoch) = (command.producer_id, command.epoch.unwrap_or_default());
        {
            let outlets = &mut self.shared.users().outlets;
            if outlets.len() == outlets.capacity() {
                // Before it grows: those that were closed here, and whose owners are gone.
                outlets.retain(|_, placed| placed.outlet.strong_count() > 0);
            }
            outlets.insert(id, Placed { epoch, outlet, open: true });
        }
        let answer = self
            .request_within(PRODUCER_TIMEOUT, |request_id| BaseCommand {
                producer: Some(CommandProducer { request_id, ..command }),
                ..self::command(Type::Producer)
            })
            .await;
        match answer.and_then(|answer| answer.producer_success.ok_or_else(unexpected)) {
            Ok(success) => Ok(success),
            Err(fault) => {
                // It may have become one after all, and a second with its number would be refused for ever.
                self.end_producer(id, epoch);
                Err(fault)
            }
        }
    }

    /// Whether the outlet is attached. It is not told twice that it is no more.
    pub fn has_producer(&self, id: u64, epoch: u64) -> bool {
        self.shared.users().outlets.get(&id).is_some_and(|placed| placed.open && placed.epoch == epoch)
    }

    /// Closes a producer at the broker, unless the broker has closed it. The outlet is not told.
    pub fn end_producer(&self, id: u64, epoch: u64) {
        {
            let mut users = self.shared.users();
            match users.outlets.get_mut(&id).filter(|placed| placed.open && placed.epoch == epoch) {
                Some(placed) => placed.open = false,
                None => return,
            }
        }
        let request_id = self.next.fetch_add(1, Ordering::Relaxed);
        let close = CommandCloseProducer { producer_id: id, request_id };
        self.send_now(&BaseCommand { close_producer: Some(close), ..command(Type::CloseProducer) });
    }

    /// The schema that a topic has in the registry.
    pub async fn schema(&self, topic: &str) -> Result<Option<Schema>, Fault> {
        let answer = self
            .request(|request_id| BaseCommand {
                get_schema: Some(CommandGetSchema { request_id, topic: topic.into(), schema_version: None }),
                ..command(Type::GetSchema)
            })
            .await?;
        let found = answer.get_schema_response.ok_or_else(unexpected)?;
        let refused =
            found.error_code.map(|error| Fault::refused(error, found.error_message.unwrap_or_default()));
        match refused {
            // A topic without a schema is one that is not found.
            Some(fault) if fault.is_not_found() => Ok(None),
            Some(fault) => Err(fault),
            None => Ok(found.schema),
        }
    }

    /// Has the writer ask the outlet for what it has. Whoever calls sees to it that it is not asked for twice.
    pub fn is_ready(&self, id: u64) {
        self.shared.ready().push(id);
        self.shared.wake.notify_one();
    }

    /// A consumer's number, and what the broker will send it. Bounded by the permits that its owner gives.
    pub fn attach(&self) -> (u64, mpsc::UnboundedReceiver<Vec<Delivery>>, watch::Receiver<u32>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (deliver, deliveries) = mpsc::unbounded_channel();
        let (active, activated) = watch::channel(0);
        self.shared.users().consumers.insert(id, Attached { deliver, active });
        (id, deliveries, activated)
    }

    /// Closes a consumer at the broker, unless the broker has closed it.
    pub fn detach(&self, consumer_id: u64) {
        if self.shared.users().consumers.remove(&consumer_id).is_none() {
            return;
        }
        let request_id = self.next.fetch_add(1, Ordering::Relaxed);
        let close = CommandCloseConsumer { consumer_id, request_id };
        self.send_now(&BaseCommand { close_consumer: Some(close), ..command(Type::CloseConsumer) });
    }

    /// A watcher's number, and what the broker will tell it. That ends with the connection, and where nobody takes it.
    pub fn attach_watcher(&self) -> (u64, mpsc::Receiver<Changed>) {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tell, told) = mpsc::channel(CHANGES);
        self.shared.users().watchers.insert(id, tell);
        (id, told)
    }

    /// Closes a watcher at the broker. One that has ended here may still be open there.
    pub fn detach_watcher(&self, id: u64) {
        self.shared.users().watchers.remove(&id);
        self.send_now(&NewerCommand::unwatch(self.next.fetch_add(1, Ordering::Relaxed), id));
    }
}

/// A request's place in the table, given up with the request.
struct Waiting<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.users().waiting.remove(&self.id);
    }
}

impl Shared {
    fn users(&self) -> MutexGuard<'_, Users> {
        // The tables are whole between any two statements, so a panic elsewhere spoils nothing.
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ready(&self) -> MutexGuard<'_, Vec<u64>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn outlet(&self, id: u64) -> Option<(u64, Arc<dyn Outlet>)> {
        let users = self.users();
        let placed = users.outlets.get(&id)?;
        Some((placed.epoch, placed.outlet.upgrade()?))
    }

    fn why(&self) -> Fault {
        Fault::Lost(self.users().lost.clone().unwrap_or_else(|| "the connection was lost".into()))
    }

    /// The first reason stays; every user is told by its channel's end.
    fn lose(&self, why: &str) {
        let mut users = self.users();
        users.lost.get_or_insert_with(|| why.into());
        users.waiting.clear();
        users.consumers.clear();
        users.watchers.clear();
        let outlets = std::mem::take(&mut users.outlets);
        drop(users);
        self.end.cancel();
        // One that was closed knows, and may be closing at this very moment, with its lock held.
        for Placed { epoch, outlet, .. } in outlets.into_values().filter(|placed| placed.open) {
            if let Some(outlet) = outlet.upgrade() {
                outlet.detached(epoch);
            }
        }
    }
}

/// What one write carries.
#[derive(Default)]
pub struct Pieces {
    whole: VecDeque<Bytes>,
    /// Small ones, copied together.
    small: BytesMut,
    bytes: usize,
}

impl Pieces {
    pub fn push(&mut self, piece: &Bytes) {
        self.bytes += piece.len();
        if piece.len() <= COPIED_BYTES_MAX {
            return self.small.extend_from_slice(piece);
        }
        self.close();
        self.whole.push_back(piece.clone());
    }

    /// Puts the small ones in their place among the others.
    fn close(&mut self) {
        if !self.small.is_empty() {
            self.whole.push_back(self.small.split().freeze());
        }
    }
}

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.whole.front().map_or(&self.small, |piece| piece)
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let pieces = self.whole.iter().map(|piece| &**piece);
        let small = (!self.small.is_empty()).then_some(&*self.small);
        let mut filled = 0;
        for (slice, piece) in slices.iter_mut().zip(pieces.chain(small)) {
            *slice = IoSlice::new(piece);
            filled += 1;
        }
        filled
    }

    fn advance(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(front) = self.whole.front_mut() {
            if count < front.len() {
                return front.advance(count);
            }
            count -= front.len();
            self.whole.pop_front();
        }
        self.small.advance(count);
    }
}

async fn write(
    mut stream: impl AsyncWrite + Unpin,
    mut commands: mpsc::Receiver<Bytes>,
    shared: Arc<Shared>,
) {
    let end = shared.end.clone();
    let writing = async {
        let mut batch = Vec::new();
        let mut ready = Vec::new();
        let mut pieces = Pieces::default();
        loop {
            tokio::select! {
                taken = commands.recv_many(&mut batch, OUTGOING) => {
                    if taken == 0 {
                        return Ok::<_, std::io::Error>(());
                    }
                    // Others are about to say something, too, and one write then carries all of it. Messages do not wait.
                    if shared.ready().is_empty() {
                        tokio::task::yield_now().await;
                    }
                    if !commands.is_empty() {
                        commands.recv_many(&mut batch, OUTGOING).await;
                    }
                }
                () = shared.wake.notified() => {}
            }
            for command in batch.drain(..) {
                pieces.push(&command);
            }
            std::mem::swap(&mut ready, &mut shared.ready());
            for id in ready.drain(..) {
                if let Some((epoch, outlet)) = shared.outlet(id) {
                    outlet.take(epoch, &mut pieces);
                }
            }
            stream.write_all_buf(&mut pieces).await?;
            stream.flush().await?;
        }
    };
    let written = tokio::select! {
        written = writing => written,
        () = end.cancelled() => Ok(()),
    };
    if let Err(error) = written {
        shared.lose(&format!("the connection broke: {error}"));
    }
    let _ = stream.shutdown().await;
}

/// Entries for the same consumer that came one behind the other.
#[derive(Default)]
struct Run {
    consumer: u64,
    deliveries: Vec<Delivery>,
}

struct Incoming {
    shared: Arc<Shared>,
    outgoing: mpsc::Sender<Bytes>,
    credentials: Credentials,
    broker: String,
}

impl Incoming {
    async fn run(self, mut stream: impl AsyncRead + Unpin, mut bytes: BytesMut) {
        let end = self.shared.end.clone();
        let why = tokio::select! {
            Err(why) = self.read(&mut stream, &mut bytes) => why,
            () = end.cancelled() => return self.shared.lose("the connection was closed"),
        };
        self.shared.lose(&format!("lost {}: {why}", self.broker));
    }

    async fn read(
        &self,
        stream: &mut (impl AsyncRead + Unpin),
        bytes: &mut BytesMut,
    ) -> Result<std::convert::Infallible, String> {
        let mut heard = Instant::now();
        let mut run = Run::default();
        loop {
            while let Some(frame) = frame::decode(bytes).map_err(|error| error.to_string())? {
                self.dispatch(frame, &mut run)?;
            }
            self.deliver(&mut run);
            if bytes.capacity() - bytes.len() < READ_BYTES / 8 {
                bytes.reserve(READ_BYTES);
            }
            match timeout(PING_AFTER, stream.read_buf(bytes)).await {
                Ok(Ok(0)) => return Err("the broker closed the connection".into()),
                Ok(Ok(_)) => heard = Instant::now(),
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_) if heard.elapsed() > LOST_AFTER => return Err("the broker fell silent".into()),
                Err(_) => self.answer(BaseCommand { ping: Some(CommandPing {}), ..command(Type::Ping) })?,
            }
        }
    }

    fn dispatch(&self, frame: Frame, run: &mut Run) -> Result<(), String> {
        let mut command = match frame {
            Frame::Receipt(receipt) => {
                if let Some((_, outlet)) = self.shared.outlet(receipt.producer_id) {
                    outlet.confirmed(receipt);
                }
                return Ok(());
            }
            Frame::Message(message, entry) => {
                let delivery = Delivery {
                    place: Place { ledger: message.id.ledger, entry: message.id.entry, index: 0 },
                    redelivered: message.redelivery_count.unwrap_or_default(),
                    unacked: message.ack_set,
                    entry,
                };
                if run.consumer != message.consumer_id {
                    self.deliver(run);
                    run.consumer = message.consumer_id;
                }
                run.deliveries.push(delivery);
                return Ok(());
            }
            Frame::Newer(NewerCommand { watching: Some(watching), .. }) => {
                if let Some(waiting) = self.shared.users().waiting.remove(&watching.request_id) {
                    // That it came is all it says. Whoever asked may have given up.
                    let _ = waiting.send(Ok(Box::default()));
                }
                return Ok(());
            }
            Frame::Newer(NewerCommand { changed: Some(changed), .. }) => {
                let watchers = &mut self.shared.users().watchers;
                let id = changed.watcher_id;
                if watchers.get(&id).is_some_and(|watcher| watcher.try_send(changed).is_err()) {
                    watchers.remove(&id);
                }
                return Ok(());
            }
            Frame::Newer(_) => return Ok(()),
            Frame::Other(command) => command,
        };
        // Where it is the consumer's end, what came before it still comes.
        self.deliver(run);
        if let Some(closed) = &command.close_consumer {
            self.shared.users().consumers.remove(&closed.consumer_id);
        } else if let Some(change) = &command.active_consumer_change {
            if let Some(consumer) = self.shared.users().consumers.get(&change.consumer_id)
                && change.is_active()
            {
                consumer.active.send_modify(|times| *times += 1);
            }
        } else if let Some(closed) = &command.close_producer {
            if let Some(placed) = self.shared.users().outlets.get_mut(&closed.producer_id) {
                placed.open = false;
            }
            if let Some((epoch, outlet)) = self.shared.outlet(closed.producer_id) {
                outlet.detached(epoch);
            }
        } else if let Some(refusal) = command.send_error.take() {
            if let Some((epoch, outlet)) = self.shared.outlet(refusal.producer_id) {
                outlet.refused(epoch, refusal);
            }
        } else if command.ping.is_some() {
            self.answer(BaseCommand { pong: Some(CommandPong {}), ..self::command(Type::Pong) })?;
        } else if command.auth_challenge.is_some() {
            let token = self.credentials.token().map_err(|error| error.to_string())?.unwrap_or_default();
            let response =
                AuthData { auth_method_name: Some("token".into()), auth_data: Some(token.into_bytes()) };
            let response = CommandAuthResponse {
                response: Some(response),
                protocol_version: Some(19),
                ..Default::default()
            };
            self.answer(BaseCommand { auth_response: Some(response), ..self::command(Type::AuthResponse) })?;
        } else if let Some(id) = request_of(&command)
            && let Some(waiting) = self.shared.users().waiting.remove(&id)
        {
            let answer = match command.error.take() {
                Some(error) => Err(Fault::refused(error.error, error.message)),
                None => Ok(command),
            };
            // Whoever asked may have given up.
            let _ = waiting.send(answer);
        }
        Ok(())
    }

    /// Hands over what came for one consumer, all of it in one go.
    fn deliver(&self, run: &mut Run) {
        if run.deliveries.is_empty() {
            return;
        }
        let deliveries = std::mem::take(&mut run.deliveries);
        if let Some(consumer) = self.shared.users().consumers.get(&run.consumer) {
            // Its owner is gone just now: the broker is told by the owner's end.
            let _ = consumer.deliver.send(deliveries);
        }
    }

    /// Never waits: the reader must go on, or nobody reads what would make room.
    fn answer(&self, command: BaseCommand) -> Result<(), String> {
        let sent = self.outgoing.try_send(frame::encode(&command));
        sent.map_err(|_| "the broker takes nothing any more".into())
    }
}

async fn read_frame(stream: &mut (impl AsyncRead + Unpin), bytes: &mut BytesMut) -> Result<Frame, Fault> {
    loop {
        match frame::decode(bytes) {
            Ok(Some(frame)) => return Ok(frame),
            Ok(None) => {}
            Err(error) => return Err(Fault::Lost(error.to_string())),
        }
        match stream.read_buf(bytes).await {
            Ok(0) => return Err(Fault::Lost("the broker closed the connection".into())),
            Ok(_) => {}
            Err(error) => return Err(Fault::Lost(error.to_string())),
        }
    }
}

/// The request that a command answers.
fn request_of(command: &BaseCommand) -> Option<u64> {
    if let Some(error) = &command.error {
        return Some(error.request_id);
    }
    if let Some(success) = &command.success {
        return Some(success.request_id);
    }
    if let Some(found) = &command.lookup_topic_response {
        return Some(found.request_id);
    }
    if let Some(found) = &command.partition_metadata_response {
        return Some(found.request_id);
    }
    if let Some(found) = &command.get_last_message_id_response {
        return Some(found.request_id);
    }
    if let Some(found) = &command.get_topics_of_namespace_response {
        return Some(found.request_id);
    }
    if let Some(found) = &command.get_schema_response {
        return Some(found.request_id);
    }
    if let Some(success) = &command.producer_success {
        return Some(success.request_id);
    }
    command.ack_response.as_ref()?.request_id
}

pub fn command(kind: Type) -> BaseCommand {
    BaseCommand { r#type: kind as i32, ..Default::default() }
}

pub fn unexpected() -> Fault {
    Fault::Lost("the broker answered something else than was asked".into())
}
