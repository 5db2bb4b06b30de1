//! The HTTP API of groups and KeyPackages, as a client sees it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::api::{Api, ApiError, B64, Http, Method, json};
use super::groups::{Created, Outgoing};
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, GroupId, Seq};
use crate::wire::stream::{GroupItem, GroupItemKind};

/// Items of a group that are asked for at once.
pub const ITEMS_PER_PAGE: usize = 500;

/// A KeyPackage to publish, under the device's number for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NumberedPackage {
    /// The lowest is handed out first; one that is there already is replaced.
    pub id: u32,
    /// An MLSMessage.
    pub key_package: B64,
}

/// Body of `PUT /v1/key-packages`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct UploadKeyPackages {
    /// To be handed out once each.
    pub key_packages: Vec<NumberedPackage>,
    /// The new one of last resort.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_resort: Option<B64>,
}

/// How many KeyPackages the server has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct KeyPackageCounts {
    /// To be handed out once each.
    pub key_packages: usize,
    /// Whether there is one of last resort.
    pub last_resort: bool,
}

/// KeyPackages of accounts: answer of `POST /v1/key-packages/fetch`.
#[derive(Debug, Clone, Deserialize)]
pub struct FetchedPackages {
    /// Each account that exists.
    pub accounts: Vec<AccountPackages>,
    /// Those that do not, or no longer.
    pub gone: Vec<AccountId>,
}

/// KeyPackages of an account.
#[derive(Debug, Clone, Deserialize)]
pub struct AccountPackages {
    /// Whose.
    pub account_id: AccountId,
    /// One for each device.
    pub devices: Vec<DevicePackage>,
}

/// A KeyPackage of a device.
#[derive(Debug, Clone, Deserialize)]
pub struct DevicePackage {
    /// Which.
    pub device_id: DeviceId,
    /// `None`: it has none, and can't be added now.
    pub key_package: Option<B64>,
}

/// Where a group is after something was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct GroupPlace {
    /// Its last item.
    pub seq: Seq,
    /// Its epoch.
    pub epoch: u64,
}

/// What an external commit needs: answer of `GET /v1/groups/{id}/info`.
#[derive(Debug, Clone, Deserialize)]
pub struct GroupInfo {
    /// Its epoch.
    pub epoch: u64,
    /// An MLSMessage, without tree.
    pub group_info: B64,
    /// The ratchet tree.
    pub tree: B64,
}

#[derive(Serialize)]
struct CreateJson<'a> {
    group_info: &'a B64,
    tree: &'a B64,
}

#[derive(Serialize)]
struct CommitJson<'a> {
    commit: &'a B64,
    #[serde(skip_serializing_if = "Option::is_none")]
    welcome: Option<&'a B64>,
    group_info: &'a B64,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum KindJson {
    Created,
    Commit,
    Proposal,
    Message,
    Closed,
    #[serde(other)]
    Unknown,
}

#[derive(Deserialize)]
struct ItemJson {
    seq: u64,
    after: u64,
    kind: KindJson,
    epoch: u64,
    #[serde(default)]
    sender_account: Option<AccountId>,
    #[serde(default)]
    sender_device: Option<DeviceId>,
    #[serde(default)]
    client_message_id: Option<u64>,
    #[serde(default)]
    accepted_ms: u64,
    #[serde(default)]
    content: B64,
}

#[derive(Deserialize)]
struct PageJson {
    items: Vec<ItemJson>,
    head: u64,
    epoch: u64,
    #[serde(default)]
    expired_to: u64,
}

/// A page of a group's items, as the stream would have carried them.
#[derive(Debug, Clone)]
pub struct ItemPage {
    /// In order.
    pub items: Vec<GroupItem>,
    /// The group's last item.
    pub head: Seq,
    /// The group's epoch.
    pub epoch: u64,
    /// Items up to here are gone: who has less has a gap.
    pub expired_to: Seq,
}

impl ItemJson {
    fn item(self, group: GroupId) -> GroupItem {
        let kind = match self.kind {
            KindJson::Created => GroupItemKind::Created,
            KindJson::Commit => GroupItemKind::Commit,
            KindJson::Proposal => GroupItemKind::Proposal,
            KindJson::Message => GroupItemKind::Message,
            KindJson::Closed => GroupItemKind::Closed,
            KindJson::Unknown => GroupItemKind::Unspecified,
        };
        GroupItem {
            group_id: Bytes::copy_from_slice(group.as_bytes()),
            seq: self.seq,
            after: self.after,
            kind: kind as i32,
            epoch: self.epoch,
            sender_account: self.sender_account.map(|account| Bytes::copy_from_slice(account.as_bytes())).unwrap_or_default(),
            sender_device: self.sender_device.map_or(0, |device| u32::from(device.get())),
            client_message_id: self.client_message_id.unwrap_or_default(),
            accepted_ms: self.accepted_ms,
            content: self.content.0.into(),
        }
    }
}

impl<H: Http> Api<H> {
    /// The key with which the server proposes to remove deleted accounts, if it has one.
    pub async fn group_sender(&self) -> Result<Option<Vec<u8>>, ApiError> {
        #[derive(Deserialize)]
        struct Server {
            #[serde(default)]
            group_sender: Option<B64>,
        }
        Ok(self.call::<Server>(Method::Get, "/v1/server".into(), None).await?.group_sender.map(|key| key.0))
    }

