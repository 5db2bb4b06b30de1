//! Publishing keys, and fetching those of others.

use axum::Json;
use axum::extract::{Path, Query, State};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::model::{B64, OneTimePrekey, PrekeyCounts, SignedPrekey};
use crate::directory::{AccountView, DeviceView};
use crate::edge::auth::AuthDevice;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::{Body, In};
use crate::edge::{EdgeState, accounts};
use crate::ids::{AccountId, DeviceId, Identity};
use crate::keys::{KeysError, Upload};
use crate::wire::stream::Code;

impl From<KeysError> for ApiError {
    fn from(error: KeysError) -> Self {
        match error {
            KeysError::Invalid(_) | KeysError::Package(..) => Self::bad_request(error.to_string()),
            KeysError::TooMany => Self::new(Code::LimitReached, error.to_string()),
            KeysError::RateLimited { retry_after_ms } => Self::rate_limited(retry_after_ms),
            KeysError::Store(error) => error.into(),
            KeysError::Internal => Self::internal(&error),
        }
    }
}

/// New keys of the device; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
pub struct KeysUpload {
    /// Replaces the signed EC prekey; clients do so weekly and keep the old private key for what is under way.
    pub signed_prekey: Option<SignedPrekey>,
    /// Replaces the Kyber-1024 last-resort prekey.
    pub pq_last_resort_prekey: Option<SignedPrekey>,
    /// More one-time EC prekeys, at most 100 at once and 1,000 kept. An id that is there already is replaced.
    #[serde(default)]
    pub one_time_prekeys: Vec<OneTimePrekey>,
    /// More one-time Kyber-1024 prekeys, at most 100 at once and 1,000 kept.
    #[serde(default)]
    pub pq_one_time_prekeys: Vec<SignedPrekey>,
}

/// Publishes keys of the device
///
/// All signatures are verified under the device's identity key before anything is kept. `limit_reached`, and nothing kept,
/// if a pool would hold more than 1,000.
#[utoipa::path(
    put, path = "/v1/keys", tag = "keys", security(("device" = [])),
    request_body = KeysUpload,
    responses(
        (status = 200, description = "How many one-time prekeys there are now", body = PrekeyCounts),
        (status = 400, description = "`bad_request`: a key or signature is wrong; the message says which", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`limit_reached`", body = ErrorBody),
    )
)]
pub async fn publish(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    Body(body): Body<KeysUpload>,
) -> Result<Json<PrekeyCounts>, ApiError> {
    let record = accounts::own(&state, device).await?;
    let me = record.devices.iter().find(|d| d.id == device.device).ok_or_else(ApiError::unauthenticated)?;
    let upload = Upload {
        signed_prekey: body.signed_prekey.map(Into::into),
        pq_last_resort: body.pq_last_resort_prekey.map(Into::into),
        one_time: body.one_time_prekeys.into_iter().map(Into::into).collect(),
        pq_one_time: body.pq_one_time_prekeys.into_iter().map(Into::into).collect(),
    };
    let upload = upload.verify(me.identity_key.clone()).await?;
    state.keys.room_for(device, &upload).await?;
    let Upload { signed_prekey, pq_last_resort, one_time, pq_one_time } = upload;
    if signed_prekey.is_some() || pq_last_resort.is_some() {
        accounts::done(state.directory.publish_keys(device.account, device.device, signed_prekey, pq_last_resort).await)?;
    }
    Ok(Json(state.keys.add_one_time(device, one_time, pq_one_time).await?.into()))
}

/// How many one-time prekeys are left
///
/// The stream says by itself when fewer than 20 of a kind are left (`PrekeysLow`).
#[utoipa::path(
    get, path = "/v1/keys", tag = "keys", security(("device" = [])),
    responses((status = 200, body = PrekeyCounts), (status = 401, body = ErrorBody))
)]
pub async fn counts(State(state): State<EdgeState>, AuthDevice(device): AuthDevice) -> Result<Json<PrekeyCounts>, ApiError> {
    Ok(Json(state.keys.counts(device).await?.into()))
}

/// An account as others see it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Contact {
    /// The account's id, a UUID.
    #[schema(format = Uuid)]
    pub account_id: String,
    /// All its devices: a message needs an envelope for each.
    pub devices: Vec<ContactDevice>,
}

/// A device as others see it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ContactDevice {
    /// 1 to 127.
    pub device_id: u8,
    /// 1 to 16,380.
    pub registration_id: u32,
    /// libsignal's serialization, 33 bytes.
    pub identity_key: B64,
}

fn contact(view: &AccountView) -> Contact {
    let device = |device: &DeviceView| ContactDevice {
        device_id: device.id.get(),
        registration_id: device.registration_id.get(),
        identity_key: B64(device.identity_key.to_vec()),
    };
    Contact { account_id: view.id.to_string(), devices: view.devices.iter().map(device).collect() }
}

