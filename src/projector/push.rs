//! What a projector tells an edge. On the embedded profile both are one process and this is a call; on the
//! cluster it is the `push` topic (`push_topic`).
//!
//! Nothing is lost if a push is lost, or comes twice, or from two projectors: each live item names the one before it
//! ([`Push::Item::after`]), and a stream that does not have that one attaches anew and catches up from the store. An attachment has a
//! number of its own each time, so that what was on its way for an earlier one is not taken for this one's. And a projector stores no
//! position before the pushes that it covers are safe ([`PushBus::settled`]), so that a lost last item comes again.

use std::collections::HashMap;

use async_trait::async_trait;
use futures_util::future::BoxFuture;

use crate::ids::{AccountId, AttachId, DeviceAddr, EdgeId, GroupId, Seq};
use crate::log::AppendError;
use crate::store::groups::{GroupItem, GroupRoster};
use crate::store::{InboxState, PendingItem};
use crate::wire::event::{RequestId, TraceContext};

/// Something for one edge.
#[derive(Debug, Clone)]
pub enum Push {
    /// A live item for an attached device, in seq order behind [`Push::Attached`].
    Item {
        /// The device.
        device: DeviceAddr,
        /// Its attachment.
        attach: AttachId,
        /// The seq of the item before it in this inbox, or anything below the attachment's switch.
        after: Seq,
        /// The item.
        item: PendingItem,
        /// If its message is traced.
        trace: Option<Box<TraceContext>>,
    },
    /// The attachment was met in log order at `at`: everything pending up to there is in the store; what follows comes as
    /// [`Push::Item`]. This is the exact switch from backlog to live.
    Attached {
        /// The device.
        device: DeviceAddr,
        /// Its attachment.
        attach: AttachId,
        /// The switch.
        at: Seq,
        /// The inbox at that point.
        inbox: InboxState,
    },
    /// A newer stream of the device took over.
    Replaced {
        /// The device.
        device: DeviceAddr,
        /// The attachment that is over.
        attach: AttachId,
    },
    /// The device or its account is gone.
    Revoked {
        /// The device.
        device: DeviceAddr,
    },
    /// Items are stored for a device without a stream: wakes long-polls. A hint; losing it costs a poll.
    Waiting {
        /// The device.
        device: DeviceAddr,
    },
    /// The device's inbox is at its cap (senders are refused), or no more.
    Full {
        /// The device.
        device: DeviceAddr,
        /// At its cap.
        full: bool,
    },
    /// What became of a directory command.
    Verdict {
        /// Which one.
        request: RequestId,
        /// The verdict.
        verdict: Verdict,
    },
    /// Drop what is cached of the account.
    AccountChanged {
        /// Which one.
        account: AccountId,
    },
    /// A group's next item, for an edge that said that it follows. It is in the store. A hole before it ([`GroupItem::after`]) or a lost last
    /// one costs members a page.
    GroupItem {
        /// Which group.
        group: GroupId,
        /// The item.
        item: GroupItem,
        /// Who is in the group from here on, if that changed.
        roster: Option<Box<GroupRoster>>,
    },
    /// The edge's attachment to a group was met: items behind `head` come by themselves.
    GroupAttached {
        /// Which group.
        group: GroupId,
        /// Its last item and epoch; `None`: there is no such group, or it is closed.
        at: Option<(Seq, u64)>,
    },
    /// What became of something that was submitted to a group.
    GroupVerdict {
        /// Which request.
        request: RequestId,
        /// The verdict.
        verdict: GroupVerdict,
    },
}

/// What became of something that was submitted to a group.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub enum GroupVerdict {
    /// Accepted: the item that it is now, and the group's epoch behind it.
    Done {
        /// The item.
        seq: Seq,
        /// The epoch.
        epoch: u64,
    },
    /// Of another epoch than the group's: somebody else was first.
    Conflict {
        /// The group's epoch.
        epoch: u64,
        /// The last commit: what the sender has to take in.
        head: Seq,
    },
    /// There is a group of this id already.
    Exists,
    /// There is no such group, or it is closed.
    NotFound,
    /// The rules of groups forbid it; why.
    Denied(String),
    /// Not valid; why.
    Invalid(String),
}

/// What became of a directory command.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub enum Verdict {
    /// Applied and visible in the store; with the device it made or changed, if any.
    Done(Option<DeviceAddr>),
    /// No such account or device, or it is deleted.
    NotFound,
    /// The account was deleted.
    AccountDeleted,
    /// The identity belongs to another account, or the last link can't be taken away.
    Conflict,
    /// A cap of the account is reached.
    LimitReached,
}

/// Carries pushes to edges, in order for each edge. A socket that can't take more loses its live feed and catches up; the bus itself
/// may make the projector wait while it is full, and never drops.
#[async_trait]
pub trait PushBus: Send + Sync + 'static {
    /// A worker begins, at its stored positions: that pushes of an earlier one were lost is no failure of this one's.
    fn begin(&self) {}
    /// To one edge. If there is no such edge any more its attachments are over, which the next attachment of each device says.
    async fn push(&self, edge: EdgeId, batch: Vec<Push>);
    /// To all edges.
    async fn broadcast(&self, batch: Vec<Push>);
    /// Ends when everything pushed so far can't be lost any more with this projector; an error if some of it was lost.
    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>>;
}

/// What goes to several edges, in its order for each.
pub(super) async fn push_all(bus: &dyn PushBus, pushes: impl Iterator<Item = (EdgeId, Push)>) {
    let mut by_edge: HashMap<EdgeId, Vec<Push>> = HashMap::with_capacity(1);
    for (edge, push) in pushes {
        by_edge.entry(edge).or_default().push(push);
    }
    for (edge, batch) in by_edge {
        bus.push(edge, batch).await;
    }
}
