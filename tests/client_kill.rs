//! Clients, and the broker, as processes that are killed with SIGKILL at random moments while messages go both ways: no message
//! that was kept is lost, and each has exactly one event at whoever it was for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sealpost::client::{Client, Event, Status};
use sealpost::config::Config;
use sealpost::server::Broker;
use sealpost::testing::process;
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// `sealpost chat --json` as one device, its output appended to a file over all its lives.
struct Process {
    child: Option<Child>,
    output: PathBuf,
    arguments: Vec<String>,
}

impl Process {
    fn new(dir: &Path, url: &str, identity: &str, to: &str) -> Self {
        let data = dir.join("clients").display().to_string();
        let arguments = ["chat", "--json", "--follow", "--as", identity, "--server", url, "--data", &data, "--to", to];
        let arguments = arguments.map(str::to_owned).to_vec();
        let mut process = Self { child: None, output: dir.join(format!("{identity}.out")), arguments };
        process.start();
        process
    }

    fn start(&mut self) {
        let output = OpenOptions::new().create(true).append(true).open(&self.output).expect("a file");
        // A line that the kill cut off must not swallow the first of the next life.
        writeln!(&output).expect("written");
        let child = Command::new(env!("CARGO_BIN_EXE_sealpost"))
            .args(&self.arguments)
            .stdin(Stdio::piped())
            .stdout(output)
            .stderr(Stdio::null())
            .spawn();
        self.child = Some(child.expect("the program starts"));
    }

    fn write(&mut self, line: &str) {
        if let Some(stdin) = self.child.as_mut().and_then(|child| child.stdin.as_mut()) {
            // Killed while it reads: the line was never taken.
            let _ = writeln!(stdin, "{line}");
        }
    }

    fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("killed");
            child.wait().expect("waited for");
        }
    }

    /// Complete lines so far.
    fn lines(&self) -> Vec<Value> {
        let text = std::fs::read(&self.output).unwrap_or_default();
        let whole = text.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        text[..whole].split(|&byte| byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()
    }

    /// Ids of what it said that it keeps and sends.
    fn sent(&self) -> BTreeSet<String> {
        let ids = self.lines().into_iter().filter_map(|line| Some(line["sending"]["message_id"].as_str()?.to_owned()));
        ids.collect()
    }

    /// For each message it was told of, the positions of the events that told it.
    fn received(&self) -> BTreeMap<String, BTreeSet<u64>> {
        let mut received: BTreeMap<String, BTreeSet<u64>> = BTreeMap::new();
        for line in self.lines() {
            let event = &line["event"];
            if event["type"] == "message"
                && event["message"]["outgoing"] == false
                && let (Some(id), Some(position)) = (event["message_id"].as_str(), line["position"].as_u64())
            {
                received.entry(id.to_owned()).or_default().insert(position);
            }
        }
        received
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Repeatable enough: where the kills land depends on the machine anyway.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_clients_lose_nothing_and_show_nothing_twice() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = Config { data: dir.path().join("data"), listen: ([127, 0, 0, 1], 0).into(), dev: Some(true), ..Config::default() };
    let broker = Broker::start(config).await.expect("the broker starts");
    let url = broker.url();
    // Both are registered before anybody is killed: a device whose registration was cut off is another device.
    for (identity, name) in [("alice@socialink", "alice@socialink.db"), ("bob@vignette", "bob@vignette.db")] {
        std::fs::create_dir_all(dir.path().join("clients")).expect("a folder");
        let token = sealpost::client::dev_token(&url, &identity.parse().expect("an identity")).await.expect("a token");
        let path = dir.path().join("clients").join(name);
        Client::register(&url, vec![token], "terminal", path).await.expect("registered").close().await;
    }
    let mut alice = Process::new(dir.path(), &url, "alice@socialink", "bob@vignette");
    let mut bob = Process::new(dir.path(), &url, "bob@vignette", "alice@socialink");
    let mut dice = Dice(std::process::id().into());
    println!("seed {}", dice.0);
    for round in 0..40 {
        for n in 0..1 + dice.below(12) {
            alice.write(&format!("alice {round}.{n}"));
            bob.write(&format!("bob {round}.{n}"));
        }
        tokio::time::sleep(Duration::from_millis(dice.below(120))).await;
        let victim = if dice.below(2) == 0 { &mut alice } else { &mut bob };
        victim.kill();
        victim.start();
    }
    alice.write("the last of alice");
    bob.write("the last of bob");
    let begun = Instant::now();
    loop {
        let complete = |from: &Process, to: &Process| {
            let received = to.received();
            from.sent().iter().all(|id| received.contains_key(id))
        };
        if complete(&alice, &bob) && complete(&bob, &alice) && alice.sent().len() > 20 && bob.sent().len() > 20 {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "lost: {:?}", alice.sent().difference(&bob.received().into_keys().collect()).count());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What was kept but not said any more before the kill may arrive as well; nothing may have two events.
    for (to, from) in [(&bob, &alice), (&alice, &bob)] {
        let twice: Vec<_> = to.received().into_iter().filter(|(_, positions)| positions.len() != 1).collect();
        assert!(twice.is_empty(), "{twice:?}");
        println!("{} sent, {} received, 40 kills", from.sent().len(), to.received().len());
    }
    // The audit reads what it thinks it reads.
    assert!(File::open(&alice.output).expect("a file").metadata().expect("metadata").len() > 1_000);
    drop((alice, bob));
    broker.stop().await;
}

/// Texts that events told of, in the order of the events.
async fn told(client: &Client) -> Vec<String> {
    let events = client.events_after(0, 100_000).await.expect("events");
    let texts = events.into_iter().filter_map(|(_, event)| match event {
        Event::Message { message: Some(message), .. } => message.body,
        _ => None,
    });
    texts.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_is_killed_again_and_again_loses_nothing_and_repeats_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut broker = process::start(Path::new(env!("CARGO_BIN_EXE_sealpost")), dir.path()).await.expect("the broker starts");
    let url = broker.url().to_string();
    let mut clients = Vec::new();
    for identity in ["alice@socialink", "bob@vignette"] {
        let token = sealpost::client::dev_token(&url, &identity.parse().expect("an identity")).await.expect("a token");
        let path = dir.path().join(format!("{identity}.db"));
        let client = Client::register(&url, vec![token], "test", path).await.expect("registered");
        client.start();
        clients.push(client);
    }
    let [alice, bob] = &clients[..] else { panic!("two") };
    alice.resolve("bob@vignette").await.expect("known");
    bob.resolve("alice@socialink").await.expect("known");
    let mut dice = Dice(std::process::id().into());
    println!("seed {}", dice.0);
    let (mut of_alice, mut of_bob) = (Vec::new(), Vec::new());
    for round in 0..20 {
        for n in 0..5 + dice.below(40) {
            of_alice.push(format!("alice {round}.{n}"));
            of_bob.push(format!("bob {round}.{n}"));
            alice.send_text(bob.account(), &of_alice[of_alice.len() - 1]).await.expect("kept");
            bob.send_text(alice.account(), &of_bob[of_bob.len() - 1]).await.expect("kept");
        }
        tokio::time::sleep(Duration::from_millis(dice.below(150))).await;
        broker.restart().await.expect("killed, and started again");
    }
    let begun = Instant::now();
    while told(bob).await.len() < of_alice.len() || told(alice).await.len() < of_bob.len() {
        assert!(
            begun.elapsed() < PATIENCE,
            "lost: {} and {}",
            of_alice.len() - told(bob).await.len(),
            of_bob.len() - told(alice).await.len()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(told(bob).await, of_alice, "each once, in order");
    assert_eq!(told(alice).await, of_bob, "each once, in order");
    let begun = Instant::now();
    while alice.history(bob.account(), u64::MAX, 1).await.expect("history").iter().any(|last| last.status < Status::Delivered) {
        assert!(begun.elapsed() < PATIENCE, "the last receipt never came");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!("{} messages, 20 kills of the broker", of_alice.len() + of_bob.len());
    for client in clients {
        client.close().await;
    }
}
