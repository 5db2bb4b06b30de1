//! The bytes on disk: pure functions, no I/O, so that they can be fuzzed.
//!
//! All integers are little endian.
//!
//! ```text
//! segment file    = header (4,096 bytes), then chunks, each starting at a multiple of 512, then anything
//! segment header  = "SPLOGSEG" version:u32 crc:u32 log:u64 number:u64 salt:u64 size:u64, zeros
//! chunk           = header (48 bytes), table (24 bytes a run), data of each run
//! chunk header    = magic:u32 crc:u32 salt:u64 commit:u64 written_ms:u64 len:u32 runs:u32 zeros:u64
//! run in table    = kind:u8 topic:u8 partition:u16 count:u32 base:u64 len:u32 crc:u32
//! record in run   = len:u32 appended_ms:u64 payload
//! next in run     = topic:u8 zero:u8 partition:u16 offset:u64      (kind 2: the next offset of each partition)
//! ```
//!
//! `crc` is CRC32C: a chunk's covers its header from `salt` on and its table; the table holds the CRC of each
//! run's data, so that one run can be read and checked without the rest. `salt` is random for each segment: bytes of
//! another life of the file, or a payload that imitates a chunk, are never taken for one. `commit` grows by one
//! from chunk to chunk, across segments, so that a missing chunk is noticed.

use bytes::Bytes;

use crate::clock::UnixMillis;
use crate::ids::{Offset, Partition};
use crate::log::{Record, Topic, TopicPartition};

/// First bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"SPLOGSEG";
/// The format's version; another one is refused.
pub const VERSION: u32 = 1;
/// Where the first chunk of a segment starts.
pub const SEGMENT_HEADER_BYTES: usize = 4096;
/// First bytes of a chunk.
pub const CHUNK_MAGIC: u32 = u32::from_le_bytes(*b"SPC1");
/// Size of a chunk's header.
pub const CHUNK_HEADER_BYTES: usize = 48;
/// Size of one run's entry in a chunk's table.
pub const RUN_HEADER_BYTES: usize = 24;
/// What a record costs besides its payload.
pub const RECORD_HEADER_BYTES: usize = 12;
/// Size of one entry of a run of next offsets.
pub const NEXT_BYTES: usize = 12;
/// Chunks start at multiples of this: no sector of an acknowledged chunk is written again by a later one.
pub const CHUNK_ALIGN: u64 = 512;
/// Writes end at multiples of this, so that the page cache never reads a page in order to change a part of it.
pub const PAGE: u64 = 4096;

/// Why bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub &'static str);

/// What a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// The log it belongs to.
    pub log: u64,
    /// Its number; the file is named by it.
    pub number: u64,
    /// Random; chunks repeat it.
    pub salt: u64,
    /// Size of the file.
    pub size: u64,
}

impl SegmentHeader {
    /// Its bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![0; SEGMENT_HEADER_BYTES];
        out[..8].copy_from_slice(&SEGMENT_MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        for (at, value) in [(16, self.log), (24, self.number), (32, self.salt), (40, self.size)] {
            out[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32c::crc32c(&out[16..]);
        out[12..16].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// From the first [`SEGMENT_HEADER_BYTES`] of a file.
    pub fn decode(bytes: &[u8]) -> Result<Self, Invalid> {
        let bytes = bytes.get(..SEGMENT_HEADER_BYTES).ok_or(Invalid("the segment's header is cut off"))?;
        if bytes[..8] != SEGMENT_MAGIC {
            return Err(Invalid("this is not a segment of the log"));
        }
        if u32_at(bytes, 8) != VERSION {
            return Err(Invalid("the segment was written by another version of Sealpost: run that version"));
        }
        if crc32c::crc32c(&bytes[16..]) != u32_at(bytes, 12) {
            return Err(Invalid("the segment's header is damaged"));
        }
        Ok(Self { log: u64_at(bytes, 16), number: u64_at(bytes, 24), salt: u64_at(bytes, 32), size: u64_at(bytes, 40) })
    }
}

/// What a run holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunKind {
    /// New records of one partition.
    Records,
    /// Records rewritten from a segment that is about to go, with the offsets they had.
    Carried,
    /// The next offset of every partition; first in each segment.
    Next,
}

/// One entry of a chunk's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunHead {
    /// What it holds.
    pub kind: RunKind,
    /// Whose records.
    pub of: TopicPartition,
    /// How many.
    pub count: u32,
    /// Offset of the first.
    pub base: u64,
    /// Bytes of its data.
    pub len: u32,
    /// CRC32C of its data.
    pub crc: u32,
}

/// A chunk's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHead {
    /// Number of the commit.
    pub commit: u64,
    /// When it was written.
    pub written_ms: u64,
    /// Bytes of all of it, without padding.
    pub len: u32,
    /// How many runs.
    pub runs: u32,
}

