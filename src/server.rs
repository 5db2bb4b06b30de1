//! The composition root: the only place that chooses implementations and starts threads.
//!
//! One process plays the roles that its configuration names, over the backends of one profile:
//!
//! | profile | log | stores | pushes |
//! |---|---|---|---|
//! | embedded | files in one folder | files in one folder | a call |
//! | cluster | Kafka | CQL | a topic |

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::auth::Authenticator;
use crate::auth::dev::{DevError, DevRealm};
use crate::auth::jwks::JwksError;
use crate::auth::realm::Realms;
use crate::clock::{Clock, Random, SystemClock, SystemRandom};
use crate::config::{Config, ConfigError};
use crate::delivery::groups::GroupService;
use crate::delivery::hub::Hub;
use crate::delivery::inbox::Inboxes;
use crate::delivery::sending::Acceptor;
use crate::directory::Directory;
use crate::edge::serve::{Listener, Options as ServeOptions, ServeError, serve};
use crate::edge::{EdgeState, Health, Operations, Parts, router};
use crate::ids::EdgeId;
#[cfg(feature = "cluster")]
use crate::ids::Partition;
use crate::keys::KeyService;
use crate::limits;
use crate::log::embedded::{EmbeddedLog, OpenError as LogOpenError};
use crate::log::{AppendError, EventLog, Follow, Topic};
use crate::metrics;
use crate::projector::push::{Push, PushBus};
use crate::projector::push_topic::{self, PushTarget, PushTopic};
use crate::projector::rewound::rewound;
use crate::projector::worker::{Pace, Parts as WorkerParts, Positions, Progress, WorkerError};
use crate::server::control::Control;
use crate::store::embedded::{EmbeddedStore, OpenError as StoreOpenError};
use crate::store::groups::GroupStore;
use crate::store::metered::Metered;
#[cfg(feature = "cluster")]
use crate::store::mirrored::Mirrored;
use crate::store::{DeliveryStore, DirectoryStore, KeyStore, StoreError};
use crate::traces::{self, TraceError};

#[cfg(feature = "cluster")]
mod cluster;
pub mod control;
mod embedded;
mod groups;
mod metadata;
mod projecting;
mod rebuild;

#[cfg(feature = "cluster")]
pub use cluster::{cql_options, kafka_options};
#[cfg(feature = "cluster")]
pub use rebuild::{Comparison, Fresh, FreshProgress, Tally, compare, compare_views};
pub use rebuild::{Rebuilt, rebuild};

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
from_errors!(
    ConfigError,
    LogOpenError,
    StoreOpenError,
    ServeError,
    DevError,
    JwksError,
    WorkerError,
    StoreError,
    TraceError,
    std::io::Error
);

/// Log and stores, of whichever profile.
struct Backends {
    log: Arc<dyn EventLog>,
    delivery: Arc<dyn DeliveryStore>,
    directory: Arc<dyn DirectoryStore>,
    groups: Arc<dyn GroupStore>,
    keys: Arc<dyn KeyStore>,
    /// What the projector keeps: the same, unless it keeps two.
    view: View,
    /// Set where edges and projectors are processes of their own: pushes go over a topic then.
    pushes: Option<Arc<dyn Follow>>,
    /// What looks after them while the process runs.
    tasks: Vec<JoinHandle<()>>,
    /// The files of the embedded profile, for who speaks with the operator about them.
    files: Option<(Arc<EmbeddedLog>, Arc<EmbeddedStore>)>,
}

/// What a projector keeps.
struct View {
    delivery: Arc<dyn DeliveryStore>,
    directory: Arc<dyn DirectoryStore>,
    groups: Arc<dyn GroupStore>,
    /// The single ones, where it keeps two.
    each: Vec<Positions>,
}

impl View {
    fn one<S: DeliveryStore + DirectoryStore + GroupStore>(store: Arc<S>) -> Self {
        Self { delivery: store.clone(), directory: store.clone(), groups: store, each: Vec::new() }
    }

