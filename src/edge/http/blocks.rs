//! Accounts whose messages an account refuses.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::edge::auth::AuthDevice;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::In;
use crate::edge::{EdgeState, accounts};
use crate::ids::AccountId;

/// Who is blocked.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Blocks {
    /// Ids of accounts (UUIDs).
    pub accounts: Vec<String>,
}

/// Lists the blocked accounts
#[utoipa::path(
    get, path = "/v1/blocks", tag = "blocks", security(("device" = [])),
    responses((status = 200, body = Blocks), (status = 401, body = ErrorBody))
)]
pub async fn list(State(state): State<EdgeState>, AuthDevice(device): AuthDevice) -> Result<Json<Blocks>, ApiError> {
    let record = accounts::own(&state, device).await?;
    Ok(Json(Blocks { accounts: record.blocked.iter().map(AccountId::to_string).collect() }))
}

/// Blocks an account
///
/// From then on its messages are answered with `blocked`. Blocking twice is harmless. At most 1,000 (`limit_reached`).
#[utoipa::path(
    put, path = "/v1/blocks/{account_id}", tag = "blocks", security(("device" = [])),
    params(("account_id" = String, Path, description = "The account's id (a UUID)", format = Uuid)),
    responses(
        (status = 204, description = "Blocked"),
        (status = 400, description = "`bad_request`: not an account id, or the own one", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`limit_reached`", body = ErrorBody),
    )
)]
pub async fn add(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(other)): In<Path<AccountId>>,
) -> Result<StatusCode, ApiError> {
    if other == device.account {
        return Err(ApiError::bad_request("an account can't block itself"));
    }
    accounts::done(state.directory.block(device.account, other).await)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Unblocks an account
///
/// Unblocking one that is not blocked is harmless.
#[utoipa::path(
    delete, path = "/v1/blocks/{account_id}", tag = "blocks", security(("device" = [])),
    params(("account_id" = String, Path, description = "The account's id (a UUID)", format = Uuid)),
    responses((status = 204, description = "Not blocked"), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody))
)]
pub async fn remove(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(other)): In<Path<AccountId>>,
) -> Result<StatusCode, ApiError> {
    accounts::done(state.directory.unblock(device.account, other).await)?;
    Ok(StatusCode::NO_CONTENT)
}
