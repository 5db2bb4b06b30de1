//! What every [`EventLog`] must do. Each check gets a log of its own, empty, with at least [`PARTITIONS`]
//! partitions of each topic.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::ids::{Offset, Partition};
use crate::limits;
use crate::log::{AppendError, AppendSink, Consumed, Consumer, EventLog, ReadError, Record, Topic, TopicPartition};

/// Partitions that each topic must have at least.
pub const PARTITIONS: u16 = 6;
/// How long something may take before it counts as lost.
const PATIENCE: Duration = Duration::from_secs(20);

/// A log to check.
pub type Log = Arc<dyn EventLog>;

/// All checks; `make` returns a fresh, empty log each time.
pub async fn all<F, Made>(make: F)
where
    F: Fn() -> Made,
    Made: Future<Output = Log>,
{
    offsets_grow_by_one(make().await).await;
    read_returns_what_was_appended(make().await).await;
    callbacks_come_in_order_and_flush_once(make().await).await;
    concurrent_appenders_keep_their_order(make().await).await;
    bounds_and_truncate(make().await).await;
    refusals(make().await).await;
    full_queue_is_refused_at_once(make().await).await;
    consumer_gets_everything_in_order(make().await).await;
    consumer_resumes_from_committed(make().await).await;
    seek_moves_the_next_record(make().await).await;
    a_held_partition_waits_for_a_seek(make().await).await;
    next_is_cancel_safe(make().await).await;
    groups_are_independent(make().await).await;
    two_consumers_share(make().await).await;
    three_consumers_join_and_leave(make().await).await;
    handover_waits_for_the_owner(make().await).await;
    close_commits_what_is_queued(make().await).await;
    closed_log_refuses(make().await).await;
}

fn at(topic: Topic, partition: u16) -> TopicPartition {
    TopicPartition { topic, partition: Partition(partition) }
}

fn inbox(partition: u16) -> TopicPartition {
    at(Topic::Inbox, partition)
}

fn numbered(n: usize) -> Bytes {
    Bytes::from(format!("record {n}"))
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(PATIENCE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: nothing within {PATIENCE:?}"),
    }
}

async fn append(log: &Log, to: TopicPartition, payload: Bytes) -> Offset {
    soon("append", log.append(to, payload)).await.expect("the append is taken")
}

/// Offsets of a partition start at 0 and grow by one, whatever happens in the others.
pub async fn offsets_grow_by_one(log: Log) {
    for n in 0..20 {
        for to in [inbox(0), inbox(1), at(Topic::Directory, 0)] {
            assert_eq!(append(&log, to, numbered(n)).await, Offset(n as u64), "{to:?}");
        }
    }
    assert_eq!(log.bounds(inbox(2)).await, Ok((Offset(0), Offset(0))));
    assert_eq!(log.bounds(inbox(0)).await, Ok((Offset(0), Offset(20))));
    assert!(log.partitions(Topic::Inbox) >= PARTITIONS);
    assert_eq!(log.health(), Ok(()));
}

/// Payloads of all sizes come back as they were, from any position, at least one at a time.
pub async fn read_returns_what_was_appended(log: Log) {
    let sizes = [0, 1, 7, 512, 4096, 70_000, 1_000_000];
    let payload = |size: usize| Bytes::from((0..size).map(|i| (i * 31 + size) as u8).collect::<Vec<_>>());
    for size in sizes {
        append(&log, inbox(3), payload(size)).await;
    }
    let mut from = 0;
    while from < sizes.len() {
        let records = log.read(inbox(3), Offset(from as u64), 1).await.expect("the position exists");
        assert!(!records.is_empty(), "at least one record");
        for Record { offset, payload: got, appended } in records {
            assert_eq!(offset, Offset(from as u64));
            assert_eq!(got, payload(sizes[from]));
            assert!(appended.0 > 0);
            from += 1;
        }
    }
    assert_eq!(log.read(inbox(3), Offset(from as u64), 1000).await, Ok(Vec::new()), "the end is empty");
    let all = log.read(inbox(3), Offset(2), limits::LOG_BATCH_BYTES).await.expect("the position exists");
    assert_eq!(all.iter().map(|record| record.offset.0).collect::<Vec<_>>(), (2..sizes.len() as u64).collect::<Vec<_>>());
}

