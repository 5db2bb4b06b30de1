//! Every key layout and value codec of the stores, in one place.
//!
//! Numbers in keys are big-endian, so that a scan meets them in order. Every value starts with a version byte.
//!
//! | keyspace | key | value | rebuilt |
//! |---|---|---|---|
//! | `pending` | account 16, device 1, seq 8 | a [`PendingItem`], hand-laid (see [`encode_pending`]) | yes |
//! | `inboxes` | account 16, device 1 | [`InboxState`] | yes |
//! | `marks` | recipient 16, sender account 16, sender device 1 | [`Mark`] | yes |
//! | `positions` | topic 1, partition 2 | offset 8, little-endian | yes |
//! | `accounts` | account 16 | `AccountRecord` | yes |
//! | `identities` | `user@realm`, byte 0, account 16 | nothing | yes |
//! | `device_keys` | account 16, device 1 | `DeviceKeys` | yes |
//! | `group_heads` | group 16 | `GroupHead` (see [`encode_group_head`]) | yes |
//! | `group_rosters` | group 16 | `GroupRoster` | yes |
//! | `group_infos` | group 16 | the bytes | yes |
//! | `group_snapshots` | group 16, epoch 8 | the bytes | yes |
//! | `group_trees` | group 16, epoch 8 | seq 8, little-endian, the bytes | yes |
//! | `group_items` | group 16, seq 8 | a `GroupItem`, hand-laid (see [`encode_group_item`]) | yes |
//! | `group_marks` | group 16, sender account 16, sender device 1 | [`Mark`] | yes |
//! | `group_members` | account 16, group 16 | nothing | yes |
//! | `one_time` | account 16, device 1, kind 1, id 4 | `OneTimeKey` | no |
//! | `pools` | account 16, device 1, kind 1 | [`Pool`] | no |
//! | `claims` | `user@realm` | account 16 | no |
//!
//! The at-rest keys are not here: a deleted value lives on in an LSM tree's older files, so they have a file
//! of fixed slots that are overwritten in place (`embedded::seal_file`).

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;

use super::{InboxState, KeyKind, Mark, MarkKey, PendingBody, PendingEnvelope, PendingItem, StoreError};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, Identity, Offset, Partition, Seq};
use crate::wire::event::{self, ReceiptEntry};

mod groups;

pub use groups::*;

/// The version byte before every value.
pub const VERSION: u8 = event::VERSION;

/// The topic's number in keys of `positions`: `inbox`.
pub const TOPIC_INBOX: u8 = 0;
/// The topic's number in keys of `positions`: `groups`.
pub const TOPIC_GROUPS: u8 = 1;
/// The topic's number in keys of `positions`: `directory`.
pub const TOPIC_DIRECTORY: u8 = 2;

const ENVELOPE: u8 = 0;
const RECEIPTS: u8 = 1;
/// Version, tag, sender account and device, client message id, accepted, flags, kind.
const ENVELOPE_HEADER: usize = 2 + 16 + 1 + 8 + 8 + 1 + 1;

fn corrupt(what: &str) -> StoreError {
    StoreError::Corrupt(format!("{what} is not what was written"))
}

/// `account ‖ device`: key of an inbox and of a device's prekeys, prefix of its pending items.
pub fn device(addr: DeviceAddr) -> [u8; 17] {
    let mut key = [0; 17];
    key[..16].copy_from_slice(addr.account.as_bytes());
    key[16] = addr.device.get();
    key
}

/// The key right behind everything that starts with this device's key.
pub fn behind_device(addr: DeviceAddr) -> [u8; 17] {
    let mut key = device(addr);
    // Device ids end at 127, so this never overflows.
    key[16] += 1;
    key
}

/// The device of a key that starts with one.
pub fn parse_device(key: &[u8]) -> Result<DeviceAddr, StoreError> {
    let (Some(account), Some(device)) = (key.get(..16), key.get(16)) else { return Err(corrupt("a device's key")) };
    let account = AccountId::from_slice(account).map_err(|_| corrupt("a device's key"))?;
    let device = DeviceId::new(u32::from(*device)).map_err(|_| corrupt("a device's key"))?;
    Ok(DeviceAddr { account, device })
}

