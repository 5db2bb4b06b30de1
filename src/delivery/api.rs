//! What every transport asks of delivery: sending to an account, and reading one device's inbox without a stream.
//! HTTP and the WebSocket both go through these two traits, so that they behave the same.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::auth::KnownDevice;
use crate::clock::UnixMillis;
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, RegistrationId, Seq};
use crate::wire::event::ReceiptEntry;
use crate::wire::stream::{Code, GapReason};

/// Everything that one client message needs for one recipient account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendRequest {
    /// Who it is for; may be the sender's own account (then for its other devices).
    pub recipient: AccountId,
    /// The sender's counter for this recipient, from its `first_message_id`.
    pub client_message_id: ClientMessageId,
    /// Wake the recipient.
    pub urgent: bool,
    /// Attached devices or nobody; never stored.
    pub ephemeral: bool,
    /// One for each device of the recipient.
    pub envelopes: Vec<OutgoingEnvelope>,
}

/// One opaque ciphertext for one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutgoingEnvelope {
    /// The device it is for.
    pub device: DeviceId,
    /// The registration id that the sender knows for it.
    pub registration_id: RegistrationId,
    /// The number of its `EnvelopeType` in `stream.proto`.
    pub kind: u8,
    /// The serialized libsignal message, at most [`crate::limits::ENVELOPE_BYTES`].
    pub content: Bytes,
}

/// Why a `Send` was not accepted. Unless it says otherwise, nothing was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Malformed; do not repeat.
    #[error("{0}")]
    BadRequest(&'static str),
    /// The sending device was revoked meanwhile.
    #[error("the device is not registered any more")]
    Unauthenticated,
    /// The sender may not do that.
    #[error("{0}")]
    Forbidden(&'static str),
    /// The recipient has blocked the sender.
    #[error("the recipient has blocked the sender")]
    Blocked,
    /// No such account.
    #[error("there is no such account")]
    NotFound,
    /// Envelopes for other devices than the account has.
    #[error("the envelopes are for other devices than the account has")]
    Mismatch {
        /// Devices that need an envelope and got none.
        missing: Vec<DeviceId>,
        /// Devices that do not exist.
        extra: Vec<DeviceId>,
    },
    /// Devices that were registered anew.
    #[error("devices were registered anew: drop their sessions and fetch their keys")]
    Stale {
        /// Which ones.
        devices: Vec<DeviceId>,
    },
    /// A cap of `limits` on sizes.
    #[error("{0}")]
    TooLarge(&'static str),
    /// Too many requests; try again later.
    #[error("too many messages; slow down")]
    RateLimited {
        /// When, in milliseconds.
        retry_after_ms: u32,
    },
    /// The server can't take it now; nothing was accepted.
    #[error("the server can't take messages now")]
    Unavailable {
        /// When to try again, in milliseconds.
        retry_after_ms: u32,
    },
    /// May or may not be accepted: repeat with the same client message id.
    #[error("whether the message was accepted is not known; repeat it with the same client message id")]
    OutcomeUnknown,
    /// The client message id is too far behind the highest one.
    #[error("the client message id is too far behind the highest one used")]
    StaleMessageId,
    /// The recipient deleted the account.
    #[error("the account was deleted")]
    AccountDeleted,
    /// The recipient's inbox is at its cap.
    #[error("the recipient's inbox is full")]
    InboxFull {
        /// When to try again, in milliseconds.
        retry_after_ms: u32,
    },
    /// A fault of the server; its log says more.
    #[error("a fault of the server")]
    Internal,
}

impl SendError {
    /// The public code, the same on every transport.
    pub const fn code(&self) -> Code {
        match self {
            Self::BadRequest(_) => Code::BadRequest,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Forbidden(_) => Code::Forbidden,
            Self::Blocked => Code::Blocked,
            Self::NotFound => Code::NotFound,
            Self::Mismatch { .. } => Code::DeviceMismatch,
            Self::Stale { .. } => Code::StaleDevices,
            Self::TooLarge(_) => Code::TooLarge,
            Self::RateLimited { .. } => Code::RateLimited,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::OutcomeUnknown => Code::OutcomeUnknown,
            Self::StaleMessageId => Code::StaleMessageId,
            Self::AccountDeleted => Code::AccountDeleted,
            Self::InboxFull { .. } => Code::InboxFull,
            Self::Internal => Code::Internal,
        }
    }

    /// When to try again, in milliseconds; 0 if waiting is not what helps.
    pub const fn retry_after_ms(&self) -> u32 {
        match self {
            Self::RateLimited { retry_after_ms } | Self::Unavailable { retry_after_ms } | Self::InboxFull { retry_after_ms } => {
                *retry_after_ms
            }
            _ => 0,
        }
    }
}

/// Takes messages.
#[async_trait]
pub trait Sending: Send + Sync + 'static {
    /// Accepts all envelopes of the request, or none. `Ok`: they are durable on the log. The same (sender, recipient,
    /// client message id) again is answered the same and delivered once. Dropping the future takes nothing back.
    async fn send(&self, sender: KnownDevice, request: SendRequest) -> Result<(), SendError>;
}

/// Why an inbox was not read or not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InboxError {
    /// Malformed (acknowledges what was never there); do not repeat.
    #[error("{0}")]
    BadRequest(&'static str),
    /// The device was revoked meanwhile.
    #[error("the device is not registered any more")]
    Unauthenticated,
    /// The server can't serve it now.
    #[error("the inbox can't be served now")]
    Unavailable {
        /// When to try again, in milliseconds.
        retry_after_ms: u32,
    },
    /// A fault of the server; its log says more.
    #[error("a fault of the server")]
    Internal,
}

impl InboxError {
    /// The public code, the same on every transport.
    pub const fn code(&self) -> Code {
        match self {
            Self::BadRequest(_) => Code::BadRequest,
            Self::Unauthenticated => Code::Unauthenticated,
            Self::Unavailable { .. } => Code::Unavailable,
            Self::Internal => Code::Internal,
        }
    }

    /// When to try again, in milliseconds; 0 if waiting is not what helps.
    pub const fn retry_after_ms(&self) -> u32 {
        match self {
            Self::Unavailable { retry_after_ms } => *retry_after_ms,
            _ => 0,
        }
    }
}

/// A page of a device's inbox.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// In seq order.
    pub items: Vec<Item>,
    /// Nothing more is pending behind the last item.
    pub empty: bool,
}

