//! Messages as Pulsar stores them: ours on the way in, anybody's on the way out.
//!
//! A message crosses unwrapped: its bytes are the payload, its key the partition key, its headers the properties. The
//! fabric's own two fields are properties too. What a native client published has neither: its id is made of its
//! place, the same on every bridge, and its `ts` is the publish time.

use std::cell::{LazyCell, RefCell};
use std::io::Read;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, BufMut, Bytes};
use prost::Message as _;
use prost::encoding::{encode_varint, encoded_len_varint};
use pulsar::proto::{CompressionType, KeyValue, MessageMetadata};

use super::frame::{Broken, Entry, Metadata, Property};
use crate::lane::contract::LaneError;
use crate::message::{Headers, LIVE, Message, MessageId, ORIGIN, Place, RESERVED, Timestamp};
use crate::policy::table::Compression;
use crate::topic::Topic;

const ID: &str = "twinspan-id";
const TS: &str = "twinspan-ts";
/// Half the time of LZ4's default on what hardly folds, and a batch of JSON grows by 2 %.
const LZ4_ACCELERATION: i32 = 4;
/// What Java's producers take.
const ZSTD_LEVEL: i32 = 3;
/// A few bytes may unfold to gigabytes; this is more than any broker stores uncompressed.
const UNFOLDED_BYTES_MAX: u32 = 64 << 20;

/// One message of an entry, or why it cannot be read.
#[derive(Debug, Clone)]
pub struct Record {
    pub place: Place,
    pub published: Timestamp,
    pub message: Result<Message, Unreadable>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    #[error("its checksum does not match")]
    Checksum,
    #[error("it does not unpack")]
    Packing,
    #[error("it is encrypted, and this bridge has no key")]
    Encrypted,
    #[error("it is one chunk of a message that a native client cut up")]
    Chunk,
}

impl Unreadable {
    pub fn on_lane(self, topic: &Topic, partition: u32, place: Place) -> LaneError {
        match self {
            Unreadable::Checksum | Unreadable::Packing => {
                LaneError::Corrupt { topic: topic.clone(), place: format!("{partition}:{place}") }
            }
            Unreadable::Encrypted | Unreadable::Chunk => LaneError::Internal(format!(
                "the record at {partition}:{place} of `{topic}` was not delivered: {self}"
            )),
        }
    }
}

/// Refuses what would be the fabric's.
pub fn check(message: &Message) -> Result<(), LaneError> {
    let is_reserved =
        |name: &&String| name.starts_with(RESERVED) && !name.starts_with(ORIGIN) && *name != LIVE;
    match message.headers.keys().find(is_reserved) {
        Some(name) => Err(LaneError::BadRequest(format!(
            "header `{name}` was refused: names that begin with `{RESERVED}` belong to the fabric"
        ))),
        None => Ok(()),
    }
}

/// What the broker counts of a message against its limit, and never less.
pub fn size(message: &Message) -> usize {
    let headers: usize = message.headers.iter().map(|(name, value)| name.len() + value.len() + 16).sum();
    message.payload.len() + headers + message.key.as_ref().map_or(0, String::len) + 256
}

/// A message by itself. The producer's own fields are its business.
pub fn single(message: &Message, stamp: &mut Stamp) -> MessageMetadata {
    let id = message.id.map(|id| id.to_string());
    let pairs = properties(message, id.as_deref(), stamp.text(message.ts));
    MessageMetadata {
        properties: pairs.map(|(key, value)| KeyValue { key: key.into(), value: value.into() }).collect(),
        partition_key: message.key.clone(),
        event_time: event_time(message),
        deliver_at_time: message.deliver_at.map(Timestamp::as_millis),
        ..Default::default()
    }
}

/// Puts a message behind the others of a batch: its size, its metadata, its payload. Written by hand, because a
/// million of them a second come by here.
pub fn put_member(message: &Message, stamp: &mut Stamp, into: &mut Vec<u8>) {
    let mut text = [0; uuid::fmt::Hyphenated::LENGTH];
    let id =
        message.id.map(|id| &*uuid::Uuid::from_bytes(*id.as_bytes()).hyphenated().encode_lower(&mut text));
    let ts = stamp.text(message.ts);
    let event_time = event_time(message);
    let pair = |key: &str, value: &str| delimited(key.len()) + delimited(value.len());
    let size = properties(message, id, ts).map(|(key, value)| delimited(pair(key, value))).sum::<usize>()
        + message.key.as_ref().map_or(0, |key| delimited(key.len()))
        + 1
        + encoded_len_varint(message.payload.len() as u64)
        + event_time.map_or(0, |time| 1 + encoded_len_varint(time));
    into.reserve(4 + size + message.payload.len());
    into.put_u32(size as u32);
    for (key, value) in properties(message, id, ts) {
        put_tag(1 << 3 | 2, pair(key, value) as u64, into);
        put_text(1 << 3 | 2, key, into);
        put_text(2 << 3 | 2, value, into);
    }
    if let Some(key) = &message.key {
        put_text(2 << 3 | 2, key, into);
    }
    put_tag(3 << 3, message.payload.len() as u64, into);
    if let Some(time) = event_time {
        put_tag(5 << 3, time, into);
    }
    into.extend_from_slice(&message.payload);
}

