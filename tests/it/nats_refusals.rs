//! What a nats-server refuses reaches the caller who asked for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use twinspan::lane::contract::{EphemeralLane, LaneError};
use twinspan::lane::nats::Nats;
use twinspan::lane::settings::{EphemeralSettings, Secret, Tls};
use twinspan::message::Draft;
use twinspan::policy::Policy;
use twinspan::telemetry::metrics::Metrics;

use crate::brokers::{Broker, Options, left_out};
use crate::lanes::{
    Recorder, becomes, ephemeral, eventually, is_down, is_up, message, nats, pattern, policy, publish, route,
    settings, topic,
};

const PERMISSIONS: &str = r#"
    authorization {
        users = [{
            user: bridge, password: secret
            permissions: {
                publish: { deny: ["no.pub.>", "no.both"] }
                subscribe: { deny: ["no.sub.>", "no.both"] }
            }
        }]
    }
"#;

async fn broker(config: &str) -> Broker {
    Broker::nats(&Options { config: Some(config.into()), ..Options::default() }).await
}

/// As the user of the configurations above.
fn bridge(broker: &Broker, password: &tempfile::NamedTempFile) -> EphemeralSettings {
    std::fs::write(password.path(), "secret\n").unwrap();
    EphemeralSettings {
        user: Some("bridge".into()),
        password: Some(Secret::File(password.path().into())),
        ..settings(broker.url())
    }
}

fn everything() -> Policy {
    policy([ephemeral(">", "{topic}")])
}

