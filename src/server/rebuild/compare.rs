//! Compares the live view with another one of the same log, while both are written. See `store::compare` for what can be said of a row.
//!
//! Everything that does not agree at first sight is looked at again until it agrees or the time is up: a row that one view
//! is about to change is no difference.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use futures_util::{Stream, pin_mut};
use tokio::time::Instant;

use crate::ids::{AccountId, DeviceAddr, Generation, GroupId, Identity, Offset, Partition, Seq};
use crate::limits;
use crate::log::layout::Layout;
use crate::log::{EventLog, Topic, TopicPartition};
use crate::server::ServerError;
use crate::store::compare::{Range, Verdict, rows};
use crate::store::cql::CqlStore;
use crate::store::groups::GroupStore as _;
use crate::store::{DeliveryStore as _, DirectoryStore as _, InboxState, MarkKey, StoreError};

mod groups;

/// Rows that are looked at again; past that a difference is taken at first sight.
const AGAIN: usize = 10_000;
/// Rows looked at together, at one look at the positions.
const TOGETHER: usize = 64;
/// Before a second look.
const PAUSE: Duration = Duration::from_secs(1);
/// Rows that are named in the end.
const NAMED: usize = 20;

/// What became of the rows of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// The same in both.
    pub equal: u64,
    /// Not the same, or in one view only.
    pub different: u64,
    /// Changed too fast to be compared, or one view is too far behind.
    pub undecided: u64,
    /// Differ by what only records said that are no longer on the log.
    pub forgotten: u64,
}

/// How two views compare.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// By kind of row.
    pub kinds: BTreeMap<&'static str, Tally>,
    /// Some of those that differ.
    pub named: Vec<String>,
    /// Records that the live view has applied and the other one has not.
    pub behind: u64,
}

impl Comparison {
    /// Rows that differ.
    pub fn different(&self) -> u64 {
        self.kinds.values().map(|tally| tally.different).sum()
    }
}

/// Names a row of either view.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Inbox(DeviceAddr),
    Mark(MarkKey),
    Account(AccountId),
    Identity(Identity, AccountId),
    DeviceKeys(DeviceAddr),
    Group(GroupId),
    GroupsOf(AccountId),
}

impl Key {
    const fn kind(&self) -> &'static str {
        match self {
            Self::Inbox(_) => "inboxes",
            Self::Mark(_) => "marks",
            Self::Account(_) => "accounts",
            Self::Identity(..) => "identities",
            Self::DeviceKeys(_) => "device_keys",
            Self::Group(_) => "groups",
            Self::GroupsOf(_) => "group_members",
        }
    }

    fn name(&self) -> String {
        let device = |device: &DeviceAddr| format!("{} device {}", device.account, device.device);
        let of = match self {
            Self::Inbox(of) | Self::DeviceKeys(of) => device(of),
            Self::Mark(key) => format!("{} from {}", key.recipient, device(&key.sender)),
            Self::Account(account) | Self::GroupsOf(account) => account.to_string(),
            Self::Group(group) => group.to_string(),
            // A person's name at a platform is not for logs.
            Self::Identity(_, account) => format!("of {account}"),
        };
        format!("{}: {of}", self.kind())
    }
}

/// Compares the whole of both; what does not agree at once gets so much time.
pub async fn compare(log: &dyn EventLog, live: &CqlStore, other: &CqlStore, patience: Duration) -> Result<Comparison, ServerError> {
    let views = Views { log, live, other };
    let mut run = Run { views: &views, outcome: Comparison::default(), again: Vec::new(), bounds: None };
    run.both(|view| view.all_inboxes(), Key::Inbox).await?;
    run.both(|view| view.all_marks(), Key::Mark).await?;
    run.both(|view| view.all_accounts(), Key::Account).await?;
    run.both(|view| view.all_device_keys(), Key::DeviceKeys).await?;
    run.links().await?;
    run.both(|view| view.all_groups(), Key::Group).await?;
    run.both(|view| view.all_group_members(), Key::GroupsOf).await?;
    run.look_again(patience).await?;
    run.outcome.behind = views.behind().await?;
    Ok(run.outcome)
}

struct Views<'a> {
    log: &'a dyn EventLog,
    live: &'a CqlStore,
    other: &'a CqlStore,
}

