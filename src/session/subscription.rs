//! One subscription of one client: what it hears of the ephemeral lane, and what it replays before that.
//!
//! ```text
//! lane ──hear──▶ held, while the history is on its way ──▶ outbox
//!        └─────── at once, from then on ───────────────────▶
//! ```
//! A connection whose plain subscriptions overlap gets a message once: by the one of them that has been live longest.
//! (A message in flight while that one is unsubscribed can be missed by the other; this is the at-most-once lane.)

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::CancellationToken;

use super::outbox::{Item, SubscriptionNo};
use super::shared::Shared;
use crate::filter::Filter;
use crate::lane::contract::{Ear, Listening};
use crate::message::{Envelope, Lane, Lanes};
use crate::policy::table::{Live, Route, RouteTable, Template};
use crate::topic::{Pattern, Topic};
use crate::wire::verbs::{Event, GapReason, Group, Info};

pub struct Subscription {
    pub no: SubscriptionNo,
    pub pattern: Pattern,
    pub group: Option<Group>,
    group_name: Option<Arc<str>>,
    /// Of what the pattern matches, only this is wanted.
    pub filter: Option<Arc<Filter>>,
    pub session: Arc<Shared>,
    /// Ends what runs for this subscription.
    pub stop: CancellationToken,
    /// What the routes made of the pattern when it was opened.
    pub plan: Plan,
    hold: Mutex<Hold>,
    /// The durable topics that it follows, or is about to. Of a pattern, any other is new.
    known: Mutex<BTreeSet<Topic>>,
    /// When this subscription went live, counted over the connection; 0 while it has not.
    live_since: AtomicU64,
    /// How many replays are under way.
    replays: AtomicUsize,
    listening: Mutex<Option<Listening>>,
}

#[derive(Default)]
struct Hold {
    open: bool,
    /// At most as many as the route of the last lets wait, and as heavy as the outbox may be.
    held: VecDeque<(Arc<Route>, Arc<Envelope>)>,
    bytes: usize,
    /// What did not fit; the route is that of the last.
    dropped: Option<(Arc<Route>, u64)>,
}

/// Which routes a pattern meets, as far as it matters to where its messages come from.
pub type Plan = Vec<(Pattern, Lanes, Live, Template, Template)>;

pub fn plan(table: &RouteTable, pattern: &Pattern) -> Plan {
    let part = |route: &Arc<Route>| {
        (route.pattern.clone(), route.lane, route.live, route.nats.clone(), route.pulsar.clone())
    };
    match pattern.topic() {
        Some(topic) => table.route_for(&topic).map(part).into_iter().collect(),
        None => table.overlapping(pattern).map(part).collect(),
    }
}

impl Subscription {
    pub fn new(
        no: SubscriptionNo,
        pattern: Pattern,
        group: Option<Group>,
        filter: Option<Arc<Filter>>,
        session: Arc<Shared>,
    ) -> Arc<Self> {
        let plan = plan(&session.bridge.policy.table(), &pattern);
        Arc::new(Self {
            no,
            plan,
            pattern,
            group_name: group.as_ref().map(|group| group.name.as_str().into()),
            group,
            filter,
            stop: CancellationToken::new(),
            hold: Mutex::default(),
            known: Mutex::default(),
            live_since: AtomicU64::new(0),
            replays: AtomicUsize::new(0),
            listening: Mutex::new(None),
            session,
        })
    }

    /// Whether the filter, where there is one, lets the message through.
    pub fn wants(&self, envelope: &Arc<Envelope>) -> bool {
        self.filter.as_ref().is_none_or(|filter| self.session.bridge.filters.matches(filter, envelope))
    }

    /// Whether it has yet to find the durable topic.
    pub fn awaits(&self, topic: &Topic) -> bool {
        self.pattern.topic().is_none()
            && self.takes(Lane::Durable)
            && self.pattern.matches(topic)
            && !self.known().contains(topic)
    }

    pub fn known(&self) -> MutexGuard<'_, BTreeSet<Topic>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether some topic of this subscription takes the lane.
    pub fn takes(&self, lane: Lane) -> bool {
        // A group of a topic that takes both is a durable one.
        let takes = |lanes: &Lanes| {
            lanes.takes(lane) && (lane == Lane::Durable || *lanes != Lanes::Both || self.group.is_none())
        };
        self.plan.iter().any(|(_, lanes, ..)| takes(lanes))
    }

    /// Whether it has topics that nothing is stored of.
    pub fn is_ephemeral(&self) -> bool {
        self.plan.iter().any(|(_, lanes, ..)| !lanes.takes(Lane::Durable))
    }

    /// What all its topics take, where that is the same.
    pub fn only_lanes(&self) -> Option<Lanes> {
        let mut lanes = self.plan.iter().map(|(_, lanes, ..)| *lanes);
        let first = lanes.next()?;
        lanes.all(|other| other == first).then_some(first)
    }

