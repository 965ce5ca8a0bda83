//! Frames to the client, written by hand: an event's payload goes out as the bytes it came in with.

use std::fmt::Display;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde_json::value::RawValue;

use super::nesting::{DEPTH_MAX, depth};
use crate::message::{Draft, Envelope, Headers, LIVE, Message, MessageId, Timestamp};
use crate::wire::code::Fault;
use crate::wire::verbs::{Accepted, Ack, Event, Info};

pub fn event(event: &Event, now: Timestamp) -> Bytes {
    match event {
        Event::Ack(ack) => acknowledgement(ack),
        Event::Live(envelope) => envelope.encoded(|envelope| delivered(envelope, |_| {})),
        Event::Late(envelope) => delivered(envelope, |out| out.plain("late", true)),
        Event::Checkpoint { topic, position } => {
            let mut out = Object::frame("checkpoint", None);
            out.text("topic", topic.as_str());
            out.quoted("position", position);
            out.ended(now)
        }
        Event::Replayed { envelope, subscription } => {
            delivered(envelope, |out| out.text("subscription", subscription.as_str()))
        }
        Event::Delivered { envelope, group, delivery } => delivered(envelope, |out| {
            out.text("group", group);
            if let Some(delivery) = delivery {
                out.plain("delivery", delivery.number);
                out.plain("attempt", delivery.attempt);
            }
        }),
        Event::Response { request_id, topic, message } => {
            let mut out = Object::frame("response", Some(request_id));
            out.text("topic", topic.as_str());
            out.message(message);
            out.ended(message.ts)
        }
        Event::Gap { topic, dropped, reason } => {
            let mut out = Object::frame("gap", None);
            out.text("topic", topic.as_str());
            match dropped {
                Some(dropped) => out.plain("dropped", dropped),
                None => out.plain("dropped", "null"),
            }
            out.text("reason", reason.as_str());
            out.ended(now)
        }
        Event::Info(info) => information(info, now),
        Event::Error { request_id, fault } => {
            let mut out = Object::frame("error", request_id.as_deref());
            out.name("error");
            out.0.extend_from_slice(&error_value(fault));
            out.ended(now)
        }
        Event::Pong { request_id } => Object::frame("pong", request_id.as_deref()).ended(now),
    }
}

/// `{"code","message","retryable"}`, in error frames and in HTTP errors.
pub fn error_value(fault: &Fault) -> Vec<u8> {
    let mut out = Object::new();
    out.text("code", fault.code.as_str());
    out.text("message", &fault.message);
    out.plain("retryable", fault.code.retryable());
    out.closed()
}

/// What stands under `message` in a publish.
pub fn draft_value(draft: &Draft) -> Vec<u8> {
    let mut out = Object(Vec::with_capacity(draft.payload.len() + 80));
    out.content(draft.id, &draft.payload, draft.key.as_deref(), &draft.headers, draft.event_time);
    out.0
}

fn payload(out: &mut Object, payload: &[u8]) {
    match std::str::from_utf8(payload) {
        Ok(text) if is_json(text) => {
            out.name("payload");
            out.0.extend_from_slice(payload);
        }
        Ok(text) => {
            out.text("payload", text);
            out.text("encoding", "text");
        }
        Err(_) => {
            out.quoted("payload", STANDARD.encode(payload));
            out.text("encoding", "base64");
        }
    }
}

fn is_json(text: &str) -> bool {
    serde_json::from_str::<&RawValue>(text).is_ok() && depth(text.as_bytes()) <= DEPTH_MAX
}

fn delivered(envelope: &Envelope, more: impl FnOnce(&mut Object)) -> Bytes {
    let mut out = Object(Vec::with_capacity(envelope.weight() + 160));
    out.0.push(b'{');
    out.text("type", "event");
    out.text("topic", envelope.topic.as_str());
    more(&mut out);
    if let Some(reply_to) = &envelope.reply_to {
        out.text("reply_to", &reply_to.address);
    }
    out.message(&envelope.message);
    out.text("lane", envelope.lanes().as_str());
    if let Some(stored) = &envelope.stored {
        out.quoted("position", &stored.position);
    }
    out.ended(envelope.message.ts)
}

