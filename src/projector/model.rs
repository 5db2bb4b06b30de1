//! Model test of the projection: random logs, flushed, cut by crashes and replayed at random points, must leave the same view as
//! a plain fold over the log. This is G-REBUILD and the crash invariant of `worker`, without any I/O.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, AttachId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, Generation, Offset, Seq};
use crate::limits;
use crate::projector::apply::{Needs, Projection, Step};
use crate::projector::push::Push;
use crate::store::{DeliveryWrite, InboxState, Mark, MarkKey, PendingItem};
use crate::wire::event::{self, EnvelopesAccepted, InboxEvent, ReceiptKind, SealedEnvelope};

/// A store as simple as can be.
#[derive(Debug, Default, Clone)]
struct Store {
    next: usize,
    pending: BTreeMap<(DeviceAddr, Seq), PendingItem>,
    inboxes: BTreeMap<DeviceAddr, InboxState>,
    marks: BTreeMap<MarkKey, Mark>,
}

impl Store {
    fn write(&mut self, write: DeliveryWrite, next: Option<usize>) {
        for account in write.remove_accounts {
            self.pending.retain(|(device, _), _| device.account != account);
            self.inboxes.retain(|device, _| device.account != account);
            self.marks.retain(|key, _| key.recipient != account);
        }
        for (device, _) in write.inboxes.iter().filter(|(_, state)| state.is_none()) {
            self.inboxes.remove(device);
            self.pending.retain(|(of, _), _| of != device);
        }
        for (device, to) in write.drop_to {
            self.pending.retain(|(of, seq), _| *of != device || *seq > to);
        }
        for (device, item) in write.put {
            self.pending.insert((device, item.seq), item);
        }
        for (device, state) in write.inboxes {
            if let Some(state) = state {
                self.inboxes.insert(device, state);
            }
        }
        self.marks.extend(write.marks);
        self.next = next.unwrap_or(self.next);
    }
}

#[derive(Debug, Clone)]
enum Op {
    Send { sender: u8, devices: Vec<u8>, id: u64, ephemeral: bool },
    Ack { device: u8, back: u64 },
    Attach { device: u8, attach: u64 },
    Detach { device: u8, attach: u64 },
    Expire { device: u8, back: u64 },
    RemoveDevice { device: u8 },
    RemoveAccount,
    Flush,
    Soon,
    Crash,
}

fn op() -> impl Strategy<Value = Op> {
    let device = 1u8..4;
    prop_oneof![
        8 => (1u8..3, proptest::collection::btree_set(1u8..4, 1..4), 1u64..200, proptest::bool::weighted(0.1))
            .prop_map(|(sender, devices, id, ephemeral)| Op::Send { sender, devices: devices.into_iter().collect(), id, ephemeral }),
        4 => (device.clone(), 0u64..6).prop_map(|(device, back)| Op::Ack { device, back }),
        2 => (device.clone(), 0u64..3).prop_map(|(device, attach)| Op::Attach { device, attach }),
        1 => (device.clone(), 0u64..3).prop_map(|(device, attach)| Op::Detach { device, attach }),
        1 => (device.clone(), 0u64..6).prop_map(|(device, back)| Op::Expire { device, back }),
        1 => device.prop_map(|device| Op::RemoveDevice { device }),
        1 => Just(Op::RemoveAccount),
        3 => Just(Op::Flush),
        2 => Just(Op::Soon),
        2 => Just(Op::Crash),
    ]
}

fn account() -> AccountId {
    AccountId::from_bytes([9; 16])
}

fn device(number: u8) -> DeviceAddr {
    DeviceAddr { account: account(), device: DeviceId::new(number.into()).expect("valid") }
}

fn sender(number: u8) -> DeviceAddr {
    DeviceAddr { account: AccountId::from_bytes([number; 16]), device: DeviceId::new(1).expect("valid") }
}

const EDGE: EdgeId = EdgeId::from_bytes([5; 16]);

