//! The crate's own client, which the benchmark compares ours with, and which makes backlogs of as many messages an
//! entry as one asks for. Nothing else uses it.
//!
//! As its users would have it: a connection for each producer and consumer, because the two on one connection wait
//! for each other, and a queue long enough that a window is never refused.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt};
use pulsar::compression::{Compression, CompressionLz4};
use pulsar::consumer::{InitialPosition, Message};
use pulsar::producer::{self, SendFuture};
use pulsar::{
    Consumer, ConsumerOptions, Error, OperationRetryOptions, Producer, ProducerOptions, Pulsar, SubType,
    TokioExecutor,
};

/// What the crate publishes fastest with: a thousand messages a batch, or what 5 ms bring.
const BATCH: u32 = 1000;
const BATCH_DELAY: Duration = Duration::from_millis(5);
/// Room for a batch of 1 KiB messages; the default would halve it.
const BATCH_BYTES: usize = 1 << 20;
const QUEUE: usize = 20_000;
/// Messages taken in one turn, so that their acknowledgements are not held back for long.
const TURN_MAX: usize = 512;

pub type PeerError = Error;

pub type Properties = HashMap<String, String>;

/// How messages become entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// One message each.
    Single,
    /// As the crate batches best.
    Batched,
    /// The same, folded with LZ4.
    Folded,
    /// So many messages each, exactly.
    Of(u32),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    pub url: &'a str,
    /// `persistent://…`.
    pub topic: &'a str,
}

async fn connect(url: &str) -> Result<Pulsar<TokioExecutor>, Error> {
    let operations = OperationRetryOptions {
        max_retries: Some(6),
        retry_delay: Duration::from_millis(500),
        ..Default::default()
    };
    let builder = Pulsar::builder(url, TokioExecutor).with_operation_retry_options(operations);
    builder.with_outbound_channel_size(QUEUE).build().await
}

pub struct PeerProducer(Producer<TokioExecutor>);

/// Ready once the broker has the message.
pub type Sent = BoxFuture<'static, Result<(), Error>>;

impl PeerProducer {
    pub async fn open(place: Place<'_>, entries: Entries) -> Result<Self, Error> {
        let mut options = ProducerOptions { block_queue_if_full: true, ..Default::default() };
        match entries {
            Entries::Single | Entries::Of(0 | 1) => {}
            Entries::Batched | Entries::Folded => {
                options.batch_size = Some(BATCH);
                options.batch_timeout = Some(BATCH_DELAY);
                options.batch_byte_size = Some(BATCH_BYTES);
                if entries == Entries::Folded {
                    options.compression = Some(Compression::Lz4(CompressionLz4::default()));
                }
            }
            Entries::Of(count) => {
                options.batch_size = Some(count);
                // Nothing but the count ends a batch.
                options.batch_byte_size = Some(4 << 20);
            }
        }
        let client = connect(place.url).await?;
        Ok(Self(client.producer().with_topic(place.topic).with_options(options).build().await?))
    }

    /// Returns once the message has its place in line.
    pub async fn send(&mut self, payload: Vec<u8>, properties: Properties) -> Result<Sent, Error> {
        let message = producer::Message { payload, properties, ..Default::default() };
        let sent: SendFuture = self.0.send_non_blocking(message).await?;
        Ok(sent.map(|receipt| receipt.map(drop)).boxed())
    }

    /// Ends a batch that is not full.
    pub async fn flush(&mut self) -> Result<(), Error> {
        self.0.send_batch().await
    }
}

pub struct PeerConsumer {
    consumer: Consumer<Vec<u8>, TokioExecutor>,
    unsettled: Vec<Message<Vec<u8>>>,
}

/// How to take part: alone and from now on, or as a member of a shared subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    Alone { name: &'a str },
    Shared { name: &'a str, earliest: bool, prefetch: u32 },
}

impl PeerConsumer {
    pub async fn open(place: Place<'_>, part: Part<'_>) -> Result<Self, Error> {
        let (name, kind, start, prefetch) = match part {
            Part::Alone { name } => (name, SubType::Exclusive, InitialPosition::Latest, 1000),
            Part::Shared { name, earliest, prefetch } => {
                let start = if earliest { InitialPosition::Earliest } else { InitialPosition::Latest };
                (name, SubType::Shared, start, prefetch)
            }
        };
        let options = ConsumerOptions::default()
            .with_initial_position(start)
            .durable(matches!(part, Part::Shared { .. }))
            .with_receiver_queue_size(prefetch);
        let client = connect(place.url).await?;
        let consumer = client
            .consumer()
            .with_topic(place.topic)
            .with_subscription(name)
            .with_subscription_type(kind)
            // The window of permits, whatever its name says.
            .with_batch_size(prefetch)
            .with_options(options)
            .build()
            .await?;
        Ok(Self { consumer, unsettled: Vec::new() })
    }

    /// The payloads that came since, at least one, once what came before is acknowledged one by one. Cancel safe but
    /// for the acknowledgements, which are handed to the crate without waiting. `false`: the consumer has ended.
    pub async fn next(&mut self, mut each: impl FnMut(&[u8]) + Send) -> Result<bool, Error> {
        self.acknowledge().await?;
        let mut next = self.consumer.next().await;
        loop {
            let Some(message) = next else { return Ok(false) };
            let message = message?;
            each(&message.payload.data);
            self.unsettled.push(message);
            if self.unsettled.len() >= TURN_MAX {
                return Ok(true);
            }
            match self.consumer.next().now_or_never() {
                Some(more) => next = more,
                None => return Ok(true),
            }
        }
    }

    /// The crate's acknowledgements are sent, and never confirmed.
    pub async fn acknowledge(&mut self) -> Result<(), Error> {
        for message in std::mem::take(&mut self.unsettled) {
            self.consumer.ack(&message).await.map_err(Error::Consumer)?;
        }
        Ok(())
    }
}
