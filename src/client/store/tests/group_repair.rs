//! Devices that lost touch with a group come back: how, who first, and how often.

use super::*;
use crate::clock::Clock as _;

impl Group {
    /// Everybody who is online does what there is to do, for so long, looking every 100 ms.
    fn run_for(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            for at in 0..self.world.devices.len() {
                if self.world.devices[at].online {
                    self.world.receive_all(at);
                    while self.step(at) {}
                    self.send(at);
                    self.feed(at);
                }
            }
            self.world.clock.advance(100);
        }
    }

    /// A member's commit whose tags nobody can verify, and which the server therefore takes.
    fn break_epoch(&mut self, by: usize) {
        let (id, address) = (self.id, self.world.devices[by].address);
        while self.step(by) {}
        assert!(self.db(by).prepare_change(id, &Intent { renew: true, ..Intent::default() }).expect("prepared"));
        let pending = self.db(by).pending(id).expect("read").expect("it waits");
        let Submission::Commit(mut outgoing) = pending.what else { panic!("a commit") };
        *outgoing.commit.last_mut().expect("bytes") ^= 1;
        let Self { server, world, .. } = self;
        let seq = server.commit(address, &outgoing, world).expect("the server can't tell");
        self.db(by).submitted(id, Seq(seq)).expect("noted");
    }

    fn count(&self, at: usize, of: impl Fn(&Event) -> bool) -> usize {
        self.world.devices[at].events().iter().filter(|event| of(event)).count()
    }

    fn commits(&self) -> usize {
        self.server.items.iter().filter(|item| item.kind() == GroupItemKind::Commit).count()
    }

    fn names(&self, of: &[usize]) -> Vec<Option<String>> {
        of.iter().map(|&at| self.db(at).groups().expect("list").remove(0).name).collect()
    }

    fn wait_ms(&self, at: usize) -> u64 {
        let row = "SELECT coalesce(repair_ms, 0) FROM groups";
        let due: i64 = self.db(at).connection.query_row(row, [], |row| row.get(0)).expect("a row");
        (due as u64).saturating_sub(self.world.clock.now().0)
    }
}

const BROKEN: fn(&Event) -> bool = |event| matches!(event, Event::GroupBroken { .. });
const REJOINED: fn(&Event) -> bool = |event| matches!(event, Event::GroupRejoined { .. });

#[test]
fn an_admin_brings_everybody_back_after_a_commit_that_nobody_can_take_in() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (3, 2)]);
    group.change(0, Intent { admin: Some((account(2), true)), ..Intent::default() });
    group.settle();
    let (before, epoch) = (group.commits(), group.agree(&[0, 1, 2, 3, 4, 5]));
    group.break_epoch(4);
    group.run_for(100);
    group.text(3, "written meanwhile");
    group.run_for(5_000);
    for at in [0, 1, 2, 3, 5] {
        let told = |event: &Event| *event == Event::GroupBroken { group: group.id, epoch, by: Some(account(5)) };
        assert_eq!((group.count(at, told), group.count(at, BROKEN), group.count(at, REJOINED)), (1, 1, 1), "device {at}");
    }
    // The broken one, the owner coming back, and the one that brings back all others: no storm.
    assert_eq!(group.commits() - before, 3);
    group.agree(&[0, 1, 2, 3, 4, 5]);
    assert_eq!(group.texts(0), ["written meanwhile"]);
    assert_eq!(group.texts(5), ["written meanwhile"]);
    assert_eq!(group.names(&[0, 1, 2, 3, 5]), vec![Some("Berge".to_owned()); 5]);
    // Roles are what they were, and who broke it can be removed.
    group.change(1, Intent { remove_accounts: vec![account(5)], ..Intent::default() });
    group.run_for(1_000);
    group.agree(&[0, 1, 2, 3, 5]);
    assert_eq!(group.membership(4), Membership::Left);
}

#[test]
fn without_an_admin_members_come_back_by_themselves_one_after_the_other() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1), (4, 1)]);
    group.world.devices[0].online = false;
    group.break_epoch(3);
    group.run_for(1_000);
    let waits = [1, 2].map(|at| group.wait_ms(at));
    assert!(waits.iter().all(|wait| (13_000..=15_400).contains(wait)), "{waits:?}");
    group.run_for(30_000);
    group.agree(&[1, 2, 3]);
    // The owner comes late, meets the broken commit too, and finds nobody left to bring back.
    let before = group.commits();
    group.world.devices[0].online = true;
    group.run_for(5_000);
    group.agree(&[0, 1, 2, 3]);
    assert_eq!(group.commits() - before, 1);
}

#[test]
fn who_was_away_reads_what_came_before_and_is_brought_back() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1)]);
    group.world.devices[1].online = false;
    group.text(0, "before");
    group.run_for(300);
    group.break_epoch(2);
    group.run_for(3_000);
    group.text(0, "after");
    group.run_for(300);
    group.world.devices[1].online = true;
    group.run_for(1_000);
    assert_eq!(group.texts(1), ["before", "after"]);
    group.agree(&[0, 1, 2]);
}