/// A field's tag and its value or length.
fn put_tag(tag: u8, value: u64, into: &mut Vec<u8>) {
    into.push(tag);
    encode_varint(value, into);
}

fn put_text(tag: u8, text: &str, into: &mut Vec<u8>) {
    put_tag(tag, text.len() as u64, into);
    into.extend_from_slice(text.as_bytes());
}

/// What a field of so many bytes takes with its tag and length.
fn delimited(length: usize) -> usize {
    1 + encoded_len_varint(length as u64) + length
}

fn properties<'a>(
    message: &'a Message,
    id: Option<&'a str>,
    ts: &'a str,
) -> impl Iterator<Item = (&'a str, &'a str)> {
    let headers = message.headers.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    headers.chain([(TS, ts)]).chain(id.map(|id| (ID, id)))
}

fn event_time(message: &Message) -> Option<u64> {
    message.event_time.and_then(|time| u64::try_from(time.as_millis()).ok())
}

/// A time and its text, the last that were written or read: most messages share them with the one before.
#[derive(Default)]
pub struct Stamp {
    at: Timestamp,
    text: String,
}

impl Stamp {
    fn text(&mut self, ts: Timestamp) -> &str {
        if self.at != ts || self.text.is_empty() {
            (self.at, self.text) = (ts, ts.to_string());
        }
        &self.text
    }

    /// `None` where the text is no time.
    fn time(&mut self, text: &str) -> Option<Timestamp> {
        if self.text != text || text.is_empty() {
            (self.at, self.text) = (text.parse().ok()?, text.to_owned());
        }
        Some(self.at)
    }
}

/// How many messages an entry holds, without unpacking it.
pub fn count(entry: &Result<Entry, Broken>) -> u32 {
    match entry {
        Ok(entry) => entry.metadata.num_messages_in_batch.map_or(1, |n| n.max(1) as u32),
        Err(Broken) => 1,
    }
}

/// The messages of an entry that `wanted` picks by their index, or one record that says why there are none.
pub fn unpack(
    topic: &Topic,
    partition: u32,
    first: Place,
    entry: Result<Entry, Broken>,
    wanted: impl Fn(u32) -> bool,
    into: &mut Vec<Record>,
) {
    let place = |index| Place { index, ..first };
    let before = into.len();
    let published = entry.as_ref().map_or_else(
        |Broken| Timestamp::now(),
        |entry| Timestamp::from_millis(i64::try_from(entry.metadata.publish_time).unwrap_or(i64::MAX)),
    );
    // Hashing costs as much as the rest of a message, so an entry is hashed once.
    let derived = LazyCell::new(|| MessageId::derived(topic.as_str(), partition, first));
    let read = entry.map_err(|Broken| Unreadable::Checksum).and_then(|Entry { metadata, data }| {
        singles(metadata, data, |index, single| {
            if wanted(index) {
                let message = Ok(single.message(published, || derived.nth(index)));
                into.push(Record { place: place(index), published, message });
            }
        })
    });
    if let Err(unreadable) = read {
        into.truncate(before);
        into.push(Record { place: first, published, message: Err(unreadable) });
    }
}

/// One message of an entry, in the producer's words.
#[derive(Default)]
struct Single {
    id: Option<MessageId>,
    ts: Option<Timestamp>,
    headers: Headers,
    key: Option<String>,
    key_is_base64: bool,
    event_time: Option<u64>,
    deliver_at: Option<i64>,
    payload: Bytes,
}

