//! The log of one process: one write-ahead log on local files, shared by all topics and partitions.
//!
//! ```text
//! submit ──▶ queue ──▶ log thread: one chunk of all that waits ── pwrite ── fdatasync ──▶ done, flush
//!                                        │ publish
//!                                        ▼
//!                     view: recent records in memory, where older ones are ──▶ consumers, reads
//! ```
//!
//! - **Commit.** Whatever waits is laid out as one chunk, written and synced once, then acknowledged. Segments are
//!   zero-filled and synced ahead of time (`spare`), so that a commit overwrites blocks that exist.
//! - **Failure.** A failed write or sync poisons the log, since nobody knows what reached the disk. Running out of room
//!   happens while the *next* segment is made, before a byte of a record was written: those appends fail as
//!   [`AppendError::Unavailable`] and the log goes on when there is room. (On file systems that copy on write a write to
//!   a prepared segment may fail for lack of room as well; that poisons.)
//! - **Opening** checks what is there; see `recovery`.
//! - **Threads.** The log thread, one that makes segments, and a keeper for positions and retention.

use std::fs::File;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::background;
use crate::ids::{AccountId, Offset};
use crate::limits;
use crate::log::embedded::consumer::EmbeddedConsumer;
use crate::log::embedded::layouts::{LayoutSink, Layouts};
use crate::log::embedded::queue::Entry;
use crate::log::embedded::recovery::{Recovered, recover};
use crate::log::embedded::shared::Shared;
use crate::log::embedded::spare::Spare;
use crate::log::embedded::view::{Source, collect};
use crate::log::embedded::writer::Writer;
use crate::log::layout::{Layout, LayoutRecord};
use crate::log::{AppendError, AppendSink, Consumer, EventLog, ReadError, Record, Topic, TopicPartition};

mod consumer;
pub mod disk;
mod files;
pub mod format;
mod groups;
mod index;
mod keeper;
mod layouts;
mod observer;
mod options;
mod queue;
mod reader;
mod recovery;
mod retention;
mod shared;
#[cfg(any(test, feature = "test-util"))]
pub mod sim;
mod slots;
mod spare;
mod summary;
mod view;
mod writer;

pub use observer::LogObserver;
pub use options::{OpenError, Options, Retention, SEGMENT_BYTES_MIN};

pub use crate::log::PartitionCounts;
pub use shared::Stats;

/// See the module. Dropping it without [`EventLog::close`] is as good as a crash: what was acknowledged stays.
pub struct EmbeddedLog {
    shared: Arc<Shared>,
    layouts: Arc<Layouts>,
    threads: Mutex<Option<Threads>>,
}

/// How long another process's lock is waited for.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

struct Threads {
    writer: JoinHandle<()>,
    spare: JoinHandle<()>,
    keeper: JoinHandle<()>,
    /// Held as long as anything may write.
    _lock: File,
}

impl std::fmt::Debug for EmbeddedLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedLog").field("dir", &self.shared.options.dir).finish_non_exhaustive()
    }
}

impl EmbeddedLog {
    /// Opens the log in a folder, or makes one. Blocks until all of it is checked.
    pub fn open(options: Options) -> Result<Arc<Self>, OpenError> {
        options.check()?;
        let dir = options.dir.clone();
        options.disk.create_dir(&dir).map_err(OpenError::io("create", &dir))?;
        let lock = lock(&options)?;
        let Recovered { log, slots, view, active, commit, spare, sealed } = recover(&options)?;
        let next = view.parts.iter().map(|part| part.next).collect();
        let shared = Arc::new(Shared::new(options, log, slots, view, Spare::with(spare)));
        *shared.keeper.sealed.lock() = sealed;
        let layouts = Arc::new(Layouts::new(slots.made().inbox));
        layouts.read(&shared)?;
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(OpenError::io("start a thread for", &dir))
        };
        let writer = Writer::new(Arc::clone(&shared), active, commit, next);
        let (for_spare, for_keeper) = (Arc::clone(&shared), Arc::clone(&shared));
        let spare = background::spawn("log-spare", move || for_spare.spare.run(&for_spare.options, for_spare.log));
        let spare = spare.map_err(OpenError::io("start a thread for", &dir))?;
        let keeper = spawn("log-keeper", Box::new(move || for_keeper.keep()))?;
        let writer = spawn("log", Box::new(move || writer.run()))?;
        Ok(Arc::new(Self { shared, layouts, threads: Mutex::new(Some(Threads { writer, spare, keeper, _lock: lock })) }))
    }

    /// Counters since it was opened.
    pub fn stats(&self) -> Stats {
        self.shared.stats()
    }

    /// Lets go what is past its retention, now; it is done by itself every now and then. Blocks.
    pub fn retain(&self) -> Result<(), String> {
        self.shared.retain()
    }

    /// Makes partitions of `inbox`, until there are so many; accounts are spread over them once topic `layout` says so. Blocks until they
    /// are on disk. Nothing happens to what flows meanwhile, and a crash leaves them made or not.
    pub fn grow_inbox(&self, partitions: u16) -> Result<(), AppendError> {
        self.shared.grow_inbox(partitions)
    }

    fn layout_sink(&self, payload: &[u8], sink: &Arc<dyn AppendSink>) -> Result<Arc<dyn AppendSink>, AppendError> {
        // One that can't be read would keep the log from opening.
        let record = LayoutRecord::decode(payload).map_err(|error| AppendError::Unavailable(error.to_string()))?;
        Ok(Arc::new(LayoutSink { layouts: Arc::clone(&self.layouts), record, sink: Arc::clone(sink) }))
    }

    /// Ends the threads, the log thread first. Blocks.
    fn join(shared: &Shared, threads: Threads) {
        let me = std::thread::current().id();
        for (thread, stop) in [
            (threads.writer, None),
            (threads.spare, Some(Box::new(|| shared.spare.stop()) as Box<dyn Fn() + '_>)),
            (threads.keeper, Some(Box::new(|| shared.keeper.stop()))),
        ] {
            if let Some(stop) = stop {
                stop();
            }
            // A sink may hold the last reference; a thread can't wait for itself.
            if thread.thread().id() != me && thread.join().is_err() {
                tracing::error!("a thread of the log panicked");
            }
        }
    }
}

fn lock(options: &Options) -> Result<File, OpenError> {
    let path = options.dir.join("lock");
    let file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(OpenError::io("open", &path))?;
    // A process that was killed, or a child of ours that has not called exec yet, lets go in a moment.
    let until = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < until => std::thread::sleep(Duration::from_millis(20)),
            Err(std::fs::TryLockError::WouldBlock) => return Err(OpenError::Locked(options.dir.clone())),
            Err(std::fs::TryLockError::Error(error)) => return Err(OpenError::io("lock", &path)(error)),
        }
    }
}

