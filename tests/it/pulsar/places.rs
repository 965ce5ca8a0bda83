//! Where topics are at the broker, and positions in them: batches, partitions, other tenants and namespaces.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;
use twinspan::lane::contract::{GroupReport, Joining, LaneError, Publisher};
use twinspan::message::{Draft, GroupMode, Start};
use twinspan::topic::Pattern;

use super::load::Publishers;
use super::*;
use crate::durable_contract::{backlog, hear, numbers, read, shared};

#[tokio::test]
async fn the_newest_n_are_exact_over_batches() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    for first in [0, 7, 14] {
        bed.batch(first..first + 7).await;
    }
    bed.publish(21).await;
    for n in [1, 2, 8, 9, 10, 22, 30] {
        let newest = read(&*bed.lane, &bed.route, &bed.topic, Start::Last(n)).await;
        let first = 22usize.saturating_sub(n as usize);
        assert_eq!(numbers(&newest), (first..22).collect::<Vec<_>>(), "{n}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_n_are_n_while_others_publish() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    assert_eq!(read(&*bed.lane, &bed.route, &bed.topic, Start::Last(5)).await.len(), 0);
    for n in 0..5 {
        bed.publish(n).await;
    }
    let load = Publishers::on(&bed, 1, (1, Duration::from_millis(1)), |_| None);
    for _ in 0..20 {
        let newest = numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::Last(5)).await);
        assert_eq!(newest.len(), 5, "{newest:?}");
    }
    load.end().await;
}

#[tokio::test]
async fn reading_goes_on_after_any_message_of_a_batch() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    bed.batch(0..4).await;
    bed.batch(4..8).await;
    let all = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
    for (at, envelope) in all.iter().enumerate() {
        let rest = read(&*bed.lane, &bed.route, &bed.topic, Start::After(position(envelope))).await;
        assert_eq!(numbers(&rest), (at + 1..8).collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn a_template_puts_topics_into_another_tenant_and_namespace() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    tenant(broker, "acme", "eu").await;
    let bed = Bed::routed(broker, route("eu.>", "persistent://acme/eu/fabric.{topic}.v1")).await;
    bed.publish(7).await;
    let name = format!("persistent://acme/eu/fabric.{}.v1", bed.topic);
    let path = "persistent/acme/eu".to_owned();
    let names = reqwest::get(format!("{}/admin/v2/{path}", broker.admin_url())).await.unwrap();
    assert!(names.text().await.unwrap().contains(&name));
    assert_eq!(
        bed.lane.topics(&Pattern::parse(">").unwrap()).await.unwrap(),
        std::slice::from_ref(&bed.topic)
    );
    assert_eq!(numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await), [7]);
    let refused = {
        let nowhere = Arc::new(route("no.>", "persistent://acme/nowhere/{topic}"));
        let append = bed.lane.append(&nowhere, &topic("no.where"), numbered(1), Publisher::default()).await;
        match append {
            Ok(receipt) => soon(receipt).await.map(drop),
            Err(error) => Err(error),
        }
    };
    assert!(matches!(refused, Err(LaneError::BadRequest(_))), "{refused:?}");
}

async fn tenant(broker: &Broker, tenant: &str, namespace: &str) {
    let allowed = json!({ "adminRoles": [], "allowedClusters": ["standalone"] });
    admin(broker, Method::PUT, &format!("tenants/{tenant}"), allowed).await;
    admin(broker, Method::PUT, &format!("namespaces/{tenant}/{namespace}"), Value::Null).await;
}

const PARTITIONS: u32 = 3;

/// A topic with partitions, made before anybody used it.
async fn partitioned() -> Bed {
    let broker = shared_pulsar().await;
    tenant(broker, "acme", "wide").await;
    let bed = Bed::routed(broker, route("wide.>", "persistent://acme/wide/{topic}")).await;
    let path = format!("persistent/acme/wide/{}/partitions", bed.topic);
    admin(broker, Method::PUT, &path, json!(PARTITIONS)).await;
    bed
}

async fn publish_keyed(bed: &Bed, n: usize) -> Position {
    let message = Draft {
        payload: n.to_string().into(),
        key: (!n.is_multiple_of(7)).then(|| format!("key {}", n % 7)),
        ..Default::default()
    };
    bed.lane
        .append(&bed.route, &bed.topic, message.accept(), Publisher::default())
        .await
        .unwrap()
        .await
        .unwrap()
}

#[tokio::test]
async fn a_topic_with_partitions_is_one_topic_whose_keys_keep_their_order() {
    if left_out() {
        return;
    }
    let bed = partitioned().await;
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    for n in 0..70 {
        publish_keyed(&bed, n).await;
    }
    let heard = hear(&mut cursor, 70).await;
    let all = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
    for envelopes in [&heard, &all] {
        assert_eq!(envelopes.len(), 70);
        let mut keys: BTreeMap<_, (BTreeSet<u32>, Vec<usize>)> = BTreeMap::new();
        for envelope in envelopes.iter() {
            let (partitions, numbers) = keys.entry(envelope.message.key.clone()).or_default();
            partitions.insert(envelope.stored.as_ref().unwrap().partition);
            numbers.push(number(envelope));
        }
        assert_eq!(keys.len(), 7);
        let used: BTreeSet<_> = keys.values().flat_map(|(partitions, _)| partitions).collect();
        assert!(used.len() > 1, "the keys are spread");
        for (key, (partitions, numbers)) in keys {
            assert_eq!((partitions.len(), numbers.is_sorted()), (1, true), "{key:?} {numbers:?}");
        }
    }
    assert_eq!(bed.lane.topics(&bed.topic.clone().into()).await.unwrap(), std::slice::from_ref(&bed.topic));
    assert!(!bed.lane.create(&bed.route, &bed.topic).await.unwrap());
}

