//! The projector of groups over a real log and store, with members that speak real MLS.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use prost::Message as _;
use sealpost::client::core::groups::{Change, Engine, Error, Group, Outgoing, Received};
use sealpost::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use sealpost::clock::{Clock as _, ManualClock, SeededRandom, SystemClock, SystemRandom};
use sealpost::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, GroupId, Partition, Seq};
use sealpost::limits;
use sealpost::log::embedded::{EmbeddedLog, Options as LogOptions};
use sealpost::log::{AppendError, EventLog, Topic, TopicPartition};
use sealpost::mls::sender::{ServerKey, external_sender};
use sealpost::projector::groups::worker::{Looks, Parts, Worker};
use sealpost::projector::push::{GroupVerdict, Push, PushBus};
use sealpost::projector::worker::WorkerError;
use sealpost::store::KeyStore as _;
use sealpost::store::embedded::{EmbeddedStore, Options as StoreOptions};
use sealpost::store::groups::{GroupHead, GroupItem, GroupItemKind, GroupRoster, GroupStore as _};
use sealpost::store::seal::{Context, Sealer};
use sealpost::testing::PATIENCE;
use sealpost::wire::event::{self, InboxEvent, RequestId};
use sealpost::wire::group_event::{GroupEvent, GroupEventBody};
use sealpost::wire::stream::GroupInvitation;
use tokio::sync::watch;
use tokio::task::JoinHandle;

#[path = "groups_projector/device.rs"]
mod device;
#[path = "groups_projector/states.rs"]
mod states;

use device::Device;

const GROUP: GroupId = GroupId::from_bytes([0x6a; 16]);
const EDGE: EdgeId = EdgeId::from_bytes([0xed; 16]);

/// What the projector told the one edge.
#[derive(Default)]
struct Told {
    verdicts: Mutex<BTreeMap<u64, GroupVerdict>>,
    items: Mutex<BTreeMap<Seq, GroupItem>>,
    attached: Mutex<Vec<Option<(Seq, u64)>>>,
    news: tokio::sync::Notify,
}

#[async_trait]
impl PushBus for Told {
    async fn push(&self, edge: EdgeId, batch: Vec<Push>) {
        assert_eq!(edge, EDGE);
        for push in batch {
            match push {
                Push::GroupVerdict { request, verdict } => drop(self.verdicts.lock().insert(request.number, verdict)),
                Push::GroupItem { item, .. } => drop(self.items.lock().insert(item.seq, item)),
                Push::GroupAttached { at, .. } => self.attached.lock().push(at),
                other => panic!("not of groups: {other:?}"),
            }
        }
        self.news.notify_waiters();
    }
    async fn broadcast(&self, _: Vec<Push>) {}
    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// A worker: how to stop it, and what became of it.
type Running = (watch::Sender<bool>, JoinHandle<Result<(), WorkerError>>);

struct Rig {
    _dir: tempfile::TempDir,
    log: Arc<EmbeddedLog>,
    store: Arc<EmbeddedStore>,
    told: Arc<Told>,
    key: Arc<ServerKey>,
    clock: ManualClock,
    running: Option<Running>,
    looks: Looks,
    numbers: AtomicU64,
}

impl Rig {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let mut options = LogOptions::new(dir.path().join("log"));
        options.segment_bytes = 16 << 20;
        let log = EmbeddedLog::open(options)?;
        let store = EmbeddedStore::open(&dir.path().join("store"), StoreOptions::default())?;
        let mut rig = Self {
            _dir: dir,
            log,
            store,
            told: Arc::default(),
            key: Arc::new(ServerKey::derive(&[7; 32])),
            clock: ManualClock::new(SystemClock.now()),
            running: None,
            looks: Looks::default(),
            numbers: AtomicU64::new(1),
        };
        rig.start();
        Ok(rig)
    }

    fn parts(&self, store: &Arc<EmbeddedStore>) -> Parts {
        Parts {
            log: self.log.clone(),
            groups: store.clone(),
            keys: store.clone(),
            bus: self.told.clone(),
            clock: Arc::new(self.clock.clone()),
            random: Arc::new(SystemRandom),
            key: Some(self.key.clone()),
        }
    }

