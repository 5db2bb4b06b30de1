//! A group as everybody may see it: its tree, context and proposals, without a key. What a server checks commits with.

use std::cell::RefCell;
use std::collections::BTreeMap;

use openmls::prelude::tls_codec::Deserialize as _;
use openmls::prelude::{
    GroupId as MlsGroupId, MlsMessageBodyIn, MlsMessageIn, ProcessedMessageContent, ProposalStore, ProtocolMessage, PublicGroup,
    QueuedProposal, RatchetTreeIn, Sender, StagedCommit,
};
use zeroize::Zeroizing;

use super::crypto::{Crypto, SUITES};
use super::profile::NAME_KEY;
use super::rules::{self, Actor, Changes, Denied, Roster};
use super::sender;
use super::storage::{Backend, Error as StorageError, Kind, Storage};
use crate::clock::Random;
use crate::ids::{DeviceAddr, GroupId};
use crate::limits;

/// Why a message of a group is refused. Retrying never helps.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Not the bytes that MLS or this service wants, a wrong signature, or not valid in the group.
    #[error("not valid: {0}")]
    Invalid(String),
    /// Of another epoch than the group's: somebody else was first.
    #[error("the group is at epoch {have}, the message at {got}")]
    Epoch {
        /// The group's.
        have: u64,
        /// The message's.
        got: u64,
    },
    /// The group's rules forbid it.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// Larger than a commit may be.
    #[error("larger than a commit may be")]
    TooLarge,
}

impl Refused {
    fn invalid(error: impl std::fmt::Display) -> Self {
        Self::Invalid(error.to_string())
    }
}

/// Values by their kind and key.
type Values = BTreeMap<(u8, Vec<u8>), Zeroizing<Vec<u8>>>;

/// Values in memory: how a group is saved and read back.
#[derive(Debug, Default)]
struct Memory(RefCell<Values>);

impl Backend for Memory {
    fn get(&self, kind: Kind, key: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, StorageError> {
        Ok(self.0.borrow().get(&(kind as u8, key.to_vec())).cloned())
    }

    fn put(&self, kind: Kind, key: Vec<u8>, value: Zeroizing<Vec<u8>>) {
        self.0.borrow_mut().insert((kind as u8, key), value);
    }

    fn delete(&self, kind: Kind, key: Vec<u8>) {
        self.0.borrow_mut().remove(&(kind as u8, key));
    }
}

impl Memory {
    /// For each value: kind (1), length of its key (4, big endian), key, length (4), value.
    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for ((kind, key), value) in self.0.borrow().iter() {
            bytes.push(*kind);
            for part in [key, &**value] {
                bytes.extend_from_slice(&(part.len() as u32).to_be_bytes());
                bytes.extend_from_slice(part);
            }
        }
        bytes
    }

    fn decode(mut bytes: &[u8]) -> Option<Self> {
        fn part<'b>(bytes: &mut &'b [u8]) -> Option<&'b [u8]> {
            let (length, rest) = bytes.split_first_chunk::<4>()?;
            let (part, rest) = rest.split_at_checked(u32::from_be_bytes(*length) as usize)?;
            *bytes = rest;
            Some(part)
        }
        let mut values = Values::new();
        while let Some((&kind, rest)) = bytes.split_first() {
            bytes = rest;
            let key = part(&mut bytes)?.to_vec();
            values.insert((kind, key), Zeroizing::new(part(&mut bytes)?.to_vec()));
        }
        Some(Self(RefCell::new(values)))
    }
}

/// Keeps nothing: most commits are not worth a copy of the tree.
#[derive(Debug, Default)]
pub(super) struct Nowhere;

impl Backend for Nowhere {
    fn get(&self, _: Kind, _: &[u8]) -> Result<Option<Zeroizing<Vec<u8>>>, StorageError> {
        Ok(None)
    }

    fn put(&self, _: Kind, _: Vec<u8>, _: Zeroizing<Vec<u8>>) {}

    fn delete(&self, _: Kind, _: Vec<u8>) {}

    fn keeps(&self, _: Kind) -> bool {
        false
    }
}

/// The public state of a group at one epoch.
pub struct Public {
    id: GroupId,
    group: PublicGroup,
}

/// A valid commit that the group's rules allow, not merged yet.
pub struct Checked {
    commit: StagedCommit,
    /// What it changes.
    pub changes: Changes,
    /// The group after it.
    pub after: Roster,
    /// The KeyPackageRef (RFC 9420, section 5.2) that each added device is invited with, in the order of `changes.added`.
    pub invited: Vec<(DeviceAddr, Vec<u8>)>,
}

