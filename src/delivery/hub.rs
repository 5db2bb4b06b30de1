//! All sessions of one edge: the receiving end of the projector's pushes, the batching of acknowledgements,
//! the heartbeat, and the wake-ups of long-polls.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::auth::KnownDevice;
use crate::clock::Random;
use crate::delivery::groups::{Arrived, GroupService};
use crate::delivery::outbox::{FeedItem, Handle, TICK};
use crate::delivery::sending::Acceptor;
use crate::directory::Directory;
use crate::ids::{AttachId, DeviceAddr, EdgeId, Seq};
use crate::limits;
use crate::log::{AppendError, AppendSink, EventLog};
use crate::metrics;
use crate::projector::push::{Push, PushBus};
use crate::store::DeliveryStore;
use crate::traces::{self, Step};
use crate::wire::event::{self, InboxEvent};
use crate::wire::stream::CloseReason;

const SHARDS: usize = 16;

/// What the edge needs of the rest of the broker.
pub struct Hub {
    /// This edge.
    pub edge: EdgeId,
    /// The log.
    pub log: Arc<dyn EventLog>,
    /// Backlogs are read from here.
    pub delivery: Arc<dyn DeliveryStore>,
    /// At-rest keys and devices.
    pub directory: Arc<Directory>,
    /// Takes what devices send.
    pub acceptor: Arc<Acceptor>,
    /// Groups.
    pub groups: Arc<GroupService>,
    random: Arc<dyn Random>,
    /// How long acknowledgements are gathered before they are appended. Losing one only sends an envelope again.
    ack_delay: Duration,
    sessions: [Mutex<HashMap<DeviceAddr, Arc<Handle>>>; SHARDS],
    polls: Mutex<HashMap<DeviceAddr, Arc<Notify>>>,
    dirty_acks: Mutex<Vec<Arc<Handle>>>,
    acks_due: Notify,
    /// Ticks since the start, see [`TICK`].
    tick: AtomicU32,
    draining: AtomicBool,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hub({})", self.edge)
    }
}

/// Appends whose outcome nobody waits for: acknowledgements, detachments.
struct Unwatched;

impl AppendSink for Unwatched {
    fn done(&self, _token: u64, _outcome: Result<crate::ids::Offset, AppendError>) {}
}

impl Hub {
    /// A hub without sessions.
    pub fn new(
        log: Arc<dyn EventLog>,
        delivery: Arc<dyn DeliveryStore>,
        directory: Arc<Directory>,
        acceptor: Arc<Acceptor>,
        groups: Arc<GroupService>,
        random: Arc<dyn Random>,
        ack_delay: Duration,
    ) -> Self {
        Self {
            edge: groups.edge(),
            log,
            delivery,
            directory,
            acceptor,
            groups,
            random,
            ack_delay,
            sessions: std::array::from_fn(|_| Mutex::default()),
            polls: Mutex::default(),
            dirty_acks: Mutex::default(),
            acks_due: Notify::new(),
            tick: AtomicU32::new(0),
            draining: AtomicBool::new(false),
        }
    }

    fn shard(&self, device: &DeviceAddr) -> &Mutex<HashMap<DeviceAddr, Arc<Handle>>> {
        // Account ids are random, so one of their bytes spreads as well as any hash.
        &self.sessions[usize::from(device.account.as_bytes()[15]) % SHARDS]
    }

    /// Ticks since the start.
    pub fn tick(&self) -> u32 {
        self.tick.load(Ordering::Relaxed)
    }

    /// Whether the edge takes no new streams.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Registers a stream; the device's older one on this edge is told that it is over.
    pub fn open(&self, known: KnownDevice) -> Arc<Handle> {
        let device = known.addr;
        let handle = Arc::new(Handle::new(known, self.attach_id(), self.tick()));
        if let Some(older) = self.shard(&device).lock().insert(device, Arc::clone(&handle)) {
            older.close(CloseReason::Replaced);
        }
        metrics::observe_stream_opened();
        handle
    }

    fn attach_id(&self) -> AttachId {
        let mut bytes = [0; 8];
        self.random.fill(&mut bytes);
        AttachId(u64::from_le_bytes(bytes))
    }

    /// Forgets a stream, acknowledges what it acknowledged, and tells the projector.
    pub fn end(&self, handle: &Arc<Handle>) {
        let device = handle.device;
        let mut sessions = self.shard(&device).lock();
        if sessions.get(&device).is_some_and(|current| Arc::ptr_eq(current, handle)) {
            sessions.remove(&device);
        }
        drop(sessions);
        metrics::observe_stream_closed(handle.closing());
        self.groups.end(handle);
        self.append_ack(handle);
        self.submit(device, &InboxEvent::DeviceDetached { device, edge: self.edge, attach: handle.attach() });
    }

