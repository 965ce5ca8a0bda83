//! Publishing while the network, the broker and the topic do their worst.

use twinspan::message::Start;

use super::*;
use crate::brokers::Options;
use crate::durable_contract::{numbers, read};
use crate::proxy::Proxy;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lane_reaches_its_broker_through_the_proxy_alone() {
    if left_out() {
        return;
    }
    let (broker, proxy) = Proxy::pulsar(Options::default()).await;
    let settings = DurableSettings { url: vec![proxy.pulsar_url()], ..settings(&broker) };
    let route = route("t.>", "persistent://public/default/{topic}");
    let policy = Policy::new(RouteTable::new([route.clone()]));
    let (lane, route, topic) = (open(&settings, &policy).await, Arc::new(route), topic("t.proxied"));
    lane.append(&route, &topic, numbered(1), Publisher::default()).await.unwrap().await.unwrap();
    assert_eq!(numbers(&read(&*lane, &route, &topic, Start::Earliest).await), [1]);
    for (what, breaks) in [
        ("hold", Proxy::hold as fn(&Proxy)),
        ("refuse", |proxy| {
            proxy.refuse();
            proxy.cut();
        }),
        ("accept, then close", |proxy| {
            proxy.accept_then_close();
            proxy.cut();
        }),
    ] {
        breaks(&proxy);
        let took = is_down(&*lane).await;
        assert!(took < Duration::from_secs(3), "{what}: noticed after {took:?}");
        proxy.resume();
        is_up(&*lane).await;
    }
    let (cutting, before) = (proxy.cut_every(Duration::from_millis(200)), proxy.accepted());
    soon(async {
        while proxy.accepted() < before + 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    drop(cutting);
    is_up(&*lane).await;
    lane.append(&route, &topic, numbered(2), Publisher::default()).await.unwrap().await.unwrap();
}
