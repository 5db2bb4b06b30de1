//! Groups: not on a cluster yet, which every call says.

use async_trait::async_trait;
use bytes::Bytes;

use super::CqlStore;
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, GroupId, Offset, Partition, Seq};
use crate::store::groups::{GroupHead, GroupItem, GroupRoster, GroupStore, GroupWrite};
use crate::store::{Mark, StoreError};

fn not_yet<T>() -> Result<T, StoreError> {
    Err(StoreError::Unavailable("groups are not kept on a cluster yet".to_owned()))
}

#[async_trait]
impl GroupStore for CqlStore {
    async fn group_position(&self, _: Partition) -> Result<Offset, StoreError> {
        not_yet()
    }

    async fn write_groups(&self, _: GroupWrite) -> Result<(), StoreError> {
        not_yet()
    }

    async fn group(&self, _: GroupId) -> Result<Option<GroupHead>, StoreError> {
        not_yet()
    }

    async fn group_roster(&self, _: GroupId) -> Result<Option<GroupRoster>, StoreError> {
        not_yet()
    }

    async fn group_info(&self, _: GroupId) -> Result<Option<Bytes>, StoreError> {
        not_yet()
    }

    async fn group_snapshot(&self, _: GroupId, _: u64) -> Result<Option<Bytes>, StoreError> {
        not_yet()
    }

    async fn group_tree(&self, _: GroupId, _: u64) -> Result<Option<Bytes>, StoreError> {
        not_yet()
    }

    async fn group_items(&self, _: GroupId, _: Seq, _: usize, _: usize) -> Result<Vec<GroupItem>, StoreError> {
        not_yet()
    }

    async fn group_marks(&self, _: GroupId, _: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> {
        not_yet()
    }

    async fn groups_of(&self, _: AccountId, _: Option<GroupId>, _: usize) -> Result<Vec<GroupId>, StoreError> {
        not_yet()
    }

    async fn groups_expired(&self, _: UnixMillis, _: Option<GroupId>, _: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        not_yet()
    }
}
