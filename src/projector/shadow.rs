//! The log as somebody sees it who makes a second view of it while projectors keep the first: all partitions, from that view's own
//! positions on, in no group, and nothing that could be seen by others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::Mutex as AsyncMutex;

use crate::ids::{EdgeId, Offset, Partition};
use crate::log::layout::{Layout, LayoutRecord};
use crate::log::{AppendError, AppendSink, Consumed, Consumer, EventLog, Follow, ReadError, Record, Topic, TopicPartition};
use crate::projector::push::{Push, PushBus};
use crate::wire::event::{self, InboxEvent};
use crate::wire::group_event::{GroupEvent, GroupEventBody};

/// How often new partitions are looked for while nothing comes.
const LOOK: Duration = Duration::from_secs(1);

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

/// A log that can only be read. Its consumers are in no group whatever group they ask for: each gets all partitions, also those that are
/// made meanwhile. How far older generations are drained is what the reader has met itself ([`crate::log::layout`]).
pub struct ShadowLog {
    log: Arc<dyn EventLog>,
    follow: Arc<dyn Follow>,
    drained: Mutex<BTreeSet<Partition>>,
}

impl ShadowLog {
    /// Of a log and its way to be followed.
    pub async fn new(log: Arc<dyn EventLog>, follow: Arc<dyn Follow>) -> Result<Self, ReadError> {
        let layout = log.layout();
        let mut drained = BTreeSet::new();
        for partition in (0..layout.end()).map(Partition).filter(|partition| layout.is_drained(*partition)) {
            // Retention has removed all of it, with its fence.
            let (earliest, end) = log.bounds(TopicPartition { topic: Topic::Inbox, partition }).await?;
            if earliest == end {
                drained.insert(partition);
            }
        }
        Ok(Self { log, follow, drained: Mutex::new(drained) })
    }
}

#[async_trait]
impl EventLog for ShadowLog {
    fn partitions(&self, topic: Topic) -> u16 {
        self.log.partitions(topic)
    }

    fn layout(&self) -> Arc<Layout> {
        Arc::new(self.log.layout().as_met(&self.drained.lock()))
    }

    fn layout_age(&self) -> Duration {
        self.log.layout_age()
    }

    /// A partition that the reader has drained is noted. Fences, invitations and the departure of devices from groups are the live projectors'
    /// to put; anything else is refused.
    fn submit(&self, to: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        match to.topic {
            Topic::Layout => match LayoutRecord::decode(&payload) {
                Ok(LayoutRecord::Drained { partition }) => drop(self.drained.lock().insert(partition)),
                _ => return Err(AppendError::Closed),
            },
            Topic::Inbox if matches!(event::decode(&payload), Ok(InboxEvent::Fence { .. })) => {}
            Topic::Inbox if matches!(event::decode(&payload), Ok(InboxEvent::EnvelopesAccepted(ref sent)) if sent.client_message_id.0 == 0) =>
                {}
            Topic::Groups if matches!(event::decode(&payload), Ok(GroupEvent { body: GroupEventBody::DevicesGone { .. }, .. })) => {}
            _ => return Err(AppendError::Closed),
        }
        sink.done(token, Ok(Offset(0)));
        sink.flush();
        Ok(())
    }

    async fn consumer(&self, _: &str, topics: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        Ok(Box::new(ByHand {
            log: Arc::clone(&self.log),
            follow: Arc::clone(&self.follow),
            topics: topics.to_vec(),
            from: BTreeMap::new(),
            held: BTreeSet::new(),
            records: AsyncMutex::default(),
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

/// Assigned by hand: says `Assigned` of what is new, and reads from where its owner seeks then.
struct ByHand {
    log: Arc<dyn EventLog>,
    follow: Arc<dyn Follow>,
    topics: Vec<Topic>,
    /// What comes next of each partition.
    from: BTreeMap<TopicPartition, Offset>,
    held: BTreeSet<TopicPartition>,
    /// Reads them; none after they changed. In a lock that is never waited for: a consumer alone can't be shared, which the trait wants.
    records: AsyncMutex<Option<Box<dyn Consumer>>>,
}

impl ByHand {
    /// Partitions that were made since the last look.
    fn fresh(&mut self) -> Vec<TopicPartition> {
        let all = self
            .topics
            .iter()
            .flat_map(|&topic| (0..self.log.partitions(topic)).map(move |number| TopicPartition { topic, partition: Partition(number) }));
        let fresh: Vec<_> = all.filter(|of| !self.from.contains_key(of)).collect();
        self.from.extend(fresh.iter().map(|of| (*of, Offset(0))));
        fresh
    }
}

#[async_trait]
impl Consumer for ByHand {
    async fn next(&mut self) -> Result<Consumed, ReadError> {
        loop {
            let fresh = self.fresh();
            if !fresh.is_empty() {
                *self.records.get_mut() = None;
                return Ok(Consumed::Assigned(fresh));
            }
            let records = self.records.get_mut();
            if records.is_none() {
                let from: Vec<_> = self.from.iter().filter(|(of, _)| !self.held.contains(of)).map(|(of, from)| (*of, *from)).collect();
                *records = Some(self.follow.follow_from(&from).await?);
            }
            let Some(reader) = records else { continue };
            match tokio::time::timeout(LOOK, reader.next()).await {
                Ok(Ok(Consumed::Records(batches))) => {
                    for (of, batch) in &batches {
                        if let (Some(last), Some(from)) = (batch.last(), self.from.get_mut(of)) {
                            *from = last.offset.next();
                        }
                    }
                    return Ok(Consumed::Records(batches));
                }
                Ok(other) => return other,
                // Is anything new?
                Err(_) => {}
            }
        }
    }

    async fn hold(&mut self, of: TopicPartition) -> Result<(), ReadError> {
        self.held.insert(of);
        *self.records.get_mut() = None;
        Ok(())
    }

    async fn seek(&mut self, to: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        let from = self.from.get_mut(&to).ok_or(ReadError::NoSuchPartition)?;
        *from = offset;
        self.held.remove(&to);
        *self.records.get_mut() = None;
        Ok(())
    }

    /// There is no group to record it for.
    async fn commit(&mut self, _: TopicPartition, _: Offset) -> Result<(), ReadError> {
        Ok(())
    }

    async fn committed(&self, _: TopicPartition) -> Result<Option<Offset>, ReadError> {
        Ok(None)
    }
}
