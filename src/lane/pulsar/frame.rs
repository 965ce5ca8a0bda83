//! Pulsar's frames: a command, and behind some commands an entry.
//!
//! ```text
//! │ total: u32 │ size: u32 │ command │                                              a command
//! │ total: u32 │ size: u32 │ command │ 0e01 │ crc32c │ size: u32 │ metadata │ data │   a command with an entry
//! ```
//! The crate's own codec ends the connection over an entry whose checksum is wrong, which the broker then sends
//! again, for ever, to everybody who reads on that connection. Here it is that entry's own error.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{encode_varint, encoded_len_varint};
use pulsar::proto::base_command::Type;
use pulsar::proto::{BaseCommand, CommandSendReceipt, CompressionType, MessageMetadata};

use super::newer::{self, NewerCommand};

/// Far above what a broker is set to send (5 MiB by default); what claims more is no frame.
const FRAME_BYTES_MAX: usize = 128 << 20;
const CHECKSUM_FOLLOWS: u16 = 0x0e01;
/// Every command begins with its type.
const TYPE_FIELD: u8 = 1 << 3;

// It is taken apart where it is made, so nothing is gained by a box for each message.
#[allow(clippy::large_enum_variant)]
#[derive(Debug)]
pub enum Frame {
    Receipt(CommandSendReceipt),
    Message(Delivered, Packed),
    Newer(NewerCommand),
    Other(Box<BaseCommand>),
}

/// The two commands that come once for every message, read without the 4,400 bytes of a `BaseCommand`.
#[derive(Clone, PartialEq, prost::Message)]
struct Hot {
    #[prost(message, optional, tag = "7")]
    receipt: Option<CommandSendReceipt>,
    #[prost(message, optional, tag = "9")]
    message: Option<Delivered>,
}

/// A `CommandMessage` as far as it is of use, in a third of the bytes.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Delivered {
    #[prost(uint64, required, tag = "1")]
    pub consumer_id: u64,
    #[prost(message, required, tag = "2")]
    pub id: EntryId,
    #[prost(uint32, optional, tag = "3")]
    pub redelivery_count: Option<u32>,
    #[prost(int64, repeated, packed = "false", tag = "4")]
    pub ack_set: Vec<i64>,
}

#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct EntryId {
    #[prost(uint64, required, tag = "1")]
    pub ledger: u64,
    #[prost(uint64, required, tag = "2")]
    pub entry: u64,
}

/// An entry as it came: whoever opens it learns whether it is whole.
#[derive(Debug, Clone)]
pub struct Packed(Bytes);

/// What one publish of one producer stored: a message, or a batch of them.
#[derive(Debug, Clone)]
pub struct Entry {
    pub metadata: Metadata,
    pub data: Bytes,
}

/// A `MessageMetadata` as far as it is of use to who reads: the crate's own is twice as large, and copies every text.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Metadata {
    #[prost(bytes = "bytes", required, tag = "1")]
    pub producer_name: Bytes,
    #[prost(uint64, required, tag = "2")]
    pub sequence_id: u64,
    #[prost(uint64, required, tag = "3")]
    pub publish_time: u64,
    #[prost(message, repeated, tag = "4")]
    pub properties: Vec<Property>,
    #[prost(string, optional, tag = "6")]
    pub partition_key: Option<String>,
    #[prost(enumeration = "CompressionType", optional, tag = "8")]
    pub compression: Option<i32>,
    #[prost(uint32, optional, tag = "9")]
    pub uncompressed_size: Option<u32>,
    #[prost(int32, optional, tag = "11")]
    pub num_messages_in_batch: Option<i32>,
    #[prost(uint64, optional, tag = "12")]
    pub event_time: Option<u64>,
    #[prost(bytes = "bytes", repeated, tag = "13")]
    pub encryption_keys: Vec<Bytes>,
    #[prost(bool, optional, tag = "17")]
    pub partition_key_b64_encoded: Option<bool>,
    #[prost(int64, optional, tag = "19")]
    pub deliver_at_time: Option<i64>,
    #[prost(int32, optional, tag = "27")]
    pub num_chunks_from_msg: Option<i32>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Property {
    #[prost(bytes = "bytes", required, tag = "1")]
    pub name: Bytes,
    #[prost(bytes = "bytes", required, tag = "2")]
    pub value: Bytes,
}

