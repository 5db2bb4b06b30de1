//! One group and what it meets: (state, event) → effects. No async and no clock, so that the same log always gives the same group.
//! Randomness is only what the cryptography's types want; checking and the server's signatures take none.
//!
//! An event makes one item at most, at its own position. What needs more (the server proposes to remove ten leaves) is said by further events
//! ([`Effects::follow_ups`]), which means the same however often they are appended.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::saved::State;
use crate::clock::{Random, UnixMillis};
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, EdgeId, GroupId, Seq};
use crate::limits;
use crate::metadata::Step;
use crate::mls::framing;
use crate::mls::public::{Public, Refused};
use crate::mls::rules::{Actor, Roster};
use crate::mls::sender::ServerKey;
use crate::mls::welcome;
use crate::projector::apply::Seen;
use crate::projector::push::{GroupVerdict, Push};
use crate::store::Mark;
use crate::store::groups::{GroupHead, GroupItem, GroupItemKind, GroupRoster, GroupWrite};
use crate::wire::event;
use crate::wire::group_event::{GroupEvent, GroupEventBody};

mod begin;
mod steps;

pub use begin::{begin, is_state, lacks};

/// What a device was added with: for its account's inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invitation {
    /// Into which group.
    pub group: GroupId,
    /// The device.
    pub device: DeviceAddr,
    /// Who added it.
    pub by: DeviceAddr,
    /// When.
    pub accepted: UnixMillis,
    /// The epoch that it begins with.
    pub epoch: u64,
    /// The commit.
    pub seq: Seq,
    /// Its own Welcome.
    pub welcome: Vec<u8>,
}

/// What events did besides changing groups.
#[derive(Debug, Default)]
pub struct Effects {
    /// What is to be written; [`Group::flush`] adds the rest.
    pub write: GroupWrite,
    /// To be pushed once it is written.
    pub pushes: Vec<(EdgeId, Push)>,
    /// For who was added.
    pub invitations: Vec<Invitation>,
    /// Devices for whose removal more proposals are due: [`GroupEventBody::DevicesGone`] again.
    pub follow_ups: Vec<(GroupId, Vec<DeviceAddr>)>,
    /// Commits that were accepted and refused.
    pub commits: [u64; 2],
    /// For topic `metadata`.
    pub steps: Vec<Step>,
}

/// What applying works with.
#[derive(Clone, Copy)]
pub struct Tools<'a> {
    /// The server's voice in groups, if it has one.
    pub key: Option<&'a ServerKey>,
    /// For the cryptography's types.
    pub random: &'a dyn Random,
}

/// An event and where it stands.
#[derive(Clone, Copy)]
pub struct Met<'a> {
    /// Its position.
    pub at: Seq,
    /// When the log took it.
    pub appended: UnixMillis,
    /// The event.
    pub event: &'a GroupEvent<'a>,
    /// The record's buffer, which the event borrows from.
    pub payload: &'a Bytes,
}

/// A group in a projector's memory.
pub struct Group {
    id: GroupId,
    /// As the store will have it.
    pub head: GroupHead,
    /// Who is in it.
    pub roster: GroupRoster,
    /// Loaded for handshakes.
    pub state: Option<State>,
    /// Senders' marks, and whether each differs from the store. Loaded for messages.
    pub marks: BTreeMap<DeviceAddr, (Mark, bool)>,
    /// The GroupInfo of epoch 0, where somebody creates what there is already.
    pub info: Option<Bytes>,
    /// The digest of the commit that began the epoch, to know it again.
    pub begun_by: Option<[u8; 32]>,
    /// Items of events that are met again, or that a crash wrote without their head.
    pub stored: BTreeMap<Seq, GroupItem>,
    dirty: Dirty,
    /// Merging failed half way.
    lost: bool,
    /// It was closed, and nothing of it is left to read.
    over: bool,
}

/// Which rows differ from the store.
#[derive(Debug, Default)]
struct Dirty {
    head: bool,
    roster: Option<Seq>,
    state: Option<Seq>,
    info: Option<(Seq, Bytes)>,
}

