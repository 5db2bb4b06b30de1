//! libsignal over a [`StateTx`]: its store traits, and the few operations the SDK needs, as plain functions.
//! The traits are async, but nothing here waits for anything, so each future is ready at its first poll.

use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use libsignal_protocol::{
    self as signal, CiphertextMessage, CiphertextMessageType, Direction, GenericSignedPreKey as _, IdentityChange, IdentityKey,
    IdentityKeyPair, IdentityKeyStore, KyberPreKeyId, KyberPreKeyRecord, KyberPreKeyStore, PreKeyBundle, PreKeyId, PreKeyRecord,
    PreKeySignalMessage, PreKeyStore, ProtocolAddress, PublicKey, SessionRecord, SessionStore, SignalMessage, SignalProtocolError,
    SignedPreKeyId, SignedPreKeyRecord, SignedPreKeyStore,
};
use zeroize::Zeroizing;

use super::state::{IdentityNews, StateKey, StateTx, StorageError};
use crate::clock::{Random, UnixMillis};
use crate::ids::{DeviceAddr, DeviceId, RegistrationId};
use crate::limits;

/// Why a session operation did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no session to encrypt with: fetch the device's key bundle first.
    #[error("there is no session with the device")]
    NoSession,
    /// The message was decrypted before: drop it, nothing is wrong.
    #[error("the message was decrypted before")]
    Duplicate,
    /// The message can't be decrypted, now or later: repair the session.
    #[error("the message can't be decrypted: {0}")]
    Undecryptable(String),
    /// A key bundle whose signatures or keys are wrong. The directory lies or is damaged; never use it.
    #[error("the device's keys are not valid: {0}")]
    BadBundle(String),
    /// The ciphertext would be larger than an envelope may be.
    #[error("the message is too large for an envelope")]
    TooLarge,
    /// See there.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// An encrypted message for one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ciphertext {
    /// Its type on the wire: 2 (`WHISPER`) or 3 (`PREKEY`).
    pub kind: u8,
    /// The registration id of the installation it was encrypted for.
    pub registration_id: RegistrationId,
    /// The serialized libsignal message.
    pub bytes: Vec<u8>,
}

/// The keys of a device, as its directory entry gives them; unchecked.
#[derive(Debug, Clone)]
pub struct Bundle {
    /// The device's number.
    pub device: DeviceId,
    /// Its installation.
    pub registration_id: RegistrationId,
    /// Its identity key, 33 bytes.
    pub identity_key: Vec<u8>,
    /// Its signed prekey: id, key, signature.
    pub signed_prekey: (u32, Vec<u8>, Vec<u8>),
    /// A Kyber prekey: id, key, signature.
    pub kyber_prekey: (u32, Vec<u8>, Vec<u8>),
    /// A one-time EC prekey, if one was left: id, key.
    pub one_time_prekey: Option<(u32, Vec<u8>)>,
}

/// Randomness for libsignal from a [`Random`].
pub struct Rng<'r>(pub &'r dyn Random);

