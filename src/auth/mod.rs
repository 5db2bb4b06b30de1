//! Who somebody is: realm tokens prove a person, device credentials prove a device.

use std::sync::Arc;

use async_trait::async_trait;

use crate::directory::Directory;
use crate::ids::{ClientMessageId, DeviceAddr};
use crate::store::StoreError;

pub mod credential;
pub mod dev;
pub mod jwks;
pub mod realm;

use credential::Credential;

/// A device that has proved who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownDevice {
    /// Which one.
    pub addr: DeviceAddr,
    /// Where its client message ids begin: lower ones may be those of an earlier device of its number.
    pub first_message_id: ClientMessageId,
}

/// Where the hashes of credentials are.
#[async_trait]
pub trait CredentialHashes: Send + Sync + 'static {
    /// The device with SHA-256 of its secret; `None` if there is no such device (any more).
    async fn credential_hash(&self, device: DeviceAddr) -> Result<Option<(KnownDevice, [u8; 32])>, StoreError>;
}

#[async_trait]
impl CredentialHashes for Directory {
    async fn credential_hash(&self, addr: DeviceAddr) -> Result<Option<(KnownDevice, [u8; 32])>, StoreError> {
        let view = self.get(addr.account).await?;
        let device = view.as_ref().filter(|view| !view.deleted).and_then(|view| view.device(addr.device));
        Ok(device.map(|device| (KnownDevice { addr, first_message_id: device.first_message_id }, device.credential_hash)))
    }
}

/// Why a credential is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Malformed, or of an unknown account or device, or with a wrong secret: nobody is told which.
    #[error("no valid device credential")]
    Refused,
    /// Can't be looked up now. Retry later.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Checks device credentials.
#[derive(Clone)]
pub struct Authenticator {
    hashes: Arc<dyn CredentialHashes>,
}

impl Authenticator {
    /// Over this directory.
    pub fn new(hashes: Arc<dyn CredentialHashes>) -> Self {
        Self { hashes }
    }

    /// Whose credential it is. An unknown device and a wrong secret do the same work and get the same answer.
    pub async fn authenticate(&self, text: &str) -> Result<KnownDevice, AuthError> {
        let credential = Credential::parse(text).map_err(|_| AuthError::Refused)?;
        let (device, hash) = self.hashes.credential_hash(credential.device).await?.unzip();
        // No secret has this hash, but comparing takes as long.
        let matches = credential.secret.matches(&hash.unwrap_or([0; 32]));
        device.filter(|_| matches).ok_or(AuthError::Refused)
    }
}

#[cfg(test)]
mod tests {
    use super::credential::DeviceSecret;
    use super::*;
    use crate::clock::SeededRandom;
    use crate::ids::{AccountId, DeviceId};

    fn known(addr: DeviceAddr) -> KnownDevice {
        KnownDevice { addr, first_message_id: ClientMessageId(7) }
    }

    struct One(DeviceAddr, [u8; 32]);

    #[async_trait]
    impl CredentialHashes for One {
        async fn credential_hash(&self, device: DeviceAddr) -> Result<Option<(KnownDevice, [u8; 32])>, StoreError> {
            Ok((device == self.0).then_some((known(device), self.1)))
        }
    }

    #[tokio::test]
    async fn only_the_right_secret_of_a_known_device_passes() {
        let device = |n| DeviceAddr { account: AccountId::from_bytes([1; 16]), device: DeviceId::new(n).expect("valid") };
        let secret = |seed| DeviceSecret::random(&SeededRandom::new(seed));
        let auth = Authenticator::new(Arc::new(One(device(1), secret(1).hash())));
        let text = |n, seed| Credential { device: device(n), secret: secret(seed) }.to_text();
        assert_eq!(auth.authenticate(&text(1, 1)).await, Ok(known(device(1))));
        assert_eq!(auth.authenticate(&text(1, 2)).await, Err(AuthError::Refused));
        assert_eq!(auth.authenticate(&text(2, 1)).await, Err(AuthError::Refused));
        assert_eq!(auth.authenticate("nonsense").await, Err(AuthError::Refused));
    }
}
