//! What a worker appends to the log besides receipts: it waits where the log is busy, and an account's events follow the account.

use std::time::Duration;

use bytes::Bytes;

use super::{Worker, WorkerError};
use crate::ids::AccountId;
use crate::limits;
use crate::log::{AppendError, EventLog, Topic, TopicPartition};
use crate::metrics;
use crate::projector::behind::retry;
use crate::wire::event::{self, InboxEvent};

impl Worker {
    /// Looks for envelopes past their time, and says so on the log: the view changes only by events.
    pub(super) async fn expire(&self) -> Result<(), WorkerError> {
        if self.shadow {
            return Ok(());
        }
        let before = crate::clock::UnixMillis(self.parts.clock.now().0.saturating_sub(limits::ENVELOPE_TTL_MS));
        let layout = self.parts.log.layout();
        let mut after = None;
        loop {
            let delivery = &self.parts.delivery;
            let page = retry(|| delivery.expired(before, after, 256)).await?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(*last);
            for (device, to) in page {
                let tp = TopicPartition { topic: Topic::Inbox, partition: layout.partition_of(&device.account) };
                if self.owned.contains_key(&tp) {
                    metrics::observe_expired(1);
                    append(self.parts.log.as_ref(), tp, event::encode(&InboxEvent::Expired { device, to })).await?;
                }
            }
        }
    }
}

/// Appends, waiting while the log is busy. One whose outcome is unknown is appended again: receipts, expiries and changes of
/// an account mean the same twice.
pub(in crate::projector) async fn append(log: &dyn EventLog, to: TopicPartition, payload: Bytes) -> Result<(), AppendError> {
    loop {
        match log.append(to, payload.clone()).await {
            Err(AppendError::Full | AppendError::Unavailable(_) | AppendError::Unknown(_)) => {
                tokio::time::sleep(Duration::from_millis(20)).await
            }
            other => return other.map(drop),
        }
    }
}

/// The same for an account's partition of `inbox`, wherever that is by then.
pub(in crate::projector) async fn append_for(log: &dyn EventLog, account: &AccountId, payload: Bytes) -> Result<(), AppendError> {
    loop {
        match log.route(account) {
            Ok(to) => return append(log, to, payload).await,
            Err(AppendError::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => return Err(error),
        }
    }
}
