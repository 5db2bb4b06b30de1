//! The embedded log when things go wrong: failed writes and syncs, full disks, damage, power loss.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sealpost::clock::{ManualClock, SeededRandom, UnixMillis};
use sealpost::ids::{Offset, Partition};
use sealpost::log::embedded::sim::{Faults, SimDisk};
use sealpost::log::embedded::{EmbeddedLog, OpenError, Options, PartitionCounts, Retention};
use sealpost::log::{AppendError, Consumed, EventLog, ReadError, Topic, TopicPartition};
use tempfile::TempDir;

const COUNTS: PartitionCounts = PartitionCounts { inbox: 3, groups: 1, directory: 2, metadata: 1, push: 0 };

fn inbox(partition: u16) -> TopicPartition {
    TopicPartition { topic: Topic::Inbox, partition: Partition(partition) }
}

fn directory(partition: u16) -> TopicPartition {
    TopicPartition { topic: Topic::Directory, partition: Partition(partition) }
}

fn options(dir: &Path, disk: &SimDisk) -> Options {
    let mut options = Options::new(dir);
    options.partitions = COUNTS;
    options.segment_bytes = 64 * 1024;
    options.disk = Arc::new(disk.clone());
    options.random = Arc::new(SeededRandom::new(7));
    options.clock = Arc::new(ManualClock::new(UnixMillis(1_000)));
    options
}

fn payload(n: usize) -> Bytes {
    Bytes::from(format!("payload {n} ").repeat(1 + n % 20))
}

async fn read_all(log: &EmbeddedLog, of: TopicPartition) -> Vec<(u64, Bytes)> {
    let (mut from, end) = log.bounds(of).await.expect("exists");
    let mut out = Vec::new();
    while from < end {
        let records = log.read(of, from, 8 * 1024).await.expect("readable");
        from = records.last().expect("not at the end").offset.next();
        out.extend(records.into_iter().map(|record| (record.offset.0, record.payload)));
    }
    out
}

#[tokio::test]
async fn a_failed_sync_poisons() {
    let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
    let log = EmbeddedLog::open(options(dir.path(), &disk)).expect("opens");
    log.append(inbox(0), payload(0)).await.expect("works");
    disk.set(Faults { syncs_left: Some(0), ..Faults::default() });
    let error = log.append(inbox(0), payload(1)).await.expect_err("the sync fails");
    assert!(matches!(error, AppendError::Poisoned(_)) && error.outcome_unknown(), "{error}");
    disk.set(Faults::default());
    assert!(matches!(log.append(inbox(0), payload(2)).await, Err(AppendError::Poisoned(_))), "it stays poisoned");
    assert!(matches!(log.health(), Err(AppendError::Poisoned(_))));
    assert_eq!(read_all(&log, inbox(0)).await, [(0, payload(0))], "what is not durable is not seen");
    log.close().await;

    // The bytes of record 1 are in the page cache but not on disk. Opening makes sure of what it shows.
    let log = EmbeddedLog::open(options(dir.path(), &disk)).expect("opens");
    let seen = read_all(&log, inbox(0)).await;
    assert_eq!(seen.first(), Some(&(0, payload(0))));
    drop(log);
    let rest = disk.power_off(1);
    let log = EmbeddedLog::open(options(dir.path(), &rest)).expect("opens");
    assert_eq!(read_all(&log, inbox(0)).await, seen, "what was seen after a restart survives a power loss");
}

