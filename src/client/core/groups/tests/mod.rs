//! Groups between devices in memory. What is committed is chosen by each test, so that a crash is a transaction that is dropped.

mod rules;
mod server;
mod storm;

use super::*;
use crate::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use crate::clock::{Clock as _, SeededRandom, SystemClock, UnixMillis};
use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId};
use crate::mls::crypto::SUITES;
use crate::mls::profile::Role;
use openmls::prelude::Ciphersuite;

const GROUP: GroupId = GroupId::from_bytes([0x6a; 16]);

/// One device and what it has stored.
struct Device {
    address: DeviceAddr,
    state: MemoryState,
    random: SeededRandom,
    suite: Ciphersuite,
}

fn account(byte: u8) -> AccountId {
    AccountId::from_bytes([byte; 16])
}

fn now() -> UnixMillis {
    SystemClock.now()
}

impl Device {
    fn new(account_byte: u8, number: u32) -> Self {
        Self::with_suite(account_byte, number, SUITES[0])
    }

    fn with_suite(account_byte: u8, number: u32, suite: Ciphersuite) -> Self {
        let address = DeviceAddr { account: account(account_byte), device: DeviceId::new(number).expect("a device number") };
        let mut state = MemoryState::default();
        state.commit([(StateKey::OwnAddress, Some(encode_address(address).into()))].into());
        Self { address, state, random: SeededRandom::new(u64::from(account_byte) << 8 | u64::from(number)), suite }
    }

    /// One transaction; committed if it works.
    fn run<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
        let tx = StateTx::new(&self.state);
        let engine = Engine::new(&tx, &self.random)?.with_suite(self.suite);
        let done = work(&engine);
        let (writes, _) = tx.finish();
        if done.is_ok() {
            self.state.commit(writes);
        }
        done
    }

    /// The same, lost on the way: as if the process had died before the commit.
    fn lose<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
        let before = self.state.clone();
        let done = self.run(work);
        self.state = before;
        done
    }

    fn in_group<T>(&mut self, work: impl FnOnce(&mut Group, &Engine<'_, '_>) -> Result<T, Error>) -> Result<T, Error> {
        self.run(|engine| work(&mut engine.load(GROUP)?.ok_or(Error::NotMember)?, engine))
    }

    fn key_package(&mut self) -> Vec<u8> {
        self.run(|engine| engine.key_packages(1, now())).expect("a KeyPackage").remove(0)
    }

    fn create(&mut self, name: &str) -> Created {
        self.run(|engine| Ok(engine.create(GROUP, name, None, now())?.1)).expect("a group")
    }

    fn change(&mut self, change: &Change<'_>) -> Result<Outgoing, Error> {
        self.in_group(|group, engine| group.change(engine, change, now()))
    }

    fn accepted(&mut self) -> Committed {
        self.in_group(|group, engine| group.accepted(engine)).expect("the change was pending")
    }

    fn receive(&mut self, bytes: &[u8]) -> Result<Received, Error> {
        self.in_group(|group, engine| group.receive(engine, bytes))
    }

    fn join(&mut self, welcome: &[u8], tree: &[u8]) -> Result<(), Error> {
        self.run(|engine| engine.join(welcome, tree, false).map(drop))
    }

    fn write(&mut self, text: &str) -> Vec<u8> {
        self.in_group(|group, engine| group.encrypt(engine, text.as_bytes())).expect("a member writes")
    }

    fn reads(&mut self, bytes: &[u8], from: DeviceAddr, text: &str) {
        match self.receive(bytes) {
            Ok(Received::Message { from: sender, content, .. }) => {
                assert_eq!((sender, content.as_slice()), (from, text.as_bytes()));
            }
            other => panic!("{}: not a message: {other:?}", self.address),
        }
    }

    /// What all members of an epoch have in common.
    fn view(&mut self) -> (u64, Vec<u8>, Vec<u8>, Option<String>) {
        self.in_group(|group, engine| Ok((group.epoch(), group.tree_hash(), group.authenticator(), group.name(engine)?))).expect("a group")
    }

    fn tree(&mut self) -> Vec<u8> {
        self.in_group(|group, _| group.tree()).expect("a group")
    }
}

/// The first creates the group and adds the others; all are at epoch 1.
fn group_of(devices: &mut [Device]) {
    let (first, others) = devices.split_first_mut().expect("somebody");
    first.create("Berge");
    let packages: Vec<(DeviceAddr, Vec<u8>)> = others.iter_mut().map(|device| (device.address, device.key_package())).collect();
    let add = packages.iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
    let sent = first.change(&Change { add, ..Change::default() }).expect("the owner adds");
    first.accepted();
    let (welcome, tree) = (sent.welcome.expect("somebody was added"), first.tree());
    for device in others.iter_mut() {
        device.join(&welcome, &tree).expect("an invitation");
    }
    all_agree(devices);
}

fn all_agree(devices: &mut [Device]) {
    let (first, others) = devices.split_first_mut().expect("somebody");
    let view = first.view();
    for device in others {
        assert_eq!(device.view(), view, "{} sees another group than {}", device.address, first.address);
    }
}

