//! A device's inbox without a stream: pages and acknowledgements for background fetches.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::BytesMut;

use crate::delivery::api::{Envelope, Inbox, InboxError, Item, Page};
use crate::delivery::hub::Hub;
use crate::ids::{DeviceAddr, Seq};
use crate::limits;
use crate::log::{AppendError, ReadError, Topic, TopicPartition};
use crate::store::seal::{self, Sealer};
use crate::store::{PendingBody, PendingItem, StoreError};
use crate::wire::event::flags;
use crate::wire::stream::GapReason;

const RETRY_AFTER_MS: u32 = 1_000;

/// Reads inboxes from the store.
#[derive(Debug, Clone)]
pub struct Inboxes(pub Arc<Hub>);

impl From<StoreError> for InboxError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Unavailable(_) => Self::Unavailable { retry_after_ms: RETRY_AFTER_MS },
            error => {
                tracing::error!(%error, "an inbox could not be read");
                Self::Internal
            }
        }
    }
}

impl Inboxes {
    async fn read(&self, device: DeviceAddr, after: Seq, items_max: usize) -> Result<Page, InboxError> {
        let hub = &self.0;
        let view = hub.directory.get(device.account).await?.filter(|view| !view.deleted).ok_or(InboxError::Unauthenticated)?;
        let sealer = view.sealer().ok_or(InboxError::Unauthenticated)?;
        let inbox = hub.delivery.inboxes(vec![device]).await?.first().copied().flatten().unwrap_or_default();
        let mut page = Page::default();
        let mut after = after.max(inbox.cursor);
        if inbox.expired_to > after {
            page.items.push(Item::Gap { from: Seq(after.0 + 1), to: inbox.expired_to, reason: GapReason::GapExpired });
            after = inbox.expired_to;
        }
        let items_max = items_max.clamp(1, limits::INBOX_PAGE_ITEMS);
        let stored = hub.delivery.pending(device, after, Seq::MAX, items_max, limits::INBOX_PAGE_BYTES).await?;
        page.empty = match stored.last() {
            None => true,
            Some(last) => hub.delivery.pending(device, last.seq, Seq::MAX, 1, 1).await?.is_empty(),
        };
        page.items.extend(stored.into_iter().map(|item| open(device, item, sealer)));
        Ok(page)
    }
}

fn open(device: DeviceAddr, item: PendingItem, sealer: &Sealer) -> Item {
    let seq = item.seq;
    let envelope = match item.body {
        PendingBody::Receipts(entries) => return Item::Receipt { seq, entries },
        PendingBody::Envelope(envelope) => envelope,
    };
    let context = seal::Context { recipient: device, sender: envelope.sender, client_message_id: envelope.client_message_id };
    let mut content = BytesMut::with_capacity(envelope.sealed.len());
    match sealer.open(&context, &envelope.sealed, &mut content) {
        Err(_) => Item::Gap { from: seq, to: seq, reason: GapReason::GapLost },
        Ok(()) => Item::Envelope(Envelope {
            seq,
            sender: envelope.sender,
            client_message_id: envelope.client_message_id,
            kind: envelope.kind,
            accepted: envelope.accepted,
            urgent: envelope.flags & flags::URGENT != 0,
            content: content.freeze(),
        }),
    }
}

#[async_trait]
impl Inbox for Inboxes {
    async fn page(&self, device: DeviceAddr, after: Seq, items_max: usize, wait: Duration) -> Result<Page, InboxError> {
        let deadline = tokio::time::Instant::now() + wait.min(Duration::from_secs(limits::LONG_POLL_S));
        let poll = self.0.poll(device);
        loop {
            // Listens before it reads, so that nothing slips between the two.
            let woken = poll.woken();
            tokio::pin!(woken);
            woken.as_mut().enable();
            let page = self.read(device, after, items_max).await?;
            if !page.items.is_empty() || tokio::time::timeout_at(deadline, woken).await.is_err() || self.0.is_draining() {
                return Ok(page);
            }
        }
    }

    async fn ack(&self, device: DeviceAddr, to: Seq) -> Result<(), InboxError> {
        let log = &self.0.log;
        let layout = log.layout();
        let partition = layout.partition_of(&device.account);
        let (_, end) = log.bounds(TopicPartition { topic: Topic::Inbox, partition }).await.map_err(|error| match error {
            ReadError::NoSuchPartition | ReadError::Corrupt(_) | ReadError::Gone { .. } => InboxError::Internal,
            ReadError::Unavailable(_) | ReadError::Closed => InboxError::Unavailable { retry_after_ms: RETRY_AFTER_MS },
        })?;
        if to >= Seq::at(layout.newest(), end) {
            return Err(InboxError::BadRequest("seq is beyond everything that was ever sent to the device"));
        }
        self.0.ack(device, to).await.map_err(|error| match error {
            AppendError::TooLarge | AppendError::NoSuchPartition => InboxError::Internal,
            _ => InboxError::Unavailable { retry_after_ms: RETRY_AFTER_MS },
        })
    }
}
