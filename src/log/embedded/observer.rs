//! A log that another process has open (or nobody), watched without its lock and without changing a byte.
//!
//! One topic is looked at. Segments are scanned from front to back, and again from where the scan ended whenever somebody asks. A
//! chunk counts once a later one stands behind it, or when it is a second old: commits are synced one after the other, so by then
//! it is on disk, unless a sync takes longer than that. So an observer may, for once, see what a power cut takes back.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;

use crate::clock::Clock;
use crate::ids::{Offset, Partition};
use crate::log::embedded::disk;
use crate::log::embedded::files::{self, Meta};
use crate::log::embedded::format::{self, CHUNK_ALIGN, ChunkHead, RunHead, RunKind, SEGMENT_HEADER_BYTES, SegmentHeader, align};
use crate::log::embedded::index::{Extents, SegmentIndex, segment_number, segment_path};
use crate::log::embedded::options::OpenError;
use crate::log::embedded::reader::{Window, place};
use crate::log::embedded::view::{past_the_end, size};
use crate::log::{AppendError, AppendSink, Consumer, EventLog, PartitionCounts, ReadError, Record, Topic, TopicPartition};

/// A chunk at the very end counts when it is so old.
const SYNCED_MS: u64 = 1_000;

/// See the module. It refuses appends, consumer groups and truncation; reads and bounds are what it is for.
pub struct LogObserver {
    dir: PathBuf,
    topic: Topic,
    counts: PartitionCounts,
    log: u64,
    clock: Arc<dyn Clock>,
    seen: Arc<Mutex<Seen>>,
}

/// What was scanned so far.
#[derive(Default)]
struct Seen {
    parts: Vec<Part>,
    segments: BTreeMap<u64, Segment>,
    /// Number of the next commit.
    commit: Option<u64>,
    /// Where to begin: older segments are left alone.
    first: u64,
}

#[derive(Default)]
struct Part {
    extents: Extents,
    next: u64,
}

#[derive(Default)]
struct Segment {
    /// Where the scan goes on.
    at: u64,
    index: SegmentIndex,
    /// The next segment has begun and this one was scanned since: nothing more comes.
    sealed: bool,
}

impl std::fmt::Debug for LogObserver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LogObserver").field("dir", &self.dir).field("topic", &self.topic).finish_non_exhaustive()
    }
}

impl LogObserver {
    /// Looks at one topic of the log in a folder; with `newest`, only at what its newest segment files hold. Blocks until it has
    /// scanned them.
    pub fn open(dir: &Path, topic: Topic, newest: Option<usize>, clock: Arc<dyn Clock>) -> Result<Self, OpenError> {
        let path = Meta::path(dir);
        let meta = std::fs::read(&path).map_err(OpenError::io("read", &path))?;
        let meta: Meta = files::parse(&meta, &path)?;
        let counts = meta.counts(&path)?;
        let numbers = segments(dir).map_err(OpenError::io("list", dir))?;
        let skipped = newest.map_or(0, |newest| numbers.len().saturating_sub(newest.max(1)));
        let first = numbers.get(skipped).copied().unwrap_or(0);
        let parts = (0..counts.of(topic)).map(|_| Part::default()).collect();
        let seen = Arc::new(Mutex::new(Seen { parts, first, ..Seen::default() }));
        let observer = Self { dir: dir.to_owned(), topic, counts, log: meta.log, clock, seen };
        observer.look().map_err(|error| OpenError::damaged(dir, 0, error.to_string()))?;
        Ok(observer)
    }

