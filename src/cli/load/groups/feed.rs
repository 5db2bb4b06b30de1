//! The sockets of a run: what each has had of its group, and what it owes. One thread. An item is kept once, as the first who had it had
//! it, and compared with what all others get.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};

use super::member::opaque_head;
use super::reading::{Desk, Kind, Reader, Tree, Written};
use super::room::{COMMIT, MESSAGE, Room};
use super::seat::{Body, Feed, Seat, Sent};
use crate::cli::load::api::{Api, Registered};
use crate::cli::load::engine::{Refusal, Server, open_stream, source_address};
use crate::cli::load::wire::{self, Item, Malformed, STAMP_BYTES, Seen, Stamp};
use crate::cli::load::ws::{Incoming, Outbox};
use crate::ids::GroupId;
use crate::wire::stream::{Code, EnvelopeType, GroupInvitation};

/// Each so many-th socket measures how long things take: all of them would measure the tool.
const SAMPLED: usize = 16;
/// Pause before a connection is tried again.
const AGAIN: Duration = Duration::from_millis(200);
/// After so long without an answer a message is sent again under its number.
const UNANSWERED_US: u64 = 5_000_000;

/// What is counted.
#[derive(Default)]
pub struct Counters {
    pub sent: Cell<u64>,
    pub accepted: Cell<u64>,
    pub refused: Cell<u64>,
    pub repeated: Cell<u64>,
    pub deliveries: Cell<u64>,
    pub items: Cell<u64>,
    pub duplicates: Cell<u64>,
    pub fetched: Cell<u64>,
    /// Items that were not what others had under the same position.
    pub different: Cell<u64>,
    /// Items that came to a device that is not in the group.
    pub leaked: Cell<u64>,
    pub reconnects: Cell<u64>,
}

pub fn add(counter: &Cell<u64>, by: u64) {
    counter.set(counter.get() + by);
}

/// Everything that the sockets share.
pub struct Hall {
    pub seats: Vec<Seat>,
    pub rooms: Vec<Room>,
    pub counters: Counters,
    pub latency: RefCell<Histogram<u64>>,
    pub op_seen: RefCell<[Histogram<u64>; 3]>,
    pub failure: RefCell<Option<String>>,
    pub desk: Arc<Desk>,
    pub opaque: bool,
    api: Api,
    servers: Vec<Server>,
    started: Instant,
    scratch: RefCell<Vec<u8>>,
}

/// What a hall is made from.
pub struct Setup {
    pub api: Api,
    /// Devices attach to them in turn.
    pub servers: Vec<Server>,
    /// The ids of the groups, and the seat of each one's guest.
    pub groups: Vec<(GroupId, Option<usize>)>,
    /// Who sits there: credential, group, keys.
    pub seats: Vec<(Registered, usize, Option<Arc<Reader>>)>,
    pub desk: Arc<Desk>,
    pub opaque: bool,
}

/// Of times in microseconds, up to ten minutes.
pub fn times() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 600_000_000, 3)?)
}

impl Hall {
    pub fn new(setup: Setup) -> anyhow::Result<Rc<Self>> {
        let servers = setup.servers;
        let seat = |(at, (registered, group, reader)): (usize, (Registered, usize, Option<Arc<Reader>>))| Seat {
            registered,
            group,
            reader,
            source: source_address(servers[at % servers.len()].address, at),
            sampled: at % SAMPLED == 0,
            feed: RefCell::new(Feed::new(at as u64 + 1)),
            socket: RefCell::default(),
            waker: RefCell::default(),
        };
        let seats = setup.seats.into_iter().enumerate().map(seat).collect();
        Ok(Rc::new(Self {
            seats,
            rooms: setup.groups.into_iter().map(|(id, guest)| Room::new(id, guest)).collect(),
            counters: Counters::default(),
            latency: RefCell::new(times()?),
            op_seen: RefCell::new([times()?, times()?, times()?]),
            failure: RefCell::default(),
            desk: setup.desk,
            opaque: setup.opaque,
            api: setup.api,
            servers,
            started: Instant::now(),
            scratch: RefCell::default(),
        }))
    }

    pub fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// How many have an open stream.
    pub fn attached(&self) -> usize {
        self.seats.iter().filter(|seat| seat.feed.borrow().hello).count()
    }

    /// How many follow their group.
    pub fn following(&self) -> usize {
        self.seats.iter().filter(|seat| seat.feed.borrow().follows).count()
    }

    /// Messages without an answer.
    pub fn unanswered(&self) -> usize {
        self.seats.iter().map(|seat| seat.feed.borrow().sent.len()).sum()
    }

