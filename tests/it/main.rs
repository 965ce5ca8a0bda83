//! The promises of twinspan, a module for each.

// Clippy knows a test by its attribute; what the tests share may panic as they may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod brokers;
mod lanes;

mod durable_contract;
mod ephemeral_contract;
mod journal;
mod nats_natives;
mod nats_outages;
mod nats_refusals;
mod nats_subscriptions;
mod pulsar;
