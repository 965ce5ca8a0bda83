//! Accepts connections and serves HTTP/1.1 on them, upgrades included.
//!
//! `axum::serve` sets no deadline on a handshake: who connects and says nothing, or drips a header, would stay for
//! ever. Hyper has that deadline where it is given a timer, so the loop is ours.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::socket::Socket;

/// The largest request head. Hyper takes no smaller buffer than 8 KiB.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// How long accepting pauses where the process has no file descriptor left.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Serves until `stop`; the connections that are open then finish what they do, on `tasks`.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    handshake_timeout: Duration,
    tasks: TaskTracker,
    stop: CancellationToken,
) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(handshake_timeout).max_buf_size(HEAD_BYTES_MAX);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        let (socket, peer): (_, SocketAddr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "A connection could not be accepted.");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = socket.set_nodelay(true) {
            debug!(%peer, %error, "A socket keeps its delay.");
        }
        let service = TowerToHyperService::new(router.clone());
        let connection =
            http.serve_connection(TokioIo::new(Socket::new(socket, tasks.clone())), service).with_upgrades();
        let stop = stop.clone();
        tasks.spawn(async move {
            tokio::pin!(connection);
            let served = tokio::select! {
                served = &mut connection => served,
                () = stop.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = served {
                debug!(%peer, %error, "A connection ended early.");
            }
        });
    }
}
