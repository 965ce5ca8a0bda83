//! What a client may say, and what is done about it.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::deliveries::{Claimed, Settlement};
use super::feeds::{ByTopic, Run, discover, find, replay, take_part};
use super::live;
use super::outbox::Item;
use super::reader::Reader;
use super::shared::Shared;
use super::subscription::{Subscription, plan};
use crate::bridge::delivery::GroupMember;
use crate::bridge::{Outcome, Published};
use crate::filter::Filter;
use crate::lane::contract::Publisher;
use crate::lane::follow::Follow;
use crate::message::{Draft, Envelope, Lane, Position, Start, Timestamp};
use crate::policy::table::Route;
use crate::topic::{Pattern, Topic};
use crate::wire::code::{Code, Fault};
use crate::wire::verbs::{Accepted, Ack, Command, Event, Group, Info, LAST_N_MAX, Subscribe};

type RequestId = Option<Arc<str>>;

/// What one turn of the reader acknowledges: each member is told once.
#[derive(Default)]
pub struct Acknowledged(Vec<Acking>);

struct Acking {
    membership: u64,
    claimed: Claimed,
    asked: Vec<RequestId>,
}

/// How many durable topics of one pattern are opened at the same time.
const OPENINGS_MAX: usize = 16;

impl Reader {
    /// Does what was asked, or sees to it that it is answered later. What waits for more than a publish does is on the
    /// heap: a future is moved whole, and every publish would move kilobytes.
    pub(super) async fn command(&mut self, request_id: RequestId, command: Command) -> Result<(), Fault> {
        match command {
            Command::Publish { topic, draft, confirm } => {
                self.publish(request_id, topic, draft, confirm).await
            }
            Command::PublishMany { topic, drafts, confirm } => {
                Box::pin(self.publish_many(request_id, topic, drafts, confirm)).await
            }
            Command::Subscribe(subscribe) => Box::pin(self.subscribe(request_id, subscribe)).await,
            Command::Unsubscribe { pattern, group } => self.unsubscribe(request_id, pattern, group),
            Command::Request { topic, draft, timeout } => {
                // The codec refuses a request that its answer could not name.
                let request_id = request_id.ok_or_else(|| Fault::bad_request("request_id is missing"))?;
                self.fits(&draft)?;
                let bridge = self.session.bridge.clone();
                self.pending.push(Box::pin(async move {
                    Some(Item::from(match bridge.request(&topic, draft, timeout).await {
                        Ok(message) => Event::Response { request_id, topic, message: message.into() },
                        Err(fault) => Event::Error { request_id: Some(request_id), fault },
                    }))
                }));
                Ok(())
            }
            Command::Reply { reply_to, draft } => {
                self.fits(&draft)?;
                let claimed = self.session.replies.lock().claim(&reply_to);
                let to = claimed.ok_or_else(|| {
                    let message = "this reply_to is not for this connection to answer: it was answered, its request \
                                   has timed out, or it never came here";
                    Fault::new(Code::Forbidden, message)
                })?;
                let bridge = self.session.bridge.clone();
                Box::pin(self.while_answering(async move { bridge.reply(&to, draft).await })).await
            }
            Command::Ack { deliveries } => {
                self.ack(request_id, &deliveries);
                Ok(())
            }
            Command::Nack { deliveries, delay } => {
                let claimed = self.session.deliveries.claim(&deliveries);
                self.settle(vec![request_id], claimed, Settlement::Nack(delay));
                Ok(())
            }
            Command::Seek { pattern, group, start } => {
                if !self.session.bridge.policy.table().reaches(&pattern, Lane::Durable) {
                    self.session.bridge.may_subscribe(&pattern)?;
                    let message =
                        format!("`{pattern}` is ephemeral: group `{group}` has no place to seek in");
                    return Err(Fault::new(Code::LaneMismatch, message));
                }
                let session = self.session.clone();
                self.pending.push(Box::pin(async move {
                    Some(match seek(&session, &pattern, &group, &start).await {
                        Ok(()) => {
                            let ack = Ack {
                                request_id,
                                topic: Some(pattern),
                                group: Some(group),
                                ts: Timestamp::now(),
                                ..Ack::default()
                            };
                            Item::from(Event::Ack(ack.into()))
                        }
                        Err(fault) => Event::Error { request_id, fault }.into(),
                    })
                }));
                Ok(())
            }
            Command::Ping => {
                self.session.outbox.push(Event::Pong { request_id });
                Ok(())
            }
        }
    }

