//! The promises of `EphemeralLane`, each on every carrier: the bus, and a real nats-server.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use twinspan::lane::bus::Bus;
use twinspan::lane::contract::{EphemeralLane, LaneError, Listening};
use twinspan::message::{Draft, Message, MessageId, ReplyTo, Timestamp};
use twinspan::policy::Policy;
use twinspan::policy::table::Route;
use twinspan::topic::Topic;

use crate::brokers;
use crate::lanes::{
    Recorder, counted, ephemeral, eventually, is_up, message, nats, pattern, policy, publish, route,
    settings, text, topic, unique,
};

/// A carrier under test: the lane of two bridges. In process there is one bridge, so both are the same.
struct Carrier {
    here: Arc<dyn EphemeralLane>,
    there: Arc<dyn EphemeralLane>,
    policy: Policy,
    requests: Box<dyn Fn() -> usize + Send + Sync>,
}

impl Carrier {
    fn bus() -> Self {
        let policy = policy([ephemeral(">", "{topic}")]);
        let bus = Bus::new(policy.clone(), 64 << 20);
        let counted = bus.clone();
        Self { here: bus.clone(), there: bus, policy, requests: Box::new(move || counted.requests()) }
    }

    /// On the shared server, under a prefix of its own.
    async fn nats() -> Self {
        let broker = brokers::shared_nats().await;
        let policy = policy([ephemeral(">", &format!("{}.{{topic}}", unique()))]);
        let (here, there) =
            (nats(&settings(broker.url()), &policy).await, nats(&settings(broker.url()), &policy).await);
        let counted = here.clone();
        Self { here, there, policy, requests: Box::new(move || counted.requests()) }
    }

    async fn publish(&self, name: &str, payload: impl Into<String>) {
        publish(&*self.here, &self.policy, name, payload).await;
    }

    async fn request(&self, name: &str, payload: &str, timeout: Duration) -> Result<Message, LaneError> {
        let name = topic(name);
        self.here.request(&self.route(&name), &name, message(payload), timeout).await
    }

    fn route(&self, name: &Topic) -> Arc<Route> {
        route(&self.policy, name)
    }
}

macro_rules! promises {
    ($($promise:ident,)*) => {
        mod bus {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                super::$promise(super::Carrier::bus()).await;
            })*
        }
        mod nats {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn $promise() {
                if crate::brokers::left_out() {
                    return;
                }
                super::$promise(super::Carrier::nats().await).await;
            })*
        }
    };
}

promises![
    a_message_is_heard_with_everything_its_publisher_gave_it,
    one_callers_messages_on_a_topic_are_heard_in_order,
    what_is_published_after_listen_returned_is_heard,
    an_ear_hears_the_topics_of_its_pattern_until_its_place_is_dropped,
    a_group_hears_each_message_once_and_its_ears_share_them,
    history_gives_the_newest_of_each_topic_oldest_first,
    history_and_hearing_together_have_every_message_once_and_in_order,
    a_request_has_the_first_reply_and_no_other,
    a_request_that_nobody_serves_fails_at_once,
    a_request_that_nobody_answers_fails_in_time_and_its_late_reply_is_dropped,
    a_request_that_is_dropped_leaves_nothing,
    a_header_that_cannot_be_carried_is_refused_by_name_and_nothing_is_sent,
    a_round_trip_is_timed_and_closing_ends_soon,
];

async fn a_message_is_heard_with_everything_its_publisher_gave_it(carrier: Carrier) {
    let (ear, _listening) = Recorder::listening(&*carrier.there, "a.b").await;
    let name = topic("a.b");
    let full = Draft {
        id: Some(MessageId::new()),
        payload: (0..=255).collect::<Vec<u8>>().into(),
        key: Some("a key".into()),
        headers: [("traceparent", "00-ab-cd-01"), ("empty", ""), ("Text", "ä: \u{1F980}")]
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .into(),
        event_time: Some(Timestamp::from_millis(1_763_715_600_123)),
        delay: None,
    }
    .accept();
    let bare = Draft::default().accept();
    for sent in [&full, &bare] {
        carrier.here.publish(&carrier.route(&name), &name, sent.clone()).await.unwrap();
    }
    let heard = ear.wait(2).await;
    assert_eq!((&heard[0].message, &heard[1].message), (&full, &bare));
    assert_eq!((&heard[0].topic, &heard[0].reply_to, heard[0].stored.is_none()), (&name, &None, true));
    assert!(Arc::ptr_eq(&ear.routes()[0], &carrier.route(&name)));
}

async fn one_callers_messages_on_a_topic_are_heard_in_order(carrier: Carrier) {
    let (ear, _listening) = Recorder::listening(&*carrier.there, "a.>").await;
    for at in 0..2000 {
        carrier.publish("a.b", at.to_string()).await;
    }
    ear.wait(2000).await;
    assert_eq!(ear.payloads(), (0..2000).map(|at| at.to_string()).collect::<Vec<_>>());
}

