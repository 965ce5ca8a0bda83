//! One topic's producer (one partition's, where it has some): its line, and what was sent and has no receipt yet.
//!
//! ```text
//!  push ──▶ queue ──take, while the wire has room──▶ in flight ──receipt──▶ confirmed
//!                                                     │     ▲
//!                          detached: cut, moved, refused    └── attached again: sent again, the same bytes, first
//! ```
//! A topic that moves has its producers closed before the broker has confirmed what it stored of them: their receipts come
//! behind the close, and count until the producer is open again and sends the rest.
//!
//! The session's writer asks for entries when it is free, so what comes meanwhile is what the next batch is made of.
//!
//! A producer keeps the name that the broker gave it, and its numbers go on, as long as anything is in flight. So a
//! namespace that de-duplicates knows what is sent again from what is new, whatever was lost: the entry or its receipt.
//! One that does not may store an entry twice after a cut; no receipt says so.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use pulsar::proto::{
    CommandProducer, CommandSendError, CommandSendReceipt, MessageIdData, Schema, ServerError, schema,
};
use tokio::runtime::Handle;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::batch::{Freed, Queue, Seal, Sealed, Ticket};
use super::cluster::Cluster;
use super::fault::Fault;
use super::feed::{self, Backoff};
use super::find::{Since, find};
use super::names::Physical;
use super::room::Room;
use super::session::{Outlet, Pieces, Session};
use crate::lane::contract::LaneError;
use crate::lane::slot::Waiting;
use crate::message::{Message, Place, Timestamp};
use crate::policy::table::{Compression, PulsarSchema, Route};
use crate::telemetry::metrics::Metrics;

/// Entries without a receipt, so that batches grow meanwhile: fewer leave the wire idle, more make the batches small.
const IN_FLIGHT: usize = 8;
/// Entries that would not grow may be so many.
const IN_FLIGHT_RIPE: usize = 1024;
const BACKOFF: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(500));

pub struct Producer {
    /// Its number on any connection.
    id: u64,
    pub physical: Physical,
    /// Goes on whatever the lane's state: how else would it be found up again?
    pub is_canary: bool,
    pub room: Room,
    common: Arc<Common>,
    state: Mutex<State>,
}

/// What all producers share.
pub struct Common {
    pub cluster: Arc<Cluster>,
    pub room: Room,
    pub timeout: Duration,
    pub metrics: Arc<Metrics>,
    /// Tasks may begin where no runtime is current.
    pub runtime: Handle,
    pub stop: CancellationToken,
}

/// What a route says of its producers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Options {
    compression: Compression,
    schema: PulsarSchema,
}

struct State {
    options: Options,
    /// Its name, for the metrics; the canary has none.
    route: Option<Arc<str>>,
    queue: Queue,
    /// In the order of their numbers, which is the order in which they are stored.
    in_flight: VecDeque<Sealed>,
    /// How many of them this attachment has sent, from the first on.
    sent: usize,
    attached: Option<Attached>,
    /// A task is about it.
    attaching: bool,
    /// The session was told that there is something to send.
    marked: bool,
    epoch: u64,
    name: Option<String>,
    schema_version: Option<Vec<u8>>,
    next: u64,
    /// Where the last entry of which that is known is stored.
    last: Option<Place>,
    /// Entries that the broker had already, until their place is found. A task looks for them, if there are any.
    unplaced: Vec<Unplaced>,
    finding: bool,
    /// Begins anew with a receipt, not with a connection: what kills a connection would else do so without a pause.
    backoff: Backoff,
    /// An attempt was made since the last receipt.
    tried: bool,
    /// Why it is not attached.
    fault: Option<Fault>,
    used: Instant,
    closed: bool,
}

struct Unplaced {
    sealed: Sealed,
    /// The producer's name then.
    producer: String,
    /// It stands behind this.
    since: Since,
}

struct Attached {
    session: Arc<Session>,
    epoch: u64,
}