fn record(op: &Op, at: u64) -> Option<Bytes> {
    let seq = |back: u64| Seq::at(Generation(0), Offset(at.saturating_sub(back)));
    let event = match op {
        Op::Send { sender: from, devices, id, ephemeral } => InboxEvent::EnvelopesAccepted(EnvelopesAccepted {
            recipient: account(),
            sender: sender(*from),
            client_message_id: ClientMessageId(*id),
            accepted: UnixMillis(1),
            flags: if *ephemeral { event::flags::EPHEMERAL } else { 0 },
            envelopes: devices.iter().map(|&number| SealedEnvelope { device: device(number).device, kind: 2, sealed: b"sealed" }).collect(),
        }),
        Op::Ack { device: number, back } => InboxEvent::Acked { device: device(*number), cursor: seq(*back) },
        Op::Attach { device: number, attach } => {
            InboxEvent::DeviceAttached { device: device(*number), edge: EDGE, attach: AttachId(*attach) }
        }
        Op::Detach { device: number, attach } => {
            InboxEvent::DeviceDetached { device: device(*number), edge: EDGE, attach: AttachId(*attach) }
        }
        Op::Expire { device: number, back } => InboxEvent::Expired { device: device(*number), to: seq(*back) },
        Op::RemoveDevice { device: number } => InboxEvent::DeviceRemoved { device: device(*number) },
        Op::RemoveAccount => InboxEvent::AccountRemoved { account: account() },
        Op::Flush | Op::Soon | Op::Crash => return None,
    };
    Some(event::encode(&event))
}

struct Run {
    store: Store,
    projection: Projection,
    /// The next record of the log to apply.
    next: usize,
    /// Everything a device was pushed or could read at a switch, to check that live and backlog meet without a hole.
    told: BTreeSet<(DeviceAddr, ReceiptKind, u64)>,
}

impl Run {
    fn apply(&mut self, log: &[Bytes]) {
        while self.next < log.len() {
            let payload = &log[self.next];
            let event: InboxEvent<'_> = event::decode(payload).expect("our own");
            let mut needs = Needs::default();
            self.projection.needs(&event, &mut needs);
            for device in needs.inboxes {
                self.projection.load_inbox(device, self.store.inboxes.get(&device).copied());
            }
            for key in needs.marks {
                self.projection.load_mark(key, self.store.marks.get(&key).copied());
            }
            let at = Seq::at(Generation(0), Offset(self.next as u64));
            match self.projection.apply(at, event, payload) {
                None => {}
                Some(Step::SettleStored { device, after, to, kind }) => {
                    let items: Vec<PendingItem> =
                        self.store.pending.range((device, Seq(after.0 + 1))..=(device, to)).map(|(_, item)| item.clone()).collect();
                    self.projection.settle_stored(device, to, kind, &items);
                }
                Some(Step::Attach { device, at, .. }) => {
                    let mut write = DeliveryWrite::default();
                    self.projection.take_fresh(device, &mut write);
                    self.store.write(write, None);
                    // What a stream that attaches here reads, is exactly what is pending.
                    let cursor = self.projection.inbox(&device).expect("in memory").state.cursor;
                    let readable = self.store.pending.range((device, Seq(cursor.0 + 1))..=(device, at)).count();
                    assert!(readable as u64 >= self.projection.inbox(&device).expect("in memory").state.items);
                }
            }
            for (_, entries) in self.projection.take_receipts() {
                for entry in entries {
                    self.told.extend(entry.ids.iter().flat_map(|&(first, last)| first..=last).map(|id| (entry.recipient, entry.kind, id)));
                }
            }
            self.next += 1;
        }
    }

    fn flush(&mut self) {
        let mut write = DeliveryWrite::default();
        self.projection.flush(&mut write);
        self.store.write(write, Some(self.next));
        assert_eq!(self.projection.fresh_bytes(), 0);
        assert!(!self.projection.is_dirty());
    }
}

/// The plain fold: what must be pending, acknowledged and seen in the end.
#[derive(Debug, Default, PartialEq)]
struct Expected {
    pending: BTreeSet<(DeviceAddr, Seq)>,
    cursors: BTreeMap<DeviceAddr, (Seq, Seq)>,
    marks: BTreeMap<MarkKey, Mark>,
    attached: BTreeMap<DeviceAddr, AttachId>,
}

