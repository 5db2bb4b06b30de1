//! G-REBUILD: a view made anew from the log equals the one it replaces.

use std::time::Duration;

use sealpost::clock::{Random as _, SystemRandom};
use sealpost::log::EventLog as _;
use sealpost::log::embedded::{EmbeddedLog, Options as LogOptions};
use sealpost::server::control::{Answer, Question, ask};
use sealpost::store::embedded::{EmbeddedStore, Options};
use sealpost::testing::Broker;
use sealpost::wire::stream::Code;
use serde_json::json;

/// A broker that is stopped leaves what it had not applied yet to the next one. So it starts until nothing is left, with what followed
/// from that (receipts, say).
async fn stop_settled(broker: &mut Broker) -> anyhow::Result<()> {
    for _ in 0..2 {
        broker.restart().await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    broker.stop().await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rebuilt_view_equals_the_live_one_and_serves_the_same() -> anyhow::Result<()> {
    let mut broker = Broker::start().await?;
    let mut devices = Vec::new();
    for name in ["alice@socialink", "bob@vignette", "bob@vignette", "carol@local", "dave@local"] {
        devices.push(broker.device(name).await?);
    }
    let [alice, phone, tablet, carol, dave] = &devices[..] else { unreachable!("five were made") };
    let mut stream = alice.connect().await?;
    let mut seed = [0; 1];
    SystemRandom.fill(&mut seed);
    for id in 1..=60u64 {
        stream.send(&[phone, tablet], id, &vec![seed[0]; 100 + id as usize]).await?;
        assert_eq!(stream.result(id).await?.code(), Code::Ok);
        stream.send(&[carol], id, b"for carol").await?;
        assert_eq!(stream.result(id).await?.code(), Code::Ok);
    }
    // Some of it acknowledged, a device revoked, an account deleted, a block: every kind of event leaves its trace.
    let mut online = phone.connect().await?;
    let backlog = online.backlog().await?;
    online.ack(backlog[29].seq).await?;
    carol.call(reqwest::Method::PUT, &format!("/v1/blocks/{}", alice.addr.account), None).await?;
    phone.call(reqwest::Method::PATCH, "/v1/devices/1", Some(json!({ "name": "my phone" }))).await?;
    let spare = broker.device("alice@socialink").await?;
    alice.call(reqwest::Method::DELETE, &format!("/v1/devices/{}", spare.addr.device), None).await?;
    dave.call(reqwest::Method::DELETE, "/v1/account", None).await?;
    drop((stream, online));
    stop_settled(&mut broker).await?;

    let dir = broker.data().join("store");
    let dump = async || -> anyhow::Result<_> { Ok(EmbeddedStore::open(&dir, Options::default())?.dump_view().await?) };
    let live = dump().await?;
    let rebuilt = sealpost::server::rebuild(broker.config(), |_| {}).await?;
    assert!(rebuilt.records > 130, "{rebuilt:?}");
    assert_eq!(dump().await?, live, "the view made anew");
    sealpost::server::rebuild(broker.config(), |_| {}).await?;
    assert_eq!(dump().await?, live, "a second time");

    broker.restart().await?;
    let rest = phone.connect().await?.backlog().await?;
    assert!(rest.iter().map(|envelope| envelope.client_message_id).eq(31..=60));
    assert_eq!(tablet.connect().await?.backlog().await?.len(), 60);
    let (_, account) = phone.call(reqwest::Method::GET, "/v1/account", None).await?;
    assert_eq!(account["devices"][0]["name"], json!("my phone"));
    Ok(())
}

/// The same over partitions that were scaled: what followed a change is applied behind what was before it, however the view comes to be
/// older than the log.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_is_older_than_a_change_of_the_partitions_meets_it_again() -> anyhow::Result<()> {
    let mut broker = Broker::start().await?;
    let (alice, bob, carol) =
        (broker.device("alice@socialink").await?, broker.device("bob@vignette").await?, broker.device("carol@local").await?);
    let mut stream = alice.connect().await?;
    let mut online = carol.connect().await?;
    let mut id = 0;
    for partitions in [40, 5] {
        for _ in 0..30 {
            id += 1;
            stream.send(&[&bob], id, b"for bob").await?;
            assert_eq!(stream.result(id).await?.code(), Code::Ok);
        }
        stream.send(&[&carol], 1_000 + id, b"for carol").await?;
        let seq = online.envelope().await?.seq;
        online.ack(seq).await?;
        let Answer::Layout(_) = ask(broker.data(), Question::Scale { partitions }).await? else { anyhow::bail!("another answer") };
        loop {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let Answer::Layout(layout) = ask(broker.data(), Question::Layout).await? else { anyhow::bail!("another answer") };
            anyhow::ensure!(layout.partitions == partitions);
            if layout.draining == 0 {
                break;
            }
        }
    }
    for _ in 0..30 {
        id += 1;
        stream.send(&[&bob], id, b"for bob").await?;
        assert_eq!(stream.result(id).await?.code(), Code::Ok);
    }
    drop((stream, online));
    stop_settled(&mut broker).await?;

    let dir = broker.data().join("store");
    let dump = async || -> anyhow::Result<_> { Ok(EmbeddedStore::open(&dir, Options::default())?.dump_view().await?) };
    let live = dump().await?;
    let rebuilt = sealpost::server::rebuild(broker.config(), |_| {}).await?;
    assert!(rebuilt.records > 90, "{rebuilt:?}");
    assert_eq!(dump().await?, live, "the view made anew");

    // Lost altogether: the broker makes it anew as it starts.
    std::fs::remove_dir_all(dir.join("view"))?;
    broker.restart().await?;
    let backlog = bob.connect().await?.backlog().await?;
    assert!(backlog.iter().map(|envelope| envelope.client_message_id).eq(1..=90));
    assert!(backlog.windows(2).all(|pair| pair[0].seq < pair[1].seq));
    assert_eq!(carol.connect().await?.backlog().await?.len(), 0, "what was acknowledged stays so");
    broker.stop().await;

    // Killed between making partitions and opening them: nobody waits for those.
    let mut options = LogOptions::new(broker.data().join("log"));
    options.partitions.directory = broker.config().partitions.directory;
    let log = EmbeddedLog::open(options)?;
    log.grow_inbox(100)?;
    log.close().await;
    sealpost::server::rebuild(broker.config(), |_| {}).await?;
    broker.restart().await?;
    let Answer::Layout(layout) = ask(broker.data(), Question::Layout).await? else { anyhow::bail!("another answer") };
    assert_eq!((layout.partitions, layout.first, layout.topic_partitions, layout.retired), (5, 56, 100, 56));
    assert_eq!(bob.connect().await?.backlog().await?.len(), 90);
    Ok(())
}
