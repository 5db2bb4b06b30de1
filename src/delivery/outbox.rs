//! What waits to be written to one stream: filled by the projector's pushes and the log's outcomes, emptied by the session.
//! Bounded: a stream that can't keep up loses its live feed here, and catches up from the store.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::auth::KnownDevice;
use crate::delivery::api::SendError;
use crate::delivery::sending::append_failed;
use crate::ids::{AttachId, ClientMessageId, DeviceAddr, GroupId, Offset, Seq};
use crate::limits;
use crate::log::{AppendError, AppendSink};
use crate::metrics;
use crate::store::{InboxState, PendingItem};
use crate::traces::Span;
use crate::wire::stream::{CloseReason, Code, SendResult};

/// How often streams are looked at for silence.
pub const TICK: Duration = Duration::from_millis(limits::HEARTBEAT_TICK_MS);

/// A stream as the hub, the projector and the log see it.
#[derive(Debug)]
pub struct Handle {
    /// Whose stream it is.
    pub device: DeviceAddr,
    /// Where its client message ids begin.
    first_message_id: ClientMessageId,
    /// Which attachment it is now.
    attach: AtomicU64,
    out: Mutex<Outbox>,
    wake: Notify,
    room: Notify,
    abort: Notify,
    heard: AtomicU32,
    moved: AtomicU32,
    /// The last tick that met the stream closing; 0 if none did.
    closed: AtomicU32,
}

/// A live item and its link to the one before it.
#[derive(Debug)]
pub struct FeedItem {
    /// See [`crate::projector::push::Push::Item`].
    pub after: Seq,
    /// The item.
    pub item: PendingItem,
    /// Its way to the socket, if it is traced.
    pub trace: Option<Span>,
}

#[derive(Debug, Default)]
struct Outbox {
    items: VecDeque<FeedItem>,
    bytes: usize,
    /// Items were dropped: only a new attachment makes the feed whole again.
    overflow: bool,
    attached: Option<(Seq, InboxState)>,
    accepted: Vec<u64>,
    refused: Vec<SendResult>,
    in_flight: usize,
    closing: Option<CloseReason>,
    account_changed: bool,
    prekeys_low: Option<(u32, u32)>,
    key_packages_low: Option<u32>,
    ping: bool,
    /// The session has been told to look and has not yet.
    woken: bool,
    /// Everything sent so far is at or below it.
    sent: Seq,
    acked: Seq,
    ack_appended: Seq,
    /// The feed is paused until the client acknowledges.
    stalled: bool,
    /// What it has of groups; most streams follow none.
    groups: Option<Box<Groups>>,
}

/// What a stream has of groups.
#[derive(Debug, Default)]
struct Groups {
    /// Those that it follows; true: it waits for the answer.
    followed: BTreeMap<GroupId, bool>,
    queue: GroupQueue,
    bytes: usize,
    heads: BTreeMap<GroupId, Where>,
    /// Items of these were dropped: the client is told where they are.
    lost: BTreeSet<GroupId>,
}

/// Encoded frames of groups' items, shared with all who follow.
pub type GroupQueue = VecDeque<(GroupId, Bytes)>;

/// What a client is told of a group that it follows, or wants to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Where {
    /// Whether it follows.
    pub code: Code,
    /// The group's last item.
    pub seq: Seq,
    /// The group's epoch.
    pub epoch: u64,
}

impl Where {
    /// It does not follow.
    pub const fn refused(code: Code) -> Self {
        Self { code, seq: Seq::ZERO, epoch: 0 }
    }
}

/// What a session takes out of its outbox of groups, besides items.
#[derive(Debug, Default)]
pub struct TakenGroups {
    /// Answers to `GroupFollow`.
    pub heads: BTreeMap<GroupId, Where>,
    /// Groups that items were dropped of.
    pub lost: BTreeSet<GroupId>,
}

/// A client acknowledged what it was never sent. Retrying never helps: it has mixed something up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("acknowledges what was never sent")]
pub struct NeverSent;

