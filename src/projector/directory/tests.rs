use std::collections::BTreeMap;

use async_trait::async_trait;
use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::clock::UnixMillis;
use crate::ids::{EdgeId, RegistrationId};
use crate::store::seal::SealKey;
use crate::store::{KeyKind, OneTimeKey};

fn account_id(n: u8) -> AccountId {
    AccountId::from_bytes([n; 16])
}

fn device_id(n: u8) -> DeviceId {
    DeviceId::new(u32::from(n)).expect("1 to 127")
}

fn addr(n: u8, device: u8) -> DeviceAddr {
    DeviceAddr { account: account_id(n), device: device_id(device) }
}

fn identity(n: u8) -> Identity {
    format!("user{n}@realm").parse().expect("valid")
}

fn key(n: u8) -> SignedKey {
    SignedKey { id: u32::from(n), public_key: vec![n; 33], signature: vec![n; 64] }
}

fn new_device(secret: u8) -> NewDevice {
    NewDevice {
        name: format!("phone {secret}"),
        registration_id: RegistrationId::new(u32::from(secret) + 1).expect("valid"),
        identity_key: vec![5; 33],
        credential_hash: [secret; 32],
        signed_prekey: key(secret),
        pq_last_resort: key(secret),
    }
}

fn command(n: u8, change: DirectoryChange) -> DirectoryCommand {
    DirectoryCommand { account: account_id(n), at: UnixMillis(u64::from(n) + 100), reply_to: None, change }
}

fn register(n: u8, secret: u8) -> DirectoryCommand {
    command(n, DirectoryChange::RegisterDevice { identity: identity(n), device: new_device(secret) })
}

/// A directory in memory that applies one command after the other.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Model {
    accounts: BTreeMap<AccountId, AccountRecord>,
    keys: BTreeMap<DeviceAddr, DeviceKeys>,
    links: BTreeMap<(Identity, AccountId), ()>,
    /// Commands run so far.
    next: u64,
    claims: BTreeMap<Identity, AccountId>,
    destroyed: BTreeMap<AccountId, ()>,
}

impl Model {
    fn run(&mut self, command: &DirectoryCommand) -> Applied {
        let keys = needs_keys(command).and_then(|device| self.keys.get(&device));
        let applied = apply(command, self.accounts.get(&command.account), keys);
        self.next += 1;
        if let Some(account) = &applied.account {
            self.accounts.insert(account.id, AccountRecord { applied: Offset(self.next), ..account.clone() });
        }
        for (device, keys) in &applied.keys {
            match keys {
                Some(keys) => drop(self.keys.insert(*device, keys.clone())),
                None => drop(self.keys.remove(device)),
            }
        }
        for effect in &applied.effects {
            match effect {
                Effect::Linked(account, identity) => {
                    self.links.insert((identity.clone(), *account), ());
                    self.claims.entry(identity.clone()).or_insert(*account);
                }
                Effect::Unlinked(account, identity) => {
                    self.links.remove(&(identity.clone(), *account));
                    if self.claims.get(identity) == Some(account) {
                        self.claims.remove(identity);
                    }
                }
                Effect::AccountRemoved(account) => drop(self.destroyed.insert(*account, ())),
                Effect::DeviceRemoved(_) => {}
            }
        }
        applied
    }

    /// Without the positions, to compare what came there on different ways.
    fn rows(&self) -> Self {
        let mut rows = Self { next: 0, ..self.clone() };
        rows.accounts.values_mut().for_each(|account| account.applied = Offset(0));
        rows
    }

    fn devices(&self, n: u8) -> Vec<u8> {
        self.accounts[&account_id(n)].devices.iter().map(|device| device.id.get()).collect()
    }
}

