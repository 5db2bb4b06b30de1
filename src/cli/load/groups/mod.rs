//! `sealpost load groups`: groups of real MLS leaves, what a message costs that many get, and how long a change of a large group takes.
//!
//! Every member is a leaf of its own with its own keys, since the broker checks all of it. What is shared: one KeyPackage each, one commit
//! that adds all, and only `--readers` members keep the group's keys and decrypt; the others follow it and count. With `--opaque` nobody
//! decrypts, and messages only look like MLS: that measures the fan-out alone.

mod feed;
mod member;

use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use clap::Args;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use hdrhistogram::Histogram;
use reqwest::{Method, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::task::spawn_local;

use self::feed::{Hall, Setup};
use self::member::Member;
use super::Common;
use super::api::{Answer, Api, Registered};
use super::keys::Keyset;
use super::meter::Meter;
use super::progress::Progress;
use super::traffic::Tasks;
use super::wire::STAMP_BYTES;
use crate::ids::{AccountId, DeviceAddr, DeviceId, GroupId};
use crate::limits;

/// KeyPackages that are published at once.
const PUBLISHED_AT_ONCE: usize = 32;
/// How long the followers may take to be there.
const ATTACHING: Duration = Duration::from_secs(120);
/// How often what waits is looked at.
const TICK: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Args)]
pub(super) struct GroupsArgs {
    #[command(flatten)]
    common: Common,
    /// Members of each group, each an account with one device
    #[arg(long, default_value_t = 1_500)]
    members: usize,
    /// Of these, how many hold a stream [default: all, at most 1,500]
    #[arg(long)]
    online: Option<usize>,
    /// Groups
    #[arg(long, default_value_t = 1)]
    groups: usize,
    /// Messages a second, over all groups
    #[arg(long, default_value_t = 20.0)]
    rate: f64,
    /// How long to send
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Bytes of each message before encryption
    #[arg(long, default_value_t = 1024)]
    payload: usize,
    /// Seconds between two changes (new keys of the owner) of each group; 0: none
    #[arg(long, default_value_t = 2.0)]
    change_every: f64,
    /// Members of each group that keep its keys, write and decrypt
    #[arg(long, default_value_t = 4)]
    readers: usize,
    /// Messages that nobody decrypts, written by all who are online
    #[arg(long)]
    opaque: bool,
    /// How many seconds to wait in the end for what is under way
    #[arg(long, default_value_t = 60.0)]
    grace: f64,
}

/// What a run found: one JSON object. Scripts depend on the names.
#[derive(Debug, Default, Serialize)]
pub(super) struct GroupsReport {
    kind: &'static str,
    opaque: bool,
    members: usize,
    online: usize,
    groups: usize,
    readers: usize,
    payload_bytes: usize,
    rate: f64,
    seconds: f64,
    /// From the founder alone to all members in: the slowest group.
    create_ms: f64,
    /// Of that, how long the commit that added all took at the server.
    invite_server_ms: f64,
    /// Changes made.
    ops: u64,
    /// Changes that another one came before.
    op_conflicts: u64,
    op_server_p50_ms: f64,
    op_server_p99_ms: f64,
    op_seen_p99_ms: f64,
    sent: u64,
    accepted: u64,
    refused: u64,
    repeated: u64,
    unanswered: u64,
    messages_per_s: f64,
    deliveries: u64,
    deliveries_per_s: f64,
    latency_p50_ms: f64,
    latency_p99_ms: f64,
    latency_max_ms: f64,
    /// Items of a group that a member did not have in the end.
    lost: u64,
    /// Items that a member had twice.
    duplicates: u64,
    /// Readers whose keys are not those of the others at the same epoch.
    forks: u64,
    decrypted: u64,
    undecryptable: u64,
    /// Items that were fetched since the stream did not carry them.
    fetched: u64,
    reconnects: u64,
    server_rss_bytes: Option<u64>,
    server_cpu_seconds: Option<f64>,
    tool_cpu_seconds: Option<f64>,
}

