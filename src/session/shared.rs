//! What the tasks of one connection share.

use std::collections::BTreeSet;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock, RwLockWriteGuard};

use futures_util::FutureExt;
use tracing::{debug, error};

use super::deliveries::{Deliveries, Settlement};
use super::feeds::Feeds;
use super::outbox::Outbox;
use super::replies::Replies;
use super::settings::SessionSettings;
use super::subscription::Subscription;
use crate::bridge::Bridge;
use crate::message::{Envelope, Timestamp};
use crate::topic::{Pattern, Topic};
use crate::wire::code::Close;

pub struct Shared {
    pub id: u64,
    pub since: Timestamp,
    pub bridge: Arc<Bridge>,
    pub outbox: Outbox,
    pub feeds: Feeds,
    pub deliveries: Deliveries,
    pub replies: Replies,
    pub client_id: OnceLock<String>,
    /// The plain subscriptions: a message that several of them bring goes out once.
    plain: RwLock<Vec<Arc<Subscription>>>,
    numbers: AtomicU64,
}

impl Shared {
    pub fn new(id: u64, bridge: Arc<Bridge>, settings: &SessionSettings) -> Arc<Self> {
        Arc::new(Self {
            id,
            since: Timestamp::now(),
            outbox: Outbox::new(settings.queue_messages, settings.queue_bytes),
            feeds: Feeds::default(),
            deliveries: Deliveries::default(),
            replies: Replies::default(),
            client_id: OnceLock::new(),
            plain: RwLock::default(),
            numbers: AtomicU64::new(0),
            bridge,
        })
    }

    /// The plain subscriptions, to be changed.
    pub fn plain(&self) -> RwLockWriteGuard<'_, Vec<Arc<Subscription>>> {
        self.plain.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The durable topics of a pattern that they know, whether anything is stored there or not.
    pub fn known(&self, pattern: &Pattern) -> BTreeSet<Topic> {
        let known = self.plain().iter().map(|other| other.known().clone()).collect::<Vec<_>>();
        known.into_iter().flatten().filter(|topic| pattern.matches(topic)).collect()
    }

    /// Whether some of them have yet to find the topic.
    pub fn is_awaited(&self, topic: &Topic) -> bool {
        self.plain().iter().any(|other| other.awaits(topic))
    }

    pub fn next_number(&self) -> u64 {
        self.numbers.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Whether another plain subscription of this connection brings a live message.
    pub fn is_brought_by_another(&self, subscription: &Subscription, envelope: &Arc<Envelope>) -> bool {
        let plain = self.plain.read().unwrap_or_else(PoisonError::into_inner);
        plain.len() > 1 && plain.iter().any(|other| other.goes_before(subscription, envelope))
    }

    /// Runs a part of this connection. A panic in it ends this connection and nothing else.
    pub fn spawn(self: &Arc<Self>, part: impl Future<Output = ()> + Send + 'static) {
        let session = self.clone();
        tokio::spawn(async move {
            if AssertUnwindSafe(part).catch_unwind().await.is_err() {
                session.panicked();
            }
        });
    }

    /// What the group members of a client with automatic acknowledgement were sent.
    pub fn settle_written(self: &Arc<Self>, numbers: &[u64]) {
        let session = self.clone();
        let claimed = self.deliveries.claim(numbers);
        self.spawn(async move {
            if let Err(fault) = session.deliveries.settle(claimed, Settlement::Ack).await {
                debug!(connection = session.id, %fault, "What was written could not be acknowledged; it comes again.");
            }
        });
    }

    pub fn panicked(&self) {
        error!(connection = self.id, "A task of this connection panicked; the connection is closed.");
        self.outbox.close(Close::Internal);
    }
}
