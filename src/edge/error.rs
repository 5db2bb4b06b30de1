//! The one error answer of the HTTP API, and the one mapping of public codes to HTTP.

use std::borrow::Cow;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::delivery::api::{InboxError, SendError};
use crate::delivery::groups::GroupError;
use crate::ids::{DeviceId, InvalidId, Seq};
use crate::projector::push::Verdict;
use crate::store::StoreError;
use crate::wire::stream::Code;

/// How long a client is told to wait where the server does not know better, in milliseconds.
pub const RETRY_AFTER_MS: u32 = 1_000;

/// An answer that is not a success. Its fields are what the client sees: sources stay in the server's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {message}", name(*code))]
pub struct ApiError {
    /// From the closed set of codes; decides the HTTP status.
    pub code: Code,
    /// For a person who reads logs; not stable.
    pub message: Cow<'static, str>,
    /// With `device_mismatch`: devices that need an envelope and got none.
    pub missing_devices: Vec<DeviceId>,
    /// With `device_mismatch`: devices that do not exist.
    pub extra_devices: Vec<DeviceId>,
    /// With `stale_devices`: devices that were registered anew.
    pub stale_devices: Vec<DeviceId>,
    /// With `conflict` in a group: its epoch, and the item that the sender has to take in.
    pub group_at: Option<Box<(u64, Seq)>>,
    /// When to try again; 0 if waiting is not what helps.
    pub retry_after_ms: u32,
    /// Only where HTTP has a finer status than the code (405, 415, 408).
    status: Option<StatusCode>,
}

/// The code's name in JSON: that of `stream.proto` in lower snake case.
pub const fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::BadRequest => "bad_request",
        Code::Unauthenticated => "unauthenticated",
        Code::Forbidden => "forbidden",
        Code::Blocked => "blocked",
        Code::NotFound => "not_found",
        Code::DeviceMismatch => "device_mismatch",
        Code::StaleDevices => "stale_devices",
        Code::TooLarge => "too_large",
        Code::RateLimited => "rate_limited",
        Code::Unavailable => "unavailable",
        Code::OutcomeUnknown => "outcome_unknown",
        Code::StaleMessageId => "stale_message_id",
        Code::AccountDeleted => "account_deleted",
        Code::Conflict => "conflict",
        Code::LimitReached => "limit_reached",
        Code::InboxFull => "inbox_full",
        Code::Internal => "internal",
    }
}

/// The code's HTTP status.
pub const fn status(code: Code) -> StatusCode {
    match code {
        Code::Ok => StatusCode::OK,
        Code::BadRequest => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::Forbidden | Code::Blocked | Code::LimitReached => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::DeviceMismatch | Code::StaleMessageId | Code::Conflict => StatusCode::CONFLICT,
        Code::StaleDevices | Code::AccountDeleted => StatusCode::GONE,
        Code::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        Code::RateLimited | Code::InboxFull => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        Code::OutcomeUnknown => StatusCode::GATEWAY_TIMEOUT,
        Code::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl ApiError {
    /// An answer with this code.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            code,
            message: message.into(),
            missing_devices: Vec::new(),
            extra_devices: Vec::new(),
            stale_devices: Vec::new(),
            group_at: None,
            retry_after_ms: if matches!(code, Code::Unavailable) { RETRY_AFTER_MS } else { 0 },
            status: None,
        }
    }

    /// 400.
    pub fn bad_request(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::BadRequest, message)
    }

    /// 401: always the same words, so that they say nothing about why.
    pub fn unauthenticated() -> Self {
        Self::new(Code::Unauthenticated, "no valid device credential")
    }

    /// 404.
    pub fn not_found(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::NotFound, message)
    }

    /// 429.
    pub fn rate_limited(retry_after_ms: u32) -> Self {
        Self { retry_after_ms: retry_after_ms.max(1), ..Self::new(Code::RateLimited, "too many requests; slow down") }
    }

    /// 500; the cause goes to the server's log, not to the client.
    pub fn internal(cause: &dyn std::fmt::Display) -> Self {
        tracing::error!(%cause, "a request failed by a fault of the server");
        Self::new(Code::Internal, "a fault of the server")
    }

    /// With a finer HTTP status than the code's own.
    #[must_use]
    pub const fn with_status(mut self, status: StatusCode) -> Self {
        self.status = Some(status);
        self
    }

    /// The HTTP status of the answer.
    pub fn status(&self) -> StatusCode {
        self.status.unwrap_or(status(self.code))
    }
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct ErrorBody {
    /// From the closed set of codes; see the description of the API.
    #[schema(example = "device_mismatch")]
    pub code: String,
    /// For a person who reads logs; never shown to users, not stable.
    pub message: String,
    /// With `device_mismatch`: devices that need an envelope and got none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missing_devices: Vec<u8>,
    /// With `device_mismatch`: devices that do not exist.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub extra_devices: Vec<u8>,
    /// With `stale_devices`: devices that were registered anew; drop their sessions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stale_devices: Vec<u8>,
    /// With `conflict` in a group: the group's epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// With `conflict` in a group: the item that the sender has to take in before it tries again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seq: Option<u64>,
    /// When to try again, in milliseconds. The `Retry-After` header says the same in whole seconds, rounded up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_ms: Option<u32>,
}

