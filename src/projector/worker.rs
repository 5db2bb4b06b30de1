//! The worker around [`Projection`]: consume → apply → push, and write behind the log in coalescing windows.
//!
//! The invariant that makes a crash harmless: a committed position never covers an event whose effect is not in the
//! same write or an earlier one. What is in the store early does no harm when its event is applied again: an item puts the same row,
//! inboxes and marks say themselves which events they hold.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::clock::Clock;
use crate::ids::{AccountId, DeviceAddr, Offset, Partition, Seq};
use crate::limits;
use crate::log::{AppendError, Consumed, Consumer, EventLog, ReadError, Record, Topic, TopicPartition};
use crate::metadata;
use crate::metrics;
use crate::projector::apply::{Needs, Projection, Step};
use crate::projector::behind::{Behind, Job, retry};
use crate::projector::directory;
use crate::projector::groups::gone;
use crate::projector::push::{Push, PushBus, push_all};
use crate::projector::recording::Recording;
use crate::store::groups::GroupStore;
use crate::store::{DeliveryStore, DeliveryWrite, DirectoryStore, KeyStore, MarkKey, StoreError};
use crate::traces::{self, Span};
use crate::wire::event::{self, DirectoryCommand, InboxEvent, ReceiptKind, TraceContext};

mod appending;
mod flushing;
mod scaling;

pub(super) use appending::{append, append_for};

/// The consumer group of the projectors.
pub const GROUP: &str = "projector";

/// Why a projector stopped. It is safe to start one again: it goes on from the stored position.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// Reading the log failed.
    #[error("the projector can't read the log: {0}")]
    Read(#[from] ReadError),
    /// The store is damaged, or failed for longer than the projector waits.
    #[error("the projector can't use the store: {0}")]
    Store(#[from] StoreError),
    /// A follow-up event could not be appended.
    #[error("the projector can't append to the log: {0}")]
    Append(#[from] AppendError),
    /// A record is not an event.
    #[error("record {offset:?} of {topic} partition {partition:?}: {source}")]
    Decode {
        /// Where.
        topic: &'static str,
        /// Where.
        partition: Partition,
        /// Where.
        offset: Offset,
        /// Why.
        source: event::DecodeError,
    },
}

/// How the worker paces its writes.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How long an envelope of an attached device may be in memory only.
    pub window: Duration,
    /// How soon items of devices without a stream are readable by polls, and receipts leave.
    pub soon: Duration,
    /// How often expired envelopes are looked for.
    pub expiry: Duration,
    /// Over how many windows the writing of dedupe marks is spread. A position waits for all that it covers, so a projector that takes
    /// over applies the records of up to twice as many windows again.
    pub mark_windows: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(limits::WINDOW_MS),
            soon: Duration::from_millis(limits::RECEIPT_DELAY_MS),
            expiry: Duration::from_secs(3600),
            mark_windows: 1,
        }
    }
}

/// What the worker works with.
#[derive(Clone)]
pub struct Parts {
    /// The log.
    pub log: Arc<dyn EventLog>,
    /// Where pending items go.
    pub delivery: Arc<dyn DeliveryStore>,
    /// Where accounts go.
    pub directory: Arc<dyn DirectoryStore>,
    /// Which groups hear of devices that are no more.
    pub groups: Arc<dyn GroupStore>,
    /// What goes with a deleted account.
    pub keys: Arc<dyn KeyStore>,
    /// The way to the edges.
    pub bus: Arc<dyn PushBus>,
    /// For expiry.
    pub clock: Arc<dyn Clock>,
}

impl Parts {
    fn positions(&self) -> Positions {
        let (delivery, directory, groups) = (Arc::clone(&self.delivery), Arc::clone(&self.directory), Arc::clone(&self.groups));
        Positions { delivery, directory, groups }
    }
}

/// How far a worker is; for readiness and metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Partitions were assigned, and what was on the log at that time has been applied.
    pub caught_up: bool,
    /// Records applied so far.
    pub applied: u64,
    /// The next offsets of the owned partitions of `inbox`, together: how far it is, as the log's ends are where it should be.
    pub met: u64,
}

