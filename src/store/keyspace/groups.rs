//! Keys and values of groups.

use bytes::Bytes;

use super::{VERSION, corrupt, decode, device, encode, parse_device};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, GroupId, Seq};
use crate::store::StoreError;
use crate::store::groups::{GroupHead, GroupItem, GroupItemKind};

/// `group ‖ seq`.
pub fn group_item(group: GroupId, seq: Seq) -> [u8; 24] {
    of_group(group, seq.0)
}

/// `group ‖ epoch`: key of a snapshot and of a tree.
pub fn group_epoch(group: GroupId, epoch: u64) -> [u8; 24] {
    of_group(group, epoch)
}

fn of_group(group: GroupId, number: u64) -> [u8; 24] {
    let mut key = [0; 24];
    key[..16].copy_from_slice(group.as_bytes());
    key[16..].copy_from_slice(&number.to_be_bytes());
    key
}

/// The parts of a key of `group_items`.
pub fn parse_group_item(key: &[u8]) -> Result<(GroupId, Seq), StoreError> {
    let wrong = || corrupt("a group item's key");
    let (group, seq) = key.split_at_checked(16).ok_or_else(wrong)?;
    let seq: [u8; 8] = seq.try_into().map_err(|_| wrong())?;
    Ok((GroupId::from_slice(group).map_err(|_| wrong())?, Seq(u64::from_be_bytes(seq))))
}

/// `group ‖ sender account ‖ sender device`.
pub fn group_mark(group: GroupId, sender: DeviceAddr) -> [u8; 33] {
    let mut key = [0; 33];
    key[..16].copy_from_slice(group.as_bytes());
    key[16..].copy_from_slice(&device(sender));
    key
}

/// `account ‖ group`.
pub fn group_member(account: AccountId, group: GroupId) -> [u8; 32] {
    let mut key = [0; 32];
    key[..16].copy_from_slice(account.as_bytes());
    key[16..].copy_from_slice(group.as_bytes());
    key
}

/// The group of a key of `group_members`.
pub fn parse_group_member(key: &[u8]) -> Result<GroupId, StoreError> {
    let group = key.get(16..).ok_or_else(|| corrupt("a group member's key"))?;
    GroupId::from_slice(group).map_err(|_| corrupt("a group member's key"))
}

/// The version byte of heads that say when their group's state was said last; those of version 1 end before that.
const HEAD_VERSION: u8 = 2;

/// A group's head.
pub fn encode_group_head(head: &GroupHead) -> Vec<u8> {
    let mut out = encode(head);
    out[0] = HEAD_VERSION;
    out
}

/// Reads what [`encode_group_head`] wrote, and what was written before there was a second version.
pub fn decode_group_head(value: &[u8]) -> Result<GroupHead, StoreError> {
    let (version, rest) = value.split_first().ok_or_else(|| corrupt("a group"))?;
    let missing: &[u8] = match *version {
        HEAD_VERSION => &[],
        VERSION => &[0, 0],
        _ => return Err(corrupt("a group")),
    };
    decode(&[&[VERSION], rest, missing].concat(), "a group")
}

/// A value that is somebody else's bytes: the version byte before them.
pub fn encode_group_blob(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + bytes.len());
    out.push(VERSION);
    out.extend_from_slice(bytes);
    out
}

/// Reads what [`encode_group_blob`] wrote, in the same buffer.
pub fn decode_group_blob(value: Bytes) -> Result<Bytes, StoreError> {
    match value.first() {
        Some(&VERSION) => Ok(value.slice(1..)),
        _ => Err(corrupt("a group's state")),
    }
}

/// A tree, with the event that began its epoch.
pub fn encode_group_tree(at: Seq, tree: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(9 + tree.len());
    out.push(VERSION);
    out.extend_from_slice(&at.0.to_le_bytes());
    out.extend_from_slice(tree);
    out
}

/// Reads what [`encode_group_tree`] wrote, in the same buffer.
pub fn decode_group_tree(value: Bytes) -> Result<(Seq, Bytes), StoreError> {
    Ok((group_tree_at(&value)?, value.slice(9..)))
}

