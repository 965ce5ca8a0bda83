//! What is asked of the bridge over one connection, in order, until it is answered or its deadline has passed.
//!
//! ```text
//! ask ──▶ ┌──────┐ ──frame──▶ bridge ──answer──▶ the caller
//!         │ line │ ◀──── a retryable error, or the connection was lost: again, with the same id
//!         └──────┘
//! ```
//! After a lost connection all that was not answered is sent again in its order. What the bridge refused for now is
//! sent again after a wait, and may then stand behind what was sent after it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout_at};

use super::backoff::Backoff;
use super::connection::{ClientError, Fields, Sender};
use super::dial::{Dial, Live};
use crate::message::MessageId;
use crate::wire::json::heard::{Heard, HeardError};
use crate::wire::verbs::Status;

/// What waits for its answer, in bytes; when it is full the caller waits. Each counts this much besides its payload,
/// which bounds their number to 1,024.
const ROOM_BYTES: usize = 16 * 1024 * 1024;
const ASK_BYTES: usize = 16 * 1024;

/// Why something was not done, and what became of it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SendError {
    /// Nothing was sent or stored. What the bridge refuses says so itself.
    #[error("{source}{}", match source { ClientError::Refused(_) => "", _ => "; nothing was sent or stored" })]
    NotSent { source: ClientError },
    /// It was sent, and what became of it is not known. Publishing the id again is safe.
    #[error("{source}; whether {} arrived is not known", id.map_or("it".into(), |id| format!("message {id}")))]
    OutcomeUnknown { id: Option<MessageId>, source: ClientError },
    #[error("the payload cannot be written as JSON: {0}; nothing was sent")]
    NotJson(String),
}

/// The acknowledgement of a message.
#[derive(Debug, Clone)]
pub struct Published {
    pub id: MessageId,
    pub status: Status,
    pub lane: Option<String>,
    /// Where it is stored, on the durable lane.
    pub position: Option<String>,
    pub ts: String,
}

impl Published {
    pub(super) fn new(
        id: MessageId,
        status: Option<&str>,
        lane: Option<String>,
        position: Option<String>,
        ts: String,
    ) -> Self {
        let status = match status {
            Some("spooled") => Status::Spooled,
            Some("duplicate") => Status::Duplicate,
            _ => Status::Ok,
        };
        Self { id, status, lane, position, ts }
    }
}

/// Whether what was refused may have been done all the same.
pub fn is_unknown(error: &HeardError) -> bool {
    matches!(error.code.as_str(), "OUTCOME_UNKNOWN" | "INTERNAL" | "TIMEOUT")
}

/// Something that is asked.
pub struct Ask {
    pub kind: &'static str,
    pub frame: Fields,
    /// The bytes it counts.
    pub bytes: usize,
    /// Of a message that is published. What has no id may be sent only once.
    pub id: Option<MessageId>,
    pub deadline: Duration,
}

pub type Answer = Result<Heard, SendError>;

/// The handle. Once it is dropped and everything is answered, the connection ends.
pub struct Line {
    asks: mpsc::Sender<Waiting>,
    room: Arc<Semaphore>,
}

struct Waiting {
    ask: Ask,
    until: Instant,
    answer: oneshot::Sender<Answer>,
    sent: bool,
    /// Some attempt may have done it.
    unknown: bool,
    refusals: u32,
    last: Option<ClientError>,
    _room: OwnedSemaphorePermit,
}

impl Line {
    pub fn new(dial: Dial, backoff: Backoff) -> Self {
        let (asks, incoming) = mpsc::channel(ROOM_BYTES / ASK_BYTES);
        let queue =
            Queue { incoming, is_open: true, waiting: BTreeMap::new(), again: BTreeSet::new(), last: 0 };
        tokio::spawn(Runner { dial, backoff, queue }.run());
        Self { asks, room: Arc::new(Semaphore::new(ROOM_BYTES)) }
    }

