//! One device's stream, free of any transport: a reader that takes the client's frames and a writer that gives the server's.
//!
//! The writer's life: attach → hello, catch up from the store to the switch → live. The switch is the position at which the projector met
//! the attachment in log order, so nothing is missed or doubled between the two. A feed that was cut (the
//! client was too slow for its queue) attaches again and catches up again. Requests are taken and answered from the beginning: acceptance needs no
//! projector.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::time::Instant;

use crate::auth::KnownDevice;
use crate::clock::{Clock, UnixMillis};
use crate::delivery::frames::Batch;
use crate::delivery::groups;
use crate::delivery::hub::Hub;
use crate::delivery::outbox::{FeedItem, Flow, GroupQueue, Handle, NeverSent, TakenGroups, Where};
use crate::delivery::sending;
use crate::directory::AccountView;
use crate::ids::{GroupId, Seq};
use crate::limits;
use crate::log::AppendSink;
use crate::metrics;
use crate::store::{InboxState, PendingBody, PendingItem};
use crate::traces::Span;
use crate::wire::event::flags;
use crate::wire::stream::{self, ClientBatch, CloseReason, Code, GapReason, client_frame, server_frame::Frame};

/// A stream that was opened. Ends, on the log too, when it is dropped.
#[derive(Debug)]
pub struct Session {
    hub: Arc<Hub>,
    handle: Arc<Handle>,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.hub.end(&self.handle);
    }
}

impl Session {
    /// Opens a stream for an authenticated device.
    pub fn open(hub: Arc<Hub>, device: KnownDevice) -> Self {
        let handle = hub.open(device);
        Self { hub, handle }
    }

    /// Its handle, for what others tell it.
    pub fn handle(&self) -> &Arc<Handle> {
        &self.handle
    }

    /// The two halves; both borrow the session, which must outlive them.
    pub fn halves<'a>(&'a self, clock: &'a dyn Clock) -> (Reader<'a>, Writer<'a>) {
        let sink: Arc<dyn AppendSink> = Arc::clone(&self.handle) as Arc<dyn AppendSink>;
        let reader = Reader { session: self, sink };
        let writer = Writer {
            session: self,
            clock,
            view: None,
            phase: Phase::New,
            opened: None,
            local: VecDeque::new(),
            flow: Flow::default(),
            last: Seq::ZERO,
            batch: Batch::default(),
            items: 0,
            accepted: None,
            traced: Vec::new(),
            group_items: GroupQueue::new(),
        };
        (reader, writer)
    }
}

/// Takes what the client sends.
pub struct Reader<'a> {
    session: &'a Session,
    sink: Arc<dyn AppendSink>,
}

impl Reader<'_> {
    /// Anything arrived, a pong for example: the client is alive.
    pub fn heard(&self) {
        self.session.handle.heard(self.session.hub.tick());
    }

    /// One binary message: a `ClientBatch`. Waits while too many sends are in flight. `Err`: close the stream so.
    pub async fn receive(&mut self, message: Bytes) -> Result<(), CloseReason> {
        self.heard();
        let batch = ClientBatch::decode(message).map_err(|_| CloseReason::ProtocolError)?;
        for frame in batch.frames {
            match frame.frame {
                Some(client_frame::Frame::Send(send)) => self.send(send).await,
                Some(client_frame::Frame::Ack(ack)) => self.ack(Seq(ack.seq))?,
                Some(client_frame::Frame::GroupFollow(follow)) => self.follow(&follow).await,
                Some(client_frame::Frame::GroupSend(send)) => self.group_send(send).await,
                // A frame of a newer client.
                None => {}
            }
        }
        Ok(())
    }

    fn ack(&mut self, to: Seq) -> Result<(), CloseReason> {
        let Session { hub, handle } = self.session;
        if handle.ack(to, hub.tick()).map_err(|NeverSent| CloseReason::ProtocolError)? {
            hub.ack_later(Arc::clone(handle));
            metrics::observe_acks(1);
        }
        Ok(())
    }

    async fn send(&mut self, send: stream::Send) {
        let handle = &self.session.handle;
        handle.enter().await;
        let request_id = send.request_id;
        let mut trace = self.session.hub.acceptor.trace();
        if let Err(error) = self.try_send(send, &mut trace).await {
            if let Some(trace) = trace {
                trace.end_with(error.code());
            }
            metrics::observe_sends(error.code(), 1);
            handle.refuse(request_id, &error);
        }
    }

    async fn follow(&mut self, follow: &stream::GroupFollow) {
        let Session { hub, handle } = self.session;
        match (GroupId::from_slice(&follow.group_id), follow.stop) {
            (Ok(group), false) => {
                handle.enter().await;
                hub.groups.follow(handle, group);
            }
            (Ok(group), true) => hub.groups.unfollow(handle, group),
            // There is no such group.
            (Err(_), _) => {
                handle.enter().await;
                handle.refuse_follow(GroupId::from_bytes([0; 16]), Code::BadRequest);
            }
        }
    }

    async fn group_send(&mut self, send: stream::GroupSend) {
        let Session { hub, handle } = self.session;
        handle.enter().await;
        let request_id = send.request_id;
        let taken = match groups::parse(send) {
            Ok(message) => hub.groups.submit_message(handle.known(), message, &self.sink, request_id).await,
            Err(error) => Err(error),
        };
        if let Err(error) = taken {
            metrics::observe_sends(error.code(), 1);
            handle.refuse_with(error.result(request_id));
        }
    }

    async fn try_send(&mut self, send: stream::Send, trace: &mut Option<Span>) -> Result<(), crate::delivery::api::SendError> {
        let Session { hub, handle } = self.session;
        let request_id = send.request_id;
        let request = sending::parse(send)?;
        let (view, highest) = match hub.acceptor.cached(handle.device, &request) {
            Some(cached) => cached,
            None => hub.acceptor.load(handle.device, &request).await?,
        };
        let checked = hub.acceptor.check(handle.known(), &request, &view, &highest, trace.as_ref())?;
        hub.acceptor.submit(checked, &self.sink, request_id, trace.take())
    }
}

