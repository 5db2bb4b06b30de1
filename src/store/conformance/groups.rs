//! What every store must do with groups.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::{Fixture, Outcome, account, device};
use crate::clock::UnixMillis;
use crate::ids::{ClientMessageId, EdgeId, GroupId, Offset, Partition, Seq};
use crate::store::groups::{GroupHead, GroupItem, GroupItemKind, GroupRoster, GroupStore, GroupWrite};
use crate::store::{Mark, StoreError};

/// A group made of one number.
pub fn group(number: u64) -> GroupId {
    let mut bytes = [0x5a; 16];
    bytes[..8].copy_from_slice(&number.to_be_bytes());
    GroupId::from_bytes(bytes)
}

/// A message with this many bytes of content.
pub fn message(seq: u64, accepted: u64, bytes: usize) -> GroupItem {
    GroupItem {
        seq: Seq(seq),
        after: Seq(seq - 1),
        accepted: UnixMillis(accepted),
        epoch: seq / 3,
        sender: Some(device(77, 7)),
        kind: GroupItemKind::Message,
        client_message_id: ClientMessageId(seq + 1000),
        content: Bytes::from(vec![seq as u8; bytes]),
    }
}

/// A group to which nothing happened behind this event.
pub fn head(applied: u64) -> GroupHead {
    GroupHead {
        created: UnixMillis(1),
        epoch: 0,
        head: Seq(applied),
        expired_to: Seq::ZERO,
        closed: false,
        gone: vec![],
        edges: vec![],
        snapshot_epoch: 0,
        snapshot_at: Seq(1),
        applied: Seq(applied),
        stated: UnixMillis(1),
        stated_at: Seq(1),
    }
}

async fn all(store: &dyn GroupStore, group: GroupId) -> Result<Vec<u64>, StoreError> {
    let items = store.group_items(group, Seq::ZERO, usize::MAX, usize::MAX).await?;
    Ok(items.iter().map(|item| item.seq.0).collect())
}

/// Everything comes back as it was written, also after a reopening, and belongs to its group.
pub async fn groups(fixture: &dyn Fixture) -> Outcome {
    let (one, other) = (group(1), group(2));
    let state = GroupHead {
        created: UnixMillis(5),
        epoch: 9,
        head: Seq(70),
        expired_to: Seq(3),
        closed: true,
        gone: vec![device(1, 1), device(1, 2)],
        edges: vec![(EdgeId::from_bytes([9; 16]), UnixMillis(8))],
        snapshot_epoch: 7,
        snapshot_at: Seq(40),
        applied: Seq(71),
        stated: UnixMillis(6),
        stated_at: Seq(55),
    };
    let roster = GroupRoster {
        epoch: 9,
        owner: Some(account(1)),
        admins: vec![account(2), account(3)],
        devices: (1..2_000).map(|number| device(number, 1)).collect(),
    };
    let by_server = GroupItem { sender: None, kind: GroupItemKind::Proposal, ..message(70, 9, 5) };
    let mark = Mark { high: 300, seen: u128::MAX - 5, applied: Seq(60) };
    let tree = vec![7; 300_000];
    {
        let store = fixture.open().await.groups;
        assert_eq!(store.group_position(Partition(33)).await?, Offset(0));
        assert_eq!((store.group(one).await?, store.group_roster(one).await?, store.group_info(one).await?), (None, None, None));
        assert_eq!((store.group_snapshot(one, 7).await?, store.group_tree(one, 9).await?), (None, None));
        assert_eq!(all(&*store, one).await?, Vec::<u64>::new());
        store
            .write_groups(GroupWrite {
                items: vec![(one, message(60, 1, 100)), (one, by_server.clone()), (other, message(61, 2, 0))],
                snapshots: vec![(one, 7, Seq(40), tree.clone()), (other, 0, Seq(1), vec![])],
                trees: vec![(one, 9, Seq(60), tree.clone()), (one, 8, Seq(50), vec![8])],
                infos: vec![(one, Seq(60), vec![6; 3])],
                rosters: vec![(one, Seq(60), roster.clone())],
                marks: vec![(one, device(1, 1), mark)],
                heads: vec![(one, state.clone()), (other, head(61))],
                position: Some((Partition(33), Offset(72))),
                ..Default::default()
            })
            .await?;
    }
    let stores = fixture.open().await;
    let store = stores.groups;
    assert_eq!((store.group_position(Partition(33)).await?, store.group_position(Partition(34)).await?), (Offset(72), Offset(0)));
    assert_eq!(stores.delivery.position(Partition(33)).await?, Offset(0), "positions of another topic");
    assert_eq!((store.group(one).await?, store.group(other).await?, store.group(group(3)).await?), (Some(state), Some(head(61)), None));
    assert_eq!((store.group_roster(one).await?, store.group_roster(other).await?), (Some(roster), None));
    assert_eq!((store.group_info(one).await?, store.group_info(other).await?), (Some(Bytes::from(vec![6; 3])), None));
    assert_eq!((store.group_snapshot(one, 7).await?, store.group_snapshot(one, 6).await?), (Some(tree.clone().into()), None));
    assert_eq!(store.group_snapshot(other, 0).await?, Some(Bytes::new()));
    assert_eq!((store.group_tree(one, 9).await?, store.group_tree(one, 8).await?), (Some(tree.into()), Some(vec![8].into())));
    assert_eq!((store.group_tree(one, 7).await?, store.group_tree(other, 9).await?), (None, None));
    assert_eq!(store.group_items(one, Seq::ZERO, 9, usize::MAX).await?, vec![message(60, 1, 100), by_server]);
    assert_eq!(store.group_marks(one, vec![device(1, 2), device(1, 1)]).await?, vec![None, Some(mark)]);
    assert_eq!(store.group_marks(other, vec![device(1, 1)]).await?, vec![None]);
    Ok(())
}

