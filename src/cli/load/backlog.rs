//! `sealpost load backlog`: messages wait for a device that is away; how fast it has them all when it returns.

use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use tokio::task::spawn_local;

use super::BacklogArgs;
use super::progress::Progress;
use super::report::{Report, grouped};
use super::traffic::{Plan, Stage, Tasks, attached, memory, stage, summary, tick};

/// Devices that fill the inbox.
const SENDERS: usize = 8;
/// Longer than the projector's coalescing window: what waits is then in the store, as after a night.
const SETTLE: Duration = Duration::from_secs(2);

/// Makes the run. Call it within a `LocalSet`.
pub(super) async fn run(args: BacklogArgs, progress: Progress) -> anyhow::Result<Report> {
    ensure!(args.pending > 0, "at least one message must wait");
    let mut plan = Plan::new(args.common.first_server()?.clone());
    plan.servers.clone_from(&args.common.server);
    plan.ca = args.common.ca()?;
    (plan.senders, plan.recipients, plan.peers) = (SENDERS, 1, 1);
    // Nobody receives while it fills.
    plan.until_delivered = false;
    (plan.total, plan.payload, plan.server_pid) = (Some(args.pending), args.payload, args.common.server_pid);
    let Stage { world, mut meter, rss_before, .. } = stage(&plan, true, &progress).await?;

    let mut tasks = Tasks(vec![spawn_local(tick(world.clone()))]);
    tasks.0.extend((0..SENDERS).map(|at| spawn_local(world.clone().drive(at))));
    attached(&world, 0..SENDERS, Duration::from_secs(60), &progress).await?;
    world.begin();
    fill(&world, args.pending, &progress).await?;
    tokio::time::sleep(SETTLE).await;
    meter.sample().await;
    let cpu_before = meter.cpu_seconds();

    let start_us = world.look();
    let began = Instant::now();
    tasks.0.push(spawn_local(world.clone().drive(SENDERS)));
    let drained_us = loop {
        let (received, queue_empty) = (world.audit.borrow().delivered, world.device(SENDERS, |device| device.session.queue_empty));
        if let Some(empty_us) = queue_empty.filter(|_| received >= args.pending) {
            break world.last_us.get().max(empty_us);
        }
        if let Some(why) = world.fault() {
            bail!(why);
        }
        if began.elapsed() > Duration::from_secs(60) {
            break world.look();
        }
        progress.say(|| format!("{} of {} received", grouped(received), grouped(args.pending)));
        // The connection's own task writes down when things came: how often we look here does not matter.
        tokio::time::sleep(Duration::from_millis(1)).await;
    };
    tokio::time::sleep(Duration::from_millis(500)).await;
    meter.sample().await;

    let mut report = summary(&plan, &world);
    report.kind = "backlog";
    report.seconds = (drained_us - start_us) as f64 / 1e6;
    report.first_ms = Some((world.first_us.get().saturating_sub(start_us)) as f64 / 1e3);
    report.drain_ms = Some((drained_us - start_us) as f64 / 1e3);
    report.delivered_per_s = Some(report.delivered as f64 / report.seconds);
    // Latency since the message was sent says nothing here: it waited on purpose.
    (report.p50_ms, report.p99_ms, report.p999_ms, report.max_ms) = (None, None, None, None);
    report.server_cpu_us_per_message = (|| Some((meter.cpu_seconds()? - cpu_before?) * 1e6 / report.delivered as f64))();
    memory(&mut report, &meter, rss_before);
    Ok(report)
}

/// Waits until everything is accepted.
async fn fill(world: &super::engine::World, pending: u64, progress: &Progress) -> anyhow::Result<()> {
    let began = Instant::now();
    loop {
        let accepted = world.audit.borrow().accepted;
        if accepted >= pending {
            return Ok(());
        }
        if let Some(why) = world.fault() {
            bail!(why);
        }
        ensure!(began.elapsed() < Duration::from_secs(300), "only {accepted} of {pending} messages were accepted within 5 minutes");
        progress.say(|| format!("{} of {} messages wait", grouped(accepted), grouped(pending)));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