impl Producer {
    pub fn new(id: u64, physical: Physical, is_canary: bool, room: Room, common: Arc<Common>) -> Arc<Self> {
        let state = State {
            options: Options::default(),
            route: None,
            queue: Queue::new(common.cluster.message_bytes_max()),
            in_flight: VecDeque::with_capacity(IN_FLIGHT),
            sent: 0,
            attached: None,
            attaching: false,
            marked: false,
            epoch: 0,
            name: None,
            schema_version: None,
            next: 0,
            last: None,
            unplaced: Vec::new(),
            finding: false,
            backoff: Backoff::between(BACKOFF),
            tried: false,
            fault: None,
            used: Instant::now(),
            closed: false,
        };
        Arc::new(Self { id, physical, is_canary, room, common, state: Mutex::new(state) })
    }

    /// From now on. What is attached with another schema is attached anew.
    pub fn set(self: &Arc<Self>, route: &Route) {
        let options = Options { compression: route.compression, schema: route.pulsar_schema };
        let mut state = self.state();
        state.route = Some(route.name.clone());
        let was = std::mem::replace(&mut state.options, options);
        if was.schema != options.schema {
            self.let_go(&mut state);
        }
    }

    /// Puts a message in the line. One that is closed hands it back.
    // Handed back as it came: a box for it would be an allocation.
    #[allow(clippy::result_large_err)]
    pub fn push(self: &Arc<Self>, message: Message, ticket: Ticket) -> Result<Waiting, Message> {
        let mut state = self.state();
        if state.closed {
            return Err(message);
        }
        let waiting = state.queue.push(message, ticket, self.room.taken());
        self.go_on(&mut state);
        Ok(waiting)
    }

    /// Sees to it that what there is to do is done.
    fn go_on(self: &Arc<Self>, state: &mut State) {
        if state.closed || state.is_idle() {
            return;
        }
        match &state.attached {
            Some(attached) => {
                if (state.sent < state.in_flight.len() || state.may_send_more(self.room.taken()))
                    && !state.marked
                {
                    state.marked = true;
                    attached.session.is_ready(self.id);
                }
            }
            None if state.attaching => {}
            None => {
                state.attaching = true;
                let (this, stop) = (self.clone(), self.common.stop.clone());
                self.common.runtime.spawn(async move { stop.run_until_cancelled(this.attach()).await });
            }
        }
    }

    /// Tries until it is attached or has nothing to do. One task at a time: a broker that is asked for the same
    /// producer twice on a connection refuses the second for ever.
    async fn attach(self: Arc<Self>) {
        loop {
            let wait = {
                let mut state = self.state();
                if state.closed || state.is_idle() {
                    state.attaching = false;
                    return;
                }
                match std::mem::replace(&mut state.tried, true) {
                    false => Duration::ZERO,
                    true => state.backoff.next(),
                }
            };
            if !wait.is_zero() {
                tokio::time::sleep(wait).await;
            }
            match self.try_to_attach().await {
                Ok(()) => return,
                Err(fault) => self.cannot(fault),
            }
        }
    }

    async fn try_to_attach(self: &Arc<Self>) -> Result<(), Fault> {
        let session = self.common.cluster.owner(&self.physical).await?;
        let asked = self.state().options.schema;
        let schema = self.schema(&session, asked).await?;
        let (epoch, name, freed) = {
            let mut state = self.state();
            state.epoch += 1;
            let freed = state.give_up();
            state.in_flight.iter_mut().for_each(|sealed| sealed.resent = true);
            if state.in_flight.is_empty() {
                // Nothing to tell from what is new, and a name that a lost connection still holds would be waited for.
                state.name = None;
            }
            (state.epoch, state.name.clone(), freed)
        };
        self.free(freed);
        let command = CommandProducer {
            topic: self.physical.as_str().into(),
            producer_id: self.id,
            producer_name: name,
            schema,
            epoch: Some(epoch),
            user_provided_producer_name: Some(false),
            ..Default::default()
        };
        let has_schema = command.schema.is_some();
        let success = session.produce(Arc::downgrade(self) as Weak<dyn Outlet>, command).await?;
        {
            let mut state = self.state();
            state.name = Some(success.producer_name);
            state.schema_version = success.schema_version.filter(|_| has_schema);
            state.attached = Some(Attached { session: session.clone(), epoch });
            state.attaching = false;
            state.sent = 0;
            let freed = state.give_up();
            if let Some(fault) = state.fault.take() {
                debug!(topic = %self.physical, %fault, "A durable topic can be published to again.");
            }
            // While it was made, the line may have been closed, or its route may have come to ask for another schema.
            match state.closed || state.options.schema != asked {
                true => self.let_go(&mut state),
                false => self.go_on(&mut state),
            }
            drop(state);
            self.free(freed);
        }
        // It may have been closed before anybody here knew that it was open.
        if !session.has_producer(self.id, epoch) {
            self.clone().detached(epoch);
        }
        Ok(())
    }

