//! Pulsar's admin API over HTTP, for the few things that its binary protocol has no words for.

use std::time::Duration;

use reqwest::{Certificate, Client, Identity, Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};

use super::credentials::Credentials;
use super::names::Physical;
use crate::lane::contract::LaneError;
use crate::message::{Place, Timestamp};

const TIMEOUT: Duration = Duration::from_secs(5);

pub struct Admin {
    base: Url,
    client: Client,
    credentials: Credentials,
}

#[derive(Deserialize)]
struct Stats {
    #[serde(default)]
    subscriptions: std::collections::HashMap<String, SubscriptionStats>,
}

/// How a subscription stands.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SubscriptionStats {
    /// What is not wholly acknowledged.
    #[serde(rename = "msgBacklog")]
    pub entries: u64,
    #[serde(rename = "backlogSize")]
    pub bytes: i64,
    /// Messages that consumers have; counted where they share.
    #[serde(rename = "unackedMessages")]
    pub unacked: u64,
    /// The type of its consumers, or of its last ones.
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(deserialize_with = "count")]
    pub consumers: usize,
    pub durable: bool,
    /// Entries that will be delivered again; none where the broker is too old to say.
    #[serde(rename = "msgInReplay")]
    pub again: Option<u64>,
    /// Entries whose time has not come.
    #[serde(rename = "msgDelayed")]
    pub delayed: u64,
    /// In milliseconds; none where it is not positive.
    #[serde(rename = "earliestMsgPublishTimeInBacklog")]
    pub oldest: i64,
}

impl Default for SubscriptionStats {
    fn default() -> Self {
        Self {
            entries: 0,
            bytes: 0,
            unacked: 0,
            kind: String::new(),
            consumers: 0,
            durable: true,
            again: None,
            delayed: 0,
            oldest: 0,
        }
    }
}

