//! Model test of the projection: random logs, flushed, cut by crashes and replayed at random points, must leave the same view as
//! a plain fold over the log. This is G-REBUILD and the crash invariant of `worker`, without any I/O.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;

use crate::clock::UnixMillis;
use crate::ids::{AccountId, AttachId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, Generation, Offset, Seq};
use crate::limits;
use crate::projector::apply::{FROM_SERVER, Needs, Projection, Step};
use crate::projector::push::Push;
use crate::store::{DeliveryWrite, InboxState, Mark, MarkKey, PendingItem};
use crate::wire::event::{self, EnvelopesAccepted, InboxEvent, ReceiptKind, SealedEnvelope};

/// A store that several projectors reach, as simple as can be: each row stands at a log position, the highest wins.
#[derive(Debug, Default, Clone)]
struct Store {
    next: usize,
    pending: BTreeMap<(DeviceAddr, Seq), PendingItem>,
    inboxes: BTreeMap<DeviceAddr, InboxState>,
    marks: BTreeMap<MarkKey, Mark>,
    /// Up to where items of a device are dead; inboxes and marks, likewise.
    dead: BTreeMap<DeviceAddr, Seq>,
    removed: BTreeMap<DeviceAddr, Seq>,
    accounts: BTreeMap<AccountId, Seq>,
}

impl Store {
    /// `steps`: how many rows get through before a crash, in the order that the contract says.
    fn write(&mut self, write: DeliveryWrite, next: Option<usize>, mut steps: usize) {
        let mut goes_on = || {
            let go = steps > 0;
            steps = steps.saturating_sub(1);
            go
        };
        for (account, at) in write.remove_accounts.into_iter().take_while(|_| goes_on()) {
            let gone = self.accounts.entry(account).or_default();
            *gone = at.max(*gone);
        }
        for (device, at) in write.remove_devices.into_iter().take_while(|_| goes_on()) {
            let gone = self.removed.entry(device).or_default();
            *gone = at.max(*gone);
        }
        for (device, item) in write.put.into_iter().take_while(|_| goes_on()) {
            self.pending.insert((device, item.seq), item);
        }
        for (device, state) in write.inboxes.into_iter().take_while(|_| goes_on()) {
            let stored = self.inboxes.entry(device).or_insert(state);
            *stored = if state.applied >= stored.applied { state } else { *stored };
        }
        for (device, to) in write.drop_to.into_iter().take_while(|_| goes_on()) {
            let dead = self.dead.entry(device).or_default();
            *dead = to.max(*dead);
        }
        for (key, mark) in write.marks.into_iter().take_while(|_| goes_on()) {
            let stored = self.marks.entry(key).or_insert(mark);
            *stored = if mark.applied >= stored.applied { mark } else { *stored };
        }
        if goes_on() {
            self.next = self.next.max(next.unwrap_or(0));
        }
        self.bury();
    }

    fn bury(&mut self) {
        let dead = |device: &DeviceAddr| self.dead.get(device).copied().unwrap_or_default();
        let account = |id: &AccountId| self.accounts.get(id).copied().unwrap_or_default();
        let gone = |device: &DeviceAddr| self.removed.get(device).copied().unwrap_or_default().max(account(&device.account));
        self.pending.retain(|(device, seq), _| *seq > dead(device).max(gone(device)));
        self.inboxes.retain(|device, state| state.applied > gone(device));
        self.marks.retain(|key, mark| mark.applied > account(&key.recipient));
    }
}

