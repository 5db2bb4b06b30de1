//! Groups.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use bytes::Bytes;
use scylla::statement::batch::{Batch, BatchType};

use super::delivery::{BUCKETS_AT_ONCE, DAY_MS, MARK_BATCH_ROWS, bucket, bucket_end, chunks};
use super::{CqlStore, all, corrupt, each, gather, number};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, GroupId, Offset, Partition, Seq};
use crate::limits;
use crate::store::groups::{GroupHead, GroupItem, GroupRoster, GroupStore, GroupWrite};
use crate::store::{Mark, StoreError, keyspace};

/// How much longer rows live than their items: expiry is said by an event, and until it is a snapshot may need them.
const TTL_MARGIN_MS: u64 = limits::ENVELOPE_TTL_MS;
/// Groups are looked up for expiry by half a byte of their ids.
const SHARDS: u8 = 16;

fn ttl() -> i32 {
    i32::try_from((limits::ENVELOPE_TTL_MS + TTL_MARGIN_MS) / 1000).unwrap_or(i32::MAX)
}

const fn bucket_tag(bucket: i64) -> u64 {
    (bucket as u64) << 1
}

const fn day_tag(day: u32) -> u64 {
    ((day as u64) << 1) | 1
}

fn shard(group: &GroupId) -> u8 {
    group.as_bytes()[0] / (u8::MAX / SHARDS + 1)
}

fn parse(id: &[u8]) -> Result<GroupId, StoreError> {
    GroupId::from_slice(id).map_err(|error| corrupt(&error))
}

