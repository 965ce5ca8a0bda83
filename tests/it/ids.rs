//! An id that is published again within the route's `dedup_window` is answered `duplicate` and not stored again: the
//! cells of the README's table, and what stands behind them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tempfile::TempDir;
use twinspan::bridge::ids::{Begun, Ids};
use twinspan::client::{Client, ClientError};
use twinspan::lane::contract::{DurableLane, LaneError, Publisher};
use twinspan::lane::journal::Journal;
use twinspan::message::{Draft, MessageId, Position, Start};
use twinspan::policy::Policy;
use twinspan::policy::table::{Retention, Route, RouteTable};
use twinspan::telemetry::metrics::Metrics;
use twinspan::topic::Topic;
use twinspan::wire::json::heard::Heard;

use crate::brokers::{Broker, left_out};
use crate::durable_contract::{numbers, read, route};
use crate::harness::{
    PATIENCE, Plan, Span, draft, eventually, http_client, next, on_both_kinds, refused, soon,
};
use crate::journal::disk::Disk;
use crate::proxy::Proxy;

on_both_kinds! {
    an_id_published_again_is_a_duplicate_with_the_position_of_the_first,
    an_id_that_stands_twice_in_a_list_is_stored_once,
    of_many_publishes_of_one_id_at_once_one_is_stored,
    an_id_is_known_in_its_topic_alone,
}

fn with_id(id: MessageId, payload: &str) -> Draft {
    Draft { id: Some(id), ..draft(payload) }
}

/// The status and the position of an ack.
fn told(ack: Result<Heard, ClientError>) -> (String, Option<String>) {
    let ack = ack.unwrap();
    (ack.status.unwrap(), ack.position)
}

fn duplicate(position: &Option<String>) -> (String, Option<String>) {
    ("duplicate".into(), position.clone())
}

/// The ids that a topic holds, oldest first.
async fn stored(span: &Span, topic: &str) -> Vec<String> {
    let (status, page) = span.get(&format!("/topics/{topic}/messages?from=earliest&limit=1000")).await;
    assert_eq!(status, 200, "{page}");
    let id = |event: &Value| event["message"]["id"].as_str().unwrap().to_owned();
    page["messages"].as_array().unwrap().iter().map(id).collect()
}

async fn an_id_published_again_is_a_duplicate_with_the_position_of_the_first(span: Span) {
    let topic = "orders.again";
    let (client, other) = (span.client().await, span.client().await);
    let (id, second) = (MessageId::new(), MessageId::new());
    let (_, first) = told(client.publish(topic, &with_id(id, "1")).await);
    assert!(first.is_some());
    for publisher in [&client, &other, &span.client().await] {
        assert_eq!(told(publisher.publish(topic, &with_id(id, "again")).await), duplicate(&first));
    }
    drop(client);
    let mut client = span.client().await;
    assert_eq!(told(client.publish(topic, &with_id(id, "1")).await), duplicate(&first));

    let asked = http_client().post(span.http(&format!("/publish/{topic}")));
    let answer = asked.header("twinspan-id", id.to_string()).body("1").send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let ack: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    assert_eq!(
        (&ack["status"], &ack["position"], &ack["message_id"]),
        (&json!("duplicate"), &json!(first), &json!(id.to_string()))
    );

    let list = json!({"type": "publish", "request_id": "b", "topic": topic, "messages": [
        {"id": id.to_string(), "payload": 1}, {"id": second.to_string(), "payload": 2},
    ]});
    client.send(list.to_string()).await.unwrap();
    let ack = next(&mut client).await;
    let statuses: Vec<_> = ack.results.iter().map(|result| result.status.as_deref().unwrap()).collect();
    assert_eq!(statuses, ["duplicate", "ok"]);
    assert_eq!(ack.results[0].position, first);
    assert_eq!(stored(&span, topic).await, [id.to_string(), second.to_string()]);
    let counted =
        r#"twinspan_messages_total{direction="in",lane="durable",outcome="duplicate",route="orders"}"#;
    assert_eq!(span.metric(counted), 6.0);
    // What nobody gave an id is never the same.
    client.publish(topic, &draft("1")).await.unwrap();
    client.publish(topic, &draft("1")).await.unwrap();
    assert_eq!(stored(&span, topic).await.len(), 4);
}

