//! The oracle of the fault tests: what was asked and answered, what came, and what of it breaks a promise.
//!
//! ```text
//! publishers ── operations ──▶ ┌─────────┐
//! subscribers ─ deliveries ──▶ │ history │ ──▶ violations, each with all that is known of its message
//! faults ─────── disturbances ▶└─────────┘
//! ```
//! A message may be published several times with one id; each time is an operation. It is accepted once one of them was
//! acknowledged, and refused where every one was surely not done. Nothing here reads a clock or a socket: a history has
//! one verdict.

mod order;
mod proofs;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};

/// Milliseconds since the run began.
pub type Moment = u64;

/// What was handed to a broker by a bridge that is killed within so long may be lost: an ephemeral ack says no more.
const HANDED_OVER: Moment = 1000;
/// What a broken lane held may come again, and until then after it is back.
const AFTERMATH: Moment = 5000;

/// The `n`th message of a publisher.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name {
    pub topic: String,
    pub publisher: usize,
    pub n: u64,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of publisher {} to {}", self.n, self.publisher, self.topic)
    }
}

/// One publish of a message.
#[derive(Debug, Clone)]
pub struct Operation {
    pub name: Name,
    pub key: Option<String>,
    /// The publisher's connections are counted.
    pub connection: usize,
    pub sent: Moment,
    pub answered: Moment,
    pub answer: Answer,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    Ok,
    Spooled,
    Duplicate,
    /// Surely not done; the code.
    Refused(String),
    /// It may have been done.
    Unknown(String),
}

/// What a subscriber is promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Promise {
    /// Ephemeral: at most once, in order, and a gap where something is missing.
    Live,
    /// The members of an ephemeral group: at most once to one of them.
    Queue,
    /// Everything that is stored, once and in order.
    Stored,
    /// Live before it is stored: everything, and in order what is not late.
    First,
    /// The members of a durable group: everything, and again only where something broke.
    Shared,
    /// The same, and a key's messages in order.
    KeyShared,
}

/// One subscription, or all members of a group together.
#[derive(Debug, Clone)]
pub struct Subscriber {
    pub name: String,
    pub topic: String,
    pub promise: Promise,
    pub heard: Vec<Heard>,
}

#[derive(Debug, Clone)]
pub struct Heard {
    pub at: Moment,
    pub what: What,
}

#[derive(Debug, Clone)]
pub enum What {
    Event {
        name: Name,
        position: Option<String>,
        late: bool,
    },
    /// How many are missing, where that is known.
    Gap(Option<u64>),
}

/// What was broken, and until when.
#[derive(Debug, Clone)]
pub struct Disturbance {
    pub hurt: Hurt,
    pub from: Moment,
    pub to: Moment,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hurt {
    Nats,
    Pulsar,
    Bridge,
}

#[derive(Debug, Clone, Default)]
pub struct History {
    pub operations: Vec<Operation>,
    pub subscribers: Vec<Subscriber>,
    pub disturbances: Vec<Disturbance>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rule {
    Lost,
    NeverSent,
    RefusedAndDelivered,
    OutOfOrder,
    Repeated,
    StoredTwice,
    DuplicateOfNothing,
    GapDoesNotAddUp,
}

#[derive(Debug, Clone)]
pub struct Violation {
    pub rule: Rule,
    pub message: Option<Name>,
    pub text: String,
}

/// All operations of one message, with their places in the history.
struct Message<'a>(Vec<(usize, &'a Operation)>);

impl Message<'_> {
    fn is_accepted(&self) -> bool {
        self.0.iter().any(|(_, of)| matches!(of.answer, Answer::Ok | Answer::Spooled | Answer::Duplicate))
    }

    fn is_refused(&self) -> bool {
        self.0.iter().all(|(_, of)| matches!(of.answer, Answer::Refused(_)))
    }

    /// How often it may be stored: by each operation of which nobody said that it stored nothing.
    fn copies_max(&self) -> usize {
        self.0.iter().filter(|(_, of)| may_have_stored(&of.answer)).count()
    }
}

fn may_have_stored(answer: &Answer) -> bool {
    matches!(answer, Answer::Ok | Answer::Spooled | Answer::Unknown(_))
}

