//! What the broker is set to, held against what the routes expect of it: `check --live` tells.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Value;

use super::admin::Admin;
use super::names::Physical;
use crate::lane::contract::LaneError;
use crate::message::Lane;
use crate::origin::Problem;
use crate::policy::table::{Route, RouteTable, Written};
use crate::topic::Topic;
use crate::units;

/// So many topics of a route are asked for their schema.
const SCHEMAS_MAX: usize = 500;

/// What a namespace keeps of what is acknowledged, or of topics that nobody subscribes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kept {
    /// Below zero: for ever, and of any size.
    minutes: i64,
    megabytes: i64,
}

pub async fn examine(admin: &Admin, table: &RouteTable) -> Result<Vec<Problem>, LaneError> {
    let broker = admin.get(&["brokers", "configuration", "runtime"]).await?.unwrap_or_default();
    let mut problems = Vec::new();
    if broker["acknowledgmentAtBatchIndexLevelEnabled"] == "false" {
        let message = "the broker does not record acknowledgements within a batch: what a group has not \
                       acknowledged of one comes again with what it has; set \
                       acknowledgmentAtBatchIndexLevelEnabled=true in broker.conf";
        problems.push(Problem::new(Default::default(), message));
    }
    let mut namespaces: BTreeMap<String, Option<Kept>> = BTreeMap::new();
    for (route, written) in table.entries().filter(|(route, _)| route.lane.takes(Lane::Durable)) {
        let at = |key| written.options.get(key).unwrap_or(&written.route).clone();
        let Some(sample) = Physical::parse(route.pulsar.apply("x")) else { continue };
        let namespace = sample.namespace();
        if !namespaces.contains_key(namespace) {
            namespaces.insert(namespace.to_owned(), kept(admin, namespace, &broker).await?);
        }
        let Some(kept) = namespaces[namespace] else {
            let message = format!(
                "route `{}`: namespace {namespace} does not exist; create it: \
                 pulsar-admin namespaces create {namespace}",
                route.name
            );
            problems.push(Problem::new(at("pulsar"), message));
            continue;
        };
        if let Some(missing) = missing(kept, route.retention.age, route.retention.size) {
            let message = format!(
                "route `{}`: namespace {namespace} keeps {}, {missing}; set it: \
                 pulsar-admin namespaces set-retention {namespace} --time … --size …",
                route.name,
                kept.words(),
            );
            problems.push(Problem::new(at("retention"), message));
        }
    }
    Ok(problems)
}

/// The topics of a route whose registered schema is not what the route says of them.
pub async fn schemas(
    admin: &Admin,
    route: &Route,
    written: &Written,
    topics: Vec<Topic>,
) -> Result<Vec<Problem>, LaneError> {
    let mut problems = Vec::new();
    for topic in topics.into_iter().take(SCHEMAS_MAX) {
        let physical = Physical::of(route, &topic)?;
        let mut path = vec!["schemas"];
        path.extend(physical.namespace().split('/'));
        path.extend([physical.local(), "schema"]);
        let found = admin.get(&path).await?.unwrap_or_default();
        let kind = found["type"].as_str().unwrap_or("NONE");
        let fits =
            matches!(kind, "NONE" | "BYTES") || kind.eq_ignore_ascii_case(route.pulsar_schema.as_str());
        if !fits {
            let says = route.pulsar_schema.as_str();
            let what_to_do = match kind {
                "JSON" | "STRING" => format!("write pulsar_schema = \"{}\"", kind.to_lowercase()),
                _ => "only JSON, string and bytes can be published here".to_owned(),
            };
            let message = format!(
                "route `{}`: the schema of `{topic}` is {kind}, and pulsar_schema is \"{says}\": {what_to_do}",
                route.name
            );
            let at = written.options.get("pulsar_schema").unwrap_or(&written.route).clone();
            problems.push(Problem::new(at, message));
        }
    }
    Ok(problems)
}

/// `None` where there is no such namespace.
async fn kept(admin: &Admin, namespace: &str, broker: &Value) -> Result<Option<Kept>, LaneError> {
    let mut path = vec!["namespaces"];
    path.extend(namespace.split('/'));
    if admin.get(&path).await?.is_none() {
        return Ok(None);
    }
    path.push("retention");
    let policy = admin.get(&path).await?.unwrap_or_default();
    let number = |own: &str, of_broker: &str| {
        let default = || broker[of_broker].as_str().and_then(|number| number.parse().ok());
        policy[own].as_i64().or_else(default).unwrap_or(0)
    };
    Ok(Some(Kept {
        minutes: number("retentionTimeInMinutes", "defaultRetentionTimeInMinutes"),
        megabytes: number("retentionSizeInMB", "defaultRetentionSizeInMB"),
    }))
}

/// What the namespace lacks of what the route promises. A route without retention promises for ever.
fn missing(kept: Kept, age: Option<Duration>, size: Option<u64>) -> Option<String> {
    // Where either is zero and the other is not unlimited, nothing is kept (Pulsar's documentation, "Retention").
    let nothing = kept.minutes == 0 || kept.megabytes == 0;
    let minutes = age.map(|age| age.as_secs().div_ceil(60) as i64);
    let megabytes = size.map(|size| (size >> 20) as i64);
    let short = |kept: i64, wanted: Option<i64>| kept >= 0 && wanted.is_none_or(|wanted| kept < wanted);
    match (age, size) {
        _ if nothing => Some("so there is nothing to replay once it is acknowledged".into()),
        // What is limited by size alone may go at any age, and the other way around.
        (None, None) if kept.minutes >= 0 || kept.megabytes >= 0 => None,
        (Some(age), _) if short(kept.minutes, minutes) => {
            Some(format!("and the route promises {}", units::show_duration(age)))
        }
        (_, Some(size)) if short(kept.megabytes, megabytes) => {
            Some(format!("and the route promises {}", units::show_size(size)))
        }
        _ => None,
    }
}

impl Kept {
    fn words(self) -> String {
        if self.minutes == 0 || self.megabytes == 0 {
            return "nothing that is acknowledged".into();
        }
        let time = match self.minutes {
            ..0 => "any time".into(),
            minutes => format!("{minutes} minutes"),
        };
        let size = match self.megabytes {
            ..0 => "any size".into(),
            megabytes => format!("{megabytes} MB"),
        };
        format!("messages for {time} and of {size}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_that_keeps_less_than_a_route_promises_is_told() {
        let day = Some(Duration::from_secs(86_400));
        let table = [
            ((-1, -1), day, Some(1 << 30), None),
            ((1440, -1), day, None, None),
            ((1439, -1), day, None, Some("promises 1d")),
            ((-1, 512), None, Some(1 << 30), Some("promises 1GiB")),
            ((-1, 1024), None, Some(1 << 30), None),
            ((0, 0), None, None, Some("nothing to replay")),
            ((0, -1), day, None, Some("nothing to replay")),
            ((60, -1), None, None, None),
        ];
        for ((minutes, megabytes), age, size, expected) in table {
            let found = missing(Kept { minutes, megabytes }, age, size);
            match expected {
                None => assert_eq!(found, None, "{minutes} {megabytes}"),
                Some(part) => assert!(found.as_ref().is_some_and(|it| it.contains(part)), "{found:?}"),
            }
        }
    }
}
