//! The accounts' at-rest keys: a file of fixed slots, each overwritten in place, so that a destroyed key is gone.
//!
//! ```text
//! slot 0          "sealpost seal keys 1\n", then zeros
//! slot n, 64 B    version 1, state 1 (1 live, 2 destroyed), 0 0, account 16, key 32, 0 × 8, CRC-32C 4 (little-endian)
//! ```
//!
//! In an LSM tree a deleted key would live on in older files and journals until they happen to be compacted. A slot lies within
//! one sector, so that overwriting it is all or nothing. What the file system and the drive below keep of old blocks
//! (copy-on-write, wear levelling) is out of our reach.
//!
//! One thread owns all writes and syncs them in groups; reads go to the page cache.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot};
use zeroize::Zeroizing;

use super::{OpenError, blocking, sync_dir};
use crate::ids::AccountId;
use crate::limits;
use crate::store::StoreError;
use crate::store::seal::SealKey;

const SLOT: usize = 64;
const HEADER: &[u8] = b"sealpost seal keys 1\n";
const VERSION: u8 = 1;
const LIVE: u8 = 1;
const DESTROYED: u8 = 2;
/// The file grows by this many zeroed slots, so that most new keys change no length (a sync of data alone is quicker).
const GROW_SLOTS: u64 = 1024;
/// Calls synced together at most.
const GROUP_CALLS: usize = 256;

/// Where an account's key is; the high bit: it was destroyed.
#[derive(Clone, Copy)]
struct Place(u32);

impl Place {
    const GONE: u32 = 1 << 31;

    fn live(slot: u32) -> Self {
        Self(slot)
    }

    fn destroyed(slot: u32) -> Self {
        Self(slot | Self::GONE)
    }

    fn is_destroyed(self) -> bool {
        self.0 & Self::GONE != 0
    }

    fn slot(self) -> u32 {
        self.0 & !Self::GONE
    }
}

/// What readers and the thread share.
struct Shared {
    file: File,
    index: RwLock<HashMap<AccountId, Place>>,
    slots: AtomicU64,
    /// Set after a failed write or sync: what is on disk is unknown until the file is opened anew.
    failed: OnceLock<String>,
}

enum Op {
    Create { account: AccountId, key: SealKey, reply: oneshot::Sender<Result<Option<SealKey>, StoreError>> },
    Destroy { account: AccountId, reply: oneshot::Sender<Result<(), StoreError>> },
}

/// The file. Dropping it finishes what is queued.
pub(super) struct SealFile {
    shared: Arc<Shared>,
    ops: Option<mpsc::Sender<Op>>,
    thread: Option<JoinHandle<()>>,
}

impl SealFile {
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        let dir = path.parent().unwrap_or(Path::new("."));
        let io_error = |source| OpenError::Io { dir: dir.to_owned(), source };
        let file = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path).map_err(io_error)?;
        let bytes = file.metadata().map_err(io_error)?.len();
        let mut index = HashMap::new();
        let mut next = 1;
        if bytes < SLOT as u64 {
            let mut header = [0; SLOT];
            header[..HEADER.len()].copy_from_slice(HEADER);
            file.write_all_at(&header, 0).and_then(|()| file.sync_all()).and_then(|()| sync_dir(dir)).map_err(io_error)?;
        } else {
            next = recover(&file, bytes, path, &mut index)?;
        }
        let slots = (bytes / SLOT as u64).max(1);
        let shared = Arc::new(Shared { file, index: RwLock::new(index), slots: AtomicU64::new(slots), failed: OnceLock::new() });
        let (ops, queue) = mpsc::channel(limits::KEY_STORE_QUEUE);
        let writer = Writer { shared: shared.clone(), next };
        let thread = std::thread::Builder::new().name("store-seals".into()).spawn(move || writer.run(queue)).map_err(io_error)?;
        Ok(Self { shared, ops: Some(ops), thread: Some(thread) })
    }

    pub(super) async fn get(&self, account: AccountId, fresh: Option<SealKey>) -> Result<Option<SealKey>, StoreError> {
        let place = self.shared.index.read().get(&account).copied();
        match (place, fresh) {
            (Some(place), _) if place.is_destroyed() => Ok(None),
            (Some(place), _) => {
                let shared = self.shared.clone();
                blocking(move || shared.read(account, place.slot())).await
            }
            (None, None) => Ok(None),
            (None, Some(key)) => {
                let (reply, answer) = oneshot::channel();
                self.send(Op::Create { account, key, reply }).await?;
                answer.await.map_err(|_| closed())?
            }
        }
    }

    pub(super) async fn destroy(&self, account: AccountId) -> Result<(), StoreError> {
        let (reply, answer) = oneshot::channel();
        self.send(Op::Destroy { account, reply }).await?;
        answer.await.map_err(|_| closed())?
    }

    pub(super) fn health(&self) -> Result<(), StoreError> {
        self.shared.health()
    }

    pub(super) fn disk_bytes(&self) -> u64 {
        self.shared.slots.load(Ordering::Relaxed) * SLOT as u64
    }

    async fn send(&self, op: Op) -> Result<(), StoreError> {
        self.ops.as_ref().ok_or_else(closed)?.send(op).await.map_err(|_| closed())
    }
}

