//! What readers see: bounds, the recent records in memory, where older ones are, and the consumer groups.
//! One mutex, held for short: the log thread publishes a commit under it, consumers collect under it.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use tokio::sync::Notify;

use crate::ids::Offset;
use crate::limits;
use crate::log::embedded::format::RECORD_HEADER_BYTES;
use crate::log::embedded::groups::{Group, MemberId};
use crate::log::embedded::index::{Extents, RunAt, SegmentIndex, SegmentInfo};
use crate::log::{ReadError, Record, Topic};

/// Records of one partition of one commit, as they were appended.
pub(super) type Run = Arc<Vec<Record>>;

/// What a record costs in memory besides its payload.
const RECORD_COST: usize = 64;

/// What a record counts against the bytes that a reader asks for: empty ones count, too.
pub(super) fn size(record: &Record) -> usize {
    record.payload.len() + RECORD_HEADER_BYTES
}

/// One partition.
#[derive(Default)]
pub(super) struct Part {
    /// Everything before was forgotten by `truncate_before`.
    pub forgotten: u64,
    /// The offset of the next record.
    pub next: u64,
    /// Which segments hold its records.
    pub extents: Extents,
    /// The newest records, without holes, up to `next`.
    tail: VecDeque<Run>,
}

impl Part {
    /// The first offset that can be read.
    pub fn earliest(&self) -> u64 {
        self.extents.first().unwrap_or(self.next).max(self.forgotten)
    }

    /// The first offset that is in memory.
    fn tail_first(&self) -> u64 {
        self.tail.front().and_then(|run| run.first()).map_or(self.next, |record| record.offset.0)
    }

    /// Runs of the tail with offsets from `from` on, worth up to about `bytes_max`; `None` if it is older than the tail.
    fn in_memory(&self, from: u64, bytes_max: usize) -> Option<Vec<Run>> {
        if from < self.tail_first() {
            return None;
        }
        let start = self.tail.partition_point(|run| run.last().is_some_and(|record| record.offset.0 < from));
        let mut bytes = 0;
        let enough = |run: &&Run| {
            let more = bytes < bytes_max;
            bytes += run.iter().map(size).sum::<usize>();
            more
        };
        Some(self.tail.range(start..).take_while(enough).cloned().collect())
    }
}

/// Where to get records.
pub(super) enum Source {
    /// From memory.
    Memory(Vec<Run>),
    /// From a segment's file. The runs are known if it is the active one.
    Disk { segment: SegmentInfo, until: u64, runs: Option<Vec<RunAt>> },
    /// There are none yet.
    End,
}

/// One commit, as the log thread hands it over.
pub(super) struct Published<'a> {
    /// The active segment with this commit.
    pub segment: SegmentInfo,
    /// Its runs by partition slot.
    pub runs: &'a [(u32, RunAt)],
    /// New records for the tail, by partition slot.
    pub records: &'a mut Vec<(u32, Vec<Record>)>,
    /// What is to be done after the lock.
    pub after: &'a mut After,
}

/// What a commit leaves to do when the view's lock is free again.
#[derive(Default)]
pub(super) struct After {
    /// Runs that need not be in memory any more.
    evicted: Vec<Run>,
    /// Consumers that have something to read, each once.
    wake: Vec<Arc<Notify>>,
}

