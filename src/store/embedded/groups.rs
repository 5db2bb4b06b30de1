//! Groups.

use std::ops::Bound;

use async_trait::async_trait;
use bytes::Bytes;
use fjall::{Database, Keyspace, OwnedWriteBatch, Readable as _};

use super::{EmbeddedStore, MIB, Options, View, blocking, keyspace_options, unavailable};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, GroupId, Offset, Partition, Seq};
use crate::store::groups::{GroupHead, GroupItem, GroupRoster, GroupStore, GroupWrite};
use crate::store::{Mark, StoreError, keyspace};

/// Expired items of a write that go in one commit; what is more goes in commits ahead.
const DROP_CHUNK: usize = 20_000;

/// The keyspaces of groups.
pub(super) struct Groups {
    heads: Keyspace,
    rosters: Keyspace,
    infos: Keyspace,
    snapshots: Keyspace,
    trees: Keyspace,
    items: Keyspace,
    marks: Keyspace,
    members: Keyspace,
}

/// Their names, in the order of [`Groups::all`].
pub(super) const KEYSPACES: [&str; 8] =
    ["group_heads", "group_rosters", "group_infos", "group_snapshots", "group_trees", "group_items", "group_marks", "group_members"];

impl Groups {
    pub(super) fn open(db: &Database, options: &Options) -> fjall::Result<Self> {
        let open = |name: &str, buffer: u64, block: u32| db.keyspace(name, || keyspace_options(buffer, block));
        let [heads, rosters, infos, snapshots, trees, items, marks, members] = KEYSPACES;
        Ok(Self {
            heads: open(heads, 2 * MIB, 4096)?,
            rosters: open(rosters, 2 * MIB, 4096)?,
            infos: open(infos, 2 * MIB, 4096)?,
            // Of hundreds of kilobytes each in a big group.
            snapshots: open(snapshots, 4 * MIB, 32 * 1024)?,
            trees: open(trees, 4 * MIB, 32 * 1024)?,
            // Read in long runs, as pending items are.
            items: open(items, options.pending_buffer_bytes, 32 * 1024)?,
            marks: open(marks, 2 * MIB, 4096)?,
            members: open(members, MIB, 4096)?,
        })
    }

    pub(super) const fn all(&self) -> [&Keyspace; 8] {
        [&self.heads, &self.rosters, &self.infos, &self.snapshots, &self.trees, &self.items, &self.marks, &self.members]
    }
}

