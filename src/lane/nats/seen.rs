//! Which messages came to this bridge lately, and when.
//!
//! A message that this bridge publishes comes back as an echo, and one that two subscriptions match comes twice. The
//! first sight puts it in its ring. For an ear that was placed after that, the message is history: when another copy
//! comes, that ear skips it.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::message::MessageId;

/// Copies of one message come milliseconds apart; where the server froze in between, seconds.
const WINDOW: Duration = Duration::from_secs(10);
/// At a rate that fills this within the window, the oldest is forgotten sooner.
const IDS_MAX: usize = 1 << 16;

/// A point on the lane's own clock, which ticks with every sight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Tick(pub u64);

#[derive(Default)]
pub struct Seen {
    clock: Tick,
    first: HashMap<MessageId, Tick>,
    order: VecDeque<(Instant, MessageId)>,
}

impl Seen {
    /// After everything that was seen so far.
    pub fn now(&self) -> Tick {
        self.clock
    }

    /// Notes a message. `Some`: it had been seen, then.
    pub fn note(&mut self, id: MessageId) -> Option<Tick> {
        let now = Instant::now();
        while let Some((since, oldest)) = self.order.front()
            && (now.duration_since(*since) > WINDOW || self.order.len() >= IDS_MAX)
        {
            self.first.remove(oldest);
            self.order.pop_front();
        }
        if let Some(tick) = self.first.get(&id) {
            return Some(*tick);
        }
        self.clock.0 += 1;
        self.first.insert(id, self.clock);
        self.order.push_back((now, id));
        None
    }

    /// The message was not sent after all.
    pub fn forget(&mut self, id: MessageId) {
        self.first.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_new_once_and_known_until_it_is_forgotten() {
        let mut seen = Seen::default();
        let (a, b) = (MessageId::new(), MessageId::new());
        assert_eq!(seen.note(a), None);
        let between = seen.now();
        assert_eq!(seen.note(b), None);
        assert!(seen.note(a).unwrap() <= between && seen.note(b).unwrap() > between);
        seen.forget(a);
        assert_eq!(seen.note(a), None);
        for _ in 0..IDS_MAX {
            seen.note(MessageId::new());
        }
        assert_eq!((seen.order.len(), seen.first.len()), (IDS_MAX, IDS_MAX));
        assert_eq!(seen.note(b), None, "forgotten when so many others came");
    }
}
