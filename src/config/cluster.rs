//! What an operator chooses of a cluster: which roles this process plays, and where Kafka and the CQL store are.

use std::path::PathBuf;

use serde::Deserialize;

use super::{Config, ConfigError, Secret, invalid};

/// What one process does. On the embedded profile it does everything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Deserialize)]
#[cfg_attr(feature = "cli", derive(clap::ValueEnum))]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Edge and projector.
    #[default]
    All,
    /// Serves devices; keeps nothing.
    Edge,
    /// Applies the log to the store; serves `/healthz`, `/readyz` and `/metrics` only.
    Projector,
}

impl Role {
    /// Serves devices.
    pub const fn is_edge(self) -> bool {
        matches!(self, Self::All | Self::Edge)
    }

    /// Applies the log.
    pub const fn is_projector(self) -> bool {
        matches!(self, Self::All | Self::Projector)
    }
}

/// The log on Apache Kafka.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// `host:port`, several with commas. One that answers is enough to find the others.
    #[serde(default)]
    pub brokers: String,
    /// Goes in front of the names of topics and consumer groups, so that several services can share a cluster. Default: nothing.
    #[serde(default)]
    pub prefix: String,
    /// Encrypts the connections.
    pub tls: Option<KafkaTls>,
    /// Proves who connects.
    pub sasl: Option<KafkaSasl>,
    /// How long a projector may be silent before others take its partitions over, in milliseconds. Default 6,000; brokers refuse less unless their
    /// `group.min.session.timeout.ms` is lower.
    #[serde(default = "session_timeout_ms")]
    pub session_timeout_ms: u64,
}

const fn session_timeout_ms() -> u64 {
    6_000
}

impl Kafka {
    /// On these brokers, with the defaults.
    pub const fn on(brokers: String) -> Self {
        Self { brokers, prefix: String::new(), tls: None, sasl: None, session_timeout_ms: session_timeout_ms() }
    }

    fn validate(&self) -> Result<(), ConfigError> {
        if !cfg!(feature = "cluster") {
            return Err(invalid("kafka", "this binary was built without the cluster profile (cargo feature `cluster`)"));
        }
        if self.brokers.trim().is_empty() {
            return Err(invalid("kafka.brokers", "is empty; give host:port, several with commas"));
        }
        if !self.prefix.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')) || self.prefix.len() > 64 {
            return Err(invalid("kafka.prefix", "at most 64 of letters, digits, `.`, `_` and `-`"));
        }
        if !(1_000..=300_000).contains(&self.session_timeout_ms) {
            return Err(invalid("kafka.session_timeout_ms", "must be from 1000 to 300000 (milliseconds)"));
        }
        if self.sasl.as_ref().is_some_and(|sasl| sasl.mechanism == SaslMechanism::Plain) && self.tls.is_none() {
            return Err(invalid(
                "kafka.sasl.mechanism",
                "PLAIN without TLS shows the password to the network; add [kafka.tls] or use SCRAM",
            ));
        }
        Ok(())
    }
}

/// TLS to the brokers. Their certificates and names are always checked.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct KafkaTls {
    /// The authorities to trust (PEM). Default: the machine's.
    pub ca: Option<PathBuf>,
    /// This client's certificate (PEM), where the brokers ask for one.
    pub cert: Option<PathBuf>,
    /// Its private key (PEM).
    pub key: Option<PathBuf>,
}

/// A user name and password for the brokers.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KafkaSasl {
    /// How they are proven.
    pub mechanism: SaslMechanism,
    /// Who.
    pub username: String,
    /// Better given as `SEALPOST_KAFKA__SASL__PASSWORD` than written into a file.
    pub password: Secret<String>,
}

/// How a password is proven to brokers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum SaslMechanism {
    /// The password itself; only together with TLS.
    #[serde(rename = "PLAIN")]
    Plain,
    /// A challenge over SHA-256.
    #[serde(rename = "SCRAM-SHA-256")]
    ScramSha256,
    /// A challenge over SHA-512.
    #[serde(rename = "SCRAM-SHA-512")]
    ScramSha512,
}

/// The stores on ScyllaDB or Apache Cassandra.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cql {
    /// `host:port`, several with commas. One that answers is enough to find the others.
    #[serde(default)]
    pub hosts: String,
    /// The keyspace. Default `sealpost`.
    #[serde(default = "keyspace")]
    pub keyspace: String,
    /// The keyspace of what can't be rebuilt from the log (one-time prekeys, at-rest keys, claims). Default: the same.
    pub state_keyspace: Option<String>,
    /// A second keyspace that projectors keep like the first, while edges move from the one to the other (`sealpost rebuild`).
    pub mirror_keyspace: Option<String>,
    /// User name, where the cluster asks for one.
    pub username: Option<String>,
    /// Its password; better given as `SEALPOST_CQL__PASSWORD` than written into a file.
    pub password: Option<Secret<String>>,
    /// Encrypts the connections.
    pub tls: Option<CqlTls>,
}

impl Cql {
    /// On these hosts, with the defaults.
    pub fn on(hosts: String) -> Self {
        Self { hosts, keyspace: keyspace(), state_keyspace: None, mirror_keyspace: None, username: None, password: None, tls: None }
    }
}

