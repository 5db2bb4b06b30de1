//! The worker around [`super::apply`]: consume → apply → write → tell.
//!
//! There is no coalescing window: what is pushed can be read. The order of a batch, and what a crash in between leaves:
//!
//! 1. everything but heads, snapshots and position is written, if there are invitations or follow-ups (else it goes with the heads);
//! 2. invitations and follow-ups are appended: a crash before the heads applies the events again, and appends them twice at worst;
//! 3. heads and snapshots are written: from here on a replay only tells again;
//! 4. pushes go out;
//! 5. once they and the records of topic `metadata` are safe, with the next batch or a little later, the position is written.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, try_join_all};
use prost::Message as _;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::apply::{self, Effects, Group, Invitation, Met, Tools};
use super::saved::State;
use super::stating::Stating;
use crate::clock::{Clock, Random, UnixMillis};
use crate::ids::{AccountId, DeviceAddr, Generation, GroupId, Offset, Partition, Seq};
use crate::limits;
use crate::log::{AppendError, Consumed, Consumer, EventLog, Record, Topic, TopicPartition};
use crate::metadata;
use crate::metrics;
use crate::mls::sender::ServerKey;
use crate::projector::apply::FROM_SERVER;
use crate::projector::behind::retry;
use crate::projector::push::{PushBus, push_all};
use crate::projector::recording::Recording;
use crate::projector::worker::{Progress, WorkerError, append, append_for, undecodable};
use crate::store::groups::{GroupItemKind, GroupStore, GroupWrite};
use crate::store::seal::{Context, OVERHEAD, SealKey, Sealer};
use crate::store::{KeyStore, StoreError};
use crate::wire::event::{self, EnvelopesAccepted, InboxEvent, SealedEnvelope, flags};
use crate::wire::group_event::{GroupEvent, GroupEventBody};
use crate::wire::stream;

/// The consumer group of the projectors of groups.
pub const GROUP: &str = "groups";
/// After so much checking what was decided is written and told, also in the middle of a batch.
const SLICE: Duration = Duration::from_millis(20);
/// How long a position may wait for the next batch.
const POSITION_DELAY: Duration = Duration::from_millis(500);
/// Store reads at once.
const READS_AT_ONCE: usize = 64;
/// Items read at once where a crash may have left some ahead.
const STORED_PAGE: usize = 1_024;

/// How often a worker looks at what time does.
#[derive(Debug, Clone, Copy)]
pub struct Looks {
    /// After its start, for the first time.
    pub first: Duration,
    /// For items that expired.
    pub expiry: Duration,
    /// For groups whose state is old ([`limits::GROUP_WALK_MS`]).
    pub states: Duration,
}

impl Default for Looks {
    fn default() -> Self {
        Self { first: Duration::from_secs(60), expiry: Duration::from_secs(3600), states: Duration::from_millis(limits::GROUP_WALK_MS) }
    }
}

/// What the worker works with.
#[derive(Clone)]
pub struct Parts {
    /// The log.
    pub log: Arc<dyn EventLog>,
    /// Where groups are kept.
    pub groups: Arc<dyn GroupStore>,
    /// The accounts' at-rest keys, for invitations.
    pub keys: Arc<dyn KeyStore>,
    /// The way to the edges.
    pub bus: Arc<dyn PushBus>,
    /// For expiry.
    pub clock: Arc<dyn Clock>,
    /// For sealing.
    pub random: Arc<dyn Random>,
    /// The server's voice in groups, if it has one.
    pub key: Option<Arc<ServerKey>>,
}

impl Parts {
    /// Puts each added device's invitation into its account's inbox; devices of one account share a record.
    async fn invite(&self, invitations: Vec<Invitation>) -> Result<(), WorkerError> {
        let mut by_account: BTreeMap<(Seq, AccountId), Vec<Invitation>> = BTreeMap::new();
        for invitation in invitations {
            by_account.entry((invitation.seq, invitation.device.account)).or_default().push(invitation);
        }
        let by_account: Vec<_> = by_account.into_iter().collect();
        for chunk in by_account.chunks(READS_AT_ONCE) {
            try_join_all(chunk.iter().map(|((_, account), invitations)| self.invite_account(*account, invitations))).await?;
        }
        Ok(())
    }