    #[cfg(feature = "cluster")]
    fn two<S: DeliveryStore + DirectoryStore + GroupStore>(views: [Arc<S>; 2], log: &Arc<dyn EventLog>) -> Self {
        let each = views.iter().map(Positions::in_one).collect();
        let (layout, settled) = (Arc::clone(log), Arc::clone(log));
        let (directory, groups) = (log.partitions(Topic::Directory), log.partitions(Topic::Groups));
        let both = Arc::new(Mirrored::new(
            views,
            Box::new(move |account| layout.layout().partitions_for(account)),
            move |partition| settled.layout().is_drained(partition),
            Box::new(move |account| vec![Partition::of(account, directory)]),
            Box::new(move |group| vec![Partition::of_group(group, groups)]),
        ));
        Self { delivery: both.clone(), directory: both.clone(), groups: both, each }
    }
}

impl Backends {
    /// Over another log than the profile's, for tests in which it fails.
    async fn open(config: &Arc<Config>, log: Option<Arc<dyn EventLog>>) -> Result<Self, ServerError> {
        #[cfg(feature = "cluster")]
        if config.is_cluster() {
            return Ok(cluster::open(config).await?.metered());
        }
        let opening = Arc::clone(config);
        let opened = tokio::task::spawn_blocking(move || embedded::open(&opening, false, log)).await;
        let embedded::Opened { log, store, embedded } = opened.map_err(|error| ServerError(error.to_string()))??;
        let (view, files) = (View::one(store.clone()), embedded.map(|log| (log, store.clone())));
        let (delivery, directory, groups, keys) = (store.clone() as _, store.clone() as _, store.clone() as _, store as _);
        Ok(Self { log, delivery, directory, groups, keys, view, pushes: None, tasks: Vec::new(), files }.metered())
    }

    /// How far the view is.
    fn positions(&self) -> Positions {
        let (delivery, directory, groups) = (Arc::clone(&self.delivery), Arc::clone(&self.directory), Arc::clone(&self.groups));
        Positions { delivery, directory, groups }
    }

    fn metered(self) -> Self {
        Self {
            delivery: Arc::new(Metered::new(self.delivery)),
            directory: Arc::new(Metered::new(self.directory)),
            groups: Arc::new(Metered::new(self.groups)),
            keys: Arc::new(Metered::new(self.keys)),
            view: View {
                delivery: Arc::new(Metered::new(self.view.delivery)),
                directory: Arc::new(Metered::new(self.view.directory)),
                groups: Arc::new(Metered::new(self.view.groups)),
                each: self.view.each,
            },
            ..self
        }
    }
}

/// A running process of a broker: on the embedded profile the whole broker. Stop it with [`Broker::stop`]; dropping it ends it like a crash
/// would.
pub struct Broker {
    url: String,
    address: SocketAddr,
    hub: Option<Arc<Hub>>,
    log: Arc<dyn EventLog>,
    drain: CancellationToken,
    drain_time: Duration,
    serving: JoinHandle<()>,
    tasks: Vec<JoinHandle<()>>,
    projectors: Vec<std::thread::JoinHandle<()>>,
    stop_edge: watch::Sender<bool>,
    stop_projector: watch::Sender<bool>,
    failed: watch::Receiver<Option<ServerError>>,
}

fn dev_realm(config: &Config, random: &dyn Random) -> Result<Option<DevRealm>, ServerError> {
    if !config.dev_mode() {
        DevRealm::remove(&config.data)?;
        return Ok(None);
    }
    tracing::warn!("DEVELOPMENT MODE is on: anybody who reaches this broker can be anybody, and rate limits are off");
    Ok(Some(DevRealm::open(&config.data, random)?))
}

fn pace(config: &Config) -> Pace {
    match config.is_cluster() {
        true => Pace {
            soon: Duration::from_millis(limits::CLUSTER_RECEIPT_DELAY_MS),
            mark_windows: limits::CLUSTER_MARK_WINDOWS,
            ..Pace::default()
        },
        false => Pace::default(),
    }
}