/// A verdict that is an error; the group is as it was.
type Verdict = Result<(Seq, u64), GroupVerdict>;

fn refused(refused: Refused) -> GroupVerdict {
    match refused {
        Refused::Denied(denied) => GroupVerdict::Denied(denied.to_string()),
        other => GroupVerdict::Invalid(other.to_string()),
    }
}

fn invalid(why: &str) -> GroupVerdict {
    GroupVerdict::Invalid(why.to_owned())
}

fn denied(why: &str) -> GroupVerdict {
    GroupVerdict::Denied(why.to_owned())
}

/// The digest of a commit.
pub fn digest(commit: &[u8]) -> [u8; 32] {
    Sha256::digest(commit).into()
}

/// What the store keeps of who is in a group.
fn roster_of(roster: &Roster, epoch: u64) -> GroupRoster {
    let mut devices: Vec<DeviceAddr> = roster.leaves.values().copied().collect();
    devices.sort_unstable();
    GroupRoster { epoch, owner: Some(roster.profile.owner), admins: roster.profile.admins.clone(), devices }
}

/// Applies an event to a group that may not be there yet. What is replayed and had its effect already only tells again.
pub fn apply(group: &mut Option<Group>, met: Met<'_>, tools: Tools<'_>, effects: &mut Effects) {
    let GroupEvent { body, reply_to, .. } = met.event;
    if let Some(group) = group.as_ref().filter(|group| group.head.applied >= met.at) {
        group.tell_again(met, effects);
        return;
    }
    let verdict = match (body, group.as_mut()) {
        (GroupEventBody::Created { by, group_info, tree }, None) => match create(met, *by, group_info, tree, tools, effects) {
            Ok(created) => {
                let done = (created.head.head, 0);
                *group = Some(created);
                Some(Ok(done))
            }
            Err(verdict) => Some(Err(verdict)),
        },
        (GroupEventBody::EdgeAttached { edge }, None) => {
            effects.pushes.push((*edge, Push::GroupAttached { group: met.event.group, at: None }));
            None
        }
        (_, None) => Some(Err(GroupVerdict::NotFound)),
        (_, Some(group)) => group.meet(met, tools, effects),
    };
    steps::note(met, verdict.as_ref(), group.as_ref(), effects);
    if group.as_ref().is_some_and(|group| group.over) {
        *group = None;
    }
    if let (Some(request), Some(verdict)) = (reply_to, verdict) {
        let verdict = verdict.map_or_else(|refused| refused, |(seq, epoch)| GroupVerdict::Done { seq, epoch });
        effects.pushes.push((request.edge, Push::GroupVerdict { request: *request, verdict }));
    }
}

fn create(
    met: Met<'_>,
    by: DeviceAddr,
    group_info: &[u8],
    tree: &[u8],
    tools: Tools<'_>,
    effects: &mut Effects,
) -> Result<Group, GroupVerdict> {
    if group_info.len() > limits::COMMIT_BYTES || tree.len() > limits::GROUP_TREE_BYTES {
        return Err(invalid("larger than a group's parts may be"));
    }
    let (public, saved) = Public::create_and_save(group_info, tree, tools.random).map_err(refused)?;
    if public.id() != met.event.group || public.epoch() != 0 {
        return Err(invalid("of another group, or not its beginning"));
    }
    if !public.is_timely(met.event.at).map_err(refused)? {
        return Err(invalid("the creator's lifetime has not begun or is nearly over"));
    }
    let roster = public.roster().map_err(|error| refused(error.into()))?;
    if !roster.leaves.values().eq([&by]) || roster.profile.owner != by.account {
        return Err(denied("a group begins with its creator alone"));
    }
    let ours = tools.key.map(ServerKey::public);
    if public.listens_to(ours.as_ref().map_or(&[], |key| key)).is_some_and(|only_us| !only_us || ours.is_none()) {
        return Err(denied("a group's external sender can only be the server"));
    }
    let head = GroupHead {
        created: met.event.at,
        epoch: 0,
        head: Seq::ZERO,
        expired_to: Seq::ZERO,
        closed: false,
        gone: Vec::new(),
        edges: Vec::new(),
        snapshot_epoch: 0,
        snapshot_at: met.at,
        applied: Seq::ZERO,
        stated: met.event.at,
        stated_at: met.at,
    };
    let mut group = Group::new(met.event.group, head, roster_of(&roster, 0));
    effects.write.trees.push((group.id, 0, met.at, tree.to_vec()));
    effects.write.members.push((by.account, group.id, met.at, true));
    group.dirty =
        Dirty { head: true, roster: Some(met.at), state: Some(met.at), info: Some((met.at, event::share(met.payload, group_info))) };
    group.state = Some(State::new(public, saved));
    group.item(met, GroupItemKind::Created, Some(by), ClientMessageId(0), 0, Bytes::new(), effects);
    Ok(group)
}