fn fold(log: &[Bytes]) -> Expected {
    let mut out = Expected::default();
    for (offset, payload) in log.iter().enumerate() {
        let at = Seq::at(Generation(0), Offset(offset as u64));
        match event::decode(payload).expect("our own") {
            InboxEvent::EnvelopesAccepted(accepted) => {
                let mark = out.marks.entry(MarkKey { recipient: accepted.recipient, sender: accepted.sender }).or_default();
                let id = accepted.client_message_id.0;
                if mark.see(id) == crate::projector::apply::Seen::New && accepted.flags & event::flags::EPHEMERAL == 0 {
                    out.pending.extend(accepted.envelopes.iter().map(|e| (DeviceAddr { account: account(), device: e.device }, at)));
                }
            }
            InboxEvent::Acked { device, cursor } => {
                let cursors = out.cursors.entry(device).or_default();
                cursors.0 = cursors.0.max(cursor.min(at));
                out.pending.retain(|(of, seq)| *of != device || *seq > cursor);
            }
            InboxEvent::Expired { device, to } => {
                let cursors = out.cursors.entry(device).or_default();
                if to.min(at) > cursors.0 {
                    cursors.1 = cursors.1.max(to.min(at));
                }
                out.pending.retain(|(of, seq)| *of != device || *seq > to);
            }
            InboxEvent::DeviceAttached { device, attach, .. } => {
                out.attached.insert(device, attach);
            }
            InboxEvent::DeviceDetached { device, attach, .. } => {
                if out.attached.get(&device) == Some(&attach) {
                    out.attached.remove(&device);
                }
            }
            InboxEvent::DeviceRemoved { device } => {
                out.pending.retain(|(of, _)| *of != device);
                out.cursors.remove(&device);
                out.attached.remove(&device);
            }
            InboxEvent::AccountRemoved { .. } => out = Expected::default(),
            InboxEvent::Receipts { .. } => {}
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn crashes_and_flushes_leave_the_view_of_the_plain_fold(ops in proptest::collection::vec(op(), 1..80)) {
        let mut log = Vec::new();
        let mut run = Run { store: Store::default(), projection: Projection::default(), next: 0, told: BTreeSet::new() };
        for op in &ops {
            if let Some(bytes) = record(op, log.len() as u64) {
                log.push(bytes);
                run.apply(&log);
            }
            match op {
                Op::Flush => run.flush(),
                Op::Soon => {
                    let mut write = DeliveryWrite::default();
                    run.projection.take_waiting(&mut write);
                    run.store.write(write, None);
                }
                Op::Crash => {
                    run.projection = Projection::default();
                    run.next = run.store.next;
                    run.projection.replaying = true;
                    run.apply(&log);
                    run.flush();
                    run.projection.replaying = false;
                }
                _ => {}
            }
        }
        run.flush();
        let expected = fold(&log);
        let pending: BTreeSet<_> = run.store.pending.keys().copied().collect();
        prop_assert_eq!(pending, expected.pending);
        let cursors: BTreeMap<_, _> = run.store.inboxes.iter().map(|(device, state)| (*device, (state.cursor, state.expired_to))).filter(|(_, c)| *c != (Seq::ZERO, Seq::ZERO)).collect();
        prop_assert_eq!(cursors, expected.cursors.into_iter().filter(|(_, c)| *c != (Seq::ZERO, Seq::ZERO)).collect());
        let marks: BTreeMap<_, _> = run.store.marks.clone();
        prop_assert_eq!(marks, expected.marks);
        let attached: BTreeMap<_, _> = run.store.inboxes.iter().filter_map(|(device, state)| Some((*device, state.attached?.1))).collect();
        prop_assert_eq!(attached, expected.attached);
        for (device, state) in &run.store.inboxes {
            let items = run.store.pending.range((*device, Seq::ZERO)..=(*device, Seq::MAX)).count() as u64;
            prop_assert_eq!(state.items, items, "the count of {:?}", device);
        }
    }
}

#[test]
fn marks_tell_new_from_seen_from_too_old() {
    use crate::projector::apply::Seen;
    let mut mark = Mark::default();
    assert_eq!(mark.see(5), Seen::New);
    assert_eq!(mark.see(5), Seen::Again);
    assert_eq!(mark.see(3), Seen::New);
    assert_eq!(mark.see(limits::MESSAGE_ID_WINDOW + 3), Seen::New);
    assert_eq!(mark.see(3), Seen::Behind, "one past the window");
    assert_eq!(mark.see(4), Seen::New, "the last one inside");
    assert_eq!(mark.see(4), Seen::Again);
    assert_eq!(mark.see(10_000), Seen::New);
    assert_eq!(mark.see(10_000), Seen::Again);
}

#[test]
fn an_attached_device_is_pushed_and_acknowledged_without_the_store() {
    let mut run = Run { store: Store::default(), projection: Projection::default(), next: 0, told: BTreeSet::new() };
    let ops = [
        Op::Attach { device: 1, attach: 7 },
        Op::Send { sender: 1, devices: vec![1], id: 1, ephemeral: false },
        Op::Send { sender: 1, devices: vec![1], id: 1, ephemeral: false },
        Op::Send { sender: 1, devices: vec![1], id: 2, ephemeral: true },
        Op::Ack { device: 1, back: 0 },
    ];
    let mut log = Vec::new();
    for op in &ops {
        log.extend(record(op, log.len() as u64));
        run.apply(&log);
    }
    let items = run.projection.pushes.iter().filter(|(edge, push)| *edge == EDGE && matches!(push, Push::Item { .. })).count();
    assert_eq!(items, 2, "the message once, the ephemeral one once");
    run.flush();
    assert!(run.store.pending.is_empty());
    assert_eq!(run.told, BTreeSet::from([(device(1), ReceiptKind::Delivered, 1)]));
}
