//! What waits for one producer's turn on the wire, and the entries it becomes.
//!
//! ```text
//! push ──▶ batch of key a │ batch of key b │ batch without key │ … ──take──▶ sealed: an entry, and who waits for it
//! ```
//! Nothing is batched by a clock. A message is encoded into the open batch of its key as it comes; whatever a batch
//! holds when the wire has room goes out. Where the wire is idle that is one message, which then travels as a plain
//! one. A batch holds messages of one key, because a Key_Shared subscription delivers entries: one with several keys
//! would go to the member of one of them.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use pulsar::proto::MessageMetadata;
use tokio::time::Instant;

use super::frame;
use super::record::{self, Stamp};
use crate::lane::contract::LaneError;
use crate::lane::slot::{Slot, Waiting};
use crate::message::{Message, Place, Timestamp};
use crate::policy::table::Compression;

/// The broker hands a batch to one member of a group as a whole, so a large one leaves the others without work.
const BATCH_MESSAGES_MAX: usize = 100;
/// As Java's producers have it.
const BATCH_BYTES_MAX: usize = 128 << 10;
/// Where thousands are under way nobody is without work, and larger batches cost the broker less: up to so many times.
const BATCH_GROWTH_MAX: usize = 8;
/// So many batches of different keys do not become fewer by waiting.
const WAITING: usize = 8;
/// A body up to this is copied behind its head, so that many small entries are one write.
const JOINED_BYTES_MAX: usize = 4 << 10;

/// Until when somebody waits for a message's receipt, and what the message takes of the line's room.
#[derive(Debug, Clone, Copy)]
pub struct Ticket {
    pub deadline: Instant,
    pub bytes: u32,
}

/// Messages and bytes that no longer take room.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Freed {
    pub messages: usize,
    pub bytes: usize,
}

impl Freed {
    fn add(&mut self, ticket: &Ticket) {
        self.messages += 1;
        self.bytes += ticket.bytes as usize;
    }

    pub fn and(&mut self, other: Freed) {
        self.messages += other.messages;
        self.bytes += other.bytes;
    }
}

/// The batches that were not sent yet, in the order of their first messages. Bounded by the room in the line.
pub struct Queue {
    batches: VecDeque<Batch>,
    /// The number of the first batch; the others follow it.
    first: u64,
    /// The batch of each key that takes more, by its number.
    keyed: HashMap<String, u64>,
    keyless: Option<u64>,
    stamp: Stamp,
    /// How large the last batch became: the next will be like it.
    typical: usize,
    entry_bytes_max: usize,
}

struct Batch {
    key: Option<String>,
    /// The only message so far, not yet encoded: if none follows, it travels as a plain one.
    single: Option<Message>,
    /// Members, one behind another, from `begin` on; what stands before it was given up.
    body: Vec<u8>,
    begin: usize,
    /// What the messages take, the single one included.
    bytes: usize,
    /// Of those that wait, each with the end of its message in the body.
    tickets: VecDeque<(Ticket, u32)>,
    slot: Slot,
}

