//! A group at its largest: 1,500 accounts with a device each, in memory. Prints what its operations cost a member and the server (which checks
//! commits from public state), and how large they are. One core, nothing durable. `SEALPOST_BENCH_MEMBERS` changes the size.

use std::time::{Duration, Instant};

use sealpost::client::core::groups::{Change, Engine, Error, Group};
use sealpost::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use sealpost::clock::{Clock as _, SystemClock, SystemRandom, UnixMillis};
use sealpost::ids::{AccountId, DeviceAddr, DeviceId, GroupId};
use sealpost::mls::public::Public;

const GROUP: GroupId = GroupId::from_bytes([0x6a; 16]);

fn device(number: u128) -> DeviceAddr {
    DeviceAddr { account: AccountId::from_bytes((number + 1).to_be_bytes()), device: DeviceId::new(1).expect("a device") }
}

struct Member(DeviceAddr, MemoryState);

impl Member {
    fn new(number: u128) -> Self {
        let mut state = MemoryState::default();
        state.commit([(StateKey::OwnAddress, Some(encode_address(device(number)).into()))].into());
        Self(device(number), state)
    }

    /// One transaction: what it returns, how long it took with reading and writing state, and how much it wrote.
    fn run<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>) -> Result<T, Error>) -> (T, Duration, usize) {
        let started = Instant::now();
        let tx = StateTx::new(&self.1);
        let done = work(&Engine::new(&tx, &SystemRandom).expect("registered")).expect("it works");
        let (writes, _) = tx.finish();
        let written = writes.values().flatten().map(|value| value.len()).sum();
        let took = started.elapsed();
        self.1.commit(writes);
        (done, took, written)
    }

    fn group<T>(&mut self, work: impl FnOnce(&mut Group, &Engine<'_, '_>) -> Result<T, Error>) -> (T, Duration, usize) {
        self.run(|engine| work(&mut engine.load(GROUP)?.expect("it is in the group"), engine))
    }

    fn package(&mut self, now: UnixMillis) -> Vec<u8> {
        self.run(|engine| engine.key_packages(1, now)).0.remove(0)
    }
}

fn report(what: &str, (took, written): (Duration, usize), sizes: &[(&str, usize)]) {
    let sizes: String = sizes.iter().map(|(name, bytes)| format!(", {name} {bytes} B")).collect();
    println!("{what}: {:.1} ms, {written} B of state{sizes}", took.as_secs_f64() * 1e3);
}

/// The server's part: a commit checked from public state and merged.
fn serve(public: &mut Public, commit: &[u8]) {
    let started = Instant::now();
    let checked = public.check(commit, &SystemRandom).expect("valid and allowed");
    let after = started.elapsed();
    public.merge(checked).expect("merges");
    println!("  server: checked in {:.1} ms, merged after {:.1} ms", after.as_secs_f64() * 1e3, started.elapsed().as_secs_f64() * 1e3);
}

fn main() {
    let members: u128 = std::env::var("SEALPOST_BENCH_MEMBERS").ok().and_then(|text| text.parse().ok()).unwrap_or(1_500);
    let now = SystemClock.now();
    let mut others: Vec<Member> = (1..members).map(Member::new).collect();
    let packages: Vec<(DeviceAddr, Vec<u8>)> = others.iter_mut().map(|member| (member.0, member.package(now))).collect();
    let mut owner = Member::new(0);
    let (created, took, written) = owner.run(|engine| Ok(engine.create(GROUP, "Bench", None, now)?.1));
    report("create", (took, written), &[("GroupInfo", created.group_info.len())]);
    let mut public = Public::create(&created.group_info, &created.tree, &SystemRandom).expect("a sound group");

    let add = packages.iter().map(|(device, bytes)| (*device, bytes.as_slice())).collect();
    let (sent, took, written) = owner.group(|group, engine| group.change(engine, &Change { add, ..Change::default() }, now));
    let welcome = sent.welcome.expect("a Welcome");
    let sizes = [("commit", sent.commit.len()), ("Welcome", welcome.len()), ("GroupInfo", sent.group_info.len())];
    report(&format!("add {} at once", members - 1), (took, written), &sizes);
    serve(&mut public, &sent.commit);
    let (tree, took, written) = owner.group(|group, engine| {
        group.accepted(engine)?;
        group.tree()
    });
    report("  verdict", (took, written), &[("tree", tree.len())]);

    let [first, .., last] = others.as_mut_slice() else { panic!("at least three members") };
    for member in [&mut *first, &mut *last] {
        let ((), took, written) = member.run(|engine| engine.join(&welcome, &tree, false).map(drop));
        report("join by Welcome", (took, written), &[]);
    }
    // The first commits of members that have only joined name every leaf below them; later ones name subtrees.
    for round in 1..=3 {
        for member in 0..2 {
            let [updating, receiving] = if member == 0 { [&mut *first, &mut *last] } else { [&mut *last, &mut *first] };
            let (sent, took, written) = updating.group(|group, engine| group.change(engine, &Change::default(), now));
            report(&format!("update, round {round}"), (took, written), &[("commit", sent.commit.len())]);
            serve(&mut public, &sent.commit);
            for (what, member) in [("  received", &mut *receiving), ("  received", &mut owner)] {
                let (_, took, written) = member.group(|group, engine| group.receive(engine, &sent.commit));
                report(what, (took, written), &[]);
            }
            updating.group(|group, engine| group.accepted(engine));
        }
    }

    let mut joiner = Member::new(members);
    let package = joiner.package(now);
    let gone = device(1);
    let swap = Change { add: vec![(joiner.0, &package)], remove_devices: vec![gone], ..Change::default() };
    let (sent, took, written) = owner.group(|group, engine| group.change(engine, &swap, now));
    report(
        "add one, remove one",
        (took, written),
        &[("commit", sent.commit.len()), ("Welcome", sent.welcome.as_ref().map_or(0, Vec::len))],
    );
    serve(&mut public, &sent.commit);
    owner.group(|group, engine| group.accepted(engine));
    last.group(|group, engine| group.receive(engine, &sent.commit));

    let (text, took, written) = owner.group(|group, engine| group.encrypt(engine, &[0; 1024]));
    report("write 1 KiB", (took, written), &[("message", text.len())]);
    let (_, took, written) = last.group(|group, engine| group.receive(engine, &text));
    report("read it", (took, written), &[]);
    println!("{members} members; state is loaded and written in each operation, in memory, nothing durable");
}
