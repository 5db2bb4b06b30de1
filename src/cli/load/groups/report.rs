//! What a run with groups found.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering::Relaxed;

use hdrhistogram::Histogram;
use serde::Serialize;

use super::GroupsArgs;
use super::feed::Hall;
use super::ops::{Op, Ops};
use crate::cli::load::meter::Meter;
use crate::metrics::process_usage;

/// What a run found: one JSON object. Scripts depend on the names.
#[derive(Debug, Default, Serialize)]
pub(in crate::cli::load) struct GroupsReport {
    kind: &'static str,
    opaque: bool,
    members: usize,
    online: usize,
    groups: usize,
    /// Members of each group that decrypted and applied all with openmls.
    pub(super) readers: usize,
    payload_bytes: usize,
    rate: f64,
    seconds: f64,
    /// From nothing to all who are online having their Welcome: the slowest group.
    pub(super) create_ms: f64,
    /// Of that, how long the commit that added all took at the server.
    pub(super) invite_server_ms: f64,
    /// Changes made.
    ops: u64,
    /// Of these, how many after the last message: the machine was too slow for them.
    ops_late: u64,
    /// Changes that another one came before.
    op_conflicts: u64,
    op_server_p50_ms: f64,
    op_server_p99_ms: f64,
    op_seen_p50_ms: f64,
    op_seen_p99_ms: f64,
    /// The same by kind: `update`, `remove`, `add`.
    op_kinds: BTreeMap<&'static str, OpFigures>,
    sent: u64,
    accepted: u64,
    refused: u64,
    repeated: u64,
    unanswered: u64,
    messages_per_s: f64,
    deliveries: u64,
    deliveries_per_s: f64,
    latency_p50_ms: f64,
    latency_p99_ms: f64,
    latency_max_ms: f64,
    /// Items of a group that a member did not have in the end.
    pub(super) lost: u64,
    /// Items that a member had twice.
    duplicates: u64,
    /// Readers that are not where the owner is, and items that were not the same for all.
    pub(super) forks: u64,
    decrypted: u64,
    undecryptable: u64,
    /// What readers had not read in the end.
    pub(super) unread: u64,
    /// How long they read on after all was delivered.
    pub(super) read_on_s: f64,
    /// Items that came to a device that had been taken out.
    leaked: u64,
    /// Items that were fetched since the stream did not carry them.
    fetched: u64,
    reconnects: u64,
    server_rss_bytes: Option<u64>,
    server_cpu_seconds: Option<f64>,
    tool_cpu_seconds: Option<f64>,
    tool_rss_bytes: Option<u64>,
}

/// Changes of one kind.
#[derive(Debug, Default, Serialize)]
struct OpFigures {
    count: u64,
    server_p50_ms: f64,
    server_p99_ms: f64,
    seen_p50_ms: f64,
    seen_p99_ms: f64,
}

fn ms(histogram: &Histogram<u64>, quantile: f64) -> f64 {
    histogram.value_at_quantile(quantile) as f64 / 1e3
}

impl GroupsReport {
    /// Whether everybody had everything once.
    pub(in crate::cli::load) fn clean(&self) -> bool {
        let found = [self.lost, self.duplicates, self.forks, self.undecryptable, self.unread, self.leaked, self.unanswered];
        found.iter().all(|&count| count == 0)
    }

    /// One object, as a line or for a person to read.
    pub(in crate::cli::load) fn print(&self, json: bool) -> anyhow::Result<()> {
        println!("{}", if json { serde_json::to_string(self)? } else { serde_json::to_string_pretty(self)? });
        Ok(())
    }

    /// What is not clean.
    pub(in crate::cli::load) fn findings(&self) -> String {
        format!(
            "{} lost, {} duplicates, {} forks, {} undecryptable, {} unread, {} after a removal, {} unanswered",
            self.lost, self.duplicates, self.forks, self.undecryptable, self.unread, self.leaked, self.unanswered
        )
    }

    /// Of a run that has not begun.
    pub(super) fn of(args: &GroupsArgs, readers: usize) -> Self {
        Self {
            kind: "groups",
            opaque: args.opaque,
            members: args.members,
            online: args.online(),
            groups: args.groups,
            readers,
            payload_bytes: args.payload,
            rate: args.rate,
            seconds: args.seconds,
            ..Self::default()
        }
    }

    /// What was reached while messages were sent.
    pub(super) fn rates(&mut self, hall: &Hall, seconds: f64) {
        self.messages_per_s = hall.counters.accepted.get() as f64 / seconds;
        self.deliveries_per_s = hall.counters.deliveries.get() as f64 / seconds;
    }

    /// What was counted in the end.
    pub(super) fn fill(&mut self, hall: &Hall, ops: &Ops, meter: &Meter) {
        let (counters, seen) = (&hall.counters, hall.op_seen.borrow());
        let mut all = [Histogram::new_from(&ops.server[0]), Histogram::new_from(&seen[0])];
        for op in Op::ALL {
            let (server, seen) = (&ops.server[op as usize], &seen[op as usize]);
            // They have the same bounds.
            let _ = (all[0].add(server), all[1].add(seen));
            let figures = OpFigures {
                count: server.len(),
                server_p50_ms: ms(server, 0.5),
                server_p99_ms: ms(server, 0.99),
                seen_p50_ms: ms(seen, 0.5),
                seen_p99_ms: ms(seen, 0.99),
            };
            self.op_kinds.insert(op.name(), figures);
        }
        let [server, seen] = &all;
        (self.ops, self.ops_late, self.op_conflicts) = (server.len(), ops.late, ops.conflicts);
        (self.op_server_p50_ms, self.op_server_p99_ms) = (ms(server, 0.5), ms(server, 0.99));
        (self.op_seen_p50_ms, self.op_seen_p99_ms) = (ms(seen, 0.5), ms(seen, 0.99));
        (self.sent, self.accepted, self.refused) = (counters.sent.get(), counters.accepted.get(), counters.refused.get());
        (self.repeated, self.unanswered) = (counters.repeated.get(), hall.unanswered() as u64);
        self.deliveries = counters.deliveries.get();
        let latency = hall.latency.borrow();
        (self.latency_p50_ms, self.latency_p99_ms) = (ms(&latency, 0.5), ms(&latency, 0.99));
        self.latency_max_ms = latency.max() as f64 / 1e3;
        (self.duplicates, self.leaked) = (counters.duplicates.get(), counters.leaked.get());
        self.forks += counters.different.get();
        (self.decrypted, self.undecryptable) = (hall.desk.decrypted.load(Relaxed), hall.desk.undecryptable.load(Relaxed));
        (self.fetched, self.reconnects) = (counters.fetched.get(), counters.reconnects.get());
        (self.server_rss_bytes, self.server_cpu_seconds) = (meter.resident_bytes(), meter.cpu_seconds());
        let own = process_usage("self");
        self.tool_cpu_seconds = own.as_ref().map(|own| own.cpu_seconds);
        self.tool_rss_bytes = own.map(|own| own.resident_bytes);
    }
}
