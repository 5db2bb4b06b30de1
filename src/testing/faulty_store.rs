//! Stores that fail when told to: before a call does anything, or after it did everything; or that are slow.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::clock::{Random as _, SeededRandom, UnixMillis};
use crate::ids::{AccountId, DeviceAddr, GroupId, Identity, Offset, Partition, Seq};
use crate::store::conformance::Stores;
use crate::store::groups::{GroupHead, GroupItem, GroupRoster, GroupStore, GroupWrite};
use crate::store::seal::SealKey;
use crate::store::{
    DeliveryStore, DeliveryWrite, DeviceKeys, DirectoryStore, DirectoryWrite, InboxState, KeyKind, KeyStore, Mark, MarkKey, OneTimeKey,
    PendingItem, StoreError,
};
use crate::wire::event::AccountRecord;

/// A method of the stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Call {
    /// [`DeliveryStore::position`].
    Position,
    /// [`DeliveryStore::write`].
    Write,
    /// [`DeliveryStore::inboxes`].
    Inboxes,
    /// [`DeliveryStore::marks`].
    Marks,
    /// [`DeliveryStore::pending`].
    Pending,
    /// [`DeliveryStore::expired`].
    Expired,
    /// [`DirectoryStore::directory_position`].
    DirectoryPosition,
    /// [`DirectoryStore::write_directory`].
    WriteDirectory,
    /// [`DirectoryStore::account`].
    Account,
    /// [`DirectoryStore::identity`].
    Identity,
    /// [`DirectoryStore::device_keys`].
    DeviceKeys,
    /// [`KeyStore::add_one_time`].
    AddOneTime,
    /// [`KeyStore::take_one_time`].
    TakeOneTime,
    /// [`KeyStore::first_one_time`].
    FirstOneTime,
    /// [`KeyStore::count_one_time`].
    CountOneTime,
    /// [`KeyStore::remove_one_time`].
    RemoveOneTime,
    /// [`KeyStore::claim_identity`].
    ClaimIdentity,
    /// [`KeyStore::release_identity`].
    ReleaseIdentity,
    /// [`KeyStore::seal_key`].
    SealKey,
    /// [`KeyStore::destroy_seal_key`].
    DestroySealKey,
    /// [`GroupStore::group_position`].
    GroupPosition,
    /// [`GroupStore::write_groups`].
    WriteGroups,
    /// Any other of [`GroupStore`].
    ReadGroups,
}

/// What goes wrong with a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// It fails and nothing was done.
    Before(StoreError),
    /// It was done, and fails all the same.
    After(StoreError),
    /// It is done, this much later.
    Delay(Duration),
}

impl Fault {
    /// [`Fault::Before`] as a disk that can't take it.
    pub fn before() -> Self {
        Self::Before(StoreError::Unavailable("a fault was injected before the call".into()))
    }

    /// [`Fault::After`], likewise.
    pub fn after() -> Self {
        Self::After(StoreError::Unavailable("a fault was injected after the call".into()))
    }
}

#[derive(Default)]
struct Plan {
    scripts: HashMap<Call, VecDeque<Fault>>,
    counts: HashMap<Call, u64>,
    /// Of 1,000 calls so many fail, half of them after they were done.
    permille: u64,
}

/// Stores with faults. Everything that no fault hits goes to the stores within.
pub struct FaultyStore {
    inner: Stores,
    random: SeededRandom,
    plan: Mutex<Plan>,
}

impl FaultyStore {
    /// Faultless at first. The seed decides the random faults.
    pub fn new(inner: Stores, seed: u64) -> Arc<Self> {
        Arc::new(Self { inner, random: SeededRandom::new(seed), plan: Mutex::default() })
    }

    /// As the four traits.
    pub fn stores(self: &Arc<Self>) -> Stores {
        Stores::of(self)
    }

    /// The next calls of this method meet these faults, in order; then none, or random ones.
    pub fn script(&self, call: Call, faults: impl IntoIterator<Item = Fault>) {
        self.plan.lock().scripts.entry(call).or_default().extend(faults);
    }

    /// From now on so many of 1,000 calls of any method fail, half of them after they were done. 0 stops it.
    pub fn fail_randomly(&self, permille: u64) {
        self.plan.lock().permille = permille;
    }

