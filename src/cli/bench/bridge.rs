//! The bridge, through its WebSocket: what a client gets.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::socket::{self, Frames, Sink};
use super::traffic::{
    How, Incoming, Line, NUMBER, Outgoing, Payload, Responder, Target, Template, digits_after, number_after,
    text_after,
};
use crate::message::Lanes;

const REQUEST_TIMEOUT_MS: u32 = 10_000;

pub struct Bridge {
    pub url: String,
    /// What its topics are to take.
    pub lanes: Lanes,
}

#[async_trait]
impl Target for Bridge {
    async fn publisher(&self, topic: &str, payload: &Payload) -> Result<Line> {
        let frame = format!(
            r#"{{"type":"publish","request_id":"{NUMBER}","topic":"{topic}","message":{{"payload":{}}}}}"#,
            payload.text()
        );
        self.line(&frame, r#"{"type":"ack","request_id":""#, Some(self.lanes)).await
    }

    async fn receiver(&self, topic: &str, how: &How) -> Result<Box<dyn Incoming>> {
        let (mut sink, mut frames) = socket::open(&self.url).await?;
        let options = match how {
            How::Plain => String::new(),
            How::Group { name, earliest, prefetch } => {
                let from = if *earliest { "earliest" } else { "latest" };
                format!(r#","group":"{name}","from":"{from}","prefetch":{prefetch}"#)
            }
        };
        sink.send(format!(r#"{{"type":"subscribe","request_id":"s","topic":"{topic}"{options}}}"#)).await?;
        let mut arrived = Vec::new();
        frames.next(&mut arrived).await?;
        expect(&arrived[0], r#"{"type":"ack""#)?;
        // Events may have come right behind the answer.
        arrived.remove(0);
        Ok(Box::new(Events { sink, frames, arrived, unsettled: Vec::new() }))
    }

    async fn requester(&self, topic: &str, payload: &Payload) -> Result<Line> {
        let frame = format!(
            r#"{{"type":"request","request_id":"{NUMBER}","topic":"{topic}","timeout_ms":{REQUEST_TIMEOUT_MS},"message":{{"payload":{}}}}}"#,
            payload.text()
        );
        self.line(&frame, r#"{"type":"response","request_id":""#, None).await
    }

    async fn responder(&self, topic: &str) -> Result<Responder> {
        let (mut sink, mut frames) = socket::open(&self.url).await?;
        sink.send(format!(r#"{{"type":"subscribe","request_id":"s","topic":"{topic}"}}"#)).await?;
        let mut arrived = Vec::new();
        frames.next(&mut arrived).await?;
        expect(&arrived[0], r#"{"type":"ack""#)?;
        Ok(Responder::spawn(async move {
            loop {
                for frame in arrived.drain(..) {
                    if let Some(reply_to) = text_after(&frame, r#""reply_to":""#) {
                        let reply = format!(
                            r#"{{"type":"reply","reply_to":"{reply_to}","message":{{"payload":1}}}}"#
                        );
                        sink.feed(reply.into_bytes()).await?;
                    }
                }
                sink.flush().await?;
                frames.next(&mut arrived).await?;
            }
        }))
    }
}

impl Bridge {
    async fn line(&self, frame: &str, answer: &'static str, lanes: Option<Lanes>) -> Result<Line> {
        let (sink, frames) = socket::open(&self.url).await?;
        let out = Commands { sink, template: Template::new(frame) };
        Ok((Box::new(out), Box::new(Answers { frames, answer, lanes, arrived: Vec::new() })))
    }
}

struct Commands {
    sink: Sink,
    template: Template,
}

#[async_trait]
impl Outgoing for Commands {
    async fn send(&mut self, from: u64, count: u64) -> Result<()> {
        for number in from..from + count {
            self.sink.feed(self.template.numbered(number)).await?;
        }
        self.sink.flush().await
    }
}

/// Acknowledgements or responses, by their request id.
struct Answers {
    frames: Frames,
    /// How the frame begins, up to the number.
    answer: &'static str,
    /// What the first acknowledgement has to say, which goes for all.
    lanes: Option<Lanes>,
    arrived: Vec<Utf8Bytes>,
}

#[async_trait]
impl Incoming for Answers {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        self.frames.next(&mut self.arrived).await?;
        for frame in self.arrived.drain(..) {
            expect(&frame, self.answer)?;
            if let Some(lanes) = self.lanes.take() {
                let says_so = frame.contains(&format!(r#""lane":"{lanes}""#));
                ensure!(says_so, "its topic does not take the {lanes} lane: {frame}");
            }
            into.push(number_after(&frame, self.answer).context("an answer to nothing that was asked")?);
        }
        Ok(())
    }
}

struct Events {
    sink: Sink,
    frames: Frames,
    arrived: Vec<Utf8Bytes>,
    /// Deliveries that are still to be acknowledged.
    unsettled: Vec<Arc<str>>,
}

#[async_trait]
impl Incoming for Events {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        for delivery in self.unsettled.drain(..) {
            self.sink.feed(format!(r#"{{"type":"ack","delivery":{delivery}}}"#).into_bytes()).await?;
        }
        self.sink.flush().await?;
        while into.is_empty() {
            if self.arrived.is_empty() {
                self.frames.next(&mut self.arrived).await?;
            }
            for frame in self.arrived.drain(..) {
                if !frame.starts_with(r#"{"type":"event""#) {
                    // What a gap took is missing from the count.
                    match frame.starts_with(r#"{"type":"error""#) {
                        true => bail!("the bridge answered {frame}"),
                        false => continue,
                    }
                }
                let number = number_after(&frame, r#""payload":""#);
                into.push(number.context("a message that this benchmark did not publish")?);
                if let Some(delivery) = digits_after(&frame, r#""delivery":"#) {
                    self.unsettled.push(delivery.into());
                }
            }
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<()> {
        let deliveries = std::mem::take(&mut self.unsettled).join(",");
        if deliveries.is_empty() {
            return Ok(());
        }
        let ack = format!(r#"{{"type":"ack","request_id":"settled","deliveries":[{deliveries}]}}"#);
        self.sink.send(ack).await?;
        loop {
            self.arrived.clear();
            self.frames.next(&mut self.arrived).await?;
            if let Some(frame) = self.arrived.iter().find(|frame| frame.contains(r#""request_id":"settled""#))
            {
                return expect(frame, r#"{"type":"ack""#);
            }
        }
    }
}

fn expect(frame: &str, begin: &str) -> Result<()> {
    match frame.starts_with(begin) {
        true => Ok(()),
        false => bail!("the bridge answered {frame}"),
    }
}
