//! What this connection gets from the durable lane.
//!
//! ```text
//! live:   topic ──one feed, however many subscriptions of this connection match──▶ outbox
//! replay: topic ──a way of its own for the subscription that asked──▶ outbox, until it meets the live feed
//! group:  topic ──a member of the group──▶ outbox, each delivery with a number
//! ```
//! A feed goes along its topic once and never back: it brings what one of its members wants and leaves out the rest. So
//! live events come once and in order, and who joins has to come to where the feed is:
//!
//! - A subscription to what comes next joins with its ack, and begins there.
//! - A replay goes on in its subscription's name until it has seen as much as the feed, which waits for the last of it.
//! - Of a topic that is sent live before it is stored, a feed hears both halves (`merge`), and says every second up to
//!   where storage has passed it. A replay comes from storage alone until it has seen what the feed is ahead of storage.
//! - A topic that appears gets its feed with all the subscriptions that match, before another one opens the topic.
//!
//! Every feed waits for room in the outbox: a slow client is behind, and nothing is lost to it.
//! What a group member's filter does not let through is acknowledged.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, warn};

use super::deliveries::Membership;
use super::live::{self, LiveHalf};
use super::merge::Merge;
use super::outbox::{Item, SubscriptionNo};
use super::shared::Shared;
use super::subscription::Subscription;
use crate::bridge::delivery::GroupMember;
use crate::bridge::fault;
use crate::bridge::filters::Filters;
use crate::filter::Filter;
use crate::lane::contract::{LaneError, Tag};
use crate::lane::follow::{Follow, Step};
use crate::lane::recent::Recent;
use crate::message::{Envelope, Lane, Position, Start};
use crate::policy::table::Route;
use crate::topic::{Pattern, Topic};
use crate::wire::code::{Code, Fault};
use crate::wire::verbs::{Delivery, Event, GapReason, Group};

/// How often a feed of a topic that is sent live first says up to where everything was delivered.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(5);

/// The live feeds of one connection.
#[derive(Default)]
pub struct Feeds {
    by_topic: Mutex<ByTopic>,
    /// Held while a subscription is opened, and while a topic that appeared is: each knows what the other has found.
    pub opening: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Default)]
pub struct ByTopic {
    feeds: HashMap<Topic, Feed>,
    /// How many there ever were.
    count: u64,
    /// Replays under way, and how far the feeds came that have ended meanwhile: nobody takes their place further back.
    replays: usize,
    ended: HashMap<Topic, Position>,
}

/// A replay is under way until this is dropped.
struct Replaying(Arc<Shared>);

impl Replaying {
    fn begin(session: Arc<Shared>) -> Self {
        session.feeds.lock().replays += 1;
        Self(session)
    }
}

impl Drop for Replaying {
    fn drop(&mut self) {
        let mut feeds = self.0.feeds.lock();
        feeds.replays -= 1;
        if feeds.replays == 0 {
            feeds.ended.clear();
        }
    }
}

struct Feed {
    no: u64,
    members: HashMap<SubscriptionNo, Member>,
    /// What stands up to here was brought or left out, and does not come again.
    reached: Option<Position>,
    /// Held by replays that have only to come up to the feed. It waits for them.
    holds: Vec<CancellationToken>,
    /// Where the topic has a live half.
    merge: Option<Merge>,
    stop: CancellationToken,
}

struct Member {
    /// What it wants; `None`: everything.
    filter: Option<Arc<Filter>>,
    /// Where it wants it from; `None`: from wherever the feed is.
    after: Option<Position>,
    /// What it had from storage while the feed was ahead of that, or behind.
    had: Recent,
}

/// What a feed lets through, and what that lets through behind it.
#[derive(Default)]
struct Passed {
    first: Option<Event>,
    behind: Vec<Event>,
}

impl Passed {
    fn events(self) -> impl Iterator<Item = Event> {
        self.first.into_iter().chain(self.behind)
    }
}

/// A feed that somebody has to run until it is stopped.
pub struct Run {
    no: u64,
    way: Follow,
    stop: CancellationToken,
}

impl Feeds {
    pub fn lock(&self) -> MutexGuard<'_, ByTopic> {
        self.by_topic.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the feed take its next step, once no replay holds it. What no member wants is left out, for good.
    async fn step(&self, no: u64, topic: &Topic, mut step: impl FnMut(&mut Feed) -> Passed) -> Passed {
        loop {
            let hold = {
                let mut feeds = self.lock();
                // Another may have taken the place of one that was stopped.
                let Some(feed) = feeds.feeds.get_mut(topic).filter(|feed| feed.no == no) else {
                    return Passed::default();
                };
                feed.holds.retain(|hold| !hold.is_cancelled());
                match feed.holds.first() {
                    None => return step(feed),
                    Some(hold) => hold.clone(),
                }
            };
            hold.cancelled().await;
        }
    }

