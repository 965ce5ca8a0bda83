//! The way in is hostile: whatever comes as text, each frame that is refused has its error, and nothing breaks.

use std::collections::HashMap;
use std::sync::{Mutex, Once, PoisonError};

use bytes::Bytes;
use fastrand::Rng;
use futures_util::{SinkExt, StreamExt};
use proptest::prelude::*;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio_tungstenite::connect_async;
use tokio_tungstenite::tungstenite::Message;
use twinspan::message::{Draft, Envelope, MessageId, Place, Timestamp};
use twinspan::topic::Topic;
use twinspan::wire::code::Code;
use twinspan::wire::json::heard::Heard;
use twinspan::wire::json::{Json, draft_value};
use twinspan::wire::verbs::{Codec, Command, Event, REQUEST_TIMEOUT_DEFAULT};

use crate::harness::{Span, draft, next_payload, nothing, soon};

const SEED: u64 = 0x7715_5041;
const FRAMES: usize = 10_000;
const BATCH: usize = 200;
/// Batches on one connection.
const BATCHES: usize = 5;

/// Panics of any thread, by the thread's name.
static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// What panicked so far on the threads of this test or of no test.
fn panics() -> Vec<String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            let name = std::thread::current().name().unwrap_or("").to_owned();
            PANICS.lock().unwrap_or_else(PoisonError::into_inner).push(name);
            before(info);
        }));
    });
    let own = std::thread::current().name().map(str::to_owned);
    let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
    panics.iter().filter(|name| Some(*name) == own.as_ref() || !name.contains("::")).cloned().collect()
}

/// What may answer one frame.
struct Due {
    request_id: Option<String>,
    /// Where the codec refuses the frame: the code and the sentence of its one error.
    refusal: Option<(Code, String)>,
    /// How many answers carry its request_id, at least and at most.
    answers: (usize, usize),
}

/// `None`: this frame would be answered much later.
fn due(frame: &str) -> Option<Due> {
    let asked = Json.decode(&Bytes::copy_from_slice(frame.as_bytes()));
    let request_id = asked.request_id.map(|id| id.to_string());
    Some(match asked.command {
        Err(fault) => {
            let refusal = Some((fault.code, fault.message));
            Due { request_id, refusal, answers: (1, 1) }
        }
        Ok(command) => {
            let answers = match command {
                Command::Request { timeout, .. } if timeout > REQUEST_TIMEOUT_DEFAULT => return None,
                Command::Publish { confirm: false, .. }
                | Command::PublishMany { confirm: false, .. }
                | Command::Reply { .. } => (0, 1),
                Command::Ack { .. } | Command::Nack { .. } if request_id.is_none() => (0, 1),
                _ => (1, 1),
            };
            Due { request_id, refusal: None, answers }
        }
    })
}

