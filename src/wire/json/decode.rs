//! Frames from the client.
//!
//! Decoding goes in two steps, so that an error still carries the `request_id` and names the field: the object is
//! taken apart into raw values, then each value that the type lists is read. What it does not list is ignored.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::Deserializer;
use serde_json::value::RawValue;

use super::nesting::{DEPTH_MAX, depth};
use crate::message::{Draft, GroupMode, Headers, Position, Start, Timestamp};
use crate::topic::{Pattern, Topic, TopicError};
use crate::wire::code::{Code, Fault};
use crate::wire::verbs::{
    Asked, Command, Group, MESSAGES_MAX, PREFETCH_DEFAULT, PREFETCH_MAX, REQUEST_ID_BYTES_MAX,
    REQUEST_TIMEOUT_DEFAULT, REQUEST_TIMEOUT_MAX, Subscribe,
};

/// The longest name of a group or a client.
const NAME_BYTES_MAX: usize = 128;
/// The longest delay of a nack.
const DELAY_MAX: Duration = Duration::from_secs(24 * 3600);

type Raw<'a> = Option<&'a RawValue>;

#[derive(Deserialize)]
struct Frame<'a> {
    #[serde(borrow, rename = "type")]
    kind: Raw<'a>,
    #[serde(borrow)]
    request_id: Raw<'a>,
    #[serde(borrow)]
    topic: Raw<'a>,
    #[serde(borrow)]
    message: Raw<'a>,
    #[serde(borrow)]
    messages: Raw<'a>,
    #[serde(borrow)]
    confirm: Raw<'a>,
    #[serde(borrow)]
    client_id: Raw<'a>,
    #[serde(borrow)]
    last_n: Raw<'a>,
    #[serde(borrow)]
    from: Raw<'a>,
    #[serde(borrow)]
    group: Raw<'a>,
    #[serde(borrow)]
    mode: Raw<'a>,
    #[serde(borrow)]
    prefetch: Raw<'a>,
    #[serde(borrow)]
    ack: Raw<'a>,
    #[serde(borrow)]
    filter: Raw<'a>,
    #[serde(borrow)]
    timeout_ms: Raw<'a>,
    #[serde(borrow)]
    reply_to: Raw<'a>,
    #[serde(borrow)]
    delivery: Raw<'a>,
    #[serde(borrow)]
    deliveries: Raw<'a>,
    #[serde(borrow)]
    delay_ms: Raw<'a>,
}

#[derive(Deserialize)]
struct MessageFrame<'a> {
    #[serde(borrow)]
    id: Raw<'a>,
    #[serde(borrow, default, deserialize_with = "even_null")]
    payload: Raw<'a>,
    #[serde(borrow)]
    encoding: Raw<'a>,
    #[serde(borrow)]
    key: Raw<'a>,
    #[serde(borrow)]
    headers: Raw<'a>,
    #[serde(borrow)]
    event_time: Raw<'a>,
    #[serde(borrow)]
    delay_ms: Raw<'a>,
}

/// A string as it stands in the frame, where nothing in it is escaped.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

/// `null` is a payload like any other.
fn even_null<'de: 'a, 'a, D: Deserializer<'de>>(deserializer: D) -> Result<Raw<'a>, D::Error> {
    <&RawValue>::deserialize(deserializer).map(Some)
}

pub fn asked(message: &Bytes) -> Asked {
    let frame = match object::<Frame<'_>>(message, "a frame") {
        Ok(frame) => frame,
        Err(fault) => return Asked { request_id: None, command: Err(fault) },
    };
    match optional::<Text<'_>>("request_id", frame.request_id, "a string") {
        Ok(Some(Text(id))) if id.len() > REQUEST_ID_BYTES_MAX => {
            let fault = Fault::bad_request(format!("request_id is longer than {REQUEST_ID_BYTES_MAX} bytes"));
            Asked { request_id: None, command: Err(fault) }
        }
        Ok(id) => Asked { request_id: id.map(|Text(id)| Arc::from(&*id)), command: command(&frame) },
        Err(fault) => Asked { request_id: None, command: Err(fault) },
    }
}