/// What an edge is made of, before it serves.
struct Edge {
    hub: Arc<Hub>,
    directory: Arc<Directory>,
    acceptor: Arc<Acceptor>,
    realms: Arc<Realms>,
    dev: Option<DevRealm>,
    /// The server's public key in groups.
    group_sender: Option<[u8; 32]>,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
}

impl Edge {
    async fn new(config: &Config, backends: &Backends, clock: Arc<dyn Clock>) -> Result<Self, ServerError> {
        let random: Arc<dyn Random> = Arc::new(SystemRandom);
        let dev = dev_realm(config, random.as_ref())?;
        let realms = Arc::new(Realms::open(&config.realms, dev.as_ref(), Arc::clone(&clock)).await?);
        let edge = EdgeId::random(random.as_ref());
        let directory = Arc::new(Directory::new(crate::directory::Parts {
            log: Arc::clone(&backends.log),
            store: Arc::clone(&backends.directory),
            keys: Arc::clone(&backends.keys),
            clock: Arc::clone(&clock),
            random: Arc::clone(&random),
            edge,
        }));
        let acceptor = Arc::new(Acceptor::new(
            Arc::clone(&backends.log),
            Arc::clone(&directory),
            Arc::clone(&backends.delivery),
            Arc::clone(&clock),
            Arc::clone(&random),
            config.rates().messages_per_device_per_s,
        ));
        let group_service = Arc::new(GroupService::new(crate::delivery::groups::Parts {
            log: Arc::clone(&backends.log),
            store: Arc::clone(&backends.groups),
            clock: Arc::clone(&clock),
            random: Arc::clone(&random),
            edge,
            messages_per_s: config.rates().messages_per_device_per_s,
            changes_per_min: config.rates().group_changes_per_device_per_min,
        }));
        let hub = Arc::new(Hub::new(
            Arc::clone(&backends.log),
            Arc::clone(&backends.delivery),
            Arc::clone(&directory),
            Arc::clone(&acceptor),
            group_service,
            Arc::clone(&random),
            Duration::from_millis(if config.is_cluster() { limits::CLUSTER_ACK_DELAY_MS } else { limits::ACK_DELAY_MS }),
        ));
        let group_sender = groups::key(config)?.map(|key| key.public());
        Ok(Self { hub, directory, acceptor, realms, dev, group_sender, clock, random })
    }

    fn state(self, config: &Config, backends: &Backends, operations: Operations) -> EdgeState {
        let low_water = Arc::clone(&self.hub) as _;
        let keys = KeyService::new(Arc::clone(&backends.keys), Arc::clone(&backends.directory), &config.rates(), low_water);
        EdgeState::new(Parts {
            clock: self.clock,
            random: self.random,
            auth: Authenticator::new(Arc::clone(&self.directory) as _),
            realms: self.realms,
            dev: self.dev.map(Arc::new),
            directory: self.directory,
            keys: Arc::new(keys),
            sending: self.acceptor,
            inbox: Arc::new(Inboxes(Arc::clone(&self.hub))),
            hub: self.hub,
            group_sender: self.group_sender,
            operations,
        })
    }
}

impl PushTarget for Hub {
    fn deliver(&self, batch: Vec<Push>) {
        Self::deliver(self, batch);
    }

    fn cut_all(&self) {
        Self::cut_all(self);
    }
}

impl Broker {
    /// Starts the configured roles and returns once they serve: on the embedded profile the projector has caught up by then.
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
        let exporter = metrics::install();
        traces::install(&config.tracing, config.role)?;
        let mut backends = Backends::open(&config, log).await?;
        let listener = Listener::bind(&config).await?;
        let address = listener.address();
        let url = format!("{}://{address}", listener.scheme());
        let (failing, failed) = watch::channel(None);
        let (stop_edge, edge_stops) = watch::channel(false);
        let (stop_projector, projector_stops) = watch::channel(false);
        let drain = CancellationToken::new();
        let mut tasks =
            vec![tokio::spawn(watch_log(Arc::clone(&backends.log), failing.clone())), tokio::spawn(metrics::upkeep(drain.clone()))];
        tasks.append(&mut backends.tasks);
        // Edges say it too, so that it is missed where no projector lives.
        metrics::observe_to_own(to_own(backends.log.as_ref()));

