//! A peer: the producer and consumer of the `pulsar` crate.

use super::direct::Ground;
use super::receipts::{self, UnderWay};
use super::traffic::{How, Incoming, Line, Outgoing, Payload, Target, number};
use crate::lane::pulsar::peer::{Entries, Part, PeerConsumer, PeerProducer, Place, Properties, Sent};
use crate::message::{MessageId, Timestamp};
use anyhow::{Result, bail};
use async_trait::async_trait;

pub struct PulsarCrate {
    pub ground: Ground,
    pub entries: Entries,
}

#[async_trait]
impl Target for PulsarCrate {
    async fn publisher(&self, topic: &str, payload: &Payload) -> Result<Line> {
        let (url, topic) = (self.ground.broker()?, self.ground.physical(topic)?);
        let producer = PeerProducer::open(Place { url, topic: &topic }, self.entries).await?;
        let (under_way, receipts) = receipts::channel();
        let out = Produce {
            producer,
            payload: payload.clone(),
            under_way,
            named: !matches!(self.entries, Entries::Of(_)),
            ts: Timestamp::default(),
            ts_text: String::new(),
            flush: matches!(self.entries, Entries::Of(2..)),
        };
        Ok((Box::new(out), Box::new(receipts)))
    }

    async fn receiver(&self, topic: &str, how: &How) -> Result<Box<dyn Incoming>> {
        let (url, topic) = (self.ground.broker()?, self.ground.physical(topic)?);
        let alone = format!("bench-{:08x}", fastrand::u32(..));
        let part = match how {
            How::Plain => Part::Alone { name: &alone },
            How::Group { name, earliest, prefetch } => {
                Part::Shared { name, earliest: *earliest, prefetch: *prefetch }
            }
        };
        Ok(Box::new(Consume(PeerConsumer::open(Place { url, topic: &topic }, part).await?)))
    }
}

struct Produce {
    producer: PeerProducer,
    payload: Payload,
    under_way: UnderWay<Sent>,
    /// Whether messages have an id and a time, as those of the bridge have. A backlog's are a stranger's.
    named: bool,
    /// The last time and its text: most messages share them with the one before.
    ts: Timestamp,
    ts_text: String,
    /// Whether what is left of a batch has to be sent on.
    flush: bool,
}

impl Produce {
    /// What the bridge stores beside a payload, so that the same is stored whoever publishes.
    fn properties(&mut self) -> Properties {
        let now = Timestamp::now();
        if self.ts != now {
            (self.ts, self.ts_text) = (now, now.to_string());
        }
        let (id, ts) = (MessageId::new().to_string(), self.ts_text.clone());
        [("twinspan-id".to_owned(), id), ("twinspan-ts".to_owned(), ts)].into()
    }
}

#[async_trait]
impl Outgoing for Produce {
    async fn send(&mut self, from: u64, count: u64) -> Result<()> {
        for number in from..from + count {
            let properties = if self.named { self.properties() } else { Properties::new() };
            let sent = self.producer.send(self.payload.numbered(number), properties).await?;
            self.under_way.add(number, sent).await?;
        }
        self.under_way.hand_over().await?;
        if self.flush {
            self.producer.flush().await?;
        }
        Ok(())
    }
}

struct Consume(PeerConsumer);

#[async_trait]
impl Incoming for Consume {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        let mut foreign = None;
        let open = self
            .0
            .next(|payload| match number(payload) {
                Ok(number) => into.push(number),
                Err(error) => foreign = Some(error),
            })
            .await?;
        match (open, foreign) {
            (true, None) => Ok(()),
            (_, Some(error)) => Err(error),
            (false, None) => bail!("the crate's consumer has ended"),
        }
    }

    async fn settle(&mut self) -> Result<()> {
        Ok(self.0.acknowledge().await?)
    }
}
