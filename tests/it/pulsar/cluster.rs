//! Two brokers: which of them serves a topic has to be asked for, and changes.

use serde_json::json;
use tokio::sync::{Mutex, MutexGuard, OnceCell};

use super::faults::{Broke, under_load};
use super::gateway::Gateway;
use super::*;
use crate::brokers::Storage;
use crate::durable_contract::{numbers, read};
use twinspan::message::Start;

/// A namespace whose topics all move together.
const NAMESPACE: &str = "public/moving";
const BUNDLE: &str = "0x00000000_0xffffffff";

struct Cluster {
    first: Broker,
    second: Broker,
    _storage: Storage,
}

/// One cluster for the tests here, which take turns in moving things about.
async fn cluster() -> MutexGuard<'static, Cluster> {
    static CLUSTER: OnceCell<Mutex<Cluster>> = OnceCell::const_new();
    let cluster = CLUSTER.get_or_init(async || {
        let ([first, second], _storage) = Broker::pulsar_cluster().await;
        let here = json!({ "serviceUrl": first.admin_url(), "brokerServiceUrl": first.url() });
        admin(&first, Method::PUT, "clusters/standalone", here).await;
        admin(&first, Method::PUT, "tenants/public", json!({ "allowedClusters": ["standalone"] })).await;
        let boundaries: Vec<_> = BUNDLE.split('_').collect();
        let bundles = json!({ "bundles": { "boundaries": boundaries, "numBundles": 1 } });
        admin(&first, Method::PUT, &format!("namespaces/{NAMESPACE}"), bundles).await;
        Mutex::new(Cluster { first, second, _storage })
    });
    cluster.await.lock().await
}

impl Cluster {
    /// A lane that knows these services, and a topic of its own.
    async fn bed(&self, url: Vec<String>) -> Bed {
        let route = route("t.>", &format!("persistent://{NAMESPACE}/{{topic}}"));
        let settings = DurableSettings { url, ..settings(&self.first) };
        let policy = Policy::new(RouteTable::new([route.clone()]));
        let topic = topic(&format!("t.{}", MessageId::new()));
        let native = Pulsar::builder(self.first.url(), TokioExecutor).build().await.unwrap();
        Bed { lane: open(&settings, &policy).await, route: Arc::new(route), topic, native }
    }

    /// Takes the topic from whoever serves it, until it is `to` that does.
    async fn move_to(&self, to: &Broker, bed: &Bed) {
        soon(async {
            // Whoever asks while the topic is being closed uses the destination up, and the next one gets any broker.
            while self.serves(bed).await != to.url() {
                self.unload_to(to).await;
                // Those who use the topic are to be the ones who ask for it first.
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
        })
        .await;
    }

    /// Takes every topic from whoever serves it; whoever is asked for one next has `to` serve it.
    async fn unload_to(&self, to: &Broker) {
        let to = to.admin_url().replace("http://", "");
        let path = format!("namespaces/{NAMESPACE}/{BUNDLE}/unload?destinationBroker={to}");
        admin(&self.first, Method::PUT, &path, Value::Null).await;
    }

    /// The URL of the broker that serves a topic.
    async fn serves(&self, bed: &Bed) -> String {
        twinspan::lane::install_crypto();
        let (first, topic) = (self.first.admin_url(), &bed.topic);
        let url = format!("{first}/lookup/v2/topic/persistent/{NAMESPACE}/{topic}");
        let found = Client::new().get(url).send().await.unwrap().json::<Value>().await.unwrap();
        found["brokerUrl"].as_str().unwrap_or_default().to_owned()
    }
}

/// How many questions for topics a broker has sent on to another.
async fn redirected(broker: &Broker) -> f64 {
    let (_, metrics) = broker.get("/metrics/").await.unwrap();
    let line = metrics.lines().find(|line| line.starts_with("pulsar_broker_lookup_redirects_total"));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_topic_is_found_whichever_broker_serves_it_and_whichever_is_asked() {
    if left_out() {
        return;
    }
    let cluster = cluster().await;
    let Cluster { first, second, .. } = &*cluster;
    let before = redirected(second).await;
    for asked in [first, second] {
        let bed = cluster.bed(vec![asked.url()]).await;
        for (n, to) in [second, first, second].into_iter().enumerate() {
            bed.publish(n).await;
            while cluster.serves(&bed).await != to.url() {
                cluster.unload_to(to).await;
                bed.publish(n).await;
            }
            let read = read(&*bed.lane, &bed.route, &bed.topic, Start::Earliest).await;
            let mut numbers = numbers(&read);
            numbers.dedup();
            assert_eq!(numbers, (0..=n).collect::<Vec<_>>());
        }
    }
    assert!(redirected(second).await > before, "who does not lead sends the question on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publishers_followers_and_groups_go_with_a_topic_from_broker_to_broker() {
    if left_out() {
        return;
    }
    let cluster = cluster().await;
    let Cluster { first, second, .. } = &*cluster;
    under_load(cluster.bed(vec![second.url()]).await, "moved", Broke::LastConfirmed, async |bed| {
        for to in [second, first, second, first] {
            cluster.move_to(to, bed).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn behind_a_gateway_every_broker_is_reached_through_it() {
    if left_out() {
        return;
    }
    let cluster = cluster().await;
    let Cluster { first, second, .. } = &*cluster;
    let gateway = Gateway::start([first.port(), second.port()]).await;
    under_load(
        cluster.bed(vec![gateway.url()]).await,
        "behind a gateway",
        Broke::LastConfirmed,
        async |bed| {
            for to in [second, first, second] {
                cluster.move_to(to, bed).await;
            }
        },
    )
    .await;
    assert!(gateway.passed_on(0) > 0 && gateway.passed_on(1) > 0, "both brokers were behind it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_one_service_is_dead_and_another_dies_under_load_the_third_carries_on() {
    if left_out() {
        return;
    }
    let mut cluster = cluster().await;
    // Nobody listens there: the port was free, and is not asked for again.
    let dead = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let urls = vec![format!("pulsar://127.0.0.1:{dead}"), cluster.second.url(), cluster.first.url()];
    let bed = cluster.bed(urls).await;
    under_load(bed, "a service died", Broke::Attempts, async |bed| {
        cluster.move_to(&cluster.second, bed).await;
        cluster.second.kill();
        is_down(&*bed.lane).await;
        is_up(&*bed.lane).await;
        assert_eq!(cluster.serves(bed).await, cluster.first.url());
    })
    .await;
    cluster.second.restart().await;
}