/// Items come in order and within the asked bounds; written twice they are there once; what is dropped is gone, with the trees of its epochs.
pub async fn group_items(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.groups;
    let (one, other) = (group(10), group(11));
    let items = [4, 5, 300, 1 << 20, 1 << 40].map(|seq| message(seq, 10, 100));
    let put = |group: GroupId| items.iter().map(move |item| (group, item.clone()));
    for _ in 0..2 {
        store.write_groups(GroupWrite { items: put(one).chain(put(other)).collect(), ..Default::default() }).await?;
    }
    let read = async |after, items_max, bytes_max| {
        let items = store.group_items(one, Seq(after), items_max, bytes_max).await?;
        Ok::<_, StoreError>(items.iter().map(|item| item.seq.0).collect::<Vec<_>>())
    };
    assert_eq!(store.group_items(one, Seq::ZERO, 9, usize::MAX).await?, items);
    assert_eq!(read(4, 2, usize::MAX).await?, [5, 300]);
    assert_eq!(read(300, 9, usize::MAX).await?, [1 << 20, 1 << 40]);
    assert_eq!(read(301, 9, usize::MAX).await?, [1 << 20, 1 << 40]);
    assert_eq!(read(1 << 40, 9, usize::MAX).await?, Vec::<u64>::new());
    assert_eq!(read(u64::MAX, 9, usize::MAX).await?, Vec::<u64>::new());
    assert_eq!(read(0, 0, usize::MAX).await?, Vec::<u64>::new());
    assert_eq!(read(0, 9, 1).await?, [4], "at least one");
    assert_eq!(read(0, 9, items[0].cost() + 1).await?, [4, 5], "up to the one that reaches the bound");

    let trees = [(1, 4), (2, 300), (3, 301), (4, 1 << 20)].map(|(epoch, at)| (one, epoch, Seq(at), vec![epoch as u8]));
    store.write_groups(GroupWrite { trees: trees.to_vec(), ..Default::default() }).await?;
    let dropped = |to: u64, applied: u64| GroupWrite {
        drop_to: vec![(one, Seq(to))],
        heads: vec![(one, GroupHead { expired_to: Seq(to), ..head(applied) })],
        ..Default::default()
    };
    // What a write drops it may put, too: it stays away.
    store.write_groups(GroupWrite { items: vec![(one, message(3, 10, 1)), (one, message(301, 10, 1))], ..dropped(300, 1 << 41) }).await?;
    assert_eq!(all(&*store, one).await?, [301, 1 << 20, 1 << 40]);
    assert_eq!(all(&*store, other).await?, [4, 5, 300, 1 << 20, 1 << 40]);
    let mut there = Vec::new();
    for epoch in 1..=4 {
        there.push(store.group_tree(one, epoch).await?.is_some());
    }
    assert_eq!(there, [false, false, true, true]);
    store.write_groups(GroupWrite { drop_to: vec![(one, Seq(4))], ..Default::default() }).await?;
    assert_eq!(all(&*store, one).await?, [301, 1 << 20, 1 << 40], "a drop to an earlier point changes nothing");
    store.write_groups(dropped((1 << 40) - 1, (1 << 41) + 1)).await?;
    assert_eq!(all(&*store, one).await?, [1 << 40]);
    assert_eq!(store.group_tree(one, 4).await?, None);
    store.write_groups(dropped(1 << 42, (1 << 42) + 1)).await?;
    assert_eq!(all(&*store, one).await?, Vec::<u64>::new());
    Ok(())
}

