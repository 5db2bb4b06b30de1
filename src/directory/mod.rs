//! The accounts as an edge uses them: a cache of what a send needs, and changes by way of the log.
//!
//! Reads come from the store; the projector says which accounts changed ([`Directory::invalidate`]). A change is a command on
//! `directory`: the edge appends it and waits for the verdict that the projector sends once the change is applied and visible.

use std::hash::BuildHasher as _;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use quick_cache::sync::Cache;

use crate::clock::{Clock, Random, UnixMillis};
use crate::ids::{AccountId, ClientMessageId, DeviceId, EdgeId, Identity, Partition, RegistrationId};
use crate::limits;
use crate::log::{AppendError, EventLog, Topic, TopicPartition};
use crate::projector::push::Verdict;
use crate::store::seal::{SealKey, Sealer};
use crate::store::{DirectoryStore, KeyStore, StoreError};
use crate::waiters::{Full, Waiters};
use crate::wire::event::{self, AccountRecord, DirectoryChange, DirectoryCommand, NewDevice, RequestId, SignedKey};

/// A device as a send sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceView {
    /// Its number.
    pub id: DeviceId,
    /// Its registration id.
    pub registration_id: RegistrationId,
    /// Its identity key, 33 bytes.
    pub identity_key: Box<[u8]>,
    /// SHA-256 of its credential's secret.
    pub credential_hash: [u8; 32],
    /// Where its client message ids begin.
    pub first_message_id: ClientMessageId,
}

/// An account as a send sees it. Small, since an edge keeps one for each connected account.
#[derive(Debug)]
pub struct AccountView {
    /// Its id.
    pub id: AccountId,
    /// Its devices, by id.
    pub devices: Box<[DeviceView]>,
    /// Accounts whose messages it refuses, sorted.
    pub blocked: Box<[AccountId]>,
    /// It was deleted: everything else is empty.
    pub deleted: bool,
    key: Option<SealKey>,
    /// Expanded with the first use: ten times the size of the key, and most accounts of an edge are idle.
    sealer: OnceLock<Box<Sealer>>,
}

impl AccountView {
    fn new(record: AccountRecord, key: Option<SealKey>) -> Self {
        let device = |device: event::DeviceRecord| DeviceView {
            id: device.id,
            registration_id: device.registration_id,
            identity_key: device.identity_key.into(),
            credential_hash: device.credential_hash,
            first_message_id: device.first_message_id,
        };
        Self {
            id: record.id,
            devices: record.devices.into_iter().map(device).collect(),
            blocked: record.blocked.into(),
            deleted: record.deleted.is_some(),
            key,
            sealer: OnceLock::new(),
        }
    }

    /// Seals and opens what rests for this account; `None` once its key is destroyed.
    pub fn sealer(&self) -> Option<&Sealer> {
        let key = self.key.as_ref()?;
        Some(self.sealer.get_or_init(|| Box::new(Sealer::new(key))))
    }

    /// One of its devices.
    pub fn device(&self, id: DeviceId) -> Option<&DeviceView> {
        self.devices.iter().find(|device| device.id == id)
    }
}

/// Why a change has no verdict.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DirectoryError {
    /// Too many changes wait, or the log's queue is full: nothing was done. Retry later.
    #[error("the directory is busy")]
    Busy,
    /// The change is larger than a record may be: nothing was done. A retry can't help.
    #[error("the change is too large")]
    TooLarge,
    /// The log or the store can't take it now: nothing was done. Retry later.
    #[error("the directory is unavailable: {0}")]
    Unavailable(String),
    /// The change may be applied, now or later. Look before trying again.
    #[error("the outcome of the change is not known")]
    OutcomeUnknown,
    /// The store failed; see there whether a retry helps.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<AppendError> for DirectoryError {
    fn from(error: AppendError) -> Self {
        match error {
            AppendError::Full => Self::Busy,
            AppendError::TooLarge => Self::TooLarge,
            AppendError::Unknown(_) | AppendError::Poisoned(_) => Self::OutcomeUnknown,
            AppendError::NoSuchPartition | AppendError::Unavailable(_) | AppendError::Closed => Self::Unavailable(error.to_string()),
        }
    }
}

/// What a [`Directory`] is made of.
pub struct Parts {
    /// Where changes go.
    pub log: Arc<dyn EventLog>,
    /// Where accounts are read.
    pub store: Arc<dyn DirectoryStore>,
    /// Claims and at-rest keys.
    pub keys: Arc<dyn KeyStore>,
    /// Stamps changes.
    pub clock: Arc<dyn Clock>,
    /// Makes account ids and at-rest keys.
    pub random: Arc<dyn Random>,
    /// Where verdicts come back to.
    pub edge: EdgeId,
}