    async fn invite_account(&self, account: AccountId, invitations: &[Invitation]) -> Result<(), WorkerError> {
        let Some(first) = invitations.first() else { return Ok(()) };
        let (keys, random) = (&self.keys, self.random.as_ref());
        let fresh = SealKey::random(random);
        let Some(key) = retry(|| keys.seal_key(account, Some(fresh.clone()))).await? else {
            // Deleted between the request for its KeyPackages and the commit: it goes out of the group again.
            let devices = invitations.iter().map(|invitation| invitation.device).collect();
            let body = GroupEventBody::DevicesGone { devices };
            return Ok(append_group(self.log.as_ref(), first.group, self.clock.now(), body).await?);
        };
        let sealer = Sealer::new(&key);
        let sealed: Vec<Vec<u8>> = invitations.iter().map(|invitation| seal(&sealer, invitation, random)).collect();
        let accepted = EnvelopesAccepted {
            recipient: account,
            sender: first.by,
            client_message_id: FROM_SERVER,
            accepted: first.accepted,
            flags: flags::URGENT,
            envelopes: invitations
                .iter()
                .zip(&sealed)
                .map(|(invitation, sealed)| SealedEnvelope {
                    device: invitation.device.device,
                    kind: stream::EnvelopeType::Mls as u8,
                    sealed,
                })
                .collect(),
        };
        Ok(append_for(self.log.as_ref(), &account, event::encode(&InboxEvent::EnvelopesAccepted(accepted))).await?)
    }
}

pub(super) struct Owned {
    pub(super) next: Offset,
    /// Where the log ended when the partition was assigned.
    end_at_start: Offset,
}

/// A position that is written once the pushes that it covers are safe.
struct Position {
    next: BTreeMap<Partition, Offset>,
    settled: BoxFuture<'static, Result<(), AppendError>>,
    due: Instant,
}

/// One projector of groups. Owns the partitions that its consumer is assigned.
pub struct Worker {
    pub(super) parts: Parts,
    pub(super) owned: BTreeMap<Partition, Owned>,
    pub(super) groups: HashMap<GroupId, Kept>,
    /// What the groups in memory cost.
    bytes: usize,
    /// Batches so far: what was not used for long goes first.
    turn: u64,
    position: Option<Position>,
    progress: watch::Sender<Progress>,
    /// Records before these were applied to an earlier view: what followed from them is on the log already.
    quiet_before: HashMap<Partition, Offset>,
    /// It makes a view that nobody looks at yet.
    pub(super) shadow: bool,
    looks: Looks,
    /// Topic `metadata`, if it is written, and what is on its way there: a position is written behind it.
    recording: Option<Recording>,
    recorded: Vec<JoinHandle<Result<(), AppendError>>>,
    pub(super) stating: Stating,
}

pub(super) struct Kept {
    pub(super) group: Option<Group>,
    cost: usize,
    used: u64,
}

impl Worker {
    /// A worker that owns nothing yet.
    pub fn new(parts: Parts) -> (Self, watch::Receiver<Progress>) {
        let (progress, receiver) = watch::channel(Progress::default());
        let worker = Self {
            parts,
            owned: BTreeMap::new(),
            groups: HashMap::new(),
            bytes: 0,
            turn: 0,
            position: None,
            progress,
            quiet_before: HashMap::new(),
            shadow: false,
            looks: Looks::default(),
            recording: None,
            recorded: Vec::new(),
            stating: Stating::default(),
        };
        (worker, receiver)
    }

    /// Appends nothing for records before these positions: a rebuild must not invite again.
    pub fn quiet_before(mut self, positions: HashMap<Partition, Offset>) -> Self {
        self.quiet_before = positions;
        self
    }

    /// Makes a view beside the live one: appends nothing, whatever happens.
    pub const fn shadow(mut self) -> Self {
        self.shadow = true;
        self
    }

    /// Writes topic `metadata`.
    pub fn recording(mut self, keys: Option<&metadata::Keys>) -> Self {
        self.recording = keys.map(|keys| Recording::new(keys, Arc::clone(&self.parts.log)));
        self
    }

    /// Looks at what time does as often as this.
    pub const fn looking(mut self, looks: Looks) -> Self {
        self.looks = looks;
        self
    }

