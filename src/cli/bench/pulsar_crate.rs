//! A peer: the producer and consumer of the `pulsar` crate.

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use futures_util::FutureExt;
use tokio::sync::mpsc;

use super::direct::Ground;
use super::traffic::{How, Incoming, Line, Outgoing, Payload, Target, number};
use crate::lane::pulsar::peer::{Entries, Part, PeerConsumer, PeerProducer, Place, Sent};

/// Messages without a receipt; more than any window.
const UNANSWERED_MAX: usize = 1 << 17;

pub struct PulsarCrate {
    pub ground: Ground,
    pub entries: Entries,
}

#[async_trait]
impl Target for PulsarCrate {
    async fn publisher(&self, topic: &str, payload: &Payload) -> Result<Line> {
        let (url, topic) = (self.ground.broker()?, self.ground.physical(topic)?);
        let producer = PeerProducer::open(Place { url, topic: &topic }, self.entries).await?;
        let (under_way, receipts) = mpsc::channel(UNANSWERED_MAX);
        let out = Produce {
            producer,
            payload: payload.clone(),
            under_way,
            flush: matches!(self.entries, Entries::Of(2..)),
        };
        Ok((Box::new(out), Box::new(Receipts { receipts, first: None })))
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
    under_way: mpsc::Sender<(u64, Sent)>,
    /// Whether what is left of a batch has to be sent on.
    flush: bool,
}

#[async_trait]
impl Outgoing for Produce {
    async fn send(&mut self, from: u64, count: u64) -> Result<()> {
        for number in from..from + count {
            let sent = self.producer.send(self.payload.numbered(number)).await?;
            let told = self.under_way.send((number, sent)).await;
            told.ok().context("nobody takes the receipts any more")?;
        }
        if self.flush {
            self.producer.flush().await?;
        }
        Ok(())
    }
}

struct Receipts {
    receipts: mpsc::Receiver<(u64, Sent)>,
    /// The one that is waited for.
    first: Option<(u64, Sent)>,
}

#[async_trait]
impl Incoming for Receipts {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        if self.first.is_none() {
            self.first = Some(self.receipts.recv().await.context("the producer has ended")?);
        }
        if let Some((number, sent)) = &mut self.first {
            sent.await?;
            into.push(*number);
            self.first = None;
        }
        while let Ok((number, mut sent)) = self.receipts.try_recv() {
            match (&mut sent).now_or_never() {
                Some(stored) => stored?,
                None => {
                    self.first = Some((number, sent));
                    break;
                }
            }
            into.push(number);
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
