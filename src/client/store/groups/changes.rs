//! What this device changes in groups: prepared and kept before it is submitted, done once the server or the group's items say so.

use std::collections::BTreeSet;

use rusqlite::{OptionalExtension as _, params};

use super::repair::{Loss, SPREAD_MS};
use super::{CREATING, LOST, MEMBER};
use crate::client::core::group_api::GroupInfo;
use crate::client::core::groups::{self, Change, Created, Engine, Outgoing};
use crate::client::core::repair;
use crate::client::core::state::{StateTx, Writes};
use crate::client::store::state::{self, SqlState};
use crate::client::store::{Db, Error, sql};
use crate::client::types::{ConversationId, Event};
use crate::ids::{AccountId, DeviceAddr, GroupId, Seq};
use crate::mls::sender::external_sender;

/// About what a leaf takes in a tree, in bytes.
const LEAF_BYTES: usize = 180;

const NEW_GROUP: i64 = 0;
const COMMIT: i64 = 1;
const PROPOSAL: i64 = 2;

pub(super) const ACCEPTED: i64 = 1;
pub(super) const OVERTAKEN: i64 = 2;

/// What the person, or this device by itself, wants changed in a group. Kept apart from the group's state, so that it can be prepared again
/// when another commit came first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::client) struct Intent {
    /// Devices to add, with their KeyPackages. Those that are in it are passed over.
    pub add: Vec<(DeviceAddr, Vec<u8>)>,
    /// Accounts to remove. Those that are not in it are passed over.
    pub remove_accounts: Vec<AccountId>,
    /// Devices to remove, likewise.
    pub remove_devices: Vec<DeviceAddr>,
    /// A new name.
    pub name: Option<String>,
    /// A new owner.
    pub owner: Option<AccountId>,
    /// An account that is to be an admin, or no longer.
    pub admin: Option<(AccountId, bool)>,
    /// New keys, even if there is nothing else to change.
    pub renew: bool,
}

/// What became of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::client) enum Verdict {
    /// Not known.
    Unknown,
    /// Done.
    Accepted,
    /// Another commit came first.
    Conflict,
}

/// Something to submit.
#[derive(Debug, Clone)]
pub(in crate::client) struct Pending {
    /// What.
    pub what: Submission,
    /// What became of it.
    pub verdict: Verdict,
}

/// What is submitted.
#[derive(Debug, Clone)]
pub(in crate::client) enum Submission {
    /// A new group.
    Create(Created),
    /// A commit.
    Commit(Outgoing),
    /// A proposal.
    Proposal(Vec<u8>),
}

/// An external commit, and what to keep once it is accepted.
pub(in crate::client) struct Rejoin {
    /// To submit.
    pub outgoing: Outgoing,
    writes: Writes,
    /// Who can't have come back yet.
    left_behind: Vec<(DeviceAddr, Vec<u8>)>,
}

impl Db {
    /// Begins a group. It is there for the others once the server has it.
    pub(in crate::client) fn new_group(&self, name: &str, server: Option<&[u8]>) -> Result<GroupId, Error> {
        let mut bytes = [0; 16];
        self.random.fill(&mut bytes);
        let (id, now) = (GroupId::from_bytes(bytes), self.now());
        let created = self.with_engine(|engine| Ok(engine.create(id, name, server.map(external_sender), now)?.1))??;
        let mut insert = self.connection.prepare_cached("INSERT INTO groups (id, state, cursor, head) VALUES (?1, ?2, 0, 0)")?;
        insert.execute(params![id, CREATING])?;
        self.keep_pending(id, NEW_GROUP, 0, &created.tree, None, Some(&created.group_info))?;
        self.note_group(id)?;
        Ok(id)
    }

    fn keep_pending(
        &self,
        id: GroupId,
        kind: i64,
        epoch: u64,
        message: &[u8],
        welcome: Option<&[u8]>,
        group_info: Option<&[u8]>,
    ) -> Result<(), Error> {
        let mut insert = self.connection.prepare_cached("INSERT OR REPLACE INTO group_pending VALUES (?1, ?2, ?3, ?4, ?5, ?6, 0)")?;
        insert.execute(params![id, kind, sql::int(epoch), message, welcome, group_info])?;
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }

