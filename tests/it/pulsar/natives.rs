//! Native Pulsar clients see what was published here as it was published, and the other way round.

use super::*;
use crate::durable_contract::hear;
use futures_util::StreamExt;
use pulsar::compression::*;
use pulsar::consumer::InitialPosition;
use pulsar::{Consumer, ConsumerOptions};
use twinspan::lane::contract::{LaneError, Publisher};
use twinspan::message::{Draft, Place, Start, Timestamp};

#[tokio::test]
async fn a_native_client_sees_the_payload_unwrapped_and_the_fields_as_properties() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let sent = Draft {
        payload: vec![0, 255, b'x'].into(),
        key: Some("customer 7".into()),
        headers: [("traceparent".to_owned(), "00-ab".to_owned())].into(),
        event_time: Some(Timestamp::from_millis(1234)),
        ..Default::default()
    }
    .accept();
    bed.lane.append(&bed.route, &bed.topic, sent.clone(), Publisher::default()).await.unwrap().await.unwrap();
    let options = ConsumerOptions::default().with_initial_position(InitialPosition::Earliest);
    let mut consumer: Consumer<Vec<u8>, _> = bed
        .native
        .consumer()
        .with_topic(bed.physical())
        .with_subscription("native")
        .with_options(options)
        .build()
        .await
        .unwrap();
    let seen = soon(consumer.next()).await.unwrap().unwrap();
    let metadata = seen.metadata();
    assert_eq!(seen.payload.data, sent.payload);
    assert_eq!((metadata.partition_key(), metadata.event_time()), ("customer 7", 1234));
    let mut properties: Vec<_> =
        metadata.properties.iter().map(|p| (p.key.as_str(), p.value.clone())).collect();
    properties.sort();
    let (id, ts) = (sent.id.unwrap().to_string(), sent.ts.to_string());
    assert_eq!(properties, [("traceparent", "00-ab".into()), ("twinspan-id", id), ("twinspan-ts", ts)]);
}

#[tokio::test]
async fn followers_see_what_native_clients_publish_compressed_or_not_in_batches_or_not() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let (mut cursor, _) = bed.lane.tail(&bed.route, &bed.topic).await.unwrap().follow();
    let compressions = [
        None,
        Some(Compression::Lz4(CompressionLz4::default())),
        Some(Compression::Zlib(CompressionZlib::default())),
        Some(Compression::Zstd(CompressionZstd::default())),
        Some(Compression::Snappy(CompressionSnappy::default())),
    ];
    for (compression, batch_size) in compressions.iter().flat_map(|c| [(c, None), (c, Some(4))]) {
        let options = ProducerOptions { compression: compression.clone(), batch_size, ..Default::default() };
        let topic = bed.physical();
        let mut producer =
            bed.native.producer().with_topic(topic).with_options(options).build().await.unwrap();
        let mut sent = Vec::new();
        for n in 0..4 {
            let message = producer::Message {
                payload: format!("{n} of {batch_size:?}").into(),
                partition_key: Some("k".into()),
                properties: [("n".to_owned(), n.to_string())].into(),
                ..Default::default()
            };
            sent.push(producer.send_non_blocking(message).await.unwrap());
        }
        futures_util::future::try_join_all(sent).await.unwrap();
        let heard = hear(&mut cursor, 4).await;
        for (envelope, n) in heard.iter().zip(0..) {
            let message = &envelope.message;
            assert_eq!(message.payload, format!("{n} of {batch_size:?}"));
            assert_eq!((message.key.as_deref(), &*message.headers["n"]), (Some("k"), &*n.to_string()));
            let place = envelope.stored.as_ref().unwrap().place;
            let first = MessageId::derived(bed.topic.as_str(), 0, Place { index: 0, ..place });
            assert_eq!(message.id, Some(first.nth(place.index)));
            assert!(message.ts.age() < SOON);
        }
    }
}

#[tokio::test]
async fn an_oversized_message_is_refused_and_the_others_go_on() {
    if left_out() {
        return;
    }
    let bed = Bed::shared().await;
    let huge = Draft { payload: vec![b'x'; 6 << 20].into(), ..Default::default() }.accept();
    let refused =
        bed.lane.append(&bed.route, &bed.topic, huge, Publisher::default()).await.map(drop).unwrap_err();
    assert!(matches!(refused, LaneError::TooLarge { max, .. } if max == 5 << 20), "{refused:?}");
    // Just below the limit, with the rest of the message counted.
    let large = Draft { payload: vec![b'x'; (5 << 20) - 1024].into(), ..Default::default() }.accept();
    soon(bed.lane.append(&bed.route, &bed.topic, large, Publisher::default()).await.unwrap()).await.unwrap();
    let began = Instant::now();
    bed.publish(1).await;
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    let read = crate::durable_contract::read(&*bed.lane, &bed.route, &bed.topic, Start::Last(1)).await;
    assert_eq!(number(&read[0]), 1);
}

#[tokio::test]
async fn publishing_to_a_terminated_topic_is_refused_and_what_it_holds_is_still_read() {
    if left_out() {
        return;
    }
    let broker = shared_pulsar().await;
    let bed = Bed::on(broker).await;
    bed.publish(1).await;
    let path = format!("persistent/public/default/{}/terminate", bed.topic);
    admin(broker, Method::POST, &path, Value::Null).await;
    let mut refused = None;
    // The producer that is there may learn it by its own message, whose outcome is then not known.
    for _ in 0..3 {
        refused = match bed.lane.append(&bed.route, &bed.topic, numbered(2), Publisher::default()).await {
            Ok(receipt) => soon(receipt).await.err(),
            Err(error) => Some(error),
        };
        if matches!(refused, Some(LaneError::BadRequest(_))) {
            break;
        }
    }
    assert!(matches!(refused, Some(LaneError::BadRequest(_))), "{refused:?}");
    let read = crate::durable_contract::read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
    assert_eq!(read.len(), 1);
}
