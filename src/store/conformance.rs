//! What every store must do; each implementation runs all of it.
//!
//! The suites use accounts of their own, so that they may share one fixture.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::groups::GroupStore;
use super::seal::SealKey;
use super::{
    DeliveryStore, DeliveryWrite, DeviceKeys, DirectoryStore, DirectoryWrite, InboxState, KeyKind, KeyStore, Mark, MarkKey, OneTimeKey,
    PendingBody, PendingEnvelope, PendingItem, StoreError,
};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, AttachId, ClientMessageId, DeviceAddr, DeviceId, EdgeId, Identity, Offset, Partition, RegistrationId, Seq};
use crate::limits;
use crate::wire::event::{AccountRecord, DeviceRecord, ReceiptEntry, ReceiptKind, SignedKey};

mod groups;

pub use groups::*;

/// The stores of one set of data.
#[derive(Clone)]
pub struct Stores {
    /// What is pending.
    pub delivery: Arc<dyn DeliveryStore>,
    /// Accounts.
    pub directory: Arc<dyn DirectoryStore>,
    /// Groups.
    pub groups: Arc<dyn GroupStore>,
    /// The state.
    pub keys: Arc<dyn KeyStore>,
}

impl Stores {
    /// Of one that is all of them.
    pub fn of<S: DeliveryStore + DirectoryStore + GroupStore + KeyStore>(store: &Arc<S>) -> Self {
        Self { delivery: store.clone(), directory: store.clone(), groups: store.clone(), keys: store.clone() }
    }
}

/// Somewhere to store.
#[async_trait]
pub trait Fixture: Send + Sync {
    /// Opens the stores; again and again over the same data. Earlier handles were dropped before.
    async fn open(&self) -> Stores;
}

type Outcome = Result<(), StoreError>;

/// An account made of one number.
pub fn account(number: u64) -> AccountId {
    let mut bytes = [0xa5; 16];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    AccountId::from_bytes(bytes)
}

/// A device of [`account`].
pub fn device(number: u64, device: u8) -> DeviceAddr {
    DeviceAddr { account: account(number), device: DeviceId::new(u32::from(device)).expect("1 to 127") }
}

/// An envelope with this many bytes of content.
pub fn envelope(seq: u64, accepted: u64, bytes: usize) -> PendingItem {
    let body = PendingBody::Envelope(PendingEnvelope {
        sender: device(77, 7),
        client_message_id: ClientMessageId(seq + 1000),
        accepted: UnixMillis(accepted),
        flags: 1,
        kind: 2,
        sealed: Bytes::from(vec![seq as u8; bytes]),
    });
    PendingItem { seq: Seq(seq), body }
}

/// A receipt.
pub fn receipt(seq: u64) -> PendingItem {
    let entry = ReceiptEntry { recipient: device(5, 5), kind: ReceiptKind::Delivered, ids: vec![(1, seq)] };
    PendingItem { seq: Seq(seq), body: PendingBody::Receipts(vec![entry]) }
}

/// A one-time prekey.
pub fn one_time(id: u32) -> OneTimeKey {
    SignedKey { id, public_key: vec![5, id as u8], signature: vec![] }
}

async fn all(store: &dyn DeliveryStore, device: DeviceAddr) -> Result<Vec<PendingItem>, StoreError> {
    store.pending(device, Seq::ZERO, Seq::MAX, usize::MAX, usize::MAX).await
}

fn seqs(items: &[PendingItem]) -> Vec<u64> {
    items.iter().map(|item| item.seq.0).collect()
}

/// All suites.
pub async fn everything(fixture: &dyn Fixture) -> Outcome {
    delivery(fixture).await?;
    delivery_removal(fixture).await?;
    delivery_expiry(fixture).await?;
    directory(fixture).await?;
    groups(fixture).await?;
    group_items(fixture).await?;
    group_states(fixture).await?;
    group_members(fixture).await?;
    group_expiry(fixture).await?;
    group_walk(fixture).await?;
    one_time_keys(fixture).await?;
    one_time_keys_are_taken_once(fixture).await?;
    claims(fixture).await?;
    seal_keys(fixture).await
}