    /// What waits for its verdict.
    pub(in crate::client) fn pending(&self, id: GroupId) -> Result<Option<Pending>, Error> {
        let mut select = self
            .connection
            .prepare_cached("SELECT kind, epoch, message, welcome, group_info, verdict FROM group_pending WHERE mls_group = ?1")?;
        let pending = select.query_row([id], |row| {
            let (kind, epoch, message): (i64, i64, Vec<u8>) = (row.get(0)?, row.get(1)?, row.get(2)?);
            let (welcome, group_info) = (row.get(3)?, row.get::<_, Option<Vec<u8>>>(4)?.unwrap_or_default());
            Ok(Pending {
                what: match kind {
                    NEW_GROUP => Submission::Create(Created { group_info, tree: message }),
                    COMMIT => Submission::Commit(Outgoing { epoch: sql::uint(epoch), commit: message, welcome, group_info }),
                    _ => Submission::Proposal(message),
                },
                verdict: match row.get(5)? {
                    ACCEPTED => Verdict::Accepted,
                    OVERTAKEN => Verdict::Conflict,
                    _ => Verdict::Unknown,
                },
            })
        });
        Ok(pending.optional()?)
    }

    /// Prepares a change and keeps it; `false` if there is nothing to change (any more).
    pub(in crate::client) fn prepare_change(&self, id: GroupId, intent: &Intent) -> Result<bool, Error> {
        match self.group_row(id)?.map(|row| row.state) {
            Some(MEMBER) => {}
            Some(LOST) => return Err(groups::Error::OutOfTouch.into()),
            _ => return Err(groups::Error::NotMember.into()),
        }
        let now = self.now();
        let replaced: BTreeSet<DeviceAddr> = intent.remove_devices.iter().copied().collect();
        let prepared = self.in_group(id, |group, engine| {
            let roster = group.roster()?;
            let add: Vec<(DeviceAddr, &[u8])> = intent
                .add
                .iter()
                .filter(|(device, _)| roster.leaf_of(*device).is_none() || replaced.contains(device))
                .map(|(device, bytes)| (*device, bytes.as_slice()))
                .collect();
            let inside = |device: &&DeviceAddr| roster.leaf_of(**device).is_some();
            let admins = intent.admin.and_then(|(account, admin)| {
                let mut admins = roster.profile.admins.clone();
                admins.retain(|one| *one != account);
                admins.extend(admin.then_some(account));
                admins.sort_unstable();
                (admins != roster.profile.admins && account != roster.profile.owner).then_some(admins)
            });
            let name = intent.name.as_deref().filter(|name| group.name(engine).is_ok_and(|now| now.as_deref() != Some(name)));
            let change = Change {
                add,
                remove_accounts: intent.remove_accounts.iter().filter(|account| roster.has(**account)).copied().collect(),
                remove_devices: intent.remove_devices.iter().filter(inside).copied().collect(),
                name,
                owner: intent.owner.filter(|owner| *owner != roster.profile.owner),
                admins,
            };
            let nothing = change.add.is_empty()
                && change.remove_accounts.is_empty()
                && change.remove_devices.is_empty()
                && change.name.is_none()
                && change.owner.is_none()
                && change.admins.is_none();
            if nothing && !intent.renew && !group.has_proposals() {
                return Ok(None);
            }
            group.change(engine, &change, now).map(Some)
        })??;
        let Some(outgoing) = prepared else { return Ok(false) };
        self.keep_pending(id, COMMIT, outgoing.epoch, &outgoing.commit, outgoing.welcome.as_deref(), Some(&outgoing.group_info))?;
        Ok(true)
    }

