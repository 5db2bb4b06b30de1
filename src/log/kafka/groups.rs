//! Who consumes, and how far they are: what `sealpost status` asks. Changes nothing, joins nothing.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::TopicPartitionList;
use rdkafka::config::FromClientConfigAndContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _, DefaultConsumerContext};
use rdkafka::error::KafkaError;

use crate::ids::{Offset, Partition};
use crate::limits;
use crate::log::kafka::admin::{KafkaAdminError, KafkaTopic};
use crate::log::kafka::names;
use crate::log::kafka::options::KafkaOptions;
use crate::log::kafka::together::group_of;
use crate::log::{Topic, TopicPartition};

const CALL: Duration = Duration::from_millis(limits::KAFKA_CALL_MS);
/// Kafka's word for a group in which nothing moves.
const STABLE: &str = "Stable";

/// A consumer of a group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupMember {
    /// Kafka's id of it; new after each start.
    pub id: String,
    /// From where it connects.
    pub host: String,
    /// What it owns of our topics.
    pub partitions: Vec<TopicPartition>,
}

/// A consumer group.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Group {
    /// Kafka's word: `Stable`, `PreparingRebalance`, `Empty`, …; empty if there is none.
    pub state: String,
    /// Who is in it.
    pub members: Vec<GroupMember>,
}

/// How far a group is in one partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// The first record that is kept.
    pub earliest: Offset,
    /// What the next record gets.
    pub end: Offset,
    /// Up to where the group has committed; none if never.
    pub committed: Option<Offset>,
}

impl Position {
    /// Records that are on the log and not committed.
    pub fn lag(&self) -> u64 {
        self.end.0.saturating_sub(self.committed.unwrap_or(self.earliest).max(self.earliest).0)
    }

    /// Records that are kept.
    pub const fn records(&self) -> u64 {
        self.end.0.saturating_sub(self.earliest.0)
    }
}

/// A look at groups of consumers; one connection a topic for any number of questions.
pub struct GroupWatch {
    /// One for each topic that is consumed and its group, since each has one of its own.
    drivers: Vec<(Topic, String, Arc<BaseConsumer<DefaultConsumerContext>>)>,
    options: KafkaOptions,
}

impl GroupWatch {
    /// Of topics, each with the name of the group that consumes it (as [`EventLog::consumer`](crate::log::EventLog::consumer) is asked for it).
    pub fn new(options: &KafkaOptions, consumed: &[(Topic, &str)]) -> Result<Self, KafkaAdminError> {
        let mut drivers = Vec::with_capacity(consumed.len());
        for (topic, group) in consumed {
            let group = group_of(group, *topic);
            let driver = BaseConsumer::from_config_and_context(&options.reader(&group), DefaultConsumerContext);
            drivers.push((*topic, group, Arc::new(driver.map_err(|error| failed(&error))?)));
        }
        Ok(Self { drivers, options: options.clone() })
    }

    /// Who is in it, and who owns what.
    pub async fn group(&self) -> Result<Group, KafkaAdminError> {
        let (drivers, options) = (self.drivers.clone(), self.options.clone());
        blocking(move || {
            let mut all = Group::default();
            // By the name that a process gives to all its consumers.
            let mut clients: Vec<String> = Vec::new();
            for (_, group, driver) in drivers {
                let group = format!("{}{group}", options.prefix);
                let list = driver.client().fetch_group_list(Some(&group), CALL).map_err(|error| failed(&error))?;
                let Some(found) = list.groups().iter().find(|one| one.name() == group) else { continue };
                if all.state.is_empty() || all.state == STABLE {
                    found.state().clone_into(&mut all.state);
                }
                for member in found.members() {
                    let partitions = member.assignment().and_then(|bytes| assignment(bytes, &options)).unwrap_or_default();
                    if let Some(at) = clients.iter().position(|client| client == member.client_id()) {
                        all.members[at].partitions.extend(partitions);
                        continue;
                    }
                    clients.push(member.client_id().to_owned());
                    let host = member.client_host().trim_start_matches('/').to_owned();
                    all.members.push(GroupMember { id: member.id().to_owned(), host, partitions });
                }
            }
            Ok(all)
        })
        .await
    }

