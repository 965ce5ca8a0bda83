//! Several bridges on the same brokers, each in a process with a directory of its own, behind one balancer.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::balancer::Balancer;
use crate::checker::Moment;
use crate::crowd::Book;
use crate::harness::{PATIENCE, http_client, replace};
use crate::process::{Process, Takes};
use crate::truth::{self, Said, Statement};

const LOOK_EVERY: Duration = Duration::from_millis(500);

pub struct Fleet {
    pub book: Arc<Book>,
    balancer: Balancer,
    bridges: Vec<Bridge>,
    settings: Vec<String>,
    statements: Mutex<Vec<Statement>>,
    http: reqwest::Client,
}

struct Bridge {
    dir: TempDir,
    running: Mutex<Option<Running>>,
    /// What its processes logged that are gone.
    logged: Mutex<Vec<String>>,
    most: Mutex<Most>,
}

struct Running {
    process: Process,
    since: Moment,
}

/// The most that any process of a bridge was seen to take.
#[derive(Debug, Clone, Copy, Default)]
pub struct Most {
    pub resident_kib: u64,
    pub descriptors: usize,
    pub spool_bytes: f64,
}

impl Fleet {
    pub async fn start(count: usize, routes: &str, settings: Vec<String>, book: Arc<Book>) -> Arc<Self> {
        let bridges = (0..count)
            .map(|_| {
                let dir = tempfile::tempdir().unwrap();
                std::fs::write(dir.path().join("routes.toml"), routes).unwrap();
                Bridge { dir, running: Mutex::default(), logged: Mutex::default(), most: Mutex::default() }
            })
            .collect();
        let (balancer, statements, http) = (Balancer::start().await, Mutex::default(), http_client());
        let fleet = Arc::new(Self { book, balancer, bridges, settings, statements, http });
        for bridge in 0..count {
            fleet.begin(bridge).await;
        }
        fleet
    }

    /// Where the balancer listens.
    pub fn url(&self) -> String {
        format!("ws://{}/ws", self.balancer.listen)
    }

    pub fn count(&self) -> usize {
        self.bridges.len()
    }

    /// Starts a bridge that is not there.
    pub async fn begin(&self, bridge: usize) {
        let process = Process::start(self.bridges[bridge].dir.path(), &self.settings).await;
        let since = self.book.now();
        *self.bridges[bridge].running.lock().unwrap() = Some(Running { process, since });
        self.balance();
    }

    /// SIGKILL.
    pub async fn kill(&self, bridge: usize) {
        let of = &self.bridges[bridge];
        let mut running = of.running.lock().unwrap().take().expect("it runs");
        running.process.kill().await;
        of.logged.lock().unwrap().extend(running.process.log());
        self.balance();
    }

    fn balance(&self) {
        let all = (0..self.count()).filter_map(|bridge| self.with(bridge, |process| process.listen));
        self.balancer.lead_to(all.collect());
    }

    /// `None` where it does not run.
    pub fn with<T>(&self, bridge: usize, look: impl FnOnce(&Process) -> T) -> Option<T> {
        self.bridges[bridge].running.lock().unwrap().as_ref().map(|running| look(&running.process))
    }

    pub fn write_routes(&self, bridge: usize, routes: &str) {
        replace(&self.bridges[bridge].dir.path().join("routes.toml"), routes);
    }

    pub fn spool(&self, bridge: usize) -> PathBuf {
        self.bridges[bridge].dir.path().join("data/spool/journal.redb")
    }

    /// When its process began; `None` where there is none.
    pub fn since(&self, bridge: usize) -> Option<Moment> {
        self.bridges[bridge].running.lock().unwrap().as_ref().map(|running| running.since)
    }

    pub fn takes(&self, bridge: usize) -> Takes {
        self.with(bridge, Process::takes).flatten().unwrap_or_default()
    }

