//! The embedded stores: one folder, one process.
//!
//! ```text
//! DIR/format       the version of the layout
//! DIR/view/        an LSM tree: what is rebuilt from the log (DeliveryStore, DirectoryStore, GroupStore)
//! DIR/state/       an LSM tree: what is not (one-time prekeys, claims)
//! DIR/seal.keys    fixed slots, overwritten in place: the accounts' at-rest keys
//! ```
//!
//! View and state are two databases because they want opposite things of a journal. A write of the view is never
//! synced: the log is the truth, the view's journal keeps a prefix of the writes (each with the positions
//! that it covers), and what a crash takes is replayed. A write of the state is synced before it is answered, many callers at
//! a time; in one database that sync would drag the view's megabytes along and hold up its writers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use fjall::{Database, Keyspace, KeyspaceCreateOptions};
use parking_lot::RwLock;

use super::StoreError;

mod delivery;
mod directory;
mod dump;
mod groups;
mod keys;
mod seal_file;
mod view_thread;

pub use dump::{SectionDump, ViewDump};

/// The version of the folder's layout.
const FORMAT: &str = "sealpost store 2\n";
/// Present while the view is being cleared: a crash in between must not leave half a view with whole positions.
const CLEARING: &str = "view.clearing";

/// How to open the stores.
#[derive(Debug, Clone)]
pub struct Options {
    /// Cache of the view's blocks, in bytes.
    pub cache_bytes: u64,
    /// Pending items held in memory before they are written out as a sorted file, in bytes. Up to four times that while
    /// writing out can't keep up.
    pub pending_buffer_bytes: u64,
    /// Start with an empty view (for `sealpost rebuild`): also opens what is too damaged to open otherwise.
    pub discard_view: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { cache_bytes: 8 * MIB, pending_buffer_bytes: 8 * MIB, discard_view: false }
    }
}

const MIB: u64 = 1024 * 1024;

/// Why the stores can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open. Retrying helps once that one is gone.
    #[error("the store in {0} is in use by another process: stop that one, or choose another data folder")]
    Locked(PathBuf),
    /// Written by another version of Sealpost. Retrying never helps.
    #[error("the store in {dir} has the layout {found:?}, this binary reads {expected:?}: run the version that wrote it, or newer")]
    Version {
        /// Where.
        dir: PathBuf,
        /// What is there.
        found: String,
        /// What this binary knows.
        expected: &'static str,
    },
    /// The view does not open. `sealpost rebuild` makes it anew.
    #[error("the view in {dir} is damaged ({reason}): `sealpost rebuild` makes it anew from the log, nothing is lost")]
    ViewDamaged {
        /// Where.
        dir: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The state does not open; it is not in the log.
    #[error(
        "the keys in {path} are damaged ({reason}): restore the folder from a backup; one-time prekeys and at-rest keys can't be rebuilt"
    )]
    StateDamaged {
        /// Where.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The disk or the file system refused.
    #[error("the store in {dir} can't be opened: {source}")]
    Io {
        /// Where.
        dir: PathBuf,
        /// What it said.
        source: std::io::Error,
    },
}

/// The embedded stores. Blocking work runs on threads of its own or on the runtime's blocking pool.
pub struct EmbeddedStore {
    dir: PathBuf,
    view_db: Database,
    view: Arc<RwLock<Arc<View>>>,
    writer: view_thread::ViewThread,
    options: Options,
    keys: keys::KeyThread,
    seals: seal_file::SealFile,
}

impl std::fmt::Debug for EmbeddedStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EmbeddedStore").field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// The keyspaces that are rebuilt from the log.
struct View {
    db: Database,
    pending: Keyspace,
    inboxes: Keyspace,
    marks: Keyspace,
    positions: Keyspace,
    accounts: Keyspace,
    identities: Keyspace,
    device_keys: Keyspace,
    groups: groups::Groups,
}

/// Tuning of one keyspace. Nothing is compressed: ciphertexts and keys don't shrink.
fn keyspace_options(buffer_bytes: u64, block_bytes: u32) -> KeyspaceCreateOptions {
    use fjall::config::{BlockSizePolicy, CompressionPolicy};
    KeyspaceCreateOptions::default()
        .max_memtable_size(buffer_bytes)
        .data_block_size_policy(BlockSizePolicy::all(block_bytes))
        .data_block_compression_policy(CompressionPolicy::all(fjall::CompressionType::None))
}

