//! The topics that ids are given to, and what storage says of them.
//!
//! ```text
//!              now minus the window                 now
//! storage ───────────┼───────────────────────────────┼─────────────▶
//!                    └──────────── read ─────────────┴── followed ─▶ until no id has come for a window
//!                              ▲
//!                              └ looked through again, for the ids whose outcome is unknown
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout_at};
use tokio_util::task::AbortOnDropHandle;
use tracing::warn;

use super::memory::{IDS_MAX, Kept, Key, Known, Memory, UnderWay};
use crate::lane::contract::{DurableLane, LaneError, durable_down};
use crate::lane::follow::{Follow, Step};
use crate::message::{Envelope, MessageId, Start, Timestamp};
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

/// How many topics are followed. Of more, the one that was given an id last the longest ago is forgotten: it is read again
/// when it is given another.
const TOPICS_MAX: usize = 1000;
/// A message is looked for from a little before it was accepted: clocks are set back.
const SLACK: Duration = Duration::from_secs(1);
/// How often it is logged that there are too many ids.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

pub struct Topics {
    lane: Arc<dyn DurableLane>,
    metrics: Arc<Metrics>,
    /// How long whatever has to be known first may take.
    pub timeout: Duration,
    state: Mutex<State>,
}

struct State {
    memory: Memory,
    topics: HashMap<Topic, Given>,
    topics_so_far: u32,
    complained: Option<Instant>,
}

/// A topic that ids are given to.
struct Given {
    number: u32,
    last: Instant,
    window: Duration,
    under_way: usize,
    following: Option<Following>,
    unknown: Unknown,
}

/// The ids of a topic whose outcome is unknown, numbered as they became so.
#[derive(Default)]
struct Unknown {
    /// When the oldest was accepted that was not looked for. `None`: all were.
    from: Option<Timestamp>,
    last: u64,
    looked_for: u64,
    /// Held by the one who looks for all of them.
    looking: Arc<tokio::sync::Mutex<()>>,
}

/// The task that reads a topic, and ends when this is dropped.
struct Following {
    route: Arc<Route>,
    caught_up: watch::Receiver<CaughtUp>,
    _task: AbortOnDropHandle<()>,
}

/// Once it is there: what was stored has been read, or why that cannot be.
type CaughtUp = Option<Result<(), LaneError>>;

impl Topics {
    pub fn new(lane: Arc<dyn DurableLane>, metrics: Arc<Metrics>, timeout: Duration) -> Arc<Self> {
        let memory = Memory::new(IDS_MAX);
        let state = State { memory, topics: HashMap::new(), topics_so_far: 0, complained: None };
        Arc::new(Self { lane, metrics, timeout, state: Mutex::new(state) })
    }

    /// An id is under way from now on, and its outcome is that of the receipt which is `placed`; or what is known of it
    /// already, where `Nothing` says that storage has not been read, and has to be unless it `is_unread` all the same.
    pub fn begin(
        self: &Arc<Self>,
        route: &Arc<Route>,
        topic: &Topic,
        (id, ts): (MessageId, Timestamp),
        placed: oneshot::Receiver<BoxFuture<'static, Kept>>,
        is_unread: bool,
    ) -> Result<UnderWay, Known> {
        let (now, window) = (Instant::now(), route.dedup_window);
        let mut state = self.lock();
        let State { memory, topics, topics_so_far, .. } = &mut *state;
        if !topics.contains_key(topic) {
            *topics_so_far = topics_so_far.wrapping_add(1);
            make_place(topics);
            topics.insert(topic.clone(), Given::new(*topics_so_far, now));
        }
        let Some(given) = topics.get_mut(topic) else { return Err(Known::Nothing) };
        (given.last, given.window) = (now, window);
        let key = (given.number, id);
        match memory.find(&key, now) {
            Known::Unknown(number) if number <= given.unknown.looked_for => {}
            Known::Nothing => {}
            known => return Err(known),
        }
        let following = match given.following.take().filter(|following| following.is_by(route)) {
            Some(following) => following,
            None => self.follow(route, topic, given.number),
        };
        let is_read = matches!(&*following.caught_up.borrow(), Some(Ok(())));
        given.following = Some(following);
        if !is_read && !is_unread {
            return Err(Known::Nothing);
        }
        given.under_way += 1;
        let (topics, topic) = (self.clone(), topic.clone());
        let outcome = async move {
            let kept = match placed.await {
                Ok(receipt) => receipt.await,
                Err(_) => Err(LaneError::OutcomeUnknown("the publish was given up".into())),
            };
            topics.ended(&topic, key, &kept, window, ts);
            kept
        };
        let outcome = outcome.boxed().shared();
        memory.under_way(key, outcome.clone());
        Ok(outcome)
    }