impl Outbox {
    /// Answers that wait for the socket.
    fn answers(&self) -> usize {
        self.accepted.len() + self.refused.len() + self.groups.as_ref().map_or(0, |groups| groups.heads.len())
    }

    fn cut(&mut self) {
        self.items = VecDeque::new();
        self.bytes = 0;
        self.overflow = true;
        metrics::observe_feed_cut();
    }
}

/// What a session takes out of its outbox in one go.
#[derive(Debug, Default)]
pub struct Taken {
    /// The switch from backlog to live was met.
    pub attached: Option<(Seq, InboxState)>,
    /// Request ids of accepted sends.
    pub accepted: Vec<u64>,
    /// Answers to refused sends.
    pub refused: Vec<SendResult>,
    /// The stream is to end.
    pub closing: Option<CloseReason>,
    /// Tell the client.
    pub account_changed: bool,
    /// Tell the client.
    pub prekeys_low: Option<(u32, u32)>,
    /// Tell the client.
    pub key_packages_low: Option<u32>,
    /// Ping the client.
    pub ping: bool,
    /// The feed was cut: attach anew.
    pub overflow: bool,
    /// What there is to say of groups.
    pub groups: Option<Box<TakenGroups>>,
}

/// Flow control: what was sent and is not acknowledged.
#[derive(Debug, Default)]
pub struct Flow {
    sent: VecDeque<(Seq, u32)>,
    bytes: usize,
}

impl Flow {
    /// Notes an item.
    pub fn sent(&mut self, seq: Seq, bytes: usize) {
        self.bytes += bytes;
        self.sent.push_back((seq, u32::try_from(bytes).unwrap_or(u32::MAX)));
    }

    fn settle(&mut self, acked: Seq) {
        while self.sent.front().is_some_and(|(seq, _)| *seq <= acked) {
            let (_, bytes) = self.sent.pop_front().expect("there is a front");
            self.bytes -= bytes as usize;
        }
        if self.sent.is_empty() && self.sent.capacity() > 64 {
            // An idle stream costs as little as can be.
            self.sent = VecDeque::new();
        }
    }

    /// The feed pauses until the client acknowledges.
    pub const fn is_stalled(&self) -> bool {
        self.bytes >= limits::UNACKED_BYTES
    }
}

impl Handle {
    /// A stream that has nothing to say yet.
    pub fn new(device: KnownDevice, attach: AttachId, tick: u32) -> Self {
        Self {
            device: device.addr,
            first_message_id: device.first_message_id,
            attach: AtomicU64::new(attach.0),
            out: Mutex::default(),
            wake: Notify::new(),
            room: Notify::new(),
            abort: Notify::new(),
            heard: AtomicU32::new(tick),
            moved: AtomicU32::new(tick),
            closed: AtomicU32::new(0),
        }
    }

    /// Whose stream it is, as a sender.
    pub const fn known(&self) -> KnownDevice {
        KnownDevice { addr: self.device, first_message_id: self.first_message_id }
    }

    /// Which attachment it is now.
    pub fn attach(&self) -> AttachId {
        AttachId(self.attach.load(Ordering::Relaxed))
    }

    /// It is another attachment from here on; a cut that comes behind this is another cut.
    pub fn renew(&self, attach: AttachId) {
        let mut out = self.out.lock();
        self.attach.store(attach.0, Ordering::Relaxed);
        out.overflow = false;
        out.items.clear();
        out.bytes = 0;
    }

    /// Wakes the session.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Waits until there is something to take.
    pub async fn woken(&self) {
        self.wake.notified().await;
    }

    fn change(&self, change: impl FnOnce(&mut Outbox)) {
        let mut out = self.out.lock();
        change(&mut out);
        if !std::mem::replace(&mut out.woken, true) {
            drop(out);
            self.wake();
        }
    }

