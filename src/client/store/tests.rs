//! Several databases against each other, with a server that is a few vectors: what is durable, and when.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::client::core::api::{B64, PeerDevice, Registered};
use crate::client::core::content::{self, Kind, MessageId, proto};
use crate::client::core::repair::Answer;
use crate::client::core::signal::Bundle;
use crate::client::types::{Event, Failure, Live, Message, Status, Trust};
use crate::clock::{ManualClock, SystemRandom};
use crate::ids::{AccountId, DeviceAddr, DeviceId, Seq};
use crate::wire::stream::{
    Code, Envelope, Hello, IdRange, Receipt, ReceiptEntry, ReceiptKind, Send as SendFrame, ServerFrame, server_frame::Frame,
};

const START: UnixMillis = UnixMillis(1_800_000_000_000);

fn number(device: u32) -> DeviceId {
    DeviceId::new(device).expect("valid")
}

fn account(byte: u8) -> AccountId {
    AccountId::from_bytes([byte; 16])
}

struct Device {
    db: Db,
    address: DeviceAddr,
    keys: account::OwnKeys,
    inbox: Vec<ServerFrame>,
    seq: u64,
    online: bool,
}

impl Device {
    fn new(dir: &Path, clock: &ManualClock, address: DeviceAddr) -> Self {
        static FILES: AtomicU64 = AtomicU64::new(0);
        let path = dir.join(format!("{}.db", FILES.fetch_add(1, Ordering::Relaxed)));
        let connection = super::open(&path).expect("a new file");
        // Tests run many commits; that they reach the disk is not what they test.
        connection.execute_batch("PRAGMA synchronous = OFF").expect("a pragma");
        let db = Db { connection, clock: Arc::new(clock.clone()), random: Arc::new(SystemRandom), changed: Cell::default() };
        let keys = db.begin_registration().expect("keys");
        let identity = format!("user{}@local", address.account.as_bytes()[0]).parse().expect("valid");
        let registered = Registered {
            account_id: address.account,
            device_id: address.device,
            credential: "sp1_test".to_owned().into(),
            identities: vec![identity],
        };
        db.finish_registration("http://127.0.0.1", &registered).expect("registered");
        Self { db, address, keys, inbox: Vec::new(), seq: 0, online: true }
    }

    fn peer(&self) -> PeerDevice {
        let identity_key = B64(self.keys.identity_key.clone());
        PeerDevice { device_id: self.address.device, registration_id: self.keys.registration_id, identity_key }
    }

    fn bundle(&mut self) -> Bundle {
        let parts = |key: &crate::client::core::api::SignedKeyJson| (key.id, key.public_key.0.clone(), key.signature.0.clone());
        let upload = &mut self.keys.upload;
        Bundle {
            device: self.address.device,
            registration_id: self.keys.registration_id,
            identity_key: self.keys.identity_key.clone(),
            signed_prekey: parts(upload.signed_prekey.as_ref().expect("made")),
            kyber_prekey: parts(&upload.pq_one_time_prekeys.pop().expect("enough")),
            one_time_prekey: upload.one_time_prekeys.pop().map(|key| (key.id, key.public_key.0)),
        }
    }

    fn texts(&self, conversation: AccountId) -> Vec<String> {
        let history = self.db.history(conversation, u64::MAX, 1_000).expect("history");
        history.into_iter().map(|message| message.body.unwrap_or_else(|| "(deleted)".into())).collect()
    }

    fn last(&self, conversation: AccountId) -> Message {
        self.db.history(conversation, u64::MAX, 1).expect("history").pop().expect("a message")
    }

    fn events(&self) -> Vec<Event> {
        self.db.events_after(0, 10_000).expect("events").into_iter().map(|(_, event)| event).collect()
    }

    fn text(&self, to: AccountId, body: &str) -> MessageId {
        self.db.send(to, content::text(body), true).expect("kept")
    }
}

struct World {
    dir: tempfile::TempDir,
    clock: ManualClock,
    devices: Vec<Device>,
    /// What each answered send carried: (sender, recipient, client message id), its envelopes.
    accepted: BTreeMap<(DeviceAddr, AccountId, u64), Vec<Bytes>>,
    live: Vec<Live>,
}

