//! `sealpost rebuild`: drops the view and makes it anew from the log.

use anyhow::Context as _;

use super::broker::BrokerArgs;
use crate::server;

/// Drops the store's view and replays the log into it. The broker must be stopped. One-time prekeys and at-rest keys are state, not
/// view: they stay.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    broker: BrokerArgs,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    // Nobody can connect while it runs, so an address that `serve` takes only with --dev is no reason to refuse.
    let config = args.broker.load(|config| config.listen = ([127, 0, 0, 1], 0).into())?;
    let bar = indicatif::ProgressBar::new_spinner();
    bar.enable_steady_tick(std::time::Duration::from_millis(100));
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