async fn an_id_that_stands_twice_in_a_list_is_stored_once(span: Span) {
    let mut client = span.client().await;
    for topic in ["orders.list", "both.list"] {
        let [a, b] = [MessageId::new(), MessageId::new()].map(|id| id.to_string());
        let messages = [&a, &b, &a, &b, &a].map(|id| json!({"id": id, "payload": 1}));
        let list = json!({"type": "publish", "request_id": "b", "topic": topic, "messages": messages});
        client.send(list.to_string()).await.unwrap();
        let results = next(&mut client).await.results;
        let statuses: Vec<_> = results.iter().map(|result| result.status.as_deref().unwrap()).collect();
        assert_eq!(statuses, ["ok", "ok", "duplicate", "duplicate", "duplicate"]);
        assert_eq!(results[0].position, results[4].position);
        assert_eq!(results[1].position, results[3].position);
        assert_eq!(stored(&span, topic).await, [a, b]);
    }
}

async fn of_many_publishes_of_one_id_at_once_one_is_stored(span: Span) {
    let clients = join_all((0..8).map(|_| span.client())).await;
    let ids: Vec<_> = (0..25).map(|_| MessageId::new()).collect();
    let publishing = clients.iter().map(async |client| {
        let mut acks = Vec::new();
        for id in &ids {
            acks.push(client.publish_in_line("orders.many", &with_id(*id, "1")).await.unwrap());
        }
        join_all(acks).await.into_iter().map(told).collect::<Vec<_>>()
    });
    let told = soon(join_all(publishing)).await;
    for n in 0..ids.len() {
        let of_one: Vec<_> = told.iter().map(|acks| &acks[n]).collect();
        assert_eq!(of_one.iter().filter(|(status, _)| status == "ok").count(), 1, "{of_one:?}");
        assert_eq!(of_one.iter().filter(|(status, _)| status == "duplicate").count(), clients.len() - 1);
        assert_eq!(of_one.iter().map(|(_, position)| position).collect::<BTreeSet<_>>().len(), 1);
    }
    // Each publisher gave them in this order.
    let ids: Vec<_> = ids.iter().map(MessageId::to_string).collect();
    assert_eq!(stored(&span, "orders.many").await, ids);
}

async fn an_id_is_known_in_its_topic_alone(span: Span) {
    let client = span.client().await;
    let id = MessageId::new();
    for topic in ["orders.one", "orders.other"] {
        assert_eq!(told(client.publish(topic, &with_id(id, "1")).await).0, "ok");
        assert_eq!(stored(&span, topic).await, [id.to_string()]);
    }
}

/// Routes with windows of their own.
const WINDOWS: &str = r#"
    [[route]]
    name = "brief"
    topic = "brief.>"
    lane = "durable"
    dedup_window = "2s"

    [[route]]
    name = "never"
    topic = "never.>"
    lane = "durable"
    dedup_window = "0s"
"#;

async fn an_id_is_known_for_the_window_and_no_longer(mut plan: Plan) {
    plan.routes += WINDOWS;
    let span = Span::with(plan).await;
    let client = span.client().await;
    let id = MessageId::new();
    for _ in 0..2 {
        assert_eq!(told(client.publish("never.n", &with_id(id, "1")).await).0, "ok");
    }
    assert_eq!(stored(&span, "never.n").await.len(), 2);

    let begun = Instant::now();
    let (_, first) = told(client.publish("brief.b", &with_id(id, "1")).await);
    assert_eq!(told(client.publish("brief.b", &with_id(id, "1")).await), duplicate(&first));
    eventually("the window is over", async || {
        let (status, position) = told(client.publish("brief.b", &with_id(id, "2")).await);
        assert!(status == "ok" || position == first);
        status == "ok"
    })
    .await;
    assert!(begun.elapsed() >= Duration::from_secs(2), "{:?}", begun.elapsed());
    assert_eq!(stored(&span, "brief.b").await.len(), 2);
}

#[tokio::test]
async fn an_id_is_known_for_the_window_and_no_longer_on_the_embedded_log() {
    an_id_is_known_for_the_window_and_no_longer(Plan::default()).await;
}

