//! The events of the log: bincode 2 (its written specification, standard configuration: little endian,
//! variable-length integers) behind one version byte.
//!
//! Decoding borrows: the sealed contents of a record are slices of the record's own buffer, so that an
//! envelope is not copied between the log and the socket. Golden vectors below fix the bytes.

use bincode::{BorrowDecode, Decode, Encode, config};
use bytes::Bytes;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, AttachId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, Generation, Identity, Offset, RegistrationId, Seq};
use crate::limits;

/// The version byte before every event; another one is refused, never guessed.
pub const VERSION: u8 = 1;

/// A record that is not an event of this version. Retrying never helps.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The record has no byte.
    #[error("the record is empty")]
    Empty,
    /// Written by another version of Sealpost.
    #[error("the record has version {0}, this binary reads version {VERSION}: run the version that wrote it, or newer")]
    Version(u8),
    /// The bytes are not an event.
    #[error("the record is not an event: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// Bytes after the event.
    #[error("{0} bytes after the event")]
    Trailing(usize),
}

const CONFIG: config::Configuration<config::LittleEndian, config::Varint, config::Limit<{ limits::RECORD_BYTES }>> =
    config::standard().with_limit::<{ limits::RECORD_BYTES }>();

/// The bytes of an event.
pub fn encode<E: Encode>(event: &E) -> Bytes {
    let mut out = Vec::with_capacity(128);
    encode_into(event, &mut out);
    out.into()
}

/// Appends the bytes of an event to a buffer.
pub fn encode_into<E: Encode>(event: &E, out: &mut Vec<u8>) {
    out.push(VERSION);
    bincode::encode_into_std_write(event, out, CONFIG).expect("encoding into memory can't fail, and events are below the record limit");
}

/// An event, its byte slices borrowed from `bytes`.
pub fn decode<'a, E: BorrowDecode<'a, ()>>(bytes: &'a [u8]) -> Result<E, DecodeError> {
    let (&version, rest) = bytes.split_first().ok_or(DecodeError::Empty)?;
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    let (event, used) = bincode::borrow_decode_from_slice(rest, CONFIG)?;
    if used == rest.len() { Ok(event) } else { Err(DecodeError::Trailing(rest.len() - used)) }
}

/// An event that owns all it has.
pub fn decode_owned<E: Decode<()>>(bytes: &[u8]) -> Result<E, DecodeError> {
    let (&version, rest) = bytes.split_first().ok_or(DecodeError::Empty)?;
    if version != VERSION {
        return Err(DecodeError::Version(version));
    }
    let (event, used) = bincode::decode_from_slice(rest, CONFIG)?;
    if used == rest.len() { Ok(event) } else { Err(DecodeError::Trailing(rest.len() - used)) }
}

/// Topic `inbox`, keyed by the recipient account.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub enum InboxEvent<'a> {
    /// A sender's envelopes for the devices of one account.
    EnvelopesAccepted(EnvelopesAccepted<'a>),
    /// A device keeps everything up to the cursor.
    Acked {
        /// Whose cursor.
        device: DeviceAddr,
        /// Up to and including.
        cursor: Seq,
    },
    /// A device opened a stream, or asks for a new switch from backlog to live on the same one (same `attach`).
    DeviceAttached {
        /// Which device.
        device: DeviceAddr,
        /// The edge that holds its socket.
        edge: EdgeId,
        /// Which attachment.
        attach: AttachId,
    },
    /// A stream ended. Ignored unless `attach` is the device's current attachment.
    DeviceDetached {
        /// Which device.
        device: DeviceAddr,
        /// The edge that held its socket.
        edge: EdgeId,
        /// Which attachment.
        attach: AttachId,
    },
    /// Everything up to `to` that is still pending is dropped: its time is over.
    Expired {
        /// Whose envelopes.
        device: DeviceAddr,
        /// Up to and including.
        to: Seq,
    },
    /// What became of messages that a device sent; pending like an envelope until acknowledged.
    Receipts {
        /// The device that sent the messages.
        device: DeviceAddr,
        /// What became of which.
        entries: Vec<ReceiptEntry>,
    },
    /// A device is no more: its inbox goes.
    DeviceRemoved {
        /// Which device.
        device: DeviceAddr,
    },
    /// An account is no more: all its inboxes and marks go.
    AccountRemoved {
        /// Which account.
        account: AccountId,
    },
    /// The partition belongs to the past: what stands behind it is passed on to this generation. See `log::layout`.
    Fence {
        /// The one that follows.
        generation: Generation,
    },
}