    /// Scans what has come since.
    fn look(&self) -> Result<(), ReadError> {
        let mut seen = self.seen.lock();
        let numbers = segments(&self.dir).map_err(|error| unavailable(&self.dir, &error))?;
        let gone: Vec<u64> = seen.segments.keys().copied().filter(|number| !numbers.contains(number)).collect();
        for number in gone {
            seen.segments.remove(&number);
            seen.parts.iter_mut().for_each(|part| part.extents.forget(number));
        }
        let first = seen.first;
        let mut numbers = numbers.into_iter().filter(|&number| number >= first).peekable();
        while let Some(number) = numbers.next() {
            if seen.segments.get(&number).is_some_and(|segment| segment.sealed) {
                continue;
            }
            let has_next = match numbers.peek() {
                Some(&next) => self.has_begun(next)?,
                None => false,
            };
            // After the look at the next one: what is there now is all that this one will ever have.
            match self.scan(&mut seen, number, has_next) {
                Ok(()) if has_next => {
                    if let Some(segment) = seen.segments.get_mut(&number) {
                        segment.sealed = true;
                    }
                }
                Ok(()) => break,
                // Retention took it.
                Err(ReadError::Unavailable(_)) if !segment_path(&self.dir, number).exists() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The file and what it says of itself; `None` while it is being made.
    fn file(&self, number: u64) -> Result<Option<(File, SegmentHeader)>, ReadError> {
        let path = segment_path(&self.dir, number);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unavailable(&path, &error)),
        };
        let mut bytes = vec![0; SEGMENT_HEADER_BYTES];
        let done = disk::read_up_to(&file, &mut bytes, 0).map_err(|error| unavailable(&path, &error))?;
        let header = SegmentHeader::decode(&bytes[..done]).ok().filter(|header| header.number == number && header.log == self.log);
        Ok(header.map(|header| (file, header)))
    }

    fn has_begun(&self, number: u64) -> Result<bool, ReadError> {
        let Some((file, header)) = self.file(number)? else { return Ok(false) };
        let path = segment_path(&self.dir, number);
        let chunk = Window::new(&file, header.size).table(SEGMENT_HEADER_BYTES as u64, header.salt);
        Ok(chunk.map_err(|error| unavailable(&path, &error))?.is_ok())
    }

    fn scan(&self, seen: &mut Seen, number: u64, has_next: bool) -> Result<(), ReadError> {
        let path = segment_path(&self.dir, number);
        let io = |error: io::Error| unavailable(&path, &error);
        let Some((file, header)) = self.file(number)? else { return Ok(()) };
        let mut window = Window::new(&file, header.size);
        let mut at = seen.segments.get(&number).map_or(SEGMENT_HEADER_BYTES as u64, |segment| segment.at);
        while let Ok((head, runs)) = window.chunk(at, header.salt).map_err(io)? {
            let after = align(at + u64::from(head.len), CHUNK_ALIGN);
            let old = self.clock.now().0.saturating_sub(head.written_ms) >= SYNCED_MS;
            if !(has_next || old || window.table(after, header.salt).map_err(io)?.is_ok()) {
                break;
            }
            let lead_len = runs.first().map_or(0, |run| run.len as usize);
            let lead = window.get(at + head.table_end() as u64, lead_len).map_err(io)?;
            let damaged = |reason: String| ReadError::Corrupt(format!("{} at byte {at}: {reason}", path.display()));
            self.take(seen, &header, (at, after), &head, &runs, lead).map_err(damaged)?;
            at = after;
        }
        Ok(())
    }

    fn take(
        &self,
        seen: &mut Seen,
        header: &SegmentHeader,
        (at, after): (u64, u64),
        head: &ChunkHead,
        runs: &[RunHead],
        lead: &[u8],
    ) -> Result<(), String> {
        if let Some(expected) = seen.commit.filter(|&expected| expected != head.commit) {
            return Err(format!("commit {expected} should be here, but it is {}", head.commit));
        }
        let oldest = seen.commit.replace(head.commit + 1).is_none();
        if let Some(run) = runs.first().filter(|run| oldest && run.kind == RunKind::Next) {
            for (of, next) in format::nexts(lead, run).map_err(|invalid| invalid.to_string())? {
                if let Some(part) = self.number(of).and_then(|number| seen.parts.get_mut(number)) {
                    part.next = next;
                }
            }
        }
        let segment = seen.segments.entry(header.number).or_default();
        segment.at = after;
        for run in place(at, head, runs) {
            let Some(part) = self.number(run.head.of).and_then(|number| seen.parts.get_mut(number)) else { continue };
            let end = run.head.base + u64::from(run.head.count);
            part.extents.insert(run.head.base, end, header.number);
            part.next = part.next.max(end);
            segment.index.insert(u32::from(run.head.of.partition.0), run);
        }
        Ok(())
    }

    /// The partition's number, if it is one of the topic.
    fn number(&self, of: TopicPartition) -> Option<usize> {
        let Partition(number) = of.partition;
        (of.topic == self.topic && number < self.counts.of(self.topic)).then_some(usize::from(number))
    }

    fn read_now(&self, from: TopicPartition, offset: u64, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        let number = self.number(from).ok_or(ReadError::NoSuchPartition)?;
        let (segment, runs) = {
            let seen = self.seen.lock();
            let part = &seen.parts[number];
            let earliest = part.earliest();
            if offset < earliest {
                return Err(ReadError::Gone { asked: Offset(offset), earliest: Offset(earliest) });
            }
            if offset > part.next {
                return Err(past_the_end(offset, part.next));
            }
            if offset == part.next {
                return Ok(Vec::new());
            }
            let missing = || ReadError::Corrupt(format!("offset {offset} is in no segment"));
            let extent = part.extents.find(offset).ok_or_else(missing)?;
            let segment = seen.segments.get(&extent.segment).ok_or_else(missing)?;
            (extent.segment, segment.index.from(number as u32, offset, extent.end, bytes_max))
        };
        let path = segment_path(&self.dir, segment);
        let file = File::open(&path).map_err(|error| unavailable(&path, &error))?;
        let (mut out, mut bytes) = (Vec::new(), 0);
        for run in runs {
            let mut data = vec![0; run.head.len as usize];
            let done = disk::read_up_to(&file, &mut data, run.at).map_err(|error| unavailable(&path, &error))?;
            data.truncate(done);
            let damaged = |invalid| ReadError::Corrupt(format!("{} at byte {}: {invalid}", path.display(), run.at));
            for record in format::records(&Bytes::from(data), &run.head).map_err(damaged)? {
                if record.offset >= Offset(offset) && (bytes < bytes_max || out.is_empty()) {
                    bytes += size(&record);
                    out.push(record);
                }
            }
        }
        Ok(out)
    }

    fn read_or_look(&self, from: TopicPartition, offset: u64, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        match self.read_now(from, offset, bytes_max) {
            Ok(records) if records.is_empty() => {}
            // Retention may have taken the file: then a new look moves the bounds.
            Err(ReadError::Unavailable(_)) => {}
            other => return other,
        }
        self.look()?;
        self.read_now(from, offset, bytes_max)
    }

    fn share(&self) -> Self {
        Self {
            dir: self.dir.clone(),
            topic: self.topic,
            counts: self.counts,
            log: self.log,
            clock: Arc::clone(&self.clock),
            seen: Arc::clone(&self.seen),
        }
    }
}

impl Part {
    fn earliest(&self) -> u64 {
        self.extents.first().unwrap_or(self.next)
    }
}

fn segments(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        numbers.extend(segment_number(&entry?.path()));
    }
    numbers.sort_unstable();
    Ok(numbers)
}