/// Where both views were before rows were read.
struct Bounds {
    inbox: BTreeMap<Partition, Part>,
    directory: Vec<Offset>,
    groups: Vec<Part>,
    layout: Arc<Layout>,
}

/// Of one partition of `inbox` or of `groups`.
struct Part {
    generation: Generation,
    /// Where the view is that is behind.
    lower: Offset,
    earliest: Offset,
    end: Offset,
}

impl Views<'_> {
    async fn bounds(&self) -> Result<Bounds, ServerError> {
        let partitions = |topic| (0..self.log.partitions(topic)).map(Partition);
        let layout = self.log.layout();
        let mut bounds = Bounds { inbox: BTreeMap::new(), directory: Vec::new(), groups: Vec::new(), layout: Arc::clone(&layout) };
        for partition in partitions(Topic::Inbox) {
            let Some(generation) = layout.generation_of(partition) else { continue };
            let lower = self.live.position(partition).await?.min(self.other.position(partition).await?);
            let of = TopicPartition { topic: Topic::Inbox, partition };
            let (earliest, end) = self.log.bounds(of).await.map_err(|error| ServerError(error.to_string()))?;
            bounds.inbox.insert(partition, Part { generation, lower, earliest, end });
        }
        for partition in partitions(Topic::Directory) {
            let lower = self.live.directory_position(partition).await?.min(self.other.directory_position(partition).await?);
            bounds.directory.push(lower);
        }
        for partition in partitions(Topic::Groups) {
            let lower = self.live.group_position(partition).await?.min(self.other.group_position(partition).await?);
            let of = TopicPartition { topic: Topic::Groups, partition };
            let (earliest, end) = self.log.bounds(of).await.map_err(|error| ServerError(error.to_string()))?;
            bounds.groups.push(Part { generation: Generation(0), lower, earliest, end });
        }
        Ok(bounds)
    }

    async fn behind(&self) -> Result<u64, ServerError> {
        let mut behind = 0;
        for partition in (0..self.log.partitions(Topic::Inbox)).map(Partition) {
            behind += self.live.position(partition).await?.0.saturating_sub(self.other.position(partition).await?.0);
        }
        for partition in (0..self.log.partitions(Topic::Directory)).map(Partition) {
            behind += self.live.directory_position(partition).await?.0.saturating_sub(self.other.directory_position(partition).await?.0);
        }
        for partition in (0..self.log.partitions(Topic::Groups)).map(Partition) {
            behind += self.live.group_position(partition).await?.0.saturating_sub(self.other.group_position(partition).await?.0);
        }
        Ok(behind)
    }

    async fn judge(&self, key: &Key, bounds: &Bounds) -> Result<Verdict, StoreError> {
        match key {
            Key::Inbox(device) => self.inbox(*device, range(bounds, &device.account)).await,
            Key::Mark(key) => {
                let (one, other) = futures_util::try_join!(self.live.marks(vec![*key]), self.other.marks(vec![*key]))?;
                let first = |marks: Vec<_>| marks.into_iter().next().flatten();
                Ok(rows(first(one), first(other), range(bounds, &key.recipient)))
            }
            Key::Account(account) => {
                let (one, other) = futures_util::try_join!(self.live.account(*account), self.other.account(*account))?;
                if one == other {
                    return Ok(Verdict::Equal);
                }
                let applied = [&one, &other].map(|record| record.as_ref().map_or(Offset(0), |record| record.applied));
                Ok(later(applied, directory(bounds, account)))
            }
            Key::Identity(identity, account) => {
                let (one, other) = futures_util::try_join!(self.live.identity(identity), self.other.identity(identity))?;
                if one == other { Ok(Verdict::Equal) } else { self.of_account(account, bounds).await }
            }
            Key::DeviceKeys(device) => {
                let (one, other) = futures_util::try_join!(self.live.device_keys(*device), self.other.device_keys(*device))?;
                if one == other { Ok(Verdict::Equal) } else { self.of_account(&device.account, bounds).await }
            }
            Key::Group(group) => groups::group(self.live, self.other, *group, group_range(bounds, group)).await,
            Key::GroupsOf(account) => {
                let all = limits::GROUPS_PER_ACCOUNT;
                let (one, other) =
                    futures_util::try_join!(self.live.groups_of(*account, None, all), self.other.groups_of(*account, None, all))?;
                // What explains the difference is said by the groups themselves.
                for group in one.iter().chain(&other).filter(|group| one.contains(group) != other.contains(group)) {
                    match groups::group(self.live, self.other, *group, group_range(bounds, group)).await? {
                        Verdict::Equal | Verdict::Differs => return Ok(Verdict::Differs),
                        Verdict::Later => return Ok(Verdict::Later),
                        Verdict::Forgotten => {}
                    }
                }
                Ok(if one == other { Verdict::Equal } else { Verdict::Forgotten })
            }
        }
    }

    /// Rows that do not say themselves what they hold follow their account.
    async fn of_account(&self, account: &AccountId, bounds: &Bounds) -> Result<Verdict, StoreError> {
        let (one, other) = futures_util::try_join!(self.live.account(*account), self.other.account(*account))?;
        let applied = [one, other].map(|record| record.map_or(Offset(0), |record| record.applied));
        Ok(later(applied, directory(bounds, account)))
    }

    async fn inbox(&self, device: DeviceAddr, range: Range) -> Result<Verdict, StoreError> {
        let (one, other) = futures_util::try_join!(self.live.inboxes(vec![device]), self.other.inboxes(vec![device]))?;
        let [one, other] = [one, other].map(|states| states.into_iter().next().flatten());
        let verdict = rows(one, other, range);
        if matches!(verdict, Verdict::Differs | Verdict::Forgotten) {
            return Ok(verdict);
        }
        // Also of an inbox that never stands still: what waits in it, up to where both are.
        let done = |state: Option<InboxState>| state.map_or(Seq::ZERO, |state| state.cursor.max(state.expired_to));
        let (mut after, to) = (done(one).max(done(other)), Seq(range.bound.0.saturating_sub(1)));
        while after < to {
            let (items, bytes) = (limits::CQL_PAGE_ROWS, limits::INBOX_PAGE_BYTES);
            let (mine, theirs) = futures_util::try_join!(
                self.live.pending(device, after, to, items, bytes),
                self.other.pending(device, after, to, items, bytes)
            )?;
            if mine != theirs {
                return Ok(if verdict == Verdict::Equal { Verdict::Differs } else { verdict });
            }
            let Some(last) = mine.last() else { break };
            after = last.seq;
        }
        Ok(verdict)
    }
}