fn count<'de, D: serde::Deserializer<'de>>(list: D) -> Result<usize, D::Error> {
    Vec::<serde::de::IgnoredAny>::deserialize(list).map(|list| list.len())
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct InternalStats {
    last_confirmed_entry: String,
    cursors: std::collections::HashMap<String, CursorStats>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct CursorStats {
    read_position: String,
    waiting_read_op: bool,
}

/// What the broker found when it looked through a backlog, up to a bound of its own.
#[derive(Deserialize)]
pub struct Analyzed {
    pub entries: u64,
    pub messages: u64,
    /// There are others that were not looked at.
    #[serde(rename = "aborted", default)]
    pub is_part: bool,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct MessageIdJson {
    ledger_id: i64,
    entry_id: i64,
}

impl Admin {
    pub fn new(url: &str, credentials: Credentials) -> Result<Self, String> {
        let unusable =
            |why: &dyn std::fmt::Display| format!("lanes.durable.admin_url `{url}` is unusable: {why}");
        let base = Url::parse(url).map_err(|error| unusable(&error))?;
        if base.cannot_be_a_base() || !matches!(base.scheme(), "http" | "https") {
            return Err(unusable(&"it is not an http or https URL"));
        }
        let mut builder = Client::builder().timeout(TIMEOUT).connect_timeout(TIMEOUT / 2);
        if let Some(pem) = &credentials.roots {
            let roots = Certificate::from_pem_bundle(pem).map_err(|error| unusable(&error))?;
            builder = roots.into_iter().fold(builder, |builder, root| builder.add_root_certificate(root));
        }
        if let Some(pem) = &credentials.identity {
            builder = builder.identity(Identity::from_pem(pem).map_err(|error| unusable(&error))?);
        }
        let client = builder.build().map_err(|error| unusable(&error))?;
        Ok(Self { base, client, credentials })
    }

    /// Where the `n`-th newest entry of a partition is, 1 the newest; `None` where it holds fewer.
    pub async fn examine(&self, topic: &Physical, n: u32) -> Result<Option<Place>, LaneError> {
        let mut url = self.topic(topic, &["examinemessage"])?;
        url.query_pairs_mut()
            .append_pair("initialPosition", "latest")
            .append_pair("messagePosition", &n.to_string());
        let response = self.send(Method::GET, url, |request| request).await?;
        match response.status() {
            StatusCode::PRECONDITION_FAILED | StatusCode::NOT_FOUND => return Ok(None),
            // How the broker says that it counted past the beginning ("code: -14").
            StatusCode::INTERNAL_SERVER_ERROR => return Ok(None),
            _ => {}
        }
        let response = succeeded(response).await?;
        let id = response.headers().get("x-pulsar-message-id").and_then(|id| id.to_str().ok());
        let mut parts = id.unwrap_or_default().split(':').map(str::parse);
        match (parts.next(), parts.next()) {
            (Some(Ok(ledger)), Some(Ok(entry))) => Ok(Some(Place { ledger, entry, index: 0 })),
            _ => Err(LaneError::Internal("the broker examined a message and did not say where it is".into())),
        }
    }

    /// Creates a topic without partitions. `false`: it was there.
    pub async fn create(&self, topic: &Physical) -> Result<bool, LaneError> {
        let response = self.send(Method::PUT, self.topic(topic, &[])?, |request| request).await?;
        created(response).await
    }

    /// How each subscription of a topic stands; none where there is no such topic.
    pub async fn subscriptions(
        &self,
        topic: &Physical,
    ) -> Result<std::collections::HashMap<String, SubscriptionStats>, LaneError> {
        let mut url = self.topic(topic, &["stats"])?;
        url.query_pairs_mut()
            .append_pair("getPreciseBacklog", "true")
            .append_pair("subscriptionBacklogSize", "true")
            .append_pair("getEarliestTimeInBacklog", "true")
            .append_pair("excludePublishers", "true");
        let response = self.send(Method::GET, url, |request| request).await?;
        if response.status() == StatusCode::NOT_FOUND {
            return Ok(Default::default());
        }
        let stats: Stats = succeeded(response).await?.json().await.map_err(lost)?;
        Ok(stats.subscriptions)
    }

    /// Whether a subscription has read its topic to the end, and waits there for more.
    pub async fn waits_at_the_end(&self, topic: &Physical, name: &str) -> Result<bool, LaneError> {
        let url = self.topic(topic, &["internalStats"])?;
        let response = self.send(Method::GET, url, |request| request).await?;
        let stats: InternalStats = succeeded(response).await?.json().await.map_err(lost)?;
        let Some(cursor) = stats.cursors.get(name) else { return Ok(false) };
        // An open transaction has it wait before the end.
        let (reads, last) = (place(&cursor.read_position), place(&stats.last_confirmed_entry));
        Ok(cursor.waiting_read_op && reads.zip(last).is_some_and(|(reads, last)| reads > last))
    }

    /// Looks through the backlog of a subscription, from its oldest entry up to a bound of the broker's: it reads all of it,
    /// so this is for what is not large.
    pub async fn analyze(&self, topic: &Physical, name: &str) -> Result<Analyzed, LaneError> {
        let url = self.topic(topic, &["subscription", name, "analyzeBacklog"])?;
        let response = self.send(Method::POST, url, |request| request.json(&Value::Null)).await?;
        succeeded(response).await?.json().await.map_err(lost)
    }

    /// How many entries and messages were stored in a topic since its broker loaded it.
    pub async fn stored(&self, topic: &Physical) -> Result<Analyzed, LaneError> {
        let get = async |what| {
            let response = self.send(Method::GET, self.topic(topic, &[what])?, |request| request).await?;
            succeeded(response).await?.json::<Value>().await.map_err(lost)
        };
        let entries = get("internalStats").await?["entriesAddedCounter"].as_u64().unwrap_or_default();
        let messages = get("stats").await?["msgInCounter"].as_u64().unwrap_or_default();
        Ok(Analyzed { entries, messages, is_part: true })
    }

    /// Deletes a subscription. `false`: there was none. One with consumers is `GroupBusy`.
    pub async fn delete_subscription(&self, topic: &Physical, name: &str) -> Result<bool, LaneError> {
        let url = self.topic(topic, &["subscription", name])?;
        let response = self.send(Method::DELETE, url, |request| request).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            StatusCode::PRECONDITION_FAILED | StatusCode::CONFLICT => {
                Err(LaneError::GroupBusy(format!("group `{name}` has members")))
            }
            _ => succeeded(response).await.map(|_| true),
        }
    }

    /// Creates a durable subscription that begins with the oldest message. `false`: it was there.
    pub async fn create_subscription(&self, topic: &Physical, name: &str) -> Result<bool, LaneError> {
        let url = self.topic(topic, &["subscription", name])?;
        // -1:-1 is the earliest there is.
        let earliest = json!({ "ledgerId": -1, "entryId": -1, "partitionIndex": -1 });
        created(self.send(Method::PUT, url, |request| request.json(&earliest)).await?).await
    }

    /// Has a subscription go on with the message at a place, with the one after it (`true`), or with the oldest. Its
    /// consumers are closed: what they held is the broker's again. `false`: there is no such subscription.
    pub async fn move_subscription(
        &self,
        topic: &Physical,
        name: &str,
        to: Option<(Place, bool)>,
    ) -> Result<bool, LaneError> {
        let to = match to {
            Some((place, after)) => json!({
                "ledgerId": place.ledger,
                "entryId": place.entry,
                "partitionIndex": -1,
                "batchIndex": place.index,
                "excluded": after,
            }),
            None => json!({ "ledgerId": -1, "entryId": -1, "partitionIndex": -1, "batchIndex": -1 }),
        };
        let url = self.topic(topic, &["subscription", name, "resetcursor"])?;
        let response = self.send(Method::POST, url, |request| request.json(&to)).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(false),
            _ => succeeded(response).await.map(|_| true),
        }
    }

    /// What is said at a path below `/admin/v2`: null where nothing is set, `None` where there is no such thing.
    pub async fn get(&self, path: &[&str]) -> Result<Option<Value>, LaneError> {
        let url = self.url(path.iter().copied())?;
        let response = self.send(Method::GET, url, |request| request).await?;
        match response.status() {
            StatusCode::NOT_FOUND => Ok(None),
            StatusCode::NO_CONTENT => Ok(Some(Value::Null)),
            _ => {
                let body = succeeded(response).await?.bytes().await.map_err(lost)?;
                // The broker says by an empty body, too, that nothing is set.
                Ok(Some(serde_json::from_slice(&body).unwrap_or_default()))
            }
        }
    }

    /// The version of the broker that answers.
    pub async fn version(&self) -> Result<String, LaneError> {
        self.text(self.url(["brokers", "version"])?).await
    }

    /// The metrics of the broker that answers, as Prometheus reads them.
    pub async fn metrics(&self) -> Result<String, LaneError> {
        let mut url = self.base.clone();
        // Without the slash at its end it is a redirect.
        url.set_path("/metrics/");
        self.text(url).await
    }

    async fn text(&self, url: Url) -> Result<String, LaneError> {
        let response = self.send(Method::GET, url, |request| request).await?;
        succeeded(response).await?.text().await.map_err(lost)
    }

    /// The place of the first message that was published at a time or later; `None` where none was.
    pub async fn at_time(&self, topic: &Physical, time: Timestamp) -> Result<Option<Place>, LaneError> {
        let url = self.topic(topic, &["messageid", &time.as_millis().max(0).to_string()])?;
        let response = self.send(Method::GET, url, |request| request).await?;
        let id: MessageIdJson = succeeded(response).await?.json().await.map_err(lost)?;
        let place = (u64::try_from(id.ledger_id), u64::try_from(id.entry_id));
        Ok(match place {
            (Ok(ledger), Ok(entry)) => Some(Place { ledger, entry, index: 0 }),
            _ => None,
        })
    }

    /// `…/admin/v2/persistent/tenant/namespace/local/…`, each part encoded by itself.
    fn topic(&self, topic: &Physical, rest: &[&str]) -> Result<Url, LaneError> {
        let named = topic.namespace().split('/').chain([topic.local()]);
        self.url(["persistent"].into_iter().chain(named).chain(rest.iter().copied()))
    }

    fn url<'a>(&self, path: impl IntoIterator<Item = &'a str>) -> Result<Url, LaneError> {
        let mut url = self.base.clone();
        match url.path_segments_mut() {
            Ok(mut segments) => drop(segments.pop_if_empty().extend(["admin", "v2"]).extend(path)),
            // `new` has refused such a base.
            Err(()) => return Err(LaneError::Internal("the admin URL takes no path".into())),
        }
        Ok(url)
    }

    async fn send(
        &self,
        method: Method,
        url: Url,
        with: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, LaneError> {
        let mut request = with(self.client.request(method, url));
        let token = self.credentials.token().map_err(|error| LaneError::Unavailable(error.to_string()))?;
        if let Some(token) = token {
            request = request.bearer_auth(token);
        }
        request.send().await.map_err(lost)
    }
}

/// `ledger:entry`, where the entry before a ledger's first is -1.
fn place(said: &str) -> Option<(i64, i64)> {
    let (ledger, entry) = said.split_once(':')?;
    Some((ledger.parse().ok()?, entry.parse().ok()?))
}

async fn created(response: Response) -> Result<bool, LaneError> {
    match response.status() {
        StatusCode::CONFLICT => Ok(false),
        _ => succeeded(response).await.map(|_| true),
    }
}

async fn succeeded(response: Response) -> Result<Response, LaneError> {
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    let body: Value = response.json().await.unwrap_or_default();
    let reason =
        body["reason"].as_str().and_then(|reason| reason.lines().next()).unwrap_or("no reason given");
    let said = format!("Pulsar's admin API answered {status}: {reason}");
    Err(match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => LaneError::Forbidden(said),
        StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => LaneError::Unavailable(said),
        status if status.is_client_error() => LaneError::BadRequest(said),
        _ => LaneError::Internal(said),
    })
}

fn lost(error: reqwest::Error) -> LaneError {
    // The URL holds nothing secret, and the cause says more than "error sending request".
    let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}")).unwrap_or_default();
    LaneError::Unavailable(format!("Pulsar's admin API does not answer ({error}{cause})"))
}