impl World {
    /// Devices given as (account, device).
    fn new(devices: &[(u8, u32)]) -> Self {
        let (dir, clock) = (tempfile::tempdir().expect("a folder"), ManualClock::new(START));
        let mut world = Self { dir, clock, devices: Vec::new(), accepted: BTreeMap::new(), live: Vec::new() };
        devices.iter().for_each(|&(account, device)| world.add(account, device));
        world
    }

    fn add(&mut self, byte: u8, device: u32) {
        let address = DeviceAddr { account: account(byte), device: number(device) };
        self.devices.push(Device::new(self.dir.path(), &self.clock, address));
    }

    fn of(&self, account: AccountId) -> Vec<usize> {
        (0..self.devices.len()).filter(|&at| self.devices[at].address.account == account).collect()
    }

    /// Answers a send as the server does, and puts accepted envelopes into inboxes.
    fn answer(&mut self, from: usize, send: &SendFrame) -> Answer {
        let recipient = AccountId::from_slice(&send.recipient).expect("16 bytes");
        let targets: Vec<usize> = self.of(recipient).into_iter().filter(|&at| at != from).collect();
        let mut answer = Answer::of(Code::Ok);
        let envelope = |at: usize| send.envelopes.iter().find(|e| e.device_id == u32::from(self.devices[at].address.device.get()));
        answer.missing = targets.iter().filter(|&&at| envelope(at).is_none()).map(|&at| self.devices[at].address.device).collect();
        let known = |id: u32| targets.iter().any(|&at| u32::from(self.devices[at].address.device.get()) == id);
        answer.extra = send.envelopes.iter().filter(|e| !known(e.device_id)).map(|e| number(e.device_id)).collect();
        let stale = |&&at: &&usize| envelope(at).is_some_and(|e| e.registration_id != self.devices[at].keys.registration_id.get());
        answer.stale = targets.iter().filter(stale).map(|&at| self.devices[at].address.device).collect();
        if !answer.missing.is_empty() || !answer.extra.is_empty() {
            return Answer { code: Code::DeviceMismatch, ..answer };
        }
        if !answer.stale.is_empty() {
            return Answer { code: Code::StaleDevices, ..answer };
        }
        let sender = self.devices[from].address;
        let contents = send.envelopes.iter().map(|envelope| envelope.content.clone()).collect();
        if self.accepted.insert((sender, recipient, send.client_message_id), contents).is_some() {
            return answer;
        }
        for at in targets {
            let outgoing = send.envelopes.iter().find(|e| e.device_id == u32::from(self.devices[at].address.device.get()));
            let outgoing = outgoing.expect("checked").clone();
            let device = &mut self.devices[at];
            if !send.ephemeral {
                device.seq += 1;
            } else if !device.online {
                continue;
            }
            device.inbox.push(frame(Frame::Envelope(Envelope {
                seq: if send.ephemeral { 0 } else { device.seq },
                sender_account: Bytes::copy_from_slice(sender.account.as_bytes()),
                sender_device: u32::from(sender.device.get()),
                client_message_id: send.client_message_id,
                r#type: outgoing.r#type,
                accepted_ms: 0,
                urgent: send.urgent,
                ephemeral: send.ephemeral,
                content: outgoing.content,
            })));
        }
        answer
    }

    /// Device lists and bundles for what waits.
    fn directory(&mut self, of: usize) {
        for account in self.devices[of].db.waiting().expect("waiting") {
            let need = self.devices[of].db.need(account).expect("need");
            let others: Vec<usize> = self.of(account).into_iter().filter(|&at| at != of).collect();
            if need.list {
                let list: Vec<PeerDevice> = others.iter().map(|&at| self.devices[at].peer()).collect();
                self.devices[of].db.set_devices(account, &list).expect("set");
            }
            let need = self.devices[of].db.need(account).expect("need");
            let wanted = others.iter().filter(|&&at| need.sessions.contains(&self.devices[at].address.device));
            let bundles: Vec<Bundle> = wanted.copied().collect::<Vec<_>>().into_iter().map(|at| self.devices[at].bundle()).collect();
            self.devices[of].db.repaired(account, &bundles, &[]).expect("repaired");
        }
    }

