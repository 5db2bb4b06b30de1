//! `sealpost topology` against a real Kafka. Skipped, and said so, unless `SEALPOST_TEST_KAFKA` names one; `make test-cluster` starts it.

use std::process::Command;

use sealpost::clock::SystemRandom;
use sealpost::ids::EdgeId;
use sealpost::log::kafka::{KafkaLog, KafkaOptions, alter_settings, delete_topics, describe_topics};
use sealpost::log::{EventLog as _, Topic};
use serde_json::Value;

fn brokers() -> Option<String> {
    let brokers = std::env::var("SEALPOST_TEST_KAFKA").ok().filter(|brokers| !brokers.is_empty());
    if brokers.is_none() {
        println!("skipped: SEALPOST_TEST_KAFKA does not name a Kafka cluster; `make test-cluster` starts one and runs this");
    }
    brokers
}

struct Outcome {
    ok: bool,
    out: String,
    err: String,
}

/// The binary, as operators run it; the prefix comes as a variable.
fn topology(options: &KafkaOptions, arguments: &[&str]) -> Outcome {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealpost"));
    command.arg("topology").args(arguments).args(["--kafka", &options.brokers]).env("SEALPOST_KAFKA__PREFIX", &options.prefix);
    let output = command.output().expect("the binary runs");
    Outcome {
        ok: output.status.success(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn planned_applied_checked_and_mended() {
    let Some(brokers) = brokers() else { return };
    let copies = if brokers.contains(',') { 3 } else { 1 };
    let mut options = KafkaOptions::new(brokers);
    options.prefix = format!("test-{}-", EdgeId::random(&SystemRandom));

    let plan = topology(&options, &["plan", "--cql", "ignored:9042"]);
    assert!(plan.ok, "{}", plan.err);
    for topic in Topic::ON_CLUSTER {
        assert!(plan.out.contains(&format!("+ {}  (", topic.name())), "{}", plan.out);
    }
    assert!(describe_topics(&options).await.expect("described").topics.is_empty(), "a plan changes nothing");
    let check = topology(&options, &["check"]);
    assert!(!check.ok && check.err.contains("differs"), "{}{}", check.out, check.err);

    let apply = topology(&options, &["apply"]);
    assert!(apply.ok && apply.out.contains("nothing differs any more"), "{}{}", apply.out, apply.err);
    let again = topology(&options, &["apply"]);
    assert!(again.ok && again.out.contains("Nothing differs."), "applied twice is applied once: {}{}", again.out, again.err);
    assert!(topology(&options, &["check"]).ok);
    let found = describe_topics(&options).await.expect("described");
    for (topic, partitions) in Topic::ON_CLUSTER.into_iter().zip([16, 16, 16, 4, 16, 1]) {
        let one = found.topics.iter().find(|one| one.topic == topic).expect("made");
        assert_eq!((one.partitions, one.replication, one.under_replicated, one.leaderless), (partitions, copies, 0, 0), "{topic:?}");
        assert_eq!(one.overrides.get("cleanup.policy").map(String::as_str), Some("delete"));
        assert_eq!(one.overrides.get("min.insync.replicas").map(String::as_str), Some(if copies == 3 { "2" } else { "1" }));
    }
    // What was made is what a broker needs.
    KafkaLog::open(options.clone()).await.expect("opens").close().await;

    // Drift is shown, and mended; what the file does not name stays.
    let drift = [("retention.ms".to_owned(), "60000".to_owned()), ("flush.messages".to_owned(), "1".to_owned())];
    alter_settings(&options, &[(Topic::Push, drift.to_vec())]).await.expect("altered");
    let plan = wait_for(|| topology(&options, &["plan"]), |plan| plan.out.contains("~ push"));
    assert!(plan.ok && plan.out.contains("~ retention.ms = 60000 (1 m) -> 300000 (5 m)"), "{}{}", plan.out, plan.err);
    assert!(plan.out.contains("= inbox, groups, directory, metadata, layout  as wanted"), "{}", plan.out);
    assert!(!topology(&options, &["check"]).ok);
    let json = topology(&options, &["apply", "--json"]);
    let report: Value = serde_json::from_str(&json.out).expect("one JSON object");
    assert!(json.ok && report["applied"] == true && report["clean"] == true, "{}{}", json.out, json.err);
    assert_eq!(report["topics"][4]["settings"][0]["to"], "300000");
    assert!(topology(&options, &["check"]).ok);
    let found = describe_topics(&options).await.expect("described");
    assert_eq!(found.topics[4].overrides.get("flush.messages").map(String::as_str), Some("1"));

    // Numbers of partitions are shown and left alone.
    let dir = tempfile::tempdir().expect("a folder");
    let file = dir.path().join("topics.toml");
    let text = include_str!("../topology/topics.toml").replacen("partitions = 16", "partitions = 64", 1);
    std::fs::write(&file, text).expect("writes");
    let file = file.to_str().expect("a text");
    let scaled = topology(&options, &["apply", "--file", file]);
    assert!(!scaled.ok && scaled.out.contains("16 partitions, not 64") && scaled.out.contains("topology scale"), "{}", scaled.out);
    assert_eq!(describe_topics(&options).await.expect("described").topics[0].partitions, 16);

    delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
}

/// Brokers show what they were told a moment later.
fn wait_for(run: impl Fn() -> Outcome, until: impl Fn(&Outcome) -> bool) -> Outcome {
    for _ in 0..20 {
        let outcome = run();
        if until(&outcome) {
            return outcome;
        }
        std::thread::sleep(std::time::Duration::from_millis(200));
    }
    run()
}

#[test]
fn what_is_missing_is_said() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port");
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_sealpost")).args(arguments).env_clear().output().expect("the binary runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let error = run(&["topology", "plan"]);
    assert!(error.contains("--kafka HOSTS"), "{error}");
    let error = run(&["topology", "plan", "--kafka", &free.to_string()]);
    assert!(error.contains(&free.to_string()) && error.contains("check the addresses"), "{error}");
    let error = run(&["topology", "plan", "--kafka", "k:1", "--file", "/nonexistent"]);
    assert!(error.contains("/nonexistent"), "{error}");
}