    /// Queues a live item. True: the session has to be woken by the caller, once for a run of items.
    pub fn push(&self, item: FeedItem) -> bool {
        let mut out = self.out.lock();
        if out.overflow {
            return false;
        }
        if out.items.len() >= limits::SESSION_QUEUE_ITEMS || out.bytes >= limits::SESSION_QUEUE_BYTES {
            out.cut();
        } else {
            out.bytes += item.item.cost();
            out.items.push_back(item);
        }
        !std::mem::replace(&mut out.woken, true)
    }

    /// The live feed has a hole, or may have: the session attaches anew.
    pub fn cut(&self) {
        self.change(Outbox::cut);
    }

    /// Everything up to `at` is in the store; what comes from now on is live.
    pub fn attached(&self, at: Seq, inbox: InboxState) {
        self.change(|out| {
            // Items queued before are at or below `at`: the catch-up reads them.
            out.items.clear();
            out.bytes = 0;
            out.overflow = false;
            out.attached = Some((at, inbox));
        });
    }

    /// Ends the stream; the first reason counts.
    pub fn close(&self, reason: CloseReason) {
        self.change(|out| {
            out.closing.get_or_insert(reason);
        });
        self.room.notify_one();
    }

    /// Why the stream ends; unspecified if nobody but the client wants it.
    pub fn closing(&self) -> CloseReason {
        self.out.lock().closing.unwrap_or(CloseReason::Unspecified)
    }

    /// The client is told that its account changed.
    pub fn account_changed(&self) {
        self.change(|out| out.account_changed = true);
    }

    /// The client is told to refill its one-time prekeys.
    pub fn prekeys_low(&self, ec: u32, pq: u32) {
        self.change(|out| out.prekeys_low = Some((ec, pq)));
    }

    /// The client is told to refill its KeyPackages.
    pub fn key_packages_low(&self, remaining: u32) {
        self.change(|out| out.key_packages_low = Some(remaining));
    }

    /// Something arrived from the client.
    pub fn heard(&self, tick: u32) {
        self.heard.store(tick, Ordering::Relaxed);
    }

    /// Waits until the stream has to end without a word: it was to be closed, and its socket takes nothing.
    pub async fn aborted(&self) {
        self.abort.notified().await;
    }

    /// Pings a silent client, closes a dead or stuck one.
    pub fn on_tick(&self, tick: u32) {
        if self.closing() != CloseReason::Unspecified && tick.saturating_sub(self.closed.swap(tick, Ordering::Relaxed)) == 1 {
            return self.abort.notify_one();
        }
        let silent = tick.saturating_sub(self.heard.load(Ordering::Relaxed));
        if silent >= 2 * limits::HEARTBEAT_TICKS {
            self.close(CloseReason::Idle);
        } else if silent >= limits::HEARTBEAT_TICKS {
            self.change(|out| out.ping = true);
        }
        let stuck = tick.saturating_sub(self.moved.load(Ordering::Relaxed));
        if stuck >= limits::STALLED_TICKS && self.out.lock().stalled {
            self.close(CloseReason::TooSlow);
        }
    }

    /// Waits until another request may be in flight, and counts it. A client that does not read its answers is not read either. Cancel-safe.
    pub async fn enter(&self) {
        loop {
            {
                let mut out = self.out.lock();
                if out.in_flight < limits::SENDS_IN_FLIGHT && out.answers() < limits::ANSWERS_QUEUED || out.closing.is_some() {
                    out.in_flight += 1;
                    return;
                }
            }
            self.room.notified().await;
        }
    }

    /// A send that was counted by [`Self::enter`] was refused before it reached the log.
    pub fn refuse(&self, request_id: u64, error: &SendError) {
        self.refuse_with(refusal(request_id, error));
    }

    /// The same with these words.
    pub fn refuse_with(&self, result: SendResult) {
        self.change(|out| {
            out.in_flight -= 1;
            out.refused.push(result);
        });
    }

