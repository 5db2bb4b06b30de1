//! The server of the storm: log, store, the groups' projector and the delivery service of an edge, as they run in a broker.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message as _;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::PATIENCE;
use crate::auth::KnownDevice;
use crate::clock::{ManualClock, SystemRandom};
use crate::delivery::groups::{Arrived, GroupError, GroupService, Parts, parse};
use crate::delivery::outbox::{Flow, GroupQueue, Handle, Where};
use crate::ids::{AttachId, ClientMessageId, DeviceAddr, EdgeId, Generation, GroupId, Offset, Partition, Seq};
use crate::log::embedded::{EmbeddedLog, Options as LogOptions};
use crate::log::{AppendError, EventLog as _, Topic, TopicPartition};
use crate::mls::sender::ServerKey;
use crate::projector::groups::worker;
use crate::projector::push::{Push, PushBus};
use crate::projector::worker::{Progress, WorkerError};
use crate::store::KeyStore as _;
use crate::store::embedded::{EmbeddedStore, Options as StoreOptions};
use crate::store::groups::GroupItem;
use crate::store::seal::{Context, Sealer};
use crate::wire::event::{self, InboxEvent};
use crate::wire::stream::{self, Code, Envelope, GroupSend, ServerBatch, ServerFrame, server_frame::Frame};

const EDGE: EdgeId = EdgeId::from_bytes([0xed; 16]);

/// The way from the projector to the edge, on which pushes get lost.
struct Bus {
    service: Arc<GroupService>,
    random: Mutex<StdRng>,
    lossy: AtomicBool,
    /// Something was lost since the edge attached last.
    lost: AtomicBool,
}

#[async_trait]
impl PushBus for Bus {
    async fn push(&self, edge: EdgeId, batch: Vec<Push>) {
        assert_eq!(edge, EDGE);
        for push in batch {
            if self.lossy.load(Ordering::Relaxed) && self.random.lock().random_ratio(1, 25) {
                self.lost.store(true, Ordering::Relaxed);
                continue;
            }
            // An edge notices by what comes next.
            self.whole();
            match push {
                Push::GroupItem { group, item, roster } => self.service.deliver(vec![Arrived { group, item, roster }], &mut Vec::new()),
                other => self.service.pushed(other),
            }
        }
    }
    async fn broadcast(&self, _: Vec<Push>) {}
    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

impl Bus {
    fn whole(&self) {
        if self.lost.swap(false, Ordering::Relaxed) {
            self.service.cut_all();
        }
    }
}

/// A running projector.
struct Running {
    stop: watch::Sender<bool>,
    progress: watch::Receiver<Progress>,
    task: JoinHandle<Result<(), WorkerError>>,
}

pub(super) struct Server {
    log: Arc<EmbeddedLog>,
    pub(super) store: Arc<EmbeddedStore>,
    pub(super) service: Arc<GroupService>,
    bus: Arc<Bus>,
    clock: ManualClock,
    projector: Option<Running>,
    stop: watch::Sender<bool>,
    attachments: AtomicU64,
}

impl Server {
    pub(super) fn new(dir: &std::path::Path, clock: &ManualClock, seed: u64) -> Self {
        let mut options = LogOptions::new(dir.join("log"));
        options.segment_bytes = 8 << 20;
        let log = EmbeddedLog::open(options).expect("a log");
        let store = EmbeddedStore::open(&dir.join("store"), StoreOptions::default()).expect("a store");
        let service = Arc::new(GroupService::new(Parts {
            log: log.clone(),
            store: store.clone(),
            clock: Arc::new(clock.clone()),
            random: Arc::new(SystemRandom),
            edge: EDGE,
            messages_per_s: 0,
            changes_per_min: 0,
        }));
        let (stop, stops) = watch::channel(false);
        tokio::spawn(Arc::clone(&service).run(stops));
        let bus = Arc::new(Bus {
            service: Arc::clone(&service),
            random: Mutex::new(StdRng::seed_from_u64(!seed)),
            lossy: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        });
        let mut server = Self { log, store, service, bus, clock: clock.clone(), projector: None, stop, attachments: AtomicU64::new(1) };
        server.start();
        server
    }

    /// Starts the projector, if it does not run.
    pub(super) fn start(&mut self) {
        if self.projector.is_some() {
            return;
        }
        let (worker, progress) = worker::Worker::new(worker::Parts {
            log: self.log.clone(),
            groups: self.store.clone(),
            keys: self.store.clone(),
            bus: self.bus.clone(),
            clock: Arc::new(self.clock.clone()),
            random: Arc::new(SystemRandom),
            key: Some(Arc::new(ServerKey::derive(&[7; 32]))),
        });
        let (stop, stops) = watch::channel(false);
        self.projector = Some(Running { stop, progress, task: tokio::spawn(worker.run(stops)) });
    }

    /// Kills the projector in the middle of whatever it does.
    pub(super) async fn crash(&mut self) {
        if let Some(running) = self.projector.take() {
            running.task.abort();
            let _ = running.task.await;
        }
    }

    pub(super) fn break_down(&self) {
        self.bus.lossy.store(true, Ordering::Relaxed);
    }

    /// Everything works again.
    pub(super) fn heal(&mut self) {
        self.bus.lossy.store(false, Ordering::Relaxed);
        self.bus.whole();
        self.start();
    }