impl Group {
    /// As the store has it.
    pub fn new(id: GroupId, head: GroupHead, roster: GroupRoster) -> Self {
        Self {
            id,
            head,
            roster,
            state: None,
            marks: BTreeMap::new(),
            info: None,
            begun_by: None,
            stored: BTreeMap::new(),
            dirty: Dirty::default(),
            lost: false,
            over: false,
        }
    }

    /// About how many bytes it costs to hold.
    pub fn cost(&self) -> usize {
        512 + 17 * self.roster.devices.len() + 96 * self.marks.len() + self.state.as_ref().map_or(0, State::cost)
    }

    /// Moves every row that differs from the store into `write`; everything up to `met` was applied.
    pub fn flush(&mut self, met: Seq, write: &mut GroupWrite) {
        let dirty = std::mem::take(&mut self.dirty);
        if let (Some(at), Some(state)) = (dirty.state, &self.state) {
            write.snapshots.push((self.id, self.head.epoch, at, state.encode()));
        }
        if let Some((at, info)) = dirty.info {
            write.infos.push((self.id, at, info.to_vec()));
        }
        if let Some(at) = dirty.roster {
            write.rosters.push((self.id, at, self.roster.clone()));
        }
        for (sender, (mark, dirty)) in &mut self.marks {
            if std::mem::take(dirty) {
                write.marks.push((self.id, *sender, *mark));
            }
        }
        if dirty.head {
            write.heads.push((self.id, self.head.clone()));
        }
        self.stored.retain(|seq, _| *seq > met);
    }

    /// A crash left the roster ahead of the head: the public state says who was in it.
    pub const fn is_behind_its_roster(&self) -> bool {
        self.roster.epoch > self.head.epoch
    }

    /// Takes the public state that was loaded.
    pub fn adopt(&mut self, state: State) -> Result<(), Refused> {
        if self.is_behind_its_roster() {
            self.roster = roster_of(&state.public.roster()?, self.head.epoch);
        }
        self.state = Some(state);
        Ok(())
    }

    /// Nothing went wrong in it: what did is read from the store again.
    pub fn is_whole(&self) -> bool {
        !self.lost
    }

    fn has(&self, device: DeviceAddr) -> bool {
        self.roster.devices.binary_search(&device).is_ok()
    }

    fn accounts(&self) -> BTreeSet<AccountId> {
        self.roster.devices.iter().map(|device| device.account).collect()
    }

    /// Adds an item at the event's position and tells the edges that follow.
    #[allow(clippy::too_many_arguments, reason = "an item has that many parts")]
    fn item(
        &mut self,
        met: Met<'_>,
        kind: GroupItemKind,
        sender: Option<DeviceAddr>,
        client_message_id: ClientMessageId,
        epoch: u64,
        content: Bytes,
        effects: &mut Effects,
    ) {
        let after = std::mem::replace(&mut self.head.head, met.at);
        let item = GroupItem { seq: met.at, after, accepted: met.event.at, epoch, sender, kind, client_message_id, content };
        self.touched(met);
        let roster = (self.dirty.roster == Some(met.at)).then(|| Box::new(self.roster.clone()));
        for (edge, _) in &self.head.edges {
            effects.pushes.push((*edge, Push::GroupItem { group: self.id, item: item.clone(), roster: roster.clone() }));
        }
        effects.write.items.push((self.id, item));
    }