impl IntoResponse for ApiError {
    fn into_response(mut self) -> Response {
        // Whoever is sent away for a while is told for how long, whatever sent him away.
        if matches!(self.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) && self.retry_after_ms == 0 {
            self.retry_after_ms = RETRY_AFTER_MS;
        }
        let numbers = |ids: &[DeviceId]| ids.iter().map(|id| id.get()).collect();
        let body = ErrorBody {
            code: name(self.code).to_owned(),
            message: self.message.to_string(),
            missing_devices: numbers(&self.missing_devices),
            extra_devices: numbers(&self.extra_devices),
            stale_devices: numbers(&self.stale_devices),
            epoch: self.group_at.as_ref().map(|at| at.0),
            seq: self.group_at.as_ref().map(|at| at.1.0),
            retry_after_ms: (self.retry_after_ms > 0).then_some(self.retry_after_ms),
        };
        let mut response = (self.status(), Json(body)).into_response();
        if self.retry_after_ms > 0 {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_ms.div_ceil(1000)));
        }
        if self.code == Code::Unauthenticated {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<SendError> for ApiError {
    fn from(error: SendError) -> Self {
        let mut answer = Self::new(error.code(), error.to_string());
        answer.retry_after_ms = error.retry_after_ms();
        match error {
            SendError::Mismatch { missing, extra } => (answer.missing_devices, answer.extra_devices) = (missing, extra),
            SendError::Stale { devices } => answer.stale_devices = devices,
            _ => {}
        }
        answer
    }
}

impl From<InboxError> for ApiError {
    fn from(error: InboxError) -> Self {
        let retry_after_ms = error.retry_after_ms();
        Self { retry_after_ms, ..Self::new(error.code(), error.to_string()) }
    }
}

impl From<GroupError> for ApiError {
    fn from(error: GroupError) -> Self {
        let mut answer = Self::new(error.code(), error.to_string());
        answer.retry_after_ms = error.retry_after_ms();
        if let GroupError::Conflict { epoch, seq } = error {
            answer.group_at = Some(Box::new((epoch, seq)));
        }
        answer
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::LimitReached => Self::new(Code::LimitReached, "a cap of the account is reached"),
            StoreError::Unavailable(cause) => {
                tracing::warn!(%cause, "the store is unavailable");
                Self::new(Code::Unavailable, "the store is unavailable")
            }
            StoreError::Corrupt(_) => Self::internal(&error),
        }
    }
}

impl From<InvalidId> for ApiError {
    fn from(error: InvalidId) -> Self {
        Self::bad_request(error.to_string())
    }
}

/// What a directory verdict that is not `Done` means for the one who asked.
pub fn refused(verdict: &Verdict) -> Option<ApiError> {
    Some(match verdict {
        Verdict::Done(_) => return None,
        Verdict::NotFound => ApiError::not_found("there is no such account, device or identity"),
        Verdict::AccountDeleted => ApiError::new(Code::AccountDeleted, "the account was deleted"),
        Verdict::Conflict => ApiError::new(Code::Conflict, "already taken by another account, or the last of its kind"),
        Verdict::LimitReached => ApiError::new(Code::LimitReached, "a cap of the account is reached"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_schema() {
        for number in 0..=17 {
            let code = Code::try_from(number).expect("a code");
            assert_eq!(name(code).to_uppercase(), code.as_str_name());
        }
        assert!(Code::try_from(18).is_err(), "a new code needs a name, a status and this test");
    }

    #[test]
    fn statuses_are_those_written_in_the_schema() {
        let schema = include_str!("../../schemas/stream.proto");
        for number in 1..=17 {
            let code = Code::try_from(number).expect("a code");
            let line = schema.lines().find(|line| line.trim().starts_with(&format!("{} = {number};", code.as_str_name()))).expect("a line");
            let written: u16 = line.split("// ").nth(1).expect("a comment")[..3].parse().expect("a status");
            assert_eq!(status(code).as_u16(), written, "{line}");
        }
    }

    #[test]
    fn answers_say_when_to_come_back() {
        let response = ApiError::rate_limited(1_001).into_response();
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        for number in 1..=17 {
            let code = Code::try_from(number).expect("a code");
            let response = ApiError { retry_after_ms: 0, ..ApiError::new(code, "") }.into_response();
            let later = matches!(response.status().as_u16(), 429 | 503);
            assert_eq!(response.headers().contains_key(header::RETRY_AFTER), later, "{code:?}");
        }
    }
}