    /// Works until `stop` turns true, then writes its position. Returns early only with an error.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> Result<(), WorkerError> {
        let mut consumer = self.parts.log.consumer(GROUP, &[Topic::Groups]).await?;
        let mut expire_at = Instant::now() + self.looks.first;
        let mut walk_at = expire_at;
        loop {
            let position = self.position.as_ref().map(|position| position.due);
            let due = position.into_iter().chain(self.stating.due()).fold(expire_at.min(walk_at), Instant::min);
            tokio::select! {
                biased;
                () = async { let _ = stop.wait_for(|stop| *stop).await; } => break,
                () = tokio::time::sleep_until(due) => {}
                consumed = consumer.next() => self.consumed(consumed?, consumer.as_mut()).await?,
            }
            let now = Instant::now();
            if self.position.as_ref().is_some_and(|position| position.due <= now) {
                self.write_position(consumer.as_mut()).await?;
            }
            if expire_at <= now {
                expire_at = now + self.looks.expiry;
                self.expire().await?;
            }
            if walk_at <= now {
                walk_at = now + self.looks.states;
                self.begin_walk().await?;
            }
            self.say_states().await?;
        }
        self.write_position(consumer.as_mut()).await
    }

    /// Applies everything that is on the log now and returns how many records that were. For `sealpost rebuild`.
    pub async fn catch_up(mut self) -> Result<u64, WorkerError> {
        let mut consumer = self.parts.log.consumer(GROUP, &[Topic::Groups]).await?;
        while !self.progress.borrow().caught_up {
            self.consumed(consumer.next().await?, consumer.as_mut()).await?;
        }
        self.write_position(consumer.as_mut()).await?;
        let applied = self.progress.borrow().applied;
        Ok(applied)
    }

    async fn consumed(&mut self, consumed: Consumed, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        match consumed {
            Consumed::Assigned(partitions) => {
                for tp in partitions {
                    let groups = &self.parts.groups;
                    let next = retry(|| groups.group_position(tp.partition)).await?;
                    let (earliest, end) = self.parts.log.bounds(tp).await?;
                    if next < earliest && next > Offset(0) {
                        tracing::error!(
                            "records of groups were removed before the projector applied them; members will have to join again"
                        );
                    }
                    let next = next.max(earliest);
                    consumer.seek(tp, next).await?;
                    self.owned.insert(tp.partition, Owned { next, end_at_start: end });
                }
            }
            Consumed::Revoked(partitions) => {
                self.write_position(consumer).await?;
                let gone: BTreeSet<Partition> = partitions.iter().map(|tp| tp.partition).collect();
                self.owned.retain(|partition, _| !gone.contains(partition));
                let count = self.parts.log.partitions(Topic::Groups);
                self.groups.retain(|id, _| !gone.contains(&Partition::of_group(id, count)));
                self.bytes = self.groups.values().map(|kept| kept.cost).sum();
            }
            Consumed::Records(batches) => {
                for (tp, batch) in batches {
                    let begun = Instant::now();
                    self.batch(tp, &batch).await?;
                    metrics::observe_group_events(batch.len() as u64, begun.elapsed());
                    self.progress.send_modify(|progress| progress.applied += batch.len() as u64);
                }
            }
        }
        let caught_up = !self.owned.is_empty() && self.owned.values().all(|owned| owned.next >= owned.end_at_start);
        let met = self.owned.values().map(|owned| owned.next.0).sum();
        self.progress.send_if_modified(|progress| {
            let before = std::mem::replace(progress, Progress { caught_up, met, ..*progress });
            before != *progress
        });
        Ok(())
    }

    async fn batch(&mut self, tp: TopicPartition, batch: &[Record]) -> Result<(), WorkerError> {
        let mut events: Vec<GroupEvent<'_>> = Vec::with_capacity(batch.len());
        for record in batch {
            events.push(event::decode(&record.payload).map_err(|source| undecodable(tp, record, source))?);
        }
        self.turn += 1;
        self.load(batch, &events).await?;
        let mut rest = batch.iter().zip(&events).peekable();
        while rest.peek().is_some() {
            let (mut effects, begun, mut touched) = (Effects::default(), std::time::Instant::now(), BTreeSet::new());
            let mut last = Offset(0);
            while let Some((record, event)) = rest.next_if(|_| begun.elapsed() < SLICE) {
                if apply::is_state(event, Seq::at(Generation(0), record.offset)) {
                    self.stating.met(event.group);
                    if apply::lacks(self.kept(event.group).group.as_ref(), event) {
                        self.begin_from(tp, record, event, &mut effects).await?;
                    }
                }
                self.apply_one(tp, record, event, &mut effects).await?;
                touched.insert(event.group);
                last = record.offset;
            }
            metrics::observe_group_commits(effects.commits[0], effects.commits[1], begun.elapsed());
            self.write(tp.partition, last, &touched, effects).await?;
            self.ask_for_states(touched.iter());
        }
        self.trim(events.iter().map(|event| event.group).collect());
        Ok(())
    }

    /// What is kept of a group that is met in this batch.
    pub(super) fn kept(&mut self, id: GroupId) -> &mut Kept {
        let kept = self.groups.entry(id).or_insert(Kept { group: None, cost: 0, used: 0 });
        kept.used = self.turn;
        kept
    }

    pub(super) async fn apply_one(
        &mut self,
        tp: TopicPartition,
        record: &Record,
        event: &GroupEvent<'_>,
        effects: &mut Effects,
    ) -> Result<(), WorkerError> {
        self.needs_state(event).await?;
        let is_quiet = self.shadow || self.quiet_before.get(&tp.partition).is_some_and(|before| record.offset < *before);
        let (invitations, follow_ups) = (effects.invitations.len(), effects.follow_ups.len());
        let (key, random) = (self.parts.key.clone(), Arc::clone(&self.parts.random));
        let tools = Tools { key: key.as_deref(), random: random.as_ref() };
        let at = Seq::at(Generation(0), record.offset);
        let met = Met { at, appended: record.appended, event, payload: &record.payload };
        apply::apply(&mut self.kept(event.group).group, met, tools, effects);
        if is_quiet {
            effects.invitations.truncate(invitations);
            effects.follow_ups.truncate(follow_ups);
            effects.steps.clear();
        }
        match &mut self.recording {
            Some(recording) => recording.add(tp, record.appended, &mut effects.steps),
            None => effects.steps.clear(),
        }
        Ok(())
    }

    /// Writes and tells what a slice did, see the module.
    async fn write(
        &mut self,
        partition: Partition,
        last: Offset,
        touched: &BTreeSet<GroupId>,
        mut effects: Effects,
    ) -> Result<(), WorkerError> {
        let mut write = std::mem::take(&mut effects.write);
        let met = Seq::at(Generation(0), last);
        for id in touched {
            if let Some(group) = self.groups.get_mut(id).and_then(|kept| kept.group.as_mut()) {
                group.flush(met, &mut write);
            }
        }
        // What expires in the slice that made it is not written: a rebuild meets both at once.
        for (group, to) in &write.drop_to {
            write.items.retain(|(of, item)| of != group || item.seq > *to);
            write.trees.retain(|(of, _, began, _)| of != group || *began > *to);
        }
        let groups = Arc::clone(&self.parts.groups);
        if !effects.invitations.is_empty() || !effects.follow_ups.is_empty() {
            // A snapshot takes the place of the one before it, which the head still names.
            let snapshots = std::mem::take(&mut write.snapshots);
            let (heads, closed) = (std::mem::take(&mut write.heads), std::mem::take(&mut write.closed));
            let removed = std::mem::take(&mut write.removed);
            retry(|| groups.write_groups(write.clone())).await?;
            self.parts.invite(std::mem::take(&mut effects.invitations)).await?;
            for (group, devices) in std::mem::take(&mut effects.follow_ups) {
                append_group(self.parts.log.as_ref(), group, self.parts.clock.now(), GroupEventBody::DevicesGone { devices }).await?;
            }
            write = GroupWrite { snapshots, heads, closed, removed, ..GroupWrite::default() };
        }
        if write != GroupWrite::default() {
            retry(|| groups.write_groups(write.clone())).await?;
        }
        push_all(self.parts.bus.as_ref(), effects.pushes.drain(..)).await;
        if let Some(recording) = &mut self.recording {
            self.recorded.extend(recording.send(false));
            if recording.is_ahead() {
                recording.settled();
                self.recorded().await?;
            }
        }
        if let Some(owned) = self.owned.get_mut(&partition) {
            owned.next = last.next();
        }
        let settled = self.parts.bus.settled();
        match &mut self.position {
            Some(position) => {
                position.next.insert(partition, last.next());
                // All that was pushed so far, so also what the earlier one waited for.
                position.settled = settled;
            }
            None => {
                let due = Instant::now() + POSITION_DELAY;
                self.position = Some(Position { next: BTreeMap::from([(partition, last.next())]), settled, due });
            }
        }
        Ok(())
    }

    /// Waits for what is on its way to topic `metadata`.
    async fn recorded(&mut self) -> Result<(), WorkerError> {
        for recorded in self.recorded.drain(..) {
            recorded.await.unwrap_or(Err(AppendError::Closed))?;
        }
        Ok(())
    }

    async fn write_position(&mut self, consumer: &mut dyn Consumer) -> Result<(), WorkerError> {
        let Some(position) = self.position.take() else { return Ok(()) };
        if let Some(recording) = &mut self.recording {
            self.recorded.extend(recording.send(true));
            recording.settled();
        }
        self.recorded().await?;
        position.settled.await?;
        for (partition, next) in position.next {
            let write = GroupWrite { position: Some((partition, next)), ..GroupWrite::default() };
            retry(|| self.parts.groups.write_groups(write.clone())).await?;
            if self.owned.contains_key(&partition) {
                consumer.commit(TopicPartition { topic: Topic::Groups, partition }, next).await?;
            }
        }
        Ok(())
    }

    /// Loads the groups of a batch that are not in memory, and marks of its senders.
    async fn load(&mut self, batch: &[Record], events: &[GroupEvent<'_>]) -> Result<(), WorkerError> {
        let mut first: BTreeMap<GroupId, Offset> = BTreeMap::new();
        let mut senders: BTreeMap<GroupId, BTreeSet<DeviceAddr>> = BTreeMap::new();
        for (record, event) in batch.iter().zip(events) {
            first.entry(event.group).or_insert(record.offset);
            if let GroupEventBody::Message { by, .. } = event.body {
                senders.entry(event.group).or_default().insert(by);
            }
        }
        let missing: Vec<(GroupId, Offset)> = first.into_iter().filter(|(id, _)| !self.groups.contains_key(id)).collect();
        for chunk in missing.chunks(READS_AT_ONCE) {
            let (groups, random) = (self.parts.groups.as_ref(), self.parts.random.as_ref());
            let loaded = try_join_all(chunk.iter().map(|(id, offset)| load_group(groups, *id, *offset, random))).await?;
            for ((id, _), group) in chunk.iter().zip(loaded) {
                self.groups.insert(*id, Kept { group, cost: 0, used: self.turn });
            }
        }
        for (id, senders) in senders {
            let Some(group) = self.groups.get_mut(&id).and_then(|kept| kept.group.as_mut()) else { continue };
            let unknown: Vec<DeviceAddr> = senders.into_iter().filter(|sender| !group.marks.contains_key(sender)).collect();
            if unknown.is_empty() {
                continue;
            }
            let groups = &self.parts.groups;
            let marks = retry(|| groups.group_marks(id, unknown.clone())).await?;
            group.marks.extend(unknown.into_iter().zip(marks).map(|(sender, mark)| (sender, (mark.unwrap_or_default(), false))));
        }
        Ok(())
    }

    /// Handshakes need the group's public state; creating what is there needs its GroupInfo.
    async fn needs_state(&mut self, event: &GroupEvent<'_>) -> Result<(), WorkerError> {
        let Some(group) = self.groups.get_mut(&event.group).and_then(|kept| kept.group.as_mut()) else { return Ok(()) };
        let (groups, id) = (&self.parts.groups, event.group);
        match event.body {
            GroupEventBody::Created { .. } if group.head.epoch == 0 => {
                group.info = retry(|| groups.group_info(id)).await?;
                Ok(())
            }
            GroupEventBody::Commit { .. } | GroupEventBody::Proposal { .. } | GroupEventBody::DevicesGone { .. }
                if group.state.is_none() && !group.head.closed =>
            {
                load_state(groups.as_ref(), id, group, self.parts.random.as_ref()).await
            }
            _ => Ok(()),
        }
    }

    /// Keeps memory below its cap: everything is in the store too.
    fn trim(&mut self, touched: BTreeSet<GroupId>) {
        for id in touched {
            let Some(kept) = self.groups.get_mut(&id) else { continue };
            let cost = kept.group.as_ref().filter(|group| group.is_whole()).map_or(0, Group::cost);
            self.bytes = self.bytes + cost - std::mem::replace(&mut kept.cost, cost);
            if cost == 0 {
                self.groups.remove(&id);
            }
        }
        if self.bytes > limits::GROUP_STATES_BYTES {
            let mut by_use: Vec<(u64, GroupId)> = self.groups.iter().map(|(id, kept)| (kept.used, *id)).collect();
            by_use.sort_unstable();
            for (_, id) in by_use {
                if self.bytes <= limits::GROUP_STATES_BYTES / 4 * 3 {
                    break;
                }
                self.bytes -= self.groups.remove(&id).map_or(0, |kept| kept.cost);
            }
        }
        metrics::observe_groups_in_memory(self.groups.len(), self.bytes);
    }

    /// Looks for items past their time, and says so on the log: the view changes only by events, so that a rebuilt one is the same.
    async fn expire(&mut self) -> Result<(), WorkerError> {
        if self.shadow {
            return Ok(());
        }
        let now = self.parts.clock.now();
        let before = UnixMillis(now.0.saturating_sub(limits::ENVELOPE_TTL_MS));
        let count = self.parts.log.partitions(Topic::Groups);
        let mut after = None;
        loop {
            let groups = &self.parts.groups;
            let page = retry(|| groups.groups_expired(before, after, 256)).await?;
            let Some((last, _)) = page.last() else { return Ok(()) };
            after = Some(*last);
            for (group, to) in page {
                if self.owned.contains_key(&Partition::of_group(&group, count)) {
                    append_group(self.parts.log.as_ref(), group, now, GroupEventBody::Expired { to }).await?;
                }
            }
        }
    }
}

