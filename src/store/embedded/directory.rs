//! Accounts, devices and long-lived public keys.

use async_trait::async_trait;
use fjall::Readable as _;

use super::{EmbeddedStore, View, blocking, unavailable};
use crate::ids::{AccountId, DeviceAddr, Identity, Offset, Partition};
use crate::store::{DeviceKeys, DirectoryStore, DirectoryWrite, StoreError, keyspace};
use crate::wire::event::AccountRecord;

#[async_trait]
impl DirectoryStore for EmbeddedStore {
    async fn directory_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        let view = self.view();
        blocking(move || view.position(keyspace::TOPIC_DIRECTORY, partition)).await
    }

    async fn write_directory(&self, write: DirectoryWrite) -> Result<(), StoreError> {
        let view = self.view();
        blocking(move || view.write_directory(&write)).await
    }

    async fn account(&self, id: AccountId) -> Result<Option<AccountRecord>, StoreError> {
        let view = self.view();
        blocking(move || {
            let value = view.db.snapshot().get(&view.accounts, id.as_bytes()).map_err(unavailable)?;
            value.map(|value| keyspace::decode(&value, "an account")).transpose()
        })
        .await
    }

    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        let (view, prefix) = (self.view(), keyspace::identity(identity));
        blocking(move || match view.db.snapshot().prefix(&view.identities, prefix).next() {
            Some(row) => keyspace::parse_link(&row.key().map_err(unavailable)?).map(Some),
            None => Ok(None),
        })
        .await
    }

    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError> {
        let view = self.view();
        blocking(move || {
            let value = view.db.snapshot().get(&view.device_keys, keyspace::device(device)).map_err(unavailable)?;
            value.map(|value| keyspace::decode(&value, "a device's keys")).transpose()
        })
        .await
    }
}

impl View {
    fn write_directory(&self, write: &DirectoryWrite) -> Result<(), StoreError> {
        let mut batch = self.db.batch();
        for account in &write.accounts {
            batch.insert(&self.accounts, account.id.as_bytes(), keyspace::encode(account));
        }
        for (device, keys) in &write.keys {
            let key = keyspace::device(*device);
            match keys {
                Some(keys) => batch.insert(&self.device_keys, key, keyspace::encode(keys)),
                None => batch.remove(&self.device_keys, key),
            }
        }
        for (identity, account) in &write.unlinked {
            batch.remove(&self.identities, keyspace::link(identity, *account));
        }
        // Behind the removals: of two changes of one key in a batch the later one stands.
        for (identity, account) in &write.linked {
            batch.insert(&self.identities, keyspace::link(identity, *account), [keyspace::VERSION]);
        }
        if let Some((partition, offset)) = write.position {
            batch.insert(&self.positions, keyspace::position(keyspace::TOPIC_DIRECTORY, partition), keyspace::encode_offset(offset));
        }
        batch.commit().map_err(unavailable)
    }
}