#[test]
fn what_was_accepted_behind_a_broken_commit_is_sent_again() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1)]);
    group.text(1, "too late");
    let ready = group.db(1).ready_for_groups(&[], 1).expect("ready").remove(0);
    group.break_epoch(2);
    let answer = Answer::of(group.server.message(group.world.devices[1].address, &ready.send));
    group.db(1).group_answered(ready.id, &answer).expect("noted");
    group.run_for(5_000);
    assert_eq!(group.texts(0), [""; 0], "its keys are gone");
    group.text(2, "something later");
    group.run_for(500);
    group.world.clock.advance(61_000);
    assert!(!group.db(1).groups_with_tasks().expect("tasks").contains(&group.id));
    group.run_for(1_000);
    assert!(group.texts(0).contains(&"too late".to_owned()), "{:?}", group.texts(0));
    group.agree(&[0, 1, 2]);
}

#[test]
fn repair_upon_repair_waits_longer() {
    let mut group = Group::of_all(&[(1, 1), (2, 1)]);
    let mut waits = Vec::new();
    for _ in 0..4 {
        group.break_epoch(1);
        group.feed(0);
        waits.push(group.wait_ms(0));
        let wait = waits[waits.len() - 1];
        group.run_for(wait + 2_000);
        group.agree(&[0, 1]);
    }
    assert!(waits[0] <= 400 && waits[1] >= 5_000 && waits[2] >= 10_000 && waits[3] >= 20_000, "{waits:?}");
}

#[test]
fn a_refused_external_commit_is_tried_again_later_each_time_up_to_an_hour() {
    let group = Group::of_all(&[(1, 1), (2, 1)]);
    let (id, db) = (group.id, group.db(1));
    db.lost(id, 0).expect("lost");
    assert_eq!(db.group_task(id).expect("a task"), Some(Task::Rejoin));
    let mut waits = Vec::new();
    for _ in 0..16 {
        db.rejoin_refused(id).expect("noted");
        assert_eq!(db.group_task(id).expect("a task"), None, "nothing to do before its time");
        assert!(!db.groups_with_tasks().expect("tasks").contains(&id));
        waits.push(group.wait_ms(1));
    }
    assert!(waits.windows(2).all(|pair| pair[1] >= pair[0] || pair[1] >= 1_800_000), "{waits:?}");
    assert!((5_000..=10_000).contains(&waits[0]) && waits[15] >= 1_800_000 && waits[15] <= 3_600_000, "{waits:?}");
    assert_eq!(group.count(1, |event| matches!(event, Event::GroupStuck { .. })), 1);
    // Somebody who changes something does not get around it.
    db.repair_now(id).expect("noted");
    assert_eq!(db.group_task(id).expect("a task"), None);
    assert!(matches!(db.prepare_change(id, &Intent::default()), Err(Error::Groups(crate::client::core::groups::Error::OutOfTouch))));
}

#[test]
fn only_the_devices_own_key_packages_bring_it_back() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1)]);
    group.break_epoch(2);
    for at in [0, 1] {
        group.feed(at);
    }
    group.run_for(0);
    group.world.clock.advance(1_000);
    assert_eq!(group.db(0).group_task(group.id).expect("a task"), Some(Task::Rejoin));
    group.step(0);
    let bob = group.world.devices[1].address;
    assert_eq!(group.db(0).to_bring_back(group.id).expect("read"), [bob]);
    // A server's, that says to be Bob's.
    let mut forger = World::new(&[]);
    forger.clock.advance(SystemClock.now().0.saturating_sub(START.0));
    forger.add(2, 1);
    let counts = crate::client::core::group_api::KeyPackageCounts { key_packages: 0, last_resort: false };
    let forged = forger.devices[0].db.make_key_packages(counts).expect("made").expect("some").key_packages.remove(0);
    assert!(!group.db(0).prepare_bring_back(group.id, &[(bob, forged.key_package.0)]).expect("prepared"));
    let own = group.packages(1..2);
    assert!(group.db(0).prepare_bring_back(group.id, &own).expect("prepared"));
}

#[test]
fn who_comes_back_without_the_names_key_is_told_it_once() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1), (4, 1)]);
    group.lose_state(3);
    group.db(3).connection.execute("DELETE FROM group_name_keys", []).expect("deleted");
    group.db(3).connection.execute("UPDATE groups SET name = NULL", []).expect("deleted");
    group.change(0, Intent { name: Some("Gipfel".to_owned()), ..Intent::default() });
    group.run_for(20_000);
    group.agree(&[0, 1, 2, 3]);
    assert_eq!(group.names(&[3]), [Some("Gipfel".to_owned())]);
    assert_eq!(group.count(3, |event| matches!(event, Event::GroupChanged { name: Some(_), .. })), 1);
    // One asked, one answered.
    let messages = group.server.items.iter().filter(|item| item.kind() == GroupItemKind::Message).count();
    assert_eq!((messages, group.texts(0).len()), (2, 0));
}

#[test]
fn a_group_that_nobody_told_of_is_found_and_joined() {
    let mut group = Group::new(&[(1, 1), (2, 1)]);
    let add = group.packages(1..2);
    group.change(0, Intent { add, ..Intent::default() });
    // Its invitation is gone before it came.
    group.world.devices[1].inbox.clear();
    let (db, id) = (group.db(1), group.id);
    assert!(db.groups_unlooked().expect("read"));
    assert_eq!(db.groups_unknown(&[id]).expect("read"), [id]);
    db.groups_found(&[id]).expect("noted");
    assert!(!db.groups_unlooked().expect("read") && db.groups_unknown(&[id]).expect("read").is_empty());
    group.run_for(10_000);
    group.agree(&[0, 1]);
    assert_eq!(group.names(&[1]), [Some("Berge".to_owned())], "and its name is told");
    group.db(1).look_for_groups().expect("noted");
    assert!(group.db(1).groups_unlooked().expect("read"));
}