impl Queue {
    /// For a broker that takes entries up to this.
    pub fn new(entry_bytes_max: usize) -> Self {
        Self {
            batches: VecDeque::new(),
            first: 0,
            keyed: HashMap::new(),
            keyless: None,
            stamp: Stamp::default(),
            typical: 0,
            entry_bytes_max,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Whether the next batch gains nothing by waiting for more.
    pub fn is_ripe(&self, under_way: usize) -> bool {
        let (messages_max, bytes_max) = self.limits(under_way);
        self.batches.len() > WAITING
            || self.batches.front().is_some_and(|batch| !batch.fits(0, (messages_max, bytes_max / 2)))
    }

    /// How many messages and bytes a batch takes, where so many messages of this line have no receipt.
    fn limits(&self, under_way: usize) -> (usize, usize) {
        let growth = (under_way / (16 * BATCH_MESSAGES_MAX)).clamp(1, BATCH_GROWTH_MAX);
        (growth * BATCH_MESSAGES_MAX, (growth * BATCH_BYTES_MAX).min(self.entry_bytes_max))
    }

    pub fn push(&mut self, message: Message, ticket: Ticket, under_way: usize) -> Waiting {
        let limits = self.limits(under_way);
        // The broker delays whole entries.
        let alone = message.deliver_at.is_some();
        let open = match &message.key {
            Some(key) => self.keyed.get(key).copied(),
            None => self.keyless,
        };
        if let Some(number) = open.filter(|_| !alone)
            && let Some(batch) = self.batches.get_mut((number - self.first) as usize)
            && batch.fits(ticket.bytes as usize, limits)
        {
            return batch.push(message, ticket, &mut self.stamp, self.typical);
        }
        let number = self.first + self.batches.len() as u64;
        match (&message.key, alone) {
            // What follows it has to stay behind it, so it joins nothing from before it.
            (Some(key), true) => drop(self.keyed.remove(key)),
            (None, true) => self.keyless = None,
            (Some(key), false) => drop(self.keyed.insert(key.clone(), number)),
            (None, false) => self.keyless = Some(number),
        }
        let bytes = ticket.bytes as usize;
        let mut slot = Slot::default();
        let waiting = slot.add();
        self.batches.push_back(Batch {
            key: message.key.clone(),
            single: Some(message),
            body: Vec::new(),
            begin: 0,
            bytes,
            tickets: [(ticket, 0)].into(),
            slot,
        });
        waiting
    }

    /// The next entry. The numbers of its messages begin with `sequence`.
    pub fn take(&mut self, seal: &Seal<'_>, sequence: u64) -> Option<Sealed> {
        let batch = self.batches.pop_front()?;
        let number = self.first;
        self.first += 1;
        let open = match &batch.key {
            Some(key) => self.keyed.get(key).copied(),
            None => self.keyless,
        };
        if open == Some(number) {
            match &batch.key {
                Some(key) => drop(self.keyed.remove(key)),
                None => self.keyless = None,
            }
        }
        self.typical = batch.body.len();
        Some(batch.seal(seal, sequence, &mut self.stamp))
    }

    /// Gives up the messages whose time is over by `now`: they are not sent any more.
    pub fn expire(&mut self, now: Instant, why: impl Fn() -> LaneError) -> Freed {
        let mut freed = Freed::default();
        for batch in &mut self.batches {
            let mut late = 0;
            while let Some((ticket, end)) = batch.tickets.pop_front_if(|(ticket, _)| ticket.deadline <= now) {
                freed.add(&ticket);
                batch.bytes -= ticket.bytes as usize;
                batch.begin = end as usize;
                late += 1;
            }
            if late > 0 {
                batch.slot.refuse(late, why());
            }
        }
        if freed.messages > 0 {
            self.forget_empty();
        }
        freed
    }

    /// Gives up everything.
    pub fn fail(&mut self, why: &LaneError) -> Freed {
        let mut freed = Freed::default();
        self.keyed.clear();
        self.keyless = None;
        self.first += self.batches.len() as u64;
        for mut batch in self.batches.drain(..) {
            batch.tickets.iter().for_each(|(ticket, _)| freed.add(ticket));
            batch.slot.refuse_all(why.clone());
        }
        freed
    }

    /// Batches are found by their number, so those that stay get new ones.
    fn forget_empty(&mut self) {
        let was_first = self.first;
        self.first += self.batches.len() as u64;
        let mut renamed = HashMap::new();
        let batches = std::mem::take(&mut self.batches);
        for (batch, was) in batches.into_iter().zip(was_first..) {
            if !batch.tickets.is_empty() {
                renamed.insert(was, self.first + self.batches.len() as u64);
                self.batches.push_back(batch);
            }
        }
        self.keyless = self.keyless.and_then(|was| renamed.get(&was).copied());
        self.keyed.retain(|_, was| renamed.get(was).map(|number| *was = *number).is_some());
    }
}

impl Batch {
    fn fits(&self, bytes: usize, (messages_max, bytes_max): (usize, usize)) -> bool {
        self.tickets.len() < messages_max && self.bytes + bytes <= bytes_max
    }

    fn push(&mut self, message: Message, ticket: Ticket, stamp: &mut Stamp, typical: usize) -> Waiting {
        if let Some(first) = self.single.take() {
            self.body.reserve(typical);
            record::put_member(&first, stamp, &mut self.body);
            if let Some((_, end)) = self.tickets.back_mut() {
                *end = self.body.len() as u32;
            }
        }
        record::put_member(&message, stamp, &mut self.body);
        self.bytes += ticket.bytes as usize;
        self.tickets.push_back((ticket, self.body.len() as u32));
        self.slot.add()
    }

    fn seal(self, seal: &Seal<'_>, sequence: u64, stamp: &mut Stamp) -> Sealed {
        let messages = self.tickets.len() as u32;
        let highest = sequence + u64::from(messages.max(1)) - 1;
        let (metadata, body, batched) = match self.single {
            Some(message) => (record::single(&message, stamp), message.payload, false),
            None => {
                let metadata = MessageMetadata {
                    num_messages_in_batch: Some(messages as i32),
                    partition_key: self.key,
                    highest_sequence_id: Some(highest),
                    ..Default::default()
                };
                (metadata, Bytes::from(self.body).slice(self.begin..), true)
            }
        };
        let (compression, uncompressed_size, body) = match record::fold(&body, seal.compression) {
            Some((folded, kind)) => (Some(kind as i32), Some(body.len() as u32), folded),
            None => (None, None, body),
        };
        let metadata = MessageMetadata {
            compression,
            uncompressed_size,
            schema_version: seal.schema_version.map(<[u8]>::to_vec),
            producer_name: seal.producer_name.into(),
            sequence_id: sequence,
            publish_time: seal.now.as_millis().max(0) as u64,
            ..metadata
        };
        let send = frame::Send {
            producer_id: seal.producer_id,
            sequence,
            messages,
            highest: batched.then_some(highest),
            metadata: &metadata,
        };
        let mut head = frame::send(&send, &body);
        let frame = match body.len() <= JOINED_BYTES_MAX {
            true => {
                head.extend_from_slice(&body);
                [head.freeze(), Bytes::new()]
            }
            false => [head.freeze(), body],
        };
        Sealed {
            frame,
            sequence,
            highest,
            tickets: self.tickets,
            slot: self.slot,
            answered: 0,
            freed: Freed::default(),
            resent: false,
            outlived: false,
            published: seal.now,
        }
    }
}

/// What makes a batch an entry of its producer.
pub struct Seal<'a> {
    pub producer_id: u64,
    pub producer_name: &'a str,
    pub compression: Compression,
    /// Of the schema that the producer was made with.
    pub schema_version: Option<&'a [u8]>,
    pub now: Timestamp,
}

/// An entry that was sent, or may have been, and has no receipt: it is sent again as the very same bytes.
pub struct Sealed {
    /// The body is by itself where it is large.
    pub frame: [Bytes; 2],
    pub sequence: u64,
    pub highest: u64,
    pub published: Timestamp,
    tickets: VecDeque<(Ticket, u32)>,
    slot: Slot,
    /// How many of its messages were answered already, because their time was over.
    answered: u32,
    freed: Freed,
    /// It may have been stored by an earlier attachment.
    pub resent: bool,
    /// The lane went down meanwhile.
    pub outlived: bool,
}

impl Sealed {
    /// When whoever waits first has waited long enough.
    pub fn deadline(&self) -> Option<Instant> {
        self.tickets.front().map(|(ticket, _)| ticket.deadline)
    }

