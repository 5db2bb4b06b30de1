//! `sealpost topology`: the topics of a cluster as data, compared with the real one.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context as _, bail};
use serde_json::json;

use self::plan::{Change, compare};
use super::broker::BrokerArgs;
use crate::config::Kafka;
use crate::log::Topic;
use crate::log::kafka::{FoundTopics, KafkaOptions, create_topics, describe_topics, set_topic};
use crate::server::kafka_options;

mod plan;

/// The topics that this binary expects; `--file` names others.
const TOPICS: &str = include_str!("../../../topology/topics.toml");

/// Compares the cluster's topics with what they should be, and makes them so.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Shows what `apply` would do; changes nothing.
    Plan(ClusterArgs),
    /// Makes missing topics and corrects settings. Never removes a topic, and never changes partitions or copies of one that is there.
    Apply(ClusterArgs),
    /// Fails if anything differs.
    Check(ClusterArgs),
}

#[derive(Debug, clap::Args)]
struct ClusterArgs {
    #[command(flatten)]
    broker: BrokerArgs,
    /// The Kafka brokers: host:port, several with commas [default: kafka.brokers of the configuration].
    #[arg(long)]
    kafka: Option<String>,
    /// CQL is not touched; taken so that the same flags fit `serve`, `migrate` and this.
    #[arg(long, hide = true)]
    cql: Option<String>,
    /// Copies of each partition [default: 3, or as many as there are brokers].
    #[arg(long)]
    replication: Option<u16>,
    /// The topics as they should be (TOML) [default: built in, topology/topics.toml].
    #[arg(long)]
    file: Option<PathBuf>,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

impl ClusterArgs {
    fn options(&self) -> anyhow::Result<KafkaOptions> {
        let kafka = match (self.kafka.clone(), self.broker.read()?.kafka) {
            (Some(brokers), Some(kafka)) => Kafka { brokers, ..kafka },
            (Some(brokers), None) => Kafka::on(brokers),
            (None, Some(kafka)) => kafka,
            (None, None) => bail!("where? Name the brokers with --kafka HOST:PORT, or in the configuration's [kafka]"),
        };
        Ok(kafka_options(&kafka))
    }

    async fn changes(&self, options: &KafkaOptions) -> anyhow::Result<Vec<Change>> {
        let wanted = match &self.file {
            Some(path) => std::fs::read_to_string(path).with_context(|| format!("{} can't be read", path.display()))?,
            None => TOPICS.to_owned(),
        };
        let wanted = plan::parse(&wanted).map_err(|problem| anyhow::anyhow!("the topics' file is not right: {problem}"))?;
        let FoundTopics { brokers, topics } = describe_topics(options, &Topic::ON_CLUSTER).await?;
        let replication = self.replication.unwrap_or(brokers.clamp(1, 3) as u16);
        Ok(compare(&wanted, replication, &topics))
    }

    fn show(&self, changes: &[Change], done: bool) {
        if self.json {
            let list: Vec<String> = changes.iter().map(ToString::to_string).collect();
            println!("{}", json!({ "differences": list, "applied": done }));
            return;
        }
        changes.iter().for_each(|change| println!("{change}"));
        let left = changes.iter().filter(|change| matches!(change, Change::Differs { .. })).count();
        match (changes.len(), done) {
            (0, _) => println!("The topics are as they should be."),
            (_, true) if left > 0 => println!("Done, but for {left} that can't be changed here (marked with !)."),
            (_, true) => println!("Done."),
            (count, false) => println!("{count} to change; `sealpost topology apply` does it."),
        }
    }
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Plan(args) => {
            let changes = args.changes(&args.options()?).await?;
            args.show(&changes, false);
        }
        What::Check(args) => {
            let changes = args.changes(&args.options()?).await?;
            args.show(&changes, false);
            if !changes.is_empty() {
                bail!("the cluster's topics are not as they should be");
            }
        }
        What::Apply(args) => {
            let options = args.options()?;
            let changes = args.changes(&options).await?;
            apply(&options, &changes).await?;
            args.show(&changes, true);
        }
    }
    Ok(())
}

async fn apply(options: &KafkaOptions, changes: &[Change]) -> anyhow::Result<()> {
    let new: Vec<_> = changes.iter().filter_map(|change| if let Change::Create(new) = change { Some(new.clone()) } else { None }).collect();
    if !new.is_empty() {
        create_topics(options, &new).await?;
    }
    let mut settings: BTreeMap<Topic, Vec<(String, String)>> = BTreeMap::new();
    for change in changes {
        if let Change::Set { topic, key, should, .. } = change {
            settings.entry(*topic).or_default().push((key.clone(), should.clone()));
        }
    }
    for (topic, settings) in settings {
        set_topic(options, topic, &settings).await?;
    }
    Ok(())
}
