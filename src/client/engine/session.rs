//! One connection: frames in, frames out, and the work they call for.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_tungstenite::tungstenite::Message;

use super::work::WorkError;
use super::{End, HOUSEKEEPING, Inner, stopped};
use crate::client::core::ordering::Acks;
use crate::client::core::repair::{self, Answer, Next};
use crate::client::store::is_group_request;
use crate::client::transport::{self, ConnectError, Incoming, Outgoing};
use crate::client::types::Connection;
use crate::ids::{AccountId, DeviceId, GroupId, Identity, Seq};
use crate::limits;
use crate::wire::stream::{
    Ack, ClientFrame, CloseReason, Closing, Code, GroupFollow, GroupHead, Hello, SendResult, ServerFrame, client_frame, server_frame::Frame,
};

/// Requests of one connection without an answer.
const IN_FLIGHT: usize = 256;
/// Frames of one WebSocket message.
const FRAMES_PER_MESSAGE: usize = 64;
/// WebSocket messages taken into one transaction.
const MESSAGES_PER_COMMIT: usize = 32;
/// Messages that wait for the socket; sending pauses past that.
const WRITE_QUEUE: usize = 8;
/// Directory work at the same time.
const WORK: usize = 8;
/// How often waits are looked at.
const TICK: Duration = Duration::from_millis(250);
/// How often what has its own time in groups is looked for.
const LOOK: Duration = Duration::from_secs(1);
/// How long a shutdown waits for the socket to take what is left.
const GOODBYE: Duration = Duration::from_secs(2);
/// Silence allowed before `Hello` says what the server's heartbeat is.
const FIRST_HEARTBEAT_MS: u32 = 30_000;

/// Work beside the stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Work {
    Repair(AccountId),
    Resolve(Identity),
    OwnAccount,
    Keys,
    KeyPackages,
    FindGroups,
    Group(GroupId),
}

struct Session<'i> {
    inner: &'i Arc<Inner>,
    writes: mpsc::Sender<Message>,
    acks: Acks,
    in_flight: Vec<u64>,
    work: JoinSet<(Work, Result<(), WorkError>)>,
    /// Work that is going on, or failed and waits for its time.
    pending: HashMap<Work, (u32, Option<Instant>)>,
    heard: Instant,
    heartbeat: Duration,
    pinged: bool,
    live: bool,
    housekeeping: Instant,
    looked: Instant,
    /// Groups whose items the stream carries.
    followed: HashSet<GroupId>,
}

/// Connects and serves the connection until it ends.
pub(super) async fn run(inner: &Arc<Inner>, stop: &mut watch::Receiver<bool>) -> End {
    let lost = |reason: String| End::Lost { reason, live: false, wait_ms: 0 };
    let begun = inner.store.run(|db| Ok((db.cursor()?, db.drop_ephemeral()?))).await;
    let cursor = match begun {
        Ok((cursor, ())) => cursor,
        Err(error) => return lost(error.to_string()),
    };
    let connected = tokio::select! {
        () = stopped(stop) => return End::Shutdown,
        connected = inner.http.connect(&inner.credential.secret) => connected,
    };
    let (sink, stream) = match connected {
        Ok(halves) => halves,
        Err(ConnectError::SignedOut) => return End::SignedOut,
        Err(ConnectError::Transient(reason)) => return lost(reason),
    };
    inner.set_connection(Connection::CatchingUp);
    let (writes, queue) = mpsc::channel(WRITE_QUEUE);
    let writer = tokio::spawn(write(sink, queue));
    let mut session = Session {
        inner,
        writes,
        acks: Acks::new(cursor, Seq::MAX),
        in_flight: Vec::new(),
        work: JoinSet::new(),
        pending: HashMap::new(),
        heard: Instant::now(),
        heartbeat: Duration::from_millis(u64::from(FIRST_HEARTBEAT_MS)),
        pinged: false,
        live: false,
        housekeeping: Instant::now(),
        looked: Instant::now(),
        followed: HashSet::new(),
    };
    let end = session.serve(stream, stop).await;
    session.work.shutdown().await;
    drop(session);
    // The writer ends once it has written what was queued; a socket that takes nothing does not hold us up.
    let abort = writer.abort_handle();
    if tokio::time::timeout(GOODBYE, writer).await.is_err() {
        abort.abort();
    }
    end
}

/// Writes what is queued, as much as there is before each flush; then says goodbye.
async fn write(mut sink: Outgoing, mut queue: mpsc::Receiver<Message>) {
    while let Some(message) = queue.recv().await {
        let mut next = Some(message);
        while let Some(message) = next {
            if sink.feed(message).await.is_err() {
                return;
            }
            next = queue.try_recv().ok();
        }
        if sink.flush().await.is_err() {
            return;
        }
    }
    let _ = sink.close().await;
}

