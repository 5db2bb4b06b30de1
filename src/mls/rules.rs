//! Who may change what in a group. The server checks a commit with these rules before anybody gets it, and every member checks it again,
//! so that neither a member nor the server can get around them alone. They read only what is public.
//!
//! | change | who |
//! |---|---|
//! | add an account | admin, owner |
//! | add a device to an account that is in the group | that account, admin, owner |
//! | remove a leaf | its own account; admins remove members; the owner removes anybody; the server, of accounts that are gone |
//! | replace a leaf's keys | its own device, which stays the same device |
//! | join by external commit | a device that has a leaf, with the signature key of that leaf, which it replaces |
//! | name | admin, owner |
//! | admins, owner | owner; an admin may step down |
//!
//! A commit that removes the last leaf of an admin or of the owner must also carry the profile without it ([`Profile::among`]), whoever
//! commits it. Other proposals and other changes of the GroupContext are refused.

use std::collections::{BTreeMap, BTreeSet};

use openmls::prelude::{
    Extension, ExtensionType, Extensions, GroupContext, LeafNode, LeafNodeIndex, Proposal, PublicGroup, QueuedProposal, Sender,
    StagedCommit,
};

use super::credential;
use super::profile::{PROFILE, Profile, Role};
use crate::ids::{AccountId, DeviceAddr};
use crate::limits;

/// Why a change of a group is refused. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// Whoever asks for the change may not make it.
    #[error("the sender may not make this change")]
    NotAllowed,
    /// A leaf that names no device, or another one than before.
    #[error("a leaf's credential is not its device's")]
    Credential,
    /// A device would be in the group twice.
    #[error("the device is in the group already")]
    Twice,
    /// The sender, the joiner or whom the change is about is not in the group.
    #[error("the device is not in the group")]
    NotMember,
    /// More accounts than a group may have, or more devices than an account may have.
    #[error("the group or an account would grow past its limit")]
    Full,
    /// Roles are not what they must be after this change.
    #[error("the group's roles do not fit its members")]
    Roles,
    /// The profile is missing or damaged.
    #[error("the group's profile is not valid")]
    Profile,
    /// A kind of change that groups here do not know.
    #[error("this kind of change is not supported")]
    Unsupported,
}

/// Who asked for a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Actor {
    /// The device at a leaf.
    Member(DeviceAddr),
    /// The server, as external sender.
    Server,
    /// The device that joins by this commit.
    Joiner(DeviceAddr),
}

/// A group as its public state shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roster {
    /// Roles and sealed name.
    pub profile: Profile,
    /// The device at each leaf.
    pub leaves: BTreeMap<u32, DeviceAddr>,
}

/// What a commit does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Who commits.
    pub committer: Actor,
    /// Devices that are added, and who asked for it.
    pub added: Vec<(Actor, DeviceAddr)>,
    /// Leaves that are removed, and who asked for it.
    pub removed: Vec<(Actor, u32)>,
    /// The new profile, if the commit carries one, and who asked for it.
    pub profile: Option<(Actor, Profile)>,
}

impl Roster {
    /// Of a group.
    pub fn of(group: &PublicGroup) -> Result<Self, Denied> {
        Self::new(group.group_context().extensions(), group.members().map(|member| (member.index, member.credential)))
    }

    /// From a GroupContext's extensions and the credentials at the leaves.
    pub fn new(
        extensions: &Extensions<GroupContext>,
        members: impl Iterator<Item = (LeafNodeIndex, openmls::prelude::Credential)>,
    ) -> Result<Self, Denied> {
        let mut leaves = BTreeMap::new();
        for (index, member) in members {
            leaves.insert(index.u32(), credential::device_of(&member).map_err(|_| Denied::Credential)?);
        }
        Ok(Self { profile: profile_of(extensions)?, leaves })
    }

    /// Whether this is a sound group: within the limits, each device once, roles only for who is in it. What every commit keeps, and
    /// what is checked where a group is met for the first time.
    pub fn check(&self) -> Result<(), Denied> {
        let distinct: BTreeSet<DeviceAddr> = self.leaves.values().copied().collect();
        if distinct.len() != self.leaves.len() {
            return Err(Denied::Twice);
        }
        let mut devices: BTreeMap<AccountId, usize> = BTreeMap::new();
        for device in &distinct {
            *devices.entry(device.account).or_default() += 1;
        }
        if devices.len() > limits::GROUP_ACCOUNTS || devices.values().any(|&count| count > limits::DEVICES_PER_ACCOUNT) {
            return Err(Denied::Full);
        }
        let present = |account: &AccountId| devices.contains_key(account);
        if present(&self.profile.owner) && self.profile.admins.iter().all(present) { Ok(()) } else { Err(Denied::Roles) }
    }

