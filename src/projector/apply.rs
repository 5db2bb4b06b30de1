//! The projection itself: (state, event) → effects. No async, no clock, no randomness, so that the same log
//! always gives the same view.
//!
//! The state of an inbox is split. What was flushed is in the store and counted by `InboxState::items`; what is
//! younger is `fresh`, in memory only, its log position not yet committed. An acknowledgement in time
//! takes an item out of `fresh` and the store never hears of it. One shortly after the flush finds it in `recent`, so that applying does not
//! wait for the write that is under way: 200 such reads a second had cost a tenth of all messages the length of a flush.

use std::collections::{HashMap, HashSet, VecDeque};

use bytes::Bytes;

use crate::ids::{AccountId, AttachId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, Seq};
use crate::limits;
use crate::metadata::step::{Settled, Step as LifeStep};
use crate::projector::push::Push;
use crate::store::{DeliveryWrite, InboxState, Mark, MarkKey, PendingBody, PendingEnvelope, PendingItem, seal};
use crate::wire::event::{self, EnvelopesAccepted, InboxEvent, ReceiptEntry, ReceiptKind, flags};
use crate::wire::metadata::MetadataKind;

/// The client message id of envelopes that the server itself sends: no device's counter begins below 1.
pub const FROM_SERVER: ClientMessageId = ClientMessageId(0);

/// What the projector knows of an inbox.
#[derive(Debug, Default)]
pub struct Inbox {
    /// As the store will have it after the next flush.
    pub state: InboxState,
    /// Items that are on the log only, in seq order.
    fresh: VecDeque<PendingItem>,
    /// The youngest of the stored items, if the last flush wrote them while the device was attached: it is about to acknowledge them.
    recent: VecDeque<PendingItem>,
    /// It stands in `with_fresh`.
    listed: bool,
    /// `state` differs from the store.
    dirty: bool,
    /// Stored items up to here are acknowledged or expired, and dropped by the next flush.
    drop_to: Seq,
    /// Senders were told that it is full.
    full: bool,
}

/// What has to be in memory before an event can be applied.
#[derive(Debug, Default)]
pub struct Needs {
    /// Inboxes to load.
    pub inboxes: HashSet<DeviceAddr>,
    /// Marks to load.
    pub marks: HashSet<MarkKey>,
}

impl Needs {
    /// Nothing is missing.
    pub fn is_empty(&self) -> bool {
        self.inboxes.is_empty() && self.marks.is_empty()
    }
}

/// Something the worker has to do in order, before the next event.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Read the stored items in `after < seq <= to`, report them by [`Projection::settle_stored`].
    SettleStored {
        /// Whose.
        device: DeviceAddr,
        /// Behind this one.
        after: Seq,
        /// Up to and including.
        to: Seq,
        /// What their senders are told.
        kind: ReceiptKind,
    },
    /// Write the device's fresh items ([`Projection::take_fresh`]), then push `Attached`.
    Attach {
        /// Which device.
        device: DeviceAddr,
        /// Where its stream is.
        edge: EdgeId,
        /// Which attachment.
        attach: AttachId,
        /// The switch from backlog to live.
        at: Seq,
    },
}

/// One receipt before it is put together with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Told {
    sender: DeviceAddr,
    recipient: DeviceAddr,
    kind: ReceiptKind,
    id: u64,
}

