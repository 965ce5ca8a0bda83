//! A member of a group, and the dispatch that fills the members' queues. One dispatch runs for each group that has
//! members; it ends with the last of them, or with the log.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{Notify, oneshot};
use tracing::warn;

use super::group::{Era, Group, NoSeat, Step};
use super::log::{Command, Line, Log, closed};
use super::reader::{Item, read_batch, read_some};
use super::share::Todo;
use crate::lane::contract::{Handed, LaneError, Member, Tag};
use crate::message::{GroupMode, Lane};

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
    pub fn join(
        log: Arc<Log>,
        line: Line,
        group: Arc<Group>,
        route: Arc<str>,
        mode: GroupMode,
        prefetch: u32,
    ) -> Result<Self, NoSeat> {
        let (seat, arrived, first) = group.sit(mode, prefetch)?;
        if first {
            tokio::spawn(dispatch(log.clone(), line.clone(), group.clone(), route));
        }
        Ok(Self { log, line, group, seat, arrived })
    }

    fn check(&self, tags: &[Tag]) -> Result<(), LaneError> {
        match tags.iter().find(|tag| tag.place.ledger != self.log.store.epoch()) {
            None => Ok(()),
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
        // What is not this member's any more, because of a seek, may be another's by now.
        self.check(&tags)?;
        let (era, seqs) = self.group.held_by(self.seat, &tags);
        if seqs.is_empty() {
            return Ok(());
        }
        match tokio::time::timeout(self.log.timeout, record(&self.line, &self.group, era, seqs)).await {
            Ok(done) => done,
            Err(_) => Err(LaneError::Timeout(self.group.topic.topic.clone())),
        }
    }

    async fn nack(&self, tags: Vec<Tag>, delay: Duration) -> Result<(), LaneError> {
        self.check(&tags)?;
        self.group.reject(self.seat, &tags, delay);
        Ok(())
    }
}

/// Returns once it is on disk that these are done.
async fn record(line: &Line, group: &Arc<Group>, era: Era, seqs: Vec<u64>) -> Result<(), LaneError> {
    let (done, recorded) = oneshot::channel();
    line.send(Command::Ack { group: group.clone(), era, seqs, done }).await.map_err(|_| closed())?;
    recorded.await.map_err(|_| closed())?
}

async fn dispatch(log: Arc<Log>, line: Line, group: Arc<Group>, route: Arc<str>) {
    let mut growth = group.topic.growth();
    // What can never be read, until it is recorded as done.
    let mut unreadable = Vec::new();
    loop {
        growth.borrow_and_update();
        let Step::Do(era, todo) = group.step() else { return };
        let dealt = match todo {
            Todo::Wait(until) => {
                tokio::select! {
                    () = group.changed() => {}
                    _ = growth.changed() => {}
                    () = sleep_until(until) => {}
                    () = tokio::time::sleep(RETRY), if !unreadable.is_empty() => {}
                    () = log.closed.cancelled() => return group.end(&closed()),
                }
                Ok(Vec::new())
            }
            Todo::Again(seqs) => {
                let topic = group.topic.clone();
                let read = log.read(move |store, last| read_some(store, &topic, &seqs, last)).await;
                read.map(|picked| {
                    group.removed(era, &picked.removed);
                    group.deal(era, named(picked.items, &log, &group, &route), None)
                })
            }
            Todo::Onward(from, messages) => {
                let topic = group.topic.clone();
                let read = log.read(move |store, last| read_batch(store, &topic, from, messages, last)).await;
                read.map(|batch| group.deal(era, named(batch.items, &log, &group, &route), Some(batch.next)))
            }
        };
        match dealt {
            Ok(lost) if lost.is_empty() => {}
            Ok(lost) => unreadable.push((era, lost)),
            Err(error) => return group.end(&error),
        }
        while let Some((era, lost)) = unreadable.last() {
            if record(&line, &group, *era, lost.clone()).await.is_err() {
                break;
            }
            unreadable.pop();
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
