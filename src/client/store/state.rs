//! The core's state in tables.

use rusqlite::{Connection, OptionalExtension as _, ToSql, params};
use zeroize::Zeroizing;

use super::sql;
use crate::client::core::state::{StateKey, StateRead, StorageError, Writes};
use crate::clock::UnixMillis;

/// State as the open transaction sees it.
pub(super) struct SqlState<'c>(pub &'c Connection);

impl StateRead for SqlState<'_> {
    fn get(&self, key: &StateKey) -> Result<Option<Zeroizing<Vec<u8>>>, StorageError> {
        read(self.0, key).map(|value| value.map(Zeroizing::new)).map_err(|error| StorageError(error.to_string()))
    }
}

fn read(connection: &Connection, key: &StateKey) -> rusqlite::Result<Option<Vec<u8>>> {
    let one = |query: &str, parameters: &[&dyn ToSql]| -> rusqlite::Result<Option<Vec<u8>>> {
        connection.prepare_cached(query)?.query_row(parameters, |row| row.get(0)).optional()
    };
    match key {
        StateKey::OwnIdentity => sql::meta(connection, "own_identity"),
        StateKey::OwnRegistration => sql::meta(connection, "own_registration"),
        StateKey::OwnAddress => sql::meta(connection, "own_address"),
        StateKey::Cursor => sql::meta(connection, "cursor"),
        StateKey::Session(with) => one("SELECT record FROM sessions WHERE account = ?1 AND device = ?2", &[&with.account, &with.device]),
        StateKey::RemoteIdentity(of) => {
            one("SELECT key FROM remote_identities WHERE account = ?1 AND device = ?2", &[&of.account, &of.device])
        }
        StateKey::PreKey(id) => one("SELECT record FROM prekeys WHERE id = ?1", &[id]),
        StateKey::SignedPreKey(id) => one("SELECT record FROM signed_prekeys WHERE id = ?1", &[id]),
        StateKey::KyberPreKey(id) => one("SELECT record FROM kyber_prekeys WHERE id = ?1 AND last_resort = 0", &[id]),
        StateKey::KyberLastResort(id) => one("SELECT record FROM kyber_prekeys WHERE id = ?1 AND last_resort = 1", &[id]),
        StateKey::KyberUsed { kyber, signed, base_key } => {
            one("SELECT x'' FROM kyber_used WHERE kyber = ?1 AND signed = ?2 AND base_key = ?3", &[kyber, signed, base_key])
        }
        StateKey::Seen { author, message_id } => {
            one("SELECT x'' FROM seen WHERE author = ?1 AND message_id = ?2", &[author, &message_id.as_slice()])
        }
        StateKey::GroupSigner(suite) => one("SELECT key FROM group_signers WHERE suite = ?1", &[suite]),
        StateKey::GroupNameKey(group) => one("SELECT key FROM group_name_keys WHERE mls_group = ?1", &[group]),
        StateKey::Mls { kind, key } => one("SELECT value FROM mls WHERE kind = ?1 AND key = ?2", &[&(*kind as u8), key]),
    }
}

/// Writes what a core transaction collected, into the transaction that is open.
pub(super) fn apply(connection: &Connection, writes: Writes, now: UnixMillis) -> rusqlite::Result<()> {
    for (key, value) in writes {
        match value {
            Some(value) => put(connection, &key, &value, sql::int(now.0))?,
            None => delete(connection, &key)?,
        }
    }
    Ok(())
}