/// The state of all partitions that one worker owns.
#[derive(Debug, Default)]
pub struct Projection {
    inboxes: HashMap<DeviceAddr, Inbox>,
    marks: HashMap<MarkKey, (Mark, bool)>,
    /// Recipients all of whose marks are in memory (what is missing does not exist), and those who have too many for that.
    whole: HashMap<AccountId, bool>,
    dirty_inboxes: Vec<DeviceAddr>,
    dirty_marks: Vec<MarkKey>,
    /// Marks that are on their way to the store, from the last to the first.
    trailing: Vec<MarkKey>,
    /// Devices that had fresh items since the last flush.
    with_fresh: Vec<DeviceAddr>,
    /// Devices with recent items.
    with_recent: Vec<DeviceAddr>,
    removed: Vec<(AccountId, Seq)>,
    gone: Vec<(DeviceAddr, Seq)>,
    /// Devices without a stream that have fresh items: they are written soon, for polls to see.
    waiting: Vec<DeviceAddr>,
    told: Vec<Told>,
    fresh_bytes: usize,
    /// What is applied now may have been applied before a crash, which wrote some items early: their rows are in the store though
    /// nothing counts them, and go when they are acknowledged. Flush before it turns false.
    pub replaying: bool,
    /// Pushes in order, for the worker to send after each batch.
    pub pushes: Vec<(EdgeId, Push)>,
    /// Pushes for every edge.
    pub broadcasts: Vec<Push>,
    /// What became of messages, for topic `metadata`: for the worker to take after each event. `None`: nobody asks.
    pub steps: Option<Vec<LifeStep>>,
}

impl Projection {
    /// Adds to `needs` what the event needs and is not in memory.
    pub fn needs(&self, event: &InboxEvent<'_>, needs: &mut Needs) {
        let mut inbox = |device: DeviceAddr| {
            if !self.inboxes.contains_key(&device) {
                needs.inboxes.insert(device);
            }
        };
        match event {
            InboxEvent::EnvelopesAccepted(accepted) => {
                for envelope in &accepted.envelopes {
                    inbox(DeviceAddr { account: accepted.recipient, device: envelope.device });
                }
                let key = MarkKey { recipient: accepted.recipient, sender: accepted.sender };
                if accepted.client_message_id != FROM_SERVER
                    && !self.marks.contains_key(&key)
                    && self.has_marks_of(&accepted.recipient) != Some(true)
                {
                    needs.marks.insert(key);
                }
            }
            InboxEvent::Acked { device, .. }
            | InboxEvent::DeviceAttached { device, .. }
            | InboxEvent::DeviceDetached { device, .. }
            | InboxEvent::Expired { device, .. }
            | InboxEvent::Receipts { device, .. }
            | InboxEvent::DeviceRemoved { device } => inbox(*device),
            InboxEvent::AccountRemoved { .. } | InboxEvent::Fence { .. } => {}
        }
    }

    /// Puts an inbox in memory as the store has it.
    pub fn load_inbox(&mut self, device: DeviceAddr, state: Option<InboxState>) {
        let state = state.filter(|state| state.applied > self.removed_at(device)).unwrap_or_default();
        self.inboxes.entry(device).or_insert(Inbox { state, ..Inbox::default() });
    }

    /// Puts a mark in memory as the store has it.
    pub fn load_mark(&mut self, key: MarkKey, mark: Option<Mark>) {
        let mark = mark.filter(|mark| mark.applied > self.account_removed_at(&key.recipient)).unwrap_or_default();
        self.marks.entry(key).or_insert((mark, false));
    }

    /// Whether all of a recipient's marks are in memory; `None` if that was not tried.
    pub fn has_marks_of(&self, recipient: &AccountId) -> Option<bool> {
        self.whole.get(recipient).copied()
    }

    /// All marks of a recipient as the store has them, or that they are too many.
    pub fn load_marks_of(&mut self, recipient: AccountId, marks: Option<Vec<(MarkKey, Mark)>>) {
        self.whole.insert(recipient, marks.is_some());
        for (key, mark) in marks.into_iter().flatten() {
            self.load_mark(key, Some(mark));
        }
    }

    /// What the store has of something that was removed may be from before the removal, or, in a replay, from behind it.
    fn removed_at(&self, device: DeviceAddr) -> Seq {
        let gone = self.gone.iter().filter(|(gone, _)| *gone == device).map(|(_, at)| *at).max();
        gone.unwrap_or_default().max(self.account_removed_at(&device.account))
    }