/// Positions, items, inboxes and marks come back as they were written, in order, within the asked bounds, also after a reopening.
pub async fn delivery(fixture: &dyn Fixture) -> Outcome {
    let (a, b) = (device(1, 1), device(1, 2));
    let key = MarkKey { recipient: a.account, sender: b };
    let attached = Some((EdgeId::from_bytes([9; 16]), AttachId(4)));
    let state = InboxState { cursor: Seq(3), expired_to: Seq(2), attached, items: 4, bytes: 5, last: Seq(1 << 50), applied: Seq(1 << 50) };
    let mark = Mark { high: 300, seen: u128::MAX - 5, applied: Seq(300) };
    let items = vec![envelope(4, 10, 100), receipt(5), envelope(300, 11, 0), envelope(1 << 50, 12, 3000)];
    {
        let store = fixture.open().await.delivery;
        assert_eq!(store.position(Partition(3)).await?, Offset(0));
        assert_eq!(all(&*store, a).await?, vec![]);
        assert_eq!(store.inboxes(vec![a, b]).await?, vec![None, None]);
        let put = items.iter().map(|item| (a, item.clone())).chain([(b, receipt(4))]).collect();
        store
            .write(DeliveryWrite {
                positions: vec![(Partition(3), Offset(17)), (Partition(4), Offset(1))],
                put,
                inboxes: vec![(a, state)],
                marks: vec![(key, mark)],
                ..Default::default()
            })
            .await?;
    }
    let store = fixture.open().await.delivery;
    assert_eq!((store.position(Partition(3)).await?, store.position(Partition(5)).await?), (Offset(17), Offset(0)));
    assert_eq!(store.inboxes(vec![b, a]).await?, vec![None, Some(state)]);
    assert_eq!(store.marks(vec![MarkKey { sender: a, ..key }, key]).await?, vec![None, Some(mark)]);
    assert_eq!(store.marks_of(a.account, 1).await?, Some(vec![(key, mark)]));
    assert_eq!(store.marks_of(a.account, 0).await?, None, "one more than asked for");
    assert_eq!(store.marks_of(device(2, 1).account, 1).await?, Some(vec![]));
    assert_eq!(all(&*store, a).await?, items);
    assert_eq!(all(&*store, b).await?, vec![receipt(4)]);

    let read = |after, to, items_max, bytes_max| store.pending(a, Seq(after), Seq(to), items_max, bytes_max);
    assert_eq!(seqs(&read(4, 300, 10, usize::MAX).await?), [5, 300]);
    assert_eq!(seqs(&read(0, u64::MAX, 2, usize::MAX).await?), [4, 5]);
    assert_eq!(seqs(&read(4, 4, 2, usize::MAX).await?), Vec::<u64>::new());
    assert_eq!(seqs(&read(u64::MAX, u64::MAX, 2, usize::MAX).await?), Vec::<u64>::new());
    assert_eq!(seqs(&read(0, u64::MAX, 9, 1).await?), [4], "at least one");
    let bytes = items[0].cost() + 1;
    assert_eq!(seqs(&read(0, u64::MAX, 9, bytes).await?), [4, 5], "up to the one that reaches the bound");
    Ok(())
}