/// A newer generation's partition is applied once all that the account had before is, so the newest that both have begun decides.
fn range(bounds: &Bounds, account: &AccountId) -> Range {
    let parts: Vec<&Part> = bounds.layout.partitions_for(account).iter().filter_map(|partition| bounds.inbox.get(partition)).collect();
    let at = |part: &&Part| Seq::at(part.generation, part.lower);
    let bound = parts.iter().find(|part| part.lower > Offset(0)).or(parts.last()).map_or(Seq::ZERO, at);
    // The oldest that still holds something.
    let first = parts.iter().rev().find(|part| part.earliest < part.end);
    let whole = |part: &&&Part| part.generation == Generation(0) && part.earliest == Offset(0);
    let nothing = parts.iter().all(|part| part.end == Offset(0));
    let begins = match first {
        Some(part) if whole(&part) => None,
        Some(part) => Some(Seq::at(part.generation, part.earliest)),
        None if nothing => None,
        None => Some(Seq::MAX),
    };
    Range { bound, begins }
}

fn group_range(bounds: &Bounds, group: &GroupId) -> Range {
    let partition = Partition::of_group(group, u16::try_from(bounds.groups.len()).unwrap_or(u16::MAX));
    let Some(part) = bounds.groups.get(usize::from(partition.0)) else { return Range { bound: Seq::ZERO, begins: None } };
    let begins = (part.earliest > Offset(0)).then_some(Seq::at(part.generation, part.earliest));
    Range { bound: Seq::at(part.generation, part.lower), begins }
}

fn directory(bounds: &Bounds, account: &AccountId) -> Offset {
    let partition = Partition::of(account, u16::try_from(bounds.directory.len()).unwrap_or(u16::MAX));
    bounds.directory.get(usize::from(partition.0)).copied().unwrap_or(Offset(0))
}