async fn what_is_published_after_listen_returned_is_heard(carrier: Carrier) {
    let rounds = 500;
    let mut ears = Vec::new();
    for round in 0..rounds {
        let name = format!("round.{round}");
        ears.push(Recorder::listening(&*carrier.there, &name).await);
        carrier.publish(&name, "x").await;
    }
    carrier.publish(&format!("round.{}", rounds - 1), "last").await;
    ears[rounds - 1].0.wait_for("last").await;
    let deaf = ears.iter().filter(|(ear, _)| ear.heard().is_empty()).count();
    assert_eq!(deaf, 0, "of {rounds} ears");
}

async fn an_ear_hears_the_topics_of_its_pattern_until_its_place_is_dropped(carrier: Carrier) {
    let (all, _all) = Recorder::listening(&*carrier.there, ">").await;
    let (star, star_place) = Recorder::listening(&*carrier.there, "a.*").await;
    let (one, _one) = Recorder::listening(&*carrier.there, "a.b").await;
    let (same, _same) = Recorder::listening(&*carrier.there, "a.b").await;
    for name in ["a.b", "a.c", "a.b.c", "a"] {
        carrier.publish(name, name).await;
    }
    carrier.publish("a.b", "end").await;
    for ear in [&all, &star, &one, &same] {
        ear.wait_for("end").await;
    }
    assert_eq!(all.payloads(), ["a.b", "a.c", "a.b.c", "a", "end"]);
    assert_eq!(star.payloads(), ["a.b", "a.c", "end"]);
    assert_eq!(one.payloads(), ["a.b", "end"]);
    assert_eq!(same.payloads(), ["a.b", "end"]);

    drop(star_place);
    carrier.publish("a.b", "after").await;
    for ear in [&all, &one, &same] {
        ear.wait_for("after").await;
    }
    assert_eq!(star.payloads().len(), 3);
    assert_eq!(Arc::strong_count(&star), 1, "the lane lets go of the ear");
}

async fn a_group_hears_each_message_once_and_its_ears_share_them(carrier: Carrier) {
    let listen = async |lane: &dyn EphemeralLane, topics: &str, group| {
        let ear = Recorder::new();
        let listening = lane.listen(&pattern(topics), Some(group), 0, ear.clone()).await.unwrap();
        (ear, listening)
    };
    let members = [
        listen(&*carrier.here, "jobs.*", "g").await,
        listen(&*carrier.here, "jobs.*", "g").await,
        listen(&*carrier.there, "jobs.*", "g").await,
        listen(&*carrier.there, "jobs.>", "g").await,
    ];
    let (other, _other) = listen(&*carrier.there, "jobs.*", "h").await;
    let (plain, _plain) = Recorder::listening(&*carrier.there, "jobs.*").await;
    let sent: Vec<_> = (0..400).map(|at| at.to_string()).collect();
    for payload in &sent {
        carrier.publish("jobs.a", payload.clone()).await;
    }
    plain.wait(400).await;
    other.wait(400).await;
    let total = || members.iter().map(|(ear, _)| ear.heard().len()).sum::<usize>();
    eventually("the group has heard everything", async || total() >= 400).await;
    let counts = counted(members.iter().flat_map(|(ear, _)| ear.payloads()));
    assert_eq!(counts, sent.iter().map(|payload| (payload.clone(), 1)).collect());
    for (ear, _) in &members {
        assert!(ear.heard().len() >= 20, "{}", ear.heard().len());
    }

    // Whoever leaves may take along what was on its way to it, and no more.
    let [first, second, third, fourth] = members;
    drop((first.1, second.1, third.1));
    let whole = async |round: usize| {
        let before = fourth.0.heard().len();
        for at in 0..50 {
            carrier.publish("jobs.a", format!("{round}:{at}")).await;
        }
        plain.wait_for(&format!("{round}:49")).await;
        let heard = tokio::time::timeout(Duration::from_millis(500), fourth.0.wait(before + 50));
        heard.await.is_ok()
    };
    assert!(whole(1).await || whole(2).await, "the last member gets everything");
    assert!(whole(3).await);
}

