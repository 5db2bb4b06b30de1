//! A device that has lost touch with a group comes back, without everybody doing so at once.
//!
//! A commit that one device alone can't take in is that device's own matter: it joins again by an external commit after a short random wait. One whose
//! tags are wrong nobody can take in (they are keyed by the group's secrets, which the server does not have): the admins come back first, and the
//! first of them brings everybody else back by one commit with a Welcome. Whoever was not brought back in time comes back by itself, spread over
//! a time that grows with the group. Each repair after another waits longer.

use std::collections::BTreeSet;

use rusqlite::{OptionalExtension as _, params};

use super::items::{MEMBER_MS, turn};
use super::{Db, Error, GroupRow, Intent, LEFT, LOST, MEMBER};
use crate::client::core::groups::{self, LeafKeys};
use crate::client::core::repair;
use crate::client::store::sql;
use crate::client::types::Event;
use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId};
use crate::mls::profile::Role;

/// For each account of a group, this much longer is the time over which its devices spread external commits: about ten a second, each of which
/// the server checks in 10 ms and all others take in.
pub(super) const SPREAD_MS: u64 = 100;
/// A group whose external commit was overtaken counts for that many accounts at least.
const OVERTAKEN_ACCOUNTS: u64 = 10;
/// After one repair the next one waits about this long, doubling up to [`REPAIR_MAX_MS`].
const REPAIR_MS: u64 = 10_000;
const REPAIR_MAX_MS: u64 = 3_600_000;
/// Repairs are forgotten that long after the last one.
const REPAIRS_KEPT_MS: u64 = 3_600_000;
/// After that many attempts without success the person is told.
const TOLD_AFTER: u32 = 3;
/// A name's key that nobody told is asked for again after about that long.
const NAME_AGAIN_MS: u64 = 3_600_000;
/// Once the key was told, that long nobody tells it again.
const NAME_TOLD_MS: u64 = 60_000;
/// How often the server's list is looked through for groups that this device does not know of.
const LOOK_MS: u64 = 24 * 3_600_000;
const LOOKED_MS: &str = "groups_looked_ms";

/// Why this device can't go on in a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Loss {
    /// It missed something, or can't take in what others can.
    Alone,
    /// By a commit of this account's, by the server's word, that nobody can take in.
    Everybody(Option<DeviceAddr>),
}

impl Db {
    /// This device has lost touch with a group: it joins again when it is its turn.
    pub(super) fn lose_touch(&self, id: GroupId, loss: Loss) -> Result<(), Error> {
        let Some(row) = self.group_row(id)?.filter(|row| row.state == MEMBER) else { return Ok(()) };
        let spread = repair::jitter(u64::from(row.accounts) * SPREAD_MS, &*self.random);
        let wait = match loss {
            Loss::Alone => spread,
            Loss::Everybody(by) => match self.in_group(id, |group, _| group.roster())? {
                Ok(roster) => match turn(&roster, self.own()?, by) {
                    wait if wait >= MEMBER_MS => wait + spread,
                    wait => wait + repair::jitter(wait, &*self.random),
                },
                Err(_) => MEMBER_MS + spread,
            },
        };
        let wait = wait + self.repair_wait(&row);
        let everybody = loss != Loss::Alone;
        let mut update = self.connection.prepare_cached("UPDATE groups SET state = ?2, repair_ms = ?3, broken = ?4 WHERE id = ?1")?;
        update.execute(params![id, LOST, sql::int(self.now().plus(wait).0), everybody])?;
        self.mark(|changed| changed.outgoing = true);
        match loss {
            Loss::Alone => Ok(()),
            Loss::Everybody(by) => self.tell(&Event::GroupBroken { group: id, epoch: row.epoch, by: by.map(|device| device.account) }),
        }
    }

