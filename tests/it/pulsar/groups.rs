//! Groups on topics whose native publishers batch: an entry is many messages there.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::Mutex;

use super::producing::through;
use super::tap::Tap;
use super::*;
use crate::proxy::Proxy;
use serde_json::json;
use twinspan::lane::contract::{LaneError, Publisher};
use twinspan::message::Message;

#[tokio::test]
async fn what_is_acknowledged_of_a_batch_is_done_and_the_others_come_again() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    bed.batch(0..10).await;
    let member = bed.join(Start::Earliest).await;
    let held = take(&*member, 10).await;
    member.ack(vec![tag(&held, 0), tag(&held, 7)]).await.unwrap();
    drop(member);

    let member = bed.join(Start::Earliest).await;
    let held = take(&*member, 8).await;
    assert_eq!(sorted(&held), [1, 2, 3, 4, 5, 6, 8, 9]);
    assert_quiet(&*member).await;
    member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
    drop(member);

    let member = bed.join(Start::Earliest).await;
    bed.batch(10..12).await;
    assert_eq!(sorted(&take(&*member, 2).await), [10, 11], "the first batch is finished");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_acknowledged_as_the_connection_is_lost_is_done_on_the_next_one() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let bed = through(&proxied, "persistent://public/default/{topic}").await;
    for n in 0..3 {
        bed.publish(n).await;
    }
    let member = bed.join(Start::Earliest).await;
    let held = take(&*member, 3).await;
    {
        // The first is on its way and does not arrive; the second is acknowledged meanwhile.
        proxied.1.hold();
        let mut first = pin!(member.ack(vec![tag(&held, 0)]));
        assert!(timeout(Duration::from_millis(100), &mut first).await.is_err());
        let mut second = pin!(member.ack(vec![tag(&held, 1)]));
        assert!(timeout(Duration::from_millis(100), &mut second).await.is_err());
        proxied.1.cut();
        proxied.1.resume();
        let (first, second) = soon(async { tokio::join!(first, second) }).await;
        assert!(first.is_ok() && second.is_ok(), "{first:?}, {second:?}");
    }
    drop(member);

    let member = bed.join(Start::Earliest).await;
    assert_eq!(sorted(&take(&*member, 1).await), [2]);
    assert_quiet(&*member).await;
}

#[tokio::test]
async fn what_is_rejected_of_a_batch_comes_again_without_the_others() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    bed.batch(0..5).await;
    let member = bed.join(Start::Earliest).await;
    let held = take(&*member, 5).await;
    member.ack(vec![tag(&held, 4)]).await.unwrap();
    member.nack(vec![tag(&held, 2)], Duration::from_millis(50)).await.unwrap();
    let again = take(&*member, 1).await;
    assert_eq!((sorted(&again), again[0].attempt), (vec![2], 2));
    assert_quiet(&*member).await;

    // Once it is the only one left, the broker has it back, and whoever gets it learns how often it was tried.
    member.ack([0, 1, 3].map(|n| tag(&held, n)).into()).await.unwrap();
    member.nack(vec![again[0].tag], Duration::from_millis(50)).await.unwrap();
    let third = take(&*member, 1).await;
    assert_eq!((sorted(&third), third[0].attempt), (vec![2], 3));
    assert_quiet(&*member).await;
}

#[tokio::test]
async fn a_rejected_message_can_go_to_another_member() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let first = bed.lane.join(&bed.route, &bed.topic, shared("billing", Start::Earliest, 1)).await.unwrap();
    bed.publish(0).await;
    let held = take(&*first, 1).await;
    let other = bed.join(Start::Earliest).await;
    // With its one place taken by the next, the first member has no room when the rejected one comes back.
    first.nack(vec![held[0].tag], Duration::from_secs(2)).await.unwrap();
    let mut publishing = 1;
    let taken = loop {
        bed.publish(publishing).await;
        publishing += 1;
        if let Ok(taken) = timeout(Duration::from_millis(50), first.next()).await {
            break taken.unwrap().remove(0).unwrap();
        }
    };
    assert_ne!(number(&taken.envelope), 0);
    let again = loop {
        let handed = soon(other.next()).await.unwrap();
        let found = handed.into_iter().map(Result::unwrap).find(|handed| number(&handed.envelope) == 0);
        if let Some(again) = found {
            break again;
        }
    };
    assert_eq!(again.attempt, 2);
}

