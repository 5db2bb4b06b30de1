//! Dashboards and alerts speak of figures that exist: every metric, label and value in them is in the scrape of a broker, and every alert
//! names a section of the operator's guide.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::StatusCode;
use serde_json::Value;
use support::TestBroker;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

fn at(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn read(path: &str) -> String {
    std::fs::read_to_string(at(path)).expect(path)
}

fn yaml(path: &str) -> Value {
    serde_yaml_ng::from_str(&read(path)).expect(path)
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn dashboards() -> Vec<(String, Value)> {
    let files = std::fs::read_dir(at("topology/grafana/dashboards")).expect("a folder").map(|file| file.expect("a file").path());
    let parse = |path: PathBuf| {
        let dashboard = serde_json::from_str(&std::fs::read_to_string(&path).expect("readable")).expect("JSON");
        (path.file_name().expect("a name").to_string_lossy().into_owned(), dashboard)
    };
    files.map(parse).collect()
}

fn alerts() -> Vec<Value> {
    let rules = yaml("topology/alerts.yml");
    array(&rules["groups"]).iter().flat_map(|group| array(&group["rules"])).cloned().collect()
}

/// Where each expression stands, and the expression.
fn expressions() -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (file, dashboard) in dashboards() {
        for panel in array(&dashboard["panels"]) {
            for target in array(&panel["targets"]) {
                all.push((format!("{file}, {}", text(&panel["title"])), text(&target["expr"]).to_owned()));
            }
        }
        for variable in array(&dashboard["templating"]["list"]) {
            all.push((format!("{file}, {}", text(&variable["name"])), text(&variable["definition"]).to_owned()));
        }
    }
    all.extend(alerts().iter().map(|alert| (text(&alert["alert"]).to_owned(), text(&alert["expr"]).to_owned())));
    all
}

/// Every name of a series with the values of its labels.
fn scraped(metrics: &str) -> BTreeMap<&str, BTreeSet<(&str, &str)>> {
    let mut series: BTreeMap<&str, BTreeSet<(&str, &str)>> = BTreeMap::new();
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let Some(end) = line.find(['{', ' ']) else { continue };
        let labels = line[end..].strip_prefix('{').and_then(|rest| rest.split_once('}')).map_or("", |(labels, _)| labels);
        let pairs = labels.split(',').filter_map(|pair| pair.split_once('=')).map(|(label, value)| (label, value.trim_matches('"')));
        series.entry(&line[..end]).or_default().extend(pairs);
    }
    series
}

/// The metrics of an expression, each with its matchers: label and value.
fn used(expression: &str) -> Vec<(&str, Vec<(&str, &str)>)> {
    let mut all = Vec::new();
    let mut rest = expression;
    while let Some(begin) = rest.find("sealpost_") {
        let name = &rest[begin..];
        let end = name.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(name.len());
        let (name, behind) = name.split_at(end);
        rest = behind;
        let matchers = behind.strip_prefix('{').and_then(|inside| inside.split_once('}')).map_or("", |(matchers, _)| matchers);
        let pairs = matchers.split(", ").filter_map(|one| one.split_once('=')).flat_map(|(label, value)| {
            let values = value.trim_start_matches('~').trim_matches('"');
            values.split('|').map(move |value| (label.trim_end_matches('!'), value))
        });
        all.push((name, pairs.collect()));
    }
    all
}

