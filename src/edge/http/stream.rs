//! The device stream's entrance.

use axum::extract::State;
use axum::extract::ws::WebSocketUpgrade;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::http::StatusCode;
use axum::response::Response;

use crate::edge::auth::AuthSender;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::{EdgeState, ws};

/// Opens the device's stream
///
/// Upgrades to a WebSocket (RFC 6455, version 13). Binary messages only: each from the client is one `ClientBatch`, each
/// from the server one `ServerBatch` of `schemas/stream.proto`, which describes the frames, their order and the close codes.
/// One stream a device: a newer one ends the older one (close code 4000).
#[utoipa::path(
    get, path = "/v1/stream", tag = "stream", security(("device" = [])),
    responses(
        (status = 101, description = "Switched to WebSocket"),
        (status = 400, description = "`bad_request`: not a WebSocket handshake", body = ErrorBody),
        (status = 401, body = ErrorBody),
        (status = 426, description = "`bad_request`: the connection can't be upgraded", body = ErrorBody),
        (status = 503, description = "`unavailable`: the server drains; reconnect", body = ErrorBody),
    )
)]
pub async fn open(
    State(state): State<EdgeState>,
    device: AuthSender,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Result<Response, ApiError> {
    match upgrade {
        Ok(upgrade) => Ok(ws::upgrade(State(state), device, upgrade).await),
        Err(rejection @ WebSocketUpgradeRejection::ConnectionNotUpgradable(_)) => {
            Err(ApiError::bad_request(rejection.to_string()).with_status(StatusCode::UPGRADE_REQUIRED))
        }
        Err(rejection) => Err(ApiError::bad_request(rejection.to_string())),
    }
}
