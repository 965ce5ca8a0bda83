//! The promises of `DurableLane`, kept for every carrier: one function each, asked of a lane that it knows nothing
//! else about. Positions are opaque here, and nothing is asked that only one carrier can do.
//!
//! A carrier joins with a module that says how to open a lane on a ground of its own, and `promises!(ground)`.

use std::collections::{BTreeSet, HashMap};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::{Instant, timeout};
use twinspan::lane::contract::{DurableLane, Handed, Joining, LaneError, LaneState, Member, Publisher};
use twinspan::lane::tail::Cursor;
use twinspan::message::{
    Draft, Envelope, GroupMode, Lane, Lanes, Message, MessageId, Position, Start, Timestamp,
};
use twinspan::policy::table::{
    Compression, Declare, Live, OnOutage, Overflow, PulsarSchema, Redelivery, Retention, Route, Template,
};
use twinspan::topic::{Pattern, Topic};

pub mod groups;

/// Whatever takes longer has failed.
pub const SOON: Duration = Duration::from_secs(20);
/// How long nothing has to come before nothing comes.
const QUIET: Duration = Duration::from_millis(300);

/// A lane, how to open it again on what it stored, and topics that nobody has used.
pub struct Ground {
    pub lane: Arc<dyn DurableLane>,
    pub route: Arc<Route>,
    /// Opens another lane on the same storage, as a restarted bridge would.
    pub open: Box<dyn Fn() -> BoxFuture<'static, Arc<dyn DurableLane>> + Send + Sync>,
}

impl Ground {
    fn topic(&self) -> Topic {
        Topic::parse(&format!("contract.{}", MessageId::new())).unwrap()
    }

    async fn restart(&mut self) {
        self.lane.close().await;
        self.lane = (self.open)().await;
    }

    /// Stores messages of these payloads, one after the other.
    async fn store(&self, topic: &Topic, payloads: impl IntoIterator<Item = usize>) -> Vec<Position> {
        let mut receipts = Vec::new();
        for payload in payloads {
            receipts.push(
                self.lane.append(&self.route, topic, numbered(payload), Publisher::default()).await.unwrap(),
            );
        }
        let mut positions = Vec::new();
        for receipt in receipts {
            positions.push(receipt.await.unwrap());
        }
        positions
    }

    async fn read(&self, topic: &Topic, start: Start) -> Vec<Arc<Envelope>> {
        read(&*self.lane, &self.route, topic, start).await
    }

    async fn join(&self, topic: &Topic, start: Start, prefetch: u32) -> Box<dyn Member> {
        self.lane.join(&self.route, topic, shared("billing", start, prefetch)).await.unwrap()
    }
}

pub fn route(name: &str, pattern: &str, retention: Retention) -> Route {
    Route {
        name: name.into(),
        pattern: Pattern::parse(pattern).unwrap(),
        lane: Lanes::DURABLE,
        nats: Template::parse("{topic}").unwrap(),
        pulsar: Template::parse("persistent://public/default/{topic}").unwrap(),
        history: 100,
        retain: false,
        queue: 100,
        overflow: Overflow::DropOldest,
        live: Live::AfterStore,
        outage: OnOutage::Reject,
        retention,
        declare: Declare::Auto,
        dedup_window: Duration::ZERO,
        redelivery: Redelivery::default(),
        compression: Compression::None,
        pulsar_schema: PulsarSchema::Bytes,
        max_payload: None,
        schema: None,
    }
}

pub fn numbered(payload: usize) -> Message {
    Draft { payload: payload.to_string().into(), ..Draft::default() }.accept()
}

pub fn number(envelope: &Envelope) -> usize {
    std::str::from_utf8(&envelope.message.payload).unwrap().parse().unwrap()
}

pub fn numbers<'a>(envelopes: impl IntoIterator<Item = &'a Arc<Envelope>>) -> Vec<usize> {
    envelopes.into_iter().map(|envelope| number(envelope)).collect()
}

pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(SOON, what).await.expect("it should have come by now")
}

/// The largest backlog of any group of a topic.
pub async fn backlog(lane: &dyn DurableLane, route: &Arc<Route>, topic: &Topic) -> u64 {
    let groups = lane.groups(route, topic).await.unwrap();
    groups.iter().map(|group| group.backlog).max().unwrap_or(0)
}

