//! Topic `metadata`, from the broker to an analyst's report: its numbers are the load tool's, over a `kill -9` in between, and nothing in it
//! names an account or holds content.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "support/member.rs"]
mod member;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use member::Member;
use reqwest::{Method, StatusCode};
use sealpost::cli::canary::Canary;
use sealpost::cli::child::BrokerProcess;
use sealpost::cli::load::{Plan, Progress, Report, on_own_thread, traffic};
use sealpost::client::core::groups::Change;
use sealpost::clock::{Clock as _, ManualClock, SystemClock, SystemRandom};
use sealpost::config::{Config, Role};
use sealpost::ids::{GroupId, Offset, Partition};
use sealpost::limits;
use sealpost::log::embedded::{EmbeddedLog, LogObserver, Options};
use sealpost::log::{EventLog, PartitionCounts, Topic, TopicPartition};
use sealpost::metadata::tail::{From, Tail};
use sealpost::testing::cluster::TestCluster;
use sealpost::testing::{Broker, send_frame};
use sealpost::wire::event::{self, DirectoryChange, DirectoryCommand, InboxEvent};
use sealpost::wire::metadata::{MetadataKind as Kind, MetadataRecord};
use sealpost::wire::stream::{client_frame, server_frame::Frame};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_sealpost");
const PAYLOAD: usize = 700;

fn traffic_plan(server: url::Url) -> Plan {
    let mut plan = Plan::new(server);
    (plan.senders, plan.recipients, plan.peers, plan.window, plan.payload) = (6, 5, 5, 8, PAYLOAD);
    (plan.length, plan.grace) = (Duration::from_secs(4), Duration::from_secs(30));
    plan
}

/// What `sealpost metadata tail --json --from-start` prints, repeats and all.
fn tail(args: &[&str], env: &[(&str, &str)]) -> String {
    let tail = Command::new(PROGRAM).args(["metadata", "tail", "--json", "--from-start"]).args(args).envs(env.iter().copied()).output();
    let tail = tail.unwrap();
    assert!(tail.status.success(), "{}", String::from_utf8_lossy(&tail.stderr));
    String::from_utf8(tail.stdout).unwrap()
}

/// How many different steps of each kind.
fn kinds(lines: &str) -> BTreeMap<String, usize> {
    let mut seen = BTreeSet::new();
    let mut kinds = BTreeMap::new();
    for line in lines.lines() {
        let step: Value = serde_json::from_str(line).unwrap();
        if seen.insert(step["event_id"].as_str().unwrap().to_owned()) {
            *kinds.entry(step["kind"].as_str().unwrap().to_owned()).or_default() += 1;
        }
    }
    kinds
}

/// Waits until acknowledgements of the last messages have been applied and their window has ended.
async fn settled(report: &Report, tail: impl Fn() -> String) -> String {
    let began = Instant::now();
    loop {
        let lines = tail();
        let kinds = kinds(&lines);
        let of = |kind| kinds.get(kind).copied().unwrap_or(0) as u64;
        if (of("accepted"), of("delivered")) == (report.accepted, report.delivered) {
            return lines;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "not within 20 s: {kinds:?}, but {report:?}");
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

/// Everything in a topic of a stopped broker's log.
async fn payloads(log: &dyn EventLog, topic: Topic) -> Vec<bytes::Bytes> {
    let mut out = Vec::new();
    for number in 0..log.partitions(topic) {
        let tp = TopicPartition { topic, partition: Partition(number) };
        let mut next = log.bounds(tp).await.unwrap().0;
        loop {
            let records = log.read(tp, next, 4 << 20).await.unwrap();
            let Some(last) = records.last() else { break };
            next = Offset(last.offset.0 + 1);
            out.extend(records.into_iter().map(|record| record.payload));
        }
    }
    out
}

/// A Python with the packages of `topology/analytics`; `None`, said on stderr, if there is none.
fn python() -> Option<PathBuf> {
    let analytics = Path::new(env!("CARGO_MANIFEST_DIR")).join("topology/analytics");
    let works = |python: &Path| {
        Command::new(python)
            .args(["-c", "import duckdb, pyarrow, google.protobuf"])
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    };
    let named = std::env::var_os("SEALPOST_TEST_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    if works(&named) {
        return Some(named);
    }
    // Kept for the next run, beside what cargo builds.
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("analytics-venv");
    let python = venv.join("bin/python");
    if works(&python) {
        return Some(python);
    }
    let run = |command: &mut Command| command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    let installed = run(Command::new(&named).args(["-m", "venv"]).arg(&venv))
        && run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "-r"]).arg(analytics.join("requirements.txt")));
    if !installed || !works(&python) {
        eprintln!("metadata: the analytics are skipped, since pip can't install topology/analytics/requirements.txt");
        return None;
    }
    Some(python)
}

