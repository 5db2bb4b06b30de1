//! Other accounts: identities, devices, keys, trust.

use rusqlite::{OptionalExtension as _, params};

use super::{Db, Error};
use crate::client::core::api::PeerDevice;
use crate::client::core::safety;
use crate::client::core::signal::{self, Bundle};
use crate::client::core::state::{IdentityNews, StateTx};
use crate::client::types::{Event, Trust};
use crate::ids::{AccountId, DeviceAddr, DeviceId, Identity};
use crate::limits;

/// Identities that accounts claim and that were not looked up yet; more are dropped, they come with the next message again.
const CLAIMS: i64 = 1_000;

/// What an account lacks before everything for it can be encrypted.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::client) struct Need {
    /// Its device list was never read.
    pub list: bool,
    /// Devices without a session.
    pub sessions: Vec<DeviceId>,
}

impl Db {
    /// Makes sure that there is a row.
    pub(super) fn contact(&self, account: AccountId) -> Result<(), Error> {
        self.connection.prepare_cached("INSERT OR IGNORE INTO contacts (account) VALUES (?1)")?.execute([account])?;
        Ok(())
    }

    /// The account of an identity, if the directory confirmed it before.
    pub(in crate::client) fn account_of(&self, identity: &Identity) -> Result<Option<AccountId>, Error> {
        let mut select = self.connection.prepare_cached("SELECT account FROM contact_identities WHERE identity = ?1")?;
        Ok(select.query_row([identity.to_string()], |row| row.get(0)).optional()?)
    }