    /// The client acknowledges. True: the hub must be told.
    pub fn ack(&self, to: Seq, tick: u32) -> Result<bool, NeverSent> {
        let mut out = self.out.lock();
        if to > out.sent {
            return Err(NeverSent);
        }
        if to <= out.acked {
            return Ok(false);
        }
        let first = out.acked <= out.ack_appended;
        out.acked = to;
        self.moved.store(tick, Ordering::Relaxed);
        if std::mem::take(&mut out.stalled) && !std::mem::replace(&mut out.woken, true) {
            self.wake();
        }
        Ok(first)
    }

    /// What has to be appended of the client's acknowledgements.
    pub fn take_ack(&self) -> Option<Seq> {
        let mut out = self.out.lock();
        (out.acked > out.ack_appended).then(|| {
            out.ack_appended = out.acked;
            out.acked
        })
    }

    /// The append failed: the next acknowledgement tries again.
    pub fn ack_failed(&self) {
        self.out.lock().ack_appended = Seq::ZERO;
    }

    /// The client's cursor and what it was sent before this stream; acknowledging that is right.
    pub fn begin(&self, cursor: Seq) {
        let mut out = self.out.lock();
        out.sent = out.sent.max(cursor);
        out.acked = out.acked.max(cursor);
        out.ack_appended = out.ack_appended.max(cursor);
    }

    /// Everything that waits, but for items; those go to `items` if `want_items`. Settles the flow with what the client
    /// acknowledged.
    pub fn take(&self, flow: &mut Flow, items: &mut VecDeque<FeedItem>, want_items: bool, group_items: &mut GroupQueue) -> Taken {
        let mut out = self.out.lock();
        out.woken = false;
        if out.answers() >= limits::ANSWERS_QUEUED {
            self.room.notify_one();
        }
        let groups = out.groups.as_mut().and_then(|groups| groups.take(group_items));
        flow.settle(out.acked);
        out.stalled = flow.is_stalled();
        if want_items && items.is_empty() && !out.items.is_empty() {
            std::mem::swap(items, &mut out.items);
            out.bytes = 0;
        }
        Taken {
            attached: out.attached.take(),
            accepted: std::mem::take(&mut out.accepted),
            refused: std::mem::take(&mut out.refused),
            closing: out.closing,
            account_changed: std::mem::take(&mut out.account_changed),
            prekeys_low: out.prekeys_low.take(),
            key_packages_low: out.key_packages_low.take(),
            ping: std::mem::take(&mut out.ping),
            overflow: out.overflow,
            groups,
        }
    }

    /// Notes how far the stream was fed; call before the bytes are written, so that no acknowledgement overtakes it.
    pub fn sent(&self, to: Seq) {
        let mut out = self.out.lock();
        out.sent = out.sent.max(to);
    }
}

impl Groups {
    fn take(&mut self, queue: &mut GroupQueue) -> Option<Box<TakenGroups>> {
        if queue.is_empty() && !self.queue.is_empty() {
            std::mem::swap(queue, &mut self.queue);
            self.bytes = 0;
        }
        if self.heads.is_empty() && self.lost.is_empty() {
            return None;
        }
        Some(Box::new(TakenGroups { heads: std::mem::take(&mut self.heads), lost: std::mem::take(&mut self.lost) }))
    }
}

/// What a request to follow a group means to a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Begun {
    /// It is to be looked at.
    New,
    /// The answer to an earlier one is the answer to this one.
    Waits,
    /// It follows as many as it may.
    TooMany,
}

/// Groups. A stream that follows none costs nothing.
impl Handle {
    /// The client wants to follow a group; a request that was counted by [`Self::enter`].
    pub fn begin_follow(&self, group: GroupId) -> Begun {
        let mut out = self.out.lock();
        let groups = out.groups.get_or_insert_default();
        let room = groups.followed.len() < limits::GROUPS_PER_ACCOUNT;
        match groups.followed.get_mut(&group) {
            Some(waits) if *waits => {
                out.in_flight -= 1;
                Begun::Waits
            }
            Some(waits) => {
                *waits = true;
                Begun::New
            }
            None if room => {
                groups.followed.insert(group, true);
                Begun::New
            }
            None => Begun::TooMany,
        }
    }