impl Drop for SealFile {
    fn drop(&mut self) {
        self.ops = None;
        if let Some(thread) = self.thread.take() {
            // It ends after what is queued; a panic of it was reported to its callers.
            let _ = thread.join();
        }
    }
}

fn closed() -> StoreError {
    StoreError::Unavailable("the at-rest keys' thread is gone; restart the server".into())
}

type Slot = Zeroizing<[u8; SLOT]>;

fn encode(account: AccountId, key: Option<&SealKey>) -> Slot {
    let mut slot = Zeroizing::new([0; SLOT]);
    slot[0] = VERSION;
    slot[1] = if key.is_some() { LIVE } else { DESTROYED };
    slot[4..20].copy_from_slice(account.as_bytes());
    if let Some(key) = key {
        slot[20..52].copy_from_slice(key.expose());
    }
    let crc = crc32c::crc32c(&slot[..60]);
    slot[60..].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// The account and its key (`None`: destroyed) of a slot; `None` if it is not a whole one.
fn decode(slot: &[u8]) -> Option<(AccountId, Option<SealKey>)> {
    let slot: &[u8; SLOT] = slot.try_into().ok()?;
    if slot[0] != VERSION || crc32c::crc32c(&slot[..60]).to_le_bytes() != slot[60..] {
        return None;
    }
    let account = AccountId::from_slice(&slot[4..20]).ok()?;
    match slot[1] {
        LIVE => Some((account, Some(SealKey::from_bytes(slot[20..52].try_into().ok()?)))),
        DESTROYED => Some((account, None)),
        _ => None,
    }
}

/// Fills the index and returns the first free slot behind all used ones. Zeros are slots that were never written (or whose group
/// was cut off by a crash, unacknowledged); a torn slot behind the last whole one is the same. Anything else is damage.
fn recover(file: &File, bytes: u64, path: &Path, index: &mut HashMap<AccountId, Place>) -> Result<u32, OpenError> {
    let damaged = |reason: String| OpenError::StateDamaged { path: PathBuf::from(path), reason };
    let io_error = |source| OpenError::Io { dir: PathBuf::from(path), source };
    let mut buffer = Zeroizing::new(vec![0; SLOT * GROW_SLOTS as usize]);
    let (mut next, mut torn) = (1u32, None);
    let mut at = 0u64;
    while at < bytes {
        let len = (bytes - at).min(buffer.len() as u64) as usize;
        file.read_exact_at(&mut buffer[..len], at).map_err(io_error)?;
        for (i, slot) in buffer[..len].chunks(SLOT).enumerate() {
            let number = u32::try_from(at / SLOT as u64).map_err(|_| damaged("it is too long".into()))? + i as u32;
            if number == 0 {
                if !slot.starts_with(HEADER) {
                    return Err(damaged("it does not start as a file of at-rest keys of this version does".into()));
                }
            } else if let Some((account, key)) = decode(slot) {
                if let Some(torn) = torn {
                    return Err(damaged(format!("slot {torn} is neither whole nor the last one")));
                }
                let place = if key.is_some() { Place::live(number) } else { Place::destroyed(number) };
                index.insert(account, place);
                next = number + 1;
            } else if slot.iter().any(|byte| *byte != 0) {
                torn = torn.or(Some(number));
            }
        }
        at += len as u64;
    }
    index.shrink_to_fit();
    Ok(next)
}

impl Shared {
    fn health(&self) -> Result<(), StoreError> {
        self.failed.get().map_or(Ok(()), |reason| Err(StoreError::Unavailable(reason.clone())))
    }

    fn read(&self, account: AccountId, slot: u32) -> Result<Option<SealKey>, StoreError> {
        let mut bytes = Zeroizing::new([0; SLOT]);
        self.file.read_exact_at(&mut *bytes, u64::from(slot) * SLOT as u64).map_err(|e| StoreError::Unavailable(e.to_string()))?;
        match decode(&*bytes) {
            // Destroyed between the look at the index and now.
            Some((found, key)) if found == account => Ok(key),
            _ => Err(StoreError::Corrupt("an at-rest key's slot".into())),
        }
    }

    fn write(&self, slot: u32, bytes: &Slot) -> io::Result<()> {
        self.grow(slot)?;
        self.file.write_all_at(&**bytes, u64::from(slot) * SLOT as u64)
    }

    fn grow(&self, slot: u32) -> io::Result<()> {
        let slots = self.slots.load(Ordering::Relaxed);
        if u64::from(slot) < slots {
            return Ok(());
        }
        // Written, not only lengthened: the blocks are there when the keys come.
        let zeros = vec![0; SLOT * GROW_SLOTS as usize];
        self.file.write_all_at(&zeros, slots * SLOT as u64)?;
        self.file.sync_all()?;
        self.slots.store(slots + GROW_SLOTS, Ordering::Relaxed);
        Ok(())
    }
}

struct Writer {
    shared: Arc<Shared>,
    /// The first slot that was never used.
    next: u32,
}

/// Where an answer goes, and what it is if the sync succeeds.
type Answer<T> = (oneshot::Sender<Result<T, StoreError>>, Result<T, StoreError>);

/// What a group changed and nobody knows of yet.
#[derive(Default)]
struct Group {
    places: HashMap<AccountId, (Place, Option<SealKey>)>,
    created: Vec<Answer<Option<SealKey>>>,
    destroyed: Vec<Answer<()>>,
}

impl Writer {
    fn run(mut self, mut queue: mpsc::Receiver<Op>) {
        while let Some(first) = queue.blocking_recv() {
            let (mut group, mut next, mut calls) = (Group::default(), Some(first), 0);
            while let Some(op) = next {
                self.apply(op, &mut group);
                calls += 1;
                next = if calls < GROUP_CALLS { queue.try_recv().ok() } else { None };
            }
            let synced = self.sync(&group);
            if synced.is_ok() {
                self.shared.index.write().extend(group.places.iter().map(|(account, (place, _))| (*account, *place)));
            }
            // Who waited may have gone away; what was done stays.
            group.created.into_iter().for_each(|(reply, answer)| drop(reply.send(synced.clone().and(answer))));
            group.destroyed.into_iter().for_each(|(reply, answer)| drop(reply.send(synced.clone().and(answer))));
        }
    }

    fn apply(&mut self, op: Op, group: &mut Group) {
        match op {
            Op::Create { account, key, reply } => {
                let answer = self.create(account, key, group);
                group.created.push((reply, answer));
            }
            Op::Destroy { account, reply } => {
                let answer = self.destroy(account, group);
                group.destroyed.push((reply, answer));
            }
        }
    }

    /// The account's place and, if this group made it, its key.
    fn place(&self, account: AccountId, group: &Group) -> Option<(Place, Option<SealKey>)> {
        group.places.get(&account).cloned().or_else(|| self.shared.index.read().get(&account).map(|place| (*place, None)))
    }

    fn create(&mut self, account: AccountId, key: SealKey, group: &mut Group) -> Result<Option<SealKey>, StoreError> {
        match self.place(account, group) {
            Some((place, _)) if place.is_destroyed() => Ok(None),
            // Somebody was quicker: the first key stands.
            Some((_, Some(first))) => Ok(Some(first)),
            Some((place, None)) => self.shared.read(account, place.slot()),
            None => {
                let place = Place::live(self.next);
                self.write(place, &encode(account, Some(&key)))?;
                self.next += 1;
                group.places.insert(account, (place, Some(key.clone())));
                Ok(Some(key))
            }
        }
    }

    /// An account without a key gets a slot too: it must never have one any more.
    fn destroy(&mut self, account: AccountId, group: &mut Group) -> Result<(), StoreError> {
        let slot = match self.place(account, group) {
            Some((place, _)) if place.is_destroyed() => return Ok(()),
            Some((place, _)) => place.slot(),
            None => self.next,
        };
        let place = Place::destroyed(slot);
        self.write(place, &encode(account, None))?;
        if slot == self.next {
            self.next += 1;
        }
        group.places.insert(account, (place, None));
        Ok(())
    }

    fn write(&self, place: Place, bytes: &Slot) -> Result<(), StoreError> {
        self.shared.health()?;
        if self.next >= Place::GONE {
            return Err(StoreError::LimitReached);
        }
        self.shared.write(place.slot(), bytes).map_err(|error| self.fail(&error))
    }

    fn sync(&self, group: &Group) -> Result<(), StoreError> {
        if group.places.is_empty() {
            return Ok(());
        }
        self.shared.file.sync_data().map_err(|error| self.fail(&error))
    }

    fn fail(&self, error: &io::Error) -> StoreError {
        let reason = format!("writing the at-rest keys failed ({error}); restart the server once the disk is well");
        tracing::error!(%error, "writing the at-rest keys failed; no more are made or destroyed until a restart");
        // The first reason stands.
        let _ = self.shared.failed.set(reason.clone());
        StoreError::Unavailable(reason)
    }
}
