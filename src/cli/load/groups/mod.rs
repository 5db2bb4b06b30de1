//! `sealpost load groups`: groups of real MLS leaves, what a message costs that many get, and how long a change of a large group takes.
//!
//! Every member is a leaf of its own with its own keys, since the broker checks all of it, and gets its invitation and every item on a socket
//! of its own. Items are compared over all sockets, and `--readers` members decrypt all of it with openmls. With `--opaque` nobody decrypts, and
//! messages only look like MLS: that measures the fan-out alone.

mod feed;
mod making;
mod member;
mod ops;
mod reading;
mod report;
mod room;
mod seat;

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Args;
use hdrhistogram::Histogram;
use reqwest::Method;
use tokio::task::spawn_local;

use self::feed::{Hall, Setup};
use self::making::{Party, number};
use self::ops::{Changes, Clerk, Ops};
use self::reading::{Desk, Reader, Reading};
pub(super) use self::report::GroupsReport;
use super::Common;
use super::api::Api;
use super::keys::Keyset;
use super::meter::Meter;
use super::progress::Progress;
use super::traffic::Tasks;
use super::wire::STAMP_BYTES;
use crate::clock::SystemRandom;
use crate::ids::GroupId;
use crate::limits;

/// How long the followers may take to be there.
const ATTACHING: Duration = Duration::from_secs(120);
/// How often what waits is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How long readers may do nothing at all before the run gives them up.
const READING: Duration = Duration::from_secs(60);
/// Members of a group that write, where messages are real; fewer where each message costs the others of them too much.
const WRITERS: usize = 4;
/// About what reading costs a member, in seconds of a core: joining and each commit by leaf of the group, and each message. How many read by
/// default follows from it, and nothing else.
const JOIN_S: f64 = 120e-6;
const COMMIT_S: f64 = 5e-6;
const MESSAGE_S: f64 = 200e-6;

/// How many members of each group read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readers {
    All,
    Count(usize),
}

impl FromStr for Readers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(0) => Err("the owner reads in any case: 1 or more, or all".into()),
            Ok(count) => Ok(Self::Count(count)),
            Err(_) if text == "all" => Ok(Self::All),
            Err(_) => Err("a number, or all".into()),
        }
    }
}

#[derive(Debug, Clone, Args)]
pub(super) struct GroupsArgs {
    #[command(flatten)]
    common: Common,
    /// Members of each group, each an account with one device
    #[arg(long, default_value_t = 1_500)]
    members: usize,
    /// Of these, how many hold an open stream [default: all]
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
    /// Changes of each kind, over all groups, spread over the run: new keys of the owner, a member removed, it added again; 0: none
    /// [default: one of each every two seconds]
    #[arg(long)]
    ops: Option<usize>,
    /// Members of each group that decrypt every message and apply every commit with openmls: a number or `all`. They give way to everything
    /// else and are read to the end after the run [default: as many of those online as this machine reads in the time of the run, at least 4]
    #[arg(long)]
    readers: Option<Readers>,
    /// Messages that nobody decrypts, written by all who are online
    #[arg(long)]
    opaque: bool,
    /// How many seconds to wait in the end for what is under way
    #[arg(long, default_value_t = 60.0)]
    grace: f64,
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

    fn online(&self) -> usize {
        self.online.unwrap_or(self.members)
    }

    /// Changes of each kind. As many as the server takes from one device: two a second.
    fn changes(&self) -> usize {
        self.ops.unwrap_or_else(|| (self.seconds / 2.0).ceil() as usize)
    }

    /// Members of each group that read.
    fn readers(&self, cores: usize) -> usize {
        let online = self.online();
        let (groups, leaves) = (self.groups as f64, self.members as f64);
        match self.readers {
            _ if self.opaque => 1,
            Some(Readers::All) => online,
            Some(Readers::Count(count)) => count.min(online),
            None => {
                let commits = (3 * self.changes()) as f64 / groups;
                let each = leaves * (JOIN_S + commits * COMMIT_S) + self.rate * self.seconds / groups * MESSAGE_S;
                let fit = cores as f64 * self.seconds / (each * groups);
                (fit as usize).clamp(4.min(online), online)
            }
        }
    }

