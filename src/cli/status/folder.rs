//! `sealpost status` of an embedded broker on this machine.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::{PartitionStatus, Pending, Trend, behind};
use crate::cli::load::report::grouped;
use crate::log::Topic;
use crate::server::control::{Answer, ControlError, LayoutLook, Look, Question, ask};

/// Who owns every partition.
const OWNER: &str = "this broker";

/// Everything that was seen; scripts depend on the names.
#[derive(Debug, Serialize)]
struct Status {
    /// Nothing below needs anybody.
    healthy: bool,
    /// What does.
    problems: Vec<String>,
    ready: bool,
    inbox: LayoutLook,
    /// Records appended a second, between the two looks.
    appended_per_s: f64,
    /// Records whose effect is not in the view on disk yet: a coalescing window's at least while messages flow.
    lag: u64,
    pending: Pending,
    partitions: Vec<PartitionStatus>,
}

fn status(before: &Look, now: Look, elapsed: Duration) -> Status {
    let elapsed = elapsed.as_secs_f64().max(0.001);
    let end = |look: &Look| look.partitions.iter().map(|one| one.end).sum::<u64>();
    let appended = end(&now).saturating_sub(end(before));
    let was = |topic: &str, partition: u16, is: u64| {
        before.partitions.iter().find(|one| one.topic == topic && one.partition == partition).map_or(is, |one| one.lag)
    };
    let partition = |one: &crate::server::control::PartitionLook| {
        let topic = Topic::ALL.into_iter().find(|topic| topic.name() == one.topic)?;
        let was = was(&one.topic, one.partition, one.lag);
        Some(PartitionStatus {
            topic: topic.name(),
            partition: one.partition,
            owner: Some(OWNER.to_owned()),
            lag: one.lag,
            lag_per_s: (one.lag as f64 - was as f64) / elapsed,
            trend: Trend::of(was, one.lag),
        })
    };
    let partitions: Vec<_> = now.partitions.iter().filter_map(partition).collect();
    let lag = now.partitions.iter().map(|one| one.lag).sum();
    let mut problems: Vec<_> = now.unready.iter().map(|why| format!("it is not ready: {why}")).collect();
    if Trend::of(before.partitions.iter().map(|one| one.lag).sum(), lag) == Trend::Growing {
        problems.push("the lag grows: look again; if it stays, the disk or the processor is too slow for the load".to_owned());
    }
    Status {
        healthy: problems.is_empty(),
        problems,
        ready: now.unready.is_none(),
        inbox: now.layout,
        appended_per_s: appended as f64 / elapsed,
        lag,
        pending: Pending { totals: now.pending, complete: true },
        partitions,
    }
}

fn text(dir: &Path, status: &Status) -> String {
    let layout = &status.inbox;
    let last = layout.first + layout.partitions - 1;
    let mut out = format!("embedded broker in {}: {}\n", dir.display(), if status.ready { "ready" } else { "not ready" });
    out += &format!(
        "accounts are spread over {} partitions of inbox ({} to {last}, generation {})",
        layout.partitions, layout.first, layout.generation
    );
    out += &format!("; older ones: {} drained, {} draining\n", layout.retired, layout.draining);
    out += &format!("{:.1} records are appended a second; the view on disk is {} behind\n", status.appended_per_s, grouped(status.lag));
    out += &format!("{}\n", status.pending);
    out += &behind(&status.partitions);
    for problem in &status.problems {
        out += &format!("! {problem}\n");
    }
    if status.healthy {
        out += "Nothing needs attention.\n";
    }
    out
}

async fn look(dir: &Path) -> Result<Look, ControlError> {
    match ask(dir, Question::Look).await? {
        Answer::Look(look) => Ok(look),
        _ => Err(ControlError::Answer),
    }
}

/// Asks twice, so that trends can be told.
pub(super) async fn run(dir: &Path, interval: Duration, json: bool) -> anyhow::Result<()> {
    let before = look(dir).await?;
    let begun = std::time::Instant::now();
    tokio::time::sleep(interval).await;
    let now = look(dir).await?;
    let status = status(&before, now, begun.elapsed());
    if json {
        println!("{}", serde_json::to_string(&status)?);
    } else {
        print!("{}", text(dir, &status));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::control::PartitionLook;
    use crate::store::PendingTotals;

    #[test]
    fn what_needs_attention_is_said() {
        let layout = LayoutLook { generation: 1, partitions: 64, first: 16, topic_partitions: 80, retired: 15, draining: 1 };
        let pending = PendingTotals { inboxes: 9, waiting: 2, items: 1_234, bytes: 5_000_000 };
        let look = |end: u64, lag: u64, unready: Option<&str>| Look {
            unready: unready.map(str::to_owned),
            layout,
            partitions: vec![PartitionLook { topic: "inbox".to_owned(), partition: 16, end, lag }],
            pending,
        };
        let fine = status(&look(100, 3, None), look(120, 2, None), Duration::from_secs(2));
        assert!(fine.healthy && fine.ready && fine.lag == 2, "{fine:?}");
        assert!((fine.appended_per_s - 10.0).abs() < 0.001);
        let said = text(Path::new("data"), &fine);
        for part in
            ["64 partitions of inbox (16 to 79, generation 1)", "15 drained, 1 draining", "1,234 items", "2 of 9 inboxes", "Nothing needs"]
        {
            assert!(said.contains(part), "{part} in {said}");
        }
        let json = serde_json::to_value(&fine).expect("JSON");
        assert_eq!(
            (&json["pending"]["items"], &json["pending"]["bytes"], &json["pending"]["complete"]),
            (&1_234.into(), &5_000_000.into(), &true.into())
        );
        let bad = status(&look(100, 3, None), look(900, 800, Some("draining")), Duration::from_secs(2));
        assert!(bad.problems.len() == 2 && !bad.healthy && bad.partitions[0].trend == Trend::Growing, "{bad:?}");
    }
}
