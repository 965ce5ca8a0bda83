//! The promises of twinspan, a module for each.

// Clippy knows a test by its attribute; what the tests share may panic as they may.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod brokers;
mod checker;
mod harness;
mod lanes;
mod process;
mod proxy;

mod architecture;
mod clients;
mod batches;
mod both;
mod bench;
mod canary;
mod clocks;
mod defects;
mod durable_contract;
mod ephemeral_contract;
mod feeds;
mod groups;
mod filters;
mod full_disks;
mod hostile;
mod hostile_sockets;
mod http;
mod ids;
mod joining;
mod journal;
mod killed;
mod live;
mod monitoring;
mod metrics;
mod natives;
mod nats_natives;
mod nats_outages;
mod nats_refusals;
mod nats_subscriptions;
mod observe;
mod outages;
mod outbox;
mod pulsar;
mod reference;
mod reloading;
mod schemas;
mod settings;
mod shutdown;
mod slow_clients;
mod spooling;
mod talking;
mod terminal;
