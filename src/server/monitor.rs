//! The monitoring socket: how the bridge is, every two seconds, and what happens, when it happens.
//!
//! ```text
//! app ──every 2 s──▶ the newest body ──at the watcher's own moment──┐
//! bridge, routes ──at once──▶ events, bounded ──────────────────────┴──▶ a watcher's socket
//! ```
//! A hundred watchers that are written to at once would hold up the messages of clients, so each has a moment of its own
//! within the two seconds. What is made because a lane went or came waits for no moment.
//!
//! A watcher that is slow finds the newest body when it gets round to it, and never a queue of old ones. One that missed
//! events gets a new snapshot, which holds the last of them.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{Notify, broadcast, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until, timeout};

use super::app::App;
use super::rest::standing;
use crate::bridge::Notice;
use crate::message::{Lane, Timestamp};
use crate::policy::LastReload;
use crate::telemetry::traffic::{Latency, Traffic};
use crate::topic::Topic;

const EVERY: Duration = Duration::from_secs(2);
/// Events that one watcher has not been told of. One that is further behind gets a snapshot.
const EVENTS_MAX: usize = 256;
/// How many of the last events a snapshot holds.
const EVENTS_KEPT: usize = 50;
const CONNECTIONS_MAX: usize = 100;
const TOPICS_MAX: usize = 200;
const GROUPS_MAX: usize = 200;
/// What is measured over an interval, of a lane.
const MEASURED: [&str; 6] =
    ["publish", "delivery", "in_per_second", "out_per_second", "errors_per_second", "dropped_per_second"];
/// A watcher that takes nothing for so long is gone.
const WRITE_TIMEOUT: Duration = Duration::from_secs(20);
/// What a watcher may say, which is nothing.
const FRAME_BYTES_MAX: usize = 1024;

pub struct Monitor {
    newest: watch::Sender<Arc<Newest>>,
    events: broadcast::Sender<Utf8Bytes>,
    recent: Mutex<VecDeque<Value>>,
    /// A body before its time: somebody begins to watch, or a lane went or came.
    wanted: Notify,
}

#[derive(Default)]
struct Newest {
    body: Map<String, Value>,
    /// The same as a frame.
    frame: Utf8Bytes,
    /// It was wanted before its time.
    at_once: bool,
}

/// What was seen before, to tell rates.
struct Sample {
    at: Instant,
    traffic: [Traffic; 2],
    /// Looked at while somebody watches.
    topics: Option<HashMap<Topic, u64>>,
}

impl Monitor {
    pub fn new() -> Self {
        Self {
            newest: watch::Sender::default(),
            events: broadcast::channel(EVENTS_MAX).0,
            recent: Mutex::default(),
            wanted: Notify::new(),
        }
    }

    /// What went over a lane in the last interval, as the socket has it.
    pub fn traffic(&self, lane: Lane) -> Map<String, Value> {
        let newest = self.newest.borrow();
        let lane = newest.body.get("lanes").and_then(|lanes| lanes[lane.as_str()].as_object());
        lane.into_iter().flatten().filter(|(name, _)| MEASURED.contains(&name.as_str())).map(own).collect()
    }

    /// Looks and listens, until the process ends.
    pub async fn run(app: Arc<App>) {
        let (bridge, monitor) = (&app.bridge, &app.monitor);
        let mut notices = bridge.notices();
        let mut created = bridge.catalog.created();
        let mut memberships = bridge.groups.memberships();
        let mut reloads = app.reloader.reloads();
        let mut ticks = interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut before = Sample::take(&app, false);
        loop {
            let event = tokio::select! {
                _ = ticks.tick() => {
                    before = monitor.look(&app, &before, false).await;
                    continue;
                }
                () = monitor.wanted.notified() => {
                    monitor.look(&app, &before, true).await;
                    // Nobody may find another in its place that is in no hurry.
                    ticks.reset();
                    continue;
                }
                Ok(()) = reloads.changed() => {
                    let LastReload { ok, changes, problems, .. } = reloads.borrow_and_update().clone();
                    json!({"type": "RouteReloaded", "ok": ok, "changes": changes.to_string(), "problems": problems})
                }
                // What was missed stands in the next body.
                notice = notices.recv() => match notice {
                    Ok(Notice::LaneDown { lane, message }) => {
                        monitor.wanted.notify_one();
                        json!({"type": "LaneDown", "lane": lane.as_str(), "message": message})
                    }
                    Ok(Notice::LaneUp { lane }) => {
                        monitor.wanted.notify_one();
                        json!({"type": "LaneUp", "lane": lane.as_str()})
                    }
                    Ok(Notice::TopicDeleted { topic }) => json!({"type": "TopicDeleted", "topic": topic.as_str()}),
                    Ok(Notice::RoutesChanged { .. } | Notice::Draining { .. }) | Err(RecvError::Lagged(_)) => continue,
                    Err(RecvError::Closed) => return,
                },
                Ok(topic) = created.recv() => {
                    let lane = bridge.policy.table().route_for(&topic).map(|route| route.lane.as_str());
                    json!({"type": "TopicCreated", "topic": topic.as_str(), "lane": lane})
                }
                Ok(changed) = memberships.recv() => {
                    let kind = if changed.joined { "GroupJoined" } else { "GroupLeft" };
                    json!({"type": kind, "topic": changed.topic.as_str(), "group": &*changed.group})
                }
            };
            monitor.tell(event);
        }
    }

