//! One view in two places while readers move from the one to the other: every write goes to both before it is done.
//!
//! A projector that begins to do so finds the two at different positions. It goes on from where the one that is behind stands, and reads
//! only that one: what it replays then brings it to where the other is, and the other takes none of it, since rows there carry
//! later log positions (see [`DeliveryWrite`]). So it does not matter which of the two is behind, nor who wrote
//! only one of them in between; each partition is made whole by its next owner.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::RwLock;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, GroupId, Identity, Offset, Partition, Seq};
use crate::store::groups::{GroupHead, GroupItem, GroupRoster, GroupStore, GroupWrite};
use crate::store::{
    AccountRecord, DeliveryStore, DeliveryWrite, DeviceKeys, DirectoryStore, DirectoryWrite, InboxState, Mark, MarkKey, PendingItem,
    StoreError,
};

/// Where the records of an account (or a group) stand or stood in the log, the newest partition first.
pub type PartitionsOf<K = AccountId> = Box<dyn Fn(&K) -> Vec<Partition> + Send + Sync>;

/// See the module. `S` is a view, of all kinds.
pub struct Mirrored<S> {
    views: [Arc<S>; 2],
    inbox: Behind<AccountId>,
    directory: Behind<AccountId>,
    groups: Behind<GroupId>,
    /// Whether a partition of `inbox` is applied no more.
    is_over: Box<dyn Fn(Partition) -> bool + Send + Sync>,
}

/// For each partition the view that was behind when its position was asked for last: the one to read.
struct Behind<K> {
    views: RwLock<HashMap<Partition, usize>>,
    partitions_of: PartitionsOf<K>,
}

impl<K> Behind<K> {
    fn of(partitions_of: PartitionsOf<K>) -> Self {
        Self { views: RwLock::default(), partitions_of }
    }

    /// By the newest of its partitions that is kept here.
    fn view(&self, key: &K) -> usize {
        let views = self.views.read();
        (self.partitions_of)(key).iter().find_map(|partition| views.get(partition).copied()).unwrap_or_default()
    }

    /// The lower position is the one that holds for both.
    fn settle(&self, partition: Partition, positions: [Offset; 2]) -> Offset {
        let [first, second] = positions;
        let behind = usize::from(second < first);
        self.views.write().insert(partition, behind);
        if first != second {
            tracing::info!(partition = partition.0, ?first, ?second, "two views go on together from where the one behind stands");
        }
        positions[behind]
    }
}

impl<S> Mirrored<S> {
    /// Of two views, with what the log says of its partitions of `inbox`, and those of `directory` and of `groups`.
    pub fn new(
        views: [Arc<S>; 2],
        inbox: PartitionsOf,
        is_over: impl Fn(Partition) -> bool + Send + Sync + 'static,
        directory: PartitionsOf,
        groups: PartitionsOf<GroupId>,
    ) -> Self {
        let (inbox, directory, groups) = (Behind::of(inbox), Behind::of(directory), Behind::of(groups));
        Self { views, inbox, directory, groups, is_over: Box::new(is_over) }
    }

    fn reads(&self, account: &AccountId) -> &S {
        &self.views[self.inbox.view(account)]
    }

    fn reads_group(&self, group: GroupId) -> &S {
        &self.views[self.groups.view(&group)]
    }
}

#[async_trait]
impl<S: DeliveryStore> DeliveryStore for Mirrored<S> {
    async fn position(&self, partition: Partition) -> Result<Offset, StoreError> {
        let positions = [self.views[0].position(partition).await?, self.views[1].position(partition).await?];
        if positions[0] != positions[1] && (self.is_over)(partition) {
            // Its records are applied no more, so the one behind would stay so for ever.
            return Err(StoreError::Corrupt(format!(
                "partition {} was drained while only one of two keyspaces was kept: let `sealpost rebuild --into` catch up first",
                partition.0
            )));
        }
        Ok(self.inbox.settle(partition, positions))
    }

    async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError> {
        futures_util::try_join!(self.views[0].write(write.clone()), self.views[1].write(write)).map(drop)
    }

    async fn inboxes(&self, devices: Vec<DeviceAddr>) -> Result<Vec<Option<InboxState>>, StoreError> {
        let mut answers = vec![None; devices.len()];
        for (number, view) in self.views.iter().enumerate() {
            let mine: Vec<usize> = (0..devices.len()).filter(|&at| self.inbox.view(&devices[at].account) == number).collect();
            if !mine.is_empty() {
                let found = view.inboxes(mine.iter().map(|&at| devices[at]).collect()).await?;
                mine.into_iter().zip(found).for_each(|(at, found)| answers[at] = found);
            }
        }
        Ok(answers)
    }