pub fn shared(group: &str, start: Start, prefetch: u32) -> Joining {
    Joining { group: group.into(), mode: GroupMode::Shared, start, prefetch }
}

/// The next of a tail, so many at least.
pub async fn hear(cursor: &mut Cursor, count: usize) -> Vec<Arc<Envelope>> {
    let mut heard = Vec::new();
    while heard.len() < count {
        heard.extend(soon(cursor.next(99)).await.unwrap());
    }
    heard
}

/// Everything that a reader has, up to its end.
pub async fn read(
    lane: &dyn DurableLane,
    route: &Arc<Route>,
    topic: &Topic,
    start: Start,
) -> Vec<Arc<Envelope>> {
    let mut reader = lane.read(route, topic, start).await.unwrap();
    let mut all = Vec::new();
    while let Some(batch) = soon(reader.next()).await.unwrap() {
        assert!(!batch.is_empty(), "a batch has at least one");
        all.extend(batch.into_iter().map(Result::unwrap));
    }
    assert_eq!(soon(reader.next()).await.unwrap().map(|batch| batch.len()), None, "the end is the end");
    all
}

fn position(envelope: &Envelope) -> Position {
    envelope.stored.as_ref().unwrap().position.clone()
}

/// The next `count` deliveries, or those that came before it went quiet.
async fn take(member: &dyn Member, count: usize) -> Vec<Handed> {
    let mut taken = Vec::new();
    while taken.len() < count {
        taken.extend(soon(member.next()).await.unwrap().into_iter().map(Result::unwrap));
    }
    taken
}

async fn assert_quiet(member: &dyn Member) {
    let came = timeout(QUIET, member.next()).await;
    assert!(came.is_err(), "nothing should come, and this did: {came:?}");
}

fn sorted(handed: &[Handed]) -> Vec<usize> {
    let mut numbers: Vec<_> = handed.iter().map(|handed| number(&handed.envelope)).collect();
    numbers.sort_unstable();
    numbers
}

fn tags(handed: &[Handed]) -> Vec<twinspan::lane::contract::Tag> {
    handed.iter().map(|handed| handed.tag).collect()
}

/// Waits until the clock shows a later time than now, as far as a broker's resolution goes.
async fn a_moment() -> Timestamp {
    let now = Timestamp::now();
    while Timestamp::now().as_millis() < now.as_millis() + 20 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Timestamp::now()
}

pub async fn what_is_appended_is_read_back_as_it_was(ground: Ground) {
    let topic = ground.topic();
    let whole = Draft {
        id: Some(MessageId::new()),
        payload: vec![0, 159, 146, 150, b'\n', 255].into(),
        key: Some("customer 7".into()),
        headers: [("tenant", "a b"), ("leer", ""), ("ü", "ß")].map(|(n, v)| (n.into(), v.into())).into(),
        event_time: Some(Timestamp::from_millis(1_763_715_600_123)),
        delay: None,
    }
    .accept();
    let bare = Draft::default().accept();
    for message in [&whole, &bare] {
        let receipt =
            ground.lane.append(&ground.route, &topic, message.clone(), Publisher::default()).await.unwrap();
        soon(receipt).await.unwrap();
    }
    let read = ground.read(&topic, Start::Earliest).await;
    assert_eq!(read.iter().map(|envelope| &envelope.message).collect::<Vec<_>>(), [&whole, &bare]);
    assert!(read.iter().all(|envelope| envelope.topic == topic && envelope.lane == Lane::Durable));
}

pub async fn one_callers_messages_are_stored_in_the_order_of_the_calls(ground: Ground) {
    let topic = ground.topic();
    ground.store(&topic, 0..500).await;
    assert_eq!(numbers(&ground.read(&topic, Start::Earliest).await), (0..500).collect::<Vec<_>>());
}

pub async fn a_receipt_that_is_dropped_takes_nothing_back(ground: Ground) {
    let topic = ground.topic();
    drop(ground.lane.append(&ground.route, &topic, numbered(0), Publisher::default()).await.unwrap());
    ground.store(&topic, 1..2).await;
    assert_eq!(numbers(&ground.read(&topic, Start::Earliest).await), [0, 1]);
}

