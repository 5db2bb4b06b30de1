//! Devices in groups against a server that is the public state of one group and a vector of items.

#[path = "group_repair.rs"]
mod repair;

use std::collections::BTreeMap;

use super::*;
use crate::client::core::group_api::{GroupInfo, ItemPage};
use crate::client::core::groups::Outgoing;
use crate::client::store::{Intent, Submission, Task, Verdict};
use crate::client::types::{ConversationId, GroupRole, Membership};
use crate::clock::{SeededRandom, SystemClock};
use crate::ids::GroupId;
use crate::mls::public::{Public, Refused};
use crate::wire::stream::{EnvelopeType, GroupInvitation, GroupItem, GroupItemKind, GroupSend};

/// What the server has of the one group.
struct Server {
    group: GroupId,
    public: Public,
    info: Vec<u8>,
    trees: BTreeMap<u64, Vec<u8>>,
    items: Vec<GroupItem>,
    messages: BTreeMap<(DeviceAddr, u64), u64>,
    /// Answers that do not arrive.
    lose_answers: usize,
    random: SeededRandom,
}

/// A server's answer.
#[derive(Debug, PartialEq)]
enum No {
    Conflict,
    Lost,
}

impl Server {
    fn put(&mut self, kind: GroupItemKind, epoch: u64, by: Option<DeviceAddr>, id: u64, content: &[u8]) -> u64 {
        let after = self.items.last().map_or(0, |item| item.seq);
        let seq = after + 3;
        self.items.push(GroupItem {
            group_id: Bytes::copy_from_slice(self.group.as_bytes()),
            seq,
            after,
            kind: kind as i32,
            epoch,
            sender_account: by.map(|by| Bytes::copy_from_slice(by.account.as_bytes())).unwrap_or_default(),
            sender_device: by.map_or(0, |by| u32::from(by.device.get())),
            client_message_id: id,
            accepted_ms: 0,
            content: Bytes::copy_from_slice(content),
        });
        seq
    }

    fn answer(&mut self, seq: u64) -> Result<u64, No> {
        if self.lose_answers == 0 {
            return Ok(seq);
        }
        self.lose_answers -= 1;
        Err(No::Lost)
    }

    /// Takes a commit; those who are added get their invitation.
    fn commit(&mut self, by: DeviceAddr, outgoing: &Outgoing, world: &mut World) -> Result<u64, No> {
        let epoch = self.public.epoch();
        let checked = match self.public.check(&outgoing.commit, &self.random) {
            Ok(checked) => checked,
            Err(Refused::Epoch { .. }) => return Err(No::Conflict),
            Err(error) => panic!("{by}: {error}"),
        };
        let added: Vec<DeviceAddr> = checked.changes.added.iter().map(|(_, device)| *device).collect();
        self.public.merge(checked).expect("merges");
        assert!(self.public.matches(&outgoing.group_info));
        self.info.clone_from(&outgoing.group_info);
        let seq = self.put(GroupItemKind::Commit, epoch, Some(by), 0, &outgoing.commit);
        if !added.is_empty() {
            self.trees.insert(epoch + 1, self.public.tree().expect("a tree"));
        }
        for device in added {
            let invitation = GroupInvitation {
                group_id: Bytes::copy_from_slice(self.group.as_bytes()),
                epoch: epoch + 1,
                seq,
                welcome: outgoing.welcome.clone().expect("a Welcome").into(),
            };
            let to = world.devices.iter_mut().find(|one| one.address == device).expect("it exists");
            to.seq += 1;
            to.inbox.push(frame(Frame::Envelope(Envelope {
                seq: to.seq,
                sender_account: Bytes::copy_from_slice(by.account.as_bytes()),
                sender_device: u32::from(by.device.get()),
                r#type: EnvelopeType::Mls as i32,
                content: prost::Message::encode_to_vec(&invitation).into(),
                ..Envelope::default()
            })));
        }
        self.answer(seq)
    }

