//! The edge of groups, free of any transport: what is submitted, what is read, and who follows.
//!
//! What changes a group is an event on `groups` that the group's projector answers with a verdict; a message is done once it is on the log.
//! Reads come from the store. Who follows a group gets its items as the projector pushes them to this edge: encoded once, shared by all.

mod error;
mod feeds;
mod frame;
mod members;
mod messages;
mod reads;
#[cfg(test)]
mod tests;
mod trees;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use quick_cache::sync::Cache;

pub use error::GroupError;
pub use feeds::Arrived;
pub use frame::kind;
pub use members::Known;
pub use messages::{GroupMessage, parse};
pub use reads::{Info, Member, Page};

use crate::clock::{Clock, Random};
use crate::ids::{DeviceAddr, EdgeId, GroupId, Partition, Seq};
use crate::limits;
use crate::log::{EventLog, Topic, TopicPartition};
use crate::metrics;
use crate::mls::public;
use crate::projector::push::{GroupVerdict, Push};
use crate::rate::Keyed;
use crate::store::groups::GroupStore;
use crate::waiters::{Full, Waiters};
use crate::wire::event::{self, RequestId};
use crate::wire::group_event::{GroupEvent, GroupEventBody};

use feeds::Feeds;
use members::Members;
use trees::Trees;

/// What a [`GroupService`] is made of.
pub struct Parts {
    /// Where events go.
    pub log: Arc<dyn EventLog>,
    /// Where groups are read.
    pub store: Arc<dyn GroupStore>,
    /// Stamps events.
    pub clock: Arc<dyn Clock>,
    /// For MLS.
    pub random: Arc<dyn Random>,
    /// Where verdicts and items come to.
    pub edge: EdgeId,
    /// Messages a second of one device, with a burst of as many; 0 for no limit.
    pub messages_per_s: u32,
    /// Commits, proposals and new groups a minute of one device; 0 for no limit.
    pub changes_per_min: u32,
}

/// A commit with what belongs to it, each an MLSMessage (RFC 9420).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// A PublicMessage with the commit.
    pub commit: Vec<u8>,
    /// The Welcome, if it adds anybody.
    pub welcome: Option<Vec<u8>>,
    /// The GroupInfo of the epoch that it begins, without tree.
    pub group_info: Vec<u8>,
}

/// The edge of groups.
pub struct GroupService {
    parts: Parts,
    members: Members,
    feeds: Feeds,
    trees: Trees,
    waiters: Waiters<GroupVerdict>,
    /// The highest client message id of each sender in a group that passed here, or was applied before.
    highest: Cache<(GroupId, DeviceAddr), Arc<AtomicU64>>,
    messages: Keyed<DeviceAddr>,
    changes: Keyed<DeviceAddr>,
    follows: Keyed<DeviceAddr>,
    behind: AtomicBool,
}

impl std::fmt::Debug for GroupService {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GroupService({})", self.parts.edge)
    }
}

impl GroupService {
    /// An edge's groups.
    pub fn new(parts: Parts) -> Self {
        let limited = parts.messages_per_s > 0;
        Self {
            members: Members::new(Arc::clone(&parts.store)),
            feeds: Feeds::default(),
            trees: Trees::new(),
            waiters: Waiters::default(),
            highest: Cache::new(limits::CACHED_MARKS),
            messages: Keyed::new(parts.messages_per_s, Duration::from_secs(1), parts.messages_per_s),
            changes: Keyed::new(parts.changes_per_min, Duration::from_secs(60), parts.changes_per_min),
            follows: Keyed::new(
                if limited { limits::GROUP_FOLLOWS_PER_S } else { 0 },
                Duration::from_secs(1),
                2 * limits::GROUPS_PER_ACCOUNT as u32,
            ),
            behind: AtomicBool::new(false),
            parts,
        }
    }

    /// This edge.
    pub const fn edge(&self) -> EdgeId {
        self.parts.edge
    }

    /// The groups' projector is too far behind acceptance for more messages to be taken, or no more.
    pub fn set_behind(&self, behind: bool) {
        self.behind.store(behind, Ordering::Relaxed);
    }

    /// Forgets devices whose rate has recovered; called now and then.
    pub fn tidy(&self) {
        self.messages.tidy();
        self.changes.tidy();
        self.follows.tidy();
    }

    fn route(&self, group: GroupId) -> TopicPartition {
        let partition = Partition::of_group(&group, self.parts.log.partitions(Topic::Groups));
        TopicPartition { topic: Topic::Groups, partition }
    }

    /// A group that is there and open.
    async fn open(&self, group: GroupId) -> Result<Known, GroupError> {
        self.members.known(group).await?.filter(|known| !known.head.closed).ok_or_else(GroupError::no_group)
    }

    /// The same for one of its devices.
    async fn open_to(&self, group: GroupId, device: DeviceAddr) -> Result<Known, GroupError> {
        self.members.admit(group, self.open(group).await?, device).await
    }

