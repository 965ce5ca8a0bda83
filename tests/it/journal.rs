//! What only the embedded log promises.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use twinspan::lane::contract::{DurableLane, LaneError, Publisher};
use twinspan::lane::journal::{Journal, JournalError};
use twinspan::message::{Message, Place, Position, Start, Timestamp};
use twinspan::policy::Policy;
use twinspan::policy::table::{Retention, Route, RouteTable};
use twinspan::telemetry::metrics::Metrics;
use twinspan::topic::{Pattern, Topic};

use crate::durable_contract::{SOON, backlog, number, numbered, numbers, read, route, shared, soon};

mod crash;
mod damage;
pub mod disk;
mod full;
mod groups;

fn topic(name: &str) -> Topic {
    Topic::parse(name).unwrap()
}

fn for_ever() -> Arc<Route> {
    Arc::new(route("all", ">", Retention::default()))
}

fn policy(retention: Retention) -> Policy {
    Policy::new(RouteTable::new([route("all", ">", retention)]))
}

fn open(dir: &Path) -> Result<Arc<Journal>, JournalError> {
    Journal::open(dir, policy(Retention::default()), SOON, Arc::new(Metrics::new()))
}

fn open_keeping(dir: &Path, bytes: u64) -> (Arc<Journal>, Arc<Route>) {
    let retention = Retention { age: None, size: Some(bytes) };
    let lane = Journal::open(dir, policy(retention), SOON, Arc::new(Metrics::new())).unwrap();
    (lane, Arc::new(route("all", ">", retention)))
}

/// The next message in line, waited for.
async fn append(lane: &Journal, route: &Arc<Route>, topic: &Topic, n: usize) -> Result<Position, LaneError> {
    soon(lane.append(route, topic, numbered(n), Publisher::default()).await?).await
}

async fn append_all(lane: &Journal, route: &Arc<Route>, topic: &Topic, messages: Vec<Message>) {
    let mut receipts = Vec::new();
    for message in messages {
        receipts.push(lane.append(route, topic, message, Publisher::default()).await.unwrap());
    }
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
}

async fn until(what: &str, mut met: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !met().await {
        assert!(Instant::now() < deadline, "{what} should have come by now");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn of_size(n: usize, bytes: usize, ts: i64) -> Message {
    let mut message = numbered(n);
    let mut payload = n.to_string().into_bytes();
    // Spaces in front, so that the payload still reads as its number once they are trimmed.
    payload.splice(0..0, vec![b'0'; bytes.saturating_sub(payload.len())]);
    message.payload = payload.into();
    message.ts = Timestamp::from_millis(ts);
    message
}

#[tokio::test]
async fn a_log_that_another_twinspan_has_open_is_refused_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let first = open(dir.path()).unwrap();
    let error = open(dir.path()).err().unwrap();
    assert!(matches!(error, JournalError::InUse(_)), "{error:?}");
    assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    assert!(error.to_string().contains("is open in another twinspan"), "{error}");
    first.close().await;
    open(dir.path()).unwrap().close().await;
}

#[tokio::test]
async fn a_file_that_is_no_log_is_refused_and_left_as_it_was() {
    for content in [&b"hello"[..], &[7; 20_000][..], b"redb"] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("journal.redb");
        fs::write(&file, content).unwrap();
        let error = open(dir.path()).err().unwrap();
        assert!(
            matches!(
                error,
                JournalError::NotOurs { .. } | JournalError::Damaged { .. } | JournalError::Open { .. }
            ),
            "{error:?}"
        );
        assert!(error.to_string().contains("journal.redb"), "{error}");
        assert_eq!(fs::read(&file).unwrap(), content);
    }
}

#[tokio::test]
async fn a_database_of_somebody_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let database = redb::Database::create(dir.path().join("journal.redb")).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction.open_table(redb::TableDefinition::<u8, u8>::new("theirs")).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let error = open(dir.path()).err().unwrap();
    assert!(matches!(error, JournalError::NotOurs { .. }), "{error:?}");
}

