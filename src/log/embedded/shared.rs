//! What the threads of one log share.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use crate::limits;
use crate::log::embedded::files::{self, Meta};
use crate::log::embedded::keeper::Keeper;
use crate::log::embedded::options::Options;
use crate::log::embedded::queue::Queue;
use crate::log::embedded::reader::OpenSegments;
use crate::log::embedded::slots::Slots;
use crate::log::embedded::spare::Spare;
use crate::log::embedded::view::{Part, View};
use crate::log::{AppendError, ReadError, Topic, TopicPartition};
use crate::metrics;

/// See the module.
pub(super) struct Shared {
    pub options: Options,
    /// The log's own random number, in every segment.
    pub log: u64,
    pub queue: Queue,
    pub view: Mutex<View>,
    pub spare: Spare,
    pub keeper: Keeper,
    pub open: Mutex<OpenSegments>,
    /// Why there is no next segment, its number and its size.
    unavailable: Mutex<Option<(AppendError, u64, u64)>>,
    /// How many partitions `inbox` has; changes under the view's lock.
    inbox: AtomicU16,
    /// One grows it at a time.
    growing: Mutex<()>,
    commits: AtomicU64,
    records: AtomicU64,
    bytes: AtomicU64,
}

/// Counters since the log was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Writes and syncs.
    pub commits: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes written by them.
    pub bytes: u64,
}

impl Shared {
    pub fn new(options: Options, log: u64, slots: Slots, view: View, spare: Spare) -> Self {
        Self {
            queue: Queue::new(options.queue_bytes),
            options,
            log,
            view: Mutex::new(view),
            spare,
            keeper: Keeper::default(),
            open: Mutex::new(OpenSegments::default()),
            unavailable: Mutex::new(None),
            inbox: AtomicU16::new(slots.of(Topic::Inbox)),
            growing: Mutex::new(()),
            commits: AtomicU64::new(0),
            records: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        }
    }

    /// The partition's slot.
    pub fn slot(&self, of: TopicPartition) -> Result<u32, ReadError> {
        self.slots().slot(of).map(|slot| slot as u32).ok_or(ReadError::NoSuchPartition)
    }

    /// The partitions that there are.
    pub fn slots(&self) -> Slots {
        Slots::new(self.options.partitions, self.inbox.load(Ordering::Acquire))
    }

    /// Makes `inbox` as large as that. It is in the meta file before a record can be in a new partition.
    pub fn grow_inbox(&self, partitions: u16) -> Result<(), AppendError> {
        let _one = self.growing.lock();
        self.health()?;
        let slots = Slots::new(self.options.partitions, partitions);
        if partitions <= self.slots().of(Topic::Inbox) {
            return Ok(());
        }
        if partitions > limits::LOG_PARTITIONS {
            let max = limits::LOG_PARTITIONS;
            return Err(AppendError::Unavailable(format!(
                "inbox would have {partitions} partitions, older ones included; the most is {max}"
            )));
        }
        let path = Meta::path(&self.options.dir);
        files::save(self.options.disk.as_ref(), &path, &Meta::new(self.log, &slots))
            .map_err(|error| AppendError::Unavailable(format!("{}: {error}", path.display())))?;
        let mut view = self.view.lock();
        view.parts.resize_with(slots.total(), Part::default);
        self.inbox.store(partitions, Ordering::Release);
        for group in view.groups.values_mut() {
            group.grow(&slots);
        }
        Ok(())
    }

    /// How large the segment after one of this size is.
    pub fn next_size(&self, size: u64) -> u64 {
        next_size(size, self.options.segment_bytes)
    }

    /// Whether the last attempt to get a segment failed.
    pub fn set_unavailable(&self, missing: Option<(AppendError, u64, u64)>) {
        *self.unavailable.lock() = missing;
    }

    /// Tries again to make a segment that could not be made. Without this a server that takes no work while the log is
    /// unwell would never learn that there is room again.
    pub fn heal(&self) {
        let mut unavailable = self.unavailable.lock();
        if let Some((_, number, size)) = *unavailable {
            if self.spare.is_ready() {
                *unavailable = None;
            } else {
                self.spare.want(number, size);
            }
        }
    }

    pub fn health(&self) -> Result<(), AppendError> {
        self.queue.check()?;
        self.unavailable.lock().as_ref().map_or(Ok(()), |(error, ..)| Err(error.clone()))
    }

    /// Counts a commit.
    pub fn committed(&self, records: u64, bytes: u64, elapsed: Duration) {
        metrics::observe_log_commit(records, bytes, elapsed);
        self.commits.fetch_add(1, Ordering::Relaxed);
        self.records.fetch_add(records, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats { commits: get(&self.commits), records: get(&self.records), bytes: get(&self.bytes) }
    }
}

/// Segments grow with the log, so that a fresh server writes little.
pub(super) fn next_size(size: u64, max: u64) -> u64 {
    use crate::log::embedded::format::{PAGE, align};
    align(size.saturating_mul(4).min(max), PAGE)
}
