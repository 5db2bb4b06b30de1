//! G-BLIND: nothing that people write and no private key is anywhere in what the broker keeps or says. Real clients talk
//! through a real broker process; then its folder, its log and its metrics are searched, while it runs, right after it was
//! killed, and after it stopped.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use libsignal_protocol::{GenericSignedPreKey as _, IdentityKeyPair, KyberPreKeyRecord, PreKeyRecord, SignedPreKeyRecord};
use sealpost::cli::canary::{Canary, Searched};
use sealpost::cli::child::BrokerProcess;
use sealpost::client::{Client, Message, Status, dev_token};
use sealpost::ids::AccountId;
use sealpost::testing::process;

async fn join(server: &str, identity: &str, folder: &Path, device: &str) -> Arc<Client> {
    let token = dev_token(server, &identity.parse().unwrap()).await.unwrap();
    Arc::new(Client::register(server, vec![token], device, folder.join(device)).await.unwrap())
}

async fn until<T>(what: &str, look: impl AsyncFn() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{what}: not within 30 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn with_body(client: &Client, peer: AccountId, body: &str) -> Option<Message> {
    let history = client.history(peer, u64::MAX, 200).await.unwrap();
    history.into_iter().find(|message| message.body.as_deref() == Some(body))
}

/// Every private key in a client's database, and what else only its owner may know.
fn secrets(database: &Path) -> Vec<Vec<u8>> {
    let connection = rusqlite::Connection::open(database).unwrap();
    let blobs = |query: &str| -> Vec<Vec<u8>> {
        let mut statement = connection.prepare(query).unwrap();
        statement.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect()
    };
    let mut out = Vec::new();
    for pair in blobs("SELECT value FROM meta WHERE key = 'own_identity'") {
        out.push(IdentityKeyPair::try_from(&pair[..]).unwrap().private_key().serialize());
    }
    for record in blobs("SELECT record FROM prekeys") {
        out.push(PreKeyRecord::deserialize(&record).unwrap().private_key().unwrap().serialize());
    }
    for record in blobs("SELECT record FROM signed_prekeys") {
        out.push(SignedPreKeyRecord::deserialize(&record).unwrap().private_key().unwrap().serialize());
    }
    for record in blobs("SELECT record FROM kyber_prekeys") {
        let secret = KyberPreKeyRecord::deserialize(&record).unwrap().secret_key().unwrap().serialize();
        // Behind the type byte stands the secret vector; the public key, which the server has, comes after it.
        out.push(secret[1..65].to_vec());
    }
    // The server keeps a hash of the credential's secret.
    for credential in blobs("SELECT value FROM meta WHERE key = 'credential'") {
        out.push(URL_SAFE_NO_PAD.decode(&credential[4..]).unwrap()[17..].to_vec());
        out.push(credential);
    }
    assert!(out.len() > 5 && out.iter().all(|secret| secret.len() >= 32), "the database has private keys");
    out
}

/// Where the server keeps things. On the cluster profile Kafka and Cassandra do: in folders that bear the test's name, and in the commit log.
fn kept(broker: &BrokerProcess) -> Vec<PathBuf> {
    let mut folders = vec![broker.data().to_owned()];
    let cluster = broker.settings().iter().find(|(name, _)| name == "SEALPOST_CQL__KEYSPACE").map(|(_, keyspace)| keyspace);
    if let (Some(name), Some(cluster)) = (cluster, std::env::var_os("SEALPOST_TEST_TOPOLOGY")) {
        named(Path::new(&cluster), name, &mut folders);
        assert!(folders.len() > 5, "topics, keyspaces and the commit log: {folders:?}");
    }
    folders
}

fn named(folder: &Path, name: &str, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, file) = (entry.path(), entry.file_name());
        let file = file.to_string_lossy();
        if file.starts_with(name) || file == "commitlog" {
            found.push(path);
        } else {
            named(&path, name, found);
        }
    }
}

