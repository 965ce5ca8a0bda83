//! Bringing what is known in memory to what is in storage: all of it when the log is opened, and what a commit of
//! unknown outcome left behind when it is opened again.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;

use redb::{ReadTransaction, ReadableTable, ReadableTableMetadata};

use super::group::Group;
use super::log::Log;
use super::reader::read_batch;
use super::rows::{Cursor, Extent, GROUPS, TOPICS};
use super::store::{Failure, Store};
use super::topics::{TopicLog, lock};
use crate::topic::Topic;

/// Returns the highest topic id there is.
pub fn load(log: &Log) -> Result<u32, Failure> {
    let (topics, groups) = log.store.read(|snapshot| Ok((read_topics(snapshot)?, read_groups(snapshot)?)))?;
    for (topic, extent) in &topics {
        let topic = log.topics.get_at(topic, *extent);
        if topic.extent() != *extent {
            let missed = missed(&log.store, &topic, extent.next)?;
            topic.moved(*extent, || missed);
        }
        log.topics.is_stored(&topic.topic);
    }
    let live_bytes = topics.iter().map(|(_, extent)| extent.bytes).sum();
    log.live_bytes.store(live_bytes, Ordering::Relaxed);
    let stored: HashSet<_> = groups.iter().map(|(id, name, _)| (*id, name.as_str())).collect();
    for topic in log.topics.stored() {
        let id = topic.extent().id;
        lock(&topic.groups).retain(|name, _| stored.contains(&(id, name.as_str())));
    }
    let by_id = topics.into_iter().map(|(topic, extent)| (extent.id, topic));
    let by_id: HashMap<_, _> = by_id.collect();
    for (id, name, mut cursor) in groups {
        let topic =
            by_id.get(&id).ok_or_else(|| Failure::damage(format!("the topic of group {name} is gone")))?;
        let topic = log.topics.get(topic);
        // Retention moves floors without writing them.
        cursor.rise_to(topic.extent().first);
        let known = lock(&topic.groups).get(&name).cloned();
        match known {
            Some(group) => group.stored(cursor),
            None => {
                let group = Group::new(topic.clone(), name.clone(), cursor);
                lock(&topic.groups).insert(name, group);
            }
        }
    }
    Ok(by_id.into_keys().max().unwrap_or(0))
}

/// What is stored up to `end` and was never pushed to those who follow.
fn missed(
    store: &Store,
    topic: &TopicLog,
    end: u64,
) -> Result<Vec<std::sync::Arc<crate::message::Envelope>>, Failure> {
    let mut missed = Vec::new();
    let mut next = topic.extent().next;
    while topic.followed().is_some() && next < end {
        let batch = read_batch(store, topic, next, end - next, true)?;
        // A record that cannot be read is told to those who read it; a tail carries messages only.
        missed.extend(batch.items.into_iter().filter_map(|item| item.found.ok()));
        next = batch.next.max(next + 1);
    }
    Ok(missed)
}

fn read_topics(snapshot: &ReadTransaction) -> Result<Vec<(Topic, Extent)>, Failure> {
    let table = snapshot.open_table(TOPICS)?;
    let mut topics = Vec::new();
    for entry in table.iter()? {
        let (name, row) = entry?;
        let damaged = |_| Failure::damage(format!("the entry of topic `{}` cannot be read", name.value()));
        let extent = Extent::read(name.value(), row.value()).map_err(damaged)?;
        let topic = Topic::parse(name.value())
            .map_err(|_| Failure::damage(format!("`{}` is not a topic", name.value())))?;
        topics.push((topic, extent));
    }
    if topics.len() as u64 != table.len()? {
        return Err(Failure::damage("the list of topics is not whole"));
    }
    Ok(topics)
}

fn read_groups(snapshot: &ReadTransaction) -> Result<Vec<(u32, String, Cursor)>, Failure> {
    let table = snapshot.open_table(GROUPS)?;
    let mut groups = Vec::new();
    for entry in table.iter()? {
        let (key, row) = entry?;
        let (id, name) = key.value();
        let damaged = |_| Failure::damage(format!("the entry of group `{name}` cannot be read"));
        groups.push((id, name.to_owned(), Cursor::read(id, name, row.value()).map_err(damaged)?));
    }
    if groups.len() as u64 != table.len()? {
        return Err(Failure::damage("the list of groups is not whole"));
    }
    Ok(groups)
}
