//! Conversations: what contents do to them, and reading them.

use prost::Message as _;
use rusqlite::{OptionalExtension as _, Row, params};

use super::outgoing::Sending;
use super::{Db, Error, sql};
use crate::client::core::content::{self, Content, Kind, MessageId, proto};
use crate::client::types::{Conversation, ConversationId, Event, Failure, Message, Status, Trust};
use crate::ids::AccountId;

/// Contents kept for messages that are not there yet; the oldest go past that.
const EARLY: i64 = 1_000;
/// Reactions kept for one message.
const REACTIONS: i64 = 1_000;

const COLUMNS: &str = "id, conversation, author, message_id, sent_ms, body, reply_author, reply_id, edited_ms, status, failure, expires_ms, unread, group_seq";

impl Db {
    /// Sends something to an account: applied here, and put on its way.
    pub(in crate::client) fn send(&self, to: AccountId, kind: Kind, urgent: bool) -> Result<MessageId, Error> {
        let own = self.own()?.account;
        if self.is_deleted(to)? {
            return Err(Error::AccountDeleted);
        }
        if self.trust(to)? == Trust::Changed {
            return Err(Error::Unverified);
        }
        self.contact(to)?;
        let kind = self.with_timer(to, kind)?;
        let content = content::new(kind, self.now(), self.writes_as()?.as_ref(), &*self.random);
        content::check(&content)?;
        let id = content::id_of(&content)?;
        let message = self.apply_own(own, to.into(), &content)?;
        let how = Sending { urgent, ephemeral: false, message, tick: matches!(content.kind, Some(Kind::Text(_))) };
        if to == own {
            let sent = content::transcript(content, own, None, crate::ids::ClientMessageId(0));
            self.enqueue(own, &content::new(sent, self.now(), None, &*self.random), how)?;
        } else {
            self.enqueue(to, &content, how)?;
        }
        Ok(id)
    }

    fn with_timer(&self, to: AccountId, kind: Kind) -> Result<Kind, Error> {
        let Kind::Text(text) = kind else { return Ok(kind) };
        let mut select = self.connection.prepare_cached("SELECT expire_s FROM contacts WHERE account = ?1")?;
        let expire_s = if text.expire_s == 0 { select.query_row([to], |row| row.get(0))? } else { text.expire_s };
        Ok(Kind::Text(proto::Text { expire_s, ..text }))
    }

    /// Applies what this device sends; the message whose text the content holds, if it does.
    pub(super) fn apply_own(&self, own: AccountId, to: ConversationId, content: &Content) -> Result<Option<MessageId>, Error> {
        let exists = |author: AccountId, id: &[u8]| -> Result<MessageId, Error> {
            let id = content::id(id)?;
            let found = self.message(author, id)?.filter(|message| message.conversation == to && message.body.is_some());
            found.map(|_| id).ok_or(Error::NoSuchMessage)
        };
        let touched = match &content.kind {
            Some(Kind::Text(_)) => Some(content::id_of(content)?),
            Some(Kind::Edit(edit)) => Some(exists(own, &edit.message_id)?),
            Some(Kind::Delete(delete)) => exists(own, &delete.message_id).map(|_| None)?,
            Some(Kind::Reaction(proto::Reaction { target: Some(target), .. })) => {
                exists(content::account(&target.author)?, &target.message_id).map(|_| None)?
            }
            _ => None,
        };
        self.apply(to, own, content, Status::Pending)?;
        Ok(touched)
    }

    /// Somebody types: told to those who are there, now or never.
    pub(in crate::client) fn send_typing(&self, to: AccountId, started: bool) -> Result<(), Error> {
        if self.is_deleted(to)? || self.trust(to)? == Trust::Changed {
            return Ok(());
        }
        let content = content::new(Kind::Typing(proto::Typing { started }), self.now(), None, &*self.random);
        self.enqueue(to, &content, Sending { ephemeral: true, ..Sending::default() }).map(|_| ())
    }