    /// Of these, how many write.
    fn writers(&self, readers: usize) -> usize {
        let affordable = (0.5 / (self.rate * MESSAGE_S)) as usize;
        readers.min(affordable.clamp(1, WRITERS))
    }
}

/// Devices of all groups, and who keeps which keys.
struct Cast {
    hall: Rc<Hall>,
    parties: Vec<Party>,
    readers: Vec<Arc<Reader>>,
}

async fn cast(api: &Api, args: &GroupsArgs, desk: &Arc<Desk>, progress: &Progress) -> anyhow::Result<Cast> {
    let keys = Keyset::generate()?;
    let readers = args.readers(std::thread::available_parallelism().map_or(1, usize::from));
    let writers = args.writers(readers);
    let (mut parties, mut groups, mut seats, mut reading) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for group in 0..args.groups {
        let party = making::register(api, args.members, readers, &group.to_string(), &keys, progress).await?;
        let guest = (args.members > 1 && args.online() == args.members).then(|| seats.len() + args.members - 1);
        groups.push((GroupId::random(&SystemRandom), guest));
        for (at, one) in party.registered.iter().take(args.online()).enumerate() {
            let reader = party.members.get(at).map(|member| {
                let (member, seat, account) = (Arc::clone(member), seats.len(), one.target.account);
                Arc::new(Reader::new(member, at < writers, seat, account, Arc::clone(desk)))
            });
            reading.extend(reader.clone());
            seats.push((one.clone(), group, reader));
        }
        parties.push(party);
    }
    let ca = args.common.ca()?;
    let mut servers = Vec::with_capacity(args.common.server.len());
    for server in &args.common.server {
        servers.push(super::engine::resolve(server, ca.as_ref()).await?);
    }
    let setup = Setup { api: api.clone(), servers, groups, seats, desk: Arc::clone(desk), opaque: args.opaque };
    Ok(Cast { hall: Hall::new(setup)?, parties, readers: reading })
}

