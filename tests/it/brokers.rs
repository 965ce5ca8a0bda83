//! Real brokers for the tests, and what else they need of `dev/brokers`: on free ports, each in a directory of its own.
//!
//! ```text
//! test ──▶ keeper thread ──spawns──▶ dev/brokers exec nats … ──becomes──▶ nats-server
//! ```
//! A broker never outlives the tests, however they end: the kernel kills it when its parent dies. By parent it means
//! the thread that started it, so one thread that never ends starts them all.
//!
//! `TEST_BROKERS=none` leaves out the tests that need a broker; each says so. Without it a broker that
//! cannot be had is a failure.

use std::fs::File;
use std::io::{self, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::OnceCell;

/// Whether this test has to be left out, and then says so. The first line of every test that needs a broker.
pub fn left_out() -> bool {
    let none = std::env::var("TEST_BROKERS").is_ok_and(|value| value == "none");
    if none {
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("a test");
        // Past the capture of the test runner, which would keep this line to itself.
        let _ = writeln!(io::stderr(), "not run, because TEST_BROKERS=none: {test}");
    }
    none
}

#[derive(Default, Clone)]
pub struct Options {
    /// NATS: the server's own configuration file.
    pub config: Option<String>,
    /// Pulsar's settings, `key=value` each, besides those of `dev/brokers`.
    pub set: Vec<String>,
    /// Who a Pulsar that asks for a token shall take us for.
    pub token: Option<String>,
    /// A proxy's target, told before the broker starts: a Pulsar that advertises a proxy connects to itself by it.
    pub forwarded: Option<Arc<AtomicU16>>,
    /// Pulsar: the port of the ZooKeeper where the brokers of a cluster meet.
    pub zookeeper: Option<u16>,
}

pub struct Broker {
    kind: Kind,
    port: u16,
    /// NATS: monitoring. Pulsar: admin.
    http_port: u16,
    options: Options,
    dir: TempDir,
    child: Child,
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Nats,
    Pulsar,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Nats => "nats",
            Kind::Pulsar => "pulsar",
        }
    }

    fn http_option(self) -> &'static str {
        match self {
            Kind::Nats => "--monitor",
            Kind::Pulsar => "--http",
        }
    }

    fn health(self) -> &'static str {
        match self {
            Kind::Nats => "/healthz",
            Kind::Pulsar => "/admin/v2/brokers/health",
        }
    }

    fn ready_within(self) -> Duration {
        match self {
            Kind::Nats => Duration::from_secs(20),
            // One that was killed looks for what it had, which takes minutes where others want the processors, too.
            Kind::Pulsar => Duration::from_secs(240),
        }
    }
}

static INSTALLED_PULSAR: OnceCell<()> = OnceCell::const_new();

/// One nats-server for all tests that do it no harm. They keep apart by the names they use.
pub async fn shared_nats() -> &'static Broker {
    static SHARED: OnceCell<Broker> = OnceCell::const_new();
    SHARED.get_or_init(async || Broker::nats(&Options::default()).await).await
}

/// The same for Pulsar.
pub async fn shared_pulsar() -> &'static Broker {
    static SHARED: OnceCell<Broker> = OnceCell::const_new();
    // A failover group is handed over after a second by default, and one promise hands it over a hundred times.
    // Pulsar's own WebSocket API is what the benchmark compares with.
    let set = ["activeConsumerFailoverDelayTimeMillis=200", "webSocketServiceEnabled=true"];
    let options = Options { set: set.map(String::from).to_vec(), ..Options::default() };
    SHARED.get_or_init(async || Broker::pulsar(&options).await).await
}

impl Broker {
    pub async fn nats(options: &Options) -> Self {
        static INSTALLED: OnceCell<()> = OnceCell::const_new();
        INSTALLED.get_or_init(|| install(Kind::Nats.name())).await;
        Self::start(Kind::Nats, options).await
    }

    pub async fn pulsar(options: &Options) -> Self {
        INSTALLED_PULSAR.get_or_init(|| install(Kind::Pulsar.name())).await;
        Self::start(Kind::Pulsar, options).await
    }