/// `account ‖ device ‖ seq`.
pub fn pending(addr: DeviceAddr, seq: Seq) -> [u8; 25] {
    let mut key = [0; 25];
    key[..17].copy_from_slice(&device(addr));
    key[17..].copy_from_slice(&seq.0.to_be_bytes());
    key
}

/// The parts of a key of `pending`.
pub fn parse_pending(key: &[u8]) -> Result<(DeviceAddr, Seq), StoreError> {
    if key.len() != 25 {
        return Err(corrupt("a pending item's key"));
    }
    let seq: [u8; 8] = key[17..].try_into().map_err(|_| corrupt("a pending item's key"))?;
    Ok((parse_device(key)?, Seq(u64::from_be_bytes(seq))))
}

/// `recipient ‖ sender account ‖ sender device`.
pub fn mark(of: &MarkKey) -> [u8; 33] {
    let mut key = [0; 33];
    key[..16].copy_from_slice(of.recipient.as_bytes());
    key[16..].copy_from_slice(&device(of.sender));
    key
}

/// The sender of a key of `marks`.
pub fn parse_mark(key: &[u8]) -> Result<MarkKey, StoreError> {
    let (recipient, sender) = key.split_at_checked(16).ok_or_else(|| corrupt("a mark's key"))?;
    let recipient = AccountId::from_slice(recipient).map_err(|_| corrupt("a mark's key"))?;
    Ok(MarkKey { recipient, sender: parse_device(sender)? })
}

/// `topic ‖ partition`.
pub fn position(topic: u8, partition: Partition) -> [u8; 3] {
    let [high, low] = partition.0.to_be_bytes();
    [topic, high, low]
}

/// `user@realm ‖ 0`: prefix of the links of an identity. Identities hold no control character, so none is a prefix of another.
pub fn identity(of: &Identity) -> Vec<u8> {
    let mut key = of.to_string().into_bytes();
    key.push(0);
    key
}

/// `user@realm ‖ 0 ‖ account`.
pub fn link(of: &Identity, account: AccountId) -> Vec<u8> {
    let mut key = identity(of);
    key.extend_from_slice(account.as_bytes());
    key
}

/// The account of a key of `identities`.
pub fn parse_link(key: &[u8]) -> Result<AccountId, StoreError> {
    let at = key.len().checked_sub(16).ok_or_else(|| corrupt("an identity's link"))?;
    AccountId::from_slice(&key[at..]).map_err(|_| corrupt("an identity's link"))
}

/// `account ‖ device ‖ kind`: key of a pool, prefix of its one-time prekeys.
pub fn pool(addr: DeviceAddr, kind: KeyKind) -> [u8; 18] {
    let mut key = [0; 18];
    key[..17].copy_from_slice(&device(addr));
    key[17] = kind.number();
    key
}

/// `account ‖ device ‖ kind ‖ id`.
pub fn one_time(addr: DeviceAddr, kind: KeyKind, id: u32) -> [u8; 22] {
    let mut key = [0; 22];
    key[..18].copy_from_slice(&pool(addr, kind));
    key[18..].copy_from_slice(&id.to_be_bytes());
    key
}

/// What is known of a pool of one-time prekeys without reading it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, bincode::Decode)]
pub struct Pool {
    /// How many there are.
    pub count: u32,
    /// No id below is there. Scans start here, so that they never walk over the remains of spent keys.
    pub low: u32,
}

/// A value that has no layout of its own: the version byte, then bincode, as in the log.
pub fn encode<T: Encode>(value: &T) -> Vec<u8> {
    let mut out = Vec::with_capacity(64);
    event::encode_into(value, &mut out);
    out
}

/// Reads what [`encode`] wrote; `what` names it in the error.
pub fn decode<'a, T: BorrowDecode<'a, ()>>(bytes: &'a [u8], what: &str) -> Result<T, StoreError> {
    event::decode(bytes).map_err(|error| StoreError::Corrupt(format!("{what}: {error}")))
}