/// Makes the run. Call it within a `LocalSet`.
pub(super) async fn run(args: GroupsArgs, progress: Progress) -> anyhow::Result<GroupsReport> {
    args.check()?;
    super::raise_file_limit(args.groups * args.online());
    let ca = args.common.ca()?;
    let api = Api::new(args.common.first_server()?, ca.as_ref())?;
    api.ready().await?;
    let mut meter = Meter::new(&api, args.common.server_pid);
    meter.sample().await;
    let mut template = vec![0; args.payload.saturating_sub(STAMP_BYTES)];
    rand::Rng::fill(&mut rand::rng(), &mut template[..]);
    let (desk, mut written) = Desk::new(template);
    let Cast { hall, parties, readers } = cast(&api, &args, &desk, &progress).await?;
    let mut report = GroupsReport::of(&args, readers.len() / args.groups);
    let reading = Reading::start(&desk, readers)?;

    let mut tasks = Tasks(Vec::new());
    for at in 0..hall.seats.len() {
        tasks.0.push(spawn_local(hall.clone().drive(at)));
        if at % 256 == 255 {
            reach(&hall, at + 1, &progress, "are connected", Hall::attached).await?;
        }
    }
    reach(&hall, hall.seats.len(), &progress, "are connected", Hall::attached).await?;
    let (ticking, writing) = (hall.clone(), hall.clone());
    tasks.0.push(spawn_local(async move {
        loop {
            tokio::time::sleep(TICK).await;
            ticking.tick();
        }
    }));
    tasks.0.push(spawn_local(async move {
        while let Some(message) = written.recv().await {
            writing.written(message);
        }
    }));
    for (group, party) in parties.iter().enumerate() {
        let made = making::create(&hall, &api, group, party, &progress).await?;
        report.create_ms = report.create_ms.max(made.took.as_secs_f64() * 1e3);
        report.invite_server_ms = report.invite_server_ms.max(made.invite.as_secs_f64() * 1e3);
    }
    reach(&hall, hall.seats.len(), &progress, "follow", Hall::following).await?;
    let joining = report.readers.saturating_sub(1) * args.groups;
    reach(&hall, joining, &progress, "have joined", |hall| hall.desk.joined.load(Relaxed) as usize).await?;

    let (ops, over) = (Rc::new(RefCell::new(Ops::new()?)), Rc::new(Cell::new(false)));
    let changes = Changes {
        hall: hall.clone(),
        api: api.clone(),
        // A client of its own: connections belong to the runtime that made them.
        clerk: Clerk::new(Api::new(args.common.first_server()?, ca.as_ref())?)?,
        crews: parties.into_iter().map(|party| party.crew).collect(),
        each: args.changes(),
        length: super::length(args.seconds)?,
        ops: ops.clone(),
        over: over.clone(),
    };
    let changing = Tasks(vec![spawn_local(changes.run())]);
    send(&hall, &args, &progress, &mut meter).await?;
    over.set(true);
    report.rates(&hall, args.seconds);
    let until = Instant::now() + super::length(args.grace)?;
    for change in &changing.0 {
        while !change.is_finished() && Instant::now() < until {
            progress.say(|| format!("{} changes made", ops.borrow().server.iter().map(Histogram::len).sum::<u64>()));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    settle(&hall, until, &api, &progress, &mut report).await?;
    read_on(&hall, &progress, &mut report).await?;
    meter.sample().await;
    drop((changing, tasks, reading));
    (0..hall.rooms.len()).for_each(|group| report.forks += forks(&hall, group));
    report.fill(&hall, &ops.borrow(), &meter);
    Ok(report)
}

/// Waits until so many devices are so far.
async fn reach(hall: &Hall, wanted: usize, progress: &Progress, what: &str, count: impl Fn(&Hall) -> usize) -> anyhow::Result<()> {
    let (mut best, mut until) = (0, Instant::now() + ATTACHING);
    loop {
        let now = count(hall);
        if now >= wanted {
            return Ok(());
        }
        failed(hall)?;
        if now > best {
            (best, until) = (now, Instant::now() + ATTACHING);
        }
        ensure!(Instant::now() < until, "only {now} of {wanted} devices {what}");
        progress.say(|| format!("{now} of {wanted} devices {what}"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn failed(hall: &Hall) -> anyhow::Result<()> {
    match hall.failure.borrow_mut().take().or_else(|| hall.desk.failure()) {
        Some(why) => bail!(why),
        None => Ok(()),
    }
}

/// Sends evenly spaced, by each group and each of its writers in turn.
async fn send(hall: &Rc<Hall>, args: &GroupsArgs, progress: &Progress, meter: &mut Meter) -> anyhow::Result<()> {
    // Whoever is taken out now and then does not write.
    let writes = |at: &usize| {
        let seat = &hall.seats[*at];
        let prompt = seat.reader.as_ref().is_some_and(|reader| reader.prompt);
        (args.opaque || prompt) && (hall.rooms[seat.group].guest != Some(*at) || args.changes() == 0)
    };
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
            let waiting = hall.desk.waiting();
            format!("{} messages accepted, {} deliveries, {waiting} to be read", counters.accepted.get(), counters.deliveries.get())
        });
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Waits for answers, asks where each group ends, and waits until everybody has everything.
async fn settle(hall: &Rc<Hall>, until: Instant, api: &Api, progress: &Progress, report: &mut GroupsReport) -> anyhow::Result<()> {
    while hall.unanswered() > 0 && Instant::now() < until {
        progress.say(|| format!("{} messages wait for their answers", hall.unanswered()));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for (group, room) in hall.rooms.iter().enumerate() {
        let path = format!("/v1/groups/{}", room.id);
        let owner = hall.seats.iter().find(|seat| seat.group == group).context("a group without members")?;
        let mut asked = Instant::now();
        let mut head = number(&api.insist(Method::GET, &path, Some(&owner.registered.credential), None).await?, "seq")?;
        // What was accepted last gets its place a moment later.
        while hall.lost(group, head) > 0 && Instant::now() < until {
            let behind = hall.behind(group, head);
            progress.say(|| format!("{} members have not had everything yet", behind.len()));
            tokio::time::sleep(Duration::from_millis(100)).await;
            if asked.elapsed() > Duration::from_secs(1) {
                asked = Instant::now();
                head = number(&api.insist(Method::GET, &path, Some(&owner.registered.credential), None).await?, "seq")?;
                behind.iter().for_each(|&at| hall.tell_head(at, head));
            }
        }
        report.lost += hall.lost(group, head);
    }
    Ok(())
}

/// Waits until the readers have read what their sockets had, however long it takes while they do.
async fn read_on(hall: &Hall, progress: &Progress, report: &mut GroupsReport) -> anyhow::Result<()> {
    let begun = Instant::now();
    let (mut left, mut until) = (u64::MAX, begun + READING);
    loop {
        failed(hall)?;
        let waiting = hall.desk.waiting();
        if waiting < left {
            (left, until) = (waiting, Instant::now() + READING);
        }
        if waiting == 0 || Instant::now() > until {
            break;
        }
        progress.say(|| format!("{waiting} items to be read"));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    report.unread = left;
    report.read_on_s = begun.elapsed().as_secs_f64();
    Ok(())
}

/// Readers that are not where the owner is, though they have read everything.
fn forks(hall: &Hall, group: usize) -> u64 {
    let seats = hall.seats.iter().enumerate().filter(|(at, seat)| seat.group == group && hall.inside(*at));
    let mut views = seats.filter_map(|(_, seat)| seat.reader.as_ref()).map(|reader| reader.member.lock().view());
    let owner = views.next();
    views.filter(|view| Some(view) != owner.as_ref()).count() as u64
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Command {
        #[command(flatten)]
        args: GroupsArgs,
    }

    fn parse(line: &str) -> Result<GroupsArgs, clap::Error> {
        Command::try_parse_from(std::iter::once("groups").chain(line.split_whitespace())).map(|command| command.args)
    }

    #[test]
    fn as_many_read_as_can() {
        let readers = |line: &str| parse(line).unwrap().readers(2);
        assert_eq!(readers("--members 50"), 50, "all of a small group");
        let large = readers("--members 1500");
        assert!((40..400).contains(&large), "{large} of a large one");
        assert!(readers("--members 1500 --seconds 60") > large, "more in more time");
        assert_eq!(readers("--members 1500 --seconds 1 --rate 1000"), 4);
        assert_eq!(readers("--members 1500 --readers all"), 1_500);
        assert_eq!(readers("--members 1500 --online 30 --readers all"), 30);
        assert_eq!(readers("--members 10 --readers 11"), 10);
        assert_eq!(readers("--members 1500 --readers all --opaque"), 1, "the owner, who makes the changes");
        assert!(parse("--readers 0").is_err() && parse("--readers some").is_err());
    }

    #[test]
    fn thirty_changes_in_twenty_seconds() {
        let changes = |line: &str| parse(line).unwrap().changes() * ops::Op::ALL.len();
        assert_eq!((changes(""), changes("--seconds 60"), changes("--ops 0"), changes("--ops 7")), (30, 90, 0, 21));
    }

    #[test]
    fn few_write_where_each_message_costs_the_others_much() {
        let writers = |line: &str| parse(line).unwrap().writers(100);
        assert_eq!((writers(""), writers("--rate 1000"), writers("--rate 10000")), (4, 2, 1));
    }
}
