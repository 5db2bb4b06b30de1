//! The event log: the truth. A partitioned, append-only, durable sequence of records for each topic.
//!
//! The contract below fits Apache Kafka exactly (partition, offset, ordered consumption, committed
//! positions, one owner a partition within a consumer group); `conformance` proves it of every implementation.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, Offset, Partition};
use crate::log::layout::Layout;

#[cfg(any(test, feature = "test-util"))]
pub mod conformance;
pub mod embedded;
#[cfg(feature = "cluster")]
pub mod kafka;
pub mod layout;
mod partitions;

pub use partitions::PartitionCounts;

/// The topics; see the design's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Topic {
    /// Envelopes, acknowledgements, attachments; keyed by the recipient account.
    Inbox,
    /// Group handshakes and messages; keyed by the group. Reserved.
    Groups,
    /// Accounts, devices and public keys; keyed by the account.
    Directory,
    /// One record a life-cycle step, for analysts. Reserved.
    Metadata,
    /// What projectors tell edges in other processes; kept for minutes. Only on a cluster.
    Push,
    /// How accounts are spread over the partitions of `inbox`, see [`layout`]; one partition. On an embedded log once that has changed.
    Layout,
}

impl Topic {
    /// Those that are kept, in the order of their numbers: what an embedded log holds when it is made.
    pub const ALL: [Self; 4] = [Self::Inbox, Self::Groups, Self::Directory, Self::Metadata];

    /// Those of a cluster.
    pub const ON_CLUSTER: [Self; 6] = [Self::Inbox, Self::Groups, Self::Directory, Self::Metadata, Self::Push, Self::Layout];

    /// Its name on every profile.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inbox => "inbox",
            Self::Groups => "groups",
            Self::Directory => "directory",
            Self::Metadata => "metadata",
            Self::Push => "push",
            Self::Layout => "layout",
        }
    }
}

/// One partition of one topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TopicPartition {
    /// The topic.
    pub topic: Topic,
    /// Its partition.
    pub partition: Partition,
}

/// A record as it is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Its position; in a partition offsets grow by one, but holes are allowed (retention, compaction, transactions).
    pub offset: Offset,
    /// When the log took it.
    pub appended: UnixMillis,
    /// What was appended.
    pub payload: Bytes,
}

/// Why an append was not acknowledged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AppendError {
    /// The queue is at its cap: nothing was appended. Retry later.
    #[error("the log is busy: its queue is full")]
    Full,
    /// The record is larger than [`crate::limits::RECORD_BYTES`]: nothing was appended. A retry can't help.
    #[error("the record is larger than the log takes")]
    TooLarge,
    /// The partition does not exist: nothing was appended. A retry can't help.
    #[error("there is no such partition")]
    NoSuchPartition,
    /// A write failed before anything was on disk; nothing was appended and the log goes on. Retry later.
    #[error("the log can't write: {0}")]
    Unavailable(String),
    /// The record may or may not be on the log: the broker did not answer in time. The log goes on, and a retry is safe
    /// where G-IDEMPOTENT holds: what stands twice is delivered once.
    #[error("nobody knows whether the record is on the log: {0}")]
    Unknown(String),
    /// The log failed while it wrote or synced: the record may or may not survive. The log is poisoned
    /// and takes nothing more until it is opened anew (which decides what survived).
    #[error("the log failed and takes no more until a restart: {0}")]
    Poisoned(String),
    /// The log was closed.
    #[error("the log is closed")]
    Closed,
}

impl AppendError {
    /// Whether the record may be on the log in spite of the error.
    pub const fn outcome_unknown(&self) -> bool {
        matches!(self, Self::Unknown(_) | Self::Poisoned(_))
    }
}

/// Why reading or consuming failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// The position is before the first record that retention has left. Start at `earliest` and say the gap.
    #[error("position {asked:?} is gone, the earliest is {earliest:?}")]
    Gone {
        /// What was asked for.
        asked: Offset,
        /// What is there.
        earliest: Offset,
    },
    /// The partition does not exist.
    #[error("there is no such partition")]
    NoSuchPartition,
    /// The bytes on disk are not what was written.
    #[error("the log is damaged: {0}")]
    Corrupt(String),
    /// The disk or the broker failed. Retry later.
    #[error("the log can't be read: {0}")]
    Unavailable(String),
    /// The log was closed.
    #[error("the log is closed")]
    Closed,
}

/// Where the outcome of an append goes. `done` is called exactly once for each accepted `submit`, from the
/// log's own thread and in offset order within a partition, so it must be quick and must never block.
pub trait AppendSink: Send + Sync {
    /// The append that was submitted with `token` is durable at this offset, or failed.
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>);

    /// Called after a run of `done`, once for each sink of a commit: the moment to wake somebody.
    fn flush(&self) {}
}

