//! `sealpost rebuild`: the view made anew from the log. On the embedded profile in place, while the broker is stopped; on a cluster into
//! a fresh keyspace (`fresh`), beside the live one, with which it is compared (`compare`).

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::{SystemClock, SystemRandom};
use crate::config::Config;
use crate::ids::{Offset, Partition};
use crate::log::{EventLog, Topic, TopicPartition};
use crate::projector::groups::worker::{Parts as GroupParts, Worker as GroupWorker};
use crate::projector::rewound::rewound;
use crate::projector::shadow::NoEdge;
use crate::projector::worker::{Pace, Parts as WorkerParts, Positions, Worker};
use crate::server::ServerError;
use crate::server::embedded::{Opened, open, open_log};
use crate::server::{groups, metadata};
use crate::store::embedded::{EmbeddedStore, Options as StoreOptions};

#[cfg(feature = "cluster")]
mod compare;
#[cfg(feature = "cluster")]
mod fresh;

#[cfg(feature = "cluster")]
pub use compare::{Comparison, Tally, compare};
#[cfg(feature = "cluster")]
pub use fresh::{Fresh, FreshProgress, compare_views};

/// What a rebuild did.
#[derive(Debug, Clone, Copy)]
pub struct Rebuilt {
    /// Records applied.
    pub records: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// Drops the view and makes it anew from the log. The broker of this folder must be stopped.
pub async fn rebuild(config: &Config, on_progress: impl Fn(u64)) -> Result<Rebuilt, ServerError> {
    let started = std::time::Instant::now();
    if config.is_cluster() {
        return Err(ServerError(
            "a cluster's view is rebuilt into a fresh keyspace, which --into names; see docs/operations.md".to_owned(),
        ));
    }
    if !Path::new(&config.data).join("log").exists() {
        return Err(ServerError(format!("{} holds no log; name the broker's folder with --data", config.data.display())));
    }
    let opening = config.clone();
    let log = tokio::task::spawn_blocking(move || open_log(&opening)).await.map_err(|error| ServerError(error.to_string()))??;
    let quiet = applied_positions(config, log.as_ref()).await;
    let (opening, opened) = (config.clone(), Arc::clone(&log) as _);
    let Opened { log, store, .. } =
        tokio::task::spawn_blocking(move || open(&opening, true, Some(opened))).await.map_err(|error| ServerError(error.to_string()))??;
    let quiet = match quiet {
        Some(quiet) => quiet,
        // The old view can't be read: then everything counts as applied before. At worst receipts of its last window are missing.
        None => ends(log.as_ref()).await?,
    };
    let view = Positions::in_one(&store);
    let parts = WorkerParts {
        log: rewound(Arc::clone(&log), &view).await?,
        delivery: store.clone(),
        directory: store.clone(),
        groups: store.clone(),
        keys: store.clone(),
        bus: Arc::new(NoEdge),
        clock: Arc::new(SystemClock),
    };
    let group_parts = group_parts(&parts, config)?;
    let of_groups = quiet.iter().filter(|(tp, _)| tp.topic == Topic::Groups).map(|(tp, before)| (tp.partition, *before)).collect();
    let (worker, _) = Worker::new(parts, Pace::default());
    let worker = worker.recording(metadata::keys(config)?.as_ref());
    let records = worker.whole().quiet_before(quiet).catch_up(on_progress).await?;
    let (worker, _) = GroupWorker::new(group_parts);
    let worker = worker.recording(metadata::keys(config)?.as_ref());
    let records = records + worker.quiet_before(of_groups).catch_up().await?;
    log.close().await;
    Ok(Rebuilt { records, elapsed: started.elapsed() })
}

/// What the projector of groups works with, beside the other one.
pub(super) fn group_parts(parts: &WorkerParts, config: &Config) -> Result<GroupParts, ServerError> {
    Ok(GroupParts {
        log: Arc::clone(&parts.log),
        groups: Arc::clone(&parts.groups),
        keys: Arc::clone(&parts.keys),
        bus: Arc::clone(&parts.bus),
        clock: Arc::clone(&parts.clock),
        random: Arc::new(SystemRandom),
        key: groups::key(config)?,
    })
}

fn partitions(log: &dyn EventLog) -> impl Iterator<Item = TopicPartition> {
    let of = |topic| (0..log.partitions(topic)).map(move |number| TopicPartition { topic, partition: Partition(number) });
    [Topic::Inbox, Topic::Directory, Topic::Groups].into_iter().flat_map(of)
}

/// Up to where the present view was applied; `None` if it can't be read.
async fn applied_positions(config: &Config, log: &dyn EventLog) -> Option<HashMap<TopicPartition, Offset>> {
    let dir = config.data.join("store");
    let store = tokio::task::spawn_blocking(move || EmbeddedStore::open(&dir, StoreOptions::default())).await.ok()?.ok()?;
    let view = Positions::in_one(&store);
    let mut positions = HashMap::new();
    for tp in partitions(log) {
        positions.insert(tp, view.of(tp).await.ok()?);
    }
    Some(positions)
}

async fn ends(log: &dyn EventLog) -> Result<HashMap<TopicPartition, Offset>, ServerError> {
    let mut ends = HashMap::new();
    for tp in partitions(log) {
        let (_, end) = log.bounds(tp).await.map_err(|error| ServerError(error.to_string()))?;
        ends.insert(tp, end);
    }
    Ok(ends)
}