#[test]
fn the_first_device_makes_the_account() {
    let mut model = Model::default();
    let applied = model.run(&register(1, 10));
    assert_eq!(applied.verdict, Verdict::Done(Some(addr(1, 1))));
    assert_eq!(applied.effects, [Effect::Linked(account_id(1), identity(1))]);
    let account = &model.accounts[&account_id(1)];
    assert_eq!((account.created, account.identities.clone(), account.last_device), (UnixMillis(101), vec![identity(1)], 1));
    assert_eq!(account.devices[0].credential_hash, [10; 32]);
    assert_eq!(model.keys[&addr(1, 1)].signed_prekey, key(10));
}

#[test]
fn a_device_needs_an_identity_of_the_account() {
    let mut model = Model::default();
    model.run(&register(1, 10));
    let foreign = command(1, DirectoryChange::RegisterDevice { identity: identity(2), device: new_device(11) });
    assert_eq!(model.run(&foreign).verdict, Verdict::Conflict);
    model.run(&command(1, DirectoryChange::LinkIdentity { identity: identity(2) }));
    assert_eq!(model.run(&foreign).verdict, Verdict::Done(Some(addr(1, 2))));
}

#[test]
fn a_registration_that_stands_twice_makes_one_device() {
    let mut model = Model::default();
    model.run(&register(1, 10));
    let before = model.clone();
    assert_eq!(model.run(&register(1, 10)).verdict, Verdict::Done(Some(addr(1, 1))));
    assert_eq!(model.rows(), before.rows());
}

#[test]
fn devices_are_capped_and_numbers_go_round() {
    let mut model = Model::default();
    for secret in 0..limits::DEVICES_PER_ACCOUNT as u8 {
        assert!(matches!(model.run(&register(1, secret)).verdict, Verdict::Done(Some(_))));
    }
    assert_eq!(model.run(&register(1, 99)).verdict, Verdict::LimitReached);
    // Number 2 stays; everything else is registered anew until the numbers went round.
    for i in 0..200u8 {
        let last = *model.devices(1).iter().rfind(|device| **device != 2).expect("more than one");
        assert_eq!(
            model.run(&command(1, DirectoryChange::RevokeDevice { device: device_id(last) })).verdict,
            Verdict::Done(Some(addr(1, last)))
        );
        let previous = model.accounts[&account_id(1)].last_device;
        let Verdict::Done(Some(made)) = model.run(&register(1, 50 + i)).verdict else { panic!("there is room") };
        let number = 11 + u64::from(i);
        let first = model.accounts[&account_id(1)].devices.iter().find(|device| device.id == made.device).expect("made").first_message_id;
        assert_eq!(first.0, if number <= 127 { 1 } else { 101 }, "the {number}th: once numbers may have been given before, the time");
        let expected = (1..=127).map(|step| (previous - 1 + step) % 127 + 1).find(|n| !model_had(&model, made, *n)).expect("a free one");
        assert_eq!(made.device.get(), expected);
    }
    let devices = model.devices(1);
    assert!(devices.is_sorted() && devices.contains(&2) && devices.len() == limits::DEVICES_PER_ACCOUNT);
}

/// Whether the number was taken before `made` was.
fn model_had(model: &Model, made: DeviceAddr, number: u8) -> bool {
    number != made.device.get() && model.devices(1).contains(&number)
}

#[test]
fn links() {
    let mut model = Model::default();
    let link = |n| command(1, DirectoryChange::LinkIdentity { identity: identity(n) });
    let unlink = |n| command(1, DirectoryChange::UnlinkIdentity { identity: identity(n) });
    assert_eq!(model.run(&link(2)).verdict, Verdict::NotFound);
    model.run(&register(1, 1));
    assert_eq!(model.run(&unlink(1)).verdict, Verdict::Conflict, "the last link stays");
    assert_eq!(model.run(&unlink(2)).verdict, Verdict::NotFound);
    for n in 2..=limits::IDENTITIES_PER_ACCOUNT as u8 {
        assert_eq!(model.run(&link(n)).verdict, Verdict::Done(None));
    }
    assert_eq!(model.run(&link(2)).verdict, Verdict::Done(None), "linked already");
    assert_eq!(model.run(&link(100)).verdict, Verdict::LimitReached);
    let applied = model.run(&unlink(1));
    assert_eq!((applied.verdict, applied.effects), (Verdict::Done(None), vec![Effect::Unlinked(account_id(1), identity(1))]));
    assert_eq!(model.run(&link(100)).verdict, Verdict::Done(None));
}

