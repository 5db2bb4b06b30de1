//! What leaves a worker: receipts, and the writes behind it, in coalescing windows.

use std::collections::HashSet;
use std::sync::Arc;

use tokio::time::Instant;

use super::appending::append_for;
use super::{Trail, Worker, WorkerError};
use crate::ids::Offset;
use crate::limits;
use crate::log::{Consumer, Topic, TopicPartition};
use crate::projector::behind::Job;
use crate::store::DeliveryWrite;
use crate::wire::event::{self, InboxEvent};

impl Worker {
    /// What should not wait for the window: receipts, and items that polls look for.
    pub(super) async fn soon(&mut self) -> Result<(), WorkerError> {
        self.soon_at = None;
        let mut write = DeliveryWrite::default();
        let waiting = self.projection.take_waiting(&mut write);
        if !write.is_empty() {
            self.behind.queue(Job { write, waiting, ..Job::default() }).await?;
        }
        self.send_receipts();
        Ok(())
    }

    /// Sends the receipts that are due on their way to the log. A position that covers acknowledgements is written behind
    /// the receipts they caused, so that a crash tells senders twice rather than never.
    fn send_receipts(&mut self) {
        let due = self.projection.take_receipts();
        if due.is_empty() {
            return;
        }
        let log = Arc::clone(&self.parts.log);
        self.receipts.push(tokio::spawn(async move {
            let mut appends = Vec::with_capacity(due.len());
            for (sender, entries) in due {
                for chunk in entries.chunks(limits::RECEIPT_ENTRIES) {
                    let payload = event::encode(&InboxEvent::Receipts { device: sender, entries: chunk.to_vec() });
                    let log = log.as_ref();
                    appends.push(async move { append_for(log, &sender.account, payload).await });
                }
            }
            futures_util::future::try_join_all(appends).await.map(drop)
        }));
    }

    /// Ends the coalescing window: receipts out, then what changed, behind the projector's back.
    pub(super) async fn flush(&mut self, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        self.flush_over(self.pace.mark_windows, consumer).await
    }

    /// The same; marks that begin to be written now are spread over so many windows.
    async fn flush_over(&mut self, windows: usize, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        self.window_ends = None;
        self.send_receipts();
        if let Some(recording) = &mut self.recording {
            self.receipts.extend(recording.send(true));
            recording.settled();
        }
        let mut write = DeliveryWrite::default();
        self.projection.flush(&mut write);
        self.send_pushes().await;
        if std::mem::take(&mut self.moved) || self.trail.is_some() {
            let positions = self.write_marks(windows, &mut write);
            write.positions = positions.iter().filter(|(tp, _)| tp.topic == Topic::Inbox).map(|(tp, next)| (tp.partition, *next)).collect();
            let (after, pushed) = (std::mem::take(&mut self.receipts), Some(self.parts.bus.settled()));
            // Whoever did not acknowledge in time may have no stream any more: its polls look.
            let waiting = write.put.iter().map(|(device, _)| *device).collect::<HashSet<_>>().into_iter().collect();
            self.behind.queue(Job { write, after, pushed, waiting, positions }).await?;
            if self.projection.trim() {
                self.behind.forgot();
            }
            if self.trail.is_some() || self.moved {
                self.window_ends = Some(Instant::now() + self.pace.window);
            }
        }
        for (tp, next) in self.behind.covered() {
            if self.owned.contains_key(&tp) {
                consumer.commit(tp, next).await?;
            }
        }
        Ok(())
    }

    /// Adds a slice of the marks; gives the positions that are covered with it, none until the last slice. Two limits make it all of
    /// them at once: how much a takeover would apply again, and memory.
    fn write_marks(&mut self, windows: usize, write: &mut DeliveryWrite) -> Vec<(TopicPartition, Offset)> {
        let applied = self.progress.borrow().applied;
        let trail = self.trail.get_or_insert_with(|| Trail {
            positions: self.owned.iter().map(|(tp, owned)| (*tp, owned.next)).collect(),
            slice: self.projection.begin_marks().div_ceil(windows.max(1)),
            applied,
        });
        let hurry = applied - trail.applied > limits::TRAIL_RECORDS || self.projection.marks() > limits::HOT_ENTRIES;
        let done = self.projection.take_marks(write, if hurry { usize::MAX } else { trail.slice });
        // What was applied since it began is the next one's, also if nothing more comes.
        self.moved = trail.applied < applied;
        self.trail.take_if(|_| done).map_or_else(Vec::new, |trail| trail.positions)
    }

    /// The same, whole, and waits until all is in the store.
    pub(super) async fn flush_now(&mut self, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        if self.trail.take().is_some() {
            self.moved = true;
        }
        self.flush_over(1, consumer).await?;
        self.behind.settle().await?;
        self.flush(consumer).await
    }
}
