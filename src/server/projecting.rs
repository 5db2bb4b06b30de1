//! The projectors' threads, and how far they are behind.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::ids::Partition;
use crate::limits;
use crate::log::{EventLog, Topic, TopicPartition};
use crate::metadata::Keys;
use crate::metrics;
use crate::projector::groups::worker::{Parts as GroupParts, Worker as GroupWorker};
use crate::projector::lag::Lag;
use crate::projector::worker::{Pace, Parts as WorkerParts, Positions, Progress, Worker, WorkerError};
use crate::server::ServerError;
use crate::store::StoreError;

/// How a projector does its work.
pub(super) struct Keeping {
    pub pace: Pace,
    /// Topic `metadata`, if it is written.
    pub metadata: Option<Keys>,
    /// It has all partitions to itself.
    pub alone: bool,
    /// The views that it keeps, if they are two.
    pub beside: Vec<Positions>,
}

/// The projector has its own thread: it is the one place where all messages pass, and it must not wait behind sockets.
pub(super) fn spawn(
    parts: WorkerParts,
    keeping: Keeping,
    stop: watch::Receiver<bool>,
    failing: watch::Sender<Option<ServerError>>,
) -> Result<(std::thread::JoinHandle<()>, watch::Receiver<Progress>), ServerError> {
    let begin = move |stop| {
        let (worker, progress) = Worker::new(parts.clone(), keeping.pace);
        let worker = worker.recording(keeping.metadata.as_ref()).beside(keeping.beside.clone());
        let worker = if keeping.alone { worker.whole() } else { worker };
        let work = async move {
            let outcome = worker.run(stop).await;
            metrics::observe_owned(0);
            outcome
        };
        (work, progress)
    };
    on_thread("projector", begin, stop, failing)
}

/// The projector of groups, on a thread of its own: checking a commit of a big group keeps it busy for long.
pub(super) fn spawn_groups(
    parts: GroupParts,
    metadata: Option<Keys>,
    stop: watch::Receiver<bool>,
    failing: watch::Sender<Option<ServerError>>,
) -> Result<(std::thread::JoinHandle<()>, watch::Receiver<Progress>), ServerError> {
    let begin = move |stop| {
        let (worker, progress) = GroupWorker::new(parts.clone());
        (worker.recording(metadata.as_ref()).run(stop), progress)
    };
    on_thread("groups", begin, stop, failing)
}

/// Keeps a projector at work on a thread of this name, and begins it anew from its position after an error that may pass.
fn on_thread<W: Future<Output = Result<(), WorkerError>> + Send>(
    name: &'static str,
    begin: impl Fn(watch::Receiver<bool>) -> (W, watch::Receiver<Progress>) + Send + 'static,
    stop: watch::Receiver<bool>,
    failing: watch::Sender<Option<ServerError>>,
) -> Result<(std::thread::JoinHandle<()>, watch::Receiver<Progress>), ServerError> {
    let (outer, progress) = watch::channel(Progress::default());
    let runtime = tokio::runtime::Handle::current();
    let work = async move {
        while !*stop.borrow() {
            let (work, mut inner) = begin(stop.clone());
            let forward = async {
                while inner.changed().await.is_ok() {
                    outer.send_replace(*inner.borrow_and_update());
                }
                std::future::pending::<()>().await;
            };
            let outcome = tokio::select! {
                outcome = work => outcome,
                () = forward => unreachable!("forwarding never ends"),
            };
            outer.send_modify(|progress| progress.caught_up = false);
            match outcome {
                Ok(()) => return,
                Err(error @ (WorkerError::Decode { .. } | WorkerError::Store(StoreError::Corrupt(_)))) => {
                    tracing::error!(name, %error, "the projector can't go on");
                    failing.send_replace(Some(error.into()));
                    return;
                }
                Err(error) => {
                    tracing::error!(name, %error, "the projector failed; it starts again from its position");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || runtime.block_on(work))?;
    Ok((thread, progress))
}

pub(super) async fn wait_until_caught_up(
    mut progress: watch::Receiver<Progress>,
    mut failed: watch::Receiver<Option<ServerError>>,
) -> Result<(), ServerError> {
    let mut every = tokio::time::interval(Duration::from_secs(2));
    every.tick().await;
    loop {
        tokio::select! {
            caught_up = progress.wait_for(|progress| progress.caught_up) => {
                return caught_up.map(|_| ()).map_err(|_| ServerError("the projector ended".to_owned()));
            }
            error = failed.wait_for(Option::is_some) => {
                if let Some(error) = error.ok().and_then(|error| error.clone()) {
                    return Err(error);
                }
            }
            _ = every.tick() => tracing::info!("still applying what is on the log"),
        }
    }
}

/// Accepting goes on without the projector, which may be slower: what it can't deliver soon is better refused.
pub(super) async fn watch_lag(
    log: Arc<dyn EventLog>,
    topic: Topic,
    progress: watch::Receiver<Progress>,
    tell: impl Fn(bool) + Send + 'static,
) {
    let mut lag = Lag::default();
    let mut every = tokio::time::interval(Duration::from_millis(limits::LAG_LOOK_MS));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was_behind = false;
    loop {
        every.tick().await;
        let mut end = 0;
        for number in 0..log.partitions(topic) {
            let tp = TopicPartition { topic, partition: Partition(number) };
            end += log.bounds(tp).await.map_or(0, |(_, end)| end.0);
        }
        let met = progress.borrow().met;
        if let Some(applied) = applied(topic) {
            metrics::observe_lag(applied, end.saturating_sub(met));
        }
        let behind = lag.look(tokio::time::Instant::now(), end, met);
        tell(behind);
        if std::mem::replace(&mut was_behind, behind) != behind {
            let records = end.saturating_sub(met);
            if behind {
                tracing::warn!(topic = topic.name(), records, "delivery is too far behind: sends are refused until it has caught up");
            } else {
                tracing::info!(topic = topic.name(), records, "delivery has caught up");
            }
        }
    }
}

/// What metrics call a topic that projectors apply.
const fn applied(topic: Topic) -> Option<metrics::Applied> {
    match topic {
        Topic::Inbox => Some(metrics::Applied::Inbox),
        Topic::Directory => Some(metrics::Applied::Directory),
        Topic::Groups => Some(metrics::Applied::Groups),
        _ => None,
    }
}

/// How far all projectors together are behind, for metrics: every one of them says it, so that it is known while one lives, and of
/// partitions that nobody owns.
pub(super) async fn measure_lag(log: Arc<dyn EventLog>, view: Positions) {
    let mut every = tokio::time::interval(Duration::from_millis(limits::CLUSTER_LAG_LOOK_MS));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        for topic in [Topic::Inbox, Topic::Directory, Topic::Groups] {
            let mut lag = Some(0u64);
            for number in 0..log.partitions(topic) {
                let tp = TopicPartition { topic, partition: Partition(number) };
                // What can't be looked at leaves the last figure as it is.
                lag = match (lag, view.of(tp).await, log.bounds(tp).await) {
                    (Some(lag), Ok(met), Ok((earliest, end))) => Some(lag + end.0.saturating_sub(met.max(earliest).0)),
                    _ => None,
                };
            }
            if let (Some(lag), Some(applied)) = (lag, applied(topic)) {
                metrics::observe_lag(applied, lag);
            }
        }
    }
}
