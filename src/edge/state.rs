//! What handlers share.

use std::ops::Deref;
use std::sync::Arc;

use async_trait::async_trait;
use metrics_exporter_prometheus::PrometheusHandle;

use crate::auth::Authenticator;
use crate::auth::dev::DevRealm;
use crate::auth::realm::Realms;
use crate::clock::{Clock, Random};
use crate::config::Config;
use crate::delivery::api::{Inbox, Sending};
use crate::delivery::hub::Hub;
use crate::directory::Directory;
use crate::edge::limits::RateLimits;
use crate::keys::KeyService;

/// Says whether the broker can do its work.
#[async_trait]
pub trait Health: Send + Sync + 'static {
    /// `Err` with what is not ready (log, projector), for an operator.
    async fn ready(&self) -> Result<(), String>;
}

/// The services that the edge is made of; put together by the composition root.
pub struct Parts {
    /// The validated configuration.
    pub config: Arc<Config>,
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
    /// For `/readyz`.
    pub health: Arc<dyn Health>,
    /// For `/metrics`.
    pub exporter: PrometheusHandle,
}

/// What handlers share; cheap to clone.
#[derive(Clone)]
pub struct EdgeState(Arc<Inner>);

/// [`Parts`], and what the edge makes of the configuration.
pub struct Inner {
    parts: Parts,
    /// Rate limits of requests.
    pub limits: RateLimits,
}

impl EdgeState {
    /// From its parts.
    pub fn new(parts: Parts) -> Self {
        let limits = RateLimits::new(&parts.config);
        Self(Arc::new(Inner { parts, limits }))
    }

    /// The rate limits of requests.
    pub fn rate_limits(&self) -> &RateLimits {
        &self.0.limits
    }
}

impl Deref for EdgeState {
    type Target = Parts;
    fn deref(&self) -> &Parts {
        &self.0.parts
    }
}
