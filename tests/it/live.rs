//! `check --live`: what people are told of brokers that are not as the routes want them.

use std::process::Output;

use serde_json::json;
use tempfile::TempDir;

use crate::brokers::{Broker, Options, left_out, shared_nats, shared_pulsar};
use crate::harness::{http_client, soon};

const ROUTES: &str = r#"
[[route]]
topic = "telemetry.>"
lane = "ephemeral"

[[route]]
name = "orders"
topic = "orders.>"
lane = "durable"
pulsar = "persistent://public/NAMESPACE/{topic}"
retention = { age = "7d" }
"#;

/// Checks these routes against these brokers.
async fn check(nats: &str, pulsar: &str, admin: &str, routes: &str) -> Output {
    let dir = TempDir::new().unwrap();
    std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
    let settings = format!(
        "[server]\nroutes = \"routes.toml\"\n\
         [lanes.ephemeral]\nbackend = \"nats\"\nurl = \"{nats}\"\n\
         [lanes.durable]\nbackend = \"pulsar\"\nurl = \"{pulsar}\"\nadmin_url = \"{admin}\"\n"
    );
    std::fs::write(dir.path().join("settings.toml"), settings).unwrap();
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_twinspan"));
    command.current_dir(dir.path()).args(["check", "--live", "--config", "settings.toml"]);
    soon(command.kill_on_drop(true).output()).await.unwrap()
}

fn said(output: &Output) -> (bool, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// A namespace of its own, which keeps what is acknowledged for so many minutes.
async fn namespace(pulsar: &Broker, name: &str, minutes: i64) -> String {
    twinspan::lane::install_crypto();
    let url = format!("{}/admin/v2/namespaces/public/{name}", pulsar.admin_url());
    assert!(http_client().put(&url).send().await.unwrap().status().is_success());
    let policy = json!({ "retentionTimeInMinutes": minutes, "retentionSizeInMB": -1 });
    let set = http_client().post(format!("{url}/retention")).json(&policy).send().await.unwrap();
    assert!(set.status().is_success(), "{set:?}");
    name.to_owned()
}

#[tokio::test]
async fn brokers_that_are_as_the_routes_want_them_are_good() {
    if left_out() {
        return;
    }
    let (nats, pulsar) = (shared_nats().await, shared_pulsar().await);
    let routes = ROUTES.replace("NAMESPACE", &namespace(pulsar, "live-good", 7 * 24 * 60).await);
    let (good, out, err) = said(&check(&nats.url(), &pulsar.url(), &pulsar.admin_url(), &routes).await);
    assert!(good, "{out}{err}");
    assert!(out.contains("ephemeral lane: nats://") && out.contains("allows what the routes subscribe to"));
    assert!(out.contains("durable lane: pulsar://") && out.contains("keeps what the routes promise"));
}

#[tokio::test]
async fn a_namespace_that_keeps_too_little_or_is_not_there_and_a_schema_are_told_at_the_route() {
    if left_out() {
        return;
    }
    let (nats, pulsar) = (shared_nats().await, shared_pulsar().await);
    let routes = ROUTES.replace("NAMESPACE", &namespace(pulsar, "live-short", 60).await);
    let (good, out, err) = said(&check(&nats.url(), &pulsar.url(), &pulsar.admin_url(), &routes).await);
    assert!(!good, "{out}");
    let expected = "durable lane: routes.toml:11: route `orders`: namespace public/live-short keeps messages for 60 \
                    minutes and of any size, and the route promises 7d";
    assert!(err.contains(expected), "{err}");

    let namespace = namespace(pulsar, "live-avro", -1).await;
    let url = format!("{}/admin/v2/schemas/public/{namespace}/orders.avro/schema", pulsar.admin_url());
    let record = r#"{"type":"record","name":"Order","fields":[{"name":"n","type":"int"}]}"#;
    let schema = json!({ "type": "AVRO", "schema": record, "properties": {} });
    let topic = url.replace("/schemas/", "/persistent/").replace("/schema", "");
    assert!(http_client().put(&topic).send().await.unwrap().status().is_success());
    assert!(http_client().post(&url).json(&schema).send().await.unwrap().status().is_success());
    let routes = ROUTES.replace("NAMESPACE", &namespace);
    let (good, _, err) = said(&check(&nats.url(), &pulsar.url(), &pulsar.admin_url(), &routes).await);
    assert!(!good);
    let expected =
        "routes.toml:6: route `orders`: the schema of `orders.avro` is AVRO, and pulsar_schema is \"bytes\"";
    assert!(err.contains(expected), "{err}");

    let routes = ROUTES.replace("NAMESPACE", "live-nowhere");
    let (good, _, err) = said(&check(&nats.url(), &pulsar.url(), &pulsar.admin_url(), &routes).await);
    assert!(!good);
    assert!(
        err.contains("routes.toml:10: route `orders`: namespace public/live-nowhere does not exist"),
        "{err}"
    );
}

#[tokio::test]
async fn a_subject_that_the_nats_user_may_not_subscribe_to_is_told_at_the_route() {
    if left_out() {
        return;
    }
    let config = "authorization { users = [ { user: u, password: p, permissions: { \
                  publish: \">\", subscribe: { deny: \"telemetry.>\" } } } ] }\nno_auth_user: u\n";
    let nats = Broker::nats(&Options { config: Some(config.into()), ..Options::default() }).await;
    let pulsar = shared_pulsar().await;
    let routes = ROUTES.replace("NAMESPACE", "default");
    let (good, _, err) = said(&check(&nats.url(), &pulsar.url(), &pulsar.admin_url(), &routes).await);
    assert!(!good);
    assert!(err.contains("ephemeral lane: routes.toml:2: route `telemetry.>`: "), "{err}");
}

#[tokio::test]
async fn a_broker_that_is_not_there_is_told_with_its_url() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let url = |scheme: &str| format!("{scheme}://127.0.0.1:{port}");
    let routes = ROUTES.replace("NAMESPACE", "default");
    let (good, _, err) = said(&check(&url("nats"), &url("pulsar"), &url("http"), &routes).await);
    assert!(!good);
    assert!(err.contains(&format!("ephemeral lane: nats://127.0.0.1:{port}: ")), "{err}");
    assert!(err.contains(&format!("durable lane: pulsar://127.0.0.1:{port}: ")), "{err}");
}
