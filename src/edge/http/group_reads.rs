//! Reading groups.

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::model::B64;
use crate::delivery::groups::Member;
use crate::edge::EdgeState;
use crate::edge::auth::AuthDevice;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::In;
use crate::ids::{GroupId, Seq};
use crate::limits;
use crate::mls::profile::Role;
use crate::store::groups::{GroupHead, GroupItem, GroupItemKind};

/// A group, as a list shows it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupSummary {
    /// Its id, a UUID.
    #[schema(format = Uuid)]
    pub group_id: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its last item.
    pub seq: u64,
    /// Nothing is accepted any more.
    pub closed: bool,
}

/// The groups of an account.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupList {
    /// At most 1,000.
    pub groups: Vec<GroupSummary>,
}

/// Lists the account's groups
///
/// Those that a device of the account has a leaf in. A device follows those that it is in itself.
#[utoipa::path(
    get, path = "/v1/groups", tag = "groups", security(("device" = [])),
    responses((status = 200, body = GroupList), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub async fn list(State(state): State<EdgeState>, AuthDevice(device): AuthDevice) -> Result<Json<GroupList>, ApiError> {
    let groups = state.hub.groups.list(device.account).await?;
    let summary = |(group, head): (GroupId, GroupHead)| GroupSummary {
        group_id: group.to_string(),
        epoch: head.epoch,
        seq: head.head.0,
        closed: head.closed,
    };
    Ok(Json(GroupList { groups: groups.into_iter().map(summary).collect() }))
}

/// A group.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupDetails {
    /// Its id, a UUID.
    #[schema(format = Uuid)]
    pub group_id: String,
    /// Its epoch.
    pub epoch: u64,
    /// Its last item.
    pub seq: u64,
    /// Nothing is accepted any more.
    pub closed: bool,
    /// When it was created, milliseconds since 1970 UTC.
    pub created_ms: u64,
    /// Who is in it.
    pub members: Vec<GroupMember>,
}

/// An account that is in a group.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupMember {
    /// A UUID.
    #[schema(format = Uuid)]
    pub account_id: String,
    /// `owner`, `admin` or `member`.
    pub role: String,
    /// Its devices that have a leaf.
    pub devices: Vec<u8>,
}

impl From<Member> for GroupMember {
    fn from(member: Member) -> Self {
        let role = match member.role {
            Role::Owner => "owner",
            Role::Admin => "admin",
            Role::Member => "member",
        };
        Self {
            account_id: member.account.to_string(),
            role: role.to_owned(),
            devices: member.devices.iter().map(|device| device.get()).collect(),
        }
    }
}

/// Shows a group
#[utoipa::path(
    get, path = "/v1/groups/{group_id}", tag = "groups", security(("device" = [])),
    params(("group_id" = String, Path, description = "A group (a UUID)", format = Uuid)),
    responses(
        (status = 200, body = GroupDetails),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: the account is not in it", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group", body = ErrorBody),
    )
)]
pub async fn details(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(group)): In<Path<GroupId>>,
) -> Result<Json<GroupDetails>, ApiError> {
    let (head, members) = state.hub.groups.details(device.account, group).await?;
    Ok(Json(GroupDetails {
        group_id: group.to_string(),
        epoch: head.epoch,
        seq: head.head.0,
        closed: head.closed,
        created_ms: head.created.0,
        members: members.into_iter().map(GroupMember::from).collect(),
    }))
}

/// Which items.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct ItemsQuery {
    /// Items behind this one; 0 or nothing: from the first.
    #[serde(default)]
    pub after: u64,
    /// At most so many: 1 to 500, 500 if nothing is said.
    pub limit: Option<usize>,
}

/// A page of a group's items.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupItems {
    /// In order. None: there is nothing behind `after`.
    pub items: Vec<GroupItemView>,
    /// The group's last item. If that is not the last one of the page, ask again.
    pub head: u64,
    /// The group's epoch.
    pub epoch: u64,
    /// Items up to here are not kept any more. A member whose cursor is before it has missed some: it comes back by an external commit.
    pub expired_to: u64,
}

/// An item of a group.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupItemView {
    /// Its position.
    pub seq: u64,
    /// The item before it; 0 for the first.
    pub after: u64,
    /// `created`, `commit`, `proposal`, `message` or `closed`.
    pub kind: String,
    /// The epoch that it is of; for a commit the one that it ends.
    pub epoch: u64,
    /// Who sent it (a UUID); left out: the server.
    #[schema(format = Uuid)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sender_account: Option<String>,
    /// And from which device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sender_device: Option<u8>,
    /// The sender's counter; of messages only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub client_message_id: Option<u64>,
    /// When it was accepted, milliseconds since 1970 UTC.
    pub accepted_ms: u64,
    /// An MLSMessage; empty for `created` and `closed`.
    pub content: B64,
}