    /// Appends an event and waits until the group's projector has decided and the store shows it.
    async fn decide(&self, group: GroupId, body: GroupEventBody<'_>) -> Result<(Seq, u64), GroupError> {
        let waiter = self.waiters.wait().map_err(|Full| GroupError::Unavailable)?;
        let reply_to = Some(RequestId { edge: self.parts.edge, number: waiter.number() });
        let payload = event::encode(&GroupEvent { group, at: self.parts.clock.now(), reply_to, body });
        let verdict = async {
            self.parts.log.append(self.route(group), payload).await?;
            waiter.verdict().await.ok_or(GroupError::OutcomeUnknown)
        };
        match tokio::time::timeout(Duration::from_millis(limits::VERDICT_MS), verdict).await {
            Ok(verdict) => error::outcome(verdict?),
            Err(_) => Err(GroupError::OutcomeUnknown),
        }
    }

    fn may_change(&self, by: DeviceAddr) -> Result<(), GroupError> {
        self.changes.check(&by).map_err(|retry_after_ms| {
            metrics::observe_rate_limited(metrics::RateScope::GroupChanges);
            GroupError::RateLimited { retry_after_ms }
        })
    }

    /// Creates a group with its creator alone in it: from the GroupInfo of epoch 0 (an MLSMessage) and its tree. Again: the same answer.
    pub async fn create(&self, by: DeviceAddr, group_info: &[u8], tree: &[u8]) -> Result<(GroupId, Seq, u64), GroupError> {
        self.may_change(by)?;
        sizes(&[(group_info, limits::COMMIT_BYTES), (tree, limits::GROUP_TREE_BYTES)])?;
        let group = public::group_of(group_info).map_err(|refused| GroupError::BadRequest(refused.to_string().into()))?;
        let groups = self.parts.store.groups_of(by.account, None, limits::GROUPS_PER_ACCOUNT).await?;
        if groups.len() >= limits::GROUPS_PER_ACCOUNT && !groups.contains(&group) {
            return Err(GroupError::LimitReached("the account is in as many groups as it may be"));
        }
        let (seq, epoch) = self.decide(group, GroupEventBody::Created { by, group_info, tree }).await?;
        Ok((group, seq, epoch))
    }

    /// Submits a commit: the item that it is, and the epoch that it began. Again by its own sender: the same answer.
    pub async fn commit(&self, by: DeviceAddr, group: GroupId, commit: &Commit) -> Result<(Seq, u64), GroupError> {
        self.may_change(by)?;
        let Commit { commit, welcome, group_info } = commit;
        let welcome = welcome.as_deref();
        sizes(&[(commit, limits::COMMIT_BYTES), (group_info, limits::COMMIT_BYTES)])?;
        sizes(welcome.map(|welcome| (welcome, limits::COMMIT_BYTES)).as_slice())?;
        // Who comes back by an external commit has a leaf as well: the one that it replaces.
        self.open_to(group, by).await?;
        self.decide(group, GroupEventBody::Commit { by, commit, welcome, group_info }).await
    }

    /// Submits a proposal: its item, and the group's epoch.
    pub async fn propose(&self, by: DeviceAddr, group: GroupId, proposal: &[u8]) -> Result<(Seq, u64), GroupError> {
        self.may_change(by)?;
        sizes(&[(proposal, limits::KEY_PACKAGE_BYTES)])?;
        self.open_to(group, by).await?;
        self.decide(group, GroupEventBody::Proposal { by, proposal }).await
    }

    /// Closes a group. Again: done as well.
    pub async fn close(&self, by: DeviceAddr, group: GroupId) -> Result<(), GroupError> {
        self.may_change(by)?;
        let known = self.members.known(group).await?.ok_or_else(GroupError::no_group)?.account(by.account)?;
        if known.roster.owner != Some(by.account) {
            return Err(GroupError::Forbidden("only the owner closes a group".into()));
        }
        if known.head.closed {
            return Ok(());
        }
        self.decide(group, GroupEventBody::Closed { by }).await.map(|_| ())
    }

    /// A push that is about groups, but an item; those are taken in runs, by [`Self::deliver`].
    pub fn pushed(&self, push: Push) {
        match push {
            Push::GroupVerdict { request, verdict } => self.waiters.complete(request.number, verdict),
            Push::GroupAttached { group, at } => self.feeds.attached(group, at),
            _ => {}
        }
    }
}

fn sizes(parts: &[(&[u8], usize)]) -> Result<(), GroupError> {
    if parts.iter().any(|(bytes, _)| bytes.is_empty()) {
        return Err(GroupError::BadRequest("a part of the request is empty".into()));
    }
    if parts.iter().any(|(bytes, max)| bytes.len() > *max) {
        return Err(GroupError::TooLarge("a part of the request is larger than groups take"));
    }
    Ok(())
}
