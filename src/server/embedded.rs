//! Log and stores of the embedded profile: everything in one folder.

use std::sync::Arc;

use crate::config::Config;
use crate::log::EventLog;
use crate::log::PartitionCounts;
use crate::log::embedded::{EmbeddedLog, Options as LogOptions, Retention};
use crate::server::ServerError;
use crate::store::embedded::{EmbeddedStore, Options as StoreOptions};

/// What is in the folder.
pub(super) struct Opened {
    pub log: Arc<dyn EventLog>,
    pub store: Arc<EmbeddedStore>,
    /// The same log, unless another one was given.
    pub embedded: Option<Arc<EmbeddedLog>>,
}

/// Opens the folder, or makes it; the log in it unless another one is given. Blocks.
pub(super) fn open(config: &Config, discard_view: bool, log: Option<Arc<dyn EventLog>>) -> Result<Opened, ServerError> {
    std::fs::create_dir_all(&config.data)
        .map_err(|error| ServerError(format!("the folder {} can't be made: {error}", config.data.display())))?;
    let (log, embedded): (Arc<dyn EventLog>, _) = match log {
        Some(log) => (log, None),
        None => {
            let log = open_log(config)?;
            (Arc::clone(&log) as _, Some(log))
        }
    };
    let store = EmbeddedStore::open(&config.data.join("store"), StoreOptions { discard_view, ..StoreOptions::default() })?;
    Ok(Opened { log, store, embedded })
}

/// Opens the log in the folder, or makes it. Blocks.
pub(super) fn open_log(config: &Config) -> Result<Arc<EmbeddedLog>, ServerError> {
    Ok(EmbeddedLog::open(log_options(config))?)
}

fn log_options(config: &Config) -> LogOptions {
    let defaults = PartitionCounts::default();
    LogOptions {
        partitions: PartitionCounts { inbox: config.partitions.inbox, directory: config.partitions.directory, ..defaults },
        segment_bytes: config.log.segment_bytes,
        retention: Retention {
            age_ms: Some(u64::from(config.log.retention_days) * 24 * 3600 * 1000),
            bytes: Some(config.log.retention_bytes).filter(|bytes| *bytes > 0),
        },
        ..LogOptions::new(config.data.join("log"))
    }
}