    async fn publish(
        &mut self,
        request_id: RequestId,
        topic: Topic,
        draft: Draft,
        confirm: bool,
    ) -> Result<(), Fault> {
        self.fits(&draft)?;
        let bridge = self.session.bridge.clone();
        let (publisher, heard) = (Publisher(self.session.id), self.heard.take());
        let outcome = {
            let publishing = pin!(bridge.publish(&topic, draft, publisher, heard));
            self.while_answering(publishing).await?
        };
        let failed = request_id.clone();
        let answer = move |published: Published| {
            confirm.then(|| {
                let ack = Ack {
                    request_id,
                    status: published.status,
                    topic: Some(topic.into()),
                    lane: Some(published.lane),
                    message_id: published.id,
                    position: published.position,
                    ts: published.ts,
                    ..Ack::default()
                };
                Item::from(Event::Ack(ack.into()))
            })
        };
        match outcome {
            Outcome::Known(published) => {
                if let Some(item) = answer(published) {
                    self.session.outbox.push(item);
                }
            }
            Outcome::Later(outcome) => {
                self.pending.push(Box::pin(async move {
                    match outcome.await {
                        Ok(published) => answer(published),
                        Err(fault) => Some(Event::Error { request_id: failed, fault }.into()),
                    }
                }));
            }
        }
        Ok(())
    }

    /// Gives each message its place in line, in their order, then waits for all of them at once: so the lane can batch
    /// them. One that is refused stands in nobody's way; one that the lane cannot take now ends the list, because
    /// each of those behind it could wait as long as the first one did.
    async fn publish_many(
        &mut self,
        request_id: RequestId,
        topic: Topic,
        drafts: Vec<Result<Draft, Fault>>,
        confirm: bool,
    ) -> Result<(), Fault> {
        let bridge = self.session.bridge.clone();
        let lane = bridge.may_publish(&topic)?;
        let (publisher, max_message) = (Publisher(self.session.id), self.settings.max_message);
        let mut heard = self.heard.take();
        let places = async {
            let mut outcomes = Vec::with_capacity(drafts.len());
            let mut ended = None;
            for draft in drafts {
                let outcome =
                    match (draft.and_then(|draft| fits(&draft, max_message).map(|()| draft)), &ended) {
                        (Ok(draft), None) => bridge.publish(&topic, draft, publisher, heard.take()).await,
                        (Ok(_), Some(fault)) => Err(Fault::clone(fault)),
                        (Err(fault), _) => Err(fault),
                    };
                if let Err(fault) = &outcome
                    && matches!(fault.code, Code::LaneUnavailable | Code::OutcomeUnknown)
                {
                    let message = format!("not tried, a message before it failed: {}", fault.message);
                    ended.get_or_insert(Fault::new(Code::LaneUnavailable, message));
                }
                outcomes.push(outcome);
            }
            outcomes
        };
        let outcomes = self.while_answering(pin!(places)).await;
        let under_way = self.listed.under_way(outcomes.len());
        self.pending.push(Box::pin(async move {
            let results = outcomes.into_iter().map(|outcome| async {
                let published = outcome?.known().await?;
                let Published { status, id: message_id, position, ts, .. } = published;
                Ok(Accepted { status, message_id, position, ts })
            });
            let results: Vec<Result<Accepted, Fault>> = join_all(results).await;
            drop(under_way);
            (confirm || results.iter().any(Result::is_err)).then(|| {
                let results = results.into_iter().map(|result| result.map_err(Fault::shortened)).collect();
                let ack = Ack {
                    request_id,
                    topic: Some(topic.into()),
                    lane: Some(lane),
                    ts: Timestamp::now(),
                    results,
                    ..Ack::default()
                };
                Item::from(Event::Ack(ack.into()))
            })
        }));
        Ok(())
    }

