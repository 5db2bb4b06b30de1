//! Shapes that several routes share.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use crate::wire::event::SignedKey;

/// Bytes as base64 with padding (RFC 4648 section 4).
#[derive(Debug, Clone, PartialEq, Eq, ToSchema)]
#[schema(value_type = String, format = Byte)]
pub struct B64(pub Vec<u8>);

impl Serialize for B64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for B64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl serde::de::Visitor<'_> for Text {
            type Value = B64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("base64 with padding")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<B64, E> {
                STANDARD.decode(text).map(B64).map_err(|_| E::custom("not base64 (RFC 4648 section 4, with padding)"))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// A public key with the identity key's signature over exactly its serialized bytes.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct SignedPrekey {
    /// The client's number for it; comes back in the messages that use it.
    pub id: u32,
    /// libsignal's serialization: 33 bytes (0x05 and the X25519 point) or 1,569 bytes (0x08 and the Kyber-1024 key).
    pub public_key: B64,
    /// XEdDSA signature (64 bytes) of the device's identity key over all bytes of `public_key`, type byte included.
    pub signature: B64,
}

/// A one-time EC prekey; it is not signed.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct OneTimePrekey {
    /// The client's number for it; comes back in the message that uses it.
    pub id: u32,
    /// libsignal's serialization: 33 bytes, 0x05 and the X25519 point.
    pub public_key: B64,
}

impl From<SignedPrekey> for SignedKey {
    fn from(key: SignedPrekey) -> Self {
        Self { id: key.id, public_key: key.public_key.0, signature: key.signature.0 }
    }
}

impl From<OneTimePrekey> for SignedKey {
    fn from(key: OneTimePrekey) -> Self {
        Self { id: key.id, public_key: key.public_key.0, signature: Vec::new() }
    }
}

impl From<SignedKey> for SignedPrekey {
    fn from(key: SignedKey) -> Self {
        Self { id: key.id, public_key: B64(key.public_key), signature: B64(key.signature) }
    }
}

impl From<SignedKey> for OneTimePrekey {
    fn from(key: SignedKey) -> Self {
        Self { id: key.id, public_key: B64(key.public_key) }
    }
}

/// How many one-time prekeys the server holds for the device.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, ToSchema)]
pub struct PrekeyCounts {
    /// X25519.
    pub one_time_prekeys: usize,
    /// Kyber-1024.
    pub pq_one_time_prekeys: usize,
}

impl From<crate::keys::Counts> for PrekeyCounts {
    fn from(counts: crate::keys::Counts) -> Self {
        Self { one_time_prekeys: counts.ec, pq_one_time_prekeys: counts.pq }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_padded_base64_and_nothing_else() {
        let read = |text: &str| serde_json::from_str::<B64>(&format!("\"{text}\""));
        assert_eq!(read("+/8=").expect("reads"), B64(vec![0xfb, 0xff]));
        assert_eq!(serde_json::to_string(&B64(vec![0xfb, 0xff])).expect("writes"), "\"+/8=\"");
        for wrong in ["+/8", "-_8=", "+/9=", " +/8="] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }
}