    fn send_all(&mut self, from: usize) -> bool {
        self.directory(from);
        let ready = self.devices[from].db.ready(&[], 64).expect("ready");
        for ready in &ready {
            let answer = self.answer(from, &ready.send);
            self.devices[from].db.answered(ready.id, &answer).expect("noted");
        }
        !ready.is_empty()
    }

    fn receive_all(&mut self, at: usize) -> bool {
        if !self.devices[at].online {
            return false;
        }
        let frames = std::mem::take(&mut self.devices[at].inbox);
        let processed = self.devices[at].db.process(&frames).expect("processed");
        self.live.extend(processed.live);
        let receipts: Vec<(DeviceAddr, u64)> = frames
            .iter()
            .filter_map(|frame| match &frame.frame {
                Some(Frame::Envelope(e)) if e.seq > 0 => {
                    let account = AccountId::from_slice(&e.sender_account).expect("16 bytes");
                    Some((DeviceAddr { account, device: number(e.sender_device) }, e.client_message_id))
                }
                _ => None,
            })
            .collect();
        let acknowledged = self.devices[at].address;
        for (sender, id) in receipts {
            let Some(to) = self.devices.iter_mut().find(|device| device.address == sender) else { continue };
            to.seq += 1;
            to.inbox.push(receipt(to.seq, acknowledged, ReceiptKind::Delivered, id));
        }
        !frames.is_empty()
    }

    /// Until nothing moves.
    fn settle(&mut self) {
        for _ in 0..500 {
            let mut moved = false;
            for at in 0..self.devices.len() {
                moved |= self.send_all(at);
                moved |= self.receive_all(at);
            }
            if !moved {
                return;
            }
            self.clock.advance(60_000);
        }
        panic!("it never comes to rest");
    }
}

fn frame(frame: Frame) -> ServerFrame {
    ServerFrame { frame: Some(frame) }
}

fn receipt(seq: u64, of: DeviceAddr, kind: ReceiptKind, id: u64) -> ServerFrame {
    let entry = ReceiptEntry {
        account: Bytes::copy_from_slice(of.account.as_bytes()),
        device: u32::from(of.device.get()),
        kind: kind as i32,
        client_message_ids: vec![IdRange { first: id, last: id }],
    };
    frame(Frame::Receipt(Receipt { seq, entries: vec![entry] }))
}

const ALICE: usize = 0;
const BOB: usize = 1;

fn two() -> (World, AccountId, AccountId) {
    (World::new(&[(1, 1), (2, 1)]), account(1), account(2))
}

#[test]
fn ticks_go_from_pending_to_read() {
    let (mut world, alice, bob) = two();
    world.devices[BOB].online = false;
    world.devices[ALICE].text(bob, "hello");
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Pending);
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Sent);
    world.devices[BOB].online = true;
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Delivered);
    assert_eq!(world.devices[BOB].texts(alice), ["hello"]);
    let conversation = &world.devices[BOB].db.conversations().expect("list")[0];
    assert_eq!((conversation.account, conversation.unread), (alice, 1));
    assert_eq!(world.devices[BOB].db.mark_read(alice, u64::MAX).expect("read"), 1);
    assert_eq!(world.devices[BOB].db.mark_read(alice, u64::MAX).expect("read"), 0, "once");
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Read);
    assert_eq!(world.devices[BOB].db.conversations().expect("list")[0].unread, 0);
}

