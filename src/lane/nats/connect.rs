//! From settings to a client that connects, and reconnects for ever.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_nats::rustls::pki_types::pem::PemObject;
use async_nats::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use async_nats::rustls::{ClientConfig, RootCertStore, crypto::ring};
use async_nats::{Client, ConnectOptions, ServerAddr};
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

use super::events::Events;
use crate::lane::settings::{EphemeralSettings, SecretError, Tls};

/// How many commands may wait for the connection. It is no buffer for outages: what is in here when a server freezes
/// is lost or late.
const COMMANDS_MAX: usize = 128;
/// How many messages may wait for one subscription's task, which never waits itself. Full: the newest is dropped,
/// counted, and told to all ears.
const MESSAGES_MAX: usize = 1 << 14;
/// The client library gives a connection up after three of these without an answer.
const PING_INTERVAL: Duration = Duration::from_secs(1);
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);
const RECONNECT_DELAY_MIN: Duration = Duration::from_millis(50);
const RECONNECT_DELAY_MAX: Duration = Duration::from_secs(1);

/// Why the lane cannot even try.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("lanes.ephemeral has no url: name a server, such as nats://127.0.0.1:4222")]
    NoServer,
    // The URL itself is not shown: it may hold a password.
    #[error("url number {number} of lanes.ephemeral cannot be used: {reason}")]
    Url { number: usize, reason: String },
    #[error("a credential of lanes.ephemeral cannot be read")]
    Secret(#[from] SecretError),
    #[error("lanes.ephemeral has a user and no password")]
    NoPassword,
    #[error("the credentials file {} of lanes.ephemeral cannot be used", path.display())]
    Credentials { path: PathBuf, source: std::io::Error },
    #[error("lanes.ephemeral.tls: {}: {reason}", path.display())]
    Pem { path: PathBuf, reason: String },
    #[error("lanes.ephemeral.tls: {0}")]
    Tls(String),
    #[error("the thread of the NATS connection cannot be started")]
    Thread(#[source] std::io::Error),
    #[error("the NATS client cannot be made: {0}")]
    Client(String),
}

pub fn servers(urls: &[String]) -> Result<Vec<ServerAddr>, OpenError> {
    let servers = urls.iter().enumerate().map(|(at, url)| {
        let unusable = |reason: String| OpenError::Url { number: at + 1, reason };
        let server: ServerAddr = url.parse().map_err(|error: std::io::Error| unusable(error.to_string()))?;
        if server.is_websocket() {
            return Err(unusable("a bridge speaks to NATS over nats:// or tls://".into()));
        }
        if server.has_user_pass() {
            // The client library would ignore them.
            return Err(unusable(
                "user and password have settings of their own: user, password, token".into(),
            ));
        }
        Ok(server)
    });
    let servers = servers.collect::<Result<Vec<_>, _>>()?;
    if servers.is_empty() { Err(OpenError::NoServer) } else { Ok(servers) }
}

pub fn options(settings: &EphemeralSettings) -> Result<ConnectOptions, OpenError> {
    let mut options = ConnectOptions::new()
        .name("twinspan")
        .client_capacity(COMMANDS_MAX)
        .subscription_capacity(MESSAGES_MAX)
        .ping_interval(PING_INTERVAL)
        .connection_timeout(CONNECT_DEADLINE)
        .reconnect_delay_callback(delay)
        .retry_on_initial_connect()
        // Ours always, also without `tls`: a server may ask for it, and left to itself the client library panics
        // where a process has two providers of cryptography.
        .tls_client_config(tls(settings.tls.as_ref())?)
        .require_tls(settings.tls.is_some());
    if let Some(path) = &settings.credentials {
        let unusable = |source| OpenError::Credentials { path: path.clone(), source };
        let text = std::fs::read_to_string(path).map_err(unusable)?;
        options = options.credentials(&text).map_err(unusable)?;
    }
    if let Some(token) = &settings.token {
        options = options.token(token.read()?);
    }
    if let Some(user) = &settings.user {
        let password = settings.password.as_ref().ok_or(OpenError::NoPassword)?;
        options = options.user_and_password(user.clone(), password.read()?);
    }
    Ok(options)
}

/// A thread for the connection, until `stop`: it takes the client library's attempts to connect along, which have no
/// other end.
///
/// The connection's own tasks take turns on it in the order in which they were woken. So when the second of two echoes
/// is back, what the server complained about before the first one has been told: see `claim`. And a busy bridge does
/// not look like a silent server.
pub fn thread(stop: CancellationToken) -> std::io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new().name("nats".into()).spawn(move || {
        runtime.block_on(stop.cancelled());
        // Not waiting for a name server that may be silent.
        runtime.shutdown_background();
    })?;
    Ok(handle)
}

