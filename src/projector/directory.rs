//! Directory commands, decided in log order.
//!
//! [`apply`] is pure: the same commands in the same order give the same accounts, whoever replays them and however the
//! partitions interleave, because a command is decided by its own account's record alone. Who owns an identity is settled
//! before the log hears of it (`KeyStore::claim_identity`), so no command needs to look at another account.
//!
//! [`plan`] is the driver around it, for a run of records of one partition. A projector goes on in this order, so that
//! a crash at any point repeats steps and loses none (all are idempotent):
//!
//! 1. [`plan`] reads what the commands need and decides them.
//! 2. Append [`Plan::inbox_events`] to `inbox` and wait for the log.
//! 3. [`Plan::commit`]: state first (claims, at-rest keys, one-time prekeys), then the view with its position, atomically.
//! 4. Tell the edges: [`Plan::changed`] and each [`Outcome`]'s verdict.

use std::collections::BTreeMap;

use futures_util::future::try_join_all;

use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, Identity, Offset, Partition};
use crate::limits;
use crate::projector::push::Verdict;
use crate::store::{DeviceKeys, DirectoryStore, DirectoryWrite, KeyStore, StoreError};
use crate::wire::event::{AccountRecord, DeviceRecord, DirectoryChange, DirectoryCommand, InboxEvent, NewDevice, RequestId, SignedKey};

/// Calls to a store that run at once: enough to share a sync, few enough to leave the store to others.
const CALLS_AT_ONCE: usize = 64;

/// What has to happen outside the view because of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// The identity is the account's: its claim must be too.
    Linked(AccountId, Identity),
    /// The identity is free: its claim goes.
    Unlinked(AccountId, Identity),
    /// The device is no more: its inbox, its one-time prekeys and its streams go.
    DeviceRemoved(DeviceAddr),
    /// The account is no more: its inboxes, its marks and its at-rest key go. A [`Effect::DeviceRemoved`] for each
    /// of its devices stands before it.
    AccountRemoved(AccountId),
}

/// What became of one command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// For whoever asked.
    pub verdict: Verdict,
    /// The account as it is now, if it changed.
    pub account: Option<AccountRecord>,
    /// Prekeys that changed.
    pub keys: Vec<(DeviceAddr, Option<DeviceKeys>)>,
    /// In this order.
    pub effects: Vec<Effect>,
}

impl Applied {
    fn refused(verdict: Verdict) -> Self {
        Self { verdict, account: None, keys: vec![], effects: vec![] }
    }

    fn done(account: AccountRecord) -> Self {
        Self { verdict: Verdict::Done(None), account: Some(account), keys: vec![], effects: vec![] }
    }

    fn unchanged(device: Option<DeviceAddr>) -> Self {
        Self::refused(Verdict::Done(device))
    }
}

/// The device whose prekeys [`apply`] must be given.
pub fn needs_keys(command: &DirectoryCommand) -> Option<DeviceAddr> {
    match &command.change {
        DirectoryChange::PublishKeys { device, .. } => Some(DeviceAddr { account: command.account, device: *device }),
        _ => None,
    }
}

/// Decides a command on its account as it is. `keys`: what is stored for [`needs_keys`]. Applying a command
/// a second time is harmless: whoever appended it may not have known that it was there already.
pub fn apply(command: &DirectoryCommand, account: Option<&AccountRecord>, keys: Option<&DeviceKeys>) -> Applied {
    let Some(account) = account else { return apply_to_nobody(command) };
    if account.deleted.is_some() {
        return Applied::refused(Verdict::AccountDeleted);
    }
    match &command.change {
        DirectoryChange::RegisterDevice { identity, device } => register(command, account.clone(), identity, device),
        DirectoryChange::LinkIdentity { identity } => link(account, identity),
        DirectoryChange::UnlinkIdentity { identity } => unlink(account, identity),
        DirectoryChange::RenameDevice { device, name } => rename(account, *device, name),
        DirectoryChange::RevokeDevice { device } => revoke(account, *device),
        DirectoryChange::PublishKeys { device, signed_prekey, pq_last_resort } => {
            publish(account, *device, keys, signed_prekey.as_ref(), pq_last_resort.as_ref())
        }
        DirectoryChange::Block { other } => block(account, *other),
        DirectoryChange::Unblock { other } => unblock(account, *other),
        DirectoryChange::DeleteAccount => delete(command, account),
        DirectoryChange::Snapshot(snapshot) => replace(command.account, Some(account), snapshot),
    }
}

