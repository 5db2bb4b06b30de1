//! A device's inbox without a stream.

use std::time::Duration;

use axum::Json;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::model::B64;
use crate::delivery::api;
use crate::edge::EdgeState;
use crate::edge::auth::AuthDevice;
use crate::edge::error::{ApiError, ErrorBody};
use crate::edge::extract::{Body, In};
use crate::ids::Seq;
use crate::limits;
use crate::wire::event::{ReceiptEntry, ReceiptKind};
use crate::wire::stream::GapReason;

const DEFAULT_ITEMS: usize = 100;

/// Which page.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PageQuery {
    /// Items behind this seq. Without it, and if the device's cursor is further: behind what is acknowledged.
    #[serde(default)]
    after: u64,
    /// At most so many items, 1 to 500. Default 100.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<usize>,
    /// If nothing is there, wait so many seconds for the first item, at most 60. Default 0.
    #[param(maximum = 60)]
    #[serde(default)]
    wait_s: u64,
}

/// A page of the inbox.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct InboxPage {
    /// In seq order.
    pub items: Vec<InboxItem>,
    /// Nothing more is pending behind the last item.
    pub empty: bool,
}

/// One of three: an object with one field.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum InboxItem {
    /// A message.
    Envelope(Envelope),
    /// What became of messages that this device sent.
    Receipt(Receipt),
    /// Envelopes were lost to this device; start recovery.
    Gap(Gap),
}

/// A message, as its sender's client made it.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Envelope {
    /// Position in this device's inbox, strictly growing, with holes.
    pub seq: u64,
    /// The sender's account (a UUID).
    #[schema(format = Uuid)]
    pub sender_account: String,
    /// The sender's device, 1 to 127.
    pub sender_device: u8,
    /// The sender's counter; receipts for the sender name it.
    pub client_message_id: u64,
    /// libsignal's message type: 2 (SignalMessage) or 3 (PreKeySignalMessage).
    pub r#type: u8,
    /// When the server accepted it, milliseconds since 1970 UTC.
    pub accepted_ms: u64,
    /// Whether the sender asked to wake the recipient.
    pub urgent: bool,
    /// The serialized libsignal message.
    pub content: B64,
}

/// What became of messages that this device sent. Applying one twice is harmless.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Receipt {
    /// Its position.
    pub seq: u64,
    /// One for each device and outcome.
    pub entries: Vec<ReceiptLine>,
}

/// What became of messages for one device.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct ReceiptLine {
    /// The account that the messages were for.
    #[schema(format = Uuid)]
    pub account: String,
    /// Its device.
    pub device: u8,
    /// `delivered` (the device acknowledged), `expired` (not fetched within 30 days) or `rejected` (dropped after acceptance, since the
    /// id was too old: send again with a new id).
    #[schema(example = "delivered")]
    pub kind: String,
    /// Ranges of ids, both ends included.
    pub client_message_ids: Vec<[u64; 2]>,
}

/// Envelopes between `from` and `to` (both included) were lost to this device.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct Gap {
    /// The first position.
    pub from: u64,
    /// The last one; acknowledging it acknowledges the gap.
    pub to: u64,
    /// `expired` (not fetched within 30 days) or `lost`.
    #[schema(example = "expired")]
    pub reason: String,
}

fn line(entry: ReceiptEntry) -> ReceiptLine {
    let kind = match entry.kind {
        ReceiptKind::Delivered => "delivered",
        ReceiptKind::Expired => "expired",
        ReceiptKind::Rejected => "rejected",
    };
    ReceiptLine {
        account: entry.recipient.account.to_string(),
        device: entry.recipient.device.get(),
        kind: kind.to_owned(),
        client_message_ids: entry.ids.into_iter().map(|(first, last)| [first, last]).collect(),
    }
}

