//! What waits for the durable lane on this bridge's own disk: a log like the embedded lane's, which keeps a topic's
//! messages until they are removed.
//!
//! It is opened when some route spools, or when an earlier bridge left one. A message that the lane refused for good
//! and that has no dead letter to go to is kept in it as well, aside.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::OnceCell;

use crate::lane::contract::{DurableLane, LaneError, Publisher, Reader, Receipt};
use crate::lane::journal::{Journal, JournalError};
use crate::message::{Envelope, Message, Place, Start, Timestamp};
use crate::policy::Policy;
use crate::policy::table::{Route, RouteTable};
use crate::telemetry::metrics::Metrics;
use crate::topic::Topic;

const DIRECTORY: &str = "spool";
/// Who published it, and whether it was sent before. No client can send headers that begin as this one does.
const SPOOLED: &str = "twinspan-spool";
const SENT: &str = "sent";
/// Of what was set aside: why.
const REASON: &str = "twinspan-spool-reason";
/// Where that is, in a log of its own.
const ASIDE: &str = "aside";
/// What a record takes beyond its fields, and never less.
const RECORD_BYTES: u64 = 96;

pub struct Spool {
    dir: PathBuf,
    /// Live bytes; what would be beyond is refused.
    max: u64,
    timeout: Duration,
    metrics: Arc<Metrics>,
    log: OnceCell<Arc<Journal>>,
    aside: OnceCell<Arc<Journal>>,
    /// Bytes on their way to the disk.
    under_way: Arc<AtomicU64>,
}

/// A message as it is in the spool.
#[derive(Clone)]
pub struct Spooled {
    pub message: Message,
    pub publisher: Publisher,
    /// It was under way to the lane when that broke: it may be stored.
    pub sent: bool,
}

/// What the spool holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Holds {
    pub messages: u64,
    pub bytes: u64,
    pub topics: u64,
    pub oldest: Option<Timestamp>,
    pub set_aside: u64,
}

impl Spool {
    pub fn new(data_dir: &Path, max: u64, timeout: Duration, metrics: Arc<Metrics>) -> Self {
        let dir = data_dir.join(DIRECTORY);
        Self {
            dir,
            max,
            timeout,
            metrics,
            log: OnceCell::new(),
            aside: OnceCell::new(),
            under_way: Arc::default(),
        }
    }

    /// Whether an earlier bridge left one.
    pub fn is_there(&self) -> bool {
        self.dir.exists()
    }

    /// The log, opened by the first who needs it.
    pub async fn open(&self) -> Result<&Arc<Journal>, JournalError> {
        let opening = self.log.get_or_try_init(async || {
            let log = self.open_log(self.dir.clone()).await?;
            let aside = self.dir.join(ASIDE);
            if aside.exists() {
                self.aside.get_or_try_init(|| self.open_log(aside)).await?;
            }
            Ok(log)
        });
        opening.await
    }

    async fn open_log(&self, dir: PathBuf) -> Result<Arc<Journal>, JournalError> {
        let (timeout, metrics) = (self.timeout, self.metrics.clone());
        let no_routes = Policy::new(RouteTable::default());
        // It reads the disk.
        tokio::task::spawn_blocking(move || Journal::open(&dir, no_routes, timeout, metrics))
            .await
            .map_err(|error| JournalError::Thread(std::io::Error::other(error)))?
    }

    /// Writes a message behind the others of its topic. The receipt is ready once it is on disk.
    pub async fn put(&self, topic: &Topic, spooled: Spooled) -> Result<Receipt, LaneError> {
        let log = self.opened()?;
        let message = spooled.sealed();
        let bytes = size(&message);
        let under_way = UnderWay::new(self.under_way.clone(), bytes);
        let live = self.live_bytes(log).saturating_add(self.under_way.load(Ordering::Acquire));
        if live > self.max {
            return Err(LaneError::StorageFull(format!(
                "the durable lane does not take it now, and the spool holds its {} bytes",
                self.max
            )));
        }
        let receipt = log.keep(topic, message).await?;
        Ok(Receipt::of(async move {
            let _under_way = under_way;
            receipt.await
        }))
    }

    /// Keeps what can go nowhere. It was in the spool already, so there is room for it.
    pub async fn set_aside(&self, topic: &Topic, spooled: Spooled, why: &LaneError) -> Result<(), LaneError> {
        let aside = self.aside.get_or_try_init(|| self.open_log(self.dir.join(ASIDE))).await;
        let aside = aside.map_err(|error| LaneError::Unavailable(error.to_string()))?;
        let mut message = spooled.sealed();
        message.headers.insert(REASON.into(), why.to_string());
        aside.keep(topic, message).await?.await?;
        Ok(())
    }

