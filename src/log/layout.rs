//! How accounts are spread over the partitions of `inbox`, and how that changes while messages flow.
//!
//! A topic can only grow, and an account whose partition changed would have its records in two places without an order between them. So
//! each number of partitions is a *generation* with partitions of its own: 16 of generation 0 are followed by 64 of generation 1, which
//! are partitions 16 to 79. The generation is in the high bits of each seq. A change goes like this:
//!
//! ```text
//! Open(1, 16..80) on topic `layout` ──▶ whoever appends, appends to generation 1 from now on. Nobody applies that yet.
//! after LAYOUT_FENCE_MS a Fence      ──▶ each partition of generation 0: what stands behind it is late, and is passed on to generation 1
//! everything before it in the store  ──▶ Drained(p) on topic `layout`: generation 1 is applied where all that it follows is drained
//! ```
//!
//! Who appends looks at topic `layout` every [`limits::LAYOUT_LOOK_MS`], so nothing is late but what a process appends that was stopped, or cut
//! off from that one topic, for longer than [`limits::LAYOUT_FENCE_MS`]. Nothing of that is lost, and it stays in order: such a process
//! appends nothing for [`limits::LAYOUT_HOLD_MS`] once it sees the change, while what it sent before is passed on. The projectors do
//! all of it by themselves: who asked for the change may die at once.

use std::collections::BTreeSet;

use bincode::{Decode, Encode, config};
use bytes::Bytes;

use crate::ids::{AccountId, Generation, Partition};
use crate::limits;
use crate::log::{Topic, TopicPartition};

/// Topic `layout` has one partition.
pub const TOPIC: TopicPartition = TopicPartition { topic: Topic::Layout, partition: Partition(0) };

/// A record of topic `layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub enum LayoutRecord {
    /// Accounts are spread over these partitions of `inbox` from now on.
    Open {
        /// The one behind the last; any other is a repeat, and means nothing.
        generation: Generation,
        /// Its first partition.
        first: u16,
        /// How many there are.
        count: u16,
    },
    /// All that stands before the fence of a partition is in the store.
    Drained {
        /// Which.
        partition: Partition,
    },
}

/// The layout of records; goes up when it changes.
const VERSION: u8 = 1;
const CONFIG: config::Configuration<config::LittleEndian, config::Varint, config::Limit<64>> = config::standard().with_limit::<64>();

/// Why bytes are not a record of topic `layout`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// A newer version wrote it.
    #[error("a record of topic layout has version {0}, this binary reads version {VERSION}: run the version that wrote it, or newer")]
    Version(u8),
    /// It is something else.
    #[error("a record of topic layout can't be read")]
    Malformed,
}

impl LayoutRecord {
    /// As it stands on the topic: a version byte, then bincode.
    pub fn encode(&self) -> Bytes {
        let mut out = vec![VERSION];
        bincode::encode_into_std_write(self, &mut out, CONFIG).expect("encoding into memory can't fail, and it is below the limit");
        out.into()
    }

    /// The opposite.
    pub fn decode(bytes: &[u8]) -> Result<Self, LayoutError> {
        match bytes.split_first() {
            Some((&VERSION, rest)) => match bincode::decode_from_slice(rest, CONFIG) {
                Ok((record, used)) if used == rest.len() => Ok(record),
                _ => Err(LayoutError::Malformed),
            },
            Some((&version, _)) => Err(LayoutError::Version(version)),
            None => Err(LayoutError::Malformed),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    first: u16,
    count: u16,
}

impl Span {
    fn of(self, account: &AccountId) -> Partition {
        Partition(self.first + Partition::of(account, self.count).0)
    }

    const fn contains(self, partition: Partition) -> bool {
        partition.0 >= self.first && partition.0 - self.first < self.count
    }

    fn all(self) -> impl Iterator<Item = Partition> {
        (self.first..self.first + self.count).map(Partition)
    }
}

const fn gcd(a: u16, b: u16) -> u16 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// All generations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    spans: Vec<Span>,
    drained: BTreeSet<Partition>,
}

impl Layout {
    /// One generation of so many partitions: how every log begins.
    pub fn of(partitions: u16) -> Self {
        Self { spans: vec![Span { first: 0, count: partitions.max(1) }], drained: BTreeSet::new() }
    }

