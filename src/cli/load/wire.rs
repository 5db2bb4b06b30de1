//! The frames of `schemas/stream.proto`, written and read by hand: without an allocation for a message, so that the
//! load generator leaves the cores to the server. The tests hold them against the generated types.

/// What one message carries in front of its payload, so that whoever receives it knows who sent which, and when.
pub const STAMP_BYTES: usize = 16;

/// Bytes that are not what the schema says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server sent {0}")]
pub struct Malformed(pub &'static str);

/// Identity of a message: in its first 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// Index of the sending device.
    pub sender: u32,
    /// The sender's own count of messages, from 1; 48 bits.
    pub number: u64,
    /// When it was sent, or should have been: microseconds since the run began; 48 bits.
    pub at_us: u64,
}

impl Stamp {
    /// Its bytes.
    pub fn to_bytes(self) -> [u8; STAMP_BYTES] {
        let mut out = [0; STAMP_BYTES];
        out[..4].copy_from_slice(&self.sender.to_le_bytes());
        out[4..10].copy_from_slice(&self.number.to_le_bytes()[..6]);
        out[10..].copy_from_slice(&self.at_us.to_le_bytes()[..6]);
        out
    }

    /// From the front of a payload.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<STAMP_BYTES>()?;
        let wide = |part: &[u8]| part.iter().rev().fold(0u64, |sum, &byte| sum << 8 | u64::from(byte));
        Some(Self { sender: wide(&bytes[..4]) as u32, number: wide(&bytes[4..10]), at_us: wide(&bytes[10..]) })
    }
}

/// Whom a message is for.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The account.
    pub account: [u8; 16],
    /// Its one device.
    pub device: u32,
    /// The device's registration id.
    pub registration: u32,
}

const fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

const fn tag(field: u8, wire: u8) -> u8 {
    field << 3 | wire
}
const VARINT: u8 = 0;
const LEN: u8 = 2;

/// Appends one `Send` to a `ClientBatch`, for devices of one account; the content comes in two parts.
pub fn put_send(out: &mut Vec<u8>, targets: &[Target], request: u64, id: u64, kind: u8, head: &[u8], tail: &[u8]) {
    let Some(account) = targets.first().map(|target| target.account) else { return };
    let content = head.len() + tail.len();
    let envelope = |target: &Target| {
        1 + varint_len(u64::from(target.device))
            + 1
            + varint_len(u64::from(target.registration))
            + 1
            + varint_len(u64::from(kind))
            + 1
            + varint_len(content as u64)
            + content
    };
    let envelopes: usize = targets.iter().map(envelope).map(|len| 1 + varint_len(len as u64) + len).sum();
    let send = 1 + varint_len(request) + 2 + 16 + 1 + varint_len(id) + envelopes;
    let frame = 1 + varint_len(send as u64) + send;
    out.reserve(1 + varint_len(frame as u64) + frame);

    let number = |out: &mut Vec<u8>, field, value| {
        out.push(tag(field, VARINT));
        put_varint(out, value);
    };
    let length = |out: &mut Vec<u8>, field, value: usize| {
        out.push(tag(field, LEN));
        put_varint(out, value as u64);
    };
    length(out, 1, frame);
    length(out, 1, send);
    number(out, 1, request);
    length(out, 2, 16);
    out.extend_from_slice(&account);
    number(out, 3, id);
    for target in targets {
        length(out, 6, envelope(target));
        number(out, 1, u64::from(target.device));
        number(out, 2, u64::from(target.registration));
        number(out, 3, u64::from(kind));
        length(out, 4, content);
        out.extend_from_slice(head);
        out.extend_from_slice(tail);
    }
}

/// Appends one `Ack` to a `ClientBatch`.
pub fn put_ack(out: &mut Vec<u8>, seq: u64) {
    let ack = 1 + varint_len(seq);
    out.push(tag(1, LEN));
    put_varint(out, (2 + ack) as u64);
    out.push(tag(2, LEN));
    put_varint(out, ack as u64);
    out.push(tag(1, VARINT));
    put_varint(out, seq);
}

