//! The CQL store does what every store must, against a real server; and what only a store that several projectors reach has to.
//! `make test-cluster` starts the server; `SEALPOST_TEST_CQL=host:port` names one that runs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sealpost::ids::{Offset, Partition, Seq};
use sealpost::store::conformance::{self, Fixture, Stores, device, envelope};
use sealpost::store::cql::{CqlOpenError, CqlOptions, CqlStore, Replication, drop_keyspaces, migrate};
use sealpost::store::{DeliveryStore as _, DeliveryWrite, InboxState, StoreError};

/// Where the server is; says that the test is skipped if nobody told us.
fn hosts(test: &str) -> Option<String> {
    let hosts = std::env::var("SEALPOST_TEST_CQL").ok().filter(|hosts| !hosts.is_empty());
    if hosts.is_none() {
        eprintln!("{test}: skipped, since SEALPOST_TEST_CQL names no CQL server; `make test-cluster` starts one");
    }
    hosts
}

struct Cql(CqlOptions);

impl Cql {
    /// A keyspace of its own, gone when [`Cql::done`] is called.
    async fn new(hosts: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let options = CqlOptions::new(hosts, name);
        migrate(&options, &Replication::Simple(1)).await.expect("migrates");
        Self(options)
    }

    async fn store(&self) -> Arc<CqlStore> {
        CqlStore::open(self.0.clone()).await.expect("opens")
    }

    async fn done(self) {
        drop_keyspaces(&self.0).await.expect("drops");
    }
}

#[async_trait]
impl Fixture for Cql {
    async fn open(&self) -> Stores {
        let store = self.store().await;
        Stores::of(&store)
    }
}

macro_rules! suite {
    ($($name:ident),*) => {
        $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let Some(hosts) = hosts(stringify!($name)) else { return };
            let cql = Cql::new(&hosts).await;
            conformance::$name(&cql).await.expect("no store call fails");
            cql.done().await;
        })*
    };
}

suite!(
    delivery,
    delivery_removal,
    delivery_expiry,
    directory,
    groups,
    group_items,
    group_states,
    group_members,
    group_expiry,
    group_walk,
    one_time_keys,
    one_time_keys_are_taken_once,
    claims,
    seal_keys,
    late_writes_lose,
    late_group_writes_lose
);

/// An inbox over several buckets, read in pages; acknowledged from the front.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_inbox_is_read_in_order_over_its_buckets() {
    let Some(hosts) = hosts("a_long_inbox_is_read_in_order_over_its_buckets") else { return };
    let cql = Cql::new(&hosts).await;
    let store = cql.store().await;
    let dev = device(1, 1);
    // Every 50th position: five items a bucket of 2^18 would be sparse, this is about 5,000.
    let seqs: Vec<u64> = (1..=20_000).map(|n| n * 50).collect();
    let started = Instant::now();
    for some in seqs.chunks(2_000) {
        let put = some.iter().map(|seq| (dev, envelope(*seq, 1_000_000, 1_000))).collect();
        store.write(DeliveryWrite { put, ..Default::default() }).await.expect("writes");
    }
    let written = started.elapsed();
    let read = async |after: u64| {
        let (mut found, mut after) = (Vec::new(), Seq(after));
        loop {
            let page = store.pending(dev, after, Seq::MAX, 1_024, 1 << 20).await.expect("reads");
            let Some(last) = page.last() else { return found };
            after = last.seq;
            found.extend(page.iter().map(|item| item.seq.0));
        }
    };
    let started = Instant::now();
    assert_eq!(read(0).await, seqs);
    println!("20,000 items of 1 KB: written in {} ms, read in {} ms", written.as_millis(), started.elapsed().as_millis());

    let (to, applied) = (Seq(600_000), Seq(1_000_001));
    let state = InboxState { cursor: to, applied, ..InboxState::default() };
    store.write(DeliveryWrite { drop_to: vec![(dev, to)], inboxes: vec![(dev, state)], ..Default::default() }).await.expect("writes");
    let rest: Vec<u64> = seqs.iter().copied().filter(|seq| *seq > to.0).collect();
    assert_eq!(read(0).await, rest, "what was acknowledged is gone");
    assert_eq!(read(to.0).await, rest);
    cql.done().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn migrations_are_applied_once_whoever_runs_them() {
    let Some(hosts) = hosts("migrations_are_applied_once_whoever_runs_them") else { return };
    let options =
        CqlOptions { state_keyspace: format!("s{}", std::process::id()), ..CqlOptions::new(&*hosts, format!("m{}", std::process::id())) };
    match CqlStore::open(options.clone()).await {
        Err(CqlOpenError::Schema { keyspace, .. }) => assert_eq!(keyspace, options.keyspace),
        other => panic!("a keyspace that is not there: {other:?}"),
    }
    let one = Replication::Simple(1);
    let (a, b) = tokio::join!(migrate(&options, &one), migrate(&options, &one));
    assert!(a.is_ok() && b.is_ok(), "{a:?} {b:?}");
    let again = migrate(&options, &one).await.expect("migrates");
    assert!(again.iter().all(|migrated| !migrated.now) && again.len() == 3);
    let store = CqlStore::open(options.clone()).await.expect("opens");
    store.write(DeliveryWrite { positions: vec![(Partition(3), Offset(7))], ..Default::default() }).await.expect("writes");
    assert_eq!(store.position(Partition(3)).await, Ok(Offset(7)));
    drop_keyspaces(&options).await.expect("drops");
    assert!(matches!(store.position(Partition(3)).await, Err(StoreError::Unavailable(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_not_there_is_said_soon() {
    let started = Instant::now();
    let error = CqlStore::open(CqlOptions::new("127.0.0.1:1", "sealpost")).await.expect_err("nobody listens");
    assert!(error.to_string().contains("127.0.0.1:1"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(15));
}
