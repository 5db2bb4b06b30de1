//! What is still undelivered.

use std::collections::BTreeSet;

use async_trait::async_trait;
use bytes::Bytes;
use fjall::{Readable as _, Slice};

use super::{EmbeddedStore, View, blocking, unavailable};
use crate::clock::UnixMillis;
use crate::ids::{AccountId, DeviceAddr, Offset, Partition, Seq};
use crate::store::{DeliveryStore, DeliveryWrite, InboxState, Mark, MarkKey, PendingItem, StoreError, keyspace};

/// Rows of a removed account or device that go in one commit. What is more goes in commits ahead: nobody reads them any
/// more, and a replay finds them gone.
const REMOVE_CHUNK: usize = 20_000;

#[async_trait]
impl DeliveryStore for EmbeddedStore {
    async fn position(&self, partition: Partition) -> Result<Offset, StoreError> {
        let view = self.view();
        blocking(move || view.position(keyspace::TOPIC_INBOX, partition)).await
    }

    async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError> {
        self.writer.write(write).await
    }

    async fn inboxes(&self, devices: Vec<DeviceAddr>) -> Result<Vec<Option<InboxState>>, StoreError> {
        let view = self.view();
        blocking(move || {
            let snapshot = view.db.snapshot();
            let read = |device| snapshot.get(&view.inboxes, keyspace::device(device)).map_err(unavailable);
            devices.into_iter().map(|device| read(device)?.map(|value| keyspace::decode_inbox(&value)).transpose()).collect()
        })
        .await
    }

    async fn marks(&self, keys: Vec<MarkKey>) -> Result<Vec<Option<Mark>>, StoreError> {
        let view = self.view();
        blocking(move || {
            let snapshot = view.db.snapshot();
            let read = |key: &MarkKey| snapshot.get(&view.marks, keyspace::mark(key)).map_err(unavailable);
            keys.iter().map(|key| read(key)?.map(|value| keyspace::decode(&value, "a mark")).transpose()).collect()
        })
        .await
    }

    async fn marks_of(&self, recipient: AccountId, max: usize) -> Result<Option<Vec<(MarkKey, Mark)>>, StoreError> {
        let view = self.view();
        blocking(move || {
            let mut found = Vec::new();
            for entry in view.db.snapshot().prefix(&view.marks, recipient.as_bytes()) {
                let (key, value) = entry.into_inner().map_err(unavailable)?;
                if found.len() == max {
                    return Ok(None);
                }
                found.push((keyspace::parse_mark(&key)?, keyspace::decode(&value, "a mark")?));
            }
            Ok(Some(found))
        })
        .await
    }

    async fn pending(
        &self,
        device: DeviceAddr,
        after: Seq,
        to: Seq,
        items_max: usize,
        bytes_max: usize,
    ) -> Result<Vec<PendingItem>, StoreError> {
        let view = self.view();
        blocking(move || view.pending(device, after, to, items_max, bytes_max)).await
    }

    async fn expired(
        &self,
        before: UnixMillis,
        after: Option<DeviceAddr>,
        devices_max: usize,
    ) -> Result<Vec<(DeviceAddr, Seq)>, StoreError> {
        let view = self.view();
        blocking(move || view.expired(before, after, devices_max)).await
    }
}

impl View {
    pub(super) fn position(&self, topic: u8, partition: Partition) -> Result<Offset, StoreError> {
        let value = self.positions.get(keyspace::position(topic, partition)).map_err(unavailable)?;
        value.map_or(Ok(Offset(0)), |value| keyspace::decode_offset(&value))
    }

    fn pending(&self, device: DeviceAddr, after: Seq, to: Seq, items_max: usize, bytes_max: usize) -> Result<Vec<PendingItem>, StoreError> {
        if after >= to || items_max == 0 {
            return Ok(Vec::new());
        }
        // Starting right behind the cursor, the scan never walks over what was acknowledged and dropped.
        let range = keyspace::pending(device, Seq(after.0 + 1))..=keyspace::pending(device, to);
        // A snapshot: without one a scan may see half of a batch.
        let snapshot = self.db.snapshot();
        // Grows as it needs: most inboxes that are read hold nothing.
        let (mut items, mut bytes) = (Vec::new(), 0);
        for row in snapshot.range(&self.pending, range) {
            let (key, value) = row.into_inner().map_err(unavailable)?;
            let (_, seq) = keyspace::parse_pending(&key)?;
            let item = keyspace::decode_pending(seq, Bytes::from_owner(value))?;
            bytes += item.cost();
            items.push(item);
            if items.len() >= items_max || bytes >= bytes_max {
                break;
            }
        }
        Ok(items)
    }

