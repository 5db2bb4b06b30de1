//! Work for groups that goes on beside the stream: joining, catching up, and changes with their verdicts.
//!
//! One piece of work for a group at a time, under the group's lock; items of the stream come in between, which is fine: they are the
//! order that decides, and what they decide is in the database.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use crate::client::core::api::ApiError;
use crate::client::core::groups::Error as GroupError;
use crate::client::core::repair;
use crate::client::store::{Error as StoreError, Intent, Submission, Task, Verdict};
use crate::ids::{AccountId, DeviceAddr, GroupId};
use crate::limits;
use crate::wire::stream::Code;

use super::{Inner, WorkError};

/// Rounds of a change that other commits overtook. With 1,500 members that all change something, somebody gets through in each.
const CONFLICT_ROUNDS: u32 = 64;
/// Attempts at bringing back those whom a broken commit left behind; whoever is not comes back by itself.
const BRING_BACK_ROUNDS: u32 = 8;
/// Devices of one such commit: it stays well below the largest one that is accepted.
const BRING_BACK_DEVICES: usize = limits::GROUP_ACCOUNTS;
/// Steps of one piece of work: more are left to the next look.
const STEPS: usize = 1_000;
/// How long a change that the person waits for is repeated while the server is away.
const PATIENCE: Duration = Duration::from_secs(60);