/// A publish with an id, and again after a restart of the bridge.
async fn an_id_is_known_after_a_restart(plan: Plan) {
    let again = another(&plan);
    let (id, topic) = (MessageId::new(), "orders.restart");
    let span = Span::with(plan).await;
    let (_, first) = told(span.client().await.publish(topic, &with_id(id, "1")).await);
    let data = span.stop().await;
    let span = Span::inside(again, data).await;
    let client = span.client().await;
    let (status, position) = told(client.publish(topic, &with_id(id, "1")).await);
    assert_eq!((status.as_str(), position), ("duplicate", first));
    assert_eq!(told(client.publish(topic, &with_id(MessageId::new(), "2")).await).0, "ok");
    assert_eq!(stored(&span, topic).await.len(), 2);
}

/// A bridge with the same routes and lanes.
fn another(plan: &Plan) -> Plan {
    Plan { routes: plan.routes.clone(), settings: plan.settings.clone(), own: plan.own.clone(), lanes: None }
}

#[tokio::test]
async fn reject_same_bridge_after_a_restart_on_the_embedded_log() {
    an_id_is_known_after_a_restart(Plan::default()).await;
}

#[tokio::test]
async fn reject_same_bridge_after_a_restart_on_pulsar() {
    if let Some(plan) = Plan::on_brokers().await {
        an_id_is_known_after_a_restart(plan).await;
    }
}

#[tokio::test]
async fn reject_another_bridge_on_pulsar() {
    let Some(plan) = Plan::on_brokers().await else { return };
    let other = another(&plan);
    let (one, other) = (Span::with(plan).await, Span::with(other).await);
    let (here, there) = (one.client().await, other.client().await);
    let topic = "orders.two";
    // What was stored before is read.
    let ids: Vec<_> = (0..20).map(|_| MessageId::new()).collect();
    let mut positions = Vec::new();
    for id in &ids[..10] {
        positions.push(told(here.publish(topic, &with_id(*id, "1")).await).1);
    }
    for (id, position) in ids.iter().zip(&positions) {
        assert_eq!(told(there.publish(topic, &with_id(*id, "1")).await), duplicate(position));
    }
    // What is stored from then on is followed.
    for id in &ids[10..] {
        positions.push(told(here.publish(topic, &with_id(*id, "1")).await).1);
    }
    eventually("the other bridge has heard of them", async || {
        other.metric("twinspan_remembered_ids") == 20.0
    })
    .await;
    for (id, position) in ids.iter().zip(&positions) {
        assert_eq!(told(there.publish(topic, &with_id(*id, "1")).await), duplicate(position));
    }
    let ids: Vec<_> = ids.iter().map(MessageId::to_string).collect();
    assert_eq!(stored(&one, topic).await, ids);
}

/// A partitioned topic's position is told as its receipt told it, by another process too.
#[tokio::test]
async fn reject_another_bridge_on_a_partitioned_topic() {
    let Some(plan) = Plan::on_brokers().await else { return };
    let physical = format!("persistent/public/default/{}.orders.parted/partitions", plan.own);
    let url = format!("{}/admin/v2/{physical}", plan.settings.lanes.durable.admin_url);
    assert!(
        http_client()
            .put(url)
            .body("3")
            .header("content-type", "application/json")
            .send()
            .await
            .unwrap()
            .status()
            .is_success()
    );
    let other = another(&plan);
    let (one, other) = (Span::with(plan).await, Span::with(other).await);
    let (here, there) = (one.client().await, other.client().await);
    for n in 0..6 {
        let message = Draft { key: Some(n.to_string()), ..with_id(MessageId::new(), "1") };
        let (_, first) = told(here.publish("orders.parted", &message).await);
        assert_eq!(told(here.publish("orders.parted", &message).await), duplicate(&first));
        if n == 0 {
            assert_eq!(told(there.publish("orders.parted", &message).await), duplicate(&first));
        } else {
            let known = f64::from(n + 1);
            eventually("it is known there", async || other.metric("twinspan_remembered_ids") == known).await;
            assert_eq!(told(there.publish("orders.parted", &message).await), duplicate(&first));
        }
    }
    assert_eq!(stored(&one, "orders.parted").await.len(), 6);
}

