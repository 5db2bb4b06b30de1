//! Against a store in memory, and verdicts and pushes that the tests make up.

use std::collections::BTreeMap;
use std::task::Poll;

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::watch;

use super::*;
use crate::auth::KnownDevice;
use crate::clock::{ManualClock, SystemRandom, UnixMillis};
use crate::delivery::outbox::{Flow, GroupQueue, Handle, TakenGroups, Where};
use crate::ids::{AccountId, AttachId, ClientMessageId, DeviceId, Offset};
use crate::log::{AppendError, AppendSink, Consumer, ReadError, Record};
use crate::mls::profile::Role;
use crate::projector::push::GroupVerdict;
use crate::store::groups::{GroupHead, GroupItem, GroupItemKind, GroupRoster, GroupWrite};
use crate::store::{Mark, StoreError};
use crate::wire::stream::Code;

const GROUP: GroupId = GroupId::from_bytes([7; 16]);
const EDGE: EdgeId = EdgeId::from_bytes([1; 16]);

fn addr(account: u8) -> DeviceAddr {
    DeviceAddr { account: AccountId::from_bytes([account; 16]), device: DeviceId::new(1).expect("valid") }
}

fn known(account: u8) -> KnownDevice {
    KnownDevice { addr: addr(account), first_message_id: ClientMessageId(1) }
}

/// Keeps what is appended.
#[derive(Default)]
struct TestLog(Mutex<Vec<Bytes>>);

#[async_trait]
impl EventLog for TestLog {
    fn partitions(&self, _: Topic) -> u16 {
        1
    }
    fn submit(&self, _: TopicPartition, payload: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
        self.0.lock().push(payload);
        sink.done(token, Ok(Offset(0)));
        sink.flush();
        Ok(())
    }
    async fn consumer(&self, _: &str, _: &[Topic]) -> Result<Box<dyn Consumer>, ReadError> {
        Err(ReadError::Closed)
    }
    async fn read(&self, _: TopicPartition, _: Offset, _: usize) -> Result<Vec<Record>, ReadError> {
        Ok(vec![])
    }
    async fn bounds(&self, _: TopicPartition) -> Result<(Offset, Offset), ReadError> {
        Ok((Offset(0), Offset(0)))
    }
    async fn truncate_before(&self, _: TopicPartition, _: Offset) -> Result<(), ReadError> {
        Ok(())
    }
    fn health(&self) -> Result<(), AppendError> {
        Ok(())
    }
    async fn close(&self) {}
}

#[derive(Default)]
struct Memory {
    groups: Mutex<BTreeMap<GroupId, (GroupHead, GroupRoster)>>,
    items: Mutex<Vec<GroupItem>>,
    away: AtomicBool,
}

impl Memory {
    fn put(&self, epoch: u64, head: u64, accounts: &[u8]) {
        let head = GroupHead {
            created: UnixMillis(1),
            epoch,
            head: Seq(head),
            expired_to: Seq::ZERO,
            closed: false,
            gone: vec![],
            edges: vec![],
            snapshot_epoch: epoch,
            snapshot_at: Seq(head),
            applied: Seq(head),
        };
        self.groups.lock().insert(GROUP, (head, roster(epoch, accounts)));
    }

    fn get<T>(&self, read: impl FnOnce(&(GroupHead, GroupRoster)) -> T, id: GroupId) -> Result<Option<T>, StoreError> {
        if self.away.load(Ordering::Relaxed) {
            return Err(StoreError::Unavailable("away".into()));
        }
        Ok(self.groups.lock().get(&id).map(read))
    }
}

fn roster(epoch: u64, accounts: &[u8]) -> GroupRoster {
    let devices = accounts.iter().map(|n| addr(*n)).collect();
    GroupRoster { epoch, owner: accounts.first().map(|n| addr(*n).account), admins: vec![], devices }
}