#[tokio::test]
async fn a_log_whose_making_was_cut_short_is_begun_anew() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("journal.redb.new"), [0; 100]).unwrap();
    open(dir.path()).unwrap().close().await;
    assert!(dir.path().join("journal.redb").exists() && !dir.path().join("journal.redb.new").exists());
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    let error = open(&dir.path().join("file/data")).err().unwrap();
    assert!(matches!(error, JournalError::Directory { .. }), "{error:?}");
    open(&dir.path().join("deep/data")).unwrap().close().await;
}

#[tokio::test]
async fn a_position_of_another_log_is_refused() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (lane, other) = (open(here.path()).unwrap(), open(there.path()).unwrap());
    let (route, topic) = (for_ever(), topic("a"));
    let theirs = append(&other, &route, &topic, 1).await.unwrap();
    let ours = append(&lane, &route, &topic, 1).await.unwrap();
    let Position::Whole(place) = ours else { panic!("one partition") };
    let beyond = Position::Whole(Place { entry: place.entry + 1, ..place });
    let partitioned: Position = "1:1-1-0@5".parse().unwrap();
    for (position, why) in
        [(theirs, "of another log"), (beyond, "beyond the end"), (partitioned, "of another log")]
    {
        let refused = lane.read(&route, &topic, Start::After(position.clone())).await.err();
        assert!(matches!(&refused, Some(LaneError::BadRequest(text)) if text.contains(why)), "{refused:?}");
        let refused = lane.join(&route, &topic, shared("g", Start::After(position), 1)).await.err();
        assert!(matches!(refused, Some(LaneError::BadRequest(_))), "{refused:?}");
    }
}

/// A subscriber of an empty topic can resume as well.
#[tokio::test]
async fn the_tail_of_an_empty_topic_begins_at_a_position() {
    let dir = tempfile::tempdir().unwrap();
    let lane = open(dir.path()).unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    let head = lane.tail(&route, &topic).await.unwrap().follow().1.unwrap();
    append(&lane, &route, &topic, 1).await.unwrap();
    assert_eq!(numbers(&read(&*lane, &route, &topic, Start::After(head)).await), [1]);
}

#[tokio::test]
async fn a_clock_that_steps_back_hides_nothing_from_a_replay_by_time() {
    let dir = tempfile::tempdir().unwrap();
    let lane = open(dir.path()).unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    let times = [100, 200, 200, 150, 120, 200, 300, 250];
    let messages = times.iter().enumerate().map(|(n, ts)| of_size(n, 1, *ts)).collect();
    append_all(&lane, &route, &topic, messages).await;
    for since in [0, 100, 101, 150, 200, 201, 300, 301] {
        let read = read(&*lane, &route, &topic, Start::Time(Timestamp::from_millis(since))).await;
        let first = times.iter().position(|ts| *ts >= since).unwrap_or(times.len());
        assert_eq!(numbers(&read), (first..times.len()).collect::<Vec<_>>(), "since {since}");
    }
}

