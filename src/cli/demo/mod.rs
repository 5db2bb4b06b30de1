//! `sealpost demo`: two people on two platforms talk through a broker that is killed on the way. Real processes, the real
//! SDK, real libsignal; and in the end the count of what came, and a search for the plaintext on the server.

mod book;
mod stage;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;
use tempfile::TempDir;
use tokio::task::JoinHandle;

use self::book::{Book, Sums};
use self::stage::{Stage, Who};
use crate::cli::canary::{Canary, Searched};
use crate::cli::child::BrokerProcess;
use crate::client::{Client, Connection, Status, dev_token};
use crate::ids::{AccountId, Identity};

const PHONE: &str = "bob's phone";
const LAPTOP: &str = "bob's laptop";
const ALICE: &str = "alice";
/// How long anything in the story may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// Tells a whole story: registration, ratchet steps, kill -9, an offline device that catches up; and counts.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The figures as one JSON object, without the story
    #[arg(long)]
    json: bool,
    /// No pauses for reading
    #[arg(long)]
    fast: bool,
    /// Keep the broker's folder and log, and say where
    #[arg(long)]
    keep: bool,
}

/// How the story ended.
#[derive(Debug, Serialize)]
struct Ending {
    texts_sent: u64,
    deliveries_expected: u64,
    delivered: u64,
    duplicated: u64,
    lost: u64,
    kills: u32,
    p50_ms: f64,
    p99_ms: f64,
    max_ms: f64,
    catch_up_ms: f64,
    caught_up_texts: u64,
    data: Searched,
    log: Searched,
    metrics: Searched,
    troubles: Vec<String>,
}

impl Ending {
    fn good(&self) -> bool {
        let found = self.data.found + self.log.found + self.metrics.found;
        self.lost == 0 && self.duplicated == 0 && found == 0 && self.troubles.is_empty()
    }
}

/// Runs the demo; a loss, a duplicate or a plaintext on the server is an error.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let stage = Stage::new(!args.json, args.fast);
    let program = std::env::current_exe().context("this program's own path")?;
    let mut folder = tempfile::Builder::new().prefix("sealpost-demo-").tempdir()?;
    if args.keep {
        folder.disable_cleanup(true);
    }
    let ending = tokio::select! {
        ending = play(&stage, &program, &folder) => ending?,
        stopped = tokio::signal::ctrl_c() => { stopped?; bail!("stopped") }
    };
    if args.json {
        println!("{}", serde_json::to_string(&ending)?);
    } else {
        stage.curtain(&ending);
    }
    if args.keep {
        eprintln!("kept: {}", folder.path().display());
    }
    ensure!(ending.good(), "the story did not end well: {}", ending.troubles.join("; "));
    Ok(())
}

struct Person {
    client: Arc<Client>,
    watcher: JoinHandle<anyhow::Result<()>>,
}

struct Cast {
    book: Book,
    alice: Person,
    phone: Person,
    laptop: Person,
    alice_account: AccountId,
    bob_account: AccountId,
}

impl Drop for Cast {
    fn drop(&mut self) {
        for person in [&self.alice, &self.phone, &self.laptop] {
            person.watcher.abort();
        }
    }
}

impl Cast {
    async fn assemble(server: &str, folder: &Path) -> anyhow::Result<Self> {
        let book = Book::default();
        let join = async |identity: &str, device: &str, name: &'static str| {
            let identity: Identity = identity.parse()?;
            let token = dev_token(server, &identity).await?;
            let database = folder.join(format!("{}.db", name.replace(['\'', ' '], "-")));
            let client = Arc::new(Client::register(server, vec![token], device, database).await?);
            let watcher = tokio::spawn(book.clone().watch(client.clone(), name));
            anyhow::Ok(Person { client, watcher })
        };
        let alice = join("alice@socialink", "alice's phone", ALICE).await?;
        let phone = join("bob@vignette", PHONE, PHONE).await?;
        let laptop = join("bob@vignette", LAPTOP, LAPTOP).await?;
        let (alice_account, bob_account) = (alice.client.account(), phone.client.account());
        ensure!(laptop.client.account() == bob_account, "bob's devices are one account");
        Ok(Self { book, alice, phone, laptop, alice_account, bob_account })
    }

    async fn say(&self, stage: &Stage, who: Who, body: &str, live: bool) -> anyhow::Result<()> {
        stage.says(who, body);
        let sent = Instant::now();
        let (client, to, expected) = match who {
            Who::Alice => (&self.alice.client, self.bob_account, [PHONE, LAPTOP]),
            Who::Bob => (&self.phone.client, self.alice_account, [ALICE, LAPTOP]),
        };
        let id = client.send_text(to, body).await?;
        self.book.sent(id, body, sent, &expected, live);
        Ok(())
    }

    /// Until everybody who is there was shown everything.
    async fn heard(&self) -> anyhow::Result<Duration> {
        self.book
            .wait("alice and bob's phone show every text", PATIENCE, |book| book.missing_at(ALICE) == 0 && book.missing_at(PHONE) == 0)
            .await
    }

    async fn talk(&self, stage: &Stage, lines: &[(Who, &str)]) -> anyhow::Result<()> {
        for &(who, body) in lines {
            self.say(stage, who, body, true).await?;
            self.heard().await?;
            stage.pause(1).await;
        }
        Ok(())
    }
}

