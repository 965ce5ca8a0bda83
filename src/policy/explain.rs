//! Why a topic goes where it goes: the route that wins, the ones that lose, and who said what.
//!
//! One value, shown twice: as text to people at a terminal, as JSON to programs.

use std::fmt;
use std::time::Duration;

use serde::Serialize;
use serde_json::{Value, json};

use super::table::{Compression, Declare, Live, Overflow, Retention, Route, RouteTable, Written};
use crate::message::{Lane, Lanes};
use crate::origin::Origin;
use crate::topic::{Pattern, Topic};
use crate::units;

/// What the policy says of one topic.
#[derive(Debug, Serialize)]
pub struct Explanation {
    pub topic: String,
    /// In a sentence: which pattern wins and why, or what to do where none matches.
    pub why: String,
    #[serde(flatten)]
    pub decision: Option<Decision>,
    /// The settings of the lane, which are in force for all its topics.
    pub settings: Vec<Shown>,
}

#[derive(Debug, Serialize)]
pub struct Decision {
    pub route: String,
    pub lane: &'static str,
    /// The names at the lanes' brokers. A lane without a broker uses the topic itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nats_subject: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pulsar_topic: Option<String>,
    pub options: Vec<Shown>,
    pub also_match: Vec<Loser>,
}

/// A value and who said it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Shown {
    pub name: String,
    /// As a file would say it; `null` where nothing holds.
    pub value: Value,
    /// A file and line, a variable, `--set key`, or `default`.
    pub from: String,
}

/// A route that matches as well.
#[derive(Debug, Serialize)]
pub struct Loser {
    pub route: String,
    pub topic: String,
    pub from: String,
    pub why: String,
}

/// Explains one topic. `settings` are those of either lane, by what the caller knows of them.
pub fn explain(table: &RouteTable, topic: &Topic, settings: impl Fn(Lane) -> Vec<Shown>) -> Explanation {
    let mut matching = table.entries().filter(|(route, _)| route.pattern.matches(topic));
    let Some((route, written)) = matching.next() else {
        let why = format!(
            "No route matches, so publishing and subscribing to it is refused with NO_ROUTE. Write a [[route]] whose \
             topic is \"{topic}\" or a pattern that matches it."
        );
        return Explanation { topic: topic.to_string(), why, decision: None, settings: Vec::new() };
    };
    let also_match: Vec<_> = matching
        .map(|(loser, written)| Loser {
            route: loser.name.to_string(),
            topic: loser.pattern.to_string(),
            from: written.route.to_string(),
            why: difference(&route.pattern, &loser.pattern),
        })
        .collect();
    let why = match also_match.len() {
        0 => format!("\"{}\" is the only pattern that matches.", route.pattern),
        others => {
            format!("\"{}\" is the most specific of the {} patterns that match.", route.pattern, others + 1)
        }
    };
    let decision = Decision {
        route: route.name.to_string(),
        lane: route.lane.as_str(),
        nats_subject: route.lane.takes(Lane::Ephemeral).then(|| route.nats.apply(topic.as_str())),
        pulsar_topic: route.lane.takes(Lane::Durable).then(|| route.pulsar.apply(topic.as_str())),
        options: options(route, written),
        also_match,
    };
    let settings = Lane::ALL.into_iter().filter(|lane| route.lane.takes(*lane)).flat_map(settings).collect();
    Explanation { topic: topic.to_string(), why, decision: Some(decision), settings }
}

/// Every option that holds for the route's lane, in the order in which a file would say them.
pub fn options(route: &Route, written: &Written) -> Vec<Shown> {
    let shown = |name: &str, value: Value| {
        let from = written.options.get(name).unwrap_or(&Origin::Default).to_string();
        Shown { name: name.to_owned(), value, from }
    };
    let mut rows = vec![
        shown("name", json!(&*route.name)),
        shown("topic", json!(route.pattern.as_str())),
        shown("lane", json!(route.lane.as_str())),
    ];
    let dead_letter = route.redelivery.dead_letter.as_ref();
    if route.lane.takes(Lane::Ephemeral) {
        rows.extend([
            shown("nats", json!(route.nats.to_string())),
            shown("history", json!(route.history)),
            shown("retain", json!(route.retain)),
            shown("queue", json!(route.queue)),
            shown("overflow", overflow(route.overflow)),
        ]);
    }
    if route.lane.takes(Lane::Durable) {
        rows.extend([
            shown("pulsar", json!(route.pulsar.to_string())),
            shown("outage", json!(route.outage.as_str())),
            shown("retention", retention(route.retention)),
            shown("declare", declare(route.declare)),
            shown("dedup_window", json!(units::show_duration(route.dedup_window))),
            shown("ack_timeout", json!(route.redelivery.ack_timeout.map(units::show_duration))),
            shown("max_deliveries", json!(dead_letter.map(|dead_letter| dead_letter.max_deliveries))),
            shown("backoff", backoff(&route.redelivery.backoff)),
            shown("dead_letter", json!(dead_letter.map(|dead_letter| dead_letter.topic.to_string()))),
            shown("compression", compression(route.compression)),
            shown("pulsar_schema", json!(route.pulsar_schema.as_str())),
        ]);
    }
    if route.lane == Lanes::Both {
        rows.push(shown("live", live(route.live)));
    }
    rows.push(shown("max_payload", json!(route.max_payload.map(|bytes| units::show_size(bytes as u64)))));
    rows.push(shown("schema", json!(route.schema.as_ref().map(|schema| &*schema.file))));
    rows
}