async fn history_gives_the_newest_of_each_topic_oldest_first(carrier: Carrier) {
    let short =
        Route { history: 3, ..ephemeral("short.>", &carrier.policy.table().routes()[0].nats.to_string()) };
    let all = (*carrier.policy.table().routes()[0]).clone();
    carrier.policy.replace(twinspan::policy::table::RouteTable::new([all, short]));
    // What a bridge publishes, and what it receives.
    let (fence, _fence) = Recorder::listening(&*carrier.there, ">").await;
    for at in 0..5 {
        carrier.publish("short.a", format!("a{at}")).await;
        carrier.publish("short.b", format!("b{at}")).await;
        carrier.publish("long.a", format!("c{at}")).await;
    }
    fence.wait(15).await;
    for lane in [&carrier.here, &carrier.there] {
        let past = async |topics: &str, last| {
            let listening = lane.listen(&pattern(topics), None, last, Recorder::new()).await.unwrap();
            listening.history.iter().map(|(_, envelope)| text(envelope)).collect::<Vec<_>>()
        };
        assert_eq!(past("short.a", 2).await, ["a3", "a4"]);
        assert_eq!(past("short.*", 9).await, ["a2", "a3", "a4", "b2", "b3", "b4"]);
        assert_eq!(past("long.*", 4).await, ["c1", "c2", "c3", "c4"]);
        assert_eq!(past(">", 1).await, ["c4", "a4", "b4"]);
        assert_eq!(past("short.a", 0).await, [""; 0]);
        assert_eq!(past("nothing.here", 9).await, [""; 0]);
    }
    let listening = carrier.here.listen(&pattern("short.a"), None, 1, Recorder::new()).await.unwrap();
    assert_eq!(&*listening.history[0].0.name, "short.>");
}

async fn history_and_hearing_together_have_every_message_once_and_in_order(carrier: Carrier) {
    let (publishers, rounds, burst) = (4, 30, 30);
    let each = rounds * burst;
    // The bridge that is joined hears from the beginning on, so its rings are whole.
    let (fence, _fence) = Recorder::listening(&*carrier.there, "a.>").await;
    let mut publishing = tokio::task::JoinSet::new();
    let (begin, _) = tokio::sync::broadcast::channel(rounds);
    for publisher in 0..publishers {
        let lane = if publisher % 2 == 0 { carrier.here.clone() } else { carrier.there.clone() };
        let (policy, mut begins) = (carrier.policy.clone(), begin.subscribe());
        publishing.spawn(async move {
            while let Ok(round) = begins.recv().await {
                for at in 0..burst {
                    publish(&*lane, &policy, "a.b", format!("{publisher}:{}", round * burst + at)).await;
                }
            }
        });
    }
    let mut joined = Vec::new();
    for round in 0..rounds {
        // Joins somewhere in the middle of a burst.
        begin.send(round).unwrap();
        fence.wait(publishers * burst * round + fastrand::usize(..publishers * burst)).await;
        // An upstream subscription that is there, one that comes anew, and one that others match as well.
        let topics = ["a.b", "a.>", "*.b", "*.*", "*.>", ">"][round % 6];
        let ear = Recorder::new();
        let listening = carrier.there.listen(&pattern(topics), None, usize::MAX, ear.clone()).await.unwrap();
        joined.push((ear, listening));
    }
    drop(begin);
    while let Some(ended) = publishing.join_next().await {
        ended.unwrap();
    }
    fence.wait(publishers * each).await;
    for (round, (ear, listening)) in joined.iter().enumerate() {
        let past: Vec<_> = listening.history.iter().map(|(_, envelope)| text(envelope)).collect();
        ear.wait((publishers * each).saturating_sub(past.len())).await;
        let mut streams: HashMap<String, Vec<usize>> = HashMap::new();
        for payload in past.iter().chain(&ear.payloads()) {
            let (publisher, at) = payload.split_once(':').unwrap();
            streams.entry(publisher.into()).or_default().push(at.parse().unwrap());
        }
        for publisher in 0..publishers {
            let stream = streams.remove(&publisher.to_string()).unwrap_or_default();
            let expected: Vec<_> = (0..each).collect();
            assert_eq!(stream, expected, "ear {round} ({} past), publisher {publisher}", past.len());
        }
    }
    let within = |(_, listening): &&(_, Listening)| (1..publishers * each).contains(&listening.history.len());
    assert!(joined.iter().filter(within).count() > rounds / 2, "few joined while messages came");
}

