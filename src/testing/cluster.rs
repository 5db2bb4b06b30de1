//! Brokers on a real Kafka and a real CQL store, each test with topics and keyspaces of its own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Context as _;
use parking_lot::Mutex;

use crate::config::{Config, Cql, Kafka, Role};
use crate::log::Topic;
use crate::log::kafka::{NewKafkaTopic, create_topics};
use crate::server::{cql_options, kafka_options};
use crate::store::cql::{Replication, migrate};

/// Where the servers of a test are; set by `make test-cluster`.
const KAFKA: &str = "SEALPOST_TEST_KAFKA";
const CQL: &str = "SEALPOST_TEST_CQL";
/// `cluster`: the tests of the embedded profile run on the cluster profile.
const PROFILE: &str = "SEALPOST_TEST_PROFILE";

/// Topics and keyspaces of one test.
#[derive(Debug, Clone)]
pub struct TestCluster {
    /// The log.
    pub kafka: Kafka,
    /// The stores.
    pub cql: Cql,
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
        create_topics(&kafka_options(&kafka), &topics).await?;
        migrate(&cql_options(&cql), &Replication::Simple(1)).await?;
        Ok(Some(Self { kafka, cql }))
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
        let made = Self::new("the test").await?.with_context(|| format!("{PROFILE}=cluster needs {KAFKA} and {CQL}"))?;
        KNOWN.lock().insert(folder.to_owned(), made.clone());
        Ok(Some(made))
    }

    /// A process of it that plays this role.
    pub fn join(&self, config: &mut Config, role: Role) {
        config.role = role;
        config.kafka = Some(self.kafka.clone());
        config.cql = Some(self.cql.clone());
    }
}