    /// Waits until the window of a topic has been read.
    pub async fn read(&self, topic: &Topic, deadline: Instant) -> Result<(), LaneError> {
        let unread = |why: &str| {
            LaneError::Unavailable(format!("what `{topic}` holds could not be searched for the id: {why}"))
        };
        let following = self
            .lock()
            .topics
            .get(topic)
            .and_then(|given| given.following.as_ref().map(|following| following.caught_up.clone()));
        let mut caught_up = following.ok_or_else(|| unread("too many topics are given ids at once"))?;
        let reading = timeout_at(deadline, caught_up.wait_for(Option::is_some));
        let mut state = self.lane.state();
        tokio::select! {
            biased;
            read = reading => match read {
                Ok(Ok(read)) => match &*read {
                    Some(Err(LaneError::Unavailable(why))) => Err(unread(why)),
                    Some(Err(LaneError::Forbidden(why))) => Err(LaneError::Forbidden(format!(
                        "what `{topic}` holds may not be searched for the id, which the route's dedup_window asks \
                         for: {why}; nothing was sent or stored"
                    ))),
                    Some(Err(error)) => Err(unread(&error.to_string())),
                    Some(Ok(())) | None => Ok(()),
                },
                Ok(Err(_)) => Err(unread("too many topics are given ids at once")),
                Err(_) => Err(unread("reading it takes longer than a publish may; it goes on")),
            },
            why = durable_down(&mut state) => Err(unread(&why)),
        }
    }

    /// Looks through storage for all ids of a topic whose outcome is unknown. What is not found is not stored.
    pub async fn look_through(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        deadline: Instant,
    ) -> Result<(), LaneError> {
        let looking = async {
            let one = self.lock().topics.get(topic).map(|given| given.unknown.looking.clone());
            let Some(one) = one else { return Ok(()) };
            let _one = one.lock().await;
            let asked = self
                .lock()
                .topics
                .get(topic)
                .and_then(|given| Some((given.number, given.unknown.last, given.unknown.from?)));
            let Some((number, last, from)) = asked else { return Ok(()) };
            // What this bridge has in line goes first: it is stored, or never will be.
            self.lane.probe().await?;
            let from = Timestamp::from_millis(from.as_millis() - SLACK.as_millis() as i64);
            let mut reader = self.lane.read(route, topic, Start::Time(from)).await?;
            while let Some(batch) = reader.next().await? {
                self.seen(number, route.dedup_window, &batch);
            }
            if let Some(given) = self.lock().topics.get_mut(topic) {
                given.unknown.looked_for = last;
                given.unknown.from = given.unknown.from.filter(|_| given.unknown.last > last);
            }
            Ok(())
        };
        let mut state = self.lane.state();
        tokio::select! {
            biased;
            looked = timeout_at(deadline, looking) => looked.unwrap_or_else(|_| {
                Err(LaneError::Unavailable(format!("`{topic}` cannot be looked through in time")))
            }),
            why = durable_down(&mut state) => Err(LaneError::Unavailable(why)),
        }
    }

    pub fn clear(&self) {
        let topics = std::mem::take(&mut self.lock().topics);
        drop(topics);
    }

    fn follow(self: &Arc<Self>, route: &Arc<Route>, topic: &Topic, number: u32) -> Following {
        let (tell, caught_up) = watch::channel(None);
        let task = tokio::spawn(self.clone().run(route.clone(), topic.clone(), number, tell));
        Following { route: route.clone(), caught_up, _task: AbortOnDropHandle::new(task) }
    }

