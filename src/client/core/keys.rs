//! A device's keys: what it generates, what it publishes, and when it rotates.

use libsignal_protocol::{
    GenericSignedPreKey as _, IdentityKeyPair, KeyPair, KyberPreKeyId, KyberPreKeyRecord, PreKeyId, PreKeyRecord, PrivateKey,
    SignalProtocolError, SignedPreKeyId, SignedPreKeyRecord, Timestamp, kem,
};
use rand::RngCore as _;

use super::api::{PublicKeyJson, SignedKeyJson, UploadKeys};
use super::signal::Rng;
use super::state::{StateKey, StateTx, StorageError};
use crate::clock::{Random, UnixMillis};
use crate::ids::RegistrationId;
use crate::limits;

/// How often the signed prekey and the last-resort Kyber prekey are replaced: weekly.
pub const ROTATION_MS: u64 = 7 * 24 * 3600 * 1000;
/// How long replaced private keys are kept: as long as a first message may wait in the inbox, and a little more.
pub const RETIRED_KEPT_MS: u64 = limits::ENVELOPE_TTL_MS + 24 * 3600 * 1000;

/// Keys can't be made. Only a damaged state leads here.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This device has no identity key, or a damaged one.
    #[error("this device's identity key is missing or damaged")]
    Identity,
    /// libsignal refused what it made itself.
    #[error("keys could not be made: {0}")]
    Signal(#[from] SignalProtocolError),
    /// See there.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// The public half of a new device.
#[derive(Debug, Clone)]
pub struct DeviceKeys {
    /// Its registration id.
    pub registration_id: RegistrationId,
    /// Its identity key, 33 bytes.
    pub identity_key: Vec<u8>,
}

/// Makes a device: identity key and registration id. Written through the transaction.
pub fn generate_device(tx: &StateTx<'_>, random: &dyn Random) -> DeviceKeys {
    let pair = IdentityKeyPair::generate(&mut Rng(random));
    let number = 1 + Rng(random).next_u32() % RegistrationId::MAX;
    tx.put(StateKey::OwnIdentity, pair.serialize().into_vec());
    tx.put(StateKey::OwnRegistration, (number as u16).to_be_bytes().to_vec());
    let registration_id = RegistrationId::new(number).expect("1 to MAX");
    DeviceKeys { registration_id, identity_key: pair.identity_key().serialize().into_vec() }
}

/// Makes a signed EC prekey and a last-resort Kyber prekey with these numbers.
pub fn rotate(tx: &StateTx<'_>, signed_id: u32, kyber_id: u32, now: UnixMillis, random: &dyn Random) -> Result<UploadKeys, Error> {
    let identity = own_identity(tx)?;
    let (signed, upload) = signed_prekey(signed_id, &identity, now, random)?;
    tx.put(StateKey::SignedPreKey(signed_id), signed.serialize()?);
    let (kyber, kyber_upload) = kyber_prekey(kyber_id, &identity, now, random)?;
    tx.put(StateKey::KyberLastResort(kyber_id), kyber.serialize()?);
    Ok(UploadKeys { signed_prekey: Some(upload), pq_last_resort_prekey: Some(kyber_upload), ..UploadKeys::default() })
}

/// Makes `ec` and `pq` one-time prekeys, numbered on from these ids; each count is capped at one upload.
pub fn one_time(
    tx: &StateTx<'_>,
    (first_ec, ec): (u32, usize),
    (first_pq, pq): (u32, usize),
    now: UnixMillis,
    random: &dyn Random,
) -> Result<UploadKeys, Error> {
    let identity = own_identity(tx)?;
    let mut upload = UploadKeys::default();
    for id in (first_ec..).take(ec.min(limits::PREKEYS_PER_UPLOAD)) {
        let pair = KeyPair::generate(&mut Rng(random));
        tx.put(StateKey::PreKey(id), PreKeyRecord::new(PreKeyId::from(id), &pair).serialize()?);
        upload.one_time_prekeys.push(PublicKeyJson { id, public_key: pair.public_key.serialize().into_vec().into() });
    }
    for id in (first_pq..).take(pq.min(limits::PREKEYS_PER_UPLOAD)) {
        let (record, public) = kyber_prekey(id, &identity, now, random)?;
        tx.put(StateKey::KyberPreKey(id), record.serialize()?);
        upload.pq_one_time_prekeys.push(public);
    }
    Ok(upload)
}

/// Whether the signed prekeys are due for replacement.
pub fn rotation_due(last: UnixMillis, now: UnixMillis) -> bool {
    // A clock that was wrong and jumped back must not stop rotation for ever.
    now.since(last) >= ROTATION_MS || last.since(now) >= ROTATION_MS
}

/// How many one-time prekeys to make when the server still has `left`: none while enough are there.
pub fn refill(left: usize) -> usize {
    if left < limits::PREKEYS_LOW_WATER { limits::PREKEYS_PER_UPLOAD } else { 0 }
}

fn own_identity(tx: &StateTx<'_>) -> Result<IdentityKeyPair, Error> {
    let bytes = tx.get(&StateKey::OwnIdentity)?.ok_or(Error::Identity)?;
    IdentityKeyPair::try_from(bytes.as_slice()).map_err(|_| Error::Identity)
}

fn signed_prekey(
    id: u32,
    identity: &IdentityKeyPair,
    now: UnixMillis,
    random: &dyn Random,
) -> Result<(SignedPreKeyRecord, SignedKeyJson), Error> {
    let pair = KeyPair::generate(&mut Rng(random));
    let public = pair.public_key.serialize().into_vec();
    let signature = sign(identity.private_key(), &public, random)?;
    let record = SignedPreKeyRecord::new(SignedPreKeyId::from(id), Timestamp::from_epoch_millis(now.0), &pair, &signature);
    Ok((record, SignedKeyJson { id, public_key: public.into(), signature: signature.into() }))
}

fn kyber_prekey(
    id: u32,
    identity: &IdentityKeyPair,
    now: UnixMillis,
    random: &dyn Random,
) -> Result<(KyberPreKeyRecord, SignedKeyJson), Error> {
    // Not KyberPreKeyRecord::generate: it asks the system for the time, which panics in a browser.
    let pair = kem::KeyPair::generate(kem::KeyType::Kyber1024, &mut Rng(random));
    let public = pair.public_key.serialize().into_vec();
    let signature = sign(identity.private_key(), &public, random)?;
    let record = KyberPreKeyRecord::new(KyberPreKeyId::from(id), Timestamp::from_epoch_millis(now.0), &pair, &signature);
    Ok((record, SignedKeyJson { id, public_key: public.into(), signature: signature.into() }))
}

fn sign(key: &PrivateKey, public: &[u8], random: &dyn Random) -> Result<Vec<u8>, Error> {
    Ok(key.calculate_signature(public, &mut Rng(random)).map_err(SignalProtocolError::from)?.into_vec())
}
