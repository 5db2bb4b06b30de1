//! kill -9 of a broker in a storm of commits and messages: all members see the same group, and each message once (G-EPOCH, G-DURABLE,
//! G-IDEMPOTENT, G-ONCE). `SEALPOST_TEST_KILL_ROUNDS` sets how often it is killed, `SEALPOST_TEST_SEED` when and what members do.

#[path = "support/member.rs"]
mod member;
#[path = "support/sdk.rs"]
mod sdk;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use member::Member;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use reqwest::StatusCode;
use sealpost::client::core::groups::Change;
use sealpost::client::{Client, ConversationId, Error, Event, GroupState, Membership, Message, Status, StoreError, dev_token};
use sealpost::clock::SystemRandom;
use sealpost::ids::{AccountId, GroupId, Seq};
use sealpost::server::cql_options;
use sealpost::store::cql::CqlStore;
use sealpost::store::embedded::{EmbeddedStore, Options as StoreOptions};
use sealpost::store::groups::{GroupItem, GroupItemKind, GroupStore};
use sealpost::testing::cluster::TestCluster;
use sealpost::testing::{RawDevice, process};

const MEMBERS: usize = 4;
/// Devices of the SDK that stay in the group: an owner, an admin and others.
const STAYING: usize = 6;
/// Those that are added and removed all the time.
const GUESTS: usize = 2;
/// What must come has come by then; a message whose place was lost in a race is sent again after a minute.
const PATIENCE: Duration = Duration::from_secs(180);

