//! Pushes over the `push` topic, for edges and projectors in processes of their own.
//!
//! Partition 0 is for every edge; each edge listens to one of the others besides, chosen by its id, and takes what bears its
//! id. Records are kept for minutes: an edge that was away for longer finds its position gone, and cuts all its feeds.
//!
//! A record is the version byte, then bincode: the edge it is for (none: all), and pushes in order.

use std::hash::Hasher as _;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bincode::{BorrowDecode, Encode};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::clock::{Clock as _, SystemClock};
use crate::ids::{AccountId, AttachId, DeviceAddr, EdgeId, GroupId, Offset, Partition, Seq};
use crate::limits;
use crate::log::{AppendError, AppendSink, Consumed, EventLog, Follow, ReadError, Topic, TopicPartition};
use crate::metrics;
use crate::projector::push::{GroupVerdict, Push, PushBus, Verdict};
use crate::store::groups::GroupRoster;
use crate::store::{InboxState, PendingItem, StoreError, keyspace};
use crate::wire::event::{self, RequestId, TraceContext};

/// How long a full queue is left alone before it is tried again.
const FULL_PAUSE: Duration = Duration::from_millis(5);

#[derive(Encode, BorrowDecode)]
enum Wire<'a> {
    Item {
        device: DeviceAddr,
        attach: AttachId,
        after: Seq,
        seq: Seq,
        body: &'a [u8],
    },
    Attached {
        device: DeviceAddr,
        attach: AttachId,
        at: Seq,
        inbox: InboxState,
    },
    Replaced {
        device: DeviceAddr,
        attach: AttachId,
    },
    Revoked {
        device: DeviceAddr,
    },
    Waiting {
        device: DeviceAddr,
    },
    Full {
        device: DeviceAddr,
        full: bool,
    },
    Verdict {
        request: RequestId,
        verdict: Verdict,
    },
    AccountChanged {
        account: AccountId,
    },
    /// An item whose message is traced. An edge from before traces does not know it, cuts its feeds and catches up.
    TracedItem {
        device: DeviceAddr,
        attach: AttachId,
        after: Seq,
        seq: Seq,
        body: &'a [u8],
        trace: TraceContext,
    },
    GroupItem {
        group: GroupId,
        seq: Seq,
        body: &'a [u8],
        roster: Option<GroupRoster>,
    },
    GroupAttached {
        group: GroupId,
        at: Option<(Seq, u64)>,
    },
    GroupVerdict {
        request: RequestId,
        verdict: GroupVerdict,
    },
}

#[derive(Encode, BorrowDecode)]
struct Batch<'a> {
    edge: Option<EdgeId>,
    pushes: Vec<Wire<'a>>,
}

fn to_wire<'a>(push: &Push, body: &'a [u8]) -> Wire<'a> {
    match push {
        Push::Item { device, attach, after, item, trace } => {
            let (device, attach, after, seq) = (*device, *attach, *after, item.seq);
            match trace {
                None => Wire::Item { device, attach, after, seq, body },
                Some(trace) => Wire::TracedItem { device, attach, after, seq, body, trace: **trace },
            }
        }
        Push::Attached { device, attach, at, inbox } => Wire::Attached { device: *device, attach: *attach, at: *at, inbox: *inbox },
        Push::Replaced { device, attach } => Wire::Replaced { device: *device, attach: *attach },
        Push::Revoked { device } => Wire::Revoked { device: *device },
        Push::Waiting { device } => Wire::Waiting { device: *device },
        Push::Full { device, full } => Wire::Full { device: *device, full: *full },
        Push::Verdict { request, verdict } => Wire::Verdict { request: *request, verdict: verdict.clone() },
        Push::AccountChanged { account } => Wire::AccountChanged { account: *account },
        Push::GroupItem { group, item, roster } => {
            Wire::GroupItem { group: *group, seq: item.seq, body, roster: roster.as_deref().cloned() }
        }
        Push::GroupAttached { group, at } => Wire::GroupAttached { group: *group, at: *at },
        Push::GroupVerdict { request, verdict } => Wire::GroupVerdict { request: *request, verdict: verdict.clone() },
    }
}

