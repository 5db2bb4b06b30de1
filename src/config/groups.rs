//! Configuration of groups.

use serde::Deserialize;

use super::{Config, ConfigError, Secret, invalid};

/// The fewest characters of a secret: 128 bits in hexadecimal digits.
const SECRET_CHARS_MIN: usize = 32;

/// Groups.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Groups {
    /// What the key is derived from with which the server proposes to take deleted accounts and devices out of groups: the same for all
    /// processes of a cluster, and for ever, since groups know the key. The embedded profile makes one by itself (`groups.secret` in the
    /// data folder) if none is set. On a cluster without one the server proposes nothing, and members see to it.
    pub secret: Option<Secret<String>>,
}

impl Config {
    pub(super) fn validate_groups(&self) -> Result<(), ConfigError> {
        match &self.groups.secret {
            Some(secret) if secret.expose().len() < SECRET_CHARS_MIN => {
                Err(invalid("groups.secret", "must have at least 32 characters; make one with `openssl rand -hex 32`"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_long_enough_and_not_printed() {
        let config = |secret: &str| toml::from_str::<Config>(&format!("[groups]\nsecret = \"{secret}\"")).expect("parses");
        let good = config("0123456789abcdef0123456789abcdef");
        good.validate().expect("valid");
        assert!(!format!("{good:?}").contains("0123"));
        let error = config("0123456789abcdef0123456789abcde").validate().expect_err("a character short");
        assert!(matches!(error, ConfigError::Invalid { key, .. } if key == "groups.secret"));
    }
}
