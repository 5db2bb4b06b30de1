//! What is done to topics rather than with them.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, AlterConfig, ConfigSource, NewTopic, ResourceSpecifier, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};

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

/// Kafka's DeleteRecords: what is before the offset is gone at once. The topic must not be compacted.
pub(super) async fn delete_records(options: &KafkaOptions, names: &Names, of: TopicPartition, before: Offset) -> Result<(), ReadError> {
    let unavailable = |error: KafkaError| ReadError::Unavailable(error.to_string());
    let admin = admin(options).map_err(unavailable)?;
    let list = names.list([(of, Some(before))]);
    let deleted = admin.delete_records(&list, &patience()).await.map_err(unavailable);
    let _ = tokio::task::spawn_blocking(move || drop(admin)).await;
    deleted?.elements().iter().try_for_each(|element| element.error()).map_err(unavailable)
}

/// A topic as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundTopic {
    /// How many partitions it has.
    pub partitions: usize,
    /// On how many brokers its first one is.
    pub replication: usize,
    /// What was set for it, apart from the cluster's defaults.
    pub settings: BTreeMap<String, String>,
}

/// What a cluster has of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundTopics {
    /// How many brokers there are.
    pub brokers: usize,
    /// The topics that are there.
    pub topics: BTreeMap<Topic, FoundTopic>,
}

/// Looks at these topics, with the prefix of the options.
pub async fn describe_topics(options: &KafkaOptions, topics: &[Topic]) -> Result<FoundTopics, KafkaAdminError> {
    let unavailable = |error: KafkaError| KafkaAdminError::Unavailable(error.to_string());
    let admin = admin(options).map_err(unavailable)?;
    let (admin, metadata) = tokio::task::spawn_blocking(move || {
        let metadata = admin.inner().fetch_metadata(None, Duration::from_millis(limits::KAFKA_CALL_MS));
        (admin, metadata)
    })
    .await
    .map_err(|_| KafkaAdminError::Unavailable("the runtime is shutting down".to_owned()))?;
    let metadata = metadata.map_err(unavailable)?;
    let mut found = BTreeMap::new();
    for &topic in topics {
        let name = options.topic(topic);
        let Some(there) = metadata.topics().iter().find(|there| there.name() == name && !there.partitions().is_empty()) else { continue };
        let replication = there.partitions().first().map_or(0, |first| first.replicas().len());
        let settings = settings_of(&admin, &name).await?;
        found.insert(topic, FoundTopic { partitions: there.partitions().len(), replication, settings });
    }
    let brokers = metadata.brokers().len();
    // Its thread is joined, which takes a moment.
    let _ = tokio::task::spawn_blocking(move || drop(admin)).await;
    Ok(FoundTopics { brokers, topics: found })
}

async fn settings_of(admin: &AdminClient<DefaultClientContext>, name: &str) -> Result<BTreeMap<String, String>, KafkaAdminError> {
    let answer = admin.describe_configs(&[ResourceSpecifier::Topic(name)], &patience()).await;
    let answer = answer.map_err(|error| KafkaAdminError::Unavailable(error.to_string()))?;
    let refused = |code: RDKafkaErrorCode| KafkaAdminError::Refused { topic: name.to_owned(), reason: code.to_string() };
    let mut settings = BTreeMap::new();
    for resource in answer {
        let set = resource.map_err(refused)?.entries.into_iter().filter(|entry| entry.source == ConfigSource::DynamicTopic);
        settings.extend(set.filter_map(|entry| Some((entry.name, entry.value?))));
    }
    Ok(settings)
}

/// Changes settings of a topic; what else was set for it stays.
pub async fn set_topic(options: &KafkaOptions, topic: Topic, settings: &[(String, String)]) -> Result<(), KafkaAdminError> {
    let unavailable = |error: KafkaError| KafkaAdminError::Unavailable(error.to_string());
    let (admin, name) = (admin(options).map_err(unavailable)?, options.topic(topic));
    // The call replaces all settings of a topic, so those that stay are said again.
    let mut all = settings_of(&admin, &name).await?;
    all.extend(settings.iter().cloned());
    let change = all.iter().fold(AlterConfig::new(ResourceSpecifier::Topic(&name)), |change, (key, value)| change.set(key, value));
    let changed = admin.alter_configs([&change], &patience()).await.map_err(unavailable);
    let _ = tokio::task::spawn_blocking(move || drop(admin)).await;
    for result in changed? {
        result.map_err(|(_, code)| KafkaAdminError::Refused { topic: name.clone(), reason: code.to_string() })?;
    }
    Ok(())
}
