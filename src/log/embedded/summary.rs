//! What a start has to know of a sealed segment, in a small file beside it, so that not all of the log is read
//! at every start. Without it the segment is scanned; a damaged one is scanned as well.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::log::embedded::files;
use crate::log::embedded::index::SegmentInfo;
use crate::log::embedded::shared::Shared;

/// See the module.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Summary {
    pub info: SegmentInfo,
    /// The next offset of each partition slot behind it.
    pub after: Vec<u64>,
    /// Partition slot, first offset, end.
    pub extents: Vec<(u32, u64, u64)>,
}

/// A segment that is full, as the log thread leaves it.
pub(super) struct Sealed {
    pub info: SegmentInfo,
    pub after: Vec<u64>,
}

impl Summary {
    pub fn path(dir: &Path, segment: u64) -> PathBuf {
        dir.join(format!("{segment:020}.sum"))
    }
}

impl Shared {
    /// Writes the summaries of segments that were sealed since.
    pub fn summarize(&self) -> std::io::Result<()> {
        loop {
            let Some(Sealed { info, after }) = self.keeper.sealed.lock().pop() else { return Ok(()) };
            let extents = {
                let view = self.view.lock();
                if !view.segments.contains_key(&info.number) {
                    continue;
                }
                let of = |(slot, part): (usize, &super::view::Part)| {
                    part.extents.within(info.number).map(|(first, end)| (slot as u32, first, end)).collect::<Vec<_>>()
                };
                view.parts.iter().enumerate().flat_map(of).collect()
            };
            let path = Summary::path(&self.options.dir, info.number);
            // If this fails the next start scans the segment.
            files::save(self.options.disk.as_ref(), &path, &Summary { info, after, extents })?;
        }
    }
}