fn secret() -> tempfile::NamedTempFile {
    tempfile::NamedTempFile::new().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_permissions_deny_is_forbidden_within_a_second() {
    if left_out() {
        return;
    }
    let (broker, password) = (broker(PERMISSIONS).await, secret());
    let (policy, metrics) = (everything(), Arc::new(Metrics::new()));
    let lane = Nats::open(&bridge(&broker, &password), policy.clone(), metrics.clone()).await.unwrap();
    is_up(&*lane).await;
    let begun = Instant::now();

    for round in 0..100 {
        let group = (round % 2 == 1).then_some("g");
        let denied = lane.listen(&pattern("no.sub.*"), group, 0, Recorder::new()).await;
        let Err(LaneError::Forbidden(why)) = denied else { panic!("round {round} was granted") };
        assert!(why.contains("no.sub.*"), "{why}");
    }
    // Those who come together are refused together.
    let denied = pattern("no.sub.x");
    let together = (0..20).map(|_| lane.listen(&denied, None, 0, Recorder::new()));
    for denied in futures_util::future::join_all(together).await {
        assert!(matches!(denied, Err(LaneError::Forbidden(_))));
    }

    let name = topic("no.pub.a");
    let asked = lane.request(&route(&policy, &name), &name, message("?"), Duration::from_secs(60)).await;
    assert!(matches!(asked, Err(LaneError::Forbidden(why)) if why.contains("no.pub.a")));

    // The first message to a subject is dropped and counted; whoever comes next is told.
    let name = topic("no.pub.b");
    let publish_b = async || lane.publish(&route(&policy, &name), &name, message("x")).await;
    publish_b().await.unwrap();
    eventually(
        "a publish is forbidden",
        async || matches!(publish_b().await, Err(LaneError::Forbidden(why)) if why.contains("no.pub.b")),
    )
    .await;
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let counted = "twinspan_dropped_total{lane=\"ephemeral\",reason=\"forbidden\",route=\">\"}";
    assert!(metrics.render().contains(counted), "{}", metrics.render());

    // Nothing else suffers.
    let (ear, _listening) = Recorder::listening(&*lane, "yes").await;
    publish(&*lane, &policy, "yes", "x").await;
    ear.wait(1).await;
    assert_eq!(lane.requests(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_over_the_servers_limit_is_forbidden() {
    if left_out() {
        return;
    }
    // One is the lane's own inbox.
    let broker = broker("max_subscriptions: 4").await;
    let lane = nats(&settings(broker.url()), &everything()).await;
    let mut granted = Vec::new();
    for at in 0..3 {
        granted.push(Recorder::listening(&*lane, &format!("a.{at}")).await);
    }
    let over = lane.listen(&pattern("a.3"), None, 0, Recorder::new()).await;
    assert!(matches!(over, Err(LaneError::Forbidden(why)) if why.contains("maximum subscriptions")));
    publish(&*lane, &everything(), "a.0", "x").await;
    granted[0].0.wait(1).await;
    granted.clear();
    eventually("there is room again", async || {
        lane.listen(&pattern("a.3"), None, 0, Recorder::new()).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscription_that_is_taken_away_is_told_and_can_be_asked_for_again() {
    if left_out() {
        return;
    }
    let open = "authorization { users = [{ user: bridge, password: secret }] }";
    let (mut broker, password) = (broker(open).await, secret());
    let policy = everything();
    let lane = nats(&bridge(&broker, &password), &policy).await;
    let (ear, _listening) = Recorder::listening(&*lane, "no.sub.a").await;
    broker.reload(PERMISSIONS);
    ear.wait_missed(1).await;
    is_up(&*lane).await;
    let again = lane.listen(&pattern("no.sub.a"), None, 0, Recorder::new()).await;
    assert!(matches!(again, Err(LaneError::Forbidden(_))));
    broker.reload(open);
    eventually("it is granted again", async || {
        lane.listen(&pattern("no.sub.a"), None, 0, Recorder::new()).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_that_the_server_refuses_keep_the_lane_down_and_say_so() {
    if left_out() {
        return;
    }
    let (broker, password) = (broker("authorization { token: sesame }").await, secret());
    let token = |text: &str| {
        std::fs::write(password.path(), text).unwrap();
        EphemeralSettings { token: Some(Secret::File(password.path().into())), ..settings(broker.url()) }
    };
    let lane = Nats::open(&token("wrong"), everything(), Arc::new(Metrics::new())).await.unwrap();
    becomes(&*lane, "Down for its credentials", |state| {
        format!("{state:?}").contains("refused the credentials")
    })
    .await;
    let why = is_down(&*lane).await;
    assert!(why.contains(&broker.url()) && !why.contains("wrong"), "{why}");
    let begun = Instant::now();
    let name = topic("a");
    let published = lane.publish(&route(&everything(), &name), &name, message("x")).await;
    assert!(
        matches!(published, Err(LaneError::Unavailable(_))) && begun.elapsed() < Duration::from_millis(500)
    );
    nats(&token("sesame"), &everything()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_without_an_inbox_is_told_what_is_missing() {
    if left_out() {
        return;
    }
    for what in ["publish", "subscribe"] {
        let config = format!(
            "authorization {{ users = [{{ user: bridge, password: secret, permissions: {{ {what}: {{ deny: \"_INBOX.>\" }} }} }}] }}"
        );
        let (broker, password) = (broker(&config).await, secret());
        let lane =
            Nats::open(&bridge(&broker, &password), everything(), Arc::new(Metrics::new())).await.unwrap();
        becomes(&*lane, "Down for its inbox", |state| format!("{state:?}").contains("_INBOX.>")).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_over_the_servers_limit_is_refused_before_it_is_sent_and_the_limit_is_the_servers_newest() {
    if left_out() {
        return;
    }
    let mut broker = broker("max_payload: 2000").await;
    let policy = everything();
    let lane = nats(&settings(broker.url()), &policy).await;
    let (ear, _listening) = Recorder::listening(&*lane, "a").await;
    let name = topic("a");
    let big = async |bytes: usize| {
        let draft = Draft { payload: vec![b'x'; bytes].into(), ..Draft::default() };
        lane.publish(&route(&policy, &name), &name, draft.accept()).await
    };
    big(1500).await.unwrap();
    let route_of = route(&policy, &name);
    let asked = lane.request(&route_of, &name, message("x".repeat(2001)), Duration::from_secs(1));
    for refused in [big(2000).await, big(1 << 22).await, asked.await.map(drop)] {
        assert!(
            matches!(refused, Err(LaneError::TooLarge { size, max: 2000 }) if size > 2000),
            "{refused:?}"
        );
    }
    big(1).await.unwrap();
    ear.wait(2).await;
    assert_eq!(ear.missed_count(), 0, "the connection stayed");
    let past = lane.listen(&pattern("a"), None, 9, Recorder::new()).await.unwrap();
    assert_eq!(past.history.len(), 2, "what was refused is in no history");

    broker.restart_with("max_payload: 5000").await;
    ear.wait_missed(1).await;
    is_up(&*lane).await;
    big(3000).await.unwrap();
    assert!(matches!(big(6000).await, Err(LaneError::TooLarge { max: 5000, .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_tls_both_sides_show_certificates_and_a_stranger_is_refused() {
    if left_out() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new([]).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(path("ca.pem"), ca.self_signed(&ca_key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(ca, ca_key);
    for name in ["server", "bridge"] {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(["127.0.0.1".into()]).unwrap();
        std::fs::write(path(&format!("{name}.pem")), params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
        std::fs::write(path(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }
    let at = |name: &str| path(name).display().to_string();
    let (cert, key, ca) = (at("server.pem"), at("server.key"), at("ca.pem"));
    let tls = format!("tls {{ cert_file: '{cert}', key_file: '{key}', ca_file: '{ca}', verify: true }}");
    let broker = broker(&tls).await;

    let ours =
        Tls { ca: Some(path("ca.pem")), cert: Some(path("bridge.pem")), key: Some(path("bridge.key")) };
    let trusting = EphemeralSettings { tls: Some(ours.clone()), ..settings(broker.url()) };
    let lane = nats(&trusting, &everything()).await;
    let (ear, _listening) = Recorder::listening(&*lane, "a").await;
    publish(&*lane, &everything(), "a", "x").await;
    ear.wait(1).await;

    // Without our certificate the server refuses us, without the CA we refuse it.
    let anonymous = Tls { cert: None, key: None, ..ours.clone() };
    let trustless = Tls { ca: None, ..ours.clone() };
    for tls in [anonymous, trustless] {
        let stranger = EphemeralSettings { tls: Some(tls), ..settings(broker.url()) };
        let lane = Nats::open(&stranger, everything(), Arc::new(Metrics::new())).await.unwrap();
        let why =
            becomes(&*lane, "Down for TLS", |state| format!("{state:?}").contains("cannot reach")).await;
        assert!(format!("{why:?}").to_lowercase().contains("cert"), "{why:?}");
    }
    for unusable in [
        Tls { ca: Some(path("nothing.pem")), ..ours.clone() },
        Tls { ca: Some(path("server.key")), ..ours.clone() },
        Tls { key: None, ..ours },
    ] {
        let settings = EphemeralSettings { tls: Some(unusable), ..settings(broker.url()) };
        let refused = Nats::open(&settings, everything(), Arc::new(Metrics::new())).await.err().unwrap();
        assert!(refused.to_string().contains("lanes.ephemeral.tls"), "{refused}");
    }
}
