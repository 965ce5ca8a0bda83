//! Templates: which broker names a route may make, and when two routes make the same one.
//!
//! `{topic}` stands between whole tokens, so every name leads back to one topic, a pattern over topics is a pattern
//! over names, and no topic can complete what stands beside it to a name that the broker keeps for itself.

use super::table::Template;
use crate::topic::{Pattern, Topic, TopicError};

pub const NATS_DEFAULT: &str = "{topic}";
pub const PULSAR_DEFAULT: &str = "persistent://public/default/{topic}";

/// Why a template cannot name topics at its broker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("{0:?} must hold {{topic}} exactly once: it is where the topic goes")]
    NotOnce(String),
    #[error(
        "{0:?} must end in {{topic}}: a NATS wildcard for the rest of a subject can only stand at its end"
    )]
    NotLast(String),
    #[error("in {0:?} whole tokens must stand around {{topic}}: put a dot between")]
    NotWhole(String),
    #[error("in {0:?} what stands beside {{topic}} is no name: {1}")]
    Token(String, TopicError),
    #[error("{0:?} is the topic itself: put a name before it, such as \"dlq.{{topic}}\"")]
    Itself(String),
    #[error("{0:?} is no Pulsar topic: write \"persistent://tenant/namespace/{{topic}}\"")]
    NotPulsar(String),
}

/// A template for NATS subjects, such as `acme.{topic}`.
pub fn nats(text: &str) -> Result<Template, TemplateError> {
    let (before, after) = split(text)?;
    if !after.is_empty() {
        return Err(TemplateError::NotLast(text.to_owned()));
    }
    check_beside(text, before, after)?;
    template(text)
}

/// A template for Pulsar topics, such as `persistent://acme/billing/{topic}`.
pub fn pulsar(text: &str) -> Result<Template, TemplateError> {
    let (before, after) = split(text)?;
    let not_pulsar = || TemplateError::NotPulsar(text.to_owned());
    let path = before.strip_prefix("persistent://").ok_or_else(not_pulsar)?;
    let mut parts = path.splitn(3, '/');
    let (Some(tenant), Some(namespace), Some(local)) = (parts.next(), parts.next(), parts.next()) else {
        return Err(not_pulsar());
    };
    let is_name = |name: &str| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "_-=:.".contains(c))
    };
    if !is_name(tenant) || !is_name(namespace) {
        return Err(not_pulsar());
    }
    check_beside(text, local, after)?;
    template(text)
}

/// A template for the topics of dead letters, such as `dlq.{topic}`.
pub fn dead_letter(text: &str) -> Result<Template, TemplateError> {
    match split(text)? {
        ("", "") => Err(TemplateError::Itself(text.to_owned())),
        (before, after) => {
            check_beside(text, before, after)?;
            template(text)
        }
    }
}

/// Whether a topic of one pattern and another topic of the other can get the same name at the broker.
pub fn collide(a: (&Template, &Pattern), b: (&Template, &Pattern)) -> bool {
    a.0 != b.0 && meet(&symbols(&a.0.apply(a.1.as_str())), &symbols(&b.0.apply(b.1.as_str())))
}

fn split(text: &str) -> Result<(&str, &str), TemplateError> {
    match text.split_once("{topic}") {
        Some((before, after)) if !after.contains("{topic}") => Ok((before, after)),
        _ => Err(TemplateError::NotOnce(text.to_owned())),
    }
}

fn template(text: &str) -> Result<Template, TemplateError> {
    Template::parse(text).ok_or_else(|| TemplateError::NotOnce(text.to_owned()))
}

fn check_beside(text: &str, before: &str, after: &str) -> Result<(), TemplateError> {
    let not_whole = || TemplateError::NotWhole(text.to_owned());
    let beside = [
        (!before.is_empty()).then(|| before.strip_suffix('.').ok_or_else(not_whole)),
        (!after.is_empty()).then(|| after.strip_prefix('.').ok_or_else(not_whole)),
    ];
    for tokens in beside.into_iter().flatten() {
        Topic::parse(tokens?).map_err(|error| TemplateError::Token(text.to_owned(), error))?;
    }
    Ok(())
}

#[derive(Clone, Copy, PartialEq)]
enum Symbol<'a> {
    Token(&'a str),
    One,
    AnyNumber,
}

fn symbols(name: &str) -> Vec<Symbol<'_>> {
    let tokens = name.split(['.', '/']).map(|token| match token {
        "*" => vec![Symbol::One],
        ">" => vec![Symbol::One, Symbol::AnyNumber],
        token => vec![Symbol::Token(token)],
    });
    tokens.flatten().collect()
}

