//! Tells groups of devices that are no more.

use std::collections::BTreeMap;

use super::worker::append_group;
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr};
use crate::projector::behind::retry;
use crate::projector::directory::Plan;
use crate::projector::worker::{Parts, WorkerError};
use crate::wire::group_event::GroupEventBody;

/// Groups of an account read at once.
const PAGE: usize = 256;

/// Appends to each group of an account which of its devices are gone. Said twice it means the same.
pub(in crate::projector) async fn tell(parts: &Parts, at: UnixMillis, plan: &Plan) -> Result<(), WorkerError> {
    let mut gone: BTreeMap<AccountId, Vec<DeviceAddr>> = BTreeMap::new();
    for device in plan.removed_devices() {
        gone.entry(device.account).or_default().push(device);
    }
    for (account, devices) in gone {
        let mut after = None;
        loop {
            let page = retry(|| parts.groups.groups_of(account, after, PAGE)).await?;
            let Some(last) = page.last() else { break };
            after = Some(*last);
            for group in page {
                append_group(parts.log.as_ref(), group, at, GroupEventBody::DevicesGone { devices: devices.clone() }).await?;
            }
        }
    }
    Ok(())
}