/// Dropping, and what goes with a device or an account; what stands beside it stays.
pub async fn delivery_removal(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.delivery;
    let (a, b, other) = (device(10, 1), device(10, 2), device(11, 1));
    let mark =
        |recipient: DeviceAddr, sender| (MarkKey { recipient: recipient.account, sender }, Mark { high: 1, seen: 1, applied: Seq(9) });
    let state = InboxState { items: 1, applied: Seq(9), ..Default::default() };
    let put = [a, b, other].iter().flat_map(|device| (1..=9).map(|seq| (*device, envelope(seq, seq, 10)))).collect();
    let inboxes = [a, b, other].map(|device| (device, state)).to_vec();
    let marks = vec![mark(a, other), mark(other, a)];
    store.write(DeliveryWrite { put, inboxes, marks, ..Default::default() }).await?;

    // The drop comes before the put, whatever the seqs; and a drop to an earlier point changes nothing.
    let inboxes = vec![(a, InboxState { cursor: Seq(4), applied: Seq(10), ..state })];
    let put = vec![(a, envelope(10, 1, 1))];
    store.write(DeliveryWrite { drop_to: vec![(a, Seq(4)), (b, Seq::ZERO)], put, inboxes, ..Default::default() }).await?;
    assert_eq!(seqs(&all(&*store, a).await?), [5, 6, 7, 8, 9, 10]);
    assert_eq!(all(&*store, b).await?.len(), 9);
    let inboxes = vec![(a, InboxState { cursor: Seq(4), expired_to: Seq(7), applied: Seq(11), ..state })];
    store.write(DeliveryWrite { drop_to: vec![(a, Seq(3)), (a, Seq(7))], inboxes, ..Default::default() }).await?;
    assert_eq!(seqs(&all(&*store, a).await?), [8, 9, 10]);

    store.write(DeliveryWrite { remove_devices: vec![(b, Seq(12))], ..Default::default() }).await?;
    assert_eq!(all(&*store, b).await?, vec![]);
    assert_eq!(store.inboxes(vec![b]).await?, vec![None]);
    // A new device with the old number starts from nothing.
    let young = InboxState { applied: Seq(13), ..state };
    store.write(DeliveryWrite { put: vec![(b, envelope(13, 1, 1))], inboxes: vec![(b, young)], ..Default::default() }).await?;
    assert_eq!(seqs(&all(&*store, b).await?), [13]);

    // An account goes before everything else of the same write.
    let young_mark = (mark(a, b).0, Mark { high: 2, seen: 1, applied: Seq(21) });
    let again = InboxState { cursor: Seq(20), applied: Seq(21), ..state };
    store
        .write(DeliveryWrite {
            remove_accounts: vec![(a.account, Seq(20))],
            put: vec![(a, envelope(21, 1, 1))],
            inboxes: vec![(a, again)],
            marks: vec![young_mark],
            ..Default::default()
        })
        .await?;
    assert_eq!(seqs(&all(&*store, a).await?), [21]);
    assert_eq!(store.inboxes(vec![a, b]).await?, vec![Some(again), None]);
    assert_eq!(all(&*store, b).await?, vec![]);
    let keys = vec![mark(a, other).0, mark(a, b).0, mark(other, a).0];
    let marks: Vec<bool> = store.marks(keys).await?.iter().map(Option::is_some).collect();
    assert_eq!(marks, [false, true, true], "marks go with the recipient, not with the sender");
    assert_eq!(all(&*store, other).await?.len(), 9);
    Ok(())
}

/// For stores that several projectors reach: what a projector writes that lost its partition without knowing changes nothing.
pub async fn late_writes_lose(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.delivery;
    let (a, b, gone) = (device(20, 1), device(20, 2), device(21, 1));
    let key = MarkKey { recipient: a.account, sender: b };
    let state = InboxState { cursor: Seq(5), applied: Seq(30), ..Default::default() };
    let mark = Mark { high: 9, seen: 1, applied: Seq(30) };
    store
        .write(DeliveryWrite {
            positions: vec![(Partition(9), Offset(31))],
            put: vec![(a, envelope(6, 1, 1))],
            drop_to: vec![(a, Seq(5))],
            inboxes: vec![(a, state)],
            marks: vec![(key, mark)],
            remove_devices: vec![(b, Seq(29))],
            remove_accounts: vec![(gone.account, Seq(30))],
        })
        .await?;
    let old = InboxState { cursor: Seq(2), applied: Seq(20), ..Default::default() };
    store
        .write(DeliveryWrite {
            positions: vec![(Partition(9), Offset(21))],
            put: vec![(a, envelope(4, 1, 1)), (a, envelope(6, 1, 1)), (b, envelope(7, 1, 1)), (gone, envelope(8, 1, 1))],
            drop_to: vec![(a, Seq(2))],
            inboxes: vec![(a, old), (b, old), (gone, old)],
            marks: vec![(key, Mark { high: 3, seen: 1, applied: Seq(20) })],
            ..Default::default()
        })
        .await?;
    assert_eq!(store.position(Partition(9)).await?, Offset(31), "a position never goes back");
    assert_eq!(seqs(&all(&*store, a).await?), [6], "what was acknowledged does not come back");
    assert_eq!((all(&*store, b).await?.len(), all(&*store, gone).await?.len()), (0, 0), "nor what was removed");
    assert_eq!(store.inboxes(vec![a, b, gone]).await?, vec![Some(state), None, None]);
    assert_eq!(store.marks(vec![key]).await?, vec![Some(mark)]);
    Ok(())
}