    fn submit(&self, device: DeviceAddr, event: &InboxEvent<'_>) -> bool {
        let sink: Arc<dyn AppendSink> = Arc::new(Unwatched);
        self.log.route(&device.account).and_then(|to| self.log.submit(to, event::encode(event), &sink, 0)).is_ok()
    }

    /// Asks for the switch from backlog to live. Durable when it returns, so the answer will come.
    pub async fn attach(&self, handle: &Handle) -> Result<(), AppendError> {
        let device = handle.device;
        let event = InboxEvent::DeviceAttached { device, edge: self.edge, attach: handle.attach() };
        self.log.append(self.log.route(&device.account)?, event::encode(&event)).await.map(|_| ())
    }

    /// The same for a stream whose feed was cut. Under a new number: what is still on its way for the old one comes too late.
    pub async fn attach_anew(&self, handle: &Handle) -> Result<(), AppendError> {
        handle.renew(self.attach_id());
        self.attach(handle).await
    }

    /// The device keeps everything up to `to`. Durable when it returns.
    pub async fn ack(&self, device: DeviceAddr, to: Seq) -> Result<(), AppendError> {
        self.log.append(self.log.route(&device.account)?, event::encode(&InboxEvent::Acked { device, cursor: to })).await.map(|_| ())
    }

    /// Notes that a session has an acknowledgement to append.
    pub fn ack_later(&self, handle: Arc<Handle>) {
        let mut dirty = self.dirty_acks.lock();
        dirty.push(handle);
        if dirty.len() == 1 {
            self.acks_due.notify_one();
        }
    }

    fn append_ack(&self, handle: &Handle) {
        if let Some(cursor) = handle.take_ack()
            && !self.submit(handle.device, &InboxEvent::Acked { device: handle.device, cursor })
        {
            handle.ack_failed();
        }
    }

    /// Appends acknowledgements as they come due; until `stop` turns true.
    pub async fn run_acks(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                () = self.acks_due.notified() => {}
            }
            tokio::time::sleep(self.ack_delay).await;
            let due = std::mem::take(&mut *self.dirty_acks.lock());
            for handle in due {
                self.append_ack(&handle);
            }
        }
    }

    /// Pings silent streams, closes dead and stuck ones; until `stop` turns true. One task for all streams: a timer
    /// for each would cost more than the streams themselves.
    pub async fn run_heartbeat(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut every = tokio::time::interval(TICK);
        loop {
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                _ = every.tick() => {}
            }
            let tick = self.tick.fetch_add(1, Ordering::Relaxed) + 1;
            for shard in &self.sessions {
                for handle in shard.lock().values() {
                    handle.on_tick(tick);
                }
            }
            if tick.is_multiple_of(limits::TIDY_TICKS) {
                self.acceptor.tidy();
                self.groups.tidy();
            }
        }
    }

    /// Takes no new streams and asks all to go, spread over `within`, so that their devices do not come back as one herd.
    /// Returns when all are gone or twice that time is over.
    pub async fn drain(&self, within: Duration) {
        self.draining.store(true, Ordering::Relaxed);
        let handles: Vec<Arc<Handle>> = self.sessions.iter().flat_map(|shard| shard.lock().values().cloned().collect::<Vec<_>>()).collect();
        // Evenly over half of the time: whoever takes them must not meet all of them at once.
        let step = Duration::from_millis(limits::DRAIN_STEP_MS);
        let steps = (within / 2).div_duration_f64(step).max(1.0);
        let begun = tokio::time::Instant::now();
        let (mut closed, count) = (0, handles.len());
        while closed < count {
            let passed = begun.elapsed().div_duration_f64(step) + 1.0;
            let due = ((count as f64 * passed / steps).ceil() as usize).min(count);
            handles[closed..due].iter().for_each(|handle| handle.close(CloseReason::Draining));
            closed = due;
            tokio::time::sleep(step).await;
        }
        drop(handles);
        let deadline = tokio::time::Instant::now() + within;
        while self.sessions.iter().any(|shard| !shard.lock().is_empty()) && tokio::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.groups.detach_all();
    }

    /// How long a client of a draining edge is told to wait: not all the same, for clients that add nothing of their own.
    pub fn drain_retry_ms(&self) -> u32 {
        let mut byte = [0; 1];
        self.random.fill(&mut byte);
        limits::DRAIN_RETRY_MS + limits::DRAIN_RETRY_MS * u32::from(byte[0]) / 256
    }

    /// How many streams are open.
    pub fn open_streams(&self) -> usize {
        self.sessions.iter().map(|shard| shard.lock().len()).sum()
    }

    /// Something to wait on until items are stored for the device. Hold it only while waiting.
    pub fn poll(self: &Arc<Self>, device: DeviceAddr) -> Poll {
        let notify = Arc::clone(self.polls.lock().entry(device).or_default());
        Poll { hub: Arc::clone(self), device, notify }
    }

    fn with_session(&self, device: &DeviceAddr, attach: Option<AttachId>, act: impl FnOnce(&Arc<Handle>)) {
        if let Some(handle) = self.shard(device).lock().get(device).filter(|handle| attach.is_none_or(|attach| attach == handle.attach())) {
            act(handle);
        }
    }

    fn general(&self, push: Push) {
        match push {
            Push::Item { .. } | Push::GroupItem { .. } => unreachable!("items are taken in runs by `deliver`, and never broadcast"),
            Push::Attached { device, attach, at, inbox } => self.with_session(&device, Some(attach), |handle| handle.attached(at, inbox)),
            Push::Replaced { device, attach } => self.with_session(&device, Some(attach), |handle| handle.close(CloseReason::Replaced)),
            Push::Revoked { device } => self.with_session(&device, None, |handle| handle.close(CloseReason::Revoked)),
            Push::Waiting { device } => {
                if let Some(notify) = self.polls.lock().get(&device) {
                    notify.notify_waiters();
                }
            }
            Push::Full { device, full } => self.acceptor.set_full(device, full),
            push @ (Push::GroupAttached { .. } | Push::GroupVerdict { .. }) => self.groups.pushed(push),
            Push::Verdict { request, verdict } => self.directory.complete(request.number, verdict),
            Push::AccountChanged { account } => {
                self.directory.invalidate(account);
                // Which device it was does not matter: each of the account's streams here is told.
                for number in 1..=u32::from(crate::ids::DeviceId::MAX) {
                    let device = crate::ids::DeviceId::new(number).expect("the loop stays in the range of device ids");
                    self.with_session(&DeviceAddr { account, device }, None, |handle| handle.account_changed());
                }
            }
        }
    }
}

