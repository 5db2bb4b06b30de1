//! The SDK against a real broker over real sockets.

use std::time::Duration;

use sealpost::client::{Client, Connection, Event, Status, dev_token};
use sealpost::config::Config;
use sealpost::ids::AccountId;
use sealpost::server::Broker;

const PATIENCE: Duration = Duration::from_secs(20);

async fn broker(data: &std::path::Path) -> Broker {
    let config = Config { data: data.to_owned(), listen: ([127, 0, 0, 1], 0).into(), dev: Some(true), ..Config::default() };
    Broker::start(config).await.expect("the broker starts")
}

async fn device(url: &str, identity: &str, path: &std::path::Path) -> Client {
    let token = dev_token(url, &identity.parse().expect("an identity")).await.expect("a token");
    let client = Client::register(url, vec![token], "test", path).await.expect("registered");
    client.start();
    client
}

async fn until<F, T>(what: &str, mut check: F)
where
    F: AsyncFnMut() -> T,
    T: Into<bool>,
{
    let begun = std::time::Instant::now();
    while !check().await.into() {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn texts(client: &Client, conversation: AccountId) -> Vec<String> {
    let history = client.history(conversation, u64::MAX, 1_000).await.expect("history");
    history.into_iter().filter_map(|message| message.body).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_people_talk() {
    let dir = tempfile::tempdir().expect("a folder");
    let broker = broker(&dir.path().join("data")).await;
    let url = broker.url();
    let alice = device(&url, "alice@socialink", &dir.path().join("alice.db")).await;
    let bob = device(&url, "bob@vignette", &dir.path().join("bob.db")).await;
    until("live", async || *alice.connection().borrow() == Connection::Live && *bob.connection().borrow() == Connection::Live).await;
    alice.send_text("bob@vignette", "hello").await.expect("sent");
    until("bob has it", async || texts(&bob, alice.account()).await == ["hello"]).await;
    bob.send_text(alice.account(), "hi").await.expect("sent");
    until("alice has it", async || texts(&alice, bob.account()).await == ["hello", "hi"]).await;
    until("ticks", async || alice.history(bob.account(), u64::MAX, 9).await.expect("history")[0].status == Status::Delivered).await;
    bob.mark_read(alice.account(), u64::MAX).await.expect("read");
    until("read", async || alice.history(bob.account(), u64::MAX, 9).await.expect("history")[0].status == Status::Read).await;
    until("named", async || {
        let conversations = bob.conversations().await.expect("list");
        conversations[0].identities.iter().any(|identity| identity.to_string() == "alice@socialink")
    })
    .await;
    let (one, other) =
        (alice.safety_number("bob@vignette").await.expect("number"), bob.safety_number(alice.account()).await.expect("number"));
    assert_eq!((one.digits.len(), &one.digits, one.fresh), (60, &other.digits, true));
    let mut events = bob.events().await.expect("events");
    let (position, event) = events.next().await.expect("read").expect("an event");
    assert!(matches!(event, Event::Message { message: Some(message), .. } if message.body.as_deref() == Some("hello")));
    events.handled(position).await.expect("noted");
    alice.stop().await;
    bob.stop().await;
    broker.stop().await;
}
