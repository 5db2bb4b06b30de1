//! Many members, random changes, messages and losses, a server that takes the first commit of each epoch: at the end everybody who is in
//! the group is at the same epoch with the same tree, and has read the same messages.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;
use crate::mls::public::{Public, Refused};

/// What may happen, each to a device by its number.
#[derive(Debug, Clone)]
enum Step {
    /// It renews its keys; with `true` its process dies once before the commit.
    Update(usize, bool),
    /// An admin adds this account, or takes it out.
    Toggle(usize, usize),
    /// Somebody writes.
    Write(usize),
    /// Two prepare a commit in the same epoch; the first is accepted.
    Race(usize, usize),
    /// It takes in this many of the messages that wait for it; with `true` its process dies once on the way.
    Deliver(usize, usize, bool),
    /// It asks to be taken out.
    Leave(usize),
    /// It loses its groups and joins again.
    Lose(usize),
}

const DEVICES: usize = 6;

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let device = 0..DEVICES;
    let step = prop_oneof![
        3 => (device.clone(), any::<bool>()).prop_map(|(a, b)| Step::Update(a, b)),
        3 => (device.clone(), 1..DEVICES).prop_map(|(a, b)| Step::Toggle(a, b)),
        4 => device.clone().prop_map(Step::Write),
        2 => (device.clone(), device.clone()).prop_map(|(a, b)| Step::Race(a, b)),
        4 => (device.clone(), 1..5usize, any::<bool>()).prop_map(|(a, b, c)| Step::Deliver(a, b, c)),
        1 => (1..DEVICES).prop_map(Step::Leave),
        1 => device.prop_map(Step::Lose),
    ];
    proptest::collection::vec(step, 1..40)
}

/// A server that orders and checks, from public state alone: every message in one log, and what a joiner needs of the latest epoch.
struct Server {
    public: Public,
    log: Vec<Vec<u8>>,
    /// The positions of messages, and the epochs they were written in.
    messages: BTreeMap<usize, u64>,
    group_info: Vec<u8>,
}

impl Server {
    /// Takes a commit if it is valid and the first of its epoch.
    fn take(&mut self, sent: &Outgoing) -> Result<(), Refused> {
        let checked = self.public.check(&sent.commit, &SeededRandom::new(1))?;
        self.public.merge(checked)?;
        assert!(self.public.epoch() == sent.epoch && self.public.matches(&sent.group_info));
        self.group_info.clone_from(&sent.group_info);
        self.log.push(sent.commit.clone());
        Ok(())
    }

    fn tree(&self) -> Vec<u8> {
        self.public.tree().expect("a tree")
    }
}

struct Member {
    device: Device,
    /// How much of the log it has taken in; `None` while it is not in the group.
    cursor: Option<usize>,
    /// The log's positions of the messages that it has read or written.
    read: BTreeSet<usize>,
    /// The position and the epoch from which on it must have read everything.
    since: (usize, u64),
}

struct World {
    server: Server,
    members: Vec<Member>,
}

impl World {
    fn new() -> Self {
        let mut members: Vec<Member> = (0..DEVICES)
            .map(|n| Member { device: Device::new(n as u8 + 1, 1), cursor: None, read: BTreeSet::new(), since: (0, 0) })
            .collect();
        let created = members[0].device.create("Sturm");
        members[0].cursor = Some(0);
        let public = Public::create(&created.group_info, &created.tree, &SeededRandom::new(1)).expect("a sound group");
        Self { server: Server { public, log: Vec::new(), messages: BTreeMap::new(), group_info: created.group_info }, members }
    }

    /// Takes in everything up to the end of the log.
    fn catch_up(&mut self, who: usize) {
        self.deliver(who, usize::MAX, false);
    }

    fn deliver(&mut self, who: usize, count: usize, mut dies: bool) {
        let member = &mut self.members[who];
        for _ in 0..count {
            let Some(at) = member.cursor.filter(|&at| at < self.server.log.len()) else { return };
            let bytes = &self.server.log[at];
            if std::mem::take(&mut dies) {
                drop(member.device.lose(|engine| engine.load(GROUP)?.ok_or(Error::NotMember)?.receive(engine, bytes)));
            }
            member.cursor = Some(at + 1);
            match member.device.receive(bytes) {
                Ok(Received::Message { content, .. }) => {
                    assert_eq!(content.as_slice(), at.to_be_bytes());
                    assert!(member.read.insert(at), "read twice");
                }
                Ok(Received::Removed(_)) => {
                    member.cursor = None;
                    member.device.in_group(|_, engine| engine.load(GROUP)?.expect("a group").forget(engine)).expect("forgotten");
                }
                // A device's own proposal and message are in its state already.
                Ok(Received::Committed(_) | Received::Own | Received::Leaving(_)) | Err(Error::Past) => {}
                Err(error) => {
                    let own_proposal = matches!(&error, Error::Invalid(_)) && member.device.in_group(|g, _| Ok(g.is_active())).is_ok();
                    assert!(own_proposal, "{}: {error}", member.device.address);
                }
            }
        }
    }

    /// Sends a prepared commit to the server, which takes it if it is the first of its epoch.
    fn submit(&mut self, who: usize, sent: &Outgoing) -> bool {
        let verdict = self.server.take(sent);
        let member = &mut self.members[who];
        match verdict {
            Ok(()) => {
                member.device.accepted();
                member.cursor = Some(self.server.log.len());
                true
            }
            Err(Refused::Epoch { have, got }) => {
                assert_eq!(have, got + 1, "somebody was first");
                member.device.in_group(|group, engine| group.refused(engine)).expect("it was pending");
                false
            }
            Err(error) => panic!("the server refuses what a member may do: {error}"),
        }
    }

