//! `sealpost load groups` against a broker: its figures are the broker's, and its audit is clean where nothing is wrong.

use std::process::Stdio;

use sealpost::testing::Broker;
use serde_json::Value;

async fn load(url: &str, more: &[&str]) -> Value {
    let common = ["load", "groups", "--server", url, "--members", "8", "--seconds", "3", "--rate", "40", "--json"];
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
    let mut broker = Broker::start().await.expect("the broker starts");
    for (readers, more) in [
        (1, &["--opaque", "--online", "6"][..]),
        // The member that is taken out and comes back is offline here.
        (3, &["--readers", "3", "--online", "6", "--ops", "2"]),
        // And online here, and reads as all others do.
        (8, &["--ops", "2"]),
    ] {
        let report = load(broker.url(), more).await;
        let number = |name: &str| report[name].as_f64().unwrap_or_else(|| panic!("no {name} in {report}"));
        for zero in ["lost", "duplicates", "forks", "unanswered", "undecryptable", "unread", "leaked", "refused"] {
            assert_eq!(number(zero), 0.0, "{zero} in {report}");
        }
        let accepted = number("accepted");
        assert!(accepted > 50.0, "{report}");
        assert_eq!(number("readers"), f64::from(readers), "{report}");
        assert!(number("create_ms") > 0.0 && number("op_server_p99_ms") > 0.0 && number("op_seen_p99_ms") > 0.0, "{report}");
        let kinds = ["update", "remove", "add"].map(|kind| report["op_kinds"][kind]["count"].as_f64().unwrap_or_default());
        assert!(kinds.iter().all(|&count| count >= 1.0), "{report}");
        assert_eq!(kinds.iter().sum::<f64>(), number("ops"), "{report}");
        match readers {
            8 => {
                assert!(number("deliveries") <= accepted * 8.0, "{report}");
                // Each message is for all but its sender, and for the guest while it is in.
                assert!(number("decrypted") >= accepted * 6.0, "{report}");
            }
            _ => {
                assert_eq!(number("deliveries"), accepted * 6.0, "{report}");
                assert_eq!(number("decrypted"), accepted * f64::from(readers - 1), "{report}");
            }
        }
    }
    broker.stop().await;
}
