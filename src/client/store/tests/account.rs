//! This device's own account and its keys, and the file they are in.

use super::*;

#[test]
fn keys_rotate_refill_and_retire() {
    let world = World::new(&[(1, 1)]);
    let db = &world.devices[0].db;
    assert!(!db.rotation_due().expect("known"));
    world.clock.advance(keys::ROTATION_MS);
    assert!(db.rotation_due().expect("known"));
    let upload = db.make_keys(100, 100, true).expect("keys");
    assert_eq!((upload.one_time_prekeys[0].id, upload.one_time_prekeys.len()), (101, 100));
    db.keys_rotated().expect("noted");
    let count =
        |table: &str| -> i64 { db.connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).expect("count") };
    assert_eq!((count("signed_prekeys"), count("prekeys"), count("kyber_prekeys")), (2, 200, 202));
    world.clock.advance(keys::RETIRED_KEPT_MS);
    db.prune().expect("pruned");
    assert_eq!(count("signed_prekeys"), 2, "the last first message under it may still come");
    world.clock.advance(keys::ROTATION_MS + 1);
    db.prune().expect("pruned");
    assert_eq!((count("signed_prekeys"), count("kyber_prekeys")), (1, 201));
}

#[test]
fn a_registration_without_an_answer_is_said_again_as_it_was_but_not_to_another_server() {
    let (dir, clock) = (tempfile::tempdir().expect("a folder"), ManualClock::new(START));
    let connection = crate::client::store::open(&dir.path().join("a.db")).expect("a new file");
    let db = Db {
        connection,
        clock: Arc::new(clock.clone()),
        random: Arc::new(SystemRandom),
        changed: Cell::default(),
        open_groups: RefCell::default(),
    };
    let first = db.begin_registration("https://one.example").expect("keys");
    assert!(db.begin_registration("https://one.example").expect("keys") == first);
    let other = db.begin_registration("https://two.example").expect("keys");
    assert!(other.credential_secret != first.credential_secret && other.identity_key != first.identity_key);
    assert!(other.upload.one_time_prekeys[0] != first.upload.one_time_prekeys[0]);
    let registered = Registered {
        account_id: account(1),
        device_id: number(1),
        credential: "sp1_test".to_owned().into(),
        first_message_id: 1,
        identities: Vec::new(),
    };
    db.finish_registration("https://two.example", &registered).expect("registered");
    assert!(matches!(db.begin_registration("https://two.example"), Err(Error::HasAccount)));
    let kept: i64 = db
        .connection
        .query_row("SELECT count(*) FROM meta WHERE instr(value, ?1) > 0", ["credential_secret"], |row| row.get(0))
        .expect("count");
    assert_eq!(kept, 0, "nothing of it stays");
}

#[test]
fn the_file_is_private_locked_and_versioned() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a.db");
    std::fs::write(&path, b"").expect("made by somebody, readable by all");
    let first = crate::client::store::open(&path).expect("opened");
    for file in std::fs::read_dir(dir.path()).expect("folder") {
        let mode = std::os::unix::fs::PermissionsExt::mode(&file.expect("entry").metadata().expect("metadata").permissions());
        assert_eq!(mode & 0o777, 0o600);
    }
    assert!(matches!(crate::client::store::open(&path), Err(Error::InUse)));
    first.execute_batch("PRAGMA user_version = 99").expect("a newer one");
    drop(first);
    assert!(matches!(crate::client::store::open(&path), Err(Error::Newer(99))));
}

#[tokio::test]
async fn jobs_are_undone_on_error_and_waiting_jobs_share_a_commit() {
    let dir = tempfile::tempdir().expect("a folder");
    let store = Store::open(&dir.path().join("a.db"), Arc::new(ManualClock::new(START)), Arc::new(SystemRandom)).expect("opened");
    let mut events = store.events();
    let failed = store.run(|db| {
        db.tell(&Event::OwnAccountChanged)?;
        Err::<(), _>(Error::NoSuchMessage)
    });
    assert!(matches!(failed.await, Err(Error::NoSuchMessage)));
    assert!(store.run(|db| db.events_after(0, 9)).await.expect("read").is_empty());
    let jobs = (0..200).map(|_| store.run(|db| db.tell(&Event::OwnAccountChanged)));
    assert!(futures_util::future::join_all(jobs).await.iter().all(Result::is_ok));
    events.changed().await.expect("told");
    assert_eq!(store.run(|db| Ok(db.events_after(0, 999)?.len())).await.expect("read"), 200);
    assert_eq!(*store.events().borrow(), 200);
    store.close().await;
    assert!(matches!(store.run(|_| Ok(())).await, Err(Error::Closed)));
    let log = std::fs::metadata(dir.path().join("a.db-wal")).map(|meta| meta.len()).unwrap_or_default();
    assert_eq!(log, 0, "nothing is left in the log");
    Store::open(&dir.path().join("a.db"), Arc::new(ManualClock::new(START)), Arc::new(SystemRandom)).expect("free at once");
}
