//! The log on a real Kafka. Skipped, and said so, unless `SEALPOST_TEST_KAFKA` names one; `make test-cluster` starts it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use sealpost::clock::SystemRandom;
use sealpost::ids::{EdgeId, Offset, Partition};
use sealpost::log::kafka::{GroupWatch, KafkaLog, KafkaOpenError, KafkaOptions, NewKafkaTopic, Replicas, create_topics, delete_topics};
use sealpost::log::{
    AppendError, AppendSink, Consumed, Consumer, EventLog, PartitionCounts, ReadError, Topic, TopicPartition, conformance,
};

const COUNTS: PartitionCounts = PartitionCounts { inbox: 7, groups: 6, directory: 6, metadata: 6, push: 2 };

fn brokers() -> Option<String> {
    let brokers = std::env::var("SEALPOST_TEST_KAFKA").ok().filter(|brokers| !brokers.is_empty());
    if brokers.is_none() {
        println!("skipped: SEALPOST_TEST_KAFKA does not name a Kafka cluster; `make test-cluster` starts one and runs this");
    }
    brokers
}

/// A log of its own on the cluster, with its own topics.
fn options(brokers: &str) -> KafkaOptions {
    let mut options = KafkaOptions::new(brokers);
    options.prefix = format!("test-{}-", EdgeId::random(&SystemRandom));
    options.session_timeout = Duration::from_secs(6);
    options
}

async fn make_topics(options: &KafkaOptions) {
    let replication = if options.brokers.contains(',') { 3 } else { 1 };
    let topics: Vec<_> = Topic::ON_CLUSTER.into_iter().map(|topic| NewKafkaTopic::new(topic, COUNTS.of(topic), replication)).collect();
    create_topics(options, &topics).await.expect("topics are made");
}

async fn fresh(options: KafkaOptions) -> Arc<KafkaLog> {
    make_topics(&options).await;
    KafkaLog::open(options).await.expect("opens")
}

