//! What is measured: every name, every label, and the one function that records it.
//!
//! Names are `sealpost_<area>_<what>_<unit>`; labels come from closed enums; no ids, ever. Handles are made once, so that
//! recording costs an atomic addition. Until [`install`] was called nothing is recorded.

use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tokio_util::sync::CancellationToken;

use crate::wire::stream::{CloseReason, Code};
use groups::Groups;

pub use groups::{
    observe_group_commits, observe_group_events, observe_group_feed_cut, observe_group_pushed, observe_group_state,
    observe_groups_in_memory,
};

/// Why a connection was not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The cap on all connections.
    Full,
    /// The cap on one address's connections.
    PerIp,
    /// The TLS handshake failed or took too long.
    Tls,
}

/// Which proof failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// A device credential.
    Device,
    /// A realm token.
    Realm,
}

/// Which rate limit was hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RateScope {
    /// Requests of one address.
    Ip,
    /// Requests of one device.
    Device,
    /// Messages of one device.
    Messages,
    /// Registrations of one address.
    Registrations,
    /// Failed authentications of one address.
    AuthFailures,
    /// Key fetches of one device.
    KeyFetches,
    /// Changes of groups by one device.
    GroupChanges,
}

/// Which one-time prekey.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prekey {
    /// X25519.
    Ec,
    /// Kyber-1024.
    Pq,
    /// MLS KeyPackages.
    KeyPackage,
}

/// What a fetch got of a pool of one-time prekeys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrekeyOutcome {
    /// One, which is gone now.
    Handed,
    /// None: the pool is empty.
    Exhausted,
    /// None: the pool is protected against draining.
    Protected,
}

/// How partitions moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moved {
    /// To this process.
    Assigned,
    /// Away, after it had finished with them.
    Revoked,
    /// Away without asking: it was taken for dead.
    Lost,
}

/// A topic that projectors apply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Applied {
    /// `inbox`.
    Inbox,
    /// `directory`.
    Directory,
    /// `groups`.
    Groups,
}

/// Which call of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreCall {
    /// How far a partition is applied.
    Position,
    /// What a coalescing window changed.
    Write,
    /// Inboxes that a projector does not remember.
    Inboxes,
    /// Marks that a projector does not remember.
    Marks,
    /// A page of pending envelopes.
    Pending,
    /// Inboxes with something that is past its time.
    Expired,
    /// What directory commands changed.
    WriteDirectory,
    /// An account.
    Account,
    /// Whose an identity is.
    Identity,
    /// A device's long-lived prekeys.
    DeviceKeys,
    /// One-time prekeys are stocked.
    OneTimeAdd,
    /// A one-time prekey is taken.
    OneTimeTake,
    /// Reading the first key of a pool.
    OneTimeFirst,
    /// One-time prekeys are counted.
    OneTimeCount,
    /// A device's one-time prekeys go.
    OneTimeRemove,
    /// An identity is claimed or released.
    Claim,
    /// An account's at-rest key is looked up, made or destroyed.
    SealKey,
    /// What events of groups changed.
    WriteGroups,
    /// A group: what it is now, who is in it, which messages it met.
    Group,
    /// A group's public state, info or tree.
    GroupState,
    /// A page of a group's items.
    GroupItems,
    /// The groups of an account.
    GroupsOf,
    /// A page of all groups.
    GroupHeads,
}

macro_rules! labels {
    ($name:ident: $($variant:ident = $text:literal),+ $(,)?) => {
        impl $name {
            const ALL: &'static [(Self, &'static str)] = &[$((Self::$variant, $text)),+];
        }
    };
}
labels!(Refusal: Full = "full", PerIp = "per_ip", Tls = "tls");
labels!(Proof: Device = "device", Realm = "realm");
labels!(RateScope: Ip = "ip", Device = "device", Messages = "messages", Registrations = "registrations", AuthFailures = "auth_failures", KeyFetches = "key_fetches", GroupChanges = "group_changes");
labels!(Prekey: Ec = "ec", Pq = "pq", KeyPackage = "key_package");
labels!(StoreCall: Position = "position", Write = "write", Inboxes = "inboxes", Marks = "marks", Pending = "pending", Expired = "expired", WriteDirectory = "write_directory", Account = "account", Identity = "identity", DeviceKeys = "device_keys", OneTimeAdd = "one_time_add", OneTimeTake = "one_time_take", OneTimeFirst = "one_time_first", OneTimeCount = "one_time_count", OneTimeRemove = "one_time_remove", Claim = "claim", SealKey = "seal_key", WriteGroups = "write_groups", Group = "group", GroupState = "group_state", GroupItems = "group_items", GroupsOf = "groups_of", GroupHeads = "group_heads");
labels!(Applied: Inbox = "inbox", Directory = "directory", Groups = "groups");
labels!(Moved: Assigned = "assigned", Revoked = "revoked", Lost = "lost");
labels!(PrekeyOutcome: Handed = "handed", Exhausted = "exhausted", Protected = "protected");

