//! Devices with their databases against the real delivery service and the real projector of groups, over a real log and store. Chance says
//! who does what, which pushes, requests and answers are lost, late or out of order, and who is restarted in the middle of it. At the end all
//! who are in the group are at one epoch with one tree, and have each message once that was written while they were in it.
//!
//! `SEALPOST_TEST_SEED` sets the first seed, `SEALPOST_TEST_CASES` how many there are, `SEALPOST_TEST_STEPS` how long each is.

mod check;
mod server;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tokio::task::JoinHandle;

use self::server::Server;
use super::*;
use crate::client::core::group_api::{GroupInfo, ItemPage};
use crate::client::core::groups::{self as mls, Created};
use crate::client::store::groups::{CLOSED, LEFT, MEMBER};
use crate::client::store::{Intent, Submission, Task, Verdict};
use crate::client::types::ConversationId;
use crate::clock::{Clock as _, SeededRandom, SystemClock};
use crate::delivery::groups::{Commit, GroupError};
use crate::delivery::outbox::Handle;
use crate::ids::{GroupId, Offset};
use crate::mls::public::Public;
use crate::mls::rules::Actor;
use crate::store::groups::{GroupItem, GroupItemKind, GroupStore as _};

const PATIENCE: Duration = Duration::from_secs(60);

/// The one stream of a device that is connected.
struct Stream {
    handle: Arc<Handle>,
    followed: bool,
    /// It was not told yet where the group is.
    waits: bool,
    /// What was read and not processed yet.
    held: VecDeque<ServerFrame>,
    /// Something was lost on it: it will break.
    broken: bool,
}

/// Something submitted that has no answer yet.
struct Request {
    what: Submission,
    answer: JoinHandle<Result<(Seq, u64), GroupError>>,
}

/// What a person wants changed.
struct Wish {
    intent: Intent,
    /// It is what waits for its verdict.
    submitted: bool,
    leaves: bool,
}

struct Member {
    address: DeviceAddr,
    path: std::path::PathBuf,
    /// `None` only while it is opened anew.
    db: Option<Db>,
    /// The next record of its inbox.
    inbox: Offset,
    stream: Option<Stream>,
    request: Option<Request>,
    /// An answer that came and was not taken in yet: a page, or that it is out.
    held: Option<(Seq, Result<ItemPage, GroupError>)>,
    sends: Vec<(u64, JoinHandle<Code>)>,
    wish: Option<Wish>,
    /// What the person was told is kept and will be sent.
    kept: Vec<String>,
}

struct Storm {
    server: Server,
    id: GroupId,
    created: Created,
    members: Vec<Member>,
    random: StdRng,
    /// Things go wrong.
    faulty: bool,
    /// Databases opened so far: each draws other random numbers.
    opened: u64,
    clock: ManualClock,
    dir: tempfile::TempDir,
}

impl Storm {
    async fn new(seed: u64) -> Self {
        let mut random = StdRng::seed_from_u64(seed);
        let dir = tempfile::tempdir().expect("a folder");
        // KeyPackages are checked against the machine's clock too, and this one will go ahead.
        let clock = ManualClock::new(UnixMillis(SystemClock.now().0 - 12 * 3_600_000));
        let server = Server::new(dir.path(), &clock, seed);
        let count = random.random_range(8..=12);
        let members = (1..=count).map(|byte| Member::new(dir.path(), &clock, byte)).collect();
        let created = Created { group_info: Vec::new(), tree: Vec::new() };
        let id = GroupId::from_bytes([0; 16]);
        let mut storm = Self { server, id, created, members, random, faulty: false, opened: seed << 16, clock, dir };
        (0..storm.members.len()).for_each(|at| storm.restart(at));
        storm.id = storm.db(0).new_group("Sturm", None).expect("a group");
        let Some(Submission::Create(created)) = storm.db(0).pending(storm.id).expect("read").map(|pending| pending.what) else {
            panic!("not created")
        };
        storm.created = created;
        storm.settle().await;
        let add = (1..storm.members.len() * 2 / 3).map(|at| storm.package(at)).collect();
        storm.wish(0, Intent { add, ..Intent::default() });
        storm.settle().await;
        storm
    }

