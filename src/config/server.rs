//! What the process is held to: `[server]`. It stands here and not in `server`, which uses all settings.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::lane::settings::one_or_many;
use crate::message::Lane;
use crate::units;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerSettings {
    /// For clients.
    #[serde(with = "address")]
    pub listen: SocketAddr,
    /// For operators.
    #[serde(with = "address")]
    pub admin: SocketAddr,
    /// Listen beyond loopback with no authentication.
    pub allow_anonymous: bool,
    pub ready_requires: ReadyRequires,
    /// From SIGTERM to the end.
    #[serde(with = "units::duration")]
    pub grace: Duration,
    /// The routes file, relative to the working directory.
    pub routes: PathBuf,
    /// Where the embedded log is.
    pub data_dir: PathBuf,
}

impl Default for ServerSettings {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8090)),
            admin: SocketAddr::from((Ipv4Addr::LOCALHOST, 8091)),
            allow_anonymous: false,
            ready_requires: ReadyRequires::Any,
            grace: Duration::from_secs(25),
            routes: "config/routes.toml".into(),
            data_dir: "data".into(),
        }
    }
}

/// Which lanes have to be up for `/readyz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadyRequires {
    /// One lane is enough: not ready is who has none.
    Any,
    /// Each of these; at least one.
    Lanes(Vec<Lane>),
}

impl Serialize for ReadyRequires {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            ReadyRequires::Any => "any".serialize(to),
            ReadyRequires::Lanes(lanes) => to.collect_seq(lanes.iter().map(|lane| lane.as_str())),
        }
    }
}

impl<'de> Deserialize<'de> for ReadyRequires {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let names = one_or_many::deserialize(from)?;
        if names == ["any"] {
            return Ok(ReadyRequires::Any);
        }
        let lane = |name: &String| Lane::ALL.into_iter().find(|lane| lane.as_str() == name);
        match names.iter().map(lane).collect::<Option<Vec<_>>>() {
            Some(lanes) if !lanes.is_empty() => Ok(ReadyRequires::Lanes(lanes)),
            _ => Err(de::Error::custom(format!(
                "expected \"any\" or lanes such as [\"ephemeral\", \"durable\"], found {names:?}"
            ))),
        }
    }
}

mod address {
    use std::net::SocketAddr;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(address: &SocketAddr, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(address)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<SocketAddr, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(|_| {
            de::Error::custom(format!(
                "{text:?} is no address to listen on: write an IP address and a port, such as \"127.0.0.1:8090\""
            ))
        })
    }
}
