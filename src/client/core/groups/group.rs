//! A group as one of its devices sees it.

use std::collections::{BTreeMap, BTreeSet};

use openmls::prelude::tls_codec::Serialize as _;
use openmls::prelude::{
    ContentType, Extension, KeyPackage, LeafNodeIndex, MlsGroup, MlsMessageBodyIn, OpenMlsProvider as _, ProcessMessageError,
    ProcessedMessageContent, Proposal, ProtocolMessage, Sender, StageCommitError, StagedCommit, UnknownExtension, ValidationError,
};
use zeroize::Zeroizing;

use super::engine::{Engine, message, outgoing};
use super::{Committed, Error, Outgoing, name_of};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, GroupId};
use crate::mls::key_package;
use crate::mls::profile::{self, NAME_KEY, PROFILE, Profile, Role};
use crate::mls::rules::{self, Denied, Roster};

/// A group that this device is in. It belongs to the transaction that it was loaded or changed in: see the module.
pub struct Group {
    id: GroupId,
    pub(super) mls: MlsGroup,
}

/// The keys of each device's leaf.
pub type LeafKeys = BTreeMap<DeviceAddr, Keys>;

/// The keys of a leaf.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// What others encrypt to: new with each commit and each time the device is added.
    pub encryption: Vec<u8>,
    /// What the device signs with: the same for as long as it lives.
    pub signature: Vec<u8>,
}

impl Keys {
    /// Whether a KeyPackage is of the device that this leaf is of: signed with the same key.
    pub fn are_of(&self, engine: &Engine<'_, '_>, device: DeviceAddr, package: &[u8], now: UnixMillis) -> bool {
        let checked = key_package::check(package, Some(device), now, engine.random).and_then(|checked| checked.timely(now));
        checked.is_ok_and(|checked| checked.key_package.leaf_node().signature_key().as_slice() == self.signature)
    }
}

/// What to change in one commit. Whatever it is, this device's keys are renewed with it; a change of nothing does only that.
#[derive(Debug, Clone, Default)]
pub struct Change<'c> {
    /// Devices to add, each by its KeyPackage as the server handed it out for this device.
    pub add: Vec<(DeviceAddr, &'c [u8])>,
    /// Accounts to remove, with all their devices.
    pub remove_accounts: Vec<AccountId>,
    /// Devices to remove.
    pub remove_devices: Vec<DeviceAddr>,
    /// A new name.
    pub name: Option<&'c str>,
    /// A new owner.
    pub owner: Option<AccountId>,
    /// The admins from now on, in any order.
    pub admins: Option<Vec<AccountId>>,
}

/// What a message of the group was.
#[derive(Debug)]
pub enum Received {
    /// Something a member wrote.
    Message {
        /// The device that wrote it.
        from: DeviceAddr,
        /// In which epoch.
        epoch: u64,
        /// What.
        content: Zeroizing<Vec<u8>>,
    },
    /// A message of this device, that came back.
    Own,
    /// A commit: the group is at its epoch now. If it is this device's own pending one, that counts as its verdict; a pending one that it
    /// overtook is gone.
    Committed(Box<Committed>),
    /// A commit that took this device out of the group. Nothing can be done in it any more.
    Removed(Box<Committed>),
    /// A member wants to leave, or the server wants a deleted account out: the next commit does it.
    Leaving(DeviceAddr),
}

impl Group {
    pub(super) fn new(id: GroupId, mls: MlsGroup) -> Self {
        Self { id, mls }
    }

    /// Its id.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// The epoch that it is at.
    pub fn epoch(&self) -> u64 {
        self.mls.epoch().as_u64()
    }

    /// Whether this device is in it.
    pub fn is_active(&self) -> bool {
        self.mls.is_active()
    }

    /// Whether a change of this device waits for its verdict.
    pub fn is_pending(&self) -> bool {
        self.mls.pending_commit().is_some()
    }

    /// Who is in it, and their roles.
    pub fn roster(&self) -> Result<Roster, Error> {
        Ok(Roster::of(self.mls.public_group())?)
    }