    /// Returns once it has its place in line; the future is what became of it, at its deadline at the latest.
    pub async fn ask(&self, ask: Ask) -> Result<impl Future<Output = Answer> + Send + use<>, SendError> {
        let until = Instant::now() + ask.deadline;
        let (id, deadline) = (ask.id, ask.deadline);
        let bytes = (ASK_BYTES + ask.bytes).min(ROOM_BYTES) as u32;
        let room = timeout_at(until, self.room.clone().acquire_many_owned(bytes)).await;
        let Ok(Ok(room)) = room else {
            return Err(SendError::NotSent { source: ClientError::NoAnswer(deadline) });
        };
        let (answer, answered) = oneshot::channel();
        let waiting =
            Waiting { ask, until, answer, sent: false, unknown: false, refusals: 0, last: None, _room: room };
        // There is room in the channel for as many as have a place.
        let sent = self.asks.send(waiting).await;
        let gone = move || ClientError::Broken("the client was shut down".into());
        sent.map_err(|_| SendError::NotSent { source: gone() })?;
        Ok(
            async move {
                answered.await.unwrap_or_else(|_| Err(SendError::OutcomeUnknown { id, source: gone() }))
            },
        )
    }
}

impl Waiting {
    fn fail(self, source: ClientError) {
        let error = match self.unknown || self.sent {
            true => SendError::OutcomeUnknown { id: self.ask.id, source },
            false => SendError::NotSent { source },
        };
        // The caller may have stopped waiting.
        let _ = self.answer.send(Err(error));
    }
}

/// The task behind the handle.
struct Runner {
    dial: Dial,
    backoff: Backoff,
    queue: Queue,
}

struct Queue {
    incoming: mpsc::Receiver<Waiting>,
    is_open: bool,
    /// Everything that is not answered, in its order, which is also that of the deadlines.
    waiting: BTreeMap<u64, Waiting>,
    /// What was refused for now, and when it is sent again.
    again: BTreeSet<(Instant, u64)>,
    last: u64,
}

type UnderWay = FuturesUnordered<BoxFuture<'static, (u64, Result<Heard, ClientError>)>>;

impl Runner {
    async fn run(mut self) {
        while let Some(mut live) = self.connect().await {
            match self.speak(&mut live).await {
                None => return,
                Some(error) => {
                    let ended = self.dial.lost(live, error.clone()).await;
                    self.queue.lost(&error, ended);
                }
            }
        }
    }

    /// A connection once there is something to say; `None` once there never will be.
    async fn connect(&mut self) -> Option<Live> {
        let Self { dial, queue, .. } = self;
        loop {
            {
                let connecting = dial.connect();
                tokio::pin!(connecting);
                while Instant::now() < queue.first_deadline() {
                    if queue.is_over() {
                        return None;
                    }
                    let until = queue.first_deadline();
                    tokio::select! {
                        live = &mut connecting, if !queue.waiting.is_empty() => return Some(live),
                        asked = queue.incoming.recv(), if queue.is_open => {
                            queue.place(asked);
                        }
                        () = sleep_until(until) => {}
                    }
                }
            }
            queue.expire(dial.last.as_ref());
        }
    }

    /// Sends and answers until the connection ends, with why; `None` once everything is answered and nobody asks.
    async fn speak(&mut self, live: &mut Live) -> Option<ClientError> {
        let Self { queue, backoff, .. } = self;
        let sender = live.sender();
        let mut under_way = UnderWay::new();
        for number in queue.waiting.keys().copied().collect::<Vec<_>>() {
            queue.send(number, &sender, &mut under_way).await;
        }
        while !queue.is_over() {
            let until = queue.first_deadline();
            let until = queue.again.first().map_or(until, |(at, _)| until.min(*at));
            tokio::select! {
                biased;
                Some((number, result)) = under_way.next(), if !under_way.is_empty() => {
                    queue.answered(number, result, *backoff);
                }
                asked = queue.incoming.recv(), if queue.is_open => {
                    if let Some(number) = queue.place(asked) {
                        queue.send(number, &sender, &mut under_way).await;
                    }
                }
                heard = live.next() => {
                    if let Err(error) = heard {
                        // What was answered before the end is not asked again. One that does not answer has no end.
                        while !matches!(error, ClientError::NoAnswer(_))
                            && let Some((number, result)) = under_way.next().await
                        {
                            queue.answered(number, result, *backoff);
                        }
                        return Some(error);
                    }
                }
                () = sleep_until(until) => {
                    queue.expire(None);
                    while let Some(number) = queue.due() {
                        queue.send(number, &sender, &mut under_way).await;
                    }
                }
            }
        }
        None
    }
}

