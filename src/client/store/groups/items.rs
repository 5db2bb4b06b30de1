//! A group's items become state, messages and events, in the group's order, each in one transaction with the group's cursor.

use rusqlite::params;

use super::repair::Loss;
use super::{CLOSED, LEFT, MEMBER};
use crate::client::core::content::{self, Kind};
use crate::client::core::groups::{self, Committed, Received};
use crate::client::core::{group_api::ItemPage, repair};
use crate::client::store::{Db, Error, sql};
use crate::client::types::{ConversationId, Event, Status};
use crate::ids::{AccountId, ClientMessageId, DeviceAddr, DeviceId, GroupId, Seq};
use crate::mls::profile::Role;
use crate::mls::rules::{Actor, Roster};
use crate::wire::stream::{Envelope, GroupHead, GroupInvitation, GroupItem, GroupItemKind};

/// How long whoever is asked first waits before it commits what others proposed: several are often asked together.
const FIRST_MS: u64 = 200;
/// How much longer each admin behind it waits.
const ADMIN_MS: u64 = 2_000;
/// After how long members that are no admins do it.
pub(super) const MEMBER_MS: u64 = 15_000;

impl Db {
    /// Takes in an item. One that does not follow what is here only tells that there is more to fetch.
    pub(in crate::client) fn group_item(&self, item: &GroupItem) -> Result<(), Error> {
        let Ok(id) = GroupId::from_slice(&item.group_id) else { return Ok(()) };
        let Some(row) = self.group_row(id)? else { return Ok(()) };
        if row.state != MEMBER || item.seq <= row.cursor {
            return Ok(());
        }
        if item.after > row.cursor {
            self.mark(|changed| changed.outgoing = true);
            return self.group_head(id, Seq(item.seq));
        }
        self.apply_item(id, item)?;
        let mut update =
            self.connection.prepare_cached("UPDATE groups SET cursor = ?2, head = max(head, ?2) WHERE id = ?1 AND state = 1")?;
        update.execute(params![id, sql::int(item.seq)])?;
        Ok(())
    }

    /// Takes in what was fetched behind the cursor when `known` was the last item that this device knew of.
    pub(in crate::client) fn group_page(&self, id: GroupId, known: Seq, page: &ItemPage) -> Result<(), Error> {
        let Some(row) = self.group_row(id)?.filter(|row| row.state == MEMBER) else { return Ok(()) };
        if row.cursor < page.expired_to.0 {
            tracing::warn!("items of a group expired before this device had them");
            return self.lose_touch(id, Loss::Alone);
        }
        page.items.iter().try_for_each(|item| self.group_item(item))?;
        // What was only supposed is known now; what there is not yet will be told of. But what was heard of since the page was asked for counts.
        let head = if page.items.is_empty() { 0 } else { page.head.0 };
        let mut update = self
            .connection
            .prepare_cached("UPDATE groups SET head = max(cursor, ?2, CASE WHEN head > ?3 THEN head ELSE 0 END) WHERE id = ?1")?;
        update.execute(params![id, sql::int(head), sql::int(known.0)])?;
        Ok(())
    }

    /// The server says where a group is that was followed.
    pub(in crate::client) fn group_followed(&self, head: &GroupHead) -> Result<(), Error> {
        use crate::wire::stream::Code;
        let Ok(id) = GroupId::from_slice(&head.group_id) else { return Ok(()) };
        match head.code() {
            Code::Ok => self.group_head(id, Seq(head.seq)),
            // Out of it, or closed: the items say which.
            Code::Forbidden | Code::NotFound => self.group_behind(id),
            _ => Ok(()),
        }
    }

    /// This device was added to a group.
    pub(in crate::client) fn invitation(&self, by: DeviceAddr, envelope: &Envelope) -> Result<(), Error> {
        let Ok(invitation) = <GroupInvitation as prost::Message>::decode(envelope.content.clone()) else {
            tracing::warn!("an invitation that can't be read is dropped");
            return Ok(());
        };
        let Ok(id) = GroupId::from_slice(&invitation.group_id) else { return Ok(()) };
        let known = self.group_row(id)?;
        if known.as_ref().is_some_and(|row| row.state == MEMBER) {
            self.group_head(id, Seq(invitation.seq))?;
        }
        // It is told again after a crash of the server, and it may be older than what this device has joined since.
        if known.is_some_and(|row| row.state == MEMBER && row.epoch >= invitation.epoch) {
            return Ok(());
        }
        let mut insert = self.connection.prepare_cached("INSERT OR REPLACE INTO group_invitations VALUES (?1, ?2, ?3, ?4, ?5)")?;
        insert.execute(params![id, sql::int(invitation.epoch), sql::int(invitation.seq), by.account, invitation.welcome.as_ref()])?;
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }

