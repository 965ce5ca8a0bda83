//! Publishing to a durable lane that may be away: refused at once, or kept on this bridge's disk until it is back.
//!
//! ```text
//! outage = "reject"   publish ──breaker──▶ lane
//!
//! outage = "spool"    publish ──▶ the topic's line ──┬──▶ lane          while all is well
//!                                                    └──▶ spool ──drain──▶ lane
//! ```
//! A topic whose messages may be spooled has a line: one task that decides for one message after the other, so that
//! none overtakes another when the topic goes over to its spool and when it comes back.

mod breaker;
mod drain;
mod line;
mod shared;
mod spool;

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::{BoxFuture, Either};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::error;

pub use self::breaker::BreakerState;
pub use self::shared::Kept;
pub use self::spool::Holds;

use self::breaker::Breaker;
use self::line::Keeper;
use self::shared::{Asked, Shared, closed};
use self::spool::Spool;
use super::both::Both;
use super::catalog::Catalog;
use crate::lane::contract::{DurableLane, LaneError, Publisher};
use crate::lane::journal::JournalError;
use crate::lane::settings::DurableSettings;
use crate::message::{Lane, Message};
use crate::policy::Policy;
use crate::policy::table::{OnOutage, Route};
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

/// Messages that wait in one line. Full: the publisher waits.
const LINE: usize = 64;
/// All messages of lines that have no answer yet, in KiB. Full: the publisher waits.
const ROOM_KIB: u32 = 64 << 10;
/// Lines there may be; for a topic beyond that nothing is taken until another has been idle for a while.
const LINES_MAX: usize = 10_000;
/// Topics that are drained at a time. The others wait for their turn.
const DRAINS: usize = 64;
const REPORT_EVERY: Duration = Duration::from_secs(1);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(4);

/// How the durable lane stands beyond its own state.
#[derive(Debug, Clone)]
pub struct Standing {
    pub breaker: BreakerState,
    /// Topics that are not taken now, or tried again just now.
    pub open_topics: usize,
    /// `None` where nothing is spooled and nothing ever was.
    pub spool: Option<Holds>,
}

#[derive(Clone)]
pub struct Outage(Arc<Shared>);

impl Outage {
    /// Opens the spool where it is needed, and goes on draining what an earlier bridge left in it.
    pub async fn open(
        lane: Arc<dyn DurableLane>,
        both: Both,
        settings: &DurableSettings,
        data_dir: &Path,
        policy: Policy,
        catalog: Arc<Catalog>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, JournalError> {
        let (state, timeout) = (lane.state(), settings.publish_timeout);
        metrics.spool_is_bounded(settings.spool_max as u64);
        let outage = Self(Arc::new(Shared {
            breaker: Breaker::new(state.clone(), timeout),
            spool: Spool::new(data_dir, settings.spool_max as u64, timeout, metrics.clone()),
            lane,
            both,
            state,
            policy,
            catalog,
            metrics,
            lines: Mutex::default(),
            lines_open: AtomicUsize::new(0),
            room: Arc::new(Semaphore::new(ROOM_KIB as usize)),
            drains: Semaphore::new(DRAINS),
            timeout,
            stop: CancellationToken::new(),
            keepers: TaskTracker::new(),
        }));
        let shared = &outage.0;
        let spools = shared.policy.table().routes().iter().any(|route| route.outage == OnOutage::Spool);
        if spools || shared.spool.is_there() {
            shared.spool.open().await?;
        }
        for topic in shared.spool.topics() {
            outage.line(&topic);
        }
        Ok(outage)
    }

    /// As `DurableLane::append`, and says at once what cannot be taken now; where the route spools, it is on disk
    /// instead. A message of unknown outcome is never spooled in vain: what was stored meanwhile is not stored again,
    /// as far as the lane can tell.
    pub async fn append(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        publisher: Publisher,
    ) -> Result<impl Future<Output = Result<Kept, LaneError>> + Send + 'static + use<>, LaneError> {
        // What a route spooled before it was changed is still before what comes now.
        if route.outage == OnOutage::Spool || self.has_line(topic) {
            return Box::pin(self.line_up(route, topic, message, publisher)).await.map(Either::Right);
        }
        let shared = self.0.clone();
        let pass = shared.breaker.admit(topic).map_err(|open| open.on_lane())?;
        let placed = shared.while_up(shared.both.append(route, topic, message, publisher)).await;
        let receipt = placed.inspect_err(|error| shared.breaker.heard(topic, pass, Err(error)))?;
        let (shared, topic) = (self.0.clone(), topic.clone());
        Ok(Either::Left(async move {
            let stored = receipt.await;
            shared.breaker.heard(&topic, pass, stored.as_ref().map(|_| ()));
            stored.map(Kept::Stored)
        }))
    }

