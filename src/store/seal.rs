//! Sealing at rest: envelopes on the log and in the store are encrypted once more under their recipient account's
//! own key, so that deleting an account (which destroys the key) makes what retention still holds unreadable.
//!
//! AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce: nonce (12 bytes), ciphertext, tag (16 bytes). The
//! associated data binds the ciphertext to its recipient device, sender and client message id.

use bytes::BytesMut;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use zeroize::Zeroizing;

use crate::clock::Random;
use crate::ids::{ClientMessageId, DeviceAddr};

/// What sealing adds to a content, in bytes.
pub const OVERHEAD: usize = 12 + 16;

/// A sealed content that does not open: damaged, or for somebody else, or its key is gone. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the sealed content does not open")]
pub struct Unsealable;

/// An account's at-rest key. Never printed, zeroized when dropped.
#[derive(Clone)]
pub struct SealKey(Zeroizing<[u8; 32]>);

impl SealKey {
    /// A new one.
    pub fn random(random: &dyn Random) -> Self {
        let mut key = Zeroizing::new([0; 32]);
        random.fill(&mut *key);
        Self(key)
    }

    /// As it is stored.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// For storing it.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Debug for SealKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SealKey(…)")
    }
}

/// An at-rest key made ready for use.
pub struct Sealer(LessSafeKey);

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sealer(…)")
    }
}

/// What a sealed content belongs to.
#[derive(Debug, Clone, Copy)]
pub struct Context {
    /// The device it is for.
    pub recipient: DeviceAddr,
    /// Who sent it.
    pub sender: DeviceAddr,
    /// Its id.
    pub client_message_id: ClientMessageId,
}

impl Context {
    fn aad(&self) -> [u8; 42] {
        let mut aad = [0; 42];
        aad[..16].copy_from_slice(self.recipient.account.as_bytes());
        aad[16] = self.recipient.device.get();
        aad[17..33].copy_from_slice(self.sender.account.as_bytes());
        aad[33] = self.sender.device.get();
        aad[34..].copy_from_slice(&self.client_message_id.0.to_le_bytes());
        aad
    }
}

impl Sealer {
    /// Expands the key once, for many contents.
    pub fn new(key: &SealKey) -> Self {
        Self(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.expose()).expect("the key has the algorithm's length")))
    }

    /// Seals a content, appending nonce, ciphertext and tag to `out`.
    pub fn seal(&self, context: &Context, content: &[u8], random: &dyn Random, out: &mut Vec<u8>) {
        let mut nonce = [0; 12];
        random.fill(&mut nonce);
        out.reserve(content.len() + OVERHEAD);
        out.extend_from_slice(&nonce);
        let start = out.len();
        out.extend_from_slice(content);
        let tag = self
            .0
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context.aad()), &mut out[start..])
            .expect("contents are far below the algorithm's limit");
        out.extend_from_slice(tag.as_ref());
    }

    /// Opens a sealed content, appending it to `out`; leaves `out` as it was if it does not open.
    pub fn open(&self, context: &Context, sealed: &[u8], out: &mut BytesMut) -> Result<(), Unsealable> {
        if sealed.len() < OVERHEAD {
            return Err(Unsealable);
        }
        let (nonce, body) = sealed.split_at(12);
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| Unsealable)?;
        let start = out.len();
        out.extend_from_slice(body);
        match self.0.open_in_place(nonce, Aad::from(context.aad()), &mut out[start..]) {
            Ok(content) => {
                let len = content.len();
                out.truncate(start + len);
                Ok(())
            }
            Err(_) => {
                out.truncate(start);
                Err(Unsealable)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SeededRandom;
    use crate::ids::{AccountId, DeviceId};

    fn context(device: u32) -> Context {
        let addr = |n: u8, device| DeviceAddr { account: AccountId::from_bytes([n; 16]), device: DeviceId::new(device).expect("valid") };
        Context { recipient: addr(1, device), sender: addr(2, 1), client_message_id: ClientMessageId(7) }
    }

    #[test]
    fn opens_only_with_its_key_its_context_and_unchanged() {
        let random = SeededRandom::new(1);
        let (key, other) = (Sealer::new(&SealKey::random(&random)), Sealer::new(&SealKey::random(&random)));
        let mut sealed = Vec::new();
        key.seal(&context(1), b"ciphertext", &random, &mut sealed);
        assert_eq!(sealed.len(), 10 + OVERHEAD);
        let mut out = BytesMut::from("before ");
        key.open(&context(1), &sealed, &mut out).expect("opens");
        assert_eq!(out, &b"before ciphertext"[..]);
        assert_eq!(other.open(&context(1), &sealed, &mut out), Err(Unsealable));
        assert_eq!(key.open(&context(2), &sealed, &mut out), Err(Unsealable));
        for i in 0..sealed.len() {
            let mut bent = sealed.clone();
            bent[i] ^= 1;
            assert_eq!(key.open(&context(1), &bent, &mut out), Err(Unsealable));
            assert_eq!(key.open(&context(1), &sealed[..i], &mut out), Err(Unsealable));
        }
        assert_eq!(out, &b"before ciphertext"[..], "a failure leaves the buffer as it was");
    }
}
