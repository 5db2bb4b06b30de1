//! kill -9 of a broker in a storm of commits and messages: all members see the same group, and each message once (G-EPOCH, G-DURABLE,
//! G-IDEMPOTENT). `SEALPOST_TEST_KILL_ROUNDS` sets how often it is killed.

#[path = "support/member.rs"]
mod member;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use member::Member;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use reqwest::StatusCode;
use sealpost::client::core::groups::Change;
use sealpost::clock::SystemRandom;
use sealpost::ids::GroupId;
use sealpost::testing::{RawDevice, process};

const MEMBERS: usize = 4;

fn seed() -> u64 {
    let seed = std::env::var("SEALPOST_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| rand::rng().random());
    println!("SEALPOST_TEST_SEED={seed}");
    seed
}

struct Storm {
    member: Member,
    /// What it was told was accepted.
    sent: Vec<Vec<u8>>,
    read: Vec<Vec<u8>>,
    commits: (usize, usize),
}

async fn storm(mut storm: Storm, number: usize, mut random: StdRng, stop: Arc<AtomicBool>) -> Storm {
    while !stop.load(Ordering::Relaxed) {
        let caught = storm.member.catch_up(20).await;
        storm.read.extend(caught);
        if random.random_ratio(1, 4) {
            let outgoing = storm.member.change(&Change::default());
            // Either way the items say what became of it.
            match storm.member.submit(&outgoing).await.0 {
                StatusCode::OK => storm.commits.0 += 1,
                StatusCode::CONFLICT => storm.commits.1 += 1,
                other => panic!("a commit was answered {other}"),
            }
        } else {
            let text = format!("{number}: {}", storm.sent.len()).into_bytes();
            let send = storm.member.next_send(&text);
            let (status, answer) = storm.member.post(&send).await;
            assert_eq!(status, StatusCode::OK, "{answer}");
            storm.sent.push(text);
        }
    }
    storm
}

#[tokio::test(flavor = "multi_thread")]
async fn members_see_the_same_group_over_random_kills() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let program = Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let mut broker = process::start(program, folder.path()).await.expect("the broker starts");
    let url = broker.url().to_string().trim_end_matches('/').to_owned();
    let group = GroupId::random(&SystemRandom);
    let mut members = Vec::new();
    for n in 0..MEMBERS {
        let device = RawDevice::register(&url, &format!("member{n}@socialink")).await.expect("registers");
        members.push(Member::new(device, group));
    }
    let (owner, others) = members.split_first_mut().expect("somebody");
    owner.create().await;
    owner.add(others).await;
    for other in others {
        other.join().await;
    }

    let (seed, stop) = (seed(), Arc::new(AtomicBool::new(false)));
    let storms: Vec<_> = members
        .into_iter()
        .enumerate()
        .map(|(number, mut member)| {
            member.patient = true;
            let begun = Storm { member, sent: Vec::new(), read: Vec::new(), commits: (0, 0) };
            tokio::spawn(storm(begun, number, StdRng::seed_from_u64(seed + number as u64), Arc::clone(&stop)))
        })
        .collect();
    let mut random = StdRng::seed_from_u64(seed ^ 1);
    let rounds: u32 = std::env::var("SEALPOST_TEST_KILL_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(6);
    for _ in 0..rounds {
        tokio::time::sleep(Duration::from_millis(random.random_range(200..1_500))).await;
        broker.restart().await.expect("starts again");
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    stop.store(true, Ordering::Relaxed);
    let mut ended = Vec::new();
    for storm in storms {
        ended.push(storm.await.expect("no member gave up"));
    }
    // A message is in its place a moment after it is durable.
    let all: BTreeSet<Vec<u8>> = ended.iter().flat_map(|storm| storm.sent.clone()).collect();
    for storm in &mut ended {
        let own: BTreeSet<_> = storm.sent.iter().cloned().collect();
        let wanted: BTreeSet<_> = all.difference(&own).cloned().collect();
        for _ in 0..200 {
            let caught = storm.member.catch_up(50).await;
            storm.read.extend(caught);
            if storm.read.len() >= wanted.len() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let read: BTreeSet<_> = storm.read.iter().cloned().collect();
        assert_eq!(read.len(), storm.read.len(), "each once");
        assert_eq!(read, wanted, "all that was accepted, and nothing else");
    }
    let views: BTreeSet<_> = ended.iter_mut().map(|storm| storm.member.view()).collect();
    assert_eq!(views.len(), 1, "one group: {views:?}");
    let (won, lost) = ended.iter().fold((0, 0), |sum, storm| (sum.0 + storm.commits.0, sum.1 + storm.commits.1));
    let epoch = views.first().expect("one").0;
    println!("{} messages, {won} commits taken, {lost} refused, epoch {epoch}, {rounds} kills", all.len());
    assert_eq!(epoch, 1 + won as u64, "each accepted commit began one epoch");
}