#[derive(Debug, Clone)]
enum Op {
    Send {
        sender: u8,
        devices: Vec<u8>,
        id: u64,
        ephemeral: bool,
    },
    Ack {
        device: u8,
        back: u64,
    },
    Attach {
        device: u8,
        attach: u64,
    },
    Detach {
        device: u8,
        attach: u64,
    },
    Expire {
        device: u8,
        back: u64,
    },
    RemoveDevice {
        device: u8,
    },
    RemoveAccount,
    Flush,
    /// The end of a window of which the marks trail: so many of them are written.
    Window(usize),
    Soon,
    Crash,
    /// A flush of which so many rows get through, then a crash.
    Cut(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let device = 1u8..4;
    prop_oneof![
        8 => (1u8..3, proptest::collection::btree_set(1u8..4, 1..4), ids(), proptest::bool::weighted(0.1))
            .prop_map(|(sender, devices, id, ephemeral)| Op::Send { sender, devices: devices.into_iter().collect(), id, ephemeral }),
        4 => (device.clone(), 0u64..6).prop_map(|(device, back)| Op::Ack { device, back }),
        2 => (device.clone(), 0u64..3).prop_map(|(device, attach)| Op::Attach { device, attach }),
        1 => (device.clone(), 0u64..3).prop_map(|(device, attach)| Op::Detach { device, attach }),
        1 => (device.clone(), 0u64..6).prop_map(|(device, back)| Op::Expire { device, back }),
        1 => device.prop_map(|device| Op::RemoveDevice { device }),
        1 => Just(Op::RemoveAccount),
        3 => Just(Op::Flush),
        3 => (1usize..4).prop_map(Op::Window),
        2 => Just(Op::Soon),
        2 => Just(Op::Crash),
        2 => (0usize..12).prop_map(Op::Cut),
    ]
}

/// Sometimes the server itself sends.
fn ids() -> impl Strategy<Value = u64> {
    prop_oneof![9 => 1u64..200, 1 => Just(FROM_SERVER.0)]
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
        Op::Flush | Op::Window(_) | Op::Soon | Op::Crash | Op::Cut(_) => return None,
    };
    Some(event::encode(&event))
}