    /// Its name; `None` while this device has not been told the key.
    pub fn name(&self, engine: &Engine<'_, '_>) -> Result<Option<String>, Error> {
        Ok(name_of(&self.roster()?.profile, engine.name_key(self.id)?.as_ref(), self.id, engine.random))
    }

    /// The same for all who are in the same epoch, and secret: two members that see the same here have not parted.
    pub fn authenticator(&self) -> Vec<u8> {
        self.mls.epoch_authenticator().as_slice().to_vec()
    }

    /// The hash of the tree.
    pub fn tree_hash(&self) -> Vec<u8> {
        self.mls.public_group().group_context().tree_hash().to_vec()
    }

    /// The tree of this epoch, as in RFC 9420's extension.
    pub fn tree(&self) -> Result<Vec<u8>, Error> {
        self.mls.export_ratchet_tree().tls_serialize_detached().map_err(Error::invalid)
    }

    /// The keys of all leaves.
    pub fn leaf_keys(&self) -> Result<LeafKeys, Error> {
        let keys = |member: openmls::prelude::Member| {
            let device = crate::mls::credential::device_of(&member.credential).map_err(|_| Denied::Credential)?;
            Ok((device, Keys { encryption: member.encryption_key, signature: member.signature_key }))
        };
        self.mls.members().map(keys).collect()
    }

    fn active(&self) -> Result<(), Error> {
        if self.is_active() { Ok(()) } else { Err(Error::NotMember) }
    }

    fn operational(&self) -> Result<(), Error> {
        self.active()?;
        if self.is_pending() { Err(Error::Pending) } else { Ok(()) }
    }

    /// Prepares a change, with what others proposed, and leaves it pending.
    pub fn change(&mut self, engine: &Engine<'_, '_>, change: &Change<'_>, now: UnixMillis) -> Result<Outgoing, Error> {
        self.operational()?;
        let signer = engine.signer(self.mls.ciphersuite())?;
        let before = self.roster()?;
        let proposed = self.proposed_removals();
        let removed = Self::removals(&before, change)?;
        let added = change
            .add
            .iter()
            .map(|(device, bytes)| Ok(key_package::check(bytes, Some(*device), now, engine.random)?.timely(now)?.key_package))
            .collect::<Result<Vec<KeyPackage>, Error>>()?;
        let name_key = if added.is_empty() { None } else { engine.name_key(self.id)? };
        let gone = removed.union(&proposed).copied().collect();
        let profile = self.profile_after(engine, &before, change, gone)?;
        let mut extensions = self.mls.extensions().clone();
        let own = self.mls.own_leaf_index();
        let mut builder = self
            .mls
            .commit_builder()
            .propose_adds(added)
            .propose_removals(removed.difference(&proposed).map(|&leaf| LeafNodeIndex::new(leaf)))
            .force_self_update(true);
        if profile != before.profile {
            extensions.add_or_replace(Extension::Unknown(PROFILE, UnknownExtension(profile.encode()))).map_err(Error::invalid)?;
            builder = builder.propose_group_context_extensions(extensions).map_err(Error::invalid)?;
        }
        let name_key = name_key.map(|key| Extension::Unknown(NAME_KEY, UnknownExtension(key.as_bytes().to_vec())));
        let crypto = engine.provider.crypto();
        let bundle = builder
            .load_psks(engine.provider.storage())
            .map_err(Error::invalid)?
            .create_group_info_with_extensions(name_key)
            .map_err(Error::invalid)?
            // Nobody can commit that it leaves itself.
            .build(crypto, crypto, &signer, |queued| !matches!(queued.proposal(), Proposal::Remove(remove) if remove.removed() == own))
            .map_err(Error::invalid)?
            .stage_commit(&engine.provider)
            .map_err(Error::invalid)?;
        let pending = self.mls.pending_commit().ok_or(Error::Pending)?;
        rules::check_commit(self.mls.public_group(), &Sender::Member(own), pending)?;
        outgoing(bundle, self.epoch() + 1, &signer)
    }

