//! The lanes without the bridge, as `serve` would open them: what the bridge adds is the difference.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use futures_util::future::{BoxFuture, Ready, ready};
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt, StreamExt};
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::time::timeout;

use super::receipts::{self, UnderWay};
use super::traffic::{How, Incoming, Line, Outgoing, Payload, Responder, Target, number};
use crate::config::settings::Settings;
use crate::lane;
use crate::lane::contract::{
    DurableLane, Ear, EphemeralLane, Joining, LaneError, LaneState, Listening, Member, Publisher, Receipt,
};
use crate::lane::settings::DurableBackend;
use crate::lane::tail::{Cursor, Ended};
use crate::message::{Draft, Envelope, GroupMode, Lane, Message, Start};
use crate::policy::Policy;
use crate::policy::table::Route;
use crate::telemetry::metrics::Metrics;
use crate::topic::{Pattern, Topic};

/// Requests without an answer; more than any rate makes.
const UNANSWERED_MAX: usize = 1 << 17;
/// What an ear has heard and nobody has counted; what comes then is missing from the count.
const UNHEARD_MAX: usize = 1 << 16;
const UP_WITHIN: Duration = Duration::from_secs(15);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
const TURN_MAX: usize = 512;

/// The settings and routes of this command line, as `serve` would read them.
#[derive(Clone)]
pub struct Ground {
    pub settings: Arc<Settings>,
    pub policy: Policy,
}

impl Ground {
    pub fn route(&self, topic: &str) -> Result<(Arc<Route>, Topic)> {
        let topic = Topic::parse(topic)?;
        let table = self.policy.table();
        let route = table.route_for(&topic).with_context(|| format!("no route matches `{topic}`"))?;
        Ok((route.clone(), topic))
    }

    /// What Pulsar calls the topic.
    pub fn physical(&self, topic: &str) -> Result<String> {
        Ok(self.route(topic)?.0.pulsar.apply(topic))
    }

    /// Pulsar's binary protocol.
    pub fn broker(&self) -> Result<&str> {
        Ok(self.settings.lanes.durable.url.first().context("lanes.durable.url names no broker")?)
    }

    pub fn is_on_pulsar(&self) -> bool {
        self.settings.lanes.durable.backend == DurableBackend::Pulsar
    }
}

/// Opens each lane when it is first asked for.
pub struct Direct {
    ground: Ground,
    metrics: Arc<Metrics>,
    ephemeral: OnceCell<Arc<dyn EphemeralLane>>,
    durable: OnceCell<Arc<dyn DurableLane>>,
}

impl Direct {
    pub fn new(ground: Ground) -> Self {
        let metrics = Arc::new(Metrics::new());
        Self { ground, metrics, ephemeral: OnceCell::new(), durable: OnceCell::new() }
    }

    async fn ephemeral(&self) -> Result<Arc<dyn EphemeralLane>> {
        let open = async || {
            let settings = &self.ground.settings.lanes.ephemeral;
            let lane = lane::open_ephemeral(settings, self.ground.policy.clone(), self.metrics.clone())
                .await
                .context("opening the ephemeral lane")?;
            anyhow::Ok(lane)
        };
        let lane = self.ephemeral.get_or_try_init(open).await?;
        up(Lane::Ephemeral, lane.state()).await?;
        Ok(lane.clone())
    }

    async fn durable(&self) -> Result<Arc<dyn DurableLane>> {
        let open = async || {
            let settings = &self.ground.settings;
            let lane = lane::open_durable(
                &settings.lanes.durable,
                &settings.server.data_dir,
                self.ground.policy.clone(),
                self.metrics.clone(),
            )
            .await
            .context("opening the durable lane")?;
            anyhow::Ok(lane)
        };
        let lane = self.durable.get_or_try_init(open).await?;
        up(Lane::Durable, lane.state()).await?;
        Ok(lane.clone())
    }

    async fn listen(&self, topic: &str, group: Option<&str>) -> Result<Heard> {
        let lane = self.ephemeral().await?;
        let (ear, heard) = mpsc::channel(UNHEARD_MAX);
        let pattern = Pattern::parse(topic)?;
        let listening = lane.listen(&pattern, group, 0, Arc::new(Mouthpiece(ear))).await?;
        Ok(Heard { heard, _listening: listening })
    }
}