struct Run {
    store: Store,
    projection: Projection,
    /// The next record of the log to apply.
    next: usize,
    /// The position that is covered once the marks which are being written are.
    trail: Option<usize>,
    /// Everything a device was pushed or could read at a switch, to check that live and backlog meet without a hole.
    told: BTreeSet<(DeviceAddr, ReceiptKind, u64)>,
    /// Two projectors wrote: what they counted may be less than what is stored behind the cursor.
    shared: bool,
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
            let has = self.projection.has_marks_of(&account());
            if has.is_none() && !needs.marks.is_empty() {
                // One with few correspondents, or one with many.
                let all: Vec<_> = self.store.marks.iter().map(|(key, mark)| (*key, *mark)).collect();
                self.projection.load_marks_of(account(), (all.len() <= 2).then_some(all));
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
                    self.store.write(write, None, usize::MAX);
                    // What a stream that attaches here reads, is exactly what is pending.
                    let cursor = self.projection.inbox(&device).expect("in memory").state.cursor;
                    let readable = self.store.pending.range((device, Seq(cursor.0 + 1))..=(device, at)).count();
                    assert!(
                        self.shared
                            || self.projection.replaying
                            || readable as u64 >= self.projection.inbox(&device).expect("in memory").state.items
                    );
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

    fn new() -> Self {
        Self { store: Store::default(), projection: Projection::default(), next: 0, trail: None, told: BTreeSet::new(), shared: false }
    }

    /// Another projector goes on from what is stored.
    fn restart(&mut self, log: &[Bytes]) {
        self.projection = Projection::default();
        self.projection.replaying = true;
        self.trail = None;
        self.next = self.store.next;
        self.apply(log);
        self.flush();
        self.projection.replaying = false;
    }

    fn flush(&mut self) {
        self.flush_cut(usize::MAX);
    }

    fn flush_cut(&mut self, steps: usize) {
        let mut write = DeliveryWrite::default();
        self.projection.flush(&mut write);
        self.projection.begin_marks();
        assert!(self.projection.take_marks(&mut write, usize::MAX));
        self.trail = None;
        self.store.write(write, Some(self.next), steps);
        assert_eq!(self.projection.fresh_bytes(), 0);
        assert!(!self.projection.is_dirty());
    }
}

impl Run {
    /// A window that writes only some of the marks; the position follows with the last of them.
    fn window(&mut self, marks: usize) {
        let mut write = DeliveryWrite::default();
        self.projection.flush(&mut write);
        let position = *self.trail.get_or_insert_with(|| {
            self.projection.begin_marks();
            self.next
        });
        let covered = self.projection.take_marks(&mut write, marks);
        self.trail.take_if(|_| covered);
        self.store.write(write, covered.then_some(position), usize::MAX);
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
                let id = accepted.client_message_id;
                let new = id == FROM_SERVER || {
                    let mark = out.marks.entry(MarkKey { recipient: accepted.recipient, sender: accepted.sender }).or_default();
                    let new = mark.see(id.0) == crate::projector::apply::Seen::New;
                    if new {
                        mark.applied = at;
                    }
                    new
                };
                if new && accepted.flags & event::flags::EPHEMERAL == 0 {
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
            InboxEvent::Receipts { .. } | InboxEvent::Fence { .. } => {}
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn crashes_and_flushes_leave_the_view_of_the_plain_fold(ops in proptest::collection::vec(op(), 1..80)) {
        let (mut log, mut run) = (Vec::new(), Run::new());
        run_ops(&mut run, &mut log, &ops);
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

    /// A projector that was stopped for a while and did not notice that its partition moved, flushes when it wakes. Nothing that was
    /// acknowledged can be read again, nothing is missing, and no position moves back.
    #[test]
    fn a_projector_that_lost_its_partition_changes_nothing_that_is_read(
        before in proptest::collection::vec(op(), 1..40),
        meanwhile in proptest::collection::vec(op(), 0..20),
        after in proptest::collection::vec(op(), 0..20),
        unseen in 0usize..4,
    ) {
        let (mut log, mut run) = (Vec::new(), Run { shared: true, ..Run::new() });
        run_ops(&mut run, &mut log, &before);
        let mut zombie = std::mem::take(&mut run.projection);
        let mut stopped_at = run.next;
        run.restart(&log);
        run_ops(&mut run, &mut log, &meanwhile);
        // It wakes, applies what its consumer had at hand, and flushes.
        let mut woken = Run { shared: true, store: std::mem::take(&mut run.store), projection: std::mem::take(&mut zombie), next: stopped_at, ..Run::new() };
        let position = woken.store.next;
        let seen = (stopped_at + unseen).min(log.len());
        woken.apply(&log[..seen]);
        stopped_at = woken.next;
        let mut write = DeliveryWrite::default();
        woken.projection.flush(&mut write);
        woken.projection.begin_marks();
        woken.projection.take_marks(&mut write, usize::MAX);
        woken.store.write(write, Some(stopped_at), usize::MAX);
        prop_assert!(woken.store.next >= position);
        run.store = woken.store;
        run_ops(&mut run, &mut log, &after);
        run.flush();
        run.restart(&log);
        let expected = fold(&log);
        let readable: BTreeSet<_> = run.store.pending.keys().copied().filter(|(device, seq)| {
            let state = run.store.inboxes.get(device).copied().unwrap_or_default();
            *seq > state.cursor.max(state.expired_to)
        }).collect();
        prop_assert_eq!(readable, expected.pending);
        prop_assert_eq!(&run.store.marks, &expected.marks);
    }
}

fn run_ops(run: &mut Run, log: &mut Vec<Bytes>, ops: &[Op]) {
    for op in ops {
        if let Some(bytes) = record(op, log.len() as u64) {
            log.push(bytes);
            run.apply(log);
        }
        match op {
            Op::Flush => run.flush(),
            Op::Window(marks) => run.window(*marks),
            Op::Soon => {
                let mut write = DeliveryWrite::default();
                run.projection.take_waiting(&mut write);
                run.store.write(write, None, usize::MAX);
            }
            Op::Crash => run.restart(log),
            Op::Cut(steps) => {
                run.flush_cut(*steps);
                run.restart(log);
            }
            _ => {}
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
    let mut run = Run::new();
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
