//! Appends of 1 KiB to a real Kafka through the log, by 64 concurrent appenders, and from append to consumer at 2,000/s.
//!
//! `SEALPOST_TEST_KAFKA=host:port cargo bench --all-features --bench kafka_append [-- SECONDS]`

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use sealpost::clock::SystemRandom;
use sealpost::ids::{EdgeId, Offset, Partition};
use sealpost::log::kafka::{KafkaLog, KafkaOptions, NewKafkaTopic, create_topics, delete_topics};
use sealpost::log::{AppendError, AppendSink, Consumed, EventLog, Topic, TopicPartition};
use sealpost::metrics::process_usage;

const APPENDERS: usize = 64;
const PAYLOAD: usize = 1024;
const PARTITIONS: u16 = 16;
const PACED: u64 = 2_000;

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, 60_000_000, 3).expect("valid")
}

/// One appender: counts what was acknowledged and wakes its task once a batch.
struct Appender {
    base: Instant,
    state: Mutex<(u64, Histogram<u64>)>,
    wake: tokio::sync::Notify,
}

impl AppendSink for Appender {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        outcome.expect("appended");
        let micros = (self.base.elapsed().as_nanos() as u64 - token) / 1000;
        let mut state = self.state.lock();
        state.0 += 1;
        state.1.saturating_record(micros);
    }

    fn flush(&self) {
        self.wake.notify_one();
    }
}

impl Appender {
    fn new(base: Instant) -> Arc<Self> {
        Arc::new(Self { base, state: Mutex::new((0, histogram())), wake: tokio::sync::Notify::new() })
    }
}

fn to(number: u64) -> TopicPartition {
    TopicPartition { topic: Topic::Inbox, partition: Partition((number % u64::from(PARTITIONS)) as u16) }
}

async fn append(log: Arc<KafkaLog>, appender: Arc<Appender>, number: u64, window: u64, until: Instant) -> u64 {
    let sink: Arc<dyn AppendSink> = appender.clone();
    let payload: Vec<u8> = (0..PAYLOAD).map(|i| (i * 7) as u8).collect();
    let mut sent = 0;
    while Instant::now() < until {
        let done = appender.state.lock().0;
        let now = appender.base.elapsed().as_nanos() as u64;
        while sent < done + window {
            log.submit(to(number + sent), Bytes::copy_from_slice(&payload), &sink, now).expect("accepted");
            sent += 1;
        }
        appender.wake.notified().await;
    }
    while appender.state.lock().0 < sent {
        appender.wake.notified().await;
    }
    sent
}

fn cpu() -> f64 {
    process_usage("self").map_or(0.0, |usage| usage.cpu_seconds)
}

async fn saturate(log: &Arc<KafkaLog>, name: &str, window: u64, time: Duration) {
    let (base, before) = (Instant::now(), cpu());
    let appenders: Vec<_> = (0..APPENDERS).map(|_| Appender::new(base)).collect();
    let tasks: Vec<_> = appenders
        .iter()
        .enumerate()
        .map(|(number, appender)| tokio::spawn(append(Arc::clone(log), Arc::clone(appender), number as u64, window, base + time)))
        .collect();
    let mut total = 0;
    for task in tasks {
        total += task.await.expect("no panic");
    }
    let seconds = base.elapsed().as_secs_f64();
    let mut all = histogram();
    for appender in &appenders {
        all.add(&appender.state.lock().1).expect("same bounds");
    }
    println!(
        "| {name} | {window} | {:.0} | {:.2} | {:.2} | {:.2} |",
        total as f64 / seconds,
        all.value_at_quantile(0.5) as f64 / 1000.0,
        all.value_at_quantile(0.99) as f64 / 1000.0,
        (cpu() - before) * 1e6 / total as f64,
    );
}