#[async_trait]
impl GroupStore for CqlStore {
    async fn group_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        self.position_of(keyspace::TOPIC_GROUPS, partition).await
    }

    async fn write_groups(&self, write: GroupWrite) -> Result<(), StoreError> {
        let on = &self.statements;
        let dropping: Vec<GroupId> = write.drop_to.iter().map(|(id, _)| *id).collect();
        let settled = each(gather(dropping.into_iter().map(|id| self.group(id)))).await?;
        self.put_group_items(&write.items).await?;
        all(gather(write.snapshots.iter().map(|(id, epoch, at, snapshot)| {
            self.execute(&on.group_snapshot_put, (&id.as_bytes()[..], number(*epoch), snapshot, number(at.0)))
        })))
        .await?;
        all(gather(write.trees.iter().map(|(id, epoch, at, tree)| {
            self.execute(&on.group_tree_put, (&id.as_bytes()[..], number(*epoch), tree, ttl(), number(at.0)))
        })))
        .await?;
        all(gather(write.infos.iter().map(|(id, at, info)| self.execute(&on.group_info_put, (&id.as_bytes()[..], info, number(at.0))))))
            .await?;
        all(gather(
            write
                .rosters
                .iter()
                .map(|(id, at, roster)| self.execute(&on.group_roster_put, (&id.as_bytes()[..], keyspace::encode(roster), number(at.0)))),
        ))
        .await?;
        all(gather(write.members.iter().map(|(account, id, at, is_in)| self.put_member(account, id, *at, *is_in)))).await?;
        self.put_group_marks(&write.marks).await?;
        let drops = write.drop_to.iter().zip(settled);
        all(gather(drops.map(|((id, to), head)| self.drop_group_items(id, head.map(|head| head.expired_to), *to)))).await?;
        all(gather(write.heads.iter().map(|(id, head)| {
            self.execute(&on.group_head_put, (&id.as_bytes()[..], keyspace::encode_group_head(head), number(head.applied.0)))
        })))
        .await?;
        // Only now do the heads name the new ones.
        all(gather(
            write.snapshots.iter().map(|(id, epoch, at, _)| {
                self.execute(&on.group_snapshots_drop_before, (number(at.0), &id.as_bytes()[..], number(*epoch)))
            }),
        ))
        .await?;
        all(gather(write.closed.iter().map(|(id, at)| self.close_group(id, *at)))).await?;
        all(gather(write.removed.iter().map(|(id, at)| self.remove_group(id, *at)))).await?;
        match write.position {
            Some((partition, next)) => self.put_position(keyspace::TOPIC_GROUPS, partition, next).await,
            None => Ok(()),
        }
    }

    async fn group(&self, id: GroupId) -> Result<Option<GroupHead>, StoreError> {
        let rows = self.rows(&self.statements.group_head_get, (&id.as_bytes()[..],)).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(head,)| keyspace::decode_group_head(head)).transpose()
    }

    async fn group_roster(&self, id: GroupId) -> Result<Option<GroupRoster>, StoreError> {
        let rows = self.rows(&self.statements.group_roster_get, (&id.as_bytes()[..],)).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(roster,)| keyspace::decode(roster, "a group's roster")).transpose()
    }

    async fn group_info(&self, id: GroupId) -> Result<Option<Bytes>, StoreError> {
        let rows = self.rows(&self.statements.group_info_get, (&id.as_bytes()[..],)).await?;
        let row = rows.maybe_first_row::<(Bytes,)>().map_err(|error| corrupt(&error))?;
        Ok(row.map(|(info,)| info))
    }

    async fn group_snapshot(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        let rows = self.rows(&self.statements.group_snapshot_get, (&id.as_bytes()[..], number(epoch))).await?;
        let row = rows.maybe_first_row::<(Bytes,)>().map_err(|error| corrupt(&error))?;
        Ok(row.map(|(snapshot,)| snapshot))
    }

    async fn group_tree(&self, id: GroupId, epoch: u64) -> Result<Option<Bytes>, StoreError> {
        let rows = self.rows(&self.statements.group_tree_get, (&id.as_bytes()[..], number(epoch))).await?;
        let row = rows.maybe_first_row::<(Bytes,)>().map_err(|error| corrupt(&error))?;
        Ok(row.map(|(tree,)| tree))
    }

    async fn group_items(&self, id: GroupId, after: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<GroupItem>, StoreError> {
        if after.0 >= i64::MAX as u64 || items_max == 0 {
            return Ok(Vec::new());
        }
        let (mut items, mut bytes, mut from) = (Vec::new(), 0, bucket(Seq(after.0 + 1)));
        loop {
            let buckets = self.group_buckets(&id, from, i64::MAX, BUCKETS_AT_ONCE).await?;
            let Some(last) = buckets.last().copied() else { return Ok(items) };
            for bucket in buckets {
                let mut behind = after;
                loop {
                    let wanted = (items_max - items.len()).min(limits::CQL_PAGE_ROWS);
                    let page = self.group_page(&id, bucket, behind, wanted).await?;
                    let full = page.len() == wanted;
                    for item in page {
                        bytes += item.cost();
                        behind = item.seq;
                        items.push(item);
                        if items.len() >= items_max || bytes >= bytes_max {
                            return Ok(items);
                        }
                    }
                    if !full {
                        break;
                    }
                }
            }
            from = last + 1;
        }
    }

    async fn group_marks(&self, id: GroupId, senders: Vec<DeviceAddr>) -> Result<Vec<Option<Mark>>, StoreError> {
        each(gather(senders.into_iter().map(|sender| self.group_mark(id, sender)))).await
    }

    async fn groups_of(&self, account: AccountId, after: Option<GroupId>, max: usize) -> Result<Vec<GroupId>, StoreError> {
        if max == 0 {
            return Ok(Vec::new());
        }
        let behind = after.as_ref().map_or(&[][..], |id| &id.as_bytes()[..]);
        let max = i32::try_from(max).unwrap_or(i32::MAX);
        let rows = self.rows(&self.statements.group_members_get, (&account.as_bytes()[..], behind, max)).await?;
        let groups = rows.rows::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        groups.map(|row| parse(row.map_err(|error| corrupt(&error))?.0)).collect()
    }

    async fn groups_expired(&self, before: UnixMillis, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, Seq)>, StoreError> {
        let (mut found, mut after) = (Vec::new(), after);
        while found.len() < max {
            let candidates = self.group_candidates(before, after).await?;
            let Some(last) = candidates.last().copied() else { break };
            let ends = each(gather(candidates.iter().map(|id| self.group_expired_to(*id, before)))).await?;
            for (id, end) in candidates.into_iter().zip(ends) {
                found.extend(end.filter(|_| found.len() < max).map(|to| (id, to)));
            }
            after = Some(last);
        }
        Ok(found)
    }

    /// In the order of the servers' tokens.
    async fn group_heads(&self, after: Option<GroupId>, max: usize) -> Result<Vec<(GroupId, GroupHead)>, StoreError> {
        let max = i32::try_from(max.min(limits::CQL_PAGE_ROWS)).unwrap_or(i32::MAX);
        let rows = match after {
            None => self.rows(&self.statements.group_heads_first, (max,)).await?,
            Some(after) => self.rows(&self.statements.group_heads_behind, (&after.as_bytes()[..], max)).await?,
        };
        let heads = rows.rows::<(&[u8], &[u8])>().map_err(|error| corrupt(&error))?;
        let one = |row: Result<(&[u8], &[u8]), scylla::errors::DeserializationError>| {
            let (id, head) = row.map_err(|error| corrupt(&error))?;
            Ok((parse(id)?, keyspace::decode_group_head(head)?))
        };
        heads.map(one).collect()
    }
}

