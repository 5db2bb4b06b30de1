//! MLS KeyPackages: what a device publishes so that others can add it to groups.
//!
//! They are checked with openmls's own validation and for being the device's ([`crate::mls::key_package`]) before anything is kept. One is
//! handed out at most once; when none is left, the one of last resort serves, any number of times. Expired ones are never handed out.

use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::{KeyService, KeysError, in_turn};
use crate::clock::{SystemRandom, UnixMillis};
use crate::ids::DeviceAddr;
use crate::limits;
use crate::metrics::{self, Prekey, PrekeyOutcome};
use crate::mls::key_package::{self, Invalid};
use crate::store::{KeyKind, OneTimeKey, StoreError};

/// Why a KeyPackage is refused. The same one never passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPackage {
    /// See there.
    #[error(transparent)]
    Package(#[from] Invalid),
    /// Marked as last resort where one-time ones are expected, or the other way round.
    #[error("the last-resort mark must be on the last resort, and on no other")]
    LastResort,
    /// Its id is there twice.
    #[error("its id is there twice")]
    Twice,
    /// More than [`limits::PREKEYS_PER_UPLOAD`].
    #[error("more than {} at once", limits::PREKEYS_PER_UPLOAD)]
    TooMany,
}

/// What a device uploads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PackageUpload {
    /// KeyPackages with the device's numbers for them.
    pub one_time: Vec<(u32, Vec<u8>)>,
    /// A new one of last resort.
    pub last_resort: Option<Vec<u8>>,
}

/// An upload that was checked, as it is kept.
#[derive(Debug)]
pub struct CheckedUpload {
    one_time: Vec<OneTimeKey>,
    last_resort: Option<OneTimeKey>,
}

/// What a device has published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PackageCounts {
    /// KeyPackages that are left; expired ones count until they are met.
    pub one_time: usize,
    /// Whether there is one of last resort.
    pub last_resort: bool,
}

/// A KeyPackage that is handed out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handed {
    /// Whose.
    pub device: DeviceAddr,
    /// Its bytes, and whether it is the one of last resort; `None` if the device has published none that is valid.
    pub key_package: Option<(Vec<u8>, bool)>,
}

impl PackageUpload {
    /// Checks everything. Costs about 0.2 ms a KeyPackage, so it is done on a background thread.
    pub async fn check(self, device: DeviceAddr, now: UnixMillis) -> Result<CheckedUpload, KeysError> {
        if self.one_time.len() > limits::PREKEYS_PER_UPLOAD {
            return Err(KeysError::Package(0, InvalidPackage::TooMany));
        }
        in_turn(move || self.checked(device, now)).await?.map_err(|(id, error)| KeysError::Package(id, error))
    }

    fn checked(self, device: DeviceAddr, now: UnixMillis) -> Result<CheckedUpload, (u32, InvalidPackage)> {
        let keep = |id: u32, bytes: Vec<u8>, last_resort: bool| {
            let checked = key_package::check(&bytes, Some(device), now, &SystemRandom).map_err(|error| (id, error.into()))?;
            if checked.last_resort != last_resort {
                return Err((id, InvalidPackage::LastResort));
            }
            Ok(kept(id, checked.expires, &bytes))
        };
        let mut ids = std::collections::HashSet::new();
        let twice = self.one_time.iter().map(|(id, _)| *id).find(|id| !ids.insert(*id));
        if let Some(id) = twice {
            return Err((id, InvalidPackage::Twice));
        }
        Ok(CheckedUpload {
            one_time: self.one_time.into_iter().map(|(id, bytes)| keep(id, bytes, false)).collect::<Result<_, _>>()?,
            last_resort: self.last_resort.map(|bytes| keep(0, bytes, true)).transpose()?,
        })
    }
}

/// As it is stored: when it expires (8 bytes, big endian), then the KeyPackage.
fn kept(id: u32, expires: UnixMillis, bytes: &[u8]) -> OneTimeKey {
    OneTimeKey { id, public_key: [&expires.0.to_be_bytes(), bytes].concat(), signature: Vec::new() }
}