    fn fits(&self, draft: &Draft) -> Result<(), Fault> {
        fits(draft, self.settings.max_message)
    }

    /// Acknowledges at the end of this turn, with what else it acknowledges to the same member.
    fn ack(&mut self, request_id: RequestId, numbers: &[u64]) {
        let mut claimed = self.session.deliveries.claim(numbers);
        let Some(membership) = claimed.only_membership() else {
            return self.settle(vec![request_id], claimed, Settlement::Ack);
        };
        match self.acknowledged.0.iter_mut().find(|acking| acking.membership == membership) {
            Some(acking) => {
                acking.claimed.found.append(&mut claimed.found);
                acking.asked.push(request_id);
            }
            None => self.acknowledged.0.push(Acking { membership, claimed, asked: vec![request_id] }),
        }
    }

    /// Sends what this turn has acknowledged.
    pub(super) fn acknowledge(&mut self) {
        for Acking { claimed, asked, .. } in std::mem::take(&mut self.acknowledged.0) {
            self.settle(asked, claimed, Settlement::Ack);
        }
    }

    /// Settles what was claimed and answers those that asked for it. A client that says goodbye meanwhile is settled
    /// with all the same: it has decided.
    fn settle(&mut self, asked: Vec<RequestId>, claimed: Claimed, settlement: Settlement) {
        let session = self.session.clone();
        let settling = tokio::spawn(async move {
            let settled = session.deliveries.settle(claimed, settlement).await;
            for request_id in asked {
                match &settled {
                    Ok(()) if request_id.is_none() => {}
                    Ok(()) => {
                        let ack = Ack { request_id, ts: Timestamp::now(), ..Ack::default() };
                        session.outbox.push(Event::Ack(ack.into()));
                    }
                    Err(fault) => session.outbox.push(Event::Error { request_id, fault: fault.clone() }),
                }
            }
        });
        let session = self.session.clone();
        self.pending.push(Box::pin(async move {
            if settling.await.is_err() {
                session.panicked();
            }
            None
        }));
    }

