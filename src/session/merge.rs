//! The two halves of a topic that is sent live first, as one feed hears them: each message once, from the half that
//! brings it first.
//!
//! ```text
//! live ────▶ held, until storage has come to the first of its bridge ──▶ out, and ahead until storage brings it too
//! storage ─▶ ahead? then it was out already : out, late
//! ```
//! Storage is in order and misses nothing, so it repairs what was lost on the live half. What was published before the
//! feed listened comes from storage, however late it is stored: so the first message of each bridge comes from there,
//! too, and those that are heard meanwhile wait for it, or they would come before what was published before them. (Of
//! the partitions of a topic one may be behind another; what was published just before may then come late.)

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::lane::recent::Recent;
use crate::message::{Envelope, LiveNo, MessageId};

/// How long a stored copy is waited for: a publish has failed by then.
const PATIENCE: Duration = Duration::from_secs(10);
/// Live messages of one bridge that wait. What comes after that comes from storage.
const HELD_MAX: usize = 1024;
/// So many came live and not from storage; of what is forgotten beyond that storage brings a second copy.
const AHEAD_MAX: usize = 64 << 10;
/// Bridges that are told apart. One that is forgotten begins anew, as it did at first.
const BRIDGES_MAX: usize = 64;

pub struct Merge {
    /// Came live, and has yet to come from storage.
    ahead: HashMap<MessageId, Instant>,
    /// The same, the oldest first, with what has come from storage since.
    order: VecDeque<(Instant, MessageId)>,
    /// Storage brought it first.
    stored: Recent,
    bridges: HashMap<u64, Bridge>,
}

#[derive(Default)]
struct Bridge {
    /// Nothing is waited for any more.
    flows: bool,
    /// The first that was heard, and how long storage has to come to it.
    first: Option<(u64, Instant)>,
    held: VecDeque<Arc<Envelope>>,
}

impl Merge {
    /// `stored` are those that were brought from storage up to here.
    pub fn new(stored: Recent) -> Self {
        Self { ahead: HashMap::new(), order: VecDeque::new(), stored, bridges: HashMap::new() }
    }

    /// The live half brings a message. Handed back: it is its turn.
    pub fn live(&mut self, envelope: Arc<Envelope>, now: Instant) -> Option<Arc<Envelope>> {
        // A native one is on this half alone.
        let Some(id) = envelope.message.id else { return Some(envelope) };
        if self.stored.contains(&id) || self.ahead.contains_key(&id) {
            return None;
        }
        if let Some(no) = LiveNo::of(&envelope.message)
            && let Some(bridge) = self.bridge(no.bridge)
            && !bridge.flows
        {
            bridge.first.get_or_insert((no.number, now + PATIENCE));
            if bridge.held.len() < HELD_MAX {
                bridge.held.push_back(envelope);
            }
            return None;
        }
        self.goes_ahead(id, now);
        Some(envelope)
    }

    /// Storage brings a message: whether it is new, and whose turn it is behind it.
    pub fn stored(&mut self, envelope: &Arc<Envelope>, now: Instant) -> (bool, Vec<Arc<Envelope>>) {
        let Some(id) = envelope.message.id else { return (true, Vec::new()) };
        let is_new = self.ahead.remove(&id).is_none();
        if is_new {
            self.stored.insert(id);
        }
        // Whichever bridge it came from: what was spooled has no number in storage.
        for bridge in self.bridges.values_mut() {
            bridge.held.retain(|held| held.message.id != Some(id));
        }
        let Some(no) = LiveNo::of(&envelope.message) else { return (is_new, Vec::new()) };
        let Some(bridge) = self.bridge(no.bridge) else { return (is_new, Vec::new()) };
        match bridge.first {
            Some((first, _)) if !bridge.flows && no.number >= first => {
                (is_new, self.let_flow(no.bridge, now))
            }
            _ => (is_new, Vec::new()),
        }
    }

    /// Whose turn it is because what they waited for does not come.
    pub fn expire(&mut self, now: Instant) -> Vec<Arc<Envelope>> {
        while let Some((since, id)) = self.order.front()
            && *since + PATIENCE < now
        {
            self.ahead.remove(id);
            self.order.pop_front();
        }
        let is_over = |bridge: &Bridge| !bridge.flows && bridge.first.is_some_and(|(_, until)| until < now);
        let over: Vec<_> =
            self.bridges.iter().filter(|(_, bridge)| is_over(bridge)).map(|(name, _)| *name).collect();
        over.into_iter().flat_map(|bridge| self.let_flow(bridge, now)).collect()
    }

    /// What came live and has yet to come from storage.
    pub fn ahead(&self) -> impl Iterator<Item = &MessageId> {
        self.ahead.keys()
    }

