//! MLS KeyPackages: publishing, and fetching those of many accounts at once.

use std::collections::BTreeSet;

use axum::Json;
use axum::extract::State;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::B64;
use crate::edge::EdgeState;
use crate::edge::auth::AuthDevice;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::Body;
use crate::ids::{AccountId, DeviceAddr};
use crate::keys::packages::{PackageCounts, PackageUpload};
use crate::limits;

/// A KeyPackage with the client's number for it.
#[derive(Debug, Deserialize, ToSchema)]
pub struct NumberedPackage {
    /// The lowest number is handed out first. A number that is there already is replaced.
    pub id: u32,
    /// An MLSMessage (RFC 9420) with a KeyPackage, at most 2 KiB.
    pub key_package: B64,
}

/// New KeyPackages of the device; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
pub struct KeyPackagesUpload {
    /// To be handed out once each: at most 100 at once and 1,000 kept.
    #[serde(default)]
    pub key_packages: Vec<NumberedPackage>,
    /// Replaces the one of last resort. It carries the extension `last_resort` of RFC 9420; the others don't.
    pub last_resort: Option<B64>,
}

/// What the server holds for the device.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyPackageCounts {
    /// KeyPackages that are left.
    pub key_packages: usize,
    /// Whether there is one of last resort.
    pub last_resort: bool,
}

impl From<PackageCounts> for KeyPackageCounts {
    fn from(counts: PackageCounts) -> Self {
        Self { key_packages: counts.one_time, last_resort: counts.last_resort }
    }
}

/// Publishes KeyPackages of the device
///
/// All are validated as RFC 9420 says before anything is kept: signatures, lifetime (at most 84 days and an hour before and after), a
/// cipher suite of 1, 2 or 3, the capabilities that groups need, and a credential that names this device.
/// `limit_reached`, and nothing kept, if more than 1,000 would be there.
#[utoipa::path(
    put, path = "/v1/key-packages", tag = "keys", security(("device" = [])),
    request_body = KeyPackagesUpload,
    responses(
        (status = 200, description = "What there is now", body = KeyPackageCounts),
        (status = 400, description = "`bad_request`: a KeyPackage is wrong; the message says which and why", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`limit_reached`", body = ErrorBody),
    )
)]
pub async fn publish(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    Body(body): Body<KeyPackagesUpload>,
) -> Result<Json<KeyPackageCounts>, ApiError> {
    let upload = PackageUpload {
        one_time: body.key_packages.into_iter().map(|one| (one.id, one.key_package.0)).collect(),
        last_resort: body.last_resort.map(|bytes| bytes.0),
    };
    let upload = upload.check(device, state.clock.now()).await?;
    Ok(Json(state.keys.add_packages(device, upload).await?.into()))
}

/// How many KeyPackages are left
///
/// The stream says by itself when fewer than 20 are left (`KeyPackagesLow`).
#[utoipa::path(
    get, path = "/v1/key-packages", tag = "keys", security(("device" = [])),
    responses((status = 200, body = KeyPackageCounts), (status = 401, body = ErrorBody))
)]
pub async fn counts(State(state): State<EdgeState>, AuthDevice(device): AuthDevice) -> Result<Json<KeyPackageCounts>, ApiError> {
    Ok(Json(state.keys.package_counts(device).await?.into()))
}

/// Whose KeyPackages.
#[derive(Debug, Deserialize, ToSchema)]
pub struct KeyPackagesFetch {
    /// Accounts (UUIDs), at most 1,500.
    #[schema(value_type = Vec<String>)]
    pub accounts: Vec<AccountId>,
}

/// KeyPackages of accounts.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct KeyPackages {
    /// Each account that exists, in the order asked.
    pub accounts: Vec<AccountPackages>,
    /// Accounts that do not exist, or no longer.
    pub gone: Vec<String>,
}

/// KeyPackages of an account.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct AccountPackages {
    /// The account's id, a UUID.
    #[schema(format = Uuid)]
    pub account_id: String,
    /// One for each device, but the asking one.
    pub devices: Vec<DevicePackage>,
}

/// A KeyPackage of a device.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct DevicePackage {
    /// 1 to 127.
    pub device_id: u8,
    /// An MLSMessage with a KeyPackage; null if the device has published none that is valid, so that it can't be added now.
    pub key_package: Option<B64>,
    /// It is the one of last resort, which others get too.
    pub last_resort: bool,
}

/// Fetches KeyPackages, to add accounts to a group
///
/// One for each device of up to 1,500 accounts. Each is handed out at most once, so fetch only for devices that are to be added. Past 20
/// requests a minute a device gets `rate_limited`. Past 30 KeyPackages a minute out of one device's pool, whoever asks, the one of last
/// resort is handed out.
#[utoipa::path(
    post, path = "/v1/key-packages/fetch", tag = "keys", security(("device" = [])),
    request_body = KeyPackagesFetch,
    responses(
        (status = 200, body = KeyPackages),
        (status = 400, description = "`bad_request`: more than 1,500 accounts, or one twice", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 429, description = "`rate_limited`", body = ErrorBody),
    )
)]
pub async fn fetch(
    State(state): State<EdgeState>,
    AuthDevice(me): AuthDevice,
    Body(body): Body<KeyPackagesFetch>,
) -> Result<Json<KeyPackages>, ApiError> {
    if body.accounts.len() > limits::GROUP_ACCOUNTS {
        return Err(ApiError::bad_request(format!("more than {} accounts", limits::GROUP_ACCOUNTS)));
    }
    let mut seen = BTreeSet::new();
    if !body.accounts.iter().all(|account| seen.insert(*account)) {
        return Err(ApiError::bad_request("an account is there twice"));
    }
    state.keys.may_fetch_packages(me)?;
    let directory = &state.directory;
    let views = stream::iter(body.accounts.clone()).map(|account| directory.get(account)).buffered(limits::KEY_PACKAGES_AT_ONCE);
    let views: Vec<_> = views.try_collect().await?;
    let (mut accounts, mut gone, mut wanted) = (Vec::new(), Vec::new(), Vec::new());
    for (account, view) in body.accounts.iter().zip(views) {
        let Some(view) = view.filter(|view| !view.deleted) else {
            gone.push(account.to_string());
            continue;
        };
        let devices = view.devices.iter().map(|device| DeviceAddr { account: *account, device: device.id });
        wanted.extend(devices.filter(|device| *device != me));
        accounts.push(AccountPackages { account_id: account.to_string(), devices: Vec::new() });
    }
    // In the order of the accounts, so each account's are one run.
    let mut handed = state.keys.packages(wanted, state.clock.now()).await?.into_iter().peekable();
    for account in &mut accounts {
        while let Some(one) = handed.next_if(|one| one.device.account.to_string() == account.account_id) {
            let (key_package, last_resort) = one.key_package.map_or((None, false), |(bytes, last)| (Some(B64(bytes)), last));
            account.devices.push(DevicePackage { device_id: one.device.device.get(), key_package, last_resort });
        }
    }
    Ok(Json(KeyPackages { accounts, gone }))
}