/// What a sink was told.
#[derive(Default)]
struct Recording {
    done: Mutex<Vec<(u64, Result<Offset, AppendError>)>>,
    flushed_after: Mutex<Vec<usize>>,
    changed: tokio::sync::Notify,
}

impl AppendSink for Recording {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        self.done.lock().push((token, outcome));
    }

    fn flush(&self) {
        let done = self.done.lock().len();
        self.flushed_after.lock().push(done);
        self.changed.notify_one();
    }
}

impl Recording {
    async fn wait(&self, count: usize) {
        soon("callbacks", async {
            while self.flushed_after.lock().last().copied().unwrap_or(0) < count {
                self.changed.notified().await;
            }
        })
        .await;
    }
}

/// Each accepted `submit` is answered once, in offset order, and is readable by then; a flush follows.
pub async fn callbacks_come_in_order_and_flush_once(log: Log) {
    let recording = Arc::new(Recording::default());
    let sink: Arc<dyn AppendSink> = recording.clone();
    let count = 1000;
    for n in 0..count {
        log.submit(inbox((n % 3) as u16), numbered(n), &sink, n as u64).expect("the queue has room");
    }
    recording.wait(count).await;
    let done = std::mem::take(&mut *recording.done.lock());
    assert_eq!(done.len(), count);
    for (token, outcome) in &done {
        assert_eq!(outcome, &Ok(Offset(token / 3)), "records of a partition stand in the order of submit");
    }
    let tokens: BTreeSet<u64> = done.iter().map(|(token, _)| *token).collect();
    assert_eq!(tokens.len(), count, "each token once");
    let flushes = recording.flushed_after.lock().clone();
    assert!(flushes.windows(2).all(|pair| pair[0] < pair[1]), "a flush only after something was done");
    for partition in 0..3 {
        let (_, end) = log.bounds(inbox(partition)).await.expect("exists");
        assert!(end.0 >= 333);
    }
}

/// Records of one caller stay in its order, with others in between.
pub async fn concurrent_appenders_keep_their_order(log: Log) {
    let mut tasks = Vec::new();
    for caller in 0..8 {
        let log = Arc::clone(&log);
        tasks.push(tokio::spawn(async move {
            let mut offsets = Vec::new();
            for n in 0..100 {
                let payload = Bytes::from(format!("{caller}:{n}"));
                offsets.push((n, append(&log, inbox((caller % 2) as u16), payload).await));
            }
            assert!(offsets.windows(2).all(|pair| pair[0].1 < pair[1].1));
        }));
    }
    for task in tasks {
        task.await.expect("no appender fails");
    }
    for partition in 0..2u16 {
        let mut next: BTreeMap<String, usize> = BTreeMap::new();
        let mut from = Offset(0);
        let mut count = 0;
        loop {
            let records = log.read(inbox(partition), from, 64 * 1024).await.expect("readable");
            let Some(last) = records.last() else { break };
            from = last.offset.next();
            for record in records {
                let text = String::from_utf8(record.payload.to_vec()).expect("text");
                let (caller, n) = text.split_once(':').expect("two parts");
                let expected = next.entry(caller.to_owned()).or_default();
                assert_eq!(n, expected.to_string(), "the order of caller {caller}");
                *expected += 1;
                count += 1;
            }
        }
        assert_eq!(count, 400);
    }
}

/// Bounds move with appends and with truncation; what is before them is gone and said so.
pub async fn bounds_and_truncate(log: Log) {
    for n in 0..10 {
        append(&log, at(Topic::Directory, 1), numbered(n)).await;
    }
    log.truncate_before(at(Topic::Directory, 1), Offset(4)).await.expect("truncates");
    let (earliest, next) = log.bounds(at(Topic::Directory, 1)).await.expect("exists");
    assert!(earliest <= Offset(4), "at most what was asked for is forgotten");
    assert_eq!(next, Offset(10));
    for asked in 0..earliest.0 {
        let got = log.read(at(Topic::Directory, 1), Offset(asked), 1000).await;
        assert_eq!(got, Err(ReadError::Gone { asked: Offset(asked), earliest }));
    }
    let records = log.read(at(Topic::Directory, 1), Offset(4), 100_000).await.expect("still there");
    assert_eq!(records.first().map(|record| (record.offset, record.payload.clone())), Some((Offset(4), numbered(4))));
    assert_eq!(append(&log, at(Topic::Directory, 1), numbered(10)).await, Offset(10), "offsets are never used again");
}

