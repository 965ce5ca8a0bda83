//! The shared tails: one reader per topic and bridge, however many follow it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::fault::Fault;
use super::names::Physical;
use super::read::{Plan, Source, TopicReader};
use crate::lane::contract::{LaneError, Reader};
use crate::lane::tail::Tail;

#[derive(Default)]
pub struct Tails {
    slots: Mutex<HashMap<Physical, Slot>>,
}

/// Held while a tail is begun, so that all who ask meanwhile get that one.
type Slot = Arc<tokio::sync::Mutex<Weak<Tail>>>;

impl Tails {
    /// The topic's tail, begun where there is none.
    pub async fn get(&self, source: Source, stop: &CancellationToken) -> Result<Arc<Tail>, LaneError> {
        let slot = self.slot(&source.physical);
        let mut slot = slot.lock().await;
        if let Some(tail) = slot.upgrade().filter(|tail| !tail.has_failed()) {
            return Ok(tail);
        }
        // Where the topic ends is asked first and read from then on: what is stored in between comes.
        let plan = Plan::now(&source).await.map_err(Fault::on_lane)?;
        let (tail, ended) = Tail::new(plan.vector.position());
        let topic = source.topic.clone();
        let mut reader = TopicReader::follow(source, plan).await.map_err(Fault::on_lane)?;
        *slot = Arc::downgrade(&tail);
        let (weak, stop) = (slot.clone(), stop.child_token());
        tokio::spawn(async move {
            let feeding = async {
                loop {
                    let (Some(brought), Some(tail)) = (reader.next().await?, weak.upgrade()) else {
                        return Ok(());
                    };
                    if reader.skipped() {
                        warn!(%topic, "Retention has removed messages that this bridge was cut off from.");
                    }
                    tail.push(brought.into_iter().filter_map(|read| {
                        read.inspect_err(|error| warn!(%topic, %error, "A stored record was left out.")).ok()
                    }));
                }
            };
            let fed = tokio::select! {
                fed = feeding => fed,
                () = ended.cancelled() => Ok(()),
                () = stop.cancelled() => Err(Fault::Closed.on_lane()),
            };
            match (fed, weak.upgrade()) {
                (Err(error), Some(tail)) => tail.fail(error),
                _ => debug!(%topic, "Nobody follows the topic any more."),
            }
        });
        Ok(tail)
    }

    fn slot(&self, physical: &Physical) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Only slots that somebody holds or that have a tail are kept.
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|tail| tail.strong_count() > 0)
        });
        slots.entry(physical.clone()).or_default().clone()
    }
}
