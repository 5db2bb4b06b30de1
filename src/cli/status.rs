//! `sealpost status`: what a cluster looks like right now, or an embedded broker on this machine.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::Context as _;
use comfy_table::{Cell, CellAlignment, Color, Table, presets};
use futures_util::TryStreamExt as _;
use serde::Serialize;

use super::cluster::{Where, WhereArgs};
use super::load::report::grouped;
use crate::config::Cql;
use crate::log::kafka::{self, Group, GroupWatch, KafkaCluster, Position};
use crate::log::{Topic, TopicPartition};
use crate::projector::groups::worker::GROUP as GROUPS;
use crate::projector::worker::GROUP;
use crate::server::{cql_options, kafka_options};
use crate::store::PendingTotals;
use crate::store::cql::CqlStore;

mod folder;

/// What projectors consume.
const CONSUMED: [(Topic, &str); 3] = [(Topic::Inbox, GROUP), (Topic::Directory, GROUP), (Topic::Groups, GROUPS)];
const PROBE: Duration = Duration::from_secs(3);
/// How long a cluster's inboxes are counted at most: there is a row for each.
const COUNT: Duration = Duration::from_secs(20);

/// What a cluster looks like: who is alive, who owns which partition, how far behind they are and whether that grows, which partitions
/// miss copies, how much is pending in all inboxes (with --cql, or where the configuration names the store). With --data: an embedded broker.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    at: WhereArgs,
    /// A process to ask whether it is ready, by its URL; repeat it for each.
    #[arg(long, value_name = "URL")]
    process: Vec<url::Url>,
    /// Seconds between the two looks from which the trend comes.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0, value_parser = seconds)]
    interval: f64,
    /// One JSON object instead of tables.
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|s| (0.1..=3600.0).contains(s)).ok_or_else(|| "from 0.1 to 3600".to_owned())
}

/// Everything that was seen; scripts depend on the names.
#[derive(Debug, Serialize)]
struct Status {
    /// Nothing below needs anybody.
    healthy: bool,
    /// What does.
    problems: Vec<String>,
    /// Brokers that are alive.
    brokers: usize,
    processes: Vec<ProcessStatus>,
    /// Kafka's word for the projectors' group.
    group: String,
    projectors: Vec<Projector>,
    topics: Vec<TopicStatus>,
    partitions: Vec<PartitionStatus>,
    /// In all inboxes together; null where no CQL store is named, or it can't be asked.
    pending: Option<Pending>,
}

#[derive(Debug, Serialize)]
pub(super) struct ProcessStatus {
    pub url: String,
    pub ready: bool,
    /// What it says, or why it can't be asked.
    pub says: String,
}

/// What is stored for devices; what is in memory for a window is not in it.
#[derive(Debug, Clone, Copy, Serialize)]
struct Pending {
    #[serde(flatten)]
    totals: PendingTotals,
    /// All inboxes were counted; else the time was up before, and it is more.
    complete: bool,
}

impl std::fmt::Display for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let PendingTotals { inboxes, waiting, items, bytes } = self.totals;
        let least = if self.complete { "" } else { "at least " };
        let [inboxes, waiting, items, bytes] = [inboxes, waiting, items, bytes].map(grouped);
        write!(f, "pending: {least}{items} items with {bytes} bytes, in {waiting} of {inboxes} inboxes")
    }
}

#[derive(Debug, Serialize)]
struct Projector {
    id: String,
    host: String,
    /// By topic.
    owns: BTreeMap<&'static str, Vec<u16>>,
}

#[derive(Debug, Serialize)]
struct TopicStatus {
    topic: &'static str,
    partitions: usize,
    copies: usize,
    under_replicated: usize,
    leaderless: usize,
    /// Records that are kept.
    records: u64,
    /// Records appended a second, between the two looks.
    appended_per_s: f64,
    /// Of all partitions together; null where no projector reads.
    lag: Option<u64>,
}