    /// The feed of the topic waits for as long as this is held.
    fn hold(&self, topic: &Topic) -> Option<DropGuard> {
        let hold = CancellationToken::new();
        self.lock().feeds.get_mut(topic)?.holds.push(hold.clone());
        Some(hold.drop_guard())
    }

    /// A topic has appeared: whoever matches and did not know it has its feed from the first message on.
    fn found(&self, session: &Shared, way: Follow) -> Option<Run> {
        let mut feeds = self.lock();
        let plain = session.plain();
        let new = plain.iter().filter(|other| other.awaits(way.topic()));
        let members = new.map(|new| {
            new.known().insert(way.topic().clone());
            (new.no, Member { filter: new.filter.clone(), after: None, had: Recent::default() })
        });
        let members: HashMap<_, _> = members.collect();
        if members.is_empty() { None } else { feeds.join(members, way) }
    }

    fn remove(&self, no: u64, topic: &Topic) {
        let mut feeds = self.lock();
        if feeds.feeds.get(topic).is_some_and(|feed| feed.no == no) {
            feeds.feeds.remove(topic);
        }
    }
}

impl ByTopic {
    /// The subscription hears what comes behind its way, which is to be run where there is no feed yet.
    pub fn enter(&mut self, subscription: &Subscription, mut way: Follow) -> Option<Run> {
        let had = if self.feeds.contains_key(way.topic()) { way.take_recent() } else { Recent::default() };
        let member = Member { filter: subscription.filter.clone(), after: way.reached().cloned(), had };
        self.join(HashMap::from([(subscription.no, member)]), way)
    }

    fn join(&mut self, members: HashMap<SubscriptionNo, Member>, mut way: Follow) -> Option<Run> {
        if let Some(feed) = self.feeds.get_mut(way.topic()) {
            feed.members.extend(members);
            return None;
        }
        self.count += 1;
        let (no, stop) = (self.count, CancellationToken::new());
        let reached = way.reached().cloned();
        let merge = way.route().is_live_first().then(|| Merge::new(way.take_recent()));
        let feed = Feed { no, members, reached, holds: Vec::new(), merge, stop: stop.clone() };
        self.feeds.insert(way.topic().clone(), feed);
        Some(Run { no, way, stop })
    }

    /// Whether nothing has been brought or left out that the way has yet to come to.
    fn is_met_by(&self, way: &Follow) -> bool {
        let is_seen = |feed: &Position| way.reached().is_some_and(|at| feed.is_within(at));
        let merge = self.feeds.get(way.topic()).and_then(|feed| feed.merge.as_ref());
        let has_had = |id| way.recent().is_some_and(|recent| recent.contains(id));
        self.reached(way.topic()).is_none_or(is_seen)
            && self.ended.get(way.topic()).is_none_or(is_seen)
            && merge.is_none_or(|merge| merge.ahead().all(has_had))
    }

    /// Where the feed of a topic is, if there is one and it has come anywhere.
    pub fn reached(&self, topic: &Topic) -> Option<&Position> {
        self.feeds.get(topic)?.reached.as_ref()
    }

    /// Ends the feeds that only this subscription wanted.
    pub fn leave(&mut self, subscription: SubscriptionNo) {
        let Self { feeds, replays, ended, .. } = self;
        feeds.retain(|topic, feed| {
            feed.members.remove(&subscription);
            if feed.members.is_empty() {
                feed.stop.cancel();
                if *replays > 0 {
                    ended.extend(feed.reached.take().map(|reached| (topic.clone(), reached)));
                }
            }
            !feed.members.is_empty()
        });
    }
}

impl Feed {
    /// Storage brings an event.
    fn stored(&mut self, envelope: &Arc<Envelope>, filters: &Filters) -> Passed {
        let Some(stored) = &envelope.stored else { return Passed::default() };
        self.reached = Some(stored.position.clone());
        let is_wanted = self.wants(envelope, filters);
        let Some(merge) = &mut self.merge else {
            return Passed { first: is_wanted.then(|| Event::Live(envelope.clone())), behind: Vec::new() };
        };
        let (is_new, released) = merge.stored(envelope, Instant::now());
        let first = (is_new && is_wanted).then(|| Event::Late(envelope.clone()));
        Passed { first, behind: self.wanted(released, filters) }
    }

    /// The live half brings one.
    fn live(&mut self, envelope: &Arc<Envelope>, filters: &Filters) -> Passed {
        let turn = self.merge.as_mut().and_then(|merge| merge.live(envelope.clone(), Instant::now()));
        Passed { first: None, behind: self.wanted(turn, filters) }
    }