    fn message(&mut self, by: DeviceAddr, send: &GroupSend) -> Code {
        if self.public.roster().expect("a roster").leaf_of(by).is_none() {
            return Code::Forbidden;
        }
        let current = self.public.epoch();
        if send.epoch > current || send.epoch + (crate::limits::PAST_EPOCHS as u64) < current {
            return Code::Conflict;
        }
        if self.messages.contains_key(&(by, send.client_message_id)) {
            return Code::Ok;
        }
        let seq = self.put(GroupItemKind::Message, send.epoch, Some(by), send.client_message_id, &send.content);
        self.messages.insert((by, send.client_message_id), seq);
        if self.answer(seq).is_ok() { Code::Ok } else { Code::OutcomeUnknown }
    }

    fn page(&self, after: Seq) -> ItemPage {
        let items = self.items.iter().filter(|item| item.seq > after.0).take(4).cloned().collect();
        let head = Seq(self.items.last().map_or(0, |item| item.seq));
        ItemPage { items, head, epoch: self.public.epoch(), expired_to: Seq::ZERO }
    }
}

/// A world whose first device has created a group.
struct Group {
    world: World,
    server: Server,
    id: GroupId,
}

impl Group {
    fn new(devices: &[(u8, u32)]) -> Self {
        let world = World::new(devices);
        // KeyPackages are checked against the machine's clock too.
        world.clock.advance(SystemClock.now().0.saturating_sub(START.0));
        let db = &world.devices[0].db;
        let id = db.new_group("Berge", None).expect("a group");
        let Some(Submission::Create(created)) = db.pending(id).expect("read").map(|pending| pending.what) else { panic!("not created") };
        let random = SeededRandom::new(5);
        let public = Public::create(&created.group_info, &created.tree, &random).expect("sound");
        let mut server = Server {
            group: id,
            public,
            info: created.group_info,
            trees: BTreeMap::new(),
            items: Vec::new(),
            messages: BTreeMap::new(),
            lose_answers: 0,
            random,
        };
        let seq = server.put(GroupItemKind::Created, 0, Some(world.devices[0].address), 0, &[]);
        world.devices[0].db.submitted(id, Seq(seq)).expect("noted");
        Self { world, server, id }
    }

    /// With everybody in it.
    fn of_all(devices: &[(u8, u32)]) -> Self {
        let mut group = Self::new(devices);
        let add = group.packages(1..devices.len());
        group.change(0, Intent { add, ..Intent::default() });
        group.settle();
        group
    }

    fn packages(&mut self, of: std::ops::Range<usize>) -> Vec<(DeviceAddr, Vec<u8>)> {
        let counts = crate::client::core::group_api::KeyPackageCounts { key_packages: 0, last_resort: false };
        of.map(|at| {
            let device = &self.world.devices[at];
            let upload = device.db.make_key_packages(counts).expect("made").expect("there are none");
            device.db.key_packages_published(&upload).expect("noted");
            (device.address, upload.key_packages[0].key_package.0.clone())
        })
        .collect()
    }

    fn db(&self, at: usize) -> &Db {
        &self.world.devices[at].db
    }

    /// One step of what a device has to do, as the engine does it; whether there was one.
    fn step(&mut self, at: usize) -> bool {
        let (id, address) = (self.id, self.world.devices[at].address);
        let Some(task) = self.db(at).group_task(id).expect("a task") else { return false };
        match task {
            Task::Join { epoch } => {
                let tree = self.server.trees.get(&epoch).cloned().expect("a tree");
                self.db(at).join_group(id, epoch, &tree).expect("joined");
            }
            Task::Submit => {
                self.submit(at);
            }
            Task::CatchUp { after, head } => {
                let page = self.server.page(after);
                self.db(at).group_page(id, head, &page).expect("taken in");
            }
            Task::Rejoin => {
                let tree = self.server.public.tree().expect("a tree").into();
                let info = GroupInfo { epoch: self.server.public.epoch(), group_info: self.server.info.clone().into(), tree };
                let rejoin = self.db(at).prepare_rejoin(id, &info).expect("prepared");
                let Self { server, world, .. } = self;
                if let Ok(seq) = server.commit(address, &rejoin.outgoing, world) {
                    self.db(at).rejoined(id, rejoin, Seq(seq)).expect("noted");
                }
            }
            Task::BringBack => {
                let left = self.db(at).to_bring_back(id).expect("read");
                let among = |one: &usize| left.contains(&self.world.devices[*one].address);
                let left: Vec<usize> = (0..self.world.devices.len()).filter(among).collect();
                let packages: Vec<_> = left.into_iter().flat_map(|one| self.packages(one..one + 1)).collect();
                if !self.db(at).prepare_bring_back(id, &packages).expect("prepared") {
                    self.db(at).brought_back(id).expect("noted");
                }
            }
            Task::NameKey => self.db(at).name_key_turn(id).expect("said"),
            Task::Leave => {
                self.db(at).prepare_leave(id).expect("prepared");
            }
            Task::Tidy => {
                let (_, gone) = self.db(at).own_devices_in(id).expect("read");
                let intent = Intent { remove_devices: gone, ..Intent::default() };
                if !self.db(at).prepare_change(id, &intent).expect("prepared") {
                    self.db(at).group_tidied(id, false).expect("noted");
                }
            }
        }
        true
    }