    fn account_removed_at(&self, account: &AccountId) -> Seq {
        self.removed.iter().filter(|(gone, _)| gone == account).map(|(_, at)| *at).max().unwrap_or_default()
    }

    /// Applies the event of the record at `at`. `payload` is the record's buffer, which the event borrows from.
    pub fn apply(&mut self, at: Seq, event: InboxEvent<'_>, payload: &Bytes) -> Option<Step> {
        match event {
            InboxEvent::EnvelopesAccepted(accepted) => {
                self.accept(at, &accepted, payload);
                None
            }
            InboxEvent::Receipts { device, entries } => {
                self.put(device, PendingItem { seq: at, body: PendingBody::Receipts(entries) }, false);
                None
            }
            InboxEvent::Acked { device, cursor } => self.settle(device, at, cursor.min(at), ReceiptKind::Delivered),
            InboxEvent::Expired { device, to } => self.settle(device, at, to.min(at), ReceiptKind::Expired),
            InboxEvent::DeviceAttached { device, edge, attach } => {
                let inbox = self.touch(device, at)?;
                let before = inbox.state.attached.replace((edge, attach));
                if let Some((old_edge, old)) = before.filter(|old| *old != (edge, attach)) {
                    self.pushes.push((old_edge, Push::Replaced { device, attach: old }));
                }
                Some(Step::Attach { device, edge, attach, at })
            }
            InboxEvent::DeviceDetached { device, edge, attach } => {
                let inbox = self.touch(device, at)?;
                if inbox.state.attached == Some((edge, attach)) {
                    inbox.state.attached = None;
                    if !inbox.fresh.is_empty() {
                        self.waiting.push(device);
                    }
                }
                None
            }
            InboxEvent::DeviceRemoved { device } => {
                self.remove_inbox(device, at);
                self.gone.push((device, at));
                None
            }
            InboxEvent::AccountRemoved { account } => {
                for number in 1..=u32::from(DeviceId::MAX) {
                    let device = DeviceId::new(number).expect("the loop stays in the range of device ids");
                    self.remove_inbox(DeviceAddr { account, device }, at);
                }
                self.marks.retain(|key, (mark, _)| key.recipient != account || mark.applied > at);
                self.dirty_marks.retain(|key| self.marks.contains_key(key));
                self.trailing.retain(|key| self.marks.contains_key(key));
                self.removed.push((account, at));
                None
            }
            // The worker's matter.
            InboxEvent::Fence { .. } => None,
        }
    }

    /// The inbox, to be changed by the event at this position; `None` if that is a replay which it holds already.
    fn touch(&mut self, device: DeviceAddr, at: Seq) -> Option<&mut Inbox> {
        let inbox = self.inboxes.entry(device).or_default();
        if inbox.state.applied >= at {
            return None;
        }
        inbox.state.applied = at;
        if !inbox.dirty {
            inbox.dirty = true;
            self.dirty_inboxes.push(device);
        }
        Some(inbox)
    }

    /// In a replay a younger inbox of the same device may stand there already; it stays.
    fn remove_inbox(&mut self, device: DeviceAddr, at: Seq) {
        if self.inboxes.get(&device).is_some_and(|inbox| inbox.state.applied > at) {
            return;
        }
        let Some(inbox) = self.inboxes.remove(&device) else { return };
        self.fresh_bytes -= inbox.fresh.iter().map(PendingItem::cost).sum::<usize>();
        if let Some((edge, _)) = inbox.state.attached {
            self.pushes.push((edge, Push::Revoked { device }));
        }
        if inbox.full {
            self.broadcasts.push(Push::Full { device, full: false });
        }
    }