/// Finds an account by an identity
#[utoipa::path(
    get, path = "/v1/identities/{identity}", tag = "keys", security(("device" = [])),
    params(("identity" = String, Path, description = "`user@realm`, percent-encoded where it has to be", example = "bob@vignette")),
    responses(
        (status = 200, body = Contact),
        (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 404, description = "`not_found`: nobody has registered with this identity", body = ErrorBody),
        (status = 410, description = "`account_deleted`", body = ErrorBody),
    )
)]
pub async fn resolve(
    State(state): State<EdgeState>,
    _device: AuthDevice,
    In(Path(identity)): In<Path<Identity>>,
) -> Result<Json<Contact>, ApiError> {
    let account =
        state.directory.resolve(&identity).await?.ok_or_else(|| ApiError::not_found("nobody has registered with this identity"))?;
    let view = accounts::other(&state, account).await?;
    Ok(Json(contact(&view)))
}

/// An account's devices
#[utoipa::path(
    get, path = "/v1/accounts/{account_id}", tag = "keys", security(("device" = [])),
    params(("account_id" = String, Path, description = "The account's id (a UUID)", format = Uuid)),
    responses(
        (status = 200, body = Contact),
        (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 404, description = "`not_found`", body = ErrorBody),
        (status = 410, description = "`account_deleted`", body = ErrorBody),
    )
)]
pub async fn devices(
    State(state): State<EdgeState>,
    _device: AuthDevice,
    In(Path(account)): In<Path<AccountId>>,
) -> Result<Json<Contact>, ApiError> {
    let view = accounts::other(&state, account).await?;
    Ok(Json(contact(&view)))
}

/// Which bundles.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct BundleQuery {
    /// Only this device's bundle (1 to 127). Without it: those of all devices, except the asking one in its own account.
    #[param(minimum = 1, maximum = 127)]
    device_id: Option<u32>,
}

/// Key bundles of an account.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Bundles {
    /// One for each device.
    pub devices: Vec<DeviceBundle>,
}

/// What libsignal's `PreKeyBundle` is made of.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct DeviceBundle {
    /// 1 to 127.
    pub device_id: u8,
    /// 1 to 16,380.
    pub registration_id: u32,
    /// libsignal's serialization, 33 bytes.
    pub identity_key: B64,
    /// The signed EC prekey.
    pub signed_prekey: SignedPrekey,
    /// A one-time Kyber-1024 prekey, or the last-resort one: they are used alike.
    pub pq_prekey: SignedPrekey,
    /// A one-time EC prekey that nobody else gets; null if there is none.
    pub one_time_prekey: Option<OneTimePrekey>,
}

/// Fetches key bundles, to begin conversations
///
/// Each one-time prekey is handed out at most once, so fetch only for devices without a session. Past 120 fetches a minute
/// a device gets `rate_limited`. Past 30 one-time prekeys a minute out of one device's pool, whoever asks, bundles
/// come without `one_time_prekey` and with the last-resort `pq_prekey`.
#[utoipa::path(
    get, path = "/v1/accounts/{account_id}/keys", tag = "keys", security(("device" = [])),
    params(("account_id" = String, Path, description = "The account's id (a UUID)", format = Uuid), BundleQuery),
    responses(
        (status = 200, body = Bundles),
        (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 404, description = "`not_found`: no such account or device", body = ErrorBody),
        (status = 410, description = "`account_deleted`", body = ErrorBody),
        (status = 429, description = "`rate_limited`", body = ErrorBody),
    )
)]
pub async fn bundles(
    State(state): State<EdgeState>,
    AuthDevice(me): AuthDevice,
    In(Path(account)): In<Path<AccountId>>,
    In(Query(query)): In<Query<BundleQuery>>,
) -> Result<Json<Bundles>, ApiError> {
    let only = query.device_id.map(DeviceId::new).transpose()?;
    let view = accounts::other(&state, account).await?;
    // Nobody needs a bundle of himself, and it would cost him a key.
    let wanted = |id: DeviceId| only.map_or(account != me.account || id != me.device, |only| id == only);
    let wanted: Vec<_> = view.devices.iter().map(|device| device.id).filter(|id| wanted(*id)).collect();
    if only.is_some() && wanted.is_empty() {
        return Err(ApiError::not_found("the account has no such device"));
    }
    let bundles = state.keys.bundles(me, account, &wanted).await?;
    let devices = bundles
        .into_iter()
        .filter_map(|bundle| {
            let device = view.device(bundle.device)?;
            Some(DeviceBundle {
                device_id: device.id.get(),
                registration_id: device.registration_id.get(),
                identity_key: B64(device.identity_key.to_vec()),
                signed_prekey: bundle.signed_prekey.into(),
                pq_prekey: bundle.pq_prekey.into(),
                one_time_prekey: bundle.one_time.map(Into::into),
            })
        })
        .collect();
    Ok(Json(Bundles { devices }))
}
