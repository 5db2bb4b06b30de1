//! `sealpost load idle`: many devices that are connected and do nothing; what each costs the server in memory.

use std::time::{Duration, Instant};

use tokio::task::spawn_local;

use super::IdleArgs;
use super::api::Api;
use super::audit::Routes;
use super::device::{Device, Session};
use super::engine::{Setup, World};
use super::keys::Keyset;
use super::meter::Meter;
use super::progress::Progress;
use super::report::Report;
use super::traffic::{Tasks, attached, memory, tick};

/// Makes the run. Call it within a `LocalSet`.
pub(super) async fn run(args: IdleArgs, progress: Progress) -> anyhow::Result<Report> {
    super::raise_file_limit(args.devices);
    let settle = super::length(args.settle)?;
    let ca = args.common.ca()?;
    let api = Api::new(args.common.first_server()?, ca.as_ref())?;
    api.ready().await?;
    let mut meter = Meter::new(&api, args.common.server_pid);
    meter.sample().await;
    let before = meter.resident_bytes();
    let keys = Keyset::generate()?;
    let devices = api
        .register_many("i", args.devices, 1, &keys, 0, |done| progress.say(|| format!("registered {done} of {} devices", args.devices)))
        .await?;
    let world = World::new(Setup {
        servers: &args.common.server,
        ca: ca.as_ref(),
        senders: &[],
        recipients: &devices,
        devices: (0..devices.len()).map(|at| Device::new(Session::new(at as u64, true, None))).collect(),
        routes: Routes { recipients: devices.len() as u64, peers: 1, devices: 1 },
        window: 1,
        payload: super::wire::STAMP_BYTES,
        rate: None,
        by_http: false,
        until_delivered: false,
        eager_acks: false,
        crypto: None,
        record: None,
    })
    .await?;
    let mut tasks = Tasks(vec![spawn_local(tick(world.clone()))]);
    let began = Instant::now();
    for (at, _) in devices.iter().enumerate() {
        tasks.0.push(spawn_local(world.clone().drive(at)));
        // In groups, so that no listener's queue overflows.
        if at % 256 == 255 {
            attached(&world, 0..at + 1, Duration::from_secs(60), &progress).await?;
        }
    }
    attached(&world, 0..devices.len(), Duration::from_secs(60), &progress).await?;
    let seconds = began.elapsed().as_secs_f64();
    let until = Instant::now() + settle;
    while Instant::now() < until {
        progress.say(|| format!("{} devices are connected, settling", devices.len()));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let still = world.attached(0..devices.len());
    anyhow::ensure!(still == devices.len(), "only {still} of {} devices stayed connected", devices.len());
    meter.sample().await;
    let mut report = Report {
        kind: "idle",
        sends_by: "websocket",
        recipients: devices.len() as u64,
        devices: devices.len() as u64,
        reconnects: world.counters.reconnects.get(),
        seconds,
        ..Report::default()
    };
    memory(&mut report, &meter, before);
    Ok(report)
}
