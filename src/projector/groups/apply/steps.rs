//! What analysts may know of what a group met (topic `metadata`).

use super::{Effects, Group, Met, Verdict};
use crate::ids::{AccountId, DeviceAddr, DeviceId};
use crate::metadata::Step;
use crate::wire::group_event::GroupEventBody;
use crate::wire::metadata::MetadataKind as Kind;

/// The step of an event, if it is one. `verdict`: what became of it; a repeat is done elsewhere than at its own position.
pub(super) fn note(met: Met<'_>, verdict: Option<&Verdict>, group: Option<&Group>, effects: &mut Effects) {
    let is_done = matches!(verdict, Some(Ok((at, _))) if *at == met.at);
    let device = |by: DeviceAddr| (by.account, Some(by.device));
    let found: Option<(Kind, (AccountId, Option<DeviceId>), usize)> = match &met.event.body {
        GroupEventBody::Created { by, .. } if is_done => Some((Kind::GroupCreated, device(*by), 0)),
        GroupEventBody::Commit { by, commit, .. } if is_done => Some((Kind::GroupCommitAccepted, device(*by), commit.len())),
        GroupEventBody::Commit { by, commit, .. } if group.is_some() && matches!(verdict, Some(Err(_))) => {
            Some((Kind::GroupCommitRefused, device(*by), commit.len()))
        }
        GroupEventBody::Message { by, content, .. } if is_done => Some((Kind::GroupMessage, device(*by), content.len())),
        GroupEventBody::Closed { by } if is_done => Some((Kind::GroupClosed, device(*by), 0)),
        // The server closed it.
        GroupEventBody::DevicesGone { .. } => group
            .filter(|group| group.head.closed && group.head.head == met.at)
            .and_then(|group| Some((Kind::GroupClosed, (group.roster.owner?, None), 0))),
        _ => None,
    };
    effects.steps.extend(found.map(|(kind, by, size)| Step::in_group(kind, met.at, met.event.group, by, met.event.at, size)));
}