async fn connected(client: &Client) -> anyhow::Result<()> {
    let mut connection = client.connection();
    let live = connection.wait_for(|state| *state == Connection::Live);
    tokio::time::timeout(PATIENCE, live).await.context("a client did not get connected")??;
    Ok(())
}

async fn play(stage: &Stage, program: &Path, folder: &TempDir) -> anyhow::Result<Ending> {
    let (data, log) = (folder.path().join("server"), folder.path().join("server.log"));
    stage.act("A broker starts, with everything in one folder");
    let mut broker = BrokerProcess::start(program, &data, &log).await?;
    let server = broker.url().as_str().trim_end_matches('/').to_owned();
    stage.tell(&format!("process {} listens on {server}, its log and store are in {}", broker.pid().unwrap_or_default(), data.display()));

    stage.act("Two people of two platforms register");
    let cast = Cast::assemble(&server, folder.path()).await?;
    stage.tell("alice@socialink has a phone; bob@vignette has a phone and a laptop. Their private keys never leave their own files.");
    cast.alice.client.start();
    cast.phone.client.start();
    connected(&cast.alice.client).await?;
    connected(&cast.phone.client).await?;
    stage.tell("Bob's laptop stays closed for now: what is sent to it waits on the broker, unreadable.");
    safety_numbers(stage, &cast).await?;

    stage.act("They talk: each answer is a step of the ratchet, with keys that were never used before");
    cast.talk(stage, OPENING).await?;

    stage.act("The broker is killed with -9, again and again, while they write");
    let kills = killing(stage, &cast, &mut broker).await?;

    stage.act("Bob reads, and Alice sees it");
    cast.phone.client.mark_read(cast.alice_account, u64::MAX).await?;
    cast.talk(stage, CLOSING).await?;

    stage.act("Bob opens his laptop, which was away all the time");
    let waiting = cast.book.missing_at(LAPTOP) as u64;
    let began = Instant::now();
    cast.laptop.client.start();
    cast.book.wait("bob's laptop shows what it missed", PATIENCE, |book| book.missing_at(LAPTOP) == 0).await?;
    let catch_up = began.elapsed();
    stage.tell(&format!("It fetched, decrypted and kept {waiting} texts in {:.0} ms, each once, in order.", millis(catch_up)));
    cast.book.wait("every text is ticked as delivered", PATIENCE, |book| book.below(Status::Delivered) == 0).await?;
    // What must not come, a second copy, gets a moment to come.
    tokio::time::sleep(Duration::from_millis(700)).await;

    stage.act("Was any of it readable for the broker?");
    let bodies = cast.book.bodies();
    let (in_data, in_log, in_metrics) = search(&broker, &bodies).await?;
    stage.tell(&format!(
        "All {} texts were looked for in {} files ({:.1} MB) of its folder, in its log and in its metrics.",
        bodies.len(),
        in_data.sources,
        in_data.bytes as f64 / 1e6
    ));

    let (sums, latencies) = (cast.book.sums(), cast.book.latencies());
    let troubles = cast.book.troubles();
    for person in [&cast.alice, &cast.phone, &cast.laptop] {
        person.client.stop().await;
    }
    ensure!(broker.stop(Duration::from_secs(20)).await?, "the broker did not stop when asked to");
    let Sums { sent, expected, delivered, duplicated, lost } = sums;
    let at = |quantile: f64| latencies.get(((latencies.len().max(1) - 1) as f64 * quantile).round() as usize).copied().map_or(0.0, millis);
    Ok(Ending {
        texts_sent: sent,
        deliveries_expected: expected,
        delivered,
        duplicated,
        lost,
        kills,
        p50_ms: at(0.5),
        p99_ms: at(0.99),
        max_ms: at(1.0),
        catch_up_ms: millis(catch_up),
        caught_up_texts: waiting,
        data: in_data,
        log: in_log,
        metrics: in_metrics,
        troubles,
    })
}

