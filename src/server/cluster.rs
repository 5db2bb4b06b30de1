//! Log and stores of the cluster profile.

use std::sync::Arc;
use std::time::Duration;

use crate::config::{Config, Cql, Kafka, SaslMechanism};
use crate::limits;
use crate::log::kafka as log;
use crate::log::{EventLog, Follow};
use crate::metrics;
use crate::server::{Backends, ServerError, View, to_own};
use crate::store::cql as store;

impl From<log::KafkaOpenError> for ServerError {
    fn from(error: log::KafkaOpenError) -> Self {
        Self(error.to_string())
    }
}

impl From<store::CqlOpenError> for ServerError {
    fn from(error: store::CqlOpenError) -> Self {
        Self(error.to_string())
    }
}

/// How to reach Kafka, as configured.
pub fn kafka_options(kafka: &Kafka) -> log::KafkaOptions {
    let mut options = log::KafkaOptions::new(kafka.brokers.clone());
    options.prefix.clone_from(&kafka.prefix);
    options.session_timeout = Duration::from_millis(kafka.session_timeout_ms);
    options.tls =
        kafka.tls.as_ref().map(|tls| log::KafkaTls { ca_file: tls.ca.clone(), cert_file: tls.cert.clone(), key_file: tls.key.clone() });
    options.sasl = kafka.sasl.as_ref().map(|sasl| log::KafkaSasl {
        mechanism: match sasl.mechanism {
            SaslMechanism::Plain => log::SaslMechanism::Plain,
            SaslMechanism::ScramSha256 => log::SaslMechanism::ScramSha256,
            SaslMechanism::ScramSha512 => log::SaslMechanism::ScramSha512,
        },
        username: sasl.username.clone(),
        password: sasl.password.expose().clone().into(),
    });
    options
}

/// How to reach the CQL store, as configured.
pub fn cql_options(cql: &Cql) -> store::CqlOptions {
    let mut options = store::CqlOptions::new(cql.hosts.clone(), cql.keyspace.clone());
    if let Some(keyspace) = &cql.state_keyspace {
        options.state_keyspace.clone_from(keyspace);
    }
    options.user = cql.username.clone().zip(cql.password.as_ref().map(|password| password.expose().clone().into()));
    options.tls = cql.tls.as_ref().map(|tls| store::CqlTls { ca_file: tls.ca.clone() });
    options
}

/// The same for another view beside the configured one. The state stays where it is.
pub(super) fn beside(cql: &Cql, keyspace: &str) -> store::CqlOptions {
    store::CqlOptions { keyspace: keyspace.to_owned(), ..cql_options(cql) }
}

/// Opens both; what is missing or wrong is an error that says what to do.
pub(super) async fn open(config: &Config) -> Result<Backends, ServerError> {
    let (Some(kafka), Some(cql)) = (&config.kafka, &config.cql) else {
        return Err(ServerError("the cluster profile needs both [kafka] and [cql]".to_owned()));
    };
    let log = log::KafkaLog::open(kafka_options(kafka)).await?;
    let store = store::CqlStore::open(cql_options(cql)).await?;
    let pushes = Some(Arc::clone(&log) as Arc<dyn Follow>);
    let mut view = View::one(store.clone());
    if let Some(keyspace) = cql.mirror_keyspace.as_deref().filter(|_| config.role.is_projector()) {
        let other = store::CqlStore::open(beside(cql, keyspace)).await?;
        tracing::info!(keyspace = %cql.keyspace, mirror = %keyspace, "two keyspaces are kept");
        view = View::two([store.clone(), other], &(Arc::clone(&log) as Arc<dyn EventLog>));
    }
    let tasks = vec![tokio::spawn(measure_topics(Arc::clone(&log)))];
    let (delivery, directory, groups, keys) = (store.clone(), store.clone(), store.clone(), store);
    Ok(Backends { log, delivery, directory, groups, keys, view, pushes, tasks, files: None })
}

/// What copies and leaders are missing, and how many partitions want an owner, for metrics: every process says it, so that it is known while
/// one lives.
async fn measure_topics(log: Arc<log::KafkaLog>) {
    let mut every = tokio::time::interval(Duration::from_millis(limits::CLUSTER_LAG_LOOK_MS));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        // Topics grow while the process runs.
        metrics::observe_to_own(to_own(log.as_ref()));
        // What can't be looked at leaves the last figures as they are.
        if let Ok(log::Replicas { under_replicated, leaderless }) = log.replicas().await {
            metrics::observe_replicas(under_replicated, leaderless);
        }
    }
}
