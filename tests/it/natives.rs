//! Native clients of the brokers and WebSocket clients of the bridge talk to each other, bytes equal.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt;
use pulsar::{Consumer, Pulsar, SubType, TokioExecutor};
use serde_json::json;

use crate::brokers::{shared_nats, shared_pulsar};
use crate::harness::{Span, draft, next, nothing, soon};

const PAYLOADS: [&[u8]; 4] = [b"{ \"n\" : 1 }", b"plain", b"", b"\xff\x00"];

#[tokio::test]
async fn an_ephemeral_topic_is_a_nats_subject() {
    let Some(span) = Span::on_brokers().await else { return };
    let native = async_nats::connect(shared_nats().await.url()).await.unwrap();
    let subject = format!("{}.telemetry.n", span.own);
    let mut subscriber = native.subscribe(subject.clone()).await.unwrap();
    native.flush().await.unwrap();
    let mut client = span.client().await;
    client.subscribe("telemetry.*", nothing()).await.unwrap();
    for payload in PAYLOADS {
        let ack = client.publish("telemetry.n", &draft(payload)).await.unwrap();
        let heard = soon(subscriber.next()).await.unwrap();
        assert_eq!(heard.payload, payload);
        assert_eq!(heard.headers.unwrap().get("twinspan-id").unwrap().as_str(), ack.message_id.unwrap());
        assert_eq!(next(&mut client).await.payload().unwrap(), payload);

        native.publish(subject.clone(), payload.into()).await.unwrap();
        let event = next(&mut client).await;
        assert_eq!(
            (event.topic.as_deref(), event.payload().unwrap().as_slice()),
            (Some("telemetry.n"), payload)
        );
        assert_eq!(event.message().unwrap().id, None, "a native message has no id");
        soon(subscriber.next()).await.unwrap();
    }
    // Requests cross both ways.
    let service = format!("{}.svc.native", span.own);
    let mut serving = native.subscribe(service.clone()).await.unwrap();
    let server = native.clone();
    let served = tokio::spawn(async move {
        let request = serving.next().await.unwrap();
        server.publish(request.reply.unwrap(), "from nats".into()).await.unwrap();
    });
    native.flush().await.unwrap();
    let caller = client.sender();
    // The server has the subscription once it has answered a later request of the same connection.
    native.request(format!("{}.svc.nobody", span.own), "".into()).await.unwrap_err();
    let response = caller.request("svc.native", &draft("1"), Duration::from_secs(5)).await.unwrap();
    assert_eq!(response.payload().unwrap(), b"from nats");
    served.await.unwrap();
    client.subscribe("svc.here", nothing()).await.unwrap();
    let asking = native.request(format!("{}.svc.here", span.own), "1".into());
    let answering = async {
        let request = next(&mut client).await;
        client.reply(&request.reply_to.unwrap(), &draft("from here")).await.unwrap();
    };
    let (answer, ()) = tokio::join!(asking, answering);
    assert_eq!(answer.unwrap().payload, "from here");
}

#[tokio::test]
async fn a_durable_topic_is_a_pulsar_topic() {
    let Some(span) = Span::on_brokers().await else { return };
    let native: Pulsar<_> =
        Pulsar::builder(shared_pulsar().await.url(), TokioExecutor).build().await.unwrap();
    let topic = format!("persistent://public/default/{}.orders.n", span.own);
    let mut consumer: Consumer<Vec<u8>, _> = native
        .consumer()
        .with_topic(&topic)
        .with_subscription("native")
        .with_subscription_type(SubType::Exclusive)
        .build()
        .await
        .unwrap();
    let mut producer = native.producer().with_topic(&topic).build().await.unwrap();
    let mut client = span.client().await;
    client.subscribe("orders.n", nothing()).await.unwrap();
    for payload in PAYLOADS {
        let ack = client.publish("orders.n", &draft(payload)).await.unwrap();
        let heard = soon(consumer.next()).await.unwrap().unwrap();
        assert_eq!(heard.payload.data, payload);
        let id = heard.payload.metadata.properties.iter().find(|pair| pair.key == "twinspan-id").unwrap();
        assert_eq!(Some(&id.value), ack.message_id.as_ref());
        consumer.ack(&heard).await.unwrap();
        assert_eq!(next(&mut client).await.payload().unwrap(), payload);

        producer.send_non_blocking(payload.to_vec()).await.unwrap().await.unwrap();
        let event = next(&mut client).await;
        assert_eq!(
            (event.topic.as_deref(), event.payload().unwrap().as_slice()),
            (Some("orders.n"), payload)
        );
        assert!(event.message().unwrap().id.is_some(), "its id is derived from its position");
        soon(consumer.next()).await.unwrap().unwrap();
    }
    // Read again, a native message has the same id.
    let mut again = span.client().await;
    again.subscribe("orders.n", json!({"from": "earliest"})).await.unwrap();
    let mut ids = Vec::new();
    for _ in 0..2 * PAYLOADS.len() {
        ids.push(next(&mut again).await.message().unwrap().id.unwrap());
    }
    assert_eq!(ids.iter().collect::<std::collections::HashSet<_>>().len(), ids.len());
}

