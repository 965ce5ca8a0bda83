//! The durable topics there are, for subscriptions to a pattern.
//!
//! Storage is asked once a second for all of them together, and only while somebody follows a pattern; what is
//! published through this bridge is known at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::debug;

use crate::lane::contract::DurableLane;
use crate::topic::{Pattern, Topic};

const INTERVAL: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub struct Discovery {
    lane: Arc<dyn DurableLane>,
    topics: Arc<watch::Sender<BTreeSet<Topic>>>,
}

impl Discovery {
    pub fn new(lane: Arc<dyn DurableLane>) -> Self {
        Self { lane, topics: Arc::new(watch::Sender::new(BTreeSet::new())) }
    }

    /// A topic was published to.
    pub fn seen(&self, topic: &Topic) {
        if self.topics.receiver_count() > 0 {
            self.topics.send_if_modified(|topics| !topics.contains(topic) && topics.insert(topic.clone()));
        }
    }

    /// The topics known by now; it changes as more appear.
    pub fn watch(&self) -> watch::Receiver<BTreeSet<Topic>> {
        self.topics.subscribe()
    }

    /// Asks storage, until the process ends.
    pub async fn run(&self, everything: Pattern) {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            if self.topics.receiver_count() == 0 {
                continue;
            }
            match tokio::time::timeout(10 * INTERVAL, self.lane.topics(&everything)).await {
                Ok(Ok(found)) => {
                    self.topics.send_if_modified(|topics| {
                        let before = topics.len();
                        topics.extend(found);
                        topics.len() > before
                    });
                }
                Ok(Err(error)) => debug!(%error, "Durable topics could not be listed; asking again."),
                Err(_) => debug!("Listing the durable topics took too long; asking again."),
            }
        }
    }
}