#[derive(Debug, Serialize)]
struct PartitionStatus {
    topic: &'static str,
    partition: u16,
    owner: Option<String>,
    /// Records on the log that are not committed: behind by the coalescing window at least while messages flow.
    lag: u64,
    /// Growth of the lag a second.
    lag_per_s: f64,
    trend: Trend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Trend {
    Growing,
    Steady,
    Shrinking,
}

impl Trend {
    fn of(before: u64, now: u64) -> Self {
        // What a coalescing window moves is no trend.
        let noise = before.max(now) / 10 + 1;
        match before.abs_diff(now) <= noise {
            true => Self::Steady,
            false if now > before => Self::Growing,
            false => Self::Shrinking,
        }
    }
}

fn is_consumed(topic: Topic) -> bool {
    CONSUMED.iter().any(|(consumed, _)| *consumed == topic)
}

type Positions = BTreeMap<TopicPartition, Position>;

fn status(
    cluster: &KafkaCluster,
    group: &Group,
    before: &Positions,
    now: &Positions,
    elapsed: Duration,
    processes: Vec<ProcessStatus>,
    pending: Option<Result<Pending, String>>,
) -> Status {
    let elapsed = elapsed.as_secs_f64().max(0.001);
    let owners: BTreeMap<TopicPartition, &str> =
        group.members.iter().flat_map(|member| member.partitions.iter().map(|&of| (of, member.id.as_str()))).collect();
    let mut partitions = Vec::new();
    for (of, position) in now.iter().filter(|(of, _)| is_consumed(of.topic)) {
        let (was, is) = (before.get(of).map_or(position.lag(), Position::lag), position.lag());
        partitions.push(PartitionStatus {
            topic: of.topic.name(),
            partition: of.partition.0,
            owner: owners.get(of).map(|owner| (*owner).to_owned()),
            lag: is,
            lag_per_s: (is as f64 - was as f64) / elapsed,
            trend: Trend::of(was, is),
        });
    }
    let sum = |topic: Topic, positions: &Positions, of: fn(&Position) -> u64| -> u64 {
        positions.iter().filter(|(one, _)| one.topic == topic).map(|(_, position)| of(position)).sum()
    };
    let topics: Vec<TopicStatus> = cluster
        .topics
        .iter()
        .map(|topic| {
            let appended = sum(topic.topic, now, |at| at.end.0).saturating_sub(sum(topic.topic, before, |at| at.end.0));
            TopicStatus {
                topic: topic.topic.name(),
                partitions: topic.partitions,
                copies: topic.replication,
                under_replicated: topic.under_replicated,
                leaderless: topic.leaderless,
                records: sum(topic.topic, now, Position::records),
                appended_per_s: appended as f64 / elapsed,
                lag: is_consumed(topic.topic).then(|| sum(topic.topic, now, Position::lag)),
            }
        })
        .collect();
    let projectors = group.members.iter().map(|member| {
        let mut owns: BTreeMap<&'static str, Vec<u16>> = BTreeMap::new();
        for of in &member.partitions {
            owns.entry(of.topic.name()).or_default().push(of.partition.0);
        }
        Projector { id: member.id.clone(), host: member.host.clone(), owns }
    });
    let projectors: Vec<_> = projectors.collect();
    let mut problems = problems(&topics, &partitions, &projectors, &processes);
    if let Some(Err(why)) = &pending {
        problems.push(format!("what is pending can't be counted: {why}"));
    }
    Status {
        healthy: problems.is_empty(),
        problems,
        brokers: cluster.brokers,
        processes,
        group: group.state.clone(),
        projectors,
        topics,
        partitions,
        pending: pending.and_then(Result::ok),
    }
}

fn problems(topics: &[TopicStatus], partitions: &[PartitionStatus], projectors: &[Projector], processes: &[ProcessStatus]) -> Vec<String> {
    let mut problems = Vec::new();
    for topic in Topic::ON_CLUSTER {
        match topics.iter().find(|one| one.topic == topic.name()) {
            None => problems.push(format!("the topic {} does not exist: run `sealpost topology apply`", topic.name())),
            Some(one) => {
                if one.leaderless > 0 {
                    problems
                        .push(format!("{} partitions of {} have no leader: start the brokers that hold them", one.leaderless, one.topic));
                }
                if one.under_replicated > 0 {
                    problems.push(format!("{} partitions of {} miss copies: a broker is away or behind", one.under_replicated, one.topic));
                }
            }
        }
    }
    if projectors.is_empty() {
        problems.push("no projector is alive: what is accepted waits on the log (`sealpost serve --role projector`)".to_owned());
    } else {
        let unowned = partitions.iter().filter(|one| one.owner.is_none()).count();
        if unowned > 0 {
            problems.push(format!("{unowned} partitions have no owner: a rebalance is under way, or a projector hangs"));
        }
    }
    let growing = partitions.iter().filter(|one| one.trend == Trend::Growing).count();
    if growing > 0 {
        problems.push(format!("the lag of {growing} partitions grows: look again; if it stays, add projectors or look at the store"));
    }
    problems.extend(processes.iter().filter(|one| !one.ready).map(|one| format!("{} is not ready: {}", one.url, one.says)));
    problems
}

/// Runs the command.
pub async fn run(args: Args) -> anyhow::Result<()> {
    let config = match args.at.load()? {
        Where::Cluster(config) => config,
        Where::Folder(dir) => return folder::run(&dir, Duration::from_secs_f64(args.interval), args.json).await,
    };
    let options = kafka_options(config.kafka_alone()?);
    let processes = probe(&args.process).await?;
    let cluster = kafka::describe_topics(&options).await?;
    let watch = GroupWatch::new(&options, &CONSUMED)?;
    let before = watch.positions(&cluster.topics).await?;
    let begun = std::time::Instant::now();
    tokio::time::sleep(Duration::from_secs_f64(args.interval)).await;
    let now = watch.positions(&cluster.topics).await?;
    let elapsed = begun.elapsed();
    let group = watch.group().await?;
    watch.end().await;
    let pending = match &config.cql {
        Some(cql) => Some(count_pending(cql).await.map_err(|error| format!("{error:#}"))),
        None => None,
    };
    let status = status(&cluster, &group, &before, &now, elapsed, processes, pending);
    if args.json {
        println!("{}", serde_json::to_string(&status)?);
    } else {
        print!("{}", text(&status));
    }
    Ok(())
}

/// Reads a row for each inbox, not what is in them.
async fn count_pending(cql: &Cql) -> anyhow::Result<Pending> {
    let store = CqlStore::open(cql_options(cql)).await.context("the CQL store")?;
    let (mut totals, until) = (PendingTotals::default(), tokio::time::Instant::now() + COUNT);
    let pages = store.all_inboxes();
    futures_util::pin_mut!(pages);
    loop {
        match tokio::time::timeout_at(until, pages.try_next()).await {
            Ok(Ok(Some(page))) => page.iter().for_each(|(_, inbox)| totals.add(inbox)),
            Ok(Ok(None)) => return Ok(Pending { totals, complete: true }),
            Ok(Err(error)) => return Err(error).context("the CQL store"),
            Err(_) => return Ok(Pending { totals, complete: false }),
        }
    }
}

pub(super) async fn probe(urls: &[url::Url]) -> anyhow::Result<Vec<ProcessStatus>> {
    let http = reqwest::Client::builder().no_proxy().timeout(PROBE).build()?;
    let asked = urls.iter().map(|url| async {
        let answer = match http.get(format!("{}/readyz", url.as_str().trim_end_matches('/'))).send().await {
            Ok(answer) => Ok((answer.status().is_success(), answer.text().await.unwrap_or_default())),
            Err(error) => Err(if error.is_timeout() { "it does not answer" } else { "it can't be reached" }),
        };
        let (ready, says) = match answer {
            Ok((ready, text)) => (ready, text.trim().chars().take(200).collect()),
            Err(why) => (false, why.to_owned()),
        };
        ProcessStatus { url: url.to_string(), ready, says }
    });
    Ok(futures_util::future::join_all(asked).await)
}

// --- for people ------------------------------------------------------------------------------------------------------

/// `0-3, 7`, from numbers that are sorted.
fn ranges(numbers: &[u16]) -> String {
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, to)) if *to + 1 == number => *to = number,
            _ => runs.push((number, number)),
        }
    }
    let text: Vec<String> = runs.iter().map(|(from, to)| if from == to { from.to_string() } else { format!("{from}-{to}") }).collect();
    text.join(", ")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}

