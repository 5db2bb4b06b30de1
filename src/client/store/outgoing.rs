//! What this device sends: encrypted once, kept until answered, sent again as it is.

use bytes::Bytes;
use prost::Message as _;
use rusqlite::{OptionalExtension as _, params};

use super::account::FIRST_MESSAGE_ID;
use super::{Db, Error, sql};
use crate::client::core::content::{self, Content, Kind, MessageId};
use crate::client::core::repair::{self, Answer, Next, Plan};
use crate::client::core::signal::{self, Bundle};
use crate::client::types::{Event, Failure, Status, Trust};
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId};
use crate::limits;
use crate::wire::stream::{Code, OutgoingEnvelope, Send};

const WAITING: i64 = 0;
const READY: i64 = 1;
const ACCEPTED: i64 = 2;

/// How far a message may run ahead of an unanswered one to the same account: within the server's window of ids, with room.
const IDS_AHEAD: u64 = limits::MESSAGE_ID_WINDOW - 8;

/// A message that can be sent now.
pub(in crate::client) struct Ready {
    /// Its row; also the request id.
    pub id: u64,
    /// The request.
    pub send: Send,
}

/// How something is sent, and which message it is part of.
#[derive(Clone, Copy, Default)]
pub(super) struct Sending {
    pub urgent: bool,
    pub ephemeral: bool,
    /// Whose text the content holds.
    pub message: Option<MessageId>,
    /// Whether its fate is the message's.
    pub tick: bool,
}

struct Row {
    recipient: AccountId,
    id: ClientMessageId,
    content: Option<Vec<u8>>,
    message: Option<MessageId>,
    tick: bool,
    envelopes: Option<Vec<u8>>,
    urgent: bool,
    ephemeral: bool,
    state: i64,
    attempts: u32,
    rounds: u32,
    resends: u32,
}

