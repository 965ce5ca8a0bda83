//! Publishing: a producer for each topic (each partition, where it has some), and the line in front of it.
//!
//! ```text
//! append ──waits for room──▶ line ──▶ producer ──▶ broker
//! receipt ◀───────────────────────── receipts ◀────┘
//! ```
//! Not batched: the crate sends one batch and waits for its receipt, so that batches of 100 are slower than none.
//! No producer has a fixed name: the crate numbers from zero after a restart, and a broker that drops duplicates by
//! name and number would drop new messages for old ones and call them stored.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use pulsar::error::{ConnectionError, ProducerError, ServiceDiscoveryError};
use pulsar::producer::{self, SendFuture};
use pulsar::proto::{MessageIdData, ServerError};
use pulsar::{Error, Producer, ProducerOptions, Pulsar, TokioExecutor};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::fault::Fault;
use super::feed;
use super::names::Physical;
use super::record;
use crate::lane::contract::{LaneError, LaneState};
use crate::message::{Message, Place};

/// The broker's own limit. The crate neither asks nor checks, and the broker answers what is larger by cutting the
/// connection, over which the crate sends it again, and again.
const MESSAGE_BYTES_MAX: usize = 5 << 20;
/// Messages of one topic that have no receipt yet. Publishers wait while it is full.
const IN_FLIGHT: usize = 2048;
/// The same over all topics in bytes.
const IN_FLIGHT_BYTES: usize = 64 << 20;
/// Producers without work are closed after this, the least recently used first where there are too many.
const IDLE: Duration = Duration::from_secs(300);
const PRODUCERS_MAX: usize = 1000;
const BUILD_TIMEOUT: Duration = Duration::from_secs(5);

pub type Client = Pulsar<TokioExecutor>;
/// The place in the partition that the message went to.
pub type Stored = oneshot::Receiver<Result<Place, LaneError>>;

pub struct Producers {
    lines: Mutex<HashMap<Physical, Line>>,
    bytes: Arc<Semaphore>,
    /// Counts uses, to know which producer was used last.
    clock: AtomicU64,
    common: Common,
}

/// What every producer's task needs.
#[derive(Clone)]
struct Common {
    /// Absent until the first connection; replaced where a connection does not heal.
    client: watch::Receiver<Option<Client>>,
    state: watch::Receiver<LaneState>,
    timeout: Duration,
    stop: CancellationToken,
}

#[derive(Clone)]
struct Line {
    items: mpsc::UnboundedSender<Item>,
    room: Arc<Semaphore>,
    used: Arc<AtomicU64>,
    close: CancellationToken,
}

struct Item {
    message: producer::Message,
    stored: oneshot::Sender<Result<Place, LaneError>>,
    deadline: Instant,
    /// A probe goes out although the lane is down: how else would it be found up again?
    probe: bool,
    _room: (OwnedSemaphorePermit, OwnedSemaphorePermit),
}

impl Producers {
    pub fn new(
        client: watch::Receiver<Option<Client>>,
        state: watch::Receiver<LaneState>,
        timeout: Duration,
        stop: CancellationToken,
    ) -> Self {
        Self {
            lines: Mutex::default(),
            bytes: Arc::new(Semaphore::new(IN_FLIGHT_BYTES)),
            clock: AtomicU64::new(0),
            common: Common { client, state, timeout, stop },
        }
    }

    /// Puts a message in its topic's line, and waits for room in it.
    pub async fn append(&self, physical: &Physical, message: Message) -> Result<Stored, LaneError> {
        let message = record::outgoing(message)?;
        let size = record::size(&message);
        if size > MESSAGE_BYTES_MAX {
            return Err(LaneError::TooLarge { size, max: MESSAGE_BYTES_MAX });
        }
        let mut state = self.common.state.clone();
        up(&state)?;
        tokio::select! {
            queued = timeout(self.common.timeout, self.queue(physical, message, size, self.common.timeout, false)) => {
                queued.unwrap_or_else(|_| Err(LaneError::Unavailable(format!("`{physical}` took nothing in time"))))
            }
            down = down(&mut state) => Err(down),
        }
    }

    /// As `append`, whatever the state, and gives up soon.
    pub async fn probe(
        &self,
        physical: &Physical,
        message: Message,
        within: Duration,
    ) -> Result<Place, LaneError> {
        let message = record::outgoing(message)?;
        let probing = async {
            let stored = self.queue(physical, message, 0, within, true).await?;
            stored.await.unwrap_or_else(|_| Err(LaneError::Unavailable("the producer was closed".into())))
        };
        timeout(within, probing).await.unwrap_or_else(|_| {
            Err(LaneError::Unavailable(format!(
                "the broker confirmed no write within {} ms",
                within.as_millis()
            )))
        })
    }

