//! kill -9 of a real broker process, again and again under load: nothing that was accepted is lost, and no application
//! sees a message twice (G-DURABLE, G-NO-GAP, G-IDEMPOTENT, G-ONCE). The audit is the clients': it knows every id that
//! the broker said it accepted.
//!
//! `SEALPOST_TEST_KILL_ROUNDS` sets how often the broker is killed; `make kill-audit` runs 200 rounds.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sealpost::cli::load::{Plan, Progress, on_own_thread, traffic};
use sealpost::client::core::content::MessageId;
use sealpost::client::{Client, Event, dev_token};
use sealpost::testing::process;

fn rounds() -> u32 {
    std::env::var("SEALPOST_TEST_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(25)
}

/// Repeat a run with `SEALPOST_TEST_SEED`.
fn seeded() -> StdRng {
    let seed = std::env::var("SEALPOST_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| rand::rng().random());
    println!("SEALPOST_TEST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_accepted_is_lost_or_seen_twice_over_random_kills() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let mut broker = process::start(program, folder.path()).await.expect("the broker starts");
    let (mut random, rounds) = (seeded(), rounds());

    let stop = Arc::new(AtomicBool::new(false));
    let mut plan = Plan::new(broker.url());
    (plan.senders, plan.recipients, plan.peers, plan.window, plan.payload) = (12, 12, 12, 16, 200);
    (plan.length, plan.grace, plan.stop) = (Duration::from_secs(24 * 3600), Duration::from_secs(60), Some(stop.clone()));
    let load = tokio::spawn(on_own_thread(move || traffic::run(plan, Progress::quiet())));

    // Until the devices are registered and talk.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut killed_while_starting = 0;
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(random.random_range(20..700))).await;
        assert!(!load.is_finished(), "the load gave up: {:?}", load.await);
        broker.kill9();
        while random.random_ratio(1, 5) {
            // Recovery must stand being killed, too.
            broker.spawn().expect("the broker starts");
            tokio::time::sleep(Duration::from_millis(random.random_range(0..60))).await;
            broker.kill9();
            killed_while_starting += 1;
        }
        broker.restart().await.expect("the broker starts again: an acknowledged record must never stop recovery");
    }
    stop.store(true, Ordering::Relaxed);
    let report = load.await.expect("the load's task").expect("the load ends with a report");
    println!(
        "{rounds} kills under load and {killed_while_starting} while it started: {} accepted, {} delivered, {} repeated by senders, {} redelivered after reconnects, {} lost, {} seen twice",
        report.accepted, report.delivered, report.repeated, report.redelivered, report.lost, report.duplicates
    );
    assert!(report.reconnects >= u64::from(rounds), "every kill breaks streams");
    assert!(report.accepted > u64::from(rounds) * 20, "too little traffic to say anything: {}", report.accepted);
    assert_eq!((report.lost, report.duplicates), (0, 0), "lost ones: {:?}", report.lost_examples);
    assert!(report.clean() && report.unanswered == 0 && report.refused.is_empty(), "{report:?}");
    assert_eq!(report.gaps, 0, "nothing was lost, so no gap may be told");
}

/// A device with the SDK, and what its application was shown, by message.
struct Device {
    client: Arc<Client>,
    shown: Arc<Mutex<HashMap<MessageId, u32>>>,
    handled: Arc<AtomicU64>,
    watcher: tokio::task::JoinHandle<()>,
    database: std::path::PathBuf,
}

impl Device {
    async fn register(server: &str, identity: &str, database: &Path) -> Self {
        let token = dev_token(server, &identity.parse().expect("an identity")).await.expect("a token");
        let client = Client::register(server, vec![token], "device", database).await.expect("registered");
        Self::over(client, database, Arc::default(), Arc::default())
    }

    fn over(client: Client, database: &Path, shown: Arc<Mutex<HashMap<MessageId, u32>>>, handled: Arc<AtomicU64>) -> Self {
        let client = Arc::new(client);
        client.start();
        let (reader, book, mark) = (client.clone(), shown.clone(), handled.clone());
        let watcher = tokio::spawn(async move {
            let mut events = reader.events().await.expect("events");
            while let Some((position, event)) = events.next().await.expect("an event") {
                match event {
                    Event::Message { message_id, .. } => *book.lock().expect("unpoisoned").entry(message_id).or_default() += 1,
                    Event::Undecryptable { .. } | Event::Gap { .. } | Event::Failed { .. } => panic!("{event:?}"),
                    _ => {}
                }
                events.handled(position).await.expect("kept");
                mark.store(position, Ordering::SeqCst);
            }
        });
        Self { client, shown, handled, watcher, database: database.to_owned() }
    }

    /// The application ends and starts again, on the same database.
    async fn restart(self) -> Self {
        self.client.stop().await;
        // An application whose own state is not in the database may see the event again that it had in hand: here it has none.
        let newest = self.client.sync_status().await.expect("a status").newest_event;
        let began = Instant::now();
        while self.handled.load(Ordering::SeqCst) < newest {
            assert!(began.elapsed() < Duration::from_secs(10) && !self.watcher.is_finished(), "events are not handled");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.watcher.abort();
        let _ = self.watcher.await;
        drop(self.client);
        loop {
            match Client::open(&self.database).await {
                Ok(client) => return Self::over(client, &self.database, self.shown, self.handled),
                // The thread that owned the database may still be closing it.
                Err(error) if began.elapsed() > Duration::from_secs(10) => panic!("{error}"),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn counts(&self) -> HashMap<MessageId, u32> {
        self.shown.lock().expect("unpoisoned").clone()
    }
}

/// The same with real libsignal clients: three people, one with two devices, each writing to all others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn applications_see_each_text_once_over_kills_of_the_broker_and_restarts_of_clients() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let mut broker = process::start(program, folder.path()).await.expect("the broker starts");
    let server = broker.url().as_str().trim_end_matches('/').to_owned();
    let mut random = seeded();
    let mut devices = Vec::new();
    for (n, identity) in ["alice@socialink", "bob@vignette", "bob@vignette", "carol@local"].into_iter().enumerate() {
        devices.push(Device::register(&server, identity, &folder.path().join(format!("device-{n}"))).await);
    }
    let accounts: Vec<_> = devices.iter().map(|device| device.client.account()).collect();

    let rounds = (rounds() / 5).clamp(2, 20);
    let mut sent: HashMap<MessageId, (usize, usize)> = HashMap::new();
    for round in 0..rounds {
        for n in 0..random.random_range(8..20) {
            let from = random.random_range(0..devices.len());
            let to = random.random_range(0..devices.len());
            if accounts[from] != accounts[to] {
                let id = devices[from].client.send_text(accounts[to], &format!("round {round}, text {n}")).await.expect("kept");
                sent.insert(id, (from, to));
            }
        }
        tokio::time::sleep(Duration::from_millis(random.random_range(0..150))).await;
        broker.kill9();
        if random.random_bool(0.5) {
            let which = random.random_range(0..devices.len());
            let device = devices.remove(which).restart().await;
            devices.insert(which, device);
        }
        broker.restart().await.expect("the broker starts again");
    }

    // Everybody but the sending device itself: all devices of the recipient, and the sender's other ones.
    let is_for = |device: usize, from: usize, to: usize| device != from && [accounts[from], accounts[to]].contains(&accounts[device]);
    let expected: Vec<Vec<MessageId>> = (0..devices.len())
        .map(|device| sent.iter().filter(|(_, (from, to))| is_for(device, *from, *to)).map(|(id, _)| *id).collect())
        .collect();
    let began = Instant::now();
    for (device, expected) in devices.iter().zip(&expected) {
        loop {
            let counts = device.counts();
            let missing = expected.iter().filter(|id| !counts.contains_key(id)).count();
            if missing == 0 {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{} misses {missing} texts", device.database.display());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    tokio::time::sleep(Duration::from_millis(700)).await;
    for (device, expected) in devices.iter().zip(&expected) {
        let counts = device.counts();
        let twice = counts.values().filter(|&&times| times > 1).count();
        assert_eq!((twice, counts.len()), (0, expected.len()), "{}: shown twice, shown at all", device.database.display());
        assert!(!device.watcher.is_finished(), "{} saw something wrong", device.database.display());
    }
    println!("{rounds} kills, {} texts, each shown once on every device that it was for", sent.len());
}
