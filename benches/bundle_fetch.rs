//! Key bundles at 500 a second, each with one-time keys of its own.

mod support;

fn main() {
    support::run("bundle fetch", &[&["bundles", "--rate", "500", "--seconds", "10"]]);
}
