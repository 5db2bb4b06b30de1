//! One file a subcommand.

pub mod load;
pub mod token;
