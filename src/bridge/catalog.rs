//! The topics there are, and what went through them here.
//!
//! A topic is known once it was used or declared. Declared ones are kept in a file, one a line, so that a route that
//! wants topics declared first still has them after a restart; counts are this process's own.

use std::collections::{BTreeMap, HashMap};
use std::hash::Hash;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::broadcast;

use crate::topic::{Pattern, Topic};

/// Topics that appeared and that whoever watches has not heard of. Who is further behind misses some.
const CREATED_MAX: usize = 256;
/// How many topics are remembered. One that comes after that is carried like any other, it is just not listed.
const TOPICS_MAX: usize = 100_000;

pub struct Catalog {
    topics: RwLock<HashMap<Topic, Arc<Entry>>>,
    subscriptions: Mutex<Subscriptions>,
    file: PathBuf,
    /// Held while the file is replaced, so that the last write holds the last state.
    writing: Mutex<()>,
    created: broadcast::Sender<Topic>,
}

/// How many there are to each topic, and to each pattern of several topics.
#[derive(Default)]
struct Subscriptions {
    topics: HashMap<Topic, u64>,
    patterns: HashMap<Pattern, u64>,
}

#[derive(Default)]
struct Entry {
    messages: AtomicU64,
    declared: bool,
}

/// What is known of one topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    pub topic: Topic,
    /// Published through this process since it started.
    pub messages: u64,
    pub subscribers: u64,
}

