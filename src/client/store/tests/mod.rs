//! Several databases against each other, with a server that is a few vectors: what is durable, and when.

mod account;
mod contacts;
mod group_feed;
mod group_storm;
mod groups;
mod incoming;
mod messages;
mod model;
mod outgoing;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::*;
use crate::client::core::api::{PeerDevice, Registered};
use crate::client::core::content::{self, Kind, MessageId, proto};
use crate::client::core::repair::Answer;
use crate::client::core::signal::Bundle;
use crate::client::types::{Event, Failure, Live, Message, Status, Trust};
use crate::clock::{ManualClock, SystemRandom};
use crate::ids::{AccountId, DeviceAddr, DeviceId, Seq};
use crate::wire::stream::{
    Code, Envelope, Hello, IdRange, Receipt, ReceiptEntry, ReceiptKind, Send as SendFrame, ServerFrame, server_frame::Frame,
};

const START: UnixMillis = UnixMillis(1_700_000_000_000);

fn number(device: u32) -> DeviceId {
    DeviceId::new(device).expect("valid")
}

fn account(byte: u8) -> AccountId {
    AccountId::from_bytes([byte; 16])
}

struct Device {
    db: Db,
    address: DeviceAddr,
    keys: super::account::OwnKeys,
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
        let db = Db {
            connection,
            clock: Arc::new(clock.clone()),
            random: Arc::new(SystemRandom),
            changed: Cell::default(),
            open_groups: RefCell::default(),
        };
        let keys = db.begin_registration("http://127.0.0.1").expect("keys");
        let identity = format!("user{}@local", address.account.as_bytes()[0]).parse().expect("valid");
        let registered = Registered {
            account_id: address.account,
            device_id: address.device,
            credential: "sp1_test".to_owned().into(),
            first_message_id: clock.now().0,
            identities: vec![identity],
        };
        db.finish_registration("http://127.0.0.1", &registered).expect("registered");
        Self { db, address, keys, inbox: Vec::new(), seq: 0, online: true }
    }

    fn peer(&self) -> PeerDevice {
        let identity_key = self.keys.identity_key.clone();
        PeerDevice { device_id: self.address.device, registration_id: self.keys.registration_id, identity_key }
    }

    fn bundle(&mut self) -> Bundle {
        let parts = |key: &crate::client::core::api::SignedKeyJson| (key.id, key.public_key.0.clone(), key.signature.0.clone());
        let upload = &mut self.keys.upload;
        Bundle {
            device: self.address.device,
            registration_id: self.keys.registration_id,
            identity_key: self.keys.identity_key.0.clone(),
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
