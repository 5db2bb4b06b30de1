//! The stores: the view of what is pending (rebuilt from the log at will) and the little state that is not in the log.
//!
//! | trait | holds | rebuilt from the log |
//! |---|---|---|
//! | [`DeliveryStore`] | pending items, inboxes, dedupe marks, applied positions of `inbox` | yes |
//! | [`DirectoryStore`] | accounts, identities, devices' long-lived prekeys, applied positions of `directory` | yes |
//! | [`groups::GroupStore`] | groups: public state, recent items, members, applied positions of `groups` | yes |
//! | [`KeyStore`] | one-time prekeys, at-rest keys, identity claims | no: it is state |
//!
//! Every method may be retried after [`StoreError::Unavailable`]: writes are idempotent, but for
//! [`KeyStore::take_one_time`], which may then have spent a key for nobody (never handed one out twice).

use async_trait::async_trait;
use bytes::Bytes;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, AttachId, ClientMessageId, DeviceAddr, EdgeId, Identity, Offset, Partition, Seq};
use crate::wire::event::{AccountRecord, ReceiptEntry, SignedKey};

pub mod compare;
#[cfg(any(test, feature = "test-util"))]
pub mod conformance;
#[cfg(feature = "cluster")]
pub mod cql;
pub mod embedded;
pub mod groups;
pub mod keyspace;
pub mod metered;
pub mod mirrored;
pub mod seal;

/// Why a store call failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// The disk or the database failed or is overloaded. Retry later; nothing was half written.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// What is stored is not what was written. Retrying never helps: `sealpost rebuild` does.
    #[error("the store is damaged ({0}); `sealpost rebuild` makes the view anew from the log")]
    Corrupt(String),
    /// A cap was reached; nothing was written.
    #[error("a cap is reached")]
    LimitReached,
}

/// Something that waits in a device's inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingItem {
    /// Its position.
    pub seq: Seq,
    /// What it is.
    pub body: PendingBody,
}

/// What waits in an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PendingBody {
    /// An envelope, its content still sealed under the account's at-rest key.
    Envelope(PendingEnvelope),
    /// What became of messages this device sent.
    Receipts(Vec<ReceiptEntry>),
}

/// An envelope and what delivery needs to know of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingEnvelope {
    /// Who sent it.
    pub sender: DeviceAddr,
    /// The sender's counter for this account.
    pub client_message_id: ClientMessageId,
    /// When it was accepted.
    pub accepted: UnixMillis,
    /// See `wire::event::flags`.
    pub flags: u8,
    /// The number of its `EnvelopeType`.
    pub kind: u8,
    /// See [`seal`].
    pub sealed: Bytes,
}

impl PendingItem {
    /// About how many bytes it costs to hold or to send.
    pub fn cost(&self) -> usize {
        64 + match &self.body {
            PendingBody::Envelope(envelope) => envelope.sealed.len(),
            PendingBody::Receipts(entries) => entries.iter().map(|e| 24 + 16 * e.ids.len()).sum(),
        }
    }
}

/// What is known of a device's inbox, apart from its items.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct InboxState {
    /// Everything up to it is acknowledged.
    pub cursor: Seq,
    /// Items in `cursor+1 ..= expired_to` expired undelivered; `ZERO` or below the cursor if none.
    pub expired_to: Seq,
    /// The edge and attachment that hold its stream, if one does.
    pub attached: Option<(EdgeId, AttachId)>,
    /// How many items are stored.
    pub items: u64,
    /// Their cost in bytes.
    pub bytes: u64,
    /// The last item that was put into it, whatever became of it since: the link that the next live item carries, so that a stream
    /// sees by itself whether one between them got lost.
    pub last: Seq,
    /// The last event that went into it: what is replayed up to there has had its effect already.
    pub applied: Seq,
}

/// What is stored for all devices together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct PendingTotals {
    /// Inboxes that there are.
    pub inboxes: u64,
    /// Those that hold something.
    pub waiting: u64,
    /// Envelopes and other items in them.
    pub items: u64,
    /// Their cost in bytes, as the cap of an inbox counts it.
    pub bytes: u64,
}

impl PendingTotals {
    /// Counts one inbox.
    pub const fn add(&mut self, inbox: &InboxState) {
        self.inboxes += 1;
        self.waiting += (inbox.items > 0) as u64;
        self.items += inbox.items;
        self.bytes += inbox.bytes;
    }
}

