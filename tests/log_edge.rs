//! A log that fails, runs full or is not read, as devices and operators see it through the edge.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use reqwest::StatusCode;
use sealpost::config::Config;
use sealpost::ids::Offset;
use sealpost::limits;
use sealpost::log::embedded::sim::{Faults, SimDisk};
use sealpost::log::embedded::{EmbeddedLog, Options};
use sealpost::log::{AppendError, AppendSink, Consumed, Consumer, EventLog, ReadError, Record, Topic, TopicPartition};
use sealpost::server::Broker;
use sealpost::testing::{PATIENCE, RawDevice};
use sealpost::wire::stream::Code;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;

type Test = anyhow::Result<()>;

fn config(dir: &TempDir) -> anyhow::Result<Config> {
    let mut config = Config { data: dir.path().join("data"), listen: "127.0.0.1:0".parse()?, dev: Some(true), ..Config::default() };
    config.timeouts.drain_ms = 3_000;
    Ok(config)
}

fn options(dir: &TempDir) -> Options {
    let mut options = Options::new(dir.path().join("log"));
    options.segment_bytes = 256 * 1024;
    options
}

/// A broker whose log is on a simulated disk.
async fn simulated(dir: &TempDir, disk: &SimDisk) -> anyhow::Result<Broker> {
    // Its lock is a real file.
    std::fs::create_dir_all(options(dir).dir)?;
    let log = EmbeddedLog::open(Options { disk: Arc::new(disk.clone()), ..options(dir) })?;
    Ok(Broker::start_with_log(config(dir)?, log).await?)
}

/// Status, Retry-After and body of `/readyz`.
async fn readiness(broker: &Broker) -> anyhow::Result<(StatusCode, Option<u64>, String)> {
    let answer = reqwest::get(format!("{}/readyz", broker.url())).await?;
    let after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
    Ok((answer.status(), after, answer.text().await?))
}