#[tokio::test]
async fn a_batch_larger_than_the_prefetch_is_handed_out_by_the_prefetch() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    bed.batch(0..20).await;
    let member = bed.lane.join(&bed.route, &bed.topic, shared("billing", Start::Earliest, 3)).await.unwrap();
    let mut seen = Vec::new();
    while seen.len() < 20 {
        let held = take(&*member, 3.min(20 - seen.len())).await;
        assert!(held.len() <= 3);
        seen.extend(sorted(&held));
        member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
    }
    assert_eq!(seen, (0..20).collect::<Vec<_>>());
    bed.publish(20).await;
    assert_eq!(sorted(&take(&*member, 1).await), [20], "every permit was given back");
}

#[tokio::test]
async fn a_group_of_another_kind_is_refused_as_busy() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let mut exclusive = bed
        .native
        .consumer()
        .with_topic(bed.physical())
        .with_subscription("billing")
        .with_subscription_type(pulsar::SubType::Exclusive)
        .build::<Vec<u8>>()
        .await
        .unwrap();
    let refused = bed
        .lane
        .join(&bed.route, &bed.topic, shared("billing", Start::Latest, 10))
        .await
        .map(drop)
        .unwrap_err();
    assert!(matches!(refused, twinspan::lane::contract::LaneError::GroupBusy(_)), "{refused:?}");
    exclusive.close().await.unwrap();
}

#[tokio::test]
async fn a_new_group_begins_inside_a_batch_at_a_time_or_with_the_newest() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    bed.batch(0..6).await;
    let read = crate::durable_contract::read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
    let starts = [
        ("after", Start::After(position(&read[2])), 3..6),
        ("last", Start::Last(2), 4..6),
        ("time", Start::Time(read[0].message.ts), 0..6),
    ];
    for (group, start, expected) in starts {
        let member = bed.lane.join(&bed.route, &bed.topic, shared(group, start, 100)).await.unwrap();
        assert_eq!(sorted(&take(&*member, expected.len()).await), expected.collect::<Vec<_>>(), "{group}");
        assert_quiet(&*member).await;
    }
}

#[tokio::test]
async fn in_every_mode_exactly_nine_of_ten_come_again_and_the_report_counts_messages() {
    if left_out() {
        return;
    }
    for mode in GroupMode::ALL {
        let bed = Bed::shared().await;
        bed.batch(0..10).await;
        let member = bed.join_as(mode).await;
        let held = take(&*member, 10).await;
        member.ack(vec![tag(&held, 3)]).await.unwrap();
        let report = bed.lane.groups(&bed.route, &bed.topic).await.unwrap().remove(0);
        assert_eq!((report.mode, report.backlog, report.members), (Some(mode), 9, 1));
        drop(member);

        let member = bed.join_as(mode).await;
        assert_eq!(sorted(&take(&*member, 9).await), [0, 1, 2, 4, 5, 6, 7, 8, 9], "{mode:?}");
        assert_quiet(&*member).await;
    }
}

/// The batches of the backlog are not those of what was consumed before, so the topic's average would tell nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backlog_of_thousands_of_entries_is_told_in_messages_whatever_their_batches() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let member = bed.join(Start::Earliest).await;
    // A key of its own keeps each from the batches of the others. No more at once than a busy machine stores in time.
    let alone = async |numbers: std::ops::Range<usize>| {
        for first in numbers.clone().step_by(500) {
            let mut receipts = Vec::new();
            for n in first..numbers.end.min(first + 500) {
                let message = Message { key: Some(n.to_string()), ..numbered(n) };
                let sent = bed.lane.append(&bed.route, &bed.topic, message, Publisher::default()).await;
                receipts.push(sent.unwrap());
            }
            futures_util::future::try_join_all(receipts).await.unwrap();
        }
    };
    let backlog = async || bed.lane.groups(&bed.route, &bed.topic).await.unwrap().remove(0).backlog;
    alone(0..1500).await;
    let mut left = 1500;
    while left > 0 {
        let held = take(&*member, 1).await;
        left -= held.len();
        member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
    }
    assert_eq!(backlog().await, 0);
    drop(member);

    let options = ProducerOptions { batch_size: Some(4), ..Default::default() };
    let producer = bed.native.producer().with_topic(bed.physical()).with_options(options);
    let mut producer = producer.build().await.unwrap();
    let mut sent = Vec::new();
    for n in 0..4 * 1100 {
        let message = producer::Message { payload: n.to_string().into(), ..Default::default() };
        sent.push(producer.send_non_blocking(message).await.unwrap());
    }
    soon(futures_util::future::try_join_all(sent)).await.unwrap();
    assert_eq!(backlog().await, 4 * 1100, "1,100 entries");

    alone(0..12_000).await;
    let (told, stored) = (backlog().await, 4 * 1100 + 12_000);
    assert!(
        told.abs_diff(stored) * 10 <= stored,
        "{told} for {stored} in more entries than are looked through"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_is_sought_from_elsewhere_gets_everything_again_acknowledged_or_not() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    for mode in GroupMode::ALL {
        let bed = Bed::on(broker).await;
        let member = bed.join_as(mode).await;
        for n in 0..10 {
            bed.publish(n).await;
        }
        let held = take(&*member, 10).await;
        member.ack(held[..7].iter().map(|handed| handed.tag).collect()).await.unwrap();
        let earliest = json!({ "ledgerId": -1, "entryId": -1, "partitionIndex": -1, "batchIndex": -1 });
        let path = format!("persistent/public/default/{}/subscription/billing/resetcursor", bed.topic);
        admin(broker, Method::POST, &path, earliest).await;
        let again = take(&*member, 10).await;
        assert_eq!(sorted(&again), (0..10).collect::<Vec<_>>(), "{mode:?}");
        let attempts: Vec<_> = again.iter().map(|handed| handed.attempt).collect();
        assert_eq!(attempts, [2; 10], "{mode:?}: each was handed out before");
        member.ack(again.iter().map(|handed| handed.tag).collect()).await.unwrap();
        assert_quiet(&*member).await;
    }
}