    /// The leaves that a change removes.
    fn removals(before: &Roster, change: &Change<'_>) -> Result<BTreeSet<u32>, Error> {
        let mut removed = BTreeSet::new();
        for device in &change.remove_devices {
            removed.insert(before.leaf_of(*device).ok_or(Denied::NotMember)?);
        }
        for account in &change.remove_accounts {
            let leaves = before.leaves.iter().filter(|(_, device)| device.account == *account).map(|(leaf, _)| *leaf);
            let count = removed.len();
            removed.extend(leaves);
            if removed.len() == count {
                return Err(Denied::NotMember.into());
            }
        }
        Ok(removed)
    }

    /// Whether others proposed something that waits for a commit.
    pub fn has_proposals(&self) -> bool {
        !self.proposed_removals().is_empty()
    }

    /// Whether this device has asked to be taken out, in this epoch.
    pub fn is_leaving(&self) -> bool {
        let own = self.mls.own_leaf_index();
        self.mls.pending_proposals().any(|queued| matches!(queued.proposal(), Proposal::Remove(remove) if remove.removed() == own))
    }

    /// The leaves that others proposed to remove.
    fn proposed_removals(&self) -> BTreeSet<u32> {
        let own = self.mls.own_leaf_index();
        let removed = self.mls.pending_proposals().filter_map(|queued| match queued.proposal() {
            Proposal::Remove(remove) if remove.removed() != own => Some(remove.removed().u32()),
            _ => None,
        });
        removed.collect()
    }

    fn profile_after(&self, engine: &Engine<'_, '_>, before: &Roster, change: &Change<'_>, gone: BTreeSet<u32>) -> Result<Profile, Error> {
        let mut left = before.clone();
        left.leaves.retain(|leaf, _| !gone.contains(leaf));
        // Whoever is removed and added again in one commit keeps its role.
        let mut accounts = left.accounts();
        accounts.extend(change.add.iter().map(|(device, _)| device.account));
        let mut profile = before.profile.among(&accounts);
        if let Some(owner) = change.owner {
            // Who passes ownership on stays as an admin, unless the change says otherwise.
            let former = std::mem::replace(&mut profile.owner, owner);
            profile.admins.push(former);
        }
        if let Some(admins) = &change.admins {
            profile.admins.clone_from(admins);
        }
        profile.admins.sort_unstable();
        profile.admins.dedup();
        profile.admins.retain(|admin| *admin != profile.owner);
        if profile.admins.len() > crate::limits::GROUP_ADMINS {
            return Err(Denied::Full.into());
        }
        if let Some(name) = change.name {
            let key = engine.name_key(self.id)?.ok_or(profile::Invalid::NameKey)?;
            profile.sealed_name = profile::seal_name(name, &key, self.id, engine.random)?;
        }
        Ok(profile)
    }

    /// The server accepted the pending change: the group is at its epoch now.
    pub fn accepted(&mut self, engine: &Engine<'_, '_>) -> Result<Committed, Error> {
        let pending = self.mls.pending_commit().ok_or(Error::Pending)?;
        let before = self.roster()?;
        let (changes, _) = rules::check_commit(self.mls.public_group(), &Sender::Member(self.mls.own_leaf_index()), pending)?;
        self.mls.merge_pending_commit(&engine.provider).map_err(Error::invalid)?;
        Ok(Committed { epoch: self.epoch(), changes, before })
    }

    /// The server refused the pending change: nothing happened. Receive what came first, then try again.
    pub fn refused(&mut self, engine: &Engine<'_, '_>) -> Result<(), Error> {
        Ok(self.mls.clear_pending_commit(engine.provider.storage())?)
    }

    /// Asks the others to take this device out: a proposal to send. Whoever commits next does it.
    pub fn leave(&mut self, engine: &Engine<'_, '_>) -> Result<Vec<u8>, Error> {
        self.operational()?;
        let signer = engine.signer(self.mls.ciphersuite())?;
        let proposal = self.mls.leave_group(&engine.provider, &signer).map_err(Error::invalid)?;
        proposal.tls_serialize_detached().map_err(Error::invalid)
    }

    /// Encrypts something for the others. `content` should be padded: its length shows.
    pub fn encrypt(&mut self, engine: &Engine<'_, '_>, content: &[u8]) -> Result<Vec<u8>, Error> {
        self.active()?;
        let signer = engine.signer(self.mls.ciphersuite())?;
        let message = self.mls.create_message(&engine.provider, &signer, content).map_err(|error| match error {
            // Proposals that wait must be committed first, or the sender's view of the group would lag behind.
            openmls::prelude::CreateMessageError::GroupStateError(_) => Error::Pending,
            other => Error::invalid(other),
        })?;
        message.tls_serialize_detached().map_err(Error::invalid)
    }

