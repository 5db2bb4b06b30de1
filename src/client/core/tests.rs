//! The core against itself: devices that exchange messages over a network and a server made of vectors, with crashes at
//! any point. Whatever happens, every device shows every message for it exactly once.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::content::{self, Content, Kind, MessageId};
use super::inbox::{self, Incoming, Received};
use super::keys;
use super::signal::{self, Bundle, Ciphertext};
use super::state::{IdentityNews, MemoryState, StateKey, StateTx, encode_address};
use crate::clock::{Random, SeededRandom, SystemRandom, UnixMillis};
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, RegistrationId, Seq};

const NOW: UnixMillis = UnixMillis(1_800_000_000_000);

fn address(account: u8, device: u32) -> DeviceAddr {
    DeviceAddr { account: AccountId::from_bytes([account; 16]), device: DeviceId::new(device).expect("valid") }
}

/// One device: its committed state, and what its application was shown.
struct Device {
    address: DeviceAddr,
    state: MemoryState,
    bundle: Bundle,
    one_time: Vec<(u32, Vec<u8>)>,
    shown: Vec<(AccountId, MessageId)>,
    outbox: Vec<Outgoing>,
    sent: BTreeMap<u64, (DeviceAddr, Content)>,
    next_id: u64,
}

#[derive(Clone)]
struct Outgoing {
    id: u64,
    to: DeviceAddr,
    ciphertext: Ciphertext,
}

#[derive(Clone)]
struct Envelope {
    seq: Seq,
    from: DeviceAddr,
    id: u64,
    ciphertext: Ciphertext,
}

impl Device {
    fn new(address: DeviceAddr, one_time: usize) -> Self {
        let mut state = MemoryState::default();
        let tx = StateTx::new(&state);
        let device = keys::generate_device(&tx, &SystemRandom);
        tx.put(StateKey::OwnAddress, encode_address(address));
        let signed = keys::rotate(&tx, 1, 1, NOW, &SystemRandom).expect("keys");
        let batch = keys::one_time(&tx, (1, one_time), (2, 0), NOW, &SystemRandom).expect("keys");
        let writes = tx.finish().0;
        state.commit(writes);
        let parts = |key: super::api::SignedKeyJson| (key.id, key.public_key.0, key.signature.0);
        let bundle = Bundle {
            device: address.device,
            registration_id: device.registration_id,
            identity_key: device.identity_key,
            signed_prekey: parts(signed.signed_prekey.expect("made")),
            kyber_prekey: parts(signed.pq_last_resort_prekey.expect("made")),
            one_time_prekey: None,
        };
        let one_time = batch.one_time_prekeys.into_iter().map(|key| (key.id, key.public_key.0)).collect();
        Self { address, state, bundle, one_time, shown: Vec::new(), outbox: Vec::new(), sent: BTreeMap::new(), next_id: 1 }
    }

    /// Hands out a one-time key at most once, like the server.
    fn take_bundle(&mut self) -> Bundle {
        Bundle { one_time_prekey: self.one_time.pop(), ..self.bundle.clone() }
    }

    /// Encrypts and commits, or crashes before the commit.
    fn send(&mut self, to: DeviceAddr, bundle: Option<Bundle>, content: &Content, crash: bool) {
        let tx = StateTx::new(&self.state);
        if let Some(bundle) = bundle {
            signal::begin_session(&tx, to, &bundle, NOW, &SystemRandom).expect("a good bundle");
        }
        let plaintext = content::encode(content).expect("valid");
        let ciphertext = signal::encrypt(&tx, to, &plaintext, NOW, &SystemRandom).expect("a session");
        if crash {
            return;
        }
        let writes = tx.finish().0;
        self.state.commit(writes);
        self.outbox.push(Outgoing { id: self.next_id, to, ciphertext });
        self.sent.insert(self.next_id, (to, content.clone()));
        self.next_id += 1;
    }

    fn has_session(&self, with: DeviceAddr) -> bool {
        signal::usable_session(&StateTx::new(&self.state), with, NOW).expect("memory").is_some()
    }
}

struct World {
    devices: Vec<Device>,
    inboxes: Vec<Vec<Envelope>>,
    acked: Vec<Seq>,
    random: SeededRandom,
    expected: Vec<BTreeSet<(AccountId, MessageId)>>,
}

impl World {
    fn new(devices: usize, seed: u64) -> Self {
        let devices: Vec<Device> = (0..devices).map(|n| Device::new(address(n as u8 + 1, 1), n)).collect();
        let count = devices.len();
        Self {
            devices,
            inboxes: vec![Vec::new(); count],
            acked: vec![Seq::ZERO; count],
            random: SeededRandom::new(seed),
            expected: vec![BTreeSet::new(); count],
        }
    }

