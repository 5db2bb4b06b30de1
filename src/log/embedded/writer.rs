//! The log thread: takes all that waits, lays it out as one chunk, writes it, syncs it, and tells everybody.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::clock::UnixMillis;
use crate::ids::Offset;
use crate::limits;
use crate::log::embedded::disk::{self, DiskFile};
use crate::log::embedded::format::{
    self, CHUNK_ALIGN, CHUNK_HEADER_BYTES, ChunkHead, NEXT_BYTES, PAGE, RECORD_HEADER_BYTES, RUN_HEADER_BYTES, RunHead, RunKind,
    SEGMENT_HEADER_BYTES, align,
};
use crate::log::embedded::index::{RunAt, SegmentInfo, segment_path};
use crate::log::embedded::queue::{Carry, Entry, Queue, Work};
use crate::log::embedded::shared::Shared;
use crate::log::embedded::spare::Prepared;
use crate::log::embedded::summary::Sealed;
use crate::log::embedded::view::{After, Published};
use crate::log::{AppendError, AppendSink, Record, TopicPartition};
use crate::metrics;

/// After so long without appends an empty chunk is written: from then on damage to the last record is told
/// apart from a write that a crash cut off.
const SEAL_AFTER: Duration = Duration::from_secs(1);
/// A commit of fewer records is no load: the next one doesn't wait for company.
const LINGER_RECORDS: usize = 32;
/// The buffer grows in such steps.
const BUFFER_STEP: usize = 256 * 1024;
/// With so much waiting, more company saves little.
const LINGER_BYTES: usize = 512 * 1024;

/// The segment that is written.
pub(super) struct Active {
    pub info: SegmentInfo,
    pub file: Arc<dyn DiskFile>,
    /// It has chunks.
    pub begun: bool,
}

impl Active {
    /// From an empty one.
    pub fn fresh(prepared: Prepared, commit: u64) -> Self {
        let info = SegmentInfo {
            number: prepared.number,
            salt: prepared.salt,
            size: prepared.size,
            end: SEGMENT_HEADER_BYTES as u64,
            first_commit: commit,
            last_commit: commit,
            written_ms: 0,
        };
        Self { info, file: prepared.file, begun: false }
    }
}

/// One partition's part of the chunk that is being made.
#[derive(Default)]
struct Filling {
    count: u32,
    len: u32,
    at: usize,
    base: u64,
    done: u64,
    records: Vec<Record>,
}

/// See the module.
pub(super) struct Writer {
    shared: Arc<Shared>,
    all: Vec<TopicPartition>,
    active: Active,
    /// Number of the next commit.
    commit: u64,
    /// Next offset of each partition.
    next: Vec<u64>,
    /// The last chunk that was written confirms the ones before; itself it is confirmed by the next.
    sealed: bool,
    /// The segment after the active one was asked for.
    spare_wanted: bool,
    // Reused from commit to commit.
    fillings: Vec<Filling>,
    touched: Vec<u32>,
    buffer: Vec<u8>,
    heads: Vec<(u32, RunHead)>,
    placed: Vec<(u32, RunAt)>,
    fresh: Vec<(u32, Vec<Record>)>,
    after: After,
    sinks: Vec<Arc<dyn AppendSink>>,
    seen: HashSet<usize, BuildHasherDefault<PointerHasher>>,
}

impl Writer {
    pub fn new(shared: Arc<Shared>, active: Active, commit: u64, next: Vec<u64>) -> Self {
        let all = shared.slots().all();
        let fillings = all.iter().map(|_| Filling::default()).collect();
        Self {
            shared,
            all,
            active,
            commit,
            next,
            sealed: true,
            spare_wanted: false,
            fillings,
            touched: Vec::new(),
            buffer: Vec::new(),
            heads: Vec::new(),
            placed: Vec::new(),
            fresh: Vec::new(),
            after: After::default(),
            sinks: Vec::new(),
            seen: HashSet::default(),
        }
    }

    /// Runs until the queue is closed or the log fails.
    pub fn run(mut self) {
        // A panic in a sink must not leave callers waiting for ever.
        let _shut = ShutOnPanic(Arc::clone(&self.shared));
        let (mut entries, mut carries, mut done) = (Vec::new(), Vec::new(), 0);
        loop {
            let patience = if self.sealed { None } else { Some(SEAL_AFTER) };
            let work = self.shared.queue.take(&mut entries, &mut carries, std::mem::take(&mut done), patience);
            self.learn();
            let started = match work {
                Work::Some => Instant::now(),
                Work::Idle => {
                    self.seal();
                    continue;
                }
                Work::Closing => {
                    self.seal();
                    self.fail_rest(AppendError::Closed);
                    return;
                }
                Work::Shut => return,
            };
            done = entries.iter().map(Queue::cost).sum();
            let count = entries.len();
            self.commit_all(&mut entries);
            entries.clear();
            for carry in carries.drain(..) {
                let outcome = self.commit_carry(&carry);
                // The keeper may have given up waiting.
                let _ = carry.reply.send(outcome);
            }
            if count >= LINGER_RECORDS {
                self.linger(started, &mut done);
            }
        }
    }