#[async_trait]
impl PushBus for Hub {
    async fn push(&self, edge: EdgeId, batch: Vec<Push>) {
        if edge == self.edge {
            self.deliver(batch);
        }
    }

    async fn broadcast(&self, batch: Vec<Push>) {
        batch.into_iter().for_each(|push| self.general(push));
    }

    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>> {
        // What was pushed is in the sessions' queues: it can only be lost with the edge, and then its streams are over.
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Hub {
    /// What a projector pushed to this edge.
    pub fn deliver(&self, batch: Vec<Push>) {
        let mut touched: Vec<Arc<Handle>> = Vec::new();
        let mut group_items = Vec::new();
        for push in batch {
            match push {
                Push::Item { device, attach, after, item, trace } => self.with_session(&device, Some(attach), |handle| {
                    let trace = trace.and_then(|from| traces::follow(Step::Deliver, &from));
                    if handle.push(FeedItem { after, item, trace }) {
                        touched.push(Arc::clone(handle));
                    }
                }),
                Push::GroupItem { group, item, roster } => group_items.push(Arrived { group, item, roster }),
                // Behind the items that came before it: an attachment is met in their order.
                push @ Push::GroupAttached { .. } => {
                    self.groups.deliver(std::mem::take(&mut group_items), &mut touched);
                    self.general(push);
                }
                other => self.general(other),
            }
        }
        self.groups.deliver(group_items, &mut touched);
        for handle in touched {
            handle.wake();
        }
    }

    /// Pushes may have been lost on their way to this edge: every stream attaches anew, and what is cached of accounts may have changed.
    pub fn cut_all(&self) {
        self.directory.invalidate_all();
        self.groups.cut_all();
        for shard in &self.sessions {
            for handle in shard.lock().values() {
                handle.cut();
            }
        }
    }
}

/// A long-poll's place; leaves nothing behind.
#[derive(Debug)]
pub struct Poll {
    hub: Arc<Hub>,
    device: DeviceAddr,
    notify: Arc<Notify>,
}

impl Poll {
    /// Ends at the next wake-up behind this call.
    pub fn woken(&self) -> tokio::sync::futures::Notified<'_> {
        self.notify.notified()
    }
}

impl Drop for Poll {
    fn drop(&mut self) {
        let mut polls = self.hub.polls.lock();
        // Two: the map's and this one's.
        if Arc::strong_count(&self.notify) <= 2 {
            polls.remove(&self.device);
        }
    }
}

impl crate::keys::LowWater for Hub {
    fn prekeys_low(&self, device: DeviceAddr, left: crate::keys::Counts) {
        self.with_session(&device, None, |handle| handle.prekeys_low(left.ec as u32, left.pq as u32));
    }

    fn key_packages_low(&self, device: DeviceAddr, left: usize) {
        self.with_session(&device, None, |handle| handle.key_packages_low(left as u32));
    }
}
