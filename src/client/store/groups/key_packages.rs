//! This device's KeyPackages. Private keys are in the database before anything is published.

use crate::client::core::group_api::{KeyPackageCounts, NumberedPackage, UploadKeyPackages};
use crate::client::store::{Db, Error, sql};
use crate::limits;
use crate::mls::storage::Kind;

/// KeyPackages kept on the server: an upload's worth.
const KEPT: usize = limits::PREKEYS_PER_UPLOAD;
/// KeyPackages are replaced after a third of their life, so that they are valid long enough for whoever fetches one.
const ROTATION_MS: u64 = limits::KEY_PACKAGE_LIFETIME_S * 1000 / 3;
/// Private keys are kept past the end of a KeyPackage's life as long as an invitation may be under way.
const RETIRED_KEPT_MS: u64 = limits::KEY_PACKAGE_LIFETIME_S * 1000 + limits::ENVELOPE_TTL_MS + 24 * 3600 * 1000;

const LAST_ID: &str = "last_key_package";
const MADE_MS: &str = "key_packages_ms";

impl Db {
    /// KeyPackages to publish, given what the server has; `None`: it has enough, and none is old. With `rotated` they replace all.
    pub(in crate::client) fn make_key_packages(&self, counts: KeyPackageCounts) -> Result<Option<UploadKeyPackages>, Error> {
        let now = self.now();
        let due = now.0.saturating_sub(sql::meta_number(&self.connection, MADE_MS)?) >= ROTATION_MS;
        let low = counts.key_packages < limits::PREKEYS_LOW_WATER;
        if !due && !low && counts.last_resort {
            return Ok(None);
        }
        let missing = KEPT.saturating_sub(counts.key_packages);
        let last = sql::meta_number(&self.connection, LAST_ID)?;
        // Those that were not handed out have the highest numbers: under the same ones, new ones take their place.
        let replaced = if due { counts.key_packages.min(KEPT) as u64 } else { 0 };
        let first = last.saturating_sub(replaced) + 1;
        let count = if due { KEPT } else { missing };
        let last_resort = due || !counts.last_resort;
        let (packages, last_resort) = self.with_engine(|engine| {
            let packages = engine.key_packages(count, now)?;
            Ok((packages, last_resort.then(|| engine.last_resort_key_package(now)).transpose()?))
        })??;
        let highest = (first + count as u64 - u64::from(count > 0)).max(last);
        sql::set_meta_number(&self.connection, LAST_ID, highest)?;
        let number = |at: usize| u32::try_from(first + at as u64).map_err(|_| Error::Damaged("no key numbers are left".into()));
        let numbered =
            packages.into_iter().enumerate().map(|(at, bytes)| Ok(NumberedPackage { id: number(at)?, key_package: bytes.into() }));
        Ok(Some(UploadKeyPackages { key_packages: numbered.collect::<Result<_, Error>>()?, last_resort: last_resort.map(Into::into) }))
    }

    /// The server has a whole new set.
    pub(in crate::client) fn key_packages_published(&self, upload: &UploadKeyPackages) -> Result<(), Error> {
        if upload.last_resort.is_some() {
            sql::set_meta_number(&self.connection, MADE_MS, self.now().0)?;
        }
        let retired = sql::int(self.now().0.saturating_sub(RETIRED_KEPT_MS));
        let mut delete = self.connection.prepare_cached("DELETE FROM mls WHERE kind = ?1 AND created_ms < ?2")?;
        delete.execute(rusqlite::params![Kind::KeyPackage as u8, retired])?;
        Ok(())
    }
}
