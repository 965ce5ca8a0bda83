//! twinspan: one WebSocket, two lanes, the policy decides.
//!
//! The modules stand in dependency order, which is also the order to read them in: each uses only those above it
//! (`tests/it/architecture.rs` proves it).

// Vocabulary: values that are valid because they exist.
pub mod topic;
pub mod message;
pub mod filter;
// The wire: bytes on the socket, both directions, no I/O.
pub mod wire;
pub mod client;
// How people write things down, and where they did.
pub mod units;
pub mod origin;
// What every layer below reports to.
pub mod telemetry;
// Decisions.
pub mod policy;
// Two contracts, two carriers each.
pub mod lane;
// The crossing: policy decides, lanes carry.
pub mod bridge;
// Clients: one session each.
pub mod session;
// The process.
pub mod config;
pub mod server;
pub mod cli;

/// The examples of the README are compiled.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
