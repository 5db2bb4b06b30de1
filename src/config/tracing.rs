//! Configuration of traces.

use serde::Deserialize;
use url::Url;

use super::{Config, ConfigError, invalid, some_url};

/// Traces of single messages, by OTLP (HTTP, protobuf). Off unless there is an endpoint.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tracing {
    /// Where a collector takes them: `http://collector:4318`, to which `/v1/traces` is added if it has no path.
    #[serde(deserialize_with = "some_url")]
    pub otlp_endpoint: Option<Url>,
    /// The share of messages that is traced, from 0 to 1, chosen by chance where they are accepted. Default 0.01.
    pub sample_ratio: f64,
}

impl Default for Tracing {
    fn default() -> Self {
        Self { otlp_endpoint: None, sample_ratio: 0.01 }
    }
}

impl Config {
    pub(super) fn validate_tracing(&self) -> Result<(), ConfigError> {
        if self.tracing.otlp_endpoint.as_ref().is_some_and(|url| !matches!(url.scheme(), "http" | "https") || url.host().is_none()) {
            return Err(invalid("tracing.otlp_endpoint", "must be an http:// or https:// address, such as http://collector:4318"));
        }
        if !(0.0..=1.0).contains(&self.tracing.sample_ratio) {
            return Err(invalid("tracing.sample_ratio", "must be from 0 (nothing) to 1 (every message)"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_off_unless_somebody_takes_them() {
        let config: Config = toml::from_str("").expect("parses");
        assert!(config.tracing.otlp_endpoint.is_none());
        let set = |name: &str, value: &str| (format!("SEALPOST_TRACING__{name}"), value.to_owned());
        let load = |endpoint, ratio| Config::load(None, [set("OTLP_ENDPOINT", endpoint), set("SAMPLE_RATIO", ratio)]);
        let config = load("http://collector:4318", "0.25").expect("loads");
        config.validate().expect("valid");
        assert_eq!((config.tracing.otlp_endpoint.expect("set").as_str(), config.tracing.sample_ratio), ("http://collector:4318/", 0.25));
        load("https://collector", "1").expect("loads").validate().expect("valid");
        for (endpoint, ratio, key) in [
            ("ftp://collector", "0.1", "tracing.otlp_endpoint"),
            ("http://collector", "1.001", "tracing.sample_ratio"),
            ("http://collector", "-0.1", "tracing.sample_ratio"),
        ] {
            let error = load(endpoint, ratio).expect("loads").validate().expect_err(endpoint);
            assert!(matches!(&error, ConfigError::Invalid { key: k, .. } if k == key), "{error}");
        }
    }
}
