//! HTTP for clients: topics, publish, request, messages, and how the bridge is.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::BytesRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json};

use super::app::App;
use crate::bridge::catalog::Known;
use crate::bridge::fault;
use crate::lane::contract::{GroupReport, Publisher};
use crate::message::{Draft, Envelope, GroupMode, Headers, Lane, Start, Timestamp};
use crate::policy::table::Route;
use crate::telemetry::trace::Came;
use crate::topic::{Pattern, Topic};
use crate::wire;
use crate::wire::code::{Code, Fault};
use crate::wire::json::{error_value, refused_name};
use crate::wire::verbs::{Codec, Event, REQUEST_TIMEOUT_DEFAULT, REQUEST_TIMEOUT_MAX};

const MESSAGES_DEFAULT: usize = 100;
const MESSAGES_MAX: usize = 1000;
/// How many topics' backlogs are asked for at the same time, and how long each may take.
const BACKLOGS_AT_ONCE: usize = 32;
const BACKLOG_TIMEOUT: Duration = Duration::from_secs(2);
/// How long reading stored messages may take.
const READ_TIMEOUT: Duration = Duration::from_secs(10);

pub fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/topics", get(list).post(create))
        .route("/topics/{topic}", get(show).delete(delete))
        .route("/topics/{topic}/messages", get(messages))
        .route("/publish/{topic}", post(publish))
        .route("/request/{topic}", post(request))
        .route("/livez", get(async || Json(json!({"status": "alive"}))))
        .route("/readyz", get(ready))
        .route("/health", get(health))
        .route("/stats", get(stats))
}

/// An error as HTTP has it.
pub fn refusal(fault: &Fault) -> Response {
    let mut body = b"{\"error\":".to_vec();
    body.extend(error_value(fault));
    body.push(b'}');
    let status = StatusCode::from_u16(fault.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, [(header::CONTENT_TYPE, "application/json")], body).into_response()
}

impl IntoResponse for Fault {
    fn into_response(self) -> Response {
        refusal(&self)
    }
}

fn topic(name: &str) -> Result<Topic, Fault> {
    Topic::parse(name).map_err(refused_name)
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

async fn create(State(app): State<Arc<App>>, body: Bytes) -> Result<Response, Fault> {
    let named: Named = serde_json::from_slice(&body)
        .map_err(|error| Fault::bad_request(format!("the body must be {{\"name\":\"…\"}}: {error}")))?;
    let topic = topic(&named.name)?;
    let lane = app.bridge.create(&topic).await?;
    let created = json!({"status": "created", "topic": topic.as_str(), "lane": lane.as_str()});
    Ok((StatusCode::CREATED, Json(created)).into_response())
}

async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let table = app.bridge.policy.table();
    let described = app.bridge.catalog.list().into_iter().filter_map(|known| {
        let route = table.route_for(&known.topic)?.clone();
        Some(described(&app, known, route, false))
    });
    let topics: Vec<_> = stream::iter(described).buffered(BACKLOGS_AT_ONCE).collect().await;
    Json(json!({ "topics": topics }))
}

