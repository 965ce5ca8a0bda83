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
use pulsar::proto::{BaseCommand, MessageMetadata};

/// Far above what a broker is set to send (5 MiB by default); what claims more is no frame.
const FRAME_BYTES_MAX: usize = 128 << 20;
const CHECKSUM_FOLLOWS: u16 = 0x0e01;

#[derive(Debug)]
pub struct Frame {
    pub command: BaseCommand,
    pub entry: Option<Result<Entry, Broken>>,
}

/// What one publish of one producer stored: a message, or a batch of them.
#[derive(Debug, Clone)]
pub struct Entry {
    pub metadata: MessageMetadata,
    pub data: Bytes,
}

/// The entry is not what its producer sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// The bytes are no frame: nothing that follows them can be read either.
#[derive(Debug, thiserror::Error)]
#[error("the broker sent what is not a Pulsar frame ({0})")]
pub struct NotAFrame(&'static str);

pub fn encode(command: &BaseCommand, into: &mut BytesMut) {
    let size = command.encoded_len();
    into.reserve(size + 8);
    into.put_u32(size as u32 + 4);
    into.put_u32(size as u32);
    // Fails only where room is lacking, and it has just been made.
    let _ = command.encode(into);
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
    let command =
        BaseCommand::decode(frame.split_to(size)).map_err(|_| NotAFrame("its command is unreadable"))?;
    let entry = (!frame.is_empty()).then(|| entry(frame).ok_or(Broken));
    Ok(Some(Frame { command, entry }))
}

fn entry(mut bytes: Bytes) -> Option<Entry> {
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
    let metadata = MessageMetadata::decode(bytes.split_to(size)).ok()?;
    Some(Entry { metadata, data: bytes })
}

#[cfg(test)]
mod tests {
    use pulsar::proto::{CommandPing, base_command::Type};

    use super::*;

    fn ping() -> BaseCommand {
        BaseCommand { r#type: Type::Ping as i32, ping: Some(CommandPing {}), ..Default::default() }
    }

    fn with_entry(data: &[u8]) -> BytesMut {
        let metadata = MessageMetadata { producer_name: "p".into(), ..Default::default() }.encode_to_vec();
        let mut guarded = BytesMut::new();
        guarded.put_u32(metadata.len() as u32);
        guarded.put_slice(&metadata);
        guarded.put_slice(data);
        let mut frame = BytesMut::new();
        encode(&ping(), &mut frame);
        frame.put_u16(CHECKSUM_FOLLOWS);
        frame.put_u32(crc32c::crc32c(&guarded));
        frame.put_slice(&guarded);
        let total = frame.len() as u32 - 4;
        frame[..4].copy_from_slice(&total.to_be_bytes());
        frame
    }

    #[test]
    fn a_frame_is_taken_once_it_is_whole_and_what_follows_stays() {
        let whole = with_entry(b"data");
        for cut in 0..whole.len() {
            assert!(decode(&mut BytesMut::from(&whole[..cut])).unwrap().is_none(), "{cut}");
        }
        let mut two = whole.clone();
        encode(&ping(), &mut two);
        let first = decode(&mut two).unwrap().unwrap();
        assert_eq!(first.entry.unwrap().unwrap().data, "data");
        assert!(decode(&mut two).unwrap().unwrap().entry.is_none());
        assert!(two.is_empty());
    }

    #[test]
    fn a_flipped_bit_breaks_its_entry_and_nothing_else() {
        let mut bytes = with_entry(b"data");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        encode(&ping(), &mut bytes);
        assert_eq!(decode(&mut bytes).unwrap().unwrap().entry.unwrap().unwrap_err(), Broken);
        assert!(decode(&mut bytes).unwrap().is_some());
    }

    #[test]
    fn what_is_no_frame_is_told_at_once() {
        for bad in [&[0, 0, 0, 1][..], &[255; 8], &[0, 0, 0, 4, 0, 0, 0, 9]] {
            assert!(decode(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
    }
}