/// The KeyPackage, if it is valid for long enough to be used.
fn valid(key: OneTimeKey, now: UnixMillis) -> Option<Vec<u8>> {
    let (expires, bytes) = key.public_key.split_first_chunk::<8>()?;
    (u64::from_be_bytes(*expires) >= now.plus(limits::KEY_PACKAGE_LEFT_S * 1000).0).then(|| bytes.to_vec())
}

impl KeyService {
    /// What the device has published.
    pub async fn package_counts(&self, device: DeviceAddr) -> Result<PackageCounts, StoreError> {
        let one_time = self.pools.count_one_time(device, KeyKind::KeyPackage);
        let last_resort = self.pools.count_one_time(device, KeyKind::KeyPackageLastResort);
        let (one_time, last_resort) = futures_util::try_join!(one_time, last_resort)?;
        Ok(PackageCounts { one_time, last_resort: last_resort > 0 })
    }

    /// Adds to the device's KeyPackages and replaces its last resort. Durable when it returns.
    pub async fn add_packages(&self, device: DeviceAddr, upload: CheckedUpload) -> Result<PackageCounts, KeysError> {
        let full = |error: StoreError| if error == StoreError::LimitReached { KeysError::TooMany } else { error.into() };
        // The pool first: it is the part that may be refused.
        if !upload.one_time.is_empty() {
            self.pools.add_one_time(device, KeyKind::KeyPackage, upload.one_time).await.map_err(full)?;
        }
        if let Some(last_resort) = upload.last_resort {
            self.pools.add_one_time(device, KeyKind::KeyPackageLastResort, vec![last_resort]).await.map_err(full)?;
        }
        Ok(self.package_counts(device).await?)
    }

    /// Counts a request for KeyPackages by this device.
    pub fn may_fetch_packages(&self, fetcher: DeviceAddr) -> Result<(), KeysError> {
        self.package_fetches.check(&fetcher).map_err(|retry_after_ms| {
            metrics::observe_rate_limited(metrics::RateScope::KeyFetches);
            KeysError::RateLimited { retry_after_ms }
        })
    }

    /// A KeyPackage of each device, in the order asked, each one that nobody else gets where that is possible.
    pub async fn packages(&self, devices: Vec<DeviceAddr>, now: UnixMillis) -> Result<Vec<Handed>, KeysError> {
        // Together: the store syncs once for many of them.
        let handed = stream::iter(devices).map(|device| self.package(device, now)).buffered(limits::KEY_PACKAGES_AT_ONCE);
        Ok(handed.try_collect().await?)
    }

    async fn package(&self, device: DeviceAddr, now: UnixMillis) -> Result<Handed, StoreError> {
        let protected = self.handed.check(&device).is_err();
        let one_time = if protected { None } else { self.take_package(device, now).await? };
        let outcome = match (&one_time, protected) {
            (Some(_), _) => PrekeyOutcome::Handed,
            (None, true) => PrekeyOutcome::Protected,
            (None, false) => PrekeyOutcome::Exhausted,
        };
        metrics::observe_one_time(Prekey::KeyPackage, outcome);
        let key_package = match one_time {
            Some(bytes) => Some((bytes, false)),
            None => {
                let last_resort = self.pools.first_one_time(device, KeyKind::KeyPackageLastResort).await?;
                last_resort.and_then(|key| valid(key, now)).map(|bytes| (bytes, true))
            }
        };
        Ok(Handed { device, key_package })
    }

    /// Takes the first one that is valid; the expired ones before it are gone with that.
    async fn take_package(&self, device: DeviceAddr, now: UnixMillis) -> Result<Option<Vec<u8>>, StoreError> {
        loop {
            let (key, left) = self.pools.take_one_time(device, KeyKind::KeyPackage).await?;
            let Some(key) = key else { return Ok(None) };
            let bytes = valid(key, now);
            if left < limits::PREKEYS_LOW_WATER && (bytes.is_some() || left == 0) {
                self.low_water.key_packages_low(device, left);
            }
            if bytes.is_some() || left == 0 {
                return Ok(bytes);
            }
        }
    }
}
