//! What a run says while it runs: on stderr, so that `--json` on stdout stays one object.

use std::cell::Cell;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a line is written where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Says how a run goes: a spinner on a terminal, else a line every few seconds.
pub struct Progress {
    bar: Option<ProgressBar>,
    next_line: Cell<Option<Instant>>,
}

impl Progress {
    /// For people, or for scripts that read a log.
    pub fn on_stderr() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template("{spinner} {elapsed_precise} {msg}").unwrap_or_else(|_| ProgressStyle::default_spinner());
            let bar = ProgressBar::new_spinner().with_style(style);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, next_line: Cell::new(Some(Instant::now())) }
    }

    /// Says nothing; for tests.
    pub fn quiet() -> Self {
        Self { bar: None, next_line: Cell::new(None) }
    }

    /// How it goes now; dropped if a line was written a moment ago.
    pub fn say(&self, text: impl FnOnce() -> String) {
        if let Some(bar) = &self.bar {
            bar.set_message(text());
        } else if let Some(at) = self.next_line.get().filter(|at| *at <= Instant::now()) {
            eprintln!("{}", text());
            self.next_line.set(Some(at.max(Instant::now()) + LINE_EVERY));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
