//! The log on Apache Kafka, through librdkafka.
//!
//! - **Durability.** `acks=all` with an idempotent producer: an acknowledged record is on every in-sync replica. Whether that
//!   means disk is the cluster's matter: with one broker it is its page cache (`flush.messages=1` on the topic makes it the
//!   disk), with three and `min.insync.replicas=2` it is the memory of two machines at least.
//! - **Outcomes.** An append that is not acknowledged within [`limits::KAFKA_DELIVERY_MS`] is
//!   [`AppendError::Unknown`]: a broker may have it. Refusals that a broker spoke out are [`AppendError::Unavailable`]. Only
//!   what the driver itself calls fatal (the broker forgot what the producer had sent) poisons.
//! - **Bounds.** [`limits::LOG_QUEUE_BYTES`] of records may wait; past that `submit` fails with [`AppendError::Full`] at once.
//! - **Partitions** are chosen by the caller; their number is read when the log is opened.
//! - **Threads.** The driver's own (a few for each client), `log-acks` (see `producer`), and one for a moment when a consumer
//!   leaves its group.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::metadata::Metadata;
use rdkafka::producer::Producer as _;
use tokio_util::sync::CancellationToken;

use crate::ids::{AccountId, Offset};
use crate::limits;
use crate::log::kafka::consumer::KafkaConsumer;
use crate::log::kafka::layout::Layouts;
use crate::log::kafka::names::Names;
use crate::log::kafka::producer::Producer;
use crate::log::kafka::reader::Readers;
use crate::log::kafka::together::Together;
use crate::log::layout::Layout;
use crate::log::{AppendError, AppendSink, Consumer, EventLog, Follow, PartitionCounts, ReadError, Record, Topic, TopicPartition};

mod admin;
mod batch;
mod consumer;
mod groups;
mod layout;
mod names;
mod options;
mod producer;
mod reader;
mod together;

pub use admin::{
    KafkaAdminError, KafkaCluster, KafkaTopic, NewKafkaTopic, alter_settings, create_topics, delete_topics, describe_topics, grow_inbox,
};
pub use groups::{Group, GroupMember, GroupWatch, Position};
pub use options::{KafkaOpenError, KafkaOptions, KafkaSasl, KafkaTls, SaslMechanism};

/// See the module. Dropping it without [`EventLog::close`] fails what is queued; what was acknowledged stays.
pub struct KafkaLog {
    options: KafkaOptions,
    names: Arc<Names>,
    layouts: Arc<Layouts>,
    producer: Arc<Producer>,
    readers: Arc<Readers>,
    closed: CancellationToken,
    running: Mutex<Option<Running>>,
}

/// What the partitions of our topics miss.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Replicas {
    /// Partitions of which fewer copies are in sync than there are.
    pub under_replicated: usize,
    /// Partitions that nobody leads.
    pub leaderless: usize,
}

struct Running {
    acks: JoinHandle<()>,
    dispatcher: tokio::task::JoinHandle<()>,
}

impl std::fmt::Debug for KafkaLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KafkaLog").field("brokers", &self.options.brokers).field("prefix", &self.options.prefix).finish_non_exhaustive()
    }
}

impl KafkaLog {
    /// Connects, and checks that the topics are there and have leaders. Never makes a topic. Needs a tokio runtime.
    pub async fn open(options: KafkaOptions) -> Result<Arc<Self>, KafkaOpenError> {
        options.check_files()?;
        let producer = Producer::new(&options).map_err(|error| KafkaOpenError::Options(error.to_string()))?;
        let producer = Arc::new(producer);
        let for_thread = Arc::clone(&producer);
        let acks = std::thread::Builder::new()
            .name("log-acks".to_owned())
            .spawn(move || for_thread.run())
            .map_err(|error| KafkaOpenError::Options(error.to_string()))?;
        let dispatcher = tokio::spawn(Arc::clone(&producer.shared).dispatch());
        let (for_check, options_for_check) = (Arc::clone(&producer), options.clone());
        let checked = tokio::task::spawn_blocking(move || wait_for_topics(&for_check, &options_for_check)).await;
        let counts = match checked {
            Ok(Ok(counts)) => counts,
            failed => {
                producer.shared.refuse();
                producer.shared.end(true);
                return Err(match failed {
                    Ok(Err(error)) => error,
                    _ => KafkaOpenError::Options("the check of the topics did not end".to_owned()),
                });
            }
        };
        let log = Arc::new(Self {
            names: Arc::new(Names::new(&options, counts)),
            layouts: Arc::new(Layouts::new(counts.inbox)),
            options,
            producer,
            readers: Arc::default(),
            closed: CancellationToken::new(),
            running: Mutex::new(Some(Running { acks, dispatcher })),
        });
        layout::look(&log).await.map_err(|error| KafkaOpenError::Layout(error.to_string()))?;
        tokio::spawn(layout::follow(Arc::downgrade(&log), log.closed.clone()));
        Ok(log)
    }

