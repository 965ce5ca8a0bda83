//! The rings: the newest messages of each ephemeral topic, for those who come late.
//!
//! A ring is as long as its route says. All rings together are bounded in bytes: the topic that was used least
//! recently goes first, whole. Nothing in here locks: a ring is read in the same critical section in which an ear is
//! placed, and written in the one in which a message finds its ears, which is what makes history and live one stream.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;

use crate::message::{Envelope, MessageId};
use crate::policy::table::Route;
use crate::topic::{Pattern, Topic};

pub struct History {
    rings: HashMap<Topic, Ring>,
    /// The topics by when they were last used, the longest ago first.
    used: BTreeMap<u64, Topic>,
    clock: u64,
    bytes: usize,
    bytes_max: usize,
}

#[derive(Default)]
struct Ring {
    /// Oldest first.
    kept: VecDeque<Arc<Envelope>>,
    ids: HashSet<MessageId>,
    used: u64,
}

impl History {
    pub fn new(bytes_max: usize) -> Self {
        Self { rings: HashMap::new(), used: BTreeMap::new(), clock: 0, bytes: 0, bytes_max }
    }

    /// Adds a topic's newest message to its ring of at most `length`. `false` where it is not kept: its id is there
    /// already, it alone is larger than all rings may be, or it is a request, which must not be answered again to a
    /// requester that has gone.
    pub fn keep(&mut self, envelope: &Arc<Envelope>, length: usize) -> bool {
        let weight = envelope.weight();
        if length == 0 || weight > self.bytes_max || envelope.reply_to.is_some() {
            return false;
        }
        let ring = self.ring(&envelope.topic);
        if let Some(id) = envelope.message.id
            && !ring.ids.insert(id)
        {
            return false;
        }
        ring.kept.push_back(envelope.clone());
        let mut gone = 0;
        while ring.kept.len() > length {
            gone += ring.pop_oldest();
        }
        self.bytes = self.bytes + weight - gone;
        while self.bytes > self.bytes_max {
            self.make_room(&envelope.topic);
        }
        true
    }

    /// Takes back a message that was kept and then not sent.
    pub fn take_back(&mut self, topic: &Topic, id: MessageId) {
        if let Some(ring) = self.rings.get_mut(topic)
            && ring.ids.remove(&id)
            && let Some(at) = ring.kept.iter().rposition(|kept| kept.message.id == Some(id))
            && let Some(kept) = ring.kept.remove(at)
        {
            self.bytes -= kept.weight();
            if ring.kept.is_empty() {
                self.used.remove(&ring.used);
                self.rings.remove(topic);
            }
        }
    }

    /// The newest `last` of each matching topic that still has a route here, topic by topic, oldest first.
    pub fn newest(
        &mut self,
        pattern: &Pattern,
        last: usize,
        route_of: impl Fn(&Topic) -> Option<Arc<Route>>,
    ) -> Vec<(Arc<Route>, Arc<Envelope>)> {
        let mut found = Vec::new();
        for topic in self.topics(pattern) {
            let Some(route) = route_of(&topic) else { continue };
            let ring = self.ring(&topic);
            let skip = ring.kept.len().saturating_sub(last.min(route.history));
            found.extend(ring.kept.iter().skip(skip).map(|kept| (route.clone(), kept.clone())));
        }
        found
    }

    fn topics(&self, pattern: &Pattern) -> Vec<Topic> {
        if let Some(topic) = pattern.topic() {
            return self.rings.contains_key(&topic).then_some(topic).into_iter().collect();
        }
        let mut topics: Vec<_> = self.rings.keys().filter(|topic| pattern.matches(topic)).cloned().collect();
        topics.sort_unstable();
        topics
    }

    /// A topic's ring, made where there is none, and used just now.
    fn ring(&mut self, topic: &Topic) -> &mut Ring {
        self.clock += 1;
        let ring = self.rings.entry(topic.clone()).or_default();
        self.used.remove(&ring.used);
        self.used.insert(self.clock, topic.clone());
        ring.used = self.clock;
        ring
    }