fn acknowledgement(ack: &Ack) -> Bytes {
    let mut out = Object::frame("ack", ack.request_id.as_deref());
    if ack.results.is_empty() {
        out.text("status", ack.status.as_str());
    }
    if let Some(topic) = &ack.topic {
        out.text("topic", topic.as_str());
    }
    if let Some(lane) = ack.lane {
        out.text("lane", lane.as_str());
    }
    if let Some(id) = &ack.message_id {
        out.quoted("message_id", id);
    }
    if let Some(position) = &ack.position {
        out.quoted("position", position);
    }
    if let Some(group) = &ack.group {
        out.text("group", group);
    }
    if let Some(mode) = ack.mode {
        out.text("mode", mode);
    }
    if let Some(prefetch) = ack.prefetch {
        out.plain("prefetch", prefetch);
    }
    if let Some(last_n) = ack.last_n {
        out.plain("last_n", last_n);
    }
    if !ack.results.is_empty() {
        out.name("results");
        for (at, result) in ack.results.iter().enumerate() {
            out.0.push(if at == 0 { b'[' } else { b',' });
            out.0.extend_from_slice(&result_value(result));
        }
        out.0.push(b']');
    }
    out.ended(ack.ts)
}

/// What became of one message of several.
fn result_value(result: &Result<Accepted, Fault>) -> Vec<u8> {
    let mut out = Object::new();
    match result {
        Ok(Accepted { status, message_id, position, ts }) => {
            out.text("status", status.as_str());
            if let Some(id) = message_id {
                out.quoted("message_id", id);
            }
            if let Some(position) = position {
                out.quoted("position", position);
            }
            out.quoted("ts", ts);
            out.closed()
        }
        Err(fault) => {
            out.name("error");
            out.0.extend_from_slice(&error_value(fault));
            out.closed()
        }
    }
}

fn information(info: &Info, now: Timestamp) -> Bytes {
    let mut out = Object::frame("info", None);
    let code = match info {
        Info::Connected { .. } => "CONNECTED",
        Info::LaneDown { .. } => "LANE_DOWN",
        Info::LaneUp { .. } => "LANE_UP",
        Info::Draining { .. } => "DRAINING",
        Info::RouteChanged { .. } => "ROUTE_CHANGED",
        Info::TopicDeleted { .. } => "TOPIC_DELETED",
        Info::ReplayDone { .. } => "REPLAY_DONE",
    };
    out.text("code", code);
    match info {
        Info::Connected { connection, version, max_message, max_subscriptions, ping_interval } => {
            out.quoted("connection", connection);
            out.text("version", version);
            out.plain("max_message", max_message);
            out.plain("max_subscriptions", max_subscriptions);
            out.plain("ping_interval_ms", ping_interval.as_millis());
        }
        Info::LaneDown { lane, message } => {
            out.text("lane", lane.as_str());
            out.text("message", message);
        }
        Info::LaneUp { lane } => out.text("lane", lane.as_str()),
        Info::Draining { reconnect_after } => out.plain("reconnect_after_ms", reconnect_after.as_millis()),
        Info::RouteChanged { topic } | Info::ReplayDone { topic } => out.text("topic", topic.as_str()),
        Info::TopicDeleted { topic } => out.text("topic", topic.as_str()),
    }
    out.ended(now)
}

/// A JSON object under construction.
struct Object(Vec<u8>);

impl Object {
    fn new() -> Self {
        Self(vec![b'{'])
    }

    fn frame(kind: &str, request_id: Option<&str>) -> Self {
        let mut out = Self(Vec::with_capacity(160));
        out.0.push(b'{');
        out.text("type", kind);
        if let Some(id) = request_id {
            out.text("request_id", id);
        }
        out
    }

    /// A name of our own, which needs no escaping.
    fn name(&mut self, name: &'static str) {
        if !self.0.ends_with(b"{") {
            self.0.push(b',');
        }
        self.0.push(b'"');
        self.0.extend_from_slice(name.as_bytes());
        self.0.extend_from_slice(b"\":");
    }

    fn text(&mut self, name: &'static str, value: &str) {
        self.name(name);
        self.string(value);
    }

    /// A value whose text needs no escaping.
    fn quoted(&mut self, name: &'static str, value: impl Display) {
        self.name(name);
        self.write(format_args!("\"{value}\""));
    }

