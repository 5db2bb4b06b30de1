//! States of groups on the log ([`GroupEventBody::State`]): when a projector says them, and how a view goes on from one.
//!
//! The log forgets, and groups live on. So a group's state is said again before the log forgets the last one: with its items, when that one is most
//! of a day old; and by a walk over all groups, where nothing happens. What stands between what a state holds and the state itself is read again by
//! whoever begins with it, so nothing has to stand still meanwhile, and of two projectors that say a state each one is as good.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::apply::{self, Effects, Met, Tools};
use super::carried::Carried;
use super::worker::{Worker, append_group, load_group, load_state};
use crate::clock::UnixMillis;
use crate::ids::{DeviceAddr, Generation, GroupId, Offset, Partition, Seq};
use crate::limits;
use crate::log::{AppendError, EventLog, Record, Topic, TopicPartition};
use crate::metrics;
use crate::projector::behind::retry;
use crate::projector::worker::{WorkerError, undecodable};
use crate::store::groups::GroupHead;
use crate::wire::event;
use crate::wire::group_event::{GroupEvent, GroupEventBody};

/// How long a state that is on its way is waited for.
const AGAIN: Duration = Duration::from_millis(limits::GROUP_STATE_AGAIN_MS);

/// What the log has of partitions: from where, and what comes next.
type Windows = HashMap<Partition, (Offset, Offset)>;

/// What a projector has to say.
#[derive(Default)]
pub(super) struct Stating {
    due: VecDeque<GroupId>,
    /// What is due or on its way, and since when.
    asked: HashMap<GroupId, Instant>,
    /// A walk over all groups: behind which it goes on, and what the log had of the partitions when it began.
    walk: Option<(Option<GroupId>, Windows)>,
    under_way: JoinSet<Result<(), AppendError>>,
}

impl Stating {
    /// When there is something to do next.
    pub(super) fn due(&self) -> Option<Instant> {
        let waits = !self.due.is_empty() || self.walk.is_some();
        waits.then(|| Instant::now() + Duration::from_millis(limits::GROUP_STATE_PAUSE_MS))
    }

    /// What is asked for beyond the cap is asked for again when the group is met again.
    fn ask(&mut self, id: GroupId) {
        let now = Instant::now();
        if self.asked.len() >= limits::GROUP_STATES_DUE {
            self.asked.retain(|_, since| now.duration_since(*since) < AGAIN);
        }
        let waits = self.asked.get(&id).is_some_and(|since| now.duration_since(*since) < AGAIN);
        if !waits && self.asked.len() < limits::GROUP_STATES_DUE {
            self.asked.insert(id, now);
            self.due.push_back(id);
        }
    }

    /// One stands on the log.
    pub(super) fn met(&mut self, id: GroupId) {
        self.asked.remove(&id);
    }
}

/// Whether a group's state is to be said because items came since, or because it is old.
fn is_due(head: &GroupHead, now: UnixMillis) -> bool {
    let (age, lives) = (now.since(head.stated), head.head > head.stated_at);
    !head.closed && (age >= limits::GROUP_STATE_IDLE_MS || (lives && age >= limits::GROUP_STATE_ACTIVE_MS))
}

/// Whether it stands in the older half of what the log has left: the log may keep less than a week, or what fits.
fn is_old(head: &GroupHead, (earliest, end): (Offset, Offset)) -> bool {
    !head.closed && earliest > Offset(0) && head.stated_at < seq(Offset(earliest.0 + end.0.saturating_sub(earliest.0) / 2))
}

const fn seq(offset: Offset) -> Seq {
    Seq::at(Generation(0), offset)
}