const VIEW_KEYSPACES: [&str; 7] = ["pending", "inboxes", "marks", "positions", "accounts", "identities", "device_keys"];

impl View {
    fn open(db: &Database, options: &Options) -> fjall::Result<Self> {
        let small = |name: &str, buffer: u64| db.keyspace(name, || keyspace_options(buffer, 4096));
        Ok(Self {
            db: db.clone(),
            // Read in long runs: large blocks make 10,000 items a few hundred reads.
            pending: db.keyspace("pending", || keyspace_options(options.pending_buffer_bytes, 32 * 1024))?,
            inboxes: small("inboxes", 2 * MIB)?,
            marks: small("marks", 2 * MIB)?,
            positions: small("positions", MIB / 4)?,
            accounts: small("accounts", 2 * MIB)?,
            identities: small("identities", MIB)?,
            device_keys: small("device_keys", 2 * MIB)?,
            groups: groups::Groups::open(db, options)?,
        })
    }
}

fn database(path: &Path, cache_bytes: u64, threads: usize) -> fjall::Result<Database> {
    Database::builder(path)
        .cache_size(cache_bytes)
        .worker_threads(threads)
        .max_cached_files(Some(128))
        // The least that the crate takes; past it the oldest journal is flushed away.
        .max_journaling_size(64 * MIB)
        .journal_compression(fjall::CompressionType::None)
        .open()
}

impl EmbeddedStore {
    /// Opens the stores in the folder, which is made if it is not there. Blocks while it recovers.
    pub fn open(dir: &Path, options: Options) -> Result<Arc<Self>, OpenError> {
        let io = |source| OpenError::Io { dir: dir.to_owned(), source };
        make_private_dir(dir).map_err(io)?;
        check_format(dir)?;

        let state_dir = dir.join("state");
        let state = database(&state_dir, MIB, 1).map_err(|error| open_error(dir, error, |reason| state_damaged(&state_dir, reason)))?;
        // The state's lock is held: whoever comes here is the only one.
        let view_dir = dir.join("view");
        if options.discard_view {
            discard(&view_dir).map_err(io)?;
        }
        let view_damaged = |reason| OpenError::ViewDamaged { dir: view_dir.clone(), reason };
        // Two threads: of several, one leaves merging to the others, so that writing out never waits for it.
        let view_db = database(&view_dir, options.cache_bytes, 2).map_err(|error| open_error(dir, error, view_damaged))?;
        let clearing = dir.join(CLEARING);
        if clearing.exists() {
            drop_view(&view_db).map_err(|error| open_error(dir, error, view_damaged))?;
        }
        let view = View::open(&view_db, &options).map_err(|error| open_error(dir, error, view_damaged))?;
        if clearing.exists() {
            finish_clearing(&view_db, &clearing).map_err(io)?;
        }

        let keys = keys::KeyThread::start(&state).map_err(|error| match error {
            keys::StartError::Database(error) => open_error(dir, error, |reason| state_damaged(&state_dir, reason)),
            keys::StartError::Thread(source) => io(source),
        })?;
        let seals = seal_file::SealFile::open(&dir.join("seal.keys"))?;
        write_format(dir).map_err(io)?;
        let view = Arc::new(RwLock::new(Arc::new(view)));
        let writer = view_thread::ViewThread::start(Arc::clone(&view)).map_err(io)?;
        Ok(Arc::new(Self { dir: dir.to_owned(), view_db, view, writer, options, keys, seals }))
    }

    /// Empties the view, so that the log can be replayed into it from its start; the state stays. Nothing else may use the view
    /// meanwhile. A crash in between is finished by the next opening.
    pub async fn clear_view(self: &Arc<Self>) -> Result<(), StoreError> {
        let this = self.clone();
        blocking(move || this.clear_view_now()).await
    }