/// Appends one `GroupFollow` to a `ClientBatch`.
pub fn put_follow(out: &mut Vec<u8>, group: &[u8; 16]) {
    out.extend_from_slice(&[tag(1, LEN), 20, tag(3, LEN), 18, tag(1, LEN), 16]);
    out.extend_from_slice(group);
}

/// Appends one `GroupSend` to a `ClientBatch`; the content comes in two parts.
pub fn put_group_send(out: &mut Vec<u8>, group: &[u8; 16], request: u64, id: u64, epoch: u64, head: &[u8], tail: &[u8]) {
    let content = head.len() + tail.len();
    let number_len = |value| if value == 0 { 0 } else { 1 + varint_len(value) };
    let send = number_len(request) + 18 + number_len(id) + number_len(epoch) + 1 + varint_len(content as u64) + content;
    let frame = 1 + varint_len(send as u64) + send;
    out.reserve(1 + varint_len(frame as u64) + frame);
    let number = |out: &mut Vec<u8>, field, value| {
        // As Protobuf writes them: what is 0 is left out.
        if value != 0 {
            out.push(tag(field, VARINT));
            put_varint(out, value);
        }
    };
    let length = |out: &mut Vec<u8>, field, value: usize| {
        out.push(tag(field, LEN));
        put_varint(out, value as u64);
    };
    length(out, 1, frame);
    length(out, 4, send);
    number(out, 1, request);
    length(out, 2, 16);
    out.extend_from_slice(group);
    number(out, 3, id);
    number(out, 4, epoch);
    length(out, 5, content);
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
}

/// A frame of a `ServerBatch`, as far as a load generator looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen<'a> {
    /// An envelope.
    Envelope {
        /// Its position; 0 if ephemeral.
        seq: u64,
        /// 2 or 3.
        kind: u8,
        /// The ciphertext.
        content: &'a [u8],
        /// Sender's device.
        sender_device: u32,
        /// Sender's account.
        sender_account: &'a [u8],
    },
    /// The answer to a `Send`.
    Result {
        /// Of which request.
        request: u64,
        /// 0 is accepted.
        code: u32,
        /// When to try again.
        retry_after_ms: u32,
    },
    /// What became of messages.
    Receipt {
        /// Its position.
        seq: u64,
        /// How many messages were delivered.
        delivered: u64,
        /// How many were not.
        failed: u64,
    },
    /// The backlog is over.
    QueueEmpty,
    /// Something was lost.
    Gap {
        /// Its last position.
        to: u64,
    },
    /// The first frame.
    Hello {
        /// The device's cursor.
        cursor: u64,
    },
    /// The last frame.
    Closing {
        /// `CloseReason`.
        reason: u32,
        /// When to come back.
        retry_after_ms: u32,
    },
    /// An item of a group.
    Item(Item<'a>),
    /// Where a group is.
    Head {
        /// Which.
        group: &'a [u8],
        /// 0 is followed.
        code: u32,
        /// Its last item.
        seq: u64,
    },
    /// One this tool does not look at.
    Other,
}

/// An item of a group, as far as a load generator looks at it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Item<'a> {
    /// Its position.
    pub seq: u64,
    /// That of the item before it.
    pub after: u64,
    /// `GroupItemKind`.
    pub kind: u32,
    /// The epoch that it is of.
    pub epoch: u64,
    /// Sender's account.
    pub sender_account: &'a [u8],
    /// Of messages.
    pub client_message_id: u64,
    /// An MLSMessage.
    pub content: &'a [u8],
}