/// What can't be appended or read is refused, and nothing else suffers.
pub async fn refusals(log: Log) {
    let none = inbox(log.partitions(Topic::Inbox));
    assert_eq!(log.append(none, numbered(0)).await, Err(AppendError::NoSuchPartition));
    assert_eq!(log.read(none, Offset(0), 1000).await, Err(ReadError::NoSuchPartition));
    assert_eq!(log.bounds(none).await, Err(ReadError::NoSuchPartition));
    assert_eq!(log.truncate_before(none, Offset(0)).await, Err(ReadError::NoSuchPartition));
    let large = Bytes::from(vec![1; limits::RECORD_BYTES]);
    assert_eq!(log.append(inbox(0), Bytes::from(vec![1; limits::RECORD_BYTES + 1])).await, Err(AppendError::TooLarge));
    assert_eq!(append(&log, inbox(0), large.clone()).await, Offset(0), "one of exactly the limit is taken");
    let records = log.read(inbox(0), Offset(0), 1).await.expect("readable");
    assert_eq!(records.first().map(|record| record.payload == large), Some(true));
    assert_eq!(log.health(), Ok(()));
}

/// Appends past the cap fail at once; the accepted ones are all answered, and then there is room again.
pub async fn full_queue_is_refused_at_once(log: Log) {
    let recording = Arc::new(Recording::default());
    let sink: Arc<dyn AppendSink> = recording.clone();
    let payload = Bytes::from(vec![7; 1024 * 1024]);
    let (mut accepted, mut refused) = (0, None);
    for n in 0..4 * limits::LOG_QUEUE_BYTES / payload.len() {
        match log.submit(inbox((n % 4) as u16), payload.clone(), &sink, n as u64) {
            Ok(()) => accepted += 1,
            Err(error) => {
                refused = Some(error);
                break;
            }
        }
    }
    assert_eq!(refused, Some(AppendError::Full), "four times the cap can't all be queued");
    recording.wait(accepted).await;
    assert_eq!(recording.done.lock().len(), accepted);
    assert!(recording.done.lock().iter().all(|(_, outcome)| outcome.is_ok()));
    append(&log, inbox(0), numbered(0)).await;
}

/// A consumer that notes what it got.
struct Reading {
    consumer: Box<dyn Consumer>,
    owned: BTreeSet<TopicPartition>,
    got: BTreeMap<TopicPartition, Vec<Record>>,
}

impl Reading {
    async fn join(log: &Log, group: &str, topics: &[Topic]) -> Self {
        let consumer = soon("join", log.consumer(group, topics)).await.expect("joins");
        Self { consumer, owned: BTreeSet::new(), got: BTreeMap::new() }
    }

    /// One call of `next`; commits before partitions are given back.
    async fn step(&mut self) {
        match soon("next", self.consumer.next()).await.expect("consumes") {
            Consumed::Assigned(partitions) => {
                assert!(!partitions.is_empty());
                for partition in partitions {
                    assert!(self.owned.insert(partition), "{partition:?} was assigned twice");
                }
            }
            Consumed::Revoked(partitions) => {
                for partition in partitions {
                    assert!(self.owned.remove(&partition), "{partition:?} was revoked but not owned");
                    if let Some(last) = self.got.get(&partition).and_then(|records| records.last()) {
                        self.consumer.commit(partition, last.offset.next()).await.expect("an owner may commit until its next call");
                    }
                }
            }
            Consumed::Records(batch) => {
                assert!(!batch.is_empty());
                for (partition, records) in batch {
                    assert!(self.owned.contains(&partition), "records of {partition:?}, which is not owned");
                    assert!(!records.is_empty());
                    let got = self.got.entry(partition).or_default();
                    for record in records {
                        assert!(got.last().is_none_or(|last| last.offset < record.offset), "offset order in {partition:?}");
                        got.push(record);
                    }
                }
            }
        }
    }