fn seed() -> u64 {
    let seed = std::env::var("SEALPOST_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| rand::rng().random());
    println!("SEALPOST_TEST_SEED={seed}");
    seed
}

fn rounds(default: u32) -> u32 {
    std::env::var("SEALPOST_TEST_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

struct Storm {
    member: Member,
    /// What it was told was accepted.
    sent: Vec<Vec<u8>>,
    read: Vec<Vec<u8>>,
    commits: (usize, usize),
}

async fn storm(mut storm: Storm, number: usize, mut random: StdRng, stop: Arc<AtomicBool>) -> Storm {
    while !stop.load(Ordering::Relaxed) {
        let caught = storm.member.catch_up(20).await;
        storm.read.extend(caught);
        if random.random_ratio(1, 4) {
            let outgoing = storm.member.change(&Change::default());
            // Either way the items say what became of it.
            match storm.member.submit(&outgoing).await.0 {
                StatusCode::OK => storm.commits.0 += 1,
                StatusCode::CONFLICT => storm.commits.1 += 1,
                other => panic!("a commit was answered {other}"),
            }
        } else {
            let text = format!("{number}: {}", storm.sent.len()).into_bytes();
            let mut send = storm.member.next_send(&text);
            loop {
                let (status, answer) = storm.member.post(&send).await;
                if status == StatusCode::OK {
                    break;
                }
                // Of an epoch that is long over, or that the edge has not heard of yet: under the same id, nothing was accepted.
                assert_eq!(status, StatusCode::CONFLICT, "{answer}");
                let caught = storm.member.catch_up(20).await;
                storm.read.extend(caught);
                (send.epoch, send.content) = storm.member.encrypt(&text);
            }
            storm.sent.push(text);
        }
    }
    storm
}

#[tokio::test(flavor = "multi_thread")]
async fn members_see_the_same_group_over_random_kills() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let mut broker = process::start(program, folder.path()).await.expect("the broker starts");
    let url = broker.url().to_string().trim_end_matches('/').to_owned();
    let group = GroupId::random(&SystemRandom);
    let mut members = Vec::new();
    for n in 0..MEMBERS {
        let device = RawDevice::register(&url, &format!("member{n}@socialink")).await.expect("registers");
        members.push(Member::new(device, group));
    }
    let (owner, others) = members.split_first_mut().expect("somebody");
    owner.create().await;
    owner.add(others).await;
    for other in others {
        other.join().await;
    }

    let (seed, stop) = (seed(), Arc::new(AtomicBool::new(false)));
    let storms: Vec<_> = members
        .into_iter()
        .enumerate()
        .map(|(number, mut member)| {
            member.patient = true;
            let begun = Storm { member, sent: Vec::new(), read: Vec::new(), commits: (0, 0) };
            tokio::spawn(storm(begun, number, StdRng::seed_from_u64(seed + number as u64), Arc::clone(&stop)))
        })
        .collect();
    let mut random = StdRng::seed_from_u64(seed ^ 1);
    let rounds = rounds(6);
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(random.random_range(200..1_500))).await;
        broker.restart().await.expect("starts again");
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut ended = Vec::new();
    for storm in storms {
        ended.push(storm.await.expect("no member gave up"));
    }
    // A message is in its place a moment after it is durable.
    let all: BTreeSet<Vec<u8>> = ended.iter().flat_map(|storm| storm.sent.clone()).collect();
    for storm in &mut ended {
        let own: BTreeSet<_> = storm.sent.iter().cloned().collect();
        let wanted: BTreeSet<_> = all.difference(&own).cloned().collect();
        for _ in 0..200 {
            let caught = storm.member.catch_up(50).await;
            storm.read.extend(caught);
            if storm.read.len() >= wanted.len() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let read: BTreeSet<_> = storm.read.iter().cloned().collect();
        assert_eq!(read.len(), storm.read.len(), "each once");
        assert_eq!(read, wanted, "all that was accepted, and nothing else");
    }
    let views: BTreeSet<_> = ended.iter_mut().map(|storm| storm.member.view()).collect();
    assert_eq!(views.len(), 1, "one group: {views:?}");
    let (won, lost) = ended.iter().fold((0, 0), |sum, storm| (sum.0 + storm.commits.0, sum.1 + storm.commits.1));
    let epoch = views.first().expect("one").0;
    println!("{} messages, {won} commits taken, {lost} refused, epoch {epoch}, {rounds} kills", all.len());
    assert_eq!(epoch, 1 + won as u64, "each accepted commit began one epoch");
}

/// A device of the SDK, and what it was told is kept and will be sent.
struct Device {
    client: Client,
    number: usize,
    group: GroupId,
    sent: Vec<String>,
    changes: usize,
}

impl Device {
    /// Writes, and changes the group at the same time.
    async fn storm(mut self, guests: Vec<AccountId>, mut random: StdRng, stop: Arc<AtomicBool>) -> Self {
        let mut pauses = StdRng::seed_from_u64(random.random());
        let writing = async {
            let mut sent = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let text = format!("{}: {}", self.number, sent.len());
                match self.client.send_text(self.group, &text).await {
                    Ok(_) => sent.push(text),
                    Err(error) => assert!(self.may_fail(&error), "device {}: {error}", self.number),
                }
                tokio::time::sleep(Duration::from_millis(pauses.random_range(5..80))).await;
            }
            sent
        };
        let changing = async {
            let (client, group, admin, mut changes) = (&self.client, self.group, self.number < 2, 0);
            while !stop.load(Ordering::Relaxed) {
                let guest = [guests[random.random_range(0..guests.len())]];
                let done = match random.random_range(0..8) {
                    0 if admin => client.rename_group(group, &format!("Sturm {}.{changes}", self.number)).await,
                    1 | 2 if admin => client.invite(group, &guest).await.map(drop),
                    3 if admin => client.remove_from_group(group, &guest).await,
                    0..5 => client.renew_group_keys(group).await,
                    _ => Ok(()),
                };
                match done {
                    Ok(()) => changes += 1,
                    Err(error) => assert!(self.may_fail(&error), "device {}: {error}", self.number),
                }
                tokio::time::sleep(Duration::from_millis(random.random_range(5..80))).await;
            }
            changes
        };
        (self.sent, self.changes) = tokio::join!(writing, changing);
        self
    }

    /// The server may be away for longer than a change waits, and a guest may be out just now.
    fn may_fail(&self, error: &Error) -> bool {
        match error {
            Error::Api(error) => error.is_transient() || self.number >= STAYING,
            Error::Store(StoreError::Groups(_)) => self.number >= STAYING,
            _ => false,
        }
    }

    async fn history(&self) -> Vec<Message> {
        self.client.history(ConversationId::Group(self.group), u64::MAX, 1_000_000).await.expect("history")
    }

    /// Texts by their place in the group, and how many of its own still have none.
    async fn texts(&self) -> (BTreeMap<u64, (AccountId, String)>, usize) {
        let (mut texts, mut unplaced) = (BTreeMap::new(), 0);
        for message in self.history().await {
            let text = (message.author, message.body.expect("nobody deletes"));
            match message.group_seq {
                Some(seq) => assert!(texts.insert(seq, text).is_none(), "two at one place"),
                None => unplaced += usize::from(message.status != Status::Failed),
            }
        }
        (texts, unplaced)
    }

    async fn state(&self) -> Option<GroupState> {
        self.client.group_state(self.group).await.ok()
    }

    async fn membership(&self) -> Option<Membership> {
        let groups = self.client.groups().await.expect("list");
        groups.into_iter().find(|one| one.group == self.group).map(|one| one.membership)
    }

    async fn events(&self) -> Vec<Event> {
        self.client.events_after(0, 1_000_000).await.expect("events").into_iter().map(|(_, event)| event).collect()
    }

    /// Each message that came has one event, and nothing else happened to the group than what was done in it.
    async fn check_events(&self) {
        let (mut shown, mut undecryptable) = (Vec::new(), 0);
        for event in self.events().await {
            match event {
                Event::Message { message_id, .. } => shown.push(message_id),
                Event::GroupRejoined { .. } => panic!("device {} lost touch with the group", self.number),
                Event::GroupUndecryptable { .. } => undecryptable += 1,
                _ => {}
            }
        }
        assert_eq!(undecryptable, 0, "device {}", self.number);
        let came: BTreeSet<_> = self.history().await.into_iter().filter(|message| !message.outgoing).map(|one| one.message_id).collect();
        assert_eq!((shown.len(), shown.into_iter().collect::<BTreeSet<_>>()), (came.len(), came), "each is shown once");
    }
}

async fn until(what: &str, mut check: impl AsyncFnMut() -> Result<(), String>) {
    let begun = Instant::now();
    while let Err(why) = check().await {
        assert!(begun.elapsed() < PATIENCE, "waited in vain until {what}: {why}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A call that may meet a broker that has only just come back.
async fn done<T>(mut call: impl AsyncFnMut() -> Result<T, Error>) {
    until("it is done", async || call().await.map(drop).map_err(|error| error.to_string())).await;
}

/// All of them are at one epoch with the same keys, and everything of their own has its place.
async fn agree(devices: &[Device]) {
    until("all have the same group and messages", async || {
        let mut seen = BTreeMap::new();
        for device in devices {
            let Some(state) = device.state().await else {
                return Err(format!("device {} is not in it: {:?}", device.number, device.membership().await));
            };
            let (texts, unplaced) = device.texts().await;
            if unplaced > 0 {
                return Err(format!("device {}: {unplaced} of its own have no place", device.number));
            }
            let texts = if device.number < STAYING { texts.len() } else { 0 };
            seen.insert(device.number, (state.epoch, state.tree_hash, state.fingerprint, texts));
        }
        let staying: BTreeSet<_> = seen.iter().filter(|(number, _)| **number < STAYING).map(|(_, seen)| seen).collect();
        let keys: BTreeSet<_> = seen.values().map(|(epoch, tree, fingerprint, _)| (epoch, tree, fingerprint)).collect();
        if staying.len() == 1 && keys.len() == 1 { Ok(()) } else { Err(format!("{seen:?}")) }
    })
    .await;
}

/// When a guest was in the group: from the item that added it, in which epoch, to the one that removed it.
struct Stay {
    from: Seq,
    epoch: u64,
    to: Option<Seq>,
}

/// From what the owner was told of the group; each commit's item is known by the epoch that it ended.
fn stays(guest: AccountId, told: &[Event], commits: &BTreeMap<u64, Seq>) -> Vec<Stay> {
    let mut stays: Vec<Stay> = Vec::new();
    for event in told {
        let Event::GroupChanged { epoch, added, removed, .. } = event else { continue };
        let at = commits[&(epoch - 1)];
        if added.contains(&guest) {
            stays.push(Stay { from: at, epoch: *epoch, to: None });
        } else if removed.contains(&guest) {
            stays.last_mut().expect("it was in").to = Some(at);
        }
    }
    stays
}

/// A guest has read what was written while it was in: the beginning of each stay, since nothing is served to who is out; and all of the last.
fn check_guest(read: &BTreeMap<u64, (AccountId, String)>, stays: &[Stay], items: &[GroupItem]) {
    let mut rest: BTreeSet<u64> = read.keys().copied().collect();
    for (at, stay) in stays.iter().enumerate() {
        let during = |item: &&GroupItem| item.seq > stay.from && stay.to.is_none_or(|to| item.seq < to);
        let readable = items.iter().filter(during).filter(|item| item.kind == GroupItemKind::Message && item.epoch >= stay.epoch);
        let readable: Vec<u64> = readable.map(|item| item.seq.0).collect();
        let got = readable.iter().take_while(|seq| rest.remove(seq)).count();
        assert!(at + 1 < stays.len() || got == readable.len(), "all of the last stay: {got} of {}", readable.len());
    }
    assert!(rest.is_empty(), "read what it was not to, or with a hole: {rest:?}");
}

/// What the broker that has stopped left of a group, in the store of either profile.
async fn stored_items(folder: &Path, data: &Path, group: GroupId) -> Vec<GroupItem> {
    let store: Arc<dyn GroupStore> = match TestCluster::of_folder(folder).await.expect("a cluster") {
        Some(cluster) => CqlStore::open(cql_options(&cluster.cql)).await.expect("the store opens"),
        None => EmbeddedStore::open(&data.join("store"), StoreOptions::default()).expect("the store opens"),
    };
    let mut items: Vec<GroupItem> = Vec::new();
    loop {
        let after = items.last().map_or(Seq::ZERO, |item| item.seq);
        let page = store.group_items(group, after, 1_000, 16 << 20).await.expect("items");
        if page.is_empty() {
            return items;
        }
        items.extend(page);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_of_the_sdk_see_the_same_group_over_random_kills() {
    let folder = tempfile::tempdir().expect("a folder");
    let program = Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let mut broker = process::start(program, folder.path()).await.expect("the broker starts");
    let url = broker.url().to_string();
    let mut clients = Vec::new();
    for number in 0..STAYING + GUESTS {
        let token = dev_token(&url, &format!("device{number}@local").parse().expect("an identity")).await.expect("a token");
        let path = folder.path().join(format!("{number}.db"));
        let client = Client::register(&url, vec![token], "test", path).await.expect("registered");
        client.start();
        clients.push(client);
    }
    let accounts: Vec<AccountId> = clients.iter().map(Client::account).collect();
    let guests = accounts[STAYING..].to_vec();
    let group = clients[0].create_group("Sturm").await.expect("created");
    until("all can be invited", async || match clients[0].invite(group, &accounts[1..STAYING]).await {
        Ok(invited) if invited.unreachable.is_empty() => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;
    clients[0].set_group_admin(group, accounts[1], true).await.expect("appointed");
    let device = |(number, client)| Device { client, number, group, sent: Vec::new(), changes: 0 };
    let mut devices: Vec<Device> = clients.into_iter().enumerate().map(device).collect();
    agree(&devices[..STAYING]).await;

    let (seed, stop) = (seed(), Arc::new(AtomicBool::new(false)));
    let storms: Vec<_> = devices
        .drain(..)
        .map(|device| {
            let random = StdRng::seed_from_u64(seed + device.number as u64);
            tokio::spawn(device.storm(guests.clone(), random, Arc::clone(&stop)))
        })
        .collect();
    let (mut random, rounds) = (StdRng::seed_from_u64(seed ^ 1), rounds(4));
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(random.random_range(200..1_000))).await;
        broker.restart().await.expect("starts again");
    }
    stop.store(true, Ordering::Relaxed);
    for storm in storms {
        devices.push(storm.await.expect("no device gave up"));
    }

    // Everybody in, one more word from each; then one guest is out, and hears nothing more.
    done(async || devices[0].client.invite(group, &guests).await).await;
    for device in &mut devices {
        until("it is a member", async || match device.membership().await {
            Some(Membership::Member) => Ok(()),
            other => Err(format!("device {}: {other:?}", device.number)),
        })
        .await;
        let text = format!("{}: the last", device.number);
        device.client.send_text(group, &text).await.expect("kept");
        device.sent.push(text);
    }
    agree(&devices).await;
    let out = devices.last().expect("a guest");
    let (list, _) = devices[0].texts().await;
    until("it has the last word", async || match out.texts().await.0.last_key_value() == list.last_key_value() {
        true => Ok(()),
        false => Err(format!("{:?}", out.texts().await.0.last_key_value())),
    })
    .await;
    devices[0].client.remove_from_group(group, &[out.client.account()]).await.expect("removed");
    devices[1].client.send_text(group, "without you").await.expect("kept");
    agree(&devices[..STAYING + GUESTS - 1]).await;
    until("it is out", async || match out.membership().await {
        Some(Membership::Left) => Ok(()),
        other => Err(format!("{other:?}")),
    })
    .await;

    // What the server has of it is what everybody has.
    broker.stop(PATIENCE).await.expect("it stops");
    let items = stored_items(folder.path(), broker.data(), group).await;
    let commits: BTreeMap<u64, Seq> =
        items.iter().filter(|item| item.kind == GroupItemKind::Commit).map(|item| (item.epoch, item.seq)).collect();
    let epoch = devices[0].state().await.expect("a member").epoch;
    assert!(commits.keys().copied().eq(0..epoch), "one commit an epoch");
    let (list, _) = devices[0].texts().await;
    let messages: Vec<&GroupItem> = items.iter().filter(|item| item.kind == GroupItemKind::Message).collect();
    assert!(messages.iter().map(|item| item.seq.0).eq(list.keys().copied()), "every accepted message has its place");
    let told = devices[0].events().await;
    let bodies: BTreeSet<&str> = list.values().map(|(_, body)| body.as_str()).collect();
    assert_eq!(bodies.len(), list.len(), "no message is there twice");
    for device in &devices {
        device.check_events().await;
        let (texts, _) = device.texts().await;
        if device.number < STAYING {
            assert_eq!(texts, list, "device {}", device.number);
            assert!(device.sent.iter().all(|text| bodies.contains(text.as_str())), "device {}: all that was kept", device.number);
        } else {
            check_guest(&texts, &stays(device.client.account(), &told, &commits), &items);
        }
    }
    let changes: usize = devices.iter().map(|device| device.changes).sum();
    println!("{} messages, {changes} calls, epoch {epoch}, {rounds} kills", list.len());
    for device in devices {
        device.client.close().await;
    }
}