/// A valid proposal that the group's rules allow.
pub struct CheckedProposal {
    proposal: QueuedProposal,
    /// Who proposes.
    pub by: Actor,
    /// The leaf that it wants removed.
    pub leaf: u32,
}

/// The group that a GroupInfo (an MLSMessage) speaks of. Nothing about it is verified.
pub fn group_of(group_info: &[u8]) -> Result<GroupId, Refused> {
    let MlsMessageBodyIn::GroupInfo(info) = body(group_info)? else { return Err(Refused::invalid("not a GroupInfo")) };
    GroupId::from_slice(info.group_id().as_slice()).map_err(Refused::invalid)
}

impl Public {
    /// A group that somebody creates: from its GroupInfo (an MLSMessage) and tree, which must hold a sound group.
    pub fn create(group_info: &[u8], tree: &[u8], random: &dyn Random) -> Result<Self, Refused> {
        Self::create_in(&Storage(Nowhere), group_info, tree, random)
    }

    /// As [`create`](Self::create), and returns the group as bytes, as [`merge_and_save`](Self::merge_and_save) does.
    pub fn create_and_save(group_info: &[u8], tree: &[u8], random: &dyn Random) -> Result<(Self, Vec<u8>), Refused> {
        let memory = Storage(Memory::default());
        let created = Self::create_in(&memory, group_info, tree, random)?;
        Ok((created, memory.0.encode()))
    }

    fn create_in<B: Backend>(storage: &Storage<B>, group_info: &[u8], tree: &[u8], random: &dyn Random) -> Result<Self, Refused> {
        let MlsMessageBodyIn::GroupInfo(info) = body(group_info)? else { return Err(Refused::invalid("not a GroupInfo")) };
        if info.extensions().unknown(NAME_KEY).is_some() {
            return Err(Refused::invalid("the GroupInfo shows the key of the group's name"));
        }
        if !SUITES.contains(&info.ciphersuite()) {
            return Err(Refused::invalid("the cipher suite is not supported"));
        }
        let id = GroupId::from_slice(info.group_id().as_slice()).map_err(Refused::invalid)?;
        let tree = RatchetTreeIn::tls_deserialize_exact(tree).map_err(Refused::invalid)?;
        let (group, _) =
            PublicGroup::from_external(&Crypto::new(random), storage, tree, info, ProposalStore::new()).map_err(Refused::invalid)?;
        Roster::of(&group)?.check()?;
        Ok(Self { id, group })
    }

    /// The group's id.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// The epoch that it is at.
    pub fn epoch(&self) -> u64 {
        self.group.group_context().epoch().as_u64()
    }

    /// Who is in it.
    pub fn roster(&self) -> Result<Roster, Denied> {
        Roster::of(&self.group)
    }

    /// Whether members listen to proposals of a server with this public key, and of nobody else outside; `None`: of nobody at all.
    pub fn listens_to(&self, server: &[u8]) -> Option<bool> {
        let senders = self.group.group_context().extensions().external_senders().filter(|senders| !senders.is_empty())?;
        Some(senders.as_slice() == [sender::external_sender(server)])
    }

    /// The hash of the tree.
    pub fn tree_hash(&self) -> &[u8] {
        self.group.group_context().tree_hash()
    }

    /// The tree, as in RFC 9420's extension: what joiners need.
    pub fn tree(&self) -> Result<Vec<u8>, Refused> {
        use openmls::prelude::tls_codec::Serialize as _;
        self.group.export_ratchet_tree().tls_serialize_detached().map_err(Refused::invalid)
    }

    /// Checks a commit (an MLSMessage with a PublicMessage) of the current epoch. Nothing changes before it is merged.
    pub fn check(&self, commit: &[u8], random: &dyn Random) -> Result<Checked, Refused> {
        if commit.len() > limits::COMMIT_BYTES {
            return Err(Refused::TooLarge);
        }
        let (sender, content) = self.process(commit, random)?;
        let ProcessedMessageContent::StagedCommitMessage(commit) = content else { return Err(Refused::invalid("not a commit")) };
        let (changes, after) = rules::check_commit(&self.group, &sender, &commit)?;
        let mut invited = Vec::with_capacity(changes.added.len());
        let crypto = Crypto::new(random);
        for (add, (_, device)) in commit.add_proposals().zip(&changes.added) {
            let key_package_ref = add.add_proposal().key_package().hash_ref(&crypto).map_err(Refused::invalid)?;
            invited.push((*device, key_package_ref.as_slice().to_vec()));
        }
        Ok(Checked { commit: *commit, changes, after, invited })
    }

