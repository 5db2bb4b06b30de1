//! What the delivery service knows of groups: [`GroupStore`]. Rebuilt from the log (topic `groups`), like the view of inboxes.
//!
//! What is written is written before anybody is told of it, so that what an edge hears of can be read. A group's items are kept for
//! `limits::ENVELOPE_TTL_MS` for members that were away: each once, whatever the group's size.

use async_trait::async_trait;
use bytes::Bytes;

use super::{Mark, StoreError};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, EdgeId, GroupId, Offset, Partition, Seq};

/// A group, as small as it can be read: everything that changes with each item.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct GroupHead {
    /// When it was created.
    pub created: UnixMillis,
    /// Its epoch.
    pub epoch: u64,
    /// Its last item.
    pub head: Seq,
    /// Items up to here are gone: they expired.
    pub expired_to: Seq,
    /// Nothing is accepted any more.
    pub closed: bool,
    /// Leaves of devices that are no more: proposed to be removed in each epoch until a commit does it.
    pub gone: Vec<DeviceAddr>,
    /// Edges that hold streams of it, and when each said so last.
    pub edges: Vec<(EdgeId, UnixMillis)>,
    /// The epoch of its snapshot; commits behind that are among the items.
    pub snapshot_epoch: u64,
    /// The item that began the snapshot's epoch.
    pub snapshot_at: Seq,
    /// The last event that went into it: what is replayed up to there has had its effect already.
    pub applied: Seq,
    /// When its state was said on the log last: with its creation, or by a state event. 0: nobody knows.
    pub stated: UnixMillis,
    /// Where.
    pub stated_at: Seq,
}

/// Who is in a group.
#[derive(Debug, Clone, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct GroupRoster {
    /// The epoch that it is of.
    pub epoch: u64,
    /// The owner's account.
    pub owner: Option<AccountId>,
    /// Accounts of admins, ascending.
    pub admins: Vec<AccountId>,
    /// Devices that have a leaf, ascending.
    pub devices: Vec<DeviceAddr>,
}

/// Something that all members get, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupItem {
    /// Its position in the group: of the group's partition of the log.
    pub seq: Seq,
    /// The item before it; `ZERO` for the first.
    pub after: Seq,
    /// When it was accepted.
    pub accepted: UnixMillis,
    /// The epoch that it is of: for a commit the one that it ends.
    pub epoch: u64,
    /// Who sent it; `None`: the server.
    pub sender: Option<DeviceAddr>,
    /// What it is.
    pub kind: GroupItemKind,
    /// The sender's counter, of messages; else 0.
    pub client_message_id: ClientMessageId,
    /// An MLSMessage; empty for [`GroupItemKind::Created`] and [`GroupItemKind::Closed`].
    pub content: Bytes,
}

impl GroupItem {
    /// About how many bytes it costs to hold or to send.
    pub fn cost(&self) -> usize {
        64 + self.content.len()
    }
}

/// What an item is; the numbers are those of `GroupItemKind` in `stream.proto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bincode::Encode, bincode::Decode)]
#[repr(u8)]
pub enum GroupItemKind {
    /// The group begins.
    Created = 1,
    /// A commit that was accepted.
    Commit = 2,
    /// A proposal of the current epoch.
    Proposal = 3,
    /// A message.
    Message = 4,
    /// The group was closed.
    Closed = 5,
}

/// What applying events of one partition of `groups` changes. A store that can't do all of it atomically writes in the order of the fields,
/// the position last; each row counts as written at its group's `applied` (items and trees at their own seq), and of two writes of a row
/// the one with the higher position stands. A drop or a closing beats a put at the same position or an earlier one.
///
/// So what a crash leaves half done is ahead of its head at most: the head says which snapshot to go on from, and it and all items behind
/// it are there.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GroupWrite {
    /// Items to add.
    pub items: Vec<(GroupId, GroupItem)>,
    /// Public states to go on from (`mls::public::Public`, saved), the epoch of each, and the event. Those of earlier epochs go, but not
    /// before the head that names this one is written.
    pub snapshots: Vec<(GroupId, u64, Seq, Vec<u8>)>,
    /// Trees that joiners of an epoch need, and the event that began the epoch. Kept as long as items are.
    pub trees: Vec<(GroupId, u64, Seq, Vec<u8>)>,
    /// GroupInfo of the current epoch, and the event.
    pub infos: Vec<(GroupId, Seq, Vec<u8>)>,
    /// Who is in it now, and the event.
    pub rosters: Vec<(GroupId, Seq, GroupRoster)>,
    /// Accounts that came into a group or went out of it (`false`), and the event.
    pub members: Vec<(AccountId, GroupId, Seq, bool)>,
    /// Dedupe marks of senders; each says itself which events it holds.
    pub marks: Vec<(GroupId, DeviceAddr, Mark)>,
    /// Items up to and including the seq go, and the trees of epochs that began there: they expired. Commits behind a group's snapshot are
    /// needed: whoever drops them has written a later snapshot.
    pub drop_to: Vec<(GroupId, Seq)>,
    /// Groups as they are now.
    pub heads: Vec<(GroupId, GroupHead)>,
    /// Groups that were closed, and the event: snapshots, info, trees and marks go. Head, roster and items stay as long as members may read
    /// them.
    pub closed: Vec<(GroupId, Seq)>,
    /// Closed groups of which nothing is left to read, and the event: head and roster go.
    pub removed: Vec<(GroupId, Seq)>,
    /// The next record to apply.
    pub position: Option<(Partition, Offset)>,
}

/// What the delivery service knows of groups. Written only by the projector.
#[async_trait]
pub trait GroupStore: Send + Sync + 'static {
    /// The next record of `groups` to apply; 0 if none was.
    async fn group_position(&self, partition: Partition) -> Result<Offset, StoreError>;
    /// Makes all of it visible before it returns. Need not be on disk when it returns: the log is. What is on disk after a crash is a prefix.
    async fn write_groups(&self, write: GroupWrite) -> Result<(), StoreError>;
    /// A group.
    async fn group(&self, id: GroupId) -> Result<Option<GroupHead>, StoreError>;
    /// Who is in it.
    async fn group_roster(&self, id: GroupId) -> Result<Option<GroupRoster>, StoreError>;
    /// The GroupInfo of its epoch.
    async fn group_info(&self, id: GroupId) -> Result<Option<Bytes>, StoreError>;
    /// Its snapshot of an epoch: the one that its head names is there.
    async fn group_snapshot(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError>;
    /// The tree of an epoch that somebody joined in.
    async fn group_tree(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError>;
    /// Items behind a seq in order: at most `items_max`, and no more once `bytes_max` is reached (but at least one, if there is one).
    async fn group_items(&self, id: GroupId, after: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<GroupItem>, StoreError>;
    /// The marks that exist, in the order asked.
    async fn group_marks(&self, id: GroupId, senders: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError>;
    /// The groups that an account is in, in ascending order, behind `after`: at most `max`.
    async fn groups_of(&self, account: AccountId, after: Option<GroupId>, max: usize) -> Result<Vec<GroupId>, StoreError>;
    /// Groups with items accepted before the time, and the seq up to which all are: at most `max`, of groups behind `after`. An empty answer
    /// ends the walk.
    async fn groups_expired(&self, before: UnixMillis, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, Seq)>, StoreError>;
    /// All groups, in an order of the store's own, behind `after`: at most `max`. An empty answer ends the walk; a group that is made while it goes
    /// on may be missed.
    async fn group_heads(&self, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, GroupHead)>, StoreError>;
}