impl Session<'_> {
    async fn serve(&mut self, mut stream: Incoming, stop: &mut watch::Receiver<bool>) -> End {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.start(Work::OwnAccount);
        self.start(Work::Keys);
        self.start(Work::KeyPackages);
        if let Err(end) = self.look_for_work().await {
            return end;
        }
        loop {
            let outcome = tokio::select! {
                () = stopped(stop) => Err(End::Shutdown),
                message = stream.next() => self.messages(message, &mut stream).await,
                () = self.inner.store.outgoing().notified() => self.look_for_work().await,
                Some(done) = self.work.join_next() => self.finished(done).await,
                _ = tick.tick() => self.tick().await,
            };
            let sent = match outcome {
                Ok(()) => self.send_ready().await,
                Err(end) => Err(end),
            };
            if let Err(end) = sent {
                self.flush_ack();
                return end;
            }
        }
    }

    fn lost(&self, reason: impl ToString) -> End {
        End::Lost { reason: reason.to_string(), live: self.live, wait_ms: 0 }
    }

    /// Takes a message and those that are there already, and processes them in one transaction.
    async fn messages(
        &mut self,
        first: Option<Result<Message, tokio_tungstenite::tungstenite::Error>>,
        stream: &mut Incoming,
    ) -> Result<(), End> {
        let mut frames = Vec::new();
        let mut closed = None;
        let mut message = first;
        let mut taken = 1;
        loop {
            match message {
                Some(Ok(Message::Binary(bytes))) => frames.extend(transport::decode(bytes).map_err(|error| self.lost(error))?.frames),
                Some(Ok(Message::Close(_))) | None => {
                    closed = Some("the server closed the stream".to_owned());
                    break;
                }
                Some(Ok(_)) => {}
                Some(Err(error)) => {
                    closed = Some(error.to_string());
                    break;
                }
            }
            // Only take another one if it will be processed: what is taken and dropped here would be acknowledged by what follows it.
            if taken == MESSAGES_PER_COMMIT {
                break;
            }
            let Some(next) = stream.next().now_or_never() else { break };
            message = next;
            taken += 1;
        }
        self.heard = Instant::now();
        self.pinged = false;
        self.frames(frames).await?;
        closed.map_or(Ok(()), |reason| Err(self.lost(reason)))
    }

    async fn frames(&mut self, frames: Vec<ServerFrame>) -> Result<(), End> {
        if frames.is_empty() {
            return Ok(());
        }
        let frames = Arc::new(frames);
        let answers: Vec<(u64, Answer)> = frames.iter().filter_map(answer).collect();
        self.in_flight.retain(|id| !answers.iter().any(|(answered, _)| answered == id));
        let job = frames.clone();
        let (processed, signed_out) = self
            .inner
            .store
            .run(move |db| {
                let processed = db.process(&job)?;
                let mut signed_out = false;
                for (id, answer) in &answers {
                    let next = if is_group_request(*id) { db.group_answered(*id, answer)? } else { db.answered(*id, answer)? };
                    signed_out |= next == Next::SignedOut;
                }
                Ok((processed, signed_out))
            })
            .await
            .map_err(|error| self.lost(error))?;
        // Committed: only now may it be acknowledged and shown.
        self.acks.committed(processed.cursor);
        processed.live.into_iter().for_each(|live| self.inner.show(live));
        if signed_out {
            return Err(End::SignedOut);
        }
        for frame in frames.iter() {
            match &frame.frame {
                Some(Frame::Hello(hello)) => self.hello(hello, processed.cursor),
                Some(Frame::QueueEmpty(_)) => {
                    self.live = true;
                    self.inner.set_connection(Connection::Live);
                    // Only now: an invitation may have been on its way.
                    self.find_groups().await?;
                }
                Some(Frame::PrekeysLow(_)) => self.start(Work::Keys),
                Some(Frame::KeyPackagesLow(_)) => self.start(Work::KeyPackages),
                Some(Frame::AccountChanged(_)) => self.start(Work::OwnAccount),
                Some(Frame::GroupHead(head)) => self.head(head),
                Some(Frame::Closing(closing)) => return Err(self.closing(closing)),
                _ => {}
            }
        }
        self.look_for_work().await?;
        self.flush_ack();
        Ok(())
    }

    fn hello(&mut self, hello: &Hello, cursor: Seq) {
        self.acks = Acks::new(cursor, Seq(hello.cursor));
        if hello.heartbeat_ms > 0 {
            self.heartbeat = Duration::from_millis(u64::from(hello.heartbeat_ms));
        }
    }

    /// A group that the server can't let this stream follow now is asked for again at a later look.
    fn head(&mut self, head: &GroupHead) {
        if let (Code::Unavailable, Ok(group)) = (head.code(), GroupId::from_slice(&head.group_id)) {
            self.followed.remove(&group);
        }
    }

    fn closing(&self, closing: &Closing) -> End {
        let wait_ms = u64::from(closing.retry_after_ms);
        match closing.reason() {
            CloseReason::Replaced => End::Replaced,
            CloseReason::Revoked => End::SignedOut,
            // Everybody is told the same: a random part more, so that not everybody comes at once.
            CloseReason::Draining => {
                let jitter = repair::jitter(wait_ms.max(500), &*self.inner.random);
                End::Lost { reason: "the server drains".into(), live: true, wait_ms: wait_ms + jitter }
            }
            reason => End::Lost { reason: format!("the server closed: {}", reason.as_str_name()), live: self.live, wait_ms },
        }
    }

    /// What can be acknowledged is, unless the socket is busy; then the next look does it.
    fn flush_ack(&mut self) {
        let before = self.acks;
        if let Some(seq) = self.acks.take() {
            let frame = ClientFrame { frame: Some(client_frame::Frame::Ack(Ack { seq: seq.0 })) };
            if self.writes.try_send(transport::message(vec![frame])).is_err() {
                self.acks = before;
            }
        }
    }

    /// Sends what is ready, while the socket takes it and not too much is unanswered.
    async fn send_ready(&mut self) -> Result<(), End> {
        while self.in_flight.len() < IN_FLIGHT {
            let Ok(permit) = self.writes.clone().try_reserve_owned() else {
                return if self.writes.is_closed() { Err(self.lost("the socket does not take more")) } else { Ok(()) };
            };
            let (in_flight, limit) = (self.in_flight.clone(), FRAMES_PER_MESSAGE.min(IN_FLIGHT - self.in_flight.len()));
            let job = move |db: &crate::client::store::Db| {
                let ready = db.ready(&in_flight, limit)?;
                let left = limit - ready.len();
                Ok((ready, if left > 0 { db.ready_for_groups(&in_flight, left)? } else { Vec::new() }))
            };
            let (ready, for_groups) = self.inner.store.run(job).await.map_err(|error| self.lost(error))?;
            if ready.is_empty() && for_groups.is_empty() {
                return Ok(());
            }
            self.in_flight.extend(ready.iter().map(|ready| ready.id).chain(for_groups.iter().map(|ready| ready.id)));
            let frames = ready.into_iter().map(|ready| client_frame::Frame::Send(ready.send));
            let frames = frames.chain(for_groups.into_iter().map(|ready| client_frame::Frame::GroupSend(ready.send)));
            permit.send(transport::message(frames.map(|frame| ClientFrame { frame: Some(frame) }).collect()));
        }
        Ok(())
    }

    async fn tick(&mut self) -> Result<(), End> {
        self.flush_ack();
        let silent = self.heard.elapsed();
        if silent > self.heartbeat * 2 + Duration::from_secs(1) {
            return Err(self.lost("the server is silent"));
        }
        if silent > self.heartbeat && !self.pinged {
            self.pinged = self.writes.try_send(Message::Ping(bytes::Bytes::new())).is_ok();
        }
        if self.housekeeping.elapsed() > HOUSEKEEPING {
            self.housekeeping = Instant::now();
            self.start(Work::Keys);
            self.start(Work::KeyPackages);
            if self.live {
                self.find_groups().await?;
            }
        }
        if self.looked.elapsed() > LOOK {
            self.look_for_work().await?;
        }
        let due: Vec<Work> =
            self.pending.iter().filter(|(_, (_, at))| at.is_some_and(|at| at <= Instant::now())).map(|(work, _)| work.clone()).collect();
        due.into_iter().for_each(|work| self.start(work));
        Ok(())
    }

    /// Messages that wait for sessions, identities that somebody claims, and groups with something to do are work.
    async fn look_for_work(&mut self) -> Result<(), End> {
        self.looked = Instant::now();
        let found = self.inner.store.run(|db| Ok((db.waiting()?, db.claims(WORK)?, db.groups_with_tasks()?, db.groups_to_follow()?)));
        let (waiting, claims, groups, follow) = found.await.map_err(|error| self.lost(error))?;
        self.follow(follow)?;
        let work = waiting.into_iter().map(Work::Repair).chain(claims.into_iter().map(Work::Resolve));
        let work = work.chain(groups.into_iter().map(Work::Group));
        for work in work {
            if !self.pending.contains_key(&work) {
                self.start(work);
            }
        }
        Ok(())
    }

    /// Looks for groups that nobody told this device of, if it is time.
    async fn find_groups(&mut self) -> Result<(), End> {
        if self.inner.store.run(|db| db.groups_unlooked()).await.map_err(|error| self.lost(error))? {
            self.start(Work::FindGroups);
        }
        Ok(())
    }

    /// Asks for the items of groups that the stream does not carry yet, as far as the socket takes it; a later look goes on.
    fn follow(&mut self, groups: Vec<GroupId>) -> Result<(), End> {
        // Who left is not followed any more; who comes back asks anew.
        let inside: HashSet<GroupId> = groups.iter().copied().collect();
        let entered = std::mem::take(&mut *self.inner.entered.lock().unwrap_or_else(PoisonError::into_inner));
        self.followed.retain(|group| inside.contains(group) && !entered.contains(group));
        let wanted: Vec<GroupId> = groups
            .into_iter()
            .filter(|group| !self.followed.contains(group))
            .take(limits::GROUPS_PER_ACCOUNT - self.followed.len())
            .collect();
        for chunk in wanted.chunks(FRAMES_PER_MESSAGE) {
            let frame = |group: &GroupId| {
                let follow = GroupFollow { group_id: bytes::Bytes::copy_from_slice(group.as_bytes()), stop: false };
                ClientFrame { frame: Some(client_frame::Frame::GroupFollow(follow)) }
            };
            match self.writes.try_send(transport::message(chunk.iter().map(frame).collect())) {
                Ok(()) => self.followed.extend(chunk.iter().copied()),
                Err(mpsc::error::TrySendError::Full(_)) => return Ok(()),
                Err(mpsc::error::TrySendError::Closed(_)) => return Err(self.lost("the socket does not take more")),
            }
        }
        Ok(())
    }

    fn start(&mut self, work: Work) {
        let attempts = match self.pending.get(&work) {
            Some((_, None)) => return,
            Some((attempts, Some(_))) => *attempts,
            None => 0,
        };
        if self.work.len() >= WORK {
            // Not now: a later tick takes it up.
            self.pending.insert(work, (attempts, Some(Instant::now())));
            return;
        }
        self.pending.insert(work.clone(), (attempts, None));
        let inner = self.inner.clone();
        self.work.spawn(async move {
            let result = match &work {
                Work::Repair(account) => inner.repair(*account).await,
                Work::Resolve(identity) => inner.resolve(identity).await.map(|_| ()),
                Work::OwnAccount => inner.refresh_own().await,
                Work::Keys => inner.maintain_keys().await,
                Work::KeyPackages => inner.maintain_key_packages().await,
                Work::FindGroups => inner.find_groups().await,
                Work::Group(group) => inner.work_in_group(*group).await,
            };
            (work, result)
        });
    }

    async fn finished(&mut self, done: Result<(Work, Result<(), WorkError>), tokio::task::JoinError>) -> Result<(), End> {
        let Ok((work, result)) = done else { return Err(self.lost("a task of the client failed")) };
        let attempts = self.pending.remove(&work).map_or(0, |(attempts, _)| attempts);
        match result {
            Ok(()) => return self.look_for_work().await,
            Err(WorkError::Api(error)) if error.code() == Some(Code::Unauthenticated) => return Err(End::SignedOut),
            // Nobody's identity: the claim is settled.
            Err(WorkError::Api(error)) if matches!(work, Work::Resolve(_)) && !error.is_transient() => {}
            // Of that group only: tried again later, the connection is not to blame.
            Err(WorkError::Store(error)) if !super::groups::is_groups_own(&error) => return Err(self.lost(error)),
            Err(error) => {
                tracing::info!(%error, "work for the directory is tried again later");
                let wait = Duration::from_millis(repair::backoff(attempts, &*self.inner.random));
                self.pending.insert(work, (attempts + 1, Some(Instant::now() + wait)));
            }
        }
        Ok(())
    }
}

fn answer(frame: &ServerFrame) -> Option<(u64, Answer)> {
    let Some(Frame::Result(result)) = &frame.frame else { return None };
    Some((result.request_id, answer_of(result)))
}

fn answer_of(result: &SendResult) -> Answer {
    let devices = |numbers: &[u32]| numbers.iter().filter_map(|&number| DeviceId::new(number).ok()).collect();
    Answer {
        // A code of a newer server: passing trouble is the guess that loses nothing.
        code: Code::try_from(result.code).unwrap_or(Code::Internal),
        missing: devices(&result.missing_devices),
        extra: devices(&result.extra_devices),
        stale: devices(&result.stale_devices),
        retry_after_ms: u64::from(result.retry_after_ms),
    }
}