/// One counter for each value of a label, at the index of the value.
fn family(name: &'static str, label: &'static str, values: impl Iterator<Item = &'static str>) -> Vec<Counter> {
    values.map(|value| counter!(name, label => value)).collect()
}

struct Handles {
    http_requests: Vec<Counter>,
    http_request: Histogram,
    connections: Gauge,
    connections_refused: Vec<Counter>,
    auth_failures: Vec<Counter>,
    rate_limited: Vec<Counter>,
    sends: Vec<Counter>,
    streams: Gauge,
    streams_closed: Vec<Counter>,
    pushed: Counter,
    acked: Counter,
    feed_cuts: Counter,
    groups: Groups,
    bundles: Counter,
    one_time: Vec<Counter>,
    log_commit: Histogram,
    log_records: Counter,
    log_bytes: Counter,
    log_failures: Counter,
    log_unknown: Counter,
    log_queued: Gauge,
    log_consumed: Counter,
    log_moved: Vec<Counter>,
    log_poisoned: Gauge,
    under_replicated: Gauge,
    leaderless: Gauge,
    disk_free: Gauge,
    disk_total: Gauge,
    live: Histogram,
    attach: Histogram,
    pushes: Counter,
    push: Histogram,
    push_delay: Histogram,
    store_call: Vec<Histogram>,
    store_failures: Vec<Counter>,
    applied: Counter,
    apply: Histogram,
    owned: Gauge,
    to_own: Gauge,
    queued_writes: Gauge,
    lag: Vec<Gauge>,
    flush: Histogram,
    flushed: Counter,
    expired: Counter,
    metadata: Counter,
    process_cpu: Gauge,
    process_resident: Gauge,
}

static HANDLES: OnceLock<Handles> = OnceLock::new();
static EXPORTER: OnceLock<PrometheusHandle> = OnceLock::new();

const STATUS_CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];
const CODES: i32 = Code::Internal as i32 + 1;
const CLOSE_REASONS: i32 = CloseReason::ServerFault as i32 + 1;
/// Bounds of the time histograms, in seconds.
const SECONDS: [f64; 14] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