    fn submit(&mut self, at: usize) -> Verdict {
        let (id, address) = (self.id, self.world.devices[at].address);
        let Some(pending) = self.db(at).pending(id).expect("read") else { return Verdict::Accepted };
        match pending.verdict {
            Verdict::Unknown => {}
            Verdict::Accepted => self.db(at).drop_pending(id).expect("done"),
            Verdict::Conflict => self.db(at).refused(id).expect("done"),
        }
        if pending.verdict != Verdict::Unknown {
            return pending.verdict;
        }
        let Self { server, world, .. } = self;
        let answer = match &pending.what {
            Submission::Commit(outgoing) => server.commit(address, outgoing, world),
            Submission::Proposal(bytes) => {
                server.public.propose(bytes, &SeededRandom::new(1)).expect("valid");
                let epoch = server.public.epoch();
                Ok(server.put(GroupItemKind::Proposal, epoch, Some(address), 0, bytes))
            }
            Submission::Create(_) => unreachable!("it was created"),
        };
        match answer {
            Ok(seq) => self.db(at).submitted(id, Seq(seq)).expect("noted"),
            Err(No::Conflict) => self.db(at).overtaken(id).expect("noted"),
            Err(No::Lost) => {}
        }
        Verdict::Unknown
    }

    /// Prepares a change, and does what there is to do until its verdict.
    fn change(&mut self, at: usize, intent: Intent) {
        for _ in 0..100 {
            while self.step(at) {}
            if !self.db(at).prepare_change(self.id, &intent).expect("prepared") {
                return;
            }
            for _ in 0..50 {
                match self.db(at).pending(self.id).expect("read").map(|pending| pending.verdict) {
                    None => return,
                    Some(Verdict::Conflict) if !matches!(self.db(at).group_task(self.id).expect("a task"), Some(Task::CatchUp { .. })) => {
                        self.submit(at);
                        break;
                    }
                    Some(_) => {
                        self.step(at);
                    }
                }
            }
        }
        panic!("it never gets through");
    }

    fn send(&mut self, at: usize) -> bool {
        let address = self.world.devices[at].address;
        let ready = self.db(at).ready_for_groups(&[], 64).expect("ready");
        for ready in &ready {
            let answer = Answer::of(self.server.message(address, &ready.send));
            self.db(at).group_answered(ready.id, &answer).expect("noted");
        }
        !ready.is_empty()
    }

    /// Items that a device has not had, as its stream carries them.
    fn feed(&mut self, at: usize) -> bool {
        let head = self.server.items.last().map_or(0, |item| item.seq);
        let frames: Vec<ServerFrame> = self.server.items.iter().cloned().map(|item| frame(Frame::GroupItem(item))).collect();
        let before = self.db(at).group_row(self.id).expect("read").map(|row| (row.cursor, row.state));
        self.db(at).process(&frames).expect("processed");
        // All over again changes nothing.
        self.db(at).process(&frames).expect("processed");
        let after = self.db(at).group_row(self.id).expect("read").map(|row| (row.cursor, row.state));
        after.is_some_and(|(cursor, state)| state == crate::client::store::groups::MEMBER && cursor <= head) && before != after
    }

