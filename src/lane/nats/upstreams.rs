//! What this bridge is subscribed to, and who hears it: one subscription per physical pattern and group, however many
//! ears it has.
//!
//! ```text
//! ears of `orders.*`  ─┐                          ┌─ drain: topic? route? first sight? ─▶ ring
//! ears of `orders.*`  ─┴─▶ upstream `orders.*` ───┘        └──────── one lock ───────┘     └─▶ its ears
//! ```
//! The lock covers the rings, the places and what was seen lately, so that an ear finds each message either in its
//! history or in its hearing. Ears are called after it, by the one task of their upstream, and so in order.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tracing::warn;

use super::codec;
use super::refusals::may_not_subscribe;
use super::seen::{Seen, Tick};
use super::subjects::{self, Resolved};
use super::upstream::{Place, Upstream, Want};
use crate::lane::contract::LaneError;
use crate::lane::history::History;
use crate::lane::interest::Interest;
use crate::message::{Envelope, Lane, MessageId, ReplyTo};
use crate::policy::Policy;
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::{Pattern, Topic};

/// The label of what belongs to no route.
const NO_ROUTE: &str = "-";

pub struct Upstreams {
    policy: Policy,
    metrics: Arc<Metrics>,
    table: Mutex<Table>,
    /// How many subscriptions were asked for; held while the next one is.
    asked: tokio::sync::Mutex<u64>,
}

type Key = (String, Option<String>);

struct Table {
    /// By subject and group, with its number in `by_subject`.
    upstreams: HashMap<Key, (Arc<Upstream>, u64)>,
    /// The same by what they match, the oldest first.
    by_subject: Interest<Arc<Upstream>>,
    history: History,
    seen: Seen,
}

impl Upstreams {
    pub fn new(policy: Policy, history_bytes: usize, metrics: Arc<Metrics>) -> Self {
        let table = Table {
            upstreams: HashMap::new(),
            by_subject: Interest::default(),
            history: History::new(history_bytes),
            seen: Seen::default(),
        };
        Self { policy, metrics, table: Mutex::new(table), asked: tokio::sync::Mutex::default() }
    }

    /// Keeps a message that is about to be sent.
    pub fn keep(self: &Arc<Self>, envelope: &Arc<Envelope>, length: usize) -> Kept {
        let mut table = lock(&self.table);
        // Publishing an id again is the same message again: the first one stays, whatever becomes of the second.
        let id = envelope.message.id.filter(|id| table.seen.note(*id).is_none());
        table.history.keep(envelope, length);
        Kept { upstreams: self.clone(), topic: envelope.topic.clone(), id }
    }

    /// The upstream for `want`, made where there is none. Whoever holds it releases it.
    pub fn hold(&self, want: &Want) -> Arc<Upstream> {
        let mut table = lock(&self.table);
        let key = (want.subject.clone(), want.group.clone());
        let upstream = match table.upstreams.get(&key) {
            Some((upstream, _)) => upstream.clone(),
            None => {
                let upstream = Arc::new(Upstream::new(want));
                let number = table.by_subject.insert(&want.subject, None, upstream.clone());
                table.upstreams.insert(key, (upstream.clone(), number));
                upstream
            }
        };
        upstream.claims.fetch_add(1, Ordering::Relaxed);
        upstream.widen(want);
        upstream
    }

    pub fn release(&self, held: &Arc<Upstream>) {
        let mut table = lock(&self.table);
        if held.claims.fetch_sub(1, Ordering::Relaxed) == 1 {
            let key = (held.subject.clone(), held.group.clone());
            // Where it was refused, another may stand in its place.
            if table.upstreams.get(&key).is_some_and(|(upstream, _)| Arc::ptr_eq(upstream, held)) {
                table.remove(&key);
            }
        }
    }

