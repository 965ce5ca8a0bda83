//! Publishers and subscribers of every kind of topic, who go on whatever happens and write all of it down for the oracle.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use fastrand::Rng;
use futures_util::stream::FuturesUnordered;
use futures_util::{SinkExt, StreamExt};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_util::sync::CancellationToken;
use twinspan::client::{Client, ClientError, Consume, Incoming, Options, Subscribe, Twinspan};
use twinspan::message::{Draft, GroupMode, MessageId, Start};
use twinspan::wire::json::heard::Heard as Frame;

use crate::brokers::Broker;
use crate::checker::{
    Answer, Disturbance, Heard, History, Hurt, Moment, Name, Operation, Promise, Subscriber, What,
};
use crate::harness::{PATIENCE, soon};
use crate::pulsar::admin;
use crate::slow_clients::unread_from;

/// What each topic's plain subscriber is promised.
const TOPICS: [(&str, Promise); 7] = [
    (LIVE, Promise::Live),
    ("rejects.a", Promise::Stored),
    ("spools.a", Promise::Stored),
    ("after.a", Promise::Stored),
    ("first.a", Promise::First),
    ("kept.a", Promise::First),
    (FILLED, Promise::Stored),
];

const LIVE: &str = "live.a";
/// What somebody falls behind with, and how many it takes.
const BULK: &str = "live.bulk";
const BULK_MESSAGES: u64 = 1500;
/// What `fill` publishes to, and nobody else.
const FILLED: &str = "spools.filled";

/// And the groups, with how many members each.
const GROUPS: [(&str, Promise, usize); 3] =
    [(LIVE, Promise::Queue, 2), ("rejects.a", Promise::Shared, 3), ("spools.a", Promise::KeyShared, 2)];

/// Of each topic: one has keys and publishes again what was not accepted, the other does neither.
const PUBLISHERS: usize = 2;
const PACE: Duration = Duration::from_millis(100);
const UNDER_WAY: usize = 16;
/// Who still has so many to publish again begins nothing new.
const AGAIN: usize = 8;

/// A namespace of its own, which de-duplicates: elsewhere what is sent again after a lost connection may be stored twice.
pub async fn make_namespace(pulsar: &Broker, own: &str) {
    let path = format!("namespaces/public/{own}");
    admin(pulsar, Method::PUT, &path, Value::Null).await;
    admin(pulsar, Method::POST, &format!("{path}/deduplication"), Value::Bool(true)).await;
}

/// The routes of these topics, which are in that namespace.
pub fn routes(own: &str) -> String {
    let nats = format!("nats = \"{own}.{{topic}}\"\n");
    let pulsar = format!("pulsar = \"persistent://public/{own}/{{topic}}\"\n");
    let (spools, first) = ("outage = \"spool\"\n", "live = \"first\"\n");
    [
        ("live.>", "ephemeral", vec![&*nats]),
        ("rejects.>", "durable", vec![&pulsar]),
        ("spools.>", "durable", vec![&pulsar, spools]),
        ("after.>", "both", vec![&nats, &pulsar, spools]),
        ("first.>", "both", vec![&nats, &pulsar, first]),
        ("kept.>", "both", vec![&nats, &pulsar, first, spools]),
    ]
    .into_iter()
    .map(|(topic, lane, more)| {
        format!("[[route]]\ntopic = \"{topic}\"\nlane = \"{lane}\"\n{}", more.concat())
    })
    .collect()
}

/// What bridges need to know of the brokers.
pub fn settings(nats: &str, pulsar: &str, admin: &str) -> Vec<String> {
    vec![
        "lanes.ephemeral.backend=nats".into(),
        format!("lanes.ephemeral.url={nats}"),
        "lanes.durable.backend=pulsar".into(),
        format!("lanes.durable.url={pulsar}"),
        format!("lanes.durable.admin_url={admin}"),
        "lanes.durable.publish_timeout=4s".into(),
    ]
}

/// The history while it is written.
pub struct Book {
    began: Instant,
    history: Mutex<History>,
}

impl Book {
    pub fn begin() -> Arc<Self> {
        Arc::new(Self { began: Instant::now(), history: Mutex::default() })
    }

    pub fn now(&self) -> Moment {
        self.began.elapsed().as_millis() as Moment
    }

    pub fn read<T>(&self, look: impl FnOnce(&History) -> T) -> T {
        look(&self.history.lock().unwrap())
    }

    pub fn disturbed(&self, hurt: Hurt, from: Moment, to: Moment) {
        self.history.lock().unwrap().disturbances.push(Disturbance { hurt, from, to });
    }

