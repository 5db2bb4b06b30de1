//! `sealpost topology`: the topics of a cluster, compared with a file and made as it says; the partitions of either profile.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::cluster::{Where, WhereArgs};
use crate::log::kafka::{self, KafkaOptions};
use crate::server::kafka_options;
use crate::topology::{Plan, Topology};

mod folder;
mod scale;

/// How long the brokers may take to show what they were told.
const SHOWN_WITHIN: Duration = Duration::from_secs(10);

/// The topics of a cluster, as data: compared with the real cluster and shown as a difference.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Shows how the cluster differs. Changes nothing.
    Plan(Which),
    /// Makes missing topics and sets what differs; shows what it did. Removes nothing, and leaves numbers of partitions as they are.
    Apply(Which),
    /// Shows how the cluster differs, and fails if it does.
    Check(Which),
    Scale(scale::Args),
}

#[derive(Debug, clap::Args)]
struct Which {
    #[command(flatten)]
    at: WhereArgs,
    /// On how many brokers each record is [default: the file's, or 3, or as many as there are].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=32))]
    replication: Option<u16>,
    /// The topology, in place of the built-in one (topology/topics.toml).
    #[arg(long)]
    file: Option<PathBuf>,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// What `apply` and the others say, for scripts.
#[derive(Debug, serde::Serialize)]
struct Report<'a> {
    /// Nothing differs (any more).
    clean: bool,
    /// What was made and set by this call.
    applied: bool,
    #[serde(flatten)]
    plan: &'a Plan,
}

impl Which {
    fn topology(&self) -> anyhow::Result<Topology> {
        let topology = match &self.file {
            None => Topology::built_in(),
            Some(path) => {
                let text = std::fs::read_to_string(path).with_context(|| format!("{} can't be read", path.display()))?;
                Topology::parse(&text).with_context(|| path.display().to_string())?
            }
        };
        Ok(topology.with_replication(self.replication))
    }
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let (which, apply, check) = match args.command {
        Command::Scale(args) => return scale::run(args).await,
        Command::Plan(which) => (which, false, false),
        Command::Apply(which) => (which, true, false),
        Command::Check(which) => (which, false, true),
    };
    let topology = which.topology()?;
    let json = which.json;
    let config = match which.at.load()? {
        Where::Cluster(config) => config,
        Where::Folder(_) if apply => {
            bail!("an embedded log has its topics by itself; `sealpost topology scale` changes the partitions of inbox")
        }
        Where::Folder(dir) => {
            let clean = folder::show(&dir, json).await?;
            return if clean || !check { Ok(()) } else { bail!("a change of the partitions is not finished") };
        }
    };
    let options = kafka_options(config.kafka_alone()?);
    let plan = topology.compare(&kafka::describe_topics(&options).await?);
    if !apply || !plan.has_changes() {
        show(&options, &plan, json, false)?;
        let clean = plan.is_clean();
        if !json {
            println!(
                "{}",
                if clean { "Nothing differs." } else { "The cluster differs; `sealpost topology apply` makes what is marked + and ~." }
            );
        }
        return if clean || !(apply || check) { Ok(()) } else { bail!("the cluster differs from the topology") };
    }
    kafka::create_topics(&options, &plan.to_create()).await?;
    kafka::alter_settings(&options, &plan.to_alter()).await?;
    show(&options, &plan, json, true)?;
    let left = wait_until_shown(&topology, &options).await?;
    if left.is_clean() {
        if !json {
            println!("Applied; nothing differs any more.");
        }
        return Ok(());
    }
    if !json {
        println!("Applied. What is left is not changed here:\n{left}");
    }
    bail!("the cluster still differs from the topology")
}

/// Brokers learn of changes a moment after they were taken.
async fn wait_until_shown(topology: &Topology, options: &KafkaOptions) -> anyhow::Result<Plan> {
    let until = tokio::time::Instant::now() + SHOWN_WITHIN;
    loop {
        let left = topology.compare(&kafka::describe_topics(options).await?);
        if !left.has_changes() || tokio::time::Instant::now() >= until {
            return Ok(left);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn show(options: &KafkaOptions, plan: &Plan, json: bool, applied: bool) -> anyhow::Result<()> {
    if json {
        println!(
            "{}",
            serde_json::to_string(&Report { clean: plan.is_clean() || (applied && plan.is_mended_by_applying()), applied, plan })?
        );
        return Ok(());
    }
    let prefix = if options.prefix.is_empty() { String::new() } else { format!(", names begin with {}", options.prefix) };
    println!("Kafka at {}: {} broker{} alive{prefix}", options.brokers, plan.brokers, if plan.brokers == 1 { "" } else { "s" });
    print!("{plan}");
    Ok(())
}