    /// Whether a device is in its group, as far as it knows.
    pub fn inside(&self, at: usize) -> bool {
        self.seats[at].feed.borrow().inside
    }

    /// How many of a group's sockets are in it.
    pub fn inside_of(&self, group: usize) -> usize {
        (0..self.seats.len()).filter(|&at| self.seats[at].group == group && self.inside(at)).count()
    }

    /// A device is in its group from this position on.
    pub fn enter(&self, at: usize, seq: u64) {
        let seat = &self.seats[at];
        let room = &self.rooms[seat.group];
        seat.feed.borrow_mut().enter(room.id, seq);
        self.wake(at);
    }

    /// A device was taken out, and did not hear of it.
    pub fn expel(&self, at: usize) {
        let mut feed = self.seats[at].feed.borrow_mut();
        let cursor = feed.cursor;
        feed.leave(cursor);
    }

    /// Sockets of a group that have not had everything up to `head`.
    pub fn behind(&self, group: usize, head: u64) -> Vec<usize> {
        (0..self.seats.len()).filter(|&at| self.seats[at].group == group && self.seats[at].feed.borrow().behind(head)).collect()
    }

    /// How many items the members of a group that ends at `head` did not have.
    pub fn lost(&self, group: usize, head: u64) -> u64 {
        self.rooms[group].lost(self.seats.iter().filter(|seat| seat.group == group), head)
    }

    /// Sends the next message of a device.
    pub fn send(&self, at: usize) {
        let seat = &self.seats[at];
        let now = self.now_us();
        let mut feed = seat.feed.borrow_mut();
        let number = feed.next;
        feed.next += 1;
        add(&self.counters.sent, 1);
        let mut sent = Sent { number, at_us: now, tried_us: now, body: Body::Opaque };
        match seat.reader.as_ref().filter(|_| !self.opaque) {
            Some(reader) => {
                sent.body = Body::Awaited;
                reader.write(number);
            }
            None => self.begin(at, &mut feed, &sent),
        }
        feed.sent.insert(number, sent);
        drop(feed);
        self.wake(at);
    }

    /// A message was encrypted.
    pub fn written(&self, written: Written) {
        let seat = &self.seats[written.seat];
        let mut feed = seat.feed.borrow_mut();
        let Some(mut sent) = feed.sent.remove(&written.number) else { return };
        (sent.body, sent.tried_us) = (Body::Real(written.epoch, written.content), self.now_us());
        self.begin(written.seat, &mut feed, &sent);
        feed.sent.insert(written.number, sent);
        drop(feed);
        self.wake(written.seat);
    }

    /// The first attempt: from here on its time runs.
    fn begin(&self, at: usize, feed: &mut Feed, sent: &Sent) {
        let seat = &self.seats[at];
        self.rooms[seat.group].sent_at.borrow_mut().insert((seat.registered.target.account, sent.number), self.now_us());
        if feed.hello {
            self.put(at, &mut feed.outbox, sent);
        }
    }

    fn put(&self, at: usize, outbox: &mut Outbox, sent: &Sent) {
        let room = &self.rooms[self.seats[at].group];
        let group = room.id.as_bytes();
        match &sent.body {
            Body::Awaited => {}
            Body::Real(epoch, bytes) => {
                outbox.message(|out| wire::put_group_send(out, group, sent.number, sent.number, *epoch, bytes, &[]));
            }
            Body::Opaque => {
                let epoch = room.epoch.get();
                let template = &self.desk.template;
                let mut head = opaque_head(room.id, epoch, STAMP_BYTES + template.len());
                head.extend_from_slice(&Stamp { sender: at as u32, number: sent.number, at_us: sent.at_us }.to_bytes());
                outbox.message(|out| wire::put_group_send(out, group, sent.number, sent.number, epoch, &head, template));
            }
        }
    }

    /// Repeats what was not answered, and acknowledges inboxes.
    pub fn tick(&self) {
        let now = self.now_us();
        for at in 0..self.seats.len() {
            let mut feed = self.seats[at].feed.borrow_mut();
            let Feed { outbox, sent, hello, inbox, acked, inside, asks, .. } = &mut *feed;
            if !*hello {
                continue;
            }
            if std::mem::take(asks) && *inside {
                let room = &self.rooms[self.seats[at].group];
                outbox.message(|out| wire::put_follow(out, room.id.as_bytes()));
            }
            if inbox > acked {
                outbox.message(|out| wire::put_ack(out, *inbox));
                *acked = *inbox;
            }
            let late = |sent: &&mut Sent| !matches!(sent.body, Body::Awaited) && now.saturating_sub(sent.tried_us) > UNANSWERED_US;
            for sent in sent.values_mut().filter(late) {
                sent.tried_us = now;
                add(&self.counters.repeated, 1);
                self.put(at, outbox, sent);
            }
            let waits = !outbox.pending().is_empty();
            drop(feed);
            if waits {
                self.wake(at);
            }
        }
    }