    fn db(&self, at: usize) -> &Db {
        self.members[at].db.as_ref().expect("it is open")
    }

    fn chance(&mut self, one_in: u32) -> bool {
        self.random.random_ratio(1, one_in)
    }

    /// A fault that happens once in so many times while things go wrong.
    fn fault(&mut self, one_in: u32) -> bool {
        self.faulty && self.chance(one_in)
    }

    /// A process that dies and is started again: what is in its database is all that is left.
    fn restart(&mut self, at: usize) {
        self.disconnect(at);
        self.opened += 1;
        let member = &mut self.members[at];
        if let Some(request) = member.request.take() {
            request.answer.abort();
        }
        (member.held, member.wish, member.db) = (None, None, None);
        let connection = super::open(&member.path).expect("it opens");
        connection.execute_batch("PRAGMA synchronous = OFF").expect("a pragma");
        member.db = Some(Db {
            connection,
            clock: Arc::new(self.clock.clone()),
            random: Arc::new(SeededRandom::new(self.opened)),
            changed: Cell::default(),
            open_groups: RefCell::default(),
        });
    }

    fn disconnect(&mut self, at: usize) {
        let member = &mut self.members[at];
        if let Some(stream) = member.stream.take() {
            self.server.service.end(&stream.handle);
        }
        member.sends.drain(..).for_each(|(_, send)| send.abort());
    }

    /// One transaction, as the store's thread runs it. `None`: the process died before it was committed.
    fn tx<T>(&mut self, at: usize, work: impl FnOnce(&Db) -> Result<T, Error>) -> Option<Result<T, Error>> {
        let dies = self.fault(60);
        let db = self.db(at);
        db.connection.execute_batch("BEGIN IMMEDIATE").expect("begun");
        let done = in_savepoint(db, work);
        if dies {
            db.connection.execute_batch("ROLLBACK").expect("undone");
            self.restart(at);
            return None;
        }
        db.connection.execute_batch("COMMIT").expect("committed");
        Some(done)
    }

    /// The same for what can't fail.
    fn must<T>(&mut self, at: usize, work: impl FnOnce(&Db) -> Result<T, Error>) -> Option<T> {
        self.tx(at, work).map(|done| done.unwrap_or_else(|error| panic!("member {at}: {error}")))
    }

    fn state(&self, at: usize) -> Option<i64> {
        self.db(at).group_row(self.id).expect("read").map(|row| row.state)
    }

    fn package(&mut self, of: usize) -> (DeviceAddr, Vec<u8>) {
        let now = self.clock.now();
        let packages = self.db(of).with_engine(|engine| engine.key_packages(1, now)).expect("kept").expect("made");
        (self.members[of].address, packages[0].clone())
    }

    fn wish(&mut self, at: usize, intent: Intent) {
        self.members[at].wish = Some(Wish { intent, submitted: false, leaves: false });
    }

    /// Connects if it is not; asks for the group's items if it is in it and has not.
    async fn follow(&mut self, at: usize) -> bool {
        let id = self.id;
        let inside = self.db(at).groups_to_follow().expect("read").contains(&id);
        let member = &mut self.members[at];
        let connects = member.stream.is_none();
        let stream = member.stream.get_or_insert_with(|| Stream {
            handle: self.server.stream(member.address),
            followed: false,
            waits: false,
            held: VecDeque::new(),
            broken: false,
        });
        stream.followed &= inside;
        if !inside || stream.followed {
            return connects;
        }
        (stream.followed, stream.waits) = (true, true);
        stream.handle.enter().await;
        self.server.service.follow(&stream.handle, id);
        true
    }

