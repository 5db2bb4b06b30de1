//! `sealpost status` against a real Kafka. Skipped, and said so, unless `SEALPOST_TEST_KAFKA` names one; `make test-cluster` starts it.

use std::process::Command;
use std::time::Duration;

use bytes::Bytes;
use sealpost::clock::SystemRandom;
use sealpost::ids::{EdgeId, Offset, Partition};
use sealpost::log::kafka::{KafkaLog, KafkaOptions, Replicas, create_topics, delete_topics, describe_topics};
use sealpost::log::{Consumed, EventLog as _, Topic, TopicPartition};
use sealpost::topology::Topology;
use serde_json::Value;

fn run(options: &KafkaOptions, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sealpost"));
    command.args(["status", "--interval", "0.2", "--kafka", &options.brokers]).args(arguments);
    command.env("SEALPOST_KAFKA__PREFIX", &options.prefix);
    let output = command.output().expect("the binary runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn owners_lag_and_what_is_wrong() {
    let Some(brokers) = std::env::var("SEALPOST_TEST_KAFKA").ok().filter(|brokers| !brokers.is_empty()) else {
        println!("skipped: SEALPOST_TEST_KAFKA does not name a Kafka cluster; `make test-cluster` starts one and runs this");
        return;
    };
    let mut options = KafkaOptions::new(brokers);
    options.prefix = format!("test-{}-", EdgeId::random(&SystemRandom));
    let status = |arguments: &[&str]| -> Value { serde_json::from_str(&run(&options, arguments)).expect("one JSON object") };

    let empty = status(&["--json"]);
    assert_eq!((empty["healthy"].as_bool(), empty["topics"].as_array().map(Vec::len)), (Some(false), Some(0)));
    assert!(empty["problems"][0].as_str().expect("said").contains("topology apply"), "{empty}");

    let plan = Topology::built_in().compare(&describe_topics(&options).await.expect("described"));
    create_topics(&options, &plan.to_create()).await.expect("topics are made");
    let log = KafkaLog::open(options.clone()).await.expect("opens");
    assert_eq!(log.replicas().await.expect("asked"), Replicas::default(), "every copy and every leader is there");
    let of = TopicPartition { topic: Topic::Inbox, partition: Partition(3) };
    for n in 0..10u8 {
        log.append(of, Bytes::from(vec![n])).await.expect("appended");
    }
    let nobody = status(&["--json", "--process", "http://127.0.0.1:1"]);
    let problems = nobody["problems"].to_string();
    assert!(problems.contains("no projector is alive") && problems.contains("127.0.0.1:1/ is not ready"), "{nobody}");
    assert_eq!(nobody["topics"][0]["lag"], 10);

    let mut groups = log.consumer("groups", &[Topic::Groups]).await.expect("joins");
    while !matches!(groups.next().await.expect("goes on"), Consumed::Assigned(_)) {}
    let mut projector = log.consumer("projector", &[Topic::Inbox, Topic::Directory]).await.expect("joins");
    while !matches!(projector.next().await.expect("goes on"), Consumed::Assigned(partitions) if partitions.contains(&of)) {}
    projector.seek(of, Offset(7)).await.expect("sought");
    projector.commit(of, Offset(7)).await.expect("committed");
    // The commit leaves with the next call.
    let _ = tokio::time::timeout(Duration::from_secs(3), async {
        loop {
            projector.next().await.expect("goes on");
        }
    })
    .await;
    let owned = status(&["--json"]);
    assert_eq!(owned["healthy"], true, "{owned}");
    assert_eq!((&owned["topics"][0]["lag"], &owned["topics"][0]["records"]), (&Value::from(3), &Value::from(10)));
    assert_eq!(owned["projectors"][0]["owns"]["inbox"].as_array().map(Vec::len), Some(16));
    let partition = owned["partitions"].as_array().expect("partitions").iter().find(|one| one["topic"] == "inbox" && one["partition"] == 3);
    let partition = partition.expect("there");
    assert_eq!(
        (&partition["lag"], &partition["trend"], &partition["owner"]),
        (&Value::from(3), &Value::from("steady"), &owned["projectors"][0]["id"])
    );
    let text = run(&options, &[]);
    assert!(text.contains("inbox 0-15") && text.contains("47 partitions are owned and have no lag"), "{text}");
    println!("{text}");

    drop((projector, groups));
    log.close().await;
    delete_topics(&options, &Topic::ON_CLUSTER).await.expect("topics are removed");
}
