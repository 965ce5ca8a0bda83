//! What a broker passes over when the members of a group leave just as another joins, and how that is noticed.
//!
//! A broker (4.0.7 and before) that gets a first consumer after the last one has left reads the backlog of a shared or
//! key-shared subscription anew. If it is still fetching what was to come again, a rejected message or what a member
//! that left a moment before had held, it means to do so after its next ordinary reading; but that one waits at the end
//! of the topic until somebody publishes (apache/pulsar#10662). Until then the new consumer has what was being fetched
//! and nothing else.
//!
//! So a while after each subscription we look whether the broker has read everything, and yet some of the backlog is
//! neither with a consumer nor about to come again. What cures it is that no consumer is left for a moment. Whoever is
//! alone subscribes again at once. Several, on whatever bridges, have each looked since they came, and stay away long
//! enough to all be away.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use super::admin::Admin;
use super::names::Physical;
use crate::lane::contract::LaneError;

/// What was being fetched has come by then. Longer each time that it was in vain.
const FIRST_LOOK: Duration = Duration::from_millis(500);
const LOOK_MAX: Duration = Duration::from_secs(60);
/// Two looks so far apart have to see the same: a report is not of one moment, and what moves is not stuck.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// Longer than anybody who came meanwhile takes to look.
const AWAY: Duration = Duration::from_millis(1500);

/// A subscription whose backlog the broker has read to its end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Standing {
    /// Not wholly acknowledged.
    entries: u64,
    /// Messages that its consumers have.
    unacked: u64,
    /// Entries that the broker will deliver again, or when their time has come.
    waiting: u64,
    consumers: usize,
}

impl Standing {
    /// Whether the broker will not deliver some of it. A consumer that is alone knows how many entries it has; of others
    /// it is only known how many messages they have, each of which may be an entry.
    fn passes_over(&self, held: u64) -> bool {
        let with_consumers = if self.consumers == 1 { held } else { self.unacked };
        self.entries > with_consumers + self.waiting
    }
}

/// Looks after one subscription of a member.
pub struct Lookout {
    admin: Arc<Admin>,
    physical: Physical,
    group: Arc<str>,
    /// When to look next.
    next: Option<Instant>,
    looking: Option<BoxFuture<'static, Result<Option<Standing>, LaneError>>>,
    /// What the look before saw, where that was suspicious.
    seen: Option<Standing>,
    patience: Duration,
}

impl Lookout {
    pub fn new(admin: Arc<Admin>, physical: Physical, group: Arc<str>) -> Self {
        Self { admin, physical, group, next: None, looking: None, seen: None, patience: FIRST_LOOK }
    }

    /// A subscription begins.
    pub fn begin(&mut self) {
        // Not all at once, where a connection brought back many.
        let wait = self.patience.mul_f64(0.5 + fastrand::f64() / 2.0);
        (self.next, self.looking, self.seen) = (Some(Instant::now() + wait), None, None);
    }

    pub fn end(&mut self) {
        (self.next, self.looking, self.seen) = (None, None, None);
    }

    /// Returns once this subscription has to end because some of the backlog was passed over, and says how long to stay
    /// away. `held`: how many entries its member has. Cancel safe.
    pub async fn passed_over(&mut self, held: impl Fn() -> u64) -> Duration {
        loop {
            if let Some(looking) = &mut self.looking {
                let standing = looking.await;
                self.looking = None;
                if let Some(away) = self.judge(standing, held()) {
                    return away;
                }
            }
            let Some(at) = self.next else { return std::future::pending().await };
            tokio::time::sleep_until(at).await;
            self.next = None;
            let (admin, physical) = (self.admin.clone(), self.physical.clone());
            let group = self.group.clone();
            self.looking = Some(Box::pin(async move { look(&admin, &physical, &group).await }));
        }
    }

    fn judge(&mut self, standing: Result<Option<Standing>, LaneError>, held: u64) -> Option<Duration> {
        match standing {
            Ok(Some(standing)) if standing.passes_over(held) => {
                if self.seen == Some(standing) {
                    self.patience = (self.patience * 2).min(LOOK_MAX);
                    return Some(if standing.consumers == 1 { Duration::ZERO } else { AWAY });
                }
                self.seen = Some(standing);
                self.next = Some(Instant::now() + LOOK_AGAIN);
            }
            Ok(_) => self.patience = FIRST_LOOK,
            Err(LaneError::Unavailable(_)) => {
                self.patience = (self.patience * 2).min(LOOK_MAX);
                self.next = Some(Instant::now() + self.patience);
            }
            // We may not ask, and shall not be told later either.
            Err(_) => {}
        }
        None
    }
}

/// `None`: the broker still reads, or has nothing to deliver.
async fn look(admin: &Admin, physical: &Physical, group: &str) -> Result<Option<Standing>, LaneError> {
    let Some(stats) = admin.subscriptions(physical).await?.remove(group) else { return Ok(None) };
    let Some(again) = stats.again.filter(|_| stats.entries > 0) else { return Ok(None) };
    let waiting = again + stats.delayed;
    if stats.entries <= waiting || !admin.waits_at_the_end(physical, group).await? {
        return Ok(None);
    }
    Ok(Some(Standing { entries: stats.entries, unacked: stats.unacked, waiting, consumers: stats.consumers }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_consumer_has_and_nothing_waits_for_was_passed_over() {
        let standing = Standing { entries: 40, unacked: 28, waiting: 0, consumers: 1 };
        assert!(standing.passes_over(28) && !standing.passes_over(40));
        assert!(!Standing { waiting: 12, ..standing }.passes_over(28));
        // Entries may be batches: 28 messages of several consumers may be all that there is.
        let several = Standing { consumers: 2, ..standing };
        assert!(several.passes_over(0));
        assert!(!Standing { unacked: 400, ..several }.passes_over(0));
    }
}
