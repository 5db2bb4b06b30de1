//! A broker that is asked to stop moves its devices away one by one: it is not ready at once, and its streams end over time, each with the
//! reason and a time to wait that is not everybody's.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use sealpost::testing::{Broker, http};
use sealpost::wire::stream::CloseReason;

const DEVICES: usize = 24;
const DRAIN: Duration = Duration::from_secs(4);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_evenly_over_half_of_the_drain_time() -> Result<()> {
    let mut broker = Broker::start_with(|config| config.timeouts.drain_ms = DRAIN.as_millis() as u64).await?;
    let mut streams = Vec::new();
    let mut late = None;
    for n in 0..DEVICES {
        let device = broker.device(&format!("user{n}@socialink")).await?;
        let mut stream = device.connect().await?;
        stream.backlog().await?;
        streams.push(stream);
        late = Some(device);
    }
    let (url, http) = (broker.url().to_owned(), http()?);
    ensure!(http.get(format!("{url}/readyz")).send().await?.status().is_success());

    let begun = Instant::now();
    let closes = streams.into_iter().map(|mut stream| {
        tokio::spawn(async move {
            let reason = stream.closed().await?;
            let retry_ms = stream.closing.map_or(0, |closing| closing.retry_after_ms);
            anyhow::Ok((begun.elapsed(), reason, retry_ms))
        })
    });
    let closes: Vec<_> = closes.collect();
    let stopping = tokio::spawn(async move { broker.stop().await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    let ready = http.get(format!("{url}/readyz")).send().await?;
    ensure!(ready.status().as_u16() == 503 && ready.text().await?.contains("draining"), "a balancer sends nobody any more");
    if let Some(late) = late {
        ensure!(late.connect().await.is_err(), "no stream begins here any more");
    }

    let mut times = Vec::new();
    let mut waits = BTreeSet::new();
    for close in closes {
        let (at, reason, retry_ms) = close.await??;
        ensure!(reason == Some(CloseReason::Draining), "{reason:?}");
        ensure!((500..1_000).contains(&retry_ms), "told to wait {retry_ms} ms");
        waits.insert(retry_ms);
        times.push(at);
    }
    times.sort_unstable();
    println!("closed at {:?} ms", times.iter().map(Duration::as_millis).collect::<Vec<_>>());
    ensure!(waits.len() > DEVICES / 4, "not all are told the same: {waits:?}");
    // A stream each 83 ms: in no quarter of the time more than its share and what a slow machine holds up.
    for quarter in times.chunks(DEVICES / 4) {
        let took = quarter[quarter.len() - 1] - quarter[0];
        ensure!(took > DRAIN / 2 / 4 / 3, "{} streams ended within {} ms", quarter.len(), took.as_millis());
    }
    let last = times[DEVICES - 1];
    ensure!(last > DRAIN / 2 * 3 / 4 && last < DRAIN, "the last one ended after {} ms", last.as_millis());
    stopping.await?;
    Ok(())
}
