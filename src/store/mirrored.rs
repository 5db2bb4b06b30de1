//! One view in two places while readers move from the one to the other: every write goes to both before it is done.
//!
//! A projector that begins to do so finds the two at different positions. It goes on from where the one that is behind stands, and reads
//! only that one: what it replays then brings it to where the other is, and the other takes none of it, since rows there carry
//! later log positions (see [`DeliveryWrite`]). So it does not matter which of the two is behind, nor who wrote
//! only one of them in between; each partition is made whole by its next owner.

use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::RwLock;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, Identity, Offset, Partition, Seq};
use crate::store::{
    AccountRecord, DeliveryStore, DeliveryWrite, DeviceKeys, DirectoryStore, DirectoryWrite, InboxState, Mark, MarkKey, PendingItem,
    StoreError,
};

/// See the module. `S` is a view, of both kinds.
pub struct Mirrored<S> {
    views: [Arc<S>; 2],
    /// The view that was behind when the partition's position was asked for last.
    inbox: Behind,
    directory: Behind,
}

/// For each partition the view to read; the first where nothing was asked yet.
struct Behind(RwLock<Vec<usize>>);

impl Behind {
    fn of(partitions: u16) -> Self {
        Self(RwLock::new(vec![0; usize::from(partitions)]))
    }

    fn account(&self, account: &AccountId) -> usize {
        let views = self.0.read();
        let partition = Partition::of(account, u16::try_from(views.len()).unwrap_or(u16::MAX));
        views.get(usize::from(partition.0)).copied().unwrap_or_default()
    }

    /// The lower position is the one that holds for both.
    fn settle(&self, partition: Partition, positions: [Offset; 2]) -> Offset {
        let [first, second] = positions;
        let behind = usize::from(second < first);
        if let Some(view) = self.0.write().get_mut(usize::from(partition.0)) {
            *view = behind;
        }
        if first != second {
            tracing::info!(partition = partition.0, ?first, ?second, "two views go on together from where the one behind stands");
        }
        positions[behind]
    }
}

impl<S> Mirrored<S> {
    /// Of two views of a log with so many partitions of `inbox` and `directory`.
    pub fn new(views: [Arc<S>; 2], inbox: u16, directory: u16) -> Self {
        Self { views, inbox: Behind::of(inbox), directory: Behind::of(directory) }
    }

    fn reads(&self, account: &AccountId) -> &S {
        &self.views[self.inbox.account(account)]
    }
}

#[async_trait]
impl<S: DeliveryStore> DeliveryStore for Mirrored<S> {
    async fn position(&self, partition: Partition) -> Result<Offset, StoreError> {
        let positions = [self.views[0].position(partition).await?, self.views[1].position(partition).await?];
        Ok(self.inbox.settle(partition, positions))
    }

    async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError> {
        futures_util::try_join!(self.views[0].write(write.clone()), self.views[1].write(write)).map(drop)
    }

    async fn inboxes(&self, devices: Vec<DeviceAddr>) -> Result<Vec<Option<InboxState>>, StoreError> {
        let mut answers = vec![None; devices.len()];
        for (number, view) in self.views.iter().enumerate() {
            let mine: Vec<usize> = (0..devices.len()).filter(|&at| self.inbox.account(&devices[at].account) == number).collect();
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
            let mine: Vec<usize> = (0..keys.len()).filter(|&at| self.inbox.account(&keys[at].recipient) == number).collect();
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
        self.views[self.directory.account(&id)].account(id).await
    }

    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        self.views[0].identity(identity).await
    }

    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError> {
        self.views[self.directory.account(&device.account)].device_keys(device).await
    }
}
