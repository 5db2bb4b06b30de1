//! A cluster's view made anew in a keyspace of its own, while the service runs.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::clock::SystemClock;
use crate::config::{Config, Cql, Kafka};
use crate::ids::Partition;
use crate::limits;
use crate::log::kafka::KafkaLog;
use crate::log::{EventLog, Follow, Topic, TopicPartition};
use crate::projector::groups::worker::Worker as GroupWorker;
use crate::projector::shadow::{NoEdge, ShadowLog};
use crate::projector::worker::{Pace, Parts, Progress, Worker, WorkerError};
use crate::server::ServerError;
use crate::server::cluster::{beside, cql_options, kafka_options};
use crate::server::rebuild::compare::{Comparison, compare};
use crate::server::rebuild::group_parts;
use crate::store::DeliveryStore as _;
use crate::store::cql::{CqlStore, migrate_like};

/// How often the log's end and the keyspace's positions are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How far a fresh view is.
#[derive(Debug, Clone, Copy, Default)]
pub struct FreshProgress {
    /// Records applied by this process.
    pub applied: u64,
    /// Records of `inbox` still to apply.
    pub behind: u64,
}

fn named<'a>(config: &'a Config, keyspace: &str) -> Result<(&'a Kafka, &'a Cql), ServerError> {
    let (Some(kafka), Some(cql)) = (&config.kafka, &config.cql) else {
        return Err(ServerError(
            "another keyspace is filled and compared only on a cluster: name it with --kafka and --cql, or in the configuration".to_owned(),
        ));
    };
    let mut valid = config.clone();
    valid.cql = Some(Cql { mirror_keyspace: Some(keyspace.to_owned()), ..cql.clone() });
    valid.validate_where()?;
    Ok((kafka, cql))
}

/// Compares the live view with the one in another keyspace; see [`compare`].
pub async fn compare_views(config: &Config, keyspace: &str, patience: Duration) -> Result<Comparison, ServerError> {
    let (kafka, cql) = named(config, keyspace)?;
    let log = KafkaLog::open(kafka_options(kafka)).await?;
    let (live, other) = (CqlStore::open(cql_options(cql)).await?, CqlStore::open(beside(cql, keyspace)).await?);
    let compared = compare(log.as_ref(), &live, &other, patience).await;
    log.close().await;
    compared
}

/// A keyspace that follows the log beside the live one. It is in no consumer group, appends nothing and pushes to nobody. End it with
/// [`Fresh::end`]; what was not stored is applied again by the next one.
pub struct Fresh {
    log: Arc<KafkaLog>,
    live: Arc<CqlStore>,
    store: Arc<CqlStore>,
    progress: watch::Receiver<Progress>,
    stop: watch::Sender<bool>,
    working: JoinHandle<Result<(), WorkerError>>,
}

impl Fresh {
    /// Makes the keyspace, with as many copies as the live one has, and begins to fill it; goes on if it was begun before.
    pub async fn start(config: &Config, keyspace: &str) -> Result<Self, ServerError> {
        let (kafka, cql) = named(config, keyspace)?;
        let options = beside(cql, keyspace);
        let log = KafkaLog::open(kafka_options(kafka)).await?;
        let live = CqlStore::open(cql_options(cql)).await?;
        migrate_like(&options, &cql.keyspace).await?;
        let store = CqlStore::open(options).await?;
        let shadow = ShadowLog::new(Arc::clone(&log) as Arc<dyn EventLog>, Arc::clone(&log) as Arc<dyn Follow>);
        let shadow = shadow.await.map_err(|error| ServerError(error.to_string()))?;
        let parts = Parts {
            log: Arc::new(shadow),
            delivery: store.clone(),
            directory: store.clone(),
            groups: store.clone(),
            keys: store.clone(),
            bus: Arc::new(NoEdge),
            clock: Arc::new(SystemClock),
        };
        // No poll looks for its items, so they are written when the window ends, if they are still pending then.
        let window = Duration::from_millis(limits::WINDOW_MS);
        let (groups, _) = GroupWorker::new(group_parts(&parts, config)?);
        let (worker, progress) = Worker::new(parts, Pace { soon: window, ..Pace::default() });
        let (stop, stopped) = watch::channel(false);
        let working =
            tokio::spawn(async move { tokio::try_join!(worker.shadow().run(stopped.clone()), groups.shadow().run(stopped)).map(drop) });
        Ok(Self { log, live, store, progress, stop, working })
    }

    /// The log, the live view and this one.
    pub const fn parts(&self) -> (&Arc<KafkaLog>, &Arc<CqlStore>, &Arc<CqlStore>) {
        (&self.log, &self.live, &self.store)
    }

    /// Returns once no more than so many records are left to apply.
    pub async fn catch_up(&mut self, left: u64, on_progress: impl Fn(FreshProgress)) -> Result<FreshProgress, ServerError> {
        loop {
            let progress = self.look().await?;
            on_progress(progress);
            if self.progress.borrow().caught_up && progress.behind <= left {
                return Ok(progress);
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Keeps following until `until` ends, or somebody else keeps the keyspace.
    pub async fn follow(&mut self, until: impl Future<Output = ()>, on_progress: impl Fn(FreshProgress)) -> Result<(), ServerError> {
        tokio::pin!(until);
        loop {
            tokio::select! {
                () = &mut until => return Ok(()),
                () = tokio::time::sleep(LOOK) => {}
            }
            let progress = self.look().await?;
            on_progress(progress);
            if self.is_kept_by_others().await? {
                return Ok(());
            }
        }
    }

    /// Stores what was applied, and ends. How many records that were.
    pub async fn end(self) -> Result<u64, ServerError> {
        self.stop.send_replace(true);
        let ended = self.working.await.map_err(|error| ServerError(error.to_string()))?;
        let applied = self.progress.borrow().applied;
        self.log.close().await;
        ended?;
        Ok(applied)
    }

    async fn look(&mut self) -> Result<FreshProgress, ServerError> {
        if self.working.is_finished() {
            let ended = (&mut self.working).await.map_err(|error| ServerError(error.to_string()))?;
            ended?;
            return Err(ServerError("the view is not followed any more".to_owned()));
        }
        let mut end = 0;
        for number in 0..self.log.partitions(Topic::Inbox) {
            let tp = TopicPartition { topic: Topic::Inbox, partition: Partition(number) };
            end += self.log.bounds(tp).await.map_err(|error| ServerError(error.to_string()))?.1.0;
        }
        let Progress { applied, met, .. } = *self.progress.borrow();
        Ok(FreshProgress { applied, behind: end.saturating_sub(met) })
    }

    /// Positions beyond what was read here: projectors write to this keyspace.
    async fn is_kept_by_others(&self) -> Result<bool, ServerError> {
        let met = self.progress.borrow().met;
        let mut stored = 0;
        for number in 0..self.log.partitions(Topic::Inbox) {
            stored += self.store.position(Partition(number)).await?.0;
        }
        // What was met in between only makes it less.
        Ok(stored > met)
    }
}