#[test]
fn all_devices_of_both_sides_have_the_conversation() {
    let mut world = World::new(&[(1, 1), (2, 1), (1, 2), (2, 2)]);
    let (alice, bob) = (account(1), account(2));
    world.devices[ALICE].text(bob, "one");
    world.settle();
    world.devices[2].text(bob, "two");
    world.settle();
    world.devices[3].text(alice, "three");
    world.settle();
    for (at, conversation) in [(0, bob), (2, bob), (1, alice), (3, alice)] {
        assert_eq!(world.devices[at].texts(conversation), ["one", "two", "three"], "device {at}");
    }
    world.devices[2].db.mark_read(bob, u64::MAX).expect("read");
    world.settle();
    assert_eq!(world.devices[ALICE].db.conversations().expect("list")[0].unread, 0, "read on the other device");
    assert_eq!(world.devices[3].last(alice).status, Status::Read);
    assert_eq!(world.devices[BOB].last(alice).status, Status::Read, "all devices learn of it");
}

#[test]
fn notes_to_oneself_reach_the_other_devices() {
    let mut world = World::new(&[(1, 1), (1, 2)]);
    world.devices[0].text(account(1), "milk");
    world.settle();
    assert_eq!((world.devices[0].texts(account(1)), world.devices[1].texts(account(1))), (vec!["milk".into()], vec!["milk".into()]));
    let (mut alone, own) = (World::new(&[(1, 1)]), account(1));
    alone.devices[0].text(own, "milk");
    alone.settle();
    assert_eq!(alone.devices[0].last(own).status, Status::Sent);
}

#[test]
fn a_new_device_is_repaired_with_the_same_id_and_the_old_ciphertext() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "first");
    world.settle();
    world.add(2, 2);
    world.devices[ALICE].text(bob, "second");
    let before = world.devices[ALICE].db.ready(&[], 9).expect("ready").pop().expect("encrypted at once").send;
    world.settle();
    assert_eq!(
        (world.devices[BOB].texts(account(1)), world.devices[2].texts(account(1))),
        (vec!["first".into(), "second".into()], vec!["second".to_owned()])
    );
    let sent = &world.accepted[&(world.devices[ALICE].address, bob, before.client_message_id)];
    assert_eq!(sent.len(), 2);
    assert_eq!(sent[0], before.envelopes[0].content, "the ciphertext of the device that was fine is kept");
    let added = Event::DeviceAdded { account: bob, device: number(2), was_verified: false };
    assert!(world.devices[ALICE].events().contains(&added));
}

#[test]
fn a_device_that_is_gone_is_dropped_and_a_new_installation_gets_a_new_session() {
    let mut world = World::new(&[(1, 1), (2, 1), (2, 2)]);
    let bob = account(2);
    world.devices[ALICE].text(bob, "first");
    world.settle();
    world.devices.remove(2);
    let address = world.devices[BOB].address;
    world.devices[BOB] = Device::new(world.dir.path(), &world.clock, address);
    for body in ["second", "third", "fourth"] {
        world.devices[ALICE].text(bob, body);
    }
    world.settle();
    assert_eq!(world.devices[BOB].texts(account(1)), ["second", "third", "fourth"]);
    let changed = Event::IdentityChanged { account: bob, device: number(1), was_verified: false };
    assert_eq!(world.devices[ALICE].events().into_iter().filter(|event| *event == changed).count(), 1, "told once");
}

#[test]
fn what_cannot_be_decrypted_is_asked_for_again_and_shown_once() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "zero");
    world.settle();
    world.devices[BOB].text(alice, "ack");
    world.settle();
    // Bob loses his session, as after restoring a backup; Alice does not know.
    world.devices[BOB].db.connection.execute("DELETE FROM sessions", []).expect("deleted");
    world.devices[ALICE].text(bob, "one");
    world.devices[ALICE].text(bob, "two");
    world.settle();
    let mut texts = world.devices[BOB].texts(alice);
    texts.sort();
    assert_eq!(texts, ["ack", "one", "two", "zero"]);
    let undecryptable = |event: &Event| matches!(event, Event::Undecryptable { asked_again: true, .. });
    assert_eq!(world.devices[BOB].events().iter().filter(|event| undecryptable(event)).count(), 2);
    world.devices[ALICE].text(bob, "three");
    world.settle();
    assert_eq!(world.devices[BOB].texts(alice).len(), 5);
}