    /// The server accepted what waited: a commit is merged, unless the group's items said so before.
    pub(in crate::client) fn submitted(&self, id: GroupId, seq: Seq) -> Result<(), Error> {
        let Some(pending) = self.pending(id)? else { return Ok(()) };
        match pending.what {
            Submission::Create(_) => {
                self.connection.execute(
                    "UPDATE groups SET state = 1, cursor = ?2, head = max(head, ?2) WHERE id = ?1 AND state = 0",
                    params![id, sql::int(seq.0)],
                )?;
                let by = self.own()?.account;
                self.tell(&Event::GroupJoined { group: id, by })?;
                // One's own other devices are to be in it as well.
                self.connection.execute("UPDATE groups SET own_devices = 1 WHERE id = ?1", [id])?;
                self.group_due(id, 0)?;
            }
            Submission::Commit(_) if pending.verdict == Verdict::Unknown => {
                let merged = self.in_group(id, |group, engine| group.accepted(engine))?;
                match merged {
                    Ok(committed) => self.committed(id, &committed)?,
                    Err(error) => {
                        tracing::warn!(%error, "an accepted change can't be merged");
                        self.lose_touch(id, Loss::Alone)?;
                    }
                }
                self.group_head(id, seq)?;
            }
            Submission::Commit(_) => {}
            Submission::Proposal(_) => self.group_head(id, seq)?,
        }
        self.mark(|changed| changed.outgoing = true);
        self.drop_pending(id)
    }

    /// The server says that another commit came first. Which one, the items tell; should they not, the change is void.
    pub(in crate::client) fn overtaken(&self, id: GroupId) -> Result<(), Error> {
        self.connection.execute("UPDATE group_pending SET verdict = ?2 WHERE mls_group = ?1 AND verdict = 0", params![id, OVERTAKEN])?;
        self.group_behind(id)
    }

    /// The change will not be made: nothing happened.
    pub(in crate::client) fn refused(&self, id: GroupId) -> Result<(), Error> {
        if self.group_row(id)?.is_some_and(|row| row.state == CREATING) {
            return self.never_made(id);
        }
        let cleared = self.in_group(id, |group, engine| if group.is_pending() { group.refused(engine) } else { Ok(()) })?;
        match cleared {
            Ok(()) | Err(groups::Error::NotMember) => self.drop_pending(id),
            Err(error) => Err(error.into()),
        }
    }

    fn never_made(&self, id: GroupId) -> Result<(), Error> {
        self.open_groups.borrow_mut().remove(&id);
        let _ = self.with_engine(|engine| engine.load(id)?.map_or(Ok(()), |group| group.forget(engine)))?;
        self.connection.execute("DELETE FROM groups WHERE id = ?1", [id])?;
        self.drop_pending(id)
    }

    pub(in crate::client) fn drop_pending(&self, id: GroupId) -> Result<(), Error> {
        self.connection.execute("DELETE FROM group_pending WHERE mls_group = ?1", [id])?;
        Ok(())
    }

    /// Joins by an invitation, with the tree of its epoch. `false`: it is of no use, and an external commit is needed.
    pub(in crate::client) fn join_group(&self, id: GroupId, epoch: u64, tree: &[u8]) -> Result<bool, Error> {
        let mut select =
            self.connection.prepare_cached("SELECT seq, account, welcome FROM group_invitations WHERE mls_group = ?1 AND epoch = ?2")?;
        let found = select.query_row(params![id, sql::int(epoch)], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).optional()?;
        let Some((seq, by, welcome)): Option<(i64, AccountId, Vec<u8>)> = found else { return Ok(true) };
        self.connection.execute("DELETE FROM group_invitations WHERE mls_group = ?1 AND epoch <= ?2", params![id, sql::int(epoch)])?;
        let known = self.group_row(id)?.is_some_and(|row| matches!(row.state, MEMBER | LOST));
        self.open_groups.borrow_mut().remove(&id);
        let joined = self.with_engine(|engine| {
            let group = engine.join(&welcome, tree, true)?;
            if group.id() == id { Ok(()) } else { Err(groups::Error::NotForUs) }
        })?;
        if let Err(error) = joined {
            tracing::info!(%error, "an invitation can't be used");
            // About so many are invited that may have the same trouble.
            self.lost(id, tree.len() / LEAF_BYTES)?;
            return Ok(false);
        }
        self.enter(id, sql::uint(seq))?;
        if known {
            self.count_repair(id)?;
        }
        self.tell(&if known { Event::GroupRejoined { group: id } } else { Event::GroupJoined { group: id, by } })?;
        Ok(true)
    }