    fn plain(&mut self, name: &'static str, value: impl Display) {
        self.name(name);
        self.write(format_args!("{value}"));
    }

    fn message(&mut self, message: &Message) {
        self.name("message");
        let Message { id, payload, key, headers, event_time, .. } = message;
        self.content(*id, payload, key.as_deref(), headers, *event_time);
    }

    /// A message as an object of its own.
    fn content(
        &mut self,
        id: Option<MessageId>,
        bytes: &[u8],
        key: Option<&str>,
        headers: &Headers,
        event_time: Option<Timestamp>,
    ) {
        self.0.push(b'{');
        if let Some(id) = id {
            self.quoted("id", id);
        }
        payload(self, bytes);
        if let Some(key) = key {
            self.text("key", key);
        }
        let mut headers = headers.iter().filter(|(name, _)| *name != LIVE).peekable();
        if headers.peek().is_some() {
            self.name("headers");
            let mut before = b'{';
            for (name, value) in headers {
                self.0.push(before);
                self.string(name);
                self.0.push(b':');
                self.string(value);
                before = b',';
            }
            self.0.push(b'}');
        }
        if let Some(time) = event_time {
            self.quoted("event_time", time);
        }
        self.0.push(b'}');
    }

    fn string(&mut self, value: &str) {
        // Writing a string to memory cannot fail.
        let _ = serde_json::to_writer(&mut self.0, value);
    }

    fn write(&mut self, arguments: std::fmt::Arguments<'_>) {
        // Nor can this.
        let _ = std::io::Write::write_fmt(&mut self.0, arguments);
    }

    fn ended(mut self, ts: Timestamp) -> Bytes {
        self.quoted("ts", ts);
        Bytes::from(self.closed())
    }

