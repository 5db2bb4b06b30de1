//! What handlers share.

use std::ops::Deref;
use std::sync::Arc;

use async_trait::async_trait;
use axum::extract::FromRef;

use crate::auth::Authenticator;
use crate::auth::dev::DevRealm;
use crate::auth::realm::Realms;
use crate::clock::{Clock, Random};
use crate::config::Config;
use crate::delivery::api::{Inbox, Sending};
use crate::delivery::hub::Hub;
use crate::directory::Directory;
use crate::edge::limits::RateLimits;
use crate::edge::operations::Operations;
use crate::keys::KeyService;

/// Says whether the broker can do its work.
#[async_trait]
pub trait Health: Send + Sync + 'static {
    /// `Err` with what is not ready (log, projector), for an operator.
    async fn ready(&self) -> Result<(), String>;
}

/// The services that the edge is made of; put together by the composition root.
pub struct Parts {
    /// Wall-clock time.
    pub clock: Arc<dyn Clock>,
    /// For credentials.
    pub random: Arc<dyn Random>,
    /// Checks device credentials.
    pub auth: Authenticator,
    /// Checks realm tokens.
    pub realms: Arc<Realms>,
    /// Signs development tokens; only in development mode.
    pub dev: Option<Arc<DevRealm>>,
    /// Accounts and devices.
    pub directory: Arc<Directory>,
    /// Public keys.
    pub keys: Arc<KeyService>,
    /// Takes messages.
    pub sending: Arc<dyn Sending>,
    /// Reads inboxes without a stream.
    pub inbox: Arc<dyn Inbox>,
    /// Streams.
    pub hub: Arc<Hub>,
    /// The public key of the server's voice in groups.
    pub group_sender: Option<[u8; 32]>,
    /// What every process of a broker shows its operators.
    pub operations: Operations,
}

/// What handlers share; cheap to clone.
#[derive(Clone)]
pub struct EdgeState(Arc<Parts>);

impl EdgeState {
    /// From its parts.
    pub fn new(parts: Parts) -> Self {
        Self(Arc::new(parts))
    }

    /// The validated configuration.
    pub fn config(&self) -> &Config {
        self.operations.config()
    }

    /// The rate limits of requests.
    pub fn rate_limits(&self) -> &RateLimits {
        self.operations.rate_limits()
    }
}

impl FromRef<EdgeState> for Operations {
    fn from_ref(state: &EdgeState) -> Self {
        state.operations.clone()
    }
}

impl Deref for EdgeState {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.0
    }
}
