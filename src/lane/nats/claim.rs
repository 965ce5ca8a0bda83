//! Taking a place: a claim opens an upstream and keeps it open, an ear is placed on the upstreams of its pattern.

use std::sync::{Arc, Weak};

use async_nats::Subscriber;
use futures_util::StreamExt;
use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::link::Link;
use super::upstream::{Drain, Place, Upstream, Want};
use super::upstreams::Upstreams;
use crate::lane::contract::{Ear, LaneError};
use crate::message::Envelope;
use crate::policy::table::Route;
use crate::topic::Pattern;

/// How many may ask at once whether a task has caught up. Full: whoever asks waits.
const MARKS_MAX: usize = 16;

/// A hold on an upstream. The last one to go takes it down.
pub struct Claim {
    upstreams: Arc<Upstreams>,
    upstream: Arc<Upstream>,
    want: Want,
}

impl Claim {
    /// The upstream is made where there is none.
    pub fn new(upstreams: &Arc<Upstreams>, want: Want) -> Self {
        Self { upstream: upstreams.hold(&want), upstreams: upstreams.clone(), want }
    }

    /// Returns once the server has the subscription: the first to come asks for it, the others wait for that.
    pub async fn opened(&self, link: &Arc<Link>) -> Result<(), LaneError> {
        self.upstream.opened.get_or_try_init(|| self.open(link)).await.map(|_| ())
    }

    pub fn is_refused(&self) -> bool {
        self.upstream.refused.borrow().is_some()
    }

    async fn open(&self, link: &Arc<Link>) -> Result<Drain, LaneError> {
        let Upstream { subject, group, refused, .. } = &*self.upstream;
        let subscriber =
            self.upstreams.in_order(&self.upstream, link.subscribe(subject, group.as_deref())).await?;
        // A refusal is sent before the first echo and told by a task that was woken before that echo came: it has had
        // its turn when the second is back.
        let granted = async {
            link.echo().await?;
            link.echo().await
        };
        let mut refused = refused.subscribe();
        let granted = tokio::select! {
            biased;
            _ = refused.wait_for(Option::is_some) => Ok(()),
            granted = granted => granted,
        };
        if let Some(why) = refused.borrow().clone() {
            return Err(why);
        }
        granted?;
        self.settle().await;
        let (marks, marked) = mpsc::channel(MARKS_MAX);
        let upstream = Arc::downgrade(&self.upstream);
        let draining = drain(self.upstreams.clone(), upstream, link.clone(), subscriber, marked);
        Ok(Drain { task: AbortOnDropHandle::new(tokio::spawn(draining)), marks })
    }

    /// Returns once the older upstreams have handed on what came before our echo. What was published before our
    /// subscription comes to them alone, and must be in its ring before what came to us is put there.
    async fn settle(&self) {
        let settling = self.upstreams.older(&self.upstream).into_iter().map(async |older| {
            // One that is being opened is waited for; one that could not be has nothing to hand on.
            let Ok(drain) = older.opened.get_or_try_init(|| std::future::ready(Err(()))).await else {
                return;
            };
            let (mark, passed) = oneshot::channel();
            // Where the task has ended, nothing is behind.
            if drain.marks.send(mark).await.is_ok() {
                let _ = passed.await;
            }
        });
        join_all(settling).await;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.upstreams.release(&self.upstream);
    }
}

/// Hands on what a subscription brings. It never waits: where it did, the client library would drop messages.
async fn drain(
    upstreams: Arc<Upstreams>,
    upstream: Weak<Upstream>,
    link: Arc<Link>,
    mut from: Subscriber,
    mut marks: mpsc::Receiver<oneshot::Sender<()>>,
) {
    loop {
        tokio::select! {
            // A mark is looked at only where no message waits.
            biased;
            message = from.next() => {
                let (Some(message), Some(upstream)) = (message, upstream.upgrade()) else { return };
                upstreams.arrived(&upstream, message, link.connects());
            }
            Some(mark) = marks.recv() => {
                let _ = mark.send(());
            }
        }
    }
}

/// An ear on all upstreams of its pattern. Dropping it ends the hearing.
pub struct Placed {
    upstreams: Arc<Upstreams>,
    pattern: Pattern,
    place: Arc<Place>,
    claims: Vec<Claim>,
}

impl Placed {
    pub fn new(upstreams: Arc<Upstreams>, pattern: Pattern, ear: Arc<dyn Ear>, connects: u64) -> Self {
        Self { upstreams, pattern, place: Arc::new(Place::new(ear, connects)), claims: Vec::new() }
    }

    pub fn add(&mut self, claim: Claim) {
        self.claims.push(claim);
    }

    /// Begins to hear, and returns what came before.
    pub fn begin(&self, last: usize) -> Vec<(Arc<Route>, Arc<Envelope>)> {
        let upstreams = self.claims.iter().map(|claim| (&*claim.upstream, &claim.want));
        self.upstreams.begin(upstreams, &self.place, &self.pattern, last)
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        for claim in &self.claims {
            claim.upstream.displace(&claim.want, &self.place);
        }
    }
}
