//! Who may import whom, checked by reading the sources: the seams of the design are only seams while nobody reaches across.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Everything that no layer may import from itself or from above: module → the modules of this crate it may name.
/// A module that is not listed may import anything that is not forbidden below.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("ids", &["limits", "clock"]),
    ("limits", &[]),
    ("clock", &["ids", "limits"]),
    ("wire", &["ids", "limits", "clock"]),
    ("mls", &["ids", "limits", "clock"]),
    ("background", &[]),
    ("log", &["ids", "limits", "clock", "metrics", "background"]),
    ("store", &["ids", "limits", "clock", "wire", "metrics", "background"]),
    ("secret_file", &["clock"]),
    ("waiters", &["limits"]),
    ("metadata", &["ids", "limits", "clock", "wire", "log", "secret_file"]),
    ("client", &["ids", "limits", "clock", "wire", "mls"]),
    ("client/core", &["ids", "limits", "clock", "wire", "mls", "client"]),
];

/// External crates that only these files may name.
const ONLY_THERE: &[(&str, &[&str])] = &[
    ("axum", &["edge", "testing"]),
    ("rdkafka", &["log/kafka"]),
    ("scylla", &["store/cql"]),
    ("fjall", &["store/embedded"]),
    ("opentelemetry", &["traces"]),
    ("opentelemetry_http", &["traces"]),
    ("opentelemetry_otlp", &["traces"]),
    ("opentelemetry_sdk", &["traces"]),
    ("rusqlite", &["client"]),
    ("clap", &["cli", "main", "config"]),
    ("anyhow", &["cli", "main", "testing"]),
];

/// Crates with I/O, time or threads that a pure module must not name.
const IO: &[&str] = &["tokio", "reqwest", "axum", "hyper", "fjall", "rusqlite", "tokio_tungstenite", "rustls", "rustix"];

#[derive(Debug)]
struct Source {
    /// Path below `src` without its ending; `mod.rs` stands for its folder.
    module: String,
    /// Code without comments, strings and test modules.
    code: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

fn sources() -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("the folder is readable") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path).expect("a source is text");
                let relative = path.strip_prefix(root()).expect("below src").with_extension("");
                let module = relative.to_string_lossy().replace('\\', "/");
                let module = module.strip_suffix("/mod").unwrap_or(&module).to_owned();
                // Tests in files of their own may reach anywhere, as those in a module may.
                if module.ends_with("/tests") || module.contains("/tests/") {
                    continue;
                }
                found.push(Source { module, code: production_code(&text) });
            }
        }
    }
    assert!(found.len() > 10, "the sources were found");
    found
}

/// Without comments, string contents and `#[cfg(test)]` modules: tests may reach anywhere.
fn production_code(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '/' if chars.peek() == Some(&'/') => {
                while chars.peek().is_some_and(|&c| c != '\n') {
                    chars.next();
                }
            }
            '/' if chars.peek() == Some(&'*') => {
                let mut last = ' ';
                for c in chars.by_ref() {
                    if last == '*' && c == '/' {
                        break;
                    }
                    last = c;
                }
            }
            // A quote as a character is no string.
            '\'' if chars.clone().take(2).eq("\"'".chars()) => drop((chars.next(), chars.next())),
            '"' => {
                out.push_str("\"\"");
                while let Some(c) = chars.next() {
                    match c {
                        '\\' => drop(chars.next()),
                        '"' => break,
                        _ => {}
                    }
                }
            }
            _ => out.push(c),
        }
    }
    match out.find("#[cfg(test)]\nmod ") {
        Some(at) => out[..at].to_owned(),
        None => out,
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The first path segments that follow `crate::`, also inside `use crate::{a::…, b}`.
fn crate_imports(code: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        if code[..at].ends_with(is_word) || code[..at].ends_with('$') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut word = String::new();
            let mut fresh = true;
            for c in list.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => fresh = true,
                    c if depth == 0 && fresh && is_word(c) => word.push(c),
                    _ => {
                        if !word.is_empty() {
                            fresh = false;
                        }
                    }
                }
                if !fresh || c == ',' {
                    found.extend((!word.is_empty()).then(|| std::mem::take(&mut word)));
                }
            }
            found.extend((!word.is_empty()).then_some(word));
        } else {
            found.insert(rest.chars().take_while(|&c| is_word(c)).collect());
        }
    }
    found.remove("");
    found
}