/// A partitioned, durable log.
///
/// - **Order.** Records of one partition are kept in the order in which `submit` was called by one caller.
///   Offsets grow by one an append.
/// - **Durability.** `done(Ok)` is called after the record is on disk (embedded: fdatasync) or on all in-sync
///   replicas (Kafka: `acks=all`). Consumers never see a record before that.
/// - **Bounds.** Queued bytes are capped; past the cap `submit` fails with [`AppendError::Full`] at once.
/// - **Failure.** After a failed write or sync of its own disk whose outcome is unknown the log is poisoned: every
///   later append fails, [`EventLog::health`] says why, and opening it again recovers every acknowledged record. A broker
///   that did not answer in time is another matter: that append is [`AppendError::Unknown`] and the log goes on.
/// - **Idempotence.** None: an append that is retried may stand twice. The layers above deduplicate.
#[async_trait]
pub trait EventLog: Send + Sync + 'static {
    /// How many partitions the topic has.
    fn partitions(&self, topic: Topic) -> u16;

    /// How accounts are spread over the partitions of [`Topic::Inbox`].
    fn layout(&self) -> Arc<Layout> {
        Arc::new(Layout::of(self.partitions(Topic::Inbox)))
    }

    /// Whether the newest generation has been known for so long that nothing is under way to an older one.
    fn layout_is_known(&self) -> bool {
        true
    }

    /// Where an account's records of [`Topic::Inbox`] are appended now. [`AppendError::Unavailable`]: for a moment nobody knows.
    fn route(&self, account: &AccountId) -> Result<TopicPartition, AppendError> {
        let partition = Partition::of(account, self.partitions(Topic::Inbox));
        Ok(TopicPartition { topic: Topic::Inbox, partition })
    }

    /// Queues a record. `Ok` means that `sink.done(token, …)` will be called; `Err` that it never will.
    fn submit(&self, to: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError>;

    /// Appends a record and waits until it is durable. Dropping the future does not take the append back.
    async fn append(&self, to: TopicPartition, payload: Bytes) -> Result<Offset, AppendError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let sink: Arc<dyn AppendSink> = Arc::new(OneShot(parking_lot::Mutex::new(Some(sender))));
        self.submit(to, payload, &sink, 0)?;
        receiver.await.unwrap_or(Err(AppendError::Closed))
    }

    /// Joins a consumer group. Partitions of the topics are shared out among the group's consumers, each to
    /// one at a time; the consumer learns of it by [`Consumed::Assigned`] and [`Consumed::Revoked`].
    async fn consumer(&self, group: &str, topics: &[Topic]) -> Result<Box<dyn Consumer>, ReadError>;

    /// Reads records from a position on, at least one if there is one, up to about `bytes_max`; without
    /// a group and without waiting. An empty answer means that `from` is the end.
    async fn read(&self, from: TopicPartition, offset: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError>;

    /// The first offset that is still there, and the one that the next record gets.
    async fn bounds(&self, of: TopicPartition) -> Result<(Offset, Offset), ReadError>;

    /// Forgets records before the offset, at the latest when whole files can go (Kafka: DeleteRecords).
    async fn truncate_before(&self, of: TopicPartition, offset: Offset) -> Result<(), ReadError>;

    /// `Err` with the reason if the log takes no appends.
    fn health(&self) -> Result<(), AppendError>;

    /// Commits what is queued, refuses what comes, and returns when all is on disk.
    async fn close(&self);
}

/// What a consumer is given.
#[derive(Debug)]
pub enum Consumed {
    /// The partition is this consumer's now. It is delivered from the offset that [`Consumer::seek`] is called
    /// with before the next call of [`Consumer::next`], else from the group's committed position (or the earliest).
    Assigned(Vec<TopicPartition>),
    /// The partitions belong to somebody else after the next call of [`Consumer::next`]: finish and commit before it.
    Revoked(Vec<TopicPartition>),
    /// Records in offset order for each partition.
    Records(Vec<(TopicPartition, Vec<Record>)>),
}

/// One member of a consumer group. Dropping it gives its partitions back.
#[async_trait]
pub trait Consumer: Send {
    /// Waits for something to do. Cancel-safe: nothing is lost if the future is dropped.
    async fn next(&mut self) -> Result<Consumed, ReadError>;

    /// Nothing of an owned partition is delivered until a seek.
    async fn hold(&mut self, of: TopicPartition) -> Result<(), ReadError>;

    /// The next record delivered of an owned partition is this one.
    async fn seek(&mut self, to: TopicPartition, offset: Offset) -> Result<(), ReadError>;

    /// Records for the group that everything before `offset` is done. Durable lazily; a hint for lag and retention,
    /// since the store's own position decides.
    async fn commit(&mut self, of: TopicPartition, offset: Offset) -> Result<(), ReadError>;

    /// The group's committed position, if there is one.
    async fn committed(&self, of: TopicPartition) -> Result<Option<Offset>, ReadError>;
}

/// Reads partitions outside of any group: from where they end when it is asked, or from where it is told.
#[async_trait]
pub trait Follow: Send + Sync + 'static {
    /// A consumer of these partitions: it gives records only, and is never asked to seek or commit. [`ReadError::Gone`]: it was away for longer
    /// than records are kept; what comes from a new one has a hole before it.
    async fn follow(&self, of: &[TopicPartition]) -> Result<Box<dyn Consumer>, ReadError>;

    /// The same from these positions on.
    async fn follow_from(&self, from: &[(TopicPartition, Offset)]) -> Result<Box<dyn Consumer>, ReadError>;
}

struct OneShot(parking_lot::Mutex<Option<tokio::sync::oneshot::Sender<Result<Offset, AppendError>>>>);

impl AppendSink for OneShot {
    fn done(&self, _token: u64, outcome: Result<Offset, AppendError>) {
        if let Some(sender) = self.0.lock().take() {
            // The caller may have gone away; the record stays.
            let _ = sender.send(outcome);
        }
    }
}