#[test]
fn edits_deletes_and_reactions_apply_even_before_their_message() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "helo");
    world.settle();
    let message = world.devices[ALICE].last(bob);
    let edit = |id: MessageId, body: &str| Kind::Edit(proto::Edit { message_id: Bytes::copy_from_slice(&id.0), body: body.into() });
    world.devices[ALICE].db.send(bob, edit(message.message_id, "hello"), false).expect("edited");
    let target = Some(content::message_ref(alice, message.message_id));
    let reaction = Kind::Reaction(proto::Reaction { target, emoji: "👍".into(), remove: false });
    world.devices[BOB].db.send(alice, reaction, false).expect("reacted");
    world.settle();
    for (at, conversation) in [(ALICE, bob), (BOB, alice)] {
        let message = world.devices[at].last(conversation);
        assert_eq!((message.body.as_deref(), message.edited), (Some("hello"), true));
        assert_eq!(message.reactions, [(bob, "👍".to_owned())]);
    }
    assert!(matches!(world.devices[BOB].db.send(alice, edit(message.message_id, "mine"), false), Err(Error::NoSuchMessage)));
    // Reversed: the edit is applied before the text arrives.
    let (db, now) = (&world.devices[BOB].db, world.clock.now());
    let text = content::new(content::text("late"), now, None, &SystemRandom);
    let id = content::id_of(&text).expect("valid");
    let early = content::new(edit(id, "late, edited"), now, None, &SystemRandom);
    db.apply(alice, alice, &early, Status::Delivered).expect("kept");
    db.apply(alice, bob, &content::new(edit(id, "forged"), now, None, &SystemRandom), Status::Delivered).expect("kept");
    db.apply(alice, alice, &text, Status::Delivered).expect("applied");
    assert_eq!(world.devices[BOB].last(alice).body.as_deref(), Some("late, edited"));
    let delete = Kind::Delete(proto::Delete { message_id: Bytes::copy_from_slice(&message.message_id.0) });
    world.devices[ALICE].db.send(bob, delete, false).expect("deleted");
    world.settle();
    let first = &world.devices[BOB].db.history(alice, u64::MAX, 10).expect("history")[0];
    assert_eq!((first.body.as_deref(), first.reactions.len()), (None, 0));
}

#[test]
fn expired_messages_are_gone_from_the_file() {
    let (mut world, alice, bob) = two();
    let timer = Kind::ExpireTimer(proto::ExpireTimer { seconds: 60 });
    world.devices[ALICE].db.send(bob, timer, false).expect("set");
    world.settle();
    assert_eq!(world.devices[BOB].db.conversations().expect("list")[0].expire_s, 60);
    world.devices[BOB].text(alice, "BURN AFTER READING");
    world.settle();
    let clock = &world.clock;
    assert_eq!(world.devices[ALICE].db.expire().expect("looked"), (0, None), "not read yet");
    world.devices[ALICE].db.mark_read(bob, u64::MAX).expect("read");
    let due = world.devices[ALICE].db.expire().expect("looked").1.expect("it runs");
    clock.advance(due.saturating_sub(clock.now().0));
    world.settle();
    for at in [ALICE, BOB] {
        let db = &world.devices[at].db;
        db.expire().expect("removed");
        db.connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").expect("checkpoint");
        assert!(world.devices[at].events().iter().any(|event| matches!(event, Event::Expired { .. })));
    }
    for file in std::fs::read_dir(world.dir.path()).expect("folder") {
        let bytes = std::fs::read(file.expect("entry").path()).expect("file");
        assert!(!bytes.windows(18).any(|window| window == b"BURN AFTER READING"));
    }
}

