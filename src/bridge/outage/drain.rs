//! Takes one topic's messages from the spool to the lane, in their order.
//!
//! ```text
//! may some be stored? ──▶ read storage for them ──▶ the first message, as a probe ──▶ many under way ──▶ empty: ends
//!   ▲                                                        │                             │
//!   └────────────────── waits longer each time ◀─────────────┴──── the lane breaks ◀───────┘
//! ```
//! A message is removed from the spool after the lane has confirmed it. A bridge that is killed in between finds it in
//! storage when it starts again. What the lane refuses for good goes to its route's dead letters, or is set aside, and
//! stands in nobody's way.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::time::{sleep, sleep_until, timeout};
use tracing::{debug, error, info, warn};

use super::breaker::{Pass, backoff, is_outage};
use super::shared::Shared;
use super::spool::Spooled;
use crate::bridge::delivery::place_of_letters;
use crate::lane::contract::{LaneError, Publisher, Receipt};
use crate::message::{Lane, Message, MessageId, ORIGIN, Place, Start, Timestamp};
use crate::policy::table::Route;
use crate::topic::Topic;

/// Messages under way to the lane, and how many are removed from the spool at a time.
const WINDOW: usize = 256;
/// The oldest messages that a bridge which was killed may have sent and not removed. Behind them only those are that
/// were under way when the lane broke, and these are marked.
const SUSPECTS: usize = 2 * WINDOW;
/// By how much the clocks of a bridge and a broker may differ.
const CLOCKS: Duration = Duration::from_secs(60);

pub struct Drain {
    pub shared: Arc<Shared>,
    pub topic: Topic,
    /// What is known to be stored.
    pub stored: HashSet<MessageId>,
    /// There may be more.
    pub is_suspect: bool,
    /// Told others: the lane takes the topic's messages.
    pub moves: Arc<AtomicBool>,
}

/// A message on its way.
struct Under {
    place: Place,
    spooled: Spooled,
    /// `None`: it is stored.
    receipt: Option<Receipt>,
}

/// How far an attempt has come.
struct Progress {
    /// Told to the breaker with the first outcome.
    pass: Option<Pass>,
    /// Everything up to here can be removed, so many of them.
    through: Option<Place>,
    count: usize,
}

impl Drain {
    /// Ends when the spool holds nothing of the topic.
    pub async fn run(mut self) {
        let mut failures = 0;
        while self.shared.spool.holds_any_of(&self.topic) {
            let failed = match self.attempt().await {
                Ok(()) => {
                    failures = 0;
                    continue;
                }
                Err(error) => error,
            };
            // What went may have been stored, and what was stored may not have been removed.
            self.is_suspect = true;
            if self.moves.swap(false, Ordering::Relaxed) {
                failures = 0;
            }
            if failures == 0 {
                warn!(topic = %self.topic, error = %failed, "Draining the spool failed; it is tried again.");
            } else {
                debug!(topic = %self.topic, error = %failed, "Draining the spool failed again.");
            }
            sleep(backoff(failures)).await;
            failures += 1;
        }
    }

    async fn attempt(&mut self) -> Result<(), LaneError> {
        let shared = self.shared.clone();
        let (route, pass, _turn) = loop {
            // An error here is the lane's end, and with it ours.
            let _ = shared.state.clone().wait_for(|state| state.is_up()).await;
            let route = self.route().await;
            // It is never closed.
            let turn = shared.drains.acquire().await;
            match shared.breaker.admit(&self.topic) {
                Ok(pass) => break (route, pass, turn),
                Err(open) => {
                    drop(turn);
                    sleep_until(open.again_at).await;
                }
            }
        };
        let mut progress = Progress { pass: Some(pass), through: None, count: 0 };
        let mut under_way = VecDeque::new();
        let mut drained = self.drain(&route, &mut progress, &mut under_way).await;
        if let Err(error) = &drained {
            shared.breaker.heard(&self.topic, progress.pass.unwrap_or(pass), Err(error));
            // What went behind it may have arrived all the same.
            for Under { spooled, receipt, .. } in under_way {
                if let Some(receipt) = receipt
                    && receipt.await.is_ok()
                {
                    self.stored.extend(spooled.message.id);
                }
            }
        }
        let removed = self.remove(&mut progress).await;
        if drained.is_ok() {
            drained = removed;
        }
        drained
    }

