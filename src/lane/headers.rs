//! Which headers an ephemeral message may have: those that NATS carries unchanged.
//!
//! The bus holds to the same, so that a route which moves from the bus to a broker refuses nobody whom it served.

use super::contract::LaneError;
use crate::message::{LIVE, Message};

/// Names that begin so, in any case, belong to the fabric and to the broker.
const RESERVED: [&str; 2] = ["twinspan-", "nats-"];

/// Refuses by name what NATS would change, misread or take for its own.
pub fn check(message: &Message) -> Result<(), LaneError> {
    for (name, value) in &message.headers {
        let lower = name.to_ascii_lowercase();
        if let Some(prefix) = RESERVED.iter().find(|prefix| lower.starts_with(**prefix) && name != LIVE) {
            return refuse(format!("header `{name}`: names that begin with `{prefix}` belong to the fabric"));
        }
        if name.is_empty() || name.contains(|c: char| !c.is_ascii_graphic() || c == ':') {
            return refuse(format!(
                "header {name:?}: a name is made of visible ASCII characters without `:` and is not empty"
            ));
        }
        if !is_carried(value) {
            return refuse(format!(
                "header `{name}`: a value has no line break, and no white space at its ends"
            ));
        }
    }
    match &message.key {
        Some(key) if !is_carried(key) => refuse(
            "the key travels in a header, so it has no line break, and no white space at its ends".into(),
        ),
        _ => Ok(()),
    }
}

/// Line breaks end a header, and clients trim what stands around its value.
fn is_carried(value: &str) -> bool {
    !value.contains(['\r', '\n']) && value.trim() == value
}

fn refuse(why: String) -> Result<(), LaneError> {
    Err(LaneError::BadRequest(format!("{why}; nothing was sent")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Draft;

    fn checked(name: &str, value: &str) -> Result<(), LaneError> {
        let headers = [(name.to_owned(), value.to_owned())].into();
        check(&Draft { headers, ..Draft::default() }.accept())
    }

    #[test]
    fn a_header_that_nats_would_change_or_misread_is_refused_by_name() {
        for (name, value) in [("traceparent", "00-ab-01"), ("X", ""), ("a/b", "ä, \u{1F980} \t x")] {
            checked(name, value).unwrap();
        }
        for (name, value) in [
            ("x", "a\r\nb"),
            ("x", "a\n"),
            ("x", " a"),
            ("x", "a\u{a0}"),
            ("", "a"),
            ("a:b", "a"),
            ("a b", "a"),
            ("ä", "a"),
            ("a\r\nb", "a"),
            ("Nats-Msg-Id", "a"),
            ("NATS-x", "a"),
            ("Twinspan-Id", "a"),
        ] {
            let error = checked(name, value).unwrap_err().to_string();
            assert!(error.contains(name) || error.contains(&format!("{name:?}")), "{name:?}: {error}");
            assert!(error.ends_with("nothing was sent"), "{error}");
        }
        let keyed = |key: &str| check(&Draft { key: Some(key.into()), ..Draft::default() }.accept());
        keyed("a b").unwrap();
        assert!(keyed("a\nb").is_err());
    }
}