/// The walk over expired items meets each device that has some, once, with the right end.
pub async fn delivery_expiry(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.delivery;
    let before = UnixMillis(1_000_000);
    let (old, new) = (before.0 - 1, before.0);
    let mut put = Vec::new();
    for number in 100..120 {
        put.push((device(number, 1), envelope(1, new, 1)));
        put.push((device(number, 2), receipt(1)));
        put.push((device(number, 2), envelope(2, old, 1)));
        put.push((device(number, 2), receipt(3)));
        put.push((device(number, 2), envelope(4, old, 1)));
        put.push((device(number, 2), envelope(5, new, 1)));
        put.push((device(number, 2), envelope(6, old, 1)));
        put.push((device(number, 127), envelope(9, old, 1)));
    }
    store.write(DeliveryWrite { put, ..Default::default() }).await?;
    let mut found = BTreeMap::new();
    let mut after = Some(device(99, 127));
    loop {
        let page = store.expired(before, after, 7).await?;
        assert!(page.len() <= 7);
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        for (device, to) in page {
            assert!(found.insert(device, to).is_none(), "a device is met once");
        }
    }
    let want: BTreeMap<_, _> = (100..120).flat_map(|n| [(device(n, 2), Seq(4)), (device(n, 127), Seq(9))]).collect();
    found.retain(|device, _| (device.account >= account(100)) && device.account < account(120));
    assert_eq!(found, want);
    Ok(())
}

/// An account with one device.
pub fn account_record(number: u64, identities: &[&str]) -> AccountRecord {
    let record = DeviceRecord {
        id: DeviceId::new(1).expect("valid"),
        name: "Pixel".into(),
        registration_id: RegistrationId::new(7).expect("valid"),
        identity_key: vec![5; 33],
        credential_hash: [number as u8; 32],
        created: UnixMillis(3),
        first_message_id: ClientMessageId(number),
    };
    AccountRecord {
        id: account(number),
        created: UnixMillis(2),
        deleted: None,
        identities: identities.iter().map(|text| text.parse().expect("valid")).collect(),
        devices: vec![record],
        last_device: 1,
        registrations: 1,
        blocked: vec![account(1), account(2)],
        applied: Offset(5),
    }
}

/// Accounts, identities and prekeys come back as they were written; a link belongs to its account.
pub async fn directory(fixture: &dyn Fixture) -> Outcome {
    let (one, two) = (account_record(1000, &["alice@r", "alice@rr"]), account_record(1001, &["alic@r"]));
    let id = |text: &str| text.parse::<Identity>().expect("valid");
    let key = SignedKey { id: 1, public_key: vec![8; 1569], signature: vec![3; 64] };
    let keys = DeviceKeys { signed_prekey: key.clone(), pq_last_resort: key };
    let dev = device(1000, 1);
    {
        let store = fixture.open().await.directory;
        assert_eq!(store.account(one.id).await?, None);
        assert_eq!(store.directory_position(Partition(1)).await?, Offset(0));
        store
            .write_directory(DirectoryWrite {
                position: Some((Partition(1), Offset(5))),
                accounts: vec![one.clone(), two.clone()],
                keys: vec![(dev, Some(keys.clone()))],
                linked: vec![(id("alice@r"), one.id), (id("alice@rr"), one.id), (id("alic@r"), two.id)],
                unlinked: vec![],
            })
            .await?;
    }
    let store = fixture.open().await.directory;
    assert_eq!(store.directory_position(Partition(1)).await?, Offset(5));
    assert_eq!(store.account(one.id).await?, Some(one.clone()));
    assert_eq!(store.device_keys(dev).await?, Some(keys));
    assert_eq!(store.device_keys(device(1001, 1)).await?, None);
    assert_eq!(store.identity(&id("alice@r")).await?, Some(one.id));
    assert_eq!(store.identity(&id("alic@r")).await?, Some(two.id));
    assert_eq!(store.identity(&id("lice@r")).await?, None);

    // Linked elsewhere before it is unlinked here: both orders end the same.
    let at = |offset| Some((Partition(1), Offset(offset)));
    let link = DirectoryWrite { position: at(6), linked: vec![(id("alice@r"), two.id)], ..Default::default() };
    let unlink = DirectoryWrite { position: at(7), unlinked: vec![(id("alice@r"), one.id)], keys: vec![(dev, None)], ..Default::default() };
    store.write_directory(link).await?;
    store.write_directory(unlink).await?;
    assert_eq!(store.identity(&id("alice@r")).await?, Some(two.id));
    assert_eq!(store.identity(&id("alice@rr")).await?, Some(one.id));
    assert_eq!(store.device_keys(dev).await?, None);
    assert_eq!(store.directory_position(Partition(1)).await?, Offset(7));
    Ok(())
}

