//! The sockets of a run: what each has had of its group, and what it owes. One thread; reading allocates nothing for an item.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::io::{AsyncRead as _, AsyncWrite as _, ReadBuf};

use super::member::{Member, opaque_head};
use crate::cli::load::api::{Api, Registered};
use crate::cli::load::engine::{Refusal, Server, open_stream, source_address};
use crate::cli::load::socket::Socket;
use crate::cli::load::wire::{self, Item, Malformed, STAMP_BYTES, Seen, Stamp};
use crate::cli::load::ws::{Decoder, Incoming, Outbox};
use crate::ids::GroupId;
use crate::wire::stream::Code;

/// Kinds of items, as `stream.proto` numbers them.
const COMMIT: u32 = 2;
const MESSAGE: u32 = 4;
/// Each so many-th socket measures how long things take: all of them would measure the tool.
const SAMPLED: usize = 16;
/// Pause before a connection is tried again.
const AGAIN: Duration = Duration::from_millis(200);
/// After so long without an answer a message is sent again under its number.
const UNANSWERED_US: u64 = 5_000_000;

/// A message that was sent and not answered.
struct Sent {
    number: u64,
    at_us: u64,
    tried_us: u64,
    /// Of a real one: its ciphertext and epoch, sent again as they are.
    real: Option<(u64, Vec<u8>)>,
}

/// One socket's side.
struct Feed {
    decoder: Decoder,
    outbox: Outbox,
    hello: bool,
    /// Items up to here were had, each once.
    cursor: u64,
    /// The newest item that is known of.
    head: u64,
    fetching: bool,
    inbox: u64,
    acked: u64,
    next: u64,
    sent: BTreeMap<u64, Sent>,
}

/// A device that is online.
pub struct Seat {
    pub registered: Registered,
    pub group: usize,
    /// Its keys, if it decrypts.
    pub member: Option<RefCell<Member>>,
    source: Option<IpAddr>,
    sampled: bool,
    feed: RefCell<Feed>,
    socket: RefCell<Option<Socket>>,
    waker: RefCell<Option<Waker>>,
}

/// A group of the run.
pub struct Room {
    pub id: GroupId,
    pub epoch: Cell<u64>,
    /// When each of a sender's messages was sent, by its account and number.
    sent_at: RefCell<HashMap<([u8; 16], u64), u64>>,
    /// When the commit that ended each epoch was submitted.
    pub commits: RefCell<HashMap<u64, u64>>,
}

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
    pub decrypted: Cell<u64>,
    pub undecryptable: Cell<u64>,
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
    pub op_seen: RefCell<Histogram<u64>>,
    pub failure: RefCell<Option<String>>,
    api: Api,
    servers: Vec<Server>,
    template: Vec<u8>,
    opaque: bool,
    started: Instant,
    scratch: RefCell<Vec<u8>>,
}

/// What a hall is made from.
pub struct Setup {
    pub api: Api,
    /// Devices attach to them in turn.
    pub servers: Vec<Server>,
    pub groups: Vec<(GroupId, u64)>,
    /// Who sits there: credential, group, position to begin behind, keys.
    pub seats: Vec<(Registered, usize, u64, Option<Member>)>,
    pub payload: usize,
    pub opaque: bool,
}

impl Hall {
    pub fn new(setup: Setup) -> anyhow::Result<Rc<Self>> {
        let servers = setup.servers;
        let mut template = vec![0; setup.payload.saturating_sub(STAMP_BYTES)];
        rand::Rng::fill(&mut rand::rng(), &mut template[..]);
        let seat = |(at, (registered, group, cursor, member)): (usize, (Registered, usize, u64, Option<Member>))| Seat {
            registered,
            group,
            member: member.map(RefCell::new),
            source: source_address(servers[at % servers.len()].address, at),
            sampled: at % SAMPLED == 0,
            feed: RefCell::new(Feed {
                decoder: Decoder::default(),
                outbox: Outbox::new(at as u64 + 1),
                hello: false,
                cursor,
                head: cursor,
                fetching: false,
                inbox: 0,
                acked: 0,
                next: 1,
                sent: BTreeMap::new(),
            }),
            socket: RefCell::default(),
            waker: RefCell::default(),
        };
        let room = |(id, epoch)| Room { id, epoch: Cell::new(epoch), sent_at: RefCell::default(), commits: RefCell::default() };
        let seats = setup.seats.into_iter().enumerate().map(seat).collect();
        Ok(Rc::new(Self {
            seats,
            rooms: setup.groups.into_iter().map(room).collect(),
            counters: Counters::default(),
            latency: RefCell::new(Histogram::new_with_bounds(1, 600_000_000, 3)?),
            op_seen: RefCell::new(Histogram::new_with_bounds(1, 600_000_000, 3)?),
            failure: RefCell::default(),
            api: setup.api,
            servers,
            template,
            opaque: setup.opaque,
            started: Instant::now(),
            scratch: RefCell::default(),
        }))
    }

