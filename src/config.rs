//! The one configuration: a TOML file, then `SEALPOST_…` variables, then command line flags; validated once.
//!
//! A variable names a key in upper case, with `__` between the levels: `SEALPOST_LISTEN=127.0.0.1:9000`,
//! `SEALPOST_LOG__RETENTION_DAYS=7`. Values other than texts are written as in TOML:
//! `SEALPOST_REALMS='[{ name = "socialink", issuer = "…", audience = "…", jwks_url = "https://…" }]'`.

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Deserializer};
use url::Url;
use zeroize::{Zeroize, Zeroizing};

use crate::ids::RealmId;

mod cluster;
mod groups;
mod metadata;
mod tracing;

pub use cluster::{Cql, CqlTls, Kafka, KafkaSasl, KafkaTls, Role, SaslMechanism};
pub use groups::Groups;
pub use metadata::Metadata;
pub use tracing::Tracing;

/// A value that is never printed and is wiped when dropped.
#[derive(Clone)]
pub struct Secret<T: Zeroize>(Zeroizing<T>);

impl<T: Zeroize> Secret<T> {
    /// Wraps it.
    pub fn new(value: T) -> Self {
        Self(Zeroizing::new(value))
    }

    /// The value, for the one place that uses it.
    pub fn expose(&self) -> &T {
        &self.0
    }
}

impl<T: Zeroize> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl<'de, T: Zeroize + Deserialize<'de>> Deserialize<'de> for Secret<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self::new)
    }
}

/// What is wrong with the configuration, and what to do. A retry never helps.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("the configuration file {path} can't be read: {source}")]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or holds a key that does not exist or has another type.
    #[error("the configuration file {path} is not right:\n{problem}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Where and what.
        problem: String,
    },
    /// A variable names no key, or its value does not fit.
    #[error("the variable {name} is not right: {problem}")]
    Variable {
        /// Which variable.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// A key's value makes no sense.
    #[error("{key}: {problem}")]
    Invalid {
        /// Which key.
        key: String,
        /// What is wrong, and what to do.
        problem: String,
    },
}

fn invalid(key: impl Into<String>, problem: impl Into<String>) -> ConfigError {
    ConfigError::Invalid { key: key.into(), problem: problem.into() }
}

/// Everything an operator can choose.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The one folder that holds everything. Default `sealpost-data`.
    pub data: PathBuf,
    /// Where to listen. Default `127.0.0.1:8470`.
    pub listen: SocketAddr,
    /// Certificate and key; without them the edge speaks plain HTTP (behind a proxy that ends TLS, or on loopback).
    pub tls: Option<Tls>,
    /// Development mode: realms `socialink`, `vignette` and `local`, whose tokens anybody who can read the data folder (and
    /// anybody who reaches `POST /v1/dev/token`) can make. Default: on if there is no realm and the address is a loopback one.
    pub dev: Option<bool>,
    /// The platforms whose users may register.
    pub realms: Vec<Realm>,
    /// Rate limits and caps.
    pub limits: Limits,
    /// Time-outs.
    pub timeouts: Timeouts,
    /// The event log.
    pub log: Log,
    /// How many partitions the topics have. Fixed once the data folder exists.
    pub partitions: Partitions,
    /// Who may read `/metrics`.
    pub metrics: Metrics,
    /// What analysts may know.
    pub metadata: Metadata,
    /// Groups.
    pub groups: Groups,
    /// Traces of single messages.
    pub tracing: Tracing,
    /// What this process does. Default: everything.
    pub role: Role,
    /// The log on Kafka. Default: the embedded one.
    pub kafka: Option<Kafka>,
    /// The stores on CQL; goes together with `kafka`. Default: the embedded ones.
    pub cql: Option<Cql>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: PathBuf::from("sealpost-data"),
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8470)),
            tls: None,
            dev: None,
            realms: Vec::new(),
            limits: Limits::default(),
            timeouts: Timeouts::default(),
            log: Log::default(),
            partitions: Partitions::default(),
            metrics: Metrics::default(),
            metadata: Metadata::default(),
            groups: Groups::default(),
            tracing: Tracing::default(),
            role: Role::All,
            kafka: None,
            cql: None,
        }
    }
}

/// Certificate chain and private key, both PEM.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificate chain, the server's own first.
    pub cert: PathBuf,
    /// Its private key (PKCS#8, PKCS#1 or SEC1).
    pub key: PathBuf,
}