fn from_wire(wire: Wire<'_>, record: &Bytes) -> Result<Push, StoreError> {
    Ok(match wire {
        Wire::Item { device, attach, after, seq, body } => {
            let item: PendingItem = keyspace::decode_pending(seq, event::share(record, body))?;
            Push::Item { device, attach, after, item, trace: None }
        }
        Wire::TracedItem { device, attach, after, seq, body, trace } => {
            let item = keyspace::decode_pending(seq, event::share(record, body))?;
            Push::Item { device, attach, after, item, trace: Some(Box::new(trace)) }
        }
        Wire::Attached { device, attach, at, inbox } => Push::Attached { device, attach, at, inbox },
        Wire::Replaced { device, attach } => Push::Replaced { device, attach },
        Wire::Revoked { device } => Push::Revoked { device },
        Wire::Waiting { device } => Push::Waiting { device },
        Wire::Full { device, full } => Push::Full { device, full },
        Wire::Verdict { request, verdict } => Push::Verdict { request, verdict },
        Wire::AccountChanged { account } => Push::AccountChanged { account },
        Wire::GroupItem { group, seq, body, roster } => {
            let item = keyspace::decode_group_item(seq, event::share(record, body))?;
            Push::GroupItem { group, item, roster: roster.map(Box::new) }
        }
        Wire::GroupAttached { group, at } => Push::GroupAttached { group, at },
        Wire::GroupVerdict { request, verdict } => Push::GroupVerdict { request, verdict },
    })
}

/// Pushes in records of about [`limits::PUSH_RECORD_BYTES`] at most.
fn encode(edge: Option<EdgeId>, pushes: &[Push]) -> Vec<Bytes> {
    let mut records = Vec::with_capacity(1);
    let mut rest = pushes;
    while !rest.is_empty() {
        let (mut bodies, mut ends, mut count) = (Vec::new(), Vec::new(), 0);
        while count < rest.len() && (count == 0 || bodies.len() < limits::PUSH_RECORD_BYTES) {
            match &rest[count] {
                Push::Item { item, .. } => keyspace::encode_pending(&item.body, &mut bodies),
                Push::GroupItem { item, .. } => keyspace::encode_group_item(item, &mut bodies),
                _ => {}
            }
            ends.push(bodies.len());
            count += 1;
        }
        let mut from = 0;
        let pushes = rest[..count].iter().zip(ends).map(|(push, end)| to_wire(push, &bodies[std::mem::replace(&mut from, end)..end]));
        records.push(event::encode(&Batch { edge, pushes: pushes.collect() }));
        rest = &rest[count..];
    }
    records
}

/// Reads a record; whose it is, and what it says.
pub fn decode(record: &Bytes) -> Result<(Option<EdgeId>, Vec<Push>), StoreError> {
    let batch: Batch<'_> = event::decode(record).map_err(|error| StoreError::Corrupt(format!("a push: {error}")))?;
    let pushes = batch.pushes.into_iter().map(|wire| from_wire(wire, record)).collect::<Result<_, _>>()?;
    Ok((batch.edge, pushes))
}

/// The partition for what every edge hears.
const FOR_ALL: Partition = Partition(0);

/// The partition that an edge listens to besides, by a hash of its id (SipHash-1-3 with a zero key).
fn partition_of(edge: &EdgeId, partitions: u16) -> Partition {
    let mut hasher = siphasher::sip::SipHasher13::new();
    hasher.write(edge.as_bytes());
    let others = u64::from(partitions.max(2) - 1);
    Partition(1 + (hasher.finish() % others) as u16)
}

