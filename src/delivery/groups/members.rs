//! Who is in a group, as far as the store says; rosters are kept at hand as long as the group's epoch stays.

use std::sync::Arc;

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::error::GroupError;
use crate::ids::{AccountId, DeviceAddr, GroupId};
use crate::limits;
use crate::store::StoreError;
use crate::store::groups::{GroupHead, GroupRoster, GroupStore};

/// A group and who is in it.
#[derive(Debug, Clone)]
pub struct Known {
    /// The group.
    pub head: GroupHead,
    /// Of the head's epoch, or of a later one.
    pub roster: Arc<GroupRoster>,
}

impl Known {
    /// Refuses devices without a leaf.
    pub fn member(self, device: DeviceAddr) -> Result<Self, GroupError> {
        if has_device(&self.roster, device) { Ok(self) } else { Err(GroupError::not_member()) }
    }

    /// Refuses accounts without a leaf.
    pub fn account(self, account: AccountId) -> Result<Self, GroupError> {
        let at = self.roster.devices.partition_point(|device| device.account < account);
        let inside = self.roster.devices.get(at).is_some_and(|device| device.account == account);
        if inside { Ok(self) } else { Err(GroupError::not_member()) }
    }
}

/// Whether a device has a leaf.
pub fn has_device(roster: &GroupRoster, device: DeviceAddr) -> bool {
    roster.devices.binary_search(&device).is_ok()
}

#[derive(Clone)]
struct Weight;

impl Weighter<GroupId, (u64, Arc<GroupRoster>)> for Weight {
    fn weight(&self, _: &GroupId, (_, roster): &(u64, Arc<GroupRoster>)) -> u64 {
        (128 + roster.devices.len() * size_of::<DeviceAddr>() + roster.admins.len() * 16) as u64
    }
}

/// See the module's own words.
pub(super) struct Members {
    store: Arc<dyn GroupStore>,
    rosters: Cache<GroupId, (u64, Arc<GroupRoster>), Weight>,
}

impl Members {
    pub(super) fn new(store: Arc<dyn GroupStore>) -> Self {
        Self { store, rosters: Cache::with_weighter(limits::CACHED_GROUPS, limits::GROUP_ROSTERS_BYTES as u64, Weight) }
    }

    /// The group as it is in the store now.
    pub(super) async fn known(&self, group: GroupId) -> Result<Option<Known>, StoreError> {
        let Some(head) = self.store.group(group).await? else { return Ok(None) };
        let roster = match self.rosters.get(&group) {
            Some((epoch, roster)) if epoch == head.epoch => roster,
            _ => {
                // Written before the head: never older than it.
                let roster = Arc::new(self.store.group_roster(group).await?.unwrap_or_default());
                self.rosters.insert(group, (head.epoch, Arc::clone(&roster)));
                roster
            }
        };
        Ok(Some(Known { head, roster }))
    }

    /// The same for one of its devices; others are refused.
    pub(super) async fn known_to(&self, group: GroupId, device: DeviceAddr) -> Result<Known, GroupError> {
        let known = self.known(group).await?.ok_or_else(GroupError::no_group)?;
        self.admit(group, known, device).await
    }

    /// Refuses devices without a leaf. Whoever was just added may ask before the head says so: invitations are told before it is written, and
    /// behind the roster. So what is at hand never refuses.
    pub(super) async fn admit(&self, group: GroupId, known: Known, device: DeviceAddr) -> Result<Known, GroupError> {
        if has_device(&known.roster, device) {
            return Ok(known);
        }
        self.written(group, known).await?.member(device)
    }

    /// With the roster that is written, which may be ahead of the head.
    pub(super) async fn written(&self, group: GroupId, known: Known) -> Result<Known, StoreError> {
        let roster = self.store.group_roster(group).await?;
        Ok(Known { roster: roster.map_or(known.roster, Arc::new), ..known })
    }
}