#[tokio::test]
async fn ten_thousand_hostile_frames_break_nothing_and_every_refused_one_has_its_error() {
    println!("seed {SEED:#x}");
    assert!(panics().is_empty());
    let span = Span::start().await;
    let mut bystander = span.client().await;
    bystander.subscribe("mixed.live.bystander", nothing()).await.unwrap();
    let mut frames = Frames { rng: Rng::with_seed(SEED), made: 0 };
    let (mut refused, mut done) = (0, 0);
    for _ in 0..FRAMES / BATCH / BATCHES {
        let (socket, _) = connect_async(span.url()).await.unwrap();
        let (mut sink, mut stream) = socket.split();
        let mut ledger = Ledger::default();
        for _ in 0..BATCHES {
            let mut batch = Vec::new();
            let mut dues = Vec::new();
            while batch.len() < BATCH {
                let frame = frames.next();
                if let Some(due) = due(&frame) {
                    batch.push(frame);
                    dues.push(due);
                }
            }
            refused += dues.iter().filter(|due| due.refusal.is_some()).count();
            done += batch.len();
            ledger.owe(&dues);
            let sentinel = format!("sentinel-{done}");
            let ping = json!({"type": "ping", "request_id": sentinel}).to_string();
            let send = async {
                for frame in &batch {
                    sink.feed(Message::text(frame.clone())).await.unwrap();
                }
                sink.send(Message::text(ping)).await.unwrap();
            };
            let hear = async {
                let mut answered = false;
                while !answered || ledger.lacks() {
                    let heard = match stream.next().await.expect("the connection lives").unwrap() {
                        Message::Text(text) => Heard::parse(&text).unwrap(),
                        Message::Ping(_) => continue,
                        other => panic!("{other:?}"),
                    };
                    answered |= heard.request_id.as_ref() == Some(&sentinel);
                    if heard.request_id.as_ref() != Some(&sentinel) {
                        ledger.enter(&heard);
                    }
                }
            };
            let (_, timed) = tokio::join!(send, tokio::time::timeout(crate::lanes::PATIENCE, hear));
            ledger.check(timed.is_err());
        }
        // Nobody else noticed anything.
        bystander.publish("mixed.live.bystander", &draft("1")).await.unwrap();
        assert_eq!(next_payload(&mut bystander).await, "1");
    }
    println!("{done} frames, {refused} of them refused by the codec");
    assert_eq!(done, FRAMES);
    assert!(refused > FRAMES / 3 && refused < FRAMES * 9 / 10, "{refused}: good and bad ones both");
    assert_eq!(span.metric(r#"twinspan_close_total{code="1011"}"#), 0.0);
    assert_eq!(span.metric(r#"twinspan_errors_total{code="INTERNAL"}"#), 0.0);
    soon(span.stop()).await;
    assert_eq!(panics(), [""; 0]);
}

/// What a connection is due, and what came of it.
#[derive(Default)]
struct Ledger {
    /// By request_id (none: the empty one): answers at least, at most, and those that came.
    answers: HashMap<String, (usize, usize, usize)>,
    /// Errors of the codec that have not come, by request_id, code and sentence.
    refusals: HashMap<(String, String, String), usize>,
}

impl Ledger {
    fn owe(&mut self, dues: &[Due]) {
        for due in dues {
            let id = due.request_id.clone().unwrap_or_default();
            // An answer to an accepted frame without a name cannot be told from another.
            let entry = self.answers.entry(id.clone()).or_default();
            let is_named = due.request_id.is_some() || due.refusal.is_some();
            entry.0 += if is_named { due.answers.0 } else { 0 };
            entry.1 += due.answers.1;
            if let Some((code, message)) = &due.refusal {
                *self.refusals.entry((id, code.to_string(), message.clone())).or_default() += 1;
            }
        }
    }

    fn enter(&mut self, heard: &Heard) {
        let id = heard.request_id.clone().unwrap_or_default();
        match (heard.kind.as_str(), &heard.error) {
            ("event" | "gap" | "info", None) => return,
            ("ack" | "pong" | "response", None) => {}
            ("error", Some(error)) => {
                let code = Code::ALL.into_iter().find(|code| code.as_str() == error.code);
                let code = code.unwrap_or_else(|| panic!("unknown code: {}", heard.frame));
                assert_eq!(error.retryable, code.retryable());
                assert!(!error.message.is_empty());
                assert!(heard.frame.len() < 8192, "an error is short: {} bytes", heard.frame.len());
                let key = (id.clone(), error.code.clone(), error.message.clone());
                if let Some(missing) = self.refusals.get_mut(&key).filter(|missing| **missing > 0) {
                    *missing -= 1;
                }
            }
            other => panic!("{other:?}: {}", heard.frame),
        }
        let entry = self.answers.get_mut(&id);
        let entry = entry.unwrap_or_else(|| panic!("nobody asked for this: {}", heard.frame));
        entry.2 += 1;
        assert!(entry.2 <= entry.1, "one answer too many: {}", heard.frame);
    }

    fn lacks(&self) -> bool {
        self.answers.values().any(|(least, _, came)| came < least)
            || self.refusals.values().any(|missing| *missing > 0)
    }

    fn check(&self, late: bool) {
        let missing: Vec<_> = self.refusals.iter().filter(|(_, missing)| **missing > 0).collect();
        assert!(missing.is_empty(), "refused without a word: {missing:?}");
        let unanswered: Vec<_> = self.answers.iter().filter(|(_, (least, _, came))| came < least).collect();
        assert!(unanswered.is_empty(), "not answered: {unanswered:?}");
        assert!(!late, "no sentinel");
    }
}

/// Makes frames: a third as they should be, a third of those broken in some way, a third of anything.
struct Frames {
    rng: Rng,
    made: usize,
}

impl Frames {
    fn next(&mut self) -> String {
        self.made += 1;
        match self.rng.u8(..100) {
            0..35 => self.valid().to_string(),
            35..55 => self.mistyped(),
            55..75 => self.broken(),
            75..85 => self.bomb(),
            _ => self.garbage(),
        }
    }

    fn pick<'a, T: ?Sized>(&mut self, from: &[&'a T]) -> &'a T {
        from[self.rng.usize(..from.len())]
    }

    fn topic(&mut self) -> String {
        let n = self.rng.u8(..6);
        let root =
            self.pick(&["telemetry", "svc", "orders", "mixed.live", "mixed.kept", "declared", "nowhere"]);
        format!("{root}.{n}")
    }

    fn pattern(&mut self) -> String {
        match self.rng.u8(..4) {
            0 => self.pick(&["telemetry.*", "mixed.>", "*.1", "orders.>", "svc.*", "$SYS.>", "a..b"]).into(),
            _ => self.topic(),
        }
    }

    fn payload(&mut self) -> Value {
        match self.rng.u8(..5) {
            0 => Value::Null,
            1 => json!(self.rng.f64()),
            2 => json!({"n": self.rng.i64(..), "s": "\u{0}\u{1F600}\"\\"}),
            3 => json!("x".repeat(self.rng.usize(..2000))),
            _ => json!([1, [2, [3, {"a": []}]]]),
        }
    }

    fn message(&mut self) -> Value {
        let mut message = json!({"payload": self.payload()});
        match self.rng.u8(..8) {
            0 => {
                let place = Place { ledger: 0, entry: self.made as u64, index: 0 };
                message["id"] = json!(MessageId::derived("seed", 0, place).to_string());
            }
            1 => message["key"] = json!("k"),
            2 => message["headers"] = json!({"a": "b", "traceparent": "00-1-2-3"}),
            3 => message["event_time"] = json!("2026-11-21T09:00:00.123Z"),
            4 => message["delay_ms"] = json!(5),
            5 => message = json!({"payload": "AP8=", "encoding": "base64"}),
            6 => message = json!({"payload": "plain", "encoding": "text"}),
            _ => {}
        }
        message
    }

    fn valid(&mut self) -> Value {
        let kind = self.rng.u8(..10);
        let mut frame = match kind {
            0..4 => json!({"type": "publish", "topic": self.topic(), "message": self.message()}),
            4 => json!({"type": "subscribe", "topic": self.pattern(), "client_id": "hostile"}),
            5 => json!({"type": "unsubscribe", "topic": self.pattern()}),
            6 => {
                json!({"type": "request", "topic": self.topic(), "message": self.message(), "timeout_ms": 50})
            }
            7 => json!({"type": "reply", "reply_to": "_INBOX.none", "message": self.message()}),
            8 => {
                json!({"type": self.pick(&["ack", "nack"]), "deliveries": [self.rng.u64(..9), self.rng.u64(..)]})
            }
            _ => {
                json!({"type": self.pick(&["ping", "auth", "seek"]), "topic": self.topic(), "group": "g", "from": "latest"})
            }
        };
        match (kind, self.rng.u8(..6)) {
            (0..4, 0) => frame["confirm"] = json!(false),
            (4, 0) => frame["last_n"] = json!(self.rng.u8(..)),
            (4, 1) => frame["from"] = json!({"time": "2026-11-21T09:00:00Z"}),
            (4, 2) => frame["from"] = json!({"position": "1-2-0"}),
            (4, 3) => {
                frame["group"] = json!("g");
                frame["ack"] = json!(self.pick(&["auto", "manual"]));
            }
            (4, 4) => {
                let position = json!({ self.topic(): "1-2-0" });
                frame["from"] = json!({"positions": position, "time": "2026-11-21T09:00:00Z"});
            }
            _ => {}
        }
        if kind == 6 || self.rng.u8(..10) > 0 {
            frame["request_id"] = json!(format!("{:x}-{:08x}", self.made, self.rng.u32(..)));
        }
        frame
    }

    /// A field of a wrong type or value, one too many, or one less.
    fn mistyped(&mut self) -> String {
        let mut frame = self.valid();
        let inner = frame.get("message").is_some() && self.rng.bool();
        let target = if inner { &mut frame["message"] } else { &mut frame };
        let names: Vec<String> = target.as_object().unwrap().keys().cloned().collect();
        let name = names[self.rng.usize(..names.len())].clone();
        let odd = [
            json!(null),
            json!(true),
            json!(-1),
            json!(1e300),
            json!(u64::MAX),
            json!(""),
            json!("x".repeat(300)),
            json!("\u{0}\u{7f}\u{2028}"),
            json!([]),
            json!({}),
            json!([[1], {"a": 2}]),
            json!({"a": {"b": [null]}}),
        ];
        match self.rng.u8(..4) {
            0 => _ = target.as_object_mut().unwrap().remove(&name),
            1 => target[self.rng.u32(..).to_string()] = odd[self.rng.usize(..odd.len())].clone(),
            _ => target[name] = odd[self.rng.usize(..odd.len())].clone(),
        }
        frame.to_string()
    }

    /// A valid frame with its bytes damaged.
    fn broken(&mut self) -> String {
        let mut bytes = self.valid().to_string().into_bytes();
        let at = self.rng.usize(..bytes.len());
        match self.rng.u8(..7) {
            0 => bytes[at] ^= 1 << self.rng.u8(..7),
            1 => bytes.truncate(at),
            2 => bytes[at] = 0,
            3 => _ = bytes.splice(at..at, *br"\ud800").count(),
            4 => bytes.extend_from_slice(b"{}"),
            5 => {
                let fields = bytes[1..].to_vec();
                bytes.pop();
                bytes.push(b',');
                bytes.extend(fields);
            }
            _ => (0..8).for_each(|_| {
                let at = self.rng.usize(..bytes.len());
                bytes[at] = self.rng.u8(..);
            }),
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Small on the wire, or large in one place.
    fn bomb(&mut self) -> String {
        let id = format!("{:x}-bomb", self.made);
        let depth = *self.pick(&[&10, &127, &128, &129, &1000, &100_000]);
        let (open, close) = self.pick(&[&("[", "]"), &(r#"{"a":"#, "}")]);
        let inner = if *open == "[" { "" } else { "1" };
        let deep = format!("{}{inner}{}", open.repeat(depth), close.repeat(depth));
        let long = self.pick(&["x", "\u{7f}", r"\u0001", r"\ud83d\ude00", r#"\""#, "\u{10FFFF}"]);
        let long = long.repeat(self.rng.usize(..20_000));
        let digits = "9".repeat(self.rng.usize(1..5000));
        let topic = self.topic();
        match self.rng.u8(..10) {
            0 => format!(
                r#"{{"type":"publish","topic":"{topic}","message":{{"payload":{deep}}},"request_id":"{id}"}}"#
            ),
            1 => format!(r#"{{"type":"ping","request_id":"{id}","unknown":{deep}}}"#),
            2 => format!(r#"{{"type":{deep},"request_id":"{id}"}}"#),
            3 => deep,
            4 => format!(r#"{{"type":"{long}","request_id":"{id}"}}"#),
            5 => format!(
                r#"{{"type":"publish","topic":"{topic}","message":{{"payload":"{long}"}},"request_id":"{id}"}}"#
            ),
            6 => format!(
                r#"{{"type":"publish","topic":"{topic}","message":{{"payload":{digits}.{digits}e{digits}}},"request_id":"{id}"}}"#
            ),
            7 => format!(
                r#"{{"type":"publish","topic":"{topic}","message":{{"payload":1,"headers":{{"twinspan-{long}":"","b":"{long}"}}}},"request_id":"{id}"}}"#
            ),
            8 => format!(
                r#"{{"type":"subscribe","topic":"{topic}","from":"{long}","last_n":{digits},"request_id":"{id}"}}"#
            ),
            _ => {
                let many: Vec<_> = (0..5000).map(|n| n.to_string()).collect();
                format!(r#"{{"type":"ack","deliveries":[{}],"request_id":"{id}"}}"#, many.join(","))
            }
        }
    }

    fn garbage(&mut self) -> String {
        let length = self.rng.usize(..200);
        match self.rng.u8(..4) {
            0 => (0..length).map(|_| self.rng.char(..)).collect(),
            1 => (0..length)
                .map(|_| self.pick(&["{", "}", "[", "]", "\"", ":", ",", "\\", "u", "1", "null", " "]))
                .collect(),
            2 => self
                .pick(&[
                    "",
                    " ",
                    "null",
                    "[]",
                    "{}",
                    "\"ping\"",
                    "CONNECT {}\r\n",
                    "GET / HTTP/1.1\r\n\r\n",
                    "\u{feff}{}",
                    "nul",
                ])
                .into(),
            _ => String::from_utf8_lossy(&(0..length).map(|_| self.rng.u8(..)).collect::<Vec<_>>())
                .into_owned(),
        }
    }
}

/// Whitespace around a JSON value is none of it, and does not cross.
fn bare(payload: Vec<u8>) -> Vec<u8> {
    match serde_json::from_slice::<&RawValue>(&payload) {
        Ok(value) => value.get().as_bytes().to_vec(),
        Err(_) => payload,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_make_the_codec_panic(bytes: Vec<u8>, text in r#"[\{\}\[\]":,\\ud8 0-9a-z]{0,80}"#, start in 0..9_usize) {
        Json.decode(&bytes.into());
        let start = ["", "{", r#"{"type":"#, r#"{"type":"publish","#, r#"{"type":"publish","topic":"a","message":"#,
            r#"{"type":"subscribe","topic":"a","from":"#, r#"{"type":"ack","deliveries":"#, r#"{"request_id":"#,
            r#"{"type":"publish","topic":"a","message":{"headers":"#][start];
        Json.decode(&format!("{start}{text}").into());
    }

    #[test]
    fn a_message_is_the_same_after_the_wire_in_both_directions(
        payload in prop_oneof![any::<Vec<u8>>(), any::<String>().prop_map(String::into_bytes),
            any::<f64>().prop_map(|n| json!([n, {"a": n}]).to_string().into_bytes())].prop_map(bare),
        key: Option<String>,
        headers in proptest::collection::btree_map("x[^\u{0}]{0,10}", any::<String>(), 0..4),
        millis in proptest::option::of(-62_135_596_800_000..253_402_207_200_000_i64),
        id: Option<[u8; 16]>,
    ) {
        let event_time = millis.map(Timestamp::from_millis);
        let id = id.map(MessageId::from_bytes);
        let draft = Draft { id, payload: payload.into(), key, headers, event_time, delay: None };
        let message = String::from_utf8(draft_value(&draft)).unwrap();
        let frame = format!(r#"{{"type":"publish","topic":"a","message":{message}}}"#);
        match Json.decode(&frame.into()).command.unwrap() {
            Command::Publish { draft: decoded, .. } => prop_assert_eq!(&decoded, &draft),
            other => prop_assert!(false, "{:?}", other),
        }
        let envelope = Envelope::ephemeral(Topic::parse("a").unwrap(), draft.clone().accept(), None);
        let frame = Json.encode(&Event::Live(envelope.into()), Timestamp::now());
        let heard = Heard::parse(std::str::from_utf8(&frame).unwrap()).unwrap();
        prop_assert_eq!(heard.payload().unwrap(), draft.payload.to_vec());
        let message = heard.message().unwrap();
        prop_assert_eq!((message.key, message.headers), (draft.key, draft.headers));
        prop_assert_eq!(message.event_time.map(|time| time.parse().unwrap()), draft.event_time);
    }
}
