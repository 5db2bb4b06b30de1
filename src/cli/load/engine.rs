//! Drives all devices of a run on one thread: no locks, no wake-ups between threads, one read and one write a batch.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use anyhow::bail;
use base64::Engine as _;
use hdrhistogram::Histogram;
use rand::Rng as _;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead as _, AsyncReadExt as _, AsyncWrite as _, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpSocket;
use tokio::sync::Notify;

use super::api::Registered;
use super::audit::{Audit, Routes};
use super::crypto::Parties;
use super::device::{Device, Ended};
use super::record::{Event, Record};
use super::socket::{Socket, Tls};
use super::wire::{STAMP_BYTES, Stamp, Target};
use crate::client::PrivateCa;

/// How often acknowledgements that are small, and repeats that are due, go out.
pub const TICK: Duration = Duration::from_millis(5);
const BACKOFF_MIN: Duration = Duration::from_millis(20);
const BACKOFF_MAX: Duration = Duration::from_millis(500);
/// Connections from one source address: below the kernel's range of ephemeral ports.
const CONNECTIONS_PER_ADDRESS: usize = 20_000;

/// Numbers that a run counts besides the audit.
#[derive(Debug, Default)]
pub struct Counters {
    /// Items that came again after a reconnect and were dropped by seq, as a client does.
    pub redelivered: Cell<u64>,
    /// Items that did not grow in seq within one connection.
    pub disorder: Cell<u64>,
    /// Gap frames.
    pub gaps: Cell<u64>,
    /// Messages that delivery receipts told of.
    pub receipts: Cell<u64>,
    /// Messages that receipts said were not delivered.
    pub receipts_failed: Cell<u64>,
    /// Connections that were lost and made again.
    pub reconnects: Cell<u64>,
    /// Envelopes that could not be decrypted.
    pub undecryptable: Cell<u64>,
}

impl Counters {
    /// Adds to one of them.
    pub fn add(&self, which: impl Fn(&Self) -> &Cell<u64>, count: u64) {
        let cell = which(self);
        cell.set(cell.get() + count);
    }
}

/// One connection's place.
pub struct Seat {
    device: RefCell<Device>,
    socket: RefCell<Option<Socket>>,
    waker: RefCell<Option<Waker>>,
    credential: String,
    server: usize,
    source: Option<IpAddr>,
}

/// One server that devices connect to.
pub(super) struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    host: String,
    tls: Option<Tls>,
}

/// Everything that the devices of a run share. One thread only.
pub struct World {
    /// Sending devices, then receiving ones.
    pub seats: Vec<Seat>,
    /// How many of them send.
    pub senders: usize,
    /// Who writes to whom.
    pub routes: Routes,
    /// In flight for each sender.
    pub window: u64,
    /// Payload behind the stamp.
    pub template: Vec<u8>,
    /// Sends go by HTTP; streams only receive.
    pub by_http: bool,
    /// A message is in flight until its recipient has it, not only until it is accepted.
    pub until_delivered: bool,
    /// Acknowledge at once when the queue is empty.
    pub eager_acks: bool,
    /// Told when a sender's window may have room again.
    pub room: Vec<Notify>,
    /// What became of every message.
    pub audit: RefCell<Audit>,
    /// From sent (or due) to received, in microseconds.
    pub latency: RefCell<Histogram<u64>>,
    /// Other numbers.
    pub counters: Counters,
    /// When the first and the latest envelope came, in microseconds; 0 before.
    pub first_us: Cell<u64>,
    /// The latest.
    pub last_us: Cell<u64>,
    servers: Vec<Server>,
    targets: Vec<Target>,
    crypto: Option<RefCell<Parties>>,
    /// Messages a microsecond, of all senders together; none in a closed loop.
    rate: Option<f64>,
    started: Instant,
    now_us: Cell<u64>,
    begin_us: Cell<u64>,
    running: Cell<bool>,
    scratch: RefCell<Vec<u8>>,
    fault: RefCell<Option<String>>,
    /// Senders whose messages arrived since they were pumped last; each once.
    landed: RefCell<Vec<usize>>,
    landed_any: Notify,
    record: Option<RefCell<Record>>,
}

