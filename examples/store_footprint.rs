//! What the embedded stores cost: memory for registered devices, time to read a backlog, time to take one-time prekeys.
//!
//! `cargo run --release --features test-util --example store_footprint [DEVICES]`

use std::sync::Arc;
use std::time::{Duration, Instant};

use sealpost::clock::SystemRandom;
use sealpost::ids::{AccountId, DeviceAddr, DeviceId, Seq};
use sealpost::store::conformance::{account_record, device, envelope};
use sealpost::store::embedded::{EmbeddedStore, Options};
use sealpost::store::seal::SealKey;
use sealpost::store::{DeliveryStore, DeliveryWrite, DeviceKeys, DirectoryStore, DirectoryWrite, InboxState, KeyKind, KeyStore};
use sealpost::wire::event::SignedKey;

/// Resident memory of this process, in bytes.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn key(id: u32, bytes: usize) -> SignedKey {
    SignedKey { id, public_key: vec![id as u8; bytes], signature: vec![7; 64] }
}

async fn register(store: &Arc<EmbeddedStore>, number: u64) {
    let record = account_record(number, &[&format!("user{number}@realm")]);
    let addr = device(number, 1);
    store.claim_identity(&record.identities[0], record.id).await.expect("claims");
    store.seal_key(record.id, Some(SealKey::random(&SystemRandom))).await.expect("makes a key");
    let keys = DeviceKeys { signed_prekey: key(1, 33), pq_last_resort: key(2, 1569) };
    let linked = vec![(record.identities[0].clone(), record.id)];
    let write = DirectoryWrite { accounts: vec![record], keys: vec![(addr, Some(keys))], linked, ..Default::default() };
    store.write_directory(write).await.expect("writes");
    store.add_one_time(addr, KeyKind::Ec, vec![key(1, 33), key(2, 33)]).await.expect("adds");
    let inboxes = vec![(addr, InboxState::default())];
    store.write(DeliveryWrite { inboxes, ..Default::default() }).await.expect("writes");
}

#[tokio::main]
async fn main() {
    let devices: u64 = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(20_000);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let store = EmbeddedStore::open(dir.path(), Options::default()).expect("opens");
    let empty = resident();
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..64 {
        let store = store.clone();
        tasks.spawn(async move {
            for number in (worker..devices).step_by(64) {
                register(&store, number).await;
            }
        });
    }
    while tasks.join_next().await.is_some() {}
    let per_s = devices as f64 / start.elapsed().as_secs_f64();
    println!("{devices} devices registered at {per_s:.0}/s, {:.1} MB on disk", store.disk_bytes() as f64 / 1e6);
    println!(
        "memory: {:.1} MB empty, {:.1} MB after, {} bytes a device",
        empty as f64 / 1e6,
        resident() as f64 / 1e6,
        (resident() - empty) / devices
    );
    tokio::time::sleep(Duration::from_secs(12)).await;
    println!("after a rest (blocking threads gone): {} bytes a device", (resident() - empty) / devices);

    let one = DeviceAddr { account: AccountId::from_bytes([9; 16]), device: DeviceId::new(1).expect("valid") };
    let start = Instant::now();
    for batch in 0..10 {
        let put = (0..1000).map(|i| (one, envelope(batch * 1000 + i + 1, 5, 1024))).collect();
        store.write(DeliveryWrite { put, ..Default::default() }).await.expect("writes");
    }
    println!("10,000 pending of 1 KiB written in {:?}", start.elapsed());
    for round in 0..3 {
        let (start, mut after, mut first, mut count) = (Instant::now(), Seq::ZERO, None, 0);
        loop {
            let page = store.pending(one, after, Seq::MAX, 1000, usize::MAX).await.expect("reads");
            first.get_or_insert_with(|| start.elapsed());
            let Some(last) = page.last() else { break };
            (after, count) = (last.seq, count + page.len());
        }
        println!("read {round}: {count} in {:?}, first page in {:?}", start.elapsed(), first.unwrap_or_default());
    }
    let start = Instant::now();
    store.write(DeliveryWrite { drop_to: vec![(one, Seq(10_000))], ..Default::default() }).await.expect("writes");
    println!("dropped in {:?}", start.elapsed());
    backlog(&store).await;
    takes(&store).await;
    println!("memory at the end: {:.1} MB", resident() as f64 / 1e6);
}

/// Many devices' backlogs as fast as they go in, a window of 1,000 items a write; then everything is dropped.
async fn backlog(store: &Arc<EmbeddedStore>) {
    let (start, mut worst) = (Instant::now(), Duration::ZERO);
    for batch in 0..200 {
        let put = (0..1000).map(|i| (device(30_000 + i, 1), envelope(batch + 1, 5, 1024))).collect();
        let write = Instant::now();
        store.write(DeliveryWrite { put, ..Default::default() }).await.expect("writes");
        worst = worst.max(write.elapsed());
    }
    println!("200,000 pending of 1 KiB for 1,000 devices written in {:?}, worst window {worst:?}", start.elapsed());
    println!("memory then: {:.1} MB, disk {:.1} MB", resident() as f64 / 1e6, store.disk_bytes() as f64 / 1e6);
    let start = Instant::now();
    let mut worst = Duration::ZERO;
    for n in 0..1000 {
        let one = device(30_000 + n, 1);
        let read = Instant::now();
        assert_eq!(store.pending(one, Seq::ZERO, Seq::MAX, 1000, usize::MAX).await.expect("reads").len(), 200);
        worst = worst.max(read.elapsed());
        let inboxes = vec![(one, InboxState { cursor: Seq(200), ..Default::default() })];
        store.write(DeliveryWrite { drop_to: vec![(one, Seq(200))], inboxes, ..Default::default() }).await.expect("writes");
    }
    println!("read and dropped in {:?}, worst read {worst:?}, memory {:.1} MB", start.elapsed(), resident() as f64 / 1e6);
}

/// 500 takes a second, open loop.
async fn takes(store: &Arc<EmbeddedStore>) {
    for number in 0..20 {
        let keys = (10..110).map(|id| key(id, 1569)).collect();
        store.add_one_time(device(number, 1), KeyKind::Pq, keys).await.expect("adds");
    }
    let mut ticks = tokio::time::interval(Duration::from_millis(2));
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..2000 {
        ticks.tick().await;
        let store = store.clone();
        tasks.spawn(async move {
            let start = Instant::now();
            let (key, _) = store.take_one_time(device(n % 20, 1), KeyKind::Pq).await.expect("takes");
            assert!(key.is_some());
            start.elapsed()
        });
    }
    let mut took: Vec<Duration> = tasks.join_all().await;
    took.sort();
    println!("2,000 takes at 500/s: p50 {:?}, p99 {:?}, worst {:?}", took[1000], took[1980], took[1999]);
}
