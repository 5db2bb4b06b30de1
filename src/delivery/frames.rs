//! Builds the bytes of a `ServerBatch` (`schemas/stream.proto`) in one buffer, contents unsealed in place.

use bytes::{Bytes, BytesMut};
use prost::Message as _;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};

use crate::ids::{DeviceAddr, Seq};
use crate::store::PendingEnvelope;
use crate::store::seal::{self, Sealer, Unsealable};
use crate::wire::event::{ReceiptEntry, flags};
use crate::wire::stream::{self, ServerFrame, server_frame::Frame};

/// Field numbers of `Envelope`, which is written by hand because every message passes here.
mod tag {
    pub const FRAMES: u32 = 1;
    pub const ENVELOPE: u32 = 1;
    pub const SEQ: u32 = 1;
    pub const SENDER_ACCOUNT: u32 = 2;
    pub const SENDER_DEVICE: u32 = 3;
    pub const CLIENT_MESSAGE_ID: u32 = 4;
    pub const TYPE: u32 = 5;
    pub const ACCEPTED_MS: u32 = 6;
    pub const URGENT: u32 = 7;
    pub const EPHEMERAL: u32 = 8;
    pub const CONTENT: u32 = 9;
}

/// One batch under construction.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: BytesMut,
}

impl Batch {
    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Takes the batch; an idle session keeps no buffer.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes).freeze()
    }

    /// Room for that many bytes at once.
    pub fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve(bytes);
    }

    /// Adds any frame.
    pub fn frame(&mut self, frame: Frame) {
        let frame = ServerFrame { frame: Some(frame) };
        encode_key(tag::FRAMES, WireType::LengthDelimited, &mut self.bytes);
        encode_varint(frame.encoded_len() as u64, &mut self.bytes);
        frame.encode_raw(&mut self.bytes);
    }

    /// Adds frames that are encoded already.
    pub fn encoded(&mut self, frames: &[u8]) {
        self.bytes.extend_from_slice(frames);
    }

    /// Adds an answer that a send was accepted.
    pub fn accepted(&mut self, request_id: u64) {
        self.frame(Frame::Result(stream::SendResult { request_id, ..Default::default() }));
    }

    /// Adds an item that tells what became of messages.
    pub fn receipt(&mut self, seq: Seq, entries: &[ReceiptEntry]) {
        let entries = entries
            .iter()
            .map(|entry| stream::ReceiptEntry {
                account: Bytes::copy_from_slice(entry.recipient.account.as_bytes()),
                device: entry.recipient.device.get().into(),
                kind: receipt_kind(entry.kind).into(),
                client_message_ids: entry.ids.iter().map(|&(first, last)| stream::IdRange { first, last }).collect(),
            })
            .collect();
        self.frame(Frame::Receipt(stream::Receipt { seq: seq.0, entries }));
    }

    /// Adds an envelope, its at-rest seal opened. Leaves the batch as it was if it does not open.
    pub fn envelope(&mut self, recipient: DeviceAddr, seq: Seq, envelope: &PendingEnvelope, sealer: &Sealer) -> Result<(), Unsealable> {
        let content_len = envelope.sealed.len().checked_sub(seal::OVERHEAD).ok_or(Unsealable)?;
        let ephemeral = envelope.flags & flags::EPHEMERAL != 0;
        let fields = [
            (tag::SEQ, if ephemeral { 0 } else { seq.0 }),
            (tag::SENDER_DEVICE, envelope.sender.device.get().into()),
            (tag::CLIENT_MESSAGE_ID, envelope.client_message_id.0),
            (tag::TYPE, envelope.kind.into()),
            (tag::ACCEPTED_MS, envelope.accepted.0),
            (tag::URGENT, (envelope.flags & flags::URGENT != 0).into()),
            (tag::EPHEMERAL, ephemeral.into()),
        ];
        let varints: usize =
            fields.iter().filter(|(_, value)| *value != 0).map(|(tag, value)| key_len(*tag) + encoded_len_varint(*value)).sum();
        let body =
            varints + key_len(tag::SENDER_ACCOUNT) + 1 + 16 + key_len(tag::CONTENT) + encoded_len_varint(content_len as u64) + content_len;
        let frame = key_len(tag::ENVELOPE) + encoded_len_varint(body as u64) + body;

        let start = self.bytes.len();
        let out = &mut self.bytes;
        out.reserve(frame + 16 + seal::OVERHEAD);
        encode_key(tag::FRAMES, WireType::LengthDelimited, out);
        encode_varint(frame as u64, out);
        encode_key(tag::ENVELOPE, WireType::LengthDelimited, out);
        encode_varint(body as u64, out);
        for (tag, value) in fields {
            if value != 0 {
                encode_key(tag, WireType::Varint, out);
                encode_varint(value, out);
            }
        }
        encode_key(tag::SENDER_ACCOUNT, WireType::LengthDelimited, out);
        encode_varint(16, out);
        out.extend_from_slice(envelope.sender.account.as_bytes());
        encode_key(tag::CONTENT, WireType::LengthDelimited, out);
        encode_varint(content_len as u64, out);
        let context = seal::Context { recipient, sender: envelope.sender, client_message_id: envelope.client_message_id };
        let opened = sealer.open(&context, &envelope.sealed, out);
        if opened.is_err() {
            out.truncate(start);
        }
        opened
    }
}

