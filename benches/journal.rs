//! The embedded log's rate and latency: a thousand appends in flight on one topic, each answered after an fsync.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use twinspan::lane::contract::{DurableLane, Publisher, Receipt};
use twinspan::lane::journal::Journal;
use twinspan::message::{Draft, Lanes};
use twinspan::policy::Policy;
use twinspan::policy::table::{
    Compression, Declare, Live, OnOutage, Overflow, PulsarSchema, Redelivery, Retention, Route, RouteTable,
    Template,
};
use twinspan::telemetry::metrics::Metrics;
use twinspan::topic::{Pattern, Topic};

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    println!("payload  in flight   appends/s    p50 ms    p99 ms    max ms");
    for (payload, in_flight, count) in [(200, 1000, 400_000), (1024, 1000, 200_000), (200, 1, 2_000)] {
        runtime.block_on(measure(payload, in_flight, count));
    }
}

async fn measure(payload: usize, in_flight: usize, count: usize) {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let route = Route {
        name: "all".into(),
        pattern: Pattern::parse(">").unwrap(),
        lane: Lanes::DURABLE,
        nats: Template::parse("{topic}").unwrap(),
        pulsar: Template::parse("{topic}").unwrap(),
        history: 0,
        retain: false,
        queue: 0,
        overflow: Overflow::DropOldest,
        live: Live::AfterStore,
        outage: OnOutage::Reject,
        retention: Retention::default(),
        declare: Declare::Auto,
        dedup_window: Duration::ZERO,
        redelivery: Redelivery::default(),
        compression: Compression::None,
        pulsar_schema: PulsarSchema::Bytes,
        max_payload: None,
        schema: None,
    };
    let policy = Policy::new(RouteTable::new([route.clone()]));
    let lane = Journal::open(dir.path(), policy, Duration::from_secs(10), Arc::new(Metrics::new())).unwrap();
    let (route, topic) = (Arc::new(route), Topic::parse("bench").unwrap());
    let payload = bytes::Bytes::from(vec![b'x'; payload]);
    let mut waiting: VecDeque<(Instant, Receipt)> = VecDeque::with_capacity(in_flight);
    let mut took = Vec::with_capacity(count);
    let began = Instant::now();
    for sent in 0..count + in_flight {
        if sent >= in_flight
            && let Some((at, receipt)) = waiting.pop_front()
        {
            receipt.await.unwrap();
            took.push(at.elapsed());
        }
        if sent < count {
            let message = Draft { payload: payload.clone(), ..Draft::default() }.accept();
            waiting.push_back((
                Instant::now(),
                lane.append(&route, &topic, message, Publisher::default()).await.unwrap(),
            ));
        }
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |share: f64| took[((took.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    let size = payload.len();
    println!(
        "{size:>7}  {in_flight:>9}   {rate:>9.0}   {:>7.2}   {:>7.2}   {:>7.2}",
        at(0.5),
        at(0.99),
        at(1.0)
    );
    lane.close().await;
}