    /// Whether the stream follows a group, or waits to.
    pub fn follows(&self, group: GroupId) -> bool {
        self.out.lock().groups.as_ref().is_some_and(|groups| groups.followed.contains_key(&group))
    }

    /// The stream follows a group no longer. False: it did not.
    pub fn end_follow(&self, group: GroupId) -> bool {
        let mut out = self.out.lock();
        let ended = out.groups.as_mut().and_then(|groups| groups.followed.remove(&group));
        if ended == Some(true) {
            out.in_flight -= 1;
            self.room.notify_one();
        }
        ended.is_some()
    }

    /// The stream ends: the groups that it followed.
    pub fn end_all_follows(&self) -> Vec<GroupId> {
        let groups = self.out.lock().groups.take();
        groups.map_or_else(Vec::new, |groups| groups.followed.into_keys().collect())
    }

    /// Tells the client where a group is, as the answer to its request or by itself. Refused: it does not follow.
    pub fn group_head(&self, group: GroupId, at: Where) {
        self.change(|out| {
            let Some(groups) = &mut out.groups else { return };
            let waited = match at.code {
                Code::Ok => groups.followed.get_mut(&group).is_some_and(std::mem::take),
                _ => groups.followed.remove(&group) == Some(true),
            };
            groups.heads.insert(group, at);
            if waited {
                out.in_flight -= 1;
                self.room.notify_one();
            }
        });
    }

    /// Refuses a request to follow that was never begun.
    pub fn refuse_follow(&self, group: GroupId, code: Code) {
        self.change(|out| {
            out.in_flight -= 1;
            out.groups.get_or_insert_default().heads.insert(group, Where::refused(code));
        });
    }

    /// Queues items of a group, encoded. True: the session has to be woken by the caller, once for a run.
    pub fn push_group(&self, group: GroupId, frames: &Bytes) -> bool {
        let mut out = self.out.lock();
        let Some(groups) = &mut out.groups else { return false };
        if groups.bytes + frames.len() > limits::SESSION_GROUP_BYTES {
            // What is queued goes first: it is the oldest, and the client has to fetch what comes behind it anyway.
            groups.lost.extend(groups.queue.drain(..).map(|(group, _)| group));
            groups.lost.insert(group);
            groups.bytes = 0;
            metrics::observe_group_feed_cut();
        } else {
            groups.bytes += frames.len();
            groups.queue.push_back((group, frames.clone()));
        }
        !std::mem::replace(&mut out.woken, true)
    }
}

impl AppendSink for Handle {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        let mut out = self.out.lock();
        let was_full = out.in_flight >= limits::SENDS_IN_FLIGHT;
        out.in_flight -= 1;
        match outcome {
            Ok(_) => out.accepted.push(token),
            Err(error) => out.refused.push(refusal(token, &append_failed(&error))),
        }
        if was_full {
            self.room.notify_one();
        }
    }

    fn flush(&self) {
        if !std::mem::replace(&mut self.out.lock().woken, true) {
            self.wake();
        }
    }
}

fn refusal(request_id: u64, error: &SendError) -> SendResult {
    let numbers = |devices: &[crate::ids::DeviceId]| devices.iter().map(|device| u32::from(device.get())).collect();
    let mut result = SendResult {
        request_id,
        code: error.code().into(),
        message: error.to_string(),
        retry_after_ms: error.retry_after_ms(),
        ..SendResult::default()
    };
    match error {
        SendError::Mismatch { missing, extra } => {
            result.missing_devices = numbers(missing);
            result.extra_devices = numbers(extra);
        }
        SendError::Stale { devices } => result.stale_devices = numbers(devices),
        _ => {}
    }
    result
}