    /// Takes in a message of the group, in the server's order.
    pub fn receive(&mut self, engine: &Engine<'_, '_>, bytes: &[u8]) -> Result<Received, Error> {
        self.active()?;
        let message: ProtocolMessage = match message(bytes)? {
            MlsMessageBodyIn::PublicMessage(message) => message.into(),
            MlsMessageBodyIn::PrivateMessage(message) => message.into(),
            _ => return Err(Error::invalid("not a message of a group")),
        };
        if message.group_id().as_slice() != self.id.as_bytes() {
            return Err(Error::invalid("of another group"));
        }
        let (have, got) = (self.epoch(), message.epoch().as_u64());
        if got > have {
            return Err(Error::Missed { have, got });
        }
        if got < have && message.content_type() != ContentType::Application {
            return Err(Error::Past);
        }
        let processed = self.mls.process_message(&engine.provider, message).map_err(|error| match error {
            ProcessMessageError::StorageError(error) => error.into(),
            ProcessMessageError::ValidationError(ValidationError::NoPastEpochData) => Error::Past,
            ProcessMessageError::ValidationError(ValidationError::InvalidMembershipTag) => Error::Tags,
            ProcessMessageError::InvalidCommit(StageCommitError::ConfirmationTagMismatch) => Error::Tags,
            other => Error::invalid(other),
        })?;
        let (sender, epoch) = (processed.sender().clone(), processed.epoch().as_u64());
        let from = crate::mls::credential::device_of(processed.credential());
        match processed.into_content() {
            ProcessedMessageContent::ApplicationMessage(content) => {
                Ok(Received::Message { from: from.map_err(|_| Denied::Credential)?, epoch, content: Zeroizing::new(content.into_bytes()) })
            }
            ProcessedMessageContent::OwnPrivateMessage => Ok(Received::Own),
            ProcessedMessageContent::ProposalMessage(proposal) => {
                rules::check_proposal(self.mls.public_group(), &proposal)?;
                let Proposal::Remove(remove) = proposal.proposal() else { return Err(Denied::Unsupported.into()) };
                let leaf = remove.removed().u32();
                let leaving = self.roster()?.leaves.get(&leaf).copied().ok_or(Denied::NotMember)?;
                self.mls.store_pending_proposal(engine.provider.storage(), *proposal)?;
                Ok(Received::Leaving(leaving))
            }
            ProcessedMessageContent::StagedCommitMessage(commit) => self.merge(engine, &sender, *commit),
            ProcessedMessageContent::OwnPendingCommit => Ok(Received::Committed(Box::new(self.accepted(engine)?))),
            ProcessedMessageContent::ExternalJoinProposalMessage(_) => Err(Denied::Unsupported.into()),
        }
    }

    fn merge(&mut self, engine: &Engine<'_, '_>, sender: &Sender, commit: StagedCommit) -> Result<Received, Error> {
        let before = self.roster()?;
        let (changes, _) = rules::check_commit(self.mls.public_group(), sender, &commit)?;
        let removed = commit.self_removed();
        self.mls.merge_staged_commit(&engine.provider, commit).map_err(Error::invalid)?;
        let committed = Box::new(Committed { epoch: self.epoch(), changes, before });
        Ok(if removed { Received::Removed(committed) } else { Received::Committed(committed) })
    }

    /// Forgets the group: all its keys go with the transaction.
    pub fn forget(mut self, engine: &Engine<'_, '_>) -> Result<(), Error> {
        self.mls.delete(engine.provider.storage())?;
        engine.tx.delete(crate::client::core::state::StateKey::GroupNameKey(self.id));
        Ok(())
    }

    /// The role of an account.
    pub fn role(&self, account: AccountId) -> Result<Option<Role>, Error> {
        let roster = self.roster()?;
        Ok(roster.has(account).then(|| roster.profile.role(account)))
    }
}
