//! HTTP for operators, on a listener of its own: the console, metrics, health in full, routes, connections, reload.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use super::app::App;
use super::console;
use crate::bridge::canary::Standing;
use crate::message::{Lane, Timestamp};
use crate::topic::Topic;
use crate::wire::code::{Code, Fault};
use crate::wire::json::refused_name;

/// How long deleting a group may take.
const DELETE_TIMEOUT: Duration = Duration::from_secs(10);

pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/", get(index))
        .route("/livez", get(async || Json(json!({"status": "alive"}))))
        .route("/readyz", get(super::rest::ready))
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .route("/routes", get(routes_in_force))
        .route("/explain/{topic}", get(explain))
        .route("/reload", post(reload))
        .route("/connections", get(connections))
        .route("/api/monitoring/ws", get(super::monitor::watch))
        .route("/topics/{topic}/groups/{group}", delete(delete_group))
        .merge(console::routes())
}

/// What there is here: for a terminal, unless a browser asks.
const INDEX: &str = "twinspan, for operators: /metrics /health /livez /readyz /routes /explain/{topic} /connections /api/monitoring/ws, POST /reload, DELETE /topics/{topic}/groups/{group}, and the console to a browser\n";

async fn index(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    if console::is_wanted(&headers) {
        return console::page(&app, &headers);
    }
    ([(header::VARY, "accept")], INDEX).into_response()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (kind, app.bridge.metrics.render()).into_response()
}

/// In the words of the health+json draft (draft-inadarei-api-health-check): pass, warn, fail.
async fn health(State(app): State<Arc<App>>) -> Response {
    let (ephemeral, durable) =
        tokio::join!(lane_check(&app, Lane::Ephemeral), lane_check(&app, Lane::Durable));
    let reload = app.reloader.last_reload();
    let groups: Vec<_> = app.bridge.groups.reports().into_iter().map(|(topic, group)| json!({
        "componentId": format!("{topic} {}", group.name), "componentType": "component", "status": "pass",
        "observedValue": group.backlog, "observedUnit": "messages", "unacked": group.unacked, "members": group.members,
    })).collect();
    let status = match (app.status(), reload.ok) {
        ("down", _) => "fail",
        ("ok", true) => "pass",
        _ => "warn",
    };
    let body = json!({
        "status": status,
        "version": env!("CARGO_PKG_VERSION"),
        "description": "twinspan, a dual-mode messaging fabric",
        "checks": {
            "ephemeral:lane": [ephemeral],
            "durable:lane": [durable],
            "uptime": [{
                "observedValue": app.started.elapsed().as_secs(), "observedUnit": "s", "status": "pass",
            }],
            "connections": [{"observedValue": app.roster.len(), "observedUnit": "connections", "status": "pass"}],
            "groups:backlog": groups,
            "config:reload": [{
                "status": if reload.ok { "pass" } else { "warn" }, "time": reload.at.to_string(),
                "output": reload.problems.join("\n"), "changes": reload.changes.to_string(),
            }],
        },
    });
    let code = if status == "fail" { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, [(header::CONTENT_TYPE, "application/health+json")], body.to_string()).into_response()
}

/// What the monitoring socket tells of a lane, and the draft's own words.
async fn lane_check(app: &App, lane: Lane) -> Value {
    let mut check = app.lane_report(lane);
    check["broker"] = app.broker_report(lane).await;
    for (name, value) in app.monitor.traffic(lane) {
        check[name] = value;
    }
    check["status"] = match app.bridge.canary.standing(lane) {
        Standing::Up => "pass",
        Standing::Degraded => "warn",
        Standing::Down => "fail",
    }
    .into();
    check["componentType"] = "component".into();
    check["componentId"] = app.backend(lane).into();
    check["time"] = Timestamp::now().to_string().into();
    check["observedValue"] = check["probe"]["last_ms"].as_f64().map(|millis| millis / 1000.0).into();
    check["observedUnit"] = "s".into();
    if let Some(why) = check["why"].as_str() {
        check["output"] = why.into();
    }
    check
}

async fn routes_in_force(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "routes": app.routes() }))
}

async fn explain(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Response, Fault> {
    let topic = Topic::parse(&name).map_err(refused_name)?;
    Ok(Json(app.explain(&topic)).into_response())
}

async fn reload(State(app): State<Arc<App>>) -> Response {
    let reloader = app.reloader.clone();
    // It reads a file.
    let Ok(reloaded) = tokio::task::spawn_blocking(move || reloader.reload()).await else {
        return Fault::new(Code::Internal, "the reload broke off; the routes in force stay as they are")
            .into_response();
    };
    match reloaded {
        Ok(summary) => Json(json!({"status": "ok", "changes": summary.to_string()})).into_response(),
        Err(problems) => {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            let message = format!("the routes in force stay as they are: {}", problems.join("; "));
            let error = json!({"error": {"code": "BAD_REQUEST", "message": message, "retryable": false},
                               "problems": problems});
            (StatusCode::BAD_REQUEST, Json(error)).into_response()
        }
    }
}

/// Deletes a group: its messages stay, what it had acknowledged is forgotten.
async fn delete_group(
    State(app): State<Arc<App>>,
    Path((name, group)): Path<(String, String)>,
) -> Result<StatusCode, Fault> {
    let topic = Topic::parse(&name).map_err(refused_name)?;
    match tokio::time::timeout(DELETE_TIMEOUT, app.bridge.delete_group(&topic, &group)).await {
        Ok(deleted) => deleted.map(|()| StatusCode::NO_CONTENT),
        Err(_) => Err(Fault::new(
            Code::OutcomeUnknown,
            format!("no answer within {DELETE_TIMEOUT:?}; the group may or may not be deleted"),
        )),
    }
}

async fn connections(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({ "connections": app.connections(usize::MAX) }))
}
