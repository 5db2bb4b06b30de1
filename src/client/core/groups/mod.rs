//! Groups of MLS (RFC 9420), without I/O: every operation works on one [`StateTx`](crate::client::core::state::StateTx), and what it
//! changed is committed with it or not at all. A [`Group`] whose transaction was dropped must be dropped too, and loaded again.
//!
//! The server orders commits and answers each with a verdict. So a change has two steps: [`Group::change`] leaves it pending and returns
//! what to send (commit it before sending); the verdict is [`Group::accepted`] or [`Group::refused`]. Members learn of the others'
//! commits by [`Group::receive`], which checks them against the group's rules once more ([`crate::mls::rules`]).

mod engine;
mod group;
mod group_info;
mod signer;

pub use engine::Engine;
pub use group::{Change, Group, Keys, LeafKeys, Received};

use super::state::StorageError;
use crate::mls::profile::{self, NameKey};
use crate::mls::rules::Denied;
use crate::mls::{key_package, rules, storage};

/// Why an operation on a group did not work. After any of them the transaction must be dropped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See there.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The group's rules forbid it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// A KeyPackage can't be used.
    #[error("a KeyPackage can't be used: {0}")]
    KeyPackage(#[from] key_package::Invalid),
    /// The name or the profile can't be used.
    #[error(transparent)]
    Profile(#[from] profile::Invalid),
    /// This device is not, or no longer, in the group.
    #[error("this device is not in the group")]
    NotMember,
    /// This device has lost touch with the group. It joins again by itself: try later.
    #[error("this device has lost touch with the group and is about to join it again; try again later")]
    OutOfTouch,
    /// A commit whose tags are wrong. They are keyed by the group's secrets, so the server can't tell and gave it to everybody: nobody who was
    /// in the epoch that it ends can take it in.
    #[error("a commit's tags are wrong: nobody can take it in")]
    Tags,
    /// There is a change of ours whose verdict is not known yet.
    #[error("a change of the group waits for its verdict")]
    Pending,
    /// The message is of a later epoch: commits between were missed. Fetch them, or join again by [`Engine::rejoin`].
    #[error("the group is at epoch {have} here and at {got} elsewhere")]
    Missed {
        /// The epoch here.
        have: u64,
        /// The message's.
        got: u64,
    },
    /// A commit or proposal of an epoch that is over, or a message older than the keys that are kept. Drop it.
    #[error("the message is of an epoch that is over")]
    Past,
    /// The Welcome is for none of this device's KeyPackages.
    #[error("the invitation is for none of this device's keys")]
    NotForUs,
    /// Bytes that are not what they should be, or a signature, tag or hash that is wrong. The server never forwards such a commit: if it
    /// did, this member and the others may have parted, and it has to join again.
    #[error("not valid in this group: {0}")]
    Invalid(String),
}

impl From<storage::Error> for Error {
    fn from(error: storage::Error) -> Self {
        Self::Storage(StorageError(error.to_string()))
    }
}

impl Error {
    fn invalid(error: impl std::fmt::Display) -> Self {
        Self::Invalid(error.to_string())
    }

    fn crypto(error: openmls_traits::types::CryptoError) -> Self {
        Self::invalid(error)
    }
}

/// What a commit sends: all of it in one request.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// The epoch that it begins, if it is accepted.
    pub epoch: u64,
    /// The commit: an MLSMessage with a PublicMessage.
    pub commit: Vec<u8>,
    /// For who is added: an MLSMessage with a Welcome.
    pub welcome: Option<Vec<u8>>,
    /// The GroupInfo of the new epoch, without tree, for who joins again: an MLSMessage.
    pub group_info: Vec<u8>,
}

/// What the creator of a group sends.
#[derive(Debug, Clone)]
pub struct Created {
    /// The GroupInfo of epoch 0, without tree: an MLSMessage.
    pub group_info: Vec<u8>,
    /// The ratchet tree of epoch 0, as in RFC 9420's extension.
    pub tree: Vec<u8>,
}

/// What a commit did, for the application to show.
#[derive(Debug, Clone)]
pub struct Committed {
    /// The epoch that it began.
    pub epoch: u64,
    /// What it changed.
    pub changes: rules::Changes,
    /// The group before it.
    pub before: rules::Roster,
}

/// The key of a group's name, from its bytes.
pub fn name_key(bytes: &[u8]) -> Result<NameKey, Error> {
    Ok(NameKey::from_slice(bytes)?)
}

/// What a device needs to read a group's name, where it has the key.
fn name_of(
    profile: &profile::Profile,
    key: Option<&NameKey>,
    group: crate::ids::GroupId,
    random: &dyn crate::clock::Random,
) -> Option<String> {
    profile::open_name(&profile.sealed_name, key?, group, random).ok()
}

#[cfg(test)]
mod tests;
