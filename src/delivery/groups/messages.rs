//! Messages to a group: what is checked before the log takes them. The projector checks again, in the order that decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::GroupService;
use super::error::GroupError;
use crate::auth::KnownDevice;
use crate::ids::{ClientMessageId, DeviceAddr, GroupId};
use crate::limits;
use crate::log::{AppendSink, TopicPartition};
use crate::metrics;
use crate::store::StoreError;
use crate::wire::event;
use crate::wire::group_event::{GroupEvent, GroupEventBody};
use crate::wire::stream::{self, Code};

/// A message for all members of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMessage {
    /// Which group.
    pub group: GroupId,
    /// The sender's counter for this group.
    pub client_message_id: ClientMessageId,
    /// The epoch that it was encrypted in.
    pub epoch: u64,
    /// An MLSMessage with a PrivateMessage.
    pub content: Bytes,
}

/// A `GroupSend` frame as a message.
pub fn parse(send: stream::GroupSend) -> Result<GroupMessage, GroupError> {
    Ok(GroupMessage {
        group: GroupId::from_slice(&send.group_id).map_err(|_| GroupError::BadRequest("a group's id is 16 bytes".into()))?,
        client_message_id: ClientMessageId(send.client_message_id),
        epoch: send.epoch,
        content: send.content,
    })
}

/// The first bytes of an MLSMessage with a PrivateMessage: version 1, wire format 2 (RFC 9420, section 6).
const PRIVATE_MESSAGE: [u8; 4] = [0, 1, 0, 2];

impl GroupService {
    /// Takes a message of a stream; its outcome goes to the sink.
    pub async fn submit_message(
        &self,
        known: KnownDevice,
        message: GroupMessage,
        sink: &Arc<dyn AppendSink>,
        token: u64,
    ) -> Result<(), GroupError> {
        let (to, payload) = self.check_message(known, &message).await?;
        Ok(self.parts.log.submit(to, payload, sink, token)?)
    }

    /// Takes a message; it is durable when this returns `Ok`. The same (sender, group, client message id) again is delivered once.
    pub async fn send_message(&self, known: KnownDevice, message: GroupMessage) -> Result<(), GroupError> {
        let sent = async {
            let (to, payload) = self.check_message(known, &message).await?;
            self.parts.log.append(to, payload).await?;
            Ok(())
        };
        let outcome = sent.await;
        metrics::observe_sends(outcome.as_ref().map_or_else(GroupError::code, |()| Code::Ok), 1);
        outcome
    }

    async fn check_message(&self, known: KnownDevice, message: &GroupMessage) -> Result<(TopicPartition, Bytes), GroupError> {
        let sender = known.addr;
        if self.behind.load(Ordering::Relaxed) {
            return Err(GroupError::Unavailable);
        }
        self.messages.check(&sender).map_err(|retry_after_ms| {
            metrics::observe_rate_limited(metrics::RateScope::Messages);
            GroupError::RateLimited { retry_after_ms }
        })?;
        sound(known, message)?;
        self.may_send(sender, message).await?;
        let id = message.client_message_id.0;
        let highest = match self.highest.get(&(message.group, sender)) {
            Some(highest) => highest,
            None => self.load_highest(message.group, sender).await?,
        };
        if id + limits::MESSAGE_ID_WINDOW <= highest.fetch_max(id, Ordering::Relaxed) {
            return Err(GroupError::StaleMessageId);
        }
        let event = GroupEvent {
            group: message.group,
            at: self.parts.clock.now(),
            reply_to: None,
            body: GroupEventBody::Message {
                by: sender,
                client_message_id: message.client_message_id,
                epoch: message.epoch,
                content: &message.content,
            },
        };
        Ok((self.route(message.group), event::encode(&event)))
    }

    /// What a followed group says counts if it allows it; else the store is asked, which may be ahead.
    async fn may_send(&self, sender: DeviceAddr, message: &GroupMessage) -> Result<(), GroupError> {
        if self.feeds.live(message.group, sender).is_some_and(|(epoch, member)| member && in_window(message.epoch, epoch)) {
            return Ok(());
        }
        let known = self.open_to(message.group, sender).await?;
        if in_window(message.epoch, known.head.epoch) {
            return Ok(());
        }
        Err(GroupError::Conflict { epoch: known.head.epoch, seq: known.head.snapshot_at })
    }

    /// As for messages between two accounts: it only lets an id that is too old be refused at once, so the store may be late.
    async fn load_highest(&self, group: GroupId, sender: DeviceAddr) -> Result<Arc<AtomicU64>, GroupError> {
        let asked = self.parts.store.group_marks(group, vec![sender]);
        let stored = match tokio::time::timeout(Duration::from_millis(limits::MARK_WAIT_MS), asked).await {
            Ok(Ok(marks)) => marks.first().copied().flatten().unwrap_or_default().high,
            Ok(Err(StoreError::Unavailable(_))) | Err(_) => 0,
            Ok(Err(error)) => return Err(error.into()),
        };
        // Two loads may race; the first one in wins, so that nobody counts on a copy of his own.
        let fresh = || Ok::<_, std::convert::Infallible>(Arc::new(AtomicU64::new(stored)));
        match self.highest.get_or_insert_with(&(group, sender), fresh) {
            Ok(highest) => Ok(highest),
            Err(never) => match never {},
        }
    }
}

/// Members read messages of the current epoch and of those before it that they still have keys of.
const fn in_window(epoch: u64, current: u64) -> bool {
    epoch <= current && epoch + limits::PAST_EPOCHS as u64 >= current
}

fn sound(known: KnownDevice, message: &GroupMessage) -> Result<(), GroupError> {
    let id = message.client_message_id;
    if id.0 == 0 || id.0 > i64::MAX as u64 {
        return Err(GroupError::BadRequest("client_message_id must be from 1 to 2^63-1".into()));
    }
    if id < known.first_message_id {
        // An earlier device of this number may have used it: what is taken for a repeat is answered OK and dropped.
        return Err(GroupError::BadRequest("client_message_id is lower than the first_message_id of the device's registration".into()));
    }
    if message.content.len() > limits::ENVELOPE_BYTES {
        return Err(GroupError::TooLarge("a message is larger than 262144 bytes"));
    }
    if message.epoch > i64::MAX as u64 || !message.content.starts_with(&PRIVATE_MESSAGE) {
        return Err(GroupError::BadRequest("a message is an MLSMessage with a PrivateMessage".into()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_of_epochs_ends_where_members_forget() {
        let past = limits::PAST_EPOCHS as u64;
        assert!(in_window(0, 0) && in_window(5, past + 5) && in_window(0, past));
        assert!(!in_window(1, 0) && !in_window(4, past + 5));
    }
}
