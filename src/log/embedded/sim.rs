//! A disk in memory that loses power, runs full and fails on command; for tests.
//!
//! It keeps what a real one keeps: bytes that were written are readable at once, but after a power loss only what was
//! synced is sure to be there; every other sector of 512 bytes, and every creation, rename and removal in a folder
//! that was not synced, survives or not as the seed says (names in their order). After a *failed* sync the bytes stay
//! readable but count as clean, as on Linux: a later sync does not write them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::log::embedded::disk::{Disk, DiskFile};

const SECTOR: usize = 512;

/// See the module. Clones are the same disk.
#[derive(Clone, Default)]
pub struct SimDisk(Arc<Mutex<Sim>>);

#[derive(Default, Clone)]
struct Sim {
    names: BTreeMap<PathBuf, u64>,
    files: BTreeMap<u64, Content>,
    durable_names: BTreeMap<PathBuf, u64>,
    /// Names as they were after each change since the folder was synced.
    changes: Vec<BTreeMap<PathBuf, u64>>,
    next: u64,
    dead: bool,
    faults: Faults,
}

#[derive(Default, Clone)]
struct Content {
    bytes: Vec<u8>,
    durable: Vec<u8>,
    dirty: BTreeSet<usize>,
}

/// What goes wrong.
#[derive(Debug, Default, Clone)]
pub struct Faults {
    /// All files together can't be longer.
    pub capacity: Option<u64>,
    /// A write takes at most so many bytes.
    pub write_max: Option<usize>,
    /// So many more writes to segments work; the next one writes half of its bytes and the one after fails.
    pub writes_left: Option<u32>,
    /// So many more syncs of segments work; every later one fails.
    pub syncs_left: Option<u32>,
    /// Reads fail.
    pub reads_fail: bool,
}

impl SimDisk {
    /// Sets what goes wrong from now on.
    pub fn set(&self, faults: Faults) {
        self.0.lock().faults = faults;
    }

    /// The power goes: this disk is dead, and what is left of it is returned.
    pub fn power_off(&self, seed: u64) -> Self {
        let mut sim = self.0.lock();
        sim.dead = true;
        let mut random = seed;
        let mut rest = Sim { next: sim.next, ..Sim::default() };
        let kept = draw(&mut random) as usize % (sim.changes.len() + 1);
        rest.names = if kept == 0 { sim.durable_names.clone() } else { sim.changes[kept - 1].clone() };
        rest.durable_names = rest.names.clone();
        // Mostly a coin for each sector, sometimes all or nothing.
        let style = draw(&mut random) % 4;
        for (&id, content) in &sim.files {
            let mut durable = content.durable.clone();
            for &sector in &content.dirty {
                let survives = style == 0 || (style != 1 && draw(&mut random).is_multiple_of(2));
                if survives {
                    copy_sector(&content.bytes, &mut durable, sector);
                }
            }
            rest.files.insert(id, Content { bytes: durable.clone(), durable, dirty: BTreeSet::new() });
        }
        Self(Arc::new(Mutex::new(rest)))
    }

    /// An independent disk with the same content.
    pub fn copy(&self) -> Self {
        let mut sim = self.0.lock().clone();
        sim.dead = false;
        sim.faults = Faults::default();
        Self(Arc::new(Mutex::new(sim)))
    }

    /// The names of all files.
    pub fn names(&self) -> Vec<PathBuf> {
        self.0.lock().names.keys().cloned().collect()
    }

    /// Changes a file behind the log's back.
    pub fn edit(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut sim = self.0.lock();
        if let Some(id) = sim.names.get(path).copied()
            && let Some(content) = sim.files.get_mut(&id)
        {
            change(&mut content.bytes);
            content.durable.clone_from(&content.bytes);
            content.dirty.clear();
        }
    }

    /// A file's bytes.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let sim = self.0.lock();
        sim.names.get(path).and_then(|id| sim.files.get(id)).map(|content| content.bytes.clone())
    }
}

