//! A consumer of several topics: one consumer a topic, each in a group of its own.
//!
//! Kafka's cooperative assignor shares out partitions by their number and does not look at topics. In one group for `inbox` and `directory` a
//! projector that joins the only other one gets all of `directory`, and all messages stay with the first. In a group a topic, each
//! topic is shared out evenly.

use async_trait::async_trait;
use futures_util::future::select_all;
use tokio_util::sync::CancellationToken;

use std::sync::Arc;

use crate::clock::{Random as _, SystemRandom};
use crate::ids::Offset;
use crate::log::kafka::consumer::KafkaConsumer;
use crate::log::kafka::names::Names;
use crate::log::kafka::options::KafkaOptions;
use crate::log::{Consumed, Consumer, ReadError, Topic, TopicPartition};

/// See the module.
pub(super) struct Together {
    members: Vec<(Topic, KafkaConsumer)>,
    /// Who is asked first: in turn, but who told of a rebalance waits for the owner to come back.
    first: usize,
}

/// The group in which a topic is consumed.
pub(super) fn group_of(group: &str, topic: Topic) -> String {
    match topic {
        Topic::Inbox => group.to_owned(),
        other => format!("{group}-{}", other.name()),
    }
}

impl Together {
    pub fn join(
        options: &KafkaOptions,
        names: &Arc<Names>,
        group: &str,
        topics: &[Topic],
        closed: &CancellationToken,
    ) -> Result<Self, ReadError> {
        // Who is one process to `sealpost status`.
        let mut random = [0; 8];
        SystemRandom.fill(&mut random);
        let client = format!("sealpost-{:016x}", u64::from_be_bytes(random));
        let member = |&topic| Ok((topic, KafkaConsumer::join(options, names, &group_of(group, topic), &client, topic, closed.clone())?));
        Ok(Self { members: topics.iter().map(member).collect::<Result<_, ReadError>>()?, first: 0 })
    }

    fn of(&self, topic: Topic) -> Result<&KafkaConsumer, ReadError> {
        self.members.iter().find(|(of, _)| *of == topic).map(|(_, member)| member).ok_or_else(not_ours)
    }

    fn of_mut(&mut self, topic: Topic) -> Result<&mut KafkaConsumer, ReadError> {
        self.members.iter_mut().find(|(of, _)| *of == topic).map(|(_, member)| member).ok_or_else(not_ours)
    }
}

fn not_ours() -> ReadError {
    ReadError::Unavailable("the partition is not this consumer's".to_owned())
}

#[async_trait]
impl Consumer for Together {
    async fn next(&mut self) -> Result<Consumed, ReadError> {
        let (first, count) = (self.first, self.members.len());
        let mut members: Vec<&mut KafkaConsumer> = self.members.iter_mut().map(|(_, member)| member).collect();
        members.rotate_left(first);
        // The others are asked again later: a `next` that is dropped loses nothing.
        let (consumed, at, _) = select_all(members.into_iter().map(|member| member.next())).await;
        let spoke = (first + at) % count;
        self.first = match &consumed {
            Ok(Consumed::Assigned(_) | Consumed::Revoked(_)) => spoke,
            _ => (spoke + 1) % count,
        };
        consumed
    }

    async fn hold(&mut self, of: TopicPartition) -> Result<(), ReadError> {
        self.of_mut(of.topic)?.hold(of).await
    }

    async fn seek(&mut self, to: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.of_mut(to.topic)?.seek(to, offset).await
    }

    async fn commit(&mut self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.of_mut(of.topic)?.commit(of, offset).await
    }

    async fn committed(&self, of: TopicPartition) -> Result<Option<Offset>, ReadError> {
        self.of(of.topic)?.committed(of).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_topic_has_its_group() {
        assert_eq!(group_of("projector", Topic::Inbox), "projector");
        assert_eq!(group_of("projector", Topic::Directory), "projector-directory");
    }
}
