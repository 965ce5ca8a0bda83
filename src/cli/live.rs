//! `check --live`: the brokers are asked too.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

use crate::config::Report;
use crate::config::settings::Settings;
use crate::lane::contract::{Ear, EphemeralLane, LaneState};
use crate::lane::settings::{DurableBackend, EphemeralBackend};
use crate::lane::{open_durable, open_ephemeral};
use crate::message::{Envelope, Lane};
use crate::origin::Problem;
use crate::policy::Policy;
use crate::policy::table::{Route, RouteTable};
use crate::telemetry::metrics::Metrics;

/// How long a broker may take to let us in.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

pub async fn check(report: Report) -> ExitCode {
    let Report { settings, table, .. } = report;
    let policy = Policy::new(table.unwrap_or_default());
    let (ephemeral, durable) =
        tokio::join!(ephemeral(&settings, policy.clone()), durable(&settings, policy.clone()));
    let mut good = true;
    for (lane, examined) in [(Lane::Ephemeral, ephemeral), (Lane::Durable, durable)] {
        match examined {
            Ok(said) => println!("{lane} lane: {said}"),
            Err(problems) => {
                good = false;
                for problem in problems {
                    eprintln!("{lane} lane: {problem}");
                }
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn ephemeral(settings: &Settings, policy: Policy) -> Result<String, Vec<Problem>> {
    let lanes = &settings.lanes.ephemeral;
    if lanes.backend == EphemeralBackend::Memory {
        return Ok("in this process, nobody to ask".into());
    }
    let table = policy.table();
    let metrics = Arc::new(Metrics::new());
    let lane = open_ephemeral(lanes, policy, metrics).await.map_err(|error| vec![problem(&error)])?;
    let url = lanes.url.join(", ");
    let examined = async {
        up(lane.state()).await.map_err(|why| vec![problem(&format!("{url}: {why}"))])?;
        let took = lane.probe().await.map_err(|error| vec![problem(&error)])?;
        let refused = refused(&*lane, &table).await;
        if refused.is_empty() {
            let took = took.as_secs_f64() * 1000.0;
            return Ok(format!("{url} answers in {took:.1} ms and allows what the routes subscribe to"));
        }
        Err(refused)
    };
    let examined = examined.await;
    lane.close().await;
    examined
}

/// The routes whose subjects may not be subscribed to.
async fn refused(lane: &dyn EphemeralLane, table: &RouteTable) -> Vec<Problem> {
    let mut refused = Vec::new();
    for (route, written) in table.entries().filter(|(route, _)| route.lane.takes(Lane::Ephemeral)) {
        if let Err(error) = lane.listen(&route.pattern, None, 0, Arc::new(Deaf)).await {
            refused.push(Problem::new(written.route.clone(), format!("route `{}`: {error}", route.name)));
        }
    }
    refused
}

struct Deaf;

impl Ear for Deaf {
    fn hear(&self, _: &Arc<Route>, _: &Arc<Envelope>) {}

    fn missed(&self) {}
}

async fn durable(settings: &Settings, policy: Policy) -> Result<String, Vec<Problem>> {
    let lanes = &settings.lanes.durable;
    if lanes.backend == DurableBackend::Embedded {
        return Ok("embedded, nobody to ask".into());
    }
    let metrics = Arc::new(Metrics::new());
    let lane = open_durable(lanes, &settings.server.data_dir, policy, metrics)
        .await
        .map_err(|error| vec![problem(&error)])?;
    let url = lanes.url.join(", ");
    let examined = async {
        // Asked first: where a namespace is not there the lane does not come up.
        let found = lane.examine().await;
        if let Some(found) = found.as_ref().ok().filter(|found| !found.is_empty()) {
            return Err(found.clone());
        }
        up(lane.state()).await.map_err(|why| vec![problem(&format!("{url}: {why}"))])?;
        found.map_err(|error| vec![problem(&error)])?;
        let took = lane.probe().await.map_err(|error| vec![problem(&error)])?.as_secs_f64() * 1000.0;
        Ok(format!("{url} stores in {took:.1} ms and keeps what the routes promise"))
    };
    let examined = examined.await;
    lane.close().await;
    examined
}

/// Waits until the lane is up; why it is not, where that takes too long.
async fn up(mut state: watch::Receiver<LaneState>) -> Result<(), String> {
    let came = timeout(CONNECT_TIMEOUT, state.wait_for(LaneState::is_up)).await.is_ok();
    match &*state.borrow() {
        _ if came => Ok(()),
        LaneState::Down(why) => Err(why.clone()),
        LaneState::Up => Ok(()),
    }
}

fn problem(error: &dyn std::fmt::Display) -> Problem {
    Problem::new(Default::default(), error.to_string())
}
