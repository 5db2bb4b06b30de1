//! Clients of the SDK around a broker in this process, and waiting for what must come.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sealpost::client::{Client, Connection, Event, Message, Status, dev_token};
use sealpost::config::{Config, Role};
use sealpost::ids::AccountId;
use sealpost::server::Broker;
use sealpost::testing::cluster::TestCluster;
use tempfile::TempDir;

pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct World {
    pub dir: TempDir,
    pub broker: Broker,
    pub url: String,
}

impl World {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let broker = start(dir.path(), ([127, 0, 0, 1], 0).into()).await;
        let url = broker.url();
        Self { dir, broker, url }
    }

    /// Stops the broker and starts it at the same address, with the same data.
    pub async fn restart(self, down: Duration) -> Self {
        let Self { dir, broker, url } = self;
        let address = broker.address();
        broker.stop().await;
        tokio::time::sleep(down).await;
        let broker = start(dir.path(), address).await;
        Self { dir, broker, url }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(format!("{name}.db"))
    }

    /// Registers a device that does not run yet.
    pub async fn idle(&self, identity: &str, name: &str) -> Client {
        let token = self.token(identity).await;
        Client::register(&self.url, vec![token], name, self.path(name)).await.expect("registered")
    }

    pub async fn device(&self, identity: &str, name: &str) -> Client {
        let client = self.idle(identity, name).await;
        client.start();
        live(&client).await;
        client
    }

    pub async fn token(&self, identity: &str) -> String {
        dev_token(&self.url, &identity.parse().expect("an identity")).await.expect("a token")
    }
}

async fn start(dir: &Path, listen: std::net::SocketAddr) -> Broker {
    let mut config = Config { data: dir.join("data"), listen, dev: Some(true), ..Config::default() };
    if let Some(cluster) = TestCluster::of_folder(dir).await.expect("the cluster makes topics and keyspaces") {
        cluster.join(&mut config, Role::All);
    }
    Broker::start(config).await.expect("the broker starts")
}

pub async fn until(what: &str, mut check: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !check().await {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn live(client: &Client) {
    until("it is connected", async || *client.connection().borrow() == Connection::Live).await;
}

pub async fn history(client: &Client, conversation: AccountId) -> Vec<Message> {
    client.history(conversation, u64::MAX, 10_000).await.expect("history")
}

pub async fn texts(client: &Client, conversation: AccountId) -> Vec<String> {
    history(client, conversation).await.into_iter().filter_map(|message| message.body).collect()
}

pub async fn has(client: &Client, conversation: AccountId, wanted: &[&str]) {
    let begun = Instant::now();
    while texts(client, conversation).await != wanted {
        assert!(begun.elapsed() < PATIENCE, "{:?} instead of {wanted:?}", texts(client, conversation).await);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn status(client: &Client, conversation: AccountId, wanted: Status) {
    let begun = Instant::now();
    loop {
        let last = history(client, conversation).await.pop().map(|message| message.status);
        if last == Some(wanted) {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "{last:?} instead of {wanted:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn told(client: &Client, wanted: impl Fn(&Event) -> bool) -> bool {
    client.events_after(0, 10_000).await.expect("events").iter().any(|(_, event)| wanted(event))
}