/// The stream's number for a kind of receipt.
pub fn receipt_kind(kind: crate::wire::event::ReceiptKind) -> stream::ReceiptKind {
    use crate::wire::event::ReceiptKind;
    match kind {
        ReceiptKind::Delivered => stream::ReceiptKind::Delivered,
        ReceiptKind::Expired => stream::ReceiptKind::Expired,
        ReceiptKind::Rejected => stream::ReceiptKind::Rejected,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{SeededRandom, UnixMillis};
    use crate::ids::{AccountId, ClientMessageId, DeviceId};
    use crate::store::seal::SealKey;

    fn addr(n: u8, device: u32) -> DeviceAddr {
        DeviceAddr { account: AccountId::from_bytes([n; 16]), device: DeviceId::new(device).expect("valid") }
    }

    #[test]
    fn the_hand_written_envelope_is_what_prost_reads() {
        let random = SeededRandom::new(3);
        let (sealer, recipient, sender) = (Sealer::new(&SealKey::random(&random)), addr(1, 2), addr(7, 5));
        for (len, bits) in [(0usize, 0), (1, flags::URGENT), (127, flags::EPHEMERAL), (1024, 3), (70_000, 0)] {
            let context = seal::Context { recipient, sender, client_message_id: ClientMessageId(1 << 40) };
            let content = vec![0xa5; len];
            let mut sealed = Vec::new();
            sealer.seal(&context, &content, &random, &mut sealed);
            let envelope = PendingEnvelope {
                sender,
                client_message_id: ClientMessageId(1 << 40),
                accepted: UnixMillis(1_700_000_000_000),
                flags: bits,
                kind: 3,
                sealed: sealed.into(),
            };
            let mut batch = Batch::default();
            batch.accepted(77);
            batch.envelope(recipient, Seq(99), &envelope, &sealer).expect("opens");
            let before = batch.len();
            assert!(batch.envelope(addr(1, 3), Seq(100), &envelope, &sealer).is_err(), "another device's");
            assert_eq!(batch.len(), before);
            let read = stream::ServerBatch::decode(batch.take()).expect("valid");
            assert_eq!(read.frames.len(), 2);
            let Some(Frame::Envelope(got)) = &read.frames[1].frame else { panic!("an envelope") };
            let ephemeral = bits & flags::EPHEMERAL != 0;
            assert_eq!(got.seq, if ephemeral { 0 } else { 99 });
            assert_eq!((got.sender_account.as_ref(), got.sender_device), (&[7u8; 16][..], 5));
            assert_eq!((got.client_message_id, got.r#type, got.accepted_ms), (1 << 40, 3, 1_700_000_000_000));
            assert_eq!((got.urgent, got.ephemeral), (bits & flags::URGENT != 0, ephemeral));
            assert_eq!(got.content, content);
        }
    }
}
