//! Device credentials of requests. Private routes stand behind [`require_device`]; a handler that asks for [`AuthDevice`]
//! on a route that does not is refused, so forgetting the layer opens nothing.

use axum::extract::{FromRequestParts, Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use zeroize::Zeroizing;

use crate::auth::{AuthError, KnownDevice};
use crate::edge::EdgeState;
use crate::edge::error::ApiError;
use crate::edge::limits::Client;
use crate::ids::DeviceAddr;
use crate::metrics::{self, Proof};

/// The device that makes the request.
#[derive(Debug, Clone, Copy)]
pub struct AuthDevice(pub DeviceAddr);

impl<S: Send + Sync> FromRequestParts<S> for AuthDevice {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        AuthSender::from_request_parts(parts, state).await.map(|AuthSender(device)| Self(device.addr))
    }
}

/// The same with what sending needs of it.
#[derive(Debug, Clone, Copy)]
pub struct AuthSender(pub KnownDevice);

impl<S: Send + Sync> FromRequestParts<S> for AuthSender {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().copied().ok_or_else(ApiError::unauthenticated)
    }
}

/// The credential in an `Authorization: Bearer …` header.
fn bearer(request: &Request) -> Option<&str> {
    let mut values = request.headers().get_all(AUTHORIZATION).iter();
    let value = values.next()?.to_str().ok()?;
    // Two different ones are no credential: which one would count?
    if values.next().is_some() {
        return None;
    }
    let (scheme, credential) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(credential)
}

async fn device_of(state: &EdgeState, credential: Option<Zeroizing<String>>) -> Result<KnownDevice, AuthError> {
    state.auth.authenticate(&credential.ok_or(AuthError::Refused)?).await
}

/// Lets only requests with a device's credential through, within the device's rate.
pub async fn require_device(State(state): State<EdgeState>, mut request: Request, next: Next) -> Response {
    // A copy, since a request's body can't be lent across a wait.
    let credential = bearer(&request).map(|text| Zeroizing::new(text.to_owned()));
    let device = match device_of(&state, credential).await {
        Ok(device) => device,
        Err(AuthError::Store(error)) => return ApiError::from(error).into_response(),
        Err(AuthError::Refused) => return refuse(&state, &request).into_response(),
    };
    if let Err(limited) = state.rate_limits().request_of(device.addr) {
        return limited.into_response();
    }
    request.extensions_mut().insert(AuthSender(device));
    next.run(request).await
}

fn refuse(state: &EdgeState, request: &Request) -> ApiError {
    metrics::observe_auth_failure(Proof::Device);
    let limited = request.extensions().get::<Client>().map(|client| state.rate_limits().auth_failure_from(*client));
    match limited {
        Some(Err(limited)) => limited,
        _ => ApiError::unauthenticated(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(values: &[&str]) -> Request {
        let builder = values.iter().fold(Request::builder(), |builder, value| builder.header(AUTHORIZATION, *value));
        builder.body(axum::body::Body::empty()).expect("builds")
    }

    #[test]
    fn only_one_bearer_counts() {
        assert_eq!(bearer(&request(&["Bearer sp1_x"])), Some("sp1_x"));
        assert_eq!(bearer(&request(&["bearer sp1_x"])), Some("sp1_x"));
        for wrong in [&[][..], &["sp1_x"], &["Basic sp1_x"], &["Bearer a", "Bearer b"], &["Bearer é"]] {
            assert_eq!(bearer(&request(wrong)), None, "{wrong:?}");
        }
    }

    #[tokio::test]
    async fn without_the_layer_nobody_is_anybody() {
        let (mut parts, _) = request(&["Bearer sp1_x"]).into_parts();
        assert!(AuthDevice::from_request_parts(&mut parts, &()).await.is_err());
    }
}