/// Names a dedupe mark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MarkKey {
    /// Who the messages are for.
    pub recipient: AccountId,
    /// Who sends them.
    pub sender: DeviceAddr,
}

/// Which client message ids of a pair were seen: all that is needed to drop a repeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Mark {
    /// The highest id seen; 0 if none.
    pub high: u64,
    /// Bit `n`: the id `high - n` was seen. Its width is `limits::MESSAGE_ID_WINDOW`.
    pub seen: u128,
    /// The last event that went into it, as in [`InboxState::applied`].
    pub applied: Seq,
}

/// What one flush of a coalescing window changes, with the positions that cover it. Applied in this order:
/// `remove_accounts`, `remove_devices`, `put`, `inboxes`, `drop_to`, `marks`, `positions`. A drop takes no item that is put in the same
/// write: those lie behind it.
///
/// A store that can't do all of it atomically does it in that order, positions last. What a crash in between leaves is harmless:
/// items that are there early are put again, and inboxes and marks say themselves which events they hold (`applied`).
/// Where several projectors reach one store, one that lost its partition without knowing may still write: so each row counts there as
/// written at the log position that it carries (an item at its seq, a drop at its `to`, a removal at its own seq, an inbox or mark at `applied`, a position at itself), and
/// of two writes of a row the one with the higher position stands, whenever they come. A drop beats a put at the same position.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeliveryWrite {
    /// New positions: the next record of `inbox` to apply for each partition.
    pub positions: Vec<(Partition, Offset)>,
    /// Items to add, in seq order for each device.
    pub put: Vec<(DeviceAddr, PendingItem)>,
    /// Items to drop: all of the device up to and including the seq.
    pub drop_to: Vec<(DeviceAddr, Seq)>,
    /// Inboxes as they are now.
    pub inboxes: Vec<(DeviceAddr, InboxState)>,
    /// Marks as they are now.
    pub marks: Vec<(MarkKey, Mark)>,
    /// Accounts whose inboxes, items and marks (as recipient) go, and the event that says so.
    pub remove_accounts: Vec<(AccountId, Seq)>,
    /// Devices whose inbox and items go, and the event that says so.
    pub remove_devices: Vec<(DeviceAddr, Seq)>,
}

impl DeliveryWrite {
    /// Nothing would change.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What is still undelivered. Written only by the projector.
#[async_trait]
pub trait DeliveryStore: Send + Sync + 'static {
    /// The next record of `inbox` to apply; 0 if none was.
    async fn position(&self, partition: Partition) -> Result<Offset, StoreError>;

    /// Makes all of it visible before it returns; after a failure or a crash, a part of it in the order that [`DeliveryWrite`] says.
    /// Need not be on disk when it returns: the log is. What is on disk after a crash is a prefix of the writes.
    async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError>;

    /// The inboxes that exist, in the order asked.
    async fn inboxes(&self, devices: Vec<DeviceAddr>) -> Result<Vec<Option<InboxState>>, StoreError>;

    /// The marks that exist, in the order asked.
    async fn marks(&self, keys: Vec<MarkKey>) -> Result<Vec<Option<Mark>>, StoreError>;

    /// All marks of a recipient in one read, in any order; `None` if there are more than `max`. Whoever has them needs no read for
    /// the recipient's next new correspondent.
    async fn marks_of(&self, recipient: AccountId, max: usize) -> Result<Option<Vec<(MarkKey, Mark)>>, StoreError>;

    /// Pending items with `after < seq <= to`, in order: at most `items_max`, and no more once `bytes_max` is
    /// reached (but at least one, if there is one).
    async fn pending(
        &self,
        device: DeviceAddr,
        after: Seq,
        to: Seq,
        items_max: usize,
        bytes_max: usize,
    ) -> Result<Vec<PendingItem>, StoreError>;

    /// Devices that hold envelopes accepted before the time, with the highest seq up to which all are: at most
    /// `devices_max`, of devices behind `after`. An empty answer ends the walk.
    async fn expired(
        &self,
        before: UnixMillis,
        after: Option<DeviceAddr>,
        devices_max: usize,
    ) -> Result<Vec<(DeviceAddr, Seq)>, StoreError>;
}

/// A device's long-lived prekeys.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct DeviceKeys {
    /// EC, 33 bytes.
    pub signed_prekey: SignedKey,
    /// Kyber-1024, 1,569 bytes.
    pub pq_last_resort: SignedKey,
}

