//! `sealpost serve`: runs a broker.

use std::io::Write as _;
use std::net::SocketAddr;

use anyhow::Context as _;

use super::broker::BrokerArgs;
use super::cluster::ClusterArgs;
use crate::config::{Config, Role};
use crate::server::Broker;

/// Runs a broker. Alone: log, store, projector and edge in one process, everything in one folder. With --kafka and --cql: one of many
/// processes over a cluster.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    broker: BrokerArgs,
    /// Where to listen [default: 127.0.0.1:8470]; port 0 takes a free one.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// What this process does; edges and projectors scale apart on a cluster [default: all].
    #[arg(long)]
    role: Option<Role>,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The keyspace in the CQL store [default: sealpost].
    #[arg(long)]
    keyspace: Option<String>,
    /// Development mode: anybody who reaches the broker can be anybody. On by itself without configured realms on a loopback address.
    #[arg(long)]
    dev: bool,
}

impl Args {
    /// The configuration: file, variables, flags; validated.
    pub fn load(self) -> anyhow::Result<Config> {
        self.broker.load(|config| {
            if let Some(listen) = self.listen {
                config.listen = listen;
            }
            if let Some(role) = self.role {
                config.role = role;
            }
            self.cluster.set(config);
            if let (Some(keyspace), Some(cql)) = (self.keyspace, &mut config.cql) {
                cql.keyspace = keyspace;
            }
            if self.dev {
                config.dev = Some(true);
            }
        })
    }
}

/// What is run, for the first line.
fn described(config: &Config) -> String {
    let role = match config.role {
        Role::All => "edge and projector",
        Role::Edge => "edge",
        Role::Projector => "projector",
    };
    match (&config.kafka, &config.cql) {
        (Some(kafka), Some(cql)) => {
            format!("cluster profile, {role}, Kafka at {}, CQL at {}, keyspace {}", kafka.brokers, cql.hosts, cql.keyspace)
        }
        _ => format!("embedded profile, {role}, everything in {}", config.data.display()),
    }
}

/// Runs until SIGTERM or Ctrl-C, then drains.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let config = args.load()?;
    raise_file_limit();
    let (described, dev, is_edge) = (described(&config), config.dev_mode(), config.role.is_edge());
    let broker = Broker::start(config).await.context("the broker can't start")?;
    let url = broker.url();
    let mut out = std::io::stdout().lock();
    writeln!(out, "sealpost {}, {described}", env!("CARGO_PKG_VERSION"))?;
    if dev && is_edge {
        writeln!(out, "DEVELOPMENT MODE: anybody who reaches this address can be anybody. Never use it for real people.")?;
    }
    writeln!(out, "listening on {url}")?;
    if is_edge {
        writeln!(out, "  the API to read and try   {url}/docs")?;
    }
    if dev && is_edge {
        let server = if url == "http://127.0.0.1:8470" { String::new() } else { format!(" --server {url}") };
        writeln!(out, "  a chat, in a terminal     sealpost chat --as alice@socialink{server}")?;
        writeln!(out, "  its peer, in another      sealpost chat --as bob@vignette --to alice@socialink{server}")?;
    }
    writeln!(out, "  figures                   {url}/metrics")?;
    out.flush()?;
    drop(out);
    let failed = tokio::select! {
        signal = stop_signal() => { signal?; None }
        error = broker.failed() => Some(error),
    };
    tracing::info!("draining");
    broker.stop().await;
    match failed {
        None => Ok(()),
        Some(error) => Err(error).context("the broker stopped by itself"),
    }
}

/// Returns when the process is asked to end.
pub async fn stop_signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        done = tokio::signal::ctrl_c() => done,
        _ = terminate.recv() => Ok(()),
    }
}

/// Every device is an open file. Raises the soft limit to the hard one, and that too where we may.
pub fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let wanted = 1 << 20;
    if setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: Some(wanted) }).is_err() {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: now.maximum, maximum: now.maximum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_says_what_is_run() {
        assert_eq!(described(&Config::default()), "embedded profile, edge and projector, everything in sealpost-data");
        let text = "role = \"projector\"\n[kafka]\nbrokers = \"k:9092\"\n[cql]\nhosts = \"c\"\nusername = \"u\"\npassword = \"hush\"";
        let line = described(&toml::from_str(text).expect("parses"));
        assert_eq!(line, "cluster profile, projector, Kafka at k:9092, CQL at c, keyspace sealpost");
    }
}