/// Marks that are being written, and what is covered once they are.
struct Trail {
    positions: Vec<(TopicPartition, Offset)>,
    /// Marks to write in each window.
    slice: usize,
    /// Records applied when it began.
    applied: u64,
}

struct Owned {
    next: Offset,
    /// Where the log ended when the partition was assigned.
    end_at_start: Offset,
}

/// One projector. Owns the partitions that its consumer is assigned.
pub struct Worker {
    parts: Parts,
    pace: Pace,
    projection: Projection,
    owned: BTreeMap<TopicPartition, Owned>,
    behind: Behind,
    /// Receipts and metadata on their way to the log since the last flush.
    receipts: Vec<JoinHandle<Result<(), AppendError>>>,
    /// The traced ones of the records under way.
    traced: Vec<Span>,
    moved: bool,
    trail: Option<Trail>,
    /// Assigned partitions of a new generation, until what their accounts had before is in the store.
    waiting: BTreeSet<TopicPartition>,
    /// Partitions of an old generation in which this worker has set a fence.
    fenced: BTreeSet<TopicPartition>,
    /// Partitions that this worker said to be drained.
    drained: BTreeSet<Partition>,
    window_ends: Option<Instant>,
    soon_at: Option<Instant>,
    progress: watch::Sender<Progress>,
    /// Records before these were applied to an earlier view: what followed from them is on the log already.
    quiet_before: HashMap<TopicPartition, Offset>,
    /// Topic `metadata`, if it is written.
    recording: Option<Recording>,
    /// It makes a view that nobody looks at yet: whatever else follows from an event is the live projectors' to do.
    shadow: bool,
    /// Until it has caught up for the first time: partitions that wait for others count, too.
    whole: bool,
    /// Views that may be further than this one: what they hold was said already.
    beside: Vec<Positions>,
}

/// Where the applied positions of a view are.
#[derive(Clone)]
pub struct Positions {
    /// Those of `inbox`.
    pub delivery: Arc<dyn DeliveryStore>,
    /// Those of `directory`.
    pub directory: Arc<dyn DirectoryStore>,
    /// Those of `groups`.
    pub groups: Arc<dyn GroupStore>,
}

impl Positions {
    /// Of a view that is one store.
    pub fn in_one<S: DeliveryStore + DirectoryStore + GroupStore + 'static>(store: &Arc<S>) -> Self {
        Self { delivery: store.clone(), directory: store.clone(), groups: store.clone() }
    }

    /// The next record to apply.
    pub async fn of(&self, tp: TopicPartition) -> Result<Offset, StoreError> {
        match tp.topic {
            Topic::Directory => self.directory.directory_position(tp.partition).await,
            Topic::Groups => self.groups.group_position(tp.partition).await,
            _ => self.delivery.position(tp.partition).await,
        }
    }
}

impl Worker {
    /// A worker that owns nothing yet. Call within a runtime.
    pub fn new(parts: Parts, pace: Pace) -> (Self, watch::Receiver<Progress>) {
        let (progress, receiver) = watch::channel(Progress::default());
        parts.bus.begin();
        let worker = Self {
            behind: Behind::start(Arc::clone(&parts.delivery), Arc::clone(&parts.bus)),
            receipts: Vec::new(),
            parts,
            pace,
            projection: Projection::default(),
            owned: BTreeMap::new(),
            traced: Vec::new(),
            moved: false,
            trail: None,
            waiting: BTreeSet::new(),
            fenced: BTreeSet::new(),
            drained: BTreeSet::new(),
            window_ends: None,
            soon_at: None,
            progress,
            quiet_before: HashMap::new(),
            recording: None,
            shadow: false,
            whole: false,
            beside: Vec::new(),
        };
        (worker, receiver)
    }

