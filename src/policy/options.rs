//! The options of a route: which there are, for which lane, and how each value is read.

use std::sync::Arc;
use std::time::Duration;

use toml_edit::Item;

use super::table::{Compression, Declare, Live, OnOutage, Overflow, PulsarSchema};
use crate::message::Lanes;
use crate::units;

pub const HISTORY_DEFAULT: usize = 100;
/// A ring is sent as one burst to whoever asks for it, so it cannot be a store.
pub const HISTORY_MAX: usize = 10_000;
pub const QUEUE_DEFAULT: usize = 100;
pub const QUEUE_MAX: usize = 10_000;
pub const MAX_DELIVERIES_MAX: usize = 10_000;
const BACKOFFS_MAX: usize = 32;
/// Far beyond any sense, and within what clocks can add.
const WAIT_MAX: Duration = Duration::from_secs(365 * 86_400);
/// Long enough for any publisher to try again.
pub const DEDUP_WINDOW_DEFAULT: Duration = Duration::from_secs(120);
/// What was stored within it is read when it is first needed.
const DEDUP_WINDOW_MAX: Duration = Duration::from_secs(86_400);
const NAME_BYTES_MAX: usize = 128;

/// Which lane an option is for; `None`: any. A route of both lanes has the options of both.
pub const OPTIONS: [(&str, Option<Lanes>); 22] = [
    ("name", None),
    ("topic", None),
    ("lane", None),
    ("max_payload", None),
    ("schema", None),
    ("nats", Some(Lanes::EPHEMERAL)),
    ("history", Some(Lanes::EPHEMERAL)),
    ("retain", Some(Lanes::EPHEMERAL)),
    ("queue", Some(Lanes::EPHEMERAL)),
    ("overflow", Some(Lanes::EPHEMERAL)),
    ("pulsar", Some(Lanes::DURABLE)),
    ("outage", Some(Lanes::DURABLE)),
    ("retention", Some(Lanes::DURABLE)),
    ("declare", Some(Lanes::DURABLE)),
    ("dedup_window", Some(Lanes::DURABLE)),
    ("ack_timeout", Some(Lanes::DURABLE)),
    ("max_deliveries", Some(Lanes::DURABLE)),
    ("backoff", Some(Lanes::DURABLE)),
    ("dead_letter", Some(Lanes::DURABLE)),
    ("compression", Some(Lanes::DURABLE)),
    ("pulsar_schema", Some(Lanes::DURABLE)),
    ("live", Some(Lanes::Both)),
];

const NO_AUTHENTICATION: &str = "no authentication is configured in this build, so nobody has rights: leave it out, everyone who may connect may";
/// Options of the contract that this build cannot honor, and what holds instead.
pub const NOT_IN_THIS_BUILD: [(&str, &str); 3] = [
    ("rate", "not in this build: nobody is slowed down by a rate"),
    ("publish", NO_AUTHENTICATION),
    ("subscribe", NO_AUTHENTICATION),
];

pub fn kind(item: &Item) -> &'static str {
    match item.type_name() {
        "string" => "a string",
        "integer" => "an integer",
        "float" => "a float",
        "boolean" => "a boolean",
        "datetime" => "a date",
        "array" => "an array",
        _ => "a table",
    }
}

pub fn text(item: &Item) -> Result<&str, String> {
    item.as_str().ok_or_else(|| format!("expected a string, found {}", kind(item)))
}

pub fn flag(item: &Item) -> Result<bool, String> {
    item.as_bool().ok_or_else(|| format!("expected true or false, found {}", kind(item)))
}

pub fn count(item: &Item, min: usize, max: usize) -> Result<usize, String> {
    let number = item
        .as_integer()
        .ok_or_else(|| format!("expected a number from {min} to {max}, found {}", kind(item)))?;
    match usize::try_from(number) {
        Ok(count) if (min..=max).contains(&count) => Ok(count),
        _ => Err(format!("expected a number from {min} to {max}, found {number}")),
    }
}