#[tokio::test]
async fn what_is_rejected_of_a_batch_brings_nobody_else_what_a_member_still_holds() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let holder = bed.join(Start::Earliest).await;
    // To whom the broker would give a batch again is its choice, each time anew.
    let batches = (0..6).map(|batch| batch * 5..(batch + 1) * 5);
    let mut held = Vec::new();
    for numbers in batches.clone() {
        bed.batch(numbers).await;
        held.extend(take(&*holder, 5).await);
    }
    let other = bed.join(Start::Earliest).await;
    let rejected: Vec<_> = batches.map(|batch| batch.start + 2).collect();
    let tags = rejected.iter().map(|n| tag(&held, *n)).collect();
    holder.nack(tags, Duration::from_millis(50)).await.unwrap();
    assert_eq!(sorted(&take(&*holder, rejected.len()).await), rejected);
    assert_quiet(&*other).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_held_when_it_left_comes_again_counted_in_every_mode() {
    if left_out() {
        return;
    }
    for mode in GroupMode::ALL {
        let bed = Bed::shared().await;
        bed.batch(0..3).await;
        bed.publish(3).await;
        for attempt in 1..=3 {
            let member = bed.join_as(mode).await;
            let held = take(&*member, 4).await;
            let attempts: Vec<_> = held.iter().map(|handed| handed.attempt).collect();
            assert_eq!((sorted(&held), attempts), ((0..4).collect(), vec![attempt; 4]), "{mode:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_holds_when_its_topic_moves_is_not_handed_to_it_twice() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    for mode in GroupMode::ALL {
        let bed = Bed::on(broker).await;
        let member = bed.join_as(mode).await;
        bed.batch(0..3).await;
        let mut held = take(&*member, 3).await;
        member.nack(vec![tag(&held, 1)], Duration::from_millis(1500)).await.unwrap();
        let path = format!("persistent/public/default/{}/unload", bed.topic);
        admin(broker, Method::PUT, &path, Value::Null).await;
        bed.publish(3).await;
        held.extend(take(&*member, 1).await);
        assert_eq!(sorted(&held), [0, 1, 2, 3], "{mode:?}: the new one only");
        let again = take(&*member, 1).await;
        assert_eq!((sorted(&again), again[0].attempt), (vec![1], 2), "{mode:?}: when its delay is over");
        held.extend(again);
        member.ack(held.iter().map(|handed| handed.tag).collect()).await.unwrap();
        assert_quiet(&*member).await;
        drop(member);
        assert_eq!(bed.lane.groups(&bed.route, &bed.topic).await.unwrap().remove(0).backlog, 0, "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_acknowledgement_from_before_a_seek_is_none_of_what_came_after_it() {
    if left_out() {
        return;
    }
    for mode in GroupMode::ALL {
        let bed = Bed::shared().await;
        let member = bed.join_as(mode).await;
        bed.batch(0..5).await;
        let before = take(&*member, 5).await;
        bed.lane.seek(&bed.route, &bed.topic, "billing", Start::Earliest).await.unwrap();
        let after = take(&*member, 5).await;
        member.ack(before.iter().map(|handed| handed.tag).collect()).await.unwrap();
        let backlog = async || bed.lane.groups(&bed.route, &bed.topic).await.unwrap().remove(0).backlog;
        assert_eq!(backlog().await, 5, "{mode:?}");
        member.ack(after.iter().map(|handed| handed.tag).collect()).await.unwrap();
        assert_eq!(backlog().await, 0, "{mode:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_place_that_was_lost_is_waited_for_and_given_up_once_another_keeps_it() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let tap = Tap::on(broker, |_, _, frame| vec![frame]).await;
    let direct = Bed::on(broker).await;
    let policy = Policy::new(RouteTable::new([(*direct.route).clone()]));
    const BUSY_FOR: Duration = Duration::from_secs(4);
    let lane =
        PulsarLane::open_with(&tap.settings(broker), policy, Arc::new(Metrics::new()), BUSY_FOR).unwrap();
    is_up(&*lane).await;
    let bed = Bed { lane, ..direct.clone() };
    let member = bed.join_as(GroupMode::Exclusive).await;
    let lose = async || {
        tap.close();
        let joining = || Joining { mode: GroupMode::Exclusive, ..shared("billing", Start::Earliest, 100) };
        let other = soon(async {
            loop {
                match direct.lane.join(&bed.route, &bed.topic, joining()).await {
                    Ok(other) => return other,
                    Err(LaneError::GroupBusy(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                    Err(error) => panic!("{error:?}"),
                }
            }
        })
        .await;
        tap.open();
        other
    };

    let other = lose().await;
    let still = timeout(BUSY_FOR / 4, member.next()).await;
    assert!(still.is_err(), "another has the place, and may go: {still:?}");
    drop(other);
    direct.publish(1).await;
    assert_eq!(sorted(&take(&*member, 1).await), [1], "the place was free again in time");

    let _other = lose().await;
    let began = Instant::now();
    let over = timeout(BUSY_FOR + SOON, member.next()).await.expect("it is given up").unwrap_err();
    assert!(matches!(&over, LaneError::GroupBusy(said) if said.contains("4s")), "{over:?}");
    assert!(began.elapsed() > BUSY_FOR / 2, "given up after {:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_member_holds_takes_room_of_its_prefetch_whatever_becomes_of_its_connection() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    for cut in [false, true] {
        let wire: Arc<Mutex<BTreeMap<u64, (u32, usize)>>> = Arc::default();
        let seen = wire.clone();
        // Each consumer's permits and messages, by its number.
        let tap = Tap::on(broker, move |_, command, frame| {
            let mut seen = seen.lock().unwrap();
            if let Some(flow) = &command.flow {
                seen.entry(flow.consumer_id).or_default().0 += flow.message_permits;
            }
            if let Some(message) = &command.message {
                seen.entry(message.consumer_id).or_default().1 += 1;
            }
            vec![frame]
        })
        .await;
        let bed = tap.bed(broker).await;
        let direct = Bed { lane: Bed::on(broker).await.lane, ..bed.clone() };
        let join = shared("billing", Start::Earliest, 10);
        let member = bed.lane.join(&bed.route, &bed.topic, join).await.unwrap();
        for n in 0..10 {
            direct.publish(n).await;
        }
        let mut held = take(&*member, 10).await;
        let other = direct.join(Start::Earliest).await;
        wire.lock().unwrap().clear();
        if cut {
            tap.close();
        } else {
            let path = format!("persistent/public/default/{}/unload", bed.topic);
            admin(broker, Method::PUT, &path, Value::Null).await;
        }
        let both = async || bed.lane.groups(&bed.route, &bed.topic).await.is_ok_and(|of| of[0].members == 2);
        // What it holds goes to the other, and so does what is new.
        let others = take(&*other, 10).await;
        tap.open();
        soon(async { while !both().await {} }).await;
        for n in 10..30 {
            direct.publish(n).await;
        }
        let others: Vec<_> = others.into_iter().chain(take(&*other, 20).await).collect();
        assert_eq!(sorted(&others), (0..30).collect::<Vec<_>>(), "cut: {cut}");
        let came = wire.lock().unwrap().clone();
        assert!(came.values().all(|counted| *counted == (0, 0)), "cut: {cut}: it has no room: {came:?}");

        // With three settled it has room for three, and gets no more when it is the only one.
        member.ack(held.drain(..3).map(|handed| handed.tag).collect()).await.unwrap();
        drop(other);
        let new = take(&*member, 3).await;
        assert_quiet(&*member).await;
        assert!(new.iter().all(|handed| number(&handed.envelope) >= 10), "cut: {cut}: {:?}", sorted(&new));
        held.extend(new);
        let mut left = 27;
        while !held.is_empty() {
            assert!(held.len() <= 10);
            left -= held.len();
            member.ack(held.drain(..).map(|handed| handed.tag).collect()).await.unwrap();
            if left > 0 {
                held = take(&*member, 1).await;
            }
        }
        assert_quiet(&*member).await;
        assert_eq!(bed.lane.groups(&bed.route, &bed.topic).await.unwrap()[0].backlog, 0);
    }
}