fn command(frame: &Frame<'_>) -> Result<Command, Fault> {
    let Text(kind) = required("type", frame.kind, "a string")?;
    match &*kind {
        "subscribe" => subscribe(frame).map(Command::Subscribe),
        "unsubscribe" => {
            optional::<String>("client_id", frame.client_id, "a string")?;
            Ok(Command::Unsubscribe { pattern: pattern(frame)?, group: name("group", frame.group)? })
        }
        "publish" => {
            let confirm = optional("confirm", frame.confirm, "true or false")?.unwrap_or(true);
            match frame.messages {
                None => Ok(Command::Publish { topic: topic(frame)?, draft: draft(frame)?, confirm }),
                Some(messages) => Ok(Command::PublishMany {
                    topic: topic(frame)?,
                    drafts: drafts(frame, messages)?,
                    confirm,
                }),
            }
        }
        "request" => {
            if frame.request_id.is_none() {
                return Err(Fault::bad_request("request_id is missing: the response carries it"));
            }
            let timeout = millis("timeout_ms", frame.timeout_ms, REQUEST_TIMEOUT_MAX)?;
            if timeout == Some(Duration::ZERO) {
                return Err(Fault::bad_request("timeout_ms must be at least 1"));
            }
            let timeout = timeout.unwrap_or(REQUEST_TIMEOUT_DEFAULT);
            Ok(Command::Request { topic: topic(frame)?, draft: draft(frame)?, timeout })
        }
        "reply" => {
            let reply_to: String = required("reply_to", frame.reply_to, "a string")?;
            Ok(Command::Reply { reply_to: reply_to.into(), draft: draft(frame)? })
        }
        "ack" => Ok(Command::Ack { deliveries: deliveries(frame)? }),
        "nack" => {
            let delay = millis("delay_ms", frame.delay_ms, DELAY_MAX)?;
            Ok(Command::Nack { deliveries: deliveries(frame)?, delay })
        }
        "seek" => {
            let group = name("group", frame.group)?.ok_or_else(|| missing("group"))?;
            if frame.from.is_none() {
                return Err(missing("from"));
            }
            let (pattern, start) = (pattern(frame)?, start(frame)?);
            belongs(&start, &pattern)?;
            Ok(Command::Seek { pattern, group, start })
        }
        "auth" => Err(Fault::bad_request(
            "auth: no authentication is configured here, so there is no token to replace",
        )),
        "ping" => Ok(Command::Ping),
        other => Err(Fault::bad_request(format!(
            "unknown type {other:?}: it is one of subscribe, unsubscribe, publish, request, reply, ack, nack, seek, auth, ping"
        ))),
    }
}

fn subscribe(frame: &Frame<'_>) -> Result<Subscribe, Fault> {
    let pattern = pattern(frame)?;
    let start = start(frame)?;
    belongs(&start, &pattern)?;
    let mode: Option<String> = optional("mode", frame.mode, "a string")?;
    let mode = match mode {
        None => GroupMode::default(),
        Some(mode) => GroupMode::parse(&mode).ok_or_else(|| {
            let known = GroupMode::ALL.map(GroupMode::as_str).join(", ");
            Fault::bad_request(format!("mode {mode:?} is none of {known}"))
        })?,
    };
    let prefetch: Option<u32> = optional("prefetch", frame.prefetch, "a whole number")?;
    if prefetch.is_some_and(|n| n == 0 || n > PREFETCH_MAX) {
        return Err(Fault::bad_request(format!("prefetch must be 1 to {PREFETCH_MAX}")));
    }
    let ack: Option<String> = optional("ack", frame.ack, "a string")?;
    let auto_ack = match ack.as_deref() {
        None | Some("manual") => false,
        Some("auto") => true,
        Some(other) => return Err(Fault::bad_request(format!("ack {other:?} is neither manual nor auto"))),
    };
    let group = name("group", frame.group)?.map(|name| Group {
        name,
        mode,
        prefetch: prefetch.unwrap_or(PREFETCH_DEFAULT),
        auto_ack,
    });
    if mode == GroupMode::Exclusive && group.is_some() && pattern.topic().is_none() {
        return Err(Fault::bad_request("mode exclusive is for one topic; on a pattern take failover"));
    }
    if group.is_some() && frame.last_n.is_some() {
        return Err(Fault::bad_request(
            "last_n does not go with group: `from` says where a new group starts",
        ));
    }
    let filter = optional("filter", frame.filter, "a string")?;
    Ok(Subscribe { pattern, start, client_id: name("client_id", frame.client_id)?, group, filter })
}