    async fn look(&self, app: &App, before: &Sample, at_once: bool) -> Sample {
        let now = Sample::take(app, self.newest.receiver_count() > 0);
        let newest = Newest { at_once, ..Newest::make(app, before, &now).await };
        self.newest.send_replace(Arc::new(newest));
        now
    }

    fn tell(&self, mut event: Value) {
        event["ts"] = Timestamp::now().to_string().into();
        let frame = event.to_string().into();
        let mut recent = self.recent();
        if recent.len() == EVENTS_KEPT {
            recent.pop_front();
        }
        recent.push_back(event);
        // Nobody may be watching.
        let _ = self.events.send(frame);
    }

    /// All there is to know, for a watcher that begins.
    fn snapshot(&self, app: &App, newest: &Newest) -> Utf8Bytes {
        let mut body = newest.body.clone();
        body.insert("type".into(), "snapshot".into());
        body.insert("routes".into(), app.routes().into());
        body.insert("events".into(), self.recent().iter().cloned().collect());
        Value::Object(body).to_string().into()
    }

    fn recent(&self) -> MutexGuard<'_, VecDeque<Value>> {
        // Each use leaves it whole, so a panic elsewhere spoils nothing.
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Sample {
    fn take(app: &App, with_topics: bool) -> Self {
        let topics = with_topics.then(|| app.bridge.catalog.messages().into_iter().collect());
        let traffic = Lane::ALL.map(|lane| app.bridge.metrics.traffic(lane));
        Self { at: Instant::now(), traffic, topics }
    }
}

impl Newest {
    async fn make(app: &App, before: &Sample, now: &Sample) -> Self {
        let seconds = (now.at - before.at).as_secs_f64();
        let mut lanes = Map::new();
        for lane in Lane::ALL {
            let traffic = now.traffic[lane as usize].since(&before.traffic[lane as usize]);
            let mut about = app.lane_report(lane);
            // The brokers are left alone while nobody wants to know.
            about["broker"] = if now.topics.is_some() { app.broker_report(lane).await } else { Value::Null };
            let millis = |quantile, of: &Latency| of.quantile(quantile).map(|seconds| seconds * 1000.0);
            for (name, latency) in [("publish", &traffic.publish), ("delivery", &traffic.delivery)] {
                about[name] = json!({"p50_ms": millis(0.5, latency), "p99_ms": millis(0.99, latency)});
            }
            for (name, count) in [
                ("in_per_second", traffic.taken),
                ("out_per_second", traffic.written),
                ("errors_per_second", traffic.refused),
                ("dropped_per_second", traffic.dropped),
            ] {
                about[name] = rate(count, seconds);
            }
            lanes.insert(lane.to_string(), about);
        }
        let body = json!({
            "type": "metrics", "ts": Timestamp::now().to_string(), "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": app.started.elapsed().as_secs(), "status": app.status(),
            "listen": app.listen.to_string(), "lanes": lanes,
            "connections": {"count": app.roster.len(), "list": app.connections(CONNECTIONS_MAX)},
            "topics": topics(app, before, now, seconds), "groups": groups(app), "reload": app.reload_report(),
        });
        let frame = body.to_string().into();
        let Value::Object(body) = body else { return Self::default() };
        Self { body, frame, at_once: false }
    }
}

fn own((name, value): (&String, &Value)) -> (String, Value) {
    (name.clone(), value.clone())
}

fn rate(count: u64, seconds: f64) -> Value {
    if seconds > 0.0 { json!(count as f64 / seconds) } else { Value::Null }
}

/// Those that most went through since, then those that most ever did.
fn topics(app: &App, before: &Sample, now: &Sample, seconds: f64) -> Vec<Value> {
    let known = now.topics.iter().flatten().map(|(topic, messages)| {
        let then = before.topics.as_ref().map(|topics| topics.get(topic).copied().unwrap_or_default());
        (then.map(|then| messages.saturating_sub(then)), *messages, topic)
    });
    let mut known: Vec<_> = known.collect();
    known.sort_unstable_by(|one, other| (other.0, other.1, one.2).cmp(&(one.0, one.1, other.2)));
    let table = app.bridge.policy.table();
    let described = known.into_iter().take(TOPICS_MAX).filter_map(|(since, messages, topic)| {
        let route = table.route_for(topic)?;
        let subscribers = app.bridge.catalog.get(topic)?.subscribers;
        Some(json!({
            "name": topic.as_str(), "lane": route.lane.as_str(), "route": &*route.name, "messages": messages,
            "subscribers": subscribers, "in_per_second": since.map(|since| rate(since, seconds)),
        }))
    });
    described.collect()
}

fn groups(app: &App) -> Vec<Value> {
    let table = app.bridge.policy.table();
    let reports = app.bridge.groups.reports().into_iter().take(GROUPS_MAX);
    let described = reports.map(|(topic, group)| {
        let mut about = standing(&group);
        about["topic"] = topic.as_str().into();
        about["route"] = table.route_for(&topic).map(|route| &*route.name).into();
        about
    });
    described.collect()
}

pub async fn watch(State(app): State<Arc<App>>, headers: HeaderMap, upgrade: WebSocketUpgrade) -> Response {
    if !is_from_here(&headers) {
        return (StatusCode::FORBIDDEN, "this socket is for pages of this listener; nothing was opened\n")
            .into_response();
    }
    let upgrade = upgrade.max_message_size(FRAME_BYTES_MAX).max_frame_size(FRAME_BYTES_MAX);
    upgrade.on_upgrade(move |socket| async move {
        let stop = app.stop_admin.clone();
        // Whichever way it ends, the watcher finds out by its socket.
        let _ = stop.run_until_cancelled(serve(app, socket)).await;
    })
}

/// Any page of a browser may open a socket to anywhere; only ours may see what comes by this one.
fn is_from_here(headers: &HeaderMap) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let origin = origin.to_str().ok().and_then(|origin| origin.split_once("://"));
    matches!((origin, host), (Some((_, origin)), Some(host)) if origin.eq_ignore_ascii_case(host))
}