    /// Which copies and leaders its topics miss. Changes nothing.
    pub async fn replicas(&self) -> Result<Replicas, ReadError> {
        let (producer, options) = (Arc::clone(&self.producer), self.options.clone());
        let asked = tokio::task::spawn_blocking(move || {
            let call = Duration::from_millis(limits::KAFKA_CALL_MS);
            // All topics: asking for one that is not there could make it, if the cluster is set up so.
            let metadata =
                producer.driver.client().fetch_metadata(None, call).map_err(|error| ReadError::Unavailable(error.to_string()))?;
            let names = Topic::ON_CLUSTER.map(|topic| options.topic(topic));
            let ours = metadata.topics().iter().filter(|topic| names.iter().any(|name| name == topic.name()));
            let sums = ours.map(|topic| admin::missing(topic.partitions()));
            Ok(sums.fold(Replicas::default(), |all, (under_replicated, leaderless)| Replicas {
                under_replicated: all.under_replicated + under_replicated,
                leaderless: all.leaderless + leaderless,
            }))
        });
        asked.await.unwrap_or(Err(ReadError::Closed))
    }

    fn known(&self, of: TopicPartition) -> Result<(), ReadError> {
        if self.closed.is_cancelled() {
            return Err(ReadError::Closed);
        }
        if self.names.exists(of) { Ok(()) } else { Err(ReadError::NoSuchPartition) }
    }
}

/// Asks for the topics until all of them have leaders, or the time is up.
fn wait_for_topics(producer: &Producer, options: &KafkaOptions) -> Result<PartitionCounts, KafkaOpenError> {
    let patience = Duration::from_millis(limits::KAFKA_OPEN_MS);
    let until = Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        // All topics: asking for one that is not there could make it, if the cluster is set up so.
        let found = match producer.driver.client().fetch_metadata(None, left.max(Duration::from_millis(100))) {
            Ok(metadata) => check_topics(&metadata, options),
            Err(error) => Err(connect_error(producer, options, &error)),
        };
        match found {
            // A broker may hear of a topic a moment after it was made.
            Err(KafkaOpenError::TopicMissing(_)) if left > patience - Duration::from_millis(limits::KAFKA_NEWS_MS) => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) if error.can_retry() && Instant::now() < until => std::thread::sleep(Duration::from_millis(100)),
            found => return found,
        }
    }
}

fn check_topics(metadata: &Metadata, options: &KafkaOptions) -> Result<PartitionCounts, KafkaOpenError> {
    let mut counts = PartitionCounts { inbox: 0, groups: 0, directory: 0, metadata: 0, push: 0 };
    for topic in Topic::ON_CLUSTER {
        let name = options.topic(topic);
        let Some(found) = metadata.topics().iter().find(|found| found.name() == name) else {
            return Err(KafkaOpenError::TopicMissing(name));
        };
        let partitions = found.partitions();
        if found.error().is_some() && partitions.is_empty() {
            return Err(KafkaOpenError::TopicMissing(name));
        }
        if let Some(headless) = partitions.iter().find(|partition| partition.leader() < 0) {
            let reason = headless.error().map_or_else(|| "no leader".to_owned(), |code| RDKafkaErrorCode::from(code).to_string());
            return Err(KafkaOpenError::NoLeader { topic: name, partition: headless.id(), reason });
        }
        let expected =
            options.partitions.filter(|_| topic != Topic::Layout).map_or(partitions.len(), |counts| usize::from(counts.of(topic)));
        let count = u16::try_from(partitions.len()).ok().filter(|_| partitions.len() == expected);
        let Some(count) = count else { return Err(KafkaOpenError::PartitionCount { topic: name, found: partitions.len(), expected }) };
        match topic {
            Topic::Inbox => counts.inbox = count,
            Topic::Groups => counts.groups = count,
            Topic::Directory => counts.directory = count,
            Topic::Metadata => counts.metadata = count,
            Topic::Push => counts.push = count,
            Topic::Layout => {}
        }
    }
    Ok(counts)
}

