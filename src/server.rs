//! The composition root: the only place that chooses implementations and starts threads.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::auth::Authenticator;
use crate::auth::dev::{DevError, DevRealm};
use crate::auth::jwks::JwksError;
use crate::auth::realm::Realms;
use crate::clock::{Clock, Random, SystemClock, SystemRandom};
use crate::config::{Config, ConfigError};
use crate::delivery::hub::Hub;
use crate::delivery::inbox::Inboxes;
use crate::delivery::sending::Acceptor;
use crate::directory::Directory;
use crate::edge::serve::{Listener, Options as ServeOptions, ServeError, serve};
use crate::edge::{EdgeState, Health, Parts, router};
use crate::ids::{EdgeId, Offset, Partition};
use crate::keys::KeyService;
use crate::limits;
use crate::log::embedded::{EmbeddedLog, OpenError as LogOpenError, Options as LogOptions, PartitionCounts, Retention};
use crate::log::{AppendError, EventLog, Topic, TopicPartition};
use crate::metrics;
use crate::projector::lag::Lag;
use crate::projector::push::{Push, PushBus};
use crate::projector::worker::{Pace, Parts as WorkerParts, Progress, Worker, WorkerError};
use crate::store::embedded::{EmbeddedStore, OpenError as StoreOpenError, Options as StoreOptions};
use crate::store::{DeliveryStore, DirectoryStore, StoreError};

/// Why a broker did not start, or stopped by itself. Each says what to do.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct ServerError(String);

macro_rules! from_errors {
    ($($error:ty),*) => {$(
        impl From<$error> for ServerError {
            fn from(error: $error) -> Self {
                Self(error.to_string())
            }
        }
    )*};
}
from_errors!(ConfigError, LogOpenError, StoreOpenError, ServeError, DevError, JwksError, WorkerError, StoreError, std::io::Error);

/// A running broker on the embedded profile. Stop it with [`Broker::stop`]; dropping it ends it like a crash would.
pub struct Broker {
    url: String,
    address: SocketAddr,
    hub: Arc<Hub>,
    log: Arc<dyn EventLog>,
    drain: CancellationToken,
    drain_time: Duration,
    serving: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
    projector: Option<std::thread::JoinHandle<()>>,
    stop_edge: watch::Sender<bool>,
    stop_projector: watch::Sender<bool>,
    failed: watch::Receiver<Option<ServerError>>,
}

struct Opened {
    log: Arc<dyn EventLog>,
    store: Arc<EmbeddedStore>,
}

/// Opens the store, and the log unless it is given.
fn open(config: &Config, discard_view: bool, log: Option<Arc<dyn EventLog>>) -> Result<Opened, ServerError> {
    std::fs::create_dir_all(&config.data)
        .map_err(|error| ServerError(format!("the folder {} can't be made: {error}", config.data.display())))?;
    let log = match log {
        Some(log) => log,
        None => EmbeddedLog::open(log_options(config))?,
    };
    let store = EmbeddedStore::open(&config.data.join("store"), StoreOptions { discard_view, ..StoreOptions::default() })?;
    Ok(Opened { log, store })
}

fn log_options(config: &Config) -> LogOptions {
    let defaults = PartitionCounts::default();
    LogOptions {
        partitions: PartitionCounts { inbox: config.partitions.inbox, directory: config.partitions.directory, ..defaults },
        segment_bytes: config.log.segment_bytes,
        retention: Retention {
            age_ms: Some(u64::from(config.log.retention_days) * 24 * 3600 * 1000),
            bytes: Some(config.log.retention_bytes).filter(|bytes| *bytes > 0),
        },
        ..LogOptions::new(config.data.join("log"))
    }
}

fn dev_realm(config: &Config, random: &dyn Random) -> Result<Option<DevRealm>, ServerError> {
    if !config.dev_mode() {
        DevRealm::remove(&config.data)?;
        return Ok(None);
    }
    tracing::warn!("DEVELOPMENT MODE is on: anybody who reaches this broker can be anybody, and rate limits are off");
    Ok(Some(DevRealm::open(&config.data, random)?))
}

impl Broker {
    /// Starts all roles and returns once the broker serves: the projector has caught up, the socket is open.
    pub async fn start(config: Config) -> Result<Self, ServerError> {
        Self::start_by(config, Arc::new(SystemClock)).await
    }