/// What applying directory commands changes. A store that can't do all of it atomically writes keys and links, then accounts (which say
/// themselves which commands they hold), then the position. Rows count as written at the position, accounts at `applied`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DirectoryWrite {
    /// The next record of `directory` to apply.
    pub position: Option<(Partition, Offset)>,
    /// Accounts as they are now (deleted ones stay as tombstones).
    pub accounts: Vec<AccountRecord>,
    /// Devices' prekeys as they are now; `None`: gone.
    pub keys: Vec<(DeviceAddr, Option<DeviceKeys>)>,
    /// Links that are there now.
    pub linked: Vec<(Identity, AccountId)>,
    /// Links that are gone. A link belongs to its account: taking one away never touches another account's link of the same
    /// identity, so that the partitions of `directory` may be replayed in any interleaving.
    pub unlinked: Vec<(Identity, AccountId)>,
}

/// Accounts, devices and long-lived public keys. Written only by the projector.
#[async_trait]
pub trait DirectoryStore: Send + Sync + 'static {
    /// The next record of `directory` to apply; 0 if none was.
    async fn directory_position(&self, partition: Partition) -> Result<Offset, StoreError>;
    /// Makes all of it visible before it returns; after a failure, a part of it in the order that [`DirectoryWrite`] says.
    async fn write_directory(&self, write: DirectoryWrite) -> Result<(), StoreError>;
    /// An account, deleted ones included.
    async fn account(&self, id: AccountId) -> Result<Option<AccountRecord>, StoreError>;
    /// The account an identity is linked to.
    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError>;
    /// A device's long-lived prekeys.
    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError>;
}

/// A one-time prekey: a number, a public key, and for Kyber keys the identity key's signature (empty for the others). For MLS
/// the public key is what `keys::packages` keeps: a KeyPackage and when it expires.
pub type OneTimeKey = SignedKey;

/// The kinds of keys that are kept in pools.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyKind {
    /// X25519.
    Ec,
    /// Kyber-1024.
    Pq,
    /// MLS KeyPackages.
    KeyPackage,
    /// The MLS KeyPackage of last resort: one, which is read and never taken.
    KeyPackageLastResort,
}

impl KeyKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Ec, Self::Pq, Self::KeyPackage, Self::KeyPackageLastResort];

    /// Its number in stores.
    pub const fn number(self) -> u8 {
        match self {
            Self::Ec => 0,
            Self::Pq => 1,
            Self::KeyPackage => 2,
            Self::KeyPackageLastResort => 3,
        }
    }
}

/// The state that is not in the log. Each call is durable (on disk) when it returns `Ok`.
#[async_trait]
pub trait KeyStore: Send + Sync + 'static {
    /// Adds one-time prekeys (an id that is there already is replaced). [`StoreError::LimitReached`], and nothing added, past
    /// `limits::PREKEYS_PER_DEVICE`. Returns how many are there now.
    async fn add_one_time(&self, device: DeviceAddr, kind: KeyKind, keys: Vec<OneTimeKey>) -> Result<usize, StoreError>;
    /// Takes the one-time prekey with the lowest id out of the pool: no two calls ever get the same one,
    /// whatever crashes. Also returns how many are left.
    async fn take_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<(Option<OneTimeKey>, usize), StoreError>;
    /// The one-time prekey with the lowest id, which stays there.
    async fn first_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<Option<OneTimeKey>, StoreError>;
    /// How many one-time prekeys there are.
    async fn count_one_time(&self, device: DeviceAddr, kind: KeyKind) -> Result<usize, StoreError>;
    /// Drops all one-time prekeys of a device, of every kind.
    async fn remove_one_time(&self, device: DeviceAddr) -> Result<(), StoreError>;

    /// Settles which account an identity belongs to, before the log hears of it: the first claim wins, and
    /// every caller gets the winner. A claim without a registration behind it is harmless: the next one takes it over.
    async fn claim_identity(&self, identity: &Identity, account: AccountId) -> Result<AccountId, StoreError>;
    /// Frees an identity, if the claim is the account's.
    async fn release_identity(&self, identity: &Identity, account: AccountId) -> Result<(), StoreError>;

    /// The account's at-rest key; made (from `fresh`) if there is none and the account never had one.
    /// `None` once it was destroyed.
    async fn seal_key(&self, account: AccountId, fresh: Option<seal::SealKey>) -> Result<Option<seal::SealKey>, StoreError>;
    /// Destroys the account's at-rest key in place: what is sealed under it is unreadable for ever.
    async fn destroy_seal_key(&self, account: AccountId) -> Result<(), StoreError>;
}