#[tokio::test]
async fn what_is_too_much_goes_the_oldest_first() {
    let dir = tempfile::tempdir().unwrap();
    let size = 100_000;
    let (lane, kept) = open_keeping(dir.path(), size);
    let topic = topic("a");
    let now = Timestamp::now().as_millis();
    let first = append(&lane, &kept, &topic, 0).await.unwrap();
    // Three messages each millisecond, so that retention cuts into one.
    let messages = (1..1000).map(|n| of_size(n, 1000, now + n as i64 / 3)).collect();
    append_all(&lane, &kept, &topic, messages).await;
    until("the last of it", async || {
        numbers(&read(&*lane, &kept, &topic, Start::Earliest).await).len() as u64 * 1000 <= size
    })
    .await;

    let left = read(&*lane, &kept, &topic, Start::Earliest).await;
    let oldest = number(&left[0]);
    assert_eq!(numbers(&left), (oldest..1000).collect::<Vec<_>>());
    assert!(oldest <= 920, "it keeps about what fits: {oldest}");
    for since in [oldest, oldest + 1, oldest + 2, 990] {
        let time = Timestamp::from_millis(now + since as i64 / 3);
        let read = read(&*lane, &kept, &topic, Start::Time(time)).await;
        let expected = (0..1000).find(|n| n / 3 == since / 3).unwrap().max(oldest);
        assert_eq!(number(&read[0]), expected, "the index follows");
    }

    // Who asks for what is gone is told so, once.
    let mut reader = lane.read(&kept, &topic, Start::After(first)).await.unwrap();
    assert!(reader.skipped() && !reader.skipped());
    let mut since_ever = lane.read(&kept, &topic, Start::Time(Timestamp::from_millis(now))).await.unwrap();
    assert!(since_ever.skipped());
    let mut oldest = lane.read(&kept, &topic, Start::Earliest).await.unwrap();
    assert!(!oldest.skipped());
    let Position::Whole(before) = left[0].stored.as_ref().unwrap().position.clone() else { panic!() };
    let after_removed = Position::Whole(Place { entry: before.entry - 1, ..before });
    let mut complete = lane.read(&kept, &topic, Start::After(after_removed)).await.unwrap();
    assert!(!complete.skipped(), "what was asked for is all there");
}

#[tokio::test]
async fn the_newest_message_stays_however_large_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (lane, kept) = open_keeping(dir.path(), 10);
    let topic = topic("a");
    append_all(&lane, &kept, &topic, (0..3).map(|n| of_size(n, 1000, 5)).collect()).await;
    until("the removal", async || read(&*lane, &kept, &topic, Start::Earliest).await.len() == 1).await;
    assert_eq!(numbers(&read(&*lane, &kept, &topic, Start::Earliest).await), [2]);
}

#[tokio::test]
async fn what_is_too_old_goes_from_topics_that_nobody_publishes_to_by_their_current_route() {
    let dir = tempfile::tempdir().unwrap();
    let lane = open(dir.path()).unwrap();
    let topic = topic("quiet");
    let hour_ago = Timestamp::now().as_millis() - 3_600_000;
    let mut messages: Vec<_> = (0..3000).map(|n| of_size(n, 1, hour_ago + n as i64)).collect();
    messages.extend((3000..3005).map(|n| of_size(n, 1, hour_ago + 3_599_000)));
    append_all(&lane, &for_ever(), &topic, messages).await;
    lane.close().await;

    // Another start, another policy, and nothing published any more.
    let rules = policy(Retention::default());
    let lane = Journal::open(dir.path(), rules.clone(), SOON, Arc::new(Metrics::new())).unwrap();
    assert_eq!(read(&*lane, &for_ever(), &topic, Start::Earliest).await.len(), 3005);
    let half_an_hour = Retention { age: Some(Duration::from_secs(1800)), size: None };
    rules.replace(RouteTable::new([route("all", ">", half_an_hour)]));
    until("the removal", async || read(&*lane, &for_ever(), &topic, Start::Earliest).await.len() == 5).await;

    let second = Retention { age: Some(Duration::from_secs(1)), size: None };
    rules.replace(RouteTable::new([route("all", ">", second)]));
    until("the rest", async || read(&*lane, &for_ever(), &topic, Start::Earliest).await.is_empty()).await;
    let next = append(&lane, &for_ever(), &topic, 7).await.unwrap();
    let Position::Whole(place) = next else { panic!("one partition") };
    assert_eq!(place.entry, 3006, "numbers go on where they were");
    assert_eq!(numbers(&read(&*lane, &for_ever(), &topic, Start::Earliest).await), [7]);
    assert_eq!(lane.topics(&Pattern::parse(">").unwrap()).await.unwrap(), [topic]);
}