    fn accept(&mut self, at: Seq, accepted: &EnvelopesAccepted<'_>, payload: &Bytes) {
        // Its repeats are the recipient's to pass over, and nobody waits for a receipt.
        if accepted.client_message_id == FROM_SERVER {
            return self.put_all(at, accepted, payload);
        }
        let key = MarkKey { recipient: accepted.recipient, sender: accepted.sender };
        let (mark, dirty) = self.marks.entry(key).or_default();
        if mark.applied >= at {
            // A replay: marks are written behind inboxes and items, so all of this event is in the store.
            return;
        }
        let seen = mark.see(accepted.client_message_id.0);
        if seen != Seen::Again && !*dirty {
            *dirty = true;
            self.dirty_marks.push(key);
        }
        match seen {
            Seen::New => mark.applied = at,
            Seen::Again => return,
            Seen::Behind => {
                // The edge's own check makes this all but impossible; if it happens the sender is told, never left in the dark.
                note_message(&mut self.steps, MetadataKind::Rejected, at, accepted);
                for envelope in &accepted.envelopes {
                    let recipient = DeviceAddr { account: accepted.recipient, device: envelope.device };
                    self.told.push(Told {
                        sender: accepted.sender,
                        recipient,
                        kind: ReceiptKind::Rejected,
                        id: accepted.client_message_id.0,
                    });
                }
                return;
            }
        }
        note_message(&mut self.steps, MetadataKind::Accepted, at, accepted);
        self.put_all(at, accepted, payload);
    }

    fn put_all(&mut self, at: Seq, accepted: &EnvelopesAccepted<'_>, payload: &Bytes) {
        for envelope in &accepted.envelopes {
            let body = PendingBody::Envelope(PendingEnvelope {
                sender: accepted.sender,
                client_message_id: accepted.client_message_id,
                accepted: accepted.accepted,
                flags: accepted.flags,
                kind: envelope.kind,
                sealed: event::share(payload, envelope.sealed),
            });
            let device = DeviceAddr { account: accepted.recipient, device: envelope.device };
            self.put(device, PendingItem { seq: at, body }, accepted.flags & flags::EPHEMERAL != 0);
        }
    }

    fn put(&mut self, device: DeviceAddr, item: PendingItem, ephemeral: bool) {
        let inbox = self.inboxes.entry(device).or_default();
        if inbox.state.applied >= item.seq {
            return;
        }
        if let Some((edge, attach)) = inbox.state.attached {
            self.pushes.push((edge, Push::Item { device, attach, after: inbox.state.last, item: item.clone(), trace: None }));
        } else if !ephemeral && inbox.fresh.is_empty() {
            self.waiting.push(device);
        }
        if ephemeral {
            return;
        }
        inbox.state.last = item.seq;
        inbox.state.applied = item.seq;
        if !inbox.listed {
            inbox.listed = true;
            self.with_fresh.push(device);
        }
        self.fresh_bytes += item.cost();
        inbox.fresh.push_back(item);
        if !inbox.full && inbox.state.items + inbox.fresh.len() as u64 > limits::PENDING_PER_DEVICE {
            inbox.full = true;
            self.broadcasts.push(Push::Full { device, full: true });
        }
    }

