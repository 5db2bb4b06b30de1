//! MLS cryptography: `openmls_traits` over RustCrypto and `hpke`, for the suites in [`SUITES`]. It holds no key.
//!
//! `openmls_rust_crypto` can't be in one lock file with libsignal (both pin `hax-lib`), so this stands in its place. `tests.rs`
//! proves it with the vectors of RFC 9420 and RFC 9180.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes128Gcm, Aes256Gcm};
use chacha20poly1305::ChaCha20Poly1305;
use ed25519_dalek::Signer as _;
use hkdf::Hkdf;
use hmac::{Hmac, Mac as _};
use hpke::rand_core::{TryCryptoRng, TryRng};
use hpke::{Deserializable as _, Kem, OpModeR, OpModeS, Serializable as _};
use openmls::prelude::tls_codec::SecretVLBytes;
use openmls_traits::crypto::OpenMlsCrypto;
use openmls_traits::random::OpenMlsRand;
use openmls_traits::types::{
    AeadType, Ciphersuite, CryptoError, ExporterSecret, HashType, HpkeAeadType, HpkeCiphertext, HpkeConfig, HpkeKdfType, HpkeKemType,
    HpkeKeyPair, KemOutput, SignatureScheme,
};
use p256::ecdsa::signature::Verifier as _;
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use zeroize::{Zeroize as _, Zeroizing};

use crate::clock::Random;

/// The suite of new groups and of the KeyPackages that devices publish: the one that every implementation of RFC 9420 must have.
pub const DEFAULT_SUITE: Ciphersuite = Ciphersuite::MLS_128_DHKEMX25519_AES128GCM_SHA256_Ed25519;

/// Every suite that this provider offers, the default first.
pub const SUITES: [Ciphersuite; 3] =
    [DEFAULT_SUITE, Ciphersuite::MLS_128_DHKEMX25519_CHACHA20POLY1305_SHA256_Ed25519, Ciphersuite::MLS_128_DHKEMP256_AES128GCM_SHA256_P256];

/// The cryptography and randomness of MLS. Copies share the same source of randomness.
#[derive(Clone, Copy)]
pub struct Crypto<'r>(&'r dyn Random);

impl<'r> Crypto<'r> {
    /// With this randomness.
    pub fn new(random: &'r dyn Random) -> Self {
        Self(random)
    }
}

impl std::fmt::Debug for Crypto<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Crypto")
    }
}

/// [`Random`] as the `rand_core` that these crates use. It can't fail.
struct Rng<'r>(&'r dyn Random);

impl TryRng for Rng<'_> {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Self::Error> {
        let mut bytes = [0; 4];
        self.0.fill(&mut bytes);
        Ok(u32::from_le_bytes(bytes))
    }

    fn try_next_u64(&mut self) -> Result<u64, Self::Error> {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        Ok(u64::from_le_bytes(bytes))
    }

    fn try_fill_bytes(&mut self, buffer: &mut [u8]) -> Result<(), Self::Error> {
        self.0.fill(buffer);
        Ok(())
    }
}

impl TryCryptoRng for Rng<'_> {}

impl OpenMlsRand for Crypto<'_> {
    type Error = std::convert::Infallible;

    fn random_array<const N: usize>(&self) -> Result<[u8; N], Self::Error> {
        let mut bytes = [0; N];
        self.0.fill(&mut bytes);
        Ok(bytes)
    }

    fn random_vec(&self, len: usize) -> Result<Vec<u8>, Self::Error> {
        let mut bytes = vec![0; len];
        self.0.fill(&mut bytes);
        Ok(bytes)
    }
}

/// Runs the body with `$hash` as the type of a hash algorithm.
macro_rules! with_hash {
    ($kind:expr, $hash:ident => $body:expr) => {
        match $kind {
            HashType::Sha2_256 => {
                type $hash = Sha256;
                $body
            }
            HashType::Sha2_384 => {
                type $hash = Sha384;
                $body
            }
            HashType::Sha2_512 => {
                type $hash = Sha512;
                $body
            }
        }
    };
}

/// Runs the body with `$aead` as the type of an AEAD algorithm.
macro_rules! with_aead {
    ($kind:expr, $aead:ident => $body:expr) => {
        match $kind {
            AeadType::Aes128Gcm => {
                type $aead = Aes128Gcm;
                $body
            }
            AeadType::Aes256Gcm => {
                type $aead = Aes256Gcm;
                $body
            }
            AeadType::ChaCha20Poly1305 => {
                type $aead = ChaCha20Poly1305;
                $body
            }
        }
    };
}