/// What a world is made of.
pub struct Setup<'a> {
    /// The server, or edges of one cluster: devices attach to them in turn.
    pub servers: &'a [url::Url],
    /// Who vouches for it, if it speaks TLS.
    pub ca: Option<&'a PrivateCa>,
    /// Who sends, and how many messages each sends at most.
    pub senders: &'a [Registered],
    /// Who receives: the devices, account by account.
    pub recipients: &'a [Registered],
    /// Sending and receiving halves, in that order.
    pub devices: Vec<Device>,
    /// Who writes to whom.
    pub routes: Routes,
    /// In flight for each sender.
    pub window: u64,
    /// Bytes of a content, the stamp included.
    pub payload: usize,
    /// Messages a second.
    pub rate: Option<f64>,
    /// Sends go by HTTP.
    pub by_http: bool,
    /// A message is in flight until its recipient has it, not only until it is accepted.
    pub until_delivered: bool,
    /// Acknowledge at once when the queue is empty.
    pub eager_acks: bool,
    /// Real ciphertexts.
    pub crypto: Option<Parties>,
    /// Where each acceptance and each delivery gets a line.
    pub record: Option<&'a Path>,
}

/// Address, `Host` header and TLS of a server.
pub(super) async fn resolve(server: &url::Url, ca: Option<&PrivateCa>) -> anyhow::Result<Server> {
    let host = server.host_str().unwrap_or("127.0.0.1").to_owned();
    let name = host.trim_matches(['[', ']']);
    let tls = match (server.scheme(), ca) {
        ("http", _) => None,
        ("https", Some(ca)) => Some(Tls { connector: ca.config().into(), name: ServerName::try_from(name.to_owned())? }),
        (other, _) => bail!("no TLS is known for {other}://"),
    };
    let port = server.port_or_known_default().unwrap_or(80);
    let address = tokio::net::lookup_host((name, port)).await?.next();
    let Some(address) = address else { bail!("{host} has no address") };
    Ok(Server { address, host: format!("{host}:{port}"), tls })
}

impl World {
    /// Nothing is connected yet.
    pub async fn new(setup: Setup<'_>) -> anyhow::Result<Rc<Self>> {
        let mut servers = Vec::with_capacity(setup.servers.len());
        for server in setup.servers {
            servers.push(resolve(server, setup.ca).await?);
        }
        let devices_each = setup.routes.devices as usize;
        let server_of = |at: usize| match at.checked_sub(setup.senders.len()) {
            // The devices of an account are on different edges, and the first ones of all accounts on all of them.
            Some(device) => (device / devices_each + device % devices_each) % servers.len(),
            None => at % servers.len(),
        };
        let mut template = vec![0; setup.payload.saturating_sub(STAMP_BYTES)];
        rand::rng().fill(&mut template[..]);
        let everyone = setup.senders.iter().chain(setup.recipients);
        let seats = everyone.zip(setup.devices).enumerate().map(|(at, (registered, device))| Seat {
            device: RefCell::new(device),
            socket: RefCell::new(None),
            waker: RefCell::new(None),
            credential: registered.credential.clone(),
            server: server_of(at),
            source: source_address(servers[server_of(at)].address, at),
        });
        let seats = seats.collect();
        Ok(Rc::new(Self {
            seats,
            senders: setup.senders.len(),
            routes: setup.routes,
            window: setup.window,
            template,
            by_http: setup.by_http,
            until_delivered: setup.until_delivered,
            eager_acks: setup.eager_acks,
            room: setup.senders.iter().map(|_| Notify::new()).collect(),
            audit: RefCell::new(Audit::new(setup.senders.len(), setup.routes)),
            latency: RefCell::new(Histogram::new_with_bounds(1, 600_000_000, 3)?),
            counters: Counters::default(),
            first_us: Cell::new(0),
            last_us: Cell::new(0),
            servers,
            targets: setup.recipients.iter().map(|r| r.target).collect(),
            crypto: setup.crypto.map(RefCell::new),
            rate: setup.rate.map(|per_second| per_second / 1e6),
            started: Instant::now(),
            now_us: Cell::new(0),
            begin_us: Cell::new(0),
            running: Cell::new(false),
            scratch: RefCell::new(Vec::new()),
            fault: RefCell::new(None),
            landed: RefCell::default(),
            landed_any: Notify::new(),
            record: setup.record.map(Record::create).transpose()?.map(RefCell::new),
        }))
    }

    /// Microseconds since the world was made, as of the last look at the clock.
    pub fn now_us(&self) -> u64 {
        self.now_us.get()
    }