pub async fn reading_begins_where_it_was_asked_to(ground: Ground) {
    let topic = ground.topic();
    ground.store(&topic, 0..5).await;
    let between = a_moment().await;
    a_moment().await;
    ground.store(&topic, 5..10).await;
    let after_all = Timestamp::from_millis(a_moment().await.as_millis() + 60_000);

    for (start, expected) in [
        (Start::Earliest, 0..10),
        (Start::Latest, 0..0),
        (Start::Last(3), 7..10),
        (Start::Last(99), 0..10),
        (Start::Time(between), 5..10),
        (Start::Time(Timestamp::from_millis(0)), 0..10),
        (Start::Time(after_all), 0..0),
    ] {
        let read = ground.read(&topic, start.clone()).await;
        assert_eq!(numbers(&read), expected.collect::<Vec<_>>(), "{start:?}");
    }
}

pub async fn reading_goes_on_after_any_position_that_was_handed_out(ground: Ground) {
    let topic = ground.topic();
    let receipts = ground.store(&topic, 0..6).await;
    let read = ground.read(&topic, Start::Earliest).await;
    for at in 0..6 {
        // As a client keeps it: in text.
        for position in [&receipts[at], &position(&read[at])] {
            let position: Position = position.to_string().parse().unwrap();
            let rest = ground.read(&topic, Start::After(position)).await;
            assert_eq!(numbers(&rest), (at + 1..6).collect::<Vec<_>>());
        }
    }
}

pub async fn a_pattern_resumes_each_topic_where_it_stood(ground: Ground) {
    let (known, unknown) = (ground.topic(), ground.topic());
    let positions = ground.store(&known, 0..3).await;
    ground.store(&unknown, 0..2).await;
    let others_from = a_moment().await;
    a_moment().await;
    ground.store(&unknown, 2..4).await;
    let resume =
        Start::Resume { positions: Arc::new([(known.clone(), positions[0].clone())].into()), others_from };
    assert_eq!(numbers(&ground.read(&known, resume.for_topic(&known)).await), [1, 2]);
    assert_eq!(numbers(&ground.read(&unknown, resume.for_topic(&unknown)).await), [2, 3]);
}

pub async fn a_topic_that_nobody_used_is_empty(ground: Ground) {
    let topic = ground.topic();
    for start in [Start::Earliest, Start::Latest, Start::Last(5), Start::Time(Timestamp::now())] {
        assert_eq!(ground.read(&topic, start).await.len(), 0);
    }
}

pub async fn a_reader_ends_with_what_was_stored_when_it_was_opened(ground: Ground) {
    let topic = ground.topic();
    ground.store(&topic, 0..3).await;
    let mut reader = ground.lane.read(&ground.route, &topic, Start::Earliest).await.unwrap();
    ground.store(&topic, 3..6).await;
    let mut read = Vec::new();
    while let Some(batch) = soon(reader.next()).await.unwrap() {
        read.extend(batch.into_iter().map(Result::unwrap));
    }
    assert_eq!(numbers(&read), [0, 1, 2]);
    assert!(!reader.skipped());
}

pub async fn a_dropped_call_of_a_reader_loses_nothing(ground: Ground) {
    let topic = ground.topic();
    ground.store(&topic, 0..1000).await;
    let mut reader = ground.lane.read(&ground.route, &topic, Start::Earliest).await.unwrap();
    let mut read = Vec::new();
    for patience in 0.. {
        match timeout(Duration::from_micros(patience * 20), reader.next()).await {
            Err(_) => {}
            Ok(batch) => match batch.unwrap() {
                Some(batch) => read.extend(batch.into_iter().map(Result::unwrap)),
                None => break,
            },
        }
    }
    assert_eq!(numbers(&read), (0..1000).collect::<Vec<_>>());
}