#[derive(Debug, Clone, Default)]
struct Sent {
    /// Which of the workers in turn it counts for. What an earlier one had under way is not this one's matter: it pushes again what its
    /// positions don't cover.
    worker: u64,
    submitted: u64,
    done: u64,
    failed: Option<AppendError>,
}

/// Counts what was appended and what became of it.
#[derive(Debug)]
struct Tracker(watch::Sender<Sent>);

impl AppendSink for Tracker {
    fn done(&self, token: u64, outcome: Result<Offset, AppendError>) {
        self.0.send_if_modified(|sent| {
            if token != sent.worker {
                return false;
            }
            sent.done += 1;
            let failed = outcome.err();
            let news = failed.is_some() || sent.done == sent.submitted;
            sent.failed = sent.failed.take().or(failed);
            news
        });
    }
}

/// The projector's end.
pub struct PushTopic {
    log: Arc<dyn EventLog>,
    tracker: Arc<Tracker>,
    sink: Arc<dyn AppendSink>,
    /// Appends of one caller are in order only if one goes behind the other.
    order: Mutex<()>,
}

impl PushTopic {
    /// Over the log's topic [`Topic::Push`].
    pub fn new(log: Arc<dyn EventLog>) -> Self {
        let tracker = Arc::new(Tracker(watch::channel(Sent::default()).0));
        Self { log, sink: Arc::clone(&tracker) as Arc<dyn AppendSink>, tracker, order: Mutex::default() }
    }

    async fn append(&self, partition: Partition, records: Vec<Bytes>) {
        for record in records {
            while let Err(error) = self.submit(partition, &record) {
                if !matches!(error, AppendError::Full | AppendError::Unavailable(_)) {
                    self.tracker.0.send_modify(|sent| sent.failed = Some(error));
                    return;
                }
                tokio::time::sleep(FULL_PAUSE).await;
            }
        }
    }

    fn submit(&self, partition: Partition, record: &Bytes) -> Result<(), AppendError> {
        let _order = self.order.lock();
        // Before the append, so that its outcome never comes first.
        let mut worker = 0;
        self.tracker.0.send_if_modified(|sent| {
            sent.submitted += 1;
            worker = sent.worker;
            false
        });
        let submitted = self.log.submit(TopicPartition { topic: Topic::Push, partition }, record.clone(), &self.sink, worker);
        if submitted.is_err() {
            self.tracker.0.send_modify(|sent| sent.submitted -= 1);
        }
        submitted
    }
}

#[async_trait]
impl PushBus for PushTopic {
    fn begin(&self) {
        // Not between the count of a submission and the submission.
        let _order = self.order.lock();
        self.tracker.0.send_modify(|sent| *sent = Sent { worker: sent.worker + 1, ..Sent::default() });
    }

    async fn push(&self, edge: EdgeId, batch: Vec<Push>) {
        let partition = partition_of(&edge, self.log.partitions(Topic::Push));
        self.append(partition, encode(Some(edge), &batch)).await;
    }

    async fn broadcast(&self, batch: Vec<Push>) {
        self.append(FOR_ALL, encode(None, &batch)).await;
    }

    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>> {
        let mut sent = self.tracker.0.subscribe();
        let target = sent.borrow().submitted;
        Box::pin(async move {
            match sent.wait_for(|sent| sent.done >= target || sent.failed.is_some()).await {
                Ok(sent) => sent.failed.clone().map_or(Ok(()), Err),
                Err(_) => Err(AppendError::Closed),
            }
        })
    }
}

/// What an edge does with pushes.
pub trait PushTarget: Send + Sync + 'static {
    /// Pushes for this edge or for all, in order.
    fn deliver(&self, batch: Vec<Push>);
    /// Pushes may have been lost.
    fn cut_all(&self);
}

