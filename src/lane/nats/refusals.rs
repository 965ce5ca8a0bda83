//! What the server forbids. It says so in a line of text, behind the caller's back and after its Ok.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::lane::contract::LaneError;

/// For how long a refusal is taken as the answer to the next publish; the server may be reconfigured.
const REMEMBERED: Duration = Duration::from_secs(10);
/// More refused subjects than this at a time are refused by the server, one by one.
const SUBJECTS_MAX: usize = 1024;

#[derive(Debug, PartialEq)]
pub enum Refusal<'a> {
    Publish { subject: &'a str },
    Subscription { subject: &'a str, group: Option<&'a str> },
}

impl<'a> Refusal<'a> {
    /// Reads `Permissions Violation for Publish to "a.b"` and its kin.
    pub fn parse(text: &'a str) -> Option<Self> {
        let what = text.strip_prefix("Permissions Violation for ")?;
        let quoted = |prefix: &str| -> Option<(&'a str, &'a str)> {
            what.strip_prefix(prefix)?.strip_prefix('"')?.split_once('"')
        };
        if let Some((subject, _)) = quoted("Publish to ").or_else(|| quoted("Publish with Reply of ")) {
            return Some(Refusal::Publish { subject });
        }
        let (subject, rest) = quoted("Subscription to ")?;
        let group = rest.strip_prefix(" using queue \"").and_then(|rest| rest.split_once('"'));
        Some(Refusal::Subscription { subject, group: group.map(|(group, _)| group) })
    }
}

pub fn may_not_publish(subject: &str) -> LaneError {
    LaneError::Forbidden(format!(
        "the NATS user of this bridge may not publish to `{subject}`; the message was not delivered"
    ))
}

pub fn may_not_subscribe(subject: &str) -> LaneError {
    LaneError::Forbidden(format!("the NATS user of this bridge may not subscribe to `{subject}`"))
}

/// The subjects to which publishing was refused lately.
#[derive(Default)]
pub struct Refused(Mutex<HashMap<String, Instant>>);

impl Refused {
    /// `true` where this is news.
    pub fn note(&self, subject: &str) -> bool {
        let mut refused = self.lock();
        refused.retain(|_, since| since.elapsed() < REMEMBERED);
        refused.len() < SUBJECTS_MAX && refused.insert(subject.to_owned(), Instant::now()).is_none()
    }

    pub fn check(&self, subject: &str) -> Result<(), LaneError> {
        match self.lock().get(subject) {
            Some(since) if since.elapsed() < REMEMBERED => Err(may_not_publish(subject)),
            _ => Ok(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        // Each use is one statement, so a panic elsewhere spoils nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_read_out_of_the_servers_text() {
        let publish = |subject| Some(Refusal::Publish { subject });
        let subscription = |subject, group| Some(Refusal::Subscription { subject, group });
        let table = [
            ("Permissions Violation for Publish to \"a.b\"", publish("a.b")),
            ("Permissions Violation for Publish with Reply of \"_INBOX.x\"", publish("_INBOX.x")),
            ("Permissions Violation for Subscription to \"a.>\"", subscription("a.>", None)),
            (
                "Permissions Violation for Subscription to \"a\" using queue \"q\"",
                subscription("a", Some("q")),
            ),
            ("Permissions Violation for Subscription to \"a\" (sid \"4\")", subscription("a", None)),
            ("Permissions Violation for Subscription to \"a\", too many tokens", subscription("a", None)),
            ("Slow Consumer", None),
            ("Permissions Violation for Publish to \"a", None),
        ];
        for (text, expected) in table {
            assert_eq!(Refusal::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn so_many_refused_subjects_are_remembered_and_no_more() {
        let refused = Refused::default();
        assert!(refused.note("a") && !refused.note("a"));
        assert!(refused.check("a").is_err() && refused.check("b").is_ok());
        for at in 0..2 * SUBJECTS_MAX {
            refused.note(&at.to_string());
        }
        assert_eq!(refused.lock().len(), SUBJECTS_MAX);
    }
}
