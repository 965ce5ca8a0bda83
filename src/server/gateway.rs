//! The way in for WebSocket clients: the path and the subprotocol choose how they speak, then a session serves them.

use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{WebSocketUpgrade, rejection::WebSocketUpgradeRejection};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::app::App;
use super::rest::refusal;
use crate::session::{self, Manner};
use crate::wire::code::{Code, Fault};
use crate::wire::json::Json;

/// The JSON dialect, with a greeting.
const SUBPROTOCOL: &str = "twinspan.v1";
/// The library's default costs an idle connection 128 KiB.
const READ_BUFFER_BYTES: usize = 4 * 1024;
/// What is gathered for one write to the socket. The buffer grows as it is needed, so it costs an idle connection
/// nothing; at 4 KiB the writes of a busy one take twice the processor.
const WRITE_BUFFER_BYTES: usize = 32 * 1024;

pub fn routes() -> Router<Arc<App>> {
    Router::new().route("/ws", get(json))
}

async fn json(
    State(app): State<Arc<App>>,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let upgrade = match upgrade {
        Ok(upgrade) => upgrade,
        Err(rejection) => {
            app.bridge.metrics.refused_connection("json");
            return rejection.into_response();
        }
    };
    if app.is_draining() {
        app.bridge.metrics.refused_connection("json");
        return refusal(&Fault::new(
            Code::ShuttingDown,
            "this bridge is going away: connect to another, or later",
        ));
    }
    let settings = app.session.clone();
    let frame_bytes_max = settings.frame_bytes_max();
    let upgrade = upgrade
        .protocols([SUBPROTOCOL])
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        // What one batch may hold, and one frame besides: the writer waits for the socket between batches.
        .max_write_buffer_size(2 * (settings.queue_bytes + frame_bytes_max))
        .max_message_size(frame_bytes_max)
        .max_frame_size(frame_bytes_max);
    let greets = upgrade.selected_protocol().is_some();
    upgrade.on_upgrade(move |socket| async move {
        let manner = Manner { codec: Arc::new(Json), greets, dialect: "json" };
        let serving = session::run(socket, app.bridge.clone(), app.roster.clone(), settings, manner);
        app.sessions.track_future(serving).await;
    })
}
