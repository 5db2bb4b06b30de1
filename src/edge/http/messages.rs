//! Sending by HTTP.

use axum::Json;
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::model::B64;
use crate::delivery::sending;
use crate::edge::EdgeState;
use crate::edge::auth::AuthSender;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::{Body, In};
use crate::ids::AccountId;
use crate::wire::stream;

/// Everything that one message needs for one recipient account.
#[derive(Debug, Deserialize, ToSchema)]
pub struct SendMessage {
    /// Growing for each pair (sending device, recipient account), from the registration's `first_message_id`; a lower one is refused
    /// (`bad_request`). A repeat of an id is answered as accepted and delivered once. An id more than 127 behind the highest one is
    /// refused (`stale_message_id`).
    #[schema(minimum = 1)]
    pub client_message_id: u64,
    /// Wake the recipient up (push notification) rather than wait until it comes.
    #[serde(default)]
    pub urgent: bool,
    /// Reaches devices that are attached now, or nobody; never stored, never acknowledged.
    #[serde(default)]
    pub ephemeral: bool,
    /// One for each device of the recipient (for the own account: for each other device).
    pub envelopes: Vec<EnvelopeToSend>,
}

/// One ciphertext for one device.
#[derive(Debug, Deserialize, ToSchema)]
pub struct EnvelopeToSend {
    /// 1 to 127.
    pub device_id: u32,
    /// The registration id that the sender knows for the device; another one is answered with `stale_devices`.
    pub registration_id: u32,
    /// libsignal's message type: 2 (SignalMessage) or 3 (PreKeySignalMessage).
    pub r#type: i32,
    /// The serialized libsignal message, 1 to 262,144 bytes.
    pub content: B64,
}

/// The envelopes are durable on the server's log.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Accepted {
    /// Always true.
    pub accepted: bool,
}

/// Sends a message to all devices of an account
///
/// The same as `Send` on the stream, for clients without one. Nothing is accepted in part. On 409 `device_mismatch` add
/// envelopes for `missing_devices` (fetch their bundles) and leave out `extra_devices`; on 410 `stale_devices` drop the
/// sessions with those and fetch their bundles; then repeat with the same `client_message_id`, as after a lost answer,
/// 503 and 504.
#[utoipa::path(
    post, path = "/v1/accounts/{account_id}/messages", tag = "messages", security(("device" = [])),
    params(("account_id" = String, Path, description = "The recipient (a UUID); the own account for the own other devices", format = Uuid)),
    request_body = SendMessage,
    responses(
        (status = 200, body = Accepted),
        (status = 400, body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 403, description = "`blocked`: the recipient has blocked the sender", body = ErrorBody),
        (status = 404, description = "`not_found`: no such account", body = ErrorBody),
        (status = 409, description = "`device_mismatch` with `missing_devices` and `extra_devices`, or `stale_message_id`", body = ErrorBody),
        (status = 410, description = "`stale_devices` with the list, or `account_deleted`", body = ErrorBody),
        (status = 413, body = ErrorBody),
        (status = 429, description = "`rate_limited` or `inbox_full`", body = ErrorBody),
        (status = 503, description = "`unavailable`: nothing was accepted", body = ErrorBody),
        (status = 504, description = "`outcome_unknown`: repeat with the same `client_message_id`", body = ErrorBody),
    )
)]
pub async fn send(
    State(state): State<EdgeState>,
    AuthSender(device): AuthSender,
    In(Path(recipient)): In<Path<AccountId>>,
    Body(body): Body<SendMessage>,
) -> Result<Json<Accepted>, ApiError> {
    let envelope = |envelope: EnvelopeToSend| stream::OutgoingEnvelope {
        device_id: envelope.device_id,
        registration_id: envelope.registration_id,
        r#type: envelope.r#type,
        content: envelope.content.0.into(),
    };
    // As a frame of the stream, so that both ways check the same.
    let frame = stream::Send {
        request_id: 0,
        recipient: recipient.as_bytes().to_vec().into(),
        client_message_id: body.client_message_id,
        urgent: body.urgent,
        ephemeral: body.ephemeral,
        envelopes: body.envelopes.into_iter().map(envelope).collect(),
    };
    state.sending.send(device, sending::parse(frame)?).await?;
    Ok(Json(Accepted { accepted: true }))
}
