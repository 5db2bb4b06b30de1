//! How a CQL store is opened, and why it could not be.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use scylla::client::execution_profile::ExecutionProfile;
use scylla::client::session::{Session, TlsContext};
use scylla::client::session_builder::SessionBuilder;
use scylla::errors::{ConnectionError, ConnectionPoolError, ConnectionSetupRequestErrorKind, DbError, MetadataError, NewSessionError};
use scylla::statement::{Consistency, SerialConsistency};
use zeroize::Zeroizing;

use crate::clock::{Clock, SystemClock};
use crate::limits;

/// How a [`super::CqlStore`] is opened.
#[derive(Clone)]
pub struct CqlOptions {
    /// `host:port`, several with commas. One that answers is enough to find the others.
    pub hosts: String,
    /// The keyspace of what is rebuilt from the log.
    pub keyspace: String,
    /// The keyspace of what is not.
    pub state_keyspace: String,
    /// User name and password, where the cluster asks for them.
    pub user: Option<(String, Zeroizing<String>)>,
    /// Encrypts connections.
    pub tls: Option<CqlTls>,
    /// For the days of pending items.
    pub clock: Arc<dyn Clock>,
}

/// TLS to the cluster.
#[derive(Debug, Clone)]
pub struct CqlTls {
    /// The authorities to trust (PEM).
    pub ca_file: PathBuf,
}

/// Why a CQL store could not be opened, and what to do. There is never a fallback.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CqlOpenError {
    /// No host answered. A retry can help.
    #[error(
        "no CQL server answers at {hosts} ({reason}); check the addresses, that the servers run and may be reached from here, and whether \
         they want TLS"
    )]
    Unreachable {
        /// Where.
        hosts: String,
        /// What the driver says.
        reason: String,
    },
    /// A host answered, and TLS with it failed. A retry can't help.
    #[error(
        "TLS with the CQL servers at {hosts} failed ({reason}); check the authority's certificate file, and that each server's certificate \
         names its IP address"
    )]
    Tls {
        /// Where.
        hosts: String,
        /// What is wrong with the certificate or the connection.
        reason: String,
    },
    /// The servers refuse who we say we are. A retry can't help.
    #[error("the CQL servers at {hosts} refuse the credentials ({reason}); check user name and password")]
    Authentication {
        /// Where.
        hosts: String,
        /// What the servers say.
        reason: String,
    },
    /// A file can't be used. A retry can't help.
    #[error("{path}: {problem}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The keyspace is not there, or older than this binary.
    #[error("the keyspace `{keyspace}` {problem}; run `sealpost migrate` with the same --cql")]
    Schema {
        /// Which.
        keyspace: String,
        /// What is wrong.
        problem: String,
    },
    /// The view was made beside a state that is in another keyspace than the configured one.
    #[error(
        "the state of the keyspace `{keyspace}` (prekeys, at-rest keys) is in `{state}`, not in `{asked}`: set cql.state_keyspace = \"{state}\""
    )]
    State {
        /// The view.
        keyspace: String,
        /// Where its state is.
        state: String,
        /// What the configuration says.
        asked: String,
    },
    /// The cluster refused a statement of ours.
    #[error("the CQL cluster refuses what it is asked: {0}")]
    Refused(String),
}

impl CqlOptions {
    /// With the defaults, on these hosts.
    pub fn new(hosts: impl Into<String>, keyspace: impl Into<String>) -> Self {
        let keyspace = keyspace.into();
        Self { hosts: hosts.into(), state_keyspace: keyspace.clone(), keyspace, user: None, tls: None, clock: Arc::new(SystemClock) }
    }

    pub(super) async fn connect(&self) -> Result<Session, CqlOpenError> {
        let profile = ExecutionProfile::builder()
            .consistency(Consistency::LocalQuorum)
            .serial_consistency(Some(SerialConsistency::LocalSerial))
            .request_timeout(Some(Duration::from_millis(limits::CQL_REQUEST_MS)))
            .build();
        let mut builder = SessionBuilder::new()
            .known_nodes(self.hosts.split(',').map(str::trim).filter(|host| !host.is_empty()))
            .default_execution_profile_handle(profile.into_handle())
            .connection_timeout(Duration::from_millis(limits::CQL_CONNECT_MS))
            .driver_config_reporting(false);
        if let Some((name, password)) = &self.user {
            builder = builder.user(name, password.as_str());
        }
        if let Some(tls) = &self.tls {
            builder = builder.tls_context(Some(tls.context()?));
        }
        let unreachable = |reason: String| CqlOpenError::Unreachable { hosts: self.hosts.clone(), reason };
        let patience = Duration::from_millis(limits::CQL_OPEN_MS);
        match tokio::time::timeout(patience, builder.build()).await {
            Ok(Ok(session)) => Ok(session),
            Ok(Err(NewSessionError::FailedToResolveAnyHostname(names))) => {
                Err(unreachable(format!("none of these names is known: {}", names.join(", "))))
            }
            Ok(Err(error)) => Err(self.refused(&error)),
            Err(_) => Err(unreachable(format!("nothing within {} s", patience.as_secs()))),
        }
    }
}

impl CqlOptions {
    /// What a driver's failure to open means to whoever configured it.
    fn refused(&self, error: &NewSessionError) -> CqlOpenError {
        let (hosts, whole) = (self.hosts.clone(), error.to_string());
        let NewSessionError::MetadataError(MetadataError::ConnectionPoolError(ConnectionPoolError::Broken { last_connection_error })) =
            error
        else {
            return CqlOpenError::Unreachable { hosts, reason: whole };
        };
        match last_connection_error {
            ConnectionError::IoError(error) => match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                Some(tls) => CqlOpenError::Tls { hosts, reason: tls.to_string() },
                None => CqlOpenError::Unreachable { hosts, reason: error.to_string() },
            },
            ConnectionError::ConnectionSetupRequestError(setup) => match &setup.error {
                ConnectionSetupRequestErrorKind::DbError(DbError::AuthenticationError, reason) => {
                    CqlOpenError::Authentication { hosts, reason: reason.clone() }
                }
                ConnectionSetupRequestErrorKind::MissingAuthentication => {
                    CqlOpenError::Authentication { hosts, reason: "they want a user name and a password".to_owned() }
                }
                _ => CqlOpenError::Unreachable { hosts, reason: setup.to_string() },
            },
            other => CqlOpenError::Unreachable { hosts, reason: other.to_string() },
        }
    }
}

impl CqlTls {
    fn context(&self) -> Result<TlsContext, CqlOpenError> {
        let path = &self.ca_file;
        let wrong = |problem: String| CqlOpenError::File { path: path.clone(), problem };
        let mut roots = rustls::RootCertStore::empty();
        let found: Vec<_> = CertificateDer::pem_file_iter(path)
            .and_then(Iterator::collect)
            .map_err(|error| wrong(format!("not a PEM certificate: {error}")))?;
        for certificate in found {
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
        }
        if roots.is_empty() {
            return Err(wrong("holds no certificate".to_owned()));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| CqlOpenError::Refused(error.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(TlsContext::from(Arc::new(config)))
    }
}