async fn a_request_has_the_first_reply_and_no_other(carrier: Carrier) {
    let (ear, _listening) = Recorder::listening(&*carrier.there, "svc.>").await;
    let serve = async {
        let heard = ear.wait(1).await;
        let to = heard[0].reply_to.clone().expect("a request says where its answer goes");
        assert_eq!(to.timeout, Some(Duration::from_secs(10)));
        let first =
            Draft { payload: "first".into(), headers: [("x".into(), "y".into())].into(), ..Draft::default() };
        carrier.there.reply(&to, first.accept()).await.unwrap();
        carrier.there.reply(&to, message("second")).await.unwrap();
        text(&heard[0])
    };
    let (reply, asked) = tokio::join!(carrier.request("svc.time", "?", Duration::from_secs(10)), serve);
    let reply = reply.unwrap();
    assert_eq!((&*reply.payload, reply.headers["x"].as_str(), asked.as_str()), (&b"first"[..], "y", "?"));
    assert_eq!((carrier.requests)(), 0);
    // The second reply is nobody's: the next request has its own.
    let (next, ()) = tokio::join!(carrier.request("svc.time", "2", Duration::from_secs(10)), async {
        let to = ear.wait(2).await[1].reply_to.clone().unwrap();
        carrier.there.reply(&to, message("third")).await.unwrap();
    });
    assert_eq!(&*next.unwrap().payload, b"third");
    let past = carrier.there.listen(&pattern("svc.time"), None, 9, Recorder::new()).await.unwrap();
    assert!(past.history.is_empty(), "a request is not kept: it would be answered again");
}

async fn a_request_that_nobody_serves_fails_at_once(carrier: Carrier) {
    // The best of a few: on a busy machine one may wait for the processor.
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let begun = Instant::now();
        let answer = carrier.request("nobody.here", "?", Duration::from_secs(10)).await;
        assert!(matches!(answer, Err(LaneError::NoResponders(name)) if name == topic("nobody.here")));
        best = best.min(begun.elapsed());
    }
    assert!(best < Duration::from_millis(100), "{best:?}");
    assert_eq!((carrier.requests)(), 0);
}

async fn a_request_that_nobody_answers_fails_in_time_and_its_late_reply_is_dropped(carrier: Carrier) {
    let (ear, _listening) = Recorder::listening(&*carrier.there, "svc.mute").await;
    let begun = Instant::now();
    let answer = carrier.request("svc.mute", "?", Duration::from_millis(200)).await;
    assert!(matches!(answer, Err(LaneError::Timeout(name)) if name == topic("svc.mute")));
    assert!(begun.elapsed() >= Duration::from_millis(200) && begun.elapsed() < Duration::from_secs(5));
    assert_eq!((carrier.requests)(), 0);
    let to = ear.wait(1).await[0].reply_to.clone().unwrap();
    carrier.there.reply(&to, message("late")).await.unwrap();
    let nobodys = ReplyTo { address: "_INBOX.nobody".into(), timeout: None };
    carrier.there.reply(&nobodys, message("lost")).await.unwrap();
}

async fn a_request_that_is_dropped_leaves_nothing(carrier: Carrier) {
    let (ear, _listening) = Recorder::listening(&*carrier.there, "svc.mute").await;
    for round in 1..=100 {
        let mut asking = Box::pin(carrier.request("svc.mute", "?", Duration::from_secs(100)));
        tokio::select! {
            answer = &mut asking => panic!("{answer:?}"),
            _ = ear.wait(round) => {}
        }
        assert_eq!((carrier.requests)(), 1);
        drop(asking);
        assert_eq!((carrier.requests)(), 0);
    }
}

async fn a_header_that_cannot_be_carried_is_refused_by_name_and_nothing_is_sent(carrier: Carrier) {
    let (ear, _listening) = Recorder::listening(&*carrier.there, "a").await;
    let name = topic("a");
    let route = carrier.route(&name);
    for (header, value) in [
        ("x", "a\r\nPUB a 1\r\n\r\n1"),
        ("a\r\nb", "c"),
        ("x", " edge"),
        ("Nats-Msg-Id", "1"),
        ("TWINSPAN-id", "1"),
        ("a:b", "c"),
    ] {
        let bad = Draft { headers: [(header.into(), value.into())].into(), ..Draft::default() }.accept();
        let to = ReplyTo { address: "_INBOX.nobody".into(), timeout: None };
        let answers = [
            carrier.here.publish(&route, &name, bad.clone()).await,
            carrier.here.request(&route, &name, bad.clone(), Duration::from_secs(1)).await.map(drop),
            carrier.here.reply(&to, bad).await,
        ];
        for answer in answers {
            let Err(LaneError::BadRequest(why)) = answer else { panic!("{header:?}: {answer:?}") };
            assert!(why.contains(header) || why.contains(&format!("{header:?}")), "{why}");
        }
    }
    carrier.publish("a", "end").await;
    ear.wait_for("end").await;
    assert_eq!(ear.payloads(), ["end"]);
}

async fn a_round_trip_is_timed_and_closing_ends_soon(carrier: Carrier) {
    is_up(&*carrier.here).await;
    assert!(carrier.here.probe().await.unwrap() < Duration::from_secs(1));
    let (ear, _listening) = Recorder::listening(&*carrier.there, "a").await;
    for at in 0..500 {
        carrier.publish("a", at.to_string()).await;
    }
    let begun = Instant::now();
    carrier.here.close().await;
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    ear.wait(500).await;
}