    pub fn standing(&self) -> Standing {
        let (breaker, open_topics) = self.0.breaker.state();
        Standing { breaker, open_topics, spool: self.0.spool.holds() }
    }

    /// Reports, until the process ends.
    pub async fn run(self) {
        let mut state = self.0.state.clone();
        let mut ticks = interval(REPORT_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut was_up = true;
        loop {
            let is_up = state.borrow_and_update().is_up();
            match (was_up, is_up) {
                (_, false) => self.0.breaker.lane_went_down(),
                (false, true) => self.0.breaker.lane_came_up(),
                (true, true) => {}
            }
            was_up = is_up;
            self.report();
            tokio::select! {
                _ = ticks.tick() => {}
                changed = state.changed() => if changed.is_err() { return },
            }
        }
    }

    fn report(&self) {
        let standing = self.standing();
        self.0.metrics.breaker_is(Lane::Durable, standing.breaker as i64);
        if let Some(holds) = standing.spool {
            let age = holds.oldest.map(|oldest| oldest.age()).unwrap_or_default();
            self.0.metrics.spool_holds(holds.messages, holds.bytes, age, holds.set_aside);
        }
    }

    /// Spools what is under way where the route does, and closes the spool. Comes before the lane is closed, and ends
    /// within five seconds.
    pub async fn close(&self) {
        self.0.stop.cancel();
        self.0.keepers.close();
        if timeout(CLOSE_TIMEOUT, self.0.keepers.wait()).await.is_err() {
            error!("Not everything under way was spooled or answered in time.");
        }
        self.0.spool.close().await;
    }
}

impl Outage {
    async fn line_up(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        publisher: Publisher,
    ) -> Result<BoxFuture<'static, Result<Kept, LaneError>>, LaneError> {
        if let Err(error) = self.0.spool.open().await {
            return Err(LaneError::Unavailable(format!("the spool cannot be opened ({error})")));
        }
        let deadline = tokio::time::Instant::now() + self.0.timeout;
        let late = |_| LaneError::Unavailable(format!("nothing was taken for {:?}", self.0.timeout));
        let kib = u32::try_from(message.payload.len() / 1024 + 1).unwrap_or(u32::MAX).min(ROOM_KIB);
        let room = timeout_at(deadline, self.0.room.clone().acquire_many_owned(kib)).await.map_err(late)?;
        let room = room.map_err(|_| closed())?;
        let line = self.line(topic).ok_or_else(|| {
            LaneError::Unavailable(format!("{LINES_MAX} topics are published to at this time"))
        })?;
        let (answer, answered) = oneshot::channel();
        let asked = Asked { route: route.clone(), message, publisher, answer, room };
        timeout_at(deadline, line.send(asked)).await.map_err(late)?.map_err(|_| closed())?;
        Ok(Box::pin(async move {
            let gone = |_| LaneError::OutcomeUnknown("the topic's line ended before it answered".into());
            answered.await.map_err(gone)?
        }))
    }

    fn has_line(&self, topic: &Topic) -> bool {
        self.0.lines_open.load(Ordering::Acquire) > 0 && self.0.lock().contains_key(topic)
    }

    /// The line of a topic, begun where there is none; `None` where there are too many.
    fn line(&self, topic: &Topic) -> Option<Arc<mpsc::Sender<Asked>>> {
        let mut lines = self.0.lock();
        if let Some(line) = lines.get(topic) {
            return Some(line.clone());
        }
        if lines.len() >= LINES_MAX && !self.0.spool.holds_any_of(topic) {
            return None;
        }
        let (line, inbox) = mpsc::channel(LINE);
        let line = Arc::new(line);
        lines.insert(topic.clone(), line.clone());
        self.0.lines_open.store(lines.len(), Ordering::Release);
        // It ends when it is idle, or with `close`.
        self.0.keepers.spawn(Keeper::new(self.0.clone(), topic.clone(), inbox).run());
        Some(line)
    }
}
