//! A projector's part in a change of the partitions' number; see [`crate::log::layout`].
//!
//! It applies a new partition only when all that the accounts in it had before is in the store. Of an old one it applies what stands
//! before the fence, says that it is drained, and passes on what comes behind. It forgets nothing if it dies in between: a fence is
//! appended again by the next owner, and what is met twice is applied once.

use std::time::Duration;

use futures_util::future::try_join_all;

use super::appending::{append, append_for};
use super::{Owned, Worker, WorkerError, undecodable};
use crate::ids::{Offset, Partition};
use crate::limits;
use crate::log::layout::{self, LayoutRecord};
use crate::log::{Consumer, Record, Topic, TopicPartition};
use crate::wire::event::{self, InboxEvent};

impl Worker {
    /// Takes partitions up that may be applied, and holds the others back.
    pub(super) async fn assigned(&mut self, partitions: Vec<TopicPartition>, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        let layout = self.parts.log.layout();
        let (ready, waiting): (Vec<_>, Vec<_>) =
            partitions.into_iter().partition(|tp| tp.topic != Topic::Inbox || layout.is_open(tp.partition));
        for tp in waiting {
            consumer.hold(tp).await?;
            self.waiting.insert(tp);
        }
        self.take_up(ready, consumer).await
    }

    async fn take_up(&mut self, partitions: Vec<TopicPartition>, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        let (log, view, beside) = (&self.parts.log, &self.parts.positions(), &self.beside);
        // Asked for side by side: the other partitions wait meanwhile.
        let asked = try_join_all(partitions.into_iter().map(|tp| async move {
            let next = view.of(tp).await?;
            let said = try_join_all(beside.iter().map(|view| view.of(tp))).await?.into_iter().max();
            let (earliest, end) = log.bounds(tp).await?;
            Ok::<_, WorkerError>((tp, next, said, earliest, end))
        }));
        for (tp, next, said, earliest, end) in asked.await? {
            if let Some(said) = said {
                self.quiet_before.entry(tp).and_modify(|before| *before = said.max(*before)).or_insert(said);
            }
            // Where it had stopped behind a fence it would not meet that again; what is replayed before it changes nothing.
            let again = self.shadow && tp.topic == Topic::Inbox && self.parts.log.layout().is_draining(tp.partition);
            let next = if again { Offset(0) } else { next };
            if next < earliest && next > Offset(0) {
                tracing::error!(
                    topic = tp.topic.name(),
                    "records were removed before the projector applied them; affected devices will miss envelopes"
                );
            }
            let next = next.max(earliest);
            consumer.seek(tp, next).await?;
            self.owned.insert(tp, Owned { next, end_at_start: end });
        }
        Ok(())
    }

    /// Takes up what has become ready, and fences what belongs to the past.
    pub(super) async fn look_at_layout(&mut self, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        let layout = self.parts.log.layout();
        let ready: Vec<TopicPartition> = self.waiting.extract_if(.., |tp| layout.is_open(tp.partition)).collect();
        if !ready.is_empty() {
            self.take_up(ready, consumer).await?;
            self.say_progress(consumer).await?;
        }
        if layout.is_settled() || !self.parts.log.layout_is_known() {
            return Ok(());
        }
        let old: Vec<TopicPartition> =
            self.owned.keys().copied().filter(|tp| tp.topic == Topic::Inbox && layout.is_draining(tp.partition)).collect();
        let unfenced: Vec<TopicPartition> = old.into_iter().filter(|tp| self.fenced.insert(*tp)).collect();
        let fence = event::encode(&InboxEvent::Fence { generation: layout.newest() });
        // Side by side, for one commit to hold them all.
        let appends = unfenced.into_iter().map(|tp| append(self.parts.log.as_ref(), tp, fence.clone()));
        try_join_all(appends).await.map(drop).map_err(Into::into)
    }

    /// Everything before the fence was applied: writes it, and says so.
    pub(super) async fn drain(&mut self, tp: TopicPartition, fence: Offset, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        // Somebody else may have seen the change before this process.
        let layout = loop {
            let layout = self.parts.log.layout();
            if layout.is_draining(tp.partition) || layout.is_drained(tp.partition) {
                break layout;
            }
            tokio::time::sleep(Duration::from_millis(limits::LAYOUT_LOOK_MS / 4)).await;
        };
        if let Some(owned) = self.owned.get_mut(&tp) {
            owned.next = fence.next();
        }
        self.moved = true;
        self.send_pushes().await;
        self.flush_now(consumer).await?;
        if layout.is_draining(tp.partition) {
            let said = LayoutRecord::Drained { partition: tp.partition };
            append(self.parts.log.as_ref(), layout::TOPIC, said.encode()).await?;
            tracing::info!(partition = tp.partition.0, "a partition of an older generation is drained");
        }
        self.drained.insert(tp.partition);
        self.projection.forget(|account| layout.held(tp.partition, account));
        Ok(())
    }

    /// Whether what is met there now came too late.
    pub(super) fn is_past(&self, partition: Partition) -> bool {
        self.drained.contains(&partition) || self.parts.log.layout().is_drained(partition)
    }

    /// Appends records that came too late where they belong. They are safe there before a position covers them here.
    pub(super) async fn pass_on(&self, tp: TopicPartition, late: &[Record]) -> Result<(), WorkerError> {
        let mut appends = Vec::new();
        // What is made anew was passed on the first time.
        for record in late.iter().filter(|record| !self.is_quiet(tp, record)) {
            let event: InboxEvent<'_> = event::decode(&record.payload).map_err(|source| undecodable(tp, record, source))?;
            if let Some(account) = event.account() {
                appends.push(async move { append_for(self.parts.log.as_ref(), &account, record.payload.clone()).await });
            }
        }
        if !appends.is_empty() {
            tracing::warn!(partition = tp.partition.0, records = appends.len(), "records behind a fence are passed on");
        }
        try_join_all(appends).await?;
        Ok(())
    }
}