async fn show(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, Fault> {
    let topic = topic(&name)?;
    let unknown = || Fault::new(Code::TopicNotFound, format!("topic `{topic}` is not known here"));
    let known = app.bridge.catalog.get(&topic).ok_or_else(unknown)?;
    let table = app.bridge.policy.table();
    let route = table.route_for(&topic).ok_or_else(unknown)?;
    Ok(Json(described(&app, known, route.clone(), true).await))
}

/// `in_full` tells of each group.
async fn described(app: &App, known: Known, route: Arc<Route>, in_full: bool) -> Value {
    let mut topic = json!({
        "name": known.topic.as_str(), "lane": route.lane.as_str(), "route": &*route.name,
        "messages": known.messages, "subscribers": known.subscribers,
    });
    if route.lane.takes(Lane::Durable) {
        let groups = app.bridge.durable.groups(&route, &known.topic);
        // Where its lane cannot say now the topic is there all the same.
        let groups = tokio::time::timeout(BACKLOG_TIMEOUT, groups).await.ok().and_then(Result::ok);
        topic["backlog"] =
            json!(groups.as_ref().map(|groups| groups.iter().map(|group| group.backlog).max().unwrap_or(0)));
        if in_full {
            topic["groups"] = json!(groups.map(|groups| groups.iter().map(standing).collect::<Vec<_>>()));
        }
    }
    topic
}

/// How a group stands, wherever it is told.
pub fn standing(group: &GroupReport) -> Value {
    json!({
        "group": group.name, "mode": group.mode.map(GroupMode::as_str), "members": group.members,
        "backlog": group.backlog, "unacked": group.unacked,
        "oldest_age_ms": group.oldest.map(|oldest| oldest.age().as_millis() as u64),
    })
}

async fn delete(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<StatusCode, Fault> {
    app.bridge.delete(&topic(&name)?)?;
    Ok(StatusCode::NO_CONTENT)
}

#[derive(Deserialize)]
struct Wanted {
    from: Option<String>,
    limit: Option<usize>,
}

async fn messages(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    Query(wanted): Query<Wanted>,
) -> Result<Response, Fault> {
    let topic = topic(&name)?;
    app.bridge.may_subscribe(&topic.clone().into())?;
    let limit = wanted.limit.unwrap_or(MESSAGES_DEFAULT).min(MESSAGES_MAX);
    let start = match wanted.from.as_deref() {
        None | Some("earliest") => Start::Earliest,
        Some("latest") => Start::Latest,
        Some(text) => match (text.parse(), text.parse::<Timestamp>()) {
            (Ok(position), _) => Start::After(position),
            (_, Ok(time)) => Start::Time(time),
            _ => return Err(Fault::bad_request("from is earliest, latest, a position, or an RFC 3339 time")),
        },
    };
    let table = app.bridge.policy.table();
    let is_stored = table.route_for(&topic).is_some_and(|route| route.lane.takes(Lane::Durable));
    let (frames, next) = match (is_stored, start) {
        (true, start) => stored(&app, &topic, start, limit).await?,
        (_, Start::After(_)) => {
            return Err(Fault::new(
                Code::LaneMismatch,
                format!("`{topic}` is ephemeral and has no positions"),
            ));
        }
        (_, start) => (recent(&app, &topic, start, limit).await?, None),
    };
    let mut body = b"{\"messages\":[".to_vec();
    for (at, frame) in frames.iter().enumerate() {
        if at > 0 {
            body.push(b',');
        }
        body.extend_from_slice(frame);
    }
    body.extend_from_slice(b"],\"next\":");
    body.extend_from_slice(json!(next).to_string().as_bytes());
    body.push(b'}');
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}

/// Stored messages as events, and the position to go on from.
async fn stored(
    app: &App,
    topic: &Topic,
    start: Start,
    limit: usize,
) -> Result<(Vec<Bytes>, Option<String>), Fault> {
    let mut next = match &start {
        Start::After(position) => Some(position.to_string()),
        _ => None,
    };
    let table = app.bridge.policy.table();
    let Some(route) = table.route_for(topic) else { return Ok((Vec::new(), next)) };
    let mut frames = Vec::new();
    if start == Start::Latest || limit == 0 {
        return Ok((frames, next));
    }
    let reading = async {
        let mut reader = app.bridge.durable.read(route, topic, start).await?;
        while frames.len() < limit {
            let Some(batch) = reader.next().await? else { break };
            for read in batch.into_iter().take(limit - frames.len()) {
                let event = match read {
                    Ok(envelope) => {
                        next = envelope.stored.as_ref().map(|stored| stored.position.to_string());
                        envelope.is_of(route.lane);
                        Event::Live(envelope)
                    }
                    Err(error) => Event::Error { request_id: None, fault: fault(error) },
                };
                frames.push(wire::json::Json.encode(&event, Timestamp::now()));
            }
        }
        Ok(())
    };
    match tokio::time::timeout(READ_TIMEOUT, reading).await {
        Ok(read) => read.map_err(fault)?,
        // What was read by then is a page like any other; nothing at all is an error.
        Err(_) if frames.is_empty() => {
            return Err(Fault::new(
                Code::Timeout,
                format!("reading `{topic}` took longer than {READ_TIMEOUT:?}"),
            ));
        }
        Err(_) => {}
    }
    Ok((frames, next))
}

/// What this bridge remembers of an ephemeral topic, as events.
async fn recent(app: &App, topic: &Topic, start: Start, limit: usize) -> Result<Vec<Bytes>, Fault> {
    let last = if start == Start::Latest { 0 } else { usize::MAX };
    let pattern: Pattern = topic.clone().into();
    let listening = app.bridge.listen(&pattern, None, last, Arc::new(Deaf)).await?;
    let since = |envelope: &Envelope| !matches!(start, Start::Time(time) if envelope.message.ts < time);
    let history = listening.history.iter().filter(|(_, envelope)| since(envelope)).take(limit);
    let now = Timestamp::now();
    Ok(history.map(|(_, envelope)| wire::json::Json.encode(&Event::Live(envelope.clone()), now)).collect())
}

/// Wants the history alone.
struct Deaf;

impl crate::lane::contract::Ear for Deaf {
    fn hear(&self, _: &Arc<Route>, _: &Arc<Envelope>) {}
    fn missed(&self) {}
}

async fn publish(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Fault> {
    let heard = Came::now();
    let topic = topic(&name)?;
    let draft = draft(&app, &headers, body)?;
    let published = app.bridge.publish(&topic, draft, Publisher::default(), heard).await?.known().await?;
    let ack = wire::verbs::Ack {
        status: published.status,
        topic: Some(topic.into()),
        lane: Some(published.lane),
        message_id: published.id,
        position: published.position,
        ts: published.ts,
        ..Default::default()
    };
    let body = wire::json::Json.encode(&Event::Ack(ack.into()), published.ts);
    let code = match published.status {
        wire::verbs::Status::Ok | wire::verbs::Status::Duplicate => StatusCode::OK,
        wire::verbs::Status::Spooled => StatusCode::ACCEPTED,
    };
    Ok((code, [(header::CONTENT_TYPE, "application/json")], body).into_response())
}

#[derive(Deserialize)]
struct Patience {
    timeout_ms: Option<u64>,
}

async fn request(
    State(app): State<Arc<App>>,
    Path(name): Path<String>,
    Query(patience): Query<Patience>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Fault> {
    let topic = topic(&name)?;
    let timeout = patience.timeout_ms.map_or(REQUEST_TIMEOUT_DEFAULT, Duration::from_millis);
    if timeout.is_zero() || timeout > REQUEST_TIMEOUT_MAX {
        return Err(Fault::bad_request(format!(
            "timeout_ms must be 1 to {}",
            REQUEST_TIMEOUT_MAX.as_millis()
        )));
    }
    let reply = app.bridge.request(&topic, draft(&app, &headers, body)?, timeout).await?;
    let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(&reply.payload).is_ok();
    let kind = if is_json { "application/json" } else { "application/octet-stream" };
    Ok(([(header::CONTENT_TYPE, kind)], Body::from(reply.payload)).into_response())
}

/// The body is the payload; an id, a key and a delay may stand in headers, so that a publish whose outcome is unknown can be
/// repeated, and the trace goes along.
fn draft(app: &App, headers: &HeaderMap, body: Result<Bytes, BytesRejection>) -> Result<Draft, Fault> {
    let max = app.session.max_message;
    let payload = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Fault::new(Code::TooLarge, format!("the body is larger than {max} bytes; nothing was sent"))
        }
        _ => Fault::bad_request(format!("{rejection}; nothing was sent")),
    })?;
    let text = |name: &str| {
        let value = headers.get(name).map(|value| value.to_str());
        value.transpose().map_err(|_| Fault::bad_request(format!("header {name} is not plain text")))
    };
    let id = text("twinspan-id")?.map(str::parse).transpose();
    let carried: Headers = ["traceparent", "tracestate"]
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), headers.get(name)?.to_str().ok()?.to_owned())))
        .collect();
    let delay = text("twinspan-delay-ms")?.map(|delay| delay.parse().map(Duration::from_millis)).transpose();
    Ok(Draft {
        id: id.map_err(|_| Fault::bad_request("header twinspan-id is not a UUID"))?,
        key: text("twinspan-key")?.map(str::to_owned),
        payload,
        headers: carried,
        delay: delay.map_err(|_| {
            Fault::bad_request("header twinspan-delay-ms is not a whole number of milliseconds")
        })?,
        ..Draft::default()
    })
}