impl From<GroupItem> for GroupItemView {
    fn from(item: GroupItem) -> Self {
        Self {
            seq: item.seq.0,
            after: item.after.0,
            kind: kind_name(item.kind).to_owned(),
            epoch: item.epoch,
            sender_account: item.sender.map(|sender| sender.account.to_string()),
            sender_device: item.sender.map(|sender| sender.device.get()),
            client_message_id: (item.kind == GroupItemKind::Message).then_some(item.client_message_id.0),
            accepted_ms: item.accepted.0,
            content: B64(item.content.into()),
        }
    }
}

const fn kind_name(kind: GroupItemKind) -> &'static str {
    match kind {
        GroupItemKind::Created => "created",
        GroupItemKind::Commit => "commit",
        GroupItemKind::Proposal => "proposal",
        GroupItemKind::Message => "message",
        GroupItemKind::Closed => "closed",
    }
}

/// Reads a group's items
///
/// Those that the stream carries as `GroupItem`: to catch up, and to fill a hole. About 4 MiB at most.
#[utoipa::path(
    get, path = "/v1/groups/{group_id}/items", tag = "groups", security(("device" = [])),
    params(("group_id" = String, Path, description = "A group (a UUID)", format = Uuid), ItemsQuery),
    responses(
        (status = 200, body = GroupItems),
        (status = 400, description = "`bad_request`: a limit out of its range", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: the device has no leaf in it", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group", body = ErrorBody),
    )
)]
pub async fn items(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(group)): In<Path<GroupId>>,
    In(Query(query)): In<Query<ItemsQuery>>,
) -> Result<Json<GroupItems>, ApiError> {
    let limit = query.limit.unwrap_or(limits::INBOX_PAGE_ITEMS);
    if !(1..=limits::INBOX_PAGE_ITEMS).contains(&limit) {
        return Err(ApiError::bad_request("limit must be from 1 to 500"));
    }
    let page = state.hub.groups.items(device, group, Seq(query.after), limit).await?;
    Ok(Json(GroupItems {
        items: page.items.into_iter().map(GroupItemView::from).collect(),
        head: page.head.0,
        epoch: page.epoch,
        expired_to: page.expired_to.0,
    }))
}

/// What an external commit needs.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct GroupInfoView {
    /// The group's epoch.
    pub epoch: u64,
    /// An MLSMessage with the GroupInfo of this epoch.
    pub group_info: B64,
    /// The tree of this epoch, as in the extension `ratchet_tree`.
    pub tree: B64,
}

/// Fetches what an external commit needs
///
/// For a device that has a leaf but lost its state, or missed items that are not kept any more: it replaces its leaf by an external commit.
#[utoipa::path(
    get, path = "/v1/groups/{group_id}/info", tag = "groups", security(("device" = [])),
    params(("group_id" = String, Path, description = "A group (a UUID)", format = Uuid)),
    responses(
        (status = 200, body = GroupInfoView),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: the device has no leaf in it", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group, or it is closed", body = ErrorBody),
        (status = 503, description = "`unavailable`: commits come too fast, or the store is away; ask again", body = ErrorBody),
    )
)]
pub async fn info(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(group)): In<Path<GroupId>>,
) -> Result<Json<GroupInfoView>, ApiError> {
    let info = state.hub.groups.info(device, group).await?;
    Ok(Json(GroupInfoView { epoch: info.epoch, group_info: B64(info.group_info.into()), tree: B64(info.tree.into()) }))
}

/// Fetches the tree that a Welcome needs
///
/// Kept as long as items are, for each epoch in which somebody was added.
#[utoipa::path(
    get, path = "/v1/groups/{group_id}/trees/{epoch}", tag = "groups", security(("device" = [])),
    params(
        ("group_id" = String, Path, description = "A group (a UUID)", format = Uuid),
        ("epoch" = u64, Path, description = "The epoch of the Welcome"),
    ),
    responses(
        (status = 200, description = "The tree, as in RFC 9420's extension `ratchet_tree`", body = Vec<u8>, content_type = "application/octet-stream"),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: the device has no leaf in it", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group, or the tree is gone; join by an external commit", body = ErrorBody),
    )
)]
pub async fn tree(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path((group, epoch))): In<Path<(GroupId, u64)>>,
) -> Result<Response, ApiError> {
    let tree = state.hub.groups.tree(device, group, epoch).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], tree).into_response())
}