#[test]
fn rename_revoke_and_publish() {
    let mut model = Model::default();
    model.run(&register(1, 1));
    let rename = |device| command(1, DirectoryChange::RenameDevice { device: device_id(device), name: "new".into() });
    let publish = |device, ec: Option<u8>, pq: Option<u8>| {
        let change = DirectoryChange::PublishKeys { device: device_id(device), signed_prekey: ec.map(key), pq_last_resort: pq.map(key) };
        command(1, change)
    };
    assert_eq!(model.run(&rename(1)).verdict, Verdict::Done(Some(addr(1, 1))));
    assert_eq!(model.accounts[&account_id(1)].devices[0].name, "new");
    assert_eq!(model.run(&rename(2)).verdict, Verdict::NotFound);

    assert_eq!(model.run(&publish(1, Some(7), None)).verdict, Verdict::Done(Some(addr(1, 1))));
    assert_eq!(model.keys[&addr(1, 1)], DeviceKeys { signed_prekey: key(7), pq_last_resort: key(1) });
    model.run(&publish(1, None, Some(8)));
    assert_eq!(model.keys[&addr(1, 1)], DeviceKeys { signed_prekey: key(7), pq_last_resort: key(8) });
    assert_eq!(model.run(&publish(2, Some(1), Some(1))).verdict, Verdict::NotFound);

    let revoke = command(1, DirectoryChange::RevokeDevice { device: device_id(1) });
    assert_eq!(model.run(&revoke).effects, [Effect::DeviceRemoved(addr(1, 1))]);
    assert_eq!(model.run(&revoke).verdict, Verdict::NotFound);
    assert!(model.keys.is_empty() && model.devices(1).is_empty());
    assert_eq!(model.run(&publish(1, Some(1), Some(1))).verdict, Verdict::NotFound);
    assert_eq!(model.run(&register(1, 5)).verdict, Verdict::Done(Some(addr(1, 2))), "the account lives on");
}

#[test]
fn blocks_are_sorted_and_capped() {
    let mut model = Model::default();
    model.run(&register(1, 1));
    let block = |other: u16| {
        let mut bytes = [200; 16];
        bytes[..2].copy_from_slice(&other.to_be_bytes());
        command(1, DirectoryChange::Block { other: AccountId::from_bytes(bytes) })
    };
    assert_eq!(model.run(&command(1, DirectoryChange::Block { other: account_id(1) })).verdict, Verdict::Conflict);
    for other in (0..limits::BLOCKS_PER_ACCOUNT as u16).rev() {
        assert_eq!(model.run(&block(other)).verdict, Verdict::Done(None));
    }
    let blocked = &model.accounts[&account_id(1)].blocked;
    assert!(blocked.is_sorted() && blocked.len() == limits::BLOCKS_PER_ACCOUNT);
    assert_eq!(model.run(&block(5)).verdict, Verdict::Done(None), "blocked already");
    assert_eq!(model.run(&block(2000)).verdict, Verdict::LimitReached);
    let other = model.accounts[&account_id(1)].blocked[3];
    let unblock = command(1, DirectoryChange::Unblock { other });
    assert_eq!(model.run(&unblock).verdict, Verdict::Done(None));
    assert_eq!(model.run(&unblock).verdict, Verdict::Done(None));
    assert_eq!(model.accounts[&account_id(1)].blocked.len(), limits::BLOCKS_PER_ACCOUNT - 1);
}