    /// Nobody brings what was waited for.
    fn expire(&mut self, filters: &Filters) -> Passed {
        let released = self.merge.as_mut().map(|merge| merge.expire(Instant::now()));
        Passed { first: None, behind: self.wanted(released.unwrap_or_default(), filters) }
    }

    fn wanted(&self, envelopes: impl IntoIterator<Item = Arc<Envelope>>, filters: &Filters) -> Vec<Event> {
        let wanted = envelopes.into_iter().filter(|envelope| self.wants(envelope, filters));
        wanted.map(Event::Live).collect()
    }

    fn wants(&self, envelope: &Arc<Envelope>, filters: &Filters) -> bool {
        let is_new = |member: &&Member| match (&envelope.stored, &envelope.message.id) {
            (Some(stored), _) => {
                member.after.as_ref().is_none_or(|after| !after.covers(stored.partition, stored.place))
            }
            (None, id) => id.is_none_or(|id| !member.had.contains(&id)),
        };
        let mut due = self.members.values().filter(is_new);
        // Who wants everything needs no look at the message.
        due.clone().any(|member| member.filter.is_none())
            || due
                .any(|member| member.filter.as_ref().is_some_and(|filter| filters.matches(filter, envelope)))
    }
}

impl Run {
    /// Carries the live events of a topic to the outbox, as long as somebody wants any.
    pub async fn run(self, session: Arc<Shared>) {
        let Run { no, mut way, stop } = self;
        let topic = way.topic().clone();
        let (feeds, filters) = (&session.feeds, &session.bridge.filters);
        let half = way.route().is_live_first().then(Arc::<LiveHalf>::default);
        let (mut place, pattern) = (None, Pattern::from(topic.clone()));
        let mut checked = way.reached().cloned();
        let carry = async {
            let mut placing =
                half.clone().map(|half| Box::pin(live::listen(&session.bridge, &pattern, half)));
            let mut tick = interval(CHECKPOINT_EVERY);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                let passed = tokio::select! {
                    step = way.next() => match step {
                        Ok(Step::Events(events)) => {
                            for event in events {
                                match event {
                                    Ok(envelope) => {
                                        let step = |feed: &mut Feed| feed.stored(&envelope, filters);
                                        for event in feeds.step(no, &topic, step).await.events() {
                                            bring(&session, way.route(), event).await;
                                        }
                                    }
                                    Err(error) => {
                                        let event = Event::Error { request_id: None, fault: fault(error) };
                                        bring(&session, way.route(), event).await;
                                    }
                                }
                            }
                            continue;
                        }
                        Ok(Step::Missed) => Passed { first: Some(missed(&way)), ..Passed::default() },
                        Ok(Step::CaughtUp) => continue,
                        Err(error) => return session.outbox.push(ended(&topic, error)),
                    },
                    envelope = next_of(half.as_deref()) => {
                        feeds.step(no, &topic, |feed| feed.live(&envelope, filters)).await
                    }
                    placed = settled(&mut placing) => match placed {
                        Ok(listening) => {
                            place = Some(listening);
                            continue;
                        }
                        Err(fault) => Passed {
                            first: Some(Event::Error { request_id: None, fault }),
                            ..Passed::default()
                        },
                    },
                    _ = tick.tick(), if half.is_some() => {
                        let mut passed = feeds.step(no, &topic, |feed| feed.expire(filters)).await;
                        passed.behind.extend(checkpoint(&session, &topic, no, &mut checked));
                        passed
                    }
                };
                for event in passed.events() {
                    bring(&session, way.route(), event).await;
                }
            }
        };
        let is_over = stop.run_until_cancelled(carry).await.is_some();
        drop(place);
        if is_over {
            session.feeds.remove(no, way.topic());
        }
    }
}

/// What a feed without a live half waits for never comes.
async fn next_of(half: Option<&LiveHalf>) -> Arc<Envelope> {
    match half {
        Some(half) => half.next().await,
        None => std::future::pending().await,
    }
}

/// What a future that is there comes to, once.
async fn settled<F: Future + Unpin>(future: &mut Option<F>) -> F::Output {
    match future {
        Some(waited) => {
            let output = waited.await;
            *future = None;
            output
        }
        None => std::future::pending().await,
    }
}

/// Up to where everything was delivered, where that is further than when it was said last.
fn checkpoint(session: &Shared, topic: &Topic, no: u64, checked: &mut Option<Position>) -> Option<Event> {
    let feeds = session.feeds.lock();
    let reached = feeds.feeds.get(topic).filter(|feed| feed.no == no)?.reached.clone();
    drop(feeds);
    if *checked == reached {
        return None;
    }
    *checked = reached.clone();
    reached.map(|position| Event::Checkpoint { topic: topic.clone(), position })
}

