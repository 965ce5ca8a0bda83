//! From the text of a routes file to the table, with everything that is wrong in it.
//!
//! ```text
//! text ──toml_edit──▶ [[route]] ──one by one──▶ drafts ──in pairs──▶ RouteTable
//!                          └───────── problems, each with its line ──────┘
//! ```
//! A mistake in one option hides no other: the option takes its default, reading goes on, and at the end one problem
//! refuses the whole file. So one run of `check` shows them all, and no file is applied in part.

use std::path::Path;
use std::sync::Arc;

use toml_edit::{Item, TableLike};

use super::naming;
use super::options::{self, text};
use super::schema::Schema;
use super::table::{
    DeadLetter, Declare, Overflow, Redelivery, Retention, Route, RouteTable, Template, Written,
};
use crate::message::{Lane, Lanes};
use crate::origin::{Origin, Problem, Source, nearest};
use crate::topic::Pattern;
use crate::units;

/// Gives the text of a file that the routes name, by its path.
pub type Open<'a> = &'a dyn Fn(&Path) -> std::io::Result<String>;

/// Reads the text of a routes file. The path is what the problems name, and what other files' paths are relative to.
pub fn read(path: &Path, text: &str, open: Open<'_>) -> Result<RouteTable, Vec<Problem>> {
    let source = Source::parse(path, text).map_err(|problem| vec![problem])?;
    let mut problems = Vec::new();
    let mut drafts = drafts(&source, open, &mut problems);
    drafts.extend(implied(&drafts, &mut problems));
    check_pairs(&drafts, &mut problems);
    if drafts.is_empty() && problems.is_empty() {
        let message = "there is no route in this file, so every message would be refused: write a [[route]] \
                       with topic and lane";
        problems.push(Problem::new(source.at(None), message));
    }
    if problems.is_empty() {
        Ok(RouteTable::written(drafts.into_iter().map(|draft| (draft.route, draft.written))))
    } else {
        problems.sort_by(|a, b| a.at.cmp(&b.at));
        Err(problems)
    }
}

/// A route as far as it could be read.
struct Draft {
    route: Route,
    written: Written,
    /// Whether `route.lane` is what the file says.
    lane_known: bool,
}

fn drafts(source: &Source, open: Open<'_>, problems: &mut Vec<Problem>) -> Vec<Draft> {
    let mut drafts = Vec::new();
    for (key, item) in source.root().iter() {
        let at = source.at(source.root().key(key).and_then(|key| key.span()));
        if key != "route" {
            let meant = nearest(key, ["route"]).map_or("", |_| "; did you mean [[route]]?");
            problems.push(Problem::new(at, format!("unknown key {key:?}{meant}")));
            continue;
        }
        if let Some(tables) = item.as_array_of_tables() {
            for table in tables {
                let at = source.at(table.span());
                drafts.extend(Reader::new(source, table, at, problems).route(open));
            }
        } else if let Some(array) = item.as_array() {
            for value in array {
                let at = source.at(value.span());
                match value.as_inline_table() {
                    Some(table) => drafts.extend(Reader::new(source, table, at, problems).route(open)),
                    None => problems.push(Problem::new(at, "a route is a table: write [[route]]")),
                }
            }
        } else {
            problems
                .push(Problem::new(at, "there can be several routes: write [[route]], in double brackets"));
        }
    }
    drafts
}

/// Reads the options of one route, or of a table in it.
struct Reader<'a> {
    source: &'a Source,
    table: &'a dyn TableLike,
    problems: &'a mut Vec<Problem>,
    written: Written,
}

impl<'a> Reader<'a> {
    fn new(source: &'a Source, table: &'a dyn TableLike, at: Origin, problems: &'a mut Vec<Problem>) -> Self {
        Self { source, table, problems, written: Written { route: at, ..Written::default() } }
    }

