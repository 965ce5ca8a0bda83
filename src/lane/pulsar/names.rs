//! A topic's names: ours, and Pulsar's `persistent://tenant/namespace/local`, which the route's template makes.

use std::fmt;

use crate::lane::contract::LaneError;
use crate::message::Lane;
use crate::policy::table::{Route, RouteTable};
use crate::topic::Topic;

/// A topic by Pulsar's name, or one partition of it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Physical {
    full: String,
    /// Where the local name begins.
    local: usize,
    /// Where it ends as far as it is the topic's, and not a partition's.
    whole: usize,
}

const SCHEME: &str = "persistent://";

impl Physical {
    pub fn of(route: &Route, topic: &Topic) -> Result<Self, LaneError> {
        Self::parse(route.pulsar.apply(topic.as_str())).ok_or_else(|| {
            LaneError::BadRequest(format!(
                "route `{}` makes `{}` of `{topic}`, which is not {SCHEME}TENANT/NAMESPACE/TOPIC",
                route.name,
                route.pulsar.apply(topic.as_str()),
            ))
        })
    }

    pub fn parse(full: String) -> Option<Self> {
        let mut parts = full.strip_prefix(SCHEME)?.split('/');
        let (tenant, namespace, local) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || [tenant, namespace, local].contains(&"") {
            return None;
        }
        let local = full.len() - local.len();
        Some(Self::split_at(full, local))
    }

    /// A topic of a namespace. Both are taken as they are.
    pub fn within(namespace: &str, local: &str) -> Self {
        Self::split_at(format!("{SCHEME}{namespace}/{local}"), SCHEME.len() + namespace.len() + 1)
    }

    /// No topic of ours ends like a partition.
    fn split_at(full: String, local: usize) -> Self {
        let whole = match full.rsplit_once("-partition-") {
            Some((whole, digits)) if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) => {
                whole.len()
            }
            _ => full.len(),
        };
        Self { full, local, whole }
    }

    pub fn as_str(&self) -> &str {
        &self.full
    }

    /// `tenant/namespace`.
    pub fn namespace(&self) -> &str {
        &self.full[SCHEME.len()..self.local - 1]
    }

    pub fn local(&self) -> &str {
        &self.full[self.local..]
    }

    pub fn partition(&self, number: u32) -> Self {
        Self::split_at(format!("{}-partition-{number}", self.full), self.local)
    }

    /// The topic that this is a partition of, or itself.
    pub fn whole(mut self) -> Self {
        self.full.truncate(self.whole);
        self
    }

    pub fn is_partition(&self) -> bool {
        self.whole < self.full.len()
    }
}

/// The topic that a name of the broker's stands for, by the routes in force.
pub fn topic_of(table: &RouteTable, name: String) -> Option<Topic> {
    let physical = Physical::parse(name)?.whole();
    let mut durable = table.routes().iter().filter(|route| route.lane.takes(Lane::Durable));
    durable.find_map(|route| {
        let topic = Topic::parse(route.pulsar.unapply(physical.as_str())?).ok()?;
        let winner = table.route_for(&topic)?;
        (winner.lane.takes(Lane::Durable) && winner.pulsar == route.pulsar).then_some(topic)
    })
}

impl fmt::Display for Physical {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.full)
    }
}

/// The partition of a key, as Java's producers choose it by default (`JavaStringHash`), so that a key keeps its order
/// whoever publishes it.
pub fn partition_of(key: &str, partitions: u32) -> u32 {
    let hash =
        key.encode_utf16().fold(0i32, |hash, unit| hash.wrapping_mul(31).wrapping_add(i32::from(unit)));
    (hash & i32::MAX) as u32 % partitions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_physical_name_has_a_tenant_a_namespace_and_a_local_name() {
        let name = Physical::parse("persistent://acme/eu/orders.a".into()).unwrap();
        assert_eq!((name.namespace(), name.local()), ("acme/eu", "orders.a"));
        assert_eq!(Physical::within("acme/eu", "orders.a"), name);
        assert_eq!(name.partition(3).as_str(), "persistent://acme/eu/orders.a-partition-3");
        assert_eq!(name.partition(3).whole(), name);
        assert_eq!(name.clone().whole(), name);
        for bad in [
            "orders",
            "non-persistent://a/b/c",
            "persistent://a/b",
            "persistent://a//c",
            "persistent://a/b/c/d",
        ] {
            assert!(Physical::parse(bad.into()).is_none(), "{bad}");
        }
    }

    #[test]
    fn a_key_takes_the_partition_that_java_gives_it() {
        // In Java "hello".hashCode() is 99162322.
        assert_eq!(partition_of("hello", 1000), 322);
        assert_eq!(partition_of("", 7), 0);
        assert!((0..50).all(|n| partition_of(&format!("key-{n}"), 3) < 3));
    }
}
