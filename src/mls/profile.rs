//! What a group knows of itself beyond its members: roles, which everybody may read, and its name, which only members can. It stands
//! in the GroupContext, so that all members of an epoch agree on it.
//!
//! The extension [`PROFILE`]:
//!
//! | bytes | what |
//! |---|---|
//! | 1 | version, 1 |
//! | 16 | account of the owner |
//! | 2 | number of admins, big endian |
//! | 16 each | accounts of the admins, ascending, without the owner |
//! | 430 | the name: nonce (12), then ChaCha20-Poly1305 under the group's name key of: length in bytes (2, big endian), UTF-8, zeros up to 402 |
//!
//! The associated data of the name is `sealpost group name v1` and the group id (16 bytes). The name key is 32 random bytes that the
//! creator draws. Who is added finds it in the extension [`NAME_KEY`] of the GroupInfo inside its Welcome, which the server can't read.

use openmls_traits::crypto::OpenMlsCrypto as _;
use openmls_traits::types::AeadType;
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::crypto::Crypto;
use crate::clock::Random;
use crate::ids::{AccountId, GroupId};
use crate::limits;

/// The extension of the GroupContext with roles and name.
pub const PROFILE: u16 = 0xf0a1;
/// The extension of a Welcome's GroupInfo with the name key. Never in a GroupInfo that anybody but a joiner gets.
pub const NAME_KEY: u16 = 0xf0a2;

const VERSION: u8 = 1;
const NONCE: usize = 12;
const PADDED: usize = 2 + 4 * limits::GROUP_NAME_CHARS;
/// Bytes of a sealed name, whatever its length.
pub const SEALED_NAME: usize = NONCE + PADDED + 16;
const NAME_CONTEXT: &[u8] = b"sealpost group name v1";

/// What an account may do in a group. Later ones may do what earlier ones may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Write, update its own leaves, add and remove its own devices, leave.
    Member,
    /// Add accounts, remove members, rename.
    Admin,
    /// Appoint and remove admins, pass ownership on. One a group.
    Owner,
}

/// Why a profile can't be used. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// Not the documented bytes, or admins that are too many, unsorted, doubled, or the owner.
    #[error("the group's profile is not valid")]
    Profile,
    /// Longer than a group's name may be, or empty.
    #[error("a group's name has 1 to {} characters", limits::GROUP_NAME_CHARS)]
    Name,
    /// The name does not open under this key.
    #[error("the group's name can't be read with the key at hand")]
    NameKey,
}

/// The key of a group's name: members have it, the server has not.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct NameKey([u8; 32]);

impl NameKey {
    /// A new random one.
    pub fn random(random: &dyn Random) -> Self {
        let mut key = Self([0; 32]);
        random.fill(&mut key.0);
        key
    }

    /// From its 32 bytes.
    pub fn from_slice(bytes: &[u8]) -> Result<Self, Invalid> {
        bytes.try_into().map(Self).map_err(|_| Invalid::NameKey)
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::fmt::Debug for NameKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("NameKey(…)")
    }
}

/// Roles and name of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// The owner's account.
    pub owner: AccountId,
    /// The admins' accounts: ascending, without the owner.
    pub admins: Vec<AccountId>,
    /// The name, sealed for members: [`SEALED_NAME`] bytes.
    pub sealed_name: Vec<u8>,
}

impl Profile {
    /// The extension's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(19 + self.admins.len() * 16 + self.sealed_name.len());
        bytes.push(VERSION);
        bytes.extend_from_slice(self.owner.as_bytes());
        bytes.extend_from_slice(&(self.admins.len() as u16).to_be_bytes());
        for admin in &self.admins {
            bytes.extend_from_slice(admin.as_bytes());
        }
        bytes.extend_from_slice(&self.sealed_name);
        bytes
    }

    /// From the extension's bytes; there is one encoding for a profile.
    pub fn decode(bytes: &[u8]) -> Result<Self, Invalid> {
        let (&version, rest) = bytes.split_first().ok_or(Invalid::Profile)?;
        let (owner, rest) = rest.split_at_checked(16).ok_or(Invalid::Profile)?;
        let (count, rest) = rest.split_first_chunk::<2>().ok_or(Invalid::Profile)?;
        let (admins, sealed_name) = rest.split_at_checked(usize::from(u16::from_be_bytes(*count)) * 16).ok_or(Invalid::Profile)?;
        let account = |bytes: &[u8]| AccountId::from_slice(bytes).map_err(|_| Invalid::Profile);
        let profile = Self {
            owner: account(owner)?,
            admins: admins.chunks_exact(16).map(account).collect::<Result<_, _>>()?,
            sealed_name: sealed_name.to_vec(),
        };
        let sorted = profile.admins.is_sorted_by(|one, next| one < next) && !profile.admins.contains(&profile.owner);
        let sound = version == VERSION && profile.admins.len() <= limits::GROUP_ADMINS && sealed_name.len() == SEALED_NAME && sorted;
        if sound { Ok(profile) } else { Err(Invalid::Profile) }
    }

    /// The role of an account that is in the group.
    pub fn role(&self, account: AccountId) -> Role {
        if account == self.owner {
            Role::Owner
        } else if self.admins.binary_search(&account).is_ok() {
            Role::Admin
        } else {
            Role::Member
        }
    }

    /// This profile once only these accounts are left, in the order of their first leaves: who is gone has no role, and a group without
    /// an owner goes to its first admin, else to its first account. Everybody comes to the same.
    pub fn among(&self, accounts: &[AccountId]) -> Self {
        let mut admins: Vec<AccountId> = self.admins.iter().copied().filter(|admin| accounts.contains(admin)).collect();
        let mut owner = self.owner;
        if !accounts.contains(&owner) {
            owner = accounts.iter().copied().find(|account| admins.contains(account)).or(accounts.first().copied()).unwrap_or(owner);
            admins.retain(|admin| *admin != owner);
        }
        Self { owner, admins, sealed_name: self.sealed_name.clone() }
    }
}