/// The event that began a tree's epoch, without the rest.
pub fn group_tree_at(value: &[u8]) -> Result<Seq, StoreError> {
    match value.split_first_chunk::<9>() {
        Some(([VERSION, at @ ..], _)) => Ok(Seq(u64::from_le_bytes(*at))),
        _ => Err(corrupt("a group's tree")),
    }
}

/// Version, kind, after, accepted, epoch, sender (zeros: the server), client message id.
const GROUP_ITEM_HEADER: usize = 2 + 8 + 8 + 8 + 17 + 8;

/// Appends a group item's value to a buffer: version 1, kind 1, after 8, accepted 8, epoch 8, sender account 16 and device 1 (all zero:
/// the server), client message id 8 (numbers little-endian), then the content to the end.
pub fn encode_group_item(item: &GroupItem, out: &mut Vec<u8>) {
    out.reserve(GROUP_ITEM_HEADER + item.content.len());
    out.extend_from_slice(&[VERSION, item.kind as u8]);
    for number in [item.after.0, item.accepted.0, item.epoch] {
        out.extend_from_slice(&number.to_le_bytes());
    }
    out.extend_from_slice(&item.sender.map_or([0; 17], device));
    out.extend_from_slice(&item.client_message_id.0.to_le_bytes());
    out.extend_from_slice(&item.content);
}

/// Reads what [`encode_group_item`] wrote; the content shares the buffer.
pub fn decode_group_item(seq: Seq, value: Bytes) -> Result<GroupItem, StoreError> {
    let header: &[u8; GROUP_ITEM_HEADER] =
        value.get(..GROUP_ITEM_HEADER).and_then(|h| h.try_into().ok()).ok_or_else(|| corrupt("a group's item"))?;
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| header[at + i]));
    let kind = match header[..2] {
        [VERSION, 1] => GroupItemKind::Created,
        [VERSION, 2] => GroupItemKind::Commit,
        [VERSION, 3] => GroupItemKind::Proposal,
        [VERSION, 4] => GroupItemKind::Message,
        [VERSION, 5] => GroupItemKind::Closed,
        _ => return Err(corrupt("a group's item")),
    };
    Ok(GroupItem {
        seq,
        after: Seq(number(2)),
        accepted: UnixMillis(number(10)),
        epoch: number(18),
        sender: if header[26..43] == [0; 17] { None } else { Some(parse_device(&header[26..43])?) },
        kind,
        client_message_id: ClientMessageId(number(43)),
        content: value.slice(GROUP_ITEM_HEADER..),
    })
}

