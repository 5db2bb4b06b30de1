//! The stores on ScyllaDB or Apache Cassandra 5, through the `scylla` driver.
//!
//! - **No transaction spans partitions**, so a flush is written in parts, in the order that [`DeliveryWrite`](super::DeliveryWrite)
//!   says, its positions last. Within a part everything runs at once.
//! - **Late writers lose.** Every row of the view is written `USING TIMESTAMP` with its log position: what a projector writes
//!   that lost its partition without knowing is older than what is there, whenever it comes.
//! - **Reads never walk tombstones**: they start behind the cursor, in buckets that are known to hold something.
//! - **Lightweight transactions** only where two callers race for one thing: one-time prekeys, claims, at-rest keys.
//! - **Failure.** Whatever the cluster can't do now is [`StoreError::Unavailable`]; the projector tries again and the log keeps
//!   everything meanwhile.
//!
//! Tables and their reasons: `schemas/cql`.

use std::sync::Arc;

use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};
use quick_cache::sync::Cache;
use scylla::client::session::Session;
use scylla::errors::{ExecutionError, IntoRowsResultError, PrepareError};
use scylla::response::query_result::QueryRowsResult;
use scylla::serialize::row::SerializeRow;
use scylla::statement::prepared::PreparedStatement;
use scylla::value::{CqlValue, Row};
use tokio::sync::{Mutex, Semaphore};

use crate::ids::{DeviceAddr, GroupId};
use crate::limits;
use crate::store::StoreError;

mod delivery;
mod directory;
mod groups;
mod keys;
mod migrate;
mod options;
mod scan;

pub use migrate::{Migrated, Replication, migrate, migrate_like};
pub use options::{CqlOpenError, CqlOptions, CqlTls};

#[cfg(any(test, feature = "test-util"))]
pub use migrate::{drop_keyspaces, drop_keyspaces_of};

/// Rows of a table that is read as a whole, at once.
const PAGE_ROWS: i32 = 500;

/// Locks that keep this process's callers from racing each other for one pool: a lightweight transaction that fails costs as much as one that
/// succeeds.
const POOL_LOCKS: usize = 256;

/// See the module.
pub struct CqlStore {
    session: Session,
    options: CqlOptions,
    statements: Statements,
    /// Requests at once.
    room: Semaphore,
    /// Buckets and days that are listed already, with the day of the listing.
    listed: Cache<(DeviceAddr, u64, u32), ()>,
    listed_groups: Cache<(GroupId, u64, u32), ()>,
    pools: Vec<Mutex<()>>,
}

impl std::fmt::Debug for CqlStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CqlStore").field("keyspace", &self.options.keyspace).finish_non_exhaustive()
    }
}

macro_rules! statements {
    ($($name:ident $place:ident $text:literal),* $(,)?) => {
        /// Everything that is ever asked, prepared once.
        struct Statements {
            $($name: PreparedStatement),*
        }

        impl Statements {
            async fn prepare(session: &Session, view: &str, state: &str) -> Result<Self, PrepareError> {
                let (view, state) = (format!("{view}."), format!("{state}."));
                Ok(Self {
                    $($name: {
                        let keyspace = statements!(@$place view state);
                        let mut statement = session.prepare($text.replace("@", keyspace)).await?;
                        statement.set_is_idempotent(statements!(@idempotent $place));
                        // Only whole tables are read by pages.
                        statement.set_page_size(PAGE_ROWS);
                        statement
                    }),*
                })
            }
        }
    };
    (@view $view:ident $state:ident) => { &$view };
    (@state $view:ident $state:ident) => { &$state };
    // A lightweight transaction that is tried again by the driver could find its own first try in its way.
    (@idempotent view) => { true };
    (@idempotent state) => { false };
}