    fn apply_item(&self, id: GroupId, item: &GroupItem) -> Result<(), Error> {
        let sender = AccountId::from_slice(&item.sender_account).ok().zip(DeviceId::new(item.sender_device).ok());
        let sender = sender.map(|(account, device)| DeviceAddr { account, device });
        let own = self.own()?;
        match item.kind() {
            GroupItemKind::Created | GroupItemKind::Unspecified => Ok(()),
            GroupItemKind::Closed => self.out_of_group(id, CLOSED),
            GroupItemKind::Message if sender == Some(own) => {
                self.group_accepted(id, ClientMessageId(item.client_message_id), Some(item.seq))
            }
            GroupItemKind::Message => self.group_message(id, item, sender),
            // This device has kept its own.
            GroupItemKind::Proposal if sender == Some(own) => Ok(()),
            GroupItemKind::Proposal | GroupItemKind::Commit => self.group_handshake(id, item, sender),
        }
    }

    fn group_handshake(&self, id: GroupId, item: &GroupItem, sender: Option<DeviceAddr>) -> Result<(), Error> {
        match self.in_group(id, |group, engine| group.receive(engine, &item.content))? {
            Ok(Received::Committed(committed)) => self.committed(id, &committed),
            Ok(Received::Removed(_)) => self.out_of_group(id, LEFT),
            Ok(Received::Leaving(device)) => self.proposed(id, device),
            Ok(Received::Message { .. } | Received::Own) => Ok(()),
            // It ended an epoch that this device is past, or was for one.
            Err(groups::Error::Past) => Ok(()),
            Err(groups::Error::Denied(_)) if item.kind() == GroupItemKind::Proposal => Ok(()),
            Err(error) if item.kind() == GroupItemKind::Proposal => {
                tracing::warn!(%error, "a proposal can't be taken in");
                Ok(())
            }
            Err(groups::Error::Tags) => {
                tracing::warn!("nobody can take in a commit of a group");
                self.lose_touch(id, Loss::Everybody(sender))
            }
            // The server gave it to everybody, so this device is the one that is wrong.
            Err(error) => {
                tracing::warn!(%error, "this device has lost touch with a group");
                self.lose_touch(id, Loss::Alone)
            }
        }
    }