/// A platform that owns users.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Realm {
    /// Its name: the part behind `@` of its users' identities.
    pub name: RealmId,
    /// What `iss` of its tokens must be.
    pub issuer: String,
    /// What `aud` of its tokens must be or hold.
    pub audience: String,
    /// Its public keys as a file (RFC 7517 JWK set), read again when a key is missing.
    pub jwks_file: Option<PathBuf>,
    /// Its public keys by HTTPS (plain HTTP only from a loopback host).
    #[serde(default, deserialize_with = "some_url")]
    pub jwks_url: Option<Url>,
    /// Certificates (PEM) of the authorities that may vouch for `jwks_url`, instead of the system's.
    pub jwks_ca: Option<PathBuf>,
    /// Which signatures are accepted. Default: all three.
    #[serde(default = "RealmAlgorithm::all")]
    pub algorithms: Vec<RealmAlgorithm>,
}

/// A signature algorithm of realm tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize)]
pub enum RealmAlgorithm {
    /// Ed25519 (RFC 8037).
    EdDSA,
    /// ECDSA with P-256 and SHA-256.
    ES256,
    /// RSASSA-PKCS1-v1_5 with SHA-256, keys of 2,048 bits or more.
    RS256,
}

impl RealmAlgorithm {
    /// All that are implemented.
    pub fn all() -> Vec<Self> {
        vec![Self::EdDSA, Self::ES256, Self::RS256]
    }
}

/// Rate limits and caps. A rate of 0 is none. Rates that are not set have the default in their text; in development mode
/// they are all off, since the load tool drives thousands of devices from one address.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// HTTP requests a second of one device. Default 50; a burst of ten seconds' worth is fine.
    pub requests_per_device_per_s: Option<u32>,
    /// Requests a second of one address (IPv6: one /64), authenticated or not. Default 500, with the same burst.
    pub requests_per_ip_per_s: Option<u32>,
    /// Messages a second of one device, by HTTP and stream. Default 100, with the same burst.
    pub messages_per_device_per_s: Option<u32>,
    /// Device registrations an hour of one address. Default 60.
    pub registrations_per_ip_per_h: Option<u32>,
    /// Failed authentications a minute of one address; past it they are answered with 429. Default 120.
    pub auth_failures_per_ip_per_min: Option<u32>,
    /// Fetches of key bundles a minute of one device; past it the answer is 429. Default 120.
    pub key_fetches_per_device_per_min: Option<u32>,
    /// Requests for KeyPackages by one device, each for up to 1,500 accounts. Default 20.
    pub key_package_fetches_per_device_per_min: Option<u32>,
    /// Commits, proposals and new groups a minute of one device; past it the answer is 429. Default 120.
    pub group_changes_per_device_per_min: Option<u32>,
    /// One-time prekeys a minute handed out of one device's pool; past it bundles come without one (and with the
    /// last-resort PQ prekey), so that a pool can't be drained. Default 30.
    pub one_time_prekeys_per_device_per_min: Option<u32>,
    /// Open connections. Default 200,000.
    pub connections: usize,
    /// Open connections of one address (IPv6: one /64). Default 256; in development mode as many as there are.
    pub connections_per_ip: Option<usize>,
    /// Proxies whose `X-Forwarded-For` is believed (its last address that is not one of them counts as the client's), and
    /// whose connections are not capped per address.
    pub trusted_proxies: Vec<IpAddr>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests_per_device_per_s: None,
            requests_per_ip_per_s: None,
            messages_per_device_per_s: None,
            registrations_per_ip_per_h: None,
            auth_failures_per_ip_per_min: None,
            key_fetches_per_device_per_min: None,
            key_package_fetches_per_device_per_min: None,
            group_changes_per_device_per_min: None,
            one_time_prekeys_per_device_per_min: None,
            connections: 200_000,
            connections_per_ip: None,
            trusted_proxies: Vec::new(),
        }
    }
}