    /// Everything up to `to` is done with, for one of two reasons.
    fn settle(&mut self, device: DeviceAddr, at: Seq, to: Seq, kind: ReceiptKind) -> Option<Step> {
        let inbox = self.inboxes.entry(device).or_default();
        let done = inbox.state.cursor.max(inbox.state.expired_to);
        if to <= inbox.state.cursor || (kind == ReceiptKind::Expired && to <= done) {
            if self.replaying && inbox.state.applied >= at {
                // The inbox was written before a crash; what it drops is written behind it and may be missing.
                inbox.drop_to = inbox.drop_to.max(to);
                if !std::mem::replace(&mut inbox.dirty, true) {
                    self.dirty_inboxes.push(device);
                }
            }
            return None;
        }
        let after = done.min(to);
        let inbox = self.touch(device, at)?;
        match kind {
            ReceiptKind::Expired => inbox.state.expired_to = to,
            ReceiptKind::Delivered | ReceiptKind::Rejected => inbox.state.cursor = to,
        }
        let mut told = std::mem::take(&mut self.told);
        let inbox = self.inboxes.get_mut(&device).expect("touched above");
        while inbox.fresh.front().is_some_and(|item| item.seq <= to) {
            let item = inbox.fresh.pop_front().expect("there is a front");
            self.fresh_bytes -= item.cost();
            tell(&mut told, device, kind, &item.body);
            note_settled(&mut self.steps, device, kind, &item);
        }
        self.told = told;
        if self.replaying {
            inbox.drop_to = inbox.drop_to.max(to);
        }
        if inbox.state.items > 0 && after < to {
            let older = inbox.state.items.saturating_sub(inbox.recent.len() as u64);
            let before_recent = inbox.recent.front().map_or(to, |item| to.min(Seq(item.seq.0 - 1)));
            let settled = inbox.recent.iter().take_while(|item| item.seq <= to).count();
            let recent: Vec<PendingItem> = inbox.recent.drain(..settled).collect();
            if !recent.is_empty() {
                self.settle_stored(device, to, kind, &recent);
            }
            // What lies before them has to be read.
            if older > 0 && after < before_recent {
                return Some(Step::SettleStored { device, after, to: before_recent, kind });
            }
        }
        self.not_full(device);
        None
    }

    fn not_full(&mut self, device: DeviceAddr) {
        let Some(inbox) = self.inboxes.get_mut(&device) else { return };
        if inbox.full && inbox.state.items + inbox.fresh.len() as u64 <= limits::PENDING_PER_DEVICE / 10 * 9 {
            inbox.full = false;
            self.broadcasts.push(Push::Full { device, full: false });
        }
    }

    /// The stored items that [`Step::SettleStored`] asked for.
    pub fn settle_stored(&mut self, device: DeviceAddr, to: Seq, kind: ReceiptKind, items: &[PendingItem]) {
        let Some(inbox) = self.inboxes.get_mut(&device) else { return };
        inbox.drop_to = inbox.drop_to.max(to);
        for item in items {
            inbox.state.items = inbox.state.items.saturating_sub(1);
            inbox.state.bytes = inbox.state.bytes.saturating_sub(item.cost() as u64);
            tell(&mut self.told, device, kind, &item.body);
            note_settled(&mut self.steps, device, kind, item);
        }
        self.not_full(device);
    }

    /// The inbox as it is now, if it is in memory.
    pub fn inbox(&self, device: &DeviceAddr) -> Option<&Inbox> {
        self.inboxes.get(device)
    }

    /// Removals go with the next write, even an early one: later they would take rows away that were put behind them.
    fn take_removals(&mut self, write: &mut DeliveryWrite) {
        write.remove_accounts.append(&mut self.removed);
        write.remove_devices.append(&mut self.gone);
    }

    /// Moves a device's fresh items into `write`: from now on they count as stored.
    pub fn take_fresh(&mut self, device: DeviceAddr, write: &mut DeliveryWrite) {
        self.take_removals(write);
        let Some(inbox) = self.inboxes.get_mut(&device) else { return };
        if !inbox.fresh.is_empty() && !inbox.dirty {
            inbox.dirty = true;
            self.dirty_inboxes.push(device);
        }
        let attached = inbox.state.attached.is_some();
        if attached && inbox.recent.is_empty() && !inbox.fresh.is_empty() {
            self.with_recent.push(device);
        } else if !attached {
            inbox.recent.clear();
        }
        for item in inbox.fresh.drain(..) {
            let cost = item.cost();
            self.fresh_bytes -= cost;
            inbox.state.items += 1;
            inbox.state.bytes += cost as u64;
            if attached {
                inbox.recent.push_back(item.clone());
            }
            write.put.push((device, item));
        }
    }

