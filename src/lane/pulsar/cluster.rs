//! The brokers: which one serves a topic, and one connection to each.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pulsar::proto::command_lookup_topic_response::LookupType;
use tokio::time::Instant;

use super::address::Address;
use super::credentials::Credentials;
use super::fault::Fault;
use super::names::Physical;
use super::session::{self, Session};
use super::watcher::Watcher;

const REDIRECTS_MAX: usize = 20;
/// Java clients look for new partitions as often.
const PARTITIONS_FRESH: Duration = Duration::from_secs(60);
/// How many topics' partition counts are remembered; when it is full all are asked for again.
const PARTITIONS_KNOWN: usize = 10_000;

pub struct Cluster {
    /// Where to ask first; any of them knows the others.
    services: Vec<Address>,
    /// The service that answered last.
    current: AtomicUsize,
    credentials: Credentials,
    sessions: Mutex<HashMap<Address, Slot>>,
    partitions: Mutex<HashMap<Physical, (u32, Instant)>>,
    /// What the broker that was connected last takes at most.
    message_bytes_max: AtomicUsize,
    closed: AtomicBool,
}

/// Locked while connecting, so that all who need a broker wait for one connection, or hear of one failure.
type Slot = Arc<tokio::sync::Mutex<Broker>>;

#[derive(Default)]
struct Broker {
    session: Option<Arc<Session>>,
    failed: Option<(Instant, Fault)>,
}

impl Cluster {
    pub fn new(services: Vec<Address>, credentials: Credentials) -> Self {
        Self {
            services,
            current: AtomicUsize::new(0),
            credentials,
            sessions: Mutex::default(),
            partitions: Mutex::default(),
            message_bytes_max: AtomicUsize::new(session::MESSAGE_BYTES_MAX),
            closed: AtomicBool::new(false),
        }
    }

    /// A connection to the broker that serves a topic.
    pub async fn owner(&self, topic: &Physical) -> Result<Arc<Session>, Fault> {
        let (mut session, service) = self.service().await?;
        let mut authoritative = false;
        for _ in 0..REDIRECTS_MAX {
            let found = session.lookup(topic.as_str(), authoritative).await?;
            authoritative = found.authoritative();
            let url = if service.tls { found.broker_service_url_tls } else { found.broker_service_url };
            let url = url.ok_or_else(|| Fault::Lost(format!("no broker serves `{topic}` just now")))?;
            let mut address = Address::parse(&url)
                .ok_or_else(|| Fault::Lost(format!("the broker of `{topic}` calls itself `{url}`")))?;
            if found.proxy_through_service_url.unwrap_or_default() {
                let behind = format!("{}:{}", address.host, address.port);
                address = Address { behind: Some(behind), ..service.clone() };
            }
            session = self.session(&address).await?;
            if found.response != Some(LookupType::Redirect as i32) {
                return Ok(session);
            }
        }
        Err(Fault::Lost(format!("the brokers send each other the questions about `{topic}`")))
    }

    /// How many partitions a topic has; zero: it is not partitioned.
    pub async fn partitions(&self, topic: &Physical) -> Result<u32, Fault> {
        let known = {
            let known = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
            known.get(topic).copied()
        };
        if let Some((count, _)) = known.filter(|(_, asked)| asked.elapsed() < PARTITIONS_FRESH) {
            return Ok(count);
        }
        let asked = async { self.service().await?.0.partitions(topic.as_str()).await };
        let count = match (asked.await, known) {
            (Ok(count), _) => count,
            // Nobody takes partitions away, so what was known still serves.
            (Err(_), Some((count, _))) => return Ok(count),
            (Err(fault), None) => return Err(fault),
        };
        let mut known = self.partitions.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= PARTITIONS_KNOWN {
            known.clear();
        }
        known.insert(topic.clone(), (count, Instant::now()));
        Ok(count)
    }

    pub async fn topics(&self, namespace: &str) -> Result<Vec<String>, Fault> {
        let (session, _) = self.service().await?;
        session.topics(namespace).await
    }

    /// Any broker tells of the topics that appear on all of them.
    pub async fn watch(&self, namespace: &str, expression: &str) -> Result<Watcher, Fault> {
        let (session, _) = self.service().await?;
        Watcher::place(session, namespace, expression).await
    }

    /// A connection to any service that answers, the one that answered last before the others.
    async fn service(&self) -> Result<(Arc<Session>, Address), Fault> {
        let first = self.current.load(Ordering::Relaxed);
        let mut failed = Fault::Lost("lanes.durable.url is empty".into());
        for at in (0..self.services.len()).map(|turn| (first + turn) % self.services.len()) {
            let address = &self.services[at];
            match self.session(address).await {
                Ok(session) => {
                    self.current.store(at, Ordering::Relaxed);
                    return Ok((session, address.clone()));
                }
                Err(fault) => failed = fault,
            }
        }
        Err(failed)
    }

    async fn session(&self, address: &Address) -> Result<Arc<Session>, Fault> {
        let slot = {
            let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
            sessions.entry(address.clone()).or_default().clone()
        };
        let asked = Instant::now();
        let mut broker = slot.lock().await;
        if self.closed.load(Ordering::Relaxed) {
            return Err(Fault::Closed);
        }
        if let Some(session) = broker.session.as_ref().filter(|session| !session.is_lost()) {
            return Ok(session.clone());
        }
        if let Some((_, fault)) = broker.failed.as_ref().filter(|(at, _)| *at > asked) {
            return Err(fault.clone());
        }
        let connected = Session::connect(address, &self.credentials).await;
        if let Ok(session) = &connected {
            self.message_bytes_max.store(session.message_bytes_max, Ordering::Relaxed);
        }
        broker.session = connected.as_ref().ok().cloned();
        broker.failed = connected.as_ref().err().map(|fault| (Instant::now(), fault.clone()));
        connected
    }

    /// The largest entry that the brokers take, as far as is known.
    pub fn message_bytes_max(&self) -> usize {
        self.message_bytes_max.load(Ordering::Relaxed)
    }

    /// Ends every connection, and asks another service first from now on.
    pub fn turn(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
        self.disconnect();
    }

    /// Ends every connection for good; their users are told.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.disconnect();
    }

    fn disconnect(&self) {
        let slots: Vec<_> = self
            .sessions
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .drain()
            .map(|(_, slot)| slot)
            .collect();
        for slot in slots {
            // Whoever holds the slot is connecting; the session ends with its last user.
            if let Some(session) = slot.try_lock().ok().and_then(|mut broker| broker.session.take()) {
                session.close();
            }
        }
    }
}
