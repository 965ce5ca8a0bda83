//! The ephemeral lane over NATS.
//!
//! ```text
//! publish, request ──▶ link ──one connection──▶ nats-server ──▶ one subscription per pattern ──▶ ring, ears
//!                       ▲                                       inbox ──▶ replies, echoes
//!                     keeper: an echo twice a second says whether anybody is there
//! ```
//! The client library answers Ok to much that never arrives: a publish without a connection or to a frozen server, a
//! subscription that was refused. So this lane trusts only what came back to it. A message that it sends to its own
//! inbox is its probe and its barrier: the server handles one connection's commands in order, so when the echo is
//! there, the subscription before it is too. (A request that nobody serves would tell the same, until somebody
//! subscribes to `>` and serves it with silence.)
//!
//! The NATS user of the bridge needs `_INBOX.>`, to publish and to subscribe, besides its subjects.

mod claim;
mod codec;
mod connect;
mod events;
mod inbox;
mod keeper;
mod link;
mod monitor;
mod refusals;
mod retain;
mod seen;
mod state;
mod subjects;
mod upstream;
mod upstreams;

pub use connect::OpenError;

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::claim::{Claim, Placed};
use self::events::Events;
use self::inbox::Waiters;
use self::link::Link;
use self::monitor::Monitor;
use self::refusals::Refused;
use self::state::{DEADLINE, State};
use self::upstream::Want;
use self::upstreams::Upstreams;
use super::contract::{BrokerReport, Ear, EphemeralLane, LaneError, LaneState, Listening};
use super::headers;
use super::settings::EphemeralSettings;
use crate::message::{Envelope, Message, ReplyTo};
use crate::policy::Policy;
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::{Pattern, Topic};

/// What `close` leaves to what is under way.
const CLOSE_DEADLINE: Duration = Duration::from_millis(700);

pub struct Nats {
    policy: Policy,
    link: Arc<Link>,
    upstreams: Arc<Upstreams>,
    state: Arc<State>,
    monitor: Monitor,
    /// Ends the connection's thread and all that runs on it.
    stop: CancellationToken,
    _retain: AbortOnDropHandle<()>,
}