    /// Moves the fresh items of devices without a stream into `write`, so that polls see them. Writing items early is always
    /// safe: their position is not committed, so a crash applies them again, to the same rows.
    pub fn take_waiting(&mut self, write: &mut DeliveryWrite) -> Vec<DeviceAddr> {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.retain(|device| self.inboxes.get(device).is_some_and(|inbox| inbox.state.attached.is_none() && !inbox.fresh.is_empty()));
        for device in &waiting {
            self.take_fresh(*device, write);
        }
        waiting
    }

    /// Whether [`Self::take_waiting`] has something to do.
    pub fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Bytes of items that are in memory only.
    pub const fn fresh_bytes(&self) -> usize {
        self.fresh_bytes
    }

    /// Every inbox and item that differs from the store. With the marks ([`Self::take_marks`]) that is everything.
    pub fn flush(&mut self, write: &mut DeliveryWrite) {
        self.take_removals(write);
        for device in std::mem::take(&mut self.with_recent) {
            if let Some(inbox) = self.inboxes.get_mut(&device) {
                inbox.recent = VecDeque::new();
            }
        }
        for device in std::mem::take(&mut self.with_fresh) {
            if let Some(inbox) = self.inboxes.get_mut(&device) {
                inbox.listed = false;
            }
            self.take_fresh(device, write);
        }
        self.waiting.clear();
        for device in self.dirty_inboxes.drain(..) {
            let Some(inbox) = self.inboxes.get_mut(&device).filter(|inbox| inbox.dirty) else { continue };
            inbox.dirty = false;
            if inbox.drop_to > Seq::ZERO {
                write.drop_to.push((device, std::mem::take(&mut inbox.drop_to)));
            }
            write.inboxes.push((device, inbox.state));
        }
    }

    /// The marks that differ from the store now are to be written, in slices that hold a recipient's together. How many they are.
    pub fn begin_marks(&mut self) -> usize {
        self.trailing.append(&mut self.dirty_marks);
        self.trailing.sort_unstable_by(|a, b| b.cmp(a));
        self.trailing.len()
    }

    /// Moves a slice of them into `write`, which must hold what [`Self::flush`] gave: a mark says that all it knows of is in the
    /// store. Once none is left (that it says), a position of when they began may be written.
    pub fn take_marks(&mut self, write: &mut DeliveryWrite, at_most: usize) -> bool {
        let left = self.trailing.len().saturating_sub(at_most);
        for key in self.trailing.drain(left..).rev() {
            if let Some((mark, dirty)) = self.marks.get_mut(&key).filter(|(_, dirty)| *dirty) {
                *dirty = false;
                write.marks.push((key, *mark));
            }
        }
        left == 0
    }

    /// Marks in memory.
    pub fn marks(&self) -> usize {
        self.marks.len()
    }

    /// Keeps memory below its cap after a flush: everything in memory is then in the store too, so any of it may go. Whether any went.
    pub fn trim(&mut self) -> bool {
        let before = (self.inboxes.len(), self.marks.len());
        if self.inboxes.len() > limits::HOT_ENTRIES {
            self.inboxes.retain(|_, inbox| inbox.dirty || inbox.full || !inbox.fresh.is_empty());
            self.inboxes.shrink_to(limits::HOT_ENTRIES / 4);
        }
        if self.marks.len() > limits::HOT_ENTRIES {
            self.marks.retain(|_, (_, dirty)| *dirty);
            self.marks.shrink_to(limits::HOT_ENTRIES / 4);
            self.whole = HashMap::new();
        } else if self.whole.len() > limits::HOT_ENTRIES {
            // Of most of them nothing is in memory but this.
            self.whole = HashMap::new();
        }
        before != (self.inboxes.len(), self.marks.len())
    }

    /// Forgets accounts that belong to somebody else now; call after a flush.
    pub fn forget(&mut self, gone: impl Fn(&AccountId) -> bool) {
        self.inboxes.retain(|device, _| !gone(&device.account));
        self.marks.retain(|key, _| !gone(&key.recipient));
        self.whole.retain(|recipient, _| !gone(recipient));
    }