#[test]
fn verified_accounts_are_held_when_their_devices_change() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "first");
    world.settle();
    let (digits, trust) = world.devices[ALICE].db.safety_number(bob).expect("number");
    assert_eq!((digits.len(), trust), (60, Trust::Unverified));
    assert_eq!(digits, world.devices[BOB].db.safety_number(alice).expect("number").0, "both sides see the same");
    assert!(!world.devices[ALICE].db.verify(bob, &digits.replace('1', "2")).expect("compared"));
    assert!(world.devices[ALICE].db.verify(bob, &digits).expect("compared"));
    world.add(2, 2);
    world.devices[ALICE].text(bob, "second");
    world.settle();
    assert_eq!(world.devices[ALICE].last(bob).status, Status::Pending, "held");
    assert!(matches!(world.devices[ALICE].db.send(bob, content::text("third"), true), Err(Error::Unverified)));
    let added = Event::DeviceAdded { account: bob, device: number(2), was_verified: true };
    assert!(world.devices[ALICE].events().contains(&added));
    let (new_digits, trust) = world.devices[ALICE].db.safety_number(bob).expect("number");
    assert!(new_digits != digits && trust == Trust::Changed);
    assert!(world.devices[ALICE].db.verify(bob, &new_digits).expect("compared"));
    world.settle();
    assert_eq!(world.devices[2].texts(alice), ["second"]);
}

#[test]
fn refusals_are_told_and_deleted_accounts_end() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.directory(ALICE);
    let id = world.devices[ALICE].db.ready(&[], 1).expect("ready")[0].id;
    world.devices[ALICE].db.answered(id, &Answer::of(Code::Blocked)).expect("noted");
    let message = world.devices[ALICE].last(bob);
    assert_eq!((message.status, message.failure), (Status::Failed, Some(Failure::Blocked)));
    world.devices[ALICE].text(bob, "one");
    world.devices[ALICE].text(bob, "two");
    let id = world.devices[ALICE].db.ready(&[], 1).expect("ready")[0].id;
    world.devices[ALICE].db.answered(id, &Answer::of(Code::AccountDeleted)).expect("noted");
    assert_eq!(world.devices[ALICE].last(bob).failure, Some(Failure::AccountDeleted), "all that waited fail");
    assert!(world.devices[ALICE].events().contains(&Event::AccountDeleted { account: bob }));
    assert!(matches!(world.devices[ALICE].db.send(bob, content::text("x"), true), Err(Error::AccountDeleted)));
}

#[test]
fn retries_keep_bytes_and_id_and_order() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "one");
    world.directory(ALICE);
    world.devices[ALICE].text(bob, "two");
    let db = &world.devices[ALICE].db;
    let first = db.ready(&[], 9).expect("ready");
    assert_eq!(first.len(), 2);
    assert_eq!(db.ready(&[first[0].id], 9).expect("ready").len(), 1, "what is in flight is not taken again");
    let wait = Answer { retry_after_ms: 5_000, ..Answer::of(Code::RateLimited) };
    db.answered(first[0].id, &wait).expect("noted");
    assert!(db.ready(&[], 9).expect("ready").is_empty(), "the second waits for the first");
    world.clock.advance(60_000);
    let again = db.ready(&[], 9).expect("ready");
    assert_eq!(again[0].send, first[0].send);
    db.answered(again[0].id, &Answer::of(Code::StaleMessageId)).expect("noted");
    let renewed = db.ready(&[], 9).expect("ready");
    let renewed = renewed.iter().find(|ready| ready.id == again[0].id).expect("still there");
    assert!(renewed.send.client_message_id > first[1].send.client_message_id);
    assert_eq!(renewed.send.envelopes, first[0].send.envelopes);
}

#[test]
fn at_most_a_window_of_ids_is_unanswered() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "0");
    world.settle();
    for n in 0..200 {
        world.devices[ALICE].text(bob, &n.to_string());
    }
    let ready = world.devices[ALICE].db.ready(&[], 1_000).expect("ready");
    assert!(ready.len() as u64 <= crate::limits::MESSAGE_ID_WINDOW && ready.len() > 64, "{}", ready.len());
    world.settle();
    assert_eq!(world.devices[BOB].texts(account(1)).len(), 201);
}