/// Something in a device's inbox, ready to be handed out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A message.
    Envelope(Envelope),
    /// What became of messages this device sent.
    Receipt {
        /// Its position.
        seq: Seq,
        /// What became of which.
        entries: Vec<ReceiptEntry>,
    },
    /// Between `from` and `to` (both included) envelopes were lost to this device.
    Gap {
        /// The first one.
        from: Seq,
        /// The last one; acknowledging it acknowledges the gap.
        to: Seq,
        /// Why.
        reason: GapReason,
    },
}

/// An envelope, its at-rest seal opened: what the sender sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Envelope {
    /// Its position.
    pub seq: Seq,
    /// Who sent it.
    pub sender: DeviceAddr,
    /// The sender's counter.
    pub client_message_id: ClientMessageId,
    /// The number of its `EnvelopeType`.
    pub kind: u8,
    /// When it was accepted.
    pub accepted: UnixMillis,
    /// Whether it wakes the recipient.
    pub urgent: bool,
    /// The ciphertext that the sender's client made.
    pub content: Bytes,
}

/// Reads inboxes without a stream: for background fetches.
#[async_trait]
pub trait Inbox: Send + Sync + 'static {
    /// Items behind `after` (or behind the device's cursor, if that is later), at most `items_max` and about
    /// `limits::INBOX_PAGE_BYTES`. If there is none, waits up to `wait` for the first.
    /// Dropping the future is harmless.
    async fn page(&self, device: DeviceAddr, after: Seq, items_max: usize, wait: Duration) -> Result<Page, InboxError>;

    /// Everything up to and including `to` is safely kept by the device. Going back does nothing.
    async fn ack(&self, device: DeviceAddr, to: Seq) -> Result<(), InboxError>;
}
