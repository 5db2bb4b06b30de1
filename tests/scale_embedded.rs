//! The partitions of an embedded broker are scaled while messages flow. The call is killed half-way and called again, the broker is
//! killed in the middle, devices come and go; the audit is the load tool's: nothing lost, nothing twice, order kept.

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use sealpost::cli::child::BrokerProcess;
use sealpost::cli::load::{Plan, Progress, Report, on_own_thread, traffic};
use serde_json::Value;
use tokio::task::JoinHandle;

const PROGRAM: &str = env!("CARGO_BIN_EXE_sealpost");

async fn broker(folder: &Path) -> BrokerProcess {
    BrokerProcess::start(Path::new(PROGRAM), &folder.join("data"), &folder.join("log")).await.expect("the broker starts")
}

fn call(data: &Path, arguments: &[&str]) -> Child {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).arg("--data").arg(data).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("the binary runs")
}

async fn output(call: Child) -> Output {
    tokio::task::spawn_blocking(move || call.wait_with_output()).await.expect("no panic").expect("it ends")
}

fn scale(data: &Path, partitions: u16) -> Child {
    call(data, &["topology", "scale", "--json", "--partitions", &partitions.to_string()])
}

async fn json(call: Child) -> Value {
    let output = output(call).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report = serde_json::from_slice(&output.stdout).expect("one JSON object");
    println!("{report}");
    report
}

struct Load {
    stop: Arc<AtomicBool>,
    running: JoinHandle<anyhow::Result<Report>>,
}

impl Load {
    fn start(broker: &BrokerProcess, devices: usize, rate: Option<f64>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut plan = Plan::new(broker.url());
        (plan.senders, plan.recipients, plan.peers, plan.window, plan.payload) = (devices, devices, devices, 16, 200);
        (plan.length, plan.grace, plan.stop) = (Duration::from_secs(24 * 3600), Duration::from_secs(60), Some(stop.clone()));
        plan.rate = rate;
        let running = tokio::spawn(on_own_thread(move || traffic::run(plan, Progress::quiet())));
        Self { stop, running }
    }

    async fn audit(self, what: &str) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let report = self.running.await.expect("the load's task").expect("the load ends with a report");
        println!(
            "{what}: accepted {}, delivered {}, redelivered {}, slowest to be accepted {:?} ms, slowest to be delivered {:?} ms",
            report.accepted, report.delivered, report.redelivered, report.accepted_max_ms, report.max_ms
        );
        assert!(report.accepted > 300, "too little traffic to say anything: {}", report.accepted);
        assert!(report.clean() && report.gaps == 0 && report.accepted == report.delivered, "{what}: {report:?}");
        report
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitions_are_scaled_under_load() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let broker = broker(folder.path()).await;
    let data = broker.data().to_owned();
    let socket = std::fs::metadata(data.join("control.sock")).expect("there is a socket");
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);

    let load = Load::start(&broker, 12, Some(300.0));
    tokio::time::sleep(Duration::from_secs(4)).await;
    let mut killed = scale(&data, 64);
    tokio::time::sleep(Duration::from_millis(150)).await;
    // It may be over by now.
    let _ = killed.kill();
    killed.wait().expect("it is gone");
    let others = Load::start(&broker, 4, Some(100.0));
    let scaled = json(scale(&data, 64)).await;
    for (name, value) in [("partitions", 64), ("first", 16), ("generation", 1), ("topic_partitions", 80), ("retired", 16)] {
        assert_eq!(scaled[name], value, "{name}");
    }
    let again = json(scale(&data, 64)).await;
    assert_eq!((&again["changed"], &again["generation"]), (&Value::from(false), &Value::from(1)));
    tokio::time::sleep(Duration::from_secs(4)).await;
    let report = others.audit("devices that came while partitions were scaled").await;
    assert_eq!(report.reconnects, 0);
    // Fewer, too.
    let scaled = json(scale(&data, 6)).await;
    assert_eq!((&scaled["first"], &scaled["retired"], &scaled["topic_partitions"]), (&80.into(), &80.into(), &86.into()));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let report = load.audit("16 partitions became 64, then 6").await;
    assert!(report.accepted_max_ms < Some(2_000.0) && report.reconnects == 0 && report.refused.is_empty(), "{report:?}");

    // What the last devices acknowledged is still on its way.
    let mut status = Value::Null;
    for _ in 0..50 {
        status = json(call(&data, &["status", "--interval", "0.2", "--json"])).await;
        if status["pending"]["items"] == 0 {
            break;
        }
    }
    assert_eq!((&status["ready"], &status["inbox"]["partitions"], &status["pending"]["items"]), (&true.into(), &6.into(), &0.into()));
    assert!(
        status["pending"]["inboxes"].as_u64() >= Some(16) && status["partitions"].as_array().map(Vec::len) == Some(86 + 16 + 16),
        "{status}"
    );
    let text = output(call(&data, &["status", "--interval", "0.2"])).await;
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("6 partitions of inbox (80 to 85, generation 2)") && text.contains("pending: 0 items"), "{text}");
    assert!(output(call(&data, &["topology", "check"])).await.status.success());
    let plan = json(call(&data, &["topology", "plan", "--json"])).await;
    assert_eq!((&plan["clean"], &plan["inbox"]["generation"]), (&true.into(), &2.into()));
    let refused = output(call(&data, &["topology", "scale", "--partitions", "1000"])).await;
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("1024"), "{refused:?}");
    drop(broker);
    let nobody = output(call(&data, &["status"])).await;
    assert!(String::from_utf8_lossy(&nobody.stderr).contains("no broker runs in"), "{nobody:?}");
}

/// kill -9 of the broker at any moment of a change, again and again. Repeat a run with `SEALPOST_TEST_SEED`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broker_that_is_killed_in_the_middle_goes_on_where_it_was() {
    let seed = std::env::var("SEALPOST_TEST_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or_else(|| rand::rng().random());
    println!("SEALPOST_TEST_SEED={seed}");
    let mut random = StdRng::seed_from_u64(seed);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut broker = broker(folder.path()).await;
    let data = broker.data().to_owned();
    let load = Load::start(&broker, 8, None);
    tokio::time::sleep(Duration::from_secs(3)).await;
    let mut first = 16;
    for (at, count) in [64, 24, 80, 7, 33].into_iter().enumerate() {
        let mut killed = scale(&data, count);
        tokio::time::sleep(Duration::from_millis(random.random_range(0..700))).await;
        broker.kill9();
        let _ = killed.kill();
        killed.wait().expect("it is gone");
        broker.restart().await.expect("the broker starts again");
        if random.random_ratio(1, 2) {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..300))).await;
            broker.kill9();
            broker.restart().await.expect("the broker starts again");
        }
        let scaled = json(scale(&data, count)).await;
        assert_eq!((&scaled["generation"], &scaled["partitions"]), (&Value::from(at + 1), &Value::from(count)));
        assert_eq!((&scaled["first"], &scaled["retired"]), (&Value::from(first), &Value::from(first)));
        first += count;
        tokio::time::sleep(Duration::from_millis(random.random_range(200..1_000))).await;
    }
    load.audit("the broker was killed within five changes").await;
}