    /// Looks at the clock.
    pub fn look(&self) -> u64 {
        let now = self.started.elapsed().as_micros() as u64;
        self.now_us.set(now);
        now
    }

    /// Lets the senders begin.
    pub fn begin(&self) {
        self.begin_us.set(self.look());
        self.running.set(true);
        for at in 0..self.senders {
            self.pump(at, false);
        }
    }

    /// No new messages; what is in flight goes on.
    pub fn end(&self) {
        self.running.set(false);
    }

    /// Between begin and end.
    pub fn running(&self) -> bool {
        self.running.get()
    }

    /// Why the run can't go on, if so.
    pub fn fault(&self) -> Option<String> {
        self.fault.borrow().clone()
    }

    /// Where a sender's message goes: all devices of its recipient.
    pub fn targets(&self, sender: u64, number: u64) -> &[Target] {
        self.devices_of(self.routes.recipient(sender, number))
    }

    fn devices_of(&self, recipient: u64) -> &[Target] {
        let devices = self.routes.devices as usize;
        &self.targets[recipient as usize * devices..][..devices]
    }

    /// Notes what became of a message now, where that is asked for.
    pub fn note(&self, event: Event, due_us: u64, recipient: u64) {
        let Some(record) = &self.record else { return };
        let account = &self.devices_of(recipient)[0].account;
        if let Err(error) = record.borrow_mut().note(event, due_us, self.now_us(), account) {
            self.fail(format!("the record can't be written: {error}"));
        }
    }

    /// Writes what is left of the record.
    pub fn close_record(&self) -> io::Result<()> {
        self.record.as_ref().map_or(Ok(()), |record| record.borrow_mut().flush())
    }

    /// When a sender's message is due in an open loop: messages of all senders are evenly spaced, in turn.
    pub fn scheduled(&self, sender: u64, number: u64) -> Option<u64> {
        let nth = (number - 1) * self.senders as u64 + sender;
        self.rate.map(|rate| self.begin_us.get() + (nth as f64 / rate) as u64)
    }

    /// The time to stamp on a message that may go now; none if its time has not come.
    pub fn due(&self, sender: u64, number: u64) -> Option<u64> {
        if !self.running.get() {
            return None;
        }
        match self.scheduled(sender, number) {
            Some(at) => (at <= self.now_us()).then_some(at),
            None => Some(self.now_us()),
        }
    }

    /// A ciphertext, if this run makes real ones.
    pub fn encrypt(&self, sender: u64, number: u64, stamp: &[u8; STAMP_BYTES]) -> Option<(u8, Vec<u8>)> {
        let parties = self.crypto.as_ref()?;
        let plaintext = [&stamp[..], &self.template].concat();
        let recipient = self.routes.recipient(sender, number) as usize;
        match parties.borrow_mut().encrypt(sender as usize, recipient, &plaintext) {
            Ok(message) => Some(message),
            Err(error) => {
                self.fail(format!("libsignal can't encrypt: {error}"));
                Some((2, Vec::new()))
            }
        }
    }

    /// The application on a receiving device is handed an envelope's content.
    pub fn received(&self, device: u64, kind: u8, content: &[u8], sender_device: u32, sender_account: &[u8]) {
        let decrypted;
        let content = match &self.crypto {
            None => content,
            Some(parties) => match parties.borrow_mut().decrypt(device as usize, sender_account, sender_device, kind, content) {
                Ok(plaintext) => {
                    decrypted = plaintext;
                    &decrypted
                }
                Err(_) => return self.counters.add(|c| &c.undecryptable, 1),
            },
        };
        let mut audit = self.audit.borrow_mut();
        let Some(stamp) = Stamp::from_bytes(content).filter(|_| content[STAMP_BYTES..] == self.template) else {
            audit.corrupt += 1;
            return;
        };
        let now = self.now_us();
        if audit.receive(device, u64::from(stamp.sender), stamp.number) {
            self.latency.borrow_mut().saturating_record(now.saturating_sub(stamp.at_us).max(1));
            self.note(Event::Delivered, stamp.at_us, device / self.routes.devices);
            if audit.has_received(u64::from(stamp.sender), stamp.number) {
                self.land(stamp.sender as usize);
            }
        }
        if self.first_us.get() == 0 {
            self.first_us.set(now);
        }
        self.last_us.set(now);
    }