    /// Takes in what its stream brought, as it came or not.
    fn frames(&mut self, at: usize) -> bool {
        let Some(stream) = &mut self.members[at].stream else { return false };
        stream.held.extend(self.server.frames(&stream.handle));
        let mut frames: Vec<ServerFrame> = stream.held.drain(..).collect();
        if frames.is_empty() {
            return false;
        }
        if self.faulty {
            let held = if self.chance(3) { self.random.random_range(0..=frames.len()) } else { frames.len() };
            let late = frames.split_off(held);
            let before = frames.len();
            let random = &mut self.random;
            frames.retain(|frame| !matches!(frame.frame, Some(Frame::GroupItem(_))) || !random.random_ratio(1, 12));
            let broken = frames.len() < before;
            if self.chance(8) {
                frames.shuffle(&mut self.random);
            }
            if self.chance(8) {
                frames.extend(frames.clone());
            }
            let stream = self.members[at].stream.as_mut().expect("it is there");
            stream.held = late.into();
            stream.broken |= broken;
        }
        if self.must(at, |db| db.process(&frames)).is_none() {
            return true;
        }
        let stream = self.members[at].stream.as_mut().expect("it is there");
        for frame in &frames {
            if let Some(Frame::GroupHead(head)) = &frame.frame {
                stream.waits = false;
                stream.followed &= head.code() != Code::Unavailable;
            }
        }
        true
    }

    /// Takes in what is in its inbox.
    async fn inbox(&mut self, at: usize) -> bool {
        let (address, from) = (self.members[at].address, self.members[at].inbox);
        let (next, frames) = self.server.inbox(address, from).await;
        if next == from {
            return false;
        }
        if self.must(at, |db| db.process(&frames)).is_some() && !self.fault(4) {
            self.members[at].inbox = next;
        }
        true
    }

    /// The next thing that the device does in the group by itself, or for the person.
    async fn work(&mut self, at: usize) -> bool {
        let (id, address) = (self.id, self.members[at].address);
        if let Some((known, held)) = self.members[at].held.take() {
            self.take_in(at, known, held);
            return true;
        }
        if self.members[at].request.is_some() {
            return self.answer(at).await;
        }
        let Some(task) = self.must(at, |db| db.group_task(id)) else { return true };
        let service = Arc::clone(&self.server.service);
        match task {
            None => return self.fulfil(at),
            Some(Task::Join { epoch }) => match service.tree(address, id, epoch).await {
                Ok(tree) => drop(self.must(at, |db| db.join_group(id, epoch, &tree))),
                Err(GroupError::NotFound(_)) => drop(self.must(at, |db| db.lost(id, 0))),
                Err(error) => self.gone(at, &error, Some(epoch)),
            },
            Some(Task::Submit) => self.submit(at),
            Some(Task::CatchUp { after, head }) => {
                let count = if self.faulty { self.random.random_range(1..12) } else { 500 };
                let page = service.items(address, id, after, count).await.map(|page| ItemPage {
                    items: page.items.iter().map(|item| server::wire(id, item)).collect(),
                    head: page.head,
                    epoch: page.epoch,
                    expired_to: page.expired_to,
                });
                // The stream may bring something in between.
                if self.fault(3) {
                    self.members[at].held = Some((head, page));
                } else {
                    self.take_in(at, head, page);
                }
            }
            Some(Task::Rejoin) => self.rejoin(at).await,
            Some(Task::BringBack) => panic!("nobody's commit is broken"),
            Some(Task::NameKey) => drop(self.must(at, |db| db.name_key_turn(id))),
            Some(Task::Leave) => match self.must(at, |db| db.prepare_leave(id)) {
                Some(false) => {
                    // Alone in it: it ends.
                    if soon(self.faulty, service.close(address, id)).await.is_some_and(|closed| closed.is_ok()) {
                        self.must(at, |db| db.group_gone(id, true, None));
                    }
                }
                _ => return true,
            },
            Some(Task::Tidy) => {
                let tidied = self.must(at, |db| {
                    let (_, gone) = db.own_devices_in(id)?;
                    let prepared = db.prepare_change(id, &Intent { remove_devices: gone, ..Intent::default() })?;
                    if prepared { Ok(()) } else { db.group_tidied(id, false) }
                });
                return tidied.is_some();
            }
        }
        true
    }

    /// What the answer to a request for items does.
    fn take_in(&mut self, at: usize, known: Seq, answer: Result<ItemPage, GroupError>) {
        let id = self.id;
        match answer {
            Ok(page) => drop(self.must(at, |db| db.group_page(id, known, &page))),
            Err(error) => self.gone(at, &error, None),
        }
    }