/// A mark.
pub fn encode_mark(mark: &Mark) -> Vec<u8> {
    encode(mark)
}

/// An inbox.
pub fn decode_inbox(bytes: &[u8]) -> Result<InboxState, StoreError> {
    decode(bytes, "an inbox")
}

/// A position.
pub fn encode_offset(offset: Offset) -> [u8; 9] {
    let mut out = [VERSION; 9];
    out[1..].copy_from_slice(&offset.0.to_le_bytes());
    out
}

/// Reads what [`encode_offset`] wrote.
pub fn decode_offset(bytes: &[u8]) -> Result<Offset, StoreError> {
    match bytes.split_first() {
        Some((&VERSION, rest)) => rest.try_into().map(|n| Offset(u64::from_le_bytes(n))).map_err(|_| corrupt("a position")),
        _ => Err(corrupt("a position")),
    }
}

/// Appends a pending item's value to a buffer.
///
/// Envelope: version 1, tag 0, sender account 16, sender device 1, client message id 8, accepted 8 (both little-endian), flags 1,
/// kind 1, then the sealed content to the end; so that reading copies nothing. Receipts: version 1, tag 1, bincode.
pub fn encode_pending(body: &PendingBody, out: &mut Vec<u8>) {
    match body {
        PendingBody::Envelope(envelope) => {
            out.reserve(ENVELOPE_HEADER + envelope.sealed.len());
            out.extend_from_slice(&[VERSION, ENVELOPE]);
            out.extend_from_slice(&device(envelope.sender));
            out.extend_from_slice(&envelope.client_message_id.0.to_le_bytes());
            out.extend_from_slice(&envelope.accepted.0.to_le_bytes());
            out.extend_from_slice(&[envelope.flags, envelope.kind]);
            out.extend_from_slice(&envelope.sealed);
        }
        PendingBody::Receipts(entries) => {
            out.extend_from_slice(&[VERSION, RECEIPTS]);
            event::encode_into(entries, out);
        }
    }
}

/// Reads what [`encode_pending`] wrote; the sealed content shares the buffer.
pub fn decode_pending(seq: Seq, value: Bytes) -> Result<PendingItem, StoreError> {
    let body = match value.get(..2) {
        Some([VERSION, ENVELOPE]) => PendingBody::Envelope(decode_envelope(value)?),
        Some([VERSION, RECEIPTS]) => PendingBody::Receipts(decode::<Vec<ReceiptEntry>>(&value[2..], "a pending receipt")?),
        Some([VERSION, _]) | None => return Err(corrupt("a pending item")),
        Some([other, ..]) => return Err(StoreError::Corrupt(format!("a pending item has version {other}"))),
        Some(_) => return Err(corrupt("a pending item")),
    };
    Ok(PendingItem { seq, body })
}

fn decode_envelope(value: Bytes) -> Result<PendingEnvelope, StoreError> {
    let header: &[u8; ENVELOPE_HEADER] =
        value.get(..ENVELOPE_HEADER).and_then(|h| h.try_into().ok()).ok_or_else(|| corrupt("a pending envelope"))?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    Ok(PendingEnvelope {
        sender: parse_device(&header[2..19])?,
        client_message_id: ClientMessageId(number(19)),
        accepted: UnixMillis(number(27)),
        flags: header[35],
        kind: header[36],
        sealed: value.slice(ENVELOPE_HEADER..),
    })
}