    fn wake(&self, at: usize) {
        if let Some(waker) = self.seats[at].waker.borrow().as_ref() {
            waker.wake_by_ref();
        }
    }

    /// Keeps a device connected.
    pub async fn drive(self: Rc<Self>, at: usize) {
        let seat = &self.seats[at];
        let mut before = false;
        loop {
            let opened = open_stream(&self.servers[at % self.servers.len()], seat.source, &seat.registered.credential).await;
            match opened {
                Ok((socket, early)) => {
                    add(&self.counters.reconnects, u64::from(before));
                    before = true;
                    *seat.socket.borrow_mut() = Some(socket);
                    {
                        let mut feed = seat.feed.borrow_mut();
                        feed.decoder.reset();
                        feed.outbox.reset();
                    }
                    if let Err(error) = self.arrived(at, &early) {
                        *self.failure.borrow_mut() = Some(error.to_string());
                        return;
                    }
                    poll_fn(|cx| self.poll(at, cx)).await;
                    *seat.socket.borrow_mut() = None;
                    *seat.waker.borrow_mut() = None;
                    seat.feed.borrow_mut().hello = false;
                }
                Err(Refusal::Final(why)) => {
                    *self.failure.borrow_mut() = Some(why);
                    return;
                }
                Err(Refusal::Away) => {}
            }
            tokio::time::sleep(AGAIN.mul_f64(rand::Rng::random_range(&mut rand::rng(), 0.5..1.5))).await;
        }
    }

