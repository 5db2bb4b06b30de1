//! `sealpost token`: signs a development token.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;

use crate::auth::dev::DevRealm;
use crate::clock::{Clock as _, SystemClock};
use crate::ids::Identity;

/// Prints a realm token for a broker that runs in development mode on this machine.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Whose token: a user of `socialink`, `vignette` or `local`, for example alice@socialink.
    identity: String,
    /// The broker's data folder; its development key signs.
    #[arg(long, env = "SEALPOST_DATA", default_value = "sealpost-data")]
    data: PathBuf,
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
    let dev = DevRealm::load(&args.data)?;
    println!("{}", dev.sign(&identity, SystemClock.now(), args.ttl.as_millis() as u64)?);
    Ok(())
}

#[cfg(test)]
mod tests {
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

    #[tokio::test]
    async fn without_a_development_key_it_is_refused() {
        let dir = tempfile::tempdir().expect("a folder");
        let args = || Args { identity: "alice@socialink".to_owned(), data: dir.path().into(), ttl: Duration::from_secs(1) };
        let error = run(args()).await.expect_err("refused").to_string();
        assert!(error.contains("development mode"), "{error}");
        DevRealm::open(dir.path(), &SystemRandom).expect("made");
        run(args()).await.expect("signs");
    }
}
