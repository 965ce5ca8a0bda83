//! Publishing while the network, the broker and the topic do their worst.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use futures_util::StreamExt;
use pulsar::consumer::InitialPosition;
use pulsar::proto::base_command::Type;
use pulsar::proto::{BaseCommand, CommandCloseProducer, CommandSendError, ServerError};
use pulsar::{Consumer, ConsumerOptions, SubType};
use serde_json::json;
use twinspan::lane::contract::{LaneError, Receipt};
use twinspan::message::{Message, Start};
use twinspan::policy::table::{Compression, PulsarSchema};

use super::gateway::encode;
use super::load::{EACH, Publishers};
use super::tap::Tap;
use super::*;
use crate::durable_contract::{numbers, read};
use crate::proxy::Proxy;

/// A lane through the proxy, with a topic of its own.
pub async fn through(proxied: &(Broker, Proxy), template: &str) -> Bed {
    let (broker, proxy) = proxied;
    Bed::with(route("t.>", template), DurableSettings { url: vec![proxy.pulsar_url()], ..settings(broker) })
        .await
}

impl Bed {
    /// A native one that begins with the oldest message.
    async fn consumer(&self, kind: SubType) -> Consumer<Vec<u8>, TokioExecutor> {
        let options = ConsumerOptions::default().with_initial_position(InitialPosition::Earliest);
        let builder = self.native.consumer().with_topic(self.physical()).with_subscription("native");
        builder.with_subscription_type(kind).with_options(options).build().await.unwrap()
    }
}

const PUBLISHERS: usize = 4;

/// Publishers with a key each, the first without one.
fn publishers(bed: &Bed) -> Publishers {
    let key = |n: usize| (n >= EACH).then(|| format!("k{}", n / EACH));
    Publishers::on(bed, PUBLISHERS, (1, Duration::from_millis(1)), key)
}

