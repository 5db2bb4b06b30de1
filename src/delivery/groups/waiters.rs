//! Requests that wait for the projector's verdict.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::error::GroupError;
use crate::limits;
use crate::projector::push::GroupVerdict;

/// All of one edge.
#[derive(Debug)]
pub(super) struct Waiters {
    waiting: Mutex<HashMap<u64, oneshot::Sender<GroupVerdict>>>,
    next_number: AtomicU64,
}

impl Default for Waiters {
    fn default() -> Self {
        Self { waiting: Mutex::default(), next_number: AtomicU64::new(1) }
    }
}

impl Waiters {
    /// A place, if one is free.
    pub(super) fn wait(&self) -> Result<Waiter<'_>, GroupError> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        if waiting.len() >= limits::DIRECTORY_WAITERS {
            return Err(GroupError::Unavailable);
        }
        waiting.insert(number, sender);
        Ok(Waiter { waiters: self, number, receiver: Some(receiver) })
    }

    /// A verdict has come. Unknown numbers are those nobody waits for any more.
    pub(super) fn complete(&self, number: u64, verdict: GroupVerdict) {
        if let Some(waiter) = self.waiting.lock().remove(&number) {
            // Who waited may have gone away; what was decided stands.
            let _ = waiter.send(verdict);
        }
    }
}

/// A place among those who wait, given back when it is dropped.
pub(super) struct Waiter<'a> {
    waiters: &'a Waiters,
    /// Its number.
    pub(super) number: u64,
    receiver: Option<oneshot::Receiver<GroupVerdict>>,
}

impl Waiter<'_> {
    pub(super) async fn verdict(mut self) -> Result<GroupVerdict, GroupError> {
        let receiver = self.receiver.take().ok_or(GroupError::OutcomeUnknown)?;
        receiver.await.map_err(|_| GroupError::OutcomeUnknown)
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.waiters.waiting.lock().remove(&self.number);
    }
}
