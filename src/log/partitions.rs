//! How many partitions the topics have.

use crate::log::{Topic, TopicPartition};

/// How many partitions each topic has when a log is made; those of `inbox` may become more ([`crate::log::layout`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartitionCounts {
    /// Of [`Topic::Inbox`].
    pub inbox: u16,
    /// Of [`Topic::Groups`].
    pub groups: u16,
    /// Of [`Topic::Directory`].
    pub directory: u16,
    /// Of [`Topic::Metadata`].
    pub metadata: u16,
    /// Of [`Topic::Push`]; one process needs none.
    pub push: u16,
}

impl Default for PartitionCounts {
    fn default() -> Self {
        Self { inbox: 16, groups: 16, directory: 4, metadata: 4, push: 0 }
    }
}

impl PartitionCounts {
    /// Of a topic.
    pub const fn of(&self, topic: Topic) -> u16 {
        match topic {
            Topic::Inbox => self.inbox,
            Topic::Groups => self.groups,
            Topic::Directory => self.directory,
            Topic::Metadata => self.metadata,
            Topic::Push => self.push,
            Topic::Layout => self.layout(),
        }
    }

    /// One process needs no topic for it.
    const fn layout(&self) -> u16 {
        if self.push > 0 { 1 } else { 0 }
    }

    /// Of all topics together.
    pub(in crate::log) fn total(&self) -> usize {
        Topic::ALL.iter().map(|&topic| usize::from(self.of(topic))).sum()
    }

    /// A number for each partition, from 0, without holes.
    pub(in crate::log) fn slot(&self, of: TopicPartition) -> Option<usize> {
        if of.partition.0 >= self.of(of.topic) {
            return None;
        }
        let before: usize = Topic::ALL.iter().take_while(|&&topic| topic != of.topic).map(|&topic| usize::from(self.of(topic))).sum();
        Some(before + usize::from(of.partition.0))
    }
}