    async fn run(
        self: Arc<Self>,
        route: Arc<Route>,
        topic: Topic,
        number: u32,
        tell: watch::Sender<CaughtUp>,
    ) {
        let window = route.dedup_window;
        let from = Timestamp::from_millis(Timestamp::now().as_millis() - window.as_millis() as i64);
        let opened = Follow::open(self.lane.clone(), route, topic.clone(), Start::Time(from)).await;
        let mut follow = match opened {
            Ok(follow) => follow,
            Err(error) => {
                tell.send_replace(Some(Err(error)));
                return;
            }
        };
        let mut until = Instant::now() + window;
        loop {
            tokio::select! {
                step = follow.next() => match step {
                    Ok(Step::Events(events)) => self.seen(number, window, &events),
                    Ok(Step::CaughtUp) => _ = tell.send_replace(Some(Ok(()))),
                    // What retention has removed is no copy of anything.
                    Ok(Step::Missed) => {}
                    Err(error) => {
                        tell.send_replace(Some(Err(error)));
                        return;
                    }
                },
                () = sleep_until(until) => match self.wanted_until(&topic, number) {
                    Some(later) => until = later,
                    None => return,
                },
            }
        }
    }

    /// These stand in storage.
    fn seen(&self, number: u32, window: Duration, events: &[Result<Arc<Envelope>, LaneError>]) {
        let now = Instant::now();
        let mut state = self.lock();
        let mut forgotten = 0;
        for envelope in events.iter().flatten() {
            if let (Some(id), Some(stored)) = (envelope.message.id, &envelope.stored) {
                let at = (stored, envelope.message.ts);
                forgotten += state.memory.seen((number, id), at, window, now);
            }
        }
        self.remembered(&mut state, forgotten, now);
    }

    fn ended(&self, topic: &Topic, key: Key, kept: &Kept, window: Duration, ts: Timestamp) {
        let now = Instant::now();
        let mut state = self.lock();
        let State { memory, topics, .. } = &mut *state;
        let mut given = topics.get_mut(topic).filter(|given| given.number == key.0);
        if let Some(given) = &mut given {
            given.under_way -= 1;
        }
        let forgotten = match kept {
            Ok(position) => memory.stored(key, position.as_ref(), window, now),
            Err(LaneError::OutcomeUnknown(_)) => {
                let (number, forgotten) = memory.unknown(key, window, now);
                if let Some(given) = given {
                    given.unknown.last = number;
                    given.unknown.from = Some(given.unknown.from.map_or(ts, |from| from.min(ts)));
                }
                forgotten
            }
            Err(_) => {
                memory.failed(&key);
                0
            }
        };
        self.remembered(&mut state, forgotten, now);
    }

    fn remembered(&self, state: &mut State, forgotten: usize, now: Instant) {
        self.metrics.ids_remembered(state.memory.len(), forgotten);
        if forgotten > 0 && state.complained.is_none_or(|last| now - last > COMPLAIN_EVERY) {
            state.complained = Some(now);
            warn!(
                IDS_MAX,
                "More ids are given within the routes' dedup_window than are remembered; the oldest are forgotten early."
            );
        }
    }

    /// Until when a topic is to be followed, as far as is known. `None`: it is no longer, and is forgotten.
    fn wanted_until(&self, topic: &Topic, number: u32) -> Option<Instant> {
        let mut state = self.lock();
        let given = state.topics.get(topic).filter(|given| given.number == number)?;
        let (now, until) = (Instant::now(), given.last + given.window);
        if until > now {
            return Some(until);
        }
        if given.under_way > 0 {
            return Some(now + given.window);
        }
        state.topics.remove(topic);
        None
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Between any two statements that change it the state is whole, so a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Given {
    fn new(number: u32, now: Instant) -> Self {
        Self {
            number,
            last: now,
            window: Duration::ZERO,
            under_way: 0,
            following: None,
            unknown: Unknown::default(),
        }
    }
}

impl Following {
    /// Whether it reads what this route stores, as far back as it asks for.
    fn is_by(&self, route: &Arc<Route>) -> bool {
        let same = Arc::ptr_eq(&self.route, route)
            || (self.route.pulsar == route.pulsar && self.route.dedup_window == route.dedup_window);
        let has_failed = matches!(&*self.caught_up.borrow(), Some(Err(_)));
        same && !has_failed
    }
}

fn make_place(topics: &mut HashMap<Topic, Given>) {
    if topics.len() < TOPICS_MAX {
        return;
    }
    let idle = topics.iter().filter(|(_, given)| given.under_way == 0);
    let oldest = idle.min_by_key(|(_, given)| given.last).map(|(topic, _)| topic.clone());
    if let Some(oldest) = oldest {
        topics.remove(&oldest);
    }
}
