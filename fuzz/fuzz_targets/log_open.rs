//! A log whose files were damaged anywhere: it refuses to open, or every record it gives is one that was written.
#![no_main]

use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use sealpost::clock::{ManualClock, SeededRandom, UnixMillis};
use sealpost::ids::Partition;
use sealpost::log::embedded::sim::SimDisk;
use sealpost::log::embedded::{EmbeddedLog, Options, PartitionCounts};
use sealpost::log::{EventLog, Topic, TopicPartition};

const OF: TopicPartition = TopicPartition { topic: Topic::Inbox, partition: Partition(0) };

struct Sample {
    dir: tempfile::TempDir,
    disk: SimDisk,
    runtime: tokio::runtime::Runtime,
}

fn options(sample: &Sample, disk: &SimDisk) -> Options {
    let mut options = Options::new(sample.dir.path());
    options.partitions = PartitionCounts { inbox: 1, groups: 1, directory: 1, metadata: 1, push: 0 };
    options.segment_bytes = 64 * 1024;
    options.disk = Arc::new(disk.clone());
    options.random = Arc::new(SeededRandom::new(1));
    options.clock = Arc::new(ManualClock::new(UnixMillis(1)));
    options
}

fn payload(n: u64) -> Bytes {
    Bytes::from(format!("record {n} ").repeat(40))
}

fn sample() -> &'static Sample {
    static SAMPLE: OnceLock<Sample> = OnceLock::new();
    SAMPLE.get_or_init(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("starts");
        let sample = Sample { dir: tempfile::tempdir().expect("a folder"), disk: SimDisk::default(), runtime };
        let log = EmbeddedLog::open(options(&sample, &sample.disk)).expect("opens");
        sample.runtime.block_on(async {
            for n in 0..150 {
                log.append(OF, payload(n)).await.expect("appends");
            }
        });
        drop(log);
        sample
    })
}

fuzz_target!(|edits: Vec<(u8, u16, u8)>| {
    let sample = sample();
    let disk = sample.disk.copy();
    let names = disk.names();
    for (file, at, byte) in edits {
        let name = &names[usize::from(file) % names.len()];
        disk.edit(name, |bytes| {
            let len = bytes.len().max(1);
            if let Some(place) = bytes.get_mut(usize::from(at) % len) {
                *place ^= byte;
            }
        });
    }
    let Ok(log) = EmbeddedLog::open(options(sample, &disk)) else { return };
    sample.runtime.block_on(async {
        let (mut from, end) = log.bounds(OF).await.expect("exists");
        while from < end {
            let Ok(records) = log.read(OF, from, 8192).await else { return };
            for record in records {
                assert_eq!(record.payload, payload(record.offset.0));
                from = record.offset.next();
            }
        }
    });
});