impl GroupsReport {
    /// Whether everybody had everything once.
    pub(super) fn clean(&self) -> bool {
        self.lost == 0 && self.duplicates == 0 && self.forks == 0 && self.undecryptable == 0 && self.unanswered == 0
    }

    /// One object, as a line or for a person to read.
    pub(super) fn print(&self, json: bool) -> anyhow::Result<()> {
        println!("{}", if json { serde_json::to_string(self)? } else { serde_json::to_string_pretty(self)? });
        Ok(())
    }

    /// What is not clean.
    pub(super) fn findings(&self) -> String {
        format!(
            "{} lost, {} duplicates, {} forks, {} undecryptable, {} unanswered",
            self.lost, self.duplicates, self.forks, self.undecryptable, self.unanswered
        )
    }
}

impl GroupsArgs {
    /// Whether one JSON object is wanted.
    pub(super) fn json(&self) -> bool {
        self.common.json
    }

    fn check(&self) -> anyhow::Result<()> {
        ensure!((1..=limits::GROUP_ACCOUNTS).contains(&self.members), "a group has 1 to {} members", limits::GROUP_ACCOUNTS);
        ensure!(self.groups > 0 && self.rate.is_finite() && self.rate > 0.0, "there must be a group, and a rate above 0");
        ensure!(
            (STAMP_BYTES..limits::ENVELOPE_BYTES - 1_024).contains(&self.payload),
            "a message has {STAMP_BYTES} bytes or more, and fits"
        );
        ensure!(self.online.is_none_or(|online| (1..=self.members).contains(&online)), "1 to all members are online");
        Ok(())
    }
}

fn address(registered: &Registered) -> anyhow::Result<DeviceAddr> {
    Ok(DeviceAddr { account: AccountId::from_bytes(registered.target.account), device: DeviceId::new(registered.target.device)? })
}

fn base64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn unbase64(value: &Value) -> anyhow::Result<Vec<u8>> {
    Ok(STANDARD.decode(value.as_str().context("no bytes where there should be some")?)?)
}

fn number(body: &Value, field: &str) -> anyhow::Result<u64> {
    body[field].as_u64().with_context(|| format!("no {field} in the answer"))
}

/// A group that was made.
struct Made {
    id: GroupId,
    epoch: u64,
    seq: u64,
    registered: Vec<Registered>,
    /// The founder and those who read, the founder first; the others' keys are not needed any more.
    readers: Vec<Member>,
    took: Duration,
    invite: Duration,
}

