//! Configuration of topic `metadata`.

use serde::Deserialize;

use super::{Config, ConfigError, Secret, invalid};

/// The fewest characters of a secret: 128 bits in hexadecimal digits.
const SECRET_CHARS_MIN: usize = 32;

/// What analysts may know: topic `metadata`, see `schemas/metadata.proto`. How long it is kept is the log's matter: `[log]` here,
/// `topology/topics.toml` on a cluster.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metadata {
    /// Whether projectors write it. Default: on the embedded profile yes; on a cluster if there is a secret.
    pub enabled: Option<bool>,
    /// After so many days accounts get new pseudonyms. Default 30.
    pub rotate_days: u32,
    /// What pseudonyms are made from: the same for all projectors of a cluster. The embedded profile makes one by itself
    /// (`metadata.secret` in the data folder) if none is set.
    pub secret: Option<Secret<String>>,
}

impl Default for Metadata {
    fn default() -> Self {
        Self { enabled: None, rotate_days: 30, secret: None }
    }
}

impl Config {
    /// Whether topic `metadata` is written.
    pub fn metadata_enabled(&self) -> bool {
        self.metadata.enabled.unwrap_or(!self.is_cluster() || self.metadata.secret.is_some())
    }

    pub(super) fn validate_metadata(&self) -> Result<(), ConfigError> {
        if !(1..=366).contains(&self.metadata.rotate_days) {
            return Err(invalid("metadata.rotate_days", "must be from 1 to 366"));
        }
        match &self.metadata.secret {
            Some(secret) if secret.expose().len() < SECRET_CHARS_MIN => {
                Err(invalid("metadata.secret", "must have at least 32 characters; make one with `openssl rand -hex 32`"))
            }
            None if self.is_cluster() && self.metadata.enabled == Some(true) => {
                let problem =
                    "is needed, the same for all projectors, or their pseudonyms would differ; make one with `openssl rand -hex 32`";
                Err(invalid("metadata.secret", problem))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        toml::from_str(text).expect("parses")
    }

    #[test]
    fn a_cluster_needs_one_secret_for_all() {
        let cluster = "[kafka]\nbrokers = \"k\"\n[cql]\nhosts = \"c\"\n[metadata]\n";
        let secret = "secret = \"0123456789abcdef0123456789abcdef\"";
        assert!(!config(cluster).metadata_enabled() && config(&format!("{cluster}{secret}")).metadata_enabled());
        assert!(config("").metadata_enabled() && !config("[metadata]\nenabled = false").metadata_enabled());
        config(&format!("{cluster}enabled = true\n{secret}")).validate().expect("valid");
        for (text, key) in [
            (&*format!("{cluster}enabled = true"), "metadata.secret"),
            ("[metadata]\nsecret = \"0123456789abcdef0123456789abcde\"", "metadata.secret"),
            ("[metadata]\nrotate_days = 0", "metadata.rotate_days"),
            ("[metadata]\nrotate_days = 367", "metadata.rotate_days"),
        ] {
            let error = config(text).validate().expect_err(text);
            assert!(matches!(&error, ConfigError::Invalid { key: k, .. } if k == key), "{text}: {error}");
        }
        assert!(!format!("{:?}", config(&format!("[metadata]\n{secret}"))).contains("0123"));
    }
}