    /// Places an ear, and returns what came before it, as one step.
    pub fn begin<'a>(
        &self,
        upstreams: impl Iterator<Item = (&'a Upstream, &'a Want)>,
        place: &Arc<Place>,
        pattern: &Pattern,
        last: usize,
    ) -> Vec<(Arc<Route>, Arc<Envelope>)> {
        let routes = self.policy.table();
        let mut table = lock(&self.table);
        for (upstream, want) in upstreams {
            upstream.place(want, place);
        }
        if last == 0 {
            return Vec::new();
        }
        place.begin_after(table.seen.now());
        table.history.newest(pattern, last, |topic| {
            routes.route_for(topic).filter(|route| route.lane.takes(Lane::Ephemeral)).cloned()
        })
    }

    /// Asks for a subscription, and numbers the upstream in the order in which the server is asked.
    pub async fn in_order<T>(&self, upstream: &Upstream, asking: impl Future<Output = T>) -> T {
        let mut asked = self.asked.lock().await;
        *asked += 1;
        upstream.number.store(*asked, Ordering::Relaxed);
        asking.await
    }

    /// The upstreams that may bring the same messages and were asked for earlier.
    pub fn older(&self, upstream: &Upstream) -> Vec<Arc<Upstream>> {
        let number = upstream.number.load(Ordering::Relaxed);
        let is_older = |other: &&Arc<Upstream>| (1..number).contains(&other.number.load(Ordering::Relaxed));
        let mut table = lock(&self.table);
        if subjects::is_literal(&upstream.subject) {
            return table
                .by_subject
                .find(&upstream.subject)
                .everyone
                .iter()
                .filter(is_older)
                .cloned()
                .collect();
        }
        let others = table.upstreams.values().map(|(other, _)| other);
        others
            .filter(|other| is_older(other) && subjects::overlap(&upstream.subject, &other.subject))
            .cloned()
            .collect()
    }

    /// A message came.
    pub fn arrived(&self, upstream: &Arc<Upstream>, arrived: async_nats::Message, connects: u64) {
        let table = self.policy.table();
        let templates = upstream.templates();
        let (route, topic, template) = match subjects::resolve(&table, &templates, &arrived.subject) {
            Resolved::Ours(route, topic, template) => (route, topic, template),
            Resolved::NotOurs => return,
            Resolved::Foreign => return self.metrics.dropped(Lane::Ephemeral, NO_ROUTE, "foreign", 1),
        };
        let reply = arrived.reply.clone().filter(|reply| subjects::is_literal(reply));
        let incoming = codec::decode(arrived);
        let reply_to =
            reply.map(|reply| ReplyTo { address: reply.as_str().into(), timeout: incoming.timeout });
        let envelope = Arc::new(Envelope::ephemeral(topic, incoming.message, reply_to));

        let (audience, seen) = {
            let mut table = lock(&self.table);
            let seen = table.note(upstream, &envelope, &route);
            (upstream.audience(template, &envelope.topic), seen)
        };
        audience.hear(upstream, &route, &envelope, seen, connects);
    }

    /// Some subscription overflowed, and the client library does not say which.
    pub fn overflowed(&self) {
        self.metrics.dropped(Lane::Ephemeral, NO_ROUTE, "overflow", 1);
    }

    /// Tells every ear that something is missing.
    pub fn missed(&self) {
        for place in self.places() {
            place.ear.missed();
        }
    }

    /// Tells every ear that has not heard of this connection yet.
    pub fn catch_up(&self, connects: u64) {
        for place in self.places() {
            place.catch_up(connects);
        }
    }

    fn places(&self) -> Vec<Arc<Place>> {
        lock(&self.table).upstreams.values().flat_map(|(upstream, _)| upstream.places()).collect()
    }

    pub fn refused_publish(&self, subject: &str) {
        let table = self.policy.table();
        let templates: Vec<_> = subjects::templates(&table, None);
        let label = match subjects::resolve(&table, &templates, subject) {
            Resolved::Ours(route, ..) => route.name.clone(),
            Resolved::NotOurs | Resolved::Foreign => NO_ROUTE.into(),
        };
        self.metrics.dropped(Lane::Ephemeral, &label, "forbidden", 1);
    }

    /// The server does not grant a subscription, or takes it away. Whoever waits for it is refused, and the next one
    /// who wants it asks the server again; ears that have heard it are told that something is missing.
    pub fn refused_subscription(&self, subject: &str, group: Option<&str>) {
        let refused = lock(&self.table).remove(&(subject.to_owned(), group.map(str::to_owned)));
        let Some(upstream) = refused else { return };
        upstream.refused.send_replace(Some(may_not_subscribe(subject)));
        if upstream.opened.initialized() {
            warn!(%subject, "The NATS user of this bridge may no longer subscribe: its subscribers hear nothing.");
            for place in upstream.places() {
                place.ear.missed();
            }
        }
    }

    /// The server grants no more subscriptions, and does not say which it refused: all that wait for their answer are.
    pub fn refused_subscriptions(&self, error: &LaneError) {
        let mut table = lock(&self.table);
        let waiting = table.upstreams.iter().filter(|(_, (upstream, _))| !upstream.opened.initialized());
        let waiting: Vec<_> = waiting.map(|(key, _)| key.clone()).collect();
        for upstream in waiting.iter().filter_map(|key| table.remove(key)) {
            upstream.refused.send_replace(Some(error.clone()));
        }
    }

    /// Ends all subscriptions.
    pub fn clear(&self) {
        let (upstreams, by_subject) = {
            let mut table = lock(&self.table);
            (std::mem::take(&mut table.upstreams), std::mem::take(&mut table.by_subject))
        };
        for (upstream, _) in upstreams.values() {
            if let Some(drain) = upstream.opened.get() {
                drain.task.abort();
            }
        }
        drop(by_subject);
    }
}

impl Table {
    /// At its first sight a message is put into its ring. One without an id looks new each time: there the oldest of
    /// the upstreams that match counts, one that hears everything before one that hears a group's share. (Where the
    /// oldest goes at that moment, such a message may be in the ring twice or not at all.)
    fn note(&mut self, upstream: &Arc<Upstream>, envelope: &Arc<Envelope>, route: &Route) -> Option<Tick> {
        let seen = envelope.message.id.and_then(|id| self.seen.note(id));
        let first = match envelope.message.id {
            Some(_) => seen.is_none(),
            None => {
                let matching = self.by_subject.find(&route.nats.apply(envelope.topic.as_str()));
                let whole = matching.everyone.iter().find(|upstream| upstream.group.is_none());
                whole.or(matching.everyone.first()).is_some_and(|oldest| Arc::ptr_eq(oldest, upstream))
            }
        };
        if first {
            self.history.keep(envelope, route.ring());
        }
        seen
    }

    fn remove(&mut self, key: &Key) -> Option<Arc<Upstream>> {
        let (upstream, number) = self.upstreams.remove(key)?;
        self.by_subject.remove(&upstream.subject, number);
        Some(upstream)
    }
}

/// A message in its ring that is not sent yet. Dropped before it is, it is taken back.
pub struct Kept {
    upstreams: Arc<Upstreams>,
    topic: Topic,
    id: Option<MessageId>,
}

impl Kept {
    pub fn sent(mut self) {
        self.id = None;
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(id) = self.id {
            let mut table = lock(&self.upstreams.table);
            table.history.take_back(&self.topic, id);
            table.seen.forget(id);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No ear is called under a lock, and nothing between two statements of this file leaves half a change behind.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
