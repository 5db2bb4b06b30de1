//! A run with traffic: N senders, M recipients, closed or open loop, audited to the last message.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use reqwest::{Method, StatusCode};
use tokio::sync::Notify;
use tokio::task::spawn_local;

use super::api::{self, Api, Registered};
use super::audit::Routes;
use super::crypto::Parties;
use super::device::{Device, Session};
use super::engine::{Setup, TICK, World};
use super::keys::Keyset;
use super::meter::{self, Meter};
use super::progress::Progress;
use super::report::{Report, grouped};
use super::sending::Sending;
use super::wire::STAMP_BYTES;
use crate::client::PrivateCa;

/// A run to make.
#[derive(Clone)]
pub struct Plan {
    /// The server; several are edges of one cluster, and devices attach to them in turn.
    pub servers: Vec<url::Url>,
    /// Who vouches for it, if it speaks TLS.
    pub ca: Option<PrivateCa>,
    /// Sending devices.
    pub senders: usize,
    /// Receiving accounts.
    pub recipients: usize,
    /// Devices of each of them.
    pub devices: usize,
    /// How many recipients each sender writes to, in turn.
    pub peers: usize,
    /// In flight for each sender.
    pub window: usize,
    /// A message is in flight until its recipient has it, not only until it is accepted.
    pub until_delivered: bool,
    /// Bytes of a content.
    pub payload: usize,
    /// How long new messages are sent.
    pub length: Duration,
    /// Messages to send at most, of all senders together.
    pub total: Option<u64>,
    /// Messages a second; closed loop without.
    pub rate: Option<f64>,
    /// Send by HTTP.
    pub http: bool,
    /// Real libsignal messages.
    pub crypto: bool,
    /// How long to wait for what is in flight in the end.
    pub grace: Duration,
    /// The server's process on this machine, instead of its metrics.
    pub server_pid: Option<u32>,
    /// Ends the sending early once it is true.
    pub stop: Option<Arc<AtomicBool>>,
    /// Where each acceptance and each delivery gets a line.
    pub record: Option<PathBuf>,
}

impl Plan {
    /// What `sealpost load` does without options.
    pub fn new(server: url::Url) -> Self {
        Self {
            servers: vec![server],
            ca: None,
            senders: 64,
            recipients: 64,
            devices: 1,
            peers: 64,
            window: 64,
            until_delivered: true,
            payload: 1024,
            length: Duration::from_secs(20),
            total: None,
            rate: None,
            http: false,
            crypto: false,
            grace: Duration::from_secs(60),
            server_pid: None,
            stop: None,
            record: None,
        }
    }

    pub(super) fn check(&self) -> anyhow::Result<()> {
        if self.senders == 0 || self.recipients == 0 || self.window == 0 {
            bail!("at least one sender, one recipient and one message in flight");
        }
        if !(1..=crate::limits::DEVICES_PER_ACCOUNT).contains(&self.devices) || (self.crypto && self.devices > 1) {
            bail!("an account has 1 to {} devices, and one with --crypto", crate::limits::DEVICES_PER_ACCOUNT);
        }
        if !(STAMP_BYTES..=crate::limits::ENVELOPE_BYTES - 1_024).contains(&self.payload) {
            bail!("a payload has {STAMP_BYTES} to {} bytes", crate::limits::ENVELOPE_BYTES - 1_024);
        }
        if self.rate.is_some_and(|rate| !(rate > 0.0 && rate <= 1e7)) {
            bail!("a rate is above 0 and at most 10,000,000 a second");
        }
        Ok(())
    }

    pub(super) fn routes(&self) -> Routes {
        Routes { recipients: self.recipients as u64, peers: self.peers.clamp(1, self.recipients) as u64, devices: self.devices as u64 }
    }

    /// What each sender may send at most.
    fn quota(&self, sender: usize) -> u64 {
        let share = |total: u64| total / self.senders as u64 + u64::from((sender as u64) < total % self.senders as u64);
        self.total.map_or(u64::MAX, share)
    }
}

