//! What the SDK shows: messages, conversations, events.

use serde::{Deserialize, Serialize};

use super::core::content::MessageId;
use crate::ids::{AccountId, DeviceId, GroupId, Identity, InvalidId};
use crate::wire::stream::Code;

/// Whom to send to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recipient {
    /// An account that is known.
    Account(AccountId),
    /// An identity; the directory says whose it is.
    Identity(Identity),
    /// A group.
    Group(GroupId),
}

/// A conversation: with one account, or in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum ConversationId {
    /// With an account (one's own: notes to oneself).
    Account(AccountId),
    /// In a group.
    Group(GroupId),
}

impl ConversationId {
    /// The account, if it is with one.
    pub fn account(self) -> Option<AccountId> {
        match self {
            Self::Account(account) => Some(account),
            Self::Group(_) => None,
        }
    }

    /// The group, if it is in one.
    pub fn group(self) -> Option<GroupId> {
        match self {
            Self::Group(group) => Some(group),
            Self::Account(_) => None,
        }
    }
}

/// How a group's id is told from an account's, in text.
const GROUP_PREFIX: &str = "group:";

impl std::fmt::Display for ConversationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Account(account) => account.fmt(f),
            Self::Group(group) => write!(f, "{GROUP_PREFIX}{group}"),
        }
    }
}

impl std::str::FromStr for ConversationId {
    type Err = InvalidId;
    /// An account id (a UUID), or `group:` and a group id (a UUID).
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        match text.strip_prefix(GROUP_PREFIX) {
            Some(group) => group.parse().map(Self::Group),
            None => text.parse().map(Self::Account),
        }
    }
}

impl From<ConversationId> for String {
    fn from(conversation: ConversationId) -> Self {
        conversation.to_string()
    }
}

impl TryFrom<String> for ConversationId {
    type Error = InvalidId;
    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<AccountId> for ConversationId {
    fn from(account: AccountId) -> Self {
        Self::Account(account)
    }
}

impl From<GroupId> for ConversationId {
    fn from(group: GroupId) -> Self {
        Self::Group(group)
    }
}

impl PartialEq<AccountId> for ConversationId {
    fn eq(&self, account: &AccountId) -> bool {
        self.account() == Some(*account)
    }
}

impl From<ConversationId> for Recipient {
    fn from(conversation: ConversationId) -> Self {
        match conversation {
            ConversationId::Account(account) => Self::Account(account),
            ConversationId::Group(group) => Self::Group(group),
        }
    }
}

impl From<GroupId> for Recipient {
    fn from(group: GroupId) -> Self {
        Self::Group(group)
    }
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
    /// What a [`ConversationId`] is in text, or an identity (`user@realm`).
    fn from_str(text: &str) -> Result<Self, InvalidId> {
        text.parse::<ConversationId>().map(Self::from).or_else(|_| text.parse().map(Self::Identity))
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
    /// This device is not in the group any more, or the group is closed.
    NotMember,
    /// The server refused it for another reason.
    Refused,
}

impl Failure {
    pub(crate) fn of_group(code: Code) -> Self {
        match code {
            Code::Forbidden | Code::NotFound => Self::NotMember,
            other => Self::of(other),
        }
    }

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
    /// The conversation.
    pub conversation: ConversationId,
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
    /// Its position in its group, once it has one.
    pub group_seq: Option<u64>,
}

/// What an account may do in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupRole {
    /// Write, and leave.
    Member,
    /// Add and remove members, and rename.
    Admin,
    /// All of it: appoint admins, pass ownership on, close the group.
    Owner,
}

/// How this device stands to a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Membership {
    /// Being created: the server has not answered.
    Creating,
    /// In it.
    Member,
    /// In it, but out of touch: joining again.
    Rejoining,
    /// Not, or no longer.
    Left,
    /// It is closed.
    Closed,
}

/// A group, for a list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupSummary {
    /// Its id.
    pub group: GroupId,
    /// Its name; `None` while this device has not been told its key.
    pub name: Option<String>,
    /// See [`Membership`].
    pub membership: Membership,
    /// The epoch of its keys.
    pub epoch: u64,
    /// How many accounts are in it.
    pub accounts: usize,
    /// Nobody is to be woken up for its messages.
    pub muted: bool,
    /// Texts sent now disappear after this many seconds; 0: they stay.
    pub expire_s: u32,
    /// Messages not read yet.
    pub unread: u64,
    /// The newest message.
    pub last: Option<Message>,
}

