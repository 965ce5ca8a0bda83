//! The way in is hostile below the dialect, too: frames that are no WebSocket, handshakes that never end.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{PATIENCE, Plan, Span, draft, nothing, soon};

const TEXT: u8 = 0x1;
const BINARY: u8 = 0x2;
const CLOSE: u8 = 0x8;
const PING: u8 = 0x9;
const PONG: u8 = 0xA;
/// The last frame of its message.
const FIN: u8 = 0x80;

const HANDSHAKE: &str = "GET /ws HTTP/1.1\r\nHost: twinspan\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

/// A WebSocket by hand.
struct Raw(TcpStream);

impl Raw {
    async fn connect(span: &Span) -> Self {
        Self(TcpStream::connect(span.running.listen).await.unwrap())
    }

    async fn open(span: &Span) -> Self {
        let mut raw = Self::connect(span).await;
        raw.send(format!("{HANDSHAKE}\r\n").as_bytes()).await;
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(soon(raw.0.read_u8()).await.unwrap());
        }
        assert!(head.starts_with(b"HTTP/1.1 101 "), "{}", String::from_utf8_lossy(&head));
        raw
    }

    async fn send(&mut self, bytes: &[u8]) {
        soon(self.0.write_all(bytes)).await.unwrap();
    }

    /// The next frame: its opcode and payload.
    async fn hear(&mut self) -> (u8, Vec<u8>) {
        soon(async {
            let first = self.0.read_u8().await.unwrap();
            assert_eq!(first & 0x70, 0, "no reserved bit");
            let length = match self.0.read_u8().await.unwrap() {
                126 => self.0.read_u16().await.unwrap().into(),
                127 => self.0.read_u64().await.unwrap(),
                length => length.into(),
            };
            let mut payload = vec![0; length as usize];
            self.0.read_exact(&mut payload).await.unwrap();
            (first & 0xF, payload)
        })
        .await
    }

    async fn answer(&mut self) -> Value {
        let (opcode, payload) = self.hear().await;
        assert_eq!(opcode, TEXT, "{payload:?}");
        serde_json::from_slice(&payload).unwrap()
    }

    /// The code of the close frame that comes now; nothing comes behind it.
    async fn closed(&mut self) -> u16 {
        let (opcode, payload) = self.hear().await;
        assert_eq!(opcode, CLOSE, "{payload:?}");
        assert_eq!(self.rest().await, b"");
        u16::from_be_bytes(payload[..2].try_into().unwrap())
    }

    /// What comes until the other side is done.
    async fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        soon(self.0.read_to_end(&mut rest)).await.unwrap();
        rest
    }
}

/// The beginning of a masked frame that claims to have so many bytes.
fn header(first: u8, length: u64) -> Vec<u8> {
    let mut frame = vec![first];
    match length {
        0..126 => frame.push(0x80 | length as u8),
        126..0x10000 => {
            frame.push(0x80 | 126);
            frame.extend((length as u16).to_be_bytes());
        }
        _ => {
            frame.push(0x80 | 127);
            frame.extend(length.to_be_bytes());
        }
    }
    frame.extend([1, 2, 3, 4]);
    frame
}

fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = header(first, payload.len() as u64);
    frame.extend(payload.iter().zip([1, 2, 3, 4].iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

fn ping(id: &str) -> Vec<u8> {
    frame(FIN | TEXT, json!({"type": "ping", "request_id": id}).to_string().as_bytes())
}

/// The largest message that is taken, by the settings' own.
const MESSAGE_BYTES_MAX: u64 = 64 * 1024;

async fn small() -> Span {
    let mut plan = Plan::default();
    plan.settings.session.max_message = MESSAGE_BYTES_MAX as usize;
    Span::with(plan).await
}

#[tokio::test]
async fn what_is_no_websocket_frame_closes_the_connection_with_its_code() {
    let span = small().await;
    let unmasked = [FIN | TEXT, 2, b'{', b'}'].to_vec();
    let large = 2 * MESSAGE_BYTES_MAX as usize;
    let fragments = [frame(TEXT, &vec![b' '; large / 2]), frame(FIN, &vec![b' '; large / 2])].concat();
    let table = [
        ("a binary message", frame(FIN | BINARY, b"{}"), 1003),
        ("text that is no UTF-8", frame(FIN | TEXT, b"{\"type\":\"\xff\"}"), 1007),
        ("a surrogate in UTF-8", frame(FIN | TEXT, b"\xed\xa0\x80"), 1007),
        ("half a character", frame(FIN | TEXT, b"\xf0\x9f"), 1007),
        ("text that is no UTF-8 in a fragment", frame(TEXT, b"{\xff"), 1007),
        ("a message over the limit", frame(FIN | TEXT, &vec![b' '; large]), 1009),
        ("fragments over the limit", fragments, 1009),
        // Refused by its header alone: none of these bytes ever comes.
        ("a claim of more than the limit", header(FIN | TEXT, large as u64), 1009),
        ("a claim of 2^63 bytes", header(FIN | TEXT, 1 << 63), 1009),
        ("a claim of 2^64 - 1 bytes", header(FIN | TEXT, u64::MAX), 1009),
        ("a claim of 2^63 binary bytes in a fragment", header(BINARY, 1 << 63), 1009),
        ("a reserved bit", frame(FIN | 0x40 | TEXT, b"{}"), 1002),
        ("an unmasked frame", unmasked, 1002),
        ("an unknown opcode", frame(FIN | 0x3, b"{}"), 1002),
        ("an unknown control opcode", frame(FIN | 0xB, b"{}"), 1002),
        ("a ping in fragments", frame(PING, b"x"), 1002),
        ("a ping of 126 bytes", frame(FIN | PING, &[b'x'; 126]), 1002),
        ("the end of no message", frame(FIN, b"{}"), 1002),
        ("a message inside another", [frame(TEXT, b"{"), frame(FIN | TEXT, b"}")].concat(), 1002),
        ("half a close code", frame(FIN | CLOSE, &[3]), 1002),
        ("a close code that nobody may send", frame(FIN | CLOSE, &1005_u16.to_be_bytes()), 1002),
        ("a goodbye", frame(FIN | CLOSE, &1000_u16.to_be_bytes()), 1000),
    ];
    let mut bystander = span.client().await;
    bystander.subscribe("telemetry.a", nothing()).await.unwrap();
    for (what, bytes, code) in table {
        let mut raw = Raw::open(&span).await;
        let counted = format!("twinspan_close_total{{code=\"{code}\"}}");
        let before = span.metric(&counted);
        let by_us = !matches!(what, "a goodbye" | "a close code that nobody may send");
        if by_us {
            // What was asked before is answered before.
            raw.send(&[ping("before"), bytes].concat()).await;
            assert_eq!(raw.answer().await["request_id"], "before", "{what}");
        } else {
            raw.send(&bytes).await;
        }
        assert_eq!(raw.closed().await, code, "{what}");
        assert_eq!(span.metric(&counted) - before, f64::from(u8::from(by_us)), "{what}");
    }
    bystander.publish("telemetry.a", &draft("1")).await.unwrap();
    assert_eq!(crate::harness::next_payload(&mut bystander).await, "1");
}

#[tokio::test]
async fn who_sends_too_much_hears_why_though_it_goes_on_sending() {
    let span = small().await;
    let mut raw = Raw::open(&span).await;
    // Far more than the sockets hold: whoever resets the connection here destroys its own goodbye.
    let message = frame(FIN | TEXT, &vec![b' '; 16 << 20]);
    raw.send(&message).await;
    assert_eq!(raw.closed().await, 1009);
}

#[tokio::test]
async fn a_message_in_fragments_of_one_byte_is_a_message_and_pings_between_them_are_answered() {
    let span = Span::start().await;
    let mut raw = Raw::open(&span).await;
    let text = json!({"type": "ping", "request_id": "in pieces: \u{1F600}"}).to_string();
    for (at, byte) in text.bytes().enumerate() {
        let first = if at == 0 { TEXT } else { 0 };
        raw.send(&[frame(first, &[byte]), frame(FIN | PING, &[at as u8])].concat()).await;
        assert_eq!(raw.hear().await, (PONG, vec![at as u8]));
    }
    raw.send(&frame(FIN, b"")).await;
    assert_eq!(raw.answer().await["request_id"], "in pieces: \u{1F600}");
}

#[tokio::test]
async fn a_message_that_never_ends_holds_up_nothing() {
    let mut plan = Plan::default();
    plan.settings.session.ping_interval = Duration::from_millis(100);
    plan.settings.session.pong_timeout = Duration::from_millis(400);
    let span = Span::with(plan).await;
    let mut raw = Raw::open(&span).await;
    raw.send(&frame(FIN | TEXT, json!({"type": "subscribe", "topic": "telemetry.a"}).to_string().as_bytes()))
        .await;
    assert_eq!(raw.answer().await["type"], "ack");
    raw.send(&frame(TEXT, b"{\"type\":")).await;
    // Its own pings and its events go on for longer than silence is allowed.
    let publisher = span.client().await;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(800) {
        raw.send(&frame(FIN | PING, b"still here")).await;
        publisher.publish("telemetry.a", &draft("1")).await.unwrap();
        let (mut events, mut pongs) = (0, 0);
        while (events, pongs) != (1, 1) {
            match raw.hear().await {
                (PING, payload) => raw.send(&frame(FIN | PONG, &payload)).await,
                (PONG, payload) => {
                    assert_eq!(payload, b"still here");
                    pongs += 1;
                }
                (TEXT, _) => events += 1,
                other => panic!("{other:?}"),
            }
        }
    }
    // Bytes of a message that never ends are no sign of life.
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < PATIENCE, "who answers no ping is closed");
        raw.send(&frame(0, b" ")).await;
        match tokio::time::timeout(Duration::from_millis(50), raw.0.readable()).await {
            Err(_) => continue,
            Ok(readable) => readable.unwrap(),
        }
        match raw.hear().await {
            (PING, _) => {}
            (CLOSE, payload) => break assert_eq!(payload[..2], 1001_u16.to_be_bytes()),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_handshake_that_does_not_end_is_ended() {
    let mut plan = Plan::default();
    plan.settings.session.handshake_timeout = Duration::from_millis(300);
    let span = Span::with(plan).await;
    let half = HANDSHAKE.as_bytes();
    for (what, begin, drip) in [
        ("says nothing", &b""[..], &b""[..]),
        ("stops in the middle", half, b""),
        ("never comes to the end", half, b"X-Pad: 1\r\n"),
        ("never comes to the end of a line", half, b"x"),
    ] {
        let mut raw = Raw::connect(&span).await;
        raw.send(begin).await;
        let begun = Instant::now();
        loop {
            assert!(begun.elapsed() < PATIENCE, "who {what} is let go");
            let mut byte = [0];
            match tokio::time::timeout(Duration::from_millis(20), raw.0.read(&mut byte)).await {
                // The end, or what is said before it.
                Ok(_) => break,
                // Refused once the other side has hung up; the next read sees it.
                Err(_) => _ = raw.0.write(drip).await,
            }
        }
        assert!(begun.elapsed() >= Duration::from_millis(250), "who {what} gets its time");
    }
    assert_eq!(soon(span.client().await.ping()).await.unwrap().kind, "pong");
}

#[tokio::test]
async fn what_is_no_http_is_refused_and_what_is_no_upgrade_says_so() {
    let span = Span::start().await;
    let long = format!("GET /ws HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(64 * 1024));
    let many = format!("GET /ws HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: 1\r\n".repeat(5000));
    let table: [(&str, &[u8], &str); 9] = [
        ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", "400"),
        ("noise", b"\x00\xff\xfe garbage \r\n\r\n", "400"),
        ("a WebSocket frame", &frame(FIN | TEXT, b"{\"type\":\"ping\"}\r\n\r\n"), "400"),
        ("another protocol", b"CONNECT {\"verbose\":false}\r\nPING\r\n\r\n", "400"),
        ("a long header", long.as_bytes(), "431"),
        ("many headers", many.as_bytes(), "431"),
        ("no upgrade", b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", "400"),
        (
            "an old version",
            b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: upgrade, close\r\nSec-WebSocket-Version: 8\r\n\
              Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            "400",
        ),
        ("another method", b"POST /ws HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", "405"),
    ];
    for (what, request, status) in table {
        let mut raw = Raw::connect(&span).await;
        raw.send(request).await;
        let answer = String::from_utf8_lossy(&raw.rest().await).into_owned();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{what}: {answer:?}");
    }
    assert_eq!(soon(span.client().await.ping()).await.unwrap().kind, "pong");
}

#[tokio::test]
async fn an_answer_is_read_by_who_is_still_sending_its_request() {
    let span = small().await;
    let mut raw = Raw::connect(&span).await;
    let length = 16 << 20;
    raw.send(
        format!("POST /publish/orders.a HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n").as_bytes(),
    )
    .await;
    raw.send(&vec![b'1'; length]).await;
    let mut status = [0; 12];
    soon(raw.0.read_exact(&mut status)).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
}
