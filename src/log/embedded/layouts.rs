//! The layout of the partitions: what topic `layout` says, known to the whole process in the moment that a record of it is on disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use crate::ids::{AccountId, Offset, Partition};
use crate::limits;
use crate::log::embedded::options::OpenError;
use crate::log::embedded::shared::Shared;
use crate::log::layout::{Layout, LayoutRecord, TOPIC};
use crate::log::{AppendError, AppendSink, Record};

/// See the module.
pub(super) struct Layouts {
    /// First partition and number of partitions of the newest generation: all that an append asks for.
    newest: AtomicU32,
    known: RwLock<Known>,
    /// A change that came while the log was open, until it has been known for long enough.
    fresh: Mutex<Option<Fresh>>,
}

struct Known {
    layout: Arc<Layout>,
    /// Nothing was ever written of it: what there is, is one generation.
    unwritten: bool,
}

struct Fresh {
    looked: Instant,
    /// For how long it has been known, without the time in which the process stood still.
    known: Duration,
}

impl Layouts {
    /// Of a log that was made with so many partitions.
    pub fn new(made: u16) -> Self {
        let layout = Layout::of(made);
        let newest = AtomicU32::new(packed(&layout));
        Self { newest, known: RwLock::new(Known { layout: Arc::new(layout), unwritten: true }), fresh: Mutex::new(None) }
    }

    /// Reads topic `layout`. Nothing is under way to an older generation yet.
    pub fn read(&self, shared: &Shared) -> Result<(), OpenError> {
        let Ok(slot) = shared.slot(TOPIC) else { return Ok(()) };
        let damaged = |reason: String| OpenError::damaged(&shared.options.dir, 0, reason);
        let mut next = shared.view.lock().parts[slot as usize].earliest();
        loop {
            let records = shared.read_blocking(slot, next, limits::LOG_BATCH_BYTES).map_err(|error| damaged(error.to_string()))?;
            let Some(last) = records.last() else { break };
            next = last.offset.0 + 1;
            for Record { payload, .. } in &records {
                self.apply(LayoutRecord::decode(payload).map_err(|error| damaged(error.to_string()))?);
            }
        }
        *self.fresh.lock() = None;
        Ok(())
    }

    /// A record of the topic is on disk.
    pub fn apply(&self, record: LayoutRecord) {
        let mut known = self.known.write();
        let mut layout = if known.unwritten { Layout::empty() } else { Layout::clone(&known.layout) };
        let before = layout.newest();
        if !layout.apply(record) {
            return;
        }
        known.unwritten = false;
        if layout.newest() != before {
            tracing::info!(generation = layout.newest().0, partitions = layout.count(), "the partitions of inbox changed");
            *self.fresh.lock() = Some(Fresh { looked: Instant::now(), known: Duration::ZERO });
        }
        self.newest.store(packed(&layout), Ordering::Release);
        known.layout = Arc::new(layout);
    }

    pub fn current(&self) -> Arc<Layout> {
        Arc::clone(&self.known.read().layout)
    }

    /// Where an account's records go.
    pub fn partition_of(&self, account: &AccountId) -> Partition {
        let newest = self.newest.load(Ordering::Acquire);
        Partition((newest >> 16) as u16 + Partition::of(account, newest as u16).0)
    }

    /// Whether every thread has seen the newest generation. A look counts for no more than the time between two of them: while the
    /// process stood still no thread has appended what it was about to.
    pub fn is_known(&self) -> bool {
        let mut fresh = self.fresh.lock();
        let Some(change) = &mut *fresh else { return true };
        let now = Instant::now();
        change.known += (now - change.looked).min(Duration::from_millis(limits::LAYOUT_LOOK_MS));
        change.looked = now;
        let is_known = change.known >= Duration::from_millis(limits::LAYOUT_KNOWN_MS);
        if is_known {
            *fresh = None;
        }
        is_known
    }
}

fn packed(layout: &Layout) -> u32 {
    u32::from(layout.end() - layout.count()) << 16 | u32::from(layout.count())
}

/// Tells everybody of a record of topic `layout` before whoever appended it hears that it is on disk.
pub(super) struct LayoutSink {
    pub layouts: Arc<Layouts>,
    pub record: LayoutRecord,
    pub sink: Arc<dyn AppendSink>,
}

impl AppendSink for LayoutSink {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        if outcome.is_ok() {
            self.layouts.apply(self.record);
        }
        self.sink.done(token, outcome);
    }

    fn flush(&self) {
        self.sink.flush();
    }
}
