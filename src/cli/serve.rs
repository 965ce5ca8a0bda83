//! `serve`: the bridge in this process, until a signal ends it.

use std::sync::Arc;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};

use super::problems;
use crate::config::{self, Sources};
use crate::lane;
use crate::policy::Reloader;
use crate::server::{Carriers, Running};
use crate::telemetry::log;
use crate::telemetry::metrics::Metrics;

pub async fn serve(sources: &Sources) -> Result<()> {
    // The first thing, so that no signal finds nobody listening.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;

    let settings = config::load(sources).map_err(|problems| problems::as_error(&problems))?;
    log::to_stderr(&settings.log);
    let loaded = config::load_routes(&settings).map_err(|problems| problems::as_error(&problems))?;
    let metrics = Arc::new(Metrics::new());
    let reloader = Reloader::new(settings.server.routes.clone(), loaded, metrics.clone());
    let ephemeral =
        lane::open_ephemeral(&settings.lanes.ephemeral, reloader.policy().clone(), metrics.clone())
            .await
            .context("opening the ephemeral lane")?;
    let durable = lane::open_durable(
        &settings.lanes.durable,
        &settings.server.data_dir,
        reloader.policy().clone(),
        metrics.clone(),
    )
    .await
    .context("opening the durable lane")?;
    let lanes = Carriers { ephemeral, durable };
    let running = Running::start(settings, reloader.clone(), lanes, metrics).await?;
    greet(&running);

    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => {
                let reloader = reloader.clone();
                // It reads a file, and logs what comes of it.
                tokio::task::spawn_blocking(move || _ = reloader.reload()).await?;
            }
        }
    }
    tokio::select! {
        _ = running.drain() => Ok(()),
        _ = terminate.recv() => anyhow::bail!("ended at once by a second signal; what was under way is unknown"),
        _ = interrupt.recv() => anyhow::bail!("ended at once by a second signal; what was under way is unknown"),
    }
}

/// The first lines: where it listens, which lanes it has, and what to type next.
fn greet(running: &Running) {
    use crate::message::Lane;
    let (listen, admin, app) = (running.listen, running.admin, &running.app);
    let other = if listen.port() == 8090 { String::new() } else { format!(" --url ws://{listen}/ws") };
    println!(
        "twinspan {} listens on ws://{listen}/ws for clients, http://{admin} for operators",
        env!("CARGO_PKG_VERSION")
    );
    println!("  ephemeral lane: {}", app.backend(Lane::Ephemeral));
    println!("  durable lane:   {}", app.backend(Lane::Durable));
    println!("Next, in another terminal:");
    // As it was called here, so that the lines can be pasted.
    let program = std::env::args().next().unwrap_or_else(|| "twinspan".into());
    println!("  {program} sub 'orders.>' --last 10{other}");
    println!("  {program} pub orders.eu.created '{{\"n\":1}}'{other}");
}