/// Pools of one-time prekeys: lowest id first, counted, capped, apart from each other, kept over a reopening.
pub async fn one_time_keys(fixture: &dyn Fixture) -> Outcome {
    let (a, b) = (device(2000, 1), device(2000, 2));
    {
        let store = fixture.open().await.keys;
        assert_eq!(store.take_one_time(a, KeyKind::Ec).await?, (None, 0));
        assert_eq!(store.add_one_time(a, KeyKind::Ec, vec![]).await?, 0);
        assert_eq!(store.add_one_time(a, KeyKind::Ec, [30, 10, 20].map(one_time).to_vec()).await?, 3);
        assert_eq!(store.add_one_time(a, KeyKind::Ec, [20, 40].map(one_time).to_vec()).await?, 4, "an id that is there is replaced");
        assert_eq!(store.add_one_time(a, KeyKind::Pq, vec![one_time(u32::MAX)]).await?, 1);
        assert_eq!(store.add_one_time(b, KeyKind::Ec, vec![one_time(0)]).await?, 1);
        assert_eq!(store.take_one_time(a, KeyKind::Ec).await?, (Some(one_time(10)), 3));
    }
    let store = fixture.open().await.keys;
    assert_eq!(store.take_one_time(a, KeyKind::Ec).await?, (Some(one_time(20)), 2));
    assert_eq!(store.add_one_time(a, KeyKind::Ec, vec![one_time(5)]).await?, 3, "ids may start anew below");
    assert_eq!(store.take_one_time(a, KeyKind::Ec).await?, (Some(one_time(5)), 2));
    assert_eq!(store.take_one_time(a, KeyKind::Pq).await?, (Some(one_time(u32::MAX)), 0));
    assert_eq!(store.take_one_time(a, KeyKind::Pq).await?, (None, 0));
    assert_eq!(store.count_one_time(a, KeyKind::Ec).await?, 2);
    assert_eq!(store.first_one_time(a, KeyKind::KeyPackageLastResort).await?, None);
    assert_eq!(store.add_one_time(a, KeyKind::KeyPackageLastResort, vec![one_time(0)]).await?, 1);
    assert_eq!(store.add_one_time(a, KeyKind::KeyPackage, [8, 7].map(one_time).to_vec()).await?, 2);
    for _ in 0..2 {
        assert_eq!(store.first_one_time(a, KeyKind::KeyPackageLastResort).await?, Some(one_time(0)), "it stays");
    }
    assert_eq!(store.take_one_time(a, KeyKind::KeyPackage).await?, (Some(one_time(7)), 1));
    assert_eq!(store.first_one_time(a, KeyKind::KeyPackage).await?, Some(one_time(8)));
    assert_eq!(store.count_one_time(a, KeyKind::Ec).await?, 2, "kinds are apart");

    let cap = limits::PREKEYS_PER_DEVICE;
    let fill = |from: usize, to: usize| (from..to).map(|id| one_time(id as u32)).collect::<Vec<_>>();
    assert_eq!(store.add_one_time(b, KeyKind::Ec, fill(1, cap)).await?, cap);
    assert_eq!(store.add_one_time(b, KeyKind::Ec, fill(cap, cap + 1)).await, Err(StoreError::LimitReached));
    assert_eq!(store.add_one_time(b, KeyKind::Ec, fill(cap - 1, cap)).await?, cap, "replacing is no more");
    assert_eq!(store.count_one_time(b, KeyKind::Ec).await?, cap);

    store.remove_one_time(b).await?;
    store.remove_one_time(b).await?;
    assert_eq!((store.count_one_time(b, KeyKind::Ec).await?, store.take_one_time(b, KeyKind::Ec).await?), (0, (None, 0)));
    assert_eq!(store.count_one_time(a, KeyKind::Ec).await?, 2);
    assert_eq!(store.add_one_time(b, KeyKind::Ec, vec![one_time(2), one_time(2)]).await?, 1);
    assert_eq!(store.take_one_time(b, KeyKind::Ec).await?, (Some(one_time(2)), 0));
    Ok(())
}

