//! The public keys that devices publish for others to begin conversations with.
//!
//! - What is uploaded is verified with libsignal's own code ([`verify`]) before anything is kept.
//! - A one-time prekey is handed out at most once: the pool is state in the [`KeyStore`], never replayed.
//! - A pool can't be drained: each device may fetch so many bundles a minute (past it: `rate_limited`), and out of each pool so
//!   many one-time prekeys go a minute, whoever asks (past it bundles come without one and with the last-resort PQ
//!   prekey, which is what PQXDH has it for). So an attacker with many devices slows nobody down.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};

use tokio::sync::{Semaphore, oneshot};

use crate::background;
use crate::config::Rates;
use crate::ids::{AccountId, DeviceAddr, DeviceId};
use crate::limits;
use crate::metrics::{self, Prekey, PrekeyOutcome};
use crate::rate::Keyed;
use crate::store::{DirectoryStore, KeyKind, KeyStore, OneTimeKey, StoreError};
use crate::wire::event::SignedKey;

pub mod packages;
pub mod verify;

use verify::{IdentityKey, InvalidKeys};

/// Why keys were not taken or not handed out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeysError {
    /// The keys are wrong; nothing was kept.
    #[error(transparent)]
    Invalid(#[from] InvalidKeys),
    /// A KeyPackage is wrong; nothing was kept.
    #[error("KeyPackage {0}: {1}")]
    Package(u32, packages::InvalidPackage),
    /// More than [`limits::PREKEYS_PER_DEVICE`] would be kept; nothing was.
    #[error("a device keeps at most {} one-time prekeys of a kind", limits::PREKEYS_PER_DEVICE)]
    TooMany,
    /// The device fetches too many bundles.
    #[error("too many key fetches; slow down")]
    RateLimited {
        /// When to try again, in milliseconds.
        retry_after_ms: u32,
    },
    /// The store failed; see there whether a retry helps.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A fault of the server.
    #[error("verification was cut short")]
    Internal,
}

/// What a device uploads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upload {
    /// A new signed EC prekey.
    pub signed_prekey: Option<SignedKey>,
    /// A new PQ last-resort prekey.
    pub pq_last_resort: Option<SignedKey>,
    /// One-time EC prekeys, without signatures.
    pub one_time: Vec<OneTimeKey>,
    /// One-time PQ prekeys, signed.
    pub pq_one_time: Vec<OneTimeKey>,
}

impl Upload {
    /// Checks everything with libsignal's code. Costs about 0.1 ms a signature, so big batches go to a background thread, one
    /// at a time: many devices that refill at once must not take the cores from the fetches and messages beside them.
    pub async fn verify(self, identity_key: Vec<u8>) -> Result<Self, KeysError> {
        if self.pq_one_time.len() + self.one_time.len() <= 8 {
            return Ok(self.checked(&identity_key)?);
        }
        Ok(in_turn(move || self.checked(&identity_key)).await??)
    }

    fn checked(self, identity_key: &[u8]) -> Result<Self, InvalidKeys> {
        let identity = IdentityKey::parse(identity_key)?;
        self.signed_prekey.as_ref().map_or(Ok(()), |key| identity.signed_prekey(key))?;
        self.pq_last_resort.as_ref().map_or(Ok(()), |key| identity.pq_last_resort(key))?;
        verify::ec_one_time(&self.one_time)?;
        identity.pq_one_time(&self.pq_one_time)?;
        Ok(self)
    }
}

/// Does what takes cores for long on a background thread, one at a time.
async fn in_turn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, KeysError> {
    static TURN: Semaphore = Semaphore::const_new(1);
    let _turn = TURN.acquire().await.map_err(|_| KeysError::Internal)?;
    let (sender, done) = oneshot::channel();
    // A thread for each is a few hundredths of what it does. Who waited may have gone away.
    background::spawn("verify", move || drop(sender.send(work()))).map_err(|_| KeysError::Internal)?;
    done.await.map_err(|_| KeysError::Internal)
}

/// How many one-time prekeys a device has left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// X25519.
    pub ec: usize,
    /// Kyber-1024.
    pub pq: usize,
}

impl Counts {
    /// Whether the device should refill.
    pub const fn low(self) -> bool {
        self.ec < limits::PREKEYS_LOW_WATER || self.pq < limits::PREKEYS_LOW_WATER
    }
}

/// What somebody needs to begin a conversation with one device, beside its registration id and identity key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// Which device.
    pub device: DeviceId,
    /// Its signed EC prekey.
    pub signed_prekey: SignedKey,
    /// A one-time PQ prekey, or the last-resort one.
    pub pq_prekey: SignedKey,
    /// A one-time EC prekey, if there is one.
    pub one_time: Option<OneTimeKey>,
}

/// Is told when a device's pool runs low; must be quick. The device's open stream sends `PrekeysLow`.
pub trait LowWater: Send + Sync + 'static {
    /// Fewer than [`limits::PREKEYS_LOW_WATER`] are left of a kind.
    fn prekeys_low(&self, device: DeviceAddr, left: Counts);
    /// Fewer than that many KeyPackages are left.
    fn key_packages_low(&self, device: DeviceAddr, left: usize);
}

/// Nobody is told.
impl LowWater for () {
    fn prekeys_low(&self, _: DeviceAddr, _: Counts) {}
    fn key_packages_low(&self, _: DeviceAddr, _: usize) {}
}

