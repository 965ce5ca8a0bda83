//! Subscriptions of one connection that come and go on the same topics, while others publish.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fastrand::Rng;
use serde_json::{Value, json};
use twinspan::client::Client;
use twinspan::lane::contract::Publisher;
use twinspan::message::{Place, Position};
use twinspan::topic::{Pattern, Topic};
use twinspan::wire::json::heard::Heard;

use crate::harness::{PATIENCE, Plan, Span, draft, next_payload, on_both_kinds, silent, soon};

const RUNS: u64 = 16;
const STEPS: usize = 30;
const PUBLISHERS: u64 = 2;

type Wants = fn(u64) -> bool;

/// What a subscription may want of the numbers.
const FILTERS: [(Option<&str>, Wants); 6] = [
    (None, |_| true),
    (Some("payload % 2 == 0"), |n| n % 2 == 0),
    (Some("payload % 3 == 1"), |n| n % 3 == 1),
    (Some("payload % 7 < 2"), |n| n % 7 < 2),
    (Some("payload % 50 == 7"), |n| n % 50 == 7),
    (Some("payload < 0"), |_| false),
];
const PATTERNS: [&str; 5] = ["mixed.kept.a", "mixed.kept.b", "mixed.kept.*", "mixed.kept.>", "mixed.*.a"];

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn subscriptions_that_come_and_go_miss_nothing_and_hear_the_live_events_once_in_order() {
    let first = std::env::var("SEED").ok().and_then(|seed| seed.parse().ok());
    let (first, runs) = first.map_or_else(|| (fastrand::u64(0..1 << 32), RUNS), |seed| (seed, 1));
    for seed in first..first + runs {
        println!("SEED={seed}");
        run(Span::start().await, seed, STEPS).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn subscriptions_that_come_and_go_on_pulsar_miss_nothing_either() {
    let Some(plan) = Plan::on_brokers().await else { return };
    let seed = fastrand::u64(0..1 << 32);
    println!("SEED={seed}");
    run(Span::with(plan).await, seed, STEPS).await;
}

on_both_kinds! {
    a_topic_that_a_pattern_has_yet_to_find_is_found_for_it_when_another_subscription_opens_it,
}

async fn a_topic_that_a_pattern_has_yet_to_find_is_found_for_it_when_another_subscription_opens_it(
    span: Span,
) {
    let mut client = span.client().await;
    client.subscribe("mixed.kept.*", json!({"filter": "payload > 0"})).await.unwrap();
    let bridge = &span.app().bridge;
    for topic in ["mixed.kept.a", "mixed.kept.b", "mixed.kept.c"].map(|topic| Topic::parse(topic).unwrap()) {
        // As another bridge would: here it is found within a second.
        let route = bridge.policy.table().route_for(&topic).unwrap().clone();
        let stored = bridge.durable.append(&route, &topic, draft("1").accept(), Publisher(0)).await.unwrap();
        stored.await.unwrap();
        client.subscribe(topic.as_str(), json!({"filter": "payload == 0"})).await.unwrap();
        for n in [0, 2] {
            client.publish(topic.as_str(), &draft(n.to_string())).await.unwrap();
        }
        for n in ["1", "0", "2"] {
            assert_eq!(next_payload(&mut client).await, n, "{topic}");
        }
    }
    silent(&mut client).await;
}

/// One subscription from its ack to the request that ends it.
struct Subscribed {
    pattern: Pattern,
    wants: Wants,
    replays: bool,
    /// It misses nothing behind this place; of a topic without one, nothing from this number on.
    after: BTreeMap<Topic, Place>,
    first: u64,
    /// Frames heard before it began, and before its end was asked for.
    from: usize,
    until: usize,
}

/// A publisher's own record: where each number was stored.
type Log = BTreeMap<Topic, BTreeMap<Place, u64>>;

struct Connection {
    client: Client,
    frames: Vec<Heard>,
    asked: u64,
}

async fn run(span: Span, seed: u64, steps: usize) {
    let mut random = Rng::with_seed(seed);
    let (numbers, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|_| {
            let (random, numbers, stop) = (random.fork(), numbers.clone(), stop.clone());
            let url = span.url();
            tokio::spawn(async move {
                publish(Client::connect(&url).await.unwrap(), random, &numbers, &stop).await
            })
        })
        .collect();
    let mut connection = Connection { client: span.client().await, frames: Vec::new(), asked: 0 };
    let mut all: Vec<Subscribed> = Vec::new();
    let mut open: BTreeMap<&str, usize> = BTreeMap::new();
    for _ in 0..steps {
        let pattern = *random.choice(&PATTERNS).unwrap();
        match open.remove(pattern) {
            Some(at) => {
                // What comes from here on may be from after the bridge has heard it.
                all[at].until = connection.frames.len();
                connection.ask(json!({"type": "unsubscribe", "topic": pattern})).await;
            }
            None => {
                open.insert(pattern, all.len());
                all.push(subscribe(&mut connection, pattern, &mut random, &numbers).await);
            }
        }
        let until = tokio::time::Instant::now() + Duration::from_millis(random.u64(0..20));
        while let Ok(frame) = tokio::time::timeout_at(until, connection.client.next()).await {
            connection.frames.push(frame.unwrap());
        }
    }
    stop.store(1, Ordering::Relaxed);
    let mut log = Log::new();
    for publisher in publishers {
        for (topic, stored) in soon(publisher).await.unwrap() {
            log.entry(topic).or_default().extend(stored);
        }
    }
    loop {
        let missing: Vec<_> =
            open.values().filter_map(|at| Some((*at, connection.missing(&log, &all[*at], None)?))).collect();
        if missing.is_empty() {
            break;
        }
        match tokio::time::timeout(PATIENCE, connection.client.next()).await {
            Ok(frame) => connection.frames.push(frame.unwrap()),
            Err(_) => panic!("SEED={seed}: of {:?} there is missing {missing:?}", open),
        }
    }
    connection.ask(json!({"type": "ping"})).await;
    connection.check(seed, &log, &all);
}

async fn subscribe(
    connection: &mut Connection,
    pattern: &'static str,
    random: &mut Rng,
    numbers: &AtomicU64,
) -> Subscribed {
    let (filter, wants) = *random.choice(&FILTERS).unwrap();
    let mut asked = json!({"type": "subscribe", "topic": pattern});
    if let Some(filter) = filter {
        asked["filter"] = json!(filter);
    }
    let replays = random.bool();
    let pattern = Pattern::parse(pattern).unwrap();
    let last = connection.frames.iter().filter(|frame| frame.position.is_some()).map(placed);
    let last: BTreeMap<_, _> = last.filter(|(topic, _)| pattern.matches(topic)).collect();
    let mut after = BTreeMap::new();
    let mut first = None;
    match (replays, pattern.topic()) {
        (false, _) => {}
        (true, Some(topic)) if random.bool() && last.contains_key(&topic) => {
            asked["from"] = json!({"position": Position::Whole(last[&topic]).to_string()});
            after = last;
        }
        (true, _) if random.bool() => asked["last_n"] = json!(random.u32(1..200)),
        (true, _) => {
            asked["from"] = json!("earliest");
            first = Some(0);
        }
    }
    let ack = connection.ask(asked).await;
    let from = connection.frames.len();
    if let (false, Some(topic), Some(position)) = (replays, pattern.topic(), &ack.position)
        && let Ok(place) = position.parse()
    {
        after.insert(topic, place);
    }
    let first = first.unwrap_or_else(|| numbers.load(Ordering::SeqCst));
    Subscribed { pattern, wants, replays, after, first, from, until: usize::MAX }
}

/// Lists of numbers to topics, of which now and then a new one appears.
async fn publish(mut client: Client, mut random: Rng, numbers: &AtomicU64, stop: &AtomicU64) -> Log {
    let mut log = Log::new();
    let mut topics = vec!["mixed.kept.a".to_owned(), "mixed.kept.b".to_owned()];
    while stop.load(Ordering::Relaxed) == 0 {
        if random.u8(..) < 8 {
            topics.push(format!("mixed.kept.{}", topics.len()));
        }
        let topic = random.choice(&topics).unwrap();
        let count = random.u64(1..40);
        let begin = numbers.fetch_add(count, Ordering::SeqCst);
        let messages: Vec<_> = (begin..begin + count).map(|n| json!({ "payload": n })).collect();
        let frame = json!({"type": "publish", "topic": topic, "messages": messages});
        client.send(frame.to_string()).await.unwrap();
        let ack = soon(client.next()).await.unwrap();
        let stored = log.entry(Topic::parse(topic).unwrap()).or_default();
        for (n, result) in (begin..).zip(&ack.results) {
            stored.insert(result.position.as_ref().unwrap().parse().unwrap(), n);
        }
        tokio::time::sleep(Duration::from_millis(random.u64(0..3))).await;
    }
    log
}

/// The topic and the place of an event.
fn placed(frame: &Heard) -> (Topic, Place) {
    let topic = Topic::parse(frame.topic.as_ref().unwrap()).unwrap();
    (topic, frame.position.as_ref().unwrap().parse().unwrap())
}

impl Connection {
    /// The answer; what comes before it is kept with it.
    async fn ask(&mut self, mut frame: Value) -> Heard {
        self.asked += 1;
        let id = format!("r{}", self.asked);
        frame["request_id"] = json!(id);
        self.client.send(frame.to_string()).await.unwrap();
        loop {
            let heard = soon(self.client.next()).await.unwrap();
            assert!(heard.kind != "error" && heard.kind != "gap", "{heard:?}");
            let is_answer = heard.request_id.as_ref() == Some(&id);
            match is_answer {
                true => return heard,
                false => self.frames.push(heard),
            }
        }
    }

    /// The first that a subscription wants and that has not come to it, up to each topic's last place or that given.
    fn missing(
        &self,
        log: &Log,
        of: &Subscribed,
        last: Option<&BTreeMap<Topic, Place>>,
    ) -> Option<(Topic, u64)> {
        let frames = &self.frames[of.from..self.frames.len().min(of.until)];
        let is_its_own = |frame: &&Heard| {
            let own = frame.subscription.as_deref().is_none_or(|name| name == of.pattern.as_str());
            frame.kind == "event" && own
        };
        let came: BTreeSet<_> = frames.iter().filter(is_its_own).map(placed).collect();
        for (topic, stored) in log.iter().filter(|(topic, _)| of.pattern.matches(topic)) {
            for (place, n) in stored {
                let is_asked = of.after.get(topic).map_or(*n >= of.first, |after| place > after);
                let is_due = last.is_none_or(|last| last.get(topic).is_some_and(|last| place <= last));
                if is_asked && is_due && (of.wants)(*n) && !came.contains(&(topic.clone(), *place)) {
                    return Some((topic.clone(), *n));
                }
            }
        }
        None
    }

    fn check(&self, seed: u64, log: &Log, all: &[Subscribed]) {
        let mut live: BTreeMap<Topic, Place> = BTreeMap::new();
        let mut replayed: BTreeMap<(usize, Topic), Place> = BTreeMap::new();
        for (at, frame) in self.frames.iter().enumerate().filter(|(_, frame)| frame.kind == "event") {
            let (topic, place) = placed(frame);
            let n = log[&topic][&place];
            let before = match &frame.subscription {
                None => live.insert(topic.clone(), place),
                Some(name) => {
                    let mut asked = all.iter().enumerate().filter(|(_, s)| s.pattern.as_str() == name);
                    let (no, of) = asked.rfind(|(_, s)| s.from <= at).unwrap();
                    assert!((of.wants)(n) && of.replays, "SEED={seed}: {n} of {topic} was not wanted");
                    replayed.insert((no, topic.clone()), place)
                }
            };
            let is_next = before.is_none_or(|before| before < place);
            assert!(is_next, "SEED={seed}: {n} of {topic} at {place} came after {before:?}: {frame:?}");
            // The one that was under way when the last that wanted it left may come behind the end.
            let wanted = all.iter().any(|of| {
                let begun = of.after.get(&topic).is_none_or(|after| of.replays || place > *after);
                of.pattern.matches(&topic) && (of.wants)(n) && begun && of.from <= at
            });
            assert!(wanted, "SEED={seed}: nobody wanted {n} of {topic}");
        }
        // Live events come in order, so whoever left had everything up to the last live one that came while it was
        // live.
        for of in all.iter().filter(|of| of.until < usize::MAX) {
            let frames = &self.frames[of.from..of.until];
            let done = frames.iter().rposition(|frame| {
                let is_own = frame.topic.as_deref() == Some(of.pattern.as_str());
                frame.code.as_deref() == Some("REPLAY_DONE") && is_own
            });
            let Some(begun) = (if of.replays { done } else { Some(0) }) else { continue };
            let events = frames[begun..].iter().filter(|f| f.kind == "event" && f.subscription.is_none());
            let last = events.map(placed).collect();
            let missing = self.missing(log, of, Some(&last));
            assert!(missing.is_none(), "SEED={seed}: {} left and had missed {missing:?}", of.pattern);
        }
    }
}