impl Catalog {
    /// Reads the declared topics in `data_dir`; there are none where there is no file.
    pub fn open(data_dir: &Path) -> std::io::Result<Self> {
        let file = data_dir.join("topics");
        let mut topics = HashMap::new();
        match std::fs::read_to_string(&file) {
            Ok(text) => {
                for topic in text.lines().filter_map(|line| Topic::parse(line).ok()) {
                    topics.insert(topic, Arc::new(Entry { declared: true, ..Entry::default() }));
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(Self {
            topics: RwLock::new(topics),
            subscriptions: Mutex::default(),
            file,
            writing: Mutex::default(),
            created: broadcast::channel(CREATED_MAX).0,
        })
    }

    /// A message was published.
    pub fn published(&self, topic: &Topic) {
        if let Some(entry) = self.entry(topic) {
            entry.messages.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Someone subscribed. A topic is known by its first subscriber, too.
    pub fn subscribed(&self, pattern: &Pattern) {
        let mut subscriptions = self.subscriptions();
        match pattern.topic() {
            Some(topic) => {
                self.entry(&topic);
                *subscriptions.topics.entry(topic).or_default() += 1;
            }
            None => *subscriptions.patterns.entry(pattern.clone()).or_default() += 1,
        }
    }

    pub fn unsubscribed(&self, pattern: &Pattern) {
        let mut subscriptions = self.subscriptions();
        match pattern.topic() {
            Some(topic) => one_less(&mut subscriptions.topics, &topic),
            None => one_less(&mut subscriptions.patterns, pattern),
        }
    }

    pub fn is_declared(&self, topic: &Topic) -> bool {
        self.read().get(topic).is_some_and(|entry| entry.declared)
    }

    /// `false`: it was declared already. Returns once that survives a restart.
    pub fn declare(&self, topic: &Topic) -> std::io::Result<bool> {
        {
            let mut topics = self.topics.write().unwrap_or_else(PoisonError::into_inner);
            if topics.get(topic).is_some_and(|entry| entry.declared) {
                return Ok(false);
            }
            let messages = topics.get(topic).map_or(0, |entry| entry.messages.load(Ordering::Relaxed));
            let entry = Entry { messages: messages.into(), declared: true };
            if topics.insert(topic.clone(), Arc::new(entry)).is_none() {
                self.tell(topic);
            }
        }
        self.save()?;
        Ok(true)
    }

    /// Forgets a topic; what is stored in it stays. `false`: it was not known.
    pub fn forget(&self, topic: &Topic) -> std::io::Result<bool> {
        let removed = self.topics.write().unwrap_or_else(PoisonError::into_inner).remove(topic);
        match removed {
            Some(entry) if entry.declared => self.save().map(|()| true),
            Some(_) => Ok(true),
            None => Ok(false),
        }
    }

    pub fn get(&self, topic: &Topic) -> Option<Known> {
        let entry = self.read().get(topic).cloned()?;
        Some(self.known(topic, &entry, &self.subscriptions()))
    }

    /// All of them, by name.
    pub fn list(&self) -> Vec<Known> {
        let entries: BTreeMap<_, _> = self.read().iter().map(|(t, e)| (t.clone(), e.clone())).collect();
        let subscriptions = self.subscriptions();
        entries.iter().map(|(topic, entry)| self.known(topic, entry, &subscriptions)).collect()
    }

    /// How many messages went through each, in no order.
    pub fn messages(&self) -> Vec<(Topic, u64)> {
        let topics = self.read();
        topics.iter().map(|(topic, entry)| (topic.clone(), entry.messages.load(Ordering::Relaxed))).collect()
    }

    /// Each topic that becomes known from now on.
    pub fn created(&self) -> broadcast::Receiver<Topic> {
        self.created.subscribe()
    }

    /// How many subscriptions there are.
    pub fn subscribers(&self) -> u64 {
        let subscriptions = self.subscriptions();
        subscriptions.topics.values().chain(subscriptions.patterns.values()).sum()
    }

    pub fn len(&self) -> usize {
        self.read().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn known(&self, topic: &Topic, entry: &Entry, subscriptions: &Subscriptions) -> Known {
        let to_it = subscriptions.topics.get(topic).copied().unwrap_or_default();
        let matching = subscriptions.patterns.iter().filter(|(pattern, _)| pattern.matches(topic));
        let subscribers = to_it + matching.map(|(_, count)| count).sum::<u64>();
        Known { topic: topic.clone(), messages: entry.messages.load(Ordering::Relaxed), subscribers }
    }

    fn entry(&self, topic: &Topic) -> Option<Arc<Entry>> {
        if let Some(entry) = self.read().get(topic) {
            return Some(entry.clone());
        }
        let mut topics = self.topics.write().unwrap_or_else(PoisonError::into_inner);
        if topics.len() >= TOPICS_MAX && !topics.contains_key(topic) {
            return None;
        }
        let entry = topics.entry(topic.clone()).or_insert_with(|| {
            self.tell(topic);
            Arc::default()
        });
        Some(entry.clone())
    }

    fn tell(&self, topic: &Topic) {
        // Nobody may be watching.
        let _ = self.created.send(topic.clone());
    }

    /// Replaces the file as a whole: a crash leaves the old one or the new one.
    fn save(&self) -> std::io::Result<()> {
        let _one_at_a_time = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<_> = self
            .read()
            .iter()
            .filter(|(_, entry)| entry.declared)
            .map(|(topic, _)| topic.to_string())
            .collect();
        names.sort();
        names.push(String::new());
        if let Some(dir) = self.file.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let new = self.file.with_extension("new");
        let mut file = std::fs::File::create(&new)?;
        file.write_all(names.join("\n").as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.file)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Topic, Arc<Entry>>> {
        self.topics.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn subscriptions(&self) -> MutexGuard<'_, Subscriptions> {
        self.subscriptions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn one_less<K: Eq + Hash>(counts: &mut HashMap<K, u64>, of: &K) {
    if let Some(count) = counts.get_mut(of) {
        *count -= 1;
        if *count == 0 {
            counts.remove(of);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_declared_topic_survives_a_restart_and_a_used_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let topic = |name| Topic::parse(name).unwrap();
        let catalog = Catalog::open(dir.path()).unwrap();
        catalog.published(&topic("used"));
        assert!(catalog.declare(&topic("declared")).unwrap());
        assert!(!catalog.declare(&topic("declared")).unwrap());
        assert!(catalog.declare(&topic("gone")).unwrap());
        assert!(catalog.forget(&topic("gone")).unwrap());

        let catalog = Catalog::open(dir.path()).unwrap();
        let names: Vec<_> = catalog.list().into_iter().map(|known| known.topic.to_string()).collect();
        assert_eq!(names, ["declared"]);
        assert!(catalog.is_declared(&topic("declared")));
    }

    #[test]
    fn every_subscription_that_matches_counts_as_a_subscriber() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path()).unwrap();
        for pattern in ["a.b", "a.*", "a.*", "c"] {
            catalog.subscribed(&Pattern::parse(pattern).unwrap());
        }
        catalog.unsubscribed(&Pattern::parse("a.*").unwrap());
        let known = catalog.get(&Topic::parse("a.b").unwrap()).unwrap();
        assert_eq!((known.messages, known.subscribers), (0, 2));
    }
}