statements! {
    position_get view "SELECT next FROM @positions WHERE topic = ? AND partition = ?",
    position_put view "INSERT INTO @positions (topic, partition, next) VALUES (?, ?, ?) USING TIMESTAMP ?",
    inbox_get view "SELECT state FROM @inboxes WHERE account = ? AND device = ?",
    inbox_put view "INSERT INTO @inboxes (account, device, state) VALUES (?, ?, ?) USING TIMESTAMP ?",
    inbox_drop view "DELETE FROM @inboxes USING TIMESTAMP ? WHERE account = ? AND device = ?",
    inboxes_drop view "DELETE FROM @inboxes USING TIMESTAMP ? WHERE account = ?",
    pending_get view "SELECT seq, body FROM @pending WHERE account = ? AND device = ? AND bucket = ? AND seq > ? AND seq <= ? LIMIT ?",
    pending_put view "INSERT INTO @pending (account, device, bucket, seq, body) VALUES (?, ?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    pending_drop_to view "DELETE FROM @pending USING TIMESTAMP ? WHERE account = ? AND device = ? AND bucket = ? AND seq <= ?",
    pending_drop view "DELETE FROM @pending USING TIMESTAMP ? WHERE account = ? AND device = ? AND bucket = ?",
    buckets_get view "SELECT bucket FROM @pending_buckets WHERE account = ? AND device = ? AND bucket >= ? AND bucket <= ? LIMIT ?",
    buckets_of view "SELECT device, bucket FROM @pending_buckets WHERE account = ?",
    bucket_put view "INSERT INTO @pending_buckets (account, device, bucket) VALUES (?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    bucket_drop view "DELETE FROM @pending_buckets USING TIMESTAMP ? WHERE account = ? AND device = ? AND bucket = ?",
    buckets_drop view "DELETE FROM @pending_buckets USING TIMESTAMP ? WHERE account = ? AND device = ?",
    all_buckets_drop view "DELETE FROM @pending_buckets USING TIMESTAMP ? WHERE account = ?",
    day_put view "INSERT INTO @pending_days (day, shard, account, device) VALUES (?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    day_get view "SELECT account, device FROM @pending_days WHERE day = ? AND shard = ? AND (account, device) > (?, ?) LIMIT ?",
    mark_get view "SELECT mark FROM @marks WHERE recipient = ? AND bucket = ? AND sender = ?",
    marks_of view "SELECT sender, mark FROM @marks WHERE recipient = ? AND bucket IN ? LIMIT ?",
    mark_put view "INSERT INTO @marks (recipient, bucket, sender, mark) VALUES (?, ?, ?, ?) USING TIMESTAMP ?",
    marks_drop view "DELETE FROM @marks USING TIMESTAMP ? WHERE recipient = ? AND bucket = ?",
    account_get view "SELECT record FROM @accounts WHERE id = ?",
    account_put view "INSERT INTO @accounts (id, record) VALUES (?, ?) USING TIMESTAMP ?",
    identity_get view "SELECT account FROM @identities WHERE identity = ? LIMIT 1",
    identity_put view "INSERT INTO @identities (identity, account) VALUES (?, ?) USING TIMESTAMP ?",
    identity_drop view "DELETE FROM @identities USING TIMESTAMP ? WHERE identity = ? AND account = ?",
    keys_get view "SELECT keys FROM @device_keys WHERE account = ? AND device = ?",
    keys_put view "INSERT INTO @device_keys (account, device, keys) VALUES (?, ?, ?) USING TIMESTAMP ?",
    keys_drop view "DELETE FROM @device_keys USING TIMESTAMP ? WHERE account = ? AND device = ?",
    group_head_get view "SELECT head FROM @group_heads WHERE id = ?",
    group_head_put view "INSERT INTO @group_heads (id, head) VALUES (?, ?) USING TIMESTAMP ?",
    group_head_drop view "DELETE FROM @group_heads USING TIMESTAMP ? WHERE id = ?",
    group_heads_first view "SELECT id, head FROM @group_heads LIMIT ?",
    group_heads_behind view "SELECT id, head FROM @group_heads WHERE token(id) > token(?) LIMIT ?",
    group_roster_drop view "DELETE FROM @group_rosters USING TIMESTAMP ? WHERE id = ?",
    group_roster_get view "SELECT roster FROM @group_rosters WHERE id = ?",
    group_roster_put view "INSERT INTO @group_rosters (id, roster) VALUES (?, ?) USING TIMESTAMP ?",
    group_info_get view "SELECT info FROM @group_infos WHERE id = ?",
    group_info_put view "INSERT INTO @group_infos (id, info) VALUES (?, ?) USING TIMESTAMP ?",
    group_info_drop view "DELETE FROM @group_infos USING TIMESTAMP ? WHERE id = ?",
    group_snapshot_get view "SELECT snapshot FROM @group_snapshots WHERE id = ? AND epoch = ?",
    group_snapshot_put view "INSERT INTO @group_snapshots (id, epoch, snapshot) VALUES (?, ?, ?) USING TIMESTAMP ?",
    group_snapshots_drop_before view "DELETE FROM @group_snapshots USING TIMESTAMP ? WHERE id = ? AND epoch < ?",
    group_snapshots_drop view "DELETE FROM @group_snapshots USING TIMESTAMP ? WHERE id = ?",
    group_tree_get view "SELECT tree FROM @group_trees WHERE id = ? AND epoch = ?",
    group_tree_put view "INSERT INTO @group_trees (id, epoch, tree) VALUES (?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    group_trees_drop view "DELETE FROM @group_trees USING TIMESTAMP ? WHERE id = ?",
    group_items_get view "SELECT seq, item FROM @group_items WHERE id = ? AND bucket = ? AND seq > ? LIMIT ?",
    group_item_put view "INSERT INTO @group_items (id, bucket, seq, item) VALUES (?, ?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    group_items_drop_to view "DELETE FROM @group_items USING TIMESTAMP ? WHERE id = ? AND bucket = ? AND seq <= ?",
    group_bucket_items_drop view "DELETE FROM @group_items USING TIMESTAMP ? WHERE id = ? AND bucket = ?",
    group_buckets_get view "SELECT bucket FROM @group_buckets WHERE id = ? AND bucket >= ? AND bucket <= ? LIMIT ?",
    group_bucket_put view "INSERT INTO @group_buckets (id, bucket) VALUES (?, ?) USING TTL ? AND TIMESTAMP ?",
    group_bucket_drop view "DELETE FROM @group_buckets USING TIMESTAMP ? WHERE id = ? AND bucket = ?",
    group_day_put view "INSERT INTO @group_days (day, shard, id) VALUES (?, ?, ?) USING TTL ? AND TIMESTAMP ?",
    group_day_get view "SELECT id FROM @group_days WHERE day = ? AND shard = ? AND id > ? LIMIT ?",
    group_mark_get view "SELECT mark FROM @group_marks WHERE id = ? AND sender = ?",
    group_mark_put view "INSERT INTO @group_marks (id, sender, mark) VALUES (?, ?, ?) USING TIMESTAMP ?",
    group_marks_drop view "DELETE FROM @group_marks USING TIMESTAMP ? WHERE id = ?",
    group_members_get view "SELECT id FROM @group_members WHERE account = ? AND id > ? LIMIT ?",
    group_member_put view "INSERT INTO @group_members (account, id) VALUES (?, ?) USING TIMESTAMP ?",
    group_member_drop view "DELETE FROM @group_members USING TIMESTAMP ? WHERE account = ? AND id = ?",
    inboxes_all view "SELECT account, device, state FROM @inboxes",
    marks_all view "SELECT recipient, sender, mark FROM @marks",
    accounts_all view "SELECT record FROM @accounts",
    identities_all view "SELECT identity, account FROM @identities",
    keys_all view "SELECT account, device, keys FROM @device_keys",
    groups_all view "SELECT id FROM @group_heads",
    group_members_all view "SELECT DISTINCT account FROM @group_members",
    pool_get state "SELECT left FROM @one_time_prekeys WHERE account = ? AND device = ? AND kind = ? LIMIT 1",
    pool_ids state "SELECT id FROM @one_time_prekeys WHERE account = ? AND device = ? AND kind = ?",
    pool_first state "SELECT left, id, prekey FROM @one_time_prekeys WHERE account = ? AND device = ? AND kind = ? LIMIT 1",
    pool_make state "UPDATE @one_time_prekeys SET left = ? WHERE account = ? AND device = ? AND kind = ? IF left = null",
    pool_set state "UPDATE @one_time_prekeys SET left = ? WHERE account = ? AND device = ? AND kind = ? IF left = ?",
    prekey_put state "INSERT INTO @one_time_prekeys (account, device, kind, id, prekey) VALUES (?, ?, ?, ?, ?)",
    prekey_take state "DELETE FROM @one_time_prekeys WHERE account = ? AND device = ? AND kind = ? AND id = ? IF EXISTS",
    prekey_drop state "DELETE FROM @one_time_prekeys WHERE account = ? AND device = ? AND kind = ? AND id = ?",
    claim state "INSERT INTO @identity_claims (identity, account) VALUES (?, ?) IF NOT EXISTS",
    claim_get state "SELECT account FROM @identity_claims WHERE identity = ?",
    release state "DELETE FROM @identity_claims WHERE identity = ? IF account = ?",
    seal_get state "SELECT key, destroyed FROM @seal_keys WHERE account = ?",
    seal_make state "INSERT INTO @seal_keys (account, key, destroyed) VALUES (?, ?, false) IF NOT EXISTS",
    seal_bar state "INSERT INTO @seal_keys (account, destroyed) VALUES (?, true) IF NOT EXISTS",
    seal_destroy state "UPDATE @seal_keys SET key = null, destroyed = true WHERE account = ? IF EXISTS",
}

