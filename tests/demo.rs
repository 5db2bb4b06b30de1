//! `sealpost demo` is a story with figures at its end; they must be the right ones.

use std::process::Command;

#[test]
fn the_story_ends_well() {
    let output = Command::new(env!("CARGO_BIN_EXE_sealpost")).args(["demo", "--json", "--fast"]).output().expect("the demo runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
    let ending: serde_json::Value = serde_json::from_str(&said).expect("one JSON object");
    let number = |name: &str| ending[name].as_u64().unwrap_or(u64::MAX);
    assert_eq!((number("lost"), number("duplicated"), number("kills")), (0, 0, 3), "{ending}");
    assert_eq!(number("delivered"), number("deliveries_expected"), "{ending}");
    assert_eq!((number("texts_sent"), number("caught_up_texts")), (20, 20), "{ending}");
    for place in ["data", "log", "metrics"] {
        assert_eq!(ending[place]["found"], 0, "{ending}");
        assert!(ending[place]["bytes"].as_u64().is_some_and(|bytes| bytes > 100), "{ending}");
    }
}
