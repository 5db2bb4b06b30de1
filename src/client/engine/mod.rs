//! The running client: connects, keeps connected, and does what the server asks for.

mod groups;
mod session;
mod work;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use zeroize::Zeroizing;

pub(super) use work::WorkError;

use super::core::api::Api;
use super::core::repair;
use super::store::{Credential, Error, Store};
use super::transport::HttpTransport;
use super::types::{Connection, Live};
use crate::clock::{Clock, Random};
use crate::ids::GroupId;

/// What only is worth knowing now is dropped for readers that are this far behind.
const LIVE_QUEUE: usize = 256;
/// After another stream of this device took over: both would take turns for ever.
const REPLACED_WAIT: Duration = Duration::from_secs(30);
/// How often old state is removed, and whether keys are due is looked at.
const HOUSEKEEPING: Duration = Duration::from_secs(3_600);

/// What all parts of a client share.
pub(super) struct Inner {
    pub store: Store,
    pub http: HttpTransport,
    pub api: Api<HttpTransport>,
    pub credential: Credential,
    pub clock: Arc<dyn Clock>,
    pub random: Arc<dyn Random>,
    pub connection: watch::Sender<Connection>,
    pub live: broadcast::Sender<Live>,
    /// Changes of one group are made one after the other.
    group_locks: Mutex<HashMap<GroupId, Arc<tokio::sync::Mutex<()>>>>,
    /// Groups that this device came into since the session looked last.
    entered: Mutex<HashSet<GroupId>>,
}

impl Inner {
    pub(super) fn new(store: Store, http: HttpTransport, credential: Credential, clock: Arc<dyn Clock>, random: Arc<dyn Random>) -> Self {
        let api = Api::new(http.clone(), Some(Zeroizing::new(credential.secret.to_string())));
        let (connection, _) = watch::channel(Connection::Stopped);
        let (live, _) = broadcast::channel(LIVE_QUEUE);
        Self { store, http, api, credential, clock, random, connection, live, group_locks: Mutex::default(), entered: Mutex::default() }
    }

    fn set_connection(&self, state: Connection) {
        let changed = self.connection.send_if_modified(|old| std::mem::replace(old, state) != state);
        if changed {
            self.show(Live::Connection { state });
        }
    }

    fn show(&self, live: Live) {
        // Without readers there is nobody to tell.
        let _ = self.live.send(live);
    }
}

/// Why a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// The client is shut down.
    Shutdown,
    /// The server does not know this device any more.
    SignedOut,
    /// A newer stream of the same device took over.
    Replaced,
    /// Trouble that passes; `live` says whether the connection worked before.
    Lost { reason: String, live: bool, wait_ms: u64 },
}

/// The tasks of a running client.
pub(super) struct Running {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Running {
    /// Starts them on the current runtime.
    pub(super) fn start(inner: &Arc<Inner>) -> Self {
        let (stop, stopped) = watch::channel(false);
        let connection = tokio::spawn(keep_connected(inner.clone(), stopped.clone()));
        let expiry = tokio::spawn(expire(inner.clone(), stopped));
        Self { stop, tasks: vec![connection, expiry] }
    }

    /// Ends them and waits for it.
    pub(super) async fn stop(self) {
        let _ = self.stop.send(true);
        for task in self.tasks {
            // A panic in a task was reported by the panic hook; shutting down goes on.
            let _ = task.await;
        }
    }
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A dropped sender means that the client is gone: stop as well.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Connects again and again, waiting longer each time it does not work.
async fn keep_connected(inner: Arc<Inner>, mut stop: watch::Receiver<bool>) {
    let mut attempts = 0;
    loop {
        inner.set_connection(Connection::Connecting);
        let end = session::run(&inner, &mut stop).await;
        let wait = match end {
            End::Shutdown => break inner.set_connection(Connection::Stopped),
            End::SignedOut => {
                if let Err(error) = inner.store.run(|db| db.sign_out()).await {
                    tracing::error!(%error, "being signed out could not be noted");
                }
                break inner.set_connection(Connection::SignedOut);
            }
            End::Replaced => REPLACED_WAIT,
            End::Lost { reason, live, wait_ms } => {
                attempts = if live { 0 } else { attempts + 1 };
                let wait = wait_ms.saturating_add(repair::backoff(attempts, &*inner.random));
                tracing::info!(reason, wait_ms = wait, "the connection to the server is lost");
                Duration::from_millis(wait)
            }
        };
        inner.set_connection(Connection::Waiting);
        tokio::select! {
            () = stopped(&mut stop) => break inner.set_connection(Connection::Stopped),
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Removes messages when their time is over, connected or not.
async fn expire(inner: Arc<Inner>, mut stop: watch::Receiver<bool>) {
    loop {
        let next = match inner.store.run(|db| db.expire()).await {
            Ok((removed, next)) => {
                if removed > 0 {
                    inner.store.scrub().await;
                }
                next
            }
            Err(Error::Closed) => return,
            Err(error) => {
                tracing::error!(%error, "expired messages could not be removed");
                None
            }
        };
        let wait = next.map_or(HOUSEKEEPING, |at| Duration::from_millis(at.saturating_sub(inner.clock.now().0)).min(HOUSEKEEPING));
        tokio::select! {
            () = stopped(&mut stop) => return,
            () = inner.store.expiry().notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}
