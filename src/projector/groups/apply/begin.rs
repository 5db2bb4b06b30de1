//! A group that begins, or goes on, from its state on the log.

use bytes::Bytes;

use super::{Dirty, Effects, Group, Met, Refused, State, Tools, roster_of};
use crate::ids::{DeviceAddr, Seq};
use crate::limits;
use crate::projector::groups::carried::{Carried, Members};
use crate::store::Mark;
use crate::store::groups::GroupRoster;
use crate::wire::group_event::{GroupEvent, GroupEventBody};

/// Whether an event at this position makes a group's state whole, near enough to what is in it to be begun from.
pub fn is_state(event: &GroupEvent<'_>, at: Seq) -> bool {
    let GroupEventBody::State { next, part, parts, .. } = event.body else { return false };
    let is_last = part.checked_add(1) == Some(parts) && parts <= limits::GROUP_STATE_PARTS;
    is_last && next > Seq::ZERO && next <= at && at.0 - next.0 <= limits::GROUP_STATE_REACH
}

/// Whether a view lacks what is in a state. One that met all events of the group never does.
pub fn lacks(group: Option<&Group>, event: &GroupEvent<'_>) -> bool {
    let GroupEventBody::State { applied, epoch, .. } = event.body else { return false };
    group.is_none_or(|group| group.head.applied < applied || group.head.epoch < epoch)
}

/// Takes the group as it was carried, forgetting what was before. Its items up to there are gone: the log has not kept what was among them. An
/// error leaves everything as it was.
pub fn begin(group: &mut Option<Group>, met: Met<'_>, carried: Carried, tools: Tools<'_>, effects: &mut Effects) -> Result<(), Refused> {
    let Carried { mut head, members: Members { roster, marks, has_tree, begun_by }, info, snapshot } = carried;
    let (id, at) = (met.event.group, head.applied);
    let state = State::decode(id, &snapshot, at, tools.random)?;
    if head.closed || state.public.id() != id || !fit(&state, head.epoch, &roster, &info)? {
        return Err(Refused::Invalid("the parts of a group's state do not fit together".to_owned()));
    }
    if has_tree {
        effects.write.trees.push((id, head.epoch, head.snapshot_at, state.public.tree()?));
    }
    head.expired_to = head.expired_to.max(head.head);
    let mut next = Group::new(id, head, roster);
    let (mut before, accounts) = (std::collections::BTreeSet::new(), next.accounts());
    if let Some(old) = group.take() {
        before = old.accounts();
        (next.marks, next.stored) = (old.marks, old.stored);
        effects.write.drop_to.push((id, next.head.expired_to));
    }
    effects.write.members.extend(accounts.iter().map(|account| (*account, id, at, true)));
    effects.write.members.extend(before.difference(&accounts).map(|account| (*account, id, at, false)));
    next.marks.extend(marks.into_iter().map(|(sender, mark)| (sender, (mark, true))));
    (next.state, next.begun_by, next.info) = (Some(state), begun_by, Some(info.clone()));
    next.dirty = Dirty { head: true, roster: Some(at), state: Some(at), info: Some((at, info)) };
    *group = Some(next);
    Ok(())
}

/// Whether the parts of a state are of one group and epoch.
fn fit(state: &State, epoch: u64, roster: &GroupRoster, info: &[u8]) -> Result<bool, Refused> {
    let known = roster_of(&state.public.roster()?, roster.epoch);
    Ok(state.public.epoch() == epoch && known == *roster && state.public.matches(info))
}

impl Group {
    /// The group as a state carries it, if it is open and its parts fit together: `info` its GroupInfo, `marks` its members', as the store has
    /// them. Another projector may have written some of them meanwhile.
    pub fn carried(&self, info: Bytes, mut marks: Vec<(DeviceAddr, Mark)>, has_tree: bool) -> Option<Carried> {
        let state = self.state.as_ref().filter(|_| !self.head.closed)?;
        if !fit(state, self.head.epoch, &self.roster, &info).ok()? {
            return None;
        }
        marks.retain(|(_, mark)| mark.applied <= self.head.applied);
        let members = Members { roster: self.roster.clone(), marks, has_tree, begun_by: self.begun_by };
        Some(Carried { head: self.head.clone(), members, info, snapshot: state.encode().into() })
    }
}
