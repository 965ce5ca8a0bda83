//! What happens when the broker does not.

use std::collections::BTreeSet;

use twinspan::lane::contract::{LaneError, Publisher};
use twinspan::message::Start;

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