/// Runs the body with `$kem` and `$aead` as the types of an HPKE configuration; others than those of [`SUITES`] are refused.
macro_rules! with_hpke {
    ($config:expr, $kem:ident, $aead:ident => $body:expr) => {
        match ($config.0, $config.1, $config.2) {
            (HpkeKemType::DhKem25519, HpkeKdfType::HkdfSha256, HpkeAeadType::AesGcm128) => {
                type $kem = hpke::kem::X25519HkdfSha256;
                type $aead = hpke::aead::AesGcm128;
                $body
            }
            (HpkeKemType::DhKem25519, HpkeKdfType::HkdfSha256, HpkeAeadType::ChaCha20Poly1305) => {
                type $kem = hpke::kem::X25519HkdfSha256;
                type $aead = hpke::aead::ChaCha20Poly1305;
                $body
            }
            (HpkeKemType::DhKemP256, HpkeKdfType::HkdfSha256, HpkeAeadType::AesGcm128) => {
                type $kem = hpke::kem::DhP256HkdfSha256;
                type $aead = hpke::aead::AesGcm128;
                $body
            }
            _ => Err(CryptoError::UnsupportedCiphersuite),
        }
    };
}

type Kdf = hpke::kdf::HkdfSha256;

/// Longer nonces or keys would be cut in silence; here they are an error.
fn nonce<A: aes_gcm::aead::AeadCore>(bytes: &[u8]) -> Result<aes_gcm::aead::Nonce<A>, CryptoError> {
    aes_gcm::aead::Nonce::<A>::try_from(bytes).map_err(|_| CryptoError::InvalidLength)
}

fn public_key<K: Kem>(bytes: &[u8]) -> Result<K::PublicKey, CryptoError> {
    K::PublicKey::from_bytes(bytes).map_err(|_| CryptoError::InvalidPublicKey)
}

fn private_key<K: Kem>(bytes: &[u8]) -> Result<K::PrivateKey, CryptoError> {
    K::PrivateKey::from_bytes(bytes).map_err(|_| CryptoError::InvalidLength)
}

/// Points of X25519 with which every secret is zero (RFC 7748, section 6.1), the highest bit left out: what would be encrypted to one, HPKE
/// refuses to encrypt.
const ZERO_POINTS: [[u8; 32]; 7] = {
    let mut points = [[0; 32]; 7];
    points[1][0] = 1;
    points[2] = [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09, 0x8d, 0xeb, 0x9c, 0x32,
        0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ];
    points[3] = [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44, 0x5c, 0xc4, 0x58, 0x1c,
        0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ];
    // The prime less one, the prime, and one more.
    let mut at = 4;
    while at < 7 {
        points[at] = [0xff; 32];
        points[at][0] = 0xec + (at as u8 - 4);
        points[at][31] = 0x7f;
        at += 1;
    }
    points
};

/// Whether something can be encrypted to a public key of a suite's HPKE. A leaf or node of a tree with one that is not would keep others from
/// ever committing.
pub fn can_encrypt_to(suite: Ciphersuite, key: &[u8]) -> bool {
    match suite.hpke_kem_algorithm() {
        HpkeKemType::DhKem25519 => <[u8; 32]>::try_from(key).is_ok_and(|mut key| {
            key[31] &= 0x7f;
            !ZERO_POINTS.contains(&key)
        }),
        HpkeKemType::DhKemP256 => public_key::<hpke::kem::DhP256HkdfSha256>(key).is_ok(),
        _ => false,
    }
}

