//! Members that keep their group's keys: they decrypt what their sockets brought and apply each commit, on threads of their own, so that
//! neither the sockets nor their times wait for cryptography. Real members have a machine each; here those who only read give way to
//! everything else, and may be behind when the sending is over.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::member::Member;
use crate::background;
use crate::cli::load::wire::Stamp;

/// Messages that were encrypted and not handed to their sockets yet; whoever encrypts waits beyond that.
const WRITTEN: usize = 1_024;
/// Things that one member does before it is the next one's turn.
const TURN: usize = 16;
/// How much more a thread that only reads gives way than the server's background threads do.
const NICER: i32 = 9;

/// What an item is to those who read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Commit,
    Message,
    Other,
}

/// An item of a group, kept once for all.
pub struct Shared {
    pub seq: u64,
    pub kind: Kind,
    pub epoch: u64,
    /// The sender's account; empty where there is none.
    pub account: Vec<u8>,
    pub content: Vec<u8>,
}

/// A tree that is being fetched.
pub type Tree = Arc<OnceLock<Vec<u8>>>;

enum Job {
    Join { epoch: u64, welcome: Vec<u8>, tree: Tree },
    Item(Arc<Shared>),
}

/// A message for a socket.
pub struct Written {
    pub seat: usize,
    pub number: u64,
    pub epoch: u64,
    pub content: Vec<u8>,
}

/// A member with keys.
pub struct Reader {
    pub member: Arc<Mutex<Member>>,
    /// It writes too, so it must not be behind.
    pub prompt: bool,
    seat: usize,
    account: [u8; 16],
    /// What its socket brought. No more than the run's items, of which each is in memory once.
    jobs: Mutex<VecDeque<Job>>,
    /// Numbers of messages to encrypt: before it reads on, since their time runs.
    writes: Mutex<VecDeque<u64>>,
    /// The epoch that it joined at.
    since: AtomicU64,
    desk: Arc<Desk>,
}

/// What the readers share.
pub struct Desk {
    /// What comes behind a message's stamp.
    pub template: Vec<u8>,
    pub decrypted: AtomicU64,
    pub undecryptable: AtomicU64,
    pub joined: AtomicU64,
    /// Things that were brought and not done.
    waiting: AtomicU64,
    over: AtomicBool,
    failure: Mutex<Option<String>>,
    written: mpsc::Sender<Written>,
}

impl Desk {
    pub fn new(template: Vec<u8>) -> (Arc<Self>, mpsc::Receiver<Written>) {
        let (written, from) = mpsc::channel(WRITTEN);
        let desk = Self {
            template,
            decrypted: AtomicU64::default(),
            undecryptable: AtomicU64::default(),
            joined: AtomicU64::default(),
            waiting: AtomicU64::default(),
            over: AtomicBool::default(),
            failure: Mutex::default(),
            written,
        };
        (Arc::new(desk), from)
    }

    pub fn waiting(&self) -> u64 {
        self.waiting.load(Relaxed)
    }

    pub fn failure(&self) -> Option<String> {
        self.failure.lock().take()
    }

