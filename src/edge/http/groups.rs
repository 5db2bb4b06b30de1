//! Groups: creating them, changing them, and sending to them.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::B64;
use crate::delivery::groups::{Commit, GroupMessage};
use crate::edge::EdgeState;
use crate::edge::auth::{AuthDevice, AuthSender};
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::{Body, In};
use crate::ids::{ClientMessageId, GroupId};

/// A group that begins, with its creator alone in it.
#[derive(Debug, Deserialize, ToSchema)]
pub struct GroupCreation {
    /// An MLSMessage (RFC 9420) with the GroupInfo of epoch 0, without the extension `ratchet_tree`. The group's id is the 16 bytes of a random UUID.
    pub group_info: B64,
    /// The tree, as in the extension `ratchet_tree`.
    pub tree: B64,
}

/// A group that was created.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct CreatedGroup {
    /// Its id, as a UUID.
    #[schema(format = Uuid)]
    pub group_id: String,
    /// Its first item: the creator's cursor.
    pub seq: u64,
    /// Its epoch: 0.
    pub epoch: u64,
}

/// Creates a group
///
/// The whole group is checked as RFC 9420 and the rules of groups (`docs/client-protocol.md`, section 13) say: one leaf, that of this device; the extensions that
/// carry the group's profile; as external sender nobody, or this server's `group_sender` (`GET /v1/server`). Repeat exactly the same after a
/// lost answer, 503 or 504.
#[utoipa::path(
    post, path = "/v1/groups", tag = "groups", security(("device" = [])),
    request_body = GroupCreation,
    responses(
        (status = 201, body = CreatedGroup),
        (status = 400, description = "`bad_request`: not a valid group", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden` by the rules of groups, or `limit_reached`: 1,000 groups", body = ErrorBody),
        (status = 409, description = "`conflict`: there is another group of this id", body = ErrorBody),
        (status = 413, body = ErrorBody),
        (status = 429, description = "`rate_limited`", body = ErrorBody),
        (status = 503, description = "`unavailable`: nothing was done", body = ErrorBody),
        (status = 504, description = "`outcome_unknown`: repeat the same", body = ErrorBody),
    )
)]
pub async fn create(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    Body(body): Body<GroupCreation>,
) -> Result<(StatusCode, Json<CreatedGroup>), ApiError> {
    let (group, seq, epoch) = state.hub.groups.create(device, &body.group_info.0, &body.tree.0).await?;
    Ok((StatusCode::CREATED, Json(CreatedGroup { group_id: group.to_string(), seq: seq.0, epoch })))
}

/// Closes a group
///
/// Only the group's owner. Nothing is accepted any more; members are told (an item `closed`) and can read what there is as long as it is kept.
#[utoipa::path(
    delete, path = "/v1/groups/{group_id}", tag = "groups", security(("device" = [])),
    params(("group_id" = String, Path, description = "A group (a UUID)", format = Uuid)),
    responses(
        (status = 204, description = "Closed, now or before"),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: not the owner", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group", body = ErrorBody),
        (status = 429, description = "`rate_limited`", body = ErrorBody),
        (status = 504, description = "`outcome_unknown`: repeat it", body = ErrorBody),
    )
)]
pub async fn close(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(group)): In<Path<GroupId>>,
) -> Result<StatusCode, ApiError> {
    state.hub.groups.close(device, group).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A commit, with what those need that it brings in.
#[derive(Debug, Deserialize, ToSchema)]
pub struct CommitSubmission {
    /// An MLSMessage with a PublicMessage that holds the commit, at most 1 MiB.
    pub commit: B64,
    /// An MLSMessage with the Welcome for all that it adds, with one secret for each; left out if it adds nobody.
    pub welcome: Option<B64>,
    /// An MLSMessage with the GroupInfo of the epoch that begins, without the extension `ratchet_tree`, with `external_pub`.
    pub group_info: B64,
}

/// Where something that was submitted stands.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Submitted {
    /// The item that it is.
    pub seq: u64,
    /// The group's epoch behind it.
    pub epoch: u64,
}

/// Submits a commit
///
/// Of all commits of an epoch the first valid one is taken, and its sender merges it with this answer; every other is answered 409 `conflict`
/// with the group's `epoch` and the item (`seq`) that the sender has to take in before it makes another. After a lost answer, 503 or 504
/// repeat exactly the same bytes: the winner is answered 200 again. By an external commit (with the GroupInfo and tree of
/// `GET /v1/groups/{group_id}/info`) a device that lost its state replaces its own leaf.
#[utoipa::path(
    post, path = "/v1/groups/{group_id}/commits", tag = "groups", security(("device" = [])),
    params(("group_id" = String, Path, description = "A group (a UUID)", format = Uuid)),
    request_body = CommitSubmission,
    responses(
        (status = 200, description = "Taken: its epoch is the group's", body = Submitted),
        (status = 400, description = "`bad_request`: not a valid commit, or Welcome or GroupInfo are not what belongs to it", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: not a member, or the rules of groups forbid it", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group, or it is closed", body = ErrorBody),
        (status = 409, description = "`conflict` with `epoch` and `seq`: somebody else was first", body = ErrorBody),
        (status = 413, body = ErrorBody),
        (status = 429, description = "`rate_limited`", body = ErrorBody),
        (status = 503, description = "`unavailable`: nothing was done", body = ErrorBody),
        (status = 504, description = "`outcome_unknown`: repeat the same", body = ErrorBody),
    )
)]
pub async fn commit(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(group)): In<Path<GroupId>>,
    Body(body): Body<CommitSubmission>,
) -> Result<Json<Submitted>, ApiError> {
    let commit = Commit { commit: body.commit.0, welcome: body.welcome.map(|welcome| welcome.0), group_info: body.group_info.0 };
    let (seq, epoch) = state.hub.groups.commit(device, group, &commit).await?;
    Ok(Json(Submitted { seq: seq.0, epoch }))
}

/// A proposal for the next commit.
#[derive(Debug, Deserialize, ToSchema)]
pub struct ProposalSubmission {
    /// An MLSMessage with a PublicMessage that holds a Remove of the device's own leaf, at most 2 KiB.
    pub proposal: B64,
}

/// Submits a proposal to leave
///
/// The device leaves with the next commit that a member makes.
#[utoipa::path(
    post, path = "/v1/groups/{group_id}/proposals", tag = "groups", security(("device" = [])),
    params(("group_id" = String, Path, description = "A group (a UUID)", format = Uuid)),
    request_body = ProposalSubmission,
    responses(
        (status = 200, body = Submitted),
        (status = 400, description = "`bad_request`: not a valid proposal", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: not a member, or not a proposal to leave", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group, or it is closed", body = ErrorBody),
        (status = 409, description = "`conflict` with `epoch` and `seq`: of another epoch", body = ErrorBody),
        (status = 413, body = ErrorBody),
        (status = 429, description = "`rate_limited`", body = ErrorBody),
        (status = 503, description = "`unavailable`: nothing was done", body = ErrorBody),
        (status = 504, description = "`outcome_unknown`: look at the group's items, or repeat the same", body = ErrorBody),
    )
)]
pub async fn propose(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(group)): In<Path<GroupId>>,
    Body(body): Body<ProposalSubmission>,
) -> Result<Json<Submitted>, ApiError> {
    let (seq, epoch) = state.hub.groups.propose(device, group, &body.proposal.0).await?;
    Ok(Json(Submitted { seq: seq.0, epoch }))
}

/// A message for all members.
#[derive(Debug, Deserialize, ToSchema)]
pub struct MessageSubmission {
    /// Growing for each pair (sending device, group), from the registration's `first_message_id`. A repeat of an id is answered as accepted and
    /// delivered once. An id more than 127 behind the highest one is refused (`stale_message_id`).
    #[schema(minimum = 1)]
    pub client_message_id: u64,
    /// The epoch that it was encrypted in: the group's, or one of the 16 before it.
    pub epoch: u64,
    /// An MLSMessage with a PrivateMessage, at most 262,144 bytes.
    pub content: B64,
}

/// Nothing to say: the message is durable.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct MessageAccepted {}

/// Sends a message to a group
///
/// The same as `GroupSend` on the stream. Once this answers, the message is durable and has its place in the group's order, where its sender
/// meets it too.
#[utoipa::path(
    post, path = "/v1/groups/{group_id}/messages", tag = "groups", security(("device" = [])),
    params(("group_id" = String, Path, description = "A group (a UUID)", format = Uuid)),
    request_body = MessageSubmission,
    responses(
        (status = 200, body = MessageAccepted),
        (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`forbidden`: not a member", body = ErrorBody),
        (status = 404, description = "`not_found`: no such group, or it is closed", body = ErrorBody),
        (status = 409, description = "`conflict` with `epoch` and `seq`: of an epoch that is too long over, or not begun; take in what came since and encrypt again. Or `stale_message_id`", body = ErrorBody),
        (status = 413, body = ErrorBody),
        (status = 429, description = "`rate_limited`", body = ErrorBody),
        (status = 503, description = "`unavailable`: nothing was accepted", body = ErrorBody),
        (status = 504, description = "`outcome_unknown`: repeat with the same `client_message_id`", body = ErrorBody),
    )
)]
pub async fn send(
    State(state): State<EdgeState>,
    AuthSender(device): AuthSender,
    In(Path(group)): In<Path<GroupId>>,
    Body(body): Body<MessageSubmission>,
) -> Result<Json<MessageAccepted>, ApiError> {
    let message = GroupMessage {
        group,
        client_message_id: ClientMessageId(body.client_message_id),
        epoch: body.epoch,
        content: body.content.0.into(),
    };
    state.hub.groups.send_message(device, message).await?;
    Ok(Json(MessageAccepted {}))
}
