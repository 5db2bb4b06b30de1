//! KeyPackages: what a device publishes so that others can add it to groups, and what makes one acceptable.

use openmls::prelude::tls_codec::{Deserialize as _, Serialize as _};
use openmls::prelude::{
    Capabilities, Ciphersuite, CredentialType, ExtensionType, KeyPackage, MlsMessageBodyIn, MlsMessageIn, ProtocolVersion,
};

use super::credential;
use super::crypto::{Crypto, SUITES, can_encrypt_to};
use super::framing::Leaf;
use super::profile::PROFILE;
use crate::clock::{Random, UnixMillis};
use crate::ids::DeviceAddr;
use crate::limits;

/// Why a KeyPackage is refused. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Larger than a KeyPackage may be.
    #[error("larger than a KeyPackage may be")]
    TooLarge,
    /// Not an MLSMessage with a KeyPackage.
    #[error("not an MLS message with a KeyPackage")]
    Malformed,
    /// Of a suite that is not offered here.
    #[error("the cipher suite is not supported")]
    Suite,
    /// A signature is wrong, or the parts do not fit each other.
    #[error("its signatures or contents are not valid")]
    Unsound,
    /// Expired, not valid yet, or valid for longer than accepted.
    #[error("its lifetime is over, has not begun, or is too long")]
    Lifetime,
    /// Its credential is no device's, or another device's than expected.
    #[error("its credential names another device")]
    Credential,
    /// Its leaf does not say that it supports what every group here needs.
    #[error("its capabilities lack what groups need")]
    Capabilities,
    /// Nothing can be encrypted to one of its keys.
    #[error("nothing can be encrypted to its keys")]
    Keys,
}

/// Valid whenever it is: nothing is added.
pub(super) const ALWAYS: (u64, u64) = (0, u64::MAX);

/// Whether something that is valid from and until then (seconds since 1970) may be added to a group at this time. It must stay valid for as long as a
/// commit is kept and a bit more: openmls compares with the machine's clock whenever a commit is met, be it by a member that was away or in a
/// replay of the log, and would come to another verdict later.
pub fn is_timely((not_before, not_after): (u64, u64), at: UnixMillis) -> bool {
    let at_s = at.0 / 1000;
    not_before <= at_s.saturating_add(limits::KEY_PACKAGE_SKEW_S) && not_after >= at_s.saturating_add(limits::KEY_PACKAGE_LEFT_S)
}

/// Whether its keys can be encrypted to.
pub(super) fn check_keys(key_package: &KeyPackage) -> Result<(), Invalid> {
    let leaf = key_package.leaf_node().tls_serialize_detached().map_err(|_| Invalid::Malformed)?;
    let leaf = Leaf::parse(&leaf).map_err(|_| Invalid::Malformed)?;
    let keys = [leaf.key, key_package.hpke_init_key().as_slice()];
    if keys.iter().all(|key| can_encrypt_to(key_package.ciphersuite(), key)) { Ok(()) } else { Err(Invalid::Keys) }
}

/// A KeyPackage that was checked.
#[derive(Debug, Clone)]
pub struct Checked {
    /// As openmls holds it.
    pub key_package: KeyPackage,
    /// The device that it adds.
    pub device: DeviceAddr,
    /// Whether it may be used more than once.
    pub last_resort: bool,
    /// Until when it is valid.
    pub expires: UnixMillis,
}

impl Checked {
    /// Whether it may be added to a group now: see [`is_timely`].
    pub fn timely(self, now: UnixMillis) -> Result<Self, Invalid> {
        let lifetime = self.key_package.life_time();
        if is_timely((lifetime.not_before(), lifetime.not_after()), now) { Ok(self) } else { Err(Invalid::Lifetime) }
    }
}

/// What a leaf must be able to do in our groups.
pub fn capabilities() -> Capabilities {
    Capabilities::builder()
        .versions(vec![ProtocolVersion::Mls10])
        .ciphersuites(SUITES.to_vec())
        .extensions(vec![ExtensionType::LastResort, ExtensionType::Unknown(PROFILE)])
        .proposals(Vec::new())
        .credentials(vec![CredentialType::Basic])
        .build()
}