impl Handles {
    fn new() -> Self {
        let code = |n| Code::try_from(n).map_or("", |code| code.as_str_name());
        let reason = |n| CloseReason::try_from(n).map_or("", |reason| reason.as_str_name());
        let pairs = Prekey::ALL.iter().flat_map(|(_, kind)| PrekeyOutcome::ALL.iter().map(move |(_, outcome)| (*kind, *outcome)));
        Self {
            http_requests: family("sealpost_http_requests_total", "status", STATUS_CLASSES.into_iter()),
            http_request: histogram!("sealpost_http_request_seconds"),
            connections: gauge!("sealpost_edge_connections"),
            connections_refused: family("sealpost_edge_connections_refused_total", "reason", Refusal::ALL.iter().map(|v| v.1)),
            auth_failures: family("sealpost_auth_failures_total", "proof", Proof::ALL.iter().map(|v| v.1)),
            rate_limited: family("sealpost_edge_rate_limited_total", "scope", RateScope::ALL.iter().map(|v| v.1)),
            sends: family("sealpost_send_results_total", "code", (0..CODES).map(code)),
            streams: gauge!("sealpost_stream_open"),
            streams_closed: family("sealpost_stream_closed_total", "reason", (0..CLOSE_REASONS).map(reason)),
            pushed: counter!("sealpost_delivery_pushed_total"),
            acked: counter!("sealpost_delivery_acks_total"),
            feed_cuts: counter!("sealpost_delivery_feed_cuts_total"),
            groups: Groups::new(),
            bundles: counter!("sealpost_keys_bundles_total"),
            one_time: pairs.map(|(kind, outcome)| counter!("sealpost_keys_one_time_total", "kind" => kind, "outcome" => outcome)).collect(),
            log_commit: histogram!("sealpost_log_commit_seconds"),
            log_records: counter!("sealpost_log_records_total"),
            log_bytes: counter!("sealpost_log_written_bytes_total"),
            log_failures: counter!("sealpost_log_failures_total"),
            log_unknown: counter!("sealpost_log_unknown_total"),
            log_queued: gauge!("sealpost_log_queued_bytes"),
            log_consumed: counter!("sealpost_log_consumed_records_total"),
            log_moved: family("sealpost_log_partitions_moved_total", "how", Moved::ALL.iter().map(|v| v.1)),
            log_poisoned: gauge!("sealpost_log_poisoned"),
            under_replicated: gauge!("sealpost_log_under_replicated_partitions"),
            leaderless: gauge!("sealpost_log_leaderless_partitions"),
            disk_free: gauge!("sealpost_disk_free_bytes"),
            disk_total: gauge!("sealpost_disk_total_bytes"),
            live: histogram!("sealpost_delivery_live_seconds"),
            attach: histogram!("sealpost_delivery_attach_seconds"),
            pushes: counter!("sealpost_push_items_total"),
            push: histogram!("sealpost_push_handover_seconds"),
            push_delay: histogram!("sealpost_push_delay_seconds"),
            store_call: StoreCall::ALL.iter().map(|v| histogram!("sealpost_store_call_seconds", "call" => v.1)).collect(),
            store_failures: family("sealpost_store_failures_total", "call", StoreCall::ALL.iter().map(|v| v.1)),
            applied: counter!("sealpost_projector_records_total"),
            apply: histogram!("sealpost_projector_apply_seconds"),
            owned: gauge!("sealpost_projector_owned_partitions"),
            to_own: gauge!("sealpost_projector_partitions"),
            queued_writes: gauge!("sealpost_projector_queued_writes"),
            lag: Applied::ALL.iter().map(|(_, topic)| gauge!("sealpost_projector_lag_records", "topic" => *topic)).collect(),
            flush: histogram!("sealpost_projector_flush_seconds"),
            flushed: counter!("sealpost_projector_stored_items_total"),
            expired: counter!("sealpost_projector_expired_inboxes_total"),
            metadata: counter!("sealpost_projector_metadata_records_total"),
            process_cpu: gauge!("sealpost_process_cpu_seconds"),
            process_resident: gauge!("sealpost_process_resident_bytes"),
        }
    }
}