    /// The same by another clock, for tests in which a month goes by.
    pub async fn start_by(config: Config, clock: Arc<dyn Clock>) -> Result<Self, ServerError> {
        Self::start_over(config, clock, None).await
    }

    /// The same over another log, for tests in which it fails.
    #[cfg(any(test, feature = "test-util"))]
    pub async fn start_with_log(config: Config, log: Arc<dyn EventLog>) -> Result<Self, ServerError> {
        Self::start_over(config, Arc::new(SystemClock), Some(log)).await
    }

    async fn start_over(config: Config, clock: Arc<dyn Clock>, log: Option<Arc<dyn EventLog>>) -> Result<Self, ServerError> {
        config.validate()?;
        let config = Arc::new(config);
        let random: Arc<dyn Random> = Arc::new(SystemRandom);
        let exporter = metrics::install();
        let opening = Arc::clone(&config);
        let Opened { log, store } =
            tokio::task::spawn_blocking(move || open(&opening, false, log)).await.map_err(|error| ServerError(error.to_string()))??;
        let dev = dev_realm(&config, random.as_ref())?;
        let realms = Arc::new(Realms::open(&config.realms, dev.as_ref(), Arc::clone(&clock)).await?);
        let listener = Listener::bind(&config).await?;
        let address = listener.address();
        let url = format!("{}://{address}", listener.scheme());

        let edge = EdgeId::random(random.as_ref());
        let directory = Arc::new(Directory::new(crate::directory::Parts {
            log: Arc::clone(&log),
            store: store.clone(),
            keys: store.clone(),
            clock: Arc::clone(&clock),
            random: Arc::clone(&random),
            edge,
        }));
        let rates = config.rates();
        let acceptor = Arc::new(Acceptor::new(
            Arc::clone(&log),
            Arc::clone(&directory),
            store.clone(),
            Arc::clone(&clock),
            Arc::clone(&random),
            rates.messages_per_device_per_s,
        ));
        let hub =
            Arc::new(Hub::new(edge, Arc::clone(&log), store.clone(), Arc::clone(&directory), Arc::clone(&acceptor), Arc::clone(&random)));
        let parts = WorkerParts {
            log: Arc::clone(&log),
            delivery: store.clone(),
            directory: store.clone(),
            keys: store.clone(),
            bus: Arc::clone(&hub) as Arc<dyn PushBus>,
            clock: Arc::clone(&clock),
        };
        let (stop_projector, projector_stops) = watch::channel(false);
        let (failing, failed) = watch::channel(None);
        let (projector, progress) = spawn_projector(parts, projector_stops, failing.clone())?;
        wait_until_caught_up(progress.clone(), failed.clone()).await?;

        let keys = Arc::new(KeyService::new(store.clone(), store.clone(), &rates, Arc::clone(&hub) as _));
        let lag = watch_lag(Arc::clone(&log), progress.clone(), Arc::clone(&acceptor));
        let health = Arc::new(BrokerHealth { log: Arc::clone(&log), progress, hub: Arc::clone(&hub) });
        let state = EdgeState::new(Parts {
            config: Arc::clone(&config),
            clock,
            random,
            auth: Authenticator::new(Arc::clone(&directory) as _),
            realms: Arc::clone(&realms),
            dev: dev.map(Arc::new),
            directory,
            keys,
            sending: acceptor,
            inbox: Arc::new(Inboxes(Arc::clone(&hub))),
            hub: Arc::clone(&hub),
            health,
            exporter,
        });
        let drain = CancellationToken::new();
        let (stop_edge, edge_stops) = watch::channel(false);
        let tasks = vec![
            tokio::spawn(Arc::clone(&hub).run_acks(edge_stops.clone())),
            tokio::spawn(Arc::clone(&hub).run_heartbeat(edge_stops)),
            tokio::spawn(watch_log(Arc::clone(&log), failing)),
            tokio::spawn(lag),
            tokio::spawn(metrics::upkeep(drain.clone())),
            tokio::spawn({
                let until = drain.clone();
                async move { realms.keep_fresh(until).await }
            }),
        ];
        let serving = tokio::spawn(serve(listener, router::router(state), ServeOptions::from(config.as_ref()), drain.clone()));
        Ok(Self {
            url,
            address,
            hub,
            log,
            drain,
            drain_time: Duration::from_millis(config.timeouts.drain_ms),
            serving,
            tasks,
            projector: Some(projector),
            stop_edge,
            stop_projector,
            failed,
        })
    }