fn inbox(partition: u16) -> TopicPartition {
    TopicPartition { topic: Topic::Inbox, partition: Partition(partition) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conforms() {
    let Some(brokers) = brokers() else { return };
    let made = Mutex::new(Vec::new());
    conformance::all(|| async {
        let options = options(&brokers);
        made.lock().push(options.clone());
        let log: conformance::Log = fresh(options).await;
        log
    })
    .await;
    let made = made.into_inner();
    for options in made {
        delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_is_said() {
    // Nothing listens here: the port was free a moment ago.
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let begun = Instant::now();
    let error = KafkaLog::open(KafkaOptions::new(free.to_string())).await.expect_err("nobody is there");
    assert!(matches!(error, KafkaOpenError::Unreachable { .. }) && error.can_retry(), "{error}");
    assert!(error.to_string().contains(&free.to_string()) && error.to_string().contains("check the addresses"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(15), "within about 10 s, not {:?}", begun.elapsed());

    let Some(brokers) = brokers() else { return };
    let mut options = options(&brokers);
    let error = KafkaLog::open(options.clone()).await.expect_err("no topics yet");
    assert_eq!(error, KafkaOpenError::TopicMissing(options.topic(Topic::Inbox)));
    assert!(error.to_string().contains("sealpost topology apply"), "{error}");
    make_topics(&options).await;
    options.partitions = Some(PartitionCounts { directory: 4, ..COUNTS });
    let error = KafkaLog::open(options.clone()).await.expect_err("another number of partitions");
    assert_eq!(error, KafkaOpenError::PartitionCount { topic: options.topic(Topic::Directory), found: 6, expected: 4 });
    options.partitions = Some(COUNTS);
    KafkaLog::open(options.clone()).await.expect("opens").close().await;
    delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
}

/// A broker that does not speak TLS, and one that does not ask for a password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_security_is_said() {
    let Some(brokers) = brokers() else { return };
    let mut options = options(&brokers);
    options.tls = Some(sealpost::log::kafka::KafkaTls::default());
    let error = KafkaLog::open(options.clone()).await.expect_err("the listener is plain text");
    assert!(matches!(error, KafkaOpenError::Tls { .. } | KafkaOpenError::Unreachable { .. }), "{error}");
    options.tls = Some(sealpost::log::kafka::KafkaTls { ca_file: Some("/nonexistent/ca.pem".into()), ..Default::default() });
    let error = KafkaLog::open(options).await.expect_err("no such file");
    assert!(matches!(error, KafkaOpenError::Options(_)) && error.to_string().contains("TLS files"), "{error}");
}

/// What became of each record, by its number.
#[derive(Default)]
struct Fates(Mutex<BTreeMap<u64, Result<Offset, AppendError>>>);

impl AppendSink for Fates {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        assert!(self.0.lock().insert(token, outcome).is_none(), "{token} was answered twice");
    }
}

/// Starts and kills the brokers of `topology/local`, whose folder the environment names.
fn topology(arguments: &[&str]) {
    let folder = std::env::var("SEALPOST_TEST_TOPOLOGY").expect("checked before");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/topology/local");
    let status = Command::new(script).args(arguments).args(["--dir", &folder]).status().expect("topology/local runs");
    assert!(status.success(), "topology/local {arguments:?}");
}

fn signal_broker(name: &str, signal: &str) {
    let folder = std::env::var("SEALPOST_TEST_TOPOLOGY").expect("checked before");
    let pid = std::fs::read_to_string(format!("{folder}/pids/{name}.pid")).expect("the broker's process id");
    assert!(Command::new("kill").args([signal, pid.trim()]).status().expect("kill runs").success());
}

/// Appends numbered records for as long as `on`, each submitted once, and gives back how many were submitted.
async fn append_while(log: &Arc<KafkaLog>, fates: &Arc<Fates>, on: &AtomicBool, submitted: &AtomicUsize) {
    let sink: Arc<dyn AppendSink> = fates.clone();
    let mut n = 0u64;
    while on.load(Ordering::Relaxed) {
        match log.submit(inbox((n % 4) as u16), Bytes::from(n.to_be_bytes().to_vec()), &sink, n) {
            Ok(()) => n += 1,
            Err(AppendError::Full) => {}
            Err(error) => panic!("the log refuses: {error}"),
        }
        submitted.store(n as usize, Ordering::Relaxed);
        if n.is_multiple_of(10) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

/// Every acknowledged record is on the log once and where it was said to be, in order; what is there besides was unknown.
async fn audit(log: &KafkaLog, fates: &Fates) {
    let fates = fates.0.lock().clone();
    let mut found: BTreeMap<u64, Vec<(u16, Offset)>> = BTreeMap::new();
    for partition in 0..4 {
        let mut from = Offset(0);
        let mut last = None;
        loop {
            let records = log.read(inbox(partition), from, 1 << 20).await.expect("readable");
            let Some(end) = records.last() else { break };
            from = end.offset.next();
            for record in records {
                let n = u64::from_be_bytes(record.payload[..].try_into().expect("a number"));
                assert!(last.is_none_or(|last| last < n), "order: {n} after {last:?}");
                last = Some(n);
                found.entry(n).or_default().push((partition, record.offset));
            }
        }
    }
    for (n, fate) in &fates {
        let at = found.remove(n).unwrap_or_default();
        match fate {
            Ok(offset) => assert_eq!(at, [((n % 4) as u16, *offset)], "{n} was acknowledged"),
            Err(error) if error.outcome_unknown() => assert!(at.len() <= 1, "{n} is there {} times", at.len()),
            Err(error) => assert!(at.is_empty(), "{n} was refused ({error}) and is on the log"),
        }
    }
    assert!(found.is_empty(), "records that nobody submitted");
}

/// Kills the only broker under appends and starts it again; then stops it for longer than appends wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_broker_loses_nothing_acknowledged() {
    let Some(brokers) = brokers() else { return };
    if std::env::var("SEALPOST_TEST_TOPOLOGY").is_err() || brokers.contains(',') {
        println!("skipped: SEALPOST_TEST_TOPOLOGY does not name the folder of a topology/local with one broker");
        return;
    }
    let options = options(&brokers);
    let log = fresh(options.clone()).await;
    let fates = Arc::new(Fates::default());
    let (on, submitted) = (AtomicBool::new(true), AtomicUsize::new(0));
    tokio::join!(append_while(&log, &fates, &on, &submitted), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        tokio::task::block_in_place(|| {
            signal_broker("kafka-1", "-KILL");
            std::thread::sleep(Duration::from_millis(500));
            topology(&["restart", "kafka-1"]);
        });
        let back = Instant::now();
        let before = submitted.load(Ordering::Relaxed) as u64;
        while !fates.0.lock().range(before..).any(|(_, fate)| fate.is_ok()) {
            assert!(back.elapsed() < Duration::from_secs(20), "appends do not go on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        println!("appends went on {:?} after the broker was back", back.elapsed());
        on.store(false, Ordering::Relaxed);
    });
    wait_for_fates(&fates, submitted.load(Ordering::Relaxed)).await;
    audit(&log, &fates).await;

    // A broker that hangs: nobody can know, and that is said; afterwards the log goes on.
    let unknown = Arc::new(Fates::default());
    let sink: Arc<dyn AppendSink> = unknown.clone();
    signal_broker("kafka-1", "-STOP");
    log.submit(inbox(5), Bytes::from_static(b"whether"), &sink, 0).expect("taken");
    let begun = Instant::now();
    wait_for_fates(&unknown, 1).await;
    signal_broker("kafka-1", "-CONT");
    let fate = unknown.0.lock().get(&0).cloned();
    assert!(matches!(fate, Some(Err(AppendError::Unknown(_)))), "{fate:?}");
    println!("unknown after {:?}", begun.elapsed());
    assert_eq!(log.health(), Ok(()));
    let next = tokio::time::timeout(Duration::from_secs(20), log.append(inbox(5), Bytes::from_static(b"goes on"))).await;
    assert!(matches!(next, Ok(Ok(_))), "{next:?}");
    log.close().await;
    delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
}

/// Kills one of three brokers under appends: everything is acknowledged in the end, by the other two.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_three_brokers_dies() {
    let Some(brokers) = brokers() else { return };
    if std::env::var("SEALPOST_TEST_TOPOLOGY").is_err() || !brokers.contains(',') {
        println!(
            "skipped: SEALPOST_TEST_TOPOLOGY does not name the folder of a topology/local with three brokers; `make test-cluster BROKERS=3`"
        );
        return;
    }
    let options = options(&brokers);
    let log = fresh(options.clone()).await;
    let fates = Arc::new(Fates::default());
    let (on, submitted) = (AtomicBool::new(true), AtomicUsize::new(0));
    tokio::join!(append_while(&log, &fates, &on, &submitted), async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        signal_broker("kafka-2", "-KILL");
        let killed = Instant::now();
        let before = submitted.load(Ordering::Relaxed);
        // Recovered when nothing that was submitted by then waits any more, and something after it was taken in every partition.
        loop {
            let recovered = {
                let fates = fates.0.lock();
                let done: std::collections::BTreeSet<u64> = fates.range(before as u64..).map(|(n, _)| n % 4).collect();
                fates.range(..before as u64).count() == before && done.len() == 4
            };
            if recovered {
                break;
            }
            assert!(killed.elapsed() < Duration::from_secs(40), "appends do not go on");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        println!("every partition takes appends {:?} after a broker was killed", killed.elapsed());
        wait_for_replicas(&log, |missing| missing.under_replicated > 0 && missing.leaderless == 0).await;
        on.store(false, Ordering::Relaxed);
    });
    wait_for_fates(&fates, submitted.load(Ordering::Relaxed)).await;
    let unknown = fates.0.lock().values().filter(|fate| fate.is_err()).count();
    println!("{} appends, {unknown} of them unknown", submitted.load(Ordering::Relaxed));
    tokio::task::block_in_place(|| topology(&["restart", "kafka-2"]));
    audit(&log, &fates).await;
    wait_for_replicas(&log, |missing| *missing == Replicas::default()).await;
    assert_eq!(unknown, 0, "the fail-over is shorter than appends wait");
    log.close().await;
    delete_topics(&options, &Topic::ALL).await.expect("topics are removed");
}

/// What alerts are made of: copies that are missing while a broker is away, and not once it is back.
async fn wait_for_replicas(log: &KafkaLog, wanted: impl Fn(&Replicas) -> bool) {
    let begun = Instant::now();
    loop {
        let missing = log.replicas().await.expect("asked");
        if wanted(&missing) {
            println!("{missing:?}, after {:?}", begun.elapsed());
            return;
        }
        assert!(begun.elapsed() < Duration::from_secs(60), "{missing:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn wait_for_fates(fates: &Fates, count: usize) {
    let begun = Instant::now();
    while fates.0.lock().len() < count {
        assert!(begun.elapsed() < Duration::from_secs(30), "{} of {count} were answered", fates.0.lock().len());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// When each partition's records came, at one consumer.
#[derive(Default)]
struct Flow {
    last: BTreeMap<TopicPartition, Instant>,
    longest: BTreeMap<TopicPartition, Duration>,
}

/// While a second consumer joins and leaves, the partitions that stay with the first one keep flowing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_that_stay_keep_flowing() {
    let Some(brokers) = brokers() else { return };
    let options = options(&brokers);
    let log = fresh(options.clone()).await;
    let sink: Arc<dyn AppendSink> = Arc::new(Fates::default());
    let on = Arc::new(AtomicBool::new(true));
    let (writer_log, writer_on) = (Arc::clone(&log), Arc::clone(&on));
    let writer = tokio::spawn(async move {
        let mut n = 0;
        while writer_on.load(Ordering::Relaxed) {
            writer_log.submit(inbox((n % 7) as u16), Bytes::from_static(b"tick"), &sink, n).expect("taken");
            n += 1;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    let mut first = log.consumer("flow", &[Topic::Inbox]).await.expect("joins");
    let mut flow = Flow::default();
    let (mut lost, mut second) = (Vec::new(), None);
    let begun = Instant::now();
    let mut joined_at = None;
    while begun.elapsed() < Duration::from_secs(8) {
        if second.is_none() && begun.elapsed() > Duration::from_secs(3) {
            let mut other = log.consumer("flow", &[Topic::Inbox]).await.expect("joins");
            second = Some(tokio::spawn(async move {
                loop {
                    match other.next().await {
                        Ok(Consumed::Records(_)) => return Instant::now(),
                        Ok(_) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            }));
            joined_at = Some(Instant::now());
        }
        match tokio::time::timeout(Duration::from_secs(5), first.next()).await.expect("something comes").expect("consumes") {
            Consumed::Records(batches) => {
                let now = Instant::now();
                for (of, _) in batches {
                    // Replicas of new topics need a moment to fall into step; the rebalance is what counts.
                    if let Some(last) = flow.last.insert(of, now).filter(|_| begun.elapsed() > Duration::from_millis(2500)) {
                        let longest = flow.longest.entry(of).or_default();
                        *longest = (*longest).max(now - last);
                    }
                }
            }
            // As a projector does: what is done is committed.
            Consumed::Revoked(partitions) => lost.extend(partitions),
            Consumed::Assigned(_) => {}
        }
    }
    on.store(false, Ordering::Relaxed);
    writer.await.expect("the writer ends");
    let took = second.expect("joined").await.expect("gets records").saturating_duration_since(joined_at.expect("joined"));
    assert!(!lost.is_empty(), "the second one got something");
    let stayed: Vec<_> = flow.longest.iter().filter(|(of, _)| !lost.contains(of)).collect();
    assert!(stayed.len() >= 3, "the first one keeps half");
    let longest = stayed.iter().map(|(_, longest)| **longest).max().unwrap_or_default();
    println!("the second consumer had records {took:?} after it joined; the longest pause of a partition that stayed: {longest:?}");
    assert!(longest < Duration::from_secs(1), "{longest:?}");
    drop(first);
    log.close().await;
    delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
}

/// What a consumer of two topics owns, until nothing has moved for a while.
async fn settle(consumers: &mut [(Box<dyn Consumer>, BTreeSet<TopicPartition>)]) {
    let mut moved_at = Instant::now();
    while moved_at.elapsed() < Duration::from_secs(4) {
        for (consumer, owned) in consumers.iter_mut() {
            match tokio::time::timeout(Duration::from_millis(200), consumer.next()).await {
                Ok(Ok(Consumed::Assigned(partitions))) => owned.extend(partitions),
                Ok(Ok(Consumed::Revoked(partitions))) => owned.retain(|of| !partitions.contains(of)),
                Ok(Ok(Consumed::Records(_))) | Err(_) => continue,
                Ok(Err(error)) => panic!("{error}"),
            }
            moved_at = Instant::now();
        }
    }
}

/// Projectors that join later get their part of each topic, not one topic whole: all messages would stay with the first.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_topic_is_shared_out() {
    let Some(brokers) = brokers() else { return };
    let options = options(&brokers);
    let log = fresh(options.clone()).await;
    let topics = [Topic::Directory, Topic::Inbox];
    let mut consumers = Vec::new();
    for count in 1..=3 {
        consumers.push((log.consumer("each", &topics).await.expect("joins"), BTreeSet::new()));
        settle(&mut consumers).await;
        for topic in topics {
            let owned: Vec<usize> = consumers.iter().map(|(_, owned)| owned.iter().filter(|of| of.topic == topic).count()).collect();
            println!("{count} consumers of {}: {owned:?}", topic.name());
            let all = usize::from(COUNTS.of(topic));
            assert_eq!(owned.iter().sum::<usize>(), all);
            assert!(owned.iter().all(|&owned| (all / count..=all.div_ceil(count)).contains(&owned)), "{owned:?}");
        }
    }
    let watch = GroupWatch::new(&options, &[(Topic::Inbox, "each"), (Topic::Directory, "each")]).expect("a client");
    let group = watch.group().await.expect("answers");
    watch.end().await;
    assert_eq!((group.state.as_str(), group.members.len()), ("Stable", 3));
    let mut seen: Vec<BTreeSet<TopicPartition>> = group.members.iter().map(|member| member.partitions.iter().copied().collect()).collect();
    let mut owned: Vec<BTreeSet<TopicPartition>> = consumers.iter().map(|(_, owned)| owned.clone()).collect();
    seen.sort();
    owned.sort();
    assert_eq!(seen, owned, "a process is one member, whatever it consumes");
    drop(consumers);
    log.close().await;
    delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
}

/// Records that retention took from under a consumer are a gap that is said; so is a position that the log does not have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn gaps_are_said() {
    let Some(brokers) = brokers() else { return };
    let options = options(&brokers);
    let log = fresh(options.clone()).await;
    for n in 0..10u8 {
        log.append(inbox(0), Bytes::from(vec![n])).await.expect("appended");
    }
    log.truncate_before(inbox(0), Offset(6)).await.expect("truncated");
    let mut consumer = log.consumer("gaps", &[Topic::Inbox]).await.expect("joins");
    let Ok(Consumed::Assigned(_)) = consumer.next().await else { panic!("first the partitions") };
    consumer.seek(inbox(0), Offset(2)).await.expect("sought");
    let gone = ReadError::Gone { asked: Offset(2), earliest: Offset(6) };
    for _ in 0..2 {
        assert_eq!(consumer.next().await.expect_err("removed"), gone);
    }
    consumer.seek(inbox(0), Offset(6)).await.expect("sought");
    let mut got = Vec::new();
    while got.len() < 4 {
        let Ok(Consumed::Records(batches)) = consumer.next().await else { panic!("records") };
        got.extend(batches.into_iter().flat_map(|(_, records)| records).map(|record| record.offset.0));
    }
    assert_eq!(got, [6, 7, 8, 9]);
    consumer.seek(inbox(0), Offset(50)).await.expect("only the broker knows the end");
    assert!(matches!(consumer.next().await, Err(ReadError::Corrupt(_))), "a store that is newer than the log");
    drop(consumer);
    log.close().await;
    delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
}
