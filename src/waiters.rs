//! Requests of one edge that wait for a projector's verdict, which comes as a push with the request's number. Capped, and a place is given back
//! as soon as nobody waits any more.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::limits;

/// As many wait as may: try again later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many requests wait for a verdict")]
pub struct Full;

/// Everybody who waits for verdicts of one kind.
#[derive(Debug)]
pub struct Waiters<V> {
    waiting: Mutex<HashMap<u64, oneshot::Sender<V>>>,
    next_number: AtomicU64,
}

impl<V> Default for Waiters<V> {
    fn default() -> Self {
        Self { waiting: Mutex::default(), next_number: AtomicU64::new(1) }
    }
}

impl<V> Waiters<V> {
    /// A place, if one is free.
    pub fn wait(&self) -> Result<Waiter<'_, V>, Full> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.waiting.lock();
        if waiting.len() >= limits::DIRECTORY_WAITERS {
            return Err(Full);
        }
        waiting.insert(number, sender);
        Ok(Waiter { waiters: self, number, receiver })
    }

    /// A verdict has come. Unknown numbers are those nobody waits for any more.
    pub fn complete(&self, number: u64, verdict: V) {
        if let Some(waiter) = self.waiting.lock().remove(&number) {
            // Who waited may have gone away; what was decided stands.
            let _ = waiter.send(verdict);
        }
    }

    /// Nobody waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.lock().is_empty()
    }
}

/// A place among those who wait, given back when it is dropped.
#[derive(Debug)]
pub struct Waiter<'a, V> {
    waiters: &'a Waiters<V>,
    number: u64,
    receiver: oneshot::Receiver<V>,
}

impl<V> Waiter<'_, V> {
    /// Its number, for the one who decides.
    pub const fn number(&self) -> u64 {
        self.number
    }

    /// The verdict; `None` if none will come.
    pub async fn verdict(mut self) -> Option<V> {
        (&mut self.receiver).await.ok()
    }
}

impl<V> Drop for Waiter<'_, V> {
    fn drop(&mut self) {
        self.waiters.waiting.lock().remove(&self.number);
    }
}
