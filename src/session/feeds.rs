//! What this connection gets from the durable lane.
//!
//! ```text
//! live:   topic ──one feed, however many subscriptions of this connection match──▶ outbox
//! replay: topic ──a way of its own for the subscription that asked──▶ outbox, then it joins the live feed
//! group:  topic ──a member of the group──▶ outbox, each delivery with a number
//! ```
//! Every feed waits for room in the outbox: a slow client is behind, and nothing is lost to it.

use std::collections::{BTreeSet, HashMap, HashSet};
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
use crate::lane::contract::LaneError;
use crate::lane::follow::{Follow, Step};
use crate::message::{Lane, Start};
use crate::policy::table::Route;
use crate::topic::Topic;
use crate::wire::code::Fault;
use crate::wire::verbs::{Delivery, Event, GapReason, Group};

const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// The live feeds of one connection.
#[derive(Default)]
pub struct Feeds(Mutex<HashMap<Topic, Live>>);

struct Live {
    subscriptions: HashSet<SubscriptionNo>,
    stop: CancellationToken,
}

impl Feeds {
    /// The subscription's share of the topic's live feed: `None` where there is one already, else the token under
    /// which the caller has to run it.
    fn join(&self, topic: &Topic, subscription: &Subscription) -> Option<CancellationToken> {
        let mut feeds = self.lock();
        if subscription.stop.is_cancelled() {
            return None;
        }
        if let Some(live) = feeds.get_mut(topic) {
            live.subscriptions.insert(subscription.no);
            return None;
        }
        let stop = CancellationToken::new();
        let live = Live { subscriptions: HashSet::from([subscription.no]), stop: stop.clone() };
        feeds.insert(topic.clone(), live);
        Some(stop)
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
    let Some(stop) = subscription.session.feeds.join(&topic, &subscription) else { return };
    let session = subscription.session.clone();
    drop(subscription);
    if stop.run_until_cancelled(carry(&session, &mut follow, None)).await.is_some() {
        session.feeds.remove(&topic, &stop);
    }
}

/// Carries to the outbox: a replay to its end (`true`), the live events as long as there are any.
async fn carry(session: &Shared, follow: &mut Follow, replay: Option<&Subscription>) -> bool {
    loop {
        match follow.next().await {
            Ok(Step::Events { events, replayed }) => {
                for event in events {
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

/// Runs one topic's membership of a group.
pub async fn take_part(
    subscription: Arc<Subscription>,
    group: Group,
    topic: Topic,
    mut route: Arc<Route>,
    member: GroupMember,
) {
    let session = subscription.session.clone();
    let name: Arc<str> = group.name.as_str().into();
    let taken = |member: GroupMember| Membership {
        subscription: subscription.no,
        number: session.next_number(),
        member: Arc::new(member),
    };
    let mut place = taken(member);
    let mut retry = RETRY_FIRST;
    let stop = subscription.stop.clone();
    let taking = async {
        loop {
            match place.member.next().await {
                Ok(handed) => {
                    retry = RETRY_FIRST;
                    let ack_timeout = place.member.ack_timeout();
                    for handed in handed {
                        let mut number = None;
                        let item = match handed {
                            Ok(handed) => {
                                if handed.attempt > 1 {
                                    session.bridge.metrics.redelivered(&route.name);
                                }
                                let held = session.deliveries.hold(&place, handed.tag, handed.attempt);
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
                    warn!(%topic, group = %group.name, %error, "A group membership broke off; joining again.");
                    session.deliveries.forget(&place);
                    loop {
                        tokio::time::sleep(retry.mul_f64(0.5 + fastrand::f64() / 2.0)).await;
                        retry = (retry * 2).min(RETRY_LAST);
                        if let Ok((new_route, new_member)) =
                            session.bridge.join(&topic, &group, Start::Latest).await
                        {
                            (route, place) = (new_route, taken(new_member));
                            break;
                        }
                    }
                }
            }
        }
    };
    stop.run_until_cancelled(taking).await;
    // A delivery that was numbered while the subscription ended would else keep the membership.
    session.deliveries.forget(&place);
}

/// Runs the timer of this connection's deliveries, as long as it is open.
async fn expire(session: Arc<Shared>) {
    tokio::select! {
        () = session.deliveries.expire() => {}
        () = session.outbox.closed() => {}
    }
}
