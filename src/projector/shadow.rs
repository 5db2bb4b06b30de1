//! The log as somebody sees it who makes a second view of it while projectors keep the first: all partitions, from that view's own
//! positions on, in no group, and nothing that could be seen by others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;

use crate::ids::{EdgeId, Offset, Partition};
use crate::log::layout::Layout;
use crate::log::{AppendError, AppendSink, Consumed, Consumer, EventLog, Follow, ReadError, Record, Topic, TopicPartition};
use crate::projector::push::{Push, PushBus};

/// Pushes to nobody: no edge knows of the view that is being made.
pub struct NoEdge;

#[async_trait]
impl PushBus for NoEdge {
    async fn push(&self, _: EdgeId, _: Vec<Push>) {}
    async fn broadcast(&self, _: Vec<Push>) {}
    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A log that can only be read. Its consumers are in no group whatever group they ask for: each gets all partitions.
pub struct ShadowLog {
    log: Arc<dyn EventLog>,
    follow: Arc<dyn Follow>,
}

impl ShadowLog {
    /// Of a log and its way to be followed.
    pub const fn new(log: Arc<dyn EventLog>, follow: Arc<dyn Follow>) -> Self {
        Self { log, follow }
    }
}

#[async_trait]
impl EventLog for ShadowLog {
    fn partitions(&self, topic: Topic) -> u16 {
        self.log.partitions(topic)
    }

    fn layout(&self) -> Arc<Layout> {
        self.log.layout()
    }

    fn submit(&self, _: TopicPartition, _: Bytes, _: &Arc<dyn AppendSink>, _: u64) -> Result<(), AppendError> {
        Err(AppendError::Closed)
    }

    async fn consumer(&self, _: &str, topics: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        let all = topics.iter().flat_map(|&topic| {
            (0..self.log.partitions(topic)).map(move |number| (TopicPartition { topic, partition: Partition(number) }, Offset(0)))
        });
        Ok(Box::new(ByHand {
            follow: Arc::clone(&self.follow),
            from: all.collect(),
            held: BTreeSet::new(),
            told: false,
            records: Mutex::default(),
        }))
    }

    async fn read(&self, from: TopicPartition, offset: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        self.log.read(from, offset, bytes_max).await
    }

    async fn bounds(&self, of: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        self.log.bounds(of).await
    }

    async fn truncate_before(&self, _: TopicPartition, _: Offset) -> Result<(), ReadError> {
        Err(ReadError::Closed)
    }

    fn health(&self) -> Result<(), AppendError> {
        self.log.health()
    }

    async fn close(&self) {}
}

/// Assigned by hand: says `Assigned` once, and reads from where its owner seeks then.
struct ByHand {
    follow: Arc<dyn Follow>,
    from: BTreeMap<TopicPartition, Offset>,
    held: BTreeSet<TopicPartition>,
    told: bool,
    /// In a lock that is never waited for: a consumer alone can't be shared, which the trait wants.
    records: Mutex<Option<Box<dyn Consumer>>>,
}

#[async_trait]
impl Consumer for ByHand {
    async fn next(&mut self) -> Result<Consumed, ReadError> {
        if !std::mem::replace(&mut self.told, true) {
            return Ok(Consumed::Assigned(self.from.keys().copied().collect()));
        }
        let records = self.records.get_mut();
        match records {
            Some(records) => records.next().await,
            None => {
                let from: Vec<_> = self.from.iter().map(|(of, from)| (*of, *from)).collect();
                let mut begun = self.follow.follow_from(&from).await?;
                for of in std::mem::take(&mut self.held) {
                    begun.hold(of).await?;
                }
                records.insert(begun).next().await
            }
        }
    }

    async fn hold(&mut self, of: TopicPartition) -> Result<(), ReadError> {
        match self.records.get_mut() {
            Some(records) => records.hold(of).await,
            None => {
                self.held.insert(of);
                Ok(())
            }
        }
    }

    async fn seek(&mut self, to: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        match self.from.get_mut(&to) {
            Some(from) => *from = offset,
            None => return Err(ReadError::NoSuchPartition),
        }
        match self.records.get_mut() {
            Some(records) => records.seek(to, offset).await,
            None => {
                self.held.remove(&to);
                Ok(())
            }
        }
    }

    /// There is no group to record it for.
    async fn commit(&mut self, _: TopicPartition, _: Offset) -> Result<(), ReadError> {
        Ok(())
    }

    async fn committed(&self, _: TopicPartition) -> Result<Option<Offset>, ReadError> {
        Ok(None)
    }
}
