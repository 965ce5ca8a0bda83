//! Tokens and TLS, on a broker that asks for both.

use std::path::Path;

use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;
use twinspan::lane::contract::{LaneError, Publisher};
use twinspan::lane::settings::{Secret, Tls};
use twinspan::message::Start;

use super::*;
use crate::brokers::Options;
use crate::durable_contract::{numbers, read, shared};

/// The broker's key, which signs nothing but the two tokens below, and those are good nowhere else.
const KEY: &str = "data:;base64,dHdpbnNwYW4gdGVzdHMgb25seSwgMzIgYnl0ZXMgb2s=";
/// `{"sub":"admin"}`, who may do everything.
const ADMIN: &str = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhZG1pbiJ9.Z201SJRQ9iikcFhqT5Al4MR6c-nmbOw6lTLwormEAL4";
/// `{"sub":"app"}`, who may do what it is granted.
const APP: &str = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhcHAifQ.3ZmO1e-Ma2a7KzdvKC7eFjgniDZV7hTa-sDyjbr9_Lo";

async fn secured(dir: &Path) -> (Broker, u16) {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(vec!["localhost".into()]).unwrap();
    let (certificate, key) = (dir.join("broker.pem"), dir.join("broker.key"));
    std::fs::write(&certificate, cert.pem()).unwrap();
    std::fs::write(&key, signing_key.serialize_pem()).unwrap();
    // Free when it was asked for; should another process take it meanwhile, the broker says so and the test fails.
    let tls_port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let provider = "org.apache.pulsar.broker.authentication.AuthenticationProviderToken";
    let plugin = "org.apache.pulsar.client.impl.auth.AuthenticationToken";
    let set = vec![
        format!("brokerServicePortTls={tls_port}"),
        "advertisedAddress=localhost".into(),
        format!("tlsCertificateFilePath={}", certificate.display()),
        format!("tlsKeyFilePath={}", key.display()),
        "authenticationEnabled=true".into(),
        "authorizationEnabled=true".into(),
        format!("authenticationProviders={provider}"),
        format!("tokenSecretKey={KEY}"),
        "superUserRoles=admin".into(),
        format!("brokerClientAuthenticationPlugin={plugin}"),
        format!("brokerClientAuthenticationParameters=token:{ADMIN}"),
    ];
    let broker = Broker::pulsar(&Options { set, token: Some(ADMIN.into()), ..Default::default() }).await;
    let grant = json!(["produce", "consume"]);
    admin(&broker, Method::POST, "namespaces/public/default/permissions/app", grant).await;
    admin(&broker, Method::PUT, "namespaces/public/closed", Value::Null).await;
    (broker, tls_port)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_and_tls_are_what_the_broker_asks_for() {
    if left_out() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (broker, tls_port) = secured(dir.path()).await;
    let token = dir.path().join("token");
    std::fs::write(&token, "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhcHAifQ.d3Jvbmc\n").unwrap();
    let routes = [
        route("t.>", "persistent://public/default/{topic}"),
        route("closed.>", "persistent://public/closed/{topic}"),
    ];
    let policy = Policy::new(RouteTable::new(routes.clone()));
    let [open, closed] = routes.map(Arc::new);
    let settings = DurableSettings {
        url: vec![format!("pulsar+ssl://localhost:{tls_port}")],
        token: Some(Secret::File(token.clone())),
        tls: Some(Tls { ca: Some(dir.path().join("broker.pem")), cert: None, key: None }),
        ..settings(&broker)
    };

    let stranger = DurableSettings { tls: None, ..settings.clone() };
    let stranger = PulsarLane::open(&stranger, policy.clone(), Arc::new(Metrics::new())).unwrap();
    let lane = PulsarLane::open(&settings, policy, Arc::new(Metrics::new())).unwrap();
    let refused = |lane: &PulsarLane| match &*lane.state().borrow() {
        LaneState::Down(why) => why.starts_with("cannot connect"),
        LaneState::Up => panic!("a wrong token and an unknown certificate are refused"),
    };
    let deadline = Instant::now() + SOON;
    while !(refused(&lane) && refused(&stranger)) {
        assert!(Instant::now() < deadline);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Whoever rotates the token restarts nothing.
    std::fs::write(&token, format!("{APP}\n")).unwrap();
    is_up(&*lane).await;
    assert!(!stranger.state().borrow().is_up(), "no certificate of the broker's is known to it");

    let name = topic("t.secured");
    lane.append(&open, &name, numbered(1), Publisher::default()).await.unwrap().await.unwrap();
    assert_eq!(numbers(&read(&*lane, &open, &name, Start::Last(1)).await), [1]);
    let member = lane.join(&open, &name, shared("billing", Start::Earliest, 10)).await.unwrap();
    let held = take(&*member, 1).await;
    member.ack(vec![held[0].tag]).await.unwrap();

    let name = topic("closed.topic");
    let append = match lane.append(&closed, &name, numbered(1), Publisher::default()).await {
        Ok(receipt) => soon(receipt).await.map(drop),
        Err(error) => Err(error),
    };
    let tail = lane.tail(&closed, &name).await.map(drop);
    let join = lane.join(&closed, &name, shared("g", Start::Latest, 1)).await.map(drop);
    for (what, refused) in [("append", append), ("tail", tail), ("join", join)] {
        assert!(matches!(refused, Err(LaneError::Forbidden(_))), "{what}: {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_certificate_is_shown_to_a_broker_that_asks_for_one() {
    if left_out() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for (who, name) in [("broker", "localhost"), ("client", "twinspan")] {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(vec![name.into()]).unwrap();
        std::fs::write(path(&format!("{who}.pem")), cert.pem()).unwrap();
        std::fs::write(path(&format!("{who}.key")), signing_key.serialize_pem()).unwrap();
    }
    let free = [(); 2].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let [tls_port, web_port] = free.map(|listener| listener.local_addr().unwrap().port());
    let set = vec![
        format!("brokerServicePortTls={tls_port}"),
        format!("webServicePortTls={web_port}"),
        "advertisedAddress=localhost".into(),
        format!("tlsCertificateFilePath={}", path("broker.pem").display()),
        format!("tlsKeyFilePath={}", path("broker.key").display()),
        format!("tlsTrustCertsFilePath={}", path("client.pem").display()),
        "tlsRequireTrustedClientCertOnConnect=true".into(),
    ];
    let broker = Broker::pulsar(&Options { set, ..Default::default() }).await;
    let route = route("t.>", "persistent://public/default/{topic}");
    let policy = Policy::new(RouteTable::new([route.clone()]));
    let ca = Some(path("broker.pem"));
    let known = DurableSettings {
        url: vec![format!("pulsar+ssl://localhost:{tls_port}")],
        admin_url: format!("https://localhost:{web_port}"),
        tls: Some(Tls { ca: ca.clone(), cert: Some(path("client.pem")), key: Some(path("client.key")) }),
        ..settings(&broker)
    };
    let stranger = DurableSettings { tls: Some(Tls { ca, cert: None, key: None }), ..known.clone() };
    let stranger = PulsarLane::open(&stranger, policy.clone(), Arc::new(Metrics::new())).unwrap();
    let lane = open(&known, &policy).await;
    let (route, topic) = (Arc::new(route), topic("t.mutual"));
    lane.append(&route, &topic, numbered(1), Publisher::default()).await.unwrap().await.unwrap();
    // The newest are found with the help of the admin API.
    assert_eq!(numbers(&read(&*lane, &route, &topic, Start::Last(1)).await), [1]);
    let refused = |state: &LaneState| matches!(state, LaneState::Down(why) if why.contains("ertificate"));
    soon(stranger.state().wait_for(refused)).await.unwrap();
}

#[test]
fn settings_that_cannot_be_used_are_refused_at_once_and_by_name() {
    let good = DurableSettings {
        backend: DurableBackend::Pulsar,
        url: vec!["pulsar://127.0.0.1:6650".into()],
        admin_url: "http://127.0.0.1:8080".into(),
        publish_timeout: Duration::from_secs(1),
        ..DurableSettings::default()
    };
    let tls = |ca: Option<&str>, cert: Option<&str>| {
        Some(Tls { ca: ca.map(Into::into), cert: cert.map(Into::into), key: None })
    };
    let table = [
        (DurableSettings { url: vec![], ..good.clone() }, "lanes.durable.url"),
        (DurableSettings { url: vec!["http://a".into()], ..good.clone() }, "lanes.durable.url"),
        (DurableSettings { admin_url: "nowhere".into(), ..good.clone() }, "lanes.durable.admin_url"),
        (DurableSettings { token: Some(Secret::File("/none".into())), ..good.clone() }, "/none"),
        (DurableSettings { tls: tls(Some("/none"), None), ..good.clone() }, "lanes.durable.tls.ca"),
        (DurableSettings { tls: tls(None, Some("/c")), ..good.clone() }, "lanes.durable.tls.cert"),
    ];
    for (settings, named) in table {
        let policy = Policy::new(RouteTable::new([]));
        let refused = PulsarLane::open(&settings, policy, Arc::new(Metrics::new())).map(drop).unwrap_err();
        assert!(refused.to_string().contains(named), "{refused}");
    }
}
