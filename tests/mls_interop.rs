//! Our groups with a member by ts-mls, an implementation of RFC 9420 that shares no code with ours: KeyPackages, Welcomes, commits and
//! messages, both ways, in every suite. Skipped, with the reason, where Node.js or the packages are missing (`make interop`).

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sealpost::client::core::groups::{Change, Engine, Error, Group, Received};
use sealpost::client::core::state::{MemoryState, StateKey, StateTx, encode_address};
use sealpost::clock::{Clock as _, SystemClock, SystemRandom};
use sealpost::ids::{AccountId, DeviceAddr, DeviceId, GroupId};
use sealpost::mls::crypto::SUITES;
use sealpost::mls::{credential, profile};
use serde_json::{Value, json};

const GROUP: GroupId = GroupId::from_bytes([0x6a; 16]);

fn b64(bytes: &[u8]) -> String {
    STANDARD.encode(bytes)
}

fn bytes(value: &Value) -> Vec<u8> {
    STANDARD.decode(value.as_str().expect("a text")).expect("base64")
}

fn device(account: u8) -> DeviceAddr {
    DeviceAddr { account: AccountId::from_bytes([account; 16]), device: DeviceId::new(1).expect("a device") }
}

/// The other implementation, in a process of its own.
struct Peer {
    process: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Peer {
    /// `Err` says what is missing.
    fn start() -> Result<Self, &'static str> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop");
        if !folder.join("node_modules/ts-mls").is_dir() {
            return Err("the packages of tests/interop are not installed: make interop");
        }
        let mut node = Command::new("node");
        let process = node.arg("peer.mjs").current_dir(&folder).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut process = process.map_err(|_| "Node.js is not installed")?;
        let (input, output) = (process.stdin.take().expect("piped"), process.stdout.take().expect("piped"));
        Ok(Self { process, input, output: BufReader::new(output) })
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.input, "{request}").expect("it reads");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("it answers");
        let mut answer: Value = serde_json::from_str(&line).expect("JSON");
        assert!(answer["error"].is_null(), "{}", answer["error"]);
        answer["ok"].take()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may be gone already; that is what the test would have said.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// One of our devices.
struct Device(MemoryState, openmls::prelude::Ciphersuite);

impl Device {
    fn new(address: DeviceAddr, suite: openmls::prelude::Ciphersuite) -> Self {
        let mut state = MemoryState::default();
        state.commit([(StateKey::OwnAddress, Some(encode_address(address).into()))].into());
        Self(state, suite)
    }

    fn run<T>(&mut self, work: impl FnOnce(&Engine<'_, '_>) -> Result<T, Error>) -> T {
        let tx = StateTx::new(&self.0);
        let done = work(&Engine::new(&tx, &SystemRandom).expect("registered").with_suite(self.1)).expect("it works");
        let (writes, _) = tx.finish();
        self.0.commit(writes);
        done
    }

    fn group<T>(&mut self, work: impl FnOnce(&mut Group, &Engine<'_, '_>) -> Result<T, Error>) -> T {
        self.run(|engine| work(&mut engine.load(GROUP)?.expect("it is in the group"), engine))
    }

    fn agrees(&mut self, peer: &Value) {
        let (epoch, authenticator, hash) = self.group(|group, _| Ok((group.epoch(), group.authenticator(), group.tree_hash())));
        assert_eq!(
            (json!(epoch), json!(b64(&authenticator)), json!(b64(&hash))),
            (peer["epoch"].clone(), peer["authenticator"].clone(), peer["tree_hash"].clone())
        );
    }

    fn receive(&mut self, message: &[u8]) -> Received {
        self.group(|group, engine| group.receive(engine, message))
    }
}

#[test]
fn an_independent_implementation_understands_us_and_we_understand_it() {
    for suite in SUITES {
        let mut peer = match Peer::start() {
            Ok(peer) => peer,
            Err(missing) => {
                println!("skipped: talking to an independent implementation of MLS, since {missing}");
                return;
            }
        };
        let now = SystemClock.now();
        let (ours, theirs, third) = (device(1), device(2), device(3));
        let mut alice = Device::new(ours, suite);
        let number = u16::from(suite);
        let started = peer.ask(&json!({
            "op": "start", "suite": number, "identity": b64(&credential::encode(theirs)), "extensions": [profile::PROFILE],
        }));
        let package = bytes(&started["key_package"]);

        // Our Welcome, and a commit that makes the peer an admin.
        alice.run(|engine| engine.create(GROUP, "Berge", None, now));
        let added = alice.group(|group, engine| group.change(engine, &Change { add: vec![(theirs, &package)], ..Change::default() }, now));
        alice.group(|group, engine| group.accepted(engine));
        let tree = alice.group(|group, _| group.tree());
        let view = peer.ask(&json!({ "op": "join", "welcome": b64(&added.welcome.expect("a Welcome")), "tree": b64(&tree) }));
        alice.agrees(&view);
        let admin = Change { admins: Some(vec![theirs.account]), ..Change::default() };
        let commit = alice.group(|group, engine| group.change(engine, &admin, now));
        alice.group(|group, engine| group.accepted(engine));
        alice.agrees(&peer.ask(&json!({ "op": "receive", "message": b64(&commit.commit) })));

        // Messages both ways.
        let text = alice.group(|group, engine| group.encrypt(engine, b"Servus"));
        assert_eq!(bytes(&peer.ask(&json!({ "op": "receive", "message": b64(&text) }))["content"]), b"Servus");
        let text = peer.ask(&json!({ "op": "write", "content": b64(b"Hallo") }));
        match alice.receive(&bytes(&text["message"])) {
            Received::Message { from, content, .. } => assert_eq!((from, content.as_slice()), (theirs, b"Hallo".as_slice())),
            other => panic!("{other:?}"),
        }

        // Its commits: an update, and a member whom it adds.
        let update = peer.ask(&json!({ "op": "update" }));
        assert!(matches!(alice.receive(&bytes(&update["commit"])), Received::Committed(_)));
        alice.agrees(&update);
        let mut carol = Device::new(third, suite);
        let package = carol.run(|engine| engine.key_packages(1, now)).remove(0);
        let added = peer.ask(&json!({ "op": "add", "key_package": b64(&package) }));
        assert!(matches!(alice.receive(&bytes(&added["commit"])), Received::Committed(_)));
        carol.run(|engine| engine.join(&bytes(&added["welcome"]), &bytes(&added["tree"]), false).map(drop));
        alice.agrees(&added);
        carol.agrees(&added);

        // The one that it added writes, and everybody reads.
        let text = carol.group(|group, engine| group.encrypt(engine, b"Danke"));
        assert!(matches!(alice.receive(&text), Received::Message { from, .. } if from == third));
        assert_eq!(bytes(&peer.ask(&json!({ "op": "receive", "message": b64(&text) }))["content"]), b"Danke");
        println!("{suite:?}: understood both ways");
    }
}