    /// Two of one cluster, and what they keep everything in. The first leads: it says who serves what nobody serves.
    pub async fn pulsar_cluster() -> ([Self; 2], Storage) {
        INSTALLED_PULSAR.get_or_init(|| install(Kind::Pulsar.name())).await;
        let storage = Storage::start().await;
        let set = [
            // Else a broker that was killed is missed only after half a minute.
            "metadataStoreSessionTimeoutMillis=6000",
            // Nobody but the tests looks for topics.
            "topicLevelPoliciesEnabled=false",
            "systemTopicEnabled=false",
        ];
        let set = set.map(String::from).into();
        let options = Options { set, zookeeper: Some(storage.zookeeper), ..Options::default() };
        let first = Self::pulsar(&options).await;
        ([first, Self::pulsar(&options).await], storage)
    }

    async fn start(kind: Kind, options: &Options) -> Self {
        // Another process may take a port between our finding it and the broker's binding it.
        for _ in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let [port, http_port] = free_ports();
            let options = options.clone();
            if let Some(target) = &options.forwarded {
                target.store(port, Ordering::Relaxed);
            }
            let child = spawn(kind, port, http_port, dir.path(), &options);
            let mut broker = Self { kind, port, http_port, options, dir, child };
            if broker.is_ready().await {
                return broker;
            }
            eprintln!("{} did not become ready:\n{}", kind.name(), broker.log());
        }
        panic!("no {} could be started; see above", kind.name());
    }

    /// `nats://…` or `pulsar://…`.
    pub fn url(&self) -> String {
        format!("{}://127.0.0.1:{}", self.kind.name(), self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn token(&self) -> Option<&str> {
        self.options.token.as_deref()
    }

    pub fn monitor_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.http_port)
    }

    pub fn admin_url(&self) -> String {
        self.monitor_url()
    }

    /// What the broker's HTTP port answers: status and body.
    pub async fn get(&self, path: &str) -> io::Result<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.http_port)).await?;
        // HTTP/1.0: the body comes in one piece and ends with the connection.
        let token =
            self.token().map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
        let request = format!("GET {path} HTTP/1.0\r\nHost: localhost\r\nAccept: */*\r\n{token}\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").ok_or(io::ErrorKind::InvalidData)?;
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        Ok((status.ok_or(io::ErrorKind::InvalidData)?, body.to_owned()))
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        self.child.wait().unwrap();
    }

    /// SIGSTOP: the sockets stay open, and nobody is there.
    pub fn stop(&self) {
        self.signal(libc::SIGSTOP);
        self.wait_for(|state| state == 'T', "stopped");
    }

    /// SIGCONT.
    pub fn cont(&self) {
        self.signal(libc::SIGCONT);
        self.wait_for(|state| state != 'T', "running");
    }

    /// SIGHUP: nats-server reads its configuration again.
    pub fn reload(&mut self, config: &str) {
        self.options.config = Some(config.into());
        write_config(self.dir.path(), config);
        self.signal(libc::SIGHUP);
    }

    /// SIGUSR2: nats-server tells its clients to go, and ends later.
    pub fn lame_duck(&self) {
        self.signal(libc::SIGUSR2);
    }

    /// Starts it again, on the same ports and directory.
    pub async fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.kind, self.port, self.http_port, self.dir.path(), &self.options);
        assert!(self.is_ready().await, "{} did not come back:\n{}", self.kind.name(), self.log());
    }

    /// The same with another configuration.
    pub async fn restart_with(&mut self, config: &str) {
        self.options.config = Some(config.into());
        self.restart().await;
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    async fn is_ready(&mut self) -> bool {
        let deadline = Instant::now() + self.kind.ready_within();
        while Instant::now() < deadline && self.child.try_wait().unwrap().is_none() {
            let asked = tokio::time::timeout(Duration::from_secs(5), self.get(self.kind.health())).await;
            match (asked, self.kind) {
                (Ok(Ok((200, _))), Kind::Nats) => return true,
                (Ok(Ok((200, body))), Kind::Pulsar) if body.trim() == "ok" => return true,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
        false
    }

    // Signals have no safe interface in std.
    #[allow(unsafe_code)]
    fn signal(&self, signal: libc::c_int) {
        // SAFETY: no memory is involved, and the child is not reaped, so the id is still its own.
        let sent = unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        assert_eq!(sent, 0, "{}", io::Error::last_os_error());
    }

    fn wait_for(&self, is_it: impl Fn(char) -> bool, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
            // The state stands behind the name, which stands in parentheses and may hold anything.
            let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
            if state.is_some_and(&is_it) {
                return;
            }
            std::thread::yield_now();
        }
        panic!("{} is not {what}", self.kind.name());
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A ZooKeeper and a bookie, in which the brokers of a Pulsar cluster keep everything.
pub struct Storage {
    zookeeper: u16,
    child: Child,
    _dir: TempDir,
}

impl Storage {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let [zookeeper, bookie] = free_ports();
        let mut command = script();
        command.args(["exec", "pulsar", "--zookeeper", &zookeeper.to_string()]);
        command.args(["--bookie", &bookie.to_string(), "--dir"]).arg(dir.path());
        let mut child = logged(command, dir.path());
        let deadline = Instant::now() + Kind::Pulsar.ready_within();
        // The bookie is the last to listen.
        while TcpStream::connect(("127.0.0.1", bookie)).await.is_err() {
            let starts = child.try_wait().unwrap().is_none() && Instant::now() < deadline;
            assert!(starts, "a cluster's storage could not be started");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Self { zookeeper, child, _dir: dir }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Different ones: both are held while they are chosen.
pub fn free_ports() -> [u16; 2] {
    let free = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    free.map(|listener| listener.local_addr().unwrap().port())
}

pub fn script() -> Command {
    Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dev/brokers"))
}

pub async fn install(what: &'static str) {
    let install = move || script().args(["install", what]).stdin(Stdio::null()).output();
    let output = tokio::task::spawn_blocking(install).await.unwrap().expect("dev/brokers can be run");
    assert!(
        output.status.success(),
        "dev/brokers install {what}:\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
}

fn write_config(dir: &Path, config: &str) -> std::path::PathBuf {
    let path = dir.join("broker.conf");
    std::fs::write(&path, config).unwrap();
    path
}

fn spawn(kind: Kind, port: u16, http_port: u16, dir: &Path, options: &Options) -> Child {
    let mut command = script();
    command.args(["exec", kind.name(), "--port", &port.to_string()]);
    command.args([kind.http_option(), &http_port.to_string(), "--dir"]).arg(dir);
    if let Some(config) = &options.config {
        command.arg("--config").arg(write_config(dir, config));
    }
    if let Some(zookeeper) = options.zookeeper {
        command.args(["--zookeeper", &zookeeper.to_string()]);
    }
    for setting in &options.set {
        command.args(["--set", setting]);
    }
    logged(command, dir)
}

/// A process that dies with this one, and says what it says in the directory's `log`.
pub fn logged(mut command: Command, dir: &Path) -> Child {
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    keeper(command).expect("dev/brokers can be run")
}

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Lets the keeper thread spawn the command, as a process that dies with this one.
fn keeper(command: Command) -> io::Result<Child> {
    static JOBS: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let jobs = JOBS.get_or_init(|| {
        let (sender, jobs) = mpsc::channel::<Job>();
        std::thread::spawn(move || {
            // The sender is never dropped, so this ends with the process.
            for (mut command, answer) in jobs {
                die_with_us(&mut command);
                let _ = answer.send(command.spawn());
            }
        });
        sender
    });
    let (answer, answered) = mpsc::channel();
    jobs.send((command, answer)).unwrap();
    answered.recv().unwrap()
}

// There is no safe way to ask the kernel for this between fork and exec.
#[allow(unsafe_code)]
fn die_with_us(command: &mut Command) {
    let us = std::process::id() as libc::pid_t;
    let ask = move || {
        // SAFETY: both calls are async-signal-safe and touch no memory of ours.
        let (asked, parent) =
            unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL), libc::getppid()) };
        match (asked, parent) {
            (0, parent) if parent == us => Ok(()),
            (0, _) => Err(io::Error::other("the tests have ended already")),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: the closure allocates nothing where it succeeds and calls only what is allowed after fork.
    unsafe { command.pre_exec(ask) };
}
