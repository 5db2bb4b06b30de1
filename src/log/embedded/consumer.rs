//! A consumer of a group: everything that is ready over all its partitions in one batch.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::sync::Notify;

use crate::ids::Offset;
use crate::limits;
use crate::log::embedded::groups::{MemberId, Step};
use crate::log::embedded::shared::Shared;
use crate::log::embedded::view::{Run, Source, View, collect, past_the_end};
use crate::log::{Consumed, Consumer, ReadError, Record, Topic, TopicPartition};

/// Even if many partitions are ready each is given so much: reading less from a file would cost more than it is worth.
const SHARE_BYTES_MIN: usize = 64 * 1024;

/// See the module.
pub(super) struct EmbeddedConsumer {
    shared: Arc<Shared>,
    group: String,
    id: MemberId,
    wake: Arc<Notify>,
    /// Who comes first in the next batch.
    turn: u32,
}

/// What one partition has ready.
enum Ready {
    Memory(u32, u64, Vec<Run>),
    Disk(u32, u64),
}

impl EmbeddedConsumer {
    pub fn join(shared: &Arc<Shared>, group: &str, topics: &[Topic]) -> Result<Self, ReadError> {
        let wake = Arc::new(Notify::new());
        let mut view = shared.view.lock();
        if view.closed {
            return Err(ReadError::Closed);
        }
        let members = view.groups.get(group).map(|group| group.members.len());
        if members.is_none() && view.groups.len() >= limits::LOG_GROUPS {
            return Err(ReadError::Unavailable(format!("the log has {} consumer groups, that is the most", limits::LOG_GROUPS)));
        }
        if members.unwrap_or(0) >= limits::LOG_GROUP_MEMBERS {
            return Err(ReadError::Unavailable(format!("the group has {} consumers, that is the most", limits::LOG_GROUP_MEMBERS)));
        }
        view.next_member += 1;
        let id = view.next_member;
        let set = Topic::ALL.map(|topic| topics.contains(&topic));
        view.groups.entry(group.to_owned()).or_default().join(id, set, Arc::clone(&wake), &shared.slots());
        view.positions_dirty = true;
        drop(view);
        Ok(Self { shared: Arc::clone(shared), group: group.to_owned(), id, wake, turn: 0 })
    }

    fn name(&self, slots: &[u32]) -> Vec<TopicPartition> {
        let all = self.shared.slots();
        slots.iter().map(|&slot| all.at(slot)).collect()
    }

    /// What there is to do right now, if anything.
    fn poll(&mut self) -> Result<Option<Consumed>, ReadError> {
        let mut view = self.shared.view.lock();
        if view.closed {
            return Err(ReadError::Closed);
        }
        let Some(group) = view.groups.get_mut(&self.group) else { return Err(ReadError::Closed) };
        let step = group.step(self.id);
        drop(view);
        Ok(match step {
            Step::Revoked(slots) => Some(Consumed::Revoked(self.name(&slots))),
            Step::Assigned(slots) => Some(Consumed::Assigned(self.name(&slots))),
            Step::Records => None,
        })
    }

    /// Which owned partitions have records, each with its share of the batch.
    fn ready(&mut self) -> Result<Vec<Ready>, ReadError> {
        let mut view = self.shared.view.lock();
        let View { groups, parts, .. } = &mut *view;
        let Some(group) = groups.get_mut(&self.group) else { return Err(ReadError::Closed) };
        let committed = &group.committed;
        let mut waiting = Vec::new();
        for (&number, slot) in &mut group.slots {
            if slot.is_delivered_to(self.id) && !slot.held {
                let part = &parts[number as usize];
                let position = *slot.position.get_or_insert_with(|| committed.get(&number).copied().unwrap_or_else(|| part.earliest()));
                if position != part.next {
                    waiting.push((number, position));
                }
            }
        }
        let share = (limits::LOG_BATCH_BYTES / waiting.len().max(1)).max(SHARE_BYTES_MIN);
        let first = waiting.partition_point(|&(number, _)| number < self.turn);
        waiting.rotate_left(first);
        let (mut out, mut bytes) = (Vec::with_capacity(waiting.len()), 0);
        for (number, position) in waiting {
            if bytes >= limits::LOG_BATCH_BYTES {
                self.turn = number;
                break;
            }
            bytes += share;
            match view.source(number, position, share)? {
                Source::Memory(runs) => out.push(Ready::Memory(number, position, runs)),
                Source::Disk { .. } => out.push(Ready::Disk(number, position)),
                Source::End => {}
            }
        }
        Ok(out)
    }

