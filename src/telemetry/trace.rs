//! Where the time of one message went, told to an OpenTelemetry collector.
//!
//! ```text
//! the publisher's span ──┬──▶ publish ──┬──▶ read      of a message whose traceparent says that its trace is recorded
//!                        │              ├──▶ route
//!                        │              └──▶ broker
//!                        └──▶ fan-out ─────▶ write     for each client that it is written to, on whichever bridge
//! ```
//! What it costs is the publisher's choice, message by message; any other message costs a look at its headers. The
//! stages are those of the metric `twinspan_stage_seconds`. They are known as instants, so a span is made once it is
//! over, and nothing is kept anywhere while a message is under way.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::{Deserialize, Serialize};

use super::metrics::Stage;
#[cfg(feature = "otel")]
use super::otlp::Exporter;
use crate::message::{Envelope, Headers, Lane, Lanes, MessageId, TraceParent};
use crate::topic::{Pattern, Topic};
use crate::wire::code::Code;
use crate::wire::verbs::Status;

/// How long the end of the process may wait for the collector to take the last spans.
const CLOSING: Duration = Duration::from_secs(2);

/// Why `otlp` is refused, where this build cannot do it.
pub const NOT_BUILT: Option<&str> = if cfg!(feature = "otel") {
    None
} else {
    Some("this build has no OTLP export: build it with --features otel")
};

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TraceSettings {
    /// The collector, by OTLP over HTTP; absent: nothing is exported.
    pub otlp: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("spans cannot be exported to {otlp}: {why}")]
pub struct TraceError {
    pub otlp: String,
    pub why: String,
}

/// When the frame of a publish came.
#[derive(Debug, Clone, Copy, Default)]
pub struct Came {
    /// Where somebody may want to know.
    pub at: Option<Instant>,
    /// One of those that are timed though nobody traces them.
    pub is_sample: bool,
}

impl Came {
    pub fn now() -> Self {
        Self { at: Some(Instant::now()), is_sample: false }
    }

    /// Of the messages of a frame the first is the sample.
    pub fn take(&mut self) -> Self {
        Self { at: self.at, is_sample: std::mem::take(&mut self.is_sample) }
    }
}

/// A publish that is traced.
#[derive(Debug, Clone)]
pub struct Publish {
    /// The publisher's own span.
    pub parent: TraceParent,
    pub topic: Topic,
    /// Of the route, where there is one.
    pub way: Option<(Pattern, Lanes)>,
    pub id: Option<MessageId>,
    pub heard: Option<Instant>,
    pub decoded: Instant,
    /// Where it came so far that its lane was given it.
    pub handed: Option<Instant>,
}

/// An event that is traced and was written to one client now.
#[derive(Debug)]
pub struct Delivery<'a> {
    pub envelope: &'a Envelope,
    pub pattern: &'a Pattern,
    /// Whom it was for: the connection, and the group that it is a member of.
    pub connection: u64,
    pub group: Option<&'a str>,
    pub brought: Instant,
    /// Since when it had its place among what waits for the client.
    pub waiting: Instant,
}

/// Some of a message's way, once it is over.
#[derive(Debug)]
pub struct Span {
    pub own: TraceParent,
    pub parent: TraceParent,
    pub name: &'static str,
    pub kind: Kind,
    pub from: SystemTime,
    pub to: SystemTime,
    pub about: Vec<(&'static str, String)>,
    pub failed: Option<Code>,
}

/// Who asked whom, in the words of OpenTelemetry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A client asked us.
    Server,
    /// We asked a lane.
    Client,
    /// Somebody gets what a publisher sent.
    Consumer,
    /// Neither: a part of ours.
    Internal,
}