async fn serve(app: Arc<App>, mut socket: WebSocket) -> Option<()> {
    let mut newest = app.monitor.newest.subscribe();
    if app.monitor.newest.receiver_count() == 1 {
        // While nobody watched, less was looked at.
        app.monitor.wanted.notify_one();
        newest.changed().await.ok()?;
    }
    let mut events = app.monitor.events.subscribe();
    let mut frame = app.monitor.snapshot(&app, &newest.borrow_and_update().clone());
    let behind = EVERY.mul_f64(fastrand::f64());
    let mut due: Option<Instant> = None;
    loop {
        timeout(WRITE_TIMEOUT, socket.send(Message::Text(frame))).await.ok()?.ok()?;
        frame = loop {
            tokio::select! {
                biased;
                event = events.recv() => match event {
                    Ok(event) => break event,
                    Err(RecvError::Lagged(_)) => {
                        events = app.monitor.events.subscribe();
                        break app.monitor.snapshot(&app, &newest.borrow_and_update().clone());
                    }
                    Err(RecvError::Closed) => return None,
                },
                changed = newest.changed() => {
                    changed.ok()?;
                    let wait = if newest.borrow().at_once { Duration::ZERO } else { behind };
                    let at = Instant::now() + wait;
                    due = Some(due.map_or(at, |due| due.min(at)));
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    due = None;
                    break newest.borrow_and_update().frame.clone();
                }
                said = socket.recv() => match said {
                    Some(Ok(Message::Close(_))) | Some(Err(_)) | None => return Some(()),
                    Some(Ok(_)) => {}
                },
            }
        };
    }
}