fn describe() {
    groups::describe();
    describe_counter!("sealpost_http_requests_total", "HTTP requests answered, by class of status");
    describe_histogram!("sealpost_http_request_seconds", "From a request's head to its answer's head");
    describe_gauge!("sealpost_edge_connections", "Open connections, streams included");
    describe_counter!("sealpost_edge_connections_refused_total", "Connections that were not served");
    describe_counter!("sealpost_auth_failures_total", "Credentials and tokens that were refused");
    describe_counter!("sealpost_edge_rate_limited_total", "Requests and messages answered with 429");
    describe_counter!("sealpost_send_results_total", "Answers to Send, by HTTP and stream");
    describe_gauge!("sealpost_stream_open", "Open device streams");
    describe_counter!("sealpost_stream_closed_total", "Device streams that ended");
    describe_counter!("sealpost_delivery_pushed_total", "Envelopes and receipts written to streams");
    describe_counter!("sealpost_delivery_feed_cuts_total", "Live feeds that were cut because the client did not keep up");
    describe_counter!("sealpost_delivery_acks_total", "Acknowledgements taken");
    describe_counter!("sealpost_keys_bundles_total", "Key bundles handed out");
    describe_counter!("sealpost_keys_one_time_total", "What bundle fetches got of the pools of one-time prekeys");
    describe_histogram!(
        "sealpost_log_commit_seconds",
        "One group commit of the log, from first write to synced; on Kafka from submitted to acknowledged, the first of each batch"
    );
    describe_counter!("sealpost_log_records_total", "Records made durable");
    describe_counter!("sealpost_log_written_bytes_total", "Bytes made durable");
    describe_counter!("sealpost_log_failures_total", "Writes and syncs, or appends to brokers, that failed");
    describe_counter!("sealpost_log_unknown_total", "Appends whose outcome is unknown, since the brokers did not answer in time");
    describe_gauge!("sealpost_log_queued_bytes", "Bytes that wait for the brokers' acknowledgement");
    describe_counter!("sealpost_log_consumed_records_total", "Records given to this process's consumers");
    describe_counter!("sealpost_log_partitions_moved_total", "Partitions that rebalances gave to and took from this process");
    describe_gauge!("sealpost_log_poisoned", "1 once the log takes nothing more until a restart");
    describe_gauge!("sealpost_log_under_replicated_partitions", "Partitions of which a Kafka broker misses a copy or is behind with it");
    describe_gauge!("sealpost_log_leaderless_partitions", "Partitions that no Kafka broker leads: nothing is appended to them");
    describe_gauge!("sealpost_disk_free_bytes", "What is left on the disk of the data folder for this process");
    describe_gauge!("sealpost_disk_total_bytes", "The size of the disk of the data folder, without what is reserved for the system");
    describe_histogram!(
        "sealpost_delivery_live_seconds",
        "From a message being accepted to its being written to its recipient's open stream, the first of each write; by the two machines' clocks"
    );
    describe_histogram!(
        "sealpost_delivery_attach_seconds",
        "From a stream's attachment being appended to its switch from backlog to live being known"
    );
    describe_counter!("sealpost_push_items_total", "Pushes that the projector handed over: to the sessions, or to topic push");
    describe_histogram!(
        "sealpost_push_handover_seconds",
        "One hand-over of all pushes of a batch; long if the brokers or the edge do not keep up"
    );
    describe_histogram!(
        "sealpost_push_delay_seconds",
        "From a record of topic push being appended by a projector to its being met by the edge, by the two machines' clocks"
    );
    describe_histogram!("sealpost_store_call_seconds", "One call of a store, by its kind; failed ones included");
    describe_counter!("sealpost_store_failures_total", "Calls of a store that failed, by their kind");
    describe_counter!("sealpost_projector_records_total", "Records applied");
    describe_histogram!("sealpost_projector_apply_seconds", "Applying one batch of records and handing its pushes over");
    describe_gauge!("sealpost_projector_owned_partitions", "Partitions that this process's projector owns");
    describe_gauge!("sealpost_projector_partitions", "Partitions that all projectors together should own");
    describe_gauge!("sealpost_projector_queued_writes", "Writes that wait for the store behind the projector, the one under way included");
    describe_gauge!(
        "sealpost_projector_lag_records",
        "Records that are durable and not applied yet, by topic; on a cluster of all partitions, whoever owns them, and counted until the store has them"
    );
    describe_histogram!("sealpost_projector_flush_seconds", "One write of a coalescing window to the store");
    describe_counter!("sealpost_projector_stored_items_total", "Pending items that outlived their window and were stored");
    describe_counter!("sealpost_projector_expired_inboxes_total", "Inboxes of which something expired");
    describe_counter!("sealpost_projector_metadata_records_total", "Records for topic metadata");
    describe_gauge!("sealpost_process_cpu_seconds", "CPU time of this process since it started; grows");
    describe_gauge!("sealpost_process_resident_bytes", "Resident memory of this process");
}

/// Makes the process's recorder, once; later calls get the same one.
pub fn install() -> PrometheusHandle {
    let exporter = EXPORTER.get_or_init(|| {
        let builder = PrometheusBuilder::new();
        let builder =
            builder.set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS).unwrap_or_else(|_| PrometheusBuilder::new());
        let recorder = builder.build_recorder();
        let handle = recorder.handle();
        // An error means that an application around us has a recorder already: then that one records.
        let _ = metrics::set_global_recorder(recorder);
        describe();
        handle
    });
    HANDLES.get_or_init(Handles::new);
    exporter.clone()
}

/// Folds recorded samples away now and then, so that histograms nobody scrapes do not grow; until cancelled.
pub async fn upkeep(until: CancellationToken) {
    let mut ticks = tokio::time::interval(Duration::from_secs(5));
    loop {
        tokio::select! {
            () = until.cancelled() => return,
            _ = ticks.tick() => {}
        }
        if let Some(exporter) = EXPORTER.get() {
            exporter.run_upkeep();
        }
    }
}

/// What a process has used so far.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProcessUsage {
    /// CPU time, of all its threads, in user and kernel mode.
    pub cpu_seconds: f64,
    /// Memory that is resident.
    pub resident_bytes: u64,
}