/// Brings a subscription its replay of one topic, and in its name all that comes until it meets the live feed.
pub fn replay(subscription: Arc<Subscription>, way: Follow) -> impl Future<Output = ()> + Send + 'static {
    // From now on, and not only once it is polled.
    let replaying = Replaying::begin(subscription.session.clone());
    run_replay(subscription, way, replaying)
}

async fn run_replay(subscription: Arc<Subscription>, mut way: Follow, replaying: Replaying) {
    let session = subscription.session.clone();
    let meeting = async {
        let mut hold = None;
        loop {
            match way.next().await {
                Ok(Step::Events(events)) => {
                    for event in events {
                        let event = match event {
                            Ok(envelope) if !subscription.wants(&envelope) => continue,
                            Ok(envelope) => {
                                Event::Replayed { envelope, subscription: subscription.pattern.clone() }
                            }
                            Err(error) => Event::Error { request_id: None, fault: fault(error) },
                        };
                        bring(&session, way.route(), event).await;
                    }
                }
                Ok(Step::Missed) => bring(&session, way.route(), missed(&way)).await,
                Ok(Step::CaughtUp) => {}
                Err(error) => {
                    subscription.replay_ended();
                    session.outbox.push(ended(way.topic(), error));
                    return None;
                }
            }
            if way.is_replaying() {
                continue;
            }
            {
                let mut feeds = session.feeds.lock();
                if subscription.stop.is_cancelled() {
                    return None;
                }
                if feeds.is_met_by(&way) {
                    subscription.replay_ended();
                    return feeds.enter(&subscription, way);
                }
            }
            // Side by side they would bring everything twice, and who reads at half their speed would never see the end.
            hold = hold.or_else(|| session.feeds.hold(way.topic()));
        }
    };
    let Some(Some(run)) = subscription.stop.run_until_cancelled(meeting).await else { return };
    drop((subscription, replaying));
    run.run(session).await;
}

async fn bring(session: &Shared, route: &Arc<Route>, event: Event) {
    let item = Item { event, route: Some(route.clone()), settle: None, since: None };
    session.outbox.push_durable(item).await;
}

fn missed(way: &Follow) -> Event {
    Event::Gap { topic: way.topic().clone().into(), dropped: None, reason: GapReason::Retention }
}

fn ended(topic: &Topic, error: LaneError) -> Event {
    let fault = fault(error);
    let fault = Fault::new(fault.code, format!("following `{topic}` has ended: {}", fault.message));
    Event::Error { request_id: None, fault }
}

/// Finds the topics of a pattern that appear after the subscription, each from its first message on.
pub async fn discover(subscription: Arc<Subscription>, mut found: watch::Receiver<BTreeSet<Topic>>) {
    let session = subscription.session.clone();
    let stop = subscription.stop.clone();
    let look = async {
        loop {
            let new: Vec<Topic> = found
                .borrow_and_update()
                .iter()
                .filter(|topic| subscription.awaits(topic))
                .cloned()
                .collect();
            let mut again = false;
            for topic in new {
                let is_durable = |route: &Arc<Route>| route.lane.takes(Lane::Durable);
                if !session.bridge.policy.table().route_for(&topic).is_some_and(is_durable) {
                    continue;
                }
                if let Err(fault) = start(&subscription, &topic).await {
                    debug!(%topic, %fault, "A topic that appeared cannot be followed yet; trying again.");
                    again = true;
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

/// Follows a topic that appeared, from its first message on.
async fn start(subscription: &Arc<Subscription>, topic: &Topic) -> Result<(), Fault> {
    let session = &subscription.session;
    let Some(group) = &subscription.group else {
        let _opening = session.feeds.opening.lock().await;
        return if subscription.awaits(topic) { find(session, topic).await } else { Ok(()) };
    };
    let (route, member) = session.bridge.join(topic, group, Start::Earliest).await?;
    subscription.known().insert(topic.clone());
    session.spawn(take_part(subscription.clone(), group.clone(), topic.clone(), route, member));
    Ok(())
}

/// The same for every plain subscription that matches and does not know the topic. `opening` is held meanwhile.
pub async fn find(session: &Arc<Shared>, topic: &Topic) -> Result<(), Fault> {
    let mut way = session.bridge.follow(topic, Start::Earliest).await?;
    // Nobody asked for a replay.
    way.replay_as_live();
    if let Some(run) = session.feeds.found(session, way) {
        session.spawn(run.run(session.clone()));
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
                                handed.envelope.is_of(route.lane);
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
                                    since: None,
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
