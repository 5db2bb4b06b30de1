//! The tree of a group's current epoch: from the snapshot and the commits behind it, off the async threads, and kept at hand.

use std::sync::Arc;

use bytes::Bytes;
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;

use super::error::GroupError;
use super::reads::Info;
use crate::clock::Random;
use crate::ids::{GroupId, Seq};
use crate::limits;
use crate::mls::public::{Public, Refused};
use crate::store::groups::{GroupItem, GroupItemKind, GroupStore};

/// How often a group is read anew because commits came meanwhile.
const TRIES: usize = 4;

#[derive(Clone)]
struct Weight;

impl Weighter<(GroupId, u64), Info> for Weight {
    fn weight(&self, _: &(GroupId, u64), info: &Info) -> u64 {
        (128 + info.tree.len() + info.group_info.len()) as u64
    }
}

/// See the module's own words.
pub(super) struct Trees {
    cache: Cache<(GroupId, u64), Info, Weight>,
    restoring: Semaphore,
}

impl Trees {
    pub(super) fn new() -> Self {
        let trees = limits::GROUP_TREES_BYTES / (64 * 1024);
        Self {
            cache: Cache::with_weighter(trees, limits::GROUP_TREES_BYTES as u64, Weight),
            restoring: Semaphore::new(limits::GROUP_RESTORES_AT_ONCE),
        }
    }

    /// GroupInfo and tree of the same, current epoch.
    pub(super) async fn info(&self, store: &Arc<dyn GroupStore>, random: &Arc<dyn Random>, group: GroupId) -> Result<Info, GroupError> {
        for _ in 0..TRIES {
            let Some(head) = store.group(group).await? else { return Err(GroupError::no_group()) };
            if let Some(info) = self.cache.get(&(group, head.epoch)) {
                return Ok(info);
            }
            // One at a time: whoever waited finds what the one before it restored.
            let _turn = self.restoring.acquire().await.map_err(|_| GroupError::Unavailable)?;
            if let Some(info) = self.cache.get(&(group, head.epoch)) {
                return Ok(info);
            }
            let saved = store.group_snapshot(group, head.snapshot_epoch).await?;
            if let (Some(group_info), Some(saved)) = (store.group_info(group).await?, saved)
                && let Some(info) = restore(store, random, (group, head.snapshot_at), saved, group_info).await?
            {
                self.cache.insert((group, info.epoch), info.clone());
                return Ok(info);
            }
        }
        // Commits overtook it each time.
        Err(GroupError::Unavailable)
    }
}

/// The group at the epoch of the GroupInfo; `None` if its commits do not lead there (yet). `from`: the item that began the snapshot's epoch.
async fn restore(
    store: &Arc<dyn GroupStore>,
    random: &Arc<dyn Random>,
    from: (GroupId, Seq),
    saved: Bytes,
    group_info: Bytes,
) -> Result<Option<Info>, GroupError> {
    let (group, mut after) = from;
    let mut public = off_thread(move || Public::restore(group, &saved)).await?;
    while !public.matches(&group_info) {
        let items = store.group_items(group, after, limits::INBOX_PAGE_ITEMS, limits::INBOX_PAGE_BYTES).await?;
        let Some(last) = items.last() else { return Ok(None) };
        after = last.seq;
        let (random, wanted) = (Arc::clone(random), group_info.clone());
        public = off_thread(move || apply(public, &items, &wanted, random.as_ref())).await?;
    }
    let tree = off_thread(move || Ok((public.epoch(), public.tree()?))).await?;
    Ok(Some(Info { epoch: tree.0, group_info, tree: tree.1.into() }))
}

fn apply(mut public: Public, items: &[GroupItem], until: &[u8], random: &dyn Random) -> Result<Public, Refused> {
    for item in items {
        match item.kind {
            GroupItemKind::Proposal => public.propose(&item.content, random)?,
            GroupItemKind::Commit => {
                let checked = public.check(&item.content, random)?;
                public.merge(checked)?;
                if public.matches(until) {
                    break;
                }
            }
            GroupItemKind::Created | GroupItemKind::Message | GroupItemKind::Closed => {}
        }
    }
    Ok(public)
}

/// Validating takes long enough to keep others waiting.
async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refused> + Send + 'static) -> Result<T, GroupError> {
    let done = tokio::task::spawn_blocking(work).await.map_err(|_| GroupError::Internal)?;
    done.map_err(|error| {
        tracing::error!(%error, "a group could not be restored");
        GroupError::Internal
    })
}
