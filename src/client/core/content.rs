//! What devices say to each other: building, checking, encoding and padding of `schemas/content.proto`.

use bytes::Bytes;
use prost::Message as _;

use crate::clock::{Random, UnixMillis};
use crate::ids::{AccountId, ClientMessageId, DeviceId, Identity};
use crate::limits;
use crate::wire::padding::padded_len;

/// The Protobuf types of `schemas/content.proto`.
#[allow(missing_docs, clippy::doc_markdown, clippy::large_enum_variant, reason = "generated; the schema is the documentation")]
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/sealpost.content.v1.rs"));
}

pub use proto::{Content, content::Kind};

/// Ids in one read receipt: a receipt stays below 16 KiB.
pub const READ_RECEIPT_IDS: usize = 500;
/// A reaction, in bytes: the longest emoji sequences in use are below 32.
pub const EMOJI_BYTES: usize = 32;
/// The longest expire timer: a year.
pub const EXPIRE_S_MAX: u32 = 31_536_000;

/// The id of a message, chosen by its sender.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MessageId(pub [u8; 16]);

impl MessageId {
    /// A new one.
    pub fn random(random: &dyn Random) -> Self {
        let mut bytes = [0; 16];
        random.fill(&mut bytes);
        Self(bytes)
    }
}

impl std::fmt::Display for MessageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for MessageId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "MessageId({self})")
    }
}

impl std::str::FromStr for MessageId {
    type Err = Invalid;
    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = Invalid("a message id is 32 hexadecimal digits");
        if text.len() != 32 || !text.is_ascii() {
            return Err(invalid);
        }
        let mut bytes = [0; 16];
        for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| invalid)?;
            *byte = u8::from_str_radix(digits, 16).map_err(|_| invalid)?;
        }
        Ok(Self(bytes))
    }
}