#[async_trait]
impl GroupStore for EmbeddedStore {
    async fn group_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        let view = self.view();
        blocking(move || view.position(keyspace::TOPIC_GROUPS, partition)).await
    }

    async fn write_groups(&self, write: GroupWrite) -> Result<(), StoreError> {
        let view = self.view();
        blocking(move || view.write_groups(&write)).await
    }

    async fn group(&self, id: GroupId) -> Result<Option<GroupHead>, StoreError> {
        let view = self.view();
        blocking(move || {
            let value = view.groups.heads.get(id.as_bytes()).map_err(unavailable)?;
            value.map(|value| keyspace::decode_group_head(&value)).transpose()
        })
        .await
    }

    async fn group_roster(&self, id: GroupId) -> Result<Option<GroupRoster>, StoreError> {
        let view = self.view();
        blocking(move || {
            let value = view.groups.rosters.get(id.as_bytes()).map_err(unavailable)?;
            value.map(|value| keyspace::decode(&value, "a group's roster")).transpose()
        })
        .await
    }

    async fn group_info(&self, id: GroupId) -> Result<Option<Bytes>, StoreError> {
        let view = self.view();
        blocking(move || {
            let value = view.groups.infos.get(id.as_bytes()).map_err(unavailable)?;
            value.map(|value| keyspace::decode_group_blob(Bytes::from_owner(value))).transpose()
        })
        .await
    }

    async fn group_snapshot(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        let view = self.view();
        blocking(move || {
            let value = view.groups.snapshots.get(keyspace::group_epoch(id, epoch)).map_err(unavailable)?;
            value.map(|value| keyspace::decode_group_blob(Bytes::from_owner(value))).transpose()
        })
        .await
    }

    async fn group_tree(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        let view = self.view();
        blocking(move || {
            let value = view.groups.trees.get(keyspace::group_epoch(id, epoch)).map_err(unavailable)?;
            value.map(|value| keyspace::decode_group_tree(Bytes::from_owner(value)).map(|(_, tree)| tree)).transpose()
        })
        .await
    }

    async fn group_items(&self, id: GroupId, after: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<GroupItem>, StoreError> {
        let view = self.view();
        blocking(move || view.group_items(id, after, items_max, bytes_max)).await
    }

    async fn group_marks(&self, id: GroupId, senders: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> {
        let view = self.view();
        blocking(move || {
            let snapshot = view.db.snapshot();
            let read = |sender| snapshot.get(&view.groups.marks, keyspace::group_mark(id, sender)).map_err(unavailable);
            senders.into_iter().map(|sender| read(sender)?.map(|value| keyspace::decode(&value, "a mark")).transpose()).collect()
        })
        .await
    }

    async fn groups_of(&self, account: AccountId, after: Option<GroupId>, max: usize) -> Result<Vec<GroupId>, StoreError> {
        let view = self.view();
        blocking(move || {
            let first = keyspace::group_member(account, after.unwrap_or(GroupId::from_bytes([0; 16])));
            let from = if after.is_some() { Bound::Excluded(first) } else { Bound::Included(first) };
            let to = Bound::Included(keyspace::group_member(account, GroupId::from_bytes([0xff; 16])));
            let rows = view.db.snapshot().range(&view.groups.members, (from, to));
            rows.take(max).map(|row| keyspace::parse_group_member(&row.key().map_err(unavailable)?)).collect()
        })
        .await
    }

    async fn groups_expired(&self, before: UnixMillis, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        let view = self.view();
        blocking(move || view.groups_expired(before, after, max)).await
    }

    async fn group_heads(&self, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, GroupHead)>, StoreError> {
        let view = self.view();
        blocking(move || {
            let from = after.as_ref().map_or(Bound::Unbounded, |id| Bound::Excluded(*id.as_bytes()));
            let rows = view.db.snapshot().range(&view.groups.heads, (from, Bound::Unbounded));
            let one = |row: fjall::Guard| {
                let (key, value) = row.into_inner().map_err(unavailable)?;
                let id = GroupId::from_slice(&key).map_err(|error| StoreError::Corrupt(error.to_string()))?;
                Ok((id, keyspace::decode_group_head(&value)?))
            };
            rows.take(max).map(one).collect()
        })
        .await
    }
}

impl View {
    fn group_items(&self, id: GroupId, after: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<GroupItem>, StoreError> {
        if items_max == 0 || after == Seq::MAX {
            return Ok(Vec::new());
        }
        let range = keyspace::group_item(id, Seq(after.0 + 1))..=keyspace::group_item(id, Seq::MAX);
        let snapshot = self.db.snapshot();
        let (mut items, mut bytes) = (Vec::new(), 0);
        for row in snapshot.range(&self.groups.items, range) {
            let (key, value) = row.into_inner().map_err(unavailable)?;
            let (_, seq) = keyspace::parse_group_item(&key)?;
            let item = keyspace::decode_group_item(seq, Bytes::from_owner(value))?;
            bytes += item.cost();
            items.push(item);
            if items.len() >= items_max || bytes >= bytes_max {
                break;
            }
        }
        Ok(items)
    }

    /// Hops from group to group over the items, and into those whose oldest one is old enough.
    fn groups_expired(&self, before: UnixMillis, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        let snapshot = self.db.snapshot();
        let behind = |group| Bound::Excluded(keyspace::group_item(group, Seq::MAX));
        let mut from = after.map_or(Bound::Unbounded, behind);
        let mut found = Vec::new();
        while found.len() < max {
            let (mut group, mut to) = (None, None);
            for row in snapshot.range(&self.groups.items, (from, Bound::Unbounded)) {
                let (key, value) = row.into_inner().map_err(unavailable)?;
                let (this, seq) = keyspace::parse_group_item(&key)?;
                if *group.get_or_insert(this) != this || keyspace::group_item_accepted(&value)? >= before {
                    break;
                }
                to = Some(seq);
            }
            let Some(group) = group else { break };
            found.extend(to.map(|to| (group, to)));
            from = behind(group);
        }
        Ok(found)
    }

    /// One batch, no sync: see the module's own words on the view's journal. Of two changes of one key the later one stands, so what goes comes
    /// before what is put behind it on the log: an id may be used again.
    fn write_groups(&self, write: &GroupWrite) -> Result<(), StoreError> {
        let groups = &self.groups;
        let mut expired = Vec::new();
        for (group, to) in &write.drop_to {
            self.expired_rows(*group, *to, &mut expired)?;
        }
        let mut batch = self.db.batch();
        expired.into_iter().for_each(|key| batch.remove(&groups.items, key));
        for (group, to) in &write.drop_to {
            self.expired_trees(*group, *to, &mut batch)?;
        }
        for (group, _) in &write.closed {
            for keyspace in [&groups.snapshots, &groups.trees, &groups.marks] {
                remove_all(&mut batch, keyspace, keyspace.prefix(group.as_bytes()))?;
            }
            batch.remove(&groups.infos, group.as_bytes());
        }
        for (group, _) in &write.removed {
            batch.remove(&groups.heads, group.as_bytes());
            batch.remove(&groups.rosters, group.as_bytes());
        }
        let until = |ends: &[(GroupId, Seq)], group| ends.iter().filter(|(of, _)| *of == group).map(|(_, at)| *at).max();
        let dropped = |group| until(&write.drop_to, group);
        let (closed, removed) = (|group| until(&write.closed, group), |group| until(&write.removed, group));
        let mut value = Vec::new();
        for (group, item) in write.items.iter().filter(|(group, item)| Some(item.seq) > dropped(*group)) {
            value.clear();
            keyspace::encode_group_item(item, &mut value);
            batch.insert(&groups.items, keyspace::group_item(*group, item.seq), value.as_slice());
        }
        for (group, epoch, _, snapshot) in write.snapshots.iter().filter(|(group, _, at, _)| Some(*at) > closed(*group)) {
            batch.insert(&groups.snapshots, keyspace::group_epoch(*group, *epoch), keyspace::encode_group_blob(snapshot));
            let earlier = groups.snapshots.range(keyspace::group_epoch(*group, 0)..keyspace::group_epoch(*group, *epoch));
            remove_all(&mut batch, &groups.snapshots, earlier)?;
        }
        for (group, epoch, at, tree) in write.trees.iter().filter(|(group, _, at, _)| Some(*at) > closed(*group).max(dropped(*group))) {
            batch.insert(&groups.trees, keyspace::group_epoch(*group, *epoch), keyspace::encode_group_tree(*at, tree));
        }
        for (group, _, info) in write.infos.iter().filter(|(group, at, _)| Some(*at) > closed(*group)) {
            batch.insert(&groups.infos, group.as_bytes(), keyspace::encode_group_blob(info));
        }
        for (group, _, roster) in write.rosters.iter().filter(|(group, at, _)| Some(*at) > removed(*group)) {
            batch.insert(&groups.rosters, group.as_bytes(), keyspace::encode(roster));
        }
        for (account, group, _, is_in) in &write.members {
            let key = keyspace::group_member(*account, *group);
            match is_in {
                true => batch.insert(&groups.members, key, [keyspace::VERSION]),
                false => batch.remove(&groups.members, key),
            }
        }
        for (group, sender, mark) in write.marks.iter().filter(|(group, _, mark)| Some(mark.applied) > closed(*group)) {
            batch.insert(&groups.marks, keyspace::group_mark(*group, *sender), keyspace::encode(mark));
        }
        for (group, head) in write.heads.iter().filter(|(group, head)| Some(head.applied) > removed(*group)) {
            batch.insert(&groups.heads, group.as_bytes(), keyspace::encode_group_head(head));
        }
        if let Some((partition, offset)) = write.position {
            batch.insert(&self.positions, keyspace::position(keyspace::TOPIC_GROUPS, partition), keyspace::encode_offset(offset));
        }
        batch.commit().map_err(unavailable)
    }

    /// Keys of items to drop. The scan starts behind what was dropped before, so that it never walks over its remains.
    fn expired_rows(&self, group: GroupId, to: Seq, expired: &mut Vec<fjall::Slice>) -> Result<(), StoreError> {
        let stored = self.groups.heads.get(group.as_bytes()).map_err(unavailable)?;
        let stored = stored.map(|value| keyspace::decode_group_head(&value)).transpose()?;
        let settled = stored.map_or(Seq::ZERO, |head| head.expired_to);
        let from = if settled < to { Seq(settled.0 + 1) } else { Seq::ZERO };
        for row in self.groups.items.range(keyspace::group_item(group, from)..=keyspace::group_item(group, to)) {
            expired.push(row.key().map_err(unavailable)?);
            if expired.len() == DROP_CHUNK {
                let mut batch = self.db.batch();
                expired.drain(..).for_each(|key| batch.remove(&self.groups.items, key));
                batch.commit().map_err(unavailable)?;
            }
        }
        Ok(())
    }

    /// Trees of epochs that began up to there. Epochs begin in the order of the log.
    fn expired_trees(&self, group: GroupId, to: Seq, batch: &mut OwnedWriteBatch) -> Result<(), StoreError> {
        for row in self.groups.trees.prefix(group.as_bytes()) {
            let (key, value) = row.into_inner().map_err(unavailable)?;
            if keyspace::group_tree_at(&value)? > to {
                break;
            }
            batch.remove(&self.groups.trees, key);
        }
        Ok(())
    }
}

fn remove_all(batch: &mut OwnedWriteBatch, keyspace: &Keyspace, rows: fjall::Iter) -> Result<(), StoreError> {
    for row in rows {
        batch.remove(keyspace, row.key().map_err(unavailable)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::conformance::{account, group, head};

    /// A folder as an earlier version left it: without anything of groups, or with heads that don't know when their group's state was said.
    #[tokio::test]
    async fn folders_of_earlier_versions_go_on() {
        let dir = tempfile::tempdir().expect("a folder");
        let store = EmbeddedStore::open(dir.path(), Options::default()).expect("opens");
        let (one, members) = (group(1), vec![(account(1), group(1), Seq(5), true)]);
        store.write_groups(GroupWrite { members, ..GroupWrite::default() }).await.expect("writes");
        let mut value = keyspace::encode_group_head(&head(9));
        // The first version ends before the two numbers that are one byte each.
        value.truncate(value.len() - 2);
        value[0] = 1;
        store.view().groups.heads.insert(one.as_bytes(), value).expect("writes");
        drop(store);

        let store = EmbeddedStore::open(dir.path(), Options::default()).expect("opens");
        let before = GroupHead { stated: UnixMillis(0), stated_at: Seq::ZERO, ..head(9) };
        assert_eq!(store.group(one).await.expect("reads"), Some(before.clone()));
        assert_eq!(store.group_heads(None, 9).await.expect("reads"), [(one, before.clone())]);
        let heads = vec![(one, GroupHead { stated_at: Seq(300), ..before.clone() })];
        store.write_groups(GroupWrite { heads, ..GroupWrite::default() }).await.expect("writes");
        assert_eq!(store.group(one).await.expect("reads"), Some(GroupHead { stated_at: Seq(300), ..before }));
        // Before there were groups.
        let db = store.view_db.clone();
        drop(store);
        for name in KEYSPACES {
            let keyspace = db.keyspace(name, || keyspace_options(MIB, 4096)).expect("is there");
            db.delete_keyspace(keyspace).expect("goes");
        }
        drop(db);
        let store = EmbeddedStore::open(dir.path(), Options::default()).expect("opens");
        assert_eq!(store.group(one).await.expect("reads"), None);
        assert_eq!(store.groups_of(account(1), None, 9).await.expect("reads"), []);
        store.write_groups(GroupWrite { heads: vec![(one, head(9))], ..GroupWrite::default() }).await.expect("writes");
        assert_eq!(store.group(one).await.expect("reads"), Some(head(9)));
    }
}