#[test]
fn typing_is_told_and_never_kept() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].db.send_typing(bob, true).expect("dropped: no session yet");
    world.devices[ALICE].text(bob, "hello");
    world.settle();
    world.devices[ALICE].db.send_typing(bob, true).expect("sent");
    world.settle();
    assert_eq!(world.live, [Live::Typing { account: alice, started: true }]);
    assert_eq!(world.devices[ALICE].db.unsent().expect("count"), 0);
    let kept: i64 =
        world.devices[ALICE].db.connection.query_row("SELECT count(*) FROM outgoing WHERE ephemeral", [], |row| row.get(0)).expect("count");
    assert_eq!(kept, 0);
}

#[test]
fn transcripts_of_strangers_and_forged_receipts_are_ignored() {
    let (mut world, alice, bob) = two();
    let text = content::new(content::text("forged"), START, None, &SystemRandom);
    let forged = content::new(content::transcript(text, account(9), None, crate::ids::ClientMessageId(1)), START, None, &SystemRandom);
    world.devices[ALICE].db.enqueue(bob, &forged, outgoing::Sending::default()).expect("kept");
    world.settle();
    assert!(world.devices[BOB].texts(account(9)).is_empty() && world.devices[BOB].texts(alice).is_empty());
    let id = world.devices[ALICE].text(account(9), "to somebody else");
    let read = Kind::Read(proto::ReadReceipt { message_ids: vec![Bytes::copy_from_slice(&id.0)] });
    let read = content::new(read, START, None, &SystemRandom);
    world.devices[ALICE].db.apply(bob, bob, &read, Status::Delivered).expect("applied");
    assert_eq!(world.devices[ALICE].last(account(9)).status, Status::Pending);
}

#[test]
fn gaps_and_expiry_are_told_and_the_cursor_moves() {
    let (mut world, _, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.devices[BOB].online = false;
    world.settle();
    let id = world.accepted.keys().next().expect("one").2;
    let device = &world.devices[ALICE];
    let address = world.devices[BOB].address;
    let hello = |cursor| frame(Frame::Hello(Hello { cursor, heartbeat_ms: 0, max_unacked_bytes: 0, server_time_ms: 0 }));
    let gap = frame(Frame::Gap(crate::wire::stream::Gap { from: 3, to: 9, reason: crate::wire::stream::GapReason::GapExpired as i32 }));
    let frames = [hello(0), gap.clone(), receipt(10, address, ReceiptKind::Expired, id), gap];
    assert_eq!(device.db.process(&frames).expect("processed").cursor, Seq(10));
    assert_eq!(device.last(bob).failure, Some(Failure::Expired));
    assert_eq!(device.events().iter().filter(|event| **event == Event::Gap { expired: true }).count(), 1);
    assert_eq!(device.db.process(&[hello(12)]).expect("processed").cursor, Seq(12), "state was set back: said, not hidden");
    assert!(device.events().contains(&Event::Gap { expired: false }));
}

#[test]
fn rejected_messages_go_again_under_a_new_id() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.settle();
    let (id, address) = (world.accepted.keys().next().expect("one").2, world.devices[BOB].address);
    let seq = world.devices[ALICE].seq + 1;
    world.devices[ALICE].db.process(&[receipt(seq, address, ReceiptKind::Rejected, id)]).expect("processed");
    assert_eq!(world.devices[ALICE].db.unsent().expect("count"), 1);
    world.devices[ALICE].seq = seq;
    world.settle();
    assert_eq!(world.devices[BOB].texts(alice), ["hello"], "shown once");
}