async fn make(api: &Api, args: &GroupsArgs, name: &str, keys: &Keyset, progress: &Progress) -> anyhow::Result<Made> {
    let say = |done| progress.say(|| format!("group {name}: {done} of {} members registered", args.members));
    let registered = api.register_many(&format!("g{name}-"), args.members, 1, keys, 0, say).await?;
    let mut members = registered.iter().map(|one| address(one).map(Member::new)).collect::<anyhow::Result<Vec<Member>>>()?;
    let mut packages = Vec::with_capacity(members.len());
    for member in &mut members[1..] {
        packages.push(member.key_package()?);
        progress.say(|| format!("group {name}: {} of {} KeyPackages", packages.len(), args.members));
        tokio::task::yield_now().await;
    }
    let uploads = registered[1..].iter().zip(&packages).map(|(one, package)| async move {
        let body = json!({ "key_packages": [{ "id": 1, "key_package": base64(package) }] });
        api.insist(Method::PUT, "/v1/key-packages", Some(&one.credential), Some(&body)).await
    });
    stream::iter(uploads).buffer_unordered(PUBLISHED_AT_ONCE).try_for_each(|_| async { Ok(()) }).await?;

    progress.say(|| format!("group {name}: being created"));
    let founder = &registered[0];
    let credential = Some(founder.credential.as_str());
    let mut bytes = [0; 16];
    crate::clock::Random::fill(&crate::clock::SystemRandom, &mut bytes);
    let id = GroupId::from_bytes(bytes);
    let begun = Instant::now();
    let created = members[0].create(id)?;
    let body = json!({ "group_info": base64(&created.group_info), "tree": base64(&created.tree) });
    let answer = api.insist(Method::POST, "/v1/groups", credential, Some(&body)).await?;
    let mut made = Made {
        id,
        epoch: number(&answer, "epoch")?,
        seq: number(&answer, "seq")?,
        registered: Vec::new(),
        readers: Vec::new(),
        took: begun.elapsed(),
        invite: Duration::ZERO,
    };
    if members.len() > 1 {
        let accounts: Vec<&str> = registered[1..].iter().map(|one| one.account_id.as_str()).collect();
        let fetched = api.insist(Method::POST, "/v1/key-packages/fetch", credential, Some(&json!({ "accounts": accounts }))).await?;
        let mut add = Vec::with_capacity(accounts.len());
        for account in fetched["accounts"].as_array().context("no accounts in the answer")? {
            let id: AccountId = account["account_id"].as_str().context("an account without an id")?.parse()?;
            for device in account["devices"].as_array().context("an account without devices")? {
                let number = u32::try_from(number(device, "device_id")?)?;
                add.push((DeviceAddr { account: id, device: DeviceId::new(number)? }, unbase64(&device["key_package"])?));
            }
        }
        ensure!(add.len() == accounts.len(), "{} KeyPackages for {} accounts", add.len(), accounts.len());
        let outgoing = members[0].change(&add)?;
        let body = json!({
            "commit": base64(&outgoing.commit),
            "welcome": outgoing.welcome.as_deref().map(base64),
            "group_info": base64(&outgoing.group_info),
        });
        let submitted = Instant::now();
        let answer = api.insist(Method::POST, &format!("/v1/groups/{id}/commits"), credential, Some(&body)).await?;
        made.invite = submitted.elapsed();
        members[0].accepted()?;
        (made.epoch, made.seq) = (number(&answer, "epoch")?, number(&answer, "seq")?);
        made.took = begun.elapsed();
        let readers = if args.opaque { 1 } else { args.readers.clamp(1, args.online.unwrap_or(args.members)) };
        if readers > 1 {
            // Each reader's own Welcome is in its inbox; the one of all holds its secrets as well, and the tree is the founder's.
            let welcome = outgoing.welcome.context("a commit that adds has a Welcome")?;
            let path = format!("/v1/groups/{id}/info");
            let tree = unbase64(&api.insist(Method::GET, &path, credential, None).await?["tree"])?;
            for member in &mut members[1..readers] {
                member.join(&welcome, &tree)?;
                progress.say(|| format!("group {name}: readers join"));
            }
        }
        members.truncate(readers);
    }
    made.readers = members;
    made.registered = registered;
    Ok(made)
}