    /// Steps while there is something to do.
    async fn drain(&mut self) {
        while tokio::time::timeout(Duration::from_millis(300), self.step()).await.is_ok() {}
    }

    async fn until_records(&mut self, count: usize) {
        while self.count() < count {
            self.step().await;
        }
    }

    fn count(&self) -> usize {
        self.got.values().map(Vec::len).sum()
    }

    async fn commit_all(&mut self) {
        for (&partition, records) in self.got.iter().filter(|(partition, _)| self.owned.contains(partition)) {
            if let Some(last) = records.last() {
                self.consumer.commit(partition, last.offset.next()).await.expect("commits what it owns");
            }
        }
    }
}

/// One consumer gets every partition of its topics, and every record once and in order, old ones and new ones.
pub async fn consumer_gets_everything_in_order(log: Log) {
    for n in 0..60 {
        append(&log, inbox(n as u16 % PARTITIONS), numbered(n)).await;
    }
    append(&log, at(Topic::Metadata, 0), numbered(0)).await;
    let mut reading = Reading::join(&log, "readers", &[Topic::Inbox, Topic::Directory]).await;
    reading.until_records(60).await;
    let expected = usize::from(log.partitions(Topic::Inbox) + log.partitions(Topic::Directory));
    while reading.owned.len() < expected {
        reading.step().await;
    }
    assert_eq!(reading.owned.len(), expected, "all partitions of both topics");
    append(&log, inbox(0), numbered(60)).await;
    append(&log, at(Topic::Directory, 2), numbered(61)).await;
    reading.until_records(62).await;
    reading.drain().await;
    assert_eq!(reading.count(), 62, "nothing of a topic that was not asked for");
    for (partition, records) in &reading.got {
        assert_eq!(records.first().map(|record| record.offset), Some(Offset(0)), "{partition:?} from its start");
        assert!(records.windows(2).all(|pair| pair[0].offset.next() == pair[1].offset), "{partition:?} without holes");
    }
}

/// The next consumer of a group goes on where the group has committed, not where it has read.
pub async fn consumer_resumes_from_committed(log: Log) {
    for n in 0..10 {
        append(&log, inbox(0), numbered(n)).await;
    }
    let mut first = Reading::join(&log, "resume", &[Topic::Inbox]).await;
    first.until_records(10).await;
    assert_eq!(first.consumer.committed(inbox(0)).await, Ok(None));
    first.consumer.commit(inbox(0), Offset(6)).await.expect("commits");
    assert_eq!(first.consumer.committed(inbox(0)).await, Ok(Some(Offset(6))));
    drop(first);
    let mut second = Reading::join(&log, "resume", &[Topic::Inbox]).await;
    second.until_records(4).await;
    assert_eq!(second.got[&inbox(0)].iter().map(|record| record.offset.0).collect::<Vec<_>>(), [6, 7, 8, 9]);
    assert_eq!(second.consumer.committed(inbox(0)).await, Ok(Some(Offset(6))));
}

/// A seek right after the assignment wins over the committed position; a later one moves as well.
pub async fn seek_moves_the_next_record(log: Log) {
    for n in 0..10 {
        append(&log, inbox(1), numbered(n)).await;
    }
    let mut reading = Reading::join(&log, "seek", &[Topic::Inbox]).await;
    while !reading.owned.contains(&inbox(1)) {
        reading.step().await;
    }
    reading.consumer.seek(inbox(1), Offset(7)).await.expect("seeks");
    reading.until_records(3).await;
    assert_eq!(reading.got[&inbox(1)].iter().map(|record| record.offset.0).collect::<Vec<_>>(), [7, 8, 9]);
    reading.got.clear();
    reading.consumer.seek(inbox(1), Offset(2)).await.expect("seeks back");
    reading.until_records(8).await;
    assert_eq!(reading.got[&inbox(1)].first().map(|record| record.offset), Some(Offset(2)));
}

