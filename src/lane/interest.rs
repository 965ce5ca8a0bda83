//! Who wants to hear which names: a trie of tokens, with `*` for one token and `>` for the rest.
//!
//! ```text
//! orders.eu   orders.*   orders.>
//!                 ┌─ eu ──▶ [1]
//! root ── orders ─┼─ *  ──▶ [2]
//!                 └─ >  ──▶ [3]          orders.us ──▶ 2, 3
//! ```
//! Finding costs steps of the trie, not the number of patterns. What was found for a name is kept until interest
//! changes, so that a busy topic costs one lookup and everyone shares its list.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// How many names' findings are kept; one more, and all are found afresh.
const FOUND_MAX: usize = 4096;

pub struct Interest<T> {
    root: Node<T>,
    found: HashMap<Box<str>, Arc<Found<T>>>,
    next: u64,
}

struct Node<T> {
    literal: HashMap<Box<str>, Node<T>>,
    star: Option<Box<Node<T>>>,
    /// Patterns that end here.
    here: Vec<Entry<T>>,
    /// Patterns that go on with `>`.
    rest: Vec<Entry<T>>,
}

struct Entry<T> {
    number: u64,
    group: Option<Box<str>>,
    value: T,
}

/// Who is interested in one name.
pub struct Found<T> {
    /// Those without a group, the first placed first.
    pub everyone: Vec<T>,
    /// One member of each is meant.
    pub groups: Vec<Group<T>>,
}

pub struct Group<T> {
    members: Vec<T>,
    turn: AtomicUsize,
}

impl<T> Found<T> {
    pub fn is_empty(&self) -> bool {
        self.everyone.is_empty() && self.groups.is_empty()
    }
}

impl<T> Group<T> {
    /// The member whose turn it is. A group that exists has a member.
    pub fn next(&self) -> &T {
        &self.members[self.turn.fetch_add(1, Ordering::Relaxed) % self.members.len()]
    }
}

impl<T> Default for Interest<T> {
    fn default() -> Self {
        Self { root: Node::new(), found: HashMap::new(), next: 0 }
    }
}

impl<T: Clone> Interest<T> {
    /// Places `value`; the number takes it away again.
    pub fn insert(&mut self, pattern: &str, group: Option<&str>, value: T) -> u64 {
        self.found.clear();
        self.next += 1;
        let entry = Entry { number: self.next, group: group.map(Into::into), value };
        let mut node = &mut self.root;
        for token in pattern.split('.') {
            node = match token {
                ">" => {
                    node.rest.push(entry);
                    return self.next;
                }
                "*" => &mut **node.star.get_or_insert_with(|| Box::new(Node::new())),
                _ => node.literal.entry(token.into()).or_insert_with(Node::new),
            };
        }
        node.here.push(entry);
        self.next
    }

    /// Hands back what was placed, for the caller to drop where it holds no lock.
    pub fn remove(&mut self, pattern: &str, number: u64) -> Option<T> {
        self.found.clear();
        self.root.remove(pattern.split('.'), number).map(|entry| entry.value)
    }

    pub fn find(&mut self, name: &str) -> Arc<Found<T>> {
        if let Some(found) = self.found.get(name) {
            return found.clone();
        }
        let mut entries = Vec::new();
        self.root.collect(name.split('.'), &mut entries);
        let found = Arc::new(Found::of(entries));
        if self.found.len() >= FOUND_MAX {
            self.found.clear();
        }
        self.found.insert(name.into(), found.clone());
        found
    }
}

impl<T: Clone> Found<T> {
    fn of(mut entries: Vec<&Entry<T>>) -> Self {
        entries.sort_by_key(|entry| entry.number);
        let mut everyone = Vec::new();
        let mut groups: Vec<(&str, Vec<T>)> = Vec::new();
        for entry in entries {
            let value = entry.value.clone();
            match &entry.group {
                None => everyone.push(value),
                Some(name) => match groups.iter_mut().find(|(other, _)| *other == &**name) {
                    Some((_, members)) => members.push(value),
                    None => groups.push((name, vec![value])),
                },
            }
        }
        // The turn begins anywhere: interest that changes often must not favour the first member.
        let groups = groups
            .into_iter()
            .map(|(_, members)| Group { turn: AtomicUsize::new(fastrand::usize(..members.len())), members })
            .collect();
        Self { everyone, groups }
    }
}