async fn search(canary: &Canary, broker: &BrokerProcess, when: &str) -> Searched {
    let mut searched = Searched::default();
    for folder in kept(broker) {
        canary.search_folder(&folder, &mut searched).unwrap();
    }
    canary.search(&std::fs::read(broker.log()).unwrap(), &mut searched);
    if broker.pid().is_some() {
        for path in ["metrics", "openapi.json", "v1/server"] {
            let url = broker.url().join(path).unwrap();
            let body = reqwest::Client::builder().no_proxy().build().unwrap().get(url).send().await.unwrap().bytes().await.unwrap();
            assert!(!body.is_empty(), "{path} says something");
            canary.search(&body, &mut searched);
        }
    }
    println!("{when}: {} bytes in {} sources searched, {} found", searched.bytes, searched.sources, searched.found);
    assert_eq!(searched.found, 0, "{when}");
    assert!(searched.sources > 3 && searched.bytes > 10_000, "{when}: there was something to search: {searched:?}");
    searched
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext_and_private_keys_are_nowhere_on_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let mut broker = process::start(program, folder.path()).await.unwrap();
    let server = broker.url().as_str().trim_end_matches('/').to_owned();
    let alice = join(&server, "alice@socialink", folder.path(), "alice").await;
    let bob = join(&server, "bob@vignette", folder.path(), "bob").await;
    // Away all the time: what is for it rests on the server's disk.
    let laptop = join(&server, "bob@vignette", folder.path(), "laptop").await;
    alice.start();
    bob.start();

    let texts: Vec<String> =
        (0..20).map(|n| format!("The heron waits by weir number {n}, nobody else may know. Ça reste entre nous, 鷺 {n}.")).collect();
    for (n, text) in texts.iter().enumerate() {
        let (from, to) = if n % 2 == 0 { (&alice, bob.account()) } else { (&bob, alice.account()) };
        from.send_text(to, text).await.unwrap();
        let (other, author) = if n % 2 == 0 { (&bob, alice.account()) } else { (&alice, bob.account()) };
        until("a text arrives", async || with_body(other, author, text).await).await;
    }
    let first = until("alice's own text", async || with_body(&alice, bob.account(), &texts[0]).await).await;
    let edited = "Edited: the heron has left for the southern weir by night.";
    alice.edit(&first, edited).await.unwrap();
    let reaction = "seen-by-the-heron 🪶";
    let at_bob = until("the edit arrives", async || with_body(&bob, alice.account(), edited).await).await;
    bob.react(&at_bob, Some(reaction)).await.unwrap();
    bob.mark_read(alice.account(), u64::MAX).await.unwrap();
    until("read ticks arrive", async || {
        let message = with_body(&alice, bob.account(), &texts[18]).await?;
        (message.status == Status::Read).then_some(())
    })
    .await;

    // The search itself is proven by what the server must have: a public key.
    let connection = rusqlite::Connection::open(copy(folder.path(), "bob")).unwrap();
    let pair: Vec<u8> = connection.query_row("SELECT value FROM meta WHERE key = 'own_identity'", [], |row| row.get(0)).unwrap();
    let mut control = Canary::new();
    control.add(IdentityKeyPair::try_from(&pair[..]).unwrap().public_key().public_key_bytes());
    let mut searched = Searched::default();
    for folder in kept(&broker) {
        control.search_folder(&folder, &mut searched).unwrap();
    }
    assert!(searched.found > 0, "a public key is found where it must be");

    let mut canary = Canary::new();
    for text in texts.iter().map(String::as_str).chain([edited, reaction, "The heron waits by weir", "nobody else may know"]) {
        assert!(canary.add(text.as_bytes()));
    }
    for device in ["alice", "bob", "laptop"] {
        for secret in secrets(&copy(folder.path(), device)) {
            assert!(canary.add(&secret));
        }
    }
    search(&canary, &broker, "while it runs").await;
    broker.kill9();
    search(&canary, &broker, "after kill -9").await;
    broker.restart().await.unwrap();

    laptop.start();
    until("the laptop catches up", async || with_body(&laptop, alice.account(), &texts[18]).await).await;
    search(&canary, &broker, "after catching up").await;
    for client in [&alice, &bob, &laptop] {
        client.stop().await;
    }
    assert!(broker.stop(Duration::from_secs(30)).await.unwrap(), "it stops well when asked to");
    search(&canary, &broker, "after it stopped").await;
}

/// A database as it is now, beside the one that its client has locked.
fn copy(folder: &Path, device: &str) -> std::path::PathBuf {
    let to = folder.join(format!("copy-of-{device}"));
    for ending in ["", "-wal"] {
        let from = folder.join(format!("{device}{ending}"));
        if from.exists() {
            std::fs::copy(from, folder.join(format!("copy-of-{device}{ending}"))).unwrap();
        }
    }
    to
}
