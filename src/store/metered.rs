//! Every call of a store, timed and counted by its kind; nothing else.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, GroupId, Identity, Offset, Partition, Seq};
use crate::metrics::{StoreCall, observe_store_call};
use crate::store::groups::{GroupHead, GroupItem, GroupRoster, GroupStore, GroupWrite};
use crate::store::{
    AccountRecord, DeliveryStore, DeliveryWrite, DeviceKeys, DirectoryStore, DirectoryWrite, InboxState, KeyKind, KeyStore, Mark, MarkKey,
    OneTimeKey, PendingItem, StoreError, seal,
};

/// A store of any of the four kinds, with a clock beside it.
#[derive(Debug)]
pub struct Metered<S: ?Sized>(Arc<S>);

impl<S: ?Sized> Metered<S> {
    /// Around a store.
    pub const fn new(store: Arc<S>) -> Self {
        Self(store)
    }
}

/// A call that is dropped half-way is not counted.
async fn timed<T>(call: StoreCall, work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    let begun = Instant::now();
    let outcome = work.await;
    // A limit is an answer.
    let failed = outcome.as_ref().is_err_and(|error| !matches!(error, StoreError::LimitReached));
    observe_store_call(call, begun.elapsed(), failed);
    outcome
}

#[async_trait]
impl DeliveryStore for Metered<dyn DeliveryStore> {
    async fn position(&self, partition: Partition) -> Result<Offset, StoreError> {
        timed(StoreCall::Position, self.0.position(partition)).await
    }

    async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError> {
        timed(StoreCall::Write, self.0.write(write)).await
    }

    async fn inboxes(&self, devices: Vec<DeviceAddr>) -> Result<Vec<Option<InboxState>>, StoreError> {
        timed(StoreCall::Inboxes, self.0.inboxes(devices)).await
    }

    async fn marks(&self, keys: Vec<MarkKey>) -> Result<Vec<Option<Mark>>, StoreError> {
        timed(StoreCall::Marks, self.0.marks(keys)).await
    }

    async fn marks_of(&self, recipient: AccountId, max: usize) -> Result<Option<Vec<(MarkKey, Mark)>>, StoreError> {
        timed(StoreCall::Marks, self.0.marks_of(recipient, max)).await
    }

    async fn pending(
        &self,
        device: DeviceAddr,
        after: Seq,
        to: Seq,
        items_max: usize,
        bytes_max: usize,
    ) -> Result<Vec<PendingItem>, StoreError> {
        timed(StoreCall::Pending, self.0.pending(device, after, to, items_max, bytes_max)).await
    }

    async fn expired(
        &self,
        before: UnixMillis,
        after: Option<DeviceAddr>,
        devices_max: usize,
    ) -> Result<Vec<(DeviceAddr, Seq)>, StoreError> {
        timed(StoreCall::Expired, self.0.expired(before, after, devices_max)).await
    }
}

#[async_trait]
impl DirectoryStore for Metered<dyn DirectoryStore> {
    async fn directory_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        timed(StoreCall::Position, self.0.directory_position(partition)).await
    }

    async fn write_directory(&self, write: DirectoryWrite) -> Result<(), StoreError> {
        timed(StoreCall::WriteDirectory, self.0.write_directory(write)).await
    }

    async fn account(&self, id: AccountId) -> Result<Option<AccountRecord>, StoreError> {
        timed(StoreCall::Account, self.0.account(id)).await
    }

    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        timed(StoreCall::Identity, self.0.identity(identity)).await
    }

    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError> {
        timed(StoreCall::DeviceKeys, self.0.device_keys(device)).await
    }
}

#[async_trait]
impl KeyStore for Metered<dyn KeyStore> {
    async fn add_one_time(&self, device: DeviceAddr, kind: KeyKind, keys: Vec<OneTimeKey>) -> Result<usize, StoreError> {
        timed(StoreCall::OneTimeAdd, self.0.add_one_time(device, kind, keys)).await
    }

    async fn take_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<(Option<OneTimeKey>, usize), StoreError> {
        timed(StoreCall::OneTimeTake, self.0.take_one_time(device, kind)).await
    }

    async fn first_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<Option<OneTimeKey>, StoreError> {
        timed(StoreCall::OneTimeFirst, self.0.first_one_time(device, kind)).await
    }

    async fn count_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<usize, StoreError> {
        timed(StoreCall::OneTimeCount, self.0.count_one_time(device, kind)).await
    }

    async fn remove_one_time(&self, device: DeviceAddr) -> Result<(), StoreError> {
        timed(StoreCall::OneTimeRemove, self.0.remove_one_time(device)).await
    }

    async fn claim_identity(&self, identity: &Identity, account: AccountId) -> Result<AccountId, StoreError> {
        timed(StoreCall::Claim, self.0.claim_identity(identity, account)).await
    }

    async fn release_identity(&self, identity: &Identity, account: AccountId) -> Result<(), StoreError> {
        timed(StoreCall::Claim, self.0.release_identity(identity, account)).await
    }

    async fn seal_key(&self, account: AccountId, fresh: Option<seal::SealKey>) -> Result<Option<seal::SealKey>, StoreError> {
        timed(StoreCall::SealKey, self.0.seal_key(account, fresh)).await
    }

    async fn destroy_seal_key(&self, account: AccountId) -> Result<(), StoreError> {
        timed(StoreCall::SealKey, self.0.destroy_seal_key(account)).await
    }
}

#[async_trait]
impl GroupStore for Metered<dyn GroupStore> {
    async fn group_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        timed(StoreCall::Position, self.0.group_position(partition)).await
    }

    async fn write_groups(&self, write: GroupWrite) -> Result<(), StoreError> {
        timed(StoreCall::WriteGroups, self.0.write_groups(write)).await
    }

    async fn group(&self, id: GroupId) -> Result<Option<GroupHead>, StoreError> {
        timed(StoreCall::Group, self.0.group(id)).await
    }

    async fn group_roster(&self, id: GroupId) -> Result<Option<GroupRoster>, StoreError> {
        timed(StoreCall::Group, self.0.group_roster(id)).await
    }

    async fn group_info(&self, id: GroupId) -> Result<Option<Bytes>, StoreError> {
        timed(StoreCall::GroupState, self.0.group_info(id)).await
    }

    async fn group_snapshot(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        timed(StoreCall::GroupState, self.0.group_snapshot(id, epoch)).await
    }

    async fn group_tree(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        timed(StoreCall::GroupState, self.0.group_tree(id, epoch)).await
    }

    async fn group_items(&self, id: GroupId, after: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<GroupItem>, StoreError> {
        timed(StoreCall::GroupItems, self.0.group_items(id, after, items_max, bytes_max)).await
    }

    async fn group_marks(&self, id: GroupId, senders: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> {
        timed(StoreCall::Group, self.0.group_marks(id, senders)).await
    }

    async fn groups_of(&self, account: AccountId, after: Option<GroupId>, max: usize) -> Result<Vec<GroupId>, StoreError> {
        timed(StoreCall::GroupsOf, self.0.groups_of(account, after, max)).await
    }

    async fn groups_expired(&self, before: UnixMillis, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        timed(StoreCall::Expired, self.0.groups_expired(before, after, max)).await
    }

    async fn group_heads(&self, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, GroupHead)>, StoreError> {
        timed(StoreCall::GroupHeads, self.0.group_heads(after, max)).await
    }
}