fn apply_to_nobody(command: &DirectoryCommand) -> Applied {
    match &command.change {
        DirectoryChange::RegisterDevice { identity, device } => {
            let account = AccountRecord {
                id: command.account,
                created: command.at,
                deleted: None,
                identities: vec![identity.clone()],
                devices: vec![],
                last_device: 0,
                registrations: 0,
                blocked: vec![],
                applied: Offset(0),
            };
            let mut applied = register(command, account, identity, device);
            applied.effects.push(Effect::Linked(command.account, identity.clone()));
            applied
        }
        DirectoryChange::Snapshot(snapshot) => replace(command.account, None, snapshot),
        _ => Applied::refused(Verdict::NotFound),
    }
}

fn register(command: &DirectoryCommand, mut account: AccountRecord, identity: &Identity, device: &NewDevice) -> Applied {
    if !account.identities.contains(identity) {
        return Applied::refused(Verdict::Conflict);
    }
    let addr = |device| DeviceAddr { account: command.account, device };
    // Secrets are random: the same hash is the same command once more.
    if let Some(known) = account.devices.iter().find(|known| known.credential_hash == device.credential_hash) {
        return Applied::unchanged(Some(addr(known.id)));
    }
    if account.devices.len() >= limits::DEVICES_PER_ACCOUNT {
        return Applied::refused(Verdict::LimitReached);
    }
    let Some(id) = next_device_id(&account) else { return Applied::refused(Verdict::LimitReached) };
    let record = DeviceRecord {
        id,
        name: device.name.clone(),
        registration_id: device.registration_id,
        identity_key: device.identity_key.clone(),
        credential_hash: device.credential_hash,
        created: command.at,
        first_message_id: first_message_id(command, &account),
    };
    let at = account.devices.partition_point(|other| other.id < id);
    account.devices.insert(at, record);
    account.last_device = id.get();
    account.registrations += 1;
    let keys = DeviceKeys { signed_prekey: device.signed_prekey.clone(), pq_last_resort: device.pq_last_resort.clone() };
    let mut applied = Applied::done(account);
    applied.verdict = Verdict::Done(Some(addr(id)));
    applied.keys.push((addr(id), Some(keys)));
    applied
}

/// Marks outlive devices. Where an earlier device may have had the number, its successor begins with the time: whoever sends
/// less than a message a millisecond to anybody has used no id beyond it.
fn first_message_id(command: &DirectoryCommand, account: &AccountRecord) -> ClientMessageId {
    let again = account.registrations >= u64::from(DeviceId::MAX);
    ClientMessageId(if again { command.at.0.max(1) } else { 1 })
}

/// The number behind the one given last, round and round, so that a number is used again as late as can be.
fn next_device_id(account: &AccountRecord) -> Option<DeviceId> {
    let max = u32::from(DeviceId::MAX);
    let mut candidates = (0..max).map(|i| (u32::from(account.last_device) + i) % max + 1);
    candidates.find_map(|number| DeviceId::new(number).ok().filter(|id| account.devices.iter().all(|device| device.id != *id)))
}

fn link(account: &AccountRecord, identity: &Identity) -> Applied {
    let effect = Effect::Linked(account.id, identity.clone());
    if account.identities.contains(identity) {
        return Applied { effects: vec![effect], ..Applied::unchanged(None) };
    }
    if account.identities.len() >= limits::IDENTITIES_PER_ACCOUNT {
        return Applied::refused(Verdict::LimitReached);
    }
    let mut account = account.clone();
    account.identities.push(identity.clone());
    Applied { effects: vec![effect], ..Applied::done(account) }
}