    /// No more faults.
    pub fn calm(&self) {
        let mut plan = self.plan.lock();
        plan.scripts.clear();
        plan.permille = 0;
    }

    /// How often the method was called.
    pub fn count(&self, call: Call) -> u64 {
        self.plan.lock().counts.get(&call).copied().unwrap_or(0)
    }

    fn fault(&self, call: Call) -> Fault {
        let mut plan = self.plan.lock();
        *plan.counts.entry(call).or_default() += 1;
        if let Some(fault) = plan.scripts.get_mut(&call).and_then(VecDeque::pop_front) {
            return fault;
        }
        let mut dice = [0; 8];
        self.random.fill(&mut dice);
        let dice = u64::from_le_bytes(dice);
        match (dice % 1000 < plan.permille, dice & (1 << 32) == 0) {
            (false, _) => Fault::None,
            (true, true) => Fault::before(),
            (true, false) => Fault::after(),
        }
    }

    async fn run<T>(&self, call: Call, work: impl Future<Output = Result<T, StoreError>> + Send) -> Result<T, StoreError> {
        match self.fault(call) {
            Fault::None => work.await,
            Fault::Before(error) => Err(error),
            Fault::After(error) => work.await.and(Err(error)),
            Fault::Delay(time) => {
                tokio::time::sleep(time).await;
                work.await
            }
        }
    }
}

#[async_trait]
impl DeliveryStore for FaultyStore {
    async fn position(&self, partition: Partition) -> Result<Offset, StoreError> {
        self.run(Call::Position, self.inner.delivery.position(partition)).await
    }
    async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError> {
        self.run(Call::Write, self.inner.delivery.write(write)).await
    }
    async fn inboxes(&self, devices: Vec<DeviceAddr>) -> Result<Vec<Option<InboxState>>, StoreError> {
        self.run(Call::Inboxes, self.inner.delivery.inboxes(devices)).await
    }
    async fn marks(&self, keys: Vec<MarkKey>) -> Result<Vec<Option<Mark>>, StoreError> {
        self.run(Call::Marks, self.inner.delivery.marks(keys)).await
    }
    async fn marks_of(&self, recipient: AccountId, max: usize) -> Result<Option<Vec<(MarkKey, Mark)>>, StoreError> {
        self.run(Call::Marks, self.inner.delivery.marks_of(recipient, max)).await
    }
    async fn pending(
        &self,
        device: DeviceAddr,
        after: Seq,
        to: Seq,
        items_max: usize,
        bytes_max: usize,
    ) -> Result<Vec<PendingItem>, StoreError> {
        self.run(Call::Pending, self.inner.delivery.pending(device, after, to, items_max, bytes_max)).await
    }
    async fn expired(
        &self,
        before: UnixMillis,
        after: Option<DeviceAddr>,
        devices_max: usize,
    ) -> Result<Vec<(DeviceAddr, Seq)>, StoreError> {
        self.run(Call::Expired, self.inner.delivery.expired(before, after, devices_max)).await
    }
}

#[async_trait]
impl DirectoryStore for FaultyStore {
    async fn directory_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        self.run(Call::DirectoryPosition, self.inner.directory.directory_position(partition)).await
    }
    async fn write_directory(&self, write: DirectoryWrite) -> Result<(), StoreError> {
        self.run(Call::WriteDirectory, self.inner.directory.write_directory(write)).await
    }
    async fn account(&self, id: AccountId) -> Result<Option<AccountRecord>, StoreError> {
        self.run(Call::Account, self.inner.directory.account(id)).await
    }
    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        self.run(Call::Identity, self.inner.directory.identity(identity)).await
    }
    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError> {
        self.run(Call::DeviceKeys, self.inner.directory.device_keys(device)).await
    }
}

