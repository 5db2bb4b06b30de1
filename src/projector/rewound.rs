//! The log as a projector sees it whose view went back: older generations of partitions that the log calls drained are applied once more
//! up to their fence before what follows them.
//!
//! An embedded view need not be on disk when it was written, and may be made anew; what topic `layout` says is on disk. So what a view
//! has not met of an older generation is looked up when it is opened ([`crate::log::layout`]).

use std::collections::BTreeSet;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::ids::{AccountId, Generation, Offset, Partition};
use crate::limits;
use crate::log::layout::{Layout, LayoutRecord};
use crate::log::{AppendError, AppendSink, Consumer, EventLog, ReadError, Record, Topic, TopicPartition};
use crate::projector::worker::{Positions, WorkerError};
use crate::wire::event::{self, InboxEvent};

/// The log for this view: the log itself, unless the view has to meet older generations again.
pub async fn rewound(log: Arc<dyn EventLog>, view: &Positions) -> Result<Arc<dyn EventLog>, WorkerError> {
    let layout = log.layout();
    let mut unmet = BTreeSet::new();
    for partition in (0..layout.end()).map(Partition).filter(|partition| layout.is_drained(*partition)) {
        let of = TopicPartition { topic: Topic::Inbox, partition };
        let from = view.of(of).await?;
        if holds_fence(log.as_ref(), of, from, layout.generation_of(partition).unwrap_or_default()).await? {
            unmet.insert(partition);
        }
    }
    if unmet.is_empty() {
        return Ok(log);
    }
    tracing::warn!(partitions = unmet.len(), "the view is older than the last change of the partitions: they are applied again");
    Ok(Arc::new(RewoundLog { log, unmet: Mutex::new(unmet) }))
}

/// Whether the fence stands at this offset or behind it.
async fn holds_fence(log: &dyn EventLog, of: TopicPartition, from: Offset, generation: Generation) -> Result<bool, WorkerError> {
    let (earliest, end) = log.bounds(of).await?;
    if from == Offset(0) && earliest == Offset(0) {
        // All of it is there, and so is the fence.
        return Ok(end > from);
    }
    let mut next = from.max(earliest);
    while next < end {
        let records = log.read(of, next, limits::LOG_BATCH_BYTES).await?;
        let Some(last) = records.last() else { break };
        next = last.offset.next();
        let is_fence =
            |record: &Record| matches!(event::decode(&record.payload), Ok(InboxEvent::Fence { generation: next }) if next > generation);
        if records.iter().any(is_fence) {
            return Ok(true);
        }
    }
    Ok(false)
}

struct RewoundLog {
    log: Arc<dyn EventLog>,
    /// Drained by what the log says, but not by this view.
    unmet: Mutex<BTreeSet<Partition>>,
}

#[async_trait]
impl EventLog for RewoundLog {
    fn partitions(&self, topic: Topic) -> u16 {
        self.log.partitions(topic)
    }

    fn layout(&self) -> Arc<Layout> {
        let (layout, unmet) = (self.log.layout(), self.unmet.lock());
        if unmet.is_empty() {
            return layout;
        }
        let met = (0..layout.end()).map(Partition).filter(|partition| layout.is_drained(*partition) && !unmet.contains(partition));
        Arc::new(layout.as_met(&met.collect()))
    }

    /// Fences that are met again need no second one.
    fn layout_is_known(&self) -> bool {
        self.unmet.lock().is_empty() && self.log.layout_is_known()
    }

    fn route(&self, account: &AccountId) -> Result<TopicPartition, AppendError> {
        self.log.route(account)
    }

    fn submit(&self, to: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        if to.topic == Topic::Layout
            && let Ok(LayoutRecord::Drained { partition }) = LayoutRecord::decode(&payload)
            && self.unmet.lock().remove(&partition)
        {
            // The log has it already.
            sink.done(token, Ok(Offset(0)));
            sink.flush();
            return Ok(());
        }
        self.log.submit(to, payload, sink, token)
    }

    async fn consumer(&self, group: &str, topics: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        self.log.consumer(group, topics).await
    }

    async fn read(&self, from: TopicPartition, offset: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        self.log.read(from, offset, bytes_max).await
    }

    async fn bounds(&self, of: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        self.log.bounds(of).await
    }

    async fn truncate_before(&self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.log.truncate_before(of, offset).await
    }

    fn health(&self) -> Result<(), AppendError> {
        self.log.health()
    }

    async fn close(&self) {
        self.log.close().await;
    }
}
