//! Messages to groups: encrypted right before they are sent, then sent again as they are until they are answered.

use bytes::Bytes;
use prost::Message as _;
use rusqlite::{OptionalExtension as _, params};

use super::{CLOSED, LEFT, MEMBER};
use crate::client::core::content::{self, Content, Kind, MessageId, proto};
use crate::client::core::groups;
use crate::client::core::repair::{self, Answer, Next};
use crate::client::store::account::FIRST_MESSAGE_ID;
use crate::client::store::{Db, Error, sql};
use crate::client::types::{ConversationId, Event, Failure, Status};
use crate::ids::{AccountId, ClientMessageId, GroupId};
use crate::limits;
use crate::wire::stream::{Code, GroupSend};

/// Messages to groups share their request ids with those to accounts: theirs have this bit.
const GROUP_REQUEST: u64 = 1 << 62;
/// How far a message may run ahead of an unanswered one to the same group: within the server's window of ids, with room.
const IDS_AHEAD: u64 = limits::MESSAGE_ID_WINDOW - 8;
/// How long an accepted message may take to be met in its group.
const PLACED_MS: u64 = 60_000;
/// In larger groups nobody says what was read: see `GroupRead` in `content.proto`.
const READS_ACCOUNTS: u32 = 32;

/// Whether an answer is to a message to a group.
pub(in crate::client) fn is_group_request(request: u64) -> bool {
    request & GROUP_REQUEST != 0
}

/// A message to a group that can be sent now.
pub(in crate::client) struct ReadyGroup {
    /// The request id.
    pub id: u64,
    /// The request.
    pub send: GroupSend,
}

impl Db {
    /// Sends something to a group: applied here, and put on its way.
    pub(in crate::client) fn send_to_group(&self, group: GroupId, kind: Kind) -> Result<MessageId, Error> {
        let row = self.group_row(group)?.filter(|row| !matches!(row.state, LEFT | CLOSED) && !row.leaving);
        if row.is_none() {
            return Err(groups::Error::NotMember.into());
        }
        let kind = self.with_group_timer(group, kind)?;
        let content = content::new(kind, self.now(), self.writes_as()?.as_ref(), &*self.random);
        content::check(&content)?;
        let id = content::id_of(&content)?;
        let message = self.apply_own(self.own()?.account, ConversationId::Group(group), &content)?;
        let tick = matches!(content.kind, Some(Kind::Text(_)));
        self.enqueue_to_group(group, &content, message, tick)?;
        Ok(id)
    }

    fn with_group_timer(&self, group: GroupId, kind: Kind) -> Result<Kind, Error> {
        let Kind::Text(text) = kind else { return Ok(kind) };
        let mut select = self.connection.prepare_cached("SELECT expire_s FROM groups WHERE id = ?1")?;
        let expire_s = if text.expire_s == 0 { select.query_row([group], |row| row.get(0))? } else { text.expire_s };
        Ok(Kind::Text(proto::Text { expire_s, ..text }))
    }

    fn enqueue_to_group(&self, group: GroupId, content: &Content, message: Option<MessageId>, tick: bool) -> Result<(), Error> {
        let id = self.next_group_id(group)?;
        let mut insert = self.connection.prepare_cached(
            "INSERT INTO group_outgoing (mls_group, client_message_id, content, message_id, tick) VALUES (?1, ?2, ?3, ?4, ?5)",
        )?;
        insert.execute(params![group, sql::int(id.0), content.encode_to_vec(), message, tick])?;
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }

    /// Tells all members the key of the group's name, or with none asks them for it.
    pub(super) fn send_name_key(&self, group: GroupId, key: &[u8]) -> Result<(), Error> {
        let kind = Kind::GroupNameKey(proto::GroupNameKey { key: Bytes::copy_from_slice(key) });
        let content = content::new(kind, self.now(), None, &*self.random);
        self.enqueue_to_group(group, &content, None, false)
    }

    fn next_group_id(&self, group: GroupId) -> Result<ClientMessageId, Error> {
        // As with accounts: a device before this one may have had its number.
        let first = sql::meta_number(&self.connection, FIRST_MESSAGE_ID)?.max(1);
        let mut next = self
            .connection
            .prepare_cached("INSERT INTO counters VALUES (?1, ?2) ON CONFLICT (account) DO UPDATE SET last = last + 1 RETURNING last")?;
        let last = next.query_row(params![ConversationId::Group(group), sql::int(first)], |row| row.get(0))?;
        Ok(ClientMessageId(sql::uint(last)))
    }

