//! What the commands that are clients share: the bridge they talk to, and what they print.

use std::io::Write;

use anyhow::{Context, Result};
use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::client::{Options, Twinspan};
use crate::message::{GroupMode, Start};
use crate::telemetry::log::{self, LogSettings};

#[derive(Args)]
pub struct Target {
    /// The bridge to talk to.
    #[arg(long, default_value = "ws://127.0.0.1:8090/ws")]
    url: String,
}

impl Target {
    /// Fails at once where there is no bridge. One that goes away later is waited for, and the log says so.
    pub async fn connect(&self) -> Result<Twinspan> {
        log::to_stderr(&LogSettings::of_environment().map_err(anyhow::Error::msg)?);
        Ok(Twinspan::connect(&self.url, Options::default()).await?)
    }
}

/// The signals that end a command in order; a second one ends it at once.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub fn new() -> Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Where to begin: `earliest`, `latest`, a time or a position.
pub fn start(from: &str) -> Result<Start, String> {
    match from {
        "earliest" => Ok(Start::Earliest),
        "latest" => Ok(Start::Latest),
        time if time.contains('T') => time.parse().map(Start::Time).map_err(|error| error.to_string()),
        position => position.parse().map(Start::After).map_err(|error| format!("{error}")),
    }
}

pub fn mode(name: &str) -> Result<GroupMode, String> {
    GroupMode::parse(name)
        .ok_or_else(|| format!("one of {}", GroupMode::ALL.map(GroupMode::as_str).join(", ")))
}

/// Prints a line; a reader that has gone (`| head`) ends the command without a panic.
pub fn print(line: std::fmt::Arguments<'_>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("writing to standard output")
}