    fn commit(&mut self, who: usize, change: &Change<'_>) -> Option<Outgoing> {
        self.catch_up(who);
        self.members[who].cursor?;
        let sent = match self.members[who].device.change(change) {
            Ok(sent) => sent,
            Err(Error::Denied(_)) => return None,
            Err(error) => panic!("{}: {error}", self.members[who].device.address),
        };
        assert!(self.submit(who, &sent));
        Some(sent)
    }

    fn toggle(&mut self, by: usize, whom: usize) {
        self.catch_up(by);
        self.catch_up(whom);
        if by == whom || self.members[by].cursor.is_none() {
            return;
        }
        let address = self.members[whom].device.address;
        if self.members[whom].cursor.is_some() {
            self.commit(by, &Change { remove_accounts: vec![address.account], ..Change::default() });
            return;
        }
        let package = self.members[whom].device.key_package();
        if let Some(sent) = self.commit(by, &Change { add: vec![(address, &package)], ..Change::default() }) {
            let (tree, end) = (self.server.tree(), self.server.log.len());
            let member = &mut self.members[whom];
            member.device.join(&sent.welcome.expect("a Welcome"), &tree).expect("an invitation");
            (member.cursor, member.since) = (Some(end), (end, self.server.public.epoch()));
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Update(who, dies) => {
                self.catch_up(who);
                if dies && self.members[who].cursor.is_some() {
                    let device = &mut self.members[who].device;
                    drop(device.lose(|engine| engine.load(GROUP)?.ok_or(Error::NotMember)?.change(engine, &Change::default(), now())));
                }
                self.commit(who, &Change::default());
            }
            Step::Toggle(by, whom) => self.toggle(by, whom),
            Step::Write(who) => {
                let at = self.server.log.len();
                let member = &mut self.members[who];
                if member.cursor.is_none() {
                    return;
                }
                match member.device.in_group(|group, engine| Ok((group.encrypt(engine, &at.to_be_bytes())?, group.epoch()))) {
                    // The server takes no message that is behind what members keep keys for.
                    Ok((_, epoch)) if epoch + (crate::limits::PAST_EPOCHS as u64) < self.server.public.epoch() => {}
                    Ok((bytes, epoch)) => {
                        self.server.log.push(bytes);
                        self.server.messages.insert(at, epoch);
                        member.read.insert(at);
                    }
                    Err(Error::Pending) => {}
                    Err(error) => panic!("{error}"),
                }
            }
            Step::Race(one, other) => {
                self.catch_up(one);
                self.catch_up(other);
                if one == other || self.members[one].cursor.is_none() || self.members[other].cursor.is_none() {
                    return;
                }
                let [first, second] = [one, other].map(|who| self.members[who].device.change(&Change::default()));
                let (Ok(first), Ok(second)) = (first, second) else { panic!("both may renew their keys") };
                assert!(self.submit(one, &first));
                assert!(!self.submit(other, &second), "one commit an epoch");
            }
            Step::Deliver(who, count, dies) => self.deliver(who, count, dies),
            Step::Leave(who) => {
                self.catch_up(who);
                if self.members[who].cursor.is_none() {
                    return;
                }
                if let Ok(proposal) = self.members[who].device.in_group(|group, engine| group.leave(engine)) {
                    self.server.public.propose(&proposal, &SeededRandom::new(1)).expect("anybody may leave");
                    self.server.log.push(proposal);
                    // Somebody else commits it before anything else is written.
                    if let Some(other) = (0..DEVICES).find(|&other| other != who && self.members[other].cursor.is_some()) {
                        self.commit(other, &Change::default());
                    }
                    self.catch_up(who);
                }
            }
            Step::Lose(who) => {
                self.catch_up(who);
                let member = &mut self.members[who];
                if member.cursor.is_none() || self.server.public.epoch() == 0 {
                    return;
                }
                let key = member.device.run(|engine| engine.name_key(GROUP)).expect("stored").expect("a key");
                member.device.in_group(|_, engine| engine.load(GROUP)?.expect("a group").forget(engine)).expect("forgotten");
                let (info, tree) = (self.server.group_info.clone(), self.server.tree());
                let sent = member.device.run(|engine| {
                    let (group, sent) = engine.rejoin(&info, &tree)?;
                    engine.learn_name_key(&group, &key)?;
                    Ok(sent)
                });
                let sent = sent.expect("its leaf is there");
                self.server.take(&sent).expect("it is the first");
                let end = self.server.log.len();
                (member.cursor, member.since) = (Some(end), (end, self.server.public.epoch()));
            }
        }
    }

    fn settle(&mut self) {
        for who in 0..DEVICES {
            self.catch_up(who);
        }
        let mut views = BTreeSet::new();
        let mut inside = 0;
        for member in self.members.iter_mut().filter(|member| member.cursor.is_some()) {
            inside += 1;
            views.insert(member.device.view());
            let (since, first_epoch) = member.since;
            let messages = self.server.messages.iter().filter(|(at, epoch)| **at >= since && **epoch >= first_epoch);
            let expected: Vec<usize> = messages.map(|(at, _)| *at).collect();
            let read: Vec<usize> = member.read.iter().copied().filter(|&at| at >= since).collect();
            assert_eq!(read, expected, "{}", member.device.address);
        }
        assert!(inside == 0 || views.len() == 1, "members have parted: {} views of {inside}", views.len());
        assert!(views.iter().all(|view| view.0 == self.server.public.epoch()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn members_never_part(steps in steps()) {
        let mut world = World::new();
        for whom in 1..4 {
            world.toggle(0, whom);
        }
        for step in &steps {
            world.step(step);
        }
        world.settle();
    }
}