    fn group_message(&self, id: GroupId, item: &GroupItem, sender: Option<DeviceAddr>) -> Result<(), Error> {
        let received = self.in_group(id, |group, engine| group.receive(engine, &item.content))?;
        match received {
            // Who wrote it is what the keys say, not what the server says.
            Ok(Received::Message { from, content, .. }) => match content::decode(&content) {
                Ok(content) => self.group_content(id, item.seq, from, &content),
                Err(invalid) => {
                    tracing::warn!(%invalid, "a message of a group that is no content is dropped");
                    Ok(())
                }
            },
            Ok(_) => Ok(()),
            // A commit was missed, or the keys are not there.
            Err(groups::Error::Missed { .. } | groups::Error::NotMember) => self.lose_touch(id, Loss::Alone),
            // Written before this device came, and placed behind that: not for it.
            Err(_) if self.group_row(id)?.is_some_and(|row| item.epoch < row.joined_epoch) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "a message of a group can't be decrypted");
                let Some(from) = sender else { return Ok(()) };
                self.tell(&Event::GroupUndecryptable { group: id, account: from.account, device: from.device })
            }
        }
    }

    fn group_content(&self, id: GroupId, seq: u64, from: DeviceAddr, content: &content::Content) -> Result<(), Error> {
        use crate::client::core::state::{StateKey, StateRead as _};
        if matches!(content.kind, Some(Kind::Typing(_) | Kind::Sent(_) | Kind::Retry(_) | Kind::Nothing(_)) | None) {
            return Ok(());
        }
        // A message that was encrypted again after an unknown outcome may be there twice.
        let seen = StateKey::Seen { author: from.account, message_id: content::id_of(content)?.0 };
        if super::state::SqlState(&self.connection).get(&seen)?.is_some() {
            return Ok(());
        }
        self.core(|tx| {
            tx.put(seen, Vec::new());
            Ok::<_, Error>(())
        })?;
        if !content.from_identity.is_empty() {
            self.claim(&content.from_identity, from.account)?;
        }
        let own = self.own()?.account;
        match &content.kind {
            Some(Kind::GroupRead(read)) => return self.group_read(id, from.account, read.seq.min(seq)),
            Some(Kind::GroupNameKey(said)) => return self.name_key_said(id, from, &said.key),
            _ => {}
        }
        let status = if from.account == own { Status::Sent } else { Status::Delivered };
        self.apply(ConversationId::Group(id), from.account, content, status)?;
        if matches!(content.kind, Some(Kind::Text(_))) {
            self.set_group_seq(from.account, content::id_of(content)?, seq)?;
        }
        Ok(())
    }

    /// The group is at a new epoch, by a commit of others or of this device.
    pub(super) fn committed(&self, id: GroupId, committed: &Committed) -> Result<(), Error> {
        let own = self.own()?;
        let before = self.group_row(id)?;
        let mine = committed.changes.committer == Actor::Member(own);
        // Only commits are overtaken by commits; a proposal of the old epoch is void, and asked for again.
        self.connection.execute(
            "UPDATE group_pending SET verdict = ?2 WHERE mls_group = ?1 AND kind = 1",
            params![id, if mine { super::changes::ACCEPTED } else { super::changes::OVERTAKEN }],
        )?;
        self.connection.execute("DELETE FROM group_pending WHERE mls_group = ?1 AND kind = 2", [id])?;
        self.connection.execute("UPDATE groups SET due_ms = NULL WHERE id = ?1 AND own_devices = 0", [id])?;
        self.note_group(id)?;
        let after = self.roster(id)?;
        let name = self.group_row(id)?.and_then(|row| row.name);
        let (old, new) = (committed.before.accounts(), after.accounts());
        let event = Event::GroupChanged {
            group: id,
            epoch: committed.epoch,
            by: match committed.changes.committer {
                Actor::Member(device) => Some(device.account),
                Actor::Joiner(_) | Actor::Server => None,
            },
            added: new.iter().filter(|account| !old.contains(account)).copied().collect(),
            removed: old.iter().filter(|account| !new.contains(account)).copied().collect(),
            name: name.filter(|name| before.is_none_or(|before| before.name.as_ref() != Some(name))),
            roles: (after.profile.owner, &after.profile.admins) != (committed.before.profile.owner, &committed.before.profile.admins),
        };
        // Renewed keys are nothing to show.
        let news = matches!(&event, Event::GroupChanged { added, removed, name, roles, .. }
            if !added.is_empty() || !removed.is_empty() || name.is_some() || *roles);
        self.mark(|changed| changed.outgoing = true);
        if news { self.tell(&event) } else { Ok(()) }
    }

    /// Somebody wants to leave, or the server wants somebody out: this device does it when it is its turn.
    fn proposed(&self, id: GroupId, leaving: DeviceAddr) -> Result<(), Error> {
        let wait = turn(&self.roster(id)?, self.own()?, Some(leaving));
        self.group_due(id, wait + repair::jitter(wait.max(FIRST_MS), &*self.random))
    }
}

/// How long this device leaves to others what any of them can do: the admin with the lowest leaf goes first. Not counting on one device.
pub(super) fn turn(roster: &Roster, own: DeviceAddr, without: Option<DeviceAddr>) -> u64 {
    let admins = roster.leaves.values().filter(|device| Some(**device) != without && roster.profile.role(device.account) >= Role::Admin);
    match admins.take_while(|device| **device != own).count() {
        _ if roster.profile.role(own.account) < Role::Admin => MEMBER_MS,
        before => FIRST_MS.max(ADMIN_MS * before as u64),
    }
}
