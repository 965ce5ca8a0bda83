//! One connection, typed: what a client says and what it hears, until it ends. It never comes again by itself.
//!
//! ```text
//! call ──frame with request_id──▶ socket        socket ──answer──▶ the call that waits for it
//!                                                      └─anything else──▶ next()
//! ```

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Map, Value, json};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{self, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

use crate::message::Draft;
use crate::wire::json::draft_value;
use crate::wire::json::heard::{Heard, HeardError};

/// How long a call waits for its answer: longer than any deadline of the server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Frames that nobody has taken yet; when it is full the socket is not read, and the server sees a slow client.
const UNTAKEN_MAX: usize = 1024;
/// Frames on their way to the socket; when it is full the caller waits.
const UNSENT_MAX: usize = 1024;

pub struct Client {
    sender: Sender,
    heard: mpsc::Receiver<Heard>,
    ended: Arc<Mutex<Option<ClientError>>>,
}

/// The half that speaks. Cheap to clone.
#[derive(Clone)]
pub struct Sender {
    frames: mpsc::Sender<Message>,
    waiting: Answers,
    last: Arc<AtomicU64>,
}

#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    #[error("cannot connect to {url}: {reason}")]
    Connect { url: String, reason: String },
    #[error("the server closed the connection with {code}: {reason}")]
    Closed { code: u16, reason: String },
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("{}: {}", .0.code, .0.message)]
    Refused(HeardError),
    #[error("no answer within {0:?}; what was asked may or may not have been done")]
    NoAnswer(Duration),
}

impl Client {
    /// Connects to `ws://…/ws` or `wss://…/ws`.
    pub async fn connect(url: &str) -> Result<Self, ClientError> {
        let failed = |reason: String| ClientError::Connect { url: url.to_owned(), reason };
        let request = url.into_client_request().map_err(|error| failed(error.to_string()))?;
        let config = WebSocketConfig::default().read_buffer_size(16 * 1024);
        let (socket, _) = connect_async_with_config(request, Some(config), true)
            .await
            .map_err(|error| failed(error.to_string()))?;
        let (frames, unsent) = mpsc::channel(UNSENT_MAX);
        let (heard_in, heard) = mpsc::channel(UNTAKEN_MAX);
        let sender = Sender { frames, waiting: Arc::default(), last: Arc::default() };
        let ended = Arc::new(Mutex::new(None));
        let connection =
            Connection { waiting: sender.waiting.clone(), heard: heard_in, ended: ended.clone() };
        tokio::spawn(connection.run(socket, unsent));
        Ok(Self { sender, heard, ended })
    }

    pub fn sender(&self) -> Sender {
        self.sender.clone()
    }

    /// The next frame that answers no call: events, gaps, infos, errors. An error once the connection has ended.
    pub async fn next(&mut self) -> Result<Heard, ClientError> {
        match self.heard.recv().await {
            Some(heard) => Ok(heard),
            None => Err(self.ending()),
        }
    }

    fn ending(&self) -> ClientError {
        let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.clone().unwrap_or_else(|| ClientError::Broken("closed by this side".into()))
    }
}

impl std::ops::Deref for Client {
    type Target = Sender;

    fn deref(&self) -> &Sender {
        &self.sender
    }
}

impl Sender {
    /// Publishes one message; returns its acknowledgement.
    pub async fn publish(&self, topic: &str, draft: &Draft) -> Result<Heard, ClientError> {
        self.publish_in_line(topic, draft).await?.await
    }

    /// Returns once the message has its place behind what was sent before; the future is its acknowledgement.
    pub async fn publish_in_line(
        &self,
        topic: &str,
        draft: &Draft,
    ) -> Result<impl Future<Output = Result<Heard, ClientError>> + Send + use<>, ClientError> {
        self.ask("publish", with_message(json!({ "topic": topic }), draft)).await
    }

    /// Subscribes; `options` are the fields of the frame besides `topic`.
    pub async fn subscribe(&self, topic: &str, options: Value) -> Result<Heard, ClientError> {
        self.call("subscribe", fields(json!({ "topic": topic }), options)).await
    }

    pub async fn unsubscribe(&self, topic: &str, group: Option<&str>) -> Result<Heard, ClientError> {
        self.call("unsubscribe", fields(json!({ "topic": topic }), json!({ "group": group }))).await
    }

    /// The first reply.
    pub async fn request(&self, topic: &str, draft: &Draft, timeout: Duration) -> Result<Heard, ClientError> {
        let asked = json!({ "topic": topic, "timeout_ms": timeout.as_millis() as u64 });
        self.call("request", with_message(asked, draft)).await
    }

    /// Replies to an event that carries `reply_to`. A refusal comes as an error frame.
    pub async fn reply(&self, reply_to: &str, draft: &Draft) -> Result<(), ClientError> {
        let mut frame = with_message(json!({ "reply_to": reply_to }), draft);
        frame.insert(0, ("type".into(), json!("reply").to_string()));
        self.send(text(&frame)).await
    }

    pub async fn ack(&self, deliveries: &[u64]) -> Result<Heard, ClientError> {
        self.call("ack", fields(json!({ "deliveries": deliveries }), json!({}))).await
    }

