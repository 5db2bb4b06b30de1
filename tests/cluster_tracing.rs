//! Traces of real processes, set up by variables: one trace over an edge and a projector, and nothing of what was not chosen.
//! The former is skipped, and said so, unless `SEALPOST_TEST_KAFKA` and `SEALPOST_TEST_CQL` name servers; `make test-cluster` starts them.

#[path = "support/collector.rs"]
mod collector;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use collector::{Collector, attribute, check};
use sealpost::testing::RawDevice;
use sealpost::testing::cluster::TestCluster;

/// `sealpost serve`; ended when dropped.
struct Process {
    child: Child,
    url: String,
    log: PathBuf,
}

impl Process {
    async fn start(dir: &Path, name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> Result<Self> {
        let (out, log) = (dir.join(format!("{name}.out")), dir.join(format!("{name}.log")));
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealpost"));
        command.args(["--log-json", "serve", "--dev", "--listen", "127.0.0.1:0", "--data"]).arg(dir.join(name)).args(arguments);
        command.envs(variables.iter().copied()).stdin(Stdio::null());
        let child = command.stdout(std::fs::File::create(&out)?).stderr(std::fs::File::create(&log)?).spawn()?;
        let mut process = Self { child, url: String::new(), log };
        let begun = Instant::now();
        while process.url.is_empty() {
            let (text, words) = (std::fs::read_to_string(&out)?, std::fs::read_to_string(&process.log)?);
            ensure!(process.child.try_wait()?.is_none() && begun.elapsed() < Duration::from_secs(60), "{name} does not start:\n{words}");
            if let Some((url, _)) = text.split_once("listening on ").and_then(|(_, rest)| rest.split_once('\n')) {
                process.url = url.trim().to_owned();
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(process)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn exchange(url: &str) -> Result<()> {
    let alice = RawDevice::register(url, "alice@socialink").await?;
    let bob = RawDevice::register(url, "bob@vignette").await?;
    let mut stream = bob.connect().await?;
    ensure!(stream.backlog().await?.is_empty());
    let (status, answer) = alice.post(&[&bob], 1, b"a plaintext nobody shall see").await?;
    ensure!(status.is_success(), "{status}: {answer}");
    stream.envelope().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_chosen_leaves_no_trace_and_log_lines_are_json() -> Result<()> {
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let dir = tempfile::tempdir()?;
    let variables = [("SEALPOST_TRACING__OTLP_ENDPOINT", &*endpoint), ("SEALPOST_TRACING__SAMPLE_RATIO", "0")];
    let process = Process::start(dir.path(), "all", &[], &variables).await?;
    exchange(&process.url).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    ensure!(collector.spans().is_empty(), "{:?}", collector.spans());

    let text = std::fs::read_to_string(&process.log)?;
    let lines = text.lines().map(serde_json::from_str::<serde_json::Value>).collect::<Result<Vec<_>, _>>().with_context(|| text.clone())?;
    let said = |part: &str| lines.iter().any(|line| line["fields"]["message"].as_str().is_some_and(|message| message.contains(part)));
    ensure!(said("messages are traced") && said("DEVELOPMENT MODE"), "{text}");
    ensure!(lines.iter().all(|line| line["timestamp"].is_string() && line["level"].is_string()), "{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trace_spans_an_edge_and_a_projector() -> Result<()> {
    let Some(cluster) = TestCluster::new("a_trace_spans_an_edge_and_a_projector").await? else { return Ok(()) };
    let collector = Collector::default();
    let endpoint = collector.start().await;
    let dir = tempfile::tempdir()?;
    let variables = [
        ("SEALPOST_KAFKA__BROKERS", &*cluster.kafka.brokers),
        ("SEALPOST_KAFKA__PREFIX", &*cluster.kafka.prefix),
        ("SEALPOST_CQL__HOSTS", &*cluster.cql.hosts),
        ("SEALPOST_CQL__KEYSPACE", &*cluster.cql.keyspace),
        ("SEALPOST_TRACING__OTLP_ENDPOINT", &*endpoint),
        ("SEALPOST_TRACING__SAMPLE_RATIO", "1"),
    ];
    let _projector = Process::start(dir.path(), "projector", &["--role", "projector"], &variables).await?;
    let edge = Process::start(dir.path(), "edge", &["--role", "edge"], &variables).await?;
    exchange(&edge.url).await?;
    for trace in collector.traces("deliver", 1).await {
        check(trace);
    }
    // Who said which step.
    let taken = collector.0.lock();
    let mut steps = BTreeSet::new();
    for resource in taken.iter().flat_map(|export| &export.resource_spans) {
        let role = resource.resource.as_ref().and_then(|process| attribute(process, "sealpost.role")).context("a role")?;
        steps.extend(resource.scope_spans.iter().flat_map(|scope| &scope.spans).map(|span| (span.name.clone(), role.clone())));
    }
    let expected = [("accept", "edge"), ("append", "edge"), ("apply", "projector"), ("deliver", "edge")];
    assert_eq!(steps, expected.map(|(step, role)| (step.to_owned(), role.to_owned())).into());
    Ok(())
}
