//! Work that must not hold up messages: threads that give way to all others.

use std::io;
use std::thread::JoinHandle;

/// Niceness of background threads: among busy threads each gets about a tenth of its share, and whoever wakes up with a message goes
/// first. Not more, since a message waits in the end for a background thread that gets nothing at all.
const NICENESS: i32 = 10;

/// Starts a thread that gives way to all others; threads that it starts do so too.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        // On Linux niceness belongs to a thread. Where it can't be had the work is done all the same.
        let _ = rustix::process::nice(NICENESS);
        work();
    })
}
