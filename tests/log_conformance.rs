//! The embedded log does what every log must, with small segments and with large ones.

use std::sync::Arc;

use sealpost::log::conformance;
use sealpost::log::embedded::{EmbeddedLog, Options, PartitionCounts};
use tempfile::TempDir;

async fn check(change: impl Fn(&mut Options)) {
    let dirs = parking_lot::Mutex::new(Vec::<TempDir>::new());
    conformance::all(|| async {
        let dir = TempDir::new().expect("a temporary folder");
        let mut options = Options::new(dir.path());
        options.partitions = PartitionCounts { inbox: 7, groups: 6, directory: 6, metadata: 6, push: 0 };
        change(&mut options);
        dirs.lock().push(dir);
        let log: conformance::Log = EmbeddedLog::open(options).expect("opens");
        log
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_defaults() {
    check(|_| {}).await;
}

/// Nearly everything is read from disk, and every few commits a new segment starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_small_segments_and_no_tail() {
    check(|options| {
        options.segment_bytes = 64 * 1024;
        options.tail_bytes = 0;
    })
    .await;
}

/// A task may hold the only reference, so that the log thread drops the log.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dropping_without_close_ends_the_threads_and_frees_the_folder() {
    let dir = TempDir::new().expect("a temporary folder");
    for _ in 0..5 {
        let log = EmbeddedLog::open(Options::new(dir.path())).expect("the folder is free again");
        assert!(EmbeddedLog::open(Options::new(dir.path())).is_err_and(|error| error.to_string().contains("another process")));
        let log: Arc<EmbeddedLog> = log;
        drop(log);
    }
}

/// What was acknowledged is there after a drop without close, and after a close; positions go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reopening_keeps_everything() {
    use bytes::Bytes;
    use sealpost::ids::{Offset, Partition};
    use sealpost::log::{EventLog as _, Topic, TopicPartition};
    let dir = TempDir::new().expect("a temporary folder");
    let to = |n: u64| TopicPartition { topic: Topic::ALL[n as usize % 4], partition: Partition((n % 3) as u16) };
    let mut counts = std::collections::BTreeMap::<TopicPartition, Vec<Bytes>>::new();
    for round in 0..6u64 {
        let mut options = Options::new(dir.path());
        options.segment_bytes = 64 * 1024;
        let log = EmbeddedLog::open(options).expect("opens");
        for (&of, payloads) in &counts {
            assert_eq!(log.bounds(of).await, Ok((Offset(0), Offset(payloads.len() as u64))));
            let mut from = 0;
            while from < payloads.len() {
                for record in log.read(of, Offset(from as u64), 10_000).await.expect("readable") {
                    assert_eq!(record.payload, payloads[from]);
                    from += 1;
                }
            }
        }
        for n in 0..200 {
            let payload = Bytes::from(vec![n as u8; (n * 7 + round) as usize]);
            let payloads = counts.entry(to(n)).or_default();
            assert_eq!(log.append(to(n), payload.clone()).await, Ok(Offset(payloads.len() as u64)));
            payloads.push(payload);
        }
        if round % 2 == 0 {
            log.close().await;
        }
    }
}
