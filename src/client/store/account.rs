//! This device's own account: registration, credential, keys.

use rusqlite::params;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{Db, Error, sql};
use crate::client::core::api::{B64, OwnAccount, PeerDevice, Registered, UploadKeys};
use crate::client::core::state::{StateKey, StateRead as _, encode_address};
use crate::client::core::{inbox, keys};
use crate::client::types::Event;
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, Identity, RegistrationId, Seq};
use crate::limits;

/// What a device needs to speak to its server.
#[derive(Clone)]
pub(in crate::client) struct Credential {
    /// Who it is.
    pub address: DeviceAddr,
    /// Where.
    pub server: String,
    /// The secret.
    pub secret: Zeroizing<String>,
}

/// What a device says when it registers. Kept as it is until the server has answered, so that it can be said again.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
pub(in crate::client) struct OwnKeys {
    /// To whom: another server must not learn the secret, nor see that it is the same device.
    server: String,
    pub registration_id: RegistrationId,
    pub credential_secret: B64,
    pub identity_key: B64,
    pub upload: UploadKeys,
}

/// Where that is kept.
const REGISTRATION: &str = "registration";
/// Where it is kept with which client message id this device begins.
pub(super) const FIRST_MESSAGE_ID: &str = "first_message_id";

/// Accepted messages are kept for receipts as long as receipts may come.
const OUTGOING_KEPT_MS: u64 = limits::ENVELOPE_TTL_MS + 24 * 3600 * 1000;
/// Ids of messages are remembered as long as a copy may be under way: the server keeps it 30 days, its sender may send it again.
const SEEN_KEPT_MS: u64 = 3 * limits::ENVELOPE_TTL_MS;

impl Db {
    /// Makes this device's keys, once; a registration that failed is tried again with the same ones.
    pub(in crate::client) fn begin_registration(&self, server: &str) -> Result<OwnKeys, Error> {
        if sql::meta(&self.connection, "own_address")?.is_some() {
            return Err(Error::HasAccount);
        }
        if let Some(kept) = sql::meta(&self.connection, REGISTRATION)?.map(Zeroizing::new) {
            let kept: OwnKeys = serde_json::from_slice(&kept).map_err(|error| Error::Damaged(format!("the registration: {error}")))?;
            if kept.server == server {
                return Ok(kept);
            }
        }
        // Of a registration at another server, which was never answered.
        self.connection.execute_batch("DELETE FROM prekeys; DELETE FROM signed_prekeys; DELETE FROM kyber_prekeys;")?;
        let random = self.random.clone();
        let device = self.core(|tx| Ok::<_, Error>(keys::generate_device(tx, &*random)))?;
        let mut upload = self.make_keys(limits::PREKEYS_PER_UPLOAD, limits::PREKEYS_PER_UPLOAD, false)?;
        let signed = self.make_keys(0, 0, true)?;
        upload.signed_prekey = signed.signed_prekey;
        upload.pq_last_resort_prekey = signed.pq_last_resort_prekey;
        let mut secret = vec![0; 32];
        self.random.fill(&mut secret);
        let own = OwnKeys {
            server: server.to_owned(),
            registration_id: device.registration_id,
            credential_secret: secret.into(),
            identity_key: device.identity_key.into(),
            upload,
        };
        let kept = serde_json::to_vec(&own).map_err(|error| Error::Damaged(error.to_string()))?;
        sql::set_meta(&self.connection, REGISTRATION, &Zeroizing::new(kept))?;
        Ok(own)
    }

    /// The server took the device in.
    pub(in crate::client) fn finish_registration(&self, server: &str, registered: &Registered) -> Result<(), Error> {
        let address = DeviceAddr { account: registered.account_id, device: registered.device_id };
        self.core(|tx| {
            tx.put(StateKey::OwnAddress, encode_address(address));
            Ok::<_, Error>(())
        })?;
        sql::set_meta(&self.connection, "server", server.as_bytes())?;
        sql::set_meta(&self.connection, "credential", registered.credential.as_bytes())?;
        sql::set_meta_number(&self.connection, FIRST_MESSAGE_ID, registered.first_message_id)?;
        sql::remove_meta(&self.connection, REGISTRATION)?;
        self.contact(address.account)?;
        self.set_own_identities(&registered.identities)?;
        self.keys_rotated()
    }

