//! The embedded log against a map: random appends, reads, commits, truncation, ageing, restarts, crashes and power
//! losses, on a simulated disk that forgets what was not synced. `PROPTEST_CASES` sets how many runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::prelude::*;
use sealpost::clock::{ManualClock, SeededRandom, UnixMillis};
use sealpost::ids::{Offset, Partition};
use sealpost::log::embedded::sim::SimDisk;
use sealpost::log::embedded::{EmbeddedLog, Options, PartitionCounts, Retention};
use sealpost::log::{AppendError, AppendSink, Consumed, Consumer, EventLog, ReadError, Topic, TopicPartition};
use tempfile::TempDir;

const AGE_MS: u64 = 60_000;

const fn at(topic: Topic, partition: u16) -> TopicPartition {
    TopicPartition { topic, partition: Partition(partition) }
}

const PARTS: [TopicPartition; 4] = [at(Topic::Inbox, 0), at(Topic::Inbox, 1), at(Topic::Directory, 0), at(Topic::Directory, 1)];

#[derive(Debug, Clone)]
enum Op {
    Append { count: u8, size: u16 },
    Commit { part: usize, back: u8 },
    Truncate { part: usize, back: u8 },
    Age,
    Close,
    Crash,
    PowerLoss { in_flight: u8, size: u16, wait_us: u8, seed: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (1u8..60, 0u16..3000).prop_map(|(count, size)| Op::Append { count, size }),
        2 => (0usize..4, 0u8..20).prop_map(|(part, back)| Op::Commit { part, back }),
        1 => (0usize..4, 0u8..40).prop_map(|(part, back)| Op::Truncate { part, back }),
        1 => Just(Op::Age),
        1 => Just(Op::Close),
        1 => Just(Op::Crash),
        3 => (0u8..80, 0u16..3000, any::<u8>(), any::<u64>())
            .prop_map(|(in_flight, size, wait_us, seed)| Op::PowerLoss { in_flight, size, wait_us, seed }),
    ]
}

/// What the sinks were told.
#[derive(Default)]
struct Outcomes {
    done: Mutex<BTreeMap<u64, Result<Offset, AppendError>>>,
    changed: tokio::sync::Notify,
}

impl AppendSink for Outcomes {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        assert!(self.done.lock().insert(token, outcome).is_none(), "answered twice");
    }

    fn flush(&self) {
        self.changed.notify_one();
    }
}

struct Run {
    dir: TempDir,
    disk: SimDisk,
    clock: ManualClock,
    tail_bytes: usize,
    log: Arc<EmbeddedLog>,
    consumer: Box<dyn Consumer>,
    /// Every record there ever was, by offset.
    records: BTreeMap<TopicPartition, Vec<Bytes>>,
    truncated: BTreeMap<TopicPartition, u64>,
    committed: BTreeMap<TopicPartition, u64>,
    serial: u64,
}

fn open(dir: &TempDir, disk: &SimDisk, clock: &ManualClock, tail_bytes: usize) -> Arc<EmbeddedLog> {
    let mut options = Options::new(dir.path());
    options.partitions = PartitionCounts { inbox: 2, groups: 1, directory: 2, metadata: 1, push: 0 };
    options.segment_bytes = 64 * 1024;
    options.tail_bytes = tail_bytes;
    options.linger = Duration::ZERO;
    options.retention = Retention { age_ms: Some(AGE_MS), bytes: None };
    options.disk = Arc::new(disk.clone());
    options.clock = Arc::new(clock.clone());
    options.random = Arc::new(SeededRandom::new(clock_seed(clock)));
    EmbeddedLog::open(options).expect("a crash never makes a log that refuses to open")
}

/// Salts must differ from one life of the process to the next, as they do in earnest.
fn clock_seed(clock: &ManualClock) -> u64 {
    use sealpost::clock::Clock as _;
    clock.advance(1);
    clock.now().0
}

async fn consumer(log: &EmbeddedLog) -> Box<dyn Consumer> {
    let mut consumer = log.consumer("projector", &[Topic::Inbox]).await.expect("joins");
    while !matches!(consumer.next().await.expect("consumes"), Consumed::Assigned(_)) {}
    consumer
}

impl Run {
    async fn start(tail_bytes: usize) -> Self {
        let (dir, disk, clock) = (TempDir::new().expect("folder"), SimDisk::default(), ManualClock::new(UnixMillis(1)));
        let log = open(&dir, &disk, &clock, tail_bytes);
        let consumer = consumer(&log).await;
        let (records, truncated, committed) = (PARTS.map(|part| (part, Vec::new())).into(), BTreeMap::new(), BTreeMap::new());
        Self { dir, disk, clock, tail_bytes, log, consumer, records, truncated, committed, serial: 0 }
    }

    fn submit(&mut self, count: u8, size: u16, outcomes: &Arc<Outcomes>) -> Vec<(TopicPartition, Bytes)> {
        let sink: Arc<dyn AppendSink> = outcomes.clone();
        let mut sent = Vec::new();
        for n in 0..u64::from(count) {
            self.serial += 1;
            let mut payload = self.serial.to_le_bytes().to_vec();
            payload.resize(8 + usize::from(size) / (1 + n as usize % 5), self.serial as u8);
            let (part, payload) = (PARTS[self.serial as usize * 7 % 5 % 4], Bytes::from(payload));
            self.log.submit(part, payload.clone(), &sink, n).expect("taken");
            sent.push((part, payload));
        }
        sent
    }

