//! Topics and patterns: names that are valid because they exist.
//!
//! A topic is 1 to 32 dot-separated tokens, at most 255 bytes. A pattern may also hold `*` (one token) and end in
//! `>` (one or more). The rules are those of NATS, whose users read our patterns; the alphabet is narrower, so that
//! a topic is also a Pulsar topic name, a NATS subject and a path segment without quoting.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

/// The longest topic or pattern, in bytes.
pub const NAME_BYTES_MAX: usize = 255;
/// The most tokens in a topic or pattern.
pub const TOKENS_MAX: usize = 32;

/// The name of one stream of messages, such as `orders.eu.created`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(Arc<str>);

/// A topic, or a set of topics such as `orders.*` or `orders.>`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pattern(Arc<str>);

/// Why a name is not a topic or a pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    #[error("a topic may not be empty")]
    Empty,
    #[error("a topic is at most {NAME_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
    #[error("a topic has at most {TOKENS_MAX} tokens, this one has {0}")]
    TooManyTokens(usize),
    #[error("topic `{0}` has an empty token: dots stand between tokens, not at an end or side by side")]
    EmptyToken(String),
    #[error("topic `{0}` has {1:?}: a token is made of A-Z a-z 0-9 _ - : = ~ @ + %")]
    Character(String, char),
    #[error("`{0}` has a wildcard: it names many topics, and one is needed here")]
    Wildcard(String),
    #[error("`>` stands for the rest of a topic, so it can only be the last token of `{0}`")]
    NotLast(String),
    #[error("topic `{0}` ends in `-partition-` and digits, which Pulsar keeps for itself")]
    Partition(String),
    /// The name is well formed; it is not the client's to use.
    #[error("topic `{0}` belongs to the fabric: a first token may not begin with `$` or `_`")]
    Reserved(String),
}