impl After {
    /// Wakes, and lets go.
    pub fn run(&mut self) {
        for wake in self.wake.drain(..) {
            wake.notify_one();
        }
        self.evicted.clear();
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct View {
    pub parts: Vec<Part>,
    /// All segments that hold chunks.
    pub segments: BTreeMap<u64, SegmentInfo>,
    /// The one that is written.
    pub active: u64,
    pub active_index: SegmentIndex,
    pub groups: BTreeMap<String, Group>,
    pub next_member: MemberId,
    /// Committed positions or forgotten offsets that are not in the positions file.
    pub positions_dirty: bool,
    pub closed: bool,
    /// Which partition each run of a tail belongs to, oldest first, and its cost.
    order: VecDeque<(u32, usize)>,
    tail_bytes: usize,
}

impl View {
    /// With so many partitions and nothing else.
    pub fn empty(parts: usize) -> Self {
        Self { parts: (0..parts).map(|_| Part::default()).collect(), ..Self::default() }
    }

    /// Adds a commit that is durable.
    pub fn publish(&mut self, commit: Published<'_>, tail_bytes_max: usize) {
        let number = commit.segment.number;
        if number != self.active {
            self.active = number;
            self.active_index = SegmentIndex::default();
        }
        self.segments.insert(number, commit.segment);
        for &(slot, run) in commit.runs {
            let part = &mut self.parts[slot as usize];
            let end = run.head.base + u64::from(run.head.count);
            part.extents.insert(run.head.base, end, number);
            part.next = part.next.max(end);
            self.active_index.insert(slot, run);
        }
        for (slot, records) in commit.records.drain(..) {
            let cost = records.iter().map(|record| record.payload.len() + RECORD_COST).sum();
            self.parts[slot as usize].tail.push_back(Arc::new(records));
            self.order.push_back((slot, cost));
            self.tail_bytes += cost;
        }
        let After { evicted, wake } = commit.after;
        self.evict(tail_bytes_max, evicted);
        for group in self.groups.values() {
            for waker in commit.runs.iter().filter_map(|&(slot, _)| group.waker(slot)) {
                if !wake.iter().any(|other| Arc::ptr_eq(other, waker)) {
                    wake.push(Arc::clone(waker));
                }
            }
        }
    }

    /// Oldest first: what is past the cap goes; what every group was given stays only a little while.
    fn evict(&mut self, tail_bytes_max: usize, evicted: &mut Vec<Run>) {
        while let Some(&(slot, cost)) = self.order.front() {
            let part = &mut self.parts[slot as usize];
            let end = part.tail.front().and_then(|run| run.last()).map_or(0, |record| record.offset.0 + 1);
            let delivered = || self.groups.values().filter_map(|group| group.slots.get(&slot)).all(|slot| slot.position >= Some(end));
            if self.tail_bytes <= tail_bytes_max && (self.tail_bytes <= limits::LOG_TAIL_KEPT_BYTES || !delivered()) {
                break;
            }
            evicted.extend(part.tail.pop_front());
            self.order.pop_front();
            self.tail_bytes -= cost;
        }
    }

    /// Where records of a partition from `from` on are.
    pub fn source(&self, slot: u32, from: u64, bytes_max: usize) -> Result<Source, ReadError> {
        if self.closed {
            return Err(ReadError::Closed);
        }
        let part = &self.parts[slot as usize];
        let earliest = part.earliest();
        if from < earliest {
            return Err(ReadError::Gone { asked: Offset(from), earliest: Offset(earliest) });
        }
        if from > part.next {
            return Err(past_the_end(from, part.next));
        }
        if from == part.next {
            return Ok(Source::End);
        }
        if let Some(runs) = part.in_memory(from, bytes_max) {
            return Ok(Source::Memory(runs));
        }
        let missing = || ReadError::Corrupt(format!("offset {from} is in no segment"));
        let extent = part.extents.find(from).ok_or_else(missing)?;
        let segment = self.segments.get(&extent.segment).cloned().ok_or_else(missing)?;
        let runs = (extent.segment == self.active).then(|| self.active_index.from(slot, from, extent.end, bytes_max));
        Ok(Source::Disk { segment, until: extent.end, runs })
    }

    /// Up to where every group that ever asked for the topic has committed the partition.
    pub fn committed_by_all(&self, slot: u32, topic: Topic) -> u64 {
        let of = Topic::ALL.iter().position(|&other| other == topic).unwrap_or(0);
        let groups = self.groups.values().filter(|group| group.topics[of]);
        groups.map(|group| group.committed.get(&slot).copied().unwrap_or(0)).min().unwrap_or(u64::MAX)
    }

    /// Ends every consumer.
    pub fn close(&mut self) {
        self.closed = true;
        for member in self.groups.values().flat_map(|group| group.members.values()) {
            member.wake.notify_one();
        }
    }
}

/// A position behind the last record: something refers to records that this log does not have.
pub(super) fn past_the_end(asked: u64, end: u64) -> ReadError {
    ReadError::Corrupt(format!("position {asked} is past the end, {end}: what refers to it is newer than this log"))
}

/// Copies records (not their payloads) out of runs: from an offset on, up to about `bytes_max` and at least one.
pub(super) fn collect(runs: &[Run], from: u64, bytes_max: usize) -> Vec<Record> {
    let mut out = Vec::with_capacity(runs.iter().map(|run| run.len()).sum());
    let mut bytes = 0;
    for run in runs {
        let start = run.partition_point(|record| record.offset.0 < from);
        for record in &run[start..] {
            if bytes >= bytes_max && !out.is_empty() {
                return out;
            }
            bytes += size(record);
            out.push(record.clone());
        }
    }
    out
}
