//! `sealpost metadata`: what analysts may know, as it is written.

use std::io::Write as _;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};

use super::broker::BrokerArgs;
use super::chat::text;
use crate::clock::SystemClock;
use crate::config::Kafka;
use crate::log::embedded::LogObserver;
use crate::log::kafka::KafkaLog;
use crate::log::{EventLog, Topic};
use crate::metadata::hex;
use crate::metadata::record::Line;
use crate::metadata::tail::{From, Tail};
use crate::server::kafka_options;
use crate::wire::metadata::{MetadataKind as Kind, MetadataRecord};

/// How often a log is asked for more.
const POLL: Duration = Duration::from_millis(200);
/// Segment files of an embedded log that are looked at where the newest records are enough.
const NEWEST_SEGMENTS: usize = 4;

/// Shows topic `metadata`: one record for each step of a message, accounts as pseudonyms, no content.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Tail(TailArgs),
}

/// Prints the topic's newest records. A broker's folder may be in use meanwhile: nothing in it is locked or changed.
#[derive(Debug, clap::Args)]
struct TailArgs {
    #[command(flatten)]
    broker: BrokerArgs,
    /// The Kafka brokers of a cluster: host:port, several with commas [default: kafka.brokers of the configuration; without it the folder].
    #[arg(long)]
    kafka: Option<String>,
    /// One JSON object a line; names and units are those of schemas/metadata.proto, bytes in hexadecimal digits. Drop repeated event ids.
    #[arg(long)]
    json: bool,
    /// Begin with the oldest record that is there. Else with the newest ones.
    #[arg(long)]
    from_start: bool,
    /// How many of the newest.
    #[arg(long, short = 'n', default_value_t = 20, conflicts_with = "from_start")]
    lines: u32,
    /// Wait for more, until Ctrl-C.
    #[arg(long, short = 'f')]
    follow: bool,
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Tail(args) => {
            let log = args.log().await?;
            args.tail(log).await
        }
    }
}

impl TailArgs {
    async fn log(&self) -> anyhow::Result<Arc<dyn EventLog>> {
        let config = self.broker.read()?;
        let kafka = match (self.kafka.clone(), config.kafka) {
            (Some(brokers), Some(kafka)) => Some(Kafka { brokers, ..kafka }),
            (Some(brokers), None) => Some(Kafka::on(brokers)),
            (None, kafka) => kafka,
        };
        if let Some(kafka) = kafka {
            return Ok(KafkaLog::open(kafka_options(&kafka)).await?);
        }
        let dir = config.data.join("log");
        if !dir.exists() {
            bail!("{} holds no log; name the broker's folder with --data, or a cluster with --kafka", config.data.display());
        }
        let newest = (!self.from_start).then_some(NEWEST_SEGMENTS);
        let opened = tokio::task::spawn_blocking(move || LogObserver::open(&dir, Topic::Metadata, newest, Arc::new(SystemClock)));
        Ok(Arc::new(opened.await?.context("the log can't be looked at")?))
    }

    async fn tail(&self, log: Arc<dyn EventLog>) -> anyhow::Result<()> {
        let from = if self.from_start { From::Start } else { From::Last(u64::from(self.lines)) };
        let mut tail = Tail::open(log, from).await?;
        if self.from_start {
            while self.print(&tail.read().await?)? {}
        } else {
            let mut newest = Vec::new();
            loop {
                let more = tail.read().await?;
                if more.is_empty() {
                    break;
                }
                newest.extend(more);
            }
            newest.sort_by_key(|record| record.time_ms);
            self.print(&newest[newest.len().saturating_sub(self.lines as usize)..])?;
        }
        if !self.follow {
            return Ok(());
        }
        let mut missed = 0;
        loop {
            if !self.print(&tail.read().await?)? {
                tokio::time::sleep(POLL).await;
            }
            if std::mem::replace(&mut missed, tail.missed) != tail.missed {
                eprintln!("sealpost: {missed} log records were removed before they were read");
            }
        }
    }

    /// Whether there was anything.
    fn print(&self, records: &[MetadataRecord]) -> anyhow::Result<bool> {
        let mut out = std::io::BufWriter::new(std::io::stdout().lock());
        for record in records {
            if self.json {
                serde_json::to_writer(&mut out, &Line::from(record))?;
                out.write_all(b"\n")?;
            } else {
                writeln!(out, "{}", pretty(record))?;
            }
        }
        out.flush()?;
        Ok(!records.is_empty())
    }
}

/// One line for people. Pseudonyms are cut to what tells them apart.
fn pretty(record: &MetadataRecord) -> String {
    let line = Line::from(record);
    let short = |id: &[u8], device: u32| {
        let id = hex(&id[..id.len().min(4)]);
        if device == 0 { id } else { format!("{id}.{device}") }
    };
    let account = short(&record.account, record.device);
    let mut out = format!("{}  {:<17} ", time(record.time_ms), line.kind.replace('_', " "));
    if !record.group.is_empty() {
        out += &format!("{account:<12} → {:<12} {:>7} B", short(&record.group, 0), record.size_bucket);
    } else if record.sender.is_empty() {
        out += &account;
    } else {
        out += &format!("{:<12} → {account:<12} {:>7} B", short(&record.sender, record.sender_device), record.size_bucket);
    }
    match record.kind() {
        Kind::Accepted => out += &format!("  {} device{}", record.devices, if record.devices == 1 { "" } else { "s" }),
        Kind::Delivered => out += &format!("  after {} ms", record.latency_ms),
        _ => {}
    }
    for (flag, name) in [(record.urgent, "  urgent"), (record.ephemeral, "  ephemeral")] {
        out += if flag { name } else { "" };
    }
    out
}

/// As in RFC 3339, UTC.
fn time(ms: u64) -> String {
    let (hour, minute, second, rest) = (ms / 3_600_000 % 24, ms / 60_000 % 60, ms / 1_000 % 60, ms % 1_000);
    format!("{}T{hour:02}:{minute:02}:{second:02}.{rest:03}Z", text::day(ms))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        for (ms, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (1_700_000_000_123, "2023-11-14T22:13:20.123Z"),
            (4_107_542_399_999, "2100-02-28T23:59:59.999Z"),
        ] {
            assert_eq!(time(ms), expected);
        }
    }

    #[test]
    fn people_see_who_what_and_when() {
        let record = MetadataRecord {
            kind: Kind::Delivered as i32,
            time_ms: 1_700_000_000_123,
            account: vec![0xab; 16].into(),
            device: 2,
            sender: vec![0xcd; 16].into(),
            sender_device: 1,
            size_bucket: 320,
            latency_ms: 17,
            urgent: true,
            ..MetadataRecord::default()
        };
        assert_eq!(
            pretty(&record),
            "2023-11-14T22:13:20.123Z  delivered         cdcdcdcd.1   → abababab.2       320 B  after 17 ms  urgent"
        );
        let written = MetadataRecord {
            kind: Kind::GroupMessage as i32,
            sender: bytes::Bytes::new(),
            group: vec![0xef; 16].into(),
            urgent: false,
            ..record.clone()
        };
        assert_eq!(pretty(&written), "2023-11-14T22:13:20.123Z  group message     abababab.2   → efefefef         320 B");
        let revoked = MetadataRecord { kind: Kind::DeviceRevoked as i32, sender: bytes::Bytes::new(), ..record };
        assert_eq!(pretty(&revoked), "2023-11-14T22:13:20.123Z  device revoked    abababab.2  urgent");
    }
}
