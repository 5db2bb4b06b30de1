//! Who follows which group on this edge. One feed a group: the edge is attached to the group on the log once, however many streams follow.
//!
//! A feed's life: the first follower makes it; the edge attaches, an event that the projector answers with the group's last item; then the
//! store is asked who is in the group, followers are told where it is, and items flow. Whoever comes later is answered at once. A feed that
//! nobody follows stays for a while; then the edge detaches.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::stream::FuturesUnordered;
use futures_util::{FutureExt as _, StreamExt as _};
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};
use tokio::time::Instant;

use super::error::GroupError;
use super::members::{Known, has_device};
use super::{GroupService, frame};
use crate::delivery::outbox::{Begun, Handle, Where};
use crate::ids::{DeviceAddr, GroupId, Offset, Seq};
use crate::limits;
use crate::log::{AppendError, AppendSink};
use crate::metrics;
use crate::store::groups::{GroupItem, GroupItemKind, GroupRoster};
use crate::wire::event;
use crate::wire::group_event::{GroupEvent, GroupEventBody};
use crate::wire::stream::Code;

const SHARDS: usize = 16;

/// An item that the projector pushed.
#[derive(Debug)]
pub struct Arrived {
    /// Which group's.
    pub group: GroupId,
    /// The item.
    pub item: GroupItem,
    /// Who is in the group from here on, if that changed.
    pub roster: Option<Box<GroupRoster>>,
}

/// Appends whose outcome nobody waits for: renewals are repeated, and an edge that is not renewed is forgotten.
struct Unwatched;

impl AppendSink for Unwatched {
    fn done(&self, _token: u64, _outcome: Result<Offset, AppendError>) {}
}

/// A group as this edge follows it.
struct Feed {
    followers: HashMap<DeviceAddr, Arc<Handle>>,
    roster: Arc<GroupRoster>,
    seq: Seq,
    epoch: u64,
    /// Attached, and followers were told where it is: items go to them.
    live: bool,
    /// Which attempt to attach it is; what an earlier one finds out is of no use. 0: none was made.
    attempt: u64,
    attached: Option<oneshot::Sender<Option<(Seq, u64)>>>,
    /// When the edge last said that it follows.
    renewed: Instant,
    /// Since when nobody follows.
    empty: Option<Instant>,
}

impl Feed {
    fn new() -> Self {
        Self {
            followers: HashMap::new(),
            roster: Arc::default(),
            seq: Seq::ZERO,
            epoch: 0,
            live: false,
            attempt: 0,
            attached: None,
            renewed: Instant::now(),
            empty: None,
        }
    }

    const fn at(&self) -> Where {
        Where { code: Code::Ok, seq: self.seq, epoch: self.epoch }
    }

    fn add(&mut self, handle: &Arc<Handle>) {
        self.followers.insert(handle.device, Arc::clone(handle));
        self.empty = None;
    }

    fn remove(&mut self, handle: &Arc<Handle>) {
        // A newer stream of the device may stand there.
        if self.followers.get(&handle.device).is_some_and(|current| Arc::ptr_eq(current, handle)) {
            self.followers.remove(&handle.device);
        }
        if self.followers.is_empty() {
            self.empty.get_or_insert_with(Instant::now);
        }
    }

    /// An item that is new: the group is where it leads.
    fn pass(&mut self, item: &GroupItem) {
        self.seq = item.seq;
        self.epoch = item.epoch + u64::from(item.kind == GroupItemKind::Commit);
    }

    /// The same bytes to everybody: no copy, one lock and at most one wake each.
    fn fan_out(&self, group: GroupId, frames: &mut BytesMut, items: &mut u64, touched: &mut Vec<Arc<Handle>>) {
        let items = std::mem::take(items);
        if frames.is_empty() {
            return;
        }
        let frames = frames.split().freeze();
        for handle in self.followers.values() {
            if handle.push_group(group, &frames) {
                touched.push(Arc::clone(handle));
            }
        }
        metrics::observe_group_pushed(items * self.followers.len() as u64);
    }

    /// Nothing comes any more.
    fn end_all(&self, group: GroupId) {
        for handle in self.followers.values() {
            handle.end_follow(group);
        }
    }

    /// Who is out of the group has had the commit that says so, and gets nothing more.
    fn keep_members(&mut self, group: GroupId) {
        let roster = &self.roster;
        self.followers.retain(|device, handle| {
            let member = has_device(roster, *device);
            if !member {
                handle.end_follow(group);
            }
            member
        });
        if self.followers.is_empty() {
            self.empty.get_or_insert_with(Instant::now);
        }
    }
}

