//! A route's JSON Schema: what a payload has to look like to be carried.
//!
//! Checking one costs no more than the payload is large, times what the operator wrote: patterns are matched in linear
//! time, and nothing outside the file is ever read, so that a publish never waits for a disk or a network.

use std::fmt;
use std::sync::Arc;

use jsonschema::{PatternOptions, ValidationError, Validator, error::ValidationErrorKind};
use serde_json::Value;

/// The most of a JSON pointer, and of what was expected there, that a refusal tells.
const TOLD_BYTES_MAX: usize = 200;

/// A schema that compiled.
pub struct Schema {
    /// As the routes file names it.
    pub file: Arc<str>,
    text: String,
    validator: Validator,
}

/// Why a payload does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    #[error("it is not JSON ({0})")]
    NotJson(String),
    /// The JSON pointer of the value, and what is wrong with it.
    #[error("at \"{pointer}\": {why}")]
    Violation { pointer: String, why: String },
}

impl Schema {
    /// Compiles the text of a schema file. The error is a sentence that says what is wrong in it.
    pub fn parse(file: &str, text: String) -> Result<Self, String> {
        let schema: Value =
            serde_json::from_str(&text).map_err(|error| format!("{file} is not JSON: {error}"))?;
        let validator = jsonschema::options()
            .with_pattern_options(PatternOptions::regex())
            .offline()
            .build(&schema)
            .map_err(|error| format!("{file} is no JSON Schema: {}", unusable(&error)))?;
        Ok(Self { file: file.into(), text, validator })
    }

    /// Whether a payload is JSON that fits, and if not, the first thing that is wrong with it.
    pub fn check(&self, payload: &[u8]) -> Result<(), Misfit> {
        let value: Value =
            serde_json::from_slice(payload).map_err(|error| Misfit::NotJson(error.to_string()))?;
        self.validator.validate(&value).map_err(|error| Misfit::Violation {
            pointer: cut(error.instance_path().to_string()),
            // The value itself is not repeated: whoever sent it has it, and it may be large.
            why: cut(error.masked_with("this").to_string()),
        })
    }
}

/// Two are the same where their files say the same.
impl PartialEq for Schema {
    fn eq(&self, other: &Self) -> bool {
        (&self.file, &self.text) == (&other.file, &other.text)
    }
}

impl fmt::Debug for Schema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Schema").field(&self.file).finish()
    }
}

fn unusable(error: &ValidationError<'_>) -> String {
    match error.kind() {
        ValidationErrorKind::Referencing(error) => {
            format!("{error}; a $ref leads to a place in the same file, nothing else is read")
        }
        ValidationErrorKind::Format { format } if format == "regex" => format!(
            "at \"{}\": not a regular expression that takes linear time (no look-around, no back-references)",
            error.instance_path()
        ),
        _ => format!("at \"{}\": {error}", error.instance_path()),
    }
}

fn cut(mut text: String) -> String {
    if text.len() > TOLD_BYTES_MAX {
        text.truncate(text.floor_char_boundary(TOLD_BYTES_MAX));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schema(text: &str) -> Result<Schema, String> {
        Schema::parse("s.json", text.to_owned())
    }

    #[test]
    fn a_misfit_names_the_place_and_what_was_expected_there() {
        let schema = schema(
            r##"{"type":"object","required":["n"],"properties":{"n":{"minimum":3},"list":{"items":{"$ref":"#/$defs/s"}}},
                "$defs":{"s":{"pattern":"^a"}}}"##,
        )
        .unwrap();
        assert_eq!(schema.check(br#"{"n":3,"list":["a","ab"]}"#), Ok(()));
        let table = [
            ("[]", r#"at "": this is not of type "object""#),
            ("{}", r#"at "": "n" is a required property"#),
            (r#"{"n":1}"#, r#"at "/n": this is less than the minimum of 3"#),
            (r#"{"n":3,"list":["a","b"]}"#, r#"at "/list/1": this does not match "^a""#),
            ("{", "it is not JSON (EOF while parsing an object at line 1 column 1)"),
            ("\u{ff}", "it is not JSON (expected value at line 1 column 1)"),
        ];
        for (payload, expected) in table {
            assert_eq!(schema.check(payload.as_bytes()).unwrap_err().to_string(), expected);
        }
    }

    #[test]
    fn a_refusal_is_short_whatever_the_payload_holds() {
        let schema = schema(r#"{"additionalProperties":{"additionalProperties":false}}"#).unwrap();
        let names: Vec<_> = (0..20_000).map(|n| format!(r#""{n}":1"#)).collect();
        let payload = format!(r#"{{"{}":{{{}}}}}"#, "ä".repeat(100_000), names.join(","));
        assert!(schema.check(payload.as_bytes()).unwrap_err().to_string().len() < 3 * TOLD_BYTES_MAX);
    }

    #[test]
    fn a_schema_that_cannot_be_used_says_why() {
        let table = [
            ("{", "s.json is not JSON"),
            ("7", "is no JSON Schema"),
            (r#"{"properties":{"n":{"minimum":"x"}}}"#, r#"at "/properties/n/minimum": "x" is not of type"#),
            (r##"{"$ref":"#/nowhere"}"##, "'/nowhere' does not exist"),
            (r#"{"$ref":"other.json"}"#, "nothing else is read"),
            (r#"{"$ref":"file:///etc/hostname"}"#, "nothing else is read"),
            (r#"{"$ref":"http://127.0.0.1:1/a"}"#, "nothing else is read"),
            (r#"{"pattern":"(?=a)b"}"#, r#"at "/pattern": not a regular expression that takes linear time"#),
        ];
        for (text, expected) in table {
            let error = schema(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }

    #[test]
    fn a_schema_that_refers_to_itself_ends() {
        assert_eq!(schema(r##"{"$ref":"#"}"##).unwrap().check(b"[[1]]"), Ok(()));
    }
}