/// The devices of a run, registered, and their world; nothing is connected yet.
pub(super) struct Stage {
    pub world: Rc<World>,
    pub api: Api,
    pub meter: Meter,
    pub rss_before: Option<u64>,
    senders: Vec<Registered>,
}

pub(super) async fn stage(plan: &Plan, eager_acks: bool, progress: &Progress) -> anyhow::Result<Stage> {
    plan.check()?;
    let receiving = plan.recipients * plan.devices;
    super::raise_file_limit(plan.senders * if plan.http { plan.window } else { 1 } + receiving);
    let api = Api::new(plan.servers.first().context("no server")?, plan.ca.as_ref())?;
    api.ready().await?;
    let mut meter = Meter::new(&api, plan.server_pid);
    meter.sample().await;
    let rss_before = meter.resident_bytes();
    let keys = Keyset::generate()?;
    let all = plan.senders + receiving;
    let senders =
        api.register_many("s", plan.senders, 1, &keys, 0, |done| progress.say(|| format!("registered {done} of {all} devices"))).await?;
    let recipients = api
        .register_many("r", plan.recipients, plan.devices, &keys, 0, |done| {
            progress.say(|| format!("registered {} of {all} devices", plan.senders + done))
        })
        .await?;
    let crypto = match plan.crypto {
        true => {
            progress.say(|| "opening libsignal sessions".to_owned());
            Some(Parties::connect(&api, &senders, &recipients, &keys, plan.routes()).await?)
        }
        false => None,
    };
    let sending = (0..plan.senders).map(|at| Device::new(Session::new(at as u64, false, Some(Sending::new(plan.quota(at))))));
    let receiving = (0..receiving).map(|at| Device::new(Session::new(at as u64, true, None)));
    let world = World::new(Setup {
        servers: &plan.servers,
        ca: plan.ca.as_ref(),
        senders: &senders,
        recipients: &recipients,
        devices: sending.chain(receiving).collect(),
        routes: plan.routes(),
        window: plan.window as u64,
        payload: plan.payload,
        rate: plan.rate,
        by_http: plan.http,
        until_delivered: plan.until_delivered,
        eager_acks,
        crypto,
        record: plan.record.as_deref(),
    })
    .await?;
    Ok(Stage { world, api, meter, rss_before, senders })
}

/// Acknowledges what is small and repeats what is due.
pub(super) async fn tick(world: Rc<World>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        world.look();
        for at in 0..world.seats.len() {
            if world.device(at, |device| device.session.needs_tick()) {
                world.pump(at, true);
            }
        }
    }
}

/// Wakes the senders when their messages are due: from a thread of its own, since timers of the runtime have milliseconds.
async fn pace(world: Rc<World>, stop: Arc<AtomicBool>) {
    const FINEST: Duration = Duration::from_micros(200);
    let Some(first) = world.scheduled(0, 1) else { return };
    let wake = Arc::new(Notify::new());
    let lag = Duration::from_micros(world.look().saturating_sub(first));
    let begin = Instant::now().checked_sub(lag).unwrap_or_else(Instant::now);
    let interval = Duration::from_micros(world.scheduled(0, 2).unwrap_or(first).saturating_sub(first)) / world.senders as u32;
    let waker = wake.clone();
    let thread = std::thread::spawn(move || {
        let mut next = begin;
        while !stop.load(Ordering::Relaxed) {
            let now = Instant::now();
            // The first due time that is not before the finest step from now.
            let behind = now.saturating_duration_since(next).as_nanos() / interval.as_nanos().max(1);
            next += interval * u32::try_from(behind + 1).unwrap_or(u32::MAX);
            std::thread::sleep(next.saturating_duration_since(Instant::now()).max(FINEST));
            waker.notify_one();
        }
    });
    let mut nth = 0u64;
    let senders = world.senders as u64;
    while !thread.is_finished() {
        wake.notified().await;
        let now = world.look();
        while world.running() && world.scheduled(nth % senders, nth / senders + 1).is_some_and(|at| at <= now) {
            world.pump((nth % senders) as usize, false);
            nth += 1;
        }
    }
}

