//! Ids as SQLite values, and the single values of the `meta` table.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension as _, params};

use crate::client::core::content::MessageId;
use crate::client::types::ConversationId;
use crate::ids::{AccountId, DeviceId, GroupId};

impl ToSql for AccountId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Blob(self.as_bytes())))
    }
}

impl ToSql for GroupId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Blob(self.as_bytes())))
    }
}

impl FromSql for AccountId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Self::from_slice(value.as_blob()?).map_err(|error| FromSqlError::Other(Box::new(error)))
    }
}

impl FromSql for GroupId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Self::from_slice(value.as_blob()?).map_err(|error| FromSqlError::Other(Box::new(error)))
    }
}

/// What stands before a group's id where both may stand: an account's is its 16 bytes alone.
const GROUP: u8 = b'g';

impl ToSql for ConversationId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(match self {
            Self::Account(account) => ToSqlOutput::Borrowed(ValueRef::Blob(account.as_bytes())),
            Self::Group(group) => ToSqlOutput::from([&[GROUP], group.as_bytes().as_slice()].concat()),
        })
    }
}

impl FromSql for ConversationId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        match value.as_blob()? {
            [GROUP, group @ ..] if group.len() == 16 => {
                GroupId::from_slice(group).map(Self::Group).map_err(|error| FromSqlError::Other(Box::new(error)))
            }
            account => AccountId::from_slice(account).map(Self::Account).map_err(|error| FromSqlError::Other(Box::new(error))),
        }
    }
}

impl ToSql for MessageId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Blob(&self.0)))
    }
}

impl FromSql for MessageId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let bytes = value.as_blob()?.try_into().map_err(|_| FromSqlError::InvalidType)?;
        Ok(Self(bytes))
    }
}

impl ToSql for DeviceId {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(self.get()))
    }
}

impl FromSql for DeviceId {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let number = u32::column_result(value)?;
        Self::new(number).map_err(|error| FromSqlError::Other(Box::new(error)))
    }
}

/// SQLite's integers are signed; ours that go there (times, ids, counts) stay far below 2^63.
pub(super) fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The way back.
pub(super) fn uint(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}

/// A value of the `meta` table.
pub(super) fn meta(connection: &Connection, key: &str) -> rusqlite::Result<Option<Vec<u8>>> {
    connection.prepare_cached("SELECT value FROM meta WHERE key = ?1")?.query_row([key], |row| row.get(0)).optional()
}

/// Sets a value of the `meta` table.
pub(super) fn set_meta(connection: &Connection, key: &str, value: &[u8]) -> rusqlite::Result<()> {
    let mut statement = connection.prepare_cached("INSERT INTO meta VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = ?2")?;
    statement.execute(params![key, value]).map(|_| ())
}

/// Removes a value of the `meta` table.
pub(super) fn remove_meta(connection: &Connection, key: &str) -> rusqlite::Result<()> {
    connection.prepare_cached("DELETE FROM meta WHERE key = ?1")?.execute([key]).map(|_| ())
}

/// A number of the `meta` table; 0 if it was never set.
pub(super) fn meta_number(connection: &Connection, key: &str) -> rusqlite::Result<u64> {
    let bytes = meta(connection, key)?.unwrap_or_default();
    Ok(bytes.as_slice().try_into().map(u64::from_be_bytes).unwrap_or_default())
}

/// Sets a number of the `meta` table.
pub(super) fn set_meta_number(connection: &Connection, key: &str, number: u64) -> rusqlite::Result<()> {
    set_meta(connection, key, &number.to_be_bytes())
}