    /// Goes on to the epoch that a commit begins.
    pub fn merge(&mut self, checked: Checked) -> Result<(), Refused> {
        self.group.merge_commit(&Storage(Nowhere), checked.commit).map_err(Refused::invalid)
    }

    /// Whether a GroupInfo (an MLSMessage) is of this very group at this epoch. That its signature and external key are right is for who joins
    /// with it to see; a wrong one keeps nobody out but who is out already.
    pub fn matches(&self, group_info: &[u8]) -> bool {
        match body(group_info) {
            Ok(MlsMessageBodyIn::GroupInfo(info)) => info.group_context() == self.group.group_context(),
            _ => false,
        }
    }

    /// As [`matches`](Self::matches), of the epoch that a commit begins. Nor may it show the key of the group's name to the server.
    pub fn matches_after(checked: &Checked, group_info: &[u8]) -> bool {
        match body(group_info) {
            Ok(MlsMessageBodyIn::GroupInfo(info)) => {
                info.group_context() == checked.commit.group_context() && info.extensions().unknown(NAME_KEY).is_none()
            }
            _ => false,
        }
    }

    /// As [`merge`](Self::merge), and returns the group as bytes, to go on from without the log before it. Costs a copy of the tree.
    pub fn merge_and_save(&mut self, checked: Checked) -> Result<Vec<u8>, Refused> {
        let memory = Storage(Memory::default());
        self.group.merge_commit(&memory, checked.commit).map_err(Refused::invalid)?;
        Ok(memory.0.encode())
    }

    /// The group that [`merge_and_save`](Self::merge_and_save) returned. Proposals that came later have to be proposed again.
    pub fn restore(id: GroupId, saved: &[u8]) -> Result<Self, Refused> {
        let memory = Memory::decode(saved).ok_or_else(|| Refused::invalid("a saved group is damaged"))?;
        let loaded = PublicGroup::load(&Storage(memory), &MlsGroupId::from_slice(id.as_bytes())).map_err(Refused::invalid)?;
        let group = loaded.ok_or_else(|| Refused::invalid("a saved group is damaged"))?;
        Ok(Self { id, group })
    }

    /// Checks a proposal (an MLSMessage with a PublicMessage) of the current epoch, and keeps it for the commit that will take it up.
    pub fn propose(&mut self, proposal: &[u8], random: &dyn Random) -> Result<(), Refused> {
        let checked = self.check_proposal(proposal, random)?;
        self.keep(checked)
    }

    /// The same without keeping it yet.
    pub fn check_proposal(&self, proposal: &[u8], random: &dyn Random) -> Result<CheckedProposal, Refused> {
        if proposal.len() > limits::KEY_PACKAGE_BYTES {
            return Err(Refused::TooLarge);
        }
        let (_, content) = self.process(proposal, random)?;
        let ProcessedMessageContent::ProposalMessage(proposal) = content else { return Err(Refused::invalid("not a proposal")) };
        let (by, leaf) = rules::check_proposal(&self.group, &proposal)?;
        Ok(CheckedProposal { proposal: *proposal, by, leaf })
    }

    /// Keeps a proposal of this epoch.
    pub fn keep(&mut self, checked: CheckedProposal) -> Result<(), Refused> {
        self.group.add_proposal(&Storage(Nowhere), checked.proposal).map_err(Refused::invalid)
    }

    fn process(&self, message: &[u8], random: &dyn Random) -> Result<(Sender, ProcessedMessageContent), Refused> {
        let message: ProtocolMessage = match body(message)? {
            MlsMessageBodyIn::PublicMessage(message) => message.into(),
            _ => return Err(Refused::invalid("not a public message")),
        };
        if message.group_id() != self.group.group_id() {
            return Err(Refused::invalid("of another group"));
        }
        let (have, got) = (self.epoch(), message.epoch().as_u64());
        if have != got {
            return Err(Refused::Epoch { have, got });
        }
        let processed = self.group.process_message(&Crypto::new(random), message).map_err(Refused::invalid)?;
        Ok((processed.sender().clone(), processed.into_content()))
    }
}

fn body(message: &[u8]) -> Result<MlsMessageBodyIn, Refused> {
    Ok(MlsMessageIn::tls_deserialize_exact(message).map_err(Refused::invalid)?.extract())
}