/// What stands before a batch's member, as far as it is of use here: the crate's type of the same name copies every
/// text, and most of them are the fabric's own.
#[derive(Clone, PartialEq, prost::Message)]
struct Member {
    #[prost(message, repeated, tag = "1")]
    properties: Vec<Property>,
    #[prost(string, optional, tag = "2")]
    key: Option<String>,
    #[prost(int32, required, tag = "3")]
    payload_size: i32,
    #[prost(bool, optional, tag = "4")]
    compacted_out: Option<bool>,
    #[prost(uint64, optional, tag = "5")]
    event_time: Option<u64>,
    #[prost(bool, optional, tag = "6")]
    key_is_base64: Option<bool>,
}

/// Tells of each message of an entry, with its index.
fn singles(metadata: Metadata, data: Bytes, mut tell: impl FnMut(u32, Single)) -> Result<(), Unreadable> {
    if !metadata.encryption_keys.is_empty() {
        return Err(Unreadable::Encrypted);
    }
    if metadata.num_chunks_from_msg.is_some_and(|chunks| chunks > 1) {
        return Err(Unreadable::Chunk);
    }
    let mut data = unfold(&metadata, data).ok_or(Unreadable::Packing)?;
    // A batch is delayed as a whole.
    let deliver_at = metadata.deliver_at_time;
    let mut stamp = Stamp::default();
    let Some(count) = metadata.num_messages_in_batch else {
        let mut single = Single {
            key_is_base64: metadata.partition_key_b64_encoded(),
            event_time: metadata.event_time,
            deliver_at,
            payload: data,
            ..Single::default()
        };
        single.properties(&metadata.properties, &mut stamp)?;
        single.key = metadata.partition_key;
        tell(0, single);
        return Ok(());
    };
    for index in 0..count.max(0) as u32 {
        let (member, payload) = member(&mut data).ok_or(Unreadable::Packing)?;
        if member.compacted_out() {
            continue;
        }
        let mut single = Single {
            key_is_base64: member.key_is_base64(),
            event_time: member.event_time,
            deliver_at,
            payload,
            ..Single::default()
        };
        single.properties(&member.properties, &mut stamp)?;
        single.key = member.key;
        tell(index, single);
    }
    Ok(())
}

/// The next message of a batch: a size, its metadata, its payload.
fn member(data: &mut Bytes) -> Option<(Member, Bytes)> {
    let size = data.try_get_u32().ok()? as usize;
    if size > data.len() {
        return None;
    }
    let member = Member::decode(data.split_to(size)).ok()?;
    let length = usize::try_from(member.payload_size).ok()?;
    (length <= data.len()).then(|| (member, data.split_to(length)))
}