    /// None yet: the first record says it.
    pub const fn empty() -> Self {
        Self { spans: Vec::new(), drained: BTreeSet::new() }
    }

    /// Nothing was ever said of it.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// What a record changes. Repeats and what makes no sense change nothing, so whoever asks for a change may ask twice.
    pub fn apply(&mut self, record: LayoutRecord) -> bool {
        match record {
            LayoutRecord::Open { generation, first, count } => {
                let follows = usize::from(generation.0) == self.spans.len() && self.spans.len() < limits::LAYOUT_GENERATIONS;
                let fits = count > 0 && first >= self.end() && first.checked_add(count).is_some();
                if follows && fits && self.is_settled() {
                    self.spans.push(Span { first, count });
                    return true;
                }
                false
            }
            LayoutRecord::Drained { partition } => {
                let old = self.generation_of(partition).is_some_and(|generation| generation < self.newest());
                old && self.drained.insert(partition)
            }
        }
    }

    /// The same as somebody sees it who has met the end of only these partitions.
    pub fn as_met(&self, drained: &BTreeSet<Partition>) -> Self {
        Self { spans: self.spans.clone(), drained: drained.clone() }
    }

    /// Every partition that an account's records ever went to, the newest first.
    pub fn partitions_for(&self, account: &AccountId) -> Vec<Partition> {
        self.spans.iter().rev().map(|span| span.of(account)).collect()
    }

    /// The first partition behind all generations.
    pub fn end(&self) -> u16 {
        self.spans.last().map_or(0, |span| span.first + span.count)
    }

    /// The generation that is appended to.
    pub fn newest(&self) -> Generation {
        Generation(self.spans.len().saturating_sub(1) as u16)
    }

    /// How many partitions the newest generation has.
    pub fn count(&self) -> u16 {
        self.spans.last().map_or(0, |span| span.count)
    }

    /// Partitions of a generation.
    pub fn partitions_of(&self, generation: Generation) -> impl Iterator<Item = Partition> + use<> {
        self.spans.get(usize::from(generation.0)).copied().into_iter().flat_map(Span::all)
    }

    /// Where an account's records go.
    pub fn partition_of(&self, account: &AccountId) -> Partition {
        self.spans.last().map_or(Partition(0), |span| span.of(account))
    }

    /// Which generation a partition is of; `None` for one that is made and not open yet.
    pub fn generation_of(&self, partition: Partition) -> Option<Generation> {
        self.spans.iter().position(|span| span.contains(partition)).map(|at| Generation(at as u16))
    }

    /// Whether the records of an account went there, when its generation was the newest.
    pub fn held(&self, partition: Partition, account: &AccountId) -> bool {
        self.spans.iter().any(|span| span.contains(partition) && span.of(account) == partition)
    }

    /// All that will ever be applied of it is in the store.
    pub fn is_drained(&self, partition: Partition) -> bool {
        self.drained.contains(&partition)
    }

    /// Nobody appends to it any more, but it may hold what is not in the store.
    pub fn is_draining(&self, partition: Partition) -> bool {
        !self.is_drained(partition) && self.generation_of(partition).is_some_and(|generation| generation < self.newest())
    }

    /// Partitions of the generation before that hold accounts of this one.
    pub fn feeds(&self, partition: Partition) -> Vec<Partition> {
        let Some(at) = self.spans.iter().position(|span| span.contains(partition)) else { return Vec::new() };
        let Some(before) = at.checked_sub(1).map(|before| self.spans[before]) else { return Vec::new() };
        let span = self.spans[at];
        let number = partition.0 - span.first;
        // The hash is the same, so numbers that an account can have before and after are alike by every divisor that both counts have.
        let common = gcd(span.count, before.count);
        before.all().filter(|old| (old.0 - before.first) % common == number % common).collect()
    }

    /// Whether it may be applied: everything that its accounts had before is in the store.
    pub fn is_open(&self, partition: Partition) -> bool {
        self.generation_of(partition).is_some() && self.feeds(partition).iter().all(|old| self.is_drained(*old))
    }