#[async_trait]
impl GroupStore for Memory {
    async fn group_position(&self, _: Partition) -> Result<Offset, StoreError> {
        Ok(Offset(0))
    }
    async fn write_groups(&self, _: GroupWrite) -> Result<(), StoreError> {
        Ok(())
    }
    async fn group(&self, id: GroupId) -> Result<Option<GroupHead>, StoreError> {
        self.get(|group| group.0.clone(), id)
    }
    async fn group_roster(&self, id: GroupId) -> Result<Option<GroupRoster>, StoreError> {
        self.get(|group| group.1.clone(), id)
    }
    async fn group_info(&self, _: GroupId) -> Result<Option<Bytes>, StoreError> {
        Ok(None)
    }
    async fn group_snapshot(&self, _: GroupId, _: u64) -> Result<Option<Bytes>, StoreError> {
        Ok(None)
    }
    async fn group_tree(&self, _: GroupId, _: u64) -> Result<Option<Bytes>, StoreError> {
        Ok(None)
    }
    async fn group_items(&self, _: GroupId, after: Seq, items_max: usize, _: usize) -> Result<Vec<GroupItem>, StoreError> {
        Ok(self.items.lock().iter().filter(|item| item.seq > after).take(items_max).cloned().collect())
    }
    async fn group_marks(&self, _: GroupId, _: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> {
        Ok(vec![None])
    }
    async fn groups_of(&self, _: AccountId, _: Option<GroupId>, _: usize) -> Result<Vec<GroupId>, StoreError> {
        Ok(vec![GROUP])
    }
    async fn groups_expired(&self, _: UnixMillis, _: Option<GroupId>, _: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        Ok(vec![])
    }
}

struct World {
    service: Arc<GroupService>,
    log: Arc<TestLog>,
    store: Arc<Memory>,
    stop: watch::Sender<bool>,
}

fn world() -> World {
    let (log, store) = (Arc::new(TestLog::default()), Arc::new(Memory::default()));
    let service = Arc::new(GroupService::new(Parts {
        log: log.clone(),
        store: store.clone(),
        clock: Arc::new(ManualClock::new(UnixMillis(5))),
        random: Arc::new(SystemRandom),
        edge: EDGE,
        messages_per_s: 0,
        changes_per_min: 0,
    }));
    let (stop, stops) = watch::channel(false);
    tokio::spawn(Arc::clone(&service).run(stops));
    World { service, log, store, stop }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

impl World {
    /// What was appended since the last call.
    fn appended(&self) -> Vec<String> {
        let records = std::mem::take(&mut *self.log.0.lock());
        let name = |bytes: Bytes| match event::decode::<GroupEvent<'_>>(&bytes).expect("an event").body {
            GroupEventBody::EdgeAttached { edge } => format!("attached {}", edge == EDGE),
            GroupEventBody::EdgeDetached { edge } => format!("detached {}", edge == EDGE),
            other => format!("{other:?}"),
        };
        records.into_iter().map(name).collect()
    }

    async fn follow(&self, handle: &Arc<Handle>) {
        handle.enter().await;
        self.service.follow(handle, GROUP);
        settle().await;
    }

    fn met(&self, at: Option<(u64, u64)>) {
        self.service.pushed(Push::GroupAttached { group: GROUP, at: at.map(|(seq, epoch)| (Seq(seq), epoch)) });
    }

    fn push(&self, items: Vec<(GroupItem, Option<GroupRoster>)>) -> Vec<Arc<Handle>> {
        let arrived = items.into_iter().map(|(item, roster)| Arrived { group: GROUP, item, roster: roster.map(Box::new) });
        let mut touched = Vec::new();
        self.service.deliver(arrived.collect(), &mut touched);
        touched
    }

    /// A stream that follows.
    async fn follower(&self, account: u8) -> Arc<Handle> {
        let handle = stream(account);
        self.follow(&handle).await;
        if self.appended() == ["attached true"] {
            let head = self.store.group(GROUP).await.expect("there").expect("there");
            self.met(Some((head.head.0, head.epoch)));
            settle().await;
        }
        assert_eq!(taken(&handle).0.map(|groups| groups.heads[&GROUP].code), Some(Code::Ok));
        handle
    }
}

fn stream(account: u8) -> Arc<Handle> {
    Arc::new(Handle::new(known(account), AttachId(1), 0))
}

/// Lets what is under way go on.
async fn settle() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

fn taken(handle: &Handle) -> (Option<Box<TakenGroups>>, Vec<Bytes>) {
    let mut queue = GroupQueue::new();
    let taken = handle.take(&mut Flow::default(), &mut Default::default(), false, &mut queue);
    (taken.groups, queue.into_iter().map(|(_, frames)| frames).collect())
}

fn head(handle: &Handle) -> Option<Where> {
    taken(handle).0.and_then(|groups| groups.heads.get(&GROUP).copied())
}

fn seqs(frames: &[Bytes]) -> Vec<u64> {
    use prost::Message as _;
    let batch = crate::wire::stream::ServerBatch::decode(frames.concat().as_slice()).expect("frames");
    let seq = |frame: crate::wire::stream::ServerFrame| match frame.frame {
        Some(crate::wire::stream::server_frame::Frame::GroupItem(item)) => item.seq,
        other => panic!("{other:?}"),
    };
    batch.frames.into_iter().map(seq).collect()
}

fn item(seq: u64, after: u64, epoch: u64, kind: GroupItemKind, len: usize) -> GroupItem {
    GroupItem {
        seq: Seq(seq),
        after: Seq(after),
        accepted: UnixMillis(9),
        epoch,
        sender: Some(addr(1)),
        kind,
        client_message_id: ClientMessageId(seq),
        content: vec![0xab; len].into(),
    }
}

fn message(seq: u64, after: u64) -> (GroupItem, Option<GroupRoster>) {
    (item(seq, after, 0, GroupItemKind::Message, 100), None)
}

#[tokio::test]
async fn strangers_do_not_follow_and_members_hear_where_the_group_is() {
    let world = world();
    let alice = stream(1);
    world.follow(&alice).await;
    assert_eq!(head(&alice), Some(Where::refused(Code::NotFound)));
    world.store.put(0, 10, &[1, 2]);
    let carol = stream(3);
    world.follow(&carol).await;
    assert_eq!(head(&carol), Some(Where::refused(Code::Forbidden)));
    world.store.away.store(true, Ordering::Relaxed);
    world.follow(&alice).await;
    assert_eq!(head(&alice), Some(Where::refused(Code::Unavailable)));
    world.store.away.store(false, Ordering::Relaxed);
    assert!(world.appended().is_empty(), "nobody follows yet");

    world.follow(&alice).await;
    assert_eq!(world.appended(), ["attached true"]);
    assert_eq!(head(&alice), None, "not before the attachment was met");
    // What is pushed before that is told by the head, even if the store was asked before it had it.
    assert!(world.push(vec![message(12, 10)]).is_empty());
    world.met(Some((Seq(10).0, 0)));
    settle().await;
    assert_eq!(head(&alice), Some(Where { code: Code::Ok, seq: Seq(12), epoch: 0 }));
    let bob = stream(2);
    world.follow(&bob).await;
    assert_eq!(head(&bob), Some(Where { code: Code::Ok, seq: Seq(12), epoch: 0 }));
    world.follow(&carol).await;
    assert_eq!(head(&carol), Some(Where::refused(Code::Forbidden)), "nor by an edge that is attached");
    assert!(world.appended().is_empty(), "the edge is attached once");
    for handle in [&alice, &bob, &carol] {
        handle.end_all_follows();
    }
}

#[tokio::test]
async fn an_item_is_encoded_once_and_goes_to_each_follower_once() {
    let world = world();
    world.store.put(0, 10, &[1, 2, 3]);
    let (alice, bob, carol) = (world.follower(1).await, world.follower(2).await, world.follower(3).await);
    let touched = world.push(vec![message(12, 10), message(13, 12)]);
    assert_eq!(touched.len(), 3, "each is woken once");
    assert!(world.push(vec![message(13, 12), message(15, 13)]).is_empty(), "nobody has looked yet");
    let (a, b) = (taken(&alice).1, taken(&bob).1);
    assert_eq!(seqs(&a), [12, 13, 15], "the repeat is passed over");
    assert!(a.iter().zip(&b).all(|(a, b)| a.as_ptr() == b.as_ptr()), "the same bytes");
    world.service.unfollow(&carol, GROUP);
    assert_eq!(world.push(vec![message(17, 15)]).len(), 2);
    assert_eq!(seqs(&taken(&carol).1), [12, 13, 15], "what came before");
    world.service.end(&bob);
    assert_eq!(world.push(vec![message(18, 17)]).len(), 0, "alice has not looked, and nobody else is there");
    assert_eq!(seqs(&taken(&alice).1), [17, 18]);
}

#[tokio::test]
async fn who_is_removed_gets_the_commit_that_says_so_and_nothing_more() {
    let world = world();
    world.store.put(0, 10, &[1, 2]);
    let (alice, bob) = (world.follower(1).await, world.follower(2).await);
    let commit = item(11, 10, 0, GroupItemKind::Commit, 500);
    world.push(vec![message(10, 9), (commit, Some(roster(1, &[1]))), (item(12, 11, 1, GroupItemKind::Message, 9), None)]);
    assert_eq!(seqs(&taken(&bob).1), [11]);
    assert_eq!(seqs(&taken(&alice).1), [11, 12]);
    assert!(!bob.follows(GROUP) && alice.follows(GROUP));
    assert_eq!(world.service.at(GROUP), Some(Where { code: Code::Ok, seq: Seq(12), epoch: 1 }));
    let closed = item(14, 12, 1, GroupItemKind::Closed, 0);
    world.push(vec![(closed, None)]);
    assert_eq!(seqs(&taken(&alice).1), [14]);
    assert!(!alice.follows(GROUP) && world.service.at(GROUP).is_none());
}

#[tokio::test]
async fn a_stream_that_does_not_keep_up_is_told_where_its_groups_are() {
    let world = world();
    world.store.put(0, 10, &[1, 2]);
    let (alice, bob) = (world.follower(1).await, world.follower(2).await);
    let large = limits::SESSION_GROUP_BYTES / 4;
    for n in 0..4 {
        world.push(vec![(item(11 + n, 10 + n, 0, GroupItemKind::Message, large), None)]);
        assert_eq!(taken(&bob).1.len(), 1);
    }
    let (groups, frames) = taken(&alice);
    assert!(groups.is_some_and(|groups| groups.lost.contains(&GROUP)) && frames.is_empty(), "past the cap all goes");
    assert_eq!(world.service.at(GROUP).map(|at| at.seq), Some(Seq(14)));
    world.push(vec![message(15, 14)]);
    assert_eq!(seqs(&taken(&alice).1), [15]);
}

#[tokio::test]
async fn after_lost_pushes_the_edge_attaches_anew_and_heads_are_said_again() {
    let world = world();
    world.store.put(0, 10, &[1, 2]);
    let (alice, bob) = (world.follower(1).await, world.follower(2).await);
    // Lost: a commit that removed Bob.
    world.store.put(1, 20, &[1]);
    world.service.cut_all();
    settle().await;
    assert_eq!(world.appended(), ["attached true"]);
    assert_eq!((head(&alice), head(&bob)), (None, None));
    world.met(Some((20, 1)));
    settle().await;
    assert_eq!(head(&alice), Some(Where { code: Code::Ok, seq: Seq(20), epoch: 1 }));
    assert_eq!(head(&bob), Some(Where::refused(Code::Forbidden)));
    // The answer to a renewal tells of a lost last item.
    world.met(Some((22, 1)));
    assert_eq!(head(&alice), Some(Where { code: Code::Ok, seq: Seq(22), epoch: 1 }));
}

#[tokio::test(start_paused = true)]
async fn attachments_are_renewed_and_end_a_while_after_the_last_follower() {
    let world = world();
    world.store.put(0, 10, &[1, 2]);
    let alice = world.follower(1).await;
    tokio::time::sleep(Duration::from_millis(limits::GROUP_EDGE_RENEW_MS + limits::GROUP_LOOK_MS)).await;
    assert_eq!(world.appended(), ["attached true"]);
    world.service.end(&alice);
    tokio::time::sleep(Duration::from_millis(limits::GROUP_DETACH_MS / 2)).await;
    let bob = world.follower(2).await;
    tokio::time::sleep(Duration::from_millis(limits::GROUP_DETACH_MS * 2)).await;
    assert!(world.appended().is_empty(), "somebody came back in time");
    world.service.unfollow(&bob, GROUP);
    tokio::time::sleep(Duration::from_millis(limits::GROUP_DETACH_MS + limits::GROUP_LOOK_MS)).await;
    assert_eq!(world.appended(), ["detached true"]);
    let alice = world.follower(1).await;
    world.service.detach_all();
    assert_eq!(world.appended(), ["detached true"], "a drain says so at once");
    drop(alice);
}

#[tokio::test(start_paused = true)]
async fn an_attachment_that_is_not_met_is_answered_all_the_same() {
    let world = world();
    world.store.put(0, 10, &[1]);
    let alice = stream(1);
    world.follow(&alice).await;
    tokio::time::sleep(Duration::from_millis(limits::ATTACH_MS + 1)).await;
    assert_eq!(head(&alice), Some(Where::refused(Code::Unavailable)));
    assert!(!alice.follows(GROUP));
    world.appended();
    world.follower(1).await;
}

#[tokio::test]
async fn a_device_follows_so_many_groups_and_waits_for_so_many_answers() {
    let world = world();
    let alice = stream(1);
    for n in 0..limits::GROUPS_PER_ACCOUNT as u128 {
        alice.enter().await;
        assert_eq!(alice.begin_follow(GroupId::from_bytes(n.to_be_bytes())), crate::delivery::outbox::Begun::New);
    }
    world.follow(&alice).await;
    assert_eq!(head(&alice), Some(Where::refused(Code::LimitReached)));
    let bob = stream(2);
    for n in 0..limits::ANSWERS_QUEUED as u128 {
        bob.enter().await;
        world.service.follow(&bob, GroupId::from_bytes(n.to_be_bytes()));
        if n % 100 == 0 {
            settle().await;
        }
    }
    settle().await;
    let entering = bob.enter();
    tokio::pin!(entering);
    assert!(futures_util::poll!(&mut entering).is_pending(), "answers that nobody reads are as good as none");
    assert!(taken(&bob).0.is_some());
    assert_eq!(futures_util::poll!(&mut entering), Poll::Ready(()));
}

#[tokio::test]
async fn messages_are_checked_before_the_log_takes_them() {
    let world = world();
    let content: Bytes = [&[0, 1, 0, 2][..], &[9; 100]].concat().into();
    let message =
        |id: u64, epoch: u64| GroupMessage { group: GROUP, client_message_id: ClientMessageId(id), epoch, content: content.clone() };
    let send = |account: u8, message: GroupMessage| world.service.send_message(known(account), message);
    assert_eq!(send(1, message(1, 0)).await.map_err(|e| e.code()), Err(Code::NotFound));
    world.store.put(20, 10, &[1]);
    assert_eq!(send(2, message(1, 20)).await.map_err(|e| e.code()), Err(Code::Forbidden));
    assert_eq!(send(1, message(1, 21)).await, Err(GroupError::Conflict { epoch: 20, seq: Seq(10) }));
    assert_eq!(send(1, message(1, 3)).await, Err(GroupError::Conflict { epoch: 20, seq: Seq(10) }));
    assert_eq!(send(1, message(0, 20)).await.map_err(|e| e.code()), Err(Code::BadRequest));
    let large = GroupMessage { content: vec![0; limits::ENVELOPE_BYTES + 1].into(), ..message(1, 20) };
    assert_eq!(send(1, large).await.map_err(|e| e.code()), Err(Code::TooLarge));
    let handshake = GroupMessage { content: Bytes::from_static(&[0, 1, 0, 1, 5]), ..message(1, 20) };
    assert_eq!(send(1, handshake).await.map_err(|e| e.code()), Err(Code::BadRequest));
    assert!(world.appended().is_empty());
    for (id, epoch) in [(1, 20), (1, 20), (200, 4)] {
        assert_eq!(send(1, message(id, epoch)).await, Ok(()));
    }
    assert_eq!(send(1, message(72, 20)).await, Err(GroupError::StaleMessageId));
    assert_eq!(send(1, message(73, 20)).await, Ok(()));
    assert_eq!(world.appended().len(), 4);
    world.service.set_behind(true);
    assert_eq!(send(1, message(201, 20)).await, Err(GroupError::Unavailable));
    world.service.set_behind(false);

    // A stream's is answered through its sink, as those between accounts.
    let handle = world.follower(1).await;
    let sink: Arc<dyn AppendSink> = Arc::clone(&handle) as _;
    handle.enter().await;
    world.service.submit_message(known(1), message(202, 20), &sink, 77).await.expect("taken");
    let taken = handle.take(&mut Flow::default(), &mut Default::default(), false, &mut GroupQueue::new());
    assert_eq!(taken.accepted, [77]);
}

#[tokio::test(start_paused = true)]
async fn verdicts_answer_those_who_wait_and_silence_is_an_unknown_outcome() {
    let world = world();
    world.store.put(3, 10, &[1]);
    let commit = Commit { commit: vec![1], welcome: None, group_info: vec![2] };
    let verdicts = [
        (GroupVerdict::Done { seq: Seq(12), epoch: 4 }, Ok((Seq(12), 4))),
        (GroupVerdict::Conflict { epoch: 5, head: Seq(13) }, Err(GroupError::Conflict { epoch: 5, seq: Seq(13) })),
        (GroupVerdict::Exists, Err(GroupError::Exists)),
        (GroupVerdict::NotFound, Err(GroupError::no_group())),
        (GroupVerdict::Denied("no".into()), Err(GroupError::Forbidden("no".into()))),
        (GroupVerdict::Invalid("bad".into()), Err(GroupError::BadRequest("bad".into()))),
    ];
    for (number, (verdict, expected)) in (1..).zip(verdicts) {
        let submitted = world.service.commit(addr(1), GROUP, &commit);
        let decide = async {
            settle().await;
            world.service.pushed(Push::GroupVerdict { request: RequestId { edge: EDGE, number }, verdict });
        };
        assert_eq!(tokio::join!(submitted, decide).0, expected);
    }
    assert_eq!(world.service.commit(addr(1), GROUP, &commit).await, Err(GroupError::OutcomeUnknown));
    assert_eq!(world.appended().len(), 7);
    assert_eq!(world.service.commit(addr(2), GROUP, &commit).await, Err(GroupError::not_member()));
    assert_eq!(world.service.close(addr(2), GROUP).await, Err(GroupError::not_member()));
    let empty = Commit { welcome: Some(vec![]), ..commit.clone() };
    assert_eq!(world.service.commit(addr(1), GROUP, &empty).await.map_err(|e| e.code()), Err(Code::BadRequest));
    let large = Commit { commit: vec![0; limits::COMMIT_BYTES + 1], ..commit };
    assert_eq!(world.service.commit(addr(1), GROUP, &large).await.map_err(|e| e.code()), Err(Code::TooLarge));
    assert_eq!(world.service.create(addr(1), b"x", b"y").await.map_err(|e| e.code()), Err(Code::BadRequest));
    assert!(world.appended().is_empty(), "what is refused is not on the log");
}

#[tokio::test]
async fn pages_are_for_members() {
    let world = world();
    world.store.put(3, 10, &[1, 2]);
    world.store.items.lock().extend((8..=11).map(|seq| item(seq, seq - 1, 3, GroupItemKind::Message, 1)));
    let page = world.service.items(addr(1), GROUP, Seq(8), 2).await.expect("a page");
    assert_eq!(page.items.iter().map(|item| item.seq.0).collect::<Vec<_>>(), [9, 10]);
    assert_eq!((page.head, page.epoch), (Seq(10), 3));
    assert_eq!(world.service.items(addr(1), GROUP, Seq(10), 9).await.map(|page| page.head), Ok(Seq(11)), "the store went on");
    assert_eq!(world.service.items(addr(3), GROUP, Seq(8), 2).await, Err(GroupError::not_member()));
    let (_, members) = world.service.details(addr(2).account, GROUP).await.expect("details");
    assert_eq!(members.iter().map(|member| member.role).collect::<Vec<_>>(), [Role::Owner, Role::Member]);
    assert_eq!(world.service.details(addr(3).account, GROUP).await, Err(GroupError::not_member()));
    assert_eq!(world.service.tree(addr(1), GROUP, 3).await.map_err(|e| e.code()), Err(Code::NotFound));
    assert_eq!(world.service.info(addr(3), GROUP).await, Err(GroupError::not_member()));
    // Invited by a commit that the head does not tell of yet.
    world.store.groups.lock().entry(GROUP).and_modify(|(_, members)| *members = roster(4, &[1, 2, 3]));
    assert_eq!(world.service.tree(addr(3), GROUP, 4).await.map_err(|e| e.code()), Err(Code::NotFound), "asked for, and not kept here");
    assert_eq!(world.service.items(addr(3), GROUP, Seq(10), 9).await.map(|page| page.head), Ok(Seq(11)));
}