fn count(number: u64) -> Cell {
    Cell::new(grouped(number)).set_alignment(CellAlignment::Right)
}

/// Nothing is good here; anything else stands out.
fn bad(number: usize) -> Cell {
    let cell = count(number as u64);
    if number == 0 { cell } else { cell.fg(Color::Red) }
}

fn text(status: &Status) -> String {
    let mut out = format!("{} Kafka broker{} alive\n", status.brokers, if status.brokers == 1 { "" } else { "s" });
    if !status.processes.is_empty() {
        let mut processes = table(&["process", "ready", "says"]);
        for one in &status.processes {
            let ready = if one.ready { Cell::new("yes").fg(Color::Green) } else { Cell::new("no").fg(Color::Red) };
            processes.add_row([Cell::new(&one.url), ready, Cell::new(&one.says)]);
        }
        out += &format!("{processes}\n");
    }
    let mut projectors = table(&["projector", "from", "owns"]);
    for one in &status.projectors {
        let owns: Vec<String> = one.owns.iter().map(|(topic, numbers)| format!("{topic} {}", ranges(numbers))).collect();
        projectors.add_row([one.id.clone(), one.host.clone(), owns.join("; ")]);
    }
    if status.projectors.is_empty() {
        projectors.add_row(["none", "", ""]);
    }
    out += &format!("{projectors}\n");
    let mut topics = table(&["topic", "partitions", "copies", "miss copies", "no leader", "records", "appended/s", "lag"]);
    for one in &status.topics {
        let lag = one.lag.map_or_else(|| Cell::new(""), count);
        let rate = Cell::new(format!("{:.1}", one.appended_per_s)).set_alignment(CellAlignment::Right);
        topics.add_row([
            Cell::new(one.topic),
            count(one.partitions as u64),
            count(one.copies as u64),
            bad(one.under_replicated),
            bad(one.leaderless),
            count(one.records),
            rate,
            lag,
        ]);
    }
    out += &format!("{topics}\n");
    out += &match &status.pending {
        Some(pending) => format!("{pending}\n"),
        None => "pending: not counted; name the CQL store with --cql\n".to_owned(),
    };
    out += &behind(&status.partitions);
    for problem in &status.problems {
        out += &format!("! {problem}\n");
    }
    if status.healthy {
        out += "Nothing needs attention.\n";
    }
    out
}