    fn number_of(&self, address: DeviceAddr) -> usize {
        self.devices.iter().position(|device| device.address == address).expect("known")
    }

    fn send(&mut self, from: usize, to: usize, crash: bool) {
        let content = content::new(content::text("hello"), NOW, None, &self.random);
        self.transmit(from, to, &content, crash);
        if !crash {
            let id = content::id_of(&content).expect("valid");
            self.expected[to].insert((self.devices[from].address.account, id));
        }
    }

    fn transmit(&mut self, from: usize, to: usize, content: &Content, crash: bool) {
        let address = self.devices[to].address;
        let bundle = (!self.devices[from].has_session(address)).then(|| self.devices[to].take_bundle());
        self.devices[from].send(address, bundle, content, crash);
    }

    /// One outgoing message reaches the server; if its answer is lost, it stays to be sent again.
    fn flush(&mut self, from: usize, pick: usize, answer_lost: bool) {
        let outbox = &mut self.devices[from].outbox;
        if outbox.is_empty() {
            return;
        }
        let at = pick % outbox.len();
        let outgoing = if answer_lost { outbox[at].clone() } else { outbox.remove(at) };
        let sender = self.devices[from].address;
        let to = self.number_of(outgoing.to);
        let seq = Seq(self.inboxes[to].last().map_or(0, |last| last.seq.0) + 1);
        self.inboxes[to].push(Envelope { seq, from: sender, id: outgoing.id, ciphertext: outgoing.ciphertext });
    }

    /// A device takes what is pending. It may crash before its commit, or after it and before its acknowledgement.
    fn receive(&mut self, device: usize, most: usize, crash: bool, ack_lost: bool) {
        let pending: Vec<Envelope> = self.inboxes[device].iter().filter(|e| e.seq > self.acked[device]).take(most).cloned().collect();
        for envelope in pending {
            let incoming = Incoming {
                seq: envelope.seq,
                from: envelope.from,
                client_message_id: ClientMessageId(envelope.id),
                kind: envelope.ciphertext.kind,
                content: &envelope.ciphertext.bytes,
            };
            let step = inbox::receive(&self.devices[device].state, incoming, &SystemRandom).expect("memory");
            if crash {
                return;
            }
            self.devices[device].state.commit(step.writes);
            match step.received {
                Received::Content(content) => self.show(device, envelope.from, &content),
                Received::Undecryptable(_) => self.ask_again(device, &envelope),
                Received::Again => {}
                Received::Malformed(why) => panic!("{why}"),
            }
            if !ack_lost {
                self.acked[device] = envelope.seq;
            }
        }
    }

    fn show(&mut self, device: usize, from: DeviceAddr, content: &Content) {
        match &content.kind {
            Some(Kind::Retry(retry)) => {
                let to = self.number_of(from);
                let (_, lost) = self.devices[device].sent[&retry.client_message_id].clone();
                self.transmit(device, to, &lost, false);
            }
            _ => self.devices[device].shown.push((from.account, content::id_of(content).expect("checked"))),
        }
    }

    fn ask_again(&mut self, device: usize, envelope: &Envelope) {
        let tx = StateTx::new(&self.devices[device].state);
        signal::archive_session(&tx, envelope.from).expect("memory");
        let writes = tx.finish().0;
        self.devices[device].state.commit(writes);
        let kind = content::retry_request(envelope.from.device, ClientMessageId(envelope.id));
        let content = content::new(kind, NOW, None, &self.random);
        let to = self.number_of(envelope.from);
        self.transmit(device, to, &content, false);
    }

    /// No more faults: everything arrives.
    fn settle(&mut self) {
        for _ in 0..1_000 {
            for device in 0..self.devices.len() {
                while !self.devices[device].outbox.is_empty() {
                    self.flush(device, 0, false);
                }
                self.receive(device, usize::MAX, false, false);
            }
            let idle = (0..self.devices.len()).all(|d| self.inboxes[d].last().is_none_or(|last| last.seq <= self.acked[d]));
            if idle && self.devices.iter().all(|device| device.outbox.is_empty()) {
                return;
            }
        }
        panic!("the devices never came to rest");
    }
}

#[derive(Debug, Clone)]
enum Op {
    Send { from: usize, to: usize, crash: bool },
    Flush { from: usize, pick: usize, answer_lost: bool },
    Receive { device: usize, most: usize, crash: bool, ack_lost: bool },
}

