//! What is logged: a line for each event, which acts upon nothing, and tells nobody what was published or what is secret.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tracing::{Dispatch, dispatcher, error_span, info, warn};
use tracing_subscriber::fmt::MakeWriter;
use twinspan::client::Client;
use twinspan::message::Draft;
use twinspan::telemetry::log::{self, LogFormat, LogSettings};

use crate::brokers::{Broker, Options, left_out, shared_pulsar};
use crate::harness::{draft, eventually, next, replace, soon};
use crate::process::Process;

/// Everything that acts upon a terminal, an editor or what reads line by line, between letters.
fn hostile() -> String {
    let acting = (0..0x20)
        .chain(0x7f..0xa0)
        .chain([0x61c, 0x200e, 0x200f])
        .chain(0x2028..0x202f)
        .chain(0x2066..0x206a);
    let acting: String = acting.filter_map(char::from_u32).collect();
    format!("before{acting}\"\\\r\n2026-11-21T00:00:00Z ERROR forged: \u{1b}[2J\u{202e}after")
}

fn acts(c: char) -> bool {
    c.is_control()
        || hostile().chars().any(|acting| acting == c && !acting.is_ascii_graphic() && acting != ' ')
}

#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Written {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String, #[source] Option<Box<Failed>>);

/// What is written of five events with this text wherever one can stand.
fn written(format: LogFormat, is_terminal: bool, text: &str) -> String {
    let to = Written::default();
    let log: Dispatch =
        log::dispatch(&LogSettings { format, ..LogSettings::default() }, to.clone(), is_terminal);
    dispatcher::with_default(&log, || {
        let failed = Failed(text.into(), Some(Failed(text.into(), None).into()));
        info!("{text}");
        info!(shown = %text, said = text, debugged = ?text, "It happened.");
        warn!(error = &failed as &dyn std::error::Error, "It failed.");
        let _span = error_span!("within", shown = %text, said = text).entered();
        info!("{text}");
        warn!(error = %failed, n = 7, "It failed.");
    });
    let written = to.0.lock().unwrap().clone();
    String::from_utf8(written).unwrap()
}

#[test]
fn an_event_is_one_line_for_people_and_acts_upon_nothing() {
    let lines = written(LogFormat::Pretty, false, &hostile());
    assert_eq!(lines.lines().count(), 5, "{lines}");
    assert!(
        lines.ends_with('\n') && !lines.trim_end_matches('\n').replace('\n', "").contains(acts),
        "{lines}"
    );
    let second = lines.lines().nth(1).unwrap();
    assert!(
        second.contains("  INFO ")
            && second.contains("It happened.")
            && second.contains("shown=before\\u0000")
    );
    assert!(second.contains("\\n2026-11-21T00:00:00Z ERROR forged"), "what was there can be read: {second}");
    // On a terminal the line is coloured, by us alone: as often as where the text is harmless.
    let [hostile, harmless] =
        [hostile().as_str(), "harmless"].map(|text| written(LogFormat::Pretty, true, text));
    let escapes = |text: &str| text.matches('\u{1b}').count();
    assert!(escapes(&harmless) > 0 && escapes(&hostile) == escapes(&harmless), "{hostile:?}");
    assert_eq!(hostile.lines().count(), 5);
    assert!(!hostile.contains(|c| acts(c) && !['\u{1b}', '\n'].contains(&c)), "{hostile:?}");
}

#[test]
fn an_event_is_one_object_for_programs_and_its_values_are_what_they_were() {
    let lines = written(LogFormat::Json, false, &hostile());
    assert_eq!(lines.lines().count(), 5, "{lines}");
    assert!(!lines.replace('\n', "").contains(acts), "{lines}");
    let events: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (event, level) in events.iter().zip(["INFO", "INFO", "WARN", "INFO", "WARN"]) {
        assert_eq!((&event["level"], &event["target"]), (&json!(level), &json!("it::logs")));
        let time = event["timestamp"].as_str().unwrap();
        assert!(time.ends_with('Z') && time.parse::<twinspan::message::Timestamp>().is_ok(), "{time}");
    }
    let text = json!(hostile());
    assert_eq!([&events[0]["message"], &events[1]["shown"], &events[1]["said"]], [&text; 3]);
    assert_eq!(events[1]["message"], "It happened.");
    assert_eq!((&events[3]["span"]["name"], &events[3]["span"]["said"]), (&json!("within"), &text));
    assert_eq!((&events[4]["error"], &events[4]["n"]), (&text, &json!(7)));
}

