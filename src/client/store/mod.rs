//! The client's state: one SQLite file, owned by one thread.
//!
//! Ratchet state, cursor, message and event of one step are in one transaction. The database is in WAL mode with
//! `synchronous=FULL`: each commit is on disk before anything is acknowledged to the server or sent. `NORMAL` would be faster,
//! but a power loss could then take the last commits back: a message that was acknowledged would be gone (against G-ONCE), and a
//! ratchet set back would encrypt again with keys that were used. Commits are grouped instead: what waits goes in one.
//!
//! The file is readable by its owner only, and locked: a second process gets an error. What is deleted is overwritten
//! (`secure_delete`). There is no passphrase yet: whoever reads the file as this user, or the disk, reads the messages;
//! use the operating system's disk encryption.

mod account;
mod contacts;
mod events;
mod groups;
mod incoming;
mod messages;
mod outgoing;
mod schema;
mod sql;
mod state;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use rusqlite::Connection;
use tokio::sync::{Notify, mpsc, oneshot, watch};

use super::core::content::Invalid;
use super::core::groups::Group;
use super::core::state::{StateTx, StorageError};
use super::core::{groups as mls_groups, keys, signal};
use crate::clock::{Clock, Random, UnixMillis};
use crate::ids::GroupId;

pub(super) use account::Credential;
pub(super) use groups::{Intent, Submission, Task, Verdict, is_group_request};

/// Jobs that may wait for the store's thread; callers wait past that.
const JOBS: usize = 256;
/// Jobs of one commit: bounds how long the first waits for the last.
const JOBS_PER_COMMIT: usize = 64;
/// How long another process may hold the file's lock while it opens or closes.
const BUSY_MS: u64 = 500;

