//! The topics of the log as this process knows them: how far each reaches, who follows its tail, its groups.
//!
//! Everything here is read from storage when the log is opened and moves after a commit, never before.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::watch;

use super::group::Group;
use super::rows::Extent;
use crate::lane::tail::Tail;
use crate::message::{Envelope, Message, Place, Position, Stored};
use crate::policy::table::Retention;
use crate::topic::{Pattern, Topic};

/// One topic's part of the log.
pub struct TopicLog {
    pub topic: Topic,
    /// The log's epoch, for positions.
    epoch: u64,
    /// Readers at the end wait for it to change.
    extent: watch::Sender<Extent>,
    /// Held while the extent moves, so that a tail begins exactly where its first push goes on.
    tail: Mutex<Weak<Tail>>,
    pub retention: Mutex<Retention>,
    pub groups: Mutex<BTreeMap<String, Arc<Group>>>,
}

impl TopicLog {
    fn new(topic: Topic, epoch: u64, extent: Extent) -> Self {
        Self {
            topic,
            epoch,
            extent: watch::Sender::new(extent),
            tail: Mutex::default(),
            retention: Mutex::default(),
            groups: Mutex::default(),
        }
    }

    pub fn extent(&self) -> Extent {
        *self.extent.borrow()
    }

    pub fn growth(&self) -> watch::Receiver<Extent> {
        self.extent.subscribe()
    }

    pub fn place(&self, seq: u64) -> Place {
        Place { ledger: self.epoch, entry: seq, index: 0 }
    }

    pub fn envelope(&self, seq: u64, message: Message) -> Arc<Envelope> {
        let place = self.place(seq);
        let stored = Stored { partition: 0, place, position: Position::Whole(place) };
        Arc::new(Envelope::durable(self.topic.clone(), message, stored))
    }

    /// The shared tail, begun where there is none.
    pub fn tail(&self) -> Arc<Tail> {
        let mut shared = lock(&self.tail);
        if let Some(tail) = shared.upgrade().filter(|tail| !tail.has_failed()) {
            return tail;
        }
        // The writer pushes to whoever is there, so nothing has to be told when the last follower leaves.
        let (tail, _ended) = Tail::new(Some(Position::Whole(self.place(self.extent().next - 1))));
        *shared = Arc::downgrade(&tail);
        tail
    }

    /// The tail, where somebody follows it.
    pub fn followed(&self) -> Option<Arc<Tail>> {
        lock(&self.tail).upgrade()
    }

    /// A commit moved the topic. `stored` makes what was appended, for whoever follows.
    pub fn moved(&self, extent: Extent, stored: impl FnOnce() -> Vec<Arc<Envelope>>) {
        let tail = lock(&self.tail);
        let before = self.extent.send_replace(extent);
        if let Some(tail) = tail.upgrade() {
            tail.push(stored());
        }
        drop(tail);
        if extent.first > before.first {
            for group in lock(&self.groups).values() {
                group.retained_from(extent.first);
            }
        }
    }
}

/// A panic elsewhere spoils nothing that these locks guard: each is whole between any two statements.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All topics that are stored or that somebody uses.
pub struct Topics {
    epoch: u64,
    known: Mutex<Known>,
    stored: watch::Sender<BTreeSet<Topic>>,
}

#[derive(Default)]
struct Known {
    topics: HashMap<Topic, Arc<TopicLog>>,
    /// How many may be known before those that are neither stored nor used are forgotten.
    sweep_at: usize,
}

const SWEEP_MIN: usize = 1024;

impl Topics {
    pub fn new(epoch: u64) -> Self {
        Self { epoch, known: Mutex::default(), stored: watch::Sender::default() }
    }

    pub fn get(&self, topic: &Topic) -> Arc<TopicLog> {
        self.get_at(topic, Extent::NONE)
    }

    /// The topic; `extent` is where it stands if it was not known yet.
    pub fn get_at(&self, topic: &Topic, extent: Extent) -> Arc<TopicLog> {
        let mut known = lock(&self.known);
        if let Some(found) = known.topics.get(topic) {
            return found.clone();
        }
        if known.topics.len() >= known.sweep_at {
            known.topics.retain(|_, log| log.extent().id != 0 || Arc::strong_count(log) > 1);
            known.sweep_at = SWEEP_MIN.max(known.topics.len() * 2);
        }
        let log = Arc::new(TopicLog::new(topic.clone(), self.epoch, extent));
        known.topics.insert(topic.clone(), log.clone());
        log
    }

    pub fn stored(&self) -> Vec<Arc<TopicLog>> {
        lock(&self.known).topics.values().filter(|log| log.extent().id != 0).cloned().collect()
    }

    pub fn matching(&self, pattern: &Pattern) -> Vec<Topic> {
        self.stored.borrow().iter().filter(|topic| pattern.matches(topic)).cloned().collect()
    }

    pub fn watch(&self) -> watch::Receiver<BTreeSet<Topic>> {
        self.stored.subscribe()
    }

    /// A topic is stored from now on.
    pub fn is_stored(&self, topic: &Topic) {
        self.stored.send_if_modified(|stored| !stored.contains(topic) && stored.insert(topic.clone()));
    }

    /// Every tail that somebody follows.
    pub fn followed(&self) -> Vec<Arc<Tail>> {
        lock(&self.known).topics.values().filter_map(|log| log.followed()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_that_nobody_stores_or_uses_is_forgotten() {
        let topics = Topics::new(1);
        let used = topics.get(&Topic::parse("used").unwrap());
        let stored = Topic::parse("stored").unwrap();
        topics.get_at(&stored, Extent { id: 1, ..Extent::NONE });
        topics.is_stored(&stored);
        for n in 0..SWEEP_MIN * 3 {
            topics.get(&Topic::parse(&format!("t{n}")).unwrap());
        }
        assert!(lock(&topics.known).topics.len() <= SWEEP_MIN + 1);
        assert!(Arc::ptr_eq(&used, &topics.get(&used.topic)));
        assert_eq!(topics.matching(&Pattern::parse(">").unwrap()), [stored]);
    }
}
