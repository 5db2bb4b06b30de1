//! Groups in the database: where each is, who is in it, and what this device still has to do in it.

mod changes;
mod items;
mod key_packages;
mod repair;
mod sending;

use rusqlite::{OptionalExtension as _, Row, params};

pub(in crate::client) use changes::{Intent, Submission, Verdict};
pub(in crate::client) use sending::is_group_request;

use super::state::{self, SqlState};
use super::{Db, Error, sql};
use crate::client::core::groups::{self, Engine, Group};
use crate::client::core::state::StateTx;
use crate::client::types::{ConversationId, Event, GroupMember, GroupRole, GroupState, GroupSummary, Membership};
use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId, Seq};
use crate::mls::profile::Role;
use crate::mls::rules::Roster;

pub(super) const CREATING: i64 = 0;
pub(super) const MEMBER: i64 = 1;
pub(super) const LOST: i64 = 2;
pub(super) const LEFT: i64 = 3;
pub(super) const CLOSED: i64 = 4;

/// Groups whose keys stay in memory between two steps: reading a large one from the database takes longer than what is done with it.
const OPEN_GROUPS: usize = 8;

/// A group as the database has it.
#[derive(Debug, Clone)]
pub(super) struct GroupRow {
    pub id: GroupId,
    pub state: i64,
    pub cursor: u64,
    pub head: u64,
    pub epoch: u64,
    pub name: Option<String>,
    pub accounts: u32,
    pub leaving: bool,
    pub repairs: u32,
    pub repaired_ms: u64,
    pub joined_epoch: u64,
}

const COLUMNS: &str = "id, state, cursor, head, epoch, name, accounts, leaving, repairs, repaired_ms, joined_epoch";

fn read_row(row: &Row<'_>) -> rusqlite::Result<GroupRow> {
    Ok(GroupRow {
        id: row.get(0)?,
        state: row.get(1)?,
        cursor: sql::uint(row.get(2)?),
        head: sql::uint(row.get(3)?),
        epoch: sql::uint(row.get(4)?),
        name: row.get(5)?,
        accounts: row.get(6)?,
        leaving: row.get(7)?,
        repairs: row.get(8)?,
        repaired_ms: sql::uint(row.get(9)?),
        joined_epoch: sql::uint(row.get(10)?),
    })
}

/// What this device has to do in a group, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::client) enum Task {
    /// Join by an invitation of this epoch.
    Join { epoch: u64 },
    /// Submit what has no verdict.
    Submit,
    /// Fetch items behind this one, up to the last one that is known of.
    CatchUp { after: Seq, head: Seq },
    /// Join by an external commit.
    Rejoin,
    /// Ask to be taken out.
    Leave,
    /// Bring back those whom a commit left behind that nobody could take in.
    BringBack,
    /// Commit what others proposed, and let one's own devices in or out.
    Tidy,
    /// Tell the key of the group's name, or ask for it.
    NameKey,
}

impl Db {
    /// Runs an operation in a group; what it changed is in the open transaction. An error of the group changes nothing.
    pub(super) fn in_group<T>(
        &self,
        id: GroupId,
        work: impl FnOnce(&mut Group, &Engine<'_, '_>) -> Result<T, groups::Error>,
    ) -> Result<Result<T, groups::Error>, Error> {
        let open = self.open_groups.borrow_mut().remove(&id);
        self.with_engine(|engine| {
            let mut group = match open {
                Some(group) => group,
                None => engine.load(id)?.ok_or(groups::Error::NotMember)?,
            };
            let done = work(&mut group, engine)?;
            Ok((done, group))
        })
        .map(|outcome| {
            outcome.map(|(done, group)| {
                let mut open = self.open_groups.borrow_mut();
                if open.len() >= OPEN_GROUPS {
                    open.clear();
                }
                open.insert(id, group);
                done
            })
        })
    }

    /// Runs an operation of this device in groups.
    pub(super) fn with_engine<T>(
        &self,
        work: impl FnOnce(&Engine<'_, '_>) -> Result<T, groups::Error>,
    ) -> Result<Result<T, groups::Error>, Error> {
        let storage = SqlState(&self.connection);
        let tx = StateTx::new(&storage);
        let random = self.random.clone();
        let done = Engine::new(&tx, &*random).and_then(|engine| work(&engine));
        match done {
            Ok(value) => {
                let (writes, _) = tx.finish();
                state::apply(&self.connection, writes, self.now())?;
                Ok(Ok(value))
            }
            Err(groups::Error::Storage(error)) => Err(error.into()),
            Err(error) => Ok(Err(error)),
        }
    }

