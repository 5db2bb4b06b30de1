//! `--record`: what became of every message and when, on the machine's clock, for whoever looks at a fault.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::Path;

use anyhow::Context as _;

use crate::clock::{Clock as _, SystemClock};
use crate::ids::AccountId;

/// A line for each acceptance and each delivery.
pub struct Record {
    lines: BufWriter<File>,
    /// The machine's clock when the world's began.
    began_ms: u64,
}

/// What a line is about.
#[derive(Debug, Clone, Copy)]
pub enum Event {
    /// The server said that it is durable.
    Accepted,
    /// A receiving device has it.
    Delivered,
}

impl Record {
    /// Begins anew, together with the world's clock.
    pub fn create(path: &Path) -> anyhow::Result<Self> {
        let lines = BufWriter::new(File::create(path).with_context(|| path.display().to_string())?);
        Ok(Self { lines, began_ms: SystemClock.now().0 })
    }

    /// A message was due then and is there now, both in microseconds of the world's clock.
    pub fn note(&mut self, event: Event, due_us: u64, now_us: u64, recipient: &[u8; 16]) -> io::Result<()> {
        let what = match event {
            Event::Accepted => 'a',
            Event::Delivered => 'd',
        };
        let due_ms = self.began_ms as f64 + due_us as f64 / 1e3;
        let took_ms = now_us.saturating_sub(due_us) as f64 / 1e3;
        writeln!(self.lines, "{what},{due_ms:.1},{took_ms:.1},{}", AccountId::from_bytes(*recipient))
    }

    /// Writes what is left.
    pub fn flush(&mut self) -> io::Result<()> {
        self.lines.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_what_when_how_long_and_for_whom() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut record = Record::create(file.path()).unwrap();
        record.began_ms = 1_000_000;
        record.note(Event::Accepted, 2_500, 4_600, &[7; 16]).unwrap();
        record.note(Event::Delivered, 2_500, 1_500, &[7; 16]).unwrap();
        record.flush().unwrap();
        let account = AccountId::from_bytes([7; 16]);
        let lines = format!("a,1000002.5,2.1,{account}\nd,1000002.5,0.0,{account}\n");
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), lines);
    }
}