        let edge = if config.role.is_edge() { Some(Edge::new(&config, &backends, Arc::clone(&clock)).await?) } else { None };
        let hub = edge.as_ref().map(|edge| Arc::clone(&edge.hub));
        if let (Some(follow), Some(hub)) = (&backends.pushes, &hub) {
            tasks
                .push(listen_for_pushes(Arc::clone(follow), backends.log.partitions(Topic::Push), Arc::clone(hub), failing.clone()).await?);
        }
        let (mut projectors, mut progress) = (Vec::new(), Vec::new());
        if config.role.is_projector() {
            let bus: Arc<dyn PushBus> = match (&hub, &backends.pushes) {
                (Some(hub), None) => Arc::clone(hub) as _,
                _ => Arc::new(PushTopic::new(Arc::clone(&backends.log))),
            };
            let log = match config.is_cluster() {
                true => Arc::clone(&backends.log),
                false => {
                    let view = backends.positions();
                    rewound(Arc::clone(&backends.log), &view).await?
                }
            };
            let parts = WorkerParts {
                log,
                delivery: Arc::clone(&backends.view.delivery),
                directory: Arc::clone(&backends.view.directory),
                groups: Arc::clone(&backends.view.groups),
                keys: Arc::clone(&backends.keys),
                bus,
                clock: Arc::clone(&clock),
            };
            let group_parts = rebuild::group_parts(&parts, &config)?;
            let keys = metadata::keys(&config)?;
            let keeping = projecting::Keeping {
                pace: pace(&config),
                metadata: keys.clone(),
                alone: !config.is_cluster(),
                beside: backends.view.each.clone(),
            };
            let (thread, watching) = projecting::spawn(parts, keeping, projector_stops.clone(), failing.clone())?;
            let (groups_thread, watching_groups) = projecting::spawn_groups(group_parts, keys, projector_stops, failing.clone())?;
            if !config.is_cluster() {
                projecting::wait_until_caught_up(watching.clone(), failed.clone()).await?;
                projecting::wait_until_caught_up(watching_groups.clone(), failed.clone()).await?;
            }
            if let (Some(edge), false) = (&edge, config.is_cluster()) {
                let (acceptor, groups) = (Arc::clone(&edge.acceptor), Arc::clone(&edge.hub.groups));
                let inbox = move |behind| acceptor.set_behind(behind);
                tasks.push(tokio::spawn(projecting::watch_lag(Arc::clone(&backends.log), Topic::Inbox, watching.clone(), inbox)));
                let groups = move |behind| groups.set_behind(behind);
                tasks.push(tokio::spawn(projecting::watch_lag(Arc::clone(&backends.log), Topic::Groups, watching_groups.clone(), groups)));
            }
            if config.is_cluster() {
                let view = backends.positions();
                tasks.push(tokio::spawn(projecting::measure_lag(Arc::clone(&backends.log), view)));
            }
            (projectors, progress) = (vec![thread, groups_thread], vec![watching, watching_groups]);
        }