    fn gone(&mut self, at: usize, error: &GroupError, invited: Option<u64>) {
        let id = self.id;
        match error.code() {
            Code::Forbidden => drop(self.must(at, |db| db.group_gone(id, false, invited))),
            Code::NotFound => drop(self.must(at, |db| db.group_gone(id, true, invited))),
            other => assert!(self.faulty, "{other:?}"),
        }
    }

    /// What the person wants is prepared once there is nothing else to do.
    fn fulfil(&mut self, at: usize) -> bool {
        let id = self.id;
        let Some(wish) = self.members[at].wish.take() else { return false };
        let intent = wish.intent.clone();
        let leaves = wish.leaves;
        let prepared = self.tx(at, |db| {
            let intent = if leaves { db.leave_group(id)? } else { intent };
            if leaves && intent.remove_devices.is_empty() { Ok(false) } else { db.prepare_change(id, &intent) }
        });
        match prepared {
            Some(Ok(true)) => self.members[at].wish = Some(Wish { submitted: true, ..wish }),
            // Nothing to change any more, forbidden by now, or dead.
            Some(Ok(false) | Err(Error::Groups(mls::Error::Denied(_) | mls::Error::NotMember | mls::Error::Profile(_)))) | None => {}
            Some(Err(error)) => panic!("member {at}: {error}"),
        }
        true
    }

    fn submit(&mut self, at: usize) {
        let (id, address) = (self.id, self.members[at].address);
        let Some(Some(pending)) = self.must(at, |db| db.pending(id)) else { return };
        match pending.verdict {
            Verdict::Accepted => {
                if self.must(at, |db| db.drop_pending(id)).is_some() {
                    self.done(at);
                }
                return;
            }
            Verdict::Conflict => {
                if self.must(at, |db| db.refused(id)).is_some()
                    && let Some(wish) = &mut self.members[at].wish
                {
                    wish.submitted = false;
                }
                return;
            }
            Verdict::Unknown => {}
        }
        // Lost on the way there.
        if self.fault(12) {
            return;
        }
        let (service, what) = (Arc::clone(&self.server.service), pending.what.clone());
        let answer = tokio::spawn(async move {
            match what {
                Submission::Create(created) => {
                    service.create(address, &created.group_info, &created.tree).await.map(|made| (made.1, made.2))
                }
                Submission::Commit(out) => {
                    let commit = Commit { commit: out.commit, welcome: out.welcome, group_info: out.group_info };
                    service.commit(address, id, &commit).await
                }
                Submission::Proposal(proposal) => service.propose(address, id, &proposal).await,
            }
        });
        self.members[at].request = Some(Request { what: pending.what, answer });
    }

    /// A change that the person wanted was made.
    fn done(&mut self, at: usize) {
        self.members[at].wish = self.members[at].wish.take().filter(|wish| !wish.submitted);
    }

    /// The answer to what was submitted, if it comes.
    async fn answer(&mut self, at: usize) -> bool {
        let id = self.id;
        let lost = self.fault(5);
        let Some(request) = self.members[at].request.take() else { return false };
        if self.faulty && !request.answer.is_finished() {
            // Late, or given up.
            if lost {
                request.answer.abort()
            } else {
                self.members[at].request = Some(request)
            }
            return true;
        }
        let answer = soon(false, request.answer).await.expect("an answer").expect("it was not given up");
        if lost {
            return true;
        }
        let is_commit = matches!(request.what, Submission::Commit(_));
        match answer {
            Ok((seq, _)) => {
                if self.must(at, |db| db.submitted(id, seq)).is_some() && is_commit {
                    self.done(at);
                }
            }
            Err(error) if error.code() == Code::Conflict && is_commit => drop(self.must(at, |db| db.overtaken(id))),
            Err(error) if error.code() == Code::Conflict => {
                self.must(at, |db| {
                    db.drop_pending(id)?;
                    db.overtaken(id)
                });
            }
            Err(GroupError::OutcomeUnknown | GroupError::Unavailable) => {}
            Err(error) => {
                assert!(matches!(error.code(), Code::Forbidden | Code::NotFound), "member {at}: {error}");
                self.must(at, |db| {
                    db.refused(id)?;
                    db.group_behind(id)
                });
                self.members[at].wish = None;
            }
        }
        true
    }

