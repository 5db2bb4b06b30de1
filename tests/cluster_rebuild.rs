//! G-REBUILD on a cluster: a view made anew in a fresh keyspace while messages flow equals the live one, and the service moves to it without
//! losing or doubling anything.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::Method;
use sealpost::config::{Config, Role};
use sealpost::ids::Seq;
use sealpost::server::{Fresh, compare, compare_views};
use sealpost::store::{DeliveryStore as _, DeliveryWrite, InboxState};
use sealpost::testing::cluster::TestCluster;
use sealpost::testing::{Broker, RawDevice};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(30);

async fn process(cluster: &TestCluster, role: Role) -> Result<Broker> {
    Broker::start_with(|config| cluster.join(config, role)).await
}

fn config(cluster: &TestCluster) -> Config {
    let mut config = Config::default();
    cluster.join(&mut config, Role::All);
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_keyspace_equals_the_live_one_and_a_difference_is_found() -> Result<()> {
    let Some(cluster) = TestCluster::new("a_fresh_keyspace_equals_the_live_one_and_a_difference_is_found").await? else { return Ok(()) };
    let projector = process(&cluster, Role::Projector).await?;
    let edge = process(&cluster, Role::Edge).await?;
    let mut devices = Vec::new();
    for name in ["alice@socialink", "bob@vignette", "bob@vignette", "carol@local", "dave@local"] {
        devices.push(edge.device(name).await?);
    }
    let [alice, phone, tablet, carol, dave] = &devices[..] else { unreachable!("five were made") };
    for id in 1..=60u64 {
        accepted(alice, &[phone, tablet], id).await?;
        accepted(alice, &[carol], id).await?;
    }
    // Some of it acknowledged, a device revoked, an account deleted, a block: every kind of event leaves its trace.
    let mut online = phone.connect().await?;
    let backlog = online.backlog().await?;
    online.ack(backlog[29].seq).await?;
    carol.call(Method::PUT, &format!("/v1/blocks/{}", alice.addr.account), None).await?;
    let spare = edge.device("alice@socialink").await?;
    alice.call(Method::DELETE, &format!("/v1/devices/{}", spare.addr.device), None).await?;
    dave.call(Method::DELETE, "/v1/account", None).await?;

    let config = config(&cluster);
    let keyspace = cluster.other_keyspace();
    let mut fresh = Fresh::start(&config, &keyspace).await?;
    let done = fresh.catch_up(0, |_| ()).await?;
    ensure!(done.applied > 130, "{done:?}");
    let (log, live, other) = fresh.parts();
    let compared = compare(log.as_ref(), live, other, PATIENCE).await?;
    println!("{compared:?}");
    ensure!(compared.different() == 0, "{compared:?}");
    ensure!(compared.kinds.values().all(|tally| tally.undecided == 0 && tally.forgotten == 0), "nothing moves any more: {compared:?}");
    for (kind, least) in [("inboxes", 4), ("marks", 2), ("accounts", 4), ("identities", 3), ("device_keys", 4)] {
        ensure!(compared.kinds.get(kind).is_some_and(|tally| tally.equal >= least), "{kind}: {compared:?}");
    }

    // What waits in an inbox, a row that is there too much, and one that says something else.
    let other = other.clone();
    let state = other.inboxes(vec![phone.addr]).await?.remove(0).context("bob's inbox")?;
    let wrong = InboxState { cursor: Seq(state.cursor.0 + 1), ..state };
    other.write(DeliveryWrite { drop_to: vec![(tablet.addr, Seq(backlog[59].seq))], ..DeliveryWrite::default() }).await?;
    other.write(DeliveryWrite { inboxes: vec![(phone.addr, wrong), (spare.addr, state)], ..DeliveryWrite::default() }).await?;
    fresh.end().await?;
    let compared = compare_views(&config, &keyspace, Duration::from_secs(2)).await?;
    ensure!(compared.kinds["inboxes"].different >= 2, "{compared:?}");
    ensure!(compared.named.iter().any(|name| name.contains(&tablet.addr.account.to_string())), "{compared:?}");
    drop((edge, projector));
    Ok(())
}

/// Partitions were scaled before a rebuild, and again while a fresh keyspace follows: it applies the generations in their order, also after it was
/// stopped between them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rebuild_goes_through_generations_of_partitions() -> Result<()> {
    let Some(cluster) = TestCluster::new("a_rebuild_goes_through_generations_of_partitions").await? else { return Ok(()) };
    let projector = process(&cluster, Role::Projector).await?;
    let edge = process(&cluster, Role::Edge).await?;
    let alice = edge.device("alice@socialink").await?;
    let mut others = Vec::new();
    for n in 0..8 {
        others.push(edge.device(&format!("user{n}@vignette")).await?);
    }
    let mut id = 0;
    let mut talk = async || -> Result<()> {
        for _ in 0..5 {
            id += 1;
            for other in &others {
                accepted(&alice, &[other], id).await?;
            }
        }
        let mut stream = others[0].connect().await?;
        let backlog = stream.backlog().await?;
        stream.ack(backlog[0].seq).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
        Ok(())
    };
    let scale = |partitions: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_sealpost"))
            .args(["topology", "scale", "--json", "--partitions", partitions, "--kafka", &cluster.kafka.brokers])
            .env("SEALPOST_KAFKA__BROKERS", &cluster.kafka.brokers)
            .env("SEALPOST_KAFKA__PREFIX", &cluster.kafka.prefix)
            .output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    talk().await?;
    tokio::task::block_in_place(|| scale("6"))?;
    talk().await?;

    let (config, keyspace) = (config(&cluster), cluster.other_keyspace());
    let mut fresh = Fresh::start(&config, &keyspace).await?;
    fresh.catch_up(0, |_| ()).await?;
    equal(&fresh).await.context("behind one change")?;
    fresh.end().await?;
    // Goes on behind fences that it has met already, and meets new ones.
    let mut fresh = Fresh::start(&config, &keyspace).await?;
    talk().await?;
    tokio::task::block_in_place(|| scale("9"))?;
    talk().await?;
    fresh.catch_up(0, |_| ()).await?;
    equal(&fresh).await.context("behind another")?;
    fresh.end().await?;
    drop((edge, projector));
    Ok(())
}

