//! What is done to topics rather than with them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::admin::{
    AdminClient, AdminOptions, AlterConfig, ConfigResource, ConfigSource, NewPartitions, NewTopic, ResourceSpecifier, TopicReplication,
};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::MetadataPartition;

use crate::ids::Offset;
use crate::limits;
use crate::log::kafka::names::Names;
use crate::log::kafka::options::KafkaOptions;
use crate::log::{ReadError, Topic, TopicPartition};

/// A topic as it shall be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewKafkaTopic {
    /// Which.
    pub topic: Topic,
    /// Into how many partitions.
    pub partitions: u16,
    /// On how many brokers each is.
    pub replication: u16,
    /// Kafka's own settings for it, such as `retention.ms`.
    pub settings: Vec<(String, String)>,
}

impl NewKafkaTopic {
    /// With the settings that the log itself needs.
    pub fn new(topic: Topic, partitions: u16, replication: u16) -> Self {
        let settings = vec![("max.message.bytes".to_owned(), (limits::KAFKA_MESSAGE_BYTES + limits::KAFKA_BATCH_BYTES).to_string())];
        Self { topic, partitions, replication, settings }
    }
}

/// Why topics could not be made or changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KafkaAdminError {
    /// One of that name is there. It was left as it is.
    #[error("the topic `{0}` exists already")]
    Exists(String),
    /// The cluster refuses. A retry can't help.
    #[error("the topic `{topic}`: {reason}")]
    Refused {
        /// Which.
        topic: String,
        /// Why.
        reason: String,
    },
    /// The cluster could not be asked. A retry can help.
    #[error("the Kafka cluster can't be asked: {0}")]
    Unavailable(String),
}

fn admin(options: &KafkaOptions) -> Result<AdminClient<DefaultClientContext>, KafkaError> {
    options.client().create()
}

fn patience() -> AdminOptions {
    let call = Duration::from_millis(limits::KAFKA_CALL_MS);
    AdminOptions::new().request_timeout(Some(call)).operation_timeout(Some(call))
}

/// Makes topics, with the prefix of the options; returns when the brokers know them. Those before one that fails are made.
pub async fn create_topics(options: &KafkaOptions, topics: &[NewKafkaTopic]) -> Result<(), KafkaAdminError> {
    if topics.is_empty() {
        return Ok(());
    }
    let unavailable = |error: KafkaError| KafkaAdminError::Unavailable(error.to_string());
    let admin = admin(options).map_err(unavailable)?;
    let names: Vec<String> = topics.iter().map(|new| options.topic(new.topic)).collect();
    let wanted: Vec<NewTopic<'_>> = topics
        .iter()
        .zip(&names)
        .map(|(new, name)| {
            let made = NewTopic::new(name, i32::from(new.partitions), TopicReplication::Fixed(i32::from(new.replication)));
            new.settings.iter().fold(made, |made, (key, value)| made.set(key, value))
        })
        .collect();
    let made = admin.create_topics(&wanted, &patience()).await.map_err(unavailable);
    // Its thread is joined, which takes a moment.
    let _ = tokio::task::spawn_blocking(move || drop(admin)).await;
    for result in made? {
        match result {
            Ok(_) => {}
            Err((topic, RDKafkaErrorCode::TopicAlreadyExists)) => return Err(KafkaAdminError::Exists(topic)),
            Err((topic, code)) => return Err(KafkaAdminError::Refused { topic, reason: code.to_string() }),
        }
    }
    Ok(())
}

/// Gives topic `inbox` more partitions, so many in all; returns when the brokers know them. `sealpost topology scale` puts them to use.
pub async fn grow_inbox(options: &KafkaOptions, partitions: u16) -> Result<(), KafkaAdminError> {
    let asked = Asked::new(options)?;
    let name = options.topic(Topic::Inbox);
    let wanted = [NewPartitions::new(&name, usize::from(partitions))];
    let grown = asked.admin.create_partitions(&wanted, &patience()).await.map_err(|error| asked.failed(&error));
    asked.end().await;
    for result in grown? {
        if let Err((topic, code)) = result {
            return Err(KafkaAdminError::Refused { topic, reason: code.to_string() });
        }
    }
    Ok(())
}

