//! Durable appends of 1 KiB: the embedded log against fjall 3 with a batch commit and `PersistMode::SyncData`, both fed by
//! the same 64 concurrent appenders through the same kind of queue and thread.
//!
//! `cargo bench --bench log_append [-- SECONDS]`

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fjall::{Database, KeyspaceCreateOptions, PersistMode};
use hdrhistogram::Histogram;
use parking_lot::{Condvar, Mutex};
use sealpost::ids::{Offset, Partition};
use sealpost::log::embedded::{EmbeddedLog, Options};
use sealpost::log::{AppendError, AppendSink, Consumed, EventLog, Topic, TopicPartition};

const APPENDERS: usize = 64;
const PAYLOAD: usize = 1024;
const PARTITIONS: u16 = 16;

/// Takes records and says when they are durable.
trait Target: Send + Sync {
    fn submit(&self, partition: u16, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError>;
}

impl Target for EmbeddedLog {
    fn submit(&self, partition: u16, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        EventLog::submit(self, TopicPartition { topic: Topic::Inbox, partition: Partition(partition) }, payload, sink, token)
    }
}

struct Queued(u16, Bytes, Arc<dyn AppendSink>, u64);

/// fjall behind a queue and a thread that commits all that waits as one batch.
#[derive(Default)]
struct Fjall {
    queue: Mutex<Vec<Queued>>,
    wake: Condvar,
    stop: AtomicBool,
    commits: AtomicU64,
}

impl Fjall {
    fn run(&self, dir: &std::path::Path) {
        let database = Database::builder(dir).open().expect("opens");
        let keyspace = database.keyspace("log", KeyspaceCreateOptions::default).expect("opens");
        let mut next = [0u64; PARTITIONS as usize];
        let mut batch = Vec::new();
        loop {
            {
                let mut queue = self.queue.lock();
                while queue.is_empty() {
                    if self.stop.load(Ordering::Relaxed) {
                        return;
                    }
                    self.wake.wait_for(&mut queue, Duration::from_millis(50));
                }
                std::mem::swap(&mut *queue, &mut batch);
            }
            let mut write = database.batch().durability(Some(PersistMode::SyncData));
            let mut offsets = Vec::with_capacity(batch.len());
            for Queued(partition, payload, ..) in &batch {
                let offset = next[usize::from(*partition)];
                next[usize::from(*partition)] += 1;
                let mut key = [0; 10];
                key[..2].copy_from_slice(&partition.to_be_bytes());
                key[2..].copy_from_slice(&offset.to_be_bytes());
                write.insert(&keyspace, key, &payload[..]);
                offsets.push(offset);
            }
            write.commit().expect("commits");
            self.commits.fetch_add(1, Ordering::Relaxed);
            for (Queued(_, _, sink, token), offset) in batch.iter().zip(offsets) {
                sink.done(*token, Ok(Offset(offset)));
            }
            for Queued(_, _, sink, _) in batch.drain(..) {
                sink.flush();
            }
        }
    }
}

impl Target for Fjall {
    fn submit(&self, partition: u16, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        self.queue.lock().push(Queued(partition, payload, Arc::clone(sink), token));
        self.wake.notify_one();
        Ok(())
    }
}

/// One appender: counts what was acknowledged and wakes its task once a commit.
struct Appender {
    base: Instant,
    state: Mutex<(u64, Histogram<u64>)>,
    wake: tokio::sync::Notify,
}

impl AppendSink for Appender {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        outcome.expect("appended");
        let nanos = self.base.elapsed().as_nanos() as u64 - token;
        let mut state = self.state.lock();
        state.0 += 1;
        state.1.saturating_record(nanos / 1000);
    }

    fn flush(&self) {
        self.wake.notify_one();
    }
}

/// CPU of the process, and of its threads whose names start with `prefix`, in seconds.
fn cpu(prefix: &str) -> (f64, f64) {
    let read = |path: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let Some((head, rest)) = text.rsplit_once(')') else { return (String::new(), 0.0) };
        let fields: Vec<u64> = rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
        (head.split_once('(').map_or("", |(_, name)| name).to_owned(), fields.iter().sum::<u64>() as f64 / 100.0)
    };
    let mut threads = 0.0;
    for task in std::fs::read_dir("/proc/self/task").expect("Linux").flatten() {
        let (name, seconds) = read(&task.path().join("stat").to_string_lossy());
        if name.starts_with(prefix) {
            threads += seconds;
        }
    }
    (read("/proc/self/stat").1, threads)
}

