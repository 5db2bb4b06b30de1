//! Acceptance does not depend on the store: while Cassandra is dead, an edge takes first messages between people who never talked.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use reqwest::{Method, StatusCode};
use sealpost::config::{Config, Role};
use sealpost::testing::cluster::TestCluster;
use sealpost::testing::{Broker, RawDevice, RawStream};
use sealpost::wire::stream::{ReceiptKind, server_frame::Frame};

/// A message is accepted in this time, whatever the store does.
const SOON: Duration = Duration::from_secs(1);

fn folder(test: &str) -> Option<String> {
    let folder = std::env::var("SEALPOST_TEST_TOPOLOGY").ok();
    if folder.is_none() {
        eprintln!("{test}: skipped, since SEALPOST_TEST_TOPOLOGY does not name the folder of a topology/local");
    }
    folder
}

fn kill_cassandra(folder: &str) -> Result<()> {
    let pid = std::fs::read_to_string(format!("{folder}/pids/cassandra.pid")).context("Cassandra's process id")?;
    ensure!(Command::new("kill").args(["-KILL", pid.trim()]).status()?.success(), "it runs");
    Ok(())
}

fn start_cassandra(folder: &str) -> Result<()> {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/topology/local");
    ensure!(Command::new(script).args(["restart", "cassandra", "--dir", folder]).status()?.success(), "Cassandra starts again");
    Ok(())
}

/// Opens a stream as clients do: again while the server says that it can't yet.
async fn connected(device: &RawDevice) -> Result<RawStream> {
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match device.connect().await {
            Ok(stream) => return Ok(stream),
            Err(error) if Instant::now() > until => return Err(error),
            Err(_) => tokio::time::sleep(Duration::from_millis(500)).await,
        }
    }
}

async fn accepted(from: &RawDevice, to: &RawDevice, id: u64) -> Result<()> {
    let begun = Instant::now();
    let (status, answer) = from.post(&[to], id, format!("message {id}").as_bytes()).await?;
    ensure!(status.is_success(), "{id}: {status}: {answer}");
    println!("id {id} accepted in {} ms", begun.elapsed().as_millis());
    ensure!(begun.elapsed() < SOON, "id {id} took {} ms", begun.elapsed().as_millis());
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn first_messages_are_accepted_without_the_store_and_delivered_when_it_is_back() -> Result<()> {
    let test = "first_messages_are_accepted_without_the_store_and_delivered_when_it_is_back";
    let (Some(cluster), Some(folder)) = (TestCluster::new(test).await?, folder(test)) else { return Ok(()) };
    let projector = Broker::start_with(|config| cluster.join(config, Role::Projector)).await?;
    let one = Broker::start_with(|config| cluster.join(config, Role::Edge)).await?;
    let alice = one.device("alice@socialink").await?;
    let bob = one.device("bob@vignette").await?;
    let carol = one.device("carol@local").await?;
    let stranger = one.device("dave@local").await?;
    // Applied long ago, as far as another edge knows: an id that is far ahead of what will be tried again.
    accepted(&alice, &bob, 1_000).await?;

    let data = one.data().to_owned();
    let share = |config: &mut Config| {
        cluster.join(config, Role::Edge);
        config.data = data;
    };
    let two = Broker::start_with(share).await?;
    let (alice, bob, carol) = (alice.at(two.url()), bob.at(two.url()), carol.at(two.url()));
    // They are known on this edge, as people are who use it. Nobody has talked here.
    for device in [&alice, &bob, &carol] {
        let (status, _) = device.call(Method::GET, "/v1/account", None).await?;
        ensure!(status.is_success(), "{status}");
    }
    let mut at_bob = bob.connect().await?;
    let backlog = at_bob.backlog().await?;
    ensure!(backlog.len() == 1, "{}", backlog.len());
    at_bob.ack(backlog[0].seq).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;

    kill_cassandra(&folder)?;
    let outcome = async {
        accepted(&alice, &carol, 1).await?;
        accepted(&carol, &bob, 1).await?;
        accepted(&carol, &alice, 1).await?;
        // Too old to tell, which nobody here can know: 409 with the store, a receipt without it.
        accepted(&alice, &bob, 5).await?;
        accepted(&alice, &carol, 2).await?;
        // Whom this edge never heard of has devices that nobody can name.
        let (status, _) = alice.post(&[&stranger], 1, b"who?").await?;
        ensure!(status == StatusCode::SERVICE_UNAVAILABLE, "{status}");
        Ok(())
    };
    let outcome: Result<()> = outcome.await;
    start_cassandra(&folder)?;
    outcome?;

    let begun = Instant::now();
    let live = at_bob.envelope().await?;
    ensure!((live.client_message_id, &live.sender_account[..]) == (1, &carol.addr.account.as_bytes()[..]), "{live:?}");
    println!("live delivery goes on {} ms after Cassandra is ready", begun.elapsed().as_millis());
    at_bob.silent(Duration::from_millis(500)).await?;
    let ids = connected(&carol).await?.backlog().await?.iter().map(|envelope| envelope.client_message_id).collect::<Vec<_>>();
    ensure!(ids == [1, 2], "{ids:?}");
    let mut at_alice = connected(&alice).await?;
    let rejected = at_alice
        .find(|frame| match frame {
            Frame::Receipt(receipt) => receipt.entries.into_iter().find(|entry| entry.kind() == ReceiptKind::Rejected),
            _ => None,
        })
        .await?;
    ensure!(rejected.client_message_ids.iter().any(|range| (range.first..=range.last).contains(&5)), "{rejected:?}");
    drop((one, two, projector));
    Ok(())
}
