//! `sealpost rebuild`: drops the view and makes it anew from the log.

use std::path::PathBuf;

use anyhow::Context as _;

use crate::config::Config;
use crate::server;

/// Drops the store's view and replays the log into it. The broker must be stopped. One-time prekeys and at-rest keys are state, not
/// view: they stay.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Configuration file (TOML).
    #[arg(long, env = "SEALPOST_CONFIG")]
    config: Option<PathBuf>,
    /// The broker's data folder [default: sealpost-data].
    #[arg(long)]
    data: Option<PathBuf>,
    /// One JSON object instead of text.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let mut config = Config::load(args.config.as_deref(), std::env::vars())?;
    if let Some(data) = args.data {
        config.data = data;
    }
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
