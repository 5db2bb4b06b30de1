//! The projector's worker over a real log and store, at its own pace.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use sealpost::clock::SystemClock;
use sealpost::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, Partition, Seq};
use sealpost::log::embedded::{EmbeddedLog, Options as LogOptions};
use sealpost::log::{AppendError, EventLog, Topic, TopicPartition};
use sealpost::projector::push::{Push, PushBus};
use sealpost::projector::worker::{Pace, Parts, Worker};
use sealpost::store::DeliveryStore as _;
use sealpost::store::embedded::{EmbeddedStore, Options as StoreOptions};
use sealpost::testing::PATIENCE;
use sealpost::wire::event::{self, EnvelopesAccepted, InboxEvent, SealedEnvelope};

struct Nobody;

#[async_trait]
impl PushBus for Nobody {
    async fn push(&self, _: EdgeId, _: Vec<Push>) {}
    async fn broadcast(&self, _: Vec<Push>) {}
    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Streams learn of it from the projector's memory, pages from the store: they must not differ for a whole window.
#[tokio::test]
async fn what_expired_is_in_the_store_soon_and_not_with_the_window() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut options = LogOptions::new(dir.path().join("log"));
    options.segment_bytes = 1 << 20;
    let log = EmbeddedLog::open(options)?;
    let store = EmbeddedStore::open(&dir.path().join("store"), StoreOptions::default())?;
    let parts = Parts {
        log: log.clone(),
        delivery: store.clone(),
        directory: store.clone(),
        groups: store.clone(),
        keys: store.clone(),
        bus: Arc::new(Nobody),
        clock: Arc::new(SystemClock),
    };
    let never = Duration::from_secs(24 * 3600);
    let (worker, _progress) = Worker::new(parts, Pace { window: never, expiry: never, ..Pace::default() });
    let (stop, stops) = tokio::sync::watch::channel(false);
    let running = tokio::spawn(worker.run(stops));

    let device = |n: u8| DeviceAddr { account: AccountId::from_bytes([n; 16]), device: DeviceId::new(1).expect("valid") };
    let bob = device(2);
    let tp = TopicPartition { topic: Topic::Inbox, partition: Partition::of(&bob.account, log.partitions(Topic::Inbox)) };
    let accepted = InboxEvent::EnvelopesAccepted(EnvelopesAccepted {
        recipient: bob.account,
        sender: device(1),
        client_message_id: ClientMessageId(1),
        accepted: sealpost::clock::UnixMillis(1),
        flags: 0,
        envelopes: vec![SealedEnvelope { device: bob.device, kind: 2, sealed: b"sealed" }],
    });
    log.append(tp, event::encode(&accepted)).await?;
    let pending = async || store.pending(bob, Seq::ZERO, Seq::MAX, 10, 1 << 20).await;
    let until = tokio::time::Instant::now() + PATIENCE;
    while pending().await?.is_empty() {
        assert!(tokio::time::Instant::now() < until, "polls see it soon");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let to = pending().await?[0].seq;
    log.append(tp, event::encode(&InboxEvent::Expired { device: bob, to })).await?;
    while !pending().await?.is_empty() {
        assert!(tokio::time::Instant::now() < until, "it goes although the window does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let inbox = store.inboxes(vec![bob]).await?[0].expect("an inbox");
    assert_eq!(inbox.expired_to, to, "the same write says the gap");
    stop.send_replace(true);
    running.await??;
    log.close().await;
    Ok(())
}