    /// Reads what is there and writes what waits; ready when the connection is over.
    fn poll(self: &Rc<Self>, at: usize, cx: &mut std::task::Context<'_>) -> Poll<()> {
        let seat = &self.seats[at];
        *seat.waker.borrow_mut() = Some(cx.waker().clone());
        let mut guard = seat.socket.borrow_mut();
        let Some(socket) = guard.as_mut() else { return Poll::Ready(()) };
        // Some reads, then the others' turn.
        for turn in 0..8 {
            let mut scratch = self.scratch.borrow_mut();
            let have = seat.feed.borrow_mut().decoder.prepare(&mut scratch);
            let mut buffer = ReadBuf::new(&mut scratch[have..]);
            let read = Pin::new(&mut *socket).poll_read(cx, &mut buffer);
            let filled = buffer.filled().len();
            let arrived = |count: usize| self.arrived(at, &scratch[..have + count]);
            match read {
                Poll::Ready(Ok(())) if filled > 0 => {
                    if let Err(error) = arrived(filled) {
                        tracing::warn!(%error, "a stream is closed");
                        return Poll::Ready(());
                    }
                }
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => {
                    // What was incomplete goes back to where it was.
                    if have > 0 && arrived(0).is_err() {
                        return Poll::Ready(());
                    }
                    break;
                }
            }
            if turn == 7 {
                cx.waker().wake_by_ref();
            }
        }
        loop {
            let mut feed = seat.feed.borrow_mut();
            if feed.outbox.pending().is_empty() {
                break;
            }
            match Pin::new(&mut *socket).poll_write(cx, feed.outbox.pending()) {
                Poll::Ready(Ok(count)) if count > 0 => feed.outbox.advance(count),
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
        match Pin::new(socket).poll_flush(cx) {
            Poll::Ready(Err(_)) => Poll::Ready(()),
            _ => Poll::Pending,
        }
    }

    fn arrived(self: &Rc<Self>, at: usize, bytes: &[u8]) -> Result<(), Malformed> {
        let seat = &self.seats[at];
        let mut guard = seat.feed.borrow_mut();
        let feed = &mut *guard;
        let mut decoder = std::mem::take(&mut feed.decoder);
        let mut closed = false;
        let taken = decoder.take(bytes, |incoming| match incoming {
            Incoming::Binary(message) => wire::each_frame(message, |seen| {
                self.frame(at, feed, seen);
                Ok(())
            }),
            Incoming::Ping(bytes) => {
                feed.outbox.pong(bytes);
                Ok(())
            }
            Incoming::Close(_) => {
                closed = true;
                Ok(())
            }
        });
        feed.decoder = decoder;
        let fetch = feed.inside && feed.head > feed.cursor && !feed.fetching && feed.hello;
        if fetch {
            feed.fetching = true;
            tokio::task::spawn_local(self.clone().fetch(at));
        }
        taken?;
        if closed { Err(Malformed("its goodbye")) } else { Ok(()) }
    }

    fn frame(self: &Rc<Self>, at: usize, feed: &mut Feed, seen: Seen<'_>) {
        let room = &self.rooms[self.seats[at].group];
        match seen {
            Seen::Hello { .. } => {
                (feed.hello, feed.follows, feed.streamed) = (true, false, 0);
                if feed.inside {
                    feed.outbox.message(|out| wire::put_follow(out, room.id.as_bytes()));
                }
                let now = self.now_us();
                for sent in feed.sent.values_mut().filter(|sent| !matches!(sent.body, Body::Awaited)) {
                    sent.tried_us = now;
                    add(&self.counters.repeated, 1);
                    self.put(at, &mut feed.outbox, sent);
                }
            }
            Seen::Item(_) if !feed.inside => add(&self.counters.leaked, 1),
            Seen::Item(item) => {
                if item.seq <= feed.streamed {
                    add(&self.counters.duplicates, 1);
                }
                feed.streamed = feed.streamed.max(item.seq);
                feed.head = feed.head.max(item.seq);
                if !feed.fetching && item.after <= feed.cursor {
                    self.item(at, feed, &item);
                }
            }
            Seen::Head { code: 0, seq, .. } => (feed.follows, feed.head) = (true, feed.head.max(seq)),
            // Not now; or an edge that does not know yet who is in the group.
            Seen::Head { .. } => (feed.follows, feed.asks) = (false, feed.inside),
            Seen::Envelope { seq, kind, content, .. } => {
                feed.inbox = feed.inbox.max(seq);
                if i32::from(kind) == EnvelopeType::Mls as i32 {
                    self.invited(at, feed, content);
                }
            }
            Seen::Receipt { seq, .. } => feed.inbox = feed.inbox.max(seq),
            Seen::Gap { to } => feed.inbox = feed.inbox.max(to),
            Seen::Result { request, code, .. } => self.answered(at, feed, request, code),
            Seen::QueueEmpty | Seen::Closing { .. } | Seen::Other => {}
        }
    }

    /// It was added: it joins if it reads, and follows.
    fn invited(self: &Rc<Self>, at: usize, feed: &mut Feed, content: &[u8]) {
        let seat = &self.seats[at];
        let room = &self.rooms[seat.group];
        let Ok(invitation) = <GroupInvitation as prost::Message>::decode(content) else {
            *self.failure.borrow_mut() = Some("an invitation can't be read".into());
            return;
        };
        // It may come twice.
        if invitation.group_id != room.id.as_bytes()[..] || (feed.inside && invitation.seq <= feed.cursor) {
            return;
        }
        room.complete_us.set(self.now_us());
        if let Some(reader) = seat.reader.as_ref().filter(|_| !self.opaque) {
            reader.join(invitation.epoch, invitation.welcome.to_vec(), self.tree(at, invitation.epoch));
        }
        feed.enter(room.id, invitation.seq);
    }

    /// The tree of an epoch, fetched once for all: 1,500 copies would measure the tool.
    fn tree(self: &Rc<Self>, at: usize, epoch: u64) -> Tree {
        let group = self.seats[at].group;
        let room = &self.rooms[group];
        if let Some(tree) = room.trees.borrow().get(&epoch) {
            return Arc::clone(tree);
        }
        let tree = Tree::default();
        room.trees.borrow_mut().insert(epoch, Arc::clone(&tree));
        let (hall, fetched) = (Rc::clone(self), Arc::clone(&tree));
        tokio::task::spawn_local(async move {
            let path = format!("/v1/groups/{}/trees/{epoch}", hall.rooms[group].id);
            match hall.api.insist_bytes(&path, &hall.seats[at].registered.credential).await {
                // Set once, here.
                Ok(bytes) => drop(fetched.set(bytes)),
                Err(error) => *hall.failure.borrow_mut() = Some(format!("{error:#}")),
            }
        });
        tree
    }

    fn answered(&self, at: usize, feed: &mut Feed, request: u64, code: u32) {
        const AGAIN: [Code; 5] = [Code::Conflict, Code::RateLimited, Code::Unavailable, Code::OutcomeUnknown, Code::Internal];
        let seat = &self.seats[at];
        let code = Code::try_from(code as i32).unwrap_or(Code::Internal);
        if code == Code::Ok {
            if feed.sent.remove(&request).is_some() {
                add(&self.counters.accepted, 1);
                add(&self.rooms[seat.group].accepted, 1);
            }
        } else if AGAIN.contains(&code) {
            let Some(sent) = feed.sent.get_mut(&request) else { return };
            match (&sent.body, &seat.reader) {
                // Of an epoch that is over for too long: encrypted anew, under its number.
                (Body::Real(..), Some(reader)) if code == Code::Conflict => {
                    sent.body = Body::Awaited;
                    reader.write(request);
                }
                // The tick sends it again soon; an opaque one in the epoch of then.
                _ => sent.tried_us = self.now_us().saturating_sub(UNANSWERED_US - 100_000),
            }
        } else if feed.sent.remove(&request).is_some() {
            add(&self.counters.refused, 1);
        }
    }

    /// An item in its order.
    fn item(&self, at: usize, feed: &mut Feed, item: &Item<'_>) {
        // What was fetched and comes by the stream as well.
        if item.seq <= feed.cursor {
            return;
        }
        feed.cursor = item.seq;
        feed.had += 1;
        add(&self.counters.items, 1);
        let seat = &self.seats[at];
        let room = &self.rooms[seat.group];
        let Some(shared) = room.shared(item) else {
            add(&self.counters.different, 1);
            return;
        };
        match item.kind {
            MESSAGE => {
                add(&self.counters.deliveries, 1);
                if let Some(account) = item.sender_account.first_chunk::<16>().filter(|_| seat.sampled)
                    && let Some(sent) = room.sent_at.borrow().get(&(*account, item.client_message_id))
                {
                    let took = self.now_us().saturating_sub(*sent);
                    self.latency.borrow_mut().saturating_record(took.max(1));
                }
            }
            COMMIT => {
                room.epoch.set(room.epoch.get().max(item.epoch + 1));
                if let Some((op, sent)) = room.commits.borrow().get(&item.epoch) {
                    let took = self.now_us().saturating_sub(*sent).max(1);
                    self.op_seen.borrow_mut()[*op as usize].saturating_record(took);
                }
                if room.guest == Some(at) && room.removals.borrow().contains(&item.epoch) {
                    feed.leave(item.seq);
                }
            }
            _ => {}
        }
        if let Some(reader) = seat.reader.as_ref().filter(|_| !self.opaque || shared.kind == Kind::Commit) {
            reader.item(&shared);
        }
    }

    /// Fetches what a socket missed, as a client does.
    pub async fn fetch(self: Rc<Self>, at: usize) {
        use base64::Engine as _;
        let seat = &self.seats[at];
        let group = self.rooms[seat.group].id;
        loop {
            let (cursor, head) = {
                let feed = seat.feed.borrow();
                (feed.cursor, feed.head)
            };
            if cursor >= head {
                break;
            }
            let path = format!("/v1/groups/{group}/items?after={cursor}&limit=500");
            let page = match self.api.insist(reqwest::Method::GET, &path, Some(&seat.registered.credential), None).await {
                Ok(page) => page,
                Err(_) => break,
            };
            let items = page["items"].as_array().map(Vec::as_slice).unwrap_or_default();
            let mut feed = seat.feed.borrow_mut();
            for item in items {
                let number = |name: &str| item[name].as_u64().unwrap_or_default();
                let content = item["content"].as_str().unwrap_or_default();
                let content = base64::engine::general_purpose::STANDARD.decode(content).unwrap_or_default();
                let account = item["sender_account"].as_str().and_then(|text| text.parse::<crate::ids::AccountId>().ok());
                let account = account.map(|account| *account.as_bytes());
                let kind = match item["kind"].as_str() {
                    Some("commit") => COMMIT,
                    Some("message") => MESSAGE,
                    _ => 0,
                };
                let item = Item {
                    seq: number("seq"),
                    after: number("after"),
                    kind,
                    epoch: number("epoch"),
                    sender_account: account.as_ref().map_or(&[], |account| account.as_slice()),
                    client_message_id: number("client_message_id"),
                    content: &content,
                };
                if !feed.inside {
                    break;
                }
                add(&self.counters.fetched, 1);
                self.item(at, &mut feed, &item);
            }
            if items.is_empty() || !feed.inside {
                break;
            }
        }
        seat.feed.borrow_mut().fetching = false;
    }

    /// What is known of the newest item: for the end, when nothing tells of it any more.
    pub fn tell_head(self: &Rc<Self>, at: usize, head: u64) {
        let mut feed = self.seats[at].feed.borrow_mut();
        feed.head = feed.head.max(head);
        if !feed.fetching && feed.cursor < feed.head {
            feed.fetching = true;
            tokio::task::spawn_local(self.clone().fetch(at));
        }
    }
}