impl Nats {
    /// Opens the lane at once; it connects in the background, for as long as it takes. Fails where the settings
    /// cannot be used at all.
    pub async fn open(
        settings: &EphemeralSettings,
        policy: Policy,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, OpenError> {
        let servers = connect::servers(&settings.url)?;
        let options = connect::options(settings)?;
        let monitor = Monitor::new(&settings.monitor_url)?;
        let stop = CancellationToken::new();
        let state = Arc::new(State::new(&settings.url));
        let upstreams = Arc::new(Upstreams::new(policy.clone(), settings.history_bytes, metrics));
        let (waiters, refused) = (Arc::new(Waiters::new()), Arc::new(Refused::default()));
        let events = Arc::new(Events {
            state: state.clone(),
            waiters: waiters.clone(),
            refused: refused.clone(),
            upstreams: upstreams.clone(),
        });
        let thread = connect::thread(stop.clone()).map_err(OpenError::Thread)?;
        let unmade = |error: &dyn std::fmt::Display| OpenError::Client(error.to_string());
        let client = thread.spawn(connect::connect(servers, options, events)).await;
        let client = client.map_err(|error| unmade(&error))?.map_err(|error| unmade(&error))?;
        let link = Arc::new(Link::new(client, waiters.clone(), refused, state.clone()));
        // Waits in the client's queue for the first connection, and is renewed with each.
        let inbox = link.subscribe(&waiters.subject(), None).await.map_err(|error| unmade(&error))?;
        thread.spawn(inbox::run(waiters, inbox));
        thread.spawn(keeper::run(link.clone(), upstreams.clone(), state.clone()));
        let retain = retain::run(policy.clone(), link.clone(), upstreams.clone(), state.clone());
        let _retain = AbortOnDropHandle::new(tokio::spawn(retain));
        Ok(Arc::new(Self { policy, link, upstreams, state, monitor, stop, _retain }))
    }

    /// How many requests wait for their reply.
    pub fn requests(&self) -> usize {
        self.link.waiters.requests()
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[async_trait]
impl EphemeralLane for Nats {
    /// A subject that the broker refuses is known only after the first message to it: that one is dropped, counted
    /// and logged, and for ten seconds the next ones are `Forbidden`.
    async fn publish(&self, route: &Arc<Route>, topic: &Topic, message: Message) -> Result<(), LaneError> {
        headers::check(&message)?;
        let outgoing = codec::encode(&message, None)?;
        let subject = route.nats.apply(topic.as_str());
        self.link.check(&subject, &outgoing)?;
        // Kept before it is sent: an ear that is placed in between finds it in the history and skips the echo.
        let envelope = Arc::new(Envelope::ephemeral(topic.clone(), message, None));
        let kept = self.upstreams.keep(&envelope, route.ring());
        self.link.send(subject, None, outgoing).await?;
        kept.sent();
        Ok(())
    }

    /// Where the broker is a cluster, servers other than ours learn of the subscription a moment later. When the last
    /// ear of a group leaves this bridge, what was on its way to it is lost with it.
    async fn listen(
        &self,
        pattern: &Pattern,
        group: Option<&str>,
        last: usize,
        ear: Arc<dyn Ear>,
    ) -> Result<Listening, LaneError> {
        self.link.check_up()?;
        let table = self.policy.table();
        let mut placed = Placed::new(self.upstreams.clone(), pattern.clone(), ear, self.link.connects());
        let opened = tokio::time::timeout(DEADLINE, async {
            for template in subjects::templates(&table, Some(pattern)) {
                let subject = subjects::subject(&template, pattern);
                let (group, pattern) = (group.map(str::to_owned), pattern.clone());
                let claim = Claim::new(&self.upstreams, Want { subject, group, template, pattern });
                claim.opened(&self.link).await?;
                placed.add(claim);
            }
            Ok(())
        });
        opened.await.unwrap_or_else(|_| Err(self.state.silent("confirmed no subscription")))?;
        let history = placed.begin(last);
        Ok(Listening { history, on_drop: Box::new(placed) })
    }

    async fn request(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        message: Message,
        timeout: Duration,
    ) -> Result<Message, LaneError> {
        headers::check(&message)?;
        let outgoing = codec::encode(&message, Some(timeout))?;
        let subject = route.nats.apply(topic.as_str());
        self.link.check(&subject, &outgoing)?;
        let waiting = self.link.waiters.expect(Some(&subject));
        let answered = tokio::time::timeout(timeout, async {
            self.link.send(subject, Some(&waiting.address), outgoing).await?;
            waiting.reply().await
        });
        match answered.await {
            Ok(Ok(reply)) if codec::is_no_responders(&reply) => Err(LaneError::NoResponders(topic.clone())),
            Ok(reply) => reply.map(|reply| codec::decode(reply).message),
            Err(_) => Err(LaneError::Timeout(topic.clone())),
        }
    }

    async fn reply(&self, to: &ReplyTo, message: Message) -> Result<(), LaneError> {
        headers::check(&message)?;
        let outgoing = codec::encode(&message, None)?;
        self.link.check(&to.address, &outgoing)?;
        self.link.send(to.address.to_string(), None, outgoing).await
    }

    async fn probe(&self) -> Result<Duration, LaneError> {
        let begun = Instant::now();
        self.link.echo().await?;
        Ok(begun.elapsed())
    }

    async fn broker(&self) -> Option<BrokerReport> {
        Some(self.monitor.report().await)
    }

    fn state(&self) -> watch::Receiver<LaneState> {
        self.state.subscribe()
    }

    async fn close(&self) {
        // An echo comes back behind everything that was published before it.
        let _ = tokio::time::timeout(CLOSE_DEADLINE, self.link.echo()).await;
        self.upstreams.clear();
        self.state.close();
        self.link.close().await;
        self.stop.cancel();
    }
}