    fn settle(&mut self) {
        for _ in 0..200 {
            let mut moved = false;
            for at in 0..self.world.devices.len() {
                if self.world.devices[at].online {
                    moved |= self.world.receive_all(at);
                    while self.step(at) {
                        moved = true;
                    }
                    moved |= self.send(at) | self.feed(at);
                }
            }
            if !moved {
                return;
            }
            self.world.clock.advance(20_000);
        }
        panic!("it never comes to rest");
    }

    fn texts(&self, at: usize) -> Vec<String> {
        let history = self.db(at).history(ConversationId::Group(self.id), u64::MAX, 1_000).expect("history");
        history.into_iter().map(|message| message.body.unwrap_or_else(|| "(deleted)".into())).collect()
    }

    fn text(&self, at: usize, body: &str) {
        self.db(at).send_to_group(self.id, content::text(body)).expect("kept");
    }

    fn membership(&self, at: usize) -> Membership {
        self.db(at).groups().expect("list")[0].membership
    }

    /// That these are at the same epoch with the same keys.
    fn agree(&self, devices: &[usize]) -> u64 {
        let views: Vec<(u64, Vec<u8>)> = devices
            .iter()
            .map(|&at| self.db(at).in_group(self.id, |group, _| Ok((group.epoch(), group.authenticator()))).expect("read").expect("in it"))
            .collect();
        assert!(views.windows(2).all(|pair| pair[0] == pair[1]), "{:?}", views.iter().map(|view| view.0).collect::<Vec<_>>());
        assert_eq!(views[0].0, self.server.public.epoch());
        views[0].0
    }

    fn lose_state(&mut self, at: usize) {
        let db = self.db(at);
        db.forget_open_groups();
        // As if an older copy of the file had been put back, without the keys of this epoch.
        db.connection.execute("DELETE FROM mls WHERE kind != 17", []).expect("deleted");
    }
}

#[test]
fn everybody_has_each_message_once_and_in_the_groups_order() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1), (2, 2)]);
    assert_eq!(group.agree(&[0, 1, 2, 3]), 1);
    group.world.devices[2].online = false;
    group.text(0, "one");
    group.settle();
    group.text(1, "two");
    group.text(1, "three");
    group.change(0, Intent { renew: true, ..Intent::default() });
    group.settle();
    group.world.devices[2].online = true;
    group.settle();
    for at in 0..4 {
        assert_eq!(group.texts(at), ["one", "two", "three"], "device {at}");
    }
    let shown = |at: usize| group.world.devices[at].events().iter().filter(|event| matches!(event, Event::Message { .. })).count();
    assert_eq!([shown(0), shown(1), shown(2), shown(3)], [2, 1, 3, 3]);
    let last = group.db(1).history(ConversationId::Group(group.id), u64::MAX, 1).expect("history").remove(0);
    assert_eq!((last.status, last.group_seq.is_some()), (Status::Sent, true));
    assert_eq!(group.db(1).unsent_to_groups().expect("count"), 0);
    let summary = group.db(2).groups().expect("list").remove(0);
    assert_eq!((summary.name.as_deref(), summary.accounts, summary.unread), (Some("Berge"), 3, 3));
    // Read once for all; one's own other device learns of it too.
    assert_eq!(group.db(3).groups().expect("list")[0].unread, 1);
    assert_eq!(group.db(1).mark_group_read(group.id, u64::MAX).expect("read"), 1);
    group.settle();
    assert_eq!(group.db(3).groups().expect("list")[0].unread, 0);
    assert_eq!(group.db(0).group_reads(group.id).expect("read").len(), 1);
}

#[test]
fn commits_of_many_at_once_all_get_through() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1), (4, 1)]);
    // All prepare in the same epoch; then each submits.
    let intent = Intent { renew: true, ..Intent::default() };
    for at in 0..4 {
        assert!(group.db(at).prepare_change(group.id, &intent).expect("prepared"));
    }
    group.settle();
    assert_eq!(group.agree(&[0, 1, 2, 3]), 2, "one of them");
    for at in 0..4 {
        group.change(at, intent.clone());
    }
    group.settle();
    assert_eq!(group.agree(&[0, 1, 2, 3]), 6);
}