    pub fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// How many follow their group on an open stream.
    pub fn attached(&self) -> usize {
        self.seats.iter().filter(|seat| seat.feed.borrow().hello).count()
    }

    /// Messages without an answer.
    pub fn unanswered(&self) -> usize {
        self.seats.iter().map(|seat| seat.feed.borrow().sent.len()).sum()
    }

    /// Sockets of a group that have not had everything up to `head`.
    pub fn behind(&self, group: usize, head: u64) -> Vec<usize> {
        let behind = |at: &usize| self.seats[*at].group == group && self.seats[*at].feed.borrow().cursor < head;
        (0..self.seats.len()).filter(behind).collect()
    }

    /// Sends the next message of a device.
    pub fn send(self: &Rc<Self>, at: usize) {
        let seat = &self.seats[at];
        let room = &self.rooms[seat.group];
        let now = self.now_us();
        let mut feed = seat.feed.borrow_mut();
        let number = feed.next;
        feed.next += 1;
        room.sent_at.borrow_mut().insert((seat.registered.target.account, number), now);
        let mut sent = Sent { number, at_us: now, tried_us: now, real: None };
        if let Some(member) = seat.member.as_ref().filter(|_| !self.opaque) {
            let mut member = member.borrow_mut();
            let content = [&Stamp { sender: at as u32, number, at_us: now }.to_bytes()[..], &self.template].concat();
            let epoch = member.view().map_or(0, |view| view.0);
            match member.encrypt(&content) {
                Ok(bytes) => sent.real = Some((epoch, bytes)),
                Err(error) => {
                    *self.failure.borrow_mut() = Some(error.to_string());
                    return;
                }
            }
        }
        add(&self.counters.sent, 1);
        if feed.hello {
            self.put(at, &mut feed.outbox, &sent);
        }
        feed.sent.insert(number, sent);
        drop(feed);
        self.wake(at);
    }

    fn put(&self, at: usize, outbox: &mut Outbox, sent: &Sent) {
        let room = &self.rooms[self.seats[at].group];
        let group = room.id.as_bytes();
        match &sent.real {
            Some((epoch, bytes)) => {
                outbox.message(|out| wire::put_group_send(out, group, sent.number, sent.number, *epoch, bytes, &[]));
            }
            None => {
                let epoch = room.epoch.get();
                let mut head = opaque_head(room.id, epoch, STAMP_BYTES + self.template.len());
                head.extend_from_slice(&Stamp { sender: at as u32, number: sent.number, at_us: sent.at_us }.to_bytes());
                outbox.message(|out| wire::put_group_send(out, group, sent.number, sent.number, epoch, &head, &self.template));
            }
        }
    }

