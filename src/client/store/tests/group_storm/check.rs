//! What is true at the end of a storm, by the server's items and the devices' databases.

use super::*;

/// When a device was in the group: from the item that it began with, in which epoch, to the one that removed it.
struct Stay {
    from: Seq,
    epoch: u64,
    to: Option<Seq>,
}

impl Storm {
    /// Who was in the group when, as the server's items say; that they are one valid history is part of it.
    fn stays(&self, items: &[GroupItem]) -> BTreeMap<DeviceAddr, Vec<Stay>> {
        let random = SeededRandom::new(1);
        let mut public = Public::create(&self.created.group_info, &self.created.tree, &random).expect("sound");
        let mut stays: BTreeMap<DeviceAddr, Vec<Stay>> = BTreeMap::new();
        let began = |from: Seq, epoch: u64| Stay { from, epoch, to: None };
        for item in items {
            match item.kind {
                GroupItemKind::Created => stays.entry(self.members[0].address).or_default().push(began(item.seq, 0)),
                GroupItemKind::Proposal => public.propose(&item.content, &random).expect("a valid proposal"),
                GroupItemKind::Commit => {
                    assert_eq!(item.epoch, public.epoch(), "one commit an epoch");
                    let before: BTreeSet<DeviceAddr> = public.roster().expect("a roster").leaves.into_values().collect();
                    let checked = public.check(&item.content, &random).expect("a valid commit");
                    let after: BTreeSet<DeviceAddr> = checked.after.leaves.values().copied().collect();
                    assert!(!matches!(checked.changes.committer, Actor::Joiner(_)), "nobody lost touch");
                    public.merge(checked).expect("merges");
                    for out in before.difference(&after) {
                        stays.get_mut(out).and_then(|stays| stays.last_mut()).expect("it was in").to = Some(item.seq);
                    }
                    for new in after.difference(&before) {
                        stays.entry(*new).or_default().push(began(item.seq, item.epoch + 1));
                    }
                }
                GroupItemKind::Message | GroupItemKind::Closed => {}
            }
        }
        stays
    }

    /// Texts by their place in the group.
    fn texts(&self, at: usize) -> BTreeMap<u64, (AccountId, String)> {
        let mut texts = BTreeMap::new();
        for message in self.db(at).history(ConversationId::Group(self.id), u64::MAX, 100_000).expect("history") {
            if let Some(seq) = message.group_seq {
                let text = (message.author, message.body.expect("nobody deletes"));
                assert!(texts.insert(seq, text).is_none(), "two at one place");
            }
        }
        texts
    }

    /// How many messages there were.
    pub(super) async fn check(&mut self) -> (usize, u64) {
        let head = self.server.store.group(self.id).await.expect("read").expect("there");
        let items = self.server.store.group_items(self.id, Seq::ZERO, usize::MAX, usize::MAX).await.expect("items");
        let stays = self.stays(&items);
        let (mut views, mut bodies): (BTreeSet<_>, BTreeMap<u64, (AccountId, String)>) = Default::default();
        for at in 0..self.members.len() {
            let member = &self.members[at];
            let texts = self.texts(at);
            let mut rest: BTreeSet<u64> = texts.keys().copied().collect();
            let none = Vec::new();
            let stays = stays.get(&member.address).unwrap_or(&none);
            for stay in stays {
                let during = items.iter().filter(|item| item.seq > stay.from && stay.to.is_none_or(|to| item.seq < to));
                let readable = during.filter(|item| item.kind == GroupItemKind::Message && item.epoch >= stay.epoch);
                let readable: Vec<u64> = readable.map(|item| item.seq.0).collect();
                // Who is out is served nothing any more, also not of what it could have read.
                let got = readable.iter().take_while(|seq| rest.remove(seq)).count();
                assert!(stay.to.is_some() || got == readable.len(), "member {at} lacks messages: {got} of {}", readable.len());
            }
            assert!(rest.is_empty(), "member {at} read what it was not to, or with a hole: {rest:?}");
            for (seq, text) in texts {
                assert_eq!(*bodies.entry(seq).or_insert_with(|| text.clone()), text, "one text at a place");
            }
            let inside = !head.closed && stays.last().is_some_and(|stay| stay.to.is_none());
            match self.state(at) {
                Some(MEMBER) => {
                    assert!(inside, "member {at} is out and does not know");
                    let state = self.db(at).group_state(self.id).expect("a state");
                    let name = self.db(at).groups().expect("list")[0].name.clone();
                    views.insert((state.epoch, state.tree_hash, state.fingerprint, name));
                }
                Some(LEFT | CLOSED) | None => assert!(!inside, "member {at} is in and does not know"),
                other => panic!("member {at}: {other:?}"),
            }
            self.check_member(at, inside);
        }
        assert!(views.len() <= 1, "they have parted: {views:?}");
        assert!(views.iter().all(|view| view.0 == head.epoch));
        let all: BTreeSet<&(AccountId, String)> = bodies.values().collect();
        assert_eq!(all.len(), bodies.len(), "no message is there twice");
        (bodies.len(), head.epoch)
    }

    /// Each message is shown once; and what was kept was sent, of whoever is in the group at the end.
    fn check_member(&self, at: usize, inside: bool) {
        let history = self.db(at).history(ConversationId::Group(self.id), u64::MAX, 100_000).expect("history");
        let events = self.db(at).events_after(0, 100_000).expect("events").into_iter().map(|(_, event)| event);
        let mut shown = Vec::new();
        for event in events {
            match event {
                Event::Message { message_id, .. } => shown.push(message_id),
                Event::GroupUndecryptable { .. } | Event::GroupRejoined { .. } => panic!("member {at}: {event:?}"),
                _ => {}
            }
        }
        let came: BTreeSet<MessageId> = history.iter().filter(|one| !one.outgoing).map(|one| one.message_id).collect();
        assert_eq!((shown.len(), shown.into_iter().collect::<BTreeSet<_>>()), (came.len(), came), "each is shown once");
        for text in self.members[at].kept.iter().filter(|_| inside) {
            let mut own = history.iter().filter(|one| one.outgoing && one.body.as_ref() == Some(text));
            let (first, second) = (own.next(), own.next());
            assert!(second.is_none(), "member {at} wrote {text} once");
            assert!(first.is_some_and(|one| one.status == Status::Failed || one.group_seq.is_some()), "member {at}: {text} went nowhere");
        }
    }
}
