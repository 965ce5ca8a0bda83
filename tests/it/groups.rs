//! What a group member holds: how long, how often, and where it goes that nobody acknowledges. The same on the
//! embedded log and on Pulsar.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::future::Either;
use serde_json::{Value, json};
use tokio::sync::watch;
use twinspan::client::Client;
use twinspan::lane::bus::Bus;
use twinspan::lane::contract::{
    Appending, DurableLane, GroupReport, Joining, LaneError, LaneState, Member, Publisher, Reader, Receipt,
};
use twinspan::lane::open_durable;
use twinspan::lane::tail::Tail;
use twinspan::message::{Draft, GroupMode, Message, Start, Timestamp};
use twinspan::policy::table::Route;
use twinspan::policy::{Policy, source};
use twinspan::server::Carriers;
use twinspan::telemetry::metrics::Metrics;
use twinspan::topic::{Pattern, Topic};
use twinspan::wire::json::heard::Heard;

use crate::harness::{
    PATIENCE, Plan, ROUTES, Span, answer, draft, eventually, http_client, next, nothing, on_both_kinds,
    refused, silent, soon,
};

on_both_kinds! {
    what_is_held_too_long_goes_to_another_member_and_its_number_is_unknown,
    what_is_given_back_waits_as_the_route_says_or_as_the_client_does,
    what_nobody_acknowledges_is_a_dead_letter_once_and_says_where_it_comes_from,
    a_dead_letter_is_there_after_the_bridge_was_stopped,
    what_a_leaving_client_held_comes_at_once_and_not_after_the_backoff,
    what_was_acknowledged_before_a_goodbye_does_not_come_again,
    each_ack_is_answered_for_itself_whatever_came_with_it,
    with_automatic_acknowledgement_what_was_written_never_comes_again,
    the_backlog_of_a_group_is_told_by_its_topic_and_as_a_metric_until_it_leaves,
}

async fn nack(client: &Client, event: &Heard) {
    let delivery = event.delivery.unwrap();
    client.send(json!({"type": "nack", "delivery": delivery}).to_string()).await.unwrap();
}

/// The next event, whatever else comes.
async fn event(client: &mut Client) -> Heard {
    loop {
        let heard = next(client).await;
        if heard.kind == "event" {
            return heard;
        }
        assert_ne!(heard.kind, "error", "{heard:?}");
    }
}

/// Gives back a message as often as its route allows.
async fn refuse_three_times(client: &mut Client) -> Heard {
    for attempt in 1..3 {
        let refused = event(client).await;
        assert_eq!(refused.attempt, Some(attempt), "{refused:?}");
        nack(client, &refused).await;
    }
    let last = event(client).await;
    assert_eq!(last.attempt, Some(3));
    nack(client, &last).await;
    last
}

async fn stored(span: &Span, topic: &str) -> Vec<Value> {
    let (status, page) = span.get(&format!("/topics/{topic}/messages")).await;
    assert_eq!(status, 200, "{page}");
    page["messages"].as_array().unwrap().clone()
}

async fn backlog(span: &Span, topic: &str) -> Value {
    span.get(&format!("/topics/{topic}")).await.1["backlog"].clone()
}

async fn what_is_held_too_long_goes_to_another_member_and_its_number_is_unknown(span: Span) {
    let (mut holder, mut other) = (span.client().await, span.client().await);
    let group = json!({"group": "g", "prefetch": 1});
    holder.subscribe("timed.a", group.clone()).await.unwrap();
    holder.publish("timed.a", &draft("1")).await.unwrap();
    let held = event(&mut holder).await;
    let since = Instant::now();
    other.subscribe("timed.a", group).await.unwrap();
    // It may come to the one that held it as well; that one never answers.
    let again = event(&mut other).await;
    assert!(again.attempt.unwrap() > 1, "{again:?}");
    // The timer began when the event was put into the outbox, a little before it was heard.
    assert!(since.elapsed() > Duration::from_millis(400), "{:?}", since.elapsed());
    other.ack(&[again.delivery.unwrap()]).await.unwrap();
    assert_eq!(refused(holder.ack(&[held.delivery.unwrap()]).await), "UNKNOWN_DELIVERY");
    eventually("nothing is left", async || backlog(&span, "timed.a").await == 0).await;
    // What is settled in time is never taken away.
    holder.publish("timed.a", &draft("2")).await.unwrap();
    let (one, two) = (holder.next(), other.next());
    let settled = soon(async {
        tokio::select! { one = one => (0, one), two = two => (1, two) }
    })
    .await;
    let (who, delivery) = (settled.0, settled.1.unwrap().delivery.unwrap());
    [&holder, &other][who].ack(&[delivery]).await.unwrap();
    tokio::time::sleep(Duration::from_millis(700)).await;
    silent(&mut holder).await;
    silent(&mut other).await;
}

