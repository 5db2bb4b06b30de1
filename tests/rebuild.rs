//! G-REBUILD: a view made anew from the log equals the one it replaces.

use sealpost::clock::{Random as _, SystemRandom};
use sealpost::store::embedded::{EmbeddedStore, Options};
use sealpost::testing::Broker;
use sealpost::wire::stream::Code;
use serde_json::json;

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
    broker.stop().await;

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