/// Something to look up before a stream can be answered.
enum Job {
    Follow(Arc<Handle>, GroupId),
    Attach(GroupId, u64),
}

/// All feeds of an edge.
pub(super) struct Feeds {
    shards: [Mutex<HashMap<GroupId, Feed>>; SHARDS],
    /// Bounded: a stream has at most [`limits::SENDS_IN_FLIGHT`] unanswered requests, a feed one attempt that counts.
    jobs: Mutex<VecDeque<Job>>,
    due: Notify,
    attempts: AtomicU64,
}

impl Default for Feeds {
    fn default() -> Self {
        Self { shards: std::array::from_fn(|_| Mutex::default()), jobs: Mutex::default(), due: Notify::new(), attempts: AtomicU64::new(0) }
    }
}

impl Feeds {
    fn shard(&self, group: &GroupId) -> &Mutex<HashMap<GroupId, Feed>> {
        &self.shards[usize::from(group.as_bytes()[15]) % SHARDS]
    }

    fn next_attempt(&self) -> u64 {
        self.attempts.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn later(&self, job: Job) {
        self.jobs.lock().push_back(job);
        self.due.notify_one();
    }

    /// Of a feed that is live: the group's epoch, and whether the device is in it.
    pub(super) fn live(&self, group: GroupId, device: DeviceAddr) -> Option<(u64, bool)> {
        let shard = self.shard(&group).lock();
        let feed = shard.get(&group).filter(|feed| feed.live)?;
        Some((feed.epoch, has_device(&feed.roster, device)))
    }

    /// The projector met an attachment or a renewal of it.
    pub(super) fn attached(&self, group: GroupId, at: Option<(Seq, u64)>) {
        let mut shard = self.shard(&group).lock();
        let Some(feed) = shard.get_mut(&group) else { return };
        if let Some(waiting) = feed.attached.take() {
            // Who waited may have given up.
            let _ = waiting.send(at);
        } else if let Some((seq, epoch)) = at
            && feed.live
            && seq > feed.seq
        {
            // The last items never came.
            (feed.seq, feed.epoch) = (seq, epoch);
            feed.followers.values().for_each(|handle| handle.group_head(group, feed.at()));
        }
    }
}

impl GroupService {
    /// A stream wants to follow a group; a request that is counted. It is answered by a `GroupHead`, now or later.
    pub fn follow(&self, handle: &Arc<Handle>, group: GroupId) {
        if self.follows.check(&handle.device).is_err() {
            metrics::observe_rate_limited(metrics::RateScope::GroupChanges);
            return handle.refuse_follow(group, Code::Unavailable);
        }
        match handle.begin_follow(group) {
            Begun::Waits => return,
            Begun::TooMany => return handle.refuse_follow(group, Code::LimitReached),
            Begun::New => {}
        }
        let mut shard = self.feeds.shard(&group).lock();
        match shard.get_mut(&group).filter(|feed| feed.live && has_device(&feed.roster, handle.device)) {
            Some(feed) => {
                feed.add(handle);
                handle.group_head(group, feed.at());
            }
            None => {
                drop(shard);
                self.feeds.later(Job::Follow(Arc::clone(handle), group));
            }
        }
    }

    /// A stream follows a group no longer.
    pub fn unfollow(&self, handle: &Arc<Handle>, group: GroupId) {
        if handle.end_follow(group)
            && let Some(feed) = self.feeds.shard(&group).lock().get_mut(&group)
        {
            feed.remove(handle);
        }
    }

    /// A stream ends.
    pub fn end(&self, handle: &Arc<Handle>) {
        for group in handle.end_all_follows() {
            if let Some(feed) = self.feeds.shard(&group).lock().get_mut(&group) {
                feed.remove(handle);
            }
        }
    }

    /// Where a followed group is.
    pub fn at(&self, group: GroupId) -> Option<Where> {
        self.feeds.shard(&group).lock().get(&group).filter(|feed| feed.live).map(Feed::at)
    }