    async fn queue(
        &self,
        physical: &Physical,
        message: producer::Message,
        size: usize,
        within: Duration,
        probe: bool,
    ) -> Result<Stored, LaneError> {
        let deadline = Instant::now() + within;
        let line = self.line(physical);
        let closed = |_| LaneError::Unavailable("the durable lane was closed".into());
        let room = line.room.clone().acquire_owned().await.map_err(closed)?;
        let bytes = self.bytes.clone().acquire_many_owned(size as u32).await.map_err(closed)?;
        let (stored, receipt) = oneshot::channel();
        let item = Item { message, stored, deadline, probe, _room: (room, bytes) };
        match line.items.send(item) {
            Ok(()) => Ok(receipt),
            // It was closed for want of use just now; another is made for the message.
            Err(mpsc::error::SendError(item)) => match self.line(physical).items.send(item) {
                Ok(()) => Ok(receipt),
                Err(_) => Err(LaneError::Unavailable("the durable lane was closed".into())),
            },
        }
    }

    fn line(&self, physical: &Physical) -> Line {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        let mut lines = self.lock();
        if let Some(line) = lines.get(physical).filter(|line| !line.items.is_closed()) {
            line.used.store(now, Ordering::Relaxed);
            return line.clone();
        }
        lines.retain(|_, line| !line.items.is_closed());
        if lines.len() >= PRODUCERS_MAX {
            let oldest = lines.iter().min_by_key(|(_, line)| line.used.load(Ordering::Relaxed));
            if let Some((oldest, line)) = oldest.map(|(name, line)| (name.clone(), line.clone())) {
                line.close.cancel();
                lines.remove(&oldest);
            }
        }
        // Bounded by `room`.
        let (items, queue) = mpsc::unbounded_channel();
        let close = self.common.stop.child_token();
        let line = Line {
            items,
            room: Arc::new(Semaphore::new(IN_FLIGHT)),
            used: Arc::new(AtomicU64::new(now)),
            close: close.clone(),
        };
        tokio::spawn(Worker { physical: physical.clone(), common: self.common.clone(), queue, close }.run());
        lines.insert(physical.clone(), line.clone());
        line
    }