    /// Partitions that were made since; what was taken may be for them.
    fn learn(&mut self) {
        let slots = self.shared.slots();
        for slot in self.all.len()..slots.total() {
            self.all.push(slots.at(slot as u32));
            self.next.push(0);
            self.fillings.push(Filling::default());
        }
    }

    fn linger(&self, started: Instant, done: &mut usize) {
        let left = self.shared.options.linger.saturating_sub(started.elapsed());
        if left > Duration::from_micros(60) && self.shared.queue.settle(std::mem::take(done)) < LINGER_BYTES {
            // The timer itself is about 50 µs late.
            std::thread::sleep(left - Duration::from_micros(50));
        }
    }

    fn commit_all(&mut self, entries: &mut [Entry]) {
        let mut at = 0;
        while at < entries.len() {
            let taken = self.fill(&entries[at..]);
            let outcome =
                if taken == 0 { self.roll_for(entries[at].payload.len()) } else { self.commit_entries(&mut entries[at..at + taken]) };
            match outcome {
                Ok(()) => at += taken,
                Err(error) => {
                    self.clear();
                    self.tell_all(&entries[at..], &error);
                    return;
                }
            }
        }
    }

    /// Chooses how many of the entries go into the next chunk and counts them by partition; 0 if not even one has room.
    fn fill(&mut self, entries: &[Entry]) -> usize {
        self.clear();
        let room = self.active.info.size - self.active.info.end;
        let mut len = CHUNK_HEADER_BYTES + self.lead_len();
        for (index, entry) in entries.iter().enumerate() {
            let filling = &mut self.fillings[entry.slot as usize];
            let record = RECORD_HEADER_BYTES + entry.payload.len();
            let more = if filling.count == 0 { RUN_HEADER_BYTES + record } else { record };
            if (len + more) as u64 > room || (index > 0 && len + more > limits::LOG_CHUNK_BYTES) {
                return index;
            }
            if filling.count == 0 {
                self.touched.push(entry.slot);
            }
            filling.count += 1;
            filling.len += record as u32;
            len += more;
        }
        entries.len()
    }

    fn clear(&mut self) {
        for slot in self.touched.drain(..) {
            let filling = &mut self.fillings[slot as usize];
            filling.count = 0;
            filling.len = 0;
            filling.done = 0;
            filling.records.clear();
        }
    }

    fn commit_entries(&mut self, entries: &mut [Entry]) -> Result<(), AppendError> {
        let now = self.shared.options.clock.now();
        let runs = self.touched.len() + usize::from(!self.active.begun);
        let mut at = self.begin(runs);
        for &slot in &self.touched {
            let filling = &mut self.fillings[slot as usize];
            filling.at = at;
            filling.base = self.next[slot as usize];
            filling.records.reserve_exact(filling.count as usize);
            at += filling.len as usize;
        }
        self.grow(at);
        for entry in entries.iter_mut() {
            let filling = &mut self.fillings[entry.slot as usize];
            filling.at += format::put_record(&mut self.buffer[filling.at..], now, &entry.payload);
            let offset = Offset(filling.base + filling.records.len() as u64);
            filling.records.push(Record { offset, appended: now, payload: std::mem::take(&mut entry.payload) });
        }
        for index in 0..self.touched.len() {
            let slot = self.touched[index];
            let Filling { count, len, at, base, .. } = self.fillings[slot as usize];
            let crc = crc32c::crc32c(&self.buffer[at - len as usize..at]);
            self.heads.push((slot, RunHead { kind: RunKind::Records, of: self.all[slot as usize], count, base, len, crc }));
        }
        self.write(at, now)?;
        for index in 0..self.touched.len() {
            let slot = self.touched[index];
            let filling = &mut self.fillings[slot as usize];
            self.next[slot as usize] = filling.base + u64::from(filling.count);
            self.fresh.push((slot, std::mem::take(&mut filling.records)));
        }
        self.publish();
        for entry in entries.iter() {
            let filling = &mut self.fillings[entry.slot as usize];
            let offset = Offset(filling.base + filling.done);
            filling.done += 1;
            entry.sink.done(entry.token, Ok(offset));
        }
        self.flush(entries);
        Ok(())
    }

