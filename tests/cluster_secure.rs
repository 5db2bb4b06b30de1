//! Kafka over TLS with SCRAM-SHA-512 and Cassandra over TLS with a password, on real servers: log and stores do what they must, and each way to
//! get it wrong is an error that says which. `topology/local up --secure` starts the servers; `make test-cluster` runs this.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use sealpost::clock::SystemRandom;
use sealpost::config::{Config, Role};
use sealpost::ids::EdgeId;
use sealpost::log::kafka::{KafkaLog, KafkaOpenError, KafkaOptions, NewKafkaTopic, create_topics, delete_topics};
use sealpost::log::{PartitionCounts, Topic, conformance as log_conformance};
use sealpost::server::{cql_options, kafka_options};
use sealpost::store::conformance::{self as store_conformance, Fixture, Stores};
use sealpost::store::cql::{CqlOpenError, CqlOptions, CqlStore, Replication, drop_keyspaces, migrate};
use sealpost::testing::{Broker, RawDevice};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};

/// An error comes within this time.
const SOON: Duration = Duration::from_secs(20);
const COUNTS: PartitionCounts = PartitionCounts { inbox: log_conformance::PARTITIONS, groups: 2, directory: 6, metadata: 2, push: 2 };

/// The folder of the servers, and the configuration that fits them.
fn servers(test: &str) -> Option<(PathBuf, Config)> {
    let Some(folder) = std::env::var_os("SEALPOST_TEST_SECURE").map(PathBuf::from) else {
        eprintln!("{test}: skipped, since SEALPOST_TEST_SECURE does not name the folder of a `topology/local up --secure`");
        return None;
    };
    let config = Config::load(Some(&folder.join("secure.toml")), std::iter::empty()).expect("the client's configuration");
    Some((folder, config))
}

fn kafka(config: &Config) -> KafkaOptions {
    let mut options = kafka_options(config.kafka.as_ref().expect("Kafka is configured"));
    options.prefix = format!("secure-{}-", EdgeId::random(&SystemRandom));
    options
}

fn cql(config: &Config) -> CqlOptions {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("secure{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let configured = cql_options(config.cql.as_ref().expect("the store is configured"));
    CqlOptions { keyspace: name.clone(), state_keyspace: name, ..configured }
}

async fn topics(options: &KafkaOptions, counts: PartitionCounts) {
    let topics = Topic::ON_CLUSTER.map(|topic| NewKafkaTopic::new(topic, counts.of(topic), 1));
    create_topics(options, &topics).await.expect("topics are made");
}

/// Another address of this machine that leads to the same server, whose certificate does not name it.
async fn elsewhere(hosts: &str) -> String {
    let listener = TcpListener::bind("127.0.0.2:0").await.expect("a second loopback address");
    let address = listener.local_addr().expect("its address").to_string();
    let server = hosts.split(',').next().expect("a host").to_owned();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let server = server.clone();
            tokio::spawn(async move {
                let mut server = TcpStream::connect(server).await?;
                copy_bidirectional(&mut client, &mut server).await
            });
        }
    });
    address
}

macro_rules! log_suite {
    ($($name:ident),*) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn the_log_conforms() {
            let Some((_, config)) = servers("the_log_conforms") else { return };
            $({
                let options = kafka(&config);
                topics(&options, COUNTS).await;
                let log = KafkaLog::open(options.clone()).await.expect("opens");
                log_conformance::$name(log).await;
                delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
            })*
        }
    };
}

log_suite!(
    offsets_grow_by_one,
    read_returns_what_was_appended,
    callbacks_come_in_order_and_flush_once,
    consumer_gets_everything_in_order,
    consumer_resumes_from_committed
);

struct Secure(CqlOptions);

