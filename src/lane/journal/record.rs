//! What the rows of the log look like: a checksum, then a body.
//!
//! ```text
//! row     crc32c(key, body) │ body
//! record  version │ flags │ ts │ id? │ event time? │ key? │ deliver at? │ headers │ payload
//! ```
//! The checksum covers the key as well, so a row that turns up in another's place is noticed too. The store below
//! hands out flipped bits without a word; every row is checked whenever it is read.
//! Numbers are little endian, lengths are LEB128.

use bytes::Bytes;

use crate::message::{Headers, Message, MessageId, Timestamp};

const VERSION: u8 = 1;
const HAS_ID: u8 = 1;
const HAS_EVENT_TIME: u8 = 2;
const HAS_KEY: u8 = 4;
/// Since format 2 of the log.
const HAS_DELIVER_AT: u8 = 8;

/// The row is not what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damaged;

/// What identifies a row to its checksum.
pub fn record_key(topic_id: u32, seq: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..4].copy_from_slice(&topic_id.to_le_bytes());
    key[4..].copy_from_slice(&seq.to_le_bytes());
    key
}

/// A row of this body. `row` is cleared first, so that one buffer serves many rows.
pub fn seal(row: &mut Vec<u8>, key: &[u8], body: impl FnOnce(&mut Vec<u8>)) {
    row.clear();
    row.extend_from_slice(&[0; 4]);
    body(row);
    let sum = checksum(key, &row[4..]);
    row[..4].copy_from_slice(&sum.to_le_bytes());
}

/// The body of a row, where the checksum holds.
pub fn unseal<'a>(key: &[u8], row: &'a [u8]) -> Result<&'a [u8], Damaged> {
    let (sum, body) = row.split_first_chunk::<4>().ok_or(Damaged)?;
    if u32::from_le_bytes(*sum) == checksum(key, body) { Ok(body) } else { Err(Damaged) }
}

fn checksum(key: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key), body)
}

pub fn encode(message: &Message, body: &mut Vec<u8>) {
    let flag = |there: bool, flag: u8| if there { flag } else { 0 };
    body.push(VERSION);
    body.push(
        flag(message.id.is_some(), HAS_ID)
            | flag(message.event_time.is_some(), HAS_EVENT_TIME)
            | flag(message.key.is_some(), HAS_KEY)
            | flag(message.deliver_at.is_some(), HAS_DELIVER_AT),
    );
    body.extend_from_slice(&message.ts.as_millis().to_le_bytes());
    if let Some(id) = &message.id {
        body.extend_from_slice(id.as_bytes());
    }
    if let Some(time) = message.event_time {
        body.extend_from_slice(&time.as_millis().to_le_bytes());
    }
    if let Some(key) = &message.key {
        put_text(body, key);
    }
    if let Some(time) = message.deliver_at {
        body.extend_from_slice(&time.as_millis().to_le_bytes());
    }
    put_length(body, message.headers.len());
    for (name, value) in &message.headers {
        put_text(body, name);
        put_text(body, value);
    }
    body.extend_from_slice(&message.payload);
}

pub fn decode(body: &[u8]) -> Result<Message, Damaged> {
    let mut rest = Fields(body);
    if rest.byte()? != VERSION {
        return Err(Damaged);
    }
    let flags = rest.byte()?;
    if flags & !(HAS_ID | HAS_EVENT_TIME | HAS_KEY | HAS_DELIVER_AT) != 0 {
        return Err(Damaged);
    }
    let ts = Timestamp::from_millis(rest.i64()?);
    let id = if flags & HAS_ID != 0 { Some(MessageId::from_bytes(rest.array()?)) } else { None };
    let event_time = if flags & HAS_EVENT_TIME != 0 { Some(rest.time()?) } else { None };
    let key = if flags & HAS_KEY != 0 { Some(rest.text()?) } else { None };
    let deliver_at = if flags & HAS_DELIVER_AT != 0 { Some(rest.time()?) } else { None };
    let mut headers = Headers::new();
    for _ in 0..rest.length()? {
        headers.insert(rest.text()?, rest.text()?);
    }
    Ok(Message { id, ts, payload: Bytes::copy_from_slice(rest.0), key, headers, event_time, deliver_at })
}