fn belongs(start: &Start, pattern: &Pattern) -> Result<(), Fault> {
    match start {
        Start::After(_) if pattern.topic().is_none() => Err(Fault::bad_request(
            r#"from.position belongs to one topic; resume a pattern with {"positions":{TOPIC:"…"},"time":…}"#,
        )),
        _ => Ok(()),
    }
}

fn start(frame: &Frame<'_>) -> Result<Start, Fault> {
    #[derive(Deserialize)]
    struct From {
        time: Option<String>,
        position: Option<String>,
        positions: Option<BTreeMap<String, String>>,
    }
    const SHAPE: &str =
        r#""latest", "earliest", {"time":…}, {"position":"…"} or {"positions":{TOPIC:"…"},"time":…}"#;

    let last: Option<u64> = optional("last_n", frame.last_n, "a whole number")?;
    let Some(from) = frame.from else {
        return Ok(last.map_or(Start::Latest, |n| Start::Last(u32::try_from(n).unwrap_or(u32::MAX))));
    };
    if last.is_some() {
        return Err(Fault::bad_request("last_n and from exclude each other: take one"));
    }
    if let Ok(word) = serde_json::from_str::<String>(from.get()) {
        return match word.as_str() {
            "latest" => Ok(Start::Latest),
            "earliest" => Ok(Start::Earliest),
            _ => Err(Fault::bad_request(format!("from {word:?} is not known: it is {SHAPE}"))),
        };
    }
    let from: From = value("from", from, SHAPE)?;
    let time = |text: String| text.parse::<Timestamp>().map_err(|_| not_a_time("from.time"));
    match (from.position, from.positions, from.time) {
        (Some(position), None, None) => position
            .parse()
            .map(Start::After)
            .map_err(|error| Fault::bad_request(format!("from.position: {error}"))),
        (None, Some(positions), Some(others_from)) => {
            let positions = positions.iter().map(|(topic, position)| {
                let at = |error: &dyn std::fmt::Display| {
                    Fault::bad_request(format!("from.positions.{topic}: {error}"))
                };
                let parsed: Position = position.parse().map_err(|error| at(&error))?;
                Ok((Topic::parse(topic).map_err(|error| at(&error))?, parsed))
            });
            let positions = Arc::new(positions.collect::<Result<_, Fault>>()?);
            Ok(Start::Resume { positions, others_from: time(others_from)? })
        }
        (None, None, Some(at)) => time(at).map(Start::Time),
        _ => Err(Fault::bad_request(format!("from must be {SHAPE}"))),
    }
}

fn draft(frame: &Frame<'_>) -> Result<Draft, Fault> {
    read_draft(frame.message.ok_or_else(|| missing("message"))?)
}