impl InboxEvent<'_> {
    /// Whose inboxes it changes.
    pub const fn account(&self) -> Option<AccountId> {
        match self {
            Self::EnvelopesAccepted(accepted) => Some(accepted.recipient),
            Self::Acked { device, .. }
            | Self::DeviceAttached { device, .. }
            | Self::DeviceDetached { device, .. }
            | Self::Expired { device, .. }
            | Self::Receipts { device, .. }
            | Self::DeviceRemoved { device } => Some(device.account),
            Self::AccountRemoved { account } => Some(*account),
            Self::Fence { .. } => None,
        }
    }
}

/// One accepted `Send`.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub struct EnvelopesAccepted<'a> {
    /// Who it is for; the key of the record.
    pub recipient: AccountId,
    /// Who sent it.
    pub sender: DeviceAddr,
    /// The sender's counter for this recipient.
    pub client_message_id: ClientMessageId,
    /// When the edge accepted it.
    pub accepted: UnixMillis,
    /// See [`flags`].
    pub flags: u8,
    /// One for each device, at most one a device.
    pub envelopes: Vec<SealedEnvelope<'a>>,
}

/// Bits of [`EnvelopesAccepted::flags`].
pub mod flags {
    /// Wake the recipient.
    pub const URGENT: u8 = 1;
    /// Attached devices or nobody.
    pub const EPHEMERAL: u8 = 2;
}

/// One ciphertext for one device, sealed once more under the recipient account's at-rest key.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub struct SealedEnvelope<'a> {
    /// The device it is for.
    pub device: DeviceId,
    /// The number of its `EnvelopeType` in `stream.proto`.
    pub kind: u8,
    /// AES-256-GCM: nonce (12 bytes), ciphertext, tag (16 bytes). See `store::seal`.
    pub sealed: &'a [u8],
}

/// Writes an `EnvelopesAccepted` event without a copy of its contents: each is appended in place by the caller's
/// function. The bytes are those of [`encode`]; a test holds them together.
pub fn encode_accepted<T>(
    head: &EnvelopesAccepted<'_>,
    envelopes: &[T],
    sealed_len: impl Fn(&T) -> usize,
    envelope: impl Fn(&T) -> (DeviceId, u8),
    mut seal: impl FnMut(&T, &mut Vec<u8>),
) -> Bytes {
    let contents: usize = envelopes.iter().map(|e| sealed_len(e) + 12).sum();
    let mut out = Vec::with_capacity(96 + contents);
    out.push(VERSION);
    let fields = (0u32, head.recipient, head.sender, head.client_message_id, head.accepted, head.flags, envelopes.len() as u64);
    bincode::encode_into_std_write(fields, &mut out, CONFIG).expect("encoding into memory can't fail");
    for item in envelopes {
        let (device, kind) = envelope(item);
        let len = sealed_len(item);
        bincode::encode_into_std_write((device, kind, len as u64), &mut out, CONFIG).expect("encoding into memory can't fail");
        let start = out.len();
        seal(item, &mut out);
        assert_eq!(out.len() - start, len, "the length stands before the content");
    }
    out.into()
}

/// What became of messages for one device.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct ReceiptEntry {
    /// The device the messages were for.
    pub recipient: DeviceAddr,
    /// What became of them.
    pub kind: ReceiptKind,
    /// Client message ids: ranges, both ends included, growing.
    pub ids: Vec<(u64, u64)>,
}

/// What became of a message; the numbers are those of `ReceiptKind` in `stream.proto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Encode, Decode)]
pub enum ReceiptKind {
    /// Acknowledged by the device.
    Delivered,
    /// Not fetched within the retention.
    Expired,
    /// Its id was behind the window of ids.
    Rejected,
}

