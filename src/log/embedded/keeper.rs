//! The keeper: a thread that saves committed positions now and then.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::log::ReadError;
use crate::log::embedded::files::{self, Positions};
use crate::log::embedded::shared::Shared;

/// How often it looks.
const TICK: Duration = Duration::from_secs(1);

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

    /// Waits for the next round; `false` if there is none.
    fn wait(&self) -> bool {
        let mut state = self.state.lock();
        if !state.stop && !state.nudged {
            self.changed.wait_for(&mut state, TICK);
        }
        state.nudged = false;
        !state.stop
    }
}

impl Shared {
    /// The keeper's thread.
    pub fn keep(&self) {
        while self.keeper.wait() {
            if let Err(error) = self.save_positions(false) {
                tracing::warn!(%error, "the log can't save its consumers' positions; it tries again");
            }
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
            Positions::of(&view, &self.options.partitions.all())
        };
        let path = Positions::path(&self.options.dir);
        files::save(self.options.disk.as_ref(), &path, &positions).map_err(|error| {
            self.view.lock().positions_dirty = true;
            ReadError::Unavailable(format!("{}: {error}", path.display()))
        })
    }
}
