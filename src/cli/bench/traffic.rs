//! What a target does for the load: numbered messages go out, and their numbers come back.
//!
//! ```text
//! Outgoing ──0 1 2 3──▶ target ──▶ Incoming    acknowledgements, answers
//!                          └─────▶ Incoming    deliveries
//! ```
//! A message is its number and some filler, encoded beforehand: every other eight bytes of the filler differ from one to
//! the next, as the values do in objects whose names are the same, and only they and the digits are written for each, so
//! that the load costs little beside what it loads.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;

/// How many digits a number has wherever it is written.
pub const DIGITS: usize = 12;
/// Where the number goes in a text that is to become a template.
pub const NUMBER: &str = "############";
/// Stands for a byte of filler that differs from message to message.
const VARIES: char = '^';
const VARIES_RUN: usize = 8;
const POOL: usize = 1 << 16;
/// The smallest payload: its quotes and its number, and two bytes so that it has whole groups of Base64.
pub const PAYLOAD_MIN: usize = DIGITS + 4;

/// What one end of a target takes.
#[async_trait]
pub trait Outgoing: Send {
    /// Hands over the messages `from..from + count`, and waits where the target takes no more.
    async fn send(&mut self, from: u64, count: u64) -> Result<()>;
}

/// What the other end brings.
#[async_trait]
pub trait Incoming: Send {
    /// The numbers that came since, at least one. What a group's member got is acknowledged one by one,
    /// before more is waited for. A call that is dropped while it waits loses nothing.
    async fn next(&mut self, into: &mut Vec<u64>) -> Result<()>;

