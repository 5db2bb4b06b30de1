//! One file a subcommand.

pub mod token;
