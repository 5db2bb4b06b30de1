//! Accounts, devices and long-lived public keys.

use async_trait::async_trait;

use super::{CqlStore, all, corrupt, gather, number};
use crate::ids::{AccountId, DeviceAddr, Identity, Offset, Partition};
use crate::store::{DeviceKeys, DirectoryStore, DirectoryWrite, StoreError, keyspace};
use crate::wire::event::AccountRecord;

#[async_trait]
impl DirectoryStore for CqlStore {
    async fn directory_position(&self, partition: Partition) -> Result<Offset, StoreError> {
        self.position_of(keyspace::TOPIC_DIRECTORY, partition).await
    }

    async fn write_directory(&self, write: DirectoryWrite) -> Result<(), StoreError> {
        // Keys and links before accounts: an account's row says which commands it holds, with all that belongs to them.
        let at = write.position.map_or(0, |(_, next)| number(next.0));
        all(gather(write.keys.iter().map(|(device, keys)| self.put_keys(device, keys.as_ref(), at)))).await?;
        all(gather(write.unlinked.iter().map(|(identity, account)| self.unlink(identity, account, at)))).await?;
        // A deletion beats a row of the same timestamp; what stands in both lists is linked in the end.
        all(gather(write.linked.iter().map(|(identity, account)| self.link(identity, account, at + 1)))).await?;
        all(gather(write.accounts.iter().map(|account| self.put_account(account)))).await?;
        match write.position {
            Some((partition, next)) => self.put_position(keyspace::TOPIC_DIRECTORY, partition, next).await,
            None => Ok(()),
        }
    }

    async fn account(&self, id: AccountId) -> Result<Option<AccountRecord>, StoreError> {
        let rows = self.rows(&self.statements.account_get, (&id.as_bytes()[..],)).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(record,)| keyspace::decode(record, "an account")).transpose()
    }

    async fn identity(&self, identity: &Identity) -> Result<Option<AccountId>, StoreError> {
        let rows = self.rows(&self.statements.identity_get, (identity.to_string(),)).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(account,)| AccountId::from_slice(account).map_err(|error| corrupt(&error))).transpose()
    }

    async fn device_keys(&self, device: DeviceAddr) -> Result<Option<DeviceKeys>, StoreError> {
        let rows = self.rows(&self.statements.keys_get, (&device.account.as_bytes()[..], device.device.get() as i8)).await?;
        let row = rows.maybe_first_row::<(&[u8],)>().map_err(|error| corrupt(&error))?;
        row.map(|(keys,)| keyspace::decode(keys, "a device's keys")).transpose()
    }
}

impl CqlStore {
    async fn put_account(&self, account: &AccountRecord) -> Result<(), StoreError> {
        let values = (&account.id.as_bytes()[..], keyspace::encode(account), number(account.applied.0));
        self.execute(&self.statements.account_put, values).await
    }

    async fn put_keys(&self, device: &DeviceAddr, keys: Option<&DeviceKeys>, at: i64) -> Result<(), StoreError> {
        let (account, device) = (&device.account.as_bytes()[..], device.device.get() as i8);
        match keys {
            Some(keys) => self.execute(&self.statements.keys_put, (account, device, keyspace::encode(keys), at)).await,
            None => self.execute(&self.statements.keys_drop, (at, account, device)).await,
        }
    }

    async fn link(&self, identity: &Identity, account: &AccountId, at: i64) -> Result<(), StoreError> {
        self.execute(&self.statements.identity_put, (identity.to_string(), &account.as_bytes()[..], at)).await
    }

    async fn unlink(&self, identity: &Identity, account: &AccountId, at: i64) -> Result<(), StoreError> {
        self.execute(&self.statements.identity_drop, (at, identity.to_string(), &account.as_bytes()[..])).await
    }
}