    fn hand_over(&self, mut written: Written) {
        use mpsc::error::TrySendError::{Closed, Full};
        while !self.over.load(Relaxed) {
            match self.written.try_send(written) {
                Ok(()) | Err(Closed(_)) => return,
                Err(Full(back)) => written = back,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn undecryptable(&self) {
        self.undecryptable.fetch_add(1, Relaxed);
    }
}

impl Reader {
    pub fn new(member: Arc<Mutex<Member>>, prompt: bool, seat: usize, account: [u8; 16], desk: Arc<Desk>) -> Self {
        let (jobs, writes) = (Mutex::default(), Mutex::default());
        Self { member, prompt, seat, account, jobs, writes, since: AtomicU64::default(), desk }
    }

    /// It was invited: it joins once the tree is there.
    pub fn join(&self, epoch: u64, welcome: Vec<u8>, tree: Tree) {
        self.push(Job::Join { epoch, welcome, tree });
    }

    /// Its socket brought this; its own messages it can't read.
    pub fn item(&self, item: &Arc<Shared>) {
        let reads = match item.kind {
            Kind::Commit => true,
            Kind::Message => item.account != self.account,
            Kind::Other => false,
        };
        if reads {
            self.push(Job::Item(Arc::clone(item)));
        }
    }

    /// Encrypts the message of this number, soon.
    pub fn write(&self, number: u64) {
        self.writes.lock().push_back(number);
    }

    fn push(&self, job: Job) {
        self.desk.waiting.fetch_add(1, Relaxed);
        self.jobs.lock().push_back(job);
    }

    /// Does one thing that waits; whether there was one that could be done.
    fn step(&self) -> bool {
        // Held from taking a thing to having done it: a change of the owner comes between two, not into one.
        let mut member = self.member.lock();
        let write = if member.epoch().is_some() { self.writes.lock().pop_front() } else { None };
        if let Some(number) = write {
            self.encrypt(&mut member, number);
            return true;
        }
        let job = {
            let mut jobs = self.jobs.lock();
            match jobs.front() {
                Some(Job::Join { tree, .. }) if tree.get().is_none() => None,
                _ => jobs.pop_front(),
            }
        };
        let Some(job) = job else { return false };
        match job {
            Job::Join { epoch, welcome, tree } => {
                self.since.store(epoch, Relaxed);
                match member.join(&welcome, tree.get().map_or(&[][..], Vec::as_slice)) {
                    Ok(()) => self.desk.joined.fetch_add(1, Relaxed),
                    Err(error) => {
                        *self.desk.failure.lock() = Some(format!("a member can't join: {error}"));
                        0
                    }
                };
            }
            Job::Item(item) => self.read(&mut member, &item),
        }
        drop(member);
        self.desk.waiting.fetch_sub(1, Relaxed);
        true
    }

    fn encrypt(&self, member: &mut Member, number: u64) {
        let stamp = Stamp { sender: self.seat as u32, number, at_us: 0 };
        let content = [&stamp.to_bytes()[..], &self.desk.template].concat();
        let epoch = member.epoch().unwrap_or_default();
        match member.encrypt(&content) {
            Ok(content) => self.desk.hand_over(Written { seat: self.seat, number, epoch, content }),
            Err(error) => *self.desk.failure.lock() = Some(format!("a member can't write: {error}")),
        }
    }

    fn read(&self, member: &mut Member, item: &Shared) {
        match (item.kind, member.epoch()) {
            // Written in an epoch that it was not in: not for it.
            (Kind::Message, _) if item.epoch < self.since.load(Relaxed) => {}
            (Kind::Message, _) => match member.receive(&item.content) {
                Ok(Some(content)) if Stamp::from_bytes(&content).is_some() => {
                    self.desk.decrypted.fetch_add(1, Relaxed);
                }
                _ => self.desk.undecryptable(),
            },
            // Whoever commits has merged it by its verdict.
            (_, Some(epoch)) if epoch > item.epoch => {}
            (_, Some(epoch)) if epoch == item.epoch && member.receive(&item.content).is_ok() => {}
            _ => self.desk.undecryptable(),
        }
    }
}

/// The threads that read. They end when it is dropped.
pub struct Reading {
    desk: Arc<Desk>,
    threads: Vec<JoinHandle<()>>,
}

impl Reading {
    pub fn start(desk: &Arc<Desk>, readers: Vec<Arc<Reader>>) -> anyhow::Result<Self> {
        let (prompt, others): (Vec<_>, Vec<_>) = readers.into_iter().partition(|reader| reader.prompt);
        let mut reading = Self { desk: Arc::clone(desk), threads: Vec::new() };
        let own = Arc::clone(desk);
        reading
            .threads
            .push(std::thread::Builder::new().name("writers".into()).spawn(move || work(&own, &prompt, Duration::from_micros(500)))?);
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(others.len());
        for thread in 0..threads {
            let (own, share) = (Arc::clone(desk), others.iter().skip(thread).step_by(threads).cloned().collect::<Vec<_>>());
            let work = move || {
                let _ = rustix::process::nice(NICER);
                work(&own, &share, Duration::from_millis(5));
            };
            reading.threads.push(background::spawn("readers", work)?);
        }
        Ok(reading)
    }
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.desk.over.store(true, Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of one was said on stderr.
            let _ = thread.join();
        }
    }
}

fn work(desk: &Desk, readers: &[Arc<Reader>], pause: Duration) {
    while !desk.over.load(Relaxed) {
        let mut busy = false;
        for reader in readers {
            let done = (0..TURN).take_while(|_| !desk.over.load(Relaxed) && reader.step()).count();
            busy |= done > 0;
        }
        if !busy {
            std::thread::sleep(pause);
        }
    }
}