/// Sends one sender's messages by HTTP, up to the window at once.
async fn lanes(world: Rc<World>, api: Api, sender: Registered, at: usize) {
    loop {
        let now = world.look();
        let wait = world.device(at, |device| {
            let next = device.session.sending().map_or(1, |s| s.begun() + 1);
            world.scheduled(at as u64, next).map(|due| Duration::from_micros(due.saturating_sub(now)))
        });
        if let Some(wait) = wait.filter(|wait| !wait.is_zero() && world.running()) {
            tokio::time::sleep(wait).await;
            world.look();
        }
        let Some((number, _, kind, content)) = world.device(at, |device| device.session.claim(&world)) else {
            if !world.running() && world.now_us() > 0 && world.device(at, |device| device.session.sending().is_none_or(Sending::finished)) {
                return;
            }
            let _ = tokio::time::timeout(Duration::from_millis(20), world.room[at].notified()).await;
            continue;
        };
        let targets = world.targets(at as u64, number);
        let body = api::send_body(targets, world.routes.message_id(number), kind, &content);
        let path = format!("/v1/accounts/{}/messages", crate::ids::AccountId::from_bytes(targets[0].account));
        let (world, api, credential) = (world.clone(), api.clone(), sender.credential.clone());
        spawn_local(async move {
            let code = post(&api, &path, &credential, &body).await;
            world.look();
            world.device(at, |device| device.session.answer(&world, number, code, 0));
            world.room[at].notify_one();
        });
    }
}

/// Sends until there is an answer; its code as in `stream.proto`.
async fn post(api: &Api, path: &str, credential: &str, body: &serde_json::Value) -> u32 {
    loop {
        let pause = match api.call(Method::POST, path, Some(credential), Some(body)).await {
            Ok(answer) if answer.status.is_success() => return 0,
            Ok(answer) => match answer.status {
                StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT => answer.retry_after,
                _ => return code_number(answer.body["code"].as_str().unwrap_or_default()),
            },
            Err(_) => None,
        };
        tokio::time::sleep(pause.unwrap_or(Duration::from_millis(50))).await;
    }
}

fn code_number(name: &str) -> u32 {
    crate::wire::stream::Code::from_str_name(&name.to_ascii_uppercase()).map_or(u32::MAX, |code| code as u32)
}

fn code_name(number: u32) -> String {
    let code = i32::try_from(number).ok().and_then(|n| crate::wire::stream::Code::try_from(n).ok());
    code.map_or_else(|| format!("code_{number}"), |code| code.as_str_name().to_ascii_lowercase())
}