/// Takes and hands out keys.
pub struct KeyService {
    pools: Arc<dyn KeyStore>,
    long_lived: Arc<dyn DirectoryStore>,
    low_water: Arc<dyn LowWater>,
    fetches: Keyed<DeviceAddr>,
    package_fetches: Keyed<DeviceAddr>,
    handed: Keyed<DeviceAddr>,
}

impl KeyService {
    /// Over these stores, with these limits.
    pub fn new(pools: Arc<dyn KeyStore>, long_lived: Arc<dyn DirectoryStore>, rates: &Rates, low_water: Arc<dyn LowWater>) -> Self {
        let minute = |count| Keyed::new(count, Duration::from_secs(60), count);
        Self {
            pools,
            long_lived,
            low_water,
            fetches: minute(rates.key_fetches_per_device_per_min),
            package_fetches: minute(rates.key_package_fetches_per_device_per_min),
            handed: minute(rates.one_time_prekeys_per_device_per_min),
        }
    }

    /// How many one-time prekeys the device has left.
    pub async fn counts(&self, device: DeviceAddr) -> Result<Counts, StoreError> {
        let ec = self.pools.count_one_time(device, KeyKind::Ec);
        let pq = self.pools.count_one_time(device, KeyKind::Pq);
        let (ec, pq) = futures_util::try_join!(ec, pq)?;
        Ok(Counts { ec, pq })
    }

    /// Checks that an upload leaves the device below its cap, before anything of it is kept.
    pub async fn room_for(&self, device: DeviceAddr, upload: &Upload) -> Result<(), KeysError> {
        let counts = self.counts(device).await?;
        let fits = |have: usize, more: &[OneTimeKey]| more.is_empty() || have + more.len() <= limits::PREKEYS_PER_DEVICE;
        if fits(counts.ec, &upload.one_time) && fits(counts.pq, &upload.pq_one_time) { Ok(()) } else { Err(KeysError::TooMany) }
    }

    /// Adds verified one-time prekeys to the device's pools. Durable when it returns.
    pub async fn add_one_time(&self, device: DeviceAddr, ec: Vec<OneTimeKey>, pq: Vec<OneTimeKey>) -> Result<Counts, KeysError> {
        let add = |kind, keys: Vec<OneTimeKey>| async move {
            let added = match keys.is_empty() {
                true => self.pools.count_one_time(device, kind).await,
                false => self.pools.add_one_time(device, kind, keys).await,
            };
            added.map_err(|error| if error == StoreError::LimitReached { KeysError::TooMany } else { error.into() })
        };
        let (ec, pq) = futures_util::try_join!(add(KeyKind::Ec, ec), add(KeyKind::Pq, pq))?;
        Ok(Counts { ec, pq })
    }

    /// Drops a device's pools: it was revoked, or its number is given to a new device.
    pub async fn forget(&self, device: DeviceAddr) -> Result<(), StoreError> {
        self.pools.remove_one_time(device).await
    }

    /// The bundles of some devices of an account, each with one-time prekeys that nobody else gets. Devices that
    /// are gone meanwhile are left out.
    pub async fn bundles(&self, fetcher: DeviceAddr, account: AccountId, devices: &[DeviceId]) -> Result<Vec<Bundle>, KeysError> {
        self.fetches.check(&fetcher).map_err(|retry_after_ms| {
            metrics::observe_rate_limited(metrics::RateScope::KeyFetches);
            KeysError::RateLimited { retry_after_ms }
        })?;
        // Together: the store syncs once for all of them.
        let one = |device: &DeviceId| self.bundle(DeviceAddr { account, device: *device });
        let bundles: Vec<_> = try_join_all(devices.iter().map(one)).await?.into_iter().flatten().collect();
        metrics::observe_bundles(bundles.len() as u64);
        Ok(bundles)
    }

    async fn bundle(&self, device: DeviceAddr) -> Result<Option<Bundle>, StoreError> {
        let Some(keys) = self.long_lived.device_keys(device).await? else { return Ok(None) };
        if self.handed.check(&device).is_err() {
            metrics::observe_one_time(Prekey::Ec, PrekeyOutcome::Protected);
            metrics::observe_one_time(Prekey::Pq, PrekeyOutcome::Protected);
            return Ok(Some(Bundle {
                device: device.device,
                signed_prekey: keys.signed_prekey,
                pq_prekey: keys.pq_last_resort,
                one_time: None,
            }));
        }
        let takes = [KeyKind::Ec, KeyKind::Pq].map(|kind| self.pools.take_one_time(device, kind));
        let mut taken = join_all(takes).await.into_iter();
        let mut next = || taken.next().unwrap_or(Ok((None, 0)));
        let ((ec, ec_left), (pq, pq_left)) = (next()?, next()?);
        let outcome = |key: &Option<OneTimeKey>| if key.is_some() { PrekeyOutcome::Handed } else { PrekeyOutcome::Exhausted };
        metrics::observe_one_time(Prekey::Ec, outcome(&ec));
        metrics::observe_one_time(Prekey::Pq, outcome(&pq));
        let left = Counts { ec: ec_left, pq: pq_left };
        if left.low() {
            self.low_water.prekeys_low(device, left);
        }
        Ok(Some(Bundle {
            device: device.device,
            signed_prekey: keys.signed_prekey,
            pq_prekey: pq.unwrap_or(keys.pq_last_resort),
            one_time: ec,
        }))
    }
}