    /// The credential; `None` before registration.
    pub(in crate::client) fn credential(&self) -> Result<Option<Credential>, Error> {
        let text = |bytes: Option<Vec<u8>>| bytes.and_then(|bytes| String::from_utf8(bytes).ok());
        let server = text(sql::meta(&self.connection, "server")?);
        let secret = text(sql::meta(&self.connection, "credential")?).map(Zeroizing::new);
        let Some((server, secret)) = server.zip(secret) else { return Ok(None) };
        Ok(Some(Credential { address: self.own()?, server, secret }))
    }

    /// This device's address.
    pub(in crate::client) fn own(&self) -> Result<DeviceAddr, Error> {
        let bytes = sql::meta(&self.connection, "own_address")?.ok_or(Error::NoAccount)?;
        Ok(crate::client::core::state::decode_address(&bytes)?)
    }

    /// Up to where the inbox was processed.
    pub(in crate::client) fn cursor(&self) -> Result<Seq, Error> {
        Ok(inbox::cursor(&super::state::SqlState(&self.connection))?)
    }

    /// The identities linked to this account, in order.
    pub(in crate::client) fn own_identities(&self) -> Result<Vec<Identity>, Error> {
        let mut select = self.connection.prepare_cached("SELECT identity FROM own_identities ORDER BY identity")?;
        let texts: Vec<String> = select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        Ok(texts.iter().filter_map(|text| text.parse().ok()).collect())
    }

    fn set_own_identities(&self, identities: &[Identity]) -> Result<(), Error> {
        self.connection.execute("DELETE FROM own_identities", [])?;
        let account = self.own()?.account;
        for identity in identities {
            self.connection.execute("INSERT OR IGNORE INTO own_identities VALUES (?1)", [identity.to_string()])?;
            self.link(identity, account)?;
        }
        Ok(())
    }

    /// The identity this device writes under.
    pub(super) fn writes_as(&self) -> Result<Option<Identity>, Error> {
        if let Some(chosen) = sql::meta(&self.connection, "writes_as")? {
            let identity = String::from_utf8(chosen).ok().and_then(|text| text.parse().ok());
            if let Some(identity) = identity.filter(|identity| self.own_identities().is_ok_and(|own| own.contains(identity))) {
                return Ok(Some(identity));
            }
        }
        Ok(self.own_identities()?.into_iter().next())
    }

    /// Chooses the identity this device writes under.
    pub(in crate::client) fn set_writes_as(&self, identity: &Identity) -> Result<(), Error> {
        Ok(sql::set_meta(&self.connection, "writes_as", identity.to_string().as_bytes())?)
    }

    /// What the server says about this account.
    pub(in crate::client) fn own_account(&self, account: &OwnAccount) -> Result<(), Error> {
        let own = self.own()?;
        let before = (self.devices(own.account)?, self.own_identities()?);
        let others = account.devices.iter().filter(|device| device.device_id != own.device).map(|device| PeerDevice {
            device_id: device.device_id,
            registration_id: device.registration_id,
            identity_key: device.identity_key.clone(),
        });
        let known = self.devices_known(own.account)?;
        self.set_devices(own.account, &others.collect::<Vec<_>>())?;
        self.set_own_identities(&account.identities)?;
        if known && before != (self.devices(own.account)?, self.own_identities()?) {
            self.tell(&Event::OwnAccountChanged)?;
            self.own_devices_changed()?;
        }
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }

    /// Identity keys of this account's devices, this one included.
    pub(super) fn own_identity_keys(&self, account: AccountId) -> Result<Vec<Vec<u8>>, Error> {
        let mut keys = self.identity_keys(account)?;
        let own = super::state::SqlState(&self.connection).get(&StateKey::OwnIdentity)?.ok_or(Error::NoAccount)?;
        let pair = libsignal_protocol::IdentityKeyPair::try_from(own.as_slice()).map_err(|error| Error::Damaged(error.to_string()))?;
        keys.push(pair.identity_key().serialize().into_vec());
        Ok(keys)
    }