async fn what_is_given_back_waits_as_the_route_says_or_as_the_client_does(span: Span) {
    let mut client = span.client().await;
    client.subscribe("jobs.wait", json!({"group": "g"})).await.unwrap();
    // The route says 100 ms and then 400 ms; a delay of its own goes before that, longer or shorter.
    for (n, [first, second]) in [[None, None], [Some(700), None], [None, Some(0)]].into_iter().enumerate() {
        client.publish("jobs.wait", &draft(n.to_string())).await.unwrap();
        let mut given_back = event(&mut client).await;
        for (attempt, own, routes) in [(1, first, 100), (2, second, 400)] {
            assert_eq!(
                (given_back.attempt, given_back.payload().unwrap()),
                (Some(attempt), n.to_string().into())
            );
            let since = Instant::now();
            match own {
                None => nack(&client, &given_back).await,
                Some(own) => {
                    let delivery = [given_back.delivery.unwrap()];
                    client.nack(&delivery, Duration::from_millis(own)).await.unwrap();
                }
            }
            given_back = event(&mut client).await;
            let (least, waited) = (Duration::from_millis(own.unwrap_or(routes)), since.elapsed());
            assert!(waited >= least, "{n}, {attempt}: {waited:?}");
            assert!(own != Some(0) || waited < Duration::from_millis(400), "{waited:?}");
        }
        client.ack(&[given_back.delivery.unwrap()]).await.unwrap();
    }
}