#[tokio::test]
async fn retention_moves_a_group_that_lags_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (lane, kept) = open_keeping(dir.path(), 20_000);
    let topic = topic("a");
    let member = lane.join(&kept, &topic, shared("g", Start::Earliest, 3)).await.unwrap();
    let now = Timestamp::now().as_millis();
    append_all(&lane, &kept, &topic, (0..500).map(|n| of_size(n, 1000, now)).collect()).await;
    let mut oldest = 0;
    until("the removal", async || {
        let left = read(&*lane, &kept, &topic, Start::Earliest).await;
        oldest = number(&left[0]);
        left.len() <= 20
    })
    .await;
    let left = 500 - oldest as u64;
    // The commit can be read a moment before the group knows of it.
    until("the backlog without what is gone", async || backlog(&*lane, &kept, &topic).await == left).await;
    let mut seen = Vec::new();
    while !seen.contains(&499) {
        let handed: Vec<_> = soon(member.next()).await.unwrap().into_iter().map(Result::unwrap).collect();
        seen.extend(handed.iter().map(|handed| number(&handed.envelope)));
        member.ack(handed.iter().map(|handed| handed.tag).collect()).await.unwrap();
    }
    assert!((oldest..500).all(|n| seen.contains(&n)), "everything that is left came: {seen:?}");
    assert_eq!(backlog(&*lane, &kept, &topic).await, 0);
}

#[tokio::test]
async fn what_a_publisher_was_told_is_there_for_it_to_read_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let lane = open(dir.path()).unwrap();
    let (route, topic) = (for_ever(), topic("a"));
    for n in 0..50 {
        append(&lane, &route, &topic, n).await.unwrap();
        assert_eq!(numbers(&read(&*lane, &route, &topic, Start::Last(1)).await), [n]);
    }
}

#[tokio::test]
async fn what_is_removed_is_gone_for_good_and_the_rest_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    let lane = open(dir.path()).unwrap();
    let (topic, other) = (topic("a"), topic("b"));
    // More than one commit removes.
    let mut receipts = Vec::new();
    for n in 0..5000 {
        receipts.push(lane.keep(&topic, of_size(n, 100, 7)).await.unwrap());
    }
    let mut places = Vec::new();
    for receipt in receipts {
        places.push(soon(receipt).await.unwrap().place(0).unwrap());
    }
    soon(lane.keep(&other, numbered(9)).await.unwrap()).await.unwrap();
    let other_bytes = lane.holding(&other).bytes;
    assert_eq!(lane.live_bytes(), lane.holding(&topic).bytes + other_bytes);

    soon(lane.remove(&topic, places[4499])).await.unwrap();
    soon(lane.remove(&topic, places[10])).await.unwrap();
    soon(lane.remove(&self::topic("never"), places[10])).await.unwrap();
    let held = lane.holding(&topic);
    assert_eq!((held.messages, held.oldest), (500, Some(Timestamp::from_millis(7))));
    assert!((500 * 100..500 * 200).contains(&held.bytes), "{}", held.bytes);
    assert_eq!(lane.live_bytes(), held.bytes + other_bytes);
    lane.close().await;

    let lane = open(dir.path()).unwrap();
    assert_eq!(
        numbers(&read(&*lane, &for_ever(), &topic, Start::Earliest).await),
        (4500..5000).collect::<Vec<_>>()
    );
    assert_eq!(lane.live_bytes(), lane.holding(&topic).bytes + other_bytes);
    soon(lane.remove(&topic, places[4999])).await.unwrap();
    assert_eq!(lane.holdings().iter().map(|held| held.topic.clone()).collect::<Vec<_>>(), [other]);
    assert_eq!(lane.live_bytes(), other_bytes);
    // Its numbers go on.
    let next = append(&lane, &for_ever(), &topic, 5000).await.unwrap();
    assert_eq!(next.place(0).unwrap().entry, 5001);
}