impl Topic {
    pub fn parse(name: &str) -> Result<Self, TopicError> {
        check(name, false)?;
        Ok(Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Pattern {
    pub fn parse(name: &str) -> Result<Self, TopicError> {
        check(name, true)?;
        Ok(Self(name.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The one topic that this pattern names, where it has no wildcard.
    pub fn topic(&self) -> Option<Topic> {
        self.tokens().all(|token| token != "*" && token != ">").then(|| Topic(self.0.clone()))
    }

    pub fn matches(&self, topic: &Topic) -> bool {
        self.matches_name(topic.as_str())
    }

    /// The same for a name that came from a broker and need not be a topic of ours.
    pub fn matches_name(&self, name: &str) -> bool {
        let mut theirs = byte_tokens(name);
        for ours in byte_tokens(&self.0) {
            match (ours, theirs.next()) {
                (b">", Some(_)) => return true,
                (b"*", Some(_)) => {}
                (token, Some(other)) if token == other => {}
                _ => return false,
            }
        }
        theirs.next().is_none()
    }

    /// Whether some topic is matched by both.
    pub fn overlaps(&self, other: &Pattern) -> bool {
        let (mut ours, mut theirs) = (self.tokens(), other.tokens());
        loop {
            match (ours.next(), theirs.next()) {
                (Some(">"), Some(_)) | (Some(_), Some(">")) => return true,
                (Some(a), Some(b)) if a == b || a == "*" || b == "*" => {}
                (None, None) => return true,
                _ => return false,
            }
        }
    }

    /// Whether every topic of the other is one of this.
    pub fn covers(&self, other: &Pattern) -> bool {
        let (mut ours, mut theirs) = (self.tokens(), other.tokens());
        loop {
            match (ours.next(), theirs.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(token)) if token != ">" => {}
                (Some(a), Some(b)) if a == b => {}
                _ => return false,
            }
        }
    }

    /// Orders patterns by precedence, the more specific first: token by token from the left, a literal before `*`
    /// before `>`. Of the patterns that match one topic, the first in this order wins.
    pub fn precedence(&self, other: &Pattern) -> Ordering {
        let rank = |token: &str| match token {
            ">" => 2,
            "*" => 1,
            _ => 0,
        };
        self.tokens().map(rank).cmp(other.tokens().map(rank)).then_with(|| self.0.cmp(&other.0))
    }

    pub fn tokens(&self) -> impl Iterator<Item = &str> {
        self.0.split('.')
    }
}

fn check(name: &str, wildcards: bool) -> Result<(), TopicError> {
    if name.is_empty() {
        return Err(TopicError::Empty);
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(TopicError::TooLong(name.len()));
    }
    let tokens = byte_tokens(name).count();
    if tokens > TOKENS_MAX {
        return Err(TopicError::TooManyTokens(tokens));
    }
    if name.starts_with(['$', '_']) {
        return Err(TopicError::Reserved(name.into()));
    }
    for (at, token) in byte_tokens(name).enumerate() {
        match token {
            b"" => return Err(TopicError::EmptyToken(name.into())),
            b"*" | b">" if !wildcards => return Err(TopicError::Wildcard(name.into())),
            b">" if at + 1 < tokens => return Err(TopicError::NotLast(name.into())),
            b"*" | b">" => {}
            _ if token.iter().all(|byte| is_token_character(char::from(*byte))) => {}
            _ => {
                let mut characters = name.split('.').skip(at).flat_map(str::chars);
                let bad = characters.find(|c| !is_token_character(*c)).unwrap_or_default();
                return Err(TopicError::Character(name.into(), bad));
            }
        }
    }
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    match stem.len() < name.len() && stem.ends_with("-partition-") {
        true => Err(TopicError::Partition(name.into())),
        false => Ok(()),
    }
}

/// Every publish comes by here several times, and bytes are split faster than text.
fn byte_tokens(name: &str) -> impl Iterator<Item = &[u8]> {
    name.as_bytes().split(|byte| *byte == b'.')
}

fn is_token_character(c: char) -> bool {
    matches!(c, 'A'..='Z' | 'a'..='z' | '0'..='9' | '_' | '-' | ':' | '=' | '~' | '@' | '+' | '%')
}

impl From<Topic> for Pattern {
    fn from(topic: Topic) -> Self {
        Self(topic.0)
    }
}

impl Borrow<str> for Topic {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_is_dot_separated_tokens_of_the_alphabet() {
        for good in ["a", "orders.eu.created", "A-Z.a_z.0:9=~@+%", &["t"; 32].join(".")] {
            assert!(Topic::parse(good).is_ok(), "{good}");
        }
        let long = "a".repeat(256);
        let deep = ["t"; 33].join(".");
        for bad in
            ["", ".", "a.", ".a", "a..b", "a b", "a/b", "ä", "a.*", ">", "a\0", &long, &deep, "t-partition-3"]
        {
            assert!(Topic::parse(bad).is_err(), "{bad}");
        }
        assert!(Topic::parse("t-partition-x").is_ok());
        assert!(matches!(Topic::parse("$SYS.a"), Err(TopicError::Reserved(_))));
        assert!(matches!(Topic::parse("_INBOX.a"), Err(TopicError::Reserved(_))));
    }

    #[test]
    fn a_pattern_matches_as_nats_does() {
        let table = [
            ("a.b", "a.b", true),
            ("a.b", "a.c", false),
            ("a.*", "a.b", true),
            ("a.*", "a", false),
            ("a.*", "a.b.c", false),
            ("*.b", "a.b", true),
            ("a.>", "a.b.c", true),
            ("a.>", "a", false),
            (">", "a", true),
            ("a.*.>", "a.b", false),
            ("a.*.>", "a.b.c", true),
        ];
        for (pattern, topic, expected) in table {
            let (p, t) = (Pattern::parse(pattern).unwrap(), Topic::parse(topic).unwrap());
            assert_eq!(p.matches(&t), expected, "{pattern} {topic}");
            assert_eq!(p.overlaps(&t.into()), expected, "{pattern} {topic}");
        }
        assert!(Pattern::parse("a.>.b").is_err());
        assert_eq!(Pattern::parse("a.foo*").err(), Some(TopicError::Character("a.foo*".into(), '*')));
    }

    #[test]
    fn a_pattern_covers_another_where_it_has_all_of_its_topics() {
        let table = [
            ("a.>", "a.b.>", true),
            (">", "*", true),
            ("a.*", "a.b", true),
            ("a.*", "a.*", true),
            ("a.*", "a.>", false),
            ("a.b", "a.*", false),
            ("a.>", "a", false),
            ("*.b", "a.*", false),
        ];
        for (a, b, expected) in table {
            let (a, b) = (Pattern::parse(a).unwrap(), Pattern::parse(b).unwrap());
            assert_eq!(a.covers(&b), expected, "{a} {b}");
        }
    }

    #[test]
    fn patterns_overlap_where_some_topic_is_in_both() {
        let table = [
            ("a.*.c", "a.b.*", true),
            ("a.>", "*.b", true),
            ("a.b.>", "a.*", false),
            ("a.*", "b.*", false),
            (">", "x.y.z", true),
        ];
        for (a, b, expected) in table {
            let (a, b) = (Pattern::parse(a).unwrap(), Pattern::parse(b).unwrap());
            assert_eq!(a.overlaps(&b), expected, "{a} {b}");
            assert_eq!(b.overlaps(&a), expected, "{b} {a}");
        }
    }

    #[test]
    fn a_literal_goes_before_a_star_before_a_tail_token_by_token() {
        let mut patterns: Vec<_> = [">", "*.b", "a.>", "a.*", "a.b", "a.b.>"]
            .into_iter()
            .map(|p| Pattern::parse(p).unwrap())
            .collect();
        patterns.sort_by(Pattern::precedence);
        let sorted: Vec<_> = patterns.iter().map(Pattern::as_str).collect();
        assert_eq!(sorted, ["a.b", "a.b.>", "a.*", "a.>", "*.b", ">"]);
    }
}