/// G-PREKEY-ONCE: 64 takers empty a pool of 1,000, with a reopening in between; each key comes out once.
pub async fn one_time_keys_are_taken_once(fixture: &dyn Fixture) -> Outcome {
    let dev = device(2100, 1);
    let total = limits::PREKEYS_PER_DEVICE;
    fixture.open().await.keys.add_one_time(dev, KeyKind::Pq, (0..total as u32).map(one_time).collect()).await?;
    let mut seen = BTreeSet::new();
    for takes in [total / 64 / 2, usize::MAX] {
        let store = fixture.open().await.keys;
        let mut takers = tokio::task::JoinSet::new();
        for _ in 0..64 {
            let store = store.clone();
            takers.spawn(async move {
                let mut taken = Vec::new();
                while taken.len() < takes {
                    match store.take_one_time(dev, KeyKind::Pq).await? {
                        (Some(key), _) => taken.push(key.id),
                        (None, _) => break,
                    }
                }
                Ok::<_, StoreError>(taken)
            });
        }
        while let Some(taken) = takers.join_next().await {
            for id in taken.expect("a taker does not panic")? {
                assert!(seen.insert(id), "key {id} was handed out twice");
            }
        }
    }
    assert_eq!(seen.len(), total);
    Ok(())
}

/// The first claim wins, for everybody, for ever, until it is released by its account.
pub async fn claims(fixture: &dyn Fixture) -> Outcome {
    let id: Identity = "claimed@r".parse().expect("valid");
    let winner = {
        let store = fixture.open().await.keys;
        let mut claimers = tokio::task::JoinSet::new();
        for number in 3000..3032 {
            let (store, id) = (store.clone(), id.clone());
            claimers.spawn(async move { store.claim_identity(&id, account(number)).await });
        }
        let mut winners = HashSet::new();
        while let Some(winner) = claimers.join_next().await {
            winners.insert(winner.expect("a claimer does not panic")?);
        }
        assert_eq!(winners.len(), 1);
        winners.into_iter().next().expect("one")
    };
    let store = fixture.open().await.keys;
    let other = account(3050);
    assert_eq!(store.claim_identity(&id, other).await?, winner);
    store.release_identity(&id, other).await?;
    assert_eq!(store.claim_identity(&id, other).await?, winner);
    store.release_identity(&id, winner).await?;
    assert_eq!(store.claim_identity(&id, other).await?, other);
    Ok(())
}

/// At-rest keys: the first stands, a destroyed one never comes back.
pub async fn seal_keys(fixture: &dyn Fixture) -> Outcome {
    let key = |byte| Some(SealKey::from_bytes([byte; 32]));
    let exposed = |key: Option<SealKey>| key.map(|key| *key.expose());
    let (a, b, never) = (account(4000), account(4001), account(4002));
    {
        let store = fixture.open().await.keys;
        assert_eq!(exposed(store.seal_key(a, None).await?), None);
        assert_eq!(exposed(store.seal_key(a, key(1)).await?), Some([1; 32]));
        assert_eq!(exposed(store.seal_key(a, key(2)).await?), Some([1; 32]));
        assert_eq!(exposed(store.seal_key(b, key(3)).await?), Some([3; 32]));
        let mut makers = tokio::task::JoinSet::new();
        for byte in 0..32 {
            let store = store.clone();
            makers.spawn(async move { store.seal_key(account(4003), Some(SealKey::from_bytes([byte; 32]))).await });
        }
        let mut made = HashSet::new();
        while let Some(key) = makers.join_next().await {
            made.insert(exposed(key.expect("a maker does not panic")?));
        }
        assert!(made.len() == 1 && !made.contains(&None), "all get the same key");
        store.destroy_seal_key(b).await?;
        store.destroy_seal_key(b).await?;
        store.destroy_seal_key(never).await?;
        assert_eq!(exposed(store.seal_key(b, None).await?), None);
    }
    let store = fixture.open().await.keys;
    assert_eq!(exposed(store.seal_key(a, key(9)).await?), Some([1; 32]));
    assert_eq!(exposed(store.seal_key(b, key(9)).await?), None, "once destroyed, always");
    assert_eq!(exposed(store.seal_key(never, key(9)).await?), None);
    for n in 0..300 {
        assert_eq!(exposed(store.seal_key(account(4100 + n), key(n as u8)).await?), Some([n as u8; 32]));
    }
    Ok(())
}