impl ChunkHead {
    /// Where the table ends and the data of the first run starts.
    pub fn table_end(&self) -> usize {
        CHUNK_HEADER_BYTES + self.runs as usize * RUN_HEADER_BYTES
    }
}

/// A topic's number on disk.
pub const fn topic_number(topic: Topic) -> u8 {
    match topic {
        Topic::Inbox => 0,
        Topic::Groups => 1,
        Topic::Directory => 2,
        Topic::Metadata => 3,
        Topic::Layout => 4,
        // Never on disk.
        Topic::Push => 255,
    }
}

fn topic_of(number: u8) -> Result<Topic, Invalid> {
    // Those that every log has first, then what came later: numbers never change.
    Topic::ALL.into_iter().chain([Topic::Layout]).nth(usize::from(number)).ok_or(Invalid("a run names an unknown topic"))
}

/// CRC32C.
pub fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(bytes)
}

/// The next multiple of `to`, a power of two.
pub const fn align(at: u64, to: u64) -> u64 {
    (at + to - 1) & !(to - 1)
}

/// Writes a run's entry at its place in the table.
pub fn put_run(out: &mut [u8], run: &RunHead) {
    out[0] = match run.kind {
        RunKind::Records => 0,
        RunKind::Carried => 1,
        RunKind::Next => 2,
    };
    out[1] = topic_number(run.of.topic);
    out[2..4].copy_from_slice(&run.of.partition.0.to_le_bytes());
    out[4..8].copy_from_slice(&run.count.to_le_bytes());
    out[8..16].copy_from_slice(&run.base.to_le_bytes());
    out[16..20].copy_from_slice(&run.len.to_le_bytes());
    out[20..24].copy_from_slice(&run.crc.to_le_bytes());
}

/// Writes a chunk's header; the table must stand behind it already.
pub fn put_chunk_head(out: &mut [u8], salt: u64, head: &ChunkHead) {
    out[..4].copy_from_slice(&CHUNK_MAGIC.to_le_bytes());
    out[8..16].copy_from_slice(&salt.to_le_bytes());
    out[16..24].copy_from_slice(&head.commit.to_le_bytes());
    out[24..32].copy_from_slice(&head.written_ms.to_le_bytes());
    out[32..36].copy_from_slice(&head.len.to_le_bytes());
    out[36..40].copy_from_slice(&head.runs.to_le_bytes());
    out[40..48].fill(0);
    let crc = crc32c::crc32c(&out[8..head.table_end()]);
    out[4..8].copy_from_slice(&crc.to_le_bytes());
}