/// Removes topics with all that is in them; ones that are not there are no error.
pub async fn delete_topics(options: &KafkaOptions, topics: &[Topic]) -> Result<(), KafkaAdminError> {
    let unavailable = |error: KafkaError| KafkaAdminError::Unavailable(error.to_string());
    let admin = admin(options).map_err(unavailable)?;
    let names: Vec<String> = topics.iter().map(|&topic| options.topic(topic)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let removed = admin.delete_topics(&names, &patience()).await.map_err(unavailable);
    let _ = tokio::task::spawn_blocking(move || drop(admin)).await;
    for result in removed? {
        match result {
            Ok(_) | Err((_, RDKafkaErrorCode::UnknownTopic | RDKafkaErrorCode::UnknownTopicOrPartition)) => {}
            Err((topic, code)) => return Err(KafkaAdminError::Refused { topic, reason: code.to_string() }),
        }
    }
    Ok(())
}

/// A topic as the cluster has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaTopic {
    /// Which.
    pub topic: Topic,
    /// How many partitions it has.
    pub partitions: usize,
    /// On how many brokers its partitions are; if they differ, the fewest.
    pub replication: usize,
    /// Partitions of which fewer copies are in sync than there are.
    pub under_replicated: usize,
    /// Partitions that nobody leads: nothing can be appended to them or read of them.
    pub leaderless: usize,
    /// What holds for it, wherever that was set.
    pub settings: BTreeMap<String, String>,
    /// Of these, what was set for this topic itself.
    pub overrides: BTreeMap<String, String>,
}

/// A cluster with those of our topics that it has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KafkaCluster {
    /// Brokers that are alive.
    pub brokers: usize,
    /// In the order of [`Topic::ON_CLUSTER`].
    pub topics: Vec<KafkaTopic>,
}

/// How many of these miss a copy that is in sync, and how many a leader.
pub(super) fn missing(partitions: &[MetadataPartition]) -> (usize, usize) {
    let under_replicated = partitions.iter().filter(|partition| partition.isr().len() < partition.replicas().len()).count();
    (under_replicated, partitions.iter().filter(|partition| partition.leader() < 0).count())
}

/// What the cluster has of our topics, and how they are set. Changes nothing.
pub async fn describe_topics(options: &KafkaOptions) -> Result<KafkaCluster, KafkaAdminError> {
    let asked = Asked::new(options)?;
    let described = asked.describe(options).await;
    asked.end().await;
    described
}

/// Sets what is given for each topic and leaves the rest of its settings as it is.
pub async fn alter_settings(options: &KafkaOptions, changes: &[(Topic, Vec<(String, String)>)]) -> Result<(), KafkaAdminError> {
    if changes.is_empty() {
        return Ok(());
    }
    let asked = Asked::new(options)?;
    let altered = asked.alter(options, changes).await;
    asked.end().await;
    altered
}

/// A connection for questions; one that nobody answers says where it asked.
struct Asked {
    admin: Arc<AdminClient<DefaultClientContext>>,
    brokers: String,
}

impl Asked {
    fn new(options: &KafkaOptions) -> Result<Self, KafkaAdminError> {
        let admin = admin(options).map_err(|error| KafkaAdminError::Unavailable(error.to_string()))?;
        Ok(Self { admin: Arc::new(admin), brokers: options.brokers.clone() })
    }

    fn failed(&self, error: &KafkaError) -> KafkaAdminError {
        KafkaAdminError::Unavailable(format!(
            "{error} (asked at {}); check the addresses, that the brokers run, and TLS and SASL settings",
            self.brokers
        ))
    }

    /// The driver's thread is joined, which takes a moment.
    async fn end(self) {
        let _ = tokio::task::spawn_blocking(move || drop(self.admin)).await;
    }