/// The entry is not what its producer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// The bytes are no frame: nothing that follows them can be read either.
#[derive(Debug, thiserror::Error)]
#[error("the broker sent what is not a Pulsar frame ({0})")]
pub struct NotAFrame(&'static str);

pub fn encode(command: &impl prost::Message) -> Bytes {
    let size = command.encoded_len();
    let mut frame = BytesMut::with_capacity(size + 8);
    frame.put_u32(size as u32 + 4);
    frame.put_u32(size as u32);
    // Fails only where room is lacking, and it has just been made.
    let _ = command.encode(&mut frame);
    frame.freeze()
}

/// Takes the next whole frame; `None` until it is whole.
pub fn decode(from: &mut BytesMut) -> Result<Option<Frame>, NotAFrame> {
    let Some(total) = from.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes) as usize) else {
        return Ok(None);
    };
    if !(4..=FRAME_BYTES_MAX).contains(&total) {
        return Err(NotAFrame("its length is impossible"));
    }
    if from.len() < total + 4 {
        from.reserve(total + 4 - from.len());
        return Ok(None);
    }
    let mut frame = from.split_to(total + 4).freeze();
    frame.advance(4);
    let size = frame.get_u32() as usize;
    if size > frame.len() {
        return Err(NotAFrame("its command is longer than the frame"));
    }
    let (command, _) = frame.split_at(size);
    const UNREADABLE: NotAFrame = NotAFrame("its command is unreadable");
    // The type is the first field, and every type is less than a byte.
    let kind = command.get(1).filter(|_| command.first() == Some(&TYPE_FIELD)).copied();
    if kind.is_some_and(|kind| [Type::SendReceipt as u8, Type::Message as u8].contains(&kind)) {
        match Hot::decode(command).map_err(|_| UNREADABLE)? {
            Hot { receipt: Some(receipt), .. } => return Ok(Some(Frame::Receipt(receipt))),
            Hot { message: Some(message), .. } => {
                frame.advance(size);
                return Ok(Some(Frame::Message(message, Packed(frame))));
            }
            _ => return Err(UNREADABLE),
        }
    }
    if kind.is_some_and(newer::is_newer) {
        return Ok(Some(Frame::Newer(NewerCommand::decode(command).map_err(|_| UNREADABLE)?)));
    }
    let command = BaseCommand::decode(command).map_err(|_| UNREADABLE)?;
    Ok(Some(Frame::Other(Box::new(command))))
}

/// What a SEND says besides its entry.
pub struct Send<'a> {
    pub producer_id: u64,
    pub sequence: u64,
    pub messages: u32,
    /// Of a batch, the number of its last message.
    pub highest: Option<u64>,
    pub metadata: &'a MessageMetadata,
}

/// Everything of a SEND that stands before the body. The checksum is the processor's own, where the crate's codec
/// reckons it in software and copies everything twice.
pub fn send(send: &Send<'_>, body: &[u8]) -> BytesMut {
    let fields = [
        (1, Some(send.producer_id)),
        (2, Some(send.sequence)),
        (3, Some(u64::from(send.messages))),
        (6, send.highest),
    ];
    let fields = fields.into_iter().filter_map(|(tag, value)| Some((tag, value?)));
    let fields_len: usize = fields.clone().map(|(_, value)| 1 + encoded_len_varint(value)).sum();
    let command = 2 + 1 + encoded_len_varint(fields_len as u64) + fields_len;
    let metadata = send.metadata.encoded_len();
    let mut head = BytesMut::with_capacity(8 + command + 10 + metadata);
    head.put_u32((4 + command + 10 + metadata + body.len()) as u32);
    head.put_u32(command as u32);
    head.put_slice(&[TYPE_FIELD, Type::Send as u8, 6 << 3 | 2]);
    encode_varint(fields_len as u64, &mut head);
    for (tag, value) in fields {
        head.put_u8(tag << 3);
        encode_varint(value, &mut head);
    }
    head.put_u16(CHECKSUM_FOLLOWS);
    let checksum = head.len();
    head.put_u32(0);
    head.put_u32(metadata as u32);
    // Fails only where room is lacking, and it is there.
    let _ = send.metadata.encode(&mut head);
    let sum = crc32c::crc32c_append(crc32c::crc32c(&head[checksum + 4..]), body);
    head[checksum..checksum + 4].copy_from_slice(&sum.to_be_bytes());
    head
}

impl Packed {
    pub fn open(self) -> Result<Entry, Broken> {
        self.whole().ok_or(Broken)
    }

