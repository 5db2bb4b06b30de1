//! Extractors whose refusals have the API's own error shape.

use std::fmt::Display;

use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::edge::error::ApiError;
use crate::wire::stream::Code;

/// A path's or query's values.
#[derive(Debug, Clone, Copy)]
pub struct In<E>(pub E);

impl<S, E> FromRequestParts<S> for In<E>
where
    S: Send + Sync,
    E: FromRequestParts<S, Rejection: Display>,
{
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        E::from_request_parts(parts, state).await.map(Self).map_err(|rejection| ApiError::bad_request(rejection.to_string()))
    }
}

/// A JSON body.
#[derive(Debug, Clone, Copy)]
pub struct Body<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        if !is_json(request.headers().get(header::CONTENT_TYPE)) {
            let refused = ApiError::bad_request("the body must be JSON, with Content-Type: application/json");
            return Err(refused.with_status(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        }
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| match rejection.into_response().status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::new(Code::TooLarge, "the body is larger than this route takes"),
            _ => ApiError::bad_request("the body could not be read"),
        })?;
        let parsed = serde_json::from_slice(&bytes);
        parsed.map(Self).map_err(|error| ApiError::bad_request(format!("the body is not what this route takes: {error}")))
    }
}

fn is_json(value: Option<&axum::http::HeaderValue>) -> bool {
    let essence = value.and_then(|value| value.to_str().ok()).and_then(|text| text.split(';').next());
    essence.is_some_and(|essence| essence.trim().eq_ignore_ascii_case("application/json"))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(kind: Option<&str>, body: &str) -> Result<u32, ApiError> {
        let builder = kind.iter().fold(Request::builder(), |builder, kind| builder.header(header::CONTENT_TYPE, *kind));
        let request = builder.body(axum::body::Body::from(body.to_owned())).expect("builds");
        Body::<u32>::from_request(request, &()).await.map(|Body(number)| number)
    }

    #[tokio::test]
    async fn bodies_are_json_or_refused_in_our_words() {
        assert_eq!(read(Some("application/json; charset=utf-8"), "7").await, Ok(7));
        assert_eq!(read(None, "7").await.map_err(|e| e.status()), Err(StatusCode::UNSUPPORTED_MEDIA_TYPE));
        assert_eq!(read(Some("text/plain"), "7").await.map_err(|e| e.code), Err(Code::BadRequest));
        assert_eq!(read(Some("application/json"), "\"x\"").await.map_err(|e| e.status()), Err(StatusCode::BAD_REQUEST));
        let large = " ".repeat(3 * 1024 * 1024);
        assert_eq!(read(Some("application/json"), &large).await.map_err(|e| e.code), Err(Code::TooLarge));
    }
}