/// What a process of this machine uses, by its id or `self`; none where there is no Linux `/proc`.
pub fn process_usage(pid: &str) -> Option<ProcessUsage> {
    // USER_HZ is 100 on every Linux that we run on.
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name may hold spaces; fields are counted behind its closing bracket.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11).map(str::parse::<f64>);
    let ticks = fields.next()?.ok()? + fields.next()?.ok()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())?;
    Some(ProcessUsage { cpu_seconds: ticks / TICKS_PER_SECOND, resident_bytes: kib * 1024 })
}

/// Looks at what this process uses; before metrics are rendered.
pub fn observe_process() {
    if let (Some(h), Some(usage)) = (HANDLES.get(), process_usage("self")) {
        h.process_cpu.set(usage.cpu_seconds);
        h.process_resident.set(usage.resident_bytes as f64);
    }
}

/// Looks at the disk of the data folder; before metrics are rendered. Blocks for a moment. A folder that is not there says nothing.
pub fn observe_disk(folder: &Path) {
    if let (Some(h), Ok(disk)) = (HANDLES.get(), rustix::fs::statvfs(folder)) {
        // What is reserved for the system's administrator is not ours: neither free nor a part of the whole, as in `df`.
        let usable = disk.f_blocks.saturating_sub(disk.f_bfree) + disk.f_bavail;
        h.disk_free.set(disk.f_bavail as f64 * disk.f_frsize as f64);
        h.disk_total.set(usable as f64 * disk.f_frsize as f64);
    }
}

/// Adds to the counter at an index; out of range is nothing.
fn add(family: &[Counter], index: usize, count: u64) {
    if let Some(counter) = family.get(index) {
        counter.increment(count);
    }
}

/// An HTTP request was answered.
pub fn observe_request(status: u16, elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        add(&h.http_requests, usize::from(status / 100).wrapping_sub(1), 1);
        h.http_request.record(elapsed.as_secs_f64());
    }
}

/// A connection was taken.
pub fn observe_connection_opened() {
    if let Some(h) = HANDLES.get() {
        h.connections.increment(1.0);
    }
}

/// A connection ended.
pub fn observe_connection_closed() {
    if let Some(h) = HANDLES.get() {
        h.connections.decrement(1.0);
    }
}

/// A connection was not served.
pub fn observe_connection_refused(why: Refusal) {
    if let Some(h) = HANDLES.get() {
        add(&h.connections_refused, why as usize, 1);
    }
}

/// A credential or token was refused.
pub fn observe_auth_failure(proof: Proof) {
    if let Some(h) = HANDLES.get() {
        add(&h.auth_failures, proof as usize, 1);
    }
}

/// A rate limit was hit.
pub fn observe_rate_limited(scope: RateScope) {
    if let Some(h) = HANDLES.get() {
        add(&h.rate_limited, scope as usize, 1);
    }
}

/// So many `Send`s were answered with this code ([`Code::Ok`]: accepted).
pub fn observe_sends(code: Code, count: u64) {
    if let Some(h) = HANDLES.get() {
        add(&h.sends, code as usize, count);
    }
}

/// A device opened a stream.
pub fn observe_stream_opened() {
    if let Some(h) = HANDLES.get() {
        h.streams.increment(1.0);
    }
}

/// A stream ended; [`CloseReason::Unspecified`] if the client went away by itself.
pub fn observe_stream_closed(reason: CloseReason) {
    if let Some(h) = HANDLES.get() {
        h.streams.decrement(1.0);
        add(&h.streams_closed, reason as usize, 1);
    }
}

/// So many items were written to streams.
pub fn observe_pushed(count: u64) {
    if let Some(h) = HANDLES.get() {
        h.pushed.increment(count);
    }
}

/// So many acknowledgements were taken.
pub fn observe_acks(count: u64) {
    if let Some(h) = HANDLES.get() {
        h.acked.increment(count);
    }
}

/// The bundles of so many devices were handed out.
pub fn observe_bundles(count: u64) {
    if let Some(h) = HANDLES.get() {
        h.bundles.increment(count);
    }
}

/// What a fetch got of a pool of one-time prekeys.
pub fn observe_one_time(kind: Prekey, outcome: PrekeyOutcome) {
    if let Some(h) = HANDLES.get() {
        add(&h.one_time, kind as usize * PrekeyOutcome::ALL.len() + outcome as usize, 1);
    }
}

/// The log made so many records durable in one commit.
pub fn observe_log_commit(records: u64, bytes: u64, elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.log_records.increment(records);
        h.log_bytes.increment(bytes);
        h.log_commit.record(elapsed.as_secs_f64());
    }
}