fn connect_error(producer: &Producer, options: &KafkaOptions, error: &KafkaError) -> KafkaOpenError {
    let brokers = options.brokers.clone();
    match producer.shared.trouble.lock().clone() {
        Some((RDKafkaErrorCode::Authentication | RDKafkaErrorCode::SaslAuthenticationFailed, reason)) => {
            KafkaOpenError::Authentication { brokers, reason }
        }
        // A certificate that is not taken comes as a failure of the transport, in OpenSSL's words.
        Some((code, reason)) if code == RDKafkaErrorCode::SSL || reason.contains("SSL routines") => KafkaOpenError::Tls { brokers, reason },
        Some((_, reason)) => KafkaOpenError::Unreachable { brokers, reason },
        None => KafkaOpenError::Unreachable { brokers, reason: error.to_string() },
    }
}

#[async_trait]
impl Follow for KafkaLog {
    async fn follow(&self, of: &[TopicPartition]) -> Result<Box<dyn Consumer>, ReadError> {
        let mut ends = Vec::with_capacity(of.len());
        for &one in of {
            ends.push((one, self.bounds(one).await?.1));
        }
        self.follow_from(&ends).await
    }

    async fn follow_from(&self, from: &[(TopicPartition, Offset)]) -> Result<Box<dyn Consumer>, ReadError> {
        Ok(Box::new(KafkaConsumer::follow(&self.options, &self.names, from, self.closed.clone())?))
    }
}

#[async_trait]
impl EventLog for KafkaLog {
    fn partitions(&self, topic: Topic) -> u16 {
        self.names.count(topic)
    }

    fn layout(&self) -> Arc<Layout> {
        self.layouts.current()
    }

    fn layout_is_known(&self) -> bool {
        self.layouts.is_known()
    }

    fn route(&self, account: &AccountId) -> Result<TopicPartition, AppendError> {
        self.layouts.route(account)
    }

    fn submit(&self, to: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        self.producer.submit(to, &self.names, &payload, sink, token)
    }

    async fn consumer(&self, group: &str, topics: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        if self.closed.is_cancelled() {
            return Err(ReadError::Closed);
        }
        Ok(Box::new(Together::join(&self.options, &self.names, group, topics, &self.closed)?))
    }

    async fn read(&self, from: TopicPartition, offset: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        self.known(from)?;
        let (readers, options, names) = (Arc::clone(&self.readers), self.options.clone(), Arc::clone(&self.names));
        let read = tokio::task::spawn_blocking(move || readers.read(&options, &names, from, offset, bytes_max));
        read.await.unwrap_or(Err(ReadError::Closed))
    }

    async fn bounds(&self, of: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        self.known(of)?;
        let (producer, names) = (Arc::clone(&self.producer), Arc::clone(&self.names));
        let bounds = tokio::task::spawn_blocking(move || reader::bounds(producer.driver.client(), &names, of));
        bounds.await.unwrap_or(Err(ReadError::Closed))
    }

    async fn truncate_before(&self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        let (_, end) = self.bounds(of).await?;
        admin::delete_records(&self.options, &self.names, of, offset.min(end)).await
    }

    fn health(&self) -> Result<(), AppendError> {
        self.producer.health()
    }

    async fn close(&self) {
        let shared = &self.producer.shared;
        shared.refuse();
        let running = self.running.lock().take();
        let Some(Running { acks, dispatcher }) = running else {
            // Somebody else closes; consumers learn of it when that is done.
            self.closed.cancelled().await;
            return;
        };
        // The driver answers for every record by then; half as much again for a machine that is slow.
        let patience = Duration::from_millis(limits::KAFKA_DELIVERY_MS * 3 / 2);
        let drained = tokio::time::timeout(patience, shared.drained()).await.is_ok();
        shared.end(!drained);
        let readers = Arc::clone(&self.readers);
        let joined = tokio::task::spawn_blocking(move || {
            readers.clear();
            acks.join()
        });
        if !matches!(joined.await, Ok(Ok(()))) || dispatcher.await.is_err() {
            tracing::error!("closing the log panicked");
        }
        self.closed.cancel();
    }
}

impl Drop for KafkaLog {
    fn drop(&mut self) {
        self.producer.shared.refuse();
        self.producer.shared.end(true);
        self.closed.cancel();
    }
}