impl serde::Serialize for MessageId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for MessageId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Why a content is not one that may be sent or shown. Retrying never helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the content is not valid: {0}")]
pub struct Invalid(pub &'static str);

/// A new content with a random id.
pub fn new(kind: Kind, now: UnixMillis, from: Option<&Identity>, random: &dyn Random) -> Content {
    Content {
        message_id: Bytes::copy_from_slice(&MessageId::random(random).0),
        sent_ms: now.0,
        from_identity: from.map(ToString::to_string).unwrap_or_default(),
        kind: Some(kind),
    }
}

/// A text.
pub fn text(body: &str) -> Kind {
    Kind::Text(proto::Text { body: body.to_owned(), reply_to: None, expire_s: 0 })
}

/// A reference to a message.
pub fn message_ref(author: AccountId, id: MessageId) -> proto::MessageRef {
    proto::MessageRef { author: Bytes::copy_from_slice(author.as_bytes()), message_id: Bytes::copy_from_slice(&id.0) }
}

/// The transcript of a content for the sender's own other devices.
pub fn transcript(of: Content, to: AccountId, identity: Option<&Identity>, id: ClientMessageId) -> Kind {
    Kind::Sent(Box::new(proto::SentTranscript {
        destination: Bytes::copy_from_slice(to.as_bytes()),
        content: Some(Box::new(of)),
        client_message_id: id.0,
        destination_identity: identity.map(ToString::to_string).unwrap_or_default(),
    }))
}

/// Asks a device to send something again.
pub fn retry_request(device: DeviceId, id: ClientMessageId) -> Kind {
    Kind::Retry(proto::RetryRequest { device: u32::from(device.get()), client_message_id: id.0 })
}

/// The message id of a content that was checked.
pub fn id_of(content: &Content) -> Result<MessageId, Invalid> {
    id(&content.message_id)
}

/// 16 bytes as a message id.
pub fn id(bytes: &[u8]) -> Result<MessageId, Invalid> {
    bytes.try_into().map(MessageId).map_err(|_| Invalid("a message id is 16 bytes"))
}

/// 16 bytes as an account id.
pub fn account(bytes: &[u8]) -> Result<AccountId, Invalid> {
    AccountId::from_slice(bytes).map_err(|_| Invalid("an account id is 16 bytes"))
}

/// Checks everything the schema promises. Both sides do: what is sent, and what arrives.
pub fn check(content: &Content) -> Result<(), Invalid> {
    id_of(content)?;
    check_claim(&content.from_identity)?;
    // A kind of a newer version is not an error; it only is not shown.
    let Some(kind) = &content.kind else { return Ok(()) };
    match kind {
        Kind::Text(text) => {
            check_body(&text.body)?;
            text.reply_to.as_ref().map_or(Ok(()), check_ref)?;
            ensure(text.expire_s <= EXPIRE_S_MAX, "an expire timer is at most a year")
        }
        Kind::Reaction(reaction) => {
            check_ref(reaction.target.as_ref().ok_or(Invalid("a reaction has a target"))?)?;
            let length = reaction.emoji.len();
            ensure(if reaction.remove { length == 0 } else { (1..=EMOJI_BYTES).contains(&length) }, "a reaction is 1 to 32 bytes")
        }
        Kind::Edit(edit) => id(&edit.message_id).and_then(|_| check_body(&edit.body)),
        Kind::Delete(delete) => id(&delete.message_id).map(|_| ()),
        Kind::Read(read) => {
            ensure((1..=READ_RECEIPT_IDS).contains(&read.message_ids.len()), "a read receipt has 1 to 500 ids")?;
            read.message_ids.iter().try_for_each(|bytes| id(bytes).map(|_| ()))
        }
        Kind::ExpireTimer(timer) => ensure(timer.seconds <= EXPIRE_S_MAX, "an expire timer is at most a year"),
        Kind::Sent(sent) => check_transcript(sent),
        Kind::Retry(retry) => DeviceId::new(retry.device).map(|_| ()).map_err(|_| Invalid("a device id is 1 to 127")),
        Kind::GroupNameKey(said) => ensure(matches!(said.key.len(), 0 | 32), "the key of a group's name is 32 bytes"),
        Kind::Typing(_) | Kind::Nothing(_) | Kind::GroupRead(_) => Ok(()),
    }
}

fn check_transcript(sent: &proto::SentTranscript) -> Result<(), Invalid> {
    account(&sent.destination)?;
    check_claim(&sent.destination_identity)?;
    let inner = sent.content.as_ref().ok_or(Invalid("a transcript has a content"))?;
    ensure(!matches!(inner.kind, Some(Kind::Sent(_) | Kind::Retry(_))), "a transcript holds what a person sent")?;
    check(inner)
}

fn check_body(body: &str) -> Result<(), Invalid> {
    // Bytes first: counting characters of a huge text would be work for nothing.
    let fits = !body.is_empty() && body.len() <= limits::TEXT_CHARS * 4 && body.chars().count() <= limits::TEXT_CHARS;
    ensure(fits, "a text is 1 to 10,000 characters")
}

fn check_ref(target: &proto::MessageRef) -> Result<(), Invalid> {
    account(&target.author)?;
    id(&target.message_id).map(|_| ())
}

fn check_claim(identity: &str) -> Result<(), Invalid> {
    ensure(identity.is_empty() || identity.parse::<Identity>().is_ok(), "an identity is user@realm")
}

fn ensure(holds: bool, why: &'static str) -> Result<(), Invalid> {
    if holds { Ok(()) } else { Err(Invalid(why)) }
}

/// The padded plaintext of a content, after checking it.
pub fn encode(content: &Content) -> Result<Vec<u8>, Invalid> {
    check(content)?;
    Ok(pad(content.encode_to_vec()))
}

/// The content in a plaintext, checked.
pub fn decode(plaintext: &[u8]) -> Result<Content, Invalid> {
    let content = Content::decode(unpad(plaintext)?).map_err(|_| Invalid("not a Content"))?;
    check(&content)?;
    Ok(content)
}

/// Appends 0x80 and zeros up to the next length of the scheme in `content.proto`.
pub fn pad(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes.push(0x80);
    bytes.resize(padded_len(bytes.len()), 0);
    bytes
}

/// Takes the padding off.
pub fn unpad(padded: &[u8]) -> Result<&[u8], Invalid> {
    let end = padded.iter().rposition(|&byte| byte != 0).ok_or(Invalid("no padding"))?;
    if padded[end] == 0x80 { Ok(&padded[..end]) } else { Err(Invalid("no padding")) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::SeededRandom;
    use crate::wire::padding::BUCKET;

    fn random_text(body: &str) -> Content {
        new(text(body), UnixMillis(5), Some(&"alice@socialink".parse().expect("valid")), &SeededRandom::new(1))
    }

    proptest! {
        #[test]
        fn padding_comes_off_again(bytes in proptest::collection::vec(any::<u8>(), 0..6_000)) {
            let padded = pad(bytes.clone());
            prop_assert_eq!(unpad(&padded).expect("padded"), &bytes[..]);
            prop_assert!(padded.len() > bytes.len());
            prop_assert!(padded.len() <= (bytes.len() + 1).max(BUCKET) * 112 / 100 + BUCKET);
        }

        #[test]
        fn arbitrary_plaintexts_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&bytes);
            let _ = decode(&pad(bytes));
        }

        #[test]
        fn texts_round_trip(body in "\\PC{1,300}") {
            let content = random_text(&body);
            prop_assert_eq!(decode(&encode(&content).expect("valid")).expect("valid"), content);
        }
    }

    #[test]
    fn lengths_fall_into_few_buckets() {
        let lengths: Vec<usize> = [0, 1, 158, 159, 160, 1_599, 1_600, 1_601, 40_000].map(|n| pad(vec![1; n]).len()).into();
        assert_eq!(lengths, [160, 160, 160, 160, 320, 1_600, 1_664, 1_664, 40_960]);
        let distinct: std::collections::BTreeSet<usize> = (0..40_000).map(|n| padded_len(n + 1)).collect();
        assert!(distinct.len() < 90, "{} lengths", distinct.len());
    }

    #[test]
    fn what_breaks_a_promise_is_refused() {
        let with = |kind: Kind| check(&Content { kind: Some(kind), ..random_text("x") });
        let target = message_ref(AccountId::from_bytes([1; 16]), MessageId([2; 16]));
        assert!(with(text(&"ä".repeat(limits::TEXT_CHARS))).is_ok());
        assert!(with(text(&"ä".repeat(limits::TEXT_CHARS + 1))).is_err());
        assert!(with(text("")).is_err());
        let ids = |n| Kind::Read(proto::ReadReceipt { message_ids: vec![Bytes::from_static(&[0; 16]); n] });
        assert!(with(ids(READ_RECEIPT_IDS)).is_ok() && with(ids(READ_RECEIPT_IDS + 1)).is_err() && with(ids(0)).is_err());
        let reaction = |emoji: &str| Kind::Reaction(proto::Reaction { target: Some(target.clone()), emoji: emoji.into(), remove: false });
        assert!(with(reaction("👍")).is_ok() && with(reaction("")).is_err() && with(reaction(&"x".repeat(33))).is_err());
        let timer = |seconds| Kind::ExpireTimer(proto::ExpireTimer { seconds });
        assert!(with(timer(EXPIRE_S_MAX)).is_ok() && with(timer(EXPIRE_S_MAX + 1)).is_err());
        let nested = transcript(random_text("x"), AccountId::from_bytes([1; 16]), None, ClientMessageId(1));
        assert!(with(nested.clone()).is_ok());
        let twice =
            transcript(Content { kind: Some(nested), ..random_text("x") }, AccountId::from_bytes([1; 16]), None, ClientMessageId(1));
        assert!(with(twice).is_err());
        assert!(check(&Content { message_id: Bytes::from_static(&[0; 15]), ..random_text("x") }).is_err());
        assert!(check(&Content { from_identity: "nobody".into(), ..random_text("x") }).is_err());
        assert!(check(&Content { kind: None, ..random_text("x") }).is_ok(), "a newer kind is not an error");
    }

    #[test]
    fn message_ids_print_and_parse() {
        let id = MessageId::random(&SeededRandom::new(3));
        assert_eq!(id.to_string().parse::<MessageId>(), Ok(id));
        assert!("xy".parse::<MessageId>().is_err() && "é".repeat(16).parse::<MessageId>().is_err());
    }
}