    /// Applies a content to a conversation. `author` is who did it: proven by the session it came through, or this account.
    pub(super) fn apply(&self, conversation: ConversationId, author: AccountId, content: &Content, status: Status) -> Result<(), Error> {
        if let ConversationId::Account(account) = conversation {
            self.contact(account)?;
        }
        match &content.kind {
            Some(Kind::Text(text)) => self.apply_text(conversation, author, content, text, status),
            Some(Kind::Edit(edit)) => self.apply_edit(conversation, author, content, edit),
            Some(Kind::Delete(delete)) => self.apply_delete(conversation, author, content, content::id(&delete.message_id)?),
            Some(Kind::Reaction(reaction)) => self.apply_reaction(conversation, author, content, reaction),
            Some(Kind::Read(read)) => self.apply_read(conversation, author, read),
            Some(Kind::ExpireTimer(timer)) => {
                match conversation {
                    ConversationId::Account(account) => {
                        self.connection.execute("UPDATE contacts SET expire_s = ?2 WHERE account = ?1", params![account, timer.seconds])?
                    }
                    ConversationId::Group(group) => {
                        self.connection.execute("UPDATE groups SET expire_s = ?2 WHERE id = ?1", params![group, timer.seconds])?
                    }
                };
                self.tell(&Event::ExpireTimer { conversation, by: author, seconds: timer.seconds })
            }
            // Of groups only, and handled there.
            Some(Kind::GroupRead(_) | Kind::GroupNameKey(_)) => Ok(()),
            Some(Kind::Typing(_) | Kind::Sent(_) | Kind::Retry(_) | Kind::Nothing(_)) | None => Ok(()),
        }
    }

    fn apply_text(
        &self,
        conversation: ConversationId,
        author: AccountId,
        content: &Content,
        text: &proto::Text,
        status: Status,
    ) -> Result<(), Error> {
        let own = self.own()?.account;
        let message_id = content::id_of(content)?;
        let incoming = author != own;
        let reply = text.reply_to.as_ref();
        let reply_author = reply.map(|target| content::account(&target.author)).transpose()?;
        let reply_id = reply.map(|target| content::id(&target.message_id)).transpose()?;
        // One's own disappear from when they were sent; what arrives, from when it is read.
        let expires = (!incoming && text.expire_s > 0).then(|| sql::int(self.now().plus(u64::from(text.expire_s) * 1_000).0));
        let mut insert = self.connection.prepare_cached(
            "INSERT OR IGNORE INTO messages
             (conversation, author, message_id, sent_ms, body, reply_author, reply_id, status, expire_s, expires_ms, unread)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
        )?;
        let inserted = insert.execute(params![
            conversation,
            author,
            message_id,
            sql::int(content.sent_ms),
            text.body,
            reply_author,
            reply_id,
            status as i64,
            text.expire_s,
            expires,
            incoming
        ])?;
        if inserted == 0 {
            return Ok(());
        }
        self.mark(|changed| changed.expiry |= expires.is_some());
        if status != Status::Pending {
            self.tell(&Event::Message { conversation, author, message_id, message: None })?;
        }
        self.apply_early(conversation, author, message_id)
    }

    fn apply_edit(&self, conversation: ConversationId, author: AccountId, content: &Content, edit: &proto::Edit) -> Result<(), Error> {
        let message_id = content::id(&edit.message_id)?;
        let Some(message) = self.in_conversation(conversation, author, message_id)? else {
            return self.keep_early(author, message_id, author, content);
        };
        let mut update = self.connection.prepare_cached(
            "UPDATE messages SET body = ?3, edited_ms = ?4 WHERE author = ?1 AND message_id = ?2 AND body IS NOT NULL AND edited_ms <= ?4",
        )?;
        let changed = update.execute(params![author, message_id, edit.body, sql::int(content.sent_ms.max(1))])?;
        if changed == 0 {
            return Ok(());
        }
        self.tell(&Event::Edited { conversation: message.conversation, author, message_id })
    }

    fn apply_delete(&self, conversation: ConversationId, author: AccountId, content: &Content, message_id: MessageId) -> Result<(), Error> {
        if self.in_conversation(conversation, author, message_id)?.is_none() {
            return self.keep_early(author, message_id, author, content);
        }
        let at = params![author, message_id];
        self.connection.execute("DELETE FROM reactions WHERE author = ?1 AND message_id = ?2", at)?;
        self.connection.execute("UPDATE messages SET body = NULL, unread = 0 WHERE author = ?1 AND message_id = ?2", at)?;
        if author == self.own()?.account {
            self.scrub_outgoing(message_id)?;
        }
        self.tell(&Event::Deleted { conversation, author, message_id })
    }