/// The rate limits that hold; 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Rates {
    /// See [`Limits::requests_per_device_per_s`].
    pub requests_per_device_per_s: u32,
    /// See [`Limits::requests_per_ip_per_s`].
    pub requests_per_ip_per_s: u32,
    /// See [`Limits::messages_per_device_per_s`].
    pub messages_per_device_per_s: u32,
    /// See [`Limits::registrations_per_ip_per_h`].
    pub registrations_per_ip_per_h: u32,
    /// See [`Limits::auth_failures_per_ip_per_min`].
    pub auth_failures_per_ip_per_min: u32,
    /// See [`Limits::key_fetches_per_device_per_min`].
    pub key_fetches_per_device_per_min: u32,
    /// See [`Limits::key_package_fetches_per_device_per_min`].
    pub key_package_fetches_per_device_per_min: u32,
    /// See [`Limits::group_changes_per_device_per_min`].
    pub group_changes_per_device_per_min: u32,
    /// See [`Limits::one_time_prekeys_per_device_per_min`].
    pub one_time_prekeys_per_device_per_min: u32,
}

/// Time-outs, in milliseconds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Timeouts {
    /// From a request's head to its answer, without the time a long-poll waits. Default 30,000.
    pub request_ms: u64,
    /// How long a connection may take to send a request's head, and how long it may idle between two. Default 60,000.
    pub header_read_ms: u64,
    /// How long a TLS handshake may take. Default 10,000.
    pub tls_handshake_ms: u64,
    /// How long a shutdown waits for connections to end. Default 10,000.
    pub drain_ms: u64,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { request_ms: 30_000, header_read_ms: 60_000, tls_handshake_ms: 10_000, drain_ms: 10_000 }
    }
}

/// The embedded event log.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// A segment file is closed at about this size; retention frees whole segments. Default 64 MiB.
    pub segment_bytes: u64,
    /// How long records are kept. Default 31, a day longer than undelivered envelopes.
    pub retention_days: u32,
    /// At most about this much is kept, oldest first out (0: no cap). What is dropped before it was delivered is
    /// said to its device as a gap. Default 0.
    pub retention_bytes: u64,
}

impl Default for Log {
    fn default() -> Self {
        Self { segment_bytes: 64 * 1024 * 1024, retention_days: 31, retention_bytes: 0 }
    }
}

/// How many partitions the topics have.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Partitions {
    /// Of `inbox`. Default 16.
    pub inbox: u16,
    /// Of `directory`. Default 16.
    pub directory: u16,
}

impl Default for Partitions {
    fn default() -> Self {
        Self { inbox: 16, directory: 16 }
    }
}

/// Who may read `/metrics`.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Metrics {
    /// Default: loopback addresses only.
    pub expose: Expose,
    /// If set, `Authorization: Bearer <token>` is needed, from wherever.
    pub token: Option<Secret<String>>,
}

/// From where something may be read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Expose {
    /// From nowhere: 404.
    Nobody,
    /// From this machine.
    #[default]
    Loopback,
    /// From everywhere.
    Anyone,
}

/// Variables that are texts whatever they look like.
const TEXT_KEYS: [&str; 25] = [
    "data",
    "listen",
    "tls.cert",
    "tls.key",
    "metrics.expose",
    "metrics.token",
    "metadata.secret",
    "tracing.otlp_endpoint",
    "config",
    "role",
    "kafka.brokers",
    "kafka.prefix",
    "kafka.tls.ca",
    "kafka.tls.cert",
    "kafka.tls.key",
    "kafka.sasl.mechanism",
    "kafka.sasl.username",
    "kafka.sasl.password",
    "cql.hosts",
    "cql.keyspace",
    "cql.state_keyspace",
    "cql.mirror_keyspace",
    "cql.username",
    "cql.password",
    "cql.tls.ca",
];
/// Variables of other parts of Sealpost (the file's own name; the client's; benches' and tests').
const NOT_OURS: [&str; 10] = ["CONFIG", "SERVER", "TOKEN", "PASSPHRASE", "CLIENT_", "BENCH_", "TEST_", "STORE_TEST_", "LOAD_", "KILL_"];
const PREFIX: &str = "SEALPOST_";

impl Config {
    /// Reads the file, if there is one, and lays the variables over it. Not validated yet: flags come first.
    pub fn load(file: Option<&Path>, variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigError> {
        let mut table = toml::Table::new();
        if let Some(path) = file {
            let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable { path: path.into(), source })?;
            let wrong = |e: toml::de::Error| ConfigError::File { path: path.into(), problem: e.to_string() };
            // First as a whole, for messages that show the line.
            toml::from_str::<Self>(&text).map_err(wrong)?;
            table = toml::from_str(&text).map_err(wrong)?;
        }
        let mut variables: Vec<_> = variables.into_iter().filter(|(name, _)| is_ours(name)).collect();
        variables.sort();
        // Each by itself, so that a message names the variable. What needs others to be whole is judged with them.
        for (name, value) in &variables {
            lay_over(&mut table, name, value)?;
            match from_table(&table) {
                Err(problem) if !problem.contains("missing field") => {
                    return Err(ConfigError::Variable { name: name.clone(), problem });
                }
                _ => {}
            }
        }
        from_table(&table).map_err(|problem| invalid("configuration", problem))
    }