    fn start(&mut self) {
        let (worker, _) = Worker::new(self.parts(&self.store));
        let (stop, stops) = watch::channel(false);
        self.running = Some((stop, tokio::spawn(worker.looking(self.looks).run(stops))));
    }

    /// As a killed process: in the middle of whatever it did, its position not written.
    async fn crash(&mut self) {
        let (_stop, running) = self.running.take().expect("it runs");
        running.abort();
        let _ = running.await;
        self.start();
    }

    async fn stop(&mut self) -> Result<()> {
        let (stop, running) = self.running.take().context("it runs")?;
        stop.send_replace(true);
        Ok(running.await??)
    }

    async fn append(&self, body: GroupEventBody<'_>, reply_to: Option<RequestId>) -> Result<Seq> {
        let tp = TopicPartition { topic: Topic::Groups, partition: Partition::of_group(&GROUP, self.log.partitions(Topic::Groups)) };
        let event = GroupEvent { group: GROUP, at: self.clock.now(), reply_to, body };
        let offset = self.log.append(tp, event::encode(&event)).await?;
        Ok(Seq::at(sealpost::ids::Generation(0), offset))
    }

    /// Appends, and waits for the verdict.
    async fn submit(&self, body: GroupEventBody<'_>) -> Result<GroupVerdict> {
        let number = self.ask(body).await?;
        self.verdict(number).await
    }

    async fn ask(&self, body: GroupEventBody<'_>) -> Result<u64> {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        self.append(body, Some(RequestId { edge: EDGE, number })).await?;
        Ok(number)
    }

