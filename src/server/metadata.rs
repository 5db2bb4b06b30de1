//! The keys of topic `metadata`.

use crate::clock::SystemRandom;
use crate::config::Config;
use crate::metadata::{Keys, SecretKey, secret_of_folder};
use crate::server::ServerError;

/// `None` if the topic is not written.
pub(super) fn keys(config: &Config) -> Result<Option<Keys>, ServerError> {
    if !config.metadata_enabled() {
        return Ok(None);
    }
    let secret = match &config.metadata.secret {
        Some(secret) => SecretKey::new(secret.expose().as_bytes()),
        None => secret_of_folder(&config.data, &SystemRandom).map_err(|error| ServerError(error.to_string()))?,
    };
    Ok(Some(Keys { secret, rotate_days: config.metadata.rotate_days }))
}
