//! What happens when the broker does not.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::task::JoinSet;
use twinspan::lane::contract::{LaneError, Publisher};
use twinspan::message::{Draft, Start};

use super::*;
use crate::brokers::Options;
use crate::durable_contract::{hear, numbers, read};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_broker_is_noticed_within_three_seconds_and_the_lane_heals_when_it_thaws() {
    if left_out() {
        return;
    }
    let broker = Broker::pulsar(&Options::default()).await;
    let bed = Bed::on(&broker).await;
    bed.publish(0).await;
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    broker.stop();
    let under_way = bed.lane.append(&bed.route, &bed.topic, numbered(1), Publisher::default()).await.unwrap();
    let took = is_down(&*bed.lane).await;
    assert!(took < Duration::from_secs(3), "noticed after {took:?}");
    let asked = Instant::now();
    let refused = bed
        .lane
        .append(&bed.route, &bed.topic, numbered(2), Publisher::default())
        .await
        .map(drop)
        .unwrap_err();
    assert!(matches!(refused, LaneError::Unavailable(_)), "{refused:?}");
    assert!(bed.lane.probe().await.is_err());
    assert!(asked.elapsed() < Duration::from_millis(1100), "{:?}", asked.elapsed());
    // What was sent has an answer within its time, and it never says that it failed: it may be stored.
    let outcome = timeout(Duration::from_secs(11), under_way).await.expect("the publish timeout holds");
    assert!(matches!(outcome, Err(LaneError::OutcomeUnknown(_))), "{outcome:?}");

    broker.cont();
    is_up(&*bed.lane).await;
    bed.publish(3).await;
    let mut heard = Vec::new();
    while !heard.contains(&3) {
        heard.extend(numbers(&soon(cursor.next(99)).await.unwrap()));
    }
    heard.retain(|n| *n != 1);
    assert_eq!(heard, [3], "each once, whatever the tail went through; the unknown one may be there");
}

/// Publishers that do not wait for receipts wait for room in the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_under_way_to_a_frozen_broker_is_bounded_in_bytes() {
    const MIB: usize = 1 << 20;
    if left_out() {
        return;
    }
    let broker = Broker::pulsar(&Options::default()).await;
    let settings = DurableSettings { publish_timeout: Duration::from_secs(30), ..settings(&broker) };
    let bed = Bed::with(route("t.>", "persistent://public/default/{topic}"), settings).await;
    let topics: Vec<_> = (0..4).map(|n| topic(&format!("{}.{n}", bed.topic))).collect();
    for topic in &topics {
        let receipt = bed.lane.append(&bed.route, topic, numbered(0), Publisher::default()).await.unwrap();
        soon(receipt).await.unwrap();
    }
    broker.stop();
    let large = || Draft { payload: vec![b'x'; MIB - 1000].into(), ..Draft::default() }.accept();
    let (mut publishing, under_way) = (JoinSet::new(), Arc::new(AtomicUsize::new(0)));
    for n in 0..200 {
        let (lane, route, topic) = (bed.lane.clone(), bed.route.clone(), topics[n % 4].clone());
        let under_way = under_way.clone();
        publishing.spawn(async move {
            let receipt = lane.append(&route, &topic, large(), Publisher::default()).await?;
            under_way.fetch_add(1, Ordering::SeqCst);
            receipt.await
        });
    }
    // None has a receipt, so all that have found a place are under way.
    let state = bed.lane.state();
    let mut most = 0;
    while state.borrow().is_up() {
        most = under_way.load(Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!((32..=64).contains(&most), "{most} MiB are under way");
    broker.cont();
    is_up(&*bed.lane).await;
    while let Some(outcome) = timeout(SOON * 3, publishing.join_next()).await.unwrap() {
        let outcome = outcome.unwrap();
        let is_told =
            matches!(outcome, Ok(_) | Err(LaneError::Unavailable(_) | LaneError::OutcomeUnknown(_)));
        assert!(is_told, "{outcome:?}");
    }
    // There is room again.
    soon(bed.lane.append(&bed.route, &topics[0], large(), Publisher::default()).await.unwrap())
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_moves_goes_on_without_loss_or_repetition() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let bed = Bed::on(broker).await;
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    let member = bed.join(Start::Earliest).await;
    let path = format!("persistent/public/default/{}/unload", bed.topic);
    for round in 0..4 {
        let mut receipts = Vec::new();
        for n in round * 50..(round + 1) * 50 {
            receipts.push(
                bed.lane.append(&bed.route, &bed.topic, numbered(n), Publisher::default()).await.unwrap(),
            );
        }
        admin(broker, Method::PUT, &path, Value::Null).await;
        for receipt in receipts {
            soon(receipt).await.unwrap();
        }
        let held = take(&*member, 50).await;
        member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
    }
    let heard = numbers(&hear(&mut cursor, 200).await);
    let stored = numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await);
    assert_eq!(heard, stored[..heard.len()], "the tail is what is stored, each once, in its order");
    let each: BTreeSet<_> = stored.into_iter().collect();
    assert_eq!(each, (0..200).collect());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_terminated_topic_is_read_to_its_end_and_refuses_what_would_come_behind() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let bed = Bed::on(broker).await;
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    let member = bed.join(Start::Earliest).await;
    for n in 0..3 {
        bed.publish(n).await;
    }
    admin(broker, Method::POST, &format!("persistent/public/default/{}/terminate", bed.topic), Value::Null)
        .await;

    let asked = Instant::now();
    let refused = match bed.lane.append(&bed.route, &bed.topic, numbered(3), Publisher::default()).await {
        Ok(receipt) => soon(receipt).await.unwrap_err(),
        Err(error) => error,
    };
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert!(matches!(&refused, LaneError::BadRequest(said) if said.contains("erminated")), "{refused:?}");
    let held = take(&*member, 3).await;
    assert_eq!(sorted(&held), [0, 1, 2]);
    member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
    let heard = numbers(&hear(&mut cursor, 3).await);
    assert_eq!(heard, [0, 1, 2]);
    assert_eq!(numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await), [0, 1, 2]);
    assert_quiet(&*member).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_was_deleted_goes_on_for_everybody_once_it_is_published_to_again() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let bed = Bed::on(broker).await;
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    let member = bed.join(Start::Earliest).await;
    bed.publish(0).await;
    let held = take(&*member, 1).await;
    member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
    assert_eq!(numbers(&soon(cursor.next(99)).await.unwrap()), [0]);

    let path = format!("persistent/public/default/{}?force=true", bed.topic);
    admin(broker, Method::DELETE, &path, Value::Null).await;
    bed.publish(1).await;
    bed.publish(2).await;
    assert_eq!(sorted(&take(&*member, 2).await), [1, 2], "the group has what is new from its beginning");
    let heard = numbers(&hear(&mut cursor, 2).await);
    assert_eq!(heard, [1, 2]);
}