    async fn verdict(&self, number: u64) -> Result<GroupVerdict> {
        let wait = async {
            loop {
                if let Some(verdict) = self.told.verdicts.lock().get(&number).cloned() {
                    return verdict;
                }
                let _ = tokio::time::timeout(Duration::from_millis(20), self.told.news.notified()).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.context("no verdict")
    }

    async fn items(&self) -> Result<Vec<GroupItem>> {
        Ok(self.store.group_items(GROUP, Seq::ZERO, usize::MAX, usize::MAX).await?)
    }

    async fn head(&self) -> Result<GroupHead> {
        self.store.group(GROUP).await?.context("the group is there")
    }

    /// Waits until the group is as wanted.
    async fn until(&self, what: &str, mut is: impl FnMut(&GroupHead, &[GroupItem]) -> bool) -> Result<()> {
        let wait = async {
            loop {
                if is(&self.head().await?, &self.items().await?) {
                    return anyhow::Ok(());
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(PATIENCE, wait).await.with_context(|| what.to_owned())?
    }

    /// Everything that a view holds of the group.
    async fn view(store: &EmbeddedStore, accounts: &[AccountId]) -> Result<View> {
        let head = store.group(GROUP).await?;
        let epoch = head.as_ref().map_or(0, |head| head.snapshot_epoch);
        let mut members = Vec::new();
        for account in accounts {
            members.push(store.groups_of(*account, None, 10).await?);
        }
        let mut trees = Vec::new();
        for epoch in 0..=epoch {
            trees.push(store.group_tree(GROUP, epoch).await?.map(|tree| tree.to_vec()));
        }
        Ok(View {
            head,
            roster: store.group_roster(GROUP).await?,
            info: store.group_info(GROUP).await?.map(|info| info.to_vec()),
            snapshot: store.group_snapshot(GROUP, epoch).await?.map(|snapshot| snapshot.to_vec()),
            items: store.group_items(GROUP, Seq::ZERO, usize::MAX, usize::MAX).await?,
            members,
            trees,
        })
    }

    /// G-REBUILD: the log alone gives the same view. Stops the projector.
    async fn check_rebuild(&mut self, accounts: &[AccountId]) -> Result<()> {
        self.stop().await?;
        let dir = tempfile::tempdir()?;
        let fresh = EmbeddedStore::open(dir.path(), StoreOptions::default())?;
        let before = Self::view(&self.store, accounts).await?;
        let (worker, _) = Worker::new(self.parts(&fresh));
        worker.shadow().catch_up().await?;
        assert_eq!(Self::view(&fresh, accounts).await?, before, "a rebuilt view differs");
        Ok(())
    }

    /// The invitations that stand in an account's partition of the log.
    async fn invitations(&self, device: DeviceAddr) -> Result<Vec<GroupInvitation>> {
        let key = self.store.seal_key(device.account, None).await?.context("its key is there")?;
        let sealer = Sealer::new(&key);
        let mut found = Vec::new();
        for record in self.log.read(self.log.route(&device.account)?, sealpost::ids::Offset(0), 64 << 20).await? {
            if let InboxEvent::EnvelopesAccepted(accepted) = event::decode(&record.payload)? {
                if accepted.recipient != device.account {
                    continue;
                }
                assert_eq!(accepted.client_message_id, ClientMessageId(0));
                for envelope in accepted.envelopes.iter().filter(|envelope| envelope.device == device.device) {
                    let context = Context { recipient: device, sender: accepted.sender, client_message_id: ClientMessageId(0) };
                    let mut content = bytes::BytesMut::new();
                    sealer.open(&context, envelope.sealed, &mut content)?;
                    assert_eq!(envelope.kind, 16);
                    found.push(GroupInvitation::decode(content.freeze())?);
                }
            }
        }
        Ok(found)
    }
}

#[derive(Debug, Clone, PartialEq)]
struct View {
    head: Option<GroupHead>,
    roster: Option<GroupRoster>,
    info: Option<Vec<u8>>,
    snapshot: Option<Vec<u8>>,
    items: Vec<GroupItem>,
    members: Vec<Vec<GroupId>>,
    trees: Vec<Option<Vec<u8>>>,
}

fn account(byte: u8) -> AccountId {
    AccountId::from_bytes([byte; 16])
}

/// The first creates the group and adds the others.
async fn group_of(rig: &Rig, count: u8) -> Result<Vec<Device>> {
    let mut devices: Vec<Device> = (1..=count).map(Device::new).collect();
    assert!(matches!(devices[0].create(rig).await?, GroupVerdict::Done { epoch: 0, .. }));
    if count > 1 {
        let packages: Vec<(DeviceAddr, Vec<u8>)> = devices[1..].iter_mut().map(|device| (device.address, device.key_package())).collect();
        let add = packages.iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
        let verdict = devices[0].commit(rig, &Change { add, ..Change::default() }).await?;
        assert!(matches!(verdict, GroupVerdict::Done { epoch: 1, .. }), "{verdict:?}");
        for device in &mut devices[1..] {
            device.join(rig).await?;
        }
    }
    Ok(devices)
}

fn accounts(devices: &[Device]) -> Vec<AccountId> {
    devices.iter().map(|device| device.address.account).collect()
}

fn is_done(verdict: &GroupVerdict) -> bool {
    matches!(verdict, GroupVerdict::Done { .. })
}

#[tokio::test]
async fn a_group_from_its_creation_to_its_end() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 4).await?;
    rig.append(GroupEventBody::EdgeAttached { edge: EDGE }, None).await?;
    for (n, device) in devices.iter_mut().enumerate() {
        assert!(is_done(&device.write(&rig, &[n as u8]).await?));
    }
    for (n, device) in devices.iter_mut().enumerate() {
        let read = device.catch_up(&rig).await?;
        assert_eq!(read.len(), 3, "{n} reads what the others wrote");
    }
    // Each item names the one before it, and what was pushed is what can be read.
    let items = rig.items().await?;
    assert!(items.windows(2).all(|pair| pair[1].after == pair[0].seq) && items[0].after == Seq::ZERO);
    let pushed: Vec<GroupItem> = rig.told.items.lock().values().cloned().collect();
    assert_eq!(pushed, items[2..]);
    assert_eq!(rig.told.attached.lock().as_slice(), [Some((items[1].seq, 1))]);
    // A repeat of an id is delivered once; one too far behind is refused.
    assert!(is_done(&devices[0].write_as(&rig, 1, b"again").await?));
    assert_eq!(rig.items().await?.len(), items.len());
    assert!(is_done(&devices[0].write_as(&rig, 1_000, b"far ahead").await?));
    assert!(matches!(devices[0].write_as(&rig, 2, b"behind").await?, GroupVerdict::Denied(_)));
    // Somebody leaves: a proposal, which the next commit takes up.
    let leave = devices[3].in_group(|group, engine| group.leave(engine))?;
    let body = || GroupEventBody::Proposal { by: devices[3].address, proposal: &leave };
    let first = rig.submit(body()).await?;
    assert!(is_done(&first));
    assert_eq!(rig.submit(body()).await?, first, "said twice it is the same");
    assert!(is_done(&devices[1].commit(&rig, &Change::default()).await?));
    assert_eq!(rig.store.group_roster(GROUP).await?.context("a roster")?.devices.len(), 3);
    let late =
        GroupEventBody::Message { by: devices[3].address, client_message_id: ClientMessageId(99), epoch: 2, content: b"still here?" };
    assert!(matches!(rig.submit(late).await?, GroupVerdict::Denied(_)));
    assert_eq!(rig.store.groups_of(account(4), None, 10).await?, []);
    // The owner closes it.
    assert!(matches!(rig.submit(GroupEventBody::Closed { by: devices[1].address }).await?, GroupVerdict::Denied(_)));
    assert!(is_done(&rig.submit(GroupEventBody::Closed { by: devices[0].address }).await?));
    assert_eq!(devices[0].write(&rig, b"after the end").await?, GroupVerdict::NotFound);
    assert!(rig.head().await?.closed);
    rig.check_rebuild(&accounts(&devices)).await
}

#[tokio::test]
async fn one_commit_wins_an_epoch_and_the_others_learn_where_the_group_is() -> Result<()> {
    const MEMBERS: u8 = 50;
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, MEMBERS).await?;
    for round in 0..3u64 {
        let mut sent = Vec::new();
        for device in &mut devices {
            device.catch_up(&rig).await?;
            sent.push(device.change(&Change::default())?);
        }
        let mut asked = Vec::new();
        for (device, sent) in devices.iter().zip(&sent) {
            asked.push(rig.ask(device.commit_body(sent)).await?);
        }
        let mut won = Vec::new();
        for (n, number) in asked.into_iter().enumerate() {
            match rig.verdict(number).await? {
                GroupVerdict::Done { seq, epoch } => won.push((n, seq, epoch)),
                GroupVerdict::Conflict { epoch, head } => assert_eq!((epoch, head), (won[0].2, won[0].1), "the winner's"),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(won.len(), 1);
        let (winner, seq, epoch) = won[0];
        assert_eq!(epoch, round + 2);
        // Its verdict got lost, and it asks again.
        let again = rig.submit(devices[winner].commit_body(&sent[winner])).await?;
        assert_eq!(again, GroupVerdict::Done { seq, epoch });
        for device in &mut devices {
            device.catch_up(&rig).await?;
        }
        let view = devices[0].view();
        assert!(view.0 == epoch && devices.iter_mut().all(|device| device.view() == view), "all agree");
    }
    rig.check_rebuild(&accounts(&devices)).await
}

#[tokio::test]
async fn what_is_refused_and_how() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 3).await?;
    let [by, other] = [devices[1].address, devices[2].address];
    let items = rig.items().await?.len();
    // A group that nobody made, and one that is there.
    let mut stranger = Device::new(9);
    let created = stranger.run(|engine| Ok(engine.create(GROUP, "Fremd", None, SystemClock.now())?.1))?;
    let create = |by| GroupEventBody::Created { by, group_info: &created.group_info, tree: &created.tree };
    assert_eq!(rig.submit(create(stranger.address)).await?, GroupVerdict::Exists);
    let sent = devices[1].change(&Change::default())?;
    let invalid = |verdict: GroupVerdict| assert!(matches!(verdict, GroupVerdict::Invalid(_)), "{verdict:?}");
    let denied = |verdict: GroupVerdict| assert!(matches!(verdict, GroupVerdict::Denied(_)), "{verdict:?}");
    let body = |by, commit, welcome, group_info| GroupEventBody::Commit { by, commit, welcome, group_info };
    // Somebody else's commit, a changed one, one that is none, too much.
    denied(rig.submit(body(other, &sent.commit, None, &sent.group_info)).await?);
    let mut forged = sent.commit.clone();
    forged[60] ^= 1;
    invalid(rig.submit(body(by, &forged, None, &sent.group_info)).await?);
    invalid(rig.submit(body(by, b"commit", None, &sent.group_info)).await?);
    let large = vec![0; limits::COMMIT_BYTES + 1];
    invalid(rig.submit(body(by, &large, None, &sent.group_info)).await?);
    invalid(rig.submit(body(by, &sent.commit, None, &large)).await?);
    // The GroupInfo of another epoch or group.
    let info = rig.store.group_info(GROUP).await?.context("it is there")?;
    invalid(rig.submit(body(by, &sent.commit, None, &info)).await?);
    invalid(rig.submit(body(by, &sent.commit, None, &created.group_info)).await?);
    // A Welcome for nobody.
    let mut new = [Device::new(4), Device::new(5)];
    let packages = new.each_mut().map(|device| (device.address, device.key_package()));
    let add = |range: std::ops::Range<usize>| packages[range].iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
    let both = devices[0].change(&Change { add: add(0..2), ..Change::default() })?;
    devices[0].in_group(|group, engine| group.refused(engine))?;
    let one = devices[0].change(&Change { add: add(0..1), ..Change::default() })?;
    let owner = devices[0].address;
    invalid(rig.submit(body(by, &sent.commit, one.welcome.as_deref(), &sent.group_info)).await?);
    invalid(rig.submit(body(owner, &one.commit, None, &one.group_info)).await?);
    invalid(rig.submit(body(owner, &one.commit, both.welcome.as_deref(), &one.group_info)).await?);
    invalid(rig.submit(body(owner, &both.commit, one.welcome.as_deref(), &both.group_info)).await?);
    invalid(rig.submit(body(owner, &one.commit, Some(b"welcome"), &one.group_info)).await?);
    // Who is not in it: by external commit, and in writing.
    let tree = rig.store.group_tree(GROUP, 1).await?.context("it is there")?;
    let joins = stranger.run(|engine| Ok(engine.rejoin(&info, &tree)?.1))?;
    denied(rig.submit(body(stranger.address, &joins.commit, None, &joins.group_info)).await?);
    let message = |by, epoch, content| GroupEventBody::Message { by, client_message_id: ClientMessageId(1), epoch, content };
    denied(rig.submit(message(stranger.address, 1, b"x")).await?);
    let large = vec![0; limits::ENVELOPE_BYTES + 1];
    invalid(rig.submit(message(by, 1, &large)).await?);
    assert!(matches!(rig.submit(message(by, 2, b"x")).await?, GroupVerdict::Conflict { epoch: 1, .. }), "not begun");
    // Nobody proposes for others.
    let leave = devices[2].in_group(|group, engine| group.leave(engine))?;
    denied(rig.submit(GroupEventBody::Proposal { by, proposal: &leave }).await?);
    invalid(rig.submit(GroupEventBody::Proposal { by, proposal: &sent.commit }).await?);
    // None of it left a trace; then somebody is first.
    assert_eq!((rig.items().await?.len(), rig.head().await?.epoch), (items, 1));
    assert!(is_done(&rig.submit(body(by, &sent.commit, None, &sent.group_info)).await?));
    assert!(matches!(
        rig.submit(body(owner, &one.commit, one.welcome.as_deref(), &one.group_info)).await?,
        GroupVerdict::Conflict { epoch: 2, .. }
    ));
    assert!(matches!(rig.submit(GroupEventBody::Proposal { by: other, proposal: &leave }).await?, GroupVerdict::Conflict { epoch: 2, .. }));
    rig.check_rebuild(&accounts(&devices)).await
}

#[tokio::test]
async fn groups_of_other_servers_and_crowds_are_not_made() -> Result<()> {
    let rig = Rig::new()?;
    let mut device = Device::new(1);
    let foreign = ServerKey::derive(&[9; 32]);
    let server = Some(external_sender(&foreign.public()));
    let created = device.run(|engine| Ok(engine.create(GROUP, "Berge", server, SystemClock.now())?.1))?;
    let body = |by, info, tree| GroupEventBody::Created { by, group_info: info, tree };
    assert!(matches!(rig.submit(body(device.address, &created.group_info, &created.tree)).await?, GroupVerdict::Denied(_)));
    let mut device = Device::new(2);
    let created = device.run(|engine| Ok(engine.create(GROUP, "Berge", None, SystemClock.now())?.1))?;
    let other = Device::new(3).address;
    assert!(matches!(rig.submit(body(other, &created.group_info, &created.tree)).await?, GroupVerdict::Denied(_)));
    assert!(matches!(rig.submit(body(device.address, &created.group_info, b"tree")).await?, GroupVerdict::Invalid(_)));
    assert_eq!(rig.submit(GroupEventBody::Closed { by: other }).await?, GroupVerdict::NotFound);
    let good = rig.submit(body(device.address, &created.group_info, &created.tree)).await?;
    assert!(is_done(&good));
    assert_eq!(rig.submit(body(device.address, &created.group_info, &created.tree)).await?, good, "it asks again");
    assert_eq!(rig.submit(body(other, &created.group_info, &created.tree)).await?, GroupVerdict::Exists);
    Ok(())
}

#[tokio::test]
async fn the_server_proposes_to_remove_who_is_gone_until_somebody_does_it() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 5).await?;
    let gone: Vec<DeviceAddr> = devices[3..].iter().map(|device| device.address).collect();
    let proposals = |items: &[GroupItem], epoch| {
        items.iter().filter(|item| item.kind == GroupItemKind::Proposal && item.sender.is_none() && item.epoch == epoch).count()
    };
    rig.append(GroupEventBody::DevicesGone { devices: gone.clone() }, None).await?;
    rig.until("both are proposed", |_, items| proposals(items, 1) == 2).await?;
    // Somebody is faster and does not take them up: they are proposed again. A crash in between changes nothing.
    let sent = devices[1].change(&Change::default())?;
    rig.crash().await;
    assert!(is_done(&rig.submit(devices[1].commit_body(&sent)).await?));
    devices[1].in_group(|group, engine| group.accepted(engine).map(drop))?;
    rig.until("both are proposed again", |_, items| proposals(items, 2) == 2).await?;
    assert_eq!(rig.head().await?.gone, gone);
    rig.crash().await;
    // The next one does.
    let verdict = devices[2].commit(&rig, &Change::default()).await?;
    assert!(is_done(&verdict), "{verdict:?}");
    assert!(rig.head().await?.gone.is_empty());
    assert_eq!(rig.store.group_roster(GROUP).await?.context("a roster")?.devices.len(), 3);
    rig.append(GroupEventBody::DevicesGone { devices: gone }, None).await?;
    assert!(is_done(&devices[2].write(&rig, b"done").await?));
    assert_eq!(proposals(&rig.items().await?, 3), 0, "said again it is nothing");
    rig.check_rebuild(&accounts(&devices)).await
}