/// Where a group's keys are: the same at all members of an epoch. Two members that differ here in one epoch have parted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupState {
    /// The epoch.
    pub epoch: u64,
    /// The hash of the ratchet tree (RFC 9420, section 7.8).
    pub tree_hash: Vec<u8>,
    /// SHA-256 of the epoch authenticator (RFC 9420, section 8.7), which stands for all secrets of the epoch and gives none away.
    pub fingerprint: [u8; 32],
}

/// An account in a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupMember {
    /// The account.
    pub account: AccountId,
    /// Its identities that the directory has confirmed.
    pub identities: Vec<Identity>,
    /// Its role.
    pub role: GroupRole,
    /// Its devices that are in the group.
    pub devices: Vec<DeviceId>,
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
        conversation: ConversationId,
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
        conversation: ConversationId,
        /// Who wrote it.
        author: AccountId,
        /// Its id.
        message_id: MessageId,
    },
    /// A message was taken back.
    Deleted {
        /// The conversation.
        conversation: ConversationId,
        /// Who wrote it.
        author: AccountId,
        /// Its id.
        message_id: MessageId,
    },
    /// Somebody reacted to a message.
    Reacted {
        /// The conversation.
        conversation: ConversationId,
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
        conversation: ConversationId,
        /// Its id.
        message_id: MessageId,
        /// How far.
        status: Status,
    },
    /// A message of one's own will not be delivered.
    Failed {
        /// The conversation.
        conversation: ConversationId,
        /// Its id.
        message_id: MessageId,
        /// Why.
        reason: Failure,
    },
    /// Another device of one's own read the conversation up to now.
    ReadElsewhere {
        /// The conversation.
        conversation: ConversationId,
    },
    /// The conversation's expire timer was set.
    ExpireTimer {
        /// The conversation.
        conversation: ConversationId,
        /// By whom.
        by: AccountId,
        /// Seconds; 0: off.
        seconds: u32,
    },
    /// A message disappeared: its time was over.
    Expired {
        /// The conversation.
        conversation: ConversationId,
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
    /// This device is in a group: it created it, or was invited.
    GroupJoined {
        /// Which.
        group: GroupId,
        /// Who added this device.
        by: AccountId,
    },
    /// Members, roles or the name of a group changed.
    GroupChanged {
        /// Which.
        group: GroupId,
        /// The epoch that began.
        epoch: u64,
        /// Who changed it; `None`: nobody in particular, a device joined again by itself.
        by: Option<AccountId>,
        /// Accounts that were not in it before.
        added: Vec<AccountId>,
        /// Accounts that are not in it any more.
        removed: Vec<AccountId>,
        /// The name from now on, if it is another one.
        name: Option<String>,
        /// Whether the owner or the admins are others now.
        roles: bool,
    },
    /// This device is not in the group any more. The history stays.
    GroupLeft {
        /// Which.
        group: GroupId,
        /// The person asked for it; else somebody removed it.
        asked: bool,
    },
    /// The group was closed by its owner. The history stays.
    GroupClosed {
        /// Which.
        group: GroupId,
    },
    /// This device had lost touch with the group and joined it again. What was written meanwhile may be missing here.
    GroupRejoined {
        /// Which.
        group: GroupId,
    },
    /// A commit that nobody can take in ended the group's epoch: its sender means harm, or its software is broken. This device joins again; what is
    /// written meanwhile waits. If it happens again, an admin should remove its sender.
    GroupBroken {
        /// Which.
        group: GroupId,
        /// The epoch that it ended.
        epoch: u64,
        /// Whose commit it was, by the server's word.
        by: Option<AccountId>,
    },
    /// This device can't join a group again that it has lost touch with; it goes on trying now and then. A member who may can remove it and
    /// add it again.
    GroupStuck {
        /// Which.
        group: GroupId,
    },
    /// A message of a group could not be decrypted; the others have it.
    GroupUndecryptable {
        /// Which group.
        group: GroupId,
        /// Who sent it.
        account: AccountId,
        /// From which device.
        device: DeviceId,
    },
    /// A member has read a group up to here.
    GroupRead {
        /// Which group.
        group: GroupId,
        /// Who.
        account: AccountId,
        /// The position in the group: see [`Message::group_seq`].
        seq: u64,
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