async fn wait_until_ready(broker: &Broker) -> Test {
    let until = tokio::time::Instant::now() + PATIENCE;
    while readiness(broker).await?.0 != StatusCode::OK {
        anyhow::ensure!(tokio::time::Instant::now() < until, "it does not get ready again");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// The contents in a device's inbox.
async fn contents(device: &RawDevice) -> anyhow::Result<Vec<Bytes>> {
    Ok(device.connect().await?.backlog().await?.into_iter().map(|envelope| envelope.content).collect())
}

/// A refusal that says when to come back, by HTTP: body and header.
#[track_caller]
fn says_when(answer: &Value) {
    assert_eq!(answer["code"], json!("unavailable"), "{answer}");
    assert!(answer["retry_after_ms"].as_u64().is_some_and(|ms| ms > 0), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_poisoned_log_accepts_nothing_is_not_ready_and_ends_the_broker() -> Test {
    let (dir, disk) = (tempfile::tempdir()?, SimDisk::default());
    let broker = simulated(&dir, &disk).await?;
    let (alice, bob) =
        (RawDevice::register(&broker.url(), "alice@socialink").await?, RawDevice::register(&broker.url(), "bob@vignette").await?);
    assert_eq!(alice.post(&[&bob], 1, b"before").await?.0, StatusCode::OK);
    assert_eq!(readiness(&broker).await?.0, StatusCode::OK);
    let mut a = alice.connect().await?;
    a.backlog().await?;

    disk.set(Faults { syncs_left: Some(0), ..Faults::default() });
    // The first one was written, and its sync failed: nobody knows. The later ones are not known to this process to be different.
    for id in 2..=4 {
        let (status, answer) = alice.post(&[&bob], id, b"never accepted").await?;
        assert_eq!((status, &answer["code"]), (StatusCode::GATEWAY_TIMEOUT, &json!("outcome_unknown")), "{answer}");
        a.send(&[&bob], 10 + id, b"never accepted").await?;
        assert_eq!(a.result(10 + id).await?.code(), Code::OutcomeUnknown);
    }
    let (status, after, why) = readiness(&broker).await?;
    assert!(status == StatusCode::SERVICE_UNAVAILABLE && after.is_some_and(|s| s > 0) && why.contains("log"), "{status} {after:?} {why}");
    // Not even when the disk works again: what a failed sync left is known only by opening anew.
    disk.set(Faults::default());
    assert_eq!(alice.post(&[&bob], 5, b"never accepted").await?.0, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(readiness(&broker).await?.0, StatusCode::SERVICE_UNAVAILABLE);
    let failed = tokio::time::timeout(PATIENCE, broker.failed()).await?;
    assert!(failed.to_string().contains("start the broker again"), "{failed}");
    drop(a);
    broker.stop().await;

    // What was said to be unknown is repeated under its id, and delivered once whatever had become of it.
    let broker = simulated(&dir, &disk).await?;
    let moved = |device: &RawDevice| device.at(&broker.url());
    let (alice, bob) = (moved(&alice), moved(&bob));
    assert_eq!(alice.post(&[&bob], 2, b"again").await?.0, StatusCode::OK);
    let found = contents(&bob).await?;
    assert!(found.len() == 2 && found[0] == "before", "{found:?}");
    broker.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_log_refuses_with_a_time_to_come_back_and_goes_on_when_there_is_room() -> Test {
    let (dir, disk) = (tempfile::tempdir()?, SimDisk::default());
    let broker = simulated(&dir, &disk).await?;
    let (alice, bob) =
        (RawDevice::register(&broker.url(), "alice@socialink").await?, RawDevice::register(&broker.url(), "bob@vignette").await?);
    let mut a = alice.connect().await?;
    a.backlog().await?;
    disk.set(Faults { capacity: Some(0), ..Faults::default() });
    let content = vec![7; 64 * 1024];
    let mut accepted = 0;
    let refused = loop {
        let (status, answer) = alice.post(&[&bob], accepted + 1, &content).await?;
        match status {
            StatusCode::OK => accepted += 1,
            status => break (status, answer),
        }
        anyhow::ensure!(accepted < 1_000, "the disk never runs full");
    };
    assert_eq!(refused.0, StatusCode::SERVICE_UNAVAILABLE, "{}", refused.1);
    says_when(&refused.1);
    a.send(&[&bob], accepted + 1, &content).await?;
    let result = a.result(accepted + 1).await?;
    assert!(result.code() == Code::Unavailable && result.retry_after_ms > 0, "{result:?}");
    let (status, after, why) = readiness(&broker).await?;
    assert!(status == StatusCode::SERVICE_UNAVAILABLE && after.is_some_and(|seconds| seconds > 0), "{status} {after:?} {why}");

    disk.set(Faults::default());
    wait_until_ready(&broker).await?;
    assert_eq!(alice.post(&[&bob], accepted + 1, &content).await?.0, StatusCode::OK);
    drop(a);
    let mut b = bob.connect().await?;
    for id in 1..=accepted + 1 {
        let envelope = b.envelope().await?;
        assert_eq!(envelope.client_message_id, id, "nothing that was accepted is missing, nothing that was refused is there");
        b.ack(envelope.seq).await?;
    }
    b.silent(Duration::from_millis(200))
        .await
        .or_else(|error| if error.to_string().contains("QueueEmpty") { Ok(()) } else { Err(error) })?;
    broker.stop().await;
    Ok(())
}

/// While it drains, balancers must send nobody here.
#[tokio::test(flavor = "multi_thread")]
async fn a_draining_broker_is_not_ready() -> Test {
    let dir = tempfile::tempdir()?;
    let broker = simulated(&dir, &SimDisk::default()).await?;
    let device = RawDevice::register(&broker.url(), "alice@socialink").await?;
    let mut stream = device.connect().await?;
    stream.backlog().await?;
    let url = broker.url();
    // A connection that is open already: new ones are not taken any more.
    let http = reqwest::Client::builder().no_proxy().pool_max_idle_per_host(1).build()?;
    assert_eq!(http.get(format!("{url}/readyz")).send().await?.text().await?, "ready\n");
    let ready_while = async {
        let stopping = tokio::spawn(broker.stop());
        let mut seen = Vec::new();
        while !stopping.is_finished() {
            match http.get(format!("{url}/readyz")).send().await {
                Ok(answer) => seen.push((answer.status(), answer.text().await.unwrap_or_default())),
                Err(_) => break,
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        stopping.await.expect("stops");
        seen
    };
    let seen = ready_while.await;
    assert!(seen.iter().all(|(status, _)| matches!(*status, StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE)), "{seen:?}");
    assert!(seen.iter().any(|(status, text)| *status == StatusCode::SERVICE_UNAVAILABLE && text.contains("draining")), "{seen:?}");
    Ok(())
}

/// A log that can be kept from its readers.
struct Gated {
    log: Arc<EmbeddedLog>,
    open: watch::Receiver<bool>,
}

struct GatedConsumer {
    /// Only for being `Sync`; one task uses it.
    inner: tokio::sync::Mutex<Box<dyn Consumer>>,
    open: watch::Receiver<bool>,
}

#[async_trait]
impl EventLog for Gated {
    fn partitions(&self, topic: Topic) -> u16 {
        self.log.partitions(topic)
    }
    fn submit(&self, to: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        self.log.submit(to, payload, sink, token)
    }
    async fn consumer(&self, group: &str, topics: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        let inner = self.log.consumer(group, topics).await?;
        Ok(Box::new(GatedConsumer { inner: tokio::sync::Mutex::new(inner), open: self.open.clone() }))
    }
    async fn read(&self, from: TopicPartition, offset: Offset, bytes_max: usize) -> Result<Vec<Record>, ReadError> {
        self.log.read(from, offset, bytes_max).await
    }
    async fn bounds(&self, of: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        self.log.bounds(of).await
    }
    async fn truncate_before(&self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.log.truncate_before(of, offset).await
    }
    fn health(&self) -> Result<(), AppendError> {
        self.log.health()
    }
    async fn close(&self) {
        self.log.close().await;
    }
}

#[async_trait]
impl Consumer for GatedConsumer {
    async fn next(&mut self) -> Result<Consumed, ReadError> {
        let _ = self.open.wait_for(|open| *open).await;
        self.inner.get_mut().next().await
    }
    async fn hold(&mut self, of: TopicPartition) -> Result<(), ReadError> {
        self.inner.get_mut().hold(of).await
    }
    async fn seek(&mut self, to: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.inner.get_mut().seek(to, offset).await
    }
    async fn commit(&mut self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.inner.get_mut().commit(of, offset).await
    }
    async fn committed(&self, of: TopicPartition) -> Result<Option<Offset>, ReadError> {
        self.inner.lock().await.committed(of).await
    }
}

/// Accepting needs no projector; but what nobody delivers is better refused. Tokio's clock jumps as in `timers.rs`.
#[tokio::test]
async fn sends_are_refused_while_delivery_is_far_behind() -> Test {
    let dir = tempfile::tempdir()?;
    let (gate, open) = watch::channel(true);
    let log = Arc::new(Gated { log: EmbeddedLog::open(options(&dir))?, open });
    let broker = Broker::start_with_log(config(&dir)?, log).await?;
    let (alice, bob) =
        (RawDevice::register(&broker.url(), "alice@socialink").await?, RawDevice::register(&broker.url(), "bob@vignette").await?);
    let (mut a, mut b) = (alice.connect().await?, bob.connect().await?);
    a.backlog().await?;
    b.backlog().await?;
    gate.send_replace(false);
    // The projector takes one more, which it was waiting for behind the gate.
    for id in 1..=3 {
        assert_eq!(alice.post(&[&bob], id, b"accepted").await?.0, StatusCode::OK);
    }
    tokio::time::sleep(Duration::from_millis(2 * limits::LAG_LOOK_MS)).await;
    tokio::time::pause();
    tokio::time::sleep(Duration::from_millis(limits::LAG_MS - 4 * limits::LAG_LOOK_MS)).await;
    tokio::time::resume();
    assert_eq!(alice.post(&[&bob], 4, b"accepted").await?.0, StatusCode::OK, "not yet too far");
    tokio::time::pause();
    tokio::time::sleep(Duration::from_millis(8 * limits::LAG_LOOK_MS)).await;
    tokio::time::resume();
    let (status, answer) = alice.post(&[&bob], 5, b"refused").await?;
    assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
    says_when(&answer);
    a.send(&[&bob], 5, b"refused").await?;
    let result = a.result(5).await?;
    assert!(result.code() == Code::Unavailable && result.retry_after_ms > 0, "{result:?}");

    gate.send_replace(true);
    for id in 1..=4 {
        assert_eq!(b.envelope().await?.client_message_id, id);
    }
    tokio::time::sleep(Duration::from_millis(3 * limits::LAG_LOOK_MS)).await;
    a.send(&[&bob], 5, b"accepted").await?;
    assert_eq!(a.result(5).await?.code(), Code::Ok, "it recovers");
    let envelope = b.envelope().await?;
    assert_eq!((envelope.client_message_id, envelope.content.as_ref()), (5, &b"accepted"[..]));
    broker.stop().await;
    Ok(())
}
