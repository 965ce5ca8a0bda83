//! Who we are to the broker, and whom we trust: the token and the TLS of `[lanes.durable]`.

use std::sync::Arc;

use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::{ClientConfig, RootCertStore};

use crate::lane::settings::{DurableSettings, Secret, SecretError};

#[derive(Clone)]
pub struct Credentials {
    token: Option<Secret>,
    /// The roots of `tls.ca` in PEM, trusted besides the usual ones.
    pub roots: Option<Vec<u8>>,
    pub tls: TlsConnector,
}

impl Credentials {
    pub fn read(settings: &DurableSettings) -> Result<Self, String> {
        // The session and reqwest ask for the process's provider; a second call changes nothing.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let ca = settings.tls.as_ref().and_then(|tls| tls.ca.as_ref());
        let roots = ca
            .map(|path| {
                std::fs::read(path).map_err(|error| {
                    format!("cannot read lanes.durable.tls.ca at {}: {error}", path.display())
                })
            })
            .transpose()?;
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
        let config = ClientConfig::builder().with_root_certificates(store).with_no_client_auth();
        let made = Self { token: settings.token.clone(), roots, tls: TlsConnector::from(Arc::new(config)) };
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
