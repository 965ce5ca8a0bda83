//! The client that services use: what it does survives the connection that it was begun on.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use twinspan::client::{
    Backoff, ClientError, Consume, Consumed, Event, Incoming, Options, SendError, Status, Subscribe,
    Subscription, Twinspan,
};
use twinspan::message::{Draft, MessageId, Start};

use crate::harness::{Plan, Span, draft, eventually, on_both_kinds, soon};
use crate::proxy::Proxy;

on_both_kinds! {
    a_publish_whose_answer_was_cut_off_is_sent_again_with_its_id,
    many_messages_go_in_few_frames_and_each_is_told_of,
    what_was_not_answered_is_sent_again_in_its_order,
    a_subscription_goes_on_over_lost_connections_without_gap_or_duplicate,
    a_pattern_goes_on_over_lost_connections_and_finds_what_appeared_meanwhile,
    the_newest_of_a_pattern_come_without_gap_or_duplicate_wherever_the_connection_is_cut,
    an_ephemeral_subscription_says_that_it_missed_something,
    a_failed_handler_sees_its_message_again_with_the_attempt_raised,
    eight_handlers_run_at_once_and_each_key_keeps_its_order,
    a_consumer_over_cut_connections_handles_everything_and_repeats_nothing_it_knows,
    a_consumer_that_stops_finishes_what_runs_and_gives_back_the_rest,
}

/// The way to a bridge, to be cut and led elsewhere.
async fn way_to(span: &Span) -> Proxy {
    let way = Proxy::start();
    way.lead_to(span.running.listen.port());
    way
}

fn url(way: &Proxy) -> String {
    format!("ws://127.0.0.1:{}/ws", way.port())
}

/// A client whose next connection comes soon.
fn client(way: &Proxy) -> Twinspan {
    Twinspan::new(&url(way), quick()).unwrap()
}

fn quick() -> Options {
    let backoff = Backoff { first: Duration::from_millis(10), max: Duration::from_millis(200) };
    Options { backoff, ..Options::default() }
}

fn from(from: Start) -> Subscribe {
    Subscribe { from, ..Subscribe::default() }
}

fn group(name: &str) -> Consume {
    let backoff = Backoff { first: Duration::from_millis(50), max: Duration::from_secs(1) };
    Consume { group: name.into(), from: Start::Earliest, backoff, ..Consume::default() }
}

fn text(event: &Event) -> String {
    String::from_utf8(event.payload.to_vec()).unwrap()
}

async fn next_event(subscription: &mut Subscription) -> Event {
    loop {
        match soon(subscription.next()).await.unwrap() {
            Incoming::Event(event) => return event,
            Incoming::Info(_) => {}
            other => panic!("an event, not {other:?}"),
        }
    }
}

async fn publish(client: &Twinspan, topic: &str, payloads: impl IntoIterator<Item = usize>) {
    for n in payloads {
        client.publish(topic, &n).await.unwrap();
    }
}