async fn safety_numbers(stage: &Stage, cast: &Cast) -> anyhow::Result<()> {
    let seen_by_alice = cast.alice.client.safety_number(cast.bob_account).await?.digits;
    let seen_by_bob = cast.phone.client.safety_number(cast.alice_account).await?.digits;
    ensure!(seen_by_alice == seen_by_bob, "both sides must see the same safety number");
    let groups: Vec<String> = seen_by_alice.as_bytes().chunks(5).map(|five| String::from_utf8_lossy(five).into_owned()).collect();
    stage.tell(&format!("Both see the same safety number, so nobody sits between them: {}", groups.join(" ")));
    Ok(())
}

/// Texts are sent while the broker dies and comes back.
async fn killing(stage: &Stage, cast: &Cast, broker: &mut BrokerProcess) -> anyhow::Result<u32> {
    const LINES_A_KILL: usize = 4;
    let mut kills = 0;
    for lines in STORM.chunks(LINES_A_KILL) {
        let (before, after) = lines.split_at(lines.len() / 2);
        for &(who, body) in before {
            cast.say(stage, who, body, false).await?;
        }
        // No waiting: some of these are accepted, some are on their way, some have not left.
        let pid = broker.pid().unwrap_or_default();
        broker.kill9();
        kills += 1;
        stage.broker(&format!("kill -9 {pid}"));
        for &(who, body) in after {
            cast.say(stage, who, body, false).await?;
        }
        stage.pause(1).await;
        let took = broker.restart().await?;
        stage.broker(&format!(
            "started again as process {}: log and store recovered in {:.0} ms",
            broker.pid().unwrap_or_default(),
            millis(took)
        ));
        let took = cast.heard().await?;
        stage.tell(&format!("Everything has arrived {:.0} ms later.", millis(took)));
        stage.pause(1).await;
    }
    Ok(kills)
}

async fn search(broker: &BrokerProcess, bodies: &[String]) -> anyhow::Result<(Searched, Searched, Searched)> {
    let mut canary = Canary::new();
    for body in bodies {
        ensure!(canary.add(body.as_bytes()), "a text too short to be looked for");
    }
    let metrics =
        reqwest::Client::builder().no_proxy().build()?.get(broker.url().join("metrics")?).send().await?.error_for_status()?.bytes().await?;
    let (data, log) = (broker.data().to_owned(), broker.log().to_owned());
    tokio::task::spawn_blocking(move || {
        let (mut in_data, mut in_log, mut in_metrics) = Default::default();
        canary.search_folder(&data, &mut in_data)?;
        canary.search(&std::fs::read(&log)?, &mut in_log);
        canary.search(&metrics, &mut in_metrics);
        Ok((in_data, in_log, in_metrics))
    })
    .await?
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1_000.0
}

const OPENING: &[(Who, &str)] = &[
    (Who::Alice, "Bob! I found you from the other platform. Does this reach you?"),
    (Who::Bob, "It does. Vignette here, reading you loud and clear."),
    (Who::Alice, "Nobody between us can read this, not even the server that carries it."),
    (Who::Bob, "Prove it :) Shall we pull its plug while we write?"),
    (Who::Alice, "That was the plan. Grüße, 你好, مرحبا, 👋🏽: any script goes through."),
    (Who::Bob, "All of them arrived."),
];

const STORM: &[(Who, &str)] = &[
    (Who::Alice, "First text of the storm, sent while all is calm."),
    (Who::Bob, "Second one, from the other side."),
    (Who::Alice, "Third: has the lightning struck yet?"),
    (Who::Bob, "Fourth, written in the dark."),
    (Who::Alice, "Fifth, kept on my phone until somebody answers."),
    (Who::Bob, "Sixth, I am still here."),
    (Who::Alice, "Seventh: the log has this one on disk before I am told so."),
    (Who::Bob, "Eighth, and I will not see any of them twice."),
    (Who::Alice, "Ninth, sent again with the same number, shown once."),
    (Who::Bob, "Tenth. My laptop knows nothing of all this yet."),
    (Who::Alice, "Eleventh: it will, in the right order."),
    (Who::Bob, "Twelfth and last of the storm."),
];

const CLOSING: &[(Who, &str)] = &[(Who::Bob, "Nothing missing, nothing twice."), (Who::Alice, "Then open your laptop, and let us count.")];