    fn whole(self) -> Option<Entry> {
        let Self(mut bytes) = self;
        // A producer may leave the checksum out; then the metadata's size comes at once.
        if bytes.first_chunk::<2>().map(|magic| u16::from_be_bytes(*magic)) == Some(CHECKSUM_FOLLOWS) {
            bytes.advance(2);
            let checksum = bytes.try_get_u32().ok()?;
            if crc32c::crc32c(&bytes) != checksum {
                return None;
            }
        }
        let size = bytes.try_get_u32().ok()? as usize;
        if size > bytes.len() {
            return None;
        }
        let metadata = Metadata::decode(bytes.split_to(size)).ok()?;
        Some(Entry { metadata, data: bytes })
    }
}

#[cfg(test)]
mod tests {
    use pulsar::proto::{CommandMessage, CommandPing, MessageIdData};

    use super::*;

    fn ping() -> BaseCommand {
        BaseCommand { r#type: Type::Ping as i32, ping: Some(CommandPing {}), ..Default::default() }
    }

    /// An entry as a broker delivers it: what a producer sent behind another command.
    fn with_entry(data: &[u8]) -> BytesMut {
        let metadata = MessageMetadata { producer_name: "p".into(), ..Default::default() };
        let sending =
            Send { producer_id: 1, sequence: 2, messages: 3, highest: Some(4), metadata: &metadata };
        let mut sent = send(&sending, data);
        sent.put_slice(data);
        let total = u32::from_be_bytes(sent[..4].try_into().unwrap());
        assert_eq!(total as usize, sent.len() - 4);
        let size = u32::from_be_bytes(sent[4..8].try_into().unwrap()) as usize;
        let command = BaseCommand::decode(&sent[8..8 + size]).unwrap();
        assert_eq!(command.r#type, Type::Send as i32);
        let command = command.send.unwrap();
        assert_eq!(
            (command.producer_id, command.sequence_id, command.num_messages, command.highest_sequence_id),
            (1, 2, Some(3), Some(4))
        );
        let message = CommandMessage { consumer_id: 9, ..Default::default() };
        let message =
            BaseCommand { r#type: Type::Message as i32, message: Some(message), ..Default::default() };
        let mut frame = BytesMut::from(&encode(&message)[..]);
        frame.put_slice(&sent[8 + size..]);
        let total = frame.len() as u32 - 4;
        frame[..4].copy_from_slice(&total.to_be_bytes());
        frame
    }

    fn entry_of(frame: Frame) -> Result<Entry, Broken> {
        match frame {
            Frame::Message(message, entry) if message.consumer_id == 9 => entry.open(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_frame_is_taken_once_it_is_whole_and_what_follows_stays() {
        let whole = with_entry(b"data");
        for cut in 0..whole.len() {
            assert!(decode(&mut BytesMut::from(&whole[..cut])).unwrap().is_none(), "{cut}");
        }
        let mut two = whole.clone();
        two.put_slice(&encode(&ping()));
        let first = decode(&mut two).unwrap().unwrap();
        assert_eq!(entry_of(first).unwrap().data, "data");
        assert!(
            matches!(decode(&mut two).unwrap().unwrap(), Frame::Other(command) if command.ping.is_some())
        );
        assert!(two.is_empty());
    }

    #[test]
    fn a_receipt_is_read_by_itself() {
        let receipt = CommandSendReceipt {
            producer_id: 3,
            sequence_id: 4,
            message_id: Some(MessageIdData { ledger_id: 5, entry_id: 6, ..Default::default() }),
            highest_sequence_id: Some(7),
        };
        let command = BaseCommand {
            r#type: Type::SendReceipt as i32,
            send_receipt: Some(receipt.clone()),
            ..Default::default()
        };
        let mut bytes = BytesMut::from(&encode(&command)[..]);
        assert!(matches!(decode(&mut bytes).unwrap().unwrap(), Frame::Receipt(read) if read == receipt));
    }

    #[test]
    fn a_flipped_bit_breaks_its_entry_and_nothing_else() {
        let mut bytes = with_entry(b"data");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        bytes.put_slice(&encode(&ping()));
        assert_eq!(entry_of(decode(&mut bytes).unwrap().unwrap()).unwrap_err(), Broken);
        assert!(decode(&mut bytes).unwrap().is_some());
    }

    #[test]
    fn what_is_no_frame_is_told_at_once() {
        for bad in [&[0, 0, 0, 1][..], &[255; 8], &[0, 0, 0, 4, 0, 0, 0, 9]] {
            assert!(decode(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
    }
}