    /// All that is known of what broke a promise.
    pub fn told(&self) -> Vec<String> {
        self.read(|history| {
            let told = history.violations().into_iter().map(|violation| {
                let story = violation.message.map(|name| history.story(&name)).unwrap_or_default();
                format!("{:?}: {}\n{story}", violation.rule, violation.text)
            });
            told.collect()
        })
    }

    fn ask(&self, name: &Name, key: &Option<String>, connection: usize) -> usize {
        let (sent, answer) = (self.now(), Answer::Unknown("nothing yet".into()));
        let mut history = self.history.lock().unwrap();
        let (name, key) = (name.clone(), key.clone());
        history.operations.push(Operation { name, key, connection, sent, answered: sent, answer });
        history.operations.len() - 1
    }

    fn answer(&self, operation: usize, answer: Answer) {
        let answered = self.now();
        let operation = &mut self.history.lock().unwrap().operations[operation];
        (operation.answered, operation.answer) = (answered, answer);
    }

    fn subscriber(&self, name: String, topic: &str, promise: Promise) -> usize {
        let mut history = self.history.lock().unwrap();
        history.subscribers.push(Subscriber { name, topic: topic.into(), promise, heard: Vec::new() });
        history.subscribers.len() - 1
    }

    fn hear(&self, subscriber: usize, what: What) {
        let at = self.now();
        self.history.lock().unwrap().subscribers[subscriber].heard.push(Heard { at, what });
    }
}

/// A message that is, or will be, published.
struct Asked {
    name: Name,
    draft: Draft,
}

impl Asked {
    fn new(name: Name, key: Option<String>, filler: &str) -> Self {
        let payload = json!([name.publisher, name.n, filler]).to_string();
        let draft = Draft { id: Some(MessageId::new()), key, payload: payload.into(), ..Draft::default() };
        Self { name, draft }
    }
}

/// What the answer to a publish says, and whether there is a connection any more.
fn judge(answered: &Result<Frame, ClientError>) -> (Answer, bool) {
    match answered {
        Ok(ack) => match ack.status.as_deref() {
            Some("spooled") => (Answer::Spooled, true),
            Some("duplicate") => (Answer::Duplicate, true),
            _ => (Answer::Ok, true),
        },
        Err(ClientError::Refused(error)) => match error.code.as_str() {
            "OUTCOME_UNKNOWN" | "INTERNAL" | "TIMEOUT" => (Answer::Unknown(error.code.clone()), true),
            code => (Answer::Refused(code.into()), true),
        },
        Err(error) => (Answer::Unknown(error.to_string()), false),
    }
}

/// The message that an event brought.
fn what(topic: &str, payload: &[u8], position: Option<&str>, late: bool) -> What {
    let payload: Value = serde_json::from_slice(payload).unwrap();
    let (publisher, n) = (payload[0].as_u64().unwrap() as usize, payload[1].as_u64().unwrap());
    let name = Name { topic: topic.into(), publisher, n };
    What::Event { name, position: position.map(Into::into), late }
}

struct Publisher {
    book: Arc<Book>,
    url: String,
    topic: &'static str,
    number: usize,
    is_steadfast: bool,
    stop: CancellationToken,
    random: Rng,
    published: u64,
    /// What was not accepted and is to be published again.
    again: VecDeque<Asked>,
    connection: usize,
}

impl Publisher {
    async fn run(mut self) {
        while !self.is_done() {
            match timeout(PATIENCE, Client::connect(&self.url)).await {
                Ok(Ok(client)) => self.speak(&client).await,
                _ => sleep(PACE).await,
            }
        }
    }

    fn is_done(&self) -> bool {
        self.stop.is_cancelled() && self.again.is_empty()
    }

    /// Publishes until the connection ends, or everything is done.
    async fn speak(&mut self, client: &Client) {
        self.connection += 1;
        let (mut under_way, mut is_connected) = (FuturesUnordered::new(), true);
        let mut ticks = interval(PACE);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while is_connected && !self.is_done() || !under_way.is_empty() {
            tokio::select! {
                Some((operation, asked, answered)) = under_way.next(), if !under_way.is_empty() => {
                    is_connected &= self.answered(operation, asked, &answered);
                }
                _ = ticks.tick(), if is_connected && under_way.len() < UNDER_WAY => {
                    // Now and then it comes again by another bridge, once all is answered.
                    is_connected = self.random.u8(..) > 0;
                    let Some(asked) = self.next() else { continue };
                    let operation = self.book.ask(&asked.name, &asked.draft.key, self.connection);
                    match client.publish_in_line(self.topic, &asked.draft).await {
                        Ok(answer) => under_way.push(async move { (operation, asked, answer.await) }),
                        Err(error) => is_connected &= self.answered(operation, asked, &Err(error)),
                    }
                }
            }
        }
        self.again.make_contiguous().sort_by_key(|asked| asked.name.n);
    }

