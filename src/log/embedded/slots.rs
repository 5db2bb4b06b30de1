//! Which partitions a log has, and the number that each has in memory and in summaries: its slot.
//!
//! A log begins with the partitions that it was made with. When `inbox` grows for the first time the one partition of `layout` comes
//! behind them, then the new ones of `inbox`. So a slot never changes, and a log that never grew is as it always was.

use crate::ids::Partition;
use crate::log::{PartitionCounts, Topic, TopicPartition};

/// See the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slots {
    made: PartitionCounts,
    inbox: u16,
}

impl Slots {
    /// Of a log that was made with these, and whose `inbox` has so many by now.
    pub fn new(made: PartitionCounts, inbox: u16) -> Self {
        Self { made, inbox: inbox.max(made.inbox) }
    }

    /// What the log was made with.
    pub const fn made(&self) -> &PartitionCounts {
        &self.made
    }

    /// Whether `inbox` has more than it was made with.
    pub const fn is_grown(&self) -> bool {
        self.inbox > self.made.inbox
    }

    /// How many partitions a topic has.
    pub fn of(&self, topic: Topic) -> u16 {
        match topic {
            Topic::Inbox => self.inbox,
            Topic::Layout => u16::from(self.is_grown()),
            topic => self.made.of(topic),
        }
    }

    /// How many there are.
    pub fn total(&self) -> usize {
        self.made.total() + usize::from(self.of(Topic::Layout)) + usize::from(self.inbox - self.made.inbox)
    }

    /// The slot of a partition.
    pub fn slot(&self, of: TopicPartition) -> Option<usize> {
        let number = of.partition.0;
        match of.topic {
            Topic::Inbox if number >= self.made.inbox => {
                (number < self.inbox).then(|| self.made.total() + 1 + usize::from(number - self.made.inbox))
            }
            Topic::Layout => (number == 0 && self.is_grown()).then(|| self.made.total()),
            _ => self.made.slot(of),
        }
    }

    /// The partition of a slot.
    pub fn at(&self, slot: u32) -> TopicPartition {
        let mut left = slot as usize;
        for topic in Topic::ALL {
            let count = usize::from(self.made.of(topic));
            if left < count {
                return TopicPartition { topic, partition: Partition(left as u16) };
            }
            left -= count;
        }
        match left {
            0 => crate::log::layout::TOPIC,
            left => TopicPartition { topic: Topic::Inbox, partition: Partition(self.made.inbox + left as u16 - 1) },
        }
    }

    /// All partitions, in the order of their slots.
    pub fn all(&self) -> Vec<TopicPartition> {
        (0..self.total() as u32).map(|slot| self.at(slot)).collect()
    }

    /// The slots of a topic.
    pub fn of_topic(&self, topic: Topic) -> impl Iterator<Item = u32> + use<> {
        let slots = *self;
        let all = (0..slots.of(topic)).map(move |number| TopicPartition { topic, partition: Partition(number) });
        all.filter_map(move |of| slots.slot(of)).map(|slot| slot as u32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_stay_when_the_inbox_grows() {
        let made = PartitionCounts { inbox: 3, groups: 1, directory: 2, metadata: 1, push: 0 };
        let counts = [3, 3, 4, 9];
        let all = counts.map(|inbox| Slots::new(made, inbox).all());
        assert_eq!(all.each_ref().map(Vec::len), [7, 7, 9, 14]);
        for (inbox, all) in counts.into_iter().zip(&all) {
            let slots = Slots::new(made, inbox);
            assert_eq!((slots.total(), slots.of(Topic::Inbox)), (all.len(), inbox));
            assert!(all.iter().enumerate().all(|(slot, of)| slots.slot(*of) == Some(slot) && slots.at(slot as u32) == *of));
            assert_eq!(slots.slot(TopicPartition { topic: Topic::Inbox, partition: Partition(inbox) }), None);
            assert_eq!(slots.of_topic(Topic::Inbox).count(), usize::from(inbox));
        }
        assert!(all.windows(2).all(|pair| pair[1].starts_with(&pair[0])));
        assert_eq!((all[1].contains(&crate::log::layout::TOPIC), all[2][7]), (false, crate::log::layout::TOPIC));
        assert_eq!(Slots::new(made, 9).of_topic(Topic::Inbox).collect::<Vec<_>>(), [0, 1, 2, 8, 9, 10, 11, 12, 13]);
    }
}