fn seal(sealer: &Sealer, invitation: &Invitation, random: &dyn Random) -> Vec<u8> {
    let message = stream::GroupInvitation {
        group_id: Bytes::copy_from_slice(invitation.group.as_bytes()),
        epoch: invitation.epoch,
        seq: invitation.seq.0,
        welcome: invitation.welcome.clone().into(),
    };
    let content = message.encode_to_vec();
    let mut sealed = Vec::with_capacity(content.len() + OVERHEAD);
    let context = Context { recipient: invitation.device, sender: invitation.by, client_message_id: FROM_SERVER };
    sealer.seal(&context, &content, random, &mut sealed);
    sealed
}

/// Appends an event of the server's own to a group's partition. Each means the same twice.
pub(in crate::projector) async fn append_group(
    log: &dyn EventLog,
    group: GroupId,
    at: UnixMillis,
    body: GroupEventBody<'_>,
) -> Result<(), AppendError> {
    let tp = TopicPartition { topic: Topic::Groups, partition: Partition::of_group(&group, log.partitions(Topic::Groups)) };
    append(log, tp, event::encode(&GroupEvent { group, at, reply_to: None, body })).await
}

/// A group as the store has it, with the items from this event on, which only a crash can have left there.
pub(super) async fn load_group(
    groups: &dyn GroupStore,
    id: GroupId,
    first: Offset,
    random: &dyn Random,
) -> Result<Option<Group>, WorkerError> {
    let Some(head) = retry(|| groups.group(id)).await? else { return Ok(None) };
    let roster = retry(|| groups.group_roster(id)).await?;
    let roster = roster.ok_or_else(|| StoreError::Corrupt("a group without a roster".to_owned()))?;
    let mut group = Group::new(id, head, roster);
    if group.is_behind_its_roster() {
        load_state(groups, id, &mut group, random).await?;
    }
    let mut after = Seq(Seq::at(Generation(0), first).0 - 1);
    loop {
        let page = retry(|| groups.group_items(id, after, STORED_PAGE, limits::LOG_BATCH_BYTES)).await?;
        let Some(last) = page.last() else { return Ok(Some(group)) };
        after = last.seq;
        group.stored.extend(page.into_iter().map(|item| (item.seq, item)));
    }
}

/// The public state that its head names, and the commit that began its epoch.
pub(super) async fn load_state(groups: &dyn GroupStore, id: GroupId, group: &mut Group, random: &dyn Random) -> Result<(), WorkerError> {
    let corrupt = |why: &str| WorkerError::Store(StoreError::Corrupt(why.to_owned()));
    let head = &group.head;
    let (epoch, began) = (head.snapshot_epoch, head.snapshot_at);
    let saved = retry(|| groups.group_snapshot(id, epoch)).await?.ok_or_else(|| corrupt("a group without its snapshot"))?;
    let state = State::decode(id, &saved, head.applied, random).map_err(|error| corrupt(&error.to_string()))?;
    let commit = retry(|| groups.group_items(id, Seq(began.0 - 1), 1, 1)).await?;
    let commit = commit.first().filter(|item| item.seq == began && item.kind == GroupItemKind::Commit);
    group.begun_by = commit.map(|item| apply::digest(&item.content));
    group.adopt(state).map_err(|error| corrupt(&error.to_string()))
}