    /// Receipts due for senders, put together: one entry list for each sending device.
    pub fn take_receipts(&mut self) -> Vec<(DeviceAddr, Vec<ReceiptEntry>)> {
        let mut told = std::mem::take(&mut self.told);
        told.sort_unstable();
        told.dedup();
        let mut out: Vec<(DeviceAddr, Vec<ReceiptEntry>)> = Vec::new();
        for Told { sender, recipient, kind, id } in told.drain(..) {
            if out.last().is_none_or(|(last, _)| *last != sender) {
                out.push((sender, Vec::new()));
            }
            let (_, entries) = out.last_mut().expect("pushed above");
            match entries.last_mut() {
                Some(entry) if entry.recipient == recipient && entry.kind == kind => match entry.ids.last_mut() {
                    Some((_, last)) if *last + 1 == id => *last = id,
                    _ => entry.ids.push((id, id)),
                },
                _ => entries.push(ReceiptEntry { recipient, kind, ids: vec![(id, id)] }),
            }
        }
        self.told = told;
        out
    }

    /// Whether [`Self::take_receipts`] has something to give.
    pub fn has_receipts(&self) -> bool {
        !self.told.is_empty()
    }

    /// Whether [`Self::flush`] would write anything beside positions.
    pub fn is_dirty(&self) -> bool {
        self.fresh_bytes > 0
            || !(self.dirty_inboxes.is_empty()
                && self.dirty_marks.is_empty()
                && self.trailing.is_empty()
                && self.removed.is_empty()
                && self.gone.is_empty())
    }
}

fn tell(told: &mut Vec<Told>, recipient: DeviceAddr, kind: ReceiptKind, body: &PendingBody) {
    match body {
        PendingBody::Envelope(envelope) if envelope.client_message_id == FROM_SERVER => {}
        PendingBody::Envelope(envelope) => told.push(Told { sender: envelope.sender, recipient, kind, id: envelope.client_message_id.0 }),
        // Nobody is told what became of a receipt.
        PendingBody::Receipts(_) => {}
    }
}

fn note_message(steps: &mut Option<Vec<LifeStep>>, kind: MetadataKind, at: Seq, accepted: &EnvelopesAccepted<'_>) {
    if let Some(steps) = steps {
        steps.push(LifeStep::message(kind, at, accepted, seal::OVERHEAD));
    }
}

/// Envelopes only: nobody counts receipts.
fn note_settled(steps: &mut Option<Vec<LifeStep>>, recipient: DeviceAddr, kind: ReceiptKind, item: &PendingItem) {
    if let (Some(steps), PendingBody::Envelope(envelope)) = (steps, &item.body) {
        let &PendingEnvelope { sender, accepted, flags, client_message_id, ref sealed, .. } = envelope;
        if client_message_id == FROM_SERVER {
            return;
        }
        let size_bytes = sealed.len().saturating_sub(seal::OVERHEAD);
        steps.push(LifeStep::settled(kind, Settled { at: item.seq, recipient, sender, accepted, flags, size_bytes }));
    }
}

/// What a mark says of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// Never seen; it is now.
    New,
    /// Seen before.
    Again,
    /// Too far behind the highest to tell.
    Behind,
}

impl Mark {
    /// Notes an id.
    pub fn see(&mut self, id: u64) -> Seen {
        if id > self.high {
            let ahead = id - self.high;
            self.seen = if ahead < limits::MESSAGE_ID_WINDOW { (self.seen << ahead) | 1 } else { 1 };
            self.high = id;
            return Seen::New;
        }
        let behind = self.high - id;
        if behind >= limits::MESSAGE_ID_WINDOW {
            return Seen::Behind;
        }
        let bit = 1u128 << behind;
        if self.seen & bit != 0 {
            return Seen::Again;
        }
        self.seen |= bit;
        Seen::New
    }
}
