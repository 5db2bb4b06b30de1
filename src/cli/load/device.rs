//! One device of a run: what it has in flight, what it has received, what it owes the server. No I/O here.

use super::engine::World;
use super::record::Event;
use super::sending::{Answered, Sending, Slot};
use super::wire::{self, Malformed, STAMP_BYTES, Seen, Stamp};
use super::ws::{Decoder, Incoming, Outbox};

/// Sends go out in WebSocket messages of about this size: a few dozen of 1 KiB.
const BATCH_BYTES: usize = 60 * 1024;
/// With this much waiting for the socket, nothing is added.
const OUTBOX_BYTES: usize = 256 * 1024;
/// Received items and bytes after which an acknowledgement goes out at once; fewer wait for the tick.
const ACK_ITEMS: u32 = 256;
const ACK_BYTES: usize = 512 * 1024;

/// What ended a connection, when the server said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Lost, or closed without a reason.
    Lost,
    /// Come back after this many milliseconds.
    Later(u32),
    /// Do not come back: the number of its `CloseReason`.
    Refused(u32),
}

/// A device and its connection's buffers.
pub struct Device {
    /// Incomplete frames.
    pub decoder: Decoder,
    /// What waits for the socket.
    pub outbox: Outbox,
    /// Everything else.
    pub session: Session,
}

/// What a device knows, over all its connections.
pub struct Session {
    /// Its index among the devices of its role.
    pub index: u64,
    /// There is a connection: the server takes sends before it says Hello.
    open: bool,
    /// Set when the server has said Hello on the current connection.
    pub attached: bool,
    /// When the server has said QueueEmpty on the current connection.
    pub queue_empty: Option<u64>,
    /// Set when the server said why it closes.
    pub ended: Option<Ended>,
    receives: bool,
    sending: Option<Sending>,
    /// Everything up to here was handed to the application.
    seq: u64,
    /// Highest seq of this connection.
    connection_seq: u64,
    unacked_items: u32,
    unacked_bytes: usize,
}

impl Session {
    /// A device that receives, or sends, or does both.
    pub fn new(index: u64, receives: bool, sending: Option<Sending>) -> Self {
        Self {
            index,
            open: false,
            attached: false,
            queue_empty: None,
            ended: None,
            receives,
            sending,
            seq: 0,
            connection_seq: 0,
            unacked_items: 0,
            unacked_bytes: 0,
        }
    }

    /// The sending half.
    pub fn sending(&self) -> Option<&Sending> {
        self.sending.as_ref()
    }

    /// The sending half, to change it.
    pub fn sending_mut(&mut self) -> Option<&mut Sending> {
        self.sending.as_mut()
    }

    /// Whether something is owed or could be repeated: the tick looks closer then.
    pub fn needs_tick(&self) -> bool {
        self.unacked_items > 0 || self.sending.as_ref().is_some_and(|s| s.has_later())
    }

    fn item(&mut self, world: &World, seq: u64, bytes: usize) -> bool {
        if seq <= self.connection_seq {
            world.counters.add(|c| &c.disorder, 1);
        }
        self.connection_seq = seq;
        self.unacked_items += 1;
        self.unacked_bytes += bytes;
        // What was processed before the connection broke comes again if its acknowledgement did not arrive.
        let fresh = seq > self.seq;
        if fresh {
            self.seq = seq;
        } else {
            world.counters.add(|c| &c.redelivered, 1);
        }
        fresh
    }

    fn frame(&mut self, world: &World, seen: Seen<'_>) {
        match seen {
            Seen::Envelope { seq, kind, content, sender_device, sender_account } => {
                if self.item(world, seq, content.len()) && self.receives {
                    world.received(self.index, kind, content, sender_device, sender_account);
                }
            }
            Seen::Result { request, code, retry_after_ms } => self.answer(world, request, code, retry_after_ms),
            Seen::Receipt { seq, delivered, failed } => {
                if self.item(world, seq, 0) {
                    world.counters.add(|c| &c.receipts, delivered);
                    world.counters.add(|c| &c.receipts_failed, failed);
                }
            }
            Seen::Gap { to } => {
                self.item(world, to, 0);
                world.counters.add(|c| &c.gaps, 1);
            }
            Seen::Hello { .. } => self.attached = true,
            Seen::QueueEmpty => self.queue_empty = Some(world.now_us()),
            Seen::Closing { reason, retry_after_ms } => {
                self.ended = Some(match reason {
                    1 | 2 | 6 => Ended::Refused(reason),
                    _ => Ended::Later(retry_after_ms),
                });
            }
            Seen::Item(_) | Seen::Head { .. } | Seen::Other => {}
        }
    }