/// Whether the code names the crate as the start of a path.
fn names_crate(code: &str, name: &str) -> bool {
    code.match_indices(name).any(|(at, _)| {
        let before = &code[..at];
        let after = &code[at + name.len()..];
        let starts = !before.ends_with(is_word) && !before.ends_with("::") && !before.ends_with('.');
        let used = before.trim_end().ends_with("use") && after.trim_start().starts_with([';', ' ']);
        starts && (after.starts_with("::") || used)
    })
}

fn within(module: &str, layer: &str) -> bool {
    module == layer || module.strip_prefix(layer).is_some_and(|rest| rest.starts_with('/'))
}

#[test]
fn layers_import_only_what_is_below_them() {
    let tops: BTreeSet<String> = sources().iter().map(|s| s.module.split('/').next().unwrap_or_default().to_owned()).collect();
    let mut wrong = Vec::new();
    for source in sources() {
        let rule = MAY_IMPORT.iter().filter(|(layer, _)| within(&source.module, layer)).max_by_key(|(layer, _)| layer.len());
        let Some((layer, allowed)) = rule else { continue };
        let own = layer.split('/').next().unwrap_or_default();
        for import in crate_imports(&source.code) {
            if tops.contains(&import) && import != own && !allowed.contains(&import.as_str()) {
                wrong.push(format!("{} imports crate::{import}, but {layer} may import only {allowed:?}", source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn crates_stay_behind_their_seam() {
    let mut wrong = Vec::new();
    for source in sources() {
        for (name, homes) in ONLY_THERE {
            if names_crate(&source.code, name) && !homes.iter().any(|home| within(&source.module, home)) {
                wrong.push(format!("{} names {name}, which only {homes:?} may", source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn pure_modules_do_no_io() {
    let pure = ["wire", "ids", "limits", "projector/apply", "metadata/step", "metadata/record", "client/core"];
    let mut wrong = Vec::new();
    for source in sources() {
        if !pure.iter().any(|layer| within(&source.module, layer)) {
            continue;
        }
        for name in IO {
            if names_crate(&source.code, name) {
                wrong.push(format!("{} names {name}", source.module));
            }
        }
        if within(&source.module, "projector/apply") {
            for word in ["async fn", ".await", "SystemTime", "Instant::now", "rand::", "SystemClock", "SystemRandom"] {
                if source.code.contains(word) {
                    wrong.push(format!("{} has {word}: apply is a pure function of state and event", source.module));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn clock_and_randomness_come_through_their_module() {
    // The load tool and the tests measure with a monotonic clock; a stop-watch is not wall-clock time.
    let mut wrong = Vec::new();
    for source in sources() {
        let exempt = ["clock", "cli", "testing"].iter().any(|home| within(&source.module, home));
        if !exempt && source.code.contains("SystemTime::now") {
            wrong.push(format!("{} reads SystemTime::now", source.module));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_the_composition_root_picks_implementations() {
    // `topology` chooses nothing: it is about Kafka's topics alone.
    let roots = ["server", "testing", "cli", "topology"];
    let mut wrong = Vec::new();
    for source in sources() {
        for (seam, module) in [("log", "log::embedded"), ("log", "log::kafka"), ("store", "store::embedded"), ("store", "store::scylla")] {
            let inside = within(&source.module, seam) || roots.iter().any(|home| within(&source.module, home));
            if !inside && source.code.contains(module) {
                wrong.push(format!("{} names {module}", source.module));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_file_outgrows_a_reader() {
    let mut long = BTreeMap::new();
    for source in sources() {
        let lines = source.code.lines().filter(|line| !line.trim().is_empty()).count();
        if lines > 700 {
            long.insert(source.module, lines);
        }
    }
    assert!(long.is_empty(), "look for a split: {long:?}");
}

#[test]
fn the_reader_of_imports_reads_them() {
    let code = production_code(
        "use crate::log::X; // crate::store::Y\nuse crate::{ids::{A, B}, limits, wire::event::Z};\nlet s = \"crate::edge\";",
    );
    assert_eq!(crate_imports(&code).into_iter().collect::<Vec<_>>(), ["ids", "limits", "log", "wire"]);
    assert!(names_crate("use tokio::net;", "tokio") && names_crate("let x = tokio::spawn(y);", "tokio"));
    assert!(!names_crate("use tokio_util::x;", "tokio") && !names_crate("self.tokio::x", "tokio"));
    assert!(production_code("a\n#[cfg(test)]\nmod tests { use crate::edge; }") == "a\n");
}
