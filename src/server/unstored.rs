//! No store of groups yet: everything about them is unavailable.

use async_trait::async_trait;
use bytes::Bytes;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, GroupId, Offset, Partition, Seq};
use crate::store::groups::{GroupHead, GroupItem, GroupRoster, GroupStore, GroupWrite};
use crate::store::{Mark, StoreError};

pub(super) struct Unstored;

fn away<T>() -> Result<T, StoreError> {
    Err(StoreError::Unavailable("groups are not stored".into()))
}

#[async_trait]
impl GroupStore for Unstored {
    async fn group_position(&self, _: Partition) -> Result<Offset, StoreError> { away() }
    async fn write_groups(&self, _: GroupWrite) -> Result<(), StoreError> { away() }
    async fn group(&self, _: GroupId) -> Result<Option<GroupHead>, StoreError> { away() }
    async fn group_roster(&self, _: GroupId) -> Result<Option<GroupRoster>, StoreError> { away() }
    async fn group_info(&self, _: GroupId) -> Result<Option<Bytes>, StoreError> { away() }
    async fn group_snapshot(&self, _: GroupId) -> Result<Option<(u64, Bytes)>, StoreError> { away() }
    async fn group_tree(&self, _: GroupId, _: u64) -> Result<Option<Bytes>, StoreError> { away() }
    async fn group_items(&self, _: GroupId, _: Seq, _: usize, _: usize) -> Result<Vec<GroupItem>, StoreError> { away() }
    async fn group_marks(&self, _: GroupId, _: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> { away() }
    async fn groups_of(&self, _: AccountId, _: Option<GroupId>, _: usize) -> Result<Vec<GroupId>, StoreError> { away() }
    async fn groups_expired(&self, _: UnixMillis, _: Option<GroupId>, _: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> { away() }
}