/// The list is refused as a whole where it is no list of a good length; each message in it is read for itself.
fn drafts(frame: &Frame<'_>, messages: &RawValue) -> Result<Vec<Result<Draft, Fault>>, Fault> {
    if frame.message.is_some() {
        return Err(Fault::bad_request("message and messages exclude each other: take one"));
    }
    let messages: Vec<&RawValue> = serde_json::from_str(messages.get())
        .map_err(|_| Fault::bad_request("messages must be a list of messages"))?;
    match messages.len() {
        0 => Err(Fault::bad_request("messages is empty: it holds at least one message")),
        1..=MESSAGES_MAX => Ok(messages.into_iter().map(read_draft).collect()),
        count => {
            let message =
                format!("messages holds {count}, a publish takes at most {MESSAGES_MAX}; nothing was sent");
            Err(Fault::new(Code::TooLarge, message))
        }
    }
}

fn read_draft(raw: &RawValue) -> Result<Draft, Fault> {
    let fields: MessageFrame<'_> = object(raw.get().as_bytes(), "message")?;
    let id: Option<String> = optional("message.id", fields.id, "a string")?;
    let id =
        id.map(|id| id.parse().map_err(|_| Fault::bad_request("message.id is not a UUID"))).transpose()?;
    let encoding: Option<String> = optional("message.encoding", fields.encoding, "a string")?;
    let payload = fields.payload.ok_or_else(|| missing("message.payload"))?;
    let payload = match encoding.as_deref() {
        None | Some("json") if depth(payload.get().as_bytes()) > DEPTH_MAX => {
            return Err(Fault::bad_request(format!(
                "message.payload is nested deeper than {DEPTH_MAX} levels"
            )));
        }
        // A payload outlives its frame, in histories and queues that count the payload's bytes. A slice of the frame
        // would hold all of it, and the socket's buffer behind it.
        None | Some("json") => Bytes::copy_from_slice(payload.get().as_bytes()),
        Some("text") => {
            let text: String = value("message.payload", payload, "a string, as encoding is text")?;
            Bytes::from(text)
        }
        Some("base64") => {
            let text: String = value("message.payload", payload, "a string, as encoding is base64")?;
            let bytes = STANDARD.decode(text).map_err(|error| {
                Fault::bad_request(format!("message.payload is not base64 (RFC 4648, padded): {error}"))
            })?;
            Bytes::from(bytes)
        }
        Some(other) => {
            return Err(Fault::bad_request(format!("message.encoding {other:?} is neither text nor base64")));
        }
    };
    let headers: Headers =
        optional("message.headers", fields.headers, "a flat map of strings")?.unwrap_or_default();
    for name in headers.keys() {
        if name.is_empty() {
            return Err(Fault::bad_request("message.headers has an empty name"));
        }
        if name.len() >= 9 && name.as_bytes()[..9].eq_ignore_ascii_case(b"twinspan-") {
            return Err(Fault::bad_request(format!(
                "message.headers.{name}: names that begin with twinspan- belong to the fabric"
            )));
        }
    }
    let event_time: Option<String> = optional("message.event_time", fields.event_time, "a string")?;
    let event_time =
        event_time.map(|time| time.parse().map_err(|_| not_a_time("message.event_time"))).transpose()?;
    Ok(Draft {
        id,
        payload,
        key: optional("message.key", fields.key, "a string")?,
        headers,
        event_time,
        delay: millis("message.delay_ms", fields.delay_ms, Duration::MAX)?,
    })
}

fn deliveries(frame: &Frame<'_>) -> Result<Vec<u64>, Fault> {
    let one: Option<u64> = optional("delivery", frame.delivery, "a whole number")?;
    let many: Option<Vec<u64>> = optional("deliveries", frame.deliveries, "a list of whole numbers")?;
    match (one, many) {
        (Some(one), None) => Ok(vec![one]),
        (None, Some(many)) => Ok(many),
        (None, None) => Err(missing("delivery")),
        (Some(_), Some(_)) => Err(Fault::bad_request("delivery and deliveries exclude each other: take one")),
    }
}

fn topic(frame: &Frame<'_>) -> Result<Topic, Fault> {
    let Text(name) = required("topic", frame.topic, "a string")?;
    Topic::parse(&name).map_err(refused_name)
}

