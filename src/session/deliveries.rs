//! What this connection holds of its groups: each delivery has a number, until it is settled or held too long.
//!
//! One timer serves all of them, however many are held: it waits for the first that is due.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use foldhash::fast::RandomState;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use crate::bridge::delivery::GroupMember;
use crate::bridge::fault;
use crate::lane::contract::Tag;
use crate::session::outbox::SubscriptionNo;
use crate::topic::Topic;
use crate::wire::code::{Code, Fault};

#[derive(Default)]
pub struct Deliveries {
    numbered: Mutex<Numbered>,
    /// Something is due earlier than the timer knows.
    earlier: Notify,
}

#[derive(Default)]
struct Numbered {
    last: u64,
    /// By numbers of our own, which nobody can choose so that they collide.
    held: HashMap<u64, Held, RandomState>,
    /// Those of `held` that may not be held for ever.
    due: BTreeSet<(Instant, u64)>,
    /// Whether the timer runs, and for when it is set: it may find there that what was due is settled.
    timed: bool,
    set_for: Option<Instant>,
}

/// One subscription's place in the group of one topic; a subscription to a pattern has one for each topic.
#[derive(Clone)]
pub struct Membership {
    pub subscription: SubscriptionNo,
    pub number: u64,
    pub member: Arc<GroupMember>,
}

#[derive(Clone)]
pub struct Held {
    membership: Membership,
    tag: Tag,
    attempt: u32,
    due: Option<Instant>,
}

/// What a client has decided about, until it is settled.
pub struct Claimed {
    pub found: Vec<(u64, Held)>,
    /// What this connection does not hold.
    unknown: Vec<u64>,
}

impl Claimed {
    /// The membership of all of it, where there is one.
    pub fn only_membership(&self) -> Option<u64> {
        let (_, first) = self.found.first().filter(|_| self.unknown.is_empty())?;
        let number = first.membership.number;
        self.found.iter().all(|(_, held)| held.membership.number == number).then_some(number)
    }
}

/// What one member held too long, each with its attempt.
type Expired = (Arc<GroupMember>, Vec<(Tag, u32)>);

/// What a client decides about a delivery.
#[derive(Debug, Clone, Copy)]
pub enum Settlement {
    Ack,
    /// Without a delay of its own the message waits as long as its route says.
    Nack(Option<Duration>),
}

impl Deliveries {
    /// The number of one more delivery.
    pub fn hold(&self, membership: &Membership, tag: Tag, attempt: u32) -> u64 {
        let mut numbered = self.lock();
        numbered.last += 1;
        let number = numbered.last;
        numbered.held.insert(number, Held { membership: membership.clone(), tag, attempt, due: None });
        number
    }

    /// A delivery may be held so long from now on. `true`: the caller has to run the timer, `expire`.
    pub fn hold_no_longer_than(&self, number: u64, timeout: Duration) -> bool {
        let mut numbered = self.lock();
        let Numbered { held, due, timed, set_for, .. } = &mut *numbered;
        // What was settled meanwhile needs no timer.
        let Some(held) = held.get_mut(&number) else { return false };
        let at = Instant::now() + timeout;
        held.due = Some(at);
        due.insert((at, number));
        if set_for.is_none_or(|set_for| at < set_for) {
            self.earlier.notify_one();
        }
        !std::mem::replace(timed, true)
    }