/// What the transport does next.
#[derive(Debug)]
pub enum Output {
    /// Send this binary message: a `ServerBatch`.
    Frames(Bytes),
    /// Send a ping.
    Ping,
    /// Send this last binary message, then close with the reason's code.
    Close(Bytes, CloseReason),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Not attached yet, nothing sent.
    New,
    /// Waits for the switch.
    Attaching,
    /// Reads the backlog up to the switch.
    CatchUp { to: Seq },
    /// Follows.
    Live,
}

/// Gives what the client is sent.
pub struct Writer<'a> {
    session: &'a Session,
    clock: &'a dyn Clock,
    view: Option<Arc<AccountView>>,
    phase: Phase,
    /// When it first attached, until the client was said hello.
    opened: Option<Instant>,
    local: VecDeque<FeedItem>,
    flow: Flow,
    /// The highest seq that was sent, or acknowledged before.
    last: Seq,
    batch: Batch,
    /// Items in the batch.
    items: u64,
    /// When its first live envelope was accepted.
    accepted: Option<UnixMillis>,
    /// The traced ones of what is being written.
    traced: Vec<Span>,
    /// Items of groups that were taken and not written yet.
    group_items: GroupQueue,
}

impl Writer<'_> {
    /// Waits for the next thing to write. Not cancel-safe: what it took out of the queue is lost with the future.
    pub async fn next(&mut self) -> Output {
        // The transport comes back once it has written.
        self.traced.drain(..).for_each(Span::end);
        if self.phase == Phase::New
            && let Err(reason) = self.open().await
        {
            return self.close(reason);
        }
        loop {
            let Session { hub, handle } = self.session;
            let taken = handle.take(&mut self.flow, &mut self.local, self.phase == Phase::Live, &mut self.group_items);
            if let Some(reason) = taken.closing {
                return self.close(reason);
            }
            if let Some((at, inbox)) = taken.attached {
                self.hello(inbox);
                self.begin(at, inbox);
            }
            if !taken.accepted.is_empty() {
                metrics::observe_sends(Code::Ok, taken.accepted.len() as u64);
            }
            for request_id in taken.accepted {
                self.batch.accepted(request_id);
            }
            for result in taken.refused {
                self.batch.frame(Frame::Result(result));
            }
            if taken.account_changed {
                self.batch.frame(Frame::AccountChanged(stream::AccountChanged {}));
            }
            if let Some((ec_remaining, pq_remaining)) = taken.prekeys_low {
                self.batch.frame(Frame::PrekeysLow(stream::PrekeysLow { ec_remaining, pq_remaining }));
            }
            if let Some(remaining) = taken.key_packages_low {
                self.batch.frame(Frame::KeyPackagesLow(stream::KeyPackagesLow { remaining }));
            }
            if let Some(groups) = taken.groups {
                self.group_heads(&groups);
            }
            // A cut that comes while it catches up waits for its turn: the outbox takes nothing meanwhile.
            if taken.overflow && matches!(self.phase, Phase::Live | Phase::Attaching) && self.local.is_empty() {
                self.phase = Phase::Attaching;
                if hub.attach_anew(handle).await.is_err() {
                    return self.close(CloseReason::ServerFault);
                }
            }
            if let Err(reason) = self.feed().await {
                return self.close(reason);
            }
            if !self.group_items.is_empty() {
                self.group_items();
            }
            if taken.ping {
                return self.ping();
            }
            if !self.batch.is_empty() {
                handle.sent(self.last);
                metrics::observe_pushed(std::mem::take(&mut self.items));
                if let Some(accepted) = self.accepted.take() {
                    metrics::observe_live(Duration::from_millis(self.clock.now().0.saturating_sub(accepted.0)));
                }
                return Output::Frames(self.batch.take());
            }
            if !self.can_go_on()
                && let Err(reason) = self.woken().await
            {
                return self.close(reason);
            }
        }
    }

    /// Says where groups are. Those that items were dropped of are at what comes next, or behind it.
    fn group_heads(&mut self, groups: &TakenGroups) {
        let Session { hub, handle } = self.session;
        let lost = groups.lost.iter().filter(|group| !groups.heads.contains_key(*group));
        let lost = lost.map(|&group| {
            // Of a group that is closed, or that it is out of, the answer to its next request says so.
            let at = hub.groups.at(group).filter(|_| handle.follows(group));
            (group, at.unwrap_or(Where::refused(Code::Unavailable)))
        });
        let said = groups.heads.iter().map(|(&group, &at)| (group, at));
        for (group, Where { code, seq, epoch }) in said.chain(lost).collect::<Vec<_>>() {
            let group_id = Bytes::copy_from_slice(group.as_bytes());
            self.batch.frame(Frame::GroupHead(stream::GroupHead { group_id, code: code.into(), seq: seq.0, epoch }));
        }
    }

    /// As many items of groups as a frame has room for, besides what is in it.
    fn group_items(&mut self) {
        let until = self.batch.len() + limits::SERVER_FRAME_TARGET_BYTES;
        while self.batch.len() < until {
            let Some((_, frames)) = self.group_items.pop_front() else { break };
            self.batch.encoded(&frames);
        }
        if self.group_items.is_empty() && self.group_items.capacity() > 64 {
            self.group_items = GroupQueue::new();
        }
    }

    /// The batch is empty, but there is something to fill it with.
    fn can_go_on(&self) -> bool {
        let more = matches!(self.phase, Phase::CatchUp { .. }) || !self.local.is_empty();
        more && self.phase != Phase::Attaching && !self.flow.is_stalled()
    }

    /// A ping now; what the batch holds goes out with the next turn.
    fn ping(&self) -> Output {
        if !self.batch.is_empty() {
            self.session.handle.wake();
        }
        Output::Ping
    }

    /// Attaches. The projector's answer is one of the things that the stream waits for.
    async fn open(&mut self) -> Result<(), CloseReason> {
        let Session { hub, handle } = self.session;
        let view = hub.directory.get(handle.device.account).await.map_err(|_| CloseReason::ServerFault)?;
        self.view = Some(view.filter(|view| !view.deleted).ok_or(CloseReason::Revoked)?);
        self.opened = Some(Instant::now());
        self.phase = Phase::Attaching;
        hub.attach(handle).await.map_err(|_| CloseReason::ServerFault)
    }

    /// Says hello if that was the first attachment.
    fn hello(&mut self, inbox: InboxState) {
        let Some(opened) = self.opened.take() else { return };
        metrics::observe_attached(opened.elapsed());
        self.session.handle.begin(inbox.cursor);
        self.batch.frame(Frame::Hello(stream::Hello {
            cursor: inbox.cursor.0,
            heartbeat_ms: (limits::HEARTBEAT_TICK_MS * u64::from(limits::HEARTBEAT_TICKS)) as u32,
            max_unacked_bytes: limits::UNACKED_BYTES as u64,
            server_time_ms: self.clock.now().0,
        }));
    }

    /// Waits until there is something to take; the first attachment has a time limit.
    async fn woken(&self) -> Result<(), CloseReason> {
        let woken = self.session.handle.woken();
        let Some(opened) = self.opened else {
            woken.await;
            return Ok(());
        };
        tokio::time::timeout_at(opened + Duration::from_millis(limits::ATTACH_MS), woken).await.map_err(|_| CloseReason::ServerFault)
    }

    fn begin(&mut self, at: Seq, inbox: InboxState) {
        // What is queued is at or below the switch: the catch-up reads it.
        self.local.clear();
        self.last = self.last.max(inbox.cursor);
        self.phase = Phase::CatchUp { to: at };
        if inbox.expired_to > self.last {
            self.gap(Seq(self.last.0 + 1), inbox.expired_to, GapReason::GapExpired);
        }
    }

    fn gap(&mut self, from: Seq, to: Seq, reason: GapReason) {
        self.batch.frame(Frame::Gap(stream::Gap { from: from.0, to: to.0, reason: reason.into() }));
        self.flow.sent(to, 32);
        self.last = to;
    }

    /// Fills the batch from the backlog or the live queue, as far as flow control lets it.
    async fn feed(&mut self) -> Result<(), CloseReason> {
        if let Phase::CatchUp { to } = self.phase
            && !self.flow.is_stalled()
        {
            self.catch_up(to).await?;
        }
        if self.phase == Phase::Live {
            while self.batch.len() < limits::SERVER_FRAME_TARGET_BYTES && !self.flow.is_stalled() {
                let Some(FeedItem { after, item, trace }) = self.local.pop_front() else { break };
                if after > self.last {
                    // The one before it never came. What is queued lies behind the hole as well.
                    self.local.clear();
                    self.session.handle.cut();
                    break;
                }
                self.item(&item);
                self.traced.extend(trace);
            }
            if self.local.is_empty() && self.local.capacity() > 64 {
                self.local = VecDeque::new();
            }
        }
        Ok(())
    }

    async fn catch_up(&mut self, to: Seq) -> Result<(), CloseReason> {
        let Session { hub, handle } = self.session;
        if self.local.is_empty() {
            let page = hub.delivery.pending(handle.device, self.last, to, limits::CATCH_UP_ITEMS, limits::CATCH_UP_BYTES).await;
            self.local = page
                .map_err(|error| {
                    tracing::error!(%error, "a backlog could not be read");
                    CloseReason::ServerFault
                })?
                .into_iter()
                .map(|item| FeedItem { after: Seq::ZERO, item, trace: None })
                .collect();
            if self.local.is_empty() {
                self.last = self.last.max(to);
                self.batch.frame(Frame::QueueEmpty(stream::QueueEmpty { seq: self.last.0 }));
                self.phase = Phase::Live;
                // What came meanwhile is taken at the next turn.
                handle.wake();
                return Ok(());
            }
        }
        while self.batch.len() < limits::SERVER_FRAME_TARGET_BYTES && !self.flow.is_stalled() {
            let Some(FeedItem { item, .. }) = self.local.pop_front() else { break };
            self.item(&item);
        }
        Ok(())
    }

    fn item(&mut self, item: &PendingItem) {
        match &item.body {
            PendingBody::Envelope(envelope) => {
                let ephemeral = envelope.flags & flags::EPHEMERAL != 0;
                if item.seq <= self.last && !ephemeral {
                    return;
                }
                if self.phase == Phase::Live {
                    self.accepted.get_or_insert(envelope.accepted);
                }
                let sealer = self.view.as_ref().and_then(|view| view.sealer());
                let opened =
                    sealer.is_some_and(|sealer| self.batch.envelope(self.session.handle.device, item.seq, envelope, sealer).is_ok());
                match (opened, ephemeral) {
                    (_, true) => return,
                    (true, false) => {}
                    (false, false) => return self.gap(item.seq, item.seq, GapReason::GapLost),
                }
            }
            PendingBody::Receipts(entries) => {
                if item.seq <= self.last {
                    return;
                }
                self.batch.receipt(item.seq, entries);
            }
        }
        self.items += 1;
        self.last = item.seq;
        self.flow.sent(item.seq, item.cost());
    }

    fn close(&mut self, reason: CloseReason) -> Output {
        let retry_after_ms = match reason {
            CloseReason::Draining => self.session.hub.drain_retry_ms(),
            CloseReason::Replaced | CloseReason::Revoked | CloseReason::ProtocolError => 0,
            _ => 1_000,
        };
        self.batch.take();
        self.batch.frame(Frame::Closing(stream::Closing { reason: reason.into(), retry_after_ms }));
        Output::Close(self.batch.take(), reason)
    }
}
