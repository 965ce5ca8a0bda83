//! All settings, and who said them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::server::ServerSettings;
use crate::lane::settings::{DurableBackend, DurableSettings, EphemeralBackend, EphemeralSettings};
use crate::message::Lane;
use crate::origin::Origin;
use crate::policy::explain::Shown;
use crate::session::settings::SessionSettings;
use crate::telemetry::log::LogSettings;
use crate::telemetry::trace::TraceSettings;

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub server: ServerSettings,
    pub lanes: LaneSettings,
    pub session: SessionSettings,
    pub log: LogSettings,
    pub trace: TraceSettings,
    /// Who said what; what nobody said is not in it.
    #[serde(skip)]
    pub origins: BTreeMap<String, Origin>,
    /// The files that were read.
    #[serde(skip)]
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LaneSettings {
    pub ephemeral: EphemeralSettings,
    pub durable: DurableSettings,
}

impl LaneSettings {
    /// What carries each lane, in the words of OpenTelemetry.
    pub fn systems(&self) -> [&'static str; Lane::ALL.len()] {
        let ephemeral = match self.ephemeral.backend {
            EphemeralBackend::Memory => "twinspan",
            EphemeralBackend::Nats => "nats",
        };
        let durable = match self.durable.backend {
            DurableBackend::Embedded => "twinspan",
            DurableBackend::Pulsar => "pulsar",
        };
        [ephemeral, durable]
    }
}

impl Settings {
    /// Who said this setting, or the first thing in it.
    pub fn origin(&self, key: &str) -> Origin {
        let inside = format!("{key}.");
        let mut said = self.origins.iter().filter(|(said, _)| *said == key || said.starts_with(&inside));
        said.next().map_or(Origin::Default, |(_, origin)| origin.clone())
    }

    /// The settings of a lane and who said them, for `explain`.
    pub fn of_lane(&self, lane: Lane) -> Vec<Shown> {
        let said = match lane {
            Lane::Ephemeral => serde_json::to_value(&self.lanes.ephemeral),
            Lane::Durable => serde_json::to_value(&self.lanes.durable),
        };
        // Plain data: were it ever not, `explain` would be without these rows.
        let Ok(Value::Object(said)) = said else { return Vec::new() };
        said.into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| {
                let name = format!("lanes.{lane}.{name}");
                Shown { from: self.origin(&name).to_string(), name, value }
            })
            .collect()
    }
}