    /// Messages to groups that can be sent now and are not `in_flight`, in order for each group.
    pub(in crate::client) fn ready_for_groups(&self, in_flight: &[u64], limit: usize) -> Result<Vec<ReadyGroup>, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT o.id, o.mls_group, o.client_message_id, o.content, o.epoch, o.ciphertext FROM group_outgoing AS o
             JOIN groups AS g ON g.id = o.mls_group WHERE g.state = ?1 AND o.accepted_ms IS NULL AND o.not_before_ms <= ?2 AND NOT EXISTS (
                 SELECT 1 FROM group_outgoing AS e
                 WHERE e.mls_group = o.mls_group AND e.accepted_ms IS NULL AND e.client_message_id < o.client_message_id
                 AND (e.not_before_ms > ?2 OR e.client_message_id + ?3 < o.client_message_id))
             ORDER BY o.id",
        )?;
        let mut rows = select.query(params![MEMBER, sql::int(self.now().0), sql::int(IDS_AHEAD)])?;
        let (mut ready, mut blocked): (Vec<ReadyGroup>, Vec<GroupId>) = (Vec::new(), Vec::new());
        while let Some(row) = rows.next()? {
            let id: i64 = row.get(0)?;
            let request = sql::uint(id) | GROUP_REQUEST;
            let group: GroupId = row.get(1)?;
            if in_flight.contains(&request) || blocked.contains(&group) {
                continue;
            }
            let (content, epoch, ciphertext): (Vec<u8>, i64, Option<Vec<u8>>) = (row.get(3)?, row.get(4)?, row.get(5)?);
            let (epoch, ciphertext) = match ciphertext {
                Some(ciphertext) => (sql::uint(epoch), ciphertext),
                None => match self.encrypt_for_group(group, id, content)? {
                    Some(encrypted) => encrypted,
                    None => {
                        blocked.push(group);
                        continue;
                    }
                },
            };
            let send = GroupSend {
                request_id: request,
                group_id: Bytes::copy_from_slice(group.as_bytes()),
                client_message_id: sql::uint(row.get(2)?),
                epoch,
                content: ciphertext.into(),
            };
            ready.push(ReadyGroup { id: request, send });
            if ready.len() >= limit {
                break;
            }
        }
        Ok(ready)
    }

    /// Encrypts a message in the epoch of now; `None`: something must be committed first.
    fn encrypt_for_group(&self, group: GroupId, row: i64, content: Vec<u8>) -> Result<Option<(u64, Vec<u8>)>, Error> {
        let plaintext = zeroize::Zeroizing::new(content::pad(content));
        let encrypted = self.in_group(group, |group, engine| Ok((group.epoch(), group.encrypt(engine, &plaintext)?)))?;
        match encrypted {
            Ok((epoch, ciphertext)) => {
                let mut update = self.connection.prepare_cached("UPDATE group_outgoing SET epoch = ?2, ciphertext = ?3 WHERE id = ?1")?;
                update.execute(params![row, sql::int(epoch), ciphertext])?;
                Ok(Some((epoch, ciphertext)))
            }
            // Somebody leaves: that comes first, and at once, since the person writes.
            Err(groups::Error::Pending) => {
                self.group_due(group, 0)?;
                Ok(None)
            }
            Err(error) => {
                tracing::warn!(%error, "a message to a group can't be encrypted");
                self.lose_touch(group, super::repair::Loss::Alone)?;
                Ok(None)
            }
        }
    }

    /// The server answered a message to a group.
    pub(in crate::client) fn group_answered(&self, request: u64, answer: &Answer) -> Result<Next, Error> {
        let row = sql::int(request & !GROUP_REQUEST);
        let mut select =
            self.connection.prepare_cached("SELECT mls_group, client_message_id, attempts FROM group_outgoing WHERE id = ?1")?;
        let found = select.query_row([row], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).optional()?;
        let Some((group, id, attempts)): Option<(GroupId, i64, u32)> = found else { return Ok(Next::Accepted) };
        if answer.code == Code::Conflict {
            // Its epoch is too long over: once this device has what came since, it is encrypted again under the same number, so that it is
            // there once even if an earlier attempt was accepted.
            let due = self.now().plus(repair::backoff(attempts, &*self.random));
            let mut update = self
                .connection
                .prepare_cached("UPDATE group_outgoing SET ciphertext = NULL, attempts = attempts + 1, not_before_ms = ?2 WHERE id = ?1")?;
            update.execute(params![row, sql::int(due.0)])?;
            self.group_behind(group)?;
            return Ok(Next::RetryIn(0));
        }
        let next = repair::decide(answer, attempts, 0, &*self.random);
        match &next {
            Next::Accepted => self.group_accepted(group, ClientMessageId(sql::uint(id)), None)?,
            Next::RetryIn(wait) => {
                let due = self.now().plus(*wait);
                let mut update = self
                    .connection
                    .prepare_cached("UPDATE group_outgoing SET attempts = attempts + 1, not_before_ms = ?2 WHERE id = ?1")?;
                update.execute(params![row, sql::int(due.0)])?;
            }
            Next::NewId => {
                let ahead = sql::int(1 << attempts.min(32));
                self.connection
                    .execute("UPDATE counters SET last = last + ?2 WHERE account = ?1", params![ConversationId::Group(group), ahead])?;
                let new = self.next_group_id(group)?;
                let mut update = self
                    .connection
                    .prepare_cached("UPDATE group_outgoing SET client_message_id = ?2, attempts = attempts + 1 WHERE id = ?1")?;
                update.execute(params![row, sql::int(new.0)])?;
                self.mark(|changed| changed.outgoing = true);
            }
            Next::Fail | Next::Repair(_) => {
                if matches!(answer.code, Code::Forbidden | Code::NotFound) {
                    self.group_behind(group)?;
                }
                self.fail_group_message(row, Failure::of_group(answer.code))?;
            }
            Next::SignedOut => self.sign_out()?,
        }
        Ok(next)
    }

    /// A message of this device is durable: the server said so, or it was met in the group, where it is over with.
    pub(super) fn group_accepted(&self, group: GroupId, id: ClientMessageId, seq: Option<u64>) -> Result<(), Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT id, message_id, tick FROM group_outgoing WHERE mls_group = ?1 AND client_message_id = ?2")?;
        let found = select.query_row(params![group, sql::int(id.0)], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).optional()?;
        let Some((row, message, tick)): Option<(i64, Option<MessageId>, bool)> = found else { return Ok(()) };
        let message = message.filter(|_| tick);
        match seq {
            Some(seq) => {
                self.connection.prepare_cached("DELETE FROM group_outgoing WHERE id = ?1")?.execute([row])?;
                if let Some(message) = message {
                    self.set_group_seq(self.own()?.account, message, seq)?;
                }
            }
            None => {
                let mut update = self.connection.prepare_cached(
                    "UPDATE group_outgoing SET ciphertext = NULL, accepted_ms = ?2,
                     accepted_cursor = (SELECT cursor FROM groups WHERE groups.id = mls_group) WHERE id = ?1",
                )?;
                update.execute(params![row, sql::int(self.now().0)])?;
            }
        }
        message.map_or(Ok(()), |message| self.set_status(message, Status::Sent))
    }

    /// In rare races what was accepted gets no place in the group: what was not met there although others were is sent again, under a new
    /// number. Whoever had it all the same shows it once.
    pub(super) fn send_unplaced(&self) -> Result<(), Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT o.id, o.mls_group FROM group_outgoing AS o JOIN groups AS g ON g.id = o.mls_group
             WHERE o.accepted_ms <= ?1 AND g.state = ?2 AND g.cursor > o.accepted_cursor AND g.head <= g.cursor ORDER BY o.id",
        )?;
        let before = sql::int(self.now().0.saturating_sub(PLACED_MS));
        let rows = select.query_map(params![before, MEMBER], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let unplaced: Vec<(i64, GroupId)> = rows.collect::<rusqlite::Result<_>>()?;
        for (row, group) in unplaced {
            let new = self.next_group_id(group)?;
            let mut update = self.connection.prepare_cached(
                "UPDATE group_outgoing SET client_message_id = ?2, ciphertext = NULL, accepted_ms = NULL, attempts = 0 WHERE id = ?1",
            )?;
            update.execute(params![row, sql::int(new.0)])?;
            self.mark(|changed| changed.outgoing = true);
        }
        Ok(())
    }

    pub(super) fn set_group_seq(&self, author: AccountId, message: MessageId, seq: u64) -> Result<(), Error> {
        let mut update = self.connection.prepare_cached("UPDATE messages SET group_seq = ?3 WHERE author = ?1 AND message_id = ?2")?;
        update.execute(params![author, message, sql::int(seq)])?;
        Ok(())
    }

    fn fail_group_message(&self, row: i64, reason: Failure) -> Result<(), Error> {
        let mut delete = self.connection.prepare_cached("DELETE FROM group_outgoing WHERE id = ?1 RETURNING message_id, tick")?;
        let found = delete.query_row([row], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        match found {
            Some((Some(message), true)) => self.set_failed(message, reason),
            _ => Ok(()),
        }
    }

    /// Nothing can be sent to the group any more.
    pub(super) fn fail_group_messages(&self, group: GroupId) -> Result<(), Error> {
        let mut select =
            self.connection.prepare_cached("SELECT id FROM group_outgoing WHERE mls_group = ?1 AND accepted_ms IS NULL ORDER BY id")?;
        let rows: Vec<i64> = select.query_map([group], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?;
        rows.into_iter().try_for_each(|row| self.fail_group_message(row, Failure::NotMember))
    }

    /// Messages to groups that the server has not accepted.
    pub(in crate::client) fn unsent_to_groups(&self) -> Result<u64, Error> {
        let mut select = self.connection.prepare_cached("SELECT count(*) FROM group_outgoing WHERE accepted_ms IS NULL")?;
        Ok(sql::uint(select.query_row([], |row| row.get(0))?))
    }

    /// The person has read the group up to a position in the history: the others are told, in a small group, by one message.
    pub(in crate::client) fn mark_group_read(&self, group: GroupId, up_to: u64) -> Result<usize, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT message_id, coalesce(group_seq, 0) FROM messages WHERE conversation = ?1 AND unread = 1 AND id <= ?2",
        )?;
        let conversation = ConversationId::Group(group);
        let rows = select.query_map(params![conversation, sql::int(up_to)], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let read: Vec<(MessageId, i64)> = rows.collect::<rusqlite::Result<_>>()?;
        for (message, _) in &read {
            self.set_read(conversation, *message)?;
        }
        let newest = read.iter().map(|(_, seq)| sql::uint(*seq)).max().unwrap_or_default();
        let row = self.group_row(group)?.filter(|row| row.state == MEMBER && row.accounts <= READS_ACCOUNTS && !row.leaving);
        if newest > 0 && row.is_some() {
            let content = content::new(Kind::GroupRead(proto::GroupRead { seq: newest }), self.now(), None, &*self.random);
            self.enqueue_to_group(group, &content, None, false)?;
        }
        Ok(read.len())
    }

    /// Somebody has read the group up to an item.
    pub(super) fn group_read(&self, group: GroupId, account: AccountId, seq: u64) -> Result<(), Error> {
        let (own, conversation) = (self.own()?.account, ConversationId::Group(group));
        if account == own {
            let mut select = self
                .connection
                .prepare_cached("SELECT message_id FROM messages WHERE conversation = ?1 AND unread = 1 AND group_seq BETWEEN 1 AND ?2")?;
            let rows = select.query_map(params![conversation, sql::int(seq)], |row| row.get(0))?;
            let read: Vec<MessageId> = rows.collect::<rusqlite::Result<_>>()?;
            for message in &read {
                self.set_read(conversation, *message)?;
            }
            return if read.is_empty() { Ok(()) } else { self.tell(&Event::ReadElsewhere { conversation }) };
        }
        let mut upsert = self
            .connection
            .prepare_cached("INSERT INTO group_reads VALUES (?1, ?2, ?3) ON CONFLICT DO UPDATE SET seq = ?3 WHERE seq < ?3")?;
        if upsert.execute(params![group, account, sql::int(seq)])? == 0 {
            return Ok(());
        }
        self.tell(&Event::GroupRead { group, account, seq })
    }

    /// Up to where each account says that it has read.
    pub(in crate::client) fn group_reads(&self, group: GroupId) -> Result<Vec<(AccountId, u64)>, Error> {
        let mut select = self.connection.prepare_cached("SELECT account, seq FROM group_reads WHERE mls_group = ?1 ORDER BY account")?;
        let rows = select.query_map([group], |row| Ok((row.get(0)?, sql::uint(row.get(1)?))))?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }
}
