//! What leaves the log: whole segments, from the old end only, so that what is left has no gap.
//!
//! A segment goes when nobody needs it any more (all of it was forgotten by `truncate_before`), when it is past its age and
//! every consumer group is past it, or when all segments together are over the size cap. Its records of
//! [`Topic::Directory`] and [`Topic::Layout`] that were not forgotten are first written again at the new end, with the offsets they have;
//! only when that is on disk does the file go. A crash in between leaves both copies, and either serves.

use std::sync::mpsc;

use crate::log::embedded::index::segment_path;
use crate::log::embedded::queue::Carry;
use crate::log::embedded::shared::Shared;
use crate::log::embedded::summary::Summary;
use crate::log::embedded::view::{View, size};
use crate::log::{Topic, TopicPartition};

/// Records carried in one commit.
const CARRY_BYTES: usize = 1024 * 1024;

/// Topics whose records stay, whatever becomes of their segment.
const fn is_kept(topic: Topic) -> bool {
    matches!(topic, Topic::Directory | Topic::Layout)
}

/// What becomes of the oldest segment.
enum Verdict {
    Stays,
    Goes {
        segment: u64,
        /// Partition slot and offsets that are written again first.
        carry: Vec<(u32, u64, u64)>,
        /// It goes although a consumer group has not committed all of it.
        forced: bool,
        /// It goes only because of the size cap.
        early: bool,
        size: u64,
    },
}

impl Shared {
    /// Removes what may go. One at a time: the caller holds the keeper's lock.
    pub fn retain(&self) -> Result<(), String> {
        let mut doomed = self.keeper.doomed.lock();
        loop {
            // A file that could not be removed comes first, or a later start would find a gap.
            while let Some(&segment) = doomed.first() {
                self.remove_files(segment)?;
                doomed.remove(0);
            }
            let verdict = self.judge(&self.view.lock());
            let Verdict::Goes { segment, carry, forced, early, size } = verdict else { return Ok(()) };
            if early && self.carries_most(&carry, size)? {
                tracing::error!("the log is over its size cap, but its old end is mostly records that stay: raise the cap");
                return Ok(());
            }
            for (slot, first, end) in carry {
                self.carry(slot, first, end)?;
            }
            if forced {
                tracing::error!(segment, "the log is over its size cap: records go that a consumer group has not committed");
            }
            {
                let mut view = self.view.lock();
                let all = self.slots().all();
                if self.kept_in(&view, &all, segment).next().is_some() {
                    return Err("records that must stay were not carried".to_owned());
                }
                view.segments.remove(&segment);
                for part in &mut view.parts {
                    part.extents.forget(segment);
                }
            }
            self.open.lock().forget(segment);
            doomed.push(segment);
        }
    }

    fn judge(&self, view: &View) -> Verdict {
        let Some((&segment, info)) = view.segments.first_key_value() else { return Verdict::Stays };
        if segment == view.active {
            return Verdict::Stays;
        }
        let all = self.slots().all();
        let carry: Vec<(u32, u64, u64)> = self.kept_in(view, &all, segment).collect();
        let (mut live, mut held) = (!carry.is_empty(), false);
        for (slot, part) in view.parts.iter().enumerate().filter(|(slot, _)| !is_kept(all[*slot].topic)) {
            let Some(end) = part.extents.within(segment).map(|(_, end)| end).max().filter(|end| *end > part.forgotten) else { continue };
            live = true;
            held |= view.committed_by_all(slot as u32, all[slot].topic) < end;
        }
        let retention = self.options.retention;
        let over = retention.bytes.is_some_and(|cap| view.segments.values().map(|info| info.size).sum::<u64>() > cap);
        let age = self.options.clock.now().0.saturating_sub(info.written_ms);
        let old = retention.age_ms.is_some_and(|cap| age > cap);
        if live && !over && (!old || held) {
            return Verdict::Stays;
        }
        Verdict::Goes { segment, carry, forced: held, early: live && !old, size: info.size }
    }

    /// Whether removing the segment would free less than half of it. Without this a directory larger than the
    /// size cap would be rewritten for ever.
    fn carries_most(&self, carry: &[(u32, u64, u64)], size_of_segment: u64) -> Result<bool, String> {
        let mut bytes = 0;
        for &(slot, first, end) in carry {
            let mut from = first;
            while from < end {
                let records = self.read_blocking(slot, from, CARRY_BYTES).map_err(|error| error.to_string())?;
                let Some(last) = records.last() else { return Err(format!("offset {from} can't be read")) };
                from = last.offset.0 + 1;
                bytes += records.iter().filter(|record| record.offset.0 < end).map(size).sum::<usize>() as u64;
            }
        }
        Ok(bytes > size_of_segment / 2)
    }

    /// The records of a segment that stay and are not forgotten: slot, first offset, end.
    fn kept_in<'a>(&self, view: &'a View, all: &'a [TopicPartition], segment: u64) -> impl Iterator<Item = (u32, u64, u64)> + 'a {
        view.parts.iter().enumerate().filter(|(slot, _)| is_kept(all[*slot].topic)).flat_map(move |(slot, part)| {
            let rest = move |(first, end): (u64, u64)| (slot as u32, first.max(part.forgotten), end);
            part.extents.within(segment).map(rest).filter(|(_, first, end)| first < end)
        })
    }

    /// Writes records again at the new end, and waits until they are durable.
    fn carry(&self, slot: u32, first: u64, end: u64) -> Result<(), String> {
        let mut from = first;
        while from < end {
            let mut records = self.read_blocking(slot, from, CARRY_BYTES).map_err(|error| error.to_string())?;
            records.retain(|record| record.offset.0 < end);
            let mut bytes = 0;
            records.retain(|record| {
                let room = bytes < CARRY_BYTES;
                bytes += size(record);
                room
            });
            let Some(last) = records.last() else { return Err(format!("offset {from} can't be read")) };
            from = last.offset.0 + 1;
            let (reply, outcome) = mpsc::channel();
            self.queue.push_carry(Carry { slot, records, reply }).map_err(|error| error.to_string())?;
            match outcome.recv() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return Err(error.to_string()),
                Err(_) => return Err("the log ended".to_owned()),
            }
        }
        Ok(())
    }

    fn remove_files(&self, segment: u64) -> Result<(), String> {
        let disk = self.options.disk.as_ref();
        for path in [Summary::path(&self.options.dir, segment), segment_path(&self.options.dir, segment)] {
            match disk.remove(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(format!("{}: {error}", path.display())),
                _ => {}
            }
        }
        disk.sync_dir(&self.options.dir).map_err(|error| format!("{}: {error}", self.options.dir.display()))
    }
}