impl Queue {
    /// Whether nobody asks any more, and everybody has been answered.
    fn is_over(&self) -> bool {
        self.waiting.is_empty() && !self.is_open
    }

    fn place(&mut self, asked: Option<Waiting>) -> Option<u64> {
        let Some(waiting) = asked else {
            self.is_open = false;
            return None;
        };
        self.last += 1;
        self.waiting.insert(self.last, waiting);
        Some(self.last)
    }

    async fn send(&mut self, number: u64, sender: &Sender, under_way: &mut UnderWay) {
        let Some(waiting) = self.waiting.get_mut(&number) else { return };
        // An error is that of a connection that has ended, which is told elsewhere.
        if let Ok(answer) = sender.ask(waiting.ask.kind, waiting.ask.frame.clone()).await {
            waiting.sent = true;
            under_way.push(Box::pin(async move { (number, answer.await) }));
        }
    }

    fn answered(&mut self, number: u64, result: Result<Heard, ClientError>, backoff: Backoff) {
        let Some(mut waiting) = self.waiting.remove(&number) else { return };
        let error = match result {
            Ok(heard) => {
                // The caller may have stopped waiting.
                let _ = waiting.answer.send(Ok(heard));
                return;
            }
            // The connection has ended: it counts as sent until that is told.
            Err(ClientError::Broken(_)) => {
                self.waiting.insert(number, waiting);
                return;
            }
            Err(error) => error,
        };
        let (may_retry, is_unknown) = match &error {
            ClientError::Refused(error) => (error.retryable, is_unknown(error)),
            _ => (true, true),
        };
        waiting.sent = false;
        waiting.unknown |= is_unknown;
        if !may_retry || waiting.ask.id.is_none() {
            return waiting.fail(error);
        }
        self.again.insert((Instant::now() + backoff.delay(waiting.refusals), number));
        waiting.refusals += 1;
        waiting.last = Some(error);
        self.waiting.insert(number, waiting);
    }

    /// The next that is to be sent again now.
    fn due(&mut self) -> Option<u64> {
        let (at, _) = self.again.first()?;
        if *at > Instant::now() {
            return None;
        }
        self.again.pop_first().map(|(_, number)| number)
    }

    /// The connection has ended. All that is left waiting is sent on the next one.
    fn lost(&mut self, error: &ClientError, ended: Result<(), ClientError>) {
        self.again.clear();
        for (number, mut waiting) in std::mem::take(&mut self.waiting) {
            let was_sent = std::mem::take(&mut waiting.sent);
            waiting.unknown |= was_sent;
            match &ended {
                // The bridge does not take one of these: none of them is sent again.
                Err(error) if was_sent => waiting.fail(error.clone()),
                Ok(()) if was_sent && waiting.ask.id.is_none() => waiting.fail(error.clone()),
                _ => {
                    waiting.last.get_or_insert_with(|| error.clone());
                    self.waiting.insert(number, waiting);
                }
            }
        }
    }

    fn first_deadline(&self) -> Instant {
        let never = || Instant::now() + Duration::from_secs(24 * 3600);
        self.waiting.first_key_value().map_or_else(never, |(_, waiting)| waiting.until)
    }

    /// Answers those whose deadline has passed, with what is known of the reason.
    fn expire(&mut self, unreached: Option<&ClientError>) {
        while let Some(first) = self.waiting.first_entry().filter(|first| first.get().until <= Instant::now())
        {
            let mut waiting = first.remove();
            let no_answer = || ClientError::NoAnswer(waiting.ask.deadline);
            let source = waiting.last.take().or_else(|| unreached.cloned()).unwrap_or_else(no_answer);
            waiting.fail(source);
        }
    }
}
