//! One-time prekeys and identity claims: state that is on disk before anybody hears of it.
//!
//! One thread owns all writes. It takes what is waiting, decides it in order over the changes of its own group, commits the group
//! with one fdatasync and only then answers. So no two takes ever see the same key, and the cost of a sync is shared.

use std::collections::BTreeMap;
use std::thread::JoinHandle;

use async_trait::async_trait;
use fjall::{Database, Keyspace, PersistMode, Readable as _};
use tokio::sync::{mpsc, oneshot};

use super::{EmbeddedStore, MIB, blocking, keyspace_options, unavailable};
use crate::ids::{AccountId, DeviceAddr, Identity};
use crate::limits;
use crate::store::keyspace::{self, Pool};
use crate::store::seal::SealKey;
use crate::store::{KeyKind, KeyStore, OneTimeKey, StoreError};

/// Calls committed together at most.
const GROUP_CALLS: usize = 128;

#[async_trait]
impl KeyStore for EmbeddedStore {
    async fn add_one_time(&self, device: DeviceAddr, kind: KeyKind, keys: Vec<OneTimeKey>) -> Result<usize, StoreError> {
        match self.keys.call(Op::Add { device, kind, keys }).await? {
            Answer::Count(count) => Ok(count),
            _ => Err(mismatch()),
        }
    }

    async fn take_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<(Option<OneTimeKey>, usize), StoreError> {
        match self.keys.call(Op::Take { device, kind }).await? {
            Answer::Taken(key, left) => Ok((key, left)),
            _ => Err(mismatch()),
        }
    }

    async fn first_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<Option<OneTimeKey>, StoreError> {
        let state = self.keys.state.clone();
        blocking(move || state.first(device, kind)).await
    }

    async fn count_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<usize, StoreError> {
        let state = self.keys.state.clone();
        blocking(move || Ok(state.pool(device, kind)?.count as usize)).await
    }

    async fn remove_one_time(&self, device: DeviceAddr) -> Result<(), StoreError> {
        self.keys.call(Op::Remove { device }).await.map(drop)
    }

    async fn claim_identity(&self, identity: &Identity, account: AccountId) -> Result<AccountId, StoreError> {
        match self.keys.call(Op::Claim { identity: identity.clone(), account }).await? {
            Answer::Account(winner) => Ok(winner),
            _ => Err(mismatch()),
        }
    }

    async fn release_identity(&self, identity: &Identity, account: AccountId) -> Result<(), StoreError> {
        self.keys.call(Op::Release { identity: identity.clone(), account }).await.map(drop)
    }

    async fn seal_key(&self, account: AccountId, fresh: Option<SealKey>) -> Result<Option<SealKey>, StoreError> {
        self.seals.get(account, fresh).await
    }

    async fn destroy_seal_key(&self, account: AccountId) -> Result<(), StoreError> {
        self.seals.destroy(account).await
    }
}

fn mismatch() -> StoreError {
    StoreError::Unavailable("the key thread answered another question".into())
}

enum Op {
    Add { device: DeviceAddr, kind: KeyKind, keys: Vec<OneTimeKey> },
    Take { device: DeviceAddr, kind: KeyKind },
    Remove { device: DeviceAddr },
    Claim { identity: Identity, account: AccountId },
    Release { identity: Identity, account: AccountId },
}

enum Answer {
    Count(usize),
    Taken(Option<OneTimeKey>, usize),
    Account(AccountId),
    Done,
}

struct Call {
    op: Op,
    reply: oneshot::Sender<Result<Answer, StoreError>>,
}

/// Why the thread did not start.
pub(super) enum StartError {
    Database(fjall::Error),
    Thread(std::io::Error),
}

impl From<fjall::Error> for StartError {
    fn from(error: fjall::Error) -> Self {
        Self::Database(error)
    }
}

/// The owner of the state. Dropping it finishes what is queued.
pub(super) struct KeyThread {
    state: State,
    calls: Option<mpsc::Sender<Call>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Clone)]
struct State {
    db: Database,
    one_time: Keyspace,
    pools: Keyspace,
    claims: Keyspace,
}

impl KeyThread {
    pub(super) fn start(db: &Database) -> Result<Self, StartError> {
        let state = State {
            db: db.clone(),
            one_time: db.keyspace("one_time", || keyspace_options(4 * MIB, 4096))?,
            pools: db.keyspace("pools", || keyspace_options(MIB, 4096))?,
            claims: db.keyspace("claims", || keyspace_options(MIB, 4096))?,
        };
        let (calls, queue) = mpsc::channel(limits::KEY_STORE_QUEUE);
        let worker = state.clone();
        let thread =
            std::thread::Builder::new().name("store-keys".into()).spawn(move || run(&worker, queue)).map_err(StartError::Thread)?;
        Ok(Self { state, calls: Some(calls), thread: Some(thread) })
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.state.db.disk_space().unwrap_or(0)
    }