/// A lane through the proxy with its publishers at work: something of each is stored.
async fn loaded(proxied: &(Broker, Proxy), template: &str) -> (Bed, Publishers) {
    let bed = through(proxied, template).await;
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    let load = publishers(&bed);
    let mut heard = BTreeSet::new();
    while heard.len() < PUBLISHERS {
        heard.extend(numbers(&soon(cursor.next(99)).await.unwrap()).into_iter().map(|n| n / EACH));
    }
    (bed, load)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_cut_every_200_ms_lose_nothing_confirmed_and_keep_each_keys_order() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (bed, load) = loaded(&proxied, "persistent://public/default/{topic}").await;
    let cutting = proxied.1.cut_every(Duration::from_millis(200));
    let before = proxied.1.accepted();
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(proxied.1.accepted() > before + 20, "the lane comes back each time");
    drop(cutting);
    let outcome = load.end().await;
    assert!(outcome.acked.len() > 100, "only {} were confirmed", outcome.acked.len());
    outcome.check("", &bed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_that_de_duplicates_has_each_message_once_after_50_cuts() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    admin(&proxied.0, Method::PUT, "namespaces/public/once", Value::Null).await;
    admin(&proxied.0, Method::POST, "namespaces/public/once/deduplication", Value::Bool(true)).await;
    let (bed, load) = loaded(&proxied, "persistent://public/once/{topic}").await;
    for n in 0..50 {
        proxied.1.cut();
        // The next one comes at any moment, but not before the lane is back: it goes down where that takes long.
        bed.publish(PUBLISHERS * EACH + n).await;
        tokio::time::sleep(Duration::from_millis(fastrand::u64(..80))).await;
    }
    let outcome = load.end().await;
    assert!(outcome.acked.len() > 100, "only {} were confirmed", outcome.acked.len());
    let unknown = outcome.unknown.len();
    let stored = outcome.check("", &bed).await;
    let once: BTreeSet<_> = stored.iter().map(|envelope| number(envelope)).collect();
    assert_eq!((stored.len() - once.len(), unknown), (0, 0), "stored twice, and of unknown outcome");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_seconds_of_a_load_balancer_without_a_backend_lose_nothing_confirmed() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (bed, load) = loaded(&proxied, "persistent://public/default/{topic}").await;
    proxied.1.accept_then_close();
    proxied.1.cut();
    let took = is_down(&*bed.lane).await;
    assert!(took < Duration::from_secs(3), "noticed after {took:?}");
    tokio::time::sleep(Duration::from_secs(5) - took).await;
    proxied.1.resume();
    let healed = Instant::now();
    is_up(&*bed.lane).await;
    bed.publish(PUBLISHERS * EACH).await;
    assert!(healed.elapsed() < Duration::from_secs(5), "{:?}", healed.elapsed());
    let outcome = load.end().await;
    assert!(!outcome.refused.is_empty());
    outcome.check("", &bed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_black_hole_is_noticed_within_three_seconds_and_nothing_confirmed_is_lost() {
    if left_out() {
        return;
    }
    let proxied = Proxy::shared_pulsar().await;
    let (bed, load) = loaded(&proxied, "persistent://public/default/{topic}").await;
    proxied.1.hold();
    let took = is_down(&*bed.lane).await;
    assert!(took < Duration::from_secs(3), "noticed after {took:?}");
    proxied.1.resume();
    is_up(&*bed.lane).await;
    proxied.1.refuse();
    proxied.1.cut();
    is_down(&*bed.lane).await;
    proxied.1.resume();
    is_up(&*bed.lane).await;
    let outcome = load.end().await;
    outcome.check("", &bed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_moves_under_load_loses_and_repeats_nothing_and_its_publishers_notice_nothing() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let bed = Bed::on(broker).await;
    let load = publishers(&bed);
    let path = format!("persistent/public/default/{}/unload", bed.topic);
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_millis(200)).await;
        admin(broker, Method::PUT, &path, Value::Null).await;
    }
    let outcome = load.end().await;
    let stored = outcome.check("", &bed).await;
    let once: BTreeSet<_> = stored.iter().map(|envelope| number(envelope)).collect();
    assert_eq!(stored.len(), once.len(), "each once");
    assert_eq!((outcome.unknown.len(), outcome.refused.len()), (0, 0));
}

/// What happens once to a topic's producer on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mishap {
    /// Its receipts come when it was closed, because the topic is: the broker was about to store what they confirm.
    Behind,
    /// The same where the broker has refused an entry before, as it does when it begins to close the topic.
    Refused,
    /// A receipt never comes, as where the broker could not store the entry and stored the next one.
    Lost,
    /// A receipt comes twice, as where the entry was sent again.
    Twice,
    /// It is closed as soon as it is open.
    Closed,
}

/// A wire on which that happens.
struct Wire {
    topic: String,
    mishap: Option<Mishap>,
    producer: u64,
    request: u64,
    held: Vec<Bytes>,
    /// What it sends is lost until it is opened again.
    deaf: bool,
}

impl Wire {
    /// A lane by this wire, where nothing happens yet.
    async fn bed(broker: &Broker) -> (Bed, Tap, Arc<std::sync::Mutex<Self>>) {
        let wire = Self {
            topic: String::new(),
            mishap: None,
            producer: 0,
            request: 0,
            held: Vec::new(),
            deaf: false,
        };
        let wire = Arc::new(std::sync::Mutex::new(wire));
        let tapped = wire.clone();
        let tap = Tap::on(broker, move |_, command, frame| tapped.lock().unwrap().pass(command, frame)).await;
        let bed = tap.bed(broker).await;
        wire.lock().unwrap().topic = bed.physical();
        (bed, tap, wire)
    }

    fn pass(&mut self, command: &BaseCommand, frame: Bytes) -> Vec<Bytes> {
        if let Some(producer) = command.producer.as_ref().filter(|producer| producer.topic == self.topic) {
            (self.producer, self.request, self.deaf) = (producer.producer_id, producer.request_id, false);
        }
        if self.deaf && command.send.as_ref().is_some_and(|it| it.producer_id == self.producer) {
            return Vec::new();
        }
        let receipt = command.send_receipt.as_ref().is_some_and(|it| it.producer_id == self.producer);
        let opened = command.producer_success.as_ref().is_some_and(|it| it.request_id == self.request);
        let closed = command.close_producer.as_ref().is_some_and(|it| it.producer_id == self.producer);
        let Some(mishap) = self.mishap else { return vec![frame] };
        let passed = match mishap {
            Mishap::Behind | Mishap::Refused if receipt => {
                self.held.push(frame);
                return Vec::new();
            }
            Mishap::Behind if closed => [frame].into_iter().chain(self.held.drain(..)).collect(),
            Mishap::Refused if closed => {
                [self.refuses()].into_iter().chain(self.held.drain(..)).chain([frame]).collect()
            }
            Mishap::Lost if receipt => Vec::new(),
            Mishap::Twice if receipt => vec![frame.clone(), frame],
            Mishap::Closed if opened => {
                self.deaf = true;
                vec![frame, self.closes()]
            }
            _ => return vec![frame],
        };
        self.mishap = None;
        passed
    }

    fn refuses(&self) -> Bytes {
        let refused = CommandSendError {
            producer_id: self.producer,
            sequence_id: u64::MAX,
            error: ServerError::PersistenceError as i32,
            message: "fenced".into(),
        };
        encode(&BaseCommand {
            r#type: Type::SendError as i32,
            send_error: Some(refused),
            ..Default::default()
        })
    }

    fn closes(&self) -> Bytes {
        let closed = CommandCloseProducer { producer_id: self.producer, request_id: u64::MAX };
        let kind = Type::CloseProducer as i32;
        encode(&BaseCommand { r#type: kind, close_producer: Some(closed), ..Default::default() })
    }
}

async fn stored(bed: &Bed) -> Vec<Arc<Envelope>> {
    read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await
}

/// Publishes so many at once, each in an entry of its own.
async fn publish_alone(bed: &Bed, numbers: std::ops::RangeInclusive<usize>) -> Vec<(usize, Receipt)> {
    let mut receipts = Vec::new();
    for n in numbers {
        let message = Message { key: Some(n.to_string()), ..numbered(n) };
        let receipt = bed.lane.append(&bed.route, &bed.topic, message, Publisher::default()).await;
        receipts.push((n, receipt.unwrap()));
    }
    receipts
}

/// Each is stored where its receipt says.
async fn are_confirmed(bed: &Bed, receipts: Vec<(usize, Receipt)>, what: Mishap) {
    for (n, receipt) in receipts {
        let confirmed = soon(receipt).await.unwrap();
        let there = stored(bed).await.into_iter().find(|envelope| position(envelope) == confirmed);
        assert_eq!(there.map(|envelope| number(&envelope)), Some(n), "{what:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_confirmed_behind_the_close_of_its_producer_is_not_stored_again() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    for mishap in [Mishap::Behind, Mishap::Refused] {
        let (bed, _tap, wire) = Wire::bed(broker).await;
        bed.publish(0).await;
        wire.lock().unwrap().mishap = Some(mishap);
        let receipts = publish_alone(&bed, 1..=5).await;
        soon(async { while stored(&bed).await.len() < 6 {} }).await;
        let path = format!("persistent/public/default/{}/unload", bed.topic);
        admin(broker, Method::PUT, &path, Value::Null).await;
        are_confirmed(&bed, receipts, mishap).await;
        bed.publish(6).await;
        assert_eq!(numbers(&stored(&bed).await), (0..=6).collect::<Vec<_>>(), "{mishap:?}");
        assert_eq!(wire.lock().unwrap().mishap, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receipt_confirms_the_entry_that_it_names_and_no_other() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    for mishap in [Mishap::Lost, Mishap::Twice] {
        let (bed, _tap, wire) = Wire::bed(broker).await;
        bed.publish(0).await;
        wire.lock().unwrap().mishap = Some(mishap);
        let receipts = publish_alone(&bed, 1..=5).await;
        are_confirmed(&bed, receipts, mishap).await;
        assert_eq!(wire.lock().unwrap().mishap, None);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_that_is_closed_as_soon_as_it_is_open_is_opened_again() {
    if left_out() {
        return;
    }
    let (bed, _tap, wire) = Wire::bed(shared_pulsar().await).await;
    wire.lock().unwrap().mishap = Some(Mishap::Closed);
    // Well before the publish timeout, which ends what nobody confirms.
    let publishing = timeout(Duration::from_secs(5), bed.publish(0));
    publishing.await.expect("it is opened again");
    assert_eq!(wire.lock().unwrap().mishap, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_holds_one_key_so_that_key_shared_members_each_get_their_own() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let mut members = [bed.consumer(SubType::KeyShared).await, bed.consumer(SubType::KeyShared).await];
    const MESSAGES: usize = 2000;
    const KEYS: usize = 20;
    let mut receipts = Vec::new();
    for n in 0..MESSAGES {
        let message = Message { key: Some(format!("k{}", n % KEYS)), ..numbered(n) };
        receipts.push(bed.lane.append(&bed.route, &bed.topic, message, Publisher::default()).await.unwrap());
    }
    futures_util::future::try_join_all(receipts).await.unwrap();
    let mut got: BTreeMap<String, (BTreeSet<usize>, Vec<usize>)> = BTreeMap::new();
    let (mut came, mut batched) = (0, 0);
    while came < MESSAGES {
        let [first, second] = &mut members;
        let (who, seen) = soon(async {
            tokio::select! {
                seen = first.next() => (0, seen),
                seen = second.next() => (1, seen),
            }
        })
        .await;
        let seen = seen.unwrap().unwrap();
        members[who].ack(&seen).await.unwrap();
        let n: usize = std::str::from_utf8(&seen.payload.data).unwrap().parse().unwrap();
        let key = seen.key().unwrap();
        assert_eq!(key, format!("k{}", n % KEYS));
        let (owners, numbers) = got.entry(key).or_default();
        owners.insert(who);
        numbers.push(n);
        batched += usize::from(seen.message_id.batch_size.is_some_and(|size| size > 1));
        came += 1;
    }
    assert_eq!(got.len(), KEYS);
    for (key, (owners, numbers)) in &got {
        assert_eq!(owners.len(), 1, "`{key}` went to both members");
        assert!(numbers.is_sorted(), "`{key}`: {numbers:?}");
    }
    assert!(batched > MESSAGES / 2, "only {batched} came in batches");
    assert_eq!(got.values().flat_map(|(owners, _)| owners).collect::<BTreeSet<_>>().len(), 2);
}

#[tokio::test]
async fn what_is_folded_is_read_here_and_by_native_consumers() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    for compression in [Compression::Lz4, Compression::Zstd] {
        let route = Route { compression, ..route("t.>", "persistent://public/default/{topic}") };
        let bed = Bed::routed(broker, route).await;
        let payload = |n: usize| format!("{n} {}", "to be or not to be ".repeat(50));
        let mut receipts = Vec::new();
        for n in 0..60 {
            let message = Message { payload: payload(n).into(), ..numbered(n) };
            receipts
                .push(bed.lane.append(&bed.route, &bed.topic, message, Publisher::default()).await.unwrap());
        }
        futures_util::future::try_join_all(receipts).await.unwrap();
        let alone = Message { payload: payload(60).into(), ..numbered(60) };
        bed.lane.append(&bed.route, &bed.topic, alone, Publisher::default()).await.unwrap().await.unwrap();

        let read = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
        let expected: Vec<_> = (0..61).map(payload).collect();
        assert!(read.iter().map(|envelope| &envelope.message.payload).eq(&expected));
        let mut consumer = bed.consumer(SubType::Exclusive).await;
        for expected in &expected {
            let seen = soon(consumer.next()).await.unwrap().unwrap();
            assert_eq!(seen.payload.data, expected.as_bytes());
        }
        let (_, stats) =
            broker.get(&format!("/admin/v2/persistent/public/default/{}/stats", bed.topic)).await.unwrap();
        let stored = serde_json::from_str::<Value>(&stats).unwrap()["storageSize"].as_u64().unwrap();
        let plain: usize = expected.iter().map(String::len).sum();
        assert!(stored < plain as u64 / 2, "{stored} bytes for {plain}");
    }
}

#[tokio::test]
async fn a_schema_is_honoured_and_one_that_does_not_fit_is_refused_by_name() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let bed = async |pulsar_schema| {
        Bed::routed(broker, Route { pulsar_schema, ..route("t.>", "persistent://public/default/{topic}") })
            .await
    };
    let path = |bed: &Bed| format!("schemas/public/default/{}/schema", bed.topic);
    let refused = async |bed: &Bed, topic: &Topic| {
        let receipt = bed.lane.append(&bed.route, topic, numbered(1), Publisher::default()).await.unwrap();
        match soon(receipt).await.unwrap_err() {
            LaneError::BadRequest(said) => said,
            other => panic!("{other:?}"),
        }
    };
    let (text, json) = (bed(PulsarSchema::String).await, bed(PulsarSchema::Json).await);

    text.publish(1).await;
    let (_, registered) = broker.get(&format!("/admin/v2/{}", path(&text))).await.unwrap();
    assert!(registered.contains("\"STRING\""), "{registered}");

    // A topic without one is given none, and can be published to.
    json.publish(1).await;
    assert_eq!(broker.get(&format!("/admin/v2/{}", path(&json))).await.unwrap().0, 404);
    let other = topic(&format!("t.{}", MessageId::new()));
    let record = r#"{"type":"record","name":"Order","fields":[{"name":"n","type":"int"}]}"#;
    let schema = json!({ "type": "JSON", "schema": record, "properties": {} });
    admin(broker, Method::POST, &format!("schemas/public/default/{other}/schema"), schema).await;
    let stored = json.lane.append(&json.route, &other, numbered(1), Publisher::default()).await.unwrap();
    soon(stored).await.unwrap();
    let mut consumer = Bed { topic: other.clone(), ..json.clone() }.consumer(SubType::Exclusive).await;
    let seen = soon(consumer.next()).await.unwrap().unwrap();
    assert!(seen.payload.metadata.schema_version.is_some());

    // Bytes are taken for any schema by the broker; whoever reads Avro finds no Avro.
    let (bytes, avro) = (bed(PulsarSchema::Bytes).await, topic(&format!("t.{}", MessageId::new())));
    let schema = json!({ "type": "AVRO", "schema": record, "properties": {} });
    admin(broker, Method::POST, &format!("schemas/public/default/{avro}/schema"), schema).await;
    let said = refused(&bytes, &avro).await;
    assert!(said.contains("Avro") && said.contains("pulsar_schema = \"bytes\""), "{said}");

    let said = refused(&text, &other).await;
    assert!(said.contains("IncompatibleSchema"), "{said}");
    let said = refused(&json, &text.topic).await;
    assert!(said.contains("String") && said.contains("pulsar_schema = \"json\""), "{said}");
}