    async fn schema(&self, session: &Session, asked: PulsarSchema) -> Result<Option<Schema>, Fault> {
        let refused = |found: Schema| {
            let (kind, says) = (found.r#type().as_str_name(), asked.as_str());
            let text = format!("the topic's schema is {kind}, and its route says pulsar_schema = \"{says}\"");
            Fault::refused(ServerError::IncompatibleSchema as i32, text)
        };
        match asked {
            // A broker takes bytes for any schema, unless it is told to be strict; whoever reads Avro finds no Avro.
            PulsarSchema::Bytes => match session.schema(self.physical.as_str()).await? {
                Some(found) if !is_text_or_bytes(found.r#type()) => Err(refused(found)),
                _ => Ok(None),
            },
            PulsarSchema::String => {
                let kind = schema::Type::String as i32;
                Ok(Some(Schema { name: "String".into(), r#type: kind, ..Default::default() }))
            }
            // One made up here would say nothing of the fields, and would keep out those that do.
            PulsarSchema::Json => match session.schema(self.physical.as_str()).await? {
                Some(found) if found.r#type() != schema::Type::Json => Err(refused(found)),
                found => Ok(found),
            },
        }
    }

    /// Finds where the entries are that the broker had already, and confirms them.
    async fn find(self: Arc<Self>) {
        loop {
            let mut wanted = std::mem::take(&mut self.state().unplaced);
            let Some(Unplaced { producer, since, .. }) = wanted.first() else {
                let mut state = self.state();
                // One more may have come just now.
                if state.unplaced.is_empty() {
                    state.finding = false;
                    return;
                }
                continue;
            };
            let (producer, since) = (producer.clone(), *since);
            let deadlines = wanted.iter().filter_map(|unplaced| unplaced.sealed.deadline());
            let deadline = deadlines.min().unwrap_or_else(Instant::now);
            let finding = async {
                let mut backoff = Backoff::between(BACKOFF);
                let mut seen = |sequence, place| {
                    let found = |unplaced: &Unplaced| {
                        unplaced.sealed.sequence == sequence && unplaced.producer == producer
                    };
                    if let Some(at) = wanted.iter().position(found) {
                        self.free(wanted.swap_remove(at).sealed.confirm(place));
                    }
                    wanted.is_empty()
                };
                // What cut the entry's receipt off may cut this off as well.
                while find(&self.common.cluster, &self.physical, since, &producer, &mut seen).await.is_err() {
                    backoff.wait().await;
                }
            };
            // Whose place was not found in time is told what is known.
            let _ = timeout_at(deadline, finding).await;
            let unknown = LaneError::OutcomeUnknown(
                "the broker has the message from before and did not say where it is".into(),
            );
            wanted.into_iter().for_each(|unplaced| self.free(unplaced.sealed.fail(&unknown)));
        }
    }

    fn cannot(&self, fault: Fault) {
        let mut state = self.state();
        if state.fault.is_none() {
            warn!(topic = %self.physical, %fault, "Cannot publish to a durable topic; trying until it can be.");
        }
        if fault.refuses_messages() {
            // What was sent before may be stored all the same.
            let freed = state.fail(&fault.clone().on_lane(), &sent_and_then(&fault));
            self.free(freed);
            state.may_try_at_once();
        }
        state.fault = Some(fault);
    }

    /// Gives up what was never sent and has no time left by `soon`, and answers who has waited too long for a receipt.
    /// Returns since when there has been nothing to do.
    pub fn sweep(self: &Arc<Self>, soon: Instant, down: Option<&LaneError>) -> Option<Instant> {
        let mut state = self.state();
        if state.is_idle() {
            return Some(state.used);
        }
        let now = Instant::now();
        let State { queue, in_flight, fault, attached, used, .. } = &mut *state;
        *used = now;
        let mut freed = queue.expire(soon, || match &*fault {
            Some(fault) => LaneError::Unavailable(fault.to_string()),
            None => LaneError::Unavailable(format!("`{}` took nothing in time", self.physical)),
        });
        if let Some(down) = down.filter(|_| !self.is_canary) {
            freed.and(queue.fail(down));
            in_flight.iter_mut().for_each(|sealed| sealed.outlived = true);
        }
        let within = self.common.timeout.as_secs_f32();
        for sealed in &mut *in_flight {
            sealed.expire(soon, || {
                LaneError::OutcomeUnknown(format!("the broker did not confirm the message within {within} s"))
            });
        }
        if attached.is_none() {
            freed.and(state.give_up());
        } else if in_flight.front().is_some_and(Sealed::is_answered) {
            // A broker that has confirmed nothing for so long is asked anew.
            *fault = Some(Fault::Lost(format!("`{}` confirmed nothing for {within} s", self.physical)));
            self.let_go(&mut state);
        }
        drop(state);
        self.free(freed);
        None
    }

    /// Since when there has been nothing to do.
    pub fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        state.is_idle().then_some(state.used)
    }

    pub fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Takes no more messages. What was not sent is refused, what was sent is not known.
    pub fn close(self: &Arc<Self>, why: &LaneError) {
        let mut state = self.state();
        state.closed = true;
        let sent = LaneError::OutcomeUnknown("the producer was closed before the receipt came".into());
        let freed = state.fail(why, &sent);
        self.let_go(&mut state);
        drop(state);
        self.free(freed);
    }

    /// Closes it, unless it has something to do.
    pub fn close_if_idle(self: &Arc<Self>) -> bool {
        let mut state = self.state();
        let idle = state.is_idle();
        if idle {
            state.closed = true;
            self.let_go(&mut state);
        }
        idle
    }

    /// Ends the attachment from our side; it begins anew if there is something to do.
    fn let_go(self: &Arc<Self>, state: &mut State) {
        if let Some(attached) = state.attached.take() {
            attached.session.end_producer(self.id, attached.epoch);
        }
        state.marked = false;
        state.sent = 0;
        self.go_on(state);
    }

    fn free(&self, freed: Freed) {
        self.room.give(freed);
        self.common.room.give(freed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements that can panic, and none is known to.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn may_try_at_once(&mut self) {
        self.tried = false;
        self.backoff.reset();
    }

    fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.in_flight.is_empty()
    }

    fn may_send_more(&self, under_way: usize) -> bool {
        let in_flight = self.in_flight.len();
        !self.queue.is_empty()
            && (in_flight < IN_FLIGHT || in_flight < IN_FLIGHT_RIPE && self.queue.is_ripe(under_way))
    }

    fn fail(&mut self, waiting: &LaneError, sent: &LaneError) -> Freed {
        let mut freed = self.queue.fail(waiting);
        self.sent = 0;
        for sealed in self.in_flight.drain(..) {
            freed.and(sealed.fail(sent));
        }
        freed
    }

    /// What was under way when the lane went down, or was answered since, is not sent again behind its publisher's back:
    /// it may be stored, and by now the publisher may have done something about it.
    fn give_up(&mut self) -> Freed {
        let unknown = LaneError::OutcomeUnknown("the message was sent, and then the lane went down".into());
        let mut freed = Freed::default();
        while let Some(sealed) = self.in_flight.pop_front_if(|sealed| sealed.outlived || sealed.is_answered())
        {
            freed.and(sealed.fail(&unknown));
        }
        freed
    }

    fn is_attached(&self, epoch: u64) -> bool {
        self.attached.as_ref().is_some_and(|attached| attached.epoch == epoch)
    }
}

impl Outlet for Producer {
    fn take(&self, epoch: u64, pieces: &mut Pieces) {
        let mut state = self.state();
        if !state.is_attached(epoch) {
            return;
        }
        state.marked = false;
        loop {
            if state.sent == state.in_flight.len() {
                if !state.may_send_more(self.room.taken()) {
                    return;
                }
                let State { options, route, queue, name, schema_version, next, in_flight, .. } = &mut *state;
                let seal = Seal {
                    producer_id: self.id,
                    producer_name: name.as_deref().unwrap_or_default(),
                    compression: options.compression,
                    schema_version: schema_version.as_deref(),
                    now: Timestamp::now(),
                };
                let Some(sealed) = queue.take(&seal, *next) else { return };
                if let Some(route) = route {
                    self.common.metrics.batched(route, sealed.highest + 1 - sealed.sequence);
                }
                *next = sealed.highest + 1;
                in_flight.push_back(sealed);
            }
            let at = state.sent;
            for piece in &state.in_flight[at].frame {
                pieces.push(piece);
            }
            state.sent += 1;
        }
    }

    fn confirmed(self: Arc<Self>, receipt: CommandSendReceipt) {
        let mut state = self.state();
        let sealed = match state.in_flight.front() {
            Some(first) if first.sequence == receipt.sequence_id => state.in_flight.pop_front(),
            // The receipt of an entry that was sent twice, or that nobody waits for.
            Some(first) if receipt.sequence_id < first.sequence => None,
            None => None,
            Some(_) => {
                state.fault = Some(Fault::Lost("the broker confirmed entries out of their order".into()));
                return self.let_go(&mut state);
            }
        };
        let Some(sealed) = sealed else { return };
        state.sent = state.sent.saturating_sub(1);
        state.may_try_at_once();
        self.go_on(&mut state);
        match stored_at(&receipt) {
            Some(id) => {
                let place = feed::place(id);
                state.last = Some(place);
                drop(state);
                self.free(sealed.confirm(place));
            }
            None => {
                let since = state.last.map_or(Since::Published(sealed.published), Since::Place);
                let producer = state.name.clone().unwrap_or_default();
                state.unplaced.push(Unplaced { sealed, producer, since });
                if !std::mem::replace(&mut state.finding, true) {
                    let (this, stop) = (self.clone(), self.common.stop.clone());
                    self.common.runtime.spawn(async move { stop.run_until_cancelled(this.find()).await });
                }
            }
        }
    }

    fn refused(self: Arc<Self>, epoch: u64, refusal: CommandSendError) {
        let mut state = self.state();
        if !state.is_attached(epoch) {
            return;
        }
        let fault = Fault::refused(refusal.error, refusal.message);
        let mut freed = Freed::default();
        // The broker's answer to this very entry: it has not taken it and will not.
        if fault.is_lasting()
            && let Some(at) = state.in_flight.iter().position(|sealed| sealed.sequence == refusal.sequence_id)
            && let Some(sealed) = state.in_flight.remove(at)
        {
            state.sent = state.sent.saturating_sub(1);
            freed = match sealed.resent {
                false => sealed.fail(&fault.clone().on_lane()),
                true => sealed.fail(&sent_and_then(&fault)),
            };
        }
        // Anything else is a topic that moves, or a disk that is slow: everything in flight is sent again, in order.
        state.fault = Some(fault);
        self.let_go(&mut state);
        drop(state);
        self.free(freed);
    }

    fn detached(self: Arc<Self>, epoch: u64) {
        let mut state = self.state();
        if state.is_attached(epoch) {
            self.let_go(&mut state);
        }
    }
}

fn sent_and_then(fault: &Fault) -> LaneError {
    LaneError::OutcomeUnknown(format!("the message was sent, and then {fault}"))
}

/// Where an entry is; a broker that knew it already does not say.
fn stored_at(receipt: &CommandSendReceipt) -> Option<&MessageIdData> {
    receipt.message_id.as_ref().filter(|id| id.ledger_id != u64::MAX)
}

/// Whether what a client publishes can be what the schema says without being encoded anew.
fn is_text_or_bytes(kind: schema::Type) -> bool {
    use schema::Type::{Json, None, String};
    matches!(kind, None | String | Json)
}