    /// Repeats what was not answered, and acknowledges inboxes.
    pub fn tick(self: &Rc<Self>) {
        let now = self.now_us();
        for at in 0..self.seats.len() {
            let mut feed = self.seats[at].feed.borrow_mut();
            let Feed { outbox, sent, hello, inbox, acked, .. } = &mut *feed;
            if !*hello {
                continue;
            }
            if inbox > acked {
                outbox.message(|out| wire::put_ack(out, *inbox));
                *acked = *inbox;
            }
            for sent in sent.values_mut().filter(|sent| now.saturating_sub(sent.tried_us) > UNANSWERED_US) {
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
        let fetch = feed.head > feed.cursor && !feed.fetching && feed.hello;
        if fetch {
            feed.fetching = true;
            tokio::task::spawn_local(self.clone().fetch(at));
        }
        taken?;
        if closed { Err(Malformed("its goodbye")) } else { Ok(()) }
    }

    fn frame(&self, at: usize, feed: &mut Feed, seen: Seen<'_>) {
        let room = &self.rooms[self.seats[at].group];
        match seen {
            Seen::Hello { .. } => {
                feed.hello = true;
                feed.outbox.message(|out| wire::put_follow(out, room.id.as_bytes()));
                let now = self.now_us();
                for sent in feed.sent.values_mut() {
                    sent.tried_us = now;
                    add(&self.counters.repeated, 1);
                    self.put(at, &mut feed.outbox, sent);
                }
            }
            Seen::Item(item) => {
                if !feed.fetching && item.after <= feed.cursor {
                    self.item(at, feed, &item);
                }
                feed.head = feed.head.max(item.seq);
            }
            Seen::Head { code: 0, seq, .. } => feed.head = feed.head.max(seq),
            Seen::Envelope { seq, .. } => feed.inbox = feed.inbox.max(seq),
            Seen::Receipt { seq, .. } => feed.inbox = feed.inbox.max(seq),
            Seen::Gap { to } => feed.inbox = feed.inbox.max(to),
            Seen::Result { request, code, .. } => self.answered(feed, request, code),
            Seen::Head { .. } | Seen::QueueEmpty | Seen::Closing { .. } | Seen::Other => {}
        }
    }

    fn answered(&self, feed: &mut Feed, request: u64, code: u32) {
        const AGAIN: [Code; 5] = [Code::Conflict, Code::RateLimited, Code::Unavailable, Code::OutcomeUnknown, Code::Internal];
        let code = Code::try_from(code as i32).unwrap_or(Code::Internal);
        if code == Code::Ok {
            if feed.sent.remove(&request).is_some() {
                add(&self.counters.accepted, 1);
            }
        } else if AGAIN.contains(&code) {
            // The tick sends it again soon; of an opaque one in the epoch of then.
            if let Some(sent) = feed.sent.get_mut(&request) {
                sent.tried_us = self.now_us().saturating_sub(UNANSWERED_US - 100_000);
            }
        } else if feed.sent.remove(&request).is_some() {
            add(&self.counters.refused, 1);
        }
    }

    /// An item in its order.
    fn item(&self, at: usize, feed: &mut Feed, item: &Item<'_>) {
        if item.seq <= feed.cursor {
            add(&self.counters.duplicates, 1);
            return;
        }
        feed.cursor = item.seq;
        add(&self.counters.items, 1);
        let seat = &self.seats[at];
        let room = &self.rooms[seat.group];
        match item.kind {
            MESSAGE => {
                add(&self.counters.deliveries, 1);
                if let Some(account) = item.sender_account.first_chunk::<16>().filter(|_| seat.sampled)
                    && let Some(sent) = room.sent_at.borrow().get(&(*account, item.client_message_id))
                {
                    let took = self.now_us().saturating_sub(*sent);
                    self.latency.borrow_mut().saturating_record(took.max(1));
                }
                let own = item.sender_account == seat.registered.target.account;
                if let Some(member) = seat.member.as_ref().filter(|_| !self.opaque && !own) {
                    match member.borrow_mut().receive(item.content) {
                        Ok(Some(content)) if Stamp::from_bytes(&content).is_some() => add(&self.counters.decrypted, 1),
                        _ => add(&self.counters.undecryptable, 1),
                    }
                }
            }
            COMMIT => {
                room.epoch.set(room.epoch.get().max(item.epoch + 1));
                if seat.sampled
                    && let Some(sent) = room.commits.borrow().get(&item.epoch)
                {
                    self.op_seen.borrow_mut().saturating_record(self.now_us().saturating_sub(*sent).max(1));
                }
                // Whoever commits has merged it by its verdict.
                if let Some(member) = &seat.member
                    && member.borrow().view().is_some_and(|view| view.0 == item.epoch)
                    && member.borrow_mut().receive(item.content).is_err()
                {
                    add(&self.counters.undecryptable, 1);
                }
            }
            _ => {}
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
                add(&self.counters.fetched, 1);
                self.item(at, &mut feed, &item);
            }
            if items.is_empty() {
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