/// Whether some name is in both. Each side has at most one `AnyNumber`, so this ends quickly.
fn meet(a: &[Symbol<'_>], b: &[Symbol<'_>]) -> bool {
    match (a, b) {
        ([], []) => true,
        ([Symbol::AnyNumber, rest @ ..], _) => meet(rest, b) || (!b.is_empty() && meet(a, &b[1..])),
        (_, [Symbol::AnyNumber, rest @ ..]) => meet(a, rest) || (!a.is_empty() && meet(&a[1..], b)),
        ([x, a @ ..], [y, b @ ..]) => (x == y || *x == Symbol::One || *y == Symbol::One) && meet(a, b),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nats_template_is_literal_tokens_and_then_the_topic() {
        for good in ["{topic}", "acme.{topic}", "acme.eu-1.{topic}"] {
            assert_eq!(nats(good).unwrap().to_string(), good);
        }
        use TemplateError::*;
        let refused = |bad: &str| nats(bad).unwrap_err();
        for bad in ["acme", "{topic}.{topic}"] {
            assert_eq!(refused(bad), NotOnce(bad.into()));
        }
        for bad in ["acme{topic}", "{tenant}{topic}"] {
            assert_eq!(refused(bad), NotWhole(bad.into()));
        }
        assert_eq!(refused("{topic}.eu"), NotLast("{topic}.eu".into()));
        for bad in ["a b.{topic}", ".{topic}", "a..{topic}", "*.{topic}", "$SYS.{topic}", "_INBOX.{topic}"] {
            assert!(matches!(nats(bad), Err(Token(..))), "{bad}");
        }
    }

    #[test]
    fn a_pulsar_template_names_tenant_namespace_and_topic() {
        for good in [
            PULSAR_DEFAULT,
            "persistent://acme/billing/{topic}",
            "persistent://acme/billing-2/eu.{topic}",
            "persistent://acme/billing/{topic}.v1",
        ] {
            assert_eq!(pulsar(good).unwrap().to_string(), good);
        }
        use TemplateError::*;
        for bad in [
            "{topic}",
            "persistent://acme/{topic}",
            "persistent:///billing/{topic}",
            "persistent://acme/{topic}/x",
            "non-persistent://public/default/{topic}",
            "persistent://a*/b/{topic}",
        ] {
            assert_eq!(pulsar(bad), Err(NotPulsar(bad.into())), "{bad}");
        }
        for bad in [
            "persistent://a/b/x-partition-{topic}",
            "persistent://a/b/c/{topic}",
            "persistent://a/b/{topic}3",
        ] {
            assert_eq!(pulsar(bad), Err(NotWhole(bad.into())), "{bad}");
        }
        for bad in ["persistent://a/b/c/d.{topic}", "persistent://a/b/{topic}.x-partition-3"] {
            assert!(matches!(pulsar(bad), Err(Token(..))), "{bad}");
        }
    }

    #[test]
    fn two_routes_collide_where_two_topics_get_one_name() {
        let table = [
            ("{topic}", ">", "acme.{topic}", "orders.>", true),
            ("{topic}", "a.>", "acme.{topic}", "orders.>", false),
            ("{topic}", "acme.*", "acme.{topic}", "*", true),
            ("{topic}", "acme.*", "acme.{topic}", "orders.>", false),
            ("{topic}", "a.>", "{topic}", "*.b", false),
            (PULSAR_DEFAULT, ">", "persistent://acme/billing/{topic}", ">", false),
            (PULSAR_DEFAULT, "*", "persistent://public/default/{topic}.v1", "a", false),
            (PULSAR_DEFAULT, "*.*", "persistent://public/default/{topic}.v1", "a", true),
            ("persistent://a/b/{topic}.v1", "x.>", "persistent://a/b/{topic}.v2", "x.>", false),
            ("persistent://a/b/{topic}.v1", "x.>", "persistent://a/b/x.{topic}", "y.v1", true),
        ];
        for (a, p, b, q, expected) in table {
            let (x, y) = (Template::parse(a).unwrap(), Template::parse(b).unwrap());
            let (p, q) = (Pattern::parse(p).unwrap(), Pattern::parse(q).unwrap());
            assert_eq!(collide((&x, &p), (&y, &q)), expected, "{a} {p} {b} {q}");
            assert_eq!(collide((&y, &q), (&x, &p)), expected, "{b} {q} {a} {p}");
        }
    }
}
