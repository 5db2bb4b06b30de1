//! Topics by the names that they have on the cluster.

use std::sync::atomic::{AtomicU16, Ordering};

use rdkafka::TopicPartitionList;
use rdkafka::topic_partition_list::Offset as Position;

use crate::ids::{Offset, Partition};
use crate::log::kafka::options::KafkaOptions;
use crate::log::{PartitionCounts, Topic, TopicPartition};

/// Names and partitions of the topics, in the order of [`Topic::ON_CLUSTER`].
#[derive(Debug)]
pub(super) struct Names {
    names: [String; Topic::ON_CLUSTER.len()],
    counts: PartitionCounts,
    /// Partitions of `inbox`, the only topic that grows.
    inbox: AtomicU16,
}

impl Names {
    pub fn new(options: &KafkaOptions, counts: PartitionCounts) -> Self {
        Self { names: Topic::ON_CLUSTER.map(|topic| options.topic(topic)), counts, inbox: AtomicU16::new(counts.inbox) }
    }

    /// How many partitions a topic has.
    pub fn count(&self, topic: Topic) -> u16 {
        match topic {
            Topic::Inbox => self.inbox.load(Ordering::Relaxed),
            _ => self.counts.of(topic),
        }
    }

    /// The topic `inbox` has at least so many partitions now.
    pub fn inbox_grew(&self, count: u16) {
        self.inbox.fetch_max(count, Ordering::Relaxed);
    }

    pub fn of(&self, topic: Topic) -> &str {
        &self.names[topic as usize]
    }

    pub fn exists(&self, of: TopicPartition) -> bool {
        of.partition.0 < self.count(of.topic)
    }

    /// What a partition of the cluster is to us, if it is one of ours.
    pub fn parse(&self, name: &str, partition: i32) -> Option<TopicPartition> {
        let topic = Topic::ON_CLUSTER.into_iter().find(|&topic| self.of(topic) == name)?;
        Some(TopicPartition { topic, partition: Partition(u16::try_from(partition).ok()?) })
    }

    /// As the driver wants it; without an offset it starts at the committed one.
    pub fn list(&self, partitions: impl IntoIterator<Item = (TopicPartition, Option<Offset>)>) -> TopicPartitionList {
        let mut list = TopicPartitionList::new();
        for (of, offset) in partitions {
            let position = offset.map_or(Position::Invalid, position);
            if let Err(error) = list.add_partition_offset(self.of(of.topic), i32::from(of.partition.0), position) {
                tracing::error!(%error, ?of, "a partition can't be named to the driver");
            }
        }
        list
    }
}

/// An offset as the driver counts. Ours never reach its negative ones.
pub(super) fn position(offset: Offset) -> Position {
    Position::Offset(i64::try_from(offset.0).unwrap_or(i64::MAX))
}

/// The opposite; a negative number is none.
pub(super) fn offset(number: i64) -> Option<Offset> {
    u64::try_from(number).ok().map(Offset)
}
