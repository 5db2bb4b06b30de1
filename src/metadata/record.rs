//! Records of the topic as bytes, and back. Written by hand into one buffer: a message makes two of them, so they must cost little. A test
//! holds the bytes against the generated codec.

use bytes::Bytes;
use prost::Message as _;
use serde::Serialize;

use crate::clock::UnixMillis;
use crate::ids::{DeviceId, Partition};
use crate::log::{Topic, TopicPartition};
use crate::metadata::hex;
use crate::metadata::pseudonym::Hidden;
use crate::metadata::step::Step;
use crate::wire::event::flags;
use crate::wire::metadata::{MetadataBatch, MetadataKind as Kind, MetadataRecord};
use crate::wire::padding::padded_len;

/// Bytes of an event id.
pub const EVENT_ID_BYTES: usize = 16;
/// The longest record with its frame: what a buffer must have room for.
pub const RECORD_BYTES_MAX: usize = 128;

/// A record that is not one. Retrying never helps.
#[derive(Debug, thiserror::Error)]
pub enum Malformed {
    /// Not a `MetadataBatch`.
    #[error("not a batch of metadata records: {0}")]
    Batch(#[from] prost::DecodeError),
    /// A field is not what the schema promises.
    #[error("a metadata record's {0} has a wrong length")]
    Length(&'static str),
}

/// The id of a step: the same whenever and by whomever it is found.
pub fn event_id(source: TopicPartition, step: &Step) -> [u8; EVENT_ID_BYTES] {
    let mut id = [0; EVENT_ID_BYTES];
    id[0] = match source.topic {
        Topic::Directory => 2,
        Topic::Groups => 3,
        _ => 1,
    };
    id[1..3].copy_from_slice(&((step.at.0 >> 48) as u16).to_be_bytes());
    let Partition(partition) = source.partition;
    id[3..5].copy_from_slice(&partition.to_be_bytes());
    // A seq is the offset and one.
    let offset = (step.at.0 & ((1 << 48) - 1)).saturating_sub(1);
    id[5..13].copy_from_slice(&offset.to_be_bytes());
    id[13] = step.kind as u8;
    id[14] = step.device.map_or(0, DeviceId::get);
    id[15] = step.index;
    id
}

/// Who a step is about, hidden.
#[derive(Debug, Clone, Copy)]
pub struct Who {
    /// The account.
    pub account: Hidden,
    /// A message's sender.
    pub sender: Option<Hidden>,
    /// The group's pseudonym.
    pub group: Option<[u8; 16]>,
}

/// Appends one record of a `MetadataBatch`.
pub fn put(out: &mut Vec<u8>, source: TopicPartition, step: &Step, appended: UnixMillis, who: &Who) {
    // Field 1 of the batch; a record is always below 128 bytes, so its length is one byte.
    out.push(0x0a);
    let at = out.len();
    out.push(0);
    let time = step.time(appended);
    put_bytes(out, 1, &event_id(source, step));
    put_number(out, 2, time.0);
    put_number(out, 3, step.kind as u64);
    put_bytes(out, 4, &who.account.key_id);
    put_bytes(out, 5, &who.account.pseudonym);
    put_number(out, 6, step.device.map_or(0, |device| u64::from(device.get())));
    if let (Some(sender), Some(addr)) = (who.sender, step.sender) {
        put_bytes(out, 7, &sender.pseudonym);
        put_number(out, 8, u64::from(addr.device.get()));
        put_number(out, 9, padded_len(step.size_bytes as usize) as u64);
        put_number(out, 10, u64::from(step.flags & flags::URGENT != 0));
        put_number(out, 11, u64::from(step.flags & flags::EPHEMERAL != 0));
        put_number(out, 12, u64::from(step.devices));
        if step.kind == Kind::Delivered {
            put_number(out, 13, time.since(step.began));
        }
    }
    if let Some(group) = &who.group {
        if step.size_bytes > 0 {
            put_number(out, 9, padded_len(step.size_bytes as usize) as u64);
        }
        put_bytes(out, 14, group);
    }
    let len = out.len() - at - 1;
    assert!(len < RECORD_BYTES_MAX - 2, "the fields' largest sizes add up to 104, and a group has no sender");
    out[at] = len as u8;
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.extend_from_slice(&[field << 3 | 2, bytes.len() as u8]);
    out.extend_from_slice(bytes);
}

/// Zeros are not written, as proto3 has it.
fn put_number(out: &mut Vec<u8>, field: u8, mut value: u64) {
    if value == 0 {
        return;
    }
    out.push(field << 3);
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// The records of a batch, their lengths checked.
pub fn decode(batch: &Bytes) -> Result<Vec<MetadataRecord>, Malformed> {
    let records = MetadataBatch::decode(batch.clone())?.records;
    for record in &records {
        let length = |what, bytes: &Bytes, expected: &[usize]| {
            if expected.contains(&bytes.len()) { Ok(()) } else { Err(Malformed::Length(what)) }
        };
        length("event_id", &record.event_id, &[EVENT_ID_BYTES])?;
        length("key_id", &record.key_id, &[8])?;
        length("account", &record.account, &[16])?;
        length("sender", &record.sender, &[0, 16])?;
        length("group", &record.group, &[0, 16])?;
    }
    Ok(records)
}

/// A record as one JSON object; scripts depend on the names.
#[derive(Debug, Serialize)]
pub struct Line {
    /// 32 hexadecimal digits.
    pub event_id: String,
    /// Milliseconds since 1970 UTC.
    pub time_ms: u64,
    /// The kind's name in lower case.
    pub kind: String,
    /// 16 hexadecimal digits.
    pub key_id: String,
    /// 32 hexadecimal digits.
    pub account: String,
    /// See the schema.
    #[serde(skip_serializing_if = "is_zero")]
    pub device: u32,
    /// 32 hexadecimal digits.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sender: String,
    /// See the schema.
    #[serde(skip_serializing_if = "is_zero")]
    pub sender_device: u32,
    /// See the schema.
    #[serde(skip_serializing_if = "is_zero")]
    pub size_bucket: u32,
    /// See the schema.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub urgent: bool,
    /// See the schema.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
    /// See the schema.
    #[serde(skip_serializing_if = "is_zero")]
    pub devices: u32,
    /// Of what was delivered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub latency_ms: Option<u64>,
    /// 32 hexadecimal digits.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks for a reference")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl From<&MetadataRecord> for Line {
    fn from(record: &MetadataRecord) -> Self {
        let kind = Kind::try_from(record.kind).map_or_else(|_| format!("kind_{}", record.kind), |kind| kind.as_str_name().to_lowercase());
        Self {
            event_id: hex(&record.event_id),
            time_ms: record.time_ms,
            kind,
            key_id: hex(&record.key_id),
            account: hex(&record.account),
            device: record.device,
            sender: hex(&record.sender),
            sender_device: record.sender_device,
            size_bucket: record.size_bucket,
            urgent: record.urgent,
            ephemeral: record.ephemeral,
            devices: record.devices,
            latency_ms: (record.kind() == Kind::Delivered).then_some(record.latency_ms),
            group: hex(&record.group),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ids::{AccountId, DeviceAddr, Generation, GroupId, Offset, Seq};

    fn hidden(byte: u8) -> Hidden {
        Hidden { key_id: [9; 8], pseudonym: [byte; 16] }
    }

    fn both(account: u8, sender: u8) -> Who {
        Who { account: hidden(account), sender: Some(hidden(sender)), group: None }
    }

    fn source(topic: Topic, partition: u16) -> TopicPartition {
        TopicPartition { topic, partition: Partition(partition) }
    }

    fn message(kind: Kind) -> Step {
        let addr =
            |account, device| DeviceAddr { account: AccountId::from_bytes([account; 16]), device: DeviceId::new(device).expect("valid") };
        Step {
            kind,
            at: Seq::at(Generation(2), Offset(0x0304)),
            index: 0,
            account: addr(1, 1).account,
            device: (kind == Kind::Delivered).then_some(addr(1, 5).device),
            sender: Some(addr(2, 3)),
            began: UnixMillis(1_700_000_000_000),
            size_bytes: 1_601,
            flags: flags::URGENT,
            devices: if kind == Kind::Accepted { 2 } else { 0 },
            group: None,
        }
    }

    /// The bytes that other languages are given; `topology/analytics/test_land.py` reads the same.
    #[test]
    fn bytes_of_records_are_stable() {
        let mut out = Vec::new();
        let inbox = source(Topic::Inbox, 7);
        put(&mut out, inbox, &message(Kind::Accepted), UnixMillis(1_700_000_000_100), &both(1, 2));
        put(&mut out, inbox, &message(Kind::Delivered), UnixMillis(1_700_000_000_100), &both(1, 2));
        let device =
            Step { kind: Kind::DeviceRegistered, sender: None, device: message(Kind::Delivered).device, ..message(Kind::Accepted) };
        let who = Who { account: hidden(3), sender: None, group: None };
        put(&mut out, source(Topic::Directory, 0), &device, UnixMillis(1), &who);
        let by = (AccountId::from_bytes([1; 16]), device.device);
        let group = GroupId::from_bytes([8; 16]);
        let written = Step::in_group(Kind::GroupMessage, device.at, group, by, device.began, 200);
        put(&mut out, source(Topic::Groups, 4), &written, UnixMillis(1), &Who { account: hidden(1), sender: None, group: Some([8; 16]) });
        let golden: serde_json::Value =
            serde_json::from_str(include_str!("../../topology/analytics/golden.json")).expect("the vectors are JSON");
        assert_eq!(hex(&out), golden["batch"]["bytes"], "bytes");
        let lines: Vec<Line> = decode(&out.into()).expect("decodes").iter().map(Line::from).collect();
        assert_eq!(serde_json::to_value(lines).expect("serializes"), golden["batch"]["records"]);
    }

    #[test]
    fn sizes_are_told_in_buckets_only() {
        let bucket = |size_bytes| {
            let mut out = Vec::new();
            let step = Step { size_bytes, ..message(Kind::Accepted) };
            put(&mut out, source(Topic::Inbox, 0), &step, UnixMillis(0), &both(1, 2));
            decode(&out.into()).expect("decodes")[0].size_bucket
        };
        assert_eq!([1, 160, 161, 1_600, 1_601, 40_000].map(bucket), [160, 160, 320, 1_600, 1_664, 40_960]);
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let good = MetadataRecord {
            event_id: vec![0; 16].into(),
            key_id: vec![0; 8].into(),
            account: vec![0; 16].into(),
            ..MetadataRecord::default()
        };
        let check = |record: MetadataRecord| decode(&MetadataBatch { records: vec![record] }.encode_to_vec().into());
        assert!(check(good.clone()).is_ok());
        assert!(check(MetadataRecord { event_id: vec![0; 15].into(), ..good.clone() }).is_err());
        assert!(check(MetadataRecord { account: Bytes::new(), ..good.clone() }).is_err());
        assert!(check(MetadataRecord { sender: vec![0; 17].into(), ..good }).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = decode(&bytes.into());
        }

        /// What is written by hand is what the generated codec writes, and no two steps share an id.
        #[test]
        fn the_bytes_are_those_of_the_generated_codec(
            (kind, generation, offset, partition) in (0..6usize, any::<u16>(), 0u64..1 << 47, any::<u16>()),
            (began, appended, size_bytes) in (any::<u64>(), any::<u64>(), 0u32..1 << 24),
            (device, sender_device, index, flag, devices) in (0u32..=127, 1u32..=127, any::<u8>(), 0u8..4, any::<u8>()),
        ) {
            let kind = [Kind::Accepted, Kind::Delivered, Kind::Expired, Kind::Rejected, Kind::AccountDeleted, Kind::GroupClosed][kind];
            let is_message = !matches!(kind, Kind::AccountDeleted | Kind::GroupClosed);
            let in_group = kind == Kind::GroupClosed;
            let sender = DeviceAddr { account: AccountId::from_bytes([2; 16]), device: DeviceId::new(sender_device).expect("valid") };
            let step = Step {
                kind,
                at: Seq::at(Generation(generation), Offset(offset)),
                index,
                account: AccountId::from_bytes([1; 16]),
                device: DeviceId::new(device).ok(),
                sender: is_message.then_some(sender),
                began: UnixMillis(began),
                size_bytes,
                flags: flag,
                devices,
                group: in_group.then_some(GroupId::from_bytes([3; 16])),
            };
            let topic = if in_group { Topic::Groups } else if is_message { Topic::Inbox } else { Topic::Directory };
            let mut out = Vec::new();
            let who = Who { account: hidden(1), sender: is_message.then_some(hidden(2)), group: in_group.then_some([4; 16]) };
            put(&mut out, source(topic, partition), &step, UnixMillis(appended), &who);
            prop_assert!(out.len() <= RECORD_BYTES_MAX);
            let batch = MetadataBatch::decode(&out[..]).expect("decodes");
            prop_assert_eq!(&batch.encode_to_vec(), &out);
            let record = &decode(&out.into()).expect("valid")[0];
            let id: [u8; 16] = record.event_id[..].try_into().expect("16 bytes");
            prop_assert_eq!(u64::from_be_bytes(id[5..13].try_into().expect("8 bytes")), offset);
            prop_assert_eq!(u16::from_be_bytes([id[1], id[2]]), generation);
            prop_assert_eq!((id[13], id[14], id[15]), (kind as u8, device as u8, index));
            prop_assert_eq!(record.urgent, is_message && flag & flags::URGENT != 0);
            let took = if kind == Kind::Delivered { appended.saturating_sub(began) } else { 0 };
            prop_assert_eq!(record.latency_ms, took);
        }
    }
}