fn overflow(overflow: Overflow) -> Value {
    match overflow {
        Overflow::DropOldest => json!("drop_oldest"),
        Overflow::Disconnect => json!("disconnect"),
    }
}

fn live(live: Live) -> Value {
    match live {
        Live::AfterStore => json!("after_store"),
        Live::First => json!("first"),
    }
}

fn declare(declare: Declare) -> Value {
    match declare {
        Declare::Auto => json!("auto"),
        Declare::Required => json!("required"),
    }
}

fn compression(compression: Compression) -> Value {
    match compression {
        Compression::None => json!("none"),
        Compression::Lz4 => json!("lz4"),
        Compression::Zstd => json!("zstd"),
    }
}

fn retention(retention: Retention) -> Value {
    let mut said = serde_json::Map::new();
    said.extend(retention.age.map(|age| ("age".to_owned(), json!(units::show_duration(age)))));
    said.extend(retention.size.map(|size| ("size".to_owned(), json!(units::show_size(size)))));
    if said.is_empty() { Value::Null } else { Value::Object(said) }
}

fn backoff(waits: &[Duration]) -> Value {
    let waits: Vec<_> = waits.iter().map(|wait| units::show_duration(*wait)).collect();
    if waits.is_empty() { Value::Null } else { json!(waits) }
}

/// Where the precedence of two patterns that match one topic parts.
fn difference(winner: &Pattern, loser: &Pattern) -> String {
    let parted = winner.tokens().zip(loser.tokens()).enumerate().find(|(_, (ours, theirs))| ours != theirs);
    match parted {
        Some((at, (ours, theirs))) => format!("token {}: {ours} goes before {theirs}", at + 1),
        None => "it is the less specific".to_owned(),
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(decision) = &self.decision else {
            return writeln!(f, "{}\n  {}", self.topic, self.why);
        };
        writeln!(f, "{} takes the {} lane by the route {}", self.topic, decision.lane, decision.route)?;
        writeln!(f, "  {}", self.why)?;
        if let Some(name) = &decision.nats_subject {
            writeln!(f, "  Where the lane is NATS it is the subject {name}")?;
        }
        if let Some(name) = &decision.pulsar_topic {
            writeln!(f, "  Where the lane is Pulsar it is the topic {name}")?;
        }
        table(f, "option", &decision.options)?;
        table(f, "setting", &self.settings)?;
        if !decision.also_match.is_empty() {
            writeln!(f, "\nroutes that match as well, and lose")?;
        }
        for Loser { route, topic, from, why } in &decision.also_match {
            writeln!(f, "  {route} \"{topic}\" ({from}): {why}")?;
        }
        Ok(())
    }
}

/// Rows under a heading, in columns.
fn table(f: &mut fmt::Formatter<'_>, heading: &str, rows: &[Shown]) -> fmt::Result {
    if rows.is_empty() {
        return Ok(());
    }
    let cells: Vec<_> = rows.iter().map(|row| (&row.name, said(&row.value), &row.from)).collect();
    let width = |texts: &mut dyn Iterator<Item = &str>| texts.map(|text| text.chars().count()).max();
    let names = width(&mut cells.iter().map(|(name, _, _)| name.as_str()).chain([heading])).unwrap_or(0);
    let values = width(&mut cells.iter().map(|(_, value, _)| value.as_str()).chain(["value"])).unwrap_or(0);
    writeln!(f, "\n  {heading:names$}  {:values$}  from", "value")?;
    for (name, value, from) in cells {
        writeln!(f, "  {name:names$}  {value:values$}  {from}")?;
    }
    Ok(())
}

