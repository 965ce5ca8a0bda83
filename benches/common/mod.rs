//! What the benchmarks share: a server in a process of its own, and what that process costs.

use std::net::{SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// A process that ends with its owner.
pub struct Server {
    child: Child,
    pub address: SocketAddr,
    _dir: Option<TempDir>,
}

impl Server {
    /// The bridge as it is built here, with the settings that everybody starts with but for the pings.
    pub fn twinspan(pinned: bool) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let routes = dir.path().join("routes.toml");
        let text = "[[route]]\ntopic = \"telemetry.>\"\nlane = \"ephemeral\"\n\n\
                    [[route]]\ntopic = \"orders.>\"\nlane = \"durable\"\n";
        std::fs::write(&routes, text).expect("the routes are written");
        let (address, admin) = (free(), free());
        let mut command = on_core(pinned.then_some(0), env!("CARGO_BIN_EXE_twinspan"));
        command.current_dir(dir.path()).arg("serve");
        for setting in [
            format!("server.listen={address}"),
            format!("server.admin={admin}"),
            format!("server.routes={}", routes.display()),
            format!("server.data_dir={}", dir.path().join("data").display()),
            // The clients here only count, and answer no pings.
            "session.ping_interval=30m".into(),
            "session.pong_timeout=1h".into(),
        ] {
            command.args(["--set", &setting]);
        }
        Self::spawn(command, address, Some(dir))
    }

    /// Starts what listens on `address`, and waits until it does.
    pub fn spawn(mut command: Command, address: SocketAddr, dir: Option<TempDir>) -> Self {
        let child = command.stdout(Stdio::null()).spawn().expect("the server starts");
        let until = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(address).is_err() {
            assert!(Instant::now() < until, "the server listens");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self { child, address, _dir: dir }
    }

    /// A file of the kernel's about this process.
    pub fn proc(&self, file: &str) -> String {
        std::fs::read_to_string(format!("/proc/{}/{file}", self.child.id())).expect("procfs")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An address that nobody listens on now.
pub fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port")
}

/// A command on one core, where `taskset` is there.
pub fn on_core(core: Option<usize>, program: &str) -> Command {
    match core {
        Some(core) if Command::new("taskset").arg("-V").stdout(Stdio::null()).status().is_ok() => {
            let mut command = Command::new("taskset");
            command.args(["-c", &core.to_string(), program]);
            command
        }
        _ => Command::new(program),
    }
}

/// The smallest, the middle and the largest.
pub fn spread(mut figures: Vec<f64>) -> [f64; 3] {
    figures.sort_by(f64::total_cmp);
    [figures[0], figures[figures.len() / 2], figures[figures.len() - 1]]
}