impl Inner {
    fn group_lock(&self, group: GroupId) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.group_locks.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody holds are not worth keeping.
        if locks.len() >= limits::GROUPS_PER_ACCOUNT {
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
        }
        locks.entry(group).or_default().clone()
    }

    /// Does what this device has to do in a group.
    pub(in crate::client) async fn work_in_group(&self, group: GroupId) -> Result<(), WorkError> {
        let lock = self.group_lock(group);
        let _held = lock.lock().await;
        self.settle(group, true).await
    }

    /// Until nothing is left to do; without `all`, only until the group is as the server has it.
    async fn settle(&self, group: GroupId, all: bool) -> Result<(), WorkError> {
        for _ in 0..STEPS {
            let task = self.store.run(move |db| db.group_task(group)).await?;
            match task {
                None => return Ok(()),
                Some(Task::Join { epoch }) => self.join(group, epoch).await?,
                Some(Task::Submit) => {
                    self.submit(group).await?;
                }
                Some(Task::CatchUp { after, head }) => match self.api.group_items(group, after).await {
                    Ok(page) => self.store.run(move |db| db.group_page(group, head, &page)).await?,
                    Err(error) => self.gone(group, error, None).await?,
                },
                Some(Task::Rejoin) => self.rejoin(group).await?,
                Some(Task::BringBack | Task::Leave | Task::Tidy | Task::NameKey) if !all => return Ok(()),
                Some(Task::BringBack) => self.bring_back(group).await?,
                Some(Task::Leave) => self.ask_to_leave(group).await?,
                Some(Task::Tidy) => self.tidy(group).await?,
                Some(Task::NameKey) => self.store.run(move |db| db.name_key_turn(group)).await?,
            }
        }
        Ok(())
    }

    /// An error that says that this device is out of the group, or the group closed, is an answer. `invited`: to an invitation of this epoch.
    async fn gone(&self, group: GroupId, error: ApiError, invited: Option<u64>) -> Result<(), WorkError> {
        match error.code() {
            Some(Code::Forbidden) => Ok(self.store.run(move |db| db.group_gone(group, false, invited)).await?),
            Some(Code::NotFound) => Ok(self.store.run(move |db| db.group_gone(group, true, invited)).await?),
            _ => Err(error.into()),
        }
    }

    async fn join(&self, group: GroupId, epoch: u64) -> Result<(), WorkError> {
        match self.api.group_tree(group, epoch).await {
            Ok(tree) => {
                self.store.run(move |db| db.join_group(group, epoch, &tree)).await?;
                self.entered(group);
                Ok(())
            }
            // The invitation is old: the tree of its epoch is not kept any more.
            Err(error) if error.code() == Some(Code::NotFound) => Ok(self.store.run(move |db| db.lost(group, 0)).await?),
            Err(error) => self.gone(group, error, Some(epoch)).await,
        }
    }

    /// Joins again by an external commit. One that came too late is tried again soon, one that is refused later and later.
    async fn rejoin(&self, group: GroupId) -> Result<(), WorkError> {
        let info = match self.api.group_info(group).await {
            Ok(info) => info,
            Err(error) => return self.gone(group, error, None).await,
        };
        let rejoin = match self.store.run(move |db| db.prepare_rejoin(group, &info)).await {
            Ok(rejoin) => rejoin,
            Err(error) if is_groups_own(&error) => return self.rejoin_refused(group, &error).await,
            Err(error) => return Err(error.into()),
        };
        match self.api.commit_group(group, &rejoin.outgoing).await {
            Ok(place) => {
                self.store.run(move |db| db.rejoined(group, rejoin, place.seq)).await?;
                self.entered(group);
                Ok(())
            }
            Err(error) if error.code() == Some(Code::Conflict) => Ok(self.store.run(move |db| db.rejoin_overtaken(group)).await?),
            Err(error) if error.is_transient() || error.code() == Some(Code::Unauthenticated) => Err(error.into()),
            Err(error) => self.rejoin_refused(group, &error).await,
        }
    }

    async fn rejoin_refused(&self, group: GroupId, error: &(dyn std::error::Error + Sync)) -> Result<(), WorkError> {
        tracing::warn!(%error, "a group can't be joined again now");
        Ok(self.store.run(move |db| db.rejoin_refused(group)).await?)
    }

    /// Takes out those whom a broken commit left behind, and adds them in the same commit: they come back by its Welcome.
    async fn bring_back(&self, group: GroupId) -> Result<(), WorkError> {
        let left = self.store.run(move |db| db.to_bring_back(group)).await?;
        let mut accounts: Vec<AccountId> = left.iter().map(|device| device.account).collect();
        accounts.dedup();
        let mut packages = Vec::new();
        for batch in accounts.chunks(limits::GROUP_ACCOUNTS) {
            packages.extend(self.packages(batch).await?.0);
        }
        for batch in packages.chunks(BRING_BACK_DEVICES) {
            if let Err(error) = self.bring_back_batch(group, batch.to_vec()).await {
                match error {
                    // They come back by themselves.
                    WorkError::Store(error) if is_groups_own(&error) => tracing::warn!(%error, "members can't be brought back"),
                    other => return Err(other),
                }
            }
        }
        Ok(self.store.run(move |db| db.brought_back(group)).await?)
    }

    async fn bring_back_batch(&self, group: GroupId, packages: Vec<(DeviceAddr, Vec<u8>)>) -> Result<(), WorkError> {
        let packages = Arc::new(packages);
        for round in 0..BRING_BACK_ROUNDS {
            let job = packages.clone();
            if !self.store.run(move |db| db.prepare_bring_back(group, &job)).await? {
                break;
            }
            match self.verdict(group).await? {
                Verdict::Accepted => break,
                Verdict::Conflict | Verdict::Unknown => self.wait(round).await,
            }
            self.catch_up_for_verdict(group).await?;
        }
        Ok(())
    }

    /// Looks for groups that this device is in without knowing: its invitation expired before it was fetched.
    pub(in crate::client) async fn find_groups(&self) -> Result<(), WorkError> {
        let listed = self.api.groups().await?;
        let unknown = self.store.run(move |db| db.groups_unknown(&listed)).await?;
        let mut found = Vec::new();
        for group in unknown {
            match self.api.group_devices(group).await {
                Ok(devices) if devices.contains(&self.credential.address) => found.push(group),
                Ok(_) => {}
                Err(error) if matches!(error.code(), Some(Code::Forbidden | Code::NotFound)) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.store.run(move |db| db.groups_found(&found)).await?)
    }

    /// The server ended what the stream followed when this device was taken out, which it need not have noticed: it asks anew.
    fn entered(&self, group: GroupId) {
        self.entered.lock().unwrap_or_else(PoisonError::into_inner).insert(group);
    }

    async fn wait(&self, round: u32) {
        tokio::time::sleep(Duration::from_millis(repair::backoff(round.min(4), &*self.random))).await;
    }

    /// Submits what waits for its verdict, and notes it.
    async fn submit(&self, group: GroupId) -> Result<Verdict, WorkError> {
        let Some(pending) = self.store.run(move |db| db.pending(group)).await? else { return Ok(Verdict::Accepted) };
        match pending.verdict {
            Verdict::Unknown => {}
            Verdict::Accepted => {
                self.store.run(move |db| db.drop_pending(group)).await?;
                return Ok(Verdict::Accepted);
            }
            Verdict::Conflict => {
                self.store.run(move |db| db.refused(group)).await?;
                return Ok(Verdict::Conflict);
            }
        }
        let answer = match &pending.what {
            Submission::Create(created) => self.api.create_group(created).await,
            Submission::Commit(outgoing) => self.api.commit_group(group, outgoing).await,
            Submission::Proposal(proposal) => self.api.propose_group(group, proposal).await,
        };
        match answer {
            Ok(place) => {
                self.store.run(move |db| db.submitted(group, place.seq)).await?;
                Ok(Verdict::Accepted)
            }
            Err(error) if error.code() == Some(Code::Conflict) && matches!(pending.what, Submission::Commit(_)) => {
                self.store.run(move |db| db.overtaken(group)).await?;
                // The items say whether it was this device's own commit that won, whose answer was lost.
                Ok(Verdict::Unknown)
            }
            Err(error) if error.code() == Some(Code::Conflict) && matches!(pending.what, Submission::Proposal(_)) => {
                self.store
                    .run(move |db| {
                        db.drop_pending(group)?;
                        db.overtaken(group)
                    })
                    .await?;
                Ok(Verdict::Conflict)
            }
            // Nothing is known, or it is to be said again later: the same bytes.
            Err(error) if error.is_transient() || error.code() == Some(Code::Unauthenticated) => Err(error.into()),
            Err(error) => {
                // The rules forbid it, or this device is out: the items say which.
                let look = matches!(error.code(), Some(Code::Forbidden | Code::NotFound));
                self.store
                    .run(move |db| {
                        db.refused(group)?;
                        if look { db.group_behind(group) } else { Ok(()) }
                    })
                    .await?;
                Err(error.into())
            }
        }
    }

    /// The verdict on what waits, whatever it takes; what is not known after [`PATIENCE`] is submitted again in the background.
    async fn verdict(&self, group: GroupId) -> Result<Verdict, WorkError> {
        let begun = tokio::time::Instant::now();
        let mut attempts = 0;
        loop {
            let outcome = match self.submit(group).await {
                Ok(Verdict::Unknown) => match self.catch_up_for_verdict(group).await {
                    Ok(()) => continue,
                    Err(error) => Err(error),
                },
                other => other,
            };
            match outcome {
                Err(WorkError::Api(error)) if error.is_transient() && begun.elapsed() < PATIENCE => {
                    attempts += 1;
                    self.wait(attempts).await;
                }
                other => return other,
            }
        }
    }

    /// Fetches until it is known whose commit ended the epoch.
    async fn catch_up_for_verdict(&self, group: GroupId) -> Result<(), WorkError> {
        for _ in 0..STEPS {
            let task = self.store.run(move |db| db.group_task(group)).await?;
            let Some(Task::CatchUp { after, head }) = task else { return Ok(()) };
            let page = self.api.group_items(group, after).await?;
            self.store.run(move |db| db.group_page(group, head, &page)).await?;
        }
        Ok(())
    }

    /// Creates a group.
    pub(in crate::client) async fn create_group(&self, name: String) -> Result<GroupId, WorkError> {
        let server = self.api.group_sender().await?;
        let group = self.store.run(move |db| db.new_group(&name, server.as_deref())).await?;
        let lock = self.group_lock(group);
        let _held = lock.lock().await;
        self.verdict(group).await?;
        Ok(group)
    }

    /// Changes a group: prepared anew as often as other commits come first.
    pub(in crate::client) async fn change_group(&self, group: GroupId, intent: Intent) -> Result<(), WorkError> {
        let lock = self.group_lock(group);
        let _held = lock.lock().await;
        self.change(group, intent).await
    }

    async fn change(&self, group: GroupId, intent: Intent) -> Result<(), WorkError> {
        let intent = Arc::new(intent);
        for round in 0..CONFLICT_ROUNDS {
            let soon = self.store.run(move |db| db.repair_now(group)).await?;
            self.settle(group, false).await?;
            let job = intent.clone();
            match self.store.run(move |db| db.prepare_change(group, &job)).await {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                // Others are coming back as well.
                Err(StoreError::Groups(GroupError::OutOfTouch)) if soon => {
                    self.wait(round).await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            match self.verdict(group).await? {
                Verdict::Accepted => return Ok(()),
                Verdict::Conflict | Verdict::Unknown => self.wait(round).await,
            }
        }
        Err(WorkError::Incomplete)
    }

    /// Adds accounts, each with all devices that can be added. Those of whom no device could are returned.
    pub(in crate::client) async fn invite(&self, group: GroupId, accounts: Vec<AccountId>) -> Result<Vec<AccountId>, WorkError> {
        let lock = self.group_lock(group);
        let _held = lock.lock().await;
        self.settle(group, false).await?;
        let roster = self.store.run(move |db| db.roster(group)).await?;
        let mut wanted: Vec<AccountId> = Vec::with_capacity(accounts.len());
        for account in accounts {
            if !roster.has(account) && !wanted.contains(&account) {
                wanted.push(account);
            }
        }
        let mut unreachable = Vec::new();
        for batch in wanted.chunks(limits::GROUP_ACCOUNTS) {
            let (add, without) = self.packages(batch).await?;
            unreachable.extend(without);
            if !add.is_empty() {
                self.change(group, Intent { add, ..Intent::default() }).await?;
            }
        }
        Ok(unreachable)
    }

    async fn packages(&self, accounts: &[AccountId]) -> Result<(Vec<(DeviceAddr, Vec<u8>)>, Vec<AccountId>), WorkError> {
        let fetched = self.api.key_packages(accounts).await?;
        let (mut add, mut without) = (Vec::new(), fetched.gone);
        for account in fetched.accounts {
            let before = add.len();
            for device in account.devices {
                let address = DeviceAddr { account: account.account_id, device: device.device_id };
                add.extend(device.key_package.map(|package| (address, package.0)));
            }
            if add.len() == before {
                without.push(account.account_id);
            }
        }
        Ok((add, without))
    }

    /// Leaves a group: this account's other devices are removed, and this one asks to be. Alone in it, the owner closes it.
    pub(in crate::client) async fn leave_group(&self, group: GroupId) -> Result<(), WorkError> {
        let lock = self.group_lock(group);
        let _held = lock.lock().await;
        self.settle(group, false).await?;
        let intent = self.store.run(move |db| db.leave_group(group)).await?;
        if !intent.remove_devices.is_empty() {
            self.change(group, intent).await?;
        }
        self.settle(group, true).await
    }

    async fn ask_to_leave(&self, group: GroupId) -> Result<(), WorkError> {
        if self.store.run(move |db| db.prepare_leave(group)).await? {
            self.submit(group).await?;
            return Ok(());
        }
        self.api.close_group(group).await?;
        Ok(self.store.run(move |db| db.group_gone(group, true, None)).await?)
    }

    /// Closes a group, for everybody.
    pub(in crate::client) async fn close_group(&self, group: GroupId) -> Result<(), WorkError> {
        let lock = self.group_lock(group);
        let _held = lock.lock().await;
        match self.api.close_group(group).await {
            Ok(()) => {}
            Err(error) if error.code() == Some(Code::NotFound) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.store.run(move |db| db.group_gone(group, true, None)).await?)
    }

    /// Commits what others proposed, and lets one's own devices in or out.
    async fn tidy(&self, group: GroupId) -> Result<(), WorkError> {
        let (missing, gone) = self.store.run(move |db| db.own_devices_in(group)).await?;
        let mut intent = Intent { remove_devices: gone, ..Intent::default() };
        if !missing.is_empty() {
            let own = self.credential.address.account;
            let (add, _) = self.packages(&[own]).await?;
            intent.add = add.into_iter().filter(|(device, _)| missing.contains(&device.device)).collect();
        }
        let later = intent.add.len() < missing.len();
        // Here, not by `change`: it settles first, and this is part of settling.
        let job = intent.clone();
        if self.store.run(move |db| db.prepare_change(group, &job)).await? {
            match self.verdict(group).await? {
                Verdict::Accepted => {}
                // Whoever was first did it, or the next look will.
                Verdict::Conflict | Verdict::Unknown => return Ok(()),
            }
        }
        Ok(self.store.run(move |db| db.group_tidied(group, later)).await?)
    }

    /// Keeps enough KeyPackages on the server, and none that is old.
    pub(in crate::client) async fn maintain_key_packages(&self) -> Result<(), WorkError> {
        let counts = self.api.key_package_counts().await?;
        if let Some(upload) = self.store.run(move |db| db.make_key_packages(counts)).await? {
            self.api.upload_key_packages(&upload).await?;
            self.store.run(move |db| db.key_packages_published(&upload)).await?;
        }
        Ok(())
    }
}

/// Whether a store error is the group's own: the change is not possible, and the connection is not to blame.
pub(super) fn is_groups_own(error: &StoreError) -> bool {
    matches!(error, StoreError::Groups(_))
}