    /// Makes keys to upload: one-time ones, and new signed ones if `rotate`. Private halves are kept from now on, so that it does
    /// not matter whether the upload's answer arrives.
    pub(in crate::client) fn make_keys(&self, ec: usize, pq: usize, rotate: bool) -> Result<UploadKeys, Error> {
        let (now, random) = (self.now(), self.random.clone());
        let first_ec = self.take_ids("last_ec_prekey", ec)?;
        let first_pq = self.take_ids("last_pq_prekey", pq + usize::from(rotate))?;
        let mut upload = self.core(|tx| keys::one_time(tx, (first_ec, ec), (first_pq, pq), now, &*random))?;
        if rotate {
            let signed_id = self.take_ids("last_signed_prekey", 1)?;
            let kyber_id = first_pq + pq as u32;
            let rotated = self.core(|tx| keys::rotate(tx, signed_id, kyber_id, now, &*random))?;
            upload.signed_prekey = rotated.signed_prekey;
            upload.pq_last_resort_prekey = rotated.pq_last_resort_prekey;
        }
        Ok(upload)
    }

    /// Takes that many numbers for keys; the first of them. A number is never used for two keys.
    fn take_ids(&self, counter: &str, count: usize) -> Result<u32, Error> {
        let last = sql::meta_number(&self.connection, counter)?;
        sql::set_meta_number(&self.connection, counter, last + count as u64)?;
        u32::try_from(last + 1).map_err(|_| Error::Damaged("no key numbers are left".into()))
    }

    /// Whether the signed prekeys are due.
    pub(in crate::client) fn rotation_due(&self) -> Result<bool, Error> {
        let last = sql::meta_number(&self.connection, "rotated_ms")?;
        Ok(keys::rotation_due(UnixMillis(last), self.now()))
    }

    /// The server has the new signed prekeys.
    pub(in crate::client) fn keys_rotated(&self) -> Result<(), Error> {
        Ok(sql::set_meta_number(&self.connection, "rotated_ms", self.now().0)?)
    }

    /// The server does not know this device any more.
    pub(in crate::client) fn sign_out(&self) -> Result<(), Error> {
        if !self.signed_out()? {
            sql::set_meta_number(&self.connection, "signed_out", 1)?;
            self.tell(&Event::SignedOut)?;
        }
        Ok(())
    }

    /// Whether that happened.
    pub(in crate::client) fn signed_out(&self) -> Result<bool, Error> {
        Ok(sql::meta_number(&self.connection, "signed_out")? == 1)
    }

    /// Forgets what is not needed any more: retired private keys, old ids, answered messages.
    pub(in crate::client) fn prune(&self) -> Result<(), Error> {
        let before = |kept: u64| sql::int(self.now().0.saturating_sub(kept));
        // Keys are retired when a newer one is made; the newest stays however old it is.
        let retired = before(keys::RETIRED_KEPT_MS + keys::ROTATION_MS);
        self.connection
            .execute("DELETE FROM signed_prekeys WHERE created_ms < ?1 AND id < (SELECT max(id) FROM signed_prekeys)", [retired])?;
        self.connection.execute(
            "DELETE FROM kyber_prekeys WHERE last_resort = 1 AND created_ms < ?1
             AND id < (SELECT max(id) FROM kyber_prekeys WHERE last_resort = 1)",
            [retired],
        )?;
        self.connection.execute("DELETE FROM kyber_used WHERE kyber NOT IN (SELECT id FROM kyber_prekeys)", [])?;
        self.connection.execute("DELETE FROM seen WHERE seen_ms < ?1", [before(SEEN_KEPT_MS)])?;
        self.connection.execute("DELETE FROM outgoing WHERE state = 2 AND created_ms < ?1", params![before(OUTGOING_KEPT_MS)])?;
        Ok(())
    }
}