    fn land(&self, sender: usize) {
        if let Some(sending) = self.seats[sender].device.borrow_mut().session.sending_mut() {
            sending.landed();
        }
        let mut landed = self.landed.borrow_mut();
        if landed.is_empty() {
            self.landed_any.notify_one();
        }
        if landed.last() != Some(&sender) {
            landed.push(sender);
        }
    }

    /// Lets senders go on whose messages have arrived. Runs when all sockets that were readable have been read, so that
    /// many messages go out in one write.
    pub async fn refill(self: Rc<Self>) {
        loop {
            self.landed_any.notified().await;
            tokio::task::yield_now().await;
            let mut senders = self.landed.take();
            senders.sort_unstable();
            senders.dedup();
            self.look();
            for at in senders {
                if self.by_http {
                    self.room[at].notify_one();
                } else {
                    self.pump(at, false);
                }
            }
        }
    }

    fn fail(&self, why: String) {
        self.running.set(false);
        self.fault.borrow_mut().get_or_insert(why);
    }

    /// Lets a device write what may go now, outside of its own task.
    pub fn pump(&self, at: usize, tick: bool) {
        let seat = &self.seats[at];
        let socket = seat.socket.borrow();
        let Some(socket) = socket.as_ref() else { return };
        let mut device = seat.device.borrow_mut();
        device.fill(self, tick);
        while !device.outbox.pending().is_empty() {
            match socket.try_write(device.outbox.pending()) {
                Ok(count) => device.outbox.advance(count),
                Err(error) => {
                    // Blocked, or broken: its own task finds out which.
                    if let Some(waker) = seat.waker.borrow().as_ref().filter(|_| error.kind() != io::ErrorKind::Interrupted) {
                        waker.wake_by_ref();
                    }
                    return;
                }
            }
        }
    }

    /// Looks at a device.
    pub fn device<T>(&self, at: usize, look: impl FnOnce(&mut Device) -> T) -> T {
        look(&mut self.seats[at].device.borrow_mut())
    }

    /// How many of these devices are attached.
    pub fn attached(&self, range: std::ops::Range<usize>) -> usize {
        range.filter(|&at| self.seats[at].device.borrow().session.attached).count()
    }

    fn poll(&self, at: usize, cx: &mut Context<'_>) -> Poll<()> {
        let seat = &self.seats[at];
        let mut socket = seat.socket.borrow_mut();
        let Some(socket) = socket.as_mut() else { return Poll::Ready(()) };
        let mut device = seat.device.borrow_mut();
        let mut scratch = self.scratch.borrow_mut();
        {
            let mut waker = seat.waker.borrow_mut();
            if !waker.as_ref().is_some_and(|w| w.will_wake(cx.waker())) {
                *waker = Some(cx.waker().clone());
            }
        }
        loop {
            let have = device.decoder.prepare(&mut scratch);
            let mut buffer = ReadBuf::new(&mut scratch[have..]);
            let read = Pin::new(&mut *socket).poll_read(cx, &mut buffer);
            let filled = buffer.filled().len();
            self.look();
            let fine = device.arrived(self, &scratch[..have + filled]);
            if let Err(error) = fine {
                self.fail(error.to_string());
                return Poll::Ready(());
            }
            match read {
                Poll::Pending => break,
                Poll::Ready(Ok(())) if filled > 0 && device.session.ended.is_none() => {}
                Poll::Ready(_) => return Poll::Ready(()),
            }
            // Answer while the batch is warm; the next read then finds more.
            if !self.write(socket, &mut device, cx) {
                return Poll::Ready(());
            }
        }
        if self.write(socket, &mut device, cx) { Poll::Pending } else { Poll::Ready(()) }
    }

    /// Fills and writes; false if the connection is broken.
    fn write(&self, socket: &mut Socket, device: &mut Device, cx: &mut Context<'_>) -> bool {
        device.fill(self, false);
        while !device.outbox.pending().is_empty() {
            match Pin::new(&mut *socket).poll_write(cx, device.outbox.pending()) {
                Poll::Ready(Ok(count)) if count > 0 => device.outbox.advance(count),
                Poll::Ready(_) => return false,
                Poll::Pending => break,
            }
        }
        // Of TLS something may wait in its own buffer.
        !matches!(Pin::new(socket).poll_flush(cx), Poll::Ready(Err(_)))
    }

