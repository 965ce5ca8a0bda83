//! Spans, as OpenTelemetry's SDK takes them and a collector is sent them: OTLP over HTTP.
//!
//! ```text
//! spans that are over ──▶ queue of the SDK, bounded: what it has no room for is dropped ──▶ its thread
//!                                                          collector ◀── our HTTP client ◀─────┘
//! ```
//! Nothing waits for the collector. One that is away, slow or refuses costs spans and a warning a minute.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use opentelemetry::trace::{SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{Protocol, RetryPolicy, SpanExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::resource::{EnvResourceDetector, TelemetryResourceDetector};
use opentelemetry_sdk::trace::{BatchSpanProcessor, SpanData, SpanEvents, SpanLinks, SpanProcessor};
use tokio::runtime::Handle;
use tracing::warn;

use super::trace::{Kind, Span};

/// How long a collector may take over what it is sent.
const TIMEOUT: Duration = Duration::from_secs(10);
const WARN_EVERY: Duration = Duration::from_secs(60);

pub struct Exporter {
    processor: BatchSpanProcessor,
    scope: InstrumentationScope,
}

impl Exporter {
    pub fn open(otlp: &str) -> Result<Self, String> {
        let collector = Collector {
            url: format!("{}/v1/traces", otlp.trim_end_matches('/')),
            client: reqwest::Client::builder().timeout(TIMEOUT).build().map_err(|error| error.to_string())?,
            runtime: Handle::current(),
            warned: Mutex::default(),
        };
        let exporter = SpanExporter::builder()
            .with_http()
            .with_endpoint(&collector.url)
            .with_http_client(collector)
            .with_protocol(Protocol::HttpBinary)
            // What waits behind is the newer, and there is more of it.
            .with_retry_policy(RetryPolicy::disabled())
            .build()
            .map_err(|error| error.to_string())?;
        let mut processor = BatchSpanProcessor::builder(exporter).build();
        processor.set_resource(&resource());
        let scope = InstrumentationScope::builder("twinspan").with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Self { processor, scope })
    }

    pub fn send(&self, span: Span) {
        let mut attributes: Vec<_> =
            span.about.into_iter().map(|(key, value)| KeyValue::new(key, value)).collect();
        attributes.extend(span.failed.map(|code| KeyValue::new("error.type", code.as_str())));
        self.processor.on_end(SpanData {
            span_context: SpanContext::new(
                TraceId::from_bytes(span.own.trace),
                SpanId::from_bytes(span.own.span),
                TraceFlags::SAMPLED,
                false,
                TraceState::NONE,
            ),
            parent_span_id: SpanId::from_bytes(span.parent.span),
            // What a publisher began.
            parent_span_is_remote: matches!(span.kind, Kind::Server | Kind::Consumer),
            span_kind: match span.kind {
                Kind::Server => SpanKind::Server,
                Kind::Client => SpanKind::Client,
                Kind::Consumer => SpanKind::Consumer,
                Kind::Internal => SpanKind::Internal,
            },
            name: span.name.into(),
            start_time: span.from,
            end_time: span.to,
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: span.failed.map_or(Status::Unset, |code| Status::error(code.as_str())),
            instrumentation_scope: self.scope.clone(),
        });
    }

    pub async fn close(self: Arc<Self>, within: Duration) {
        // It waits for its thread, which waits for the runtime that this must not hold up.
        let closing = tokio::task::spawn_blocking(move || self.processor.shutdown_with_timeout(within));
        if !matches!(closing.await, Ok(Ok(()))) {
            warn!("The collector has not taken the last spans.");
        }
    }
}

/// Who we are: what the variables of OpenTelemetry say, else ourselves.
fn resource() -> Resource {
    let ours = [("service.name", "twinspan"), ("service.version", env!("CARGO_PKG_VERSION"))];
    let resource = Resource::builder_empty()
        .with_attributes(ours.map(|(key, value)| KeyValue::new(key, value)))
        .with_detector(Box::new(TelemetryResourceDetector))
        .with_detector(Box::new(EnvResourceDetector::new()));
    match std::env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => resource.with_service_name(name).build(),
        _ => resource.build(),
    }
}

/// The way to the collector. The SDK's own would block a thread of the runtime, or bring another.
#[derive(Debug)]
struct Collector {
    url: String,
    client: reqwest::Client,
    runtime: Handle,
    warned: Mutex<Option<Instant>>,
}

impl Collector {
    /// The SDK would say so with every batch.
    fn warn(&self, why: &str) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if warned.is_none_or(|at| at.elapsed() >= WARN_EVERY) {
            *warned = Some(Instant::now());
            warn!(url = self.url, why, "The collector does not take spans; they are lost.");
        }
    }
}

#[async_trait]
impl HttpClient for Collector {
    /// Called on the SDK's thread, which belongs to no runtime.
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (client, request) = (self.client.clone(), request.try_into()?);
        let sending = async move { client.execute(request).await };
        let answer = match self.runtime.spawn(sending).await? {
            Ok(answer) => answer,
            Err(error) => {
                self.warn(&format!("{:#}", anyhow::Error::new(error.without_url())));
                return Err("the collector cannot be reached".into());
            }
        };
        if !answer.status().is_success() {
            self.warn(&format!("it answers {}", answer.status()));
        }
        // What it says of a batch that it took is not read, however long it is.
        Ok(Response::builder().status(answer.status()).body(Bytes::new())?)
    }
}
