//! `sealpost load`: how much a broker carries, over real sockets, and what became of every single message.
//!
//! One process, one thread: it shares the machine's cores with the broker it measures, so each message must cost it far
//! less than the broker. Every message carries its sender, its number and its time; the audit (`audit`) is independent
//! of the broker and also covers brokers that die and come back.

pub mod api;
pub mod audit;
mod backlog;
mod bundles;
mod crypto;
mod device;
mod engine;
mod groups;
mod idle;
pub mod keys;
mod meter;
pub mod progress;
mod record;
pub mod report;
mod sending;
mod socket;
pub mod traffic;
mod wire;
mod ws;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args as ClapArgs, Subcommand};
use url::Url;

use crate::client::PrivateCa;
pub use audit::Audit;
pub use progress::Progress;
pub use report::Report;

pub use traffic::{Plan, on_own_thread};

/// Where a broker without configuration listens.
const DEFAULT_SERVER: &str = "http://127.0.0.1:8470";

/// Arguments of `sealpost load`.
#[derive(Debug, Clone, ClapArgs)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    kind: Option<Kind>,
    #[command(flatten)]
    traffic: TrafficArgs,
}

#[derive(Debug, Clone, Subcommand)]
enum Kind {
    /// Connects many devices that do nothing, and measures the server's memory for each
    Idle(IdleArgs),
    /// Lets messages wait for one device, and measures how fast it gets them when it returns
    Backlog(BacklogArgs),
    /// Fetches key bundles at a rate, and measures how long each takes
    Bundles(BundlesArgs),
    /// Large MLS groups: messages to all members, and changes
    Groups(groups::GroupsArgs),
}

#[derive(Debug, Clone, ClapArgs)]
struct Common {
    /// The broker's URL; it must be in development mode, since the tool registers its own devices. Repeat it (or separate by commas) for
    /// several edges of one cluster: devices attach to them in turn
    #[arg(long, env = "SEALPOST_SERVER", default_value = DEFAULT_SERVER, value_delimiter = ',')]
    server: Vec<Url>,
    /// Certificates (PEM) of the authority that vouches for an https:// broker
    #[arg(long, env = "SEALPOST_CA", value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Process id of a broker on this machine, to measure without its /metrics
    #[arg(long)]
    server_pid: Option<u32>,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Until {
    /// The broker says that it is durable; what is not delivered yet piles up at the broker
    Accepted,
    /// Its recipient has it
    Delivered,
}

#[derive(Debug, Clone, ClapArgs)]
struct TrafficArgs {
    #[command(flatten)]
    common: Common,
    /// Sending devices
    #[arg(long, default_value_t = 64)]
    senders: usize,
    /// Receiving accounts
    #[arg(long, default_value_t = 64)]
    recipients: usize,
    /// Devices of each receiving account; each of them gets every message, and with several servers each is on another one
    #[arg(long, default_value_t = 1)]
    devices: usize,
    /// Recipients that each sender writes to, in turn [default: all; 1 with --crypto]
    #[arg(long)]
    peers: Option<usize>,
    /// Messages in flight for each sender
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// Until when a message counts as in flight
    #[arg(long, value_enum, default_value_t = Until::Delivered)]
    until: Until,
    /// Bytes of each message
    #[arg(long, default_value_t = 1024)]
    payload: usize,
    /// How long to send
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Messages a second, evenly spaced, latency counted from when each was due; without it as fast as the window allows
    #[arg(long)]
    rate: Option<f64>,
    /// Send by HTTP requests instead of on the WebSocket
    #[arg(long)]
    http: bool,
    /// Real libsignal messages instead of random bytes
    #[arg(long)]
    crypto: bool,
    /// How many seconds to wait in the end for what is in flight
    #[arg(long, default_value_t = 60.0)]
    grace: f64,
    /// A line here for each message when it was accepted (a) and for each delivery (d): when it was due (Unix milliseconds), how many
    /// milliseconds it took, and the recipient's account
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

#[derive(Debug, Clone, ClapArgs)]
struct IdleArgs {
    #[command(flatten)]
    common: Common,
    /// Devices to register and connect
    #[arg(long, default_value_t = 20_000)]
    devices: usize,
    /// Seconds to wait before measuring, once all are connected
    #[arg(long, default_value_t = 5.0)]
    settle: f64,
}

#[derive(Debug, Clone, ClapArgs)]
struct BacklogArgs {
    #[command(flatten)]
    common: Common,
    /// Messages that wait
    #[arg(long, default_value_t = 10_000)]
    pending: u64,
    /// Bytes of each message
    #[arg(long, default_value_t = 1024)]
    payload: usize,
}

#[derive(Debug, Clone, ClapArgs)]
struct BundlesArgs {
    #[command(flatten)]
    common: Common,
    /// Fetches a second
    #[arg(long, default_value_t = 500.0)]
    rate: f64,
    /// How long to fetch
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// Devices that ask, and as many that are asked for
    #[arg(long, default_value_t = 64)]
    devices: usize,
}

impl Common {
    /// Where devices are registered, and what is measured.
    fn first_server(&self) -> anyhow::Result<&Url> {
        self.server.first().context("no --server")
    }

