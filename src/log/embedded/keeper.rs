//! The keeper: a thread that now and then saves committed positions, summarizes sealed segments and lets old ones go.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::log::ReadError;
use crate::log::embedded::files::{self, Positions};
use crate::log::embedded::shared::Shared;
use crate::log::embedded::summary::Sealed;

/// How often it looks for positions to save.
const TICK: Duration = Duration::from_secs(1);
/// Every so many ticks it looks for what may go; also whenever a segment is full.
const RETAIN_TICKS: u32 = 30;

#[derive(Default)]
struct State {
    nudged: bool,
    stop: bool,
}

/// Wakes and ends the thread.
#[derive(Default)]
pub(super) struct Keeper {
    state: Mutex<State>,
    changed: Condvar,
    /// One saves at a time, so that a newer file is never replaced by an older one.
    saving: Mutex<()>,
    /// Segments that are full and have no summary yet.
    pub sealed: Mutex<Vec<Sealed>>,
    /// Segments that are gone but whose files are not; also makes retention one at a time.
    pub doomed: Mutex<Vec<u64>>,
}

impl Keeper {
    /// There is something to do.
    pub fn nudge(&self) {
        self.state.lock().nudged = true;
        self.changed.notify_all();
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.state.lock().stop = true;
        self.changed.notify_all();
    }

    /// Waits for the next round: whether it was nudged, or `None` if it was stopped.
    fn wait(&self) -> Option<bool> {
        let mut state = self.state.lock();
        if !state.stop && !state.nudged {
            self.changed.wait_for(&mut state, TICK);
        }
        let nudged = std::mem::take(&mut state.nudged);
        (!state.stop).then_some(nudged)
    }
}

impl Shared {
    /// The keeper's thread.
    pub fn keep(&self) {
        let mut ticks = 0;
        while let Some(nudged) = self.keeper.wait() {
            if let Err(error) = self.save_positions(false) {
                tracing::warn!(%error, "the log can't save its consumers' positions; it tries again");
            }
            self.heal();
            if let Err(error) = self.summarize() {
                tracing::warn!(%error, "the log can't write a segment's summary; the next start takes longer");
            }
            ticks += 1;
            if nudged || ticks % RETAIN_TICKS == 0 {
                self.retain_or_warn();
            }
        }
    }

    /// Lets go what may go.
    pub fn retain_or_warn(&self) {
        if let Err(error) = self.retain() {
            tracing::warn!(%error, "the log can't remove what is past its retention; it tries again");
        }
    }

    /// Writes the positions file if anything changed.
    pub fn save_positions(&self, force: bool) -> Result<(), ReadError> {
        let _one = self.keeper.saving.lock();
        let positions = {
            let mut view = self.view.lock();
            if !view.positions_dirty && !force {
                return Ok(());
            }
            view.positions_dirty = false;
            Positions::of(&view, &self.slots().all())
        };
        let path = Positions::path(&self.options.dir);
        files::save(self.options.disk.as_ref(), &path, &positions).map_err(|error| {
            self.view.lock().positions_dirty = true;
            ReadError::Unavailable(format!("{}: {error}", path.display()))
        })
    }
}
