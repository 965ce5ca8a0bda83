//! A bridge in a process of its own, which can be killed, and of which the system tells what it takes.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, Command};

use crate::harness::soon;

pub struct Process {
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    child: Child,
    log: Arc<Mutex<Vec<String>>>,
}

/// What a process takes of the machine.
#[derive(Debug, Clone, Copy, Default)]
pub struct Takes {
    pub resident_kib: u64,
    pub descriptors: usize,
    /// Seconds of processor time since it began.
    pub processor: f64,
}

impl Process {
    /// In a directory that holds its `routes.toml`, and will hold its data.
    pub async fn start(dir: &Path, settings: &[String]) -> Self {
        Self::start_with(dir, settings, &[]).await
    }

    /// The same with an environment of its own.
    pub async fn start_with(dir: &Path, settings: &[String], environment: &[(&str, &Path)]) -> Self {
        // A file that may not grow answers with an error then, instead of a signal that ends the process.
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_twinspan"), "serve"]);
        command.args(["--set", "server.listen=127.0.0.1:0", "--set", "server.admin=127.0.0.1:0"]);
        command.args(["--set", "server.routes=routes.toml"]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        command.current_dir(dir).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.env("RUST_LOG", "warn").envs(environment.iter().copied()).spawn().unwrap();
        let log = Arc::<Mutex<Vec<String>>>::default();
        keep(BufReader::new(child.stderr.take().unwrap()).lines(), log.clone());
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let first = soon(lines.next_line()).await.unwrap();
        let first = first.unwrap_or_else(|| panic!("it says where it listens: {:?}", log.lock().unwrap()));
        let address = |scheme: &str| {
            let url = first.split_whitespace().find_map(|word| word.strip_prefix(scheme)).unwrap();
            url.trim_end_matches("/ws").parse().unwrap()
        };
        let (listen, admin) = (address("ws://"), address("http://"));
        keep(lines, Arc::default());
        Self { listen, admin, child, log }
    }

    pub fn url(&self) -> String {
        format!("ws://{}/ws", self.listen)
    }

    pub fn http(&self, path: &str) -> String {
        format!("http://{}{path}", self.listen)
    }

    /// SIGKILL.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    /// SIGTERM.
    // Signals have no safe interface in std.
    #[allow(unsafe_code)]
    pub fn terminate(&self) {
        // SAFETY: no memory is involved, and the child is not reaped, so the id is still its own.
        let sent = unsafe { libc::kill(self.id() as libc::pid_t, libc::SIGTERM) };
        assert_eq!(sent, 0, "{}", io::Error::last_os_error());
    }

    /// Waits until it has ended by itself.
    pub async fn ended(&mut self) -> ExitStatus {
        self.child.wait().await.unwrap()
    }

    /// What it logged, as far as it was read.
    pub fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    fn id(&self) -> u32 {
        self.child.id().expect("it was not waited for")
    }

    /// No file of it may be larger from now on; `None` lifts that.
    // Limits of another process have no safe interface in std.
    #[allow(unsafe_code)]
    pub fn limit_files(&self, bytes: Option<u64>) {
        let limit =
            libc::rlimit { rlim_cur: bytes.unwrap_or(libc::RLIM_INFINITY), rlim_max: libc::RLIM_INFINITY };
        // SAFETY: the new limit is read, and nothing is written where the old one would be; the child is not reaped, so
        // the id is still its own.
        let set = unsafe {
            libc::prlimit(
                self.id() as libc::pid_t,
                libc::RLIMIT_FSIZE,
                &raw const limit,
                std::ptr::null_mut(),
            )
        };
        assert_eq!(set, 0, "{}", io::Error::last_os_error());
    }

    /// `None` once it has ended.
    pub fn takes(&self) -> Option<Takes> {
        let dir = format!("/proc/{}", self.child.id()?);
        let stat = std::fs::read_to_string(format!("{dir}/stat")).ok()?;
        // Behind the name, which stands in parentheses and may hold anything.
        let fields: Vec<u64> =
            stat.rsplit_once(") ")?.1.split(' ').map(|field| field.parse().unwrap_or(0)).collect();
        let (ticks, pages) = (fields.get(11)? + fields.get(12)?, fields.get(21)?);
        let descriptors = std::fs::read_dir(format!("{dir}/fd")).ok()?.count();
        // Linux counts in hundredths of a second and pages of 4 KiB where these tests run.
        Some(Takes { resident_kib: pages * 4, descriptors, processor: ticks as f64 / 100.0 })
    }
}

/// Reads on, so that the pipe does not fill.
fn keep(
    mut lines: Lines<impl tokio::io::AsyncBufRead + Unpin + Send + 'static>,
    log: Arc<Mutex<Vec<String>>>,
) {
    tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            log.lock().unwrap().push(line);
        }
    });
}