impl Db {
    /// Puts a content on its way: under the next client message id, encrypted now if there are sessions, else as soon as there are.
    pub(super) fn enqueue(&self, to: AccountId, content: &Content, how: Sending) -> Result<i64, Error> {
        content::check(content)?;
        self.contact(to)?;
        let id = self.next_id(to)?;
        let mut insert = self.connection.prepare_cached(
            "INSERT INTO outgoing (recipient, client_message_id, content, message_id, tick, urgent, ephemeral, state, created_ms)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?;
        let created = sql::int(self.now().0);
        insert.execute(params![
            to,
            sql::int(id.0),
            content.encode_to_vec(),
            how.message,
            how.tick,
            how.urgent,
            how.ephemeral,
            WAITING,
            created
        ])?;
        let row = self.connection.last_insert_rowid();
        self.seal(row)?;
        Ok(row)
    }

    fn next_id(&self, to: AccountId) -> Result<ClientMessageId, Error> {
        // Another device may have had this one's number: what it used would be taken for a repeat.
        let first = sql::meta_number(&self.connection, FIRST_MESSAGE_ID)?.max(1);
        let mut next = self
            .connection
            .prepare_cached("INSERT INTO counters VALUES (?1, ?2) ON CONFLICT (account) DO UPDATE SET last = last + 1 RETURNING last")?;
        Ok(ClientMessageId(sql::uint(next.query_row(params![to, sql::int(first)], |row| row.get(0))?)))
    }

    fn row(&self, id: i64) -> Result<Option<Row>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT recipient, client_message_id, content, message_id, tick, envelopes, urgent, ephemeral, state, attempts, rounds, resends
             FROM outgoing WHERE id = ?1",
        )?;
        let row = select.query_row([id], |row| {
            Ok(Row {
                recipient: row.get(0)?,
                id: ClientMessageId(sql::uint(row.get(1)?)),
                content: row.get(2)?,
                message: row.get(3)?,
                tick: row.get(4)?,
                envelopes: row.get(5)?,
                urgent: row.get(6)?,
                ephemeral: row.get(7)?,
                state: row.get(8)?,
                attempts: row.get(9)?,
                rounds: row.get(10)?,
                resends: row.get(11)?,
            })
        });
        Ok(row.optional()?)
    }

    /// Encrypts for the devices that have no envelope yet. Waits if a session is missing or the person must look at keys first;
    /// envelopes that are there stay as they are.
    fn seal(&self, id: i64) -> Result<(), Error> {
        let Some(row) = self.row(id)?.filter(|row| row.state == WAITING) else { return Ok(()) };
        let to = row.recipient;
        if self.is_deleted(to)? {
            return self.fail(id, &row, Failure::AccountDeleted);
        }
        self.mark(|changed| changed.outgoing = true);
        let held = !self.devices_known(to)? || self.trust(to)? == Trust::Changed;
        let devices = self.devices(to)?;
        let mut send = row.envelopes.as_deref().map(Send::decode).transpose().map_err(damaged)?.unwrap_or_default();
        send.envelopes.retain(|envelope| devices.iter().any(|device| u32::from(device.get()) == envelope.device_id));
        let lacks = |device: &&DeviceId| !send.envelopes.iter().any(|envelope| envelope.device_id == u32::from(device.get()));
        let missing: Vec<DeviceId> = devices.iter().filter(lacks).copied().collect();
        let mut ready = !held;
        for device in &missing {
            ready = ready && self.has_session(DeviceAddr { account: to, device: *device })?;
        }
        if !ready {
            return if row.ephemeral { self.delete_outgoing(id) } else { self.store_envelopes(id, &send, WAITING) };
        }
        if devices.is_empty() {
            // One's own account without other devices (nothing to do), or somebody's without any (nobody to reach).
            if to == self.own()?.account {
                return self.accepted(id, &row);
            }
            // Somebody may come back: the next message looks again.
            self.connection.execute("UPDATE contacts SET devices_known = 0 WHERE account = ?1", [to])?;
            return self.fail(id, &row, Failure::NoSuchAccount);
        }
        let Some(stored) = &row.content else { return self.delete_outgoing(id) };
        match self.encrypt(to, &missing, stored) {
            Ok(envelopes) => send.envelopes.extend(envelopes),
            Err(Error::Signal(signal::Error::TooLarge)) => return self.fail(id, &row, Failure::TooLarge),
            Err(error) => return Err(error),
        }
        self.store_envelopes(id, &send, READY)
    }

    fn encrypt(&self, to: AccountId, devices: &[DeviceId], stored: &[u8]) -> Result<Vec<OutgoingEnvelope>, Error> {
        let plaintext = content::pad(stored.to_vec());
        let (now, random) = (self.now(), self.random.clone());
        self.core(|tx| {
            let encrypt = |device: &DeviceId| {
                let ciphertext = signal::encrypt(tx, DeviceAddr { account: to, device: *device }, &plaintext, now, &*random)?;
                Ok(OutgoingEnvelope {
                    device_id: u32::from(device.get()),
                    registration_id: ciphertext.registration_id.get(),
                    r#type: i32::from(ciphertext.kind),
                    content: ciphertext.bytes.into(),
                })
            };
            devices.iter().map(encrypt).collect::<Result<Vec<_>, signal::Error>>()
        })
    }

    fn store_envelopes(&self, id: i64, send: &Send, state: i64) -> Result<(), Error> {
        let envelopes = (!send.envelopes.is_empty()).then(|| send.encode_to_vec());
        let mut update = self.connection.prepare_cached("UPDATE outgoing SET envelopes = ?2, state = ?3 WHERE id = ?1")?;
        update.execute(params![id, envelopes, state])?;
        Ok(())
    }

    fn delete_outgoing(&self, id: i64) -> Result<(), Error> {
        self.connection.prepare_cached("DELETE FROM outgoing WHERE id = ?1")?.execute([id])?;
        Ok(())
    }

    /// Messages that can be sent now and are not `in_flight`, in order. For one account, a message waits for those before it that
    /// wait, and never runs too far ahead of one that is unanswered.
    pub(in crate::client) fn ready(&self, in_flight: &[u64], limit: usize) -> Result<Vec<Ready>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT id, recipient, client_message_id, urgent, ephemeral, envelopes FROM outgoing AS o
             WHERE state = 1 AND state < 2 AND not_before_ms <= ?1 AND NOT EXISTS (
                 SELECT 1 FROM outgoing AS e WHERE e.state < 2 AND e.recipient = o.recipient
                 AND e.client_message_id < o.client_message_id
                 AND (e.state = 0 OR e.not_before_ms > ?1 OR e.client_message_id + ?2 < o.client_message_id))
             ORDER BY id",
        )?;
        let mut rows = select.query(params![sql::int(self.now().0), sql::int(IDS_AHEAD)])?;
        let mut ready = Vec::new();
        while let Some(row) = rows.next()? {
            let id = sql::uint(row.get(0)?);
            if in_flight.contains(&id) {
                continue;
            }
            let recipient: AccountId = row.get(1)?;
            let stored = row.get_ref(5)?.as_blob().map_err(damaged)?;
            let send = Send {
                request_id: id,
                recipient: Bytes::copy_from_slice(recipient.as_bytes()),
                client_message_id: sql::uint(row.get(2)?),
                urgent: row.get(3)?,
                ephemeral: row.get(4)?,
                ..Send::decode(stored).map_err(damaged)?
            };
            ready.push(Ready { id, send });
            if ready.len() >= limit {
                break;
            }
        }
        Ok(ready)
    }

    /// Accounts that messages wait for, and that something can be done about.
    pub(in crate::client) fn waiting(&self) -> Result<Vec<AccountId>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT DISTINCT recipient FROM outgoing JOIN contacts ON account = recipient WHERE state < 2 AND state = 0 AND trust != 2",
        )?;
        Ok(select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    /// Messages the server has not accepted.
    pub(in crate::client) fn unsent(&self) -> Result<u64, Error> {
        let mut select = self.connection.prepare_cached("SELECT count(*) FROM outgoing WHERE state < 2 AND ephemeral = 0")?;
        Ok(sql::uint(select.query_row([], |row| row.get(0))?))
    }

    /// Ephemeral messages are for now or never: drops those that an earlier connection left.
    pub(in crate::client) fn drop_ephemeral(&self) -> Result<(), Error> {
        self.connection.execute("DELETE FROM outgoing WHERE state < 2 AND ephemeral = 1", [])?;
        Ok(())
    }

    /// The bundles that [`Self::need`] asked for are here; encrypts what waited.
    pub(in crate::client) fn repaired(&self, account: AccountId, bundles: &[Bundle], gone: &[DeviceId]) -> Result<(), Error> {
        for device in gone {
            self.forget_device(DeviceAddr { account, device: *device })?;
        }
        self.begin_sessions(account, bundles)?;
        if !self.need(account)?.sessions.is_empty() {
            self.give_up_after(account)?;
        }
        let mut select =
            self.connection.prepare_cached("SELECT id FROM outgoing WHERE recipient = ?1 AND state < 2 AND state = 0 ORDER BY id")?;
        let ids: Vec<i64> = select.query_map([account], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        ids.into_iter().try_for_each(|id| self.seal(id))
    }

    /// Some device's keys can't be had or are not valid: messages wait for another look, but not for ever.
    fn give_up_after(&self, account: AccountId) -> Result<(), Error> {
        self.connection.execute("UPDATE outgoing SET rounds = rounds + 1 WHERE recipient = ?1 AND state < 2 AND state = 0", [account])?;
        let mut select =
            self.connection.prepare_cached("SELECT id FROM outgoing WHERE recipient = ?1 AND state < 2 AND state = 0 AND rounds > ?2")?;
        let ids: Vec<i64> =
            select.query_map(params![account, repair::REPAIR_ROUNDS], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        for id in ids {
            if let Some(row) = self.row(id)? {
                self.fail(id, &row, Failure::DevicesKeepChanging)?;
            }
        }
        Ok(())
    }

    /// Nothing can be sent to the account: every open message for it fails.
    pub(in crate::client) fn unreachable(&self, account: AccountId, code: Code) -> Result<(), Error> {
        if code == Code::AccountDeleted && !self.is_deleted(account)? {
            self.connection.execute("UPDATE contacts SET deleted = 1 WHERE account = ?1", [account])?;
            self.tell(&Event::AccountDeleted { account })?;
        }
        let mut select = self.connection.prepare_cached("SELECT id FROM outgoing WHERE recipient = ?1 AND state < 2 ORDER BY id")?;
        let ids: Vec<i64> = select.query_map([account], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        for id in ids {
            if let Some(row) = self.row(id)? {
                self.fail(id, &row, Failure::of(code))?;
            }
        }
        Ok(())
    }

    /// The server answered a message.
    pub(in crate::client) fn answered(&self, id: u64, answer: &Answer) -> Result<Next, Error> {
        let id = sql::int(id);
        let Some(row) = self.row(id)?.filter(|row| row.state != ACCEPTED) else { return Ok(Next::Accepted) };
        let next = repair::decide(answer, row.attempts, row.rounds, &*self.random);
        match &next {
            Next::Accepted => self.accepted(id, &row)?,
            _ if row.ephemeral => self.delete_outgoing(id)?,
            Next::Repair(plan) => self.repair(id, &row, plan)?,
            Next::RetryIn(wait) => {
                let due = self.now().plus(*wait);
                let mut update =
                    self.connection.prepare_cached("UPDATE outgoing SET attempts = attempts + 1, not_before_ms = ?2 WHERE id = ?1")?;
                update.execute(params![id, sql::int(due.0)])?;
            }
            Next::NewId => {
                // Further ahead each time: a database that was set back is far behind.
                let ahead = sql::int(1 << row.attempts.min(32));
                self.connection.execute("UPDATE counters SET last = last + ?2 WHERE account = ?1", params![row.recipient, ahead])?;
                let new = self.next_id(row.recipient)?;
                let mut update =
                    self.connection.prepare_cached("UPDATE outgoing SET client_message_id = ?2, attempts = attempts + 1 WHERE id = ?1")?;
                update.execute(params![id, sql::int(new.0)])?;
                self.mark(|changed| changed.outgoing = true);
            }
            Next::Fail if matches!(answer.code, Code::AccountDeleted | Code::NotFound) => self.unreachable(row.recipient, answer.code)?,
            Next::Fail => self.fail(id, &row, Failure::of(answer.code))?,
            Next::SignedOut => self.sign_out()?,
        }
        Ok(next)
    }

    /// Makes a refused message fit the recipient's devices; the next [`Self::repaired`] completes it.
    fn repair(&self, id: i64, row: &Row, plan: &Plan) -> Result<(), Error> {
        let account = row.recipient;
        let mut send = row.envelopes.as_deref().map(Send::decode).transpose().map_err(damaged)?.unwrap_or_default();
        for device in &plan.forget {
            self.forget_device(DeviceAddr { account, device: *device })?;
        }
        for device in &plan.archive {
            let address = DeviceAddr { account, device: *device };
            let storage = super::state::SqlState(&self.connection);
            let current = signal::usable_session(&crate::client::core::state::StateTx::new(&storage), address, self.now())?;
            let refused = send.envelopes.iter().find(|envelope| envelope.device_id == u32::from(device.get()));
            // Another message may have renewed the session already; that one is good.
            if refused.is_none_or(|envelope| current.is_some_and(|id| id.get() == envelope.registration_id)) {
                self.core(|tx| signal::archive_session(tx, address))?;
            }
        }
        for device in &plan.fetch {
            self.add_device(DeviceAddr { account, device: *device })?;
        }
        let renewed = |envelope: &OutgoingEnvelope| plan.fetch.iter().any(|device| u32::from(device.get()) == envelope.device_id);
        send.envelopes.retain(|envelope| !renewed(envelope));
        self.store_envelopes(id, &send, WAITING)?;
        self.connection.execute("UPDATE outgoing SET rounds = rounds + 1 WHERE id = ?1", [id])?;
        // If every session is there already this completes it; else it waits.
        self.seal(id)
    }

    fn accepted(&self, id: i64, row: &Row) -> Result<(), Error> {
        if row.ephemeral {
            return self.delete_outgoing(id);
        }
        // A text that disappeared meanwhile must not live on here.
        let gone = match row.message {
            Some(message) => self.message(self.own()?.account, message)?.is_none_or(|message| message.body.is_none()),
            None => false,
        };
        let mut update = self.connection.prepare_cached(
            "UPDATE outgoing SET state = 2, envelopes = NULL, content = CASE WHEN ?2 THEN NULL ELSE content END WHERE id = ?1",
        )?;
        update.execute(params![id, gone])?;
        if let Some(message) = row.message.filter(|_| row.tick) {
            self.set_status(message, Status::Sent)?;
        }
        let own = self.own()?.account;
        let Some(content) = row.content.as_deref().filter(|_| row.recipient != own && row.resends == 0) else { return Ok(()) };
        let content = Content::decode(content).map_err(damaged)?;
        if !is_synced(&content) || self.devices_known(own)? && self.devices(own)?.is_empty() {
            return Ok(());
        }
        let identity = self.identities_of(row.recipient)?.into_iter().next();
        let transcript = content::transcript(content, row.recipient, identity.as_ref(), row.id);
        let how = Sending { message: row.message, ..Sending::default() };
        self.enqueue(own, &content::new(transcript, self.now(), None, &*self.random), how).map(|_| ())
    }

    fn fail(&self, id: i64, row: &Row, reason: Failure) -> Result<(), Error> {
        let mut update = self.connection.prepare_cached("UPDATE outgoing SET state = 2, envelopes = NULL, content = NULL WHERE id = ?1")?;
        update.execute([id])?;
        match row.message.filter(|_| row.tick) {
            Some(message) => self.set_failed(message, reason),
            None => Ok(()),
        }
    }

    /// A device could not decrypt something and asks for it again: the same content, under a new id.
    pub(super) fn repeat(&self, to: AccountId, id: ClientMessageId) -> Result<(), Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT id FROM outgoing WHERE recipient = ?1 AND client_message_id = ?2 AND state = 2 AND content IS NOT NULL",
        )?;
        let Some(row_id): Option<i64> = select.query_row(params![to, sql::int(id.0)], |row| row.get(0)).optional()? else { return Ok(()) };
        let Some(row) = self.row(row_id)?.filter(|row| row.resends < repair::RESENDS_PER_MESSAGE) else { return Ok(()) };
        let Some(content) = row.content.as_deref() else { return Ok(()) };
        let content = Content::decode(content).map_err(damaged)?;
        if matches!(content.kind, Some(Kind::Retry(_) | Kind::Typing(_))) {
            return Ok(());
        }
        self.connection.execute("UPDATE outgoing SET resends = resends + 1 WHERE id = ?1", [row_id])?;
        let how = Sending { urgent: row.urgent, ephemeral: false, message: row.message, tick: row.tick };
        // The copy counts on: a reader that never understands must not have it for ever.
        let copy = self.enqueue(to, &content, how)?;
        self.connection.execute("UPDATE outgoing SET resends = ?2 WHERE id = ?1", params![copy, row.resends + 1])?;
        Ok(())
    }

    /// What became of messages: `what` happened to those with these ids that were sent to the account.
    pub(super) fn receipt(&self, account: AccountId, first: u64, last: u64, what: Option<Status>) -> Result<(), Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT id FROM outgoing WHERE recipient = ?1 AND client_message_id BETWEEN ?2 AND ?3 AND state = 2 ORDER BY id",
        )?;
        let range = params![account, sql::int(first), sql::int(last)];
        let ids: Vec<i64> = select.query_map(range, |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        for id in ids {
            let Some(row) = self.row(id)? else { continue };
            match (what, row.message.filter(|_| row.tick)) {
                (Some(Status::Failed), Some(message)) => self.set_failed(message, Failure::Expired)?,
                (Some(status), Some(message)) => self.set_status(message, status)?,
                (Some(_), None) => {}
                // Dropped because its id came too late: the same again under a new id.
                (None, _) => {
                    let new = self.next_id(account)?;
                    let mut update = self
                        .connection
                        .prepare_cached("UPDATE outgoing SET state = 0, client_message_id = ?2 WHERE id = ?1 AND content IS NOT NULL")?;
                    update.execute(params![id, sql::int(new.0)])?;
                    self.seal(id)?;
                }
            }
        }
        Ok(())
    }

    /// The text of a message is gone: it must not be found among what was sent either.
    pub(super) fn scrub_outgoing(&self, message: MessageId) -> Result<(), Error> {
        self.connection.execute("DELETE FROM outgoing WHERE message_id = ?1 AND state = 0", [message])?;
        self.connection.execute("UPDATE outgoing SET content = NULL WHERE message_id = ?1 AND state = 2", [message])?;
        self.connection.execute("DELETE FROM group_outgoing WHERE message_id = ?1 AND ciphertext IS NULL", [message])?;
        Ok(())
    }
}

/// Whether one's own other devices are told: of what a person did.
fn is_synced(content: &Content) -> bool {
    matches!(content.kind, Some(Kind::Text(_) | Kind::Reaction(_) | Kind::Edit(_) | Kind::Delete(_) | Kind::Read(_) | Kind::ExpireTimer(_)))
}

fn damaged(error: impl std::fmt::Display) -> Error {
    Error::Damaged(format!("a stored message: {error}"))
}