    /// The event went into the head. Edges that did not renew are dropped on the way.
    fn touched(&mut self, met: Met<'_>) {
        self.head.applied = met.at;
        self.head.edges.retain(|(_, renewed)| met.appended.since(*renewed) <= limits::GROUP_EDGE_GONE_MS);
        self.dirty.head = true;
    }

    /// An event that had its effect before a crash, whose pushes may be lost.
    fn tell_again(&self, met: Met<'_>, effects: &mut Effects) {
        if let GroupEventBody::EdgeAttached { edge } = met.event.body {
            effects.pushes.push((edge, self.attached()));
        }
        let Some(item) = self.stored.get(&met.at) else {
            // An accepted one left an item, and what is asked again is known by its digest.
            if matches!(&met.event.body, GroupEventBody::Commit { commit, .. } if self.begun_by != Some(digest(commit))) {
                steps::note(met, Some(&Err(self.conflict())), Some(self), effects);
            }
            return;
        };
        steps::note(met, Some(&Ok((item.seq, item.epoch))), Some(self), effects);
        for (edge, _) in &self.head.edges {
            let roster = (item.kind == GroupItemKind::Commit).then(|| Box::new(self.roster.clone()));
            effects.pushes.push((*edge, Push::GroupItem { group: self.id, item: item.clone(), roster }));
        }
        if let Some(request) = met.event.reply_to {
            let epoch = item.epoch + u64::from(item.kind == GroupItemKind::Commit);
            let verdict = GroupVerdict::Done { seq: item.seq, epoch };
            effects.pushes.push((request.edge, Push::GroupVerdict { request, verdict }));
        }
    }

    fn attached(&self) -> Push {
        Push::GroupAttached { group: self.id, at: (!self.head.closed).then_some((self.head.head, self.head.epoch)) }
    }

    fn meet(&mut self, met: Met<'_>, tools: Tools<'_>, effects: &mut Effects) -> Option<Verdict> {
        match &met.event.body {
            GroupEventBody::EdgeAttached { edge } => {
                if !self.head.closed {
                    self.head.edges.retain(|(known, _)| known != edge);
                    self.head.edges.push((*edge, met.appended));
                    self.touched(met);
                }
                effects.pushes.push((*edge, self.attached()));
                None
            }
            GroupEventBody::EdgeDetached { edge } => {
                if self.head.edges.iter().any(|(known, _)| known == edge) {
                    self.head.edges.retain(|(known, _)| known != edge);
                    self.touched(met);
                }
                None
            }
            GroupEventBody::Expired { to } => {
                let to = (*to).min(met.at);
                if to > self.head.expired_to {
                    self.head.expired_to = to;
                    self.touched(met);
                    effects.write.drop_to.push((self.id, to));
                    if self.head.closed && to >= self.head.head {
                        effects.write.members.extend(self.accounts().into_iter().map(|account| (account, self.id, met.at, false)));
                        effects.write.removed.push((self.id, met.at));
                        self.over = true;
                    }
                }
                None
            }
            GroupEventBody::State { .. } => {
                if !self.head.closed && is_state(met.event, met.at) {
                    (self.head.stated, self.head.stated_at) = (met.event.at, met.at);
                    self.touched(met);
                }
                None
            }
            GroupEventBody::Created { by, group_info, .. } => {
                let same = self.head.epoch == 0 && !self.head.closed && self.roster.devices == [*by];
                let same = same && self.info.as_ref().is_some_and(|info| info == group_info);
                Some(if same { Ok((self.head.snapshot_at, 0)) } else { Err(GroupVerdict::Exists) })
            }
            _ if self.head.closed => Some(Err(GroupVerdict::NotFound)),
            GroupEventBody::Commit { by, commit, welcome, group_info } => {
                let verdict = self.commit(met, *by, commit, *welcome, group_info, tools, effects);
                effects.commits[usize::from(verdict.is_err())] += 1;
                Some(verdict)
            }
            GroupEventBody::Proposal { by, proposal } => Some(self.proposal(met, *by, proposal, tools, effects)),
            GroupEventBody::Message { by, client_message_id, epoch, content } => {
                Some(self.message(met, *by, *client_message_id, *epoch, content, effects))
            }
            GroupEventBody::DevicesGone { devices } => {
                self.devices_gone(met, devices, tools, effects);
                None
            }
            GroupEventBody::Closed { by } => Some(self.close(met, *by, effects)),
        }
    }

