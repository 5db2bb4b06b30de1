//! Brokers on a real Kafka and a real CQL store, each test with topics and keyspaces of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use parking_lot::Mutex;

use crate::config::{Config, Cql, Kafka, Role};
use crate::log::Topic;
use crate::log::kafka::{NewKafkaTopic, create_topics, delete_topics};
use crate::server::{cql_options, kafka_options};
use crate::store::cql::{Replication, drop_keyspaces_of, migrate};

/// Where the servers of a test are; set by `make test-cluster`.
const KAFKA: &str = "SEALPOST_TEST_KAFKA";
const CQL: &str = "SEALPOST_TEST_CQL";
/// How long what a test made may take to go.
const REMOVING: Duration = Duration::from_secs(30);
/// `cluster`: the tests of the embedded profile run on the cluster profile.
const PROFILE: &str = "SEALPOST_TEST_PROFILE";

/// Topics and keyspaces of one test, removed with the last copy of it. Declare it before the brokers that use it.
#[derive(Debug, Clone)]
pub struct TestCluster {
    /// The log.
    pub kafka: Kafka,
    /// The stores.
    pub cql: Cql,
    made: Arc<Made>,
}

/// Removes what was made: a server with the leavings of many tests becomes slow.
#[derive(Debug)]
struct Made {
    kafka: Kafka,
    cql: Cql,
}

impl Drop for Made {
    fn drop(&mut self) {
        let (kafka, cql) = (kafka_options(&self.kafka), cql_options(&self.cql));
        // A runtime of its own: the test's may be about to end, and can't wait here. What fails is left to whoever stops the servers.
        let removing = std::thread::spawn(move || {
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return };
            runtime.block_on(async {
                let removed = async { tokio::join!(drop_keyspaces_of(&cql), delete_topics(&kafka, &Topic::ON_CLUSTER)) };
                match tokio::time::timeout(REMOVING, removed).await {
                    Ok((Ok(()), Ok(()))) => {}
                    other => eprintln!("topics and keyspaces of a test stay: {other:?}"),
                }
            });
        });
        let _ = removing.join();
    }
}

impl TestCluster {
    /// Makes them; `None`, said on stderr, if the servers are not named.
    pub async fn new(test: &str) -> anyhow::Result<Option<Self>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let named = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let (Some(brokers), Some(hosts)) = (named(KAFKA), named(CQL)) else {
            eprintln!("{test}: skipped, since {KAFKA} and {CQL} name no servers; `make test-cluster` starts them");
            return Ok(None);
        };
        let name = format!("b{}_{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let kafka = Kafka { prefix: format!("{name}."), ..Kafka::on(brokers) };
        let cql = Cql { keyspace: name, ..Cql::on(hosts) };
        let topics = Topic::ON_CLUSTER.map(|topic| {
            // Few: each partition costs the broker files, and tests make many topics.
            let partitions = match topic {
                Topic::Inbox => 4,
                Topic::Directory | Topic::Push => 2,
                Topic::Groups | Topic::Metadata | Topic::Layout => 1,
            };
            NewKafkaTopic::new(topic, partitions, 1)
        });
        let made = Arc::new(Made { kafka: kafka.clone(), cql: cql.clone() });
        create_topics(&kafka_options(&kafka), &topics).await?;
        migrate(&cql_options(&cql), &Replication::Simple(1)).await?;
        Ok(Some(Self { kafka, cql, made }))
    }

    /// Those of the broker that has this folder, if tests are to run on the cluster profile; the same again after a restart.
    pub async fn of_folder(folder: &Path) -> anyhow::Result<Option<Self>> {
        static KNOWN: Mutex<BTreeMap<PathBuf, TestCluster>> = Mutex::new(BTreeMap::new());
        if std::env::var(PROFILE).as_deref() != Ok("cluster") {
            return Ok(None);
        }
        let known = KNOWN.lock().get(folder).cloned();
        if known.is_some() {
            return Ok(known);
        }
        // Those of tests that are over, whose folders are gone.
        let over: Vec<_> = {
            let mut known = KNOWN.lock();
            known.extract_if(.., |folder, _| !folder.exists()).collect()
        };
        tokio::task::spawn_blocking(move || drop(over)).await?;
        let made = Self::new("the test").await?.with_context(|| format!("{PROFILE}=cluster needs {KAFKA} and {CQL}"))?;
        KNOWN.lock().insert(folder.to_owned(), made.clone());
        Ok(Some(made))
    }

    /// A second keyspace of the same test, removed with the first.
    pub fn other_keyspace(&self) -> String {
        format!("{}_new", self.made.cql.keyspace)
    }

    /// What a process of its own is told, by environment variables.
    pub fn settings(&self) -> Vec<(String, String)> {
        let settings = [
            ("SEALPOST_KAFKA__BROKERS", &self.kafka.brokers),
            ("SEALPOST_KAFKA__PREFIX", &self.kafka.prefix),
            ("SEALPOST_CQL__HOSTS", &self.cql.hosts),
            ("SEALPOST_CQL__KEYSPACE", &self.cql.keyspace),
        ];
        settings.map(|(name, value)| (name.to_owned(), value.clone())).to_vec()
    }

    /// A process of it that plays this role.
    pub fn join(&self, config: &mut Config, role: Role) {
        config.role = role;
        config.kafka = Some(self.kafka.clone());
        config.cql = Some(self.cql.clone());
    }
}
