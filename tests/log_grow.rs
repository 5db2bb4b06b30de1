//! The embedded log's `inbox` gets more partitions while it runs, and everything else stays as it was: order, offsets, groups, what a
//! crash leaves.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sealpost::clock::{ManualClock, SeededRandom, UnixMillis};
use sealpost::ids::{AccountId, Generation, Offset, Partition};
use sealpost::limits;
use sealpost::log::embedded::sim::{Faults, SimDisk};
use sealpost::log::embedded::{EmbeddedLog, LogObserver, OpenError, Options, PartitionCounts, Retention};
use sealpost::log::layout::{self, LayoutRecord};
use sealpost::log::{AppendError, Consumed, EventLog, Topic, TopicPartition, conformance};
use tempfile::TempDir;

const COUNTS: PartitionCounts = PartitionCounts { inbox: 3, groups: 1, directory: 2, metadata: 1, push: 0 };

fn inbox(partition: u16) -> TopicPartition {
    TopicPartition { topic: Topic::Inbox, partition: Partition(partition) }
}

fn open_record(generation: u16, first: u16, count: u16) -> Bytes {
    LayoutRecord::Open { generation: Generation(generation), first, count }.encode()
}

fn options(dir: &Path) -> Options {
    let mut options = Options::new(dir);
    options.partitions = COUNTS;
    options.segment_bytes = 64 * 1024;
    options
}

fn simulated(dir: &Path, disk: &SimDisk, seed: u64) -> Options {
    let mut options = options(dir);
    options.disk = Arc::new(disk.clone());
    options.random = Arc::new(SeededRandom::new(seed));
    options.clock = Arc::new(ManualClock::new(UnixMillis(1_000)));
    options
}

fn account(n: u8) -> AccountId {
    AccountId::from_bytes([n; 16])
}

async fn read_all(log: &dyn EventLog, of: TopicPartition) -> Vec<Bytes> {
    let (mut from, end) = log.bounds(of).await.expect("exists");
    let mut out = Vec::new();
    while from < end {
        let records = log.read(of, from, 8 * 1024).await.expect("readable");
        from = records.last().expect("not at the end").offset.next();
        out.extend(records.into_iter().map(|record| record.payload));
    }
    out
}

/// 3 partitions are followed by 8.
async fn scale(log: &EmbeddedLog) {
    log.grow_inbox(11).expect("grows");
    log.append(layout::TOPIC, open_record(0, 0, 3)).await.expect("appended");
    log.append(layout::TOPIC, open_record(1, 3, 8)).await.expect("appended");
}