    fn conflict(&self) -> GroupVerdict {
        GroupVerdict::Conflict { epoch: self.head.epoch, head: self.head.snapshot_at }
    }

    fn state(&self) -> Result<&State, GroupVerdict> {
        self.state.as_ref().ok_or_else(|| invalid("the group's state can't be read"))
    }

    #[allow(clippy::too_many_arguments, reason = "a commit has that many parts")]
    fn commit(
        &mut self,
        met: Met<'_>,
        by: DeviceAddr,
        commit: &[u8],
        welcome: Option<&[u8]>,
        group_info: &[u8],
        tools: Tools<'_>,
        effects: &mut Effects,
    ) -> Verdict {
        if group_info.len() > limits::COMMIT_BYTES {
            return Err(invalid("the GroupInfo is larger than a commit may be"));
        }
        let state = self.state()?;
        let checked = match state.public.check(commit, tools.random) {
            Ok(checked) => checked,
            // Its verdict got lost, and it asks again.
            Err(Refused::Epoch { have, got }) if got.checked_add(1) == Some(have) && self.begun_by == Some(digest(commit)) => {
                return Ok((self.head.snapshot_at, have));
            }
            Err(Refused::Epoch { .. }) => return Err(self.conflict()),
            Err(other) => return Err(refused(other)),
        };
        if !matches!(checked.changes.committer, Actor::Member(device) | Actor::Joiner(device) if device == by) {
            return Err(denied("somebody else signed the commit"));
        }
        let welcomes = welcomes(&checked.invited, welcome)?;
        if !checked.is_timely(met.event.at) {
            return Err(invalid("a KeyPackage's lifetime has not begun or is nearly over"));
        }
        if !checked.is_described_by(group_info, tools.random) {
            return Err(invalid("the GroupInfo is not the committer's of the epoch that the commit begins"));
        }
        let before = self.accounts();
        let leaves = state.public.roster().map_err(|error| refused(error.into()))?.leaves;
        let removed: Vec<DeviceAddr> = checked.changes.removed.iter().filter_map(|(_, leaf)| leaves.get(leaf).copied()).collect();
        // It was checked: if merging fails the group is not what it was any more, and is read again.
        let mut public = self.state.take().ok_or_else(|| invalid("the group's state can't be read"))?.public;
        self.lost = true;
        let saved = public.merge_and_save(checked).map_err(refused)?;
        let epoch = public.epoch();
        let roster = roster_of(&public.roster().map_err(|error| refused(error.into()))?, epoch);
        if (&roster.owner, &roster.admins, &roster.devices) != (&self.roster.owner, &self.roster.admins, &self.roster.devices) {
            self.roster = roster;
            self.dirty.roster = Some(met.at);
        }
        let accounts = self.accounts();
        effects.write.members.extend(accounts.difference(&before).map(|account| (*account, self.id, met.at, true)));
        effects.write.members.extend(before.difference(&accounts).map(|account| (*account, self.id, met.at, false)));
        if !welcomes.is_empty() {
            effects.write.trees.push((self.id, epoch, met.at, public.tree().map_err(refused)?));
        }
        effects.invitations.extend(welcomes.into_iter().map(|(device, welcome)| Invitation {
            group: self.id,
            device,
            by,
            accepted: met.event.at,
            epoch,
            seq: met.at,
            welcome,
        }));
        (self.state, self.lost) = (Some(State::new(public, saved)), false);
        self.begun_by = Some(digest(commit));
        self.dirty.state = Some(met.at);
        self.dirty.info = Some((met.at, event::share(met.payload, group_info)));
        (self.head.epoch, self.head.snapshot_epoch, self.head.snapshot_at) = (epoch, epoch, met.at);
        let mut gone = std::mem::take(&mut self.head.gone);
        gone.retain(|device| self.has(*device) && !removed.contains(device));
        self.head.gone = gone;
        self.item(met, GroupItemKind::Commit, Some(by), ClientMessageId(0), epoch - 1, event::share(met.payload, commit), effects);
        if !self.head.gone.is_empty() && self.server_speaks(tools) {
            effects.follow_ups.push((self.id, self.head.gone.clone()));
        }
        Ok((met.at, epoch))
    }

