//! Events for the application, numbered.

use rusqlite::{Connection, params};

use super::{Db, Error, sql};
use crate::client::types::Event;

/// Events kept at most; an application that is further behind than this reads the history instead.
const KEPT: u64 = 200_000;

pub(super) fn newest(connection: &Connection) -> rusqlite::Result<u64> {
    connection.query_row("SELECT coalesce(max(position), 0) FROM events", [], |row| row.get(0)).map(sql::uint)
}

impl Db {
    /// Adds an event to the transaction.
    pub(super) fn tell(&self, event: &Event) -> Result<(), Error> {
        let json = serde_json::to_string(event).map_err(|error| Error::Damaged(error.to_string()))?;
        let mut insert = self.connection.prepare_cached("INSERT INTO events (at_ms, event) VALUES (?1, ?2)")?;
        insert.execute(params![sql::int(self.now().0), json])?;
        let position = self.connection.last_insert_rowid();
        if sql::uint(position).is_multiple_of(1_000) {
            let oldest = sql::int(sql::uint(position).saturating_sub(KEPT));
            self.connection.execute("DELETE FROM events WHERE position < ?1", [oldest])?;
        }
        self.mark(|changed| changed.events = true);
        Ok(())
    }

    /// Events behind a position, oldest first. Messages are as they are now, so that nothing deleted comes back.
    pub(in crate::client) fn events_after(&self, position: u64, limit: usize) -> Result<Vec<(u64, Event)>, Error> {
        let mut select =
            self.connection.prepare_cached("SELECT position, event FROM events WHERE position > ?1 ORDER BY position LIMIT ?2")?;
        let rows = select.query_map(params![sql::int(position), limit as i64], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let rows: Vec<(i64, String)> = rows.collect::<rusqlite::Result<_>>()?;
        let mut events = Vec::with_capacity(rows.len());
        for (position, json) in rows {
            let mut event = serde_json::from_str(&json).map_err(|error| Error::Damaged(error.to_string()))?;
            if let Event::Message { author, message_id, message, .. } = &mut event {
                *message = self.message(*author, *message_id)?.map(Box::new);
            }
            events.push((sql::uint(position), event));
        }
        Ok(events)
    }

    /// Up to where the built-in consumer has handled events.
    pub(in crate::client) fn consumer_position(&self) -> Result<u64, Error> {
        Ok(sql::meta_number(&self.connection, "consumer_position")?)
    }

    /// The built-in consumer has handled events up to here.
    pub(in crate::client) fn set_consumer_position(&self, position: u64) -> Result<(), Error> {
        if position > self.consumer_position()? {
            sql::set_meta_number(&self.connection, "consumer_position", position)?;
        }
        Ok(())
    }
}
