//! A whole bridge in this process, and what tests do with it again and again.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use twinspan::client::{Client, ClientError};
use twinspan::config;
use twinspan::config::settings::Settings;
use twinspan::lane;
use twinspan::lane::settings::{DurableBackend, EphemeralBackend};
use twinspan::message::{Draft, MessageId};
use twinspan::policy::Reloader;
use twinspan::server::app::App;
use twinspan::server::{Carriers, Running};
use twinspan::telemetry::metrics::Metrics;
use twinspan::wire::json::heard::Heard;

use crate::brokers::{Broker, left_out, shared_nats, shared_pulsar};

/// How long a test waits for what must come.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// The routes that most tests are happy with.
pub const ROUTES: &str = r#"
    [[route]]
    name = "telemetry"
    topic = "telemetry.>"
    lane = "ephemeral"

    [[route]]
    name = "svc"
    topic = "svc.>"
    lane = "ephemeral"

    [[route]]
    name = "orders"
    topic = "orders.>"
    lane = "durable"

    [[route]]
    name = "mixed-live"
    topic = "mixed.live.>"
    lane = "ephemeral"

    [[route]]
    name = "mixed-kept"
    topic = "mixed.kept.>"
    lane = "durable"

    [[route]]
    name = "both"
    topic = "both.>"
    lane = "both"

    [[route]]
    name = "first"
    topic = "first.>"
    lane = "both"
    live = "first"

    [[route]]
    name = "declared"
    topic = "declared.>"
    lane = "durable"
    declare = "required"

    [[route]]
    name = "jobs"
    topic = "jobs.>"
    lane = "durable"
    backoff = ["100ms", "400ms"]
    max_deliveries = 3
    dead_letter = "dead.{topic}"

    [[route]]
    name = "timed"
    topic = "timed.>"
    lane = "durable"
    ack_timeout = "500ms"

    [[route]]
    name = "slow"
    topic = "slow.>"
    lane = "durable"
    backoff = ["1m"]
"#;

/// A bridge on random ports, with its own data and routes.
pub struct Span {
    pub running: Running,
    pub routes: PathBuf,
    /// What its topics' names begin with at the brokers.
    pub own: String,
    dir: Option<TempDir>,
}

/// How a bridge is to be.
pub struct Plan {
    pub routes: String,
    pub settings: Settings,
    pub own: String,
    /// Lanes of the test's own instead of those in the settings.
    pub lanes: Option<Carriers>,
}

impl Plan {
    /// Both lanes on the brokers that the tests share; the names of this plan's topics there are its own.
    /// `None` where the tests are to do without brokers.
    pub async fn on_brokers() -> Option<Self> {
        if left_out() {
            return None;
        }
        let mut plan = Self::default();
        let (nats, pulsar) = tokio::join!(shared_nats(), shared_pulsar());
        plan.ephemeral_on(nats.url());
        plan.durable_on(pulsar.url(), pulsar);
        let own = format!("t{}", MessageId::new()).replace('-', "");
        plan.routes = plan
            .routes
            .replace("lane = \"ephemeral\"", &format!("lane = \"ephemeral\"\nnats = \"{own}.{{topic}}\""))
            .replace(
                "lane = \"durable\"",
                &format!("lane = \"durable\"\npulsar = \"persistent://public/default/{own}.{{topic}}\""),
            )
            .replace(
                "lane = \"both\"",
                &format!(
                    "lane = \"both\"\nnats = \"{own}.{{topic}}\"\n\
                     pulsar = \"persistent://public/default/{own}.{{topic}}\""
                ),
            );
        plan.own = own;
        Some(plan)
    }

    /// The ephemeral lane by a NATS server at this address.
    pub fn ephemeral_on(&mut self, url: String) {
        let ephemeral = &mut self.settings.lanes.ephemeral;
        (ephemeral.backend, ephemeral.url) = (EphemeralBackend::Nats, vec![url]);
    }

    /// The durable lane by a Pulsar, reached at this address.
    pub fn durable_on(&mut self, url: String, pulsar: &Broker) {
        let durable = &mut self.settings.lanes.durable;
        (durable.backend, durable.url) = (DurableBackend::Pulsar, vec![url]);
        durable.admin_url = pulsar.admin_url();
    }
}

impl Default for Plan {
    fn default() -> Self {
        let mut settings = Settings::default();
        settings.server.listen = SocketAddr::from(([127, 0, 0, 1], 0));
        settings.server.admin = SocketAddr::from(([127, 0, 0, 1], 0));
        settings.server.grace = Duration::from_secs(5);
        Self { routes: ROUTES.into(), settings, own: String::new(), lanes: None }
    }
}

impl Span {
    pub async fn start() -> Self {
        Self::with(Plan::default()).await
    }

    pub async fn with(plan: Plan) -> Self {
        Self::inside(plan, tempfile::tempdir().unwrap()).await
    }

    /// A bridge on real brokers.
    pub async fn on_brokers() -> Option<Self> {
        Some(Self::with(Plan::on_brokers().await?).await)
    }

