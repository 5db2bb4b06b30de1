//! `sealpost load bundles`: key bundles fetched at a steady rate, each with one-time keys of its own.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::ensure;
use hdrhistogram::Histogram;
use reqwest::Method;
use tokio::task::spawn_local;

use super::BundlesArgs;
use super::api::{Api, Registered};
use super::keys::Keyset;
use super::meter::{self, Meter};
use super::progress::Progress;
use super::report::{Report, grouped};
use super::traffic::memory;

/// One-time prekeys of each kind that are uploaded at once.
const BATCH: usize = crate::limits::PREKEYS_PER_UPLOAD;
/// Fetches of one device's bundle before it uploads more, so that the pool does not run dry.
const REFILL_AFTER: u64 = BATCH as u64 * 3 / 5;

struct Run {
    api: Api,
    keys: Keyset,
    targets: Vec<Registered>,
    fetched: Vec<Cell<u64>>,
    latency: RefCell<Histogram<u64>>,
    answers: Cell<u64>,
    in_flight: Cell<u64>,
    refused: RefCell<BTreeMap<String, u64>>,
}

/// Makes the run. Call it within a `LocalSet`.
pub(super) async fn run(args: BundlesArgs, progress: Progress) -> anyhow::Result<Report> {
    let length = super::length(args.seconds)?;
    ensure!(args.rate > 0.0 && args.rate <= 1e6 && args.devices > 0, "at least one device and a rate above 0");
    super::raise_file_limit(1_024);
    let api = Api::new(args.common.first_server()?, args.common.ca()?.as_ref())?;
    api.ready().await?;
    let mut meter = Meter::new(&api, args.common.server_pid);
    meter.sample().await;
    let before = meter.resident_bytes();
    let keys = Keyset::generate()?;
    let all = args.devices * 2;
    let askers =
        api.register_many("a", args.devices, 1, &keys, 0, |done| progress.say(|| format!("registered {done} of {all} devices"))).await?;
    let targets = api
        .register_many("t", args.devices, 1, &keys, BATCH, |done| {
            progress.say(|| format!("registered {} of {all} devices", args.devices + done))
        })
        .await?;
    let run = Rc::new(Run {
        api,
        keys,
        // Devices do not refill in step: all of them within a tenth of a second would measure this tool's one thread, which makes the keys.
        fetched: (0..targets.len() as u64).map(|nth| Cell::new(nth % REFILL_AFTER)).collect(),
        targets,
        latency: RefCell::new(Histogram::new_with_bounds(1, 60_000_000, 3)?),
        answers: Cell::new(0),
        in_flight: Cell::new(0),
        refused: RefCell::default(),
    });
    meter.sample().await;
    let (cpu_before, own_before) = (meter.cpu_seconds(), meter::own_cpu_seconds());
    let began = Instant::now();
    let due = |nth: u64| Duration::from_secs_f64(nth as f64 / args.rate);
    for nth in 0.. {
        if due(nth) >= length {
            break;
        }
        // Timers have milliseconds; what became due meanwhile goes out together and is counted from when it was due.
        while began.elapsed() < due(nth) {
            tokio::time::sleep(due(nth) - began.elapsed().min(due(nth))).await;
        }
        let asker = askers[nth as usize % askers.len()].clone();
        // Each asker asks for another target each time round.
        let target = (nth as usize + nth as usize / askers.len()) % run.targets.len();
        spawn_local(fetch(run.clone(), asker, target, began + due(nth)));
        progress.say(|| format!("{} bundles", grouped(run.answers.get())));
    }
    while run.in_flight.get() > 0 && began.elapsed() < length + Duration::from_secs(30) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let seconds = began.elapsed().as_secs_f64();
    let own_after = meter::own_cpu_seconds();
    meter.sample().await;
    let answers = run.answers.get();
    let by_request = |before: Option<f64>, after: Option<f64>| Some((after? - before?) * 1e6 / answers as f64).filter(|us| us.is_finite());
    let mut report = Report {
        kind: "bundles",
        sends_by: "http",
        senders: args.devices as u64,
        recipients: args.devices as u64,
        rate: Some(args.rate),
        seconds,
        delivered: answers,
        delivered_per_s: Some(answers as f64 / seconds),
        unanswered: run.in_flight.get(),
        refused: run.refused.borrow().clone(),
        server_cpu_us_per_message: by_request(cpu_before, meter.cpu_seconds()),
        client_cpu_us_per_message: by_request(own_before, own_after),
        devices: all as u64,
        ..Report::default()
    };
    report.latencies(&run.latency.borrow());
    memory(&mut report, &meter, before);
    Ok(report)
}

async fn fetch(run: Rc<Run>, asker: Registered, target: usize, due: Instant) {
    run.in_flight.set(run.in_flight.get() + 1);
    let of = &run.targets[target];
    let answer = run.api.call(Method::GET, &format!("/v1/accounts/{}/keys", of.account_id), Some(&asker.credential), None).await;
    let took = due.elapsed().as_micros() as u64;
    let refused = match answer {
        Ok(answer) if answer.status.is_success() => None,
        Ok(answer) => Some(answer.body["code"].as_str().unwrap_or("other").to_owned()),
        Err(_) => Some("connection".to_owned()),
    };
    match refused {
        None => {
            run.latency.borrow_mut().saturating_record(took.max(1));
            run.answers.set(run.answers.get() + 1);
            let fetched = &run.fetched[target];
            fetched.set(fetched.get() + 1);
            if fetched.get().is_multiple_of(REFILL_AFTER) {
                let first = BATCH as u32 + (fetched.get() / REFILL_AFTER) as u32 * BATCH as u32;
                if let Ok(keys) = run.keys.one_time(first, BATCH) {
                    let _ = run.api.put_keys(of, &keys).await;
                }
            }
        }
        Some(code) => *run.refused.borrow_mut().entry(code).or_default() += 1,
    }
    run.in_flight.set(run.in_flight.get() - 1);
}
