use std::sync::Weak;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use super::*;
use crate::clock::{ManualClock, SystemRandom, UnixMillis};
use crate::ids::{DeviceAddr, Offset};
use crate::log::{AppendSink, Consumer, ReadError, Record};
use crate::projector::directory;
use crate::store::KeyKind;
use crate::store::conformance::one_time;
use crate::store::embedded::{EmbeddedStore, Options};

/// A log of one topic with a projector behind it.
struct TestLog {
    records: mpsc::UnboundedSender<Bytes>,
    full: AtomicBool,
    mute: Arc<AtomicBool>,
}

#[async_trait]
impl EventLog for TestLog {
    fn partitions(&self, _: Topic) -> u16 {
        1
    }
    fn submit(&self, _: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        if self.full.load(Ordering::SeqCst) {
            return Err(AppendError::Full);
        }
        self.records.send(payload).map_err(|_| AppendError::Closed)?;
        sink.done(token, Ok(Offset(0)));
        Ok(())
    }
    async fn consumer(&self, _: &str, _: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        Err(ReadError::Closed)
    }
    async fn read(&self, _: TopicPartition, _: Offset, _: usize) -> Result<Vec<Record>, ReadError> {
        Ok(vec![])
    }
    async fn bounds(&self, _: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        Ok((Offset(0), Offset(0)))
    }
    async fn truncate_before(&self, _: TopicPartition, _: Offset) -> Result<(), ReadError> {
        Ok(())
    }
    fn health(&self) -> Result<(), AppendError> {
        Ok(())
    }
    async fn close(&self) {}
}

struct World {
    directory: Arc<Directory>,
    store: Arc<EmbeddedStore>,
    log: Arc<TestLog>,
    _dir: tempfile::TempDir,
}

fn world() -> World {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let store = EmbeddedStore::open(dir.path(), Options::default()).expect("opens");
    let (records, mut queue) = mpsc::unbounded_channel::<Bytes>();
    let mute = Arc::new(AtomicBool::new(false));
    let log = Arc::new(TestLog { records, full: AtomicBool::new(false), mute: mute.clone() });
    let parts = Parts {
        log: log.clone(),
        store: store.clone(),
        keys: store.clone(),
        clock: Arc::new(ManualClock::new(UnixMillis(5))),
        random: Arc::new(SystemRandom),
        edge: EdgeId::from_bytes([1; 16]),
    };
    let directory = Arc::new(Directory::new(parts));
    let (to, view): (Weak<Directory>, _) = (Arc::downgrade(&directory), store.clone());
    tokio::spawn(async move {
        let mut next = Offset(0);
        while let Some(payload) = queue.recv().await {
            let commands = [(next, event::decode_owned(&payload).expect("a command"))];
            next = next.next();
            let plan = directory::plan(&*view, Partition(0), next, &commands).await.expect("reads");
            plan.commit(&*view, &*view).await.expect("writes");
            let Some(to) = to.upgrade() else { return };
            plan.changed().for_each(|account| to.invalidate(account));
            for outcome in plan.outcomes.into_iter().filter(|_| !mute.load(Ordering::SeqCst)) {
                to.complete(outcome.reply_to.expect("asked").number, outcome.verdict);
            }
        }
    });
    World { directory, store, log, _dir: dir }
}

fn identity(name: &str) -> Identity {
    format!("{name}@realm").parse().expect("valid")
}

fn new_device(secret: u8) -> NewDevice {
    let key = SignedKey { id: 1, public_key: vec![5; 33], signature: vec![6; 64] };
    NewDevice {
        name: "phone".into(),
        registration_id: RegistrationId::new(9).expect("valid"),
        identity_key: vec![5; 33],
        credential_hash: [secret; 32],
        signed_prekey: key.clone(),
        pq_last_resort: key,
    }
}

impl World {
    async fn register(&self, name: &str, secret: u8) -> DeviceAddr {
        match self.directory.register(&identity(name), &new_device(secret)).await.map(|(verdict, _)| verdict) {
            Ok(Verdict::Done(Some(device))) => device,
            other => panic!("not registered: {other:?}"),
        }
    }
}