#[test]
fn a_commit_whose_answer_is_lost_is_known_from_the_items() {
    let mut group = Group::of_all(&[(1, 1), (2, 1)]);
    group.server.lose_answers = 1;
    group.change(0, Intent { name: Some("Hügel".into()), ..Intent::default() });
    group.settle();
    assert_eq!(group.agree(&[0, 1]), 2, "done once");
    assert_eq!(group.db(1).groups().expect("list")[0].name.as_deref(), Some("Hügel"));
    // A message too.
    group.server.lose_answers = 1;
    group.text(0, "einmal");
    group.settle();
    assert_eq!((group.texts(1), group.db(0).unsent_to_groups().expect("count")), (vec!["einmal".to_owned()], 0));
}

#[test]
fn who_lost_its_keys_joins_again() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1)]);
    group.lose_state(1);
    group.text(0, "lost");
    group.change(0, Intent { renew: true, ..Intent::default() });
    group.settle();
    assert!(group.world.devices[1].events().iter().any(|event| matches!(event, Event::GroupRejoined { .. })));
    group.text(2, "found");
    group.text(1, "here");
    group.settle();
    group.agree(&[0, 1, 2]);
    assert!(group.texts(1).contains(&"found".to_owned()) && group.texts(0).contains(&"here".to_owned()));
}

#[test]
fn who_is_removed_or_leaves_is_out() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1), (2, 2)]);
    group.change(0, Intent { remove_accounts: vec![account(3)], ..Intent::default() });
    group.settle();
    assert_eq!(group.membership(2), Membership::Left);
    assert!(group.world.devices[2].events().iter().any(|event| matches!(event, Event::GroupLeft { asked: false, .. })));
    assert!(group.db(2).send_to_group(group.id, content::text("still here?")).is_err());
    // Leaving: the other device first, then this one, which somebody else takes out.
    let intent = group.db(1).leave_group(group.id).expect("leaving");
    group.change(1, intent);
    group.settle();
    assert_eq!((group.membership(1), group.membership(3)), (Membership::Left, Membership::Left));
    assert!(group.world.devices[1].events().iter().any(|event| matches!(event, Event::GroupLeft { asked: true, .. })));
    assert_eq!(group.db(0).group_members(group.id).expect("members").len(), 1);
}

#[test]
fn roles_are_given_and_taken() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1)]);
    group.change(0, Intent { admin: Some((account(2), true)), ..Intent::default() });
    group.settle();
    let role = |group: &Group, of: u8| {
        let members = group.db(2).group_members(group.id).expect("members");
        members.into_iter().find(|member| member.account == account(of)).expect("in it").role
    };
    assert_eq!((role(&group, 1), role(&group, 2), role(&group, 3)), (GroupRole::Owner, GroupRole::Admin, GroupRole::Member));
    assert!(group.db(2).prepare_change(group.id, &Intent { name: Some("x".into()), ..Intent::default() }).is_err(), "no admin");
    group.change(0, Intent { owner: Some(account(3)), ..Intent::default() });
    group.settle();
    assert_eq!((role(&group, 1), role(&group, 3)), (GroupRole::Admin, GroupRole::Owner));
}

#[test]
fn a_message_of_an_epoch_too_long_over_is_encrypted_again() {
    let mut group = Group::of_all(&[(1, 1), (2, 1)]);
    group.text(1, "late");
    let ready = group.db(1).ready_for_groups(&[], 64).expect("ready");
    assert_eq!(ready.len(), 1);
    group.world.devices[1].online = false;
    for _ in 0..=crate::limits::PAST_EPOCHS {
        group.change(0, Intent { renew: true, ..Intent::default() });
    }
    group.world.devices[1].online = true;
    let answer = Answer::of(group.server.message(group.world.devices[1].address, &ready[0].send));
    assert_eq!(answer.code, Code::Conflict);
    group.db(1).group_answered(ready[0].id, &answer).expect("noted");
    group.settle();
    assert_eq!(group.texts(0), ["late"]);
    assert_eq!(group.db(1).unsent_to_groups().expect("count"), 0);
}

