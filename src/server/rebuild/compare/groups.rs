//! Whether a group is the same in two views.

use crate::ids::{DeviceAddr, GroupId, Seq};
use crate::limits;
use crate::store::StoreError;
use crate::store::compare::{Range, Verdict};
use crate::store::cql::CqlStore;
use crate::store::groups::{GroupHead, GroupStore as _};

/// What both must agree on. When items expired and which snapshot is kept is each view's own, and which edges follow ends with the next
/// restart of them.
fn essence(head: Option<&GroupHead>) -> Option<GroupHead> {
    head.map(|head| GroupHead { expired_to: Seq::ZERO, snapshot_epoch: 0, snapshot_at: Seq::ZERO, edges: Vec::new(), ..head.clone() })
}

/// Head, roster, GroupInfo, marks and items of a group.
pub(super) async fn group(live: &CqlStore, other: &CqlStore, id: GroupId, range: Range) -> Result<Verdict, StoreError> {
    let (one, two) = futures_util::try_join!(live.group(id), other.group(id))?;
    let applied = [&one, &two].map(|head| head.as_ref().map_or(Seq::ZERO, |head| head.applied));
    let differs = if applied[0] != applied[1] && applied[0].max(applied[1]) >= range.bound {
        Verdict::Later
    } else if range.begins.is_some() && (one.is_none() || two.is_none()) {
        // One that was closed before the log begins has left no state there.
        Verdict::Forgotten
    } else {
        Verdict::Differs
    };
    if essence(one.as_ref()) != essence(two.as_ref()) {
        return Ok(differs);
    }
    let (mine, theirs) = futures_util::try_join!(live.group_roster(id), other.group_roster(id))?;
    let infos = futures_util::try_join!(live.group_info(id), other.group_info(id))?;
    if mine != theirs || infos.0 != infos.1 {
        return Ok(differs);
    }
    let devices: Vec<DeviceAddr> = mine.map(|roster| roster.devices).unwrap_or_default();
    let marks = futures_util::try_join!(live.group_marks(id, devices.clone()), other.group_marks(id, devices))?;
    if marks.0 != marks.1 {
        return Ok(differs);
    }
    let mut after = one.iter().chain(&two).map(|head| head.expired_to).max().unwrap_or_default();
    loop {
        let (items, bytes) = (limits::CQL_PAGE_ROWS, limits::INBOX_PAGE_BYTES);
        let pages = futures_util::try_join!(live.group_items(id, after, items, bytes), other.group_items(id, after, items, bytes))?;
        if pages.0 != pages.1 {
            return Ok(differs);
        }
        let Some(last) = pages.0.last() else { return Ok(Verdict::Equal) };
        after = last.seq;
    }
}