/// The client comes at once and connects in the background.
pub async fn connect(
    servers: Vec<ServerAddr>,
    options: ConnectOptions,
    events: Arc<Events>,
) -> Result<Client, async_nats::ConnectError> {
    let pool = events.clone();
    options
        .event_callback(move |event| {
            events.handle(event);
            std::future::ready(())
        })
        // Asked before each attempt; the choice of the server is left to the client library.
        .reconnect_to_server_callback(move |servers, _| {
            pool.state.unreachable(&servers);
            std::future::ready(None)
        })
        .connect(servers)
        .await
}

/// Twice as long with each attempt, half of it by chance, so that bridges do not come back in step.
fn delay(attempts: usize) -> Duration {
    let doublings = attempts.saturating_sub(1).min(10) as u32;
    let longest = (RECONNECT_DELAY_MIN * 2u32.pow(doublings)).clamp(RECONNECT_DELAY_MIN, RECONNECT_DELAY_MAX);
    longest.mul_f64(fastrand::f64().midpoint(1.0))
}

fn tls(tls: Option<&Tls>) -> Result<ClientConfig, OpenError> {
    let mut roots = RootCertStore::empty();
    // A machine without roots of its own can still trust `ca`.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if let Some(path) = tls.and_then(|tls| tls.ca.as_ref()) {
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(|error| unreadable(path, error))?;
        }
    }
    let refused = |error: async_nats::rustls::Error| OpenError::Tls(error.to_string());
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(refused)?
        .with_root_certificates(roots);
    match tls.map(|tls| (&tls.cert, &tls.key)) {
        Some((Some(cert), Some(key))) => {
            let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, error))?;
            builder.with_client_auth_cert(certificates(cert)?, key).map_err(refused)
        }
        None | Some((None, None)) => Ok(builder.with_no_client_auth()),
        Some(_) => Err(OpenError::Tls("cert and key go together: give both or neither".into())),
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, OpenError> {
    let read = CertificateDer::pem_file_iter(path).and_then(|certificates| certificates.collect());
    let certificates: Vec<_> = read.map_err(|error| unreadable(path, error))?;
    if certificates.is_empty() {
        return Err(unreadable(path, "no certificate in it"));
    }
    Ok(certificates)
}

fn unreadable(path: &Path, reason: impl ToString) -> OpenError {
    OpenError::Pem { path: path.to_owned(), reason: reason.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_grows_to_a_second_and_never_busy_loops() {
        for attempts in 0..100 {
            let delay = delay(attempts);
            assert!(
                delay >= RECONNECT_DELAY_MIN / 2 && delay <= RECONNECT_DELAY_MAX,
                "{attempts}: {delay:?}"
            );
        }
        assert!(delay(100) >= RECONNECT_DELAY_MAX / 2);
    }

    #[test]
    fn a_url_that_cannot_be_used_is_refused_and_its_password_is_not_shown() {
        let refused = |url: &str| servers(&[url.to_owned()]).unwrap_err().to_string();
        assert!(refused("ws://localhost:80").contains("nats://"));
        for url in ["nats://me:sesame@localhost", "http://me:sesame@localhost", "nats://me:sesame@[::"] {
            assert!(!refused(url).contains("sesame"), "{}", refused(url));
        }
        assert!(matches!(servers(&[]), Err(OpenError::NoServer)));
        assert_eq!(servers(&["localhost".into(), "tls://b:1".into()]).unwrap().len(), 2);
    }

    #[test]
    fn a_credential_that_cannot_be_read_is_named_with_its_place() {
        use crate::lane::settings::{EphemeralBackend, Secret};
        let none = EphemeralSettings {
            backend: EphemeralBackend::Nats,
            url: vec!["localhost".into()],
            monitor_url: String::new(),
            history_bytes: 0,
            token: None,
            user: None,
            password: None,
            credentials: None,
            tls: None,
        };
        assert!(options(&none).is_ok());
        let nothing = PathBuf::from("/nowhere/bridge.creds");
        let refused = options(&EphemeralSettings { credentials: Some(nothing.clone()), ..none.clone() });
        assert!(refused.unwrap_err().to_string().contains("/nowhere/bridge.creds"));
        let refused = options(&EphemeralSettings { token: Some(Secret::File(nothing)), ..none.clone() });
        assert!(matches!(refused, Err(OpenError::Secret(_))));
        let refused = options(&EphemeralSettings { user: Some("me".into()), ..none });
        assert!(matches!(refused, Err(OpenError::NoPassword)));
    }
}
