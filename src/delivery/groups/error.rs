//! Why the edge of groups refuses something.

use std::borrow::Cow;

use crate::delivery::sending;
use crate::ids::Seq;
use crate::log::AppendError;
use crate::projector::push::GroupVerdict;
use crate::store::StoreError;
use crate::wire::stream::{Code, SendResult};

/// How long a refused client should wait where nothing better is known, in milliseconds.
const RETRY_AFTER_MS: u32 = 1_000;

/// Why something was not done. Unless it says otherwise, nothing was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// Malformed or not valid; do not repeat.
    #[error("{0}")]
    BadRequest(Cow<'static, str>),
    /// Not a member, or the rules of groups forbid it.
    #[error("{0}")]
    Forbidden(Cow<'static, str>),
    /// There is no such group, or it is closed, or what was asked of it is gone.
    #[error("{0}")]
    NotFound(&'static str),
    /// Of another epoch than the group's: take in what came since and try again.
    #[error("the group is at epoch {epoch}")]
    Conflict {
        /// The group's epoch.
        epoch: u64,
        /// The item that the sender has to take in.
        seq: Seq,
    },
    /// Another group has this id.
    #[error("there is a group of this id already")]
    Exists,
    /// A cap of `limits` on counts.
    #[error("{0}")]
    LimitReached(&'static str),
    /// A cap of `limits` on sizes.
    #[error("{0}")]
    TooLarge(&'static str),
    /// Too many requests; try again later.
    #[error("too many requests; slow down")]
    RateLimited {
        /// When, in milliseconds.
        retry_after_ms: u32,
    },
    /// The server can't take it now; nothing was accepted.
    #[error("the server can't take it now")]
    Unavailable,
    /// May or may not be accepted: repeat exactly the same.
    #[error("whether it was accepted is not known; repeat exactly the same")]
    OutcomeUnknown,
    /// The client message id is too far behind the highest one.
    #[error("the client message id is too far behind the highest one used")]
    StaleMessageId,
    /// A fault of the server; its log says more.
    #[error("a fault of the server")]
    Internal,
}

impl GroupError {
    /// Not a member of the group.
    pub const fn not_member() -> Self {
        Self::Forbidden(Cow::Borrowed("the device is not in this group"))
    }

    /// No such group, or closed.
    pub const fn no_group() -> Self {
        Self::NotFound("there is no such group, or it is closed")
    }

    /// The public code, the same on every transport.
    pub const fn code(&self) -> Code {
        match self {
            Self::BadRequest(_) => Code::BadRequest,
            Self::Forbidden(_) => Code::Forbidden,
            Self::NotFound(_) => Code::NotFound,
            Self::Conflict { .. } | Self::Exists => Code::Conflict,
            Self::LimitReached(_) => Code::LimitReached,
            Self::TooLarge(_) => Code::TooLarge,
            Self::RateLimited { .. } => Code::RateLimited,
            Self::Unavailable => Code::Unavailable,
            Self::OutcomeUnknown => Code::OutcomeUnknown,
            Self::StaleMessageId => Code::StaleMessageId,
            Self::Internal => Code::Internal,
        }
    }

    /// When to try again, in milliseconds; 0 if waiting is not what helps.
    pub const fn retry_after_ms(&self) -> u32 {
        match self {
            Self::RateLimited { retry_after_ms } => *retry_after_ms,
            Self::Unavailable => RETRY_AFTER_MS,
            _ => 0,
        }
    }

    /// As the answer to a request on the stream.
    pub fn result(&self, request_id: u64) -> SendResult {
        SendResult {
            request_id,
            code: self.code().into(),
            message: self.to_string(),
            retry_after_ms: self.retry_after_ms(),
            ..SendResult::default()
        }
    }
}

impl From<AppendError> for GroupError {
    fn from(error: AppendError) -> Self {
        match sending::append_failed(&error).code() {
            Code::OutcomeUnknown => Self::OutcomeUnknown,
            Code::Unavailable => Self::Unavailable,
            Code::TooLarge => Self::TooLarge("the request is larger than the log takes"),
            _ => Self::Internal,
        }
    }
}

impl From<StoreError> for GroupError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::Unavailable,
            _ => {
                tracing::error!(%error, "a group could not be read");
                Self::Internal
            }
        }
    }
}

/// What a verdict means to the one who waits: the item and the epoch behind it, or why not.
pub(super) fn outcome(verdict: GroupVerdict) -> Result<(Seq, u64), GroupError> {
    Err(match verdict {
        GroupVerdict::Done { seq, epoch } => return Ok((seq, epoch)),
        GroupVerdict::Conflict { epoch, head } => GroupError::Conflict { epoch, seq: head },
        GroupVerdict::Exists => GroupError::Exists,
        GroupVerdict::NotFound => GroupError::no_group(),
        GroupVerdict::Denied(why) => GroupError::Forbidden(why.into()),
        GroupVerdict::Invalid(why) => GroupError::BadRequest(why.into()),
    })
}
