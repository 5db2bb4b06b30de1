//! Records on their way from the driver to whoever asked for them.

use bytes::Bytes;
use rdkafka::message::{BorrowedMessage, Message};

use crate::clock::UnixMillis;
use crate::ids::Offset;
use crate::limits;
use crate::log::{Record, TopicPartition};

/// Records by partition, in the order in which they came.
#[derive(Default)]
pub(super) struct Batch {
    parts: Vec<(TopicPartition, Vec<Record>)>,
    bytes: usize,
}

impl Batch {
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    pub fn push(&mut self, of: TopicPartition, offset: Offset, message: &BorrowedMessage<'_>) {
        let record = record(offset, message);
        self.bytes += record.payload.len() + limits::KAFKA_RECORD_OVERHEAD_BYTES;
        // The driver gives them in runs of one partition.
        match self.parts.iter_mut().rev().find(|(part, _)| *part == of) {
            Some((_, records)) => records.push(record),
            None => self.parts.push((of, vec![record])),
        }
    }

    /// Drops what there is of a partition.
    pub fn forget(&mut self, of: TopicPartition) {
        self.parts.retain(|(part, _)| *part != of);
    }

    /// Everything, and how many records that is.
    pub fn take(&mut self) -> (u64, Vec<(TopicPartition, Vec<Record>)>) {
        self.bytes = 0;
        let parts = std::mem::take(&mut self.parts);
        (parts.iter().map(|(_, records)| records.len() as u64).sum(), parts)
    }
}

/// A copy of its own: the driver's memory is that of a whole fetch.
pub(super) fn record(offset: Offset, message: &BorrowedMessage<'_>) -> Record {
    let appended = message.timestamp().to_millis().and_then(|millis| u64::try_from(millis).ok()).unwrap_or(0);
    Record { offset, appended: UnixMillis(appended), payload: message.payload().map_or_else(Bytes::new, Bytes::copy_from_slice) }
}
