//! What applying costs: decode, project, push, acknowledge; no I/O. Prints nanoseconds a message.
//! Nothing is durable in this bench; the log and the store have their own.

use std::time::Instant;

use bytes::Bytes;
use sealpost::clock::UnixMillis;
use sealpost::ids::{AccountId, AttachId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, Generation, Offset, Seq};
use sealpost::projector::apply::{Needs, Projection};
use sealpost::wire::event::{self, EnvelopesAccepted, InboxEvent, SealedEnvelope};

const DEVICES: u64 = 64;
const MESSAGES: u64 = 200_000;
/// An acknowledgement is cumulative: one for so many messages of a device.
const ACK_EVERY: u64 = 16;

fn device(number: u64) -> DeviceAddr {
    DeviceAddr { account: AccountId::from_bytes([number as u8; 16]), device: DeviceId::new(1).expect("valid") }
}

fn log() -> Vec<Bytes> {
    let sealed = vec![7; 1024 + 28];
    let mut log = Vec::new();
    for number in 0..DEVICES {
        let edge = EdgeId::from_bytes([1; 16]);
        log.push(event::encode(&InboxEvent::DeviceAttached { device: device(number), edge, attach: AttachId(number) }));
    }
    for message in 0..MESSAGES {
        let to = device(message % DEVICES);
        log.push(event::encode(&InboxEvent::EnvelopesAccepted(EnvelopesAccepted {
            recipient: to.account,
            sender: device(200 + message / DEVICES % 50),
            client_message_id: ClientMessageId(message / DEVICES / 50 + 1),
            accepted: UnixMillis(1_700_000_000_000),
            flags: 0,
            envelopes: vec![SealedEnvelope { device: to.device, kind: 2, sealed: &sealed }],
        })));
        if message / DEVICES % ACK_EVERY == ACK_EVERY - 1 {
            log.push(event::encode(&InboxEvent::Acked { device: to, cursor: Seq::at(Generation(0), Offset(log.len() as u64)) }));
        }
    }
    log
}

fn main() {
    let log = log();
    let mut best = f64::MAX;
    for round in 1..=5 {
        let mut projection = Projection::default();
        let started = Instant::now();
        let mut pushes = 0;
        for (offset, payload) in log.iter().enumerate() {
            let event: InboxEvent<'_> = event::decode(payload).expect("our own");
            let mut needs = Needs::default();
            projection.needs(&event, &mut needs);
            for key in needs.inboxes {
                projection.load_inbox(key, None);
            }
            for key in needs.marks {
                projection.load_mark(key, None);
            }
            projection.apply(Seq::at(Generation(0), Offset(offset as u64)), event, payload);
            if offset % 1_024 == 0 {
                pushes += projection.pushes.drain(..).count();
                projection.take_receipts();
            }
        }
        pushes += projection.pushes.len();
        let nanos = started.elapsed().as_nanos() as f64 / MESSAGES as f64;
        best = best.min(nanos);
        println!("apply, round {round}: {nanos:.0} ns a message of 1 KiB, {DEVICES} devices, {pushes} pushes");
    }
    println!("apply: {best:.0} ns a message at best, one core, nothing durable");
}