#[test]
fn deletion_leaves_a_tombstone_for_ever() {
    let mut model = Model::default();
    model.run(&register(1, 1));
    model.run(&register(1, 2));
    model.run(&command(1, DirectoryChange::LinkIdentity { identity: identity(9) }));
    let applied = model.run(&command(1, DirectoryChange::DeleteAccount));
    assert_eq!(applied.verdict, Verdict::Done(None));
    let id = account_id(1);
    let effects = [
        Effect::DeviceRemoved(addr(1, 1)),
        Effect::DeviceRemoved(addr(1, 2)),
        Effect::Unlinked(id, identity(1)),
        Effect::Unlinked(id, identity(9)),
        Effect::AccountRemoved(id),
    ];
    assert_eq!(applied.effects, effects);
    let tombstone = model.accounts[&id].clone();
    assert_eq!(tombstone.deleted, Some(UnixMillis(101)));
    assert!(tombstone.devices.is_empty() && tombstone.identities.is_empty() && model.keys.is_empty() && model.links.is_empty());
    for change in [
        DirectoryChange::DeleteAccount,
        register(1, 3).change,
        DirectoryChange::LinkIdentity { identity: identity(1) },
        DirectoryChange::Snapshot(AccountRecord { deleted: None, ..tombstone.clone() }),
    ] {
        assert_eq!(model.run(&command(1, change)).verdict, Verdict::AccountDeleted);
    }
    assert_eq!(model.accounts[&id], tombstone);
    assert_eq!(model.run(&command(2, DirectoryChange::DeleteAccount)).verdict, Verdict::NotFound);
}

#[test]
fn a_snapshot_replaces_the_account() {
    let (mut live, mut compacted) = (Model::default(), Model::default());
    live.run(&register(1, 1));
    live.run(&register(1, 2));
    live.run(&command(1, DirectoryChange::RevokeDevice { device: device_id(1) }));
    let snapshot = live.accounts[&account_id(1)].clone();
    let keys = live.keys[&addr(1, 2)].clone();
    compacted.run(&command(1, DirectoryChange::Snapshot(snapshot.clone())));
    let (signed_prekey, pq_last_resort) = (Some(keys.signed_prekey), Some(keys.pq_last_resort));
    compacted.run(&command(1, DirectoryChange::PublishKeys { device: device_id(2), signed_prekey, pq_last_resort }));
    assert_eq!(live.rows(), compacted.rows());
    let applied = live.run(&command(1, DirectoryChange::Snapshot(AccountRecord { devices: vec![], ..snapshot.clone() })));
    assert_eq!(applied.effects, [Effect::DeviceRemoved(addr(1, 2))]);
    assert_eq!(live.run(&command(2, DirectoryChange::Snapshot(snapshot))).verdict, Verdict::NotFound, "not its own");
}

#[derive(Default)]
struct Memory(Mutex<Model>, Mutex<Vec<DirectoryWrite>>);

#[async_trait]
impl DirectoryStore for Memory {
    async fn directory_position(&self, _: Partition) -> Result<Offset, StoreError> {
        Ok(self.1.lock().last().and_then(|write| write.position).map_or(Offset(0), |(_, next)| next))
    }
    async fn write_directory(&self, write: DirectoryWrite) -> Result<(), StoreError> {
        let mut model = self.0.lock();
        for account in &write.accounts {
            model.accounts.insert(account.id, account.clone());
        }
        for (device, keys) in &write.keys {
            match keys {
                Some(keys) => drop(model.keys.insert(*device, keys.clone())),
                None => drop(model.keys.remove(device)),
            }
        }
        model.next = write.position.map_or(model.next, |(_, next)| next.0);
        for link in &write.unlinked {
            model.links.remove(link);
        }
        for link in &write.linked {
            model.links.insert(link.clone(), ());
        }
        self.1.lock().push(write);
        Ok(())
    }
    async fn account(&self, id: AccountId) -> Result<Option<AccountRecord>, StoreError> {
        Ok(self.0.lock().accounts.get(&id).cloned())
    }
    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        Ok(self.0.lock().links.keys().find(|(linked, _)| linked == identity).map(|(_, account)| *account))
    }
    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError> {
        Ok(self.0.lock().keys.get(&device).cloned())
    }
}

