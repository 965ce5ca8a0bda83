//! Who we are to the broker, and whom we trust: the token and the TLS of `[lanes.durable]`.

use std::path::PathBuf;
use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::lane::settings::{DurableSettings, Secret, SecretError};

#[derive(Clone)]
pub struct Credentials {
    token: Option<Secret>,
    /// The roots of `tls.ca` in PEM, trusted besides the usual ones.
    pub roots: Option<Vec<u8>>,
    /// Our certificate and its key in PEM, one behind the other.
    pub identity: Option<Vec<u8>>,
    pub tls: TlsConnector,
}

impl Credentials {
    pub fn read(settings: &DurableSettings) -> Result<Self, String> {
        // The session and reqwest ask for the process's provider; a second call changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let read = |name: &str, path: &PathBuf| {
            std::fs::read(path).map_err(|error| {
                format!("cannot read lanes.durable.tls.{name} at {}: {error}", path.display())
            })
        };
        let tls = settings.tls.as_ref();
        let ca = tls.and_then(|tls| tls.ca.as_ref());
        let roots = ca.map(|path| read("ca", path)).transpose()?;
        let mut store = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let (Some(pem), Some(path)) = (&roots, ca) {
            let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
            let (added, _) = store.add_parsable_certificates(certificates.unwrap_or_default());
            if added == 0 {
                return Err(format!(
                    "lanes.durable.tls.ca at {} holds no certificate in PEM",
                    path.display()
                ));
            }
        }
        let config = ClientConfig::builder().with_root_certificates(store);
        let (config, identity) = match tls.map(|tls| (&tls.cert, &tls.key)) {
            None | Some((None, None)) => (config.with_no_client_auth(), None),
            Some((Some(cert), Some(key))) => {
                let unusable = |error: &dyn std::fmt::Display| {
                    let (cert, key) = (cert.display(), key.display());
                    format!("lanes.durable.tls.cert at {cert} and its key at {key} cannot be used: {error}")
                };
                let (mut pem, key_pem) = (read("cert", cert)?, read("key", key)?);
                let chain = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
                let chain = chain.map_err(|error| unusable(&error))?;
                let key = PrivateKeyDer::from_pem_slice(&key_pem).map_err(|error| unusable(&error))?;
                let config = config.with_client_auth_cert(chain, key).map_err(|error| unusable(&error))?;
                pem.push(b'\n');
                pem.extend(key_pem);
                (config, Some(pem))
            }
            Some((Some(_), None)) => return Err("lanes.durable.tls.cert needs lanes.durable.tls.key".into()),
            Some((None, Some(_))) => return Err("lanes.durable.tls.key needs lanes.durable.tls.cert".into()),
        };
        let tls = TlsConnector::from(Arc::new(config));
        let made = Self { token: settings.token.clone(), roots, identity, tls };
        made.token().map_err(|error| error.to_string())?;
        Ok(made)
    }

    /// The token as its file has it now: whoever rotates it restarts nothing.
    pub fn token(&self) -> Result<Option<String>, SecretError> {
        self.token.as_ref().map(Secret::read).transpose()
    }

    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }
}