impl CqlStore {
    /// Connects and checks the schema. Makes nothing: that is [`migrate`]'s.
    pub async fn open(options: CqlOptions) -> Result<Arc<Self>, CqlOpenError> {
        let session = options.connect().await?;
        migrate::check(&session, &options).await?;
        let statements = Statements::prepare(&session, &options.keyspace, &options.state_keyspace)
            .await
            .map_err(|error| CqlOpenError::Refused(error.to_string()))?;
        Ok(Arc::new(Self {
            session,
            options,
            statements,
            room: Semaphore::new(limits::CQL_IN_FLIGHT),
            listed: Cache::new(limits::CQL_LISTED),
            listed_groups: Cache::new(limits::CQL_LISTED),
            pools: (0..POOL_LOCKS).map(|_| Mutex::new(())).collect(),
        }))
    }

    async fn execute(&self, statement: &PreparedStatement, values: impl SerializeRow) -> Result<(), StoreError> {
        let _room = self.room.acquire().await.map_err(|_| closed())?;
        self.session.execute_unpaged(statement, values).await.map(drop).map_err(unavailable)
    }

    async fn rows(&self, statement: &PreparedStatement, values: impl SerializeRow) -> Result<QueryRowsResult, StoreError> {
        let _room = self.room.acquire().await.map_err(|_| closed())?;
        let result = self.session.execute_unpaged(statement, values).await.map_err(unavailable)?;
        result.into_rows_result().map_err(|error: IntoRowsResultError| corrupt(&error))
    }

