//! Where records are: which segment holds which offsets, and where in a segment their runs are.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::log::embedded::format::RunHead;

/// Which segment holds which offsets of one partition: intervals without overlap. A later insertion wins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Extents(BTreeMap<u64, Extent>);

/// One interval: up to `end` (excluded), in this segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub end: u64,
    pub segment: u64,
}

impl Extents {
    /// The offsets `first..end` are in the segment now, wherever they were.
    pub fn insert(&mut self, first: u64, end: u64, segment: u64) {
        if first >= end {
            return;
        }
        if let Some(mut last) = self.0.last_entry() {
            if last.get().end == first && last.get().segment == segment {
                last.get_mut().end = end;
                return;
            }
            if last.get().end <= first {
                self.0.insert(first, Extent { end, segment });
                return;
            }
        }
        self.cut(first, end);
        self.0.insert(first, Extent { end, segment });
    }

    fn cut(&mut self, first: u64, end: u64) {
        if let Some((&start, extent)) = self.0.range_mut(..first).next_back()
            && extent.end > first
        {
            let rest = *extent;
            extent.end = first;
            debug_assert!(start < first, "range_mut is exclusive");
            if rest.end > end {
                self.0.insert(end, rest);
            }
        }
        while let Some((&start, &extent)) = self.0.range(first..end).next() {
            self.0.remove(&start);
            if extent.end > end {
                self.0.insert(end, extent);
            }
        }
    }

    /// The segment that holds the offset, and where the interval ends.
    pub fn find(&self, offset: u64) -> Option<Extent> {
        self.0.range(..=offset).next_back().map(|(_, &extent)| extent).filter(|extent| extent.end > offset)
    }

    /// The first offset that is anywhere.
    pub fn first(&self) -> Option<u64> {
        self.0.first_key_value().map(|(&first, _)| first)
    }

    /// The segment is no more.
    pub fn forget(&mut self, segment: u64) {
        self.0.retain(|_, extent| extent.segment != segment);
    }

    /// The intervals that are in the segment.
    pub fn within(&self, segment: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().filter(move |(_, extent)| extent.segment == segment).map(|(&first, extent)| (first, extent.end))
    }
}

/// Where one run is in its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RunAt {
    pub head: RunHead,
    /// Position of its data in the file.
    pub at: u64,
}

/// The runs of one segment by partition slot, in offset order.
#[derive(Debug, Clone, Default)]
pub(super) struct SegmentIndex(HashMap<u32, Vec<RunAt>>);

impl SegmentIndex {
    /// Adds a run.
    pub fn insert(&mut self, slot: u32, run: RunAt) {
        let runs = self.0.entry(slot).or_default();
        if runs.last().is_none_or(|last| last.head.base < run.head.base) {
            runs.push(run);
        } else {
            let at = runs.partition_point(|other| other.head.base <= run.head.base);
            runs.insert(at, run);
        }
    }

    /// The runs that hold offsets from `offset` up to `end`, as many as fit in `bytes_max` and at least one.
    pub fn from(&self, slot: u32, offset: u64, end: u64, bytes_max: usize) -> Vec<RunAt> {
        let Some(runs) = self.0.get(&slot) else { return Vec::new() };
        let holds = |run: &RunAt| run.head.base <= offset && offset < run.head.base + u64::from(run.head.count);
        let nearest = runs.partition_point(|run| run.head.base <= offset).saturating_sub(1);
        // Runs overlap only where a carry was interrupted and done again.
        let Some(start) = runs.get(nearest).filter(|run| holds(run)).map(|_| nearest).or_else(|| runs.iter().position(holds)) else {
            return Vec::new();
        };
        let mut out = Vec::new();
        let (mut expected, mut bytes) = (offset, 0);
        for run in &runs[start..] {
            let run_end = run.head.base + u64::from(run.head.count);
            if run_end <= expected {
                continue;
            }
            if run.head.base > expected || expected >= end || (bytes >= bytes_max && !out.is_empty()) {
                break;
            }
            out.push(*run);
            bytes += run.head.len as usize;
            expected = run_end;
        }
        out
    }
}

/// What is known of a segment without opening it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SegmentInfo {
    pub number: u64,
    pub salt: u64,
    /// Size of the file.
    pub size: u64,
    /// Where its last chunk ends.
    pub end: u64,
    pub first_commit: u64,
    pub last_commit: u64,
    /// When its newest chunk was written.
    pub written_ms: u64,
}

/// The file of a segment.
pub(super) fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:020}.seg"))
}

/// The number in the name of a segment's file.
pub(super) fn segment_number(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?.strip_suffix(".seg")?;
    if name.len() == 20 { name.parse().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_extents_cut_earlier_ones() {
        let mut extents = Extents::default();
        extents.insert(0, 10, 1);
        extents.insert(10, 30, 1);
        extents.insert(30, 40, 2);
        extents.insert(5, 12, 3);
        let at = |offset| extents.find(offset).map(|extent| extent.segment);
        assert_eq!(
            [at(0), at(4), at(5), at(11), at(12), at(29), at(30), at(40)],
            [Some(1), Some(1), Some(3), Some(3), Some(1), Some(1), Some(2), None]
        );
        extents.insert(0, 40, 4);
        assert_eq!(extents.within(4).collect::<Vec<_>>(), [(0, 40)]);
        extents.forget(4);
        assert_eq!(extents.first(), None);
    }

    proptest::proptest! {
        /// Against a plain map from offset to segment.
        #[test]
        fn extents_are_a_map(inserts in proptest::collection::vec((0u64..60, 0u64..20, 0u64..4), 0..40)) {
            let mut extents = Extents::default();
            let mut model = BTreeMap::new();
            for (first, count, segment) in inserts {
                extents.insert(first, first + count, segment);
                for offset in first..first + count {
                    model.insert(offset, segment);
                }
            }
            for offset in 0..90 {
                proptest::prop_assert_eq!(extents.find(offset).map(|extent| extent.segment), model.get(&offset).copied());
            }
            proptest::prop_assert_eq!(extents.first(), model.keys().next().copied());
        }
    }
}