/// Records that carry the moment of their submission, at a steady rate, and when a consumer has them.
async fn paced(log: &Arc<KafkaLog>, name: &str, time: Duration) {
    let base = Instant::now();
    let consuming = Arc::clone(log);
    let group = format!("paced-{}", EdgeId::random(&SystemRandom));
    let (ready, mut is_ready) = tokio::sync::oneshot::channel();
    let count = PACED * time.as_secs();
    let consumer = tokio::spawn(async move {
        let mut consumer = consuming.consumer(&group, &[Topic::Inbox]).await.expect("joins");
        let (mut latencies, mut got, mut ready) = (histogram(), 0, Some(ready));
        while got < count {
            match consumer.next().await.expect("consumes") {
                Consumed::Assigned(partitions) => {
                    for of in partitions {
                        let (_, end) = consuming.bounds(of).await.expect("bounds");
                        consumer.seek(of, end).await.expect("sought");
                    }
                    ready.take().map(|ready| ready.send(()));
                }
                Consumed::Records(batches) => {
                    let now = base.elapsed().as_nanos() as u64;
                    for record in batches.iter().flat_map(|(_, records)| records) {
                        let at = u64::from_be_bytes(record.payload[..8].try_into().expect("eight bytes"));
                        latencies.saturating_record((now - at) / 1000);
                        got += 1;
                    }
                }
                Consumed::Revoked(_) => {}
            }
        }
        latencies
    });
    (&mut is_ready).await.expect("the consumer joins");
    tokio::time::sleep(Duration::from_millis(500)).await;
    let appender = Appender::new(base);
    let sink: Arc<dyn AppendSink> = appender.clone();
    let (before, begun, mut sent) = (cpu(), Instant::now(), 0);
    let mut ticks = tokio::time::interval(Duration::from_millis(1));
    while sent < count {
        ticks.tick().await;
        let due = (begun.elapsed().as_secs_f64() * PACED as f64) as u64;
        while sent < due.min(count) {
            let now = base.elapsed().as_nanos() as u64;
            let mut payload = vec![7; PAYLOAD];
            payload[..8].copy_from_slice(&now.to_be_bytes());
            log.submit(to(sent), Bytes::from(payload), &sink, now).expect("accepted");
            sent += 1;
        }
    }
    let latencies = consumer.await.expect("no panic");
    let used = (cpu() - before) * 1e6 / count as f64;
    let acked = appender.state.lock().1.clone();
    let at = |histogram: &Histogram<u64>, quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
    println!(
        "| {name} | {:.2} | {:.2} | {:.2} | {:.2} | {used:.0} |",
        at(&acked, 0.5),
        at(&acked, 0.99),
        at(&latencies, 0.5),
        at(&latencies, 0.99)
    );
}

/// From the start of the topic, as after a restart.
async fn replay(log: &Arc<KafkaLog>) {
    let mut consumer = log.consumer(&format!("replay-{}", EdgeId::random(&SystemRandom)), &[Topic::Inbox]).await.expect("joins");
    let mut left = 0;
    for number in 0..u64::from(PARTITIONS) {
        let (earliest, end) = log.bounds(to(number)).await.expect("bounds");
        left += end.0 - earliest.0;
    }
    let (total, mut begun, mut before) = (left, Instant::now(), cpu());
    while left > 0 {
        match consumer.next().await.expect("consumes") {
            Consumed::Records(batches) => left -= batches.iter().map(|(_, records)| records.len() as u64).sum::<u64>(),
            _ => (begun, before) = (Instant::now(), cpu()),
        }
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!(
        "\nconsumed from the start: {total} records, {:.0}/s, {:.2} µs of CPU each",
        total as f64 / seconds,
        (cpu() - before) * 1e6 / total as f64
    );
}

fn main() {
    let Some(brokers) = std::env::var("SEALPOST_TEST_KAFKA").ok().filter(|brokers| !brokers.is_empty()) else {
        println!("skipped: SEALPOST_TEST_KAFKA does not name a Kafka cluster; `topology/local up --dir DIR --only kafka` starts one");
        return;
    };
    let seconds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(3);
    let time = Duration::from_secs(seconds);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("starts");
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let replication: u16 = if brokers.contains(',') { 3 } else { 1 };
    println!(
        "durability: acks=all, {replication} broker(s), page cache; payload {PAYLOAD} bytes; {APPENDERS} appenders; {PARTITIONS} partitions; {cores} cores, the broker on the same\n"
    );
    runtime.block_on(async {
        let mut options = KafkaOptions::new(brokers);
        options.prefix = format!("bench-{}-", EdgeId::random(&SystemRandom));
        let topics = Topic::ON_CLUSTER.map(|topic| NewKafkaTopic::new(topic, PARTITIONS, replication));
        create_topics(&options, &topics).await.expect("topics are made");
        let lingers = [0, 500, 1000];
        let mut logs = Vec::new();
        for linger in lingers {
            options.linger = Duration::from_micros(linger);
            logs.push((format!("linger {linger} µs"), KafkaLog::open(options.clone()).await.expect("opens")));
        }
        // The broker's compiler needs a moment.
        println!("| log | in flight each | records/s | p50 ms | p99 ms | process CPU µs/record |\n|---|---|---|---|---|---|");
        saturate(&logs[0].1, "warming up", 64, time).await;
        for window in [1, 8, 64] {
            for (name, log) in &logs {
                saturate(log, name, window, time).await;
            }
        }
        println!("\n| at {PACED}/s | acknowledged p50 ms | p99 ms | consumed p50 ms | p99 ms | process CPU µs/record |\n|---|---|---|---|---|---|");
        for (name, log) in &logs {
            paced(log, name, time).await;
        }
        replay(&logs[0].1).await;
        for (_, log) in &logs {
            log.close().await;
        }
        delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
    });
}