/// A broker that is busy with something else may have been given up for a moment.
async fn up(lane: Lane, mut state: watch::Receiver<LaneState>) -> Result<()> {
    let is_up = timeout(UP_WITHIN, state.wait_for(LaneState::is_up)).await.is_ok_and(|state| state.is_ok());
    ensure!(is_up, "the {lane} lane is not up: {:?}", *state.borrow());
    Ok(())
}

/// The one that is measured: of two, storage.
fn carrier(route: &Route) -> Lane {
    if route.lane.takes(Lane::Durable) { Lane::Durable } else { Lane::Ephemeral }
}

#[async_trait]
impl Target for Direct {
    async fn publisher(&self, topic: &str, payload: &Payload) -> Result<Line> {
        let (route, topic) = self.ground.route(topic)?;
        let payload = payload.clone();
        Ok(match carrier(&route) {
            Lane::Durable => {
                let (under_way, receipts) = receipts::channel();
                let lane = self.durable().await?;
                (Box::new(Append { lane, route, topic, payload, under_way }), Box::new(receipts))
            }
            Lane::Ephemeral => {
                let (under_way, receipts) = receipts::channel();
                let lane = self.ephemeral().await?;
                (Box::new(Publish { lane, route, topic, payload, under_way }), Box::new(receipts))
            }
        })
    }

    async fn receiver(&self, topic: &str, how: &How) -> Result<Box<dyn Incoming>> {
        let (route, parsed) = self.ground.route(topic)?;
        Ok(match (carrier(&route), how) {
            (Lane::Durable, How::Plain) => {
                Box::new(Followed(self.durable().await?.tail(&route, &parsed).await?.follow().0))
            }
            (Lane::Durable, How::Group { name, earliest, prefetch }) => {
                let start = if *earliest { Start::Earliest } else { Start::Latest };
                let joining =
                    Joining { group: name.clone(), mode: GroupMode::default(), start, prefetch: *prefetch };
                let member = self.durable().await?.join(&route, &parsed, joining).await?;
                Box::new(Membership { member: member.into(), settling: FuturesUnordered::new() })
            }
            (Lane::Ephemeral, How::Plain) => Box::new(self.listen(topic, None).await?),
            (Lane::Ephemeral, How::Group { name, .. }) => Box::new(self.listen(topic, Some(name)).await?),
        })
    }

    async fn requester(&self, topic: &str, payload: &Payload) -> Result<Line> {
        let (route, topic) = self.ground.route(topic)?;
        let (answered, answers) = mpsc::channel(UNANSWERED_MAX);
        let out = Ask { lane: self.ephemeral().await?, route, topic, payload: payload.clone(), answered };
        Ok((Box::new(out), Box::new(Answered(answers))))
    }

    async fn responder(&self, topic: &str) -> Result<Responder> {
        let lane = self.ephemeral().await?;
        let requests = self.listen(topic, None).await?;
        Ok(Responder::spawn(async move {
            // As a whole: by its receiver alone the ear would be gone.
            let mut requests = requests;
            while let Some(request) = requests.heard.recv().await {
                if let Some(reply_to) = &request.reply_to {
                    lane.reply(reply_to, message(b"1".to_vec())).await?;
                }
            }
            Ok(())
        }))
    }
}

fn message(payload: Vec<u8>) -> Message {
    Draft { payload: payload.into(), ..Draft::default() }.accept()
}

struct Append {
    lane: Arc<dyn DurableLane>,
    route: Arc<Route>,
    topic: Topic,
    payload: Payload,
    under_way: UnderWay<Receipt>,
}

#[async_trait]
impl Outgoing for Append {
    async fn send(&mut self, from: u64, count: u64) -> Result<()> {
        for number in from..from + count {
            let message = message(self.payload.numbered(number));
            let receipt = self.lane.append(&self.route, &self.topic, message, Publisher::default()).await?;
            self.under_way.add(number, receipt).await?;
        }
        self.under_way.hand_over().await
    }
}