impl Worker {
    /// Groups that were met may be due.
    pub(super) fn ask_for_states<'g>(&mut self, met: impl Iterator<Item = &'g GroupId>) {
        if self.shadow {
            return;
        }
        let now = self.parts.clock.now();
        for id in met {
            let head = self.groups.get(id).and_then(|kept| kept.group.as_ref()).map(|group| &group.head);
            if head.is_some_and(|head| is_due(head, now)) {
                self.stating.ask(*id);
            }
        }
    }

    /// Begins to look at all groups, unless it does already.
    pub(super) async fn begin_walk(&mut self) -> Result<(), WorkerError> {
        if self.shadow || self.stating.walk.is_some() {
            return Ok(());
        }
        let mut windows = HashMap::new();
        for partition in self.owned.keys().copied() {
            windows.insert(partition, self.parts.log.bounds(TopicPartition { topic: Topic::Groups, partition }).await?);
        }
        self.stating.walk = Some((None, windows));
        Ok(())
    }

    /// Says one state that is due, or walks on by a page. What fails is due again at the group's next item, or the next walk.
    pub(super) async fn say_states(&mut self) -> Result<(), WorkerError> {
        while let Some(said) = self.stating.under_way.try_join_next() {
            if let Ok(Err(error)) = said {
                tracing::warn!(%error, "a group's state could not be put on the log; it is tried again later");
            }
        }
        if self.stating.under_way.len() >= limits::GROUP_STATES_AT_ONCE {
            return Ok(());
        }
        let Some(id) = self.stating.due.pop_front() else { return self.walk_on().await };
        match self.carry(id).await {
            Ok(Some((next, carried))) => {
                let (log, now) = (self.parts.log.clone(), self.parts.clock.now());
                let (applied, epoch, bytes) = (carried.head.applied, carried.head.epoch, carried.encode());
                metrics::observe_group_state(bytes.len());
                let Ok(parts) = u16::try_from(bytes.len().div_ceil(limits::GROUP_STATE_PART_BYTES)) else { return Ok(()) };
                if parts > limits::GROUP_STATE_PARTS {
                    tracing::warn!(bytes = bytes.len(), "a group's state is too large for the log: a view made anew will not know it");
                    return Ok(());
                }
                self.stating.under_way.spawn(async move {
                    for (part, bytes) in (0..).zip(bytes.chunks(limits::GROUP_STATE_PART_BYTES)) {
                        let body = GroupEventBody::State { next, applied, epoch, part, parts, bytes };
                        append_group(log.as_ref(), id, now, body).await?;
                    }
                    Ok(())
                });
            }
            Ok(None) => self.stating.met(id),
            Err(error) => tracing::warn!(%error, "a group's state can't be read; it is tried again later"),
        }
        Ok(())
    }

    async fn walk_on(&mut self) -> Result<(), WorkerError> {
        let Some((after, windows)) = self.stating.walk.take() else { return Ok(()) };
        let groups = &self.parts.groups;
        let page = retry(|| groups.group_heads(after, limits::GROUP_WALK_PAGE)).await?;
        let Some((last, _)) = page.last() else { return Ok(()) };
        let (last, now, count) = (*last, self.parts.clock.now(), self.parts.log.partitions(Topic::Groups));
        for (id, head) in page {
            let window = windows.get(&Partition::of_group(&id, count));
            if window.is_some_and(|window| is_due(&head, now) || is_old(&head, *window)) {
                self.stating.ask(id);
            }
        }
        self.stating.walk = Some((Some(last), windows));
        Ok(())
    }

    /// A group as it is now, and the position before which everything is in it. `None`: it can't be said, or need not.
    async fn carry(&mut self, id: GroupId) -> Result<Option<(Seq, Carried)>, WorkerError> {
        let partition = Partition::of_group(&id, self.parts.log.partitions(Topic::Groups));
        let Some(next) = self.owned.get(&partition).map(|owned| owned.next) else { return Ok(None) };
        let (_, end) = self.parts.log.bounds(TopicPartition { topic: Topic::Groups, partition }).await?;
        if end.0.saturating_sub(next.0) > limits::GROUP_STATE_REACH / 2 {
            return Ok(None);
        }
        let (groups, random) = (self.parts.groups.as_ref(), self.parts.random.as_ref());
        let mut loaded;
        let group = match self.groups.get_mut(&id).and_then(|kept| kept.group.as_mut()).filter(|group| group.is_whole()) {
            Some(group) => group,
            None => {
                loaded = load_group(groups, id, next, random).await?;
                let Some(group) = &mut loaded else { return Ok(None) };
                group
            }
        };
        if group.head.closed {
            return Ok(None);
        }
        if group.state.is_none() {
            load_state(groups, id, group, random).await?;
        }
        let devices: Vec<DeviceAddr> = group.roster.devices.clone();
        let marks = retry(|| groups.group_marks(id, devices.clone())).await?;
        let marks = devices.into_iter().zip(marks).filter_map(|(device, mark)| Some((device, mark?))).collect();
        let has_tree = retry(|| groups.group_tree(id, group.head.epoch)).await?.is_some();
        let Some(info) = retry(|| groups.group_info(id)).await? else { return Ok(None) };
        Ok(group.carried(info, marks, has_tree).map(|carried| (seq(next), carried)))
    }

    /// Goes on from a state in a view that lacks what is in it: takes it, and what stands between it and its record. Where that can't be done nothing
    /// changes, and a later state will do.
    pub(super) async fn begin_from(
        &mut self,
        tp: TopicPartition,
        record: &Record,
        event: &GroupEvent<'_>,
        effects: &mut Effects,
    ) -> Result<(), WorkerError> {
        let GroupEventBody::State { next, parts, .. } = event.body else { return Ok(()) };
        let from = Offset(next.0 - 1);
        let (earliest, _) = self.parts.log.bounds(tp).await?;
        if from < earliest {
            return Ok(());
        }
        let Some((bytes, between)) = read_state(self.parts.log.as_ref(), tp, from, record, event, parts).await? else { return Ok(()) };
        let carried = match Carried::decode(&bytes) {
            Ok(carried) => carried,
            Err(error) => {
                tracing::error!(%error, "a group can't be begun from its state on the log");
                return Ok(());
            }
        };
        let met = Met { at: seq(record.offset), appended: record.appended, event, payload: &record.payload };
        let random = std::sync::Arc::clone(&self.parts.random);
        let tools = Tools { key: None, random: random.as_ref() };
        if let Err(error) = apply::begin(&mut self.kept(event.group).group, met, carried, tools, effects) {
            tracing::error!(%error, "a group can't be begun from its state on the log");
            return Ok(());
        }
        for record in between {
            let event: GroupEvent<'_> = event::decode(&record.payload).map_err(|source| undecodable(tp, &record, source))?;
            self.apply_one(tp, &record, &event, effects).await?;
        }
        Ok(())
    }
}