/// Changes a group again and again, as its owner; how long each took.
async fn change(hall: Rc<Hall>, clerk: Rc<Clerk>, at: usize, every: Duration, ops: Rc<std::cell::RefCell<Ops>>) {
    let seat = &hall.seats[at];
    let room = &hall.rooms[seat.group];
    let Some(member) = &seat.member else { return };
    let path = format!("/v1/groups/{}/commits", room.id);
    loop {
        tokio::time::sleep(every).await;
        let (epoch, outgoing) = {
            let mut member = member.borrow_mut();
            let Some((epoch, _)) = member.view() else { return };
            match member.change(&[]) {
                Ok(outgoing) => (epoch, outgoing),
                Err(error) => {
                    *hall.failure.borrow_mut() = Some(error.to_string());
                    return;
                }
            }
        };
        let body = json!({ "commit": base64(&outgoing.commit), "group_info": base64(&outgoing.group_info) });
        room.commits.borrow_mut().insert(epoch, hall.now_us());
        loop {
            let now = || member.borrow().view().map(|view| view.0);
            let (answer, took) = clerk.post(&path, &seat.registered.credential, &body).await;
            match answer {
                Ok(answer) if answer.status.is_success() => {
                    ops.borrow_mut().took(took);
                    // Unless it was met on the stream before.
                    if now() == Some(epoch) && member.borrow_mut().accepted().is_err() {
                        *hall.failure.borrow_mut() = Some("an accepted change can't be merged".into());
                        return;
                    }
                    room.epoch.set(room.epoch.get().max(epoch + 1));
                    break;
                }
                Ok(answer) if answer.status == StatusCode::CONFLICT => {
                    // Its answer may have been lost with the broker: then it is met on the stream.
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    if now() == Some(epoch) {
                        ops.borrow_mut().conflicts += 1;
                        let _ = member.borrow_mut().refused();
                    }
                    break;
                }
                Ok(answer) if answer.status.is_client_error() && answer.status != StatusCode::TOO_MANY_REQUESTS => {
                    *hall.failure.borrow_mut() = Some(format!("a change was answered with {}: {}", answer.status, answer.body));
                    return;
                }
                // The same bytes again.
                _ => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }
}

/// Submits changes on a thread of its own: members that decrypt keep this one busy, and that is not the server's time.
struct Clerk {
    api: Api,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Clerk {
    fn new(api: Api) -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        Ok(Self { api, runtime: Some(runtime) })
    }

    async fn post(&self, path: &str, credential: &str, body: &serde_json::Value) -> (anyhow::Result<Answer>, Duration) {
        let (api, path, credential, body) = (self.api.clone(), path.to_owned(), credential.to_owned(), body.clone());
        let Some(runtime) = &self.runtime else { return (Err(anyhow::anyhow!("the run is over")), Duration::ZERO) };
        let call = runtime.spawn(async move {
            let begun = Instant::now();
            let answer = api.call(Method::POST, &path, Some(&credential), Some(&body)).await;
            (answer.map_err(anyhow::Error::from), begun.elapsed())
        });
        call.await.unwrap_or_else(|error| (Err(error.into()), Duration::ZERO))
    }
}

impl Drop for Clerk {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What is under way nobody waits for any more.
            runtime.shutdown_background();
        }
    }
}

struct Ops {
    server: Histogram<u64>,
    conflicts: u64,
}

impl Ops {
    fn took(&mut self, took: Duration) {
        self.server.saturating_record((took.as_micros() as u64).max(1));
    }
}

