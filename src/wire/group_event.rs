//! Topic `groups`, keyed by the group: what is submitted to a group, in the order that decides. The codec is [`super::event`]'s.

use bincode::{BorrowDecode, Encode};

use crate::clock::UnixMillis;
use crate::ids::{ClientMessageId, DeviceAddr, EdgeId, GroupId, Seq};
use crate::wire::event::RequestId;

/// Something that one group meets.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub struct GroupEvent<'a> {
    /// The key of the record.
    pub group: GroupId,
    /// When the edge took it.
    pub at: UnixMillis,
    /// Where the verdict goes; nowhere, if nobody waits.
    pub reply_to: Option<RequestId>,
    /// What it is.
    pub body: GroupEventBody<'a>,
}

/// What a group meets. Everything is checked by the projector in log order; what is refused changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Encode, BorrowDecode)]
pub enum GroupEventBody<'a> {
    /// Somebody creates the group, alone in it.
    Created {
        /// Who.
        by: DeviceAddr,
        /// An MLSMessage with the GroupInfo of epoch 0, without tree.
        group_info: &'a [u8],
        /// The ratchet tree, as in RFC 9420's extension.
        tree: &'a [u8],
    },
    /// A commit that wants to begin the next epoch.
    Commit {
        /// Who submits it: must be who signed it.
        by: DeviceAddr,
        /// An MLSMessage with a PublicMessage.
        commit: &'a [u8],
        /// An MLSMessage with the Welcome of all that are added, if any are.
        welcome: Option<&'a [u8]>,
        /// An MLSMessage with the GroupInfo of the new epoch, without tree.
        group_info: &'a [u8],
    },
    /// A proposal of a member: to leave.
    Proposal {
        /// Who submits it: must be who signed it.
        by: DeviceAddr,
        /// An MLSMessage with a PublicMessage.
        proposal: &'a [u8],
    },
    /// A message for all members, opaque here.
    Message {
        /// Who.
        by: DeviceAddr,
        /// The sender's counter for this group; a repeat is delivered once.
        client_message_id: ClientMessageId,
        /// The epoch that it was encrypted in.
        epoch: u64,
        /// An MLSMessage with a PrivateMessage.
        content: &'a [u8],
    },
    /// Devices are no more: the server proposes to remove their leaves until that is done.
    DevicesGone {
        /// Which ones; those that are not in the group are passed over.
        devices: Vec<DeviceAddr>,
    },
    /// The owner closes the group: nothing is accepted any more.
    Closed {
        /// Who.
        by: DeviceAddr,
    },
    /// An edge holds streams that follow the group, or still does.
    EdgeAttached {
        /// Which one.
        edge: EdgeId,
    },
    /// It does no longer.
    EdgeDetached {
        /// Which one.
        edge: EdgeId,
    },
    /// Items up to and including the seq are dropped: their time is over.
    Expired {
        /// The last of them.
        to: Seq,
    },
    /// A part of the group as a projector had it, which alone says this: from here a view goes on that does not know the group, or missed some
    /// of it, because the log has not kept all of it. Whoever knows the group takes nothing from it.
    State {
        /// What stands before this position went into it.
        next: Seq,
        /// The last event that did.
        applied: Seq,
        /// The epoch.
        epoch: u64,
        /// Which part of the bytes, from 0; the last one makes it whole.
        part: u16,
        /// How many parts there are; all have the same `at` and `next`.
        parts: u16,
        /// See `projector::groups::carried`.
        bytes: &'a [u8],
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{AccountId, DeviceId};
    use crate::wire::event::{VERSION, decode, encode};

    fn addr(account: u8, device: u32) -> DeviceAddr {
        DeviceAddr { account: AccountId::from_bytes([account; 16]), device: DeviceId::new(device).expect("valid") }
    }

    fn event(body: GroupEventBody<'_>) -> GroupEvent<'_> {
        GroupEvent { group: GroupId::from_bytes([9; 16]), at: UnixMillis(1), reply_to: None, body }
    }

    /// One of each kind, with these bytes in it.
    fn bodies(bytes: &[u8], number: u64) -> Vec<GroupEventBody<'_>> {
        let (by, edge) = (addr(7, 3), EdgeId::from_bytes([8; 16]));
        vec![
            GroupEventBody::Created { by, group_info: bytes, tree: b"t" },
            GroupEventBody::Commit { by, commit: bytes, welcome: Some(bytes), group_info: b"i" },
            GroupEventBody::Commit { by, commit: b"c", welcome: None, group_info: bytes },
            GroupEventBody::Proposal { by, proposal: bytes },
            GroupEventBody::Message { by, client_message_id: ClientMessageId(number), epoch: number / 2, content: bytes },
            GroupEventBody::DevicesGone { devices: bytes.iter().take(9).map(|byte| addr(*byte, 1)).collect() },
            GroupEventBody::Closed { by },
            GroupEventBody::EdgeAttached { edge },
            GroupEventBody::EdgeDetached { edge },
            GroupEventBody::Expired { to: Seq(number) },
            GroupEventBody::State { next: Seq(number), applied: Seq(number / 2), epoch: number / 3, part: 1, parts: 2, bytes },
        ]
    }

    /// Golden vectors: what is on the log must stay readable.
    #[test]
    fn bytes_of_events_are_stable() {
        let by = [&[7; 16][..], &[3]].concat();
        let edge = vec![8; 16];
        let golden: [(u8, Vec<u8>); 11] = [
            (0, [&by[..], &[2, b'x', b'y', 1, b't']].concat()),
            (1, [&by[..], &[2, b'x', b'y', 1, 2, b'x', b'y', 1, b'i']].concat()),
            (1, [&by[..], &[1, b'c', 0, 2, b'x', b'y']].concat()),
            (2, [&by[..], &[2, b'x', b'y']].concat()),
            (3, [&by[..], &[5, 2, 2, b'x', b'y']].concat()),
            (4, [&[2][..], &[b'x'; 16], &[1], &[b'y'; 16], &[1]].concat()),
            (5, by.clone()),
            (6, edge.clone()),
            (7, edge),
            (8, vec![5]),
            (9, vec![5, 2, 1, 1, 2, 2, b'x', b'y']),
        ];
        for (body, (kind, rest)) in bodies(b"xy", 5).into_iter().zip(golden) {
            let want = [&[VERSION][..], &[9; 16], &[1, 0, kind], &rest].concat();
            assert_eq!(encode(&event(body)), want);
        }
        let reply_to = Some(RequestId { edge: EdgeId::from_bytes([6; 16]), number: 4 });
        let asked = GroupEvent { reply_to, ..event(GroupEventBody::Closed { by: addr(7, 3) }) };
        assert_eq!(encode(&asked), [&[VERSION][..], &[9; 16], &[1, 1], &[6; 16], &[4, 5], &by].concat());
    }

    proptest! {
        #[test]
        fn events_survive_the_round_trip(bytes in prop::collection::vec(any::<u8>(), 0..300), number: u64) {
            for body in bodies(&bytes, number) {
                let event = event(body);
                let encoded = encode(&event);
                prop_assert_eq!(decode::<GroupEvent<'_>>(&encoded).expect("well formed"), event);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(rest in prop::collection::vec(any::<u8>(), 0..400), kind in 0u8..11) {
            let _ = decode::<GroupEvent<'_>>(&rest);
            let bytes = [&[VERSION][..], &[9; 16], &[1, 0, kind], &rest].concat();
            let _ = decode::<GroupEvent<'_>>(&bytes);
        }
    }
}