fn shown(item: api::Item) -> InboxItem {
    match item {
        api::Item::Envelope(envelope) => InboxItem::Envelope(Envelope {
            seq: envelope.seq.0,
            sender_account: envelope.sender.account.to_string(),
            sender_device: envelope.sender.device.get(),
            client_message_id: envelope.client_message_id.0,
            r#type: envelope.kind,
            accepted_ms: envelope.accepted.0,
            urgent: envelope.urgent,
            content: B64(envelope.content.into()),
        }),
        api::Item::Receipt { seq, entries } => InboxItem::Receipt(Receipt { seq: seq.0, entries: entries.into_iter().map(line).collect() }),
        api::Item::Gap { from, to, reason } => {
            let reason = if reason == GapReason::GapExpired { "expired" } else { "lost" };
            InboxItem::Gap(Gap { from: from.0, to: to.0, reason: reason.to_owned() })
        }
    }
}

/// Reads the inbox
///
/// For background fetches; an app in the foreground uses the stream. Pages are about 4 MiB at most. What is not acknowledged
/// comes again, so acknowledge after each page is safely kept, and ask again while `empty` is false.
#[utoipa::path(
    get, path = "/v1/inbox", tag = "inbox", security(("device" = [])), params(PageQuery),
    responses((status = 200, body = InboxPage), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub async fn page(
    State(state): State<EdgeState>,
    AuthDevice(device): AuthDevice,
    In(Query(query)): In<Query<PageQuery>>,
) -> Result<Json<InboxPage>, ApiError> {
    let items_max = query.limit.unwrap_or(DEFAULT_ITEMS);
    if !(1..=limits::INBOX_PAGE_ITEMS).contains(&items_max) {
        return Err(ApiError::bad_request("limit must be from 1 to 500"));
    }
    if query.wait_s > limits::LONG_POLL_S {
        return Err(ApiError::bad_request("wait_s must be at most 60"));
    }
    let page = state.inbox.page(device, Seq(query.after), items_max, Duration::from_secs(query.wait_s)).await?;
    Ok(Json(InboxPage { items: page.items.into_iter().map(shown).collect(), empty: page.empty }))
}

/// How far a device has come.
#[derive(Debug, Deserialize, ToSchema)]
pub struct Ack {
    /// Everything up to and including it is safely kept by the device.
    pub seq: u64,
}

/// Acknowledges
///
/// Cumulative: less than before does nothing; more than was ever sent is `bad_request`. The server then drops
/// what is acknowledged, and tells the senders.
#[utoipa::path(
    post, path = "/v1/inbox/ack", tag = "inbox", security(("device" = [])), request_body = Ack,
    responses((status = 204, description = "Noted"), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody), (status = 503, body = ErrorBody))
)]
pub async fn ack(State(state): State<EdgeState>, AuthDevice(device): AuthDevice, Body(body): Body<Ack>) -> Result<StatusCode, ApiError> {
    state.inbox.ack(device, Seq(body.seq)).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AccountId, DeviceAddr, DeviceId};

    /// The shapes that the documentation promises.
    #[test]
    fn items_look_as_documented() {
        let account = AccountId::from_bytes([1; 16]);
        let recipient = DeviceAddr { account, device: DeviceId::new(2).expect("valid") };
        let entries = vec![ReceiptEntry { recipient, kind: ReceiptKind::Delivered, ids: vec![(1, 3)] }];
        let json = |item| serde_json::to_string(&shown(item)).expect("writes");
        assert_eq!(
            json(api::Item::Receipt { seq: Seq(7), entries }),
            r#"{"receipt":{"seq":7,"entries":[{"account":"01010101-0101-0101-0101-010101010101","device":2,"kind":"delivered","client_message_ids":[[1,3]]}]}}"#
        );
        assert_eq!(
            json(api::Item::Gap { from: Seq(1), to: Seq(2), reason: GapReason::GapLost }),
            r#"{"gap":{"from":1,"to":2,"reason":"lost"}}"#
        );
        let envelope = api::Envelope {
            seq: Seq(1),
            sender: recipient,
            client_message_id: crate::ids::ClientMessageId(9),
            kind: 3,
            accepted: crate::clock::UnixMillis(5),
            urgent: true,
            content: bytes::Bytes::from_static(b"x"),
        };
        assert_eq!(
            json(api::Item::Envelope(envelope)),
            r#"{"envelope":{"seq":1,"sender_account":"01010101-0101-0101-0101-010101010101","sender_device":2,"client_message_id":9,"type":3,"accepted_ms":5,"urgent":true,"content":"eA=="}}"#
        );
    }
}