/// A bridge whose way to Pulsar can be cut, and which soon gives up waiting for a receipt.
async fn behind((pulsar, way): &(Broker, Proxy), publish_timeout: Duration) -> Span {
    let mut plan = Plan::on_brokers().await.unwrap();
    plan.durable_on(way.pulsar_url(), pulsar);
    plan.settings.lanes.durable.publish_timeout = publish_timeout;
    Span::with(plan).await
}

/// Publishes until the lane has taken it or knows it.
async fn until_known(client: &Client, topic: &str, message: &Draft) -> (String, Option<String>) {
    let until = Instant::now() + 2 * PATIENCE;
    loop {
        match client.publish(topic, message).await {
            Ok(ack) => return told(Ok(ack)),
            Err(ClientError::Refused(error)) if error.retryable && Instant::now() < until => {}
            Err(other) => panic!("{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn an_outcome_that_was_unknown_is_repeated_and_stored_once_on_pulsar() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (span, way) = (behind(&proxied, Duration::from_secs(2)).await, &proxied.1);
    let client = span.client().await;
    let topic = "orders.unknown";
    // The broker hears it, and its receipt is lost; or it never hears it.
    for is_stored in [true, false] {
        // The way is open, and known to be.
        until_known(&client, topic, &with_id(MessageId::new(), "0")).await;
        let ids: Vec<_> = (0..5).map(|_| MessageId::new()).collect();
        if is_stored {
            way.swallow()
        } else {
            way.hold()
        }
        let publishing = ids.iter().map(async |id| client.publish(topic, &with_id(*id, "1")).await);
        let codes: Vec<_> = join_all(publishing).await.into_iter().map(refused).collect();
        assert_eq!(codes, ["OUTCOME_UNKNOWN"; 5]);
        // As long as nobody can look it stays so, and who asks is told at once.
        assert_eq!(refused(client.publish(topic, &with_id(ids[0], "1")).await), "OUTCOME_UNKNOWN");
        eventually("the lane is down", async || span.app().status() == "degraded").await;
        let asked = Instant::now();
        assert_eq!(refused(client.publish(topic, &with_id(ids[0], "1")).await), "OUTCOME_UNKNOWN");
        assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());
        // What the way still holds is not to come through.
        let connected = way.accepted();
        way.cut();
        eventually("everything was cut", async || way.accepted() > connected).await;
        way.resume();
        let before = stored_in_the_end(&span, topic).await;
        for id in &ids {
            let (status, position) = until_known(&client, topic, &with_id(*id, "1")).await;
            assert_eq!(status, if before.contains(&id.to_string()) { "duplicate" } else { "ok" });
            assert_eq!(told(client.publish(topic, &with_id(*id, "1")).await), duplicate(&position));
        }
        assert_eq!(ids.iter().all(|id| before.contains(&id.to_string())), is_stored, "{before:?}");
        let mut now = stored(&span, topic).await;
        now.sort();
        assert_eq!(now.iter().collect::<BTreeSet<_>>().len(), now.len(), "{now:?}");
        assert!(ids.iter().all(|id| now.contains(&id.to_string())));
    }
}

/// What a topic holds, once its lane can say so.
async fn stored_in_the_end(span: &Span, topic: &str) -> Vec<String> {
    eventually("the lane is up again", async || {
        span.get(&format!("/topics/{topic}/messages?from=earliest")).await.0 == 200
    })
    .await;
    stored(span, topic).await
}

#[tokio::test]
async fn a_publish_whose_client_left_is_remembered_and_one_that_waits_for_it_is_its_duplicate() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (span, way) = (behind(&proxied, Duration::from_secs(10)).await, &proxied.1);
    let (leaving, staying) = (span.client().await, span.client().await);
    let topic = "orders.left";
    leaving.publish(topic, &with_id(MessageId::new(), "0")).await.unwrap();
    let ids: Vec<_> = (0..3).map(|_| MessageId::new()).collect();
    way.hold();
    for id in &ids {
        drop(leaving.publish_in_line(topic, &with_id(*id, "1")).await.unwrap());
    }
    // The frames of a connection are read in their order.
    leaving.ping().await.unwrap();
    let connections = r#"twinspan_connections{dialect="json"}"#;
    assert_eq!(span.metric(connections), 2.0);
    drop(leaving);
    eventually("it has left", async || span.metric(connections) == 1.0).await;
    let again = staying.publish_in_line(topic, &with_id(ids[0], "1")).await.unwrap();
    way.resume();
    assert_eq!(told(soon(again).await).0, "duplicate");
    eventually("all are stored, whoever waits for them", async || {
        span.metric("twinspan_remembered_ids") == 4.0
    })
    .await;
    for id in &ids[1..] {
        assert_eq!(told(staying.publish(topic, &with_id(*id, "1")).await).0, "duplicate");
    }
    assert_eq!(stored(&span, topic).await.len(), 4);
}

#[tokio::test]
async fn where_storage_cannot_be_searched_nothing_is_stored() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (span, way) = (behind(&proxied, Duration::from_secs(30)).await, &proxied.1);
    let client = span.client().await;
    let message = with_id(MessageId::new(), "1");
    client.publish("orders.read", &message).await.unwrap();
    // Whoever waits for it is told once the lane is down.
    way.hold();
    let asked = Instant::now();
    assert_eq!(
        refused(client.publish("orders.half", &with_id(MessageId::new(), "1")).await),
        "LANE_UNAVAILABLE"
    );
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    eventually("the lane is down", async || span.app().status() == "degraded").await;
    // What is known is known.
    assert_eq!(told(client.publish("orders.read", &message).await).0, "duplicate");
    for topic in ["orders.read", "orders.half", "orders.unread"] {
        let asked = Instant::now();
        assert_eq!(refused(client.publish(topic, &with_id(MessageId::new(), "1")).await), "LANE_UNAVAILABLE");
        assert!(asked.elapsed() < Duration::from_millis(500), "{:?}", asked.elapsed());
    }
}