    async fn apply(&mut self, op: Op) {
        match op {
            Op::Append { count, size } => {
                let outcomes = Arc::new(Outcomes::default());
                let sent = self.submit(count, size, &outcomes);
                while outcomes.done.lock().len() < sent.len() {
                    outcomes.changed.notified().await;
                }
                let done = std::mem::take(&mut *outcomes.done.lock());
                for (n, (part, payload)) in sent.into_iter().enumerate() {
                    let records = self.records.get_mut(&part).expect("known");
                    assert_eq!(done[&(n as u64)], Ok(Offset(records.len() as u64)));
                    records.push(payload);
                }
            }
            Op::Commit { part, back } => {
                let part = PARTS[part % 2];
                let to = (self.records[&part].len() as u64).saturating_sub(back.into());
                self.consumer.commit(part, Offset(to)).await.expect("commits");
                let most = self.committed.entry(part).or_default();
                *most = to.max(*most);
            }
            Op::Truncate { part, back } => {
                let part = PARTS[part];
                let to = (self.records[&part].len() as u64).saturating_sub(back.into());
                self.log.truncate_before(part, Offset(to)).await.expect("truncates");
                let most = self.truncated.entry(part).or_default();
                *most = to.max(*most);
            }
            Op::Age => {
                self.clock.advance(2 * AGE_MS);
                self.log.retain().expect("runs");
            }
            Op::Close => {
                self.log.close().await;
                self.reopen().await;
            }
            Op::Crash => self.reopen().await,
            Op::PowerLoss { in_flight, size, wait_us, seed } => self.power_loss(in_flight, size, wait_us, seed).await,
        }
        self.check().await;
    }

    async fn reopen(&mut self) {
        // The folder is locked until the old one is dropped.
        let (elsewhere, nothing) = (TempDir::new().expect("folder"), SimDisk::default());
        self.log = open(&elsewhere, &nothing, &self.clock, 0);
        self.consumer = consumer(&self.log).await;
        self.log = open(&self.dir, &self.disk, &self.clock, self.tail_bytes);
        self.consumer = consumer(&self.log).await;
    }

    async fn power_loss(&mut self, in_flight: u8, size: u16, wait_us: u8, seed: u64) {
        let outcomes = Arc::new(Outcomes::default());
        let sent = self.submit(in_flight, size, &outcomes);
        std::thread::sleep(Duration::from_micros(wait_us.into()));
        self.disk = self.disk.power_off(seed);
        self.reopen().await;
        let done = std::mem::take(&mut *outcomes.done.lock());
        assert_eq!(done.len(), sent.len(), "everything is answered");
        // In each partition what was acknowledged is there, and of the rest a prefix may be.
        for part in PARTS {
            let mine: Vec<_> = (0..).zip(&sent).filter(|(_, (of, _))| *of == part).map(|(n, (_, payload))| (&done[&n], payload)).collect();
            let before = self.records[&part].len() as u64;
            let end = self.log.bounds(part).await.expect("exists").1.0;
            let acknowledged = mine.iter().filter(|(outcome, _)| outcome.is_ok()).count() as u64;
            assert!(end >= before + acknowledged, "{part:?}: {end}, but {before} and {acknowledged} more were acknowledged");
            assert!(end <= before + mine.len() as u64, "records from nowhere");
            for (n, (outcome, payload)) in mine.into_iter().enumerate() {
                if let Ok(offset) = outcome {
                    assert_eq!(offset.0, before + n as u64);
                }
                if before + (n as u64) < end {
                    self.records.get_mut(&part).expect("known").push(payload.clone());
                }
            }
        }
    }

    async fn check(&self) {
        for (&part, records) in &self.records {
            let (earliest, end) = self.log.bounds(part).await.expect("exists");
            assert_eq!(end.0, records.len() as u64, "{part:?}");
            let truncated = self.truncated.get(&part).copied().unwrap_or(0);
            assert!(earliest.0 >= truncated);
            let most =
                if part.topic == Topic::Directory { truncated } else { truncated.max(self.committed.get(&part).copied().unwrap_or(0)) };
            assert!(earliest.0 <= most, "{part:?}: {earliest:?} is more than {most}, which retention may take");
            let mut from = earliest;
            while from < end {
                let records_read = match self.log.read(part, from, 20_000).await {
                    // Retention works when it likes, also between the look at the bounds and the read.
                    Err(ReadError::Gone { earliest, .. }) if earliest.0 <= most && earliest > from => {
                        from = earliest;
                        continue;
                    }
                    read => read.expect("readable"),
                };
                for record in records_read {
                    assert_eq!(record.offset, from);
                    assert_eq!(record.payload, records[from.0 as usize]);
                    from = from.next();
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn behaves_like_a_map(tail in prop_oneof![Just(0usize), Just(20_000), Just(1 << 26)], ops in proptest::collection::vec(op(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("starts");
        runtime.block_on(async {
            let mut run = Run::start(tail).await;
            for op in ops {
                run.apply(op).await;
            }
        });
    }
}
