//! The embedded stores across reopenings, kills, damage and against a model.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use sealpost::clock::{Random as _, SystemRandom};
use sealpost::ids::{AccountId, DeviceAddr, Offset, Partition, Seq};
use sealpost::store::conformance::{account, account_record, device, envelope, one_time, receipt};
use sealpost::store::embedded::{EmbeddedStore, OpenError, Options};
use sealpost::store::seal::SealKey;
use sealpost::store::{
    DeliveryStore, DeliveryWrite, DirectoryStore, DirectoryWrite, InboxState, KeyKind, KeyStore, Mark, MarkKey, PendingItem, StoreError,
};

fn open(dir: &Path) -> Arc<EmbeddedStore> {
    EmbeddedStore::open(dir, Options::default()).expect("opens")
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime")
}

/// Set in the processes that the tests below start and kill: what to do, and where.
const CHILD: &str = "SEALPOST_STORE_TEST_CHILD";

/// Starts this test binary again to run [`child`].
fn start_child(job: &str, dir: &Path) -> std::process::Child {
    Command::new(std::env::current_exe().expect("known"))
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .env(CHILD, format!("{job}:{}", dir.display()))
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts")
}

/// Not a test by itself: what the killed processes do.
#[test]
fn child() {
    let Ok(job) = std::env::var(CHILD) else { return };
    let (job, dir) = job.split_once(':').expect("job:dir");
    match job {
        "take" => runtime().block_on(take_and_print(Path::new(dir))),
        "write" => runtime().block_on(write_and_print(Path::new(dir))),
        _ => panic!("an unknown job"),
    }
}

fn say(line: String) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).and_then(|()| out.flush()).expect("the parent reads");
}

async fn take_and_print(dir: &Path) {
    let store = open(dir);
    let mut takers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let store = store.clone();
        takers.spawn(async move {
            while let (Some(key), _) = store.take_one_time(device(1, 1), KeyKind::Ec).await.expect("takes") {
                say(format!("took {}", key.id));
            }
        });
    }
    takers.join_all().await;
}

/// Each write puts one item for three devices, moves the mark and the position; all of it or nothing may be there.
async fn write_and_print(dir: &Path) {
    let store = open(dir);
    let first = store.position(Partition(1)).await.expect("reads").0;
    for n in first + 1.. {
        store.write(numbered_write(n)).await.expect("writes");
        say(format!("wrote {n}"));
    }
}

fn mark_key() -> MarkKey {
    MarkKey { recipient: account(1), sender: device(2, 2) }
}

fn numbered_write(n: u64) -> DeliveryWrite {
    DeliveryWrite {
        positions: vec![(Partition(1), Offset(n))],
        put: (1..4).map(|d| (device(d, 1), envelope(n, n, 20_000))).collect(),
        inboxes: (1..4).map(|d| (device(d, 1), InboxState { items: n, ..Default::default() })).collect(),
        marks: vec![(mark_key(), Mark { high: n, seen: 1, ..Default::default() })],
        ..Default::default()
    }
}

/// Kills the child after a random time and returns the numbers that it printed in whole lines.
fn kill_midway(mut child: std::process::Child, word: &str) -> Vec<u64> {
    let mut random = [0; 1];
    SystemRandom.fill(&mut random);
    let out = child.stdout.take().expect("piped");
    let word = word.to_owned();
    let reader = std::thread::spawn(move || {
        let mut numbers = Vec::new();
        let mut lines = BufReader::new(out);
        let mut line = String::new();
        while lines.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            if let Some(number) = line.strip_suffix('\n').and_then(|line| line.strip_prefix(&word)) {
                numbers.push(number.trim().parse().expect("a number"));
            }
            line.clear();
        }
        numbers
    });
    // Time to open, then a little.
    std::thread::sleep(Duration::from_millis(150 + u64::from(random[0])));
    child.kill().expect("is there");
    child.wait().expect("ends");
    reader.join().expect("reads")
}