    /// Looks after feeds until `stop` turns true: answers those who begin to follow, renews attachments, and ends those nobody needs.
    pub async fn run(self: Arc<Self>, mut stop: watch::Receiver<bool>) {
        let mut looking = FuturesUnordered::new();
        let mut every = tokio::time::interval(Duration::from_millis(limits::GROUP_LOOK_MS));
        loop {
            while looking.len() < limits::GROUP_LOOKS_AT_ONCE {
                let Some(job) = self.feeds.jobs.lock().pop_front() else { break };
                let this = Arc::clone(&self);
                looking.push(
                    async move {
                        match job {
                            Job::Follow(handle, group) => this.look(&handle, group).await,
                            Job::Attach(group, attempt) => this.attach(group, attempt).await,
                        }
                    }
                    .boxed(),
                );
            }
            tokio::select! {
                biased;
                _ = stop.wait_for(|stop| *stop) => return,
                Some(()) = looking.next() => {}
                () = self.feeds.due.notified() => {}
                _ = every.tick() => self.renew(),
            }
        }
    }

    /// Whether a stream may follow; if so, it is in the group's feed.
    async fn look(&self, handle: &Arc<Handle>, group: GroupId) {
        match self.members.known_to(group, handle.device).await {
            Err(error) => handle.group_head(group, Where::refused(shown(&error))),
            // Nothing will come any more; what the client has not had it fetches.
            Ok(Known { head, .. }) if head.closed => {
                handle.group_head(group, Where { code: Code::Ok, seq: head.head, epoch: head.epoch });
                handle.end_follow(group);
            }
            Ok(known) => self.join(handle, group, &known),
        }
    }

    fn join(&self, handle: &Arc<Handle>, group: GroupId, known: &Known) {
        let mut shard = self.feeds.shard(&group).lock();
        // Under the lock that an ending stream takes next: it is in neither or in both.
        if !handle.follows(group) {
            drop(shard);
            return handle.group_head(group, Where::refused(Code::Unavailable));
        }
        let feed = shard.entry(group).or_insert_with(Feed::new);
        if feed.live && known.head.epoch < feed.epoch && !has_device(&feed.roster, handle.device) {
            drop(shard);
            return handle.group_head(group, Where::refused(Code::Forbidden));
        }
        feed.add(handle);
        if feed.live {
            if known.head.head > feed.seq {
                // The store is ahead of what was pushed; what was is passed over when it comes.
                (feed.seq, feed.epoch, feed.roster) = (known.head.head, known.head.epoch, Arc::clone(&known.roster));
                feed.keep_members(group);
                feed.followers.values().for_each(|other| other.group_head(group, feed.at()));
            } else {
                handle.group_head(group, feed.at());
            }
        } else if feed.attempt == 0 {
            feed.attempt = self.feeds.next_attempt();
            self.feeds.later(Job::Attach(group, feed.attempt));
        }
    }

    /// Attaches the edge to a group and tells its followers where it is; each that waits is answered, whatever happens.
    async fn attach(&self, group: GroupId, attempt: u64) {
        let (sender, met) = oneshot::channel();
        {
            let mut shard = self.feeds.shard(&group).lock();
            let Some(feed) = shard.get_mut(&group).filter(|feed| feed.attempt == attempt) else { return };
            feed.attached = Some(sender);
            feed.renewed = Instant::now();
        }
        let attaching = async {
            self.parts.log.append(self.route(group), self.edge_event(group, true)).await?;
            let at = met.await.map_err(|_| GroupError::Unavailable)?;
            // Behind the attachment: it knows of every commit whose item did not come as a push.
            let known = match self.members.known(group).await? {
                // Who was just invited may be among those who wait.
                Some(known) => Some(self.members.written(group, known).await?),
                None => None,
            };
            Ok::<_, GroupError>(known.filter(|known| at.is_some() || known.head.closed))
        };
        let attached = tokio::time::timeout(Duration::from_millis(limits::ATTACH_MS), attaching).await;
        let known = attached.unwrap_or(Err(GroupError::Unavailable)).and_then(|known| known.ok_or_else(GroupError::no_group));
        let mut shard = self.feeds.shard(&group).lock();
        let Some(feed) = shard.get_mut(&group).filter(|feed| feed.attempt == attempt) else { return };
        match known {
            Ok(known) => {
                // What was pushed since the store was asked is newer.
                if known.head.head >= feed.seq {
                    (feed.seq, feed.epoch) = (known.head.head, known.head.epoch);
                }
                if known.roster.epoch >= feed.roster.epoch {
                    feed.roster = known.roster;
                }
                feed.live = true;
                let (at, roster) = (feed.at(), Arc::clone(&feed.roster));
                feed.followers.retain(|device, handle| {
                    let member = has_device(&roster, *device);
                    handle.group_head(group, if member { at } else { Where::refused(Code::Forbidden) });
                    member
                });
                if known.head.closed {
                    feed.end_all(group);
                    shard.remove(&group);
                } else if feed.followers.is_empty() {
                    feed.empty.get_or_insert_with(Instant::now);
                }
            }
            Err(error) => {
                // They ask again.
                let code = shown(&error);
                feed.followers.values().for_each(|handle| handle.group_head(group, Where::refused(code)));
                shard.remove(&group);
            }
        }
    }