/// Ids over a log whose disk does what the test says.
struct Bed {
    ids: Ids,
    lane: Arc<dyn DurableLane>,
    route: Arc<Route>,
    topic: Topic,
    disk: Arc<Disk>,
    _dir: TempDir,
}

impl Bed {
    fn new(publish_timeout: Duration, dedup_window: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(Disk::default());
        let route = Route { dedup_window, ..route("all", ">", Retention::default()) };
        let policy = Policy::new(RouteTable::new([route.clone()]));
        let metrics = Arc::new(Metrics::new());
        let lane =
            Journal::open_with(dir.path(), policy, publish_timeout, metrics.clone(), disk.opener()).unwrap();
        let ids = Ids::new(lane.clone(), metrics, publish_timeout);
        Self { ids, lane, route: Arc::new(route), topic: Topic::parse("a").unwrap(), disk, _dir: dir }
    }

    async fn begin(&self, id: MessageId) -> Result<Begun, LaneError> {
        self.begin_in(&self.topic, id).await
    }

    async fn begin_in(&self, topic: &Topic, id: MessageId) -> Result<Begun, LaneError> {
        let ts = with_id(id, "1").accept().ts;
        soon(self.ids.begin(&self.route, topic, Some(id), ts)).await
    }

    /// What the bridge does; whether it was a duplicate, and its position.
    async fn publish(&self, id: MessageId) -> Result<(bool, Option<Position>), LaneError> {
        self.publish_in(&self.topic, id).await
    }

    async fn publish_in(&self, topic: &Topic, id: MessageId) -> Result<(bool, Option<Position>), LaneError> {
        match self.begin_in(topic, id).await? {
            Begun::Duplicate(position) => Ok((true, position)),
            Begun::New(ticket) => {
                let message = with_id(id, "1").accept();
                let appended = self.lane.append(&self.route, topic, message, Publisher::default()).await;
                Ok((false, soon(ticket.of(appended)?.outcome()).await?))
            }
        }
    }

    async fn stored(&self) -> usize {
        numbers(&read(&*self.lane, &self.route, &self.topic, Start::Earliest).await).len()
    }
}

