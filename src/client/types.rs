//! What the SDK shows: messages, conversations, events.

use serde::{Deserialize, Serialize};

use super::core::content::MessageId;
use crate::ids::{AccountId, DeviceId, Identity, InvalidId};
use crate::wire::stream::Code;

/// Whom to send to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipient {
    /// An account that is known.
    Account(AccountId),
    /// An identity; the directory says whose it is.
    Identity(Identity),
}

impl From<AccountId> for Recipient {
    fn from(account: AccountId) -> Self {
        Self::Account(account)
    }
}

impl From<Identity> for Recipient {
    fn from(identity: Identity) -> Self {
        Self::Identity(identity)
    }
}

impl std::str::FromStr for Recipient {
    type Err = InvalidId;
    /// An account id (a UUID) or an identity (`user@realm`).
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        text.parse().map(Self::Account).or_else(|_| text.parse().map(Self::Identity))
    }
}

/// How far a message of one's own has come; it only grows, except that a failure can follow [`Status::Sent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Kept here; not accepted by the server yet.
    Pending,
    /// Accepted: durable on the server.
    Sent,
    /// Acknowledged by a device of the recipient.
    Delivered,
    /// The recipient says that it was read.
    Read,
    /// Will not be delivered; see [`Message::failure`].
    Failed,
}

/// Why a message will not be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// The recipient has blocked this account.
    Blocked,
    /// There is no such account.
    NoSuchAccount,
    /// The recipient deleted the account.
    AccountDeleted,
    /// It is too large.
    TooLarge,
    /// It was not fetched within 30 days.
    Expired,
    /// The recipient's devices changed faster than the message could follow.
    DevicesKeepChanging,
    /// The server refused it for another reason.
    Refused,
}

impl Failure {
    pub(crate) fn of(code: Code) -> Self {
        match code {
            Code::Blocked => Self::Blocked,
            Code::NotFound => Self::NoSuchAccount,
            Code::AccountDeleted => Self::AccountDeleted,
            Code::TooLarge => Self::TooLarge,
            Code::DeviceMismatch | Code::StaleDevices => Self::DevicesKeepChanging,
            _ => Self::Refused,
        }
    }
}

/// What a person knows about an account's keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Trust {
    /// Nobody compared the safety number; keys are trusted as first seen, changes are told.
    Unverified,
    /// The safety number was compared.
    Verified,
    /// It was compared, and a device or key changed since. Sending is held until it is verified again, or accepted.
    Changed,
}

/// A text in a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Its place in this device's history; grows with arrival.
    pub position: u64,
    /// The other account of the conversation (one's own, for notes to oneself).
    pub conversation: AccountId,
    /// Who wrote it.
    pub author: AccountId,
    /// Its id.
    pub message_id: MessageId,
    /// Whether it is this account's own.
    pub outgoing: bool,
    /// When it was sent, by its author's clock, milliseconds since 1970 UTC.
    pub sent_ms: u64,
    /// Its text; `None` if it was deleted.
    pub body: Option<String>,
    /// The message it answers.
    pub reply_to: Option<(AccountId, MessageId)>,
    /// Whether it was edited.
    pub edited: bool,
    /// How far it has come; for a message of the other side: `Read` once it was read here, else `Delivered`.
    pub status: Status,
    /// Why it failed.
    pub failure: Option<Failure>,
    /// Reactions: who, what.
    pub reactions: Vec<(AccountId, String)>,
    /// When it will disappear, if it will and the time runs.
    pub expires_ms: Option<u64>,
}

/// A conversation with one account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversation {
    /// The other account.
    pub account: AccountId,
    /// Its identities that the directory has confirmed.
    pub identities: Vec<Identity>,
    /// See [`Trust`].
    pub trust: Trust,
    /// Messages not read yet.
    pub unread: u64,
    /// Texts sent now disappear after this many seconds; 0: they stay.
    pub expire_s: u32,
    /// The account was deleted: nothing can be sent any more.
    pub deleted: bool,
    /// The newest message.
    pub last: Option<Message>,
}

/// A safety number, and what it is worth.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SafetyNumber {
    /// 60 digits.
    pub digits: String,
    /// What was verified before.
    pub trust: Trust,
    /// Whether both device lists were read from the server just now, rather than from memory.
    pub fresh: bool,
}