impl OpenMlsCrypto for Crypto<'_> {
    fn supports(&self, ciphersuite: Ciphersuite) -> Result<(), CryptoError> {
        if SUITES.contains(&ciphersuite) { Ok(()) } else { Err(CryptoError::UnsupportedCiphersuite) }
    }

    fn supported_ciphersuites(&self) -> Vec<Ciphersuite> {
        SUITES.to_vec()
    }

    fn hkdf_extract(&self, hash_type: HashType, salt: &[u8], ikm: &[u8]) -> Result<SecretVLBytes, CryptoError> {
        with_hash!(hash_type, H => Ok(Hkdf::<H>::extract(Some(salt), ikm).0.as_slice().into()))
    }

    fn hmac(&self, hash_type: HashType, key: &[u8], message: &[u8]) -> Result<SecretVLBytes, CryptoError> {
        with_hash!(hash_type, H => {
            let mut mac = <Hmac<H> as hmac::KeyInit>::new_from_slice(key).map_err(|_| CryptoError::CryptoLibraryError)?;
            mac.update(message);
            Ok(mac.finalize().into_bytes().as_slice().into())
        })
    }

    fn hkdf_expand(&self, hash_type: HashType, prk: &[u8], info: &[u8], okm_len: usize) -> Result<SecretVLBytes, CryptoError> {
        let mut okm = Zeroizing::new(vec![0; okm_len]);
        with_hash!(hash_type, H => Hkdf::<H>::from_prk(prk)
            .map_err(|_| CryptoError::HkdfOutputLengthInvalid)?
            .expand(info, &mut okm)
            .map_err(|_| CryptoError::HkdfOutputLengthInvalid)?);
        Ok(okm.as_slice().into())
    }

    fn hash(&self, hash_type: HashType, data: &[u8]) -> Result<Vec<u8>, CryptoError> {
        with_hash!(hash_type, H => Ok(H::digest(data).to_vec()))
    }

    fn aead_encrypt(&self, alg: AeadType, key: &[u8], data: &[u8], nonce_bytes: &[u8], aad: &[u8]) -> Result<Vec<u8>, CryptoError> {
        with_aead!(alg, A => {
            let cipher = A::new_from_slice(key).map_err(|_| CryptoError::InvalidLength)?;
            let payload = Payload { msg: data, aad };
            cipher.encrypt(&nonce::<A>(nonce_bytes)?, payload).map_err(|_| CryptoError::CryptoLibraryError)
        })
    }

    fn aead_decrypt(&self, alg: AeadType, key: &[u8], ct_tag: &[u8], nonce_bytes: &[u8], aad: &[u8]) -> Result<Vec<u8>, CryptoError> {
        with_aead!(alg, A => {
            let cipher = A::new_from_slice(key).map_err(|_| CryptoError::InvalidLength)?;
            let payload = Payload { msg: ct_tag, aad };
            cipher.decrypt(&nonce::<A>(nonce_bytes)?, payload).map_err(|_| CryptoError::AeadDecryptionError)
        })
    }

    fn signature_key_gen(&self, alg: SignatureScheme) -> Result<(Vec<u8>, Vec<u8>), CryptoError> {
        match alg {
            SignatureScheme::ED25519 => {
                let mut seed = Zeroizing::new([0; 32]);
                self.0.fill(seed.as_mut());
                let key = ed25519_dalek::SigningKey::from_bytes(&seed);
                Ok((seed.to_vec(), key.verifying_key().to_bytes().to_vec()))
            }
            SignatureScheme::ECDSA_SECP256R1_SHA256 => {
                // A uniform scalar below the order, by trying again: all but one in 2^32 tries are.
                let mut seed = Zeroizing::new([0; 32]);
                let key = loop {
                    self.0.fill(seed.as_mut());
                    if let Ok(key) = p256::ecdsa::SigningKey::from_slice(seed.as_ref()) {
                        break key;
                    }
                };
                Ok((seed.to_vec(), key.verifying_key().to_sec1_point(false).as_bytes().to_vec()))
            }
            _ => Err(CryptoError::UnsupportedSignatureScheme),
        }
    }

    fn verify_signature(&self, alg: SignatureScheme, data: &[u8], pk: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        match alg {
            SignatureScheme::ED25519 => {
                let key = ed25519_dalek::VerifyingKey::try_from(pk).map_err(|_| CryptoError::InvalidPublicKey)?;
                let signature = ed25519_dalek::Signature::from_slice(signature).map_err(|_| CryptoError::InvalidSignature)?;
                // Strict: no small-order keys, and one verdict everywhere.
                key.verify_strict(data, &signature).map_err(|_| CryptoError::InvalidSignature)
            }
            SignatureScheme::ECDSA_SECP256R1_SHA256 => {
                let key = p256::ecdsa::VerifyingKey::from_sec1_bytes(pk).map_err(|_| CryptoError::InvalidPublicKey)?;
                let signature = p256::ecdsa::Signature::from_der(signature).map_err(|_| CryptoError::InvalidSignature)?;
                key.verify(data, &signature).map_err(|_| CryptoError::InvalidSignature)
            }
            _ => Err(CryptoError::UnsupportedSignatureScheme),
        }
    }

    fn sign(&self, alg: SignatureScheme, data: &[u8], key: &[u8]) -> Result<Vec<u8>, CryptoError> {
        match alg {
            SignatureScheme::ED25519 => {
                let key = ed25519_dalek::SigningKey::try_from(key).map_err(|_| CryptoError::InvalidLength)?;
                Ok(key.sign(data).to_bytes().to_vec())
            }
            SignatureScheme::ECDSA_SECP256R1_SHA256 => {
                let key = p256::ecdsa::SigningKey::from_slice(key).map_err(|_| CryptoError::InvalidLength)?;
                let signature: p256::ecdsa::Signature = key.sign(data);
                Ok(signature.to_der().as_bytes().to_vec())
            }
            _ => Err(CryptoError::UnsupportedSignatureScheme),
        }
    }

    fn hpke_seal(&self, config: HpkeConfig, pk_r: &[u8], info: &[u8], aad: &[u8], ptxt: &[u8]) -> Result<HpkeCiphertext, CryptoError> {
        with_hpke!(config, K, A => {
            let key = public_key::<K>(pk_r)?;
            let (encapped, ciphertext) =
                hpke::single_shot_seal_with_rng::<A, Kdf, K>(&OpModeS::Base, &key, info, ptxt, aad, &mut Rng(self.0))
                    .map_err(|_| CryptoError::HpkeEncryptionError)?;
            Ok(HpkeCiphertext { kem_output: encapped.to_bytes().to_vec().into(), ciphertext: ciphertext.into() })
        })
    }

    fn hpke_open(&self, config: HpkeConfig, input: &HpkeCiphertext, sk_r: &[u8], info: &[u8], aad: &[u8]) -> Result<Vec<u8>, CryptoError> {
        with_hpke!(config, K, A => {
            let key = private_key::<K>(sk_r)?;
            let encapped = <K as Kem>::EncappedKey::from_bytes(input.kem_output.as_slice()).map_err(|_| CryptoError::HpkeDecryptionError)?;
            hpke::single_shot_open::<A, Kdf, K>(&OpModeR::Base, &key, &encapped, info, input.ciphertext.as_slice(), aad)
                .map_err(|_| CryptoError::HpkeDecryptionError)
        })
    }

    fn hpke_setup_sender_and_export(
        &self,
        config: HpkeConfig,
        pk_r: &[u8],
        info: &[u8],
        exporter_context: &[u8],
        exporter_length: usize,
    ) -> Result<(KemOutput, ExporterSecret), CryptoError> {
        with_hpke!(config, K, A => {
            let key = public_key::<K>(pk_r)?;
            let (encapped, context) = hpke::setup_sender_with_rng::<A, Kdf, K>(&OpModeS::Base, &key, info, &mut Rng(self.0))
                .map_err(|_| CryptoError::SenderSetupError)?;
            let mut secret = vec![0; exporter_length];
            context.export(exporter_context, &mut secret).map_err(|_| CryptoError::ExporterError)?;
            Ok((encapped.to_bytes().to_vec(), secret.into()))
        })
    }

    fn hpke_setup_receiver_and_export(
        &self,
        config: HpkeConfig,
        enc: &[u8],
        sk_r: &[u8],
        info: &[u8],
        exporter_context: &[u8],
        exporter_length: usize,
    ) -> Result<ExporterSecret, CryptoError> {
        with_hpke!(config, K, A => {
            let key = private_key::<K>(sk_r)?;
            let encapped = <K as Kem>::EncappedKey::from_bytes(enc).map_err(|_| CryptoError::ReceiverSetupError)?;
            let context = hpke::setup_receiver::<A, Kdf, K>(&OpModeR::Base, &key, &encapped, info)
                .map_err(|_| CryptoError::ReceiverSetupError)?;
            let mut secret = vec![0; exporter_length];
            context.export(exporter_context, &mut secret).map_err(|_| CryptoError::ExporterError)?;
            Ok(secret.into())
        })
    }

    fn derive_hpke_keypair(&self, config: HpkeConfig, ikm: &[u8]) -> Result<HpkeKeyPair, CryptoError> {
        with_hpke!(config, K, _A => {
            let (private, public) = K::derive_keypair(ikm);
            let mut private = private.to_bytes();
            let pair = HpkeKeyPair { private: private.as_slice().into(), public: public.to_bytes().to_vec() };
            private.as_mut_slice().zeroize();
            Ok(pair)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SeededRandom;

    #[test]
    fn keys_that_hpke_refuses_are_known_before() {
        let random = SeededRandom::new(1);
        let crypto = Crypto::new(&random);
        for suite in SUITES {
            let seals = |key: &[u8]| crypto.hpke_seal(suite.hpke_config(), key, b"", b"", b"text").is_ok();
            let good = crypto.derive_hpke_keypair(suite.hpke_config(), &[7; 32]).expect("a key pair").public;
            let mut keys = vec![good.clone(), good[1..].to_vec(), Vec::new(), vec![0xff; good.len()]];
            for point in ZERO_POINTS {
                keys.push(point.to_vec());
                keys.push([&point[..31], &[point[31] | 0x80]].concat());
            }
            for key in &keys {
                assert_eq!(can_encrypt_to(suite, key), seals(key), "{suite:?} {key:02x?}");
            }
            assert!(can_encrypt_to(suite, &good));
        }
    }
}