pub async fn every_follower_of_the_tail_hears_what_is_stored_from_now_on(ground: Ground) {
    let topic = ground.topic();
    ground.store(&topic, 0..2).await;
    let tail = ground.lane.tail(&ground.route, &topic).await.unwrap();
    let again = ground.lane.tail(&ground.route, &topic).await.unwrap();
    let mut cursors = [tail.follow().0, again.follow().0];
    ground.store(&topic, 2..5).await;
    for cursor in &mut cursors {
        let mut heard = Vec::new();
        while heard.len() < 3 {
            heard.extend(soon(cursor.next(99)).await.unwrap());
        }
        assert_eq!(numbers(&heard), [2, 3, 4]);
        assert_eq!(heard.iter().map(|envelope| envelope.topic.clone()).collect::<BTreeSet<_>>().len(), 1);
    }
}

/// What a subscriber does that replays and then goes on live: it follows the tail first, then reads, and skips in the
/// tail what it has read.
pub async fn a_reader_and_the_tail_together_have_no_gap_and_no_duplicate(ground: Ground) {
    const PUBLISHERS: usize = 3;
    const EACH: usize = 200;
    let topic = ground.topic();
    let mut publishers = tokio::task::JoinSet::new();
    for publisher in 0..PUBLISHERS {
        let (lane, route, topic) = (ground.lane.clone(), ground.route.clone(), topic.clone());
        publishers.spawn(async move {
            for n in 0..EACH {
                let message = numbered(publisher * EACH + n);
                lane.append(&route, &topic, message, Publisher(publisher as u64))
                    .await
                    .unwrap()
                    .await
                    .unwrap();
            }
        });
    }
    let mut followers = tokio::task::JoinSet::new();
    for joins in 0..4 {
        // Late joiners join late.
        tokio::time::sleep(Duration::from_millis(joins * 10)).await;
        let (lane, route, topic) = (ground.lane.clone(), ground.route.clone(), topic.clone());
        followers.spawn(async move {
            let tail = lane.tail(&route, &topic).await.unwrap();
            let (mut cursor, _) = tail.follow();
            let mut all = read(&*lane, &route, &topic, Start::Earliest).await;
            let mut reached = all.last().map(|envelope| position(envelope));
            while all.len() < PUBLISHERS * EACH {
                for envelope in soon(cursor.next(99)).await.unwrap() {
                    let stored = envelope.stored.clone().unwrap();
                    if reached.as_ref().is_none_or(|reached| !reached.covers(stored.partition, stored.place))
                    {
                        reached = Some(stored.position);
                        all.push(envelope);
                    }
                }
            }
            numbers(&all)
        });
    }
    while let Some(done) = publishers.join_next().await {
        done.unwrap();
    }
    while let Some(all) = followers.join_next().await {
        let all = all.unwrap();
        for publisher in 0..PUBLISHERS {
            let of = publisher * EACH..(publisher + 1) * EACH;
            let heard: Vec<_> = all.iter().copied().filter(|n| of.contains(n)).collect();
            assert_eq!(heard, of.collect::<Vec<_>>(), "every message of a publisher once, in its order");
        }
    }
}

pub async fn what_was_confirmed_survives_a_restart(mut ground: Ground) {
    let topic = ground.topic();
    let positions = ground.store(&topic, 0..10).await;
    ground.restart().await;
    ground.store(&topic, 10..12).await;
    assert_eq!(numbers(&ground.read(&topic, Start::Earliest).await), (0..12).collect::<Vec<_>>());
    let rest = ground.read(&topic, Start::After(positions[8].clone())).await;
    assert_eq!(numbers(&rest), [9, 10, 11], "a position outlives the bridge that handed it out");
}

pub async fn closing_confirms_what_is_under_way(mut ground: Ground) {
    let topic = ground.topic();
    let mut receipts = Vec::new();
    for n in 0..200 {
        receipts.push(
            ground.lane.append(&ground.route, &topic, numbered(n), Publisher::default()).await.unwrap(),
        );
    }
    timeout(Duration::from_secs(5), ground.lane.close()).await.expect("closing ends within five seconds");
    for receipt in receipts {
        soon(receipt).await.unwrap();
    }
    let late = match ground.lane.append(&ground.route, &topic, numbered(200), Publisher::default()).await {
        Ok(receipt) => soon(receipt).await.err(),
        Err(error) => Some(error),
    };
    assert!(matches!(late, Some(LaneError::Unavailable(_))), "{late:?}");
    ground.restart().await;
    assert_eq!(ground.read(&topic, Start::Earliest).await.len(), 200);
}