    /// A lightweight transaction; whether its condition held.
    async fn decide(&self, statement: &PreparedStatement, values: impl SerializeRow) -> Result<bool, StoreError> {
        applied(&self.rows(statement, values).await?)
    }
}

/// Calls before they run. What made them need not live as long as they do.
fn gather<F>(calls: impl IntoIterator<Item = F>) -> Vec<F> {
    calls.into_iter().collect()
}

/// Runs all, many at once; the first failure ends it.
fn all<F: Future<Output = Result<(), StoreError>>>(calls: Vec<F>) -> impl Future<Output = Result<(), StoreError>> {
    stream::iter(calls).map(Ok).try_for_each_concurrent(limits::CQL_WRITES_AT_ONCE, |call| call)
}

/// Runs all, many at once; the answers in their order.
fn each<T, F: Future<Output = Result<T, StoreError>>>(calls: Vec<F>) -> impl Future<Output = Result<Vec<T>, StoreError>> {
    stream::iter(calls).buffered(limits::CQL_IN_FLIGHT).try_collect()
}

/// Whether a lightweight transaction's condition held: the first column of its answer, whatever follows.
fn applied(rows: &QueryRowsResult) -> Result<bool, StoreError> {
    let row: Row = rows.first_row().map_err(|error| corrupt(&error))?;
    match row.columns.first() {
        Some(Some(CqlValue::Boolean(applied))) => Ok(*applied),
        _ => Err(corrupt(&"a conditional write was not answered with a condition")),
    }
}

/// A log position as a write's timestamp, and as a number of a row.
fn number(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

fn unavailable(error: ExecutionError) -> StoreError {
    StoreError::Unavailable(error.to_string())
}

fn closed() -> StoreError {
    StoreError::Unavailable("the store is closed".to_owned())
}

fn corrupt(error: &dyn std::fmt::Display) -> StoreError {
    StoreError::Corrupt(error.to_string())
}

fn refused(error: &ExecutionError) -> CqlOpenError {
    CqlOpenError::Refused(error.to_string())
}
