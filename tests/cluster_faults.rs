//! Processes of a cluster are killed and stopped under load, and the load tool's audit must find nothing lost and nothing twice.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use sealpost::testing::cluster::TestCluster;
use serde_json::Value;

struct Process(Child);

impl Process {
    fn kill(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    fn signal(&self, signal: &str) -> Result<()> {
        let sent = Command::new("kill").args([signal, &self.0.id().to_string()]).status()?;
        ensure!(sent.success(), "kill {signal}");
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

struct Cluster {
    servers: TestCluster,
    data: tempfile::TempDir,
    edge_port: u16,
}

impl Cluster {
    async fn new(test: &str) -> Result<Option<Self>> {
        let Some(servers) = TestCluster::new(test).await? else { return Ok(None) };
        let edge_port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        Ok(Some(Self { servers, data: tempfile::tempdir()?, edge_port }))
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.edge_port)
    }

    fn serve(&self, role: &str, port: u16) -> Result<Process> {
        let child = Command::new(env!("CARGO_BIN_EXE_sealpost"))
            .args(["serve", "--dev", "--role", role, "--listen", &format!("127.0.0.1:{port}"), "--data"])
            .arg(self.data.path())
            .args(["--kafka", &self.servers.kafka.brokers, "--cql", &self.servers.cql.hosts])
            .env("SEALPOST_KAFKA__PREFIX", &self.servers.kafka.prefix)
            .env("SEALPOST_KAFKA__BROKERS", &self.servers.kafka.brokers)
            .env("SEALPOST_CQL__KEYSPACE", &self.servers.cql.keyspace)
            .env("SEALPOST_CQL__HOSTS", &self.servers.cql.hosts)
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Process(child))
    }

    async fn edge(&self) -> Result<Process> {
        let edge = self.serve("edge", self.edge_port)?;
        let until = Instant::now() + Duration::from_secs(60);
        while !reqwest::get(format!("{}/readyz", self.url())).await.is_ok_and(|answer| answer.status().is_success()) {
            ensure!(Instant::now() < until, "the edge does not become ready");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(edge)
    }

    fn scale(&self, partitions: u16) -> Result<Child> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealpost"));
        command.args(["topology", "scale", "--json", "--partitions", &partitions.to_string(), "--kafka", &self.servers.kafka.brokers]);
        command.env("SEALPOST_KAFKA__PREFIX", &self.servers.kafka.prefix).env("SEALPOST_KAFKA__BROKERS", &self.servers.kafka.brokers);
        Ok(command.stdout(Stdio::piped()).spawn()?)
    }

    /// Load for so long, in a process of its own.
    fn load(&self, seconds: u32) -> Result<Child> {
        let seconds = seconds.to_string();
        let args =
            ["load", "--server", &self.url(), "--senders", "8", "--recipients", "8", "--rate", "200", "--seconds", &seconds, "--json"];
        Ok(Command::new(env!("CARGO_BIN_EXE_sealpost")).args(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?)
    }
}

fn audit(load: Child, what: &str) -> Result<Value> {
    let output = load.wait_with_output()?;
    let report: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("{what}: the load tool's report"))?;
    println!(
        "{what}: accepted {}, delivered {}, p50 {} ms, at most {} ms",
        report["accepted"], report["delivered"], report["p50_ms"], report["max_ms"]
    );
    ensure!(report["lost"] == 0 && report["duplicates"] == 0 && report["accepted"] == report["delivered"], "{what}: {report}");
    ensure!(report["accepted"].as_u64() > Some(1_000), "{what}: {report}");
    ensure!(report["disorder"] == 0, "{what}: {report}");
    Ok(report)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_or_doubled_when_processes_die_or_stand_still() -> Result<()> {
    let Some(cluster) = Cluster::new("nothing_is_lost_or_doubled_when_processes_die_or_stand_still").await? else { return Ok(()) };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut one = cluster.serve("projector", 0)?;
    let two = cluster.serve("projector", 0)?;
    let mut edge = cluster.edge().await?;
    tokio::time::sleep(Duration::from_secs(4)).await;

    let load = cluster.load(16)?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    one.kill();
    audit(load, "a projector was killed")?;

    let one = cluster.serve("projector", 0)?;
    let load = cluster.load(24)?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    // Longer than its session: its partitions go to the other one, and it does not know when it wakes.
    two.signal("-STOP")?;
    tokio::time::sleep(Duration::from_secs(9)).await;
    two.signal("-CONT")?;
    audit(load, "a projector stood still")?;

    let load = cluster.load(14)?;
    tokio::time::sleep(Duration::from_secs(5)).await;
    edge.kill();
    let edge = cluster.edge().await?;
    audit(load, "the edge was killed")?;
    drop((one, two, edge));
    Ok(())
}

/// Accounts are spread over 4 partitions, then 16, then 6, while messages flow. The call is killed half-way and called again, a projector
/// dies in between, and devices come and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_are_scaled_under_load() -> Result<()> {
    let Some(cluster) = Cluster::new("partitions_are_scaled_under_load").await? else { return Ok(()) };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut one = cluster.serve("projector", 0)?;
    let two = cluster.serve("projector", 0)?;
    let edge = cluster.edge().await?;
    tokio::time::sleep(Duration::from_secs(4)).await;

    let load = cluster.load(40)?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut killed = cluster.scale(16)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    killed.kill()?;
    killed.wait()?;
    let others = cluster.load(20)?;
    let scaled = report(cluster.scale(16)?)?;
    ensure!(scaled["partitions"] == 16 && scaled["first"] == 4 && scaled["topic_partitions"] == 20 && scaled["retired"] == 4, "{scaled}");
    let again = report(cluster.scale(16)?)?;
    ensure!(again["changed"] == false && again["generation"] == 1, "{again}");
    audit(others, "devices that came while partitions were scaled")?;
    audit(load, "4 partitions became 16")?;

    let load = cluster.load(30)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let scaling = cluster.scale(6)?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    one.kill();
    let scaled = report(scaling)?;
    ensure!(scaled["generation"] == 2 && scaled["first"] == 20 && scaled["retired"] == 20, "{scaled}");
    audit(load, "16 partitions became 6 while a projector died")?;

    // The edge sleeps through the change: what it appends when it wakes stands behind the fence.
    let load = cluster.load(24)?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let scaling = cluster.scale(9)?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    edge.signal("-STOP")?;
    tokio::time::sleep(Duration::from_secs(8)).await;
    edge.signal("-CONT")?;
    ensure!(report(scaling)?["generation"] == 3, "the change ends without the edge");
    audit(load, "6 partitions became 9 while the edge stood still")?;
    drop((one, two, edge));
    Ok(())
}

fn report(command: Child) -> Result<Value> {
    let output = command.wait_with_output()?;
    ensure!(output.status.success(), "{:?}", output.status);
    let report = serde_json::from_slice(&output.stdout)?;
    println!("{report}");
    Ok(report)
}