    pub(super) fn health(&self) -> Result<(), StoreError> {
        self.state.db.persist(PersistMode::Buffer).map_err(unavailable)
    }

    async fn call(&self, op: Op) -> Result<Answer, StoreError> {
        let closed = || StoreError::Unavailable("the key thread is gone; restart the server".into());
        let (reply, answer) = oneshot::channel();
        let calls = self.calls.as_ref().ok_or_else(closed)?;
        calls.send(Call { op, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

impl Drop for KeyThread {
    fn drop(&mut self) {
        self.calls = None;
        if let Some(thread) = self.thread.take() {
            // It ends at the latest after the groups that are queued; a panic of it was reported to its callers.
            let _ = thread.join();
        }
    }
}

fn run(state: &State, mut queue: mpsc::Receiver<Call>) {
    while let Some(first) = queue.blocking_recv() {
        let mut group = Group { state, changes: BTreeMap::new() };
        let mut answers = Vec::new();
        let mut next = Some(first);
        while let Some(Call { op, reply }) = next {
            answers.push((reply, group.decide(op)));
            next = if answers.len() < GROUP_CALLS { queue.try_recv().ok() } else { None };
        }
        let committed = group.commit();
        for (reply, answer) in answers {
            // Who waited may have gone away; a key that was taken for it is spent for nobody.
            let _ = reply.send(committed.clone().and(answer));
        }
    }
}

impl State {
    fn pool(&self, device: DeviceAddr, kind: KeyKind) -> Result<Pool, StoreError> {
        let value = self.pools.get(keyspace::pool(device, kind)).map_err(unavailable)?;
        value.map_or(Ok(Pool::default()), |value| keyspace::decode(&value, "a pool"))
    }

    fn first(&self, device: DeviceAddr, kind: KeyKind) -> Result<Option<OneTimeKey>, StoreError> {
        let (low, high) = (keyspace::one_time(device, kind, self.pool(device, kind)?.low), keyspace::one_time(device, kind, u32::MAX));
        let Some(row) = self.db.snapshot().range::<[u8; 22], _>(&self.one_time, low..=high).next() else { return Ok(None) };
        let (_, value) = row.into_inner().map_err(unavailable)?;
        keyspace::decode(&value, "a one-time prekey").map(Some)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Table {
    OneTime,
    Pools,
    Claims,
}

/// A one-time prekey as it is stored.
type Row = ([u8; 22], Vec<u8>);

/// Calls that are committed together. `changes` holds what they changed so far, seen by the ones behind.
struct Group<'a> {
    state: &'a State,
    changes: BTreeMap<(Table, Vec<u8>), Option<Vec<u8>>>,
}

impl Group<'_> {
    /// Either changes nothing and fails, or changes everything: all that can fail comes first in each.
    fn decide(&mut self, op: Op) -> Result<Answer, StoreError> {
        match op {
            Op::Add { device, kind, keys } => self.add(device, kind, &keys),
            Op::Take { device, kind } => self.take(device, kind),
            Op::Remove { device } => self.remove(device),
            Op::Claim { identity, account } => self.claim(&identity, account),
            Op::Release { identity, account } => self.release(&identity, account),
        }
    }

    fn add(&mut self, device: DeviceAddr, kind: KeyKind, keys: &[OneTimeKey]) -> Result<Answer, StoreError> {
        let mut pool = self.pool(device, kind)?;
        let mut fresh: BTreeMap<u32, &OneTimeKey> = keys.iter().map(|key| (key.id, key)).collect();
        let Some(lowest) = fresh.keys().next().copied() else { return Ok(Answer::Count(pool.count as usize)) };
        let mut added = 0;
        for id in fresh.keys() {
            if self.get(Table::OneTime, &keyspace::one_time(device, kind, *id))?.is_none() {
                added += 1;
            }
        }
        let count = pool.count as usize + added;
        if count > limits::PREKEYS_PER_DEVICE {
            return Err(StoreError::LimitReached);
        }
        pool = Pool { count: count as u32, low: if pool.count == 0 { lowest } else { pool.low.min(lowest) } };
        while let Some((id, key)) = fresh.pop_first() {
            self.set(Table::OneTime, &keyspace::one_time(device, kind, id), Some(keyspace::encode(key)));
        }
        self.set_pool(device, kind, pool);
        Ok(Answer::Count(count))
    }

    fn take(&mut self, device: DeviceAddr, kind: KeyKind) -> Result<Answer, StoreError> {
        let pool = self.pool(device, kind)?;
        if pool.count == 0 {
            return Ok(Answer::Taken(None, 0));
        }
        let from = keyspace::one_time(device, kind, pool.low);
        let Some((id, value)) = self.lowest(&from, &keyspace::one_time(device, kind, u32::MAX))? else {
            return Err(StoreError::Corrupt("a pool counts keys that are not there".into()));
        };
        let key: OneTimeKey = keyspace::decode(&value, "a one-time prekey")?;
        let left = pool.count - 1;
        self.set(Table::OneTime, &id, None);
        self.set_pool(device, kind, Pool { count: left, low: key.id.saturating_add(1) });
        Ok(Answer::Taken(Some(key), left as usize))
    }

    fn remove(&mut self, device: DeviceAddr) -> Result<Answer, StoreError> {
        let mut gone = Vec::new();
        for kind in KeyKind::ALL {
            let pool = self.pool(device, kind)?;
            if pool.count > 0 {
                let (mut from, to) = (keyspace::one_time(device, kind, pool.low), keyspace::one_time(device, kind, u32::MAX));
                while let Some((key, _)) = self.lowest(&from, &to)? {
                    gone.push(key);
                    let Some(next) = next_key(&key) else { break };
                    from = next;
                }
            }
        }
        for key in gone {
            self.set(Table::OneTime, &key, None);
        }
        for kind in KeyKind::ALL {
            if self.get(Table::Pools, &keyspace::pool(device, kind))?.is_some() {
                self.set(Table::Pools, &keyspace::pool(device, kind), None);
            }
        }
        Ok(Answer::Done)
    }

    fn claim(&mut self, identity: &Identity, account: AccountId) -> Result<Answer, StoreError> {
        if let Some(winner) = self.claimed(identity)? {
            return Ok(Answer::Account(winner));
        }
        self.set(Table::Claims, identity.to_string().as_bytes(), Some(keyspace::encode(&account)));
        Ok(Answer::Account(account))
    }

    fn release(&mut self, identity: &Identity, account: AccountId) -> Result<Answer, StoreError> {
        if self.claimed(identity)? == Some(account) {
            self.set(Table::Claims, identity.to_string().as_bytes(), None);
        }
        Ok(Answer::Done)
    }

    fn claimed(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        let value = self.get(Table::Claims, identity.to_string().as_bytes())?;
        value.map(|value| keyspace::decode(&value, "a claim")).transpose()
    }

    fn pool(&self, device: DeviceAddr, kind: KeyKind) -> Result<Pool, StoreError> {
        let value = self.get(Table::Pools, &keyspace::pool(device, kind))?;
        value.map_or(Ok(Pool::default()), |value| keyspace::decode(&value, "a pool"))
    }

    fn set_pool(&mut self, device: DeviceAddr, kind: KeyKind, pool: Pool) {
        self.set(Table::Pools, &keyspace::pool(device, kind), Some(keyspace::encode(&pool)));
    }

    fn table(&self, table: Table) -> &Keyspace {
        match table {
            Table::OneTime => &self.state.one_time,
            Table::Pools => &self.state.pools,
            Table::Claims => &self.state.claims,
        }
    }

    fn get(&self, table: Table, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(change) = self.changes.get(&(table, key.to_vec())) {
            return Ok(change.clone());
        }
        Ok(self.table(table).get(key).map_err(unavailable)?.map(|value| value.to_vec()))
    }

    fn set(&mut self, table: Table, key: &[u8], value: Option<Vec<u8>>) {
        self.changes.insert((table, key.to_vec()), value);
    }

    /// The first one-time prekey in the range, changes of this group included.
    fn lowest(&self, from: &[u8; 22], to: &[u8; 22]) -> Result<Option<Row>, StoreError> {
        let fits = |key: &[u8]| <[u8; 22]>::try_from(key).map_err(|_| StoreError::Corrupt("a one-time prekey's key".into()));
        let changed = self
            .changes
            .range((Table::OneTime, from.to_vec())..=(Table::OneTime, to.to_vec()))
            .find_map(|((_, key), value)| value.as_ref().map(|value| (key, value)));
        for row in self.state.db.snapshot().range::<[u8; 22], _>(&self.state.one_time, from..=to) {
            let (key, value) = row.into_inner().map_err(unavailable)?;
            if changed.is_some_and(|(changed, _)| changed[..] <= key[..]) {
                break;
            }
            if !self.changes.contains_key(&(Table::OneTime, key.to_vec())) {
                return Ok(Some((fits(&key)?, value.to_vec())));
            }
        }
        changed.map(|(key, value)| Ok((fits(key)?, value.clone()))).transpose()
    }

    /// Durable when it returns `Ok`. Without changes there is nothing to wait for: what was read is committed.
    fn commit(self) -> Result<(), StoreError> {
        let mut batch = self.state.db.batch().durability(Some(PersistMode::SyncData));
        for ((table, key), value) in &self.changes {
            let keyspace = self.table(*table);
            match value {
                Some(value) => batch.insert(keyspace, key.as_slice(), value.as_slice()),
                None => batch.remove(keyspace, key.as_slice()),
            }
        }
        batch.commit().map_err(unavailable)
    }
}

/// The key of the next higher id, if there is one.
fn next_key(key: &[u8; 22]) -> Option<[u8; 22]> {
    let mut next = *key;
    let id = u32::from_be_bytes([key[18], key[19], key[20], key[21]]);
    next[18..].copy_from_slice(&id.checked_add(1)?.to_be_bytes());
    Some(next)
}
