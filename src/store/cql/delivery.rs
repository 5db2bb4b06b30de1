//! What is still undelivered.

use std::collections::{BTreeMap, BTreeSet};

use async_trait::async_trait;
use bytes::Bytes;
use scylla::serialize::batch::BatchValues;
use scylla::statement::batch::{Batch, BatchType};

use super::{CqlStore, all, corrupt, each, gather, number, unavailable};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, DeviceId, Offset, Partition, Seq};
use crate::limits;
use crate::store::{DeliveryStore, DeliveryWrite, InboxState, Mark, MarkKey, PendingBody, PendingItem, StoreError, keyspace};

/// Positions of the log in one bucket of an inbox, as a power of two.
const BUCKET_BITS: u32 = 18;
/// Buckets of the marks of a recipient: more would make the partitions of those whom everybody writes to smaller, and the batches of a
/// flush, each within one partition, too.
const MARK_BUCKETS: u8 = 4;
/// Rows of one partition that go in one batch, and their bytes: below what servers warn of.
const BATCH_ROWS: usize = 16;
const BATCH_BYTES: usize = 32 * 1024;
/// Marks of one partition that go in one batch; each is some hundred bytes.
pub(super) const MARK_BATCH_ROWS: usize = 64;
/// How much longer rows live than their envelopes: expiry is said by an event, which comes first.
const TTL_MARGIN_MS: u64 = 2 * DAY_MS;
pub(super) const DAY_MS: u64 = 24 * 3600 * 1000;
/// Buckets read at once.
pub(super) const BUCKETS_AT_ONCE: usize = 8;

fn ttl() -> i32 {
    i32::try_from((limits::ENVELOPE_TTL_MS + TTL_MARGIN_MS) / 1000).unwrap_or(i32::MAX)
}

pub(super) const fn bucket(seq: Seq) -> i64 {
    (seq.0 >> BUCKET_BITS) as i64
}

/// The last seq of a bucket.
pub(super) const fn bucket_end(bucket: i64) -> Seq {
    Seq((((bucket as u64) + 1) << BUCKET_BITS) - 1)
}

const fn bucket_tag(bucket: i64) -> u64 {
    (bucket as u64) << 1
}

const fn device_number(device: DeviceId) -> i8 {
    device.get() as i8
}

fn key(device: &DeviceAddr) -> (&[u8], i8) {
    (device.account.as_bytes(), device_number(device.device))
}

fn mark_bucket(key: &MarkKey) -> i8 {
    // Account ids are random.
    (key.sender.account.as_bytes()[15] % MARK_BUCKETS) as i8
}

pub(super) fn parse_device(account: &[u8], device: i8) -> Result<DeviceAddr, StoreError> {
    let account = AccountId::from_slice(account).map_err(|error| corrupt(&error))?;
    let device = u32::try_from(device).ok().and_then(|device| DeviceId::new(device).ok());
    Ok(DeviceAddr { account, device: device.ok_or_else(|| corrupt(&"a device's number is out of its range"))? })
}

#[async_trait]
impl DeliveryStore for CqlStore {
    async fn position(&self, partition: Partition) -> Result<Offset, StoreError> {
        self.position_of(keyspace::TOPIC_INBOX, partition).await
    }

    async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError> {
        let settled = self.settled_before(&write).await?;
        all(gather(write.remove_accounts.iter().map(|(account, at)| self.remove_account(account, *at)))).await?;
        all(gather(write.remove_devices.iter().map(|(device, at)| self.remove_device(device, *at)))).await?;
        self.put(&write.put).await?;
        all(gather(write.inboxes.iter().map(|(device, state)| self.put_inbox(device, state)))).await?;
        all(gather(write.drop_to.iter().map(|(device, to)| self.drop_to(device, settled.get(device).copied(), *to)))).await?;
        self.put_marks(&write.marks).await?;
        all(gather(write.positions.iter().map(|(partition, next)| self.put_position(keyspace::TOPIC_INBOX, *partition, *next)))).await
    }

    async fn inboxes(&self, devices: Vec<DeviceAddr>) -> Result<Vec<Option<InboxState>>, StoreError> {
        each(gather(devices.iter().map(|device| self.inbox(device)))).await
    }

    async fn marks(&self, keys: Vec<MarkKey>) -> Result<Vec<Option<Mark>>, StoreError> {
        each(gather(keys.iter().map(|key| self.mark(key)))).await
    }