    fn closed(mut self) -> Vec<u8> {
        self.0.push(b'}');
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::message::{Lane, Place, Position, ReplyTo, Stored};
    use crate::topic::Topic;
    use crate::wire::verbs::{Delivery, GapReason, Status};

    fn shown(event: &Event) -> String {
        String::from_utf8(super::event(event, Timestamp::from_millis(0)).to_vec()).unwrap()
    }

    fn message(payload: &'static [u8]) -> Message {
        let id = "01970000-0000-7000-8000-000000000001".parse().unwrap();
        let draft = Draft { id: Some(id), payload: Bytes::from_static(payload), ..Draft::default() };
        Message { ts: Timestamp::from_millis(1), ..draft.accept() }
    }

    fn stored(payload: &'static [u8]) -> Arc<Envelope> {
        let place = Place { ledger: 5, entry: 7, index: 0 };
        let stored = Stored { partition: 0, place, position: Position::Whole(place) };
        Arc::new(Envelope::durable(Topic::parse("orders.eu").unwrap(), message(payload), stored))
    }

    #[test]
    fn an_event_looks_as_the_contract_shows() {
        assert_eq!(
            shown(&Event::Live(stored(br#"{"n":1}"#))),
            r#"{"type":"event","topic":"orders.eu","message":{"id":"01970000-0000-7000-8000-000000000001","payload":{"n":1}},"lane":"durable","position":"5-7-0","ts":"1970-01-01T00:00:00.001Z"}"#
        );
        let delivery = Some(Delivery { number: 17, attempt: 2 });
        let text = shown(&Event::Delivered { envelope: stored(b"1"), group: "billing".into(), delivery });
        assert!(text.contains(r#""group":"billing","delivery":17,"attempt":2,"#), "{text}");
        let reply_to = ReplyTo { address: "r.1".into(), timeout: None };
        let request = Envelope::ephemeral(Topic::parse("svc.time").unwrap(), message(b"1"), Some(reply_to));
        let text = shown(&Event::Live(Arc::new(request)));
        assert!(text.contains(r#""reply_to":"r.1""#) && !text.contains("position"), "{text}");
    }

    #[test]
    fn what_is_not_json_travels_as_text_or_base64() {
        let deep: &'static [u8] =
            Box::leak(("[".repeat(200) + &"]".repeat(200)).into_boxed_str().into_boxed_bytes());
        let table: [(&'static [u8], &str); 6] = [
            (b"{\"a\": [1]}", r#""payload":{"a": [1]}}"#),
            (b"null", r#""payload":null}"#),
            (b"plain \"words\"\n", r#""payload":"plain \"words\"\n","encoding":"text"}"#),
            (b"", r#""payload":"","encoding":"text"}"#),
            (b"\xff\x00", r#""payload":"/wA=","encoding":"base64"}"#),
            (deep, r#""encoding":"text"}"#),
        ];
        for (payload, expected) in table {
            let text = shown(&Event::Live(stored(payload)));
            assert!(text.contains(expected), "{text}");
            assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{text}");
        }
    }

    #[test]
    fn an_event_has_the_publishers_headers_and_not_the_fabrics() {
        let with = |headers: &[(&str, &str)]| {
            let headers = headers.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect();
            let message = Message { key: Some("k".into()), headers, ..message(b"1") };
            shown(&Event::Live(Arc::new(Envelope::ephemeral(Topic::parse("t").unwrap(), message, None))))
        };
        let text = with(&[("a \"b\"", "\n"), (LIVE, "7-1"), ("z", "")]);
        assert!(text.contains(r#""payload":1,"key":"k","headers":{"a \"b\"":"\n","z":""}},"#), "{text}");
        assert!(with(&[(LIVE, "7-1")]).contains(r#""key":"k"},"lane""#));
    }

    #[test]
    fn a_live_event_is_encoded_once_and_its_bytes_are_shared() {
        let envelope = stored(b"1");
        let first = super::event(&Event::Live(envelope.clone()), Timestamp::from_millis(0));
        let second = super::event(&Event::Live(envelope), Timestamp::from_millis(9));
        assert_eq!(first.as_ptr(), second.as_ptr());
    }

    #[test]
    fn the_other_frames_look_as_the_contract_shows() {
        let pattern = crate::topic::Pattern::parse("telemetry.x").unwrap();
        let gap = |dropped, reason| shown(&Event::Gap { topic: pattern.clone(), dropped, reason });
        assert_eq!(
            gap(Some(37), GapReason::Slow),
            r#"{"type":"gap","topic":"telemetry.x","dropped":37,"reason":"slow","ts":"1970-01-01T00:00:00.000Z"}"#
        );
        assert!(gap(None, GapReason::Outage).contains(r#""dropped":null,"reason":"outage""#));
        let fault = Fault::bad_request("message.id is not a UUID");
        assert_eq!(
            shown(&Event::Error { request_id: Some("r1".into()), fault }),
            r#"{"type":"error","request_id":"r1","error":{"code":"BAD_REQUEST","message":"message.id is not a UUID","retryable":false},"ts":"1970-01-01T00:00:00.000Z"}"#
        );
        let ack = Ack {
            request_id: Some("r1".into()),
            lane: Some(crate::message::Lanes::DURABLE),
            ..Ack::default()
        };
        assert_eq!(
            shown(&Event::Ack(ack.into())),
            r#"{"type":"ack","request_id":"r1","status":"ok","lane":"durable","ts":"1970-01-01T00:00:00.000Z"}"#
        );
        let ack = Ack { status: Status::Duplicate, ..Ack::default() };
        assert_eq!(
            shown(&Event::Ack(ack.into())),
            r#"{"type":"ack","status":"duplicate","ts":"1970-01-01T00:00:00.000Z"}"#
        );
        // The frame says nothing about all of them: each result has its own status.
        let accepted =
            |status| Accepted { status, message_id: None, position: None, ts: Timestamp::from_millis(0) };
        let results =
            vec![Ok(accepted(Status::Ok)), Ok(accepted(Status::Spooled)), Err(Fault::bad_request("no"))];
        assert_eq!(
            shown(&Event::Ack(Ack { results, ..Ack::default() }.into())),
            r#"{"type":"ack","results":[{"status":"ok","ts":"1970-01-01T00:00:00.000Z"},{"status":"spooled","ts":"1970-01-01T00:00:00.000Z"},{"error":{"code":"BAD_REQUEST","message":"no","retryable":false}}],"ts":"1970-01-01T00:00:00.000Z"}"#
        );
        let info = Info::LaneDown { lane: Lane::Durable, message: "gone\u{7}".into() };
        assert!(
            shown(&Event::Info(info))
                .contains(r#""code":"LANE_DOWN","lane":"durable","message":"gone\u0007""#)
        );
    }
}