    fn clear_view_now(&self) -> Result<(), StoreError> {
        let mut view = self.view.write();
        let clearing = self.dir.join(CLEARING);
        let io = |error: std::io::Error| StoreError::Unavailable(error.to_string());
        std::fs::write(&clearing, b"").and_then(|()| sync_dir(&self.dir)).map_err(io)?;
        drop_view(&self.view_db).map_err(unavailable)?;
        *view = Arc::new(View::open(&self.view_db, &self.options).map_err(unavailable)?);
        finish_clearing(&self.view_db, &clearing).map_err(io)
    }

    /// `Err` with the reason if a failed write or sync stopped the stores: they take nothing more until they are opened anew.
    pub fn health(&self) -> Result<(), StoreError> {
        self.view_db.persist(fjall::PersistMode::Buffer).map_err(unavailable)?;
        self.keys.health()?;
        self.seals.health()
    }

    /// Bytes on disk, journals included.
    pub fn disk_bytes(&self) -> u64 {
        self.view_db.disk_space().unwrap_or(0) + self.keys.disk_bytes() + self.seals.disk_bytes()
    }

    fn view(&self) -> Arc<View> {
        self.view.read().clone()
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        // Nothing is owed: this only saves the next start a replay if the power goes before the system writes it out.
        if let Err(error) = self.view_db.persist(fjall::PersistMode::SyncAll) {
            tracing::warn!(%error, "the view could not be synced while closing; the log will be replayed");
        }
    }
}

/// Runs blocking work on the runtime's blocking pool.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, StoreError> + Send + 'static) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(StoreError::Unavailable("the runtime is shutting down".into())),
    }
}

/// A failed call of the database, for callers.
fn unavailable(error: fjall::Error) -> StoreError {
    match error {
        fjall::Error::Poisoned => StoreError::Unavailable("an earlier write failed; restart the server once the disk is well".into()),
        fjall::Error::Storage(error) => match &error {
            fjall::LsmError::Io(_) => StoreError::Unavailable(error.to_string()),
            _ => StoreError::Corrupt(error.to_string()),
        },
        error => StoreError::Unavailable(error.to_string()),
    }
}

fn open_error(dir: &Path, error: fjall::Error, damaged: impl FnOnce(String) -> OpenError) -> OpenError {
    match error {
        fjall::Error::Locked => OpenError::Locked(dir.to_owned()),
        fjall::Error::Io(source) => OpenError::Io { dir: dir.to_owned(), source },
        error => damaged(error.to_string()),
    }
}

fn state_damaged(path: &Path, reason: String) -> OpenError {
    OpenError::StateDamaged { path: path.to_owned(), reason }
}

fn drop_view(db: &Database) -> fjall::Result<()> {
    for name in VIEW_KEYSPACES.into_iter().chain(groups::KEYSPACES) {
        if db.keyspace_exists(name) {
            let keyspace = db.keyspace(name, KeyspaceCreateOptions::default)?;
            db.delete_keyspace(keyspace)?;
        }
    }
    Ok(())
}

/// The new keyspaces are on disk before the mark that they are not goes.
fn finish_clearing(db: &Database, clearing: &Path) -> std::io::Result<()> {
    db.persist(fjall::PersistMode::SyncAll).map_err(std::io::Error::other)?;
    std::fs::remove_file(clearing)?;
    clearing.parent().map_or(Ok(()), sync_dir)
}

fn discard(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn sync_dir(dir: &Path) -> std::io::Result<()> {
    std::fs::File::open(dir)?.sync_all()
}

/// Only the server's own user may look inside.
fn make_private_dir(dir: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn check_format(dir: &Path) -> Result<(), OpenError> {
    match std::fs::read(dir.join("format")) {
        Ok(found) if found == FORMAT.as_bytes() => Ok(()),
        Ok(found) => {
            let found = String::from_utf8_lossy(&found[..found.len().min(40)]).trim().to_owned();
            Err(OpenError::Version { dir: dir.to_owned(), found, expected: FORMAT.trim_ascii_end() })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(OpenError::Io { dir: dir.to_owned(), source }),
    }
}

fn write_format(dir: &Path) -> std::io::Result<()> {
    let path = dir.join("format");
    if path.exists() {
        return Ok(());
    }
    // Renamed into place: a crash leaves none or all of it.
    let new = dir.join("format.new");
    let mut file = std::fs::File::create(&new)?;
    std::io::Write::write_all(&mut file, FORMAT.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(new, path)?;
    sync_dir(dir)
}
