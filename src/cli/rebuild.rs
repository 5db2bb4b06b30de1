//! `sealpost rebuild`: the view made anew from the log.

use std::time::Duration;

use anyhow::Context as _;

use super::broker::BrokerArgs;
use super::cluster::{ClusterArgs, ToolArgs};
use crate::server::{self, Comparison};

/// Records that a fresh view may lack when it is compared: what a running service adds in a moment.
const NEARLY: u64 = 1_000;

/// Makes the view of what is pending anew from the log. On one machine: drops the store's view and replays the log into it; the broker must
/// be stopped. On a cluster: fills a fresh keyspace beside the live one while the service runs, and compares the two (exit code 1 if they
/// differ); see docs/operations.md for the switch. One-time prekeys and at-rest keys are state, not view: they stay.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(flatten)]
    broker: BrokerArgs,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// On a cluster: the keyspace to fill. It is made if it is missing, and gone on with if it was begun.
    #[arg(long, value_name = "KEYSPACE")]
    into: Option<String>,
    /// Keep following the log afterwards, until this is stopped or projectors keep the keyspace themselves.
    #[arg(long, requires = "into")]
    follow: bool,
    /// Do not compare in the end.
    #[arg(long, requires = "into")]
    no_compare: bool,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    Compare(CompareArgs),
}

/// Compares the live keyspace of a cluster with another one, while both are written; exit code 1 if they differ.
#[derive(Debug, clap::Args)]
struct CompareArgs {
    #[command(flatten)]
    tool: ToolArgs,
    /// The other keyspace.
    #[arg(long, value_name = "KEYSPACE")]
    with: String,
    /// How long rows that do not agree at once are looked at again, in seconds.
    #[arg(long, default_value_t = 30)]
    patience: u64,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    if let Some(Command::Compare(args)) = args.command {
        let config = args.tool.load()?;
        let compared = server::compare_views(&config, &args.with, Duration::from_secs(args.patience)).await?;
        return verdict(&compared, args.json);
    }
    match &args.into {
        Some(keyspace) => into(keyspace.clone(), args).await,
        None => in_place(args).await,
    }
}

fn spinner() -> indicatif::ProgressBar {
    let bar = indicatif::ProgressBar::new_spinner();
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

async fn in_place(args: Args) -> anyhow::Result<()> {
    let cluster = args.cluster;
    // Nobody can connect while it runs, so an address that `serve` takes only with --dev is no reason to refuse.
    let config = args.broker.load(|config| {
        config.listen = ([127, 0, 0, 1], 0).into();
        cluster.set(config);
    })?;
    let bar = spinner();
    let progress = bar.clone();
    let done = server::rebuild(&config, move |applied| progress.set_message(format!("{applied} records applied")))
        .await
        .context("the view can't be rebuilt")?;
    bar.finish_and_clear();
    if args.json {
        println!("{}", serde_json::json!({ "records": done.records, "seconds": done.elapsed.as_secs_f64() }));
    } else {
        println!(
            "The view was rebuilt from {} records in {:.1} s. Start the broker again with `sealpost serve`.",
            done.records,
            done.elapsed.as_secs_f64()
        );
    }
    Ok(())
}

async fn into(keyspace: String, args: Args) -> anyhow::Result<()> {
    let started = std::time::Instant::now();
    let mut config = args.broker.read()?;
    args.cluster.set(&mut config);
    let bar = spinner();
    let mut fresh = server::Fresh::start(&config, &keyspace).await.context("the view can't be rebuilt")?;
    let show =
        |progress: server::FreshProgress| bar.set_message(format!("{} records applied, {} to go", progress.applied, progress.behind));
    let done = fresh.catch_up(NEARLY, show).await.context("the view can't be rebuilt")?;
    let compared = if args.no_compare {
        None
    } else {
        bar.set_message("comparing");
        let (log, live, other) = fresh.parts();
        Some(server::compare(log.as_ref(), live, other, Duration::from_secs(30)).await?)
    };
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    if args.json {
        let line = serde_json::json!({ "keyspace": keyspace, "records": done.applied, "seconds": seconds });
        println!("{line}");
    } else {
        println!("The keyspace {keyspace} was filled from {} records in {seconds:.1} s.", done.applied);
    }
    let judged = compared.as_ref().map_or(Ok(()), |compared| verdict(compared, args.json));
    if args.follow && judged.is_ok() {
        if !args.json {
            println!(
                "It is kept up to date until this is stopped (Ctrl-C), or projectors with cql.mirror_keyspace = \"{keyspace}\" do it."
            );
        }
        fresh.follow(async { drop(super::serve::stop_signal().await) }, |_| ()).await?;
    }
    fresh.end().await?;
    judged
}

/// Prints the comparison; an error if the views differ.
fn verdict(compared: &Comparison, json: bool) -> anyhow::Result<()> {
    let different = compared.different();
    if json {
        let kind = |(name, tally): (&&str, &server::Tally)| {
            let tally = serde_json::json!({
                "equal": tally.equal, "different": tally.different, "undecided": tally.undecided, "forgotten": tally.forgotten,
            });
            ((*name).to_owned(), tally)
        };
        let kinds: serde_json::Map<_, _> = compared.kinds.iter().map(kind).collect();
        println!("{}", serde_json::json!({ "different": different, "behind": compared.behind, "kinds": kinds, "named": compared.named }));
    } else {
        println!("{:<12} {:>12} {:>12} {:>12} {:>12}", "", "equal", "different", "undecided", "forgotten");
        for (name, tally) in &compared.kinds {
            println!("{name:<12} {:>12} {:>12} {:>12} {:>12}", tally.equal, tally.different, tally.undecided, tally.forgotten);
        }
        compared.named.iter().for_each(|name| println!("differs: {name}"));
        println!("The other keyspace is {} records behind the live one.", compared.behind);
    }
    anyhow::ensure!(different == 0, "{different} rows differ");
    Ok(())
}
