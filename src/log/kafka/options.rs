//! How the log on Kafka is opened, and why it could not be.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rdkafka::ClientConfig;
use zeroize::Zeroizing;

use crate::clock::{Clock, SystemClock};
use crate::limits;
use crate::log::{PartitionCounts, Topic};

/// How a [`super::KafkaLog`] is opened.
#[derive(Clone)]
pub struct KafkaOptions {
    /// Where the cluster is: `host:port`, several with commas. One that answers is enough to find the others.
    pub brokers: String,
    /// Goes in front of the names of topics and groups, so that several logs can live on one cluster.
    pub prefix: String,
    /// Partitions that the topics must have; unset: whatever they have.
    pub partitions: Option<PartitionCounts>,
    /// Encrypts connections.
    pub tls: Option<KafkaTls>,
    /// Names and proves who connects.
    pub sasl: Option<KafkaSasl>,
    /// How long a consumer may be silent before it is taken for dead and its partitions go to others. The brokers have a
    /// lower bound, `group.min.session.timeout.ms`, 6 s unless they were told otherwise.
    pub session_timeout: Duration,
    /// How long an append waits for others to share its request.
    pub linger: Duration,
    /// Where record times come from.
    pub clock: Arc<dyn Clock>,
}

/// TLS to the brokers. Their certificates and host names are always checked.
#[derive(Debug, Clone, Default)]
pub struct KafkaTls {
    /// Certificates of the authorities to trust (PEM); unset: the machine's.
    pub ca_file: Option<PathBuf>,
    /// This client's certificate (PEM), where brokers ask for one.
    pub cert_file: Option<PathBuf>,
    /// Its private key (PEM).
    pub key_file: Option<PathBuf>,
}

/// A user name and password. Without TLS, PLAIN shows the password to the network.
#[derive(Clone)]
pub struct KafkaSasl {
    /// How they are proven.
    pub mechanism: SaslMechanism,
    /// Who.
    pub username: String,
    /// Never printed.
    pub password: Zeroizing<String>,
}

impl std::fmt::Debug for KafkaSasl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KafkaSasl").field("mechanism", &self.mechanism).field("username", &self.username).finish_non_exhaustive()
    }
}

/// How a password is proven to brokers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SaslMechanism {
    /// The password itself.
    Plain,
    /// A challenge over SHA-256.
    ScramSha256,
    /// A challenge over SHA-512.
    ScramSha512,
}

impl SaslMechanism {
    /// Its registered name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::ScramSha256 => "SCRAM-SHA-256",
            Self::ScramSha512 => "SCRAM-SHA-512",
        }
    }
}

/// Why the log on Kafka could not be opened, and what to do. There is never a fallback.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KafkaOpenError {
    /// The driver refuses the options. A retry can't help.
    #[error("the Kafka client can't be set up: {0}; look at the broker addresses, the TLS files and the SASL settings")]
    Options(String),
    /// No broker answered. A retry can help.
    #[error(
        "no Kafka broker answers at {brokers} ({reason}); check the addresses, that the brokers run, and that this machine may reach \
         them and the addresses that they advertise"
    )]
    Unreachable {
        /// Where.
        brokers: String,
        /// What the driver says.
        reason: String,
    },
    /// A broker answered, and TLS with it failed. A retry can't help.
    #[error(
        "TLS with the Kafka brokers at {brokers} failed ({reason}); check the authority's certificate file and the brokers' host names"
    )]
    Tls {
        /// Where.
        brokers: String,
        /// What the driver says.
        reason: String,
    },
    /// The brokers refuse who we say we are. A retry can't help.
    #[error("the Kafka brokers at {brokers} refuse the credentials ({reason}); check the SASL mechanism, user name and password")]
    Authentication {
        /// Where.
        brokers: String,
        /// What the driver says.
        reason: String,
    },
    /// A topic does not exist, or may not be seen. A retry can't help.
    #[error("the cluster has no topic `{0}`; create the topics with `sealpost topology apply`, or give this user the right to describe it")]
    TopicMissing(String),
    /// A topic has another number of partitions. A retry can't help.
    #[error("the topic `{topic}` has {found} partitions and not {expected}; correct the configuration, or run `sealpost topology check`")]
    PartitionCount {
        /// Which.
        topic: String,
        /// What it has.
        found: usize,
        /// What it must have.
        expected: usize,
    },
    /// Topic `layout` could not be read: nobody knows where accounts are.
    #[error("how accounts are spread over the partitions can't be read from topic layout: {0}")]
    Layout(String),
    /// Partitions have no leader: brokers are down. A retry can help.
    #[error("partition {partition} of the topic `{topic}` has no leader ({reason}); start the brokers that hold its replicas")]
    NoLeader {
        /// Which topic.
        topic: String,
        /// Its first partition without one.
        partition: i32,
        /// What the driver says.
        reason: String,
    },
}