/// The suite again, in partitions of which most were made later.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grown_log_does_what_every_log_must() {
    let dirs = parking_lot::Mutex::new(Vec::<TempDir>::new());
    conformance::all(|| async {
        let dir = TempDir::new().expect("a temporary folder");
        let mut options = options(dir.path());
        options.partitions = PartitionCounts { inbox: 2, groups: 6, directory: 6, metadata: 6, push: 0 };
        options.tail_bytes = 0;
        dirs.lock().push(dir);
        let log = EmbeddedLog::open(options).expect("opens");
        log.grow_inbox(7).expect("grows");
        let log: conformance::Log = log;
        log
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_are_made_while_it_runs_and_the_layout_is_known_at_once() {
    let dir = TempDir::new().expect("a temporary folder");
    let log = EmbeddedLog::open(options(dir.path())).expect("opens");
    let route = |log: &EmbeddedLog, n| log.route(&account(n)).expect("known").partition;
    let before: Vec<Partition> = (0..50).map(|n| route(&log, n)).collect();
    assert_eq!(log.append(inbox(3), Bytes::new()).await, Err(AppendError::NoSuchPartition));
    assert_eq!(log.append(layout::TOPIC, open_record(0, 0, 3)).await, Err(AppendError::NoSuchPartition));
    let mut consumer = log.consumer("projector", &[Topic::Inbox]).await.expect("joins");
    assert!(matches!(consumer.next().await, Ok(Consumed::Assigned(all)) if all.len() == 3));

    log.grow_inbox(11).expect("grows");
    log.grow_inbox(11).expect("a repeat does nothing");
    assert_eq!((log.partitions(Topic::Inbox), log.partitions(Topic::Layout), log.partitions(Topic::Directory)), (11, 1, 2));
    let Ok(Consumed::Assigned(fresh)) = consumer.next().await else { panic!("the new ones are shared out") };
    assert_eq!(fresh.into_iter().collect::<BTreeSet<_>>(), (3..11).map(inbox).collect());
    assert_eq!((0..50).map(|n| route(&log, n)).collect::<Vec<_>>(), before, "nobody is told to use them yet");
    assert!(log.layout_is_known());

    log.append(layout::TOPIC, open_record(0, 0, 3)).await.expect("appended");
    log.append(layout::TOPIC, open_record(1, 3, 8)).await.expect("appended");
    assert_eq!((log.layout().newest(), log.layout().count(), log.layout().end()), (Generation(1), 8, 11));
    assert!((0..50).all(|n| route(&log, n) == log.layout().partition_of(&account(n)) && route(&log, n) >= Partition(3)));
    assert!(
        matches!(log.append(layout::TOPIC, Bytes::from_static(b"?")).await, Err(AppendError::Unavailable(_))),
        "it would not open again"
    );

    // What threads had in hand has time to be appended; a process that stood still has not had it.
    assert!(!log.layout_is_known());
    std::thread::sleep(Duration::from_millis(limits::LAYOUT_KNOWN_MS));
    assert!(!log.layout_is_known(), "one look after a long time is one look");
    for _ in 0..30 {
        std::thread::sleep(Duration::from_millis(20));
        log.layout_is_known();
    }
    assert!(log.layout_is_known());

    assert_eq!(log.append(inbox(10), Bytes::from_static(b"new")).await, Ok(Offset(0)));
    assert!(matches!(consumer.next().await, Ok(Consumed::Records(batch)) if batch[0].0 == inbox(10)));
    consumer.commit(inbox(10), Offset(1)).await.expect("commits");
    let too_many = log.grow_inbox(limits::LOG_PARTITIONS + 1).expect_err("past the cap");
    assert!(too_many.to_string().contains("1024"), "{too_many}");
    drop(consumer);
    log.close().await;

    let log = EmbeddedLog::open(options(dir.path())).expect("opens");
    assert_eq!((log.layout().newest(), log.layout().count(), log.partitions(Topic::Inbox)), (Generation(1), 8, 11));
    assert!(log.layout_is_known(), "nothing is under way in a process that has just begun");
    assert_eq!(read_all(log.as_ref(), inbox(10)).await, [Bytes::from_static(b"new")]);
    let consumer = log.consumer("projector", &[Topic::Inbox]).await.expect("joins");
    assert_eq!(consumer.committed(inbox(10)).await, Ok(Some(Offset(1))));
    let observer = LogObserver::open(dir.path(), Topic::Metadata, None, Arc::new(sealpost::clock::SystemClock)).expect("watches");
    assert_eq!(observer.partitions(Topic::Metadata), 1);
}

/// A folder of before is as it was, byte for byte, until it grows; then those who can't read it refuse it.
#[tokio::test]
async fn a_log_that_never_grew_is_as_it_always_was() {
    let dir = TempDir::new().expect("a temporary folder");
    let meta = || std::fs::read_to_string(dir.path().join("meta")).expect("readable");
    let mut made = options(dir.path());
    made.random = Arc::new(SeededRandom::new(1));
    let log = EmbeddedLog::open(made).expect("opens");
    log.append(inbox(0), Bytes::from_static(b"old")).await.expect("appended");
    log.close().await;
    let (crc, json) = meta().split_once('\n').map(|(crc, json)| (crc.to_owned(), json.to_owned())).expect("two lines");
    let log_number: u64 = serde_json::from_str::<serde_json::Value>(&json).expect("JSON")["log"].as_u64().expect("a number");
    let as_it_was =
        format!("{{\"version\":1,\"log\":{log_number},\"partitions\":{{\"directory\":2,\"groups\":1,\"inbox\":3,\"metadata\":1}}}}");
    assert_eq!((json.as_str(), crc), (as_it_was.as_str(), format!("{:08x}", crc32c::crc32c(as_it_was.as_bytes()))));

    let log = EmbeddedLog::open(options(dir.path())).expect("opens");
    scale(&log).await;
    log.append(inbox(7), Bytes::from_static(b"new")).await.expect("appended");
    log.close().await;
    assert!(meta().contains("\"version\":2") && meta().contains("\"inbox\":11"), "{}", meta());
    let log = EmbeddedLog::open(options(dir.path())).expect("the configuration says what it was made with");
    assert_eq!(read_all(log.as_ref(), inbox(0)).await, [Bytes::from_static(b"old")]);
    assert_eq!(read_all(log.as_ref(), inbox(7)).await, [Bytes::from_static(b"new")]);
    log.close().await;
    let mut other = options(dir.path());
    other.partitions.inbox = 8;
    let error = EmbeddedLog::open(other).expect_err("refused");
    assert!(matches!(error, OpenError::Partitions { made: 3, asked: 8, .. }) && error.to_string().contains("topology scale"), "{error}");
}

/// The power goes at any write or sync around the change: what was acknowledged is there, the layout is one of those that were on the
/// way, and the same steps repeated end where they should.
#[tokio::test]
async fn a_power_cut_around_the_change_leaves_what_was_acknowledged() {
    let mut layouts = BTreeMap::<u16, u32>::new();
    for seed in 0..160u64 {
        let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
        let log = EmbeddedLog::open(simulated(dir.path(), &disk, seed)).expect("opens");
        let mut acked: BTreeMap<TopicPartition, Vec<Bytes>> = BTreeMap::new();
        let mut serial = 0u64;
        let fault = u32::try_from(seed % 16).expect("small");
        let mut steps = 0u32;
        loop {
            if steps == 8 {
                let half = seed.is_multiple_of(2);
                let faults = if half {
                    Faults { writes_left: Some(fault), ..Faults::default() }
                } else {
                    Faults { syncs_left: Some(fault), ..Faults::default() }
                };
                disk.set(faults);
            }
            let outcome = match steps {
                9 => log.grow_inbox(11),
                10 => log.append(layout::TOPIC, open_record(0, 0, 3)).await.map(drop),
                11 => log.append(layout::TOPIC, open_record(1, 3, 8)).await.map(drop),
                _ => {
                    serial += 1;
                    let to = log.route(&account(serial as u8)).expect("known");
                    let payload = Bytes::from(serial.to_le_bytes().repeat(1 + serial as usize % 40));
                    log.append(to, payload.clone()).await.map(|_| acked.entry(to).or_default().push(payload))
                }
            };
            steps += 1;
            if outcome.is_err() || steps > 20 {
                break;
            }
        }
        let known = log.layout().newest();
        drop(log);
        let rest = disk.power_off(seed);
        let log = EmbeddedLog::open(simulated(dir.path(), &rest, seed + 1_000)).expect("a crash never makes a log that refuses to open");
        assert!(log.layout().newest() >= known, "seed {seed}: who was told of a layout finds it again");
        *layouts.entry(log.layout().newest().0).or_default() += 1;
        for (of, payloads) in &acked {
            let found = read_all(log.as_ref(), *of).await;
            assert!(found.starts_with(payloads) && found.len() <= payloads.len() + 1, "seed {seed}: {of:?}");
        }
        scale(&log).await;
        assert_eq!((log.layout().newest(), log.layout().count(), log.layout().end()), (Generation(1), 8, 11), "seed {seed}");
        log.append(inbox(10), Bytes::from_static(b"on")).await.expect("goes on");
    }
    println!("layouts after the power cut: {layouts:?}");
    assert!(layouts.len() == 2 && layouts.values().all(|times| *times > 10), "both sides of the change were met: {layouts:?}");
}

/// The end of the log is cut off at every byte of the commits that made the change.
#[tokio::test]
async fn a_tail_torn_within_the_change_is_cut_where_the_last_whole_commit_ends() {
    let dir = TempDir::new().expect("folder");
    let log = EmbeddedLog::open(options(dir.path())).expect("opens");
    log.append(inbox(0), Bytes::from_static(b"before")).await.expect("appended");
    scale(&log).await;
    log.append(inbox(9), Bytes::from_static(b"behind")).await.expect("appended");
    drop(log);
    let segment = dir.path().join(format!("{:020}.seg", 1));
    let whole = std::fs::read(&segment).expect("readable");
    let end = whole.iter().rposition(|byte| *byte != 0).expect("not empty") + 1;
    let mut seen = BTreeSet::new();
    for cut in (4096 + 512..=end).rev().step_by(7) {
        let copy = TempDir::new().expect("folder");
        for entry in std::fs::read_dir(dir.path()).expect("a folder") {
            let entry = entry.expect("an entry").path();
            std::fs::copy(&entry, copy.path().join(entry.file_name().expect("named"))).expect("copied");
        }
        let mut torn = whole.clone();
        torn[cut..].fill(0);
        std::fs::write(copy.path().join(segment.file_name().expect("named")), torn).expect("written");
        let log = EmbeddedLog::open(options(copy.path())).expect("opens");
        assert_eq!(read_all(log.as_ref(), inbox(0)).await, [Bytes::from_static(b"before")], "{cut}");
        let behind = read_all(log.as_ref(), inbox(9)).await.len();
        seen.insert((log.layout().newest(), behind));
        assert_eq!(log.partitions(Topic::Inbox), 11, "partitions are made before anything is in them");
        scale(&log).await;
        assert_eq!((log.layout().newest(), log.layout().end()), (Generation(1), 11));
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [(Generation(0), 0), (Generation(1), 0), (Generation(1), 1)]);
}

/// Records of topic layout outlive their segments, and partitions that come in between are in summaries or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_layout_outlives_its_segments() {
    let dir = TempDir::new().expect("folder");
    let small = || {
        let mut options = options(dir.path());
        options.retention = Retention { age_ms: None, bytes: Some(512 * 1024) };
        options
    };
    let log = EmbeddedLog::open(small()).expect("opens");
    let fill = async |log: &EmbeddedLog, partition: u16| {
        for n in 0..60 {
            log.append(inbox(partition), Bytes::from(vec![n; 4_000])).await.expect("appended");
        }
    };
    fill(&log, 1).await;
    scale(&log).await;
    for partition in [1, 4, 10, 2] {
        fill(&log, partition).await;
        fill(&log, partition).await;
    }
    // Sealed segments get their summaries every second; those of before the change know fewer partitions.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let retained = {
        let log = Arc::clone(&log);
        tokio::task::spawn_blocking(move || log.retain()).await.expect("no panic")
    };
    retained.expect("retains");
    assert!(!dir.path().join(format!("{:020}.seg", 1)).exists(), "the segment with the change is gone");
    let ends = async |log: &EmbeddedLog| {
        let mut ends = Vec::new();
        for partition in 0..11 {
            ends.push(log.bounds(inbox(partition)).await.expect("exists"));
        }
        ends
    };
    let (before, layout) = (ends(&log).await, log.layout());
    log.close().await;
    for check_all in [false, true] {
        let mut again = small();
        again.check_all = check_all;
        let log = EmbeddedLog::open(again).expect("opens");
        assert_eq!((ends(&log).await, log.layout()), (before.clone(), Arc::clone(&layout)));
        log.close().await;
    }
}