    pub async fn nack(&self, deliveries: &[u64], delay: Duration) -> Result<Heard, ClientError> {
        let asked = json!({ "deliveries": deliveries, "delay_ms": delay.as_millis() as u64 });
        self.call("nack", fields(asked, json!({}))).await
    }

    pub async fn ping(&self) -> Result<Heard, ClientError> {
        self.call("ping", Vec::new()).await
    }

    /// Sends a frame as it is.
    pub async fn send(&self, frame: impl Into<String>) -> Result<(), ClientError> {
        let sent = self.frames.send(Message::text(frame.into())).await;
        sent.map_err(|_| ClientError::Broken("the connection has ended".into()))
    }

    async fn call(&self, kind: &str, frame: Fields) -> Result<Heard, ClientError> {
        self.ask(kind, frame).await?.await
    }

    /// Returns once the frame has its place behind what was sent before; the future is its answer.
    pub(super) async fn ask(
        &self,
        kind: &str,
        mut frame: Fields,
    ) -> Result<impl Future<Output = Result<Heard, ClientError>> + Send + use<>, ClientError> {
        let id = format!("c{}", self.last.fetch_add(1, Ordering::Relaxed) + 1);
        frame.insert(0, ("type".into(), json!(kind).to_string()));
        frame.insert(1, ("request_id".into(), json!(id).to_string()));
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { id: id.clone(), all: self.waiting.clone() };
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).insert(id, answer);
        self.send(text(&frame)).await?;
        Ok(async move {
            let _waiting = waiting;
            let heard = tokio::time::timeout(ANSWER_TIMEOUT, answered).await;
            let heard = heard.map_err(|_| ClientError::NoAnswer(ANSWER_TIMEOUT))?;
            let heard = heard.map_err(|_| ClientError::Broken("the connection has ended".into()))?;
            match heard.error {
                Some(error) => Err(ClientError::Refused(error)),
                None => Ok(heard),
            }
        })
    }
}

type Answers = Arc<Mutex<HashMap<String, oneshot::Sender<Heard>>>>;

/// Forgets a call that nobody waits for any more.
struct Waiting {
    id: String,
    all: Answers,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

/// A frame's fields, each value as JSON text: a payload keeps the very bytes it has.
pub type Fields = Vec<(String, String)>;

pub fn fields(own: Value, options: Value) -> Fields {
    let object = |value| match value {
        Value::Object(map) => map,
        _ => Map::new(),
    };
    let all = object(own).into_iter().chain(object(options)).filter(|(_, value)| !value.is_null());
    all.map(|(name, value)| (name, value.to_string())).collect()
}

pub fn with_message(own: Value, draft: &Draft) -> Fields {
    let mut frame = fields(own, json!({}));
    frame.push(("message".into(), String::from_utf8_lossy(&draft_value(draft)).into_owned()));
    frame
}

pub fn with_messages<'a>(own: Value, drafts: impl IntoIterator<Item = &'a Draft>) -> Fields {
    let mut frame = fields(own, json!({}));
    let drafts = drafts.into_iter().map(|draft| String::from_utf8_lossy(&draft_value(draft)).into_owned());
    frame.push(("messages".into(), format!("[{}]", drafts.collect::<Vec<_>>().join(","))));
    frame
}

fn text(frame: &Fields) -> String {
    let fields: Vec<_> = frame.iter().map(|(name, value)| format!("{}:{value}", json!(name))).collect();
    format!("{{{}}}", fields.join(","))
}

/// The task that owns the socket.
struct Connection {
    waiting: Answers,
    heard: mpsc::Sender<Heard>,
    ended: Arc<Mutex<Option<ClientError>>>,
}

impl Connection {
    async fn run(
        self,
        socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
        mut unsent: mpsc::Receiver<Message>,
    ) {
        let (mut sink, mut stream) = socket.split();
        let write = async {
            while let Some(frame) = unsent.recv().await {
                sink.feed(frame).await?;
                while let Ok(frame) = unsent.try_recv() {
                    sink.feed(frame).await?;
                }
                sink.flush().await?;
            }
            sink.close().await
        };
        let read = async {
            while let Some(message) = stream.next().await {
                match message? {
                    Message::Text(text) => self.hear(&text).await,
                    Message::Close(frame) => return Ok(frame),
                    _ => {}
                }
            }
            Ok::<_, tungstenite::Error>(None)
        };
        let ended = tokio::select! {
            Err(error) = write => ClientError::Broken(error.to_string()),
            read = read => match read {
                Ok(Some(frame)) => ClientError::Closed { code: frame.code.into(), reason: frame.reason.to_string() },
                Ok(None) => ClientError::Broken("the server hung up".into()),
                Err(error) => ClientError::Broken(error.to_string()),
            },
        };
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    async fn hear(&self, text: &str) {
        // A frame that this build cannot read is of a type it does not know.
        let Ok(heard) = Heard::parse(text) else { return };
        let call = heard
            .request_id
            .as_ref()
            .and_then(|id| self.waiting.lock().unwrap_or_else(PoisonError::into_inner).remove(id));
        match call {
            // The caller may have stopped waiting.
            Some(call) => _ = call.send(heard),
            None => _ = self.heard.send(heard).await,
        }
    }
}