    fn ca(&self) -> anyhow::Result<Option<PrivateCa>> {
        Ok(self.ca.as_deref().map(PrivateCa::from_file).transpose()?)
    }
}

fn length(seconds: f64) -> anyhow::Result<Duration> {
    match Duration::try_from_secs_f64(seconds) {
        Ok(length) if seconds <= 1e7 => Ok(length),
        _ => bail!("{seconds} is not a number of seconds"),
    }
}

impl TrafficArgs {
    fn plan(&self) -> anyhow::Result<Plan> {
        Ok(Plan {
            servers: self.common.server.clone(),
            ca: self.common.ca()?,
            senders: self.senders,
            recipients: self.recipients,
            devices: self.devices,
            peers: self.peers.unwrap_or(if self.crypto { 1 } else { self.recipients }),
            window: self.window,
            until_delivered: self.until == Until::Delivered,
            payload: self.payload,
            length: length(self.seconds)?,
            total: None,
            rate: self.rate,
            http: self.http,
            crypto: self.crypto,
            grace: length(self.grace)?,
            server_pid: self.common.server_pid,
            stop: None,
            record: self.record.clone(),
        })
    }
}

/// Runs `sealpost load`; an audit that finds something is an error, after the report.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let (json, report) = match args.kind {
        None => {
            let plan = args.traffic.plan()?;
            (args.traffic.common.json, on_own_thread(move || traffic::run(plan, Progress::on_stderr())).await?)
        }
        Some(Kind::Idle(idle)) => (idle.common.json, on_own_thread(move || idle::run(idle, Progress::on_stderr())).await?),
        Some(Kind::Backlog(backlog)) => (backlog.common.json, on_own_thread(move || backlog::run(backlog, Progress::on_stderr())).await?),
        Some(Kind::Groups(args)) => {
            let json = args.json();
            let report = on_own_thread(move || groups::run(args, Progress::on_stderr())).await?;
            report.print(json)?;
            if !report.clean() {
                bail!("the audit failed: {}", report.findings());
            }
            return Ok(());
        }
        Some(Kind::Bundles(bundles)) => (bundles.common.json, on_own_thread(move || bundles::run(bundles, Progress::on_stderr())).await?),
    };
    report.print(json)?;
    if !report.clean() {
        bail!("the audit failed: {} lost, {} duplicates, {} corrupt", report.lost, report.duplicates, report.corrupt);
    }
    Ok(())
}

/// Asks the kernel for enough open files.
fn raise_file_limit(connections: usize) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let wanted = connections as u64 + 512;
    let now = getrlimit(Resource::Nofile);
    if now.current.is_none_or(|current| current >= wanted) {
        return;
    }
    let hard = now.maximum.map(|maximum| maximum.max(wanted));
    // Raising the hard limit takes root; if it fails the soft one goes as far as it may.
    if setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: hard }).is_err() {
        let current = now.maximum.map_or(wanted, |maximum| maximum.min(wanted));
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(current), maximum: now.maximum });
        if current < wanted {
            eprintln!("only {current} files may be open, {wanted} are needed: raise `ulimit -n`");
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Args {
        Command::try_parse_from(line.split_whitespace()).unwrap().args
    }

    #[test]
    fn the_command_lines_that_scripts_use_are_understood() {
        let line =
            "load --server http://127.0.0.1:9 --senders 8 --recipients 4 --window 32 --payload 512 --seconds 3 --rate 2000 --http --json";
        let args = parse(line);
        assert!(args.kind.is_none() && args.traffic.common.json);
        let plan = args.traffic.plan().unwrap();
        assert_eq!((plan.senders, plan.recipients, plan.peers, plan.window, plan.payload), (8, 4, 4, 32, 512));
        assert_eq!((plan.rate, plan.http, plan.crypto, plan.length), (Some(2_000.0), true, false, Duration::from_secs(3)));
        assert!(plan.until_delivered && !parse("load --until accepted").traffic.plan().unwrap().until_delivered);
        let plan = parse("load --server http://127.0.0.1:9 --server http://127.0.0.1:8 --devices 2 --record x").traffic.plan().unwrap();
        assert_eq!((plan.servers.len(), plan.devices), (2, 2));
        let plan = parse("load --crypto").traffic.plan().unwrap();
        assert_eq!((plan.senders, plan.recipients, plan.peers, plan.window, plan.payload), (64, 64, 1, 64, 1024));
        assert!(matches!(
            parse("load idle --server http://127.0.0.1:9 --devices 7 --json").kind,
            Some(Kind::Idle(IdleArgs { devices: 7, .. }))
        ));
        assert!(matches!(parse("load backlog --pending 10000 --json").kind, Some(Kind::Backlog(BacklogArgs { pending: 10_000, .. }))));
        assert!(matches!(parse("load bundles --rate 500 --seconds 2").kind, Some(Kind::Bundles(_))));
        let line = "load groups --server http://127.0.0.1:9 --members 1500 --online 300 --seconds 5 --groups 2 --rate 50 --opaque --json";
        assert!(matches!(parse(line).kind, Some(Kind::Groups(args)) if args.json()));
    }

    #[test]
    fn impossible_plans_are_refused() {
        for line in [
            "load --devices 0",
            "load --devices 11",
            "load --devices 2 --crypto",
            "load --senders 0",
            "load --window 0",
            "load --payload 15",
            "load --payload 262144",
            "load --rate 0",
            "load --rate NaN",
        ] {
            assert!(parse(line).traffic.plan().unwrap().check().is_err(), "{line}");
        }
        assert!(parse("load --seconds=-1").traffic.plan().is_err());
    }
}
