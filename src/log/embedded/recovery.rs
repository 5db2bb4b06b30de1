//! What a folder holds. Every chunk is checked; the end is where the last whole chunk ends.
//!
//! - An unfinished chunk at the very end is what a crash leaves. It was never acknowledged and is cut. Commits are
//!   written one after the other, each synced before the next, so there is never more than one.
//! - A whole chunk behind something that is not one, or a gap in the commit numbers: acknowledged records
//!   are missing. The log refuses to open.
//! - A whole chunk whose sync had failed or not finished may be in the page cache only. So the last chunk is written
//!   again and synced before anybody reads it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::log::TopicPartition;
use crate::log::embedded::disk::{self, DiskFile};
use crate::log::embedded::files::{self, Meta, Positions};
use crate::log::embedded::format::{self, CHUNK_ALIGN, ChunkHead, RunHead, RunKind, SEGMENT_HEADER_BYTES, SegmentHeader, align};
use crate::log::embedded::index::{SegmentIndex, SegmentInfo, segment_number, segment_path};
use crate::log::embedded::options::{FIRST_SEGMENT_BYTES, OpenError, Options};
use crate::log::embedded::reader::{Window, place};
use crate::log::embedded::slots::Slots;
use crate::log::embedded::spare::{self, Prepared};
use crate::log::embedded::summary::{Sealed, Summary};
use crate::log::embedded::view::{Part, View};
use crate::log::embedded::writer::Active;

/// What [`recover`] found, ready to go on.
pub(super) struct Recovered {
    pub log: u64,
    pub slots: Slots,
    pub view: View,
    pub active: Active,
    /// Number of the next commit.
    pub commit: u64,
    pub spare: Option<Prepared>,
    /// Segments that have no summary yet.
    pub sealed: Vec<Sealed>,
}

/// So many of the newest segments are always scanned.
const SCANNED: usize = 3;

/// Reads the folder, or makes a new log in it.
pub(super) fn recover(options: &Options) -> Result<Recovered, OpenError> {
    let mut numbers = Vec::new();
    for path in options.disk.list(&options.dir).map_err(OpenError::io("list", &options.dir))? {
        if path.extension().is_some_and(|extension| extension == "tmp") {
            options.disk.remove(&path).map_err(OpenError::io("remove", &path))?;
        } else if let Some(number) = segment_number(&path) {
            numbers.push(number);
        }
    }
    numbers.sort_unstable();
    let path = Meta::path(&options.dir);
    match files::load::<Meta>(options.disk.as_ref(), &path)? {
        Some(meta) => {
            meta.check(&options.partitions, &path)?;
            if numbers.is_empty() {
                return Err(OpenError::damaged(&options.dir, 0, "there is a meta file but no segment"));
            }
            Recovery::new(options, meta.log, meta.slots(&options.partitions)).run(&numbers)
        }
        None => create(options, &numbers),
    }
}

/// A new log. The meta file is written last, so that a crash in between starts over.
fn create(options: &Options, numbers: &[u64]) -> Result<Recovered, OpenError> {
    for &number in numbers {
        let (path, file, header) = open(options, number)?;
        if format::chunk_head(
            Window::new(file.as_ref(), header.size).get(SEGMENT_HEADER_BYTES as u64, 512).map_err(OpenError::io("read", &path))?,
            header.salt,
        )
        .is_ok()
        {
            return Err(OpenError::damaged(Meta::path(&options.dir), 0, "the file is missing"));
        }
        options.disk.remove(&path).map_err(OpenError::io("remove", &path))?;
    }
    let log = spare::salt(options.random.as_ref());
    let size = FIRST_SEGMENT_BYTES.min(options.segment_bytes);
    let header = SegmentHeader { log, number: 1, salt: spare::salt(options.random.as_ref()), size: align(size, format::PAGE) };
    let prepared =
        spare::prepare(options.disk.as_ref(), &options.dir, header, |_, _| true).map_err(OpenError::io("write to", &options.dir))?;
    let path = Meta::path(&options.dir);
    let slots = Slots::new(options.partitions, options.partitions.inbox);
    files::save(options.disk.as_ref(), &path, &Meta::new(log, &slots)).map_err(OpenError::io("write", &path))?;
    let mut view = View::empty(slots.total());
    view.active = 1;
    Ok(Recovered { log, slots, view, active: Active::fresh(prepared, 1), commit: 1, spare: None, sealed: Vec::new() })
}