/// When a pending envelope was accepted, without reading the rest; `None` for receipts.
pub fn pending_accepted(value: &[u8]) -> Result<Option<UnixMillis>, StoreError> {
    match value {
        [VERSION, RECEIPTS, ..] => Ok(None),
        [VERSION, ENVELOPE, rest @ ..] if rest.len() >= ENVELOPE_HEADER - 2 => {
            Ok(Some(UnixMillis(u64::from_le_bytes(std::array::from_fn(|i| rest[25 + i])))))
        }
        _ => Err(corrupt("a pending item")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::event::ReceiptKind;

    fn addr(n: u8, device: u32) -> DeviceAddr {
        DeviceAddr { account: AccountId::from_bytes([n; 16]), device: DeviceId::new(device).expect("valid") }
    }

    fn envelope(sealed: &[u8]) -> PendingBody {
        PendingBody::Envelope(PendingEnvelope {
            sender: addr(7, 3),
            client_message_id: ClientMessageId(0x0102_0304_0506_0708),
            accepted: UnixMillis(0x1112_1314_1516_1718),
            flags: 1,
            kind: 2,
            sealed: Bytes::copy_from_slice(sealed),
        })
    }

    /// Golden vectors: what is on disk must be readable for ever.
    #[test]
    fn layouts_are_stable() {
        let mut out = Vec::new();
        encode_pending(&envelope(b"xyz"), &mut out);
        let mut want = vec![1, 0];
        want.extend([7; 16]);
        want.extend([3, 8, 7, 6, 5, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 1, 2]);
        want.extend(b"xyz");
        assert_eq!(out, want);
        assert_eq!(pending(addr(9, 2), Seq(0x0102))[16..], [2, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(position(TOPIC_DIRECTORY, Partition(0x0102)), [2, 1, 2]);
        assert_eq!(one_time(addr(1, 5), KeyKind::Pq, 0x01020304)[16..], [5, 1, 1, 2, 3, 4]);
        assert_eq!(encode_offset(Offset(258)), [1, 2, 1, 0, 0, 0, 0, 0, 0]);
        assert_eq!(encode(&Mark { high: 3, seen: 5, applied: Seq(6) }), [1, 3, 5, 6]);
        let state = InboxState { cursor: Seq(1), expired_to: Seq(2), attached: None, items: 3, bytes: 4, last: Seq(6), applied: Seq(5) };
        assert_eq!(encode(&state), [1, 1, 2, 0, 3, 4, 6, 5]);
        let id: Identity = "a@r".parse().expect("valid");
        assert_eq!(link(&id, AccountId::from_bytes([4; 16]))[..4], *b"a@r\0");
    }

    #[test]
    fn keys_sort_as_their_parts() {
        assert!(pending(addr(1, 1), Seq::MAX) < pending(addr(1, 2), Seq::ZERO));
        assert!(pending(addr(1, 1), Seq(255)) < pending(addr(1, 1), Seq(256)));
        assert!(behind_device(addr(1, 1))[..] > pending(addr(1, 1), Seq::MAX)[..]);
        assert!(behind_device(addr(1, 127))[..] < device(addr(2, 1))[..]);
        assert!(one_time(addr(1, 1), KeyKind::Ec, u32::MAX) < one_time(addr(1, 1), KeyKind::Pq, 0));
    }

    proptest! {
        #[test]
        fn pending_round_trips(seq: u64, sealed: Vec<u8>, ids in prop::collection::vec((any::<u64>(), any::<u64>()), 0..4)) {
            let receipts = PendingBody::Receipts(vec![ReceiptEntry { recipient: addr(1, 1), kind: ReceiptKind::Expired, ids }]);
            for body in [envelope(&sealed), receipts] {
                let mut out = Vec::new();
                encode_pending(&body, &mut out);
                let accepted = if let PendingBody::Envelope(e) = &body { Some(e.accepted) } else { None };
                prop_assert_eq!(pending_accepted(&out).expect("well formed"), accepted);
                prop_assert_eq!(decode_pending(Seq(seq), out.into()).expect("well formed"), PendingItem { seq: Seq(seq), body });
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = pending_accepted(&bytes);
            let _ = parse_pending(&bytes);
            let _ = parse_link(&bytes);
            let _ = decode_offset(&bytes);
            let _ = decode_inbox(&bytes);
            let _ = decode::<Pool>(&bytes, "a pool");
            let _ = decode_pending(Seq(1), bytes.into());
        }
    }
}