fn pattern(frame: &Frame<'_>) -> Result<Pattern, Fault> {
    let Text(name) = required("topic", frame.topic, "a string")?;
    Pattern::parse(&name).map_err(refused_name)
}

/// What a topic's own error means to a client.
pub fn refused_name(error: TopicError) -> Fault {
    let code = if matches!(error, TopicError::Reserved(_)) { Code::Forbidden } else { Code::BadRequest };
    Fault::new(code, error.to_string())
}

/// The name of a group or a client: what both brokers and every log can carry.
fn name(field: &str, raw: Raw<'_>) -> Result<Option<String>, Fault> {
    let name: Option<String> = optional(field, raw, "a string")?;
    if let Some(name) = &name {
        let fits = (1..=NAME_BYTES_MAX).contains(&name.len())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-:=~@+%.".contains(&b));
        if !fits {
            return Err(Fault::bad_request(format!(
                "{field} must be 1 to {NAME_BYTES_MAX} characters of A-Z a-z 0-9 _ - : = ~ @ + % ."
            )));
        }
    }
    Ok(name)
}

fn millis(field: &str, raw: Raw<'_>, max: Duration) -> Result<Option<Duration>, Fault> {
    let millis: Option<u64> = optional(field, raw, "a whole number of milliseconds")?;
    match millis.map(Duration::from_millis) {
        Some(duration) if duration > max => {
            Err(Fault::bad_request(format!("{field} must be at most {}", max.as_millis())))
        }
        other => Ok(other),
    }
}

/// An object: serde would take an array for a struct as well.
fn object<'a, T: Deserialize<'a>>(json: &'a [u8], what: &str) -> Result<T, Fault> {
    if json.iter().find(|b| !b.is_ascii_whitespace()) != Some(&b'{') {
        return Err(Fault::bad_request(format!("{what} must be a JSON object")));
    }
    serde_json::from_slice(json)
        .map_err(|error| Fault::bad_request(format!("{what} is not valid JSON: {error}")))
}

fn required<'a, T: Deserialize<'a>>(field: &str, raw: Raw<'a>, shape: &str) -> Result<T, Fault> {
    optional(field, raw, shape)?.ok_or_else(|| missing(field))
}

fn optional<'a, T: Deserialize<'a>>(field: &str, raw: Raw<'a>, shape: &str) -> Result<Option<T>, Fault> {
    raw.map(|raw| value(field, raw, shape)).transpose()
}

fn value<'a, T: Deserialize<'a>>(field: &str, raw: &'a RawValue, shape: &str) -> Result<T, Fault> {
    serde_json::from_str(raw.get()).map_err(|_| Fault::bad_request(format!("{field} must be {shape}")))
}

fn missing(field: &str) -> Fault {
    Fault::bad_request(format!("{field} is missing"))
}