    /// Nobody waits for it any more.
    pub fn is_answered(&self) -> bool {
        self.tickets.is_empty()
    }

    /// Answers whoever has waited too long.
    pub fn expire(&mut self, now: Instant, why: impl Fn() -> LaneError) {
        let mut late = 0;
        while let Some((ticket, _)) = self.tickets.pop_front_if(|(ticket, _)| ticket.deadline <= now) {
            self.freed.add(&ticket);
            late += 1;
        }
        if late > 0 {
            self.answered += late;
            self.slot.refuse(late, why());
        }
    }

    /// What it took of the line's room is free once it is gone.
    pub fn fail(mut self, why: &LaneError) -> Freed {
        self.slot.refuse_all(why.clone());
        self.freed()
    }

    /// The broker stored it there.
    pub fn confirm(self, place: Place) -> Freed {
        let freed = self.freed();
        self.slot.confirm(Place { index: self.answered, ..place });
        freed
    }

    fn freed(&self) -> Freed {
        let mut freed = self.freed;
        self.tickets.iter().for_each(|(ticket, _)| freed.add(ticket));
        freed
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::message::Draft;

    const FIRST: Place = Place { ledger: 1, entry: 1, index: 0 };

    struct Bed {
        queue: Queue,
        receipts: Vec<Waiting>,
        sequence: u64,
    }

    impl Bed {
        fn new() -> Self {
            Self { queue: Queue::new(BATCH_BYTES_MAX), receipts: Vec::new(), sequence: 0 }
        }

        fn push(&mut self, key: &str, payload: &str, deadline: Instant) {
            let key = (!key.is_empty()).then(|| key.to_owned());
            let message = Draft { key, payload: payload.to_owned().into(), ..Default::default() }.accept();
            let bytes = record::size(&message) as u32;
            self.receipts.push(self.queue.push(message, Ticket { deadline, bytes }, 0));
        }

        /// The next entry, and what is in it.
        fn take(&mut self) -> Option<(Sealed, String)> {
            let seal = Seal {
                producer_id: 1,
                producer_name: "p",
                compression: Compression::None,
                schema_version: None,
                now: Timestamp::now(),
            };
            let sealed = self.queue.take(&seal, self.sequence)?;
            assert_eq!(sealed.sequence, self.sequence);
            self.sequence = sealed.highest + 1;
            // As a broker passes it on: behind another command.
            let whole = sealed.frame.concat();
            let size = u32::from_be_bytes(whole[4..8].try_into().unwrap()) as usize;
            let message = pulsar::proto::BaseCommand {
                r#type: pulsar::proto::base_command::Type::Message as i32,
                message: Some(Default::default()),
                ..Default::default()
            };
            let mut bytes = bytes::BytesMut::from(&frame::encode(&message)[..]);
            bytes.extend_from_slice(&whole[8 + size..]);
            let total = bytes.len() as u32 - 4;
            bytes[..4].copy_from_slice(&total.to_be_bytes());
            let Some(frame::Frame::Message(_, entry)) = frame::decode(&mut bytes).unwrap() else { panic!() };
            let entry = entry.open();
            let metadata = entry.as_ref().unwrap().metadata.clone();
            let topic = crate::topic::Topic::parse("t").unwrap();
            let mut records = Vec::new();
            record::unpack(&topic, 0, FIRST, entry, |_| true, &mut records);
            let mut said = metadata.partition_key.unwrap_or_default();
            said += if metadata.num_messages_in_batch.is_some() { "*" } else { ":" };
            for record in records {
                said += std::str::from_utf8(&record.message.unwrap().payload).unwrap();
            }
            Some((sealed, said))
        }

        fn entries(&mut self) -> Vec<String> {
            std::iter::from_fn(|| self.take()).map(|(_, said)| said).collect()
        }
    }

    fn later() -> Instant {
        Instant::now() + std::time::Duration::from_secs(60)
    }

    #[tokio::test]
    async fn an_entry_holds_one_key_and_one_message_alone_is_a_plain_one() {
        let mut bed = Bed::new();
        for (key, payload) in [("a", "1"), ("b", "2"), ("", "3"), ("a", "4"), ("", "5"), ("c", "6")] {
            bed.push(key, payload, later());
        }
        assert_eq!(bed.entries(), ["a*14", "b:2", "*35", "c:6"]);
        bed.push("a", "7", later());
        assert_eq!(bed.entries(), ["a:7"], "what was taken is closed");
        assert_eq!(bed.sequence, 7);
    }

    #[tokio::test]
    async fn a_batch_has_its_limits_and_the_order_of_a_key_is_kept_over_them() {
        let mut bed = Bed::new();
        for n in 0..BATCH_MESSAGES_MAX + 1 {
            bed.push("a", if n < BATCH_MESSAGES_MAX { "" } else { "last" }, later());
        }
        assert_eq!(bed.entries(), ["a*", "a:last"]);
        let large = "x".repeat(BATCH_BYTES_MAX / 2);
        for payload in [&*large, "1", &*large, "2"] {
            bed.push("", payload, later());
        }
        assert_eq!(bed.entries(), [format!("*{large}1"), format!("*{large}2")]);
    }

    #[tokio::test]
    async fn what_is_given_up_is_not_sent_and_the_others_are_stored_where_they_are() {
        let mut bed = Bed::new();
        let now = Instant::now();
        for (key, payload, deadline) in
            [("a", "1", now), ("b", "2", now), ("", "3", now), ("", "4", later()), ("", "5", later())]
        {
            bed.push(key, payload, deadline);
        }
        let freed = bed.queue.expire(now, || LaneError::Unavailable("late".into()));
        assert_eq!(freed.messages, 3);
        bed.push("a", "6", later());
        bed.push("", "7", later());
        let (sealed, said) = bed.take().unwrap();
        assert_eq!(said, "*457");
        let (under_way, said) = bed.take().unwrap();
        assert_eq!(said, "a:6");
        assert_eq!(bed.entries(), [""; 0]);
        let place = Place { ledger: 1, entry: 2, index: 0 };
        assert_eq!(sealed.confirm(place).messages, 3);
        let mut answers = bed.receipts.iter_mut().map(|receipt| receipt.now_or_never());
        for _ in 0..3 {
            assert!(matches!(answers.next().unwrap(), Some(Err(LaneError::Unavailable(_)))));
        }
        let index =
            |stored: Option<Option<Result<Place, LaneError>>>| stored.unwrap().unwrap().unwrap().index;
        assert_eq!((index(answers.next()), index(answers.next())), (0, 1));
        assert!(answers.next().unwrap().is_none(), "`6` has no receipt yet");
        assert_eq!(index(answers.next()), 2);
        drop(under_way);
        let dropped = (&mut bed.receipts[5]).now_or_never().unwrap();
        assert!(matches!(dropped, Err(LaneError::OutcomeUnknown(_))), "nobody waits for what is gone");
    }

    #[tokio::test]
    async fn what_fails_takes_no_room_and_everybody_is_told() {
        let mut bed = Bed::new();
        let now = Instant::now();
        for (key, payload, deadline) in [("", "1", now), ("", "2", later()), ("", "3", later())] {
            bed.push(key, payload, deadline);
        }
        let (mut sealed, _) = bed.take().unwrap();
        sealed.expire(now, || LaneError::OutcomeUnknown("late".into()));
        bed.push("a", "4", later());
        bed.push("b", "5", later());
        assert_eq!(bed.queue.fail(&LaneError::Unavailable("failed".into())).messages, 2);
        assert!(bed.queue.is_empty());
        assert_eq!(sealed.fail(&LaneError::Internal("failed".into())).messages, 3);
        let answers: Vec<_> =
            bed.receipts.iter_mut().map(|receipt| receipt.now_or_never().unwrap().unwrap_err()).collect();
        assert!(matches!(
            answers[..],
            [
                LaneError::OutcomeUnknown(_),
                LaneError::Internal(_),
                LaneError::Internal(_),
                LaneError::Unavailable(_),
                LaneError::Unavailable(_)
            ]
        ));
    }

    #[tokio::test]
    async fn who_was_answered_in_time_keeps_its_place_in_the_entry() {
        let mut bed = Bed::new();
        let now = Instant::now();
        bed.push("", "1", now);
        bed.push("", "2", later());
        let (mut sealed, _) = bed.take().unwrap();
        sealed.expire(now, || LaneError::OutcomeUnknown("late".into()));
        assert!(!sealed.is_answered());
        assert_eq!(sealed.confirm(Place { ledger: 1, entry: 2, index: 0 }).messages, 2);
        let mut answers = bed.receipts.iter_mut().map(|receipt| receipt.now_or_never().unwrap());
        assert!(matches!(answers.next().unwrap(), Err(LaneError::OutcomeUnknown(_))));
        assert_eq!(answers.next().unwrap().unwrap().index, 1);
    }
}