    /// A device asks to be taken out: only itself.
    fn proposal(&mut self, met: Met<'_>, by: DeviceAddr, proposal: &[u8], tools: Tools<'_>, effects: &mut Effects) -> Verdict {
        let conflict = self.conflict();
        let epoch = self.head.epoch;
        let state = self.state.as_mut().ok_or_else(|| invalid("the group's state can't be read"))?;
        let checked = match state.public.check_proposal(proposal, tools.random) {
            Ok(checked) => checked,
            Err(Refused::Epoch { .. }) => return Err(conflict),
            Err(other) => return Err(refused(other)),
        };
        let own = state.public.roster().map_err(|error| refused(error.into()))?.leaf_of(by);
        if checked.by != Actor::Member(by) || own != Some(checked.leaf) {
            return Err(denied("a device proposes its own removal only"));
        }
        if let Some(at) = state.proposed(checked.leaf) {
            return Ok((at, epoch));
        }
        let leaf = checked.leaf;
        state.public.keep(checked).map_err(refused)?;
        state.proposals.push((met.at, leaf, proposal.to_vec()));
        self.dirty.state = Some(met.at);
        self.item(met, GroupItemKind::Proposal, Some(by), ClientMessageId(0), epoch, event::share(met.payload, proposal), effects);
        if self.is_abandoned() {
            effects.follow_ups.push((self.id, Vec::new()));
        }
        Ok((met.at, epoch))
    }

    fn message(
        &mut self,
        met: Met<'_>,
        by: DeviceAddr,
        client_message_id: ClientMessageId,
        epoch: u64,
        content: &[u8],
        effects: &mut Effects,
    ) -> Verdict {
        if content.len() > limits::ENVELOPE_BYTES || client_message_id.0 == 0 {
            return Err(invalid("larger than a message may be, or without an id"));
        }
        if !self.has(by) {
            return Err(denied("the device is not in the group"));
        }
        if epoch > self.head.epoch || epoch + (limits::PAST_EPOCHS as u64) < self.head.epoch {
            return Err(self.conflict());
        }
        if !framing::is_written_in(content, self.id, epoch) {
            return Err(invalid("not a message of this group and epoch"));
        }
        let is_stored = self.stored.contains_key(&met.at);
        let (mark, dirty) = self.marks.entry(by).or_default();
        let seen = if mark.applied >= met.at {
            // The mark was written before a crash, and the head was not.
            if is_stored { Seen::New } else { Seen::Again }
        } else {
            let seen = mark.see(client_message_id.0);
            if seen == Seen::New {
                (mark.applied, *dirty) = (met.at, true);
            }
            seen
        };
        match seen {
            Seen::New => {}
            Seen::Again => return Ok((self.head.head, self.head.epoch)),
            Seen::Behind => return Err(denied("the message's id is too far behind the highest")),
        }
        self.item(met, GroupItemKind::Message, Some(by), client_message_id, epoch, event::share(met.payload, content), effects);
        Ok((met.at, self.head.epoch))
    }

    /// Whether members listen to this server.
    fn server_speaks(&self, tools: Tools<'_>) -> bool {
        let listens = |key: &ServerKey| self.state.as_ref().is_some_and(|state| state.public.listens_to(&key.public()) == Some(true));
        tools.key.is_some_and(listens)
    }

