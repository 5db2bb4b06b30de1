//! What the README says exists, exists: files, commands, options, make targets.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

fn read(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// The README and the documents that it points to.
fn documents() -> Vec<(String, String)> {
    let readme = read("README.md");
    let docs = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")).into_iter().flatten();
    let docs = docs.map(|entry| format!("docs/{}", entry.unwrap().file_name().to_string_lossy())).filter(|path| path.ends_with(".md"));
    let docs: Vec<_> = docs.map(|path| (path.clone(), read(&path))).collect();
    [("README.md".to_owned(), readme)].into_iter().chain(docs).collect()
}

#[test]
fn paths_lead_somewhere() {
    let mut missing = Vec::new();
    for (document, text) in documents() {
        for path in text.split(['`', '(', ')']) {
            let ours = ["src/", "tests/", "schemas/", "docs/", "benches/", "topology/"].iter().any(|folder| path.starts_with(folder));
            if ours
                && !path.contains([' ', '*', '{'])
                && !Path::new(env!("CARGO_MANIFEST_DIR")).join(path.split('#').next().unwrap()).exists()
            {
                missing.push(format!("{document}: {path}"));
            }
        }
    }
    assert!(missing.is_empty(), "{}", missing.join("\n"));
}

#[test]
fn commands_and_their_options_exist() {
    let mut helps: BTreeMap<Vec<String>, String> = BTreeMap::new();
    let mut seen = 0;
    for (document, text) in documents() {
        for line in text.lines() {
            let line = line.split(" #").next().unwrap();
            let command = line.trim_start().strip_prefix("target/release/").unwrap_or(line.trim_start());
            let Some(arguments) = command.strip_prefix("sealpost ") else { continue };
            let words: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
            let kinds = |of: &str| -> &[&str] {
                match of {
                    "load" => &["idle", "backlog", "bundles", "groups"],
                    "topology" => &["plan", "apply", "check", "scale"],
                    "rebuild" => &["compare"],
                    _ => &[],
                }
            };
            let nested = words.get(1).is_some_and(|word| kinds(&words[0]).contains(&word.as_str()));
            let subcommand = words[..if nested { 2 } else { 1 }].to_vec();
            let help = helps.entry(subcommand.clone()).or_insert_with(|| {
                let output = Command::new(env!("CARGO_BIN_EXE_sealpost")).args(&subcommand).arg("--help").output().unwrap();
                assert!(output.status.success(), "{document}: sealpost {} is no command", subcommand.join(" "));
                String::from_utf8(output.stdout).unwrap()
            });
            for option in words.iter().filter(|word| word.starts_with("--")) {
                let option = option.split('=').next().unwrap();
                assert!(help.contains(option), "{document}: sealpost {} has no {option}", subcommand.join(" "));
                seen += 1;
            }
        }
    }
    assert!(seen > 5, "the README shows commands");
}

#[test]
fn make_targets_exist() {
    let makefile = read("Makefile");
    let targets: Vec<&str> = makefile.lines().filter_map(|line| line.split_once(':').map(|(name, _)| name)).collect();
    let words: Vec<String> =
        documents().iter().flat_map(|(_, text)| text.split(['`', '\n']).map(str::to_owned).collect::<Vec<_>>()).collect();
    for word in words {
        if let Some(target) = word.strip_prefix("make ").and_then(|rest| rest.split_whitespace().next()) {
            assert!(targets.contains(&target), "make {target}");
        }
    }
}

#[test]
fn the_example_configuration_is_accepted() {
    let readme = read("README.md");
    let toml = readme.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sealpost.toml");
    std::fs::write(&path, toml).unwrap();
    let config = sealpost::config::Config::load(Some(&path), []).unwrap();
    config.validate().unwrap();
    assert!(!config.dev_mode(), "with realms, development mode is off");
}