/// The bytes of a state whose last part is this record, and the group's other records from `from` on.
async fn read_state(
    log: &dyn EventLog,
    tp: TopicPartition,
    from: Offset,
    last: &Record,
    of: &GroupEvent<'_>,
    parts: u16,
) -> Result<Option<(Bytes, Vec<Record>)>, WorkerError> {
    let GroupEventBody::State { next: wanted, bytes: end, .. } = of.body else { return Ok(None) };
    let (mut bytes, mut found, mut between, mut at) = (BytesMut::new(), 0u16, Vec::new(), from);
    while at < last.offset {
        let records = log.read(tp, at, limits::LOG_BATCH_BYTES).await?;
        let Some(read_to) = records.last().map(|record| record.offset.next()) else { break };
        at = read_to;
        for record in records.into_iter().filter(|record| record.offset < last.offset) {
            let event: GroupEvent<'_> = event::decode(&record.payload).map_err(|source| undecodable(tp, &record, source))?;
            match event.body {
                _ if event.group != of.group => {}
                GroupEventBody::State { next, part, bytes: more, .. } => {
                    // An append whose outcome was unknown may stand twice.
                    if (next, event.at, part) == (wanted, of.at, found) && part + 1 < parts {
                        bytes.extend_from_slice(more);
                        found += 1;
                    }
                }
                _ => between.push(record),
            }
        }
    }
    if found.checked_add(1) != Some(parts) {
        return Ok(None);
    }
    bytes.extend_from_slice(end);
    Ok(Some((bytes.freeze(), between)))
}