    /// Fetches what is ready. Nothing has moved if this is dropped half way.
    async fn fetch(&self, ready: Vec<Ready>) -> Result<Vec<(u32, Vec<Record>)>, ReadError> {
        let share = (limits::LOG_BATCH_BYTES / ready.len().max(1)).max(SHARE_BYTES_MIN);
        let mut out = Vec::with_capacity(ready.len());
        let mut from_disk = Vec::new();
        for ready in ready {
            match ready {
                Ready::Memory(slot, from, runs) => out.push((slot, collect(&runs, from, share))),
                Ready::Disk(slot, from) => from_disk.push((slot, from)),
            }
        }
        if !from_disk.is_empty() {
            let shared = Arc::clone(&self.shared);
            let read = move || {
                let read = |(slot, from)| Ok((slot, shared.read_blocking(slot, from, share)?));
                from_disk.into_iter().map(read).collect::<Result<Vec<_>, ReadError>>()
            };
            let read = tokio::task::spawn_blocking(read).await.map_err(|_| ReadError::Closed)?;
            out.extend(read?);
        }
        Ok(out)
    }

    /// Moves the positions behind what is about to be returned.
    fn deliver(&self, fetched: Vec<(u32, Vec<Record>)>) -> Vec<(TopicPartition, Vec<Record>)> {
        let mut view = self.shared.view.lock();
        let Some(group) = view.groups.get_mut(&self.group) else { return Vec::new() };
        let all = self.shared.slots();
        let mut out = Vec::with_capacity(fetched.len());
        for (number, records) in fetched {
            if let Some(last) = records.last()
                && let Some(slot) = group.owned_mut(self.id, number)
            {
                slot.position = Some(last.offset.0 + 1);
                out.push((all.at(number), records));
            }
        }
        out
    }

    fn owned<T>(&self, of: TopicPartition, act: impl FnOnce(&mut View, u32) -> Result<T, ReadError>) -> Result<T, ReadError> {
        let slot = self.shared.slot(of)?;
        let mut view = self.shared.view.lock();
        if view.closed {
            return Err(ReadError::Closed);
        }
        let mine = view.groups.get_mut(&self.group).is_some_and(|group| group.owned_mut(self.id, slot).is_some());
        if !mine {
            return Err(ReadError::Unavailable("the partition is not this consumer's".to_owned()));
        }
        act(&mut view, slot)
    }
}

#[async_trait]
impl Consumer for EmbeddedConsumer {
    async fn next(&mut self) -> Result<Consumed, ReadError> {
        loop {
            if let Some(news) = self.poll()? {
                return Ok(news);
            }
            let ready = self.ready()?;
            if !ready.is_empty() {
                let fetched = self.fetch(ready).await?;
                let records = self.deliver(fetched);
                if !records.is_empty() {
                    return Ok(Consumed::Records(records));
                }
            }
            // A wake-up between the look above and here leaves its permit.
            self.wake.notified().await;
        }
    }

    async fn hold(&mut self, of: TopicPartition) -> Result<(), ReadError> {
        self.owned(of, |view, slot| {
            if let Some(slot) = view.groups.get_mut(&self.group).and_then(|group| group.owned_mut(self.id, slot)) {
                slot.held = true;
            }
            Ok(())
        })
    }

    async fn seek(&mut self, to: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.owned(to, |view, slot| {
            let (earliest, next) = (view.parts[slot as usize].earliest(), view.parts[slot as usize].next);
            if offset.0 < earliest {
                return Err(ReadError::Gone { asked: offset, earliest: Offset(earliest) });
            }
            if offset.0 > next {
                return Err(past_the_end(offset.0, next));
            }
            if let Some(slot) = view.groups.get_mut(&self.group).and_then(|group| group.owned_mut(self.id, slot)) {
                slot.position = Some(offset.0);
                slot.held = false;
            }
            Ok(())
        })
    }

    async fn commit(&mut self, of: TopicPartition, offset: Offset) -> Result<(), ReadError> {
        self.owned(of, |view, slot| {
            if let Some(group) = view.groups.get_mut(&self.group) {
                group.committed.insert(slot, offset.0);
            }
            view.positions_dirty = true;
            Ok(())
        })
    }

    async fn committed(&self, of: TopicPartition) -> Result<Option<Offset>, ReadError> {
        let slot = self.shared.slot(of)?;
        let view = self.shared.view.lock();
        if view.closed {
            return Err(ReadError::Closed);
        }
        Ok(view.groups.get(&self.group).and_then(|group| group.committed.get(&slot)).map(|&offset| Offset(offset)))
    }
}

impl Drop for EmbeddedConsumer {
    fn drop(&mut self) {
        if let Some(group) = self.shared.view.lock().groups.get_mut(&self.group) {
            group.leave(self.id, &self.shared.slots());
        }
    }
}