    /// The accounts, in the order of their first leaves.
    pub fn accounts(&self) -> Vec<AccountId> {
        let mut seen = BTreeSet::new();
        self.leaves.values().map(|device| device.account).filter(|account| seen.insert(*account)).collect()
    }

    /// Whether an account has a leaf.
    pub fn has(&self, account: AccountId) -> bool {
        self.leaves.values().any(|device| device.account == account)
    }

    /// The leaf of a device.
    pub fn leaf_of(&self, device: DeviceAddr) -> Option<u32> {
        self.leaves.iter().find(|(_, at)| **at == device).map(|(leaf, _)| *leaf)
    }

    /// Whether this commit may be made; the group after it, if so. New devices stand at leaves past the others there.
    pub fn apply(&self, changes: &Changes) -> Result<Self, Denied> {
        let role = |actor: Actor| match actor {
            Actor::Member(device) => Some((device.account, self.profile.role(device.account))),
            Actor::Server | Actor::Joiner(_) => None,
        };
        let mut leaves = self.leaves.clone();
        for (actor, leaf) in &changes.removed {
            let gone = leaves.remove(leaf).ok_or(Denied::NotMember)?;
            let allowed = match (*actor, role(*actor)) {
                (Actor::Server, _) => true,
                (Actor::Joiner(device), _) => device == gone,
                (_, Some((account, role))) => account == gone.account || role >= Role::Admin && role > self.profile.role(gone.account),
                (_, None) => false,
            };
            if !allowed {
                return Err(Denied::NotAllowed);
            }
        }
        let mut next = leaves.keys().next_back().map_or(0, |last| last + 1);
        let mut enter = |device: DeviceAddr| {
            leaves.insert(next, device);
            next += 1;
        };
        let members: BTreeSet<AccountId> = self.leaves.values().map(|device| device.account).collect();
        for (actor, device) in &changes.added {
            let Some((account, role)) = role(*actor) else { return Err(Denied::NotAllowed) };
            let own = account == device.account && members.contains(&account);
            if !own && role < Role::Admin {
                return Err(Denied::NotAllowed);
            }
            enter(*device);
        }
        match changes.committer {
            Actor::Member(_) => {}
            Actor::Joiner(device) if self.leaf_of(device).is_some() => enter(device),
            Actor::Joiner(_) => return Err(Denied::NotMember),
            Actor::Server => return Err(Denied::NotAllowed),
        }
        let mut after = Self { profile: self.profile.clone(), leaves };
        let expected = self.profile.among(&after.accounts());
        after.profile = match &changes.profile {
            None => expected.clone(),
            Some((actor, profile)) => {
                self.check_profile(&expected, profile, *actor, role(*actor))?;
                profile.clone()
            }
        };
        // Without a new profile in the commit the old one stays: it must already be the right one.
        if changes.profile.is_none() && after.profile != self.profile {
            return Err(Denied::Roles);
        }
        after.check()?;
        Ok(after)
    }

    fn check_profile(&self, expected: &Profile, new: &Profile, actor: Actor, role: Option<(AccountId, Role)>) -> Result<(), Denied> {
        // An external committer can't carry a profile, and the server has no say in it.
        let (Actor::Member(_), Some((account, role))) = (actor, role) else { return Err(Denied::NotAllowed) };
        if new.sealed_name != expected.sealed_name && role < Role::Admin {
            return Err(Denied::NotAllowed);
        }
        let same_roles = new.owner == expected.owner && new.admins == expected.admins;
        let steps_down = new.owner == expected.owner && new.admins.iter().eq(expected.admins.iter().filter(|admin| **admin != account));
        if same_roles || steps_down || role == Role::Owner { Ok(()) } else { Err(Denied::NotAllowed) }
    }
}

/// The profile in a GroupContext.
pub fn profile_of(extensions: &Extensions<GroupContext>) -> Result<Profile, Denied> {
    let extension = extensions.unknown(PROFILE).ok_or(Denied::Profile)?;
    Profile::decode(&extension.0).map_err(|_| Denied::Profile)
}

