//! A member of a group, and the dispatch that fills the members' queues. One dispatch runs for each group that has
//! members; it ends with the last of them, or with the log.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, oneshot};
use tracing::warn;

use super::group::{Group, Step};
use super::log::{Command, Line, Log, closed};
use super::reader::{Item, read_batch, read_some};
use crate::lane::contract::{Handed, LaneError, Member, Tag};
use crate::message::Lane;

/// How long the dispatch waits before it asks again to record what cannot be read.
const RETRY: Duration = Duration::from_secs(1);

pub struct LogMember {
    log: Arc<Log>,
    line: Line,
    group: Arc<Group>,
    seat: u64,
    arrived: Arc<Notify>,
}

impl LogMember {
    /// Takes a seat. Must be called on the runtime that is to carry the dispatch.
    pub fn join(log: Arc<Log>, line: Line, group: Arc<Group>, route: Arc<str>, prefetch: u32) -> Self {
        let (seat, arrived, first) = group.sit(prefetch);
        if first {
            tokio::spawn(dispatch(log.clone(), line.clone(), group.clone(), route));
        }
        Self { log, line, group, seat, arrived }
    }

    fn seqs(&self, tags: &[Tag]) -> Result<Vec<u64>, LaneError> {
        let ours = |tag: &Tag| tag.partition == 0 && tag.place.ledger == self.log.store.epoch();
        match tags.iter().find(|tag| !ours(tag)) {
            None => Ok(tags.iter().map(|tag| tag.place.entry).collect()),
            Some(tag) => {
                Err(LaneError::BadRequest(format!("{} is not a delivery of this group's log", tag.place)))
            }
        }
    }
}

impl Drop for LogMember {
    fn drop(&mut self) {
        self.group.leave(self.seat);
    }
}

#[async_trait]
impl Member for LogMember {
    async fn next(&self) -> Result<Vec<Result<Handed, LaneError>>, LaneError> {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            arrived.as_mut().enable();
            let collected = self.group.collect(self.seat)?;
            if !collected.is_empty() {
                return Ok(collected);
            }
            arrived.await;
        }
    }

    async fn ack(&self, tags: Vec<Tag>) -> Result<(), LaneError> {
        let seqs = self.seqs(&tags)?;
        match tokio::time::timeout(self.log.timeout, record(&self.line, &self.group, seqs)).await {
            Ok(done) => done,
            Err(_) => Err(LaneError::Timeout(self.group.topic.topic.clone())),
        }
    }

    async fn nack(&self, tags: Vec<Tag>, delay: Duration) -> Result<(), LaneError> {
        self.group.give_back(self.seat, &self.seqs(&tags)?, delay);
        Ok(())
    }
}

/// Returns once it is on disk that these are done.
async fn record(line: &Line, group: &Arc<Group>, seqs: Vec<u64>) -> Result<(), LaneError> {
    let (done, recorded) = oneshot::channel();
    line.send(Command::Ack { group: group.clone(), seqs, done }).await.map_err(|_| closed())?;
    recorded.await.map_err(|_| closed())?
}

async fn dispatch(log: Arc<Log>, line: Line, group: Arc<Group>, route: Arc<str>) {
    let mut growth = group.topic.growth();
    // What can never be read, until it is recorded as done.
    let mut unreadable = Vec::new();
    loop {
        growth.borrow_and_update();
        let step = group.step();
        let dealt = match step {
            Step::End => return,
            Step::Wait(until) => {
                tokio::select! {
                    () = group.changed() => {}
                    _ = growth.changed() => {}
                    () = sleep_until(until) => {}
                    () = tokio::time::sleep(RETRY), if !unreadable.is_empty() => {}
                    () = log.closed.cancelled() => return group.end(&closed()),
                }
                Ok(Vec::new())
            }
            Step::Again(seqs) => {
                let (topic, wanted) = (group.topic.clone(), seqs.clone());
                let read = log.read(move |store, last| read_some(store, &topic, &wanted, last)).await;
                read.map(|items| {
                    let found: Vec<u64> = items.iter().map(|item| *item.seqs.start()).collect();
                    let removed: Vec<u64> = seqs.into_iter().filter(|seq| !found.contains(seq)).collect();
                    group.removed(&removed);
                    group.deal(named(items, &log, &group, &route), None)
                })
            }
            Step::Onward(from, messages) => {
                let topic = group.topic.clone();
                let read = log.read(move |store, last| read_batch(store, &topic, from, messages, last)).await;
                read.map(|batch| group.deal(named(batch.items, &log, &group, &route), Some(batch.next)))
            }
        };
        match dealt {
            Ok(lost) => unreadable.extend(lost),
            Err(error) => return group.end(&error),
        }
        if !unreadable.is_empty() && record(&line, &group, unreadable.clone()).await.is_ok() {
            unreadable.clear();
        }
    }
}

async fn sleep_until(until: Option<std::time::Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

/// Makes a noise about what cannot be read.
fn named(items: Vec<Item>, log: &Log, group: &Group, route: &str) -> Vec<Item> {
    for item in &items {
        if let Err(error) = &item.found {
            warn!(group = group.name, %error, "A group's message cannot be read; the group goes on behind it.");
            log.metrics.dropped(Lane::Durable, route, "corrupt", item.seqs.end() - item.seqs.start() + 1);
        }
    }
    items
}
