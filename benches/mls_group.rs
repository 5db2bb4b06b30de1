//! A group at its largest: 1,500 accounts with a device each, in memory. Prints what its operations cost a member and the server (which checks
//! commits from public state), and how large they are. One core, nothing durable. `SEALPOST_BENCH_MEMBERS` changes the size.

use std::time::{Duration, Instant};

use openmls::prelude::tls_codec::Deserialize as _;
use openmls::prelude::{MlsMessageBodyIn, MlsMessageIn, ProcessedMessageContent, ProtocolMessage, PublicGroup, RatchetTreeIn};
use sealpost::client::core::groups::{Change, Engine, Error, Group};
use sealpost::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use sealpost::clock::{Clock as _, SystemClock, SystemRandom, UnixMillis};
use sealpost::ids::{AccountId, DeviceAddr, DeviceId, GroupId};
use sealpost::mls::crypto::Crypto;
use sealpost::mls::rules;

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
fn serve(public: &mut PublicGroup, commit: &[u8], storage: &ServerStorage) {
    let started = Instant::now();
    let message = MlsMessageIn::tls_deserialize_exact(commit).expect("an MLSMessage");
    let message: ProtocolMessage = match message.extract() {
        MlsMessageBodyIn::PublicMessage(message) => message.into(),
        _ => panic!("commits are public"),
    };
    let processed = public.process_message(&Crypto::new(&SystemRandom), message).expect("valid");
    let sender = processed.sender().clone();
    let ProcessedMessageContent::StagedCommitMessage(commit) = processed.into_content() else { panic!("a commit") };
    rules::check_commit(public, &sender, &commit).expect("allowed");
    let checked = started.elapsed();
    public.merge_commit(storage, *commit).expect("merges");
    println!("  server: checked in {:.1} ms, merged after {:.1} ms", checked.as_secs_f64() * 1e3, started.elapsed().as_secs_f64() * 1e3);
}