thread_local! {
    /// What is being folded, as large as the largest body so far: it is known only afterwards how small it becomes.
    static FOLDED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Folds a body; `None` where that makes it no smaller, and where nothing was asked for.
pub fn fold(body: &[u8], by: Compression) -> Option<(Bytes, CompressionType)> {
    let fast = || Some(lz4::block::CompressionMode::FAST(LZ4_ACCELERATION));
    FOLDED.with_borrow_mut(|folded| {
        folded.resize(folded.len().max(body.len()), 0);
        // What becomes larger finds no room.
        let folded = &mut folded[..body.len()];
        let (size, kind) = match by {
            Compression::None => return None,
            Compression::Lz4 => {
                (lz4::block::compress_to_buffer(body, fast(), false, folded).ok()?, CompressionType::Lz4)
            }
            Compression::Zstd => {
                (zstd::bulk::compress_to_buffer(body, folded, ZSTD_LEVEL).ok()?, CompressionType::Zstd)
            }
        };
        (size < body.len()).then(|| (Bytes::copy_from_slice(&folded[..size]), kind))
    })
}

fn unfold(metadata: &Metadata, data: Bytes) -> Option<Bytes> {
    let size = metadata.uncompressed_size();
    if size > UNFOLDED_BYTES_MAX {
        return None;
    }
    // One byte more than announced, so that what unfolds to more than it says is seen and refused.
    let read = |from: &mut dyn Read| {
        let mut unfolded = Vec::with_capacity(size as usize);
        from.take(u64::from(size) + 1).read_to_end(&mut unfolded).ok()?;
        Some(unfolded)
    };
    let unfolded = match metadata.compression() {
        CompressionType::None => return Some(data),
        CompressionType::Lz4 => lz4::block::decompress(&data, Some(size as i32)).ok()?,
        CompressionType::Zlib => read(&mut flate2::read::ZlibDecoder::new(&*data))?,
        CompressionType::Zstd => read(&mut zstd::stream::read::Decoder::new(&*data).ok()?)?,
        CompressionType::Snappy => snappy(&data, size)?,
    };
    (unfolded.len() == size as usize).then(|| unfolded.into())
}

/// Java writes a bare snappy block, the Rust crate the framed format.
fn snappy(data: &[u8], size: u32) -> Option<Vec<u8>> {
    const FRAMED: &[u8] = b"\xff\x06\x00\x00sNaPpY";
    if data.starts_with(FRAMED) {
        let mut unfolded = Vec::with_capacity(size as usize);
        snap::read::FrameDecoder::new(data).take(u64::from(size) + 1).read_to_end(&mut unfolded).ok()?;
        return Some(unfolded);
    }
    (snap::raw::decompress_len(data).ok()? == size as usize)
        .then(|| snap::raw::Decoder::new().decompress_vec(data).ok())
        .flatten()
}

impl Single {
    fn properties(&mut self, properties: &[Property], stamp: &mut Stamp) -> Result<(), Unreadable> {
        let text = |bytes| std::str::from_utf8(bytes).map_err(|_| Unreadable::Packing);
        for Property { name, value } in properties {
            match (text(name)?, text(value)?) {
                (ID, value) => self.id = value.parse().ok(),
                (TS, value) => self.ts = stamp.time(value),
                (name, value) => drop(self.headers.insert(name.to_owned(), value.to_owned())),
            }
        }
        Ok(())
    }

    fn message(self, published: Timestamp, derived: impl FnOnce() -> MessageId) -> Message {
        let id = self.id.unwrap_or_else(derived);
        let ts = self.ts.unwrap_or(published);
        // Bytes that are text are the key; others stay as they came, in base64.
        let key = match (self.key, self.key_is_base64) {
            (Some(key), true) => {
                let bytes = STANDARD.decode(&key).ok();
                Some(bytes.and_then(|bytes| String::from_utf8(bytes).ok()).unwrap_or(key))
            }
            (key, _) => key,
        };
        let event_time = self.event_time.filter(|time| *time > 0);
        let event_time = event_time.and_then(|time| i64::try_from(time).ok()).map(Timestamp::from_millis);
        let deliver_at = self.deliver_at.filter(|time| *time > 0).map(Timestamp::from_millis);
        let (payload, headers) = (self.payload, self.headers);
        Message { id: Some(id), ts, payload, key, headers, event_time, deliver_at }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use bytes::BytesMut;
    use pulsar::proto::SingleMessageMetadata;

    use super::*;
    use crate::message::Draft;

    fn topic() -> Topic {
        Topic::parse("orders.eu").unwrap()
    }

    fn entry(metadata: MessageMetadata, data: impl Into<Bytes>) -> Result<Entry, Broken> {
        let metadata = Metadata::decode(&*metadata.encode_to_vec()).unwrap();
        Ok(Entry { metadata, data: data.into() })
    }

    const FIRST: Place = Place { ledger: 3, entry: 7, index: 0 };

    fn all(entry: Result<Entry, Broken>) -> Vec<Record> {
        let mut records = Vec::new();
        unpack(&topic(), 2, FIRST, entry, |_| true, &mut records);
        records
    }

    #[test]
    fn our_message_comes_back_as_it_was_published() {
        let draft = Draft {
            payload: "{}".into(),
            key: Some("k".into()),
            headers: [("traceparent".to_owned(), "00-ab".to_owned())].into(),
            event_time: Some(Timestamp::from_millis(5)),
            ..Default::default()
        };
        let sent = draft.accept();
        let mut stamp = Stamp::default();
        let metadata = MessageMetadata { publish_time: 99, ..single(&sent, &mut stamp) };
        let back = all(entry(metadata, sent.payload.clone())).remove(0);
        assert_eq!(back.message.unwrap(), sent);
        assert_eq!((back.published.as_millis(), back.place.to_string()), (99, "3-7-0".into()));

        let bare = Draft::default().accept();
        let mut body = Vec::new();
        for message in [&sent, &bare, &sent] {
            put_member(message, &mut stamp, &mut body);
        }
        let metadata = MessageMetadata { num_messages_in_batch: Some(3), ..Default::default() };
        let back: Vec<_> =
            all(entry(metadata, body)).into_iter().map(|record| record.message.unwrap()).collect();
        assert_eq!(back, [sent.clone(), bare, sent]);
    }

    #[test]
    fn a_header_that_would_be_the_fabrics_is_refused_by_name() {
        let headers = [("twinspan-id".to_owned(), "x".to_owned())].into();
        let refused = check(&Draft { headers, ..Default::default() }.accept()).unwrap_err();
        assert!(
            matches!(&refused, LaneError::BadRequest(said) if said.contains("`twinspan-id`")),
            "{refused}"
        );
    }

    #[test]
    fn a_native_message_gets_the_id_of_its_place_and_its_publish_time() {
        let metadata = MessageMetadata { publish_time: 1000, ..Default::default() };
        let message = all(entry(metadata, "x")).remove(0).message.unwrap();
        assert_eq!(
            message.id,
            Some(MessageId::derived("orders.eu", 2, Place { ledger: 3, entry: 7, index: 0 }))
        );
        assert_eq!(message.ts, Timestamp::from_millis(1000));
        assert_eq!(message.event_time, None);
    }

    fn batch(payloads: &[&str]) -> (MessageMetadata, Bytes) {
        let mut data = BytesMut::new();
        for payload in payloads {
            let single = SingleMessageMetadata { payload_size: payload.len() as i32, ..Default::default() };
            data.put_u32(single.encoded_len() as u32);
            single.encode(&mut data).unwrap();
            data.put_slice(payload.as_bytes());
        }
        let metadata =
            MessageMetadata { num_messages_in_batch: Some(payloads.len() as i32), ..Default::default() };
        (metadata, data.freeze())
    }

    #[test]
    fn the_native_messages_of_a_batch_have_ids_of_their_own() {
        let (metadata, data) = batch(&["a", "b", "c"]);
        let ids = all(entry(metadata, data)).into_iter().map(|record| record.message.unwrap().id.unwrap());
        let first = MessageId::derived("orders.eu", 2, Place { ledger: 3, entry: 7, index: 0 });
        let ids: Vec<_> = ids.collect();
        assert_eq!(ids, [first, first.nth(1), first.nth(2)]);
        assert!(ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2]);
    }

    #[test]
    fn each_message_of_a_batch_has_its_index_and_only_the_wanted_ones_come() {
        let (metadata, data) = batch(&["a", "", "ccc"]);
        let mut records = Vec::new();
        unpack(&topic(), 0, FIRST, entry(metadata, data), |index| index != 1, &mut records);
        let read: Vec<_> = records
            .iter()
            .map(|record| (record.place.index, &*record.message.as_ref().unwrap().payload))
            .collect();
        assert_eq!(read, [(0, &b"a"[..]), (2, &b"ccc"[..])]);
    }

    #[test]
    fn every_compression_is_read_and_what_lies_about_its_size_is_not() {
        let plain = b"to be or not to be, to be or not to be".repeat(20);
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
        zlib.write_all(&plain).unwrap();
        let mut framed = snap::write::FrameEncoder::new(Vec::new());
        framed.write_all(&plain).unwrap();
        let folded = [
            (CompressionType::Lz4, fold(&plain, Compression::Lz4).unwrap().0.into()),
            (CompressionType::Zlib, zlib.finish().unwrap()),
            (CompressionType::Zstd, fold(&plain, Compression::Zstd).unwrap().0.into()),
            (CompressionType::Snappy, snap::raw::Encoder::new().compress_vec(&plain).unwrap()),
            (CompressionType::Snappy, framed.into_inner().unwrap()),
        ];
        for (kind, data) in folded {
            let metadata = |size: usize| MessageMetadata {
                compression: Some(kind as i32),
                uncompressed_size: Some(size as u32),
                ..Default::default()
            };
            let read = all(entry(metadata(plain.len()), data.clone())).remove(0).message.unwrap();
            assert_eq!(read.payload, plain, "{kind:?}");
            for lie in [plain.len() - 1, plain.len() + 1, 1 << 31] {
                let read = all(entry(metadata(lie), data.clone())).remove(0);
                assert_eq!(read.message.unwrap_err(), Unreadable::Packing, "{kind:?} {lie}");
            }
        }
    }

    #[test]
    fn what_cannot_be_read_is_one_record_that_says_why() {
        let broken = all(Err(Broken));
        assert_eq!(broken[0].message.as_ref().unwrap_err(), &Unreadable::Checksum);
        let chunk = MessageMetadata { num_chunks_from_msg: Some(2), ..Default::default() };
        assert_eq!(all(entry(chunk, "x"))[0].message.as_ref().unwrap_err(), &Unreadable::Chunk);
        let (metadata, data) = batch(&["a", "b"]);
        let cut = data.slice(..data.len() - 1);
        assert_eq!(all(entry(metadata, cut))[0].message.as_ref().unwrap_err(), &Unreadable::Packing);
    }
}
