//! Any bytes as a segment: nothing panics, and what is accepted is consistent.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use sealpost::log::embedded::format::{self, RunKind, SegmentHeader};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(header) = SegmentHeader::decode(bytes) {
        assert_eq!(SegmentHeader::decode(&header.encode()), Ok(header));
    }
    // The salt is taken from the bytes, so that the fuzzer need not guess it.
    let Some(salt) = bytes.get(8..16).and_then(|salt| salt.try_into().ok()).map(u64::from_le_bytes) else { return };
    let Ok(head) = format::chunk_head(bytes, salt) else { return };
    if let Ok(runs) = format::table(bytes, &head) {
        let _ = format::check_data(bytes, &head, &runs);
    }
    // As if the checksums had been right.
    let data = Bytes::copy_from_slice(bytes.get(format::CHUNK_HEADER_BYTES..).unwrap_or_default());
    let of = sealpost::log::TopicPartition { topic: sealpost::log::Topic::Inbox, partition: sealpost::ids::Partition(0) };
    let (count, len, crc) = (head.runs, data.len() as u32, crc_of(&data));
    let run = format::RunHead { kind: RunKind::Records, of, count, base: head.commit >> 1, len, crc };
    if let Ok(records) = format::records(&data, &run) {
        assert_eq!(records.len(), count as usize);
        assert_eq!(records.iter().map(|record| record.payload.len() + format::RECORD_HEADER_BYTES).sum::<usize>(), data.len());
    }
    let _ = format::nexts(&data, &run);
});

fn crc_of(data: &[u8]) -> u32 {
    format::checksum(data)
}