/// How often a registration starts anew because the identity changed hands meanwhile.
const REGISTER_TRIES: usize = 4;
const STRIPES: usize = 64;

/// See the module's own words.
pub struct Directory {
    parts: Parts,
    cache: Cache<AccountId, Arc<AccountView>>,
    /// Counts the invalidations of the accounts that share a stripe. Its lock orders them against loads.
    invalidations: [Mutex<u64>; STRIPES],
    hasher: std::hash::RandomState,
    waiters: Waiters<Verdict>,
}

impl std::fmt::Debug for Directory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Directory").field("cached", &self.cache.len()).finish_non_exhaustive()
    }
}

impl Directory {
    /// An edge's directory.
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            cache: Cache::new(limits::CACHED_ACCOUNTS),
            invalidations: std::array::from_fn(|_| Mutex::new(0)),
            hasher: std::hash::RandomState::new(),
            waiters: Waiters::default(),
        }
    }

    /// The account if it is at hand; never waits.
    pub fn get_cached(&self, account: &AccountId) -> Option<Arc<AccountView>> {
        self.cache.get(account)
    }

    /// The account, deleted ones included; `None` if there never was one.
    pub async fn get(&self, account: AccountId) -> Result<Option<Arc<AccountView>>, StoreError> {
        if let Some(view) = self.get_cached(&account) {
            return Ok(Some(view));
        }
        let before = *self.stripe(&account).lock();
        let Some(record) = self.parts.store.account(account).await? else { return Ok(None) };
        let key = if record.deleted.is_none() { self.parts.keys.seal_key(account, None).await? } else { None };
        let view = Arc::new(AccountView::new(record, key));
        // If the account changed since the load began, what was read may be older than that: good enough for this
        // caller, who asked before, but not for the next.
        let now = self.stripe(&account).lock();
        if *now == before {
            self.cache.insert(account, view.clone());
        }
        Ok(Some(view))
    }

    /// Forgets what is cached of the account: it changed.
    pub fn invalidate(&self, account: AccountId) {
        let mut count = self.stripe(&account).lock();
        *count += 1;
        self.cache.remove(&account);
    }

    /// Forgets everything: what changed may have been missed.
    pub fn invalidate_all(&self) {
        self.invalidations.iter().for_each(|count| *count.lock() += 1);
        self.cache.clear();
    }

    fn stripe(&self, account: &AccountId) -> &Mutex<u64> {
        &self.invalidations[self.hasher.hash_one(account) as usize % STRIPES]
    }

    /// The account an identity is linked to.
    pub async fn resolve(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        self.parts.store.identity(identity).await
    }

    /// Everything about an account: names, identities, times. Not cached; deleted accounts included.
    pub async fn record(&self, account: AccountId) -> Result<Option<AccountRecord>, StoreError> {
        self.parts.store.account(account).await
    }

    /// Appends a change and waits until it is applied, durable and visible in the store, or refused. Dropping the future does
    /// not take the change back.
    pub async fn change(&self, account: AccountId, change: DirectoryChange) -> Result<Verdict, DirectoryError> {
        self.change_at(account, self.parts.clock.now(), change).await
    }

    async fn change_at(&self, account: AccountId, at: UnixMillis, change: DirectoryChange) -> Result<Verdict, DirectoryError> {
        let waiter = self.waiters.wait().map_err(|Full| DirectoryError::Busy)?;
        let reply_to = Some(RequestId { edge: self.parts.edge, number: waiter.number() });
        let command = DirectoryCommand { account, at, reply_to, change };
        let partition = Partition::of(&account, self.parts.log.partitions(Topic::Directory));
        let to = TopicPartition { topic: Topic::Directory, partition };
        let verdict = tokio::time::timeout(Duration::from_millis(limits::VERDICT_MS), async {
            self.parts.log.append(to, event::encode(&command)).await?;
            waiter.verdict().await.ok_or(DirectoryError::OutcomeUnknown)
        });
        let verdict = verdict.await.unwrap_or(Err(DirectoryError::OutcomeUnknown))?;
        // The projector says so too, to every edge; this one must not answer before it has heard.
        self.invalidate(account);
        Ok(verdict)
    }

    /// The verdict on one of this edge's changes has come. Unknown numbers are those nobody waits for any more.
    pub fn complete(&self, number: u64, verdict: Verdict) {
        self.waiters.complete(number, verdict);
    }

    /// Registers a device for an identity whose token was shown: with the identity's account, or with a new one.
    /// `Done` carries the device, which was made before if an earlier registration had the same credential; the time says
    /// when this one was stamped, so that the device's record tells which of the two it is.
    pub async fn register(&self, identity: &Identity, device: &NewDevice) -> Result<(Verdict, UnixMillis), DirectoryError> {
        let keys = &self.parts.keys;
        let at = self.parts.clock.now();
        let mut verdict = Verdict::Conflict;
        for _ in 0..REGISTER_TRIES {
            let account = keys.claim_identity(identity, AccountId::random(&*self.parts.random)).await?;
            // Before the account is: whoever sees it can seal for it.
            let sealed = keys.seal_key(account, Some(SealKey::random(&*self.parts.random))).await?;
            verdict = match sealed {
                Some(_) => {
                    let change = DirectoryChange::RegisterDevice { identity: identity.clone(), device: device.clone() };
                    self.change_at(account, at, change).await?
                }
                None => Verdict::AccountDeleted,
            };
            match verdict {
                // The claim outlived the link: the account was deleted, or it gave the identity up, or never got it.
                Verdict::AccountDeleted | Verdict::Conflict => keys.release_identity(identity, account).await?,
                Verdict::Done(_) | Verdict::NotFound | Verdict::LimitReached => return Ok((verdict, at)),
            }
        }
        Ok((verdict, at))
    }

    /// Links an identity whose token was shown to the account. `Conflict`: it is another account's.
    pub async fn link(&self, account: AccountId, identity: &Identity) -> Result<Verdict, DirectoryError> {
        let keys = &self.parts.keys;
        if keys.claim_identity(identity, account).await? != account {
            return Ok(Verdict::Conflict);
        }
        let outcome = self.change(account, DirectoryChange::LinkIdentity { identity: identity.clone() }).await;
        match outcome {
            Ok(Verdict::Done(done)) => {
                // An unlinking that was under way may have freed the claim in between, for somebody else to take.
                if keys.claim_identity(identity, account).await? == account {
                    return Ok(Verdict::Done(done));
                }
                self.change(account, DirectoryChange::UnlinkIdentity { identity: identity.clone() }).await?;
                Ok(Verdict::Conflict)
            }
            // It may be applied yet: the claim must stand.
            Err(DirectoryError::OutcomeUnknown) => outcome,
            refused => {
                let linked = self.record(account).await?.is_some_and(|record| record.identities.contains(identity));
                if !linked {
                    keys.release_identity(identity, account).await?;
                }
                refused
            }
        }
    }

    /// Takes a link away. `Conflict`: it is the last one.
    pub async fn unlink(&self, account: AccountId, identity: &Identity) -> Result<Verdict, DirectoryError> {
        self.change(account, DirectoryChange::UnlinkIdentity { identity: identity.clone() }).await
    }

    /// Changes a device's display name, which the caller has checked.
    pub async fn rename_device(&self, account: AccountId, device: DeviceId, name: String) -> Result<Verdict, DirectoryError> {
        self.change(account, DirectoryChange::RenameDevice { device, name }).await
    }

    /// Removes a device: its credential is worth nothing when this returns; its inbox and keys go.
    pub async fn revoke_device(&self, account: AccountId, device: DeviceId) -> Result<Verdict, DirectoryError> {
        self.change(account, DirectoryChange::RevokeDevice { device }).await
    }

    /// Replaces long-lived prekeys, which the caller has verified.
    pub async fn publish_keys(
        &self,
        account: AccountId,
        device: DeviceId,
        signed_prekey: Option<SignedKey>,
        pq_last_resort: Option<SignedKey>,
    ) -> Result<Verdict, DirectoryError> {
        self.change(account, DirectoryChange::PublishKeys { device, signed_prekey, pq_last_resort }).await
    }

    /// Refuses messages of another account.
    pub async fn block(&self, account: AccountId, other: AccountId) -> Result<Verdict, DirectoryError> {
        self.change(account, DirectoryChange::Block { other }).await
    }

    /// Takes that back.
    pub async fn unblock(&self, account: AccountId, other: AccountId) -> Result<Verdict, DirectoryError> {
        self.change(account, DirectoryChange::Unblock { other }).await
    }

    /// Ends the account. With `Done` its at-rest key is destroyed on disk: what the log and the store still hold of it is
    /// unreadable for ever.
    pub async fn delete_account(&self, account: AccountId) -> Result<Verdict, DirectoryError> {
        let verdict = self.change(account, DirectoryChange::DeleteAccount).await?;
        if matches!(verdict, Verdict::Done(_) | Verdict::AccountDeleted) {
            // The projector did it before it wrote the tombstone; this makes the promise hold by itself.
            self.parts.keys.destroy_seal_key(account).await?;
        }
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests;
