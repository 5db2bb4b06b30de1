//! What the server process costs: CPU and memory, from its `/metrics` (also on another machine) or from `/proc`.

use super::api::Api;
use crate::metrics::{ProcessUsage, process_usage};

/// Where the figures come from.
enum Source {
    Metrics(Api),
    Proc(u32),
}

/// Adds up a process's CPU time over restarts, and keeps its last size.
pub struct Meter {
    source: Source,
    last: Option<ProcessUsage>,
    cpu_seconds: f64,
    /// How often the counter began anew.
    pub restarts: u64,
}

impl Meter {
    /// Of this process id on this machine, or else of whatever answers at `/metrics`.
    pub fn new(api: &Api, pid: Option<u32>) -> Self {
        let source = pid.map_or_else(|| Source::Metrics(api.clone()), Source::Proc);
        Self { source, last: None, cpu_seconds: 0.0, restarts: 0 }
    }

    /// Looks again; a server that is away just now changes nothing.
    pub async fn sample(&mut self) {
        let sample = match &self.source {
            Source::Metrics(api) => api.metrics().await.ok().and_then(|text| from_metrics(&text)),
            Source::Proc(pid) => process_usage(&pid.to_string()),
        };
        if let Some(sample) = sample {
            self.add(sample);
        }
    }

    fn add(&mut self, sample: ProcessUsage) {
        if let Some(last) = self.last {
            let restarted = sample.cpu_seconds < last.cpu_seconds;
            self.restarts += u64::from(restarted);
            self.cpu_seconds += if restarted { sample.cpu_seconds } else { sample.cpu_seconds - last.cpu_seconds };
        }
        self.last = Some(sample);
    }

    /// CPU seconds since the first sample; none without a sample.
    pub fn cpu_seconds(&self) -> Option<f64> {
        self.last.map(|_| self.cpu_seconds)
    }

    /// Resident bytes at the last sample.
    pub fn resident_bytes(&self) -> Option<u64> {
        self.last.map(|sample| sample.resident_bytes)
    }
}

/// CPU seconds of this process.
pub fn own_cpu_seconds() -> Option<f64> {
    process_usage("self").map(|sample| sample.cpu_seconds)
}

fn from_metrics(text: &str) -> Option<ProcessUsage> {
    let value = |name: &str| {
        text.lines().find_map(|line| {
            let rest = line.strip_prefix(name)?;
            let rest = rest.strip_prefix("_total").unwrap_or(rest);
            rest.starts_with([' ', '{']).then(|| rest.rsplit(' ').next()?.parse::<f64>().ok())?
        })
    };
    let resident_bytes = value("sealpost_process_resident_bytes")? as u64;
    Some(ProcessUsage { cpu_seconds: value("sealpost_process_cpu_seconds")?, resident_bytes })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_found_with_and_without_labels() {
        let text = "# TYPE sealpost_process_cpu_seconds counter\nsealpost_process_cpu_seconds_total{role=\"all\"} 12.5\nsealpost_process_resident_bytes_max 1\nsealpost_process_resident_bytes 4096\n";
        assert_eq!(from_metrics(text), Some(ProcessUsage { cpu_seconds: 12.5, resident_bytes: 4096 }));
        assert_eq!(from_metrics("nothing 1\n"), None);
    }

    #[test]
    fn a_restart_does_not_make_time_run_backwards() {
        let mut meter = Meter { source: Source::Proc(0), last: None, cpu_seconds: 0.0, restarts: 0 };
        for cpu_seconds in [10.0, 12.0, 1.0, 1.5] {
            meter.add(ProcessUsage { cpu_seconds, resident_bytes: 7 });
        }
        assert_eq!((meter.cpu_seconds(), meter.restarts, meter.resident_bytes()), (Some(3.5), 1, Some(7)));
    }
}
