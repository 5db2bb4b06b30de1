//! The server's own key in groups.

use std::sync::Arc;

use crate::clock::SystemRandom;
use crate::config::Config;
use crate::mls::sender::ServerKey;
use crate::secret_file;
use crate::server::ServerError;

/// The embedded profile's own secret, in the data folder.
const SECRET_FILE: &str = "groups.secret";

/// `None` on a cluster without a secret: each process would have its own.
pub(super) fn key(config: &Config) -> Result<Option<Arc<ServerKey>>, ServerError> {
    let key = match &config.groups.secret {
        Some(secret) => ServerKey::derive(secret.expose().as_bytes()),
        None if config.is_cluster() => return Ok(None),
        None => {
            let secret = secret_file::read_or_make(&config.data, SECRET_FILE, &SystemRandom);
            ServerKey::derive(&secret.map_err(|error| ServerError(error.to_string()))?)
        }
    };
    Ok(Some(Arc::new(key)))
}
