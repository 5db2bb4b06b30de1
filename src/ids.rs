//! Newtypes for every id and position. Parsed at the edge, trusted inside.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};

use crate::limits;

/// Why a text or a number is not the id it should be. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a valid {0}")]
pub struct InvalidId(pub &'static str);

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
        #[serde(into = "String", try_from = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            /// From its 16 bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// From a slice, which must be 16 bytes long.
            pub fn from_slice(bytes: &[u8]) -> Result<Self, InvalidId> {
                bytes.try_into().map(Self).map_err(|_| InvalidId($what))
            }

            /// A new random id (RFC 9562, version 4).
            pub fn random(random: &dyn crate::clock::Random) -> Self {
                let mut bytes = [0; 16];
                random.fill(&mut bytes);
                Self(uuid::Builder::from_random_bytes(bytes).into_uuid().into_bytes())
            }

            /// Its 16 bytes.
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                uuid::Uuid::from_bytes(self.0).hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                uuid::Uuid::try_parse(text).map(|id| Self(id.into_bytes())).map_err(|_| InvalidId($what))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

uuid_id! {
    /// One person's messaging identity; realm identities are linked to it. Random, so it says nothing.
    AccountId, "account id (a UUID)"
}
uuid_id! {
    /// One MLS group. Random; its 16 bytes are the group id of RFC 9420.
    GroupId, "group id (a UUID)"
}
uuid_id! {
    /// One running edge process; new at every start, so that routes of an earlier life are known to be dead.
    EdgeId, "edge id (a UUID)"
}

/// One installation of an app within its account: 1 to 127, the range of the Signal protocol's device ids.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub struct DeviceId(u8);

impl DeviceId {
    /// The highest device id that the Signal protocol knows.
    pub const MAX: u8 = 127;

    /// From its number, 1 to 127.
    pub const fn new(number: u32) -> Result<Self, InvalidId> {
        if number >= 1 && number <= Self::MAX as u32 { Ok(Self(number as u8)) } else { Err(InvalidId("device id (1 to 127)")) }
    }

    /// Its number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u8> for DeviceId {
    type Error = InvalidId;
    fn try_from(number: u8) -> Result<Self, InvalidId> {
        Self::new(u32::from(number))
    }
}

impl From<DeviceId> for u8 {
    fn from(id: DeviceId) -> u8 {
        id.0
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceId({})", self.0)
    }
}

/// A device's full address: account and device. Written `account.device`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct DeviceAddr {
    /// The account it belongs to.
    pub account: AccountId,
    /// Its number within the account.
    pub device: DeviceId,
}

impl fmt::Display for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.account, self.device)
    }
}

impl fmt::Debug for DeviceAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceAddr({self})")
    }
}

/// Tells apart two installations that had the same device id: 1 to 16,380, as in the Signal protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(into = "u32", try_from = "u32")]
pub struct RegistrationId(u16);

impl RegistrationId {
    /// The highest registration id.
    pub const MAX: u32 = 16_380;

    /// From its number, 1 to 16,380.
    pub const fn new(number: u32) -> Result<Self, InvalidId> {
        if number >= 1 && number <= Self::MAX { Ok(Self(number as u16)) } else { Err(InvalidId("registration id (1 to 16380)")) }
    }

    /// Its number.
    pub const fn get(self) -> u32 {
        self.0 as u32
    }
}

impl TryFrom<u32> for RegistrationId {
    type Error = InvalidId;
    fn try_from(number: u32) -> Result<Self, InvalidId> {
        Self::new(number)
    }
}

impl From<RegistrationId> for u32 {
    fn from(id: RegistrationId) -> u32 {
        id.get()
    }
}

/// A counter that grows for each pair (sending device, recipient account); from 1.
/// The server drops what it has seen, so a retry with the same id is safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ClientMessageId(pub u64);

/// A position within one partition of the log; the first record is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Offset(pub u64);

impl Offset {
    /// The position after this one.
    pub const fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// An ordered shard of a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Partition(pub u16);

impl Partition {
    /// The partition of an account, the same on every profile and for ever: SipHash-1-3 with a zero
    /// key over the 16 bytes of the id, modulo the number of partitions.
    #[cfg(feature = "server")]
    pub fn of(account: &AccountId, partitions: u16) -> Self {
        Self::hashed(account.as_bytes(), partitions)
    }

    /// The partition of a group, by the same hash over its id.
    #[cfg(feature = "server")]
    pub fn of_group(group: &GroupId, partitions: u16) -> Self {
        Self::hashed(group.as_bytes(), partitions)
    }

