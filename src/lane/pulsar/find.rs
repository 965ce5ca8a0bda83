//! Where an entry is that the broker knew already.
//!
//! A namespace that de-duplicates confirms what is sent again, and does not say where it stored it the first time. The
//! publisher was promised that place, so it is looked up: the entry carries its producer's name and its number.

use pulsar::proto::command_subscribe::{InitialPosition, SubType};
use pulsar::proto::{CommandSubscribe, MessageIdData};
use uuid::Uuid;

use super::cluster::Cluster;
use super::consumer::Consumer;
use super::fault::Fault;
use super::names::Physical;
use super::record;
use crate::message::{Place, Timestamp};

/// What the broker may send ahead.
const AHEAD: u32 = 1000;

/// Where to begin looking.
#[derive(Debug, Clone, Copy)]
pub enum Since {
    Place(Place),
    Published(Timestamp),
}

/// Reads the topic and tells `seen` of each entry of a producer, by its number, until that says that it was the last.
pub async fn find(
    cluster: &Cluster,
    topic: &Physical,
    since: Since,
    producer: &str,
    seen: &mut (impl FnMut(u64, Place) -> bool + Send),
) -> Result<(), Fault> {
    let session = cluster.owner(topic).await?;
    let mut subscribe = CommandSubscribe {
        topic: topic.as_str().into(),
        subscription: format!("twinspan-reader-{}", Uuid::now_v7().simple()),
        sub_type: SubType::Exclusive as i32,
        durable: Some(false),
        initial_position: Some(InitialPosition::Earliest as i32),
        ..Default::default()
    };
    let mut consumer = match since {
        Since::Place(Place { ledger, entry, .. }) => {
            subscribe.start_message_id =
                Some(MessageIdData { ledger_id: ledger, entry_id: entry, ..Default::default() });
            Consumer::subscribe(session, subscribe).await?
        }
        Since::Published(time) => {
            let consumer = Consumer::subscribe(session.clone(), subscribe.clone()).await?;
            consumer.seek(time.as_millis().max(0) as u64).await?;
            Consumer::subscribe(session, subscribe).await?
        }
    };
    consumer.permit(AHEAD).await?;
    let mut used = 0;
    while let Some(delivery) = consumer.next().await {
        let entry = delivery.entry.open();
        used += record::count(&entry);
        if used > AHEAD / 2 {
            consumer.permit(std::mem::take(&mut used)).await?;
        }
        if let Ok(entry) = entry
            && entry.metadata.producer_name == *producer
            && seen(entry.metadata.sequence_id, delivery.place)
        {
            return Ok(());
        }
    }
    Err(Fault::Lost("the connection was lost".into()))
}