fn unavailable(path: &Path, error: &io::Error) -> ReadError {
    ReadError::Unavailable(format!("{}: {error}", path.display()))
}

fn read_only() -> String {
    "this is only a view of a log that another process writes".to_owned()
}

#[async_trait]
impl EventLog for LogObserver {
    fn partitions(&self, topic: Topic) -> u16 {
        if topic == self.topic { self.counts.of(topic) } else { 0 }
    }

    fn submit(&self, _: TopicPartition, _: Bytes, _: &Arc<dyn AppendSink>, _: u64) -> Result<(), AppendError> {
        Err(AppendError::Unavailable(read_only()))
    }

    async fn consumer(&self, _: &str, _: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        Err(ReadError::Unavailable(read_only()))
    }

    async fn read(&self, from: TopicPartition, offset: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        let observer = self.share();
        let read = tokio::task::spawn_blocking(move || observer.read_or_look(from, offset.0, bytes_max));
        read.await.unwrap_or(Err(ReadError::Closed))
    }

    async fn bounds(&self, of: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        let number = self.number(of).ok_or(ReadError::NoSuchPartition)?;
        let observer = self.share();
        let looked = tokio::task::spawn_blocking(move || observer.look());
        looked.await.unwrap_or(Err(ReadError::Closed))?;
        let seen = self.seen.lock();
        let part = &seen.parts[number];
        Ok((Offset(part.earliest()), Offset(part.next)))
    }

    async fn truncate_before(&self, _: TopicPartition, _: Offset) -> Result<(), ReadError> {
        Err(ReadError::Unavailable(read_only()))
    }

    fn health(&self) -> Result<(), AppendError> {
        Err(AppendError::Unavailable(read_only()))
    }

    async fn close(&self) {}
}