/// Everything that a topic holds, as ids and payloads.
async fn stored(client: &Twinspan, topic: &str, count: usize) -> Vec<(String, String)> {
    let mut subscription = client.subscribe(topic, from(Start::Earliest)).await.unwrap();
    let mut found = Vec::new();
    loop {
        match soon(subscription.next()).await.unwrap() {
            Incoming::Event(event) => found.push((event.id().unwrap().to_owned(), text(&event))),
            Incoming::Info(info) if info.code.as_deref() == Some("REPLAY_DONE") => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(found.len() >= count, "{} of {count} are stored", found.len());
    found
}

async fn is_stored(span: &Span, topic: &str, count: usize) {
    eventually("the message is stored", async || {
        let (_, page) = span.get(&format!("/topics/{topic}/messages?from=earliest")).await;
        page["messages"].as_array().is_some_and(|messages| messages.len() >= count)
    })
    .await;
}

async fn a_publish_whose_answer_was_cut_off_is_sent_again_with_its_id(span: Span) {
    let way = way_to(&span).await;
    let client = client(&way);
    client.publish("orders.p", &"before").await.unwrap();
    let id = MessageId::new();
    way.swallow();
    let cut_off = client.send_in_line("orders.p", Draft { id: Some(id), ..draft("1") }).await.unwrap();
    // It has arrived, and its answer has not.
    is_stored(&span, "orders.p", 2).await;
    way.resume();
    way.cut();
    let published = soon(cut_off).await.unwrap();
    assert_eq!(published.id, id);
    assert!(published.status == Status::Duplicate && published.position.is_some(), "{published:?}");
    let copies = stored(&client, "orders.p", 2).await.split_off(1);
    assert_eq!(copies, [(id.to_string(), "1".into())]);
}

async fn many_messages_go_in_few_frames_and_each_is_told_of(span: Span) {
    let way = way_to(&span).await;
    let client = client(&way);
    let mut drafts: Vec<_> = (0..250).map(|n| draft(n.to_string())).collect();
    drafts[120] = draft("x".repeat(600 * 1024));
    let sending = client.send_all("orders.many", drafts);
    let cutting = async { way.cut() };
    let (results, ()) = soon(async { tokio::join!(sending, cutting) }).await;
    assert_eq!(results.len(), 250);
    for (n, result) in results.iter().enumerate() {
        match result {
            Ok(published) => assert!(published.position.is_some()),
            Err(SendError::NotSent { source: ClientError::Refused(error) }) => {
                assert_eq!((n, error.code.as_str()), (120, "TOO_LARGE"));
            }
            Err(other) => panic!("{n}: {other:?}"),
        }
    }
    assert_eq!(results.iter().filter(|result| result.is_err()).count(), 1);
    let all = stored(&client, "orders.many", 249).await;
    let all: Vec<usize> = all.into_iter().map(|(_, payload)| payload.parse().unwrap()).collect();
    assert_eq!(all, (0..250).filter(|n| *n != 120).collect::<Vec<_>>());
    assert_eq!(soon(client.publish_all("telemetry.many", ["a", "b"])).await.len(), 2);
}

async fn what_was_not_answered_is_sent_again_in_its_order(span: Span) {
    let way = way_to(&span).await;
    let client = client(&way);
    let mut under_way = FuturesUnordered::new();
    for n in 0..600 {
        if n % 200 == 150 {
            way.cut();
        }
        under_way.push(client.send_in_line("orders.line", draft(n.to_string())).await.unwrap());
    }
    while let Some(published) = soon(under_way.next()).await {
        published.unwrap();
    }
    assert!(way.accepted() > 1, "there was something to survive");
    let all = stored(&client, "orders.line", 600).await;
    let all: Vec<usize> = all.into_iter().map(|(_, payload)| payload.parse().unwrap()).collect();
    assert_eq!(all, (0..600).collect::<Vec<_>>(), "each once");
}

async fn a_subscription_goes_on_over_lost_connections_without_gap_or_duplicate(span: Span) {
    let way = way_to(&span).await;
    let (client, publisher) = (client(&way), Twinspan::new(&span.url(), quick()).unwrap());
    let mut live = client.subscribe("orders.s", from(Start::Latest)).await.unwrap();
    // Nothing was handed out yet: it goes on where it began.
    way.cut();
    publish(&publisher, "orders.s", 0..10).await;
    let mut newest = client.subscribe("orders.s", from(Start::Last(4))).await.unwrap();
    for n in 0..10 {
        assert_eq!(text(&next_event(&mut live).await), n.to_string());
    }
    for n in 6..10 {
        assert_eq!(text(&next_event(&mut newest).await), n.to_string());
    }
    for round in 1..=5 {
        way.cut();
        publish(&publisher, "orders.s", round * 10..round * 10 + 10).await;
        for n in round * 10..round * 10 + 10 {
            assert_eq!(text(&next_event(&mut live).await), n.to_string());
            assert_eq!(text(&next_event(&mut newest).await), n.to_string());
        }
    }
    assert!(way.accepted() >= 8, "each was cut again and again: {}", way.accepted());
}

async fn a_pattern_goes_on_over_lost_connections_and_finds_what_appeared_meanwhile(span: Span) {
    let way = way_to(&span).await;
    let (client, publisher) = (client(&way), Twinspan::new(&span.url(), quick()).unwrap());
    publish(&publisher, "orders.a", 0..3).await;
    let mut all = client.subscribe("orders.*", from(Start::Earliest)).await.unwrap();
    let mut heard: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for round in 1..=3 {
        let topics = ["orders.a", "orders.b", "orders.c"];
        way.cut();
        // One topic more in each round.
        for topic in &topics[..round] {
            publish(&publisher, topic, round * 3..round * 3 + 3).await;
        }
        let expected = [6, 12, 21][round - 1];
        while heard.values().map(Vec::len).sum::<usize>() < expected {
            let event = next_event(&mut all).await;
            heard.entry(event.topic().to_owned()).or_default().push(event.json().unwrap());
        }
    }
    let expected = [("orders.a", 0), ("orders.b", 6), ("orders.c", 9)]
        .map(|(topic, first)| (topic.to_owned(), (first..12).collect::<Vec<usize>>()));
    assert_eq!(heard, BTreeMap::from(expected));
}

async fn the_newest_of_a_pattern_come_without_gap_or_duplicate_wherever_the_connection_is_cut(span: Span) {
    const TOPICS: usize = 20;
    let way = way_to(&span).await;
    let (client, publisher) = (client(&way), Twinspan::new(&span.url(), quick()).unwrap());
    let topic = |at: usize| format!("orders.newest.{at}");
    // So large that no buffer on the way holds them all.
    let padded = |n: usize| format!("{n} {}", " ".repeat(400 << 10));
    for at in 0..TOPICS {
        publish(&publisher, &topic(at), 0..2).await;
        for n in 2..4 {
            publisher.publish(&topic(at), &padded(n)).await.unwrap();
        }
    }
    let mut newest = client.subscribe("orders.newest.*", from(Start::Last(2))).await.unwrap();
    let mut heard: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let done = Cell::new(0);
    let mut hear = async |heard: &mut BTreeMap<String, Vec<usize>>| match soon(newest.next()).await.unwrap() {
        Incoming::Event(event) => {
            let text = text(&event);
            let n = text.trim_matches('"').trim().parse().unwrap();
            heard.entry(event.topic().to_owned()).or_default().push(n);
        }
        Incoming::Info(info) if info.code.as_deref() == Some("REPLAY_DONE") => done.set(done.get() + 1),
        other => panic!("{other:?}"),
    };
    way.hold();
    way.cut();
    // More than were asked for, or fewer.
    let end = |at: usize| if at.is_multiple_of(2) { 5 } else { 7 };
    for at in 0..TOPICS {
        publish(&publisher, &topic(at), 4..end(at)).await;
    }
    for round in 0..2 {
        way.resume();
        let connections = way.accepted();
        while way.accepted() == connections {
            hear(&mut heard).await;
        }
        // The second may come later, where a connection has brought all in one go.
        assert!(round > 0 || done.get() == 0, "it was cut before all had come");
        way.hold();
        way.cut();
    }
    way.resume();
    let last =
        |heard: &BTreeMap<String, Vec<usize>>, at| heard.get(&topic(at)).and_then(|all| all.last().copied());
    while (0..TOPICS).any(|at| last(&heard, at) != Some(end(at) - 1)) {
        hear(&mut heard).await;
    }
    for at in 0..TOPICS {
        publish(&publisher, &topic(at), [end(at)]).await;
    }
    while (0..TOPICS).any(|at| last(&heard, at) != Some(end(at))) {
        hear(&mut heard).await;
    }
    for at in 0..TOPICS {
        let heard = &heard[&topic(at)];
        assert_eq!(*heard, (heard[0]..=end(at)).collect::<Vec<_>>(), "each once and in order");
        // The newest two of then or of now, and in any case all that came since.
        assert!((2..=end(at) - 2).contains(&heard[0]) && heard[0] <= 4, "{at} begins with {}", heard[0]);
    }
    assert_eq!(done.get(), 1, "told once");
}

async fn an_ephemeral_subscription_says_that_it_missed_something(span: Span) {
    let way = way_to(&span).await;
    let (client, publisher) = (client(&way), Twinspan::new(&span.url(), quick()).unwrap());
    for pattern in ["telemetry.e", "mixed.>"] {
        let topic = if pattern == "mixed.>" { "mixed.live.e" } else { pattern };
        let mut subscription = client.subscribe(pattern, from(Start::Latest)).await.unwrap();
        publish(&publisher, topic, [1]).await;
        assert_eq!(text(&next_event(&mut subscription).await), "1");
        let connections = way.accepted();
        way.cut();
        let back = async {
            eventually("the client is back", async || way.accepted() > connections).await;
            // Heard by nobody, or by who has subscribed again already.
            publish(&publisher, topic, [2]).await;
        };
        let (heard, ()) = tokio::join!(soon(subscription.next()), back);
        match heard.unwrap() {
            Incoming::Gap { topic, dropped: None, reason } => {
                assert_eq!((topic.as_str(), reason.as_str()), (pattern, "outage"));
            }
            other => panic!("a gap, not {other:?}"),
        }
        publish(&publisher, topic, [3]).await;
        let mut next = next_event(&mut subscription).await;
        if text(&next) == "2" {
            next = next_event(&mut subscription).await;
        }
        assert_eq!(text(&next), "3", "and what was heard before does not come again");
    }
}

async fn a_failed_handler_sees_its_message_again_with_the_attempt_raised(span: Span) {
    let client = Twinspan::new(&span.url(), quick()).unwrap();
    publish(&client, "orders.f", 0..3).await;
    let (stop, (tried, mut trials)) = (CancellationToken::new(), mpsc::unbounded_channel());
    let consuming = tokio::spawn({
        let (client, stop) = (client.clone(), stop.clone());
        async move {
            let handler = move |event: Event| {
                let tried = tried.clone();
                async move {
                    let (n, attempt) = (event.json::<u32>().unwrap(), event.attempt());
                    tried.send((n, attempt)).unwrap();
                    match (n, attempt) {
                        (1, 1) => Err("not yet"),
                        (1, 2) => panic!("a handler may panic"),
                        _ => Ok(()),
                    }
                }
            };
            client.consume("orders.f", group("failing"), stop, handler).await
        }
    });
    let mut seen = BTreeSet::new();
    while seen.len() < 5 {
        assert!(seen.insert(soon(trials.recv()).await.unwrap()), "each attempt once");
    }
    assert_eq!(seen, BTreeSet::from([(0, 1), (1, 1), (1, 2), (1, 3), (2, 1)]));
    stop.cancel();
    let consumed = soon(consuming).await.unwrap().unwrap();
    assert_eq!(consumed, Consumed { handled: 3, failed: 2, unconfirmed: 0 });
}

async fn eight_handlers_run_at_once_and_each_key_keeps_its_order(span: Span) {
    const KEYS: usize = 20;
    const EACH: usize = 10;
    let client = Twinspan::new(&span.url(), quick()).unwrap();
    for n in 0..EACH {
        let mut under_way = Vec::new();
        for key in 0..KEYS {
            let draft = Draft { key: Some(format!("k{key}")), ..draft(n.to_string()) };
            under_way.push(client.send_in_line("orders.k", draft).await.unwrap());
        }
        for published in under_way {
            soon(published).await.unwrap();
        }
    }
    let (stop, running, most) = (CancellationToken::new(), AtomicUsize::new(0), AtomicUsize::new(0));
    let (running, most) = (Arc::new(running), Arc::new(most));
    let (handled, mut order) = mpsc::unbounded_channel();
    let consuming = tokio::spawn({
        let (client, stop, running, most) = (client.clone(), stop.clone(), running.clone(), most.clone());
        let asked = Consume { concurrency: 8, prefetch: Some(100), ..group("keyed") };
        async move {
            let handler = move |event: Event| {
                let (running, most, handled) = (running.clone(), most.clone(), handled.clone());
                async move {
                    most.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    // Whoever overtakes has the time to.
                    tokio::time::sleep(Duration::from_millis(fastrand::u64(0..6))).await;
                    handled.send((event.key().unwrap().to_owned(), text(&event))).unwrap();
                    running.fetch_sub(1, Ordering::SeqCst);
                    Ok::<_, String>(())
                }
            };
            client.consume("orders.k", asked, stop, handler).await
        }
    });
    let mut by_key: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for _ in 0..KEYS * EACH {
        let (key, n) = soon(order.recv()).await.unwrap();
        by_key.entry(key).or_default().push(n);
    }
    let expected: Vec<_> = (0..EACH).map(|n| n.to_string()).collect();
    assert!(by_key.len() == KEYS && by_key.values().all(|order| *order == expected), "{by_key:?}");
    let most = most.load(Ordering::SeqCst);
    assert!((2..=8).contains(&most), "{most} at once");
    stop.cancel();
    let consumed = soon(consuming).await.unwrap().unwrap();
    assert_eq!((consumed.handled, consumed.unconfirmed), ((KEYS * EACH) as u64, 0));
}

async fn a_consumer_over_cut_connections_handles_everything_and_repeats_nothing_it_knows(span: Span) {
    const ALL: usize = 300;
    let way = way_to(&span).await;
    let publisher = Twinspan::new(&span.url(), quick()).unwrap();
    let mut under_way = Vec::new();
    for n in 0..ALL {
        under_way.push(publisher.send_in_line("orders.c", draft(n.to_string())).await.unwrap());
    }
    for published in under_way {
        soon(published).await.unwrap();
    }
    let (stop, (handled, mut order)) = (CancellationToken::new(), mpsc::unbounded_channel());
    let consuming = tokio::spawn({
        let (client, stop) = (client(&way), stop.clone());
        let asked = Consume { concurrency: 4, prefetch: Some(50), ..group("cut") };
        async move {
            let handler = move |event: Event| {
                let handled = handled.clone();
                async move { handled.send(event.json::<usize>().unwrap()).map_err(|_| "over") }
            };
            client.consume("orders.c", asked, stop, handler).await
        }
    });
    let mut times = vec![0; ALL];
    for n in 0..ALL {
        if n % 60 == 30 {
            way.cut();
        }
        times[soon(order.recv()).await.unwrap()] += 1;
    }
    // As many as there are were handled: so each of them, and none twice.
    assert!(times.iter().all(|times| *times == 1), "{times:?}");
    assert!(way.accepted() > 1, "there was something to survive");
    stop.cancel();
    assert_eq!(soon(consuming).await.unwrap().unwrap().handled, ALL as u64);
}

async fn a_consumer_that_stops_finishes_what_runs_and_gives_back_the_rest(span: Span) {
    let client = Twinspan::new(&span.url(), quick()).unwrap();
    publish(&client, "orders.z", 0..5).await;
    let (stop, finish) = (CancellationToken::new(), CancellationToken::new());
    let (started, mut begun) = mpsc::unbounded_channel();
    let consuming = tokio::spawn({
        let (client, stop, finish) = (client.clone(), stop.clone(), finish.clone());
        let asked = Consume { prefetch: Some(5), ..group("stopping") };
        async move {
            let handler = move |event: Event| {
                let (started, finish) = (started.clone(), finish.clone());
                async move {
                    started.send(text(&event)).unwrap();
                    finish.cancelled().await;
                    Ok::<_, String>(())
                }
            };
            client.consume("orders.z", asked, stop, handler).await
        }
    });
    assert_eq!(soon(begun.recv()).await.unwrap(), "0");
    stop.cancel();
    tokio::task::yield_now().await;
    assert!(!consuming.is_finished(), "the handler that runs is waited for");
    finish.cancel();
    let consumed = soon(consuming).await.unwrap().unwrap();
    assert_eq!(consumed, Consumed { handled: 1, failed: 0, unconfirmed: 0 });
    // What it did is done, and the rest is there at once for the next member.
    let mut member = span.client().await;
    member.subscribe("orders.z", json!({ "group": "stopping" })).await.unwrap();
    let mut rest = BTreeSet::new();
    while rest.len() < 4 {
        rest.insert(crate::harness::next_payload(&mut member).await);
    }
    assert_eq!(rest, ["1", "2", "3", "4"].map(str::to_owned).into());
}

#[tokio::test]
async fn a_handler_that_outlives_its_connection_is_waited_for_and_counts_as_unconfirmed() {
    let span = Span::start().await;
    let way = way_to(&span).await;
    let client = client(&way);
    publish(&client, "orders.o", [0]).await;
    let (stop, finish) = (CancellationToken::new(), CancellationToken::new());
    let (started, mut begun) = mpsc::unbounded_channel();
    let consuming = tokio::spawn({
        let (stop, finish) = (stop.clone(), finish.clone());
        async move {
            let handler = move |_: Event| {
                let (started, finish) = (started.clone(), finish.clone());
                async move {
                    started.send(()).unwrap();
                    finish.cancelled().await;
                    Ok::<_, String>(())
                }
            };
            client.consume("orders.o", group("outliving"), stop, handler).await
        }
    });
    soon(begun.recv()).await.unwrap();
    let connections = way.accepted();
    way.accept_then_close();
    way.cut();
    eventually("the loss is noticed", async || way.accepted() > connections).await;
    stop.cancel();
    finish.cancel();
    let consumed = soon(consuming).await.unwrap().unwrap();
    assert_eq!(consumed, Consumed { handled: 1, failed: 0, unconfirmed: 1 });
}

/// The bridge ends while a consumer and a subscriber are at work, and another takes its place.
async fn nothing_is_lost_when_the_bridge_restarts(plan: impl Fn() -> Plan) {
    let mut span = Span::with(plan()).await;
    let way = way_to(&span).await;
    let client = client(&way);
    let (stop, (handled, mut order)) = (CancellationToken::new(), mpsc::unbounded_channel());
    let consuming = tokio::spawn({
        let (client, stop) = (client.clone(), stop.clone());
        let asked = Consume { concurrency: 4, ..group("restart") };
        async move {
            let handler = move |event: Event| {
                let handled = handled.clone();
                async move { handled.send(event.json::<usize>().unwrap()).map_err(|_| "over") }
            };
            client.consume("orders.r", asked, stop, handler).await
        }
    });
    let mut plain = client.subscribe("orders.r", from(Start::Earliest)).await.unwrap();
    let publishing = tokio::spawn({
        let client = client.clone();
        async move {
            let mut ids = BTreeSet::new();
            for n in 0..200_usize {
                assert!(ids.insert(client.publish("orders.r", &n).await.unwrap().id.to_string()));
            }
            ids
        }
    });
    let (mut at_group, mut at_plain) = (BTreeSet::new(), BTreeSet::new());
    let mut positions = BTreeSet::new();
    for round in 0..3 {
        while at_group.len() < (round + 1) * 50 {
            at_group.insert(soon(order.recv()).await.unwrap());
        }
        if round < 2 {
            let dir = span.stop().await;
            span = Span::inside(plan(), dir).await;
            way.lead_to(span.running.listen.port());
        }
    }
    let published = soon(publishing).await.unwrap();
    while at_group.len() < 200 {
        at_group.insert(soon(order.recv()).await.unwrap());
    }
    while at_plain.len() < 200 {
        let event = next_event(&mut plain).await;
        assert!(positions.insert(event.position().unwrap().to_owned()), "no place twice: {event:?}");
        at_plain.insert(event.id().unwrap().to_owned());
    }
    assert_eq!(at_plain, published);
    stop.cancel();
    assert_eq!(soon(consuming).await.unwrap().unwrap().failed, 0);
}

#[tokio::test]
async fn nothing_is_lost_when_the_bridge_restarts_on_the_embedded_log() {
    nothing_is_lost_when_the_bridge_restarts(Plan::default).await;
}

#[tokio::test]
async fn nothing_is_lost_when_the_bridge_restarts_on_brokers() {
    let Some(Plan { routes, settings, own, .. }) = Plan::on_brokers().await else { return };
    let plan = || Plan { routes: routes.clone(), settings: settings.clone(), own: own.clone(), lanes: None };
    nothing_is_lost_when_the_bridge_restarts(plan).await;
}

#[tokio::test]
async fn an_error_says_what_became_of_the_message() {
    let span = Span::start().await;
    let client = Twinspan::new(&span.url(), quick()).unwrap();
    match client.publish("nowhere", &1).await {
        Err(SendError::NotSent { source: ClientError::Refused(error) }) => assert_eq!(error.code, "NO_ROUTE"),
        other => panic!("{other:?}"),
    }
    let client =
        Twinspan::new("ws://127.0.0.1:1/ws", Options { deadline: Duration::from_millis(200), ..quick() });
    let client = client.unwrap();
    match soon(client.publish("orders.x", &1)).await {
        Err(SendError::NotSent { source: ClientError::Connect { .. } }) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        soon(client.subscribe("orders.x", Subscribe::default())).await.err(),
        Some(ClientError::Connect { .. })
    ));
    // Sent and stored; its answer was lost, and nobody was there to ask again.
    let way = way_to(&span).await;
    let client = Twinspan::new(&url(&way), Options { deadline: Duration::from_secs(1), ..quick() }).unwrap();
    client.publish("orders.x", &1).await.unwrap();
    way.swallow();
    let id = MessageId::new();
    let sent = client.send_in_line("orders.x", Draft { id: Some(id), ..draft("2") }).await.unwrap();
    is_stored(&span, "orders.x", 2).await;
    way.refuse();
    way.cut();
    match soon(sent).await {
        Err(error @ SendError::OutcomeUnknown { .. }) => assert!(error.to_string().contains(&id.to_string())),
        other => panic!("{other:?}"),
    }
    for bad in ["http://127.0.0.1/ws", "nonsense"] {
        assert!(matches!(Twinspan::new(bad, quick()), Err(ClientError::Connect { .. })), "{bad}");
    }
}

#[tokio::test]
async fn a_client_does_not_come_back_after_it_was_told_not_to() {
    let span = Span::start().await;
    let way = way_to(&span).await;
    let client = client(&way);
    let filter = Some("x".repeat(2_000_000));
    match soon(client.subscribe("orders.x", Subscribe { filter, ..Subscribe::default() })).await.err() {
        Some(ClientError::Closed { code: 1009, .. }) => {}
        other => panic!("{other:?}"),
    }
    let big = soon(client.send("orders.x", draft(format!("\"{}\"", "x".repeat(2_000_000))))).await;
    match big {
        Err(SendError::OutcomeUnknown { source: ClientError::Closed { code: 1009, .. }, .. }) => {}
        other => panic!("{other:?}"),
    }
    assert_eq!(way.accepted(), 2);
    // Whoever asks anew gets a new one.
    soon(client.publish("orders.x", &1)).await.unwrap();
}

#[tokio::test]
async fn a_connection_that_is_dead_and_does_not_say_so_is_given_up() {
    let span = Span::start().await;
    let way = way_to(&span).await;
    let patient = Options { silence: Duration::from_millis(300), ..quick() };
    let client = Twinspan::new(&url(&way), patient).unwrap();
    let mut subscription = client.subscribe("orders.h", from(Start::Latest)).await.unwrap();
    client.publish("orders.h", &1).await.unwrap();
    assert_eq!(text(&next_event(&mut subscription).await), "1");
    let (connections, publisher) = (way.accepted(), Twinspan::new(&span.url(), quick()).unwrap());
    // One that is only quiet is not.
    assert!(tokio::time::timeout(Duration::from_secs(1), subscription.next()).await.is_err());
    assert_eq!(way.accepted(), connections);
    way.hold();
    publish(&publisher, "orders.h", [2]).await;
    let publishing = client.send_in_line("orders.h", draft("3")).await.unwrap();
    let given_up = async {
        // Both connections are tried again, the subscription's because somebody waits for it.
        while way.accepted() < connections + 2 {
            tokio::select! {
                heard = subscription.next() => panic!("nothing gets through, but {heard:?}"),
                () = tokio::time::sleep(Duration::from_millis(10)) => {}
            }
        }
    };
    soon(given_up).await;
    way.resume();
    way.cut();
    soon(publishing).await.unwrap();
    for n in ["2", "3"] {
        assert_eq!(text(&next_event(&mut subscription).await), n);
    }
}