    /// Publishes KeyPackages.
    pub async fn upload_key_packages(&self, upload: &UploadKeyPackages) -> Result<KeyPackageCounts, ApiError> {
        self.call(Method::Put, "/v1/key-packages".into(), Some(json(upload)?)).await
    }

    /// How many KeyPackages are left.
    pub async fn key_package_counts(&self) -> Result<KeyPackageCounts, ApiError> {
        self.call(Method::Get, "/v1/key-packages".into(), None).await
    }

    /// KeyPackages of accounts' devices, to add them. Uses them up.
    pub async fn key_packages(&self, accounts: &[AccountId]) -> Result<FetchedPackages, ApiError> {
        self.call(Method::Post, "/v1/key-packages/fetch".into(), Some(json(&serde_json::json!({ "accounts": accounts }))?)).await
    }

    /// The account's groups that are not closed.
    pub async fn groups(&self) -> Result<Vec<GroupId>, ApiError> {
        #[derive(Deserialize)]
        struct List {
            groups: Vec<One>,
        }
        #[derive(Deserialize)]
        struct One {
            group_id: GroupId,
            #[serde(default)]
            closed: bool,
        }
        let list: List = self.call(Method::Get, "/v1/groups".into(), None).await?;
        Ok(list.groups.into_iter().filter(|one| !one.closed).map(|one| one.group_id).collect())
    }

    /// The devices that have a leaf in a group.
    pub async fn group_devices(&self, group: GroupId) -> Result<Vec<DeviceAddr>, ApiError> {
        #[derive(Deserialize)]
        struct Details {
            members: Vec<Member>,
        }
        #[derive(Deserialize)]
        struct Member {
            account_id: AccountId,
            devices: Vec<DeviceId>,
        }
        let details: Details = self.call(Method::Get, format!("/v1/groups/{group}"), None).await?;
        let devices = |member: Member| member.devices.into_iter().map(move |device| DeviceAddr { account: member.account_id, device });
        Ok(details.members.into_iter().flat_map(devices).collect())
    }

    /// Creates a group. The same again is answered the same.
    pub async fn create_group(&self, created: &Created) -> Result<GroupPlace, ApiError> {
        let (group_info, tree) = (B64(created.group_info.clone()), B64(created.tree.clone()));
        self.call(Method::Post, "/v1/groups".into(), Some(json(&CreateJson { group_info: &group_info, tree: &tree })?)).await
    }

    /// Closes a group.
    pub async fn close_group(&self, group: GroupId) -> Result<(), ApiError> {
        self.done(Method::Delete, format!("/v1/groups/{group}"), None).await
    }

    /// Submits a commit. `CONFLICT`: another one came first.
    pub async fn commit_group(&self, group: GroupId, outgoing: &Outgoing) -> Result<GroupPlace, ApiError> {
        let (commit, group_info) = (B64(outgoing.commit.clone()), B64(outgoing.group_info.clone()));
        let welcome = outgoing.welcome.clone().map(B64);
        let body = json(&CommitJson { commit: &commit, welcome: welcome.as_ref(), group_info: &group_info })?;
        self.call(Method::Post, format!("/v1/groups/{group}/commits"), Some(body)).await
    }

    /// Submits a proposal: to leave.
    pub async fn propose_group(&self, group: GroupId, proposal: &[u8]) -> Result<GroupPlace, ApiError> {
        let body = json(&serde_json::json!({ "proposal": B64(proposal.to_vec()) }))?;
        self.call(Method::Post, format!("/v1/groups/{group}/proposals"), Some(body)).await
    }

    /// Sends a message over plain HTTP.
    pub async fn send_group(&self, group: GroupId, id: ClientMessageId, epoch: u64, content: &[u8]) -> Result<(), ApiError> {
        let body = serde_json::json!({ "client_message_id": id, "epoch": epoch, "content": B64(content.to_vec()) });
        self.done(Method::Post, format!("/v1/groups/{group}/messages"), Some(json(&body)?)).await
    }

    /// Items behind a position.
    pub async fn group_items(&self, group: GroupId, after: Seq) -> Result<ItemPage, ApiError> {
        let path = format!("/v1/groups/{group}/items?after={}&limit={ITEMS_PER_PAGE}", after.0);
        let page: PageJson = self.call(Method::Get, path, None).await?;
        let items = page.items.into_iter().map(|item| item.item(group)).collect();
        Ok(ItemPage { items, head: Seq(page.head), epoch: page.epoch, expired_to: Seq(page.expired_to) })
    }

    /// What an external commit needs.
    pub async fn group_info(&self, group: GroupId) -> Result<GroupInfo, ApiError> {
        self.call(Method::Get, format!("/v1/groups/{group}/info"), None).await
    }

    /// The tree of an epoch in which somebody joined.
    pub async fn group_tree(&self, group: GroupId, epoch: u64) -> Result<Vec<u8>, ApiError> {
        self.exchange(Method::Get, format!("/v1/groups/{group}/trees/{epoch}"), None).await
    }
}