    async fn marks_of(&self, recipient: AccountId, max: usize) -> Result<Option<Vec<(MarkKey, Mark)>>, StoreError> {
        let buckets: Vec<i8> = (0..MARK_BUCKETS as i8).collect();
        let rows = self.rows(&self.statements.marks_of, (&recipient.as_bytes()[..], buckets, (max + 1) as i32)).await?;
        if rows.rows_num() > max {
            return Ok(None);
        }
        let marks = rows.rows::<(&[u8], &[u8])>().map_err(|error| corrupt(&error))?;
        let mark = |row: Result<(&[u8], &[u8]), _>| {
            let (sender, mark) = row.map_err(|error: scylla::errors::DeserializationError| corrupt(&error))?;
            Ok((MarkKey { recipient, sender: keyspace::parse_device(sender)? }, keyspace::decode(mark, "a mark")?))
        };
        marks.map(mark).collect::<Result<Vec<_>, _>>().map(Some)
    }

    async fn pending(
        &self,
        device: DeviceAddr,
        after: Seq,
        to: Seq,
        items_max: usize,
        bytes_max: usize,
    ) -> Result<Vec<PendingItem>, StoreError> {
        let to = to.min(Seq(i64::MAX as u64));
        if after >= to || items_max == 0 {
            return Ok(Vec::new());
        }
        let (mut items, mut bytes, mut from) = (Vec::new(), 0, bucket(Seq(after.0 + 1)));
        loop {
            let buckets = self.buckets(&device, from, bucket(to), BUCKETS_AT_ONCE).await?;
            let Some(last) = buckets.last().copied() else { return Ok(items) };
            // A page of one bucket is most often enough, so the next ones are only asked for when it was not.
            for bucket in buckets {
                let mut behind = after;
                loop {
                    let wanted = (items_max - items.len()).min(limits::CQL_PAGE_ROWS);
                    let page = self.page(&device, bucket, behind, to, wanted).await?;
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

    async fn expired(
        &self,
        before: UnixMillis,
        after: Option<DeviceAddr>,
        devices_max: usize,
    ) -> Result<Vec<(DeviceAddr, Seq)>, StoreError> {
        let mut found = Vec::new();
        let mut after = after;
        loop {
            let candidates = self.candidates(before, after).await?;
            let Some(last) = candidates.last().copied() else { return Ok(found) };
            let ends = each(gather(candidates.iter().map(|device| self.expired_to(*device, before)))).await?;
            for (device, end) in candidates.into_iter().zip(ends) {
                if let Some(to) = end {
                    found.push((device, to));
                    if found.len() == devices_max {
                        return Ok(found);
                    }
                }
            }
            after = Some(last);
        }
    }
}

impl CqlStore {
    pub(super) async fn position_of(&self, topic: u8, partition: Partition) -> Result<Offset, StoreError> {
        let rows = self.rows(&self.statements.position_get, (topic as i8, i32::from(partition.0))).await?;
        let row = rows.maybe_first_row::<(i64,)>().map_err(|error| corrupt(&error))?;
        Ok(Offset(row.map_or(0, |(next,)| next.max(0) as u64)))
    }

    pub(super) async fn put_position(&self, topic: u8, partition: Partition, next: Offset) -> Result<(), StoreError> {
        let next = number(next.0);
        self.execute(&self.statements.position_put, (topic as i8, i32::from(partition.0), next, next)).await
    }

    async fn inbox(&self, device: &DeviceAddr) -> Result<Option<InboxState>, StoreError> {
        let rows = self.rows(&self.statements.inbox_get, key(device)).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(state,)| keyspace::decode_inbox(state)).transpose()
    }

    async fn put_inbox(&self, device: &DeviceAddr, state: &InboxState) -> Result<(), StoreError> {
        let (account, number_of) = key(device);
        self.execute(&self.statements.inbox_put, (account, number_of, keyspace::encode(state), number(state.applied.0))).await
    }

    async fn mark(&self, key: &MarkKey) -> Result<Option<Mark>, StoreError> {
        let sender = keyspace::device(key.sender);
        let rows = self.rows(&self.statements.mark_get, (&key.recipient.as_bytes()[..], mark_bucket(key), &sender[..])).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(mark,)| keyspace::decode(mark, "a mark")).transpose()
    }

    /// Marks in batches, each within one partition.
    async fn put_marks(&self, marks: &[(MarkKey, Mark)]) -> Result<(), StoreError> {
        let mut partitions: BTreeMap<(AccountId, i8), Vec<&(MarkKey, Mark)>> = BTreeMap::new();
        for mark in marks {
            partitions.entry((mark.0.recipient, mark_bucket(&mark.0))).or_default().push(mark);
        }
        let batches = partitions.iter().flat_map(|(partition, marks)| marks.chunks(MARK_BATCH_ROWS).map(move |some| (partition, some)));
        all(gather(batches.map(|((recipient, bucket), some)| self.put_mark_batch(recipient, *bucket, some)))).await
    }

    async fn put_mark_batch(&self, recipient: &AccountId, bucket: i8, marks: &[&(MarkKey, Mark)]) -> Result<(), StoreError> {
        let mut batch = Batch::new(BatchType::Unlogged);
        batch.set_is_idempotent(true);
        let mut values = Vec::with_capacity(marks.len());
        for (key, mark) in marks.iter().copied() {
            batch.append_statement(self.statements.mark_put.clone());
            let sender = keyspace::device(key.sender).to_vec();
            values.push((&recipient.as_bytes()[..], bucket, sender, keyspace::encode_mark(mark), number(mark.applied.0)));
        }
        self.batch(&batch, values).await
    }

    async fn buckets(&self, device: &DeviceAddr, from: i64, to: i64, max: usize) -> Result<Vec<i64>, StoreError> {
        let (account, number_of) = key(device);
        let rows = self.rows(&self.statements.buckets_get, (account, number_of, from, to, max as i32)).await?;
        let buckets = rows.rows::<(i64,)>().map_err(|error| corrupt(&error))?;
        buckets.map(|row| row.map(|(bucket,)| bucket).map_err(|error| corrupt(&error))).collect()
    }

    async fn page(&self, device: &DeviceAddr, bucket: i64, after: Seq, to: Seq, max: usize) -> Result<Vec<PendingItem>, StoreError> {
        let (account, number_of) = key(device);
        let values = (account, number_of, bucket, number(after.0), number(to.0), max as i32);
        let rows = self.rows(&self.statements.pending_get, values).await?;
        let items = rows.rows::<(i64, Bytes)>().map_err(|error| corrupt(&error))?;
        let item = |row: Result<(i64, Bytes), _>| {
            let (seq, body) = row.map_err(|error: scylla::errors::DeserializationError| corrupt(&error))?;
            keyspace::decode_pending(Seq(seq.max(0) as u64), body)
        };
        items.map(item).collect()
    }

    /// Items in batches, each within one partition; and where they are listed.
    async fn put(&self, items: &[(DeviceAddr, PendingItem)]) -> Result<(), StoreError> {
        let today = self.today();
        let mut partitions: BTreeMap<(DeviceAddr, i64), Vec<&PendingItem>> = BTreeMap::new();
        let mut days: BTreeMap<(DeviceAddr, u32), Seq> = BTreeMap::new();
        for (device, item) in items {
            partitions.entry((*device, bucket(item.seq))).or_default().push(item);
            if let PendingBody::Envelope(envelope) = &item.body {
                let seq = days.entry((*device, (envelope.accepted.0 / DAY_MS) as u32)).or_default();
                *seq = item.seq.max(*seq);
            }
        }
        let as_bucket = |device: DeviceAddr, bucket: i64| (device, bucket_tag(bucket), today);
        let as_day = |device: DeviceAddr, day: u32| (device, (u64::from(day) << 1) | 1, today);
        let fresh = |key: &(DeviceAddr, u64, u32)| self.listed.get(key).is_none();

        // First where to look, so that nothing is stored that nobody finds.
        let new_buckets: Vec<_> = partitions
            .iter()
            .filter(|((device, bucket), _)| fresh(&as_bucket(*device, *bucket)))
            .map(|((device, bucket), items)| (*device, *bucket, items.iter().map(|item| item.seq).max().unwrap_or_default()))
            .collect();
        all(gather(new_buckets.iter().map(|(device, bucket, seq)| self.list_bucket(device, *bucket, *seq)))).await?;
        let new_days: Vec<_> = days.iter().filter(|((device, day), _)| fresh(&as_day(*device, *day))).collect();
        all(gather(new_days.iter().map(|((device, day), seq)| self.list_day(device, *day, **seq)))).await?;
        for (device, bucket, _) in new_buckets {
            self.listed.insert(as_bucket(device, bucket), ());
        }
        for ((device, day), _) in new_days {
            self.listed.insert(as_day(*device, *day), ());
        }
        let batches = partitions
            .iter()
            .flat_map(|((device, bucket), items)| chunks(items, |item| item.cost()).map(move |some| (device, *bucket, some)));
        all(gather(batches.map(|(device, bucket, items)| self.put_batch(device, bucket, items)))).await
    }

    pub(super) fn today(&self) -> u32 {
        (self.options.clock.now().0 / DAY_MS) as u32
    }

    /// The listing of a bucket was taken away: the next item in it lists it again.
    fn forget_bucket(&self, device: DeviceAddr, bucket: i64) {
        self.listed.remove(&(device, bucket_tag(bucket), self.today()));
    }

    async fn list_bucket(&self, device: &DeviceAddr, bucket: i64, seq: Seq) -> Result<(), StoreError> {
        let (account, number_of) = key(device);
        self.execute(&self.statements.bucket_put, (account, number_of, bucket, ttl(), number(seq.0))).await
    }

    async fn list_day(&self, device: &DeviceAddr, day: u32, seq: Seq) -> Result<(), StoreError> {
        let (account, number_of) = key(device);
        self.execute(&self.statements.day_put, (day as i32, i16::from(account[0]), account, number_of, ttl(), number(seq.0))).await
    }

    async fn put_batch(&self, device: &DeviceAddr, bucket: i64, items: &[&PendingItem]) -> Result<(), StoreError> {
        let (account, number_of) = key(device);
        let mut batch = Batch::new(BatchType::Unlogged);
        batch.set_is_idempotent(true);
        let mut values = Vec::with_capacity(items.len());
        for item in items {
            let mut body = Vec::new();
            keyspace::encode_pending(&item.body, &mut body);
            let seq = number(item.seq.0);
            batch.append_statement(self.statements.pending_put.clone());
            values.push((account, number_of, bucket, seq, body, ttl(), seq));
        }
        self.batch(&batch, values).await
    }

    pub(super) async fn batch(&self, batch: &Batch, values: impl BatchValues) -> Result<(), StoreError> {
        let _room = self.room.acquire().await.map_err(|_| super::closed())?;
        self.session.batch(batch, values).await.map(drop).map_err(unavailable)
    }

    /// Up to where the inboxes that are about to drop something had dropped before: what lies below is gone already.
    async fn settled_before(&self, write: &DeliveryWrite) -> Result<BTreeMap<DeviceAddr, Seq>, StoreError> {
        let devices: BTreeSet<DeviceAddr> = write.drop_to.iter().map(|(device, _)| *device).collect();
        let states = each(gather(devices.iter().map(|device| self.inbox(device)))).await?;
        let settled = |state: InboxState| state.cursor.max(state.expired_to);
        Ok(devices.into_iter().zip(states).filter_map(|(device, state)| Some((device, settled(state?)))).collect())
    }

    async fn drop_to(&self, device: &DeviceAddr, settled: Option<Seq>, to: Seq) -> Result<(), StoreError> {
        let (account, number_of) = key(device);
        // A drop to before that point is after items that were put early, ahead of a position that a crash took back.
        let from = settled.filter(|settled| *settled < to).unwrap_or_default();
        let last = bucket(to);
        let buckets = self.buckets(device, bucket(from), last - 1, i32::MAX as usize).await?;
        all(gather(buckets.into_iter().map(|bucket| async move {
            let at = number(bucket_end(bucket).0);
            self.forget_bucket(*device, bucket);
            self.execute(&self.statements.pending_drop, (at, account, number_of, bucket)).await?;
            self.execute(&self.statements.bucket_drop, (at, account, number_of, bucket)).await
        })))
        .await?;
        self.execute(&self.statements.pending_drop_to, (number(to.0), account, number_of, last, number(to.0))).await
    }

    async fn remove_device(&self, device: &DeviceAddr, at: Seq) -> Result<(), StoreError> {
        let ((account, number_of), at) = (key(device), number(at.0));
        let buckets = self.buckets(device, 0, i64::MAX, i32::MAX as usize).await?;
        buckets.iter().for_each(|bucket| self.forget_bucket(*device, *bucket));
        all(gather(buckets.into_iter().map(|bucket| self.execute(&self.statements.pending_drop, (at, account, number_of, bucket)))))
            .await?;
        self.execute(&self.statements.buckets_drop, (at, account, number_of)).await?;
        self.execute(&self.statements.inbox_drop, (at, account, number_of)).await
    }

    async fn remove_account(&self, of: &AccountId, at: Seq) -> Result<(), StoreError> {
        let (account, at) = (&of.as_bytes()[..], number(at.0));
        let rows = self.rows(&self.statements.buckets_of, (account,)).await?;
        let buckets: Vec<(i8, i64)> =
            rows.rows::<(i8, i64)>().map_err(|error| corrupt(&error))?.collect::<Result<_, _>>().map_err(|error| corrupt(&error))?;
        for (device, bucket) in &buckets {
            self.forget_bucket(parse_device(account, *device)?, *bucket);
        }
        all(gather(buckets.into_iter().map(|(device, bucket)| self.execute(&self.statements.pending_drop, (at, account, device, bucket)))))
            .await?;
        self.execute(&self.statements.all_buckets_drop, (at, account)).await?;
        self.execute(&self.statements.inboxes_drop, (at, account)).await?;
        all(gather((0..MARK_BUCKETS as i8).map(|bucket| self.execute(&self.statements.marks_drop, (at, account, bucket))))).await
    }

    /// Devices behind `after` to which something was stored on the days around the time, in order; those of one shard at a time.
    async fn candidates(&self, before: UnixMillis, after: Option<DeviceAddr>) -> Result<Vec<DeviceAddr>, StoreError> {
        let last_day = (before.0 / DAY_MS) as i32;
        let first_day = last_day - ((TTL_MARGIN_MS / DAY_MS) as i32 + 1);
        let from = after.map_or(0, |device| device.account.as_bytes()[0]);
        for shard in from..=u8::MAX {
            let after = after.filter(|device| device.account.as_bytes()[0] == shard);
            let (account, device) = after.as_ref().map_or((&[][..], 0), key);
            let page = limits::CQL_PAGE_ROWS;
            let mut found = BTreeSet::new();
            // A full page of one day may end before another day's does: only what is below the lowest full end is whole.
            let mut whole_to = None;
            for day in first_day..=last_day {
                let rows = self.rows(&self.statements.day_get, (day, i16::from(shard), account, device, page as i32)).await?;
                let mut last = None;
                for row in rows.rows::<(&[u8], i8)>().map_err(|error| corrupt(&error))? {
                    let (account, device) = row.map_err(|error| corrupt(&error))?;
                    let device = parse_device(account, device)?;
                    last = Some(device);
                    found.insert(device);
                }
                if rows.rows_num() == page {
                    whole_to = whole_to.into_iter().chain(last).min();
                }
            }
            found.retain(|device| whole_to.is_none_or(|to| *device <= to));
            if !found.is_empty() {
                return Ok(found.into_iter().collect());
            }
        }
        Ok(Vec::new())
    }

    /// Up to where all that is pending of the device is older than the time.
    async fn expired_to(&self, device: DeviceAddr, before: UnixMillis) -> Result<Option<Seq>, StoreError> {
        let state = self.inbox(&device).await?.unwrap_or_default();
        let (mut after, mut to) = (state.cursor.max(state.expired_to), None);
        loop {
            let page = self.pending(device, after, Seq::MAX, limits::CQL_PAGE_ROWS, limits::INBOX_PAGE_BYTES).await?;
            let Some(last) = page.last() else { return Ok(to) };
            after = last.seq;
            for item in &page {
                match &item.body {
                    PendingBody::Envelope(envelope) if envelope.accepted < before => to = Some(item.seq),
                    PendingBody::Envelope(_) => return Ok(to),
                    // Receipts carry no time: they go with the envelopes behind them.
                    PendingBody::Receipts(_) => {}
                }
            }
        }
    }
}

/// Runs of items that fit into a batch.
pub(super) fn chunks<T>(items: &[T], cost: impl Fn(&T) -> usize) -> impl Iterator<Item = &[T]> {
    let mut rest = items;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let fits = |item: &&T| {
            bytes += cost(item);
            bytes <= BATCH_BYTES
        };
        let count = rest.iter().take(BATCH_ROWS).take_while(fits).count().max(1).min(rest.len());
        let (some, behind) = rest.split_at(count);
        rest = behind;
        (!some.is_empty()).then_some(some)
    })
}
