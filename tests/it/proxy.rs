//! A network between the lane and a broker, or a client and the bridge, which does what networks do.
//!
//! ```text
//! lane ──▶ proxy (its port never changes) ──▶ broker
//! ```
//! A Pulsar lookup answers with the broker's own address, and a client that obeys it goes round the proxy; so a Pulsar
//! behind a proxy is started with the proxy's address as the one it advertises.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Mutex, MutexGuard, OnceCell, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::brokers::{Broker, Options};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mode {
    Forward,
    /// Nobody listens: connecting fails at once. What is connected stays.
    Refuse,
    /// A load balancer without a backend: every connection is made and ends at once.
    AcceptThenClose,
    /// A black hole: connections are made, and no byte arrives.
    Hold,
    /// What the broker says is lost; it hears everything.
    Swallow,
    /// A thin line: little comes through at a time, and late.
    Slow,
}

/// What a slow link takes at a time, and how long it needs for it.
const SLOW: (usize, Duration) = (4 << 10, Duration::from_millis(20));

/// Ends when it is dropped, and all connections with it. It has a thread and a runtime of its own, so that it may outlive
/// the test that started it.
pub struct Proxy {
    port: u16,
    /// The broker's port.
    to: Arc<AtomicU16>,
    mode: watch::Sender<Mode>,
    /// Counts the cuts.
    cuts: watch::Sender<usize>,
    /// Counts how often the connections were lost.
    losses: watch::Sender<usize>,
    accepted: Arc<AtomicUsize>,
}

impl Proxy {
    /// Listens for what is to go to a broker on this machine.
    pub fn start() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let at = listener.local_addr().unwrap();
        let (mode, cuts) = (watch::Sender::new(Mode::Forward), watch::Sender::new(0));
        let losses = watch::Sender::new(0);
        let (to, accepted) = (Arc::new(AtomicU16::new(0)), Arc::new(AtomicUsize::new(0)));
        let accepting = Accepting {
            at,
            to: to.clone(),
            mode: mode.subscribe(),
            cuts: cuts.subscribe(),
            losses: losses.subscribe(),
            accepted: accepted.clone(),
        };
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { accepting.run(TcpListener::from_std(listener).unwrap()).await });
        });
        Self { port: at.port(), to, mode, cuts, losses, accepted }
    }

    /// A Pulsar whose clients, its own included, all come through the proxy, and the proxy.
    pub async fn pulsar(mut options: Options) -> (Broker, Self) {
        let proxy = Self::start();
        // Either of the two names the address, and both together are refused by the broker.
        options.set.push("advertisedAddress=".into());
        options.set.push(format!("advertisedListeners=proxied:pulsar://127.0.0.1:{}", proxy.port));
        options.forwarded = Some(proxy.to.clone());
        let broker = Broker::pulsar(&options).await;
        (broker, proxy)
    }

    /// One of each for the tests that take turns in breaking the way.
    pub async fn shared_pulsar() -> MutexGuard<'static, (Broker, Self)> {
        static SHARED: OnceCell<Mutex<(Broker, Proxy)>> = OnceCell::const_new();
        let shared = SHARED.get_or_init(async || Mutex::new(Self::pulsar(Options::default()).await)).await;
        let shared = shared.lock().await;
        shared.1.resume();
        shared
    }

    pub fn lead_to(&self, port: u16) {
        self.to.store(port, Ordering::Relaxed);
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn pulsar_url(&self) -> String {
        format!("pulsar://127.0.0.1:{}", self.port)
    }

    /// How many connections were made so far.
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Resets every connection there is; new ones are treated as the mode says.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts again and again until the returned task is dropped.
    pub fn cut_every(&self, period: Duration) -> JoinSet<()> {
        let cuts = self.cuts.clone();
        let mut cutting = JoinSet::new();
        cutting.spawn(async move {
            loop {
                sleep(period).await;
                cuts.send_modify(|cuts| *cuts += 1);
            }
        });
        cutting
    }

    pub fn refuse(&self) {
        self.mode.send_replace(Mode::Refuse);
    }

    pub fn accept_then_close(&self) {
        self.mode.send_replace(Mode::AcceptThenClose);
    }

    /// What is connected stays connected, and nothing comes through in either direction.
    pub fn hold(&self) {
        self.mode.send_replace(Mode::Hold);
    }

    /// Until they are cut, connections bring no answer.
    pub fn swallow(&self) {
        self.mode.send_replace(Mode::Swallow);
    }

    /// No packet of the connections there are arrives any more, and no reset tells so; new ones are made as ever.
    pub fn lose(&self) {
        self.losses.send_modify(|losses| *losses += 1);
    }

    /// 200 KiB a second in each direction of each connection.
    pub fn slow(&self) {
        self.mode.send_replace(Mode::Slow);
    }

    pub fn resume(&self) {
        self.mode.send_replace(Mode::Forward);
    }
}