/// Writes a record and returns how many bytes it took.
pub fn put_record(out: &mut [u8], appended: UnixMillis, payload: &[u8]) -> usize {
    out[..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    out[4..12].copy_from_slice(&appended.0.to_le_bytes());
    let end = RECORD_HEADER_BYTES + payload.len();
    out[RECORD_HEADER_BYTES..end].copy_from_slice(payload);
    end
}

/// Writes an entry of a run of next offsets.
pub fn put_next(out: &mut [u8], of: TopicPartition, next: u64) {
    out[0] = topic_number(of.topic);
    out[1] = 0;
    out[2..4].copy_from_slice(&of.partition.0.to_le_bytes());
    out[4..12].copy_from_slice(&next.to_le_bytes());
}

/// The header of a chunk of this segment, its CRC not checked yet: it says how much to read for [`table`].
pub fn chunk_head(bytes: &[u8], salt: u64) -> Result<ChunkHead, Invalid> {
    let bytes = bytes.get(..CHUNK_HEADER_BYTES).ok_or(Invalid("the chunk's header is cut off"))?;
    if u32_at(bytes, 0) != CHUNK_MAGIC {
        return Err(Invalid("there is no chunk"));
    }
    if u64_at(bytes, 8) != salt {
        return Err(Invalid("the chunk belongs to another segment"));
    }
    let head = ChunkHead { commit: u64_at(bytes, 16), written_ms: u64_at(bytes, 24), len: u32_at(bytes, 32), runs: u32_at(bytes, 36) };
    let table_end = CHUNK_HEADER_BYTES as u64 + u64::from(head.runs) * RUN_HEADER_BYTES as u64;
    if table_end > u64::from(head.len) {
        return Err(Invalid("the chunk's table is longer than the chunk"));
    }
    Ok(head)
}

/// The table of a chunk, from bytes up to [`ChunkHead::table_end`] at least; checks header and table.
pub fn table(bytes: &[u8], head: &ChunkHead) -> Result<Vec<RunHead>, Invalid> {
    let bytes = bytes.get(..head.table_end()).ok_or(Invalid("the chunk's table is cut off"))?;
    if crc32c::crc32c(&bytes[8..]) != u32_at(bytes, 4) {
        return Err(Invalid("the chunk's header is damaged"));
    }
    let mut data = 0u64;
    let mut runs = Vec::with_capacity(head.runs as usize);
    for entry in bytes[CHUNK_HEADER_BYTES..].chunks_exact(RUN_HEADER_BYTES) {
        let run = run_head(entry)?;
        data += u64::from(run.len);
        runs.push(run);
    }
    if head.table_end() as u64 + data != u64::from(head.len) {
        return Err(Invalid("the chunk's length is not that of its runs"));
    }
    Ok(runs)
}

fn run_head(entry: &[u8]) -> Result<RunHead, Invalid> {
    let kind = match entry[0] {
        0 => RunKind::Records,
        1 => RunKind::Carried,
        2 => RunKind::Next,
        _ => return Err(Invalid("a run is of an unknown kind")),
    };
    let of = TopicPartition { topic: topic_of(entry[1])?, partition: Partition(u16_at(entry, 2)) };
    let run = RunHead { kind, of, count: u32_at(entry, 4), base: u64_at(entry, 8), len: u32_at(entry, 16), crc: u32_at(entry, 20) };
    if run.base.checked_add(u64::from(run.count)).is_none() {
        return Err(Invalid("a run's offsets overflow"));
    }
    Ok(run)
}

/// Checks the data of each run of a whole chunk.
pub fn check_data(chunk: &[u8], head: &ChunkHead, runs: &[RunHead]) -> Result<(), Invalid> {
    let mut at = head.table_end();
    for run in runs {
        let data = chunk.get(at..at + run.len as usize).ok_or(Invalid("the chunk is cut off"))?;
        if crc32c::crc32c(data) != run.crc {
            return Err(Invalid("the chunk's records are damaged"));
        }
        at += data.len();
    }
    Ok(())
}

/// The records of a run from its data, which is checked first; payloads are slices of `data`.
pub fn records(data: &Bytes, run: &RunHead) -> Result<Vec<Record>, Invalid> {
    if data.len() != run.len as usize || crc32c::crc32c(data) != run.crc {
        return Err(Invalid("the run's records are damaged"));
    }
    let count = run.count as usize;
    if count > data.len() / RECORD_HEADER_BYTES {
        return Err(Invalid("a run has fewer records than it says"));
    }
    let mut out = Vec::with_capacity(count);
    let mut at = 0;
    for index in 0..count {
        let head = data.get(at..at + RECORD_HEADER_BYTES).ok_or(Invalid("a record is cut off"))?;
        let (len, appended) = (u32_at(head, 0) as usize, UnixMillis(u64_at(head, 4)));
        at += RECORD_HEADER_BYTES;
        if data.len() - at < len {
            return Err(Invalid("a record is cut off"));
        }
        out.push(Record { offset: Offset(run.base + index as u64), appended, payload: data.slice(at..at + len) });
        at += len;
    }
    if at == data.len() { Ok(out) } else { Err(Invalid("bytes behind the last record of a run")) }
}

/// The next offsets in a run of that kind.
pub fn nexts(data: &[u8], run: &RunHead) -> Result<Vec<(TopicPartition, u64)>, Invalid> {
    if data.len() != run.len as usize || data.len() != run.count as usize * NEXT_BYTES {
        return Err(Invalid("a run of next offsets has a wrong length"));
    }
    data.chunks_exact(NEXT_BYTES)
        .map(|entry| {
            let of = TopicPartition { topic: topic_of(entry[0])?, partition: Partition(u16_at(entry, 2)) };
            Ok((of, u64_at(entry, 4)))
        })
        .collect()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const OF: TopicPartition = TopicPartition { topic: Topic::Directory, partition: Partition(3) };

    /// One chunk with a run of next offsets and a run of records.
    fn chunk(salt: u64, payloads: &[Vec<u8>]) -> Vec<u8> {
        let data: usize = payloads.iter().map(|payload| payload.len() + RECORD_HEADER_BYTES).sum();
        let start = CHUNK_HEADER_BYTES + 2 * RUN_HEADER_BYTES;
        let mut out = vec![0; start + NEXT_BYTES + data];
        put_next(&mut out[start..], OF, 41);
        let mut at = start + NEXT_BYTES;
        for payload in payloads {
            at += put_record(&mut out[at..], UnixMillis(1_700_000_000_000), payload);
        }
        let next = RunHead {
            kind: RunKind::Next,
            of: OF,
            count: 1,
            base: 0,
            len: NEXT_BYTES as u32,
            crc: crc32c::crc32c(&out[start..start + NEXT_BYTES]),
        };
        let crc = crc32c::crc32c(&out[start + NEXT_BYTES..]);
        let records = RunHead { kind: RunKind::Records, of: OF, count: payloads.len() as u32, base: 41, len: data as u32, crc };
        put_run(&mut out[CHUNK_HEADER_BYTES..], &next);
        put_run(&mut out[CHUNK_HEADER_BYTES + RUN_HEADER_BYTES..], &records);
        let head = ChunkHead { commit: 7, written_ms: 8, len: out.len() as u32, runs: 2 };
        put_chunk_head(&mut out, salt, &head);
        out
    }

    fn parse(bytes: &[u8], salt: u64) -> Result<Vec<Record>, Invalid> {
        let head = chunk_head(bytes, salt)?;
        let runs = table(bytes, &head)?;
        check_data(bytes, &head, &runs)?;
        let mut at = head.table_end();
        let mut out = Vec::new();
        for run in &runs {
            let data = Bytes::copy_from_slice(&bytes[at..at + run.len as usize]);
            at += data.len();
            match run.kind {
                RunKind::Next => assert_eq!(nexts(&data, run)?, [(OF, 41)]),
                RunKind::Records | RunKind::Carried => out.extend(records(&data, run)?),
            }
        }
        Ok(out)
    }

    /// Golden bytes: a change here makes every existing log unreadable.
    #[test]
    fn bytes_are_fixed() {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let expected = GOLDEN.iter().map(|line| line.replace(' ', "")).collect::<String>();
        assert_eq!(hex(&chunk(0x0102_0304_0506_0708, &[b"one".to_vec(), vec![]])), expected);
        let header = SegmentHeader { log: 1, number: 2, salt: 3, size: 4096 }.encode();
        assert_eq!(hex(&header[..48]), GOLDEN_SEGMENT);
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283, "CRC32C's own check value");
    }
    const GOLDEN: [&str; 5] = [
        "53504331 029c0ced 08070605 04030201 07000000 00000000 08000000 00000000 87000000 02000000 00000000 00000000",
        "02020300 01000000 00000000 00000000 0c000000 47fb9217",
        "00020300 02000000 29000000 00000000 1b000000 23652d5c",
        "02000300 29000000 00000000",
        "03000000 0068e5cf 8b010000 6f6e6500 00000000 68e5cf8b 010000",
    ];
    const GOLDEN_SEGMENT: &str = "53504c4f4753454701000000e4fa56ef0100000000000000020000000000000003000000000000000010000000000000";

    #[test]
    fn another_salt_is_another_segment() {
        let bytes = chunk(5, &[b"x".to_vec()]);
        assert!(parse(&bytes, 5).is_ok());
        assert_eq!(parse(&bytes, 6), Err(Invalid("the chunk belongs to another segment")));
    }

    proptest::proptest! {
        #[test]
        fn chunks_come_back(payloads in proptest::collection::vec(proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80), 0..20), salt: u64) {
            let got = parse(&chunk(salt, &payloads), salt).expect("as written");
            for (n, (record, payload)) in got.iter().zip(&payloads).enumerate() {
                proptest::prop_assert_eq!((record.offset, &record.payload[..]), (Offset(41 + n as u64), &payload[..]));
            }
            proptest::prop_assert_eq!(got.len(), payloads.len());
        }

        #[test]
        fn one_wrong_bit_is_noticed(payloads in proptest::collection::vec(proptest::collection::vec(proptest::prelude::any::<u8>(), 0..80), 0..5), bit: proptest::sample::Index) {
            let mut bytes = chunk(9, &payloads);
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            proptest::prop_assert!(parse(&bytes, 9).is_err());
        }

        #[test]
        fn any_bytes_are_harmless(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..400)) {
            let salt = if bytes.len() < 16 { 0 } else { u64_at(&bytes, 8) };
            let _ = parse(&bytes, salt);
            let _ = SegmentHeader::decode(&bytes);
            let data = Bytes::from(bytes);
            for count in [0, 1, 5, u32::MAX] {
                let run = RunHead { kind: RunKind::Records, of: OF, count, base: 3, len: data.len() as u32, crc: crc32c::crc32c(&data) };
                let _ = records(&data, &run);
                let _ = nexts(&data, &run);
            }
        }
    }
}