fn open(options: &Options, number: u64) -> Result<(PathBuf, Arc<dyn DiskFile>, SegmentHeader), OpenError> {
    let path = segment_path(&options.dir, number);
    let file = options.disk.open(&path, false).map_err(OpenError::io("open", &path))?;
    let len = file.len().map_err(OpenError::io("read", &path))?;
    let mut bytes = vec![0; SEGMENT_HEADER_BYTES];
    let done = disk::read_up_to(file.as_ref(), &mut bytes, 0).map_err(OpenError::io("read", &path))?;
    let header = SegmentHeader::decode(&bytes[..done]).map_err(|invalid| OpenError::damaged(&path, 0, invalid.to_string()))?;
    if header.number != number {
        return Err(OpenError::damaged(&path, 24, format!("the file is named {number} but says it is {}", header.number)));
    }
    if header.size > len {
        return Err(OpenError::damaged(&path, len, format!("the file is cut off: it should have {} bytes", header.size)));
    }
    Ok((path, file, header))
}

struct Recovery<'a> {
    options: &'a Options,
    log: u64,
    slots: Slots,
    view: View,
    /// Number of the next commit; unknown before the first.
    commit: Option<u64>,
    /// Where the last chunk before was, for the refusal if something is missing behind it.
    last: (PathBuf, u64),
    sealed: Vec<Sealed>,
}

/// One segment as it was scanned.
struct Scanned {
    info: SegmentInfo,
    index: SegmentIndex,
    /// Where the last chunk starts, and its length.
    last: Option<(u64, u32)>,
}

impl<'a> Recovery<'a> {
    fn new(options: &'a Options, log: u64, slots: Slots) -> Self {
        Self { options, log, slots, view: View::empty(slots.total()), commit: None, last: (options.dir.clone(), 0), sealed: Vec::new() }
    }

    fn run(mut self, numbers: &[u64]) -> Result<Recovered, OpenError> {
        let mut active: Option<(Active, SegmentIndex)> = None;
        let mut empty: Option<Prepared> = None;
        for (index, &number) in numbers.iter().enumerate() {
            let missing = numbers[0] + index as u64;
            if number != missing {
                return Err(OpenError::damaged(segment_path(&self.options.dir, missing), 0, "the file is missing"));
            }
            let (path, file, header) = open(self.options, number)?;
            if header.log != self.log {
                return Err(OpenError::damaged(&path, 16, "the segment belongs to another log"));
            }
            let after = self.view.parts.iter().map(|part| part.next).collect();
            if index + SCANNED < numbers.len() && !self.options.check_all && self.take_summary(&path, &header)? {
                self.seal(&mut active, after);
                continue;
            }
            let scanned = self.scan(&path, file.as_ref(), &header)?;
            let Some(last) = scanned.last else {
                // Only ever one is made ahead; another would be a leftover without a record in it.
                if empty.is_none() {
                    empty = Some(Prepared { number, salt: header.salt, size: header.size, file });
                } else {
                    self.options.disk.remove(&path).map_err(OpenError::io("remove", &path))?;
                }
                continue;
            };
            if empty.is_some() {
                return Err(OpenError::damaged(
                    segment_path(&self.options.dir, number - 1),
                    SEGMENT_HEADER_BYTES as u64,
                    "its chunks are missing",
                ));
            }
            self.seal(&mut active, after);
            active = Some((Active { info: scanned.info.clone(), file, begun: true }, scanned.index));
            self.view.segments.insert(number, scanned.info);
            self.last = (path, last.0);
        }
        self.finish(active, empty)
    }