    /// Whether all its devices are gone or asked to leave: nobody is left who would commit that.
    fn is_abandoned(&self) -> bool {
        let Some(Ok((state, roster))) = self.state.as_ref().map(|state| state.public.roster().map(|roster| (state, roster))) else {
            return false;
        };
        roster.leaves.iter().all(|(leaf, device)| self.head.gone.contains(device) || state.proposed(*leaf).is_some())
    }

    /// Proposes to remove the first of the devices that are gone for which that was not done in this epoch, and asks for another turn if there
    /// are more. If nobody else is left the group ends instead.
    fn devices_gone(&mut self, met: Met<'_>, devices: &[DeviceAddr], tools: Tools<'_>, effects: &mut Effects) {
        let new: Vec<DeviceAddr> = devices.iter().copied().filter(|device| self.has(*device) && !self.head.gone.contains(device)).collect();
        if !new.is_empty() {
            self.head.gone.extend(new);
            self.head.gone.sort_unstable();
            self.head.gone.dedup();
            self.touched(met);
        }
        if self.is_abandoned() {
            self.end(met, None, effects);
            return;
        }
        let (Some(key), true, Some(state)) = (tools.key, self.server_speaks(tools), &mut self.state) else { return };
        let Ok(roster) = state.public.roster() else { return };
        let due: Vec<(DeviceAddr, u32)> = self
            .head
            .gone
            .iter()
            .filter_map(|device| Some((*device, roster.leaf_of(*device)?)))
            .filter(|(_, leaf)| state.proposed(*leaf).is_none())
            .collect();
        let Some(((_, leaf), rest)) = due.split_first() else { return };
        let epoch = self.head.epoch;
        let proposal = key.remove(self.id, epoch, *leaf);
        let proposal = proposal.and_then(|proposal| state.propose(met.at, &proposal, tools.random).map(|()| proposal));
        let Ok(proposal) = proposal.inspect_err(|error| tracing::warn!(%error, "the server can't propose a removal in a group")) else {
            return;
        };
        self.dirty.state = Some(met.at);
        self.item(met, GroupItemKind::Proposal, None, ClientMessageId(0), epoch, proposal.into(), effects);
        if !rest.is_empty() {
            effects.follow_ups.push((self.id, rest.iter().map(|(device, _)| *device).collect()));
        }
    }

    fn close(&mut self, met: Met<'_>, by: DeviceAddr, effects: &mut Effects) -> Verdict {
        if !self.has(by) || self.roster.owner != Some(by.account) {
            return Err(denied("only the owner closes a group"));
        }
        self.end(met, Some(by), effects);
        Ok((met.at, self.head.epoch))
    }

    fn end(&mut self, met: Met<'_>, by: Option<DeviceAddr>, effects: &mut Effects) {
        self.head.closed = true;
        self.item(met, GroupItemKind::Closed, by, ClientMessageId(0), self.head.epoch, Bytes::new(), effects);
        (self.head.edges, self.head.gone) = (Vec::new(), Vec::new());
        (self.state, self.marks, self.begun_by) = (None, BTreeMap::new(), None);
        (self.dirty.state, self.dirty.info) = (None, None);
        effects.write.closed.push((self.id, met.at));
    }
}

/// The Welcome of each added device; one secret for each of them and for nobody else.
fn welcomes(invited: &[(DeviceAddr, Vec<u8>)], welcome: Option<&[u8]>) -> Result<Vec<(DeviceAddr, Vec<u8>)>, GroupVerdict> {
    let Some(welcome) = welcome else {
        return if invited.is_empty() { Ok(Vec::new()) } else { Err(invalid("who is added needs a Welcome")) };
    };
    let split = welcome::split(welcome).map_err(|error| GroupVerdict::Invalid(error.to_string()))?;
    if invited.is_empty() || split.refs().len() != invited.len() {
        return Err(invalid("the Welcome is not for those who are added"));
    }
    let one = |(device, key_package): &(DeviceAddr, Vec<u8>)| Some((*device, split.for_ref(key_package)?));
    invited.iter().map(one).collect::<Option<_>>().ok_or_else(|| invalid("the Welcome is not for those who are added"))
}
