//! Reading from segments' files: blocking, off the async threads, every run checked.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use bytes::Bytes;

use crate::ids::Offset;
use crate::limits;
use crate::log::embedded::disk::{self, DiskFile};
use crate::log::embedded::format::{
    self, CHUNK_ALIGN, CHUNK_HEADER_BYTES, ChunkHead, Invalid, RunHead, RunKind, SEGMENT_HEADER_BYTES, align,
};
use crate::log::embedded::index::{RunAt, SegmentIndex, SegmentInfo, segment_path};
use crate::log::embedded::shared::Shared;
use crate::log::embedded::view::{Source, collect, size};
use crate::log::{ReadError, Record};

/// How much is read from a file at once when it is scanned.
const WINDOW_BYTES: usize = 256 * 1024;

/// A segment that is open for reading.
pub(super) struct OpenSegment {
    number: u64,
    file: Arc<dyn DiskFile>,
    /// Not kept for the active one, which grows.
    index: Option<SegmentIndex>,
}

/// Those that were read last.
#[derive(Default)]
pub(super) struct OpenSegments(VecDeque<Arc<OpenSegment>>);

impl OpenSegments {
    fn get(&mut self, number: u64) -> Option<Arc<OpenSegment>> {
        let at = self.0.iter().position(|open| open.number == number)?;
        let open = self.0.remove(at)?;
        self.0.push_back(Arc::clone(&open));
        Some(open)
    }

    fn put(&mut self, open: Arc<OpenSegment>) {
        self.forget(open.number);
        self.0.push_back(open);
        if self.0.len() > limits::LOG_OPEN_SEGMENTS {
            self.0.pop_front();
        }
    }

    /// The segment is no more.
    pub fn forget(&mut self, number: u64) {
        self.0.retain(|other| other.number != number);
    }
}

impl Shared {
    /// Records from an offset on, wherever they are: at least one if there is one, up to about `bytes_max`. Blocks.
    pub fn read_blocking(&self, slot: u32, from: u64, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        let (mut out, mut bytes, mut from, mut missing) = (Vec::<Record>::new(), 0, from, false);
        while bytes < bytes_max.max(1) {
            let source = self.view.lock().source(slot, from, bytes_max.saturating_sub(bytes));
            let records = match source {
                Ok(Source::Memory(runs)) => collect(&runs, from, bytes_max.saturating_sub(bytes)),
                Ok(Source::End) => break,
                Ok(Source::Disk { segment, until, runs }) => {
                    match self.read_segment(slot, from, until, &segment, runs, bytes_max.saturating_sub(bytes)) {
                        // Retention may have taken the file since: then the bounds have moved as well.
                        Err(ReadError::Unavailable(_)) if !missing => {
                            missing = true;
                            continue;
                        }
                        result => result?,
                    }
                }
                // What was read so far is good; the error comes with the next call.
                Err(_) if !out.is_empty() => break,
                Err(error) => return Err(error),
            };
            let Some(last) = records.last() else { return Err(ReadError::Corrupt(format!("offset {from} is not where it should be"))) };
            from = last.offset.0 + 1;
            bytes += records.iter().map(size).sum::<usize>();
            out.extend(records);
        }
        Ok(out)
    }

    fn read_segment(
        &self,
        slot: u32,
        from: u64,
        until: u64,
        segment: &SegmentInfo,
        runs: Option<Vec<RunAt>>,
        bytes_max: usize,
    ) -> Result<Vec<Record>, ReadError> {
        let open = self.open_segment(segment, runs.is_none())?;
        let runs = match (runs, &open.index) {
            (Some(runs), _) => runs,
            (None, Some(index)) => index.from(slot, from, until, bytes_max),
            (None, None) => Vec::new(),
        };
        let (mut out, mut bytes) = (Vec::new(), 0);
        for run in runs {
            let mut data = vec![0; run.head.len as usize];
            let path = || segment_path(&self.options.dir, segment.number).display().to_string();
            let done = disk::read_up_to(open.file.as_ref(), &mut data, run.at).map_err(|error| unavailable(&path(), &error))?;
            data.truncate(done);
            let damaged = |invalid: Invalid| ReadError::Corrupt(format!("{} at byte {}: {invalid}", path(), run.at));
            for record in format::records(&Bytes::from(data), &run.head).map_err(damaged)? {
                if record.offset >= Offset(from) && record.offset < Offset(until) && (bytes < bytes_max || out.is_empty()) {
                    bytes += size(&record);
                    out.push(record);
                }
            }
        }
        Ok(out)
    }

