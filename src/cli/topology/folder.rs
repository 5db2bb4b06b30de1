//! The partitions of an embedded broker on this machine, asked of the broker itself while it runs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use super::scale::{LOOK, Report};
use crate::server::control::{Answer, ControlError, LayoutLook, Question, ask};

async fn layout(dir: &Path, question: Question) -> Result<LayoutLook, ControlError> {
    match ask(dir, question).await? {
        Answer::Layout(layout) => Ok(layout),
        _ => Err(ControlError::Answer),
    }
}

/// Spreads accounts over so many partitions and waits until the older ones are drained. A broker that is started again meanwhile goes
/// on by itself.
pub(super) async fn scale(dir: &Path, count: u16, wait: Duration, bar: &ProgressBar) -> anyhow::Result<Report> {
    let before = layout(dir, Question::Layout).await?;
    if before.partitions == count && before.draining == 0 {
        return Ok(report(&before, None, false));
    }
    if before.partitions != count {
        layout(dir, Question::Scale { partitions: count }).await?;
    }
    let begun = Instant::now();
    bar.set_style(ProgressStyle::with_template("{spinner} draining {bar:32} {pos} of {len} older partitions, {elapsed}")?);
    loop {
        match layout(dir, Question::Layout).await {
            Ok(now) if now.draining == 0 && now.partitions == count => return Ok(report(&now, Some(begun.elapsed()), true)),
            Ok(now) if now.partitions != count => bail!("somebody else changed the partitions to {} at the same time", now.partitions),
            Ok(now) => {
                bar.set_length(u64::from(now.retired + now.draining));
                bar.set_position(u64::from(now.retired));
            }
            Err(error) if begun.elapsed() > wait => return Err(error).context("the change ends by itself once the broker runs"),
            Err(_) => {}
        }
        if begun.elapsed() > wait {
            let seconds = wait.as_secs();
            bail!(
                "after {seconds} s older partitions are not drained (`sealpost status`). The change ends by itself; messages are accepted meanwhile"
            );
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn report(layout: &LayoutLook, drained: Option<Duration>, changed: bool) -> Report {
    Report {
        changed,
        generation: layout.generation,
        partitions: layout.partitions,
        first: layout.first,
        topic_partitions: layout.topic_partitions,
        retired: layout.retired,
        drain_ms: drained.map(|time| time.as_millis() as u64),
    }
}

/// An embedded log has its topics by itself; what can be said of it is whether a change is under way.
pub(super) async fn show(dir: &Path, json: bool) -> anyhow::Result<bool> {
    let layout = layout(dir, Question::Layout).await?;
    let clean = layout.draining == 0;
    if json {
        println!("{}", serde_json::json!({ "clean": clean, "applied": false, "inbox": layout }));
        return Ok(clean);
    }
    let last = layout.first + layout.partitions - 1;
    println!(
        "Embedded broker in {}: accounts are spread over {} partitions of inbox ({} to {last}, generation {}); {} older ones are drained, {} not yet.",
        dir.display(),
        layout.partitions,
        layout.first,
        layout.generation,
        layout.retired,
        layout.draining
    );
    println!(
        "{}",
        if clean { "Nothing differs: an embedded log has its topics by itself." } else { "A change is under way; it ends by itself." }
    );
    Ok(clean)
}