fn unlink(account: &AccountRecord, identity: &Identity) -> Applied {
    if !account.identities.contains(identity) {
        return Applied::refused(Verdict::NotFound);
    }
    if account.identities.len() == 1 {
        return Applied::refused(Verdict::Conflict);
    }
    let mut account = account.clone();
    account.identities.retain(|other| other != identity);
    Applied { effects: vec![Effect::Unlinked(account.id, identity.clone())], ..Applied::done(account) }
}

fn rename(account: &AccountRecord, device: DeviceId, name: &str) -> Applied {
    let mut account = account.clone();
    let addr = DeviceAddr { account: account.id, device };
    match account.devices.iter_mut().find(|known| known.id == device) {
        Some(known) => known.name = name.to_owned(),
        None => return Applied::refused(Verdict::NotFound),
    }
    Applied { verdict: Verdict::Done(Some(addr)), ..Applied::done(account) }
}

fn revoke(account: &AccountRecord, device: DeviceId) -> Applied {
    if account.devices.iter().all(|known| known.id != device) {
        return Applied::refused(Verdict::NotFound);
    }
    let mut account = account.clone();
    account.devices.retain(|known| known.id != device);
    let addr = DeviceAddr { account: account.id, device };
    Applied {
        verdict: Verdict::Done(Some(addr)),
        keys: vec![(addr, None)],
        effects: vec![Effect::DeviceRemoved(addr)],
        ..Applied::done(account)
    }
}

fn publish(
    account: &AccountRecord,
    device: DeviceId,
    stored: Option<&DeviceKeys>,
    signed_prekey: Option<&SignedKey>,
    pq_last_resort: Option<&SignedKey>,
) -> Applied {
    let addr = DeviceAddr { account: account.id, device };
    if account.devices.iter().all(|known| known.id != device) {
        return Applied::refused(Verdict::NotFound);
    }
    let signed_prekey = signed_prekey.or(stored.map(|keys| &keys.signed_prekey));
    let pq_last_resort = pq_last_resort.or(stored.map(|keys| &keys.pq_last_resort));
    let (Some(signed_prekey), Some(pq_last_resort)) = (signed_prekey, pq_last_resort) else {
        return Applied::refused(Verdict::NotFound);
    };
    let keys = DeviceKeys { signed_prekey: signed_prekey.clone(), pq_last_resort: pq_last_resort.clone() };
    Applied { keys: vec![(addr, Some(keys))], ..Applied::unchanged(Some(addr)) }
}

fn block(account: &AccountRecord, other: AccountId) -> Applied {
    // One's own devices talk to each other: blocking oneself would cut them off.
    if other == account.id {
        return Applied::refused(Verdict::Conflict);
    }
    let Err(at) = account.blocked.binary_search(&other) else { return Applied::unchanged(None) };
    if account.blocked.len() >= limits::BLOCKS_PER_ACCOUNT {
        return Applied::refused(Verdict::LimitReached);
    }
    let mut account = account.clone();
    account.blocked.insert(at, other);
    Applied::done(account)
}

fn unblock(account: &AccountRecord, other: AccountId) -> Applied {
    let Ok(at) = account.blocked.binary_search(&other) else { return Applied::unchanged(None) };
    let mut account = account.clone();
    account.blocked.remove(at);
    Applied::done(account)
}

fn delete(command: &DirectoryCommand, account: &AccountRecord) -> Applied {
    let tombstone = AccountRecord {
        id: account.id,
        created: account.created,
        deleted: Some(command.at),
        identities: vec![],
        devices: vec![],
        last_device: 0,
        registrations: 0,
        blocked: vec![],
        applied: account.applied,
    };
    replace(account.id, Some(account), &tombstone)
}

