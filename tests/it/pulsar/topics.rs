//! Topics that appear at the broker while somebody follows a pattern. Whether the broker told of them or was asked for
//! them is seen by how often all topics were listed: never by how long it took.

use std::collections::BTreeSet;

use serde_json::json;
use tokio::sync::watch;

use super::*;
use crate::brokers::Options;
use crate::proxy::Proxy;

/// A lane of which somebody wants to know the topics.
struct Bed<'a> {
    broker: &'a Broker,
    lane: Arc<PulsarLane>,
    route: Route,
    metrics: Arc<Metrics>,
    known: watch::Receiver<BTreeSet<Topic>>,
}

impl<'a> Bed<'a> {
    async fn on(broker: &'a Broker, route: Route) -> Self {
        Self::with(broker, settings(broker), &[route]).await
    }

    async fn with(broker: &'a Broker, settings: DurableSettings, routes: &[Route]) -> Self {
        let (metrics, route) = (Arc::new(Metrics::new()), routes[0].clone());
        let policy = Policy::new(RouteTable::new(routes.iter().cloned()));
        let lane = PulsarLane::open(&settings, policy, metrics.clone()).unwrap();
        is_up(&*lane).await;
        let known = lane.watch_topics();
        Self { broker, lane, route, metrics, known }
    }

    fn topic(&self) -> Topic {
        topic(&self.route.pattern.as_str().replace('>', &MessageId::new().to_string()))
    }

    async fn admin(&self, method: Method, topic: &Topic, what: &str, body: Value) {
        let path = self.route.pulsar.apply(topic.as_str()).replace("://", "/");
        admin(self.broker, method, &format!("{path}{what}"), body).await;
    }

    async fn make(&self, topic: &Topic) {
        self.admin(Method::PUT, topic, "", Value::Null).await;
    }

    async fn knows(&mut self, topic: &Topic) {
        let known = self.known.wait_for(|known| known.contains(topic));
        timeout(SOON, known).await.unwrap_or_else(|_| panic!("{topic} is not known")).unwrap();
    }

    async fn forgets(&mut self, topic: &Topic) {
        let known = self.known.wait_for(|known| !known.contains(topic));
        timeout(SOON, known).await.unwrap_or_else(|_| panic!("{topic} is known still")).unwrap();
    }

    /// How often all topics were asked for.
    fn listings(&self) -> u64 {
        let text = self.metrics.render();
        let line = text.lines().find(|line| line.starts_with("twinspan_topic_listings_total ")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until a topic becomes known without any listing: from then on the broker tells.
    async fn is_told(&mut self) {
        let deadline = Instant::now() + SOON;
        loop {
            assert!(Instant::now() < deadline, "the broker tells of nothing");
            let (before, topic) = (self.listings(), self.topic());
            self.make(&topic).await;
            self.knows(&topic).await;
            if self.listings() == before {
                return;
            }
        }
    }

    /// Each of them appears after the one before is known, so listings would have to be as many.
    async fn finds_unasked(&mut self, topics: u64) {
        let before = self.listings();
        for _ in 0..topics {
            let topic = self.topic();
            self.make(&topic).await;
            self.knows(&topic).await;
        }
        let listings = self.listings() - before;
        // One comes now and then in any case.
        assert!(listings <= 1, "{listings} listings for {topics} topics");
    }
}

fn appearing() -> Route {
    route("appear.>", "persistent://public/default/{topic}")
}

#[tokio::test]
async fn topics_that_appear_and_go_are_told_by_the_broker_and_not_asked_for() {
    if left_out() {
        return;
    }
    let mut bed = Bed::on(shared_pulsar().await, appearing()).await;
    bed.is_told().await;
    bed.finds_unasked(20).await;

    let (before, gone, wide) = (bed.listings(), bed.topic(), bed.topic());
    bed.make(&gone).await;
    bed.knows(&gone).await;
    bed.admin(Method::DELETE, &gone, "", Value::Null).await;
    bed.forgets(&gone).await;
    bed.admin(Method::PUT, &wide, "/partitions", json!(3)).await;
    bed.knows(&wide).await;
    bed.admin(Method::DELETE, &wide, "/partitions", Value::Null).await;
    bed.forgets(&wide).await;
    assert!(bed.listings() - before <= 1);

    let expected: BTreeSet<_> = bed.lane.topics(&bed.route.pattern).await.unwrap().into_iter().collect();
    let known = bed.known.wait_for(|known| *known == expected);
    timeout(SOON * 2, known).await.expect("what is told is what is there").unwrap();
}

#[tokio::test]
async fn names_too_long_to_be_watched_for_are_told_all_the_same() {
    if left_out() {
        return;
    }
    let template = format!("persistent://public/default/{}.{{topic}}", "long".repeat(20));
    let mut bed = Bed::on(shared_pulsar().await, route("appear.>", &template)).await;
    bed.is_told().await;
    bed.finds_unasked(10).await;
}

#[tokio::test]
async fn the_topics_of_a_namespace_that_is_made_later_are_found() {
    if left_out() {
        return;
    }
    let (broker, namespace) = (shared_pulsar().await, format!("public/later-{}", MessageId::new()));
    let later = route("later.>", &format!("persistent://{namespace}/{{topic}}"));
    let mut bed = Bed::with(broker, settings(broker), &[later, appearing()]).await;
    while bed.listings() == 0 {
        tokio::task::yield_now().await;
    }
    admin(broker, Method::PUT, &format!("namespaces/{namespace}"), Value::Null).await;
    for _ in 0..3 {
        let topic = bed.topic();
        bed.make(&topic).await;
        bed.knows(&topic).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_that_appears_while_the_broker_is_out_of_reach_is_found_and_those_after_it_are_told() {
    if left_out() {
        return;
    }
    let (broker, proxy) = Proxy::pulsar(Options::default()).await;
    let settings = DurableSettings { url: vec![proxy.pulsar_url()], ..settings(&broker) };
    let mut bed = Bed::with(&broker, settings, &[appearing()]).await;
    bed.is_told().await;
    for round in 0..3 {
        let accepted = proxy.accepted();
        if round > 0 {
            proxy.refuse();
        }
        proxy.cut();
        let missed = bed.topic();
        bed.make(&missed).await;
        proxy.resume();
        bed.knows(&missed).await;
        bed.is_told().await;
        bed.finds_unasked(5).await;
        assert!(proxy.accepted() > accepted);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_tells_of_no_topics_is_asked_for_them() {
    if left_out() {
        return;
    }
    // It says that it takes no watchers; it takes some, and refuses ours.
    for set in ["enableBrokerSideSubscriptionPatternEvaluation=false", "subscriptionPatternMaxLength=10"] {
        let broker = Broker::pulsar(&Options { set: vec![set.into()], ..Options::default() }).await;
        let mut bed = Bed::on(&broker, appearing()).await;
        let before = bed.listings();
        for _ in 0..4 {
            let topic = bed.topic();
            bed.make(&topic).await;
            bed.knows(&topic).await;
        }
        // The first may come by one that was under way.
        let listings = bed.listings() - before;
        assert!(listings >= 3, "{set}: {listings} listings");
    }
}
