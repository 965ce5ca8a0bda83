//! Keeps the subscriptions of routes with `retain`: their rings are whole although nobody listens.

use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use super::claim::Claim;
use super::link::Link;
use super::state::State;
use super::subjects;
use super::upstream::Want;
use super::upstreams::Upstreams;
use crate::message::Lane;
use crate::policy::Policy;

/// When what failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Runs until the lane is dropped.
pub async fn run(policy: Policy, link: Arc<Link>, upstreams: Arc<Upstreams>, state: Arc<State>) {
    let (mut changes, mut states) = (policy.changes(), state.subscribe());
    let mut held: Vec<(Want, Claim)> = Vec::new();
    let mut told: Vec<Want> = Vec::new();
    loop {
        changes.borrow_and_update();
        let wanted = wanted(&policy);
        held.retain(|(want, claim)| wanted.contains(want) && !claim.is_refused());
        told.retain(|want| wanted.contains(want));
        if states.borrow_and_update().is_up() {
            for want in &wanted {
                if held.iter().any(|(other, _)| other == want) {
                    continue;
                }
                let claim = Claim::new(&upstreams, want.clone());
                match claim.opened(&link).await {
                    Ok(()) => {
                        told.retain(|other| other != want);
                        held.push((want.clone(), claim));
                    }
                    Err(error) if !told.contains(want) => {
                        told.push(want.clone());
                        warn!(subject = %want.subject, %error, "A route's history is not whole: cannot listen.");
                    }
                    Err(_) => {}
                }
            }
        }
        tokio::select! {
            // Both senders are held here, so neither can be gone.
            _ = changes.changed() => {}
            _ = states.changed() => {}
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

fn wanted(policy: &Policy) -> Vec<Want> {
    let table = policy.table();
    let retained = table.routes().iter().filter(|route| route.lane.takes(Lane::Ephemeral) && route.retain);
    retained
        .map(|route| Want {
            subject: subjects::subject(&route.nats, &route.pattern),
            group: None,
            template: route.nats.clone(),
            pattern: route.pattern.clone(),
        })
        .collect()
}