    fn commit_carry(&mut self, carry: &Carry) -> Result<(), AppendError> {
        let len: usize = carry.records.iter().map(|record| RECORD_HEADER_BYTES + record.payload.len()).sum();
        self.ensure(RUN_HEADER_BYTES + len)?;
        let now = self.shared.options.clock.now();
        let start = self.begin(1 + usize::from(!self.active.begun));
        self.grow(start + len);
        let mut at = start;
        for record in &carry.records {
            at += format::put_record(&mut self.buffer[at..], record.appended, &record.payload);
        }
        let base = carry.records.first().map_or(0, |record| record.offset.0);
        let of = self.all[carry.slot as usize];
        let crc = crc32c::crc32c(&self.buffer[start..at]);
        let head = RunHead { kind: RunKind::Carried, of, count: carry.records.len() as u32, base, len: len as u32, crc };
        self.heads.push((carry.slot, head));
        self.write(at, now)?;
        self.publish();
        Ok(())
    }

    /// An empty chunk behind the last one.
    fn seal(&mut self) {
        let room = self.active.info.size - self.active.info.end;
        if self.sealed || ((CHUNK_HEADER_BYTES + self.lead_len()) as u64) > room {
            // Without room the next segment's first chunk does the same.
            self.sealed = true;
            return;
        }
        let now = self.shared.options.clock.now();
        let at = self.begin(usize::from(!self.active.begun));
        if self.write(at, now).is_ok() {
            self.publish();
            self.sealed = true;
        }
    }

    /// Bytes that the first chunk of a segment has besides what others have.
    fn lead_len(&self) -> usize {
        if self.active.begun { 0 } else { RUN_HEADER_BYTES + self.all.len() * NEXT_BYTES }
    }

    /// Starts a chunk of so many runs: returns where the data of the first new one goes.
    fn begin(&mut self, runs: usize) -> usize {
        self.heads.clear();
        let data = CHUNK_HEADER_BYTES + runs * RUN_HEADER_BYTES;
        self.grow(data);
        if self.active.begun {
            return data;
        }
        let len = self.all.len() * NEXT_BYTES;
        self.grow(data + len);
        for (index, &of) in self.all.iter().enumerate() {
            format::put_next(&mut self.buffer[data + index * NEXT_BYTES..], of, self.next[index]);
        }
        let crc = crc32c::crc32c(&self.buffer[data..data + len]);
        let head = RunHead { kind: RunKind::Next, of: self.all[0], count: self.all.len() as u32, base: 0, len: len as u32, crc };
        self.heads.push((0, head));
        data + len
    }

    fn grow(&mut self, len: usize) {
        let padded = len + PAGE as usize;
        if self.buffer.len() < padded {
            self.buffer.resize(padded.next_multiple_of(BUFFER_STEP), 0);
        }
    }

    /// Writes and syncs the chunk in the buffer. If that fails nobody knows what is on disk, so the log is poisoned.
    fn write(&mut self, len: usize, now: UnixMillis) -> Result<(), AppendError> {
        let info = &mut self.active.info;
        let mut data = CHUNK_HEADER_BYTES + self.heads.len() * RUN_HEADER_BYTES;
        self.placed.clear();
        for (index, (slot, head)) in self.heads.iter().enumerate() {
            format::put_run(&mut self.buffer[CHUNK_HEADER_BYTES + index * RUN_HEADER_BYTES..], head);
            if head.kind != RunKind::Next {
                self.placed.push((*slot, RunAt { head: *head, at: info.end + data as u64 }));
            }
            data += head.len as usize;
        }
        let head = ChunkHead { commit: self.commit, written_ms: now.0, len: len as u32, runs: self.heads.len() as u32 };
        format::put_chunk_head(&mut self.buffer, info.salt, &head);
        let end = info.end + len as u64;
        let padded = (align(end, PAGE).min(info.size) - info.end) as usize;
        self.buffer[len..padded].fill(0);
        let started = Instant::now();
        let written =
            disk::write_all(self.active.file.as_ref(), &self.buffer[..padded], info.end).and_then(|()| self.active.file.sync_data());
        if let Err(error) = written {
            return Err(self.poison(&error));
        }
        if !self.active.begun {
            info.first_commit = self.commit;
            self.active.begun = true;
        }
        info.end = align(end, CHUNK_ALIGN);
        info.last_commit = self.commit;
        info.written_ms = info.written_ms.max(now.0);
        self.commit += 1;
        self.sealed = false;
        self.shared.spare.used(info.end, info.size);
        if !self.spare_wanted && info.end >= info.size / 4 {
            self.spare_wanted = true;
            self.shared.spare.want(info.number + 1, self.shared.next_size(info.size));
        }
        self.shared.committed(self.heads.iter().map(|(_, head)| u64::from(head.count)).sum(), padded as u64, started.elapsed());
        Ok(())
    }