    pub fn holds_any_of(&self, topic: &Topic) -> bool {
        self.messages_of(topic) > 0
    }

    pub fn messages_of(&self, topic: &Topic) -> u64 {
        self.log.get().map_or(0, |log| log.holding(topic).messages)
    }

    /// Reads a topic from its oldest message on.
    pub async fn read(&self, route: &Arc<Route>, topic: &Topic) -> Result<Box<dyn Reader>, LaneError> {
        self.opened()?.read(route, topic, Start::Earliest).await
    }

    /// Where the newest message of a topic is.
    pub fn newest_of(&self, topic: &Topic) -> Option<Place> {
        self.log.get().and_then(|log| log.holding(topic).newest)
    }

    pub async fn remove(&self, topic: &Topic, through: Place) -> Result<(), LaneError> {
        self.opened()?.remove(topic, through).await
    }

    pub fn topics(&self) -> Vec<Topic> {
        let holdings = self.log.get().map(|log| log.holdings()).unwrap_or_default();
        holdings.into_iter().map(|holding| holding.topic).collect()
    }

    /// `None` where it was never opened.
    pub fn holds(&self) -> Option<Holds> {
        let log = self.log.get()?;
        let mut holds = Holds { bytes: self.live_bytes(log), ..Holds::default() };
        for holding in log.holdings() {
            holds.messages += holding.messages;
            holds.topics += 1;
            holds.oldest = [holds.oldest, holding.oldest].into_iter().flatten().min();
        }
        if let Some(aside) = self.aside.get() {
            holds.set_aside = aside.holdings().iter().map(|holding| holding.messages).sum();
        }
        Some(holds)
    }

    /// What is set aside takes its part of the room.
    fn live_bytes(&self, log: &Journal) -> u64 {
        log.live_bytes() + self.aside.get().map_or(0, |aside| aside.live_bytes())
    }

    pub async fn close(&self) {
        for log in [&self.log, &self.aside].into_iter().filter_map(OnceCell::get) {
            log.close().await;
        }
    }

    fn opened(&self) -> Result<&Arc<Journal>, LaneError> {
        self.log.get().ok_or_else(|| LaneError::Unavailable("the spool is not open".into()))
    }
}

impl Spooled {
    fn sealed(self) -> Message {
        let Self { mut message, publisher, sent } = self;
        let sent = if sent { SENT } else { "" };
        message.headers.insert(SPOOLED.into(), format!("{} {sent}", publisher.0));
        message
    }

    pub fn open(envelope: &Envelope) -> Self {
        let mut message = envelope.message.clone();
        let note = message.headers.remove(SPOOLED).unwrap_or_default();
        let (publisher, sent) = note.split_once(' ').unwrap_or_default();
        Self { message, publisher: Publisher(publisher.parse().unwrap_or_default()), sent: sent == SENT }
    }
}

/// At least what the record of a message takes.
fn size(message: &Message) -> u64 {
    let headers: usize = message.headers.iter().map(|(name, value)| name.len() + value.len() + 4).sum();
    (message.payload.len() + headers + message.key.as_ref().map_or(0, String::len)) as u64 + RECORD_BYTES
}

/// Bytes that are counted until they are on disk, or not coming.
struct UnderWay {
    all: Arc<AtomicU64>,
    bytes: u64,
}

impl UnderWay {
    fn new(all: Arc<AtomicU64>, bytes: u64) -> Self {
        all.fetch_add(bytes, Ordering::AcqRel);
        Self { all, bytes }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.all.fetch_sub(self.bytes, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Draft, Position, Stored};

    #[test]
    fn a_message_comes_out_of_the_spool_as_it_went_in() {
        let headers = [("a".to_owned(), "b".to_owned())].into();
        let message = Draft { headers, payload: "x".into(), ..Draft::default() }.accept();
        for sent in [false, true] {
            let spooled = Spooled { message: message.clone(), publisher: Publisher(u64::MAX), sent };
            let place = Place { ledger: 1, entry: 1, index: 0 };
            let stored = Stored { partition: 0, place, position: Position::Whole(place) };
            let sealed = spooled.sealed();
            let open = Spooled::open(&Envelope::durable(Topic::parse("t").unwrap(), sealed, stored));
            assert_eq!(
                (open.message, open.publisher, open.sent),
                (message.clone(), Publisher(u64::MAX), sent)
            );
        }
    }
}