impl KafkaOpenError {
    /// Whether trying again later can help.
    pub const fn can_retry(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::NoLeader { .. })
    }
}

impl KafkaOptions {
    /// With the defaults, on these brokers.
    pub fn new(brokers: impl Into<String>) -> Self {
        Self {
            brokers: brokers.into(),
            prefix: String::new(),
            partitions: None,
            tls: None,
            sasl: None,
            session_timeout: Duration::from_secs(6),
            linger: Duration::from_millis(2),
            clock: Arc::new(SystemClock),
        }
    }

    /// A topic's name on the cluster.
    pub fn topic(&self, topic: Topic) -> String {
        format!("{}{}", self.prefix, topic.name())
    }

    /// What every client of the cluster has in common.
    pub(super) fn client(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &self.brokers)
            .set("client.id", "sealpost")
            .set("allow.auto.create.topics", "false")
            .set("socket.nagle.disable", "true")
            .set("socket.keepalive.enable", "true")
            // A broker that hangs (SIGSTOP, a partitioned network) is given up after this long, not after a minute.
            .set("socket.timeout.ms", "6000")
            .set("socket.connection.setup.timeout.ms", "5000")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("retry.backoff.ms", "20")
            .set("retry.backoff.max.ms", "500")
            .set("log.connection.close", "false")
            .set("security.protocol", self.security_protocol());
        if let Some(KafkaTls { ca_file, cert_file, key_file }) = &self.tls {
            for (key, file) in [("ssl.ca.location", ca_file), ("ssl.certificate.location", cert_file), ("ssl.key.location", key_file)] {
                if let Some(file) = file {
                    config.set(key, file.to_string_lossy());
                }
            }
        }
        if let Some(sasl) = &self.sasl {
            config
                .set("sasl.mechanism", sasl.mechanism.name())
                .set("sasl.username", &sasl.username)
                .set("sasl.password", sasl.password.as_str());
        }
        config
    }

    /// That the files are there: the driver does not name the one that it can't read.
    pub(super) fn check_files(&self) -> Result<(), KafkaOpenError> {
        let files = self.tls.iter().flat_map(|tls| [&tls.ca_file, &tls.cert_file, &tls.key_file]).flatten();
        for file in files {
            std::fs::File::open(file).map_err(|error| KafkaOpenError::Options(format!("{}: {error}", file.display())))?;
        }
        Ok(())
    }

    const fn security_protocol(&self) -> &'static str {
        match (&self.tls, &self.sasl) {
            (None, None) => "plaintext",
            (Some(_), None) => "ssl",
            (None, Some(_)) => "sasl_plaintext",
            (Some(_), Some(_)) => "sasl_ssl",
        }
    }

    pub(super) fn producer(&self) -> ClientConfig {
        let mut config = self.client();
        config
            // acks=all, and retries that neither double nor reorder.
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("max.in.flight.requests.per.connection", "5")
            .set("compression.type", "none")
            .set("linger.ms", format!("{:.3}", self.linger.as_secs_f64() * 1000.0))
            .set("batch.size", limits::KAFKA_BATCH_BYTES.to_string())
            .set("message.max.bytes", limits::KAFKA_MESSAGE_BYTES.to_string())
            .set("message.timeout.ms", limits::KAFKA_DELIVERY_MS.to_string())
            .set("request.timeout.ms", "5000")
            // Our own cap comes first (`producer::Producer::submit`); these only catch an error in it.
            .set("queue.buffering.max.kbytes", (2 * limits::LOG_QUEUE_BYTES / 1024).to_string())
            .set("queue.buffering.max.messages", (2 * limits::LOG_QUEUE_BYTES / limits::KAFKA_RECORD_OVERHEAD_BYTES).to_string());
        config
    }

    /// A client that reads now and then; `group` names it, and is joined only by who subscribes.
    pub(super) fn reader(&self, group: &str) -> ClientConfig {
        let mut config = self.client();
        config
            .set("group.id", format!("{}{group}", self.prefix))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            // Positions that are gone are found by comparing, see `consumer`; a new group starts at the start.
            .set("auto.offset.reset", "earliest")
            .set("check.crcs", "true")
            // A fetch is answered after this long, or once so much is there: without that each append would be a fetch of its own, and at a
            // few thousand small appends a second the broker would do little else. Also how soon a partition that was just assigned joins.
            .set("fetch.wait.max.ms", "4")
            .set("fetch.min.bytes", "65536")
            .set("fetch.error.backoff.ms", "50")
            .set("fetch.queue.backoff.ms", "5")
            .set("fetch.message.max.bytes", limits::KAFKA_BATCH_BYTES.to_string())
            .set("fetch.max.bytes", limits::LOG_BATCH_BYTES.to_string())
            .set("receive.message.max.bytes", (4 * limits::LOG_BATCH_BYTES).to_string())
            .set("queued.max.messages.kbytes", (limits::KAFKA_PREFETCH_BYTES / 1024).to_string());
        config
    }

    /// A client that reads a topic all the time.
    pub(super) fn follower(&self, group: &str, topic: Topic) -> ClientConfig {
        let mut config = self.reader(group);
        if !matches!(topic, Topic::Inbox | Topic::Push) {
            // Mostly silent: asked seldom, and answered as soon as there is anything. At 4 ms each reader cost each broker 250 requests a second, all day.
            config.set("fetch.wait.max.ms", "100").set("fetch.min.bytes", "1");
        }
        config
    }

    /// A member of a group, which shares out the partitions of a topic.
    pub(super) fn consumer(&self, group: &str, topic: Topic) -> ClientConfig {
        let session_ms = self.session_timeout.as_millis() as u64;
        let mut config = self.follower(group, topic);
        config
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", session_ms.to_string())
            // How soon the group learns of partitions that `inbox` got.
            .set("topic.metadata.refresh.interval.ms", "2000")
            // Who beats learns of a rebalance, so beats are frequent; they cost next to nothing.
            .set("heartbeat.interval.ms", (session_ms / 24).clamp(100, 1000).to_string())
            .set("max.poll.interval.ms", limits::KAFKA_OWNER_AWAY_MS.max(session_ms).to_string());
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn security_follows_from_what_is_given() {
        let mut options = KafkaOptions::new("localhost:9092");
        assert_eq!(options.client().get("security.protocol"), Some("plaintext"));
        options.sasl =
            Some(KafkaSasl { mechanism: SaslMechanism::ScramSha512, username: "edge".to_owned(), password: "hush".to_owned().into() });
        assert_eq!(options.client().get("security.protocol"), Some("sasl_plaintext"));
        options.tls = Some(KafkaTls { ca_file: Some("ca.pem".into()), ..KafkaTls::default() });
        let config = options.client();
        assert_eq!(config.get("security.protocol"), Some("sasl_ssl"));
        assert_eq!(config.get("sasl.mechanism"), Some("SCRAM-SHA-512"));
        assert_eq!(config.get("ssl.ca.location"), Some("ca.pem"));
        assert!(!format!("{:?}", options.sasl).contains("hush"), "passwords are never printed");
    }

    /// Every setting exists: the driver refuses names and values that it does not know.
    #[test]
    fn the_driver_takes_the_settings() {
        let mut options = KafkaOptions::new("localhost:9092");
        options.linger = Duration::from_micros(500);
        for topic in Topic::ON_CLUSTER {
            for config in [options.producer(), options.consumer("group", topic), options.reader("reader")] {
                config.create_native_config().expect("known settings");
            }
        }
    }
}