    fn apply_reaction(
        &self,
        conversation: ConversationId,
        by: AccountId,
        content: &Content,
        reaction: &proto::Reaction,
    ) -> Result<(), Error> {
        let Some(target) = &reaction.target else { return Ok(()) };
        let (author, message_id) = (content::account(&target.author)?, content::id(&target.message_id)?);
        let Some(message) = self.in_conversation(conversation, author, message_id)? else {
            return self.keep_early(author, message_id, by, content);
        };
        if message.body.is_none() {
            return Ok(());
        }
        // Taking back leaves an empty one, so that an older reaction that comes later does not win.
        let mut upsert = self.connection.prepare_cached(
            "INSERT INTO reactions SELECT ?1, ?2, ?3, ?4, ?5
             WHERE (SELECT count(*) FROM reactions WHERE author = ?1 AND message_id = ?2) < ?6
             ON CONFLICT DO UPDATE SET emoji = ?4, sent_ms = ?5 WHERE sent_ms <= ?5",
        )?;
        if upsert.execute(params![author, message_id, by, reaction.emoji, sql::int(content.sent_ms), REACTIONS])? == 0 {
            return Ok(());
        }
        let emoji = (!reaction.remove).then(|| reaction.emoji.clone());
        self.tell(&Event::Reacted { conversation, author, message_id, by, emoji })
    }

    fn apply_read(&self, conversation: ConversationId, by: AccountId, read: &proto::ReadReceipt) -> Result<(), Error> {
        let own = self.own()?.account;
        let ids = read.message_ids.iter().map(|bytes| content::id(bytes)).collect::<Result<Vec<_>, _>>()?;
        if by != own {
            // Nobody says what others have read.
            return ids.into_iter().try_for_each(|id| match self.in_conversation(conversation, own, id)? {
                Some(_) => self.set_status(id, Status::Read),
                None => Ok(()),
            });
        }
        let mut changed = false;
        for id in ids {
            changed |= self.set_read(conversation, id)?;
        }
        if changed { self.tell(&Event::ReadElsewhere { conversation }) } else { Ok(()) }
    }

    /// Edits, deletes and reactions can overtake their message if it had to be repeated.
    fn keep_early(&self, author: AccountId, target: MessageId, sender: AccountId, content: &Content) -> Result<(), Error> {
        let mut insert =
            self.connection.prepare_cached("INSERT INTO early (author, message_id, sender, content) VALUES (?1, ?2, ?3, ?4)")?;
        insert.execute(params![author, target, sender, content.encode_to_vec()])?;
        let oldest = self.connection.last_insert_rowid() - EARLY;
        self.connection.execute("DELETE FROM early WHERE id <= ?1", [oldest])?;
        Ok(())
    }