async fn what_nobody_acknowledges_is_a_dead_letter_once_and_says_where_it_comes_from(span: Span) {
    let (mut client, mut mourner) = (span.client().await, span.client().await);
    mourner.subscribe("dead.>", nothing()).await.unwrap();
    client.subscribe("jobs.poison", json!({"group": "workers"})).await.unwrap();
    let poison = Draft {
        key: Some("k".into()),
        headers: [("traceparent".to_owned(), "00-ab-01".to_owned())].into(),
        ..draft(r#"{"n":1}"#)
    };
    let ack = client.publish("jobs.poison", &poison).await.unwrap();
    let last = refuse_three_times(&mut client).await;
    let letter = event(&mut mourner).await;
    assert_eq!(letter.topic.as_deref(), Some("dead.jobs.poison"));
    let message = letter.message().unwrap();
    assert_eq!(message.id, ack.message_id);
    assert_eq!((message.key.as_deref(), message.payload()), (Some("k"), Some(br#"{"n":1}"#.to_vec())));
    let mut headers = message.headers;
    let at = headers.remove("twinspan-origin-ts").unwrap();
    assert_eq!(at, ack.ts, "it was accepted there and then");
    let expected: BTreeMap<_, _> = [
        ("traceparent", "00-ab-01"),
        ("twinspan-origin-topic", "jobs.poison"),
        ("twinspan-origin-group", "workers"),
        ("twinspan-origin-position", last.position.as_deref().unwrap()),
        ("twinspan-origin-attempts", "3"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    assert_eq!(headers, expected);
    // It is gone from the group, stored once, counted, and its topic is a topic like any other.
    eventually("the group has nothing left", async || backlog(&span, "jobs.poison").await == 0).await;
    silent(&mut client).await;
    assert_eq!(stored(&span, "dead.jobs.poison").await.len(), 1);
    assert_eq!(span.metric(r#"twinspan_dead_lettered_total{route="jobs"}"#), 1.0);
    let (_, told) =
        answer(http_client().get(span.admin("/explain/dead.jobs.poison")).send().await.unwrap()).await;
    assert_eq!((&told["route"], &told["lane"]), (&json!("jobs.dead_letter"), &json!("durable")), "{told}");
    // What is acknowledged in time is none, and the group goes on.
    client.publish("jobs.poison", &draft("2")).await.unwrap();
    let good = event(&mut client).await;
    nack(&client, &good).await;
    let good = event(&mut client).await;
    client.ack(&[good.delivery.unwrap()]).await.unwrap();
    silent(&mut mourner).await;
    // A group of the dead letters has them as often as it likes.
    let mut heir = span.client().await;
    heir.subscribe("dead.jobs.poison", json!({"group": "heirs", "from": "earliest"})).await.unwrap();
    for attempt in 1..=4 {
        let letter = event(&mut heir).await;
        assert_eq!(letter.attempt, Some(attempt));
        heir.nack(&[letter.delivery.unwrap()], Duration::ZERO).await.unwrap();
    }
}

async fn a_dead_letter_is_there_after_the_bridge_was_stopped(span: Span) {
    let mut client = span.client().await;
    client.subscribe("jobs.kept", json!({"group": "g"})).await.unwrap();
    client.publish("jobs.kept", &draft("1")).await.unwrap();
    refuse_three_times(&mut client).await;
    eventually("it is a dead letter", async || backlog(&span, "jobs.kept").await == 0).await;
    let plan = Plan {
        routes: std::fs::read_to_string(&span.routes).unwrap(),
        settings: span.app().settings.clone(),
        own: span.own.clone(),
        lanes: None,
    };
    drop(client);
    let span = Span::inside(plan, span.stop().await).await;
    let mut client = span.client().await;
    client.subscribe("dead.>", json!({"from": "earliest"})).await.unwrap();
    let letter = event(&mut client).await.message().unwrap();
    assert_eq!(letter.headers["twinspan-origin-topic"], "jobs.kept");
    client.subscribe("jobs.kept", json!({"group": "g"})).await.unwrap();
    client.publish("jobs.kept", &draft("2")).await.unwrap();
    loop {
        let event = event(&mut client).await;
        if event.topic.as_deref() == Some("jobs.kept") {
            assert_eq!(event.payload().unwrap(), b"2", "the dead letter is gone from its group for good");
            break;
        }
    }
}

async fn what_a_leaving_client_held_comes_at_once_and_not_after_the_backoff(span: Span) {
    let (mut leaving, mut staying) = (span.client().await, span.client().await);
    leaving.subscribe("slow.a", json!({"group": "g"})).await.unwrap();
    for n in 0..3 {
        leaving.publish("slow.a", &draft(n.to_string())).await.unwrap();
        event(&mut leaving).await;
    }
    staying.subscribe("slow.a", json!({"group": "g"})).await.unwrap();
    drop(leaving);
    // The route's backoff is a minute.
    for _ in 0..3 {
        let given_back = event(&mut staying).await;
        staying.ack(&[given_back.delivery.unwrap()]).await.unwrap();
    }
}

async fn what_was_acknowledged_before_a_goodbye_does_not_come_again(span: Span) {
    let mut leaving = span.client().await;
    leaving.subscribe("jobs.goodbye", json!({"group": "g", "prefetch": 20})).await.unwrap();
    let messages: Vec<_> = (0..20).map(|n| json!({ "payload": n })).collect();
    leaving
        .send(
            json!({"type": "publish", "topic": "jobs.goodbye", "confirm": false, "messages": messages})
                .to_string(),
        )
        .await
        .unwrap();
    let mut deliveries = Vec::new();
    for _ in 0..20 {
        deliveries.push(event(&mut leaving).await.delivery.unwrap());
    }
    for delivery in &deliveries[..15] {
        leaving.send(json!({"type": "ack", "delivery": delivery}).to_string()).await.unwrap();
    }
    // Nobody waits for an answer: the goodbye stands right behind the last ack.
    drop(leaving);
    let mut next = span.client().await;
    next.subscribe("jobs.goodbye", json!({"group": "g"})).await.unwrap();
    let mut left = BTreeSet::new();
    for _ in 0..5 {
        let given_back = event(&mut next).await;
        left.insert(String::from_utf8(given_back.payload().unwrap()).unwrap().parse::<u32>().unwrap());
        next.ack(&[given_back.delivery.unwrap()]).await.unwrap();
    }
    assert_eq!(left, (15..20).collect());
    silent(&mut next).await;
}

/// What one turn of the bridge acknowledges goes to the lane together; the client sees nothing of that.
async fn each_ack_is_answered_for_itself_whatever_came_with_it(span: Span) {
    let mut client = span.client().await;
    for topic in ["jobs.each", "jobs.other"] {
        client.subscribe(topic, json!({"group": "g"})).await.unwrap();
    }
    let mut held = Vec::new();
    for topic in ["jobs.each", "jobs.each", "jobs.each", "jobs.each", "jobs.other"] {
        client.publish(topic, &draft("1")).await.unwrap();
        held.push(event(&mut client).await.delivery.unwrap());
    }
    let nobodys = held.iter().max().unwrap() + 100;
    for frame in [
        json!({"type": "ack", "request_id": "first", "delivery": held[0]}),
        json!({"type": "ack", "request_id": "nobodys", "delivery": nobodys}),
        json!({"type": "ack", "delivery": held[1]}),
        json!({"type": "ack", "request_id": "both topics", "deliveries": [held[2], held[4]]}),
        json!({"type": "nack", "request_id": "given back", "delivery": held[3]}),
        json!({"type": "ack", "request_id": "after it was given back", "delivery": held[3]}),
        json!({"type": "ack", "request_id": "twice", "deliveries": [held[0], held[1]]}),
    ] {
        client.send(frame.to_string()).await.unwrap();
    }
    let (mut answers, mut again) = (BTreeMap::new(), None);
    while answers.len() < 6 || again.is_none() {
        let heard = next(&mut client).await;
        match heard.request_id {
            Some(id) => drop(answers.insert(id, heard.error.map(|error| error.code))),
            None => again = Some(heard),
        }
    }
    let unknown = || Some("UNKNOWN_DELIVERY".to_owned());
    let expected = [
        ("first", None),
        ("nobodys", unknown()),
        ("both topics", None),
        ("given back", None),
        ("after it was given back", unknown()),
        ("twice", unknown()),
    ];
    assert_eq!(answers, expected.map(|(id, code)| (id.to_owned(), code)).into());
    let again = again.unwrap();
    assert_eq!((again.kind.as_str(), again.attempt), ("event", Some(2)), "{again:?}");
    client.ack(&[again.delivery.unwrap()]).await.unwrap();
    for topic in ["jobs.each", "jobs.other"] {
        eventually("nothing is left", async || backlog(&span, topic).await == 0).await;
    }
}

async fn with_automatic_acknowledgement_what_was_written_never_comes_again(span: Span) {
    let mut client = span.client().await;
    client.subscribe("timed.auto", json!({"group": "g", "ack": "auto"})).await.unwrap();
    for n in 0..20 {
        client.publish("timed.auto", &draft(n.to_string())).await.unwrap();
        let event = event(&mut client).await;
        assert_eq!((event.payload().unwrap(), event.attempt), (n.to_string().into_bytes(), Some(1)));
    }
    eventually("all is acknowledged", async || backlog(&span, "timed.auto").await == 0).await;
    // Longer than the ack timeout.
    tokio::time::sleep(Duration::from_millis(700)).await;
    silent(&mut client).await;
}

async fn the_backlog_of_a_group_is_told_by_its_topic_and_as_a_metric_until_it_leaves(span: Span) {
    let mut client = span.client().await;
    for topic in ["slow.b", "slow.c"] {
        client.subscribe(topic, json!({"group": "g", "prefetch": 2})).await.unwrap();
        for n in 0..3 {
            client.publish(topic, &draft(n.to_string())).await.unwrap();
        }
    }
    for _ in 0..4 {
        event(&mut client).await;
    }
    let report = async || span.get("/topics/slow.b").await.1["groups"][0].clone();
    eventually("the topic tells", async || report().await["backlog"] == 3).await;
    assert_eq!(report().await["group"], "g");
    let text = || span.app().bridge.metrics.render();
    // The topics of a route are told as one.
    let series = r#"twinspan_backlog_messages{group="g",route="slow"}"#;
    let looked = Instant::now();
    while span.metric(series) != 6.0 {
        assert!(looked.elapsed() < PATIENCE * 3, "{}", text());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    client.unsubscribe("slow.b", Some("g")).await.unwrap();
    client.unsubscribe("slow.c", Some("g")).await.unwrap();
    eventually("a group that left has no series", async || !text().contains(r#"group="g""#)).await;
}

/// A durable lane, where some things fail as long as a test wants them to.
struct Reluctant {
    log: Arc<dyn DurableLane>,
    /// No dead letter is stored.
    refuses: AtomicBool,
    /// No receipt for one comes.
    hangs: AtomicBool,
    /// They come late.
    waits: watch::Sender<bool>,
}

impl Reluctant {
    async fn start() -> (Span, Arc<Self>) {
        Self::on(Plan::default()).await
    }

    async fn on(mut plan: Plan) -> (Span, Arc<Self>) {
        let dir = tempfile::tempdir().unwrap();
        let absent = |_: &_| Err(std::io::ErrorKind::NotFound.into());
        let table = source::read("routes.toml".as_ref(), &plan.routes, &absent).unwrap();
        let (policy, settings) = (Policy::new(table), &plan.settings.lanes.durable);
        let data = dir.path().join("data");
        let log = open_durable(settings, &data, policy.clone(), Arc::new(Metrics::new())).await.unwrap();
        let (refuses, hangs, waits) = (false.into(), false.into(), watch::Sender::new(false));
        let lane = Arc::new(Self { log, refuses, hangs, waits });
        plan.lanes = Some(Carriers { ephemeral: Bus::new(policy, 1 << 20), durable: lane.clone() });
        (Span::inside(plan, dir).await, lane)
    }
}

#[async_trait]
impl DurableLane for Reluctant {
    fn append<'a>(
        &'a self,
        route: &'a Arc<Route>,
        topic: &'a Topic,
        message: Message,
        publisher: Publisher,
    ) -> Appending<'a> {
        let appending = async move {
            let is_dead = topic.as_str().starts_with("dead.");
            if is_dead && self.refuses.load(Ordering::SeqCst) {
                return Err(LaneError::StorageFull("the disk is full".into()));
            }
            if is_dead && self.hangs.load(Ordering::SeqCst) {
                return Ok(Receipt::of(std::future::pending()));
            }
            let receipt = self.log.append(route, topic, message, publisher).await?;
            let mut waits = self.waits.subscribe();
            Ok(Receipt::of(async move {
                let stored = receipt.await;
                if is_dead {
                    waits.wait_for(|waits| !waits).await.unwrap();
                }
                stored
            }))
        };
        Either::Right(Box::pin(appending))
    }

    async fn tail(&self, route: &Arc<Route>, topic: &Topic) -> Result<Arc<Tail>, LaneError> {
        self.log.tail(route, topic).await
    }

    async fn read(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        start: Start,
    ) -> Result<Box<dyn Reader>, LaneError> {
        self.log.read(route, topic, start).await
    }

    async fn join(
        &self,
        route: &Arc<Route>,
        topic: &Topic,
        joining: Joining,
    ) -> Result<Box<dyn Member>, LaneError> {
        self.log.join(route, topic, joining).await
    }

    async fn seek(&self, _: &Arc<Route>, topic: &Topic, group: &str, _: Start) -> Result<(), LaneError> {
        match topic.as_str() {
            "orders.moved" => Ok(()),
            "orders.away" => Err(LaneError::Unavailable("the broker is away".into())),
            _ => Err(LaneError::BadRequest(format!("there is no group `{group}`"))),
        }
    }

    async fn delete_group(&self, _: &Arc<Route>, topic: &Topic, _: &str) -> Result<bool, LaneError> {
        match topic.as_str() {
            "orders.moved" => Ok(true),
            "orders.busy" => Err(LaneError::GroupBusy("it has members".into())),
            _ => Ok(false),
        }
    }

    async fn topics(&self, pattern: &Pattern) -> Result<Vec<Topic>, LaneError> {
        self.log.topics(pattern).await
    }

    fn watch_topics(&self) -> watch::Receiver<BTreeSet<Topic>> {
        self.log.watch_topics()
    }

    async fn create(&self, route: &Arc<Route>, topic: &Topic) -> Result<bool, LaneError> {
        self.log.create(route, topic).await
    }

    async fn groups(&self, route: &Arc<Route>, topic: &Topic) -> Result<Vec<GroupReport>, LaneError> {
        if topic.as_str() == "slow.told" {
            return Ok(vec![GroupReport {
                name: "g".into(),
                mode: Some(GroupMode::Shared),
                members: 2,
                backlog: 7,
                unacked: 3,
                oldest: Some(Timestamp::from_millis(Timestamp::now().as_millis() - 90_000)),
            }]);
        }
        self.log.groups(route, topic).await
    }

    async fn probe(&self) -> Result<Duration, LaneError> {
        self.log.probe().await
    }

    fn state(&self) -> watch::Receiver<LaneState> {
        self.log.state()
    }

    async fn close(&self) {
        self.log.close().await;
    }
}

#[tokio::test]
async fn a_dead_letter_that_cannot_be_stored_stays_in_its_group_until_it_can() {
    let (span, lane) = Reluctant::start().await;
    lane.refuses.store(true, Ordering::SeqCst);
    let mut client = span.client().await;
    client.subscribe("jobs.full", json!({"group": "g"})).await.unwrap();
    client.publish("jobs.full", &draft("1")).await.unwrap();
    refuse_three_times(&mut client).await;
    let retries = r#"twinspan_retries_total{lane="durable",route="jobs"}"#;
    eventually("it was tried again", async || span.metric(retries) >= 2.0).await;
    assert_eq!(backlog(&span, "jobs.full").await, 1, "it is not acknowledged");
    assert_eq!(span.metric(r#"twinspan_dead_lettered_total{route="jobs"}"#), 0.0);
    lane.refuses.store(false, Ordering::SeqCst);
    eventually("it is stored and acknowledged", async || backlog(&span, "jobs.full").await == 0).await;
    assert_eq!(stored(&span, "dead.jobs.full").await.len(), 1);
    silent(&mut client).await;
}

#[tokio::test]
async fn a_dead_letter_that_takes_long_holds_up_no_other_delivery_and_is_not_lost_with_its_client() {
    let (span, lane) = Reluctant::start().await;
    lane.hangs.store(true, Ordering::SeqCst);
    let mut client = span.client().await;
    client.subscribe("jobs.slow", json!({"group": "g", "prefetch": 2})).await.unwrap();
    client.publish("jobs.slow", &draft("0")).await.unwrap();
    refuse_three_times(&mut client).await;
    for n in 1..20 {
        client.publish("jobs.slow", &draft(n.to_string())).await.unwrap();
        let next = event(&mut client).await;
        assert_eq!(next.payload().unwrap(), n.to_string().into_bytes());
        client.ack(&[next.delivery.unwrap()]).await.unwrap();
    }
    assert_eq!(backlog(&span, "jobs.slow").await, 1);
    // Whoever leaves takes nothing along: the next member stores it.
    lane.hangs.store(false, Ordering::SeqCst);
    drop(client);
    let heir = span.client().await;
    heir.subscribe("jobs.slow", json!({"group": "g"})).await.unwrap();
    eventually("it is stored and acknowledged", async || backlog(&span, "jobs.slow").await == 0).await;
    assert_eq!(stored(&span, "dead.jobs.slow").await.len(), 1);
}

#[tokio::test]
async fn a_dead_letter_whose_member_leaves_before_it_is_acknowledged_is_stored_once() {
    left_before_the_ack(Plan::default()).await;
}

#[tokio::test]
async fn a_dead_letter_on_pulsar_whose_member_leaves_before_it_is_acknowledged_is_stored_once() {
    if let Some(plan) = Plan::on_brokers().await {
        left_before_the_ack(plan).await;
    }
}

async fn left_before_the_ack(plan: Plan) {
    let (span, lane) = Reluctant::on(plan).await;
    lane.waits.send_replace(true);
    let mut client = span.client().await;
    client.subscribe("jobs.left", json!({"group": "g"})).await.unwrap();
    client.publish("jobs.left", &draft("1")).await.unwrap();
    refuse_three_times(&mut client).await;
    eventually("it is stored", async || span.get("/topics/dead.jobs.left/messages").await.0 == 200).await;
    drop(client);
    let left = async || span.get("/topics/jobs.left").await.1["groups"][0]["members"] == 0;
    eventually("its member has left", left).await;
    lane.waits.send_replace(false);
    let dead = r#"twinspan_dead_lettered_total{route="jobs"}"#;
    eventually("it is known to be stored", async || span.metric(dead) == 1.0).await;
    assert_eq!(backlog(&span, "jobs.left").await, 1, "and not acknowledged");

    let mut heir = span.client().await;
    heir.subscribe("jobs.left", json!({"group": "g"})).await.unwrap();
    eventually("the next one acknowledges it", async || backlog(&span, "jobs.left").await == 0).await;
    silent(&mut heir).await;
    assert_eq!(stored(&span, "dead.jobs.left").await.len(), 1);
    assert_eq!(span.metric(dead), 1.0);
}

/// Moves a group; what the group brings from there may come before the answer.
async fn seek(client: &mut Client, topic: &str, group: &str) -> Result<Vec<Heard>, String> {
    let frame =
        json!({"type": "seek", "request_id": "s", "topic": topic, "group": group, "from": "earliest"});
    client.send(frame.to_string()).await.unwrap();
    let mut before = Vec::new();
    loop {
        let heard = next(client).await;
        match heard.kind.as_str() {
            "event" => before.push(heard),
            "ack" => {
                assert_eq!((heard.request_id.as_deref(), heard.group.as_deref()), (Some("s"), Some(group)));
                return Ok(before);
            }
            _ => {
                let error = heard.error.unwrap();
                return Err(format!("{}: {}", error.code, error.message));
            }
        }
    }
}

#[tokio::test]
async fn a_reload_of_the_routes_holds_for_what_is_given_back_from_then_on() {
    let span = Span::start().await;
    let mut client = span.client().await;
    client.subscribe("slow.reloaded", json!({"group": "g"})).await.unwrap();
    client.publish("slow.reloaded", &draft("1")).await.unwrap();
    let held = event(&mut client).await;
    span.write_routes(&ROUTES.replace("backoff = [\"1m\"]", "backoff = [\"1ms\"]"));
    let reload = http_client().post(span.admin("/reload")).send().await.unwrap();
    assert_eq!(answer(reload).await.0, 200);
    nack(&client, &held).await;
    assert_eq!(event(&mut client).await.attempt, Some(2));
}

#[tokio::test]
async fn a_seek_forgets_what_this_connection_held_and_passes_over_topics_without_the_group() {
    let (span, _lane) = Reluctant::start().await;
    let mut client = span.client().await;
    let mut held = Vec::new();
    for topic in ["orders.moved", "orders.other"] {
        client.subscribe(topic, json!({"group": "g"})).await.unwrap();
        client.publish(topic, &draft("1")).await.unwrap();
        held.push(event(&mut client).await.delivery.unwrap());
    }
    seek(&mut client, "orders.moved", "g").await.unwrap();
    assert_eq!(refused(client.ack(&[held[0]]).await), "UNKNOWN_DELIVERY");
    client.ack(&[held[1]]).await.unwrap();
    // What comes after a seek is held as ever.
    client.publish("orders.moved", &draft("2")).await.unwrap();
    let later = event(&mut client).await.delivery.unwrap();
    client.ack(&[later]).await.unwrap();

    let none = seek(&mut client, "mixed.kept.*", "g").await.unwrap_err();
    assert!(none.starts_with("BAD_REQUEST: there is no group `g` on `mixed.kept.*`"), "{none}");
    // The lane refuses on a topic that has the group: that is an error, and what has moved is said.
    let other = seek(&mut client, "orders.*", "g").await.unwrap_err();
    assert!(other.starts_with("BAD_REQUEST: seeking in `orders.other`"), "{other}");
    assert!(other.ends_with("on 1 other topics group `g` has moved"), "{other}");
    // On a topic without the group it is none.
    client.subscribe("orders.moved", json!({"group": "h"})).await.unwrap();
    seek(&mut client, "orders.*", "h").await.unwrap();
    client.publish("orders.away", &draft("1")).await.unwrap();
    let away = seek(&mut client, "orders.*", "h").await.unwrap_err();
    assert!(away.starts_with("LANE_UNAVAILABLE: seeking in `orders.away`"), "{away}");
}

#[tokio::test]
async fn a_group_is_deleted_by_the_operators_alone_and_what_is_in_the_way_is_said() {
    let (span, _lane) = Reluctant::start().await;
    let delete = async |base: String| answer(http_client().delete(base).send().await.unwrap()).await;
    for (topic, status, code) in [
        ("orders.moved", 204, None),
        ("orders.busy", 409, Some("GROUP_BUSY")),
        ("orders.none", 404, Some("TOPIC_NOT_FOUND")),
        ("telemetry.a", 404, Some("TOPIC_NOT_FOUND")),
        ("nowhere", 404, Some("NO_ROUTE")),
        ("a..b", 400, Some("BAD_REQUEST")),
    ] {
        let path = format!("/topics/{topic}/groups/g");
        let (found, body) = delete(span.admin(&path)).await;
        assert_eq!((found, body["error"]["code"].as_str()), (status, code), "{topic}: {body}");
        assert_eq!(delete(span.http(&path)).await.0, 404, "clients have no such path");
    }
}

#[tokio::test]
async fn a_report_tells_of_each_group_what_the_lane_knows() {
    let (span, _lane) = Reluctant::start().await;
    let client = span.client().await;
    client.subscribe("slow.told", json!({"group": "g"})).await.unwrap();
    let (_, told) = span.get("/topics/slow.told").await;
    let group = &told["groups"][0];
    let known = ["group", "mode", "members", "backlog", "unacked"].map(|name| group[name].clone());
    assert_eq!(known, [json!("g"), json!("shared"), json!(2), json!(7), json!(3)], "{told}");
    assert!((90_000..100_000).contains(&group["oldest_age_ms"].as_u64().unwrap()), "{told}");
    let series = |name: &str| span.metric(&format!("twinspan_{name}{{group=\"g\",route=\"slow\"}}"));
    eventually("it is told as metrics", async || series("backlog_messages") == 7.0).await;
    assert_eq!(series("unacked_messages"), 3.0);
    assert!((90.0..120.0).contains(&series("backlog_age_seconds")));
}

/// What the carriers do when they are asked for it.
mod moved {
    use super::*;

    on_both_kinds! {
        a_group_goes_on_where_it_was_sent_and_forgets_what_was_held,
        a_group_without_members_is_deleted_and_begins_anew,
        members_and_what_they_hold_are_told,
    }
}

async fn a_group_goes_on_where_it_was_sent_and_forgets_what_was_held(span: Span) {
    let mut client = span.client().await;
    client.subscribe("orders.seek", json!({"group": "g"})).await.unwrap();
    let mut events = Vec::new();
    for n in 0..5 {
        client.publish("orders.seek", &draft(n.to_string())).await.unwrap();
        events.push(event(&mut client).await);
    }
    let delivery = |n: usize| [events[n].delivery.unwrap()];
    client.ack(&[events[0].delivery.unwrap(), events[1].delivery.unwrap()]).await.unwrap();
    let mut again = seek(&mut client, "orders.seek", "g").await.unwrap();
    assert_eq!(refused(client.ack(&delivery(4)).await), "UNKNOWN_DELIVERY");
    // Everything comes again, what was acknowledged as well.
    while again.len() < 5 {
        again.push(event(&mut client).await);
    }
    let mut payloads: Vec<_> = again.iter().map(|event| event.payload().unwrap()).collect();
    payloads.sort();
    assert_eq!(payloads, ["0", "1", "2", "3", "4"].map(|n| n.as_bytes().to_vec()));
    let deliveries: Vec<_> = again.iter().map(|event| event.delivery.unwrap()).collect();
    client.ack(&deliveries).await.unwrap();
    eventually("all is done", async || backlog(&span, "orders.seek").await == 0).await;
    let none = seek(&mut client, "orders.seek", "nobody").await.unwrap_err();
    assert!(none.starts_with("BAD_REQUEST"), "{none}");
    // On a pattern the topics without the group are passed over.
    client.publish("orders.bystander", &draft("0")).await.unwrap();
    let before = seek(&mut client, "orders.*", "g").await.unwrap();
    let first = match before.into_iter().next() {
        Some(first) => first,
        None => event(&mut client).await,
    };
    assert_eq!(first.topic.as_deref(), Some("orders.seek"));
}

async fn a_group_without_members_is_deleted_and_begins_anew(span: Span) {
    let delete = async || {
        let path = span.admin("/topics/orders.gone/groups/g");
        answer(http_client().delete(path).send().await.unwrap()).await.0
    };
    let mut client = span.client().await;
    client.publish("orders.gone", &draft("0")).await.unwrap();
    let group = json!({"group": "g", "from": "earliest"});
    client.subscribe("orders.gone", group.clone()).await.unwrap();
    let first = event(&mut client).await;
    client.ack(&[first.delivery.unwrap()]).await.unwrap();
    assert_eq!(delete().await, 409, "it has a member");
    client.unsubscribe("orders.gone", Some("g")).await.unwrap();
    eventually("without members it is deleted", async || delete().await == 204).await;
    assert_eq!(delete().await, 404);
    client.subscribe("orders.gone", group).await.unwrap();
    assert_eq!(event(&mut client).await.attempt, Some(1), "it remembers nothing");
}

async fn members_and_what_they_hold_are_told(span: Span) {
    let (mut one, mut two) = (span.client().await, span.client().await);
    for client in [&one, &two] {
        client.subscribe("slow.d", json!({"group": "g", "prefetch": 1})).await.unwrap();
    }
    for n in 0..3 {
        one.publish("slow.d", &draft(n.to_string())).await.unwrap();
    }
    event(&mut one).await;
    event(&mut two).await;
    let report = async || span.get("/topics/slow.d").await.1["groups"][0].clone();
    let expected = [json!("shared"), json!(2), json!(3), json!(2)];
    eventually("the report is whole", async || {
        let group = report().await;
        ["mode", "members", "backlog", "unacked"].map(|name| group[name].clone()) == expected
    })
    .await;
    assert!(report().await["oldest_age_ms"].as_u64().unwrap() < 30_000);
}