#[test]
fn what_was_accepted_and_has_no_place_is_sent_again() {
    let mut group = Group::of_all(&[(1, 1), (2, 1)]);
    group.text(1, "nowhere");
    let ready = group.db(1).ready_for_groups(&[], 64).expect("ready").remove(0);
    group.db(1).group_answered(ready.id, &Answer::of(Code::Ok)).expect("noted");
    assert_eq!(group.db(1).unsent_to_groups().expect("count"), 0);
    group.world.clock.advance(120_000);
    group.db(1).groups_with_tasks().expect("looked");
    assert_eq!(group.db(1).unsent_to_groups().expect("count"), 0, "nothing else came: it may still");
    group.text(0, "somewhere");
    group.settle();
    group.db(1).groups_with_tasks().expect("looked");
    group.settle();
    assert_eq!(group.texts(0), ["somewhere", "nowhere"]);
    assert_eq!(group.texts(1), ["nowhere", "somewhere"], "in the order that this device had them");
}

#[test]
fn a_page_that_is_older_than_what_the_stream_told_hides_nothing() {
    let mut group = Group::of_all(&[(1, 1), (2, 1)]);
    group.text(0, "one");
    assert!(group.send(0));
    group.db(1).group_behind(group.id).expect("noted");
    let Some(Task::CatchUp { after, head }) = group.db(1).group_task(group.id).expect("a task") else { panic!("it looks") };
    let page = group.server.page(after);
    // Before it is here, the stream tells of a later item, and the one between was lost.
    group.text(0, "two");
    group.text(0, "three");
    assert!(group.send(0));
    let last = group.server.items.last().expect("an item").clone();
    group.db(1).process(&[frame(Frame::GroupItem(last))]).expect("processed");
    group.db(1).group_page(group.id, head, &page).expect("taken in");
    assert!(matches!(group.db(1).group_task(group.id).expect("a task"), Some(Task::CatchUp { .. })), "there is more");
    while group.step(1) {}
    assert_eq!(group.texts(1), ["one", "two", "three"]);
}

#[test]
fn being_out_does_not_answer_an_invitation_that_came_since() {
    let mut group = Group::of_all(&[(1, 1), (2, 1), (3, 1)]);
    group.change(0, Intent { remove_accounts: vec![account(3)], ..Intent::default() });
    // Its page was refused while it was out; before it hears that, it is added again.
    let add = group.packages(2..3);
    group.change(0, Intent { add, ..Intent::default() });
    assert!(group.world.receive_all(2));
    group.db(2).group_gone(group.id, false, None).expect("noted");
    group.settle();
    group.agree(&[0, 1, 2]);
}

#[test]
fn key_packages_are_made_when_few_are_left_and_when_they_are_old() {
    use crate::client::core::group_api::KeyPackageCounts;
    let group = Group::new(&[(1, 1)]);
    let counts = |key_packages, last_resort| KeyPackageCounts { key_packages, last_resort };
    let db = group.db(0);
    let first = db.make_key_packages(counts(0, false)).expect("made").expect("none are there");
    assert_eq!((first.key_packages.len(), first.key_packages[0].id, first.last_resort.is_some()), (100, 1, true));
    db.key_packages_published(&first).expect("noted");
    assert!(db.make_key_packages(counts(100, true)).expect("looked").is_none());
    assert!(db.make_key_packages(counts(crate::limits::PREKEYS_LOW_WATER, true)).expect("looked").is_none());
    let refill = db.make_key_packages(counts(19, true)).expect("made").expect("few are left");
    assert_eq!((refill.key_packages.len(), refill.key_packages[0].id, refill.last_resort), (81, 101, None));
    group.world.clock.advance(29 * 24 * 3600 * 1000);
    let rotated = db.make_key_packages(counts(100, true)).expect("made").expect("they are old");
    let ids: Vec<u32> = rotated.key_packages.iter().map(|one| one.id).collect();
    assert_eq!((ids[0], ids[99], rotated.last_resort.is_some()), (82, 181, true), "under the numbers of those that are left");
}