async fn equal(fresh: &Fresh) -> Result<()> {
    let (log, live, other) = fresh.parts();
    let compared = compare(log.as_ref(), live, other, PATIENCE).await?;
    println!("{compared:?}");
    ensure!(compared.different() == 0, "{compared:?}");
    ensure!(compared.kinds.values().all(|tally| tally.undecided == 0), "nothing moves any more: {compared:?}");
    ensure!(compared.kinds["inboxes"].equal == 9 && compared.kinds["marks"].equal == 8, "{compared:?}");
    Ok(())
}

async fn accepted(from: &RawDevice, to: &[&RawDevice], id: u64) -> Result<()> {
    let (status, answer) = from.post(to, id, format!("message {id}").as_bytes()).await?;
    ensure!(status.is_success(), "{status}: {answer}");
    Ok(())
}

struct Process(Child);

impl Process {
    /// As an operator stops it.
    fn drain(mut self) -> Result<()> {
        ensure!(Command::new("kill").arg(self.0.id().to_string()).status()?.success(), "it runs");
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Service {
    cluster: TestCluster,
    data: tempfile::TempDir,
    edge_port: u16,
}

impl Service {
    fn command(&self, args: &[&str], keyspace: &str, mirror: Option<&str>) -> Command {
        let (kafka, cql) = (&self.cluster.kafka, &self.cluster.cql);
        let mut command = Command::new(env!("CARGO_BIN_EXE_sealpost"));
        command
            .args(args)
            .args(["--kafka", &kafka.brokers, "--cql", &cql.hosts])
            .env("SEALPOST_KAFKA__PREFIX", &kafka.prefix)
            .env("SEALPOST_KAFKA__BROKERS", &kafka.brokers)
            .env("SEALPOST_CQL__KEYSPACE", keyspace)
            .env("SEALPOST_CQL__STATE_KEYSPACE", &cql.keyspace)
            .env("SEALPOST_CQL__HOSTS", &cql.hosts);
        if let Some(mirror) = mirror {
            command.env("SEALPOST_CQL__MIRROR_KEYSPACE", mirror);
        }
        command
    }

    fn serve(&self, role: &str, port: u16, keyspace: &str, mirror: Option<&str>) -> Result<Process> {
        let listen = format!("127.0.0.1:{port}");
        let data = self.data.path().to_str().context("a path")?;
        let args = ["serve", "--dev", "--role", role, "--listen", &listen, "--data", data];
        Ok(Process(self.command(&args, keyspace, mirror).stdout(Stdio::null()).spawn()?))
    }

    fn projector(&self, keyspace: &str, mirror: Option<&str>) -> Result<Process> {
        self.serve("projector", 0, keyspace, mirror)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.edge_port)
    }

    async fn edge(&self, keyspace: &str) -> Result<Process> {
        let edge = self.serve("edge", self.edge_port, keyspace, None)?;
        let until = Instant::now() + Duration::from_secs(60);
        while !reqwest::get(format!("{}/readyz", self.url())).await.is_ok_and(|answer| answer.status().is_success()) {
            ensure!(Instant::now() < until, "the edge does not become ready");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(edge)
    }

    fn compared(&self, keyspace: &str) -> Result<Value> {
        let args = ["rebuild", "compare", "--with", keyspace, "--patience", "5", "--json"];
        let output = self.command(&args, &self.cluster.cql.keyspace, None).output()?;
        let report = serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        ensure!(output.status.success(), "they differ: {report}");
        println!("compared: {report}");
        Ok(report)
    }
}

/// Each step as an operator takes it, while 200 messages a second flow between devices that are online and others that come and go.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_service_moves_to_a_fresh_keyspace() -> Result<()> {
    let Some(cluster) = TestCluster::new("a_running_service_moves_to_a_fresh_keyspace").await? else { return Ok(()) };
    let _ = rustls::crypto::ring::default_provider().install_default();
    let edge_port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let (old, new) = (cluster.cql.keyspace.clone(), cluster.other_keyspace());
    let service = Service { cluster, data: tempfile::tempdir()?, edge_port };
    let one = service.projector(&old, None)?;
    let two = service.projector(&old, None)?;
    let edge = service.edge(&old).await?;
    // Somebody who is away all the time, and somebody who comes back in the end.
    let sender = RawDevice::register(&service.url(), "alice@socialink").await?;
    let away = RawDevice::register(&service.url(), "bob@vignette").await?;
    for id in 1..=20 {
        accepted(&sender, &[&away], id).await?;
    }

    let args = ["load", "--server", &service.url(), "--senders", "8", "--recipients", "8", "--rate", "200", "--seconds", "100", "--json"];
    let load = Command::new(env!("CARGO_BIN_EXE_sealpost")).args(args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let begun = Instant::now();
    let mut follower = Process(service.command(&["rebuild", "--into", &new, "--follow"], &old, None).stdout(Stdio::piped()).spawn()?);
    // It says so once it has compared the views and found no difference.
    let said = BufReader::new(follower.0.stdout.take().context("its output")?);
    let follows = tokio::task::spawn_blocking(move || said.lines().map_while(Result::ok).any(|line| line.contains("kept up to date")));
    ensure!(tokio::time::timeout(Duration::from_secs(120), follows).await??, "the views do not differ, and it follows");
    service.compared(&new)?;
    println!("rebuilt and compared after {:.1} s", begun.elapsed().as_secs_f64());

    follower.drain()?;
    one.drain()?;
    let one = service.projector(&old, Some(&new))?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    two.drain()?;
    let two = service.projector(&old, Some(&new))?;
    tokio::time::sleep(Duration::from_secs(6)).await;
    for id in 21..=30 {
        accepted(&sender, &[&away], id).await?;
    }
    service.compared(&new)?;
    println!("both keyspaces kept after {:.1} s", begun.elapsed().as_secs_f64());

    edge.drain()?;
    let edge = service.edge(&new).await?;
    println!("the edge reads the new keyspace after {:.1} s", begun.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_secs(4)).await;
    one.drain()?;
    let one = service.projector(&new, None)?;
    tokio::time::sleep(Duration::from_secs(4)).await;
    two.drain()?;
    let two = service.projector(&new, None)?;
    for id in 31..=40 {
        accepted(&sender, &[&away], id).await?;
    }
    println!("moved after {:.1} s", begun.elapsed().as_secs_f64());

    let output = load.wait_with_output()?;
    let report: Value = serde_json::from_slice(&output.stdout).context("the load tool's report")?;
    println!(
        "accepted {}, delivered {}, p50 {} ms, at most {} ms",
        report["accepted"], report["delivered"], report["p50_ms"], report["max_ms"]
    );
    ensure!(report["lost"] == 0 && report["duplicates"] == 0 && report["accepted"] == report["delivered"], "{report}");
    let backlog = away.connect().await?.backlog().await?;
    ensure!(backlog.iter().map(|envelope| envelope.client_message_id).eq(1..=40), "{} waited", backlog.len());
    // A keyspace of a view is never opened with a state that is not its own.
    let alone = service
        .command(&["migrate"], &new, None)
        .env("SEALPOST_CQL__STATE_KEYSPACE", &new)
        .env_remove("SEALPOST_KAFKA__BROKERS")
        .output()?;
    ensure!(!alone.status.success(), "refused");
    drop((one, two, edge));
    Ok(())
}