    fn open_segment(&self, segment: &SegmentInfo, indexed: bool) -> Result<Arc<OpenSegment>, ReadError> {
        if let Some(open) = self.open.lock().get(segment.number)
            && (open.index.is_some() || !indexed)
        {
            return Ok(open);
        }
        let path = segment_path(&self.options.dir, segment.number);
        let name = path.display().to_string();
        let file = self.options.disk.open(&path, false).map_err(|error| unavailable(&name, &error))?;
        let index = if indexed { Some(self.index(file.as_ref(), segment, &name)?) } else { None };
        let open = Arc::new(OpenSegment { number: segment.number, file, index });
        self.open.lock().put(Arc::clone(&open));
        Ok(open)
    }

    /// The runs of a sealed segment, from its chunks' tables.
    fn index(&self, file: &dyn DiskFile, segment: &SegmentInfo, name: &str) -> Result<SegmentIndex, ReadError> {
        let mut index = SegmentIndex::default();
        let mut window = Window::new(file, segment.size);
        let mut at = SEGMENT_HEADER_BYTES as u64;
        while at < segment.end {
            let (head, runs) = match window.table(at, segment.salt).map_err(|error| unavailable(name, &error))? {
                Ok(chunk) => chunk,
                Err(invalid) => return Err(ReadError::Corrupt(format!("{name} at byte {at}: {invalid}"))),
            };
            for run in place(at, &head, &runs) {
                if let Ok(slot) = self.slot(run.head.of) {
                    index.insert(slot, run);
                }
            }
            at = align(at + u64::from(head.len), CHUNK_ALIGN);
        }
        Ok(index)
    }
}

fn unavailable(name: &str, error: &io::Error) -> ReadError {
    ReadError::Unavailable(format!("{name}: {error}"))
}

/// Where the runs of records of a chunk are.
pub(super) fn place(chunk_at: u64, head: &ChunkHead, runs: &[RunHead]) -> Vec<RunAt> {
    let mut at = chunk_at + head.table_end() as u64;
    let mut out = Vec::with_capacity(runs.len());
    for &run in runs {
        if run.kind != RunKind::Next {
            out.push(RunAt { head: run, at });
        }
        at += u64::from(run.len);
    }
    out
}

/// Reads a file from front to back in large pieces.
pub(super) struct Window<'a> {
    file: &'a dyn DiskFile,
    size: u64,
    start: u64,
    buffer: Vec<u8>,
}

impl<'a> Window<'a> {
    pub fn new(file: &'a dyn DiskFile, size: u64) -> Self {
        Self { file, size, start: 0, buffer: Vec::new() }
    }

    /// Up to `len` bytes at a position; fewer at the file's end.
    pub fn get(&mut self, at: u64, len: usize) -> io::Result<&[u8]> {
        let len = len.min(self.size.saturating_sub(at) as usize);
        let inside = at >= self.start && at + len as u64 <= self.start + self.buffer.len() as u64;
        if !inside {
            let want = len.max(WINDOW_BYTES).min(self.size.saturating_sub(at) as usize);
            self.buffer.resize(want, 0);
            let done = disk::read_up_to(self.file, &mut self.buffer, at)?;
            self.buffer.truncate(done);
            self.start = at;
        }
        let from = (at - self.start) as usize;
        Ok(&self.buffer[from.min(self.buffer.len())..(from + len).min(self.buffer.len())])
    }

    /// Header and table of the chunk at a position, checked.
    pub fn table(&mut self, at: u64, salt: u64) -> io::Result<Result<(ChunkHead, Vec<RunHead>), Invalid>> {
        let head = match format::chunk_head(self.get(at, CHUNK_HEADER_BYTES)?, salt) {
            Ok(head) => head,
            Err(invalid) => return Ok(Err(invalid)),
        };
        if at + u64::from(head.len) > self.size {
            return Ok(Err(Invalid("the chunk is longer than its file")));
        }
        Ok(format::table(self.get(at, head.table_end())?, &head).map(|runs| (head, runs)))
    }

    /// The whole chunk at a position, checked.
    pub fn chunk(&mut self, at: u64, salt: u64) -> io::Result<Result<(ChunkHead, Vec<RunHead>), Invalid>> {
        let (head, runs) = match self.table(at, salt)? {
            Ok(table) => table,
            Err(invalid) => return Ok(Err(invalid)),
        };
        let checked = format::check_data(self.get(at, head.len as usize)?, &head, &runs);
        Ok(checked.map(|()| (head, runs)))
    }
}