/// G-PREKEY-ONCE through kill -9: what a killed process handed out is never handed out again.
#[test]
fn killed_while_taking_no_key_comes_twice() {
    let dir = folder();
    let total = 1000;
    runtime().block_on(async {
        let keys = (0..total).map(one_time).collect();
        open(dir.path()).add_one_time(device(1, 1), KeyKind::Ec, keys).await.expect("adds");
    });
    let mut seen = BTreeSet::new();
    for round in 0..6 {
        for id in kill_midway(start_child("take", dir.path()), "took ") {
            assert!(seen.insert(id), "key {id} came twice, in round {round}");
        }
    }
    runtime().block_on(async {
        let store = open(dir.path());
        let left = store.count_one_time(device(1, 1), KeyKind::Ec).await.expect("counts");
        let mut found = 0;
        while let (Some(key), _) = store.take_one_time(device(1, 1), KeyKind::Ec).await.expect("takes") {
            assert!(seen.insert(u64::from(key.id)), "key {} came twice, at the end", key.id);
            found += 1;
        }
        assert_eq!(found, left);
    });
    assert!(!seen.is_empty());
}

/// A killed process leaves whole writes, and each that it said was done.
#[test]
fn killed_while_writing_the_view_is_whole() {
    let dir = folder();
    let mut said = 0;
    for _ in 0..5 {
        said = kill_midway(start_child("write", dir.path()), "wrote ").last().copied().unwrap_or(said);
        runtime().block_on(async {
            let store = open(dir.path());
            let position = store.position(Partition(1)).await.expect("reads").0;
            assert!(position >= said, "{position} < {said}");
            assert_eq!(store.marks(vec![mark_key()]).await.expect("reads")[0].unwrap_or_default().high, position);
            for d in 1..4 {
                let items = store.pending(device(d, 1), Seq::ZERO, Seq::MAX, usize::MAX, usize::MAX).await.expect("reads");
                assert_eq!(items.len() as u64, position);
                assert_eq!(items, (1..=position).map(|n| envelope(n, n, 20_000)).collect::<Vec<_>>());
                let inbox = store.inboxes(vec![device(d, 1)]).await.expect("reads")[0].unwrap_or_default();
                assert_eq!(inbox.items, position);
            }
        });
    }
    assert!(said > 0);
}

#[tokio::test]
async fn a_folder_that_is_in_use_is_refused() {
    let dir = folder();
    let first = open(dir.path());
    let error = EmbeddedStore::open(dir.path(), Options::default()).expect_err("is locked");
    assert!(matches!(&error, OpenError::Locked(path) if path == dir.path()), "{error}");
    drop(first);
    open(dir.path());
}

#[tokio::test]
async fn another_layout_is_refused_and_left_alone() {
    let dir = folder();
    drop(open(dir.path()));
    std::fs::write(dir.path().join("format"), "sealpost store 3\n").expect("writes");
    let error = EmbeddedStore::open(dir.path(), Options::default()).expect_err("is newer");
    assert!(matches!(&error, OpenError::Version { found, .. } if found == "sealpost store 3"), "{error}");
    std::fs::write(dir.path().join("format"), "sealpost store 2\n").expect("writes");
    open(dir.path());
}

#[tokio::test]
async fn only_the_servers_user_may_look_inside() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = folder();
    let inner = dir.path().join("store");
    let store = open(&inner);
    store.seal_key(account(1), Some(SealKey::from_bytes([1; 32]))).await.expect("makes one");
    let mode = |path: PathBuf| std::fs::metadata(path).expect("is there").permissions().mode() & 0o777;
    assert_eq!((mode(inner.clone()), mode(inner.join("seal.keys"))), (0o700, 0o600));
}

/// A destroyed key is nowhere in the folder any more; a live one only in its file.
#[tokio::test]
async fn a_destroyed_key_is_overwritten() {
    let dir = folder();
    let store = open(dir.path());
    let mut keys = Vec::new();
    for n in 0..50 {
        let key = SealKey::random(&SystemRandom);
        keys.push(*key.expose());
        store.seal_key(account(n), Some(key)).await.expect("makes one");
    }
    for n in (0..50).step_by(2) {
        store.destroy_seal_key(account(n)).await.expect("destroys");
    }
    let mut files = vec![dir.path().to_owned()];
    let mut found = BTreeSet::new();
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(&path).expect("lists").map(|entry| entry.expect("lists").path()));
            continue;
        }
        let bytes = std::fs::read(&path).expect("reads");
        // Journals are laid out ahead: most pages are empty.
        let pages = (0..bytes.len()).step_by(4096).map(|at| &bytes[at..(at + 4096 + 32).min(bytes.len())]);
        for page in pages.filter(|page| **page != [0; 4096 + 32][..page.len()]) {
            for (n, key) in keys.iter().enumerate() {
                if page.windows(32).any(|window| window == key) {
                    assert!(path.ends_with("seal.keys"), "{path:?}");
                    found.insert(n);
                }
            }
        }
    }
    assert_eq!(found, (1..50).step_by(2).collect());
}

