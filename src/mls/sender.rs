//! The server's own voice in groups: an external sender (RFC 9420, 12.1.8) that proposes to remove the leaves of devices that are no more.
//! It proposes; members commit, and they heed nothing else of it.

use hkdf::Hkdf;
use openmls::prelude::tls_codec::Serialize as _;
use openmls::prelude::{
    BasicCredential, ExternalProposal, ExternalSender, GroupEpoch, GroupId as MlsGroupId, LeafNodeIndex, OpenMlsProvider,
    SenderExtensionIndex,
};
use openmls_traits::signatures::{Signer, SignerError};
use openmls_traits::types::SignatureScheme;
use sha2::Sha256;
use zeroize::Zeroizing;

use super::crypto::Crypto;
use super::public::{Nowhere, Refused};
use super::storage::Storage;
use crate::ids::GroupId;

/// What the key is derived for.
const CONTEXT: &[u8] = b"sealpost group sender v1";
/// The identity in its credential.
const IDENTITY: &[u8] = b"server";

/// What groups have as their one external sender: the server with this public key (Ed25519, 32 bytes), under the credential `server`.
pub fn external_sender(public_key: &[u8]) -> ExternalSender {
    ExternalSender::new(public_key.into(), BasicCredential::new(IDENTITY.to_vec()).into())
}

/// The server's signing key: Ed25519, the same for all projectors of a broker. Never printed.
#[derive(Clone)]
pub struct ServerKey(ed25519_dalek::SigningKey);

impl std::fmt::Debug for ServerKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ServerKey(…)")
    }
}

impl ServerKey {
    /// From the broker's secret, 32 random bytes or more: HKDF-SHA256 with this module's own info.
    pub fn derive(secret: &[u8]) -> Self {
        let mut seed = Zeroizing::new([0; 32]);
        Hkdf::<Sha256>::new(None, secret).expand(CONTEXT, &mut *seed).expect("32 bytes are one block of SHA-256");
        Self(ed25519_dalek::SigningKey::from_bytes(&seed))
    }

    /// The public key, which clients put into new groups.
    pub fn public(&self) -> [u8; 32] {
        self.0.verifying_key().to_bytes()
    }

    /// Proposes to remove a leaf: an MLSMessage with a PublicMessage. The same arguments give the same bytes.
    pub fn remove(&self, group: GroupId, epoch: u64, leaf: u32) -> Result<Vec<u8>, Refused> {
        let id = MlsGroupId::from_slice(group.as_bytes());
        let (epoch, sender) = (GroupEpoch::from(epoch), SenderExtensionIndex::new(0));
        let proposal = ExternalProposal::new_remove::<Provider>(LeafNodeIndex::new(leaf), id, epoch, self, sender);
        let bytes = proposal.map_err(|error| error.to_string()).and_then(|it| it.tls_serialize_detached().map_err(|e| e.to_string()));
        bytes.map_err(Refused::Invalid)
    }
}

impl Signer for ServerKey {
    fn sign(&self, payload: &[u8]) -> Result<Vec<u8>, SignerError> {
        use ed25519_dalek::Signer as _;
        Ok(self.0.sign(payload).to_bytes().to_vec())
    }

    fn signature_scheme(&self) -> SignatureScheme {
        SignatureScheme::ED25519
    }
}

/// Signing a proposal takes neither storage nor randomness; openmls wants their types.
struct Provider {
    crypto: Crypto<'static>,
    storage: Storage<Nowhere>,
}

impl OpenMlsProvider for Provider {
    type CryptoProvider = Crypto<'static>;
    type RandProvider = Crypto<'static>;
    type StorageProvider = Storage<Nowhere>;

    fn storage(&self) -> &Self::StorageProvider {
        &self.storage
    }

    fn crypto(&self) -> &Self::CryptoProvider {
        &self.crypto
    }

    fn rand(&self) -> &Self::RandProvider {
        &self.crypto
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Golden: another derivation would make the server a stranger in its groups.
    #[test]
    fn the_key_follows_from_the_secret() {
        let key = ServerKey::derive(&[7; 32]);
        assert_eq!(key.public(), ServerKey::derive(&[7; 32]).public());
        assert_ne!(key.public(), ServerKey::derive(&[8; 32]).public());
        let hex: String = key.public().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "5bb2291dc034547d5b302b33a7c9a4d2350c5dcd66e97b9b1d9d90ead6a8f531");
        let group = GroupId::from_bytes([1; 16]);
        assert_eq!(key.remove(group, 3, 2), key.remove(group, 3, 2));
        assert_eq!(format!("{key:?}"), "ServerKey(…)");
    }
}
