//! What this connection holds of its groups: each delivery has a number, until it is acknowledged.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::bridge::fault;
use crate::lane::contract::{Member, Tag};
use crate::session::outbox::SubscriptionNo;
use crate::wire::code::{Code, Fault};

#[derive(Default)]
pub struct Deliveries(Mutex<Numbered>);

#[derive(Default)]
struct Numbered {
    last: u64,
    held: HashMap<u64, Held>,
}

/// One subscription's place in the group of one topic; a subscription to a pattern has one for each topic.
#[derive(Clone)]
pub struct Membership {
    pub subscription: SubscriptionNo,
    pub number: u64,
    pub member: Arc<dyn Member>,
}

#[derive(Clone)]
struct Held {
    membership: Membership,
    tag: Tag,
}

/// What a client decides about a delivery.
#[derive(Debug, Clone, Copy)]
pub enum Settlement {
    Ack,
    /// Without a delay of its own the message waits as long as its route says.
    Nack(Option<Duration>),
}

impl Deliveries {
    /// The number of one more delivery.
    pub fn hold(&self, membership: &Membership, tag: Tag) -> u64 {
        let mut numbered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        numbered.last += 1;
        let number = numbered.last;
        numbered.held.insert(number, Held { membership: membership.clone(), tag });
        number
    }

    /// Returns once the lane has recorded it. What this connection does not hold is an error; the rest is settled all
    /// the same. Where the lane fails, the deliveries are held as before.
    pub async fn settle(&self, numbers: &[u64], settlement: Settlement) -> Result<(), Fault> {
        let (mut found, mut unknown) = (Vec::new(), Vec::new());
        {
            let mut numbered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            for number in numbers {
                match numbered.held.remove(number) {
                    Some(held) => found.push((*number, held)),
                    None => unknown.push(*number),
                }
            }
        }
        let mut failed = None;
        while let Some(membership) = found.first().map(|(_, held)| held.membership.clone()) {
            let (same, rest): (Vec<_>, Vec<_>) =
                found.into_iter().partition(|(_, held)| held.membership.number == membership.number);
            found = rest;
            let tags = same.iter().map(|(_, held)| held.tag).collect();
            let member = membership.member;
            let settled = match settlement {
                Settlement::Ack => member.ack(tags).await,
                Settlement::Nack(delay) => member.nack(tags, delay.unwrap_or_default()).await,
            };
            if let Err(error) = settled {
                self.0.lock().unwrap_or_else(PoisonError::into_inner).held.extend(same);
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

    /// Forgets what one membership held.
    pub fn forget(&self, membership: &Membership) {
        self.retain(|other| other.number != membership.number);
    }

    fn retain(&self, stays: impl Fn(&Membership) -> bool) {
        let mut numbered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        numbered.held.retain(|_, held| stays(&held.membership));
    }

    pub fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).held.clear();
    }

    pub fn len(&self) -> usize {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).held.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