    async fn subscribe(&mut self, request_id: RequestId, asked: Subscribe) -> Result<(), Fault> {
        let Subscribe { pattern, mut start, client_id, group, filter } = asked;
        let key = (pattern.clone(), group.as_ref().map(|group| group.name.clone()));
        if self.subscriptions.contains_key(&key) {
            let message = format!("this connection has subscribed to `{pattern}` already; unsubscribe first");
            return Err(Fault::bad_request(message));
        }
        if self.subscriptions.len() >= self.settings.max_subscriptions {
            let message =
                format!("a connection has at most {} subscriptions", self.settings.max_subscriptions);
            return Err(Fault::new(Code::LimitExceeded, message));
        }
        self.session.bridge.may_subscribe(&pattern)?;
        let filter = match filter {
            Some(text) => Some(self.filter(text).await?),
            None => None,
        };
        let subscription =
            Subscription::new(self.session.next_number(), pattern, group, filter, self.session.clone());
        let last_n = match &mut start {
            Start::Last(n) => {
                *n = (*n).min(self.last_n_max(&subscription));
                Some(*n)
            }
            _ => None,
        };
        if matches!(start, Start::After(_)) && subscription.is_ephemeral() {
            let message = format!("`{}` is ephemeral and has no positions; use last_n", subscription.pattern);
            return Err(Fault::new(Code::LaneMismatch, message));
        }
        let feeds = self.session.feeds.opening.clone();
        let _opening = match subscription.group.is_none() && subscription.takes(Lane::Durable) {
            true => Some(self.while_answering(feeds.lock()).await),
            false => None,
        };
        // Taken before anything is opened: whoever resumes at this time misses nothing.
        let ts = Timestamp::now();
        let opening = open(subscription.clone(), start.clone());
        let mut opened = match self.while_answering(opening).await {
            Ok(opened) => opened,
            Err(fault) => {
                subscription.end();
                return Err(fault);
            }
        };
        if let Some(client_id) = client_id {
            // The first one given holds.
            let _ = self.session.client_id.set(client_id);
        }
        let group = subscription.group.as_ref();
        let durable_group = group.filter(|_| subscription.takes(Lane::Durable));
        let mut ack = Ack {
            request_id,
            topic: Some(subscription.pattern.clone()),
            lane: subscription.only_lanes(),
            ts,
            group: group.map(|group| group.name.clone()),
            mode: durable_group.map(|group| group.mode.as_str()),
            prefetch: durable_group.map(|group| group.prefetch),
            last_n,
            ..Ack::default()
        };
        let is_replay = start != Start::Latest;
        {
            // The feeds stand still: no event that is this one's comes before the ack, and none behind it is left out.
            let mut feeds = self.session.feeds.lock();
            ack.position = opened.position(&subscription, &start, ts, &feeds);
            self.session.outbox.push(Event::Ack(ack.into()));
            if !is_replay {
                opened.go_live(&subscription, &mut feeds);
            }
        }
        self.keep_subscription(key, subscription, opened, is_replay);
        Ok(())
    }

    async fn filter(&mut self, text: String) -> Result<Arc<Filter>, Fault> {
        let bridge = self.session.bridge.clone();
        let parsing = tokio::task::spawn_blocking(move || bridge.filters.get(&text));
        let parsed = self.while_answering(parsing).await;
        let parsed = parsed.map_err(|error| Fault::new(Code::Internal, format!("filter: {error}")))?;
        parsed.map_err(|error| Fault::bad_request(error.to_string()))
    }

    /// What `last_n` is cut to.
    fn last_n_max(&self, subscription: &Subscription) -> u32 {
        let table = self.session.bridge.policy.table();
        let history =
            table.overlapping(&subscription.pattern).map(|route| route.ring() as u32).max().unwrap_or(0);
        if subscription.takes(Lane::Durable) { LAST_N_MAX } else { history }
    }

    fn unsubscribe(
        &mut self,
        request_id: RequestId,
        pattern: Pattern,
        group: Option<String>,
    ) -> Result<(), Fault> {
        let Some(subscription) = self.subscriptions.remove(&(pattern.clone(), group)) else {
            return Err(Fault::bad_request(format!(
                "this connection has no such subscription to `{pattern}`"
            )));
        };
        self.drop_subscription(&subscription);
        let ack = Ack { request_id, topic: Some(pattern), ts: Timestamp::now(), ..Ack::default() };
        self.session.outbox.push(Event::Ack(ack.into()));
        Ok(())
    }

    /// From here on the subscription is there, until `drop_subscription`.
    fn keep_subscription(
        &mut self,
        key: (Pattern, Option<String>),
        subscription: Arc<Subscription>,
        opened: Opened,
        replay: bool,
    ) {
        for lane in subscription.lanes() {
            self.session.bridge.metrics.subscribed(lane);
        }
        self.session.bridge.catalog.subscribed(&subscription.pattern);
        opened.begin(&subscription, replay);
        if subscription.group.is_none() {
            self.session.plain().push(subscription.clone());
        }
        self.subscriptions.insert(key, subscription);
    }

    /// Ends a subscription that was made.
    pub(super) fn drop_subscription(&mut self, subscription: &Arc<Subscription>) {
        self.session.plain().retain(|other| other.no != subscription.no);
        subscription.end();
        self.session.feeds.lock().leave(subscription.no);
        self.session.deliveries.give_back(subscription.no);
        self.session.bridge.catalog.unsubscribed(&subscription.pattern);
        for lane in subscription.lanes() {
            self.session.bridge.metrics.unsubscribed(lane);
        }
    }