/// Commits a change of one device that the server accepts, and everybody else's reception of it.
fn change(devices: &mut [Device], who: usize, change: &Change<'_>) -> Outgoing {
    let sent = devices[who].change(change).expect("the change may be made");
    devices[who].accepted();
    for (at, device) in devices.iter_mut().enumerate() {
        if at != who {
            device.receive(&sent.commit).expect("a valid commit");
        }
    }
    sent
}

#[test]
fn devices_meet_write_and_rename_in_every_suite() {
    for suite in SUITES {
        let mut devices: Vec<Device> = (1..=4).map(|n| Device::with_suite(n, 1, suite)).collect();
        group_of(&mut devices);
        assert_eq!(devices[2].view().3.as_deref(), Some("Berge"), "the name key came with the Welcome");
        let from = devices[1].address;
        let sent = devices[1].write("Hallo");
        for at in [0, 2, 3] {
            devices[at].reads(&sent, from, "Hallo");
        }
        assert!(matches!(devices[1].receive(&sent), Ok(Received::Own)));
        change(&mut devices, 0, &Change { name: Some("Hügel"), admins: Some(vec![account(2)]), ..Change::default() });
        change(&mut devices, 1, &Change::default());
        all_agree(&mut devices);
        assert_eq!(devices[3].view().3.as_deref(), Some("Hügel"));
        assert_eq!(devices[3].in_group(|group, _| group.role(account(2))).expect("a group"), Some(Role::Admin));
    }
}

#[test]
fn the_server_sees_neither_name_nor_name_key() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    let created = devices[0].create("Berge am Wochenende");
    let package = devices[1].key_package();
    let sent = devices[0].change(&Change { add: vec![(devices[1].address, &package)], ..Change::default() }).expect("an invitation");
    let key = devices[0].run(|engine| engine.name_key(GROUP)).expect("a group").expect("its creator's key");
    let seen = [created.group_info, created.tree, sent.commit, sent.welcome.expect("a Welcome"), sent.group_info];
    for bytes in seen {
        for secret in [key.as_bytes().as_slice(), b"Berge"] {
            assert!(!bytes.windows(secret.len()).any(|window| window == secret));
        }
    }
}

#[test]
fn a_crash_before_the_commit_leaves_the_old_epoch_and_after_it_the_new() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    group_of(&mut devices);
    let [one, two] = &mut devices;
    // Preparing a change: dropped, there is none; kept, it waits for its verdict.
    one.lose(|engine| engine.load(GROUP)?.expect("a group").change(engine, &Change::default(), now())).expect("prepared");
    assert!(!one.in_group(|group, _| Ok(group.is_pending())).expect("a group"));
    let sent = one.change(&Change::default()).expect("prepared");
    assert!(one.in_group(|group, _| Ok(group.is_pending())).expect("a group"));
    assert!(matches!(one.change(&Change::default()), Err(Error::Pending)));
    // The verdict, at both.
    one.lose(|engine| engine.load(GROUP)?.expect("a group").accepted(engine)).expect("accepted");
    two.lose(|engine| engine.load(GROUP)?.expect("a group").receive(engine, &sent.commit)).expect("received");
    assert_eq!((one.view().0, two.view().0), (1, 1));
    one.accepted();
    two.receive(&sent.commit).expect("received");
    assert_eq!((one.view().0, two.view().0), (2, 2));
    assert_eq!(one.view(), two.view());
    // A message whose reading was lost can be read again; one that was read, can't.
    let (from, text) = (one.address, one.write("einmal"));
    two.lose(|engine| engine.load(GROUP)?.expect("a group").receive(engine, &text)).expect("read");
    two.reads(&text, from, "einmal");
    assert!(two.receive(&text).is_err());
    // An invitation whose acceptance was lost can be accepted again.
    let mut three = Device::new(3, 1);
    let package = three.key_package();
    let sent = one.change(&Change { add: vec![(three.address, &package)], ..Change::default() }).expect("an invitation");
    one.accepted();
    let (welcome, tree) = (sent.welcome.expect("a Welcome"), one.tree());
    three.lose(|engine| engine.join(&welcome, &tree, false).map(drop)).expect("joined");
    assert!(three.in_group(|_, _| Ok(())).is_err());
    three.join(&welcome, &tree).expect("joined");
    assert_eq!(three.view(), one.view());
    assert!(matches!(three.join(&welcome, &tree), Err(Error::NotForUs)), "its KeyPackage is used up");
}

#[test]
fn a_refused_change_leaves_no_trace_and_the_next_one_works() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1), Device::new(3, 1)];
    group_of(&mut devices);
    let lost = devices[0].change(&Change::default()).expect("prepared");
    let won = devices[1].change(&Change::default()).expect("prepared");
    devices[1].accepted();
    devices[2].receive(&won.commit).expect("the winner");
    assert!(matches!(devices[2].receive(&lost.commit), Err(Error::Past)));
    // The winner's commit is met while the own one waits: it is gone with that.
    devices[0].receive(&won.commit).expect("the winner");
    assert!(!devices[0].in_group(|group, _| Ok(group.is_pending())).expect("a group"));
    all_agree(&mut devices);
    devices[0].change(&Change::default()).expect("prepared");
    devices[0].in_group(|group, engine| group.refused(engine)).expect("refused");
    change(&mut devices, 0, &Change::default());
    all_agree(&mut devices);
}