    /// What was taken for the active segment is not the last one: it gets a summary.
    fn seal(&mut self, active: &mut Option<(Active, SegmentIndex)>, after: Vec<u64>) {
        if let Some((full, _)) = active.take() {
            self.sealed.push(Sealed { info: full.info, after });
        }
    }

    fn finish(mut self, active: Option<(Active, SegmentIndex)>, empty: Option<Prepared>) -> Result<Recovered, OpenError> {
        let commit = self.commit.unwrap_or(1);
        let (active, spare) = match (active, empty) {
            (Some((active, index)), spare) => {
                self.write_last_again(active.file.as_ref(), active.info.end)?;
                self.view.active = active.info.number;
                self.view.active_index = index;
                (active, spare)
            }
            (None, Some(empty)) => {
                self.view.active = empty.number;
                (Active::fresh(empty, commit), None)
            }
            (None, None) => return Err(OpenError::damaged(&self.options.dir, 0, "there is no segment")),
        };
        let path = Positions::path(&self.options.dir);
        if let Some(positions) = files::load::<Positions>(self.options.disk.as_ref(), &path)? {
            positions.apply(&mut self.view, &self.slots);
        }
        Ok(Recovered { log: self.log, slots: self.slots, view: self.view, active, commit, spare, sealed: self.sealed })
    }

