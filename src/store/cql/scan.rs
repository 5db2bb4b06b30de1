//! Whole tables, page by page, for comparing one view with another. Rows come in the servers' order, as they are while they are read.

use futures_util::stream::{self, Stream};
use scylla::deserialize::row::DeserializeRow;
use scylla::response::{PagingState, PagingStateResponse};
use scylla::statement::prepared::PreparedStatement;

use super::delivery::parse_device;
use super::{CqlStore, closed, corrupt, unavailable};
use crate::ids::{AccountId, DeviceAddr, GroupId, Identity};
use crate::store::{DeviceKeys, InboxState, Mark, MarkKey, StoreError, keyspace};
use crate::wire::event::AccountRecord;

impl CqlStore {
    /// Every inbox.
    pub fn all_inboxes(&self) -> impl Stream<Item = Result<Vec<(DeviceAddr, InboxState)>, StoreError>> {
        self.all(&self.statements.inboxes_all, |(account, device, state): (Vec<u8>, i8, Vec<u8>)| {
            Ok((parse_device(&account, device)?, keyspace::decode_inbox(&state)?))
        })
    }

    /// Every mark.
    pub fn all_marks(&self) -> impl Stream<Item = Result<Vec<(MarkKey, Mark)>, StoreError>> {
        self.all(&self.statements.marks_all, |(recipient, sender, mark): (Vec<u8>, Vec<u8>, Vec<u8>)| {
            let recipient = account(&recipient)?;
            Ok((MarkKey { recipient, sender: keyspace::parse_device(&sender)? }, keyspace::decode(&mark, "a mark")?))
        })
    }

    /// Every account, deleted ones too.
    pub fn all_accounts(&self) -> impl Stream<Item = Result<Vec<(AccountId, AccountRecord)>, StoreError>> {
        self.all(&self.statements.accounts_all, |(record,): (Vec<u8>,)| {
            let record: AccountRecord = keyspace::decode(&record, "an account")?;
            Ok((record.id, record))
        })
    }

    /// Every link of an identity.
    pub fn all_identities(&self) -> impl Stream<Item = Result<Vec<(Identity, AccountId)>, StoreError>> {
        self.all(&self.statements.identities_all, |(identity, id): (String, Vec<u8>)| {
            Ok((identity.parse().map_err(|_| corrupt(&"an identity"))?, account(&id)?))
        })
    }

    /// Every device's prekeys.
    pub fn all_device_keys(&self) -> impl Stream<Item = Result<Vec<(DeviceAddr, DeviceKeys)>, StoreError>> {
        self.all(&self.statements.keys_all, |(account, device, keys): (Vec<u8>, i8, Vec<u8>)| {
            Ok((parse_device(&account, device)?, keyspace::decode(&keys, "a device's keys")?))
        })
    }

    /// Every group, closed ones too.
    pub fn all_groups(&self) -> impl Stream<Item = Result<Vec<(GroupId, ())>, StoreError>> {
        self.all(&self.statements.groups_all, |(id,): (Vec<u8>,)| Ok((GroupId::from_slice(&id).map_err(|error| corrupt(&error))?, ())))
    }

    /// Every account that is in a group.
    pub fn all_group_members(&self) -> impl Stream<Item = Result<Vec<(AccountId, ())>, StoreError>> {
        self.all(&self.statements.group_members_all, |(id,): (Vec<u8>,)| Ok((account(&id)?, ())))
    }

    fn all<'a, R, T>(
        &'a self,
        statement: &'a PreparedStatement,
        parse: impl Fn(R) -> Result<T, StoreError> + Copy + 'a,
    ) -> impl Stream<Item = Result<Vec<T>, StoreError>>
    where
        R: for<'frame, 'metadata> DeserializeRow<'frame, 'metadata>,
    {
        stream::try_unfold(Some(PagingState::start()), move |from| async move {
            let Some(from) = from else { return Ok(None) };
            let _room = self.room.acquire().await.map_err(|_| closed())?;
            let (page, next) = self.session.execute_single_page(statement, (), from).await.map_err(unavailable)?;
            let page = page.into_rows_result().map_err(|error| corrupt(&error))?;
            let rows = page.rows::<R>().map_err(|error| corrupt(&error))?;
            let rows = rows.map(|row| parse(row.map_err(|error| corrupt(&error))?)).collect::<Result<Vec<T>, StoreError>>()?;
            let next = match next {
                PagingStateResponse::HasMorePages { state } => Some(state),
                PagingStateResponse::NoMorePages => None,
            };
            Ok(Some((rows, next)))
        })
    }
}

fn account(bytes: &[u8]) -> Result<AccountId, StoreError> {
    AccountId::from_slice(bytes).map_err(|error| corrupt(&error))
}