struct Accepting {
    at: SocketAddr,
    to: Arc<AtomicU16>,
    mode: watch::Receiver<Mode>,
    cuts: watch::Receiver<usize>,
    losses: watch::Receiver<usize>,
    accepted: Arc<AtomicUsize>,
}

impl Accepting {
    async fn run(self, listener: TcpListener) {
        let mut listener = Some(listener);
        let mut connections = JoinSet::new();
        let mut mode = self.mode.clone();
        loop {
            let wanted = *mode.borrow_and_update();
            if wanted == Mode::Refuse {
                listener = None;
                if mode.changed().await.is_err() {
                    return;
                }
                continue;
            }
            let listening = listener.get_or_insert_with(|| {
                let socket = TcpSocket::new_v4().unwrap();
                socket.set_reuseaddr(true).unwrap();
                socket.bind(self.at).unwrap();
                socket.listen(128).unwrap()
            });
            let client = tokio::select! {
                accepted = listening.accept() => accepted.unwrap().0,
                changed = mode.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
            };
            self.accepted.fetch_add(1, Ordering::Relaxed);
            // `accept` may have won against a change.
            if *self.mode.borrow() == Mode::AcceptThenClose {
                continue;
            }
            let carrying = carry(client, self.to.clone(), self.mode.clone(), self.losses.clone());
            connections.spawn(until_cut(carrying, self.cuts.clone()));
            while connections.try_join_next().is_some() {}
        }
    }
}

async fn until_cut(carrying: impl Future<Output = ()>, mut cuts: watch::Receiver<usize>) {
    cuts.mark_unchanged();
    tokio::select! {
        () = carrying => {}
        _ = cuts.changed() => {}
    }
}

/// Carries one connection's bytes until either side ends it.
async fn carry(
    mut client: TcpStream,
    to: Arc<AtomicU16>,
    mut mode: watch::Receiver<Mode>,
    mut losses: watch::Receiver<usize>,
) {
    let _ = client.set_zero_linger();
    losses.mark_unchanged();
    let mut carrying = pin!(async {
        mode.wait_for(|mode| *mode != Mode::Hold).await.ok()?;
        let mut broker = TcpStream::connect(("127.0.0.1", to.load(Ordering::Relaxed))).await.ok()?;
        // However this ends, the broker sees a reset, as from a machine that is gone.
        broker.set_zero_linger().ok()?;
        for side in [&client, &broker] {
            side.set_nodelay(true).ok()?;
        }
        let (mut from_client, mut to_client) = client.split();
        let (mut from_broker, mut to_broker) = broker.split();
        tokio::select! {
            () = pump(&mut from_client, &mut to_broker, mode.clone(), false) => {}
            () = pump(&mut from_broker, &mut to_client, mode.clone(), true) => {}
        }
        Some(())
    });
    tokio::select! {
        _ = &mut carrying => {}
        // Both sockets stay open.
        Ok(()) = losses.changed() => std::future::pending().await,
    }
}

async fn pump(
    from: &mut (impl AsyncReadExt + Unpin),
    to: &mut (impl AsyncWriteExt + Unpin),
    mut mode: watch::Receiver<Mode>,
    are_answers: bool,
) {
    let mut bytes = vec![0; 64 << 10];
    loop {
        let is_slow = *mode.borrow() == Mode::Slow;
        let most = if is_slow { SLOW.0 } else { bytes.len() };
        let Ok(read @ 1..) = from.read(&mut bytes[..most]).await else { return };
        if is_slow {
            sleep(SLOW.1).await;
        }
        if are_answers && *mode.borrow() == Mode::Swallow {
            continue;
        }
        if mode.wait_for(|mode| *mode != Mode::Hold).await.is_err()
            || to.write_all(&bytes[..read]).await.is_err()
        {
            return;
        }
    }
}
