//! A plain TCP balancer before several bridges: round robin, past who does not accept.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// Ends when it is dropped, and all connections with it.
pub struct Balancer {
    pub listen: SocketAddr,
    backends: Arc<Mutex<Vec<SocketAddr>>>,
    _task: JoinSet<()>,
}

impl Balancer {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (listen, backends) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<_>>>::default());
        let (mut task, known) = (JoinSet::new(), backends.clone());
        task.spawn(async move {
            let mut connections = JoinSet::new();
            for turn in 0.. {
                let client = listener.accept().await.unwrap().0;
                let mut backends: Vec<SocketAddr> = known.lock().unwrap().clone();
                let first = turn % backends.len().max(1);
                backends.rotate_left(first);
                connections.spawn(carry(client, backends));
                while connections.try_join_next().is_some() {}
            }
        });
        Self { listen, backends, _task: task }
    }

    /// From now on.
    pub fn lead_to(&self, backends: Vec<SocketAddr>) {
        *self.backends.lock().unwrap() = backends;
    }
}

async fn carry(mut client: TcpStream, backends: Vec<SocketAddr>) {
    for backend in backends {
        if let Ok(mut bridge) = TcpStream::connect(backend).await {
            for side in [&client, &bridge] {
                let _ = side.set_nodelay(true);
            }
            // An error ends the connection as anything else does.
            let _ = copy_bidirectional(&mut client, &mut bridge).await;
            return;
        }
    }
}