    /// Whether development mode is on.
    pub fn dev_mode(&self) -> bool {
        self.dev.unwrap_or(self.realms.is_empty() && self.listen.ip().is_loopback())
    }

    /// The rate limits that hold.
    pub fn rates(&self) -> Rates {
        let dev = self.dev_mode();
        let or = |set: Option<u32>, default: u32| set.unwrap_or(if dev { 0 } else { default });
        let l = &self.limits;
        Rates {
            requests_per_device_per_s: or(l.requests_per_device_per_s, 50),
            requests_per_ip_per_s: or(l.requests_per_ip_per_s, 500),
            messages_per_device_per_s: or(l.messages_per_device_per_s, 100),
            registrations_per_ip_per_h: or(l.registrations_per_ip_per_h, 60),
            auth_failures_per_ip_per_min: or(l.auth_failures_per_ip_per_min, 120),
            key_fetches_per_device_per_min: or(l.key_fetches_per_device_per_min, 120),
            key_package_fetches_per_device_per_min: or(l.key_package_fetches_per_device_per_min, 20),
            group_changes_per_device_per_min: or(l.group_changes_per_device_per_min, 120),
            one_time_prekeys_per_device_per_min: or(l.one_time_prekeys_per_device_per_min, 30),
        }
    }

    /// Open connections that one address may have.
    pub fn connections_per_ip(&self) -> usize {
        self.limits.connections_per_ip.unwrap_or(if self.dev_mode() { self.limits.connections } else { 256 })
    }

    /// Checks everything once. What passes is trusted from there on.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if self.data.as_os_str().is_empty() {
            return Err(invalid("data", "is empty; name the folder that holds everything"));
        }
        self.validate_realms()?;
        self.validate_limits()?;
        self.validate_cluster()?;
        self.validate_metadata()?;
        self.validate_groups()?;
        self.validate_tracing()?;
        if !(1 << 20..=1 << 32).contains(&self.log.segment_bytes) {
            return Err(invalid("log.segment_bytes", "must be from 1 MiB (1048576) to 4 GiB"));
        }
        if self.log.retention_days == 0 {
            return Err(invalid("log.retention_days", "must be at least 1: the log holds what is not delivered yet"));
        }
        if self.log.retention_bytes != 0 && self.log.retention_bytes < 2 * self.log.segment_bytes {
            return Err(invalid("log.retention_bytes", "must be 0 (no cap) or at least twice log.segment_bytes"));
        }
        for (key, count) in [("partitions.inbox", self.partitions.inbox), ("partitions.directory", self.partitions.directory)] {
            if !(1..=1024).contains(&count) {
                return Err(invalid(key, "must be from 1 to 1024"));
            }
        }
        if self.metrics.token.as_ref().is_some_and(|token| token.expose().len() < 16) {
            return Err(invalid("metrics.token", "must have at least 16 characters; make one with `openssl rand -hex 16`"));
        }
        Ok(())
    }

    fn validate_realms(&self) -> Result<(), ConfigError> {
        if self.realms.is_empty() && !self.dev_mode() {
            let why = if self.dev == Some(false) { "dev is off" } else { "the address is not a loopback one" };
            let problem = format!(
                "there is none, and {why}, so nobody could register; configure a realm ([[realms]] name, issuer, audience and \
                 jwks_url or jwks_file), or turn development mode on with --dev (anybody can then be anybody)"
            );
            return Err(invalid("realms", problem));
        }
        let (mut names, mut audiences) = (HashSet::new(), HashSet::new());
        for realm in &self.realms {
            let key = |field: &str| format!("realms.{}.{field}", realm.name);
            if !names.insert(&realm.name) {
                return Err(invalid(key("name"), "is there twice; one platform, one realm"));
            }
            if realm.issuer.is_empty() {
                return Err(invalid(key("issuer"), "is empty; it is what the platform's tokens carry as `iss`"));
            }
            if realm.audience.is_empty() {
                return Err(invalid(key("audience"), "is empty; it is what the platform puts into tokens meant for Sealpost as `aud`"));
            }
            if !audiences.insert((&realm.issuer, &realm.audience)) {
                return Err(invalid(key("audience"), "another realm has the same issuer and audience; tokens could not be told apart"));
            }
            if realm.algorithms.is_empty() {
                return Err(invalid(key("algorithms"), "is empty; leave it out for all, or name some of EdDSA, ES256, RS256"));
            }
            match (&realm.jwks_file, &realm.jwks_url) {
                (Some(_), None) => {}
                (None, Some(url)) => validate_jwks_url(url).map_err(|problem| invalid(key("jwks_url"), problem))?,
                _ => return Err(invalid(key("jwks_url"), "exactly one of jwks_url and jwks_file is needed: where the realm's keys are")),
            }
            if realm.jwks_ca.is_some() && realm.jwks_url.as_ref().is_none_or(|url| url.scheme() != "https") {
                return Err(invalid(key("jwks_ca"), "is only for an https:// jwks_url: nothing else has a certificate"));
            }
        }
        Ok(())
    }

    fn validate_limits(&self) -> Result<(), ConfigError> {
        if self.limits.connections == 0 {
            return Err(invalid("limits.connections", "must be at least 1"));
        }
        if self.limits.connections_per_ip == Some(0) {
            return Err(invalid("limits.connections_per_ip", "must be at least 1"));
        }
        let t = &self.timeouts;
        for (key, value) in [
            ("timeouts.request_ms", t.request_ms),
            ("timeouts.header_read_ms", t.header_read_ms),
            ("timeouts.tls_handshake_ms", t.tls_handshake_ms),
        ] {
            if !(100..=3_600_000).contains(&value) {
                return Err(invalid(key, "must be from 100 to 3600000 (milliseconds)"));
            }
        }
        if t.drain_ms > 600_000 {
            return Err(invalid("timeouts.drain_ms", "must be at most 600000 (milliseconds)"));
        }
        Ok(())
    }

    /// [`Timeouts::request_ms`] as a duration.
    pub fn request_timeout(&self) -> Duration {
        Duration::from_millis(self.timeouts.request_ms)
    }
}