type Messages<'a> = BTreeMap<&'a Name, Message<'a>>;

impl History {
    /// Everything that breaks a promise.
    pub fn violations(&self) -> Vec<Violation> {
        let messages = self.messages();
        let mut found = Vec::new();
        for (name, message) in &messages {
            found.extend(stored_by_one_connection(name, message));
        }
        for subscriber in &self.subscribers {
            self.look_at_each(subscriber, &messages, &mut found);
            order::look(subscriber, &messages, &mut found);
            self.look_for_lost(subscriber, &messages, &mut found);
        }
        found
    }

    /// What is still to come to those who are promised everything.
    pub fn owed(&self) -> Vec<Violation> {
        let (messages, mut found) = (self.messages(), Vec::new());
        for subscriber in self.subscribers.iter().filter(|subscriber| subscriber.promise.is_whole()) {
            self.look_for_lost(subscriber, &messages, &mut found);
        }
        found
    }

    /// How many were said to be missing, by gaps that count.
    pub fn announced(&self) -> u64 {
        let heard = self.subscribers.iter().flat_map(|subscriber| &subscriber.heard);
        heard.map(|heard| if let What::Gap(Some(dropped)) = heard.what { dropped } else { 0 }).sum()
    }

    /// All that is known of a message, in the order of time.
    pub fn story(&self, name: &Name) -> String {
        let mut lines = Vec::new();
        for of in self.operations.iter().filter(|of| of.name == *name) {
            let asked = format!("published on connection {} with key {:?}", of.connection, of.key);
            lines.push((of.sent, asked));
            lines.push((of.answered, format!("answered {:?}, as asked at {} ms", of.answer, of.sent)));
        }
        for subscriber in &self.subscribers {
            for heard in &subscriber.heard {
                if let What::Event { name: event, position, late } = &heard.what
                    && event == name
                {
                    let came = format!("came to {} at {position:?}, late: {late}", subscriber.name);
                    lines.push((heard.at, came));
                }
            }
        }
        lines.sort();
        lines.iter().fold(format!("{name}\n"), |mut story, (at, line)| {
            let _ = writeln!(story, "  {at:>7} ms  {line}");
            story
        })
    }

