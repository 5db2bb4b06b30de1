//! Reading the topic from a log of any kind, without a consumer group.

use std::sync::Arc;

use crate::ids::{Offset, Partition};
use crate::log::{EventLog, ReadError, Topic, TopicPartition};
use crate::metadata::record::{Malformed, decode};
use crate::wire::metadata::MetadataRecord;

/// Bytes read of one partition at once.
const READ_BYTES: usize = 1024 * 1024;

/// Where to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// With the oldest record that is there.
    Start,
    /// So far before the end that at least this many records come, if there are as many.
    Last(u64),
}

/// Why the topic can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TailError {
    /// The log says no.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// A record is not what it should be.
    #[error("record {offset:?} of metadata partition {partition:?}: {source}")]
    Malformed {
        /// Where.
        partition: Partition,
        /// Where.
        offset: Offset,
        /// Why.
        source: Malformed,
    },
}

/// A reader of all partitions.
pub struct Tail {
    log: Arc<dyn EventLog>,
    next: Vec<(TopicPartition, Offset)>,
    /// Log records that retention took before they were read.
    pub missed: u64,
}

impl Tail {
    /// Looks where the partitions begin and end.
    pub async fn open(log: Arc<dyn EventLog>, from: From) -> Result<Self, TailError> {
        let mut next = Vec::new();
        for number in 0..log.partitions(Topic::Metadata) {
            let tp = TopicPartition { topic: Topic::Metadata, partition: Partition(number) };
            let (earliest, end) = log.bounds(tp).await?;
            let offset = match from {
                From::Start => earliest,
                // A batch has at least one record.
                From::Last(records) => earliest.max(Offset(end.0.saturating_sub(records))),
            };
            next.push((tp, offset));
        }
        Ok(Self { log, next, missed: 0 })
    }

    /// Records that are there now, a piece of each partition; in order within a partition. Empty: that was all for now.
    pub async fn read(&mut self) -> Result<Vec<MetadataRecord>, TailError> {
        let mut out = Vec::new();
        for (tp, next) in &mut self.next {
            let records = match self.log.read(*tp, *next, READ_BYTES).await {
                Err(ReadError::Gone { earliest, .. }) => {
                    self.missed += earliest.0.saturating_sub(next.0);
                    *next = earliest;
                    self.log.read(*tp, *next, READ_BYTES).await?
                }
                other => other?,
            };
            for record in records {
                let malformed = |source| TailError::Malformed { partition: tp.partition, offset: record.offset, source };
                out.extend(decode(&record.payload).map_err(malformed)?);
                *next = record.offset.next();
            }
        }
        Ok(out)
    }
}
