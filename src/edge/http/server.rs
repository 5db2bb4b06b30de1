//! What the server is, and development tokens.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::B64;
use crate::edge::EdgeState;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::Body;
use crate::ids::Identity;
use crate::limits;

/// How long a token of `POST /v1/dev/token` is valid.
const DEV_TOKEN_TTL_MS: u64 = 3_600_000;

/// What the server is.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Server {
    /// Of the software.
    pub version: String,
    /// Development mode: anybody can be anybody.
    pub dev: bool,
    /// The public key (Ed25519, 32 bytes) with which the server proposes to remove devices that are no more: new groups name it as their
    /// external sender.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_sender: Option<B64>,
    /// What clients have to keep to.
    pub limits: ServerLimits,
}

/// What clients have to keep to.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ServerLimits {
    /// Devices an account.
    pub devices_per_account: usize,
    /// Identities an account.
    pub identities_per_account: usize,
    /// Blocked accounts an account.
    pub blocks_per_account: usize,
    /// Bytes of one envelope's content.
    pub envelope_bytes: usize,
    /// One-time prekeys of a kind in one upload.
    pub prekeys_per_upload: usize,
    /// One-time prekeys of a kind that are kept for a device.
    pub prekeys_per_device: usize,
    /// Below so many the stream says `PrekeysLow`.
    pub prekeys_low_water: usize,
    /// How far behind the highest client message id a new one may be, plus one.
    pub message_id_window: u64,
    /// Unanswered `Send`s on one stream.
    pub sends_in_flight: usize,
    /// Accounts in a group.
    pub group_accounts: usize,
    /// Groups of an account, and groups that one stream follows.
    pub groups_per_account: usize,
    /// Bytes of one MLS commit.
    pub commit_bytes: usize,
    /// How many epochs before the group's a message may be of.
    pub past_epochs: usize,
    /// Bytes of one WebSocket message.
    pub frame_bytes: usize,
    /// How long an undelivered envelope is kept, in milliseconds.
    pub envelope_ttl_ms: u64,
}

/// What the server is
#[utoipa::path(get, path = "/v1/server", tag = "server", responses((status = 200, body = Server)))]
pub async fn get(State(state): State<EdgeState>) -> Json<Server> {
    Json(Server {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        dev: state.dev.is_some(),
        group_sender: state.group_sender.map(|key| B64(key.to_vec())),
        limits: ServerLimits {
            devices_per_account: limits::DEVICES_PER_ACCOUNT,
            identities_per_account: limits::IDENTITIES_PER_ACCOUNT,
            blocks_per_account: limits::BLOCKS_PER_ACCOUNT,
            envelope_bytes: limits::ENVELOPE_BYTES,
            prekeys_per_upload: limits::PREKEYS_PER_UPLOAD,
            prekeys_per_device: limits::PREKEYS_PER_DEVICE,
            prekeys_low_water: limits::PREKEYS_LOW_WATER,
            message_id_window: limits::MESSAGE_ID_WINDOW,
            sends_in_flight: limits::SENDS_IN_FLIGHT,
            group_accounts: limits::GROUP_ACCOUNTS,
            groups_per_account: limits::GROUPS_PER_ACCOUNT,
            commit_bytes: limits::COMMIT_BYTES,
            past_epochs: limits::PAST_EPOCHS,
            frame_bytes: limits::FRAME_BYTES,
            envelope_ttl_ms: limits::ENVELOPE_TTL_MS,
        },
    })
}

/// Whose token.
#[derive(Debug, Deserialize, ToSchema)]
pub struct DevTokenRequest {
    /// A user of `socialink`, `vignette` or `local`.
    #[schema(example = "alice@socialink")]
    pub identity: String,
}

/// A development token.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct DevToken {
    /// A realm token (JWT), valid for an hour.
    pub token: String,
}

/// Signs a development token
///
/// Only in development mode (`not_found` otherwise). A real realm's identity provider does this for its users.
#[utoipa::path(
    post, path = "/v1/dev/token", tag = "server", request_body = DevTokenRequest,
    responses((status = 200, body = DevToken), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody))
)]
pub async fn dev_token(State(state): State<EdgeState>, Body(body): Body<DevTokenRequest>) -> Result<Json<DevToken>, ApiError> {
    let dev = state.dev.as_ref().ok_or_else(|| ApiError::not_found("development mode is off"))?;
    let identity: Identity = body.identity.parse()?;
    let token = dev.sign(&identity, state.clock.now(), DEV_TOKEN_TTL_MS).map_err(|error| ApiError::bad_request(error.to_string()))?;
    Ok(Json(DevToken { token }))
}