pub fn size(item: &Item) -> Result<u64, String> {
    match units::parse_size(text(item)?).map_err(|e| e.to_string())? {
        0 => Err("with no room at all nothing would fit".to_owned()),
        bytes => Ok(bytes),
    }
}

fn wait(item: &Item) -> Result<Duration, String> {
    at_most(WAIT_MAX, item)
}

fn at_most(max: Duration, item: &Item) -> Result<Duration, String> {
    match units::parse_duration(text(item)?).map_err(|e| e.to_string())? {
        wait if wait > max => Err(format!("at most {}", units::show_duration(max))),
        wait => Ok(wait),
    }
}

pub fn dedup_window(item: &Item) -> Result<Duration, String> {
    at_most(DEDUP_WINDOW_MAX, item)
}

pub fn ack_timeout(item: &Item) -> Result<Duration, String> {
    match wait(item)? {
        timeout if timeout.is_zero() => {
            Err("with no time at all nobody could acknowledge anything".to_owned())
        }
        timeout => Ok(timeout),
    }
}

pub fn backoff(item: &Item) -> Result<Vec<Duration>, String> {
    let array =
        item.as_array().filter(|array| (1..=BACKOFFS_MAX).contains(&array.len())).ok_or_else(|| {
            format!("expected a list of 1 to {BACKOFFS_MAX} durations such as [\"1s\", \"5s\", \"30s\"]")
        })?;
    array.iter().map(|value| wait(&Item::Value(value.clone()))).collect()
}

pub fn name(item: &Item) -> Result<Arc<str>, String> {
    match text(item)? {
        name if name.trim().is_empty() || name.len() > NAME_BYTES_MAX || name.contains(char::is_control) => {
            Err(format!("a name is 1 to {NAME_BYTES_MAX} bytes of text: it is the label on every metric"))
        }
        name => Ok(name.into()),
    }
}

pub fn lane(item: &Item) -> Result<Lanes, String> {
    match text(item)? {
        "ephemeral" => Ok(Lanes::EPHEMERAL),
        "durable" => Ok(Lanes::DURABLE),
        "both" => Ok(Lanes::Both),
        other => Err(one_of(other, &["ephemeral", "durable", "both"])),
    }
}

pub fn live(item: &Item) -> Result<Live, String> {
    match text(item)? {
        "after_store" => Ok(Live::AfterStore),
        "first" => Ok(Live::First),
        other => Err(one_of(other, &["after_store", "first"])),
    }
}

pub fn outage(item: &Item) -> Result<OnOutage, String> {
    match text(item)? {
        "reject" => Ok(OnOutage::Reject),
        "spool" => Ok(OnOutage::Spool),
        other => Err(one_of(other, &["reject", "spool"])),
    }
}

pub fn overflow(item: &Item) -> Result<Overflow, String> {
    match text(item)? {
        "drop_oldest" => Ok(Overflow::DropOldest),
        "disconnect" => Ok(Overflow::Disconnect),
        other => Err(one_of(other, &["drop_oldest", "disconnect"])),
    }
}

pub fn declare(item: &Item) -> Result<Declare, String> {
    match text(item)? {
        "auto" => Ok(Declare::Auto),
        "required" => Ok(Declare::Required),
        other => Err(one_of(other, &["auto", "required"])),
    }
}

pub fn compression(item: &Item) -> Result<Compression, String> {
    match text(item)? {
        "none" => Ok(Compression::None),
        "lz4" => Ok(Compression::Lz4),
        "zstd" => Ok(Compression::Zstd),
        other => Err(one_of(other, &["none", "lz4", "zstd"])),
    }
}

pub fn pulsar_schema(item: &Item) -> Result<PulsarSchema, String> {
    match text(item)? {
        "bytes" => Ok(PulsarSchema::Bytes),
        "string" => Ok(PulsarSchema::String),
        "json" => Ok(PulsarSchema::Json),
        other => Err(one_of(other, &["bytes", "string", "json"])),
    }
}

pub fn one_of(found: &str, known: &[&str]) -> String {
    let quoted: Vec<_> = known.iter().map(|name| format!("{name:?}")).collect();
    format!("expected {}, found {found:?}", quoted.join(" or "))
}