impl CqlStore {
    async fn put_member(&self, account: &AccountId, id: &GroupId, at: Seq, is_in: bool) -> Result<(), StoreError> {
        let (account, id, at) = (&account.as_bytes()[..], &id.as_bytes()[..], number(at.0));
        match is_in {
            true => self.execute(&self.statements.group_member_put, (account, id, at)).await,
            false => self.execute(&self.statements.group_member_drop, (at, account, id)).await,
        }
    }

    /// Items in batches, each within one partition; and before them where they are listed.
    async fn put_group_items(&self, items: &[(GroupId, GroupItem)]) -> Result<(), StoreError> {
        let today = self.today();
        let mut partitions: BTreeMap<(GroupId, i64), Vec<&GroupItem>> = BTreeMap::new();
        let mut days: BTreeMap<(GroupId, u32), Seq> = BTreeMap::new();
        for (id, item) in items {
            partitions.entry((*id, bucket(item.seq))).or_default().push(item);
            let seq = days.entry((*id, (item.accepted.0 / DAY_MS) as u32)).or_default();
            *seq = item.seq.max(*seq);
        }
        let fresh = |id: GroupId, tag: u64| self.listed_groups.get(&(id, tag, today)).is_none();
        let new_buckets: Vec<_> = partitions
            .iter()
            .filter(|((id, bucket), _)| fresh(*id, bucket_tag(*bucket)))
            .map(|((id, bucket), items)| (*id, *bucket, items.iter().map(|item| item.seq).max().unwrap_or_default()))
            .collect();
        let list = |(id, bucket, seq): &(GroupId, i64, Seq)| {
            self.execute(&self.statements.group_bucket_put, (id.as_bytes().to_vec(), *bucket, ttl(), number(seq.0)))
        };
        all(gather(new_buckets.iter().map(list))).await?;
        let new_days: Vec<_> = days.iter().filter(|((id, day), _)| fresh(*id, day_tag(*day))).collect();
        all(gather(new_days.iter().map(|((id, day), seq)| {
            let values = (*day as i32, shard(id) as i8, &id.as_bytes()[..], ttl(), number(seq.0));
            self.execute(&self.statements.group_day_put, values)
        })))
        .await?;
        for (id, bucket, _) in new_buckets {
            self.listed_groups.insert((id, bucket_tag(bucket), today), ());
        }
        for ((id, day), _) in new_days {
            self.listed_groups.insert((*id, day_tag(*day), today), ());
        }
        let batches = partitions
            .iter()
            .flat_map(|((id, bucket), items)| chunks(items, |item: &&GroupItem| item.cost()).map(move |some| (id, *bucket, some)));
        all(gather(batches.map(|(id, bucket, items)| self.put_group_batch(id, bucket, items)))).await
    }