    /// This device should be in a group and has no keys for it; perhaps it is one of so many.
    pub(in crate::client) fn lost(&self, id: GroupId, of: usize) -> Result<(), Error> {
        self.connection.execute("DELETE FROM group_invitations WHERE mls_group = ?1", [id])?;
        let wait = repair::jitter(of as u64 * SPREAD_MS, &*self.random);
        self.connection.execute(
            "INSERT INTO groups (id, state, cursor, head, repair_ms) VALUES (?1, ?2, 0, 0, ?3)
             ON CONFLICT (id) DO UPDATE SET state = ?2, repair_ms = ?3, broken = 0",
            params![id, LOST, sql::int(self.now().plus(wait).0)],
        )?;
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }

    /// This device is in the group, and has everything up to `seq`.
    fn enter(&self, id: GroupId, seq: u64) -> Result<(), Error> {
        self.connection.execute(
            "INSERT INTO groups (id, state, cursor, head) VALUES (?1, ?2, ?3, ?3)
             ON CONFLICT (id) DO UPDATE SET state = ?2, cursor = ?3, head = max(head, ?3), leaving = 0, due_ms = NULL,
             repair_ms = NULL, broken = 0",
            params![id, MEMBER, sql::int(seq)],
        )?;
        // What was encrypted with the keys before is encrypted anew.
        self.connection.execute("UPDATE group_outgoing SET ciphertext = NULL WHERE mls_group = ?1", [id])?;
        self.drop_pending(id)?;
        self.brought_back(id)?;
        self.mark(|changed| changed.outgoing = true);
        self.note_group(id)?;
        self.connection.execute("UPDATE groups SET joined_epoch = epoch WHERE id = ?1", [id])?;
        self.miss_name_key(id)
    }

    /// Prepares an external commit. Nothing is kept before the server has accepted it.
    pub(in crate::client) fn prepare_rejoin(&self, id: GroupId, info: &GroupInfo) -> Result<Rejoin, Error> {
        let storage = SqlState(&self.connection);
        let tx = StateTx::new(&storage);
        let random = self.random.clone();
        let (outgoing, keys) = {
            let engine = Engine::new(&tx, &*random)?;
            let (group, outgoing) = engine.rejoin(&info.group_info.0, &info.tree.0)?;
            if group.id() != id {
                return Err(groups::Error::NotForUs.into());
            }
            (outgoing, group.leaf_keys()?)
        };
        let (writes, _) = tx.finish();
        Ok(Rejoin { outgoing, writes, left_behind: self.left_behind(id, &keys)? })
    }

    /// The external commit was accepted.
    pub(in crate::client) fn rejoined(&self, id: GroupId, rejoin: Rejoin, seq: Seq) -> Result<(), Error> {
        self.open_groups.borrow_mut().remove(&id);
        state::apply(&self.connection, rejoin.writes, self.now())?;
        self.enter(id, seq.0)?;
        self.came_back(id, &rejoin.left_behind)?;
        self.tell(&Event::GroupRejoined { group: id })
    }

    /// The person wants to leave: what this device has to commit before it can ask to be taken out.
    pub(in crate::client) fn leave_group(&self, id: GroupId) -> Result<Intent, Error> {
        if self.group_row(id)?.is_none_or(|row| row.state != MEMBER) {
            return Err(groups::Error::NotMember.into());
        }
        self.connection.execute("UPDATE groups SET leaving = 1 WHERE id = ?1", [id])?;
        self.connection.execute("UPDATE messages SET unread = 0 WHERE conversation = ?1 AND unread = 1", [ConversationId::Group(id)])?;
        let own = self.own()?;
        let others = self.roster(id)?.leaves.into_values().filter(|leaf| leaf.account == own.account && *leaf != own);
        Ok(Intent { remove_devices: others.collect(), ..Intent::default() })
    }

    /// Asks to be taken out: a proposal to submit. `false`: nobody else is there, who could do it.
    pub(in crate::client) fn prepare_leave(&self, id: GroupId) -> Result<bool, Error> {
        let epoch = self.in_group(id, |group, engine| {
            if group.roster()?.leaves.len() <= 1 {
                return Ok(None);
            }
            Ok(Some((group.epoch(), group.leave(engine)?)))
        })??;
        let Some((epoch, proposal)) = epoch else { return Ok(false) };
        self.keep_pending(id, PROPOSAL, epoch, &proposal, None, None)?;
        Ok(true)
    }
}
