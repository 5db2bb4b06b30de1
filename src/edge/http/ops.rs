//! For operators: is it alive, is it ready, what does it do.

use axum::extract::{Extension, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use subtle::ConstantTimeEq as _;

use crate::config::Expose;
use crate::edge::Operations;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::limits::Client;
use crate::metrics::{observe_disk, observe_process};
use crate::wire::stream::Code;

const TEXT: [(header::HeaderName, &str); 1] = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];

/// Whether the process is alive
#[utoipa::path(get, path = "/healthz", tag = "operations", responses((status = 200, description = "`ok`", content_type = "text/plain")))]
pub async fn alive() -> Response {
    (TEXT, "ok\n").into_response()
}

/// Whether the broker can do its work
///
/// Its log takes appends, its projector has caught up, and it is not draining; else 503 with the reason.
#[utoipa::path(
    get, path = "/readyz", tag = "operations",
    responses((status = 200, description = "`ready`", content_type = "text/plain"), (status = 503, description = "`unavailable`", body = ErrorBody))
)]
pub async fn ready(State(operations): State<Operations>) -> Result<Response, ApiError> {
    match operations.health().ready().await {
        Ok(()) => Ok((TEXT, "ready\n").into_response()),
        Err(why) => Err(ApiError::new(Code::Unavailable, why)),
    }
}

/// Metrics in the Prometheus text format
///
/// Who may read them is configured (`metrics.expose`, `metrics.token`); for everybody else there is no such page.
#[utoipa::path(
    get, path = "/metrics", tag = "operations",
    responses((status = 200, description = "Prometheus text format 0.0.4", content_type = "text/plain"), (status = 404, body = ErrorBody))
)]
pub async fn metrics(
    State(operations): State<Operations>,
    Extension(client): Extension<Client>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let hidden = || ApiError::not_found("there is no such page");
    let policy = &operations.config().metrics;
    let from_here = match policy.expose {
        Expose::Nobody => false,
        Expose::Loopback => client.loopback,
        Expose::Anyone => true,
    };
    if !from_here {
        return Err(hidden());
    }
    if let Some(token) = &policy.token {
        let shown = headers.get(header::AUTHORIZATION).map_or(&b""[..], |value| value.as_bytes());
        let wanted = zeroize::Zeroizing::new(format!("Bearer {}", token.expose()));
        if !bool::from(shown.ct_eq(wanted.as_bytes())) {
            return Err(hidden());
        }
    }
    // Rendering walks all samples: not on a thread that serves connections.
    let rendered = tokio::task::spawn_blocking(move || {
        observe_process();
        observe_disk(&operations.config().data);
        operations.exporter().render()
    });
    let text = rendered.await.map_err(|error| ApiError::internal(&error))?;
    Ok((StatusCode::OK, [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}