impl rand::RngCore for Rng<'_> {
    fn next_u32(&mut self) -> u32 {
        let mut bytes = [0; 4];
        self.0.fill(&mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn next_u64(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.fill(&mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn fill_bytes(&mut self, buffer: &mut [u8]) {
        self.0.fill(buffer);
    }
}

impl rand::CryptoRng for Rng<'_> {}

/// Encrypts for a device that there is a session with.
pub fn encrypt(tx: &StateTx<'_>, to: DeviceAddr, plaintext: &[u8], now: UnixMillis, random: &dyn Random) -> Result<Ciphertext, Error> {
    let address = protocol_address(to);
    let (mut sessions, mut identities) = (Stores(tx), Stores(tx));
    let message = ready(signal::message_encrypt(plaintext, &address, &mut sessions, &mut identities, time(now), &mut Rng(random)))
        .map_err(|error| if matches!(error, SignalProtocolError::SessionNotFound(_)) { Error::NoSession } else { undecryptable(error) })?;
    let kind = match message.message_type() {
        CiphertextMessageType::PreKey => 3,
        _ => 2,
    };
    if message.serialize().len() > limits::ENVELOPE_BYTES {
        return Err(Error::TooLarge);
    }
    let registration_id = session(tx, to)?.and_then(|session| remote_registration(&session)).ok_or(Error::NoSession)?;
    Ok(Ciphertext { kind, registration_id, bytes: message.serialize().to_vec() })
}

/// Decrypts a message of a device. After an error the transaction must be dropped.
pub fn decrypt(tx: &StateTx<'_>, from: DeviceAddr, kind: u8, content: &[u8], random: &dyn Random) -> Result<Zeroizing<Vec<u8>>, Error> {
    let message = match kind {
        2 => CiphertextMessage::SignalMessage(SignalMessage::try_from(content).map_err(undecryptable)?),
        3 => CiphertextMessage::PreKeySignalMessage(PreKeySignalMessage::try_from(content).map_err(undecryptable)?),
        other => return Err(Error::Undecryptable(format!("unknown envelope type {other}"))),
    };
    let address = protocol_address(from);
    let (mut sessions, mut identities, mut prekeys, mut kyber) = (Stores(tx), Stores(tx), Stores(tx), Stores(tx));
    let signed = Stores(tx);
    let plaintext = ready(signal::message_decrypt(
        &message,
        &address,
        &mut sessions,
        &mut identities,
        &mut prekeys,
        &signed,
        &mut kyber,
        &mut Rng(random),
    ));
    plaintext.map(Zeroizing::new).map_err(|error| match error {
        SignalProtocolError::DuplicatedMessage(..) => Error::Duplicate,
        other => undecryptable(other),
    })
}

/// Begins a session from a device's keys, after checking every signature. A session that was there is archived, so that
/// what is still on its way under it can be decrypted.
pub fn begin_session(tx: &StateTx<'_>, to: DeviceAddr, bundle: &Bundle, now: UnixMillis, random: &dyn Random) -> Result<(), Error> {
    let bundle = libsignal_bundle(bundle).map_err(|error| Error::BadBundle(error.to_string()))?;
    let address = protocol_address(to);
    let (mut sessions, mut identities) = (Stores(tx), Stores(tx));
    ready(signal::process_prekey_bundle(&address, &mut sessions, &mut identities, &bundle, time(now), &mut Rng(random)))
        .map_err(|error| storage_or(error, |error| Error::BadBundle(error.to_string())))
}

/// Whether there is a session to encrypt with, and for which installation.
pub fn usable_session(tx: &StateTx<'_>, with: DeviceAddr, now: UnixMillis) -> Result<Option<RegistrationId>, Error> {
    let Some(session) = session(tx, with)? else { return Ok(None) };
    let usable = session.has_usable_sender_chain(time(now), signal::SessionUsabilityRequirements::all()).map_err(undecryptable)?;
    Ok(if usable { remote_registration(&session) } else { None })
}

/// Stops encrypting with the session there is; it can still decrypt what is on its way.
pub fn archive_session(tx: &StateTx<'_>, with: DeviceAddr) -> Result<(), Error> {
    if let Some(mut session) = session(tx, with)? {
        session.archive_current_state().map_err(undecryptable)?;
        tx.put(StateKey::Session(with), session.serialize().map_err(undecryptable)?);
    }
    Ok(())
}

/// Learns a device's identity key from the directory. If it is another one than before, the session is archived.
pub fn learn_identity(tx: &StateTx<'_>, of: DeviceAddr, key: &[u8]) -> Result<(), Error> {
    let key = IdentityKey::decode(key).map_err(|error| Error::BadBundle(error.to_string()))?;
    match Stores(tx).remember_identity(of, &key).map_err(undecryptable)? {
        // Another installation: the session there is can't reach it, and using it would bring the old key back.
        IdentityChange::ReplacedExisting => archive_session(tx, of),
        IdentityChange::NewOrUnchanged => Ok(()),
    }
}

fn session(tx: &StateTx<'_>, with: DeviceAddr) -> Result<Option<SessionRecord>, Error> {
    let bytes = tx.get(&StateKey::Session(with))?;
    bytes.map(|bytes| SessionRecord::deserialize(&bytes)).transpose().map_err(undecryptable)
}

fn remote_registration(session: &SessionRecord) -> Option<RegistrationId> {
    session.remote_registration_id().ok().and_then(|id| RegistrationId::new(id).ok())
}

fn libsignal_bundle(bundle: &Bundle) -> Result<PreKeyBundle, SignalProtocolError> {
    let (signed_id, signed_key, signed_signature) = &bundle.signed_prekey;
    let (kyber_id, kyber_key, kyber_signature) = &bundle.kyber_prekey;
    let one_time = bundle.one_time_prekey.as_ref().map(|(id, key)| Ok::<_, SignalProtocolError>((PreKeyId::from(*id), public(key)?)));
    PreKeyBundle::new(
        bundle.registration_id.get(),
        libsignal_device(bundle.device),
        one_time.transpose()?,
        SignedPreKeyId::from(*signed_id),
        public(signed_key)?,
        signed_signature.clone(),
        KyberPreKeyId::from(*kyber_id),
        signal::kem::PublicKey::deserialize(kyber_key)?,
        kyber_signature.clone(),
        IdentityKey::decode(&bundle.identity_key)?,
    )
}

fn public(bytes: &[u8]) -> Result<PublicKey, SignalProtocolError> {
    Ok(PublicKey::deserialize(bytes)?)
}

fn libsignal_device(device: DeviceId) -> signal::DeviceId {
    signal::DeviceId::new(device.get()).expect("both know 1 to 127")
}

fn protocol_address(address: DeviceAddr) -> ProtocolAddress {
    ProtocolAddress::new(address.account.to_string(), libsignal_device(address.device))
}

fn device_address(address: &ProtocolAddress) -> Result<DeviceAddr, SignalProtocolError> {
    let invalid = || SignalProtocolError::InvalidArgument("not a Sealpost address".into());
    let account = address.name().parse().map_err(|_| invalid())?;
    Ok(DeviceAddr { account, device: DeviceId::new(u32::from(u8::from(address.device_id()))).map_err(|_| invalid())? })
}

fn time(now: UnixMillis) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(now.0)
}

fn ready<T>(future: impl Future<Output = T>) -> T {
    future.now_or_never().expect("the stores are in memory, so libsignal never waits")
}

const STORAGE: &str = "storage";

fn storage_or(error: SignalProtocolError, otherwise: impl FnOnce(SignalProtocolError) -> Error) -> Error {
    match error {
        SignalProtocolError::ApplicationCallbackError(STORAGE, source) => Error::Storage(StorageError(source.to_string())),
        other => otherwise(other),
    }
}

/// A storage failure must never look like a broken message: the message would be given up.
fn undecryptable(error: SignalProtocolError) -> Error {
    storage_or(error, |error| Error::Undecryptable(error.to_string()))
}

/// libsignal's stores. It asks for several at once, each mutably, so this is a handle that may be many.
struct Stores<'t, 's>(&'t StateTx<'s>);

impl Stores<'_, '_> {
    fn read(&self, key: &StateKey) -> Result<Option<Zeroizing<Vec<u8>>>, SignalProtocolError> {
        self.0.get(key).map_err(SignalProtocolError::for_application_callback(STORAGE))
    }

    fn remember_identity(&self, of: DeviceAddr, key: &IdentityKey) -> Result<IdentityChange, SignalProtocolError> {
        let key = key.serialize();
        let known = self.read(&StateKey::RemoteIdentity(of))?;
        if known.as_ref().is_some_and(|known| known.as_slice() == &*key) {
            return Ok(IdentityChange::NewOrUnchanged);
        }
        self.0.put(StateKey::RemoteIdentity(of), key.into_vec());
        self.0.note(if known.is_some() { IdentityNews::Changed(of) } else { IdentityNews::New(of) });
        Ok(IdentityChange::from_changed(known.is_some()))
    }
}

#[async_trait(?Send)]
impl IdentityKeyStore for Stores<'_, '_> {
    async fn get_identity_key_pair(&self) -> Result<IdentityKeyPair, SignalProtocolError> {
        let bytes = self.read(&StateKey::OwnIdentity)?.ok_or_else(|| missing("identity key"))?;
        IdentityKeyPair::try_from(bytes.as_slice())
    }

    async fn get_local_registration_id(&self) -> Result<u32, SignalProtocolError> {
        let bytes = self.read(&StateKey::OwnRegistration)?.ok_or_else(|| missing("registration id"))?;
        let bytes: [u8; 2] = bytes.as_slice().try_into().map_err(|_| missing("registration id"))?;
        Ok(u32::from(u16::from_be_bytes(bytes)))
    }

    async fn save_identity(&mut self, address: &ProtocolAddress, identity: &IdentityKey) -> Result<IdentityChange, SignalProtocolError> {
        self.remember_identity(device_address(address)?, identity)
    }

    /// Always: a changed key is told to the person, and stops sending to contacts that were verified, a level above.
    async fn is_trusted_identity(&self, _: &ProtocolAddress, _: &IdentityKey, _: Direction) -> Result<bool, SignalProtocolError> {
        Ok(true)
    }

    async fn get_identity(&self, address: &ProtocolAddress) -> Result<Option<IdentityKey>, SignalProtocolError> {
        let bytes = self.read(&StateKey::RemoteIdentity(device_address(address)?))?;
        bytes.map(|bytes| IdentityKey::decode(&bytes)).transpose()
    }
}

fn missing(what: &str) -> SignalProtocolError {
    SignalProtocolError::InvalidState("state", format!("this device has no {what}"))
}

#[async_trait(?Send)]
impl SessionStore for Stores<'_, '_> {
    async fn load_session(&self, address: &ProtocolAddress) -> Result<Option<SessionRecord>, SignalProtocolError> {
        let bytes = self.read(&StateKey::Session(device_address(address)?))?;
        bytes.map(|bytes| SessionRecord::deserialize(&bytes)).transpose()
    }

    async fn store_session(&mut self, address: &ProtocolAddress, record: &SessionRecord) -> Result<(), SignalProtocolError> {
        self.0.put(StateKey::Session(device_address(address)?), record.serialize()?);
        Ok(())
    }
}

#[async_trait(?Send)]
impl PreKeyStore for Stores<'_, '_> {
    async fn get_pre_key(&self, id: PreKeyId) -> Result<PreKeyRecord, SignalProtocolError> {
        let bytes = self.read(&StateKey::PreKey(id.into()))?.ok_or(SignalProtocolError::InvalidPreKeyId)?;
        PreKeyRecord::deserialize(&bytes)
    }

    async fn save_pre_key(&mut self, id: PreKeyId, record: &PreKeyRecord) -> Result<(), SignalProtocolError> {
        self.0.put(StateKey::PreKey(id.into()), record.serialize()?);
        Ok(())
    }

    async fn remove_pre_key(&mut self, id: PreKeyId) -> Result<(), SignalProtocolError> {
        self.0.delete(StateKey::PreKey(id.into()));
        Ok(())
    }
}

#[async_trait(?Send)]
impl SignedPreKeyStore for Stores<'_, '_> {
    async fn get_signed_pre_key(&self, id: SignedPreKeyId) -> Result<SignedPreKeyRecord, SignalProtocolError> {
        let bytes = self.read(&StateKey::SignedPreKey(id.into()))?.ok_or(SignalProtocolError::InvalidSignedPreKeyId)?;
        SignedPreKeyRecord::deserialize(&bytes)
    }

    async fn save_signed_pre_key(&mut self, id: SignedPreKeyId, record: &SignedPreKeyRecord) -> Result<(), SignalProtocolError> {
        self.0.put(StateKey::SignedPreKey(id.into()), record.serialize()?);
        Ok(())
    }
}

#[async_trait(?Send)]
impl KyberPreKeyStore for Stores<'_, '_> {
    async fn get_kyber_pre_key(&self, id: KyberPreKeyId) -> Result<KyberPreKeyRecord, SignalProtocolError> {
        let number = id.into();
        let bytes = match self.read(&StateKey::KyberPreKey(number))? {
            Some(bytes) => bytes,
            None => self.read(&StateKey::KyberLastResort(number))?.ok_or(SignalProtocolError::InvalidKyberPreKeyId)?,
        };
        KyberPreKeyRecord::deserialize(&bytes)
    }

    async fn save_kyber_pre_key(&mut self, id: KyberPreKeyId, record: &KyberPreKeyRecord) -> Result<(), SignalProtocolError> {
        self.0.put(StateKey::KyberPreKey(id.into()), record.serialize()?);
        Ok(())
    }

    async fn mark_kyber_pre_key_used(
        &mut self,
        id: KyberPreKeyId,
        signed: SignedPreKeyId,
        base_key: &PublicKey,
    ) -> Result<(), SignalProtocolError> {
        let kyber: u32 = id.into();
        if self.read(&StateKey::KyberPreKey(kyber))?.is_some() {
            self.0.delete(StateKey::KyberPreKey(kyber));
            return Ok(());
        }
        // A last-resort key stays; the same first message must not begin a session twice.
        let used = StateKey::KyberUsed { kyber, signed: signed.into(), base_key: base_key.serialize().into_vec() };
        if self.read(&used)?.is_some() {
            return Err(SignalProtocolError::InvalidMessage(CiphertextMessageType::PreKey, "reused base key"));
        }
        self.0.put(used, Vec::new());
        Ok(())
    }
}