    fn publish(&mut self) {
        let (segment, runs) = (self.active.info.clone(), &self.placed);
        let commit = Published { segment, runs, records: &mut self.fresh, after: &mut self.after };
        self.shared.view.lock().publish(commit, self.shared.options.tail_bytes);
        self.after.run();
    }

    fn poison(&mut self, error: &io::Error) -> AppendError {
        let path = segment_path(&self.shared.options.dir, self.active.info.number);
        metrics::observe_log_failure();
        tracing::error!(%error, path = %path.display(), "the log failed to write or sync; it takes no more until a restart");
        let error = AppendError::Poisoned(format!("{}: {error}", path.display()));
        self.fail_rest(error.clone());
        error
    }

    /// Shuts the queue and tells everybody in it.
    fn fail_rest(&mut self, error: AppendError) {
        let (entries, carries) = self.shared.queue.shut(error.clone());
        self.tell_all(&entries, &error);
        for carry in carries {
            // As above.
            let _ = carry.reply.send(Err(error.clone()));
        }
    }

    fn tell_all(&mut self, entries: &[Entry], error: &AppendError) {
        for entry in entries {
            entry.sink.done(entry.token, Err(error.clone()));
        }
        self.flush(entries);
    }

    /// Once for each distinct sink.
    fn flush(&mut self, entries: &[Entry]) {
        let mut last = 0;
        for entry in entries {
            let pointer = Arc::as_ptr(&entry.sink).cast::<()>() as usize;
            if pointer != last && self.seen.insert(pointer) {
                self.sinks.push(Arc::clone(&entry.sink));
            }
            last = pointer;
        }
        self.seen.clear();
        for sink in self.sinks.drain(..) {
            sink.flush();
        }
    }

    /// Takes the next segment unless the present one has room for a chunk with so many bytes of runs.
    fn ensure(&mut self, runs_len: usize) -> Result<(), AppendError> {
        let room = self.active.info.size - self.active.info.end;
        if (CHUNK_HEADER_BYTES + self.lead_len() + runs_len) as u64 <= room { Ok(()) } else { self.roll(runs_len) }
    }

    fn roll_for(&mut self, payload: usize) -> Result<(), AppendError> {
        self.roll(RUN_HEADER_BYTES + RECORD_HEADER_BYTES + payload)
    }

    /// Goes on in the next segment. Nothing was written if this fails: the log goes on, as far as there is room.
    fn roll(&mut self, runs_len: usize) -> Result<(), AppendError> {
        let lead = RUN_HEADER_BYTES + self.all.len() * NEXT_BYTES;
        let need = SEGMENT_HEADER_BYTES + CHUNK_HEADER_BYTES + lead + runs_len;
        // A segment without chunks that is too small is made again under its own number.
        let number = if self.active.begun { self.active.info.number + 1 } else { self.active.info.number };
        let size = self.shared.next_size(self.active.info.size);
        match self.shared.spare.take(number, size, need as u64) {
            Ok(prepared) => {
                self.shared.set_unavailable(None);
                self.spare_wanted = false;
                let full = std::mem::replace(&mut self.active, Active::fresh(prepared, self.commit));
                if full.begun {
                    self.shared.keeper.sealed.lock().push(Sealed { info: full.info, after: self.next.clone() });
                    self.shared.keeper.nudge();
                }
                Ok(())
            }
            Err(reason) => {
                let error = AppendError::Unavailable(reason);
                self.shared.set_unavailable(Some((error.clone(), number, size)));
                Err(error)
            }
        }
    }
}

struct ShutOnPanic(Arc<Shared>);

impl Drop for ShutOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let error = AppendError::Poisoned("the log thread panicked, which is a bug".to_owned());
            let (entries, _carries) = self.0.queue.shut(error.clone());
            for entry in entries {
                entry.sink.done(entry.token, Err(error.clone()));
                entry.sink.flush();
            }
        }
    }
}

/// For pointers: one multiplication.
#[derive(Default)]
struct PointerHasher(u64);

impl Hasher for PointerHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_usize(usize::from(byte));
        }
    }

    fn write_usize(&mut self, value: usize) {
        self.0 = (self.0 ^ value as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(26);
    }
}