    async fn put_group_batch(&self, id: &GroupId, bucket: i64, items: &[&GroupItem]) -> Result<(), StoreError> {
        let mut batch = Batch::new(BatchType::Unlogged);
        batch.set_is_idempotent(true);
        let mut values = Vec::with_capacity(items.len());
        for item in items {
            let mut value = Vec::new();
            keyspace::encode_group_item(item, &mut value);
            let seq = number(item.seq.0);
            batch.append_statement(self.statements.group_item_put.clone());
            values.push((&id.as_bytes()[..], bucket, seq, value, ttl(), seq));
        }
        self.batch(&batch, values).await
    }

    async fn put_group_marks(&self, marks: &[(GroupId, DeviceAddr, Mark)]) -> Result<(), StoreError> {
        let mut partitions: BTreeMap<GroupId, Vec<(&DeviceAddr, &Mark)>> = BTreeMap::new();
        for (id, sender, mark) in marks {
            partitions.entry(*id).or_default().push((sender, mark));
        }
        let batches = partitions.iter().flat_map(|(id, marks)| marks.chunks(MARK_BATCH_ROWS).map(move |some| (id, some)));
        all(gather(batches.map(|(id, some)| self.put_group_mark_batch(id, some)))).await
    }

    async fn put_group_mark_batch(&self, id: &GroupId, marks: &[(&DeviceAddr, &Mark)]) -> Result<(), StoreError> {
        let mut batch = Batch::new(BatchType::Unlogged);
        batch.set_is_idempotent(true);
        let mut values = Vec::with_capacity(marks.len());
        for (sender, mark) in marks {
            batch.append_statement(self.statements.group_mark_put.clone());
            let sender = keyspace::device(**sender).to_vec();
            values.push((&id.as_bytes()[..], sender, keyspace::encode_mark(mark), number(mark.applied.0)));
        }
        self.batch(&batch, values).await
    }