fn analytics(python: &Path, script: &str, args: &[&str], stdin: &str) -> Value {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("topology/analytics");
    let command = Command::new(python)
        .arg(folder.join(script))
        .args(args)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut command = command.unwrap();
    let (mut input, text) = (command.stdin.take().unwrap(), stdin.to_owned());
    let writing = std::thread::spawn(move || input.write_all(text.as_bytes()));
    let done = command.wait_with_output().unwrap();
    // A script that does not read has closed it.
    let _ = writing.join().unwrap();
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    serde_json::from_slice(&done.stdout).unwrap()
}

fn check_totals(found: &Value, report: &Report) {
    let totals = &found["totals"][0];
    assert_eq!(totals["accepted"], report.accepted);
    assert_eq!(totals["delivered"], report.delivered);
    assert_eq!(totals["steps"], totals["distinct_steps"]);
    let sum = |query: &str, column: &str| found[query].as_array().unwrap().iter().map(|row| row[column].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("messages_per_day", "messages"), report.accepted);
    assert_eq!(sum("delivery_latency_ms", "delivered"), report.delivered);
    assert_eq!(sum("expiry_per_day", "expired"), 0);
    let devices = found["active_per_day"].as_array().unwrap().iter().map(|row| row["devices"].as_u64().unwrap()).max().unwrap();
    assert_eq!(devices, report.devices, "every device of the load was active");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_numbers_are_those_of_the_load_over_a_kill_and_it_names_nobody() {
    let folder = tempfile::tempdir().unwrap();
    // On, whatever the default is.
    let program = folder.path().join("sealpost");
    std::fs::write(&program, format!("#!/bin/sh\nSEALPOST_METADATA__ENABLED=true exec '{PROGRAM}' \"$@\"\n")).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let data = folder.path().join("data");
    let mut broker = BrokerProcess::start(&program, &data, &folder.path().join("log")).await.unwrap();
    let plan = traffic_plan(broker.url());
    let load = tokio::spawn(on_own_thread(move || traffic::run(plan, Progress::quiet())));
    tokio::time::sleep(Duration::from_secs(3)).await;
    broker.kill9();
    broker.restart().await.unwrap();
    let report = load.await.unwrap().unwrap();
    assert!(report.clean() && report.accepted > 200 && report.server_restarts > 0, "{report:?}");

    // While the broker runs and has its folder locked.
    let data_arg = data.to_str().unwrap();
    let lines = settled(&report, || tail(&["--data", data_arg], &[])).await;
    let found = kinds(&lines);
    assert_eq!(found["device_registered"] as u64, report.devices, "{found:?}");
    assert!(found["account_created"] == found["identity_linked"] && !found.contains_key("expired"), "{found:?}");
    for line in lines.lines() {
        let step: Value = serde_json::from_str(line).unwrap();
        if step["kind"] == "delivered" {
            assert_eq!(step["size_bucket"], 800, "{PAYLOAD} bytes, and what stands around them, in multiples of 160: {step}");
            assert!(step["latency_ms"].as_u64().unwrap() < 60_000, "{step}");
        }
    }
    let newest = Command::new(PROGRAM).args(["metadata", "tail", "--data", data_arg, "-n", "3"]).output().unwrap();
    assert_eq!(String::from_utf8(newest.stdout).unwrap().lines().count(), 3);
    assert!(broker.stop(Duration::from_secs(30)).await.unwrap());

    names_nobody(&data).await;
    // A view made anew from the log writes nothing again.
    let before = tail(&["--data", data_arg], &[]).lines().count();
    let config = Config { data: data.clone(), ..Config::default() };
    sealpost::server::rebuild(&config, |_| {}).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1_100)).await;
    assert_eq!(tail(&["--data", data_arg], &[]).lines().count(), before);

    let Some(python) = python() else { return };
    let out = folder.path().join("landed");
    let out = out.to_str().unwrap();
    let landed = analytics(&python, "land.py", &["--out", out], &lines);
    assert_eq!(landed["landed"].as_u64().unwrap() as usize, found.values().sum::<usize>());
    let again = analytics(&python, "land.py", &["--out", out], &lines);
    assert_eq!(again["landed"], 0, "what was landed is not landed again");
    check_totals(&analytics(&python, "report.py", &[out, "--json"], ""), &report);
    let unit = Command::new(&python)
        .args(["-m", "unittest", "--quiet"])
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("topology/analytics"))
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .output()
        .unwrap();
    assert!(unit.status.success(), "{}", String::from_utf8_lossy(&unit.stderr));
}