/// The labels that an expression sums by.
fn grouped_by(expression: &str) -> Vec<&str> {
    let lists = expression.split("by (").skip(1).filter_map(|rest| rest.split_once(')'));
    lists.flat_map(|(labels, _)| labels.split(", ")).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_figure_of_dashboards_and_alerts_exists() {
    let broker = TestBroker::start().await;
    let (alice, bob) = (broker.register("alice@local").await, broker.register("bob@local").await);
    let mut request = broker.url("/v1/stream").replace("http://", "ws://").into_client_request().expect("a request");
    request.headers_mut().insert("authorization", format!("Bearer {}", bob.credential).parse().expect("a value"));
    let mut stream = tokio_tungstenite::connect_async(request).await.expect("opens").0;
    stream.next().await.expect("a hello").expect("a message");
    broker.send(&alice, &[&bob], 1, b"hello").await.expect(StatusCode::OK);
    let written = async {
        loop {
            let metrics = broker.http.get(broker.url("/metrics")).send().await.expect("an answer").text().await.expect("a text");
            let live = metrics.lines().find_map(|line| line.strip_prefix("sealpost_delivery_live_seconds_count "));
            if live.is_some_and(|count| count != "0") {
                return metrics;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let metrics = tokio::time::timeout(Duration::from_secs(10), written).await.expect("the message is written to the stream");

    drop(stream);
    let series = scraped(&metrics);
    let labels: BTreeSet<&str> = series.values().flatten().map(|(label, _)| *label).collect();
    // These Prometheus adds itself.
    let added = ["instance", "role", "job"];
    let mut wrong = Vec::new();
    for (place, expression) in expressions() {
        for (name, matchers) in used(&expression) {
            let Some(values) = series.get(name) else {
                wrong.push(format!("{place}: nothing is called {name}"));
                continue;
            };
            let unknown = matchers.iter().filter(|(label, _)| !added.contains(label)).filter(|pair| !values.contains(*pair));
            wrong.extend(unknown.map(|(label, value)| format!("{place}: {name} has no {label} {value}")));
        }
        let unknown = grouped_by(&expression).into_iter().filter(|label| !labels.contains(label) && !added.contains(label));
        wrong.extend(unknown.map(|label| format!("{place}: no label {label}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    let value = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse::<f64>().ok());
    let (owned, wanted) = (value("sealpost_projector_owned_partitions"), value("sealpost_projector_partitions"));
    assert!(owned == wanted && owned > Some(0.0), "every partition has an owner: {owned:?} of {wanted:?}");
    assert!(value("sealpost_disk_free_bytes") > Some(0.0) && value("sealpost_disk_free_bytes") < value("sealpost_disk_total_bytes"));
    assert_eq!(value("sealpost_log_under_replicated_partitions"), Some(0.0));
    broker.stop().await;
}

#[test]
fn dashboards_are_whole() {
    let all = dashboards();
    let mut ids = BTreeSet::new();
    for (file, dashboard) in &all {
        assert!(ids.insert(text(&dashboard["uid"])), "{file}: the uid is taken");
        for panel in array(&dashboard["panels"]) {
            let title = text(&panel["title"]);
            assert!(!title.is_empty() && panel["gridPos"]["w"].as_u64().is_some_and(|w| w <= 24), "{file}: {title}");
            assert_eq!(array(&panel["targets"]).is_empty(), panel["type"] == "row", "{file}: {title}");
        }
    }
    let home = yaml("docker-compose.yml");
    let home = text(&home["services"]["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]);
    assert!(all.iter().any(|(file, _)| home.ends_with(&format!("/{file}"))), "{home}");
    let sources = yaml("topology/grafana/provisioning/datasources/prometheus.yml");
    let source = &sources["datasources"][0]["uid"];
    for (file, dashboard) in &all {
        for panel in array(&dashboard["panels"]).iter().filter(|panel| panel["type"] != "row") {
            assert_eq!(&panel["datasource"]["uid"], source, "{file}");
        }
    }
}

#[test]
fn every_alert_says_what_to_do() {
    let guide = read("docs/operations.md");
    let anchors: BTreeSet<String> = guide
        .lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| line.trim_start_matches('#').trim().to_lowercase().replace(' ', "-"))
        .collect();
    let all = alerts();
    for alert in &all {
        let name = text(&alert["alert"]);
        assert!(["critical", "warning"].contains(&text(&alert["labels"]["severity"])), "{name}");
        assert!(text(&alert["annotations"]["summary"]).len() > 20, "{name}");
        let runbook = text(&alert["annotations"]["runbook_url"]);
        let (document, section) = runbook.split_once('#').expect("a section");
        assert_eq!((document, section), ("docs/operations.md", name.to_lowercase().as_str()), "{name}");
        assert!(anchors.contains(section), "docs/operations.md has no section {name}");
    }
    // And the other way round: no section about an alert that is gone.
    let sections =
        guide.lines().filter_map(|line| line.strip_prefix("### ")).filter(|name| name.contains("Sealpost") || name.contains("Node"));
    for section in sections {
        assert!(all.iter().any(|alert| text(&alert["alert"]) == section), "{section}");
    }

    let files = yaml("topology/prometheus.yml");
    assert_eq!(text(&files["rule_files"][0]), "alerts.yml");
    let compose = yaml("docker-compose.yml");
    let mounted =
        array(&compose["services"]["prometheus"]["volumes"]).iter().any(|volume| text(volume).starts_with("./topology/alerts.yml:"));
    assert!(mounted, "docker-compose.yml gives Prometheus the rules");
}