#[tokio::test]
async fn registering_makes_an_account_that_can_be_read_and_sealed_for() {
    let world = world();
    let first = world.register("alice", 1).await;
    let second = world.register("alice", 2).await;
    assert_eq!((first.account, second.device.get()), (second.account, 2));
    assert_eq!(world.directory.resolve(&identity("alice")).await, Ok(Some(first.account)));
    assert!(world.directory.get_cached(&first.account).is_none());
    let view = world.directory.get(first.account).await.expect("reads").expect("is there");
    assert_eq!(view.devices.len(), 2);
    assert_eq!(view.device(second.device).expect("is there").credential_hash, [2; 32]);
    assert!(view.sealer().is_some() && !view.deleted);
    assert!(Arc::ptr_eq(&view, &world.directory.get_cached(&first.account).expect("cached")));
    assert!(world.directory.get(AccountId::from_bytes([9; 16])).await.expect("reads").is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_identity_registered_by_many_at_once_is_one_account() {
    let world = world();
    let mut registrations = tokio::task::JoinSet::new();
    for secret in 0..limits::DEVICES_PER_ACCOUNT as u8 {
        let directory = world.directory.clone();
        registrations.spawn(async move { directory.register(&identity("alice"), &new_device(secret)).await.map(|(verdict, _)| verdict) });
    }
    let mut accounts = std::collections::BTreeSet::new();
    while let Some(verdict) = registrations.join_next().await {
        let Ok(Ok(Verdict::Done(Some(device)))) = verdict else { panic!("not registered: {verdict:?}") };
        accounts.insert(device.account);
    }
    assert_eq!(accounts.len(), 1);
    assert_eq!(world.directory.register(&identity("alice"), &new_device(99)).await.map(|(verdict, _)| verdict), Ok(Verdict::LimitReached));
}

#[tokio::test]
async fn changes_are_seen_as_soon_as_they_are_answered() {
    let world = world();
    let device = world.register("alice", 1).await;
    let other = AccountId::from_bytes([3; 16]);
    world.directory.get(device.account).await.expect("reads");
    assert_eq!(world.directory.block(device.account, other).await, Ok(Verdict::Done(None)));
    let view = world.directory.get(device.account).await.expect("reads").expect("is there");
    assert_eq!(*view.blocked, [other]);
    assert_eq!(world.directory.revoke_device(device.account, device.device).await, Ok(Verdict::Done(Some(device))));
    assert_eq!(world.directory.revoke_device(device.account, device.device).await, Ok(Verdict::NotFound));
    assert!(world.directory.get(device.account).await.expect("reads").expect("is there").devices.is_empty());
}

#[tokio::test]
async fn an_identity_belongs_to_one_account() {
    let world = world();
    let (alice, bob) = (world.register("alice", 1).await.account, world.register("bob", 2).await.account);
    let work = identity("work");
    assert_eq!(world.directory.link(alice, &identity("bob")).await, Ok(Verdict::Conflict));
    assert_eq!(world.directory.link(alice, &work).await, Ok(Verdict::Done(None)));
    assert_eq!(world.directory.link(alice, &work).await, Ok(Verdict::Done(None)));
    assert_eq!(world.directory.link(bob, &work).await, Ok(Verdict::Conflict));
    assert_eq!(world.register("work", 3).await.account, alice, "a token of a linked identity opens the account");
    assert_eq!(world.directory.unlink(alice, &work).await, Ok(Verdict::Done(None)));
    assert_eq!(world.directory.link(bob, &work).await, Ok(Verdict::Done(None)));
    assert_eq!(world.directory.resolve(&work).await, Ok(Some(bob)));
}

#[tokio::test]
async fn a_refused_link_leaves_no_claim_behind() {
    let world = world();
    let alice = world.register("alice", 1).await.account;
    for n in 1..limits::IDENTITIES_PER_ACCOUNT {
        assert_eq!(world.directory.link(alice, &identity(&format!("n{n}"))).await, Ok(Verdict::Done(None)));
    }
    assert_eq!(world.directory.link(alice, &identity("more")).await, Ok(Verdict::LimitReached));
    world.log.full.store(true, Ordering::SeqCst);
    assert_eq!(world.directory.link(alice, &identity("busy")).await, Err(DirectoryError::Busy));
    world.log.full.store(false, Ordering::SeqCst);
    let bob = world.register("bob", 2).await.account;
    for name in ["more", "busy"] {
        assert_eq!(world.directory.link(bob, &identity(name)).await, Ok(Verdict::Done(None)));
    }
}

#[tokio::test]
async fn a_claim_without_a_registration_is_taken_over() {
    let world = world();
    world.log.full.store(true, Ordering::SeqCst);
    assert_eq!(world.directory.register(&identity("alice"), &new_device(1)).await, Err(DirectoryError::Busy));
    world.log.full.store(false, Ordering::SeqCst);
    let alice = world.register("alice", 1).await.account;
    // A claim that never became a link (a crash between the two).
    let stale = identity("stale");
    world.store.claim_identity(&stale, alice).await.expect("claims");
    assert_ne!(world.register("stale", 2).await.account, alice);
}

#[tokio::test]
async fn a_deleted_account_is_gone_for_good() {
    let world = world();
    let device = world.register("alice", 1).await;
    world.store.add_one_time(device, KeyKind::Ec, vec![one_time(1)]).await.expect("adds");
    let sealer = world.directory.get(device.account).await.expect("reads").expect("is there");
    assert!(sealer.sealer().is_some());
    assert_eq!(world.directory.delete_account(device.account).await, Ok(Verdict::Done(None)));
    assert!(world.store.seal_key(device.account, None).await.expect("reads").is_none());
    assert_eq!(world.store.count_one_time(device, KeyKind::Ec).await, Ok(0));
    let view = world.directory.get(device.account).await.expect("reads").expect("a tombstone");
    assert!(view.deleted && view.sealer().is_none() && view.devices.is_empty());
    assert_eq!(world.directory.resolve(&identity("alice")).await, Ok(None));
    assert_eq!(world.directory.delete_account(device.account).await, Ok(Verdict::AccountDeleted));
    assert_eq!(world.directory.delete_account(AccountId::from_bytes([8; 16])).await, Ok(Verdict::NotFound));
    let again = world.register("alice", 2).await;
    assert_ne!(again.account, device.account, "the same person starts anew");
}

#[tokio::test]
async fn a_load_that_began_before_an_invalidation_is_not_cached() {
    let world = world();
    let device = world.register("alice", 1).await;
    let mut load = Box::pin(world.directory.get(device.account));
    assert!(futures_util::poll!(&mut load).is_pending());
    world.directory.invalidate(device.account);
    load.await.expect("reads").expect("is there");
    assert!(world.directory.get_cached(&device.account).is_none());
    world.directory.get(device.account).await.expect("reads");
    assert!(world.directory.get_cached(&device.account).is_some());
}

#[tokio::test]
async fn without_a_verdict_the_outcome_is_unknown() {
    let world = world();
    let device = world.register("alice", 1).await;
    world.log.mute.store(true, Ordering::SeqCst);
    tokio::time::pause();
    let verdict = world.directory.rename_device(device.account, device.device, "x".into()).await;
    assert_eq!(verdict, Err(DirectoryError::OutcomeUnknown));
    assert!(world.directory.waiters.is_empty());
}

#[tokio::test]
async fn waiters_are_capped() {
    let world = world();
    let waiters: Vec<_> = (0..limits::DIRECTORY_WAITERS).map(|_| world.directory.waiters.wait().expect("room")).collect();
    assert_eq!(world.directory.block(AccountId::from_bytes([1; 16]), AccountId::from_bytes([2; 16])).await, Err(DirectoryError::Busy));
    drop(waiters);
    assert!(world.directory.waiters.wait().is_ok());
    world.directory.complete(12345, Verdict::NotFound);
}

#[tokio::test]
async fn the_cache_is_capped() {
    let world = world();
    let device = world.register("alice", 1).await;
    let view = world.directory.get(device.account).await.expect("reads").expect("is there");
    for n in 0..limits::CACHED_ACCOUNTS as u128 + 1_000 {
        world.directory.cache.insert(AccountId::from_bytes(n.to_be_bytes()), view.clone());
    }
    assert!(world.directory.cache.len() <= limits::CACHED_ACCOUNTS);
}
