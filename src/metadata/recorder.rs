//! Puts records together: many to a batch, a batch for each partition of the topic.

use bytes::Bytes;

use crate::clock::UnixMillis;
use crate::ids::Partition;
use crate::limits;
use crate::log::{Topic, TopicPartition};
use crate::metadata::pseudonym::Pseudonyms;
use crate::metadata::record::{RECORD_BYTES_MAX, Who, put};
use crate::metadata::step::Step;

/// See the module. One projector has one.
#[derive(Debug)]
pub struct Recorder {
    pseudonyms: Pseudonyms,
    open: Vec<Vec<u8>>,
    full: Vec<(TopicPartition, Bytes)>,
    records: u64,
}

impl Recorder {
    /// For a topic of so many partitions, at least one.
    pub fn new(pseudonyms: Pseudonyms, partitions: u16) -> Self {
        Self { pseudonyms, open: vec![Vec::new(); usize::from(partitions.max(1))], full: Vec::new(), records: 0 }
    }

    /// Adds a step of an event of `source` that was appended then.
    pub fn add(&mut self, source: TopicPartition, appended: UnixMillis, step: &Step) {
        let account = self.pseudonyms.of(&step.account, step.began);
        let sender = step.sender.map(|sender| self.pseudonyms.of(&sender.account, step.began));
        let group = step.group.map(|group| self.pseudonyms.of_group(&group, step.began));
        // By source, so that an account's steps stay in order; its pseudonym would spread one account over two partitions.
        let number = usize::from(source.partition.0) % self.open.len();
        let batch = &mut self.open[number];
        if batch.capacity() == 0 {
            batch.reserve_exact(limits::METADATA_BATCH_BYTES);
        }
        put(batch, source, step, appended, &Who { account, sender, group });
        self.records += 1;
        if batch.len() + RECORD_BYTES_MAX > limits::METADATA_BATCH_BYTES {
            self.full.push((partition(number), std::mem::take(batch).into()));
        }
    }

    /// Batches that are full, or all of them; and how many records were added since the last call.
    pub fn take(&mut self, all: bool) -> (Vec<(TopicPartition, Bytes)>, u64) {
        let mut due = std::mem::take(&mut self.full);
        if all {
            let open = self.open.iter_mut().enumerate().filter(|(_, batch)| !batch.is_empty());
            // What waits for the log should not hold a whole batch's room.
            due.extend(open.map(|(number, batch)| (partition(number), Bytes::copy_from_slice(batch))));
            self.open.iter_mut().for_each(Vec::clear);
        }
        (due, std::mem::take(&mut self.records))
    }
}

fn partition(number: usize) -> TopicPartition {
    TopicPartition { topic: Topic::Metadata, partition: Partition(number as u16) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{AccountId, Generation, Offset, Seq};
    use crate::metadata::SecretKey;
    use crate::metadata::record::decode;
    use crate::wire::metadata::MetadataKind as Kind;

    fn step(offset: u64) -> Step {
        Step {
            kind: Kind::AccountDeleted,
            at: Seq::at(Generation(0), Offset(offset)),
            index: 0,
            account: AccountId::from_bytes([1; 16]),
            device: None,
            sender: None,
            began: UnixMillis(1),
            size_bytes: 0,
            flags: 0,
            devices: 0,
            group: None,
        }
    }

    #[test]
    fn batches_end_at_their_cap_and_keep_order() {
        let mut recorder = Recorder::new(Pseudonyms::new(SecretKey::new(&[1; 32]), 30), 2);
        let source = |number| TopicPartition { topic: Topic::Inbox, partition: Partition(number) };
        for offset in 0..5_000 {
            recorder.add(source(3), UnixMillis(2), &step(offset));
        }
        recorder.add(source(0), UnixMillis(2), &step(0));
        let (full, records) = recorder.take(false);
        assert_eq!((records, full.is_empty()), (5_001, false));
        let (rest, records) = recorder.take(true);
        assert_eq!((records, rest.len()), (0, 2));
        assert!(full.iter().chain(&rest).all(|(_, batch)| batch.len() <= limits::METADATA_BATCH_BYTES));
        let of_one: Vec<_> = full.iter().chain(&rest).filter(|(to, _)| to.partition == Partition(1)).collect();
        let ids: Vec<_> = of_one.iter().flat_map(|(_, batch)| decode(batch).expect("decodes")).map(|record| record.event_id).collect();
        assert!(ids.len() == 5_000 && ids.is_sorted());
        assert_eq!(recorder.take(true), (vec![], 0));
    }
}