/// Something durable happened. Events are numbered, kept in the database in the same transaction as what they tell of, and
/// read by position, so that an application that keeps its own position misses none and sees none twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// A message arrived, or another device of one's own sent one.
    Message {
        /// The conversation.
        conversation: AccountId,
        /// Who wrote it.
        author: AccountId,
        /// Its id.
        message_id: MessageId,
        /// The message as it is now; `None` if it has disappeared since.
        #[serde(default)]
        message: Option<Box<Message>>,
    },
    /// A message has another text.
    Edited {
        /// The conversation.
        conversation: AccountId,
        /// Who wrote it.
        author: AccountId,
        /// Its id.
        message_id: MessageId,
    },
    /// A message was taken back.
    Deleted {
        /// The conversation.
        conversation: AccountId,
        /// Who wrote it.
        author: AccountId,
        /// Its id.
        message_id: MessageId,
    },
    /// Somebody reacted to a message.
    Reacted {
        /// The conversation.
        conversation: AccountId,
        /// Who wrote the message.
        author: AccountId,
        /// Its id.
        message_id: MessageId,
        /// Who reacted.
        by: AccountId,
        /// With what; `None` takes it back.
        emoji: Option<String>,
    },
    /// A message of one's own came further.
    Tick {
        /// The conversation.
        conversation: AccountId,
        /// Its id.
        message_id: MessageId,
        /// How far.
        status: Status,
    },
    /// A message of one's own will not be delivered.
    Failed {
        /// The conversation.
        conversation: AccountId,
        /// Its id.
        message_id: MessageId,
        /// Why.
        reason: Failure,
    },
    /// Another device of one's own read the conversation up to now.
    ReadElsewhere {
        /// The conversation.
        conversation: AccountId,
    },
    /// The conversation's expire timer was set.
    ExpireTimer {
        /// The conversation.
        conversation: AccountId,
        /// By whom.
        by: AccountId,
        /// Seconds; 0: off.
        seconds: u32,
    },
    /// A message disappeared: its time was over.
    Expired {
        /// The conversation.
        conversation: AccountId,
        /// Who wrote it.
        author: AccountId,
        /// Its id.
        message_id: MessageId,
    },
    /// The directory confirmed an identity of an account.
    Contact {
        /// The account.
        account: AccountId,
        /// Its identity.
        identity: Identity,
    },
    /// An account that was known has a device more. Worth a warning.
    DeviceAdded {
        /// The account.
        account: AccountId,
        /// The device.
        device: DeviceId,
        /// The account was verified: sending is held now.
        was_verified: bool,
    },
    /// A device has another identity key: it was installed anew, or somebody sits between. Worth a warning.
    IdentityChanged {
        /// The account.
        account: AccountId,
        /// The device.
        device: DeviceId,
        /// The account was verified: sending is held now.
        was_verified: bool,
    },
    /// A message could not be decrypted.
    Undecryptable {
        /// Who sent it.
        account: AccountId,
        /// From which device.
        device: DeviceId,
        /// A new session was begun and the message asked for again.
        asked_again: bool,
    },
    /// Messages were lost to this device before it could fetch them.
    Gap {
        /// They were kept for 30 days and not fetched; else the server lost them.
        expired: bool,
    },
    /// One's own devices or identities changed.
    OwnAccountChanged,
    /// The other side deleted its account.
    AccountDeleted {
        /// Which.
        account: AccountId,
    },
    /// This device was revoked, or the account deleted. Nothing works any more but reading the history.
    SignedOut,
}

/// Something that is only worth knowing now; not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Live {
    /// Somebody types, or stopped.
    Typing {
        /// Who.
        account: AccountId,
        /// Whether it began.
        started: bool,
    },
    /// The connection changed.
    Connection {
        /// To what.
        state: Connection,
    },
}

/// The state of the connection to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Connection {
    /// Not running.
    Stopped,
    /// Trying.
    Connecting,
    /// Connected, fetching what was waiting.
    CatchingUp,
    /// Connected, and everything that was waiting is here.
    Live,
    /// Waiting before the next attempt.
    Waiting,
    /// This device was revoked, or the account deleted.
    SignedOut,
}

/// How far this device is with its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncStatus {
    /// See [`Connection`].
    pub connection: Connection,
    /// Messages of one's own that the server has not accepted yet.
    pub unsent: u64,
    /// The number of the newest event.
    pub newest_event: u64,
}