/// Makes the run. Call it within a `LocalSet`.
pub(super) async fn run(args: GroupsArgs, progress: Progress) -> anyhow::Result<GroupsReport> {
    args.check()?;
    let online = args.online.unwrap_or(args.members);
    super::raise_file_limit(args.groups * online);
    let ca = args.common.ca()?;
    let api = Api::new(args.common.first_server()?, ca.as_ref())?;
    api.ready().await?;
    let mut meter = Meter::new(&api, args.common.server_pid);
    meter.sample().await;
    let keys = Keyset::generate()?;
    let (mut groups, mut seats, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    let mut report = GroupsReport {
        kind: "groups",
        opaque: args.opaque,
        members: args.members,
        online,
        groups: args.groups,
        payload_bytes: args.payload,
        rate: args.rate,
        ..GroupsReport::default()
    };
    for at in 0..args.groups {
        let made = make(&api, &args, &at.to_string(), &keys, &progress).await?;
        report.create_ms = report.create_ms.max(made.took.as_secs_f64() * 1e3);
        report.invite_server_ms = report.invite_server_ms.max(made.invite.as_secs_f64() * 1e3);
        report.readers = made.readers.len();
        owners.push(seats.len());
        groups.push((made.id, made.epoch));
        let mut readers = made.readers.into_iter();
        seats.extend(made.registered.into_iter().take(online).map(|one| (one, at, made.seq, readers.next())));
    }
    let mut servers = Vec::with_capacity(args.common.server.len());
    for server in &args.common.server {
        servers.push(super::engine::resolve(server, ca.as_ref()).await?);
    }
    let hall = Hall::new(Setup { api: api.clone(), servers, groups, seats, payload: args.payload, opaque: args.opaque })?;
    let mut tasks = Tasks(Vec::new());
    for at in 0..hall.seats.len() {
        tasks.0.push(spawn_local(hall.clone().drive(at)));
        if at % 256 == 255 {
            attached(&hall, at + 1, &progress).await?;
        }
    }
    attached(&hall, hall.seats.len(), &progress).await?;
    let ticking = hall.clone();
    tasks.0.push(spawn_local(async move {
        loop {
            tokio::time::sleep(TICK).await;
            ticking.tick();
        }
    }));
    let ops = Rc::new(std::cell::RefCell::new(Ops { server: Histogram::new_with_bounds(1, 600_000_000, 3)?, conflicts: 0 }));
    let mut changing = Tasks(Vec::new());
    if args.change_every > 0.0 {
        let every = super::length(args.change_every)?;
        // A client of its own: connections belong to the runtime that made them.
        let clerk = Rc::new(Clerk::new(Api::new(args.common.first_server()?, ca.as_ref())?)?);
        changing.0.extend(owners.iter().map(|&at| spawn_local(change(hall.clone(), clerk.clone(), at, every, ops.clone()))));
    }
    send(&hall, &args, &progress, &mut meter).await?;
    report.seconds = args.seconds;
    let deliveries = hall.counters.deliveries.get();
    report.messages_per_s = hall.counters.accepted.get() as f64 / args.seconds;
    report.deliveries_per_s = deliveries as f64 / args.seconds;
    drop(changing);
    settle(&hall, &args, &api, &progress, &mut report).await?;
    meter.sample().await;
    drop(tasks);
    fill(&mut report, &hall, &ops.borrow(), &meter);
    Ok(report)
}

async fn attached(hall: &Hall, wanted: usize, progress: &Progress) -> anyhow::Result<()> {
    let until = Instant::now() + ATTACHING;
    while hall.attached() < wanted {
        failed(hall)?;
        ensure!(Instant::now() < until, "only {} of {wanted} devices could connect", hall.attached());
        progress.say(|| format!("{} devices are connected", hall.attached()));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

fn failed(hall: &Hall) -> anyhow::Result<()> {
    match hall.failure.borrow_mut().take() {
        Some(why) => bail!(why),
        None => Ok(()),
    }
}

/// Sends evenly spaced, by each group and each of its writers in turn.
async fn send(hall: &Rc<Hall>, args: &GroupsArgs, progress: &Progress, meter: &mut Meter) -> anyhow::Result<()> {
    let writes = |at: &usize| args.opaque || hall.seats[*at].member.is_some();
    let writers: Vec<Vec<usize>> =
        (0..args.groups).map(|group| (0..hall.seats.len()).filter(|at| hall.seats[*at].group == group).filter(writes).collect()).collect();
    let (begun, length) = (Instant::now(), super::length(args.seconds)?);
    let (mut sent, mut sampled) = (0usize, Instant::now());
    while begun.elapsed() < length {
        failed(hall)?;
        let due = (begun.elapsed().as_secs_f64() * args.rate) as usize;
        while sent < due {
            let of = &writers[sent % args.groups];
            hall.send(of[sent / args.groups % of.len()]);
            sent += 1;
        }
        if sampled.elapsed() > Duration::from_secs(1) {
            sampled = Instant::now();
            meter.sample().await;
        }
        progress.say(|| {
            let counters = &hall.counters;
            format!("{} messages accepted, {} deliveries", counters.accepted.get(), counters.deliveries.get())
        });
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Waits for answers, asks where each group ends, and waits until everybody has everything.
async fn settle(hall: &Rc<Hall>, args: &GroupsArgs, api: &Api, progress: &Progress, report: &mut GroupsReport) -> anyhow::Result<()> {
    let until = Instant::now() + super::length(args.grace)?;
    while hall.unanswered() > 0 && Instant::now() < until {
        progress.say(|| format!("{} messages wait for their answers", hall.unanswered()));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (group, room) in hall.rooms.iter().enumerate() {
        let path = format!("/v1/groups/{}", room.id);
        let owner = hall.seats.iter().find(|seat| seat.group == group).context("a group without members")?;
        let mut asked = Instant::now() - Duration::from_secs(60);
        let mut head = 0;
        let behind = loop {
            // Now and then, since what was answered last may not be counted yet.
            if asked.elapsed() > Duration::from_secs(2) {
                asked = Instant::now();
                head = number(&api.insist(Method::GET, &path, Some(&owner.registered.credential), None).await?, "seq")?;
            }
            let behind = hall.behind(group, head);
            if behind.is_empty() || Instant::now() > until {
                break behind;
            }
            progress.say(|| format!("{} members have not had everything yet", behind.len()));
            tokio::time::sleep(Duration::from_millis(250)).await;
            if asked.elapsed() > Duration::from_secs(1) {
                behind.iter().for_each(|&at| hall.tell_head(at, head));
            }
        };
        report.lost += behind.len() as u64;
        report.forks += forks(hall, group);
    }
    report.lost += missing(hall, report.lost);
    Ok(())
}

/// Messages that were accepted and that a member did not get, although it is at the end.
fn missing(hall: &Hall, behind: u64) -> u64 {
    let counters = &hall.counters;
    let mut online = vec![0u64; hall.rooms.len()];
    hall.seats.iter().for_each(|seat| online[seat.group] += 1);
    // Evenly shared out over groups of the same size.
    let expected = counters.accepted.get() * online.first().copied().unwrap_or_default();
    if behind > 0 { 0 } else { expected.saturating_sub(counters.deliveries.get()) }
}

fn forks(hall: &Hall, group: usize) -> u64 {
    let mut seen: std::collections::BTreeMap<u64, Vec<u8>> = std::collections::BTreeMap::new();
    let members = hall.seats.iter().filter(|seat| seat.group == group).filter_map(|seat| seat.member.as_ref());
    let differs = members.filter_map(|member| member.borrow().view()).filter(|(epoch, authenticator)| {
        let first = seen.entry(*epoch).or_insert_with(|| authenticator.clone());
        first != authenticator
    });
    differs.count() as u64
}

fn fill(report: &mut GroupsReport, hall: &Hall, ops: &Ops, meter: &Meter) {
    let counters = &hall.counters;
    let ms = |histogram: &Histogram<u64>, quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
    (report.ops, report.op_conflicts) = (ops.server.len(), ops.conflicts);
    (report.op_server_p50_ms, report.op_server_p99_ms) = (ms(&ops.server, 0.5), ms(&ops.server, 0.99));
    report.op_seen_p99_ms = ms(&hall.op_seen.borrow(), 0.99);
    (report.sent, report.accepted, report.refused) = (counters.sent.get(), counters.accepted.get(), counters.refused.get());
    (report.repeated, report.unanswered) = (counters.repeated.get(), hall.unanswered() as u64);
    report.deliveries = counters.deliveries.get();
    let latency = hall.latency.borrow();
    (report.latency_p50_ms, report.latency_p99_ms) = (ms(&latency, 0.5), ms(&latency, 0.99));
    report.latency_max_ms = latency.max() as f64 / 1e3;
    report.duplicates = counters.duplicates.get();
    (report.decrypted, report.undecryptable) = (counters.decrypted.get(), counters.undecryptable.get());
    (report.fetched, report.reconnects) = (counters.fetched.get(), counters.reconnects.get());
    (report.server_rss_bytes, report.server_cpu_seconds) = (meter.resident_bytes(), meter.cpu_seconds());
    report.tool_cpu_seconds = super::meter::own_cpu_seconds();
}