async fn append(target: Arc<dyn Target>, appender: Arc<Appender>, number: usize, window: u64, until: Instant) -> u64 {
    let sink: Arc<dyn AppendSink> = appender.clone();
    let payload: Vec<u8> = (0..PAYLOAD).map(|i| (i * 7 + number) as u8).collect();
    let mut sent = 0;
    while Instant::now() < until {
        let done = appender.state.lock().0;
        let now = appender.base.elapsed().as_nanos() as u64;
        while sent < done + window {
            // A copy for each, as from a socket.
            let payload = Bytes::copy_from_slice(&payload);
            target.submit((number as u16 + sent as u16) % PARTITIONS, payload, &sink, now).expect("accepted");
            sent += 1;
        }
        appender.wake.notified().await;
    }
    while appender.state.lock().0 < sent {
        appender.wake.notified().await;
    }
    sent
}

fn measure(
    runtime: &tokio::runtime::Runtime,
    name: &str,
    prefix: &str,
    target: &Arc<dyn Target>,
    window: u64,
    time: Duration,
    commits: impl Fn() -> u64,
) {
    let base = Instant::now();
    let appenders: Vec<Arc<Appender>> = (0..APPENDERS)
        .map(|_| {
            let histogram = Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid");
            Arc::new(Appender { base, state: Mutex::new((0, histogram)), wake: tokio::sync::Notify::new() })
        })
        .collect();
    let (before, commits_before) = (cpu(prefix), commits());
    let until = base + time;
    let total: u64 = runtime.block_on(async {
        let tasks: Vec<_> = appenders
            .iter()
            .enumerate()
            .map(|(number, appender)| tokio::spawn(append(Arc::clone(target), Arc::clone(appender), number, window, until)))
            .collect();
        let mut total = 0;
        for task in tasks {
            total += task.await.expect("no panic");
        }
        total
    });
    let seconds = base.elapsed().as_secs_f64();
    let after = cpu(prefix);
    let mut all = Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).expect("valid");
    for appender in &appenders {
        all.add(&appender.state.lock().1).expect("same bounds");
    }
    let per = |seconds: f64| seconds * 1e6 / total as f64;
    println!(
        "| {name} | {window} | {:.0} | {:.2} | {:.2} | {:.2} | {:.2} | {:.0} |",
        total as f64 / seconds,
        all.value_at_quantile(0.5) as f64 / 1000.0,
        all.value_at_quantile(0.99) as f64 / 1000.0,
        per(after.0 - before.0),
        per(after.1 - before.1),
        total as f64 / (commits() - commits_before).max(1) as f64,
    );
}

fn main() {
    let seconds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(4);
    let time = Duration::from_secs(seconds);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("starts");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    println!(
        "durability: fdatasync before an append is acknowledged; payload: {PAYLOAD} bytes; appenders: {APPENDERS}; partitions: {PARTITIONS}; cores: {cores}"
    );
    println!(
        "| log | in flight each | records/s | p50 ms | p99 ms | process CPU µs/record | log threads' CPU µs/record | records/commit |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for window in [1, 64] {
        for consumed in [false, true] {
            for linger in [0, 400, 1000] {
                let dir = tempfile::tempdir().expect("a folder");
                let mut options = Options::new(dir.path());
                options.linger = Duration::from_micros(linger);
                let log = EmbeddedLog::open(options).expect("opens");
                let reader = consumed.then(|| runtime.spawn(consume(Arc::clone(&log))));
                let target: Arc<dyn Target> = log.clone();
                let name = format!("embedded, linger {linger} µs{}", if consumed { ", with a consumer" } else { "" });
                measure(&runtime, &name, "log", &target, window, time, || log.stats().commits);
                runtime.block_on(log.close());
                if let Some(reader) = reader {
                    let read = runtime.block_on(reader).expect("no panic");
                    assert!(read > 0);
                }
            }
        }
        let dir = tempfile::tempdir().expect("a folder");
        let fjall = Arc::new(Fjall::default());
        let (thread, path) = (Arc::clone(&fjall), dir.path().to_owned());
        let thread = std::thread::Builder::new().name("fjall-log".to_owned()).spawn(move || thread.run(&path)).expect("starts");
        let target: Arc<dyn Target> = fjall.clone();
        measure(&runtime, "fjall 3, one batch a commit", "fjall", &target, window, time, || fjall.commits.load(Ordering::Relaxed));
        fjall.stop.store(true, Ordering::Relaxed);
        thread.join().expect("no panic");
    }
}

async fn consume(log: Arc<EmbeddedLog>) -> u64 {
    let mut consumer = log.consumer("bench", &[Topic::Inbox]).await.expect("joins");
    let mut count = 0;
    while let Ok(consumed) = consumer.next().await {
        if let Consumed::Records(batch) = consumed {
            count += batch.iter().map(|(_, records)| records.len() as u64).sum::<u64>();
        }
    }
    count
}