    /// How many clients a bridge has.
    pub async fn connections(&self, bridge: usize) -> f64 {
        let metrics = self.get(bridge, "/metrics").await;
        truth::metric(&metrics, r#"twinspan_connections{dialect="json"}"#).unwrap_or(0.0)
    }

    /// Returns once every bridge calls itself well. The first requests of a Pulsar take their time.
    pub async fn is_well(&self) {
        for bridge in 0..self.count() {
            let is_well = async || {
                let health: Value = serde_json::from_str(&self.get(bridge, "/health").await).unwrap();
                health["status"] == "pass"
            };
            let well = async {
                while !is_well().await {
                    sleep(LOOK_EVERY).await;
                }
            };
            timeout(PATIENCE * 6, well).await.expect("everything begins well");
        }
    }

    /// What a bridge answers to operators.
    async fn get(&self, bridge: usize, path: &str) -> String {
        let admin = self.with(bridge, |process| process.admin).expect("it runs");
        let answer = self.http.get(format!("http://{admin}{path}")).send().await.unwrap();
        answer.text().await.unwrap()
    }

    pub fn most(&self, bridge: usize) -> Most {
        *self.bridges[bridge].most.lock().unwrap()
    }

    pub fn statements(&self) -> Vec<Statement> {
        self.statements.lock().unwrap().clone()
    }

    pub fn log(&self, bridge: usize) -> Vec<String> {
        let mut log = self.bridges[bridge].logged.lock().unwrap().clone();
        log.extend(self.with(bridge, Process::log).unwrap_or_default());
        log
    }

    /// What all of them logged.
    pub fn logs(&self) -> String {
        let logs = (0..self.count())
            .map(|bridge| format!("bridge {bridge} logged:\n{}\n", self.log(bridge).join("\n")));
        logs.collect()
    }

    /// Asks every bridge again and again how it is, until the tasks are dropped.
    pub fn watch(self: &Arc<Self>) -> JoinSet<()> {
        let mut watching = JoinSet::new();
        for bridge in 0..self.count() {
            let fleet = self.clone();
            watching.spawn(async move {
                loop {
                    fleet.look(bridge).await;
                    sleep(LOOK_EVERY).await;
                }
            });
        }
        watching
    }

    async fn look(&self, bridge: usize) {
        let running = self.bridges[bridge]
            .running
            .lock()
            .unwrap()
            .as_ref()
            .map(|running| (running.process.listen, running.process.admin, running.since));
        let Some((listen, admin, since)) = running else { return };
        let health = self.ask(bridge, since, listen, "/health", |body| {
            truth::of_health(&serde_json::from_str(body).unwrap_or_default())
        });
        let checks = self.ask(bridge, since, admin, "/health", |body| {
            truth::of_checks(&serde_json::from_str(body).unwrap_or_default())
        });
        let metrics = self.ask(bridge, since, admin, "/metrics", |text| {
            let takes = self.takes(bridge);
            let mut most = self.bridges[bridge].most.lock().unwrap();
            most.resident_kib = most.resident_kib.max(takes.resident_kib);
            most.descriptors = most.descriptors.max(takes.descriptors);
            let spool_bytes = truth::metric(text, "twinspan_spool_bytes").unwrap_or(0.0);
            most.spool_bytes = most.spool_bytes.max(spool_bytes);
            truth::of_metrics(text)
        });
        tokio::join!(health, checks, metrics);
    }

    async fn ask(
        &self,
        bridge: usize,
        since: Moment,
        at: SocketAddr,
        source: &'static str,
        read: impl FnOnce(&str) -> Said,
    ) {
        let asked = self.book.now();
        let answer = async { self.http.get(format!("http://{at}{source}")).send().await?.text().await };
        let said = answer.await.ok().map(|body| read(&body));
        // Nobody asks the dead for an answer.
        let runs =
            self.bridges[bridge].running.lock().unwrap().as_ref().is_some_and(|now| now.since == since);
        if runs {
            let answered = self.book.now();
            self.statements.lock().unwrap().push(Statement { bridge, since, asked, answered, source, said });
        }
    }
}