/// Searches the topic's bytes for what must not be there, and the log for the same, where it must.
async fn names_nobody(data: &Path) {
    let partitions = PartitionCounts { directory: 16, ..PartitionCounts::default() };
    let log = EmbeddedLog::open(Options { partitions, ..Options::new(data.join("log")) }).unwrap();
    let metadata = payloads(log.as_ref(), Topic::Metadata).await.concat();
    assert!(metadata.len() > 10_000, "there is something to search");
    let directory = payloads(log.as_ref(), Topic::Directory).await;
    let commands: Vec<DirectoryCommand> = directory.iter().map(|payload| event::decode_owned(payload).unwrap()).collect();
    let mut canary = Canary::new();
    for command in &commands {
        // As bytes, as hex, as base64 …, and as the text that people see.
        assert!(canary.add(command.account.as_bytes()) && canary.add(command.account.to_string().as_bytes()));
        if let DirectoryChange::RegisterDevice { identity, device } = &command.change {
            assert!(canary.add(identity.to_string().as_bytes()) && canary.add(&device.credential_hash) && canary.add(&device.identity_key));
        }
    }
    assert!(directory.iter().all(|payload| canary.count(payload) > 0), "the search finds what is there");
    let mut pieces = 0;
    for payload in payloads(log.as_ref(), Topic::Inbox).await {
        let InboxEvent::EnvelopesAccepted(accepted) = event::decode(&payload).unwrap() else { continue };
        // Nonce, pieces of the ciphertext, tag.
        let sealed = accepted.envelopes[0].sealed;
        for at in [0, 12, 60, sealed.len() - 16] {
            assert!(canary.add(&sealed[at..at + 12]));
            pieces += 1;
        }
        if pieces >= 200 {
            break;
        }
    }
    assert_eq!(pieces, 200);
    assert_eq!(canary.count(&metadata), 0, "an id or a payload is in the metadata");
    log.close().await;
    let secret = std::fs::metadata(data.join("metadata.secret")).unwrap();
    assert_eq!(secret.permissions().mode() & 0o777, 0o600);
}