#[tokio::test]
async fn an_outcome_that_was_unknown_is_repeated_and_stored_once_on_a_log_whose_disk_hung() {
    let bed = Bed::new(Duration::from_millis(300), Duration::from_secs(60));
    bed.publish(MessageId::new()).await.unwrap();
    let ids: Vec<_> = (0..3).map(|_| MessageId::new()).collect();
    bed.disk.is_stuck(true);
    for id in &ids {
        assert!(matches!(bed.publish(*id).await, Err(LaneError::OutcomeUnknown(_))));
        // What was in line may be stored yet: nobody can tell before the disk moves.
        assert!(matches!(bed.publish(*id).await, Err(LaneError::OutcomeUnknown(_))));
    }
    bed.disk.is_stuck(false);
    for id in &ids {
        let mut known = None;
        eventually("the disk moves", async || {
            known = bed.publish(*id).await.ok();
            known.is_some()
        })
        .await;
        let (is_duplicate, position) = known.unwrap();
        assert!(is_duplicate && position.is_some());
    }
    assert_eq!(bed.stored().await, 4);
}

#[tokio::test]
async fn whoever_waits_for_a_publish_that_fails_is_next_and_of_one_that_was_given_up_storage_is_asked() {
    let bed = Arc::new(Bed::new(Duration::from_secs(5), Duration::from_secs(60)));
    let id = MessageId::new();
    let Ok(Begun::New(ticket)) = bed.begin(id).await else { panic!("it is new") };
    let waiting = tokio::spawn({
        let bed = bed.clone();
        async move { bed.publish(id).await }
    });
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    let failed = LaneError::Unavailable("it is full".into());
    assert!(ticket.of(Err::<twinspan::lane::contract::Receipt, _>(failed)).is_err());
    let (is_duplicate, position) = waiting.await.unwrap().unwrap();
    assert!(!is_duplicate && position.is_some());
    assert_eq!(bed.publish(id).await.unwrap(), (true, position));

    // Given up before it was in line, or behind our back: it is not there, or it is.
    for is_stored in [false, true] {
        let id = MessageId::new();
        let Ok(Begun::New(ticket)) = bed.begin(id).await else { panic!("it is new") };
        if is_stored {
            let message = with_id(id, "1").accept();
            let appended = bed.lane.append(&bed.route, &bed.topic, message, Publisher::default()).await;
            appended.unwrap().await.unwrap();
        }
        drop(ticket);
        assert_eq!(bed.publish(id).await.unwrap().0, is_stored);
        assert!(bed.publish(id).await.unwrap().0);
    }
    assert_eq!(bed.stored().await, 3);
}

#[tokio::test]
async fn a_topic_is_followed_for_a_window_after_the_last_id_and_read_again_after_that() {
    let bed = Bed::new(Duration::from_secs(5), Duration::from_millis(500));
    let tail = bed.lane.tail(&bed.route, &bed.topic).await.unwrap();
    let alone = Arc::strong_count(&tail);
    let begun = Instant::now();
    let id = MessageId::new();
    bed.publish(id).await.unwrap();
    assert!(Arc::strong_count(&tail) > alone, "it is followed");
    eventually("nobody follows it any more", async || Arc::strong_count(&tail) == alone).await;
    assert!(begun.elapsed() >= Duration::from_millis(500));
    // The window is over, for what is in storage too.
    assert!(!bed.publish(id).await.unwrap().0);
    assert!(bed.publish(id).await.unwrap().0);
    bed.ids.close();
    eventually("nobody follows it any more", async || Arc::strong_count(&tail) == alone).await;
}

#[tokio::test]
async fn of_too_many_topics_the_one_of_the_oldest_id_is_read_again() {
    let bed = Bed::new(Duration::from_secs(10), Duration::from_secs(60));
    let tail = bed.lane.tail(&bed.route, &bed.topic).await.unwrap();
    let alone = Arc::strong_count(&tail);
    let id = MessageId::new();
    let (_, first) = bed.publish(id).await.unwrap();
    let others: Vec<_> = (0..1000).map(|n| Topic::parse(&format!("other.{n}")).unwrap()).collect();
    for told in join_all(others.iter().map(|other| bed.publish_in(other, id))).await {
        assert!(!told.unwrap().0);
    }
    eventually("nobody follows it any more", async || Arc::strong_count(&tail) == alone).await;
    assert_eq!(bed.publish(id).await.unwrap(), (true, first));
    assert!(Arc::strong_count(&tail) > alone, "it is followed again");
}
