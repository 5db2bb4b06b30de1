//! `sealpost load groups` against a broker: its figures are the broker's, and its audit is clean where nothing is wrong.

use std::process::Stdio;

use sealpost::config::Config;
use sealpost::server::Broker;
use serde_json::Value;

async fn load(url: &str, more: &[&str]) -> Value {
    let common = ["load", "groups", "--server", url, "--members", "8", "--online", "6", "--seconds", "3", "--rate", "40", "--json"];
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_sealpost"))
        .args(common)
        .args(more)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .expect("it runs");
    let (out, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{out}\n{errors}");
    serde_json::from_str(&out).expect("one JSON object")
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_gets_every_message_and_every_change() {
    let dir = tempfile::tempdir().expect("a folder");
    let config = Config { data: dir.path().join("data"), listen: ([127, 0, 0, 1], 0).into(), dev: Some(true), ..Config::default() };
    let broker = Broker::start(config).await.expect("the broker starts");
    for more in [&["--opaque"][..], &["--readers", "3", "--change-every", "0.5"]] {
        let report = load(&broker.url(), more).await;
        let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("no {name} in {report}"));
        for zero in ["lost", "duplicates", "forks", "unanswered", "undecryptable", "refused"] {
            assert_eq!(number(zero), 0.0, "{zero} in {report}");
        }
        let accepted = number("accepted");
        assert!(accepted > 50.0, "{report}");
        assert_eq!(number("deliveries"), accepted * 6.0, "{report}");
        assert!(number("create_ms") > 0.0 && number("ops") > 0.0 && number("op_seen_p99_ms") > 0.0, "{report}");
        if more[0] == "--readers" {
            assert!(number("decrypted") > accepted, "two of three readers decrypt each: {report}");
        }
    }
    broker.stop().await;
}
