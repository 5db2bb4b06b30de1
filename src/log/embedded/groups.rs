//! Consumer groups: who owns which partition. Sticky and incremental: a rebalance moves as few partitions
//! as it can, and a partition changes hands only after its owner has been told and has come back for more.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::Notify;

use crate::log::Topic;
use crate::log::embedded::slots::Slots;

/// A consumer's number within the process.
pub(super) type MemberId = u64;

/// Which topics, by their place in [`Topic::ALL`].
pub(super) type TopicSet = [bool; Topic::ALL.len()];

/// One consumer group.
#[derive(Default)]
pub(super) struct Group {
    /// Its consumers.
    pub members: BTreeMap<MemberId, Member>,
    /// The partitions that it shares out.
    pub slots: BTreeMap<u32, Slot>,
    /// Committed positions.
    pub committed: BTreeMap<u32, u64>,
    /// Every topic it ever asked for: retention waits for its positions there.
    pub topics: TopicSet,
}

/// One consumer.
pub(super) struct Member {
    pub topics: TopicSet,
    pub wake: Arc<Notify>,
    /// Partitions that it was told to give back, and does by asking for more.
    told: Vec<u32>,
}

/// One partition as a group sees it.
#[derive(Default)]
pub(super) struct Slot {
    /// Who has it.
    pub owner: Option<MemberId>,
    /// Who shall have it.
    target: Option<MemberId>,
    /// Whether the owner knows.
    announced: bool,
    /// The next record to deliver; unset: from the committed position on.
    pub position: Option<u64>,
    /// Nothing is delivered until the owner seeks.
    pub held: bool,
}

/// What a consumer learns before it gets records.
pub(super) enum Step {
    Revoked(Vec<u32>),
    Assigned(Vec<u32>),
    Records,
}

impl Group {
    /// A consumer joins.
    pub fn join(&mut self, id: MemberId, topics: TopicSet, wake: Arc<Notify>, slots: &Slots) {
        for (mine, new) in self.topics.iter_mut().zip(topics) {
            *mine |= new;
        }
        self.members.insert(id, Member { topics, wake, told: Vec::new() });
        self.rebalance(slots);
    }

    /// A consumer leaves; what it had is free at once.
    pub fn leave(&mut self, id: MemberId, slots: &Slots) {
        self.members.remove(&id);
        for slot in self.slots.values_mut().filter(|slot| slot.owner == Some(id)) {
            slot.release();
        }
        self.rebalance(slots);
    }

    /// There are new partitions.
    pub fn grow(&mut self, slots: &Slots) {
        self.rebalance(slots);
    }

    /// What the consumer has to know next. Asking gives back what it was told to give back.
    pub fn step(&mut self, id: MemberId) -> Step {
        let told = self.members.get_mut(&id).map(|member| std::mem::take(&mut member.told)).unwrap_or_default();
        if !told.is_empty() {
            for slot in &told {
                if let Some(slot) = self.slots.get_mut(slot)
                    && slot.owner == Some(id)
                {
                    slot.release();
                }
            }
            self.settle();
        }
        let mine = |announced: bool, stays: bool| {
            move |(number, slot): (&u32, &Slot)| {
                (slot.owner == Some(id) && slot.announced == announced && (slot.target == Some(id)) == stays).then_some(*number)
            }
        };
        let revoked: Vec<u32> = self.slots.iter().filter_map(mine(true, false)).collect();
        if !revoked.is_empty() {
            if let Some(member) = self.members.get_mut(&id) {
                member.told.clone_from(&revoked);
            }
            return Step::Revoked(revoked);
        }
        let assigned: Vec<u32> = self.slots.iter().filter_map(mine(false, true)).collect();
        if assigned.is_empty() {
            return Step::Records;
        }
        for number in &assigned {
            if let Some(slot) = self.slots.get_mut(number) {
                slot.announced = true;
            }
        }
        Step::Assigned(assigned)
    }

    /// The partition, if it is the consumer's.
    pub fn owned_mut(&mut self, id: MemberId, slot: u32) -> Option<&mut Slot> {
        self.slots.get_mut(&slot).filter(|slot| slot.is_delivered_to(id))
    }

    /// Who is to be woken when the partition has news.
    pub fn waker(&self, slot: u32) -> Option<&Arc<Notify>> {
        let owner = self.slots.get(&slot)?.owner?;
        self.members.get(&owner).map(|member| &member.wake)
    }

    fn rebalance(&mut self, slots: &Slots) {
        let mut load: BTreeMap<MemberId, usize> = self.members.keys().map(|&id| (id, 0)).collect();
        for (index, &topic) in Topic::ALL.iter().enumerate() {
            if self.topics[index] {
                let members: Vec<MemberId> = self.members.iter().filter(|(_, member)| member.topics[index]).map(|(&id, _)| id).collect();
                self.share_out(slots.of_topic(topic).collect(), &members, &mut load);
            }
        }
        self.settle();
    }

    /// Shares one topic's partitions out: everybody keeps what it has up to its share, the rest goes to who has least.
    fn share_out(&mut self, numbers: Vec<u32>, members: &[MemberId], load: &mut BTreeMap<MemberId, usize>) {
        let mut held: BTreeMap<MemberId, Vec<u32>> = members.iter().map(|&id| (id, Vec::new())).collect();
        let mut free = Vec::new();
        let count = numbers.len();
        for number in numbers {
            let slot = self.slots.entry(number).or_default();
            match slot.target.or(slot.owner).and_then(|id| held.get_mut(&id)) {
                Some(list) => list.push(number),
                None => free.push(number),
            }
        }
        if members.is_empty() {
            for number in free {
                self.slots.entry(number).or_default().target = None;
            }
            return;
        }
        let mut order = members.to_vec();
        order.sort_by_key(|id| (std::cmp::Reverse(held[id].len()), load.get(id).copied().unwrap_or(0), *id));
        let (share, extra) = (count / members.len(), count % members.len());
        let quota = |place: usize| share + usize::from(place < extra);
        for (place, id) in order.iter().enumerate() {
            if let Some(list) = held.get_mut(id) {
                let keep = quota(place).min(list.len());
                free.extend(list.drain(keep..));
            }
        }
        for (place, id) in order.iter().enumerate() {
            let Some(list) = held.get_mut(id) else { continue };
            while list.len() < quota(place)
                && let Some(number) = free.pop()
            {
                list.push(number);
            }
            *load.entry(*id).or_default() += list.len();
            for number in &*list {
                self.slots.entry(*number).or_default().target = Some(*id);
            }
        }
    }

    /// Gives free partitions to whom they shall belong, and wakes who has to know.
    fn settle(&mut self) {
        for slot in self.slots.values_mut() {
            if slot.owner == slot.target {
                continue;
            }
            // An owner that was never told has done nothing with it.
            if slot.owner.is_none() || !slot.announced {
                slot.release();
                slot.owner = slot.target;
            }
            if let Some(member) = slot.owner.and_then(|id| self.members.get(&id)) {
                member.wake.notify_one();
            }
        }
    }
}

impl Slot {
    /// Whether the consumer gets its records.
    pub fn is_delivered_to(&self, id: MemberId) -> bool {
        self.owner == Some(id) && self.announced
    }

    fn release(&mut self) {
        self.owner = None;
        self.announced = false;
        self.position = None;
        self.held = false;
    }
}