/// The observer against a log that is written meanwhile, over many segments and retention.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_log_is_watched_while_it_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("log");
    let partitions = PartitionCounts { inbox: 1, groups: 1, directory: 1, metadata: 2, ..PartitionCounts::default() };
    let log = EmbeddedLog::open(Options { partitions, segment_bytes: 128 * 1024, ..Options::new(&dir) }).unwrap();
    let to = |topic, number| TopicPartition { topic, partition: Partition(number) };
    let clock = || Arc::new(SystemClock);
    log.append(to(Topic::Metadata, 1), "first".into()).await.unwrap();
    let watch = LogObserver::open(&dir, Topic::Metadata, None, clock()).unwrap();
    let writing = tokio::spawn({
        let log = Arc::clone(&log);
        async move {
            for number in 0..3_000u32 {
                let record = [number.to_be_bytes().to_vec(), vec![7; 400]].concat();
                log.append(to(Topic::Metadata, 0), record.into()).await.unwrap();
                log.append(to(Topic::Inbox, 0), vec![1; 300].into()).await.unwrap();
            }
        }
    });
    let (mut next, mut seen) = (Offset(0), 0u32);
    let began = Instant::now();
    while seen < 3_000 {
        for record in watch.read(to(Topic::Metadata, 0), next, 64 * 1024).await.unwrap() {
            assert_eq!((record.offset, &record.payload[..4]), (next, &seen.to_be_bytes()[..]));
            next = record.offset.next();
            seen += 1;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{seen} after 60 s");
    }
    writing.await.unwrap();
    assert_eq!(watch.bounds(to(Topic::Metadata, 0)).await.unwrap(), (Offset(0), Offset(3_000)));
    assert_eq!(watch.read(to(Topic::Metadata, 1), Offset(0), 1_000).await.unwrap()[0].payload, "first");
    assert!(
        watch.read(to(Topic::Metadata, 2), Offset(0), 1).await.is_err() && watch.read(to(Topic::Inbox, 0), Offset(0), 1).await.is_err()
    );
    assert!(watch.append(to(Topic::Metadata, 0), "x".into()).await.is_err() && watch.consumer("g", &[Topic::Metadata]).await.is_err());

    // Only the newest files.
    let newest = LogObserver::open(&dir, Topic::Metadata, Some(2), clock()).unwrap();
    let (earliest, end) = newest.bounds(to(Topic::Metadata, 0)).await.unwrap();
    assert!(earliest > Offset(2_000) && end == Offset(3_000), "{earliest:?}");
    let last = newest.read(to(Topic::Metadata, 0), Offset(2_999), 1).await.unwrap();
    assert_eq!(last[0].payload[..4], 2_999u32.to_be_bytes());

    // What retention takes is gone for the observer, too.
    for (topic, number) in [(Topic::Metadata, 0), (Topic::Metadata, 1), (Topic::Inbox, 0)] {
        let (_, end) = log.bounds(to(topic, number)).await.unwrap();
        log.truncate_before(to(topic, number), end).await.unwrap();
    }
    log.retain().unwrap();
    let gone = watch.read(to(Topic::Metadata, 0), Offset(0), 1).await;
    let (earliest, _) = watch.bounds(to(Topic::Metadata, 0)).await.unwrap();
    assert!(earliest > Offset(2_000), "{earliest:?}");
    assert!(gone.is_err() && watch.read(to(Topic::Metadata, 0), Offset(0), 1).await.is_err());
    log.close().await;
}

/// Records that are there, without repeats, by event id.
async fn records(data: &Path) -> Vec<MetadataRecord> {
    let log = Arc::new(LogObserver::open(&data.join("log"), Topic::Metadata, None, Arc::new(SystemClock)).unwrap());
    let mut tail = Tail::open(log, From::Start).await.unwrap();
    let mut found = BTreeMap::new();
    loop {
        let more = tail.read().await.unwrap();
        if more.is_empty() {
            return found.into_values().collect();
        }
        found.extend(more.into_iter().map(|record| (record.event_id.clone(), record)));
    }
}

