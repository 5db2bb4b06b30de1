//! What every process of a broker shows its operators, whatever role it plays.

use std::sync::Arc;

use metrics_exporter_prometheus::PrometheusHandle;

use crate::config::Config;
use crate::edge::limits::RateLimits;
use crate::edge::state::Health;

/// Behind `/healthz`, `/readyz` and `/metrics`, and around every request; cheap to clone.
#[derive(Clone)]
pub struct Operations(Arc<Inner>);

struct Inner {
    config: Arc<Config>,
    health: Arc<dyn Health>,
    exporter: PrometheusHandle,
    limits: RateLimits,
}

impl Operations {
    /// From its parts.
    pub fn new(config: Arc<Config>, health: Arc<dyn Health>, exporter: PrometheusHandle) -> Self {
        let limits = RateLimits::new(&config);
        Self(Arc::new(Inner { config, health, exporter, limits }))
    }

    /// The validated configuration.
    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Whether the process can do its work.
    pub fn health(&self) -> &dyn Health {
        self.0.health.as_ref()
    }

    /// Where metrics are gathered.
    pub fn exporter(&self) -> &PrometheusHandle {
        &self.0.exporter
    }

    /// The rate limits of requests.
    pub fn rate_limits(&self) -> &RateLimits {
        &self.0.limits
    }
}