    /// The content of a number, made anew or encrypted.
    fn content(&self, world: &World, number: u64, at_us: u64) -> ([u8; STAMP_BYTES], Option<(u8, Vec<u8>)>) {
        let stamp = Stamp { sender: self.index as u32, number, at_us }.to_bytes();
        (stamp, world.encrypt(self.index, number, &stamp))
    }

    fn put(&self, world: &World, out: &mut Vec<u8>, number: u64, stamp: &[u8; STAMP_BYTES], content: Option<&(u8, Vec<u8>)>) {
        let targets = world.targets(self.index, number);
        let id = world.routes.message_id(number);
        match content {
            Some((kind, bytes)) => wire::put_send(out, targets, number, id, *kind, bytes, &[]),
            None => wire::put_send(out, targets, number, id, 2, stamp, &world.template),
        }
    }

    /// Writes what may be sent now, up to a batch; whether something was written.
    fn batch(&mut self, world: &World, out: &mut Vec<u8>) {
        let start = out.len();
        let full = |out: &Vec<u8>| out.len() - start >= BATCH_BYTES;
        let Some(mut sending) = self.sending.take() else { return };
        while !full(out) {
            let Some(number) = sending.next_repeat() else { break };
            if let Some(Slot::Waiting { at_us, content }) = sending.slot(number) {
                let stamp = Stamp { sender: self.index as u32, number, at_us: *at_us }.to_bytes();
                self.put(world, out, number, &stamp, content.as_ref());
            }
        }
        while !full(out) && sending.room(world) {
            let Some(at_us) = world.due(self.index, sending.next()) else { break };
            let number = sending.next();
            let (stamp, content) = self.content(world, number, at_us);
            self.put(world, out, number, &stamp, content.as_ref());
            sending.begin(at_us, content);
        }
        self.sending = Some(sending);
    }

    /// The next message for a lane that sends by HTTP: its number, when it is due, and what it carries.
    pub fn claim(&mut self, world: &World) -> Option<(u64, u64, u8, Vec<u8>)> {
        let sending = self.sending.as_ref()?;
        if !sending.room(world) || !world.running() {
            return None;
        }
        let number = sending.next();
        let at_us = world.scheduled(self.index, number).unwrap_or_else(|| world.now_us());
        let (stamp, content) = self.content(world, number, at_us);
        self.sending.as_mut()?.begin(at_us, None);
        let (kind, bytes) = content.unwrap_or_else(|| (2, [&stamp[..], &world.template].concat()));
        Some((number, at_us, kind, bytes))
    }

    /// An answer to a send came.
    pub fn answer(&mut self, world: &World, number: u64, code: u32, retry_after_ms: u32) {
        let Some(sending) = &mut self.sending else { return };
        let mut audit = world.audit.borrow_mut();
        match sending.answered(number, code, retry_after_ms, world.now_us()) {
            Answered::Accepted { at_us } => {
                audit.accept(self.index, number);
                world.note(Event::Accepted, at_us, world.routes.recipient(self.index, number));
            }
            // It may have arrived all the same, if an earlier answer was lost.
            Answered::Refused if !audit.has_received(self.index, number) => sending.landed(),
            Answered::Refused | Answered::Open => {}
        }
    }
}

impl Device {
    /// Starts without a connection.
    pub fn new(session: Session) -> Self {
        Self { decoder: Decoder::default(), outbox: Outbox::new(session.index.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5eed), session }
    }

    /// A new connection: what is unanswered goes again.
    pub fn connected(&mut self) {
        self.decoder.reset();
        self.outbox.reset();
        let session = &mut self.session;
        (session.open, session.attached, session.queue_empty, session.ended) = (true, false, None, None);
        (session.connection_seq, session.unacked_items, session.unacked_bytes) = (0, 0, 0);
        if let Some(sending) = &mut session.sending {
            sending.repeat_all();
        }
    }

    /// Bytes arrived.
    pub fn arrived(&mut self, world: &World, bytes: &[u8]) -> Result<(), Malformed> {
        let Self { decoder, outbox, session } = self;
        decoder.take(bytes, |incoming| {
            match incoming {
                Incoming::Binary(batch) => wire::each_frame(batch, |seen| {
                    session.frame(world, seen);
                    Ok(())
                })?,
                Incoming::Ping(bytes) => outbox.pong(bytes),
                Incoming::Close(_) => session.ended = session.ended.or(Some(Ended::Lost)),
            }
            Ok(())
        })
    }