#[tokio::test]
async fn a_deleted_account_that_was_just_added_goes_again() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 2).await?;
    let mut new = Device::new(7);
    let package = new.key_package();
    rig.store.seal_key(new.address.account, Some(sealpost::store::seal::SealKey::random(&SystemRandom))).await?;
    rig.store.destroy_seal_key(new.address.account).await?;
    assert!(is_done(&devices[0].commit(&rig, &Change { add: vec![(new.address, &package)], ..Change::default() }).await?));
    rig.until("it is proposed", |head, items| head.gone == [new.address] && items.last().is_some_and(|item| item.sender.is_none())).await?;
    rig.check_rebuild(&accounts(&devices)).await
}

/// By the record's time, and with as much left as the record is kept: a replay within that time comes to the same verdict.
#[tokio::test]
async fn a_key_package_that_would_expire_while_its_commit_is_kept_is_not_added() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 2).await?;
    let mut new = Device::new(7);
    let package = new.key_package();
    rig.clock.advance((limits::KEY_PACKAGE_LIFETIME_S - limits::KEY_PACKAGE_LEFT_S + 60) * 1000);
    let add = Change { add: vec![(new.address, &package)], ..Change::default() };
    assert!(matches!(devices[0].commit(&rig, &add).await?, GroupVerdict::Invalid(why) if why.contains("lifetime")));
    assert!(is_done(&devices[0].commit(&rig, &Change::default()).await?));
    let later = Rig::new()?;
    later.clock.advance((limits::KEY_PACKAGE_LIFETIME_S - limits::KEY_PACKAGE_LEFT_S + 60) * 1000);
    assert!(matches!(Device::new(8).create(&later).await?, GroupVerdict::Invalid(_)), "the creator's leaf likewise");
    rig.check_rebuild(&accounts(&devices)).await
}