    /// The route in force, which has to be a durable one.
    async fn route(&self) -> Arc<Route> {
        let mut changes = self.shared.policy.changes();
        loop {
            let table = self.shared.policy.table();
            match table.route_for(&self.topic).filter(|route| route.lane.takes(Lane::Durable)) {
                Some(route) => return route.clone(),
                None => warn!(
                    topic = %self.topic,
                    "No durable route holds this topic any more: its spooled messages stay until one does."
                ),
            }
            if changes.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    async fn drain(
        &mut self,
        route: &Arc<Route>,
        progress: &mut Progress,
        under_way: &mut VecDeque<Under>,
    ) -> Result<(), LaneError> {
        if self.is_suspect {
            self.find_stored(route).await?;
            self.is_suspect = false;
        }
        let shared = self.shared.clone();
        let newest = shared.spool.newest_of(&self.topic);
        let mut spooled = shared.spool.read(route, &self.topic).await?;
        while let Some(batch) = spooled.next().await? {
            for record in batch {
                let envelope = match record {
                    Ok(envelope) => envelope,
                    Err(error) => {
                        error!(topic = %self.topic, %error, "A record of the spool is damaged; its message is lost.");
                        continue;
                    }
                };
                // The first is the probe.
                while under_way.len() >= if self.moves.load(Ordering::Relaxed) { WINDOW } else { 1 } {
                    self.confirm_next(route, progress, under_way).await?;
                }
                let Some(place) = envelope.stored.as_ref().map(|stored| stored.place) else { continue };
                let spooled = Spooled::open(&envelope);
                let receipt = match spooled.message.id.is_some_and(|id| self.stored.contains(&id)) {
                    true => None,
                    false => Some(self.send(route, spooled.message.clone(), spooled.publisher).await),
                };
                under_way.push_back(Under { place, spooled, receipt });
            }
        }
        while !under_way.is_empty() {
            self.confirm_next(route, progress, under_way).await?;
        }
        // A damaged record at the end is behind every other.
        progress.through = progress.through.max(newest);
        Ok(())
    }

    /// A failure to find a place in line is told by the receipt. What was to be live first comes from storage, late: it is
    /// not live any more, and what the lane says of it has to be told apart.
    async fn send(&self, route: &Arc<Route>, message: Message, publisher: Publisher) -> Receipt {
        let Shared { lane, both, .. } = &*self.shared;
        let append = async {
            match route.is_live_first() {
                true => lane.append(route, &self.topic, message, publisher).await,
                false => both.append(route, &self.topic, message, publisher).await,
            }
        };
        match self.shared.while_up(append).await {
            Ok(receipt) => receipt,
            Err(error) => Receipt::of(std::future::ready(Err(error))),
        }
    }

    /// Waits for the oldest that is under way.
    async fn confirm_next(
        &mut self,
        route: &Arc<Route>,
        progress: &mut Progress,
        under_way: &mut VecDeque<Under>,
    ) -> Result<(), LaneError> {
        let Some(Under { place, spooled, receipt }) = under_way.pop_front() else { return Ok(()) };
        match receipt {
            None => {}
            Some(receipt) => match receipt.await {
                Ok(_) => {
                    self.moves.store(true, Ordering::Relaxed);
                    if let Some(pass) = progress.pass.take() {
                        self.shared.breaker.heard(&self.topic, pass, Ok(()));
                    }
                    self.shared.metrics.drained();
                }
                Err(error) if is_passing(&error) => return Err(error),
                Err(error) => self.refused(route, spooled, error).await?,
            },
        }
        progress.through = Some(place);
        progress.count += 1;
        if progress.count >= WINDOW { self.remove(progress).await } else { Ok(()) }
    }

    async fn remove(&self, progress: &mut Progress) -> Result<(), LaneError> {
        let Some(through) = progress.through.take() else { return Ok(()) };
        progress.count = 0;
        self.shared.spool.remove(&self.topic, through).await
    }

    /// Reads which of those that may have been sent before are in storage.
    async fn find_stored(&mut self, route: &Arc<Route>) -> Result<(), LaneError> {
        let mut suspects = HashSet::new();
        let mut oldest: Option<Timestamp> = None;
        let mut spooled = self.shared.spool.read(route, &self.topic).await?;
        let mut number = 0;
        'spooled: while let Some(batch) = spooled.next().await? {
            for envelope in batch.into_iter().flatten() {
                let Spooled { message, sent, .. } = Spooled::open(&envelope);
                if number >= SUSPECTS && !sent {
                    break 'spooled;
                }
                number += 1;
                suspects.extend(message.id);
                oldest = [oldest, Some(message.ts)].into_iter().flatten().min();
            }
        }
        let Some(oldest) = oldest else { return Ok(()) };
        let since = Start::Time(oldest.before(CLOCKS));
        let shared = self.shared.clone();
        let reading = async {
            let mut stored = shared.lane.read(route, &self.topic, since).await?;
            loop {
                let next = timeout(shared.timeout, stored.next()).await;
                let next = next.map_err(|_| LaneError::Timeout(self.topic.clone()))??;
                let Some(batch) = next else { return Ok(()) };
                let ids = batch.into_iter().flatten().filter_map(|envelope| envelope.message.id);
                self.stored.extend(ids.filter(|id| suspects.contains(id)));
            }
        };
        shared.while_up(reading).await?;
        info!(
            topic = %self.topic, suspects = suspects.len(), stored = self.stored.len(),
            "Looked in storage for messages that may have been sent before."
        );
        Ok(())
    }

    /// What will never be taken.
    async fn refused(&self, route: &Arc<Route>, spooled: Spooled, why: LaneError) -> Result<(), LaneError> {
        match self.dead_letter(route, &spooled, &why).await {
            Ok(true) => {
                self.shared.metrics.dead_lettered(&route.name);
                warn!(topic = %self.topic, %why, "A spooled message was refused; it is with the dead letters.");
                return Ok(());
            }
            Ok(false) => {}
            Err(error) if is_passing(&error) => return Err(error),
            Err(error) => warn!(topic = %self.topic, %error, "A dead letter was refused."),
        }
        self.shared.spool.set_aside(&self.topic, spooled, &why).await?;
        error!(topic = %self.topic, %why, "A spooled message was refused; it is kept aside in the spool.");
        Ok(())
    }

    /// Stores it where its route's dead letters go. `false`: it has none.
    async fn dead_letter(
        &self,
        route: &Arc<Route>,
        spooled: &Spooled,
        why: &LaneError,
    ) -> Result<bool, LaneError> {
        let Some(dead_letter) = &route.redelivery.dead_letter else { return Ok(false) };
        let (route, topic) = place_of_letters(&self.shared.policy, dead_letter, &self.topic)?;
        let mut message = spooled.message.clone();
        let origin =
            [("topic", self.topic.to_string()), ("reason", why.to_string()), ("ts", message.ts.to_string())];
        message.headers.extend(origin.map(|(name, value)| (format!("{ORIGIN}{name}"), value)));
        message.ts = Timestamp::now();
        message.deliver_at = None;
        let lane = &self.shared.lane;
        let storing = lane.append(&route, &topic, message, Publisher::default());
        self.shared.while_up(storing).await?.await?;
        self.shared.catalog.published(&topic);
        Ok(true)
    }
}

/// Whether it may be taken later: the lane's own trouble, or a topic that has no room now.
fn is_passing(error: &LaneError) -> bool {
    is_outage(error) || matches!(error, LaneError::StorageFull(_))
}