/// The snapshot that a head names is there; earlier ones go. A closed group keeps its head, its members and its items.
pub async fn group_states(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.groups;
    let (one, other) = (group(20), group(21));
    for (epoch, at) in [(0, 1), (16, 20), (32, 40)] {
        let named = |applied| GroupHead { epoch, snapshot_epoch: epoch, snapshot_at: Seq(at), ..head(applied) };
        store
            .write_groups(GroupWrite {
                items: vec![(one, message(at, 1, 1))],
                snapshots: [one, other].map(|group| (group, epoch, Seq(at), vec![epoch as u8])).to_vec(),
                infos: [one, other].map(|group| (group, Seq(at), vec![epoch as u8, 1])).to_vec(),
                trees: [one, other].map(|group| (group, epoch, Seq(at), vec![epoch as u8, 2])).to_vec(),
                rosters: vec![(one, Seq(at), GroupRoster { epoch, ..Default::default() })],
                members: vec![(account(20), one, Seq(at), true)],
                marks: [one, other].map(|group| (group, device(1, 1), Mark { high: at, seen: 1, applied: Seq(at) })).to_vec(),
                heads: vec![(one, named(at)), (other, named(at))],
                ..Default::default()
            })
            .await?;
        assert_eq!(store.group_snapshot(one, epoch).await?, Some(vec![epoch as u8].into()));
        assert_eq!(store.group_info(one).await?, Some(vec![epoch as u8, 1].into()));
        assert_eq!(store.group_roster(one).await?.map(|roster| roster.epoch), Some(epoch));
    }
    assert_eq!((store.group_snapshot(one, 0).await?, store.group_snapshot(one, 16).await?), (None, None));

    let end = GroupHead { closed: true, ..head(50) };
    store
        .write_groups(GroupWrite {
            items: vec![(one, GroupItem { kind: GroupItemKind::Closed, ..message(50, 1, 0) })],
            // Of events of the same write, before the closing.
            snapshots: vec![(one, 33, Seq(49), vec![1])],
            trees: vec![(one, 33, Seq(49), vec![1])],
            infos: vec![(one, Seq(49), vec![1])],
            marks: vec![(one, device(1, 2), Mark { high: 1, seen: 1, applied: Seq(49) })],
            heads: vec![(one, end.clone())],
            closed: vec![(one, Seq(50))],
            ..Default::default()
        })
        .await?;
    for epoch in [0, 16, 32, 33] {
        assert_eq!((store.group_snapshot(one, epoch).await?, store.group_tree(one, epoch).await?), (None, None));
    }
    assert_eq!(store.group_info(one).await?, None);
    assert_eq!(store.group_marks(one, vec![device(1, 1), device(1, 2)]).await?, vec![None, None]);
    assert_eq!(store.group(one).await?, Some(end));
    assert_eq!(store.group_roster(one).await?.map(|roster| roster.epoch), Some(32));
    assert_eq!((all(&*store, one).await?, store.groups_of(account(20), None, 9).await?), (vec![1, 20, 40, 50], vec![one]));
    assert_eq!(store.group_snapshot(other, 32).await?, Some(vec![32].into()), "another group");
    assert!(store.group_info(other).await?.is_some() && store.group_tree(other, 32).await?.is_some());
    assert!(store.group_marks(other, vec![device(1, 1)]).await?[0].is_some());
    // Its last item expires, and nothing is left of it.
    let gone = GroupWrite {
        members: vec![(account(20), one, Seq(60), false)],
        drop_to: vec![(one, Seq(50))],
        removed: vec![(one, Seq(60))],
        ..Default::default()
    };
    store.write_groups(gone).await?;
    assert_eq!((store.group(one).await?, store.group_roster(one).await?), (None, None));
    assert_eq!((all(&*store, one).await?, store.groups_of(account(20), None, 9).await?), (vec![], vec![]));
    assert!(store.group(other).await?.is_some(), "another group");
    // The id may be used again, also in the write in which all of that ends.
    let made = |at: u64| GroupWrite {
        items: vec![(one, message(at, 1, 1))],
        snapshots: vec![(one, 0, Seq(at), vec![at as u8])],
        trees: vec![(one, 0, Seq(at), vec![at as u8])],
        infos: vec![(one, Seq(at), vec![at as u8])],
        rosters: vec![(one, Seq(at), GroupRoster::default())],
        marks: vec![(one, device(1, 1), Mark { high: at, seen: 1, applied: Seq(at) })],
        heads: vec![(one, head(at))],
        ..Default::default()
    };
    store.write_groups(made(70)).await?;
    store
        .write_groups(GroupWrite { drop_to: vec![(one, Seq(80))], closed: vec![(one, Seq(80))], removed: vec![(one, Seq(81))], ..made(90) })
        .await?;
    assert_eq!((store.group(one).await?, all(&*store, one).await?), (Some(head(90)), vec![90]));
    let parts = [store.group_snapshot(one, 0).await?, store.group_tree(one, 0).await?, store.group_info(one).await?];
    assert_eq!(parts, [90; 3].map(|byte: u8| Some(Bytes::from(vec![byte]))));
    assert!(store.group_roster(one).await?.is_some());
    assert_eq!(store.group_marks(one, vec![device(1, 1)]).await?[0].map(|mark| mark.high), Some(90));
    Ok(())
}