    /// Drops the topic that was used longest ago; where only the newest is left, its oldest message.
    fn make_room(&mut self, newest: &Topic) {
        match self.used.pop_first() {
            Some((_, topic)) if topic != *newest => {
                if let Some(ring) = self.rings.remove(&topic) {
                    self.bytes -= ring.kept.iter().map(|kept| kept.weight()).sum::<usize>();
                }
            }
            last => {
                self.used.extend(last);
                if let Some(ring) = self.rings.get_mut(newest) {
                    self.bytes -= ring.pop_oldest();
                }
            }
        }
    }
}

impl Ring {
    /// What the oldest weighed.
    fn pop_oldest(&mut self) -> usize {
        let Some(kept) = self.kept.pop_front() else { return 0 };
        if let Some(id) = kept.message.id {
            self.ids.remove(&id);
        }
        kept.weight()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Draft, ReplyTo};

    fn message(topic: &str, bytes: usize) -> Arc<Envelope> {
        let draft = Draft { payload: vec![b'x'; bytes].into(), ..Draft::default() };
        Arc::new(Envelope::ephemeral(Topic::parse(topic).unwrap(), draft.accept(), None))
    }

    fn ids(history: &mut History, pattern: &str, last: usize) -> Vec<MessageId> {
        let route = Arc::new(crate::lane::testing::ephemeral(">"));
        let found = history.newest(&Pattern::parse(pattern).unwrap(), last, |_| Some(route.clone()));
        found.iter().map(|(_, envelope)| envelope.message.id.unwrap()).collect()
    }

    #[test]
    fn a_ring_holds_the_newest_of_its_topic_each_once_and_gives_them_oldest_first() {
        let mut history = History::new(1 << 20);
        let sent: Vec<_> = (0..5).map(|_| message("a.b", 1)).collect();
        let sent_ids: Vec<_> = sent.iter().map(|envelope| envelope.message.id.unwrap()).collect();
        for envelope in &sent {
            assert!(history.keep(envelope, 3));
            assert!(!history.keep(envelope, 3), "the same message again");
        }
        assert_eq!(ids(&mut history, "a.*", 9), sent_ids[2..]);
        assert_eq!(ids(&mut history, "a.b", 2), sent_ids[3..]);
        assert_eq!(ids(&mut history, "b", 2), []);
        history.take_back(&sent[4].topic, sent_ids[4]);
        assert_eq!(ids(&mut history, "a.b", 2), sent_ids[2..4]);
    }

    #[test]
    fn the_topic_used_least_recently_makes_room_and_what_is_too_large_is_not_kept() {
        let each = message("a", 100).weight();
        let mut history = History::new(3 * each);
        let [a, b, c, d] = ["a", "b", "c", "d"].map(|topic| message(topic, 100));
        for envelope in [&a, &b, &c] {
            history.keep(envelope, 9);
        }
        ids(&mut history, "a", 1);
        history.keep(&d, 9);
        let kept = |envelope: &Arc<Envelope>| envelope.message.id.unwrap();
        assert_eq!(ids(&mut history, ">", 9), [kept(&a), kept(&c), kept(&d)], "b was used least recently");

        assert!(!history.keep(&message("e", 3 * each), 9));
        assert_eq!(ids(&mut history, ">", 9).len(), 3, "and nothing made room for it");

        let mut own = Vec::new();
        for _ in 0..5 {
            own.push(message("f", 100));
            history.keep(&own[own.len() - 1], 9);
        }
        assert_eq!(ids(&mut history, ">", 9), own[2..].iter().map(kept).collect::<Vec<_>>());
        assert_eq!(history.bytes, 3 * each);
    }

    #[test]
    fn a_request_is_not_kept_and_a_route_may_keep_nothing() {
        let mut history = History::new(1 << 20);
        let reply_to = ReplyTo { address: "r".into(), timeout: None };
        let request =
            Envelope::ephemeral(Topic::parse("a").unwrap(), Draft::default().accept(), Some(reply_to));
        assert!(!history.keep(&Arc::new(request), 9));
        assert!(!history.keep(&message("a", 1), 0));
        assert!(history.rings.is_empty());
    }
}