pub async fn each_message_goes_to_one_member_of_a_group(ground: Ground) {
    let topic = ground.topic();
    let members = [
        ground.join(&topic, Start::Earliest, 10).await,
        ground.join(&topic, Start::Earliest, 10).await,
        ground.join(&topic, Start::Earliest, 10).await,
    ];
    ground.store(&topic, 0..300).await;
    let mut got: HashMap<usize, BTreeSet<usize>> = HashMap::new();
    let deadline = Instant::now() + SOON;
    while got.values().map(BTreeSet::len).sum::<usize>() < 300 {
        assert!(Instant::now() < deadline, "all should have come by now");
        for (at, member) in members.iter().enumerate() {
            let Ok(handed) = timeout(Duration::from_millis(50), member.next()).await else { continue };
            let handed: Vec<_> = handed.unwrap().into_iter().map(Result::unwrap).collect();
            assert!(handed.iter().all(|handed| handed.attempt == 1));
            got.entry(at).or_default().extend(handed.iter().map(|handed| number(&handed.envelope)));
            member.ack(tags(&handed)).await.unwrap();
        }
    }
    assert_eq!(got.len(), 3, "every member has its share");
    assert_eq!(got.values().flatten().copied().collect::<BTreeSet<_>>().len(), 300, "none came to two");
}

pub async fn a_member_holds_no_more_than_its_prefetch(ground: Ground) {
    let topic = ground.topic();
    let member = ground.join(&topic, Start::Earliest, 5).await;
    ground.store(&topic, 0..12).await;
    let first = take(&*member, 5).await;
    assert_eq!(sorted(&first), [0, 1, 2, 3, 4]);
    assert_quiet(&*member).await;
    member.ack(tags(&first[..2])).await.unwrap();
    assert_eq!(sorted(&take(&*member, 2).await), [5, 6]);
    assert_quiet(&*member).await;
}

pub async fn what_a_member_held_goes_to_another_when_it_is_dropped(ground: Ground) {
    let topic = ground.topic();
    ground.store(&topic, 0..4).await;
    let gone = ground.join(&topic, Start::Earliest, 10).await;
    let held = take(&*gone, 4).await;
    gone.ack(tags(&held[1..2])).await.unwrap();
    let done = number(&held[1].envelope);
    let other = ground.join(&topic, Start::Latest, 10).await;
    assert_quiet(&*other).await;
    drop(gone);
    let rest: Vec<_> = (0..4).filter(|n| *n != done).collect();
    assert_eq!(sorted(&take(&*other, 3).await), rest);

    // And it waits for the next where nobody else is there.
    drop(other);
    let next = ground.join(&topic, Start::Latest, 10).await;
    assert_eq!(sorted(&take(&*next, 3).await), rest);
}

pub async fn a_rejected_message_comes_again_after_its_delay(ground: Ground) {
    let topic = ground.topic();
    let member = ground.join(&topic, Start::Earliest, 10).await;
    ground.store(&topic, 0..2).await;
    let first = take(&*member, 2).await;
    let rejected = first.iter().find(|handed| number(&handed.envelope) == 0).unwrap();
    let delay = Duration::from_millis(700);
    let asked = Instant::now();
    member.nack(vec![rejected.tag], delay).await.unwrap();
    let again = take(&*member, 1).await;
    // Brokers count in ticks; early is early all the same.
    assert!(asked.elapsed() > delay.mul_f64(0.7), "came after {:?}", asked.elapsed());
    assert_eq!((sorted(&again), again[0].attempt), (vec![0], 2));
    assert_eq!(again[0].envelope.message, rejected.envelope.message);

    member.nack(tags(&again), Duration::ZERO).await.unwrap();
    let third = take(&*member, 1).await;
    assert_eq!((sorted(&third), third[0].attempt), (vec![0], 3));
}