    /// Keys of groups in memory may be ahead of the database: a transaction was undone.
    pub(super) fn forget_open_groups(&self) {
        self.open_groups.borrow_mut().clear();
    }

    pub(super) fn group_row(&self, id: GroupId) -> Result<Option<GroupRow>, Error> {
        let query = format!("SELECT {COLUMNS} FROM groups WHERE id = ?1");
        Ok(self.connection.prepare_cached(&query)?.query_row([id], read_row).optional()?)
    }

    /// Notes what members see of a group: its epoch, name and size.
    pub(super) fn note_group(&self, id: GroupId) -> Result<(), Error> {
        let seen = self.in_group(id, |group, engine| Ok((group.epoch(), group.name(engine)?, group.roster()?.accounts().len())))?;
        let (epoch, name, accounts) = seen?;
        let mut update =
            self.connection.prepare_cached("UPDATE groups SET epoch = ?2, name = coalesce(?3, name), accounts = ?4 WHERE id = ?1")?;
        update.execute(params![id, sql::int(epoch), name, accounts as i64])?;
        Ok(())
    }

    /// Groups that the stream is to carry: those that this device is in.
    pub(in crate::client) fn groups_to_follow(&self) -> Result<Vec<GroupId>, Error> {
        let mut select = self.connection.prepare_cached("SELECT id FROM groups WHERE state IN (1, 2)")?;
        Ok(select.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    /// Groups that this device has something to do in now.
    pub(in crate::client) fn groups_with_tasks(&self) -> Result<Vec<GroupId>, Error> {
        self.send_unplaced()?;
        let mut select = self.connection.prepare_cached(
            "SELECT id FROM groups WHERE state = 2 AND coalesce(repair_ms, 0) <= ?1
             OR state = 1 AND (head > cursor OR due_ms <= ?1 OR name_due_ms <= ?1 OR leaving = 1)
             UNION SELECT mls_group FROM group_pending UNION SELECT mls_group FROM group_invitations
             UNION SELECT mls_group FROM group_left_behind JOIN groups ON id = mls_group WHERE state = 1",
        )?;
        Ok(select.query_map([sql::int(self.now().0)], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
    }

    /// The next thing to do in a group.
    pub(in crate::client) fn group_task(&self, id: GroupId) -> Result<Option<Task>, Error> {
        let row = self.group_row(id)?;
        let mut select =
            self.connection.prepare_cached("SELECT epoch, seq FROM group_invitations WHERE mls_group = ?1 ORDER BY epoch DESC")?;
        let read = |row: &Row<'_>| Ok((sql::uint(row.get(0)?), sql::uint(row.get(1)?)));
        let invited: Option<(u64, u64)> = select.query_row([id], read).optional()?;
        if let Some((epoch, seq)) = invited {
            // Who is still in it and was brought back takes in first what it still can.
            let behind = row.as_ref().filter(|row| row.state == MEMBER && row.cursor < seq && row.head > row.cursor);
            return Ok(Some(behind.map_or(Task::Join { epoch }, |row| Task::CatchUp { after: Seq(row.cursor), head: Seq(row.head) })));
        }
        let Some(row) = row else { return Ok(None) };
        if matches!(row.state, LEFT | CLOSED) {
            self.connection.execute("DELETE FROM group_pending WHERE mls_group = ?1", [id])?;
            return Ok(None);
        }
        let now = sql::int(self.now().0);
        if row.state == LOST {
            let mut select = self.connection.prepare_cached("SELECT coalesce(repair_ms, 0) <= ?2 FROM groups WHERE id = ?1")?;
            let due: bool = select.query_row(params![id, now], |row| row.get(0))?;
            return Ok(due.then_some(Task::Rejoin));
        }
        if let Some(pending) = self.pending(id)? {
            // Whether another commit came first is for the items to say.
            if pending.verdict == Verdict::Conflict && row.head > row.cursor {
                return Ok(Some(Task::CatchUp { after: Seq(row.cursor), head: Seq(row.head) }));
            }
            return Ok(Some(Task::Submit));
        }
        if row.state == CREATING {
            return Ok(None);
        }
        if row.head > row.cursor {
            return Ok(Some(Task::CatchUp { after: Seq(row.cursor), head: Seq(row.head) }));
        }
        let mut select = self.connection.prepare_cached(
            "SELECT coalesce(due_ms <= ?2, 0), coalesce(name_due_ms <= ?2, 0),
             EXISTS (SELECT 1 FROM group_left_behind WHERE mls_group = ?1) FROM groups WHERE id = ?1",
        )?;
        let (due, name, behind): (bool, bool, bool) =
            select.query_row(params![id, now], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        if behind {
            return Ok(Some(Task::BringBack));
        }
        // Leaving is asked for in the person's name, again in each epoch that did not do it.
        let asked = if row.leaving { self.in_group(id, |group, _| Ok(group.is_leaving()))?? } else { false };
        Ok(match (row.leaving && !asked, due) {
            (true, _) => Some(Task::Leave),
            (false, true) => Some(Task::Tidy),
            (false, false) => name.then_some(Task::NameKey),
        })
    }

    /// Something is to be committed, by this device in that many milliseconds unless another one did by then.
    pub(super) fn group_due(&self, id: GroupId, wait_ms: u64) -> Result<(), Error> {
        let due = sql::int(self.now().plus(wait_ms).0);
        self.connection
            .prepare_cached("UPDATE groups SET due_ms = min(coalesce(due_ms, ?2), ?2) WHERE id = ?1")?
            .execute(params![id, due])?;
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }

    /// Nothing waits to be committed any more; or, with `later`, nothing that can be now.
    pub(in crate::client) fn group_tidied(&self, id: GroupId, later: bool) -> Result<(), Error> {
        let due = later.then(|| sql::int(self.now().plus(LATER_MS).0));
        self.connection.execute("UPDATE groups SET due_ms = ?2, own_devices = ?3 WHERE id = ?1", params![id, due, later])?;
        Ok(())
    }

    /// This device is out of the group: its keys go, the history stays.
    pub(super) fn out_of_group(&self, id: GroupId, state: i64) -> Result<(), Error> {
        let Some(row) = self.group_row(id)?.filter(|row| row.state != state) else { return Ok(()) };
        self.open_groups.borrow_mut().remove(&id);
        // Without keys there is nothing to forget.
        let _ = self.with_engine(|engine| engine.load(id)?.map_or(Ok(()), |group| group.forget(engine)))?;
        self.connection.execute("UPDATE groups SET state = ?2, due_ms = NULL WHERE id = ?1", params![id, state])?;
        self.connection.execute("DELETE FROM group_pending WHERE mls_group = ?1", [id])?;
        self.fail_group_messages(id)?;
        self.tell(&if state == CLOSED { Event::GroupClosed { group: id } } else { Event::GroupLeft { group: id, asked: row.leaving } })
    }

    /// The server says that this device is not in the group, or that there is none. An invitation that this does not answer came meanwhile, and
    /// is for later.
    pub(in crate::client) fn group_gone(&self, id: GroupId, closed: bool, invited: Option<u64>) -> Result<(), Error> {
        if let Some(epoch) = invited {
            let mut delete = self.connection.prepare_cached("DELETE FROM group_invitations WHERE mls_group = ?1 AND epoch <= ?2")?;
            delete.execute(params![id, sql::int(epoch)])?;
        }
        self.out_of_group(id, if closed { CLOSED } else { LEFT })
    }

    /// The server said where the group is.
    pub(in crate::client) fn group_head(&self, id: GroupId, head: Seq) -> Result<(), Error> {
        let mut update = self.connection.prepare_cached("UPDATE groups SET head = ?2 WHERE id = ?1 AND head < ?2")?;
        update.execute(params![id, sql::int(head.0)])?;
        Ok(())
    }

    /// There may be more than this device knows of: looks.
    pub(in crate::client) fn group_behind(&self, id: GroupId) -> Result<(), Error> {
        self.connection.execute("UPDATE groups SET head = max(head, cursor + 1) WHERE id = ?1", [id])?;
        self.mark(|changed| changed.outgoing = true);
        Ok(())
    }

    /// All groups, the one with the newest message first.
    pub(in crate::client) fn groups(&self) -> Result<Vec<GroupSummary>, Error> {
        let query = format!("SELECT {COLUMNS}, muted, expire_s FROM groups");
        let mut select = self.connection.prepare_cached(&query)?;
        let rows = select.query_map([], |row| Ok((read_row(row)?, row.get::<_, bool>(10)?, row.get::<_, u32>(11)?)))?;
        let rows: Vec<(GroupRow, bool, u32)> = rows.collect::<rusqlite::Result<_>>()?;
        let mut groups = Vec::with_capacity(rows.len());
        for (row, muted, expire_s) in rows {
            let conversation = ConversationId::Group(row.id);
            let mut count = self.connection.prepare_cached("SELECT count(*) FROM messages WHERE conversation = ?1 AND unread = 1")?;
            groups.push(GroupSummary {
                group: row.id,
                name: row.name,
                membership: membership(row.state),
                epoch: row.epoch,
                accounts: row.accounts as usize,
                muted,
                expire_s,
                unread: sql::uint(count.query_row([conversation], |row| row.get(0))?),
                last: self.history(conversation, u64::MAX, 1)?.pop(),
            });
        }
        groups.sort_by_key(|group| std::cmp::Reverse(group.last.as_ref().map(|last| last.position)));
        Ok(groups)
    }

    /// Who is in a group.
    pub(in crate::client) fn group_members(&self, id: GroupId) -> Result<Vec<GroupMember>, Error> {
        let roster = self.roster(id)?;
        let member = |account: AccountId| {
            Ok(GroupMember {
                account,
                identities: if account == self.own()?.account { self.own_identities()? } else { self.identities_of(account)? },
                role: role(roster.profile.role(account)),
                devices: devices_of(&roster, account),
            })
        };
        roster.accounts().into_iter().map(member).collect()
    }

    /// The group as its members see it now.
    pub(in crate::client) fn roster(&self, id: GroupId) -> Result<Roster, Error> {
        Ok(self.in_group(id, |group, _| group.roster())??)
    }

    /// Where its keys are.
    pub(in crate::client) fn group_state(&self, id: GroupId) -> Result<GroupState, Error> {
        use sha2::Digest as _;
        let fingerprint = |group: &Group| sha2::Sha256::digest(group.authenticator()).into();
        let state = |group: &Group| GroupState { epoch: group.epoch(), tree_hash: group.tree_hash(), fingerprint: fingerprint(group) };
        Ok(self.in_group(id, |group, _| Ok(state(group)))??)
    }

    /// Whether the person wants to be woken up for it.
    pub(in crate::client) fn mute_group(&self, id: GroupId, muted: bool) -> Result<(), Error> {
        let changed = self.connection.execute("UPDATE groups SET muted = ?2 WHERE id = ?1", params![id, muted])?;
        if changed == 0 { Err(groups::Error::NotMember.into()) } else { Ok(()) }
    }

    /// Devices of one's own came or went: each group is looked at, by one of the devices first.
    pub(super) fn own_devices_changed(&self) -> Result<(), Error> {
        let own = self.own()?;
        let wait = crate::client::core::repair::jitter(OWN_DEVICES_MS, &*self.random) + OWN_DEVICES_MS * u64::from(own.device.get() - 1);
        for id in self.groups_to_follow()? {
            self.connection.execute("UPDATE groups SET own_devices = 1 WHERE id = ?1", [id])?;
            self.group_due(id, wait)?;
        }
        Ok(())
    }

    /// Devices of this account that a group lacks, and those in it that are no more.
    pub(in crate::client) fn own_devices_in(&self, id: GroupId) -> Result<(Vec<DeviceId>, Vec<DeviceAddr>), Error> {
        let asked: bool = self.connection.query_row("SELECT own_devices FROM groups WHERE id = ?1", [id], |row| row.get(0))?;
        let own = self.own()?;
        if !asked || !self.devices_known(own.account)? {
            return Ok((Vec::new(), Vec::new()));
        }
        let inside = devices_of(&self.roster(id)?, own.account);
        let mut known = self.devices(own.account)?;
        known.push(own.device);
        let missing = known.iter().filter(|device| !inside.contains(device)).copied().collect();
        let gone = inside.into_iter().filter(|device| !known.contains(device));
        Ok((missing, gone.map(|device| DeviceAddr { account: own.account, device }).collect()))
    }
}

/// How long one device leaves it to those with lower numbers to bring a new one of the account into its groups.
const OWN_DEVICES_MS: u64 = 2_000;
/// When a new device of one's own is looked at again that has published no KeyPackages yet.
const LATER_MS: u64 = 10 * 60_000;

fn devices_of(roster: &Roster, account: AccountId) -> Vec<DeviceId> {
    let mut devices: Vec<DeviceId> = roster.leaves.values().filter(|leaf| leaf.account == account).map(|leaf| leaf.device).collect();
    devices.sort_unstable();
    devices
}

fn membership(state: i64) -> Membership {
    match state {
        CREATING => Membership::Creating,
        MEMBER => Membership::Member,
        LOST => Membership::Rejoining,
        CLOSED => Membership::Closed,
        _ => Membership::Left,
    }
}

fn role(role: Role) -> GroupRole {
    match role {
        Role::Member => GroupRole::Member,
        Role::Admin => GroupRole::Admin,
        Role::Owner => GroupRole::Owner,
    }
}
