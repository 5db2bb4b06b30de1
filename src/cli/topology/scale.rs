//! `sealpost topology scale`: more partitions of `inbox`, while messages flow.
//!
//! Each step is one that a repeated call finds done: it may be killed at any point and called again. From the moment the new
//! partitions are open the projectors finish by themselves.

use std::time::Duration;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tokio::time::Instant;

use super::folder;
use crate::cli::cluster::{Where, WhereArgs};
use crate::ids::{Generation, Partition};
use crate::log::kafka::{self, GroupWatch, KafkaLog, KafkaOptions};
use crate::log::layout::{self, Layout, LayoutRecord};
use crate::log::{EventLog, Topic};
use crate::projector::worker::GROUP;
use crate::server::kafka_options;

/// Between two looks.
pub(super) const LOOK: Duration = Duration::from_millis(100);
/// How long the projectors may take to share new partitions out before these are opened all the same.
const OWNED_WITHIN: Duration = Duration::from_secs(30);
/// How long a step that everybody sees at once may take.
const SEEN_WITHIN: Duration = Duration::from_secs(15);

/// Spreads the accounts over another number of partitions of inbox, while messages flow: order is kept, nothing is lost, nothing has to be
/// restarted. Called again after it was stopped, it goes on where it was.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    at: WhereArgs,
    /// How many partitions accounts are spread over from now on.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    partitions: u16,
    /// How long to wait for the older partitions to be drained, in seconds. Past that the change still ends by itself.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    wait: u64,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// What it did.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    /// Accounts were spread over another number before.
    pub changed: bool,
    /// The number of the layout, from 0.
    pub generation: u16,
    /// Over how many partitions accounts are spread.
    pub partitions: u16,
    /// The first of them.
    pub first: u16,
    /// Partitions of topic inbox, older ones included: none is ever taken away.
    pub topic_partitions: u16,
    /// Older partitions that are empty for good.
    pub retired: u16,
    /// From the opening until everything older was drained.
    pub drain_ms: Option<u64>,
}

/// Runs it.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let at = args.at.load()?;
    let bar = if args.json { ProgressBar::hidden() } else { ProgressBar::new_spinner() };
    bar.enable_steady_tick(LOOK);
    let wait = Duration::from_secs(args.wait);
    let done = match at {
        Where::Folder(dir) => folder::scale(&dir, args.partitions, wait, &bar).await,
        Where::Cluster(config) => {
            let options = kafka_options(config.kafka_alone()?);
            let log = KafkaLog::open(options.clone()).await?;
            let done = scale(&log, &options, args.partitions, wait, &bar).await;
            log.close().await;
            done
        }
    };
    bar.finish_and_clear();
    let report = done?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else if report.changed {
        println!(
            "Accounts are spread over {} partitions ({} to {}, generation {}); {} older ones are drained, in {:.1} s.",
            report.partitions,
            report.first,
            report.first + report.partitions - 1,
            report.generation,
            report.retired,
            report.drain_ms.unwrap_or_default() as f64 / 1000.0
        );
    } else {
        println!("Accounts are spread over {} partitions already; nothing to do.", report.partitions);
    }
    Ok(())
}