/// Topic `directory`, keyed by the account: a wish, decided by the projector in log order.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DirectoryCommand {
    /// The account it changes.
    pub account: AccountId,
    /// When the edge took it.
    pub at: UnixMillis,
    /// Where the verdict goes; nowhere, if nobody waits.
    pub reply_to: Option<RequestId>,
    /// What is wished.
    pub change: DirectoryChange,
}

/// Names one waiting request of one edge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Encode, Decode)]
pub struct RequestId {
    /// The edge that waits.
    pub edge: EdgeId,
    /// Its own number.
    pub number: u64,
}

/// A change of one account.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum DirectoryChange {
    /// Adds a device, and the account if it is new. The device id is chosen when it is applied.
    RegisterDevice {
        /// The identity whose token was shown; linked if the account is new.
        identity: Identity,
        /// The new device.
        device: NewDevice,
    },
    /// Links another identity.
    LinkIdentity {
        /// Which one.
        identity: Identity,
    },
    /// Takes a link away; the last one can't be.
    UnlinkIdentity {
        /// Which one.
        identity: Identity,
    },
    /// Changes a device's display name.
    RenameDevice {
        /// Which device.
        device: DeviceId,
        /// Its new name.
        name: String,
    },
    /// Removes a device, its keys, its credential and its inbox.
    RevokeDevice {
        /// Which device.
        device: DeviceId,
    },
    /// Replaces a device's long-lived prekeys.
    PublishKeys {
        /// Which device.
        device: DeviceId,
        /// The new signed prekey, if it changes.
        signed_prekey: Option<SignedKey>,
        /// The new last-resort key, if it changes.
        pq_last_resort: Option<SignedKey>,
    },
    /// Refuses messages of another account.
    Block {
        /// Whose.
        other: AccountId,
    },
    /// Takes that back.
    Unblock {
        /// Whose.
        other: AccountId,
    },
    /// Ends the account; its id is never used again.
    DeleteAccount,
    /// A whole account at once, written when the topic is compacted; replaces what was there.
    Snapshot(AccountRecord),
}

/// What a new device publishes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct NewDevice {
    /// Shown to the person's other devices.
    pub name: String,
    /// See [`RegistrationId`].
    pub registration_id: RegistrationId,
    /// Its identity key: libsignal's serialization, 33 bytes (type byte 5, then the X25519 point).
    pub identity_key: Vec<u8>,
    /// SHA-256 of the credential's secret.
    pub credential_hash: [u8; 32],
    /// Its signed EC prekey.
    pub signed_prekey: SignedKey,
    /// Its post-quantum prekey for when the one-time ones are used up.
    pub pq_last_resort: SignedKey,
}

/// A public key with the identity key's signature over its serialized bytes.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct SignedKey {
    /// The client's number for it.
    pub id: u32,
    /// libsignal's serialization: 33 bytes (EC) or 1,569 bytes (Kyber-1024).
    pub public_key: Vec<u8>,
    /// XEdDSA signature, 64 bytes.
    pub signature: Vec<u8>,
}

/// An account as the directory knows it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct AccountRecord {
    /// Its id.
    pub id: AccountId,
    /// When it was made.
    pub created: UnixMillis,
    /// Set when it was deleted: then everything else is empty.
    pub deleted: Option<UnixMillis>,
    /// Identities linked to it.
    pub identities: Vec<Identity>,
    /// Its devices, by id.
    pub devices: Vec<DeviceRecord>,
    /// The device id given last, so that ids are reused as late as can be.
    pub last_device: u8,
    /// Devices that were ever registered: past the highest number, numbers are given again.
    pub registrations: u64,
    /// Accounts whose messages it refuses, sorted.
    pub blocked: Vec<AccountId>,
    /// Commands before this position are in it: what is replayed of them has had its effect already.
    pub applied: Offset,
}

/// A device as the directory knows it. Its prekeys are apart: few readers need them.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct DeviceRecord {
    /// Its number.
    pub id: DeviceId,
    /// Its name.
    pub name: String,
    /// Its registration id.
    pub registration_id: RegistrationId,
    /// Its identity key, 33 bytes.
    pub identity_key: Vec<u8>,
    /// SHA-256 of its credential's secret.
    pub credential_hash: [u8; 32],
    /// When it was registered.
    pub created: UnixMillis,
    /// Where its client message ids begin: beyond those of an earlier device of its number, or 1 if it is the number's first.
    pub first_message_id: ClientMessageId,
}