#[async_trait]
impl KeyStore for Memory {
    async fn add_one_time(&self, _: DeviceAddr, _: KeyKind, _: Vec<OneTimeKey>) -> Result<usize, StoreError> {
        Ok(0)
    }
    async fn take_one_time(&self, _: DeviceAddr, _: KeyKind) -> Result<(Option<OneTimeKey>, usize), StoreError> {
        Ok((None, 0))
    }
    async fn first_one_time(&self, _: DeviceAddr, _: KeyKind) -> Result<Option<OneTimeKey>, StoreError> {
        Ok(None)
    }
    async fn count_one_time(&self, _: DeviceAddr, _: KeyKind) -> Result<usize, StoreError> {
        Ok(0)
    }
    async fn remove_one_time(&self, _: DeviceAddr) -> Result<(), StoreError> {
        Ok(())
    }
    async fn claim_identity(&self, identity: &Identity, account: AccountId) -> Result<AccountId, StoreError> {
        Ok(*self.0.lock().claims.entry(identity.clone()).or_insert(account))
    }
    async fn release_identity(&self, identity: &Identity, account: AccountId) -> Result<(), StoreError> {
        let mut model = self.0.lock();
        if model.claims.get(identity) == Some(&account) {
            model.claims.remove(identity);
        }
        Ok(())
    }
    async fn seal_key(&self, _: AccountId, _: Option<SealKey>) -> Result<Option<SealKey>, StoreError> {
        Ok(None)
    }
    async fn destroy_seal_key(&self, account: AccountId) -> Result<(), StoreError> {
        self.0.lock().destroyed.insert(account, ());
        Ok(())
    }
}

/// Commands of a few accounts, valid and not.
fn commands() -> impl Strategy<Value = Vec<DirectoryCommand>> {
    let change = |n: u8| {
        let device = (1u8..6).prop_map(device_id);
        prop_oneof![
            8 => (0u8..40).prop_map(move |secret| register(n, secret).change),
            2 => (0u8..3).prop_map(move |i| DirectoryChange::LinkIdentity { identity: identity(n * 10 + i) }),
            2 => (0u8..3).prop_map(move |i| DirectoryChange::UnlinkIdentity { identity: identity(n * 10 + i) }),
            1 => Just(DirectoryChange::UnlinkIdentity { identity: identity(n) }),
            1 => device.clone().prop_map(|device| DirectoryChange::RenameDevice { device, name: "x".into() }),
            3 => device.clone().prop_map(|device| DirectoryChange::RevokeDevice { device }),
            2 => (device, 0u8..9).prop_map(|(device, k)| DirectoryChange::PublishKeys { device, signed_prekey: Some(key(k)), pq_last_resort: None }),
            2 => (0u8..9).prop_map(|other| DirectoryChange::Block { other: account_id(other) }),
            1 => (0u8..9).prop_map(|other| DirectoryChange::Unblock { other: account_id(other) }),
            1 => Just(DirectoryChange::DeleteAccount),
        ]
    };
    prop::collection::vec((1u8..4).prop_flat_map(move |n| change(n).prop_map(move |change| command(n, change))), 0..40)
}

fn numbered(commands: &[DirectoryCommand]) -> Vec<(Offset, DirectoryCommand)> {
    commands.iter().zip(0..).map(|(command, at)| (Offset(at), command.clone())).collect()
}

/// Runs the commands in runs of these lengths, round and round; each run may crash before its view is written, and is then
/// planned again.
async fn drive(memory: &Memory, commands: &[DirectoryCommand], runs: &[(usize, bool)]) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let commands = numbered(commands);
    let (mut at, mut runs) = (0, runs.iter().cycle());
    while at < commands.len() {
        let (len, crash) = *runs.next().expect("a cycle does not end");
        let end = (at + len).min(commands.len());
        let next = Offset(end as u64);
        if crash {
            let plan = plan(memory, Partition(0), next, &commands[at..end]).await.expect("reads");
            plan.settle(memory).await.expect("settles");
        }
        let plan = plan(memory, Partition(0), next, &commands[at..end]).await.expect("reads");
        plan.commit(memory, memory).await.expect("writes");
        verdicts.extend(plan.outcomes.into_iter().map(|outcome| outcome.verdict));
        at = end;
    }
    verdicts
}

