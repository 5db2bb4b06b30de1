//! The small files beside the segments: what the log was made with, and how far consumers are. JSON behind a
//! checksum line, always replaced as a whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::ids::Partition;
use crate::log::PartitionCounts;
use crate::log::embedded::disk::{self, Disk};
use crate::log::embedded::groups::Group;
use crate::log::embedded::options::OpenError;
use crate::log::embedded::slots::Slots;
use crate::log::embedded::view::View;
use crate::log::{Topic, TopicPartition};

/// The version of a log as it is made.
const VERSION: u32 = 1;
/// The version of one whose `inbox` has grown: those who read only the one above must not open it.
const GROWN_VERSION: u32 = 2;

/// What a log was made with.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Meta {
    version: u32,
    /// Random; in every segment.
    pub log: u64,
    /// As it was made.
    partitions: BTreeMap<String, u16>,
    /// Partitions of `inbox`, once they are more than that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inbox: Option<u16>,
}

impl Meta {
    pub fn new(log: u64, slots: &Slots) -> Self {
        let partitions = Topic::ALL.map(|topic| (topic.name().to_owned(), slots.made().of(topic)));
        let inbox = slots.is_grown().then(|| slots.of(Topic::Inbox));
        let version = if slots.is_grown() { GROWN_VERSION } else { VERSION };
        Self { version, log, partitions: BTreeMap::from(partitions), inbox }
    }

    pub fn path(dir: &Path) -> PathBuf {
        dir.join("meta")
    }

    /// The numbers that the log was made with.
    pub fn counts(&self, path: &Path) -> Result<PartitionCounts, OpenError> {
        let of = |topic: Topic| self.partitions.get(topic.name()).copied().unwrap_or(0);
        let [inbox, groups, directory, metadata] = Topic::ALL.map(of);
        let counts = PartitionCounts { inbox, groups, directory, metadata, ..PartitionCounts::default() };
        self.check(&counts, path).map(|()| counts)
    }

    /// The partitions that there are, in a log that was made with these.
    pub fn slots(&self, made: &PartitionCounts) -> Slots {
        Slots::new(*made, self.inbox.unwrap_or(made.inbox))
    }

    /// The log must have been made by this version, or an older one, with these numbers.
    pub fn check(&self, counts: &PartitionCounts, path: &Path) -> Result<(), OpenError> {
        if self.version != if self.inbox.is_some() { GROWN_VERSION } else { VERSION } {
            return Err(OpenError::damaged(path, 0, format!("version {} is not known: run the Sealpost that wrote it", self.version)));
        }
        for topic in Topic::ALL {
            let (made, asked) = (self.partitions.get(topic.name()).copied().unwrap_or(0), counts.of(topic));
            if made != asked {
                return Err(OpenError::Partitions { topic: topic.name(), made, asked });
            }
        }
        Ok(())
    }
}

/// Topic, partition, offset.
type Position = (String, u16, u64);

/// How far consumers are, and what was forgotten on purpose.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Positions {
    forgotten: Vec<Position>,
    groups: BTreeMap<String, GroupPositions>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct GroupPositions {
    topics: Vec<String>,
    committed: Vec<Position>,
}

impl Positions {
    pub fn path(dir: &Path) -> PathBuf {
        dir.join("positions")
    }

    pub fn of(view: &View, all: &[TopicPartition]) -> Self {
        let position = |slot: usize, offset| (all[slot].topic.name().to_owned(), all[slot].partition.0, offset);
        let forgotten = view.parts.iter().enumerate().filter(|(_, part)| part.forgotten > 0);
        let group = |group: &Group| GroupPositions {
            topics: Topic::ALL.iter().zip(group.topics).filter(|(_, on)| *on).map(|(topic, _)| topic.name().to_owned()).collect(),
            committed: group.committed.iter().map(|(&slot, &offset)| position(slot as usize, offset)).collect(),
        };
        Self {
            forgotten: forgotten.map(|(slot, part)| position(slot, part.forgotten)).collect(),
            groups: view.groups.iter().map(|(name, members)| (name.clone(), group(members))).collect(),
        }
    }

    pub fn apply(self, view: &mut View, slots: &Slots) {
        let slot = |topic: &str, partition: u16| {
            let topic = Topic::ALL.into_iter().find(|known| known.name() == topic)?;
            slots.slot(TopicPartition { topic, partition: Partition(partition) })
        };
        for (topic, partition, offset) in self.forgotten {
            if let Some(slot) = slot(&topic, partition) {
                let part = &mut view.parts[slot];
                part.forgotten = offset.min(part.next);
            }
        }
        for (name, positions) in self.groups {
            let group = view.groups.entry(name).or_default();
            group.topics = Topic::ALL.map(|topic| positions.topics.iter().any(|name| name == topic.name()));
            for (topic, partition, offset) in positions.committed {
                if let Some(slot) = slot(&topic, partition) {
                    group.committed.insert(slot as u32, offset);
                }
            }
        }
    }
}

/// Replaces a file.
pub(super) fn save<T: Serialize>(disk: &dyn Disk, path: &Path, content: &T) -> std::io::Result<()> {
    let json = serde_json::to_vec(content).map_err(std::io::Error::other)?;
    let mut bytes = format!("{:08x}\n", crc32c::crc32c(&json)).into_bytes();
    bytes.extend(json);
    disk::replace_file(disk, path, &bytes)
}

/// A file's content; `None` if there is no such file.
pub(super) fn load<T: DeserializeOwned>(disk: &dyn Disk, path: &Path) -> Result<Option<T>, OpenError> {
    let bytes = match disk::read_file(disk, path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(OpenError::io("read", path)(error)),
    };
    parse(&bytes, path).map(Some)
}

/// What the bytes of a file say.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8], path: &Path) -> Result<T, OpenError> {
    let json = bytes.get(9..).filter(|json| bytes[..9] == *format!("{:08x}\n", crc32c::crc32c(json)).as_bytes());
    match json.map(serde_json::from_slice) {
        Some(Ok(content)) => Ok(content),
        Some(Err(error)) => Err(OpenError::damaged(path, 9, format!("it is not what this version writes ({error})"))),
        None => Err(OpenError::damaged(path, 0, "its checksum is wrong")),
    }
}