/// Partitions that are behind or nobody's, and how many are neither.
fn behind(all: &[PartitionStatus]) -> String {
    let mut out = String::new();
    let behind: Vec<_> = all.iter().filter(|one| one.lag > 0 || one.owner.is_none()).collect();
    if !behind.is_empty() {
        let mut partitions = table(&["partition", "owner", "lag", "trend", "a second"]);
        for one in &behind {
            let trend = match one.trend {
                Trend::Growing => Cell::new("growing").fg(Color::Red),
                Trend::Steady => Cell::new("steady"),
                Trend::Shrinking => Cell::new("shrinking").fg(Color::Green),
            };
            let owner = one.owner.as_ref().map_or_else(|| Cell::new("nobody").fg(Color::Red), Cell::new);
            let speed = Cell::new(format!("{:+.1}", one.lag_per_s)).set_alignment(CellAlignment::Right);
            partitions.add_row([Cell::new(format!("{} {}", one.topic, one.partition)), owner, count(one.lag), trend, speed]);
        }
        out += &format!("{partitions}\n");
    }
    let owned: BTreeSet<_> = behind.iter().map(|one| (one.topic, one.partition)).collect();
    let quiet = all.len() - owned.len();
    if quiet > 0 {
        out += &format!("{quiet} partitions are owned and have no lag.\n");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Offset, Partition};
    use crate::log::kafka::{GroupMember, KafkaTopic};

    fn inbox(partition: u16) -> TopicPartition {
        TopicPartition { topic: Topic::Inbox, partition: Partition(partition) }
    }

    fn topic(topic: Topic) -> KafkaTopic {
        let settings = BTreeMap::new();
        KafkaTopic { topic, partitions: 2, replication: 3, under_replicated: 0, leaderless: 0, overrides: settings.clone(), settings }
    }

    fn at(end: u64, committed: u64) -> Position {
        Position { earliest: Offset(0), end: Offset(end), committed: Some(Offset(committed)) }
    }

    #[test]
    fn what_needs_attention_is_said() {
        let member = |id: &str, partitions| GroupMember { id: id.to_owned(), host: "h".to_owned(), partitions };
        let mut cluster = KafkaCluster { brokers: 3, topics: Topic::ON_CLUSTER.map(topic).to_vec() };
        let mut group = Group { state: "Stable".to_owned(), members: vec![member("a", vec![inbox(0)]), member("b", vec![inbox(1)])] };
        let before: Positions = [(inbox(0), at(100, 100)), (inbox(1), at(100, 90))].into();
        let look = |cluster: &KafkaCluster, group: &Group, now: Positions, processes| {
            status(cluster, group, &before, &now, Duration::from_secs(2), processes, None)
        };
        let fine = look(&cluster, &group, [(inbox(0), at(110, 110)), (inbox(1), at(110, 100))].into(), vec![]);
        assert!(fine.healthy, "{:?}", fine.problems);
        assert_eq!((fine.topics[0].appended_per_s, fine.topics[0].lag, fine.topics[4].lag), (10.0, Some(10), None));
        assert!(text(&fine).contains("Nothing needs attention") && text(&fine).contains("inbox 1"), "{}", text(&fine));

        let behind = look(&cluster, &group, [(inbox(0), at(1100, 100)), (inbox(1), at(110, 109))].into(), vec![]);
        assert_eq!(behind.partitions.iter().map(|one| one.trend).collect::<Vec<_>>(), [Trend::Growing, Trend::Shrinking]);
        assert_eq!((behind.problems.len(), behind.partitions[0].lag_per_s), (1, 500.0));

        group.members.pop();
        cluster.topics[0].under_replicated = 2;
        cluster.topics[0].leaderless = 1;
        cluster.topics.pop();
        let process = ProcessStatus { url: "http://e/".to_owned(), ready: false, says: "draining".to_owned() };
        let bad = look(&cluster, &group, before.clone(), vec![process]);
        for part in ["miss copies", "no leader", "layout does not exist", "1 partitions have no owner", "http://e/ is not ready: draining"]
        {
            assert!(bad.problems.iter().any(|problem| problem.contains(part)), "{part} in {:?}", bad.problems);
        }
        assert!(text(&bad).contains("nobody"));
        let nobody = look(&cluster, &Group::default(), before.clone(), vec![]);
        assert!(nobody.problems.iter().any(|problem| problem.contains("no projector is alive")), "{:?}", nobody.problems);
    }

    #[test]
    fn partitions_are_told_in_ranges() {
        assert_eq!((ranges(&[]), ranges(&[4]), ranges(&[0, 1, 2, 5, 7, 8])), (String::new(), "4".to_owned(), "0-2, 5, 7-8".to_owned()));
    }

    #[test]
    fn small_differences_are_no_trend() {
        for (before, now, trend) in
            [(0, 1, Trend::Steady), (0, 2, Trend::Growing), (1000, 1050, Trend::Steady), (1000, 500, Trend::Shrinking)]
        {
            assert_eq!(Trend::of(before, now), trend, "{before} {now}");
        }
    }
}