    /// The routes changed: a subscription whose topics have moved moves with them.
    pub(super) async fn follow_routes(&mut self, at: Timestamp) {
        let table = self.session.bridge.policy.table();
        let moved: Vec<_> = self
            .subscriptions
            .iter()
            .filter(|(_, subscription)| plan(&table, &subscription.pattern) != subscription.plan)
            .map(|(key, subscription)| (key.clone(), subscription.clone()))
            .collect();
        let opening = self.session.feeds.opening.clone();
        let _opening = self.while_answering(opening.lock()).await;
        let mut moving = Vec::new();
        for (key, old) in moved {
            self.subscriptions.remove(&key);
            let is_group = old.group.is_some();
            // An exclusive group would be busy with it.
            if is_group {
                self.drop_subscription(&old);
            }
            let new = Subscription::new(
                self.session.next_number(),
                old.pattern.clone(),
                old.group.clone(),
                old.filter.clone(),
                self.session.clone(),
            );
            self.session.outbox.push(Event::Info(Info::RouteChanged { topic: old.pattern.clone() }));
            // What was stored since the routes changed is not missed.
            let opening = open(new.clone(), Start::Time(at));
            let old = (!is_group).then_some(old);
            match self.while_answering(opening).await {
                Ok(opened) => moving.push((key, old, new, opened)),
                Err(fault) => {
                    new.end();
                    if let Some(old) = old {
                        self.drop_subscription(&old);
                    }
                    let message =
                        format!("the subscription to `{}` has ended: {}", new.pattern, fault.message);
                    let fault = Fault::new(fault.code, message);
                    self.session.outbox.push(Event::Error { request_id: None, fault });
                }
            }
        }
        {
            // All at once: the feeds of topics that moved end and begin again with all who want them, and those of
            // topics that stayed leave nothing out between the old and the new.
            let mut feeds = self.session.feeds.lock();
            for old in moving.iter().filter_map(|(_, old, ..)| old.as_ref()) {
                feeds.leave(old.no);
            }
            for (.., new, opened) in &mut moving {
                opened.go_live(new, &mut feeds);
            }
        }
        for (key, old, new, opened) in moving {
            if let Some(old) = old {
                self.drop_subscription(&old);
            }
            self.keep_subscription(key, new, opened, false);
        }
    }
}

fn fits(draft: &Draft, max: usize) -> Result<(), Fault> {
    let size = draft.payload.len();
    if size > max { Err(Fault::too_large(size, max)) } else { Ok(()) }
}

/// A subscription that has its place in every lane it takes, and has brought nothing yet.
struct Opened {
    history: Vec<(Arc<Route>, Arc<Envelope>)>,
    follows: Vec<Follow>,
    /// The feeds that it is the first to want.
    runs: Vec<Run>,
    members: Vec<Membership>,
}

struct Membership {
    topic: Topic,
    route: Arc<Route>,
    member: GroupMember,
}

