//! This device's signature key in groups: one for each cipher suite, made at first use, for as long as the device lives.

use openmls::prelude::{Ciphersuite, CredentialWithKey, SignatureScheme};
use openmls_traits::crypto::OpenMlsCrypto as _;
use openmls_traits::signatures::{Signer as Sign, SignerError};
use zeroize::Zeroizing;

use super::Error;
use crate::client::core::state::{StateKey, StateTx, StorageError};
use crate::clock::Random;
use crate::ids::DeviceAddr;
use crate::mls::credential;
use crate::mls::crypto::Crypto;

/// A signature key pair. Stored as the private key (32 bytes), then the public one.
pub(super) struct Signer<'r> {
    crypto: Crypto<'r>,
    scheme: SignatureScheme,
    private: Zeroizing<Vec<u8>>,
    public: Vec<u8>,
}

const PRIVATE: usize = 32;

impl<'r> Signer<'r> {
    /// The device's key for a suite.
    pub(super) fn load(tx: &StateTx<'_>, suite: Ciphersuite, random: &'r dyn Random) -> Result<Self, Error> {
        let (crypto, scheme, key) = (Crypto::new(random), suite.signature_algorithm(), StateKey::GroupSigner(suite.into()));
        if let Some(stored) = tx.get(&key)? {
            let damaged = || StorageError("a stored signature key is damaged".into());
            let (private, public) = stored.split_at_checked(PRIVATE).ok_or_else(damaged)?;
            return Ok(Self { crypto, scheme, private: Zeroizing::new(private.to_vec()), public: public.to_vec() });
        }
        let (private, public) = crypto.signature_key_gen(scheme).map_err(Error::crypto)?;
        let private = Zeroizing::new(private);
        tx.put(key, [private.as_slice(), &public].concat());
        Ok(Self { crypto, scheme, private, public })
    }

    /// What others see of it.
    pub(super) fn credential(&self, device: DeviceAddr) -> CredentialWithKey {
        CredentialWithKey { credential: credential::of_device(device), signature_key: self.public.as_slice().into() }
    }
}

impl Sign for Signer<'_> {
    fn sign(&self, payload: &[u8]) -> Result<Vec<u8>, SignerError> {
        self.crypto.sign(self.scheme, payload, &self.private).map_err(SignerError::CryptoError)
    }

    fn signature_scheme(&self) -> SignatureScheme {
        self.scheme
    }
}
