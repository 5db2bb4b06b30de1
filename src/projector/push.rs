//! What a projector tells an edge. On the embedded profile both are one process and this is a call; on the
//! cluster it is the `push` topic.

use crate::ids::{AccountId, AttachId, DeviceAddr, EdgeId, Seq};
use crate::store::{InboxState, PendingItem};
use crate::wire::event::RequestId;

/// Something for one edge.
#[derive(Debug, Clone)]
pub enum Push {
    /// A live item for an attached device, in seq order behind [`Push::Attached`].
    Item {
        /// The device.
        device: DeviceAddr,
        /// Its attachment.
        attach: AttachId,
        /// The item.
        item: PendingItem,
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
}

/// What became of a directory command.
#[derive(Debug, Clone, PartialEq, Eq)]
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

/// Carries pushes to edges. Never blocks; an edge that can't take more loses its live feed and catches up.
pub trait PushBus: Send + Sync + 'static {
    /// To one edge, in order. False: there is no such edge any more, its attachments are over.
    fn push(&self, edge: EdgeId, batch: Vec<Push>) -> bool;
    /// To all edges.
    fn broadcast(&self, push: Push);
}