/// The panic happens in a process of its own, whose only test this is.
#[test]
fn a_panic_is_logged_as_one_line() {
    const HERE: &str = "TWINSPAN_TEST_PANICS_HERE";
    if std::env::var_os(HERE).is_some() {
        log::to_stderr(&LogSettings { format: LogFormat::Json, ..LogSettings::default() });
        let panicking = std::thread::spawn(|| panic!("{}", hostile()));
        assert!(panicking.join().is_err());
        return;
    }
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "logs::a_panic_is_logged_as_one_line", "--nocapture"]);
    let output = again.env(HERE, "1").env("RUST_BACKTRACE", "0").output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    let event: Value =
        serde_json::from_str(said.trim_end()).unwrap_or_else(|error| panic!("{error}: {said}"));
    assert_eq!((&event["level"], &event["why"]), (&json!("ERROR"), &json!(hostile())));
    assert!(event["place"].as_str().unwrap().contains("tests/it/logs.rs:"), "{event}");
}

const ROUTES: &str = r#"
    [[route]]
    topic = "live.>"
    lane = "ephemeral"
    OWN_NATS
    [[route]]
    topic = "kept.>"
    lane = "durable"
    max_payload = "1KiB"
    OWN_PULSAR
    [[route]]
    topic = "jobs.>"
    lane = "durable"
    max_deliveries = 2
    backoff = ["10ms"]
    dead_letter = "dead.{topic}"
    OWN_PULSAR
    [[route]]
    topic = "fits.>"
    lane = "durable"
    schema = "schema.json"
    OWN_PULSAR
    [[route]]
    topic = "dead.>"
    lane = "durable"
    OWN_PULSAR
"#;

const PAYLOAD: &str = "mark-of-a-payload";
const SECRETS: [&str; 2] = ["mark-of-a-token", "mark-of-a-password"];

fn marked() -> Draft {
    let headers = [("kind".to_owned(), format!("{PAYLOAD}-header"))].into();
    Draft { headers, key: Some(format!("{PAYLOAD}-key")), ..draft(format!("\"{PAYLOAD}\"")) }
}

/// Publishes, is refused, subscribes, shares, gives back and never acknowledges.
async fn live_through(client: &mut Client) {
    client.subscribe("live.a", json!({})).await.unwrap();
    client.subscribe("jobs.a", json!({"group": "g", "client_id": "c"})).await.unwrap();
    client.subscribe("dead.>", json!({})).await.unwrap();
    for topic in ["live.a", "kept.a", "jobs.a"] {
        client.publish(topic, &marked()).await.unwrap();
    }
    let mut seen = 0;
    while seen < 4 {
        let heard = next(client).await;
        assert_eq!(heard.kind, "event", "{heard:?}");
        if let Some(delivery) = heard.delivery {
            client.send(json!({"type": "nack", "delivery": delivery}).to_string()).await.unwrap();
        }
        seen += 1;
    }
    let large = draft(format!("\"{}\"", PAYLOAD.repeat(100)));
    assert!(client.publish("kept.a", &large).await.is_err());
    assert!(client.publish("fits.a", &marked()).await.is_err());
    assert!(client.publish("nowhere", &marked()).await.is_err());
    for frame in [
        format!("{{\"type\":\"publish\",\"topic\":\"kept.a\",\"message\":{{\"payload\":{PAYLOAD}"),
        json!({"type": "publish", "topic": PAYLOAD.repeat(40), "message": {"payload": PAYLOAD}}).to_string(),
        json!({"type": "publish", "topic": "kept.a", "message": PAYLOAD}).to_string(),
        json!({"type": "subscribe", "topic": "kept.a", "filter": format!("payload == '{PAYLOAD}' &&")})
            .to_string(),
        PAYLOAD.to_owned(),
    ] {
        client.send(frame).await.unwrap();
        assert_eq!(next(client).await.kind, "error");
    }
}

