//! The state that cryptography and ordering need, as keys and values, and a transaction over it.

use std::cell::RefCell;
use std::collections::BTreeMap;

use zeroize::Zeroizing;

use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId};

/// What a storage failure looks like to the core. Retrying may help; the transaction is lost either way.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the client's storage failed: {0}")]
pub struct StorageError(pub String);

/// A key of the core's state. Values are bytes whose meaning stands at each key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum StateKey {
    /// This device's identity key pair, as libsignal serializes it.
    OwnIdentity,
    /// This device's registration id: 2 bytes, big endian.
    OwnRegistration,
    /// This device's address, once it is registered: account (16 bytes), then device (1 byte).
    OwnAddress,
    /// The highest seq that was processed: 8 bytes, big endian.
    Cursor,
    /// A session with a device: libsignal's session record.
    Session(DeviceAddr),
    /// The identity key a device was last seen with: 33 bytes.
    RemoteIdentity(DeviceAddr),
    /// A one-time EC prekey: libsignal's record.
    PreKey(u32),
    /// A signed EC prekey: libsignal's record.
    SignedPreKey(u32),
    /// A one-time Kyber prekey: libsignal's record.
    KyberPreKey(u32),
    /// A last-resort Kyber prekey: libsignal's record.
    KyberLastResort(u32),
    /// A first message already used this last-resort key with this signed prekey and base key: empty. Refuses replays.
    KyberUsed {
        /// The last-resort key.
        kyber: u32,
        /// The signed prekey.
        signed: u32,
        /// The sender's base key: 33 bytes.
        base_key: Vec<u8>,
    },
    /// A message that was received: empty. Keeps copies of it from being shown again.
    Seen {
        /// Who wrote it.
        author: AccountId,
        /// Its id.
        message_id: [u8; 16],
    },
    /// This device's MLS signature key pair of a cipher suite: see `groups/signer.rs`.
    GroupSigner(u16),
    /// The key of a group's name: 32 bytes.
    GroupNameKey(GroupId),
    /// What openmls keeps, as CBOR: see [`crate::mls::storage`].
    Mls {
        /// What it is.
        kind: crate::mls::storage::Kind,
        /// Its key: CBOR of openmls's keys, one after the other.
        key: Vec<u8>,
    },
}

/// Where state rests. Reads see the last commit; on a database, the transaction that is open.
pub trait StateRead {
    /// The value at a key.
    fn get(&self, key: &StateKey) -> Result<Option<Zeroizing<Vec<u8>>>, StorageError>;
}

/// Something a transaction learned about another device's identity key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IdentityNews {
    /// The device was never seen before.
    New(DeviceAddr),
    /// The device has another identity key than before.
    Changed(DeviceAddr),
}

/// One transaction: reads go through to storage, writes stay here until their owner commits them.
/// Dropping it leaves storage as it was: that is what makes a crash at any point harmless.
pub struct StateTx<'s> {
    storage: &'s dyn StateRead,
    writes: RefCell<BTreeMap<StateKey, Option<Zeroizing<Vec<u8>>>>>,
    news: RefCell<Vec<IdentityNews>>,
}

/// What a transaction wants written: a value, or the key's removal.
pub type Writes = BTreeMap<StateKey, Option<Zeroizing<Vec<u8>>>>;

impl<'s> StateTx<'s> {
    /// Begins over this storage.
    pub fn new(storage: &'s dyn StateRead) -> Self {
        Self { storage, writes: RefCell::default(), news: RefCell::default() }
    }

    /// The value at a key, as this transaction sees it.
    pub fn get(&self, key: &StateKey) -> Result<Option<Zeroizing<Vec<u8>>>, StorageError> {
        match self.writes.borrow().get(key) {
            Some(value) => Ok(value.clone()),
            None => self.storage.get(key),
        }
    }

    /// Sets a value.
    pub fn put(&self, key: StateKey, value: Vec<u8>) {
        self.writes.borrow_mut().insert(key, Some(Zeroizing::new(value)));
    }

    /// Removes a key.
    pub fn delete(&self, key: StateKey) {
        self.writes.borrow_mut().insert(key, None);
    }

    /// Notes something about an identity key; its owner tells the person.
    pub(super) fn note(&self, news: IdentityNews) {
        self.news.borrow_mut().push(news);
    }

    /// Ends the transaction: what to commit, and what was learned.
    pub fn finish(self) -> (Writes, Vec<IdentityNews>) {
        (self.writes.into_inner(), self.news.into_inner())
    }

    /// This device's own address; `None` before registration.
    pub fn own_address(&self) -> Result<Option<DeviceAddr>, StorageError> {
        self.get(&StateKey::OwnAddress)?.map(|bytes| decode_address(&bytes)).transpose()
    }
}

/// The bytes of an address: account, then device.
pub fn encode_address(address: DeviceAddr) -> Vec<u8> {
    let mut bytes = address.account.as_bytes().to_vec();
    bytes.push(address.device.get());
    bytes
}

/// The address in these bytes.
pub fn decode_address(bytes: &[u8]) -> Result<DeviceAddr, StorageError> {
    let damaged = || StorageError("a stored device address is damaged".into());
    let (account, device) = bytes.split_at_checked(16).ok_or_else(damaged)?;
    let [device] = device else { return Err(damaged()) };
    let account = AccountId::from_slice(account).map_err(|_| damaged())?;
    Ok(DeviceAddr { account, device: DeviceId::new(u32::from(*device)).map_err(|_| damaged())? })
}

/// State in memory: for tests, and for platforms that persist it themselves.
#[derive(Clone, Default)]
pub struct MemoryState(BTreeMap<StateKey, Zeroizing<Vec<u8>>>);

impl MemoryState {
    /// Applies a transaction's writes.
    pub fn commit(&mut self, writes: Writes) {
        for (key, value) in writes {
            match value {
                Some(value) => self.0.insert(key, value),
                None => self.0.remove(&key),
            };
        }
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl StateRead for MemoryState {
    fn get(&self, key: &StateKey) -> Result<Option<Zeroizing<Vec<u8>>>, StorageError> {
        Ok(self.0.get(key).cloned())
    }
}
