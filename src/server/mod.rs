//! The process: build, serve, drain in order.
//!
//! ```text
//! SIGTERM ─▶ not ready ─▶ no new connections ─▶ DRAINING, what is under way is answered, 1001 ─▶ lanes close ─▶ end
//! ```

mod accept;
mod admin;
pub mod app;
mod brokers;
mod console;
mod gateway;
mod monitor;
mod rest;
mod socket;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::DefaultBodyLimit;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

use crate::bridge::both::Both;
use crate::bridge::catalog::Catalog;
use crate::bridge::outage::Outage;
use crate::bridge::{Bridge, Notice};
use crate::config::settings::Settings;
use crate::lane::contract::{DurableLane, EphemeralLane};
use crate::lane::install_crypto;
use crate::lane::journal::JournalError;
use crate::policy::Reloader;
use crate::telemetry::metrics::Metrics;
use crate::telemetry::trace::{TraceError, Tracer};
use app::App;
use monitor::Monitor;

/// Over how much time clients are asked to come back, so that they do not come all at once.
const RECONNECT_SPREAD: Duration = Duration::from_secs(5);

/// What carries the lanes of a bridge.
pub struct Carriers {
    pub ephemeral: Arc<dyn EphemeralLane>,
    pub durable: Arc<dyn DurableLane>,
}

/// A bridge that serves.
pub struct Running {
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub app: Arc<App>,
    stop: CancellationToken,
    stop_admin: CancellationToken,
    tasks: TaskTracker,
}

#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(
        "cannot listen on {address}: {source}. Set server.{setting} to another address, or stop what holds it"
    )]
    Listen { address: SocketAddr, setting: &'static str, source: std::io::Error },
    #[error("cannot read the declared topics in {dir}")]
    Catalog { dir: String, source: std::io::Error },
    #[error("the spool cannot be opened; messages may wait in it for the durable lane")]
    Spool(#[source] JournalError),
    #[error(transparent)]
    Trace(TraceError),
}

impl Running {
    /// Binds both listeners and serves.
    pub async fn start(
        settings: Settings,
        reloader: Reloader,
        lanes: Carriers,
        metrics: Arc<Metrics>,
    ) -> Result<Self, StartError> {
        let dir = &settings.server.data_dir;
        let catalog = Catalog::open(dir)
            .map_err(|source| StartError::Catalog { dir: dir.display().to_string(), source })?;
        let (policy, catalog) = (reloader.policy().clone(), Arc::new(catalog));
        let outage = Outage::open(
            lanes.durable.clone(),
            Both::new(lanes.durable.clone(), lanes.ephemeral.clone(), metrics.clone()),
            &settings.lanes.durable,
            dir,
            policy.clone(),
            catalog.clone(),
            metrics.clone(),
        );
        let outage = outage.await.map_err(StartError::Spool)?;
        let publish_timeout = settings.lanes.durable.publish_timeout;
        let mut bridge =
            Bridge::new(policy, lanes.ephemeral, lanes.durable, outage, catalog, metrics, publish_timeout);
        install_crypto();
        bridge.tracer = Tracer::open(&settings.trace, settings.lanes.systems()).map_err(StartError::Trace)?;
        let bridge = Arc::new(bridge);
        let bind = async |address: SocketAddr, setting| {
            let failed = |source| StartError::Listen { address, setting, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let address = listener.local_addr().map_err(failed)?;
            Ok((listener, address))
        };
        let (public, listen) = bind(settings.server.listen, "listen").await?;
        let (operators, admin) = bind(settings.server.admin, "admin").await?;
        let app = Arc::new(App::new(bridge, reloader, settings, listen));
        let (stop, stop_admin, tasks) =
            (CancellationToken::new(), app.stop_admin.clone(), TaskTracker::new());
        let router =
            gateway::routes().merge(rest::routes()).layer(DefaultBodyLimit::max(app.session.max_message));
        let timeout = app.session.handshake_timeout;
        let serving =
            accept::serve(public, router.with_state(app.clone()), timeout, tasks.clone(), stop.clone());
        tasks.spawn(serving);
        let router = admin::routes().with_state(app.clone());
        let serving = accept::serve(operators, router, timeout, tasks.clone(), stop_admin.clone());
        tasks.spawn(serving);
        let bridge = app.bridge.clone();
        let until = stop_admin.clone();
        tasks.spawn(async move { _ = until.run_until_cancelled(bridge.watch()).await });
        let (bridge, until) = (app.bridge.clone(), stop_admin.clone());
        tasks.spawn(async move {
            let looking =
                bridge.groups.run(bridge.durable.clone(), bridge.policy.clone(), bridge.metrics.clone());
            _ = until.run_until_cancelled(looking).await;
        });
        let (bridge, until) = (app.bridge.clone(), stop_admin.clone());
        tasks.spawn(async move { _ = until.run_until_cancelled(bridge.canary.run()).await });
        let (outage, until) = (app.bridge.outage.clone(), stop_admin.clone());
        tasks.spawn(async move { _ = until.run_until_cancelled(outage.run()).await });
        let (watched, until) = (app.clone(), stop_admin.clone());
        tasks.spawn(async move { _ = until.run_until_cancelled(Monitor::run(watched)).await });
        tasks.spawn(app.reloader.clone().watch(stop_admin.clone()));
        Ok(Self { listen, admin, app, stop, stop_admin, tasks })
    }

    /// Ends in order, within the grace: clients are told, what is under way is answered, the lanes close.
    /// Returns whether everything ended in time.
    pub async fn drain(self) -> bool {
        let grace = self.app.settings.server.grace;
        info!(
            ?grace,
            connections = self.app.roster.len(),
            "Draining: no new connections, clients are told to reconnect."
        );
        self.app.start_draining();
        self.stop.cancel();
        self.app.bridge.notify(Notice::Draining { reconnect_within: RECONNECT_SPREAD });
        self.app.sessions.close();
        let ended = tokio::time::timeout(grace, async {
            self.app.sessions.wait().await;
            self.app.bridge.ids.close();
            let durable = async {
                self.app.bridge.outage.close().await;
                self.app.bridge.durable.close().await;
            };
            // Everything was answered and written, so nothing more is traced.
            tokio::join!(self.app.bridge.ephemeral.close(), durable, self.app.bridge.tracer.close());
            self.stop_admin.cancel();
            self.tasks.close();
            self.tasks.wait().await;
        })
        .await
        .is_ok();
        if !ended {
            warn!("Not everything ended within the grace.");
        }
        ended
    }
}