struct Publish {
    lane: Arc<dyn EphemeralLane>,
    route: Arc<Route>,
    topic: Topic,
    payload: Payload,
    /// This lane has no receipts: it has handed the message over by the time it returns.
    under_way: UnderWay<Ready<Result<()>>>,
}

#[async_trait]
impl Outgoing for Publish {
    async fn send(&mut self, from: u64, count: u64) -> Result<()> {
        for number in from..from + count {
            self.lane.publish(&self.route, &self.topic, message(self.payload.numbered(number))).await?;
            self.under_way.add(number, ready(Ok(()))).await?;
        }
        self.under_way.hand_over().await
    }
}

struct Followed(Cursor);

#[async_trait]
impl Incoming for Followed {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        match self.0.next(TURN_MAX).await {
            Ok(envelopes) => {
                for envelope in envelopes {
                    into.push(number(&envelope.message.payload)?);
                }
                Ok(())
            }
            Err(Ended::Behind) => bail!("the tail overtook this follower"),
            Err(Ended::Failed(error)) => Err(error.into()),
        }
    }
}

struct Membership {
    member: Arc<dyn Member>,
    /// Acknowledgements that the lane has not confirmed yet: each message by itself, and those that came together in one
    /// call, as the bridge does with what a turn of frames acknowledges.
    settling: FuturesUnordered<BoxFuture<'static, Result<(), LaneError>>>,
}

#[async_trait]
impl Incoming for Membership {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        let handed = loop {
            tokio::select! {
                handed = self.member.next() => break handed?,
                Some(settled) = self.settling.next() => settled?,
            }
        };
        let mut tags = Vec::with_capacity(handed.len());
        for handed in handed {
            let handed = handed?;
            into.push(number(&handed.envelope.message.payload)?);
            tags.push(handed.tag);
        }
        let member = self.member.clone();
        self.settling.push(async move { member.ack(tags).await }.boxed());
        Ok(())
    }

    async fn settle(&mut self) -> Result<()> {
        while let Some(settled) = self.settling.next().await {
            settled?;
        }
        Ok(())
    }
}

/// Passes on what an ear hears.
struct Mouthpiece(mpsc::Sender<Arc<Envelope>>);

impl Ear for Mouthpiece {
    fn hear(&self, _: &Arc<Route>, envelope: &Arc<Envelope>) {
        let _ = self.0.try_send(envelope.clone());
    }

    fn missed(&self) {}
}

struct Heard {
    heard: mpsc::Receiver<Arc<Envelope>>,
    _listening: Listening,
}

#[async_trait]
impl Incoming for Heard {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        let mut envelope = Some(self.heard.recv().await.context("the lane has ended")?);
        while let Some(heard) = envelope {
            into.push(number(&heard.message.payload)?);
            envelope = self.heard.try_recv().ok();
        }
        Ok(())
    }
}

struct Ask {
    lane: Arc<dyn EphemeralLane>,
    route: Arc<Route>,
    topic: Topic,
    payload: Payload,
    answered: mpsc::Sender<Result<u64, LaneError>>,
}

#[async_trait]
impl Outgoing for Ask {
    async fn send(&mut self, from: u64, count: u64) -> Result<()> {
        for number in from..from + count {
            let message = message(self.payload.numbered(number));
            let (lane, route, topic) = (self.lane.clone(), self.route.clone(), self.topic.clone());
            let answered = self.answered.clone();
            tokio::spawn(async move {
                let answer = lane.request(&route, &topic, message, REQUEST_TIMEOUT).await;
                // Nobody counts any more once the round has failed.
                let _ = answered.send(answer.map(|_| number)).await;
            });
        }
        Ok(())
    }
}

struct Answered(mpsc::Receiver<Result<u64, LaneError>>);

#[async_trait]
impl Incoming for Answered {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        let mut answer = Some(self.0.recv().await.context("the requester has ended")?);
        while let Some(answered) = answer {
            into.push(answered?);
            answer = self.0.try_recv().ok();
        }
        Ok(())
    }
}
