//! A process that appends is killed with SIGKILL again and again; whatever it said was acknowledged is there.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sealpost::ids::{Offset, Partition};
use sealpost::log::embedded::{EmbeddedLog, Options, PartitionCounts};
use sealpost::log::{EventLog, Topic, TopicPartition};

const CHILD: &str = "SEALPOST_TEST_LOG_CHILD";
const PARTITIONS: u16 = 3;
const ROUNDS: u64 = 15;

fn open(dir: &Path) -> Arc<EmbeddedLog> {
    let mut options = Options::new(dir);
    options.partitions = PartitionCounts { inbox: PARTITIONS, groups: 1, directory: 1, metadata: 1, push: 0 };
    options.segment_bytes = 512 * 1024;
    EmbeddedLog::open(options).expect("a killed process never leaves a log that refuses to open")
}

fn inbox(partition: u16) -> TopicPartition {
    TopicPartition { topic: Topic::Inbox, partition: Partition(partition) }
}

/// Not a test by itself: what the killed process runs. Prints a line for each acknowledged append.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let log = open(Path::new(&dir));
    let mut tasks = Vec::new();
    for appender in 0..8u64 {
        let log = Arc::clone(&log);
        tasks.push(tokio::spawn(async move {
            for n in 0u64.. {
                let partition = (appender % u64::from(PARTITIONS)) as u16;
                let payload = Bytes::from(format!("{}:{appender}:{n} ", std::process::id()).repeat(1 + n as usize % 60));
                let offset = log.append(inbox(partition), payload.clone()).await.expect("appends");
                let line = format!("\nACK {partition} {} {}\n", offset.0, crc32c::crc32c(&payload));
                std::io::stdout().lock().write_all(line.as_bytes()).expect("the parent reads");
            }
        }));
    }
    for task in tasks {
        task.await.expect("no panic");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_loses_nothing_acknowledged() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut acknowledged: BTreeMap<(u16, u64), u32> = BTreeMap::new();
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().expect("known"))
            .args(["child", "--exact", "--nocapture"])
            .env(CHILD, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts");
        let output = child.stdout.take().expect("piped");
        let reader = std::thread::spawn(move || {
            let mut lines = Vec::new();
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                let fields: Vec<u64> = line.split(' ').skip(1).filter_map(|field| field.parse().ok()).collect();
                // The last line may be cut off; then it lacks its end and is no acknowledgement.
                if line.starts_with("ACK ") && fields.len() == 3 {
                    lines.push((fields[0] as u16, fields[1], fields[2] as u32));
                }
            }
            // A line that was cut off in its last number can't be told from a whole one.
            lines.pop();
            lines
        });
        tokio::time::sleep(Duration::from_millis(150 + round * 37 % 250)).await;
        child.kill().expect("SIGKILL");
        child.wait().expect("ends");
        for (partition, offset, crc) in reader.join().expect("no panic") {
            assert_eq!(acknowledged.insert((partition, offset), crc), None, "offset {offset} of {partition} was given twice");
        }
        let log = open(dir.path());
        let mut found = BTreeMap::new();
        for partition in 0..PARTITIONS {
            let (mut from, end) = log.bounds(inbox(partition)).await.expect("exists");
            assert_eq!(from, Offset(0));
            while from < end {
                for record in log.read(inbox(partition), from, 1 << 20).await.expect("readable") {
                    assert_eq!(record.offset, from);
                    found.insert((partition, from.0), crc32c::crc32c(&record.payload));
                    from = from.next();
                }
            }
        }
        for (place, crc) in &acknowledged {
            assert_eq!(found.get(place), Some(crc), "round {round}: the record at {place:?}");
        }
        if round % 3 == 0 {
            log.close().await;
        }
    }
    println!("{ROUNDS} kills, {} acknowledged appends, all there", acknowledged.len());
    assert!(acknowledged.len() > 100);
}