        // A projector among many may own nothing for now, and is ready all the same.
        if config.is_cluster() {
            progress.clear();
        }
        if let Some((log, store)) = backends.files.take() {
            let progress = progress.first().cloned();
            tasks.extend(answer_operator(Control { dir: config.data.clone(), log, store, progress }));
        }
        let health = Arc::new(BrokerHealth { log: Arc::clone(&backends.log), progress, hub: hub.clone() });
        let operations = Operations::new(Arc::clone(&config), health, exporter);
        let app = match edge {
            Some(edge) => {
                let (hub, realms) = (Arc::clone(&edge.hub), Arc::clone(&edge.realms));
                tasks.push(tokio::spawn(Arc::clone(&hub).run_acks(edge_stops.clone())));
                tasks.push(tokio::spawn(Arc::clone(&hub.groups).run(edge_stops.clone())));
                tasks.push(tokio::spawn(hub.run_heartbeat(edge_stops)));
                let until = drain.clone();
                tasks.push(tokio::spawn(async move { realms.keep_fresh(until).await }));
                router::router(edge.state(&config, &backends, operations))
            }
            None => router::operations(operations),
        };
        let serving = tokio::spawn(serve(listener, app, ServeOptions::from(config.as_ref()), drain.clone()));
        Ok(Self {
            url,
            address,
            hub,
            log: backends.log,
            drain,
            drain_time: Duration::from_millis(config.timeouts.drain_ms),
            serving,
            tasks,
            projectors,
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
        if let Some(hub) = &self.hub {
            hub.drain(self.drain_time).await;
        }
        self.drain.cancel();
        if tokio::time::timeout(self.drain_time, &mut self.serving).await.is_err() {
            self.serving.abort();
        }
        self.stop_edge.send_replace(true);
        self.stop_projector.send_replace(true);
        for projector in self.projectors.drain(..) {
            // The projector's last flush may wait for the disk; the runtime must not.
            let _ = tokio::task::spawn_blocking(move || projector.join()).await;
        }
        for task in self.tasks.drain(..) {
            task.abort();
            let _ = task.await;
        }
        self.log.close().await;
        traces::flush().await;
    }
}

/// Returns once the edge hears its pushes: a stream that attached before would wait for an answer that it missed.
async fn listen_for_pushes(
    follow: Arc<dyn Follow>,
    partitions: u16,
    hub: Arc<Hub>,
    failing: watch::Sender<Option<ServerError>>,
) -> Result<JoinHandle<()>, ServerError> {
    let (ready, is_ready) = oneshot::channel();
    let edge = hub.edge;
    let listening = tokio::spawn(async move {
        let error = push_topic::receive(follow, partitions, edge, hub, ready).await;
        failing.send_replace(Some(ServerError(format!("the edge can't read the push topic: {error}"))));
    });
    match is_ready.await {
        Ok(()) => Ok(listening),
        Err(_) => Err(ServerError("the edge can't read the push topic; `sealpost topology check` says what is wrong with it".to_owned())),
    }
}

/// A folder in which no socket can be made is no reason not to serve.
fn answer_operator(control: Control) -> Option<JoinHandle<()>> {
    match control.listen() {
        Ok(listener) => Some(tokio::spawn(control.run(listener))),
        Err(error) => {
            tracing::warn!(%error, "there is no control socket: partitions can't be scaled, and `sealpost status` can't ask");
            None
        }
    }
}

/// Partitions that all projectors together should own.
fn to_own(log: &dyn EventLog) -> usize {
    [Topic::Inbox, Topic::Directory].map(|topic| usize::from(log.partitions(topic))).iter().sum()
}

/// A poisoned log takes nothing more until it is opened anew; the process says so and ends, for its supervisor to start it again.
async fn watch_log(log: Arc<dyn EventLog>, failing: watch::Sender<Option<ServerError>>) {
    let mut every = tokio::time::interval(Duration::from_millis(500));
    loop {
        every.tick().await;
        if let Err(error @ AppendError::Poisoned(_)) = log.health() {
            tracing::error!(%error, "the log can't go on");
            metrics::observe_log_poisoned();
            failing.send_replace(Some(ServerError(format!(
                "{error}. Check the disk, then start the broker again: it recovers what it acknowledged"
            ))));
            return;
        }
    }
}

struct BrokerHealth {
    log: Arc<dyn EventLog>,
    /// Of each projector.
    progress: Vec<watch::Receiver<Progress>>,
    hub: Option<Arc<Hub>>,
}

#[async_trait]
impl Health for BrokerHealth {
    async fn ready(&self) -> Result<(), String> {
        self.log.health().map_err(|error| error.to_string())?;
        if self.hub.as_ref().is_some_and(|hub| hub.is_draining()) {
            return Err("draining".to_owned());
        }
        match self.progress.iter().all(|progress| progress.borrow().caught_up) {
            true => Ok(()),
            false => Err("the projector has not caught up with the log".to_owned()),
        }
    }
}