/// A write or sync of the log failed.
pub fn observe_log_failure() {
    if let Some(h) = HANDLES.get() {
        h.log_failures.increment(1);
    }
}

/// The outcome of an append is unknown.
pub fn observe_log_unknown() {
    if let Some(h) = HANDLES.get() {
        h.log_unknown.increment(1);
    }
}

/// So many bytes wait for the brokers.
pub fn observe_log_queued(bytes: usize) {
    if let Some(h) = HANDLES.get() {
        h.log_queued.set(bytes as f64);
    }
}

/// A consumer was given so many records.
pub fn observe_log_consumed(records: u64) {
    if let Some(h) = HANDLES.get() {
        h.log_consumed.increment(records);
    }
}

/// A rebalance moved so many partitions.
pub fn observe_log_moved(how: Moved, partitions: usize) {
    if let Some(h) = HANDLES.get() {
        add(&h.log_moved, how as usize, partitions as u64);
    }
}

/// The log takes nothing more until it is opened anew.
pub fn observe_log_poisoned() {
    if let Some(h) = HANDLES.get() {
        h.log_poisoned.set(1.0);
    }
}

/// So many partitions miss a copy or a broker that leads them.
pub fn observe_replicas(under_replicated: usize, leaderless: usize) {
    if let Some(h) = HANDLES.get() {
        h.under_replicated.set(under_replicated as f64);
        h.leaderless.set(leaderless as f64);
    }
}

/// A live message that was accepted so long ago is written to its recipient's stream.
pub fn observe_live(elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.live.record(elapsed.as_secs_f64());
    }
}

/// A stream attached.
pub fn observe_attached(elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.attach.record(elapsed.as_secs_f64());
    }
}

/// The projector handed over so many pushes.
pub fn observe_pushes(pushes: u64, elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.pushes.increment(pushes);
        h.push.record(elapsed.as_secs_f64());
    }
}

/// An edge met a record of topic `push` that was appended so long ago.
pub fn observe_push_delay(elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.push_delay.record(elapsed.as_secs_f64());
    }
}

/// A store answered a call.
pub fn observe_store_call(call: StoreCall, elapsed: Duration, failed: bool) {
    if let Some(h) = HANDLES.get() {
        if let Some(histogram) = h.store_call.get(call as usize) {
            histogram.record(elapsed.as_secs_f64());
        }
        if failed {
            add(&h.store_failures, call as usize, 1);
        }
    }
}

/// The projector applied so many records, as one batch.
pub fn observe_applied(records: u64, elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.applied.increment(records);
        h.apply.record(elapsed.as_secs_f64());
    }
}

/// The projector owns so many partitions.
pub fn observe_owned(partitions: usize) {
    if let Some(h) = HANDLES.get() {
        h.owned.set(partitions as f64);
    }
}

/// All projectors together should own so many partitions.
pub fn observe_to_own(partitions: usize) {
    if let Some(h) = HANDLES.get() {
        h.to_own.set(partitions as f64);
    }
}

/// So many writes wait behind the projector.
pub fn observe_queued_writes(writes: u64) {
    if let Some(h) = HANDLES.get() {
        h.queued_writes.set(writes as f64);
    }
}

/// So many records of a topic are durable and not applied yet.
pub fn observe_lag(topic: Applied, records: u64) {
    if let Some(h) = HANDLES.get() {
        h.lag[topic as usize].set(records as f64);
    }
}

/// A stream's live feed was cut because its client did not keep up; it catches up from the store.
pub fn observe_feed_cut() {
    if let Some(h) = HANDLES.get() {
        h.feed_cuts.increment(1);
    }
}

/// A coalescing window was written to the store, with so many items that outlived it.
pub fn observe_flush(items: u64, elapsed: Duration) {
    if let Some(h) = HANDLES.get() {
        h.flushed.increment(items);
        h.flush.record(elapsed.as_secs_f64());
    }
}

/// So many inboxes lost something to its age.
pub fn observe_expired(inboxes: u64) {
    if let Some(h) = HANDLES.get() {
        h.expired.increment(inboxes);
    }
}

/// So many records for topic `metadata` were made.
pub fn observe_metadata(records: u64) {
    if let Some(h) = HANDLES.get() {
        h.metadata.increment(records);
    }
}

mod groups;
#[cfg(test)]
mod tests;
