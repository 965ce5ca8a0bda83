//! What the handlers share.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde_json::{Value, json};
use tokio_util::task::TaskTracker;

use crate::bridge::Bridge;
use crate::bridge::canary::Standing;
use crate::config::server::ReadyRequires;
use crate::config::settings::Settings;
use crate::lane::settings::{DurableBackend, EphemeralBackend};
use crate::message::Lane;
use crate::policy::Reloader;
use crate::policy::explain::{Explanation, explain};
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
    draining: AtomicBool,
}

impl App {
    pub fn new(bridge: Arc<Bridge>, reloader: Reloader, settings: Settings) -> Self {
        Self {
            bridge,
            roster: Arc::default(),
            reloader,
            session: Arc::new(settings.session.clone()),
            sessions: TaskTracker::new(),
            started: Instant::now(),
            settings,
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