    /// No change is under way.
    pub fn is_settled(&self) -> bool {
        self.spans.iter().rev().nth(1).is_none_or(|before| before.all().all(|old| self.is_drained(old)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn open(generation: u16, first: u16, count: u16) -> LayoutRecord {
        LayoutRecord::Open { generation: Generation(generation), first, count }
    }

    fn drained(partition: u16) -> LayoutRecord {
        LayoutRecord::Drained { partition: Partition(partition) }
    }

    #[test]
    fn a_change_opens_where_what_it_follows_is_drained() {
        let mut layout = Layout::of(16);
        assert!(layout.is_settled() && layout.is_open(Partition(15)) && !layout.is_open(Partition(16)));
        assert!(!layout.apply(open(2, 16, 64)) && !layout.apply(open(1, 15, 64)) && !layout.apply(open(1, 16, 0)));
        assert!(!layout.apply(drained(3)), "the newest generation is never drained");
        assert!(layout.apply(open(1, 16, 64)) && !layout.apply(open(1, 16, 64)));
        assert_eq!((layout.newest(), layout.count(), layout.end()), (Generation(1), 64, 80));
        assert!(layout.is_draining(Partition(3)) && !layout.is_draining(Partition(30)));
        assert_eq!(layout.feeds(Partition(16 + 35)), [Partition(3)]);
        assert!(!layout.apply(open(2, 80, 128)), "one change at a time");
        assert!(layout.apply(drained(3)) && !layout.apply(drained(3)));
        let ready: Vec<u16> = (16..80).filter(|number| layout.is_open(Partition(*number))).collect();
        assert_eq!(ready, [19, 35, 51, 67]);
        for number in 0..16 {
            layout.apply(drained(number));
        }
        assert!(layout.is_settled() && (16..80).all(|number| layout.is_open(Partition(number))));
        assert!(layout.apply(open(2, 90, 24)), "a hole is allowed: partitions of a change that was given up");
        assert_eq!((layout.feeds(Partition(90)).len(), layout.generation_of(Partition(85))), (8, None));
    }

    #[test]
    fn records_are_stable() {
        for (record, bytes) in
            [(open(1, 16, 64), &[1, 0, 1, 16, 64][..]), (open(300, 16, 64), &[1, 0, 251, 44, 1, 16, 64]), (drained(3), &[1, 1, 3])]
        {
            assert_eq!((&record.encode()[..], LayoutRecord::decode(bytes)), (bytes, Ok(record)));
        }
        assert_eq!(LayoutRecord::decode(&[2, 1, 3]), Err(LayoutError::Version(2)));
        assert_eq!(LayoutRecord::decode(&[1, 1, 3, 0]), Err(LayoutError::Malformed));
        assert_eq!(LayoutRecord::decode(&[]), Err(LayoutError::Malformed));
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(bytes in proptest::collection::vec(any::<u8>(), 0..20)) {
            if let Ok(record) = LayoutRecord::decode(&bytes) {
                prop_assert_eq!(LayoutRecord::decode(&record.encode()), Ok(record));
            }
        }

        #[test]
        fn an_account_is_applied_only_behind_all_that_it_had(
            counts in proptest::collection::vec(1u16..40, 1..5), account in any::<[u8; 16]>(),
        ) {
            let account = AccountId::from_bytes(account);
            let mut layout = Layout::empty();
            for (generation, count) in counts.iter().enumerate() {
                let before = (generation > 0).then(|| layout.partition_of(&account));
                prop_assert!(layout.apply(open(generation as u16, layout.end(), *count)));
                let now = layout.partition_of(&account);
                prop_assert!(layout.held(now, &account));
                prop_assert_eq!(layout.generation_of(now), Some(Generation(generation as u16)));
                if let Some(before) = before {
                    prop_assert!(layout.feeds(now).contains(&before));
                    prop_assert!(!layout.is_open(now) && layout.is_draining(before));
                    let all: Vec<Partition> = layout.partitions_of(Generation(generation as u16 - 1)).collect();
                    for partition in all {
                        let drained = layout.apply(LayoutRecord::Drained { partition });
                        prop_assert!(drained);
                    }
                }
                prop_assert!(layout.is_open(now) && layout.is_settled());
            }
        }
    }
}
