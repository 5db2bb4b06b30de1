//! How an embedded log is opened, and why it could not be.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{Clock, Random, SystemClock, SystemRandom};
use crate::limits;
use crate::log::embedded::disk::{Disk, RealDisk};
use crate::log::{PartitionCounts, Topic};

/// What may go from the old end of the log. Records of [`Topic::Directory`] never go by age or size: they
/// are rewritten at the new end when the file they are in goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Files whose newest record is older go, once every consumer group is past them.
    pub age_ms: Option<u64>,
    /// When all files together are larger the oldest go, even if a consumer group was not there yet.
    pub bytes: Option<u64>,
}

impl Default for Retention {
    /// An envelope's life and a day; no size cap.
    fn default() -> Self {
        Self { age_ms: Some(limits::ENVELOPE_TTL_MS + 24 * 3600 * 1000), bytes: None }
    }
}

/// How an [`super::EmbeddedLog`] is opened.
#[derive(Clone)]
pub struct Options {
    /// The folder; made if it is missing. One process at a time.
    pub dir: PathBuf,
    /// Partitions of each topic.
    pub partitions: PartitionCounts,
    /// Size of a segment file once the log is busy; the first ones are smaller. At least 64 KiB.
    pub segment_bytes: u64,
    /// What may go.
    pub retention: Retention,
    /// Recent records kept in memory for consumers that keep up.
    pub tail_bytes: usize,
    /// Bytes that may wait for a commit.
    pub queue_bytes: usize,
    /// Under load, how long commits wait for each other at most: fewer, larger syncs cost less CPU.
    pub linger: Duration,
    /// Checks every segment at opening. Else only the newest ones are scanned, for the others their summaries are
    /// taken, and damage in them is found when they are read.
    pub check_all: bool,
    /// Where record times come from.
    pub clock: Arc<dyn Clock>,
    /// Where the salts of segments come from.
    pub random: Arc<dyn Random>,
    /// The file system.
    pub disk: Arc<dyn Disk>,
}

/// The smallest [`Options::segment_bytes`].
pub const SEGMENT_BYTES_MIN: u64 = 64 * 1024;
/// The size of a new log's first segment; each later one is four times as large, up to [`Options::segment_bytes`].
pub(super) const FIRST_SEGMENT_BYTES: u64 = 1024 * 1024;

impl Options {
    /// With the defaults, in this folder.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            partitions: PartitionCounts::default(),
            segment_bytes: 128 * 1024 * 1024,
            retention: Retention::default(),
            tail_bytes: limits::LOG_TAIL_BYTES,
            queue_bytes: limits::LOG_QUEUE_BYTES,
            linger: Duration::from_micros(400),
            check_all: false,
            clock: Arc::new(SystemClock),
            random: Arc::new(SystemRandom),
            disk: Arc::new(RealDisk),
        }
    }

    pub(super) fn check(&self) -> Result<(), OpenError> {
        if self.segment_bytes < SEGMENT_BYTES_MIN {
            return Err(OpenError::Options(format!("segment_bytes is {}, it must be at least {SEGMENT_BYTES_MIN}", self.segment_bytes)));
        }
        for topic in Topic::ALL {
            let count = self.partitions.of(topic);
            if count == 0 || count > limits::LOG_PARTITIONS {
                let (name, max) = (topic.name(), limits::LOG_PARTITIONS);
                return Err(OpenError::Options(format!("topic {name} has {count} partitions, it must have 1 to {max}")));
            }
        }
        Ok(())
    }
}

/// Why a log could not be opened. Nothing on disk was changed that matters; every text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The options make no sense.
    #[error("the log's options are wrong: {0}")]
    Options(String),
    /// Another process has it open.
    #[error("the log in {0} is in use by another process: stop that one first, or use another folder")]
    Locked(PathBuf),
    /// The number of partitions is not the one the log was made with.
    #[error(
        "the log was made with {made} partitions of topic {topic}, the configuration says {asked}: \
         set it back to {made}, which is how the log began; `sealpost topology scale` spreads accounts over another number"
    )]
    Partitions {
        /// Which topic.
        topic: &'static str,
        /// What the log has.
        made: u16,
        /// What was asked for.
        asked: u16,
    },
    /// What is on disk is not what was written, and not the unfinished end that a crash leaves. Acknowledged
    /// records are missing, so the log does not start by itself.
    #[error(
        "the log is damaged: {file} at byte {position}: {reason}. Acknowledged records may be lost, so the log does not start. \
         Check the disk, then restore the whole folder from a backup. Keep a copy of the folder as it is now"
    )]
    Damaged {
        /// The file.
        file: PathBuf,
        /// Where in it.
        position: u64,
        /// What is wrong there.
        reason: String,
    },
    /// The file system refused.
    #[error(
        "the log can't {doing} {path}: {source}. Check that the folder is writable and the disk is neither full nor failing, then start again"
    )]
    Io {
        /// What was tried.
        doing: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
}

impl OpenError {
    pub(super) fn io(doing: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { doing, path, source }
    }

    pub(super) fn damaged(file: impl Into<PathBuf>, position: u64, reason: impl Into<String>) -> Self {
        Self::Damaged { file: file.into(), position, reason: reason.into() }
    }
}
