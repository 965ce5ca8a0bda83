//! The connection, and what may be said on it: nothing waits longer than its deadline, nothing is handed to a
//! connection that is not there.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::connection::State as Connection;
use async_nats::{Client, PublishErrorKind, Subscriber};

use super::codec::Outgoing;
use super::inbox::Waiters;
use super::refusals::Refused;
use super::state::{DEADLINE, State};
use crate::lane::contract::LaneError;

/// How long an echo may take. Two in a row that do not come back in time, half a second after the last that did, make
/// the lane `Down` after 2.3 s.
pub const ECHO_DEADLINE: Duration = Duration::from_millis(900);

pub struct Link {
    client: Client,
    pub waiters: Arc<Waiters>,
    refused: Arc<Refused>,
    state: Arc<State>,
}

impl Link {
    pub fn new(client: Client, waiters: Arc<Waiters>, refused: Arc<Refused>, state: Arc<State>) -> Self {
        Self { client, waiters, refused, state }
    }

    pub fn is_connected(&self) -> bool {
        self.client.connection_state() == Connection::Connected
    }

    /// How many connections there were; it counts up before anything of a new one arrives.
    pub fn connects(&self) -> u64 {
        self.client.statistics().connects.load(Ordering::Relaxed)
    }

    /// Whether this may be sent, as far as is known without sending it.
    pub fn check(&self, subject: &str, outgoing: &Outgoing) -> Result<(), LaneError> {
        self.check_up()?;
        self.refused.check(subject)?;
        // What the server said when it was connected to last.
        let max = self.client.max_payload();
        match outgoing.size {
            size if size > max => Err(LaneError::TooLarge { size, max }),
            _ => Ok(()),
        }
    }

    pub fn check_up(&self) -> Result<(), LaneError> {
        if !self.is_connected() {
            self.state.lost();
        }
        self.state.check()
    }

    /// Hands a message to the connection's queue. Where that is full, the server takes nothing: the message is
    /// withdrawn when the deadline passes, so the caller can say that nothing was sent.
    pub async fn send(
        &self,
        subject: String,
        reply: Option<&str>,
        outgoing: Outgoing,
    ) -> Result<(), LaneError> {
        let Outgoing { headers, payload, size } = outgoing;
        let sending = async {
            match reply {
                Some(reply) => {
                    let reply = reply.to_owned();
                    self.client.publish_with_reply_and_headers(subject, reply, headers, payload).await
                }
                None => self.client.publish_with_headers(subject, headers, payload).await,
            }
        };
        let error = match tokio::time::timeout(DEADLINE, sending).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => error,
            Err(_) => return Err(self.state.silent("took no message")),
        };
        Err(match error.kind() {
            PublishErrorKind::MaxPayloadExceeded => {
                LaneError::TooLarge { size, max: self.client.max_payload() }
            }
            PublishErrorKind::InvalidSubject => {
                LaneError::BadRequest("NATS has no such subject; nothing was sent".into())
            }
            PublishErrorKind::Send => LaneError::Unavailable("the connection to NATS is closed".into()),
        })
    }

    /// A round trip: a message to our own inbox. When it is back, the server has done what it was asked before.
    pub async fn echo(&self) -> Result<(), LaneError> {
        if !self.is_connected() {
            return Err(LaneError::Unavailable("there is no connection to NATS".into()));
        }
        let waiting = self.waiters.expect(None);
        let round_trip = async {
            self.send(waiting.address.clone(), None, Outgoing::empty()).await?;
            waiting.reply().await.map(drop)
        };
        let late = || LaneError::Unavailable(format!("NATS did not answer within {ECHO_DEADLINE:?}"));
        tokio::time::timeout(ECHO_DEADLINE, round_trip).await.unwrap_or_else(|_| Err(late()))
    }

    /// Asks for a subscription. Whether it was granted is known after an echo.
    pub async fn subscribe(&self, subject: &str, group: Option<&str>) -> Result<Subscriber, LaneError> {
        let (subject, asked) = (subject.to_owned(), subject);
        let asking = async {
            match group {
                Some(group) => self.client.queue_subscribe(subject, group.to_owned()).await,
                None => self.client.subscribe(subject).await,
            }
        };
        match tokio::time::timeout(DEADLINE, asking).await {
            Ok(subscribed) => subscribed.map_err(|error| {
                LaneError::BadRequest(format!("NATS takes no subscription to `{asked}`: {error}"))
            }),
            Err(_) => Err(self.state.silent("took no subscription")),
        }
    }

    /// Gives up this connection for another.
    pub async fn reconnect(&self) {
        // Refused only where the client has ended, and then there is nothing to give up.
        let _ = tokio::time::timeout(DEADLINE, self.client.force_reconnect()).await;
    }

    /// The server is about to leave. Where there are others, we go first, and publishers notice nothing.
    pub async fn leave(&self) {
        if let Ok(Ok(pool)) = tokio::time::timeout(DEADLINE, self.client.server_pool()).await
            && pool.len() > 1
        {
            self.state.moves();
            self.reconnect().await;
        }
    }

    pub async fn close(&self) {
        if self.is_connected() {
            let _ = tokio::time::timeout(ECHO_DEADLINE, self.client.drain()).await;
        }
    }
}