fn not_a_time(field: &str) -> Fault {
    Fault::bad_request(format!("{field} is not an RFC 3339 time, such as 2026-11-21T09:00:00.123Z"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(text: &str) -> Asked {
        asked(&Bytes::copy_from_slice(text.as_bytes()))
    }

    fn refused(text: &str) -> String {
        match decode(text).command {
            Err(fault) => fault.message,
            Ok(command) => panic!("{text} was taken as {command:?}"),
        }
    }

    #[test]
    fn a_payload_is_the_bytes_that_stood_in_the_frame() {
        let payload = |text: &str| match decode(text).command {
            Ok(Command::Publish { draft, .. }) => draft.payload,
            other => panic!("{other:?}"),
        };
        let frame = |message: &str| format!(r#"{{"type":"publish","topic":"a","message":{message}}}"#);
        assert_eq!(payload(&frame(r#"{"payload":{ "n" : 1.50 }}"#)), r#"{ "n" : 1.50 }"#);
        assert_eq!(payload(&frame(r#"{"payload":null}"#)), "null");
        assert_eq!(payload(&frame(r#"{"payload":"x\u0041","encoding":"text"}"#)), "xA");
        assert_eq!(payload(&frame(r#"{"payload":"AP8=","encoding":"base64"}"#))[..], [0, 255]);
    }

    #[test]
    fn a_list_of_messages_is_read_one_by_one_and_has_a_bounded_length() {
        let frame = |messages: &str| format!(r#"{{"type":"publish","topic":"a","messages":[{messages}]}}"#);
        match decode(&frame(r#"{"payload":1},{},7,{"payload":2,"id":"x"},{"payload":3}"#)).command {
            Ok(Command::PublishMany { drafts, confirm: true, .. }) => {
                let read: Vec<_> = drafts.iter().map(|d| d.as_ref().map(|d| &d.payload[..]).ok()).collect();
                assert_eq!(read, [Some(&b"1"[..]), None, None, None, Some(b"3")]);
                assert_eq!(drafts[1].as_ref().unwrap_err().message, "message.payload is missing");
            }
            other => panic!("{other:?}"),
        }
        let many = vec![r#"{"payload":1}"#; MESSAGES_MAX + 1].join(",");
        match decode(&frame(&many)).command {
            Err(fault) => assert_eq!(fault.code, Code::TooLarge),
            Ok(command) => panic!("{command:?}"),
        }
    }

    #[test]
    fn a_payload_holds_nothing_of_its_frame() {
        let pad = "x".repeat(100_000);
        let frame = Bytes::from(format!(
            r#"{{"type":"publish","topic":"a","message":{{"payload":17}},"pad":"{pad}"}}"#
        ));
        match asked(&frame).command {
            Ok(Command::Publish { draft, .. }) => {
                assert_eq!(draft.payload, "17");
                assert!(!frame.as_ptr_range().contains(&draft.payload.as_ptr()));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_the_request_id_kept() {
        let table = [
            ("", "a frame must be a JSON object"),
            ("[]", "a frame must be a JSON object"),
            ("{", "a frame is not valid JSON"),
            (r#"{"type":"ping","type":"ping"}"#, "duplicate field"),
            (r#"{}"#, "type is missing"),
            (r#"{"type":7}"#, "type must be a string"),
            (r#"{"type":"shout"}"#, "unknown type \"shout\""),
            (r#"{"type":"ping","request_id":7}"#, "request_id must be a string"),
            (r#"{"type":"subscribe"}"#, "topic is missing"),
            (r#"{"type":"subscribe","topic":"a..b"}"#, "empty token"),
            (r#"{"type":"subscribe","topic":"$SYS.>"}"#, "belongs to the fabric"),
            (r#"{"type":"subscribe","topic":"a","last_n":-1}"#, "last_n must be a whole number"),
            (r#"{"type":"subscribe","topic":"a","last_n":1,"from":"latest"}"#, "exclude each other"),
            (r#"{"type":"subscribe","topic":"a","from":"yesterday"}"#, "from \"yesterday\" is not known"),
            (r#"{"type":"subscribe","topic":"a","from":{"position":"x"}}"#, "not a position"),
            (r#"{"type":"subscribe","topic":"a.*","from":{"position":"1-2-0"}}"#, "resume a pattern with"),
            (r#"{"type":"subscribe","topic":"a","from":{"time":"noon"}}"#, "RFC 3339"),
            (r#"{"type":"subscribe","topic":"a","filter":7}"#, "filter must be a string"),
            (
                r#"{"type":"subscribe","topic":"a.*","group":"g","mode":"exclusive"}"#,
                "exclusive is for one topic",
            ),
            (r#"{"type":"subscribe","topic":"a","group":"g","mode":"odd"}"#, "is none of"),
            (r#"{"type":"subscribe","topic":"a","group":"g h"}"#, "group must be"),
            (r#"{"type":"subscribe","topic":"a","group":"g","prefetch":0}"#, "prefetch must be"),
            (r#"{"type":"publish","topic":"a"}"#, "message is missing"),
            (r#"{"type":"publish","topic":"a.*","message":{"payload":1}}"#, "wildcard"),
            (r#"{"type":"publish","topic":"a","messages":[]}"#, "messages is empty"),
            (r#"{"type":"publish","topic":"a","messages":{"payload":1}}"#, "messages must be a list"),
            (
                r#"{"type":"publish","topic":"a","message":{"payload":1},"messages":[{"payload":1}]}"#,
                "exclude each other",
            ),
            (r#"{"type":"publish","topic":"a","message":[1]}"#, "message must be a JSON object"),
            (r#"{"type":"publish","topic":"a","message":{}}"#, "message.payload is missing"),
            (
                r#"{"type":"publish","topic":"a","message":{"payload":1,"id":"7"}}"#,
                "message.id is not a UUID",
            ),
            (
                r#"{"type":"publish","topic":"a","message":{"payload":1,"headers":{"a":1}}}"#,
                "flat map of strings",
            ),
            (
                r#"{"type":"publish","topic":"a","message":{"payload":1,"headers":{"Twinspan-Id":"1"}}}"#,
                "the fabric",
            ),
            (
                r#"{"type":"publish","topic":"a","message":{"payload":1,"encoding":"base64"}}"#,
                "must be a string",
            ),
            (r#"{"type":"publish","topic":"a","message":{"payload":"?","encoding":"base64"}}"#, "not base64"),
            (r#"{"type":"publish","topic":"a","message":{"payload":1,"event_time":"noon"}}"#, "RFC 3339"),
            (r#"{"type":"request","topic":"a","message":{"payload":1}}"#, "request_id is missing"),
            (r#"{"type":"reply","message":{"payload":1}}"#, "reply_to is missing"),
            (r#"{"type":"ack"}"#, "delivery is missing"),
            (r#"{"type":"ack","delivery":"1"}"#, "delivery must be a whole number"),
            (r#"{"type":"nack","delivery":1,"delay_ms":-5}"#, "delay_ms must be"),
        ];
        for (frame, expected) in table {
            let message = refused(frame);
            assert!(message.contains(expected), "{frame}: {message}");
        }
        assert_eq!(decode(r#"{"type":"shout","request_id":"r1"}"#).request_id.as_deref(), Some("r1"));
    }

    #[test]
    fn a_payload_nested_without_end_is_refused_and_a_field_that_is_not_listed_is_ignored() {
        let deep = "[".repeat(100_000) + &"]".repeat(100_000);
        let frame = format!(r#"{{"type":"publish","topic":"a","message":{{"payload":{deep}}}}}"#);
        assert!(refused(&frame).contains("nested deeper"));
        assert_eq!(decode(&format!(r#"{{"type":"ping","filter":{deep},"x":1}}"#)).command, Ok(Command::Ping));
    }

    #[test]
    fn a_start_is_read_as_the_contract_says() {
        let start =
            |text: &str| match decode(&format!(r#"{{"type":"subscribe","topic":"a",{text}}}"#)).command {
                Ok(Command::Subscribe(subscribe)) => subscribe.start,
                other => panic!("{other:?}"),
            };
        assert_eq!(start(r#""from":null"#), Start::Latest);
        assert_eq!(start(r#""from":"earliest""#), Start::Earliest);
        assert_eq!(start(r#""last_n":3"#), Start::Last(3));
        assert_eq!(start(r#""from":{"position":"1-2-0"}"#), Start::After("1-2-0".parse().unwrap()));
        assert_eq!(
            start(r#""from":{"time":"1970-01-01T00:00:01Z"}"#),
            Start::Time(Timestamp::from_millis(1000))
        );
        let resumed = start(r#""from":{"positions":{"a":"1-2-0"},"time":"1970-01-01T00:00:01Z"}"#);
        assert_eq!(resumed.for_topic(&Topic::parse("a").unwrap()), Start::After("1-2-0".parse().unwrap()));
        assert_eq!(resumed.for_topic(&Topic::parse("b").unwrap()), Start::Time(Timestamp::from_millis(1000)));
    }
}