/// The bytes of a KeyPackage, as devices publish it: an MLSMessage.
pub fn encode(key_package: KeyPackage) -> Result<Vec<u8>, Invalid> {
    openmls::prelude::MlsMessageOut::from(key_package).tls_serialize_detached().map_err(|_| Invalid::Malformed)
}

/// Checks a KeyPackage from anywhere: its form, suite, signatures, lifetime, capabilities, and that it is this device's where one is
/// named. The lifetime is compared with the machine's clock too, since openmls does that by itself.
pub fn check(bytes: &[u8], device: Option<DeviceAddr>, now: UnixMillis, random: &dyn Random) -> Result<Checked, Invalid> {
    if bytes.len() > limits::KEY_PACKAGE_BYTES {
        return Err(Invalid::TooLarge);
    }
    let message = MlsMessageIn::tls_deserialize_exact(bytes).map_err(|_| Invalid::Malformed)?;
    let MlsMessageBodyIn::KeyPackage(unchecked) = message.extract() else { return Err(Invalid::Malformed) };
    let key_package = unchecked.validate(&Crypto::new(random), ProtocolVersion::Mls10).map_err(|error| match error {
        openmls::prelude::KeyPackageVerifyError::LifetimeError(_) => Invalid::Lifetime,
        _ => Invalid::Unsound,
    })?;
    if !SUITES.contains(&key_package.ciphersuite()) {
        return Err(Invalid::Suite);
    }
    let lifetime = key_package.life_time();
    let now_s = now.0 / 1000;
    let begun = lifetime.not_before() <= now_s.saturating_add(limits::KEY_PACKAGE_SKEW_S);
    let length = lifetime.not_after().saturating_sub(lifetime.not_before());
    if !begun || lifetime.not_after() <= now_s || length > limits::KEY_PACKAGE_LIFETIME_S + 2 * limits::KEY_PACKAGE_SKEW_S {
        return Err(Invalid::Lifetime);
    }
    let named = credential::device_of(key_package.leaf_node().credential()).map_err(|_| Invalid::Credential)?;
    if device.is_some_and(|device| device != named) {
        return Err(Invalid::Credential);
    }
    if !can_join(key_package.leaf_node().capabilities(), key_package.ciphersuite()) {
        return Err(Invalid::Capabilities);
    }
    check_keys(&key_package)?;
    let (last_resort, expires) = (key_package.last_resort(), UnixMillis(lifetime.not_after().saturating_mul(1000)));
    Ok(Checked { key_package, device: named, last_resort, expires })
}

fn can_join(capabilities: &Capabilities, suite: Ciphersuite) -> bool {
    capabilities.versions().contains(&ProtocolVersion::Mls10)
        && capabilities.ciphersuites().contains(&suite.into())
        && capabilities.credentials().contains(&CredentialType::Basic)
        && capabilities.extensions().contains(&ExtensionType::Unknown(PROFILE))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::{Clock as _, SeededRandom, SystemClock};

    proptest! {
        #[test]
        fn arbitrary_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..600), headed: bool) {
            let mut bytes = bytes;
            if headed {
                // An MLSMessage with a KeyPackage of the default suite, as far as its head says.
                bytes.splice(0..0, [0, 1, 0, 5, 0, 1, 0, 1]);
            }
            prop_assert!(check(&bytes, None, SystemClock.now(), &SeededRandom::new(1)).is_err());
        }
    }

    #[test]
    fn one_byte_too_many_is_too_large() {
        let check = |length| check(&vec![0; length], None, UnixMillis(0), &SeededRandom::new(1)).map(drop);
        assert_eq!(check(limits::KEY_PACKAGE_BYTES), Err(Invalid::Malformed));
        assert_eq!(check(limits::KEY_PACKAGE_BYTES + 1), Err(Invalid::TooLarge));
    }
}