proptest! {
    /// The same state and the same verdicts, however the commands are cut into runs, crashes and a replay from the start included.
    #[test]
    fn replaying_gives_the_same(commands in commands(), runs in prop::collection::vec((1usize..9, any::<bool>()), 1..6)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        let mut model = Model::default();
        let verdicts: Vec<Verdict> = commands.iter().map(|command| model.run(command).verdict).collect();
        let memory = Memory::default();
        prop_assert_eq!(&runtime.block_on(drive(&memory, &commands, &runs)), &verdicts);
        prop_assert_eq!(&*memory.0.lock(), &model);

        // All rows but no position was written before a crash: the replay finds that each command had its effect.
        runtime.block_on(drive(&memory, &commands, &runs));
        prop_assert_eq!(&*memory.0.lock(), &model);

        // Rebuild: the view from nothing, the state as it stands.
        let rebuilt = Memory::default();
        *rebuilt.0.lock() = Model { claims: model.claims.clone(), destroyed: model.destroyed.clone(), ..Model::default() };
        prop_assert_eq!(&runtime.block_on(drive(&rebuilt, &commands, &[(3, false)])), &verdicts);
        prop_assert_eq!(&*rebuilt.0.lock(), &model);
    }

    /// From any state that commands lead to, the record keeps its invariants.
    #[test]
    fn records_stay_in_order(commands in commands()) {
        let mut model = Model::default();
        for command in &commands {
            model.run(command);
            for account in model.accounts.values() {
                prop_assert!(account.devices.windows(2).all(|pair| pair[0].id < pair[1].id));
                prop_assert!(account.blocked.is_sorted());
                prop_assert!(account.deleted.is_some() == account.identities.is_empty());
                let has_keys = |device: &DeviceRecord| model.keys.contains_key(&DeviceAddr { account: account.id, device: device.id });
                prop_assert!(account.devices.iter().all(has_keys));
            }
            prop_assert_eq!(model.keys.len(), model.accounts.values().map(|account| account.devices.len()).sum::<usize>());
        }
    }
}

#[tokio::test]
async fn a_plan_says_what_others_must_hear() {
    let memory = Memory::default();
    let reply_to = Some(RequestId { edge: EdgeId::from_bytes([1; 16]), number: 7 });
    let commands = [
        register(1, 1),
        register(1, 2),
        register(2, 3),
        command(2, DirectoryChange::RevokeDevice { device: device_id(1) }),
        DirectoryCommand { reply_to, ..command(1, DirectoryChange::DeleteAccount) },
        command(3, DirectoryChange::DeleteAccount),
    ];
    let plan = plan(&memory, Partition(0), Offset(6), &numbered(&commands)).await.expect("reads");
    let events: Vec<_> = plan.inbox_events().collect();
    assert_eq!(
        events,
        [
            (account_id(2), InboxEvent::DeviceRemoved { device: addr(2, 1) }),
            (account_id(1), InboxEvent::AccountRemoved { account: account_id(1) }),
        ]
    );
    assert_eq!(plan.removed_devices().collect::<Vec<_>>(), [addr(2, 1), addr(1, 1), addr(1, 2)]);
    assert_eq!(plan.changed().collect::<Vec<_>>(), [account_id(1), account_id(2)]);
    assert_eq!(plan.outcomes[4], Outcome { account: account_id(1), reply_to, verdict: Verdict::Done(None) });
    plan.commit(&memory, &memory).await.expect("writes");
    assert_eq!(memory.directory_position(Partition(0)).await, Ok(Offset(6)));
    assert!(memory.0.lock().claims.keys().all(|identity| *identity == self::identity(2)));
}