#[tokio::test]
async fn a_position_of_a_topic_with_partitions_misses_nothing_of_any() {
    if left_out() {
        return;
    }
    let bed = partitioned().await;
    let mut receipts = Vec::new();
    for n in 0..30 {
        receipts.push(publish_keyed(&bed, n).await);
    }
    let all = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
    for (at, envelope) in all.iter().enumerate() {
        let resumed: Position = position(envelope).to_string().parse().unwrap();
        let rest = read(&*bed.lane, &bed.route, &bed.topic, Start::After(resumed)).await;
        let mut both: Vec<_> = numbers(&all[..=at]);
        both.extend(numbers(&rest));
        both.sort_unstable();
        assert_eq!(both, (0..30).collect::<Vec<_>>(), "each once, after {at}");
    }
    // A receipt knows its own partition; of the others it knows the time, so it may repeat, and misses nothing.
    for (n, receipt) in receipts.into_iter().enumerate() {
        let rest = numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::After(receipt)).await);
        assert!((n + 1..30).all(|later| rest.contains(&later)), "after {n}: {rest:?}");
        assert!(!rest.contains(&n));
    }
    let mut newest = numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::Last(10)).await);
    newest.sort_unstable();
    assert_eq!(newest, (20..30).collect::<Vec<_>>());
    let whole = Start::After("1-2-0".parse().unwrap());
    let refused = bed.lane.read(&bed.route, &bed.topic, whole).await.map(drop).unwrap_err();
    assert!(matches!(refused, LaneError::BadRequest(_)), "{refused:?}");
}

#[tokio::test]
async fn a_group_takes_from_every_partition_and_holds_its_prefetch_over_all() {
    if left_out() {
        return;
    }
    let bed = partitioned().await;
    for n in 0..30 {
        publish_keyed(&bed, n).await;
    }
    let member = bed.lane.join(&bed.route, &bed.topic, shared("billing", Start::Earliest, 4)).await.unwrap();
    let mut seen = BTreeSet::new();
    while seen.len() < 30 {
        let held = soon(member.next()).await.unwrap();
        assert!(held.len() <= 4);
        let held: Vec<_> = held.into_iter().map(Result::unwrap).collect();
        seen.extend(sorted(&held));
        member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
    }
    assert_eq!(backlog(&*bed.lane, &bed.route, &bed.topic).await, 0);
}

#[tokio::test]
async fn groups_of_every_mode_are_sought_reported_and_deleted_over_all_partitions() {
    if left_out() {
        return;
    }
    let bed = partitioned().await;
    for n in 0..30 {
        publish_keyed(&bed, n).await;
    }
    let all = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
    let tags = |held: &[Handed]| held.iter().map(|handed| handed.tag).collect::<Vec<_>>();
    for mode in GroupMode::ALL {
        let name = mode.as_str();
        let joining = |start| Joining { group: name.into(), mode, start, prefetch: 100 };
        let join = |start| bed.lane.join(&bed.route, &bed.topic, joining(start));
        let member = join(Start::Earliest).await.unwrap();
        let held = take(&*member, 30).await;
        member.ack(tags(&held)).await.unwrap();
        assert_quiet(&*member).await;

        // With its member, and from a bridge that has none.
        let other =
            open(&settings(shared_pulsar().await), &Policy::new(RouteTable::new([(*bed.route).clone()])))
                .await;
        bed.lane.seek(&bed.route, &bed.topic, name, Start::Earliest).await.unwrap();
        let held = take(&*member, 30).await;
        assert_eq!(sorted(&held), (0..30).collect::<Vec<_>>(), "{name}");
        member.ack(tags(&held)).await.unwrap();
        let after = Start::After(position(&all[19]));
        other.seek(&bed.route, &bed.topic, name, after).await.unwrap();
        let expected: BTreeSet<_> = numbers(&all[20..]).into_iter().collect();
        let held = take(&*member, 10).await;
        assert_eq!(sorted(&held).into_iter().collect::<BTreeSet<_>>(), expected, "{name}");
        member.ack(tags(&held)).await.unwrap();
        assert_quiet(&*member).await;

        let report = |reports: Vec<GroupReport>| reports.into_iter().find(|report| report.name == name);
        let reported = report(bed.lane.groups(&bed.route, &bed.topic).await.unwrap()).unwrap();
        assert_eq!((reported.mode, reported.members, reported.backlog), (Some(mode), 1, 0), "{name}");
        let refused = bed.lane.delete_group(&bed.route, &bed.topic, name).await;
        assert!(matches!(refused, Err(LaneError::GroupBusy(_))), "{name}: {refused:?}");
        drop(member);
        let deadline = Instant::now() + SOON;
        while bed.lane.delete_group(&bed.route, &bed.topic, name).await.is_err() {
            assert!(Instant::now() < deadline, "{name} keeps its member");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(report(bed.lane.groups(&bed.route, &bed.topic).await.unwrap()).is_none(), "{name}");
        assert!(!bed.lane.delete_group(&bed.route, &bed.topic, name).await.unwrap(), "{name}");
    }
}