/// Why the store did not do it. Nothing of the job is kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process has the database open.
    #[error("the database is in use by another process")]
    InUse,
    /// A newer Sealpost wrote it.
    #[error("the database has version {0}, which is newer than this program")]
    Newer(usize),
    /// There is no account in it.
    #[error("the database has no account: register first")]
    NoAccount,
    /// There is an account in it.
    #[error("the database has an account already")]
    HasAccount,
    /// SQLite failed: disk full, I/O error, damaged file. The client stops receiving until it works again.
    #[error("the database failed: {0}")]
    Sqlite(rusqlite::Error),
    /// The commit failed: as above.
    #[error("the database could not commit: {0}")]
    Commit(String),
    /// A value in it is not what it must be.
    #[error("the database is damaged: {0}")]
    Damaged(String),
    /// The file could not be made or opened.
    #[error("the database file: {0}")]
    File(#[from] std::io::Error),
    /// The store was closed.
    #[error("the client is closed")]
    Closed,
    /// Nothing can be sent to this account before the person looked at its new keys.
    #[error("the account's devices changed since they were verified: verify or accept them first")]
    Unverified,
    /// The account was deleted.
    #[error("the account was deleted")]
    AccountDeleted,
    /// No such message, or not one's own.
    #[error("there is no such message")]
    NoSuchMessage,
    /// See there.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// See there.
    #[error(transparent)]
    Signal(#[from] signal::Error),
    /// See there.
    #[error(transparent)]
    Keys(#[from] keys::Error),
    /// See there.
    #[error(transparent)]
    Groups(#[from] mls_groups::Error),
}

impl From<rusqlite::Error> for Error {
    fn from(error: rusqlite::Error) -> Self {
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => Self::InUse,
            _ => Self::Sqlite(error),
        }
    }
}

impl From<StorageError> for Error {
    fn from(error: StorageError) -> Self {
        Self::Damaged(error.0)
    }
}

/// The open transaction, as a job sees it.
pub(super) struct Db {
    connection: Connection,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    changed: Cell<Changed>,
    /// Groups in memory as the open transaction has them.
    open_groups: RefCell<HashMap<GroupId, Group>>,
}

/// What a commit must wake up.
#[derive(Clone, Copy, Default)]
struct Changed {
    events: bool,
    outgoing: bool,
    expiry: bool,
}

impl Db {
    fn now(&self) -> UnixMillis {
        self.clock.now()
    }

    /// Runs an operation of the core, and writes what it collected with what it learned.
    fn core<T, E: Into<Error>>(&self, operation: impl FnOnce(&StateTx<'_>) -> Result<T, E>) -> Result<T, Error> {
        let storage = state::SqlState(&self.connection);
        let tx = StateTx::new(&storage);
        let value = operation(&tx).map_err(Into::into)?;
        let (writes, news) = tx.finish();
        state::apply(&self.connection, writes, self.now())?;
        self.identity_news(&news)?;
        Ok(value)
    }

    fn mark(&self, change: impl FnOnce(&mut Changed)) {
        let mut changed = self.changed.get();
        change(&mut changed);
        self.changed.set(changed);
    }
}

type Reply = Box<dyn FnOnce(Result<(), Error>) + Send>;
/// Without a transaction a job is only told to fail.
type Job = Box<dyn FnOnce(Option<&Db>) -> Reply + Send>;

/// What the thread is asked for.
enum Request {
    Run(Job),
    /// Empties the write-ahead log into the file: deleted content may be in it.
    Scrub,
    /// Ends the thread once what came before is done, and tells when the file is free.
    Close(oneshot::Sender<()>),
}

/// A handle on the store's thread.
pub(super) struct Store {
    jobs: mpsc::Sender<Request>,
    events: watch::Receiver<u64>,
    outgoing: Arc<Notify>,
    expiry: Arc<Notify>,
}

impl Store {
    /// Opens the file, or makes it. Its thread ends when the last handle is dropped.
    pub(super) fn open(path: &Path, clock: Arc<dyn Clock>, random: Arc<dyn Random>) -> Result<Self, Error> {
        let connection = open(path)?;
        let (jobs, queue) = mpsc::channel(JOBS);
        let newest = events::newest(&connection)?;
        let (events_tx, events) = watch::channel(newest);
        let (outgoing, expiry) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let wakes = Wakes { events: events_tx, outgoing: outgoing.clone(), expiry: expiry.clone() };
        let db = Db { connection, clock, random, changed: Cell::default(), open_groups: RefCell::default() };
        std::thread::Builder::new().name("sealpost-store".into()).spawn(move || serve(db, queue, &wakes))?;
        Ok(Self { jobs, events, outgoing, expiry })
    }

    /// Runs a job in a transaction and returns once it is committed. An error undoes the job.
    pub(super) async fn run<T, F>(&self, job: F) -> Result<T, Error>
    where
        T: Send + 'static,
        F: FnOnce(&Db) -> Result<T, Error> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |db| {
            let result = db.map_or(Err(Error::Closed), |db| in_savepoint(db, job));
            Box::new(move |committed| {
                // The caller may have gone away; the job is done all the same.
                let _ = answer.send(committed.and(result));
            })
        });
        self.jobs.send(Request::Run(job)).await.map_err(|_| Error::Closed)?;
        answered.await.map_err(|_| Error::Closed)?
    }

    /// Makes sure that what was deleted is not left in the write-ahead log.
    pub(super) async fn scrub(&self) {
        // A closed store has done so.
        let _ = self.jobs.send(Request::Scrub).await;
    }

    /// Ends the thread and waits until the file is free. Every later job is refused.
    pub(super) async fn close(&self) {
        let (closing, closed) = oneshot::channel();
        if self.jobs.send(Request::Close(closing)).await.is_ok() {
            let _ = closed.await;
        }
    }

    /// Tells of events: holds the number of the newest one.
    pub(super) fn events(&self) -> watch::Receiver<u64> {
        self.events.clone()
    }

    /// Woken when there is something new to send.
    pub(super) fn outgoing(&self) -> &Notify {
        &self.outgoing
    }

    /// Woken when a message began to expire.
    pub(super) fn expiry(&self) -> &Notify {
        &self.expiry
    }
}

struct Wakes {
    events: watch::Sender<u64>,
    outgoing: Arc<Notify>,
    expiry: Arc<Notify>,
}

impl Wakes {
    fn wake(&self, db: &Db) {
        let changed = db.changed.take();
        if changed.events {
            let newest = events::newest(&db.connection).unwrap_or_default();
            self.events.send_if_modified(|position| std::mem::replace(position, newest) != newest);
        }
        if changed.outgoing {
            self.outgoing.notify_one();
        }
        if changed.expiry {
            self.expiry.notify_one();
        }
    }
}

const SCRUB: &str = "PRAGMA wal_checkpoint(TRUNCATE)";

/// The thread: takes what waits, commits it in one, answers.
fn serve(db: Db, mut queue: mpsc::Receiver<Request>, wakes: &Wakes) {
    let mut closing = None;
    while closing.is_none() {
        let Some(request) = queue.blocking_recv() else { break };
        let mut next = match request {
            Request::Run(job) => commit(&db, job, &mut queue, wakes),
            other => Some(other),
        };
        match next.take() {
            // A checkpoint that fails is tried again at the next commit that fills the log; nothing depends on it.
            Some(Request::Scrub) => drop(db.connection.execute_batch(SCRUB)),
            Some(Request::Close(waiting)) => closing = Some(waiting),
            Some(Request::Run(_)) | None => {}
        }
    }
    drop(queue);
    let _ = db.connection.execute_batch(SCRUB);
    drop(db);
    if let Some(closing) = closing {
        let _ = closing.send(());
    }
}

/// Runs a job and those that wait behind it in one transaction. Returns the request that is not a job, if one came between.
fn commit(db: &Db, first: Job, queue: &mut mpsc::Receiver<Request>, wakes: &Wakes) -> Option<Request> {
    db.changed.take();
    let begun = db.connection.execute_batch("BEGIN IMMEDIATE");
    let open = begun.is_ok().then_some(db);
    let mut replies = vec![first(open)];
    let mut other = None;
    while replies.len() < JOBS_PER_COMMIT {
        match queue.try_recv() {
            Ok(Request::Run(job)) => replies.push(job(open)),
            Ok(request) => {
                other = Some(request);
                break;
            }
            Err(_) => break,
        }
    }
    let committed = begun.and_then(|()| db.connection.execute_batch("COMMIT"));
    if committed.is_err() {
        let _ = db.connection.execute_batch("ROLLBACK");
        db.forget_open_groups();
    } else {
        wakes.wake(db);
    }
    let failure = committed.err().map(|error| error.to_string());
    for reply in replies {
        reply(failure.as_ref().map_or(Ok(()), |error| Err(Error::Commit(error.clone()))));
    }
    other
}

fn in_savepoint<T>(db: &Db, job: impl FnOnce(&Db) -> Result<T, Error>) -> Result<T, Error> {
    db.connection.execute_batch("SAVEPOINT job")?;
    let result = job(db);
    if result.is_err() {
        db.forget_open_groups();
        db.connection.execute_batch("ROLLBACK TO job")?;
    }
    db.connection.execute_batch("RELEASE job")?;
    result
}

fn open(path: &Path) -> Result<Connection, Error> {
    private_file(path)?;
    let connection = Connection::open(path)?;
    connection.busy_timeout(std::time::Duration::from_millis(BUSY_MS))?;
    connection.set_prepared_statement_cache_capacity(128);
    // Exclusive before WAL: then SQLite needs no shared-memory file, and holds the lock until it closes.
    connection.execute_batch(
        "PRAGMA locking_mode = EXCLUSIVE; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA secure_delete = ON;
         PRAGMA foreign_keys = ON; PRAGMA temp_store = MEMORY; BEGIN IMMEDIATE; COMMIT;",
    )?;
    schema::migrate(&connection)?;
    Ok(connection)
}

/// Makes the file, or what is there, readable by its owner only; SQLite gives its log the same mode.
fn private_file(path: &Path) -> std::io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let file = options.open(path)?;
    #[cfg(unix)]
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    drop(file);
    Ok(())
}

#[cfg(test)]
mod tests;