    fn route(mut self, open: Open<'_>) -> Option<Draft> {
        self.refuse_unknown(&options::OPTIONS.map(|(name, _)| name));
        let pattern = self.required("topic", |item| Pattern::parse(text(item)?).map_err(|e| e.to_string()));
        let lane = self.required("lane", options::lane);
        if let Some(lane) = lane {
            self.refuse_other_lane(lane);
        }
        let name = self.optional("name", options::name);
        let nats = self.optional("nats", |item| naming::nats(text(item)?).map_err(|e| e.to_string()));
        let pulsar = self.optional("pulsar", |item| naming::pulsar(text(item)?).map_err(|e| e.to_string()));
        let outage = self.optional("outage", options::outage);
        let live = self.optional("live", options::live);
        let history = self.optional("history", |item| options::count(item, 0, options::HISTORY_MAX));
        let retain = self.optional("retain", options::flag);
        let queue = self.optional("queue", |item| options::count(item, 1, options::QUEUE_MAX));
        let overflow = self.optional("overflow", options::overflow);
        let retention = self.retention();
        let declare = self.optional("declare", options::declare);
        let dedup_window = self.optional("dedup_window", options::dedup_window);
        let redelivery = self.redelivery();
        let compression = self.optional("compression", options::compression);
        let pulsar_schema = self.optional("pulsar_schema", options::pulsar_schema);
        let max_payload =
            self.optional("max_payload", |item| options::size(item).map(|bytes| bytes as usize));
        let directory = self.source.path().parent().map(Path::to_owned).unwrap_or_default();
        let schema = self.optional("schema", |item| {
            let file = text(item)?;
            let path = directory.join(file);
            let text = open(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
            Schema::parse(file, text).map(Arc::new)
        });

        // A topic that could not be read has its problem already; without one there is nothing to compare.
        let pattern = pattern?;
        let route = Route {
            name: name.unwrap_or_else(|| pattern.as_str().into()),
            pattern,
            lane: lane.unwrap_or(Lanes::EPHEMERAL),
            nats: nats.or_else(|| Template::parse(naming::NATS_DEFAULT))?,
            pulsar: pulsar.or_else(|| Template::parse(naming::PULSAR_DEFAULT))?,
            history: history.unwrap_or(options::HISTORY_DEFAULT),
            retain: retain.unwrap_or(false),
            queue: queue.unwrap_or(options::QUEUE_DEFAULT),
            overflow: overflow.unwrap_or(Overflow::DropOldest),
            live: live.unwrap_or_default(),
            outage: outage.unwrap_or_default(),
            retention,
            declare: declare.unwrap_or(Declare::Auto),
            dedup_window: dedup_window.unwrap_or(options::DEDUP_WINDOW_DEFAULT),
            redelivery,
            compression: compression.unwrap_or_default(),
            pulsar_schema: pulsar_schema.unwrap_or_default(),
            max_payload,
            schema,
        };
        Some(Draft { route, written: self.written, lane_known: lane.is_some() })
    }

    fn retention(&mut self) -> Retention {
        let Some((_, item)) = self.table.get_key_value("retention") else {
            return Retention::default();
        };
        let at = self.place("retention");
        self.written.options.insert("retention", at.clone());
        let Some(table) = item.as_table_like() else {
            let message = format!(
                "retention: expected a table such as {{ age = \"7d\" }}, found {}",
                options::kind(item)
            );
            self.problems.push(Problem::new(at, message));
            return Retention::default();
        };
        let mut inner = Reader::new(self.source, table, at, self.problems);
        inner.refuse_unknown(&["age", "size"]);
        let age = inner.optional("age", |item| {
            match units::parse_duration(text(item)?).map_err(|e| e.to_string())? {
                age if age.is_zero() => Err("with no age at all nothing would be kept".to_owned()),
                age => Ok(age),
            }
        });
        Retention { age, size: inner.optional("size", options::size) }
    }

    fn redelivery(&mut self) -> Redelivery {
        let max_deliveries = self.optional("max_deliveries", |item| {
            options::count(item, 1, options::MAX_DELIVERIES_MAX).map(|count| count as u32)
        });
        let topic =
            self.optional("dead_letter", |item| naming::dead_letter(text(item)?).map_err(|e| e.to_string()));
        for (one, other, why) in [
            ("max_deliveries", "dead_letter = \"dlq.{topic}\"", "what nobody acknowledges would be lost"),
            ("dead_letter", "max_deliveries = 5", "nothing would ever get there"),
        ] {
            let (needed, _) = other.split_once(' ').unwrap_or((other, ""));
            if self.table.contains_key(one) && !self.table.contains_key(needed) {
                let message = format!("{one}: without {needed} {why}: write {other} as well, or another");
                self.problems.push(Problem::new(self.place(one), message));
            }
        }
        Redelivery {
            ack_timeout: self.optional("ack_timeout", options::ack_timeout),
            backoff: self.optional("backoff", options::backoff).unwrap_or_default(),
            dead_letter: topic
                .zip(max_deliveries)
                .map(|(topic, max_deliveries)| DeadLetter { topic, max_deliveries }),
        }
    }

    fn refuse_unknown(&mut self, known: &[&str]) {
        for (key, _) in self.table.iter() {
            let mut refused = options::NOT_IN_THIS_BUILD.iter();
            let message = if known.contains(&key) {
                continue;
            } else if let Some((name, why)) = refused.find(|(name, _)| *name == key) {
                format!("{name}: {why}")
            } else {
                match nearest(key, known.iter().copied()) {
                    Some(meant) => format!("unknown key {key:?}; did you mean {meant:?}?"),
                    None => format!("unknown key {key:?}; known are {}", known.join(", ")),
                }
            };
            self.problems.push(Problem::new(self.place(key), message));
        }
    }

    fn refuse_other_lane(&mut self, lanes: Lanes) {
        for (name, belongs) in options::OPTIONS {
            let Some(belongs) = belongs.filter(|belongs| lanes != *belongs && lanes != Lanes::Both) else {
                continue;
            };
            if self.table.contains_key(name) {
                let other = match belongs {
                    Lanes::One(Lane::Ephemeral) => "an ephemeral route",
                    Lanes::One(Lane::Durable) => "a durable route",
                    Lanes::Both => "a route of both lanes",
                };
                let message = format!(
                    "{name} is an option of {other}, and {} says lane = \"{lanes}\": leave one out",
                    self.place("lane")
                );
                self.problems.push(Problem::new(self.place(name), message));
            }
        }
    }

    fn required<T>(&mut self, key: &'static str, read: impl Fn(&Item) -> Result<T, String>) -> Option<T> {
        if !self.table.contains_key(key) {
            let message = match key {
                "lane" => "this route has no lane: write lane = \"ephemeral\", \"durable\" or \"both\"",
                _ => "this route has no topic: write topic = \"orders.>\" or another pattern",
            };
            self.problems.push(Problem::new(self.written.route.clone(), message));
        }
        self.optional(key, read)
    }

    /// The option's value where it is there and right. Where it is wrong, the problem is noted.
    fn optional<T>(&mut self, key: &'static str, read: impl Fn(&Item) -> Result<T, String>) -> Option<T> {
        let item = self.table.get(key)?;
        let at = self.place(key);
        self.written.options.insert(key, at.clone());
        read(item).map_err(|why| self.problems.push(Problem::new(at, format!("{key}: {why}")))).ok()
    }

    fn place(&self, key: &str) -> Origin {
        self.source.at(self.table.key(key).and_then(|key| key.span()))
    }
}

/// The routes of the dead letters that no written route stores. They are there so that a dead-letter topic is a topic
/// like any other: it is subscribed to, explained and found. A written durable route for them is theirs (`dlq.>`, with
/// its own retention): it covers them by name, which a catch-all does not, and has no dead letters of its own. A written
/// one for some of them goes before the implied one by precedence.
fn implied(written: &[Draft], problems: &mut Vec<Problem>) -> Vec<Draft> {
    let mut implied = Vec::new();
    for draft in written {
        let Some(dead_letter) = &draft.route.redelivery.dead_letter else { continue };
        let at = draft.written.options.get("dead_letter").unwrap_or(&draft.written.route).clone();
        let pattern = match Pattern::parse(&dead_letter.topic.apply(draft.route.pattern.as_str())) {
            Ok(pattern) => pattern,
            Err(error) => {
                let message =
                    format!("dead_letter: the dead letters of \"{}\": {error}", draft.route.pattern);
                problems.push(Problem::new(at, message));
                continue;
            }
        };
        let by_precedence = |a: &&Draft, b: &&Draft| a.route.pattern.precedence(&b.route.pattern);
        let stores = |other: &&Draft| {
            let route = &other.route;
            let by_name = !matches!(route.pattern.tokens().next(), Some("*" | ">"));
            let is_theirs = route.pattern == pattern
                || by_name && route.pattern.covers(&pattern) && route.redelivery.dead_letter.is_none();
            route.lane.takes(Lane::Durable) && is_theirs
        };
        let theirs = written.iter().filter(stores).min_by(by_precedence);
        let stored = theirs.map_or(&pattern, |theirs| &theirs.route.pattern);
        let mut lost = written.iter().filter(|other| {
            let ahead = other.route.pattern.precedence(stored).is_le();
            other.lane_known
                && other.route.lane == Lanes::EPHEMERAL
                && ahead
                && other.route.pattern.overlaps(&pattern)
        });
        if let Some(lost) = lost.next() {
            let message = format!(
                "dead_letter: the dead letters would take the ephemeral route at {} and be lost: change its topic, or \
                 this template",
                lost.written.options.get("topic").unwrap_or(&lost.written.route),
            );
            problems.push(Problem::new(at, message));
        } else if theirs.is_none() {
            let route = Route {
                name: format!("{}.dead_letter", draft.route.name).into(),
                pattern,
                lane: Lanes::DURABLE,
                retention: Retention::default(),
                declare: Declare::Auto,
                dedup_window: options::DEDUP_WINDOW_DEFAULT,
                redelivery: Redelivery::default(),
                max_payload: None,
                schema: None,
                ..draft.route.clone()
            };
            let options = ["name", "topic", "lane"].map(|name| (name, at.clone()));
            let mut options: std::collections::BTreeMap<_, _> = options.into();
            options.extend(draft.written.options.get("pulsar").map(|at| ("pulsar", at.clone())));
            let written = Written { route: at, options };
            implied.push(Draft { route, written, lane_known: draft.lane_known });
        }
    }
    implied
}

fn check_pairs(drafts: &[Draft], problems: &mut Vec<Problem>) {
    for (at, later) in drafts.iter().enumerate() {
        for earlier in &drafts[..at] {
            if let Some(problem) = conflict(later, earlier) {
                problems.push(problem);
            }
        }
    }
}

fn conflict(later: &Draft, earlier: &Draft) -> Option<Problem> {
    let place = |draft: &Draft, key| draft.written.options.get(key).unwrap_or(&draft.written.route).clone();
    let (a, b) = (&later.route, &earlier.route);
    if a.pattern == b.pattern {
        let message = format!(
            "topic \"{}\" is the pattern of the route at {} as well: which of the two would it take?",
            a.pattern,
            place(earlier, "topic")
        );
        return Some(Problem::new(place(later, "topic"), message));
    }
    if a.name == b.name {
        let message = format!(
            "name {:?} is the name of the route at {} as well: metrics could not tell them apart",
            a.name,
            place(earlier, "name")
        );
        return Some(Problem::new(place(later, "name"), message));
    }
    if !later.lane_known || !earlier.lane_known {
        return None;
    }
    let names = [
        (Lane::Ephemeral, "nats", "NATS subject", &a.nats, &b.nats),
        (Lane::Durable, "pulsar", "Pulsar topic", &a.pulsar, &b.pulsar),
    ];
    names.into_iter().filter(|(lane, ..)| a.lane.takes(*lane) && b.lane.takes(*lane)).find_map(
        |(_, key, what, ours, theirs)| {
            naming::collide((ours, &a.pattern), (theirs, &b.pattern)).then(|| {
                let message = format!(
                    "two topics would be one {what}: this route's names are {}, and those of the route at {} are {}; \
                     change one of the templates",
                    ours.apply(a.pattern.as_str()),
                    place(earlier, key),
                    theirs.apply(b.pattern.as_str()),
                );
                Problem::new(place(later, key), message)
            })
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topic::Topic;

    fn problems(text: &str) -> Vec<String> {
        let found = read(Path::new("r.toml"), text, &|_| Err(std::io::ErrorKind::NotFound.into()))
            .err()
            .unwrap_or_default();
        found.iter().map(Problem::to_string).collect()
    }

    #[test]
    fn a_route_of_each_lane_reads_with_its_options_and_its_defaults() {
        let text = r#"
            [[route]]
            name = "telemetry"
            topic = "telemetry.>"
            lane = "ephemeral"
            nats = "acme.{topic}"
            history = 5
            retain = true
            queue = 7
            overflow = "disconnect"
            max_payload = "4KiB"
            [[route]]
            topic = "orders.>"
            lane = "durable"
            pulsar = "persistent://acme/billing/{topic}"
            outage = "reject"
            retention = { age = "7d", size = "10GiB" }
            declare = "required"
            dedup_window = "1d"
        "#;
        let table = read(Path::new("r.toml"), text, &|_| Err(std::io::ErrorKind::NotFound.into())).unwrap();
        let [durable, ephemeral] = table.routes() else { panic!("{table:?}") };
        assert_eq!((&*ephemeral.name, ephemeral.lane), ("telemetry", Lanes::EPHEMERAL));
        assert_eq!((ephemeral.history, ephemeral.retain, ephemeral.queue), (5, true, 7));
        assert_eq!((ephemeral.overflow, ephemeral.max_payload), (Overflow::Disconnect, Some(4096)));
        assert_eq!(ephemeral.nats.apply("x"), "acme.x");
        assert_eq!((&*durable.name, durable.lane), ("orders.>", Lanes::DURABLE));
        assert_eq!((durable.history, durable.queue, durable.overflow), (100, 100, Overflow::DropOldest));
        assert_eq!((durable.declare, durable.retention.size), (Declare::Required, Some(10 << 30)));
        assert_eq!(durable.dedup_window, std::time::Duration::from_secs(86_400));
        assert_eq!(ephemeral.dedup_window, std::time::Duration::from_secs(120));
        assert_eq!(durable.retention.age, Some(std::time::Duration::from_secs(604_800)));
        assert_eq!(durable.pulsar.apply("orders.eu"), "persistent://acme/billing/orders.eu");
        let (_, written) = table.entries().next().unwrap();
        assert_eq!(written.route.to_string(), "r.toml:12");
        assert_eq!(written.options["declare"].to_string(), "r.toml:18");
    }

    #[test]
    fn routes_read_alike_however_toml_writes_them() {
        let tables = "[[route]]\ntopic = \"a\"\nlane = \"durable\"\n[route.retention]\nage = \"1d\"\n";
        let dotted = "[[route]]\ntopic = \"a\"\nlane = \"durable\"\nretention.age = \"1d\"\n";
        let inline = "route = [{ topic = \"a\", lane = \"durable\", retention = { age = \"1d\" } }]\n";
        let read =
            |text| read(Path::new("r.toml"), text, &|_| Err(std::io::ErrorKind::NotFound.into())).unwrap();
        assert_eq!(read(tables).routes(), read(inline).routes());
        assert_eq!(read(tables).routes(), read(dotted).routes());
        assert!(read(tables).routes()[0].retention.age.is_some());
    }

    #[test]
    fn each_mistake_in_a_route_is_a_sentence_at_its_line() {
        let table = [
            ("ephemeral", "histroy = 1", "unknown key \"histroy\"; did you mean \"history\"?"),
            ("ephemeral", "colour = 1", "unknown key \"colour\"; known are name, topic, lane, "),
            ("ephemeral", "history = \"many\"", "history: expected a number from 0 to 10000, found a string"),
            ("ephemeral", "history = -1", "history: expected a number from 0 to 10000, found -1"),
            ("ephemeral", "queue = 0", "queue: expected a number from 1 to 10000, found 0"),
            ("ephemeral", "retain = 1", "retain: expected true or false, found an integer"),
            (
                "ephemeral",
                "overflow = \"drop\"",
                "overflow: expected \"drop_oldest\" or \"disconnect\", found",
            ),
            ("ephemeral", "nats = \"acme\"", "nats: \"acme\" must hold {topic} exactly once"),
            ("ephemeral", "name = \"\"", "name: a name is 1 to 128 bytes"),
            ("ephemeral", "max_payload = \"1K\"", "max_payload: \"1K\" is no size"),
            ("ephemeral", "max_payload = \"0B\"", "max_payload: with no room at all"),
            (
                "ephemeral",
                "retention = {}",
                "retention is an option of a durable route, and r.toml:3 says lane =",
            ),
            (
                "durable",
                "history = 3",
                "history is an option of an ephemeral route, and r.toml:3 says lane =",
            ),
            ("durable", "pulsar = \"{topic}\"", "pulsar: \"{topic}\" is no Pulsar topic"),
            (
                "durable",
                "retention = \"7d\"",
                "retention: expected a table such as { age = \"7d\" }, found a string",
            ),
            ("durable", "retention = { aeg = \"7d\" }", "unknown key \"aeg\"; did you mean \"age\"?"),
            ("durable", "retention.age = \"7\"", "age: \"7\" is no duration"),
            ("durable", "retention.age = \"0s\"", "age: with no age at all"),
            ("durable", "declare = \"must\"", "declare: expected \"auto\" or \"required\", found \"must\""),
            ("durable", "dedup_window = \"25h\"", "dedup_window: at most 1d"),
            ("durable", "dedup_window = 120", "dedup_window: expected a string, found an integer"),
            (
                "ephemeral",
                "dedup_window = \"2m\"",
                "dedup_window is an option of a durable route, and r.toml:3 says lane =",
            ),
            ("durable", "outage = \"buffer\"", "outage: expected \"reject\" or \"spool\", found \"buffer\""),
            ("durable", "ack_timeout = \"0s\"", "ack_timeout: with no time at all"),
            ("durable", "backoff = \"1s\"", "backoff: expected a list of 1 to 32 durations"),
            ("durable", "ack_timeout = \"366d\"", "ack_timeout: at most 365d"),
            ("durable", "backoff = []", "backoff: expected a list of 1 to 32 durations"),
            ("durable", "backoff = [\"1\"]", "backoff: \"1\" is no duration"),
            (
                "durable",
                "max_deliveries = 3",
                "max_deliveries: without dead_letter what nobody acknowledges would be lost: write dead_letter = \"dlq.",
            ),
            (
                "durable",
                "dead_letter = \"dlq.{topic}\"",
                "dead_letter: without max_deliveries nothing would ever get there: write max_deliveries = 5",
            ),
            (
                "durable",
                "dead_letter = \"{topic}\"; max_deliveries = 3",
                "dead_letter: \"{topic}\" is the topic itself",
            ),
            (
                "durable",
                "dead_letter = \"dlq\"; max_deliveries = 3",
                "dead_letter: \"dlq\" must hold {topic} exactly once",
            ),
            (
                "durable",
                "dead_letter = \"{topic}.dlq\"; max_deliveries = 3",
                "dead_letter: the dead letters of \"a.>\": `>` stands for the rest",
            ),
            (
                "ephemeral",
                "backoff = [\"1s\"]",
                "backoff is an option of a durable route, and r.toml:3 says lane =",
            ),
            ("durable", "rate = \"500/s\"", "rate: not in this build"),
            (
                "durable",
                "publish = [\"role:writer\"]",
                "publish: no authentication is configured in this build",
            ),
            ("durable", "live = \"after_store\"", "live is an option of a route of both lanes"),
            ("both", "live = \"now\"", "live: expected \"after_store\" or \"first\", found \"now\""),
            ("fast", "", "lane: expected \"ephemeral\" or \"durable\" or \"both\", found \"fast\""),
        ];
        for (lane, line, expected) in table {
            let lines = line.replace("; ", "\n");
            let found = problems(&format!("[[route]]\ntopic = \"a.>\"\nlane = \"{lane}\"\n{lines}\n"));
            let at = if line.is_empty() { 3 } else { 4 };
            assert_eq!(found.len(), 1, "{line}: {found:?}");
            assert!(found[0].starts_with(&format!("r.toml:{at}: {expected}")), "{line}: {found:?}");
        }
    }

    #[test]
    fn a_file_without_a_usable_route_is_refused_and_says_what_to_write() {
        let table = [
            ("", "r.toml:1: there is no route in this file"),
            ("[[routes]]", "r.toml:1: unknown key \"routes\"; did you mean [[route]]?"),
            ("[route]\ntopic = \"a\"", "r.toml:1: there can be several routes: write [[route]]"),
            ("route = [1]", "r.toml:1: a route is a table"),
            ("[[route]]\nlane = \"durable\"", "r.toml:1: this route has no topic"),
            ("[[route]]\ntopic = \"a\"", "r.toml:1: this route has no lane"),
            ("[[route]]\ntopic = \"a.>.b\"\nlane=\"durable\"", "r.toml:2: topic: `>` stands for the rest"),
            ("[[route]]\ntopic = \"a\"\nlane = \"dur", "r.toml:3: this is not TOML: "),
        ];
        for (text, expected) in table {
            let found = problems(text);
            assert_eq!(found.len(), 1, "{text}: {found:?}");
            assert!(found[0].starts_with(expected), "{text}: {found:?}");
        }
    }

    #[test]
    fn two_routes_that_cannot_stand_together_are_named_by_both_lines() {
        let two = |a: &str, b: &str| {
            problems(&format!("[[route]]\nlane = \"durable\"\n{a}\n[[route]]\nlane = \"durable\"\n{b}\n"))
        };
        let acme = "topic = \"orders.>\"\npulsar = \"persistent://public/default/acme.{topic}\"";
        let table = [
            (
                "topic = \"a\"",
                "topic = \"a\"",
                "r.toml:6: topic \"a\" is the pattern of the route at r.toml:3",
            ),
            (
                "topic = \"a\"\nname = \"x\"",
                "topic = \"b\"\nname = \"x\"",
                "r.toml:8: name \"x\" is the name of the route at r.toml:4",
            ),
            (
                "topic = \"b\"",
                "topic = \"a\"\nname = \"b\"",
                "r.toml:7: name \"b\" is the name of the route at r.toml:1",
            ),
            ("topic = \">\"", acme, "r.toml:7: two topics would be one Pulsar topic: "),
        ];
        for (a, b, expected) in table {
            let found = two(a, b);
            assert_eq!(found.len(), 1, "{a} {b}: {found:?}");
            assert!(found[0].starts_with(expected), "{found:?}");
        }
        assert!(two("topic = \">\"", acme)[0].contains("those of the route at r.toml:1 are"));
        assert_eq!(two("topic = \"a.>\"", acme), Vec::<String>::new());
    }

    /// `a.>` with dead letters at line 4, and what is written behind it.
    fn with_dead_letters(behind: &str) -> Result<RouteTable, Vec<Problem>> {
        let text = "[[route]]\ntopic = \"a.>\"\nlane = \"durable\"\ndead_letter = \"dlq.{topic}\"\nmax_deliveries = 5\n\
                    pulsar = \"persistent://acme/eu/{topic}\"\nretention.age = \"1d\"\n";
        super::read(Path::new("r.toml"), &format!("{text}{behind}"), &|_| {
            Err(std::io::ErrorKind::NotFound.into())
        })
    }

    #[test]
    fn dead_letters_have_a_durable_route_beside_the_one_they_come_from() {
        let table = with_dead_letters("").unwrap();
        let route = table.route_for(&Topic::parse("dlq.a.b").unwrap()).unwrap();
        assert_eq!(
            (&*route.name, route.pattern.as_str(), route.lane),
            ("a.>.dead_letter", "dlq.a.>", Lanes::DURABLE)
        );
        assert_eq!(route.pulsar.apply("dlq.a.b"), "persistent://acme/eu/dlq.a.b");
        assert_eq!((route.retention, &route.redelivery), (Retention::default(), &Redelivery::default()));
        let (_, written) = table.entries().find(|(other, _)| *other == route).unwrap();
        assert_eq!(
            (written.route.to_string(), written.options["topic"].to_string()),
            ("r.toml:4".into(), "r.toml:4".into())
        );
        let origin = table.route_for(&Topic::parse("a.b").unwrap()).unwrap();
        assert_eq!(origin.redelivery.dead_letter.as_ref().unwrap().max_deliveries, 5);
    }

    #[test]
    fn a_written_durable_route_takes_the_dead_letters_and_an_ephemeral_one_that_would_is_refused() {
        let table = [
            ("dlq.a.>", "durable", Ok("written")),
            ("dlq.>", "durable", Ok("written")),
            ("dlq.a.b", "durable", Ok("written")),
            ("dlq.a.c", "durable", Ok("a.>.dead_letter")),
            (">", "ephemeral", Ok("a.>.dead_letter")),
            (">", "durable", Ok("a.>.dead_letter")),
            ("*.a.>", "durable", Ok("a.>.dead_letter")),
            ("*.a.b", "ephemeral", Ok("a.>.dead_letter")),
            ("dlq.a.>", "ephemeral", Err(())),
            ("dlq.a.*", "ephemeral", Err(())),
            ("dlq.*.>", "ephemeral", Ok("a.>.dead_letter")),
        ];
        for (topic, lane, expected) in table {
            let read = with_dead_letters(&format!(
                "[[route]]\nname = \"written\"\ntopic = \"{topic}\"\nlane = \"{lane}\"\n"
            ));
            match (read, expected) {
                (Ok(table), Ok(name)) => {
                    let route = table.route_for(&Topic::parse("dlq.a.b").unwrap()).unwrap();
                    assert_eq!((&*route.name, route.lane), (name, Lanes::DURABLE), "{topic} {lane}");
                }
                (Err(problems), Err(())) => {
                    assert_eq!(problems.len(), 1, "{topic}: {problems:?}");
                    let told = problems[0].to_string();
                    assert!(
                        told.starts_with("r.toml:4: dead_letter: the dead letters would take the ephemeral")
                    );
                    assert!(told.contains("r.toml:10 and be lost"), "{told}");
                }
                (read, _) => panic!("{topic} {lane}: {read:?}"),
            }
        }
        // Those of a route do not become its own: they would go round for ever.
        let all = "[[route]]\ntopic = \"x.>\"\nlane = \"durable\"\nmax_deliveries = 2\ndead_letter = \"x.dead.{topic}\"\n";
        let table = with_dead_letters(all).unwrap();
        for (topic, route) in [("dlq.a.b", "a.>.dead_letter"), ("x.dead.x.y", "x.>.dead_letter")] {
            assert_eq!(&*table.route_for(&Topic::parse(topic).unwrap()).unwrap().name, route);
        }
    }

    #[test]
    fn dead_letters_that_would_be_another_routes_pulsar_topics_are_refused_with_both_lines() {
        let acme =
            "[[route]]\ntopic = \"a.>\"\nlane = \"durable\"\npulsar = \"persistent://acme/eu/dlq.{topic}\"\n";
        let problems = with_dead_letters(&acme.replace("a.>", "a.b")).unwrap_err();
        assert_eq!(problems.len(), 1, "{problems:?}");
        let told = problems[0].to_string();
        assert!(told.contains("two topics would be one Pulsar topic") && told.contains("r.toml:"), "{told}");
    }
}
