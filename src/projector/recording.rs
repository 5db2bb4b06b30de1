//! The projector's side of topic `metadata`: steps on their way to the log.

use std::sync::Arc;

use futures_util::future::try_join_all;
use tokio::task::JoinHandle;

use crate::clock::UnixMillis;
use crate::limits;
use crate::log::{AppendError, EventLog, Topic, TopicPartition};
use crate::metadata::{Keys, Recorder, Step};
use crate::metrics;
use crate::projector::worker::append;

/// Of one worker. What it appends must be durable before a position is stored that covers its cause: after a crash the same
/// records are written again, with the same event ids.
pub(super) struct Recording {
    recorder: Recorder,
    log: Arc<dyn EventLog>,
    /// Bytes sent since the last window.
    sent: usize,
}

impl Recording {
    pub fn new(keys: &Keys, log: Arc<dyn EventLog>) -> Self {
        Self { recorder: Recorder::new(keys.pseudonyms(), log.partitions(Topic::Metadata)), log, sent: 0 }
    }

    /// Takes the steps of one event.
    pub fn add(&mut self, source: TopicPartition, appended: UnixMillis, steps: &mut Vec<Step>) {
        for step in steps.drain(..) {
            self.recorder.add(source, appended, &step);
        }
    }

    /// Sends what is full, or all, on its way.
    pub fn send(&mut self, all: bool) -> Option<JoinHandle<Result<(), AppendError>>> {
        let (due, records) = self.recorder.take(all);
        metrics::observe_metadata(records);
        if due.is_empty() {
            return None;
        }
        self.sent += due.iter().map(|(_, batch)| batch.len()).sum::<usize>();
        let log = Arc::clone(&self.log);
        Some(tokio::spawn(async move { try_join_all(due.into_iter().map(|(to, batch)| append(log.as_ref(), to, batch))).await.map(drop) }))
    }

    /// Whether so much is on its way that it should be waited for.
    pub const fn is_ahead(&self) -> bool {
        self.sent > limits::METADATA_UNACKED_BYTES
    }

    /// Nothing is on its way that nobody waits for.
    pub const fn settled(&mut self) {
        self.sent = 0;
    }
}