    async fn describe(&self, options: &KafkaOptions) -> Result<KafkaCluster, KafkaAdminError> {
        let admin = Arc::clone(&self.admin);
        let call = Duration::from_millis(limits::KAFKA_CALL_MS);
        // All topics: asking for one that is not there could make it, if the cluster is set up so.
        let asking = tokio::task::spawn_blocking(move || admin.inner().fetch_metadata(None, call));
        let metadata =
            asking.await.map_err(|error| KafkaAdminError::Unavailable(error.to_string()))?.map_err(|error| self.failed(&error))?;
        let mut topics = Vec::new();
        for topic in Topic::ON_CLUSTER {
            let name = options.topic(topic);
            let Some(found) = metadata.topics().iter().find(|found| found.name() == name && !found.partitions().is_empty()) else {
                continue;
            };
            let partitions = found.partitions();
            let (under_replicated, leaderless) = missing(partitions);
            topics.push(KafkaTopic {
                topic,
                partitions: partitions.len(),
                replication: partitions.iter().map(|partition| partition.replicas().len()).min().unwrap_or(0),
                under_replicated,
                leaderless,
                settings: BTreeMap::new(),
                overrides: BTreeMap::new(),
            });
        }
        let names: Vec<String> = topics.iter().map(|found| options.topic(found.topic)).collect();
        for (found, resource) in topics.iter_mut().zip(self.settings(&names).await?) {
            for entry in resource.entries {
                let Some(value) = entry.value else { continue };
                if entry.source == ConfigSource::DynamicTopic {
                    found.overrides.insert(entry.name.clone(), value.clone());
                }
                found.settings.insert(entry.name, value);
            }
        }
        Ok(KafkaCluster { brokers: metadata.brokers().len(), topics })
    }

    /// In the order of the names.
    async fn settings(&self, names: &[String]) -> Result<Vec<ConfigResource>, KafkaAdminError> {
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let asked: Vec<ResourceSpecifier<'_>> = names.iter().map(|name| ResourceSpecifier::Topic(name)).collect();
        let answers = self.admin.describe_configs(&asked, &patience()).await.map_err(|error| self.failed(&error))?;
        let refused = |name: &String, reason: String| KafkaAdminError::Refused { topic: name.clone(), reason };
        let mut by_name: BTreeMap<String, ConfigResource> = BTreeMap::new();
        for (answer, name) in answers.into_iter().zip(names) {
            let resource = answer.map_err(|code| refused(name, code.to_string()))?;
            if let rdkafka::admin::OwnedResourceSpecifier::Topic(name) = &resource.specifier {
                by_name.insert(name.clone(), resource);
            }
        }
        // The driver has no error for one topic of many: what may not be seen comes without settings.
        let take = |name: &String| {
            let resource = by_name.remove(name).filter(|resource| !resource.entries.is_empty());
            resource.ok_or_else(|| refused(name, "its settings may not be seen: give this user the right DescribeConfigs".to_owned()))
        };
        names.iter().map(take).collect()
    }

    /// The driver knows only the call that sets a topic's settings as a whole, so those that stay are said again.
    async fn alter(&self, options: &KafkaOptions, changes: &[(Topic, Vec<(String, String)>)]) -> Result<(), KafkaAdminError> {
        let present = self.describe(options).await?;
        let mut whole = Vec::with_capacity(changes.len());
        for (topic, settings) in changes {
            let name = options.topic(*topic);
            let found = present.topics.iter().find(|found| found.topic == *topic);
            let mut all = found
                .map(|found| found.overrides.clone())
                .ok_or_else(|| KafkaAdminError::Refused { topic: name.clone(), reason: "it does not exist".to_owned() })?;
            all.extend(settings.iter().cloned());
            whole.push((name, all));
        }
        let wanted: Vec<AlterConfig<'_>> = whole
            .iter()
            .map(|(name, all)| {
                let one = AlterConfig::new(ResourceSpecifier::Topic(name));
                all.iter().fold(one, |one, (key, value)| one.set(key, value))
            })
            .collect();
        for result in self.admin.alter_configs(&wanted, &patience()).await.map_err(|error| self.failed(&error))? {
            result.map_err(|(specifier, code)| KafkaAdminError::Refused {
                topic: match specifier {
                    rdkafka::admin::OwnedResourceSpecifier::Topic(name) => name,
                    other => format!("{other:?}"),
                },
                reason: code.to_string(),
            })?;
        }
        Ok(())
    }
}

/// Kafka's DeleteRecords: what is before the offset is gone at once. The topic must not be compacted.
pub(super) async fn delete_records(options: &KafkaOptions, names: &Names, of: TopicPartition, before: Offset) -> Result<(), ReadError> {
    let unavailable = |error: KafkaError| ReadError::Unavailable(error.to_string());
    let admin = admin(options).map_err(unavailable)?;
    let list = names.list([(of, Some(before))]);
    let deleted = admin.delete_records(&list, &patience()).await.map_err(unavailable);
    let _ = tokio::task::spawn_blocking(move || drop(admin)).await;
    deleted?.elements().iter().try_for_each(|element| element.error()).map_err(unavailable)
}