/// Cuts the slice of `whole` that `part` borrows from it, without a copy.
pub fn share(whole: &Bytes, part: &[u8]) -> Bytes {
    whole.slice_ref(part)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn addr(account: u8, device: u32) -> DeviceAddr {
        DeviceAddr { account: AccountId::from_bytes([account; 16]), device: DeviceId::new(device).expect("valid") }
    }

    fn accepted<'a>(contents: &'a [&'a [u8]]) -> EnvelopesAccepted<'a> {
        EnvelopesAccepted {
            recipient: addr(1, 1).account,
            sender: addr(2, 3),
            client_message_id: ClientMessageId(300),
            accepted: UnixMillis(1_700_000_000_000),
            flags: flags::URGENT,
            envelopes: contents.iter().zip(1..).map(|(sealed, n)| SealedEnvelope { device: addr(1, n).device, kind: 2, sealed }).collect(),
        }
    }

    #[test]
    fn writing_in_place_gives_the_same_bytes() {
        let long = vec![9u8; 70_000];
        let contents: [&[u8]; 3] = [b"", b"abc", &long];
        let whole = accepted(&contents);
        let head = EnvelopesAccepted { envelopes: Vec::new(), ..whole.clone() };
        let in_place =
            encode_accepted(&head, &whole.envelopes, |e| e.sealed.len(), |e| (e.device, e.kind), |e, out| out.extend_from_slice(e.sealed));
        assert_eq!(in_place, encode(&InboxEvent::EnvelopesAccepted(whole)));
    }

    /// Golden vectors: what an older binary wrote must stay readable.
    #[test]
    fn bytes_of_events_are_stable() {
        let event = InboxEvent::EnvelopesAccepted(accepted(&[b"xy"]));
        let mut golden = vec![VERSION, 0];
        golden.extend([1; 16]);
        golden.extend([2; 16]);
        golden.extend([3, 251, 44, 1, 253, 0, 104, 229, 207, 139, 1, 0, 0, 1, 1, 1, 2, 2, b'x', b'y']);
        assert_eq!(encode(&event), golden);
        let acked = InboxEvent::Acked { device: addr(1, 2), cursor: Seq(7) };
        let mut golden = vec![VERSION, 1];
        golden.extend([1; 16]);
        golden.extend([2, 7]);
        assert_eq!(encode(&acked), golden);
    }

    #[test]
    fn other_versions_and_rests_are_refused() {
        let bytes = encode(&InboxEvent::Acked { device: addr(1, 2), cursor: Seq(7) });
        let mut newer = bytes.to_vec();
        newer[0] = 9;
        assert!(matches!(decode::<InboxEvent<'_>>(&newer), Err(DecodeError::Version(9))));
        let mut longer = bytes.to_vec();
        longer.push(0);
        assert!(matches!(decode::<InboxEvent<'_>>(&longer), Err(DecodeError::Trailing(1))));
        assert!(matches!(decode::<InboxEvent<'_>>(&[]), Err(DecodeError::Empty)));
        assert!(decode::<InboxEvent<'_>>(&bytes[..bytes.len() - 1]).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode::<InboxEvent<'_>>(&bytes);
            let _ = decode_owned::<DirectoryCommand>(&bytes);
        }

        #[test]
        fn events_survive_the_round_trip(id in 1u64.., at in any::<u64>(), flags in 0u8..4, contents in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..10)) {
            let slices: Vec<&[u8]> = contents.iter().map(Vec::as_slice).collect();
            let event = InboxEvent::EnvelopesAccepted(EnvelopesAccepted { client_message_id: ClientMessageId(id), accepted: UnixMillis(at), flags, ..accepted(&slices) });
            let bytes = encode(&event);
            prop_assert_eq!(decode::<InboxEvent<'_>>(&bytes).expect("decodes"), event);
        }
    }
}