/// Tells a collector of what is traced. Without a collector each call is over at once. Cheap to clone.
#[derive(Clone, Default)]
pub struct Tracer {
    exporter: Option<Arc<Exporter>>,
    /// What carries each lane.
    systems: [&'static str; Lane::ALL.len()],
}

impl Tracer {
    /// To be called on the runtime that is to carry what is exported.
    pub fn open(
        settings: &TraceSettings,
        systems: [&'static str; Lane::ALL.len()],
    ) -> Result<Self, TraceError> {
        let open = |otlp: &String| {
            let failed = |why| TraceError { otlp: otlp.clone(), why };
            Exporter::open(otlp).map(Arc::new).map_err(failed)
        };
        Ok(Self { exporter: settings.otlp.as_ref().map(open).transpose()?, systems })
    }

    pub fn is_on(&self) -> bool {
        self.exporter.is_some()
    }

    /// The publisher's span, where its trace is recorded and there is somebody to tell.
    pub fn parent(&self, headers: &Headers) -> Option<TraceParent> {
        self.exporter.as_ref().and_then(|_| TraceParent::sampled(headers))
    }

    /// It is known now what became of a publish.
    pub fn published(&self, publish: Publish, became: Result<Status, Code>) {
        let Some(exporter) = &self.exporter else { return };
        let Publish { parent, topic, way, id, heard, decoded, handed } = publish;
        let failed = became.err();
        let (own, done, at) = (parent.another(), Instant::now(), wall());
        let mut about = about("publish", "send", &topic, id);
        if let Some((pattern, lanes)) = way {
            // Where both carry, storage is what the publisher waits for.
            let lane = if lanes.takes(Lane::Durable) { Lane::Durable } else { Lane::Ephemeral };
            about.extend(self.way(&pattern, lanes, lane));
        }
        about.extend(became.ok().map(|status| ("twinspan.status", status.as_str().to_owned())));
        let stage = |stage: Stage, from, to, failed| Span {
            own: own.another(),
            parent: own,
            name: stage.as_str(),
            kind: Kind::Internal,
            from: at(from),
            to: at(to),
            about: Vec::new(),
            failed,
        };
        if let Some(heard) = heard {
            exporter.send(stage(Stage::Read, heard, decoded, None));
        }
        // What no lane was given was refused on the way to it, or stored before.
        exporter.send(stage(
            Stage::Route,
            decoded,
            handed.unwrap_or(done),
            failed.filter(|_| handed.is_none()),
        ));
        if let Some(handed) = handed {
            let broker = stage(Stage::Broker, handed, done, failed);
            exporter.send(Span { kind: Kind::Client, about: about.clone(), ..broker });
        }
        let (name, kind) = ("publish", Kind::Server);
        let (from, to) = (at(heard.unwrap_or(decoded)), at(done));
        exporter.send(Span { own, parent, name, kind, from, to, about, failed });
    }

    /// An event was written to a client now.
    pub fn delivered(&self, delivery: Delivery<'_>) {
        let Delivery { envelope, pattern, connection, group, brought, waiting } = delivery;
        let (Some(exporter), Some(parent)) = (&self.exporter, envelope.trace) else { return };
        let (own, done, at) = (parent.another(), Instant::now(), wall());
        let mut about = about("deliver", "process", &envelope.topic, envelope.message.id);
        about.extend(self.way(pattern, envelope.lanes(), envelope.lane));
        about.push(("twinspan.connection", connection.to_string()));
        about.extend(group.map(|group| ("messaging.consumer.group.name", group.to_owned())));
        exporter.send(Span {
            own: own.another(),
            parent: own,
            name: Stage::Write.as_str(),
            kind: Kind::Internal,
            from: at(waiting),
            to: at(done),
            about: Vec::new(),
            failed: None,
        });
        let (name, kind) = (Stage::FanOut.as_str(), Kind::Consumer);
        let (from, to) = (at(brought), at(done));
        exporter.send(Span { own, parent, name, kind, from, to, about, failed: None });
    }

    /// Waits until the collector has the last of it, though not for long. What comes behind is dropped.
    pub async fn close(&self) {
        if let Some(exporter) = &self.exporter {
            exporter.clone().close(CLOSING).await;
        }
    }

    fn way(&self, pattern: &Pattern, lanes: Lanes, lane: Lane) -> [(&'static str, String); 3] {
        [
            ("messaging.system", self.systems[lane as usize].to_owned()),
            ("messaging.destination.template", pattern.to_string()),
            ("twinspan.lane", lanes.to_string()),
        ]
    }
}

/// Tells what the clock said at an instant. One for the spans of a message, or they would not fit into each other.
fn wall() -> impl Fn(Instant) -> SystemTime {
    let (now, wall) = (Instant::now(), SystemTime::now());
    move |instant| wall.checked_sub(now.saturating_duration_since(instant)).unwrap_or(wall)
}

/// By the messaging conventions of OpenTelemetry. Traces are few, so a topic may stand in them, as in no metric.
fn about(name: &str, kind: &str, topic: &Topic, id: Option<MessageId>) -> Vec<(&'static str, String)> {
    let mut about = vec![
        ("messaging.operation.name", name.to_owned()),
        ("messaging.operation.type", kind.to_owned()),
        ("messaging.destination.name", topic.to_string()),
    ];
    about.extend(id.map(|id| ("messaging.message.id", id.to_string())));
    about
}

/// In a build that cannot export there is none.
#[cfg(not(feature = "otel"))]
enum Exporter {}

#[cfg(not(feature = "otel"))]
impl Exporter {
    fn open(_: &str) -> Result<Self, String> {
        Err(NOT_BUILT.unwrap_or_default().into())
    }

    fn send(&self, _: Span) {
        match *self {}
    }

    async fn close(self: Arc<Self>, _: Duration) {
        match *self {}
    }
}