impl<T> Node<T> {
    fn new() -> Self {
        Self { literal: HashMap::new(), star: None, here: Vec::new(), rest: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.literal.is_empty() && self.star.is_none() && self.here.is_empty() && self.rest.is_empty()
    }

    /// No deeper than the patterns are, however long the name.
    fn collect<'a>(&'a self, mut name: std::str::Split<'_, char>, found: &mut Vec<&'a Entry<T>>) {
        match name.next() {
            None => found.extend(&self.here),
            Some(token) => {
                found.extend(&self.rest);
                if let Some(node) = self.literal.get(token) {
                    node.collect(name.clone(), found);
                }
                if let Some(node) = &self.star {
                    node.collect(name, found);
                }
            }
        }
    }

    /// Takes the entry away, and the branch that held nothing else.
    fn remove(&mut self, mut pattern: std::str::Split<'_, char>, number: u64) -> Option<Entry<T>> {
        let take = |entries: &mut Vec<Entry<T>>| {
            let at = entries.iter().position(|entry| entry.number == number)?;
            Some(entries.remove(at))
        };
        match pattern.next() {
            None => take(&mut self.here),
            Some(">") => take(&mut self.rest),
            Some("*") => {
                let node = self.star.as_mut()?;
                let removed = node.remove(pattern, number);
                if node.is_empty() {
                    self.star = None;
                }
                removed
            }
            Some(token) => {
                let node = self.literal.get_mut(token)?;
                let removed = node.remove(pattern, number);
                if node.is_empty() {
                    self.literal.remove(token);
                }
                removed
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::topic::{Pattern, Topic};

    fn topics() -> impl Strategy<Value = Topic> {
        prop::collection::vec("[ab]", 1..5).prop_map(|tokens| Topic::parse(&tokens.join(".")).unwrap())
    }

    fn patterns() -> impl Strategy<Value = Pattern> {
        let tokens = prop::collection::vec("[ab*]", 0..4);
        (tokens, "[ab*>]").prop_map(|(mut tokens, last)| {
            tokens.push(last);
            Pattern::parse(&tokens.join(".")).unwrap()
        })
    }

    proptest! {
        #[test]
        fn the_trie_finds_what_the_patterns_match_and_forgets_what_was_removed(
            patterns in prop::collection::vec((patterns(), any::<bool>()), 0..20),
            topics in prop::collection::vec(topics(), 1..10),
        ) {
            let mut interest = Interest::default();
            let mut placed = Vec::new();
            for (at, (pattern, _)) in patterns.iter().enumerate() {
                placed.push(interest.insert(pattern.as_str(), None, at));
            }
            let expect = |topic: &Topic, stays: &dyn Fn(usize) -> bool| -> Vec<usize> {
                (0..patterns.len()).filter(|at| stays(*at) && patterns[*at].0.matches(topic)).collect()
            };
            for topic in &topics {
                prop_assert_eq!(&interest.find(topic.as_str()).everyone, &expect(topic, &|_| true));
            }
            for (at, (pattern, stays)) in patterns.iter().enumerate() {
                if !stays {
                    prop_assert_eq!(interest.remove(pattern.as_str(), placed[at]), Some(at));
                }
            }
            for topic in &topics {
                prop_assert_eq!(&interest.find(topic.as_str()).everyone, &expect(topic, &|at| patterns[at].1));
            }
            for (at, (pattern, _)) in patterns.iter().enumerate() {
                interest.remove(pattern.as_str(), placed[at]);
            }
            prop_assert!(interest.root.is_empty());
        }
    }

    #[test]
    fn a_group_is_one_over_all_its_patterns_and_its_members_take_turns() {
        let mut interest = Interest::default();
        interest.insert("a.*", Some("g"), 1);
        interest.insert("a.>", Some("g"), 2);
        interest.insert("a.b", Some("h"), 3);
        let found = interest.find("a.b");
        assert_eq!((found.everyone.len(), found.groups.len()), (0, 2));
        let mut heard: Vec<_> = (0..4).map(|_| *found.groups[0].next()).collect();
        heard.sort_unstable();
        assert_eq!(heard, [1, 1, 2, 2]);
        assert_eq!(*found.groups[1].next(), 3);
    }

    #[test]
    fn what_was_found_is_kept_for_so_many_names_and_no_more() {
        let mut interest = Interest::default();
        interest.insert(">", None, ());
        for at in 0..3 * FOUND_MAX {
            interest.find(&at.to_string());
            assert!(interest.found.len() <= FOUND_MAX);
        }
    }
}
