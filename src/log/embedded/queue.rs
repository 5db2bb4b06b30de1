//! Appends on their way to the log thread: bounded, one short lock an append, a wake-up only if the thread sleeps.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};

use crate::log::{AppendError, AppendSink, Record};

/// What a queued record costs besides its payload.
const ENTRY_COST: usize = 96;

/// One append.
pub(super) struct Entry {
    pub payload: Bytes,
    pub sink: Arc<dyn AppendSink>,
    pub token: u64,
    pub slot: u32,
}

/// Records to write again at the new end, with the offsets they have.
pub(super) struct Carry {
    pub slot: u32,
    pub records: Vec<Record>,
    pub reply: std::sync::mpsc::Sender<Result<(), AppendError>>,
}

/// Whether appends are taken.
#[derive(Clone)]
enum Gate {
    Open,
    /// Nothing more comes in; what is queued is committed.
    Closing,
    /// Nothing more comes in or goes out.
    Shut(AppendError),
}

struct State {
    entries: Vec<Entry>,
    carries: Vec<Carry>,
    /// Queued, and taken but not committed yet.
    bytes: usize,
    sleeping: bool,
    gate: Gate,
}

/// See the module.
pub(super) struct Queue {
    state: Mutex<State>,
    wake: Condvar,
    bytes_max: usize,
}

/// What the log thread has to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Entries or carries were taken.
    Some,
    /// Nothing came for a while.
    Idle,
    /// Everything is committed and nothing more will come.
    Closing,
    /// Stop at once.
    Shut,
}

impl Queue {
    pub fn new(bytes_max: usize) -> Self {
        let state = State { entries: Vec::new(), carries: Vec::new(), bytes: 0, sleeping: false, gate: Gate::Open };
        Self { state: Mutex::new(state), wake: Condvar::new(), bytes_max }
    }

    pub fn push(&self, entry: Entry) -> Result<(), AppendError> {
        let cost = entry.payload.len() + ENTRY_COST;
        let mut state = self.state.lock();
        state.check()?;
        if state.bytes + cost > self.bytes_max && state.bytes > 0 {
            return Err(AppendError::Full);
        }
        state.bytes += cost;
        state.entries.push(entry);
        self.wake_up(state);
        Ok(())
    }

    pub fn push_carry(&self, carry: Carry) -> Result<(), AppendError> {
        let mut state = self.state.lock();
        state.check()?;
        state.carries.push(carry);
        self.wake_up(state);
        Ok(())
    }

    fn wake_up(&self, mut state: parking_lot::MutexGuard<'_, State>) {
        let sleeping = std::mem::take(&mut state.sleeping);
        drop(state);
        if sleeping {
            self.wake.notify_one();
        }
    }

    /// Waits for work and takes all of it into the (empty) vectors. `done` bytes were committed since the last call.
    pub fn take(&self, entries: &mut Vec<Entry>, carries: &mut Vec<Carry>, done: usize, patience: Option<Duration>) -> Work {
        let deadline = patience.map(|patience| Instant::now() + patience);
        let mut state = self.state.lock();
        state.bytes = state.bytes.saturating_sub(done);
        loop {
            if let Gate::Shut(_) = state.gate {
                return Work::Shut;
            }
            if !state.entries.is_empty() || !state.carries.is_empty() {
                std::mem::swap(&mut state.entries, entries);
                std::mem::swap(&mut state.carries, carries);
                return Work::Some;
            }
            if let Gate::Closing = state.gate {
                return Work::Closing;
            }
            state.sleeping = true;
            match deadline {
                None => self.wake.wait(&mut state),
                Some(deadline) => {
                    if self.wake.wait_until(&mut state, deadline).timed_out() && state.sleeping {
                        state.sleeping = false;
                        return Work::Idle;
                    }
                }
            }
            state.sleeping = false;
        }
    }

    /// `done` bytes were committed; returns how many wait.
    pub fn settle(&self, done: usize) -> usize {
        let mut state = self.state.lock();
        state.bytes = state.bytes.saturating_sub(done);
        state.bytes
    }

    /// What an entry counts against the cap.
    pub fn cost(entry: &Entry) -> usize {
        entry.payload.len() + ENTRY_COST
    }

    /// Refuses what comes from now on; what is queued is still taken.
    pub fn close(&self) {
        let mut state = self.state.lock();
        if let Gate::Open = state.gate {
            state.gate = Gate::Closing;
        }
        state.sleeping = false;
        drop(state);
        self.wake.notify_one();
    }

    /// Refuses everything with this error; returns what was queued, so that its sinks are told.
    pub fn shut(&self, error: AppendError) -> (Vec<Entry>, Vec<Carry>) {
        let mut state = self.state.lock();
        if !matches!(state.gate, Gate::Shut(_)) {
            state.gate = Gate::Shut(error);
        }
        state.sleeping = false;
        let left = (std::mem::take(&mut state.entries), std::mem::take(&mut state.carries));
        drop(state);
        self.wake.notify_one();
        left
    }

    /// Why nothing is taken, if so.
    pub fn check(&self) -> Result<(), AppendError> {
        self.state.lock().check()
    }
}

impl State {
    fn check(&self) -> Result<(), AppendError> {
        match &self.gate {
            Gate::Open => Ok(()),
            Gate::Closing => Err(AppendError::Closed),
            Gate::Shut(error) => Err(error.clone()),
        }
    }
}
