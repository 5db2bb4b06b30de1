//! What a run found: one JSON object for scripts, a table for people. Scripts depend on the names.

use std::collections::BTreeMap;

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

/// The figures of one run; what was not measured is null.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// `traffic`, `idle`, `backlog` or `bundles`.
    pub kind: &'static str,
    /// `websocket` or `http`.
    pub sends_by: &'static str,
    /// Sending devices.
    pub senders: u64,
    /// Receiving accounts.
    pub recipients: u64,
    /// In flight for each sender.
    pub window: u64,
    /// Bytes of each content before encryption.
    pub payload_bytes: u64,
    /// Whether contents were libsignal messages.
    pub crypto: bool,
    /// Messages a second asked for; null in a closed loop.
    pub rate: Option<f64>,
    /// Length of the measured window.
    pub seconds: f64,

    /// Messages the server said are durable.
    pub accepted: u64,
    /// Messages handed to a recipient's application, on each of its devices.
    pub delivered: u64,
    /// Accepted, and not received when the run was over.
    pub lost: u64,
    /// Received more than once by an application.
    pub duplicates: u64,
    /// At the wrong device, or changed on the way.
    pub corrupt: u64,
    /// Received and not decryptable.
    pub undecryptable: u64,
    /// Sent and never answered.
    pub unanswered: u64,
    /// Refused for good, by code of `stream.proto`.
    pub refused: BTreeMap<String, u64>,
    /// Sent again with the same client message id.
    pub repeated: u64,
    /// Sent again by the server after a reconnect and dropped by seq.
    pub redelivered: u64,
    /// Items whose seq did not grow within a connection.
    pub disorder: u64,
    /// Gap frames.
    pub gaps: u64,
    /// Messages whose delivery receipt the sender got.
    pub receipts: u64,
    /// Streams that broke and were opened again.
    pub reconnects: u64,

    /// Accepted a second, in the measured window.
    pub accepted_per_s: Option<f64>,
    /// Delivered a second, in the measured window.
    pub delivered_per_s: Option<f64>,
    /// Half took no longer, from sent (or due, with a rate) to received.
    pub p50_ms: Option<f64>,
    /// 99 of 100 took no longer.
    pub p99_ms: Option<f64>,
    /// 999 of 1,000 took no longer.
    pub p999_ms: Option<f64>,
    /// The slowest.
    pub max_ms: Option<f64>,
    /// The slowest from sent (or due) to accepted: how long acceptance paused.
    pub accepted_max_ms: Option<f64>,
    /// From connecting to the first pending envelope.
    pub first_ms: Option<f64>,
    /// From connecting until everything pending had come and the queue was empty.
    pub drain_ms: Option<f64>,

    /// CPU time of the server process, by delivered message (or by request).
    pub server_cpu_us_per_message: Option<f64>,
    /// CPU time of this process, likewise.
    pub client_cpu_us_per_message: Option<f64>,
    /// Resident memory of the server at the end of the window.
    pub server_rss_bytes: Option<u64>,
    /// How much it grew since before the run registered its devices, by device.
    pub server_rss_bytes_per_device: Option<f64>,
    /// How often the server began anew meanwhile.
    pub server_restarts: u64,
    /// Devices that the run registered.
    pub devices: u64,
    /// A few of the lost ones: sender, recipient, client message id.
    pub lost_examples: Vec<(u64, u64, u64)>,
}

impl Report {
    /// Whether the audit found nothing wrong.
    pub fn clean(&self) -> bool {
        self.lost == 0 && self.duplicates == 0 && self.corrupt == 0 && self.undecryptable == 0 && self.disorder == 0
    }

    /// Fills the percentiles from a histogram of microseconds.
    pub fn latencies(&mut self, histogram: &hdrhistogram::Histogram<u64>) {
        if histogram.is_empty() {
            return;
        }
        let at = |quantile| Some(histogram.value_at_quantile(quantile) as f64 / 1_000.0);
        (self.p50_ms, self.p99_ms, self.p999_ms, self.max_ms) = (at(0.5), at(0.99), at(0.999), at(1.0));
    }

    /// Prints it, as JSON or as a table.
    pub fn print(&self, json: bool) -> anyhow::Result<()> {
        if json {
            println!("{}", serde_json::to_string(self)?);
        } else {
            println!("{}", self.table());
        }
        Ok(())
    }

    fn table(&self) -> Table {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let mut row = |name: &str, value: String| {
            table.add_row([Cell::new(name), Cell::new(value).set_alignment(CellAlignment::Right)]);
        };
        let load = match self.rate {
            Some(rate) => format!("{} a second, open loop", grouped(rate as u64)),
            None => format!("closed loop, {} in flight each", self.window),
        };
        let what = format!("{}: {} → {} devices, {} B, {load}", self.kind, self.senders, self.recipients, self.payload_bytes);
        row(&what, format!("{:.1} s", self.seconds));
        for (name, value) in [
            ("accepted", self.accepted),
            ("delivered", self.delivered),
            ("lost", self.lost),
            ("duplicates", self.duplicates),
            ("corrupt, undecryptable, out of order", self.corrupt + self.undecryptable + self.disorder),
            ("receipts to senders", self.receipts),
            ("refused", self.refused.values().sum()),
            ("repeated by senders", self.repeated),
            ("reconnects", self.reconnects),
        ] {
            row(name, grouped(value));
        }
        let mut figure = |name: &str, value: Option<f64>, unit: &str| {
            if let Some(value) = value {
                let text = if value >= 10_000.0 { grouped(value.round() as u64) } else { format!("{value:.2}") };
                row(name, format!("{text} {unit}"));
            }
        };
        figure("accepted", self.accepted_per_s, "/s");
        figure("delivered", self.delivered_per_s, "/s");
        figure("p50", self.p50_ms, "ms");
        figure("p99", self.p99_ms, "ms");
        figure("p99.9", self.p999_ms, "ms");
        figure("slowest", self.max_ms, "ms");
        figure("slowest to be accepted", self.accepted_max_ms, "ms");
        figure("first pending envelope after", self.first_ms, "ms");
        figure("everything pending after", self.drain_ms, "ms");
        figure("server CPU a message", self.server_cpu_us_per_message, "µs");
        figure("load tool CPU a message", self.client_cpu_us_per_message, "µs");
        figure("server memory", self.server_rss_bytes.map(|bytes| bytes as f64 / 1_048_576.0), "MiB");
        figure("server memory a device", self.server_rss_bytes_per_device, "B");
        table
    }
}

/// A number with separators.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_find_the_names_they_depend_on() {
        let json = serde_json::to_value(Report::default()).unwrap();
        for name in [
            "accepted",
            "delivered",
            "lost",
            "duplicates",
            "delivered_per_s",
            "p50_ms",
            "p99_ms",
            "p999_ms",
            "server_cpu_us_per_message",
            "server_rss_bytes",
            "server_rss_bytes_per_device",
            "drain_ms",
            "first_ms",
        ] {
            assert!(json.get(name).is_some(), "{name}");
        }
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            (grouped(0), grouped(999), grouped(1_000), grouped(12_345_678)),
            ("0".into(), "999".into(), "1,000".into(), "12,345,678".into())
        );
    }
}