/// The account becomes what the snapshot says; what is no more in it goes as if it had been removed by itself.
fn replace(id: AccountId, account: Option<&AccountRecord>, snapshot: &AccountRecord) -> Applied {
    if snapshot.id != id {
        return Applied::refused(Verdict::NotFound);
    }
    let mut applied = Applied::done(snapshot.clone());
    let devices = account.map_or(&[][..], |account| &account.devices);
    for device in devices.iter().filter(|old| snapshot.devices.iter().all(|new| new.id != old.id)) {
        let addr = DeviceAddr { account: id, device: device.id };
        applied.keys.push((addr, None));
        applied.effects.push(Effect::DeviceRemoved(addr));
    }
    let identities = account.map_or(&[][..], |account| &account.identities);
    let unlinked = identities.iter().filter(|old| !snapshot.identities.contains(old));
    applied.effects.extend(unlinked.map(|identity| Effect::Unlinked(id, identity.clone())));
    let linked = snapshot.identities.iter().filter(|new| !identities.contains(new));
    applied.effects.extend(linked.map(|identity| Effect::Linked(id, identity.clone())));
    if snapshot.deleted.is_some() {
        applied.effects.push(Effect::AccountRemoved(id));
    }
    applied
}

/// What became of one command of a [`Plan`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The account it was about.
    pub account: AccountId,
    /// Where the verdict goes.
    pub reply_to: Option<RequestId>,
    /// The verdict.
    pub verdict: Verdict,
}

/// Decided commands of one partition, not written yet.
#[derive(Debug, Default)]
pub struct Plan {
    /// One for each command that was not applied before, in their order.
    pub outcomes: Vec<Outcome>,
    /// Everything that has to happen, in order.
    pub effects: Vec<Effect>,
    write: DirectoryWrite,
}

/// Reads what the commands need and decides them in order. `next` is the position behind the last one.
pub async fn plan(
    store: &(impl DirectoryStore + ?Sized),
    partition: Partition,
    next: Offset,
    commands: &[(Offset, DirectoryCommand)],
) -> Result<Plan, StoreError> {
    let ids: BTreeMap<AccountId, ()> = commands.iter().map(|(_, command)| (command.account, ())).collect();
    let devices: BTreeMap<DeviceAddr, ()> =
        commands.iter().filter_map(|(_, command)| needs_keys(command)).map(|device| (device, ())).collect();
    let mut accounts = in_chunks(ids.into_keys(), |id| store.account(id)).await?;
    let mut keys = in_chunks(devices.into_keys(), |device| store.device_keys(device)).await?;

    let mut plan = Plan::default();
    let (mut changed_accounts, mut changed_keys) = (BTreeMap::new(), BTreeMap::new());
    for (offset, command) in commands {
        let account = accounts.get(&command.account).and_then(Option::as_ref);
        // A replay over a store that was written half way; the account's own row was the last of it.
        if account.is_some_and(|account| account.applied > *offset) {
            continue;
        }
        let stored = needs_keys(command).and_then(|device| keys.get(&device)?.as_ref());
        let applied = apply(command, account, stored);
        if let Some(mut account) = applied.account {
            account.applied = offset.next();
            changed_accounts.insert(account.id, account.clone());
            accounts.insert(account.id, Some(account));
        }
        for (device, now) in applied.keys {
            changed_keys.insert(device, now.clone());
            keys.insert(device, now);
        }
        plan.effects.extend(applied.effects);
        plan.outcomes.push(Outcome { account: command.account, reply_to: command.reply_to, verdict: applied.verdict });
    }
    let mut links = BTreeMap::new();
    for effect in &plan.effects {
        match effect {
            Effect::Linked(account, identity) => drop(links.insert((identity, *account), true)),
            Effect::Unlinked(account, identity) => drop(links.insert((identity, *account), false)),
            Effect::DeviceRemoved(_) | Effect::AccountRemoved(_) => {}
        }
    }
    for ((identity, account), linked) in links {
        let list = if linked { &mut plan.write.linked } else { &mut plan.write.unlinked };
        list.push((identity.clone(), account));
    }
    plan.write.position = Some((partition, next));
    plan.write.accounts = changed_accounts.into_values().collect();
    plan.write.keys = changed_keys.into_iter().collect();
    Ok(plan)
}