/// When a group's item was accepted, without reading the rest.
pub fn group_item_accepted(value: &[u8]) -> Result<UnixMillis, StoreError> {
    match value.first_chunk::<GROUP_ITEM_HEADER>() {
        Some(header @ [VERSION, ..]) => Ok(UnixMillis(u64::from_le_bytes(std::array::from_fn(|i| header[10 + i])))),
        _ => Err(corrupt("a group's item")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{DeviceId, EdgeId};
    use crate::store::groups::GroupRoster;

    fn addr(n: u8, device: u32) -> DeviceAddr {
        DeviceAddr { account: AccountId::from_bytes([n; 16]), device: DeviceId::new(device).expect("valid") }
    }

    /// Golden vectors: what is on disk must be readable for ever.
    #[test]
    fn layouts_are_stable() {
        let group = GroupId::from_bytes([9; 16]);
        let item = GroupItem {
            seq: Seq(7),
            after: Seq(0x0102),
            accepted: UnixMillis(3),
            epoch: 4,
            sender: Some(addr(7, 5)),
            kind: GroupItemKind::Message,
            client_message_id: ClientMessageId(6),
            content: Bytes::from_static(b"xyz"),
        };
        let mut out = Vec::new();
        encode_group_item(&item, &mut out);
        let mut want = vec![1, 4, 2, 1, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0];
        want.extend([7; 16]);
        want.extend([5, 6, 0, 0, 0, 0, 0, 0, 0]);
        want.extend(b"xyz");
        assert_eq!(out, want);
        assert_eq!(group_item(group, Seq(0x0102))[14..], [9, 9, 0, 0, 0, 0, 0, 0, 1, 2]);
        assert_eq!(group_epoch(group, 3)[14..], [9, 9, 0, 0, 0, 0, 0, 0, 0, 3]);
        assert_eq!(group_mark(group, addr(7, 5))[15..], [9, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 5]);
        assert_eq!(group_member(addr(7, 5).account, group)[15..17], [7, 9]);
        assert_eq!(encode_group_blob(b"xy"), *b"\x01xy");
        assert_eq!(encode_group_tree(Seq(258), b"t"), [1, 2, 1, 0, 0, 0, 0, 0, 0, b't']);
        let head = GroupHead {
            created: UnixMillis(1),
            epoch: 2,
            head: Seq(3),
            expired_to: Seq(4),
            closed: true,
            gone: vec![],
            edges: vec![(EdgeId::from_bytes([6; 16]), UnixMillis(5))],
            snapshot_epoch: 7,
            snapshot_at: Seq(8),
            applied: Seq(9),
            stated: UnixMillis(10),
            stated_at: Seq(11),
        };
        let rest = [&[1, 2, 3, 4, 1, 0, 1][..], &[6; 16], &[5, 7, 8, 9]].concat();
        assert_eq!(encode_group_head(&head), [&[2][..], &rest, &[10, 11]].concat());
        // As it was written before: nobody knows when its state was said.
        let before = GroupHead { stated: UnixMillis(0), stated_at: Seq::ZERO, ..head.clone() };
        assert_eq!(decode_group_head(&[&[1][..], &rest].concat()).expect("readable"), before);
        assert_eq!(decode_group_head(&encode_group_head(&head)).expect("readable"), head);
        assert!(decode_group_head(&[&[3][..], &rest].concat()).is_err() && decode_group_head(&[]).is_err());
        let roster = GroupRoster { epoch: 1, owner: Some(addr(2, 1).account), admins: vec![], devices: vec![addr(3, 4)] };
        assert_eq!(encode(&roster), [&[1, 1, 1][..], &[2; 16], &[0, 1], &[3; 16], &[4]].concat());
    }

    #[test]
    fn keys_sort_as_their_parts() {
        let group = |n| GroupId::from_bytes([n; 16]);
        assert!(group_item(group(1), Seq(255)) < group_item(group(1), Seq(256)));
        assert!(group_item(group(1), Seq::MAX) < group_item(group(2), Seq::ZERO));
        assert!(group_member(addr(1, 1).account, group(255)) < group_member(addr(2, 1).account, group(0)));
    }

    proptest! {
        #[test]
        fn group_items_round_trip(seq: u64, number: u64, by_server: bool, content: Vec<u8>) {
            let item = GroupItem {
                seq: Seq(seq),
                after: Seq(number),
                accepted: UnixMillis(number / 2),
                epoch: number / 3,
                sender: (!by_server).then(|| addr(7, 3)),
                kind: GroupItemKind::Proposal,
                client_message_id: ClientMessageId(number / 5),
                content: content.into(),
            };
            let mut out = Vec::new();
            encode_group_item(&item, &mut out);
            prop_assert_eq!(group_item_accepted(&out).expect("well formed"), item.accepted);
            prop_assert_eq!(decode_group_item(Seq(seq), out.into()).expect("well formed"), item);
        }

        #[test]
        fn trees_and_states_round_trip(at: u64, bytes: Vec<u8>) {
            let blob = decode_group_blob(encode_group_blob(&bytes).into()).expect("well formed");
            prop_assert_eq!(&blob[..], &bytes[..]);
            let (seq, tree) = decode_group_tree(encode_group_tree(Seq(at), &bytes).into()).expect("well formed");
            prop_assert_eq!((seq, &tree[..]), (Seq(at), &bytes[..]));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = parse_group_item(&bytes);
            let _ = parse_group_member(&bytes);
            let _ = group_item_accepted(&bytes);
            let _ = group_tree_at(&bytes);
            let _ = decode_group_head(&bytes);
            let _ = decode::<GroupRoster>(&bytes, "a roster");
            let _ = decode_group_blob(bytes.clone().into());
            let _ = decode_group_tree(bytes.clone().into());
            let _ = decode_group_item(Seq(1), bytes.into());
        }
    }
}
