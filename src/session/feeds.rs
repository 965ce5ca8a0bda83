//! What this connection gets from the durable lane.
//!
//! ```text
//! live:   topic ──one feed, however many subscriptions of this connection match──▶ outbox
//! replay: topic ──a way of its own for the subscription that asked──▶ outbox, then it joins the live feed
//! group:  topic ──a member of the group──▶ outbox, each delivery with a number
//! ```
//! What no filter lets through is left out: of a live feed what none of its subscriptions wants, of a replay what this one
//! does not want; a group's is acknowledged.
//! Every feed waits for room in the outbox: a slow client is behind, and nothing is lost to it.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::deliveries::Membership;
use super::outbox::{Item, SubscriptionNo};
use super::shared::Shared;
use super::subscription::Subscription;
use crate::bridge::delivery::GroupMember;
use crate::bridge::fault;
use crate::bridge::filters::Filters;
use crate::filter::Filter;
use crate::lane::contract::{LaneError, Tag};
use crate::lane::follow::{Follow, Step};
use crate::message::{Envelope, Lane, Position, Start};
use crate::policy::table::Route;
use crate::topic::Topic;
use crate::wire::code::{Code, Fault};
use crate::wire::verbs::{Delivery, Event, GapReason, Group};

const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// The live feeds of one connection.
#[derive(Default)]
pub struct Feeds(Mutex<HashMap<Topic, Live>>);

struct Live {
    /// With what each of them wants; `None`: everything.
    subscriptions: HashMap<SubscriptionNo, Option<Arc<Filter>>>,
    /// The last place that the feed left out, because none of them wanted what stands there.
    left_out: Option<Position>,
    stop: CancellationToken,
}

/// What a subscription does that is up to the live events of a topic.
enum Share {
    /// The feed is this one's to run, under the token.
    Runs(CancellationToken),
    /// The feed brings, or has brought, all that this one has yet to see.
    Shares,
    /// The feed is ahead, and has left out something that this one has not seen.
    Behind,
}

impl Feeds {
    /// The share of a subscription that has seen everything up to `at`.
    fn join(&self, topic: &Topic, subscription: &Subscription, at: Option<&Position>) -> Share {
        let mut feeds = self.lock();
        if subscription.stop.is_cancelled() {
            return Share::Shares;
        }
        if let Some(live) = feeds.get_mut(topic) {
            return if live.takes_in(subscription, at) { Share::Shares } else { Share::Behind };
        }
        let filter = subscription.filter.clone();
        let stop = CancellationToken::new();
        let subscriptions = HashMap::from([(subscription.no, filter)]);
        feeds.insert(topic.clone(), Live { subscriptions, left_out: None, stop: stop.clone() });
        Share::Runs(stop)
    }

    /// The same while something is at hand that is yet to be seen: a feed that this one would have to run does not
    /// bring that.
    fn shares(&self, topic: &Topic, subscription: &Subscription, at: Option<&Position>) -> bool {
        let mut feeds = self.lock();
        subscription.stop.is_cancelled()
            || feeds.get_mut(topic).is_some_and(|live| live.takes_in(subscription, at))
    }

    /// Whether a subscription to the topic's live feed wants the event. Where none does, the feed leaves it out.
    fn passes(&self, envelope: &Arc<Envelope>, filters: &Filters) -> bool {
        let mut feeds = self.lock();
        // Without its subscriptions the feed is about to end.
        let Some(live) = feeds.get_mut(&envelope.topic) else { return true };
        let passes = live.passes(envelope, filters);
        if !passes {
            live.left_out = envelope.stored.as_ref().map(|stored| stored.position.clone());
        }
        passes
    }

    /// Whether the topic's live feed brings the event, or has brought it.
    fn is_brought(&self, envelope: &Arc<Envelope>, filters: &Filters) -> bool {
        self.lock().get(&envelope.topic).is_some_and(|live| live.passes(envelope, filters))
    }

