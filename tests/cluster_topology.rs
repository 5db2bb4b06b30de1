//! `sealpost topology` against a real Kafka: an empty cluster gets its topics, drift is shown and mended, nothing is removed.

use std::process::Command;

struct Kafka(String, String);

impl Kafka {
    fn of(test: &str) -> Option<Self> {
        let brokers = std::env::var("SEALPOST_TEST_KAFKA").ok().filter(|brokers| !brokers.is_empty());
        if brokers.is_none() {
            eprintln!("{test}: skipped, since SEALPOST_TEST_KAFKA names no brokers; `make test-cluster` starts some");
        }
        Some(Self(brokers?, format!("topology{}.", std::process::id())))
    }

    /// Runs `sealpost topology …`; whether it succeeded, and what it said.
    fn topology(&self, args: &[&str]) -> (bool, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_sealpost"))
            .arg("topology")
            .args(args)
            .env("SEALPOST_KAFKA__BROKERS", &self.0)
            .env("SEALPOST_KAFKA__PREFIX", &self.1)
            .output()
            .expect("runs");
        let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
        (output.status.success(), text)
    }
}

#[test]
fn an_empty_cluster_is_planned_made_checked_and_mended() {
    let Some(kafka) = Kafka::of("an_empty_cluster_is_planned_made_checked_and_mended") else { return };
    let few = tempfile::NamedTempFile::new().expect("a file");
    // Few partitions: each costs the broker files.
    let text = include_str!("../topology/topics.toml").replace("partitions = 16", "partitions = 2");
    std::fs::write(few.path(), &text).expect("writes");
    let file = few.path().to_str().expect("a name");

    let (ok, plan) = kafka.topology(&["plan", "--file", file]);
    assert!(ok && plan.contains("+ inbox") && plan.contains("5 to change"), "{plan}");
    let (ok, check) = kafka.topology(&["check", "--file", file]);
    assert!(!ok && check.contains("+ push"), "{check}");
    let (ok, applied) = kafka.topology(&["apply", "--file", file]);
    assert!(ok && applied.contains("Done."), "{applied}");
    let (ok, check) = kafka.topology(&["check", "--file", file, "--json"]);
    assert!(ok && check.contains("\"differences\":[]"), "{check}");

    std::fs::write(few.path(), text.replace("7776000000", "86400000").replacen("partitions = 2", "partitions = 3", 1)).expect("writes");
    let (ok, plan) = kafka.topology(&["plan", "--file", file]);
    assert!(ok && plan.contains("~ metadata   retention.ms: 7776000000 -> 86400000") && plan.contains("! inbox"), "{plan}");
    let (ok, applied) = kafka.topology(&["apply", "--file", file]);
    assert!(ok && applied.contains("can't be changed here"), "{applied}");
    let (ok, check) = kafka.topology(&["check", "--file", file]);
    assert!(!ok && !check.contains("retention.ms") && check.contains("! inbox"), "{check}");
}

#[test]
fn a_cluster_that_is_not_there_is_said_with_what_to_do() {
    let output = Command::new(env!("CARGO_BIN_EXE_sealpost")).args(["topology", "plan"]).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("--kafka"), "{text}");
    let output = Command::new(env!("CARGO_BIN_EXE_sealpost")).args(["topology", "check", "--kafka", "127.0.0.1:1"]).output().expect("runs");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && text.contains("Kafka"), "{text}");
}
