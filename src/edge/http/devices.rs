//! Registering, renaming and revoking devices.

use axum::Json;
use axum::extract::{Extension, Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use zeroize::Zeroizing;

use super::account::identity_of;
use super::model::{B64, OneTimePrekey, SignedPrekey};
use crate::auth::credential::{Credential, DeviceSecret};
use crate::edge::auth::AuthDevice;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::{Body, In};
use crate::edge::limits::Client;
use crate::edge::{EdgeState, accounts};
use crate::ids::{DeviceAddr, DeviceId, Identity, RegistrationId};
use crate::keys::Upload;
use crate::limits;
use crate::wire::event::{NewDevice, SignedKey};

/// A new device.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Registration {
    /// 1 to 8 realm tokens (JWTs). The first one's identity decides the account, which is made if there is none; the others
    /// are linked to it.
    pub tokens: Vec<String>,
    /// Shown to the person's own devices: 1 to 64 characters, no control characters.
    #[schema(example = "Pixel")]
    pub name: String,
    /// 1 to 16,380, random: tells apart two installations that had the same device id.
    pub registration_id: u32,
    /// 32 random bytes that become the secret of the device's credential, chosen and kept by the device before it asks. With
    /// them the call is idempotent: the same again is answered with the same device. Without them the server chooses.
    #[serde(default)]
    pub credential_secret: Option<B64>,
    /// libsignal's serialization of the public identity key, 33 bytes. Each device has its own.
    pub identity_key: B64,
    /// The signed EC prekey (33 bytes).
    pub signed_prekey: SignedPrekey,
    /// The Kyber-1024 prekey (1,569 bytes) for when the one-time ones are used up.
    pub pq_last_resort_prekey: SignedPrekey,
    /// One-time EC prekeys, at most 100.
    #[serde(default)]
    pub one_time_prekeys: Vec<OneTimePrekey>,
    /// One-time Kyber-1024 prekeys, at most 100, each signed.
    #[serde(default)]
    pub pq_one_time_prekeys: Vec<SignedPrekey>,
}

/// What a device keeps of its registration.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Registered {
    /// The account's id, a UUID.
    #[schema(format = Uuid)]
    pub account_id: String,
    /// The device's number in its account, 1 to 127.
    pub device_id: u8,
    /// `Authorization: Bearer <credential>` from now on. Shown only this once: keep it as a secret.
    #[schema(example = "sp1_…")]
    pub credential: String,
    /// Where this device's client message ids begin, for each recipient: 1, or the time in milliseconds if an earlier device of the
    /// account may have had its number, since ids that one used would be taken for repeats. Lower ids are refused.
    #[schema(example = 1, minimum = 1)]
    pub first_message_id: u64,
    /// All identities that are linked to the account now.
    pub identities: Vec<String>,
}

fn device_name(name: &str) -> Result<String, ApiError> {
    let name = name.trim();
    let ok = (1..=limits::DEVICE_NAME_CHARS).contains(&name.chars().count()) && !name.chars().any(char::is_control);
    if ok { Ok(name.to_owned()) } else { Err(ApiError::bad_request("name must have 1 to 64 characters, none of them a control character")) }
}

async fn identities_of(state: &EdgeState, tokens: &[String]) -> Result<Vec<Identity>, ApiError> {
    if tokens.is_empty() || tokens.len() > limits::IDENTITIES_PER_ACCOUNT {
        return Err(ApiError::bad_request("tokens must hold 1 to 8 realm tokens"));
    }
    let mut identities = Vec::with_capacity(tokens.len());
    for token in tokens {
        let identity = identity_of(state, token).await?;
        if !identities.contains(&identity) {
            identities.push(identity);
        }
    }
    Ok(identities)
}

