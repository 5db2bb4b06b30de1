//! `sealpost token`: signs a development token.

use std::time::Duration;

use anyhow::{Context as _, bail};

use super::broker::BrokerArgs;
use crate::auth::dev::DevRealm;
use crate::clock::{Clock as _, SystemClock};
use crate::ids::Identity;

/// Prints a realm token for a broker that runs in development mode on this machine. Refused where `serve` with the same
/// configuration would not run in development mode.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose token: a user of `socialink`, `vignette` or `local`, for example alice@socialink.
    identity: String,
    /// Which broker; its development key signs.
    #[command(flatten)]
    broker: BrokerArgs,
    /// The broker runs with --dev.
    #[arg(long)]
    dev: bool,
    /// How long the token is valid: a number and s, m, h or d.
    #[arg(long, default_value = "1h", value_parser = parse_ttl)]
    ttl: Duration,
}

fn parse_ttl(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text} is not a time; write for example 90s, 15m, 1h or 7d");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let number: u64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let total = number.checked_mul(seconds).filter(|total| (1..=366 * 86_400).contains(total));
    total.map(Duration::from_secs).ok_or_else(|| "a token is valid from one second to 366 days".to_owned())
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let identity: Identity = args.identity.parse().with_context(|| format!("{} is not an identity", args.identity))?;
    let config = args.broker.load(|config| {
        if args.dev {
            config.dev = Some(true);
        }
    })?;
    if !config.dev_mode() {
        bail!(
            "development mode is off in this configuration: tokens come from the realms' identity providers. A broker that was started \
             with `sealpost serve --dev` takes `sealpost token --dev`"
        );
    }
    let dev = DevRealm::load(&config.data)?;
    println!("{}", dev.sign(&identity, SystemClock.now(), args.ttl.as_millis() as u64)?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::clock::SystemRandom;

    #[test]
    fn times_are_read() {
        assert_eq!(parse_ttl("90s"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_ttl("7d"), Ok(Duration::from_secs(7 * 86_400)));
        for bad in ["", "h", "1", "1y", "0s", "-1h", "367d", "99999999999999999999d", "1é"] {
            assert!(parse_ttl(bad).is_err(), "{bad}");
        }
    }

    #[derive(Debug, clap::Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    async fn token(more: &[&str]) -> anyhow::Result<()> {
        run(Cli::parse_from([&["token", "alice@socialink"], more].concat()).args).await
    }

    #[tokio::test]
    async fn without_development_mode_it_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let data = dir.path().to_str().expect("text");
        let off = |outcome: anyhow::Result<()>| outcome.expect_err("refused").to_string().contains("development mode");
        assert!(off(token(&["--data", data]).await), "the broker never ran");
        DevRealm::open(dir.path(), &SystemRandom).expect("made");
        token(&["--data", data]).await.expect("signs");
        // The key is there, but the next `serve` with this configuration would take no such token.
        let file = dir.path().join("sealpost.toml");
        let realms = "[[realms]]\nname = \"r\"\nissuer = \"i\"\naudience = \"a\"\njwks_file = \"keys.json\"\n";
        for text in [realms, "dev = false\n"] {
            std::fs::write(&file, text).expect("writes");
            let with = ["--data", data, "--config", file.to_str().expect("text")];
            assert!(off(token(&with).await), "{text}");
            token(&[&with[..], &["--dev"]].concat()).await.expect("as `serve --dev`");
        }
    }
}