fn keyspace() -> String {
    "sealpost".to_owned()
}

/// TLS to the store. Its certificates are always checked.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CqlTls {
    /// The authorities to trust (PEM).
    pub ca: PathBuf,
}

impl Config {
    /// Whether log and stores are those of a cluster.
    pub const fn is_cluster(&self) -> bool {
        self.kafka.is_some()
    }

    /// Where Kafka is, checked by itself: for tools that need nothing else.
    pub fn kafka_alone(&self) -> Result<&Kafka, ConfigError> {
        let missing = || {
            invalid(
                "kafka",
                "is missing: name the brokers with --kafka HOSTS, or in the section [kafka] of --config FILE; \
             an embedded broker is named by its folder, where a command takes --data",
            )
        };
        let kafka = self.kafka.as_ref().ok_or_else(missing)?;
        kafka.validate()?;
        Ok(kafka)
    }

    /// Where both parts of a cluster are, checked by itself, whatever this process would serve.
    pub fn validate_where(&self) -> Result<(), ConfigError> {
        self.validate_cluster()
    }

    pub(super) fn validate_cluster(&self) -> Result<(), ConfigError> {
        match (&self.kafka, &self.cql) {
            (None, None) if self.role == Role::All => return Ok(()),
            (None, None) => {
                let problem = "one process alone plays all roles; edges and projectors that scale apart need Kafka and a CQL store \
                               (--kafka and --cql, or [kafka] and [cql])";
                return Err(invalid("role", problem));
            }
            (Some(_), None) => return Err(invalid("cql", "is missing: with Kafka as the log the stores are on CQL as well (--cql HOSTS)")),
            (None, Some(_)) => return Err(invalid("kafka", "is missing: with the stores on CQL the log is on Kafka (--kafka HOSTS)")),
            (Some(_), Some(_)) => {}
        }
        let (Some(kafka), Some(cql)) = (&self.kafka, &self.cql) else { return Ok(()) };
        kafka.validate()?;
        if cql.hosts.trim().is_empty() {
            return Err(invalid("cql.hosts", "is empty; give host:port, several with commas"));
        }
        let names = [
            ("cql.keyspace", Some(&cql.keyspace)),
            ("cql.state_keyspace", cql.state_keyspace.as_ref()),
            ("cql.mirror_keyspace", cql.mirror_keyspace.as_ref()),
        ];
        for (key, name) in names {
            let valid = |name: &String| {
                (1..=48).contains(&name.len()) && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
            };
            if name.is_some_and(|name| !valid(name)) {
                return Err(invalid(key, "1 to 48 of a-z, 0-9 and `_`"));
            }
        }
        if cql.mirror_keyspace.as_ref() == Some(&cql.keyspace) {
            return Err(invalid("cql.mirror_keyspace", "is the keyspace itself; name the one that was made by `sealpost rebuild --into`"));
        }
        if cql.username.is_some() != cql.password.is_some() {
            return Err(invalid("cql.username", "user name and password go together"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        toml::from_str(text).expect("parses")
    }

    #[test]
    fn there_is_no_half_a_cluster_and_no_fallback() {
        for (text, key) in [
            ("role = \"edge\"", "role"),
            ("[kafka]\nbrokers = \"k:9092\"", "cql"),
            ("[cql]\nhosts = \"c:9042\"", "kafka"),
            ("[kafka]\nbrokers = \" \"\n[cql]\nhosts = \"c\"", "kafka.brokers"),
            ("[kafka]\nbrokers = \"k\"\nprefix = \"a/b\"\n[cql]\nhosts = \"c\"", "kafka.prefix"),
            ("[kafka]\nbrokers = \"k\"\nsession_timeout_ms = 999\n[cql]\nhosts = \"c\"", "kafka.session_timeout_ms"),
            ("[kafka]\nbrokers = \"k\"\n[cql]\nhosts = \"c\"\nkeyspace = \"A\"", "cql.keyspace"),
            ("[kafka]\nbrokers = \"k\"\n[cql]\nhosts = \"c\"\nmirror_keyspace = \"sealpost\"", "cql.mirror_keyspace"),
            ("[kafka]\nbrokers = \"k\"\n[cql]\nhosts = \"c\"\nusername = \"u\"", "cql.username"),
            (
                "[kafka]\nbrokers = \"k\"\n[kafka.sasl]\nmechanism = \"PLAIN\"\nusername = \"u\"\npassword = \"p\"\n[cql]\nhosts = \"c\"",
                "kafka.sasl.mechanism",
            ),
        ] {
            let error = config(text).validate().expect_err(text);
            assert!(matches!(&error, ConfigError::Invalid { key: k, .. } if k == key), "{text}: {error}");
        }
        let whole = config("role = \"projector\"\n[kafka]\nbrokers = \"k\"\n[cql]\nhosts = \"c\"\nusername = \"u\"\npassword = \"hush\"");
        whole.validate().expect("valid");
        assert!(whole.is_cluster() && whole.role.is_projector() && !whole.role.is_edge());
        assert!(!format!("{whole:?}").contains("hush"), "passwords are never printed");
    }
}