/// Every kind of step but the one that never happens, in one life.
#[tokio::test]
async fn every_step_of_a_life_is_there_once() -> anyhow::Result<()> {
    let mut broker = Broker::start_with(|config| config.metadata.enabled = Some(true)).await?;
    let alice = broker.device("alice@socialink").await?;
    let (phone, tablet) = (broker.device("bob@vignette").await?, broker.device("bob@vignette").await?);
    let mut a = alice.connect().await?;
    a.send(&[&phone, &tablet], 1, &[7; 200]).await?;
    a.result(1).await?;
    a.send(&[&phone, &tablet], 1, &[7; 200]).await?;
    a.result(1).await?;
    let mut ephemeral = send_frame(&[&phone, &tablet], 2, b"typing");
    (ephemeral.ephemeral, ephemeral.urgent) = (true, true);
    a.frames(vec![client_frame::Frame::Send(ephemeral)]).await?;
    a.result(2).await?;
    let mut p = phone.connect().await?;
    let backlog = p.backlog().await?;
    p.ack(backlog[0].seq).await?;
    a.find(|frame| matches!(frame, Frame::Receipt(_)).then_some(())).await?;
    let spare = broker.device("alice@socialink").await?;
    alice.call(Method::DELETE, &format!("/v1/devices/{}", spare.addr.device), None).await?;
    drop((a, p));
    // A month later, as if nobody had looked in between.
    let clock = ManualClock::new(SystemClock.now().plus(limits::ENVELOPE_TTL_MS + 3_600_000));
    broker.restart_by(Arc::new(clock)).await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A broker that has just started looks within a minute.
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(61)).await;
    tokio::time::resume();
    let began = Instant::now();
    while !records(broker.data()).await.iter().any(|record| record.kind() == Kind::Expired) {
        assert!(began.elapsed() < Duration::from_secs(20), "nothing expired within 20 s");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    alice.post(&[&phone, &tablet], 3, &[7; 2_000]).await?;
    phone.call(Method::DELETE, "/v1/account", None).await?;
    broker.stop().await;
    tokio::time::sleep(Duration::from_millis(1_100)).await;

    let found = records(broker.data()).await;
    let of = |kind: Kind| found.iter().filter(|record| record.kind() == kind).collect::<Vec<_>>();
    let accepted = of(Kind::Accepted);
    assert_eq!(accepted.len(), 3, "a repeat is none: {accepted:?}");
    let shape = |record: &MetadataRecord| (record.devices, record.size_bucket, record.ephemeral, record.urgent, record.sender_device);
    assert_eq!(
        accepted.iter().map(|record| shape(record)).collect::<BTreeSet<_>>(),
        [(2, 320, false, false, 1), (2, 160, true, true, 1), (2, 2_048, false, false, 1)].into()
    );
    let (delivered, expired) = (of(Kind::Delivered), of(Kind::Expired));
    let (first, later) = (accepted[0], accepted.iter().find(|record| record.size_bucket == 2_048).unwrap());
    assert_eq!((delivered.len(), expired.len()), (1, 1), "{found:?}");
    assert_eq!((delivered[0].device, expired[0].device), (1, 2));
    for record in [delivered[0], expired[0]] {
        assert_eq!((&record.account, &record.sender, &record.key_id), (&first.account, &first.sender, &first.key_id));
        assert_eq!(record.event_id[..13], first.event_id[..13], "named after the message");
    }
    assert_eq!(delivered[0].latency_ms, delivered[0].time_ms - first.time_ms);
    // Another period: nothing in common.
    assert!(later.key_id != first.key_id && later.account != first.account && later.sender != first.sender);
    assert_eq!(later.event_id[..5], first.event_id[..5], "the same partition, as the schema warns");
    let count = |kind| of(kind).len();
    assert_eq!((count(Kind::AccountCreated), count(Kind::AccountDeleted), count(Kind::IdentityLinked)), (2, 1, 2));
    assert_eq!((count(Kind::DeviceRegistered), count(Kind::DeviceRevoked), count(Kind::IdentityUnlinked)), (4, 3, 1));
    Ok(())
}