#[async_trait]
impl EventLog for EmbeddedLog {
    fn partitions(&self, topic: Topic) -> u16 {
        self.shared.slots().of(topic)
    }

    fn layout(&self) -> Arc<Layout> {
        self.layouts.current()
    }

    fn layout_is_known(&self) -> bool {
        self.layouts.is_known()
    }

    fn route(&self, account: &AccountId) -> Result<TopicPartition, AppendError> {
        Ok(TopicPartition { topic: Topic::Inbox, partition: self.layouts.partition_of(account) })
    }

    fn submit(&self, to: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        if payload.len() > limits::RECORD_BYTES {
            return Err(AppendError::TooLarge);
        }
        let slot = self.shared.slots().slot(to).ok_or(AppendError::NoSuchPartition)? as u32;
        let sink = if to.topic == Topic::Layout { self.layout_sink(&payload, sink)? } else { Arc::clone(sink) };
        self.shared.queue.push(Entry { payload, sink, token, slot })
    }

    async fn consumer(&self, group: &str, topics: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        Ok(Box::new(EmbeddedConsumer::join(&self.shared, group, topics)?))
    }

    async fn read(&self, from: TopicPartition, offset: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        let slot = self.shared.slot(from)?;
        let bytes_max = bytes_max.min(limits::LOG_BATCH_BYTES);
        let source = self.shared.view.lock().source(slot, offset.0, bytes_max)?;
        match source {
            Source::End => Ok(Vec::new()),
            Source::Memory(runs) => Ok(collect(&runs, offset.0, bytes_max)),
            Source::Disk { .. } => {
                let shared = Arc::clone(&self.shared);
                let read = tokio::task::spawn_blocking(move || shared.read_blocking(slot, offset.0, bytes_max));
                read.await.unwrap_or(Err(ReadError::Closed))
            }
        }
    }

    async fn bounds(&self, of: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        let slot = self.shared.slot(of)?;
        let view = self.shared.view.lock();
        if view.closed {
            return Err(ReadError::Closed);
        }
        let part = &view.parts[slot as usize];
        Ok((Offset(part.earliest()), Offset(part.next)))
    }

    async fn truncate_before(&self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        let slot = self.shared.slot(of)?;
        {
            let mut view = self.shared.view.lock();
            if view.closed {
                return Err(ReadError::Closed);
            }
            let part = &mut view.parts[slot as usize];
            part.forgotten = part.forgotten.max(offset.0.min(part.next));
        }
        let shared = Arc::clone(&self.shared);
        tokio::task::spawn_blocking(move || shared.save_positions(true)).await.unwrap_or(Err(ReadError::Closed))
    }

    fn health(&self) -> Result<(), AppendError> {
        self.shared.health()
    }

    async fn close(&self) {
        self.shared.queue.close();
        let threads = self.threads.lock().take();
        let Some(threads) = threads else { return };
        let shared = Arc::clone(&self.shared);
        let joined = tokio::task::spawn_blocking(move || {
            Self::join(&shared, threads);
            shared.view.lock().close();
            if let Err(error) = shared.save_positions(false) {
                tracing::warn!(%error, "the log could not save its consumers' positions; they get records again");
            }
        });
        if joined.await.is_err() {
            tracing::error!("closing the log panicked");
        }
    }
}

impl Drop for EmbeddedLog {
    fn drop(&mut self) {
        let Some(threads) = self.threads.lock().take() else { return };
        let (entries, carries) = self.shared.queue.shut(AppendError::Closed);
        // The keeper, which is joined below, waits for their outcome.
        drop(carries);
        for entry in &entries {
            entry.sink.done(entry.token, Err(AppendError::Closed));
            entry.sink.flush();
        }
        Self::join(&self.shared, threads);
        self.shared.view.lock().close();
    }
}