    fn edge_event(&self, group: GroupId, here: bool) -> bytes::Bytes {
        let edge = self.parts.edge;
        let body = if here { GroupEventBody::EdgeAttached { edge } } else { GroupEventBody::EdgeDetached { edge } };
        event::encode(&GroupEvent { group, at: self.parts.clock.now(), reply_to: None, body })
    }

    fn tell(&self, group: GroupId, here: bool) {
        let sink: Arc<dyn AppendSink> = Arc::new(Unwatched);
        if let Err(error) = self.parts.log.submit(self.route(group), self.edge_event(group, here), &sink, 0) {
            tracing::debug!(%error, "an edge's word on a group was not appended; it is said again or runs out");
        }
    }

    fn renew(&self) {
        let (renew, pause) = (Duration::from_millis(limits::GROUP_EDGE_RENEW_MS), Duration::from_millis(limits::GROUP_DETACH_MS));
        for shard in &self.feeds.shards {
            shard.lock().retain(|group, feed| {
                let gone = feed.live && feed.empty.is_some_and(|since| since.elapsed() >= pause);
                if gone {
                    self.tell(*group, false);
                } else if feed.live && feed.renewed.elapsed() >= renew {
                    feed.renewed = Instant::now();
                    self.tell(*group, true);
                }
                !gone
            });
        }
    }

    /// The edge ends: projectors need not wait until its attachments run out.
    pub fn detach_all(&self) {
        for shard in &self.feeds.shards {
            shard.lock().drain().for_each(|(group, _)| self.tell(group, false));
        }
    }

    /// Pushes may have been lost: every feed attaches anew, and its followers are told where their groups are.
    pub fn cut_all(&self) {
        for shard in &self.feeds.shards {
            shard.lock().retain(|group, feed| {
                if feed.followers.is_empty() {
                    self.tell(*group, false);
                    return false;
                }
                feed.live = false;
                feed.attempt = self.feeds.next_attempt();
                self.feeds.later(Job::Attach(*group, feed.attempt));
                true
            });
        }
    }

    /// Items that were pushed, in order for each group. Handles that have to be woken are added to `touched`.
    pub fn deliver(&self, mut arrived: Vec<Arrived>, touched: &mut Vec<Arc<Handle>>) {
        // Stable: a group's items stay in order, and go to each follower in one go.
        arrived.sort_by_key(|arrived| arrived.group);
        let mut frames = BytesMut::new();
        let mut arrived = arrived.into_iter().peekable();
        while let Some(group) = arrived.peek().map(|next| next.group) {
            let mut shard = self.feeds.shard(&group).lock();
            let mut feed = shard.get_mut(&group);
            let (mut items, mut closed) = (0, false);
            while let Some(Arrived { item, roster, .. }) = arrived.next_if(|next| next.group == group) {
                // What comes twice was passed on, or read from the store.
                let Some(feed) = feed.as_mut().filter(|feed| item.seq > feed.seq) else { continue };
                feed.pass(&item);
                closed |= item.kind == GroupItemKind::Closed;
                if feed.live {
                    frame::encode(group, &item, &mut frames);
                    items += 1;
                }
                if frames.len() >= limits::SERVER_FRAME_TARGET_BYTES || roster.is_some() {
                    feed.fan_out(group, &mut frames, &mut items, touched);
                }
                if let Some(roster) = roster {
                    feed.roster = Arc::new(*roster);
                    if feed.live {
                        feed.keep_members(group);
                    }
                }
            }
            let Some(feed) = feed else { continue };
            feed.fan_out(group, &mut frames, &mut items, touched);
            if closed && feed.live {
                feed.end_all(group);
                shard.remove(&group);
            }
        }
    }
}

/// The codes of `GroupHead` are fewer.
const fn shown(error: &GroupError) -> Code {
    match error.code() {
        code @ (Code::Forbidden | Code::NotFound) => code,
        _ => Code::Unavailable,
    }
}