    fn messages(&self) -> Messages<'_> {
        let mut messages = Messages::new();
        for (place, of) in self.operations.iter().enumerate() {
            messages.entry(&of.name).or_insert_with(|| Message(Vec::new())).0.push((place, of));
        }
        messages
    }

    /// Whether something of these was broken at some time between the two moments.
    fn was_hurt(&self, hurt: &[Hurt], from: Moment, to: Moment) -> bool {
        let within = |of: &Disturbance| hurt.contains(&of.hurt) && of.from <= to && of.to + AFTERMATH >= from;
        self.disturbances.iter().any(within)
    }

    /// What no single event may be, and how often a message may come.
    fn look_at_each(&self, subscriber: &Subscriber, messages: &Messages<'_>, found: &mut Vec<Violation>) {
        let mut came: BTreeMap<&Name, Vec<(Moment, Option<&String>)>> = BTreeMap::new();
        for heard in &subscriber.heard {
            let What::Event { name, position, .. } = &heard.what else { continue };
            let violation = |rule, text: String| Violation {
                rule,
                message: Some(name.clone()),
                text: format!("{name} came to {}{text}", subscriber.name),
            };
            let Some(message) = messages.get(name) else {
                found.push(violation(Rule::NeverSent, ", and nobody published it".into()));
                continue;
            };
            if message.is_refused() {
                found.push(violation(
                    Rule::RefusedAndDelivered,
                    ", and every publish of it was refused".into(),
                ));
            }
            let before = came.entry(name).or_default();
            if !before.is_empty() && !self.may_repeat(subscriber.promise, message, before, heard.at, position)
            {
                found.push(violation(Rule::Repeated, format!(" again, after {before:?}, at {position:?}")));
            }
            before.push((heard.at, position.as_ref()));
        }
    }

    fn may_repeat(
        &self,
        promise: Promise,
        message: &Message<'_>,
        before: &[(Moment, Option<&String>)],
        at: Moment,
        position: &Option<String>,
    ) -> bool {
        let is_of_a_copy = before.len() < message.copies_max();
        let first = before[0].0;
        match promise {
            Promise::Live | Promise::Queue => is_of_a_copy,
            Promise::Stored => is_of_a_copy && before.iter().all(|(_, of)| *of != position.as_ref()),
            // Who resumes goes on behind the last checkpoint.
            Promise::First => is_of_a_copy || self.was_hurt(&[Hurt::Bridge], first, at),
            Promise::Shared | Promise::KeyShared => {
                is_of_a_copy || self.was_hurt(&[Hurt::Bridge, Hurt::Pulsar], first, at)
            }
        }
    }

    /// What was accepted and did not come. Of what is ephemeral each hole needs a gap, and what is counted adds up.
    fn look_for_lost(&self, subscriber: &Subscriber, messages: &Messages<'_>, found: &mut Vec<Violation>) {
        let (mut places, mut gaps, mut announced) = (BTreeMap::new(), BTreeSet::new(), 0);
        for (place, heard) in subscriber.heard.iter().enumerate() {
            match &heard.what {
                What::Event { name, .. } => _ = places.entry(name).or_insert(place),
                What::Gap(None) => _ = gaps.insert(place),
                What::Gap(Some(dropped)) => announced += dropped,
            }
        }
        let lost = messages.iter().filter(|(name, message)| {
            name.topic == subscriber.topic && message.is_accepted() && !places.contains_key(*name)
        });
        let (mut holes, mut excused) = (0, 0);
        for (name, message) in lost {
            let is_excused = match subscriber.promise {
                Promise::Live => {
                    let is_near = |of: &&Name| of.publisher == name.publisher;
                    let after = places.range::<&Name, _>(*name..).take_while(|(of, _)| is_near(of)).next();
                    let before = places.range::<&Name, _>(..*name).next_back().filter(|(of, _)| is_near(of));
                    let (low, high) = (before.map_or(0, |of| *of.1), after.map_or(usize::MAX, |of| *of.1));
                    gaps.range(low.min(high)..=low.max(high)).next().is_some() || self.handed_over(message)
                }
                Promise::Queue => message.0.iter().any(|(_, of)| {
                    self.was_hurt(&[Hurt::Nats, Hurt::Bridge], of.sent, of.answered + HANDED_OVER)
                }),
                _ => false,
            };
            if is_excused {
                excused += 1;
                continue;
            }
            holes += 1;
            if holes > announced {
                found.push(Violation {
                    rule: Rule::Lost,
                    message: Some((*name).clone()),
                    text: format!("{name} was accepted and never came to {}", subscriber.name),
                });
            }
        }
        if holes + excused < announced {
            found.push(Violation {
                rule: Rule::GapDoesNotAddUp,
                message: None,
                text: format!(
                    "{} was told that {announced} are missing, and {} are",
                    subscriber.name,
                    holes + excused
                ),
            });
        }
    }

    /// Whether its bridge was killed so soon that nobody knows what became of it.
    fn handed_over(&self, message: &Message<'_>) -> bool {
        let kills = || self.disturbances.iter().filter(|of| of.hurt == Hurt::Bridge);
        message
            .0
            .iter()
            .any(|(_, of)| kills().any(|kill| of.sent <= kill.from && kill.from <= of.answered + HANDED_OVER))
    }
}

impl Promise {
    /// Whether all that was accepted has to come.
    pub fn is_whole(self) -> bool {
        !matches!(self, Promise::Live | Promise::Queue)
    }
}

/// A connection has one bridge, which knows what it stored.
fn stored_by_one_connection(name: &Name, message: &Message<'_>) -> Option<Violation> {
    let violation = |rule, text: &str| {
        Some(Violation { rule, message: Some(name.clone()), text: format!("{name} {text}") })
    };
    let mut stored = BTreeSet::new();
    for (_, of) in &message.0 {
        if of.answer == Answer::Ok && !stored.insert(of.connection) {
            return violation(Rule::StoredTwice, "was stored twice by the bridge of one connection");
        }
    }
    if message.0.iter().any(|(_, of)| of.answer == Answer::Duplicate) && message.copies_max() == 0 {
        return violation(Rule::DuplicateOfNothing, "is a duplicate, and nothing was stored before");
    }
    None
}