    /// Ends the feeds that only this subscription wanted.
    pub fn leave(&self, subscription: SubscriptionNo) {
        self.lock().retain(|_, live| {
            live.subscriptions.remove(&subscription);
            if live.subscriptions.is_empty() {
                live.stop.cancel();
            }
            !live.subscriptions.is_empty()
        });
    }

    fn remove(&self, topic: &Topic, stop: &CancellationToken) {
        if !stop.is_cancelled() {
            self.lock().remove(topic);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Topic, Live>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Live {
    fn takes_in(&mut self, subscription: &Subscription, at: Option<&Position>) -> bool {
        let has_seen = |left_out: &Position| at.is_some_and(|at| left_out.is_within(at));
        let takes = self.left_out.as_ref().is_none_or(has_seen);
        if takes {
            self.subscriptions.insert(subscription.no, subscription.filter.clone());
        }
        takes
    }

    fn passes(&self, envelope: &Arc<Envelope>, filters: &Filters) -> bool {
        let wanted = |filter: &Option<Arc<Filter>>| {
            filter.as_ref().is_none_or(|filter| filters.matches(filter, envelope))
        };
        self.subscriptions.values().any(Option::is_none) || self.subscriptions.values().any(wanted)
    }
}

/// Runs one topic's way for a plain subscription: its replay, then its share of the live feed.
pub async fn follow(subscription: Arc<Subscription>, mut follow: Follow) {
    let topic = follow.topic().clone();
    if follow.is_replaying() {
        let replay = carry(&subscription.session, &mut follow, Some(&subscription));
        let Some(caught_up) = subscription.stop.run_until_cancelled(replay).await else { return };
        subscription.replay_ended();
        if !caught_up {
            return;
        }
    }
    let session = subscription.session.clone();
    let stop = match session.feeds.join(&topic, &subscription, follow.reached()) {
        Share::Runs(stop) => stop,
        Share::Shares => return,
        Share::Behind => {
            let caught_up = subscription.stop.run_until_cancelled(catch_up(&subscription, &mut follow)).await;
            let Some(Some(stop)) = caught_up else { return };
            stop
        }
    };
    drop(subscription);
    if stop.run_until_cancelled(carry(&session, &mut follow, None)).await.is_some() {
        session.feeds.remove(&topic, &stop);
    }
}

/// Goes beside a live feed that is ahead and has left out what others do not want, and brings what this one wants of
/// that. Ends where it has seen all that the feed left out, and so can share it; with a token where it has to run it.
async fn catch_up(subscription: &Arc<Subscription>, follow: &mut Follow) -> Option<CancellationToken> {
    let session = &subscription.session;
    let (topic, filters) = (follow.topic().clone(), &session.bridge.filters);
    let mut at = follow.reached().cloned();
    loop {
        let events = match follow.next().await {
            Ok(Step::Events { events, .. }) => events,
            // Of these the feed tells.
            Ok(Step::Missed | Step::CaughtUp) => continue,
            Err(error) => {
                session.outbox.push(Event::Error { request_id: None, fault: ended(&topic, error) });
                return None;
            }
        };
        for envelope in events.into_iter().flatten() {
            if session.feeds.shares(&topic, subscription, at.as_ref()) {
                return None;
            }
            at = envelope.stored.as_ref().map(|stored| stored.position.clone());
            if subscription.wants(&envelope) && !session.feeds.is_brought(&envelope, filters) {
                let item =
                    Item { event: Event::Live(envelope), route: Some(follow.route().clone()), settle: None };
                session.outbox.push_durable(item).await;
            }
        }
        match session.feeds.join(&topic, subscription, at.as_ref()) {
            Share::Runs(stop) => return Some(stop),
            Share::Shares => return None,
            Share::Behind => {}
        }
    }
}

/// Carries to the outbox: a replay to its end (`true`), the live events as long as there are any.
async fn carry(session: &Shared, follow: &mut Follow, replay: Option<&Subscription>) -> bool {
    loop {
        match follow.next().await {
            Ok(Step::Events { events, replayed }) => {
                for event in events {
                    let is_wanted = match (&event, replay) {
                        (Ok(envelope), Some(subscription)) => subscription.wants(envelope),
                        (Ok(envelope), None) => session.feeds.passes(envelope, &session.bridge.filters),
                        (Err(_), _) => true,
                    };
                    if !is_wanted {
                        continue;
                    }
                    let event = match (event, replay) {
                        (Ok(envelope), Some(subscription)) if replayed => {
                            Event::Replayed { envelope, subscription: subscription.pattern.clone() }
                        }
                        (Ok(envelope), _) => Event::Live(envelope),
                        (Err(error), _) => Event::Error { request_id: None, fault: fault(error) },
                    };
                    let item = Item { event, route: Some(follow.route().clone()), settle: None };
                    session.outbox.push_durable(item).await;
                }
            }
            Ok(Step::Missed) => {
                let topic = follow.topic().clone().into();
                let event = Event::Gap { topic, dropped: None, reason: GapReason::Retention };
                let item = Item { event, route: Some(follow.route().clone()), settle: None };
                session.outbox.push_durable(item).await;
            }
            Ok(Step::CaughtUp) => return true,
            Err(error) => {
                session.outbox.push(Event::Error { request_id: None, fault: ended(follow.topic(), error) });
                return false;
            }
        }
    }
}

fn ended(topic: &Topic, error: LaneError) -> Fault {
    let fault = fault(error);
    Fault::new(fault.code, format!("following `{topic}` has ended: {}", fault.message))
}

/// Finds the topics of a pattern that appear after the subscription, each from its first message on.
pub async fn discover(
    subscription: Arc<Subscription>,
    mut known: BTreeSet<Topic>,
    mut found: watch::Receiver<BTreeSet<Topic>>,
) {
    let session = subscription.session.clone();
    let stop = subscription.stop.clone();
    let look = async {
        loop {
            let new: Vec<Topic> = found
                .borrow_and_update()
                .iter()
                .filter(|topic| subscription.pattern.matches(topic) && !known.contains(*topic))
                .cloned()
                .collect();
            let mut again = false;
            for topic in new {
                let is_durable = |route: &Arc<Route>| route.lane == Lane::Durable;
                if !session.bridge.policy.table().route_for(&topic).is_some_and(is_durable) {
                    continue;
                }
                match start(&subscription, &topic, Start::Earliest).await {
                    Ok(()) => {
                        known.insert(topic);
                    }
                    Err(fault) => {
                        debug!(%topic, %fault, "A topic that appeared cannot be followed yet; trying again.");
                        again = true;
                    }
                }
            }
            if again {
                tokio::time::sleep(RETRY_FIRST * 10).await;
            } else if found.changed().await.is_err() {
                return;
            }
        }
    };
    stop.run_until_cancelled(look).await;
}

/// Starts the feed of a topic that appeared: nothing of it was asked for as a replay.
async fn start(subscription: &Arc<Subscription>, topic: &Topic, from: Start) -> Result<(), Fault> {
    let session = &subscription.session;
    match &subscription.group {
        None => {
            let mut way = session.bridge.follow(topic, from).await?;
            way.replay_as_live();
            session.spawn(follow(subscription.clone(), way));
        }
        Some(group) => {
            let (route, member) = session.bridge.join(topic, group, from).await?;
            session.spawn(take_part(subscription.clone(), group.clone(), topic.clone(), route, member));
        }
    }
    Ok(())
}

/// Runs one topic's membership of a group. It ends with the subscription, or with an error that joining again would
/// not cure, which the client is told.
pub async fn take_part(
    subscription: Arc<Subscription>,
    group: Group,
    topic: Topic,
    mut route: Arc<Route>,
    member: GroupMember,
) {
    let session = subscription.session.clone();
    let name: Arc<str> = group.name.as_str().into();
    let seat = |member: GroupMember| Membership {
        subscription: subscription.no,
        number: session.next_number(),
        member: Arc::new(member),
    };
    let mut place = Some(seat(member));
    // Ends what is done for the membership, so that nothing keeps it.
    let mut membership = subscription.stop.child_token();
    let mut retry = RETRY_FIRST;
    let stop = subscription.stop.clone();
    let taking = async {
        while let Some(taken) = &place {
            match taken.member.next().await {
                Ok(handed) => {
                    retry = RETRY_FIRST;
                    let ack_timeout = taken.member.ack_timeout();
                    let unwanted =
                        handed.iter().flatten().filter(|handed| !subscription.wants(&handed.envelope));
                    let unwanted: Vec<_> = unwanted.map(|handed| handed.tag).collect();
                    if !unwanted.is_empty() {
                        session.spawn(leave_out(taken.member.clone(), unwanted, membership.clone()));
                    }
                    for handed in handed {
                        let mut number = None;
                        let item = match handed {
                            Ok(handed) if !subscription.wants(&handed.envelope) => continue,
                            Ok(handed) => {
                                if handed.attempt > 1 {
                                    session.bridge.metrics.redelivered(&route.name);
                                }
                                let held = session.deliveries.hold(taken, handed.tag, handed.attempt);
                                number = Some(held);
                                let delivery = Some(Delivery { number: held, attempt: handed.attempt });
                                let group_name = name.clone();
                                Item {
                                    event: Event::Delivered {
                                        envelope: handed.envelope,
                                        group: group_name,
                                        delivery,
                                    },
                                    route: Some(route.clone()),
                                    settle: group.auto_ack.then_some(held),
                                }
                            }
                            Err(error) => Event::Error { request_id: None, fault: fault(error) }.into(),
                        };
                        session.outbox.push_durable(item).await;
                        // From here on the client could have it: what waits for room is not held against it.
                        if let Some((number, timeout)) = number.zip(ack_timeout)
                            && session.deliveries.hold_no_longer_than(number, timeout)
                        {
                            session.spawn(expire(session.clone()));
                        }
                    }
                }
                Err(error) => {
                    warn!(%topic, group = %group.name, %error, "A group membership broke off.");
                    session.deliveries.forget(taken);
                    membership.cancel();
                    // An exclusive group would be busy with the member that was.
                    place = None;
                    let mut fault = fault(error);
                    while is_passing(&fault) {
                        tokio::time::sleep(retry.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                        retry = (retry * 2).min(RETRY_LAST);
                        match session.bridge.join(&topic, &group, Start::Latest).await {
                            Ok((new_route, new_member)) => {
                                (route, place) = (new_route, Some(seat(new_member)));
                                membership = subscription.stop.child_token();
                                break;
                            }
                            Err(again) => fault = again,
                        }
                    }
                    if place.is_none() {
                        let why = format!("group `{name}` of `{topic}` is over here: {}", fault.message);
                        let fault = Fault::new(fault.code, why);
                        session.outbox.push(Event::Error { request_id: None, fault });
                    }
                }
            }
        }
    };
    stop.run_until_cancelled(taking).await;
    // A delivery that was numbered while the subscription ended would else keep the membership.
    if let Some(taken) = &place {
        session.deliveries.forget(taken);
    }
}

/// Whether joining again may help: everything but what the broker or the group will go on refusing.
fn is_passing(fault: &Fault) -> bool {
    !matches!(fault.code, Code::BadRequest | Code::Forbidden | Code::GroupBusy)
}

/// Runs the timer of this connection's deliveries, as long as it is open.
async fn expire(session: Arc<Shared>) {
    tokio::select! {
        () = session.deliveries.expire() => {}
        () = session.outbox.closed() => {}
    }
}

/// Acknowledges what the member does not want. Meanwhile it counts as held, so there are never more of these than
/// `prefetch`; what cannot be acknowledged before the membership ends comes again, and is left out again.
async fn leave_out(member: Arc<GroupMember>, tags: Vec<Tag>, membership: CancellationToken) {
    let acknowledge = async {
        let mut retry = RETRY_FIRST;
        while let Err(error) = member.ack(tags.clone()).await {
            debug!(%error, "What a filter left out could not be acknowledged; trying again.");
            tokio::time::sleep(retry.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
            retry = (retry * 2).min(RETRY_LAST);
        }
    };
    membership.run_until_cancelled(acknowledge).await;
}
