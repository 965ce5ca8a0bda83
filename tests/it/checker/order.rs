//! Whether first deliveries come in the order that is promised: that of a publisher's connection, on a durable topic for
//! each key.

use std::collections::{BTreeMap, BTreeSet};

use super::{Messages, Name, Promise, Rule, Subscriber, Violation, What};

pub fn look(subscriber: &Subscriber, messages: &Messages<'_>, found: &mut Vec<Violation>) {
    let (mut newest, mut seen) = (BTreeMap::new(), BTreeSet::new());
    for heard in &subscriber.heard {
        let What::Event { name, late, .. } = &heard.what else { continue };
        let Some(message) = messages.get(name) else { continue };
        if !seen.insert(name) {
            continue;
        }
        let ((first, of), (last, _)) = (message.0[0], message.0[message.0.len() - 1]);
        // What was published again has a place in the order where all of it went by one connection.
        if message.0.iter().all(|(_, other)| other.connection == of.connection) {
            follow(subscriber, (name, *late, of.connection, &of.key), (first, last), &mut newest, found);
        }
    }
}

type Newest<'a> = BTreeMap<(usize, usize, Option<String>), (usize, &'a Name)>;

/// A message stands behind all whose first publish came after its last.
fn follow<'a>(
    subscriber: &Subscriber,
    (name, late, connection, key): (&'a Name, bool, usize, &Option<String>),
    (first, last): (usize, usize),
    newest: &mut Newest<'a>,
    found: &mut Vec<Violation>,
) {
    let key = match subscriber.promise {
        Promise::Queue | Promise::Shared => return,
        Promise::KeyShared if key.is_none() => return,
        Promise::First if late => return,
        Promise::Live => None,
        Promise::First | Promise::Stored | Promise::KeyShared => key.clone(),
    };
    let newest = newest.entry((name.publisher, connection, key)).or_insert((first, name));
    if newest.0 > last {
        found.push(Violation {
            rule: Rule::OutOfOrder,
            message: Some(name.clone()),
            text: format!("{name} came to {} behind {}", subscriber.name, newest.1.n),
        });
    } else if first > newest.0 {
        *newest = (first, name);
    }
}
