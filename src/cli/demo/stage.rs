//! How the story is told on a terminal.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Table, presets};
use crossterm::style::{Color, Stylize as _};

use super::Ending;
use crate::cli::load::report::grouped;

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// alice@socialink.
    Alice,
    /// bob@vignette.
    Bob,
}

/// Where the story is told.
pub struct Stage {
    aloud: bool,
    colours: bool,
    beat: Duration,
}

impl Stage {
    /// Silent, or aloud; with pauses for reading on a terminal, unless it is to be fast.
    pub fn new(aloud: bool, fast: bool) -> Self {
        let terminal = std::io::stdout().is_terminal();
        let colours = terminal && std::env::var_os("NO_COLOR").is_none();
        let beat = if aloud && terminal && !fast { Duration::from_millis(350) } else { Duration::ZERO };
        Self { aloud, colours, beat }
    }

    fn line(&self, text: &str, colour: Option<Color>, bold: bool) {
        if !self.aloud {
            return;
        }
        let styled = match colour {
            Some(colour) if self.colours => {
                let styled = text.with(colour);
                if bold { styled.bold().to_string() } else { styled.to_string() }
            }
            _ => text.to_owned(),
        };
        // A reader that went away must not end the story: the figures count.
        let _ = writeln!(std::io::stdout(), "{styled}");
    }

    /// A new act.
    pub fn act(&self, title: &str) {
        self.line("", None, false);
        self.line(&format!("── {title}"), Some(Color::White), true);
    }

    /// The narrator.
    pub fn tell(&self, text: &str) {
        self.line(&format!("   {text}"), Some(Color::DarkGrey), false);
    }

    /// Somebody writes a text.
    pub fn says(&self, who: Who, body: &str) {
        match who {
            Who::Alice => self.line(&format!("   alice  │ {body}"), Some(Color::Magenta), false),
            Who::Bob => self.line(&format!("     bob  │ {body}"), Some(Color::Cyan), false),
        }
    }

    /// Something happens to the broker.
    pub fn broker(&self, text: &str) {
        self.line(&format!("  broker  ▚ {text}"), Some(Color::Yellow), true);
    }

    /// Time to read.
    pub async fn pause(&self, beats: u32) {
        if !self.beat.is_zero() {
            tokio::time::sleep(self.beat * beats).await;
        }
    }

    /// The table at the end.
    pub fn curtain(&self, ending: &Ending) {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let mut row = |name: &str, value: String, good: Option<bool>| {
            let mut value = Cell::new(value).set_alignment(CellAlignment::Right);
            if let Some(good) = good.filter(|_| self.colours) {
                value = value.fg(if good { comfy_table::Color::Green } else { comfy_table::Color::Red });
            }
            table.add_row([Cell::new(name), value]);
        };
        row("texts sent", grouped(ending.texts_sent), None);
        row("times the broker was killed with -9", ending.kills.to_string(), None);
        let all = ending.delivered == ending.deliveries_expected;
        row("shown to a device", format!("{} of {}", ending.delivered, ending.deliveries_expected), Some(all));
        row("shown twice", ending.duplicated.to_string(), Some(ending.duplicated == 0));
        row("lost", ending.lost.to_string(), Some(ending.lost == 0));
        let latency = format!("{:.1} / {:.1} / {:.1} ms", ending.p50_ms, ending.p99_ms, ending.max_ms);
        row("from sent to shown, encryption and both databases included: p50 / p99 / max", latency, None);
        row("the offline device caught up with", format!("{} texts in {:.0} ms", ending.caught_up_texts, ending.catch_up_ms), None);
        for (place, searched) in [
            ("plaintext in the broker's folder", &ending.data),
            ("plaintext in the broker's log", &ending.log),
            ("plaintext in the broker's metrics", &ending.metrics),
        ] {
            let found = if searched.found == 0 { "not found".to_owned() } else { format!("FOUND {} times", searched.found) };
            row(place, format!("{found} ({} bytes searched)", grouped(searched.bytes)), Some(searched.found == 0));
        }
        let _ = writeln!(std::io::stdout(), "\n{table}");
        self.line("", None, false);
        if ending.good() {
            self.line(
                "   Your turn: `sealpost serve`, then `sealpost chat --as alice@socialink` in another terminal.",
                Some(Color::Green),
                false,
            );
        }
    }
}