    async fn marks(&self, keys: Vec<MarkKey>) -> Result<Vec<Option<Mark>>, StoreError> {
        let mut answers = vec![None; keys.len()];
        for (number, view) in self.views.iter().enumerate() {
            let mine: Vec<usize> = (0..keys.len()).filter(|&at| self.inbox.view(&keys[at].recipient) == number).collect();
            if !mine.is_empty() {
                let found = view.marks(mine.iter().map(|&at| keys[at]).collect()).await?;
                mine.into_iter().zip(found).for_each(|(at, found)| answers[at] = found);
            }
        }
        Ok(answers)
    }

    async fn marks_of(&self, recipient: AccountId, max: usize) -> Result<Option<Vec<(MarkKey, Mark)>>, StoreError> {
        self.reads(&recipient).marks_of(recipient, max).await
    }

    async fn pending(
        &self,
        device: DeviceAddr,
        after: Seq,
        to: Seq,
        items_max: usize,
        bytes_max: usize,
    ) -> Result<Vec<PendingItem>, StoreError> {
        self.reads(&device.account).pending(device, after, to, items_max, bytes_max).await
    }

    /// Of the first view: it is as whole as the other, and what it says is only a reason to look.
    async fn expired(
        &self,
        before: UnixMillis,
        after: Option<DeviceAddr>,
        devices_max: usize,
    ) -> Result<Vec<(DeviceAddr, Seq)>, StoreError> {
        self.views[0].expired(before, after, devices_max).await
    }
}

#[async_trait]
impl<S: DirectoryStore> DirectoryStore for Mirrored<S> {
    async fn directory_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        let positions = [self.views[0].directory_position(partition).await?, self.views[1].directory_position(partition).await?];
        Ok(self.directory.settle(partition, positions))
    }

    async fn write_directory(&self, write: DirectoryWrite) -> Result<(), StoreError> {
        futures_util::try_join!(self.views[0].write_directory(write.clone()), self.views[1].write_directory(write)).map(drop)
    }

    async fn account(&self, id: AccountId) -> Result<Option<AccountRecord>, StoreError> {
        self.views[self.directory.view(&id)].account(id).await
    }

    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        self.views[0].identity(identity).await
    }

    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError> {
        self.views[self.directory.view(&device.account)].device_keys(device).await
    }
}

#[async_trait]
impl<S: GroupStore> GroupStore for Mirrored<S> {
    async fn group_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        let positions = [self.views[0].group_position(partition).await?, self.views[1].group_position(partition).await?];
        Ok(self.groups.settle(partition, positions))
    }

    async fn write_groups(&self, write: GroupWrite) -> Result<(), StoreError> {
        futures_util::try_join!(self.views[0].write_groups(write.clone()), self.views[1].write_groups(write)).map(drop)
    }

    async fn group(&self, id: GroupId) -> Result<Option<GroupHead>, StoreError> {
        self.reads_group(id).group(id).await
    }

    async fn group_roster(&self, id: GroupId) -> Result<Option<GroupRoster>, StoreError> {
        self.reads_group(id).group_roster(id).await
    }

    async fn group_info(&self, id: GroupId) -> Result<Option<Bytes>, StoreError> {
        self.reads_group(id).group_info(id).await
    }

    async fn group_snapshot(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        self.reads_group(id).group_snapshot(id, epoch).await
    }

    async fn group_tree(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        self.reads_group(id).group_tree(id, epoch).await
    }

    async fn group_items(&self, id: GroupId, after: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<GroupItem>, StoreError> {
        self.reads_group(id).group_items(id, after, items_max, bytes_max).await
    }

    async fn group_marks(&self, id: GroupId, senders: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> {
        self.reads_group(id).group_marks(id, senders).await
    }

    /// Of both views: whose groups an account's are is said by many partitions, each of which may be behind in another view. A group too many
    /// does no harm.
    async fn groups_of(&self, account: AccountId, after: Option<GroupId>, max: usize) -> Result<Vec<GroupId>, StoreError> {
        let [first, second] = [self.views[0].groups_of(account, after, max), self.views[1].groups_of(account, after, max)];
        let (first, second) = futures_util::try_join!(first, second)?;
        let both: BTreeSet<GroupId> = first.into_iter().chain(second).collect();
        Ok(both.into_iter().take(max).collect())
    }

    /// Of the first view: it is as whole as the other, and what it says is only a reason to look.
    async fn groups_expired(&self, before: UnixMillis, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        self.views[0].groups_expired(before, after, max).await
    }

    /// Of the first view, likewise.
    async fn group_heads(&self, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, GroupHead)>, StoreError> {
        self.views[0].group_heads(after, max).await
    }
}