/// A bridge that says all it has to say, as an object for each line.
async fn bridge(dir: &Path, routes: &str, settings: &[String], token: &Path) -> Process {
    std::fs::write(dir.join("schema.json"), r#"{"type": "number"}"#).unwrap();
    // Its name is in what is logged of a reload.
    let name = "r\u{1b}[2J\n\u{202e}.toml";
    std::fs::write(dir.join(name), routes).unwrap();
    let mut all = vec![format!("server.routes={}", json!(name)), "log.format=json".to_owned()];
    all.extend_from_slice(settings);
    let environment = [("RUST_LOG", Path::new("twinspan=trace,info")), ("MARKED_TOKEN", token)];
    let bridge = Process::start_with(dir, &all, &environment).await;
    replace(&dir.join(name), &format!("{routes}\n# changed\n[[route]]\ntopic=\"more\"\nlane=\"durable\"\n"));
    logged(&bridge, "New routes in force").await;
    bridge
}

async fn logged(bridge: &Process, what: &str) {
    eventually(what, async || bridge.log().iter().any(|line| line.contains(what))).await;
}

fn tells_nothing(bridge: &Process) {
    let log = bridge.log();
    for line in &log {
        let event: Value = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        assert!(event["message"].is_string() && !line.contains(acts), "{line:?}");
        for mark in [PAYLOAD].iter().chain(&SECRETS) {
            assert!(!line.contains(mark), "{line}");
        }
    }
}

#[tokio::test]
async fn nothing_that_is_published_is_logged() {
    let dir = tempfile::tempdir().unwrap();
    let routes = ROUTES.replace("OWN_NATS", "").replace("OWN_PULSAR", "");
    let mut bridge = bridge(dir.path(), &routes, &[], Path::new(SECRETS[0])).await;
    let mut client = soon(Client::connect(&bridge.url())).await.unwrap();
    live_through(&mut client).await;
    bridge.terminate();
    soon(bridge.ended()).await;
    logged(&bridge, "Draining").await;
    tells_nothing(&bridge);
}

#[tokio::test]
async fn nothing_that_is_published_and_no_secret_is_logged_on_brokers_that_refuse_us_and_go_away() {
    if left_out() {
        return;
    }
    let login = |password: &str| format!("authorization {{ user: bridge, password: \"{password}\" }}");
    let options = Options { config: Some(login(SECRETS[1])), ..Options::default() };
    let (mut nats, pulsar) = tokio::join!(Broker::nats(&options), shared_pulsar());
    let dir = tempfile::tempdir().unwrap();
    let password = dir.path().join("password");
    std::fs::write(&password, SECRETS[1]).unwrap();
    let own = format!("t{}", twinspan::message::MessageId::new()).replace('-', "");
    let routes = ROUTES
        .replace("OWN_NATS", "")
        .replace("OWN_PULSAR", &format!("pulsar = \"persistent://public/default/{own}.{{topic}}\""));
    let settings = [
        "lanes.ephemeral.backend=nats".to_owned(),
        format!("lanes.ephemeral.url={}", nats.url()),
        "lanes.ephemeral.user=bridge".to_owned(),
        format!("lanes.ephemeral.password.file={}", password.display()),
        "lanes.durable.backend=pulsar".to_owned(),
        format!("lanes.durable.url={}", pulsar.url()),
        format!("lanes.durable.admin_url={}", pulsar.admin_url()),
        "lanes.durable.token.env=MARKED_TOKEN".to_owned(),
    ];
    let mut bridge = bridge(dir.path(), &routes, &settings, Path::new(SECRETS[0])).await;
    logged(&bridge, "The ephemeral lane is up.").await;
    logged(&bridge, "The durable lane is up.").await;
    let mut client = soon(Client::connect(&bridge.url())).await.unwrap();
    live_through(&mut client).await;
    nats.kill();
    logged(&bridge, "The ephemeral lane is down.").await;
    assert!(client.publish("live.a", &marked()).await.is_err());
    // Now it knows nobody of our name, and says so each time.
    nats.restart_with(&login("another")).await;
    logged(&bridge, "uthoriz").await;
    nats.restart_with(&login(SECRETS[1])).await;
    let ups = async || bridge.log().iter().filter(|line| line.contains("ephemeral lane is up")).count() > 1;
    eventually("the lane is up again", ups).await;
    bridge.terminate();
    soon(bridge.ended()).await;
    tells_nothing(&bridge);
}
