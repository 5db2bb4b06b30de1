//! A device comes back to 10,000 messages.

mod support;

fn main() {
    support::run(
        "backlog drain",
        &[&["backlog", "--pending", "10000"], &["backlog", "--pending", "10000"], &["backlog", "--pending", "1000"]],
    );
}
