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
}
