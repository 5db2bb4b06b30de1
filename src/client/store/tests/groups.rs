//! Groups in the database: what a group becomes is durable together with the cursor and what is told of it, or not at all.

use super::*;
use crate::client::core::groups::{Change, Engine, Group, Received};
use crate::client::core::state::StateKey;
use crate::clock::SystemClock;
use crate::ids::GroupId;

const GROUP: GroupId = GroupId::from_bytes([0x6a; 16]);

/// How a transaction ends.
#[derive(Clone, Copy, PartialEq)]
enum End {
    Commit,
    /// The process dies before the commit: the file is opened anew.
    Kill,
}

/// Does something in groups, and in the same transaction moves the cursor and tells the application.
fn step<T>(
    device: &mut Device,
    end: End,
    cursor: u64,
    work: impl FnOnce(&Engine<'_, '_>) -> Result<T, crate::client::core::groups::Error>,
) -> T {
    let db = &mut device.db;
    db.connection.execute_batch("BEGIN").expect("begun");
    let done = db.core(|tx| {
        tx.put(StateKey::Cursor, cursor.to_be_bytes().to_vec());
        work(&Engine::new(tx, &SystemRandom)?)
    });
    db.tell(&Event::OwnAccountChanged).expect("told");
    match end {
        End::Commit => db.connection.execute_batch("COMMIT").expect("committed"),
        End::Kill => {
            let path = db.connection.path().expect("a file").to_owned();
            db.connection = rusqlite::Connection::open_in_memory().expect("a stand-in");
            db.connection = crate::client::store::open(Path::new(&path)).expect("it opens again");
        }
    }
    done.expect("it works")
}

/// What the database holds: epoch, whether a change is pending, authenticator, cursor, number of events.
type Seen = (Option<(u64, bool, Vec<u8>)>, Option<Vec<u8>>, usize);

fn seen(device: &mut Device) -> Seen {
    let events = device.events().len();
    device
        .db
        .core(|tx| {
            let cursor = tx.get(&StateKey::Cursor)?.map(|bytes| bytes.to_vec());
            let group = Engine::new(tx, &SystemRandom)?.load(GROUP)?;
            Ok::<_, crate::client::core::groups::Error>((
                group.map(|group| (group.epoch(), group.is_pending(), group.authenticator())),
                cursor,
                events,
            ))
        })
        .expect("it reads")
}

/// A step that is killed leaves everything as it was; done again and committed, it changes all of it. Returns what was seen of the group.
fn killed_then_done<T>(
    device: &mut Device,
    cursor: u64,
    work: impl Fn(&Engine<'_, '_>) -> Result<T, crate::client::core::groups::Error>,
) -> (T, (u64, bool, Vec<u8>)) {
    let before = seen(device);
    step(device, End::Kill, cursor, &work);
    assert_eq!(seen(device), before, "killed at cursor {cursor}");
    let done = step(device, End::Commit, cursor, &work);
    let (group, now, events) = seen(device);
    assert_eq!((now, events), (Some(cursor.to_be_bytes().to_vec()), before.2 + 1));
    (done, group.expect("a group"))
}

fn in_group<T>(
    work: impl Fn(&mut Group, &Engine<'_, '_>) -> Result<T, crate::client::core::groups::Error>,
) -> impl Fn(&Engine<'_, '_>) -> Result<T, crate::client::core::groups::Error> {
    move |engine| work(&mut engine.load(GROUP)?.expect("a group"), engine)
}