/// The edge's end: reads until it is dropped. The future never ends but with an error that only a restart can mend.
pub async fn receive(
    follow: Arc<dyn Follow>,
    partitions: u16,
    edge: EdgeId,
    target: Arc<dyn PushTarget>,
    ready: tokio::sync::oneshot::Sender<()>,
) -> ReadError {
    let of = [FOR_ALL, partition_of(&edge, partitions)].map(|partition| TopicPartition { topic: Topic::Push, partition });
    let mut ready = Some(ready);
    let mut pause = Duration::from_millis(100);
    loop {
        match follow.follow(&of).await {
            Ok(mut consumer) => {
                match ready.take() {
                    // Who waits may have given up starting.
                    Some(ready) => drop(ready.send(())),
                    // What came between the last consumer and this one is missing.
                    None => target.cut_all(),
                }
                pause = Duration::from_millis(100);
                let error = loop {
                    match consumer.next().await {
                        Ok(Consumed::Records(batches)) => {
                            for record in batches.iter().flat_map(|(_, records)| records) {
                                let delay = SystemClock.now().0.saturating_sub(record.appended.0);
                                metrics::observe_push_delay(Duration::from_millis(delay));
                                deliver(&record.payload, edge, target.as_ref());
                            }
                        }
                        Ok(Consumed::Assigned(_) | Consumed::Revoked(_)) => {}
                        Err(error) => break error,
                    }
                };
                if error == ReadError::Closed {
                    return error;
                }
                tracing::warn!(%error, "the edge lost the push topic; its streams catch up from the store once it is back");
            }
            Err(error @ (ReadError::NoSuchPartition | ReadError::Closed)) => return error,
            Err(error) => tracing::warn!(%error, "the edge can't read the push topic; it tries again"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_secs(2));
    }
}

fn deliver(record: &Bytes, edge: EdgeId, target: &dyn PushTarget) {
    match decode(record) {
        Ok((Some(other), _)) if other != edge => {}
        Ok((_, pushes)) => target.deliver(pushes),
        Err(error) => {
            tracing::error!(%error, "a record of the push topic is not one; is a newer projector running?");
            target.cut_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::clock::UnixMillis;
    use crate::ids::{ClientMessageId, DeviceId};
    use crate::store::groups::{GroupItem, GroupItemKind};
    use crate::store::{PendingBody, PendingEnvelope};

    fn device(n: u8) -> DeviceAddr {
        DeviceAddr { account: AccountId::from_bytes([n; 16]), device: DeviceId::new(3).expect("valid") }
    }

    fn group_item(seq: u64) -> GroupItem {
        GroupItem {
            seq: Seq(seq),
            after: Seq(seq - 1),
            accepted: UnixMillis(7),
            epoch: 3,
            sender: seq.is_multiple_of(2).then(|| device(4)),
            kind: GroupItemKind::Message,
            client_message_id: ClientMessageId(5),
            content: vec![8; 300].into(),
        }
    }

    fn item(seq: u64, bytes: usize) -> Push {
        let body = PendingBody::Envelope(PendingEnvelope {
            sender: device(9),
            client_message_id: ClientMessageId(seq),
            accepted: UnixMillis(7),
            flags: 1,
            kind: 2,
            sealed: vec![seq as u8; bytes].into(),
        });
        let trace = seq.is_multiple_of(7).then(|| Box::new(TraceContext { trace: [seq as u8; 16], span: [9; 8] }));
        Push::Item { device: device(1), attach: AttachId(5), after: Seq(seq - 1), item: PendingItem { seq: Seq(seq), body }, trace }
    }

    #[test]
    fn everything_comes_back_in_order_in_records_of_bounded_size() {
        let edge = EdgeId::from_bytes([4; 16]);
        let request = RequestId { edge, number: 8 };
        let mut pushes: Vec<Push> = (1..=2_000).map(|seq| item(seq, 1_000)).collect();
        pushes.extend([
            Push::Attached { device: device(1), attach: AttachId(6), at: Seq(7), inbox: InboxState::default() },
            Push::Replaced { device: device(1), attach: AttachId(6) },
            Push::Revoked { device: device(2) },
            Push::Waiting { device: device(2) },
            Push::Full { device: device(2), full: true },
            Push::Verdict { request, verdict: Verdict::Done(Some(device(3))) },
            Push::AccountChanged { account: device(3).account },
            Push::GroupItem { group: GroupId::from_bytes([7; 16]), item: group_item(9), roster: None },
            Push::GroupItem {
                group: GroupId::from_bytes([7; 16]),
                item: group_item(10),
                roster: Some(Box::new(GroupRoster { epoch: 3, owner: None, admins: Vec::new(), devices: vec![device(1)] })),
            },
            Push::GroupAttached { group: GroupId::from_bytes([7; 16]), at: Some((Seq(9), 3)) },
            Push::GroupVerdict { request, verdict: GroupVerdict::Conflict { epoch: 3, head: Seq(9) } },
            item(2_001, limits::ENVELOPE_BYTES),
        ]);
        let records = encode(Some(edge), &pushes);
        assert!(records.len() > 2);
        let mut back = Vec::new();
        for record in &records {
            assert!(record.len() < limits::RECORD_BYTES);
            let (whose, some) = decode(record).expect("our own");
            assert_eq!(whose, Some(edge));
            back.extend(some);
        }
        assert_eq!(format!("{back:?}"), format!("{pushes:?}"));
        assert_eq!(encode(None, &[]).len(), 0);
    }

    /// Keeps what is submitted, so that a test can say what becomes of it.
    #[derive(Default)]
    struct Held(Mutex<Vec<(Arc<dyn AppendSink>, u64)>>);

    impl Held {
        fn answer(&self, outcome: &Result<Offset, AppendError>) {
            for (sink, token) in self.0.lock().drain(..) {
                sink.done(token, outcome.clone());
            }
        }
    }

    #[async_trait]
    impl EventLog for Held {
        fn partitions(&self, _: Topic) -> u16 {
            2
        }
        fn submit(&self, _: TopicPartition, _: Bytes, sink: &Arc<dyn AppendSink>, token: u64) -> Result<(), AppendError> {
            self.0.lock().push((Arc::clone(sink), token));
            Ok(())
        }
        async fn consumer(&self, _: &str, _: &[Topic]) -> Result<Box<dyn crate::log::Consumer>, ReadError> {
            Err(ReadError::Closed)
        }
        async fn read(&self, _: TopicPartition, _: Offset, _: usize) -> Result<Vec<crate::log::Record>, ReadError> {
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

    /// A projector goes on after Kafka was away for longer than an append may take: its next worker is not failed by that again.
    #[tokio::test]
    async fn a_lost_push_fails_the_worker_that_pushed_it_and_no_later_one() {
        let log = Arc::new(Held::default());
        let bus = PushTopic::new(Arc::clone(&log) as Arc<dyn EventLog>);
        let lost = Err(AppendError::Unknown("no answer".to_owned()));
        bus.begin();
        bus.broadcast(vec![item(1, 10)]).await;
        log.answer(&lost);
        assert!(bus.settled().await.is_err());
        bus.broadcast(vec![item(2, 10)]).await;
        bus.begin();
        assert_eq!(bus.settled().await, Ok(()));
        // What the first one still had under way.
        log.answer(&lost);
        bus.broadcast(vec![item(3, 10)]).await;
        let settled = bus.settled();
        log.answer(&Ok(Offset(7)));
        assert_eq!(settled.await, Ok(()));
    }

    #[test]
    fn an_edge_listens_beside_the_partition_for_all() {
        for n in 0..50 {
            let partition = partition_of(&EdgeId::from_bytes([n; 16]), 8);
            assert!((1..8).contains(&partition.0));
        }
        assert_eq!(partition_of(&EdgeId::from_bytes([1; 16]), 2), Partition(1));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: Vec<u8>) {
            let _ = decode(&bytes.into());
        }
    }
}