fn said(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(list) => list.iter().map(said).collect::<Vec<_>>().join(", "),
        Value::Object(map) => {
            let said: Vec<_> = map.iter().map(|(name, value)| format!("{name} {}", said(value))).collect();
            said.join(", ")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::policy::source;

    const ROUTES: &str = r#"
[[route]]
name = "rest"
topic = ">"
lane = "durable"

[[route]]
name = "orders"
topic = "orders.>"
lane = "durable"
pulsar = "persistent://acme/billing/{topic}"
retention = { age = "7d" }
backoff = ["1s", "30s"]
max_deliveries = 5
dead_letter = "dlq.{topic}"

[[route]]
topic = "orders.*.live"
lane = "ephemeral"
nats = "acme.{topic}"
history = 3
"#;

    fn explained(topic: &str) -> Explanation {
        let table =
            source::read(Path::new("r.toml"), ROUTES, &|_| Err(std::io::ErrorKind::NotFound.into())).unwrap();
        let backend = |lane: Lane| {
            vec![Shown { name: format!("lanes.{lane}.url"), value: json!("x:1"), from: "TWINSPAN_X".into() }]
        };
        explain(&table, &Topic::parse(topic).unwrap(), backend)
    }

    #[test]
    fn the_winner_the_physical_name_and_the_losers_are_told_with_their_lines() {
        let text = explained("orders.eu.live").to_string();
        let expected = r#"orders.eu.live takes the ephemeral lane by the route orders.*.live
  "orders.*.live" is the most specific of the 3 patterns that match.
  Where the lane is NATS it is the subject acme.orders.eu.live

  option       value          from
  name         orders.*.live  default
  topic        orders.*.live  r.toml:18
  lane         ephemeral      r.toml:19
  nats         acme.{topic}   r.toml:20
  history      3              r.toml:21
  retain       false          default
  queue        100            default
  overflow     drop_oldest    default
  max_payload  none           default
  schema       none           default

  setting              value  from
  lanes.ephemeral.url  x:1    TWINSPAN_X

routes that match as well, and lose
  orders "orders.>" (r.toml:7): token 2: * goes before >
  rest ">" (r.toml:2): token 1: orders goes before >
"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn the_same_is_told_as_json() {
        let told = serde_json::to_value(explained("orders.eu")).unwrap();
        assert_eq!(told["route"], "orders");
        assert_eq!(told["lane"], "durable");
        assert_eq!(told["pulsar_topic"], "persistent://acme/billing/orders.eu");
        assert_eq!(told["also_match"][0]["route"], "rest");
        let retention = told["options"].as_array().unwrap().iter().find(|row| row["name"] == "retention");
        assert_eq!(
            retention.unwrap(),
            &json!({"name": "retention", "value": {"age": "7d"}, "from": "r.toml:12"})
        );
        assert_eq!(told["settings"][0]["from"], "TWINSPAN_X");
    }

    #[test]
    fn what_becomes_of_a_message_that_nobody_acknowledges_is_told_and_its_dead_letters_are_a_topic() {
        let text = explained("orders.eu").to_string();
        let rows: Vec<_> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        for row in [
            "dedup_window 2m default",
            "ack_timeout none default",
            "max_deliveries 5 r.toml:14",
            "backoff 1s, 30s r.toml:13",
            "dead_letter dlq.{topic} r.toml:15",
        ] {
            assert!(rows.iter().any(|told| told == row), "{row}: {text}");
        }
        let text = explained("dlq.orders.eu").to_string();
        assert!(
            text.starts_with("dlq.orders.eu takes the durable lane by the route orders.dead_letter"),
            "{text}"
        );
        assert!(text.contains("persistent://acme/billing/dlq.orders.eu"), "{text}");
        assert!(text.contains("rest \">\" (r.toml:2)"), "{text}");
    }

    #[test]
    fn a_topic_without_a_route_is_told_what_to_write() {
        let table =
            source::read(Path::new("r.toml"), "[[route]]\ntopic = \"a\"\nlane = \"durable\"", &|_| {
                Err(std::io::ErrorKind::NotFound.into())
            })
            .unwrap();
        let told = explain(&table, &Topic::parse("b").unwrap(), |_| Vec::new());
        assert!(told.to_string().contains("refused with NO_ROUTE. Write a [[route]]"), "{told}");
        assert_eq!(serde_json::to_value(told).unwrap()["route"], Value::Null);
    }
}
