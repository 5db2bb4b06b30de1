//! The thread that writes what the projector flushes. A flush is many milliseconds of work that nobody waits for, since the log
//! has it all: on a thread of the runtime it took the core from the messages beside it, and was the p99 of live delivery.

use std::sync::Arc;
use std::thread::JoinHandle;

use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot};

use super::View;
use crate::background;
use crate::store::{DeliveryWrite, StoreError};

/// Writes that may wait; their callers wait in front of the queue past that.
const QUEUE: usize = 4;

struct Call {
    write: DeliveryWrite,
    reply: oneshot::Sender<Result<(), StoreError>>,
}

/// The thread. Dropping it finishes what is queued.
pub(super) struct ViewThread {
    calls: Option<mpsc::Sender<Call>>,
    thread: Option<JoinHandle<()>>,
}

impl ViewThread {
    pub(super) fn start(view: Arc<RwLock<Arc<View>>>) -> std::io::Result<Self> {
        let (calls, mut queue) = mpsc::channel::<Call>(QUEUE);
        let thread = background::spawn("store-view", move || {
            while let Some(Call { write, reply }) = queue.blocking_recv() {
                let view = view.read().clone();
                // Who waited may have gone away; the write stands.
                let _ = reply.send(view.write_delivery(&write));
            }
        })?;
        Ok(Self { calls: Some(calls), thread: Some(thread) })
    }

    pub(super) async fn write(&self, write: DeliveryWrite) -> Result<(), StoreError> {
        let closed = || StoreError::Unavailable("the view's thread is gone; restart the server".into());
        let (reply, answer) = oneshot::channel();
        let calls = self.calls.as_ref().ok_or_else(closed)?;
        calls.send(Call { write, reply }).await.map_err(|_| closed())?;
        answer.await.map_err(|_| closed())?
    }
}

impl Drop for ViewThread {
    fn drop(&mut self) {
        self.calls = None;
        if let Some(thread) = self.thread.take() {
            // A panic of it was reported to its callers.
            let _ = thread.join();
        }
    }
}