/// What happens in a group: once, by whom, and nothing that names it.
#[tokio::test]
async fn every_step_of_a_group_is_there_once() -> anyhow::Result<()> {
    let mut broker = Broker::start_with(|config| config.metadata.enabled = Some(true)).await?;
    let group = GroupId::random(&SystemRandom);
    let mut owner = Member::new(broker.device("alice@socialink").await?, group);
    let mut other = [Member::new(broker.device("bob@vignette").await?, group)];
    owner.create().await;
    owner.add(&mut other).await;
    let [mut other] = other;
    other.join().await;
    let late = other.change(&Change::default());
    owner.commit(&Change::default()).await;
    assert_eq!(other.submit(&late).await.0, StatusCode::CONFLICT);
    let send = owner.next_send(&[7; 900]);
    assert_eq!(owner.post(&send).await, owner.post(&send).await, "a repeat");
    let (status, _) = owner.call(Method::DELETE, &owner.path(""), None).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    broker.stop().await;

    let found: Vec<_> = records(broker.data()).await.into_iter().filter(|record| !record.group.is_empty()).collect();
    let of = |kind: Kind| found.iter().filter(|record| record.kind() == kind).collect::<Vec<_>>();
    let count = |kind| of(kind).len();
    assert_eq!((count(Kind::GroupCreated), count(Kind::GroupCommitAccepted), count(Kind::GroupCommitRefused)), (1, 2, 1), "{found:?}");
    assert_eq!((count(Kind::GroupMessage), count(Kind::GroupClosed), found.len()), (1, 1, 6), "{found:?}");
    let created = of(Kind::GroupCreated)[0];
    let same = |record: &MetadataRecord| (record.group.clone(), record.key_id.clone(), record.event_id[..5].to_vec());
    assert!(found.iter().all(|record| same(record) == same(created) && record.device == 1 && record.sender.is_empty()));
    assert_eq!(created.event_id[0], 3);
    let by_other = found.iter().filter(|record| record.account != created.account).map(MetadataRecord::kind);
    assert!(by_other.eq([Kind::GroupCommitRefused]));
    let size = |kind| of(kind)[0].size_bucket as usize;
    assert_eq!((size(Kind::GroupCreated), size(Kind::GroupClosed)), (0, 0));
    assert_eq!(size(Kind::GroupMessage), sealpost::wire::padding::padded_len(send.content.len()));
    assert_eq!(size(Kind::GroupCommitRefused), sealpost::wire::padding::padded_len(late.commit.len()));
    let accounts = [owner.addr().account, other.addr().account];
    let names = [&group.as_bytes()[..], accounts[0].as_bytes(), accounts[1].as_bytes()];
    assert!(found.iter().all(|record| names.iter().all(|name| record.group != *name && record.account != *name)));
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_writes_the_same() {
    let Some(cluster) = TestCluster::new("a_cluster_writes_the_same").await.unwrap() else { return };
    let broker = Broker::start_with(|config| {
        cluster.join(config, Role::All);
        config.metadata.secret = Some(sealpost::config::Secret::new("0123456789abcdef0123456789abcdef".to_owned()));
    });
    let mut broker = broker.await.unwrap();
    let plan = traffic_plan(broker.url().parse().unwrap());
    let report = on_own_thread(move || traffic::run(plan, Progress::quiet())).await.unwrap();
    assert!(report.clean() && report.accepted > 200, "{report:?}");
    let prefix = cluster.kafka.prefix.clone();
    let env = [("SEALPOST_KAFKA__BROKERS", &*cluster.kafka.brokers), ("SEALPOST_KAFKA__PREFIX", &prefix)];
    let lines = settled(&report, || tail(&[], &env)).await;
    broker.stop().await;
    let Some(python) = python() else { return };
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("landed");
    let args = ["--out", out.to_str().unwrap(), "--kafka", &cluster.kafka.brokers, "--prefix", &prefix];
    let landed = analytics(&python, "land.py", &args, "");
    assert_eq!(landed["landed"].as_u64().unwrap() as usize, kinds(&lines).values().sum::<usize>());
    assert_eq!(analytics(&python, "land.py", &args, "")["landed"], 0, "the group goes on where it was");
    check_totals(&analytics(&python, "report.py", &[out.to_str().unwrap(), "--json"], ""), &report);
}
