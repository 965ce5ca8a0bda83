//! What the handlers share.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::brokers::Brokers;
use super::monitor::Monitor;
use crate::bridge::Bridge;
use crate::bridge::canary::{Report, Standing};
use crate::config::server::ReadyRequires;
use crate::config::settings::Settings;
use crate::lane::settings::{DurableBackend, EphemeralBackend};
use crate::message::Lane;
use crate::policy::explain::{Explanation, explain};
use crate::policy::{LastReload, Reloader};
use crate::session::roster::Roster;
use crate::session::settings::SessionSettings;
use crate::topic::Topic;

pub struct App {
    pub bridge: Arc<Bridge>,
    pub roster: Arc<Roster>,
    pub reloader: Reloader,
    pub session: Arc<SessionSettings>,
    pub sessions: TaskTracker,
    pub started: Instant,
    pub settings: Settings,
    pub monitor: Monitor,
    /// Where clients are listened for.
    pub listen: SocketAddr,
    /// Ends what the operators' listener serves.
    pub stop_admin: CancellationToken,
    brokers: Brokers,
    draining: AtomicBool,
}

impl App {
    pub fn new(bridge: Arc<Bridge>, reloader: Reloader, settings: Settings, listen: SocketAddr) -> Self {
        Self {
            bridge,
            roster: Arc::default(),
            reloader,
            session: Arc::new(settings.session.clone()),
            sessions: TaskTracker::new(),
            started: Instant::now(),
            settings,
            monitor: Monitor::new(),
            listen,
            stop_admin: CancellationToken::new(),
            brokers: Brokers::default(),
            draining: AtomicBool::new(false),
        }
    }

    /// From now on there is no traffic for this bridge.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Release);
    }

    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Why this bridge should get no traffic now.
    pub fn unready(&self) -> Option<String> {
        if self.is_draining() {
            return Some("draining".into());
        }
        let down: Vec<_> =
            Lane::ALL.into_iter().filter(|lane| self.bridge.canary.why_down(*lane).is_some()).collect();
        match &self.settings.server.ready_requires {
            ReadyRequires::Any => (down.len() == Lane::ALL.len()).then(|| "both lanes are down".into()),
            ReadyRequires::Lanes(lanes) => {
                let lane = lanes.iter().find(|lane| down.contains(lane))?;
                Some(format!("the {lane} lane is down"))
            }
        }
    }

    /// `ok`, `degraded` where not all is well, `down` with both lanes down.
    pub fn status(&self) -> &'static str {
        match Lane::ALL.map(|lane| self.bridge.canary.standing(lane)) {
            [Standing::Up, Standing::Up] => "ok",
            [Standing::Down, Standing::Down] => "down",
            _ => "degraded",
        }
    }

    /// How the durable lane takes publishes, and what waits for it on disk.
    pub fn outage(&self) -> Value {
        let standing = self.bridge.outage.standing();
        let spool = standing.spool.map(|holds| {
            json!({
                "messages": holds.messages, "bytes": holds.bytes, "topics": holds.topics,
                "oldest_age_seconds": holds.oldest.map(|oldest| oldest.age().as_secs()),
                "set_aside": holds.set_aside,
            })
        });
        json!({"breaker": standing.breaker.as_str(), "open_topics": standing.open_topics, "spool": spool})
    }

    /// How a lane stands, in the same words for both.
    pub fn lane_report(&self, lane: Lane) -> Value {
        let Report { standing, since, why, heartbeats } = self.bridge.canary.report(lane);
        let millis = |time: Option<Duration>| time.map(|time| time.as_secs_f64() * 1000.0);
        let mut about = json!({
            "backend": self.backend(lane), "state": standing.as_str(), "since": since.to_string(), "why": why,
            "probe": {
                "count": heartbeats.count, "missing": heartbeats.missing, "last_ms": millis(heartbeats.last),
                "p50_ms": millis(heartbeats.p50), "p99_ms": millis(heartbeats.p99),
            },
        });
        if lane == Lane::Durable {
            about["outage"] = self.outage();
        }
        about
    }

    /// What its broker tells of itself; null where it has none.
    pub async fn broker_report(&self, lane: Lane) -> Value {
        let Some(told) = self.brokers.report(&self.bridge, lane).await else { return Value::Null };
        json!({
            "version": told.version, "connections": told.connections, "subscriptions": told.subscriptions,
            "slow_consumers": told.slow_consumers, "in_per_second": told.in_rate, "out_per_second": told.out_rate,
            "problem": told.problem,
        })
    }

    /// The connections of clients, the first of them.
    pub fn connections(&self, max: usize) -> Vec<Value> {
        let sessions = self.roster.sessions();
        let described = sessions.iter().take(max).map(|session| {
            json!({
                "connection": session.id.to_string(), "client_id": session.client_id.get(),
                "since": session.since.to_string(), "deliveries": session.deliveries.len(),
            })
        });
        described.collect()
    }

    /// The routes in force.
    pub fn routes(&self) -> Vec<Value> {
        let table = self.bridge.policy.table();
        let described = table.routes().iter().map(|route| {
            json!({"name": &*route.name, "topic": route.pattern.as_str(), "lane": route.lane.as_str()})
        });
        described.collect()
    }

    pub fn reload_report(&self) -> Value {
        let LastReload { at, ok, changes, problems } = self.reloader.last_reload();
        json!({"ok": ok, "at": at.to_string(), "changes": changes.to_string(), "problems": problems})
    }

    /// What carries a lane here.
    pub fn backend(&self, lane: Lane) -> &'static str {
        let lanes = &self.settings.lanes;
        match lane {
            Lane::Ephemeral => match lanes.ephemeral.backend {
                EphemeralBackend::Memory => "in-process bus",
                EphemeralBackend::Nats => "nats",
            },
            Lane::Durable => match lanes.durable.backend {
                DurableBackend::Embedded => "embedded log",
                DurableBackend::Pulsar => "pulsar",
            },
        }
    }

    pub fn explain(&self, topic: &Topic) -> Explanation {
        explain(&self.bridge.policy.table(), topic, |lane| self.settings.of_lane(lane))
    }
}
