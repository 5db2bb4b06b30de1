//! Checks public keys and their signatures with libsignal's own code, before anything of them is kept.
//!
//! What is signed is the serialized public key: 33 bytes with the type byte 0x05 (X25519), or 1,569 bytes with the type
//! byte 0x08 (Kyber-1024). Signatures are XEdDSA, 64 bytes, by the device's identity key.

use std::collections::HashSet;

use libsignal_protocol::{PublicKey, kem};

use crate::limits;
use crate::store::OneTimeKey;
use crate::wire::event::SignedKey;

/// An identity key or EC prekey: type byte and X25519 point.
pub const EC_KEY_BYTES: usize = 33;
/// A Kyber-1024 prekey: type byte and key.
pub const PQ_KEY_BYTES: usize = 1_569;
/// An XEdDSA signature.
pub const SIGNATURE_BYTES: usize = 64;

/// Why keys are refused. The same keys never pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKeys {
    /// Not a serialized X25519 public key.
    #[error("{0} is not an X25519 public key: 33 bytes, the first one 5")]
    Ec(&'static str),
    /// Not a serialized Kyber-1024 public key.
    #[error("{0} is not a Kyber-1024 public key: 1569 bytes, the first one 8")]
    Pq(&'static str),
    /// The signature is not the identity key's over the serialized public key.
    #[error("the signature of {0} is not the identity key's over the serialized public key")]
    Signature(&'static str),
    /// More than [`limits::PREKEYS_PER_UPLOAD`].
    #[error("more than {max} of {0} at once", max = limits::PREKEYS_PER_UPLOAD)]
    TooMany(&'static str),
    /// Two keys with one id.
    #[error("an id is there twice in {0}")]
    Twice(&'static str),
}

/// A device's identity key, ready to verify with.
#[derive(Debug, Clone, Copy)]
pub struct IdentityKey(PublicKey);

fn ec(bytes: &[u8], what: &'static str) -> Result<PublicKey, InvalidKeys> {
    // libsignal lets bytes behind the key pass; they would be stored and not signed the way they were read.
    if bytes.len() != EC_KEY_BYTES {
        return Err(InvalidKeys::Ec(what));
    }
    let key = PublicKey::deserialize(bytes).map_err(|_| InvalidKeys::Ec(what))?;
    // Points of low order make shared secrets that everybody knows.
    if key.is_canonical() && bytes[1..].iter().any(|b| *b != 0) { Ok(key) } else { Err(InvalidKeys::Ec(what)) }
}

fn pq(bytes: &[u8], what: &'static str) -> Result<(), InvalidKeys> {
    match kem::PublicKey::deserialize(bytes) {
        Ok(key) if key.key_type() == kem::KeyType::Kyber1024 => Ok(()),
        _ => Err(InvalidKeys::Pq(what)),
    }
}

impl IdentityKey {
    /// From its serialization.
    pub fn parse(bytes: &[u8]) -> Result<Self, InvalidKeys> {
        ec(bytes, "identity_key").map(Self)
    }

    fn signed(self, key: &SignedKey, what: &'static str) -> Result<(), InvalidKeys> {
        let right = key.signature.len() == SIGNATURE_BYTES && self.0.verify_signature(&key.public_key, &key.signature);
        if right { Ok(()) } else { Err(InvalidKeys::Signature(what)) }
    }

    /// Checks a signed EC prekey.
    pub fn signed_prekey(self, key: &SignedKey) -> Result<(), InvalidKeys> {
        ec(&key.public_key, "signed_prekey")?;
        self.signed(key, "signed_prekey")
    }

    /// Checks a PQ last-resort prekey.
    pub fn pq_last_resort(self, key: &SignedKey) -> Result<(), InvalidKeys> {
        pq(&key.public_key, "pq_last_resort_prekey")?;
        self.signed(key, "pq_last_resort_prekey")
    }

    /// Checks a batch of one-time PQ prekeys.
    pub fn pq_one_time(self, keys: &[OneTimeKey]) -> Result<(), InvalidKeys> {
        batch(keys, "pq_one_time_prekeys")?;
        keys.iter().try_for_each(|key| {
            pq(&key.public_key, "pq_one_time_prekeys")?;
            self.signed(key, "pq_one_time_prekeys")
        })
    }
}

/// Checks a batch of one-time EC prekeys; they are not signed.
pub fn ec_one_time(keys: &[OneTimeKey]) -> Result<(), InvalidKeys> {
    batch(keys, "one_time_prekeys")?;
    keys.iter().try_for_each(|key| ec(&key.public_key, "one_time_prekeys").map(drop))
}

fn batch(keys: &[OneTimeKey], what: &'static str) -> Result<(), InvalidKeys> {
    if keys.len() > limits::PREKEYS_PER_UPLOAD {
        return Err(InvalidKeys::TooMany(what));
    }
    let mut ids = HashSet::with_capacity(keys.len());
    if keys.iter().all(|key| ids.insert(key.id)) { Ok(()) } else { Err(InvalidKeys::Twice(what)) }
}

#[cfg(test)]
mod tests {
    use libsignal_protocol::{IdentityKeyPair, KeyPair};

    use super::*;

    fn signed(identity: &IdentityKeyPair, id: u32, public_key: &[u8]) -> SignedKey {
        let signature = identity.private_key().calculate_signature(public_key, &mut rand::rng()).expect("signs");
        SignedKey { id, public_key: public_key.to_vec(), signature: signature.to_vec() }
    }

    fn ec_key() -> Vec<u8> {
        KeyPair::generate(&mut rand::rng()).public_key.serialize().to_vec()
    }

    fn pq_key() -> Vec<u8> {
        kem::KeyPair::generate(kem::KeyType::Kyber1024, &mut rand::rng()).public_key.serialize().to_vec()
    }

    #[test]
    fn right_keys_pass_and_lengths_are_as_documented() {
        let identity = IdentityKeyPair::generate(&mut rand::rng());
        let key = IdentityKey::parse(&identity.identity_key().serialize()).expect("parses");
        let (ec, pq) = (ec_key(), pq_key());
        assert_eq!((ec.len(), ec[0], pq.len(), pq[0]), (EC_KEY_BYTES, 5, PQ_KEY_BYTES, 8));
        key.signed_prekey(&signed(&identity, 1, &ec)).expect("passes");
        key.pq_last_resort(&signed(&identity, 1, &pq)).expect("passes");
        key.pq_one_time(&[signed(&identity, 1, &pq), signed(&identity, 2, &pq_key())]).expect("passes");
        ec_one_time(&[SignedKey { id: 1, public_key: ec, signature: Vec::new() }]).expect("passes");
    }

    #[test]
    fn wrong_keys_and_signatures_are_refused() {
        let (identity, other) = (IdentityKeyPair::generate(&mut rand::rng()), IdentityKeyPair::generate(&mut rand::rng()));
        let key = IdentityKey::parse(&identity.identity_key().serialize()).expect("parses");
        let (ec, pq) = (ec_key(), pq_key());
        assert_eq!(key.signed_prekey(&signed(&other, 1, &ec)), Err(InvalidKeys::Signature("signed_prekey")));
        assert_eq!(key.signed_prekey(&signed(&identity, 1, &pq)), Err(InvalidKeys::Ec("signed_prekey")));
        assert_eq!(key.pq_last_resort(&signed(&identity, 1, &ec)), Err(InvalidKeys::Pq("pq_last_resort_prekey")));
        let mut bent = signed(&identity, 1, &pq);
        bent.signature[10] ^= 1;
        assert_eq!(key.pq_one_time(&[bent]), Err(InvalidKeys::Signature("pq_one_time_prekeys")));
        let mut short = signed(&identity, 1, &ec);
        short.signature.pop();
        assert_eq!(key.signed_prekey(&short), Err(InvalidKeys::Signature("signed_prekey")));
        for bad in [&[][..], &ec[1..], &[&ec[..], &[0]].concat(), &[&[6], &ec[1..]].concat(), &[&[5][..], &[0; 32]].concat()] {
            assert_eq!(IdentityKey::parse(bad).map(drop), Err(InvalidKeys::Ec("identity_key")));
        }
    }

    #[test]
    fn batches_are_capped_and_ids_unique() {
        let key = |id| SignedKey { id, public_key: ec_key(), signature: Vec::new() };
        let many: Vec<_> = (0..limits::PREKEYS_PER_UPLOAD as u32).map(key).collect();
        ec_one_time(&many).expect("as many as are allowed");
        assert_eq!(ec_one_time(&[many, vec![key(1_000)]].concat()), Err(InvalidKeys::TooMany("one_time_prekeys")));
        assert_eq!(ec_one_time(&[key(1), key(1)]), Err(InvalidKeys::Twice("one_time_prekeys")));
    }
}