/// Nothing of a held partition is given until a seek, and the others don't wait for it.
pub async fn a_held_partition_waits_for_a_seek(log: Log) {
    for n in 0..10 {
        append(&log, inbox(n as u16 % 2), numbered(n)).await;
    }
    let mut reading = Reading::join(&log, "hold", &[Topic::Inbox]).await;
    while !reading.owned.contains(&inbox(1)) {
        reading.step().await;
    }
    reading.consumer.hold(inbox(1)).await.expect("holds");
    append(&log, inbox(1), numbered(10)).await;
    append(&log, inbox(0), numbered(11)).await;
    reading.until_records(6).await;
    reading.drain().await;
    assert_eq!((reading.got[&inbox(0)].len(), reading.got.get(&inbox(1))), (6, None));
    reading.consumer.seek(inbox(1), Offset(2)).await.expect("seeks");
    reading.until_records(10).await;
    assert_eq!(reading.got[&inbox(1)].iter().map(|record| record.offset.0).collect::<Vec<_>>(), [2, 3, 4, 5]);
}

/// A `next` that is dropped while it waits, or before it is polled to its end, loses nothing.
pub async fn next_is_cancel_safe(log: Log) {
    let mut reading = Reading::join(&log, "cancel", &[Topic::Inbox]).await;
    while reading.owned.len() < usize::from(log.partitions(Topic::Inbox)) {
        reading.step().await;
    }
    let mut expected = 0;
    for n in 0..200 {
        let patience = Duration::from_micros((n % 7) * 150);
        let (_, appended) =
            tokio::join!(tokio::time::timeout(patience, reading.step()), log.append(inbox(n as u16 % 3), numbered(n as usize)));
        appended.expect("appended");
        expected += 1;
    }
    reading.until_records(expected).await;
    for records in reading.got.values() {
        assert!(records.windows(2).all(|pair| pair[0].offset.next() == pair[1].offset));
    }
}

/// Two groups each get everything.
pub async fn groups_are_independent(log: Log) {
    let mut one = Reading::join(&log, "one", &[Topic::Inbox]).await;
    let mut two = Reading::join(&log, "two", &[Topic::Inbox]).await;
    for n in 0..30 {
        append(&log, inbox(n as u16 % 4), numbered(n)).await;
    }
    one.until_records(30).await;
    one.commit_all().await;
    two.until_records(30).await;
    assert_eq!(two.consumer.committed(inbox(0)).await, Ok(None));
}

/// Two consumers of a group end with about half of the partitions each, none with both.
pub async fn two_consumers_share(log: Log) {
    let all = usize::from(log.partitions(Topic::Inbox));
    let mut one = Reading::join(&log, "share", &[Topic::Inbox]).await;
    one.drain().await;
    assert_eq!(one.owned.len(), all);
    let before = one.owned.clone();
    let mut two = Reading::join(&log, "share", &[Topic::Inbox]).await;
    soon("the rebalance", async {
        while one.owned.len() + two.owned.len() != all || two.owned.len() < all / 2 {
            one.drain().await;
            two.drain().await;
        }
    })
    .await;
    assert!(one.owned.is_disjoint(&two.owned));
    assert!(one.owned.is_subset(&before), "who stays keeps what it had");
    assert!(one.owned.len().abs_diff(two.owned.len()) <= 1);
    for n in 0..60 {
        append(&log, inbox(n as u16 % PARTITIONS), numbered(n)).await;
    }
    soon("all records", async {
        while one.count() + two.count() < 60 {
            one.drain().await;
            two.drain().await;
        }
    })
    .await;
    assert_eq!(one.count() + two.count(), 60, "each record at one consumer");
}

