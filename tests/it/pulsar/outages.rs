//! What happens when the broker does not.

use std::collections::BTreeSet;
use std::sync::Mutex;

use tokio::task::JoinSet;
use twinspan::lane::contract::{LaneError, Publisher};
use twinspan::message::Start;

use super::*;
use crate::brokers::Options;
use crate::durable_contract::{numbers, read, shared};

/// Publishes until told to stop, and returns what was confirmed.
fn publisher(bed: &Bed, stop: tokio::sync::watch::Receiver<bool>) -> JoinSet<BTreeSet<usize>> {
    let mut publishers = JoinSet::new();
    for publisher in 0..2 {
        let (lane, route, topic, stop) =
            (bed.lane.clone(), bed.route.clone(), bed.topic.clone(), stop.clone());
        publishers.spawn(async move {
            let mut confirmed = BTreeSet::new();
            for n in (publisher * 1_000_000).. {
                if *stop.borrow() {
                    break;
                }
                match lane.append(&route, &topic, numbered(n), Publisher::default()).await {
                    Ok(receipt) => match receipt.await {
                        Ok(_) => {
                            confirmed.insert(n);
                        }
                        Err(LaneError::OutcomeUnknown(_) | LaneError::Unavailable(_)) => {}
                        Err(error) => panic!("{error:?}"),
                    },
                    Err(LaneError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                    Err(error) => panic!("{error:?}"),
                }
            }
            confirmed
        });
    }
    publishers
}

/// By the tail and by the group.
type Seen = Mutex<[BTreeSet<usize>; 2]>;

/// Collects what a tail and a member bring from now on; the member acknowledges everything.
async fn subscribers(bed: &Bed) -> (Arc<Seen>, JoinSet<()>) {
    let seen = Arc::new(Seen::default());
    let mut tasks = JoinSet::new();
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    let heard = seen.clone();
    tasks.spawn(async move {
        loop {
            let batch = cursor.next(100).await.expect("a tail never ends, however the broker does");
            heard.lock().unwrap()[0].extend(numbers(&batch));
        }
    });
    let member = bed.lane.join(&bed.route, &bed.topic, shared("billing", Start::Earliest, 50)).await.unwrap();
    let taken = seen.clone();
    tasks.spawn(async move {
        loop {
            let handed = member.next().await.expect("a group never ends, however the broker does");
            let handed: Vec<_> = handed.into_iter().map(Result::unwrap).collect();
            taken.lock().unwrap()[1].extend(sorted(&handed));
            // While the broker is away it cannot be confirmed; the deliveries come again then.
            let _ = member.ack(handed.iter().map(|handed| handed.tag).collect()).await;
        }
    });
    (seen, tasks)
}

async fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + SOON * 2;
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_under_load_loses_nothing_confirmed_and_everybody_goes_on() {
    if left_out() {
        return;
    }
    let mut broker = Broker::pulsar(&Options::default()).await;
    let bed = Bed::on(&broker).await;
    bed.publish(999_999_999).await;
    let (seen, _subscribers) = subscribers(&bed).await;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut publishers = publisher(&bed, stopped);
    let count = |seen: &Seen| {
        let seen = seen.lock().unwrap();
        seen[0].len().min(seen[1].len())
    };
    until("messages flow", || count(&seen) > 200).await;

    broker.kill();
    let took = is_down(&*bed.lane).await;
    assert!(took < Duration::from_secs(3), "noticed after {took:?}");
    let refused = Instant::now();
    let error = bed
        .lane
        .append(&bed.route, &bed.topic, numbered(0), Publisher::default())
        .await
        .map(drop)
        .unwrap_err();
    assert!(matches!(error, LaneError::Unavailable(_)) && refused.elapsed() < Duration::from_millis(100));
    broker.restart().await;
    is_up(&*bed.lane).await;

    let before = count(&seen);
    until("messages flow again", || count(&seen) > before + 200).await;
    stop.send_replace(true);
    let mut confirmed = BTreeSet::new();
    while let Some(of_one) = publishers.join_next().await {
        confirmed.extend(of_one.unwrap());
    }
    let stored = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
    let stored: BTreeSet<_> = numbers(&stored).into_iter().collect();
    let lost: Vec<_> = confirmed.difference(&stored).collect();
    assert_eq!(lost, Vec::<&usize>::new(), "confirmed and not stored");
    for (who, what) in [(0, "the tail"), (1, "the group")] {
        let missing = || confirmed.difference(&seen.lock().unwrap()[who]).copied().collect::<Vec<_>>();
        let deadline = Instant::now() + SOON;
        while !missing().is_empty() {
            assert!(Instant::now() < deadline, "{what} misses {:?}", missing());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

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
    let mut heard = Vec::new();
    while heard.len() < 200 {
        heard.extend(numbers(&soon(cursor.next(99)).await.unwrap()));
    }
    let stored = numbers(&read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await);
    assert_eq!(heard, stored[..heard.len()], "the tail is what is stored, each once, in its order");
    let each: BTreeSet<_> = stored.into_iter().collect();
    assert_eq!(each, (0..200).collect());
}