/// Whether a proposal on its own is of a kind that groups here know, and its sender may make it. Whether it may be committed is for
/// the commit to show. Gives who proposes and the leaf to remove.
pub fn check_proposal(group: &PublicGroup, proposal: &QueuedProposal) -> Result<(Actor, u32), Denied> {
    let roster = Roster::of(group)?;
    let actor = actor(&roster, proposal.sender(), None)?;
    match proposal.proposal() {
        Proposal::Remove(remove) => {
            let leaf = remove.removed().u32();
            let gone = roster.leaves.get(&leaf).ok_or(Denied::NotMember)?;
            match actor {
                Actor::Server => Ok((actor, leaf)),
                Actor::Member(device) if device.account == gone.account => Ok((actor, leaf)),
                // Whoever may remove others commits it at once.
                Actor::Member(_) | Actor::Joiner(_) => Err(Denied::NotAllowed),
            }
        }
        _ => Err(Denied::Unsupported),
    }
}

/// Whether a commit may be made in this group; the group after it, if so. `commit` was validated by openmls in `group`.
pub fn check_commit(group: &PublicGroup, sender: &Sender, commit: &StagedCommit) -> Result<(Changes, Roster), Denied> {
    let before = Roster::of(group)?;
    let changes = changes(group, &before, sender, commit)?;
    let after = before.apply(&changes)?;
    Ok((changes, after))
}

fn actor(roster: &Roster, sender: &Sender, joiner: Option<&LeafNode>) -> Result<Actor, Denied> {
    match (sender, joiner) {
        (Sender::Member(leaf), _) => roster.leaves.get(&leaf.u32()).copied().map(Actor::Member).ok_or(Denied::NotMember),
        (Sender::External(_), _) => Ok(Actor::Server),
        (Sender::NewMemberCommit, Some(leaf)) => {
            credential::device_of(leaf.credential()).map(Actor::Joiner).map_err(|_| Denied::Credential)
        }
        (Sender::NewMemberCommit, None) | (Sender::NewMemberProposal, _) => Err(Denied::Unsupported),
    }
}

fn changes(group: &PublicGroup, before: &Roster, sender: &Sender, commit: &StagedCommit) -> Result<Changes, Denied> {
    let path = commit.update_path_leaf_node();
    let committer = actor(before, sender, path)?;
    match (committer, path) {
        (Actor::Member(device), Some(leaf)) => same_device(leaf, device)?,
        (Actor::Joiner(device), Some(leaf)) => holds_leaf_of(group, before, device, leaf)?,
        _ => {}
    }
    let mut changes = Changes { committer, added: Vec::new(), removed: Vec::new(), profile: None };
    for queued in commit.queued_proposals() {
        let by = actor(before, queued.sender(), path)?;
        match queued.proposal() {
            Proposal::Add(add) => {
                let device = credential::device_of(add.key_package().leaf_node().credential()).map_err(|_| Denied::Credential)?;
                changes.added.push((by, device));
            }
            Proposal::Remove(remove) => changes.removed.push((by, remove.removed().u32())),
            Proposal::Update(update) => match by {
                Actor::Member(device) => same_device(update.leaf_node(), device)?,
                Actor::Server | Actor::Joiner(_) => return Err(Denied::NotAllowed),
            },
            Proposal::GroupContextExtensions(new) => {
                only_profile_differs(group.group_context().extensions(), new.extensions())?;
                changes.profile = Some((by, profile_of(new.extensions())?));
            }
            Proposal::ExternalInit(_) if matches!(committer, Actor::Joiner(_)) => {}
            _ => return Err(Denied::Unsupported),
        }
    }
    Ok(changes)
}

fn same_device(leaf: &LeafNode, device: DeviceAddr) -> Result<(), Denied> {
    if credential::device_of(leaf.credential()) == Ok(device) { Ok(()) } else { Err(Denied::Credential) }
}

/// A credential is only a claim: who joins by itself proves it with the key that the others know. Else the server could sit down
/// in a group as a device that nobody added.
fn holds_leaf_of(group: &PublicGroup, before: &Roster, device: DeviceAddr, joining: &LeafNode) -> Result<(), Denied> {
    let old = before.leaf_of(device).and_then(|leaf| group.leaf(LeafNodeIndex::new(leaf))).ok_or(Denied::NotMember)?;
    if old.signature_key() == joining.signature_key() { Ok(()) } else { Err(Denied::Credential) }
}

fn only_profile_differs(old: &Extensions<GroupContext>, new: &Extensions<GroupContext>) -> Result<(), Denied> {
    let profile = ExtensionType::Unknown(PROFILE);
    let rest = |extensions: &Extensions<GroupContext>| -> Vec<Extension> {
        let mut rest: Vec<Extension> = extensions.iter().filter(|one| one.extension_type() != profile).cloned().collect();
        rest.sort_by_key(|one| u16::from(one.extension_type()));
        rest
    };
    if rest(old) == rest(new) { Ok(()) } else { Err(Denied::Unsupported) }
}

#[cfg(test)]
mod tests;