#[test]
fn claimed_identities_wait_for_the_directory() {
    let (mut world, alice, bob) = two();
    world.devices[ALICE].text(bob, "hello");
    world.settle();
    let claims = world.devices[BOB].db.claims(9).expect("claims");
    assert_eq!(claims, ["user1@local".parse().expect("valid")]);
    assert!(world.devices[BOB].db.conversations().expect("list")[0].identities.is_empty());
    world.devices[BOB].db.confirm(&claims[0], Some(alice)).expect("confirmed");
    assert_eq!(world.devices[BOB].db.conversations().expect("list")[0].identities, claims);
    assert!(world.devices[BOB].db.claims(9).expect("claims").is_empty());
    assert!(world.devices[BOB].events().contains(&Event::Contact { account: alice, identity: claims[0].clone() }));
    // Somebody else's claim to it is settled by the directory, not by what was said last.
    world.devices[BOB].db.claim("user1@local", account(7)).expect("kept");
    world.devices[BOB].db.confirm(&claims[0], Some(alice)).expect("confirmed");
    assert_eq!(world.devices[BOB].db.account_of(&claims[0]).expect("known"), Some(alice));
}

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
fn the_file_is_private_locked_and_versioned() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a.db");
    std::fs::write(&path, b"").expect("made by somebody, readable by all");
    let first = super::open(&path).expect("opened");
    for file in std::fs::read_dir(dir.path()).expect("folder") {
        let mode = std::os::unix::fs::PermissionsExt::mode(&file.expect("entry").metadata().expect("metadata").permissions());
        assert_eq!(mode & 0o777, 0o600);
    }
    assert!(matches!(super::open(&path), Err(Error::InUse)));
    first.execute_batch("PRAGMA user_version = 99").expect("a newer one");
    drop(first);
    assert!(matches!(super::open(&path), Err(Error::Newer(99))));
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

#[derive(Debug, Clone)]
enum Op {
    Send { from: usize, to: usize },
    Flush { from: usize, answer_lost: bool },
    Receive { at: usize, most: usize, crash: bool },
    LoseSessions { at: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let at = || 0usize..4;
    prop_oneof![
        4 => (at(), at()).prop_map(|(from, to)| Op::Send { from, to }),
        4 => (at(), proptest::bool::weighted(0.3)).prop_map(|(from, answer_lost)| Op::Flush { from, answer_lost }),
        4 => (at(), 1usize..5, proptest::bool::weighted(0.3)).prop_map(|(at, most, crash)| Op::Receive { at, most, crash }),
        1 => at().prop_map(|at| Op::LoseSessions { at }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// G-ONCE at the level of the database: two accounts with two devices each; answers get lost, transactions are rolled
    /// back as by a crash, sessions are lost. In the end all four devices have the whole conversation, each message once.
    #[test]
    fn every_device_has_every_message_once(ops in proptest::collection::vec(op(), 1..60)) {
        let mut world = World::new(&[(1, 1), (2, 1), (1, 2), (2, 2)]);
        let mut written = Vec::new();
        for op in ops {
            match op {
                Op::Send { from, to } => {
                    let (from_account, to) = (world.devices[from].address.account, world.devices[to].address.account);
                    if from_account != to {
                        let body = format!("message {}", written.len());
                        world.devices[from].text(to, &body);
                        written.push(body);
                    }
                }
                Op::Flush { from, answer_lost } => {
                    world.directory(from);
                    let ready = world.devices[from].db.ready(&[], 8).expect("ready");
                    for ready in ready {
                        let answer = world.answer(from, &ready.send);
                        if !answer_lost {
                            world.devices[from].db.answered(ready.id, &answer).expect("noted");
                        }
                    }
                }
                Op::Receive { at, most, crash } => {
                    let device = &mut world.devices[at];
                    let frames: Vec<ServerFrame> = device.inbox.iter().take(most).cloned().collect();
                    device.db.connection.execute_batch("BEGIN").expect("begun");
                    device.db.process(&frames).expect("processed");
                    // A crash before the commit; after a commit the same comes again, as if the acknowledgement was lost.
                    device.db.connection.execute_batch(if crash { "ROLLBACK" } else { "COMMIT" }).expect("ended");
                }
                Op::LoseSessions { at } => {
                    world.devices[at].db.connection.execute("DELETE FROM sessions", []).expect("deleted");
                }
            }
        }
        // The budget for repairs is by the hour.
        world.clock.advance(crate::client::core::repair::RETRY_WINDOW_MS);
        world.settle();
        written.sort();
        for at in 0..4 {
            let other = if world.devices[at].address.account == account(1) { account(2) } else { account(1) };
            let mut texts = world.devices[at].texts(other);
            texts.sort();
            prop_assert_eq!(&texts, &written, "device {}", at);
        }
    }
}