/// Whether this may be a group's name.
pub fn check_name(name: &str) -> Result<(), Invalid> {
    if (1..=limits::GROUP_NAME_CHARS).contains(&name.chars().count()) { Ok(()) } else { Err(Invalid::Name) }
}

fn associated(group: GroupId) -> Vec<u8> {
    [NAME_CONTEXT, group.as_bytes()].concat()
}

/// Seals a group's name for its members.
pub fn seal_name(name: &str, key: &NameKey, group: GroupId, random: &dyn Random) -> Result<Vec<u8>, Invalid> {
    check_name(name)?;
    let mut padded = Zeroizing::new(vec![0; PADDED]);
    padded[..2].copy_from_slice(&(name.len() as u16).to_be_bytes());
    padded[2..2 + name.len()].copy_from_slice(name.as_bytes());
    let mut sealed = vec![0; NONCE];
    random.fill(&mut sealed);
    let ciphertext = Crypto::new(random)
        .aead_encrypt(AeadType::ChaCha20Poly1305, key.as_bytes(), &padded, &sealed, &associated(group))
        .map_err(|_| Invalid::NameKey)?;
    sealed.extend_from_slice(&ciphertext);
    Ok(sealed)
}

/// Opens a group's name.
pub fn open_name(sealed: &[u8], key: &NameKey, group: GroupId, random: &dyn Random) -> Result<String, Invalid> {
    let (nonce, ciphertext) = sealed.split_at_checked(NONCE).ok_or(Invalid::NameKey)?;
    let padded = Crypto::new(random)
        .aead_decrypt(AeadType::ChaCha20Poly1305, key.as_bytes(), ciphertext, nonce, &associated(group))
        .map_err(|_| Invalid::NameKey)?;
    let padded = Zeroizing::new(padded);
    let (length, rest) = padded.split_first_chunk::<2>().ok_or(Invalid::Name)?;
    let name = rest.get(..usize::from(u16::from_be_bytes(*length))).ok_or(Invalid::Name)?;
    let name = std::str::from_utf8(name).map_err(|_| Invalid::Name)?;
    check_name(name)?;
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SeededRandom;

    const GROUP: GroupId = GroupId::from_bytes([0x6a; 16]);

    fn account(byte: u8) -> AccountId {
        AccountId::from_bytes([byte; 16])
    }

    #[test]
    fn a_profile_has_one_encoding() {
        let profile = Profile { owner: account(5), admins: vec![account(1), account(9)], sealed_name: vec![7; SEALED_NAME] };
        let bytes = profile.encode();
        assert_eq!(Profile::decode(&bytes), Ok(profile.clone()));
        for end in 0..bytes.len() {
            assert!(Profile::decode(&bytes[..end]).is_err());
        }
        assert!(Profile::decode(&[bytes.as_slice(), &[0]].concat()).is_err());
        for admins in [vec![account(9), account(1)], vec![account(1), account(1)], vec![account(5)]] {
            assert!(Profile::decode(&Profile { admins, ..profile.clone() }.encode()).is_err());
        }
        let many = (0..=limits::GROUP_ADMINS).map(|n| AccountId::from_bytes((n as u128 + (1 << 64)).to_be_bytes())).collect::<Vec<_>>();
        assert!(Profile::decode(&Profile { admins: many[1..].to_vec(), ..profile.clone() }.encode()).is_ok());
        assert!(Profile::decode(&Profile { admins: many, ..profile }.encode()).is_err());
    }

    #[test]
    fn roles_of_who_is_left() {
        let profile = Profile { owner: account(5), admins: vec![account(1), account(9)], sealed_name: Vec::new() };
        assert_eq!([1, 2, 5, 9].map(|n| profile.role(account(n))), [Role::Admin, Role::Member, Role::Owner, Role::Admin]);
        let left = |accounts: &[u8]| {
            let left = profile.among(&accounts.iter().map(|&n| account(n)).collect::<Vec<_>>());
            (left.owner, left.admins)
        };
        assert_eq!(left(&[2, 5, 9]), (account(5), vec![account(9)]));
        assert_eq!(left(&[2, 9, 1]), (account(9), vec![account(1)]));
        assert_eq!(left(&[3, 2]), (account(3), vec![]));
    }

    #[test]
    fn names_are_sealed_for_members_at_one_length() {
        let random = SeededRandom::new(1);
        let key = NameKey::random(&random);
        for name in ["a", "Wandern 🥾", &"🥾".repeat(limits::GROUP_NAME_CHARS)] {
            let sealed = seal_name(name, &key, GROUP, &random).expect("a name");
            assert_eq!(sealed.len(), SEALED_NAME);
            assert_eq!(open_name(&sealed, &key, GROUP, &random).as_deref(), Ok(name));
            assert_eq!(open_name(&sealed, &NameKey::random(&random), GROUP, &random), Err(Invalid::NameKey));
            assert_eq!(open_name(&sealed, &key, GroupId::from_bytes([1; 16]), &random), Err(Invalid::NameKey));
        }
        for name in ["", &"x".repeat(limits::GROUP_NAME_CHARS + 1)] {
            assert_eq!(seal_name(name, &key, GROUP, &random), Err(Invalid::Name));
        }
    }
}
