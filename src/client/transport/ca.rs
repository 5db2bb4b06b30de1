//! Authorities of one's own.

use std::path::Path;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;

/// Not certificates. Retrying never helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a PEM file of certificates: {0}")]
pub struct InvalidCa(String);

/// The authorities that may vouch for a server, instead of the public ones: those of a company, or of a test.
#[derive(Clone)]
pub struct PrivateCa(Arc<rustls::ClientConfig>);

impl std::fmt::Debug for PrivateCa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PrivateCa(…)")
    }
}

impl PrivateCa {
    /// One or more certificates, PEM. A server's own self-signed certificate will do.
    pub fn from_pem(pem: &[u8]) -> Result<Self, InvalidCa> {
        let mut roots = rustls::RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| InvalidCa(error.to_string()))?;
            roots.add(certificate).map_err(|error| InvalidCa(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(InvalidCa("it holds none".to_owned()));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| InvalidCa(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self(Arc::new(config)))
    }

    /// The same from a file.
    pub fn from_file(path: &Path) -> Result<Self, InvalidCa> {
        let pem = std::fs::read(path).map_err(|error| InvalidCa(format!("{}: {error}", path.display())))?;
        Self::from_pem(&pem)
    }

    /// What TLS needs of it.
    pub fn config(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_no_certificate_is_refused() {
        for bad in ["", "certificate", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
            assert!(PrivateCa::from_pem(bad.as_bytes()).is_err(), "{bad}");
        }
        let error = PrivateCa::from_file(Path::new("/nowhere/ca.pem")).expect_err("no file").to_string();
        assert!(error.contains("/nowhere/ca.pem"), "{error}");
    }
}