/// Waits until so many devices of the range are attached.
pub(super) async fn attached(world: &World, range: std::ops::Range<usize>, patience: Duration, progress: &Progress) -> anyhow::Result<()> {
    let until = Instant::now() + patience;
    loop {
        let count = world.attached(range.clone());
        if count == range.len() {
            return Ok(());
        }
        if let Some(why) = world.fault() {
            bail!(why);
        }
        if Instant::now() > until {
            bail!("only {count} of {} streams were opened within {patience:?}", range.len());
        }
        progress.say(|| format!("opened {count} of {} streams", range.len()));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Makes the run. Call it within a `LocalSet`.
pub async fn run(plan: Plan, progress: Progress) -> anyhow::Result<Report> {
    let Stage { world, api, mut meter, rss_before, senders } = stage(&plan, false, &progress).await?;
    let tasks = RefCell::new(Tasks(Vec::new()));
    let all = 0..world.seats.len();
    for at in all.clone() {
        tasks.borrow_mut().0.push(spawn_local(world.clone().drive(at)));
    }
    attached(&world, all, Duration::from_secs(60), &progress).await?;
    tasks.borrow_mut().0.push(spawn_local(tick(world.clone())));
    tasks.borrow_mut().0.push(spawn_local(world.clone().refill()));

    meter.sample().await;
    let (cpu_before, own_before, restarts_before) = (meter.cpu_seconds(), meter::own_cpu_seconds(), meter.restarts);
    let began = Instant::now();
    world.begin();
    let stop_pacing = Arc::new(AtomicBool::new(false));
    let _stop_at_end = SetOnDrop(stop_pacing.clone());
    if plan.http {
        for (at, sender) in senders.into_iter().enumerate() {
            tasks.borrow_mut().0.push(spawn_local(lanes(world.clone(), api.clone(), sender, at)));
        }
    } else if plan.rate.is_some() {
        tasks.borrow_mut().0.push(spawn_local(pace(world.clone(), stop_pacing)));
    }
    measure(&plan, &world, &mut meter, began, &progress).await?;
    let delivered = world.audit.borrow().delivered;
    let accepted = world.audit.borrow().accepted;
    let seconds = began.elapsed().as_secs_f64();
    let own_after = meter::own_cpu_seconds();
    meter.sample().await;
    let cpu_after = meter.cpu_seconds();
    world.end();
    drain(&plan, &world, &progress).await?;
    world.close_record()?;

    let mut report = summary(&plan, &world);
    let by_message =
        |before: Option<f64>, after: Option<f64>| Some((after? - before?) * 1e6 / delivered as f64).filter(|us| us.is_finite());
    report.seconds = seconds;
    report.delivered_per_s = Some(delivered as f64 / seconds);
    report.accepted_per_s = Some(accepted as f64 / seconds);
    report.server_cpu_us_per_message = by_message(cpu_before, cpu_after);
    report.client_cpu_us_per_message = by_message(own_before, own_after);
    report.server_restarts = meter.restarts - restarts_before;
    memory(&mut report, &meter, rss_before);
    Ok(report)
}

/// Aborts its tasks when the run is over, however it ends.
pub(super) struct Tasks(pub Vec<tokio::task::JoinHandle<()>>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Waits until the sending is over, and tells how it goes.
async fn measure(plan: &Plan, world: &World, meter: &mut Meter, began: Instant, progress: &Progress) -> anyhow::Result<()> {
    let mut last = (0, Instant::now());
    let mut look_again = Instant::now() + Duration::from_secs(1);
    loop {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if let Some(why) = world.fault() {
            bail!(why);
        }
        let exhausted = plan.total.is_some()
            && (0..world.senders).all(|at| world.device(at, |d| d.session.sending().is_none_or(|s| s.exhausted() && s.finished())));
        let stopped = plan.stop.as_ref().is_some_and(|stop| stop.load(Ordering::Relaxed));
        if exhausted || stopped || began.elapsed() >= plan.length {
            return Ok(());
        }
        if Instant::now() >= look_again {
            look_again += Duration::from_secs(1);
            meter.sample().await;
            let delivered = world.audit.borrow().delivered;
            let rate = (delivered - last.0) as f64 / last.1.elapsed().as_secs_f64();
            last = (delivered, Instant::now());
            progress.say(|| {
                let audit = world.audit.borrow();
                let p99 = world.latency.borrow().value_at_quantile(0.99) as f64 / 1_000.0;
                format!(
                    "{} accepted, {} delivered, {} duplicates, {}/s, p99 {p99:.1} ms, {} reconnects",
                    grouped(audit.accepted),
                    grouped(audit.delivered),
                    audit.duplicates,
                    grouped(rate as u64),
                    world.counters.reconnects.get()
                )
            });
        }
    }
}

/// Waits for what is in flight, then a little longer for what must not come: a second copy.
pub(super) async fn drain(plan: &Plan, world: &World, progress: &Progress) -> anyhow::Result<()> {
    let until = Instant::now() + plan.grace;
    loop {
        let waiting: u64 = (0..world.senders).map(|at| world.device(at, |d| d.session.sending().map_or(0, Sending::waiting))).sum();
        let missing = world.audit.borrow().missing();
        if waiting == 0 && missing == 0 {
            break;
        }
        if let Some(why) = world.fault() {
            bail!(why);
        }
        if Instant::now() > until {
            break;
        }
        progress.say(|| format!("waiting for {} answers and {} messages", grouped(waiting), grouped(missing)));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    Ok(())
}

/// What the audit and the counters say.
pub(super) fn summary(plan: &Plan, world: &World) -> Report {
    let audit = world.audit.borrow();
    let counters = &world.counters;
    let mut report = Report {
        kind: "traffic",
        sends_by: if plan.http { "http" } else { "websocket" },
        senders: plan.senders as u64,
        recipients: plan.recipients as u64,
        window: plan.window as u64,
        payload_bytes: plan.payload as u64,
        crypto: plan.crypto,
        rate: plan.rate,
        accepted: audit.accepted,
        delivered: audit.delivered,
        lost: audit.missing(),
        duplicates: audit.duplicates,
        corrupt: audit.corrupt,
        undecryptable: counters.undecryptable.get(),
        redelivered: counters.redelivered.get(),
        disorder: counters.disorder.get(),
        gaps: counters.gaps.get(),
        receipts: counters.receipts.get(),
        reconnects: counters.reconnects.get(),
        devices: (plan.senders + plan.recipients * plan.devices) as u64,
        lost_examples: audit.missing_examples(5),
        ..Report::default()
    };
    for at in 0..world.senders {
        world.device(at, |device| {
            let Some(sending) = device.session.sending() else { return };
            report.unanswered += sending.waiting();
            report.repeated += sending.repeats;
            let slowest_ms = sending.slowest_us as f64 / 1e3;
            report.accepted_max_ms = Some(report.accepted_max_ms.map_or(slowest_ms, |before| before.max(slowest_ms)));
            for (&code, &count) in &sending.refused {
                *report.refused.entry(code_name(code)).or_default() += count;
            }
        });
    }
    report.latencies(&world.latency.borrow());
    report
}

/// The server's memory at the last look, and its growth by device.
pub(super) fn memory(report: &mut Report, meter: &Meter, before: Option<u64>) {
    report.server_rss_bytes = meter.resident_bytes();
    report.server_rss_bytes_per_device = (|| {
        let grown = meter.resident_bytes()? as f64 - before? as f64;
        Some(grown / report.devices.max(1) as f64)
    })();
}

/// Runs a plan on a thread of its own: the engine's state belongs to one thread.
pub async fn on_own_thread<T, F>(make: impl FnOnce() -> F + Send + 'static) -> anyhow::Result<T>
where
    T: Send + 'static,
    F: Future<Output = anyhow::Result<T>>,
{
    let (answer, result) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("load".to_owned()).spawn(move || {
        let outcome = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(anyhow::Error::from)
            .and_then(|runtime| tokio::task::LocalSet::new().block_on(&runtime, make()));
        // Nobody waits if the caller was dropped.
        let _ = answer.send(outcome);
    });
    thread.context("no thread for the load")?;
    result.await.context("the load tool's thread ended without a result")?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_total_is_shared_out_to_the_last_message() {
        let mut plan = Plan::new("http://127.0.0.1:1".parse().unwrap());
        plan.total = Some(10_003);
        assert_eq!((0..plan.senders).map(|at| plan.quota(at)).sum::<u64>(), 10_003);
    }

    #[test]
    fn codes_have_their_public_names() {
        assert_eq!((code_name(6).as_str(), code_name(99).as_str()), ("device_mismatch", "code_99"));
        assert_eq!((code_number("inbox_full"), code_number("?")), (16, u32::MAX));
    }
}