/// The file of at-rest keys after a crash cut its last slot, and after damage.
#[tokio::test]
async fn a_torn_last_slot_is_forgiven_damage_is_not() {
    let dir = folder();
    let path = dir.path().join("seal.keys");
    let key = |n: u8| Some(SealKey::from_bytes([n; 32]));
    {
        let store = open(dir.path());
        for n in 1..=3 {
            store.seal_key(account(n), key(n as u8)).await.expect("makes one");
        }
    }
    let whole = std::fs::read(&path).expect("reads");
    for cut in 0..64 {
        // As a sector that was half written: new bytes, then zeros.
        let mut torn = whole.clone();
        torn[3 * 64 + cut..4 * 64].fill(0);
        std::fs::write(&path, &torn).expect("writes");
        let store = open(dir.path());
        for n in 1..=2 {
            assert_eq!(store.seal_key(account(n), None).await.expect("reads").map(|key| *key.expose()), Some([n as u8; 32]));
        }
        let third = store.seal_key(account(3), None).await.expect("reads");
        assert!(third.is_none(), "cut at {cut}");
        assert_eq!(store.seal_key(account(3), key(9)).await.expect("makes it anew").map(|key| *key.expose()), Some([9; 32]));
    }
    for at in [0, 64, 64 + 5, 2 * 64 + 30, 2 * 64 + 63] {
        let mut bent = whole.clone();
        bent[at] ^= 1;
        std::fs::write(&path, &bent).expect("writes");
        let error = EmbeddedStore::open(dir.path(), Options::default()).expect_err("is damaged");
        assert!(matches!(error, OpenError::StateDamaged { .. }), "{error}");
    }
    std::fs::write(&path, &whole[..whole.len() - 13]).expect("a file that was cut is whole up to there");
    open(dir.path());
}

/// A damaged view opens once it is discarded, and the state is still there.
#[tokio::test]
async fn a_damaged_view_is_discarded() {
    let dir = folder();
    {
        let store = open(dir.path());
        store.write(numbered_write(1)).await.expect("writes");
        store.claim_identity(&"a@r".parse().expect("valid"), account(7)).await.expect("claims");
    }
    let manifest = dir.path().join("view/version");
    assert!(manifest.exists() || dir.path().join("view/keyspaces").exists());
    for entry in std::fs::read_dir(dir.path().join("view")).expect("lists") {
        let path = entry.expect("lists").path();
        if path.is_file() && path.file_name().is_some_and(|name| name != "lock") {
            std::fs::write(path, b"nonsense").expect("writes");
        }
    }
    let error = EmbeddedStore::open(dir.path(), Options::default()).expect_err("is damaged");
    assert!(matches!(error, OpenError::ViewDamaged { .. }), "{error}");
    let store = EmbeddedStore::open(dir.path(), Options { discard_view: true, ..Options::default() }).expect("opens");
    assert_eq!(store.position(Partition(1)).await, Ok(Offset(0)));
    assert_eq!(store.claim_identity(&"a@r".parse().expect("valid"), account(8)).await, Ok(account(7)));
}

/// Clearing takes the view and leaves the state; writing the same again gives the same view.
#[tokio::test]
async fn a_cleared_view_can_be_made_again() {
    let dir = folder();
    let store = open(dir.path());
    let dev = device(1, 1);
    let fill = async |store: &EmbeddedStore| {
        for n in 1..200 {
            store.write(numbered_write(n)).await?;
        }
        store.write(DeliveryWrite { drop_to: vec![(dev, Seq(50))], ..Default::default() }).await?;
        let record = account_record(5, &["five@r"]);
        let linked = vec![(record.identities[0].clone(), record.id)];
        let position = Some((Partition(2), Offset(9)));
        store.write_directory(DirectoryWrite { position, accounts: vec![record], linked, ..Default::default() }).await
    };
    fill(&store).await.expect("writes");
    store.add_one_time(dev, KeyKind::Pq, vec![one_time(4)]).await.expect("adds");
    let before = store.dump_view().await.expect("reads");
    assert_eq!(
        before.sections.iter().map(|section| section.rows).collect::<Vec<_>>(),
        [199 * 3 - 50, 3, 1, 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    );

    store.clear_view().await.expect("clears");
    let empty = store.dump_view().await.expect("reads");
    assert!(empty.sections.iter().all(|section| section.rows == 0));
    assert_eq!(store.directory_position(Partition(2)).await, Ok(Offset(0)));
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.dump_view().await.expect("reads"), empty, "cleared on disk, too");
    fill(&store).await.expect("writes");
    assert_eq!(store.dump_view().await.expect("reads"), before);
    drop(store);

    // A crash between clearing's steps: what is left of the view goes at the next opening.
    std::fs::write(dir.path().join("view.clearing"), b"").expect("writes");
    let store = open(dir.path());
    assert_eq!(store.dump_view().await.expect("reads"), empty);
    assert!(!dir.path().join("view.clearing").exists());
    assert_eq!(store.count_one_time(dev, KeyKind::Pq).await, Ok(1), "the state stays");
}