    /// Says whether there is still a connection.
    fn answered(&mut self, operation: usize, asked: Asked, answered: &Result<Frame, ClientError>) -> bool {
        let (answer, is_connected) = judge(answered);
        let is_accepted = matches!(answer, Answer::Ok | Answer::Spooled | Answer::Duplicate);
        self.book.answer(operation, answer);
        // Now and then what was accepted is published once more.
        let again =
            if is_accepted { self.random.u8(..) < 8 && !self.stop.is_cancelled() } else { self.is_steadfast };
        if again && self.topic != LIVE {
            self.again.push_back(asked);
        }
        is_connected
    }

    fn next(&mut self) -> Option<Asked> {
        let begins = !self.stop.is_cancelled() && self.again.len() < AGAIN && self.random.bool();
        if !begins && let Some(asked) = self.again.pop_front() {
            return Some(asked);
        }
        if self.stop.is_cancelled() {
            return None;
        }
        let name = Name { topic: self.topic.into(), publisher: self.number, n: self.published };
        self.published += 1;
        let key = self.is_steadfast.then(|| format!("k{}", self.random.u8(0..4)));
        Some(Asked::new(name, key, ""))
    }
}

pub struct Crowd {
    stop: CancellationToken,
    publishers: JoinSet<()>,
    subscribers: JoinSet<()>,
}

impl Crowd {
    /// Returns once all have subscribed and begun to publish.
    pub async fn begin(url: &str, book: &Arc<Book>, seed: u64) -> Self {
        let mut crowd =
            Self { stop: CancellationToken::new(), publishers: JoinSet::new(), subscribers: JoinSet::new() };
        for (topic, promise) in TOPICS {
            let subscriber = book.subscriber(format!("the subscriber of {topic}"), topic, promise);
            crowd.subscribe(url, book, subscriber, topic, None).await;
        }
        for (topic, promise, members) in GROUPS {
            let subscriber = book.subscriber(format!("the group of {topic}"), topic, promise);
            for _ in 0..members {
                match promise {
                    Promise::Queue => crowd.subscribe(url, book, subscriber, topic, Some("group")).await,
                    promise => crowd.join(url, book, subscriber, topic, promise),
                }
            }
        }
        let mut random = Rng::with_seed(seed);
        let published = TOPICS.into_iter().filter(|(topic, _)| *topic != FILLED);
        for (place, (topic, _)) in published.enumerate() {
            for of in 0..PUBLISHERS {
                let (book, stop, random) = (book.clone(), crowd.stop.clone(), random.fork());
                crowd.publishers.spawn(
                    Publisher {
                        book,
                        url: url.into(),
                        topic,
                        number: place * PUBLISHERS + of,
                        is_steadfast: of == 0,
                        stop,
                        random,
                        published: 0,
                        again: VecDeque::new(),
                        connection: 0,
                    }
                    .run(),
                );
            }
        }
        crowd
    }

    async fn subscribe(
        &mut self,
        url: &str,
        book: &Arc<Book>,
        subscriber: usize,
        topic: &str,
        group: Option<&str>,
    ) {
        let twinspan = Twinspan::new(url, Options::default()).unwrap();
        let asked = Subscribe { group: group.map(Into::into), ..Subscribe::default() };
        let mut subscription = twinspan.subscribe(topic, asked).await.unwrap();
        let book = book.clone();
        self.subscribers.spawn(async move {
            loop {
                match subscription.next().await.unwrap() {
                    Incoming::Event(event) => {
                        let late = event.heard.late;
                        book.hear(subscriber, what(event.topic(), &event.payload, event.position(), late));
                    }
                    Incoming::Gap { dropped, .. } => book.hear(subscriber, What::Gap(dropped)),
                    Incoming::Info(_) => {}
                    Incoming::Error(error) => panic!("nothing is to fail for a subscriber: {error:?}"),
                }
            }
        });
    }

