//! Device credentials: what a device shows on every request after it registered.
//!
//! `sp1_` and base64url without padding (RFC 4648 section 5) of 49 bytes: account (16), device (1), secret (32). The
//! server keeps SHA-256 of the secret: the secret is random, so a plain hash is enough.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize as _, Zeroizing};

use crate::clock::Random;
use crate::ids::{AccountId, DeviceAddr, DeviceId};

const PREFIX: &str = "sp1_";
const BYTES: usize = 16 + 1 + 32;
/// The length of a credential's text.
pub const TEXT_BYTES: usize = PREFIX.len() + (BYTES * 4).div_ceil(3);

/// A text that is not a credential. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a device credential")]
pub struct InvalidCredential;

/// A device's secret. Never printed, wiped when dropped.
#[derive(Clone)]
pub struct DeviceSecret(Zeroizing<[u8; 32]>);

impl DeviceSecret {
    /// A new one.
    pub fn random(random: &dyn Random) -> Self {
        let mut secret = Zeroizing::new([0; 32]);
        random.fill(&mut *secret);
        Self(secret)
    }

    /// One that the device chose; it must be random.
    pub fn chosen(bytes: [u8; 32]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// What the server keeps of it.
    pub fn hash(&self) -> [u8; 32] {
        Sha256::digest(*self.0).into()
    }

    /// Whether it is the secret with this hash; takes the same time whatever the answer.
    pub fn matches(&self, hash: &[u8; 32]) -> bool {
        self.hash().ct_eq(hash).into()
    }
}

impl fmt::Debug for DeviceSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DeviceSecret(…)")
    }
}

/// A device's address with its secret.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Whose it is.
    pub device: DeviceAddr,
    /// What proves it.
    pub secret: DeviceSecret,
}

impl Credential {
    /// From its text.
    pub fn parse(text: &str) -> Result<Self, InvalidCredential> {
        if text.len() != TEXT_BYTES {
            return Err(InvalidCredential);
        }
        let encoded = text.strip_prefix(PREFIX).ok_or(InvalidCredential)?;
        let mut bytes = Zeroizing::new([0; BYTES]);
        // The decoder refuses other alphabets, padding and stray bits, so that a credential has one text.
        let length = URL_SAFE_NO_PAD.decode_slice_unchecked(encoded, &mut *bytes).map_err(|_| InvalidCredential)?;
        if length != BYTES {
            return Err(InvalidCredential);
        }
        let account = AccountId::from_slice(&bytes[..16]).map_err(|_| InvalidCredential)?;
        let device = DeviceId::new(u32::from(bytes[16])).map_err(|_| InvalidCredential)?;
        let mut secret = Zeroizing::new([0; 32]);
        secret.copy_from_slice(&bytes[17..]);
        Ok(Self { device: DeviceAddr { account, device }, secret: DeviceSecret(secret) })
    }

    /// Its text, for the device.
    pub fn to_text(&self) -> Zeroizing<String> {
        let mut bytes = [0; BYTES];
        bytes[..16].copy_from_slice(self.device.account.as_bytes());
        bytes[16] = self.device.device.get();
        bytes[17..].copy_from_slice(&*self.secret.0);
        let mut text = Zeroizing::new(String::with_capacity(TEXT_BYTES));
        text.push_str(PREFIX);
        URL_SAFE_NO_PAD.encode_string(bytes, &mut text);
        bytes.zeroize();
        text
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::SeededRandom;

    fn credential() -> Credential {
        let device = DeviceAddr { account: AccountId::from_bytes([7; 16]), device: DeviceId::new(3).expect("valid") };
        Credential { device, secret: DeviceSecret::random(&SeededRandom::new(1)) }
    }

    #[test]
    fn round_trip_and_golden_length() {
        let text = credential().to_text();
        assert_eq!((text.len(), TEXT_BYTES), (70, 70));
        let back = Credential::parse(&text).expect("parses");
        assert_eq!(back.device, credential().device);
        assert!(back.secret.matches(&credential().secret.hash()));
        assert!(!back.secret.matches(&DeviceSecret::random(&SeededRandom::new(2)).hash()));
    }

    #[test]
    fn golden_vector() {
        let text = format!("sp1_{}", URL_SAFE_NO_PAD.encode([[1; 16].as_slice(), &[2], &[3; 32]].concat()));
        let parsed = Credential::parse(&text).expect("parses");
        assert_eq!(parsed.device.account.to_string(), "01010101-0101-0101-0101-010101010101");
        assert_eq!(parsed.secret.hash(), <[u8; 32]>::from(Sha256::digest([3; 32])));
        assert_eq!(*parsed.to_text(), text);
    }

    #[test]
    fn everything_else_is_refused() {
        let text = credential().to_text();
        let zero_device = format!("sp1_{}", URL_SAFE_NO_PAD.encode([0; BYTES]));
        let stray_bits = format!("{}{}", &text[..69], '_');
        for bad in
            ["", "sp1_", &text[..69], &format!("{}A", *text), &text.replace("sp1_", "sp2_"), &zero_device, &stray_bits, &"é".repeat(35)]
        {
            assert!(Credential::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_printed() {
        let text = format!("{:?}", credential());
        assert!(text.ends_with("secret: DeviceSecret(…) }"), "{text}");
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_is_its_own_canonical_form(text in "(sp1_)?[A-Za-z0-9_=+/-]{60,72}") {
            if let Ok(parsed) = Credential::parse(&text) {
                prop_assert_eq!(&*parsed.to_text(), &text);
            }
        }

        #[test]
        fn any_bytes_never_panic(text in any::<String>()) {
            let _ = Credential::parse(&text);
        }
    }
}