async fn scale(log: &KafkaLog, options: &KafkaOptions, count: u16, wait: Duration, bar: &ProgressBar) -> anyhow::Result<Report> {
    let layout = log.layout();
    if layout.is_settled() && layout.count() == count {
        return Ok(report(log, None, false));
    }
    if !layout.is_settled() && layout.count() != count {
        bail!(
            "a change to {} partitions is not finished; `sealpost topology scale --partitions {}` waits for it. If no projector runs, start one",
            layout.count(),
            layout.count()
        );
    }
    if layout.is_settled() {
        open(log, options, &layout, count, bar).await?;
    }
    let begun = Instant::now();
    let old: Vec<Partition> = log.layout().partitions_of(Generation(log.layout().newest().0 - 1)).collect();
    bar.set_style(ProgressStyle::with_template("{spinner} draining {bar:32} {pos} of {len} older partitions, {elapsed}")?);
    bar.set_length(old.len() as u64);
    loop {
        let layout = log.layout();
        bar.set_position(old.iter().filter(|partition| layout.is_drained(**partition)).count() as u64);
        if layout.is_settled() {
            return Ok(report(log, Some(begun.elapsed()), true));
        }
        if begun.elapsed() > wait {
            bail!(
                "after {} s older partitions are not drained. Does a projector run, and reach the CQL store (`sealpost status`)? The change ends by \
                 itself once one does; messages are accepted meanwhile",
                wait.as_secs()
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Makes the partitions, lets the projectors share them out, opens them.
async fn open(log: &KafkaLog, options: &KafkaOptions, layout: &Layout, count: u16, bar: &ProgressBar) -> anyhow::Result<()> {
    bar.set_style(ProgressStyle::with_template("{spinner} {msg}, {elapsed}")?);
    let (_, written) = log.bounds(layout::TOPIC).await?;
    if written.0 == 0 {
        // From now on the topic's number of partitions says nothing any more.
        say(log, LayoutRecord::Open { generation: Generation(0), first: 0, count: layout.count() }).await?;
    }
    let first = layout.end();
    let total = first.checked_add(count).context("there are too many partitions")?;
    bar.set_message(format!("making partitions {first} to {}", total - 1));
    if inbox_partitions(options).await? < usize::from(total) {
        kafka::grow_inbox(options, total).await?;
    }
    wait_for("the brokers to show the new partitions", SEEN_WITHIN, async || Ok(inbox_partitions(options).await? >= usize::from(total)))
        .await?;
    bar.set_message("waiting for the projectors to share them out");
    let watch = GroupWatch::new(options, &[(Topic::Inbox, GROUP)])?;
    let owned = wait_for("the projectors", OWNED_WITHIN, async || {
        let group = watch.group().await?;
        let owned = group.members.iter().flat_map(|member| &member.partitions);
        let new = owned.filter(|tp| tp.topic == Topic::Inbox && tp.partition.0 >= first && tp.partition.0 < total).count();
        Ok(group.members.is_empty() || new == usize::from(count))
    });
    if let Err(error) = owned.await {
        tracing::warn!(%error, "they are opened all the same; what is sent to them is delivered once a projector has them");
    }
    watch.end().await;
    bar.set_message("opening them");
    let generation = Generation(layout.newest().0 + 1);
    say(log, LayoutRecord::Open { generation, first, count }).await?;
    wait_for("the new layout to be seen", SEEN_WITHIN, async || Ok(log.layout().newest() >= generation)).await?;
    if log.layout().count() != count {
        bail!("somebody else changed the partitions to {} at the same time", log.layout().count());
    }
    Ok(())
}

async fn inbox_partitions(options: &KafkaOptions) -> anyhow::Result<usize> {
    let cluster = kafka::describe_topics(options).await?;
    let inbox = cluster.topics.iter().find(|topic| topic.topic == Topic::Inbox).context("topic inbox is missing")?;
    if inbox.leaderless > 0 { Ok(0) } else { Ok(inbox.partitions) }
}

async fn say(log: &KafkaLog, record: LayoutRecord) -> anyhow::Result<()> {
    log.append(layout::TOPIC, record.encode()).await.context("topic layout can't be written; call it again")?;
    Ok(())
}

async fn wait_for(what: &str, patience: Duration, mut is: impl AsyncFnMut() -> anyhow::Result<bool>) -> anyhow::Result<()> {
    let until = Instant::now() + patience;
    while !is().await? {
        if Instant::now() > until {
            bail!("{what} took more than {} s; call it again", patience.as_secs());
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

fn report(log: &KafkaLog, drained: Option<Duration>, changed: bool) -> Report {
    let layout = log.layout();
    let first = layout.end() - layout.count();
    let topic_partitions = log.partitions(Topic::Inbox);
    let retired = (0..first).filter(|number| layout.is_drained(Partition(*number))).count() as u16;
    Report {
        changed,
        generation: layout.newest().0,
        partitions: layout.count(),
        first,
        topic_partitions,
        retired,
        drain_ms: drained.map(|time| time.as_millis() as u64),
    }
}