#[async_trait]
impl Fixture for Secure {
    async fn open(&self) -> Stores {
        let store = CqlStore::open(self.0.clone()).await.expect("opens");
        Stores::of(&store)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_stores_conform() {
    let Some((_, config)) = servers("the_stores_conform") else { return };
    let options = cql(&config);
    migrate(&options, &Replication::Simple(1)).await.expect("migrates");
    let fixture = Secure(options.clone());
    store_conformance::delivery(&fixture).await.expect("no store call fails");
    store_conformance::directory(&fixture).await.expect("no store call fails");
    store_conformance::one_time_keys_are_taken_once(&fixture).await.expect("no store call fails");
    drop_keyspaces(&options).await.expect("drops");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_goes_through() {
    let Some((_, mut config)) = servers("a_message_goes_through") else { return };
    let (kafka, cql) = (kafka(&config), cql(&config));
    topics(&kafka, PartitionCounts { inbox: 4, groups: 1, directory: 2, metadata: 1, push: 2 }).await;
    migrate(&cql, &Replication::Simple(1)).await.expect("migrates");
    let (mut at_kafka, mut at_cql) = (config.kafka.take().expect("Kafka"), config.cql.take().expect("the store"));
    at_kafka.prefix.clone_from(&kafka.prefix);
    at_cql.keyspace.clone_from(&cql.keyspace);
    let join = |config: &mut Config, role| {
        (config.role, config.kafka, config.cql) = (role, Some(at_kafka.clone()), Some(at_cql.clone()));
    };
    let projector = Broker::start_with(|config| join(config, Role::Projector)).await.expect("the projector starts");
    let edge = Broker::start_with(|config| join(config, Role::Edge)).await.expect("the edge starts");
    let alice = RawDevice::register(edge.url(), "alice@socialink").await.expect("registers");
    let bob = RawDevice::register(edge.url(), "bob@vignette").await.expect("registers");
    let (status, answer) = alice.post(&[&bob], 1, b"over TLS").await.expect("answers");
    assert!(status.is_success(), "{answer}");
    let backlog = bob.connect().await.expect("connects").backlog().await.expect("a backlog");
    assert_eq!(backlog.len(), 1);
    drop((edge, projector));
    drop_keyspaces(&cql).await.expect("drops");
    delete_topics(&kafka, &Topic::ON_CLUSTER).await.expect("topics are removed");
}

async fn kafka_refusal(options: KafkaOptions) -> KafkaOpenError {
    let begun = Instant::now();
    let error = KafkaLog::open(options).await.expect_err("refused");
    println!("{error}");
    assert!(begun.elapsed() < SOON, "after {:?}", begun.elapsed());
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_kafka_is_said() {
    let Some((folder, config)) = servers("what_is_wrong_with_kafka_is_said") else { return };
    let right = kafka(&config);
    topics(&right, COUNTS).await;

    let mut options = right.clone();
    options.sasl.as_mut().expect("a password").password = "guessed".to_owned().into();
    let error = kafka_refusal(options).await;
    assert!(matches!(error, KafkaOpenError::Authentication { .. }) && !error.can_retry(), "{error}");
    assert!(!error.to_string().contains("guessed"), "a password is never printed");

    let mut options = right.clone();
    options.sasl.as_mut().expect("a user").username = "nobody".to_owned();
    assert!(matches!(kafka_refusal(options).await, KafkaOpenError::Authentication { .. }));

    let mut options = right.clone();
    options.tls.as_mut().expect("TLS").ca_file = Some(folder.join("secure/other-ca.pem"));
    let error = kafka_refusal(options).await;
    assert!(matches!(error, KafkaOpenError::Tls { .. }) && error.to_string().contains("certificate"), "{error}");

    let options = KafkaOptions { brokers: elsewhere(&right.brokers).await, ..right.clone() };
    let error = kafka_refusal(options).await;
    assert!(matches!(error, KafkaOpenError::Tls { .. }) && error.to_string().contains("host name"), "{error}");

    let mut options = right.clone();
    options.tls.as_mut().expect("TLS").ca_file = Some(folder.join("missing.pem"));
    let error = kafka_refusal(options).await;
    assert!(matches!(error, KafkaOpenError::Options(_)) && error.to_string().contains("missing.pem"), "{error}");
    delete_topics(&right, &Topic::ON_CLUSTER).await.expect("topics are removed");
}

async fn cql_refusal(options: CqlOptions) -> CqlOpenError {
    let begun = Instant::now();
    let error = CqlStore::open(options).await.expect_err("refused");
    println!("{error}");
    assert!(begun.elapsed() < SOON, "after {:?}", begun.elapsed());
    error
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_the_store_is_said() {
    let Some((folder, config)) = servers("what_is_wrong_with_the_store_is_said") else { return };
    let right = cql(&config);

    let user = |name: &str| Some((name.to_owned(), "guessed".to_owned().into()));
    for name in ["cassandra", "nobody"] {
        let error = cql_refusal(CqlOptions { user: user(name), ..right.clone() }).await;
        assert!(matches!(error, CqlOpenError::Authentication { .. }), "{error}");
        assert!(!error.to_string().contains("guessed"), "a password is never printed");
    }
    let error = cql_refusal(CqlOptions { user: None, ..right.clone() }).await;
    assert!(matches!(error, CqlOpenError::Authentication { .. }), "no user name: {error}");

    let mut options = right.clone();
    options.tls.as_mut().expect("TLS").ca_file = folder.join("secure/other-ca.pem");
    let error = cql_refusal(options).await;
    assert!(matches!(error, CqlOpenError::Tls { .. }) && error.to_string().contains("authority"), "{error}");

    let error = cql_refusal(CqlOptions { hosts: elsewhere(&right.hosts).await, ..right.clone() }).await;
    assert!(matches!(error, CqlOpenError::Tls { .. }) && error.to_string().contains("address"), "{error}");

    let error = cql_refusal(CqlOptions { tls: None, ..right.clone() }).await;
    assert!(matches!(error, CqlOpenError::Unreachable { .. }), "without TLS: {error}");

    let mut options = right;
    options.tls.as_mut().expect("TLS").ca_file = folder.join("missing.pem");
    assert!(matches!(cql_refusal(options).await, CqlOpenError::File { .. }));
}