    /// How far it is, in every partition of these topics.
    pub async fn positions(&self, topics: &[KafkaTopic]) -> Result<BTreeMap<TopicPartition, Position>, KafkaAdminError> {
        let all: Vec<(TopicPartition, String)> = topics
            .iter()
            .flat_map(|topic| {
                let name = self.options.topic(topic.topic);
                (0..u16::try_from(topic.partitions).unwrap_or(u16::MAX))
                    .map(move |number| (TopicPartition { topic: topic.topic, partition: Partition(number) }, name.clone()))
            })
            .collect();
        let drivers = self.drivers.clone();
        blocking(move || {
            let Some((.., any)) = drivers.first() else { return Ok(BTreeMap::new()) };
            let mut committed = Vec::with_capacity(drivers.len());
            for (topic, _, driver) in &drivers {
                let mut list = TopicPartitionList::new();
                for (of, name) in all.iter().filter(|(of, _)| of.topic == *topic) {
                    list.add_partition(name, i32::from(of.partition.0));
                }
                if list.count() > 0 {
                    committed.push(driver.committed_offsets(list, CALL).map_err(|error| failed(&error))?);
                }
            }
            let mut positions = BTreeMap::new();
            for (of, name) in all {
                let number = i32::from(of.partition.0);
                let (low, high) = any.fetch_watermarks(&name, number, CALL).map_err(|error| failed(&error))?;
                let at = committed.iter().find_map(|list| list.find_partition(&name, number)?.offset().to_raw());
                let (Some(earliest), Some(end)) = (names::offset(low), names::offset(high)) else { continue };
                positions.insert(of, Position { earliest, end, committed: at.and_then(names::offset) });
            }
            Ok(positions)
        })
        .await
    }

    /// Ends the connection, which takes a moment.
    pub async fn end(self) {
        let _ = tokio::task::spawn_blocking(move || drop(self.drivers)).await;
    }
}

fn failed(error: &KafkaError) -> KafkaAdminError {
    KafkaAdminError::Unavailable(error.to_string())
}

async fn blocking<T: Send + 'static>(ask: impl FnOnce() -> Result<T, KafkaAdminError> + Send + 'static) -> Result<T, KafkaAdminError> {
    tokio::task::spawn_blocking(ask).await.unwrap_or_else(|error| Err(KafkaAdminError::Unavailable(error.to_string())))
}

/// Kafka's `ConsumerProtocolAssignment`: a version, then an array of topics, each a name and an array of partitions. What is not of
/// ours is left out; none if the bytes are something else.
fn assignment(bytes: &[u8], options: &KafkaOptions) -> Option<Vec<TopicPartition>> {
    let mut rest = bytes;
    let mut take = |count: usize| -> Option<&[u8]> {
        let (taken, left) = rest.split_at_checked(count)?;
        rest = left;
        Some(taken)
    };
    take(2)?;
    let mut owned = Vec::new();
    for _ in 0..number(take(4)?)? {
        let length = u16::from_be_bytes(take(2)?.try_into().ok()?);
        let name = std::str::from_utf8(take(usize::from(length))?).ok()?;
        let topic = Topic::ON_CLUSTER.into_iter().find(|&topic| options.topic(topic) == name);
        for _ in 0..number(take(4)?)? {
            let partition = u16::try_from(number(take(4)?)?).ok()?;
            owned.extend(topic.map(|topic| TopicPartition { topic, partition: Partition(partition) }));
        }
    }
    owned.sort_unstable();
    Some(owned)
}

fn number(bytes: &[u8]) -> Option<u32> {
    u32::try_from(i32::from_be_bytes(bytes.try_into().ok()?)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(topics: &[(&str, &[i32])]) -> Vec<u8> {
        let mut bytes = vec![0, 1];
        bytes.extend((topics.len() as i32).to_be_bytes());
        for (name, partitions) in topics {
            bytes.extend((name.len() as u16).to_be_bytes());
            bytes.extend(name.as_bytes());
            bytes.extend((partitions.len() as i32).to_be_bytes());
            bytes.extend(partitions.iter().flat_map(|partition| partition.to_be_bytes()));
        }
        bytes.extend((-1i32).to_be_bytes());
        bytes
    }

    #[test]
    fn assignments_are_read_and_cut_ones_are_none() {
        let mut options = KafkaOptions::new("k");
        options.prefix = "p-".to_owned();
        let bytes = written(&[("p-inbox", &[3, 1]), ("other", &[7]), ("p-directory", &[0])]);
        let of = |topic, partition| TopicPartition { topic, partition: Partition(partition) };
        let all = [of(Topic::Inbox, 1), of(Topic::Inbox, 3), of(Topic::Directory, 0)];
        assert_eq!(assignment(&bytes, &options).expect("read"), all);
        // The user data behind it is not looked at.
        for cut in 0..bytes.len() - 4 {
            assert_eq!(assignment(&bytes[..cut], &options), None, "{cut}");
        }
        assert_eq!(assignment(&written(&[("p-inbox", &[-1])]), &options), None);
        assert_eq!(assignment(&[0, 1, 0xff, 0xff, 0xff, 0xff], &options), None);
    }

    #[test]
    fn lag_counts_from_what_is_kept() {
        let at = |earliest, end, committed: Option<u64>| Position {
            earliest: Offset(earliest),
            end: Offset(end),
            committed: committed.map(Offset),
        };
        assert_eq!((at(0, 10, None).lag(), at(4, 10, None).lag(), at(4, 10, Some(7)).lag(), at(4, 10, Some(2)).lag()), (10, 6, 3, 6));
        assert_eq!((at(4, 10, Some(12)).lag(), at(4, 10, None).records()), (0, 6));
    }
}