    /// Puts into the outbox what may go: sends, and the acknowledgement if it is large enough or its time has come.
    pub fn fill(&mut self, world: &World, tick: bool) {
        if tick && let Some(sending) = &mut self.session.sending {
            sending.wake_later(world.now_us());
        }
        let Self { outbox, session, .. } = self;
        let owes = session.unacked_items >= ACK_ITEMS || session.unacked_bytes >= ACK_BYTES || (tick && session.unacked_items > 0);
        if owes || (session.queue_empty.is_some() && session.unacked_items > 0 && world.eager_acks) {
            outbox.message(|out| wire::put_ack(out, session.seq));
            (session.unacked_items, session.unacked_bytes) = (0, 0);
        }
        if !session.open || session.sending.is_none() || world.by_http {
            return;
        }
        while outbox.pending().len() < OUTBOX_BYTES {
            let before = outbox.pending().len();
            outbox.message(|out| session.batch(world, out));
            if outbox.pending().len() == before {
                break;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use bytes::Bytes;
    use prost::Message as _;

    use super::super::api::Registered;
    use super::super::audit::Routes;
    use super::super::engine::Setup;
    use super::super::wire::Target;
    use super::*;
    use crate::wire::stream::{self, client_frame, server_frame};

    fn registered(byte: u8) -> Registered {
        let target = Target { account: [byte; 16], device: 1, registration: 7 };
        Registered { target, account_id: String::new(), credential: String::new() }
    }

    /// One sender, one recipient, two in flight, driven by hand.
    async fn world(window: u64) -> Rc<World> {
        world_until(window, false).await
    }

    async fn world_until(window: u64, until_delivered: bool) -> Rc<World> {
        let devices = vec![Device::new(Session::new(0, false, Some(Sending::new(u64::MAX)))), Device::new(Session::new(0, true, None))];
        World::new(Setup {
            servers: &["http://127.0.0.1:1".parse().unwrap()],
            ca: None,
            senders: &[registered(1)],
            recipients: &[registered(2)],
            devices,
            routes: Routes { recipients: 1, peers: 1, devices: 1 },
            window,
            payload: 100,
            rate: None,
            by_http: false,
            until_delivered,
            eager_acks: false,
            crypto: None,
            record: None,
        })
        .await
        .unwrap()
    }

    /// What a device would write now, as its frames.
    fn written(world: &World, at: usize, tick: bool) -> Vec<client_frame::Frame> {
        world.device(at, |device| {
            device.fill(world, tick);
            let bytes = device.outbox.pending().to_vec();
            device.outbox.advance(bytes.len());
            let mut frames = Vec::new();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let (header, len) = match rest[1] & 0x7f {
                    126 => (4, usize::from(u16::from_be_bytes([rest[2], rest[3]]))),
                    len => (2, usize::from(len)),
                };
                let mask = &rest[header..header + 4];
                let payload: Vec<u8> =
                    rest[header + 4..header + 4 + len].iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
                frames.extend(stream::ClientBatch::decode(&payload[..]).unwrap().frames.into_iter().filter_map(|frame| frame.frame));
                rest = &rest[header + 4 + len..];
            }
            frames
        })
    }

    fn sent(world: &World, tick: bool) -> Vec<(u64, u64)> {
        let number = |frame| match frame {
            client_frame::Frame::Send(send) => Some((send.request_id, send.client_message_id)),
            _ => None,
        };
        written(world, 0, tick).into_iter().filter_map(number).collect()
    }

    fn tell(world: &World, at: usize, frame: server_frame::Frame) {
        let batch = stream::ServerBatch { frames: vec![stream::ServerFrame { frame: Some(frame) }] }.encode_to_vec();
        let mut bytes = vec![0x82, 126];
        bytes.extend_from_slice(&(batch.len() as u16).to_be_bytes());
        bytes.extend_from_slice(&batch);
        world.device(at, |device| device.arrived(world, &bytes)).unwrap();
    }

    fn answer(request_id: u64, code: stream::Code) -> server_frame::Frame {
        server_frame::Frame::Result(stream::SendResult { request_id, code: code as i32, ..Default::default() })
    }

    fn connect(world: &World, at: usize) {
        world.device(at, |device| device.connected());
        tell(world, at, server_frame::Frame::Hello(stream::Hello::default()));
    }

    #[tokio::test]
    async fn a_sender_keeps_to_its_window_and_repeats_what_was_not_answered() {
        let world = world(3).await;
        world.begin();
        assert_eq!(sent(&world, false), [], "not before there is a connection");
        connect(&world, 0);
        assert_eq!(sent(&world, false), [(1, 1), (2, 2), (3, 3)]);
        tell(&world, 0, answer(2, stream::Code::Ok));
        assert_eq!(sent(&world, false), [(4, 4)]);
        connect(&world, 0);
        assert_eq!(sent(&world, false), [(1, 1), (3, 3), (4, 4)], "after a lost connection, with the same ids");
        for request in [1, 3, 4, 4, 2] {
            tell(&world, 0, answer(request, stream::Code::Ok));
        }
        assert_eq!(world.audit.borrow().accepted, 4, "an answer counts once");
        world.end();
        assert_eq!(sent(&world, false), []);
    }

    #[tokio::test]
    async fn a_message_is_in_flight_until_it_is_there() {
        let world = world_until(2, true).await;
        world.begin();
        connect(&world, 0);
        connect(&world, 1);
        assert_eq!(sent(&world, false), [(1, 1), (2, 2)]);
        tell(&world, 0, answer(1, stream::Code::Ok));
        tell(&world, 0, answer(2, stream::Code::Blocked));
        assert_eq!(sent(&world, false), [(3, 3)], "a refused one is not in flight, an accepted one is");
        let content = |number| [&Stamp { sender: 0, number, at_us: 0 }.to_bytes()[..], &world.template].concat();
        tell(&world, 1, envelope(10, content(3)));
        assert_eq!(sent(&world, false), [(4, 4)]);
        tell(&world, 0, answer(3, stream::Code::Ok));
        assert_eq!(sent(&world, false), []);
        tell(&world, 1, envelope(11, content(1)));
        assert_eq!(sent(&world, false), [(5, 5)]);
    }

    #[tokio::test]
    async fn refusals_are_repeated_or_final_as_the_schema_says() {
        let world = world(2).await;
        world.begin();
        connect(&world, 0);
        assert_eq!(sent(&world, false).len(), 2);
        tell(&world, 0, answer(1, stream::Code::OutcomeUnknown));
        tell(&world, 0, answer(2, stream::Code::Blocked));
        assert_eq!(sent(&world, true), [(3, 3)], "the repeat waits a little, the final one made room");
        tokio::time::sleep(std::time::Duration::from_millis(6)).await;
        world.look();
        assert_eq!(sent(&world, true), [(1, 1)]);
        world.device(0, |device| {
            let sending = device.session.sending().unwrap();
            assert_eq!((sending.waiting(), sending.repeats, sending.refused.get(&4)), (2, 1, Some(&1)));
        });
    }

    #[tokio::test]
    async fn ids_never_run_ahead_of_the_servers_window() {
        let world = world(1_000).await;
        world.begin();
        connect(&world, 0);
        let first = sent(&world, false).len() as u64;
        assert_eq!(first, world.routes.spread_max() + 1);
        tell(&world, 0, answer(2, stream::Code::Ok));
        assert_eq!(sent(&world, false), [], "the oldest is still unanswered");
        tell(&world, 0, answer(1, stream::Code::Ok));
        assert_eq!(sent(&world, false).len(), 2);
    }

    fn envelope(seq: u64, content: Vec<u8>) -> server_frame::Frame {
        server_frame::Frame::Envelope(stream::Envelope {
            seq,
            r#type: 2,
            content: content.into(),
            sender_account: Bytes::from_static(&[1; 16]),
            ..Default::default()
        })
    }

    #[tokio::test]
    async fn a_recipient_acknowledges_and_tells_a_second_delivery_from_a_duplicate() {
        let world = world(2).await;
        world.begin();
        connect(&world, 0);
        connect(&world, 1);
        let content = |number| [&Stamp { sender: 0, number, at_us: 0 }.to_bytes()[..], &world.template].concat();
        tell(&world, 1, envelope(10, content(1)));
        tell(&world, 1, envelope(12, content(2)));
        assert_eq!(written(&world, 1, false), [], "few items wait for the tick");
        assert_eq!(written(&world, 1, true), [client_frame::Frame::Ack(stream::Ack { seq: 12 })]);
        connect(&world, 1);
        tell(&world, 1, envelope(12, content(2)));
        assert_eq!((world.counters.redelivered.get(), world.audit.borrow().duplicates), (1, 0), "dropped by seq, as a client does");
        tell(&world, 1, envelope(13, content(2)));
        tell(&world, 1, envelope(14, content(3)[..40].to_vec()));
        tell(&world, 1, envelope(11, content(3)));
        let audit = world.audit.borrow();
        assert_eq!((audit.delivered, audit.duplicates, audit.corrupt, world.counters.disorder.get()), (2, 1, 1, 1));
    }
}
