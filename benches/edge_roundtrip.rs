//! From a sender's socket to a recipient's: one message at a time, a steady rate, and as fast as it goes.

mod support;

fn main() {
    support::run(
        "edge round trip",
        &[
            &["--senders", "1", "--recipients", "1", "--window", "1", "--seconds", "5"],
            &["--rate", "2000", "--seconds", "10"],
            &["--seconds", "10"],
            &["--http", "--senders", "16", "--recipients", "16", "--window", "8", "--seconds", "5"],
        ],
    );
}
