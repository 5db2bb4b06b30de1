//! What members read: their groups, who is in them, items, and what joiners need.

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use super::GroupService;
use super::error::GroupError;
use super::members::Known;
use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId, Seq};
use crate::limits;
use crate::mls::profile::Role;
use crate::store::groups::{GroupHead, GroupItem, GroupRoster};

/// An account that is in a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Which one.
    pub account: AccountId,
    /// What it may do.
    pub role: Role,
    /// Its devices that have a leaf, ascending.
    pub devices: Vec<DeviceId>,
}

/// Items of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// In order.
    pub items: Vec<GroupItem>,
    /// The group's last item, at least the last one of the page.
    pub head: Seq,
    /// The group's epoch.
    pub epoch: u64,
    /// Items up to here are gone.
    pub expired_to: Seq,
}

/// What an external commit needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// The epoch of both.
    pub epoch: u64,
    /// An MLSMessage with the GroupInfo, without tree.
    pub group_info: Bytes,
    /// The tree.
    pub tree: Bytes,
}

impl GroupService {
    /// The groups that an account is in.
    pub async fn list(&self, account: AccountId) -> Result<Vec<(GroupId, GroupHead)>, GroupError> {
        let groups = self.parts.store.groups_of(account, None, limits::GROUPS_PER_ACCOUNT).await?;
        let heads = stream::iter(groups).map(|group| async move { Ok((group, self.parts.store.group(group).await?)) });
        let heads: Vec<_> = heads.buffered(limits::GROUP_LOOKS_AT_ONCE).try_collect::<Vec<_>>().await.map_err(|error: GroupError| error)?;
        Ok(heads.into_iter().filter_map(|(group, head)| Some((group, head?))).collect())
    }

    /// A group for an account that is in it, closed ones included.
    pub async fn details(&self, account: AccountId, group: GroupId) -> Result<(GroupHead, Vec<Member>), GroupError> {
        let known = self.existing(group).await?.account(account)?;
        Ok((known.head, members(&known.roster)))
    }

    async fn existing(&self, group: GroupId) -> Result<Known, GroupError> {
        self.members.known(group).await?.ok_or_else(GroupError::no_group)
    }

    /// Items behind `after`, for a member.
    pub async fn items(&self, device: DeviceAddr, group: GroupId, after: Seq, items_max: usize) -> Result<Page, GroupError> {
        let head = self.members.known_to(group, device).await?.head;
        let items = self.parts.store.group_items(group, after, items_max, limits::INBOX_PAGE_BYTES).await?;
        let last = items.last().map_or(Seq::ZERO, |item| item.seq);
        Ok(Page { items, head: head.head.max(last), epoch: head.epoch, expired_to: head.expired_to })
    }

    /// What an external commit needs, for a device that has a leaf which it replaces.
    pub async fn info(&self, device: DeviceAddr, group: GroupId) -> Result<Info, GroupError> {
        self.open_to(group, device).await?;
        self.trees.info(&self.parts.store, &self.parts.random, group).await
    }

    /// The tree of an epoch that somebody joined in, for a member.
    pub async fn tree(&self, device: DeviceAddr, group: GroupId, epoch: u64) -> Result<Bytes, GroupError> {
        self.members.known_to(group, device).await?;
        self.parts.store.group_tree(group, epoch).await?.ok_or(GroupError::NotFound("the tree of this epoch is not kept"))
    }
}

fn members(roster: &GroupRoster) -> Vec<Member> {
    let runs = roster.devices.chunk_by(|a, b| a.account == b.account);
    runs.map(|devices| {
        let account = devices[0].account;
        let role = match roster.owner {
            Some(owner) if owner == account => Role::Owner,
            _ if roster.admins.binary_search(&account).is_ok() => Role::Admin,
            _ => Role::Member,
        };
        Member { account, role, devices: devices.iter().map(|device| device.device).collect() }
    })
    .collect()
}