    /// How much longer a repair waits since others came before it. The same at all members, so that they keep their turns.
    fn repair_wait(&self, row: &GroupRow) -> u64 {
        let recent = self.now().since(crate::clock::UnixMillis(row.repaired_ms)) < REPAIRS_KEPT_MS;
        match row.repairs {
            repairs @ 1.. if recent => (REPAIR_MS << (repairs - 1).min(20)).min(REPAIR_MAX_MS),
            _ => 0,
        }
    }

    fn rejoin_in(&self, id: GroupId, wait_ms: u64) -> Result<(), Error> {
        let due = sql::int(self.now().plus(wait_ms).0);
        self.connection.execute("UPDATE groups SET repair_ms = ?2 WHERE id = ?1", params![id, due])?;
        Ok(())
    }

    /// Somebody else's commit came before the external commit: another attempt soon. Meanwhile somebody may bring this device back.
    pub(in crate::client) fn rejoin_overtaken(&self, id: GroupId) -> Result<(), Error> {
        let accounts = self.group_row(id)?.map_or(1, |row| u64::from(row.accounts));
        self.rejoin_in(id, repair::jitter(accounts.max(OVERTAKEN_ACCOUNTS) * SPREAD_MS, &*self.random))
    }

    pub(super) fn count_repair(&self, id: GroupId) -> Result<GroupRow, Error> {
        let (now, kept) = (sql::int(self.now().0), sql::int(self.now().0.saturating_sub(REPAIRS_KEPT_MS)));
        let mut update = self.connection.prepare_cached(
            "UPDATE groups SET repairs = CASE WHEN repaired_ms > ?3 THEN repairs + 1 ELSE 1 END, repaired_ms = ?2 WHERE id = ?1",
        )?;
        update.execute(params![id, now, kept])?;
        self.group_row(id)?.ok_or_else(|| groups::Error::NotMember.into())
    }

    /// The external commit was refused, or could not even be made: another attempt, later each time, at most once an hour.
    pub(in crate::client) fn rejoin_refused(&self, id: GroupId) -> Result<(), Error> {
        let row = self.count_repair(id)?;
        let wait = self.repair_wait(&row) / 2;
        self.rejoin_in(id, wait + repair::jitter(wait, &*self.random))?;
        if row.repairs == TOLD_AFTER { self.tell(&Event::GroupStuck { group: id }) } else { Ok(()) }
    }

    /// A person who changes something does not wait for this device's turn, unless repair follows upon repair: then `false`.
    pub(in crate::client) fn repair_now(&self, id: GroupId) -> Result<bool, Error> {
        let Some(row) = self.group_row(id)?.filter(|row| row.state == LOST) else { return Ok(true) };
        let may = self.repair_wait(&row) == 0;
        if may {
            self.rejoin_in(id, 0)?;
        }
        Ok(may)
    }

    /// Devices whose leaves are what they were when this device could last take something in.
    pub(super) fn left_behind(&self, id: GroupId, now: &LeafKeys) -> Result<Vec<(DeviceAddr, Vec<u8>)>, Error> {
        let broken: Option<bool> =
            self.connection.query_row("SELECT broken FROM groups WHERE id = ?1", [id], |row| row.get(0)).optional()?;
        if broken != Some(true) {
            return Ok(Vec::new());
        }
        let own = self.own()?;
        let Ok(before) = self.in_group(id, |group, _| group.leaf_keys())? else { return Ok(Vec::new()) };
        let same = before.into_iter().filter(|(device, keys)| *device != own && now.get(device) == Some(keys));
        Ok(same.map(|(device, keys)| (device, keys.encryption)).collect())
    }

    /// This device joined again by itself; the devices that were left behind are its to bring back if it is an admin's.
    pub(super) fn came_back(&self, id: GroupId, left_behind: &[(DeviceAddr, Vec<u8>)]) -> Result<(), Error> {
        self.count_repair(id)?;
        let own = self.own()?;
        let admin = self.in_group(id, |group, _| group.role(own.account))??.is_some_and(|role| role >= Role::Admin);
        if admin {
            let mut insert = self.connection.prepare_cached("INSERT OR REPLACE INTO group_left_behind VALUES (?1, ?2, ?3, ?4)")?;
            for (device, key) in left_behind {
                insert.execute(params![id, device.account, device.device, key])?;
            }
        }
        Ok(())
    }

