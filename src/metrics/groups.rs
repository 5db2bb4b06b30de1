//! Figures of groups.

use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use super::{HANDLES, add};

/// What groups count.
pub(super) struct Groups {
    pushed: Counter,
    feed_cuts: Counter,
    events: Counter,
    commits: [Counter; 2],
    checking: Histogram,
    applying: Histogram,
    states: Counter,
    state_bytes: Counter,
    in_memory: Gauge,
    in_memory_bytes: Gauge,
}

impl Groups {
    pub(super) fn new() -> Self {
        Self {
            pushed: counter!("sealpost_groups_pushed_total"),
            feed_cuts: counter!("sealpost_groups_feed_cuts_total"),
            events: counter!("sealpost_groups_events_total"),
            commits: ["accepted", "refused"].map(|outcome| counter!("sealpost_groups_commits_total", "outcome" => outcome)),
            checking: histogram!("sealpost_groups_checking_seconds"),
            applying: histogram!("sealpost_groups_applying_seconds"),
            states: counter!("sealpost_groups_states_total"),
            state_bytes: counter!("sealpost_groups_state_bytes_total"),
            in_memory: gauge!("sealpost_groups_in_memory"),
            in_memory_bytes: gauge!("sealpost_groups_in_memory_bytes"),
        }
    }
}

/// What each of them is.
pub(super) fn describe() {
    describe_counter!("sealpost_groups_pushed_total", "Items of groups handed to streams that follow them, once for each stream");
    describe_counter!("sealpost_groups_feed_cuts_total", "Times that items of groups were dropped because the client did not keep up");
    describe_counter!("sealpost_groups_events_total", "Events of groups applied");
    describe_counter!("sealpost_groups_commits_total", "Commits of groups, by what became of them");
    describe_histogram!("sealpost_groups_checking_seconds", "Checking the commits of one slice of a batch");
    describe_histogram!("sealpost_groups_applying_seconds", "Applying, writing and telling a batch of events of groups");
    describe_counter!("sealpost_groups_states_total", "States of groups put on the log, from which a view made anew begins");
    describe_counter!("sealpost_groups_state_bytes_total", "Their bytes");
    describe_gauge!("sealpost_groups_in_memory", "Groups in this projector's memory");
    describe_gauge!("sealpost_groups_in_memory_bytes", "What they cost");
}

/// So many items of groups were handed to streams, each counted for each stream.
pub fn observe_group_pushed(count: u64) {
    if let Some(h) = HANDLES.get() {
        h.groups.pushed.increment(count);
    }
}

/// Items of groups were dropped for one stream.
pub fn observe_group_feed_cut() {
    if let Some(h) = HANDLES.get() {
        h.groups.feed_cuts.increment(1);
    }
}

/// Events of groups were applied, written and told.
pub fn observe_group_events(events: u64, elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.groups.events.increment(events);
        h.groups.applying.record(elapsed.as_secs_f64());
    }
}

/// Commits of groups were checked.
pub fn observe_group_commits(accepted: u64, refused: u64, elapsed: Duration) {
    if let (Some(h), true) = (HANDLES.get(), accepted + refused > 0) {
        add(&h.groups.commits, 0, accepted);
        add(&h.groups.commits, 1, refused);
        h.groups.checking.record(elapsed.as_secs_f64());
    }
}

/// A group's state is put on the log.
pub fn observe_group_state(bytes: usize) {
    if let Some(h) = HANDLES.get() {
        h.groups.states.increment(1);
        h.groups.state_bytes.increment(bytes as u64);
    }
}

/// How many groups a projector has in memory, and what they cost.
pub fn observe_groups_in_memory(groups: usize, bytes: usize) {
    if let Some(h) = HANDLES.get() {
        h.groups.in_memory.set(groups as f64);
        h.groups.in_memory_bytes.set(bytes as f64);
    }
}