/// Journals are laid aside at 64 MB: what they hold of a view that was cleared stays gone, what came behind them stays.
#[tokio::test]
async fn long_journals_reopen() {
    let dir = folder();
    let store = open(dir.path());
    let fill = async |store: &EmbeddedStore, from: u64, to: u64| {
        for n in from..to {
            let put = (0..20).map(|d| (device(d, 1), envelope(n, n, 50_000))).collect();
            let inboxes = (0..20).map(|d| (device(d, 1), InboxState { items: n, ..Default::default() })).collect();
            let positions = vec![(Partition(0), Offset(n))];
            store.write(DeliveryWrite { put, inboxes, positions, ..Default::default() }).await.expect("writes");
        }
    };
    fill(&store, 1, 100).await;
    store.clear_view().await.expect("clears");
    fill(&store, 1, 80).await;
    drop(store);
    let store = open(dir.path());
    let sections = store.dump_view().await.expect("reads").sections;
    assert_eq!(sections.iter().map(|section| section.rows).collect::<Vec<_>>(), [79 * 20, 20, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    fill(&store, 80, 160).await;
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.position(Partition(0)).await, Ok(Offset(159)));
    assert_eq!(store.pending(device(3, 1), Seq::ZERO, Seq::MAX, 9999, 1 << 30).await.expect("reads").len(), 159);
    assert!(store.disk_bytes() < 600 << 20, "{}", store.disk_bytes());
}

/// Removing more rows than one commit takes.
#[tokio::test]
async fn a_big_account_goes_whole() {
    let dir = folder();
    let store = open(dir.path());
    for batch in 0..5u64 {
        let put = (0..10_000).map(|n| (device(1, 1 + (n % 3) as u8), receipt(batch * 10_000 + n + 1))).collect();
        store.write(DeliveryWrite { put, ..Default::default() }).await.expect("writes");
    }
    store.write(DeliveryWrite { put: vec![(device(2, 1), receipt(1))], ..Default::default() }).await.expect("writes");
    store.write(DeliveryWrite { remove_accounts: vec![(account(1), Seq(1 << 40))], ..Default::default() }).await.expect("writes");
    assert_eq!(store.dump_view().await.expect("reads").sections[0].rows, 1);
}

/// What the store should hold.
#[derive(Debug, Default)]
struct Model {
    positions: BTreeMap<Partition, Offset>,
    pending: BTreeMap<(DeviceAddr, Seq), PendingItem>,
    inboxes: BTreeMap<DeviceAddr, InboxState>,
    marks: BTreeMap<MarkKey, Mark>,
    pools: BTreeMap<(DeviceAddr, KeyKind, u32), u8>,
    claims: BTreeMap<String, AccountId>,
    seals: BTreeMap<AccountId, Option<[u8; 32]>>,
}

#[derive(Debug, Clone)]
enum Step {
    /// Items for devices, in a write that also moves cursors (drops), a mark and the position.
    Write {
        put: Vec<(u64, u8)>,
        ack: Vec<(u64, u8, u8)>,
        gone: Vec<(u64, u8)>,
        mark: u64,
    },
    RemoveAccount(u64),
    Read {
        device: (u64, u8),
        after: u64,
        to: u64,
        items: usize,
        bytes: usize,
    },
    Add {
        device: (u64, u8),
        pq: bool,
        ids: Vec<u8>,
    },
    Take {
        device: (u64, u8),
        pq: bool,
    },
    RemoveKeys((u64, u8)),
    Claim(u8, u64),
    Release(u8, u64),
    Seal(u64, u8),
    Destroy(u64),
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let dev = || (0u64..3, 1u8..3);
    let step = prop_oneof![
        8 => (
            prop::collection::vec(dev(), 0..8),
            prop::collection::vec((0u64..3, 1u8..3, any::<u8>()), 0..3),
            prop::collection::vec(dev(), 0..2),
            1u64..50,
        )
            .prop_map(|(put, ack, gone, mark)| Step::Write { put, ack, gone, mark }),
        1 => (0u64..3).prop_map(Step::RemoveAccount),
        6 => (dev(), 0u64..200, 0u64..300, 0usize..20, 0usize..3000)
            .prop_map(|(device, after, to, items, bytes)| Step::Read { device, after, to, items, bytes }),
        3 => (dev(), any::<bool>(), prop::collection::vec(0u8..30, 0..10)).prop_map(|(device, pq, ids)| Step::Add { device, pq, ids }),
        5 => (dev(), any::<bool>()).prop_map(|(device, pq)| Step::Take { device, pq }),
        1 => dev().prop_map(Step::RemoveKeys),
        2 => (0u8..3, 0u64..3).prop_map(|(name, account)| Step::Claim(name, account)),
        1 => (0u8..3, 0u64..3).prop_map(|(name, account)| Step::Release(name, account)),
        2 => (0u64..5, any::<u8>()).prop_map(|(account, byte)| Step::Seal(account, byte)),
        1 => (0u64..5).prop_map(Step::Destroy),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..60)
}

const fn kind(pq: bool) -> KeyKind {
    if pq { KeyKind::Pq } else { KeyKind::Ec }
}

impl Model {
    /// The write that a projector would make of it: what is acknowledged is dropped in the same write.
    fn write(&mut self, seq: &mut u64, put: &[(u64, u8)], ack: &[(u64, u8, u8)], gone: &[(u64, u8)], mark: u64) -> DeliveryWrite {
        let mut write = DeliveryWrite::default();
        for (n, d, back) in ack {
            let dev = device(*n, *d);
            let to = Seq(seq.saturating_sub(u64::from(*back) % 20));
            self.pending.retain(|(of, at), _| *of != dev || *at > to);
            write.drop_to.push((dev, to));
            let inbox = self.inboxes.entry(dev).or_default();
            if back % 2 == 0 {
                inbox.cursor = inbox.cursor.max(to);
            } else {
                inbox.expired_to = inbox.expired_to.max(to);
            }
        }
        for (n, d) in put {
            *seq += 1;
            let dev = device(*n, *d);
            let item = if (*seq).is_multiple_of(5) { receipt(*seq) } else { envelope(*seq, *seq, (*seq % 700) as usize) };
            self.pending.insert((dev, item.seq), item.clone());
            self.inboxes.entry(dev).or_default().items += 1;
            write.put.push((dev, item));
        }
        for (n, d) in gone {
            let dev = device(*n, *d);
            self.inboxes.remove(&dev);
            self.pending.retain(|(of, _), _| *of != dev);
            write.put.retain(|(of, _)| *of != dev);
            write.remove_devices.push((dev, Seq(*seq)));
        }
        let touched: BTreeSet<DeviceAddr> = put.iter().copied().chain(ack.iter().map(|a| (a.0, a.1))).map(|(n, d)| device(n, d)).collect();
        write.inboxes = touched.into_iter().filter_map(|dev| Some((dev, *self.inboxes.get(&dev)?))).collect();
        let key = MarkKey { recipient: account(mark % 3), sender: device(mark % 4, 1) };
        self.marks.insert(key, Mark { high: mark, seen: u128::from(*seq), ..Default::default() });
        write.marks.push((key, self.marks[&key]));
        let partition = Partition((mark % 4) as u16);
        self.positions.insert(partition, Offset(*seq));
        write.positions.push((partition, Offset(*seq)));
        write
    }

    fn read(&self, device: DeviceAddr, after: Seq, to: Seq, items_max: usize, bytes_max: usize) -> Vec<PendingItem> {
        let (mut items, mut bytes) = (Vec::new(), 0);
        for ((of, seq), item) in &self.pending {
            if *of == device && *seq > after && *seq <= to && items.len() < items_max && (items.is_empty() || bytes < bytes_max) {
                bytes += item.cost();
                items.push(item.clone());
            }
        }
        items
    }

    async fn check_view(&self, store: &EmbeddedStore) -> Result<(), StoreError> {
        for n in 0..3 {
            for d in 1..3 {
                let dev = device(n, d);
                assert_eq!(
                    store.pending(dev, Seq::ZERO, Seq::MAX, 9999, 1 << 30).await?,
                    self.read(dev, Seq::ZERO, Seq::MAX, 9999, 1 << 30)
                );
                assert_eq!(store.inboxes(vec![dev]).await?, [self.inboxes.get(&dev).copied()]);
            }
        }
        let keys: Vec<MarkKey> = (0..12).map(|n| MarkKey { recipient: account(n % 3), sender: device(n % 4, 1) }).collect();
        let want: Vec<_> = keys.iter().map(|key| self.marks.get(key).copied()).collect();
        assert_eq!(store.marks(keys).await?, want);
        for n in 0..4 {
            assert_eq!(store.position(Partition(n)).await?, self.positions.get(&Partition(n)).copied().unwrap_or_default());
        }
        Ok(())
    }

    async fn state_step(&mut self, store: &EmbeddedStore, step: &Step) -> Result<(), StoreError> {
        match step {
            Step::Add { device: (n, d), pq, ids } => {
                let (dev, kind) = (device(*n, *d), kind(*pq));
                self.pools.extend(ids.iter().map(|id| ((dev, kind, u32::from(*id)), *id)));
                let count = self.pools.keys().filter(|(of, k, _)| (*of, *k) == (dev, kind)).count();
                assert_eq!(store.add_one_time(dev, kind, ids.iter().map(|id| one_time(u32::from(*id))).collect()).await?, count);
            }
            Step::Take { device: (n, d), pq } => {
                let (dev, kind) = (device(*n, *d), kind(*pq));
                let lowest = self.pools.keys().find(|(of, k, _)| (*of, *k) == (dev, kind)).copied();
                lowest.map(|key| self.pools.remove(&key));
                let left = self.pools.keys().filter(|(of, k, _)| (*of, *k) == (dev, kind)).count();
                assert_eq!(store.take_one_time(dev, kind).await?, (lowest.map(|(_, _, id)| one_time(id)), left));
                assert_eq!(store.count_one_time(dev, kind).await?, left);
            }
            Step::RemoveKeys((n, d)) => {
                self.pools.retain(|(of, _, _), _| *of != device(*n, *d));
                store.remove_one_time(device(*n, *d)).await?;
            }
            Step::Claim(name, n) => {
                let identity = format!("user{name}@r");
                let winner = *self.claims.entry(identity.clone()).or_insert(account(*n));
                assert_eq!(store.claim_identity(&identity.parse().expect("valid"), account(*n)).await?, winner);
            }
            Step::Release(name, n) => {
                let identity = format!("user{name}@r");
                if self.claims.get(&identity) == Some(&account(*n)) {
                    self.claims.remove(&identity);
                }
                store.release_identity(&identity.parse().expect("valid"), account(*n)).await?;
            }
            Step::Seal(n, byte) => {
                let key = *self.seals.entry(account(*n)).or_insert(Some([*byte; 32]));
                let found = store.seal_key(account(*n), Some(SealKey::from_bytes([*byte; 32]))).await?;
                assert_eq!(found.map(|key| *key.expose()), key);
            }
            Step::Destroy(n) => {
                self.seals.insert(account(*n), None);
                store.destroy_seal_key(account(*n)).await?;
            }
            _ => {}
        }
        Ok(())
    }

    async fn run(&mut self, dir: &Path, steps: &[Step]) -> Result<(), StoreError> {
        let mut store = open(dir);
        let mut seq = 0;
        for step in steps {
            match step {
                Step::Write { put, ack, gone, mark } => {
                    let write = self.write(&mut seq, put, ack, gone, *mark);
                    store.write(write).await?;
                }
                Step::RemoveAccount(n) => {
                    let id = account(*n);
                    self.pending.retain(|(dev, _), _| dev.account != id);
                    self.inboxes.retain(|dev, _| dev.account != id);
                    self.marks.retain(|key, _| key.recipient != id);
                    store.write(DeliveryWrite { remove_accounts: vec![(id, Seq(1 << 40))], ..Default::default() }).await?;
                }
                Step::Read { device: (n, d), after, to, items, bytes } => {
                    let found = store.pending(device(*n, *d), Seq(*after), Seq(*to), *items, *bytes).await?;
                    assert_eq!(found, self.read(device(*n, *d), Seq(*after), Seq(*to), *items, *bytes));
                }
                Step::Reopen => {
                    drop(store);
                    store = open(dir);
                    self.check_view(&store).await?;
                }
                step => self.state_step(&store, step).await?,
            }
        }
        self.check_view(&store).await
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Any sequence of calls and reopenings gives what a map would give.
    #[test]
    fn behaves_like_a_map(steps in steps()) {
        let dir = folder();
        runtime().block_on(Model::default().run(dir.path(), &steps)).expect("no call fails");
    }
}