#[tokio::test]
async fn a_pattern_hears_topics_that_native_clients_make_from_their_first_message_on() {
    let Some(span) = Span::on_brokers().await else { return };
    let native = Pulsar::builder(shared_pulsar().await.url(), TokioExecutor).build().await.unwrap();
    let mut plain = span.client().await;
    plain.subscribe("orders.>", nothing()).await.unwrap();
    let mut member = span.client().await;
    member.subscribe("orders.>", json!({"group": "g", "ack": "auto"})).await.unwrap();
    for n in 0..10 {
        let topic = format!("persistent://public/default/{}.orders.native.{n}", span.own);
        let mut producer = native.producer().with_topic(topic).build().await.unwrap();
        for payload in [b"1", b"2"] {
            producer.send_non_blocking(payload.to_vec()).await.unwrap().await.unwrap();
        }
        for client in [&mut plain, &mut member] {
            for payload in [b"1", b"2"] {
                let event = next(client).await;
                assert_eq!(event.topic, Some(format!("orders.native.{n}")));
                assert_eq!(event.payload().unwrap(), payload);
            }
        }
    }
    // Each topic was made after the one before was heard: without the broker's word that takes ten at least.
    let listings = span.metric("twinspan_topic_listings_total");
    assert!(listings <= 4.0, "all topics were asked for {listings} times");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_plain_subscribers_are_one_reader_at_the_broker() {
    let Some(span) = Span::on_brokers().await else { return };
    let mut clients = Vec::new();
    for _ in 0..1000 {
        let client = span.client().await;
        client.subscribe("orders.many", nothing()).await.unwrap();
        clients.push(client);
    }
    let ack = clients[0].publish("orders.many", &draft("1")).await.unwrap();
    for client in &mut clients {
        let event = next(client).await;
        assert_eq!(event.position, ack.position);
    }
    let path = format!("/admin/v2/persistent/public/default/{}.orders.many/stats", span.own);
    let (status, stats) = shared_pulsar().await.get(&path).await.unwrap();
    let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
    assert_eq!(status, 200, "{stats}");
    let consumers = stats["subscriptions"].as_object().unwrap().values();
    let consumers: usize = consumers.map(|group| group["consumers"].as_array().unwrap().len()).sum();
    assert_eq!(consumers, 1, "{stats:#}");
}

#[tokio::test]
async fn a_dead_letter_tells_a_native_client_by_its_properties_where_it_comes_from() {
    let Some(span) = Span::on_brokers().await else { return };
    let native: Pulsar<_> =
        Pulsar::builder(shared_pulsar().await.url(), TokioExecutor).build().await.unwrap();
    let topic = |name: &str| format!("persistent://public/default/{}.{name}", span.own);
    let mut letters: Consumer<Vec<u8>, _> = native
        .consumer()
        .with_topic(topic("dead.jobs.native"))
        .with_subscription("native")
        .with_subscription_type(SubType::Exclusive)
        .build()
        .await
        .unwrap();
    let mut client = span.client().await;
    client.subscribe("jobs.native", json!({"group": "g"})).await.unwrap();
    // What a native producer calls ours is no reason to keep its message for ever.
    let mut producer = native.producer().with_topic(topic("jobs.native")).build().await.unwrap();
    let message = pulsar::producer::Message {
        payload: b"poison".to_vec(),
        properties: [("own", "1"), ("twinspan-x", "2")].map(|(n, v)| (n.to_owned(), v.to_owned())).into(),
        ..Default::default()
    };
    producer.send_non_blocking(message).await.unwrap().await.unwrap();
    let mut refused = next(&mut client).await;
    for _ in 0..2 {
        client.nack(&[refused.delivery.unwrap()], Duration::ZERO).await.unwrap();
        refused = next(&mut client).await;
    }
    client.nack(&[refused.delivery.unwrap()], Duration::ZERO).await.unwrap();
    let letter = soon(letters.next()).await.unwrap().unwrap();
    assert_eq!(letter.payload.data, b"poison");
    let properties = letter.payload.metadata.properties.iter();
    let mut properties: BTreeMap<_, _> = properties.map(|pair| (&*pair.key, &*pair.value)).collect();
    for ours in ["twinspan-ts", "twinspan-origin-ts"] {
        assert!(properties.remove(ours).is_some(), "{ours}");
    }
    let position = refused.position.as_deref().unwrap();
    let id = refused.message().unwrap().id.unwrap();
    let expected = [
        ("own", "1"),
        ("twinspan-id", &id),
        ("twinspan-origin-attempts", "3"),
        ("twinspan-origin-group", "g"),
        ("twinspan-origin-position", position),
        ("twinspan-origin-topic", "jobs.native"),
    ];
    assert_eq!(properties, expected.into());
}
