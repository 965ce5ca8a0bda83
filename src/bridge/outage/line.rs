//! One topic's line: the one place where its messages are given their order, while the lane takes them, while it does
//! not, and in between.
//!
//! ```text
//!          ┌── something under way failed, or the lane is down: what is under way is spooled, in its order ──┐
//!          │                                                                                                 ▼
//!  direct: lane ◀── publishes                                                     spooling: spool ◀── publishes
//!          ▲                                                                                 └──drain──▶ lane
//!          └──────────────── the spool holds nothing of the topic any more ──────────────────────┘
//! ```
//! What was spooled while it was under way may be stored after all. So the drain begins only when all of it has had its
//! answer from the lane, and reads in storage which of it is there.

use std::collections::{BTreeMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::{info, warn};

use super::breaker::{Pass, is_outage};
use super::drain::Drain;
use super::shared::{Asked, Kept, Shared, closed};
use super::spool::Spooled;
use crate::lane::contract::{LaneError, durable_down};
use crate::message::{MessageId, Position};
use crate::topic::Topic;

/// A line that has had nothing to do for so long ends.
const IDLE: Duration = Duration::from_secs(30);
/// With so few messages left in the spool publishers are asked to wait for them, so that the spool becomes empty; no
/// longer than this, where the lane is in no hurry.
const LAST_MESSAGES: u64 = 256;
const LAST_WAIT: Duration = Duration::from_secs(1);
/// How long what is under way may still be answered when the bridge closes.
const CLOSE_WAIT: Duration = Duration::from_secs(2);

/// A message that went to the lane.
struct Flight {
    asked: Asked,
    /// It may be stored, as far as anybody knows.
    sent: bool,
}

/// What became of a flight.
struct Landed {
    number: u64,
    id: Option<MessageId>,
    pass: Pass,
    outcome: Result<Position, LaneError>,
}

enum Next {
    Direct,
    Spooling,
    End,
}

pub struct Keeper {
    shared: Arc<Shared>,
    topic: Topic,
    inbox: mpsc::Receiver<Asked>,
    /// What the lane has not answered yet. What was spooled meanwhile is no flight any more.
    under_way: FuturesUnordered<BoxFuture<'static, Landed>>,
    flights: BTreeMap<u64, Flight>,
    next_number: u64,
    /// What is on its way to the spool; each answers by itself.
    writes: FuturesUnordered<BoxFuture<'static, ()>>,
    /// What was stored after it was spooled.
    stored: HashSet<MessageId>,
    /// Some of what is in the spool may be in storage.
    is_suspect: bool,
}

impl Keeper {
    pub fn new(shared: Arc<Shared>, topic: Topic, inbox: mpsc::Receiver<Asked>) -> Self {
        Self {
            shared,
            topic,
            inbox,
            under_way: FuturesUnordered::new(),
            flights: BTreeMap::new(),
            next_number: 0,
            writes: FuturesUnordered::new(),
            stored: HashSet::new(),
            is_suspect: false,
        }
    }

    pub async fn run(mut self) {
        let mut next = Next::Direct;
        if self.shared.spool.holds_any_of(&self.topic) {
            // An earlier bridge left it, and may have been killed while it drained.
            self.is_suspect = true;
            next = Next::Spooling;
        }
        loop {
            next = match next {
                Next::Direct => self.direct().await,
                Next::Spooling => self.spooling().await,
                Next::End => return,
            };
        }
    }

    async fn direct(&mut self) -> Next {
        let mut state = self.shared.state.clone();
        let stop = self.shared.stop.clone();
        loop {
            tokio::select! {
                biased;
                Some(landed) = self.under_way.next() => {
                    if self.land(landed) {
                        self.ground().await;
                        return Next::Spooling;
                    }
                }
                // What does not spool waits for its own answer.
                _ = durable_down(&mut state), if self.newest_spools() => {
                    self.ground().await;
                    return Next::Spooling;
                }
                asked = self.inbox.recv() => {
                    let Some(asked) = asked else { return Next::End };
                    if self.fly(asked).await {
                        self.ground().await;
                        return Next::Spooling;
                    }
                }
                () = stop.cancelled() => {
                    self.close().await;
                    return Next::End;
                }
                () = sleep(IDLE), if self.flights.is_empty() => {
                    if self.shared.leave(&self.topic, &self.inbox) {
                        return Next::End;
                    }
                }
            }
        }
    }

    fn newest_spools(&self) -> bool {
        self.flights.values().next_back().is_some_and(|flight| flight.asked.spools())
    }

    /// Sends a message to the lane. Says whether the topic has to go over to its spool.
    async fn fly(&mut self, asked: Asked) -> bool {
        let (shared, topic) = (self.shared.clone(), self.topic.clone());
        let pass = match shared.breaker.admit(&topic) {
            Ok(pass) => pass,
            Err(open) => return self.grounded(Flight { asked, sent: false }, open.on_lane()),
        };
        let (route, message, publisher) = (asked.route.clone(), asked.message.clone(), asked.publisher);
        let mut placing = pin!(shared.while_up(shared.both.append(&route, &topic, message, publisher)));
        let mut failed = false;
        let placed = loop {
            tokio::select! {
                biased;
                placed = &mut placing => break placed,
                // Else what waits for room would wait for itself.
                Some(landed) = self.under_way.next() => failed |= self.land(landed),
            }
        };
        match placed {
            Ok(receipt) => {
                let (number, id) = (self.next_number, asked.message.id);
                self.next_number += 1;
                self.flights.insert(number, Flight { asked, sent: true });
                self.under_way.push(receipt.map(move |outcome| Landed { number, id, pass, outcome }).boxed());
                failed
            }
            Err(error) => {
                shared.breaker.heard(&topic, pass, Err(&error));
                let sent = !matches!(error, LaneError::Unavailable(_));
                failed | self.grounded(Flight { asked, sent }, error)
            }
        }
    }

    /// The lane answered. Says whether the topic has to go over to its spool.
    fn land(&mut self, landed: Landed) -> bool {
        let Landed { number, id, pass, outcome } = landed;
        self.shared.breaker.heard(&self.topic, pass, outcome.as_ref().map(|_| ()));
        let Some(flight) = self.flights.remove(&number) else {
            // It was spooled meanwhile.
            if outcome.is_ok() {
                self.stored.extend(id);
            }
            return false;
        };
        match outcome {
            Ok(position) => {
                flight.asked.answer(Ok(Kept::Stored(position)));
                false
            }
            Err(error) => {
                let sent = !matches!(error, LaneError::Unavailable(_));
                self.flight_failed(number, Flight { sent, ..flight }, error)
            }
        }
    }

    /// A message that found no place in the lane.
    fn grounded(&mut self, flight: Flight, error: LaneError) -> bool {
        let number = self.next_number;
        self.next_number += 1;
        self.flight_failed(number, flight, error)
    }

    fn flight_failed(&mut self, number: u64, flight: Flight, error: LaneError) -> bool {
        let is_spooled = flight.asked.spools() && is_outage(&error);
        match is_spooled {
            // In its place among those that are under way.
            true => _ = self.flights.insert(number, flight),
            false => flight.asked.answer(Err(error)),
        }
        is_spooled
    }

    /// Spools what is under way, in its order.
    async fn ground(&mut self) {
        while let Some(Some(landed)) = self.under_way.next().now_or_never() {
            self.land(landed);
        }
        let flights = std::mem::take(&mut self.flights);
        info!(topic = %self.topic, under_way = flights.len(), "The lane does not take the topic's messages; spooling them.");
        for (number, flight) in flights {
            match flight.asked.spools() {
                true => self.spool(flight.asked, flight.sent).await,
                // Its publisher is told what becomes of it.
                false => _ = self.flights.insert(number, flight),
            }
        }
    }

    /// Writes a message behind the others in the spool.
    async fn spool(&mut self, asked: Asked, sent: bool) {
        self.is_suspect |= sent;
        let Asked { message, publisher, answer, room, .. } = asked;
        let not_kept = move |error: LaneError| match sent {
            false => error,
            true => LaneError::OutcomeUnknown(format!(
                "it was under way when the lane broke, and the spool did not take it ({error})"
            )),
        };
        match self.shared.spool.put(&self.topic, Spooled { message, publisher, sent }).await {
            Ok(written) => self.writes.push(Box::pin(async move {
                let written = written.await;
                let _ = answer.send(written.map(|_| Kept::Spooled).map_err(not_kept));
                drop(room);
            })),
            Err(error) => _ = answer.send(Err(not_kept(error))),
        }
    }

    async fn spooling(&mut self) -> Next {
        let (stop, mut state) = (self.shared.stop.clone(), self.shared.state.clone());
        let moves = Arc::new(AtomicBool::new(false));
        let mut drain: Option<BoxFuture<'static, ()>> = None;
        let mut last_until: Option<Instant> = None;
        loop {
            if drain.is_none() && self.under_way.is_empty() {
                if self.shared.spool.holds_any_of(&self.topic) {
                    let drained = Drain {
                        shared: self.shared.clone(),
                        topic: self.topic.clone(),
                        stored: std::mem::take(&mut self.stored),
                        is_suspect: std::mem::take(&mut self.is_suspect),
                        moves: moves.clone(),
                    };
                    drain = Some(drained.run().boxed());
                } else if self.writes.is_empty() && state.borrow_and_update().is_up() {
                    info!(topic = %self.topic, "The topic's spool is empty; its messages go to the lane again.");
                    return Next::Direct;
                }
            }
            let left = self.shared.spool.messages_of(&self.topic) + self.writes.len() as u64;
            last_until = match moves.load(Ordering::Relaxed) && left <= LAST_MESSAGES {
                true => last_until.or_else(|| Some(Instant::now() + LAST_WAIT)),
                false => None,
            };
            let waits = last_until.filter(|until| *until > Instant::now());
            tokio::select! {
                biased;
                Some(()) = self.writes.next() => {}
                Some(landed) = self.under_way.next() => {
                    self.land(landed);
                }
                () = poll_drain(&mut drain) => {
                    drain = None;
                    moves.store(false, Ordering::Relaxed);
                }
                asked = self.inbox.recv(), if waits.is_none() => {
                    let Some(asked) = asked else { return Next::End };
                    self.spool(asked, false).await;
                }
                Ok(()) = state.changed() => {}
                () = sleep_until(waits.unwrap_or_else(Instant::now)), if waits.is_some() => {}
                () = stop.cancelled() => {
                    drop(drain);
                    self.close().await;
                    return Next::End;
                }
            }
        }
    }

    /// Answers or spools everything.
    async fn close(&mut self) {
        self.inbox.close();
        let deadline = Instant::now() + CLOSE_WAIT;
        while !self.flights.is_empty()
            && let Ok(Some(landed)) = timeout_at(deadline, self.under_way.next()).await
        {
            self.land(landed);
        }
        if !self.flights.is_empty() {
            self.ground().await;
        }
        while let Ok(asked) = self.inbox.try_recv() {
            match asked.spools() {
                true => self.spool(asked, false).await,
                false => asked.answer(Err(closed())),
            }
        }
        while self.writes.next().await.is_some() {}
        for (_, flight) in std::mem::take(&mut self.flights) {
            warn!(topic = %self.topic, "A message was under way when the bridge closed; whether it is stored is not known.");
            let unknown = LaneError::OutcomeUnknown("the bridge closed before the receipt came".into());
            flight.asked.answer(Err(unknown));
        }
    }
}

/// Never ready where nothing is drained.
async fn poll_drain(drain: &mut Option<BoxFuture<'static, ()>>) {
    match drain {
        Some(drain) => drain.await,
        None => std::future::pending().await,
    }
}
