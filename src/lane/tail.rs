//! The newest messages of one durable topic, shared by all who follow it on this bridge.
//!
//! ```text
//! storage ──one feed──▶ ┌─────────────┐ ──cursor──▶ follower, in step
//!                       │ newest 1024 │ ──cursor──▶ follower, a little behind
//!                       └─────────────┘     ✗       follower too far behind: it reads from storage until it is back
//! ```
//! The feed never waits for a follower. A follower that is overtaken is told so, and loses nothing: what it missed
//! is in storage.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::contract::LaneError;
use crate::message::{Envelope, Position};

/// How many messages a follower may be behind before it has to read from storage.
const MESSAGES_MAX: usize = 1024;
/// The same in bytes; the newest message is kept whatever its size.
const BYTES_MAX: usize = 4 << 20;

pub struct Tail {
    window: Mutex<Window>,
    /// How many messages ever came; followers wait for it to grow.
    count: watch::Sender<u64>,
    _end: DropGuard,
}

struct Window {
    newest: VecDeque<Arc<Envelope>>,
    /// The number of the oldest in `newest`, counted from the first that ever came.
    first: u64,
    bytes: usize,
    /// Everything up to here has come, or was stored before the tail began. `None`: the topic was empty.
    head: Option<Position>,
    failed: Option<LaneError>,
}

impl Tail {
    /// A tail of what is stored after `head`, and the token that tells its feed when the last follower has left.
    pub fn new(head: Option<Position>) -> (Arc<Self>, CancellationToken) {
        let ended = CancellationToken::new();
        let window = Window { newest: VecDeque::new(), first: 0, bytes: 0, head, failed: None };
        let tail = Self {
            window: Mutex::new(window),
            count: watch::Sender::new(0),
            _end: ended.clone().drop_guard(),
        };
        (Arc::new(tail), ended)
    }

    /// The feed brings what was stored next, in order.
    pub fn push(&self, envelopes: impl IntoIterator<Item = Arc<Envelope>>) {
        let mut window = self.lock();
        for envelope in envelopes {
            window.bytes += envelope.weight();
            window.head = envelope.stored.as_ref().map(|stored| stored.position.clone());
            window.newest.push_back(envelope);
            while window.newest.len() > MESSAGES_MAX || (window.bytes > BYTES_MAX && window.newest.len() > 1)
            {
                if let Some(oldest) = window.newest.pop_front() {
                    window.bytes -= oldest.weight();
                    window.first += 1;
                }
            }
        }
        let count = window.first + window.newest.len() as u64;
        drop(window);
        self.count.send_replace(count);
    }

    /// The feed has ended for good; the followers hear why after what came before.
    pub fn fail(&self, error: LaneError) {
        self.lock().failed = Some(error);
        self.count.send_modify(|_| {});
    }

    pub fn has_failed(&self) -> bool {
        self.lock().failed.is_some()
    }

    /// A cursor to everything that comes from now on, and the position of what came before.
    pub fn follow(self: &Arc<Self>) -> (Cursor, Option<Position>) {
        let window = self.lock();
        let next = window.first + window.newest.len() as u64;
        let cursor = Cursor { next, count: self.count.subscribe(), tail: self.clone() };
        (cursor, window.head.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Window> {
        // The window is whole between any two statements that change it, so a panic elsewhere spoils nothing.
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One follower's place in a tail.
pub struct Cursor {
    tail: Arc<Tail>,
    next: u64,
    count: watch::Receiver<u64>,
}

/// Why a cursor brings nothing more.
#[derive(Debug)]
pub enum Ended {
    /// The follower was overtaken: it goes on from storage.
    Behind,
    Failed(LaneError),
}

impl Cursor {
    /// The next messages, at least one and at most `max`. Cancel safe.
    pub async fn next(&mut self, max: usize) -> Result<Vec<Arc<Envelope>>, Ended> {
        loop {
            self.count.borrow_and_update();
            if let Some(found) = self.take(max) {
                return found;
            }
            // The sender is in the tail that this cursor holds, so it cannot be gone.
            let _ = self.count.changed().await;
        }
    }

    fn take(&mut self, max: usize) -> Option<Result<Vec<Arc<Envelope>>, Ended>> {
        let window = self.tail.lock();
        if self.next < window.first {
            return Some(Err(Ended::Behind));
        }
        let skip = (self.next - window.first) as usize;
        let batch: Vec<_> = window.newest.iter().skip(skip).take(max).cloned().collect();
        if batch.is_empty() {
            return window.failed.clone().map(|error| Err(Ended::Failed(error)));
        }
        self.next += batch.len() as u64;
        Some(Ok(batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Draft, Place, Stored};
    use crate::topic::Topic;

    fn envelope(entry: u64) -> Arc<Envelope> {
        let place = Place { ledger: 1, entry, index: 0 };
        let stored = Stored { partition: 0, place, position: Position::Whole(place) };
        Arc::new(Envelope::durable(Topic::parse("t").unwrap(), Draft::default().accept(), stored))
    }

    fn entries(batch: &[Arc<Envelope>]) -> Vec<u64> {
        batch.iter().map(|envelope| envelope.stored.as_ref().unwrap().place.entry).collect()
    }

    #[tokio::test]
    async fn every_follower_gets_what_comes_after_it_joined_in_order() {
        let (tail, _ended) = Tail::new(None);
        let (mut early, before) = tail.follow();
        assert_eq!(before, None);
        tail.push([envelope(1), envelope(2)]);
        let (mut late, before) = tail.follow();
        assert_eq!(before.unwrap().to_string(), "1-2-0");
        tail.push([envelope(3)]);
        assert_eq!(entries(&early.next(2).await.unwrap()), [1, 2]);
        assert_eq!(entries(&early.next(2).await.unwrap()), [3]);
        assert_eq!(entries(&late.next(9).await.unwrap()), [3]);
    }

    #[tokio::test]
    async fn a_follower_that_is_overtaken_is_told_and_the_feed_goes_on() {
        let (tail, _ended) = Tail::new(None);
        let (mut slow, _) = tail.follow();
        tail.push((0..=MESSAGES_MAX as u64).map(envelope));
        assert!(matches!(slow.next(1).await, Err(Ended::Behind)));
    }

    #[tokio::test]
    async fn the_feed_learns_that_the_last_follower_left_and_followers_learn_that_the_feed_failed() {
        let (tail, ended) = Tail::new(None);
        let (mut cursor, _) = tail.follow();
        tail.push([envelope(1)]);
        tail.fail(LaneError::Forbidden("no".into()));
        assert_eq!(entries(&cursor.next(9).await.unwrap()), [1]);
        assert!(matches!(cursor.next(9).await, Err(Ended::Failed(LaneError::Forbidden(_)))));
        drop(tail);
        assert!(!ended.is_cancelled());
        drop(cursor);
        assert!(ended.is_cancelled());
    }
}