    /// Returns once what came is acknowledged, and confirmed where the target confirms.
    async fn settle(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Messages out, and what tells that they arrived.
pub type Line = (Box<dyn Outgoing>, Box<dyn Incoming>);

/// How deliveries are taken.
#[derive(Debug, Clone)]
pub enum How {
    /// Everything from now on.
    Plain,
    Group {
        name: String,
        /// From the first message that is stored, or from now on.
        earliest: bool,
        prefetch: u32,
    },
}

/// What is measured: the bridge, a lane without it, or a peer.
#[async_trait]
pub trait Target: Send + Sync {
    async fn publisher(&self, topic: &str, payload: &Payload) -> Result<Line>;

    async fn receiver(&self, topic: &str, how: &How) -> Result<Box<dyn Incoming>>;

    /// Where requests go and their answers come back.
    async fn requester(&self, _topic: &str, _payload: &Payload) -> Result<Line> {
        bail!("this target has no requests")
    }

    /// Answers requests until it is dropped.
    async fn responder(&self, _topic: &str) -> Result<Responder> {
        bail!("this target has no requests")
    }
}

/// A task that ends with its owner.
pub struct Responder(tokio::task::JoinHandle<Result<()>>);

impl Responder {
    pub fn spawn(answering: impl Future<Output = Result<()>> + Send + 'static) -> Self {
        Self(tokio::spawn(answering))
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A JSON string of so many bytes, quotes included, that begins with its number: valid as it is in every dialect.
#[derive(Debug, Clone)]
pub struct Payload(Template);

impl Payload {
    pub fn new(size: usize) -> Self {
        // Nothing that a codec would have to escape.
        let mut random = fastrand::Rng::with_seed(7);
        let filler: String = (0..size - DIGITS - 2)
            .map(|at| if at / VARIES_RUN % 2 == 1 { VARIES } else { random.alphanumeric() })
            .collect();
        Self(Template::new(&format!("\"{NUMBER}{filler}\"")))
    }

    pub fn numbered(&self, number: u64) -> Vec<u8> {
        self.0.numbered(number)
    }

    /// With `NUMBER` in the number's place.
    pub fn text(&self) -> &str {
        &self.0.text
    }
}

/// A text in which a number stands in one or more places.
#[derive(Debug, Clone)]
pub struct Template {
    text: String,
    places: Vec<usize>,
    /// Where it varies, and for how many bytes.
    varies: Vec<(usize, usize)>,
    pool: Arc<[u8]>,
}

impl Template {
    pub fn new(text: &str) -> Self {
        let places = text.match_indices(NUMBER).map(|(at, _)| at).collect();
        let mut varies: Vec<(usize, usize)> = Vec::new();
        for (at, _) in text.match_indices(VARIES) {
            match varies.last_mut() {
                Some((from, count)) if *from + *count == at => *count += 1,
                _ => varies.push((at, 1)),
            }
        }
        let mut random = fastrand::Rng::with_seed(11);
        let pool = (0..POOL + text.len()).map(|_| random.alphanumeric() as u8).collect();
        Self { text: text.to_owned(), places, varies, pool }
    }

    pub fn numbered(&self, number: u64) -> Vec<u8> {
        let mut bytes = self.text.as_bytes().to_vec();
        let digits = digits(number);
        for &at in &self.places {
            bytes[at..at + DIGITS].copy_from_slice(&digits);
        }
        // Far apart for numbers that stand side by side.
        let from = (number as usize).wrapping_mul(7919) % POOL;
        for &(at, count) in &self.varies {
            bytes[at..at + count].copy_from_slice(&self.pool[from + at..from + at + count]);
        }
        bytes
    }
}

fn digits(mut number: u64) -> [u8; DIGITS] {
    let mut digits = [b'0'; DIGITS];
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
    digits
}

/// The number of a payload that `Payload` made.
pub fn number(payload: &[u8]) -> Result<u64> {
    payload.get(1..=DIGITS).and_then(parse).context("a message that this benchmark did not publish")
}

/// The number that follows `after` in a frame.
pub fn number_after(frame: &str, after: &str) -> Option<u64> {
    let from = frame.find(after)? + after.len();
    parse(frame.as_bytes().get(from..from + DIGITS)?)
}

/// The digits that follow `after` in a frame, however many.
pub fn digits_after<'a>(frame: &'a str, after: &str) -> Option<&'a str> {
    let rest = &frame[frame.find(after)? + after.len()..];
    let end = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
    (end > 0).then(|| &rest[..end])
}

/// The text without escapes between `after` and the next quote.
pub fn text_after<'a>(frame: &'a str, after: &str) -> Option<&'a str> {
    let rest = &frame[frame.find(after)? + after.len()..];
    rest.split('"').next()
}

fn parse(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0u64, |number, digit| match digit {
        b'0'..=b'9' => Some(number * 10 + u64::from(digit - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_has_its_size_and_keeps_its_number() {
        for (size, n) in [(PAYLOAD_MIN, 0), (128, 17), (1024, 999_999_999_999)] {
            let payload = Payload::new(size).numbered(n);
            assert_eq!((payload.len(), number(&payload).unwrap()), (size, n));
            assert!(serde_json::from_slice::<String>(&payload).is_ok(), "valid JSON as it is");
        }
        assert!(number(b"\"somebody else's message\"").is_err());
    }

    #[test]
    fn a_template_has_the_number_in_every_place_and_frames_are_read_by_it() {
        let template = Template::new(&format!(r#"{{"request_id":"{NUMBER}","payload":"{NUMBER}x"}}"#));
        let frame = String::from_utf8(template.numbered(42)).unwrap();
        assert_eq!(frame, r#"{"request_id":"000000000042","payload":"000000000042x"}"#);
        assert_eq!(number_after(&frame, r#""payload":""#), Some(42));
        assert_eq!(number_after(&frame, r#""nothing":""#), None);
        assert_eq!(digits_after(r#"{"delivery":17,"attempt":1}"#, r#""delivery":"#), Some("17"));
        assert_eq!(text_after(r#"{"messageId":"CAM=","x":1}"#, r#""messageId":""#), Some("CAM="));
    }
}
