//! `sealpost probe`: one question to one process.

use anyhow::bail;

use super::status::probe;

/// Asks a process whether it is ready, and fails if it is not: the health check of containers, which have no other HTTP client.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The process, by its URL.
    #[arg(default_value = "http://127.0.0.1:8470")]
    url: url::Url,
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    match probe(&[args.url]).await?.as_slice() {
        [one] if one.ready => Ok(()),
        [one] => bail!("{} is not ready: {}", one.url, one.says),
        _ => bail!("nothing was asked"),
    }
}
