//! A fresh broker process with fsync on, and `sealpost load` against it: what the benches of the whole path share.

use std::path::Path;
use std::process::Command;

use sealpost::cli::child::BrokerProcess;

/// Prints the machine, then runs `sealpost load` with each of these arguments against one broker.
pub fn run(what: &str, loads: &[&[&str]]) {
    let program = Path::new(env!("CARGO_BIN_EXE_sealpost"));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{what}: {cores} cores shared with the load generator, embedded profile, fdatasync before each acceptance");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (data, log) = (folder.path().join("data"), folder.path().join("log"));
    let broker = runtime.block_on(BrokerProcess::start(program, &data, &log)).expect("the broker starts");
    for load in loads {
        println!("\n$ sealpost load {}", load.join(" "));
        let status =
            Command::new(program).arg("load").args(*load).arg("--server").arg(broker.url().as_str()).status().expect("the load tool runs");
        assert!(status.success(), "the load tool ended with {status}");
    }
}