    fn apply_early(&self, conversation: ConversationId, author: AccountId, message_id: MessageId) -> Result<(), Error> {
        let mut select =
            self.connection.prepare_cached("SELECT sender, content FROM early WHERE author = ?1 AND message_id = ?2 ORDER BY id")?;
        let rows = select.query_map(params![author, message_id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let kept: Vec<(AccountId, Vec<u8>)> = rows.collect::<rusqlite::Result<_>>()?;
        if kept.is_empty() {
            return Ok(());
        }
        self.connection.execute("DELETE FROM early WHERE author = ?1 AND message_id = ?2", params![author, message_id])?;
        for (sender, bytes) in kept {
            let content = Content::decode(bytes.as_slice()).map_err(|error| Error::Damaged(error.to_string()))?;
            self.apply(conversation, sender, &content, Status::Delivered)?;
        }
        Ok(())
    }

    fn in_conversation(&self, conversation: ConversationId, author: AccountId, id: MessageId) -> Result<Option<Message>, Error> {
        Ok(self.message(author, id)?.filter(|message| message.conversation == conversation))
    }

    /// A message of this account came further.
    pub(super) fn set_status(&self, message_id: MessageId, status: Status) -> Result<(), Error> {
        let own = self.own()?.account;
        let mut update = self.connection.prepare_cached(
            "UPDATE messages SET status = ?3 WHERE author = ?1 AND message_id = ?2 AND status < ?3 AND status != 4 RETURNING conversation",
        )?;
        let changed: Option<ConversationId> = update.query_row(params![own, message_id, status as i64], |row| row.get(0)).optional()?;
        match changed {
            Some(conversation) => self.tell(&Event::Tick { conversation, message_id, status }),
            None => Ok(()),
        }
    }

    pub(super) fn set_failed(&self, message_id: MessageId, reason: Failure) -> Result<(), Error> {
        let own = self.own()?.account;
        let failure = serde_json::to_string(&reason).map_err(|error| Error::Damaged(error.to_string()))?;
        let mut update = self.connection.prepare_cached(
            "UPDATE messages SET status = 4, failure = ?3 WHERE author = ?1 AND message_id = ?2 AND status < 2 RETURNING conversation",
        )?;
        let changed: Option<ConversationId> = update.query_row(params![own, message_id, failure], |row| row.get(0)).optional()?;
        match changed {
            Some(conversation) => self.tell(&Event::Failed { conversation, message_id, reason }),
            None => Ok(()),
        }
    }

    pub(super) fn set_read(&self, conversation: ConversationId, id: MessageId) -> Result<bool, Error> {
        let mut update = self.connection.prepare_cached(
            "UPDATE messages SET unread = 0, status = 3, expires_ms = CASE WHEN expire_s > 0 THEN ?3 + expire_s * 1000 END
             WHERE conversation = ?1 AND message_id = ?2 AND unread = 1",
        )?;
        let changed = update.execute(params![conversation, id, sql::int(self.now().0)])? > 0;
        self.mark(|marks| marks.expiry |= changed);
        Ok(changed)
    }

    /// The person has read the conversation, up to a position in the history: tells the author, and one's own other devices.
    pub(in crate::client) fn mark_read(&self, account: AccountId, up_to: u64) -> Result<usize, Error> {
        let conversation = ConversationId::Account(account);
        let mut select =
            self.connection.prepare_cached("SELECT message_id FROM messages WHERE conversation = ?1 AND unread = 1 AND id <= ?2")?;
        let rows = select.query_map(params![conversation, sql::int(up_to)], |row| row.get(0))?;
        let ids: Vec<MessageId> = rows.collect::<rusqlite::Result<_>>()?;
        for id in &ids {
            self.set_read(conversation, *id)?;
        }
        if !self.is_deleted(account)? {
            for chunk in ids.chunks(content::READ_RECEIPT_IDS) {
                let message_ids = chunk.iter().map(|id| bytes::Bytes::copy_from_slice(&id.0)).collect();
                let kind = Kind::Read(proto::ReadReceipt { message_ids });
                self.enqueue(account, &content::new(kind, self.now(), None, &*self.random), Sending::default())?;
            }
        }
        Ok(ids.len())
    }

    /// One message.
    pub(in crate::client) fn message(&self, author: AccountId, id: MessageId) -> Result<Option<Message>, Error> {
        let query = format!("SELECT {COLUMNS} FROM messages WHERE author = ?1 AND message_id = ?2");
        let own = self.own()?.account;
        let mut select = self.connection.prepare_cached(&query)?;
        let message = select.query_row(params![author, id], |row| read_message(row, own)).optional()?;
        message.map(|message| self.with_reactions(message)).transpose()
    }

    /// A part of a conversation's history: up to `limit` messages before a position, oldest first.
    pub(in crate::client) fn history(
        &self,
        conversation: impl Into<ConversationId>,
        before: u64,
        limit: usize,
    ) -> Result<Vec<Message>, Error> {
        let conversation = conversation.into();
        let query = format!("SELECT {COLUMNS} FROM messages WHERE conversation = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3");
        let own = self.own()?.account;
        let mut select = self.connection.prepare_cached(&query)?;
        let rows = select.query_map(params![conversation, sql::int(before), limit as i64], |row| read_message(row, own))?;
        let mut messages: Vec<Message> = rows.collect::<rusqlite::Result<_>>()?;
        messages.reverse();
        messages.into_iter().map(|message| self.with_reactions(message)).collect()
    }

    fn with_reactions(&self, mut message: Message) -> Result<Message, Error> {
        let mut select = self.connection.prepare_cached(
            "SELECT reactor, emoji FROM reactions WHERE author = ?1 AND message_id = ?2 AND emoji != '' ORDER BY sent_ms",
        )?;
        let rows = select.query_map(params![message.author, message.message_id], |row| Ok((row.get(0)?, row.get(1)?)))?;
        message.reactions = rows.collect::<rusqlite::Result<_>>()?;
        Ok(message)
    }

    /// All conversations, the one with the newest message first.
    pub(in crate::client) fn conversations(&self) -> Result<Vec<Conversation>, Error> {
        let own = self.own()?.account;
        let mut select = self.connection.prepare_cached(
            "SELECT account, expire_s, deleted, (SELECT count(*) FROM messages WHERE conversation = account AND unread = 1),
                    (SELECT max(id) FROM messages WHERE conversation = account) AS newest
             FROM contacts WHERE account != ?1 OR newest IS NOT NULL ORDER BY newest DESC",
        )?;
        let rows = select.query_map([own], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get::<_, i64>(3)?)))?;
        let rows: Vec<(AccountId, u32, bool, i64)> = rows.collect::<rusqlite::Result<_>>()?;
        rows.into_iter()
            .map(|(account, expire_s, deleted, unread)| {
                Ok(Conversation {
                    account,
                    identities: self.identities_of(account)?,
                    trust: self.trust(account)?,
                    unread: sql::uint(unread),
                    expire_s,
                    deleted,
                    last: self.history(account, u64::MAX, 1)?.pop(),
                })
            })
            .collect()
    }