/// `opening` is held until the subscription is kept.
async fn open(subscription: Arc<Subscription>, start: Start) -> Result<Opened, Fault> {
    let session = &subscription.session;
    let bridge = session.bridge.clone();
    let mut opened =
        Opened { history: Vec::new(), follows: Vec::new(), runs: Vec::new(), members: Vec::new() };
    if subscription.takes(Lane::Ephemeral) {
        let (last, since) = match &start {
            Start::Last(n) => (*n as usize, None),
            Start::Earliest => (usize::MAX, None),
            Start::Time(time) | Start::Resume { others_from: time, .. } => (usize::MAX, Some(*time)),
            Start::Latest | Start::After(_) => (0, None),
        };
        let group = subscription.group.as_ref().map(|group| group.name.as_str());
        let last = if group.is_some() { 0 } else { last };
        match bridge.listen(&subscription.pattern, group, last, subscription.clone()).await {
            Ok(mut listening) => {
                opened.history = std::mem::take(&mut listening.history);
                if let Some(since) = since {
                    opened.history.retain(|(_, envelope)| envelope.message.ts >= since);
                }
                subscription.keep(listening);
            }
            // Storage brings its events; requests can wait until the lane is back.
            Err(fault) if fault.code == Code::LaneUnavailable && !subscription.is_ephemeral() => {
                session.spawn(listen_later(subscription.clone()));
            }
            Err(fault) => return Err(fault),
        }
    }
    if subscription.takes(Lane::Durable) {
        let topics = match subscription.pattern.topic() {
            Some(topic) => vec![topic],
            None => bridge.durable.topics(&subscription.pattern).await.map_err(crate::bridge::fault)?,
        };
        let mut topics = BTreeSet::from_iter(topics);
        if subscription.group.is_none() {
            let table = bridge.policy.table();
            let is_durable =
                |topic: &Topic| table.route_for(topic).is_some_and(|route| route.lane.takes(Lane::Durable));
            topics.extend(session.known(&subscription.pattern).into_iter().filter(is_durable));
        }
        subscription.known().clone_from(&topics);
        match &subscription.group {
            None => {
                opened.follows = stream::iter(topics)
                    .map(|topic| {
                        let (session, start) = (session.clone(), start.for_topic(&topic));
                        async move {
                            // Else its feed would begin too late for whoever has yet to find it.
                            if session.is_awaited(&topic) {
                                find(&session, &topic).await?;
                            }
                            session.bridge.follow(&topic, start).await
                        }
                    })
                    .buffer_unordered(OPENINGS_MAX)
                    .try_collect()
                    .await?;
            }
            Some(group) => {
                opened.members = stream::iter(topics)
                    .map(|topic| join(&subscription, topic, group.clone(), &start))
                    .buffer_unordered(OPENINGS_MAX)
                    .try_collect()
                    .await?;
            }
        }
    }
    Ok(opened)
}

/// Hears the requests of topics that take both lanes, as soon as the live one can be listened to.
async fn listen_later(subscription: Arc<Subscription>) {
    let bridge = subscription.session.bridge.clone();
    let listening = live::listen(&bridge, &subscription.pattern, subscription.clone());
    match subscription.stop.run_until_cancelled(listening).await {
        Some(Ok(listening)) => subscription.keep(listening),
        Some(Err(fault)) => subscription.session.outbox.push(Event::Error { request_id: None, fault }),
        None => {}
    }
}

/// Moves a group on each topic of the pattern that has it now. What this connection held of it there is forgotten.
async fn seek(session: &Shared, pattern: &Pattern, group: &str, start: &Start) -> Result<(), Fault> {
    let bridge = &session.bridge;
    let topics = match pattern.topic() {
        Some(topic) => vec![topic],
        None => bridge.durable.topics(pattern).await.map_err(crate::bridge::fault)?,
    };
    let seeks = stream::iter(topics).map(async |topic| {
        // What comes after the group has gone elsewhere is not forgotten with what came before.
        let newest = session.deliveries.newest();
        match bridge.seek(&topic, group, start.for_topic(&topic)).await {
            Ok(()) => {
                session.deliveries.forget_group(&topic, group, newest);
                Ok(true)
            }
            Err(fault) if fault.code == Code::BadRequest && !bridge.has_group(&topic, group).await? => {
                Ok(false)
            }
            Err(fault) => Err(Fault::new(fault.code, format!("seeking in `{topic}`: {}", fault.message))),
        }
    });
    let sought: Vec<Result<bool, Fault>> = seeks.buffer_unordered(OPENINGS_MAX).collect().await;
    let moved = sought.iter().filter(|sought| matches!(sought, Ok(true))).count();
    match sought.into_iter().find_map(Result::err) {
        Some(fault) if moved > 0 => {
            let message = format!("{}; on {moved} other topics group `{group}` has moved", fault.message);
            Err(Fault::new(fault.code, message))
        }
        Some(fault) => Err(fault),
        None if moved == 0 => {
            Err(Fault::bad_request(format!("there is no group `{group}` on `{pattern}`: nothing was moved")))
        }
        None => Ok(()),
    }
}