    #[cfg(feature = "server")]
    fn hashed(id: &[u8; 16], partitions: u16) -> Self {
        use std::hash::Hasher as _;
        let mut hasher = siphasher::sip::SipHasher13::new();
        hasher.write(id);
        Self((hasher.finish() % u64::from(partitions.max(1))) as u16)
    }
}

/// One numbering of partitions; scaling the partition count starts a new one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u16);

/// An envelope's position in its device's inbox: strictly growing, derived from the log position.
/// The generation is in the high 16 bits, the log offset plus one in the low 48, so that 0 is "before everything".
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Seq(pub u64);

impl Seq {
    /// Before every envelope.
    pub const ZERO: Self = Self(0);
    /// The highest one.
    pub const MAX: Self = Self(u64::MAX);

    /// The seq of the envelopes in the record at this position.
    pub const fn at(generation: Generation, offset: Offset) -> Self {
        Self(((generation.0 as u64) << 48) | ((offset.0 + 1) & ((1 << 48) - 1)))
    }
}

impl fmt::Debug for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seq({}:{})", self.0 >> 48, self.0 & ((1 << 48) - 1))
    }
}

/// One attachment of a device to an edge; a newer one of the same device wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub struct AttachId(pub u64);

/// A platform that owns users: 1 to 32 of `a-z`, `0-9` and `-`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct RealmId(String);

impl RealmId {
    /// The name itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RealmId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        let ok = (1..=limits::REALM_NAME_BYTES).contains(&text.len())
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        if ok { Ok(Self(text)) } else { Err(InvalidId("realm (1 to 32 of a-z, 0-9 and -)")) }
    }
}

impl FromStr for RealmId {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        Self::try_from(text.to_owned())
    }
}

impl From<RealmId> for String {
    fn from(id: RealmId) -> String {
        id.0
    }
}

impl fmt::Display for RealmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A user of a realm, written `user@realm`: the `sub` of the realm's tokens and the realm's name.
/// The user part is 1 to 128 bytes without control characters, white space, `/` and `@`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Identity {
    user: String,
    realm: RealmId,
}

impl Identity {
    /// From its two parts.
    pub fn new(user: &str, realm: RealmId) -> Result<Self, InvalidId> {
        let ok = (1..=limits::USER_NAME_BYTES).contains(&user.len())
            && !user.chars().any(|c| c.is_control() || c.is_whitespace() || c == '/' || c == '@');
        if ok { Ok(Self { user: user.to_owned(), realm }) } else { Err(InvalidId("identity (user@realm)")) }
    }

    /// The realm's own id of the user.
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The realm.
    pub fn realm(&self) -> &RealmId {
        &self.realm
    }
}

impl FromStr for Identity {
    type Err = InvalidId;
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let (user, realm) = text.rsplit_once('@').ok_or(InvalidId("identity (user@realm)"))?;
        Self::new(user, realm.parse()?)
    }
}

impl TryFrom<String> for Identity {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<Identity> for String {
    fn from(id: Identity) -> String {
        id.to_string()
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.user, self.realm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seq_orders_by_generation_then_offset() {
        let old = Seq::at(Generation(0), Offset(u32::MAX as u64));
        let new = Seq::at(Generation(1), Offset(0));
        assert!(Seq::ZERO < Seq::at(Generation(0), Offset(0)));
        assert!(old < new);
    }

    /// Golden vectors: changing the hash would send an account's envelopes to another partition.
    #[test]
    fn partition_hash_is_stable() {
        let parts: Vec<u16> = (0u8..8).map(|i| Partition::of(&AccountId::from_bytes([i; 16]), 16).0).collect();
        assert_eq!(parts, GOLDEN_PARTITIONS);
    }
    const GOLDEN_PARTITIONS: [u16; 8] = [0, 7, 2, 6, 5, 10, 6, 11];

    #[test]
    fn identities_parse_and_print() {
        let id: Identity = "alice@socialink".parse().expect("valid");
        assert_eq!((id.user(), id.realm().as_str(), id.to_string().as_str()), ("alice", "socialink", "alice@socialink"));
        for bad in ["", "alice", "@x", "a@", "a b@x", "a/b@x", "a@X", &format!("a@{}", "r".repeat(33)), &format!("{}@x", "u".repeat(129))] {
            assert!(bad.parse::<Identity>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn numbers_outside_their_range_are_refused() {
        assert!(DeviceId::new(0).is_err() && DeviceId::new(128).is_err() && DeviceId::new(127).is_ok());
        assert!(RegistrationId::new(0).is_err() && RegistrationId::new(16_381).is_err() && RegistrationId::new(16_380).is_ok());
        assert!(AccountId::from_slice(&[0; 15]).is_err());
    }
}