fn put(connection: &Connection, key: &StateKey, value: &[u8], now: i64) -> rusqlite::Result<()> {
    let run = |query: &str, parameters: &[&dyn ToSql]| connection.prepare_cached(query)?.execute(parameters).map(|_| ());
    match key {
        StateKey::OwnIdentity => sql::set_meta(connection, "own_identity", value),
        StateKey::OwnRegistration => sql::set_meta(connection, "own_registration", value),
        StateKey::OwnAddress => sql::set_meta(connection, "own_address", value),
        StateKey::Cursor => sql::set_meta(connection, "cursor", value),
        StateKey::Session(with) => run("INSERT OR REPLACE INTO sessions VALUES (?1, ?2, ?3)", &[&with.account, &with.device, &value]),
        StateKey::RemoteIdentity(of) => {
            run("INSERT OR REPLACE INTO remote_identities VALUES (?1, ?2, ?3)", &[&of.account, &of.device, &value])
        }
        StateKey::PreKey(id) => run("INSERT OR REPLACE INTO prekeys VALUES (?1, ?2)", &[id, &value]),
        StateKey::SignedPreKey(id) => run("INSERT OR REPLACE INTO signed_prekeys VALUES (?1, ?2, ?3)", &[id, &value, &now]),
        StateKey::KyberPreKey(id) => run("INSERT OR REPLACE INTO kyber_prekeys VALUES (?1, ?2, 0, ?3)", &[id, &value, &now]),
        StateKey::KyberLastResort(id) => run("INSERT OR REPLACE INTO kyber_prekeys VALUES (?1, ?2, 1, ?3)", &[id, &value, &now]),
        StateKey::KyberUsed { kyber, signed, base_key } => {
            run("INSERT OR IGNORE INTO kyber_used VALUES (?1, ?2, ?3)", &[kyber, signed, base_key])
        }
        StateKey::Seen { author, message_id } => {
            run("INSERT OR IGNORE INTO seen VALUES (?1, ?2, ?3)", &[author, &message_id.as_slice(), &now])
        }
        StateKey::GroupSigner(suite) => run("INSERT OR REPLACE INTO group_signers VALUES (?1, ?2)", &[suite, &value]),
        StateKey::GroupNameKey(group) => run("INSERT OR REPLACE INTO group_name_keys VALUES (?1, ?2)", &[group, &value]),
        StateKey::Mls { kind, key } => run(
            "INSERT INTO mls VALUES (?1, ?2, ?3, ?4) ON CONFLICT (kind, key) DO UPDATE SET value = ?3",
            &[&(*kind as u8), key, &value, &now],
        ),
    }
}

fn delete(connection: &Connection, key: &StateKey) -> rusqlite::Result<()> {
    let run = |query: &str, parameters: &[&dyn ToSql]| connection.prepare_cached(query)?.execute(parameters).map(|_| ());
    let meta = |key: &str| run("DELETE FROM meta WHERE key = ?1", &[&key]);
    match key {
        StateKey::OwnIdentity => meta("own_identity"),
        StateKey::OwnRegistration => meta("own_registration"),
        StateKey::OwnAddress => meta("own_address"),
        StateKey::Cursor => meta("cursor"),
        StateKey::Session(with) => run("DELETE FROM sessions WHERE account = ?1 AND device = ?2", params![with.account, with.device]),
        StateKey::RemoteIdentity(of) => {
            run("DELETE FROM remote_identities WHERE account = ?1 AND device = ?2", params![of.account, of.device])
        }
        StateKey::PreKey(id) => run("DELETE FROM prekeys WHERE id = ?1", params![id]),
        StateKey::SignedPreKey(id) => run("DELETE FROM signed_prekeys WHERE id = ?1", params![id]),
        StateKey::KyberPreKey(id) => run("DELETE FROM kyber_prekeys WHERE id = ?1 AND last_resort = 0", params![id]),
        StateKey::KyberLastResort(id) => run("DELETE FROM kyber_prekeys WHERE id = ?1 AND last_resort = 1", params![id]),
        StateKey::KyberUsed { kyber, signed, base_key } => {
            run("DELETE FROM kyber_used WHERE kyber = ?1 AND signed = ?2 AND base_key = ?3", params![kyber, signed, base_key])
        }
        StateKey::Seen { author, message_id } => {
            run("DELETE FROM seen WHERE author = ?1 AND message_id = ?2", params![author, message_id.as_slice()])
        }
        StateKey::GroupSigner(suite) => run("DELETE FROM group_signers WHERE suite = ?1", params![suite]),
        StateKey::GroupNameKey(group) => run("DELETE FROM group_name_keys WHERE mls_group = ?1", params![group]),
        StateKey::Mls { kind, key } => run("DELETE FROM mls WHERE kind = ?1 AND key = ?2", params![*kind as u8, key]),
    }
}
