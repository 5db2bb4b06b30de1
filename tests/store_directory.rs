//! The directory's part of G-REBUILD: replaying the commands of each partition, in whatever interleaving, gives the live view.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;
use sealpost::clock::UnixMillis;
use sealpost::ids::{DeviceId, Identity, Offset, Partition, RegistrationId};
use sealpost::projector::directory::plan;
use sealpost::projector::push::Verdict;
use sealpost::store::KeyStore;
use sealpost::store::conformance::account;
use sealpost::store::embedded::{EmbeddedStore, Options};
use sealpost::wire::event::{DirectoryChange, DirectoryCommand, NewDevice, SignedKey};

const PARTITIONS: u16 = 3;

fn partition(n: u64) -> Partition {
    Partition((n % u64::from(PARTITIONS)) as u16)
}

fn identity(n: u8) -> Identity {
    format!("user{n}@realm").parse().expect("valid")
}

fn register(identity: Identity, secret: u8) -> DirectoryChange {
    let key = SignedKey { id: u32::from(secret), public_key: vec![secret; 33], signature: vec![1; 64] };
    let device = NewDevice {
        name: "phone".into(),
        registration_id: RegistrationId::new(1 + u32::from(secret)).expect("valid"),
        identity_key: vec![5; 33],
        credential_hash: [secret; 32],
        signed_prekey: key.clone(),
        pq_last_resort: key,
    };
    DirectoryChange::RegisterDevice { identity, device }
}

/// A wish of somebody: which account, which identity, what.
#[derive(Debug, Clone)]
enum Wish {
    Register(u8, u8),
    Link(u64, u8),
    Unlink(u64, u8),
    Revoke(u64, u8),
    Delete(u64),
}

fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    let wish = prop_oneof![
        6 => (0u8..5, any::<u8>()).prop_map(|(who, secret)| Wish::Register(who, secret)),
        3 => (0u64..8, 0u8..5).prop_map(|(n, who)| Wish::Link(n, who)),
        2 => (0u64..8, 0u8..5).prop_map(|(n, who)| Wish::Unlink(n, who)),
        2 => (0u64..8, 1u8..4).prop_map(|(n, device)| Wish::Revoke(n, device)),
        1 => (0u64..8).prop_map(Wish::Delete),
    ];
    prop::collection::vec(wish, 1..40)
}

/// What an edge appends for a wish: identities are claimed first.
async fn command(store: &EmbeddedStore, at: u64, wish: &Wish) -> Option<(u64, DirectoryCommand)> {
    let (n, change) = match wish {
        Wish::Register(who, secret) => {
            let winner = store.claim_identity(&identity(*who), account(at % 8)).await.expect("claims");
            let n = (0..8).find(|n| account(*n) == winner).expect("one of ours");
            (n, register(identity(*who), *secret))
        }
        Wish::Link(n, who) => {
            let winner = store.claim_identity(&identity(*who), account(*n)).await.expect("claims");
            if winner != account(*n) {
                return None;
            }
            (*n, DirectoryChange::LinkIdentity { identity: identity(*who) })
        }
        Wish::Unlink(n, who) => (*n, DirectoryChange::UnlinkIdentity { identity: identity(*who) }),
        Wish::Revoke(n, device) => (*n, DirectoryChange::RevokeDevice { device: DeviceId::new(u32::from(*device)).expect("valid") }),
        Wish::Delete(n) => (*n, DirectoryChange::DeleteAccount),
    };
    Some((n, DirectoryCommand { account: account(n), at: UnixMillis(at), reply_to: None, change }))
}

async fn lives_and_is_rebuilt(dir: &std::path::Path, wishes: &[Wish], batch: usize, order: [u16; 3]) {
    let store: Arc<EmbeddedStore> = EmbeddedStore::open(dir, Options::default()).expect("opens");
    let mut log: BTreeMap<Partition, Vec<(Offset, DirectoryCommand)>> = BTreeMap::new();
    for (at, wish) in wishes.iter().enumerate() {
        let Some((n, command)) = command(&store, at as u64, wish).await else { continue };
        let records = log.entry(partition(n)).or_default();
        records.push((Offset(records.len() as u64), command.clone()));
        let next = Offset(records.len() as u64);
        let plan = plan(&*store, partition(n), next, &records[records.len() - 1..]).await.expect("reads");
        plan.commit(&*store, &*store).await.expect("writes");
        let refused = !matches!(plan.outcomes[0].verdict, Verdict::Done(_));
        // As the directory service does for what was refused.
        match &command.change {
            DirectoryChange::LinkIdentity { identity } if refused => {
                let record = sealpost::store::DirectoryStore::account(&*store, command.account).await.expect("reads");
                if !record.is_some_and(|record| record.identities.contains(identity)) {
                    store.release_identity(identity, command.account).await.expect("releases");
                }
            }
            DirectoryChange::RegisterDevice { identity, .. }
                if matches!(plan.outcomes[0].verdict, Verdict::AccountDeleted | Verdict::Conflict) =>
            {
                store.release_identity(identity, command.account).await.expect("releases");
            }
            _ => {}
        }
    }
    let live = store.dump_view().await.expect("reads");
    store.clear_view().await.expect("clears");
    for p in order.map(Partition) {
        let records = log.get(&p).map_or(&[][..], Vec::as_slice);
        for (i, run) in records.chunks(batch).enumerate() {
            let next = Offset((i * batch + run.len()) as u64);
            plan(&*store, p, next, run).await.expect("reads").commit_view(&*store).await.expect("writes");
        }
    }
    assert_eq!(store.dump_view().await.expect("reads"), live);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, max_shrink_iters: 60, ..ProptestConfig::default() })]

    #[test]
    fn a_rebuilt_directory_equals_the_live_one(wishes in wishes(), batch in 1usize..6, order in Just([0, 1, 2]).prop_shuffle()) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
        runtime.block_on(lives_and_is_rebuilt(dir.path(), &wishes, batch, order));
    }
}