/// Registers a device
///
/// Needs no credential: the realm tokens prove the person, and the answer carries the device's credential. All keys and
/// signatures are verified before anything is kept. Idempotent if the request holds a `credential_secret`: repeated with the
/// same secret and keys, it is answered with the device that the first one made, whose keys stay as they are (`GET /v1/keys`
/// tells how many one-time ones are left). Without one a repeat makes another device; revoke the one whose answer was lost
/// (`GET /v1/account` lists them).
///
/// `signed_prekey.signature` and the signatures of Kyber keys are XEdDSA signatures of the identity key over exactly the bytes
/// of `public_key`, type byte included: what libsignal's `calculateSignature(publicKey.serialize())` makes.
#[utoipa::path(
    post, path = "/v1/devices", tag = "devices",
    request_body = Registration,
    responses(
        (status = 201, body = Registered),
        (status = 400, description = "`bad_request`: malformed, or a key or signature is wrong; the message says which", body = ErrorBody),
        (status = 401, description = "`unauthenticated`: a realm token is not valid; the message says why", body = ErrorBody),
        (status = 403, description = "`limit_reached`: the account has 10 devices, or 8 identities", body = ErrorBody),
        (status = 409, description = "`conflict`: a further token's identity is another account's, or a device with other keys has the same `credential_secret`", body = ErrorBody),
        (status = 413, body = ErrorBody),
        (status = 429, description = "`rate_limited`: too many registrations from this address", body = ErrorBody),
        (status = 503, description = "`unavailable`: nothing was registered; try again", body = ErrorBody),
        (status = 504, description = "`outcome_unknown`: may be registered; see above", body = ErrorBody),
    )
)]
pub async fn register(
    State(state): State<EdgeState>,
    Extension(client): Extension<Client>,
    Body(body): Body<Registration>,
) -> Result<(StatusCode, Json<Registered>), ApiError> {
    state.rate_limits().registration_from(client)?;
    let name = device_name(&body.name)?;
    let registration_id = RegistrationId::new(body.registration_id)?;
    let identities = identities_of(&state, &body.tokens).await?;
    let (signed_prekey, pq_last_resort): (SignedKey, SignedKey) = (body.signed_prekey.into(), body.pq_last_resort_prekey.into());
    let upload = Upload {
        signed_prekey: Some(signed_prekey.clone()),
        pq_last_resort: Some(pq_last_resort.clone()),
        one_time: body.one_time_prekeys.into_iter().map(Into::into).collect(),
        pq_one_time: body.pq_one_time_prekeys.into_iter().map(Into::into).collect(),
    };
    let upload = upload.verify(body.identity_key.0.clone()).await?;
    let secret = match body.credential_secret {
        Some(chosen) => chosen_secret(Zeroizing::new(chosen.0))?,
        None => DeviceSecret::random(state.random.as_ref()),
    };
    let device = NewDevice {
        name,
        registration_id,
        identity_key: body.identity_key.0,
        credential_hash: secret.hash(),
        signed_prekey,
        pq_last_resort,
    };
    let accounts::Registered { addr, made } = accounts::register(&state, &identities, &device).await?;
    // Not again for a repeat: a one-time key that somebody has by now would be handed out twice.
    let stocked = if made { stock(&state, addr, upload).await } else { Ok(()) };
    let record = match stocked {
        Ok(()) => accounts::own(&state, addr).await?,
        Err(error) => {
            // Its owner would never get the credential: a device like that must not stay. If even this fails, it is
            // listed in the account, and can be revoked there.
            let _ = state.directory.revoke_device(addr.account, addr.device).await;
            return Err(error);
        }
    };
    let credential = Credential { device: addr, secret };
    let first_message_id = record.devices.iter().find(|device| device.id == addr.device).map(|device| device.first_message_id);
    let answer = Registered {
        account_id: addr.account.to_string(),
        device_id: addr.device.get(),
        credential: credential.to_text().to_string(),
        first_message_id: first_message_id.ok_or_else(ApiError::unauthenticated)?.0,
        identities: record.identities.iter().map(Identity::to_string).collect(),
    };
    Ok((StatusCode::CREATED, Json(answer)))
}

/// Fills a new device's pools of one-time prekeys.
async fn stock(state: &EdgeState, device: DeviceAddr, upload: Upload) -> Result<(), ApiError> {
    // Its number may be one that an earlier device had, whose keys must not come back.
    state.keys.forget(device).await?;
    state.keys.add_one_time(device, upload.one_time, upload.pq_one_time).await?;
    Ok(())
}

fn chosen_secret(bytes: Zeroizing<Vec<u8>>) -> Result<DeviceSecret, ApiError> {
    let bytes: Zeroizing<[u8; 32]> =
        Zeroizing::new(bytes.as_slice().try_into().map_err(|_| ApiError::bad_request("credential_secret must be 32 random bytes"))?);
    if bytes.iter().all(|byte| *byte == bytes[0]) {
        return Err(ApiError::bad_request("credential_secret must be random"));
    }
    Ok(DeviceSecret::chosen(*bytes))
}

/// A device's new name.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Rename {
    /// 1 to 64 characters, no control characters.
    pub name: String,
}

/// Renames one of the account's devices
#[utoipa::path(
    patch, path = "/v1/devices/{device_id}", tag = "devices", security(("device" = [])),
    params(("device_id" = u8, Path, description = "1 to 127; a device of the own account", minimum = 1, maximum = 127)),
    request_body = Rename,
    responses(
        (status = 204, description = "Renamed"),
        (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 404, description = "`not_found`: the account has no such device", body = ErrorBody),
    )
)]
pub async fn rename(
    State(state): State<EdgeState>,
    AuthDevice(me): AuthDevice,
    In(Path(device)): In<Path<DeviceId>>,
    Body(body): Body<Rename>,
) -> Result<StatusCode, ApiError> {
    let name = device_name(&body.name)?;
    accounts::done(state.directory.rename_device(me.account, device, name).await)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Revokes one of the account's devices
///
/// Its credential, keys and inbox go at once, its stream is closed (`REVOKED`). Also for the asking device itself.
#[utoipa::path(
    delete, path = "/v1/devices/{device_id}", tag = "devices", security(("device" = [])),
    params(("device_id" = u8, Path, description = "1 to 127; a device of the own account", minimum = 1, maximum = 127)),
    responses(
        (status = 204, description = "Revoked"),
        (status = 401, body = ErrorBody),
        (status = 404, description = "`not_found`: the account has no such device", body = ErrorBody),
    )
)]
pub async fn revoke(
    State(state): State<EdgeState>,
    AuthDevice(me): AuthDevice,
    In(Path(device)): In<Path<DeviceId>>,
) -> Result<StatusCode, ApiError> {
    accounts::done(state.directory.revoke_device(me.account, device).await)?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_short_texts() {
        assert_eq!(device_name(" Pixel ").expect("a name"), "Pixel");
        assert!(device_name(&"é".repeat(limits::DEVICE_NAME_CHARS)).is_ok());
        for wrong in ["", "  ", "a\u{7}b", &"é".repeat(limits::DEVICE_NAME_CHARS + 1)] {
            assert!(device_name(wrong).is_err(), "{wrong}");
        }
    }
}