    /// Gives back what is held too long, as long as the connection lives. Its numbers are unknown from then on.
    pub async fn expire(&self) {
        let mut giving_back = FuturesUnordered::new();
        loop {
            let set_for = self.set_timer();
            let is_due = async {
                match set_for {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = is_due => {
                    for (member, expired) in self.take_due() {
                        giving_back.push(async move { (member.nack(expired, None).await, member) });
                    }
                }
                () = self.earlier.notified() => {}
                Some((given_back, member)) = giving_back.next(), if !giving_back.is_empty() => {
                    if let Err(error) = given_back {
                        debug!(topic = %member.topic(), %error, "What was held too long comes with the next membership.");
                    }
                }
            }
        }
    }

    fn set_timer(&self) -> Option<Instant> {
        let mut numbered = self.lock();
        numbered.set_for = numbered.due.first().map(|(at, _)| *at);
        numbered.set_for
    }

    /// What is due, by the member that holds it.
    fn take_due(&self) -> Vec<Expired> {
        let now = Instant::now();
        let mut numbered = self.lock();
        let mut taken: BTreeMap<u64, Expired> = BTreeMap::new();
        while let Some((_, number)) = numbered.due.first().copied().filter(|(at, _)| *at <= now) {
            numbered.due.pop_first();
            let Some(Held { membership, tag, attempt, .. }) = numbered.held.remove(&number) else { continue };
            let (_, expired) = taken.entry(membership.number).or_insert((membership.member, Vec::new()));
            expired.push((tag, attempt));
        }
        taken.into_values().collect()
    }

    /// Takes deliveries that the client has decided about out of its hands.
    pub fn claim(&self, numbers: &[u64]) -> Claimed {
        let mut claimed = Claimed { found: Vec::with_capacity(numbers.len()), unknown: Vec::new() };
        let mut numbered = self.lock();
        for &number in numbers {
            match numbered.remove(number) {
                Some(held) => claimed.found.push((number, held)),
                None => claimed.unknown.push(number),
            }
        }
        claimed
    }

    /// Returns once the lane has recorded it. What this connection does not hold is an error; the rest is settled all
    /// the same. Where the lane fails, the deliveries are held as before.
    pub async fn settle(&self, claimed: Claimed, settlement: Settlement) -> Result<(), Fault> {
        let Claimed { mut found, unknown } = claimed;
        let mut failed = None;
        while let Some(membership) = found.first().map(|(_, held)| held.membership.clone()) {
            let same: Vec<_> =
                found.extract_if(.., |(_, held)| held.membership.number == membership.number).collect();
            let member = membership.member;
            let settled = match settlement {
                Settlement::Ack => member.ack(same.iter().map(|(_, held)| held.tag).collect()).await,
                Settlement::Nack(delay) => {
                    member.nack(same.iter().map(|(_, held)| (held.tag, held.attempt)).collect(), delay).await
                }
            };
            if let Err(error) = settled {
                let mut numbered = self.lock();
                numbered.due.extend(same.iter().filter_map(|(number, held)| Some((held.due?, *number))));
                numbered.held.extend(same);
                drop(numbered);
                self.earlier.notify_one();
                failed = Some(fault(error));
            }
        }
        match (failed, unknown.is_empty()) {
            (Some(fault), _) => Err(fault),
            (None, true) => Ok(()),
            (None, false) => Err(Fault::new(
                Code::UnknownDelivery,
                format!(
                    "this connection does not hold delivery {unknown:?}: it was settled, given back, or never was"
                ),
            )),
        }
    }

    /// Forgets what a subscription held; its members give it back.
    pub fn give_back(&self, subscription: SubscriptionNo) {
        self.retain(|membership| membership.subscription != subscription);
    }

    /// The newest number so far.
    pub fn newest(&self) -> u64 {
        self.lock().last
    }

    /// Forgets what this connection held of a group up to a number: the group has gone elsewhere.
    pub fn forget_group(&self, topic: &Topic, group: &str, up_to: u64) {
        let mut numbered = self.lock();
        numbered.retain(|number, held| {
            let member = &held.membership.member;
            number > up_to || &**member.group() != group || member.topic() != topic
        });
    }

    /// Forgets what one membership held.
    pub fn forget(&self, membership: &Membership) {
        self.retain(|other| other.number != membership.number);
    }

    fn retain(&self, stays: impl Fn(&Membership) -> bool) {
        self.lock().retain(|_, held| stays(&held.membership));
    }

    pub fn clear(&self) {
        self.lock().retain(|_, _| false);
    }

    pub fn len(&self) -> usize {
        self.lock().held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn lock(&self) -> MutexGuard<'_, Numbered> {
        self.numbered.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Numbered {
    fn remove(&mut self, number: u64) -> Option<Held> {
        let held = self.held.remove(&number)?;
        if let Some(at) = held.due {
            self.due.remove(&(at, number));
        }
        Some(held)
    }

    fn retain(&mut self, stays: impl Fn(u64, &Held) -> bool) {
        let Numbered { held, due, .. } = self;
        held.retain(|number, held| {
            let stays = stays(*number, held);
            if let Some(at) = held.due.filter(|_| !stays) {
                due.remove(&(at, *number));
            }
            stays
        });
    }
}