fn op(devices: usize) -> impl Strategy<Value = Op> {
    let sometimes = || proptest::bool::weighted(0.25);
    prop_oneof![
        (0..devices, 1..devices, sometimes()).prop_map(move |(from, by, crash)| Op::Send { from, to: (from + by) % devices, crash }),
        (0..devices, any::<usize>(), sometimes()).prop_map(|(from, pick, answer_lost)| Op::Flush { from, pick, answer_lost }),
        (0..devices, 1usize..6, sometimes(), sometimes()).prop_map(|(device, most, crash, ack_lost)| Op::Receive {
            device,
            most,
            crash,
            ack_lost
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// G-ONCE, for the part of it that the core decides: lost answers, lost acknowledgements, repeats, another order, and
    /// crashes before and after each commit.
    #[test]
    fn every_message_is_shown_exactly_once(seed in any::<u64>(), ops in proptest::collection::vec(op(3), 1..90)) {
        let mut world = World::new(3, seed);
        for op in ops {
            match op {
                Op::Send { from, to, crash } => world.send(from, to, crash),
                Op::Flush { from, pick, answer_lost } => world.flush(from, pick, answer_lost),
                Op::Receive { device, most, crash, ack_lost } => world.receive(device, most, crash, ack_lost),
            }
        }
        world.settle();
        for (device, expected) in world.devices.iter().zip(&world.expected) {
            let shown: BTreeSet<_> = device.shown.iter().copied().collect();
            prop_assert_eq!(shown.len(), device.shown.len(), "shown twice");
            prop_assert_eq!(&shown, expected);
        }
    }
}

fn deliver(to: &mut Device, from: DeviceAddr, seq: u64, ciphertext: &Ciphertext) -> inbox::Step {
    let kind = ciphertext.kind;
    let incoming = Incoming { seq: Seq(seq), from, client_message_id: ClientMessageId(seq), kind, content: &ciphertext.bytes };
    inbox::receive(&to.state, incoming, &SystemRandom).expect("memory")
}

fn pair() -> (Device, Device) {
    (Device::new(address(1, 1), 0), Device::new(address(2, 1), 5))
}

fn hello() -> Content {
    content::new(content::text("hello"), NOW, None, &SystemRandom)
}

#[test]
fn a_first_message_uses_up_its_one_time_key_and_later_ones_need_none() {
    let (mut alice, mut bob) = pair();
    let bundle = bob.take_bundle();
    let used = bundle.one_time_prekey.as_ref().map(|(id, _)| *id).expect("there are some");
    alice.send(bob.address, Some(bundle), &hello(), false);
    let step = deliver(&mut bob, alice.address, 1, &alice.outbox[0].ciphertext);
    assert!(matches!(step.received, Received::Content(_)));
    assert_eq!(step.news, [IdentityNews::New(alice.address)]);
    assert_eq!(step.writes.get(&StateKey::PreKey(used)), Some(&None), "the private key is deleted");
    bob.state.commit(step.writes);
    assert!(bob.has_session(alice.address), "bob can answer without fetching keys");
    assert_eq!(alice.outbox[0].ciphertext.kind, 3);
    bob.send(alice.address, None, &hello(), false);
    assert_eq!(bob.outbox[0].ciphertext.kind, 2);
    assert_eq!(bob.outbox[0].ciphertext.registration_id, alice.bundle.registration_id);
}

#[test]
fn a_last_resort_key_begins_one_session_for_each_base_key() {
    let (mut alice, mut bob) = pair();
    bob.one_time.clear();
    let before = bob.state.clone();
    alice.send(bob.address, Some(bob.bundle.clone()), &hello(), false);
    let step = deliver(&mut bob, alice.address, 1, &alice.outbox[0].ciphertext);
    assert!(step.writes.keys().any(|key| matches!(key, StateKey::KyberUsed { .. })));
    assert!(!step.writes.contains_key(&StateKey::KyberLastResort(1)), "it stays for the next one");
    // The session is lost, the mark is not: the same first message again is refused.
    bob.state = before;
    bob.state.commit(step.writes.into_iter().filter(|(key, _)| matches!(key, StateKey::KyberUsed { .. })).collect());
    let replay = deliver(&mut bob, alice.address, 2, &alice.outbox[0].ciphertext);
    assert!(matches!(replay.received, Received::Undecryptable(_)));
}

#[test]
fn nothing_but_the_cursor_is_written_for_what_cannot_be_decrypted() {
    let (mut alice, mut bob) = pair();
    alice.send(bob.address, Some(bob.bundle.clone()), &hello(), false);
    let mut damaged = alice.outbox[0].ciphertext.clone();
    let last = damaged.bytes.len() - 1;
    damaged.bytes[last] ^= 1;
    let step = deliver(&mut bob, alice.address, 7, &damaged);
    assert!(matches!(step.received, Received::Undecryptable(_)));
    assert_eq!(step.writes.into_keys().collect::<Vec<_>>(), [StateKey::Cursor]);
    for kind in [0, 1, 4, 16, 255] {
        assert!(matches!(
            deliver(&mut bob, alice.address, 8, &Ciphertext { kind, ..damaged.clone() }).received,
            Received::Undecryptable(_)
        ));
    }
}

#[test]
fn a_changed_identity_key_is_told() {
    let (mut alice, mut bob) = pair();
    alice.send(bob.address, Some(bob.take_bundle()), &hello(), false);
    let step = deliver(&mut bob, alice.address, 1, &alice.outbox[0].ciphertext);
    bob.state.commit(step.writes);
    let mut new_alice = Device::new(alice.address, 0);
    new_alice.send(bob.address, Some(bob.take_bundle()), &hello(), false);
    let step = deliver(&mut bob, alice.address, 2, &new_alice.outbox[0].ciphertext);
    assert!(matches!(step.received, Received::Content(_)));
    assert_eq!(step.news, [IdentityNews::Changed(alice.address)]);
}

#[test]
fn bundles_with_wrong_signatures_or_keys_are_refused() {
    let (alice, mut bob) = pair();
    let (_, other) = pair();
    let good = bob.take_bundle();
    let mut forged = Vec::new();
    forged.push(Bundle { identity_key: other.bundle.identity_key.clone(), ..good.clone() });
    forged.push(Bundle { signed_prekey: other.bundle.signed_prekey.clone(), ..good.clone() });
    forged.push(Bundle { kyber_prekey: other.bundle.kyber_prekey.clone(), ..good.clone() });
    forged.push(Bundle { identity_key: vec![5; 7], ..good.clone() });
    for bundle in forged {
        let tx = StateTx::new(&alice.state);
        let result = signal::begin_session(&tx, bob.address, &bundle, NOW, &SystemRandom);
        assert!(matches!(result, Err(signal::Error::BadBundle(_))), "{result:?}");
        assert!(tx.finish().0.is_empty(), "nothing is written");
    }
}

#[test]
fn a_new_installation_learnt_from_the_directory_ends_the_session() {
    let (mut alice, mut bob) = pair();
    alice.send(bob.address, Some(bob.take_bundle()), &hello(), false);
    assert!(alice.has_session(bob.address));
    let (_, other) = pair();
    let tx = StateTx::new(&alice.state);
    signal::learn_identity(&tx, bob.address, &bob.bundle.identity_key).expect("known");
    signal::learn_identity(&tx, bob.address, &other.bundle.identity_key).expect("valid");
    let (writes, news) = tx.finish();
    assert_eq!(news, [IdentityNews::Changed(bob.address)]);
    alice.state.commit(writes);
    assert!(!alice.has_session(bob.address));
}

#[test]
fn the_largest_text_fits_an_envelope() {
    let (mut alice, mut bob) = pair();
    let body = "𝄞".repeat(crate::limits::TEXT_CHARS);
    let content = content::new(content::text(&body), NOW, None, &SystemRandom);
    alice.send(bob.address, Some(bob.take_bundle()), &content, false);
    let step = deliver(&mut bob, alice.address, 1, &alice.outbox[0].ciphertext);
    assert!(matches!(step.received, Received::Content(got) if *got == content));
}

#[test]
fn registration_ids_are_in_range_and_random() {
    let ids: BTreeSet<u32> = (0..20)
        .map(|_| {
            let state = MemoryState::default();
            keys::generate_device(&StateTx::new(&state), &SystemRandom).registration_id.get()
        })
        .collect();
    assert!(ids.len() > 15 && ids.iter().all(|id| (1..=RegistrationId::MAX).contains(id)));
    let mut bytes = [0; 16];
    SystemRandom.fill(&mut bytes);
    assert_ne!(bytes, [0; 16]);
}

#[test]
fn rotation_and_refill_follow_their_rules() {
    assert!(!keys::rotation_due(NOW, NOW.plus(keys::ROTATION_MS - 1)) && keys::rotation_due(NOW, NOW.plus(keys::ROTATION_MS)));
    assert!(keys::rotation_due(NOW.plus(keys::ROTATION_MS), NOW), "a clock that jumped back");
    assert_eq!((keys::refill(100), keys::refill(20), keys::refill(19), keys::refill(0)), (0, 0, 100, 100));
}