    async fn group_mark(&self, id: GroupId, sender: DeviceAddr) -> Result<Option<Mark>, StoreError> {
        let sender = keyspace::device(sender);
        let rows = self.rows(&self.statements.group_mark_get, (&id.as_bytes()[..], &sender[..])).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(mark,)| keyspace::decode(mark, "a mark")).transpose()
    }

    async fn group_buckets(&self, id: &GroupId, from: i64, to: i64, max: usize) -> Result<Vec<i64>, StoreError> {
        let rows = self.rows(&self.statements.group_buckets_get, (&id.as_bytes()[..], from, to, max as i32)).await?;
        let buckets = rows.rows::<(i64,)>().map_err(|error| corrupt(&error))?;
        buckets.map(|row| row.map(|(bucket,)| bucket).map_err(|error| corrupt(&error))).collect()
    }

    async fn group_page(&self, id: &GroupId, bucket: i64, after: Seq, max: usize) -> Result<Vec<GroupItem>, StoreError> {
        let rows = self.rows(&self.statements.group_items_get, (&id.as_bytes()[..], bucket, number(after.0), max as i32)).await?;
        let items = rows.rows::<(i64, Bytes)>().map_err(|error| corrupt(&error))?;
        let item = |row: Result<(i64, Bytes), _>| {
            let (seq, value) = row.map_err(|error: scylla::errors::DeserializationError| corrupt(&error))?;
            keyspace::decode_group_item(Seq(seq.max(0) as u64), value)
        };
        items.map(item).collect()
    }

    async fn drop_group_items(&self, id: &GroupId, settled: Option<Seq>, to: Seq) -> Result<(), StoreError> {
        let group = &id.as_bytes()[..];
        // A drop to before that point is after items that were put early, ahead of a position that a crash took back.
        let from = settled.filter(|settled| *settled < to).unwrap_or_default();
        let last = bucket(to);
        let buckets = self.group_buckets(id, bucket(from), last - 1, i32::MAX as usize).await?;
        all(gather(buckets.into_iter().map(|bucket| async move {
            let at = number(bucket_end(bucket).0);
            self.listed_groups.remove(&(*id, bucket_tag(bucket), self.today()));
            self.execute(&self.statements.group_bucket_items_drop, (at, group, bucket)).await?;
            self.execute(&self.statements.group_bucket_drop, (at, group, bucket)).await
        })))
        .await?;
        self.execute(&self.statements.group_items_drop_to, (number(to.0), group, last, number(to.0))).await?;
        // Only what was written at that position or before: trees of epochs that began there.
        self.execute(&self.statements.group_trees_drop, (number(to.0), group)).await
    }

    async fn close_group(&self, id: &GroupId, at: Seq) -> Result<(), StoreError> {
        let on = &self.statements;
        let parts = [&on.group_snapshots_drop, &on.group_trees_drop, &on.group_marks_drop, &on.group_info_drop];
        all(gather(parts.into_iter().map(|part| self.execute(part, (number(at.0), &id.as_bytes()[..]))))).await
    }

    async fn remove_group(&self, id: &GroupId, at: Seq) -> Result<(), StoreError> {
        let parts = [&self.statements.group_head_drop, &self.statements.group_roster_drop];
        all(gather(parts.into_iter().map(|part| self.execute(part, (number(at.0), &id.as_bytes()[..]))))).await
    }

    /// Groups behind `after` that got something on the days around the time, in order; those of one shard at a time.
    async fn group_candidates(&self, before: UnixMillis, after: Option<GroupId>) -> Result<Vec<GroupId>, StoreError> {
        let last_day = (before.0 / DAY_MS) as i32;
        let first_day = last_day - ((TTL_MARGIN_MS / DAY_MS) as i32 + 1);
        let page = limits::CQL_PAGE_ROWS;
        for of in after.as_ref().map_or(0, shard)..SHARDS {
            let behind = after.as_ref().filter(|id| shard(id) == of).map_or(&[][..], |id| &id.as_bytes()[..]);
            let days = gather((first_day..=last_day).map(|day| {
                let values = (day, of as i8, behind, page as i32);
                self.rows(&self.statements.group_day_get, values)
            }));
            let mut found = BTreeSet::new();
            // A full page of one day may end before another day's does: only what is below the lowest full end is whole.
            let mut whole_to = None;
            for rows in each(days).await? {
                let groups = rows.rows::<(&[u8],)>().map_err(|error| corrupt(&error))?;
                let groups = groups.map(|row| parse(row.map_err(|error| corrupt(&error))?.0)).collect::<Result<Vec<_>, _>>()?;
                if groups.len() == page {
                    whole_to = whole_to.into_iter().chain(groups.last().copied()).min();
                }
                found.extend(groups);
            }
            found.retain(|id| whole_to.is_none_or(|to| *id <= to));
            if !found.is_empty() {
                return Ok(found.into_iter().collect());
            }
        }
        Ok(Vec::new())
    }

    /// Up to where all items of the group are older than the time.
    async fn group_expired_to(&self, id: GroupId, before: UnixMillis) -> Result<Option<Seq>, StoreError> {
        let head = self.group(id).await?;
        let (mut after, mut to) = (head.map_or(Seq::ZERO, |head| head.expired_to), None);
        loop {
            let page = self.group_items(id, after, limits::CQL_PAGE_ROWS, limits::INBOX_PAGE_BYTES).await?;
            let Some(last) = page.last() else { return Ok(to) };
            after = last.seq;
            for item in &page {
                if item.accepted >= before {
                    return Ok(to);
                }
                to = Some(item.seq);
            }
        }
    }
}