    /// Hops from device to device over the pending items, and into those whose oldest one is old enough.
    fn expired(&self, before: UnixMillis, after: Option<DeviceAddr>, devices_max: usize) -> Result<Vec<(DeviceAddr, Seq)>, StoreError> {
        let snapshot = self.db.snapshot();
        let mut from = after.map_or([0; 17], keyspace::behind_device);
        let mut found = Vec::new();
        while found.len() < devices_max {
            let mut rows = snapshot.range(&self.pending, from.as_slice()..);
            let (mut device, mut to) = (None, None);
            for row in &mut rows {
                let (key, value) = row.into_inner().map_err(unavailable)?;
                let (this, seq) = keyspace::parse_pending(&key)?;
                if *device.get_or_insert(this) != this {
                    break;
                }
                match keyspace::pending_accepted(&value)? {
                    Some(accepted) if accepted < before => to = Some(seq),
                    Some(_) => break,
                    // Receipts carry no time: they go with the envelopes behind them.
                    None => {}
                }
            }
            let Some(device) = device else { break };
            if let Some(to) = to {
                found.push((device, to));
            }
            from = keyspace::behind_device(device);
        }
        Ok(found)
    }

    /// One batch, no sync: see the module's own words on the view's journal.
    pub(super) fn write_delivery(&self, write: &DeliveryWrite) -> Result<(), StoreError> {
        let mut gone = Removal { view: self, pending: BTreeSet::new(), inboxes: BTreeSet::new(), marks: BTreeSet::new() };
        for (account, _) in &write.remove_accounts {
            gone.account(*account)?;
        }
        for (device, _) in &write.remove_devices {
            gone.device(*device)?;
        }
        for (device, to) in &write.drop_to {
            gone.up_to(*device, *to)?;
        }

        let mut batch = self.db.batch();
        let mut value = Vec::new();
        for (device, item) in &write.put {
            let key = keyspace::pending(*device, item.seq);
            gone.pending.remove(&key);
            value.clear();
            keyspace::encode_pending(&item.body, &mut value);
            batch.insert(&self.pending, key, Slice::from(value.as_slice()));
        }
        for (device, state) in &write.inboxes {
            let key = keyspace::device(*device);
            gone.inboxes.remove(&key);
            batch.insert(&self.inboxes, key, keyspace::encode(state));
        }
        for (key, mark) in &write.marks {
            let key = keyspace::mark(key);
            gone.marks.remove(&key);
            batch.insert(&self.marks, key, keyspace::encode(mark));
        }
        for (partition, offset) in &write.positions {
            batch.insert(&self.positions, keyspace::position(keyspace::TOPIC_INBOX, *partition), keyspace::encode_offset(*offset));
        }
        gone.pending.into_iter().for_each(|key| batch.remove(&self.pending, key));
        gone.inboxes.into_iter().for_each(|key| batch.remove(&self.inboxes, key));
        gone.marks.into_iter().for_each(|key| batch.remove(&self.marks, key));
        batch.commit().map_err(unavailable)
    }
}

/// Keys that a write takes away.
struct Removal<'a> {
    view: &'a View,
    pending: BTreeSet<[u8; 25]>,
    inboxes: BTreeSet<[u8; 17]>,
    marks: BTreeSet<[u8; 33]>,
}

impl Removal<'_> {
    fn account(&mut self, account: AccountId) -> Result<(), StoreError> {
        let prefix = account.as_bytes();
        self.pending_rows(self.view.pending.prefix(prefix))?;
        keys_of(self.view.inboxes.prefix(prefix), &mut self.inboxes)?;
        keys_of(self.view.marks.prefix(prefix), &mut self.marks)
    }

    fn device(&mut self, device: DeviceAddr) -> Result<(), StoreError> {
        self.inboxes.insert(keyspace::device(device));
        self.pending_rows(self.view.pending.prefix(keyspace::device(device)))
    }

    /// Everything up to a cursor that is stored already was dropped when it was stored: the scan starts behind it
    /// and never walks over the remains. A drop to before that cursor is after items that were put early, ahead of a position that
    /// a crash then took back: it looks everywhere.
    fn up_to(&mut self, device: DeviceAddr, to: Seq) -> Result<(), StoreError> {
        let stored = self.view.inboxes.get(keyspace::device(device)).map_err(unavailable)?;
        let stored = stored.map(|value| keyspace::decode_inbox(&value)).transpose()?.unwrap_or_default();
        let settled = stored.cursor.max(stored.expired_to);
        let from = if settled < to { Seq(settled.0 + 1) } else { Seq::ZERO };
        keys_of(self.view.pending.range(keyspace::pending(device, from)..=keyspace::pending(device, to)), &mut self.pending)
    }

    fn pending_rows(&mut self, rows: fjall::Iter) -> Result<(), StoreError> {
        let mut chunk = Vec::new();
        for row in rows {
            chunk.push(row.key().map_err(unavailable)?);
            if chunk.len() == REMOVE_CHUNK {
                let mut batch = self.view.db.batch();
                chunk.drain(..).for_each(|key| batch.remove(&self.view.pending, key));
                batch.commit().map_err(unavailable)?;
            }
        }
        for key in chunk {
            self.pending.insert(exact(&key)?);
        }
        Ok(())
    }
}

fn exact<const N: usize>(key: &[u8]) -> Result<[u8; N], StoreError> {
    key.try_into().map_err(|_| StoreError::Corrupt("a key has the wrong length".into()))
}

fn keys_of<const N: usize>(rows: fjall::Iter, into: &mut BTreeSet<[u8; N]>) -> Result<(), StoreError> {
    for row in rows {
        into.insert(exact(&row.key().map_err(unavailable)?)?);
    }
    Ok(())
}
