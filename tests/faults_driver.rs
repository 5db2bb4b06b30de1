//! `topology/faults` in the parts that need no cluster: it starts, and it reads the load tool's record as the server would.

use std::process::Command;

use sealpost::ids::{AccountId, Partition};

fn python(args: &[&str]) -> Option<String> {
    let output = match Command::new("python3").args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output() {
        Ok(output) => output,
        Err(error) => {
            println!("skipped: topology/faults needs python3: {error}");
            return None;
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn it_lists_every_kind_of_fault() {
    let Some(list) = python(&["topology/faults", "list"]) else { return };
    for kind in ["kill", "stop"] {
        for process in ["projector", "edge", "broker", "cassandra"] {
            assert!(list.contains(&format!("{kind}-{process}")), "{kind}-{process} in {list}");
        }
    }
    for name in ["churn", "kafka-away", "disk-full", "two-edges", "rebalance"] {
        assert!(list.contains(name), "{name} in {list}");
    }
}

#[test]
fn accounts_stand_where_the_server_puts_them() {
    let accounts: Vec<AccountId> = (0..32).map(|byte| AccountId::from_bytes([byte; 16])).collect();
    let listed = accounts.iter().map(AccountId::to_string).collect::<Vec<_>>().join(",");
    let program = "import sys; sys.dont_write_bytecode = True; sys.path.insert(0, 'topology'); import record; print([record.partition(a, 64) for a in sys.argv[1].split(',')])";
    let Some(found) = python(&["-c", program, &listed]) else { return };
    let expected: Vec<u16> = accounts.iter().map(|account| Partition::of(account, 64).0).collect();
    assert_eq!(found.trim(), format!("{expected:?}"));
}

#[test]
fn a_fault_is_felt_until_the_last_slow_one_arrived() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let file = dir.path().join("record");
    // Before the fault at 10 s, in it, behind its end at 20 s, and a fast one at last.
    std::fs::write(&file, "d,1000.0,3000.0,x\na,11000.0,2500.0,x\nd,11000.0,14000.0,x\nd,30000.0,900.0,x\n").expect("written");
    let program = "import sys; sys.dont_write_bytecode = True; sys.path.insert(0, 'topology'); import record; print(record.disturbance(sys.argv[1], 10, 20))";
    let Some(found) = python(&["-c", program, file.to_str().expect("text")]) else { return };
    assert_eq!(found.trim(), "{'accepted_slow_until_s': 3.5, 'delivered_slow_until_s': 15.0, 'recovered_after_end_s': 5.0}");
}