/// Fields of one Protobuf message.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
    Skipped,
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Result<u64, Malformed> {
        let mut value = 0;
        for (at, &byte) in self.0.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * at);
            if byte < 0x80 {
                self.0 = &self.0[at + 1..];
                return Ok(value);
            }
        }
        Err(Malformed("a number that does not end"))
    }

    fn skip(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or(Malformed("a field longer than its message"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, Malformed> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let key = self.varint()?;
        let value = match key & 7 {
            0 => Value::Number(self.varint()?),
            1 => self.skip(8).map(|_| Value::Skipped)?,
            2 => {
                let len = usize::try_from(self.varint()?).map_err(|_| Malformed("a length beyond memory"))?;
                Value::Bytes(self.skip(len)?)
            }
            5 => self.skip(4).map(|_| Value::Skipped)?,
            _ => return Err(Malformed("a field of an unknown wire type")),
        };
        Ok(Some((key >> 3, value)))
    }

    /// The numbers of fields 1 to `N`; 0 where there is none.
    fn numbers<const N: usize>(mut self) -> Result<[u64; N], Malformed> {
        let mut out = [0; N];
        while let Some((field, value)) = self.next()? {
            if let (Some(slot), Value::Number(number)) = (field.checked_sub(1).and_then(|at| out.get_mut(at as usize)), value) {
                *slot = number;
            }
        }
        Ok(out)
    }
}

/// Hands out the frames of a `ServerBatch`.
pub fn each_frame<'a>(batch: &'a [u8], mut on: impl FnMut(Seen<'a>) -> Result<(), Malformed>) -> Result<(), Malformed> {
    let mut frames = Fields(batch);
    while let Some((field, value)) = frames.next()? {
        let (1, Value::Bytes(frame)) = (field, value) else { continue };
        let mut inner = Fields(frame);
        while let Some((field, value)) = inner.next()? {
            let Value::Bytes(bytes) = value else { continue };
            on(seen(field, Fields(bytes))?)?;
        }
    }
    Ok(())
}

fn seen(field: u64, body: Fields<'_>) -> Result<Seen<'_>, Malformed> {
    Ok(match field {
        1 => envelope(body)?,
        2 => {
            let [request, code, _, _, _, _, retry] = body.numbers()?;
            Seen::Result { request, code: code as u32, retry_after_ms: retry as u32 }
        }
        3 => receipt(body)?,
        4 => Seen::QueueEmpty,
        5 => {
            let [_, to] = body.numbers()?;
            Seen::Gap { to }
        }
        6 => {
            let [cursor] = body.numbers()?;
            Seen::Hello { cursor }
        }
        8 => {
            let [reason, retry] = body.numbers()?;
            Seen::Closing { reason: reason as u32, retry_after_ms: retry as u32 }
        }
        11 => Seen::Item(item(body)?),
        12 => head(body)?,
        _ => Seen::Other,
    })
}

fn item(mut body: Fields<'_>) -> Result<Item<'_>, Malformed> {
    let mut item = Item::default();
    while let Some((field, value)) = body.next()? {
        match (field, value) {
            (2, Value::Number(number)) => item.seq = number,
            (3, Value::Number(number)) => item.after = number,
            (4, Value::Number(number)) => item.kind = number as u32,
            (5, Value::Number(number)) => item.epoch = number,
            (6, Value::Bytes(bytes)) => item.sender_account = bytes,
            (8, Value::Number(number)) => item.client_message_id = number,
            (10, Value::Bytes(bytes)) => item.content = bytes,
            _ => {}
        }
    }
    Ok(item)
}

fn head(mut body: Fields<'_>) -> Result<Seen<'_>, Malformed> {
    let (mut group, mut code, mut seq) = (&[][..], 0, 0);
    while let Some((field, value)) = body.next()? {
        match (field, value) {
            (1, Value::Bytes(bytes)) => group = bytes,
            (2, Value::Number(number)) => code = number as u32,
            (3, Value::Number(number)) => seq = number,
            _ => {}
        }
    }
    Ok(Seen::Head { group, code, seq })
}

fn envelope(mut body: Fields<'_>) -> Result<Seen<'_>, Malformed> {
    let (mut seq, mut kind, mut content, mut sender_device, mut sender_account) = (0, 0, &[][..], 0, &[][..]);
    while let Some((field, value)) = body.next()? {
        match (field, value) {
            (1, Value::Number(number)) => seq = number,
            (2, Value::Bytes(bytes)) => sender_account = bytes,
            (3, Value::Number(number)) => sender_device = number as u32,
            (5, Value::Number(number)) => kind = number as u8,
            (9, Value::Bytes(bytes)) => content = bytes,
            _ => {}
        }
    }
    Ok(Seen::Envelope { seq, kind, content, sender_device, sender_account })
}

fn receipt(mut body: Fields<'_>) -> Result<Seen<'_>, Malformed> {
    let (mut seq, mut delivered, mut failed) = (0, 0u64, 0u64);
    while let Some((field, value)) = body.next()? {
        match (field, value) {
            (1, Value::Number(number)) => seq = number,
            (2, Value::Bytes(entry)) => {
                let (mut entry, mut kind, mut count) = (Fields(entry), 0, 0u64);
                while let Some((field, value)) = entry.next()? {
                    match (field, value) {
                        (3, Value::Number(number)) => kind = number,
                        (4, Value::Bytes(range)) => {
                            let [first, last] = Fields(range).numbers()?;
                            count = count.saturating_add(last.saturating_sub(first).saturating_add(1));
                        }
                        _ => {}
                    }
                }
                if kind == 1 { delivered += count } else { failed += count }
            }
            _ => {}
        }
    }
    Ok(Seen::Receipt { seq, delivered, failed })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;
    use crate::wire::stream;

    #[test]
    fn stamps_survive() {
        let stamp = Stamp { sender: 0xdead_beef, number: 0xffff_1234_5678, at_us: 0x8000_0000_0001 };
        assert_eq!(Stamp::from_bytes(&stamp.to_bytes()), Some(stamp));
        assert_eq!(Stamp::from_bytes(&[0; 15]), None);
    }

    proptest! {
        #[test]
        fn sends_and_acks_are_what_the_schema_says(
            account in any::<[u8; 16]>(), device in 1u32..128, registration in 1u32..16_381, devices in 1u32..4,
            request in 1u64.., id in 1u64.., seq in 1u64.., payload in prop::collection::vec(any::<u8>(), 1..2_000)
        ) {
            let targets: Vec<_> = (0..devices).map(|nth| Target { account, device: device + nth, registration }).collect();
            let mut out = Vec::new();
            let cut = payload.len().min(16);
            put_send(&mut out, &targets, request, id, 2, &payload[..cut], &payload[cut..]);
            put_ack(&mut out, seq);
            let send = stream::Send {
                request_id: request,
                recipient: Bytes::copy_from_slice(&account),
                client_message_id: id,
                envelopes: targets.iter().map(|target| stream::OutgoingEnvelope {
                    device_id: target.device,
                    registration_id: registration,
                    r#type: stream::EnvelopeType::Whisper as i32,
                    content: payload.clone().into(),
                }).collect(),
                ..Default::default()
            };
            let frames = vec![
                stream::ClientFrame { frame: Some(stream::client_frame::Frame::Send(send)) },
                stream::ClientFrame { frame: Some(stream::client_frame::Frame::Ack(stream::Ack { seq })) },
            ];
            prop_assert_eq!(out, stream::ClientBatch { frames }.encode_to_vec());
        }

        #[test]
        fn frames_to_groups_are_what_the_schema_says(
            group in any::<[u8; 16]>(), request in 1u64.., id in 1u64.., epoch in 0u64..300, payload in prop::collection::vec(any::<u8>(), 1..2_000)
        ) {
            let mut out = Vec::new();
            let cut = payload.len().min(64);
            put_follow(&mut out, &group);
            put_group_send(&mut out, &group, request, id, epoch, &payload[..cut], &payload[cut..]);
            let group_id = Bytes::copy_from_slice(&group);
            let follow = stream::GroupFollow { group_id: group_id.clone(), stop: false };
            let send = stream::GroupSend { request_id: request, group_id, client_message_id: id, epoch, content: payload.into() };
            let frames = [stream::client_frame::Frame::GroupFollow(follow), stream::client_frame::Frame::GroupSend(send)];
            let frames = frames.into_iter().map(|frame| stream::ClientFrame { frame: Some(frame) }).collect();
            prop_assert_eq!(out, stream::ClientBatch { frames }.encode_to_vec());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = each_frame(&bytes, |_| Ok(()));
        }
    }

    #[test]
    fn frames_of_the_server_are_read() {
        use stream::server_frame::Frame;
        let entry = |kind, ranges: &[(u64, u64)]| stream::ReceiptEntry {
            account: Bytes::from_static(&[1; 16]),
            device: 1,
            kind,
            client_message_ids: ranges.iter().map(|&(first, last)| stream::IdRange { first, last }).collect(),
        };
        let frames = [
            Frame::Hello(stream::Hello { cursor: 77, heartbeat_ms: 30_000, ..Default::default() }),
            Frame::Envelope(stream::Envelope {
                seq: 300,
                sender_account: Bytes::from_static(&[9; 16]),
                sender_device: 3,
                client_message_id: 4,
                r#type: 2,
                accepted_ms: 1 << 40,
                content: Bytes::from_static(b"content"),
                ..Default::default()
            }),
            Frame::Result(stream::SendResult {
                request_id: 8,
                code: 9,
                missing_devices: vec![1, 2],
                retry_after_ms: 250,
                ..Default::default()
            }),
            Frame::Receipt(stream::Receipt { seq: 301, entries: vec![entry(1, &[(1, 3), (7, 7)]), entry(3, &[(9, 9)])] }),
            Frame::QueueEmpty(stream::QueueEmpty { seq: 301 }),
            Frame::Gap(stream::Gap { from: 302, to: 305, reason: 1 }),
            Frame::PrekeysLow(stream::PrekeysLow::default()),
            Frame::GroupItem(stream::GroupItem {
                group_id: Bytes::from_static(&[7; 16]),
                seq: 12,
                after: 9,
                kind: 4,
                epoch: 3,
                sender_account: Bytes::from_static(&[9; 16]),
                sender_device: 1,
                client_message_id: 5,
                accepted_ms: 1 << 40,
                content: Bytes::from_static(b"opaque"),
            }),
            Frame::GroupHead(stream::GroupHead { group_id: Bytes::from_static(&[7; 16]), code: 3, seq: 12, epoch: 3 }),
            Frame::Closing(stream::Closing { reason: 3, retry_after_ms: 100 }),
        ];
        let frames = frames.into_iter().map(|frame| stream::ServerFrame { frame: Some(frame) }).collect();
        let bytes = stream::ServerBatch { frames }.encode_to_vec();
        let mut got = Vec::new();
        each_frame(&bytes, |seen| {
            got.push(seen);
            Ok(())
        })
        .unwrap();
        let account = [9; 16];
        let envelope = Seen::Envelope { seq: 300, kind: 2, content: b"content", sender_device: 3, sender_account: &account };
        assert_eq!(
            got,
            [
                Seen::Hello { cursor: 77 },
                envelope,
                Seen::Result { request: 8, code: 9, retry_after_ms: 250 },
                Seen::Receipt { seq: 301, delivered: 4, failed: 1 },
                Seen::QueueEmpty,
                Seen::Gap { to: 305 },
                Seen::Other,
                Seen::Item(Item {
                    seq: 12,
                    after: 9,
                    kind: 4,
                    epoch: 3,
                    sender_account: &account,
                    client_message_id: 5,
                    content: b"opaque",
                }),
                Seen::Head { group: &[7; 16], code: 3, seq: 12 },
                Seen::Closing { reason: 3, retry_after_ms: 100 },
            ]
        );
    }
}