/// Reads all, some at a time.
async fn in_chunks<K, V, F>(keys: impl Iterator<Item = K>, read: impl Fn(K) -> F) -> Result<BTreeMap<K, V>, StoreError>
where
    K: Ord + Copy,
    F: Future<Output = Result<V, StoreError>>,
{
    let keys: Vec<K> = keys.collect();
    let mut found = BTreeMap::new();
    for chunk in keys.chunks(CALLS_AT_ONCE) {
        let values = try_join_all(chunk.iter().map(|key| read(*key))).await?;
        found.extend(chunk.iter().copied().zip(values));
    }
    Ok(found)
}

impl Plan {
    /// What `inbox` has to hear, keyed by its account; to be appended before [`Plan::commit`].
    pub fn inbox_events(&self) -> impl Iterator<Item = (AccountId, InboxEvent<'static>)> {
        let removed = |account: &AccountId| self.effects.contains(&Effect::AccountRemoved(*account));
        self.effects.iter().filter_map(move |effect| match effect {
            // The account's own removal says it all.
            Effect::DeviceRemoved(device) if removed(&device.account) => None,
            Effect::DeviceRemoved(device) => Some((device.account, InboxEvent::DeviceRemoved { device: *device })),
            Effect::AccountRemoved(account) => Some((*account, InboxEvent::AccountRemoved { account: *account })),
            Effect::Linked(..) | Effect::Unlinked(..) => None,
        })
    }

    /// Devices that are no more: their streams end.
    pub fn removed_devices(&self) -> impl Iterator<Item = DeviceAddr> {
        self.effects.iter().filter_map(|effect| if let Effect::DeviceRemoved(device) = effect { Some(*device) } else { None })
    }

    /// Accounts that edges must read anew.
    pub fn changed(&self) -> impl Iterator<Item = AccountId> {
        self.write.accounts.iter().map(|account| account.id)
    }

    /// Settles the state, then writes the view with its position. May be called again after a failure, and a crash before it
    /// returns makes the next projector plan the same commands again.
    pub async fn commit(&self, directory: &(impl DirectoryStore + ?Sized), keys: &(impl KeyStore + ?Sized)) -> Result<(), StoreError> {
        self.settle(keys).await?;
        self.commit_view(directory).await
    }

    /// Writes the view with its position and leaves the state alone: for a rebuild, whose commands settled it long ago.
    pub async fn commit_view(&self, directory: &(impl DirectoryStore + ?Sized)) -> Result<(), StoreError> {
        directory.write_directory(self.write.clone()).await
    }

    async fn settle(&self, keys: &(impl KeyStore + ?Sized)) -> Result<(), StoreError> {
        // Only what stands at the end: a link that was taken away and given back within the run keeps its claim.
        for chunk in self.write.unlinked.chunks(CALLS_AT_ONCE) {
            try_join_all(chunk.iter().map(|(identity, account)| keys.release_identity(identity, *account))).await?;
        }
        for chunk in self.write.linked.chunks(CALLS_AT_ONCE) {
            let winners = try_join_all(chunk.iter().map(|(identity, account)| keys.claim_identity(identity, *account))).await?;
            let lost = winners.iter().zip(chunk).filter(|(winner, (_, account))| *winner != account).count();
            if lost > 0 {
                tracing::warn!(lost, "identities are linked to accounts that do not hold their claim");
            }
        }
        let (mut devices, mut accounts) = (Vec::new(), Vec::new());
        for effect in &self.effects {
            match effect {
                Effect::DeviceRemoved(device) => devices.push(*device),
                Effect::AccountRemoved(account) => accounts.push(*account),
                Effect::Linked(..) | Effect::Unlinked(..) => {}
            }
        }
        for chunk in accounts.chunks(CALLS_AT_ONCE) {
            try_join_all(chunk.iter().map(|account| keys.destroy_seal_key(*account))).await?;
        }
        for chunk in devices.chunks(CALLS_AT_ONCE) {
            try_join_all(chunk.iter().map(|device| keys.remove_one_time(*device))).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