    /// Keeps one device connected for as long as the task lives.
    pub async fn drive(self: Rc<Self>, at: usize) {
        let seat = &self.seats[at];
        let mut backoff = BACKOFF_MIN;
        let mut connected_before = false;
        loop {
            match self.connect(seat).await {
                Ok((socket, early)) => {
                    if connected_before {
                        self.counters.add(|c| &c.reconnects, 1);
                    }
                    connected_before = true;
                    self.run(at, socket, &early).await;
                }
                Err(Refusal::Final(why)) => return self.fail(why),
                Err(Refusal::Away) => {}
            }
            let ended = self.device(at, |device| {
                if std::mem::take(&mut device.session.attached) {
                    backoff = BACKOFF_MIN;
                }
                device.session.ended.take()
            });
            let pause = match ended {
                Some(Ended::Refused(reason)) => return self.fail(format!("the server closed a stream for good (reason {reason})")),
                Some(Ended::Later(ms)) => Duration::from_millis(u64::from(ms)).clamp(BACKOFF_MIN, BACKOFF_MAX),
                Some(Ended::Lost) | None => backoff,
            };
            backoff = (backoff * 2).min(BACKOFF_MAX);
            let jitter = rand::rng().random_range(0.5..1.0);
            tokio::time::sleep(pause.mul_f64(jitter)).await;
        }
    }

    async fn run(&self, at: usize, socket: Socket, early: &[u8]) {
        let seat = &self.seats[at];
        *seat.socket.borrow_mut() = Some(socket);
        let fine = self.device(at, |device| {
            device.connected();
            self.look();
            device.arrived(self, early)
        });
        match fine {
            Ok(()) => poll_fn(|cx| self.poll(at, cx)).await,
            Err(error) => self.fail(error.to_string()),
        }
        *seat.socket.borrow_mut() = None;
        *seat.waker.borrow_mut() = None;
    }

    async fn connect(&self, seat: &Seat) -> Result<(Socket, Vec<u8>), Refusal> {
        open_stream(&self.servers[seat.server], seat.source, &seat.credential).await
    }
}

/// Opens the WebSocket; what came behind the answer's head is returned too.
pub(super) async fn open_stream(server: &Server, source: Option<IpAddr>, credential: &str) -> Result<(Socket, Vec<u8>), Refusal> {
    let socket = if server.address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    if let Some(source) = source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    let stream = socket.connect(server.address).await?;
    stream.set_nodelay(true)?;
    let mut stream = Socket::over(stream, server.tls.as_ref()).await?;
    let key = base64::engine::general_purpose::STANDARD.encode(rand::rng().random::<[u8; 16]>());
    let request = format!(
        "GET /v1/stream HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\nAuthorization: Bearer {credential}\r\n\r\n",
        server.host
    );
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut head = Vec::with_capacity(1_024);
    let end = loop {
        if let Some(end) = head.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        if head.len() > 16 * 1024 || stream.read_buf(&mut head).await? == 0 {
            return Err(Refusal::Away);
        }
    };
    let status = head.get(9..12).and_then(|code| std::str::from_utf8(code).ok()?.parse::<u16>().ok()).unwrap_or(0);
    match status {
        101 => Ok((stream, head.split_off(end))),
        400..=499 if status != 429 && status != 408 => Err(Refusal::Final(format!("the server refused a stream with status {status}"))),
        _ => Err(Refusal::Away),
    }
}

/// Why a stream was not opened.
pub(super) enum Refusal {
    /// Try again.
    Away,
    /// It never will be.
    Final(String),
}

impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Self::Away
    }
}

/// The kernel has about 28,000 ports for one pair of addresses; loopback has addresses to spare.
pub(super) fn source_address(server: SocketAddr, at: usize) -> Option<IpAddr> {
    let block = at / CONNECTIONS_PER_ADDRESS;
    (server.ip().is_loopback() && server.is_ipv4() && block > 0).then(|| IpAddr::V4(Ipv4Addr::new(127, 0, 0, 1 + block as u8)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_connections_come_from_several_addresses() {
        let loopback: SocketAddr = "127.0.0.1:80".parse().unwrap();
        assert_eq!(source_address(loopback, CONNECTIONS_PER_ADDRESS - 1), None);
        assert_eq!(source_address(loopback, CONNECTIONS_PER_ADDRESS), Some("127.0.0.2".parse().unwrap()));
        assert_eq!(source_address("192.0.2.1:80".parse().unwrap(), CONNECTIONS_PER_ADDRESS), None);
    }
}