    /// Waits until everything under way has its receipt.
    pub async fn settle(&self) {
        let lines: Vec<_> = self.lock().values().cloned().collect();
        for line in lines {
            // Fails only where the semaphore is closed, and nobody closes it.
            let _ = line.room.acquire_many(IN_FLIGHT as u32).await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Physical, Line>> {
        // The table is whole between any two statements, so a panic elsewhere spoils nothing.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses while the lane is down.
pub fn up(state: &watch::Receiver<LaneState>) -> Result<(), LaneError> {
    match &*state.borrow() {
        LaneState::Up => Ok(()),
        LaneState::Down(why) => Err(LaneError::Unavailable(format!("the durable lane is down: {why}"))),
    }
}

/// Returns once the lane is down.
async fn down(state: &mut watch::Receiver<LaneState>) -> LaneError {
    loop {
        if let Err(down) = up(state) {
            return down;
        }
        if state.changed().await.is_err() {
            return LaneError::Unavailable("the durable lane was closed".into());
        }
    }
}

/// Owns a topic's producer.
struct Worker {
    physical: Physical,
    common: Common,
    queue: mpsc::UnboundedReceiver<Item>,
    close: CancellationToken,
}

impl Worker {
    async fn run(mut self) {
        let mut producer: Option<Producer<TokioExecutor>> = None;
        let mut client = self.common.client.clone();
        // Receipts come in the order of sending. Bounded by the room that each of them holds.
        let (receipts, waiting) = mpsc::unbounded_channel();
        tokio::spawn(confirm(waiting));
        loop {
            let item = tokio::select! {
                item = timeout(IDLE, self.queue.recv()) => item,
                () = self.close.cancelled() => Ok(None),
            };
            let Ok(Some(item)) = item else { break };
            // Whoever waits for it has been told that the outcome is not known, so it need not go out any more.
            if item.deadline <= Instant::now() {
                continue;
            }
            if client.has_changed().unwrap_or_default() {
                client.mark_unchanged();
                producer = None;
            }
            let mut state = self.common.state.clone();
            let sending = self.send(&mut producer, &client, item.message);
            let sent = tokio::select! {
                biased;
                // Given up half-way, nothing was handed to the connection.
                down = down(&mut state), if !item.probe => Err(down),
                sent = sending => sent,
                () = tokio::time::sleep_until(item.deadline), if item.probe => continue,
            };
            match sent {
                // Fails only where its task is gone, and it lives as long as this sender.
                Ok(sent) => drop(receipts.send((sent, item.stored, item._room))),
                Err(error) => drop(item.stored.send(Err(error))),
            }
        }
        self.queue.close();
        // What slipped in behind is answered: nobody sends it.
        while let Ok(item) = self.queue.try_recv() {
            let _ = item.stored.send(Err(LaneError::Unavailable("the producer was closed".into())));
        }
    }

    async fn send(
        &self,
        producer: &mut Option<Producer<TokioExecutor>>,
        client: &watch::Receiver<Option<Client>>,
        message: producer::Message,
    ) -> Result<SendFuture, LaneError> {
        let ready = match producer {
            Some(ready) => ready,
            None => producer.insert(self.build(client).await?),
        };
        match ready.send_non_blocking(message).await {
            Ok(sent) => Ok(sent),
            Err(error) => {
                // A producer that failed may stay failed: the next message makes another.
                *producer = None;
                Err(fault(error).on_lane())
            }
        }
    }

    async fn build(
        &self,
        client: &watch::Receiver<Option<Client>>,
    ) -> Result<Producer<TokioExecutor>, LaneError> {
        let client = client.borrow().clone();
        let client = client.ok_or_else(|| LaneError::Unavailable("there is no connection yet".into()))?;
        let options = ProducerOptions { block_queue_if_full: true, ..Default::default() };
        let building = client.producer().with_topic(self.physical.as_str()).with_options(options).build();
        // In a task of its own: a build that is given up half-way leaves the crate's connection table with an entry
        // that all later ones wait for.
        match timeout(BUILD_TIMEOUT, tokio::spawn(building)).await {
            Ok(Ok(built)) => built.map_err(|error| fault(error).on_lane()),
            Ok(Err(_)) | Err(_) => {
                Err(LaneError::Unavailable(format!("no producer for `{}` in time", self.physical)))
            }
        }
    }
}

type Sent =
    (SendFuture, oneshot::Sender<Result<Place, LaneError>>, (OwnedSemaphorePermit, OwnedSemaphorePermit));

async fn confirm(mut waiting: mpsc::UnboundedReceiver<Sent>) {
    while let Some((sent, stored, _room)) = waiting.recv().await {
        let result = match sent.await {
            Ok(receipt) => placed(receipt.message_id),
            Err(error) => Err(unconfirmed(error)),
        };
        // A receipt that nobody waits for takes nothing back.
        let _ = stored.send(result);
    }
}

fn placed(id: Option<MessageIdData>) -> Result<Place, LaneError> {
    match id {
        Some(id) if id.ledger_id != u64::MAX => Ok(feed::place(&id)),
        // What a broker says of a duplicate.
        _ => Err(LaneError::OutcomeUnknown(
            "the broker confirmed the message and did not say where it is".into(),
        )),
    }
}

/// What is known of a message that was handed to the connection and has no receipt.
fn unconfirmed(error: Error) -> LaneError {
    match fault(error) {
        // The broker's answer to this very message: it has not taken it and will not.
        refused if refused.is_lasting() => refused.on_lane(),
        other => LaneError::OutcomeUnknown(format!("the broker did not confirm the message ({other})")),
    }
}

fn fault(error: Error) -> Fault {
    let said = error.to_string();
    let refused = |error: Option<ServerError>, text: Option<String>| match error {
        Some(error) => Fault::refused(error as i32, text.unwrap_or_default()),
        None => Fault::Lost(said.clone()),
    };
    match error {
        Error::Connection(ConnectionError::PulsarError(error, text))
        | Error::Producer(ProducerError::Connection(ConnectionError::PulsarError(error, text)))
        | Error::ServiceDiscovery(
            ServiceDiscoveryError::Query(error, text)
            | ServiceDiscoveryError::Connection(ConnectionError::PulsarError(error, text)),
        ) => refused(error, text),
        _ => Fault::Lost(said),
    }
}

/// The receipt as the contract has it: never later than the publish timeout.
pub fn receipt<T: Send + 'static>(
    stored: Stored,
    within: Duration,
    position: impl FnOnce(Place) -> T + Send + 'static,
) -> futures_util::future::BoxFuture<'static, Result<T, LaneError>> {
    let deadline = Instant::now() + within;
    async move {
        match timeout_at(deadline, stored).await {
            Ok(Ok(result)) => result.map(position),
            Ok(Err(_)) => Err(LaneError::OutcomeUnknown("the producer ended before the receipt came".into())),
            Err(_) => Err(LaneError::OutcomeUnknown(format!(
                "the broker did not confirm the message within {} s",
                within.as_secs_f32()
            ))),
        }
    }
    .boxed()
}
