//! Groups as an application sees them.

use super::{Client, Error, IntoRecipient};
use crate::client::store::Intent;
use crate::client::types::{GroupMember, GroupState, GroupSummary};
use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId};

/// What became of invitations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Invited {
    /// Accounts that no device could be added of: they are deleted, or have published no keys for groups.
    pub unreachable: Vec<AccountId>,
}

impl Client {
    /// Creates a group, with this account alone in it as its owner.
    pub async fn create_group(&self, name: &str) -> Result<GroupId, Error> {
        Ok(self.inner.create_group(name.to_owned()).await?)
    }

    /// Adds accounts with all their devices, up to 1,500 in one commit. Returns once it is done.
    pub async fn invite(&self, group: GroupId, accounts: &[AccountId]) -> Result<Invited, Error> {
        let unreachable = self.inner.invite(group, accounts.to_vec()).await?;
        Ok(Invited { unreachable })
    }

    /// Removes accounts.
    pub async fn remove_from_group(&self, group: GroupId, accounts: &[AccountId]) -> Result<(), Error> {
        self.change_group(group, Intent { remove_accounts: accounts.to_vec(), ..Intent::default() }).await
    }

    /// Removes a device of one's own from a group.
    pub async fn remove_own_device_from_group(&self, group: GroupId, device: DeviceId) -> Result<(), Error> {
        let device = DeviceAddr { account: self.account(), device };
        self.change_group(group, Intent { remove_devices: vec![device], ..Intent::default() }).await
    }

    /// Leaves a group. Another member's device takes this one out; until then nothing of it is shown as unread. Alone in a group, leaving
    /// closes it.
    pub async fn leave_group(&self, group: GroupId) -> Result<(), Error> {
        Ok(self.inner.leave_group(group).await?)
    }

    /// Ends a group for everybody; only its owner may.
    pub async fn close_group(&self, group: GroupId) -> Result<(), Error> {
        Ok(self.inner.close_group(group).await?)
    }

    /// Gives a group another name; admins may.
    pub async fn rename_group(&self, group: GroupId, name: &str) -> Result<(), Error> {
        self.change_group(group, Intent { name: Some(name.to_owned()), ..Intent::default() }).await
    }

    /// Makes an account an admin, or takes that back; the owner may, and an admin may step down.
    pub async fn set_group_admin(&self, group: GroupId, account: impl IntoRecipient, admin: bool) -> Result<(), Error> {
        let account = self.resolve(account).await?;
        self.change_group(group, Intent { admin: Some((account, admin)), ..Intent::default() }).await
    }

    /// Passes ownership on; the former owner stays as an admin.
    pub async fn set_group_owner(&self, group: GroupId, account: impl IntoRecipient) -> Result<(), Error> {
        let account = self.resolve(account).await?;
        self.change_group(group, Intent { owner: Some(account), ..Intent::default() }).await
    }

    /// Renews this device's keys in a group: what was read before can't be used for what comes.
    pub async fn renew_group_keys(&self, group: GroupId) -> Result<(), Error> {
        self.change_group(group, Intent { renew: true, ..Intent::default() }).await
    }

    /// Whether the person wants to be woken up for a group; only this device knows.
    pub async fn mute_group(&self, group: GroupId, muted: bool) -> Result<(), Error> {
        Ok(self.inner.store.run(move |db| db.mute_group(group, muted)).await?)
    }

    /// All groups, the one with the newest message first; those that were left are among them.
    pub async fn groups(&self) -> Result<Vec<GroupSummary>, Error> {
        Ok(self.inner.store.run(|db| db.groups()).await?)
    }

    /// Who is in a group.
    pub async fn group_members(&self, group: GroupId) -> Result<Vec<GroupMember>, Error> {
        Ok(self.inner.store.run(move |db| db.group_members(group)).await?)
    }

    /// Where a group's keys are, to be compared with what other members have.
    pub async fn group_state(&self, group: GroupId) -> Result<GroupState, Error> {
        Ok(self.inner.store.run(move |db| db.group_state(group)).await?)
    }

    /// Up to which position each other account says that it has read a group; only in groups of up to 32 accounts.
    pub async fn group_reads(&self, group: GroupId) -> Result<Vec<(AccountId, u64)>, Error> {
        Ok(self.inner.store.run(move |db| db.group_reads(group)).await?)
    }

    async fn change_group(&self, group: GroupId, intent: Intent) -> Result<(), Error> {
        Ok(self.inner.change_group(group, intent).await?)
    }
}
