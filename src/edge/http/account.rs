//! The device's own account.

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::B64;
use crate::auth::realm::TokenError;
use crate::edge::auth::AuthDevice;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::{Body, In};
use crate::edge::{EdgeState, accounts};
use crate::ids::Identity;
use crate::metrics::{self, Proof};
use crate::wire::event::AccountRecord;
use crate::wire::stream::Code;

/// The device's own account, as its devices see it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Account {
    /// The account's id, a UUID.
    #[schema(format = Uuid)]
    pub account_id: String,
    /// The device that asked.
    pub device_id: u8,
    /// The realm identities that are linked to the account, as `user@realm`.
    #[schema(example = json!(["alice@socialink"]))]
    pub identities: Vec<String>,
    /// All its devices, the asking one included.
    pub devices: Vec<OwnDevice>,
}

/// One of the account's own devices.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct OwnDevice {
    /// 1 to 127.
    pub device_id: u8,
    /// As its owner named it; other accounts never see it.
    pub name: String,
    /// 1 to 16,380.
    pub registration_id: u32,
    /// libsignal's serialization of the device's identity key, 33 bytes.
    pub identity_key: B64,
    /// When it was registered, milliseconds since 1970 UTC.
    pub created_ms: u64,
}

fn shown(device_id: u8, record: &AccountRecord) -> Account {
    Account {
        account_id: record.id.to_string(),
        device_id,
        identities: record.identities.iter().map(Identity::to_string).collect(),
        devices: record
            .devices
            .iter()
            .map(|device| OwnDevice {
                device_id: device.id.get(),
                name: device.name.clone(),
                registration_id: device.registration_id.get(),
                identity_key: B64(device.identity_key.clone()),
                created_ms: device.created.0,
            })
            .collect(),
    }
}

/// Whose token it is; refused with 401 and the reason, which helps the app that made it.
pub(super) async fn identity_of(state: &EdgeState, token: &str) -> Result<Identity, ApiError> {
    state.realms.verify(token).await.map_err(|error| {
        metrics::observe_auth_failure(Proof::Realm);
        let code = if error == TokenError::KeysUnavailable { Code::Unavailable } else { Code::Unauthenticated };
        ApiError::new(code, error.to_string())
    })
}

/// The device's own account
///
/// Its identities and devices. Read it after `AccountChanged` came on the stream.
#[utoipa::path(
    get, path = "/v1/account", tag = "account", security(("device" = [])),
    responses((status = 200, body = Account), (status = 401, body = ErrorBody))
)]
pub async fn get(State(state): State<EdgeState>, AuthDevice(device): AuthDevice) -> Result<Json<Account>, ApiError> {
    let record = accounts::own(&state, device).await?;
    Ok(Json(shown(device.device.get(), &record)))
}

/// Another identity to link.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Link {
    /// A realm token (JWT) of the identity, at most 8,192 bytes.
    pub token: String,
}

/// Links another realm identity
///
/// The token proves that the identity is the same person's. An identity belongs to one account: `conflict` if it is
/// another's. At most 8 identities an account (`limit_reached`).
#[utoipa::path(
    post, path = "/v1/account/identities", tag = "account", security(("device" = [])),
    request_body = Link,
    responses(
        (status = 200, body = Account),
        (status = 400, body = ErrorBody),
        (status = 401, description = "`unauthenticated`: the credential or the token is not valid; the message says which", body = ErrorBody),
        (status = 403, description = "`limit_reached`", body = ErrorBody),
        (status = 409, description = "`conflict`: the identity is another account's", body = ErrorBody),
        (status = 503, description = "`unavailable`: the realm's keys can't be fetched now", body = ErrorBody),
    )
)]
pub async fn link(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    Body(body): Body<Link>,
) -> Result<Json<Account>, ApiError> {
    let identity = identity_of(&state, &body.token).await?;
    accounts::done(state.directory.link(device.account, &identity).await)?;
    let record = accounts::own(&state, device).await?;
    Ok(Json(shown(device.device.get(), &record)))
}

/// Takes a link to an identity away
///
/// The last one can't be (`conflict`): delete the account instead.
#[utoipa::path(
    delete, path = "/v1/account/identities/{identity}", tag = "account", security(("device" = [])),
    params(("identity" = String, Path, description = "`user@realm`, percent-encoded where it has to be", example = "alice@socialink")),
    responses(
        (status = 204, description = "Taken away"),
        (status = 401, body = ErrorBody),
        (status = 404, description = "`not_found`: it is not linked to this account", body = ErrorBody),
        (status = 409, description = "`conflict`: it is the last one", body = ErrorBody),
    )
)]
pub async fn unlink(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Path(identity)): In<Path<Identity>>,
) -> Result<StatusCode, ApiError> {
    accounts::done(state.directory.unlink(device.account, &identity).await)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Deletes the account
///
/// At once and for ever: all its devices and keys go, what waits in its inboxes becomes unreadable, and its identities
/// are free for a new account. Others who write to it get `account_deleted`.
#[utoipa::path(
    delete, path = "/v1/account", tag = "account", security(("device" = [])),
    responses((status = 204, description = "Deleted; this credential is not valid any more"), (status = 401, body = ErrorBody))
)]
pub async fn delete(State(state): State<EdgeState>, AuthDevice(device): AuthDevice) -> Result<StatusCode, ApiError> {
    accounts::done(state.directory.delete_account(device.account).await)?;
    Ok(StatusCode::NO_CONTENT)
}
