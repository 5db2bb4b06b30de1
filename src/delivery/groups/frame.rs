//! A group's item as bytes of a `ServerBatch`: made once, whatever the number of followers.

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::ids::GroupId;
use crate::store::groups::{GroupItem, GroupItemKind};
use crate::wire::stream::{self, ServerFrame, server_frame::Frame};

/// The field of `ServerBatch` that holds its frames.
const FRAMES: u32 = 1;

/// The stream's number for what an item is.
pub const fn kind(kind: GroupItemKind) -> stream::GroupItemKind {
    match kind {
        GroupItemKind::Created => stream::GroupItemKind::Created,
        GroupItemKind::Commit => stream::GroupItemKind::Commit,
        GroupItemKind::Proposal => stream::GroupItemKind::Proposal,
        GroupItemKind::Message => stream::GroupItemKind::Message,
        GroupItemKind::Closed => stream::GroupItemKind::Closed,
    }
}

/// Appends an item as a frame. Batches are fields that repeat, so frames can be put behind each other.
pub fn encode(group: GroupId, item: &GroupItem, out: &mut BytesMut) {
    let frame = ServerFrame {
        frame: Some(Frame::GroupItem(stream::GroupItem {
            group_id: Bytes::copy_from_slice(group.as_bytes()),
            seq: item.seq.0,
            after: item.after.0,
            kind: kind(item.kind).into(),
            epoch: item.epoch,
            sender_account: item.sender.map_or_else(Bytes::new, |sender| Bytes::copy_from_slice(sender.account.as_bytes())),
            sender_device: item.sender.map_or(0, |sender| sender.device.get().into()),
            client_message_id: item.client_message_id.0,
            accepted_ms: item.accepted.0,
            content: item.content.clone(),
        })),
    };
    let len = frame.encoded_len();
    out.reserve(len + 8);
    encode_key(FRAMES, WireType::LengthDelimited, out);
    encode_varint(len as u64, out);
    frame.encode_raw(out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::UnixMillis;
    use crate::ids::{ClientMessageId, Seq};

    #[test]
    fn numbers_are_those_of_the_schema_and_frames_stand_behind_each_other() {
        let item = |seq: u64, of: GroupItemKind| GroupItem {
            seq: Seq(seq),
            after: Seq(seq - 1),
            accepted: UnixMillis(7),
            epoch: 3,
            sender: None,
            kind: of,
            client_message_id: ClientMessageId(0),
            content: Bytes::from_static(b"x"),
        };
        let kinds = [GroupItemKind::Created, GroupItemKind::Commit, GroupItemKind::Proposal, GroupItemKind::Message, GroupItemKind::Closed];
        let mut out = BytesMut::new();
        for (n, of) in kinds.into_iter().enumerate() {
            assert_eq!(kind(of) as i32, of as i32);
            encode(GroupId::from_bytes([9; 16]), &item(n as u64 + 1, of), &mut out);
        }
        let batch = stream::ServerBatch::decode(out.freeze()).expect("valid");
        assert_eq!(batch.frames.len(), kinds.len());
        let Some(Frame::GroupItem(last)) = &batch.frames[4].frame else { panic!("an item") };
        assert_eq!((last.seq, last.after, last.kind(), last.sender_device), (5, 4, stream::GroupItemKind::Closed, 0));
    }
}