fn draw(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn copy_sector(from: &[u8], to: &mut Vec<u8>, sector: usize) {
    let (start, end) = (sector * SECTOR, ((sector + 1) * SECTOR).min(from.len()));
    if start >= end {
        return;
    }
    if to.len() < end {
        to.resize(end, 0);
    }
    to[start..end].copy_from_slice(&from[start..end]);
}

fn broken() -> io::Error {
    io::Error::other("input/output error (simulated)")
}

impl Sim {
    fn alive(&self) -> io::Result<()> {
        if self.dead { Err(broken()) } else { Ok(()) }
    }

    fn renamed(&mut self) {
        self.changes.push(self.names.clone());
    }

    fn used(&self) -> u64 {
        self.names.values().filter_map(|id| self.files.get(id)).map(|content| content.bytes.len() as u64).sum()
    }

    fn room(&self, more: u64) -> io::Result<()> {
        match self.faults.capacity {
            Some(capacity) if more > 0 && self.used() + more > capacity => Err(io::ErrorKind::StorageFull.into()),
            _ => Ok(()),
        }
    }

    fn is_segment(&self, id: u64) -> bool {
        self.names.iter().any(|(path, &other)| other == id && path.extension().is_some_and(|extension| extension == "seg"))
    }

    fn content(&mut self, id: u64) -> io::Result<&mut Content> {
        self.alive()?;
        self.files.get_mut(&id).ok_or_else(broken)
    }

    fn grow(&mut self, id: u64, len: u64) -> io::Result<()> {
        let more = len.saturating_sub(self.content(id)?.bytes.len() as u64);
        self.room(more)?;
        if more > 0 {
            self.content(id)?.bytes.resize(len as usize, 0);
        }
        Ok(())
    }

    fn sync(&mut self, id: u64) -> io::Result<()> {
        self.alive()?;
        let fails = self.is_segment(id)
            && match &mut self.faults.syncs_left {
                Some(0) => true,
                Some(left) => {
                    *left -= 1;
                    false
                }
                None => false,
            };
        let Content { bytes, durable, dirty } = self.content(id)?;
        let sectors = std::mem::take(dirty);
        if fails {
            return Err(broken());
        }
        durable.resize(bytes.len(), 0);
        for sector in sectors {
            copy_sector(bytes, durable, sector);
        }
        Ok(())
    }
}

struct SimFile(Arc<Mutex<Sim>>, u64);

impl Disk for SimDisk {
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        self.0.lock().alive()
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let sim = self.0.lock();
        sim.alive()?;
        Ok(sim.names.keys().filter(|path| path.parent() == Some(dir)).cloned().collect())
    }

    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut sim = self.0.lock();
        sim.alive()?;
        let id = match sim.names.get(path) {
            Some(&id) if !create => id,
            None if !create => return Err(io::ErrorKind::NotFound.into()),
            // An open handle of the old file goes on working, unlike with a real one; nobody here relies on either.
            _ => {
                sim.next += 1;
                let id = sim.next;
                sim.files.insert(id, Content::default());
                sim.names.insert(path.to_owned(), id);
                sim.renamed();
                id
            }
        };
        Ok(Arc::new(SimFile(Arc::clone(&self.0), id)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut sim = self.0.lock();
        sim.alive()?;
        let id = sim.names.remove(from).ok_or(io::ErrorKind::NotFound)?;
        sim.names.insert(to.to_owned(), id);
        sim.renamed();
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut sim = self.0.lock();
        sim.alive()?;
        sim.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        sim.renamed();
        Ok(())
    }

    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        let mut sim = self.0.lock();
        sim.alive()?;
        sim.durable_names = sim.names.clone();
        sim.changes.clear();
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn write_at(&self, bytes: &[u8], at: u64) -> io::Result<usize> {
        let mut sim = self.0.lock();
        sim.alive()?;
        let mut len = bytes.len().min(sim.faults.write_max.unwrap_or(usize::MAX));
        if sim.is_segment(self.1) {
            match &mut sim.faults.writes_left {
                Some(0) => return Err(broken()),
                Some(left) => {
                    *left -= 1;
                    if *left == 0 {
                        len = len.div_ceil(2);
                    }
                }
                None => {}
            }
        }
        sim.grow(self.1, at + len as u64)?;
        let content = sim.content(self.1)?;
        let at = at as usize;
        content.bytes[at..at + len].copy_from_slice(&bytes[..len]);
        if len > 0 {
            content.dirty.extend(at / SECTOR..=(at + len - 1) / SECTOR);
        }
        Ok(len)
    }

    fn read_at(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let mut sim = self.0.lock();
        if sim.faults.reads_fail {
            return Err(broken());
        }
        let content = sim.content(self.1)?;
        let start = (at as usize).min(content.bytes.len());
        let len = bytes.len().min(content.bytes.len() - start);
        bytes[..len].copy_from_slice(&content.bytes[start..start + len]);
        Ok(len)
    }

    fn allocate(&self, len: u64) -> io::Result<bool> {
        self.0.lock().grow(self.1, len).map(|()| true)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.lock().sync(self.1)
    }

    fn sync_all(&self) -> io::Result<()> {
        self.0.lock().sync(self.1)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().content(self.1)?.bytes.len() as u64)
    }
}