    /// The lanes that its topics take.
    pub fn lanes(&self) -> impl Iterator<Item = Lane> {
        Lane::ALL.into_iter().filter(|lane| self.takes(*lane))
    }

    /// Keeps the place in the lane until the subscription ends.
    pub fn keep(&self, listening: Listening) {
        let mut kept = self.listening.lock().unwrap_or_else(PoisonError::into_inner);
        // One that has ended looks for it no more.
        if !self.stop.is_cancelled() {
            *kept = Some(listening);
        }
    }

    pub fn end(&self) {
        self.stop.cancel();
        self.live_since.store(0, Ordering::Release);
        let listening = self.listening.lock().unwrap_or_else(PoisonError::into_inner).take();
        drop(listening);
    }

    /// What was held goes out, and from now on everything at once.
    pub fn open(&self) {
        let mut hold = self.lock();
        if let Some((route, dropped)) = hold.dropped.take() {
            self.session.outbox.gap(self.no, &self.pattern, &route, dropped);
        }
        for (route, envelope) in std::mem::take(&mut hold.held) {
            self.pass(&route, &envelope);
        }
        self.live_since.store(self.session.next_number(), Ordering::Release);
        hold.open = true;
    }

    /// So many replays have to end before the client is told that what comes is live.
    pub fn expect_replays(&self, count: usize) {
        self.replays.store(count, Ordering::Release);
    }

    pub fn replay_ended(&self) {
        if self.replays.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.session.outbox.push(Event::Info(Info::ReplayDone { topic: self.pattern.clone() }));
        }
    }

    /// Whether this subscription is live, was so before `other`, and brings the message as well.
    pub fn goes_before(&self, other: &Subscription, envelope: &Arc<Envelope>) -> bool {
        let since = self.live_since.load(Ordering::Acquire);
        if since == 0 || self.no == other.no || !self.pattern.matches(&envelope.topic) {
            return false;
        }
        let is_older = match other.live_since.load(Ordering::Acquire) {
            0 => true,
            theirs => since < theirs,
        };
        is_older && self.wants(envelope)
    }

    /// An event of the history.
    pub fn replayed(&self, route: &Arc<Route>, envelope: Arc<Envelope>) -> Item {
        let event = Event::Replayed { envelope, subscription: self.pattern.clone() };
        Item { event, route: Some(route.clone()), settle: None, since: None }
    }

    fn pass(&self, route: &Arc<Route>, envelope: &Arc<Envelope>) {
        if let Some(reply_to) = &envelope.reply_to {
            self.session.replies.lock().expect_reply(reply_to);
        }
        let event = match &self.group_name {
            None => Event::Live(envelope.clone()),
            Some(group) => {
                Event::Delivered { envelope: envelope.clone(), group: group.clone(), delivery: None }
            }
        };
        let item = Item { event, route: Some(route.clone()), settle: None, since: None };
        for of in self.session.outbox.push_ephemeral(self.no, &self.pattern, item) {
            self.session.bridge.metrics.dropped(Lane::Ephemeral, &of.name, "slow", 1);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Hold> {
        self.hold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ear for Subscription {
    fn hear(&self, route: &Arc<Route>, envelope: &Arc<Envelope>) {
        // Of a topic that takes both, storage brings everything but requests.
        if route.lane == Lanes::Both && envelope.reply_to.is_none() {
            return;
        }
        envelope.is_of(route.lane);
        // In a queue group as well: the message is this member's, and nobody else's, to want or not.
        if !self.wants(envelope) || self.group.is_none() && self.session.is_brought_by_another(self, envelope)
        {
            return;
        }
        if self.live_since.load(Ordering::Acquire) == 0 {
            let mut hold = self.lock();
            if !hold.open {
                hold.bytes += envelope.weight();
                hold.held.push_back((route.clone(), envelope.clone()));
                let bytes_max = self.session.outbox.bytes_max;
                while hold.held.len() > route.queue.max(1) || (hold.bytes > bytes_max && hold.held.len() > 1)
                {
                    // The oldest goes, as it would in the outbox.
                    let Some((route, oldest)) = hold.held.pop_front() else { break };
                    hold.bytes -= oldest.weight();
                    self.session.bridge.metrics.dropped(Lane::Ephemeral, &route.name, "slow", 1);
                    let before = hold.dropped.take().map_or(0, |(_, dropped)| dropped);
                    hold.dropped = Some((route, before + 1));
                }
                return;
            }
            if self.stop.is_cancelled() {
                return;
            }
        }
        self.pass(route, envelope);
    }

    fn missed(&self) {
        if !self.is_ephemeral() {
            return;
        }
        let gap = Event::Gap { topic: self.pattern.clone(), dropped: None, reason: GapReason::Outage };
        let table = self.session.bridge.policy.table();
        let route = table.overlapping(&self.pattern).find(|route| !route.lane.takes(Lane::Durable)).cloned();
        self.session.outbox.push(Item { event: gap, route, settle: None, since: None });
    }
}
