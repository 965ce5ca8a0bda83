//! Commands that are newer than the crate's types: those by which a broker tells of topics as they appear.
//!
//! ```text
//! us ──watch──▶ broker      the names of a namespace's topics that fit an expression
//! us ◀─watching──
//! us ◀─changed───           again and again, until we unwatch or the connection ends
//! ```

/// What a `BaseCommand` is, with the fields that the crate's has not.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NewerCommand {
    #[prost(int32, required, tag = "1")]
    kind: i32,
    #[prost(message, optional, tag = "3")]
    pub connected: Option<Connected>,
    #[prost(message, optional, tag = "64")]
    pub watch: Option<Watch>,
    #[prost(message, optional, tag = "65")]
    pub watching: Option<Watching>,
    #[prost(message, optional, tag = "66")]
    pub changed: Option<Changed>,
    #[prost(message, optional, tag = "67")]
    pub unwatch: Option<Unwatch>,
}

const CONNECTED: i32 = 3;
const WATCH: i32 = 64;
const WATCHING: i32 = 65;
const CHANGED: i32 = 66;
const UNWATCH: i32 = 67;

/// The crate's type lacks the broker's features.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Connected {
    #[prost(int32, optional, tag = "3")]
    pub message_bytes_max: Option<i32>,
    #[prost(message, optional, tag = "4")]
    features: Option<Features>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Features {
    #[prost(bool, optional, tag = "4")]
    topic_watchers: Option<bool>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Watch {
    #[prost(uint64, required, tag = "1")]
    request_id: u64,
    #[prost(uint64, required, tag = "2")]
    watcher_id: u64,
    #[prost(string, required, tag = "3")]
    namespace: String,
    #[prost(string, required, tag = "4")]
    expression: String,
}

/// It also names the topics there are, which we ask for by themselves: the broker lists them before it begins to watch.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Watching {
    #[prost(uint64, required, tag = "1")]
    pub request_id: u64,
}

/// Names of topics, each partition by itself.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Changed {
    #[prost(uint64, required, tag = "1")]
    pub watcher_id: u64,
    #[prost(string, repeated, tag = "2")]
    pub appeared: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub deleted: Vec<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub struct Unwatch {
    #[prost(uint64, required, tag = "1")]
    request_id: u64,
    #[prost(uint64, required, tag = "2")]
    watcher_id: u64,
}

/// Whether a command of this type is read as one of these.
pub fn is_newer(kind: u8) -> bool {
    [CONNECTED, WATCHING, CHANGED].contains(&i32::from(kind))
}

impl NewerCommand {
    pub fn watch(request_id: u64, watcher_id: u64, namespace: &str, expression: &str) -> Self {
        let (namespace, expression) = (namespace.into(), expression.into());
        let watch = Watch { request_id, watcher_id, namespace, expression };
        Self { kind: WATCH, watch: Some(watch), ..Self::default() }
    }

    pub fn unwatch(request_id: u64, watcher_id: u64) -> Self {
        Self { kind: UNWATCH, unwatch: Some(Unwatch { request_id, watcher_id }), ..Self::default() }
    }
}

impl Connected {
    /// Whether the broker takes watchers. One that knows of none ends the connection over them.
    pub fn takes_watchers(&self) -> bool {
        self.features.as_ref().is_some_and(Features::topic_watchers)
    }
}
