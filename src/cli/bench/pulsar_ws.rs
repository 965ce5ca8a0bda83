//! A peer: Pulsar's own WebSocket API, spoken as its documentation says, with the broker's default settings.

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::direct::Ground;
use super::socket::{self, Frames, Sink};
use super::traffic::{
    How, Incoming, Line, NUMBER, Outgoing, Payload, Target, Template, number, number_after, text_after,
};
use crate::message::Timestamp;

/// The bytes of a payload that hold its number, and how long they are in Base64: a whole number of its groups.
const HEAD: usize = 15;
const HEAD_BASE64: usize = 20;

pub struct PulsarWs {
    /// `ws://HOST:PORT` of the broker's HTTP listener.
    pub url: String,
    pub ground: Ground,
}

impl PulsarWs {
    /// `…/ws/v2/KIND/persistent/TENANT/NAMESPACE/TOPIC`.
    fn address(&self, kind: &str, topic: &str) -> Result<String> {
        let physical = self.ground.physical(topic)?.replacen("://", "/", 1);
        Ok(format!("{}/ws/v2/{kind}/{physical}", self.url.trim_end_matches('/')))
    }
}

#[async_trait]
impl Target for PulsarWs {
    async fn publisher(&self, topic: &str, payload: &Payload) -> Result<Line> {
        let (sink, frames) = socket::open(&self.address("producer", topic)?).await?;
        let begin = r#"{"payload":""#;
        let encoded = STANDARD.encode(payload.numbered(0));
        // What the bridge stores beside a payload, so that the same is stored whoever publishes.
        let (id, ts) = (format!("01970000-0000-7000-8000-{NUMBER}"), Timestamp::now());
        let properties = format!(r#"{{"twinspan-id":"{id}","twinspan-ts":"{ts}"}}"#);
        let out = Produce {
            sink,
            template: Template::new(&format!(
                r#"{begin}{encoded}","properties":{properties},"context":"{NUMBER}"}}"#
            )),
            payload: payload.clone(),
            at: begin.len(),
        };
        Ok((Box::new(out), Box::new(Produced { frames, arrived: Vec::new() })))
    }

    async fn receiver(&self, topic: &str, how: &How) -> Result<Box<dyn Incoming>> {
        let url = match how {
            How::Plain => format!("{}?messageId=latest", self.address("reader", topic)?),
            How::Group { name, earliest, prefetch } => format!(
                "{}/{name}?subscriptionType=Shared&subscriptionInitialPosition={}&receiverQueueSize={prefetch}",
                self.address("consumer", topic)?,
                if *earliest { "Earliest" } else { "Latest" },
            ),
        };
        let (sink, frames) = socket::open(&url).await?;
        Ok(Box::new(Messages { sink, frames, arrived: Vec::new(), unsettled: Vec::new() }))
    }
}

struct Produce {
    sink: Sink,
    template: Template,
    payload: Payload,
    /// Where the payload begins.
    at: usize,
}

#[async_trait]
impl Outgoing for Produce {
    async fn send(&mut self, from: u64, count: u64) -> Result<()> {
        for number in from..from + count {
            let mut frame = self.template.numbered(number);
            let mut head = [0; HEAD_BASE64];
            let payload = self.payload.numbered(number);
            // A payload is never shorter: `PAYLOAD_MIN`.
            STANDARD.encode_slice(&payload[..HEAD], &mut head)?;
            frame[self.at..self.at + HEAD_BASE64].copy_from_slice(&head);
            self.sink.feed(frame).await?;
        }
        self.sink.flush().await
    }
}

struct Produced {
    frames: Frames,
    arrived: Vec<Utf8Bytes>,
}

#[async_trait]
impl Incoming for Produced {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        self.frames.next(&mut self.arrived).await?;
        for frame in self.arrived.drain(..) {
            if !frame.starts_with(r#"{"result":"ok""#) {
                bail!("Pulsar answered {frame}");
            }
            into.push(number_after(&frame, r#""context":""#).context("an answer to nothing that was asked")?);
        }
        Ok(())
    }
}

struct Messages {
    sink: Sink,
    frames: Frames,
    arrived: Vec<Utf8Bytes>,
    /// Messages that are still to be acknowledged; to a reader this means that it may bring another.
    unsettled: Vec<Vec<u8>>,
}

impl Messages {
    async fn acknowledge(&mut self) -> Result<()> {
        for ack in self.unsettled.drain(..) {
            self.sink.feed(ack).await?;
        }
        self.sink.flush().await
    }
}

#[async_trait]
impl Incoming for Messages {
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()> {
        self.acknowledge().await?;
        self.frames.next(&mut self.arrived).await?;
        for frame in self.arrived.drain(..) {
            let payload = text_after(&frame, r#""payload":""#).and_then(|text| text.get(..HEAD_BASE64));
            let id = text_after(&frame, r#""messageId":""#);
            let (Some(payload), Some(id)) = (payload, id) else { bail!("Pulsar sent {frame}") };
            into.push(number(&STANDARD.decode(payload)?)?);
            self.unsettled.push(format!(r#"{{"messageId":"{id}"}}"#).into_bytes());
        }
        Ok(())
    }

    /// Pulsar's WebSocket API confirms no acknowledgement.
    async fn settle(&mut self) -> Result<()> {
        self.acknowledge().await
    }
}