fn join(
    subscription: &Subscription,
    topic: Topic,
    group: Group,
    start: &Start,
) -> impl Future<Output = Result<Membership, Fault>> + Send + use<> {
    let (bridge, start) = (subscription.session.bridge.clone(), start.for_topic(&topic));
    async move {
        let (route, member) = bridge.join(&topic, &group, start).await?;
        Ok(Membership { topic, route, member })
    }
}

impl Opened {
    /// What the subscription starts after, so that a client that never got an event can still resume.
    fn position(
        &self,
        subscription: &Subscription,
        start: &Start,
        ts: Timestamp,
        feeds: &ByTopic,
    ) -> Option<Position> {
        subscription.pattern.topic()?;
        let follow = self.follows.first()?;
        let since = |others_from| Position::Partitioned { reached: Arc::default(), others_from };
        Some(match start {
            Start::Earliest => since(Timestamp::from_millis(0)),
            Start::Time(time) => since(*time),
            Start::Latest => {
                let feed = feeds.reached(follow.topic()).cloned();
                Position::behind(follow.reached().cloned(), feed).unwrap_or_else(|| since(ts))
            }
            _ => follow.reached().cloned().unwrap_or_else(|| since(ts)),
        })
    }

    /// Has the live events of the durable topics come.
    fn go_live(&mut self, subscription: &Subscription, feeds: &mut ByTopic) {
        let ways = self.follows.drain(..).map(|mut way| {
            way.replay_as_live();
            way
        });
        self.runs = ways.filter_map(|way| feeds.enter(subscription, way)).collect();
    }

    /// Lets the messages come. With `is_replay` the client is told where the live ones begin.
    fn begin(self, subscription: &Arc<Subscription>, is_replay: bool) {
        let session = &subscription.session;
        if is_replay {
            let own = usize::from(subscription.takes(Lane::Ephemeral) || self.follows.is_empty());
            subscription.expect_replays(own + self.follows.len());
        }
        match (subscription.takes(Lane::Ephemeral), self.history.is_empty()) {
            (true, false) => session.spawn(replay_history(subscription.clone(), self.history, is_replay)),
            _ => {
                subscription.open();
                if is_replay && (subscription.takes(Lane::Ephemeral) || self.follows.is_empty()) {
                    subscription.replay_ended();
                }
            }
        }
        for run in self.runs {
            session.spawn(run.run(session.clone()));
        }
        for way in self.follows {
            session.spawn(replay(subscription.clone(), way));
        }
        for Membership { topic, route, member } in self.members {
            if let Some(group) = &subscription.group {
                session.spawn(take_part(subscription.clone(), group.clone(), topic, route, member));
            }
        }
        if subscription.pattern.topic().is_none() && subscription.takes(Lane::Durable) {
            session.spawn(discover(subscription.clone(), session.bridge.durable.watch_topics()));
        }
    }
}

/// Sends the history as room allows; what comes live meanwhile is held.
async fn replay_history(
    subscription: Arc<Subscription>,
    history: Vec<(Arc<Route>, Arc<Envelope>)>,
    announced: bool,
) {
    let replay = async {
        for (route, envelope) in history {
            if !subscription.wants(&envelope) {
                continue;
            }
            subscription.session.outbox.push_durable(subscription.replayed(&route, envelope)).await;
        }
    };
    if subscription.stop.run_until_cancelled(replay).await.is_some() {
        if announced {
            subscription.replay_ended();
        }
        subscription.open();
    }
}