    /// Where it listens, as a URL.
    pub fn url(&self) -> String {
        self.url.clone()
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until something fails that only a restart can mend.
    pub async fn failed(&self) -> ServerError {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(error) => error.clone().expect("waited for it"),
            Err(_) => std::future::pending().await,
        }
    }

    /// Drains: not ready any more and no new streams, streams told to go elsewhere, then no new connections, acknowledgements and the
    /// coalescing window written, log closed.
    pub async fn stop(mut self) {
        // Balancers that ask are answered while the streams go; requests work until the last of them is gone.
        self.hub.drain(self.drain_time).await;
        self.drain.cancel();
        if tokio::time::timeout(self.drain_time, &mut self.serving).await.is_err() {
            self.serving.abort();
        }
        self.stop_edge.send_replace(true);
        self.stop_projector.send_replace(true);
        if let Some(projector) = self.projector.take() {
            // The projector's last flush may wait for the disk; the runtime must not.
            let _ = tokio::task::spawn_blocking(move || projector.join()).await;
        }
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
        self.log.close().await;
    }
}

/// The projector has its own thread: it is the one place where all messages pass, and it must not wait behind sockets.
fn spawn_projector(
    parts: WorkerParts,
    stop: watch::Receiver<bool>,
    failing: watch::Sender<Option<ServerError>>,
) -> Result<(std::thread::JoinHandle<()>, watch::Receiver<Progress>), ServerError> {
    let (outer, progress) = watch::channel(Progress::default());
    let runtime = tokio::runtime::Handle::current();
    let work = async move {
        while !*stop.borrow() {
            let (worker, mut inner) = Worker::new(parts.clone(), Pace::default());
            let forward = async {
                while inner.changed().await.is_ok() {
                    outer.send_replace(*inner.borrow_and_update());
                }
                std::future::pending::<()>().await;
            };
            let outcome = tokio::select! {
                outcome = worker.run(stop.clone()) => outcome,
                () = forward => unreachable!("forwarding never ends"),
            };
            outer.send_modify(|progress| progress.caught_up = false);
            match outcome {
                Ok(()) => return,
                Err(error @ (WorkerError::Decode { .. } | WorkerError::Store(StoreError::Corrupt(_)))) => {
                    tracing::error!(%error, "the projector can't go on");
                    failing.send_replace(Some(error.into()));
                    return;
                }
                Err(error) => {
                    tracing::error!(%error, "the projector failed; it starts again from its position");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("projector".to_owned()).spawn(move || runtime.block_on(work))?;
    Ok((thread, progress))
}

async fn wait_until_caught_up(
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

/// A poisoned log takes nothing more until it is opened anew; the process says so and ends, for its supervisor to start it again.
async fn watch_log(log: Arc<dyn EventLog>, failing: watch::Sender<Option<ServerError>>) {
    let mut every = tokio::time::interval(Duration::from_millis(500));
    loop {
        every.tick().await;
        if let Err(error @ AppendError::Poisoned(_)) = log.health() {
            tracing::error!(%error, "the log can't go on");
            failing.send_replace(Some(ServerError(format!(
                "{error}. Check the disk, then start the broker again: it recovers what it acknowledged"
            ))));
            return;
        }
    }
}

/// Accepting goes on without the projector, which may be slower: what it can't deliver soon is better refused.
async fn watch_lag(log: Arc<dyn EventLog>, progress: watch::Receiver<Progress>, acceptor: Arc<Acceptor>) {
    let mut lag = Lag::default();
    let mut every = tokio::time::interval(Duration::from_millis(limits::LAG_LOOK_MS));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut was_behind = false;
    loop {
        every.tick().await;
        let mut end = 0;
        for number in 0..log.partitions(Topic::Inbox) {
            let tp = TopicPartition { topic: Topic::Inbox, partition: Partition(number) };
            end += log.bounds(tp).await.map_or(0, |(_, end)| end.0);
        }
        let met = progress.borrow().met;
        metrics::observe_lag(end.saturating_sub(met));
        let behind = lag.look(tokio::time::Instant::now(), end, met);
        acceptor.set_behind(behind);
        if std::mem::replace(&mut was_behind, behind) != behind {
            let records = end.saturating_sub(met);
            if behind {
                tracing::warn!(records, "delivery is too far behind: sends are refused until it has caught up");
            } else {
                tracing::info!(records, "delivery has caught up");
            }
        }
    }
}

struct BrokerHealth {
    log: Arc<dyn EventLog>,
    progress: watch::Receiver<Progress>,
    hub: Arc<Hub>,
}

#[async_trait]
impl Health for BrokerHealth {
    async fn ready(&self) -> Result<(), String> {
        self.log.health().map_err(|error| error.to_string())?;
        if self.hub.is_draining() {
            return Err("draining".to_owned());
        }
        if self.progress.borrow().caught_up { Ok(()) } else { Err("the projector has not caught up with the log".to_owned()) }
    }
}

/// What a rebuild did.
#[derive(Debug, Clone, Copy)]
pub struct Rebuilt {
    /// Records applied.
    pub records: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// Pushes to nobody: during a rebuild no edge runs.
struct NoEdge;

#[async_trait]
impl PushBus for NoEdge {
    async fn push(&self, _: EdgeId, _: Vec<Push>) {}
    async fn broadcast(&self, _: Vec<Push>) {}
    fn settled(&self) -> BoxFuture<'static, Result<(), AppendError>> {
        Box::pin(std::future::ready(Ok(())))
    }
}

/// Drops the view and makes it anew from the log. The broker of this folder must be stopped.
pub async fn rebuild(config: &Config, on_progress: impl Fn(u64)) -> Result<Rebuilt, ServerError> {
    let started = std::time::Instant::now();
    if !Path::new(&config.data).join("log").exists() {
        return Err(ServerError(format!("{} holds no log; name the broker's folder with --data", config.data.display())));
    }
    let quiet = applied_positions(config).await;
    let opening = config.clone();
    let Opened { log, store } =
        tokio::task::spawn_blocking(move || open(&opening, true, None)).await.map_err(|error| ServerError(error.to_string()))??;
    let quiet = match quiet {
        Some(quiet) => quiet,
        // The old view can't be read: then everything counts as applied before. At worst receipts of its last window are missing.
        None => ends(log.as_ref()).await?,
    };
    let parts = WorkerParts {
        log: Arc::clone(&log),
        delivery: store.clone(),
        directory: store.clone(),
        keys: store.clone(),
        bus: Arc::new(NoEdge),
        clock: Arc::new(SystemClock),
    };
    let (worker, _) = Worker::new(parts, Pace::default());
    let records = worker.quiet_before(quiet).catch_up(on_progress).await?;
    log.close().await;
    Ok(Rebuilt { records, elapsed: started.elapsed() })
}

fn partitions(config: &Config) -> impl Iterator<Item = TopicPartition> {
    let of = |topic, count| (0..count).map(move |number| TopicPartition { topic, partition: Partition(number) });
    of(Topic::Inbox, config.partitions.inbox).chain(of(Topic::Directory, config.partitions.directory))
}

/// Up to where the present view was applied; `None` if it can't be read.
async fn applied_positions(config: &Config) -> Option<HashMap<TopicPartition, Offset>> {
    let dir = config.data.join("store");
    let store = tokio::task::spawn_blocking(move || EmbeddedStore::open(&dir, StoreOptions::default())).await.ok()?.ok()?;
    let mut positions = HashMap::new();
    for tp in partitions(config) {
        let next = match tp.topic {
            Topic::Directory => store.directory_position(tp.partition).await.ok()?,
            _ => store.position(tp.partition).await.ok()?,
        };
        positions.insert(tp, next);
    }
    Some(positions)
}

async fn ends(log: &dyn EventLog) -> Result<HashMap<TopicPartition, Offset>, ServerError> {
    let mut ends = HashMap::new();
    for topic in [Topic::Inbox, Topic::Directory] {
        for number in 0..log.partitions(topic) {
            let tp = TopicPartition { topic, partition: Partition(number) };
            let (_, end) = log.bounds(tp).await.map_err(|error| ServerError(error.to_string()))?;
            ends.insert(tp, end);
        }
    }
    Ok(ends)
}