pub async fn what_is_acknowledged_never_comes_again_and_the_rest_does(mut ground: Ground) {
    let topic = ground.topic();
    ground.store(&topic, 0..20).await;
    let member = ground.join(&topic, Start::Earliest, 100).await;
    let held = take(&*member, 20).await;
    let (even, odd): (Vec<_>, Vec<_>) =
        held.into_iter().partition(|handed| number(&handed.envelope).is_multiple_of(2));
    member.ack(tags(&even)).await.unwrap();
    drop(member);
    ground.restart().await;
    ground.store(&topic, 20..22).await;
    let member = ground.join(&topic, Start::Earliest, 100).await;
    let mut expected = sorted(&odd);
    expected.extend([20, 21]);
    assert_eq!(sorted(&take(&*member, 12).await), expected);
    assert_quiet(&*member).await;
}

pub async fn where_a_group_begins_only_matters_for_a_new_one(ground: Ground) {
    let topic = ground.topic();
    let positions = ground.store(&topic, 0..4).await;
    let late = ground.lane.join(&ground.route, &topic, shared("late", Start::Latest, 9)).await.unwrap();
    let after = Start::After(positions[2].clone());
    let after = ground.lane.join(&ground.route, &topic, shared("after", after, 9)).await.unwrap();
    ground.store(&topic, 4..5).await;
    assert_eq!(sorted(&take(&*late, 1).await), [4]);
    assert_eq!(sorted(&take(&*after, 2).await), [3, 4]);
    drop(late);
    let late = ground.lane.join(&ground.route, &topic, shared("late", Start::Earliest, 9)).await.unwrap();
    assert_eq!(sorted(&take(&*late, 1).await), [4], "it stood there, unacknowledged");
    assert_quiet(&*late).await;
}

pub async fn a_group_keeps_its_place_while_it_has_no_member(ground: Ground) {
    let topic = ground.topic();
    drop(ground.join(&topic, Start::Latest, 10).await);
    ground.store(&topic, 0..3).await;
    let member = ground.join(&topic, Start::Latest, 10).await;
    assert_eq!(sorted(&take(&*member, 3).await), [0, 1, 2]);
}

pub async fn a_dropped_call_of_a_member_loses_nothing(ground: Ground) {
    let topic = ground.topic();
    let member = ground.join(&topic, Start::Earliest, 1000).await;
    ground.store(&topic, 0..500).await;
    let mut taken = Vec::new();
    let deadline = Instant::now() + SOON;
    for patience in 0.. {
        assert!(Instant::now() < deadline, "only {} came", taken.len());
        if let Ok(handed) = timeout(Duration::from_micros(patience * 20), member.next()).await {
            taken.extend(handed.unwrap().into_iter().map(Result::unwrap));
        }
        if taken.len() >= 500 {
            break;
        }
    }
    assert_eq!(sorted(&taken), (0..500).collect::<Vec<_>>());
}