pub async fn ready(State(app): State<Arc<App>>) -> Response {
    match app.unready() {
        None => Json(json!({"status": "ready"})).into_response(),
        Some(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "not ready", "reason": reason})))
                .into_response()
        }
    }
}

async fn health(State(app): State<Arc<App>>) -> Response {
    let lanes: serde_json::Map<_, _> = Lane::ALL
        .into_iter()
        .map(|lane| {
            let mut about =
                json!({"status": app.bridge.canary.standing(lane).as_str(), "backend": app.backend(lane)});
            if lane == Lane::Durable {
                about["outage"] = app.outage();
            }
            (lane.to_string(), about)
        })
        .collect();
    let subscribers: u64 = app.bridge.catalog.subscribers();
    let status = app.status();
    let body = json!({
        "status": status, "uptime_seconds": app.started.elapsed().as_secs(),
        "topics": app.bridge.catalog.len(), "subscribers": subscribers, "lanes": lanes,
    });
    let code = if status == "down" { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK };
    (code, Json(body)).into_response()
}

async fn stats(State(app): State<Arc<App>>) -> Json<Value> {
    let table = app.bridge.policy.table();
    let topics: serde_json::Map<_, _> = app
        .bridge
        .catalog
        .list()
        .into_iter()
        .filter_map(|known| {
            let lane = table.route_for(&known.topic)?.lane.as_str();
            let stats = json!({"messages": known.messages, "subscribers": known.subscribers, "lane": lane});
            Some((known.topic.to_string(), stats))
        })
        .collect();
    Json(json!({ "topics": topics }))
}