#[async_trait]
impl GroupStore for FaultyStore {
    async fn group_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        self.run(Call::GroupPosition, self.inner.groups.group_position(partition)).await
    }
    async fn write_groups(&self, write: GroupWrite) -> Result<(), StoreError> {
        self.run(Call::WriteGroups, self.inner.groups.write_groups(write)).await
    }
    async fn group(&self, id: GroupId) -> Result<Option<GroupHead>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group(id)).await
    }
    async fn group_roster(&self, id: GroupId) -> Result<Option<GroupRoster>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group_roster(id)).await
    }
    async fn group_info(&self, id: GroupId) -> Result<Option<Bytes>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group_info(id)).await
    }
    async fn group_snapshot(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group_snapshot(id, epoch)).await
    }
    async fn group_tree(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group_tree(id, epoch)).await
    }
    async fn group_items(&self, id: GroupId, after: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<GroupItem>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group_items(id, after, items_max, bytes_max)).await
    }
    async fn group_marks(&self, id: GroupId, senders: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group_marks(id, senders)).await
    }
    async fn groups_of(&self, account: AccountId, after: Option<GroupId>, max: usize) -> Result<Vec<GroupId>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.groups_of(account, after, max)).await
    }
    async fn groups_expired(&self, before: UnixMillis, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.groups_expired(before, after, max)).await
    }
    async fn group_heads(&self, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, GroupHead)>, StoreError> {
        self.run(Call::ReadGroups, self.inner.groups.group_heads(after, max)).await
    }
}

#[async_trait]
impl KeyStore for FaultyStore {
    async fn add_one_time(&self, device: DeviceAddr, kind: KeyKind, keys: Vec<OneTimeKey>) -> Result<usize, StoreError> {
        self.run(Call::AddOneTime, self.inner.keys.add_one_time(device, kind, keys)).await
    }
    async fn take_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<(Option<OneTimeKey>, usize), StoreError> {
        self.run(Call::TakeOneTime, self.inner.keys.take_one_time(device, kind)).await
    }
    async fn first_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<Option<OneTimeKey>, StoreError> {
        self.run(Call::FirstOneTime, self.inner.keys.first_one_time(device, kind)).await
    }
    async fn count_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<usize, StoreError> {
        self.run(Call::CountOneTime, self.inner.keys.count_one_time(device, kind)).await
    }
    async fn remove_one_time(&self, device: DeviceAddr) -> Result<(), StoreError> {
        self.run(Call::RemoveOneTime, self.inner.keys.remove_one_time(device)).await
    }
    async fn claim_identity(&self, identity: &Identity, account: AccountId) -> Result<AccountId, StoreError> {
        self.run(Call::ClaimIdentity, self.inner.keys.claim_identity(identity, account)).await
    }
    async fn release_identity(&self, identity: &Identity, account: AccountId) -> Result<(), StoreError> {
        self.run(Call::ReleaseIdentity, self.inner.keys.release_identity(identity, account)).await
    }
    async fn seal_key(&self, account: AccountId, fresh: Option<SealKey>) -> Result<Option<SealKey>, StoreError> {
        self.run(Call::SealKey, self.inner.keys.seal_key(account, fresh)).await
    }
    async fn destroy_seal_key(&self, account: AccountId) -> Result<(), StoreError> {
        self.run(Call::DestroySealKey, self.inner.keys.destroy_seal_key(account)).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance::{account, device, one_time};
    use crate::store::embedded::{EmbeddedStore, Options};

    #[tokio::test]
    async fn faults_come_as_told() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = EmbeddedStore::open(dir.path(), Options::default()).expect("opens");
        let faulty = FaultyStore::new(Stores::of(&store), 1);
        let Stores { directory, keys, .. } = faulty.stores();
        let dev = device(1, 1);
        keys.add_one_time(dev, KeyKind::Ec, (0..9).map(one_time).collect()).await.expect("adds");
        faulty.script(Call::TakeOneTime, [Fault::before(), Fault::after(), Fault::None]);
        assert!(keys.take_one_time(dev, KeyKind::Ec).await.is_err());
        assert!(keys.take_one_time(dev, KeyKind::Ec).await.is_err());
        assert_eq!(keys.take_one_time(dev, KeyKind::Ec).await, Ok((Some(one_time(1)), 7)), "the second fault spent a key for nobody");
        assert_eq!((faulty.count(Call::TakeOneTime), faulty.count(Call::Account)), (3, 0));

        faulty.fail_randomly(500);
        let mut failed = 0;
        for _ in 0..100 {
            failed += u32::from(directory.account(account(1)).await.is_err());
        }
        assert!((20..80).contains(&failed), "{failed}");
        faulty.calm();
        assert_eq!(directory.account(account(1)).await, Ok(None));
    }
}