#[tokio::test]
async fn a_failed_write_poisons_everything_that_waits() {
    for writes in 1..3 {
        let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
        let log = EmbeddedLog::open(options(dir.path(), &disk)).expect("opens");
        log.append(inbox(0), payload(0)).await.expect("works");
        disk.set(Faults { writes_left: Some(writes), ..Faults::default() });
        let mut tasks = Vec::new();
        for n in 0..200u16 {
            let log = Arc::clone(&log);
            tasks.push(tokio::spawn(async move {
                log.append(inbox(n % 3), payload(n.into())).await?;
                log.append(inbox(n % 3), payload(n.into())).await
            }));
        }
        let mut poisoned = 0;
        for task in tasks {
            match task.await.expect("no panic") {
                Ok(_) => {}
                Err(AppendError::Poisoned(_)) => poisoned += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(poisoned > 0);
        let acknowledged = read_all(&log, inbox(0)).await;
        drop(log);
        let rest = disk.power_off(u64::from(writes));
        let log = EmbeddedLog::open(options(dir.path(), &rest)).expect("opens");
        assert!(read_all(&log, inbox(0)).await.starts_with(&acknowledged));
        log.append(inbox(0), payload(1)).await.expect("works again");
    }
}

#[tokio::test]
async fn short_writes_are_completed() {
    let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
    disk.set(Faults { write_max: Some(1000), ..Faults::default() });
    let log = EmbeddedLog::open(options(dir.path(), &disk)).expect("opens");
    for n in 0..100 {
        log.append(inbox(0), Bytes::from(vec![n; 3000])).await.expect("works");
    }
    log.close().await;
    let log = EmbeddedLog::open(options(dir.path(), &disk)).expect("opens");
    assert_eq!(read_all(&log, inbox(0)).await.len(), 100);
}

/// Appends until one is refused; returns how many were taken.
async fn append_until_refused(log: &EmbeddedLog, size: usize) -> (usize, AppendError) {
    for n in 0..100_000 {
        if let Err(error) = log.append(inbox(0), Bytes::from(vec![n as u8; size])).await {
            return (n, error);
        }
    }
    panic!("the disk never runs full");
}

/// Runs full, says so, keeps what it has, and goes on once there is room.
async fn runs_full_and_goes_on(log: Arc<EmbeddedLog>, make_room: impl FnOnce(), reopen: impl FnOnce() -> Arc<EmbeddedLog>) {
    let (taken, error) = append_until_refused(&log, 1000).await;
    assert!(matches!(error, AppendError::Unavailable(_)) && !error.outcome_unknown(), "{error}");
    assert!(matches!(log.health(), Err(AppendError::Unavailable(_))));
    assert_eq!(read_all(&log, inbox(0)).await.len(), taken, "reading goes on");
    assert!(matches!(log.append(inbox(0), Bytes::from(vec![0; 1000])).await, Err(AppendError::Unavailable(_))), "still full");
    make_room();
    for _ in 0..500 {
        if log.health().is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(log.health(), Ok(()), "it notices by itself that there is room");
    assert_eq!(log.append(inbox(0), payload(1)).await, Ok(Offset(taken as u64)), "no offset was lost");
    assert_eq!(log.health(), Ok(()));
    log.close().await;
    drop(log);
    let log = reopen();
    assert_eq!(read_all(&log, inbox(0)).await.len(), taken + 1);
}

#[tokio::test]
async fn a_full_disk_refuses_and_recovers() {
    let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
    disk.set(Faults { capacity: Some(300 * 1024), ..Faults::default() });
    let log = EmbeddedLog::open(options(dir.path(), &disk)).expect("opens");
    let make_room = || disk.set(Faults { capacity: Some(3_000 * 1024), ..Faults::default() });
    runs_full_and_goes_on(log, make_room, || EmbeddedLog::open(options(dir.path(), &disk)).expect("opens")).await;
}

/// A file system of our own, unmounted when it is dropped.
struct Mount(std::path::PathBuf);

impl Mount {
    fn tmpfs(at: &Path, options: &str) -> Option<Self> {
        let output = std::process::Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(at).output();
        output.is_ok_and(|output| output.status.success()).then(|| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(&self.0).status();
        assert!(unmounted.is_ok_and(|status| status.success()), "unmounts");
    }
}

/// On a real file system of 3 MiB. Needs root.
#[tokio::test]
async fn a_really_full_disk_refuses_and_recovers() {
    let dir = TempDir::new().expect("folder");
    let Some(_mount) = Mount::tmpfs(dir.path(), "size=3m") else {
        println!("SKIPPED: mounting a tmpfs is not permitted here, so no disk of our own can be filled");
        return;
    };
    let open = || {
        let mut options = Options::new(dir.path().join("log"));
        options.partitions = COUNTS;
        options.segment_bytes = 256 * 1024;
        EmbeddedLog::open(options).expect("opens")
    };
    let ballast = dir.path().join("ballast");
    std::fs::write(&ballast, vec![1; 1024 * 1024]).expect("there is room");
    runs_full_and_goes_on(open(), || std::fs::remove_file(&ballast).expect("removes"), open).await;
}

/// A log of several segments on a simulated disk, each append its own commit; not closed. With the end of the active
/// segment's chunks as (start, records acknowledged before).
async fn sample(dir: &Path, close: bool) -> (SimDisk, Vec<(u64, usize)>) {
    let disk = SimDisk::default();
    let log = EmbeddedLog::open(options(dir, &disk)).expect("opens");
    let active = |disk: &SimDisk| last_segment(disk);
    let mut chunks = Vec::new();
    let mut count = 0;
    // Until the second segment has a few chunks.
    while chunks.len() < 5 {
        let before = active(&disk);
        log.append(inbox(0), payload(count)).await.expect("works");
        if let Some((path, start)) = before
            && path.to_string_lossy().contains("002.seg")
        {
            chunks.push((start, count));
        }
        count += 1;
    }
    if close {
        log.close().await;
    }
    drop(log);
    (disk, chunks)
}

/// The last segment with chunks, and where its last one ends.
fn last_segment(disk: &SimDisk) -> Option<(std::path::PathBuf, u64)> {
    use sealpost::log::embedded::format::{self, CHUNK_ALIGN, SEGMENT_HEADER_BYTES, SegmentHeader, align};
    let segments = disk.names().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "seg"));
    let mut last = None;
    for path in segments {
        let bytes = disk.bytes(&path)?;
        let header = SegmentHeader::decode(&bytes).ok()?;
        let mut at = SEGMENT_HEADER_BYTES;
        while let Ok(head) = format::chunk_head(&bytes[at.min(bytes.len())..], header.salt) {
            at = align(at as u64 + u64::from(head.len), CHUNK_ALIGN) as usize;
        }
        if at > SEGMENT_HEADER_BYTES {
            last = Some((path, at as u64));
        }
    }
    last
}

/// Opens a damaged log: either it refuses with a reason, or it has at least `acknowledged` records, all of them right.
async fn judge(dir: &Path, disk: &SimDisk, acknowledged: usize, what: &str) -> Option<usize> {
    match EmbeddedLog::open(options(dir, disk)) {
        Err(error) => {
            assert!(matches!(error, OpenError::Damaged { .. }), "{what}: {error}");
            assert!(error.to_string().contains("backup") || error.to_string().contains(".seg"), "{error}");
            None
        }
        Ok(log) => {
            let records = read_all(&log, inbox(0)).await;
            for (n, (offset, bytes)) in records.iter().enumerate() {
                assert_eq!((*offset, bytes), (n as u64, &payload(n)), "{what}: a wrong record");
            }
            assert!(records.len() >= acknowledged, "{what}: {} of {acknowledged} acknowledged records", records.len());
            let next = log.append(inbox(0), payload(records.len())).await;
            assert_eq!(next, Ok(Offset(records.len() as u64)), "{what}: it goes on");
            Some(records.len())
        }
    }
}

/// Every byte of the last chunks is damaged, one at a time.
#[tokio::test]
async fn crash_sweep_corrupted() {
    let dir = TempDir::new().expect("folder");
    let (disk, chunks) = sample(dir.path(), false).await;
    let (path, end) = last_segment(&disk).expect("has chunks");
    let &(last, before) = chunks.last().expect("has chunks");
    let total = before + 1;
    let (mut refused, mut cut) = (0, 0);
    for at in chunks[2].0..end {
        for flip in [0x01, 0xff] {
            let copy = disk.copy();
            copy.edit(&path, |bytes| bytes[at as usize] ^= flip);
            // Nothing tells damage to the very last chunk from a commit that a crash cut off.
            let acknowledged = if at >= last { before } else { total };
            match judge(dir.path(), &copy, acknowledged, &format!("byte {at} ^ {flip:#x}")).await {
                None => refused += 1,
                Some(found) => cut += usize::from(found < total),
            }
        }
    }
    assert!(refused > 100 && cut > 100, "refused {refused}, cut {cut}");
}

/// After a close the last record is confirmed as well: damage to it is never taken for an unfinished commit.
#[tokio::test]
async fn crash_sweep_corrupted_after_close() {
    let dir = TempDir::new().expect("folder");
    let (disk, chunks) = sample(dir.path(), true).await;
    let (path, end) = last_segment(&disk).expect("has chunks");
    let &(last, before) = chunks.last().expect("has chunks");
    for at in last..end {
        let copy = disk.copy();
        copy.edit(&path, |bytes| bytes[at as usize] ^= 0x10);
        judge(dir.path(), &copy, before + 1, &format!("byte {at}")).await;
    }
}

/// The last write reached the disk up to some byte only, or in some sectors only; or files are shorter than they were.
#[tokio::test]
async fn crash_sweep_torn_and_truncated() {
    let dir = TempDir::new().expect("folder");
    let (disk, chunks) = sample(dir.path(), false).await;
    let (path, end) = last_segment(&disk).expect("has chunks");
    let &(last, before) = chunks.last().expect("has chunks");
    for at in last..end {
        let copy = disk.copy();
        copy.edit(&path, |bytes| bytes[at as usize..end as usize].fill(0));
        let found = judge(dir.path(), &copy, before, &format!("zero from byte {at}")).await;
        assert!(found.is_some(), "an unfinished commit is no reason to refuse");
    }
    let sectors = ((end - last) / 512) as usize;
    for lost in 1..1usize << sectors.min(8) {
        let copy = disk.copy();
        let lose = |bytes: &mut Vec<u8>| {
            for sector in (0..sectors).filter(|sector| lost & (1 << sector) != 0) {
                let start = last as usize + sector * 512;
                bytes[start..start + 512].fill(0);
            }
        };
        copy.edit(&path, lose);
        assert!(judge(dir.path(), &copy, before, &format!("sectors {lost:b} lost")).await.is_some());
    }
    for len in (0..end).rev().step_by(97).chain(0..64) {
        let copy = disk.copy();
        copy.edit(&path, |bytes| bytes.truncate(len as usize));
        assert_eq!(judge(dir.path(), &copy, 0, &format!("{len} bytes left")).await, None, "a file that is cut off is refused");
    }
}

#[tokio::test]
async fn what_is_missing_or_foreign_is_refused() {
    let dir = TempDir::new().expect("folder");
    let (disk, _) = sample(dir.path(), true).await;
    let refusal = |disk: &SimDisk, change: &dyn Fn(&mut Options)| {
        let mut options = options(dir.path(), disk);
        change(&mut options);
        EmbeddedLog::open(options).expect_err("must refuse").to_string()
    };
    let without = |suffix: &str| {
        use sealpost::log::embedded::disk::Disk as _;
        let copy = disk.copy();
        let path = copy.names().into_iter().find(|path| path.to_string_lossy().ends_with(suffix)).expect("exists");
        copy.remove(&path).expect("removes");
        copy
    };
    assert!(refusal(&without("meta"), &|_| ()).contains("meta"));
    let more = refusal(&disk.copy(), &|options| options.partitions.inbox = 4);
    assert!(more.contains("made with 3 partitions of topic inbox") && more.contains("set it back to 3"), "{more}");
    assert!(refusal(&disk.copy(), &|options| options.segment_bytes = 100).contains("at least"));
    assert!(refusal(&disk.copy(), &|options| options.partitions.groups = 0).contains("groups"));

    let copy = disk.copy();
    let positions = dir.path().join("positions");
    copy.edit(&positions, |bytes| bytes.push(b'x'));
    if copy.bytes(&positions).is_some() {
        assert!(refusal(&copy, &|_| ()).contains("checksum"));
    }
    // The first of two segments: the second one does not start at the beginning.
    let first = disk.names().into_iter().find(|path| path.to_string_lossy().ends_with("001.seg")).expect("exists");
    let copy = disk.copy();
    copy.edit(&first, |bytes| bytes[4096 + 60] ^= 1);
    assert!(refusal(&copy, &|_| ()).contains("001.seg"));
    let copy = disk.copy();
    copy.edit(&first, |bytes| {
        let end = bytes.len();
        bytes[60 * 1024..end].fill(0);
    });
    let text = refusal(&copy, &|_| ());
    assert!(text.contains("001.seg at byte") && text.contains("should follow"), "{text}");
}

#[tokio::test]
async fn a_damaged_record_is_never_delivered() {
    let dir = TempDir::new().expect("folder");
    let disk = SimDisk::default();
    let mut small = options(dir.path(), &disk);
    small.tail_bytes = 0;
    let log = EmbeddedLog::open(small).expect("opens");
    for n in 0..20 {
        log.append(inbox(0), payload(n)).await.expect("works");
    }
    let (path, _) = last_segment(&disk).expect("has chunks");
    disk.edit(&path, |bytes| {
        let at = bytes.windows(10).position(|window| window == &payload(7)[..10]).expect("is there");
        bytes[at + 3] ^= 1;
    });
    assert!(matches!(log.read(inbox(0), Offset(7), 1).await, Err(ReadError::Corrupt(_))));
    assert_eq!(log.read(inbox(0), Offset(8), 1).await.expect("the next is whole")[0].payload, payload(8));
    disk.set(Faults { reads_fail: true, ..Faults::default() });
    assert!(matches!(log.read(inbox(0), Offset(8), 1).await, Err(ReadError::Unavailable(_))));
    disk.set(Faults::default());
    assert!(log.read(inbox(0), Offset(21), 1).await.is_err(), "a position past the end is not the end");
}

/// Everything about retention: age, groups, size cap, directory records, offsets that are never used again.
#[tokio::test]
async fn retention_keeps_what_it_must() {
    let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
    let clock = ManualClock::new(UnixMillis(1_000));
    let open = |bytes| {
        let mut options = options(dir.path(), &disk);
        options.clock = Arc::new(clock.clone());
        options.tail_bytes = 0;
        options.retention = Retention { age_ms: Some(60_000), bytes };
        EmbeddedLog::open(options).expect("opens")
    };
    let log = open(None);
    let mut consumer = log.consumer("projector", &[Topic::Inbox]).await.expect("joins");
    let fill = |log: Arc<EmbeddedLog>, from: usize| async move {
        for n in from..from + 300 {
            log.append(inbox(0), Bytes::from(vec![n as u8; 1000])).await.expect("works");
            if n % 20 == 0 {
                log.append(directory(1), payload(n)).await.expect("works");
            }
        }
    };
    fill(Arc::clone(&log), 0).await;
    let segments = |disk: &SimDisk| disk.names().iter().filter(|path| path.to_string_lossy().ends_with(".seg")).count();
    let many = segments(&disk);
    assert!(many > 4);
    log.retain().expect("runs");
    // One more may have been made ready meanwhile.
    assert!(segments(&disk) >= many, "nothing is old enough");
    clock.advance(61_000);
    log.retain().expect("runs");
    assert!(segments(&disk) >= many, "the group has committed nothing");
    while !matches!(consumer.next().await.expect("consumes"), Consumed::Assigned(_)) {}
    consumer.commit(inbox(0), Offset(300)).await.expect("commits");
    log.retain().expect("runs");
    let few = segments(&disk);
    assert!(few < many, "old segments go once the group is past them");
    let (earliest, next) = log.bounds(inbox(0)).await.expect("exists");
    assert!(earliest > Offset(100) && next == Offset(300));
    assert_eq!(log.read(inbox(0), Offset(0), 1).await, Err(ReadError::Gone { asked: Offset(0), earliest }));
    let kept: Vec<(u64, Bytes)> = (0..300).step_by(20).enumerate().map(|(n, number)| (n as u64, payload(number))).collect();
    assert_eq!(read_all(&log, directory(1)).await, kept, "directory records stay");
    log.truncate_before(directory(1), Offset(3)).await.expect("truncates");

    // After a restart, too; and they survive their new segments' age as well, again and again.
    drop(consumer);
    drop(log);
    let log = open(None);
    assert_eq!(log.bounds(inbox(0)).await, Ok((earliest, next)));
    assert_eq!(read_all(&log, directory(1)).await, kept[3..]);
    for round in 1..4 {
        fill(Arc::clone(&log), 300 * round).await;
        clock.advance(61_000);
        let mut consumer = log.consumer("projector", &[Topic::Inbox]).await.expect("joins");
        while !matches!(consumer.next().await.expect("consumes"), Consumed::Assigned(_)) {}
        consumer.commit(inbox(0), log.bounds(inbox(0)).await.expect("exists").1).await.expect("commits");
        log.retain().expect("runs");
        assert_eq!(read_all(&log, directory(1)).await[..12], kept[3..]);
    }
    let next = log.bounds(inbox(0)).await.expect("exists").1;
    assert_eq!(log.append(inbox(0), payload(0)).await, Ok(next));
    let directory_now = read_all(&log, directory(1)).await;
    log.close().await;
    drop(log);

    // The size cap goes before the group.
    let log = open(Some(200 * 1024));
    fill(Arc::clone(&log), 1200).await;
    log.retain().expect("runs");
    let total = disk
        .names()
        .iter()
        .filter(|path| path.to_string_lossy().ends_with(".seg"))
        .map(|path| disk.bytes(path).map_or(0, |b| b.len()))
        .sum::<usize>();
    assert!(total <= (200 + 64) * 1024, "{total}: the cap, and one segment made ahead");
    let mut consumer = log.consumer("projector", &[Topic::Inbox]).await.expect("joins");
    while !matches!(consumer.next().await.expect("consumes"), Consumed::Assigned(_)) {}
    let Err(ReadError::Gone { asked, earliest }) = consumer.next().await else { panic!("what was not consumed is gone") };
    assert!(asked < earliest);
    consumer.seek(inbox(0), earliest).await.expect("seeks");
    let Ok(Consumed::Records(batch)) = consumer.next().await else { panic!("goes on") };
    assert_eq!(batch[0].1[0].offset, earliest);
    assert_eq!(read_all(&log, directory(1)).await[..directory_now.len()], directory_now, "directory records stay even so");
}

/// Offsets go on after all records of a partition are gone, also over a restart.
#[tokio::test]
async fn offsets_survive_their_records() {
    let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
    let clock = ManualClock::new(UnixMillis(1_000));
    let open = || {
        let mut options = options(dir.path(), &disk);
        options.clock = Arc::new(clock.clone());
        options.retention = Retention { age_ms: Some(1_000), bytes: None };
        EmbeddedLog::open(options).expect("opens")
    };
    let log = open();
    for n in 0..5 {
        log.append(inbox(2), payload(n)).await.expect("works");
    }
    for n in 0..200 {
        log.append(inbox(0), Bytes::from(vec![n; 1000])).await.expect("works");
    }
    clock.advance(10_000);
    log.retain().expect("runs");
    assert_eq!(log.bounds(inbox(2)).await, Ok((Offset(5), Offset(5))));
    drop(log);
    let log = open();
    assert_eq!(log.bounds(inbox(2)).await, Ok((Offset(5), Offset(5))));
    assert_eq!(log.append(inbox(2), payload(9)).await, Ok(Offset(5)));
}

/// A start reads the summaries of old segments, and scans where there is none.
#[tokio::test]
async fn summaries_are_only_a_help() {
    let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
    let log = EmbeddedLog::open(options(dir.path(), &disk)).expect("opens");
    for n in 0..600 {
        log.append(inbox(n as u16 % 3), Bytes::from(vec![n as u8; 1000])).await.expect("works");
    }
    let expected = read_all(&log, inbox(1)).await;
    let summaries = |disk: &SimDisk| disk.names().into_iter().filter(|path| path.to_string_lossy().ends_with(".sum")).collect::<Vec<_>>();
    for _ in 0..100 {
        if summaries(&disk).len() >= 5 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    log.close().await;
    assert!(summaries(&disk).len() >= 5);
    type Change<'a> = &'a dyn Fn(&SimDisk, usize, &Path);
    let variants: [Change<'_>; 3] = [
        &|_, _, _| (),
        &|disk, n, path| {
            use sealpost::log::embedded::disk::Disk as _;
            if n.is_multiple_of(2) {
                disk.remove(path).expect("removes");
            }
        },
        &|disk, _, path| disk.edit(path, |bytes| bytes[20] ^= 1),
    ];
    for change in variants {
        let copy = disk.copy();
        for (n, path) in summaries(&copy).iter().enumerate() {
            change(&copy, n, path);
        }
        let log = EmbeddedLog::open(options(dir.path(), &copy)).expect("opens");
        assert_eq!(read_all(&log, inbox(1)).await, expected);
        assert_eq!(log.append(inbox(1), payload(0)).await, Ok(Offset(200)));
    }
}

/// At full speed the next segment is needed before it is filled with zeros; it is taken as it is.
#[tokio::test]
async fn a_segment_that_is_needed_early_is_taken_unfinished() {
    let (dir, disk) = (TempDir::new().expect("folder"), SimDisk::default());
    let open = || {
        let mut options = options(dir.path(), &disk);
        options.segment_bytes = 16 * 1024 * 1024;
        options.tail_bytes = 0;
        EmbeddedLog::open(options).expect("opens")
    };
    let log = open();
    let started = std::time::Instant::now();
    for n in 0..400usize {
        log.append(inbox(n as u16 % 3), Bytes::from(vec![n as u8; 100_000])).await.expect("works");
    }
    println!("40 MB in {:?}", started.elapsed());
    drop(log);
    let disk = disk.power_off(3);
    let mut options = options(dir.path(), &disk);
    options.segment_bytes = 16 * 1024 * 1024;
    let log = EmbeddedLog::open(options).expect("opens");
    for n in 0..400u64 {
        let records = log.read(inbox(n as u16 % 3), Offset(n / 3), 1).await.expect("readable");
        assert_eq!((records[0].payload.len(), records[0].payload[0]), (100_000, n as u8));
    }
}