/// The walk over all groups meets each once.
pub async fn group_walk(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.groups;
    let heads: BTreeMap<GroupId, GroupHead> = (500..540).map(|number| (group(number), head(number))).collect();
    store.write_groups(GroupWrite { heads: heads.clone().into_iter().collect(), ..Default::default() }).await?;
    let (mut found, mut after) = (BTreeMap::new(), None);
    loop {
        let page = store.group_heads(after, 7).await?;
        assert!(page.len() <= 7);
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        for (group, head) in page {
            assert!(found.insert(group, head).is_none(), "a group is met once");
        }
    }
    found.retain(|group, _| heads.contains_key(group));
    assert_eq!(found, heads);
    Ok(())
}

/// An account's groups come in order, by pages; it leaves and comes back.
pub async fn group_members(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.groups;
    let (one, other) = (account(300), account(301));
    let groups: Vec<GroupId> = (30..60).map(group).collect();
    let change = |account, group, at, is_in| GroupWrite { members: vec![(account, group, Seq(at), is_in)], ..Default::default() };
    let members = groups.iter().rev().map(|group| (one, *group, Seq(5), true)).chain([(other, group(30), Seq(5), true)]).collect();
    store.write_groups(GroupWrite { members, ..Default::default() }).await?;
    store.write_groups(change(one, group(30), 6, true)).await?;
    let (mut found, mut after) = (Vec::new(), None);
    loop {
        let page = store.groups_of(one, after, 7).await?;
        assert!(page.len() <= 7);
        let Some(last) = page.last() else { break };
        after = Some(*last);
        found.extend(page);
    }
    assert_eq!(found, groups);
    assert_eq!(store.groups_of(one, Some(group(29)), 2).await?, groups[..2], "behind one that the account is not in");
    assert_eq!(store.groups_of(one, None, 0).await?, vec![]);
    assert_eq!((store.groups_of(other, None, 9).await?, store.groups_of(account(302), None, 9).await?), (vec![group(30)], vec![]));

    store.write_groups(change(one, group(31), 7, false)).await?;
    assert_eq!(store.groups_of(one, None, 2).await?, vec![group(30), group(32)]);
    store.write_groups(change(one, group(31), 8, true)).await?;
    assert_eq!(store.groups_of(one, None, 2).await?, groups[..2]);
    Ok(())
}