fn some_url<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Url>, D::Error> {
    let text = String::deserialize(deserializer)?;
    Url::parse(&text).map(Some).map_err(|e| serde::de::Error::custom(format!("not a URL: {e}")))
}

fn from_table(table: &toml::Table) -> Result<Config, String> {
    Config::deserialize(table.clone()).map_err(|e| e.to_string().trim().to_owned())
}

fn is_ours(name: &str) -> bool {
    name.strip_prefix(PREFIX)
        .is_some_and(|rest| !NOT_OURS.iter().any(|other| rest == *other || (other.ends_with('_') && rest.starts_with(other))))
}

/// Sets the key that the variable names.
fn lay_over(table: &mut toml::Table, name: &str, value: &str) -> Result<(), ConfigError> {
    let wrong = |problem: String| ConfigError::Variable { name: name.to_owned(), problem };
    let path: Vec<String> = name.trim_start_matches(PREFIX).split("__").map(str::to_lowercase).collect();
    let value = if TEXT_KEYS.contains(&path.join(".").as_str()) {
        toml::Value::String(value.to_owned())
    } else {
        let line: Result<toml::Table, _> = toml::from_str(&format!("value = {value}"));
        let parsed = line.ok().and_then(|mut table| table.remove("value"));
        parsed.ok_or_else(|| wrong("its value is not a TOML value (texts need quotes)".to_owned()))?
    };
    let (last, levels) = path.split_last().ok_or_else(|| wrong("it names no key".to_owned()))?;
    let mut at = table;
    for level in levels {
        let entry = at.entry(level.clone()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = entry.as_table_mut().ok_or_else(|| wrong(format!("{level} has no keys below it")))?;
    }
    at.insert(last.clone(), value);
    Ok(())
}

fn validate_jwks_url(url: &Url) -> Result<(), String> {
    let loopback = match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(ip)) => ip.is_loopback(),
        Some(url::Host::Ipv6(ip)) => ip.is_loopback(),
        None => return Err("has no host".to_owned()),
    };
    match url.scheme() {
        "https" => Ok(()),
        "http" if loopback => Ok(()),
        _ => Err("must begin with https:// (plain http:// only from this machine): who changes the keys is anybody".to_owned()),
    }
}

#[cfg(test)]
mod tests;