    pub(super) async fn stop(&mut self) {
        let running = self.projector.take().expect("it runs");
        running.stop.send_replace(true);
        running.task.await.expect("it ends").expect("it did not fail");
        self.stop.send_replace(true);
        self.log.close().await;
    }

    /// Until the projector has applied all that is on the log.
    pub(super) async fn applied(&mut self) {
        let mut end = 0;
        for partition in 0..self.log.partitions(Topic::Groups) {
            let tp = TopicPartition { topic: Topic::Groups, partition: Partition(partition) };
            end += self.log.bounds(tp).await.expect("bounds").1.0;
        }
        let running = self.projector.as_mut().expect("it runs");
        let applied = running.progress.wait_for(|progress| progress.caught_up && progress.met >= end);
        tokio::time::timeout(PATIENCE, applied).await.expect("the projector keeps up").expect("it runs");
    }

    /// Lets the other tasks go on for a bit.
    pub(super) async fn let_go(&self) {
        for _ in 0..8 {
            tokio::task::yield_now().await;
        }
    }

    /// A new stream of a device.
    pub(super) fn stream(&self, addr: DeviceAddr) -> Arc<Handle> {
        let attach = AttachId(self.attachments.fetch_add(1, Ordering::Relaxed));
        Arc::new(Handle::new(KnownDevice { addr, first_message_id: ClientMessageId(1) }, attach, 0))
    }

    /// What a session would write of groups to its client now.
    pub(super) fn frames(&self, handle: &Handle) -> Vec<ServerFrame> {
        let mut queue = GroupQueue::new();
        let taken = handle.take(&mut Flow::default(), &mut VecDeque::new(), false, &mut queue);
        let mut frames = Vec::new();
        if let Some(groups) = taken.groups {
            let lost = groups.lost.iter().filter(|group| !groups.heads.contains_key(*group));
            let at = |group: GroupId| self.service.at(group).filter(|_| handle.follows(group));
            let lost = lost.map(|&group| (group, at(group).unwrap_or(Where::refused(Code::Unavailable))));
            for (group, at) in groups.heads.iter().map(|(&group, &at)| (group, at)).chain(lost) {
                let group_id = Bytes::copy_from_slice(group.as_bytes());
                let head = stream::GroupHead { group_id, code: at.code.into(), seq: at.seq.0, epoch: at.epoch };
                frames.push(ServerFrame { frame: Some(Frame::GroupHead(head)) });
            }
        }
        let items = queue.into_iter().map(|(_, items)| items).collect::<Vec<Bytes>>().concat();
        frames.extend(ServerBatch::decode(items.as_slice()).expect("frames").frames);
        frames
    }

    /// Invitations in a device's inbox from this record on, and where they end.
    pub(super) async fn inbox(&self, device: DeviceAddr, from: Offset) -> (Offset, Vec<ServerFrame>) {
        let tp = self.log.route(&device.account).expect("a partition");
        let (mut next, mut frames) = (from, Vec::new());
        for record in self.log.read(tp, from, 8 << 20).await.expect("records") {
            next = record.offset.next();
            let InboxEvent::EnvelopesAccepted(accepted) = event::decode(&record.payload).expect("an event") else { continue };
            for envelope in accepted.envelopes.iter().filter(|one| accepted.recipient == device.account && one.device == device.device) {
                let key = self.store.seal_key(device.account, None).await.expect("read").expect("it was sealed");
                let context = Context { recipient: device, sender: accepted.sender, client_message_id: accepted.client_message_id };
                let mut content = BytesMut::new();
                Sealer::new(&key).open(&context, envelope.sealed, &mut content).expect("it opens");
                frames.push(ServerFrame {
                    frame: Some(Frame::Envelope(Envelope {
                        seq: Seq::at(Generation(0), record.offset).0,
                        sender_account: Bytes::copy_from_slice(accepted.sender.account.as_bytes()),
                        sender_device: u32::from(accepted.sender.device.get()),
                        r#type: u32::from(envelope.kind) as i32,
                        content: content.freeze(),
                        ..Envelope::default()
                    })),
                });
            }
        }
        (next, frames)
    }

    /// A message on its way.
    pub(super) fn send(&self, addr: DeviceAddr, send: GroupSend) -> JoinHandle<Code> {
        let service = Arc::clone(&self.service);
        let known = KnownDevice { addr, first_message_id: ClientMessageId(1) };
        tokio::spawn(async move {
            let sent = service.send_message(known, parse(send).expect("a message")).await;
            sent.as_ref().map_or_else(GroupError::code, |()| Code::Ok)
        })
    }
}

/// An item as a page carries it.
pub(super) fn wire(group: GroupId, item: &GroupItem) -> stream::GroupItem {
    stream::GroupItem {
        group_id: Bytes::copy_from_slice(group.as_bytes()),
        seq: item.seq.0,
        after: item.after.0,
        kind: item.kind as i32,
        epoch: item.epoch,
        sender_account: item.sender.map(|by| Bytes::copy_from_slice(by.account.as_bytes())).unwrap_or_default(),
        sender_device: item.sender.map_or(0, |by| u32::from(by.device.get())),
        client_message_id: item.client_message_id.0,
        accepted_ms: item.accepted.0,
        content: item.content.clone(),
    }
}