    /// Appends nothing for records before these positions: a rebuild must not tell senders again what they were told.
    pub fn quiet_before(mut self, positions: HashMap<TopicPartition, Offset>) -> Self {
        self.quiet_before = positions;
        self
    }

    /// Makes a view beside the live one: appends nothing, whatever happens.
    pub const fn shadow(mut self) -> Self {
        self.shadow = true;
        self
    }

    /// Has caught up only when what waits for older generations of partitions is applied as well: for who has all of them.
    pub const fn whole(mut self) -> Self {
        self.whole = true;
        self
    }

    /// Appends nothing for what one of these views holds when a partition is assigned.
    pub fn beside(mut self, views: Vec<Positions>) -> Self {
        self.beside = views;
        self
    }

    /// Writes topic `metadata`, if there are keys for it.
    pub fn recording(mut self, keys: Option<&metadata::Keys>) -> Self {
        self.recording = keys.map(|keys| Recording::new(keys, Arc::clone(&self.parts.log)));
        self.projection.steps = keys.map(|_| Vec::new());
        self
    }

    fn is_quiet(&self, tp: TopicPartition, record: &Record) -> bool {
        self.shadow || self.quiet_before.get(&tp).is_some_and(|before| record.offset < *before)
    }

    /// Works until `stop` turns true, then flushes. Returns early only with an error.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<(), WorkerError> {
        let mut consumer = self.parts.log.consumer(GROUP, &[Topic::Directory, Topic::Inbox]).await?;
        let mut expire_at = Instant::now() + self.pace.expiry.min(Duration::from_secs(60));
        let mut look_at = Instant::now();
        loop {
            let due = [self.window_ends, self.soon_at].into_iter().flatten().min().unwrap_or(expire_at).min(expire_at).min(look_at);
            tokio::select! {
                biased;
                () = async { let _ = stop.wait_for(|stop| *stop).await; } => break,
                () = tokio::time::sleep_until(due) => {}
                consumed = consumer.next() => self.consumed(consumed?, consumer.as_mut()).await?,
            }
            let now = Instant::now();
            if self.soon_at.is_some_and(|at| at <= now) {
                self.soon().await?;
            }
            if self.window_ends.is_some_and(|at| at <= now) || self.projection.fresh_bytes() > limits::WINDOW_BYTES {
                self.flush(consumer.as_mut()).await?;
            }
            if look_at <= now {
                look_at = now + Duration::from_millis(limits::LAYOUT_LOOK_MS);
                self.look_at_layout(consumer.as_mut()).await?;
            }
            if expire_at <= now {
                expire_at = now + self.pace.expiry;
                self.expire().await?;
            }
        }
        self.flush_now(consumer.as_mut()).await
    }

    /// Applies everything that is on the log now, flushes and returns how many records that were. For `sealpost rebuild`.
    pub async fn catch_up(mut self, on_progress: impl Fn(u64)) -> Result<u64, WorkerError> {
        let mut consumer = self.parts.log.consumer(GROUP, &[Topic::Directory, Topic::Inbox]).await?;
        let mut look_at = Instant::now();
        while !self.progress.borrow().caught_up {
            tokio::select! {
                consumed = consumer.next() => self.consumed(consumed?, consumer.as_mut()).await?,
                () = tokio::time::sleep_until(look_at) => {}
            }
            if look_at <= Instant::now() {
                look_at = Instant::now() + Duration::from_millis(limits::LAYOUT_LOOK_MS);
                self.look_at_layout(consumer.as_mut()).await?;
            }
            if self.projection.fresh_bytes() > limits::WINDOW_BYTES / 4 {
                self.flush(consumer.as_mut()).await?;
            }
            on_progress(self.progress.borrow().applied);
        }
        self.flush_now(consumer.as_mut()).await?;
        let applied = self.progress.borrow().applied;
        Ok(applied)
    }

    async fn consumed(&mut self, consumed: Consumed, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        match consumed {
            Consumed::Assigned(partitions) => {
                self.assigned(partitions, consumer).await?;
            }
            Consumed::Revoked(partitions) => {
                self.flush_now(consumer).await?;
                for tp in partitions {
                    self.owned.remove(&tp);
                    self.waiting.remove(&tp);
                    self.fenced.remove(&tp);
                    if tp.topic == Topic::Inbox {
                        let layout = self.parts.log.layout();
                        self.projection.forget(|account| layout.held(tp.partition, account));
                    }
                }
            }
            Consumed::Records(batches) => {
                let (mut records, begun) = (0, Instant::now());
                for (tp, batch) in batches {
                    records += batch.len() as u64;
                    match tp.topic {
                        Topic::Directory => self.directory(tp, &batch).await?,
                        _ => self.inbox(tp, &batch, consumer).await?,
                    }
                    if let (Some(last), Some(owned)) = (batch.last(), self.owned.get_mut(&tp)) {
                        owned.next = last.offset.next();
                    }
                }
                self.moved = true;
                self.send_pushes().await;
                self.traced.drain(..).for_each(Span::end);
                self.arm();
                metrics::observe_applied(records, begun.elapsed());
                self.progress.send_modify(|progress| progress.applied += records);
            }
        }
        self.say_progress(consumer).await
    }

    async fn say_progress(&mut self, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        metrics::observe_owned(self.owned.len() + self.waiting.len());
        let layout = self.parts.log.layout();
        // Those that are made and were never opened wait for nothing.
        let is_opened = |tp: &TopicPartition| layout.generation_of(tp.partition).is_some();
        let waits = (self.shadow || self.whole) && self.waiting.iter().any(is_opened);
        let caught_up = !self.owned.is_empty() && !waits && self.owned.values().all(|owned| owned.next >= owned.end_at_start);
        if caught_up && self.projection.replaying {
            // Rows that were written early before a crash are counted from here on.
            self.flush_now(consumer).await?;
        }
        self.projection.replaying = !caught_up;
        self.whole &= !caught_up;
        let met = self.owned.iter().filter(|(tp, _)| tp.topic == Topic::Inbox).map(|(_, owned)| owned.next.0).sum();
        self.progress.send_if_modified(|progress| {
            let before = std::mem::replace(progress, Progress { caught_up, met, ..*progress });
            before != *progress
        });
        Ok(())
    }

    fn arm(&mut self) {
        let now = Instant::now();
        self.window_ends.get_or_insert(now + self.pace.window);
        if self.projection.has_waiting() || self.projection.has_receipts() {
            self.soon_at.get_or_insert(now + self.pace.soon);
        }
    }

    async fn inbox(&mut self, tp: TopicPartition, batch: &[Record], consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        let mut rest = batch;
        while !rest.is_empty() && !self.is_past(tp.partition) {
            let Some(fence) = self.apply(tp, rest).await? else { return Ok(()) };
            self.drain(tp, rest[fence].offset, consumer).await?;
            rest = &rest[fence + 1..];
        }
        self.pass_on(tp, rest).await
    }

    /// Applies records up to a fence, and says where that is if there is one.
    async fn apply(&mut self, tp: TopicPartition, batch: &[Record]) -> Result<Option<usize>, WorkerError> {
        let generation = self.parts.log.layout().generation_of(tp.partition).unwrap_or_default();
        let mut events = Vec::with_capacity(batch.len());
        let mut needs = Needs::default();
        let mut fence = None;
        for (at, record) in batch.iter().enumerate() {
            let event: InboxEvent<'_> = event::decode(&record.payload).map_err(|source| undecodable(tp, record, source))?;
            self.projection.needs(&event, &mut needs);
            match event {
                // Streams say the gap from now on; pages, which read the store, should not show for much longer what expired.
                InboxEvent::Expired { .. } => {
                    let soon = Instant::now() + self.pace.soon;
                    self.window_ends = Some(self.window_ends.map_or(soon, |at| at.min(soon)));
                }
                InboxEvent::Fence { generation: next } if next > generation => {
                    fence = Some(at);
                    break;
                }
                _ => {}
            }
            let trace = event::trace(&record.payload).and_then(|from| traces::follow(traces::Step::Apply, &from));
            events.push((record, event, trace));
        }
        if !needs.is_empty() {
            self.load(needs).await?;
        }
        for (record, event, trace) in events {
            let pushed = self.projection.pushes.len();
            let at = Seq::at(generation, record.offset);
            if let Some(step) = self.projection.apply(at, event, &record.payload) {
                self.step(step).await?;
            }
            if let Some(trace) = trace {
                self.trace_pushes(pushed, &trace.context());
                self.traced.push(trace);
            }
            let quiet = self.is_quiet(tp, record);
            if quiet {
                self.projection.take_receipts();
            }
            if let (Some(recording), Some(steps)) = (&mut self.recording, &mut self.projection.steps) {
                if quiet {
                    steps.clear();
                }
                recording.add(tp, record.appended, steps);
            }
        }
        self.record().await?;
        Ok(fence)
    }

    /// The items from the `from`th push on belong to a traced message.
    fn trace_pushes(&mut self, from: usize, context: &TraceContext) {
        for (_, push) in self.projection.pushes.iter_mut().skip(from) {
            if let Push::Item { trace, .. } = push {
                *trace = Some(Box::new(*context));
            }
        }
    }

    /// Metadata goes to the log in batches, which a position waits for as it does for receipts.
    async fn record(&mut self) -> Result<(), WorkerError> {
        let Some(recording) = &mut self.recording else { return Ok(()) };
        self.receipts.extend(recording.send(false));
        if recording.is_ahead() {
            recording.settled();
            for append in self.receipts.drain(..) {
                append.await.unwrap_or(Err(AppendError::Closed))?;
            }
        }
        Ok(())
    }

    async fn load(&mut self, mut needs: Needs) -> Result<(), WorkerError> {
        self.behind.settle_forgotten().await?;
        if !needs.inboxes.is_empty() {
            let devices: Vec<DeviceAddr> = needs.inboxes.into_iter().collect();
            let states = retry(|| self.parts.delivery.inboxes(devices.clone())).await?;
            for (device, state) in devices.into_iter().zip(states) {
                self.projection.load_inbox(device, state);
            }
        }
        // A recipient's first message reads the marks of all who wrote to it, so that the next new sender costs no read.
        let untried = |key: &MarkKey| self.projection.has_marks_of(&key.recipient).is_none();
        let recipients: HashSet<AccountId> = needs.marks.iter().filter(|key| untried(key)).map(|key| key.recipient).collect();
        let delivery = &self.parts.delivery;
        let read = |recipient| async move {
            let marks = retry(|| delivery.marks_of(recipient, limits::WHOLE_MARKS)).await?;
            Ok::<_, WorkerError>((recipient, marks))
        };
        for (recipient, marks) in futures_util::future::try_join_all(recipients.into_iter().map(read)).await? {
            self.projection.load_marks_of(recipient, marks);
        }
        needs.marks.retain(|key| self.projection.has_marks_of(&key.recipient) != Some(true));
        if !needs.marks.is_empty() {
            let keys: Vec<MarkKey> = needs.marks.into_iter().collect();
            let marks = retry(|| self.parts.delivery.marks(keys.clone())).await?;
            for (key, mark) in keys.into_iter().zip(marks) {
                self.projection.load_mark(key, mark);
            }
        }
        Ok(())
    }

    async fn step(&mut self, step: Step) -> Result<(), WorkerError> {
        match step {
            Step::SettleStored { device, after, to, kind } => self.settle_stored(device, after, to, kind).await,
            // Nobody waits for it, and no stream reads this view.
            Step::Attach { .. } if self.shadow => Ok(()),
            Step::Attach { device, edge, attach, at } => {
                let mut write = DeliveryWrite::default();
                self.projection.take_fresh(device, &mut write);
                if !write.is_empty() {
                    self.behind.queue(Job { write, ..Job::default() }).await?;
                }
                // The stream reads the store next.
                self.behind.settle().await?;
                let inbox = self.projection.inbox(&device).map(|inbox| inbox.state).unwrap_or_default();
                self.projection.pushes.push((edge, Push::Attached { device, attach, at, inbox }));
                Ok(())
            }
        }
    }

    async fn settle_stored(&mut self, device: DeviceAddr, after: Seq, to: Seq, kind: ReceiptKind) -> Result<(), WorkerError> {
        self.behind.settle().await?;
        let mut from = after;
        loop {
            let delivery = &self.parts.delivery;
            let page = retry(|| delivery.pending(device, from, to, limits::INBOX_PAGE_ITEMS * 4, limits::INBOX_PAGE_BYTES)).await?;
            let Some(last) = page.last() else { break };
            from = last.seq;
            self.projection.settle_stored(device, to, kind, &page);
        }
        Ok(())
    }

    /// The order is that of `projector::directory`: a crash repeats steps and loses none.
    async fn directory(&mut self, tp: TopicPartition, batch: &[Record]) -> Result<(), WorkerError> {
        let (quiet, fresh) = batch.split_at(batch.partition_point(|record| self.is_quiet(tp, record)));
        self.commands(tp, quiet, true).await?;
        self.commands(tp, fresh, false).await
    }

    async fn commands(&mut self, tp: TopicPartition, batch: &[Record], quiet: bool) -> Result<(), WorkerError> {
        let Some(last) = batch.last() else { return Ok(()) };
        let decode = |record: &Record| {
            let command = event::decode_owned(&record.payload).map_err(|source| undecodable(tp, record, source))?;
            Ok((record.offset, command))
        };
        let commands = batch.iter().map(decode).collect::<Result<Vec<(Offset, DirectoryCommand)>, WorkerError>>()?;
        let parts = &self.parts;
        let mut plan = retry(|| directory::plan(parts.directory.as_ref(), tp.partition, last.offset.next(), &commands)).await?;
        if quiet {
            // What follows from these happened before: only the view is made anew.
            return Ok(retry(|| plan.commit_view(parts.directory.as_ref())).await?);
        }
        for (account, event) in plan.inbox_events() {
            append_for(parts.log.as_ref(), &account, event::encode(&event)).await?;
        }
        gone::tell(parts, last.appended, &plan).await?;
        if let Some(recording) = &mut self.recording {
            // Their time is the command's own.
            recording.add(tp, last.appended, &mut plan.steps);
            if let Some(append) = recording.send(true) {
                append.await.unwrap_or(Err(AppendError::Closed))?;
            }
        }
        retry(|| plan.commit(parts.directory.as_ref(), parts.keys.as_ref())).await?;
        // Once more, for who came into a group meanwhile: from here on nobody gets its KeyPackages.
        gone::tell(parts, last.appended, &plan).await?;
        self.projection.broadcasts.extend(plan.changed().map(|account| Push::AccountChanged { account }));
        for outcome in plan.outcomes {
            if let Some(request) = outcome.reply_to {
                self.projection.pushes.push((request.edge, Push::Verdict { request, verdict: outcome.verdict }));
            }
        }
        Ok(())
    }

    async fn send_pushes(&mut self) {
        if !self.projection.broadcasts.is_empty() {
            self.parts.bus.broadcast(std::mem::take(&mut self.projection.broadcasts)).await;
        }
        if self.projection.pushes.is_empty() {
            return;
        }
        let (count, begun) = (self.projection.pushes.len() as u64, Instant::now());
        push_all(self.parts.bus.as_ref(), self.projection.pushes.drain(..)).await;
        metrics::observe_pushes(count, begun.elapsed());
    }
}

pub(super) fn undecodable(tp: TopicPartition, record: &Record, source: event::DecodeError) -> WorkerError {
    WorkerError::Decode { topic: tp.topic.name(), partition: tp.partition, offset: record.offset, source }
}