/// With three consumers that come and go while records flow, every record is seen, and never by two owners at once.
pub async fn three_consumers_join_and_leave(log: Log) {
    let all = usize::from(log.partitions(Topic::Inbox));
    let mut seen: BTreeSet<(TopicPartition, Offset)> = BTreeSet::new();
    let mut members: Vec<Reading> = Vec::new();
    let mut total = 0;
    for round in 0..6 {
        if round < 3 {
            members.push(Reading::join(&log, "three", &[Topic::Inbox]).await);
        } else if members.len() > 1 {
            let mut gone = members.remove(0);
            gone.commit_all().await;
            seen.extend(gone.got.iter().flat_map(|(&partition, records)| records.iter().map(move |record| (partition, record.offset))));
        }
        for n in 0..30 {
            append(&log, inbox(n as u16 % PARTITIONS), numbered(n)).await;
            total += 1;
        }
        soon("the rebalance", async {
            loop {
                for member in &mut members {
                    member.drain().await;
                }
                let (least, most) = (members.iter().map(|m| m.owned.len()).min(), members.iter().map(|m| m.owned.len()).max());
                let owned: BTreeSet<_> = members.iter().flat_map(|member| member.owned.iter().copied()).collect();
                assert_eq!(owned.len(), members.iter().map(|member| member.owned.len()).sum::<usize>(), "one owner a partition");
                if owned.len() == all && most.zip(least).is_some_and(|(most, least)| most - least <= 1) {
                    break;
                }
            }
        })
        .await;
    }
    for member in &mut members {
        member.drain().await;
        seen.extend(member.got.iter().flat_map(|(&partition, records)| records.iter().map(move |record| (partition, record.offset))));
    }
    assert_eq!(seen.len(), total, "every record was seen");
}

/// A partition is not given away while its owner works on it, and the new owner starts where the old one committed.
pub async fn handover_waits_for_the_owner(log: Log) {
    for n in 0..40 {
        append(&log, inbox(n as u16 % 4), numbered(n)).await;
    }
    let mut old = Reading::join(&log, "handover", &[Topic::Inbox]).await;
    old.until_records(40).await;
    let mut new = Reading::join(&log, "handover", &[Topic::Inbox]).await;
    new.drain().await;
    assert!(new.owned.is_empty(), "the old owner has not been told yet");
    let before = old.owned.len();
    soon("the revocation", async {
        while old.owned.len() == before {
            old.step().await;
        }
    })
    .await;
    new.drain().await;
    assert!(new.owned.is_empty(), "the old owner has been told, but has not come back");
    old.drain().await;
    soon("the handover", async {
        while new.owned.is_empty() {
            new.step().await;
            old.drain().await;
        }
    })
    .await;
    new.drain().await;
    assert_eq!(new.count(), 0, "everything was committed by the old owner");
    drop(old);
    soon("the rest", async {
        while new.owned.len() < before {
            new.step().await;
        }
    })
    .await;
}

/// `close` commits what is queued before it returns.
pub async fn close_commits_what_is_queued(log: Log) {
    let recording = Arc::new(Recording::default());
    let sink: Arc<dyn AppendSink> = recording.clone();
    for n in 0..500 {
        log.submit(inbox(0), numbered(n), &sink, n as u64).expect("the queue has room");
    }
    soon("close", log.close()).await;
    let done = recording.done.lock();
    assert_eq!(done.len(), 500);
    assert!(done.iter().all(|(_, outcome)| outcome.is_ok()));
}

/// A closed log takes and gives nothing, and says so; waiting consumers learn of it.
pub async fn closed_log_refuses(log: Log) {
    append(&log, inbox(0), numbered(0)).await;
    let mut reading = Reading::join(&log, "closing", &[Topic::Inbox]).await;
    reading.until_records(1).await;
    let waiting = tokio::spawn(async move {
        loop {
            if let Err(error) = reading.consumer.next().await {
                return error;
            }
        }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    soon("close", log.close()).await;
    assert_eq!(soon("the consumer", waiting).await.expect("no panic"), ReadError::Closed);
    assert_eq!(log.append(inbox(0), numbered(1)).await, Err(AppendError::Closed));
    assert_eq!(log.read(inbox(0), Offset(0), 1000).await, Err(ReadError::Closed));
    assert_eq!(log.bounds(inbox(0)).await, Err(ReadError::Closed));
    assert_eq!(log.consumer("late", &[Topic::Inbox]).await.err(), Some(ReadError::Closed));
    assert_eq!(log.health(), Err(AppendError::Closed));
    soon("a second close", log.close()).await;
}