    /// Removes messages whose time is over, wherever their text was: how many, and when the next one's is.
    pub(in crate::client) fn expire(&self) -> Result<(usize, Option<u64>), Error> {
        let now = sql::int(self.now().0);
        let mut select = self.connection.prepare_cached("SELECT conversation, author, message_id FROM messages WHERE expires_ms <= ?1")?;
        let rows = select.query_map([now], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let over: Vec<(ConversationId, AccountId, MessageId)> = rows.collect::<rusqlite::Result<_>>()?;
        let own = self.own()?.account;
        let removed = over.len();
        for (conversation, author, message_id) in over {
            let at = params![author, message_id];
            self.connection.execute("DELETE FROM reactions WHERE author = ?1 AND message_id = ?2", at)?;
            self.connection.execute("DELETE FROM messages WHERE author = ?1 AND message_id = ?2", at)?;
            if author == own {
                self.scrub_outgoing(message_id)?;
            }
            self.tell(&Event::Expired { conversation, author, message_id })?;
        }
        let next: Option<i64> = self.connection.query_row("SELECT min(expires_ms) FROM messages", [], |row| row.get(0))?;
        Ok((removed, next.map(sql::uint)))
    }
}

fn read_message(row: &Row<'_>, own: AccountId) -> rusqlite::Result<Message> {
    let author: AccountId = row.get(2)?;
    let reply_author: Option<AccountId> = row.get(6)?;
    let edited_ms: i64 = row.get(8)?;
    let failure: Option<String> = row.get(10)?;
    Ok(Message {
        position: sql::uint(row.get(0)?),
        conversation: row.get(1)?,
        author,
        message_id: row.get(3)?,
        outgoing: author == own,
        sent_ms: sql::uint(row.get(4)?),
        body: row.get(5)?,
        reply_to: reply_author.zip(row.get(7)?),
        edited: edited_ms > 0,
        status: status(row.get(9)?),
        failure: failure.and_then(|json| serde_json::from_str(&json).ok()),
        reactions: Vec::new(),
        expires_ms: row.get::<_, Option<i64>>(11)?.map(sql::uint),
        group_seq: row.get::<_, Option<i64>>(13)?.map(sql::uint),
    })
}

fn status(number: i64) -> Status {
    match number {
        0 => Status::Pending,
        1 => Status::Sent,
        2 => Status::Delivered,
        3 => Status::Read,
        _ => Status::Failed,
    }
}