/// The walk over expired items meets each group that has some, once, with the right end.
pub async fn group_expiry(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.groups;
    let before = UnixMillis(1_000_000);
    let (old, new) = (before.0 - 1, before.0);
    let mut items = Vec::new();
    for number in 100..120 {
        items.push((group(3 * number), message(1, new, 1)));
        items.extend([(1, old), (2, old), (3, new), (4, old)].map(|(seq, at)| (group(3 * number + 1), message(seq, at, 1))));
        items.push((group(3 * number + 2), message(9, old, 1)));
    }
    store.write_groups(GroupWrite { items, ..Default::default() }).await?;
    let (mut found, mut after) = (BTreeMap::new(), Some(group(299)));
    loop {
        let page = store.groups_expired(before, after, 7).await?;
        assert!(page.len() <= 7);
        let Some((last, _)) = page.last() else { break };
        after = Some(*last);
        for (group, to) in page {
            assert!(found.insert(group, to).is_none(), "a group is met once");
        }
    }
    found.retain(|id, _| (group(300)..group(360)).contains(id));
    let want = (100..120).flat_map(|number| [(group(3 * number + 1), Seq(2)), (group(3 * number + 2), Seq(9))]);
    assert_eq!(found, want.collect());
    Ok(())
}

/// For stores that several projectors reach: what a projector writes that lost its partition without knowing changes nothing.
pub async fn late_group_writes_lose(fixture: &dyn Fixture) -> Outcome {
    let store = fixture.open().await.groups;
    let (one, closed, removed) = (group(400), group(401), group(402));
    let write = |epoch: u64, at: u64| GroupWrite {
        snapshots: vec![(one, epoch, Seq(at), vec![epoch as u8])],
        infos: vec![(one, Seq(at), vec![epoch as u8])],
        rosters: vec![(one, Seq(at), GroupRoster { epoch, ..Default::default() })],
        marks: vec![(one, device(1, 1), Mark { high: at, seen: 1, applied: Seq(at) })],
        heads: vec![(one, GroupHead { epoch, snapshot_epoch: epoch, ..head(at) })],
        position: Some((Partition(9), Offset(at + 1))),
        ..Default::default()
    };
    store
        .write_groups(GroupWrite {
            items: vec![(one, message(31, 1, 1))],
            members: vec![(account(401), one, Seq(30), false), (account(402), one, Seq(30), true)],
            drop_to: vec![(one, Seq(10))],
            closed: vec![(closed, Seq(30))],
            removed: vec![(removed, Seq(30))],
            ..write(5, 30)
        })
        .await?;
    store
        .write_groups(GroupWrite {
            items: vec![(one, message(9, 1, 1)), (one, message(20, 1, 1)), (one, message(31, 1, 1))],
            trees: vec![(one, 1, Seq(9), vec![1]), (closed, 1, Seq(20), vec![1])],
            members: vec![(account(401), one, Seq(20), true), (account(402), one, Seq(20), false)],
            ..write(3, 20)
        })
        .await?;
    let old = GroupWrite {
        snapshots: vec![(closed, 3, Seq(20), vec![3])],
        infos: vec![(closed, Seq(20), vec![3])],
        marks: vec![(closed, device(1, 1), Mark { high: 1, seen: 1, applied: Seq(20) })],
        rosters: vec![(removed, Seq(20), GroupRoster::default())],
        heads: vec![(removed, head(20))],
        ..Default::default()
    };
    store.write_groups(old).await?;
    assert_eq!(store.group_position(Partition(9)).await?, Offset(31), "a position never goes back");
    assert_eq!(all(&*store, one).await?, [20, 31], "what expired does not come back");
    assert_eq!(store.group(one).await?.map(|head| head.epoch), Some(5));
    assert_eq!(store.group_roster(one).await?.map(|roster| roster.epoch), Some(5));
    assert_eq!(store.group_info(one).await?, Some(vec![5].into()));
    assert_eq!((store.group_snapshot(one, 5).await?, store.group_snapshot(one, 3).await?), (Some(vec![5].into()), None));
    assert_eq!(store.group_marks(one, vec![device(1, 1)]).await?[0].map(|mark| mark.high), Some(30));
    assert_eq!((store.groups_of(account(401), None, 9).await?, store.groups_of(account(402), None, 9).await?), (vec![], vec![one]));
    assert_eq!((store.group_tree(one, 1).await?, store.group_tree(closed, 1).await?), (None, None));
    assert_eq!((store.group_snapshot(closed, 3).await?, store.group_info(closed).await?), (None, None));
    assert_eq!(store.group_marks(closed, vec![device(1, 1)]).await?, vec![None]);
    assert_eq!((store.group(removed).await?, store.group_roster(removed).await?), (None, None));
    Ok(())
}