pub async fn the_backlog_is_what_a_group_has_not_acknowledged(ground: Ground) {
    let topic = ground.topic();
    let backlog = || async { backlog(&*ground.lane, &ground.route, &topic).await };
    let until = |wanted: fn(u64) -> bool| async move {
        let deadline = Instant::now() + SOON;
        while !wanted(backlog().await) {
            assert!(Instant::now() < deadline, "the backlog stays at {}", backlog().await);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let member = ground.join(&topic, Start::Earliest, 100).await;
    assert_eq!(backlog().await, 0);
    ground.store(&topic, 0..8).await;
    until(|backlog| backlog > 0).await;
    let held = take(&*member, 8).await;
    until(|backlog| backlog > 0).await;
    member.ack(tags(&held)).await.unwrap();
    until(|backlog| backlog == 0).await;
}

pub async fn topics_are_those_that_exist(ground: Ground) {
    let (created, used, absent) = (ground.topic(), ground.topic(), ground.topic());
    assert!(ground.lane.create(&ground.route, &created).await.unwrap());
    assert!(!ground.lane.create(&ground.route, &created).await.unwrap());
    ground.store(&used, 0..1).await;
    let all = ground.lane.topics(&Pattern::parse("contract.*").unwrap()).await.unwrap();
    assert!(all.contains(&created) && all.contains(&used) && !all.contains(&absent), "{all:?}");
    assert_eq!(ground.lane.topics(&created.clone().into()).await.unwrap(), [created]);
    assert_eq!(ground.lane.topics(&Pattern::parse("elsewhere.>").unwrap()).await.unwrap(), []);
}

pub async fn topics_that_appear_become_known(ground: Ground) {
    let (before, stored, created, others) = (ground.topic(), ground.topic(), ground.topic(), ground.topic());
    ground.store(&before, 0..1).await;
    let mut known = ground.lane.watch_topics();
    for topic in [&before, &stored, &created] {
        if topic == &stored {
            ground.store(topic, 0..1).await;
        } else {
            ground.lane.create(&ground.route, topic).await.unwrap();
        }
        soon(known.wait_for(|known| known.contains(topic))).await.unwrap();
    }
    assert!(!known.borrow().contains(&others));
    // Who comes later knows at once what was there, or soon.
    drop(known);
    let mut known = ground.lane.watch_topics();
    let all =
        |known: &BTreeSet<Topic>| [&before, &stored, &created].iter().all(|topic| known.contains(*topic));
    soon(known.wait_for(all)).await.unwrap();
}

pub async fn a_probe_goes_through_storage(ground: Ground) {
    assert_eq!(*ground.lane.state().borrow(), LaneState::Up);
    let took = ground.lane.probe().await.unwrap();
    assert!(took > Duration::ZERO && took < Duration::from_secs(1), "{took:?}");
}

/// A test for every promise. `$ground` is an async function of the module that makes a fresh `Ground`, or `None` where
/// the tests are to do without the broker it needs.
macro_rules! promises {
    ($ground:path) => {
        crate::durable_contract::promises! { $ground, crate::durable_contract;
            what_is_appended_is_read_back_as_it_was
            one_callers_messages_are_stored_in_the_order_of_the_calls
            a_receipt_that_is_dropped_takes_nothing_back
            reading_begins_where_it_was_asked_to
            reading_goes_on_after_any_position_that_was_handed_out
            a_pattern_resumes_each_topic_where_it_stood
            a_topic_that_nobody_used_is_empty
            a_reader_ends_with_what_was_stored_when_it_was_opened
            a_dropped_call_of_a_reader_loses_nothing
            every_follower_of_the_tail_hears_what_is_stored_from_now_on
            a_reader_and_the_tail_together_have_no_gap_and_no_duplicate
            what_was_confirmed_survives_a_restart
            closing_confirms_what_is_under_way
            each_message_goes_to_one_member_of_a_group
            a_member_holds_no_more_than_its_prefetch
            what_a_member_held_goes_to_another_when_it_is_dropped
            a_rejected_message_comes_again_after_its_delay
            what_is_acknowledged_never_comes_again_and_the_rest_does
            where_a_group_begins_only_matters_for_a_new_one
            a_group_keeps_its_place_while_it_has_no_member
            a_dropped_call_of_a_member_loses_nothing
            the_backlog_is_what_a_group_has_not_acknowledged
            topics_are_those_that_exist
            topics_that_appear_become_known
            a_probe_goes_through_storage
        }
    };
    ($ground:path, $($place:ident)::+; $($promise:ident)*) => {
        crate::durable_contract::promises! { @each $ground, [$($place)::+]; $($promise)* }
    };
    (@each $ground:path, $place:tt; $($promise:ident)*) => {
        $(crate::durable_contract::promises! { @one $ground, $place, $promise })*
    };
    (@one $ground:path, [$($place:ident)::+], $promise:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $promise() {
            if let Some(ground) = $ground().await {
                $($place)::+::$promise(ground).await;
            }
        }
    };
}
pub(crate) use promises;

mod journal {
    use super::*;
    use twinspan::lane::journal::Journal;
    use twinspan::policy::Policy;
    use twinspan::policy::table::RouteTable;
    use twinspan::telemetry::metrics::Metrics;

    async fn ground() -> Option<Ground> {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let route = route("contract", "contract.>", Retention::default());
        let policy = Policy::new(RouteTable::new([route.clone()]));
        let opened = dir.clone();
        let open = move || -> BoxFuture<'static, Arc<dyn DurableLane>> {
            let journal =
                Journal::open(opened.path(), policy.clone(), SOON, Arc::new(Metrics::new())).unwrap();
            Box::pin(async move { journal as Arc<dyn DurableLane> })
        };
        Some(Ground { lane: open().await, route: Arc::new(route), open: Box::new(open) })
    }

    promises!(ground);
    groups::group_promises!(ground);
}
