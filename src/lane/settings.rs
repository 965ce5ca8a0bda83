//! What the lanes are set to: `[lanes.ephemeral]` and `[lanes.durable]`.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::units;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EphemeralSettings {
    pub backend: EphemeralBackend,
    /// The servers of one cluster.
    #[serde(with = "one_or_many")]
    pub url: Vec<String>,
    pub monitor_url: String,
    /// What all history rings may hold together; the least recently used topic goes first.
    #[serde(with = "units::size")]
    pub history_bytes: usize,
    pub token: Option<Secret>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    /// A NATS credentials file.
    pub credentials: Option<PathBuf>,
    pub tls: Option<Tls>,
}

impl Default for EphemeralSettings {
    fn default() -> Self {
        Self {
            backend: EphemeralBackend::Memory,
            url: vec!["nats://127.0.0.1:4222".to_owned()],
            monitor_url: "http://127.0.0.1:8222".to_owned(),
            history_bytes: 64 << 20,
            token: None,
            user: None,
            password: None,
            credentials: None,
            tls: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EphemeralBackend {
    Memory,
    Nats,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DurableSettings {
    pub backend: DurableBackend,
    /// The service URLs of one cluster.
    #[serde(with = "one_or_many")]
    pub url: Vec<String>,
    pub admin_url: String,
    /// A publish without a receipt by then is `OUTCOME_UNKNOWN`.
    #[serde(with = "units::duration")]
    pub publish_timeout: Duration,
    /// Live bytes of what waits on disk for the broker; then `STORAGE_FULL`.
    #[serde(with = "units::size")]
    pub spool_max: usize,
    pub token: Option<Secret>,
    pub tls: Option<Tls>,
}

impl Default for DurableSettings {
    fn default() -> Self {
        Self {
            backend: DurableBackend::Embedded,
            url: vec!["pulsar://127.0.0.1:6650".to_owned()],
            admin_url: "http://127.0.0.1:8080".to_owned(),
            publish_timeout: Duration::from_secs(10),
            spool_max: 1 << 30,
            token: None,
            tls: None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DurableBackend {
    Embedded,
    Pulsar,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// Roots in PEM, trusted besides the usual ones.
    pub ca: Option<PathBuf>,
    /// Our own certificate and key in PEM: both or neither.
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

/// Where a secret is; what it is never shows in a log, an error or `explain`.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Secret {
    File(PathBuf),
    Env(String),
}

impl Secret {
    /// Reads the secret, without the line end that editors leave.
    pub fn read(&self) -> Result<String, SecretError> {
        let text = match self {
            Secret::File(path) => std::fs::read_to_string(path)
                .map_err(|source| SecretError::File { path: path.clone(), source })?,
            Secret::Env(name) => std::env::var(name).map_err(|_| SecretError::Env(name.clone()))?,
        };
        match text.trim_end_matches(['\r', '\n']) {
            "" => Err(SecretError::Empty(self.clone())),
            secret => Ok(secret.to_owned()),
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Secret::File(path) => write!(f, "the secret in file {}", path.display()),
            Secret::Env(name) => write!(f, "the secret in variable {name}"),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("cannot read the secret in file {}: {source}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("the variable {0}, which should hold a secret, is not set")]
    Env(String),
    #[error("{0:?} is empty")]
    Empty(Secret),
}

/// One value, or a list of them.
pub mod one_or_many {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or a list of strings")]
    enum OneOrMany {
        One(String),
        Many(Vec<String>),
    }

    pub fn serialize<S: Serializer>(values: &[String], to: S) -> Result<S::Ok, S::Error> {
        match values {
            [one] => one.serialize(to),
            many => many.serialize(to),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
        match OneOrMany::deserialize(from)? {
            OneOrMany::One(one) => Ok(vec![one]),
            OneOrMany::Many(many) => Ok(many),
        }
    }
}