/// An account says which commands it holds, as the position behind them.
fn later([one, other]: [Offset; 2], bound: Offset) -> Verdict {
    if one != other && one.max(other) > bound { Verdict::Later } else { Verdict::Differs }
}

struct Run<'a> {
    views: &'a Views<'a>,
    outcome: Comparison,
    again: Vec<Key>,
    bounds: Option<(Instant, Bounds)>,
}

impl<'a> Run<'a> {
    /// Every row of either view.
    async fn both<K, R, S>(&mut self, all: impl Fn(&'a CqlStore) -> S, key: impl Fn(K) -> Key) -> Result<(), ServerError>
    where
        S: Stream<Item = Result<Vec<(K, R)>, StoreError>>,
    {
        self.walk(all(self.views.live), |(name, _)| key(name), true).await?;
        self.walk(all(self.views.other), |(name, _)| key(name), false).await
    }

    async fn links(&mut self) -> Result<(), ServerError> {
        let key = |(identity, account)| Key::Identity(identity, account);
        self.walk(self.views.live.all_identities(), key, true).await?;
        self.walk(self.views.other.all_identities(), key, false).await
    }

    /// Equal rows are counted in the first walk; the second looks for what only the other view has.
    async fn walk<T>(
        &mut self,
        pages: impl Stream<Item = Result<Vec<T>, StoreError>>,
        key: impl Fn(T) -> Key,
        count: bool,
    ) -> Result<(), ServerError> {
        pin_mut!(pages);
        while let Some(page) = pages.try_next().await? {
            let mut keys = page.into_iter().map(&key).collect::<Vec<_>>().into_iter();
            loop {
                let some: Vec<Key> = keys.by_ref().take(TOGETHER).collect();
                if some.is_empty() {
                    break;
                }
                for (key, verdict) in self.judge(some).await? {
                    match verdict {
                        Verdict::Equal if !count => {}
                        Verdict::Equal => self.outcome.kinds.entry(key.kind()).or_default().equal += 1,
                        _ if self.again.len() < AGAIN => self.again.push(key),
                        verdict => self.count(&key, verdict),
                    }
                }
            }
        }
        Ok(())
    }

    async fn judge(&mut self, keys: Vec<Key>) -> Result<Vec<(Key, Verdict)>, ServerError> {
        // Bounds that were looked up a while ago are lower than they could be, and as true.
        if self.bounds.as_ref().is_none_or(|(at, _)| at.elapsed() > PAUSE) {
            self.bounds = Some((Instant::now(), self.views.bounds().await?));
        }
        let Some((_, bounds)) = &self.bounds else { return Ok(Vec::new()) };
        let views = self.views;
        let judged = stream::iter(keys)
            .map(|key| async move {
                let verdict = views.judge(&key, bounds).await?;
                Ok::<_, StoreError>((key, verdict))
            })
            .buffered(limits::CQL_WRITES_AT_ONCE);
        Ok(judged.try_collect().await?)
    }

    async fn look_again(&mut self, patience: Duration) -> Result<(), ServerError> {
        let until = Instant::now() + patience;
        let mut left = std::mem::take(&mut self.again);
        left.sort();
        left.dedup();
        loop {
            let over = Instant::now() >= until;
            let mut still = Vec::new();
            let mut keys = left.into_iter();
            loop {
                let some: Vec<Key> = keys.by_ref().take(TOGETHER).collect();
                if some.is_empty() {
                    break;
                }
                for (key, verdict) in self.judge(some).await? {
                    match verdict {
                        Verdict::Differs | Verdict::Later if !over => still.push(key),
                        verdict => self.count(&key, verdict),
                    }
                }
            }
            if still.is_empty() {
                return Ok(());
            }
            left = still;
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn count(&mut self, key: &Key, verdict: Verdict) {
        let tally = self.outcome.kinds.entry(key.kind()).or_default();
        match verdict {
            Verdict::Equal => tally.equal += 1,
            Verdict::Differs => tally.different += 1,
            Verdict::Later => tally.undecided += 1,
            Verdict::Forgotten => tally.forgotten += 1,
        }
        if verdict == Verdict::Differs && self.outcome.named.len() < NAMED {
            self.outcome.named.push(key.name());
        }
    }
}