    async fn rejoin(&mut self, at: usize) {
        let (id, address) = (self.id, self.members[at].address);
        let info = match self.server.service.info(address, id).await {
            Ok(info) => GroupInfo { epoch: info.epoch, group_info: info.group_info.to_vec().into(), tree: info.tree.to_vec().into() },
            Err(error) => return self.gone(at, &error, None),
        };
        let Some(rejoin) = self.must(at, |db| db.prepare_rejoin(id, &info)) else { return };
        let out = rejoin.outgoing.clone();
        let commit = Commit { commit: out.commit, welcome: out.welcome, group_info: out.group_info };
        if let Some(Ok((seq, _))) = soon(self.faulty, self.server.service.commit(address, id, &commit)).await {
            self.must(at, |db| db.rejoined(id, rejoin, seq));
        }
    }

    /// Sends what is ready, and takes in answers in whatever order they come.
    async fn send(&mut self, at: usize) -> bool {
        let mut moved = false;
        let sends = std::mem::take(&mut self.members[at].sends);
        for (request, send) in sends {
            if self.faulty && !send.is_finished() {
                self.members[at].sends.push((request, send));
                continue;
            }
            moved = true;
            let code = soon(false, send).await.expect("an answer").expect("it was not given up");
            if !self.fault(8) && self.must(at, |db| db.group_answered(request, &Answer::of(code))).is_none() {
                return true;
            }
        }
        if self.members[at].stream.is_none() {
            return moved;
        }
        let in_flight: Vec<u64> = self.members[at].sends.iter().map(|(request, _)| *request).collect();
        let Some(ready) = self.must(at, |db| db.ready_for_groups(&in_flight, 8)) else { return true };
        for ready in ready {
            moved = true;
            let send = self.server.send(self.members[at].address, ready.send);
            self.members[at].sends.push((ready.id, send));
        }
        moved
    }

    /// Somebody wants something.
    fn act(&mut self) {
        let inside: Vec<usize> = (0..self.members.len()).filter(|&at| self.state(at) == Some(MEMBER)).collect();
        let Some(&at) = inside.get(self.random.random_range(0..inside.len().max(1))) else { return };
        let other = self.random.random_range(0..self.members.len());
        let account = self.members[other].address.account;
        let dice = self.random.random_range(0..30);
        if dice < 16 {
            let text = format!("{at}.{}", self.members[at].kept.len());
            let id = self.id;
            if let Some(Ok(_)) = self.tx(at, |db| db.send_to_group(id, content::text(&text))) {
                self.members[at].kept.push(text);
            }
            return;
        }
        if self.members[at].wish.is_some() {
            return;
        }
        let intent = match dice {
            16..20 => Intent { renew: true, ..Intent::default() },
            20..22 => Intent { name: Some(format!("Sturm {}", self.random.random_range(0..1_000))), ..Intent::default() },
            22..25 if self.state(other) != Some(MEMBER) => Intent { add: vec![self.package(other)], ..Intent::default() },
            25 | 26 => Intent { remove_accounts: vec![account], ..Intent::default() },
            27 => Intent { admin: Some((account, self.chance(2))), ..Intent::default() },
            28 if self.chance(3) => Intent { owner: Some(account), ..Intent::default() },
            29 if self.chance(3) && inside.len() > 2 => {
                self.members[at].wish = Some(Wish { intent: Intent::default(), submitted: false, leaves: true });
                return;
            }
            _ => return,
        };
        self.wish(at, intent);
    }

    /// One of all the things that may happen next.
    async fn step(&mut self) {
        let at = self.random.random_range(0..self.members.len());
        match self.random.random_range(0..100) {
            0..20 => self.act(),
            20..50 => drop(self.work(at).await),
            50..64 => drop(self.send(at).await),
            64..78 => drop(self.frames(at)),
            78..84 => drop(self.follow(at).await),
            84..89 => drop(self.inbox(at).await),
            89..92 => self.clock.advance(self.random.random_range(10..3_000)),
            92 => self.restart(at),
            93 => self.disconnect(at),
            94 if self.chance(2) => self.server.crash().await,
            94..97 => self.server.start(),
            97 if self.chance(2) => self.server.service.cut_all(),
            _ => tokio::time::sleep(Duration::from_millis(1)).await,
        }
        if self.members[at].stream.as_ref().is_some_and(|stream| stream.broken) && self.chance(6) {
            self.disconnect(at);
        }
        self.server.let_go().await;
    }