    fn join(
        &mut self,
        url: &str,
        book: &Arc<Book>,
        subscriber: usize,
        topic: &'static str,
        promise: Promise,
    ) {
        let twinspan = Twinspan::new(url, Options::default()).unwrap();
        let mode = if promise == Promise::KeyShared { GroupMode::KeyShared } else { GroupMode::Shared };
        let asked = Consume {
            group: "group".into(),
            mode,
            concurrency: 4,
            from: Start::Earliest,
            ..Consume::default()
        };
        let book = book.clone();
        self.subscribers.spawn(async move {
            let handler = move |event: twinspan::client::Event| {
                book.hear(subscriber, what(event.topic(), &event.payload, event.position(), false));
                std::future::ready(anyhow::Ok(()))
            };
            twinspan.consume(topic, asked, CancellationToken::new(), handler).await.unwrap();
        });
    }

    /// Nothing new is published from now on. Returns once all that is tried again is accepted, all that is owed has come
    /// (what has not by then is for the oracle to tell), and storage was read.
    pub async fn finish(mut self, url: &str, book: &Book, within: Duration) {
        self.stop.cancel();
        let rest = async {
            while let Some(ended) = self.publishers.join_next().await {
                ended.unwrap();
            }
        };
        assert!(timeout(within, rest).await.is_ok(), "what is published again is accepted within {within:?}");
        let until = Instant::now() + within;
        while Instant::now() < until && !book.read(History::owed).is_empty() {
            sleep(Duration::from_millis(200)).await;
        }
        if let Some(ended) = self.subscribers.try_join_next() {
            panic!("a subscriber goes on whatever happens: {ended:?}");
        }
        for (topic, _) in TOPICS.into_iter().filter(|(_, promise)| promise.is_whole()) {
            read_storage(url, book, topic).await;
        }
    }
}

/// Publishes large messages to one bridge until its spool takes no more; whether it came to that.
pub async fn fill(url: &str, book: &Book, round: u64, stop: CancellationToken) -> bool {
    let client = Client::connect(url).await.unwrap();
    let filler = "x".repeat(50_000);
    for n in round * 1000.. {
        let name = Name { topic: FILLED.into(), publisher: 99, n };
        let asked = Asked::new(name, None, &filler);
        let operation = book.ask(&asked.name, &None, round as usize);
        let answered = soon(client.publish(FILLED, &asked.draft)).await;
        let (answer, is_connected) = judge(&answered);
        let is_full = answer == Answer::Refused("STORAGE_FULL".into());
        book.answer(operation, answer);
        if is_full || !is_connected || stop.is_cancelled() {
            return is_full;
        }
    }
    unreachable!("a disk has an end")
}

/// Somebody who does not read while more is published by another bridge than there is room for, and then does.
pub async fn fall_behind(slow: SocketAddr, publisher: &str, book: &Book) {
    let subscriber = book.subscriber("who fell behind".into(), BULK, Promise::Live);
    let mut socket = unread_from(slow).await;
    let subscribe = json!({"type": "subscribe", "request_id": "s", "topic": BULK});
    socket.send(Message::text(subscribe.to_string())).await.unwrap();
    let mut hear = async || match soon(socket.next()).await.unwrap().unwrap() {
        Message::Text(frame) => Some(Frame::parse(&frame).unwrap()),
        _ => None,
    };
    while hear().await.is_none_or(|frame| frame.kind != "ack") {}
    let (client, filler) = (Client::connect(publisher).await.unwrap(), "x".repeat(8000));
    for n in 0..BULK_MESSAGES {
        let asked = Asked::new(Name { topic: BULK.into(), publisher: 98, n }, None, &filler);
        let operation = book.ask(&asked.name, &None, 1);
        book.answer(operation, judge(&soon(client.publish(BULK, &asked.draft)).await).0);
    }
    let mut last = 0;
    while last < BULK_MESSAGES - 1 {
        let Some(frame) = hear().await else { continue };
        let heard = match frame.kind.as_str() {
            "gap" => What::Gap(frame.dropped),
            _ => what(BULK, &frame.payload().unwrap(), None, false),
        };
        if let What::Event { name, .. } = &heard {
            last = name.n;
        }
        book.hear(subscriber, heard);
    }
}

/// Reads what is stored of a topic, as one more subscriber.
async fn read_storage(url: &str, book: &Book, topic: &str) {
    let mut client = Client::connect(url).await.unwrap();
    soon(client.subscribe(topic, json!({"from": "earliest"}))).await.unwrap();
    let subscriber = book.subscriber(format!("storage of {topic}"), topic, Promise::Stored);
    loop {
        let frame = soon(client.next()).await.unwrap();
        if frame.code.as_deref() == Some("REPLAY_DONE") {
            return;
        }
        if frame.kind == "event" {
            let topic = frame.topic.as_deref().unwrap_or_default();
            book.hear(subscriber, what(topic, &frame.payload().unwrap(), frame.position.as_deref(), false));
        }
    }
}