#[test]
fn a_kill_at_each_step_leaves_the_old_epoch_and_a_commit_the_new() {
    let mut world = World::new(&[(1, 1), (2, 1)]);
    let mut devices = world.devices.drain(..);
    let (mut one, mut two) = (devices.next().expect("one"), devices.next().expect("two"));
    drop(devices);
    let now = SystemClock.now();

    let (_, (epoch, ..)) = killed_then_done(&mut one, 1, |engine| engine.create(GROUP, "Berge", None, now).map(drop));
    assert_eq!(epoch, 0);
    let package = step(&mut two, End::Commit, 1, |engine| Ok(engine.key_packages(1, now)?.remove(0)));
    let add = Change { add: vec![(two.address, &package)], ..Change::default() };
    // What was prepared and killed was never sent: the one that was committed counts.
    let (sent, (epoch, pending, _)) = killed_then_done(&mut one, 2, in_group(|group, engine| group.change(engine, &add, now)));
    assert_eq!((epoch, pending), (0, true));
    let (tree, (epoch, pending, authenticator)) = killed_then_done(
        &mut one,
        3,
        in_group(|group, engine| {
            group.accepted(engine)?;
            group.tree()
        }),
    );
    assert_eq!((epoch, pending), (1, false));
    let welcome = sent.welcome.expect("a Welcome");
    let (_, joined) = killed_then_done(&mut two, 2, |engine| engine.join(&welcome, &tree, false).map(drop));
    assert_eq!(joined, (1, false, authenticator));

    // A message whose reading died is read again; and what the sender's ratchet gave out is never given out twice.
    let (text, _) = killed_then_done(&mut one, 4, in_group(|group, engine| group.encrypt(engine, b"einmal")));
    let (read, _) = killed_then_done(&mut two, 3, in_group(|group, engine| group.receive(engine, &text)));
    assert!(matches!(read, Received::Message { content, .. } if content.as_slice() == b"einmal"));

    let (sent, _) = killed_then_done(&mut two, 4, in_group(|group, engine| group.change(engine, &Change::default(), now)));
    let (_, theirs) = killed_then_done(&mut one, 5, in_group(|group, engine| group.receive(engine, &sent.commit)));
    let (_, ours) = killed_then_done(&mut two, 5, in_group(|group, engine| group.accepted(engine)));
    assert_eq!(theirs, ours);
    assert_eq!(ours.0, 2);

    // A refusal, and joining anew.
    let (_, (_, pending, _)) = killed_then_done(&mut two, 6, in_group(|group, engine| group.change(engine, &Change::default(), now)));
    assert!(pending);
    let (_, after) = killed_then_done(&mut two, 7, in_group(|group, engine| group.refused(engine)));
    assert_eq!(after, ours);
    let tree = step(&mut one, End::Commit, 6, in_group(|group, _| group.tree()));
    let (again, rejoined) = killed_then_done(&mut two, 8, |engine| Ok(engine.rejoin(&sent.group_info, &tree)?.1));
    let (_, theirs) = killed_then_done(&mut one, 7, in_group(|group, engine| group.receive(engine, &again.commit)));
    assert_eq!(theirs, rejoined);

    // Nothing of a group is left once it is forgotten, but the device's own key.
    step(&mut two, End::Kill, 9, |engine| engine.load(GROUP)?.expect("a group").forget(engine));
    assert!(seen(&mut two).0.is_some());
    step(&mut two, End::Commit, 9, |engine| engine.load(GROUP)?.expect("a group").forget(engine));
    assert_eq!(seen(&mut two).0, None);
    let count = |table: &str| two.db.connection.query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0));
    assert_eq!((count("mls"), count("group_name_keys"), count("group_signers")), (Ok(0), Ok(0), Ok(1)));
}

#[test]
fn a_database_of_the_version_before_gets_the_tables_of_groups() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("old.db");
    let old = crate::client::store::open(&path).expect("a new file");
    let undo = "DROP TABLE mls; DROP TABLE group_signers; DROP TABLE group_name_keys; DROP TABLE groups; DROP TABLE group_invitations;
        DROP TABLE group_pending; DROP TABLE group_outgoing; DROP TABLE group_reads; DROP TABLE group_left_behind; ALTER TABLE messages DROP COLUMN group_seq;
        PRAGMA user_version = 1;";
    old.execute_batch(undo).expect("as it was");
    drop(old);
    let new = crate::client::store::open(&path).expect("migrated");
    let tables = new.query_row("SELECT count(*) FROM mls", [], |row| row.get::<_, i64>(0));
    assert_eq!(tables, Ok(0));
}