#[test]
fn an_own_commit_that_comes_back_is_its_verdict() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    group_of(&mut devices);
    let sent = devices[0].change(&Change::default()).expect("prepared");
    assert!(matches!(devices[0].receive(&sent.commit), Ok(Received::Committed(_))));
    devices[1].receive(&sent.commit).expect("a commit");
    all_agree(&mut devices);
}

#[test]
fn messages_of_past_epochs_are_read_within_the_window_and_missed_commits_are_noticed() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    group_of(&mut devices);
    let from = devices[0].address;
    let old = devices[0].write("unterwegs");
    let very_old = devices[0].write("verloren");
    for _ in 0..crate::limits::PAST_EPOCHS {
        change(&mut devices, 1, &Change::default());
    }
    devices[0].write("gezählt");
    devices[1].reads(&old, from, "unterwegs");
    change(&mut devices, 1, &Change::default());
    assert!(devices[1].receive(&very_old).is_err());
    let missed = devices[0].change(&Change::default()).expect("prepared");
    devices[0].accepted();
    let later = devices[0].write("danach");
    assert!(matches!(devices[1].receive(&later), Err(Error::Missed { have: 18, got: 19 })));
    devices[1].receive(&missed.commit).expect("the missing one");
    devices[1].reads(&later, from, "danach");
}

#[test]
fn who_lost_its_state_joins_again_without_an_admin() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1), Device::new(3, 1)];
    group_of(&mut devices);
    let sent = change(&mut devices, 0, &Change::default());
    let tree = devices[0].tree();
    // Its keys are there, its groups are not.
    devices[1].in_group(|_, engine| engine.load(GROUP)?.expect("a group").forget(engine)).expect("forgotten");
    assert!(devices[1].in_group(|_, _| Ok(())).is_err());
    // A verdict that never came: nothing happened, and it tries again.
    devices[1].lose(|engine| engine.rejoin(&sent.group_info, &tree).map(drop)).expect("prepared");
    let again = devices[1].run(|engine| Ok(engine.rejoin(&sent.group_info, &tree)?.1)).expect("prepared");
    for at in [0, 2] {
        let Ok(Received::Committed(committed)) = devices[at].receive(&again.commit) else { panic!("a commit") };
        assert_eq!(committed.changes.removed.len(), 1, "its old leaf");
    }
    assert_eq!(devices[1].view().3, None, "the name key is lost until somebody tells it");
    let key = devices[0].run(|engine| engine.name_key(GROUP)).expect("stored").expect("a key");
    devices[1].in_group(|group, engine| engine.learn_name_key(group, &key)).expect("the right key");
    all_agree(&mut devices);
    let from = devices[1].address;
    let text = devices[1].write("wieder da");
    devices[0].reads(&text, from, "wieder da");
    devices[2].reads(&text, from, "wieder da");
}

#[test]
fn who_leaves_is_taken_out_by_the_next_commit() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1), Device::new(3, 1)];
    group_of(&mut devices);
    let leave = devices[0].in_group(|group, engine| group.leave(engine)).expect("anybody may leave");
    for at in [1, 2] {
        assert!(matches!(devices[at].receive(&leave), Ok(Received::Leaving(who)) if who.account == account(1)));
    }
    let sent = devices[2].change(&Change::default()).expect("a member commits it");
    devices[2].accepted();
    assert!(matches!(devices[1].receive(&sent.commit), Ok(Received::Committed(_))));
    assert!(matches!(devices[0].receive(&sent.commit), Ok(Received::Removed(_))));
    assert!(matches!(devices[0].in_group(|group, engine| group.encrypt(engine, b"x")), Err(Error::NotMember)));
    all_agree(&mut devices[1..]);
    let roster = devices[1].in_group(|group, _| group.roster()).expect("a group");
    assert_eq!((roster.profile.owner, roster.leaves.len()), (account(2), 2), "ownership passed on");
}

#[test]
fn a_last_resort_key_package_serves_more_than_once() {
    let mut devices = [Device::new(1, 1), Device::new(2, 1)];
    let package = devices[1].run(|engine| engine.last_resort_key_package(now())).expect("a KeyPackage");
    assert!(key_package::check(&package, Some(devices[1].address), now(), &devices[1].random).expect("valid").last_resort);
    let [one, two] = &mut devices;
    one.create("Berge");
    for _ in 0..2 {
        let sent = one.change(&Change { add: vec![(two.address, &package)], ..Change::default() }).expect("added");
        one.accepted();
        let tree = one.tree();
        two.run(|engine| engine.join(&sent.welcome.expect("a Welcome"), &tree, true).map(drop)).expect("joined");
        assert_eq!(one.view(), two.view());
        one.change(&Change { remove_accounts: vec![account(2)], ..Change::default() }).expect("removed");
        one.accepted();
    }
}
