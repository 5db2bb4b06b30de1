//! What waits to be written to one stream: filled by the projector's pushes and the log's outcomes, emptied by the session.
//! Bounded: a stream that can't keep up loses its live feed here, and catches up from the store.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::auth::KnownDevice;
use crate::delivery::api::SendError;
use crate::delivery::sending::append_failed;
use crate::ids::{AttachId, ClientMessageId, DeviceAddr, Offset, Seq};
use crate::limits;
use crate::log::{AppendError, AppendSink};
use crate::metrics;
use crate::store::{InboxState, PendingItem};
use crate::traces::Span;
use crate::wire::stream::{CloseReason, SendResult};

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
}

/// A client acknowledged what it was never sent. Retrying never helps: it has mixed something up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("acknowledges what was never sent")]
pub struct NeverSent;

impl Outbox {
    fn cut(&mut self) {
        self.items = VecDeque::new();
        self.bytes = 0;
        self.overflow = true;
        metrics::observe_feed_cut();
    }
}

/// What became of a stream's first attachment.
#[derive(Debug)]
pub enum First {
    /// Nothing yet.
    Wait,
    /// The projector met it: the switch, and the inbox there.
    Attached(Seq, InboxState),
    /// The answer may be lost: attach anew.
    Cut,
    /// The stream ends.
    Closed(CloseReason),
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

    /// Waits until another send may be in flight, and counts it. Cancel-safe.
    pub async fn enter(&self) {
        loop {
            {
                let mut out = self.out.lock();
                if out.in_flight < limits::SENDS_IN_FLIGHT || out.closing.is_some() {
                    out.in_flight += 1;
                    return;
                }
            }
            self.room.notified().await;
        }
    }

    /// A send that was counted by [`Self::enter`] was refused before it reached the log.
    pub fn refuse(&self, request_id: u64, error: &SendError) {
        let result = refusal(request_id, error);
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

    /// The first switch from backlog to live, or the reason why there will be none; not before that anything else is taken.
    pub fn take_first(&self) -> First {
        let mut out = self.out.lock();
        out.woken = false;
        match (out.closing, out.attached.take()) {
            (Some(reason), _) => First::Closed(reason),
            (None, Some((at, inbox))) => First::Attached(at, inbox),
            (None, None) if std::mem::take(&mut out.overflow) => First::Cut,
            (None, None) => First::Wait,
        }
    }

    /// Everything that waits, but for items; those go to `items` if `want_items`. Settles the flow with what the client
    /// acknowledged.
    pub fn take(&self, flow: &mut Flow, items: &mut VecDeque<FeedItem>, want_items: bool) -> Taken {
        let mut out = self.out.lock();
        out.woken = false;
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
        }
    }

    /// Notes how far the stream was fed; call before the bytes are written, so that no acknowledgement overtakes it.
    pub fn sent(&self, to: Seq) {
        let mut out = self.out.lock();
        out.sent = out.sent.max(to);
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