#[tokio::test]
async fn expired_items_go_and_the_group_goes_on() -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 2).await?;
    let GroupVerdict::Done { seq, .. } = devices[0].write(&rig, b"old").await? else { panic!("accepted") };
    rig.append(GroupEventBody::Expired { to: seq }, None).await?;
    assert!(is_done(&devices[0].write(&rig, b"new").await?));
    assert_eq!((rig.items().await?.len(), rig.head().await?.expired_to), (1, seq));
    // Its public state does not hang on the items.
    rig.crash().await;
    devices[1].cursor = seq;
    assert!(is_done(&devices[1].commit(&rig, &Change::default()).await?));
    rig.check_rebuild(&accounts(&devices)).await
}

/// Random changes by real members, a projector that dies at random, and a message that is sent again whenever its verdict is missing.
#[tokio::test]
async fn crashes_change_nothing() -> Result<()> {
    for seed in 0..6u64 {
        storm(seed).await.with_context(|| format!("seed {seed}"))?;
    }
    Ok(())
}

async fn storm(seed: u64) -> Result<()> {
    let mut rig = Rig::new()?;
    let mut devices = group_of(&rig, 4).await?;
    rig.append(GroupEventBody::EdgeAttached { edge: EDGE }, None).await?;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1;
    let mut roll = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut epochs = rig.head().await?.epoch;
    let mut written = 0;
    for _ in 0..40 {
        let who = roll(4) as usize;
        devices[who].catch_up(&rig).await?;
        let crashes = roll(3) == 0;
        match roll(3) {
            0 => {
                let sent = devices[who].change(&Change::default())?;
                rig.ask(devices[who].commit_body(&sent)).await?;
                if crashes {
                    tokio::time::sleep(Duration::from_millis(roll(8))).await;
                    rig.crash().await;
                }
                // Whatever became of the first, asking again is safe.
                let verdict = rig.submit(devices[who].commit_body(&sent)).await?;
                assert!(is_done(&verdict), "nobody else commits: {verdict:?}");
                epochs += 1;
                devices[who].catch_up(&rig).await?;
            }
            _ => {
                devices[who].counter += 1;
                written += 1;
                let (epoch, id) = (devices[who].view().0, ClientMessageId(devices[who].counter));
                let content = devices[who].in_group(|group, engine| group.encrypt(engine, b"text"))?;
                let body = || GroupEventBody::Message { by: devices[who].address, client_message_id: id, epoch, content: &content };
                rig.ask(body()).await?;
                if crashes {
                    tokio::time::sleep(Duration::from_millis(roll(8))).await;
                    rig.crash().await;
                }
                assert!(is_done(&rig.submit(body()).await?));
            }
        }
    }
    for device in &mut devices {
        device.catch_up(&rig).await?;
    }
    let view = devices[0].view();
    assert!(view.0 == epochs && devices.iter_mut().all(|device| device.view() == view), "all agree");
    let items = rig.items().await?;
    assert_eq!(items.iter().filter(|item| item.kind == GroupItemKind::Message).count(), written, "each once");
    assert!(items.windows(2).all(|pair| pair[1].after == pair[0].seq));
    // G-EPOCH: one commit an epoch.
    let commits: Vec<u64> = items.iter().filter(|item| item.kind == GroupItemKind::Commit).map(|item| item.epoch).collect();
    assert!(commits.iter().copied().eq(0..epochs));
    rig.check_rebuild(&accounts(&devices)).await
}