    fn let_flow(&mut self, bridge: u64, now: Instant) -> Vec<Arc<Envelope>> {
        let Some(bridge) = self.bridges.get_mut(&bridge) else { return Vec::new() };
        bridge.flows = true;
        let held = std::mem::take(&mut bridge.held);
        for id in held.iter().filter_map(|envelope| envelope.message.id) {
            self.goes_ahead(id, now);
        }
        held.into()
    }

    fn goes_ahead(&mut self, id: MessageId, now: Instant) {
        while let Some((_, oldest)) = self.order.front()
            && (self.ahead.len() >= AHEAD_MAX || !self.ahead.contains_key(oldest))
        {
            self.ahead.remove(oldest);
            self.order.pop_front();
        }
        self.ahead.insert(id, now);
        self.order.push_back((now, id));
    }

    fn bridge(&mut self, name: u64) -> Option<&mut Bridge> {
        if self.bridges.len() >= BRIDGES_MAX && !self.bridges.contains_key(&name) {
            self.bridges.retain(|_, bridge| !bridge.flows);
            if self.bridges.len() >= BRIDGES_MAX {
                return None;
            }
        }
        Some(self.bridges.entry(name).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Draft, LIVE};
    use crate::topic::Topic;

    fn message(number: u64) -> Arc<Envelope> {
        let mut message = Draft { payload: number.to_string().into(), ..Draft::default() }.accept();
        message.headers.insert(LIVE.into(), LiveNo { bridge: 7, number }.to_string());
        Arc::new(Envelope::ephemeral(Topic::parse("t").unwrap(), message, None))
    }

    fn numbers(envelopes: &[Arc<Envelope>]) -> Vec<u64> {
        envelopes.iter().map(|envelope| LiveNo::of(&envelope.message).unwrap().number).collect()
    }

    #[test]
    fn the_first_live_message_of_a_bridge_and_what_is_heard_meanwhile_wait_for_storage() {
        let (mut merge, now) = (Merge::new(Recent::default()), Instant::now());
        let [two, three, four, five] = [2, 3, 4, 5].map(message);
        assert!(merge.live(three.clone(), now).is_none());
        assert!(merge.live(four.clone(), now).is_none());
        let (is_new, released) = merge.stored(&two, now);
        assert!(is_new && released.is_empty());
        let (is_new, released) = merge.stored(&three, now);
        assert_eq!((is_new, numbers(&released)), (true, vec![4]));
        assert!(merge.live(five, now).is_some(), "from now on nothing waits");
        assert!(!merge.stored(&four, now).0);
    }

    #[test]
    fn what_waits_and_comes_from_storage_without_its_number_is_not_brought_again() {
        let (mut merge, now) = (Merge::new(Recent::default()), Instant::now());
        let [one, two, three] = [1, 2, 3].map(message);
        assert!([&one, &two].into_iter().all(|envelope| merge.live(envelope.clone(), now).is_none()));
        let mut spooled = one.message.clone();
        spooled.headers.remove(LIVE);
        let spooled = Arc::new(Envelope::ephemeral(one.topic.clone(), spooled, None));
        assert!(merge.stored(&spooled, now).0);
        let (_, released) = merge.stored(&three, now);
        assert_eq!(numbers(&released), [2]);
    }

    #[test]
    fn each_message_comes_once_from_whichever_half_is_first() {
        let (mut merge, now) = (Merge::new(Recent::default()), Instant::now());
        let [first, a, b] = [1, 2, 3].map(message);
        assert!(merge.live(first.clone(), now).is_none() && merge.stored(&first, now).0);
        assert!(merge.live(a.clone(), now).is_some());
        assert!(merge.live(a.clone(), now).is_none(), "the same again");
        assert!(!merge.stored(&a, now).0);
        assert!(merge.stored(&b, now).0, "lost on the live half");
        assert!(merge.live(b, now).is_none(), "and late there");
        assert_eq!(merge.ahead().count(), 0);
    }

    #[test]
    fn what_failed_is_waited_for_until_a_later_one_is_stored_or_the_time_is_over() {
        let now = Instant::now();
        let [three, four, five] = [3, 4, 5].map(message);
        let mut merge = Merge::new(Recent::default());
        assert!([&three, &five].into_iter().all(|envelope| merge.live(envelope.clone(), now).is_none()));
        let (is_new, released) = merge.stored(&four, now);
        assert_eq!((is_new, numbers(&released)), (true, vec![3, 5]), "3 was never stored");

        let mut merge = Merge::new(Recent::default());
        assert!(merge.live(three, now).is_none());
        assert!(merge.expire(now + PATIENCE).is_empty());
        let later = now + PATIENCE + Duration::from_millis(1);
        assert_eq!(numbers(&merge.expire(later)), [3]);
        assert!(merge.live(four, later).is_some());
        merge.expire(later + PATIENCE * 2);
        assert_eq!(merge.ahead().count(), 0, "what is never stored is forgotten");
    }
}
