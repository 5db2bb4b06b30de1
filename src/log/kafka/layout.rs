//! The layout of the partitions as this process knows it: all of topic `layout`, read at opening and looked at again and again.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use rdkafka::producer::Producer as _;
use tokio_util::sync::CancellationToken;

use crate::ids::{AccountId, Offset};
use crate::limits;
use crate::log::kafka::KafkaLog;
use crate::log::layout::{Layout, LayoutRecord, TOPIC};
use crate::log::{AppendError, EventLog as _, ReadError, Topic, TopicPartition};

struct Known {
    layout: Arc<Layout>,
    /// Nothing was ever written of it: what there is, is one generation.
    unwritten: bool,
    next: Offset,
    /// When the newest generation was first seen.
    since: Instant,
    /// When it was last known to be the newest.
    confirmed: Instant,
    /// A change was seen too late: nothing is appended until then.
    hold: Option<Instant>,
}

/// See the module.
pub(super) struct Layouts(RwLock<Known>);

impl Layouts {
    pub fn new(partitions: u16) -> Self {
        let now = Instant::now();
        Self(RwLock::new(Known {
            layout: Arc::new(Layout::of(partitions)),
            unwritten: true,
            next: Offset(0),
            since: now,
            confirmed: now,
            hold: None,
        }))
    }

    pub fn current(&self) -> Arc<Layout> {
        Arc::clone(&self.0.read().layout)
    }

    pub fn is_known(&self) -> bool {
        self.0.read().since.elapsed() >= Duration::from_millis(limits::LAYOUT_FENCE_MS)
    }

    pub fn route(&self, account: &AccountId) -> Result<TopicPartition, AppendError> {
        let known = self.0.read();
        if known.hold.is_some_and(|until| Instant::now() < until) {
            return Err(AppendError::Unavailable("the partitions changed while this process was away".to_owned()));
        }
        Ok(TopicPartition { topic: Topic::Inbox, partition: known.layout.partition_of(account) })
    }

    /// `asked`: from before the records were asked for.
    fn met(&self, records: Vec<LayoutRecord>, next: Offset, asked: Instant) {
        let mut known = self.0.write();
        known.next = next;
        if !records.is_empty() {
            let mut layout = if std::mem::take(&mut known.unwritten) { Layout::empty() } else { Layout::clone(&known.layout) };
            let before = layout.newest();
            for record in records {
                layout.apply(record);
            }
            if layout.newest() != before {
                tracing::info!(generation = layout.newest().0, partitions = layout.count(), "the partitions of inbox changed");
                known.since = Instant::now();
                let blind = asked.duration_since(known.confirmed);
                if blind > Duration::from_millis(limits::LAYOUT_FENCE_MS / 2) {
                    known.hold = Some(known.since + Duration::from_millis(limits::LAYOUT_HOLD_MS));
                }
            }
            if layout.is_empty() {
                tracing::error!("topic layout says nothing of how the partitions began; it is ignored");
                known.unwritten = true;
            } else {
                known.layout = Arc::new(layout);
            }
        }
        known.confirmed = asked;
    }
}

/// Reads what is new of topic `layout`.
pub(super) async fn look(log: &KafkaLog) -> Result<(), ReadError> {
    let asked = Instant::now();
    let mut next = log.layouts.0.read().next;
    let (_, end) = log.bounds(TOPIC).await?;
    let mut records = Vec::new();
    while next < end {
        let batch = log.read(TOPIC, next, limits::LOG_BATCH_BYTES).await?;
        let Some(last) = batch.last() else { break };
        next = last.offset.next();
        for record in &batch {
            records.push(LayoutRecord::decode(&record.payload).map_err(|error| ReadError::Corrupt(error.to_string()))?);
        }
    }
    let opened = records.iter().filter_map(|record| match record {
        LayoutRecord::Open { first, count, .. } => Some(first + count),
        LayoutRecord::Drained { .. } => None,
    });
    if let Some(partitions) = opened.max() {
        // Before anything is appended there, the producer must know of them.
        learn(log, partitions).await?;
    }
    log.layouts.met(records, next, asked);
    Ok(())
}

/// Makes the producer ask for the partitions of `inbox`, of which there are at least so many.
async fn learn(log: &KafkaLog, partitions: u16) -> Result<(), ReadError> {
    let (producer, name) = (Arc::clone(&log.producer), log.names.of(Topic::Inbox).to_owned());
    let ask = move || {
        let metadata = producer.driver.client().fetch_metadata(Some(&name), Duration::from_millis(limits::KAFKA_CALL_MS));
        metadata.map(|metadata| metadata.topics().first().map_or(0, |topic| topic.partitions().len()))
    };
    let found = tokio::task::spawn_blocking(ask).await.map_err(|_| ReadError::Closed)?;
    let found = found.map_err(|error| ReadError::Unavailable(error.to_string()))?;
    if found < usize::from(partitions) {
        return Err(ReadError::Unavailable(format!("{partitions} partitions of inbox are open, but the broker shows {found}")));
    }
    log.names.inbox_grew(partitions);
    Ok(())
}

/// Looks until the log is closed or dropped.
pub(super) async fn follow(log: Weak<KafkaLog>, closed: CancellationToken) {
    loop {
        tokio::select! {
            () = closed.cancelled() => return,
            () = tokio::time::sleep(Duration::from_millis(limits::LAYOUT_LOOK_MS)) => {}
        }
        let Some(log) = log.upgrade() else { return };
        match look(&log).await {
            Ok(()) => {}
            Err(ReadError::Closed) => return,
            Err(error) => tracing::debug!(%error, "topic layout can't be read for now"),
        }
    }
}