    /// The identities of an account that the directory confirmed.
    pub(in crate::client) fn identities_of(&self, account: AccountId) -> Result<Vec<Identity>, Error> {
        let mut select = self.connection.prepare_cached("SELECT identity FROM contact_identities WHERE account = ?1 ORDER BY identity")?;
        let texts: Vec<String> = select.query_map([account], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        Ok(texts.iter().filter_map(|text| text.parse().ok()).collect())
    }

    /// Notes a confirmed identity; whether that is news.
    pub(super) fn link(&self, identity: &Identity, account: AccountId) -> Result<bool, Error> {
        if self.account_of(identity)? == Some(account) {
            return Ok(false);
        }
        let mut insert = self.connection.prepare_cached("INSERT OR REPLACE INTO contact_identities VALUES (?1, ?2)")?;
        insert.execute(params![identity.to_string(), account])?;
        Ok(true)
    }

    /// The directory says whose an identity is (`None`: nobody's): settles what was claimed about it.
    pub(in crate::client) fn confirm(&self, identity: &Identity, account: Option<AccountId>) -> Result<(), Error> {
        self.connection.prepare_cached("DELETE FROM claims WHERE identity = ?1")?.execute([identity.to_string()])?;
        let Some(account) = account else {
            self.connection.execute("DELETE FROM contact_identities WHERE identity = ?1", [identity.to_string()])?;
            return Ok(());
        };
        self.contact(account)?;
        if self.link(identity, account)? && self.own()?.account != account {
            self.tell(&Event::Contact { account, identity: identity.clone() })?;
        }
        Ok(())
    }

    /// An account says that it has this identity; the directory will be asked.
    pub(super) fn claim(&self, identity: &str, account: AccountId) -> Result<(), Error> {
        let Ok(identity) = identity.parse::<Identity>() else { return Ok(()) };
        if self.account_of(&identity)? == Some(account) {
            return Ok(());
        }
        let mut insert =
            self.connection.prepare_cached("INSERT OR IGNORE INTO claims SELECT ?1, ?2 WHERE (SELECT count(*) FROM claims) < ?3")?;
        if insert.execute(params![identity.to_string(), account, CLAIMS])? == 1 {
            self.mark(|changed| changed.outgoing = true);
        }
        Ok(())
    }

    /// Some claims to ask the directory about.
    pub(in crate::client) fn claims(&self, limit: usize) -> Result<Vec<Identity>, Error> {
        let mut select = self.connection.prepare_cached("SELECT DISTINCT identity FROM claims LIMIT ?1")?;
        let texts: Vec<String> = select.query_map([limit as i64], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        Ok(texts.iter().filter_map(|text| text.parse().ok()).collect())
    }

    /// The devices messages for an account go to; of one's own account, the others.
    pub(super) fn devices(&self, account: AccountId) -> Result<Vec<DeviceId>, Error> {
        let mut select = self.connection.prepare_cached("SELECT device FROM devices WHERE account = ?1 ORDER BY device")?;
        Ok(select.query_map([account], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    pub(super) fn devices_known(&self, account: AccountId) -> Result<bool, Error> {
        let mut select = self.connection.prepare_cached("SELECT devices_known FROM contacts WHERE account = ?1")?;
        Ok(select.query_row([account], |row| row.get(0)).optional()?.unwrap_or(false))
    }

    /// The directory's device list: learns keys, forgets devices that are gone.
    pub(in crate::client) fn set_devices(&self, account: AccountId, devices: &[PeerDevice]) -> Result<(), Error> {
        self.contact(account)?;
        let own = self.own()?;
        let listed = devices.iter().filter(|device| DeviceAddr { account, device: device.device_id } != own);
        let listed: Vec<&PeerDevice> = listed.take(limits::DEVICES_PER_ACCOUNT).collect();
        for gone in self.devices(account)?.into_iter().filter(|known| !listed.iter().any(|device| device.device_id == *known)) {
            self.forget_device(DeviceAddr { account, device: gone })?;
        }
        self.core(|tx| {
            listed.iter().try_for_each(|device| {
                let address = DeviceAddr { account, device: device.device_id };
                signal::learn_identity(tx, address, &device.identity_key.0)
            })
        })?;
        for device in listed {
            self.add_device(DeviceAddr { account, device: device.device_id })?;
        }
        self.connection.execute("UPDATE contacts SET devices_known = 1, deleted = 0 WHERE account = ?1", [account])?;
        Ok(())
    }

    /// A device is there: messages for its account go to it too.
    pub(super) fn add_device(&self, device: DeviceAddr) -> Result<(), Error> {
        if device == self.own()? {
            return Ok(());
        }
        self.contact(device.account)?;
        let mut insert = self.connection.prepare_cached("INSERT OR IGNORE INTO devices VALUES (?1, ?2)")?;
        insert.execute(params![device.account, device.device])?;
        Ok(())
    }

    /// A device is gone. Its identity key stays known: another one under the same number will be told.
    pub(in crate::client) fn forget_device(&self, device: DeviceAddr) -> Result<(), Error> {
        let at = params![device.account, device.device];
        self.connection.execute("DELETE FROM devices WHERE account = ?1 AND device = ?2", at)?;
        self.connection.execute("DELETE FROM sessions WHERE account = ?1 AND device = ?2", at)?;
        Ok(())
    }

    /// What an account lacks.
    pub(in crate::client) fn need(&self, account: AccountId) -> Result<Need, Error> {
        let mut need = Need { list: !self.devices_known(account)?, sessions: Vec::new() };
        for device in self.devices(account)? {
            if !self.has_session(DeviceAddr { account, device })? {
                need.sessions.push(device);
            }
        }
        Ok(need)
    }

    pub(super) fn has_session(&self, with: DeviceAddr) -> Result<bool, Error> {
        let storage = super::state::SqlState(&self.connection);
        Ok(signal::usable_session(&StateTx::new(&storage), with, self.now())?.is_some())
    }

    /// Begins sessions from bundles, where there is none. An invalid bundle is an error for its device only.
    pub(in crate::client) fn begin_sessions(&self, account: AccountId, bundles: &[Bundle]) -> Result<(), Error> {
        let own = self.own()?;
        for bundle in bundles.iter().take(limits::DEVICES_PER_ACCOUNT) {
            let to = DeviceAddr { account, device: bundle.device };
            if to == own || self.has_session(to)? {
                continue;
            }
            let (now, random) = (self.now(), self.random.clone());
            match self.core(|tx| signal::begin_session(tx, to, bundle, now, &*random)) {
                Ok(()) => self.add_device(to)?,
                Err(Error::Signal(signal::Error::BadBundle(reason))) => {
                    tracing::warn!(reason, "a device's published keys are not valid; nothing is sent to it");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Tells of new and changed identity keys, and holds sending to accounts that were verified.
    pub(super) fn identity_news(&self, news: &[IdentityNews]) -> Result<(), Error> {
        for item in news {
            let (IdentityNews::New(of) | IdentityNews::Changed(of)) = item;
            let changed = matches!(item, IdentityNews::Changed(_));
            // At first contact every device is new.
            if !changed && !self.devices_known(of.account)? {
                continue;
            }
            let was_verified = self.trust(of.account)? != Trust::Unverified;
            if was_verified {
                self.connection.execute("UPDATE contacts SET trust = 2 WHERE account = ?1", [of.account])?;
            }
            let (account, device) = (of.account, of.device);
            self.tell(&if changed {
                Event::IdentityChanged { account, device, was_verified }
            } else {
                Event::DeviceAdded { account, device, was_verified }
            })?;
        }
        Ok(())
    }

    /// What the person knows about an account's keys.
    pub(super) fn trust(&self, account: AccountId) -> Result<Trust, Error> {
        let mut select = self.connection.prepare_cached("SELECT trust FROM contacts WHERE account = ?1")?;
        Ok(match select.query_row([account], |row| row.get(0)).optional()? {
            Some(1) => Trust::Verified,
            Some(2) => Trust::Changed,
            _ => Trust::Unverified,
        })
    }

    pub(super) fn is_deleted(&self, account: AccountId) -> Result<bool, Error> {
        let mut select = self.connection.prepare_cached("SELECT deleted FROM contacts WHERE account = ?1")?;
        Ok(select.query_row([account], |row| row.get(0)).optional()?.unwrap_or(false))
    }

    /// Identity keys of the devices of an account.
    pub(super) fn identity_keys(&self, account: AccountId) -> Result<Vec<Vec<u8>>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT key FROM remote_identities JOIN devices USING (account, device) WHERE account = ?1 ORDER BY key")?;
        Ok(select.query_map([account], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    /// The safety number with an account, as this device knows both.
    pub(in crate::client) fn safety_number(&self, account: AccountId) -> Result<(String, Trust), Error> {
        let own = self.own()?.account;
        let (ours, theirs) = (self.own_identity_keys(own)?, self.identity_keys(account)?);
        Ok((safety::number((own, &ours), (account, &theirs)), self.trust(account)?))
    }

    /// The person compared the safety number `digits`, and it was right. Refused if it is another one by now.
    pub(in crate::client) fn verify(&self, account: AccountId, digits: &str) -> Result<bool, Error> {
        if self.safety_number(account)?.0 != digits {
            return Ok(false);
        }
        self.set_trust(account, 1)?;
        Ok(true)
    }

    /// The person knows that the keys changed, and goes on without verifying.
    pub(in crate::client) fn accept_identity(&self, account: AccountId) -> Result<(), Error> {
        self.set_trust(account, 0)
    }

    fn set_trust(&self, account: AccountId, trust: i64) -> Result<(), Error> {
        self.contact(account)?;
        let keys = self.identity_keys(account)?;
        self.connection.execute(
            "UPDATE contacts SET trust = ?2, fingerprint = ?3 WHERE account = ?1",
            params![account, trust, safety::fingerprint(account, &keys)],
        )?;
        // What was held may go.
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }
}