pub fn put_length(body: &mut Vec<u8>, mut length: usize) {
    while length >= 0x80 {
        body.push(length as u8 | 0x80);
        length >>= 7;
    }
    body.push(length as u8);
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    put_length(body, text.len());
    body.extend_from_slice(text.as_bytes());
}

/// What is left of a body; every step says whether there was enough.
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Damaged> {
        let (taken, rest) = self.0.split_first_chunk::<N>().ok_or(Damaged)?;
        self.0 = rest;
        Ok(*taken)
    }

    pub fn u32(&mut self) -> Result<u32, Damaged> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, Damaged> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn i64(&mut self) -> Result<i64, Damaged> {
        self.array().map(i64::from_le_bytes)
    }

    fn time(&mut self) -> Result<Timestamp, Damaged> {
        self.i64().map(Timestamp::from_millis)
    }

    fn byte(&mut self) -> Result<u8, Damaged> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub fn length(&mut self) -> Result<usize, Damaged> {
        let mut length = 0u64;
        for shift in [0, 7, 14, 21, 28, 35] {
            let byte = self.byte()?;
            length |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return usize::try_from(length).map_err(|_| Damaged);
            }
        }
        Err(Damaged)
    }

    fn text(&mut self) -> Result<String, Damaged> {
        let length = self.length()?;
        let (taken, rest) = self.0.split_at_checked(length).ok_or(Damaged)?;
        self.0 = rest;
        std::str::from_utf8(taken).map(str::to_owned).map_err(|_| Damaged)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message() -> impl Strategy<Value = Message> {
        let millis = -62_135_596_800_000i64..253_402_207_200_000;
        let headers = prop::collection::btree_map(".{0,9}", ".{0,200}", 0..5);
        let payload = prop::collection::vec(any::<u8>(), 0..300);
        let time = || prop::option::of(millis.clone().prop_map(Timestamp::from_millis));
        let options = (any::<Option<[u8; 16]>>(), time(), prop::option::of(".{0,9}"), time());
        let ts = millis.clone().prop_map(Timestamp::from_millis);
        (ts, options, headers, payload).prop_map(
            |(ts, (id, event_time, key, deliver_at), headers, payload)| {
                let (id, payload) = (id.map(MessageId::from_bytes), payload.into());
                Message { id, ts, payload, key, headers, event_time, deliver_at }
            },
        )
    }

    fn row(key: &[u8], message: &Message) -> Vec<u8> {
        let mut row = vec![9; 3];
        seal(&mut row, key, |body| encode(message, body));
        row
    }

    proptest! {
        #[test]
        fn a_record_reads_back_as_it_was_written(message in message(), id: u32, seq: u64) {
            let key = record_key(id, seq);
            let row = row(&key, &message);
            prop_assert_eq!(unseal(&key, &row).and_then(decode), Ok(message));
            prop_assert_eq!(unseal(&record_key(id, seq ^ 1), &row), Err(Damaged));
        }

        #[test]
        fn a_record_with_a_flipped_bit_is_noticed(message in message(), at: prop::sample::Index, bit in 0..8u8) {
            let key = record_key(1, 1);
            let mut row = row(&key, &message);
            let at = at.index(row.len());
            row[at] ^= 1 << bit;
            prop_assert_eq!(unseal(&key, &row), Err(Damaged));
        }

        #[test]
        fn decoding_garbage_never_panics(garbage in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = unseal(b"key", &garbage);
            let _ = decode(&garbage);
            let _ = decode(&[&[VERSION, HAS_KEY][..], &garbage].concat());
        }
    }
}
