//! `sealpost serve`: runs a broker.

use std::io::Write as _;
use std::net::SocketAddr;

use anyhow::Context as _;

use super::broker::BrokerArgs;
use crate::config::{Config, Cql, Kafka, Role};
use crate::server::Broker;

/// Runs a broker on the embedded profile: log, store, projector and edge in one process, everything in one folder.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    broker: BrokerArgs,
    /// Where to listen [default: 127.0.0.1:8470]; port 0 takes a free one.
    #[arg(long)]
    listen: Option<SocketAddr>,
    /// What this process does; edge and projector alone need --kafka and --cql [default: all].
    #[arg(long)]
    role: Option<Role>,
    /// The log on Kafka: host:port, several with commas.
    #[arg(long)]
    kafka: Option<String>,
    /// The stores on ScyllaDB or Cassandra: host:port, several with commas.
    #[arg(long)]
    cql: Option<String>,
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
            if let Some(brokers) = self.kafka {
                config.kafka = Some(
                    config.kafka.take().map_or_else(|| Kafka::on(brokers.clone()), |kafka| Kafka { brokers: brokers.clone(), ..kafka }),
                );
            }
            if let Some(hosts) = self.cql {
                config.cql = Some(config.cql.take().map_or_else(|| Cql::on(hosts.clone()), |cql| Cql { hosts: hosts.clone(), ..cql }));
            }
            if self.dev {
                config.dev = Some(true);
            }
        })
    }
}

/// Runs until SIGTERM or Ctrl-C, then drains.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let config = args.load()?;
    raise_file_limit();
    let (data, dev) = (config.data.clone(), config.dev_mode());
    let broker = Broker::start(config).await.context("the broker can't start")?;
    let url = broker.url();
    let mut out = std::io::stdout().lock();
    writeln!(out, "sealpost {}, embedded profile, everything in {}", env!("CARGO_PKG_VERSION"), data.display())?;
    if dev {
        writeln!(out, "DEVELOPMENT MODE: anybody who reaches this address can be anybody. Never use it for real people.")?;
    }
    writeln!(out, "listening on {url}")?;
    writeln!(out, "  the API to read and try   {url}/docs")?;
    if dev {
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

async fn stop_signal() -> std::io::Result<()> {
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
