//! Connections that come again: when the next one is made, and whether there is one.
//!
//! ```text
//! Dial ──connect──▶ Live ──next──▶ frames … the end ──lost──▶ Dial: after a wait, or never
//! ```

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::time::{Instant, sleep_until, timeout};
use tracing::warn;

use super::backoff::Backoff;
use super::connection::{Client, ClientError, Sender};
use crate::wire::json::heard::Heard;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that held for so long was a good one: the next failure is the first again.
const STEADY: Duration = Duration::from_secs(10);

/// How patient the client is.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long a publish is tried, and how long a first subscribe may take.
    pub deadline: Duration,
    /// The waits between connections, and before a publish that was refused for now is sent again.
    pub backoff: Backoff,
    /// A connection on which nothing was heard for so long is asked whether it is there, and given up after as long
    /// again. Only TCP would notice else, after a quarter of an hour.
    pub silence: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let backoff = Backoff { first: Duration::from_millis(100), max: Duration::from_secs(5) };
        Self { deadline: Duration::from_secs(30), backoff, silence: Duration::from_secs(15) }
    }
}

/// A connection that was made before anybody needed it.
pub type Spare = Arc<Mutex<Option<Client>>>;

pub struct Dial {
    url: Arc<str>,
    spare: Spare,
    options: Options,
    failures: u32,
    not_before: Instant,
    /// Why there is no connection.
    pub last: Option<ClientError>,
}

/// A connection that is known to be there.
pub struct Live {
    client: Client,
    since: Instant,
    heard: Instant,
    silence: Duration,
    probe: Option<BoxFuture<'static, Result<Heard, ClientError>>>,
    /// The bridge drains, and said when to come back.
    reconnect_after: Option<Duration>,
}

/// One attempt to connect, with a deadline.
pub async fn connect(url: &str) -> Result<Client, ClientError> {
    timeout(CONNECT_TIMEOUT, Client::connect(url)).await.unwrap_or_else(|_| {
        Err(ClientError::Connect { url: url.into(), reason: format!("no answer within {CONNECT_TIMEOUT:?}") })
    })
}

impl Dial {
    pub fn new(url: Arc<str>, spare: Spare, options: Options) -> Self {
        Self { url, spare, options, failures: 0, not_before: Instant::now(), last: None }
    }

    /// The next connection, however long it takes. Cancel safe.
    pub async fn connect(&mut self) -> Live {
        loop {
            sleep_until(self.not_before).await;
            let spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner).take();
            let connected = match spare {
                Some(client) => Ok(client),
                None => connect(&self.url).await,
            };
            match connected {
                Ok(client) => return Live::new(client, self.options.silence),
                Err(error) => self.failed(error),
            }
        }
    }

    /// Returns once a subscription is in force, or with the refusal that trying again does not mend.
    pub async fn subscribe(
        &mut self,
        topic: &str,
        options: Value,
        first: bool,
    ) -> Result<(Live, Heard), ClientError> {
        loop {
            let live = self.connect().await;
            match live.sender().subscribe(topic, options.clone()).await {
                Ok(ack) => return Ok((live, ack)),
                // Who comes to a taken place is told so. Who comes back to it waits until the bridge has noticed that
                // the connection before this one is gone.
                Err(ClientError::Refused(error))
                    if !error.retryable || (first && error.code == "GROUP_BUSY") =>
                {
                    return Err(ClientError::Refused(error));
                }
                Err(error) => self.lost(live, error).await?,
            }
        }
    }

    /// The same for the first time, with a deadline.
    pub async fn subscribe_within(
        &mut self,
        deadline: Duration,
        topic: &str,
        options: Value,
    ) -> Result<(Live, Heard), ClientError> {
        match timeout(deadline, self.subscribe(topic, options, true)).await {
            Ok(subscribed) => subscribed,
            Err(_) => Err(self.last.take().unwrap_or(ClientError::NoAnswer(deadline))),
        }
    }

    /// A connection has ended, or is to end. An error where no other may follow by itself: the same would happen again.
    pub async fn lost(&mut self, mut live: Live, error: ClientError) -> Result<(), ClientError> {
        let error = match error {
            // A call only knows that there is no connection any more.
            ClientError::Broken(_) => live.ending().await,
            other => other,
        };
        if live.since.elapsed() >= STEADY {
            self.failures = 0;
        }
        let is_final = matches!(error, ClientError::Closed { code: 1003 | 1007 | 1008 | 1009, .. });
        self.failed(error.clone());
        if is_final {
            return Err(error);
        }
        if let Some(after) = live.reconnect_after {
            self.not_before += after;
        }
        Ok(())
    }

    fn failed(&mut self, error: ClientError) {
        let wait = self.options.backoff.delay(self.failures);
        warn!(url = %self.url, %error, ?wait, "There is no connection to the bridge; trying again.");
        self.failures = self.failures.saturating_add(1);
        self.not_before = Instant::now() + wait;
        self.last = Some(error);
    }
}

impl Live {
    fn new(client: Client, silence: Duration) -> Self {
        let now = Instant::now();
        Self { client, since: now, heard: now, silence, probe: None, reconnect_after: None }
    }

    pub fn sender(&self) -> Sender {
        self.client.sender()
    }

    /// The next frame that answers no call. An error once the connection has ended, or answers no more. Cancel safe.
    pub async fn next(&mut self) -> Result<Heard, ClientError> {
        loop {
            let Self { client, probe, .. } = self;
            tokio::select! {
                biased;
                heard = client.next() => {
                    self.heard = Instant::now();
                    if let Ok(heard) = &heard
                        && let Some(after) = heard.reconnect_after_ms
                    {
                        self.reconnect_after = Some(Duration::from_millis(after));
                    }
                    return heard;
                }
                answer = async { match probe { Some(probe) => probe.await, None => std::future::pending().await } } => {
                    self.probe = None;
                    answer?;
                    self.heard = Instant::now();
                }
                () = sleep_until(self.heard + self.silence), if probe.is_none() => {
                    let (sender, silence) = (self.client.sender(), self.silence);
                    self.probe = Some(Box::pin(async move {
                        let pong = timeout(silence, sender.ping()).await;
                        pong.unwrap_or(Err(ClientError::NoAnswer(silence)))
                    }));
                }
            }
        }
    }

    /// Waits for an answer while whatever else comes is let go.
    pub async fn only<T>(&mut self, answer: impl Future<Output = T>) -> Option<T> {
        tokio::pin!(answer);
        loop {
            tokio::select! {
                answer = &mut answer => return Some(answer),
                heard = self.next() => {
                    if heard.is_err() {
                        return None;
                    }
                }
            }
        }
    }

    async fn ending(&mut self) -> ClientError {
        loop {
            if let Err(error) = self.client.next().await {
                return error;
            }
        }
    }
}