    /// Takes over what a summary says, if there is one; the summary itself is only a help.
    fn take_summary(&mut self, path: &Path, header: &SegmentHeader) -> Result<bool, OpenError> {
        let file = Summary::path(&self.options.dir, header.number);
        let summary = match files::load::<Summary>(self.options.disk.as_ref(), &file) {
            Ok(Some(summary)) => summary,
            Ok(None) | Err(OpenError::Damaged { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        let Summary { info, after, extents } = summary;
        if info.number != header.number || info.salt != header.salt || after.len() > self.view.parts.len() {
            return Ok(false);
        }
        if let Some(expected) = self.commit
            && info.first_commit != expected
        {
            let reason =
                format!("commit {expected} should follow the one here, but the next is {} in {}", info.first_commit, path.display());
            return Err(OpenError::damaged(&self.last.0, self.last.1, reason));
        }
        self.commit = Some(info.last_commit + 1);
        self.last = (path.to_owned(), info.end);
        // Partitions that were made later have nothing in it.
        for (part, next) in self.view.parts.iter_mut().zip(after) {
            part.next = next;
        }
        for (slot, first, end) in extents {
            if let Some(part) = self.view.parts.get_mut(slot as usize) {
                part.extents.insert(first, end, info.number);
            }
        }
        self.view.segments.insert(info.number, info);
        Ok(true)
    }

    fn scan(&mut self, path: &Path, file: &dyn DiskFile, header: &SegmentHeader) -> Result<Scanned, OpenError> {
        let mut at = SEGMENT_HEADER_BYTES as u64;
        let info = SegmentInfo {
            number: header.number,
            salt: header.salt,
            size: header.size,
            end: at,
            first_commit: 0,
            last_commit: 0,
            written_ms: 0,
        };
        let mut scanned = Scanned { info, index: SegmentIndex::default(), last: None };
        let mut window = Window::new(file, header.size);
        loop {
            let chunk = window.chunk(at, header.salt).map_err(OpenError::io("read", path))?;
            let (head, runs) = match chunk {
                Ok(chunk) => chunk,
                Err(invalid) => {
                    self.check_end(path, &mut window, header, at, &invalid)?;
                    return Ok(scanned);
                }
            };
            let lead = window
                .get(at + head.table_end() as u64, runs.first().map_or(0, |run| run.len as usize))
                .map_err(OpenError::io("read", path))?;
            self.apply(path, at, &head, &runs, lead, &mut scanned)?;
            scanned.last = Some((at, head.len));
            at = align(at + u64::from(head.len), CHUNK_ALIGN);
            scanned.info.end = at;
        }
    }

    /// Behind the end of a segment there must be no whole chunk.
    fn check_end(
        &self,
        path: &Path,
        window: &mut Window<'_>,
        header: &SegmentHeader,
        end: u64,
        why: &format::Invalid,
    ) -> Result<(), OpenError> {
        let mut at = end;
        let torn = window.get(end, 8).map_err(OpenError::io("read", path))?.iter().any(|&byte| byte != 0);
        loop {
            at += CHUNK_ALIGN;
            if at >= header.size {
                break;
            }
            if window.table(at, header.salt).map_err(OpenError::io("read", path))?.is_ok() {
                return Err(OpenError::damaged(path, end, format!("{why}, but there is a whole one behind it, at byte {at}")));
            }
        }
        if torn {
            tracing::warn!(path = %path.display(), position = end, "cut a commit that was not finished and never acknowledged");
        }
        Ok(())
    }

    fn apply(
        &mut self,
        path: &Path,
        at: u64,
        head: &ChunkHead,
        runs: &[RunHead],
        lead: &[u8],
        scanned: &mut Scanned,
    ) -> Result<(), OpenError> {
        let damaged = |reason: String| OpenError::damaged(path, at, reason);
        if let Some(expected) = self.commit
            && head.commit != expected
        {
            let reason = format!("commit {expected} should follow the one here, but the next is {} in {}", head.commit, path.display());
            let (file, position) = if scanned.last.is_some() { (path.to_owned(), at) } else { self.last.clone() };
            return Err(OpenError::damaged(file, position, reason));
        }
        let oldest = self.commit.is_none();
        self.commit = Some(head.commit + 1);
        if scanned.last.is_none() {
            scanned.info.first_commit = head.commit;
            let Some(run) = runs.first().filter(|run| run.kind == RunKind::Next) else {
                return Err(damaged("the segment does not start with the next offsets".to_owned()));
            };
            for (of, next) in format::nexts(lead, run).map_err(|invalid| damaged(invalid.to_string()))? {
                let part = self.part(of).ok_or_else(|| damaged(format!("there is no partition {of:?}")))?;
                if oldest {
                    part.next = next;
                } else if part.next != next {
                    return Err(damaged(format!("offset {next} of {of:?} should be next, but it is {}", part.next)));
                }
            }
        }
        scanned.info.last_commit = head.commit;
        scanned.info.written_ms = scanned.info.written_ms.max(head.written_ms);
        for run in place(at, head, runs) {
            let number = scanned.info.number;
            let RunHead { of, kind, base, count, .. } = run.head;
            let slot = self.slots.slot(of).ok_or_else(|| damaged(format!("there is no partition {of:?}")))?;
            let part = &mut self.view.parts[slot];
            let end = base + u64::from(count);
            if kind == RunKind::Carried && end > part.next {
                return Err(damaged(format!("offsets up to {end} of {of:?} were carried, but {} is next", part.next)));
            }
            if kind == RunKind::Records {
                if part.next != base {
                    return Err(damaged(format!("offset {} of {of:?} should be next, but it is {base}", part.next)));
                }
                part.next = end;
            }
            part.extents.insert(base, end, number);
            scanned.index.insert(slot as u32, run);
        }
        Ok(())
    }

    fn part(&mut self, of: TopicPartition) -> Option<&mut Part> {
        self.slots.slot(of).map(|slot| &mut self.view.parts[slot])
    }

    /// See the module.
    fn write_last_again(&self, file: &dyn DiskFile, end: u64) -> Result<(), OpenError> {
        let (path, at) = &self.last;
        let mut bytes = vec![0; (end - at) as usize];
        disk::read_up_to(file, &mut bytes, *at).map_err(OpenError::io("read", path))?;
        disk::write_all(file, &bytes, *at).and_then(|()| file.sync_data()).map_err(OpenError::io("write to", path))
    }
}