    /// Devices that this one is to bring back: those that have not come back since, of accounts that it may remove.
    pub(in crate::client) fn to_bring_back(&self, id: GroupId) -> Result<Vec<DeviceAddr>, Error> {
        let mut select = self.connection.prepare_cached("SELECT account, device, key FROM group_left_behind WHERE mls_group = ?1")?;
        let rows = select.query_map([id], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?;
        let noted: Vec<(AccountId, DeviceId, Vec<u8>)> = rows.collect::<rusqlite::Result<_>>()?;
        if noted.is_empty() {
            return Ok(Vec::new());
        }
        let own = self.own()?.account;
        let (roster, keys) = self.in_group(id, |group, _| Ok((group.roster()?, group.leaf_keys()?)))??;
        let role = roster.profile.role(own);
        let left = noted.into_iter().filter(|(account, device, key)| {
            let address = DeviceAddr { account: *account, device: *device };
            let may = *account == own || role >= Role::Admin && role > roster.profile.role(*account);
            may && keys.get(&address).is_some_and(|now| now.encryption == *key)
        });
        Ok(left.map(|(account, device, _)| DeviceAddr { account, device }).collect())
    }

    /// Prepares the commit that takes out those that are left behind and adds them at once, with these KeyPackages. Only those count that are signed
    /// with the key of the leaf that they replace: else the server could put itself in anybody's place. `false`: there is nobody to bring back.
    pub(in crate::client) fn prepare_bring_back(&self, id: GroupId, packages: &[(DeviceAddr, Vec<u8>)]) -> Result<bool, Error> {
        let left: BTreeSet<DeviceAddr> = self.to_bring_back(id)?.into_iter().collect();
        let now = self.now();
        let add = self.in_group(id, |group, engine| {
            let keys = group.leaf_keys()?;
            let usable = |(device, package): &&(DeviceAddr, Vec<u8>)| {
                let keys = keys.get(device).filter(|_| left.contains(device));
                keys.is_some_and(|keys| keys.are_of(engine, *device, package, now))
            };
            Ok(packages.iter().filter(usable).cloned().collect::<Vec<_>>())
        })??;
        if add.is_empty() {
            return Ok(false);
        }
        let remove_devices = add.iter().map(|(device, _)| *device).collect();
        self.prepare_change(id, &Intent { add, remove_devices, ..Intent::default() })
    }

    /// Who was to be brought back was, or comes back by itself.
    pub(in crate::client) fn brought_back(&self, id: GroupId) -> Result<(), Error> {
        self.connection.execute("DELETE FROM group_left_behind WHERE mls_group = ?1", [id])?;
        Ok(())
    }

    /// This device is in a group whose name it can't read: it asks the others for the key.
    pub(super) fn miss_name_key(&self, id: GroupId) -> Result<(), Error> {
        let name = self.in_group(id, |group, engine| group.name(engine))??;
        let due = name.is_none().then(|| sql::int(self.now().0));
        self.connection.execute("UPDATE groups SET name_due_ms = ?2 WHERE id = ?1", params![id, due])?;
        Ok(())
    }

    /// Tells the key of the group's name, or asks for it.
    pub(in crate::client) fn name_key_turn(&self, id: GroupId) -> Result<(), Error> {
        let key = self.in_group(id, |group, engine| Ok((group.name(engine)?.is_some(), engine.name_key(id)?)))??;
        match key {
            (true, Some(key)) => {
                self.name_key_told(id)?;
                self.send_name_key(id, key.as_bytes())
            }
            _ => {
                let again = NAME_AGAIN_MS + repair::jitter(NAME_AGAIN_MS, &*self.random);
                let due = sql::int(self.now().plus(again).0);
                self.connection.execute("UPDATE groups SET name_due_ms = ?2 WHERE id = ?1", params![id, due])?;
                self.send_name_key(id, &[])
            }
        }
    }

    fn name_key_told(&self, id: GroupId) -> Result<(), Error> {
        let mut update = self.connection.prepare_cached("UPDATE groups SET name_due_ms = NULL, name_told_ms = ?2 WHERE id = ?1")?;
        update.execute(params![id, sql::int(self.now().0)])?;
        Ok(())
    }

    /// A member asks for the key of the name (an empty one), or tells it.
    pub(super) fn name_key_said(&self, id: GroupId, from: DeviceAddr, key: &[u8]) -> Result<(), Error> {
        let known = self.in_group(id, |group, engine| group.name(engine))??.is_some();
        if !key.is_empty() {
            if known {
                return self.name_key_told(id);
            }
            // One that does not open the name changes nothing: somebody else may tell the right one.
            if self.in_group(id, |group, engine| engine.learn_name_key(group, &groups::name_key(key)?))?.is_err() {
                return Ok(());
            }
            self.name_key_told(id)?;
            self.note_group(id)?;
            let row = self.group_row(id)?.ok_or(groups::Error::NotMember)?;
            return self.tell(&Event::GroupChanged {
                group: id,
                epoch: row.epoch,
                by: None,
                added: Vec::new(),
                removed: Vec::new(),
                name: row.name,
                roles: false,
            });
        }
        if !known || from == self.own()? {
            return Ok(());
        }
        // One of all answers: the others see it, and keep silent.
        let turn = turn(&self.roster(id)?, self.own()?, Some(from));
        let accounts = self.group_row(id)?.map_or(1, |row| u64::from(row.accounts));
        let wait = turn + repair::jitter(if turn >= MEMBER_MS { accounts * SPREAD_MS } else { turn }, &*self.random);
        let told: i64 = self.connection.query_row("SELECT name_told_ms FROM groups WHERE id = ?1", [id], |row| row.get(0))?;
        let due = self.now().plus(wait).0.max(sql::uint(told).saturating_add(NAME_TOLD_MS));
        let mut update =
            self.connection.prepare_cached("UPDATE groups SET name_due_ms = min(coalesce(name_due_ms, ?2), ?2) WHERE id = ?1")?;
        update.execute(params![id, sql::int(due)])?;
        Ok(())
    }

    /// Whether it is time to look for groups that this device is in without knowing: it was away for longer than invitations are kept.
    pub(in crate::client) fn groups_unlooked(&self) -> Result<bool, Error> {
        Ok(self.now().0.saturating_sub(sql::meta_number(&self.connection, LOOKED_MS)?) >= LOOK_MS)
    }

    /// What was missed may have been an invitation.
    pub(in crate::client) fn look_for_groups(&self) -> Result<(), Error> {
        Ok(sql::set_meta_number(&self.connection, LOOKED_MS, 0)?)
    }

    /// Of the account's groups those that this device is not in, as far as it knows.
    pub(in crate::client) fn groups_unknown(&self, listed: &[GroupId]) -> Result<Vec<GroupId>, Error> {
        let mut unknown = Vec::new();
        for id in listed {
            let invited = "SELECT EXISTS (SELECT 1 FROM group_invitations WHERE mls_group = ?1)";
            let invited: bool = self.connection.prepare_cached(invited)?.query_row([id], |row| row.get(0))?;
            if !invited && self.group_row(*id)?.is_none_or(|row| row.state == LEFT) {
                unknown.push(*id);
            }
        }
        Ok(unknown)
    }

    /// All of the account's groups were looked through; this device has a leaf in these.
    pub(in crate::client) fn groups_found(&self, found: &[GroupId]) -> Result<(), Error> {
        sql::set_meta_number(&self.connection, LOOKED_MS, self.now().0)?;
        found.iter().try_for_each(|id| self.lost(*id, 0))
    }
}
