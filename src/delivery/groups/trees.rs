//! The tree of a group's current epoch: from the projector's snapshot, off the async threads, and kept at hand.

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
use crate::mls::public::Refused;
use crate::projector::groups::saved::State;
use crate::store::groups::GroupStore;

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
            if let (Some(group_info), Some(saved)) = (store.group_info(group).await?, saved) {
                let random = Arc::clone(random);
                let restoring = tokio::task::spawn_blocking(move || restore(group, &saved, group_info, random.as_ref()));
                let restored = restoring.await.map_err(|_| GroupError::Internal)?.map_err(|error| {
                    tracing::error!(%error, "a group could not be restored");
                    GroupError::Internal
                })?;
                if let Some(info) = restored {
                    self.cache.insert((group, info.epoch), info.clone());
                    return Ok(info);
                }
            }
        }
        // Commits overtook it each time.
        Err(GroupError::Unavailable)
    }
}

/// The tree of the snapshot's epoch; `None` if the GroupInfo is of another one.
fn restore(group: GroupId, saved: &[u8], group_info: Bytes, random: &dyn Random) -> Result<Option<Info>, Refused> {
    // Proposals change no tree.
    let public = State::decode(group, saved, Seq::ZERO, random)?.public;
    if !public.matches(&group_info) {
        return Ok(None);
    }
    Ok(Some(Info { epoch: public.epoch(), tree: public.tree()?.into(), group_info }))
}