    /// Everything works again, and all come back.
    fn heal(&mut self) {
        self.faulty = false;
        self.server.heal();
        for at in 0..self.members.len() {
            self.disconnect(at);
            if let Some(request) = self.members[at].request.take() {
                request.answer.abort();
            }
        }
    }

    /// Until nobody has anything to do any more, however much time passes.
    async fn settle(&mut self) {
        let begun = Instant::now();
        let mut calm = 0;
        while calm < 8 {
            assert!(begun.elapsed() < PATIENCE, "it never comes to rest: {}", self.stand());
            self.server.applied().await;
            let mut moved = false;
            for at in 0..self.members.len() {
                moved |= self.follow(at).await | self.inbox(at).await | self.frames(at);
                let mut steps = 0;
                while self.work(at).await {
                    (moved, steps) = (true, steps + 1);
                    assert!(steps < 1_000, "member {at} never comes to rest: {}", self.stand());
                }
                moved |= self.send(at).await;
                moved |= self.members[at].stream.as_ref().is_some_and(|stream| stream.waits);
            }
            self.server.let_go().await;
            if moved {
                calm = 0;
                tokio::time::sleep(Duration::from_millis(1)).await;
            } else {
                calm += 1;
                self.clock.advance(20_000);
            }
        }
    }

    /// For whoever reads of a failure.
    fn stand(&self) -> String {
        let of = |at: usize| {
            let row = self.db(at).group_row(self.id).expect("read");
            let task = self.db(at).group_task(self.id).expect("a task");
            format!("{at}: {row:?} {task:?}")
        };
        (0..self.members.len()).map(of).collect::<Vec<_>>().join("\n")
    }
}

/// An answer; while things go wrong nobody waits long for it.
async fn soon<T>(faulty: bool, answer: impl Future<Output = T>) -> Option<T> {
    tokio::time::timeout(if faulty { Duration::from_millis(20) } else { PATIENCE }, answer).await.ok()
}

impl Member {
    fn new(dir: &Path, clock: &ManualClock, byte: u8) -> Self {
        let address = DeviceAddr { account: account(byte), device: number(1) };
        let device = Device::new(dir, clock, address);
        let path = device.db.connection.path().expect("a file").into();
        Self {
            address,
            path,
            db: None,
            inbox: Offset(0),
            stream: None,
            request: None,
            held: None,
            sends: Vec::new(),
            wish: None,
            kept: Vec::new(),
        }
    }
}

async fn run(seed: u64, steps: usize) {
    let mut storm = Storm::new(seed).await;
    storm.faulty = true;
    storm.server.break_down();
    for _ in 0..steps {
        storm.step().await;
    }
    storm.heal();
    storm.settle().await;
    // And on it goes.
    for at in 0..storm.members.len() {
        if storm.state(at) == Some(MEMBER) {
            storm.db(at).send_to_group(storm.id, content::text(&format!("{at} at last"))).expect("kept");
            storm.members[at].kept.push(format!("{at} at last"));
            storm.wish(at, Intent { renew: true, ..Intent::default() });
        }
    }
    storm.settle().await;
    let (messages, epoch) = storm.check().await;
    let inside = (0..storm.members.len()).filter(|&at| storm.state(at) == Some(MEMBER)).count();
    println!("seed {seed}: {messages} messages, epoch {epoch}, {inside} of {} in it", storm.members.len());
    storm.server.stop().await;
    drop(storm.dir);
}

fn number_of(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn members_never_part_whatever_is_lost_late_or_restarted() {
    let first = number_of("SEALPOST_TEST_SEED", rand::rng().random_range(0..1 << 32));
    let steps = number_of("SEALPOST_TEST_STEPS", 500) as usize;
    for seed in first..first + number_of("SEALPOST_TEST_CASES", 2) {
        println!("SEALPOST_TEST_SEED={seed}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(run(seed, steps));
    }
}