    /// On the data that another bridge left.
    pub async fn inside(mut plan: Plan, dir: TempDir) -> Self {
        let routes = dir.path().join("routes.toml");
        std::fs::write(&routes, &plan.routes).unwrap();
        plan.settings.server.routes = routes.clone();
        plan.settings.server.data_dir = dir.path().join("data");
        let loaded = config::load_routes(&plan.settings).unwrap_or_else(|problems| panic!("{problems:?}"));
        let metrics = Arc::new(Metrics::new());
        let reloader = Reloader::new(routes.clone(), loaded, metrics.clone());
        let lanes = match plan.lanes {
            Some(lanes) => lanes,
            None => {
                let (policy, lanes) = (reloader.policy().clone(), &plan.settings.lanes);
                let ephemeral =
                    lane::open_ephemeral(&lanes.ephemeral, policy.clone(), metrics.clone()).await.unwrap();
                let data_dir = &plan.settings.server.data_dir;
                let durable =
                    lane::open_durable(&lanes.durable, data_dir, policy, metrics.clone()).await.unwrap();
                Carriers { ephemeral, durable }
            }
        };
        let running = Running::start(plan.settings, reloader, lanes, metrics).await.unwrap();
        let span = Self { running, routes, own: plan.own, dir: Some(dir) };
        eventually("both lanes are up", async || span.app().status() == "ok").await;
        span
    }

    /// Ends the bridge in order; its data remains.
    pub async fn stop(mut self) -> TempDir {
        assert!(self.running.drain().await, "the bridge ends within its grace");
        self.dir.take().unwrap()
    }

    pub fn app(&self) -> &Arc<App> {
        &self.running.app
    }

    pub fn url(&self) -> String {
        format!("ws://{}/ws", self.running.listen)
    }

    pub fn http(&self, path: &str) -> String {
        format!("http://{}{path}", self.running.listen)
    }

    pub fn admin(&self, path: &str) -> String {
        format!("http://{}{path}", self.running.admin)
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.url()).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        answer(http_client().get(self.http(path)).send().await.unwrap()).await
    }

    pub async fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> (u16, Value) {
        answer(http_client().post(self.http(path)).body(body).send().await.unwrap()).await
    }

    /// One metric's value, by the beginning of its line.
    pub fn metric(&self, line: &str) -> f64 {
        let text = self.app().bridge.metrics.render();
        let found = text.lines().find(|l| l.starts_with(line) && l[line.len()..].starts_with(' '));
        found.and_then(|l| l.rsplit(' ').next()?.parse().ok()).unwrap_or(0.0)
    }

    pub fn write_routes(&self, text: &str) {
        replace(&self.routes, text);
    }
}

/// Replaces a file by renaming, as editors do.
pub fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    std::fs::write(&new, text).unwrap();
    std::fs::rename(new, path).unwrap();
}

pub fn http_client() -> reqwest::Client {
    lane::install_crypto();
    reqwest::Client::builder().no_proxy().timeout(PATIENCE).build().unwrap()
}

pub async fn answer(response: reqwest::Response) -> (u16, Value) {
    let status = response.status().as_u16();
    let text = response.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

pub fn draft(payload: impl Into<Vec<u8>>) -> Draft {
    Draft { payload: payload.into().into(), ..Draft::default() }
}

/// What must come, comes.
pub async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("this comes in time")
}

/// Waits until something holds, looking again and again.
pub async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let until = tokio::time::Instant::now() + PATIENCE;
    while !holds().await {
        assert!(tokio::time::Instant::now() < until, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The next frame that a client has not called for.
pub async fn next(client: &mut Client) -> Heard {
    soon(client.next()).await.unwrap()
}

/// The payload of the next frame, which must be an event.
pub async fn next_payload(client: &mut Client) -> String {
    let heard = next(client).await;
    assert_eq!(heard.kind, "event", "{heard:?}");
    String::from_utf8(heard.payload().unwrap()).unwrap()
}

/// Nothing was on its way to the client when this was called: what it hears next is an answer to this.
pub async fn silent(client: &mut Client) {
    soon(client.ping()).await.unwrap();
    if let Ok(heard) = tokio::time::timeout(Duration::ZERO, client.next()).await {
        panic!("nothing was to come, but {heard:?}");
    }
}

/// The code of a call that must be refused.
pub fn refused<T: std::fmt::Debug>(called: Result<T, ClientError>) -> String {
    match called {
        Err(ClientError::Refused(error)) => error.code,
        other => panic!("refused, not {other:?}"),
    }
}

pub fn nothing() -> Value {
    json!({})
}

/// Runs each promise, a function of a bridge, on the embedded lanes and on real brokers.
macro_rules! on_both_kinds {
    ($($(#[$attribute:meta])* $promise:ident),* $(,)?) => {
        mod embedded {
            $($(#[$attribute])* #[tokio::test]
            async fn $promise() {
                super::$promise($crate::harness::Span::start().await).await;
            })*
        }
        mod brokers {
            $($(#[$attribute])* #[tokio::test]
            async fn $promise() {
                if let Some(span) = $crate::harness::Span::on_brokers().await {
                    super::$promise(span).await;
                }
            })*
        }
    };
}
pub(crate) use on_both_kinds;
